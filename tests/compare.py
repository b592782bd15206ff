"""Whether two checkouts of this repository make the same music: a script for a change that must change nothing.

    python tests/compare.py BEFORE AFTER                   # all checks; some minutes on two cores
    python tests/compare.py BEFORE AFTER --only pipeline   # those with this word in their names
    python tests/compare.py BEFORE AFTER --keep FOLDER     # what both wrote is left there to be looked at

BEFORE and AFTER are folders with `src/` in them, and the dependencies are those of the Python that runs this. The same
command runs in both, from the same seeds, each in a process and an empty folder of its own, and what they write must be
equal: MIDI, sound, pictures and weights byte by byte, JSON once keys are renamed, without times that were measured.
One line a check is printed; the exit code is 1 where anything differs.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

# Keys of JSON, and options of Python: what they were, and what they may be now.
RENAMED = {
    "seconds": ("elapsed_s", "music_s"),  # wall time, or a length of music
    "music_seconds": ("music_s",),
    "prompt_seconds": ("prompt_s", "prompt_end_s"),  # an option; where a prompt ends
    "max_note_seconds": ("max_note_s",),
    "cut_seconds": ("cut_s",),
    "train_seconds": ("train_elapsed_s",),
    "onset_seconds": ("onset_s",),
    "duration_seconds": ("duration_s",),
    "wall_seconds": ("wall_s", "elapsed_s"),
    "max_audio_seconds": ("max_audio_s",),
    "max_prompt_seconds": ("max_prompt_s",),
    "max_seconds": ("max_music_s",),
}
# Words and phrases in texts.
SAID = {
    "python -m conversion.export_hub": "sage-music export",
    "python -m conversion.push_to_hub": "sage-music push",
    "python -m conversion.export_space": "sage-music space",
    "notekit.offline": "sage_studio.generation.folder",
    "notekit.checkpoint": "sage_studio.checkpoints",
    "notekit.compose": "sage_studio.generation.bars",
    "notekit.perform": "sage_studio.generation.seconds",
    "notekit.midi": "sage_studio.music.midi",
    "notekit": "sage_studio",
}
# Keys, by their old names, whose values are times of a clock or made of them (`seconds`: unless it is `music_s` now).
MEASURED = {"seconds", "wall_seconds", "train_seconds", "latency", "notes_per_second", "samples_per_second"}
MEASURED |= {"files_per_second", "files_per_s", "train_runtime", "train_samples_per_second", "train_steps_per_second"}
MEASURED |= {"train_tokens_per_second"}
MEASURED |= {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "custom_pipelines"}
# Files that hold times, paths or code: code may differ, but the music that it makes is compared.
PASSED_OVER = ("runs/*", "*.py", "training_args.bin", ".cache/*", "report.md", "journal/*")
# What says where weights come from: the bundled checkpoints' licences are known where they were not, and theirs moved.
PASSED_OVER += ("NOTICE.md", "provenance.json")

READ = ["--cache", "../.cache/tokens", "--workers", "1"]
BARS, SECONDS = ["--prompt-bars", "4", "--bars", "4"], ["--prompt-seconds", "5", "--minutes", "0.15"]
# The command line's, without --json: what each is called, and its arguments; IN holds the inputs.
COMMANDS = {
    "continue": ["continue", "IN/saints.mid", *BARS, "--wav", "--png"],
    "continue --draft": ["continue", "IN/saints.mid", *BARS, "--draft"],
    "continue --int8": ["continue", "IN/ode_to_joy.mid", *BARS, "--int8", "--temperature", "0"],
    "continue --free": ["continue", "IN/greensleeves.mid", *BARS, "--free", "--num", "2", "--seed", "5"],
    "continue --programs": ["continue", "IN/saints.mid", *BARS, "--programs", "0,33", "--top-p", "0.9"],
    "continue perceivers": ["continue", "IN/greensleeves.mid", "--model", "perceivers", *SECONDS, "--wav", "--png"],
    "continue perceivers, notes ended": [
        *("continue", "IN/saints.mid", "--model", "perceivers"),
        *("--max-tokens", "150", "--max-note-seconds", "1", "--num", "2"),
    ],
    "generate": ["generate", "--bars", "6", "--wav", "--png"],
    "generate, several windows": ["generate", "--bars", "70", "--programs", "drums,33", "--seed", "1"],
    "generate --tempo": ["generate", "--bars", "4", "--tempo", "96", "--time-signature", "3/4", "--draft"],
    "generate perceivers": ["generate", "--model", "perceivers", "--minutes", "0.2", "--wav", "--png"],
    "generate perceivers --max-tokens": ["generate", "--model", "perceivers", "--max-tokens", "200", "--seed", "2"],
    "stream": ["stream", "IN/saints.mid", *BARS, "--out", "out.mid"],
    "stream from nothing": ["stream", "--bars", "4", "--tempo", "120", "--seed", "3", "--out", "out.mid"],
    "render": ["render", "IN/saints.mid", "--out", "."],
    "info": ["info"],
    "info perceivers": ["info", "--model", "perceivers"],
    "prepare": [
        "prepare",
        "--data",
        "IN/corpus",
        "--output",
        "shards",
        "--cache",
        "../.cache/tokens",
        "--workers",
        "1",
    ],
}
TRAIN = [
    "train",
    "--data",
    "IN/corpus",
    "--output",
    "run",
    "--cache",
    "../.cache/tokens",
    "--workers",
    "1",
    "--max_steps",
    "20",
]
TRAIN += ["--seed", "0", "--use_cpu", "True", "--eval_steps", "10", "--logging_steps", "5", "--num_samples", "1"]
COMMANDS |= {
    "train": [*TRAIN, "--block_size", "128", "--per_device_train_batch_size", "2", "--sample_bars", "2"],
    "train perceivers": [*TRAIN, "--model", "perceivers", "--gradient_accumulation_steps", "1", "--sample_bars", "2"],
}
EVALUATE = ["evaluate", "--data", "IN/corpus", "--split", "all", "--out", "out", "--workers", "1", "--num", "3"]
COMMANDS |= {
    "evaluate continuations": [*EVALUATE, "sage-music", "perceivers", "IN/corpus", *BARS],
    "evaluate sets": [*EVALUATE, "sage-music", "perceivers", "--task", "set", "--bars", "4", "--seconds", "8"],
    "evaluate likelihood": [*EVALUATE, "sage-music", "perceivers", "--task", "likelihood"],
}
# Command lines that are refused, and say nothing on stdout.
REFUSED = [
    ["continue", "IN/nothing.mid"],
    ["continue", "IN/smpte.mid"],
    ["stream", "IN/saints.mid", "--tempo", "90"],
    ["generate", "--minutes", "1"],
    ["generate", "--model", "perceivers", "--bars", "4"],
    ["evaluate", "--data", "IN/corpus", "--window", "4"],
    ["generate", "--programs", "128"],
]
FOLDER = {
    "folder": ["--bars", "3", "--batch-size", "2"],
    "folder perceivers": ["--model", "perceivers", "--seconds", "5", "--prompt-seconds", "4", "--batch-size", "2"],
}
# Options of the pipeline and of the endpoint.
OPTIONS = {
    "sage_music": {"prompt_bars": 4, "bars": 4},
    "perceivers": {"prompt_seconds": 4, "seconds": 6, "max_note_seconds": 2},
}

PIPELINE = """
import json, sys
from importlib import import_module
from pathlib import Path
from transformers import pipeline
package, family, prompt, old, new = sys.argv[1:]
load = import_module(f"{package}.{'checkpoint' if package == 'notekit' else 'checkpoints.loading'}").load
import_module(f"{package}.pipelines")
model, tokenizer = load(family.replace("_", "-"))
pipe = pipeline("midi-continuation", model=model, tokenizer=tokenizer, device="cpu")
try:
    pipe._sanitize_parameters(**json.loads(new))
    options = json.loads(new)
