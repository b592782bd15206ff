"""Augmentation of SAGE-Music's training data on token ids: transposition, tempo, velocity, silent instruments.

Each result is what the tokenizer would make of music so changed, without a score being built: about 0.1 ms for 1,024
tokens. Under BPE a token holds whole notes, which cannot be changed one by one: transpose the scores there instead.
"""

import math
from dataclasses import InitVar, dataclass, field

import numpy as np

from .tokenization_sage_music import SageMusicTokenizer

KINDS = ("", "Bar", "TimeSig", "Position", "Tempo", "Program", "Pitch", "PitchDrum", "Velocity", "Duration")
# Indices into KINDS; from PROGRAM on they belong to a note.
TIMESIG, POSITION, TEMPO, PROGRAM, PITCH, DURATION = (
    KINDS.index(kind) for kind in ("TimeSig", "Position", "Tempo", "Program", "Pitch", "Duration")
)
PROGRAMS = 129  # 128 melodic ones; the last is the drums'


@dataclass(frozen=True)
class SageMusicAugmentation:
    """Changes a crop at random: `augment(ids, rng)`. What is 0 is off; with everything off, ids come back as they are.

    The random numbers are drawn in one order whatever is on, so turning one change off leaves the others as they were;
    the same ids and the same state of `rng` give the same result. It holds arrays only: it pickles, and workers share
    nothing.

    Args:
        tokenizer: the tokenizer that made the ids.
        transpose: largest shift of all melodic notes in semitones, up and down, 0-24; no pitch leaves the vocabulary's
            range, so a crop that comes near it moves less far. Drums never move.
        tempo: largest relative change of the tempo, 0-1: every Tempo moves by one factor, log-uniform from
            `1 / (1 + tempo)` to `1 + tempo`, to the nearest bin. A Tempo that repeats the one before because of that
            is left out. Bars and positions are as before.
        velocity: largest shift in MIDI velocity units, 0-127: every Velocity moves by one number of bins, clipped to
            the softest and the loudest. No note falls silent, and of two notes the louder stays no softer.
        track_dropout: probability (0 or more, below 1) that an instrument is silent in this crop; one stays.
            What no longer says anything is left out with it: a Program that repeats the one in force, where Programs
            are written on change only, and a Position without a note or a Tempo. Bars and meters stay, but for the
            empty bars before an EOS: the tokenizer writes none after the last event of a piece. A crop that is cut
            off before its EOS keeps them, for there the music goes on.

    Call with `ids`, integers (T,), one piece or crop, as `SageMusicTokenizer.crop_ids` makes it; get integers (T',) of
    the same type, T' <= T.

    Raises:
        ValueError: an argument out of its range; a velocity below one bin; a tempo without Tempo tokens in the
            vocabulary; anything but 0 under BPE.
    """

    tokenizer: InitVar[SageMusicTokenizer]
    transpose: int = 6
    tempo: float = 0.0
    velocity: int = 0
    track_dropout: float = 0.0
    _kinds: np.ndarray = field(init=False, repr=False, compare=False)  # (V,) index into KINDS of each id
    _values: np.ndarray = field(init=False, repr=False, compare=False)  # (V,) what its text says; NaN if no number
    _eos: int = field(init=False, repr=False, compare=False)
    _on_change: bool = field(init=False, repr=False, compare=False)

    def __post_init__(self, tokenizer: SageMusicTokenizer):
        for name, high in (("transpose", 24), ("velocity", 127)):
            value = getattr(self, name)
            if not 0 <= value <= high or value != int(value):
                raise ValueError(f"{name} must be a whole number from 0 to {high}, not {value}.")
        if not 0 <= self.tempo <= 1:
            raise ValueError(f"tempo must be from 0 to 1 (0.1: up to a tenth slower or faster), not {self.tempo}.")
        if not 0 <= self.track_dropout < 1:
            raise ValueError(f"track_dropout must be a probability from 0 to below 1, not {self.track_dropout}.")
        used = [name for name in ("transpose", "tempo", "velocity", "track_dropout") if getattr(self, name)]
        if used and tokenizer.miditok.is_trained:
            raise ValueError(
                f"{', '.join(used)} must be 0 under a BPE vocabulary: its tokens hold whole notes. "
                "Change the MIDI files before they are encoded."
            )
        kinds, values = np.zeros(tokenizer.vocab_size, np.int8), np.full(tokenizer.vocab_size, np.nan)
        if not tokenizer.miditok.is_trained:
            for text, index in tokenizer.get_vocab().items():
                kind, _, value = text.partition("_")
                if kind in KINDS:
                    kinds[index] = KINDS.index(kind)
                if kind in ("Tempo", "Program", "Pitch", "Velocity"):
                    values[index] = float(value)
        object.__setattr__(self, "_kinds", kinds)
        object.__setattr__(self, "_values", values)
        object.__setattr__(self, "_eos", tokenizer.eos_token_id)
        object.__setattr__(self, "_on_change", bool(tokenizer.miditok.config.program_changes))
        if self.tempo and not (kinds == TEMPO).any():
            raise ValueError("tempo must be 0: this vocabulary has no Tempo tokens.")
        if self.velocity and self.velocity < self._bin_width():
            raise ValueError(
                f"velocity ({self.velocity}) is less than one bin ({self._bin_width():.3g} units): it moves nothing."
            )

    def __call__(self, ids: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        ids = np.asarray(ids)
        if not (self.transpose or self.tempo or self.velocity or self.track_dropout):
            return ids
        draws, silences = rng.random(3), rng.random(PROGRAMS)
        moved = np.arange(len(self._kinds), dtype=ids.dtype)  # what each id becomes
        if self.transpose:
            self._move_pitches(moved, ids, draws[0])
        if self.tempo:
            self._move_tempos(moved, draws[1])
        if self.velocity:
            self._move_velocities(moved, draws[2])
        new, kinds = moved[ids], self._kinds[ids]
        keep = self._heard(ids, kinds, silences) if self.track_dropout else np.ones(len(ids), bool)
        if self.tempo:
            said = np.flatnonzero(kinds == TEMPO)
            before, after = ids[said], new[said]
            keep[said[1:]] = (after[1:] != after[:-1]) | (before[1:] == before[:-1])
        return new if keep.all() else new[self._tidy(ids, kinds, keep)]

    def _rising(self, kind: str) -> np.ndarray:
        """The ids of a kind, by rising value."""
        ids = np.flatnonzero(self._kinds == KINDS.index(kind))
        return ids[np.argsort(self._values[ids])]

    def _move_pitches(self, moved: np.ndarray, ids: np.ndarray, draw: float):
        melodic = self._values[ids[self._kinds[ids] == PITCH]]
        if not len(melodic):
            return
        scale = self._rising("Pitch")
        lowest, highest = self._values[scale[[0, -1]]]
        down, up = min(self.transpose, melodic.min() - lowest), min(self.transpose, highest - melodic.max())
        shift = int(draw * (down + up + 1)) - int(down)
        moved[scale] = scale[np.clip(np.arange(len(scale)) + shift, 0, len(scale) - 1)]

    def _move_tempos(self, moved: np.ndarray, draw: float):
        scale = self._rising("Tempo")
        # Nearest in seconds a quarter note, as MidiTok rounds tempos.
        quarter = 60 / self._values[scale]
        wanted = quarter * math.exp((1 - 2 * draw) * math.log1p(self.tempo))
        moved[scale] = scale[np.abs(wanted[:, None] - quarter).argmin(1)]

    def _move_velocities(self, moved: np.ndarray, draw: float):
        scale = self._audible()
        most = int(self.velocity / self._bin_width())
        shift = int(draw * (2 * most + 1)) - most
        moved[scale] = scale[np.clip(np.arange(len(scale)) + shift, 0, len(scale) - 1)]

    def _audible(self) -> np.ndarray:
        """The Velocity ids but that of velocity 0, which MIDI reads as the end of a note."""
        scale = self._rising("Velocity")
        return scale[self._values[scale] > 0]

    def _bin_width(self) -> float:
        values = self._values[self._audible()]
        return (values[-1] - values[0]) / max(len(values) - 1, 1)

    def _heard(self, ids: np.ndarray, kinds: np.ndarray, silences: np.ndarray) -> np.ndarray:
        """(T,) bool: all tokens but those of silent instruments' notes, and Programs that then repeat."""
        says = kinds == PROGRAM
        last = np.maximum.accumulate(np.where(says, np.arange(len(ids)), -1))
        # The program in force: 0-127, the drums' 128; 129 before the first one, and never silent.
        current = np.where(last >= 0, self._values[ids[last]] % PROGRAMS, PROGRAMS).astype(np.int64)
        silent = np.append(silences < self.track_dropout, False)
        played = np.zeros(PROGRAMS + 1, bool)
        played[current[kinds == DURATION]] = True  # whole notes only: a crop may cut its last one off
        if silent[played].all() and played.any():
            silent[np.flatnonzero(played)[silences[played[:-1]].argmax()]] = False
        keep = (kinds < PROGRAM) | ~silent[current]
        if self._on_change:
            said = np.flatnonzero(keep & says)
            keep[said[1:]] = current[said[1:]] != current[said[:-1]]
        return keep

    def _tidy(self, ids: np.ndarray, kinds: np.ndarray, keep: np.ndarray) -> np.ndarray:
        """Indices of what stays where `keep` (T,) does: no Position that leads nothing, no empty bars before EOS."""
        kept = np.flatnonzero(keep)
        leads = np.append(kinds[kept[1:]] >= TEMPO, False)
        kept = kept[leads | (kinds[kept] != POSITION)]
        if ids[-1] == self._eos:
            meters = kept[kinds[kept] == TIMESIG]
            changes = meters[np.append(True, ids[meters[1:]] != ids[meters[:-1]])] if len(meters) else meters
            events = kept[kinds[kept] >= TEMPO]
            last = max(events.max(initial=0), changes.max(initial=0))
            kept = np.append(kept[kept <= last], len(ids) - 1)
        return kept


__all__ = ["SageMusicAugmentation"]
