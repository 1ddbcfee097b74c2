"""Tests over prompts: against scipy, naive enumerations and hand examples."""

from __future__ import annotations

import hashlib
import itertools
import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import assume, given
from hypothesis import strategies as st

from sink_circuits import statistics
from sink_circuits.errors import InputError
from sink_circuits.statistics import (
    benjamini_hochberg,
    bootstrap_columns,
    bootstrap_over_prompts,
    difference_to_controls,
    discovery_confirmation_split,
    equivalence_test,
    holm,
    max_t,
    prompt_table,
    prompts_needed,
    rank_among_controls,
    seed_of,
    sign_flip_test,
    smallest_sign_flip_p,
    trend_test,
)

# Sign flips.

ALTERNATIVES = ("two-sided", "greater", "less")
sizes = st.floats(-100, 100).map(lambda x: round(x, 3))


def naive_sign_flip(x, alternative: str) -> float:
    """Every assignment of signs, one after the other."""
    x = np.asarray(x)
    sums = np.array([(x * signs).sum() for signs in itertools.product((1, -1), repeat=len(x))])
    observed = x.sum()
    sums, observed = {
        "two-sided": (abs(sums), abs(observed)), "greater": (sums, observed), "less": (-sums, -observed)
    }[alternative]  # fmt: skip
    return float((sums >= observed - 1e-9).mean())


@given(st.lists(sizes, min_size=1, max_size=8), st.sampled_from(ALTERNATIVES))
def test_sign_flip_is_the_naive_enumeration(x, alternative):
    result = sign_flip_test(x, range(len(x)), alternative=alternative)
    assert result.p == pytest.approx(naive_sign_flip(x, alternative))
    assert (result.n, result.alternative, result.statistic) == (len(x), alternative, pytest.approx(np.mean(x)))
    assert result.smallest_p <= result.p <= 1
    most_extreme = np.abs(x) * (-1 if alternative == "less" else 1)
    assert result.smallest_p == pytest.approx(naive_sign_flip(most_extreme, alternative))


@given(st.lists(sizes, min_size=2, max_size=8))
def test_sign_flip_does_not_depend_on_unit_order_or_sign(x):
    p = sign_flip_test(x, range(len(x))).p
    assert sign_flip_test([1e-6 * v for v in x], range(len(x))).p == p
    assert sign_flip_test([1e200 * v for v in x], range(len(x))).p == p
    assert sign_flip_test(x[::-1], range(len(x))).p == p
    assert sign_flip_test([-v for v in x], range(len(x))).p == p
    greater = sign_flip_test(x, range(len(x)), alternative="greater")
    assert sign_flip_test([-v for v in x], range(len(x)), alternative="less").p == greater.p


@pytest.mark.parametrize("alternative", ALTERNATIVES)
def test_sign_flip_is_scipys_permutation_test(alternative):
    x = np.random.default_rng(3).normal(0.4, size=10)
    scipys = scipy.stats.permutation_test(
        (x,), np.mean, permutation_type="samples", alternative=alternative, n_resamples=np.inf, vectorized=True
    )
    assert sign_flip_test(x, range(10), alternative=alternative).p == pytest.approx(scipys.pvalue)


def test_many_prompts_are_drawn_near_the_exact_answer_and_repeatable(monkeypatch):
    x = np.random.default_rng(1).normal(0.35, size=16)
    drawn = sign_flip_test(x, range(16), name="a")
    assert drawn == sign_flip_test(x, range(16), name="a")
    assert drawn.p != sign_flip_test(x, range(16), name="b").p
    assert drawn.smallest_p == 1 / 10_000
    assert sign_flip_test(np.ones(40), range(40)).p == 1 / 10_000  # no drawn pattern reaches it, it counts itself
    monkeypatch.setattr(statistics, "EXACT_PROMPTS", 16)
    exact = sign_flip_test(x, range(16))
    assert abs(drawn.p - exact.p) < 5 * (exact.p * (1 - exact.p) / 9999) ** 0.5 + 1e-4
    assert exact.smallest_p == 2 / 2**16
    monkeypatch.setattr(statistics, "_CHUNK_FLOATS", 1000)
    assert sign_flip_test(x, range(16)) == exact  # the chunks do not show