except ValueError:
    options = json.loads(old)
data = Path(prompt).read_bytes()
results = [pipe(data, seed=0, **options), pipe(data, seed=1, temperature=0, audio=True, sample_rate=8000, **options)]
results += pipe([data] * 3, seed=[3, 4, 5], batch_size=3, **options)
for index, result in enumerate(results):
    Path(f"{index}.mid").write_bytes(result.pop("midi"))
    arrays = [result.pop(name) for name in ("notes", "audio") if name in result]
    Path(f"{index}.bin").write_bytes(b"".join(array.tobytes() for array in arrays))
print(json.dumps(results))
"""
HANDLER = """
import base64, json, sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
repository, prompt, old, new = sys.argv[1:]
spec = spec_from_file_location("handler", f"{repository}/handler.py")
module = module_from_spec(spec)
sys.modules["handler"] = module
spec.loader.exec_module(module)
handler = module.EndpointHandler(repository)
inputs = base64.b64encode(Path(prompt).read_bytes()).decode()
for index, more in enumerate(({}, {"temperature": 0.5, "audio": True, "sample_rate": 8000})):
    for options in (new, old):
        answer = handler({"inputs": inputs, "parameters": {**json.loads(options), **more, "seed": index}})
        if "midi" in answer:
            break
    else:
        sys.exit(str(answer))
    for name in ("midi", "audio"):
        if name in answer:
            Path(f"{index}.{name[:3]}").write_bytes(base64.b64decode(answer.pop(name)))
    print(json.dumps(answer))
