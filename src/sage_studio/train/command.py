"""`sage-music train`: options to a run, every wrong argument said before hours are spent."""

import errno
import hashlib
import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from transformers import EarlyStoppingCallback, Trainer, TrainerState, TrainingArguments, set_seed
from transformers.utils import logging

from sage_studio.errors import MissingExtraError, install_hint
from sage_studio.families import SAGE_MUSIC
from sage_studio.files import write_atomic

from .arguments import DataArguments, ModelArguments, WatchArguments, parse
from .callbacks import OriginCallback, SampleCallback, keep_origin, tell_origin
from .checks import check_arguments, check_output, check_ranks
from .nats import sum_of_nats
from .parts import EndlessStream, Parts, WholeBatches, family_named
from .resuming import check_run, is_finished, last_complete, state_of, step_of, times_no_better

# What makes a run what it is: with another one of these, a checkpoint must not be gone on from.
IDENTITY = ("tokenizer", "draft_tokens", "lora_rank", "lora_alpha", "lora_dropout", "block_size", "segmentation")
IDENTITY += ("position_uniform", "transpose", "tempo", "velocity", "track_dropout", "streaming", "shuffle_buffer")
IDENTITY += ("eval_pieces", "eval_split")
TRAINER_IDENTITY = ("seed", "optim", "bf16", "fp16", "learning_rate", "weight_decay")

PartsMaker = Callable[[ModelArguments, DataArguments, TrainingArguments], Parts]


