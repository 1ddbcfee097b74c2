"""Controls: who stands in for a sink, by counting; what the same edit does there, by a forward pass by hand."""

from __future__ import annotations

import functools

import hand
import numpy as np
import pandas as pd
import pytest
import torch
from common import BACKENDS, SINK, by_hand, lens, prompt

import sink_circuits as sc
from sink_circuits import controls, planted
from sink_circuits.controlled import Controlled
from sink_circuits.controls import randomly_initialised, with_controls
from sink_circuits.errors import InputError, ResultError
from sink_circuits.interventions import rescale, zero
from sink_circuits.matching import match_positions

TEXTS = (prompt(), prompt((30, 55), 96, "b"))
NAMES = ("0", "1")
DRAWS = 3


@functools.cache
def found() -> sc.Sinks:
    return sc.find_sinks(lens(), sc.Tokens(TEXTS, NAMES), verbose=False)


@functools.cache
def treated() -> sc.Sinks:
    return found().select("secondary")


@functools.cache
def controlled(n_random: int = DRAWS) -> Controlled:
    options = {
        "intervention": {
            "zero": lambda layer, sink: zero(layer, sink.pos),
            "double": lambda layer, sink: rescale(layer, sink.pos, 2),
        }
    }
    return with_controls(
        lens(), sc.Tokens(TEXTS, NAMES), treated(), layers=[6, 7], found=found(), n_random=n_random, verbose=False, **options
    )  # fmt: skip


def over_life(run: hand.Run, clean: hand.Run, pos: int, first: int, row) -> float:
    """Mean over heads and the layers that read the sink above the first edited layer."""
    layers = range(max(first, row.l_start) + 1, row.l_end + 2)
    change = hand.log_odds(run.pattern)[..., pos] - hand.log_odds(clean.pattern)[..., pos]
    return change[list(layers)].mean().item()


def test_effects_and_position_controls_are_those_of_a_hand_written_pass():
    result = controlled()
    matches = result.matches[result.matches["control"] == "same range"].set_index("sink")["pos"]
    for index, row in result.table.iterrows():
        text, clean = TEXTS[int(row.prompt)], by_hand(TEXTS[int(row.prompt)])
        for edit, factor in (("zero", 0.0), ("double", 2.0)):
            for pos, value in (
                (row.pos, result.data["effect_log_odds"].sel(sink=index, edit=edit)),
                (int(matches[index]), result.data["control_log_odds"].sel(sink=index, edit=edit, control="same range")),
            ):
                edits = {(6, int(pos)): factor, (7, int(pos)): factor}
                assert float(value) == pytest.approx(over_life(by_hand(text, edits), clean, int(pos), 6, row), abs=2e-3)


def test_attention_taken_away_in_the_place_of_the_mlp():
    result = controlled()
    for index, row in result.table.iterrows():
        clean = by_hand(TEXTS[int(row.prompt)])
        edits = {
            (layer, int(row.pos)): (lambda c, w=clean.parts["attn_out", layer][row.pos]: c - w) for layer in (6, 7)
        }  # of layer 7 the clean write, as documented
        expected = over_life(by_hand(TEXTS[int(row.prompt)], edits), clean, int(row.pos), 6, row)
        value = result.data["control_log_odds"].sel(sink=index, edit="zero", control="attention output")
        assert float(value) == pytest.approx(expected, abs=2e-3)


def test_wrong_layers_are_as_many_and_never_the_edited_ones():
    result = controlled()
    wrong = result.matches[result.matches["control"] == "wrong layer"]
    assert len(wrong) == len(result.table)
    for index, layers in zip(wrong["sink"], wrong["layers"], strict=True):
        chosen = [int(x) for x in layers.strip("[]").split(",")]
        assert len(set(chosen)) == 2
        assert not {6, 7} & set(chosen)
        row = result.table.loc[index]
        assert max(chosen) <= row.l_end
        edits = {(layer, int(row.pos)): 0.0 for layer in chosen}
        text = TEXTS[int(row.prompt)]
        expected = over_life(by_hand(text, edits), by_hand(text), int(row.pos), min(chosen), row)
        value = result.data["control_log_odds"].sel(sink=index, edit="zero", control="wrong layer")
        assert float(value) == pytest.approx(expected, abs=2e-3)


