"""Music from a checkpoint: unprompted pieces and continuations, counted in bars, of any length.

from sage_studio.checkpoints import load
from sage_studio.generation.bars import continue_score
model, tokenizer = load()
piece = continue_score(model, tokenizer, "prompt.mid", prompt_bars=4, bars=16, seed=0)
piece.score.dump_midi("continuation.mid")
"""

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from symusic import Score, Tempo
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from sage_music.generation_sage_music import (
    BarCountCriteria,
    MinBarsLogitsProcessor,
    NoDoubledNotesLogitsProcessor,
)
from sage_music.modeling_sage_music import SageMusicForCausalLM
from sage_music.tokenization_sage_music import SageMusicTokenizer
from sage_studio.defaults import BARS, PROMPT_BARS
from sage_studio.music.midi import bar_ticks, bar_times, read_score

from .sampling import TURN, Deadline, Generated, check_generate_options, heard_warnings, sampling_options, seeded


@dataclass(kw_only=True)
class Piece(Generated):
    """A generated piece, counted in bars.

    Attributes:
        prompt_bars, bars: bars of the prompt, and bars written after it.
    """

    prompt_bars: int
    bars: int

    @property
    def prompt_end_s(self) -> float:
        """Seconds at which the new music begins."""
        return float(bar_times(self.score, self.prompt_bars + 1)[self.prompt_bars])

    @property
    def music_seconds(self) -> float:
        """Playing time of the new music, in whole bars."""
        total = self.prompt_bars + self.bars
        return float(bar_times(self.score, total + 1)[total]) - self.prompt_end_s


def continue_score(
    model: SageMusicForCausalLM,
    tokenizer: SageMusicTokenizer,
    prompt: "str | os.PathLike | bytes | Score",
    prompt_bars: int = PROMPT_BARS,
    bars: int = BARS,
    free: bool = False,
    programs: list[int] | None = None,
    **options,
) -> Piece:
    """Continue the first `prompt_bars` bars of a MIDI file by `bars` bars.

    Args:
        prompt: path, bytes or score.
        free: let the model bring in instruments, meters and tempos that the prompt does not have.
        programs: the only General MIDI programs to use (-1: drums), instead of the prompt's.
        options: `temperature`, `top_p`, `seed`, `progress`, `time_limit`, `generate_options`, as for `generate_piece`.

    Raises:
        InvalidMidiError: the prompt cannot be read.
        ValueError: an option outside its range, naming it; or one bar alone is longer than the model's context.
    """
    return plan_continuation(model, tokenizer, prompt, prompt_bars, bars, free, programs, **options).write()


def plan_continuation(
    model: SageMusicForCausalLM,
    tokenizer: SageMusicTokenizer,
    prompt: "str | os.PathLike | bytes | Score",
    prompt_bars: int = PROMPT_BARS,
    bars: int = BARS,
    free: bool = False,
    programs: list[int] | None = None,
    **options,
) -> "Plan":
    """What `continue_score` is about to write: everything is read and checked, and no token generated yet.

    Arguments and errors are those of `continue_score`.
    """
    if prompt_bars < 1:
        raise ValueError(f"prompt_bars {prompt_bars} must be positive.")
    with heard_warnings() as heard:
        score = prompt if not isinstance(prompt, str | bytes | os.PathLike) else read_score(prompt)
        ids = tokenizer.midi_to_ids(score, bars=prompt_bars)
    remarks = _unheard(score) + heard
    counter = BarCountCriteria(model.config, 0)
    present = int(counter.count(torch.tensor([ids])))
    if present < prompt_bars:
        remarks.append(f"the prompt has {present} bars, not {prompt_bars}: all of it is used")
    tokens = set(tokenizer.base_tokens(ids))
    allowed = {}
    if not free:
        found = {kind: {t for t in tokens if t.startswith(kind)} for kind in ("Program", "TimeSig")}
        allowed = {kind: texts for kind, texts in found.items() if texts} | {"Tempo": set()}
    if programs is not None:
        allowed["Program"] = program_tokens(programs)
    # The prompt's last bar is complete: what follows is a bar line.
    ids.append(tokenizer.convert_tokens_to_ids("Bar_None"))
    tempos = _prompt_tempos(tokenizer.decode_midi(ids), score, present)
    return Plan(model, tokenizer, ids, present, bars, remarks, allowed, tempos, **options)


