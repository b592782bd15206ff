"""Options of training: ours as dataclasses, and all of `TrainingArguments` with defaults that suit each family."""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from transformers import HfArgumentParser, TrainingArguments
from transformers.hf_argparser import HfArg

from sage_studio.defaults import BARS
from sage_studio.families import SAGE_MUSIC, Family

# Defaults of `TrainingArguments`, beside a family's own; what is given on the command line comes before them.
RECIPE = {
    "max_steps": 200,  # minutes on two cores, and enough for a folder of one style
    "lr_scheduler_type": "cosine",
    "warmup_steps": 20,
    "weight_decay": 0.1,
    "adam_beta2": 0.95,
    "eval_strategy": "steps",
    "eval_on_start": True,  # what there was to improve
    "eval_steps": 100,
    "save_steps": 100,
    "save_total_limit": 2,
    "load_best_model_at_end": True,
    "metric_for_best_model": "nats_per_note",
    "greater_is_better": False,
    "logging_steps": 10,
    "include_num_input_tokens_seen": True,
    "report_to": ["tensorboard"],
    # The datasets shuffle themselves, by the seed and the epoch alone: so a resumed run, or one on another number of
    # processes, sees the same items. Accelerate tells a dataset its epoch only under this sampler.
    "train_sampling_strategy": "sequential",
    "ddp_find_unused_parameters": False,
    "label_names": ["labels"],
    "seed": 0,
}


@dataclass
class ModelArguments:
    """What to train, and how much of it."""

    model: str = HfArg(
        default="sage-music",
        help="sage-music or perceivers (the bundled checkpoints), a checkpoint folder, a Hub name, or a .json file "
        "with the fields of a new model's config, model_type among them",
    )
    tokenizer: str | None = HfArg(
        default=None, help="folder of a saved tokenizer (default: the checkpoint's, or a new one)"
    )
    config: list[str] = HfArg(
        default_factory=list,
        help="fields of the config to change, as in max_position_embeddings=4096; of a new model, any of them",
    )
    draft_tokens: int | None = HfArg(
        default=None, help="train only a draft head that guesses so many tokens (SAGE-Music; generate(use_mtp=True))"
    )
    lora_rank: int | None = HfArg(
        default=None, help="train LoRA adapters of this rank and leave the weights (needs peft)"
    )
    lora_alpha: float | None = HfArg(default=None, help="scale of the adapters (default: twice the rank)")
    lora_dropout: float = HfArg(default=0.0, help="dropout before the adapters")


@dataclass
class DataArguments:
    """What to train on."""

    data: list[str] = HfArg(
        default_factory=list,
        help="folders of MIDI files (train/, validation/ below are used), a folder of `prepare`, a Hub dataset",
    )
    metadata: str | None = HfArg(default=None, help="CSV: path, and licence, composition_key where there are any")
    licences: list[str] | None = HfArg(default=None, help="keep only files of these licences, by --metadata")
    held_out: float | None = HfArg(
        default=None, help="share of the files for validation, where no folder says which (default: 0.1)"
    )
    cache: str | None = HfArg(
        default=None, help="folder that keeps the files' tokens (default: below HF_DATASETS_CACHE)"
    )
    workers: int | None = HfArg(default=None, help="processes that read files (default: as many as CPUs)")
    time_limit: float = HfArg(default=20.0, help="seconds a file may take; it is skipped then")
    size_limit: int = HfArg(default=10_000_000, help="bytes a file may have; it is skipped otherwise")
    streaming: bool = HfArg(
        default=False, help="read the shards of `prepare` in a stream: memory stays the same however many"
    )
    shuffle_buffer: int = HfArg(default=1000, help="pieces shuffled at a time when streaming")
    block_size: int | None = HfArg(default=None, help="SAGE-Music: tokens in a training block (default: 1024)")
    segmentation: str | None = HfArg(
        default=None,
        help="PerceiverS: which segments to train on (default: effective)",
        metadata={"choices": ("effective", "baseline")},
    )
    position_uniform: bool | None = HfArg(
        default=None, help="PerceiverS: train every position of a piece equally often (default: yes)"
    )
    transpose: int = HfArg(default=6, help="largest random transposition, in semitones")
    tempo: float = HfArg(default=0.0, help="largest random change of tempo: 0.1 is up to 10 %% faster or slower")
    velocity: int = HfArg(default=0, help="largest random shift of velocities")
    track_dropout: float = HfArg(default=0.0, help="SAGE-Music: probability that an instrument is left out of a block")
    eval_pieces: int | None = HfArg(
        default=None, help="pieces to evaluate on, whole; 0: all (default: 60; PerceiverS: 12)"
    )
    eval_split: str = HfArg(
        default="validation", help="split to evaluate on", metadata={"choices": ("validation", "test")}
    )