def test_layers_that_form_the_sinks_are_no_wrong_layers():
    tokens = sc.Tokens(TEXTS, NAMES)
    options = {"found": found(), "controls": ("wrong layer",), "n_random": 0, "verbose": False}
    last = int(treated().table["l_end"].max())
    spared = with_controls(
        lens(), tokens, treated(), layer=6, also_forming=[x for x in range(last + 1) if x != 3], **options
    )
    assert spared.matches.query("control == 'wrong layer'")["layers"].tolist() == ["[3]"] * len(treated())
    assert set(spared.compare()["control"]) == {"wrong layer", "random perturbation"}
    few = with_controls(lens(), tokens, treated(), layer=6, also_forming=range(last + 1), **options)
    assert few.matches.query("control == 'wrong layer'")["reason"].tolist() == [
        "0 layers up to l_end form no sink, 1 are needed"
    ] * len(treated())
    assert np.isnan(few.data["control_log_odds"]).all()
    # Each sink has its own forming layer: none of them is a wrong layer for another sink of the same prompt.
    table = treated().table
    forming = pd.Series(np.arange(len(table)))
    own = with_controls(lens(), tokens, treated(), layer="forming", forming=forming, **options)
    for index, layers in own.matches.query("control == 'wrong layer'").set_index("sink")["layers"].items():
        assert int(layers.strip("[]")) not in forming[table["prompt"] == table.loc[index, "prompt"]].tolist()


def test_the_last_layer_is_no_wrong_layer():
    """Nothing reads what its MLP writes: there would be no effect to compare with, and no reason given."""
    last = sc.adapt(lens()).n_layers - 1
    table = treated().table.iloc[:1].assign(l_end=last).reset_index(drop=True)
    sinks = sc.Sinks(table, treated().prompts, treated().manifest)
    options = {"found": found(), "controls": ("wrong layer",), "n_random": 0, "verbose": False}
    none = with_controls(lens(), sc.Tokens(TEXTS, NAMES), sinks, layer=6, also_forming=range(last), **options)
    assert none.matches.query("control == 'wrong layer'")["layers"].tolist() == ["[]"]
    assert "0 layers up to l_end" in none.by_sink()["unmatched"].item() + none.matches["reason"].iloc[0]


def test_one_intervention_may_be_named_or_a_function():
    tokens, options = sc.Tokens(TEXTS, NAMES), {"found": found(), "controls": (), "n_random": 0, "verbose": False}

    def halved(contribution):
        return contribution * 0.5

    for intervention, name in ((halved, "halved"), ("mean", "mean")):
        own = with_controls(lens(), tokens, treated(), layer=6, intervention=intervention, **options)
        alone = sc.ablate(lens(), tokens, treated(), layer=6, intervention=intervention, verbose=False)
        assert own.data["edit"].values.tolist() == [name]
        np.testing.assert_array_equal(own.data["effect_log_odds"], alone.over_lifetime("log_odds"))


def test_a_mean_holds_none_of_the_sinks_that_are_known():
    """Those that are not treated too: what an experiment calls ordinary does not depend on what else is treated."""
    tokens = sc.Tokens(TEXTS, NAMES)
    ordinary = [[p for p in range(4, 96) if p not in sinks] for sinks in ((SINK,), (30, 55))]
    runs = [by_hand(text) for text in TEXTS]
    donor = torch.cat([run.contributions[6, keep] for run, keep in zip(runs, ordinary, strict=True)]).mean(0)
    edited = by_hand(TEXTS[1], {(6, 30): lambda c: donor.to(c)})
    expected = over_life(edited, runs[1], 30, 6, treated().table.iloc[1])
    one = sc.Sinks(treated().table.iloc[[1]].reset_index(drop=True), treated().prompts, treated().manifest)
    for effect in (
        sc.ablate(lens(), tokens, one, layer=6, intervention="mean", verbose=False),
        sc.ablate(lens(), tokens, one, layer=6, intervention="mean", found=found(), verbose=False),
        sc.layer_map(lens(), tokens, one, layers=[6], intervention="mean", verbose=False),
        with_controls(lens(), tokens, one, layer=6, intervention="mean", controls=(), n_random=0, verbose=False).effect,
        sc.path_effects(
            lens(), tokens, one, layer=6, intervention="mean", holds=(), norm_scales="recomputed", verbose=False
        ),
    ):
        found_ = effect.over_lifetime("log_odds")
        value = found_.sel(run="total") if "run" in found_.dims else found_.isel(edit=0)
        assert value.item() == pytest.approx(expected, abs=1e-4)
    account = sc.mass_account(lens(), tokens, one, layer=6, intervention="mean", verbose=False)
    change = account.over_lifetime().sel(group="treated").item()
    scores = [hand.sink_scores(run.pattern)[7 : one.table["l_end"][0] + 2, :, 30].mean() for run in (edited, runs[1])]
    assert change == pytest.approx((scores[0] - scores[1]).item(), abs=1e-5)
    with pytest.raises(InputError, match="found was given and would not be used"):
        sc.ablate(lens(), tokens, one, layer=6, found=found(), verbose=False)


