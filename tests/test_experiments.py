"""Experiments on planted circuits against a forward pass by hand, and their tables and files on made-up effects."""

from __future__ import annotations

import dataclasses
import functools
import math

import eager
import hand
import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
import xarray as xr
from common import BACKENDS, REAL, SINK, by_hand, lens, no_forward_pass, prompt, real, real_run, subject
from test_statistics import percentile_bootstrap

import sink_circuits as sc
from sink_circuits.edits import Edit
from sink_circuits.effects import interaction
from sink_circuits.errors import InputError, ResultError
from sink_circuits.experiments import mean_contributions, resolve_layers
from sink_circuits.results import Manifest

TEXTS = (prompt(), prompt((30, 55), 96, "b"))
TREATED = ((0, SINK), (1, 30), (1, 55))  # (text, position) of the three secondary sinks
OUTCOMES = ("score", "log_odds", "primary_score", "primary_log_odds")  # those of attention, by layer and head
PATHS = [("bridge", "fast"), (BACKENDS[-1], "reference")]  # test_runs.py has every pair


@functools.cache
def secondary(backend: str = "bridge") -> sc.Sinks:
    return sc.find_sinks(lens(backend), list(TEXTS), verbose=False).select("secondary")


@functools.cache
def run(text: int, *edits: tuple) -> hand.Run:
    """By hand: edits are (layer, position, factor or function)."""
    return by_hand(TEXTS[text], {(layer, pos): how for layer, pos, how in edits})


def loss_after(result: hand.Run, text: int, pos: int) -> float:
    log_p = result.logits.log_softmax(-1)[:-1].gather(1, TEXTS[text][1:, None])[:, 0]
    return -log_p[pos:].mean().item()


def check(effect: sc.Effect, edits_by_hand) -> None:
    """Every number of an effect: `edits_by_hand(text, position, label)` are the edits of that run."""
    assert [(int(p[-1]), pos) for p, pos in zip(effect.table.prompt, effect.table.pos, strict=True)] == list(TREATED)
    data = effect.data
    for sink, (text, pos) in enumerate(TREATED):
        for label in [None, *data["edit"].values.tolist()]:
            edits = () if label is None else tuple(edits_by_hand(text, pos, label))
            result = run(text, *edits)
            prefix, where = ("clean_", {"sink": sink}) if label is None else ("", {"sink": sink, "edit": label})
            scores, odds = hand.sink_scores(result.pattern), hand.log_odds(result.pattern)
            for name, expected, tolerance in (
                ("score", scores[..., pos], 2e-5), ("primary_score", scores[..., 0], 2e-5),
                ("log_odds", odds[..., pos], 2e-3), ("primary_log_odds", odds[..., 0], 2e-3),
                ("norm", (norm := result.residuals[:, pos].norm(dim=-1)), 2e-5 * norm.max()),
                ("cosine", torch.cosine_similarity(result.residuals[:, pos], run(text).residuals[:, 0], dim=-1), 1e-4),
            ):  # fmt: skip
                measured = torch.tensor(data[prefix + name].sel(where).values)
                assert (measured - expected).abs().max() < tolerance, (name, sink, label)
            if f"{prefix}loss" in data:
                assert data[f"{prefix}loss"].sel(where).item() == pytest.approx(loss_after(result, text, pos), abs=1e-4)


@pytest.mark.parametrize(("backend", "path"), PATHS)
def test_layer_map(backend, path):
    layers = [0, 6, 7, 13] if path == "fast" else [6, 13]
    effect = sc.layer_map(lens(backend), list(TEXTS), secondary(), layers=layers, path=path, loss=True, verbose=False)
    check(effect, lambda text, pos, layer: [(layer, pos, 0.0)])
    assert effect.manifest.path == path
    for layer in layers:  # what an edit cannot reach
        below = effect.effect().sel(edit=layer, layer=slice(0, layer))
        assert (below == 0).all()
        assert (effect.effect("primary_log_odds").sel(edit=layer, layer=slice(0, layer)) == 0).all()
    assert (effect.data["first_layer"] == xr.DataArray(layers, dims="edit")).all()


def test_layer_map_of_a_function_of_ones_own():
    def turned(c):
        return 0.5 * c.flip(-1)

    effect = sc.layer_map(lens(), list(TEXTS), secondary(), intervention=turned, layers=[6], verbose=False)
    check(effect, lambda text, pos, layer: [(layer, pos, turned)])
    assert effect.manifest.settings["intervention"] == "turned"


def test_dose_response_of_a_family_of_ones_own():
    """Doses need be no factors: negative ones are fine, and 1 is run like any other."""

    def shifted(contribution, dose):
        return contribution + dose * contribution.flip(-1)

    doses = [1.0, -0.5]
    effect = sc.dose_response(
        lens(), list(TEXTS), secondary(), layers=[6, 7], factors=doses, intervention=shifted, verbose=False
    )
    check(
        effect,
        lambda text, pos, dose: [(layer, pos, functools.partial(shifted, dose=dose)) for layer in (6, 7)],
    )
    assert effect.data["edit"].values.tolist() == doses
    assert effect.manifest.settings["intervention"] == "shifted"


