"""Several performances of PerceiverS written at once, each as if it were alone.

from sage_studio.checkpoints import load
from sage_studio.generation.seconds import plan_continuation
from sage_studio.generation.seconds_batch import write_together
model, tokenizer = load("perceivers")
performances = write_together([plan_continuation(model, tokenizer, "prompt.mid", seed=seed) for seed in range(4)])
"""

import math
import time
from collections.abc import Sequence

import torch
from transformers import LogitsProcessorList, StoppingCriteriaList

from .result import Piece, apart_from_cancelled, check_together
from .sampling import Cancelled, Deadline, row_generators, row_sampler, samples_by_row, turn, without_padding
from .seconds import SecondsPlan


def write_together(plans: Sequence[SecondsPlan]) -> list[Piece]:
    """Write plans of one model, in rows of one batch where that changes nothing; as `plan.write()` of each.

    Rows go together when their prompts have equally many tokens and the same cut, as several continuations of one
    prompt do; others go one after the other. PerceiverS decodes in windows of its latents that begin at certain columns
    of the batch: left padding would move them, and the music of a row would depend on how long its neighbours are.

    Every row has its own random generator; only the rounding of batched products may, seldom, tip a choice. Plans with
    `progress`, or of a checkpoint whose generation config asks for beams, drafting or unusual sampling, are written one
    after the other.

    Returns:
        performances in the order of the plans; `elapsed_s` of each is the time of the rows that went with it, and
        `time_limit` is one for each such group of rows.

    Raises:
        ValueError: plans of the other family, or that differ in model or in an option other than the seed.
    """
    check_together(plans, SecondsPlan, "music_s", "max_tokens", "max_note_s")
    if any(plan.cancelled for plan in plans):
        return apart_from_cancelled(plans, write_together)
    groups: dict[tuple, list[int]] = {}
    for index, plan in enumerate(plans):
        groups.setdefault((len(plan.ids), plan.start, plan.wait, plan.budget), []).append(index)
    written: dict[int, Piece] = {}
    for members in groups.values():
        written |= zip(members, _write_group([plans[index] for index in members]), strict=True)
    return [written[index] for index in range(len(plans))]


def _write_group(plans: list[SecondsPlan]) -> list[Piece]:
    """Performances of plans that differ in ids of equal number, and in seeds."""
    first, model, pad = plans[0], plans[0].model, plans[0].tokenizer.pad_token_id
    if any(plan.progress is not None for plan in plans) or not samples_by_row(model.generation_config):
        return [plan.write() for plan in plans]
    ids = torch.tensor([plan.ids for plan in plans], device=model.device)
    generators = row_generators([plan.seed for plan in plans], model.device)
    sampler = row_sampler(model.generation_config, first.sampling, generators, [first.budget] * len(plans))
    stops = [Cancelled([plan.is_cancelled for plan in plans])]
    with turn(lambda: all(plan.cancelled for plan in plans)) as mine:
        if not mine:
            return [plan.write() for plan in plans]
        begin = time.perf_counter()
        deadline = None if first.time_limit is None else Deadline(first.time_limit)
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=first.budget,
            max_time=math.inf,  # as where one is written alone
            do_sample=False,
            logits_processor=LogitsProcessorList([*first.processors(), *sampler]),
            stopping_criteria=StoppingCriteriaList(stops if deadline is None else [*stops, deadline]),
        )
        elapsed_s = time.perf_counter() - begin
    new = [without_padding(row, pad) for row in output[:, ids.shape[1] :].tolist()]
    written = []
    for plan, row in zip(plans, new, strict=True):
        ids = plan.ids + row
        remarks = plan.remarks + plan.early_end(ids, deadline)
        written.append(plan.piece(ids, None, elapsed_s, remarks))
    return written
