"""Instruments are held to random plants, and the judges to falsified truths: a judge that cannot say no says nothing."""

from __future__ import annotations

import dataclasses
import functools
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from scipy.stats import binom, binomtest

from sink_circuits import calibration, planted, statistics
from sink_circuits.calibration import (
    Answer,
    Calibration,
    Judged,
    Row,
    calibrate,
    judge_null_plant,
    judge_plant,
    subject_of,
)
from sink_circuits.calibration.causes import judge_attention_decoy, judge_joint_ablation, judge_layers, judge_writers
from sink_circuits.calibration.finding import judge_detection, judge_nothing_found
from sink_circuits.calibration.populations import SAMPLE_SIZES, judge_population
from sink_circuits.calibration.subjects import N_PROMPTS
from sink_circuits.errors import InputError
from sink_circuits.planted import draw

torch.set_num_threads(1)

EXACT = {row.instrument for row in calibration.ROWS if row.rule == "all"}


def wrong(judged: Judged) -> list[Answer]:
    return [answer for answer in judged.answers if answer.instrument in EXACT and answer.right < answer.of]


@pytest.mark.parametrize("variant", planted.VARIANTS)
def test_sinks_are_found_and_removed_in_every_variant(variant):
    layers = (judge_layers,) if variant in ("gpt_neox", "gemma2") else ()
    judged = judge_plant(f"fast/{variant}", variant, judges=(judge_detection, judge_joint_ablation, *layers))
    assert not wrong(judged)
    assert {"detection: primary", "joint ablation", "heads"} <= {a.instrument for a in judged.answers}


@functools.cache
def subject() -> calibration.Subject:
    """A plant with a secondary that one MLP forms and another erases while the primary lives on, and an attention decoy."""
    return subject_of("judged", planted.random_plant("judged 298", variant="llama", phases="one", n_secondary=1))


def falsified(**changes) -> calibration.Subject:
    """The same plant, its secondary's truth changed."""
    truth = subject().plant.truth
    sinks = tuple(dataclasses.replace(sink, **changes) if sink.kind == "secondary" else sink for sink in truth.sinks)
    plant = dataclasses.replace(subject().plant, truth=dataclasses.replace(truth, sinks=sinks))
    return dataclasses.replace(subject(), plant=plant)


def secondary() -> planted.Sink:
    return subject().plant.truth.sink("secondary")


def test_the_judged_plant_is_what_the_falsifications_need():
    assert secondary().redundancy == "one"
    assert secondary().eraser is not None
    assert secondary().eraser < subject().plant.truth.sink("primary").l_end
    assert any(decoy.kind == "attention" for decoy in subject().plant.truth.decoys)


JUDGES = {judge.__name__: judge for judge in calibration.JUDGES}
CHEAP = ("judge_detection", "judge_layers", "judge_joint_ablation", "judge_dose", "judge_neurons")


@pytest.mark.parametrize("name", [pytest.param(one, marks=() if one in CHEAP else pytest.mark.slow) for one in JUDGES])
def test_every_judge_says_yes_to_the_truth(name):
    answers = JUDGES[name](subject())
    assert [a for a in answers if a.instrument in EXACT and a.right < a.of] == []
    assert answers or name == "judge_official"


