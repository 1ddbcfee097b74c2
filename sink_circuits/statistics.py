"""Statistics: intervals and tests over prompts, thin over scipy. The unit is the prompt, never the token or the sink.

Values come one per sink with the prompt of each, and become one mean per prompt; NaN (undefined, never 0) is left out,
and a prompt with nothing left is dropped. Every result says its n, and every test the smallest p it could have given.
Whatever is drawn is drawn from a name, so that a cell computed again alone is the same number.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import scipy.special
import scipy.stats
from jaxtyping import Float

from sink_circuits import arguments
from sink_circuits.arguments import is_number, shown
from sink_circuits.errors import InputError

N_RESAMPLES = 4999
"""Bootstrap resamples."""
N_FLIPS = 9999
"""Random sign patterns where there are too many to try all."""
EXACT_PROMPTS = 14
"""Up to so many prompts all 2^n sign patterns are tried: 16,384."""
MIN_DOSES = 3
"""Doses that a trend within one prompt needs: two are always in order or in reverse."""

ALTERNATIVES = ("two-sided", "greater", "less")
_CHUNK_FLOATS = 1 << 22
_TIE = 1e-12


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts with its bootstrap interval; `low` and `high` are NaN for fewer than two prompts."""

    mean: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class TestResult:
    """One test: `p`, the smallest p that n alone allows (or these data, if some are 0), the statistic, and n.

    `n` counts what was tested: prompts, or controls for a rank. With n = 0 statistic and p are NaN.
    """

    __test__ = False  # its name makes pytest think that it is one

    p: float
    smallest_p: float
    statistic: float
    n: int
    alternative: str


@dataclass(frozen=True)
class FamilyResult:
    """One test of many cells at once: arrays [cell] of family-wise `p`, `smallest_p`, `statistic` and `n` (prompts).

    A cell without any value has NaN and n = 0 and is no part of the family.
    """

    p: Float[np.ndarray, " cell"]
    smallest_p: Float[np.ndarray, " cell"]
    statistic: Float[np.ndarray, " cell"]
    n: np.ndarray
    alternative: str


@dataclass(frozen=True)
class Difference:
    """Effects minus those of matched controls: estimate, test, and how many sinks had a control and how many none."""

    estimate: Estimate
    test: TestResult
    n_sinks: int
    n_unmatched: int


@dataclass(frozen=True)
class Split:
    """Prompts on which something is looked for, and others on which it is tested."""

    discovery: tuple
    confirmation: tuple


def seed_of(*names) -> int:
    """A seed from names: any single cell run again alone draws the same numbers."""
    text = "\x1f".join(map(str, names)).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little")


def prompt_means(values, prompts) -> np.ndarray:
    """One number per prompt: the mean over its sinks, NaN left out; prompts with nothing left are dropped."""
    values = arguments.numbers(values, "values")
    prompts = pd.Series(_labels(prompts, len(values), "prompts"), dtype=object)
    frame = pd.DataFrame({"prompt": prompts, "value": values}).dropna()
    return frame.groupby("prompt", sort=False)["value"].mean().to_numpy()


def prompt_table(values, prompts) -> Float[np.ndarray, "prompt column"]:
    """`prompt_means` of every column of values [sink, column], NaN where a prompt has nothing in a column.

    Prompts in the order in which they first appear.
    """
    frame = pd.DataFrame(_table(values, "sinks and columns"))
    prompts = _labels(prompts, len(frame), "prompts")
    return frame.groupby(pd.Series(prompts, dtype=object), sort=False).mean().to_numpy(dtype=float)


# Intervals.


def bootstrap_over_prompts(values, prompts, *, name: str, confidence: float = 0.95) -> Estimate:
    """Mean of the prompts' means with an expanded bootstrap interval over prompts (clusters), each end the further out of two.

    `values`: one per sink; `prompts`: which prompt each belongs to. The two are the percentile interval and the
    bias-corrected accelerated one (BCa; Efron, JASA 82, 1987), which leans as the values are skewed. Both are too short for few
    prompts (percentiles of 95 % cover in 83 % with 5, in 92 % with 20), so that fewer resamples are left out
    (`expanded_tail`): for normal values it is then about as long as Student's. BCa alone is thrown off by heavy tails,
    percentiles alone by skewness (docs/statistics.md: how often each is right). No resample's mean lies outside the data: with
    2 or 3 prompts the interval is their range, and still too short. Raises InputError for a confidence outside (0, 1).
    """
    confidence = _confidence(confidence)
    _check_name(name)
    return _bootstrap(prompt_means(values, prompts), functools.partial(_draws, name), confidence)