def test_the_smallest_p_and_how_many_prompts_it_takes():
    assert [smallest_sign_flip_p(n) for n in (0, 1, 2, 6)] == [1, 1, 0.5, 1 / 32]
    assert [smallest_sign_flip_p(n, "greater") for n in (0, 1, 5)] == [1, 0.5, 1 / 32]
    assert [prompts_needed(a) for a in (1, 0.05, 0.01)] == [1, 6, 8]
    assert [prompts_needed(a, "less") for a in (0.5, 0.05, 0.01)] == [1, 5, 7]
    six = sign_flip_test([1, 2, 3, 4, 5, 6], range(6))
    assert six.p == six.smallest_p == 1 / 32


def test_few_prompts_zeros_and_nan():
    none = sign_flip_test([math.nan], ["a"])
    assert (none.n, math.isnan(none.p), math.isnan(none.smallest_p)) == (0, True, True)
    assert sign_flip_test([3.0], ["a"]).p == 1
    assert sign_flip_test([3.0, 4.0, math.nan], list("aab")) == sign_flip_test([3.5], ["a"])  # one prompt
    zeros = sign_flip_test([0.0, 0.0, 0.0], range(3))
    assert (zeros.p, zeros.smallest_p, zeros.statistic, zeros.n) == (1, 1, 0, 3)
    with_zeros = sign_flip_test([1.0, 2.0, 0.0], range(3))
    assert (with_zeros.p, with_zeros.smallest_p, with_zeros.n) == (0.5, 0.5, 3)


def test_drawn_signs_are_those_of_the_named_seed():
    """Above 14 prompts, one by one: 9999 patterns of the generator whose seed the name gives, and the observed one."""
    assert seed_of("a", 1) == int.from_bytes(hashlib.sha256(b"a\x1f1").digest()[:8], "little")
    x = np.random.default_rng(2).normal(0.3, size=15)
    flipped = np.random.default_rng(seed_of("flips", "study")).integers(0, 2, (9999, 15), dtype=np.int8)
    means = np.array([np.where(signs == 1, -x, x).mean() for signs in flipped])
    for alternative, reached in (("greater", means >= x.mean()), ("two-sided", abs(means) >= abs(x.mean()))):
        result = sign_flip_test(x, range(15), alternative=alternative, name="study")
        assert result.p == pytest.approx((1 + reached.sum()) / 10_000)


def naive_max_t(effects: np.ndarray) -> np.ndarray:
    """Largest |sum / root of the sum of squares| of every assignment of signs to prompts, two-sided."""

    def statistic(x):
        root = np.sqrt(np.nansum(x**2, axis=0))
        return np.abs(np.nansum(x, axis=0)) / np.where(root == 0, 1, root)

    largest = [
        statistic(effects * np.array(signs)[:, None]).max() for signs in itertools.product((1, -1), repeat=len(effects))
    ]
    return (np.array(largest)[:, None] >= statistic(effects) - 1e-9).mean(0)


@given(st.integers(2, 6), st.integers(1, 5), st.integers(0, 1000), st.booleans())
def test_max_t_is_the_naive_enumeration(n_prompts, n_cells, seed, holes):
    rng = np.random.default_rng(seed)
    effects = rng.normal(size=(n_prompts, n_cells)).round(1)
    if holes:
        effects[1:][rng.random((n_prompts - 1, n_cells)) < 0.3] = math.nan
    result = max_t(effects)
    np.testing.assert_allclose(result.p, naive_max_t(effects))
    assert result.n.tolist() == (~np.isnan(effects)).sum(0).tolist()
    for cell in range(n_cells):
        alone = sign_flip_test(effects[:, cell], range(n_prompts))
        assert result.p[cell] >= alone.p - 1e-12  # the family costs something
        assert result.smallest_p[cell] == alone.smallest_p <= result.p[cell] + 1e-12


