"""NMSI: how far a continuation is from the true one, bar by bar (SAGE-Music, arXiv 2510.00395).

Conventions:

- Notes are note arrays (`music.notes`), in seconds. Time is compared on a *grid*: the `16 * bars + 1` times, in
  seconds, of the sixteenths of consecutive bars and of the bar line that ends them. The generated and the reference
  music each have their own grid, so tempo does not matter; `bar_grid` makes one from a score, `steady_grid` one for
  music without bars.
- A sixteenth is a sixteenth *of the bar*, whatever the meter: a sixteenth note in 4/4, a dotted thirty-second in 3/4.
- An onset belongs to the nearest sixteenth. What is nearest to the grid's last time is the first onset of the bar after
  the grid, and does not count; nor does anything else outside. Durations and velocities are not looked at.
- Drums have no pitch class: they count in groove and density only. Programs are not told apart.
- Every number is defined for every input. Two empty vectors are alike (cosine 1), an empty and another are not (0):
  silence where the reference is silent is right. Music of drums only therefore scores 1 in chroma and self-similarity.

The paper names NMSI's four parts and publishes neither formulas nor normalisers. The parts with code in StructurePE
(Agarwal et al., ICASSP 2024) are taken, each bounded to [0, 1]: numbers here are not comparable with the paper's own.
"""

import numpy as np
from symusic import Score

from sage_studio.music.midi import bar_ticks, tick_to_seconds

SIXTEENTHS = 16  # of a bar, whatever its meter
# symusic counts seconds in single precision: 3e-5 s off after five minutes. An onset half-way between two sixteenths (a
# thirty-second note) must go the same way in every bar, so that the border lies this share of a sixteenth before the
# middle.
HALFWAY = 1e-3


def bar_grid(score: Score, first_bar: int, bars: int) -> np.ndarray:
    """Sixteenths of bars `first_bar` (0-based) to `first_bar + bars - 1` of a score: `(16 * bars + 1,)` seconds.

    Each bar is divided in ticks, by the score's meters, then timed by its tempos: exact across changes of either. Bars
    go on after the score's end, in its last meter and tempo, so that a continuation can be longer than the piece.

    Raises:
        ValueError: `first_bar` is negative or `bars` is not positive.
    """
    if first_bar < 0 or bars < 1:
        raise ValueError(
            f"first_bar is {first_bar} and bars is {bars}: a grid begins at bar 0 or later, with a bar in it."
        )
    lines = bar_ticks(score, at_least=first_bar + bars + 1)[first_bar : first_bar + bars + 1].astype(np.float64)
    steps = np.arange(SIXTEENTHS) / SIXTEENTHS  # (16,)
    ticks = lines[:-1, None] + np.diff(lines)[:, None] * steps  # (bars, 16)
    return tick_to_seconds(score, np.append(ticks.ravel(), lines[-1]))


def steady_grid(start_s: float, bars: int, bar_s: float = 2.0) -> np.ndarray:
    """A grid of equal bars from `start_s`: `(16 * bars + 1,)` seconds.

    For music without bars, as performances; 2 s are a bar of 4/4 at 120 quarter notes a minute, MIDI's own default.

    Raises:
        ValueError: `bars` or `bar_s` is not positive, or a time is not finite.
    """
    if bars < 1 or not 0 < bar_s < np.inf or not np.isfinite(start_s):
        raise ValueError(f"start_s={start_s}, bars={bars}, bar_s={bar_s}: times are finite, bars and bar_s positive.")
    return start_s + np.arange(SIXTEENTHS * bars + 1) * (bar_s / SIXTEENTHS)


def check_grid(grid: np.ndarray, name: str = "grid") -> np.ndarray:
    """`grid` in float64, after checking that it is one.

    Raises:
        ValueError: not `(16 * bars + 1,)` finite, increasing seconds; the message begins with `name`.
    """
    grid = np.asarray(grid, dtype=np.float64)
    if grid.ndim != 1 or len(grid) <= SIXTEENTHS or len(grid) % SIXTEENTHS != 1:
        raise ValueError(f"{name} has shape {grid.shape}, not (16 * bars + 1,): make it with bar_grid or steady_grid.")
    if not (np.isfinite(grid).all() and (np.diff(grid) > 0).all()):
        raise ValueError(f"{name} must be finite, increasing times in seconds.")
    return grid