def bootstrap_columns(values, prompts, *, name: str | Sequence[str], confidence: float = 0.95) -> tuple[Estimate, ...]:
    """`bootstrap_over_prompts` of every column of values [sink, column]: the same numbers in less time.

    `name`: one for all columns, which are then resampled together, or one for each. Raises InputError.
    """
    confidence = _confidence(confidence)
    values = _table(values, "sinks and columns")
    prompts = pd.Series(_labels(prompts, len(values), "prompts"), dtype=object).to_numpy()
    names = [name] * values.shape[1] if isinstance(name, str) else list(arguments.several(name, "name", empty=True))
    for one in names:
        _check_name(one)
    if len(names) != values.shape[1]:
        raise InputError(f"{len(names)} names for {values.shape[1]} columns: give one name, or one per column.")
    patterns: dict[bytes, list[int]] = {}  # columns that lack the same rows have the same prompts
    for column, missing in enumerate(np.isnan(values).T):
        patterns.setdefault(missing.tobytes(), []).append(column)
    means: dict[int, np.ndarray] = {}
    for columns in patterns.values():
        given = ~np.isnan(values[:, columns[0]])
        means |= zip(columns, prompt_table(values[given][:, columns], prompts[given]).T, strict=True)
    drawn = functools.cache(_draws) if isinstance(name, str) else _draws
    return tuple(
        _bootstrap(np.ascontiguousarray(means[column]), functools.partial(drawn, own), confidence)
        for column, own in enumerate(names)
    )


def expanded_tail(n: int, confidence: float = 0.95) -> float:
    """The share of resamples left out at either end of the interval for n values: Phi(-sqrt(n / (n - 1)) t), where t is
    Student's quantile at (1 + confidence) / 2 with n - 1 degrees of freedom.

    The resamples' spread is short by sqrt((n - 1) / n), and a normal's tails by a t's (Hesterberg, The American Statistician 69,
    2015, section 4.2.1). With n = 6 at 95 %: 0.0024; it nears (1 - confidence) / 2 as n grows. Raises InputError for n below 2.
    """
    return _expanded_tail(arguments.whole(n, "n", low=2), _confidence(confidence))


@functools.cache
def _expanded_tail(n: int, confidence: float) -> float:
    t = scipy.stats.t.ppf((1 + confidence) / 2, n - 1)
    return float(scipy.stats.norm.cdf(-math.sqrt(n / (n - 1)) * t))


def _draws(name: str, n: int) -> np.ndarray:
    """Which prompts each resample holds, [resample, n]; the same as scipy.stats.bootstrap's from this seed."""
    return np.random.default_rng(seed_of("bootstrap", name)).integers(0, n, (N_RESAMPLES, n))


def _bootstrap(means: np.ndarray, draws: Callable[[int], np.ndarray], confidence: float) -> Estimate:
    if len(means) == 0:
        return Estimate(np.nan, np.nan, np.nan, 0)
    if len(means) == 1:
        return Estimate(float(means[0]), np.nan, np.nan, 1)
    if np.ptp(means) == 0:
        return Estimate(float(means[0]), float(means[0]), float(means[0]), len(means))
    tail = _expanded_tail(len(means), confidence)
    resampled = means[draws(len(means))].mean(axis=-1)
    shares = np.clip([tail, 1 - tail, *_accelerated(means, resampled, tail)], 0, 1)
    ends = np.percentile(resampled, shares * 100)
    return Estimate(float(means.mean()), float(ends.min()), float(ends.max()), len(means))