def test_ablation_by_a_function_of_ones_own():
    def turned(c):
        return 0.5 * c.flip(-1)

    effect = sc.ablate(lens(), list(TEXTS), secondary(), layers=[6, 7], intervention=turned, verbose=False)
    check(effect, lambda text, pos, label: [(layer, pos, turned) for layer in (6, 7)])
    assert effect.data["edit"].values.tolist() == ["turned"]


@pytest.mark.parametrize(("backend", "path"), PATHS)
@pytest.mark.parametrize("where", [{"layer": 6}, {"layers": [6, 7]}])
def test_dose_response(backend, path, where):
    factors = [0.0, 0.5, 1.0, 3.0] if path == "fast" else [0.0, 1.0, 3.0]
    effect = sc.dose_response(
        lens(backend), list(TEXTS), secondary(), **where, factors=factors, path=path, loss=True, verbose=False
    )
    layers = where.get("layers", [6])
    check(effect, lambda text, pos, factor: [(layer, pos, factor) for layer in layers])
    assert abs(effect.effect("log_odds").sel(edit=1.0)).max() < 1e-4
    if len(layers) == 2:  # planted: more is more
        assert (effect.over_lifetime("log_odds").diff("edit") > 0).all()


@pytest.mark.parametrize(("backend", "path"), PATHS)
@pytest.mark.parametrize("method", ["zero", "mean"])
def test_ablation_of_a_joint_set(backend, path, method):
    effect = sc.ablate(
        lens(backend), list(TEXTS), secondary(), layers=[6, 7], intervention=method, path=path, verbose=False
    )
    ordinary = [[p for p in range(4, 96) if (text, p) not in TREATED] for text in (0, 1)]
    donors = torch.cat([run(text).contributions[:, keep] for text, keep in enumerate(ordinary)], dim=1).mean(1)
    if method == "mean":
        assert (mean_contributions(lens(backend), list(TEXTS), secondary()) - donors).abs().max() < 1e-4
        by_layer = {layer: functools.partial(_donor, donors[layer]) for layer in (6, 7)}
    else:
        by_layer = dict.fromkeys((6, 7), 0.0)
    check(effect, lambda text, pos, label: [(layer, pos, by_layer[layer]) for layer in (6, 7)])
    assert effect.data["edit"].values.tolist() == [method]


def _donor(donor, c):
    return donor


def test_all_sinks_of_a_prompt_together():
    together = sc.ablate(lens(), list(TEXTS), secondary(), layers=[6, 7], together=True, verbose=False)

    def all_of(text, pos, label):
        return [(layer, p, 0.0) for own, p in TREATED if own == text for layer in (6, 7)]

    check(together, all_of)
    alone = sc.ablate(lens(), list(TEXTS), secondary(), layers=[6, 7], verbose=False)
    difference = together.over_lifetime("primary_score").values - alone.over_lifetime("primary_score").values
    assert abs(difference[0]).max() < 1e-6  # the only sink of its prompt
    assert (difference[1:] > 0.01).all()  # the primary gets what both leave


def test_interaction_is_the_joint_edit_less_one_sink_per_run():
    """Against numbers by hand, in the layers that read both sinks; a sink alone in its prompt has nothing to interact with."""
    options = {"layers": [6, 7], "verbose": False, "loss": True}
    alone, joint = (sc.ablate(lens(), list(TEXTS), secondary(), together=t, **options) for t in (False, True))
    found = interaction(alone, joint)
    start, end = secondary().table.l_start.tolist(), secondary().table.l_end.tolist()
    for sink, (text, pos) in enumerate(TREATED):
        readers = slice(max(7, start[sink] + 1), end[sink] + 2)
        own = [(layer, pos, 0.0) for layer in (6, 7)]
        every = [(layer, p, 0.0) for t, p in TREATED if t == text for layer in (6, 7)]
        separate, together = (
            hand.log_odds(run(text, *edits).pattern)[readers, :, pos].mean().item() for edits in (own, every)
        )
        row = found.table.query("outcome == 'log_odds' and sink == @sink").iloc[0]
        assert row.n_joint == (1 if text == 0 else 2)
        assert row.separate == pytest.approx(separate, abs=2e-3)
        assert row.together == pytest.approx(together, abs=2e-3)
        assert row.interaction == row.together - row.separate
        loss = found.table.query("outcome == 'loss' and sink == @sink").iloc[0]
        assert loss.interaction == pytest.approx(
            loss_after(run(text, *every), text, pos) - loss_after(run(text, *own), text, pos), abs=2e-4
        )
    summary = found.summary().set_index("outcome")
    rows = found.table.query("outcome == 'log_odds' and n_joint > 1")
    assert summary.loc["log_odds", "interaction"] == pytest.approx(rows.interaction.mean())
    assert summary.loc["log_odds", ["n_prompts", "n_sinks", "n_alone"]].tolist() == [1, 2, 1]
    assert "interaction" in repr(found)