@pytest.mark.parametrize(
    ("name", "instrument", "change"),
    [
        ("judge_detection", "detection: secondary", lambda s: {"l_start": s.l_start + 1}),
        ("judge_detection", "detection: nothing else", lambda s: {"l_end": s.l_end - 1}),
        ("judge_detection", "detection: primary-like", lambda s: {"kind": "primary-like"}),
        ("judge_layers", "layer map: one MLP", lambda s: {"forming": (s.forming[0] - 1,)}),
        ("judge_layers", "layer map: chain", lambda s: {"forming": (s.forming[0] - 1, s.forming[0] + 1), "redundancy": "chain"}),
        ("judge_layers", "layer map: stand-ins", lambda s: {"forming": (s.forming[0] - 1, s.l_end), "redundancy": "stand_in"}),
        ("judge_layers", "layer map: no MLP", lambda s: {"forming": (), "redundancy": "none"}),
        ("judge_layers", "eraser: prolonged", lambda s: {"eraser": s.eraser + 1}),
        ("judge_joint_ablation", "joint ablation", lambda s: {"forming": (s.forming[0] - 1,)}),
        ("judge_joint_ablation", "heads", lambda s: {"forming": (s.forming[0] - 1,)}),
        ("judge_dose", "dose curve", lambda s: {"norm": 3 * s.norm}),
        ("judge_neurons", "neurons: removed", lambda s: {"neurons": (tuple((n + 1) % 64 for n in s.neurons[0]),)}),
        ("judge_neurons", "neurons: named", lambda s: {"neurons": (tuple((n + 1) % 64 for n in s.neurons[0]),)}),
        pytest.param("judge_writers", "eraser: named", lambda s: {"eraser": s.eraser + 1}, marks=pytest.mark.slow),
        pytest.param("judge_writers", "writer: named", lambda s: {"forming": (s.forming[0] - 1,)}, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_every_judge_says_no_to_a_falsified_truth(name, instrument, change):
    answers = [a for a in JUDGES[name](falsified(**change(secondary()))) if a.instrument == instrument]
    assert answers
    assert any(answer.right < answer.of for answer in answers)
    assert all(answer.detail for answer in answers if answer.right < answer.of)


def test_a_model_whose_heads_look_three_percent_harder_is_told_from_the_plant():
    """What noise in the keys does to the planted logit, up to a seventh, the plain forward pass knows: no room is left for it."""
    plant = subject().plant
    logits = tuple((head, 1.03 * logit) for head, logit in plant.recipe.sink_logits)
    other = draw._plant(dataclasses.replace(plant.recipe, sink_logits=logits))
    answers = judge_joint_ablation(dataclasses.replace(subject(), model=other.bridge()))
    assert [a.right for a in answers if a.instrument == "joint ablation"] == [0] * len(plant.truth.sinks)
    assert all(a.right for a in answers if a.instrument == "heads")


@pytest.mark.parametrize(("name", "variant"), [("2/44", "gpt2"), ("2/86", "gpt2")])
def test_writes_that_are_taken_out_again_still_add_up(name, variant):
    """A primary of norm 300 to 400 is erased: its rounding stays, and is much beside what is left."""
    judged = judge_plant(name, variant, judges=(judge_writers,))
    assert not wrong(judged)
    assert {"writer: named", "eraser: named"} <= {a.instrument for a in judged.answers}


def test_sinks_in_a_null_plant_would_be_seen():
    (answer,) = judge_nothing_found(subject())
    assert answer.right == 0
    assert answer.of == N_PROMPTS


@pytest.mark.slow
def test_attention_that_an_mlp_makes_is_blamed_on_it():
    """A secondary in the decoy's place: the judge of decoys must see that an MLP is to blame."""
    plant = subject().plant
    decoys = (planted.Decoy(secondary().token, "attention", None, True),)
    recipe = dataclasses.replace(plant.recipe, attended_logits=plant.recipe.sink_logits)
    swapped = dataclasses.replace(plant, recipe=recipe, truth=dataclasses.replace(plant.truth, decoys=decoys))
    told = [
        judge_attention_decoy(dataclasses.replace(subject(), plant=swapped, name=f"{draw}"))[0].right
        for draw in range(6)
    ]
    assert not all(told)  # the layers looked at are drawn: in one of a few draws the forming one is among them


@pytest.mark.slow
def test_the_population_is_that_of_the_plain_model():
    """Effects of another circuit are not taken for this one's."""
    other = falsified(forming=(secondary().forming[0] - 1,))
    answers = {a.instrument: a for a in judge_population(other)}
    assert [answers[f"power: {test}"].right for test in ("sign flips", "max-T")] == [0, 0]
    assert answers["effects"].right == answers["effects"].of  # the instrument says the same of the wrong layer


@pytest.mark.slow
def test_statistics_that_say_nothing_are_not_taken_for_careful_ones(monkeypatch):
    """Among models without a circuit a test that never rejects and an interval without end are never wrong."""
    nothing = statistics.TestResult(p=1.0, smallest_p=0.01, statistic=0.0, n=8, alternative="greater")
    endless = statistics.Estimate(0.0, -1e9, 1e9, 10)
    monkeypatch.setattr(statistics, "trend_test", lambda *_, **__: nothing)
    monkeypatch.setattr(statistics, "bootstrap_over_prompts", lambda *_, **__: endless)
    answers = {a.instrument: a for a in judge_population(subject())}
    assert answers["power: trend"].right == answers["interval width"].right == 0
    (ten,) = (a for a in answers.values() if a.instrument.startswith("interval, 10 prompts"))
    assert ten.right == ten.of


@pytest.mark.slow
@pytest.mark.parametrize("far", [False, True])
def test_intervals_are_held_to_their_rate_where_the_population_is_not_skewed(monkeypatch, far):
    """Sixteen plain effects, one of them far from the others: skewness 3.6, by hand; half near, half far: none."""
    population = np.array([-1.0] * 15 + [-9.0] if far else [-1.0, -9.0] * 8)
    monkeypatch.setattr(calibration.populations, "plain_effects", lambda *_: population)
    asked = {a.instrument for a in judge_population(subject()) if a.instrument.startswith("interval, ")}
    assert asked == {f"interval, {n} prompts" + (", skewed" if far else "") for n in SAMPLE_SIZES}


@pytest.mark.parametrize("test", ["sign_flip_test", "trend_test"])
def test_no_p_value_counts_as_a_rejection(monkeypatch, test):
    nan = statistics.TestResult(p=float("nan"), smallest_p=0.01, statistic=0.0, n=10, alternative="two-sided")
    monkeypatch.setattr(statistics, test, lambda *_, **__: nan)
    name = {"sign_flip_test": "sign flips", "trend_test": "trend"}[test]
    judged = judge_null_plant("fast", "llama")
    assert [a.right for a in judged.answers if a.instrument.startswith(f"null: {name}")] == [1, 1, 1]


def test_a_null_plant_is_judged():
    judged = judge_null_plant("fast", "gpt_neox")
    assert judged.plant == "fast/null"
    assert not wrong(judged)
    asked = {row.instrument for row in calibration.ROWS if row.instrument.startswith("null")}
    assert {answer.instrument for answer in judged.answers} == asked | {"errors"}


def refuse(subject):
    raise InputError("this plant cannot be read.")


def test_an_instrument_that_refuses_a_plant_is_a_miss():
    result = calibrate(1, "refused", n_null=0, variants=("gpt2",), judges=(refuse,), verbose=False)
    (miss,) = result.misses().to_dict("records")
    assert (miss["instrument"], miss["detail"]) == ("errors", "refuse: this plant cannot be read.")


# The table.

ROWS = (
    Row("a", "is it", 1.0),
    Row("b", "often", 0.95, "at least"),
    Row("c", "rarely", 0.05, "at most"),
    Row("d", "never asked"),
)


def table(*answers: tuple[str, int, int], variant: str = "llama") -> Calibration:
    plants = (Judged("0/0", variant, tuple(Answer(*answer, "why") for answer in answers), (0.1, 1.0)),)
    return Calibration(plants, ROWS)


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        (("a", 3, 3), "as planted"), (("a", 299, 300), "misses"), (("b", 95, 100), "holds"), (("b", 92, 100), "holds"),
        (("b", 80, 100), "too low"), (("b", 100, 100), "holds"), (("c", 0, 100), "holds"), (("c", 8, 100), "holds"),
        (("c", 20, 100), "too often"),
    ],
)  # fmt: skip
def test_verdicts(answer, verdict):
    frame = table(answer).to_dataframe()
    assert frame["verdict"].tolist() == [verdict, verdict]
    assert frame["variant"].tolist() == ["llama", "all"]
    assert frame["instrument"].tolist() == [answer[0]] * 2
    assert table(answer).holds == (verdict in ("as planted", "holds"))


def test_wilson_interval_and_counts():
    both = Calibration((*table(("b", 8, 10)).plants, *table(("b", 9, 10), variant="gpt2").plants), ROWS)
    line = both.to_dataframe().iloc[-1]
    assert (line["variant"], line["right"], line["n"], line["rate"], line["nominal"]) == ("all", 17, 20, 0.85, 0.95)
    z, p, n = 1.959964, 0.85, 20  # Wilson (1927), by hand
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * (p * (1 - p) / n + z**2 / (4 * n**2)) ** 0.5
    assert line["low"] == pytest.approx(centre - half, rel=1e-5)
    assert line["high"] == pytest.approx(centre + half, rel=1e-5)


def test_p_is_binomial_and_adjusted_for_all_lines_with_a_nominal_rate():
    """By hand from scipy's binomial distribution, and Holm's (1979) rule for two lines."""
    frame = table(("a", 3, 3), ("b", 90, 100), ("c", 10, 100)).to_dataframe().set_index(["instrument", "variant"])
    p = {"b": binom.cdf(90, 100, 0.95), "c": binom.sf(9, 100, 0.05)}
    assert p["b"] == pytest.approx(p["c"]) == pytest.approx(0.0282, abs=1e-4)  # 90 right are 10 wrong
    for variant in ("llama", "all"):
        assert math.isnan(frame.loc[("a", variant), "p"])
        for instrument in "bc":
            assert frame.loc[(instrument, variant), "p"] == pytest.approx(2 * p["b"])
            assert frame.loc[(instrument, variant), "verdict"] == "holds"  # alone it would not
    assert not table(("b", 90, 100)).holds and table(("b", 90, 100), ("c", 10, 100)).holds


@pytest.mark.parametrize("of", [1, 8])
def test_answers_about_one_plant_that_go_together_count_for_less(of):
    """92 of 100 plants right in everything, 8 wrong in everything: as many independent answers as plants."""
    answers = [of] * 92 + [0] * 8
    plants = tuple(Judged(f"0/{i}", "llama", (Answer("b", right, of),), (0.1, 1.0)) for i, right in enumerate(answers))
    line = Calibration(plants, ROWS).to_dataframe().iloc[-1]
    assert (line["n"], line["right"], line["rate"]) == (100 * of, 92 * of, 0.92)
    wilson = binomtest(92, 100).proportion_ci(0.95, method="wilson")
    assert (line["low"], line["high"]) == pytest.approx((wilson.low, wilson.high), rel=5e-3)
    assert line["p"] == pytest.approx(binom.cdf(92, 100, 0.95), rel=0.05)
    assert line["verdict"] == "holds"


def test_misses_name_the_plant_and_say_why():
    missed = table(("a", 1, 2), ("b", 0, 10)).misses()
    assert missed.to_dict("records") == [
        {"plant": "0/0", "variant": "llama", "instrument": "a", "right": 1, "of": 2, "detail": "why"}
    ]
    assert len(table(("a", 2, 2)).misses()) == 0


def test_it_prints_itself():
    text = repr(table(("a", 1, 2), ("c", 0, 10)))
    assert "1 plants" in text
    assert "misses" in text
    assert "holds" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_plants": 0}, r"n_plants = 0.*at least 1"),
        ({"n_plants": 2.5}, r"n_plants = 2\.5.*whole number"),
        ({"n_null": -1}, r"n_null = -1.*at least 0"),
        ({"backend": "jax"}, r"'jax'.*bridge.*hooked"),
        ({"variants": ["llama", "bert"]}, r"'bert'.*olmo2"),
        ({"variants": []}, r"no variants.*llama"),
    ],
)
def test_impossible_calibrations_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        calibrate(**{"n_plants": 1, "verbose": False, **arguments})


