"""Path effects: what is in the result, shares, files, refusals, and real weights by both execution paths."""

from __future__ import annotations

import functools

import eager
import hand
import numpy as np
import pandas as pd
import pytest
from common import lens, no_forward_pass, prompt
from hypothesis import given
from hypothesis import strategies as st
from test_holds import ALL_PATHS, CHOSEN, POS, N, nested_by_hand, random_lens, random_llama

import sink_circuits as sc
from sink_circuits.errors import InputError, ResultError
from sink_circuits.holds import Hold
from sink_circuits.paths import HOLDS, SCALES_HELD, STEPS, PathEffect, measure_paths, path_effects, ratio_to


def sinks_at(*places: tuple[str, int]) -> sc.Sinks:
    """A table of sinks as `find_sinks` returns it, of random text: what is measured is arithmetic, not whether they are sinks."""
    found = sc.find_sinks(lens(), prompt(), verbose=False)
    tokens = eager.random_tokens(N)
    rows = [
        {**found.table.iloc[0].to_dict(), "prompt": name, "pos": pos, "token_id": int(tokens[pos]), "l_start": 0, "l_end": 2}
        for name, pos in places
    ]  # fmt: skip
    return sc.Sinks(pd.DataFrame(rows), tuple(dict.fromkeys(name for name, _ in places)), found.manifest)


@functools.cache
def two_prompts() -> sc.Tokens:
    tokens = eager.random_tokens(N)
    other = tokens.clone()
    other[1:5] = eager.random_tokens(4, seed=1)
    return sc.Tokens((tokens, other), ("a", "b"))


@functools.cache
def result(path: str = "auto") -> PathEffect:
    sinks = sinks_at(("a", POS), ("a", 12), ("b", POS))
    return path_effects(random_lens("bridge"), two_prompts(), sinks, layers=(0, 2), path=path, verbose=False)


@pytest.mark.parametrize("path", ["fast", "reference"])
def test_the_total_is_what_measure_gives_to_the_bit(path):
    sinks = sinks_at(("a", POS), ("a", 12), ("b", POS))
    total = sc.ablate(random_lens("bridge"), two_prompts(), sinks, layers=(0, 2), path=path, verbose=False)
    for outcome in ("score", "log_odds"):
        np.testing.assert_array_equal(result(path).data[outcome].sel(run="total"), total.data[outcome].sel(edit="zero"))
        np.testing.assert_array_equal(result(path).data[f"clean_{outcome}"], total.data[f"clean_{outcome}"])
    np.testing.assert_array_equal(
        result(path).data["reading"], total.reading().sel(edit="zero").transpose("sink", "layer")
    )


def test_the_result_holds_what_is_by_hand():
    model, tokens = random_llama(), two_prompts()
    for sink, (text, pos) in enumerate(((0, POS), (0, 12), (1, POS))):
        edits = {(0, pos): 0.0, (2, pos): 0.0}
        expected = nested_by_hand(model.state_dict(), model.config, tokens.ids[text], edits, pos)
        clean = hand.forward(model.state_dict(), model.config, tokens.ids[text])
        held = {
            "hold q": [("q", layer, p) for layer in range(1, 4) for p in range(N)],
            "hold k at treated": [("k", layer, pos) for layer in range(1, 4)],
        }
        for run, places in held.items():
            expected[run] = hand.forward(
                model.state_dict(), model.config, tokens.ids[text], edits, clean, places
            ).pattern
        for run, pattern in expected.items():
            found = result().data["score"].sel(sink=sink, run=run).to_numpy()
            assert np.abs(found - hand.sink_scores(pattern)[..., pos].numpy()).max() < 2e-6
            found = result().data["log_odds"].sel(sink=sink, run=run).to_numpy()
            assert np.abs(found - hand.log_odds(pattern)[..., pos].numpy()).max() < 2e-4


