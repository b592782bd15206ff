"""Distances within a set and between two sets, their densities, and what two densities have in common: KLD and OA.

After Yang & Lerch, "On the evaluation of generative models in music" (Neural Computing and Applications, 2018), and
the code published with it, mgeval. The distances of the reference's pieces from each other (*intra*) and from the
generated pieces (*inter*) each get a Gaussian kernel density; generated music like the reference makes the two alike.

Conventions: features are arrays of one row a piece; a list of distances is `(n,)`, in the feature's unit; KLD is in
nats, 0 or more (0: alike); OA, the overlap area, is in [0, 1] (1: alike). `mode` is one of `MODES`:

- `corrected`: both densities on one grid that covers both with their tails, so that KLD is `∫ p log(p/q)` of two
  densities and each integrates to 1.
- `mgeval`: what mgeval computes, for comparison with published tables: KLD puts p's 1,000 values on p's range beside
  q's 1,000 values on q's own range, each normalised by its sum (no divergence of two densities: it may be 0 for very
  different lists that have one shape); OA leaves out what lies beyond the smallest and the largest distance.

Distances that are all equal have no kernel density: see `divergence`.
"""

from typing import NamedTuple

import numpy as np

MODES = ("corrected", "mgeval")
SAMPLES = 1000  # of each density, as mgeval
TAIL = 5.0  # bandwidths beyond the outermost distance, where 6e-7 of a kernel is left
# Distances that differ by less are equal: beneath any unit in use (semitones, notes, seconds, shares).
SAME = 1e-9
# Up to so many different distances (224 pieces against 224) a density is exact; more are binned, which bounds the time.
EXACT, BINS = 50_000, 16_384
CHUNK = 1 << 21  # kernel values held at a time: 16 MB


class Densities(NamedTuple):
    """What a plot needs: positions `x` (k,) in the feature's unit, ascending, and both densities there (k,)."""

    x: np.ndarray
    intra: np.ndarray
    inter: np.ndarray


class Divergence(NamedTuple):
    """How much two lists of distances differ; see `divergence`."""

    kld: float
    oa: float
    constant: bool