def test_doses_have_their_controls_in_the_same_table():
    """A dose-response beside its controls; in attention's place what attention wrote is rescaled, once is no change."""
    options = {"found": found(), "n_random": 2, "verbose": False}
    tokens, factors = sc.Tokens(TEXTS, NAMES), [0, 0.5, 1]
    result = with_controls(lens(), tokens, treated(), layers=[6, 7], intervention="rescale", factors=factors, **options)
    alone = sc.dose_response(lens(), tokens, treated(), layers=[6, 7], factors=factors, verbose=False)
    assert result.data["edit"].values.tolist() == factors
    np.testing.assert_array_equal(result.data["effect_log_odds"], alone.over_lifetime("log_odds"))
    assert (result.data["control_log_odds"].sel(edit=1).fillna(0) == 0).all()
    assert (result.data["random_log_odds"].sel(edit=1) == 0).all()
    np.testing.assert_array_equal(
        result.data["control_log_odds"].sel(edit=0), controlled().data["control_log_odds"].sel(edit="zero")
    )
    text, clean = TEXTS[0], by_hand(TEXTS[0])
    before = {6: clean.residuals[5, SINK], 7: clean.residuals[6, SINK]}
    attention = {at: clean.residuals[at, SINK] - clean.contributions[at, SINK] - before[at] for at in (6, 7)}
    halved = by_hand(text, {(at, SINK): lambda c, at=at: c - 0.5 * attention[at].to(c) for at in (6, 7)})
    expected = over_life(halved, clean, SINK, 6, treated().table.iloc[0])
    value = result.data["control_log_odds"].sel(sink=0, edit=0.5, control="attention output")
    assert float(value) == pytest.approx(expected, abs=1e-4)

    def scaled(contribution, dose):
        return contribution * dose

    own = with_controls(lens(), tokens, treated(), layers=[6, 7], intervention=scaled, factors=[0.5], **options)
    np.testing.assert_array_equal(own.data["effect_score"].sel(edit=0.5), result.data["effect_score"].sel(edit=0.5))


def test_sinks_and_forming_layers_are_found_where_none_are_given():
    tokens, options = sc.Tokens(TEXTS[:1], NAMES[:1]), {"controls": ("wrong layer",), "n_random": 0, "verbose": False}
    result = with_controls(lens(), tokens, layer="forming", **options)
    mapped = sc.layer_map(lens(), tokens, sc.find_sinks(lens(), tokens, verbose=False), verbose=False)
    again = with_controls(
        lens(), tokens, layer="forming", forming=mapped.forming(), sinks=result_sinks(result), **options
    )
    pd.testing.assert_frame_equal(result.matches, again.matches)
    np.testing.assert_array_equal(result.data["effect_log_odds"], again.data["effect_log_odds"])


def result_sinks(result: Controlled) -> sc.Sinks:
    return sc.Sinks(result.table, ("0",), found().manifest)


def test_a_random_model_is_made_where_it_is_asked_for():
    tokens, options = sc.Tokens(TEXTS, NAMES), {"found": found(), "controls": (), "n_random": 0, "verbose": False}
    made = with_controls(lens(), tokens, treated(), layer=6, random_model=True, **options)
    given = with_controls(lens(), tokens, treated(), layer=6, random_model=randomly_initialised(lens()), **options)
    np.testing.assert_array_equal(made.data["control_score"], given.data["control_score"])
    assert made.compare()["control"].tolist() == ["random model", "random perturbation"]