def generate_piece(
    model: SageMusicForCausalLM,
    tokenizer: SageMusicTokenizer,
    bars: int = BARS,
    tempo: float | None = None,
    time_signature: str | None = None,
    programs: list[int] | None = None,
    **options,
) -> Piece:
    """A piece from nothing.

    Args:
        bars: length in bars.
        tempo: quarter notes per minute, held throughout; the model's choice by default.
        time_signature: such as "4/4", held throughout; the model's choice by default (4/4 to begin with a tempo).
        programs: the only General MIDI programs to use (-1: drums).
        temperature, top_p: sampling, the checkpoint's own by default; `temperature=0` takes the likeliest token.
        seed: same seed, same piece.
        progress: called as `progress(bars_done, notes)` after every bar.
        time_limit: seconds of wall time after which the generation ends, within one token; the piece then ends with the
            last whole bar, and a remark says so.
        generate_options: more options of `generate()`, such as `{"use_mtp": True}` or a `compile_config`, but none that
            the piece has already: its length, its rules, beams.

    Raises:
        ValueError: an option outside its range, naming it.
    """
    return plan_piece(model, tokenizer, bars, tempo, time_signature, programs, **options).write()


def plan_piece(
    model: SageMusicForCausalLM,
    tokenizer: SageMusicTokenizer,
    bars: int = BARS,
    tempo: float | None = None,
    time_signature: str | None = None,
    programs: list[int] | None = None,
    **options,
) -> "Plan":
    """What `generate_piece` is about to write, checked; arguments and errors are those of `generate_piece`."""
    ids = [tokenizer.bos_token_id]
    allowed = {} if programs is None else {"Program": program_tokens(programs)}
    meter = f"TimeSig_{time_signature or '4/4'}"
    if meter not in tokenizer.get_vocab():
        raise ValueError(f"time_signature {time_signature!r} has no token; 4/4, 3/4, 6/8 are examples that have.")
    if time_signature is not None:
        allowed["TimeSig"] = {meter}
    if tempo is not None:
        low, high = tokenizer.miditok.config.tempo_range
        if not low <= tempo <= high:
            raise ValueError(f"tempo {tempo:g} is outside {low}-{high} quarter notes per minute.")
        nearest = min(tokenizer.miditok.tempos, key=lambda known: abs(known - tempo))
        ids += tokenizer.convert_tokens_to_ids(["Bar_None", meter, "Position_0", f"Tempo_{nearest}"])
        allowed["Tempo"] = set()
    tempos = None if tempo is None else [Tempo(0, tempo)]
    return Plan(model, tokenizer, ids, 0, bars, [], allowed, tempos, **options)


