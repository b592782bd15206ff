"""Train a SAGE-Music or a PerceiverS from scratch, or go on from a checkpoint, with the stock `Trainer`.

    python -m notekit.train --data my_midi --out runs/mine --steps 2000
    python -m notekit.train --family perceivers --data my_piano --out runs/piano --steps 2000

On a CPU two processes of one thread each train almost twice as fast as one of two:
`OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 -m notekit.train ...`; `--batch-size` counts rows per process.

`--data` is a folder of MIDI files: `train` and `validation` below it are used where they exist, otherwise every tenth
file (by a hash of its name) is held out. Quality is reported in nats per note, which compares tokenizations fairly: a
note costs what all tokens that spell it, its bar lines and programs (or time shifts) cost together, divided by the
number of notes.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from torch.utils.data import Dataset
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizer, Trainer, TrainingArguments, set_seed

from perceivers import PerceiverSForCausalLM, PerceiverSTokenizer
from perceivers.segmentation import MODES, SegmentCollator, SegmentDataset, SequentialDataset
from sage_music import SageMusicForCausalLM, SageMusicTokenizer
from sage_music.data import BlockDataset, WindowDataset

from . import TEMPERATURE, TOP_P
from .corpus import encode_files, split_files

# Options of the model's shape, and their fields in the config class, which has the defaults.
SHAPE = {
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "context": "max_position_embeddings",
    "kv_routing": "kv_routing",
    "num_key_value_heads": "num_key_value_heads",
    "num_latents": "num_latents",
    "cross_scales": "cross_scales",
    "scale_mask": "scale_mask",
    "draft_tokens": "num_mtp_layers",
}
# Tokens of context of a new PerceiverS: a quarter of the config class's, which holds most whole performances.
CONTEXT = 8192
# Options that only one family has.
OPTIONS = {
    "sage-music": (
        "beat_resolution",
        "num_velocities",
        "program_every_note",
        "kv_routing",
        "num_key_value_heads",
        "block_size",
        "draft_tokens",
    ),
    "perceivers": ("num_latents", "cross_scales", "scale_mask", "segmentation", "position_uniform"),
}

# What a family brings to `run`: tokenizer, model, training set (None where steps are 0), evaluation set, collator.
Parts = tuple[PreTrainedTokenizer, PreTrainedModel, Dataset | None, Dataset, Callable | None]


def sum_of_nats(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """(B,) summed negative log-likelihood of each row, so that evaluation keeps one number a row, not the logits.

    `labels` (B, T) are not shifted. `logits` (B, n, V) predict the last n of them; where they are as many as the
    labels, the last one predicts nothing. Columns on the right without any label are passed over: with several
    processes, `Trainer` has padded labels and logits there to the widths of the widest process.
    """
    labels = labels[:, : int((labels != -100).any(0).nonzero().max()) + 1]
    n = min(logits.shape[1], labels.shape[1] - 1)
    logits, labels = logits[:, :n].float(), labels[:, -n:]
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, ignore_index=-100, reduction="none")
    return losses.sum(-1)


def scale(text: str) -> int | None:
    """A context scale of `--cross-scales`: a number of tokens, or `none` for the whole context."""
    return None if text == "none" else int(text)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m notekit.train", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--family", choices=tuple(OPTIONS), help="default: --init-from's, else sage-music")
    add("--data", nargs="+", required=True, help="folders of MIDI files")
    add("--metadata", help="CSV with the columns path and licence, to keep some licences only")
    add(
        "--licences",
        nargs="+",
        default=["MIT", "CC0-1.0", "CC BY 4.0", "BSD-3-Clause", "Public Domain"],
        help="licences to keep, with --metadata (default: %(default)s)",
    )
    add("--cache", help="folder that keeps the files' tokens for the next run on them")
    add("--out", required=True, help="run folder: checkpoints, log, and the best model in best/")
    add(
        "--init-from",
        help="checkpoint to start from; only --context, --num-latents and --draft-tokens change its shape",
    )
    add("--tokenizer", help="folder of a saved tokenizer (default: --init-from's, else a new one)")
    add("--hidden-size", type=int)
    add("--intermediate-size", type=int)
    add("--layers", type=int)
    add("--heads", type=int)
    add("--context", type=int, help=f"context length in tokens (default: the config class's; perceivers: {CONTEXT})")
    add("--batch-size", type=int, default=8, help="blocks or segments in a step of one process")
    add("--gradient-accumulation", type=int, default=1, help="batches in a step")
    add("--gradient-checkpointing", action="store_true", help="compute the layers twice, for less memory")
    add("--transpose", type=int, default=6, help="largest random transposition, in semitones")
    add("--steps", type=int, default=2000, help="0 only evaluates")
    add("--learning-rate", type=float, default=2e-3)
    add("--warmup", type=int, default=100, help="steps of linear warm-up")
    add("--decay", type=float, default=0.25, help="share of the steps over which the rate falls to zero")
    add("--eval-every", type=int, default=250, help="steps between evaluations and checkpoints")
    add("--eval-pieces", type=int, default=60, help="pieces to evaluate on, whole (0: all)")
    add("--eval-split", choices=("validation", "test"), default="validation")
    add("--bf16", action="store_true", help="bfloat16 autocast")
    add("--seed", type=int, default=0)
    add = parser.add_argument_group("sage-music").add_argument
    add("--beat-resolution", type=int, help="positions in a beat")
    add("--num-velocities", type=int, help="velocity bins")
    add("--program-every-note", action="store_true", help="Program tokens on every note instead of on change")
    add("--kv-routing", choices=("head", "token", "none"))
    add("--num-key-value-heads", type=int)
    add("--block-size", type=int, default=1024, help="tokens in a training block (default: %(default)s)")
    add(
        "--draft-tokens",
        type=int,
        help="train only a draft head that guesses so many tokens (generate(use_mtp=True)), on --init-from as it is",
    )
    add = parser.add_argument_group("perceivers").add_argument
    add("--num-latents", type=int, help="targets in a segment, and positions the model computes")
    add("--cross-scales", type=scale, nargs="+", help="tokens each cross-attention layer sees, or none for all")
    add("--scale-mask", choices=("sliding", "static"), help="which tokens a scale counts back from")
    add("--segmentation", choices=MODES, default="effective", help="which segments to train on")
    add("--position-uniform", action="store_true", help="train every position of a piece equally often")
    return parser


def sage_music_parts(args: argparse.Namespace) -> Parts:
    """Blocks of a fixed length; evaluation in windows of the same length, so no padding to the left."""
    if args.draft_tokens is not None and (args.draft_tokens < 1 or not args.init_from):
        raise ValueError("--draft-tokens is at least 1 and needs --init-from, the checkpoint whose tokens it guesses.")
    options = {
        "beat_resolution": args.beat_resolution,
        "num_velocities": args.num_velocities,
        "program_changes": not args.program_every_note,
    }
    tokenizer, model = start(args, SageMusicTokenizer, SageMusicForCausalLM, options)
    if args.draft_tokens is not None:
        model.requires_grad_(False)
        model.draft.requires_grad_(True)
    pieces, held_out = read_pieces(args, tokenizer)
    train = BlockDataset(pieces, tokenizer, args.block_size, args.transpose) if args.steps else None
    return tokenizer, model, train, WindowDataset(held_out, tokenizer, args.block_size), None


def perceivers_parts(args: argparse.Namespace) -> Parts:
    """Segments up to the context's length, with the loss on the last `num_latents` tokens."""
    if args.context is None and not args.init_from:
        args.context = CONTEXT
    tokenizer, model = start(args, PerceiverSTokenizer, PerceiverSForCausalLM, {})
    pieces, held_out = read_pieces(args, tokenizer)
    sizes = (model.config.max_position_embeddings, model.config.num_latents)
    options = (args.segmentation, args.position_uniform, args.transpose, tokenizer)
    train = SegmentDataset(pieces, *sizes, *options) if args.steps else None
    return tokenizer, model, train, SequentialDataset(held_out, *sizes), SegmentCollator(tokenizer.pad_token_id)


