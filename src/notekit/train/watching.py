"""Music on the way: samples as MIDI and picture every so many steps, and how well the model knows the grammar."""

import sys
from pathlib import Path

import torch
from transformers import PreTrainedModel, Trainer, TrainerCallback

from notekit.compose import generate_piece
from notekit.midi import write_midi
from notekit.perform import generate_performance
from notekit.render import MissingExtraError, render_piano_roll
from notekit.sampling import Generated
from perceivers import PerformanceGrammarLogitsProcessor
from sage_music import MidiGrammarLogitsProcessor

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
    if config.model_type == "perceivers":
        processor = PerformanceGrammarLogitsProcessor(config)
    else:
        processor = MidiGrammarLogitsProcessor(config)
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
        was_training, masses, notes = model.training, [], 0
        model.eval()
        try:
            for number in range(self.num):
                try:
                    piece = self._piece(model, number)
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

    def _piece(self, model: PreTrainedModel, seed: int) -> Generated:
        if model.config.model_type == "perceivers":
            return generate_performance(model, self.tokenizer, seconds=self.bars * SECONDS_PER_BAR, seed=seed)
        return generate_piece(model, self.tokenizer, bars=self.bars, seed=seed)


__all__ = ["SampleCallback", "valid_mass"]
