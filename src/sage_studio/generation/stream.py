"""Notes as they are written: streamers for `generate()`, streams of whole compositions, and a latency report.

from sage_studio.checkpoints import load
from sage_studio.generation.bars import plan_continuation
model, tokenizer = load()
with plan_continuation(model, tokenizer, "prompt.mid", bars=16, seed=0).stream() as stream:
    for note in stream:
        print(note.onset_s, note.pitch)
stream.piece.score.dump_midi("continuation.mid")

With plain `generate()`, in a thread that the streamer starts:

streamer = NoteStreamer(tokenizer)
ids = streamer.start(model.generate, prompt_ids, max_new_tokens=500)
for note in streamer:
    print(note)
print(ids.result())
"""

import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
import torch
from symusic import TimeSignature
from transformers import PreTrainedTokenizer, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from .sampling import Cancelled

# Parameters of a model that decodes faster on one thread, where another thread has used OpenMP before.
SMALL_MODEL = 30_000_000
# A piece begins under its first meter, even where bars come before it, unless one of these comes first.
NOTE_TOKENS = ("Pitch", "PitchDrum", "Velocity", "Duration")
FIRST_METER = "4/4"  # of music that states none, as MidiTok has it


@dataclass(frozen=True, slots=True)
class StreamedNote:
    """A note that no later token can change.

    Attributes:
        program: General MIDI program, drums -1.
        pitch, velocity: 0-127.
        bar: number of its bar in the piece, from 1; None where music is not counted in bars.
        onset, duration: quarter notes, onsets from the start of the piece, prompt included; None as `bar`.
        onset_s, duration_s: the same in seconds, by the tempos up to now. Positions only go forward, so a later tempo
            change moves no onset; it can move the end of a note that still sounds.
        elapsed_s: when it came, in seconds of wall time from the beginning of the generation.
    """

    program: int
    pitch: int
    velocity: int
    bar: int | None
    onset: float | None
    duration: float | None
    onset_s: float
    duration_s: float
    elapsed_s: float


