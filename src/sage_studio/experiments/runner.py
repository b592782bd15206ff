"""Runs a study: trains its arms, measures them, compares the speeds, writes the tables.

result = run(STUDIES["as-kvhs"], "smoke", data="data", runs="runs", results="results")

Everything finished is kept in `runs` and taken from there: an interrupted study goes on when called again, training
from its last checkpoint, and studies share the runs that they have in common.
"""

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from sage_studio.evaluate.pieces import each
from sage_studio.reports import machine

from .measures import MEASURES, SPEEDS, compared, measured, skipped_prompts
from .report import write_report
from .study import Run, Study, runs_of
from .training import prepare, train


def run(
    study: Study,
    scale: str,
    data: str | os.PathLike,
    runs: str | os.PathLike = "runs/experiments",
    results: str | os.PathLike | None = "model_cards/results",
    workers: int | None = None,
    say: Callable[[str], None] | None = None,
) -> dict:
    """Train and measure a study's arms at a scale, and write `experiment-NAME-SCALE.{md,json,png}` into `results`.

    Args:
        data: folder with the corpora `multitrack` and `piano`, each with `train`, `validation` and `test`.
        runs: folder that keeps checkpoints, music and measures.
        results: None writes no report.
        workers: arms at a time, each in a process of one thread (default: as many as CPUs).
        say: gets a line when a step of the study begins.

    Returns the result that the JSON file holds.

    Raises:
        ValueError: an unknown scale.
        FileNotFoundError: `data` lacks a corpus.
        StudyError: a training failed, naming its log.
    """
    if scale not in study.scales:
        raise ValueError(f"{study.name} has no scale {scale!r}: it has {', '.join(study.scales)}.")
    data, runs = Path(data), Path(runs)
    say = say or (lambda line: None)
    chosen, sizes = runs_of(study, scale, runs), study.scales[scale].measures
    say(f"{study.title}, {scale}: {len(chosen)} runs")
    prepare(chosen, data, runs / "cache")
    own = {name: options for name, options in sizes.items() if name in MEASURES}
    work = partial(_train_and_measure, data=data, cache=runs / "cache", measures=own)
    records: dict[str, dict] = dict(each(work, {str(run.folder): (run,) for run in chosen}, workers, study.name))
    result = {
        "study": study.name,
        "scale": scale,
        "machine": machine(),
        "options": study.scales[scale].options,
        "sizes": sizes,
        "arms": {
            name: {"options": arm.options, "corpus": arm.corpus, "baseline": study.baseline_of(name)}
            for name, arm in study.arms.items()
        },
        "runs": [{"arm": run.arm, "seed": run.seed, **records[str(run.folder)]} for run in chosen],
    }
    result["skipped"] = _skipped(chosen, records, data, sizes)
    first = {run.arm: run for run in chosen if run.seed == 0}
    for name in [name for name in sizes if name in SPEEDS]:
        say(f"speed of {name}")
        result[name] = compared(name, first, data, sizes[name], runs)
    if results is not None:
        result["files"] = [str(path) for path in write_report(study, result, Path(results))]
    return result


def _train_and_measure(run: Run, *, data: Path, cache: Path, measures: dict[str, dict]) -> dict:
    train(run, data, cache)
    report = json.loads((run.folder / "report.json").read_text(encoding="utf-8"))
    found = {name: measured(run, name, data, options) for name, options in measures.items()}
    return {"parameters": report["parameters"], "train_elapsed_s": report["train_elapsed_s"], **found}


def _skipped(chosen: list[Run], records: dict[str, dict], data: Path, sizes: dict[str, dict]) -> dict[str, dict]:
    """By corpus, the test pieces that were passed over, as prompts or among the human ones, and why."""
    found: dict[str, dict] = {run.corpus: {} for run in chosen}
    for corpus, skipped in found.items():
        for name in [name for name in ("continuation", "writing") if name in sizes]:
            skipped |= skipped_prompts(data, corpus, sizes[name])
    for run in chosen:
        found[run.corpus] |= records[str(run.folder)].get("sets", {}).get("skipped", {})
    return {corpus: skipped for corpus, skipped in found.items() if skipped}
