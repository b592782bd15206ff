"""The `bench` subcommand: its options, and which benchmark they ask for."""

import argparse
import sys
from functools import partial
from pathlib import Path

from sage_studio.families import PERCEIVERS, family_of, flag
from sage_studio.generation.options import positive_int
from sage_studio.music.midi import read_prompt
from sage_studio.reports import plotting

# Options of SAGE-Music's benchmarks alone.
OWN = ("shape", "batch", "models", "device", "prompt", "training", "trainer", "figure", "saved")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the subcommand, beside the model and the threads."""
    add = parser.add_argument
    add("--contexts", type=positive_int, nargs="+", help="default: 512 2048 8192; PerceiverS: 2048 8192 32768")
    add("--tokens", type=positive_int, help="tokens decoded a round (default: 128; PerceiverS: 48)")
    add("--rounds", type=positive_int, default=3, help="interleaved rounds (default: %(default)s)")
    add = parser.add_argument_group("SAGE-Music").add_argument
    add("--shape", choices=("small", "medium"), help="the checkpoint's (default); 12 layers of width 768, random")
    add("--batch", type=positive_int, nargs="+", help="batch sizes (default: 1 16; with --training 2)")
    add("--models", nargs="+", help="some of full gqa mqa ours compiled bf16 int8 int8-compiled draft int8-draft ...")
    add("--device", choices=("cpu", "cuda"), help="default: cpu")
    add("--prompt", type=Path, metavar="FILE.mid", help="the checkpoint's prompts continue it (default: from nothing)")
    add("--training", action="store_true", default=None, help="instead: a training step, against a Llama of equal size")
    add("--trainer", action="store_true", default=None, help="instead: the stock Trainer, against a bare PyTorch loop")
    add("--figure", type=Path, metavar="FILE.png", help="draw speed and cache memory against the context")
    add("--from", dest="saved", type=Path, metavar="FILE.json", help="measure nothing: show what --json printed before")
    group = parser.add_argument_group("PerceiverS (fixed shapes, random weights)").add_mutually_exclusive_group()
    group.add_argument("--paper", action="store_true", help="instead: speed and memory at the paper's size")
    group.add_argument("--memory", action="store_true", help="instead: memory of a training step at the default size")


def run(args: argparse.Namespace) -> dict:
    """Measure, and print tables where no JSON is asked for. Returns what was measured.

    Raises:
        ValueError: options that do not go together, or of another family.
        MissingExtraError: a figure is asked for, and matplotlib is not installed.
    """
    if args.model == PERCEIVERS.checkpoint:  # no checkpoint is read
        return _perceivers(args)
    if args.paper or args.memory:
        raise ValueError(f"--{'paper' if args.paper else 'memory'} is an option of PerceiverS: add --model perceivers.")
    if args.training and args.figure:
        raise ValueError("--figure shows decoding: it does not go with --training.")
    from .tables import figure, load_result, table

    if args.trainer:
        return _trainer(args)
    if args.figure:
        plotting()  # before minutes of measuring: matplotlib may be missing
    if args.saved:
        result = load_result(args.saved)
    else:
        from sage_studio.checkpoints import load

        if args.prompt:
            read_prompt(args.prompt)
        model, tokenizer = load(args.model)
        if not family_of(model).counts_bars:
            return _perceivers(args)
        result = _sage_music(args, model, tokenizer)
    if args.figure:
        figure(result, args.figure)
    if not args.json:
        print(table(result))
        if args.figure:
            print(f"\nwrote {args.figure}")
    return result


def _refuse(args: argparse.Namespace, names: tuple[str, ...], why: str) -> None:
    for name in names:
        if getattr(args, name) is not None:
            raise ValueError(f"{flag('from' if name == 'saved' else name)} {why}.")


def _trainer(args: argparse.Namespace) -> dict:
    own = ("tokens", "shape", "models", "device", "prompt", "training", "figure", "saved")
    _refuse(args, own, "does not go with --trainer")
    from sage_studio.checkpoints import load

    from .trainer import compare_trainer, table

    model, tokenizer = load(args.model)
    if not family_of(model).counts_bars:
        raise ValueError("--trainer measures a SAGE-Music checkpoint; this one is PerceiverS.")
    sizes = {"context": (args.contexts or [1024])[0], "batch": (args.batch or [4])[0]}
    result = compare_trainer(model, tokenizer, rounds=args.rounds, **sizes)
    if not args.json:
        print(table(result))
    return result


def _sage_music(args: argparse.Namespace, model, tokenizer) -> dict:
    from .decoding import compare, compare_training

    names = {"contexts": "contexts", "shape": "shape", "batches": "batch", "device": "device"}
    if args.training:
        _refuse(args, ("tokens", "models", "prompt"), "is about decoding: it does not go with --training")
        measure = compare_training
    else:
        names |= {"tokens": "tokens", "models": "models", "prompt": "prompt"}
        measure = partial(compare, say=lambda line: print(line, file=sys.stderr) if sys.stderr.isatty() else None)
    given = {name: getattr(args, option) for name, option in names.items() if getattr(args, option) is not None}
    return measure(model, tokenizer, rounds=args.rounds, **given)


def _perceivers(args: argparse.Namespace) -> dict:
    _refuse(args, OWN, "is an option of SAGE-Music; this is PerceiverS")
    from .perceivers import CONTEXTS, compare, in_fresh_process, paper_size, table, training_memory

    if args.paper or args.memory:
        result = in_fresh_process(paper_size if args.paper else training_memory)
    else:
        result = compare(args.contexts or CONTEXTS, args.tokens or 48, args.rounds)
    if not args.json:
        print(table(result))
    return result