class Streamer(BaseStreamer):
    """Hands out notes while `generate()` writes them; a subclass makes them of a family's tokens.

    `start` runs `generate()` in a thread; iterating gives a note as soon as no later token can change it, until the
    generation ends, and raises what the generation raised. Leaving the loop early cancels the generation. Notes that
    begin in the prompt are not handed out. For one sequence and one generation; work per token does not grow with the
    length.

    Args:
        decode_threads: PyTorch's threads for what follows the prompt, in the thread that `start` starts (default: as
            they are). There OpenMP must wake its helpers for every operation, and a small model is faster with 1.

    Attributes:
        ids: token ids so far.
        stopping_criteria: for `generate(streamer=streamer, stopping_criteria=streamer.stopping_criteria)` in a thread
            of your own, which must call `fail` if `generate()` raises.
    """

    def __init__(self, decode_threads: int | None = None):
        self.ids: list[int] = []
        self.stopping_criteria = StoppingCriteriaList([Cancelled([lambda: self.cancelled])])
        self._queue: queue.SimpleQueue = queue.SimpleQueue()
        self._began: float | None = None
        self._prompt_seen = self._ended = self._drained = self._cancelled = False
        self._decode_threads, self._own_thread = decode_threads, None

    def take_prompt(self, ids: list[int]) -> None:
        """Note where the new music begins."""
        raise NotImplementedError

    def take(self, token: int) -> None:
        """Go on by a new token; `hand_out` what became whole."""
        raise NotImplementedError

    def take_end(self) -> None:
        """`hand_out` what only the end makes whole."""

    def hand_out(self, **note) -> None:
        """Give a note to the listener; `note` are the fields of `StreamedNote` but for `elapsed_s`."""
        self._queue.put(StreamedNote(**note, elapsed_s=time.perf_counter() - self._began))

    # ---- the generating side

    def start(self, generate: Callable, *args, **options) -> Future:
        """Run `generate(*args, **options)` in a thread, with this streamer and its stopping criteria as options.

        Returns:
            what `generate` will return or raise; iterating the streamer raises it too.
        """
        options["stopping_criteria"] = [*(options.get("stopping_criteria") or []), *self.stopping_criteria]
        return self.run(lambda: generate(*args, streamer=self, **options))

    def run(self, work: Callable, began: float | None = None) -> Future:
        """Run `work` in a thread; its end is the stream's. `began`: `time.perf_counter()` to count wall time from."""
        self._began = time.perf_counter() if began is None else began
        future: Future = Future()

        def run() -> None:
            self._own_thread, threads = threading.get_ident(), torch.get_num_threads()
            try:
                result = work()
            except BaseException as error:  # whatever it is, nobody but the iterating thread can be told
                future.set_exception(error)
                self.fail(error)
            else:
                future.set_result(result)
                self.end()
            finally:
                if self._decode_threads is not None:
                    torch.set_num_threads(threads)

        # Not a daemon: one that computes while the interpreter goes down can crash it. The main thread's end cancels.
        threading.Thread(target=run, name="note-stream", daemon=False).start()
        return future

    def put(self, value: torch.Tensor) -> None:
        """Take token ids: the prompt `(1, T)` first, then new ones, any number at a time.

        Raises:
            ValueError: several sequences, a second generation, or an id outside the vocabulary.
        """
        if value.ndim > 1 and len(value) > 1:
            raise ValueError(f"a streamer follows one sequence, not {len(value)}: generate with batch size 1.")
        if self._ended:
            raise ValueError("this streamer's generation has ended: make a new one for the next.")
        ids = value.flatten().tolist()
        self.ids += ids
        if self._prompt_seen:
            if self._decode_threads is not None and threading.get_ident() == self._own_thread:
                torch.set_num_threads(self._decode_threads)
            for token in ids:
                self.take(token)
            return
        self._prompt_seen = True
        if self._began is None:
            self._began = time.perf_counter()
        self.take_prompt(ids)

    def end(self) -> None:
        """Say that the generation has ended; `generate()` does."""
        if self._prompt_seen and not self._ended:
            self.take_end()
        self._ended = True
        self._queue.put(None)

    def fail(self, error: BaseException) -> None:
        """Say that the generation has ended by an error; the iterating thread gets it."""
        self._ended = True
        self._queue.put(error)

    # ---- the listening side

    def cancel(self) -> None:
        """End the generation within one token. Notes that are there already are still handed out."""
        self._cancelled = True

    @property
    def cancelled(self) -> bool:
        """Whether the generation is to end early."""
        return self._cancelled or not threading.main_thread().is_alive()

    def __iter__(self) -> Iterator[StreamedNote]:
        try:
            while not self._drained:
                item = self._queue.get()
                if isinstance(item, StreamedNote):
                    yield item
                    continue
                self._drained = True
                if item is not None:
                    raise item
        finally:
            if not self._ended:
                self.cancel()


