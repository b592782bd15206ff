"""Generated music and plans of it: what both families share.

A plan is music that is about to be written: everything is read and checked, and no token generated yet. It is made by
`bars.plan_continuation`, `bars.plan_piece`, `seconds.plan_continuation` or `seconds.plan_performance`:

plan = plan_continuation(model, tokenizer, "prompt.mid", seed=0)
piece = plan.write()                    # or, note by note:
with plan.stream() as stream:
    for note in stream:
        print(note.onset_s, note.pitch)
piece = stream.piece
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from symusic import Score
from transformers import PreTrainedModel, PreTrainedTokenizer, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from .sampling import Cancelled, Deadline, sampling_options, seeded, turn
from .stream import NoteStream, Streamer


@dataclass(kw_only=True)
class Piece:
    """Generated music, of either family.

    Attributes:
        score: prompt (where there was one) and new music together.
        ids: its token ids.
        prompt_end_s: where the new music begins, in seconds; 0 without a prompt.
        music_s: playing time of the new music, in seconds.
        elapsed_s: wall time of the generation, in seconds; of a batch, that of the whole batch.
        bars: new bars; None where music is not counted in bars.
        tokens, notes: new ones.
        remarks: what was changed or left out on the way, in sentences for the user.
    """

    score: Score
    ids: list[int]
    prompt_end_s: float
    music_s: float
    elapsed_s: float
    bars: int | None
    tokens: int
    notes: int
    remarks: list[str] = field(default_factory=list)

    @property
    def notes_per_second(self) -> float:
        """New notes for each second of wall time."""
        return self.notes / self.elapsed_s if self.elapsed_s else 0.0


@dataclass(kw_only=True)
class Plan:
    """Music to be written: its beginning, its length and the rules it keeps. `write()` writes it.

    Attributes:
        ids: token ids to go on after.
        remarks: what was changed or left out so far.
        temperature, top_p: sampling, the checkpoint's own by default; `temperature=0` takes the likeliest token.
        seed: same seed, same music.
        progress: called on the way as `progress(bars or seconds done, notes)`.
        time_limit: seconds of wall time after which the generation ends, within one token; a remark says so.

    Raises:
        ValueError: an option outside its range, naming it.
    """

    model: PreTrainedModel = field(repr=False)
    tokenizer: PreTrainedTokenizer = field(repr=False)
    ids: list[int]
    remarks: list[str] = field(default_factory=list)
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    progress: Callable[[float, int], None] | None = None
    time_limit: float | None = None
    sampling: dict = field(init=False)
    cancelled: bool = field(init=False, default=False)

    def __post_init__(self):
        if self.time_limit is not None:
            Deadline(self.time_limit)  # checked before anything waits for it
        self.sampling = sampling_options(self.temperature, self.top_p)

    def write(self, streamer: Streamer | None = None) -> Piece:
        """Generate the music. Generations of one process go one after another: this waits for its turn.

        Args:
            streamer: gets `ids`, then every new token (not its end: that is the caller's to say). Cancelled, it ends
                the music where it is.

        Raises:
            ValueError: the music cannot go on, such as after a bar that is longer than the model's context.
        """
        if streamer is not None:
            streamer.put(torch.tensor([self.ids]))
        remarks = list(self.remarks)
        with turn(lambda: self.is_cancelled(streamer)) as mine:
            begin = time.perf_counter()
            if mine:
                with seeded(self.seed):
                    ids, bars = self._generate(streamer, remarks)
            else:
                ids, bars = list(self.ids), 0
                remarks.append("cancelled before it began")
            return self.piece(ids, bars, time.perf_counter() - begin, remarks)

    def stream(self, began: float | None = None) -> NoteStream:
        """Write the music in a thread, its notes handed out as they come.

        Same plan, same seed, same piece. Random numbers that other threads draw from torch's CPU generator meanwhile
        change the music, and are drawn again after it.

        Args:
            began: `time.perf_counter()` from which the notes' `elapsed_s` counts; now by default.
        """
        return NoteStream(self, began)

    def cancel(self) -> None:
        """End the music where it is, within one token, from any thread; what is there is still handed out."""
        self.cancelled = True

    def streamer(self) -> Streamer:
        """What makes notes of this plan's tokens."""
        raise NotImplementedError

    def piece(self, ids: list[int], bars: int | None, elapsed_s: float, remarks: list[str]) -> Piece:
        """The music of all `ids`: `bars` new bars of it, where it is counted in bars; written in `elapsed_s`."""
        raise NotImplementedError

    def _generate(self, streamer: Streamer | None, remarks: list[str]) -> tuple[list[int], int | None]:
        """All ids, and the new bars in them that are kept."""
        raise NotImplementedError

    def is_cancelled(self, streamer: Streamer | None = None) -> bool:
        """Whether the music is to end where it is."""
        return self.cancelled or (streamer is not None and streamer.cancelled)

    def stops(self, streamer: Streamer | None, deadline: Deadline | None) -> list[StoppingCriteria]:
        """What ends the generation early."""
        cancelled = Cancelled([lambda: self.is_cancelled(streamer)])
        return [cancelled] if deadline is None else [cancelled, deadline]


class Progress(BaseStreamer):
    """Calls `advance(token)` for each new token as it comes, and hands it on; a token is final when it arrives."""

    def __init__(self, advance: Callable[[int], None], streamer: Streamer | None):
        self.advance, self.streamer, self.prompt_seen = advance, streamer, False

    def put(self, value: torch.Tensor) -> None:
        if not self.prompt_seen:
            self.prompt_seen = True
            return
        if self.streamer is not None:
            self.streamer.put(value)
        for token in value.flatten().tolist():
            self.advance(token)

    def end(self) -> None:
        pass


def check_together(plans: Sequence[Plan], kind: type[Plan], *names: str) -> None:
    """Plans that are written together are of one kind, and agree in what `generate()` takes once.

    Raises:
        ValueError: they differ in the model or in one of `names`, or are plans of the other family.
    """
    if not all(isinstance(plan, kind) for plan in plans):
        raise ValueError(f"pieces that are written together here are planned by a {kind.__name__}.")
    for name in ("model", "temperature", "top_p", "time_limit", *names):
        if any(getattr(plan, name) != getattr(plans[0], name) for plan in plans):
            raise ValueError(f"pieces that are written together share one {name}.")


def apart_from_cancelled(plans: Sequence[Plan], write: Callable[[Sequence[Plan]], list[Piece]]) -> list[Piece]:
    """The pieces of plans, those that were cancelled already apart from the batch that `write` writes."""
    cancelled = [plan.cancelled for plan in plans]  # asked once: another may be cancelled meanwhile
    batch = iter(write([plan for plan, is_cancelled in zip(plans, cancelled, strict=True) if not is_cancelled]))
    return [plan.write() if is_cancelled else next(batch) for plan, is_cancelled in zip(plans, cancelled, strict=True)]


def unheard(score: Score, pedal_is_kept: bool) -> list[str]:
    """What a score holds that tokens do not; the sustain pedal is kept where it is folded into durations."""
    pedal = 64
    controls = [track.controls.numpy()["number"] for track in score.tracks]
    lost = {
        "sustain pedal": 0 if pedal_is_kept else sum(len(track.pedals) for track in score.tracks),
        "controller": sum(int((numbers != pedal).sum()) if pedal_is_kept else len(numbers) for numbers in controls),
        "pitch bend": sum(len(track.pitch_bends) for track in score.tracks),
    }
    return [
        f"{count} {name} events of the prompt have no token and are left out" for name, count in lost.items() if count
    ]
