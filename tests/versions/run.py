"""The tests that depend on what is installed, in virtual environments with other versions than `constraints.txt` has.

    python tests/versions/run.py                       # all: transformers, newest, oldest
    python tests/versions/run.py transformers          # as the gate does
    python tests/versions/run.py --write docs/versions.md    # all, and the table of what was run
    python tests/versions/run.py oldest --write docs/versions.md    # one again; the others as they were run last

Sets of versions lie beside this file. `transformers` is `constraints.txt` with the newest Transformers, `newest` has
the newest of everything, `oldest` the oldest that pyproject.toml admits. Where PyTorch is the same, `music.py` must
write the same bytes as in the environment that runs this.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent
# With the versions of constraints.txt where a set has none of its own; the oldest go with others of their time.
SETS = {"transformers": True, "newest": True, "oldest": False}
SHOWN = ("transformers", "torch", "safetensors", "huggingface_hub", "miditok", "symusic", "numpy", "accelerate")
SHOWN += ("datasets", "tensorboard", "peft", "gradio", "matplotlib", "pretty_midi")
# Generation and caches, remote code, Trainer, adapters, the tokenizer, pipelines, the endpoint, the Space.
TESTS = (
    "tests/test_forward.py",
    "tests/test_layout.py",
    *(f"tests/sage_music/test_{part}_sage_music.py" for part in ("attention", "cache", "decoding", "drafting")),
    *(f"tests/sage_music/test_{part}_sage_music.py" for part in ("generation", "modeling", "quantization")),
    "tests/sage_music/test_tokenization_sage_music.py",
    "tests/sage_music/test_continuous_batching.py",
    *(f"tests/perceivers/test_{part}_perceivers.py" for part in ("cache", "generation", "modeling", "tokenization")),
    "tests/sage_studio/publishing/test_remote_loading.py",
    "tests/sage_studio/bench/test_bench.py",
    "tests/sage_studio/generation/test_bars.py",
    "tests/sage_studio/generation/test_seconds.py",
    "tests/sage_studio/generation/test_stream.py",
    "tests/sage_studio/checkpoints/test_lora.py",
    "tests/sage_studio/train/test_training_numerics.py",
    "tests/sage_studio/train/test_command.py",
    "tests/sage_studio/experiments/test_compound.py",
    "tests/sage_studio/test_pipelines.py",
    "tests/sage_studio/publishing/test_handler.py",
    "tests/sage_studio/publishing/test_space.py",
)


def pins(file: Path) -> dict[str, str]:
    """`name==version` lines of a constraints file, by normalised name."""
    found = re.findall(r"^([\w.-]+)==(\S+)", file.read_text(encoding="utf-8"), re.M)
    return {normalised(name): version for name, version in found}


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "_", name).lower()


def environment(name: str, folder: Path) -> Path:
    """The Python of a set's virtual environment, made anew when its versions change."""
    chosen = pins(HERE / f"{name}.txt")
    if SETS[name]:
        chosen = {**pins(ROOT / "constraints.txt"), **chosen}
    wanted = "".join(f"{package}=={version}\n" for package, version in sorted(chosen.items()))
    wanted_for = wanted + (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    python, made = folder / "bin" / "python", folder / "made"
    if not made.is_file() or made.read_text(encoding="utf-8") != wanted_for:
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        constraints = folder / "constraints.txt"
        constraints.write_text(wanted, encoding="utf-8")
        install = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "-c", constraints]
        # PyTorch first: alone, its CPU build is found where there is one.
        subprocess.run([*install, f"torch=={chosen['torch']}"], check=True)
        subprocess.run([*install, "-e", f"{ROOT}[dev]", "-e", ROOT / "weights"], check=True)
        made.write_text(wanted_for, encoding="utf-8")
    return python


def versions(python: Path | str) -> dict[str, str]:
    """What is installed there, of the packages in `SHOWN`."""
    code = f"import json; from importlib.metadata import version; print(json.dumps([version(n) for n in {SHOWN!r}]))"
    output = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout
    return dict(zip(SHOWN, json.loads(output), strict=True))


