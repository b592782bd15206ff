"""What `Trainer` costs: tokens a second of the stock `Trainer` beside those of a bare PyTorch loop.

Both train copies of the same model on the same batches in the same process, in turn: forward, backward, clipping, AdamW
and a learning-rate step. Rounds are interleaved and medians reported, as what else the machine does changes by the
minute.
"""

import copy
import statistics
import tempfile
import time

import torch
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizer,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from sage_studio.reports import machine

from .decoding import music_like_ids

WARM_UP = 2  # steps of a round before the clock starts


class _Clock(TrainerCallback):
    """Seconds of the steps after the warm-up."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == WARM_UP:
            self.start = time.perf_counter()
        if state.global_step == args.max_steps:
            self.seconds = time.perf_counter() - self.start


def compare_trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizer,
    context: int = 1024,
    batch: int = 4,
    steps: int = 10,
    rounds: int = 3,
) -> dict:
    """Tokens a second of `Trainer` and of a bare loop over the same model and batches.

    Args:
        context: tokens of an item. batch: items of a step. steps: timed steps of a round.

    Returns a JSON-ready dict: `trainer` and `bare_loop` in tokens a second (medians of the rounds), their `ratio` (the
    median of the rounds' own).
    """
    ids = music_like_ids(tokenizer, context, batch * (steps + WARM_UP))
    items = [{"input_ids": row, "labels": row.clone()} for row in ids]
    tokens, rates = context * batch * steps, {"trainer": [], "bare_loop": []}
    for number in range(rounds):
        order = (("trainer", _trainer_seconds), ("bare_loop", _bare_seconds))
        for name, measure in order if number % 2 else reversed(order):
            rates[name].append(tokens / measure(copy.deepcopy(model), items, batch, steps + WARM_UP))
    ratios = [ours / bare for ours, bare in zip(rates["trainer"], rates["bare_loop"], strict=True)]
    return {
        "machine": machine(torch.device("cpu")),
        "context": context,
        "batch": batch,
        **{name: round(statistics.median(values)) for name, values in rates.items()},
        "ratio": round(statistics.median(ratios), 4),
    }


def _trainer_seconds(model: PreTrainedModel, items: list[dict], batch: int, steps: int) -> float:
    clock = _Clock()
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=batch,
            learning_rate=1e-4,
            logging_steps=10,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            train_sampling_strategy="sequential",
        )
        trainer = Trainer(model=model, args=args, train_dataset=items, callbacks=[clock])
        trainer.remove_callback(PrinterCallback)  # prints to where the result goes
        trainer.train()
    return clock.seconds


def _bare_seconds(model: PreTrainedModel, items: list[dict], batch: int, steps: int) -> float:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    model.train()
    start = 0.0
    for step, inputs in enumerate(DataLoader(items, batch_size=batch), start=1):
        model(**inputs, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step == WARM_UP:
            start = time.perf_counter()
    return time.perf_counter() - start


def table(result: dict) -> str:
    """The result of `compare_trainer` in a sentence."""
    return (
        f"{result['batch']} x {result['context']:,} tokens a step: Trainer {result['trainer']:,} tokens/s, bare loop "
        f"{result['bare_loop']:,} tokens/s: {result['ratio']:.3f} x"
    )