def test_interaction_over_prompts_has_a_bootstrap_interval():
    first, second = made_up(), made_up(seed=6)
    joint = dataclasses.replace(first.manifest, settings={"together": True})
    found = interaction(first, sc.Effect(first.kind, second.data, first.table, joint)).summary(confidence=0.9)
    row = found.query("outcome == 'score' and edit == 1").iloc[0]
    differences = np.array(
        [
            lifetime_mean(second, "score", s, 1, "edited") - lifetime_mean(first, "score", s, 1, "edited")
            for s in range(20)
        ]
    )
    means = differences.reshape(10, 2).mean(1)
    low, high = percentile_bootstrap(means, 0.9)
    error = 5 * means.std() / np.sqrt(10) * np.sqrt(0.25 / 4999) / 0.1
    assert row.interaction == pytest.approx(means.mean())
    assert row.together - row.separate == pytest.approx(row.interaction)
    assert abs(row.low - low) < error and abs(row.high - high) < error


def test_interaction_of_different_experiments_is_refused():
    effect = made_up()

    def changed(
        together: bool = True, kind: str = effect.kind, table=effect.table, data=effect.data, **fields
    ) -> sc.Effect:
        manifest = dataclasses.replace(effect.manifest, **{"settings": {"together": together}, **fields})
        return sc.Effect(kind, data, table, manifest)

    with pytest.raises(InputError, match="separate was run with together=True: run it with together=False"):
        interaction(changed(), changed())
    with pytest.raises(InputError, match="together was run with together=False: run it with together=True"):
        interaction(effect, effect)
    for other, what in (
        (changed(kind="ablate"), "the experiment"),
        (changed(data=effect.data.assign_coords(edit=[1, 4])), "the edits"),
        (changed(table=effect.table.assign(pos=7)), "the sinks"),
        (changed(weights="other"), "the model"),
        (changed(tokens="other"), "the tokens"),
        (changed(settings={"together": True, "layers": "[6]"}), "the settings"),
    ):
        with pytest.raises(InputError, match=f"differ in {what}: run the same one"):
            interaction(effect, other)


def test_sinks_are_found_and_forming_layers_mapped_where_none_are_given():
    found = sc.find_sinks(lens(), list(TEXTS), verbose=False)
    effect = sc.dose_response(
        lens(), list(TEXTS), found.select("secondary"), layer="forming", factors=[0], verbose=False
    )
    odds = {text: hand.log_odds(run(text).pattern) for text in (0, 1)}
    for sink, (text, pos) in enumerate(TREATED):
        fall = []
        for layer in range(13):
            readers = [r for r in range(7, 14) if r > layer]
            cut = hand.log_odds(run(text, (layer, pos, 0.0)).pattern)
            fall.append((cut - odds[text])[readers][:, :, pos].mean().item())
        assert effect.data["first_layer"].values[sink, 0] == int(np.argmin(fall))
    assert set(effect.data["first_layer"].values[:, 0]) == {6}
    everything = sc.layer_map(lens(), list(TEXTS), layers=[2], verbose=False)
    pd.testing.assert_frame_equal(everything.table, found.table)


@pytest.mark.parametrize(("backend", "path"), PATHS)
def test_batch_size_changes_nothing(backend, path):
    options = {"layers": [6, 7], "loss": True, "verbose": False, "path": path, "factors": [0, 3]}
    texts = list(TEXTS) if path == "fast" else TEXTS[0]
    sinks = secondary() if path == "fast" else secondary_of_one()
    whole = sc.dose_response(lens(backend), texts, sinks, **options)
    cut = sc.dose_response(lens(backend), texts, sinks, **options, batch_size=1)
    for name, array in whole.data.data_vars.items():
        tolerance = 1e-6 * max(1.0, float(abs(array).max()))
        assert abs(cut.data[name] - array).max() <= tolerance, name


def test_the_users_cache_serves_experiments():
    _, cache = lens().run_with_cache(torch.stack(TEXTS), names_filter=sc.names_filter(lens()))
    effect = sc.ablate(lens(), torch.stack(TEXTS), secondary(), layers=[6, 7], clean_cache=cache, verbose=False)
    check(effect, lambda text, pos, label: [(layer, pos, 0.0) for layer in (6, 7)])


def test_several_edits_of_ones_own():
    """measure() takes any labelled edits: here the contribution of MLP 6 at the sink is also written elsewhere."""

    def edits_of(label, row):
        donor = run(int(row.prompt[-1])).contributions[6, row.pos].float()
        return (sc.zero(6, row.pos), sc.replace(7, row.pos, label * donor), sc.rescale(3, 0, 0.5))

    effect = sc.measure(lens(), list(TEXTS), secondary(), [1.0, 2.0], edits_of, what="mine", verbose=False)

    def by_hand_too(text, pos, label):
        donor = run(text).contributions[6, pos]
        return [(6, pos, 0.0), (7, pos, functools.partial(_donor, label * donor)), (3, 0, 0.5)]

    assert effect.kind == "mine"
    for sink, (text, pos) in enumerate(TREATED):
        for label in (1.0, 2.0):
            expected = hand.sink_scores(run(text, *by_hand_too(text, pos, label)).pattern)[..., pos]
            assert abs(effect.data["score"].sel(sink=sink, edit=label).values - expected.numpy()).max() < 2e-5
    assert (effect.data["first_layer"] == 3).all()
    assert (effect.data["last_edited"] == 7).all()


