"""What `Trainer` is given besides: samples on the way (MIDI and picture), and in each folder of weights their
origin."""

import sys
from pathlib import Path

import torch
from transformers import PreTrainedModel, Trainer, TrainerCallback

from sage_studio.checkpoints.provenance import NOTICE, RECORD, ProvenanceError, read_record, record_of, write_record
from sage_studio.errors import MissingExtraError
from sage_studio.families import family_of
from sage_studio.files import write_atomic
from sage_studio.music.midi import write_midi
from sage_studio.music.render import render_piano_roll

# Tokens of a sample on which the grammar is asked.
GRAMMAR_TOKENS = 256
SECONDS_PER_BAR = 2.0


@torch.no_grad()
def valid_mass(model: PreTrainedModel, ids: list[int]) -> float:
    """Mean probability that the model itself gives to tokens the MIDI grammar allows, after each token of `ids`.

    1 for a model that needs no grammar; an untrained one has the share of the vocabulary that is allowed. Over the
    first `GRAMMAR_TOKENS` tokens.
    """
    config = model.config
    ids = torch.tensor([ids[: min(GRAMMAR_TOKENS, config.max_position_embeddings)]])
    processor = family_of(model).load("grammar")(config)
    logits = model(ids.to(model.device), use_cache=False).logits[0]  # (n, V) of the last n positions
    probabilities = logits.float().softmax(-1).cpu()
    first = ids.shape[1] - len(probabilities)
    found = [
        float(probabilities[index][processor.allowed(ids[:, : first + index + 1])[0]].sum())
        for index in range(len(probabilities) - 1)
    ]
    return sum(found) / max(len(found), 1)


class SampleCallback(TrainerCallback):
    """Every `steps` steps, `num` pieces from nothing in `folder/step-STEP-N.mid` and `.png`.

    A model that has learned little may write what cannot be gone on with (a bar longer than its context): that is said,
    and training goes on.

    The pieces obey the grammar, as all that is generated does. `sample_valid_mass` in the log says how much the model
    needs it (`valid_mass`), `sample_notes` how much it writes. Training's random state is left as it was, and the seed
    of a sample depends on its number alone, so pieces of different steps compare.

    Args:
        trainer: whose model is asked, and whose log is written to.
        bars: length of a piece; of a performance, as many times 2 s.
    """

    def __init__(self, trainer: Trainer, tokenizer, folder: str | Path, steps: int, num: int = 2, bars: int = 8):
        self.trainer, self.tokenizer, self.folder = trainer, tokenizer, Path(folder)
        self.steps, self.num, self.bars = steps, num, bars

    def on_step_end(self, args, state, control, **kwargs):
        if state.is_world_process_zero and state.global_step % self.steps == 0:
            found, should_log = self.write(state.global_step), control.should_log
            if found:
                self.trainer.log(found)
                control.should_log = should_log  # to log this has not logged the loss

    def write(self, step: int) -> dict[str, float]:
        """Write the samples of one step; returns what the log gets."""
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        model = model.get_base_model() if hasattr(model, "get_base_model") else model
        family, was_training, masses, notes = family_of(model), model.training, [], 0
        length = self.bars if family.counts_bars else self.bars * SECONDS_PER_BAR
        model.eval()
        try:
            for number in range(self.num):
                try:
                    piece = family.load("begin")(model, self.tokenizer, length, seed=number).write()
                except ValueError as error:
                    print(f"note: step {step}, sample {number + 1}: {error}", file=sys.stderr)
                    continue
                masses.append(valid_mass(model, piece.ids))
                notes += piece.notes
                path = write_midi(self.folder / f"step-{step:06}-{number + 1}.mid", piece.score)
                try:
                    render_piano_roll(path.with_suffix(".png"), piece.score, title=f"step {step}")
                except MissingExtraError:
                    pass  # without matplotlib there are no pictures; the command says so once, before it trains
        finally:
            model.train(was_training)
        if not masses:
            return {}
        return {"sample_valid_mass": round(sum(masses) / len(masses), 6), "sample_notes": notes / len(masses)}


# ---- where the weights come from


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
