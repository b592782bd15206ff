"""Bootstrap intervals: known distributions, coverage, and refusals."""

import math
import tracemalloc

import numpy as np
import pytest

from sage_studio.metrics import Interval, bootstrap, bootstrap_difference

pytestmark = pytest.mark.filterwarnings("error")


def test_two_values_by_hand():
    # Resampled means of 0 and 1 are 0, 1/2, 1 with chances 1/4, 1/2, 1/4. Quantiles 0.025 and 0.975 are 0 and 1; those
    # of level 0.4, 0.3 and 0.7, lie between 1/4 and 3/4: both 1/2.
    assert bootstrap([0, 1]) == Interval(mean=0.5, low=0, high=1, n=2)
    assert bootstrap([0, 1], level=0.4) == Interval(0.5, 0.5, 0.5, 2)
    # A difference of two such: -1, -1/2, 0, 1/2, 1 with chances 1, 4, 6, 4, 1 of 16; summed 0.06, 0.31, 0.69, 0.94, 1.
    assert bootstrap_difference([0, 1], [0, 1]) == Interval(0, -1, 1, 2)
    assert bootstrap_difference([0, 1], [0, 1], level=0.8) == Interval(0, -0.5, 0.5, 2)  # quantiles 0.1 and 0.9
    assert bootstrap_difference([0, 1], [0, 1], level=0.2) == Interval(0, 0, 0, 2)  # 0.4 and 0.6


def test_many_values_give_the_normal_interval():
    values = np.random.default_rng(1).normal(10, 2, 2000)
    found = bootstrap(values)
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert found.mean == values.mean() and found.n == 2000
    assert found.low == pytest.approx(found.mean - half, abs=0.05 * half)
    assert found.high == pytest.approx(found.mean + half, abs=0.05 * half)
    narrower = bootstrap(values, level=0.5)
    assert found.low < narrower.low < narrower.high < found.high


def test_the_interval_holds_the_true_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(400):
        found = bootstrap(rng.exponential(1.0, 60), level=0.9, resamples=400)
        held += found.low <= 1 <= found.high
    assert 0.83 < held / 400 < 0.93  # 0.9, less what the percentile method loses on skewed values; 0.015 of chance


def test_pairs_are_kept_together():
    rng = np.random.default_rng(0)
    hard = rng.normal(50, 20, 40)  # pieces differ much more than the two systems do
    better, worse = hard + rng.normal(1, 0.5, 40), hard
    paired, apart = bootstrap_difference(better, worse, paired=True), bootstrap_difference(better, worse)
    assert paired.mean == pytest.approx(apart.mean) == pytest.approx(1, abs=0.3)
    assert 0 < paired.low < paired.mean < paired.high < 2
    assert apart.low < 0 < apart.high
    assert paired == bootstrap(better - worse)
    assert bootstrap_difference(hard, hard, paired=True)[:3] == (0, 0, 0)


def test_unequal_sizes():
    rng = np.random.default_rng(0)
    a, b = rng.normal(3, 1, 500), rng.normal(1, 1, 80)
    found = bootstrap_difference(a, b)
    half = 1.96 * math.sqrt(a.var() / 500 + b.var() / 80)
    assert found.n == 80 and found.mean == pytest.approx(a.mean() - b.mean())
    assert found.high - found.low == pytest.approx(2 * half, rel=0.05)


def test_one_value_and_equal_values_have_no_width():
    assert bootstrap([3.7]) == Interval(3.7, 3.7, 3.7, 1)
    for n in (3, 7, 100, 1001):
        found = bootstrap(np.full(n, 0.1))
        assert found.low == found.high == found.mean == pytest.approx(0.1)


def test_a_seed_is_an_interval():
    values = np.random.default_rng(0).normal(size=50)
    assert bootstrap(values, seed=3) == bootstrap(values, seed=3) != bootstrap(values, seed=4)
    assert bootstrap_difference(values, values[:9], seed=3) == bootstrap_difference(values, values[:9], seed=3)


def test_many_resamples_of_many_values_are_never_held_at_once():
    values = np.random.default_rng(0).normal(size=10_000)
    tracemalloc.start()
    bootstrap(values, resamples=2_000)  # all at once: 160 MB of draws
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40e6


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: bootstrap([]), r"values has shape \(0,\)"),
        (lambda: bootstrap(3.0), r"values has shape \(\)"),
        (lambda: bootstrap([[1.0, 2.0]]), r"values has shape \(1, 2\)"),
        (lambda: bootstrap([1, math.nan, 2]), r"values\[1\] is nan"),
        (lambda: bootstrap([1, 2, math.inf]), r"values\[2\] is inf"),
        (lambda: bootstrap([1, 2], level=95), "level=95"),
        (lambda: bootstrap([1, 2], resamples=0), "resamples=0"),
        (lambda: bootstrap_difference([1], []), r"b has shape \(0,\)"),
        (lambda: bootstrap_difference([math.nan], [1]), r"a\[0\] is nan"),
        (lambda: bootstrap_difference([1, 2], [1], paired=True), "a has 2 values and b 1"),
    ],
)
def test_what_has_no_interval_is_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()
