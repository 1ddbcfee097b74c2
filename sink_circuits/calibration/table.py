"""The calibration table: all judges over many random plants.

To hold another instrument to the plants, write a judge, a function of a `Subject` that returns `Answer`s, with its `ROWS`
and `JUDGES` in a room of its own, and name the room in `ROOMS`.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np
import pandas as pd
import scipy.stats
from tqdm.auto import tqdm

from sink_circuits import arguments, planted, statistics
from sink_circuits.calibration import causes, finding, populations
from sink_circuits.calibration.subjects import LEVEL, Answer, Judge, Judged, Row, answer, subject_of
from sink_circuits.errors import InputError, SinkCircuitsError
from sink_circuits.planted.circuits import name_of

ROOMS = (finding, causes, populations)
ERRORS = Row("errors", "instruments answer: none refuses a plant")
ROWS: tuple[Row, ...] = (*(row for room in ROOMS for row in room.ROWS), ERRORS)
"""The lines of the table, in order."""
JUDGES: tuple[Judge, ...] = tuple(judge for room in ROOMS for judge in room.JUDGES)
"""Judges of plants."""
NULL_JUDGES: tuple[Judge, ...] = tuple(judge for room in ROOMS for judge in room.NULL_JUDGES)
"""Judges of models without a circuit."""


_COLUMNS = ("instrument", "variant", "n_plants", "n", "right", "rate", "nominal", "low", "high", "p", "verdict")


@dataclass(frozen=True)
class Calibration:
    """What `calibrate` returns: all answers about all plants. `plants`: one `Judged` per plant, null ones included."""

    plants: tuple[Judged, ...]
    rows: tuple[Row, ...] = ROWS

    def to_dataframe(self) -> pd.DataFrame:
        """One row per instrument and variant, and one for "all" variants.

        Columns: instrument, variant, n_plants, n (answers), right, rate, nominal, low, high (Wilson's interval of the rate,
        95 %), p, verdict. `p`, of lines with a nominal rate: how often a rate so far on the wrong side comes about were the true
        one nominal (binomial, one-sided), adjusted for all such lines of the variant (`statistics.holm`). Several answers
        about one plant are no independent ones: interval and p take as many for one as `_design_effect` says. Verdict: "as
        planted" where all are right and "misses" otherwise; for a nominal rate "holds", or with p <= 0.05 "too low", "too often".
        """
        frame = self._answers()
        lines = []
        for row in self.rows:
            own = frame[frame["instrument"] == row.instrument]
            for variant in [*sorted(own["variant"].unique()), "all"] if len(own) else []:
                part = own if variant == "all" else own[own["variant"] == variant]
                lines.append(_line(row, variant, part))
        table = pd.DataFrame(lines, columns=[*_COLUMNS, "rule"])
        table["p"] = table.groupby("variant")["p"].transform(statistics.holm)
        table["verdict"] = [_verdict(*line) for line in table[["rule", "right", "n", "p"]].itertuples(index=False)]
        return table[list(_COLUMNS)]

    def misses(self) -> pd.DataFrame:
        """One row per plant and instrument that should always be right and was not: plant, variant, instrument, right,
        of, detail. `random_plant(plant, variant=variant)` makes it again; of "0/1/null", `null_plant("0/1", variant=variant)`."""
        always = {row.instrument for row in self.rows if row.rule == "all"}
        frame = self._answers()
        return frame[frame["instrument"].isin(always) & (frame["right"] < frame["of"])].reset_index(drop=True)

    @property
    def holds(self) -> bool:
        """Whether every line over all variants is "as planted" or "holds"."""
        frame = self.to_dataframe()
        return bool(frame.loc[frame["variant"] == "all", "verdict"].isin(("as planted", "holds")).all())

    def _answers(self) -> pd.DataFrame:
        rows = [
            {"plant": one.plant, "variant": one.variant, **vars(answer)}
            for one in self.plants
            for answer in one.answers
        ]
        return pd.DataFrame(rows, columns=["plant", "variant", "instrument", "right", "of", "detail"])

    def __repr__(self) -> str:
        frame = self.to_dataframe()
        frame = frame[frame["variant"] == "all"].drop(columns="variant")
        build, judge = (np.median([one.seconds[i] for one in self.plants]) for i in range(2))
        table = frame.to_string(index=False, float_format=lambda x: f"{x:.3g}", justify="left")
        return (
            f"Calibration on {len(self.plants)} plants ({build:.2g} s each to build, {judge:.2g} s to judge)\n{table}"
        )


def _line(row: Row, variant: str, part: pd.DataFrame) -> dict:
    right, n = int(part["right"].sum()), int(part["of"].sum())
    effect = _design_effect(part)
    low, high = _wilson(right / effect, n / effect) if n else (np.nan, np.nan)
    p = _wrong_side(row, right / effect, n / effect) if n and row.rule != "all" else np.nan
    return {
        "instrument": row.instrument, "variant": variant, "n_plants": part["plant"].nunique(), "n": n, "right": right,
        "rate": right / n if n else np.nan, "nominal": row.nominal, "low": low, "high": high, "p": p, "rule": row.rule,
    }  # fmt: skip


def _verdict(rule: str, right: int, n: int, p: float) -> str:
    if not n:
        return "not asked"
    if rule == "all":
        return "as planted" if right == n else "misses"
    return "holds" if p > 1 - LEVEL else {"at least": "too low", "at most": "too often"}[rule]


def _design_effect(part: pd.DataFrame) -> float:
    """How many dependent answers say as much as one: variance of the rate over plants, over that of independent answers; at
    least 1 (Rao & Scott, Biometrics 48, 1992)."""
    counts = part.groupby("plant")[["right", "of"]].sum()
    n, m, rate = counts["of"].sum(), len(counts), counts["right"].sum() / max(1, counts["of"].sum())
    if m < 2 or not 0 < rate < 1:
        return 1.0
    over_plants = m / (m - 1) * ((counts["right"] - rate * counts["of"]) ** 2).sum() / n**2
    return max(1.0, float(over_plants / (rate * (1 - rate) / n)))


def _wilson(right: float, n: float) -> tuple[float, float]:
    """Wilson's interval of a rate, also for the fractions of a count that a design effect leaves."""
    z, rate = scipy.stats.norm.ppf((1 + LEVEL) / 2), right / n
    centre, half = rate + z**2 / (2 * n), z * (rate * (1 - rate) / n + z**2 / (4 * n**2)) ** 0.5
    return max(0.0, (centre - half) / (1 + z**2 / n)), min(1.0, (centre + half) / (1 + z**2 / n))