@dataclass
class Plan:
    """Music to be written: its beginning, its length and the rules it keeps. `write()` writes it.

    Attributes:
        ids: token ids to go on after.
        prompt_bars, bars: complete bars in `ids`, and bars to write after them.
        remarks: what was changed or left out so far.
        allowed: per kind of token (`"Program"`), the only ones that may be written.
        tempos: exact tempos up to the end of `ids`, in ticks of the decoded score, in place of those that tokens can
            state; `None` keeps the tokens'.
        temperature, top_p, seed, progress, time_limit, generate_options: as for `generate_piece`.

    Raises:
        ValueError: an option outside its range, naming it; or one bar alone is longer than the model's context.
    """

    model: SageMusicForCausalLM
    tokenizer: SageMusicTokenizer
    ids: list[int]
    prompt_bars: int
    bars: int
    remarks: list[str]
    allowed: dict[str, set[str]]
    tempos: list[Tempo] | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    progress: Callable[[int, int], None] | None = None
    generate_options: dict | None = None
    time_limit: float | None = None
    forbidden: list[int] = field(init=False)
    sampling: dict = field(init=False)

    def __post_init__(self):
        if self.bars < 1:
            raise ValueError(f"bars {self.bars} must be positive.")
        if self.time_limit is not None:
            Deadline(self.time_limit)  # checked before anything waits for it
        check_generate_options(self.generate_options)
        self.sampling = sampling_options(self.temperature, self.top_p)
        self.forbidden = forbidden_ids(self.tokenizer, self.allowed)
        _window(self.model, self.tokenizer, self.ids)  # raises what is wrong with the prompt's last bar

    def write(self, streamer=None) -> Piece:
        """Generate the music.

        Args:
            streamer: a `generation.stream.NoteStreamer`: gets `ids`, then every new token (not its end: that is the
                caller's to say). Cancelled, it ends the piece where it is.

        Raises:
            ValueError: one bar alone is longer than the model's context.
        """
        if streamer is not None:
            streamer.put(torch.tensor([self.ids]))
        remarks, ids, total = list(self.remarks), self.ids, self.prompt_bars
        with _turn(streamer) as mine:
            begin = time.perf_counter()
            if mine:
                ids, total = self._generate(streamer, remarks)
        if _is_cancelled(streamer) and total < self.prompt_bars + self.bars:
            remarks.append(f"cancelled in bar {total}" if mine else "cancelled before it began")
        return self.piece(ids, total, time.perf_counter() - begin, remarks)

    def piece(self, ids: list[int], total: int, seconds: float, remarks: list[str]) -> Piece:
        """The first `total` bars of `ids`, written in `seconds`."""
        score = self.tokenizer.decode_midi(ids, bars=total)
        if self.tempos is not None:
            stated = sum(token.startswith("Tempo") for token in self.tokenizer.base_tokens(self.ids))
            score.tempos = type(score.tempos)(self.tempos + list(score.tempos)[stated:])
        return Piece(
            score=score,
            ids=ids,
            prompt_bars=self.prompt_bars,
            bars=total - self.prompt_bars,
            # Not counted in tokens: the last ones may go beyond the bars.
            notes=score.note_num() - self.tokenizer.decode_midi(self.ids).note_num(),
            seconds=seconds,
            remarks=remarks,
        )

    def _generate(self, streamer, remarks: list[str]) -> tuple[list[int], int]:
        """All ids, and the number of bars to keep of them."""
        model, row = self.model, Row(self, remarks)
        notes_of = np.array(model.config.grammar["notes"])
        stops = [] if streamer is None else list(streamer.stopping_criteria)
        deadline = None if self.time_limit is None else Deadline(self.time_limit)
        with seeded(self.seed):
            while row.goes_on:
                window = row.window()
                notes = int(notes_of[row.ids[len(self.ids) :]].sum())
                goal = row.goal(window)
                output = model.generate(
                    torch.tensor([window.ids], device=model.device),
                    attention_mask=torch.ones(1, len(window.ids), dtype=torch.long, device=model.device),
                    max_new_tokens=model.config.max_position_embeddings - len(window.ids),
                    stopping_criteria=StoppingCriteriaList(
                        [BarCountCriteria(model.config, goal), *stops, *([] if deadline is None else [deadline])]
                    ),
                    logits_processor=LogitsProcessorList(
                        [
                            MinBarsLogitsProcessor(model.config, goal),
                            NoDoubledNotesLogitsProcessor(model.config),
                            LeaveProgram(model.config, [self.forbidden]),
                        ]
                    ),
                    # Given here, they replace the checkpoint's own.
                    suppress_tokens=[*self.forbidden, *(model.generation_config.suppress_tokens or ())] or None,
                    max_time=math.inf,  # what a checkpoint says would make the music depend on the machine
                    streamer=_Progress(model.config, self.progress, row.lines - self.prompt_bars, notes, streamer),
                    **self.sampling | (self.generate_options or {}),
                )
                row.take(output[0, len(window.ids) :].tolist(), deadline)
                if _is_cancelled(streamer) or (row.is_late and streamer is not None):
                    return row.ids, min(row.lines, row.total)  # notes of the bar that has begun are out already
        return row.ids, row.kept


