"""Every folder of weights that a run writes tells what they were made from, wherever it is copied to."""

import sys
from pathlib import Path

from transformers import TrainerCallback

from notekit.lineage import NOTICE, RECORD, ProvenanceError, read_record, record_of, write_record
from notekit.midi import write_atomic


def keep_origin(model: str, folder: Path, resumes: bool) -> None:
    """Write `provenance.json`, and the notice, of the model to begin from into the run's folder.

    While it begins: the Hub, or the base's folder, may be out of reach when it ends. A run that goes on keeps what it
    knows.

    Args:
        model: as `--model` has it; a config file has no origin.
    """
    try:
        kept = read_record(str(folder)) if resumes else None
    except (ProvenanceError, OSError):
        kept = None
    if kept is not None and not any(row.get("seen") is False for row in kept[1]):
        return
    try:
        rows, notice = ([], None) if model.endswith(".json") else record_of(model)
    except (ProvenanceError, OSError) as error:  # no reason not to train; whoever publishes the weights will hear of it
        print(f"note: the origin of these weights is not recorded: {error}", file=sys.stderr)
        (folder / RECORD).unlink(missing_ok=True)
        return
    if any(row.get("seen") is False for row in rows):
        print(
            f"note: {model}: its license, or that of what it was made from, could not be looked at; an export of the "
            "trained weights will look again.",
            file=sys.stderr,
        )
    if notice is None:
        (folder / NOTICE).unlink(missing_ok=True)  # of another run's base
    write_record(folder, rows, notice)


def tell_origin(run: Path, folder: Path) -> None:
    """Copy what `keep_origin` wrote into a folder of weights."""
    for name in (NOTICE, RECORD):
        if (run / name).is_file():
            write_atomic(folder / name, (run / name).read_bytes())


class OriginCallback(TrainerCallback):
    """Every checkpoint of a run in `folder` tells its origin."""

    def __init__(self, folder: Path):
        self.folder = folder

    def on_save(self, args, state, control, **kwargs):
        checkpoint = self.folder / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and checkpoint.is_dir():
            tell_origin(self.folder, checkpoint)


__all__ = ["OriginCallback", "keep_origin", "tell_origin"]