def test_steps_losses_and_shares_add_up():
    found = result()
    assert list(found.data["run"].values) == [*ALL_PATHS, "hold k", "hold k at treated", "hold q", "hold v"]
    assert found.paths == tuple(ALL_PATHS)
    assert found.holds == tuple(hold.label for hold in HOLDS)
    for outcome in ("score", "log_odds"):
        effect = found.effect(outcome)
        assert (effect.isel(layer=0) == 0).all(), "the edited layer is read before the edit"
        np.testing.assert_allclose(found.steps(outcome).sum("step"), effect.sel(run="total"), atol=1e-6)
        np.testing.assert_allclose(
            found.lost(outcome).sel(hold="q"), effect.sel(run="total") - effect.sel(run="hold q"), atol=0
        )
    summary = found.summary().set_index(["outcome", "kind", "part"])
    for outcome in ("score", "log_odds"):
        rows = summary.loc[outcome]
        total = rows.loc[("path", "total")]
        assert total["share"] == pytest.approx(1) and total["share_low"] == pytest.approx(1)
        assert rows.loc["step"]["effect"].sum() == pytest.approx(total["effect"], rel=1e-4)
        assert rows.loc["step"]["share"].sum() == pytest.approx(1, rel=1e-4)
        assert list(rows.loc["step"].index) == list(STEPS)
        assert (rows["n_prompts"] == 2).all() and (rows["n_sinks"] == 3).all()
        own = found.over_lifetime(outcome).sel(run="residual").to_numpy()
        assert rows.loc[("path", "residual"), "effect"] == pytest.approx((own[:2].mean() + own[2]) / 2, rel=1e-5)
        np.testing.assert_allclose(rows["share"], rows["effect"] / total["effect"], rtol=1e-5)
    frame = found.to_dataframe()
    assert len(frame) == 2 * 3 * 10 * 4 * 4
    np.testing.assert_allclose(frame["effect"], frame["edited"] - frame["clean"], atol=1e-6)
    assert (frame.loc[frame["run"] == "total", "left_over"] == 0).all()
    held = summary.reset_index().query("norm_scales == 'held'")
    assert held["part"].tolist() == [*SCALES_HELD] * 2 and set(held["kind"]) == {"path"}
    assert "norm scales recomputed, and held where" in repr(found)
    assert found.manifest.settings["norm_scales"] == found.norm_scales
    pd.testing.assert_frame_equal(found.summary("score"), found.summary().query("outcome == 'score'"))
    for what, values in (("steps", found.steps("score")), ("lost", found.lost("score"))):
        expected = values.mean("head").where(found.data["reading"]).mean("layer")
        np.testing.assert_array_equal(found.over_lifetime("score", what), expected)
    clean = found.over_lifetime("score", "edited") - found.over_lifetime("score")
    np.testing.assert_allclose(clean, found.over_lifetime("score", "clean"), atol=1e-6)
    with pytest.raises(InputError, match="'half' is unknown"):
        found.over_lifetime(what="half")


@pytest.mark.parametrize("path", ["fast", "reference"])
def test_no_change_has_no_effect_by_any_path(path):
    def clone(c):
        return c.clone()

    sinks = sinks_at(("a", POS), ("b", POS))
    for intervention in (clone, lambda c: 1.0 * c):
        found = path_effects(
            random_lens("bridge"),
            two_prompts(),
            sinks,
            layers=(0, 2),
            intervention=intervention,
            path=path,
            verbose=False,
        )
        for outcome in ("score", "log_odds"):
            assert (found.effect(outcome) == 0).all()
        assert found.summary()["share"].isna().all(), "there is no total to take a share of"


def test_batches_and_the_users_cache_do_not_change_the_result():
    sinks = sinks_at(("a", POS))
    tokens = two_prompts().ids[0]
    sinks = sc.Sinks(sinks.table.assign(prompt="prompt-0"), ("prompt-0",), sinks.manifest)
    model = random_lens("bridge")
    options = {"layers": (0, 2), "verbose": False}
    one = path_effects(model, tokens, sinks, batch_size=1, **options)
    for outcome in ("score", "log_odds"):
        np.testing.assert_allclose(one.data[outcome], result().data[outcome].sel(sink=[0]), atol=1e-5)
    _, cache = model.run_with_cache(tokens[None], names_filter=sc.names_filter(model))
    cached = path_effects(model, tokens, sinks, clean_cache=cache, **options)
    for outcome in ("score", "log_odds"):
        np.testing.assert_allclose(cached.data[outcome], one.data[outcome], atol=1e-5)


