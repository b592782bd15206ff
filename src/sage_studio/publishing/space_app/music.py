"""The music behind the page: prompts from strangers, and continuations that can be watched and stopped.

Both families are written the same way: `Writing` is iterated for what there is so far, `cancel()` ends it from any
thread within one token, and the last thing it hands out has the finished piece.
"""

import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass

import numpy as np
import torch
from roll import Roll
from symusic import Score
from transformers import PreTrainedModel, PreTrainedTokenizer, StoppingCriteria, StoppingCriteriaList

from sage_studio.errors import InvalidMidiError
from sage_studio.generation.bars import plan_continuation
from sage_studio.generation.sampling import Generated
from sage_studio.generation.seconds import continue_performance
from sage_studio.generation.stream import NoteStream, StreamedNote
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
    piece: Generated | None = None


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
    """A continuation being written; iterate it once, from one thread."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizer, score: Score, settings: Settings):
        self.model, self.tokenizer, self.score, self.settings = model, tokenizer, score, settings
        self.cancelled = threading.Event()

    def cancel(self) -> None:
        """End the music where it is; it is still handed out."""
        self.cancelled.set()

    def __iter__(self) -> Iterator[Snapshot]:
        limit = threading.Timer(WALL_SECONDS, self.cancel)
        limit.daemon = True
        limit.start()
        try:
            yield from self._write()
        finally:
            limit.cancel()
            self.cancel()

    def _write(self) -> Iterator[Snapshot]:
        raise NotImplementedError


class BarsWriting(Writing):
    """SAGE-Music, note by note.

    Raises:
        ValueError: what `sage_studio.generation.bars.continue_score` raises, at once.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizer, score: Score, settings: Settings):
        super().__init__(model, tokenizer, score, settings)
        self.plan = plan_continuation(
            model,
            tokenizer,
            score,
            prompt_bars=int(settings.prompt_length),
            bars=int(settings.length),
            programs=settings.programs or None,
            temperature=settings.temperature,
            top_p=settings.top_p,
            seed=settings.seed,
        )
        self.stream: NoteStream | None = None

    def cancel(self) -> None:
        super().cancel()
        if self.stream is not None:
            self.stream.cancel()

    def _write(self) -> Iterator[Snapshot]:
        plan = self.plan
        heard = plan.prompt_bars
        # As the model hears it, not as the file has it: a meter without a token becomes another, with other bar lines.
        score = plan.piece(plan.ids, heard, 0.0, []).score
        lines = _bar_lines(score, heard, plan.bars)
        prompt, new, shown = _until(score, lines[heard]), [], 0.0
        with NoteStream(plan, time.perf_counter()) as self.stream:
            if self.cancelled.is_set():
                self.stream.cancel()
            for note in self.stream:
                new.append(_row(note))
                if time.perf_counter() - shown >= REFRESH_SECONDS:
                    shown = time.perf_counter()
                    notes = np.concatenate([prompt, np.array(new, dtype=NOTE_DTYPE)])
                    place = f"bar {note.bar - heard} of {plan.bars}"
                    caption = f"{len(new)} new notes so far."
                    labels = _bar_labels(len(lines) - 1)
                    yield Snapshot(Roll(notes, lines[heard], lines[-1], lines[:-1], labels, caption), place, len(new))
            piece = self.stream.piece
        total = heard + piece.bars
        lines = bar_times(piece.score, total + 1)[: total + 1].tolist()
        caption = f"{heard} bars of prompt, {piece.bars} new bars with {piece.notes} notes."
        notes = notes_from_score(piece.score)
        roll = Roll(notes, piece.prompt_end_s, lines[-1], lines[:-1], _bar_labels(total), caption)
        yield Snapshot(roll, f"{piece.bars} bars", piece.notes, piece)


class SecondsWriting(Writing):
    """PerceiverS, looked at from time to time."""

    def _write(self) -> Iterator[Snapshot]:
        settings, overheard = self.settings, _Overheard(self.model, self.cancelled)
        known = prompt_roll(self.score, False, settings.prompt_length, settings.length)
        with ThreadPoolExecutor(1) as thread:
            future = thread.submit(
                continue_performance,
                overheard,
                self.tokenizer,
                self.score,
                prompt_seconds=settings.prompt_length,
                seconds=settings.length,
                temperature=settings.temperature,
                top_p=settings.top_p,
                seed=settings.seed,
            )
            try:
                while not wait([future], REFRESH_SECONDS).done:
                    if overheard.ids is None:
                        continue
                    notes = notes_from_score(self.tokenizer.decode_midi(overheard.ids))
                    new = int((notes["onset_s"] >= known.prompt_end_s).sum())
                    done = max(float(notes["onset_s"].max(initial=0.0)) - known.prompt_end_s, 0.0)
                    roll = Roll(
                        notes,
                        known.prompt_end_s,
                        known.end_s,
                        known.lines_s,
                        known.labels,
                        f"{new} new notes so far.",
                    )
                    yield Snapshot(roll, f"second {done:.0f} of {settings.length:.0f}", new)
            finally:
                self.cancel()
        piece = future.result()
        if piece.music_seconds < settings.length - 0.1:
            # A piece that was stopped looks to `continue_performance` like one that ran out of tokens.
            piece.remarks[:] = [remark for remark in piece.remarks if not remark.startswith("the limit of")]
            piece.remarks.append(f"stopped after {piece.music_seconds:.1f} s")
        end = piece.prompt_seconds + piece.music_seconds
        caption = f"{piece.prompt_seconds:.0f} s of prompt, {piece.music_seconds:.1f} new seconds, {piece.notes} notes."
        roll = Roll(notes_from_score(piece.score), piece.prompt_seconds, end, *_second_lines(end), caption)
        yield Snapshot(roll, f"{piece.music_seconds:.1f} s", piece.notes, piece)


class _Overheard:
    """The model, but its `generate()` can be listened to (`ids`: all tokens so far) and ended."""

    def __init__(self, model: PreTrainedModel, cancelled: threading.Event):
        self.model, self.cancelled = model, cancelled
        self.ids: torch.Tensor | None = None

    def __getattr__(self, name: str):
        return getattr(self.model, name)

    def generate(self, *args, stopping_criteria=(), **options):
        criteria = StoppingCriteriaList([*(stopping_criteria or ()), _Listener(self)])
        return self.model.generate(*args, stopping_criteria=criteria, **options)


class _Listener(StoppingCriteria):
    def __init__(self, overheard: _Overheard):
        self.overheard = overheard

    def __call__(self, input_ids: torch.LongTensor, scores, **kwargs) -> torch.BoolTensor:
        self.overheard.ids = input_ids[0]
        return torch.full((len(input_ids),), self.overheard.cancelled.is_set(), device=input_ids.device)


def _until(score: Score, end_s: float) -> np.ndarray:
    """The notes that begin before a time, cut off there."""
    notes = notes_from_score(score)
    notes = notes[notes["onset_s"] < end_s - 1e-6]
    notes["duration_s"] = np.minimum(notes["duration_s"], end_s - notes["onset_s"])
    return notes


def _row(note: StreamedNote) -> tuple:
    return (note.onset_seconds, note.duration_seconds, note.pitch, max(note.velocity, 1), note.program, 0)


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
