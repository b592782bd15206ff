"""Music from a compound model: `continue_score_compound`, and the writer that draws valid compounds.

Generation keeps the rules of `generation.bars.continue_score`, whose plan it takes over: instruments, meters and tempo
of the prompt, no pitch doubled, no EOS before the end. One forward pass, with the stock `DynamicCache`, per compound;
everything else (softmax, top-p, the random numbers) is done in numpy on the one row of logits.

Shapes: n compounds, 8 fields, V values of all fields together.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from symusic import Score
from transformers.cache_utils import Cache, DynamicCache

from sage_music import SageMusicTokenizer
from sage_studio.defaults import BARS, PROMPT_BARS, TEMPERATURE, TOP_P
from sage_studio.generation.bars import BarsPlan, plan_continuation
from sage_studio.generation.result import Piece

from .compound import (
    BAR,
    BOS,
    DURATION,
    EMPTY_BAR,
    EOS,
    FIELDS,
    METER,
    PITCH,
    POSITION,
    PROGRAM,
    STRUCTURE,
    TEMPO,
    VELOCITY,
    CompoundMusicForCausalLM,
    CompoundTokens,
)


class CompoundWriter:
    """Draws compounds one after another, their fields from left to right, each among what still makes valid music.

    The probabilities of a compound's fields do not depend on each other; only what is ruled out does. Valid is: bar
    lines with a meter; positions rising within a bar and inside its meter; tempos at stated positions; drum pitches
    under the drums' program and others not; no pitch started twice by one program at one position. What is drawn
    decodes with nothing dropped, and `compounds(ids(drawn))` is what was drawn.

    Args:
        tokens: the vocabulary.
        rng: where the random numbers come from.
        forbidden: token ids never to be written.
        temperature, top_p: sampling of each field, after the ruling out; `temperature=0` takes the likeliest value.
            `structure` is not cut at `top_p`: bar lines are some 5 in 100 compounds, so that a cut of this one field
            at 0.95 takes most of them away (measured: twice as many notes in a bar as in the music continued).
    """

    def __init__(
        self,
        tokens: CompoundTokens,
        rng: np.random.Generator,
        forbidden: Sequence[int] = (),
        temperature: float = TEMPERATURE,
        top_p: float = TOP_P,
    ):
        grammar = tokens.tokenizer.config_fields()["grammar"]
        self.rng, self.temperature, self.top_p = rng, temperature, top_p
        self.parts = [slice(end - size, end) for end, size in zip(np.cumsum(tokens.sizes), tokens.sizes, strict=True)]
        self.open = [np.ones(size, bool) for size in tokens.sizes]
        for index in forbidden:
            self.open[tokens.field_of[index]][tokens.value_of[index]] = False

        def per_value(name: str, field: int) -> np.ndarray:
            """(size,) the grammar's entry `name` of each value of a field; -1 for nothing."""
            return np.array([-1, *(grammar[name][i] for i in tokens.ids_of[field, 1 : tokens.sizes[field]])])

        self.bar_lengths, self.positions = per_value("bar_length_after", METER), per_value("last_position", POSITION)
        self.drum_programs, self.drum_pitches = per_value("drum_after", PROGRAM), per_value("drum_needed", PITCH)
        self.always_program = not tokens.tokenizer.miditok.config.program_changes
        self._begin()

    def _begin(self):
        self.bar_length, self.position = 0, -1  # in positions; -1: a fresh bar
        self.program = 0  # value of the program in force; 0: none was named
        self.bar_over = True  # only a bar line may follow
        self.after_note = False  # whether a note may follow at the same position
        self.started: set[tuple[int, int]] = set()  # (program, pitch) values of the current position

    def follow(self, compound: np.ndarray) -> None:
        """Take note of a compound (8,) that was drawn or that the prompt holds."""
        structure, meter, position, _, program, pitch = compound[:VELOCITY].tolist()
        if structure == BOS:
            self._begin()
            return
        if structure in (BAR, EMPTY_BAR):
            self.position, self.started = -1, set()
        if meter:
            self.bar_length = int(self.bar_lengths[meter])
        if position:
            self.position, self.started = int(self.positions[position]), set()
        self.program = program or self.program
        if pitch:
            self.started.add((self.program, pitch))
        self.after_note = bool(pitch)
        self.bar_over = structure == EMPTY_BAR

    def draw(self, logits: np.ndarray) -> np.ndarray:
        """One compound (8,) from logits (V,); `follow` is the caller's to call."""
        row = np.zeros(len(FIELDS), np.int64)

        valid = np.ones(len(self.open[STRUCTURE]), bool)
        valid[0] = not self.bar_over and (self.after_note or self.position + 1 < self.bar_length)
        valid[BOS], valid[EOS] = False, self.bar_length > 0
        row[STRUCTURE] = structure = self._choose(logits, STRUCTURE, valid, top_p=1.0)
        if structure == EOS:
            return row
        bar_length, position = self.bar_length, self.position
        if structure:
            row[METER] = self._choose(logits, METER, self.bar_lengths > 0)
            bar_length, position = int(self.bar_lengths[row[METER]]), -1
        if structure == EMPTY_BAR:
            return row

        valid = (self.positions > position) & (self.positions < bar_length)
        valid[0] = structure != BAR and self.after_note
        row[POSITION] = self._choose(logits, POSITION, valid)
        if row[POSITION]:
            row[TEMPO] = self._choose(logits, TEMPO, np.ones(len(self.open[TEMPO]), bool))

        # A tempo may stand alone; everything else that has a position is a note.
        alone = row[TEMPO] > 0
        goes_on = self.program > 0 and self.open[PROGRAM][self.program] and not self.always_program
        valid = np.ones(len(self.open[PROGRAM]), bool)
        valid[0] = goes_on or alone
        row[PROGRAM] = self._choose(logits, PROGRAM, valid)
        program = int(row[PROGRAM]) or self.program
        if row[PROGRAM] or goes_on:
            valid = self.drum_pitches == self.drum_programs[program]
            fresh = valid & self.open[PITCH]
            fresh[[pitch for other, pitch in self.started if other == program and not row[POSITION]]] = False
            valid = fresh if fresh.any() else valid  # every pitch sounds already: one of them once more
        else:
            valid = np.zeros(len(self.open[PITCH]), bool)
        valid[0] = alone and not row[PROGRAM]
        row[PITCH] = self._choose(logits, PITCH, valid)
        if row[PITCH]:
            for field in (VELOCITY, DURATION):
                row[field] = self._choose(logits, field, np.arange(len(self.open[field])) > 0)
        return row

    def _choose(self, logits: np.ndarray, field: int, valid: np.ndarray, top_p: float | None = None) -> int:
        """A value of a field, from its part of logits (V,) and `valid` (size,)."""
        values = np.flatnonzero(valid & self.open[field])
        if not len(values):
            raise ValueError(f"nothing that may be written is left for the {list(FIELDS)[field]} of a note.")
        scores = logits[self.parts[field]][values].astype(np.float64)
        if len(values) == 1 or self.temperature == 0:
            return int(values[scores.argmax()])
        order = np.argsort(-scores, kind="stable")
        weights = np.exp((scores[order] - scores[order[0]]) / self.temperature)
        weights /= weights.sum()
        top_p = self.top_p if top_p is None else top_p
        # The likeliest values that together reach top_p: those before which less than that has come.
        ends = np.cumsum(weights[np.cumsum(weights) - weights < top_p])
        drawn = np.searchsorted(ends, self.rng.random() * ends[-1], side="right")
        return int(values[order[min(drawn, len(ends) - 1)]])


