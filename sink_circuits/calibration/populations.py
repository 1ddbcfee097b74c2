"""Is chance kept apart from effects? Intervals, tests and power over prompts, with and without a circuit."""

from __future__ import annotations

import numpy as np
import scipy.stats
from jaxtyping import Float
from torch import Tensor

from sink_circuits import statistics
from sink_circuits.calibration.plain import PLAIN_TOLERANCE, plain_effects
from sink_circuits.calibration.subjects import LEVEL, Answer, Row, Subject, answer
from sink_circuits.edits import Edit
from sink_circuits.effects import Effect
from sink_circuits.experiments import dose_response, layer_map
from sink_circuits.interventions import rescale
from sink_circuits.measurement import measure

N_POOL, N_POWER, N_NULL = 16, 8, 10
"""Prompts of the population that intervals are to cover; those with controls; those of a null test."""
SAMPLES, SAMPLE_SIZES = 8, (10, 20)
"""Samples drawn from one population, of each size."""
SKEWED, SKEWED_LEVEL = 1.0, 0.85
"""The skewness of a population above which few prompts are known to say too little, and how often intervals must cover its mean
all the same. Its few large effects are missing from many a sample: nothing in such a sample tells of them."""
WIDTHS = (0.5, 2.0)
"""Of an interval, in widths of Student's: one that is far wider covers everything and says nothing."""
DOSES = (0.0, 0.5, 1.0)
ALPHAS = (0.01, 0.05, 0.1)
NULL_FACTORS = (0.0, 1.0, 2.0)

ROWS = (
    Row("effects", "equal to those of a plain Hugging Face forward pass with a hook"),
    *(Row(f"interval, {n} prompts", "covers the population's mean effect", LEVEL, "at least") for n in SAMPLE_SIZES),
    *(
        Row(f"interval, {n} prompts, skewed", f"the same, skewness above {SKEWED:g}", SKEWED_LEVEL, "at least")
        for n in SAMPLE_SIZES
    ),
    Row("interval width", "between {:g} and {:g} widths of Student's interval".format(*WIDTHS)),
    *(
        Row(f"power: {test}", f"{asks}, {N_POWER} prompts: p <= 0.05")
        for test, asks in (
            ("sign flips", "sinks against controls"),
            ("max-T", "the same, in one family with controls against each other"),
            ("trend", "more of the contribution is more of a sink"),
        )
    ),
    *(
        Row(f"null: {test}, p <= {alpha}", "as often as that, at most", alpha, "at most")
        for test in ("sign flips", "max-T", "trend")
        for alpha in ALPHAS
    ),
    Row(f"null: interval, {N_NULL} prompts", "covers 0", LEVEL, "at least"),
)


def judge_population(subject: Subject) -> list[Answer]:
    """A population of prompts whose effects a plain Hugging Face forward pass knows: effects, intervals, power.

    Samples are drawn from the population with replacement, so that its mean is what their intervals are to cover. Tests
    that never reject, and intervals that cover whatever there is, would pass among models without a circuit: not here.
    """
    pool, rng = subject.prompts("pool", N_POOL), np.random.default_rng(statistics.seed_of("pool", subject.name))
    treated, controls, sinks = [], [], []
    for index, ids in enumerate(pool.ids):
        lives = [life for life in subject.plant.truth.lives(ids) if life[1].forming]
        lives = [life for life in lives if life[1].kind != "primary"] or lives[:1]
        pos, sink = lives[int(rng.integers(len(lives)))]
        treated.append((index, pos, sink.kind, sink.l_start, sink.l_end))
        if index < N_POWER:
            controls.append((index, _ordinary(subject, ids, rng, 1)[0], "control", sink.l_start, sink.l_end))
        sinks.append(sink)

    def edits(dose: float, row) -> tuple[Edit, ...]:
        return tuple(rescale(layer, int(row["pos"]), dose) for layer in sinks[int(row.name) % N_POOL].forming)

    def measured(places, doses) -> Float[np.ndarray, "sink dose"]:
        effect = measure(subject.model, pool, subject.rows(pool, places), doses, edits, what="joint", verbose=False)
        return effect.over_lifetime("log_odds").to_numpy()

    effects = measured([*treated, *controls], DOSES[:1])[:, 0]
    plain = plain_effects(
        subject.plant, pool.ids, [(place[1], sink) for place, sink in zip(treated, sinks, strict=True)]
    )
    errors = np.abs(effects[:N_POOL] - plain)
    answers = [Answer("effects", int((errors < PLAIN_TOLERANCE).sum()), N_POOL, f"largest error {errors.max():.2g}")]
    skewed = ", skewed" if abs(scipy.stats.skew(plain)) > SKEWED else ""
    for n in SAMPLE_SIZES:
        covered, widths = 0, []
        for sample in range(SAMPLES):
            drawn = effects[:N_POOL][rng.integers(0, N_POOL, n)]
            interval = statistics.bootstrap_over_prompts(
                drawn, range(n), name=f"{subject.name}/{n}/{sample}", confidence=LEVEL
            )
            covered += interval.low <= plain.mean() <= interval.high
            widths.append((interval.high - interval.low) / _students_width(drawn))
        answers.append(Answer(f"interval, {n} prompts{skewed}", covered, SAMPLES))
        within = sum(WIDTHS[0] <= width <= WIDTHS[1] for width in widths)
        answers.append(Answer("interval width", within, SAMPLES, f"{min(widths):.2g} to {max(widths):.2g} Student's"))
    own, control = effects[:N_POWER], effects[N_POOL:]
    doses = np.column_stack([own, measured(treated[:N_POWER], DOSES[1:])])
    family = np.column_stack([own - control, control - np.roll(control, 1)])
    p = {
        "sign flips": statistics.difference_to_controls(own, control, pool.names[:N_POWER], name=subject.name).test.p,
        "max-T": float(statistics.max_t(family, name=subject.name).p[0]),
        "trend": statistics.trend_test(DOSES, doses, name=subject.name).p,
    }
    return [*answers, *(answer(f"power: {test}", value <= 0.05, f"p = {value:.3g}") for test, value in p.items())]