print(json.dumps(handler({"inputs": inputs, "parameters": {"bars": 0, "seconds": 0}})["error"]["type"]))
print(json.dumps(handler({"inputs": "AAAA"})["error"]["type"]))
"""
CORPUS = """
import sys
from conftest import band
for index in range(14):
    score = band(bars=12, seed=index, qpm=90 + 5 * index)
    if index % 3 == 0:
        del score.tracks[1:]
    score.dump_midi(f"{sys.argv[1]}/{index:02}.mid")
"""


class CheckError(Exception):
    """A command that should have worked did not, or the other way round."""


@dataclass
class Tree:
    """A checkout, and the folder where its commands run, a folder a check."""

    root: Path
    work: Path

    @property
    def package(self) -> str:
        return "notekit" if (self.root / "src" / "notekit").is_dir() else "sage_studio"

    def run(self, check: str, *arguments: str, code: int = 0, output: str | None = None) -> None:
        """Run Python in a check's folder, and keep what it says on stdout as `output`."""
        folder = self.work / check
        folder.mkdir(exist_ok=True)
        roots = (self.root / "src", self.root / "weights" / "src", self.root, self.root / "tests")
        caches = {name: str(self.work / ".cache" / name) for name in ("HF_MODULES_CACHE", "HF_DATASETS_CACHE")}
        settings = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore", **caches}
        done = subprocess.run(
            [sys.executable, *(text.replace("IN/", "../.in/") for text in arguments)],
            cwd=folder,
            env={**os.environ, **settings, "PYTHONPATH": os.pathsep.join(map(str, filter(Path.is_dir, roots)))},
            capture_output=True,
            text=True,
        )
        if done.returncode != code:
            last = (done.stderr.strip().splitlines() or ["nothing on stderr"])[-1]
            raise CheckError(f"exit code {done.returncode}, not {code}: {last}")
        if output:
            (folder / output).write_text(done.stdout)

    def command(self, check: str, arguments: list[str], code: int = 0) -> None:
        out = ["--out", "out.mid"] if arguments[0] in ("continue", "generate") else []
        json_too = [] if arguments[0] == "train" else ["--json"]
        output = "stdout.jsonl" if json_too else None
        self.run(check, "-m", f"{self.package}.cli", *arguments, *out, *json_too, code=code, output=output)

    def folder(self, check: str, arguments: list[str]) -> None:
        module = "notekit.offline" if self.package == "notekit" else "sage_studio.generation.folder"
        self.run(check, "-m", module, "--prompts", "IN/prompts", "--output", "out", "--seed", "7", *arguments)

    def export(self, check: str, family: str) -> None:
        program = ["conversion.export_hub"]
        if self.package == "sage_studio":
            told = '"export"' in (self.root / "src" / "sage_studio" / "cli.py").read_text(encoding="utf-8")
            program = ["sage_studio.cli", "export"] if told else ["sage_studio.publishing.export"]
        self.run(check, "-m", *program, family.replace("_", "-"), "out", "--repo-id", "somebody/something")

    def snippet(self, check: str, code: str, *arguments: str, options: dict) -> None:
        new = {RENAMED.get(name, (name,))[-1 if name == "seconds" else 0]: value for name, value in options.items()}
        self.run(check, "-c", code, *arguments, json.dumps(options), json.dumps(new), output="stdout.jsonl")

    def check(self, name: str) -> str | None:
        """Run a check; what went wrong."""
        family = "perceivers" if "perceivers" in name else "sage_music"
        try:
            if name in COMMANDS:
                self.command(name, COMMANDS[name])
            elif name in FOLDER:
                self.folder(name, FOLDER[name])
            elif name.startswith("export"):
                self.export(name, family)
            elif name.startswith("pipeline"):
                self.snippet(name, PIPELINE, self.package, family, "IN/saints.mid", options=OPTIONS[family])
            elif name.startswith("handler"):
                exported = name.replace("handler", "export")
                if not (self.work / exported).is_dir():
                    self.export(exported, family)
                self.snippet(name, HANDLER, f"../{exported}/out", "IN/saints.mid", options=OPTIONS[family])
            else:
                for arguments in REFUSED:
                    self.command(name, arguments, code=2)
        except CheckError as error:
            return str(error)
        return None


CHECKS = [*COMMANDS, *FOLDER]
CHECKS += [f"{name}{family}" for name in ("pipeline", "export", "handler") for family in ("", " perceivers")]
CHECKS += ["what is refused"]


