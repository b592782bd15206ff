"""Train SAGE-Music from scratch, or go on from a checkpoint, with the stock `Trainer`.

    python -m notekit.train --data my_midi --out runs/mine --steps 2000

On a CPU two processes of one thread each train almost twice as fast as one of two:
`OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 -m notekit.train ...`; `--batch-size` counts blocks per process.

`--data` is a folder of MIDI files: `train` and `validation` below it are used where they exist, otherwise every tenth
file (by a hash of its name) is held out. Quality is reported in nats per note, which compares tokenizations fairly: a
note costs what all tokens that spell it, its bar lines and programs cost together, divided by the number of notes.
"""

import argparse
import csv
import hashlib
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import Trainer, TrainingArguments, set_seed

from sage_music import SageMusicConfig, SageMusicForCausalLM, SageMusicTokenizer
from sage_music.data import BlockDataset, WindowDataset, encode_files, midi_files

from . import TEMPERATURE, TOP_P


def split_files(folders: list[str], metadata: str | None, licences: list[str] | None) -> dict[str, list[Path]]:
    """Files of all folders by split; `metadata` (columns `path`, `licence`) keeps some licences only."""
    allowed = None
    if metadata is not None:
        with open(metadata, newline="", encoding="utf-8") as file:
            root = Path(metadata).parent
            allowed = {(root / row["path"]).resolve() for row in csv.DictReader(file) if row["licence"] in licences}
    splits: dict[str, list[Path]] = {"train": [], "validation": [], "test": []}
    for folder in folders:
        for path in midi_files(folder):
            if allowed is not None and path.resolve() not in allowed:
                continue
            parts = path.relative_to(folder).parts
            if parts[0] in splits:
                name = parts[0]
            else:
                name = "validation" if hashlib.sha1(path.name.encode()).digest()[0] % 10 == 0 else "train"
            splits[name].append(path)
    return splits


def sum_of_nats(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """(B,) summed negative log-likelihood of each row, so that evaluation keeps one number a row, not the logits."""
    logits, labels = logits[:, :-1].float(), labels[:, 1:]
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, ignore_index=-100, reduction="none")
    return losses.sum(-1)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m notekit.train", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data", nargs="+", required=True, help="folders of MIDI files")
    add("--metadata", help="CSV with the columns path and licence, to keep some licences only")
    add(
        "--licences",
        nargs="+",
        default=["MIT", "CC0-1.0", "CC BY 4.0", "BSD-3-Clause", "Public Domain"],
        help="licences to keep, with --metadata (default: %(default)s)",
    )
    add("--out", required=True, help="run folder: checkpoints, log, and the best model in best/")
    add("--init-from", help="checkpoint to start from (default: new weights)")
    add("--tokenizer", help="folder of a saved SageMusicTokenizer (default: a new one from the options below)")
    add("--beat-resolution", type=int, default=12)
    add("--num-velocities", type=int, default=32)
    add("--program-every-note", action="store_true", help="Program tokens on every note instead of on change")
    add("--kv-routing", choices=("head", "token", "none"), default="head")
    add("--num-key-value-heads", type=int, default=1)
    add("--hidden-size", type=int, default=320)
    add("--intermediate-size", type=int, default=864)
    add("--layers", type=int, default=5)
    add("--heads", type=int, default=10)
    add("--context", type=int, default=2048, help="the model's context length, in tokens")
    add("--block-size", type=int, default=1024, help="tokens in a training block")
    add("--batch-size", type=int, default=8, help="blocks in a step")
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
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; an interrupted run goes on from its last checkpoint when called again.

    Returns the exit code: 0, or 2 where an argument, the data or a checkpoint is wrong.
    """
    args = build_parser().parse_args(argv)
    try:
        return run(args)
    except (ValueError, OSError, StrictDataclassError) as error:
        print(f"train: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def run(args: argparse.Namespace) -> int:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    set_seed(args.seed)
    if args.init_from or args.tokenizer:
        tokenizer = SageMusicTokenizer.from_pretrained(args.tokenizer or args.init_from)
    else:
        tokenizer = SageMusicTokenizer(
            beat_resolution=args.beat_resolution,
            num_velocities=args.num_velocities,
            program_changes=not args.program_every_note,
        )
    if args.init_from:
        model = SageMusicForCausalLM.from_pretrained(args.init_from)
    else:
        config = SageMusicConfig(
            **tokenizer.config_fields(),
            hidden_size=args.hidden_size,
            intermediate_size=args.intermediate_size,
            num_hidden_layers=args.layers,
            num_attention_heads=args.heads,
            num_key_value_heads=args.num_key_value_heads,
            kv_routing=args.kv_routing,
            max_position_embeddings=args.context,
        )
        model = SageMusicForCausalLM(config)
        model.generation_config.update(do_sample=True, temperature=TEMPERATURE, top_p=TOP_P, top_k=0)

    splits = split_files(args.data, args.metadata, args.licences)
    used = ([] if args.steps == 0 else ["train"]) + [args.eval_split]
    pieces = {name: encode_files(splits[name], tokenizer) for name in used}
    print({name: (len(p), sum(map(len, p))) for name, p in pieces.items()}, "files, tokens", file=sys.stderr)
    train = BlockDataset(pieces["train"], tokenizer, args.block_size, args.transpose) if args.steps else None
    # Whole pieces in an order that mixes the sources, and the same ones for every run and tokenization.
    order = np.random.default_rng(0).permutation(len(pieces[args.eval_split]))[: args.eval_pieces or None]
    evaluation = WindowDataset([pieces[args.eval_split][i] for i in order], tokenizer, args.block_size)

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
            load_best_model_at_end=True,
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
        train_dataset=train,
        eval_dataset=evaluation,
        compute_metrics=metrics,
        preprocess_logits_for_metrics=sum_of_nats,
    )
    best = Path(args.out) / "best"
    if args.steps:
        resume = any(Path(args.out).glob("checkpoint-*"))
        trainer.train(resume_from_checkpoint=resume)
        model.config.use_cache = True  # Trainer turned it off for training
        trainer.save_model(best)
        if trainer.is_world_process_zero():
            tokenizer.save_pretrained(best)
    report = {**trainer.evaluate(), "parameters": model.num_parameters(), "steps": trainer.state.global_step}
    if trainer.is_world_process_zero():
        Path(args.out).mkdir(parents=True, exist_ok=True)
        (Path(args.out) / "report.json").write_text(json.dumps({**vars(args), **report}, indent=1) + "\n")
        print(json.dumps(report, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
