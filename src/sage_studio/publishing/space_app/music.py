"""The music behind the page: prompts from strangers, and continuations that can be watched and stopped.

`Writing` is iterated for what there is so far; `cancel()` ends it from any thread within one token, and the last thing
it hands out has the finished piece.
"""

import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from roll import Roll
from symusic import Score
from transformers import PreTrainedModel, PreTrainedTokenizer

from sage_studio.errors import InvalidMidiError
from sage_studio.families import family_of
from sage_studio.generation.result import Piece
from sage_studio.generation.stream import StreamedNote
from sage_studio.music.midi import bar_times, notes_from_score, read_score
from sage_studio.music.notes import NOTE_DTYPE

MAX_BYTES = 2**20
MAX_NOTES = 20_000  # of a prompt's file: ten times a long pop song
MAX_BARS, MAX_PROMPT_BARS = 32, 16
MAX_SECONDS, MAX_PROMPT_SECONDS = 60, 60
WALL_SECONDS = 180.0  # after which a piece is ended: others are waiting
REFRESH_SECONDS = 0.3  # between two pictures


@dataclass(frozen=True)
class Settings:
    """What one visitor asks for; lengths in bars (SAGE-Music) or seconds (PerceiverS).

    Raises:
        ValueError: a value that the page does not offer, which only a forged request can have.
    """

    prompt_length: float
    length: float
    programs: list[int]
    temperature: float
    top_p: float
    seed: int

    def __post_init__(self):
        if not (1 <= self.prompt_length <= MAX_PROMPT_SECONDS and 1 <= self.length <= MAX_SECONDS):
            raise ValueError("The lengths are outside what this page offers.")
        if not 0 <= self.seed < 2**63:
            raise ValueError("The seed must be a whole number from 0 to 9,223,372,036,854,775,807.")


@dataclass(frozen=True)
class Snapshot:
    """What has been written so far: the roll, where the music is, and at the end the piece."""

    roll: Roll
    place: str
    new_notes: int
    piece: Piece | None = None