@pytest.mark.parametrize("path", ["fast", "reference"])
def test_what_is_held_clean_stands_beside_the_edits(path):
    """Labels may be a mapping to one edit, to several, or to functions of the sink; holds are those of a pass by hand."""
    plan = {
        "free": lambda sink: sc.zero(6, sink.pos),
        "keys held": lambda sink: [sc.zero(6, sink.pos), sc.Hold("k")],
        "kept": lambda sink: [sc.rescale(6, sink.pos, 1.0), sc.Hold("k")],
    }
    one = secondary_of_one()
    effect = sc.measure(lens(), TEXTS[0], one, plan, path=path, verbose=False)
    assert effect.data["edit"].values.tolist() == list(plan) and effect.kind == "measure"
    assert effect.data["first_layer"].values[0].tolist() == effect.data["last_edited"].values[0].tolist() == [6, 6, 6]
    pos, model, clean = int(one.table["pos"][0]), subject().hf_model, by_hand(TEXTS[0])
    keys = [("k", layer, p) for layer in range(7, 24) for p in range(len(TEXTS[0]))]
    for label, held in (("free", []), ("keys held", keys)):
        expected = hand.forward(model.state_dict(), model.config, TEXTS[0], {(6, pos): 0.0}, clean, held).pattern
        found = effect.data["score"].sel(sink=0, edit=label).to_numpy()
        assert np.abs(found - hand.sink_scores(expected)[..., pos].numpy()).max() < 2e-5
    assert (effect.effect("score").sel(edit="kept") == 0).all()
    together = sc.measure(lens(), TEXTS[0], one, plan, path=path, together=True, verbose=False)
    np.testing.assert_allclose(together.data["score"], effect.data["score"], atol=1e-6)
    fixed = sc.measure(lens(), TEXTS[0], one, {"free": sc.zero(6, pos)}, path=path, verbose=False)
    np.testing.assert_array_equal(fixed.data["score"][:, 0], effect.data["score"].sel(edit="free"))


@pytest.mark.parametrize(
    ("labels", "edits_of", "said"),
    [
        ({"a": lambda sink: sc.Hold("k")}, None, "in a run without edits, which is clean"),
        ({"a": lambda sink: [sc.zero(6, sink.pos), sc.Hold("k", layers=(2,))]}, None, "'k in layers 2' reaches nothing"),
        ({"a": lambda sink: "zero"}, None, "neither an Edit nor a Hold"),
        (["a"], None, "give labels and edits_of, a function of"),
        ({"a": sc.zero(6, 40)}, lambda *_: sc.zero(6, 40), "or {label: edits} alone"),
    ],
)  # fmt: skip
def test_runs_that_say_nothing_are_refused(labels, edits_of, said):
    sc.adapt(lens())
    secondary_of_one()
    with no_forward_pass(), pytest.raises(InputError, match=said):
        sc.measure(lens(), TEXTS[0], secondary_of_one(), labels, edits_of, verbose=False)


def test_nothing_is_measured_as_zero_where_too_few_queries_follow():
    texts = [prompt((85,), 96, "late"), prompt()]
    sinks = sc.find_sinks(lens(), texts, verbose=False).select("secondary")
    assert sinks.table.pos.tolist() == [85, SINK]
    effect = sc.ablate(lens(), texts, sinks, layers=[6, 7], verbose=False)
    assert np.isnan(effect.data["score"].values[0]).all()
    assert np.isnan(effect.data["log_odds"].values[0]).all()
    assert np.isfinite(effect.data["primary_score"].values[0]).all()
    assert np.isnan(effect.over_lifetime("score").values[0, 0])
    summary = effect.summary().set_index("outcome")
    assert summary.loc["score", ["n_prompts", "n_sinks"]].tolist() == [1, 1]
    assert summary.loc["primary_score", ["n_prompts", "n_sinks"]].tolist() == [2, 2]
    expected = (
        hand.sink_scores(by_hand(prompt(), {(6, SINK): 0.0, (7, SINK): 0.0}).pattern)[7:14, :, SINK].mean().item()
    )
    assert summary.loc["score", "edited"] == pytest.approx(expected, abs=1e-5)
    few = sc.ablate(lens(), texts, sinks, layers=[6, 7], min_queries=5, verbose=False)
    assert np.isfinite(few.data["score"].values[0]).all()


