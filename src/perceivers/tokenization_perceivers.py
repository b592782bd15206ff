"""Tokenizer of PerceiverS: piano performances as events in absolute time, on a grid of 10 ms.

391 ids: note_on 0-127, note_off 128-255, time_shift 256-355 (10 ms to 1 s), velocity 356-387 (32 bins), token_end, PAD,
BOS. Inside one 10 ms step the order is canonical: note_offs by pitch, then note_ons by pitch, each after a velocity
token where the velocity bin changes; so a piece has exactly one spelling. Token text goes through the usual tokenizer
methods (`"VELOCITY_16 NOTE_ON_60 TIME_SHIFT_500 NOTE_OFF_60"`), music through `midi_to_ids` and `decode_midi`.

Source: Performance RNN, Oore et al. 2018; Music Transformer, Huang et al. 2018; PerceiverS, arXiv 2411.08307.
"""

import os
import re
import warnings
from pathlib import Path

import numpy as np
from symusic import Note, Score, Tempo, TimeSignature, Track
from transformers import PreTrainedTokenizer

STEP_S = 0.01
STEPS_PER_S = 100
NOTE_ON, NOTE_OFF, TIME_SHIFT, VELOCITY, EVENTS = 0, 128, 256, 356, 388  # first ids of the kinds, and their end
MAX_SHIFT = VELOCITY - TIME_SHIFT  # in steps
DEFAULT_VELOCITY = 64
SUSTAIN, PEDAL_DOWN = 64, 64  # controller number; values from 64 on hold the dampers up
# Longer than any recital; what lies beyond is a broken time that would become millions of time shifts.
MAX_SECONDS = 24 * 3600