def music(python: Path | str) -> dict[str, str]:
    """Digests by `music.py`."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    run = subprocess.run([python, HERE / "music.py"], env=environment, cwd=ROOT, capture_output=True, text=True)
    if run.returncode:
        raise SystemExit(f"music.py ended with {run.returncode} in {python}: {run.stderr[-2000:]}")
    return json.loads(run.stdout)


def tests(python: Path, processes: int) -> dict[str, int]:
    """Runs `TESTS`; how many passed, failed and were skipped."""
    command = [python, "-m", "pytest", "-n", str(processes), "--dist", "loadgroup", "-p", "no:cacheprovider", "-v"]
    run = subprocess.Popen(
        [*command, "--no-header", "-o", "console_output_style=classic", *TESTS],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    lines = []
    for line in run.stdout:
        if re.match(r"(FAILED|ERROR|E  )", line) or line.startswith("="):
            print(line, end="", flush=True)
        lines.append(line)
    code, summary = run.wait(), lines[-1] if lines else ""
    counts = {
        kind: sum(map(int, re.findall(rf"(\d+) {kind}", summary))) for kind in ("passed", "failed", "skipped", "error")
    }
    if code not in (0, 1) or not counts["passed"]:
        raise SystemExit(f"pytest ended with {code} in {python}: {''.join(lines[-20:])}")
    return counts


def table(found: dict[str, dict]) -> str:
    """docs/versions.md: what was run, and what pyproject.toml admits for it."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    names = list(found)
    lines = [
        "# Versions",
        "",
        "What pyproject.toml admits, and so the `requirements.txt` of every exported repository, is what was run.",
        "`make test-versions` runs it again and writes this page; `.ci/run` runs the column `transformers`.",
        "",
        f"| package | admitted | {' | '.join(names)} |",
        f"|---|---|{'---|' * len(names)}",
    ]
    for package in SHOWN:
        admitted = re.search(rf'"{package}([=<>][^"]*)"', text)
        cells = [found[name]["versions"][package] for name in names]
        lines.append(f"| {package} | `{admitted[1]}` | {' | '.join(cells)} |")
    passed = [f"{found[name]['tests']['passed']:,}" for name in names]
    skipped = [str(found[name]["tests"]["skipped"]) for name in names]
    same = [found[name]["music"] for name in names]
    dates = [found[name]["date"] for name in names]
    lines += [
        f"| tests passed | | {' | '.join(passed)} |",
        f"| tests skipped | | {' | '.join(skipped)} |",
        f"| pieces of music, bytes against those of `constraints.txt` | | {' | '.join(same)} |",
        f"| run on | | {' | '.join(dates)} |",
        "",
        f"Python {platform.python_version()}, {platform.system()} {platform.machine()}, on the CPU. The tests are",
        "those of generation, caches, remote code, `Trainer`, adapters, tokenizers, pipelines, the endpoint and the",
        "Space (`TESTS` in `tests/versions/run.py`). Music is written by the command line, the stream, the pipeline,",
        "the endpoint and plain `generate()`, by both families, by fixed seeds (`tests/versions/music.py`). PyTorch's",
        "sums may differ in their last digit from version to version, and a sampled token with them. Sampling with",
        "beams (`do_sample=True, num_beams=3`) draws others from Transformers 5.24 on, with any model.",
        "",
        "Not run: GPUs, other operating systems, other processors than x86-64.",
        "",
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("sets", nargs="*", metavar="SET", help=f"of {', '.join(SETS)} (default: all)")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "versions", help="of the environments")
    parser.add_argument("--processes", type=int, default=2, help="of pytest (default: %(default)s)")
    parser.add_argument("--write", type=Path, metavar="FILE.md", help="write the table of all, as each was run last")
    args = parser.parse_args()
    unknown = [name for name in args.sets if name not in SETS]
    if unknown:
        parser.error(f"no set of versions is called {unknown[0]}: {', '.join(SETS)}")
    own, wrong = None, []
    for name in args.sets or SETS:
        record = args.folder / f"{name}.json"
        record.unlink(missing_ok=True)  # what was true before is not known to be so now
        python = environment(name, args.folder / name)
        installed = versions(python)
        print(f"== {name}: {', '.join(f'{package} {version}' for package, version in installed.items())}", flush=True)
        counts = tests(python, args.processes)
        own = music(sys.executable) if own is None else own
        there = music(python)
        different = [piece for piece in own if own[piece] != there.get(piece)]
        same_torch = installed["torch"].split("+")[0] == metadata.version("torch").split("+")[0]
        said = f"{len(own) - len(different)} of {len(own)} equal"
        print(
            f"{name}: {counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped; music: {said}"
        )
        reasons = ["tests failed"] if counts["failed"] or counts["error"] else []
        if different and same_torch:
            reasons.append(f"other music by {', '.join(different)}")
        if reasons:
            wrong.append(name)
            print(f"{name}: {'; '.join(reasons)}")
            continue
        result = {"versions": installed, "tests": counts, "music": said, "date": f"{datetime.now(UTC):%Y-%m-%d}"}
        record.write_text(json.dumps(result), encoding="utf-8")
    if args.write and not wrong:
        missing = [name for name in SETS if not (args.folder / f"{name}.json").is_file()]
        if missing:
            raise SystemExit(f"{missing[0]} was not run yet: the table is of all sets")
        found = {name: json.loads((args.folder / f"{name}.json").read_text(encoding="utf-8")) for name in SETS}
        args.write.write_text(table(found), encoding="utf-8")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