# ------------------------------------------------------------------------------------------------- made-up effects
def made_up(n_prompts: int = 10, kind: str = "layer_map", seed: int = 5) -> sc.Effect:
    """Two sinks a prompt, edits at layers 1 and 3 of 6, two heads; l_start 1 or 2, l_end 3 or 9 (beyond the last)."""
    rng = np.random.default_rng(seed)
    n_sinks = 2 * n_prompts
    table = pd.DataFrame(
        {
            "prompt": np.repeat([f"p{i}" for i in range(n_prompts)], 2), "pos": range(n_sinks), "token": "x", "kind": "secondary",
            "l_start": [1, 2] * n_prompts, "l_end": [3, 9] * n_prompts,
        }
    )  # fmt: skip
    arrays = {f"clean_{name}": (("sink", "layer", "head"), rng.normal(size=(n_sinks, 6, 2))) for name in OUTCOMES}
    arrays |= {name: (("sink", "edit", "layer", "head"), rng.normal(size=(n_sinks, 2, 6, 2))) for name in OUTCOMES}
    arrays |= {
        "clean_loss": (("sink",), rng.normal(size=n_sinks)),
        "loss": (("sink", "edit"), rng.normal(size=(n_sinks, 2))),
    }
    arrays |= {name: (("sink", "edit"), np.tile([1, 3], (n_sinks, 1))) for name in ("first_layer", "last_edited")}
    coords = {"edit": [1, 3], "layer": range(6), "head": range(2), "sink": range(n_sinks)}
    manifest = Manifest("x", "m", "w", "float32", "t", n_prompts, "fast")
    return sc.Effect(kind, xr.Dataset(arrays, coords=coords), table, manifest)


def lifetime_mean(effect: sc.Effect, outcome: str, sink: int, edit: int, what: str = "effect") -> float:
    """Layers l_start+1..l_end+1 above the edit, all heads, in plain loops."""
    row = effect.table.iloc[sink]
    numbers = []
    for layer in range(6):
        if row.l_start < layer <= row.l_end + 1 and layer > edit:
            for head in range(2):
                clean = float(effect.data[f"clean_{outcome}"].values[sink, layer, head])
                edited = float(effect.data[outcome].sel(edit=edit).values[sink, layer, head])
                numbers.append({"effect": edited - clean, "edited": edited, "clean": clean}[what])
    return sum(numbers) / len(numbers) if numbers else math.nan


@pytest.mark.parametrize("what", ["effect", "edited", "clean"])
@pytest.mark.parametrize("outcome", OUTCOMES)
def test_over_lifetime(outcome, what):
    effect = made_up()
    found = effect.over_lifetime(outcome, what)
    assert found.dims == ("sink", "edit")
    for sink in range(20):
        for edit in (1, 3):
            assert found.sel(edit=edit).values[sink] == pytest.approx(lifetime_mean(effect, outcome, sink, edit, what))


def test_summary_is_a_bootstrap_over_prompts():
    effect = made_up()
    summary = effect.summary(confidence=0.9).set_index(["outcome", "edit"])
    assert len(summary) == 10  # five outcomes, loss among them, two edits
    for outcome in OUTCOMES:
        for edit in (1, 3):
            values = np.array([lifetime_mean(effect, outcome, sink, edit) for sink in range(20)])
            means = values.reshape(10, 2).mean(1)
            row = summary.loc[outcome, edit]
            low, high = percentile_bootstrap(means, 0.9)
            error = 5 * means.std() / np.sqrt(10) * np.sqrt(0.25 / 4999) / 0.1
            assert row.effect == pytest.approx(means.mean())
            assert abs(row.low - low) < error
            assert abs(row.high - high) < error
            clean = np.mean([lifetime_mean(effect, outcome, sink, edit, "clean") for sink in range(20)])
            assert row.clean == pytest.approx(clean)
            assert row.edited == pytest.approx(clean + means.mean())
            assert (row.n_prompts, row.n_sinks) == (10, 20)
    assert summary.loc["loss", 1].effect == pytest.approx(
        (effect.data.loss.values[:, 0] - effect.data.clean_loss.values).mean()
    )


def test_tests_of_a_map_are_those_of_the_statistics_over_prompts():
    effect = made_up()
    table = effect.tests("score")
    values = np.array(
        [[lifetime_mean(effect, "score", s, edit) for edit in effect.data["edit"].values] for s in range(20)]
    )
    means = values.reshape(10, 2, -1).mean(1)
    for index, row in table.iterrows():
        test = scipy.stats.permutation_test((means[:, index],), np.mean, permutation_type="samples", n_resamples=np.inf)
        assert row.p == pytest.approx(test.pvalue)
        assert row.effect == pytest.approx(means[:, index].mean())
    assert (table["p_max_t"] >= table["p"] - 1e-12).all()
    np.testing.assert_allclose(table["p_bh"], scipy.stats.false_discovery_control(table["p"]))
    assert table["smallest_p"].tolist() == [2 / 2**10] * len(table)
    assert table["n_prompts"].tolist() == [10] * len(table)
    assert effect.tests("score", alternative="less")["p"].tolist() != table["p"].tolist()
    with pytest.raises(InputError, match="a trend needs doses, this is a layer_map"):
        effect.trend()


