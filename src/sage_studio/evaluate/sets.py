"""Unprompted pieces against human pieces, set against set, and each piece by itself (`sage-music evaluate --task set`).

records = generated_set(CheckpointWriter("perceivers", music_s=60), num=100, out="out/pieces")

Conventions: those of `sage_studio.evaluate`. A continuation's reference rows have no counterpart here, where nothing is
continued. Instead the human pieces are compared with themselves, one random half with the other: no system can be
expected to come closer to them (where a work is there in several performances, halves share works and lie closer
still). What fails leaves the set, for there is no feature of a piece that is not there; it is
counted and listed.

Intervals of OA come from random half samples (McCarthy 1966): the standard deviation of a statistic over halves drawn
without replacement from both sets estimates its own standard error. A bootstrap would draw pieces twice, and a piece's
distance of 0 to itself is none that music has.
"""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np

from sage_studio.defaults import BARS, MUSIC_S
from sage_studio.errors import InvalidMidiError
from sage_studio.files import Journal, midi_files, seed_of
from sage_studio.metrics import bar_grid, bootstrap_difference, describe_piece, steady_grid
from sage_studio.metrics.densities import MODES
from sage_studio.metrics.sets import FEATURES, bar_seconds, compare_sets, feature_densities, set_features
from sage_studio.music.midi import bar_times, notes_from_score
from sage_studio.music.notes import end_s
from sage_studio.reports import plotting

from . import report
from .pieces import (
    NUM,
    OUT,
    by_key,
    corpus_files,
    cut_notes,
    each,
    failure,
    failures,
    finish,
    interval,
    read_quietly,
    reason,
    shuffled,
    write_kept,
)
from .systems import CheckpointWriter, find_systems

HUMAN, HALVES = "human pieces", "human halves"
HALF_SAMPLES = 20
STEADY_BAR_S = 2.0
MOMENTS = ("reference_mean", "reference_std", "generated_mean", "generated_std")


def generated_set(
    write: Callable,
    num: int,
    seed: int = 0,
    out: str | os.PathLike = f"{OUT}/set/pieces",
    *,
    settings: dict | None = None,
    workers: int | None = 1,
    label: str = "writing",
) -> list[dict]:
    """`num` pieces from nothing, kept in `out`: a record a piece. `write(None, seed)` as for `continuation_scores`.

    Records: `piece`, `seed`, `failed` (reason or None), `new_notes`, `elapsed_s`, `remarks`, `midi` (in `out`).

    Raises:
        ValueError: `num` is not positive, or `out` keeps results of other settings.
    """
    if num < 1:
        raise ValueError(f"num is {num}; it must be positive.")
    kept = _keep(out, seed, settings)
    items = {f"{index:05}": (f"{index:05}",) for index in range(1, num + 1)}
    return finish(kept, items, partial(_write_one, write, seed=seed, folder=str(kept.folder)), workers, label)


def _keep(out: str | os.PathLike, seed: int, settings: dict | None) -> Journal:
    return Journal(out, {"task": "set", "seed": seed, **(settings or {})})


def _write_one(write: Callable, key: str, *, seed: int, folder: str) -> dict:
    record = {"piece": key, "seed": seed_of(seed, key), "failed": None}
    try:
        write_kept(write, (None, record["seed"]), folder, record)
    except Exception as error:  # of any system's code: one piece must not end a run of hours, and is counted
        record["failed"] = failure(error)
    return record


def measured_set(
    files: "Sequence[str | os.PathLike] | Mapping[str, str | os.PathLike]",
    mode: str = "corrected",
    cut_s: float | None = None,
    performed: bool = False,
    workers: int | None = 1,
    label: str = "measuring",
) -> list[dict]:
    """What every file is like: a record a file, with `piece`, `failed`, `features` (arrays) and `figures` (numbers).

    Args:
        mode: of `set_features`.
        cut_s: look at the first so many seconds only; notes that sound there end there.
        performed: bars mean nothing: take bars of 2 s.

    Raises:
        ValueError: `cut_s` is not positive.
    """
    if cut_s is not None and not 0 < cut_s < math.inf:
        raise ValueError(f"cut_s is {cut_s}; it must be a positive number.")
    if not isinstance(files, Mapping):
        files = by_key(files)
    work = partial(_measure, mode=mode, cut_s=cut_s, performed=performed)
    return finish(None, {key: (key, str(path)) for key, path in files.items()}, work, workers, label)


