"""How often the tests over prompts err: in made-up studies without any effect, and whether they see one that is there."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from sink_circuits import statistics
from sink_circuits.statistics import (
    equivalence_test,
    max_t,
    rank_among_controls,
    sign_flip_test,
    trend_test,
)

# Without an effect, P(p <= a) <= a within five standard errors; with one, tests see it.

STUDIES = 1500


def at_most_nominal(p: list[float]) -> bool:
    p = np.array(p)
    return all((p <= a).mean() <= a + 5 * (a * (1 - a) / len(p)) ** 0.5 for a in (0.01, 0.05, 0.1))


@pytest.mark.parametrize("n", [8, 20])
@pytest.mark.parametrize("heavy", [False, True])
def test_sign_flip_holds_its_level_without_an_effect(n, heavy):
    """Three sinks per prompt that share what the prompt does to them; normal and heavy tails."""
    rng = np.random.default_rng(n)
    prompts = np.repeat(np.arange(n), 3)
    p, naive = [], []
    for study in range(STUDIES if n == 8 else 300):
        shared = rng.standard_t(2, size=n) if heavy else rng.normal(size=n)
        values = np.repeat(shared, 3) + 0.3 * rng.normal(size=3 * n)
        p.append(sign_flip_test(values, prompts, name=str(study)).p)
        naive.append(scipy.stats.ttest_1samp(values, 0).pvalue)
    assert at_most_nominal(p)
    assert np.mean(np.array(p) <= 0.1) > 0.04  # and does not just say 1
    assert not at_most_nominal(naive)  # sinks taken for independent: what the prompt as unit is for


def test_max_t_holds_the_family_and_finds_the_planted_cell():
    """30 dependent cells: single tests err in most maps, the family in at most a share alpha; a planted layer is found."""
    rng = np.random.default_rng(0)
    smallest, single, found = [], [], 0
    for study in range(400):
        effects = rng.normal(size=(9, 30)) + rng.normal(size=(9, 1))
        smallest.append(max_t(effects).p.min())
        single.append(min(sign_flip_test(effects[:, cell], range(9)).p for cell in range(30)) if study < 40 else 1)
        found += max_t(effects + 4 * (np.arange(30) == 7)).p[7] <= 0.05
    assert at_most_nominal(smallest)
    assert np.mean(np.array(single[:40]) <= 0.05) > 0.2
    assert found / 400 > 0.8


def test_sign_flip_sees_an_effect_of_two_standard_deviations():
    rng = np.random.default_rng(0)
    assert np.mean([sign_flip_test(rng.normal(2, size=8), range(8)).p <= 0.05 for _ in range(300)]) > 0.95


def test_trends_hold_their_level_for_smooth_curves_where_pages_test_does_not():
    """Each prompt's curve rises or falls by chance: no common trend, and no two doses exchangeable."""
    rng = np.random.default_rng(0)
    dose = np.array([0, 0.25, 0.5, 1, 2, 4])
    ours, pages = [], []
    for _ in range(400):
        curves = rng.normal(size=(8, 1)) * dose + 0.05 * rng.normal(size=(8, 6))
        ours.append(trend_test(dose, curves).p)
        pages.append(scipy.stats.page_trend_test(curves, method="asymptotic").pvalue)
    assert at_most_nominal(ours)
    assert np.mean(np.array(pages) <= 0.05) > 0.15
    rising = rng.normal(1, 0.2, size=(8, 1)) * dose + 0.05 * rng.normal(size=(8, 6))
    assert trend_test(dose, rising).p == pytest.approx(1 / 256)


def test_equivalence_holds_its_level_at_the_margin_and_sees_small_effects():
    rng = np.random.default_rng(0)
    at_margin = [equivalence_test(rng.normal(0.5, 1, size=8), range(8), 0.5).p for _ in range(600)]
    assert at_most_nominal(at_margin)
    assert np.mean([equivalence_test(rng.normal(0, 0.1, size=8), range(8), 0.5).p <= 0.05 for _ in range(200)]) == 1


def test_ranks_hold_their_level():
    rng = np.random.default_rng(0)
    for alternative in statistics.ALTERNATIVES:
        assert at_most_nominal(
            [rank_among_controls(x[0], x[1:], alternative=alternative).p for x in rng.normal(size=(STUDIES, 21))]
        )
