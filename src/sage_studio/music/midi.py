"""MIDI files to scores and note arrays, and back. MIDI is bytes from strangers: readers check before they trust."""

import os
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path

import numpy as np
from symusic import Note, Score, Tempo, TimeSignature, Track

from sage_studio.errors import InvalidMidiError
from sage_studio.files import write_atomic

from .notes import NOTE_DTYPE, check_notes, instrument_name

# `warnings.catch_warnings` is the process's: of two threads in it at once, one would undo what the other has set.
_HEARING = threading.Lock()

# Longer than any music; what lies beyond is a broken delta time that would become millions of empty bars.
MAX_QUARTERS = 100_000


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


def read_score(source: str | os.PathLike | bytes) -> Score:
    """The `symusic.Score` (in ticks) of a MIDI file given as a path or as bytes.

    Tempo changes to 0 microseconds per quarter note are left out, with a warning: no clock can follow them.

    Raises:
        InvalidMidiError: the file is missing, not MIDI, truncated, timed in SMPTE frames, absurdly long or empty.
    """
    if isinstance(source, bytes | bytearray | memoryview):
        name, data = "<bytes>", bytes(source)
    else:
        name = os.fspath(source)
        if not name or not name.isprintable():
            name = repr(name)
        try:
            with open(source, "rb") as file:  # Path("") would be the working folder
                data = file.read()
        except (OSError, ValueError) as error:  # ValueError: no name that the system could have
            raise InvalidMidiError(name, f"cannot be opened ({getattr(error, 'strerror', error)}).") from error
    if damage := midi_damage(data):
        raise InvalidMidiError(name, f"{damage}.")
    try:
        score = Score.from_midi(data)
    except (RuntimeError, ValueError, UnicodeDecodeError) as error:
        reason = str(error).removeprefix("MiniMidi: ").removesuffix(": iostream error")
        raise InvalidMidiError(name, f"damaged or truncated MIDI ({reason}).") from error
    if score.ticks_per_quarter <= 0:
        raise InvalidMidiError(name, "its header gives 0 ticks per quarter note.")
    if score.note_num() == 0:
        raise InvalidMidiError(name, "it holds no notes.")
    if score.start() < 0 or score.end() > MAX_QUARTERS * score.ticks_per_quarter:
        raise InvalidMidiError(name, f"it is longer than {MAX_QUARTERS:,} quarter notes: a time in it is broken.")
    if any(meter.numerator < 1 or meter.denominator not in (1, 2, 4, 8, 16, 32, 64) for meter in score.time_signatures):
        raise InvalidMidiError(name, "it states a meter that has no bars.")
    stuck = [tempo for tempo in score.tempos if tempo.mspq <= 0]
    if stuck:
        warnings.warn(f"{name}: a tempo of 0 at tick {stuck[0].time} is ignored.", stacklevel=2)
        score.tempos = type(score.tempos)([tempo for tempo in score.tempos if tempo.mspq > 0])
    return score


@contextmanager
def heard_warnings() -> Iterator[list[str]]:
    """This thread's warnings in here are kept as remarks: sorted, without the name of the music.

    Those of other threads are shown where they would be, for as long as this lasts without any filter.
    """
    remarks: list[str] = []
    heard, thread, others = set(), threading.get_ident(), None

    def show(message, *about, **more):
        if threading.get_ident() == thread:
            heard.add(re.sub(r"^<(score|bytes)>: ", "", str(message)))
        else:
            others(message, *about, **more)

    with _HEARING, warnings.catch_warnings():
        warnings.simplefilter("always")
        others, warnings.showwarning = warnings.showwarning, show
        yield remarks
    remarks += sorted(heard)


@dataclass(frozen=True)
class Prompt:
    """Music to go on after, read once.

    Attributes:
        name: of the file, for errors; `<bytes>` or `<score>` where there is none.
        score: in ticks.
        remarks: what was left out in reading.
    """

    name: str
    score: Score
    remarks: list[str] = field(default_factory=list)


def read_prompt(source: "str | os.PathLike | bytes | Score | Prompt") -> Prompt:
    """A prompt from a path, bytes or a score; one that was read already comes back as it is.

    Raises:
        InvalidMidiError: as `read_score`.
    """
    if isinstance(source, Prompt):
        return source
    if not isinstance(source, str | bytes | os.PathLike):
        return Prompt("<score>", source)
    with heard_warnings() as remarks:
        score = read_score(source)
    return Prompt("<bytes>" if isinstance(source, bytes) else os.fspath(source), score, remarks)