def test_max_t_orders_as_t_does_and_knows_impossible_cells():
    effects = np.random.default_rng(0).normal([0.1, 0.5, 1.0, 2.0, 0, 0], 1, size=(9, 6))
    effects[:, 4], effects[:, 5] = 0, math.nan
    result = max_t(effects)
    t = np.abs(scipy.stats.ttest_1samp(effects[:, :4], 0).statistic)
    assert np.argsort(t).tolist() == np.argsort(np.abs(result.statistic[:4])).tolist()
    assert result.p[4] == result.smallest_p[4] == 1
    assert math.isnan(result.p[5])
    assert (result.n[4], result.n[5]) == (9, 0)
    assert np.isnan(max_t(np.full((3, 2), math.nan)).p).all()
    greater, less = max_t(effects, alternative="greater").p, max_t(effects, alternative="less").p
    assert greater[3] < 0.05 < less[3]
    assert max_t(-effects, alternative="less").p.tolist()[:5] == greater.tolist()[:5]


# Trends and equivalence.


def test_a_trend_is_the_mean_of_spearmans_correlations():
    rng = np.random.default_rng(0)
    dose, values = np.array([0, 1, 2, 5]), rng.normal(size=(6, 4))
    values[2, 1] = values[2, 3]  # a tie shares its rank
    values[3, 0] = math.nan
    values[4] = 0.7  # all equal: no trend, and counted
    values[5, :2] = math.nan  # two doses left: out
    expected = [scipy.stats.spearmanr(dose, row, nan_policy="omit").statistic for row in values[:4]] + [0.0]
    result = trend_test(dose, values, alternative="two-sided")
    assert (result.n, result.statistic) == (5, pytest.approx(np.mean(expected)))
    assert result.p == pytest.approx(naive_sign_flip(expected, "two-sided"))


@given(st.integers(0, 1000), st.integers(3, 7), st.integers(1, 6))
def test_a_trend_depends_on_order_alone(seed, n_doses, n_prompts):
    rng = np.random.default_rng(seed)
    dose, values = np.sort(rng.random(n_doses)), rng.normal(size=(n_prompts, n_doses))
    result = trend_test(dose, values)
    assert trend_test(dose**3, np.exp(values)) == result
    order = rng.permutation(n_doses)
    assert trend_test(dose[order], values[:, order]).statistic == pytest.approx(result.statistic)
    assert trend_test(dose, -values, alternative="less").p == pytest.approx(result.p)
    assert trend_test(dose, np.cumsum(np.exp(values), axis=1)).p == 0.5**n_prompts
    sinks = np.repeat(values, 2, axis=0)
    assert trend_test(dose, sinks, np.repeat(np.arange(n_prompts), 2)).p == result.p


@given(st.lists(sizes, min_size=1, max_size=8), st.floats(0.01, 200), st.floats(1, 10))
def test_equivalence_is_the_larger_of_two_tests_and_a_wider_margin_helps(x, margin, wider):
    result = equivalence_test(x, range(len(x)), margin)
    sides = naive_sign_flip(margin + np.array(x), "greater"), naive_sign_flip(margin - np.array(x), "greater")
    assert result.p == pytest.approx(max(sides))
    assert result.p >= result.smallest_p == 0.5 ** len(x)
    assert equivalence_test(x, range(len(x)), margin * wider).p <= result.p + 1e-12
    assert result.n == len(x)


def test_effects_of_exactly_zero_are_equivalent_to_none():
    result = equivalence_test(np.zeros(6), range(6), 0.1)
    assert (result.p, result.smallest_p, result.n, result.alternative) == (1 / 64, 1 / 64, 6, "within ±0.1")
    assert equivalence_test(np.zeros(3), range(3), 0.1).p == 1 / 8  # three prompts cannot say so
    assert equivalence_test([math.nan], ["a"], 0.1).n == 0