def distances(reference: np.ndarray, generated: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Euclidean distances `(intra, inter)` of one feature: (n(n-1),) between different pieces of the reference, each
    pair both ways (leave-one-out), and (n·m,) from each piece of the reference to each generated one.

    Args:
        reference: (n, ...) the feature of the reference's pieces; any shape, flattened.
        generated: (m, ...) the same of the generated pieces.

    Raises:
        ValueError: fewer than two reference pieces, no generated piece, or features of different shapes.
    """
    reference, generated = np.asarray(reference, dtype=np.float64), np.asarray(generated, dtype=np.float64)
    if len(reference) < 2 or len(generated) < 1:
        found = f"{len(reference)} reference and {len(generated)} generated"
        raise ValueError(f"{found} pieces: distances need at least 2 reference pieces and 1 generated piece.")
    if reference.shape[1:] != generated.shape[1:]:
        raise ValueError(f"a reference piece has shape {reference.shape[1:]}, a generated one {generated.shape[1:]}.")
    reference, generated = reference.reshape(len(reference), -1), generated.reshape(len(generated), -1)
    # Differences, row by row: the product formula would leave rounding where equal pieces have distance 0.
    intra = np.stack([np.linalg.norm(reference - row, axis=1) for row in reference])
    inter = np.concatenate([np.linalg.norm(generated - row, axis=1) for row in reference])
    return intra[~np.eye(len(reference), dtype=bool)], inter


def bandwidth(values: np.ndarray) -> float:
    """Scott's rule: sample standard deviation (n-1) times `n^(-1/5)`; 0 where all values are equal (within 1e-9)."""
    if len(values) < 2 or np.ptp(values) <= SAME * max(1.0, float(np.abs(values).max())):
        return 0.0
    return float(values.std(ddof=1)) * len(values) ** -0.2


def log_density(values: np.ndarray, width: float, x: np.ndarray) -> np.ndarray:
    """Natural log of the Gaussian kernel density of `values` (n,) at `x` (k,): (k,), finite however far away.

    `log(1/n Σ_i N(x; values_i, width²))`, exact for up to `EXACT` different values; more are shared out between
    `BINS` points evenly spaced (relative error below 1e-4 where the kernel spans several bins, as Scott's does).
    """
    points, weights = np.unique(values, return_counts=True)
    if len(points) > EXACT:
        position = (points - points[0]) / np.ptp(points) * (BINS - 1)
        left = np.minimum(position.astype(np.int64), BINS - 2)
        share = position - left
        points = np.linspace(points[0], points[-1], BINS)
        weights = np.bincount(left, weights * (1 - share), BINS) + np.bincount(left + 1, weights * share, BINS)
        points, weights = points[weights > 0], weights[weights > 0]
    right = np.searchsorted(points, x).clip(0, len(points) - 1)
    nearest = np.minimum(np.abs(x - points[right]), np.abs(x - points[np.maximum(right - 1, 0)]))
    # The nearest value's exponent is taken out of the sum: far from all values the rest does not vanish.
    peak = -0.5 * (nearest / width) ** 2
    total = np.empty(len(x))
    step = max(CHUNK // len(points), 1)
    for start in range(0, len(x), step):
        part = slice(start, start + step)
        exponent = (x[part, None] - points) / width
        np.multiply(exponent, exponent, out=exponent)
        exponent *= -0.5
        exponent -= peak[part, None]
        total[part] = np.exp(exponent, out=exponent) @ weights
    return peak + np.log(total) - np.log(len(values) * width * np.sqrt(2 * np.pi))


def densities(intra: np.ndarray, inter: np.ndarray) -> Densities:
    """Both kernel densities on one grid that covers both with their tails, each integrating to 1 by trapezoids.

    A constant list takes the other's bandwidth: it is a peak as sharp as the other's detail. Two constant lists are
    drawn with a width of 0.001 or 0.1 % of the larger, whichever is more.
    """
    x, log_p, log_q = _log_densities(intra, inter)
    return Densities(x, np.exp(log_p), np.exp(log_q))


def divergence(intra: np.ndarray, inter: np.ndarray, mode: str = "corrected") -> Divergence:
    """KLD(intra ‖ inter) in nats and OA of two lists of distances, and whether one of them is constant.

    A constant list (all distances equal, as those of two reference pieces always are) has no kernel density. In mode
    `corrected` it takes the bandwidth of the other; are both constant, then they are alike (KLD 0, OA 1) or share
    nothing (KLD NaN, for it is infinite; OA 0). In mode `mgeval` both numbers are NaN: mgeval itself stops there.

    Known differences from mgeval in mode `mgeval`: densities are taken as logarithms, so that KLD stays finite where
    its q underflows to 0 and KLD to infinity; OA is integrated by trapezoids over 3,000 points (mgeval: adaptive
    quadrature), equal to about 1e-5.

    Raises:
        ValueError: an unknown mode.
    """
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}; it must be one of {', '.join(MODES)}.")
    widths = bandwidth(intra), bandwidth(inter)
    constant = not all(widths)
    if mode == "mgeval":
        return Divergence(np.nan, np.nan, True) if constant else Divergence(*_mgeval(intra, inter, widths), False)
    if not any(widths):
        alike = abs(intra[0] - inter[0]) <= SAME * max(1.0, abs(intra[0]), abs(inter[0]))
        return Divergence(0.0, 1.0, True) if alike else Divergence(np.nan, 0.0, True)
    x, log_p, log_q = _log_densities(intra, inter)
    weight, p = _trapezoids(x), np.exp(log_p)
    kld = float((weight * p * (log_p - log_q)).sum())
    return Divergence(max(kld, 0.0), _overlap(x, p, np.exp(log_q)), constant)


def _log_densities(intra: np.ndarray, inter: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The common grid and both log densities there, normalised on it."""
    width, other = bandwidth(intra), bandwidth(inter)
    if not width and not other:
        width = 1e-3 * max(1.0, float(np.max(intra)), float(np.max(inter)))
    width, other = width or other, other or width
    # Each list's own range at its own spacing: a narrow density beside a wide one keeps its shape.
    x = _grid(
        (intra.min() - TAIL * width, intra.max() + TAIL * width),
        (inter.min() - TAIL * other, inter.max() + TAIL * other),
    )
    weight = _trapezoids(x)
    log_p, log_q = log_density(intra, width, x), log_density(inter, other, x)
    return x, log_p - np.log((weight * np.exp(log_p)).sum()), log_q - np.log((weight * np.exp(log_q)).sum())


def _mgeval(intra: np.ndarray, inter: np.ndarray, widths: tuple[float, float]) -> tuple[float, float]:
    """mgeval's `kl_dist` and `overlap_area` of two lists that are not constant."""
    shares = []
    for values, width in zip((intra, inter), widths, strict=True):
        log = log_density(values, width, np.linspace(values.min(), values.max(), SAMPLES))
        shares.append(log - log.max() - np.log(np.exp(log - log.max()).sum()))
    kld = float((np.exp(shares[0]) * (shares[0] - shares[1])).sum())
    x = _grid((intra.min(), intra.max()), (inter.min(), inter.max()))
    p, q = (np.exp(log_density(values, width, x)) for values, width in zip((intra, inter), widths, strict=True))
    return max(kld, 0.0), _overlap(x, p, q)


def _grid(first: tuple[float, float], second: tuple[float, float]) -> np.ndarray:
    """`SAMPLES` points over either range and over both together, sorted."""
    both = min(first[0], second[0]), max(first[1], second[1])
    return np.unique(np.concatenate([np.linspace(*ends, SAMPLES) for ends in (first, second, both)]))


def _trapezoids(x: np.ndarray) -> np.ndarray:
    """Weights of the trapezoidal rule on uneven points."""
    steps = np.diff(x) / 2
    return np.concatenate([steps, [0.0]]) + np.concatenate([[0.0], steps])


def _overlap(x: np.ndarray, p: np.ndarray, q: np.ndarray) -> float:
    """`∫ min(p, q)`, at most 1."""
    return min(float((_trapezoids(x) * np.minimum(p, q)).sum()), 1.0)