class Row:
    """A plan on its way: what is written of it so far.

    Attributes:
        ids: token ids so far.
        lines, total: bar lines in them, and bars that the piece is to have.
        kept: bars that it will have.
        goes_on: whether there is more to write.
        is_late: whether a time limit ended it.
        remarks: what happened on the way is added to them.
    """

    def __init__(self, plan: Plan, remarks: list[str]):
        self.plan, self.ids, self.remarks = plan, plan.ids, remarks
        self.bars_of = np.array(plan.model.config.grammar["bars"])
        self.lines, self.total = int(self.bars_of[self.ids].sum()), plan.prompt_bars + plan.bars
        self.kept, self.goes_on, self.is_late = self.total, True, False

    def window(self) -> "_Window":
        """What the model hears next."""
        window, cut = _window(self.plan.model, self.plan.tokenizer, self.ids)
        if cut and len(self.ids) == len(self.plan.ids):
            self.remarks.append(f"the prompt is longer than the context: the model hears its last {window.count} bars")
        return window

    def goal(self, window: "_Window") -> int:
        """The bars that the window will hold at the piece's end."""
        return self.total - self.lines + window.count

    def take(self, new: list[int], deadline: Deadline | None = None) -> None:
        """Go on by what the model wrote in one window."""
        before = self.lines
        self.ids, self.lines = self.ids + new, before + int(self.bars_of[new].sum())
        if self.lines > self.total:
            self.goes_on = False
        elif deadline is not None and deadline.has_passed:
            self.goes_on, self.is_late = False, True
            self.kept = max(self.lines - 1, self.plan.prompt_bars)  # the last line begins a bar that has no end
            limit, done = f"the time limit of {self.plan.time_limit:g} s", self.kept - self.plan.prompt_bars
            self.remarks.append(f"{limit} ended the piece after {done} of {self.plan.bars} bars")
        elif self.lines == before:
            self.goes_on, self.kept = False, self.lines
            self.remarks.append(f"stopped at bar {self.lines}: the model wrote {len(new)} tokens without a bar line")
        elif _first_heard(self.plan.model, self.ids) is None:
            self.goes_on, self.kept = False, self.lines
            self.remarks.append(f"stopped at bar {self.lines}: it grew longer than the context")


@contextmanager
def _turn(streamer) -> Iterator[bool]:
    """Wait for all other generations to end; False when the streamer was cancelled before that."""
    while not (mine := TURN.acquire(timeout=0.1)) and not _is_cancelled(streamer):
        pass
    try:
        yield mine and not _is_cancelled(streamer)
    finally:
        if mine:
            TURN.release()


def _is_cancelled(streamer) -> bool:
    return streamer is not None and streamer.cancelled


@dataclass
class _Window:
    ids: list[int]
    count: int  # bar lines in it


def _window(model, tokenizer, ids: list[int]) -> tuple[_Window, bool]:
    """What the model hears: everything, or BOS and the last bars that leave half of the context free.

    Raises:
        ValueError: the last bar alone is longer than the context.
    """
    first = _first_heard(model, ids)
    if first is None:
        context = model.config.max_position_embeddings
        raise ValueError(f"a single bar holds more than the context of {context} tokens: choose a thinner prompt.")
    heard = tokenizer.crop_ids(np.array(ids), first).tolist() if first else ids
    return _Window(heard, int(np.array(model.config.grammar["bars"])[heard].sum())), first > 0


