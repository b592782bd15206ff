"""Several pieces of SAGE-Music written at once: their rows go through one `generate()`, each as if it were alone.

from sage_studio.checkpoints import load
from sage_studio.generation.bars import plan_continuation
from sage_studio.generation.bars_batch import write_together
model, tokenizer = load()
pieces = write_together([plan_continuation(model, tokenizer, path, seed=0) for path in ("a.mid", "b.mid")])
"""

import math
import time
from collections.abc import Sequence

import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from sage_music.generation_sage_music import (
    BarCountCriteria,
    MinBarsLogitsProcessor,
    NoDoubledNotesLogitsProcessor,
    RunningState,
)

from .bars import BarsPlan, LeaveProgram, Row
from .result import Piece, apart_from_cancelled, check_together
from .sampling import Cancelled, Deadline, pad_left, row_generators, row_sampler, samples_by_row, turn, without_padding


def write_together(plans: Sequence[BarsPlan]) -> list[Piece]:
    """Write plans of one model in rows of one batch, left-padded; the same pieces as `plan.write()` of each.

    Every row has its own bars, instruments and random generator, so that a piece depends on its own prompt and seed and
    not on its neighbours; only the rounding of batched products may, seldom, tip a choice. A row that has ended waits
    for the others, and so does one that is longer than the context for its next window.

    Plans with `generate_options`, with `progress`, or of a checkpoint whose generation config asks for beams, drafting
    or unusual sampling are written one after the other.

    Returns:
        pieces in the order of the plans; `elapsed_s` of each is the time that the whole batch took.

    Raises:
        ValueError: plans of the other family, or that differ in model, temperature, top_p or time_limit; or as
            `Plan.write`.
    """
    if not plans:
        return []
    first = plans[0]
    check_together(plans, BarsPlan)
    if any(plan.cancelled for plan in plans):
        return apart_from_cancelled(plans, write_together)
    model = first.model
    alone = any(plan.generate_options or plan.progress is not None for plan in plans)
    if alone or not samples_by_row(model.generation_config):
        return [plan.write() for plan in plans]
    generators = row_generators([plan.seed for plan in plans], model.device)
    rows = [Row(plan, list(plan.remarks)) for plan in plans]
    with turn(lambda: all(plan.cancelled for plan in plans)) as mine:
        if not mine:
            return [plan.write() for plan in plans]
        begin = time.perf_counter()
        deadline = None if first.time_limit is None else Deadline(first.time_limit)
        while any(row.goes_on for row in rows):
            left = [index for index, row in enumerate(rows) if row.goes_on]
            _write_windows([rows[i] for i in left], [generators[i] for i in left], deadline)
        elapsed_s = time.perf_counter() - begin
    return [row.plan.piece(row.ids, row.kept, elapsed_s, row.remarks) for row in rows]


def _write_windows(rows: list[Row], generators: list[torch.Generator], deadline: Deadline | None) -> None:
    """Go on with each row, by what the model writes after what it hears of that row."""
    plans, model, pad = [row.plan for row in rows], rows[0].plan.model, rows[0].plan.tokenizer.pad_token_id
    windows = [row.window() for row in rows]
    goals = torch.tensor([row.goal(window) for row, window in zip(rows, windows, strict=True)], device=model.device)
    room = [model.config.max_position_embeddings - len(window.ids) for window in windows]
    inputs = pad_left([window.ids for window in windows], pad, model.device)
    width = inputs["input_ids"].shape[1]
    running = RunningState(model.config)
    # What the bar counters compare with is a number for one row, and here one number a row.
    stops = [
        BarCountCriteria(model.config, goals, running),
        _ContextIsFull(width, torch.tensor(room, device=model.device)),
        Cancelled([plan.is_cancelled for plan in plans]),
    ]
    output = model.generate(
        **inputs,
        max_new_tokens=max(room),
        max_time=math.inf,  # as where one is written alone
        do_sample=False,
        stopping_criteria=StoppingCriteriaList(stops if deadline is None else [*stops, deadline]),
        logits_processor=LogitsProcessorList(
            [
                _Forbid([plan.forbidden for plan in plans], model.config.vocab_size, model.device),
                MinBarsLogitsProcessor(model.config, goals, running),
                NoDoubledNotesLogitsProcessor(model.config, running),
                LeaveProgram(model.config, [plan.forbidden for plan in plans], running),
                *row_sampler(model.generation_config, plans[0].sampling, generators, room),
            ]
        ),
    )
    for row, new in zip(rows, output[:, width:].tolist(), strict=True):
        row.take(without_padding(new, pad), deadline)


class _ContextIsFull(StoppingCriteria):
    """Ends a row after as many new tokens as its own context has room for; `room` (B,)."""

    def __init__(self, width: int, room: torch.LongTensor):
        self.width, self.room = width, room

    def __call__(self, input_ids: torch.LongTensor, scores, **kwargs) -> torch.BoolTensor:
        return input_ids.shape[1] - self.width >= self.room


class _Forbid(LogitsProcessor):
    """Forbids tokens, others in each row."""

    def __init__(self, forbidden: list[list[int]], vocab_size: int, device: torch.device):
        self.mask = torch.zeros(len(forbidden), vocab_size, dtype=torch.bool)
        for row, ids in enumerate(forbidden):
            self.mask[row, ids] = True
        self.mask = self.mask.to(device)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        return scores.masked_fill(self.mask, -torch.inf)
