"""What a study found: numbers with intervals, a Markdown table beside the paper's claims, and a picture.

Conventions: an arm's number is the mean over pieces and seeds; brackets hold its 95 % interval, by a bootstrap that
draws seeds and pieces anew (10,000 times). Differences are paired, piece by piece and seed by seed, with the arm's
baseline, over what both could score: one whose interval holds 0 is no difference. A number of which any part is
undefined is undefined: None in JSON. A failed continuation counts as NMSI 0; any other failed piece is left out, and
all failures are counted.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from sage_studio.evaluate.likelihood import linearised
from sage_studio.files import write_atomic
from sage_studio.metrics.sets import FEATURES
from sage_studio.reports import GREY, PALETTE, figure, machine_line, markdown, plain, png

from .study import Study

RESAMPLES = 10_000
# Measures that are compared with a baseline, and whether more is better.
COMPARED = {
    "nats_per_note": ("nats per note", False),
    "nmsi": ("NMSI", True),
    "oa": ("mean OA", True),
    "repeated_late": ("repeated notes/s, second half", False),
}
ABSOLUTE = ("repeated_late",)  # a baseline may be 0: differences are not in per cent
LISTED = 10  # pieces passed over that the report names


def summary(study: Study, result: dict) -> dict[str, dict]:
    """By arm: `parameters`, the means of what was measured with intervals, differences to its baseline, and speeds.

    A compared measure is a dict of `mean`, `low`, `high`, `seeds` (a mean a seed), `n` (pieces used of each seed), and,
    but for a baseline, `difference`: `mean`, `low`, `high`, in per cent of the baseline's mean (`repeated_late`: in
    notes/s). `failed` counts pieces of all measures and seeds.
    """
    found = {}
    for name in study.arms:
        runs = [run for run in result["runs"] if run["arm"] == name]
        row: dict = {
            "parameters": runs[0]["parameters"],
            "train_hours": sum(run["train_elapsed_s"] for run in runs) / 3600,
        }
        base = study.baseline_of(name)
        paired, other = _tables(result, name, base), _tables(result, base, name)
        for measure, table in _tables(result, name, name).items():
            row[measure] = interval(table) | {"seeds": [_mean(of_seed) for of_seed in table], "n": table.shape[1]}
            if measure == "oa":  # a number a run, of so many generated pieces
                row[measure]["n"] = min(run["sets"]["written"] - len(run["sets"]["failed"]) for run in runs)
            if measure == "oa" and len(runs) == 1:  # by half samples of both sets, where there are no seeds to draw
                mean = runs[0]["sets"]["features"]["mean"]
                row[measure] |= {"low": mean["oa_low"], "high": mean["oa_high"]}
            if base != name:
                # In per cent of nothing, a difference is undefined.
                unit = 1.0 if measure in ABSOLUTE else (_mean(other[measure]) or math.nan) / 100
                row[measure]["difference"] = interval((paired[measure] - other[measure]) / unit)
        scored = [r for r in runs[0].get("likelihood", {}).get("pieces", ()) if not r["failed"]]
        if scored:
            row["tokens_per_note"] = sum(r["tokens"] for r in scored) / sum(r["notes"] for r in scored)
        row["failed"] = sum(map(_failures, runs))
        if "decoding" in result:
            own, full = (result["decoding"][arm] for arm in (name, base))
            row["speed"] = full["token_s"] / own["token_s"]
            row["cache"] = own["cache_bytes"]["used"] / full["cache_bytes"]["used"]
        if "writing" in result:
            own, full = (result["writing"][arm]["notes_per_second"] for arm in (name, base))
            row["notes_per_second"] = own
            if full > 0:  # a baseline that wrote no note has no speed
                row["speed"] = own / full
        found[name] = row
    return found


def _failures(run: dict) -> int:
    records = [*run.get("likelihood", {}).get("pieces", ()), *run.get("continuation", {}).get("pieces", ())]
    return sum(bool(record["failed"]) for record in records) + len(run.get("sets", {}).get("failed", ()))


def _tables(result: dict, arm: str, beside: str) -> dict[str, np.ndarray]:
    """(seeds, pieces) values of every compared measure of an arm; one piece where a run has only one number.

    Only pieces that every run of the arm, and of the one `beside` it, could score: tables are compared entry by entry.
    Generated pieces have no partners: as many are taken as the run with the fewest has.
    """
    both = [run for run in result["runs"] if run["arm"] in (arm, beside)]
    scored = [
        {r["piece"] for r in run["likelihood"]["pieces"] if not r["failed"]} for run in both if "likelihood" in run
    ]
    fewest = min((len(run["sets"]["repeated"]) for run in both if "sets" in run), default=0)
    rows: dict[str, list] = {}
    for run in both:
        if run["arm"] != arm:
            continue
        if "likelihood" in run:
            common = [r for r in run["likelihood"]["pieces"] if all(r["piece"] in of_run for of_run in scored)]
            rows.setdefault("nats_per_note", []).append(list(linearised(common).values()))
        if "continuation" in run:
            rows.setdefault("nmsi", []).append([record["nmsi"] for record in run["continuation"]["pieces"]])
        if "sets" in run:
            curves = np.array(run["sets"]["repeated"][:fewest])
            rows.setdefault("oa", []).append([run["sets"]["features"]["mean"]["oa"]])
            rows.setdefault("repeated_late", []).append(curves[:, curves.shape[1] // 2 :].mean(axis=1).tolist())
    return {name: np.array(values, dtype=np.float64) for name, values in rows.items()}


def _mean(values: np.ndarray) -> float | None:
    """None where there is no value, or one that is undefined."""
    return float(values.mean()) if values.size and np.isfinite(values).all() else None


def interval(table: np.ndarray) -> dict[str, float | None]:
    """Mean and 95 % interval of (seeds, pieces) values, drawing seeds and pieces with replacement; None: as `_mean`."""
    mean = _mean(table)
    if mean is None:
        return {"mean": None, "low": None, "high": None}
    rng = np.random.default_rng(0)
    seeds, pieces = table.shape
    by_seed = rng.multinomial(seeds, np.full(seeds, 1 / seeds), RESAMPLES) / seeds
    by_piece = rng.multinomial(pieces, np.full(pieces, 1 / pieces), RESAMPLES) / pieces
    means = ((by_seed @ table) * by_piece).sum(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return {"mean": mean, "low": float(low), "high": float(high)}


def write_report(study: Study, result: dict, folder: Path) -> list[Path]:
    """Write `experiment-NAME-SCALE.md`, `.json` and `.png` into `folder`; returns their paths.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    stem = f"experiment-{result['study']}-{result['scale']}"
    files = [folder / f"{stem}{suffix}" for suffix in (".md", ".json", ".png")]
    found = summary(study, result)
    kept = {**result, "summary": found, "runs": [_without_pieces(run) for run in result["runs"]]}
    write_atomic(files[0], report(study, result, found, files[2].name).encode())
    write_atomic(files[1], (json.dumps(kept, indent=1) + "\n").encode())
    with_sets = "sets" in result["runs"][0]
    write_atomic(files[2], draw_repetition(study, result) if with_sets else draw_differences(study, found))
    return files