def notes_from_score(score: Score) -> np.ndarray:
    """The note array of a score in ticks, tempo changes applied as `bar_times` applies them to bar lines."""
    parts = [np.zeros(0, dtype=NOTE_DTYPE)]
    for index, track in enumerate(score.tracks):
        soa = track.notes.numpy()
        part = np.zeros(len(soa["time"]), dtype=NOTE_DTYPE)
        part["onset_s"], part["duration_s"] = soa["time"], soa["duration"]  # in ticks as yet
        part["pitch"], part["velocity"] = soa["pitch"], np.maximum(soa["velocity"], 1)
        part["program"], part["track"] = (-1 if track.is_drum else track.program), index
        parts.append(part)
    notes = np.concatenate(parts)
    # Not `score.to("second")`, whose float32 puts notes before the bar line that they are on.
    end = tick_to_seconds(score, notes["onset_s"] + notes["duration_s"])
    notes["onset_s"] = tick_to_seconds(score, notes["onset_s"])
    notes["duration_s"] = end - notes["onset_s"]
    return check_notes(notes)


def read_notes(source: str | os.PathLike | bytes) -> np.ndarray:
    """The note array of a MIDI file; raises as `read_score`."""
    return notes_from_score(read_score(source))


def score_from_notes(notes: np.ndarray, qpm: float = 120.0, ticks_per_quarter: int = 480) -> Score:
    """A score of one track per `(track, program)`, on a constant tempo of `qpm` quarter notes a minute, in 4/4."""
    notes = check_notes(notes)
    score = Score(ticks_per_quarter)
    score.tempos.append(Tempo(0, qpm))
    score.time_signatures.append(TimeSignature(0, 4, 4))
    per_second = ticks_per_quarter * qpm / 60
    for index, program in np.unique(notes[["track", "program"]]).tolist():
        chosen = notes[(notes["track"] == index) & (notes["program"] == program)]
        onset = np.round(chosen["onset_s"] * per_second).astype(np.int32)
        end = np.round((chosen["onset_s"] + chosen["duration_s"]) * per_second).astype(np.int32)
        track = Track(program=max(program, 0), is_drum=program < 0)
        track.notes = Note.from_numpy(
            time=onset,
            duration=np.maximum(end - onset, 1),
            pitch=chosen["pitch"].astype(np.int8),
            velocity=chosen["velocity"].astype(np.int8),
        )
        score.tracks.append(track)
    return score


def bar_ticks(score: Score, at_least: int = 0) -> np.ndarray:
    """Ticks of all bar lines up to the end of the music by the score's meters, or of `at_least` so many bar lines."""
    meters = sorted(((m.time, m.numerator, m.denominator) for m in score.time_signatures), key=itemgetter(0))
    if not meters or meters[0][0] > 0:
        meters.insert(0, (0, 4, 4))
    ticks: list[int] = []
    for index, (start, numerator, denominator) in enumerate(meters):
        step = max(score.ticks_per_quarter * 4 * numerator // denominator, 1)
        last = index + 1 == len(meters)
        until = max(score.end(), start) if last else meters[index + 1][0]
        ticks.extend(range(start, until, step))
        while last and len(ticks) < at_least:
            ticks.append(ticks[-1] + step if ticks and ticks[-1] >= start else start)
    return np.array(ticks, dtype=np.int64)


def tick_to_seconds(score: Score, ticks: np.ndarray) -> np.ndarray:
    """Seconds of tick positions under the score's tempo changes (120 quarter notes a minute before the first)."""
    # Of several at one tick the file's last one holds: sorted by time alone, in the file's order.
    tempos = sorted(((tempo.time, tempo.mspq) for tempo in score.tempos), key=itemgetter(0))
    if not tempos or tempos[0][0] > 0:
        tempos.insert(0, (0, 500_000))
    starts = np.array([time for time, _ in tempos])
    rates = np.array([mspq for _, mspq in tempos]) / 1e6 / score.ticks_per_quarter  # seconds per tick
    at_start = np.concatenate([[0.0], np.cumsum(np.diff(starts) * rates[:-1])])
    section = np.searchsorted(starts, ticks, side="right") - 1
    return at_start[section] + (ticks - starts[section]) * rates[section]


def bar_times(score: Score, at_least: int = 0) -> np.ndarray:
    """Seconds of the bar lines of `bar_ticks`."""
    return tick_to_seconds(score, bar_ticks(score, at_least))


def describe(score: Score) -> list[str]:
    """Instruments of a score, most notes first: `"Acoustic Grand Piano (212 notes)"`."""
    tracks = sorted(score.tracks, key=lambda track: -len(track.notes))
    return [f"{instrument_name(-1 if t.is_drum else t.program)} ({len(t.notes)} notes)" for t in tracks]


def write_midi(path: str | os.PathLike, music: "Score | np.ndarray") -> Path:
    """Write a score or a note array as a MIDI file, whole or not at all. Returns the path."""
    score = score_from_notes(music) if isinstance(music, np.ndarray) else music
    return write_atomic(path, score.dumps_midi())