def _wrong_side(row: Row, right: float, n: float) -> float:
    """P(at most `right`) or, of a rate that is to be small, P(at least `right`), of a binomial with the nominal rate: by the beta
    distribution, for fractions too."""
    if row.rule == "at least":
        return float(scipy.stats.beta.cdf(1 - row.nominal, n - right, right + 1)) if right < n else 1.0
    return float(scipy.stats.beta.cdf(row.nominal, right, n - right + 1)) if right else 1.0


def calibrate(
    n_plants: int = 100, seed: int | str = 0, *, n_null: int | None = None, variants: Sequence[str] = planted.VARIANTS,
    backend: str = "bridge", judges: Sequence[Judge] = JUDGES, null_judges: Sequence[Judge] = NULL_JUDGES,
    executor: Executor | None = None, verbose: bool = True,
) -> Calibration:  # fmt: skip
    """Hold every instrument to `n_plants` random plants, and to `n_null` (as many when None) without a circuit.

    Plants are named "<seed>/<number>", variants take turns. `backend`: "bridge" or "hooked", the TransformerLens class that
    holds them. `judges`, `null_judges`: of the one kind and of the other. `executor`: anything with `submit`
    (concurrent.futures), for several processes. Raises InputError.
    """
    seed, n_plants = name_of(seed), arguments.whole(n_plants, "n_plants", low=1)
    n_null = n_plants if n_null is None else arguments.whole(n_null, "n_null")
    arguments.one_of(backend, "backend", ("bridge", "hooked"))
    variants = arguments.several(variants, "variants", empty=True)
    for variant in variants:
        arguments.one_of(variant, "variant", planted.VARIANTS, "use some of {}")
    if not variants:
        raise InputError(f"no variants were given: use some of {', '.join(planted.VARIANTS)}.")
    judges, null_judges = (
        [arguments.function(one, name, "a Subject") for one in arguments.several(given, name, empty=True)]
        for name, given in (("judges", judges), ("null_judges", null_judges))
    )
    if executor is not None:
        arguments.function(getattr(executor, "submit", None), "executor's submit", "(function, ...)")
    arguments.flag(verbose, "verbose")
    work: Iterator[Callable[[], Judged]] = (
        functools.partial(judge, f"{seed}/{number}", variants[number % len(variants)], backend, asked)
        for judge, n, asked in ((judge_plant, n_plants, judges), (judge_null_plant, n_null, null_judges))
        for number in range(n)
    )
    bar = tqdm(total=n_plants + n_null, desc="calibrating", unit="plant", disable=not verbose)
    judged = []
    if executor is None:
        results: Iterable[Judged] = (one() for one in work)
    else:
        futures = [executor.submit(one) for one in work]
        results = (future.result() for future in futures)
    for one in results:
        judged.append(one)
        bar.update()
    bar.close()
    return Calibration(tuple(judged))


def judge_plant(name: str, variant: str, backend: str = "bridge", judges: Sequence[Judge] = JUDGES) -> Judged:
    """All answers about `random_plant(name, variant=variant)`."""
    return _judged(planted.random_plant, name, name, variant, backend, judges)


def judge_null_plant(name: str, variant: str, backend: str = "bridge", judges: Sequence[Judge] = NULL_JUDGES) -> Judged:
    """All answers about `null_plant(name, variant=variant)`."""
    return _judged(planted.null_plant, name, f"{name}/null", variant, backend, judges)


def _judged(
    make: Callable[..., planted.Plant], name: str, label: str, variant: str, backend: str, judges: Sequence[Judge]
) -> Judged:
    started = time.perf_counter()
    plant = make(name, variant=variant)
    built = time.perf_counter()
    subject = subject_of(name, plant, backend)
    answers: list[Answer] = []
    for judge in judges:
        try:
            own, error = judge(subject), ""
        except SinkCircuitsError as refusal:
            own, error = [], f"{getattr(judge, '__name__', judge)}: {refusal}"
        answers += [*own, answer(ERRORS.instrument, not error, error)]
    return Judged(label, variant, tuple(answers), (built - started, time.perf_counter() - built))
