"""How sure a mean is: bootstrap intervals (Efron 1979), the percentile method.

Conventions: values are one number a piece (or a seed), independent of each other. An interval holds the mean of another
such sample with probability `level`, as far as this sample tells. A difference whose interval holds 0 is not a
difference. The percentile method is a little narrow for few values: below about ten, read `n` before the interval.
"""

from typing import NamedTuple

import numpy as np

# Values drawn at once: 10,000 resamples of 10,000 values would be 0.8 GB.
CHUNK = 1_000_000


class Interval(NamedTuple):
    """A mean (or a difference of means), the interval around it, and how many values it comes from."""

    mean: float
    low: float
    high: float
    n: int


def bootstrap(values: np.ndarray, level: float = 0.95, resamples: int = 10_000, seed: int = 0) -> Interval:
    """Percentile bootstrap of the mean: the `(1 - level) / 2` and `(1 + level) / 2` quantiles of resampled means.

    Each of `resamples` resamples draws `n` of the `n` values with replacement. The same seed gives the same interval.
    One value has no spread to draw from: `low = high = mean`, with `n = 1` to say so.

    Args:
        values: (n,) numbers, n >= 1.

    Raises:
        ValueError: no values, more than one dimension, a value that is not finite, `level` outside (0, 1), or no
        resamples.
    """
    values = _checked(values, "values", level, resamples)
    means = _resampled_means(values, resamples, np.random.default_rng(seed))
    return _interval(float(values.mean()), means, level, len(values))


def bootstrap_difference(
    a: np.ndarray,
    b: np.ndarray,
    paired: bool = False,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap of `mean(a) - mean(b)`.

    Unpaired, both are resampled on their own, and `n` is the smaller number of values. Paired (the same pieces scored
    twice, in the same order), pieces are resampled with both their scores: `bootstrap(a - b)`, and much narrower where
    hard pieces are hard for both.

    Raises:
        ValueError: as `bootstrap`, and for paired values of different lengths.
    """
    a = _checked(a, "a", level, resamples)
    b = _checked(b, "b", level, resamples)
    if paired:
        if len(a) != len(b):
            raise ValueError(f"a has {len(a)} values and b {len(b)}: paired values come from the same pieces.")
        return bootstrap(a - b, level, resamples, seed)
    rng = np.random.default_rng(seed)
    differences = _resampled_means(a, resamples, rng) - _resampled_means(b, resamples, rng)
    return _interval(float(a.mean() - b.mean()), differences, level, min(len(a), len(b)))


def _checked(values: np.ndarray, name: str, level: float, resamples: int) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"{name} has shape {values.shape}: an interval needs a list of at least one number.")
    wrong = np.flatnonzero(~np.isfinite(values))
    if len(wrong):
        raise ValueError(
            f"{name}[{wrong[0]}] is {values[wrong[0]]}: count failed pieces, and score them or leave them out."
        )
    if not 0 < level < 1 or resamples < 1:
        raise ValueError(f"level={level}, resamples={resamples}: level is between 0 and 1, and resamples at least 1.")
    return values


def _resampled_means(values: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Means of `resamples` draws of `len(values)` values with replacement: `(resamples,)`."""
    size = len(values)
    rows = max(CHUNK // size, 1)
    parts = []
    for start in range(0, resamples, rows):
        drawn = rng.integers(0, size, (min(rows, resamples - start), size), dtype=np.int32)
        parts.append(values[drawn].mean(axis=1))
    return np.concatenate(parts)


def _interval(mean: float, resampled: np.ndarray, level: float, n: int) -> Interval:
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    return Interval(mean, float(low), float(high), n)