def test_one_sink_of_several_with_forming_layers_of_their_own_again_alone():
    """What the others' forming layers keep out of the wrong layers, `also_forming` keeps out when they are not there."""
    tokens, options = (
        sc.Tokens(TEXTS, NAMES),
        {"found": found(), "controls": ("wrong layer",), "n_random": 0, "verbose": False},
    )
    forming = pd.Series([6, 7, 6])
    all_ = with_controls(lens(), tokens, treated(), layer="forming", forming=forming, **options)
    one = sc.Sinks(treated().table.iloc[[1]].reset_index(drop=True), treated().prompts, treated().manifest)
    alone = with_controls(
        lens(), tokens, one, layer="forming", forming=forming[[1]], also_forming=[6], batch_size=1, **options
    )
    assert (
        alone.matches["layers"].iloc[0] == all_.matches.query("sink == 1 and control == 'wrong layer'")["layers"].item()
    )


def test_a_random_perturbation_is_as_large_as_the_edit_and_repeats_by_name():
    result, again = controlled(), controlled.__wrapped__(1)
    assert np.array_equal(result.data["random_log_odds"].sel(draw=[0]), again.data["random_log_odds"])
    drawn = result.data["random_log_odds"].sel(edit="zero").to_numpy()
    assert len(np.unique(drawn)) == drawn.size
    edit = sc.interventions.random_perturbation(zero(6, [SINK, 50]), "text", 0)
    contribution = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    moved = edit.apply(contribution) - contribution
    assert torch.allclose(moved.norm(dim=-1), contribution.norm(dim=-1), rtol=1e-5)
    assert torch.cosine_similarity(moved, -contribution, dim=-1).abs().max() < 0.6
    assert sc.interventions.random_perturbation(rescale(6, SINK, 1.0), "text").changes_nothing


def test_any_sink_run_again_alone_gives_the_same_numbers():
    """Controls, wrong layers and random draws are drawn from names: bytes equal at one batch size, to 1e-6 at any."""
    tokens, one = sc.Tokens(TEXTS, NAMES), treated()

    def run(sinks: sc.Sinks, **options) -> Controlled:
        return with_controls(lens(), tokens, sinks, layers=[6, 7], found=found(), n_random=1, verbose=False, **options)

    together, in_batches = run(one, batch_size=1), run(one)
    for index in (2,):
        row = sc.Sinks(one.table.iloc[[index]].reset_index(drop=True), one.prompts, one.manifest)
        alone = run(row, batch_size=1)
        for name in alone.data.data_vars:
            np.testing.assert_array_equal(alone.data[name][0], together.data[name][index])
        columns = ["control", "pos", "layers"]
        chosen = together.matches.query("sink == @index")[columns]
        assert alone.matches[columns].to_numpy().astype(str).tolist() == chosen.to_numpy().astype(str).tolist()
    for name in together.data.data_vars:
        np.testing.assert_allclose(in_batches.data[name], together.data[name], atol=1e-6, rtol=1e-6)


def test_the_planted_secondary_stands_out_from_every_control():
    table = controlled().compare().query("edit == 'zero'").set_index("control")
    for control in ("same range", "attention output", "random perturbation"):
        assert table.loc[control, "difference"] < -1, control
    assert table.loc["same range", "n_unmatched"] == 0
    assert table.loc["norm matched", "n_unmatched"] + table.loc["norm matched", "n_sinks"] == 3
    assert "random model" not in table.index  # none was given
    assert table.loc["random perturbation", "rank"] == 1


def share_of_heads(clean, edited, sink):
    """How many heads of a layer give the treated position more than a tenth of their attention, [layer]."""
    attention = sc.key_column(edited, sink["pos"]).log_attention[..., 0].exp()
    return (attention[..., sink["pos"] + 1 :].mean(-1) > 0.1).float().mean(-1)


