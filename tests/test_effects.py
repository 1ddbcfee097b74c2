"""Effects: lifetimes, summaries, tests, tables and files, on made-up arrays and by closed forms."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import xarray as xr
from common import lens, prompt
from test_intervals import expected_interval
from treated import OUTCOMES, TEXTS, secondary, secondary_of_one

import sink_circuits as sc
from sink_circuits.effects import interaction
from sink_circuits.errors import InputError, ResultError
from sink_circuits.results import Manifest


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
            low, high = expected_interval(means, 0.9)
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
    low, high = expected_interval(means, 0.9)
    error = 5 * means.std() / np.sqrt(10) * np.sqrt(0.25 / 4999) / 0.1
    assert row.interaction == pytest.approx(means.mean())
    assert row.together - row.separate == pytest.approx(row.interaction)
    assert abs(row.low - low) < error and abs(row.high - high) < error


def test_a_position_that_is_edited_alone_has_no_interaction_however_often_it_is_listed():
    """A primary with two phases is in the table twice and is one position."""
    first, second = made_up(), made_up(seed=6)
    table = first.table.assign(pos=first.table.groupby("prompt")["pos"].transform("first"))
    joint = dataclasses.replace(first.manifest, settings={"together": True})
    found = interaction(
        sc.Effect(first.kind, first.data, table, first.manifest), sc.Effect(first.kind, second.data, table, joint)
    )
    assert (found.table["n_joint"] == 1).all()
    assert (found.summary()["n_sinks"] == 0).all() and (found.summary()["n_alone"] == len(table)).all()


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