@dataclass
class CompoundPlan(BarsPlan):
    """A plan of a continuation that a compound model writes: one forward pass and one row of its cache per note."""

    def _generate(self, streamer, remarks: list[str]) -> tuple[list[int], int]:
        if streamer is not None or self.generate_options:
            raise ValueError("a compound model writes to no streamer and takes no generate_options.")
        tokens, context = CompoundTokens(self.tokenizer), self.model.config.max_position_embeddings
        rng = np.random.default_rng(int(torch.randint(2**62, ())))  # seeded by `write`
        writer = CompoundWriter(
            tokens,
            rng,
            [*self.forbidden, self.tokenizer.eos_token_id],
            TEMPERATURE if self.temperature is None else self.temperature,
            TOP_P if self.top_p is None else self.top_p,
        )
        # The bare bar line at the end of a plan's ids is part of the compound to come.
        ids, bars, notes = list(self.ids[:-1]), 0, 0
        for compound in tokens.compounds(ids):
            writer.follow(compound)
        writer.bar_over = True
        while True:
            heard = self._heard(ids)
            if heard is None:
                if bars == 0:
                    raise ValueError(f"a single bar holds more than the context of {context} tokens.")
                remarks.append(f"stopped at bar {self.prompt_bars + bars}: it grew longer than the context")
                return ids, bars
            if bars == 0 and len(heard) < len(ids):
                remarks.append("the prompt is longer than the context: the model hears its last bars")
            cache, room = DynamicCache(config=self.model.config), context - len(heard)
            compounds = tokens.compounds(heard)
            while room > 0:
                compound = writer.draw(self._logits(compounds, cache))
                if compound[STRUCTURE] in (BAR, EMPTY_BAR):
                    if self.progress is not None:
                        self.progress(bars, notes)
                    if bars == self.bars:
                        return ids, bars
                    bars += 1
                writer.follow(compound)
                compounds = compound[None]
                new = tokens.ids(compounds)
                ids, room, notes = ids + new, room - len(new), notes + int(compound[PITCH] > 0)

    @torch.inference_mode()
    def _logits(self, compounds: np.ndarray, cache: Cache) -> np.ndarray:
        """(V,) logits of what follows compounds (n, 8), which go into the cache."""
        rows = torch.from_numpy(compounds)[None].to(self.model.device)
        output = self.model(rows, cache=cache, use_cache=True, logits_to_keep=1)
        return output.logits[0, -1].float().cpu().numpy()

    def _heard(self, ids: list[int]) -> list[int] | None:
        """Everything, or BOS and the last bars that leave half of the context free; None: not even one bar does."""
        context = self.model.config.max_position_embeddings
        if len(ids) <= context - context // 4:
            return ids
        lines = np.flatnonzero(np.array(self.model.config.grammar["bars"])[ids])
        for size in (context // 2, context - context // 4):
            fitting = lines[len(ids) - lines < size]
            if len(fitting):
                return self.tokenizer.crop_ids(np.array(ids), int(fitting[0])).tolist()
        return None


def continue_score_compound(
    model: CompoundMusicForCausalLM,
    tokenizer: SageMusicTokenizer,
    prompt: "str | os.PathLike | bytes | Score",
    prompt_bars: int = PROMPT_BARS,
    bars: int = BARS,
    seed: int | None = None,
    **options,
) -> Piece:
    """Continue the first `prompt_bars` bars of a MIDI file by `bars` bars, as `generation.bars.continue_score` does.

    The same rules hold (the prompt's instruments, meters and tempo, unless `free` or `programs`), the same options and
    errors, and the same defaults of temperature and top-p, here of each field.
    """
    plan = plan_continuation(model, tokenizer, prompt, prompt_bars, bars, seed=seed, **options)
    return CompoundPlan(**{field.name: getattr(plan, field.name) for field in fields(BarsPlan) if field.init}).write()