def _measure(key: str, path: str, *, mode: str, cut_s: float | None, performed: bool) -> dict:
    try:
        score = read_quietly(path)
    except InvalidMidiError as error:
        return {"piece": key, "failed": reason(error, path)}
    notes = cut_notes(notes_from_score(score), cut_s)
    if not len(notes):
        return {"piece": key, "failed": f"it is silent for its first {cut_s:g} s"}
    lines = np.arange(1, math.ceil(end_s(notes) / STEADY_BAR_S)) * STEADY_BAR_S if performed else bar_times(score)[1:]
    bars = 1 + int((lines <= notes["onset_s"].max()).sum())
    grid = steady_grid(0.0, bars, STEADY_BAR_S) if performed else bar_grid(score, 0, bars)
    features = set_features(notes, mode, STEADY_BAR_S if performed else bar_seconds(score))
    return {"piece": key, "failed": None, "features": features, "figures": describe_piece(notes, grid)}


def set_overlap(
    reference: list[dict],
    generated: list[dict],
    mode: str = "corrected",
    seed: int = 0,
    half_samples: int = HALF_SAMPLES,
    workers: int | None = 1,
    label: str = "comparing",
) -> dict[str, dict]:
    """KLD and OA of every feature and their mean (key `mean`), of `features` as `set_features` returns them.

    Each is a dict: `kld`, `oa`, `oa_low`, `oa_high` (95 %, by `half_samples` half samples; None for fewer than two),
    `constant`; a number that is undefined is None, and not in the means.

    Raises:
        ValueError: fewer than 4 reference pieces, or 2 generated ones.
    """
    if len(reference) < 4 or len(generated) < 2:
        raise ValueError(
            f"{len(reference)} human and {len(generated)} generated pieces that can be used: it takes 4 and 2."
        )
    whole = compare_sets(reference, generated, mode, seed)
    items = {str(index): (seed_of(seed, "half", str(index)),) for index in range(half_samples)}
    work = partial(_half_sample, reference, generated, mode)
    samples = dict(each(work, items, workers, label))
    spread = np.array([samples[key] for key in items]).reshape(half_samples, len(FEATURES))
    found = {
        name: {
            "kld": _number(whole[name].kld),
            **_with_error(whole[name].oa, spread[:, index]),
            **{moment: getattr(whole[name], moment) for moment in MOMENTS},
            "constant": whole[name].constant,
        }
        for index, name in enumerate(FEATURES)
    }
    defined = [index for index, name in enumerate(FEATURES) if found[name]["oa"] is not None]
    klds = [found[name]["kld"] for name in FEATURES if found[name]["kld"] is not None]
    if defined:
        means = spread[:, defined].mean(axis=1)
        mean = _with_error(float(np.mean([whole[FEATURES[index]].oa for index in defined])), means)
    else:
        mean = _with_error(math.nan, np.zeros(0))
    return found | {"mean": {"kld": float(np.mean(klds)) if klds else None, **mean}}


def human_overlap(
    reference: list[dict],
    mode: str = "corrected",
    seed: int = 0,
    splits: int = HALF_SAMPLES,
    workers: int | None = 1,
    label: str = HALVES,
) -> dict[str, dict]:
    """As `set_overlap`, of a random half of the human pieces against the other: mean over `splits` splits.

    `oa_low` and `oa_high` hold 95 % of the splits. Half as many pieces are compared on each side, so that densities are
    a little wider.

    Raises:
        ValueError: fewer than 4 pieces, or no split.
    """
    if len(reference) < 4 or splits < 1:
        raise ValueError(f"{len(reference)} pieces and {splits} splits: halves take 4 pieces and a split.")
    items = {str(index): (seed_of(seed, "split", str(index)),) for index in range(splits)}
    done = dict(each(partial(_split, reference, mode), items, workers, label))
    numbers = np.array([done[key] for key in items])  # (splits, 2, features): KLD, OA
    numbers = np.concatenate([numbers, _mean_of_defined(numbers)], axis=2)
    found = {}
    for index, name in enumerate((*FEATURES, "mean")):
        kld, oa = (values[np.isfinite(values)] for values in (numbers[:, 0, index], numbers[:, 1, index]))
        low, high = np.quantile(oa, (0.025, 0.975)).tolist() if len(oa) else (None, None)
        means = [float(values.mean()) if len(values) else None for values in (kld, oa)]
        found[name] = {"kld": means[0], "oa": means[1], "oa_low": low, "oa_high": high}
    return found


