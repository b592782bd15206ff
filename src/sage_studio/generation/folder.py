"""Continuations of a whole folder of MIDI files, by one process or by many.

torchrun --nproc_per_node 2 -m sage_studio.generation.folder --prompts FOLDER --output OUT --bars 8 --seed 0

Processes share the two folders and nothing else: every prompt belongs to one of them by its place in the sorted list,
and its seed follows from its path, so that the music is the same however many there are. Music is written whole or not
at all and then noted in a journal; a run that was killed, or has new prompts, goes on with what is not noted. The first
process waits for the others and writes the manifest: one line a prompt, sorted by path, files that cannot be read among
them. The output folder:

    music/a/b.mid     prompt and new music of FOLDER/a/b.mid
    manifest.jsonl    path, sha256, seed, output, output_sha256, notes, bars (or music_s), remarks; or error
    options.json      what the music depends on besides the prompts; a run with other options is refused
    journal/          one line for every prompt done, one file a process
"""

import argparse
import hashlib
import inspect
import json
import os
import sys
import time
import warnings
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from sage_studio.checkpoints import load
from sage_studio.defaults import BARS, LENGTHS, MUSIC_S, PROMPT_BARS, PROMPT_S
from sage_studio.errors import MissingExtraError
from sage_studio.families import family_of
from sage_studio.files import Journal, midi_files, seed_of, write_atomic
from sage_studio.music.midi import score_from_notes
from sage_studio.music.notes import NOTE_DTYPE

from .options import positive_int
from .sampling import device_of

POLL_S = 0.2  # how often the first process looks for what the others have done


# What a config says of where a model is and what loaded it, and nothing of its music.
PLACES = ("_name_or_path", "architectures", "auto_map", "custom_pipelines", "dtype", "transformers_version")


def fingerprint(model, tokenizer) -> str:
    """A digest of what a checkpoint says: weights and config, vocabulary and how notes become tokens, and sampling."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    reading = set(inspect.signature(type(tokenizer).__init__).parameters) - {"self", "kwargs", "vocab_file"}
    known = {
        "vocabulary": tokenizer.get_vocab(),
        "reading": {name: tokenizer.init_kwargs.get(name) for name in reading},
        "config": model.config.to_dict(),
        "generation": model.generation_config.to_dict(),
    }
    for part in (known["config"], known["generation"]):
        for name in PLACES:
            part.pop(name, None)
    digest.update(json.dumps(known, sort_keys=True, default=str).encode())
    return digest.hexdigest()


class Output(Journal):
    """The output folder of a run and of those that went on with it: a journal, and the music it tells of.

    Raises:
        ValueError: as `Journal`; or the folder holds something else.
    """

    def __init__(self, folder: Path, options: dict, rank: int):
        # Asked in this order: another process of the same run writes the options first.
        if any(not path.name.startswith(".") for path in folder.glob("*")) and not (folder / "options.json").exists():
            raise ValueError(f"{folder}: not empty, and not the output of such a run. Choose another --output.")
        super().__init__(folder, options, f"journal/{rank}.jsonl", named="options.json")

    def music(self, name: str) -> Path:
        return self.folder / "music" / name

    def noted(self) -> dict[tuple[str, str | None], dict]:
        """The records of all processes by path and digest of the prompt: one that has changed since is another."""
        return {(record["path"], record["sha256"]): record for record in self.records()}

    def is_done(self, record: dict | None) -> bool:
        """Whether a prompt needs no more work: refused, or its music lies there as it was written."""
        if record is None or "error" in record:
            return record is not None
        try:
            return digest_of(self.music(record["path"]).read_bytes()) == record["output_sha256"]
        except OSError:
            return False

    def write_manifest(self, records: list[dict]) -> Path:
        """One line a prompt; what killed runs left half written goes."""
        names = {record["path"] for record in records}
        for path in self.folder.glob("music/**/.*"):
            if path.is_file() and path.relative_to(self.folder / "music").as_posix() not in names:
                path.unlink()
        lines = "".join(json.dumps(record) + "\n" for record in records)
        return write_atomic(self.folder / "manifest.jsonl", lines.encode())


def digest_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def read_prompt(path: Path) -> tuple[bytes | None, str | None]:
    """A prompt's bytes and their digest; both `None` where the file cannot be opened."""
    try:
        data = path.read_bytes()
    except OSError:
        return None, None
    return data, digest_of(data)


