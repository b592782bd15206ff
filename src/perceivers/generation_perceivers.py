"""Decoding aids of PerceiverS: the grammar that leaves no note hanging, and pieces of a length given in seconds.

Both read all of their state from the ids, so that batches, left padding, beams and assisted decoding need nothing
special. One scatter finds where every token occurs last, and that says which keys sound and which began just now.
"""

import math
from typing import NamedTuple

import torch
from transformers import LogitsProcessor

KINDS = ("note_on", "note_off", "time_shift", "velocity")  # of tokens, as config.grammar names them


class Keyboard(NamedTuple):
    """What the ids of each row leave behind; the second dimension is the pitch, or 1."""

    sounding: torch.BoolTensor  # (B, 128): note_on without a note_off since
    fresh: torch.BoolTensor  # (B, 128): sounding since this very step, no time_shift after the note_on
    count: torch.LongTensor  # (B, 1): sounding keys
    any_fresh: torch.BoolTensor  # (B, 1)
    struck: torch.LongTensor  # (B, 128): index of the key's last note_on, -1 without one
    has_velocity: torch.BoolTensor  # (B, 1): a velocity token has been said
    after_velocity: torch.BoolTensor  # (B, 1): it is the last token

    @classmethod
    def of(cls, input_ids: torch.LongTensor, grammar: dict, vocab_size: int) -> "Keyboard":
        """The state after `input_ids` of shape (B, T), T >= 1."""
        batch, length = input_ids.shape
        positions = torch.arange(length, device=input_ids.device).expand(batch, length)
        last = torch.full((batch, vocab_size), -1, device=input_ids.device)
        last.scatter_reduce_(1, input_ids, positions, "amax")
        on, off, shift, velocity = (last[:, slice(*grammar[kind])] for kind in KINDS)
        sounding = on > off
        fresh = sounding & (on > shift.amax(-1, keepdim=True))
        said = velocity.amax(-1, keepdim=True)
        counts = sounding.sum(-1, keepdim=True), fresh.any(-1, keepdim=True)
        return cls(sounding, fresh, *counts, on, said >= 0, said == length - 1)


def _grammar_of(config) -> tuple[dict, list[int]]:
    """The ranges of the token kinds, and the ids that end a piece (none: an empty list)."""
    if config.grammar is None or any(kind not in config.grammar for kind in KINDS):
        raise ValueError(
            "config.grammar does not describe performance events. Build the config from a tokenizer: "
            "PerceiverSConfig(**tokenizer.config_fields())."
        )
    eos = config.eos_token_id
    return config.grammar, [] if eos is None else list(eos) if isinstance(eos, list | tuple) else [eos]


class PerformanceGrammarLogitsProcessor(LogitsProcessor):
    """Leaves only tokens after which the sequence still decodes to MIDI with every note begun, and ended, once.

    - note_on: of a silent key, once a velocity has been said. After a velocity token, nothing else.
    - note_off: of a key that has sounded for a time_shift or longer.
    - token_end: when no key sounds. PAD and BOS: never.

    With `max_length`, also only tokens after which all sounding notes can still be ended in the tokens that are left. A
    row that cannot be saved, because its prompt leaves no room, may take the moves that end notes: no row ever loses
    all of its tokens.

    Args:
        config: a config with `grammar` (the id range of each kind of token), `vocab_size` and `eos_token_id`.
        max_length: tokens in all, prompt included, at which generation will stop.

    Raises:
        ValueError: the grammar is missing or of another kind.
    """

    def __init__(self, config, max_length: int | None = None):
        self.grammar, self.eos = _grammar_of(config)
        self.vocab_size = config.vocab_size
        self.max_length = max_length

    def allowed(self, input_ids: torch.LongTensor) -> torch.BoolTensor:
        """(B, V) bool: tokens that may follow `input_ids` (B, T)."""
        keys = Keyboard.of(input_ids, self.grammar, self.vocab_size)
        free = ~keys.after_velocity
        note_on = ~keys.sounding & keys.has_velocity
        note_off = keys.sounding & ~keys.fresh & free
        shift, velocity, end = free, free & (keys.count < keys.sounding.shape[1]), free & (keys.count == 0)
        if self.max_length is not None:
            # What each token leaves to be said: a note_off for every key, a time_shift before those of fresh ones.
            room = self.max_length - input_ids.shape[1] - 1 - keys.count
            note_on = note_on & (room >= 2)
            note_off = note_off & (room >= keys.any_fresh.long() - 1)
            shift, velocity, end = shift & (room >= 0), velocity & (room >= 3), end & (room >= 0)
        stuck = ~(note_on.any(-1, keepdim=True) | note_off.any(-1, keepdim=True) | shift | velocity | end)
        note_off = note_off | stuck & keys.sounding & ~keys.fresh
        shift, end = shift | stuck & (keys.any_fresh | (keys.count == 0)), end | stuck & (keys.count == 0)
        allowed = torch.zeros(len(input_ids), self.vocab_size, dtype=torch.bool, device=input_ids.device)
        for kind, tokens in zip(KINDS, (note_on, note_off, shift, velocity), strict=True):
            allowed[:, slice(*self.grammar[kind])] = tokens
        for index in self.eos:
            allowed[:, index : index + 1] = end
        return allowed

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if input_ids.shape[1] == 0:  # generation from inputs_embeds: nothing is known of what came before
            return scores
        return scores.masked_fill(~self.allowed(input_ids), -torch.inf)