def _accelerated(means: np.ndarray, resampled: np.ndarray, tail: float) -> Float[np.ndarray, " end"]:
    """The shares of resamples below either end of the BCa interval: Phi(z + (z + w) / (1 - a (z + w))) with w = -+Phi^-1(1 - tail), z the
    bias (how many resamples lie below the mean, ties as halves) and a the acceleration, sum(d^3) / (6 sum(d^2)^1.5)."""
    scale = np.ptp(means)
    apart, around = (means - means.mean()) / scale, (resampled - means.mean()) / scale  # so that cubes do not vanish
    below = ((around < -_TIE).sum() + (around <= _TIE).sum()) / (2 * len(around))
    bias = scipy.special.ndtri(np.clip(below, 1 / len(around), 1 - 1 / len(around)))
    acceleration = (apart**3).sum() / (6 * (apart**2).sum() ** 1.5)
    # Further out than 5 lies no resample; a tail of 0, of few prompts, would be infinitely far.
    beyond = bias + np.array([-1, 1]) * min(-scipy.special.ndtri(tail), 5.0)
    return scipy.special.ndtr(bias + beyond / (1 - acceleration * beyond))


# Tests by flipping signs.


def sign_flip_test(values, prompts, *, alternative: str = "two-sided", name: str = "sign flip") -> TestResult:
    """Is the mean over prompts 0? Paired permutation test: each prompt's mean keeps its size and may have either sign.

    Exact when prompts are independent and, were there no effect, each one's mean as likely to be x as -x. All 2^n sign
    patterns up to `EXACT_PROMPTS` prompts, above it `N_FLIPS` drawn from `name`, the observed one counted too. The
    statistic is the mean over prompts. A mean of exactly 0 is no evidence either way: n counts it, the smallest p is as
    if it were not there. Two-sided p <= 0.05 needs 6 prompts (`prompts_needed`); one prompt gives 1, none NaN.
    """
    _check_alternative(alternative)
    _check_name(name)
    means = prompt_means(values, prompts)
    if not len(means):
        return TestResult(np.nan, np.nan, np.nan, 0, alternative)
    family = max_t(means[:, None], alternative=alternative, name=name)
    return TestResult(float(family.p[0]), float(family.smallest_p[0]), float(means.mean()), len(means), alternative)


def max_t(
    effects: Float[np.ndarray, "prompt cell"], *, alternative: str = "two-sided", name: str = "max-T"
) -> FamilyResult:  # fmt: skip
    """Which cells of a map are not 0? p for the whole family of cells (Westfall & Young, single step), by sign flips.

    `effects`: one row per prompt (`prompt_table`), NaN where undefined. A prompt's cells are flipped together, so that
    whatever dependence there is between cells is kept; p is the share of sign patterns whose largest statistic reaches
    the cell's. The statistic is sum(x) / sqrt(sum(x^2)) over the cell's prompts: for one n it orders cells and patterns
    as |t| does, has variance 1 under the flips whatever n is, and is 0 where all effects are exactly 0. Assumptions,
    exact and drawn patterns as in `sign_flip_test`. `smallest_p`: no p of that cell can be smaller.
    """
    _check_alternative(alternative)
    _check_name(name)
    effects = _table(effects, "prompts and cells")
    given = np.isfinite(effects)
    n = given.sum(axis=0)
    shape = {key: np.full(effects.shape[1], np.nan) for key in ("p", "smallest_p", "statistic")}
    cells = np.flatnonzero(n)
    if not len(cells):
        return FamilyResult(**shape, n=n, alternative=alternative)
    values = np.where(given, effects, 0.0)[:, cells]
    rows = np.flatnonzero((values != 0).any(axis=1))  # a prompt of zeros is the same with either sign
    size = np.abs(values).max(axis=0)  # first, so that no square under- or overflows
    scaled = values[rows] / np.where(size > 0, size, 1.0)
    root = np.sqrt((scaled**2).sum(axis=0))
    scaled = scaled / np.where(root > 0, root, 1.0)
    of = {"two-sided": np.abs, "greater": lambda x: x, "less": np.negative}[alternative]
    statistic = scaled.sum(axis=0)
    reached, total = np.zeros(len(cells), dtype=np.int64), 0
    exact = len(rows) <= EXACT_PROMPTS
    observed = of(statistic) - _TIE
    for signs in _sign_patterns(len(rows), len(cells), exact, name):
        largest = np.sort(of(signs @ scaled).max(axis=1))
        reached += len(largest) - np.searchsorted(largest, observed)
        total += len(largest)
    shape["p"][cells] = reached / total if exact else (1 + reached) / (1 + total)
    floor = np.array([smallest_sign_flip_p(int(count), alternative) for count in (values != 0).sum(axis=0)])
    shape["smallest_p"][cells] = floor if exact else np.maximum(floor, 1 / (1 + total))
    shape["statistic"][cells] = statistic
    return FamilyResult(**shape, n=n, alternative=alternative)


