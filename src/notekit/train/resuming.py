"""What makes a killed run go on as if nothing had happened, and keeps two runs from mixing in one folder."""

import json
import os
import shutil
import struct
import zipfile
from pathlib import Path

from transformers import TrainingArguments

from notekit.midi import write_atomic

RUN_FILE = "run.json"


def complete(checkpoint: Path) -> bool:
    """Whether a checkpoint folder of `Trainer` was written to its end: a kill may have come in the middle.

    `Trainer` writes weights, optimizer, scheduler, random state and last `trainer_state.json`. All are looked at, for
    after a power failure the last file may be there and an earlier one not.
    """
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    weights = list(checkpoint.glob("*.safetensors"))
    states = [*checkpoint.glob("*.pt"), *checkpoint.glob("*.pth")]
    sharded = any(checkpoint.glob("**/*.distcp"))  # FSDP's own format
    return (bool(weights) or sharded) and all(map(_is_whole, weights)) and all(map(zipfile.is_zipfile, states))


def _is_whole(path: Path) -> bool:
    """Whether a safetensors file is as long as its header says."""
    with open(path, "rb") as file:
        head = file.read(8)
        if len(head) < 8:
            return False
        (size,) = struct.unpack("<Q", head)
        if size > path.stat().st_size:
            return False
        try:
            header = json.loads(file.read(size))
        except ValueError:
            return False
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    return path.stat().st_size == 8 + size + max(ends, default=0)


def last_complete(folder: Path) -> tuple[Path | None, list[Path]]:
    """The newest complete checkpoint of a run folder (None: none), and newer ones that are broken."""
    found = sorted(folder.glob("checkpoint-*"), key=_step, reverse=True)
    broken = []
    for checkpoint in found:
        if complete(checkpoint):
            return checkpoint, broken
        broken.append(checkpoint)
    return None, broken


def _step(checkpoint: Path) -> int:
    number = checkpoint.name.rpartition("-")[2]
    return int(number) if number.isdigit() else -1


def check_run(folder: Path, description: dict, resumes: bool) -> None:
    """Keep what a run folder holds: the same options go on, others must not.

    Raises:
        ValueError: the folder holds checkpoints of a run with other options, naming them.
    """
    path = folder / RUN_FILE
    description = json.loads(json.dumps(description))
    if resumes and path.is_file():
        kept = json.loads(path.read_text(encoding="utf-8"))
        changed = [name for name in description if kept.get(name) != description[name]]
        if changed:
            first = changed[0]
            raise ValueError(
                f"{folder} holds a run with other options ({', '.join(changed)}: {first} was {kept.get(first)!r}, now "
                f"{description[first]!r}). Call it with the same options to go on, or give another --output; to begin "
                f"from its weights: --model {folder}/best."
            )
    write_atomic(path, (json.dumps(description, indent=1) + "\n").encode())


def check_output(args: TrainingArguments, parameters: int, trainable: int) -> None:
    """Before hours are spent: the output folder can be written to, and has room for what will be.

    Raises:
        ValueError: it cannot, or has not.
    """
    folder = Path(args.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise ValueError(f"--output {folder}: cannot be written to ({error.strerror}): give another folder.") from error
    # A checkpoint: weights, and two moments of every trainable one. Trainer writes a new one before it deletes an old.
    saves = args.save_strategy != "no"
    kept = (args.save_total_limit + 1 if args.save_total_limit else 3) if saves else 0
    need = 4 * (kept * ((parameters if trainable == parameters else trainable) + 2 * trainable) + parameters) + 2**20
    held = sum(file.stat().st_size for checkpoint in folder.glob("checkpoint-*") for file in checkpoint.glob("*"))
    free = shutil.disk_usage(folder).free
    if free + held < need:
        raise ValueError(
            f"--output {folder}: {free / 1e6:,.0f} MB are free, and the run's checkpoints need about "
            f"{need / 1e6:,.0f} MB: make room, keep fewer (--save_total_limit) or give another folder."
        )


__all__ = ["check_output", "check_run", "complete", "last_complete"]