def test_the_trend_of_a_dose_is_the_statistics_over_prompts():
    made = made_up(kind="dose_response")
    data = made.data.isel(edit=[0, 0, 0]).assign_coords(edit=[0.0, 0.5, 2.0])
    data["score"] = data["score"] * xr.DataArray([1.0, -0.3, 2.0], dims="edit") + data["clean_score"]
    effect = dataclasses.replace(made, data=data)
    edited = effect.over_lifetime("score", "edited").transpose("sink", "edit").to_numpy().reshape(10, 2, 3).mean(1)
    correlations = [scipy.stats.spearmanr([0.0, 0.5, 2.0], row).statistic for row in edited]
    found = effect.trend("score", alternative="two-sided")
    assert found.statistic == pytest.approx(np.mean(correlations))
    test = scipy.stats.permutation_test((correlations,), np.mean, permutation_type="samples", n_resamples=np.inf)
    assert found.p == pytest.approx(test.pvalue)


def test_one_outcome_alone_and_one_row_per_sink():
    effect = made_up()
    pd.testing.assert_frame_equal(
        effect.summary("log_odds"), effect.summary().query("outcome == 'log_odds'").reset_index(drop=True)
    )
    table = effect.by_sink("score", "edited")
    assert table[["prompt", "pos", "token", "kind"]].equals(effect.table[["prompt", "pos", "token", "kind"]])
    for edit in effect.data["edit"].values:
        np.testing.assert_array_equal(table[edit], effect.over_lifetime("score", "edited").sel(edit=edit))
    with pytest.raises(InputError, match="'magic' was not measured"):
        effect.summary("magic")


def test_one_prompt_has_no_interval():
    summary = made_up(1).summary()
    assert summary.low.isna().all()
    assert summary.high.isna().all()
    assert summary.effect.notna().all()
    assert (summary.n_prompts == 1).all()


def test_sinks_without_a_reading_layer_above_the_edit_are_left_out():
    effect = made_up(3)
    table = effect.table.assign(l_end=[1, 9] * 3)  # read by layer 2 alone: nothing above edit 3
    short = sc.Effect(effect.kind, effect.data, table, effect.manifest)
    assert np.isnan(short.over_lifetime().sel(edit=3).values[::2]).all()
    row = short.summary().query("outcome == 'score' and edit == 3").iloc[0]
    kept = [lifetime_mean(short, "score", sink, 3) for sink in (1, 3, 5)]
    assert row.effect == pytest.approx(np.mean(kept))
    assert row.clean == pytest.approx(np.mean([lifetime_mean(short, "score", sink, 3, "clean") for sink in (1, 3, 5)]))
    assert (row.n_prompts, row.n_sinks) == (3, 3)


def test_forming_layer_is_the_one_whose_removal_lowers_log_odds_most():
    effect = made_up()
    expected = [min((1, 3), key=lambda edit: lifetime_mean(effect, "log_odds", sink, edit)) for sink in range(20)]
    assert effect.forming().tolist() == expected
    assert set(expected) == {1, 3}
    early = sc.Effect("layer_map", effect.data, effect.table.assign(l_end=[2, 9] * 10), effect.manifest)
    assert set(early.forming()[::2]) == {1}  # layer 3 is above the end of that sink


def test_forming_layers_need_a_layer_map_with_defined_effects():
    with pytest.raises(InputError, match="read from a layer map, this is a dose_response: use layer_map"):
        made_up(kind="dose_response").forming()
    effect = made_up()
    undefined = effect.data.assign(log_odds=effect.data["log_odds"].where(effect.data["sink"] != 3))
    with pytest.raises(InputError, match="no layer with a defined effect.*leave it out"):
        sc.Effect("layer_map", undefined, effect.table, effect.manifest).forming()


def test_unknown_outcomes_are_refused():
    with pytest.raises(InputError, match="outcome 'loss' was not measured: there are score, log_odds"):
        sc.ablate(lens(), prompt(), secondary_of_one(), layer=6, verbose=False).effect("loss")
    with pytest.raises(InputError, match="'magic' was not measured: there are score.*loss"):
        made_up().over_lifetime("magic")
    with pytest.raises(InputError, match="'half' is unknown: use 'effect', 'edited' or 'clean'"):
        made_up().over_lifetime(what="half")


@functools.cache
def secondary_of_one() -> sc.Sinks:
    return sc.find_sinks(lens(), prompt(), verbose=False).select("secondary")


def test_table_holds_every_value_at_its_place():
    effect = made_up(2)
    table = effect.to_dataframe()
    assert len(table) == 4 * 2 * (4 * 6 * 2 + 1)  # sinks, edits; outcomes by layer and head, and the loss
    row = table.query("outcome == 'log_odds' and sink == 2 and edit == 3 and layer == 4 and head == 1").iloc[0]
    assert row.edited == effect.data["log_odds"].values[2, 1, 4, 1]
    assert row.clean == effect.data["clean_log_odds"].values[2, 4, 1]
    assert row.effect == row.edited - row.clean
    assert (row.prompt, row.pos, row.l_end) == ("p1", 2, 3)
    row = table.query("outcome == 'loss' and sink == 2 and edit == 3").iloc[0]
    assert (row.edited, row.clean) == (effect.data["loss"].values[2, 1], effect.data["clean_loss"].values[2])
    assert row.layer is pd.NA and row["head"] is pd.NA