@pytest.mark.parametrize(("n", "smallest"), [(13, 0.5**13), (14, 0.5**14), (15, 1 / 10_000)])
def test_equivalence_knows_its_smallest_p(n, smallest):
    result = equivalence_test(np.zeros(n), range(n), 0.1)
    assert result.smallest_p == smallest
    assert result.p == pytest.approx(smallest)


# Controls.


def test_differences_to_controls_are_taken_sink_by_sink():
    effects = [-3.0, -4.0, -5.0, math.nan, -1.0]
    controls = [[-1.0, -2.0], [0.0, math.nan], [-1.0, -1.0], [0.0, 0.0], [math.nan, math.nan]]
    prompts = ["a", "a", "b", "b", "c"]
    result = difference_to_controls(effects, controls, prompts, name="x")
    differences = [-1.5, -4.0, -4.0]
    assert result.estimate == bootstrap_over_prompts(differences, ["a", "a", "b"], name="x")
    assert result.test == sign_flip_test(differences, ["a", "a", "b"], name="x")
    assert (result.n_sinks, result.n_unmatched, result.estimate.n) == (3, 1, 2)
    few = difference_to_controls(
        [1.0, 2.0, 3.0], [[0.5, math.nan], [math.nan] * 2, [math.nan] * 2], list("abc"), name="x"
    )
    assert (few.n_sinks, few.n_unmatched) == (1, 2)
    one = difference_to_controls([1.0, 2.0], [0.5, 0.5], ["a", "b"], name="x", alternative="greater")
    assert (one.estimate.mean, one.test.p) == (1.0, 0.25)


@given(st.lists(st.integers(-5, 5), max_size=30), st.integers(-5, 5))
def test_ranks_count_controls_that_are_as_far(controls, value):
    greater, less = (rank_among_controls(value, controls, alternative=a) for a in ("greater", "less"))
    n = len(controls)
    assert greater.p == (1 + sum(c >= value for c in controls)) / (n + 1)
    assert less.p == (1 + sum(c <= value for c in controls)) / (n + 1)
    assert greater.statistic == 1 + sum(c >= value for c in controls)
    assert (greater.n, greater.smallest_p) == (n, 1 / (n + 1))
    both = rank_among_controls(value, controls, alternative="two-sided")
    assert both.p == min(1, 2 * min(greater.p, less.p)) >= both.smallest_p
    assert rank_among_controls(value + 1, controls).p <= greater.p


def test_ranks_without_controls_or_value():
    assert rank_among_controls(3.0, [1.0, math.nan, 2.0]).n == 2
    assert (rank_among_controls(3.0, []).p, rank_among_controls(3.0, []).n) == (1, 0)
    assert math.isnan(rank_among_controls(math.nan, [1.0]).p)
    assert rank_among_controls(3.0, np.zeros(19)).p == 0.05


# Many tests.


def test_holm_and_benjamini_hochberg_by_hand():
    p = [0.01, 0.04, math.nan, 0.03, 0.005]
    np.testing.assert_allclose(holm(p), [0.03, 0.06, math.nan, 0.06, 0.02])
    np.testing.assert_allclose(benjamini_hochberg(p), [0.02, 0.04, math.nan, 0.04, 0.02])
    assert holm([0.6, 0.7]).tolist() == [1, 1]
    assert np.isnan(holm([math.nan])).all()
    assert holm([]).size == benjamini_hochberg([]).size == 0
    assert holm([[0.01, 0.5], [0.02, math.nan]]).shape == (2, 2)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.floats(0.001, 0.5))