class PerceiverSTokenizer(PreTrainedTokenizer):
    """Performance-event tokenizer for one piano.

    Args:
        fold_pedal: a note released under the sustain pedal (CC64 >= 64) sounds on, until the pedal rises, its key is
            struck again, or the piece ends. False: durations as written.
        time_rounding: `"absolute"` rounds the time of every event to 10 ms; `"delta"` rounds every difference of
            successive times, as the processor behind some older checkpoints does: its rounding errors add up.
        velocity_emission: when a velocity token precedes a note_on: `"on_change"` where its bin differs from the last
            one emitted; `"after_note_off"` there and at the first note_on after a note_off; `"every_note"` always, as
            that processor does (its comparison of a velocity with a bin hardly ever finds them equal).
        velocity_offset: bins are `(velocity - velocity_offset) // 4`; 1 or 0.
        end_token, bos: whether the vocabulary has token_end (the eos token) and BOS. Ids close up without them.

    The stated grid: onsets and ends to 10 ms, at least one step long; velocities to bins of 4. Instruments are merged
    into one piano, drums left out, each with a warning; other controllers and pitch bend have no tokens.

    Raises:
        ValueError: an option with a value it does not have.
    """

    vocab_files_names = {}  # noqa: RUF012 (class variable of the base class; the options are the vocabulary)
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012
    padding_side = "left"

    def __init__(
        self,
        fold_pedal: bool = True,
        time_rounding: str = "absolute",
        velocity_emission: str = "on_change",
        velocity_offset: int = 1,
        end_token: bool = True,
        bos: bool = True,
        **kwargs,
    ):
        for name, value, known in (
            ("time_rounding", time_rounding, ("absolute", "delta")),
            ("velocity_emission", velocity_emission, ("on_change", "after_note_off", "every_note")),
            ("velocity_offset", velocity_offset, (0, 1)),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {known}, not {value!r}.")
        self.fold_pedal, self.time_rounding = fold_pedal, time_rounding
        self.velocity_emission, self.velocity_offset = velocity_emission, velocity_offset
        self._token_texts = [f"NOTE_ON_{pitch}" for pitch in range(128)]
        self._token_texts += [f"NOTE_OFF_{pitch}" for pitch in range(128)]
        self._token_texts += [f"TIME_SHIFT_{10 * steps}" for steps in range(1, MAX_SHIFT + 1)]
        self._token_texts += [f"VELOCITY_{bin}" for bin in range(32)]
        self._token_texts += ["token_end"] * end_token + ["PAD"] + ["BOS"] * bos
        self._token_ids = {text: index for index, text in enumerate(self._token_texts)}
        kwargs.setdefault("eos_token", "token_end" if end_token else None)
        kwargs.setdefault("pad_token", "PAD")
        kwargs.setdefault("bos_token", "BOS" if bos else None)
        super().__init__(
            fold_pedal=fold_pedal,
            time_rounding=time_rounding,
            velocity_emission=velocity_emission,
            velocity_offset=velocity_offset,
            end_token=end_token,
            bos=bos,
            **kwargs,
        )

    # ---- the vocabulary, as Transformers asks for it

    @property
    def vocab_size(self) -> int:
        return len(self._token_texts)

    def get_vocab(self) -> dict[str, int]:
        return {**self._token_ids, **self.added_tokens_encoder}

    def _tokenize(self, text: str, **kwargs) -> list[str]:
        return text.split()

    def _convert_token_to_id(self, token: str) -> int:
        if token not in self._token_ids:
            raise ValueError(
                f"{token!r} is no token: tokens look like 'NOTE_ON_60' or 'TIME_SHIFT_10'. For music, call midi_to_ids."
            )
        return self._token_ids[token]

    def _convert_id_to_token(self, index: int) -> str:
        if not 0 <= index < len(self._token_texts):
            raise ValueError(f"token id {index} is outside the vocabulary of {len(self._token_texts)} tokens.")
        return self._token_texts[index]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return " ".join(tokens)

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        return ()

    # ---- music to ids

    def midi_to_ids(self, source, add_special_tokens: bool = True, seconds: float | None = None) -> list[int]:
        """Token ids of one piece.

        Args:
            source: a path, MIDI bytes, a `symusic.Score`, or a structured note array with `onset_s`, `duration_s`
                (seconds), `pitch`, `velocity`, `program` (drums -1).
            add_special_tokens: put BOS in front, if there is one. (token_end is for training data.)
            seconds: keep only the events before this time; notes that sound then stay without their note_off.

        Raises:
            ValueError: not MIDI, damaged, or no notes but drums in it; the message names the file.
        """
        name, onset, end, pitch, velocity = self._load(source)
        on_step, off_step = self._steps(onset, end)
        on_step, off_step, pitch, velocity, doubled = _one_key_per_pitch(on_step, off_step, pitch, velocity)
        if doubled:
            warnings.warn(
                f"{name}: notes struck twice within 10 ms, written once (loudest velocity, latest end): {doubled}",
                stacklevel=2,
            )
        ids = self._emit(on_step, off_step, pitch, (velocity - self.velocity_offset) // 4, seconds)
        special = [self.bos_token_id] if add_special_tokens and self.bos_token_id is not None else []
        return special + ids.tolist()

    def _load(self, source) -> tuple[str, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Name of the source; onset, end (seconds), pitch and velocity of its notes, the pedal folded in."""
        if isinstance(source, np.ndarray):
            name, pedals = "<array>", []
            tracks = _tracks_of_array(name, source)
        else:
            name, score = _read_score(source)
            tracks, pedals = _tracks_of_score(name, score)
        drums = sum(len(notes[0]) for program, notes in tracks if program < 0)
        melodic = [(program, notes) for program, notes in tracks if program >= 0 and len(notes[0])]
        if not melodic:
            raise ValueError(f"{name}: it holds no notes{' but drums, which a piano cannot play' if drums else ''}.")
        if drums:
            warnings.warn(f"{name}: {drums} drum notes are left out", stacklevel=3)
        programs = {program for program, _ in melodic}
        if len(melodic) > 1:
            kind = "instruments" if len(programs) > 1 else "tracks"
            warnings.warn(f"{name}: {len(melodic)} {kind} are played as one piano", stacklevel=3)
        elif max(programs) > 7:
            warnings.warn(f"{name}: its instrument, program {max(programs)}, is played as a piano", stacklevel=3)
        onset, end, pitch, velocity = (np.concatenate(parts) for parts in zip(*(n for _, n in melodic), strict=True))
        if not (np.isfinite(onset).all() and np.isfinite(end).all() and onset.min() >= 0 and end.max() < MAX_SECONDS):
            raise ValueError(f"{name}: a time in it is broken (negative, not finite, or beyond 24 hours).")
        if self.fold_pedal and pedals:
            last = max(end.max(), *(times[-1] for _, times, _ in pedals))
            if last >= MAX_SECONDS:
                raise ValueError(f"{name}: a time in it is broken (negative, not finite, or beyond 24 hours).")
            end = np.concatenate([_hold(notes, pedals, index, last) for index, (_, notes) in enumerate(melodic)])
        return name, onset, end, pitch, np.clip(velocity, 1, 127)

    def _steps(self, onset: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Times in seconds to steps of 10 ms."""
        if self.time_rounding == "absolute":
            return np.rint(onset * STEPS_PER_S).astype(np.int64), np.rint(end * STEPS_PER_S).astype(np.int64)
        times, place = np.unique(np.concatenate([onset, end]), return_inverse=True)
        steps = np.cumsum(np.rint(np.diff(times, prepend=0.0) * STEPS_PER_S)).astype(np.int64)[place]
        return steps[: len(onset)], steps[len(onset) :]

    def _emit(self, on_step, off_step, pitch, bins, seconds: float | None) -> np.ndarray:
        """The canonical ids of notes of which no two hold one key at once."""
        # One sortable number an event: step, note_off before note_on, pitch, velocity bin.
        offs = (off_step * 256 + pitch) * 32
        ons = (on_step * 256 + 128 + pitch) * 32 + bins
        events = np.sort(np.concatenate([offs, ons]))
        if seconds is not None:
            # The small amount: 0.07 * 100 is 7.000000000000001, but step 7 does not begin before 0.07 s.
            events = events[: np.searchsorted(events, int(np.ceil(seconds * STEPS_PER_S - 1e-6)) * 256 * 32)]
        steps, is_on, event_bin = events >> 13, (events >> 12 & 1).astype(bool), events & 31
        event_pitch = events >> 5 & 127
        says_velocity = is_on.copy()
        if self.velocity_emission != "every_note":
            says_velocity[is_on] = np.diff(event_bin[is_on], prepend=-1) != 0
        if self.velocity_emission == "after_note_off":
            says_velocity[1:] |= is_on[1:] & ~is_on[:-1]
        gaps = np.diff(steps, prepend=0)
        ends = np.cumsum(-(-gaps // MAX_SHIFT) + says_velocity + 1)  # where each event's tokens end
        # What nothing else is written over are the full shifts of long gaps.
        ids = np.full(ends[-1] if len(ends) else 0, TIME_SHIFT + MAX_SHIFT - 1)
        ids[ends - 1] = np.where(is_on, NOTE_ON, NOTE_OFF) + event_pitch
        ids[ends[says_velocity] - 2] = VELOCITY + event_bin[says_velocity]
        rest = gaps % MAX_SHIFT
        ids[(ends - 2 - says_velocity)[rest > 0]] = TIME_SHIFT - 1 + rest[rest > 0]
        return ids

    # ---- ids to music

    def decode_midi(self, ids) -> Score:
        """The `symusic.Score` of ids (list, array or tensor of shape `(T,)`): one piano, one tick a millisecond.

        Any ids decode: special tokens and note_offs of silent keys are passed over; a key struck again while it sounds
        ends the earlier note; notes without a note_off end with the sequence; every note lasts at least 10 ms.

        Raises:
            ValueError: an id outside the vocabulary, or a batch of sequences.
        """
        ids = self._checked(ids)
        steps = np.cumsum(np.where((ids >= TIME_SHIFT) & (ids < VELOCITY), ids - TIME_SHIFT + 1, 0))
        says_velocity = (ids >= VELOCITY) & (ids < EVENTS)
        last_said = np.maximum.accumulate(np.where(says_velocity, np.arange(len(ids)), -1))
        values = np.clip(4 * (ids - VELOCITY) + self.velocity_offset + 1, 1, 127)
        velocities = np.where(last_said >= 0, values[last_said], DEFAULT_VELOCITY)
        # Events of one key side by side, in their order: a note ends at the next one.
        events = np.flatnonzero(ids < TIME_SHIFT)
        events = events[np.argsort(ids[events] % 128, kind="stable")]
        key, step, is_on = ids[events] % 128, steps[events], ids[events] < NOTE_OFF
        same_key = np.append(key[1:] == key[:-1], np.zeros(min(len(key), 1), bool))
        until = np.where(same_key, np.append(step[1:], step[:1]), steps[-1] if len(steps) else 0)
        onset, until, pitch, velocity = step[is_on], until[is_on], key[is_on], velocities[events][is_on]
        # A key struck twice in one step is one note, the last; it would otherwise be two notes of no length.
        again = np.append((onset[1:] == onset[:-1]) & (pitch[1:] == pitch[:-1]), np.zeros(min(len(onset), 1), bool))
        onset, until, pitch, velocity = (field[~again] for field in (onset, until, pitch, velocity))
        order = np.lexsort((pitch, onset))
        duration = np.maximum(until - onset, 1)
        score = Score(500)  # at 120 quarter notes a minute, a tick is 1 ms
        score.tempos.append(Tempo(0, 120))
        score.time_signatures.append(TimeSignature(0, 4, 4))
        track = Track(name="Piano", program=0)
        ticks = round(1000 * STEP_S)
        track.notes = Note.from_numpy(
            time=(onset[order] * ticks).astype(np.int32),
            duration=(duration[order] * ticks).astype(np.int32),
            pitch=pitch[order].astype(np.int8),
            velocity=velocity[order].astype(np.int8),
        )
        score.tracks.append(track)
        return score

    def _checked(self, ids) -> np.ndarray:
        ids = np.asarray(ids.tolist() if hasattr(ids, "tolist") else list(ids))
        if ids.ndim != 1:
            raise ValueError("this takes one sequence of ids; call it for each row of a batch.")
        if len(ids) and ids.dtype.kind not in "iu":
            raise ValueError(f"token ids are whole numbers, not {ids.dtype}.")
        ids = ids.astype(np.int64)
        wrong = ids[(ids < 0) | (ids >= self.vocab_size)]
        if len(wrong):
            raise ValueError(f"token id {wrong[0]} is outside the vocabulary of {self.vocab_size} tokens.")
        return ids

    def transpose_ids(self, ids, semitones: int) -> np.ndarray:
        """`ids` with every pitch moved by `semitones`; inside a chord the order stays, so it stays canonical.

        Raises:
            ValueError: a pitch would leave 0-127.
        """
        ids = self._checked(ids)
        pitches = ids[ids < TIME_SHIFT] % 128 + semitones
        if len(pitches) and not (pitches.min() >= 0 and pitches.max() < 128):
            raise ValueError(f"transposing by {semitones} semitones leaves the MIDI pitch range.")
        return np.where(ids < TIME_SHIFT, ids + semitones, ids)

    # ---- what a model config needs to know about the tokens

    def config_fields(self) -> dict:
        """Keyword arguments for `PerceiverSConfig`: vocabulary size, special ids and the ranges of the kinds."""
        return {
            "vocab_size": self.vocab_size,
            "pad_token_id": self.pad_token_id,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": self.eos_token_id,
            "grammar": {
                "note_on": [NOTE_ON, NOTE_OFF],
                "note_off": [NOTE_OFF, TIME_SHIFT],
                "time_shift": [TIME_SHIFT, VELOCITY],
                "velocity": [VELOCITY, EVENTS],
                "step_s": STEP_S,
            },
        }


def midi_damage(data: bytes) -> str:
    """Why a MIDI file is not read, by its header, chunks and events; "" for nothing.

    Some readers return what they got of a broken file, and some crash: a note number above 127 has no place in memory.
    """
    if not data:
        return "the file is empty"
    if not data.startswith(b"MThd"):
        return "not a MIDI file (it does not begin with 'MThd')"
    if data[12:13] >= b"\x80":
        return "times are SMPTE frames, not beats: export it with ticks per quarter note"
    delta = rb"[\x80-\xff]{0,3}[\x00-\x7f]"
    two = rb"[\x80-\xbf\xe0-\xef][\x00-\x7f]{2}(?:" + delta + rb"[\x00-\x7f]{2})*+"
    one = rb"[\xc0-\xdf][\x00-\x7f](?:" + delta + rb"[\x00-\x7f])*+"
    events = delta + rb"(?:" + two + rb"|" + one + rb")"  # of one kind and channel, which only the first one states
    run_of_events, stated, number, other_event = map(
        re.compile, (rb"(?:" + events + rb")++", events, delta, rb"\xff[\x00-\x7f]|\xf0")
    )
    position, missing = 8 + int.from_bytes(data[4:8], "big"), int.from_bytes(data[10:12], "big")
    while missing > 0 and position + 8 <= len(data):  # what follows the last track is nobody's loss
        at, end = position + 8, position + 8 + int.from_bytes(data[position + 4 : position + 8], "big")
        is_track, position, latest = data[position : position + 4] == b"MTrk", end, None
        running = 0
        missing -= is_track
        while is_track and at < end <= len(data):
            if run := run_of_events.match(data, at, end):  # most of a file
                at, latest, running = run.end(), run, None
                continue
            wait = number.match(data, at, end)
            if wait is None or wait.end() == end:
                return "damaged or truncated MIDI (a track ends inside an event)"
            at = wait.end()
            if data[at] == 0xF7:
                return "an escape event, F7, which readers take for another: export the file without"
            if event := other_event.match(data, at, end):
                length = number.match(data, event.end(), end)
                size = 0
                for byte in length[0] if length else b"":
                    size = size << 7 | byte & 0x7F
                if length is None or length.end() + size > end:
                    return "damaged or truncated MIDI (a track ends inside an event)"
                if event[0] == b"\xff\x2f":  # the end of the track
                    break
                at = length.end() + size
            else:  # an event without a status of its own after one of no channel, or nothing that can be read
                if running is None:
                    *_, last = stated.finditer(data, *latest.span())
                    running = data[number.match(data, last.start()).end()]
                size = 1 if 0xC0 <= running < 0xE0 else 2
                if not running or len(values := data[at : min(at + size, end)]) < size or max(values) > 0x7F:
                    return "damaged or truncated MIDI (an event of a kind or with values that no MIDI file has)"
                at += size
    if position > len(data) or missing > 0:
        return "damaged or truncated MIDI (it ends before its own chunk sizes say)"
    return ""


def _read_score(source) -> tuple[str, Score]:
    """The name and the score of a path, MIDI bytes or a score."""
    name = "<bytes>"
    if isinstance(source, str | os.PathLike):
        name, source = os.fspath(source), Path(source).read_bytes()
    if isinstance(source, bytes | bytearray | memoryview):
        data = bytes(source)
        if damage := midi_damage(data):
            raise ValueError(f"{name}: {damage}.")
        try:
            source = Score.from_midi(data)
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{name}: not a readable MIDI file ({error}).") from error
    elif hasattr(source, "to") and hasattr(source, "tracks"):
        name = "<score>"
    else:
        raise ValueError(f"cannot read music from {type(source).__name__}: give a path, bytes, Score or note array.")
    if source.ticks_per_quarter <= 0:
        raise ValueError(f"{name}: it gives {source.ticks_per_quarter} ticks per quarter note.")
    return name, source


def _tracks_of_score(name: str, score: Score) -> tuple[list, list]:
    """`(program, (onset, end, pitch, velocity))` of every track (drums: program -1), and the tracks' sustain pedals.

    Pedals are `(index among the melodic tracks with notes, times, values)`. Times are float64 seconds: the float32 of
    `score.to("second")` is 0.1 ms coarse half an hour in, and tempo changes add its errors up.
    """
    if str(score.ttype).endswith("Second"):
        to_seconds = np.asarray
    else:
        score = score.to("tick")
        to_seconds = _clock(name, score)
    tracks, pedals, index = [], [], 0
    for track in score.tracks:
        notes, controls = track.notes.numpy(), track.controls.numpy()
        start = notes["time"].astype(np.float64)  # exact, and no sum overflows
        onset, end = to_seconds(start), to_seconds(start + notes["duration"])
        pitch, velocity = notes["pitch"].astype(np.int64), notes["velocity"].astype(np.int64)
        tracks.append((-1 if track.is_drum else track.program, (onset, end, pitch, velocity)))
        if track.is_drum or not len(onset):
            continue
        chosen = controls["number"] == SUSTAIN
        times, values = to_seconds(controls["time"][chosen].astype(np.float64)), controls["value"][chosen]
        if len(times):
            order = np.argsort(times, kind="stable")
            pedals.append((index, times[order], values[order]))
        index += 1
    return tracks, pedals


def _clock(name: str, score: Score):
    """The function from ticks to seconds under the score's tempo changes (120 quarter notes a minute before them)."""
    tempos = sorted((tempo.time, tempo.mspq) for tempo in score.tempos)
    if any(mspq <= 0 for _, mspq in tempos):
        warnings.warn(f"{name}: a tempo of 0 is ignored", stacklevel=5)
        tempos = [(time, mspq) for time, mspq in tempos if mspq > 0]
    if not tempos or tempos[0][0] > 0:
        tempos.insert(0, (0, 500_000))
    starts = np.array([time for time, _ in tempos], dtype=np.float64)
    rates = np.array([mspq for _, mspq in tempos]) / 1e6 / score.ticks_per_quarter  # seconds per tick
    at_start = np.concatenate([[0.0], np.cumsum(np.diff(starts) * rates[:-1])])

    def to_seconds(ticks: np.ndarray) -> np.ndarray:
        section = np.searchsorted(starts, ticks, side="right") - 1
        return at_start[section] + (ticks - starts[section]) * rates[section]

    return to_seconds


def _tracks_of_array(name: str, notes: np.ndarray) -> list:
    names = notes.dtype.names or ()
    missing = [n for n in ("onset_s", "duration_s", "pitch", "velocity", "program") if n not in names]
    if missing or not len(notes):
        raise ValueError(
            f"{name}: a note array needs notes and the fields onset_s ... program; missing: {missing or 'notes'}."
        )
    if notes["pitch"].min() < 0 or notes["pitch"].max() > 127:
        raise ValueError(f"{name}: it has pitches outside 0-127.")
    track = notes["track"] if "track" in names else np.zeros(len(notes), np.int64)
    tracks = []
    for index, program in sorted(set(zip(track.tolist(), notes["program"].tolist(), strict=True))):
        chosen = notes[(track == index) & (notes["program"] == program)]
        onset = chosen["onset_s"].astype(np.float64)
        values = (onset, onset + chosen["duration_s"], chosen["pitch"].astype(np.int64), chosen["velocity"])
        tracks.append((program, values))
    return tracks


def _hold(notes, pedals, index: int, last: float) -> np.ndarray:
    """Ends (seconds) of a track's notes under its pedal; a pedal that never rises holds until `last`.

    A note whose key is struck again ends there all the same: `_one_key_per_pitch` sees to that.
    """
    _, end, _, _ = notes
    for owner, times, values in pedals:
        if owner == index:
            down = values >= PEDAL_DOWN
            # For every pedal event, the time of the first event from it on that finds the pedal up.
            rises = np.minimum.accumulate(np.where(down, last, times)[::-1])[::-1]
            before = np.searchsorted(times, end, side="right") - 1
            held = (before >= 0) & down[before]
            end = np.where(held, rises[before], end)
    return end


def _one_key_per_pitch(on_step, off_step, pitch, velocity):
    """Notes made playable on one keyboard: on_step, off_step, pitch, velocity, and how many doubled notes were merged.

    Notes of one pitch and step become one, with the loudest velocity and the latest end; every note lasts a step or
    longer, and ends no later than the next note of its pitch begins.
    """
    order = np.lexsort((on_step, pitch))
    on_step, off_step, pitch, velocity = on_step[order], off_step[order], pitch[order], velocity[order]
    new_pitch = np.append(True, pitch[1:] != pitch[:-1])
    first = np.flatnonzero(new_pitch | np.append(True, on_step[1:] != on_step[:-1]))
    off_step, velocity = np.maximum.reduceat(off_step, first), np.maximum.reduceat(velocity, first)
    doubled = len(on_step) - len(first)
    on_step, pitch = on_step[first], pitch[first]
    off_step = np.maximum(off_step, on_step + 1)
    off_step[:-1] = np.where(pitch[1:] == pitch[:-1], np.minimum(off_step[:-1], on_step[1:]), off_step[:-1])
    return on_step, off_step, pitch, velocity, doubled


__all__ = ["PerceiverSTokenizer"]