@dataclass
class WatchArguments:
    """What to look at on the way."""

    sample_steps: int | None = HfArg(
        default=None, help="steps between samples, MIDI and picture (default: --eval_steps; 0: none)"
    )
    num_samples: int = HfArg(default=2, help="samples at a time")
    sample_bars: int = HfArg(default=BARS // 2, help="bars of a sample (PerceiverS: as many times 2 seconds)")
    early_stopping_patience: int | None = HfArg(default=None, help="end after so many evaluations that were no better")


def build_parser(family: Family) -> HfArgumentParser:
    """All options, those of `TrainingArguments` with the family's defaults; `--output` is `--output_dir`."""
    kinds = (ModelArguments, DataArguments, WatchArguments, TrainingArguments)
    parser = HfArgumentParser(
        kinds,
        prog="sage-music train",
        description="Fine-tune a checkpoint, or train a new model, on MIDI files, with every argument of Transformers' "
        "TrainingArguments. An interrupted run goes on when the same command is called again.",
        allow_abbrev=False,
    )
    for action in parser._actions:
        if action.dest in ("data", "output_dir"):
            action.required = True
    own = {field.name for kind in kinds[:-1] for field in fields(kind)}
    recipe = {**RECIPE, **family.recipe, "use_cpu": not torch.accelerator.is_available()}
    recipe["disable_tqdm"] = not sys.stderr.isatty()
    parser.set_defaults(**{name: value for name, value in recipe.items() if name not in own})
    return parser


def parse(
    argv: Sequence[str], family_of: Callable[[str], Family]
) -> tuple[ModelArguments, DataArguments, WatchArguments, TrainingArguments]:
    """Options of a command line; `family_of` says of `--model` whose defaults hold.

    Raises:
        ValueError: arguments that contradict each other, as `TrainingArguments` says.
    """
    argv = [f"--output_dir{text[8:]}" if text.split("=")[0] == "--output" else text for text in argv]
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--model", default=ModelArguments.model)
    model = early.parse_known_args(argv)[0].model
    asks_help = {"-h", "--help"} & set(argv)
    parser = build_parser(SAGE_MUSIC if asks_help else family_of(model))
    parser.set_defaults(
        **_implied({text[2:].split("=")[0].replace("-", "_") for text in argv if text[:2] == "--"}, argv)
    )
    *options, rest = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True, look_for_args_file=False)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return tuple(options)


def _implied(given: set[str], argv: list[str]) -> dict:
    """Defaults that other arguments change: what is given alone must not end in a contradiction with a default."""

    def value(name: str) -> str | None:
        found = None
        for index, text in enumerate(argv):
            flag, _, own = text.partition("=")
            if flag[2:].replace("-", "_") == name:
                found = own or (argv[index + 1] if index + 1 < len(argv) else None)
        return found

    implied: dict = {}
    if "num_train_epochs" in given and "max_steps" not in given:
        implied["max_steps"] = -1
    for one, other in (("eval_steps", "save_steps"), ("eval_strategy", "save_strategy")):
        for name, twin in ((one, other), (other, one)):
            if name in given and twin not in given:
                implied[twin] = value(name)
    if value("save_strategy") in ("no", "best"):
        implied.pop("eval_strategy", None)
    if value("eval_strategy") == "no":
        implied.pop("save_strategy", None)
    if "no" in (value("eval_strategy"), value("save_strategy")):
        implied["load_best_model_at_end"] = False
    if value("max_steps") is not None and str(value("max_steps")).isdigit():
        # A run that is shorter than the default interval is still evaluated and saved once.
        steps = int(value("max_steps"))
        for name in ("eval_steps", "save_steps"):
            if name not in given and name not in implied and 0 < steps < RECIPE[name]:
                implied[name] = steps
        if "warmup_steps" not in given and steps < 10 * RECIPE["warmup_steps"]:
            implied["warmup_steps"] = steps // 10
    return {
        name: float(text) if name in ("eval_steps", "save_steps") else text
        for name, text in implied.items()
        if text is not None
    }