def test_a_result_comes_back_from_its_file(tmp_path):
    result().save(tmp_path / "paths.safetensors")
    back = PathEffect.load(tmp_path / "paths.safetensors")
    assert back.data.equals(result().data)
    assert back.table.equals(result().table)
    assert (back.manifest, back.norm_scales) == (result().manifest, result().norm_scales)
    pd.testing.assert_frame_equal(back.summary(), result().summary())
    effect = sc.ablate(random_lens("bridge"), two_prompts(), sinks_at(("a", POS)), layer=0, verbose=False)
    effect.save(tmp_path / "effect.safetensors")
    with pytest.raises(ResultError, match="not a result with paths"):
        PathEffect.load(tmp_path / "effect.safetensors")


def test_each_sink_has_its_own_forming_layer_and_edits():
    sinks = sinks_at(("a", POS), ("b", POS))
    model, forming = random_lens("bridge"), pd.Series([0, 2])
    found = path_effects(model, two_prompts(), sinks, layer="forming", forming=forming, holds=(), verbose=False)
    assert found.data["first_layer"].values.tolist() == [0, 2]
    assert found.lost().sizes["hold"] == 0
    own = measure_paths(
        model, two_prompts(), sinks, lambda row: [sc.zero([0, 2][row.name], int(row.pos))], holds=(), verbose=False
    )
    assert own.data.equals(found.data)


# ------------------------------------------------------------------------------------------------------ refusals
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Hold("pattern"), "'pattern' cannot be held: use one of q, k, v"),
        (lambda: Hold("k", layers=()), r"a hold of layers \(\): name each once"),
        (lambda: Hold("k", layers=(2, 2)), r"a hold of layers \(2, 2\): name each once"),
        (lambda: Hold("k", layers=(-1,)), "counted from 0"),
        (lambda: Hold("k", positions="all"), "positions 'all' are unknown: use 'treated', 'others'"),
        (lambda: Hold("k", positions=()), "name at least one"),
        (lambda: Hold("k", layers=(1.5,)), "layer 1.5 is not a whole number"),
    ],
)
def test_holds_that_say_nothing_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_labels_say_what_is_held():
    assert Hold("k").label == "k"
    assert Hold("k", positions="treated").label == "k at treated"
    assert Hold("q", layers=range(6, 10)).label == "q in layers 6-9"
    assert Hold("v", layers=(3, 5), positions=(40,)).label == "v in layers 3,5 at 40"
    assert Hold("v", layers=3).label == "v in layers 3"