def _first_heard(model, ids: list[int]) -> int | None:
    """Where in `ids` the model's window begins: 0, or at a bar line; None where not even the last bar fits."""
    context = model.config.max_position_embeddings
    if len(ids) <= context - context // 4:
        return 0
    lines = np.flatnonzero(np.array(model.config.grammar["bars"])[ids])
    for most in (context // 2, context - min(128, context // 4)):
        fitting = lines[len(ids) - lines < most]
        # A prompt ends with a bare bar line: with nothing before it the model would hear no music at all.
        if len(fitting) and len(ids) - fitting[0] >= 3:
            return int(fitting[0])
    return None


class _Progress(BaseStreamer):
    """Counts bars and notes as tokens come, and hands them on; a token is final when it arrives."""

    def __init__(self, config, report, bars: int, notes: int, streamer: BaseStreamer | None):
        self.bars_of, self.notes_of = config.grammar["bars"], config.grammar["notes"]
        self.report, self.bars, self.notes, self.prompt_seen = report, bars, notes, False
        self.streamer = streamer

    def put(self, value):
        if not self.prompt_seen:
            self.prompt_seen = True
            return
        if self.streamer is not None:
            self.streamer.put(value)
        for token in value.flatten().tolist():
            self.notes += self.notes_of[token]
            if self.bars_of[token] and self.report is not None:
                self.bars += self.bars_of[token]
                self.report(max(self.bars - 1, 0), self.notes)

    def end(self):
        pass


def _unheard(score: Score) -> list[str]:
    """What a score holds that tokens do not."""
    remarks = []
    lost = {
        "sustain pedal": sum(len(track.pedals) for track in score.tracks),
        "controller": sum(len(track.controls) for track in score.tracks),
        "pitch bend": sum(len(track.pitch_bends) for track in score.tracks),
    }
    for name, count in lost.items():
        if count:
            remarks.append(f"{count} {name} events of the prompt have no token and are left out")
    melodic = [track.program for track in score.tracks if not track.is_drum and len(track.notes)]
    if len(melodic) > len(set(melodic)):
        remarks.append("tracks that share a program are merged into one")
    return remarks


def _prompt_tempos(prompt: Score, source: Score, prompt_bars: int) -> list[Tempo]:
    """The source's tempos up to the end of the prompt, in the prompt's ticks: tokens hold them to a few per cent."""
    end = bar_ticks(prompt, prompt_bars + 1)[prompt_bars]
    scale = prompt.ticks_per_quarter / source.ticks_per_quarter
    exact = [Tempo(round(t.time * scale), t.qpm) for t in source.tempos if t.time * scale < end and t.mspq > 0]
    if not exact or exact[0].time > 0:
        exact.insert(0, Tempo(0, 120))  # what a MIDI file without a tempo means
    return exact


# ---- what a piece may hold: the instruments, meters and tempos that its prompt or its user allows


class LeaveProgram(LogitsProcessor):
    """No note until the sequence has left a program that must not be used (Program tokens on change only).

    Args:
        forbidden: ids that must not be used, for each row.
    """

    def __init__(self, config, forbidden: Sequence[Sequence[int]]):
        changes = np.array(config.grammar["drum_after"]) != -2
        self.programs = set(np.flatnonzero(changes).tolist()) - {config.bos_token_id}
        self.forbidden = [self.programs & set(ids) for ids in forbidden]
        self.notes = torch.tensor(config.grammar["drum_needed"]) >= 0

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        for row, forbidden in enumerate(self.forbidden):
            if not forbidden:
                continue
            current = next((token for token in reversed(input_ids[row].tolist()) if token in self.programs), None)
            if current in forbidden:
                scores = scores.clone()
                scores[row] = scores[row].masked_fill(self.notes.to(scores.device), -torch.inf)
        return scores


def program_tokens(programs: list[int]) -> set[str]:
    """Tokens of General MIDI programs (-1: drums).

    Raises:
        ValueError: one that there is not, or none at all.
    """
    wrong = [program for program in programs if not -1 <= program <= 127]
    if wrong or not programs:
        raise ValueError(f"programs are 0-127, or -1 for drums; got {wrong or 'none'}.")
    return {f"Program_{program}" for program in programs}


def forbidden_ids(tokenizer, allowed: dict[str, set[str]]) -> list[int]:
    """Ids with a base token of one of the kinds in `allowed` that is not among the allowed ones."""

    def wrong(token: str) -> bool:
        kind = token.split("_")[0]
        return kind in allowed and token not in allowed[kind]

    return [i for i in range(tokenizer.vocab_size) if any(map(wrong, tokenizer.base_tokens([i])))]
