import math
from statistics import NormalDist

import numpy as np
import pytest

from sage_studio.metrics import densities as module
from sage_studio.metrics.densities import MODES, bandwidth, densities, distances, divergence, log_density

pytestmark = pytest.mark.filterwarnings("error")


def bell(mean: float, deviation: float, n: int = 4000) -> np.ndarray:
    """n values spread as a normal distribution: its quantiles."""
    normal = NormalDist(mean, deviation)
    return np.array([normal.inv_cdf((i + 0.5) / n) for i in range(n)])


def naive_density(values, width, x):
    kernels = [math.exp(-(((x - value) / width) ** 2) / 2) / (width * math.sqrt(2 * math.pi)) for value in values]
    return sum(kernels) / len(values)


def test_distances_by_hand():
    # Points (0,0), (3,4), (0,4) on a plane: 5 between the first two, 4 and 3 to the third, each pair both ways.
    intra, inter = distances(np.array([[0, 0], [3, 4], [0, 4]]), np.array([[0, 0], [6, 8]]))
    assert intra.tolist() == [5, 4, 5, 3, 4, 3]
    # From each of them to (0,0) and (6,8); (0,4) to (6,8) is the root of 36 + 16.
    assert inter == pytest.approx([0, 10, 5, 5, 4, math.sqrt(52)])
    # A matrix counts as its entries one after another, a scalar as one.
    square = distances(np.array([[[0, 0], [0, 0]], [[1, 1], [1, 1]]]), np.array([[[2, 0], [0, 0]]]))
    assert [d.tolist() for d in square] == [[2, 2], [2, 2]]
    assert [d.tolist() for d in distances(np.array([1.0, 3.0]), np.array([4.0]))] == [[2, 2], [3, 1]]


@pytest.mark.parametrize(
    "reference, generated, message",
    [
        (np.zeros((1, 12)), np.zeros((3, 12)), "1 reference and 3 generated"),
        (np.zeros((2, 12)), np.zeros((0, 12)), "2 reference and 0 generated"),
        (np.zeros((2, 12)), np.zeros((2, 11)), r"shape \(12,\), a generated one \(11,\)"),
    ],
)
def test_distances_of_too_little(reference, generated, message):
    with pytest.raises(ValueError, match=message):
        distances(reference, generated)


def test_scotts_bandwidth_by_hand():
    # Sample variance of 1, 2, 3, 4: (2.25 + 0.25 + 0.25 + 2.25) / 3 = 5/3.
    assert bandwidth(np.array([1.0, 2, 3, 4])) == pytest.approx(math.sqrt(5 / 3) * 4**-0.2)
    assert bandwidth(np.full(9, 0.1)) == bandwidth(np.array([7.0])) == 0
    assert bandwidth(np.array([5000.0, 5000 + 1e-9])) == 0  # rounding is no spread


def test_log_density_is_the_sum_of_kernels_and_finite_far_away():
    values = np.array([0.0, 1, 1, 4])
    for x in (-2.0, 0, 0.9, 2.5, 5):
        assert log_density(values, 0.5, np.array([x]))[0] == pytest.approx(math.log(naive_density(values, 0.5, x)))
    # 1,000 bandwidths below the lowest value only that kernel is left: 1/4 of it, and exp(-500,000) underflows.
    left = math.log(1 / 4) - 0.5 * 1000**2 - math.log(0.5 * math.sqrt(2 * math.pi))
    assert log_density(values, 0.5, np.array([-500.0]))[0] == pytest.approx(left)


def test_many_distances_are_binned_without_harm(monkeypatch):
    values = np.random.default_rng(0).gamma(3, 2, 30_000)
    x, width = np.linspace(0, 40, 200), bandwidth(values)
    exact = log_density(values, width, x)
    monkeypatch.setattr(module, "EXACT", 1000)
    binned = log_density(values, width, x)
    assert not np.array_equal(binned, exact)
    assert binned == pytest.approx(exact, abs=1e-4)


def test_normal_densities_have_the_textbook_divergence():
    # A kernel density of a normal list is normal, both widened by the same sqrt(1 + n^(-2/5)): for N(0,1) and N(1,1),
    # scaled to s, KLD = (1/s)²/2 and OA = 2 Φ(-1/(2 s)); the lists are shortened at both ends, hence the tolerance.
    scale = math.sqrt(1 + 4000**-0.4)
    kld, oa, constant = divergence(bell(0, 1), bell(1, 1))
    assert kld == pytest.approx(1 / (2 * scale**2), abs=8e-3)
    assert oa == pytest.approx(2 * NormalDist().cdf(-0.5 / scale), abs=4e-3)
    assert not constant
    # N(0,1) against N(0,2): KLD = ln 2 + 1/8 - 1/2 in nats; the scale cancels.
    assert divergence(bell(0, 1), bell(0, 2)).kld == pytest.approx(math.log(2) - 3 / 8, abs=4e-3)
    # They cross at ±x where exp(-x²/2) = exp(-x²/8)/2: x² = 8 ln(2)/3; inside the wide one is lower, outside the other.
    cross = math.sqrt(8 * math.log(2) / 3)
    overlap = 2 * (NormalDist(0, 2).cdf(cross) - 0.5) + 2 * NormalDist().cdf(-cross)
    assert divergence(bell(0, 1), bell(0, 2)).oa == pytest.approx(overlap, abs=4e-3)


