"""Means over prompts and their intervals: against scipy's, and the coverage that they promise."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import example, given
from hypothesis import strategies as st

from sink_circuits import statistics
from sink_circuits.errors import InputError
from sink_circuits.statistics import (
    bootstrap_columns,
    bootstrap_over_prompts,
    difference_to_controls,
    prompt_means,
    prompt_table,
    seed_of,
)


def test_the_unit_is_the_prompt():
    """Ten sinks of one prompt weigh as much as one of another."""
    values, prompts = [1.0] * 10 + [3.0], ["a"] * 10 + ["b"]
    assert prompt_means(values, prompts).tolist() == [1.0, 3.0]
    estimate = bootstrap_over_prompts(values, prompts, name="x")
    assert (estimate.mean, estimate.n) == (2.0, 2)
    assert (estimate.low, estimate.high) == (1.0, 3.0)


def test_prompts_stay_in_their_order():
    """What is drawn goes by it: the same prompts in another order are other draws."""
    assert prompt_means([1.0, 2.0, 5.0], ["b", "a", "b"]).tolist() == [3.0, 2.0]


def test_nan_is_left_out_never_counted_as_zero():
    values, prompts = [1.0, math.nan, math.nan, 5.0], ["a", "a", "b", "c"]
    assert prompt_means(values, prompts).tolist() == [1.0, 5.0]
    assert bootstrap_over_prompts(values, prompts, name="x").n == 2


def test_too_few_prompts_have_no_interval():
    one = bootstrap_over_prompts([1.0, 3.0], ["a", "a"], name="x")
    assert (one.mean, one.n) == (2.0, 1)
    assert math.isnan(one.low)
    assert math.isnan(one.high)
    none = bootstrap_over_prompts([math.nan], ["a"], name="x")
    assert none.n == 0
    assert math.isnan(none.mean)


def test_equal_prompts_have_an_interval_of_width_zero():
    estimate = bootstrap_over_prompts([2.0, 2.0, 2.0], ["a", "b", "c"], name="x")
    assert (estimate.mean, estimate.low, estimate.high) == (2.0, 2.0, 2.0)


def expected_interval(means: np.ndarray, confidence: float, n: int = 40000) -> tuple[float, float]:
    """Each end the further out of scipy's percentile and BCa intervals."""
    low, high = zip(
        *(scipys_interval(means, method, confidence, n, seed=1) for method in ("percentile", "BCa")), strict=True
    )
    return min(low), max(high)


def scipys_interval(samples: np.ndarray, method: str, confidence: float = 0.95, n_resamples: int = 999, seed: int = 0):
    """Of one sample or of every row, expanded: leaving out the share of resamples that Hesterberg (2015) says."""
    n = samples.shape[-1]
    t = scipy.stats.t(df=n - 1).isf((1 - confidence) / 2)
    tail = 0.5 * math.erfc(t * math.sqrt(n / (n - 1)) / math.sqrt(2))
    rng = {"rng" if scipy.__version__ >= "1.15" else "random_state": np.random.default_rng(seed)}
    options = {"axis": -1, "method": method, "confidence_level": 1 - 2 * tail, "n_resamples": n_resamples}
    return tuple(scipy.stats.bootstrap((samples,), np.mean, **options, **rng).confidence_interval)


@pytest.mark.parametrize("confidence", [0.5, 0.8, 0.95])
@pytest.mark.parametrize("n_prompts", [3, 8, 30])
def test_interval_is_the_longer_of_percentiles_and_bca(n_prompts, confidence):
    rng = np.random.default_rng(n_prompts)
    prompts = np.repeat([f"p{i}" for i in range(n_prompts)], 3)
    values = rng.gamma(2.0, size=len(prompts)) + np.repeat(rng.normal(size=n_prompts), 3)
    means = values.reshape(-1, 3).mean(1)
    estimate = bootstrap_over_prompts(values, prompts, name="x", confidence=confidence)
    low, high = expected_interval(means, confidence)
    # Standard error of a quantile of 4999 draws, five times, with the density at least that of a normal's tail.
    error = 5 * means.std() / np.sqrt(n_prompts) * np.sqrt(0.25 / 4999) / 0.058
    assert estimate.mean == pytest.approx(means.mean())
    assert abs(estimate.low - low) < error
    assert abs(estimate.high - high) < error
    assert low < estimate.mean < high


