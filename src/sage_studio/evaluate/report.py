"""What `sage_studio.evaluate` found, to be read: Markdown tables, JSON, and pictures.

Conventions: a mean is followed by its 95 % interval in brackets; pictures are PNG, as bytes until they are written.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from sage_studio.files import write_atomic
from sage_studio.metrics import self_similarity_matrix
from sage_studio.metrics.densities import Densities
from sage_studio.metrics.sets import FEATURES
from sage_studio.reports import GREY, PALETTE, figure, markdown, plain, png

from .pieces import failures

LISTED = 20  # pieces that the Markdown names; the JSON names all

NMSI_NOTE = (
    "NMSI: 0-100, the mean of four similarities of the bars after the prompt with the true ones; the paper's own "
    "normalisers are not public, so that these numbers do not compare with the paper's. A failed or missing "
    "continuation counts as 0. Read a system's number between the two reference rows. Notes a second are those of one "
    "thread, with as many pieces at a time as there are workers."
)
SET_NOTE = (
    "KLD (nats, lower is nearer) of the distances among human pieces from those between human and system; OA (0-1, "
    "higher is nearer) is what the two densities share. Intervals of OA: random half samples. *Human halves* is one "
    "random half of the human pieces against the other, on half as many pieces: what to expect of music from the same "
    "source. It stands where other tasks have reference rows: nothing is continued here."
)
LIKELIHOOD_NOTE = (
    "Total nats over total notes (lower is better); intervals over pieces. The rows below the systems know nothing of "
    "music: all tokens alike, and tokens as frequent as in the other pieces."
)


def write_report(result: dict, out: str | os.PathLike, pictures: Mapping[str, bytes]) -> dict:
    """Write `report.md`, `report.json` and the pictures into `out`. Returns the result, with `files`, their paths."""
    out = Path(out)
    files = [out / "report.md", out / "report.json", *(out / name for name in pictures)]
    result = {**result, "files": [str(path) for path in files]}
    shown = "\n\n".join([markdown_report(result), *(f"![{Path(name).stem}]({name})" for name in pictures)])
    write_atomic(files[0], f"{shown}\n".encode())
    write_atomic(files[1], (json.dumps(result, indent=1) + "\n").encode())
    for name, data in pictures.items():
        write_atomic(out / name, data)
    return result


def markdown_report(result: dict) -> str:
    """The result of an evaluation as Markdown."""
    tables, note = {"continuation": _continuation, "set": _set, "likelihood": _likelihood}[result["task"]](result)
    given = {name: value for name, value in result["settings"].items() if value is not None}
    settings = ", ".join(f"{_head(name)} {_said(value)}" for name, value in given.items())
    parts = [*tables, note, f"Settings: {settings}. Intervals: 95 %."]
    remarks = list(result["remarks"])
    reasons: dict[str, int] = {}
    for reason in result["skipped"].values():
        kind = reason.split(":")[0]
        reasons[kind] = reasons.get(kind, 0) + 1
    if reasons:
        remarks.append("pieces not used: " + ", ".join(f"{count} ({kind})" for kind, count in reasons.items()) + ".")
    # The other tasks' failures are among `skipped`.
    named = result["skipped"] | (failures(result["pieces"]) if result["task"] == "continuation" else {})
    remarks += [f"{piece}: {reason}" for piece, reason in list(named.items())[:LISTED]]
    if len(named) > LISTED:
        remarks.append(f"... and {len(named) - LISTED} more, in report.json.")
    if remarks:
        parts.append("\n".join(f"- {remark}" for remark in remarks))
    return "\n\n".join(parts)


def _said(value) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _with_interval(found: dict | None, digits: int = 3) -> str:
    if found is None:
        return "-"
    return f"{found['mean']:,.{digits}f} [{found['low']:,.{digits}f}, {found['high']:,.{digits}f}]"


def _continuation(result: dict) -> tuple[list[str], str]:
    rows, failures = result["rows"], any(row["failed"] for row in result["rows"])
    columns = ["system", "n", "NMSI", *(["NMSI without failures"] if failures else [])]
    columns += ["chroma", "groove", "self-similarity", "note density", "valid", "failed", "empty", "notes/s"]
    cells = [
        [
            row["system"],
            str(row["n"]),
            _with_interval(row["nmsi"], 2),
            *([_with_interval(row["nmsi_without_failures"], 2)] if failures else []),
            *(_with_interval(row[part]) for part in ("chroma", "groove", "self_similarity", "note_density")),
            f"{row['valid']:.1%}",
            str(row["failed"]),
            str(row["empty"]),
            f"{row['notes_per_second']:,.1f}" if row["notes_per_second"] else "-",
        ]
        for row in rows
    ]
    tables = [markdown(columns, cells)]
    if result["differences"]:
        tables += ["NMSI of the first less the second, piece by piece:", _difference_table(result["differences"], 2)]
    return tables, NMSI_NOTE


def _difference_table(found: Sequence[dict], digits: int) -> str:
    cells = [
        [
            pair["a"],
            pair["b"],
            _with_interval(pair, digits),
            "no" if pair["low"] <= 0 <= pair["high"] else "yes",
            str(pair["n"]),
        ]
        for pair in found
    ]
    return markdown(["first", "second", "difference", "a difference", "n"], cells)


def _set(result: dict) -> tuple[list[str], str]:
    overlap = result["features"]
    columns = ["feature", *(f"{label}: {name}" for label in overlap for name in ("KLD", "OA"))]
    cells = []
    for feature in (*FEATURES, "mean"):
        line = ["**mean**" if feature == "mean" else feature]
        for of_label in overlap.values():
            found = of_label[feature]
            line.append("-" if found["kld"] is None else f"{found['kld']:.3f}")
            low, high = found["oa_low"], found["oa_high"]
            spread = "" if low is None else f" [{low:.3f}, {high:.3f}]"
            line.append("-" if found["oa"] is None else f"{found['oa']:.3f}{spread}")
        cells.append(line)
    names = {name: None for row in result["rows"] for name in row["figures"]}
    figures = [
        [row["system"], f"{row['n'] - row['failed']} of {row['n']}"]
        + [_with_interval(row["figures"].get(name), _digits(name)) for name in names]
        for row in result["rows"]
    ]
    heads = ["set", "pieces used", *map(_head, names)]
    beyond = [
        f"{pair['a']}: {_head(pair['figure'])} {_with_interval(pair, _digits(pair['figure']))}"
        for pair in result["differences"]
        if not pair["low"] <= 0 <= pair["high"]
    ]
    line = "Differences from the human pieces beyond their interval: " + ("; ".join(beyond) or "none") + "."
    return [markdown(columns, cells), "Single pieces, means:", markdown(heads, figures), line], SET_NOTE


def _digits(name: str) -> int:
    return 1 if name in ("notes", "music_s") else 3


def _likelihood(result: dict) -> tuple[list[str], str]:
    columns = ["system", "pieces scored", "notes", "tokens", "nats per note", "nats per token"]
    cells = [
        [
            row["system"],
            f"{row['n'] - row['failed']} of {row['n']}",
            f"{row['notes']:,}",
            f"{row['tokens']:,}",
            _with_interval(row["nats_per_note"]),
            _with_interval(row["nats_per_token"]),
        ]
        for row in result["rows"]
    ]
    tables = [markdown(columns, cells)]
    if result["differences"]:
        tables += ["Nats a note of the first less the second, over the pieces that both could score:"]
        tables.append(_difference_table(result["differences"], 3))
    return tables, LIKELIHOOD_NOTE


def _head(name: str) -> str:
    """A figure's key as a heading."""
    return {"nmsi": "NMSI", "music_s": "seconds", "cut_s": "cut seconds"}.get(name, name.replace("_", " "))