def continue_prompts(
    model, tokenizer, prompts: list[bytes | None], seeds: list[int], options: dict
) -> list[tuple[bytes | None, dict]]:
    """The MIDI file of each prompt with its continuation (`None`: refused), and what a record says of it.

    Several go through one `generate()`, each as if it were alone.
    """
    family = family_of(model)
    plan_of, together = family.load("plan"), family.load("together")
    plans, found = {}, {}
    for index, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        if prompt is None:
            found[index] = None, {"error": "cannot be opened."}
            continue
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                plans[index] = plan_of(model, tokenizer, prompt, seed=seed, **options)
            except ValueError as error:
                found[index] = None, {"error": str(error).removeprefix("<bytes>: ")}
                continue
        plans[index].remarks[:0] = [str(warning.message).removeprefix("<bytes>: ") for warning in caught]
    pieces = {}
    if len(plans) > 1:
        # Where one of them cannot be continued, each alone will tell which it is.
        with suppress(ValueError):
            pieces = dict(zip(plans, together(list(plans.values())), strict=True))
    for index, plan in plans.items():
        try:
            piece = pieces[index] if pieces else plan.write()
        except ValueError as error:
            found[index] = None, {"error": str(error)}
            continue
        length = {"bars": piece.bars} if family.counts_bars else {"music_s": piece.music_s}
        found[index] = piece.score.dumps_midi(), {"notes": piece.notes, **length, "remarks": piece.remarks}
    return [found[index] for index in range(len(prompts))]


def continue_folder(
    model,
    tokenizer,
    prompts: str | os.PathLike,
    output: str | os.PathLike,
    seed: int = 0,
    rank: int = 0,
    ranks: int = 1,
    batch_size: int = 1,
    **options,
) -> list[dict] | None:
    """Continue every MIDI file under `prompts`; see the module's description for what is written.

    Args:
        rank, ranks: which of how many processes this is.
        batch_size: prompts to write at once. They are taken as they lie side by side in the sorted list, so that the
            batches are the same in any number of processes; PerceiverS writes together only what is equally long.
        options: of `continue_score` or `continue_performance`, without `seed` and `progress`.

    Returns the manifest's records from the first process, which waits for the others; `None` from them.

    Raises:
        FileNotFoundError: no MIDI files.
        ValueError: an option or `rank` outside its range, `output` and `prompts` lie one in the other, or `output` is
            that of something else.
    """
    if not 0 <= rank < ranks:
        raise ValueError(f"rank {rank} of {ranks} processes: ranks are numbered from 0. Check RANK and WORLD_SIZE.")
    options = {name: value for name, value in LENGTHS.items() if name in family_of(model).options} | options
    _check(model, tokenizer, options)
    prompts, folder = Path(prompts), Path(output)
    if folder.resolve().is_relative_to(prompts.resolve()):
        raise ValueError(f"{folder}: lies in the folder of the prompts, which its music would join.")
    if prompts.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{prompts}: lies in the output folder, and the music would overwrite it. Copy it elsewhere.")
    files = {path.relative_to(prompts).as_posix(): path for path in midi_files(prompts)}
    facts = {"weights": fingerprint(model, tokenizer), "seed": seed, "batch_size": batch_size, **options}
    output = Output(folder, {**facts, "device": model.device.type, "threads": torch.get_num_threads()}, rank)

    earlier, digests, names = output.noted(), {}, list(files)
    batches = [names[begin : begin + batch_size] for begin in range(rank * batch_size, len(names), ranks * batch_size)]
    for batch in tqdm(batches, unit="batch", leave=False, disable=rank > 0 or not sys.stderr.isatty()):
        prompts_of = [read_prompt(files[name]) for name in batch]
        digests |= {name: digest for name, (_, digest) in zip(batch, prompts_of, strict=True)}
        left = [name for name in batch if not output.is_done(earlier.get((name, digests[name])))]
        if not left:
            continue
        # What is done already is written with the others: a batch is the same whoever was killed in it.
        seeds = [seed_of(seed, name) for name in batch]
        written = continue_prompts(model, tokenizer, [data for data, _ in prompts_of], seeds, options)
        for name, own_seed, (midi, found) in zip(batch, seeds, written, strict=True):
            if name not in left:
                continue
            record = {"path": name, "sha256": digests[name], "seed": own_seed}
            if midi is not None:
                write_atomic(output.music(name), midi)
                record |= {"output": f"music/{name}", "output_sha256": digest_of(midi)}
            output.add(record | found)
    if rank > 0:
        return None
    records = wait_for_all(output, files, digests, earlier, others=ranks > 1)
    output.write_manifest(records)
    return records


def _check(model, tokenizer, options: dict) -> None:
    """Refuse before the first prompt what would be refused with each: plan the continuation of one note."""
    note = np.zeros(1, dtype=NOTE_DTYPE)
    note["duration_s"], note["pitch"], note["velocity"] = 0.01, 60, 64
    family_of(model).load("plan")(model, tokenizer, score_from_notes(note), seed=0, **options)