@pytest.mark.parametrize("path", ["fast", "reference"])
@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([sc.zero(1, POS), Hold("k", layers=(0, 1))], "'k in layers 0-1' reaches nothing: up to layer 1, the first edited"),
        ([sc.zero(1, POS), Hold("q", positions=(3, 4))], "'q at 3,4' reaches nothing: before position 7, the first edited"),
        ([sc.zero(3, POS), Hold("v")], "'v' reaches nothing: up to layer 3"),
        ([Hold("v")], "in a run without edits, which is clean"),
        ([sc.zero(1, POS), Hold("k", layers=(4,))], r"layer 4 is out of range: the model has layers 0\.\.3"),
        ([sc.zero(1, POS), Hold("k", positions=(N,))], r"position 40 is out of range: the text has positions 0\.\.39"),
    ],
)  # fmt: skip
def test_holds_that_reach_nothing_are_refused_before_any_run(row, message, path):
    clean = sc.run_clean(random_lens("bridge"), eager.random_tokens(N), chosen=CHOSEN)
    with no_forward_pass(), pytest.raises(InputError, match=message):
        sc.run_edited(random_lens("bridge"), clean, [row], path=path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": 1, "holds": (Hold("k", layers=(0, 1)),)}, "at position 7 of prompt 'a': the hold of 'k in layers 0-1' reaches nothing"),
        ({"layer": 3}, "reaches nothing: up to layer 3"),
        ({"layer": 1, "holds": ("k",)}, "'k' is not a Hold"),
        ({"layer": 1, "holds": (Hold("k"), Hold("k"))}, "name each once"),
        ({"layer": 1, "intervention": "erase"}, "intervention 'erase' is unknown"),
        ({"layer": 1, "together": True}, "option 'together' is unknown here: there are min_queries"),
        ({"layer": 1, "batch_size": 0}, "batch_size = 0"),
        ({"layer": 1, "norm_scales": "held"}, "norm_scales 'held' is unknown: use 'auto', 'both' or 'recomputed'"),
        ({"layer": 9}, "layer 9 is out of range"),
        ({}, "give either layer="),
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_refused_before_any_run(options, message):
    sinks, model = sinks_at(("a", POS)), random_lens("bridge")
    sc.adapt(model)
    with no_forward_pass(), pytest.raises(InputError, match=message):
        path_effects(model, two_prompts(), sinks, verbose=False, **options)


def test_an_unknown_outcome_is_refused():
    with pytest.raises(InputError, match="outcome 'loss' was not measured: there are score, log_odds"):
        result().effect("loss")


# ------------------------------------------------------------------------------------------------------ shares
@given(
    st.lists(st.tuples(st.integers(0, 3), st.floats(0.5, 2), st.floats(-1, 1)), min_size=1, max_size=8),
    st.floats(-2, 2),
)
def test_a_share_is_the_ratio_of_the_means_over_prompts(sinks, factor):
    prompts, whole, part = (np.array(column) for column in zip(*sinks, strict=True))
    by_prompt = [(whole[prompts == p].mean(), part[prompts == p].mean()) for p in dict.fromkeys(prompts.tolist())]
    wholes, parts = np.array(by_prompt).T
    found = ratio_to(whole, part, prompts, name="test")
    assert found.mean == pytest.approx(parts.mean() / wholes.mean(), abs=1e-9)
    assert found.n == len(by_prompt)
    if len(by_prompt) > 1:
        assert found.low <= found.mean + 1e-9 and found.mean <= found.high + 1e-9
    exact = ratio_to(whole, factor * whole, prompts, name="test")  # a constant share is known exactly
    assert exact.mean == pytest.approx(factor, abs=1e-9)
    if len(by_prompt) > 1:
        assert (exact.low, exact.high) == (pytest.approx(factor, abs=1e-9), pytest.approx(factor, abs=1e-9))


def test_shares_of_nothing_are_undefined():
    assert np.isnan(ratio_to(np.zeros(3), np.ones(3), [0, 1, 2], name="test").mean)
    assert np.isnan(ratio_to(np.full(3, np.nan), np.ones(3), [0, 1, 2], name="test").mean)
    found = ratio_to(np.array([1.0, np.nan, 3.0]), np.array([1.0, 5.0, np.nan]), [0, 1, 2], name="test")
    assert (found.mean, found.n) == (1.0, 1)


# ------------------------------------------------------------------------------------------------- trained weights
@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2-135m", "gemma-3-270m"])
def test_real_weights_give_the_same_by_both_execution_paths(name):
    from common import real

    model, _, tokens = real(name)
    found = sc.find_sinks(model, tokens, verbose=False)
    table = found.table[(found.table["kind"] != "primary") & (found.table["pos"] < 200)].head(2)
    sinks = sc.Sinks(table.reset_index(drop=True), found.prompts, found.manifest)
    layer = int(table["l_start"].min())
    fast, reference = (
        path_effects(model, tokens, sinks, layer=layer, path=path, verbose=False) for path in ("fast", "reference")
    )
    np.testing.assert_allclose(fast.data["score"], reference.data["score"], atol=1e-4)
    np.testing.assert_allclose(fast.data["log_odds"], reference.data["log_odds"], atol=2e-3)