def test_adjusted_p_values_reject_what_the_procedures_reject(p, alpha):
    ordered = sorted(p)
    m = len(p)
    assume(
        all(abs(v * f - alpha) > 1e-12 for k, v in enumerate(ordered) for f in (m - k, m / (k + 1)))
    )  # no rounding ties
    down = next((k for k, value in enumerate(ordered) if value * (m - k) > alpha), m)  # Holm: step down
    up = max((k + 1 for k, value in enumerate(ordered) if value * m / (k + 1) <= alpha), default=0)  # BH: step up
    assert (holm(p) <= alpha).sum() == down
    assert (benjamini_hochberg(p) <= alpha).sum() == up
    for adjusted in (holm(p), benjamini_hochberg(p)):
        assert (adjusted >= np.array(p) - 1e-15).all()
        assert (np.diff(adjusted[np.argsort(p, kind="stable")]) >= 0).all()
    assert (holm(p) >= benjamini_hochberg(p) - 1e-15).all()


# Splits.


@given(
    kinds=st.lists(st.sampled_from("xyz"), min_size=4, max_size=40), name=st.text(max_size=3), share=st.floats(0.3, 0.7)
)  # fmt: skip
def test_splits_are_disjoint_stratified_and_repeatable(kinds, name, share):
    prompts = [f"p{i}" for i in range(len(kinds))]
    split = discovery_confirmation_split(prompts, name, kinds=kinds, share=share)
    assert sorted(split.discovery + split.confirmation) == sorted(prompts)
    assert abs(len(split.discovery) - share * len(prompts)) <= 0.5 + 1e-9
    kind_of = dict(zip(prompts, kinds, strict=True))
    for kind in set(kinds):
        n, ours = kinds.count(kind), sum(kind_of[p] == kind for p in split.discovery)
        assert abs(ours - share * n) <= 1 + 1e-9
    again = discovery_confirmation_split(prompts[::-1], name, kinds=kinds[::-1], share=share)
    assert set(again.discovery) == set(split.discovery)


