"""Intervals over prompts: against a bootstrap written here, exact cases, and coverage on made-up data."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sink_circuits.errors import InputError
from sink_circuits.statistics import bootstrap_over_prompts, prompt_means, seed_of


def test_the_unit_is_the_prompt():
    """Ten sinks of one prompt weigh as much as one of another."""
    values, prompts = [1.0] * 10 + [3.0], ["a"] * 10 + ["b"]
    assert prompt_means(values, prompts).tolist() == [1.0, 3.0]
    estimate = bootstrap_over_prompts(values, prompts, name="x")
    assert (estimate.mean, estimate.n) == (2.0, 2)
    assert (estimate.low, estimate.high) == (1.0, 3.0)


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


def percentile_bootstrap(means: np.ndarray, confidence: float, n: int = 40000) -> tuple[float, float]:
    """Resample prompts, take means, read off the percentiles."""
    rng = np.random.default_rng(1)
    draws = means[rng.integers(0, len(means), (n, len(means)))].mean(1)
    return tuple(np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2]))


@pytest.mark.parametrize("confidence", [0.5, 0.8, 0.95])
@pytest.mark.parametrize("n_prompts", [3, 8, 30])
def test_interval_is_the_percentile_bootstrap(n_prompts, confidence):
    rng = np.random.default_rng(n_prompts)
    prompts = np.repeat([f"p{i}" for i in range(n_prompts)], 3)
    values = rng.gamma(2.0, size=len(prompts)) + np.repeat(rng.normal(size=n_prompts), 3)
    means = values.reshape(-1, 3).mean(1)
    estimate = bootstrap_over_prompts(values, prompts, name="x", confidence=confidence)
    low, high = percentile_bootstrap(means, confidence)
    # Standard error of a quantile of 4999 draws, five times, with the density at least that of a normal's tail.
    error = 5 * means.std() / np.sqrt(n_prompts) * np.sqrt(0.25 / 4999) / 0.058
    assert estimate.mean == pytest.approx(means.mean())
    assert abs(estimate.low - low) < error
    assert abs(estimate.high - high) < error
    assert low < estimate.mean < high


def test_interval_covers_the_truth_about_as_often_as_it_says():
    """300 made-up studies of 20 prompts: a percentile interval of 90 % covers in 85 to 93 % (it is a little short)."""
    rng = np.random.default_rng(0)
    covered = 0
    for study in range(300):
        estimate = bootstrap_over_prompts(rng.normal(size=20), range(20), name=f"study {study}", confidence=0.9)
        covered += estimate.low <= 0 <= estimate.high
    assert 0.82 < covered / 300 < 0.94


def test_the_same_name_draws_the_same_numbers():
    values, prompts = np.random.default_rng(0).normal(size=36), np.repeat(list("abcdefghijkl"), 3)
    first = bootstrap_over_prompts(values, prompts, name="x")
    assert bootstrap_over_prompts(values, prompts, name="x") == first
    assert bootstrap_over_prompts(values, prompts, name="y") != first
    assert seed_of("a", "bc") != seed_of("ab", "c")


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=12), st.floats(0.05, 0.99))
def test_interval_lies_within_the_data(values, confidence):
    estimate = bootstrap_over_prompts(values, range(len(values)), name="x", confidence=confidence)
    tolerance = 1e-9
    assert min(values) - tolerance <= estimate.low <= estimate.high <= max(values) + tolerance


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95, -1, math.nan])
def test_impossible_confidence_is_refused(confidence):
    with pytest.raises(InputError, match="confidence .* is out of range: between 0 and 1"):
        bootstrap_over_prompts([1.0, 2.0], ["a", "b"], name="x", confidence=confidence)