class NoteStreamer(Streamer):
    """`Streamer` of SAGE-Music: the notes that `tokenizer.decode_midi` finds in the new tokens, each with its Duration.

    Bars, position, tempo and program at the prompt's end are where the new music begins. Tokens become notes as
    MidiTok's REMI has it, one base token at a time.

    Args:
        tokenizer: the model's.
        bars: hand out only notes of the first so many bars, prompt included, as `decode_midi(bars=...)` does.
        tempos: (quarter note, quarter notes per minute) pairs in order, the prompt's exact tempos in place of those
            that its tokens state.
        decode_threads: as for `Streamer`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizer,
        bars: int | None = None,
        tempos: Sequence[tuple[float, float]] | None = None,
        decode_threads: int | None = None,
    ):
        if bars is not None and bars < 0:
            raise ValueError(f"bars {bars} must not be negative.")
        super().__init__(decode_threads)
        self._tokenizer, self._miditok = tokenizer, tokenizer.miditok
        self._parsed: dict[int, list[tuple[str, str]]] = {}
        self._bars, self._prompt_tempos = bars, tempos

        self._held: list[tuple[str, str]] | None = []  # what came before the first meter is known
        self._meter = ""
        self._bar, self._bar_lines = -1, 0  # they differ where a Position comes before the first Bar
        self._tick = self._bar_tick = 0
        self._program = 0
        self._pitch: int | None = None
        self._velocity: int | None = None
        # The latest tempo, where it began, and seconds per tick: 120 quarter notes a minute before the first.
        self._tempo_tick, self._tempo_s, self._tick_s = 0, 0.0, 0.5 / self._miditok.time_division

    def take_prompt(self, ids: list[int]) -> None:
        for token in self._tokenizer.base_tokens(ids):
            kind, text = token.split("_")
            if not (kind == "Tempo" and self._prompt_tempos is not None):
                self._take(kind, text, new=False)
        for quarter, qpm in self._prompt_tempos or ():
            self._set_tempo(round(quarter * self._miditok.time_division), qpm)

    def take(self, token: int) -> None:
        for kind, text in self._base_tokens(token):
            self._take(kind, text)

    def _base_tokens(self, index: int) -> list[tuple[str, str]]:
        if index not in self._parsed:
            self._parsed[index] = [tuple(token.split("_")) for token in self._tokenizer.base_tokens([index])]
        return self._parsed[index]

    def _take(self, kind: str, text: str, new: bool = True) -> None:
        if self._held is not None:
            if kind != "TimeSig" and kind not in NOTE_TOKENS:
                self._held.append((kind, text))
                return
            held, self._held = self._held, None
            self._set_meter(text if kind == "TimeSig" else FIRST_METER)
            for earlier in held:
                self._take(*earlier, new=new)
        if self._bars is not None and self._bar_lines > self._bars:
            return
        pitch, velocity, self._pitch, self._velocity = self._pitch, self._velocity, None, None
        if kind == "Duration":
            if velocity is not None and new:
                self._hand_out(pitch, velocity, self._duration_ticks[text])
        elif kind == "Velocity":
            if pitch is not None and velocity is None:  # right after its pitch
                self._pitch, self._velocity = pitch, int(text)
        elif kind in ("Pitch", "PitchDrum"):
            low, high = self._miditok.config.pitch_range
            self._pitch = int(text) if low <= int(text) <= high else None
        elif kind == "Program":
            self._program = int(text)
        elif kind == "Position":
            self._bar = max(self._bar, 0)
            self._tick = self._bar_tick + int(text) * self._position_ticks
        elif kind == "Bar":
            self._bar, self._bar_lines = self._bar + 1, self._bar_lines + 1
            if self._bar > 0:
                self._tick = self._bar_tick + self._bar_ticks
            self._bar_tick = self._tick
        elif kind == "TimeSig":
            self._set_meter(text)
        elif kind == "Tempo":
            self._set_tempo(self._tick, float(text))

    def _set_meter(self, text: str) -> None:
        if text == self._meter:
            return
        meter = TimeSignature(0, *self._miditok._parse_token_time_signature(text))
        beat_ticks = self._miditok._tpb_per_ts[meter.denominator]
        self._meter = text
        self._bar_ticks = int(self._miditok.time_division * 4 / meter.denominator * meter.numerator)
        self._position_ticks = self._miditok._compute_ticks_per_pos(beat_ticks)
        self._duration_ticks = self._miditok._tpb_tokens_to_ticks[beat_ticks]

    def _set_tempo(self, tick: int, qpm: float) -> None:
        self._tempo_s += (tick - self._tempo_tick) * self._tick_s
        self._tempo_tick, self._tick_s = tick, 60 / qpm / self._miditok.time_division

    def _hand_out(self, pitch: int, velocity: int, ticks: int) -> None:
        quarter = self._miditok.time_division
        self.hand_out(
            program=self._program,
            pitch=pitch,
            velocity=velocity,
            bar=max(self._bar, 0) + 1,
            onset=self._tick / quarter,
            duration=ticks / quarter,
            onset_s=self._tempo_s + (self._tick - self._tempo_tick) * self._tick_s,
            duration_s=ticks * self._tick_s,
        )


class NoteStream:
    """Music being written: iterate it for its notes as they come, then take `piece`.

    Leaving the loop or the `with` block early, or dropping the stream, cancels the generation.
    """

    def __init__(self, plan, began: float | None = None):
        self._streamer = streamer = plan.streamer()
        # The thread must not hold this object: where it is dropped, the music ends.
        self._piece = streamer.run(lambda: plan.write(streamer), began)
        weakref.finalize(self, streamer.cancel)

    def __iter__(self) -> Iterator[StreamedNote]:
        yield from self._streamer

    def cancel(self) -> None:
        """End the generation within one token. Notes that are there already are still handed out."""
        self._streamer.cancel()

    @property
    def ids(self) -> list[int]:
        """Token ids so far, prompt included: `tokenizer.decode_midi` makes music of them, with what still sounds."""
        return list(self._streamer.ids)

    @property
    def piece(self):
        """The finished piece, after waiting for its end; of a cancelled stream what there is.

        Raises:
            Exception: what ended the generation.
        """
        return self._piece.result()

    def __enter__(self) -> "NoteStream":
        return self

    def __exit__(self, *error) -> None:
        if not self._piece.done():
            self.cancel()
            self._piece.exception()  # wait: no thread computes on after the block


def decode_threads(model) -> int | None:
    """PyTorch's threads with which a model decodes fastest; None: as they are."""
    return 1 if model.device.type == "cpu" and model.num_parameters() < SMALL_MODEL else None


