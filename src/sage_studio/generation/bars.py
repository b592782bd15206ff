"""SAGE-Music's pieces, counted in bars: from nothing and continuations, of any length.

from sage_studio.checkpoints import load
from sage_studio.generation.bars import continue_score
model, tokenizer = load()
piece = continue_score(model, tokenizer, "prompt.mid", prompt_bars=4, bars=16, seed=0)
piece.score.dump_midi("continuation.mid")
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from symusic import Score, Tempo
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteriaList

from sage_music.generation_sage_music import (
    BarCountCriteria,
    MinBarsLogitsProcessor,
    NoDoubledNotesLogitsProcessor,
    RunningState,
)
from sage_music.modeling_sage_music import SageMusicForCausalLM
from sage_music.tokenization_sage_music import SageMusicTokenizer
from sage_studio.defaults import BARS, PROMPT_BARS
from sage_studio.music.midi import Prompt, bar_ticks, bar_times, heard_warnings, read_prompt

from .result import Piece, Plan, Progress, unheard
from .sampling import Deadline, check_generate_options
from .stream import NoteStreamer, Streamer, decode_threads


def continue_score(model, tokenizer, prompt, *lengths, **options) -> Piece:
    """Continue the beginning of a MIDI file: what `plan_continuation` plans of the same arguments, written."""
    return plan_continuation(model, tokenizer, prompt, *lengths, **options).write()


def generate_piece(model, tokenizer, *lengths, **options) -> Piece:
    """A piece from nothing: what `plan_piece` plans of the same arguments, written."""
    return plan_piece(model, tokenizer, *lengths, **options).write()


def plan_continuation(
    model: SageMusicForCausalLM,
    tokenizer: SageMusicTokenizer,
    prompt: "str | os.PathLike | bytes | Score | Prompt",
    prompt_bars: int = PROMPT_BARS,
    bars: int = BARS,
    free: bool = False,
    programs: list[int] | None = None,
    **options,
) -> "BarsPlan":
    """A continuation of the first `prompt_bars` bars of a MIDI file by `bars` bars, read and checked, not yet written.

    Args:
        prompt: path, bytes or score, or what `read_prompt` made of one.
        free: let the model bring in instruments, meters and tempos that the prompt does not have.
        programs: the only General MIDI programs to use (-1: drums), instead of the prompt's.
        options: `temperature`, `top_p`, `seed`, `progress`, `time_limit`, `generate_options`, as for `plan_piece`.

    Raises:
        InvalidMidiError: the prompt cannot be read.
        ValueError: an option outside its range, naming it; or one bar alone is longer than the model's context.
    """
    if prompt_bars < 1:
        raise ValueError(f"prompt_bars {prompt_bars} must be positive.")
    prompt = read_prompt(prompt)
    with heard_warnings() as heard:
        ids = tokenizer.midi_to_ids(prompt.score, bars=prompt_bars)
    remarks = unheard(prompt.score, pedal_is_kept=False)
    melodic = [track.program for track in prompt.score.tracks if not track.is_drum and len(track.notes)]
    if len(melodic) > len(set(melodic)):
        remarks.append("tracks that share a program are merged into one")
    remarks += sorted({*prompt.remarks, *heard})
    present = int(np.array(model.config.grammar["bars"])[ids].sum())
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
    heard_score = tokenizer.decode_midi(ids)
    return BarsPlan(
        model=model,
        tokenizer=tokenizer,
        ids=ids,
        remarks=remarks,
        prompt_bars=present,
        prompt_notes=heard_score.note_num(),
        bars=bars,
        allowed=allowed,
        tempos=_prompt_tempos(heard_score, prompt.score, present),
        **options,
    )


def plan_piece(
    model: SageMusicForCausalLM,
    tokenizer: SageMusicTokenizer,
    bars: int = BARS,
    tempo: float | None = None,
    time_signature: str | None = None,
    programs: list[int] | None = None,
    **options,
) -> "BarsPlan":
    """A piece from nothing, checked, not yet written.

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
    own = {"prompt_bars": 0, "prompt_notes": 0, "remarks": [], "allowed": allowed, "tempos": tempos}
    return BarsPlan(model=model, tokenizer=tokenizer, ids=ids, bars=bars, **own, **options)


