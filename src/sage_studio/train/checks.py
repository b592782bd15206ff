"""What is said before hours are spent: arguments that would be wrong late or silently, and a folder without room."""

import importlib.util
import os
import shutil
from pathlib import Path

import torch
from transformers import TrainingArguments

from sage_studio.errors import MissingExtraError, install_hint

from .arguments import DataArguments, ModelArguments, WatchArguments

METRICS = ("nats_per_note", "nats_per_token", "loss")


def check_arguments(model: ModelArguments, data: DataArguments, watch: WatchArguments, args: TrainingArguments) -> None:
    """Refuse arguments that would be wrong only after hours, or silently.

    Raises:
        ValueError: such an argument.
        MissingExtraError: it needs a package that is not installed.
    """
    evaluates = args.eval_strategy != "no"
    for wrong, text in (
        (
            args.label_smoothing_factor,
            "--label_smoothing_factor: Trainer smooths a loss of its own making, which PerceiverS's last latents and "
            "the draft head are not in",
        ),
        (args.prediction_loss_only, "--prediction_loss_only: the best weights are those of the fewest nats per note"),
        (args.batch_eval_metrics, "--batch_eval_metrics: nats are summed over the whole evaluation"),
        (not args.eval_do_concat_batches, "--eval_do_concat_batches false: nats are summed over the whole evaluation"),
        (
            args.dataloader_drop_last,
            "--dataloader_drop_last: it would leave pieces out of the evaluation; incomplete training batches are left "
            "out already",
        ),
        (
            args.train_sampling_strategy != "sequential" and not data.streaming,
            "--train_sampling_strategy: the datasets shuffle themselves, so that a resumed run sees what an "
            "uninterrupted one does",
        ),
        (
            args.push_to_hub,
            "--push_to_hub: it would publish the run's folder; when it is done, sage-music push OUTPUT/best user/name",
        ),
        (
            args.fsdp and args.device.type == "cpu",
            "--fsdp: it shards over accelerators, and would be passed over on CPUs",
        ),
        (
            (args.fsdp or args.deepspeed) and model.lora_rank is not None,
            "--lora_rank with --fsdp or --deepspeed: adapters are merged from whole weights; train them data-parallel",
        ),
        (
            model.lora_rank is not None and model.draft_tokens is not None,
            "--lora_rank with --draft_tokens: train one after the other",
        ),
        (
            watch.early_stopping_patience is not None and (not evaluates or model.draft_tokens is not None),
            "--early_stopping_patience: there is no evaluation that it could wait for",
        ),
    ):
        if wrong:
            raise ValueError(f"{text}: leave it out.")
    if model.lora_rank is not None and importlib.util.find_spec("peft") is None:
        raise MissingExtraError(f"--lora_rank needs PEFT: {install_hint('peft')}.")
    metric = str(args.metric_for_best_model or METRICS[0]).removeprefix("eval_")
    if metric not in METRICS:
        raise ValueError(f"--metric_for_best_model {metric}: choose from {', '.join(METRICS)}.")
    held_out = 0.1 if data.held_out is None else data.held_out
    for name, value in (("tempo", data.tempo), ("track_dropout", data.track_dropout), ("held_out", held_out)):
        if not 0 <= value < 1:
            raise ValueError(f"--{name} {value} must lie in 0..1, without the 1.")
    for name, value, least in (
        ("lora_rank", model.lora_rank, 1),
        ("early_stopping_patience", watch.early_stopping_patience, 1),
        ("num_samples", watch.num_samples, 1),
        ("sample_bars", watch.sample_bars, 1),
    ):
        if value is not None and value < least:
            raise ValueError(f"--{name} {value} must be {least} or more.")
    if model.lora_alpha is not None and model.lora_alpha <= 0:
        raise ValueError(f"--lora_alpha {model.lora_alpha} must be above 0.")
    if data.streaming and args.max_steps < 0:
        raise ValueError("--streaming: a stream has no length: give --max_steps instead of --num_train_epochs.")


def check_output(args: TrainingArguments, parameters: int = 0, trainable: int = 0, adapters: bool = False) -> None:
    """Refuse an output folder that cannot be written to, or has no room for what will be.

    Args:
        parameters: of the model. trainable: those that are trained.
        adapters: checkpoints hold only what is trained.

    Raises:
        ValueError: it cannot, or has not.
    """
    folder = Path(args.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise ValueError(f"--output {folder}: cannot be written to ({error.strerror}): give another folder.") from error
    # A checkpoint: weights, and two moments of every trainable one. Trainer writes a new one before it deletes an old.
    saves = args.save_strategy != "no"
    kept = (args.save_total_limit + 1 if args.save_total_limit else 3) if saves else 0
    need = 4 * (kept * ((trainable if adapters else parameters) + 2 * trainable) + parameters) + 2**20
    held = sum(file.stat().st_size for checkpoint in folder.glob("checkpoint-*") for file in checkpoint.glob("*"))
    free = shutil.disk_usage(folder).free
    if free + held < need:
        raise ValueError(
            f"--output {folder}: {free / 1e6:,.0f} MB are free, and the run's checkpoints need about "
            f"{need / 1e6:,.0f} MB: make room, keep fewer (--save_total_limit) or give another folder."
        )


def check_ranks(fingerprint: str) -> None:
    """Refuse to train where processes have read different data, which would make them wait for each other forever.

    Raises:
        ValueError: they have.
    """
    if not torch.distributed.is_initialized():
        return
    found: list = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, fingerprint)
    if len(set(found)) > 1:
        raise ValueError(
            "the processes found different music (a file may have timed out on one machine): run `sage-music prepare` "
            "once and give all of them its folder."
        )