@pytest.mark.parametrize("mode", MODES)
def test_a_list_against_itself(mode):
    kld, oa, constant = divergence(bell(5, 1), bell(5, 1), mode)
    assert (kld, constant) == (0, False)
    # mgeval leaves out the tails beyond the outermost distances.
    assert oa == pytest.approx(1, abs=1e-12 if mode == "corrected" else 1e-3)


def test_corrected_sees_a_shift_that_mgeval_does_not():
    # mgeval lays one list's density beside the other's on a grid of its own: shape is all that is left.
    assert divergence(bell(0, 1), bell(3, 1), "mgeval").kld == pytest.approx(0, abs=1e-9)
    assert divergence(bell(0, 1), bell(3, 1)).kld > 4
    # As the scale of all distances changes neither number does.
    for mode in MODES:
        small, large = (divergence(k * bell(3, 1), k * bell(4, 2), mode) for k in (1, 1000))
        assert large == pytest.approx(small)


def test_constant_distances():
    same, ones = np.zeros(6), np.ones(6)
    assert divergence(same, np.zeros(9)) == (0, 1, True)
    kld, oa, constant = divergence(same, ones)
    assert math.isnan(kld) and (oa, constant) == (0, True)
    # 99 of 100 inter distances are 0, as all intra distances, one is 1: with inter's bandwidth, 0.04, the density of
    # intra is p and that of inter 0.99 p and a far bump: OA 0.99, KLD ln(1/0.99).
    nearly = np.array([0.0] * 99 + [1.0])
    assert divergence(same, nearly) == pytest.approx((math.log(1 / 0.99), 0.99, True), abs=1e-6)
    # The other way round: 0.01 of the mass lies 25 bandwidths (1/0.0398) away from any of the other's.
    width = 0.1 * 100**-0.2
    kld = 0.99 * math.log(0.99) + 0.01 * (math.log(0.01) + 0.5 / width**2)
    assert divergence(nearly, same).kld == pytest.approx(kld, rel=1e-2)
    assert divergence(nearly, same).oa == pytest.approx(0.99, abs=1e-6)
    for lists in ((same, nearly), (nearly, same), (same, same)):
        assert np.isnan(divergence(*lists, "mgeval")[:2]).all()
        assert divergence(*lists, "mgeval").constant


@pytest.mark.parametrize("lists", [(bell(5, 1), bell(9, 0.01)), (np.zeros(4), bell(2, 1)), (np.zeros(3), np.ones(3))])
def test_densities_to_plot_integrate_to_one(lists):
    x, intra, inter = densities(*lists)
    assert (np.diff(x) > 0).all() and len(x) == len(intra) == len(inter)
    assert [np.trapezoid(curve, x) for curve in (intra, inter)] == pytest.approx([1, 1])
    # A bell a hundred times narrower than the other list's keeps its height.
    if lists[1].std() < 0.1 < lists[0].std():
        assert inter.max() == pytest.approx(1 / (0.01 * math.sqrt(2 * math.pi * (1 + 4000**-0.4))), rel=0.01)


@pytest.mark.parametrize("n, m", [(2, 2), (3, 5), (20, 7), (30, 30)])
def test_mgeval_equals_scipy_and_mgevals_procedure(n, m):
    stats, integrate = pytest.importorskip("scipy.stats"), pytest.importorskip("scipy.integrate")
    rng = np.random.default_rng(n)
    intra, inter = rng.gamma(3, 2, n * (n - 1)), rng.gamma(4, 2, n * m)
    p, q = stats.gaussian_kde(intra), stats.gaussian_kde(inter)
    x = np.linspace(0, 20, 50)
    assert np.exp(log_density(intra, bandwidth(intra), x)) == pytest.approx(p(x), rel=1e-9)
    grids = [np.linspace(values.min(), values.max(), 1000) for values in (intra, inter)]
    ends = min(intra.min(), inter.min()), max(intra.max(), inter.max())
    kld, oa, _ = divergence(intra, inter, "mgeval")
    assert kld == pytest.approx(stats.entropy(p(grids[0]), q(grids[1])), rel=1e-9)
    overlap = integrate.quad(lambda x: min(p(x)[0], q(x)[0]), *ends, limit=500)[0]
    assert oa == pytest.approx(overlap, abs=1e-5)


def test_mgeval_equals_its_procedure_written_out():
    intra, inter = np.array([1.0, 3, 1, 2, 3, 2]), np.array([2.0, 3, 1, 2, 1, 0])
    widths = [math.sqrt(sum((v - values.mean()) ** 2 for v in values) / 5) * 6**-0.2 for values in (intra, inter)]
    p, q = (
        [naive_density(values, width, x) for x in np.linspace(values.min(), values.max(), 1000)]
        for values, width in zip((intra, inter), widths, strict=True)
    )
    p, q = [value / sum(p) for value in p], [value / sum(q) for value in q]
    kld = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    middles = (np.arange(3000) + 0.5) / 1000  # of 3,000 strips from 0 to 3
    overlap = sum(min(naive_density(intra, widths[0], x), naive_density(inter, widths[1], x)) for x in middles) / 1000
    assert divergence(intra, inter, "mgeval") == pytest.approx((kld, overlap, False), rel=1e-5)
    assert divergence(intra, inter, "mgeval").kld == pytest.approx(kld, rel=1e-9)


def test_unknown_mode():
    with pytest.raises(ValueError, match="mode is 'plain'; it must be one of corrected, mgeval"):
        divergence(np.arange(3.0), np.arange(3.0), "plain")