def differences(before: Path, after: Path) -> Iterator[str]:
    """Where two folders differ."""
    names = [{path.relative_to(of).as_posix() for path in of.rglob("*") if path.is_file()} for of in (before, after)]
    for name in sorted(names[0] | names[1]):
        if any(Path(name).match(pattern) or f"/{name}".find(f"/{pattern[:-1]}") >= 0 for pattern in PASSED_OVER):
            continue
        if name not in names[0] & names[1]:
            yield f"{name}: only {'before' if name in names[0] else 'after'}"
            continue
        old, new = (before / name).read_bytes(), (after / name).read_bytes()
        kind = Path(name).suffix
        old = old.replace(os.fsencode(before.parent), os.fsencode(after.parent))
        if old == new:
            continue
        if kind in (".json", ".jsonl"):
            texts = [data.splitlines() if kind == ".jsonl" else [data] for data in (old, new)]
            if len(texts[0]) != len(texts[1]):
                yield f"{name}: {len(texts[0])} lines, {len(texts[1])} after"
                continue
            for number, lines in enumerate(zip(*texts, strict=True)):
                place = f"{name}:{number + 1}" if kind == ".jsonl" else name
                yield from different(*map(json.loads, lines), place)
        elif kind in (".md", ".csv", ".txt", ".html"):
            lines = [data.decode().splitlines() for data in (old, new)]
            if len(lines[0]) != len(lines[1]):
                yield f"{name}: {len(lines[0])} lines, {len(lines[1])} after"
            for number, pair in enumerate(zip(*lines, strict=False)):
                if not same_text(*pair):
                    yield f"{name}:{number + 1}: {pair[0]!r}, {pair[1]!r} after"
        else:
            yield f"{name}: other bytes"


def different(old, new, place: str) -> Iterator[str]:
    """Where two values of JSON differ, but for renamed keys and measured times."""
    if isinstance(old, dict) and isinstance(new, dict):
        left = dict(new)
        for key, value in old.items():
            name = next((name for name in (key, *RENAMED.get(key, ())) if name in left), None)
            if name is None:
                yield f"{place}: {key} is gone"
                continue
            other = left.pop(name)
            if key not in MEASURED or (key == "seconds" and (name == "music_s" or isinstance(value, dict))):
                yield from different(value, other, f"{place}.{name}")
        yield from (f"{place}: {key} is new" for key in left)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, pair in enumerate(zip(old, new, strict=True)):
            yield from different(*pair, f"{place}[{index}]")
    elif not (same_text(old, new) if isinstance(old, str) and isinstance(new, str) else old == new):
        yield f"{place}: {old!r}, {new!r} after"


def same_text(old: str, new: str) -> bool:
    """Whether two texts say the same, but for renamed words."""
    if old == new:
        return True
    for phrase, other in SAID.items():
        old = old.replace(phrase, other)
    words = [re.findall(r"\w+|[^\w\s]", text) for text in (old, new)]
    return len(words[0]) == len(words[1]) and all(
        b == a or b in RENAMED.get(a, ()) for a, b in zip(*words, strict=True)
    )


def prepare(tree: Tree, before: Path) -> None:
    """The inputs, made of the older checkout alone."""
    inputs = tree.work / ".in"
    for name in ("corpus", "prompts"):
        (inputs / name).mkdir(parents=True)
    for name in ("saints", "ode_to_joy", "greensleeves"):
        data = (before / "examples" / f"{name}.mid").read_bytes()
        (inputs / f"{name}.mid").write_bytes(data)
        (inputs / "prompts" / f"{name}.mid").write_bytes(data)
    (inputs / "prompts" / "broken.mid").write_bytes(b"MThd")
    data = bytearray((inputs / "saints.mid").read_bytes())
    data[12:14] = b"\xe7\x28"  # 25 frames a second, 40 ticks each
    (inputs / "smpte.mid").write_bytes(data)
    Tree(before, tree.work).run(".in", "-c", CORPUS, "corpus")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--only", default="", metavar="WORD", help="checks with this in their names")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="a new one, to work in and to leave there")
    args = parser.parse_args(argv)
    if args.keep is not None:
        args.keep.mkdir(parents=True)
    checks, failed = [name for name in CHECKS if args.only in name], 0
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        work = (args.keep or Path(folder)).resolve()
        trees = [Tree(root.resolve(), work / name) for name, root in (("before", args.before), ("after", args.after))]
        for tree in trees:
            prepare(tree, args.before.resolve())
        for name in checks:
            wrong = list(pool.map(lambda tree, name=name: tree.check(name), trees))
            found = [f"{when}: {text}" for when, text in zip(("before", "after"), wrong, strict=True) if text]
            found = found or list(differences(*(tree.work / name for tree in trees)))
            failed += bool(found)
            print(f"{name}: {'differs' if found else 'same'}", flush=True)
            for line in found[:8]:
                print(f"    {line[:300]}", flush=True)
    print(f"{len(checks) - failed} of {len(checks)} are the same")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