@pytest.mark.parametrize(("n", "nominal"), [(5, 0.9), (6, 0.95), (10, 0.95), (20, 0.9)])
def test_interval_covers_the_truth_as_often_as_it_says(n, nominal):
    """600 made-up studies. Four standard errors of the share; a plain percentile interval of 5 or 6 prompts misses by more."""
    covered = covers(np.random.default_rng(0).normal(size=(600, n)), 0, nominal)
    assert abs(covered.mean() - nominal) < 4 * math.sqrt(nominal * (1 - nominal) / 600)


def covers(studies: np.ndarray, truth: float, nominal: float) -> np.ndarray:
    estimates = [
        bootstrap_over_prompts(values, range(len(values)), name=f"study {index}", confidence=nominal)
        for index, values in enumerate(studies)
    ]
    return np.array([one.low <= truth <= one.high for one in estimates])


def share(interval: tuple[np.ndarray, np.ndarray], truth: float) -> float:
    return np.mean((interval[0] <= truth) & (interval[1] >= truth))


def test_interval_of_skewed_values_covers_more_often_than_percentiles_and_students():
    """1500 samples of ten: one without large values has a mean and a spread that are both too small."""
    samples = np.random.default_rng(0).exponential(size=(1500, 10))
    student = scipy.stats.t.interval(0.95, 9, samples.mean(1), scipy.stats.sem(samples, axis=1))
    assert covers(samples, 1, 0.95).mean() > 0.92
    assert max(share(student, 1), share(scipys_interval(samples, "percentile"), 1)) < 0.91


def test_interval_of_heavy_tails_covers_more_often_than_bca():
    """t with 3 degrees of freedom: bias and acceleration of ten such values are mostly noise."""
    samples = np.random.default_rng(0).standard_t(3, size=(600, 10))
    assert covers(samples, 0, 0.95).mean() > 0.93 > share(scipys_interval(samples, "BCa"), 0) + 0.01


def test_interval_is_as_long_as_students():
    means = np.random.default_rng(3).normal(size=40)
    estimate = bootstrap_over_prompts(means, range(40), name="x")
    student = scipy.stats.t.interval(0.95, 39, means.mean(), scipy.stats.sem(means))
    assert estimate.high - estimate.low == pytest.approx(student[1] - student[0], rel=0.05)


def test_the_same_name_draws_the_same_numbers():
    values, prompts = np.random.default_rng(0).normal(size=36), np.repeat(list("abcdefghijkl"), 3)
    first = bootstrap_over_prompts(values, prompts, name="x")
    assert bootstrap_over_prompts(values, prompts, name="x") == first
    assert bootstrap_over_prompts(values, prompts, name="y") != first
    assert seed_of("a", "bc") != seed_of("ab", "c")


@example([0.0, -55.79491902913259], 0.09867143559058364)  # the two ends once came out of order by rounding
@example([0.0, 1.0], 0.99)  # no resample is left out: once an infinite z times an acceleration of 0
@example([0.0, 1.0, 1.0], 0.99999)
@given(st.lists(st.floats(-100, 100), min_size=2, max_size=12), st.floats(0.05, 0.9999999))
def test_interval_lies_within_the_data(values, confidence):
    estimate = bootstrap_over_prompts(values, range(len(values)), name="x", confidence=confidence)
    tolerance = 1e-9
    assert min(values) - tolerance <= estimate.low <= estimate.high <= max(values) + tolerance