def wait_for_all(output: Output, files: dict[str, Path], digests: dict, earlier: dict, others: bool) -> list[dict]:
    """The records of all prompts by path, as soon as every process has noted its own.

    Raises:
        OSError: there are no others to wait for, and what was written does not come back.
    """
    found: dict[str, dict] = {}
    for name in files.keys() - digests.keys():
        digests[name] = read_prompt(files[name])[1]
    while True:
        records = output.noted()
        # A prompt that changed meanwhile is what it was when its process read it.
        latest = {path: record for (path, digest), record in records.items() if (path, digest) not in earlier}
        for name in files.keys() - found.keys():
            record = records.get((name, digests[name])) or latest.get(name)
            if output.is_done(record):
                found[name] = record
        if len(found) == len(files):
            return [found[name] for name in sorted(found)]
        if not others:
            missing = sorted(files.keys() - found.keys())
            raise OSError(
                f"{output.folder}: {missing[0]} was written but does not read back the same. Is the disk full?"
            )
        time.sleep(POLL_S)


def build_parser() -> argparse.ArgumentParser:
    description = "Continue every MIDI file of a folder; under torchrun the processes share the work."
    parser = argparse.ArgumentParser(prog="python -m sage_studio.generation.folder", description=description)
    add = parser.add_argument
    add("--prompts", type=Path, required=True, metavar="FOLDER", help="of .mid and .midi files, at any depth")
    add("--output", type=Path, required=True, metavar="OUT", help="folder to write, or to go on with")
    add("--model", help="sage-music (default), perceivers, a checkpoint folder or a Hub name")
    add("--seed", type=int, default=0, help="a prompt's own follows from it and its path (default: %(default)s)")
    add("--temperature", type=float, help="0: the likeliest token (default: the checkpoint's)")
    add("--top-p", type=float, help="nucleus sampling (default: the checkpoint's)")
    add("--batch-size", type=positive_int, default=1, help="prompts to write at once (default: %(default)s)")
    add(
        "--threads",
        type=positive_int,
        default=1,
        help="CPU threads a process; rounding depends on it (default: %(default)s)",
    )
    add("--device", help="such as cpu (default: each process its own GPU, where there are any)")
    add = parser.add_argument_group("SAGE-Music").add_argument
    add("--bars", type=positive_int, help=f"bars to write (default: {BARS})")
    add("--prompt-bars", type=positive_int, help=f"bars to keep (default: {PROMPT_BARS})")
    add("--free", action="store_true", default=None, help="allow instruments, meters, tempos the prompt has not")
    add("--programs", type=program, nargs="+", metavar="N", help="only these programs: 0-127 and drums")
    add = parser.add_argument_group("PerceiverS").add_argument
    add("--seconds", type=float, help=f"seconds to write (default: {MUSIC_S:g})")
    add("--prompt-seconds", type=float, help=f"seconds to keep (default: {PROMPT_S:g})")
    add("--max-tokens", type=positive_int, help="tokens to write at most")
    add("--max-note-seconds", type=float, help="end notes that sound so long; inf: never")
    return parser


def program(text: str) -> int:
    return -1 if text.lower() == "drums" else int(text)


def environment_number(name: str, default: int) -> int:
    """What torchrun says of this process in the environment, or `default` where nothing does.

    Raises:
        ValueError: it is not a number.
    """
    text = os.environ.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{name}={text!r} in the environment is not a number; torchrun sets it.") from None


def run(args: argparse.Namespace, rank: int, ranks: int) -> list[dict] | None:
    """What the command does, in one process."""
    torch.set_num_threads(args.threads)
    midi_files(args.prompts)  # before the model loads: a wrong folder should not have to wait
    model, tokenizer = load(args.model)
    local = environment_number("LOCAL_RANK", 0)
    own = f"cuda:{local % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"
    device = device_of(own if args.device is None else args.device)
    options = family_of(model).given(args)
    options |= {name: getattr(args, name) for name in ("temperature", "top_p") if getattr(args, name) is not None}
    return continue_folder(
        model.to(device), tokenizer, args.prompts, args.output, args.seed, rank, ranks, args.batch_size, **options
    )


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit code: 0, 2 for a wrong argument or input, 130 when interrupted."""
    args = build_parser().parse_args(argv)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        records = run(args, environment_number("RANK", 0), environment_number("WORLD_SIZE", 1))
    except (MissingExtraError, ValueError, OSError) as error:
        print(f"sage_studio.generation.folder: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    if records is not None:
        errors = sum("error" in record for record in records)
        print(f"wrote {args.output / 'manifest.jsonl'}: {len(records) - errors} prompts continued, {errors} refused")
    return 0


if __name__ == "__main__":
    sys.exit(main())
