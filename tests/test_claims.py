"""Claims: a planted circuit supports what was planted, a random model nothing, and the rule keeps its error."""

from __future__ import annotations

import functools

import numpy as np
import pandas as pd
import pytest
from common import lens, subject

import sink_circuits as sc
from sink_circuits import claims
from sink_circuits.claims import HYPOTHESES, Claims, judge, levels_test, strongest, verdicts_of
from sink_circuits.controls import randomly_initialised
from sink_circuits.errors import InputError, ResultError

N_PROMPTS = 14
NO_LEVELS = {"estimate": np.nan, "p": np.nan, "p_against": np.nan, "n_prompts": 0, "n_sinks": 0}
MEASURED = [h for h in HYPOTHESES if h.name != "levels recur"]


@functools.cache
def texts() -> sc.Tokens:
    rng = np.random.default_rng(7)
    plant = subject("stand_in")
    ids = [
        plant.tokens(64, sinks=[int(rng.integers(20, 40))], decoys=[44], seed_name=f"claims {i}")
        for i in range(N_PROMPTS)
    ]
    return sc.Tokens(tuple(ids), tuple(f"p{i}" for i in range(N_PROMPTS)))


@functools.cache
def on_the_plant() -> Claims:
    return claims.test_claims(lens("bridge", "stand_in"), texts(), n_random=2, verbose=False)


def test_a_planted_sink_supports_the_claims_that_were_planted():
    result = on_the_plant()
    assert result.forming_layer == 6
    assert result.forming_set == (6,)
    verdicts = result.verdicts.set_index("claim")["verdict"]
    assert verdicts[["1", "2", "3", "4"]].tolist() == ["supported"] * 4
    assert verdicts["5"] == "not decided"  # one level only: nothing to permute
    assert verdicts["5b"] == "not decided"
    split = result.manifest.settings
    assert (split["layer_from"], split["forming_layer"], split["forming_set"]) == ("discovered", 6, [6])
    assert split["discovery"] and not set(split["discovery"]) & set(split["confirmation"])
    assert set(result.sinks["prompt"]) <= set(split["confirmation"])


def test_a_joint_control_edits_as_many_tokens_as_there_are_sinks():
    """Two sinks of p1 share their neighbour, one of p2 has none: only p0 can be compared."""
    table = pd.DataFrame({"prompt": ["p0", "p0", "p1", "p1", "p2", "p2"], "pos": [9, 20, 9, 11, 9, 30]})
    nearby = pd.DataFrame({"sink": range(6), "control": "same range", "pos": [10, 21, 10, 10, 10, -1]})
    matches = pd.concat([nearby.assign(control="same token", pos=5), nearby], ignore_index=True)
    of, at = claims._as_many_ordinary(sc.Sinks(table, texts().names, None), matches, texts())
    assert of == [0, 1]
    assert at.table[["prompt", "pos"]].values.tolist() == [["p0", 10], ["p0", 21]]
    assert at.table["token_id"].tolist() == [int(texts().ids[0][10]), int(texts().ids[0][21])]


def test_the_controls_stand_beside_the_verdicts():
    """What the hypotheses subtract is what the table shows, and "necessary" is the difference to the same range."""
    result = on_the_plant()
    controls, table = result.controls.set_index("control"), result.table.set_index("hypothesis")
    for hypothesis, control in (
        ("necessary", "same range"), ("specific layer", "wrong layer"), ("more than a disturbance", "random perturbation"),
    ):  # fmt: skip
        assert table.loc[hypothesis, "estimate"] == pytest.approx(controls.loc[control, "difference"], abs=1e-6)
    assert {"norm matched", "attention output", "same token"} <= set(controls.index)
    assert "Zeroing MLP 6 beside its controls" in repr(result)


def test_a_declared_layer_is_put_to_the_test_on_all_prompts():
    declared = claims.test_claims(lens("bridge", "stand_in"), texts()[:9], layer=9, n_random=1, verbose=False)
    assert (declared.forming_layer, declared.forming_set) == (9, (9,))
    settings = declared.manifest.settings
    assert (settings["layer_from"], settings["forming_set"], settings["discovery"]) == ("declared", [9], [])
    assert settings["confirmation"] == list(texts().names[:9])
    verdicts = declared.verdicts.set_index("claim")["verdict"]
    assert verdicts["1"] == "contradicted"  # MLP 9 was not planted
    assert "declared" in repr(declared)