def sixteenths(notes: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """The sixteenth that every note's onset belongs to: `(notes,)` int64 in `[0, 16 * bars)`, or -1 outside the grid.

    The nearest one; half-way, the later. The first sixteenth also takes what comes up to half a step before it, as any
    other does: grids of consecutive bars share out all onsets, each to one. Raises as `check_grid`.
    """
    grid = check_grid(grid)
    steps = np.diff(grid)
    borders = np.append(grid[0] - steps[0] * (0.5 + HALFWAY), grid[:-1] + steps * (0.5 - HALFWAY))
    found = np.searchsorted(borders, notes["onset_s"], side="right") - 1
    return np.where(found < len(steps), found, -1)


def chroma_counts(notes: np.ndarray, grid: np.ndarray, step: int) -> np.ndarray:
    """Onsets per pitch class in units of `step` sixteenths (it divides 16), no drums: `(16 * bars / step, 12)`."""
    pitched = notes[notes["program"] >= 0]
    where, units = sixteenths(pitched, grid) // step, (len(grid) - 1) // step  # outside the grid: -1 again
    inside = where >= 0
    cells = where[inside] * 12 + pitched["pitch"][inside] % 12
    return np.bincount(cells, minlength=units * 12).reshape(units, 12)


def groove_counts(notes: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Onsets on every sixteenth of every bar, drums too: `(bars, 16)`."""
    where = sixteenths(notes, grid)
    return np.bincount(where[where >= 0], minlength=len(grid) - 1).reshape(-1, SIXTEENTHS)


def self_similarity_matrix(notes: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Cosine of the chroma of every two eighths of a bar ("half beats" of 4/4): `(8 * bars, 8 * bars)` in [0, 1].

    `S[i, j] = c_i . c_j / (|c_i| |c_j|)`, with `c_i` the `chroma_counts` of two sixteenths; 1 for two empty ones.
    """
    counts = _mark_empty(chroma_counts(notes, grid, 2))
    return _cosine_matrix(counts, counts)


def nmsi(
    generated: np.ndarray, reference: np.ndarray, generated_grid: np.ndarray, reference_grid: np.ndarray
) -> dict[str, float]:
    """Normalised musical similarity of a continuation to the true one: `nmsi` in [0, 100] and its four parts in [0, 1].

    `nmsi = 100 * (chroma + groove + self_similarity + note_density) / 4`, over the same number of bars of both:

    - `chroma`: cosine of onset counts per pitch class (12), per half bar (8 sixteenths); mean over half bars.
    - `groove`: cosine of onset counts per sixteenth (16), per bar; mean over bars.
    - `self_similarity`: `1 - mean |S_g - S_r|`, `S` as in `self_similarity_matrix`, its diagonal (always 1) included.
    - `note_density`: `1 - mean |n_g - n_r| / max(n_g, n_r, 1)`, `n` the onsets of a bar.

    Symmetric. A piece against itself scores exactly 100, silence against silence too.

    Args:
        generated, reference: note arrays, seconds.
        generated_grid, reference_grid: the bars compared, each in its own music's seconds: `(16 * bars + 1,)`.

    Raises:
        ValueError: a grid is none (see `check_grid`), or the two have different numbers of bars.

    Known differences: StructurePE scores two empty half bars 0 in chroma, compares grooves by the overlap of 20-bin
    histograms of their counts, and does not normalise density. FIGARO compares whole bars, and smooths onsets over a
    grid of 48. MuseMorphose (`sim_chr`, `sim_grv` of smg-metrics) compares every generated bar with the most similar
    bar of the reference anywhere, in whole bars, on 48 positions and without drums, and takes an empty bar for a
    uniform one.
    """
    generated_grid = check_grid(generated_grid, "generated_grid")
    reference_grid = check_grid(reference_grid, "reference_grid")
    if len(generated_grid) != len(reference_grid):
        bars = [(len(grid) - 1) // SIXTEENTHS for grid in (generated_grid, reference_grid)]
        raise ValueError(
            f"generated_grid has {bars[0]} bars and reference_grid {bars[1]}: compare as many bars of both."
        )
    pairs = [(generated, generated_grid), (reference, reference_grid)]
    halves = [chroma_counts(notes, grid, SIXTEENTHS // 2) for notes, grid in pairs]  # (2 * bars, 12) each
    grooves = [groove_counts(notes, grid) for notes, grid in pairs]  # (bars, 16)
    eighths = [chroma_counts(notes, grid, 2) for notes, grid in pairs]  # (8 * bars, 12)
    onsets = [groove.sum(axis=1) for groove in grooves]  # (bars,)
    most = np.maximum(np.maximum(*onsets), 1)
    parts = {
        "chroma": float(_cosines(*halves).mean()),
        "groove": float(_cosines(*grooves).mean()),
        "self_similarity": 1.0 - _self_similarity_distance(*eighths),
        "note_density": 1.0 - float((np.abs(onsets[0] - onsets[1]) / most).mean()),
    }
    return {"nmsi": 100 * sum(parts.values()) / 4, **parts}


def _mark_empty(counts: np.ndarray) -> np.ndarray:
    """Counts `(rows, n)` as floats with one more column, 1 where the row is empty: plain cosines then keep our rule."""
    return np.concatenate([counts, counts.sum(axis=1, keepdims=True) == 0], axis=1).astype(np.float64)


def _cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine of each row of `a` with the same row of `b`: `(rows,)` in [0, 1], two empty rows 1, one 0."""
    a, b = _mark_empty(a), _mark_empty(b)
    # The root of the product, not the product of roots: exact for proportional rows of whole numbers, hence exactly 1.
    return np.minimum((a * b).sum(axis=1) / np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1)), 1.0)


def _cosine_matrix(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine of every row of `a` with every row of `b`, both already marked: `(len(a), len(b))`."""
    matrix = a @ b.T
    matrix /= np.sqrt((a * a).sum(axis=1)[:, None] * (b * b).sum(axis=1))
    return np.minimum(matrix, 1.0, out=matrix)


def _self_similarity_distance(a: np.ndarray, b: np.ndarray, rows: int = 256) -> float:
    """Mean absolute difference of the self-similarity matrices of two count arrays `(units, 12)`."""
    a, b = _mark_empty(a), _mark_empty(b)
    total = 0.0
    for start in range(0, len(a), rows):  # never the whole matrices: 1,000 bars would be 0.5 GB each
        part = _cosine_matrix(a[start : start + rows], a)
        part -= _cosine_matrix(b[start : start + rows], b)
        total += float(np.abs(part, out=part).sum())
    return total / len(a) ** 2
