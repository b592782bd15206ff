"""Continuations against the true ones: NMSI of checkpoints and of folders of MIDI files (`sage-music evaluate`).

records = continuation_scores(CheckpointWriter("sage-music"), files, out="out/scores")

Conventions: those of `evaluate`. The first `prompt_bars` bars of a piece are the prompt, and the next `bars`
bars are compared, on each file's own bars; where bars mean nothing to a system (a PerceiverS counts seconds), the
prompt ends at the reference's bar line and the same seconds are compared.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from symusic import Score

from sage_studio.defaults import BARS, PROMPT_BARS
from sage_studio.files import Journal, seed_of
from sage_studio.metrics import bar_grid, nmsi
from sage_studio.metrics.continuation import sixteenths
from sage_studio.music.midi import notes_from_score, write_midi
from sage_studio.reports import plotting

from . import report
from .pieces import (
    NUM,
    OUT,
    by_key,
    choose_prompts,
    cut_prompt,
    differences,
    digests,
    failure,
    finish,
    interval,
    read_quietly,
    write_kept,
)
from .systems import CheckpointWriter, FolderReader, find_systems, match_files

PARTS = ("nmsi", "chroma", "groove", "self_similarity", "note_density")
ANOTHER, REPEATED = "another human piece", "the prompt repeated"
TRUTH = "the true bars"


def continuation_scores(
    write: Callable,
    files: "Sequence[str | os.PathLike] | Mapping[str, str | os.PathLike]",
    prompt_bars: int = PROMPT_BARS,
    bars: int = BARS,
    seed: int = 0,
    out: str | os.PathLike | None = None,
    *,
    settings: dict | None = None,
    performed: bool = False,
    continuation_only: bool = False,
    workers: int | None = 1,
    label: str = "continuing",
) -> list[dict]:
    """NMSI of the continuations that `write` makes of the first `prompt_bars` bars of each file: a record a file.

    Args:
        write: `write(path, seed)` returns the prompt and its continuation as a `symusic.Score`, or a
            `generation.result.Piece`; what it raises makes the piece a failure. With several workers it is
        pickled. files: reference pieces of at least `prompt_bars + bars` bars (`choose_prompts` finds them), by key or
        a list. out: folder that keeps the continuations (`midi/`) and records; None keeps nothing.
        settings: what else the results depend on (which checkpoint): results of other settings are refused.
        performed: the continuations' own bars mean nothing: compare the same seconds as the reference's bars take.
        continuation_only: they begin where the prompt ends, at time 0.
        workers: as for `sage_studio.evaluate.pieces.each`.

    Records: `piece`, `seed`, `failed` (reason or None), `nmsi` and its parts (0 where it failed), `notes` (in the bars
    compared), `new_notes` and `elapsed_s` of the generation, `remarks`, `midi` (in `out`).

    Raises:
        ValueError: `out` keeps results of other settings.
        InvalidMidiError: a reference cannot be read.
    """
    if not isinstance(files, Mapping):
        files = by_key(files)
    shape = {"prompt_bars": prompt_bars, "bars": bars, "performed": performed, "continuation_only": continuation_only}
    kept = None if out is None else _keep(out, seed, shape, settings)
    work = partial(_continue_one, write, seed=seed, folder=None if kept is None else str(kept.folder), **shape)
    sources = None if kept is None else digests(files)
    return finish(kept, {key: (key, str(path)) for key, path in files.items()}, work, workers, label, sources)


def _keep(out: str | os.PathLike, seed: int, shape: dict, settings: dict | None) -> Journal:
    return Journal(out, {"task": "continuation", "seed": seed, **shape, **(settings or {})})


def _continue_one(
    write: Callable,
    key: str,
    path: str,
    *,
    seed: int,
    folder: str | None,
    prompt_bars: int,
    bars: int,
    performed: bool,
    continuation_only: bool,
) -> dict:
    reference = read_quietly(path)
    grid = bar_grid(reference, prompt_bars, bars)
    record = {"piece": key, "seed": seed_of(seed, key), "failed": None, **dict.fromkeys(PARTS, 0.0), "notes": 0}
    try:
        score = write_kept(write, (path, record["seed"]), folder, record)
        own = compared_grid(score, grid, prompt_bars, performed, continuation_only)
        notes = notes_from_score(score)
        record |= nmsi(notes, notes_from_score(reference), own, grid)
        record["notes"] = int((sixteenths(notes, own) >= 0).sum())
    except Exception as error:  # of any system's code: one piece must not end a run of hours, and is counted
        record["failed"] = failure(error)
    return record


def compared_grid(
    score: Score, reference_grid: np.ndarray, prompt_bars: int, performed: bool, continuation_only: bool
) -> np.ndarray:
    """The grid on which a continuation is compared with the reference's; options as for `continuation_scores`."""
    if performed:
        return reference_grid - reference_grid[0] if continuation_only else reference_grid
    return bar_grid(score, 0 if continuation_only else prompt_bars, (len(reference_grid) - 1) // 16)


def evaluate_continuations(
    systems: "Sequence[str | os.PathLike] | Mapping[str, str | os.PathLike]",
    data: Sequence[str | os.PathLike],
    *,
    out: str | os.PathLike = f"{OUT}/continuation",
    num: int = NUM,
    prompt_bars: int = PROMPT_BARS,
    bars: int = BARS,
    seed: int = 0,
    split: str | None = "test",
    performed: bool = False,
    continuation_only: bool = False,
    write_prompts: str | os.PathLike | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    device: str = "cpu",
    workers: int | None = None,
    plots: bool = True,
) -> dict:
    """NMSI of every system over the same prompts, between two reference rows; writes `report.md`, `report.json`, plots.

    The reference rows score *another human piece* (the true bars of the next prompt's piece, on its own bars; it may be
    the same work in another performance where the data holds such) and *the prompt repeated* (its bars over and over).

    Args:
        systems: checkpoints and folders (see `evaluate.pieces.find_systems`). A folder continues `piece.mid` in
            a file of the same path below it, or else of the same name.
        data: folders of reference pieces; see `choose_prompts` for `num`, `seed` and `split`.
        performed, continuation_only: of the folders, as for `continuation_scores`; a PerceiverS is `performed`.
        write_prompts: folder to write the prompts to, as MIDI files, for other systems.
        temperature, top_p, device: of the checkpoints' generation.
        plots: draw distributions, and one piece's notes and self-similarity.

    Raises:
        FileNotFoundError, ValueError: no usable piece, a system that is none, an option outside its range.
        MissingExtraError: `plots` without matplotlib.
    """
    if plots:
        plotting()  # before hours of work: matplotlib may be missing
    files, skipped = choose_prompts(data, num, prompt_bars, bars, seed, split)
    found = find_systems(systems, (ANOTHER, REPEATED, TRUTH))
    if not found and write_prompts is None:
        raise ValueError("systems: name a checkpoint or a folder of MIDI files, or write_prompts for one.")
    shape = {"prompt_bars": prompt_bars, "bars": bars}
    jobs = []  # a system, what writes its music, where that is kept, options of `continuation_scores`
    for system in found:
        if system.family is None:
            write, home = FolderReader(match_files(system.source, files)), None
            options = {"performed": performed, "continuation_only": continuation_only, "workers": 1}
        else:
            sampling = {"temperature": temperature, "top_p": top_p}
            write, home = CheckpointWriter(system.source, **shape, **sampling, device=device), system.home(out)
            by_seconds = {"performed": not system.family.counts_bars, "continuation_only": False}
            options = {**by_seconds, "workers": workers, "settings": {"weights": system.fingerprint, **sampling}}
            _keep(home, seed, {**shape, **by_seconds}, options["settings"])
        jobs.append((system, write, home, options))
    if write_prompts is not None:
        for key, path in files.items():
            write_midi(Path(write_prompts) / Path(key).with_suffix(".mid"), cut_prompt(read_quietly(path), prompt_bars))
    records = {
        system.label: continuation_scores(write, files, **shape, seed=seed, out=home, label=system.label, **options)
        for system, write, home, options in jobs
    }
    kinds = {system.label: system.family.model_type if system.family else "folder" for system in found}
    records |= _reference_scores(files, prompt_bars, bars)
    values = {label: {record["piece"]: record["nmsi"] for record in of_label} for label, of_label in records.items()}
    result = {
        "task": "continuation",
        "settings": {
            "data": [str(folder) for folder in data],
            "split": split,
            "seed": seed,
            **shape,
            "temperature": temperature,
            "top_p": top_p,
            "performed": performed,
            "continuation_only": continuation_only,
        },
        "rows": [_row(label, kinds.get(label, "reference"), of_label) for label, of_label in records.items()],
        "differences": differences(values, list(kinds)),
        "remarks": [] if len(files) == num else [f"only {len(files)} of {num} prompts: the data holds no more."],
        "skipped": skipped,
        "pieces": records,
    }
    pictures = {}
    if plots:
        example, music = _example(jobs, files, records, prompt_bars, bars)
        pictures["distributions.png"] = report.draw_scores(records, PARTS)
        pictures["self_similarity.png"] = report.draw_similarity(music, example)
        pictures["piano_rolls.png"] = report.draw_rolls(music, example)
    return report.write_report(result, out, pictures)


def _reference_scores(files: Mapping[str, Path], prompt_bars: int, bars: int) -> dict[str, list[dict]]:
    """Records of the two reference rows."""
    truths, loops = [], []
    for path in files.values():
        score = read_quietly(path)
        notes, grid = notes_from_score(score), bar_grid(score, 0, prompt_bars)
        truths.append((notes, bar_grid(score, prompt_bars, bars)))
        loops.append(_looped(notes, grid, bars))
    others = truths[1:] + truths[:1]  # the order is drawn by the seed, so the next piece is any other piece
    return {
        name: [
            {"piece": key, "failed": None, "notes": int((sixteenths(music, own) >= 0).sum()), **nmsi(music, *rest)}
            for key, (music, own), (truth, grid) in zip(files, made, truths, strict=True)
            for rest in [(truth, own, grid)]
        ]
        for name, made in ((ANOTHER, others), (REPEATED, loops))
    }


def _looped(notes: np.ndarray, grid: np.ndarray, bars: int) -> tuple[np.ndarray, np.ndarray]:
    """The grid's music over and over for `bars` bars, and its grid; times count sixteenths from 0."""
    where = sixteenths(notes, grid)
    once = notes[where >= 0].copy()
    once["onset_s"], length = where[where >= 0], len(grid) - 1
    loops = [once.copy() for _ in range(-(-16 * bars // length))]
    for index, loop in enumerate(loops):
        loop["onset_s"] += index * length
    return np.concatenate(loops), np.arange(16 * bars + 1.0)


def _row(label: str, kind: str, records: list[dict]) -> dict:
    """A system's line of the table, as JSON."""
    scored = [record for record in records if record["failed"] is None]
    elapsed_s = sum(record.get("elapsed_s", 0.0) for record in scored) if kind not in ("reference", "folder") else 0.0
    return {
        "system": label,
        "kind": kind,
        "n": len(records),
        "failed": len(records) - len(scored),
        "empty": sum(not record["notes"] for record in scored),
        "valid": sum(bool(record["notes"]) for record in scored) / len(records),
        **{part: interval([record[part] for record in records]) for part in PARTS},
        "nmsi_without_failures": interval([record["nmsi"] for record in scored]),
        "notes_per_second": sum(record["new_notes"] for record in scored) / elapsed_s if elapsed_s else None,
    }


def _example(
    jobs: list[tuple], files: Mapping[str, Path], records: Mapping[str, list[dict]], prompt_bars: int, bars: int
) -> tuple[str, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """The first piece that all systems continued (or just the first): its key, and per row notes and compared grid."""
    good = {key: [] for key in files}
    for job in jobs:
        for record in records[job[0].label]:
            if record["failed"] is None:
                good[record["piece"]].append((*job, record))
    key = max(good, key=lambda name: len(good[name]))
    truth = read_quietly(files[key])
    grid = bar_grid(truth, prompt_bars, bars)
    music = {TRUTH: (notes_from_score(truth), grid)}
    for system, write, home, options, record in good[key]:
        score = write(files[key], 0) if home is None else read_quietly(home / record["midi"])
        own = compared_grid(score, grid, prompt_bars, options["performed"], options["continuation_only"])
        music[system.label] = (notes_from_score(score), own)
    return key, music