def _without_pieces(run: dict) -> dict:
    """A run as the results file keeps it: numbers of pieces stay in the run's own folder."""
    kept = {name: run[name] for name in ("arm", "seed", "parameters", "train_elapsed_s")}
    if "sets" in run:
        kept["features"] = run["sets"]["features"]
        kept["repeated"] = np.mean(run["sets"]["repeated"], axis=0).round(4).tolist()
    return kept


def report(study: Study, result: dict, found: dict[str, dict], picture: str) -> str:
    """The study as Markdown."""
    runs = result["runs"]
    trained = {run["arm"] for run in runs}
    seeds = len({run["seed"] for run in runs})
    sizes = "; ".join(f"{name}: {_said(options)}" for name, options in result["sizes"].items())
    parts = [
        f"# {study.title} (`sage-music experiment {study.name} --scale {result['scale']}`)",
        f"The paper: {study.claim}",
        _main_table(study, found),
        f"{len(trained)} arms, {seeds} seed{'s' * (seeds > 1)}; training: {_said(result['options'])}. "
        f"Measured: {sizes}. {sum(row['train_hours'] for row in found.values()):.1f} hours of training on one thread; "
        f"{machine_line(result['machine'])}.",
        "Means over pieces and seeds, 95 % intervals in brackets (seeds and pieces drawn anew); differences are "
        "paired, in per cent of the baseline. A difference whose interval holds 0 is none. NMSI: the paper's own "
        "normalisers are not public, so that its numbers compare as differences only.",
        "n: pieces of each seed that the number before it is a mean of (mean OA: generated pieces). failed: pieces of "
        "all measures and seeds; a failed continuation counts as NMSI 0, what else failed is left out. "
        + _passed_over(result),
    ]
    if "sets" in runs[0]:
        parts += [_feature_table(study, result), _repetition_table(study, found)]
    if study.claims:
        parts += ["## Beside the paper", _claim_table(study, found)]
    parts += study.findings.get(result["scale"], [])
    parts.append(f"![{study.title}]({picture})")
    return "\n\n".join(part for part in parts if part) + "\n"