def test_effects_survive_a_file(tmp_path):
    measured = sc.ablate(lens(), list(TEXTS), secondary(), layers=[6, 7], loss=True, verbose=False)
    for effect, name in ((measured, "a.safetensors"), (made_up(), "b")):
        effect.save(tmp_path / name)
        read = sc.Effect.load(tmp_path / name)
        assert read.data.identical(effect.data)
        assert read.kind == effect.kind
        assert read.manifest == effect.manifest
        pd.testing.assert_frame_equal(read.table, effect.table)
        pd.testing.assert_frame_equal(read.summary(), effect.summary())
        with pytest.raises(ResultError, match="exists already"):
            effect.save(tmp_path / name)
        effect.save(tmp_path / name, overwrite=True)
    whole = (tmp_path / "b").read_bytes()
    (tmp_path / "b").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ResultError, match="b cannot be read as a result.*make the result again"):
        sc.Effect.load(tmp_path / "b")


def test_text_form_names_kind_and_numbers():
    text = repr(made_up())
    assert "layer_map: 20 sinks in 10 prompts" in text
    assert "log_odds" in text


# ---------------------------------------------------------------------------------------------------- bad arguments
def call(name: str, **options):
    options = {"tokens": prompt(), "sinks": secondary_of_one(), "verbose": False, **options}
    return getattr(sc, name)(lens(), options.pop("tokens"), options.pop("sinks"), **options)


@pytest.mark.parametrize("found", [True, False])
@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ablate", {}, "give either layer= .* or layers=.*not both"),
        ("ablate", {"layer": 3, "layers": [4]}, "give either layer="),
        ("ablate", {"layer": 24}, r"layer 24 is out of range: the model has layers 0\.\.23"),
        ("ablate", {"layer": -1}, "layer -1 is out of range"),
        ("ablate", {"layer": 2.5}, r"layer 2\.5 is out of range"),
        ("ablate", {"layer": True}, "layer True"),
        ("ablate", {"layer": "first"}, "layer 'first' is unknown: give a number or 'forming'"),
        ("ablate", {"layers": []}, "name each layer once, and at least one"),
        ("ablate", {"layers": [3, 3]}, "name each layer once"),
        ("ablate", {"layers": [3, 24]}, "layer 24 is out of range"),
        ("ablate", {"layer": 3, "intervention": "erase"}, "intervention 'erase' is unknown: use 'zero' or 'mean' or a function"),
        ("dose_response", {"layer": 3, "factors": [1, -1]}, "factor -1 is not allowed"),
        ("dose_response", {"layer": 3, "factors": [math.nan]}, "factor nan is not allowed"),
        ("dose_response", {"layer": 3, "factors": [math.inf]}, "factor inf is not allowed"),
        ("dose_response", {"layer": 3, "factors": []}, "give each once, and at least one"),
        ("dose_response", {"layer": 3, "factors": [1, 1.0]}, "give each once"),
        ("dose_response", {"layer": 30}, "layer 30 is out of range"),
        ("layer_map", {"layers": [0, 24]}, "layer 24 is out of range"),
        ("layer_map", {"layers": [3, 3]}, "name each layer once"),
        ("layer_map", {"layers": []}, "at least one"),
        ("ablate", {"layer": 3, "intervention": 7}, "intervention 7 is unknown"),
        ("dose_response", {"layer": 3, "intervention": "turn"}, "intervention 'turn' is unknown: use 'rescale' or a function"),
        ("dose_response", {"layer": 3, "intervention": max, "factors": [math.nan]}, "dose nan is not allowed: give a finite number"),
        ("dose_response", {"layer": 3, "intervention": max, "factors": [True]}, "dose True is not allowed"),
        ("ablate", {"layer": 3, "outcomes": {"score": max}}, "outcome name 'score' is taken: choose another"),
        ("layer_map", {"intervention": "erase"}, "intervention 'erase' is unknown: use 'zero' or 'mean' or a function"),
        ("layer_map", {"labels": [1]}, "option 'labels' is unknown"), ("ablate", {"layer": 3, "what": "x"}, "option 'what' is unknown"),
        ("ablate", {"layer": 3, "batch_size": 0}, "batch_size = 0: at least 1"),
        ("ablate", {"layer": 3, "batch_size": -2}, "batch_size = -2: at least 1"),
        ("ablate", {"layer": 3, "min_queries": 0}, "min_queries = 0: at least 1"),
        ("ablate", {"layer": 3, "path": "quick"}, "path 'quick' is unknown"),
        ("ablate", {"layer": 3, "tokens": torch.zeros(0, dtype=torch.long)}, "prompt 0 is empty"),
        ("ablate", {"layer": 3, "tokens": torch.zeros(2000, dtype=torch.long)}, "2000 tokens, the model's context 1024"),
        ("ablate", {"layer": 3, "tokens": torch.tensor([999])}, r"token id 999, the vocabulary 0\.\.63"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused_before_anything_runs(name, options, message, found):
    """Whether the sinks are given or still to be found."""
    secondary_of_one()
    with no_forward_pass(), pytest.raises(InputError, match=message):
        call(name, **options) if found else call(name, **options, sinks=None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": prompt(seed_name="other", sinks=())}, "the sink at position 40 of prompt 'prompt-0' is another token"),
        ({"tokens": prompt()[:30]}, "the sink at position 40 of prompt 'prompt-0' is another token there"),
        ({"sinks": sc.Sinks(secondary().table.iloc[1:], ("prompt-1",), None)}, "sinks of prompt 'prompt-1' were given without its tokens"),
        ({"sinks": sc.Sinks(secondary().table.iloc[:0], (), None)}, "there are no sinks to treat"),
        ({"intervention": "mean", "sinks": sc.Sinks(secondary().table.iloc[1:], ("prompt-1",), None)}, "without its tokens"),
        ({"intervention": "mean", "tokens": prompt()[:30]}, "is another token there"),
        ({"layer": "forming", "forming": pd.Series([6, 6])}, "forming holds 2 layers for 1 sinks"),
        ({"layer": "forming", "forming": pd.Series([99])}, r"layer 99 is out of range"),
    ],
)  # fmt: skip
def test_sinks_that_do_not_fit_are_refused_before_anything_runs(options, message):
    secondary_of_one()
    with no_forward_pass(), pytest.raises(InputError, match=message):
        call("ablate", **{"layer": 6, **options})