def _students_width(values: Float[np.ndarray, " prompt"]) -> float:
    return 2 * scipy.stats.t.ppf((1 + LEVEL) / 2, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5


def _ordinary(subject: Subject, ids: Tensor, rng: np.random.Generator, n: int) -> list[int]:
    """Positions of ordinary tokens in the middle of a text, drawn without replacement."""
    places = (ids >= subject.plant.recipe.n_special).nonzero().flatten().numpy()
    return rng.choice(places[(places >= 4) & (places < len(ids) - 18)], n, replace=False).tolist()


def judge_null_tests(subject: Subject) -> list[Answer]:
    """Differences between two ordinary tokens that chance tells apart: as likely positive as negative, so that p <= alpha
    with probability alpha at most, and an interval covers 0."""
    tokens, n_layers = subject.prompts("null", N_NULL), subject.plant.recipe.shape.n_layers
    rng = np.random.default_rng(statistics.seed_of("null", subject.name))
    pairs = [_ordinary(subject, ids, rng, 2) for ids in tokens.ids]
    first, *others = rng.choice(n_layers - 1, 3, replace=False).tolist()
    places = [(index, pair[side], "ordinary", 0, n_layers - 1) for side in range(2) for index, pair in enumerate(pairs)]
    table = subject.rows(tokens, places)

    def differences(effect: Effect) -> Float[np.ndarray, "prompt edit"]:
        values = effect.over_lifetime("log_odds").to_numpy()
        return values[:N_NULL] - values[N_NULL:]

    doses = differences(dose_response(subject.model, tokens, table, layer=first, factors=NULL_FACTORS, verbose=False))
    more = differences(layer_map(subject.model, tokens, table, layers=sorted(others), verbose=False))
    by_layer = np.column_stack([doses[:, 0], more])
    p = {
        "sign flips": statistics.sign_flip_test(by_layer[:, 0], range(N_NULL), name=subject.name).p,
        "max-T": float(statistics.max_t(by_layer, name=subject.name).p.min()),
        "trend": statistics.trend_test(NULL_FACTORS, doses, alternative="two-sided", name=subject.name).p,
    }
    interval = statistics.bootstrap_over_prompts(by_layer[:, 0], range(N_NULL), name=subject.name, confidence=LEVEL)
    rates = [
        Answer(f"null: {test}, p <= {alpha}", int(not value > alpha), 1, f"p = {value:.4g}")  # NaN is no answer
        for test, value in p.items()
        for alpha in ALPHAS
    ]
    covers = interval.low <= 0 <= interval.high
    return [*rates, answer(f"null: interval, {N_NULL} prompts", covers, f"{interval.low:.3g} to {interval.high:.3g}")]


JUDGES = (judge_population,)
NULL_JUDGES = (judge_null_tests,)