def _sign_patterns(n: int, n_cells: int, exact: bool, name: str) -> Iterator[Float[np.ndarray, "pattern prompt"]]:
    """All 2^n patterns of +1 and -1, or `N_FLIPS` drawn ones, so many at a time that they need little memory."""
    step = max(1, _CHUNK_FLOATS // max(n, n_cells, 1))
    if exact:
        bits = np.arange(2**n)[:, None] >> np.arange(n) & 1
    else:
        bits = np.random.default_rng(seed_of("flips", name)).integers(0, 2, (N_FLIPS, n), dtype=np.int8)
    for start in range(0, len(bits), step):
        yield 1.0 - 2.0 * bits[start : start + step]


def smallest_sign_flip_p(n: int, alternative: str = "two-sided") -> float:
    """The smallest p that n prompts with effects other than 0 can give when all patterns are tried: 2^-n, twice that two-sided."""
    _check_alternative(alternative)
    n = arguments.whole(n, "n")
    return min(1.0, 2.0 ** ((alternative == "two-sided") - n))


def prompts_needed(alpha: float = 0.05, alternative: str = "two-sided") -> int:
    """How many prompts a sign-flip test needs so that p <= alpha is possible at all: 6 for 0.05 two-sided."""
    alpha, n = arguments.share(alpha, "alpha", whole=True), 1
    while smallest_sign_flip_p(n, alternative) > alpha:
        n += 1
    return n


def trend_test(
    dose, values: Float[np.ndarray, "sink dose"], prompts=None, *, alternative: str = "greater", name: str = "trend"
) -> TestResult:  # fmt: skip
    """Do the values rise with the dose? Spearman's correlation within each prompt, then the sign-flip test over prompts.

    Page's test would be stronger, but it takes every order of the doses for equally likely in each prompt. Dose curves
    are smooth: where each prompt's own goes up or down by chance, it finds a trend far too often. Here each prompt is
    one observation. Values that are equal share their mean rank; a prompt whose values are all equal has no trend, 0,
    and stays in. `dose`: one per column, ties allowed; NaN values are left out, and prompts with fewer than 3 distinct
    doses left. `prompts`: one per row, their means are taken first (None: the rows are prompts). The statistic is the
    mean correlation. Raises InputError for fewer than 3 distinct doses.
    """
    _check_alternative(alternative)
    values = _table(values, "prompts and doses")
    dose = arguments.numbers(dose, "doses")
    if dose.shape != values.shape[1:] or not np.isfinite(dose).all():
        raise InputError(f"{dose.size} doses for {values.shape[1]} columns of values: give one finite dose per column.")
    if len(np.unique(dose)) < MIN_DOSES:
        raise InputError(f"{len(np.unique(dose))} distinct doses: a trend needs at least {MIN_DOSES}.")
    table = values if prompts is None else prompt_table(values, prompts)
    correlations = [_spearman(dose[given], row[given]) for row in table if _enough(dose, given := ~np.isnan(row))]
    return sign_flip_test(correlations, range(len(correlations)), alternative=alternative, name=name)


def _enough(dose: np.ndarray, given: np.ndarray) -> bool:
    return len(np.unique(dose[given])) >= MIN_DOSES


def _spearman(dose: np.ndarray, values: np.ndarray) -> float:
    return 0.0 if np.ptp(values) == 0 else float(scipy.stats.spearmanr(dose, values).statistic)


def equivalence_test(values, prompts, margin: float, *, name: str = "equivalence") -> TestResult:
    """Is the mean over prompts within (-margin, margin)? Two one-sided tests (Schuirmann, 1987), the larger p of the two.

    A large p of another test is no sign of "no effect"; a small p here is. Each side is a sign-flip test of the prompts'
    means against that margin: no normal distribution is asked for, effects of exactly 0 are fine, and the smallest p
    is 2^-n, so that p <= 0.05 needs 5 prompts. Say the margin before looking. The statistic is the mean. Raises
    InputError for a margin that is not above 0.
    """
    if not is_number(margin) or not 0 < float(margin) < math.inf:
        raise InputError(
            f"margin {shown(margin)} is not allowed: give the largest effect that counts as none, above 0."
        )
    margin = float(margin)
    means = prompt_means(values, prompts)
    alternative = f"within ±{margin:g}"
    if not len(means):
        return TestResult(np.nan, np.nan, np.nan, 0, alternative)
    above, below = (
        sign_flip_test(shifted, range(len(means)), alternative="greater", name=name)
        for shifted in (margin + means, margin - means)
    )
    smallest = max(smallest_sign_flip_p(len(means), "greater"), 0 if len(means) <= EXACT_PROMPTS else 1 / (1 + N_FLIPS))
    return TestResult(max(above.p, below.p), smallest, float(means.mean()), len(means), alternative)


# Controls.


def difference_to_controls(
    effects, controls, prompts, *, name: str, alternative: str = "two-sided", confidence: float = 0.95
) -> Difference:  # fmt: skip
    """Effect minus that of its matched controls, sink by sink, then over prompts: interval and sign-flip test.

    Effects are differences of log-odds: an ordinary token's score stands near 0 and cannot fall, its log-odds can.
    `effects`: one per sink; `controls`: [sink] or [sink, control], several per sink are averaged, NaN left out. Sinks
    without an effect or without any control are left out; those without a control are counted. Raises InputError.
    """
    effects = arguments.numbers(effects, "effects")
    controls = arguments.numbers(controls, "controls", axes=None)
    controls = _table(controls[:, None] if controls.ndim == 1 else controls, "sinks and controls")
    if len(controls) != len(effects):
        raise InputError(f"controls of {len(controls)} sinks for effects of {len(effects)}: give a row per sink.")
    prompts = _labels(prompts, len(effects), "prompts")
    counts = (~np.isnan(controls)).sum(axis=1)
    matched = np.where(counts > 0, np.nansum(controls, axis=1) / np.maximum(counts, 1), np.nan)
    differences = effects - matched
    return Difference(
        bootstrap_over_prompts(differences, prompts, name=name, confidence=confidence),
        sign_flip_test(differences, prompts, alternative=alternative, name=name),
        n_sinks=int((~np.isnan(differences)).sum()),
        n_unmatched=int((~np.isnan(effects) & (counts == 0)).sum()),
    )


def rank_among_controls(value: float, controls, *, alternative: str = "greater") -> TestResult:
    """Where a value stands among those of random controls: rank 1 is beyond all, p = (1 + #controls as far) / (n + 1).

    "greater": controls at least as large count, "less": at least as small, ties against the value; "two-sided": twice
    the smaller p, its rank the smaller one. The statistic is the rank; NaN controls are left out, n counts the rest:
    19 are needed for p <= 0.05, without any p is 1. A NaN value has p NaN.
    """
    _check_alternative(alternative)
    if not is_number(value):
        raise InputError(f"value = {shown(value)}: give a number, NaN where it is undefined.")
    value, controls = float(value), arguments.numbers(controls, "controls", axes=None, infinite=True).reshape(-1)
    controls = controls[~np.isnan(controls)]
    n = len(controls)
    both = 2 if alternative == "two-sided" else 1
    smallest = min(1.0, both / (n + 1))
    if np.isnan(value):
        return TestResult(np.nan, smallest, np.nan, n, alternative)
    ranks = {"greater": 1 + int((controls >= value).sum()), "less": 1 + int((controls <= value).sum())}
    rank = min(ranks.values()) if both == 2 else ranks[alternative]
    return TestResult(min(1.0, both * rank / (n + 1)), smallest, float(rank), n, alternative)


# Many tests.


def holm(pvalues) -> np.ndarray:
    """p-values adjusted for the family (Holm, 1979): those at most alpha hold together with error alpha. For declared hypotheses.

    NaN stays NaN and is no part of the family. Raises InputError for values outside [0, 1].
    """

    def adjust(p: np.ndarray) -> np.ndarray:
        order = np.argsort(p, kind="stable")
        adjusted = np.empty_like(p)
        adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1.0)
        return adjusted

    return _adjusted(pvalues, adjust)