PARTS = {"sage-music": sage_music_parts, "perceivers": perceivers_parts}


def start(
    args: argparse.Namespace,
    tokenizer_class: type[PreTrainedTokenizer],
    model_class: type[PreTrainedModel],
    tokenizer_options: dict,
) -> tuple[PreTrainedTokenizer, PreTrainedModel]:
    """Tokenizer and model from the options; what an option leaves out (None) is the class's own default."""
    if args.tokenizer or args.init_from:
        tokenizer = tokenizer_class.from_pretrained(args.tokenizer or args.init_from)
    else:
        tokenizer = tokenizer_class(**{name: value for name, value in tokenizer_options.items() if value is not None})
    shape = {field: getattr(args, name) for name, field in SHAPE.items() if getattr(args, name) is not None}
    if args.init_from:
        changes = ("max_position_embeddings", "num_latents", "num_mtp_layers")
        changed = {field: shape[field] for field in changes if field in shape}
        return tokenizer, model_class.from_pretrained(args.init_from, **changed)
    model = model_class(model_class.config_class(**tokenizer.config_fields(), **shape))
    model.generation_config.update(do_sample=True, temperature=TEMPERATURE, top_p=TOP_P, top_k=0)
    return tokenizer, model


def read_pieces(args: argparse.Namespace, tokenizer: PreTrainedTokenizer) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Token ids of the training pieces (none where steps are 0) and of the pieces to evaluate on."""
    splits = split_files(args.data, args.metadata, args.licences)
    used = ([] if args.steps == 0 else ["train"]) + [args.eval_split]
    pieces = {name: encode_files(splits[name], tokenizer, args.cache) for name in used}
    print({name: (len(p), sum(map(len, p))) for name, p in pieces.items()}, "files, tokens", file=sys.stderr)
    for name in used:
        if not pieces[name]:
            raise ValueError(f"{' '.join(args.data)}: no file for the {name} split.")
    # Whole pieces in an order that mixes the sources, and the same ones for every run and tokenization.
    order = np.random.default_rng(0).permutation(len(pieces[args.eval_split]))[: args.eval_pieces or None]
    return pieces.get("train", []), [pieces[args.eval_split][i] for i in order]


def main(argv: list[str] | None = None, parts: Callable[[argparse.Namespace], Parts] | None = None) -> int:
    """Run the command; an interrupted run goes on from its last checkpoint when called again.

    Args:
        parts: makes what is trained from the options, for a model of neither family (`sage-music`'s options hold).

    Returns the exit code: 0, or 2 where an argument, the data or a checkpoint is wrong.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        args.family = family_of(args)
        for family, names in OPTIONS.items():
            for name in names:
                if family != args.family and getattr(args, name) != parser.get_default(name):
                    raise ValueError(f"--{name.replace('_', '-')} is not an option of the family {args.family}.")
        return run(args, parts or PARTS[args.family])
    except (ValueError, OSError, StrictDataclassError) as error:
        print(f"train: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def family_of(args: argparse.Namespace) -> str:
    """The family's name: that of the checkpoint to start from, or the option's."""
    if not args.init_from:
        return args.family or "sage-music"
    model_type = PreTrainedConfig.get_config_dict(args.init_from)[0].get("model_type")
    family = str(model_type).replace("_", "-")
    if family not in OPTIONS:
        raise ValueError(f"{args.init_from}: model_type {model_type!r} is not one of {', '.join(OPTIONS)}.")
    if args.family not in (None, family):
        raise ValueError(f"{args.init_from} is a {family} checkpoint, not one of the family {args.family}.")
    return family


def run(args: argparse.Namespace, parts: Callable[[argparse.Namespace], Parts]) -> int:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    set_seed(args.seed)
    tokenizer, model, train, evaluation, collator = parts(args)
    drafting = getattr(args, "draft_tokens", None) is not None  # else a head that the checkpoint has learns beside it
    for name, field in SHAPE.items():
        setattr(args, name, getattr(model.config, field, None))  # for the report: what was trained

    def metrics(prediction) -> dict[str, float]:
        total = float(prediction.predictions.sum())
        return {"nats_per_note": total / evaluation.num_notes, "nats_per_token": total / evaluation.num_tokens}

    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=args.out,
            max_steps=args.steps,
            per_device_train_batch_size=args.batch_size,
            per_device_eval_batch_size=args.batch_size,
            gradient_accumulation_steps=args.gradient_accumulation,
            activation_checkpointing=args.gradient_checkpointing,
            learning_rate=args.learning_rate,
            weight_decay=0.1,
            adam_beta2=0.95,
            lr_scheduler_type="warmup_stable_decay",
            lr_scheduler_kwargs={"num_decay_steps": int(args.decay * args.steps)},
            warmup_steps=args.warmup,
            eval_strategy="steps",
            eval_steps=args.eval_every,
            save_strategy="steps",
            save_steps=args.eval_every,
            save_total_limit=2,
            load_best_model_at_end=not drafting,  # evaluation measures the model itself, which then stays as it is
            metric_for_best_model="nats_per_note",
            greater_is_better=False,
            logging_steps=50,
            bf16=args.bf16,
            use_cpu=not torch.cuda.is_available(),
            ddp_find_unused_parameters=False,
            seed=args.seed,
            report_to=[],
            disable_tqdm=not sys.stderr.isatty(),
        ),
        data_collator=collator,
        train_dataset=train,
        eval_dataset=evaluation,
        compute_metrics=metrics,
        preprocess_logits_for_metrics=getattr(model, "sum_of_nats", sum_of_nats),
    )
    best, seconds = Path(args.out) / "best", 0.0
    if args.steps:
        resume = any(Path(args.out).glob("checkpoint-*"))
        seconds = trainer.train(resume_from_checkpoint=resume).metrics["train_runtime"]
        model.config.use_cache = True  # Trainer turned it off for training
        trainer.save_model(best)
        if trainer.is_world_process_zero():
            tokenizer.save_pretrained(best)
    report = {**trainer.evaluate(), "parameters": model.num_parameters(), "steps": trainer.state.global_step}
    report["train_seconds"] = round(seconds, 1)  # of this call
    if trainer.is_world_process_zero():
        Path(args.out).mkdir(parents=True, exist_ok=True)
        (Path(args.out) / "report.json").write_text(json.dumps({**vars(args), **report}, indent=1) + "\n")
        print(json.dumps(report, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
