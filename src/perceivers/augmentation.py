"""Augmentation of PerceiverS' training data on token ids: transposition, tempo, velocity.

Each result is what the tokenizer would make of music so changed, without a score being built: below 1 ms for 8,192
tokens.
"""

import math
from dataclasses import InitVar, dataclass, field

import numpy as np

from .tokenization_perceivers import PerceiverSTokenizer

PIANO = (21, 108)  # MIDI pitches of the lowest and the highest key
BIN_WIDTH = 4  # MIDI velocity units in a bin of the vocabulary


@dataclass(frozen=True)
class PerceiverSAugmentation:
    """Changes a segment at random: `augment(ids, rng)`. What is 0 is off; with everything off, the ids come back.

    The random numbers are drawn in one order whatever is on, so turning one change off leaves the others as they were;
    the same ids and the same state of `rng` give the same result. It pickles, and workers share nothing.

    A segment is a stretch `x[start:end]` of one piece. It may begin anywhere, with or without BOS: notes that began
    before it keep their note_offs, and notes before its first velocity token have none. It may end anywhere. Every note
    and every special token stays, and canonical ids come out canonical.

    **Targets.** With `tempo` or `velocity` the length may change, so that a target is not where it was. What holds:
    each token of the result is a right label for those before it (of a silence that the cut leaves open, only the full
    shifts that are sure are kept; only where a faster tempo brings the last events and unseen ones into one step may
    their order differ), and 2 tokens or more come back where 2 or more were given. So where the last n tokens of the
    segment were the targets, take the last `min(n, len(result) - 1)` of the result; where it has become longer than
    the context, keep its last `context` tokens.

    Args:
        tokenizer: the tokenizer that made the ids.
        transpose: largest shift in semitones, up and down, 0-24, within the piano's pitches 21 to 108 (a segment that
            leaves them already is not moved farther out).
        tempo: largest relative change of the tempo, 0-1: all times are divided by one factor, log-uniform from
            `1 / (1 + tempo)` to `1 + tempo`, and rounded to 10 ms as times, counted from the segment's beginning, so
            that errors do not add up. Each note lasts 10 ms or longer; two onsets of one key never fall together, the
            later one moves on by 10 ms.
        velocity: largest shift in MIDI velocity units, 0-127: all velocities move by one number of bins (4 units each),
            clipped to the softest and the loudest. No note falls silent.

    Call with `ids`, integers (T,); get integers (T',) of the same type. T' = T without tempo and velocity, T' <= T
    without tempo.

    Raises:
        ValueError: an argument out of its range; a velocity below one bin; called with more than one piece.
    """

    tokenizer: InitVar[PerceiverSTokenizer]
    transpose: int = 6
    tempo: float = 0.0
    velocity: int = 0
    _first: dict = field(init=False, repr=False, compare=False)  # first id of each kind of event, and their end
    _emission: str = field(init=False, repr=False, compare=False)

    def __post_init__(self, tokenizer: PerceiverSTokenizer):
        for name, high in (("transpose", 24), ("velocity", 127)):
            value = getattr(self, name)
            if not 0 <= value <= high or value != int(value):
                raise ValueError(f"{name} must be a whole number from 0 to {high}, not {value}.")
        if not 0 <= self.tempo <= 1:
            raise ValueError(f"tempo must be from 0 to 1 (0.1: up to a tenth slower or faster), not {self.tempo}.")
        if 0 < self.velocity < BIN_WIDTH:
            raise ValueError(f"velocity ({self.velocity}) is less than one bin ({BIN_WIDTH} units): it moves nothing.")
        grammar = tokenizer.config_fields()["grammar"]
        first = {kind: grammar[kind][0] for kind in ("note_on", "note_off", "time_shift", "velocity")}
        object.__setattr__(self, "_first", {**first, "end": grammar["velocity"][1]})
        object.__setattr__(self, "_emission", tokenizer.velocity_emission)

    def __call__(self, ids: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        ids = np.asarray(ids)
        if not (self.transpose or self.tempo or self.velocity):
            return ids
        draws = rng.random(3)
        events = np.flatnonzero(ids < self._first["end"])
        if not len(events):
            return ids
        begin, end = events[0], events[-1] + 1
        if end - begin > len(events):
            raise ValueError("a special token between events: augment one piece at a time.")
        music = self._transposed(ids[begin:end].astype(np.int64), draws[0])
        factor = math.exp((2 * draws[1] - 1) * math.log1p(self.tempo))
        most = self.velocity // BIN_WIDTH
        bins = int(draws[2] * (2 * most + 1)) - most
        if factor != 1 or bins:
            changed = self._changed(music, factor, bins, is_cut=end == len(ids))
            if len(ids) - len(music) + len(changed) >= min(len(ids), 2):
                music = changed
        return np.concatenate([ids[:begin], music.astype(ids.dtype), ids[end:]])

    def _transposed(self, ids: np.ndarray, draw: float) -> np.ndarray:
        plays = ids < self._first["time_shift"]
        pitches = ids[plays] % 128  # of note_offs too: some end notes that began before the segment
        if not len(pitches):
            return ids
        down = min(self.transpose, max(0, int(pitches.min()) - PIANO[0]))
        up = min(self.transpose, max(0, PIANO[1] - int(pitches.max())))
        return ids + plays * (int(draw * (down + up + 1)) - down)

    def _changed(self, ids: np.ndarray, factor: float, bins: int, is_cut: bool) -> np.ndarray:
        """Events `ids` (T,), `factor` times as fast and `bins` louder, spelled anew.

        `is_cut`: nothing comes after them, so that what the last token belongs to may be incomplete.
        """
        first = self._first
        is_shift = (ids >= first["time_shift"]) & (ids < first["velocity"])
        says = ids >= first["velocity"]
        clock = np.cumsum(np.where(is_shift, ids - first["time_shift"] + 1, 0))
        clock = np.rint(clock / factor).astype(np.int64)  # (T,) in steps, after each token
        loud = np.clip(ids - first["velocity"] + bins, 0, first["end"] - first["velocity"] - 1)
        last = np.maximum.accumulate(np.where(says, np.arange(len(ids)), -1))
        loud = np.where(last >= 0, loud[last], -1)  # (T,) the velocity bin in force; -1: said before the segment

        events = np.flatnonzero(ids < first["time_shift"])
        key, is_on = ids[events] % 128, ids[events] < first["note_off"]
        step = _apart(key, is_on, clock[events])
        order = np.argsort((step * 2 + is_on) * 128 + key, kind="stable")  # steps may have fallen together
        events, key, is_on, step = events[order], key[order], is_on[order], step[order]
        # Where an onset of unknown velocity now comes after a known one (their steps fell together), it sounds like it.
        known = np.maximum.accumulate(np.where(is_on & (loud[events] >= 0), np.arange(len(events)), -1))
        bin_of = np.where(known >= 0, loud[events][known], -1)
        spoken = self._spoken(is_on, bin_of)
        spelled = _spell(np.diff(step, prepend=0), spoken, ids[events], bin_of, first)

        # What follows the last event: silence, and the velocity of a note that is cut off.
        now = step[-1] if len(step) else 0
        silence = max(int(clock[-1]) - int(now), 0)
        full = first["velocity"] - 1
        most = first["velocity"] - first["time_shift"]
        rest = silence % most
        if is_cut and ids[-1] == full:
            rest = 0  # a longer silence may be cut off: only its full shifts are certain
        tail = [full] * (silence // most) + [first["time_shift"] + rest - 1] * (rest > 0)
        if says[-1]:
            told = self._spoken(np.append(is_on, True), np.append(bin_of, loud[-1]))[-1]
            tail += [first["velocity"] + loud[-1]] * bool(told)
        return np.concatenate([spelled, np.array(tail, dtype=np.int64)])

    def _spoken(self, is_on: np.ndarray, bin_of: np.ndarray) -> np.ndarray:
        """(E,) bool: which events a velocity token precedes, by the tokenizer's rule."""
        spoken = is_on & (bin_of >= 0)
        if self._emission == "every_note":
            return spoken
        changes = np.zeros(len(is_on), bool)
        changes[is_on] = np.diff(bin_of[is_on], prepend=-1) != 0
        if self._emission == "after_note_off":
            changes[1:] |= is_on[1:] & ~is_on[:-1]
        return spoken & changes


def _apart(key: np.ndarray, is_on: np.ndarray, step: np.ndarray) -> np.ndarray:
    """Steps (E,) of events in their order, moved on where a key would else end or sound again as it begins."""
    if not len(step):
        return step
    order = np.argsort(key, kind="stable")
    # Every event of a key comes one step or more after the onset before it: step minus onsets so far never falls.
    onsets = np.cumsum(is_on[order]) - is_on[order]
    lane = key[order] * (int(step.max()) + len(step) + 1)
    moved = np.empty_like(step)
    moved[order] = np.maximum.accumulate(step[order] - onsets + lane) - lane + onsets
    return moved


def _spell(gaps: np.ndarray, spoken: np.ndarray, ids: np.ndarray, bin_of: np.ndarray, first: dict) -> np.ndarray:
    """Tokens of events `ids` (E,): time shifts over the gap in steps, full ones first; a velocity if spoken; itself."""
    most = first["velocity"] - first["time_shift"]
    full, rest = gaps // most, gaps % most
    counts = np.stack([full, rest > 0, spoken, np.ones_like(full)], axis=1)
    tokens = np.stack(
        [np.full_like(gaps, first["velocity"] - 1), first["time_shift"] + rest - 1, first["velocity"] + bin_of, ids],
        axis=1,
    )
    return np.repeat(tokens.ravel(), counts.ravel())


__all__ = ["PerceiverSAugmentation"]