def _said(options: Mapping) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in options.items()) or "by default"


def _passed_over(result: dict) -> str:
    named = [
        f"{piece} ({corpus}: {why})" for corpus, skipped in result["skipped"].items() for piece, why in skipped.items()
    ]
    more = f"; {len(named) - LISTED} more, in the JSON file" if len(named) > LISTED else ""
    shown = "; ".join(named[:LISTED]) + more or "none"
    return f"Test pieces passed over, as prompts or among the human ones: {shown}."


def _main_table(study: Study, found: dict[str, dict]) -> str:
    present = [name for name in COMPARED if any(name in row for row in found.values()) and name != "repeated_late"]
    columns = ["arm", "parameters"]
    for name in present:
        columns += [COMPARED[name][0], "n", "difference"]
    extra = {
        "tokens_per_note": ("tokens per note", lambda value: f"{value:.2f}"),
        "notes_per_second": ("notes/s", lambda value: f"{value:.0f}"),
        "speed": ("speed", lambda value: f"{value:.2f} x"),
        "cache": ("cache a token", lambda value: f"1/{1 / value:.1f}"),
        "failed": ("failed", str),
    }
    extra = {name: told for name, told in extra.items() if any(name in row for row in found.values())}
    rows = []
    for arm, row in found.items():
        cells = [f"**{arm}**" if study.baseline_of(arm) == arm else arm, f"{row['parameters']:,}"]
        for name in present:
            cells += [_with_interval(row[name]), str(row[name]["n"]), _difference(row[name])]
        rows.append(cells + [told(row[name]) if name in row else "" for name, (_, told) in extra.items()])
    return markdown(columns + [title for title, _ in extra.values()], rows)


def _with_interval(value: dict, digits: int = 2) -> str:
    if value["mean"] is None:
        return "undefined"
    if value["low"] in (None, value["high"]):  # one number a seed, and one seed
        return f"{value['mean']:.{digits}f}"
    return f"{value['mean']:.{digits}f} [{value['low']:.{digits}f}, {value['high']:.{digits}f}]"


def _difference(value: dict, absolute: bool = False) -> str:
    change = value.get("difference")
    if change is None:
        return ""
    if change["mean"] is None:
        return "undefined"
    if absolute:
        return f"{change['mean']:+.2f} [{change['low']:+.2f}, {change['high']:+.2f}]"
    if len(value["seeds"]) == 1 and change["low"] == change["high"]:
        return f"{change['mean']:+.1f} % (one seed)"
    return f"{change['mean']:+.1f} % [{change['low']:+.1f}, {change['high']:+.1f}]"


def _feature_table(study: Study, result: dict) -> str:
    """OA and KLD of every feature: means over seeds; the human halves beside them."""
    arms, sets = list(study.arms), result["runs"][0]["sets"]
    rows = []
    for feature in (*FEATURES, "mean"):
        cells = [feature]
        for arm in arms:
            of_arm = [run["sets"]["features"][feature] for run in result["runs"] if run["arm"] == arm]
            cells += [_mean_of(of_arm, "oa"), _mean_of(of_arm, "kld")]
        rows.append([*cells, _mean_of([sets["halves"][feature]], "oa")])
    columns = ["feature", *(f"{name} of {arm}" for arm in arms for name in ("OA", "KLD"))]
    return markdown([*columns, f"OA of human halves (n {sets['human']})"], rows)


def _mean_of(found: list[dict], name: str) -> str:
    values = [entry[name] for entry in found if entry.get(name) is not None]
    some = f" ({len(values)} of {len(found)} seeds)" if len(values) < len(found) else ""
    return f"{np.mean(values):.3f}{some}" if values else "undefined"