@dataclass(kw_only=True)
class BarsPlan(Plan):
    """A plan of music that is counted in bars; see `Plan` for the other attributes.

    Attributes:
        bars: to write.
        prompt_bars, prompt_notes: complete bars in `ids`, and notes in them.
        allowed: per kind of token (`"Program"`), the only ones that may be written.
        tempos: exact tempos up to the end of `ids`, in ticks of the decoded score, in place of those that tokens can
            state; `None` keeps the tokens'.
        generate_options: as for `plan_piece`.

    Raises:
        ValueError: an option outside its range, naming it; or one bar alone is longer than the model's context.
    """

    bars: int
    prompt_bars: int = 0
    prompt_notes: int = 0
    allowed: dict[str, set[str]] = field(default_factory=dict)
    tempos: list[Tempo] | None = None
    generate_options: dict | None = None
    forbidden: list[int] = field(init=False)

    def __post_init__(self):
        if self.bars < 1:
            raise ValueError(f"bars {self.bars} must be positive.")
        check_generate_options(self.generate_options)
        super().__post_init__()
        self.forbidden = forbidden_ids(self.tokenizer, self.allowed)
        window(self.model, self.tokenizer, self.ids)  # raises what is wrong with the prompt's last bar

    def streamer(self) -> NoteStreamer:
        quarter = self.tokenizer.miditok.time_division
        tempos = None if self.tempos is None else [(tempo.time / quarter, tempo.qpm) for tempo in self.tempos]
        return NoteStreamer(self.tokenizer, self.prompt_bars + self.bars, tempos, decode_threads(self.model))

    def piece(self, ids: list[int], bars: int, elapsed_s: float, remarks: list[str]) -> Piece:
        """The music of `ids` up to `bars` bars after the prompt, written in `elapsed_s`."""
        total = self.prompt_bars + bars
        score = self.tokenizer.decode_midi(ids, bars=total)
        if self.tempos is not None:
            stated = sum(token.startswith("Tempo") for token in self.tokenizer.base_tokens(self.ids))
            score.tempos = type(score.tempos)(self.tempos + list(score.tempos)[stated:])
        lines = bar_times(score, total + 1)
        return Piece(
            score=score,
            ids=ids,
            prompt_end_s=float(lines[self.prompt_bars]),
            music_s=float(lines[total] - lines[self.prompt_bars]),
            elapsed_s=elapsed_s,
            bars=bars,
            tokens=len(ids) - len(self.ids),
            # Not counted in tokens: the last ones may go beyond the bars.
            notes=score.note_num() - self.prompt_notes,
            remarks=remarks,
        )

    def _generate(self, streamer: Streamer | None, remarks: list[str]) -> tuple[list[int], int]:
        model, row = self.model, Row(self, remarks)
        deadline = None if self.time_limit is None else Deadline(self.time_limit)
        while row.goes_on:
            heard = row.window()
            goal, running = row.goal(heard), RunningState(model.config)
            output = model.generate(
                torch.tensor([heard.ids], device=model.device),
                attention_mask=torch.ones(1, len(heard.ids), dtype=torch.long, device=model.device),
                max_new_tokens=model.config.max_position_embeddings - len(heard.ids),
                stopping_criteria=StoppingCriteriaList(
                    [BarCountCriteria(model.config, goal, running), *self.stops(streamer, deadline)]
                ),
                logits_processor=LogitsProcessorList(
                    [
                        MinBarsLogitsProcessor(model.config, goal, running),
                        NoDoubledNotesLogitsProcessor(model.config, running),
                        LeaveProgram(model.config, [self.forbidden], running),
                    ]
                ),
                # Given here, they replace the checkpoint's own.
                suppress_tokens=[*self.forbidden, *(model.generation_config.suppress_tokens or ())] or None,
                max_time=math.inf,  # what a checkpoint says would make the music depend on the machine
                streamer=Progress(row.advance, streamer),
                **self.sampling | (self.generate_options or {}),
            )
            row.take(output[0, len(heard.ids) :].tolist(), deadline, streamer)
        return row.ids, row.kept


