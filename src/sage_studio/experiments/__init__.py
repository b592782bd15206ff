"""Studies of the source papers' claims, each a small description of arms, sizes and measures (`sage-music experiment`).

from sage_studio.experiments import STUDIES
from sage_studio.experiments.runner import run
result = run(STUDIES["as-kvhs"], "smoke", data="data", results="results")

This module has the command's options; it imports no torch.
"""

import argparse
import importlib.util
import sys
from pathlib import Path

from sage_studio.errors import MissingExtraError, install_hint
from sage_studio.reports import plotting

from . import as_kvhs, bpe, multi_scale, pooling, segmentation

STUDIES = {module.STUDY.name: module.STUDY for module in (as_kvhs, bpe, pooling, segmentation, multi_scale)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the `experiment` subcommand."""
    add = parser.add_argument
    add("name", choices=STUDIES, metavar="NAME", help=", ".join(STUDIES))
    add(
        "--scale", choices=("smoke", "cpu", "gpu"), default="cpu", help="minutes, an hour, a day (default: %(default)s)"
    )
    add("--data", type=Path, required=True, metavar="FOLDER", help="has multitrack/ and piano/, split, below it")
    add("--runs", type=Path, default=Path("runs/experiments"), help="checkpoints and music (default: %(default)s)")
    results = "tables and pictures (default: %(default)s)"
    add("--results", type=Path, default=Path("model_cards/results"), help=results)
    add("--workers", type=int, help="models trained at a time, one thread each (default: as many as CPUs)")


def run_command(args: argparse.Namespace) -> dict:
    """What the subcommand does: runs the study, prints its report where no JSON is asked for. Returns the result.

    Raises:
        MissingExtraError: accelerate or matplotlib is not installed; nothing has been done then.
        ValueError, OSError, StudyError: as `sage_studio.experiments.runner.run`.
    """
    # Before an hour of training, and before the runner, whose imports need `Trainer`.
    if importlib.util.find_spec("accelerate") is None:
        command = install_hint("accelerate", "datasets", "tensorboard", "matplotlib")
        raise MissingExtraError(f"studies train models, with accelerate: {command}.")
    plotting()

    from .runner import run

    def say(line: str) -> None:
        print(line, file=sys.stderr)

    result = run(STUDIES[args.name], args.scale, args.data, args.runs, args.results, args.workers, say)
    if not args.json:
        print(Path(result["files"][0]).read_text(encoding="utf-8"))
        print(f"wrote {', '.join(result['files'])}")
    return result


__all__ = ["STUDIES", "add_arguments", "run_command"]