def _repetition_table(study: Study, found: dict[str, dict]) -> str:
    rows = [
        [arm, _with_interval(late), str(late["n"]), _difference(late, absolute=True)]
        for arm, late in ((arm, row["repeated_late"]) for arm, row in found.items() if "repeated_late" in row)
    ]
    return markdown(["arm", "repeated notes per second, second half of a piece", "n", "difference"], rows)


def _claim_table(study: Study, found: dict[str, dict]) -> str:
    rows = []
    for claim in study.claims:
        row = found[claim.arm]
        if claim.measure in row and claim.measure != "speed":
            ours = _difference(row[claim.measure], claim.measure in ABSOLUTE)
        elif claim.measure in row:
            ours = f"{100 * (row['speed'] - 1):+.0f} %"
        else:
            ours = "not measured"
        rows.append([claim.arm, claim.says, claim.paper, ours])
    return markdown(["arm", "", "the paper", "here"], rows)


def draw_differences(study: Study, found: dict[str, dict]) -> bytes:
    """Every arm's difference to its baseline, with its interval, in a panel a measure."""
    present = [name for name in ("nats_per_note", "nmsi") if any(name in row for row in found.values())]
    arms = [arm for arm in found if study.baseline_of(arm) != arm]
    picture = figure(4.2 * len(present) + 1.5, 1.2 + 0.42 * len(arms))
    for column, (axes, name) in enumerate(
        zip(picture.subplots(1, len(present), squeeze=False)[0], present, strict=True)
    ):
        title, more = COMPARED[name]
        for place, arm in enumerate(arms):
            change = found[arm][name]["difference"]
            if change["mean"] is None:
                axes.text(0, place, " undefined", va="center", fontsize=8)
                continue
            worse = change["high"] < 0 if more else change["low"] > 0
            better = change["low"] > 0 if more else change["high"] < 0
            colour = PALETTE[1] if worse else PALETTE[0] if better else GREY
            axes.plot([change["low"], change["high"]], [place, place], color=colour, linewidth=2)
            axes.plot(change["mean"], place, "o", color=colour)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_yticks(range(len(arms)), arms if column == 0 else [""] * len(arms))
        axes.invert_yaxis()
        axes.set_title(f"{title}: % from baseline ({'more' if more else 'less'} is better)", loc="left", fontsize=9)
        plain(axes)
    return png(picture)


def draw_repetition(study: Study, result: dict) -> bytes:
    """OA by feature, and repetition over a piece's time, a colour an arm."""
    picture = figure(12, 4.6)
    left, right = picture.subplots(1, 2)
    places = np.arange(len(FEATURES))
    for index, arm in enumerate(study.arms):
        of_arm = [run["sets"] for run in result["runs"] if run["arm"] == arm]
        # Undefined in a seed, undefined in the mean: such a point is missing.
        overlap = np.array([[sets["features"][name]["oa"] for name in FEATURES] for sets in of_arm], np.float64)
        colour = PALETTE[index % len(PALETTE)]
        left.plot(places, np.mean(overlap, axis=0), "o", color=colour, label=arm)
        curve = np.mean([np.mean(sets["repeated"], axis=0) for sets in of_arm], axis=0)
        right.plot((np.arange(64) + 0.5) / 64, _smoothed(curve), color=colour, label=arm)
    halves = result["runs"][0]["sets"]["halves"]
    of_halves = np.array([halves[name]["oa"] for name in FEATURES], np.float64)
    left.plot(places, of_halves, "_", color="black", markersize=14, label="human halves")
    human = np.mean(result["runs"][0]["sets"]["repeated_human"], axis=0)
    right.plot((np.arange(64) + 0.5) / 64, _smoothed(human), color="black", linestyle="--", label="human")
    left.set_xticks(places, FEATURES, rotation=60, fontsize=8)
    left.set_title("Overlap Area with human pieces (more is better)", loc="left", fontsize=9)
    right.set_title("repeated notes per second, over a piece's time", loc="left", fontsize=9)
    right.set_ylim(bottom=0)
    left.legend(frameon=False, fontsize=7)
    for axes in (left, right):
        plain(axes)
    return png(picture)


def _smoothed(curve: np.ndarray, width: int = 5) -> np.ndarray:
    padded = np.pad(curve, width // 2, mode="edge")
    return np.convolve(padded, np.full(width, 1 / width), mode="valid")