class Row:
    """A plan on its way: what is written of it so far.

    Attributes:
        ids: token ids so far.
        bars: new bar lines in them, the one that ends the prompt included.
        kept: new bars that the piece will have.
        goes_on: whether there is more to write.
        remarks: what happened on the way is added to them.
    """

    def __init__(self, plan: BarsPlan, remarks: list[str]):
        self.plan, self.ids, self.remarks = plan, plan.ids, remarks
        grammar = plan.model.config.grammar
        self._bars_of, self._notes_of = grammar["bars"], grammar["notes"]
        self.bars = self._lines(self.ids) - plan.prompt_bars
        self.kept, self.goes_on = plan.bars, True
        self._heard = self.bars, 0  # bars and notes, as far as `progress` was told

    def _lines(self, ids: list[int]) -> int:
        return sum(self._bars_of[token] for token in ids)

    def window(self) -> "Window":
        """What the model hears next."""
        heard = window(self.plan.model, self.plan.tokenizer, self.ids)
        if heard.is_cut and len(self.ids) == len(self.plan.ids):
            self.remarks.append(f"the prompt is longer than the context: the model hears its last {heard.bars} bars")
        return heard

    def goal(self, heard: "Window") -> int:
        """The bars that the window will hold at the piece's end."""
        return self.plan.bars - self.bars + heard.bars

    def advance(self, token: int) -> None:
        """Tell `progress` of a new token."""
        bars, notes = self._heard
        self._heard = bars, notes = bars + self._bars_of[token], notes + self._notes_of[token]
        if self._bars_of[token] and self.plan.progress is not None:
            self.plan.progress(max(bars - 1, 0), notes)

    def take(self, new: list[int], deadline: Deadline | None = None, streamer: Streamer | None = None) -> None:
        """Go on by what the model wrote in one window."""
        plan, before = self.plan, self.bars
        self.ids, self.bars = self.ids + new, before + self._lines(new)
        at = plan.prompt_bars + self.bars
        if self.bars > plan.bars:
            self.goes_on = False
        elif plan.is_cancelled(streamer):
            self._end(self.bars, f"cancelled in bar {at}")  # notes of the bar that has begun are out already
        elif deadline is not None and deadline.has_passed:
            whole = max(self.bars - 1, 0)  # the last line begins a bar that has no end
            limit = f"the time limit of {plan.time_limit:g} s ended the piece after {whole} of {plan.bars} bars"
            self._end(whole if streamer is None else self.bars, limit)
        elif self.bars == before:
            self._end(self.bars, f"stopped at bar {at}: the model wrote {len(new)} tokens without a bar line")
        elif _first_heard(plan.model, self.ids) is None:
            self._end(self.bars, f"stopped at bar {at}: it grew longer than the context")

    def _end(self, kept: int, remark: str) -> None:
        self.goes_on, self.kept = False, kept
        self.remarks.append(remark)


@dataclass(frozen=True)
class Window:
    """What the model hears of a piece: all of it, or BOS and the last bars that leave half of the context free.

    Attributes:
        ids: token ids.
        bars: bar lines in them.
        is_cut: whether that is not all.
    """

    ids: list[int]
    bars: int
    is_cut: bool


def window(model: SageMusicForCausalLM, tokenizer: SageMusicTokenizer, ids: list[int]) -> Window:
    """What the model hears of `ids`.

    Raises:
        ValueError: the last bar alone is longer than the context.
    """
    first = _first_heard(model, ids)
    if first is None:
        context = model.config.max_position_embeddings
        raise ValueError(f"a single bar holds more than the context of {context} tokens: choose a thinner prompt.")
    heard = tokenizer.crop_ids(np.array(ids), first).tolist() if first else ids
    return Window(heard, int(np.array(model.config.grammar["bars"])[heard].sum()), first > 0)


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
        running_state: which the other processors use too.
    """

    def __init__(self, config, forbidden: Sequence[Sequence[int]], running_state: RunningState):
        self.forbidden, self.running_state = list(map(set, forbidden)), running_state
        self.notes = torch.tensor(config.grammar["drum_needed"]) >= 0

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if not any(self.forbidden):
            return scores
        for row, state in enumerate(self.running_state.rows(input_ids)):
            if state.program in self.forbidden[row]:
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