def test_only_means_that_are_all_equal_have_no_width():
    apart = bootstrap_over_prompts([2.0, 3.0], ["a", "b"], name="x")
    assert (apart.low, apart.mean, apart.high) == (2.0, 2.5, 3.0)
    equal = bootstrap_over_prompts([0.1, 0.1, 0.1], ["a", "b", "c"], name="x")
    assert (equal.low, equal.mean, equal.high) == (0.1, 0.1, 0.1)


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95, -1, math.nan])
def test_impossible_confidence_is_refused(confidence):
    with pytest.raises(InputError, match="confidence .* is out of range: between 0 and 1"):
        bootstrap_over_prompts([1.0, 2.0], ["a", "b"], name="x", confidence=confidence)


@pytest.mark.parametrize("n", [6, 10, 30])
def test_interval_is_scipys(n):
    """On the same resamples. Of whole numbers: scipy takes sums that differ by rounding alone for different ones."""
    means = np.random.default_rng(n).gamma(2, 100, size=n).round()
    estimate = bootstrap_over_prompts(means, range(n), name="x", confidence=0.9)
    drawn = {"confidence": 0.9, "n_resamples": statistics.N_RESAMPLES, "seed": seed_of("bootstrap", "x")}
    low, high = zip(*(scipys_interval(means, method, **drawn) for method in ("percentile", "BCa")), strict=True)
    assert (estimate.low, estimate.high) == pytest.approx((min(low), max(high)), rel=1e-9)
    assert (min(low), max(high)) != (low[0], high[0])  # BCa reaches further somewhere


@given(st.lists(st.integers(-100, 100), min_size=2, max_size=12), st.sampled_from([1e-120, 0.37, 1e120]))
def test_interval_follows_scale_and_mirror(values, scale):
    values = np.array(values, dtype=float)
    first = bootstrap_over_prompts(values, range(len(values)), name="x")
    second = bootstrap_over_prompts(-scale * values, range(len(values)), name="x")
    assert (-second.high / scale, -second.low / scale) == pytest.approx((first.low, first.high), rel=1e-6, abs=1e-6)


@given(
    values=st.lists(st.lists(st.sampled_from([math.nan, 0.0, 1.5, -2.25, 1e3]), min_size=3, max_size=3), max_size=7),
    prompts=st.lists(st.sampled_from("abc"), min_size=7, max_size=7),
)
def test_columns_are_the_same_numbers_as_each_alone(values, prompts):
    values, prompts = np.array(values, dtype=float).reshape(-1, 3), prompts[: len(values)]
    for names in ("x", ["x", "y", "z"]):
        together = bootstrap_columns(values, prompts, name=names)
        for column, estimate in enumerate(together):
            alone = bootstrap_over_prompts(values[:, column], prompts, name=names[column] if names != "x" else "x")
            np.testing.assert_equal(vars(estimate), vars(alone))  # NaN equals NaN here


def test_prompts_may_come_as_any_iterable():
    values, prompts = [[1.0], [3.0], [5.0]], ["a", "a", "b"]
    assert bootstrap_columns(values, iter(prompts), name="x") == bootstrap_columns(values, prompts, name="x")
    np.testing.assert_equal(prompt_table(values, iter(prompts)), prompt_table(values, prompts))
    few = difference_to_controls(
        [1.0, 2.0, 3.0], [[0.5, math.nan], [math.nan] * 2, [math.nan] * 2], list("abc"), name="x"
    )
    assert (few.n_sinks, few.n_unmatched) == (1, 2)
    one = difference_to_controls([1.0, 2.0], [0.0, 0.0], iter("ab"), name="x")
    assert one == difference_to_controls([1.0, 2.0], [0.0, 0.0], ["a", "b"], name="x")
    assert prompt_means([1.0, 2.0], iter("ab")).tolist() == [1.0, 2.0]


def test_a_table_has_a_row_per_prompt():
    table = prompt_table([[1, math.nan], [3, math.nan], [5, 7]], ["b", "b", "a"])
    np.testing.assert_equal(table, [[2, math.nan], [5, 7]])