def test_every_outcome_of_the_experiment_is_compared(tmp_path):
    """The controls' values of a user's own outcome, and of built-in ones, are what the same edit gives there."""
    tokens, options = sc.Tokens(TEXTS, NAMES), {"outcomes": [share_of_heads], "verbose": False}
    result = with_controls(
        lens(), tokens, treated(), layers=[6, 7], found=found(), controls=("same range",), n_random=1, **options
    )
    stand_ins = result.matches[result.matches["control"] == "same range"]["pos"].to_numpy()
    ids = [int(tokens[row.prompt][pos]) for row, pos in zip(result.table.itertuples(), stand_ins, strict=True)]
    moved = sc.Sinks(result.table.assign(pos=stand_ins, token_id=ids), treated().prompts, treated().manifest)
    there = sc.ablate(lens(), tokens, moved, layers=[6, 7], **options)
    alone = sc.ablate(lens(), tokens, treated(), layers=[6, 7], **options)
    assert result.outcomes == alone.outcomes == ("score", "log_odds", *alone.outcomes[2:-1], "share_of_heads")
    for outcome in ("share_of_heads", "primary_log_odds", "lifetime"):
        own = result.data[f"effect_{outcome}"].to_numpy()
        np.testing.assert_array_equal(own, alone.over_lifetime(outcome).to_numpy())
        control = result.data[f"control_{outcome}"].sel(control="same range").to_numpy()
        np.testing.assert_allclose(control, there.over_lifetime(outcome).to_numpy(), atol=1e-6)
        row = result.compare(outcome).set_index("control").loc["same range"]
        prompts = result.table["prompt"]
        difference = pd.Series((own - control)[:, 0]).groupby(prompts.to_numpy()).mean().mean()
        assert row["difference"] == pytest.approx(difference, abs=1e-6)
    assert "share_of_heads" in result.to_dataframe()
    result.save(tmp_path / "own.safetensors")
    assert Controlled.load(tmp_path / "own.safetensors").outcomes == result.outcomes


def test_each_sink_ranks_among_all_its_controls():
    result = controlled()
    table = result.by_sink().set_index(["pos", "edit"])
    for index, row in result.table.iterrows():
        for edit, beyond in (("zero", np.less_equal), ("double", np.greater_equal)):
            effect, single, draws = (
                result.data[f"{kind}_log_odds"].sel(sink=index, edit=edit).to_numpy()
                for kind in ("effect", "control", "random")
            )
            others = np.array([*single[~np.isnan(single)], *draws])
            found_here = table.loc[(row["pos"], edit)]
            assert found_here["effect"] == pytest.approx(float(effect))
            if (effect < 0) == (edit == "zero"):
                assert found_here["rank"] == 1 + beyond(others, effect).sum()
            assert found_here["n_controls"] == len(others)
            assert "random model" in found_here["unmatched"]  # none was given
    assert (table.xs("zero", level="edit")["rank"] == 1).all()
    assert {result.data[name].dtype for name in result.data.data_vars} == {
        np.dtype(np.float64)
    }  # what means are taken of
    with pytest.raises(InputError, match="'speed' was not measured: there are score, log_odds"):
        result.by_sink("speed")


def test_who_stands_in_is_counted_by_hand():
    ids = planted.minimal().tokens(96, sinks=[30, 50], decoys=[60], seed_name="match")
    ids[33], ids[47] = ids[30], ids[50]  # the same token: 33 nearer to 30, 47 nearer to 50
    tokens = sc.Tokens((ids,), ("t",))
    row = sc.find_sinks(lens(), tokens, verbose=False).select("secondary")
    only = sc.Sinks(row.table[row.table["pos"].isin([30, 50])].reset_index(drop=True), row.prompts, row.manifest)
    pos = match_positions(lens(), tokens, only).set_index(["sink", "control"])["pos"]
    assert pos[0, "same token"] == 33
    assert pos[1, "same token"] == 47
    assert pos[0, "same range"] == 29  # 29 and 31 are as near: the earlier
    none = match_positions(lens(), tokens, only, row).set_index(["sink", "control"])
    assert none.loc[(0, "same token"), "pos"] == -1  # 33 is a sink itself
    assert "does not occur" in none.loc[(0, "same token"), "reason"]


def test_ends_of_the_text_are_no_controls():
    ids = planted.minimal().tokens(40, sinks=[5], decoys=[], seed_name="short")
    tokens = sc.Tokens((ids,), ("t",))
    sinks = sc.find_sinks(lens(), tokens, verbose=False).select("secondary")
    pos = match_positions(lens(), tokens, sinks).set_index("control")["pos"]
    assert pos["same range"] == 4  # 0..3 may be primary
    ids[25:] = ids[5]
    late = match_positions(lens(), sc.Tokens((ids,), ("t",)), sinks)
    assert late.set_index("control").loc["same token", "pos"] < 24  # later ones have too few queries


