"Intervals and correlations: against SciPy, by their coverage, and with input that means nothing."
from functools import partial

import numpy as np
import pytest
import torch

from lap_nb import stats
from lap_nb.stats import bootstrap_mean, confidence_interval, median_interval, rank_correlation, wilson


# The mean

def test_interval_of_known_numbers():
    "Mean 2, standard deviation 1, n = 3: half width 4.3027 / sqrt(3), from a table of Student's t."
    found = confidence_interval(torch.tensor([1., 2., 3.]))
    assert (found.mean, found.high - found.mean) == pytest.approx((2, 4.302653 / 3 ** .5), rel=1e-6)


@pytest.mark.parametrize("values", [[1., 2.], [3., -1., 4., 1., 5.]])
def test_interval_of_the_mean_is_students(values):
    from scipy.stats import t
    x = torch.tensor(values, dtype=torch.float64)
    low, high = t.interval(.9, len(x) - 1, x.mean().item(), x.std().item() / len(x) ** .5)
    found = confidence_interval(x, level=.9)
    assert (found.mean, found.low, found.high) == pytest.approx((x.mean().item(), low, high)) and (
        found.n,
        found.level,
    ) == (len(x), 0.9)


@pytest.mark.parametrize("values", [[1.], [], [[1., 2.]], [1., float("nan")]])
def test_too_little_for_an_interval(values):
    with pytest.raises(ValueError, match="expected at least two finite values in one row"):
        confidence_interval(torch.tensor(values))


# A rate, a median, a mean by resampling

@pytest.mark.parametrize('good, trials, level', [(0, 7, .95), (7, 7, .9), (3, 40, .95), (39, 40, .99)])
def test_wilsons_interval_is_that_of_scipy(good, trials, level):
    from scipy.stats import binomtest
    want = binomtest(good, trials).proportion_ci(level, 'wilson')
    assert wilson(good / trials, trials, level) == pytest.approx((want.low, want.high), abs=1e-12)


@pytest.mark.parametrize("n", range(1, 12))
def test_the_median_of_a_few_lies_in_their_whole_range(n):
    values = torch.randn(n, generator=torch.Generator().manual_seed(n)).tolist()
    low, high = median_interval(values)
    if n < 9: assert (low, high) == (min(values), max(values))
    else: assert min(values) < low < high < max(values)   # of nine values, the second to the eighth: 1 - 20/512


def test_the_interval_covers_the_median():
    generator = torch.Generator().manual_seed(0)
    for n in (15, 40):
        draws = torch.randn(2000, n, generator=generator).exp()
        covered = sum(low <= 1 <= high for low, high in map(median_interval, draws.tolist())) / 2000
        assert covered > .95 - 3 * (.95 * .05 / 2000) ** .5
        if n == 40: assert covered < .995   # not the whole range


def test_the_bootstrap_weighs_its_values():
    "A value of weight zero is as good as not there; equal weights of any size are those of a plain mean."
    values, one = torch.rand(30, generator=torch.Generator().manual_seed(0),
                             dtype=torch.float64), torch.ones(30, dtype=torch.float64)
    plain = bootstrap_mean(values, one / 30, 500, .9, 0)
    assert plain == bootstrap_mean(values, one, 500, .9, 0)
    assert plain[0] < values.mean() < plain[1]
    first = one.clone(); first[1:] = 0
    low, high = bootstrap_mean(values, first, 50, .9, 0)
    assert high == pytest.approx(values[0].item()) and low in (0., high)   # a draw without it has no mean
    with pytest.raises(MemoryError, match="take fewer resamples"): bootstrap_mean(values, one, 10 ** 15, .9, 0)


# Ranks

def test_rank_correlation_is_spearmans():
    from scipy.stats import spearmanr
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn(2, 60, generator=generator)
    b = (a + b).exp()
    found = rank_correlation(a, b)
    assert found.value == pytest.approx(spearmanr(a, b).statistic, abs=1e-12)
    assert found.low < found.value < found.high and found.n == 60


def test_resampled_ranks_are_those_of_repeated_values():
    from scipy.stats import spearmanr
    rng = np.random.default_rng(0)
    a, b = rng.integers(5, size=(2, 12)) * .1   # with ties
    times = rng.integers(3, size=(20, 12))
    want = [spearmanr(np.repeat(a, t), np.repeat(b, t)).statistic for t in times]
    np.testing.assert_allclose(stats._spearman(a, b, times), want)
    # nothing, one value, two values
    assert np.isnan(stats._spearman(a, b, np.array([[0] * 12, [3] + [0] * 11, [1, 1] + [0] * 10]))).all()


def test_within_groups_the_trend_between_them_is_gone():
    generator = torch.Generator().manual_seed(2)
    gain, seed = torch.arange(6).repeat_interleave(30), torch.arange(30).repeat(6)
    a, b = gain + .1 * torch.randn(180, generator=generator), gain + .1 * torch.randn(180, generator=generator)
    rank_correlation = partial(stats.rank_correlation, resamples=300)
    across, within = rank_correlation(a, b, clusters=seed), rank_correlation(a, b, groups=gain, clusters=seed)
    assert across.value > .9 and within.low < 0 < within.high and within.groups == 6
    opposite = rank_correlation(a, 2 * gain - a, groups=gain, clusters=seed)
    assert opposite.value == pytest.approx(-1) and rank_correlation(a, 2 * gain - a).value > .9
    each = [rank_correlation(a[gain == g], b[gain == g]).value for g in range(6)]
    assert within.value == pytest.approx(sum(each) / 6)
    flat = rank_correlation([1, 2, 3, 4, 4, 4], [1, 2, 3, 1, 2, 3], groups=[0, 0, 0, 1, 1, 1], clusters=[0, 1, 2] * 2)
    assert (flat.value, flat.n, flat.groups) == (1, 3, 1)   # the other group is left out


def test_rank_correlation_interval_covers():
    generator, hits = torch.Generator().manual_seed(3), 0
    for _ in range(60):
        a, b = torch.randn(2, 40, generator=generator)
        found = rank_correlation(a, b, resamples=200)
        hits += found.low <= 0 <= found.high
    assert hits >= 60 * (.95 - 3 * (.95 * .05 / 60) ** .5)


def test_rank_correlation_bad_input():
    with pytest.raises(ValueError, match="found 3 and 2 values"): rank_correlation([1, 2, 3], [1, 2])
    with pytest.raises(ValueError, match="found 2 values in a group, expected at least three"):
        rank_correlation([1, 2], [1, 2])
    with pytest.raises(ValueError, match="found 0 values in a group"): rank_correlation([], [])
    with pytest.raises(ValueError, match="found 1 values in a group"):
        rank_correlation(range(4), range(4), groups=[0, 0, 0, 1])
    with pytest.raises(ValueError, match="finite"): rank_correlation([1, 2, float("nan")], [1, 2, 3])
    with pytest.raises(ValueError, match="nothing varies"): rank_correlation([1, 2, 3], [1, 1, 1])