def benjamini_hochberg(pvalues) -> np.ndarray:
    """p-values adjusted for the false discovery rate (Benjamini & Hochberg, 1995; scipy). For maps that are searched.

    Holds for independent cells and those that depend positively. NaN stays NaN and is no part of the family. Raises
    InputError for values outside [0, 1].
    """
    return _adjusted(pvalues, scipy.stats.false_discovery_control)


def _adjusted(pvalues, adjust: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    p = arguments.numbers(pvalues, "p-values", axes=None)
    given = ~np.isnan(p)
    if ((p[given] < 0) | (p[given] > 1)).any():
        raise InputError("a p-value lies outside [0, 1]: give p-values.")
    out = np.full_like(p, np.nan)
    if given.any():
        out[given] = adjust(p[given])
    return out


def discovery_confirmation_split(
    prompts: Sequence[Hashable], name: str, *, kinds: Sequence[Hashable] | None = None, share: float = 0.5
) -> Split:
    """Prompts to look for something in, and the others to test it on: disjoint, drawn from `name`, in their given order.

    `share` of the prompts go to discovery; with `kinds`, one per prompt, that share of each kind (to the nearest whole,
    and of all together too). Which depends on the names alone, not on their order. Raises InputError for a prompt named
    twice, fewer than 2, or a share that leaves one side empty.
    """
    prompts = _labels(prompts, None, "prompts")
    _check_name(name)
    if len(set(prompts)) < len(prompts):
        raise InputError("a prompt is named twice: a split must know each once, or one could stand on both sides.")
    labels = [""] * len(prompts) if kinds is None else _labels(kinds, len(prompts), "kinds")
    share = arguments.share(share, "share")
    # Kind by kind, each shuffled; then the prompts at which the running total of shares passes a whole number.
    place = sorted(range(len(prompts)), key=lambda i: (str(labels[i]), seed_of("split", name, prompts[i])))
    totals = np.floor(share * np.arange(len(prompts) + 1) + 0.5)
    chosen = {i for rank, i in enumerate(place) if totals[rank + 1] > totals[rank]}
    if not 0 < len(chosen) < len(prompts):
        raise InputError(
            f"{len(prompts)} prompts and a share of {share} leave one side empty: give more prompts or another share."
        )
    sides = ([p for i, p in enumerate(prompts) if (i in chosen) == side] for side in (True, False))
    return Split(*map(tuple, sides))


def _confidence(confidence: float) -> float:
    return arguments.share(confidence, "confidence")


def _check_name(name: str) -> None:
    if not isinstance(name, str):
        raise InputError(f"name = {shown(name)}: give a text, numbers are drawn from it.")


def _check_alternative(alternative: str) -> None:
    arguments.one_of(alternative, "alternative", ALTERNATIVES)


def _table(values, dims: str) -> Float[np.ndarray, "row column"]:
    table = arguments.numbers(values, "values", axes=None)
    if table.ndim != 2:
        raise InputError(f"values have {table.ndim} dimensions: give two, {dims}.")
    return table


def _labels(labels, n: int | None, what: str) -> list:
    """Names, one per row: of tensors and arrays their numbers, for a tensor's parts are never equal; none may be missing."""
    made = list(arguments.several(labels.tolist() if hasattr(labels, "tolist") else labels, what, empty=True))
    if n is not None and len(made) != n:
        raise InputError(f"{len(made)} {what} for {n} rows of values: give one per row.")
    for one in made:
        if not isinstance(one, Hashable) or one is None or one is pd.NA or one != one:
            raise InputError(f"{what} hold {shown(one)}: name each, by a text or a number.")
    return made