def draw_scores(records: Mapping[str, Sequence[dict]], names: Sequence[str]) -> bytes:
    """A box of every row's pieces for every number in `names`, each piece a dot."""
    picture = figure(max(3.0 * len(names), 5), 1.2 + 0.5 * len(records))
    labels = list(records)
    for column, (axes, name) in enumerate(zip(picture.subplots(1, len(names), squeeze=False)[0], names, strict=True)):
        values = [[record[name] for record in records[label]] for label in labels]
        axes.boxplot(values, orientation="horizontal", widths=0.6, showfliers=False, medianprops={"color": "black"})
        for place, of_label in enumerate(values, 1):
            jitter = np.random.default_rng(0).uniform(-0.2, 0.2, len(of_label))
            colour = PALETTE[(place - 1) % len(PALETTE)]
            axes.plot(of_label, place + jitter, ".", color=colour, markersize=3, alpha=0.6)
        axes.set_yticks(range(1, len(labels) + 1), labels if column == 0 else [""] * len(labels), parse_math=False)
        axes.invert_yaxis()
        axes.set_title(_head(name), loc="left", fontsize=10)
        plain(axes)
    return png(picture)


def draw_densities(found: Mapping[str, Mapping[str, Densities]]) -> bytes:
    """For every feature, the densities of distances among human pieces and from them to each system's pieces."""
    picture = figure(14, 8.5)
    panels = picture.subplots(3, 5).ravel()
    for axes, feature in zip(panels, FEATURES, strict=False):
        for index, (label, of_label) in enumerate(found.items()):
            density = of_label[feature]
            if index == 0:
                axes.fill_between(density.x, density.intra, color=GREY, alpha=0.35, linewidth=0, label="among human")
            axes.plot(density.x, density.inter, color=PALETTE[index % len(PALETTE)], linewidth=1.4, label=label)
        axes.set_title(feature, loc="left", fontsize=10)
        axes.set_yticks([])
        plain(axes)
    for axes in panels[len(FEATURES) :]:
        axes.set_axis_off()
    handles, labels = panels[0].get_legend_handles_labels()
    picture.legend(handles, [_literal(label) for label in labels], loc="lower right", frameon=False)
    picture.supxlabel("distance of two pieces", fontsize=10)
    return png(picture)


