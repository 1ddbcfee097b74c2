"""Every anatomy: files, frames, figures, what is refused, and all of them on the real models."""

import functools

import numpy as np
import pandas as pd
import pytest
import torch
from anatomies import QUIET, found, load, repeated_tokens, secondary, sinks_at
from common import SINK, lens, prompt, real

import sink_circuits as sc
from sink_circuits import anatomy
from sink_circuits.anatomy import direct_writes, profiles
from sink_circuits.anatomy_of_one import PARTS, anatomy_of_one, strongest_sink
from sink_circuits.detection import Sinks
from sink_circuits.errors import InputError, ResultError


@functools.cache
def every_result() -> dict[str, anatomy.Anatomy]:
    texts, fake = repeated_tokens()
    model, ids = lens(), list(texts.values())
    args = (model, [prompt()])
    made = [
        anatomy.mlp_stages(*args, secondary(), layer="l_start", **QUIET), anatomy.writers(*args, found(), **QUIET),
        anatomy.neurons(*args, secondary(), layer=6, **QUIET), anatomy.norms_by_layer(*args, found(), **QUIET), anatomy.levels(found()),
        anatomy.score_by_lifetime(*args, found(), **QUIET), anatomy.pca(model, ids, fake, layer=6, **QUIET),
        anatomy.clustering(model, ids, fake, **QUIET), anatomy.matrix_entropy(*args, found(), layers=[0, 8], **QUIET),
        anatomy.key_query_geometry(*args, found(), **QUIET), anatomy.attention_patterns(*args, found(), **QUIET),
    ]  # fmt: skip
    return {one.kind: one for one in made}


def test_stages_and_neurons_are_those_of_the_mlp_that_writes():
    """Whatever removal takes most: there the figures would show nothing of the sink's direction."""
    parts, missing = anatomy_of_one(lens(), [prompt()], secondary(), pd.Series([2]), verbose=False)
    layers = {one.kind: one.data["layer"].to_numpy().tolist() for one in parts if one.kind in ("mlp_stages", "neurons")}
    assert layers == {"mlp_stages": [6], "neurons": [6]}
    assert [one.kind for one in parts] == list(PARTS)
    assert not missing


def test_the_sink_taken_apart_has_a_score():
    """A later one too near the end of its text for a score does not stand before a primary that has one."""
    text = prompt()[: SINK + 12]
    sinks = sc.find_sinks(lens(), [text], verbose=False)
    assert sinks.table.set_index("pos")["score"].isna().to_dict() == {0: False, SINK: True}
    assert strongest_sink(sinks)[0].table["pos"].tolist() == [0]
    parts, _ = anatomy_of_one(lens(), [text], sinks, verbose=False)
    assert all(one.table["pos"].iloc[0] == 0 for one in parts)


KINDS = sorted(one.kind for one in anatomy.Anatomy.__subclasses__())


@pytest.mark.parametrize("kind", KINDS)
def test_results_come_back_from_files_as_they_were(kind, tmp_path):
    result = every_result()[kind]
    result.save(tmp_path / "r.safetensors")
    back = anatomy.Anatomy.load(tmp_path / "r.safetensors")
    assert type(back) is type(result) is type(type(result).load(tmp_path / "r.safetensors"))
    assert back.manifest == result.manifest
    pd.testing.assert_frame_equal(back.to_dataframe(), result.to_dataframe(), check_dtype=False)
    pd.testing.assert_frame_equal(back.table, result.table, check_dtype=False)
    assert back.plot().to_json() == result.plot().to_json()
    other = next(one for one in anatomy.Anatomy.__subclasses__() if one.kind != kind)
    with pytest.raises(ResultError, match=f"{other.__name__}.load reads {other.kind}"):
        other.load(tmp_path / "r.safetensors")
    with pytest.raises(ResultError, match="exists"):
        result.save(tmp_path / "r.safetensors")


@pytest.mark.parametrize("kind", KINDS)
def test_frames_are_tidy(kind):
    frame = every_result()[kind].to_dataframe()
    assert len(frame) and set(every_result()[kind].long) <= set(frame.columns) and frame.columns.is_unique


def test_figures_draw_the_numbers():
    results = every_result()
    norms, figure = results["norms_by_layer"], results["norms_by_layer"].plot()
    rest = [trace for trace in figure.data if trace.name == "mean of the rest"]
    assert [list(trace.y[:-1]) for trace in rest] == [
        norms.data[what][2].to_numpy().tolist() for what in ("key", "value", "hidden")
    ]
    figure = results["writers"].plot()
    mlp_bars = [trace for trace in figure.data if trace.name == "MLP"]
    own = results["writers"].excess().sel(sink=1, direction="life").to_numpy()
    is_mlp = results["writers"].data["part"].to_numpy() == direct_writes.PARTS.index("mlp")
    np.testing.assert_allclose(mlp_bars[1].y, own[is_mlp], rtol=1e-5)
    assert figure.layout.showlegend
    pca, figure = results["pca"], results["pca"].plot()
    np.testing.assert_allclose(figure.data[0].y[:-1], pca.data["response_norm"][0])
    assert profiles.REST in norms.table["kind"].values


