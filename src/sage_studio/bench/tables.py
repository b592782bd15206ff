"""What `bench.decoding` measured, to be read: Markdown tables, and the figure of speed and cache against the
context."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from sage_studio import reports
from sage_studio.files import write_atomic
from sage_studio.reports import machine_line, markdown

# Of `reports.PALETTE`: ours in strong colours, rivals in quiet ones.
COLOURS = {
    "int8-compiled-draft": "#D55E00",
    "int8-compiled": "#CC79A7",
    "int8": "#E69F00",
    "ours": "#0072B2",
    "mqa": "#009E73",
    "gqa": "#777777",
    "full": "#333333",
}
PLACE = ("context", "{context:,}"), ("model", "{model}"), ("batch", "{batch}")  # the columns that tables begin with
GAP = 0.075  # least distance between labels, as a share of the axis


def load_result(path: str | os.PathLike) -> dict:
    """A result that `sage-music bench --json` printed into a file.

    Raises:
        ValueError: no such file, or one that holds something else, naming it.
    """
    try:
        result = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: no result can be read from it: {error}") from error
    try:
        table(result)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ValueError(
            f"{path}: not a result of SAGE-Music's benchmark; `sage-music bench --json` prints one."
        ) from None
    return result


def table(result: dict) -> str:
    """The result of `compare` or `compare_training` as Markdown."""
    shape = result["shape"]
    parts = [
        f"{shape['parameters']:,} parameters, hidden size {shape['hidden_size']}, {shape['layers']} layers, "
        f"{shape['heads']} heads; {machine_line(result['machine'])}"
    ]
    if "training" in result:
        parts.append(_training_table(result["training"]))
    if "rows" in result:
        rows = result["rows"]
        parts.append(_speed_table(rows))
        if any("sampled_tokens_per_second" in row for row in rows):
            parts.append("Sampled, and tokens that one forward pass yields:")
            parts.append(_drafting_table([row for row in rows if "sampled_tokens_per_second" in row]))
        parts.append("Memory, and the roofline (weights and cache that a step must read, over the bandwidth):")
        parts.append(_memory_table(rows))
        bandwidth = result["bandwidth"]
        parts.append(
            f"Bandwidth: {bandwidth['products_gb_s']} GB/s in float32 products of one row through the model's "
            f"matrices, {bandwidth['stream_gb_s']} GB/s streaming."
        )
        prompts = "; ".join(f"{name}: {text}" for name, text in result["prompts"].items())
        parts.append(f"Prompts, {prompts}.")
    if result.get("remarks"):
        parts.append("\n".join(f"- {remark}" for remark in result["remarks"]))
    return "\n\n".join(parts)


def formatted(columns: Sequence[tuple[str, str]], rows: Sequence[dict]) -> str:
    """A Markdown table of rows: the title of each column, and what `str.format` makes a cell of a row with."""
    return markdown([title for title, _ in columns], [[cell.format(**row) for _, cell in columns] for row in rows])


def _times(row: dict, name: str) -> str:
    return f"{row[name]:.2f} x" if name in row else ""


def _speed_table(rows: list[dict]) -> str:
    columns = (
        *PLACE,
        ("tokens/s", "{tokens_per_second:,.1f}"),
        ("to full heads", "{to_full}"),
        ("to MQA", "{to_mqa}"),
        ("notes/s", "{notes_per_second:,.1f}"),
        ("ms/token", "{ms_per_token:.2f}"),
        ("ms/note p50 / p95 / p99", "{ms_per_note_p50:.1f} / {ms_per_note_p95:.1f} / {ms_per_note_p99:.1f}"),
        ("first note", "{first_note_ms:,.0f} ms"),
        ("prefill tokens/s", "{prefill_tokens_per_second:,.0f}"),
    )
    ratios = [{"to_full": _times(row, "speed_ratio"), "to_mqa": _times(row, "mqa_speed_ratio")} for row in rows]
    return formatted(columns, [row | own for row, own in zip(rows, ratios, strict=True)])


def _drafting_table(rows: list[dict]) -> str:
    columns = (
        *PLACE,
        ("greedy tokens/pass", "{tokens_per_pass:.2f}"),
        ("tokens/s", "{tokens_per_second:,.1f}"),
        ("sampled tokens/pass", "{sampled_tokens_per_pass:.2f}"),
        ("tokens/s", "{sampled_tokens_per_second:,.1f}"),
        ("to full heads, greedy", "{to_full}"),
    )
    return formatted(columns, [row | {"to_full": _times(row, "sampled_speed_ratio")} for row in rows])


def _memory_table(rows: list[dict]) -> str:
    columns = ["context", "model", "batch", "cache bytes/token", "padded", "allocated", "cache", "peak memory"]
    columns += ["moved a step", "share of products", "share of streaming"]
    cells = []
    for row in rows:
        names = ("cache_bytes_per_token", "cache_padded_bytes_per_token", "cache_allocated_bytes_per_token")
        line = [*(cell.format(**row) for _, cell in PLACE), *(f"{row[name]:,.0f}" for name in names)]
        is_padded = row["cache_padded_bytes_per_token"] > row["cache_bytes_per_token"]
        padded = f" (padded 1/{row['cache_padded_ratio']:.1f})" if is_padded and "cache_padded_ratio" in row else ""
        line.append(f"1/{row['cache_ratio']:.1f}{padded}" if "cache_ratio" in row else "")
        line.append(f"{row['peak_mb']:,.0f} MB" if "peak_mb" in row else "")
        if "step_bytes" in row:
            line.append(f"{row['step_bytes'] / 1e6:,.1f} MB")
            line += [f"{100 * row[name]:.0f} %" for name in ("roofline_products", "roofline_stream")]
        else:
            line += ["", "", ""]
        cells.append(line)
    return markdown(columns, cells)


def _training_table(rows: list[dict]) -> str:
    columns = (
        *PLACE,
        ("parameters", "{parameters:,}"),
        ("intermediate size", "{intermediate_size:,}"),
        ("training step", "{training_step_s} s"),
        ("time", "{time_ratio:.3f} x"),
    )
    return formatted(columns, rows)


def figure(result: dict, path: str | os.PathLike) -> Path:
    """Write a PNG of tokens per second (left) and cache memory of a sequence (right) against the context.

    It shows the smallest batch of `result`, a result of `compare`. Returns the path.

    Raises:
        ValueError: `result` has no rows to draw.
        MissingExtraError: matplotlib is not installed.
    """
    drawn = [row for row in result.get("rows", []) if row["key"] in COLOURS]
    if not drawn:
        raise ValueError("this result has no rows to draw: it takes one of decoding, with one of the models at least.")
    batch = min(row["batch"] for row in drawn)
    lines: dict[str, list[dict]] = {}
    for key in COLOURS:
        line = sorted((r for r in drawn if r["key"] == key and r["batch"] == batch), key=lambda r: r["context"])
        if line:
            lines[key] = line
    picture = reports.figure(10, 4.4)
    left, right = picture.subplots(1, 2)
    speeds = {key: [row["tokens_per_second"] for row in line] for key, line in lines.items()}
    _draw(left, lines, speeds, "tokens per second" + (f", batch {batch}" if batch > 1 else ""))
    memory = {
        key: [row["cache_padded_bytes_per_token"] * row["context"] / 1e6 for row in line] for key, line in lines.items()
    }
    # Weights of lower precision, compiling and drafting leave the cache as it is: it is drawn once.
    cached = {key: values for key, values in memory.items() if not key.startswith("int8") or "ours" not in lines}
    _draw(right, lines, cached, "cache of one sequence, MB")
    return write_atomic(path, reports.png(picture))


def _draw(axes, lines: dict[str, list[dict]], values: dict[str, list[float]], title: str) -> None:
    """A line per key, named where it ends."""
    from matplotlib.ticker import FuncFormatter, NullLocator

    axes.set(xscale="log", yscale="log")
    for key, heights in values.items():
        ours = key not in ("full", "gqa", "mqa")
        contexts = [row["context"] for row in lines[key]]
        axes.plot(contexts, heights, color=COLOURS[key], linewidth=2.2 if ours else 1.4, marker="o", markersize=4)
    contexts = sorted({row["context"] for key in values for row in lines[key]})
    axes.set_xticks(contexts, [f"{context:,}" for context in contexts])
    axes.xaxis.set_minor_locator(NullLocator())
    heights = [height for line in values.values() for height in line]
    low, high = min(heights) / 1.15, max(heights) * 1.15
    axes.set_ylim(low, high)
    axes.set_yticks(_round_numbers(low, high))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda height, _: f"{height:,g}"))
    axes.grid(axis="y", color="black", linewidth=0.4, alpha=0.15)
    reports.plain(axes)
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel("context, tokens")
    ends = {
        key: axes.transLimits.transform(axes.transScale.transform((contexts[-1], line[-1])))[1]
        for key, line in values.items()
    }
    for key, height in _apart(ends).items():
        axes.text(
            1.02, height, lines[key][0]["model"], transform=axes.transAxes, color=COLOURS[key], va="center", fontsize=9
        )


def _round_numbers(low: float, high: float) -> list[float]:
    """1, 2, 5, 10, 20 ... between two positive numbers."""
    return [n * 10.0**e for e in range(-6, 9) for n in (1, 2, 5) if low <= n * 10.0**e <= high]


def _apart(heights: dict[str, float]) -> dict[str, float]:
    """Heights of labels, as shares of the axis, moved as little up as keeps them legible, and back below the top."""
    placed: dict[str, float] = {}
    last = -1.0
    for key in sorted(heights, key=heights.get):
        placed[key] = last = max(heights[key], last + GAP)
    ceiling = 1.0 + GAP
    for key in reversed(placed):
        placed[key] = min(placed[key], ceiling - GAP)
        ceiling = placed[key]
    return placed