def draw_similarity(music: Mapping[str, tuple[np.ndarray, np.ndarray]], title: str) -> bytes:
    """Self-similarity matrices of one piece's continuations (notes and compared grid by row), side by side."""
    picture = figure(3.2 * len(music) + 0.6, 3.8)
    panels = picture.subplots(1, len(music), squeeze=False)[0]
    for axes, (label, (notes, grid)) in zip(panels, music.items(), strict=True):
        bars = (len(grid) - 1) // 16
        matrix = self_similarity_matrix(notes, grid)
        image = axes.imshow(matrix, vmin=0, vmax=1, cmap="magma", extent=(0, bars, bars, 0), interpolation="nearest")
        axes.set_title(_literal(label), fontsize=10)
        axes.set_xlabel("bar after the prompt")
    picture.colorbar(image, ax=panels, shrink=0.8, label="cosine of chroma")
    picture.suptitle(_literal(title), fontsize=9)
    return png(picture)


def draw_rolls(music: Mapping[str, tuple[np.ndarray, np.ndarray]], title: str) -> bytes:
    """Piano rolls of the compared bars of one piece's continuations, one above the other, on one scale of bars."""
    picture = figure(11, 1.9 * len(music) + 0.6)
    panels = picture.subplots(len(music), 1, squeeze=False, sharex=True, sharey=True)[:, 0]
    for axes, (label, (notes, grid)) in zip(panels, music.items(), strict=True):
        bars = (len(grid) - 1) // 16
        inside = notes[(notes["onset_s"] >= grid[0]) & (notes["onset_s"] < grid[-1])]
        place = np.arange(len(grid)) / 16
        start = np.interp(inside["onset_s"], grid, place)
        end = np.interp(inside["onset_s"] + inside["duration_s"], grid, place)
        drums = inside["program"] < 0
        for chosen, colour in ((~drums, PALETTE[0]), (drums, GREY)):
            axes.hlines(inside["pitch"][chosen], start[chosen], end[chosen], color=colour, linewidth=2.2)
        axes.set_xlim(0, bars)
        axes.set_title(_literal(label), loc="left", fontsize=10)
        axes.set_ylabel("pitch")
        axes.grid(axis="x", color="black", linewidth=0.3, alpha=0.3)
        plain(axes)
    panels[-1].set_xlabel("bar after the prompt (drums grey)")
    picture.suptitle(_literal(title), fontsize=9)
    return png(picture)


def _literal(text: str) -> str:
    """matplotlib takes what lies between dollar signs for mathematics."""
    return text.replace("$", r"\$")
