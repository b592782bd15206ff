"""What makes a killed run go on as if nothing had happened, and keeps two runs from mixing in one folder."""

import json
import os
import struct
import zipfile
from pathlib import Path

from transformers import TrainingArguments

from sage_studio.families import bundled
from sage_studio.files import changes, write_atomic

RUN_FILE = "run.json"


def complete(checkpoint: Path) -> bool:
    """Whether a checkpoint folder of `Trainer` was written to its end: a kill may have come in the middle.

    `Trainer` writes weights, optimizer, scheduler, random state and last `trainer_state.json`. All that are there are
    looked at, for after a power failure the last file may be there and an earlier one not. Of the random states of
    several processes some may be missing: no training item depends on them.
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
    found = sorted(folder.glob("checkpoint-*"), key=step_of, reverse=True)
    broken = []
    for checkpoint in found:
        if complete(checkpoint):
            return checkpoint, broken
        broken.append(checkpoint)
    return None, broken


def step_of(checkpoint: Path) -> int:
    """The step of a checkpoint folder, by its name; -1 where it says none."""
    number = checkpoint.name.rpartition("-")[2]
    return int(number) if number.isdigit() else -1


def check_run(folder: Path, description: dict, resumes: bool) -> None:
    """Keep what a run folder holds: the same options go on, others must not.

    Where the model to begin from is a folder, its place is kept too, for whoever reads the file from another folder. It
    is not compared: the whole may be moved.

    Raises:
        ValueError: the folder holds checkpoints of a run with other options, naming them.
    """
    path = folder / RUN_FILE
    description = json.loads(json.dumps(description))
    if resumes and path.is_file():
        kept = json.loads(path.read_text(encoding="utf-8"))
        changed = changes({name: kept.get(name) for name in description}, description)
        if changed:
            raise ValueError(
                f"{folder} holds a run with other options: {changed}. Call it with the same options to go on, or give "
                f"another --output; to begin from its weights: --model {folder}/best."
            )
    model = description.get("model")
    if model and bundled(model) is None and os.path.isdir(model):
        description["model_folder"] = os.path.abspath(model)
    write_atomic(path, (json.dumps(description, indent=1) + "\n").encode())


def state_of(checkpoint: Path) -> dict:
    """What `Trainer` wrote of its progress beside a checkpoint's weights."""
    return json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))


def times_no_better(state: dict) -> int:
    """How many evaluations in a row early stopping had seen that were no better."""
    kept = state.get("stateful_callbacks", {}).get("EarlyStoppingCallback", {})
    return int(kept.get("attributes", {}).get("early_stopping_patience_counter", 0))


def is_finished(state: dict, args: TrainingArguments, patience: int | None) -> bool:
    """Whether a run's last checkpoint is its end; `Trainer` would take another step from there.

    Args:
        state: `state_of` the checkpoint.
        patience: of early stopping; None without it.
    """
    if patience is not None and times_no_better(state) >= patience:
        return True
    if args.max_steps > 0:
        return state["global_step"] >= args.max_steps
    return state["epoch"] >= args.num_train_epochs - 1e-6