def read_prompt(data: bytes, name: str) -> Score:
    """The score of an uploaded file.

    Raises:
        InvalidMidiError: not MIDI, damaged, or larger than this page takes; the message names the file.
    """
    if len(data) > MAX_BYTES:
        raise InvalidMidiError(name, f"larger than {MAX_BYTES // 2**20} MB.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what was mended in a file is nothing that the page can show
            score = read_score(data)
            if score.note_num() > MAX_NOTES:
                raise InvalidMidiError(name, f"it has {score.note_num():,} notes; this page takes up to {MAX_NOTES:,}.")
            notes_from_score(score)
    except ValueError as error:
        raise InvalidMidiError(name, str(error).removeprefix("<bytes>: ").removeprefix(f"{name}: ")) from error
    return score


def prompt_roll(score: Score, in_bars: bool, prompt_length: float, length: float) -> Roll:
    """The prompt as far as the model hears it, with room for the music to come."""
    times = bar_times(score)
    if in_bars:
        heard = int(min(prompt_length, len(times)))
        lines = _bar_lines(score, heard, int(length))
        end = lines[heard]
        caption = f"Bars 1 to {heard} are the prompt; {int(length)} bars follow."
        return Roll(_until(score, end), end, lines[-1], lines[:-1], _bar_labels(len(lines) - 1), caption)
    end = min(prompt_length, float(score.to("second").end()))
    caption = f"The first {end:.0f} s are the prompt, played as one piano; {length:.0f} s follow."
    notes = _until(score, end)
    notes = notes[notes["program"] >= 0]
    notes["program"] = 0
    return Roll(notes, end, end + length, *_second_lines(end + length), caption)


class Writing:
    """A continuation being written; iterate it once, from one thread.

    Raises:
        ValueError: what makes a plan of it raises, at once.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizer, score: Score, settings: Settings):
        family = family_of(model)
        own = {"programs": settings.programs or None} if family.counts_bars else {}
        kind = int if family.counts_bars else float
        lengths = {family.prompt_length: kind(settings.prompt_length), family.length: kind(settings.length)}
        sampling = {name: getattr(settings, name) for name in ("temperature", "top_p", "seed")}
        self.plan = family.load("plan")(model, tokenizer, score, **lengths, **sampling, **own)
        self.picture = _Bars(self.plan) if family.counts_bars else _Seconds(self.plan, score, settings)

    def cancel(self) -> None:
        """End the music where it is; it is still handed out."""
        self.plan.cancel()

    def __iter__(self) -> Iterator[Snapshot]:
        limit = threading.Timer(WALL_SECONDS, self.cancel)
        limit.daemon = True
        limit.start()
        new, shown = [], 0.0
        try:
            with self.plan.stream() as stream:
                for note in stream:
                    new.append(note)
                    if time.perf_counter() - shown >= REFRESH_SECONDS:
                        shown = time.perf_counter()
                        yield self.picture.so_far(new, stream.ids)
                piece = stream.piece
            yield self.picture.finished(piece)
        finally:
            limit.cancel()
            self.cancel()


class _Bars:
    """Pictures of music that is counted in bars."""

    def __init__(self, plan):
        # As the model hears it, not as the file has it: a meter without a token becomes another, with other bar lines.
        score = plan.piece(plan.ids, 0, 0.0, []).score
        self.heard, self.bars = plan.prompt_bars, plan.bars
        self.lines = _bar_lines(score, self.heard, self.bars)
        self.prompt = _until(score, self.lines[self.heard])

    def so_far(self, new: list[StreamedNote], ids: list[int]) -> Snapshot:
        notes = np.concatenate([self.prompt, np.array([_row(note) for note in new], dtype=NOTE_DTYPE)])
        labels, lines = _bar_labels(len(self.lines) - 1), self.lines
        roll = Roll(notes, lines[self.heard], lines[-1], lines[:-1], labels, f"{len(new)} new notes so far.")
        return Snapshot(roll, f"bar {new[-1].bar - self.heard} of {self.bars}", len(new))

    def finished(self, piece: Piece) -> Snapshot:
        total = self.heard + piece.bars
        lines = bar_times(piece.score, total + 1)[: total + 1].tolist()
        caption = f"{self.heard} bars of prompt, {piece.bars} new bars with {piece.notes} notes."
        notes = notes_from_score(piece.score)
        roll = Roll(notes, piece.prompt_end_s, lines[-1], lines[:-1], _bar_labels(total), caption)
        return Snapshot(roll, f"{piece.bars} bars", piece.notes, piece)


class _Seconds:
    """Pictures of music that is counted in seconds; notes that still sound are in them too."""

    def __init__(self, plan, score: Score, settings: Settings):
        self.decode, self.length = plan.tokenizer.decode_midi, settings.length
        self.known = prompt_roll(score, False, settings.prompt_length, settings.length)

    def so_far(self, new: list[StreamedNote], ids: list[int]) -> Snapshot:
        notes, known = notes_from_score(self.decode(ids)), self.known
        count = int((notes["onset_s"] >= known.prompt_end_s).sum())
        done = max(float(notes["onset_s"].max(initial=0.0)) - known.prompt_end_s, 0.0)
        caption = f"{count} new notes so far."
        roll = Roll(notes, known.prompt_end_s, known.end_s, known.lines_s, known.labels, caption)
        return Snapshot(roll, f"second {done:.0f} of {self.length:.0f}", count)

    def finished(self, piece: Piece) -> Snapshot:
        end = piece.prompt_end_s + piece.music_s
        caption = f"{piece.prompt_end_s:.0f} s of prompt, {piece.music_s:.1f} new seconds, {piece.notes} notes."
        roll = Roll(notes_from_score(piece.score), piece.prompt_end_s, end, *_second_lines(end), caption)
        return Snapshot(roll, f"{piece.music_s:.1f} s", piece.notes, piece)


def _until(score: Score, end_s: float) -> np.ndarray:
    """The notes that begin before a time, cut off there."""
    notes = notes_from_score(score)
    notes = notes[notes["onset_s"] < end_s - 1e-6]
    notes["duration_s"] = np.minimum(notes["duration_s"], end_s - notes["onset_s"])
    return notes


def _row(note: StreamedNote) -> tuple:
    return (note.onset_s, note.duration_s, note.pitch, max(note.velocity, 1), note.program, 0)


def _bar_lines(score: Score, heard: int, bars: int) -> list[float]:
    """Seconds of the bar lines of a prompt's bars, and of the bars to come at the pace of its last."""
    known = bar_times(score, heard + 1)[: heard + 1]
    step = known[-1] - known[-2]
    return [*known.tolist(), *(known[-1] + step * (1 + np.arange(bars))).tolist()]


def _bar_labels(bars: int) -> list[str]:
    return [str(index + 1) if index % 4 == 0 else "" for index in range(bars)]


def _second_lines(end_s: float) -> tuple[list[float], list[str]]:
    seconds = list(range(0, int(np.ceil(end_s)), 2))
    return [float(second) for second in seconds], [f"{s // 60}:{s % 60:02d}" if s % 10 == 0 else "" for s in seconds]