@pytest.mark.parametrize(("name", "n_panels"), [("qwen3_moe", 4), ("qwen2_moe", 5)])
def test_a_branch_that_does_not_exist_has_no_panel(name, n_panels):
    """The whole, two experts, shared experts where there are some, the direction; stages in the legend in their order."""
    model = load(name)
    torch.manual_seed(3)
    texts = {"a": torch.randint(3, model.cfg.d_vocab, (40,))}
    result = anatomy.mlp_stages(
        model, sc.Tokens((texts["a"],), ("a",)), sinks_at(("a", 20), token_ids=texts), layer=1, **QUIET
    )
    figure = result.plot()
    assert len(list(figure.select_yaxes())) == n_panels == sum(one.yref == "paper" for one in figure.layout.annotations)
    ranks = {trace.name: trace.legendrank for trace in figure.data if trace.showlegend}
    assert sorted(ranks, key=ranks.get) == ["MLP input", "gate", "up", "activation", "product", "output (contribution)"]


def test_layers_are_whole_numbers_on_an_axis():
    figure = every_result()["score_by_lifetime"].plot()
    assert figure.layout.xaxis.dtick >= 1 and figure.data[0].marker.colorbar.dtick >= 1


def test_hostile_tokens_stay_text():
    result = every_result()["mlp_stages"]
    hostile = type(result)(result.data, result.table.assign(token="<b>&x</b>\u202e"), result.manifest)
    labels = hostile.plot().layout.xaxis.ticktext
    assert "<b>" not in labels[0] and "&lt;b&gt;" in labels[0] and "\u202e" not in labels[0]


def test_no_sinks_and_foreign_tokens_are_refused_before_any_work():
    empty = Sinks(found().table.iloc[:0], found().prompts, found().manifest)
    for function in (
        anatomy.writers,
        anatomy.mlp_stages,
        anatomy.norms_by_layer,
        anatomy.clustering,
        anatomy.key_query_geometry,
    ):
        with pytest.raises(InputError, match="there are no sinks"):
            function(lens(), [prompt()], empty, **QUIET)
        with pytest.raises(InputError, match="another token there"):
            function(lens(), [prompt(sinks=(41,))], secondary(), **QUIET)


def test_forming_layers_are_found_where_none_are_given():
    sinks = secondary("bridge", "stand_in")
    result = anatomy.neurons(lens("bridge", "stand_in"), [prompt()], sinks, **QUIET)
    assert result.data["layer"].values.tolist() == [6]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2-135m", "gemma-3-270m"])
def test_everything_on_real_models(name, tmp_path):
    model, _, tokens = real(name)
    sinks = sc.find_sinks(model, tokens[:2], **QUIET)
    own = sinks.select("secondary")
    own = Sinks(own.table[own.table["score"].notna()].reset_index(drop=True), own.prompts, own.manifest)
    args = (model, tokens[:2])
    written = anatomy.writers(*args, sinks, **QUIET)
    assert float(written.data["error"].max()) < 2e-4
    life = [
        float(written.data["agreement"].sel(sink=i, direction="start", layer=s))
        for i, s in enumerate(written.table["l_start"])
    ]
    np.testing.assert_allclose(life, 1, atol=1e-4)
    layer = 2
    carrying = anatomy.neurons(*args, own, layer=layer, **QUIET)
    assert carrying.carriers(0.5).median() <= 20
    effect = anatomy.ablate_neurons(*args, own, carrying, share=0.9, n_random=5, **QUIET)
    row = anatomy.against_random(effect).iloc[0]
    assert row.named < -0.5 and row["rank"] == 1
    results = [
        written, carrying, anatomy.mlp_stages(*args, own, layer=layer, **QUIET), anatomy.norms_by_layer(*args, sinks, **QUIET),
        anatomy.levels(sinks), anatomy.score_by_lifetime(*args, sinks, **QUIET), anatomy.key_query_geometry(*args, sinks, **QUIET),
        anatomy.matrix_entropy(*args, sinks, layers=[0, 8], **QUIET), anatomy.clustering(*args, own, **QUIET),
        anatomy.pca(*args, own, layer=layer, **QUIET), anatomy.attention_patterns(*args, sinks, **QUIET),
    ]  # fmt: skip
    for result in results:
        result.save(tmp_path / f"{result.kind}.safetensors")
        assert anatomy.Anatomy.load(tmp_path / f"{result.kind}.safetensors").plot().data
