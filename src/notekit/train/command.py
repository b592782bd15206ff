"""`sage-music train`: options to a run, every wrong argument said before hours are spent."""

import errno
import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments, set_seed
from transformers.utils import logging

from notekit.midi import write_atomic
from notekit.render import MissingExtraError

from .arguments import DataArguments, ModelArguments, WatchArguments, parse
from .families import PARTS, Parts, WholeBatches, model_type_of
from .nats import sum_of_nats
from .resuming import check_output, check_run, last_complete
from .watching import SampleCallback

# What makes a run what it is: with another one of these, a checkpoint must not be gone on from.
IDENTITY = ("model", "tokenizer", "config", "draft_tokens", "lora_rank", "lora_alpha", "block_size", "segmentation")
IDENTITY += ("position_uniform", "transpose", "tempo", "velocity", "track_dropout")
TRAINER_IDENTITY = ("seed", "optim", "bf16", "fp16")

PartsMaker = Callable[[ModelArguments, DataArguments, TrainingArguments], Parts]


def main(argv: Sequence[str] | None = None, parts: PartsMaker | None = None) -> int:
    """Run the command; an interrupted run goes on from its last checkpoint when called again.

    Args:
        parts: makes what is trained from the options, for a model of neither family.

    Returns the exit code: 0, or 2 where an argument, the data, a checkpoint or the disk is wrong.
    """
    try:
        options = parse(sys.argv[1:] if argv is None else argv, model_type_of if parts is None else lambda model: "")
        report = train(*options, parts=parts)
        if options[3].process_index == 0:
            _say(report, Path(options[3].output_dir))
    except (ValueError, OSError, MissingExtraError, StrictDataclassError) as error:
        print(f"sage-music train: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    finally:
        if torch.distributed.is_initialized():  # else gloo's threads abort a process now and then as it ends
            torch.distributed.destroy_process_group()
    return 0


def train(
    model: ModelArguments,
    data: DataArguments,
    watch: WatchArguments,
    args: TrainingArguments,
    parts: PartsMaker | None = None,
) -> dict:
    """Train, evaluate and save; what `sage-music train` does.

    Writes into `args.output_dir`: `checkpoint-STEP/` (to go on from), `best/` (the weights of the best evaluation, to
    use), `adapter/` (with LoRA; `best/` then has it merged), `samples/`, `runs/` (TensorBoard), `skipped.csv`,
    `report.json`.

    Returns the report: evaluation, corpus, speed.

    Raises:
        ValueError, OSError, MissingExtraError: a wrong argument, wrong data, no room on the disk.
    """
    check(data, args)
    set_seed(args.seed)
    logging.disable_progress_bar()
    check_output(args, 0, 0)
    with args.main_process_first():  # the others find its files' tokens kept
        make = parts or PARTS[model_type_of(model.model)]
        tokenizer, network, train_set, evaluation, collator, corpus = make(model, data, args)
    adapted = network
    if model.lora_rank is not None:
        from notekit.lora import add_lora

        if model.draft_tokens is not None:
            raise ValueError("--lora_rank and --draft_tokens: train one after the other.")
        adapted = add_lora(network, model.lora_rank, model.lora_alpha or 2 * model.lora_rank, model.lora_dropout)
    trainable = sum(weight.numel() for weight in adapted.parameters() if weight.requires_grad)
    check_output(args, network.num_parameters(), trainable)
    if model.draft_tokens is not None:
        args.load_best_model_at_end = False  # evaluation measures the model itself, which stays as it is

    def metrics(prediction) -> dict[str, float]:
        total = float(prediction.predictions.sum())
        return {"nats_per_note": total / evaluation.num_notes, "nats_per_token": total / evaluation.num_tokens}

    rows = args.per_device_train_batch_size * args.world_size
    if data.streaming:
        # Each process makes batches of its own: Accelerate cannot cut up one batch of rows that differ in length.
        args.accelerator_config.dispatch_batches = False
    trainer = Trainer(
        model=adapted,
        args=args,
        data_collator=collator,
        train_dataset=train_set if data.streaming else WholeBatches(train_set, rows, args.gradient_accumulation_steps),
        eval_dataset=evaluation,
        compute_metrics=metrics,
        preprocess_logits_for_metrics=getattr(network, "sum_of_nats", sum_of_nats),
        processing_class=tokenizer,
    )
    if watch.early_stopping_patience is not None:
        args.restore_callback_states_from_checkpoint = True  # a resumed run remembers how often it was no better
        trainer.add_callback(EarlyStoppingCallback(watch.early_stopping_patience))
    every = int(args.eval_steps or 0) if watch.sample_steps is None else watch.sample_steps
    if every and parts is None and not trainer.is_fsdp_enabled and not trainer.is_deepspeed_enabled:
        folder = Path(args.output_dir) / "samples"
        trainer.add_callback(SampleCallback(trainer, tokenizer, folder, every, watch.num_samples, watch.sample_bars))

    report = {"corpus": corpus, "parameters": network.num_parameters(), "trainable_parameters": trainable}
    if hasattr(train_set, "padding"):
        report["padding"] = round(train_set.padding(), 4)
    if args.max_steps != 0:
        identity = {
            name: getattr(options, name) for options in (model, data) for name in IDENTITY if hasattr(options, name)
        }
        identity |= {name: str(getattr(args, name)) for name in TRAINER_IDENTITY}
        # Not how many processes and accumulated batches these are: the data do not depend on it.
        identity |= {"rows": rows, "rows_of_a_step": rows * args.gradient_accumulation_steps}
        identity |= {"data": _fingerprint(corpus, train_set)}
        report |= _trained(trainer, args, identity)
    before = [row for row in trainer.state.log_history if row["step"] == 0 and "eval_nats_per_note" in row]
    if before:
        report["nats_per_note_before"] = before[0]["eval_nats_per_note"]
    report |= {**trainer.evaluate(), "steps": trainer.state.global_step}
    if args.max_steps != 0:
        _save(trainer, tokenizer, network, adapted)
    if trainer.is_world_process_zero():
        write_atomic(Path(args.output_dir) / "report.json", (json.dumps(report, indent=1) + "\n").encode())
    return report


def _say(report: dict, folder: Path) -> None:
    """The end of a run in two sentences."""
    before, after, found = report.get("nats_per_note_before"), report["eval_nats_per_note"], f"{folder}/report.json"
    if not report["steps"]:
        print(f"nats per note of held-out music: {after:.3f} ({report['eval_nats_per_token']:.3f} per token)")
    elif before is None:
        print(f"nats per note of held-out music: {after:.3f}")
    else:
        print(f"nats per note of held-out music: {before:.3f} before, {after:.3f} after ({after / before - 1:+.1%})")
    if report["steps"]:
        found = f"{folder}/best, {found}"
    print(f"wrote {found}")
    if report["steps"] and before is not None and after >= before:
        print("note: it became no likelier: try a lower --learning_rate, or more music.", file=sys.stderr)


def check(data: DataArguments, args: TrainingArguments) -> None:
    """Arguments that would be wrong only after hours, or silently.

    Raises:
        ValueError: such an argument.
    """
    if args.label_smoothing_factor:
        raise ValueError(
            "--label_smoothing_factor: Trainer smooths a loss of its own making, which PerceiverS's last latents and "
            "the draft head are not in; leave it out."
        )
    for name, low, high in (("tempo", 0, 1), ("track_dropout", 0, 1), ("held_out", 0, 1)):
        if not low <= getattr(data, name) < high:
            raise ValueError(f"--{name} {getattr(data, name)} must lie in {low}..{high}, without the {high}.")
    if data.streaming and args.max_steps < 0:
        raise ValueError("--streaming: a stream has no length: give --max_steps instead of --num_train_epochs.")
    if args.fsdp and args.device.type == "cpu":
        raise ValueError("--fsdp shards over accelerators; on CPUs it would be passed over: leave it out.")
    if args.dataloader_drop_last:
        raise ValueError(
            "--dataloader_drop_last: it would leave pieces out of the evaluation; incomplete training batches are left "
            "out already."
        )
    if args.train_sampling_strategy != "sequential" and not data.streaming:
        raise ValueError(
            "--train_sampling_strategy: the datasets shuffle themselves, so that a resumed run sees what an "
            "uninterrupted one does; leave it at sequential."
        )


def _fingerprint(corpus: dict, train_set) -> str:
    lengths = getattr(train_set, "lengths", None)
    text = json.dumps([corpus["splits"], [] if lengths is None else [int(n) for n in lengths]], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _trained(trainer: Trainer, args: TrainingArguments, identity: dict) -> dict:
    """Train, from the last complete checkpoint where there is one; what the report says of it."""
    folder, chosen = Path(args.output_dir), args.resume_from_checkpoint
    last, broken = last_complete(folder)
    if chosen in (None, "True", "true", True):
        chosen = None if last is None else str(last)
    args.eval_on_start = args.eval_on_start and chosen is None and args.eval_strategy != "no"
    if args.process_index == 0:
        check_run(folder, identity, resumes=chosen is not None)
        for checkpoint in broken:
            print(f"note: {checkpoint} was not written to its end, and is passed over.", file=sys.stderr)
        if chosen is not None:
            print(f"note: going on from {chosen}", file=sys.stderr)
    try:
        result = trainer.train(resume_from_checkpoint=chosen)
    except Exception as error:
        _raise_disk_full(error, folder)
        raise
    return {
        "train_seconds": round(result.metrics["train_runtime"], 1),
        "samples_per_second": result.metrics["train_samples_per_second"],
        "train_tokens": trainer.state.num_input_tokens_seen,
        "train_loss": result.metrics["train_loss"],
    }


def _raise_disk_full(error: Exception, folder: Path) -> None:
    """Say that the disk is full, which writers of tensors say in words of their own."""
    cause: BaseException | None = error
    while cause is not None:
        if getattr(cause, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(cause):
            break
        cause = cause.__cause__ or cause.__context__
    if cause is None and shutil.disk_usage(folder).free > 2**20:
        return
    last, _ = last_complete(folder)
    kept = f"{last} is whole" if last else "no checkpoint was written"
    raise ValueError(f"{folder}: the disk is full; {kept}. Make room and call the same command again.") from error


def _save(trainer: Trainer, tokenizer, network, adapted) -> None:
    """The trained model in `best/`, ready for use; adapters beside it, and merged into it."""
    folder = Path(trainer.args.output_dir)
    network.config.use_cache = True  # Trainer turned it off for training
    if adapted is network:
        trainer.save_model(str(folder / "best"))
    elif trainer.is_world_process_zero():
        adapted.save_pretrained(folder / "adapter")
        tokenizer.save_pretrained(folder / "adapter")
        adapted.merge_and_unload().save_pretrained(folder / "best")
    if trainer.is_world_process_zero():
        tokenizer.save_pretrained(folder / "best")
        (folder / "best" / "training_args.bin").unlink(missing_ok=True)  # a pickle: nothing to publish


__all__ = ["check", "main", "train"]