class DurationLogitsProcessor(LogitsProcessor):
    """Ends a piece at `seconds` of music, to 10 ms: the sum of all time shifts, those of the prompt included.

    Until then token_end is forbidden, and a time shift that would pass that time ends there. From then on sounding
    notes are ended, one after the other, then the piece. (A prompt that is longer already, or ends in the middle of a
    chord, may first finish the note it has announced and let it last 10 ms.) Used beside
    `PerformanceGrammarLogitsProcessor`, one token or more always stays possible.

    Raises:
        ValueError: seconds is not positive, or the vocabulary has no token_end to end a piece with.
    """

    def __init__(self, config, seconds: float):
        self.grammar, self.eos = _grammar_of(config)
        self.vocab_size = config.vocab_size
        if not seconds > 0 or math.isinf(seconds):
            raise ValueError(f"seconds must be a positive number, not {seconds}.")
        if not self.eos:
            raise ValueError("this vocabulary has no token_end: limit the number of tokens instead of the seconds.")
        # The small amount: 0.07 / 0.01 is 7.000000000000001, which is 7 steps, not 8.
        self.steps = math.ceil(seconds / self.grammar["step_s"] - 1e-6)
        first, end = self.grammar["time_shift"]
        self.steps_of = torch.zeros(self.vocab_size, dtype=torch.long)  # of every token
        self.steps_of[first:end] = torch.arange(1, end - first + 1)

    def music_steps(self, input_ids: torch.LongTensor) -> torch.LongTensor:
        """(B, 1): the music time after `input_ids` (B, T), in steps."""
        if self.steps_of.device != input_ids.device:
            self.steps_of = self.steps_of.to(input_ids.device)
        return self.steps_of[input_ids].sum(-1, keepdim=True)

    def allowed(self, input_ids: torch.LongTensor) -> torch.BoolTensor:
        """(B, V) bool: tokens that may follow `input_ids` (B, T)."""
        left = self.steps - self.music_steps(input_ids)
        before = self.steps_of <= left  # every token that is no time shift, and the shifts that fit
        before[:, self.eos] = False
        keys = Keyboard.of(input_ids, self.grammar, self.vocab_size)
        after = torch.zeros_like(before)
        after[:, slice(*self.grammar["note_on"])] = keys.after_velocity & ~keys.sounding
        after[:, slice(*self.grammar["note_off"])] = keys.sounding & ~keys.fresh
        shortest = self.grammar["time_shift"][0]
        after[:, shortest : shortest + 1] = keys.any_fresh
        after[:, self.eos] = keys.count == 0
        return torch.where(left > 0, before, after)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if input_ids.shape[1] == 0:  # generation from inputs_embeds: nothing is known of what came before
            return scores
        return self._reach_the_end(input_ids, scores).masked_fill(~self.allowed(input_ids), -torch.inf)

    def _reach_the_end(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Scores in which the shift that lands on the end has the probability of all that would reach it or pass it.

        Forbidding the longer ones alone would hand their probability to notes, and crowd them into the last moment.
        """
        left = self.steps - self.music_steps(input_ids)
        first, end = self.grammar["time_shift"]
        steps = torch.arange(1, end - first + 1, device=scores.device)[None]
        shifts = scores[:, first:end]
        reaching = shifts.masked_fill(steps < left, -torch.inf).logsumexp(-1, keepdim=True)
        scores = scores.clone()
        scores[:, first:end] = torch.where(steps == left, reaching, shifts)
        return scores


class NoteDurationLogitsProcessor(LogitsProcessor):
    """Ends a note that has sounded for `seconds`, the next time that other processors let it end.

    A small model forgets keys it holds: they would sound for minutes under all that follows. The note_off gets a score
    that nothing else has, and no token is forbidden, so that this agrees with any other processor.

    Raises:
        ValueError: seconds is not positive.
    """

    CERTAIN = 1e4  # added to a score: more than logits differ, less than any dtype's limit

    def __init__(self, config, seconds: float):
        self.grammar, _ = _grammar_of(config)
        if not seconds > 0:
            raise ValueError(f"seconds must be a positive number, not {seconds}.")
        self.vocab_size, self.steps = config.vocab_size, seconds / self.grammar["step_s"] - 1e-6
        first, end = self.grammar["time_shift"]
        self.steps_of = torch.zeros(self.vocab_size, dtype=torch.long)
        self.steps_of[first:end] = torch.arange(1, end - first + 1)

    def overdue(self, input_ids: torch.LongTensor) -> torch.BoolTensor:
        """(B, 128) bool: keys that have sounded for `seconds` or longer after `input_ids` (B, T)."""
        if self.steps_of.device != input_ids.device:
            self.steps_of = self.steps_of.to(input_ids.device)
        keys = Keyboard.of(input_ids, self.grammar, self.vocab_size)
        times = self.steps_of[input_ids].cumsum(-1)
        age = times[:, -1:] - times.gather(1, keys.struck.clamp(min=0))
        return keys.sounding & (age >= self.steps)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if input_ids.shape[1] == 0:  # generation from inputs_embeds: nothing is known of what came before
            return scores
        scores = scores.clone()
        scores[:, slice(*self.grammar["note_off"])] += self.CERTAIN * self.overdue(input_ids)
        return scores


__all__ = ["DurationLogitsProcessor", "NoteDurationLogitsProcessor", "PerformanceGrammarLogitsProcessor"]