def test_a_declared_set_names_its_layer():
    model = lens("bridge", "stand_in")
    for options, said in (
        ({"layers": (6, 7)}, "without its forming layer: give layer= too"),
        ({"layer": 6, "layers": (7,)}, "the forming layer 6 too"),
        ({"layer": 6, "layers": (6, 6)}, "names each layer once"),
        ({"layer": 24}, "layer 24 is out of range"),
    ):
        with pytest.raises(InputError, match=said):
            claims.test_claims(model, texts(), verbose=False, **options)


def test_a_sink_without_an_ordinary_token_near_it_is_compared_with_none(monkeypatch, tmp_path):
    monkeypatch.setattr("sink_circuits.matching.REACH", 0)
    layer = np.int64(6)
    result = claims.test_claims(
        lens("bridge", "stand_in"), texts()[:2], layer=layer, layers=[layer], n_random=1, verbose=False
    )
    result.save(tmp_path / "claims.safetensors")
    assert Claims.load(tmp_path / "claims.safetensors").forming_set == (6,)
    table = result.table
    counts = table.set_index("hypothesis")["n_sinks"]
    assert counts[["necessary", "norm alone", "norm more than direction", "recovers"]].tolist() == [0] * 4
    assert counts["dose"] == 2


@pytest.mark.slow
def test_a_random_model_at_the_same_positions_supports_nothing():
    model = lens("bridge", "stand_in")
    sinks = sc.find_sinks(model, texts(), verbose=False)
    result = claims.test_claims(randomly_initialised(model), texts(), sinks, n_random=2, verbose=False)
    assert "supported" not in result.verdicts["verdict"].tolist()
    assert np.isnan(result.table.set_index("hypothesis").loc["levels recur", "p"])  # the sinks are another model's


@pytest.mark.long
@pytest.mark.slow
def test_a_randomly_initialised_real_model_at_the_trained_models_sinks_supports_nothing():
    """SmolLM2's shape with drawn weights, treated where the trained model has its sinks; twelve prompts could decide."""
    model = sc.load_model("smollm2-135m", verbose=False)
    tokens = sc.load_prompts("all")[24:38].tokens(model, max_tokens=72)
    sinks = sc.find_sinks(model, tokens, verbose=False)
    result = claims.test_claims(
        randomly_initialised(model), tokens, sinks, layer=2, n_random=1, per_prompt=1, verbose=False
    )
    assert result.table.set_index("hypothesis").loc["necessary", "n_prompts"] >= 9  # 2^-9 * 14 < 0.05
    assert "supported" not in result.verdicts["verdict"].tolist()
    necessary = result.table.set_index("hypothesis").loc["necessary"]
    assert abs(necessary["estimate"]) < 0.5  # the trained model's is beyond -4


def test_saved_and_loaded(tmp_path):
    result = on_the_plant()
    result.save(tmp_path / "claims.safetensors")
    loaded = Claims.load(tmp_path / "claims.safetensors")
    pd.testing.assert_frame_equal(loaded.table, result.table)
    pd.testing.assert_frame_equal(loaded.verdicts, result.verdicts)
    assert "Forming layer 6" in repr(loaded)
    with pytest.raises(ResultError, match="cannot be read"):
        Claims.load(tmp_path / "nothing.safetensors")