def test_calibrate_takes_turns_and_any_executor():
    judges = (judge_detection,)
    options = {
        "n_null": 1,
        "variants": ("llama", "gpt2"),
        "judges": judges,
        "null_judges": (judge_nothing_found,),
    }
    with ThreadPoolExecutor(1) as executor:
        result = calibrate(2, "turns", executor=executor, verbose=False, **options)
    assert [(one.plant, one.variant) for one in result.plants] == [
        ("turns/0", "llama"),
        ("turns/1", "gpt2"),
        ("turns/0/null", "llama"),
    ]
    assert result.holds


# Hundreds of plants.


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("variant", planted.VARIANTS)
def test_every_instrument_on_34_plants(variant):
    result = calibrate(34, "slow", n_null=0, variants=(variant,), verbose=False)
    assert result.misses().empty, result.misses().to_string()
    frame = result.to_dataframe().set_index("instrument")
    lines = [f"interval, {n} prompts{which}" for n in SAMPLE_SIZES for which in ("", ", skewed")]
    assert frame.loc[lines, "verdict"].eq("holds").all(), frame.loc[lines].to_string()


@pytest.mark.long
@pytest.mark.slow
def test_nothing_is_found_in_200_null_plants():
    result = calibrate(1, "slow", n_null=200, judges=(), verbose=False)
    frame = result.to_dataframe()
    frame = frame[frame["variant"] == "all"]
    assert len(frame) == 12  # detection, three tests at three levels, their interval, no errors
    assert frame["verdict"].isin(("holds", "as planted")).all(), frame.to_string()


@pytest.mark.long
@pytest.mark.slow
def test_hooked_transformer_gives_the_same_answers():
    pytest.importorskip("transformer_lens.HookedTransformer")
    result = calibrate(6, "hooked", n_null=2, backend="hooked", verbose=False)
    assert result.misses().empty, result.misses().to_string()