def test_edits_beyond_the_text_are_refused_before_anything_runs():
    sinks = secondary_of_one()
    for edit, message in ((sc.zero(24, 3), "layer 24"), (Edit(3, (3, 96), torch.zeros_like), "position 96")):
        with no_forward_pass(), pytest.raises(InputError, match=message):
            sc.measure(lens(), prompt(), sinks, ["x"], lambda label, row, edit=edit: (edit,), what="mine")


def test_misspelt_options_are_not_swallowed():
    with pytest.raises(InputError, match="batchsize"):
        call("ablate", layer=6, batchsize=3)


def test_resolve_layers():
    row = pd.Series({"pos": 3}, name=1)
    assert resolve_layers(lens(), 4, None)(row) == (4,)
    assert resolve_layers(lens(), None, range(2, 5))(row) == (2, 3, 4)
    assert resolve_layers(lens(), np.int64(4), None)(row) == (4,)
    assert resolve_layers(lens(), "forming", None, pd.Series([6, 9]))(row) == (9,)
    with pytest.raises(InputError, match="forming layers are not known: pass forming="):
        resolve_layers(lens(), "forming", None)


# ------------------------------------------------------------------------------------------------------ real models
@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_real_models_layer_map_and_dose_equal_plain_hooks_on_hugging_face(name):
    """Single layers and a joint set, on both paths, at one secondary sink of the first text that has one."""
    model, _, tokens = real(name)
    found = sc.find_sinks(model, tokens, verbose=False)
    candidates = found.table.query("kind == 'secondary' and lifetime > 4 and pos > 4 and pos < 200")
    sink = sc.Sinks(candidates.head(1), found.prompts, found.manifest)
    row, windows = sink.table.iloc[0], sc.adapt(model).windows
    text = tokens.names.index(row.prompt)
    start, joint = int(row.l_start), [int(row.l_start), int(row.l_start) + 1]
    singles = [0, start, int(row.l_end)]
    ids = tokens[text]

    def check_one(effect: sc.Effect, label, edits: tuple) -> None:
        result = real_run(name, text, *edits)
        for outcome, means, tolerance in (("score", eager.scores, 1e-4), ("log_odds", eager.log_odds, 2e-2)):
            expected = means(result.pattern, windows, min_queries=16)
            for prefix, pos in (("", row.pos), ("primary_", row.primary_pos)):
                data = effect.data[prefix + outcome] if label is not None else effect.data[f"clean_{prefix}{outcome}"]
                data = data.sel(sink=0) if label is None else data.sel(sink=0, edit=label)
                finite = expected[..., int(pos)].isfinite()  # a weight of exactly 0 or 1 in float32 has no log-odds
                assert finite.float().mean() > 0.8
                difference = (torch.tensor(data.values) - expected[..., int(pos)]).abs()[finite]
                assert difference.max() < tolerance, (prefix + outcome, label)
        if label is not None:
            log_p = result.logits.log_softmax(-1)[:-1].gather(1, ids[1:, None])[:, 0]
            expected_loss = -log_p[int(row.pos) :].mean().item()
            assert effect.data["loss"].sel(sink=0, edit=label).item() == pytest.approx(expected_loss, abs=1e-3)

    for path in ("fast", "reference"):
        options = {"path": path, "loss": True, "verbose": False}
        mapped = sc.layer_map(model, tokens[text : text + 1], sink, layers=singles, **options)
        check_one(mapped, None, ())
        for layer in singles:
            check_one(mapped, layer, ((layer, int(row.pos), 0.0),))
        dose = sc.dose_response(model, tokens[text : text + 1], sink, layers=joint, factors=[0.0, 0.5], **options)
        for factor in (0.0, 0.5):
            check_one(dose, factor, tuple((layer, int(row.pos), factor) for layer in joint))
    assert abs(mapped.over_lifetime("log_odds")).max() > 0.1  # something did change