def main(argv: Sequence[str] | None = None, parts: PartsMaker | None = None) -> int:
    """Run the command; an interrupted run goes on from its last checkpoint when called again.

    Args:
        parts: makes what is trained from the options, for a model of neither family.

    Returns the exit code: 0, or 2 where an argument, the data, a checkpoint or the disk is wrong.
    """
    if "TRANSFORMERS_VERBOSITY" not in os.environ:
        logging.set_verbosity_error()
    try:
        family = family_named if parts is None else lambda model: SAGE_MUSIC
        options = parse(sys.argv[1:] if argv is None else argv, family)
        report = train(*options, parts=parts)
        if options[3].process_index == 0:
            _say(report, Path(options[3].output_dir))
    except (ValueError, OSError, MissingExtraError, StrictDataclassError) as error:
        print(f"sage-music train: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
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
    use), `adapter/` (with LoRA; `best/` then has it merged), `samples/`, `runs/` (TensorBoard), `held_out.csv`,
    `skipped.csv`, `report.json`; and into every folder of weights `provenance.json`, what they were made from. A run
    that is finished is not trained again: its report is returned.

    Returns the report: evaluation, corpus, speed.

    Raises:
        ValueError, OSError, MissingExtraError: a wrong argument, wrong data, no room on the disk.
    """
    check_arguments(model, data, watch, args)
    check_output(args)
    set_seed(args.seed)
    logging.disable_progress_bar()
    if parts is None:
        family = family_named(model.model)
        parts = family.load("parts")
        data.eval_pieces = family.eval_pieces if data.eval_pieces is None else data.eval_pieces
    else:
        watch.sample_steps = 0  # nobody knows how such a model writes
    with args.main_process_first():  # the others find its files' tokens kept
        made = parts(model, data, args)
    network = adapted = made.model
    if model.lora_rank is not None:
        from sage_studio.checkpoints.lora import add_lora

        adapted = add_lora(network, model.lora_rank, model.lora_alpha or 2 * model.lora_rank, model.lora_dropout)
    trainable = sum(weight.numel() for weight in adapted.parameters() if weight.requires_grad)
    check_output(args, network.num_parameters(), trainable, adapted is not network)
    rows = args.train_batch_size * args.world_size
    identity = _identity(model, data, args, made, rows)
    check_ranks(identity["data"])
    trainer = _trainer(model, data, watch, args, made, adapted, rows)

    report = {"corpus": made.corpus, "parameters": network.num_parameters(), "trainable_parameters": trainable}
    if hasattr(made.train, "padding"):
        report["padding"] = round(made.train.padding(), 4)
    if args.max_steps == 0:
        report |= {**trainer.evaluate(), "steps": 0}
    else:
        kept = _kept_report(trainer, watch, identity)
        if kept is not None:
            return kept
        try:
            if trainer.is_world_process_zero():
                folder = Path(args.output_dir)
                keep_origin(model.model, folder, resumes=last_complete(folder)[0] is not None)
            report |= _trained(trainer, watch)
            report |= _finish(trainer, made.tokenizer, network, adapted, drafts=model.draft_tokens is not None)
        except Exception as error:
            _raise_disk_full(error, Path(args.output_dir))
            raise
    if trainer.is_world_process_zero():
        name = "evaluation.json" if args.max_steps == 0 else "report.json"
        write_atomic(Path(args.output_dir) / name, (json.dumps(report, indent=1) + "\n").encode())
    return report


def _identity(model: ModelArguments, data: DataArguments, args: TrainingArguments, made: Parts, rows: int) -> dict:
    """What `check_run` compares: a checkpoint of a run with other values must not be gone on from."""
    config = {name: value for name, value in made.model.config.to_dict().items() if name != "_name_or_path"}
    lengths = [int(n) for n in getattr(made.train, "lengths", [])]
    found = {name: getattr(options, name) for options in (model, data) for name in IDENTITY if hasattr(options, name)}
    found |= {name: str(getattr(args, name)) for name in TRAINER_IDENTITY}
    # Not how many processes and accumulated batches these are: the data do not depend on it.
    found |= {"rows": rows, "rows_of_a_step": rows * args.gradient_accumulation_steps}
    if data.streaming:
        found["dataloader_num_workers"] = args.dataloader_num_workers
    return found | {"model": model.model, "config": _digest(config), "data": _digest([made.corpus, lengths])}


def _digest(content) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _trainer(
    model: ModelArguments,
    data: DataArguments,
    watch: WatchArguments,
    args: TrainingArguments,
    made: Parts,
    adapted,
    rows: int,
) -> Trainer:
    """The stock `Trainer`, with nats per note and samples on the way."""
    if model.draft_tokens is not None:
        args.load_best_model_at_end = False  # evaluation measures the model itself, which stays as it is
        args.eval_on_start = False
    if data.streaming:
        # Each process makes batches of its own: Accelerate cannot cut up one batch of rows that differ in length.
        args.accelerator_config.dispatch_batches = False
        train_set = EndlessStream(made.train)
    else:
        train_set = WholeBatches(made.train, rows, args.gradient_accumulation_steps)

    def metrics(prediction) -> dict[str, float]:
        total = float(prediction.predictions.sum())
        notes, tokens = made.evaluation.num_notes, made.evaluation.num_tokens
        return {"nats_per_note": total / notes, "nats_per_token": total / tokens}

    trainer = Trainer(
        model=adapted,
        args=args,
        data_collator=made.collator,
        train_dataset=train_set,
        eval_dataset=made.evaluation,
        compute_metrics=metrics,
        preprocess_logits_for_metrics=getattr(made.model, "sum_of_nats", sum_of_nats),
        processing_class=made.tokenizer,
    )
    trainer.add_callback(OriginCallback(Path(args.output_dir)))
    if watch.early_stopping_patience is not None:
        trainer.add_callback(EarlyStoppingCallback(watch.early_stopping_patience))
    every = args.eval_steps if watch.sample_steps is None else watch.sample_steps
    every = max(1, round(every * max(args.max_steps, 1))) if every and every < 1 else int(every or 0)
    if every and not trainer.is_fsdp_enabled and not trainer.is_deepspeed_enabled:
        if importlib.util.find_spec("matplotlib") is None and args.process_index == 0:
            print(f"note: samples have no pictures: {install_hint('matplotlib')}", file=sys.stderr)
        folder = Path(args.output_dir) / "samples"
        sizes = (every, watch.num_samples, watch.sample_bars)
        trainer.add_callback(SampleCallback(trainer, made.tokenizer, folder, *sizes))
    return trainer


def _kept_report(trainer: Trainer, watch: WatchArguments, identity: dict) -> dict | None:
    """The report of a run that is finished, which its folder has; None where there is something left to do.

    Raises:
        ValueError: the folder holds another run.
    """
    args, folder = trainer.args, Path(trainer.args.output_dir)
    last, broken = last_complete(folder)
    if args.process_index == 0:
        check_run(folder, identity, resumes=last is not None)
        for checkpoint in broken:
            print(f"note: {checkpoint} was not written to its end, and is passed over.", file=sys.stderr)
    whole = (folder / "report.json").is_file() and any((folder / "best").glob("*.safetensors"))
    elsewhere = args.resume_from_checkpoint not in (None, "True", "true", True)
    if last is None or elsewhere or not whole or not is_finished(state_of(last), args, watch.early_stopping_patience):
        return None
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    if report.get("steps") != state_of(last)["global_step"]:
        return None
    if args.process_index == 0:
        print(f"note: this run is finished (step {report['steps']}): nothing was trained.", file=sys.stderr)
    return report


def _trained(trainer: Trainer, watch: WatchArguments) -> dict:
    """Train, from the last complete checkpoint where there is one; what the report says of it."""
    args, chosen = trainer.args, trainer.args.resume_from_checkpoint
    last, _ = last_complete(Path(args.output_dir))
    if chosen in (None, "True", "true", True):
        chosen = None if last is None else str(last)
    args.eval_on_start = args.eval_on_start and chosen is None and args.eval_strategy != "no"
    if chosen is None:
        result = trainer.train()
    else:
        state, patience = state_of(Path(chosen)), watch.early_stopping_patience
        if is_finished(state, args, patience):  # killed after its last checkpoint
            trainer.state = TrainerState.load_from_json(str(Path(chosen) / "trainer_state.json"))
            best = trainer.state.best_model_checkpoint if args.load_best_model_at_end else None
            trainer._load_from_checkpoint(best or chosen)
            return {}
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, EarlyStoppingCallback):
                callback.early_stopping_patience_counter = times_no_better(state)
        if args.process_index == 0:
            print(f"note: going on from {chosen}", file=sys.stderr)
        result = trainer.train(resume_from_checkpoint=chosen)
    return {
        "train_elapsed_s": round(result.metrics["train_runtime"], 1),
        "samples_per_second": result.metrics["train_samples_per_second"],
        "train_tokens": trainer.state.num_input_tokens_seen,
        "train_loss": result.metrics["train_loss"],
    }


def _finish(trainer: Trainer, tokenizer, network, adapted, drafts: bool) -> dict:
    """Save the trained model in `best/`, ready for use, and evaluate it; what the report says of it.

    Adapters are kept beside it, and merged into it. An evaluation in bfloat16 changes the weights, so they are saved
    first; merging leaves nothing to evaluate, so it comes last. What was evaluated on the way is not evaluated again.
    """
    folder, steps = Path(trainer.args.output_dir), trainer.state.global_step
    best, first = folder / "best", trainer.is_world_process_zero()
    network.config.use_cache = True  # Trainer turned it off for training
    if adapted is network:
        if trainer.is_fsdp_enabled:  # checkpoints may be sharded; this is for use
            trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        trainer.save_model(str(best))
    elif first:
        adapted.save_pretrained(folder / "adapter")
        tokenizer.save_pretrained(folder / "adapter")
    found = _known_evaluation(trainer) or trainer.evaluate()
    if first:
        if adapted is not network:
            adapted.merge_and_unload().save_pretrained(best)
        tokenizer.save_pretrained(best)
        (best / "training_args.bin").unlink(missing_ok=True)  # a pickle: nothing to publish
        if not any(best.glob("*.safetensors")):
            raise ValueError(f"{best}: the weights were not saved; {folder} has the checkpoints.")
        for weights in (best, folder / "adapter") if adapted is not network else (best,):
            tell_origin(folder, weights)
    before = [row for row in trainer.state.log_history if row["step"] == 0 and "eval_nats_per_note" in row]
    if before and not drafts:
        found["nats_per_note_before"] = before[0]["eval_nats_per_note"]
    return {**found, "steps": steps}


def _known_evaluation(trainer: Trainer) -> dict | None:
    """What an evaluation on the way said of the weights that the model has at the end; None where there was none.

    None too where evaluation on the way is not done as at the end, in half precision.
    """
    args, state = trainer.args, trainer.state
    if args.bf16_full_eval or args.fp16_full_eval:
        return None
    best = state.best_model_checkpoint if args.load_best_model_at_end else None
    step = step_of(Path(best)) if best else state.global_step
    rows = [row for row in state.log_history if row["step"] == step and "eval_nats_per_note" in row]
    if not rows:
        return None
    found = {name: value for name, value in rows[-1].items() if name != "step"}
    # Of the whole run, as the report's other numbers.
    end = {"epoch": state.epoch, "num_input_tokens_seen": state.num_input_tokens_seen}
    return {name: end.get(name, value) for name, value in found.items()}


def _say(report: dict, folder: Path) -> None:
    """The end of a run in two sentences."""
    before, after, found = report.get("nats_per_note_before"), report["eval_nats_per_note"], f"{folder}/report.json"
    if not report["steps"]:
        found = f"{folder}/evaluation.json"
        print(f"nats per note of held-out music: {after:.3f} ({report['eval_nats_per_token']:.3f} per token)")
    elif before is None:
        print(f"nats per note of held-out music: {after:.3f}")
    else:
        print(f"nats per note of held-out music: {before:.3f} before, {after:.3f} after ({after / before - 1:+.1%})")
    if report["steps"]:
        found = f"{folder}/best, {found}"
    print(f"wrote {found}")
    if report["steps"] and before is not None and after >= before:
        advice = "try a lower --learning_rate and another --output, or more music"
        print(f"note: it became no likelier: {advice}.", file=sys.stderr)


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