def predicted(strength: float, n: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    sign = {"greater": 1, "less": -1}
    return {h.name: sign[h.alternative] * strength + rng.normal(0, 0.3, n) for h in MEASURED}


def test_the_rule():
    prompts = range(12)
    everything = judge(predicted(3, 12), prompts, NO_LEVELS)
    assert (everything.loc[everything["claim"] < 5, "holds"] == "yes").all()
    opposite = judge(predicted(-3, 12), prompts, NO_LEVELS)
    assert (opposite.loc[opposite["claim"] < 5, "holds"] == "no").all()
    assert verdicts_of(opposite)["verdict"].tolist() == ["contradicted"] * 4 + ["not decided"] * 2
    nothing = judge(predicted(0, 40), range(40), NO_LEVELS).set_index("hypothesis")
    assert nothing.loc["necessary", "holds"] == "no"  # shown to be within the margin
    assert nothing.loc["dose", "holds"] == "open"  # a correlation has no margin
    small = predicted(0.02, 12)
    small["recovers"] = np.linspace(0.015, 0.025, 12)
    tiny = judge(small, range(12), NO_LEVELS)
    assert tiny.set_index("hypothesis").loc["recovers", "holds"] == "small"
    assert "within the margin: recovers" in verdicts_of(tiny).set_index("claim").loc["4", "reason"]
    few = verdicts_of(judge(predicted(3, 5), range(5), NO_LEVELS))
    assert set(few["verdict"]) == {"not decided"}  # five prompts can decide nothing among so many hypotheses


def test_one_open_hypothesis_leaves_a_claim_open_and_one_failed_contradicts_it():
    values = predicted(3, 12)
    values["specific layer"] = np.full(12, np.nan)
    verdict = verdicts_of(judge(values, range(12), NO_LEVELS)).set_index("claim")
    assert verdict.loc["1", "verdict"] == "not decided"
    assert "specific layer" in verdict.loc["1", "reason"]
    values["sufficient"] = -values["sufficient"]
    assert verdicts_of(judge(values, range(12), NO_LEVELS)).set_index("claim").loc["1", "verdict"] == "contradicted"
    values = predicted(3, 12)
    values["more than a disturbance"] *= -1  # does not decide
    assert verdicts_of(judge(values, range(12), NO_LEVELS)).set_index("claim").loc["1", "verdict"] == "supported"


def test_by_chance_a_hypothesis_holds_in_at_most_one_run_of_twenty():
    """Family-wise: no effect anywhere, 60 runs, binomial upper limit at 5 %."""
    wrong = 0
    for seed in range(60):
        table = judge(predicted(0, 10, seed), range(10), NO_LEVELS)
        wrong += (table["p_holm"] <= claims.ALPHA).any()
    assert wrong <= 8  # P(more than 8 of 60 at 5 %) < 1 %


def levels(start, lifetime, prompts=None) -> pd.DataFrame:
    return pd.DataFrame(
        {"prompt": list(range(len(start))) if prompts is None else prompts, "l_start": start, "lifetime": lifetime}
    )


def test_levels_that_recur_are_told_from_shuffled_ones():
    recurring = levels_test(levels([2, 6] * 6, [5, 9] * 6))
    assert recurring["p"] < 0.01
    same = [2, 6] * 6
    shuffled = levels_test(levels(same, [5, 5, 9, 9] * 3))  # every start has both lifetimes as often
    assert shuffled["p"] > 0.2
    assert levels_test(levels([2] * 8, [5] * 8))["p"] == 1  # one level: nothing to permute
    assert np.isnan(levels_test(levels([2, 2], [5, 5], ["a", "a"]))["p"])
    within = levels_test(levels([2, 2, 6], [5, 5, 9], ["a", "a", "b"]))
    assert within["estimate"] == pytest.approx(0, abs=1)  # pairs of one prompt do not count


def test_the_strongest_sinks_of_each_prompt():
    sinks = sc.find_sinks(lens("bridge", "stand_in"), texts(), verbose=False)
    doubled = sinks.table.assign(norm_ratio=range(len(sinks)))
    found = sc.Sinks(
        pd.concat([doubled, doubled.assign(norm_ratio=-1.0)], ignore_index=True), sinks.prompts, sinks.manifest
    )
    chosen = strongest(found, ("secondary",), 1).table
    assert chosen.groupby("prompt").size().max() == 1
    assert (chosen["norm_ratio"] >= 0).all()


@pytest.mark.parametrize(
    ("options", "said"),
    [({"per_prompt": 0}, "per_prompt = 0"), ({"n_random": 0}, "n_random = 0"), ({"kinds": ("primary-like",)}, "0 of 14 prompts")],
)  # fmt: skip
def test_bad_input_is_told_in_a_sentence(options, said):
    with pytest.raises(InputError, match=said):
        claims.test_claims(lens("bridge", "stand_in"), texts(), verbose=False, **options)