def test_controls_have_as_many_later_queries_as_a_score_needs():
    """With 50 asked for, position 75 of 96 has none to be scored by: no match may stand there and say that it was measured."""
    some = with_controls(
        lens(), sc.Tokens(TEXTS, NAMES), treated(), layers=[6, 7], found=found(), min_queries=50, n_random=0,
        controls=controls.POSITION_CONTROLS, verbose=False,
    )  # fmt: skip
    matched = some.matches[some.matches["pos"] >= 0]
    assert len(matched) and (matched["pos"] < 96 - 50).all()
    defined = some.data["control_log_odds"].isel(edit=0).to_pandas()
    scored = np.isfinite(some.data["effect_log_odds"].isel(edit=0).to_numpy())
    assert scored.any()
    for row in matched[scored[matched["sink"]]].itertuples():
        assert np.isfinite(defined.loc[row.sink, row.control]), row


OF_FOUND = {
    "with_controls": lambda *args, found: with_controls(*args, layer=6, found=found, n_random=0, verbose=False),
    "mass_account": lambda *args, found: sc.mass_account(*args, layer=6, found=found, verbose=False),
    "mean": lambda *args, found: sc.ablate(*args, layers=[6], intervention="mean", found=found, verbose=False),
    "sufficiency": lambda *args, found: sc.sufficiency(*args, layer=6, found=found, verbose=False),
    "norm_and_direction": lambda *args, found: sc.norm_and_direction(*args, layer=6, found=found, verbose=False),
}


@pytest.mark.parametrize("name", OF_FOUND)
def test_known_sinks_of_other_tokens_are_refused(name):
    own = treated()
    first = sc.Sinks(own.table[own.table["prompt"] == "0"].reset_index(drop=True), own.prompts, own.manifest)
    cut = sc.Tokens((TEXTS[0], TEXTS[1][:50]), NAMES)  # the known sink at 55 of text 1 is gone
    other = sc.Tokens((TEXTS[0], TEXTS[1].roll(1)), NAMES)
    for tokens in (cut, other):
        with pytest.raises(InputError, match="of prompt '1' is another token there: pass the tokens it was found in"):
            OF_FOUND[name](lens(), tokens, first, found=found())
    OF_FOUND[name](lens(), sc.Tokens(TEXTS[:1], NAMES[:1]), first, found=found())  # of further prompts is no matter


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_random_model_has_the_shape_and_other_weights(backend):
    model, other, again = lens(backend), randomly_initialised(lens(backend)), randomly_initialised(lens(backend))
    ours, theirs = dict(model.named_parameters()), dict(other.named_parameters())
    assert {n: p.shape for n, p in ours.items()} == {n: p.shape for n, p in theirs.items()}
    assert sc.adapt(other).weights_hash == sc.adapt(again).weights_hash != sc.adapt(model).weights_hash
    assert (
        not sc.find_sinks(other, sc.Tokens(TEXTS, NAMES), verbose=False)
        .select("secondary")
        .table["pos"]
        .isin([SINK])
        .any()
    )


def test_saved_and_loaded(tmp_path):
    result = controlled()
    result.save(tmp_path / "c.safetensors")
    loaded = Controlled.load(tmp_path / "c.safetensors")
    pd.testing.assert_frame_equal(loaded.compare(), result.compare())
    pd.testing.assert_frame_equal(loaded.to_dataframe(), result.to_dataframe())
    assert len(result.to_dataframe()) == 3 * 2 * (1 + len(controls.CONTROLS) + DRAWS)
    with pytest.raises(ResultError, match="not a result with controls"):
        result.effect.save(tmp_path / "e.safetensors")
        Controlled.load(tmp_path / "e.safetensors")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"n_random": -1}, "n_random = -1"), ({"layer": 6, "together": True}, "one sink at a time"),
        ({"layer": 99}, "layer 99 is out of range"), ({"layer": 6, "controls": ("nobody",)}, "control 'nobody' is unknown"),
        ({"layer": 6, "intervention": "erase"}, "intervention 'erase' is unknown"), ({}, "give either layer="),
        ({"layer": 6, "factors": [0, 2]}, "factors were given and would not be used"),
        ({"layer": 6, "intervention": "rescale", "factors": [0, 0]}, "give each once"),
        ({"layer": 6, "what": "mine"}, "option 'what' is unknown"),
    ],
)  # fmt: skip
def test_bad_input_is_told_in_a_sentence(options, said):
    with pytest.raises(InputError, match=said):
        with_controls(lens(), sc.Tokens(TEXTS, NAMES), treated(), **options)
    with pytest.raises(InputError, match="'speed' was not measured"):
        controlled().compare("speed")