def _half_sample(reference: list[dict], generated: list[dict], mode: str, seed: int) -> list[float]:
    """OA of every feature, of a random half of either set."""
    rng = np.random.default_rng(seed)
    halves = [
        [pieces[i] for i in rng.permutation(len(pieces))[: len(pieces) // 2]] for pieces in (reference, generated)
    ]
    if mode == "mgeval" and len(halves[1]) < 2:
        return [math.nan] * len(FEATURES)
    return [comparison.oa for comparison in compare_sets(*halves, mode, seed).values()]


def _split(reference: list[dict], mode: str, seed: int) -> list[list[float]]:
    """KLD and OA of every feature, of a random half of the set against the other."""
    order = np.random.default_rng(seed).permutation(len(reference))
    halves = [[reference[i] for i in part] for part in np.array_split(order, 2)]
    found = compare_sets(*halves, mode, seed).values()
    return [[comparison.kld for comparison in found], [comparison.oa for comparison in found]]


def _mean_of_defined(numbers: np.ndarray) -> np.ndarray:
    """Mean over the last axis of what is finite, (..., 1); NaN where nothing is."""
    finite = np.isfinite(numbers)
    count = finite.sum(axis=-1, keepdims=True)
    total = np.where(finite, numbers, 0.0).sum(axis=-1, keepdims=True)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _with_error(oa: float, samples: np.ndarray) -> dict:
    """OA and 1.96 standard deviations of its half samples to either side, within [0, 1]."""
    low = high = None
    if len(samples) > 1 and np.isfinite(samples).all() and math.isfinite(oa):
        error = 1.96 * float(samples.std(ddof=1))
        low, high = max(oa - error, 0.0), min(oa + error, 1.0)
    return {"oa": _number(oa), "oa_low": low, "oa_high": high}


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def evaluate_sets(
    systems: "Sequence[str | os.PathLike] | Mapping[str, str | os.PathLike]",
    data: Sequence[str | os.PathLike],
    *,
    out: str | os.PathLike = f"{OUT}/set",
    mode: str = "corrected",
    num: int = NUM,
    references: int | None = None,
    bars: int = BARS,
    music_s: float | None = MUSIC_S,
    max_tokens: int | None = None,
    cut_s: float | None = None,
    seed: int = 0,
    split: str | None = "test",
    performed: bool = False,
    temperature: float | None = None,
    top_p: float | None = None,
    device: str = "cpu",
    half_samples: int = HALF_SAMPLES,
    workers: int | None = None,
    plots: bool = True,
) -> dict:
    """13 features, KLD and OA, and single-piece figures of every system; writes `report.md`, `report.json` and a plot.

    Args:
        systems: folders of MIDI files, or checkpoints, which first write `num` pieces of `bars` bars (SAGE-Music) or
            `music_s` seconds or `max_tokens` tokens (PerceiverS).
        data, split: folders of human pieces, as for `corpus_files`.
        mode: of `compare_sets`: `corrected` or `mgeval`.
        references: use the first so many human pieces in an order drawn by `seed`; None: all.
        cut_s, performed: of both sets, as for `measured_set`. NC and others depend on a piece's length: cut.
        half_samples: as for `set_overlap`, and splits of `human_overlap`.

    Raises:
        FileNotFoundError, ValueError: too few pieces, a system that is none, an option outside its range.
        MissingExtraError: `plots` without matplotlib.
    """
    if plots:
        plotting()  # before hours of work: matplotlib may be missing
    if mode not in MODES:
        raise ValueError(f"mode {mode!r} is not one of {', '.join(MODES)}.")
    for name, value, least in (("half_samples", half_samples, 2), ("references", references, 4), ("num", num, 2)):
        if value is not None and value < least:
            raise ValueError(f"{name} is {value}; it must be {least} at least.")
    files = corpus_files(data, split)
    files = {key: files[key] for key in shuffled(files, seed)[:references]}
    found = find_systems(systems, (HUMAN, HALVES))
    if not found:
        raise ValueError("systems: name a checkpoint or a folder of MIDI files.")
    length = {"bars": bars, "music_s": music_s, "max_tokens": max_tokens}
    sampling = {"temperature": temperature, "top_p": top_p}
    settings = {}
    for system in found:
        if system.family is not None:
            own = {"bars": bars} if system.family.counts_bars else {"music_s": music_s, "max_tokens": max_tokens}
            settings[system.label] = {"weights": system.fingerprint, **own, **sampling}
            _keep(system.home(out), seed, settings[system.label])
    options = {"mode": mode, "cut_s": cut_s, "performed": performed, "workers": workers}
    pieces = {HUMAN: measured_set(files, **options, label=HUMAN)}
    for system in found:
        failed = []
        if system.family is None:
            of_system = {path.relative_to(system.source).as_posix(): path for path in midi_files(system.source)}
        else:
            write = CheckpointWriter(system.source, **length, **sampling, device=device)
            home, more = system.home(out), {"settings": settings[system.label], "workers": workers}
            written = generated_set(write, num, seed, home, **more, label=system.label)
            failed = [record for record in written if record["failed"]]
            of_system = {record["piece"]: home / record["midi"] for record in written if not record["failed"]}
        measured = measured_set(of_system, **options, label=system.label) if of_system else []
        pieces[system.label] = failed + measured
    usable = {label: [piece for piece in of_set if not piece["failed"]] for label, of_set in pieces.items()}
    features = {label: [piece["features"] for piece in of_set] for label, of_set in usable.items()}
    overlap, halves = {}, {"mode": mode, "seed": seed, "workers": workers}
    for system in found:
        try:
            overlap[system.label] = set_overlap(
                features[HUMAN], features[system.label], half_samples=half_samples, **halves, label=system.label
            )
        except ValueError as error:
            raise ValueError(f"{system.label}: {error} {_failures(pieces, system.label)}") from None
    overlap[HALVES] = human_overlap(features[HUMAN], splits=half_samples, **halves)
    result = {
        "task": "set",
        "settings": {
            "data": [str(folder) for folder in data],
            "split": split,
            "seed": seed,
            "mode": mode,
            **length,
            **sampling,
            "cut_s": cut_s,
            "performed": performed,
            "half_samples": half_samples,
        },
        "rows": [_row(label, of_set) for label, of_set in pieces.items()],
        "features": overlap,
        "differences": _differences(usable),
        "remarks": _remarks(usable, overlap, mode, found),
        "skipped": failures(pieces),
        "pieces": {
            label: [{name: piece.get(name) for name in ("piece", "failed", "figures")} for piece in of_set]
            for label, of_set in pieces.items()
        },
    }
    pictures = {}
    if plots:
        densities = {
            system.label: {name: feature_densities(features[HUMAN], features[system.label], name) for name in FEATURES}
            for system in found
        }
        pictures["distributions.png"] = report.draw_densities(densities)
        figures = {label: [piece["figures"] for piece in of_set] for label, of_set in usable.items()}
        pictures["figures.png"] = report.draw_scores(figures, list(figures[HUMAN][0]))
    return report.write_report(result, out, pictures)


def _row(label: str, pieces: list[dict]) -> dict:
    """A set's line of the table of single-piece figures."""
    figures = [piece["figures"] for piece in pieces if not piece["failed"]]
    names = figures[0] if figures else {}
    means = {name: interval([of_piece[name] for of_piece in figures]) for name in names}
    return {"system": label, "n": len(pieces), "failed": len(pieces) - len(figures), "figures": means}


def _differences(usable: Mapping[str, list[dict]]) -> list[dict]:
    """Each system's figures less the human ones, unpaired."""
    human = [piece["figures"] for piece in usable[HUMAN]]
    return [
        {"a": label, "b": HUMAN, "figure": name}
        | bootstrap_difference(
            *(np.array([figures[name] for figures in of_set]) for of_set in ([p["figures"] for p in pieces], human))
        )._asdict()
        for label, pieces in usable.items()
        if label != HUMAN
        for name in human[0]
    ]


def _remarks(usable: Mapping[str, list[dict]], overlap: Mapping[str, dict], mode: str, found: list) -> list[str]:
    sizes = {label: len(pieces) for label, pieces in usable.items()}
    remarks = []
    if len(set(sizes.values())) > 1:
        shown = ", ".join(f"{label} {size}" for label, size in sizes.items())
        rule = "as many of each as the smaller has are drawn" if mode == "mgeval" else "all pieces are used"
        remarks.append(f"the sets are unequal ({shown}): {rule}; KLD and OA depend a little on their sizes.")
    lengths = {
        label: float(np.median([piece["figures"]["music_s"] for piece in pieces])) for label, pieces in usable.items()
    }
    if max(lengths.values()) > 1.25 * min(lengths.values()):
        shown = ", ".join(f"{label} {seconds:.0f} s" for label, seconds in lengths.items())
        remarks.append(f"the pieces differ in length (medians: {shown}) and features with it: cut_s evens them.")
    for system in found:
        constant = [name for name in FEATURES if overlap[system.label][name]["constant"]]
        if constant:
            where = "all distances within the human set, or all between the sets, are equal"
            remarks.append(f"{system.label}: {where} in {', '.join(constant)}.")
    return remarks


def _failures(pieces: Mapping[str, list[dict]], label: str) -> str:
    """What made a set too small."""
    reasons = [f"{p['piece']}: {p['failed']}" for name in (HUMAN, label) for p in pieces[name] if p["failed"]]
    return f"Not usable: {'; '.join(reasons[:3])}" if reasons else ""