def latency_report(onset_s: Sequence[float], elapsed_s: Sequence[float], speeds: Sequence[float] = (1.0, 2.0)) -> dict:
    """How a stream would have sounded, played as it came.

    Playback begins when the first note arrives; note i is due `(onset_i - onset_0) / speed` later, and missed if it
    arrives after that. Every note counts, those of a chord too: they arrive one by one and are due together.

    Args:
        onset_s, elapsed_s: `StreamedNote`'s fields of all notes, in the order they came.
        speeds: of playback.

    Returns:
        `notes`; `first_note_ms`; `note_to_note_ms` (time between arrivals): `p50`, `p95`, `p99`, `max`; and
        `deadlines`, for each speed `speed`, `missed`, `share` (of all notes) and `head_start_ms`: how late the latest
        note was, and how much later playback should have begun for none to be missed. Without notes, or for gaps
        without a second note, figures are `None`.

    Raises:
        ValueError: sequences of different lengths, or a speed that is not positive.
    """
    onsets, walls = np.asarray(onset_s, dtype=float), np.asarray(elapsed_s, dtype=float)
    if onsets.shape != walls.shape or onsets.ndim != 1:
        raise ValueError(f"onset_s {onsets.shape} and elapsed_s {walls.shape} must be two equally long lists.")
    if not all(speed > 0 for speed in speeds):
        raise ValueError(f"speeds {list(speeds)} must be positive.")

    def ms(seconds: float) -> float:
        return round(1e3 * float(seconds), 3)

    gaps = np.diff(walls)
    quantiles = {"p50": 50, "p95": 95, "p99": 99, "max": 100}
    deadlines = []
    for speed in speeds:
        late = (walls - walls[:1]) - (onsets - onsets[:1]) / speed
        missed = int((late > 0).sum())
        deadlines.append(
            {
                "speed": speed,
                "missed": missed,
                "share": round(missed / len(late), 4) if len(late) else None,
                "head_start_ms": ms(late.max()) if len(late) else None,  # never negative: the first is never late
            }
        )
    return {
        "notes": len(walls),
        "first_note_ms": ms(walls[0]) if len(walls) else None,
        "note_to_note_ms": {name: ms(np.percentile(gaps, q)) if len(gaps) else None for name, q in quantiles.items()},
        "deadlines": deadlines,
    }