def test_every_prompt_is_as_likely_on_either_side():
    prompts = list("abcdefg")
    splits = [discovery_confirmation_split(prompts, f"s{i}").discovery for i in range(600)]
    counts = [sum(p in discovery for discovery in splits) for p in prompts]
    expected = 600 * len(splits[0]) / 7
    assert all(abs(count - expected) < 5 * (600 * 0.25) ** 0.5 for count in counts)
    assert len({frozenset(discovery) for discovery in splits}) > 25


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sign_flip_test([1.0], ["a"], alternative="both"), "alternative 'both' is unknown: use one of two-sided"),
        (lambda: sign_flip_test([math.inf], ["a"]), "some values are infinite: give finite ones, or NaN"),
        (lambda: bootstrap_over_prompts([1.0, math.inf], ["a", "b"], name="x"), "some values are infinite"),
        (lambda: bootstrap_over_prompts([[1.0], [2.0]], ["a", "b"], name="x"), "values have 2 dimensions: give a list of numbers"),
        (lambda: bootstrap_over_prompts([1.0, 2.0, 3.0], ["a", "b"], name="x"), "2 prompts for 3 rows of values"),
        (lambda: sign_flip_test([1.0, 2.0, 3.0], ["a", "b"]), "2 prompts for 3 rows of values"),
        (lambda: sign_flip_test([1.0, 2.0], ["a", None]), "prompts hold (None|nan): name each"),
        (lambda: sign_flip_test([1.0, 2.0], [0.0, math.nan]), "prompts hold (None|nan): name each"),
        (lambda: sign_flip_test(["much"], ["a"]), "values = .*: give numbers, NaN for"),
        (lambda: prompt_table([[1.0], [2.0]], ["a", None]), "prompts hold (None|nan): name each"),
        (lambda: equivalence_test([1.0, 2.0], ["a"], 0.5), "1 prompts for 2 rows of values"),
        (lambda: rank_among_controls("far", [0.0]), "value = 'far': give a number"),
        (lambda: rank_among_controls(1.0, ["far"]), "controls = .*: give numbers"),
        (lambda: difference_to_controls([1.0], ["far"], ["a"], name="x"), "controls = .*: give numbers"),
        (lambda: prompts_needed("few"), "alpha 'few' is out of range"),
        (lambda: holm(["small"]), "p-values = .*: give numbers"),
        (lambda: discovery_confirmation_split(["a", "b"], "x", share="half"), "share 'half' is out of range"),
        (lambda: trend_test(["low", "mid", "high"], [[1.0, 2.0, 3.0]]), "doses = .*: give numbers"),
        (lambda: max_t([[1.0]], name=3), "name = 3: give a text"),
        (lambda: bootstrap_over_prompts([1.0], ["a"], name=3), "name = 3: give a text"),
        (lambda: max_t([1.0, 2.0]), "values have 1 dimensions: give two, prompts and cells"),
        (lambda: prompt_table([[1.0]], ["a", "b"]), "2 prompts for 1 rows of values"),
        (lambda: bootstrap_columns([[1.0, 2.0]], ["a"], name=["x"]), "1 names for 2 columns"),
        (lambda: bootstrap_columns([[1.0, 2.0]], ["a"], name="x", confidence=95), "confidence 95 is out of range"),
        (lambda: prompts_needed(0), "alpha 0 is out of range"),
        (lambda: trend_test([0, 1], [[1.0, 2.0]]), "2 distinct doses: a trend needs at least 3"),
        (lambda: trend_test([0, 1, 1], [[1.0, 2.0, 3.0]]), "2 distinct doses"),
        (lambda: trend_test([0, 1, 2], [[1.0, 2.0]]), "3 doses for 2 columns of values"),
        (lambda: trend_test([0, 1, math.nan], [[1.0, 2.0, 3.0]]), "one finite dose per column"),
        (lambda: equivalence_test([1.0], ["a"], 0), "margin 0 is not allowed: give the largest effect that counts as none"),
        (lambda: equivalence_test([1.0], ["a"], math.nan), "margin nan is not allowed"),
        (lambda: equivalence_test([1.0], ["a"], "small"), "margin 'small' is not allowed"),
        (lambda: difference_to_controls([1.0, 2.0], [0.0], ["a", "b"], name="x"), "controls of 1 sinks for effects of 2"),
        (lambda: equivalence_test([1.0], ["a"], math.inf), "margin inf is not allowed"),
        (lambda: difference_to_controls([1.0, 2.0], [0.0, 0.0], ["a"], name="x"), "1 prompts for 2 rows of values"),
        (lambda: rank_among_controls(1.0, [0.0], alternative="both"), "alternative 'both' is unknown"),
        (lambda: smallest_sign_flip_p(3, "both"), "alternative 'both' is unknown"),
        (lambda: sign_flip_test([math.nan], ["a"], alternative="both"), "alternative 'both' is unknown"),
        (lambda: max_t([[math.nan]], alternative="both"), "alternative 'both' is unknown"),
        (lambda: trend_test([0, 1], [[1.0, 2.0]], alternative="both"), "alternative 'both' is unknown"),
        (lambda: prompts_needed(1.5), "alpha 1.5 is out of range"),
        (lambda: difference_to_controls([[1.0]], [0.0], ["a"], name="x"), "effects have 2 dimensions"),
        (lambda: holm([0.5, 1.1]), r"a p-value lies outside \[0, 1\]"),
        (lambda: benjamini_hochberg([-0.1]), r"a p-value lies outside \[0, 1\]"),
        (lambda: discovery_confirmation_split(["a", "a"], "x"), "a prompt is named twice"),
        (lambda: discovery_confirmation_split(["a"], "x"), "1 prompts and a share of 0.5 leave one side empty"),
        (lambda: discovery_confirmation_split(["a", "b"], "x", share=1.0), "share 1.0 is out of range"),
        (lambda: discovery_confirmation_split(["a", "b"], "x", kinds=["k"]), "1 kinds for 2 rows of values"),
    ],
)  # fmt: skip
def test_impossible_questions_are_refused_in_one_sentence(make, message):
    with pytest.raises(InputError, match=message) as error:
        make()
    assert "\n" not in str(error.value)
