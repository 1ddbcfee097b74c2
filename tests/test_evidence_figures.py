"""Figures of evidence and the circuit diagram hold the numbers of the results that they draw."""

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
from measured import measured

from sink_circuits import figures
from sink_circuits.claims import HYPOTHESES
from sink_circuits.errors import InputError
from sink_circuits.figures.circuit import ROLES
from sink_circuits.studies import Study
from sink_circuits.sweep_results import SweepResult

HOSTILE = "<b>&x</b>\u202e"


@pytest.fixture(scope="module")
def results():
    return measured()


@pytest.fixture(scope="module")
def claims(results):
    return results.claims


def named(figure, name):
    return [trace for trace in figure.data if trace.name == name]


def same(drawn, expected):
    np.testing.assert_allclose([np.nan if v is None else v for v in drawn], expected, rtol=1e-6, atol=1e-9)


def ends(trace, axis="x"):
    """The ends of a trace's error bars."""
    error, at = trace[f"error_{axis}"], np.array(trace[axis], dtype=float)
    up, down = (
        np.array([np.nan if v is None else v for v in side], dtype=float) for side in (error.array, error.arrayminus)
    )
    return at - down, at + up


def test_every_result_reaches_its_figure(results, claims):
    for result in (results.mass, results.paths, results.controls, claims):
        figure = result.plot()
        json.loads(figures.figure_json(figure))
        lines = figure.layout.title.text.split("<br>")
        assert len(lines) > 1
        for axis in figure.select_xaxes():
            assert axis.title.text or axis.range or figure.layout.height  # units stand on the last panel of a scale
        assert any(axis.title.text for axis in figure.select_xaxes())


# Controls.


def test_controls_stand_beside_the_effect(results):
    table = results.controls.compare()
    there = table[table["n_sinks"] > 0]
    figure = figures.controls_figure(results.controls)
    (effect,), (control,), (difference,) = (named(figure, name) for name in ("sinks", "control", "difference"))
    same(effect.x, there["effect"])
    same(control.x, there["control_effect"])
    same(difference.x, there["difference"])
    low, high = ends(difference)
    same(low, there["low"])
    same(high, there["high"])
    labels = figure.layout.yaxis.ticktext
    assert [label.split("<br>")[0] for label in labels] == there["control"].tolist()
    assert labels[-1].endswith(f"rank {there['rank'].iloc[-1]:.0f} of 4")
    missing = set(table["control"]) - set(there["control"])
    title = figure.layout.title.text.replace("<br>", " ")
    assert all(name in title for name in missing)


def test_random_perturbations_are_drawn_one_by_one(results):
    (drawn,) = named(figures.controls_figure(results.controls), "random")
    values = results.controls.data["random_log_odds"].isel(edit=0).to_pandas()
    by_prompt = values.groupby(results.controls.table["prompt"].to_numpy()).mean().mean()
    same(drawn.x, by_prompt)
    rank = 1 + int((np.array(drawn.x) <= results.controls.compare()["effect"].iloc[-1]).sum())
    assert rank == results.controls.compare()["rank"].iloc[-1]


def test_controls_refuse_what_they_do_not_hold(results):
    with pytest.raises(InputError, match="was not measured"):
        figures.controls_figure(results.controls, "loss")
    nothing = results.controls.data.copy(deep=True)
    kinds = (
        ("control", "no control matched"),
        ("effect", "no sink has a defined effect on 'log_odds': too few queries"),
    )
    for kind, message in kinds:  # without controls, then without effects too
        for name in nothing.data_vars:
            if kind == "effect" or not str(name).startswith("effect"):
                nothing[name][...] = np.nan
        empty = dataclasses.replace(results.controls, data=nothing.copy(deep=True))
        with pytest.raises(InputError, match=message):
            figures.controls_figure(empty)


def test_a_layer_map_shows_the_range_of_its_controls(results):
    figure = figures.layer_map_figure(results.layer_map, "log_odds", results.controls)
    prompts, ends = results.controls.table["prompt"], []
    for name in ("same token", "same range", "norm matched", "wrong layer"):
        values = results.controls.data["control_log_odds"].sel(control=name).isel(edit=0).to_pandas()
        ends += values.groupby(prompts.to_numpy()).mean().dropna().tolist()
    (band,) = [shape for shape in figure.layout.shapes if shape.type == "rect" and shape.fillcolor == "#5a5a5a"]
    # An interval over two prompts cannot reach beyond them.
    assert min(ends) - 1e-6 <= band.y0 <= band.y1 <= max(ends) + 1e-6
    said = figure.layout.title.text.replace("<br>", " ")
    edit = results.controls.data["edit"].values[0]
    assert "Grey band" in said and ("of the removal at" if edit == "zero" else f"of the edit “{edit}” at") in said
    assert "one prompt's mean" not in said
    few = results.controls.data.copy(deep=True)
    few["control_log_odds"].loc[{"control": "same range", "sink": prompts.index[prompts != prompts.iloc[0]]}] = np.nan
    one = figures.layer_map_figure(results.layer_map, "log_odds", dataclasses.replace(results.controls, data=few))
    assert "same range: one prompt's mean" in one.layout.title.text.replace("<br>", " ")
    without = figures.layer_map_figure(results.layer_map, "log_odds")
    assert "Grey band" not in without.layout.title.text.replace("<br>", " ")


# Many edits, attributions, sweeps.


def test_many_edits_stand_one_below_the_other(results):
    effect = results.many
    assert effect.data.sizes["edit"] > figures.MAX_EDITS
    other = type(effect)("directions", effect.data, effect.table, effect.manifest)  # a dose-response has its own figure
    figure = other.plot("log_odds")
    (trace,) = named(figure, "effect")
    own = other.summary()
    own = own[own["outcome"] == "log_odds"]
    same(trace.x, own["effect"])
    low, high = ends(trace)
    same(low, own["low"])
    same(high, own["high"])
    assert list(figure.layout.yaxis.ticktext) == [str(edit) for edit in own["edit"]]


def test_attributed_effects_stand_beside_exact_ones(results):
    """As far as a layer's attention reads a sink: later layers have no attribution, and are no empty half of the figure."""
    figure, prompts = results.attribution.plot(), results.attribution.table["prompt"].to_numpy()
    data = results.attribution.data.isel(layer=slice(0, int(results.attribution.table["l_end"].max()) + 1))
    assert np.isfinite(data["attribution"]).all("sink")[-1]
    assert not np.isfinite(results.attribution.data["attribution"]).isel(layer=slice(data.sizes["layer"], None)).any()
    for name, label in (("exact", "exact removal"), ("attribution", "attributed")):
        (line,) = named(figure, label)
        same(line.y, data[name].to_pandas().groupby(prompts).mean().mean())
    (dots,) = named(figure, "sink and layer")
    same(dots.x, data["exact"].to_numpy().ravel())
    same(dots.y, data["attribution"].to_numpy().ravel())


def test_a_sweep_is_drawn_by_layer_and_factor(tmp_path):
    """The table of a sweep, written here: effects of two layers and three factors at sinks of six prompts."""
    cells = [
        {"prompt": f"p{i}", "layers": str(layer), "factor": factor, "effect": layer - factor + 0.1 * i, "clean": -4.0}
        for i in range(6) for layer in (6, 7) for factor in (0.0, 1.0, 2.0)
    ]  # fmt: skip
    table = pd.DataFrame(cells).assign(model="a/m", intervention="rescale", outcome="log_odds")
    table["edited"] = table["clean"] + table["effect"]
    study = Study(("a/m",), factors=(0.0, 1.0, 2.0))
    sweep = SweepResult(study, tmp_path, pd.DataFrame({"state": ["done", "failed"]}), table)
    figure, summary = sweep.plot(), sweep.summary(["log_odds"])
    assert [trace.name for trace in figure.data] == ["factor 0", "factor 2"]  # 1 is the clean model
    for trace, factor in zip(figure.data, (0.0, 2.0), strict=True):
        own = summary[summary["factor"] == factor]
        same(trace.y, [6.25 - factor, 7.25 - factor])
        low, high = ends(trace, "y")
        same(low, own["low"])
        same(high, own["high"])
    assert figure.layout.annotations[0].text == "m, rescale"
    with pytest.raises(InputError, match="no cell of this sweep has a defined effect"):
        figures.sweep_figure(SweepResult(study, tmp_path, sweep.cells, table.assign(effect=np.nan)))


# Paths and mass.


@pytest.mark.parametrize("outcome", ["log_odds", "score"])
def test_paths_are_nested_and_add_up(results, outcome):
    figure = results.paths.plot(outcome)
    table = results.paths.summary()
    table = table[table["outcome"] == outcome]
    held = table["part"].str.endswith("norm scales held")
    for kind in ("path", "held path", "step", "hold"):
        (trace,) = named(figure, kind)
        own = table[held] if kind == "held path" else table[(table["kind"] == kind) & ~held]
        same(trace.x, own["effect"])
        low, high = ends(trace)
        same(low, own["low"])
        same(high, own["high"])
    assert sum(named(figure, "step")[0].x) == pytest.approx(named(figure, "path")[0].x[-1], rel=1e-5)
    assert "left over" in figure.layout.yaxis3.ticktext[-1]
    assert figure.layout.xaxis.range == figure.layout.xaxis4.range
    with pytest.raises(InputError, match="was not measured"):
        results.paths.plot("loss")


def test_mass_accounts_sum_to_zero(results):
    figure = results.mass.plot()
    table = results.mass.summary()
    above = figure.data[0]
    shown = [label.split("<br>")[0] for label in figure.layout.yaxis.ticktext]
    assert "learned sink" not in shown  # this model has none
    own = table[table["group"].isin(shown)]
    same(above.x, own["change"])
    low, high = ends(above)
    same(low, own["low"])
    same(high, own["high"])
    assert sum(above.x) == pytest.approx(0, abs=1e-6)
    by_layer = np.array([[0 if v is None else v for v in named(figure, group)[-1].y] for group in shown], dtype=float)
    np.testing.assert_allclose(by_layer.sum(axis=0), 0, atol=1e-6)
    change = results.mass.change().mean("head").sel(group="treated").isel(edit=0).to_pandas()
    same(named(figure, "treated")[0].y, change.groupby(results.mass.table["prompt"].to_numpy()).mean().mean())


def test_an_account_without_a_defined_value_is_an_empty_figure(results):
    """Every sink too near the end of its text for any query set: nothing is drawn, and nothing fails."""
    account = dataclasses.replace(results.mass, data=results.mass.data.copy())
    for name in ("mass", "clean_mass"):
        account.data[name] = account.data[name] * np.nan
    figure = account.plot()
    assert all(value is None for value in figure.data[0].x)
    assert "Nothing is defined" in figure.layout.title.text


def test_members_differ_in_more_than_colour(results):
    lines = [trace for trace in results.mass.plot().data[1:] if trace.mode == "lines+markers"]
    looks = [(trace.line.dash, trace.marker.symbol) for trace in lines]
    assert len(set(looks)) == len(looks) > 3


# Claims.


def test_claims_draw_estimates_intervals_margins_and_verdicts(claims):
    figure = claims.plot()
    assert set(claims.table["holds"]) == {"yes", "no", "small", "open"}
    drawn = []
    for state, name in (("yes", "holds"), ("no", "fails"), ("small", "small"), ("open", "open")):
        traces = named(figure, name)
        own = claims.table[claims.table["holds"] == state]
        same([x for trace in traces for x in trace.x], own["estimate"])
        low, high = (np.concatenate(side) for side in zip(*(ends(trace) for trace in traces), strict=True))
        same(low, own["low"])
        same(high, own["high"])
        drawn.append(traces[0].marker.symbol)
    assert len(set(drawn)) == 4
    margins = {(trace.xaxis, trace.y[0]): trace.x for trace in named(figure, "margin")}
    assert len(margins) == sum(h.margin is not None for h in HYPOTHESES)
    assert {x[1] for x in margins.values()} == {h.margin for h in HYPOTHESES if h.margin is not None}
    titles = [annotation.text for annotation in figure.layout.annotations]
    assert [title.split("<br>")[-1] for title in titles] == [
        f"<b>{verdict}</b>" for verdict in claims.verdicts["verdict"][: len(titles)]
    ]


# The circuit of a sink.


def test_circuit_edges_are_the_measured_weights(results):
    writers, sink = results.writers, int(np.flatnonzero(results.writers.table["kind"] == "secondary")[0])
    edges = figures.circuit_edges(writers, results.neurons, results.key_query_geometry, sink=sink)
    top = writers.top(50)
    top = top[top["sink"] == sink].set_index(["role", "component"])["share"]
    for edge in edges[edges["role"].isin(["writer", "carrier", "eraser"])].itertuples():
        assert edge.weight == top[edge.role, edge.component]
        assert (edge.weight < 0) == (edge.role == "eraser")
    named_neurons = edges[edges["role"] == "neuron"]
    write = results.neurons.data["write"][0].to_numpy()
    share = np.sort(write / float(results.neurons.data["contribution"][0]))[::-1]
    np.testing.assert_allclose(named_neurons["weight"], share[share > 0][: len(named_neurons)], rtol=1e-5)
    assert set(named_neurons["target"]) == {"L6 mlp"}
    assert "L6 mlp" in edges["component"].tolist()
    readers = edges[edges["role"] == "reader"].sort_values("weight", ascending=False)
    assert readers["weight"].tolist() == sorted(
        results.key_query_geometry.data["score"][0].to_numpy().tolist(), reverse=True
    )
    assert edges["layer"].is_monotonic_increasing


def test_the_diagram_draws_every_edge_with_its_weight(results):
    sink = int(np.flatnonzero(results.writers.table["kind"] == "secondary")[0])
    args = (results.writers, results.neurons, results.key_query_geometry)
    edges, figure = figures.circuit_edges(*args, sink=sink), figures.circuit_figure(*args, sink=sink)
    for role, (name, _, dash) in ROLES.items():
        drawn = sorted(trace.customdata[0] for trace in named(figure, name))
        np.testing.assert_allclose(drawn, sorted(edges.loc[edges["role"] == role, "weight"]))
        assert all(trace.line.dash == dash for trace in named(figure, name))
    text = [annotation.text for annotation in figure.layout.annotations]
    for edge in edges.itertuples():
        assert any(edge.component.replace(" mlp", " MLP").replace("embed", "embedding") in one for one in text)
    heights = [annotation.y for annotation in figure.layout.annotations if annotation.x == 0]
    assert len(set(heights)) == len(heights)  # no two boxes in one place
    stream = [trace.customdata[0] for trace in named(figure, "residual stream")]
    assert stream[0] == 0 and 0 <= min(stream) <= max(stream) <= 1
    widths = [trace.line.width for trace in named(figure, "residual stream")]
    assert np.argsort(widths).tolist() == np.argsort(stream).tolist()


def test_the_stream_comes_to_a_row_as_what_stands_before_its_layer(results):
    """A head reads what the layers below it left, not what the MLP of its own layer is about to take away."""
    sink = int(np.flatnonzero(results.writers.table["kind"] == "secondary")[0])
    figure = figures.circuit_figure(results.writers, None, results.key_query_geometry, sink=sink)
    edges = figures.circuit_edges(results.writers, None, results.key_query_geometry, sink=sink)
    so_far = results.writers.so_far().sel(sink=sink, direction="life").to_numpy()
    stream = [trace.customdata[0] for trace in named(figure, "residual stream")]
    assert len(stream) == len(edges) + 1 and (edges["role"] == "reader").any() and (edges["role"] == "eraser").any()
    for edge, share in zip(edges.itertuples(), stream[:-1], strict=True):
        if edge.layer > 0:
            np.testing.assert_allclose(share, np.clip(so_far[edge.layer - 1] / so_far.max(), 0, 1), atol=1e-6)
    np.testing.assert_allclose(stream[-1], np.clip(so_far[edges["layer"].max()] / so_far.max(), 0, 1), atol=1e-6)


def test_an_mlp_whose_neurons_are_shown_is_there_though_it_writes_nothing(results):
    """As MLP 0 of SmolLM2: sinks hang on it, but it writes none of their direction."""
    sink = int(np.flatnonzero(results.writers.table["kind"] == "secondary")[0])
    start = int(results.writers.table["l_start"].iloc[sink])
    excess = results.writers.excess().sel(sink=sink, direction="start")
    layer = min(range(start + 1), key=lambda one: float(excess.sel(component=f"L{one} mlp")))
    data = results.neurons.data.assign(layer=("sink", np.full(len(results.neurons.table), layer)))
    elsewhere = dataclasses.replace(results.neurons, data=data)
    edges = figures.circuit_edges(results.writers, elsewhere, sink=sink)
    (edge,) = edges[edges["component"] == f"L{layer} mlp"].itertuples()
    whole = float(results.writers.so_far().sel(sink=sink, direction="start", layer=start))
    assert edge.role == "writer"
    assert edge.weight == pytest.approx(float(excess.sel(component=f"L{layer} mlp")) / whole, abs=1e-9)
    figure = figures.circuit_figure(results.writers, elsewhere, sink=sink)
    (box,) = [one for one in figure.layout.annotations if one.text == f"L{layer} MLP"]
    lines = named(figure, "neuron")
    assert lines and all(line.y[0] == box.y > line.y[1] for line in lines)
    assert "0%" in [one.text for one in figure.layout.annotations]  # neither +0% nor −0%
    against = dataclasses.replace(elsewhere, data=data.assign(contribution=-abs(data["contribution"])))
    figure = figures.circuit_figure(results.writers, against, sink=sink)
    assert not named(figure, "neuron")
    said = f"shares of neurons (MLP {layer} writes nothing along the direction, or against it)"
    assert said in figures.look.title_of(figure)[1]


def test_writes_are_means_over_prompts_with_the_interval_of_their_sum(results):
    writers = results.writers
    rows = np.flatnonzero((writers.table["kind"] == "secondary").to_numpy())
    prompts = writers.table["prompt"].iloc[rows].tolist()
    assert len(set(prompts)) == 2 and len(prompts) == 3  # means over sinks would be others
    so_far = writers.so_far().sel(direction="life").to_numpy()[rows]
    by_prompt = np.stack([so_far[[one == name for one in prompts]].mean(axis=0) for name in dict.fromkeys(prompts)])
    figure = writers.plot()
    panel = [f"{one.text}" for one in figure.layout.annotations if one.text.startswith("secondary")]
    assert panel == ["secondary sinks (n = 3)"]
    (line,) = [one for one in named(figure, "written so far") if np.allclose(one.y, by_prompt.mean(axis=0), rtol=1e-5)]
    low, high = ends(line, "y")
    same(low, by_prompt.min(axis=0))  # an interval over two prompts is their range
    same(high, by_prompt.max(axis=0))
    written = [np.array(one.y) for one in figure.data if one.type == "bar" and one.yaxis == line.yaxis]
    by_layer = np.zeros(len(line.x))
    for bar in [one for one in figure.data if one.type == "bar" and one.yaxis == line.yaxis]:
        for layer, value in zip(bar.x, bar.y, strict=True):
            by_layer[max(layer, 0)] += value
    assert len(written) == 3
    np.testing.assert_allclose(np.cumsum(by_layer), line.y, rtol=1e-4, atol=1e-3 * np.abs(line.y).max())


def test_a_share_of_nothing_is_not_drawn(results):
    """The share of a write along the direction means nothing where the MLP writes none, or against it."""
    write = results.neurons.data["write"].to_numpy().copy()
    write[0] = -write[0]
    turned = dataclasses.replace(results.neurons, data=results.neurons.data.assign(write=(("sink", "neuron"), write)))
    figure = turned.plot()
    (lines,) = named(figure, "secondary sinks")
    drawn = np.array([value for value in lines.y if value is not None])
    assert sum(value is None for value in lines.y) == len(results.neurons.table) - 1 and (drawn > 0).all()
    assert "Of 1 sink the MLP writes nothing along the direction, or against it" in figures.look.title_of(figure)[1]
    assert "writes nothing" not in figures.look.title_of(results.neurons.plot())[1]


def test_what_was_taken_out_with_the_neurons_is_said(results):
    note = figures.look.title_of(results.ablate_neurons.plot("log_odds"))[1]
    assert "neurons (named: the 1 with the largest writes; random: as many others) edited" in note


def test_norm_scales_held_leave_the_other_scales_alone(results):
    """With held scales an effect can be many times as large; the parts of the total must stay legible beside it."""
    paths = results.paths
    figure = paths.plot()
    assert figure.layout.xaxis.range == figure.layout.xaxis3.range == figure.layout.xaxis4.range
    table = paths.summary()
    own = table[(table["outcome"] == "log_odds") & ~table["part"].str.endswith("norm scales held")]
    low, high = figure.layout.xaxis.range
    assert (high - low) <= 1.11 * (
        max(0, own[["effect", "high"]].max().max()) - min(0, own[["effect", "low"]].min().min())
    )


def test_bars_are_of_as_many_prompts_as_they_are():
    assert figures.look.bars(pd.DataFrame({"n_prompts": [0, 3, 3, 1]})) == "Bars: 95% interval over 3 prompts."
    assert figures.look.bars(pd.DataFrame({"n_prompts": [1, 2, 4]})) == "Bars: 95% interval over 2 to 4 prompts."
    assert figures.look.bars(pd.DataFrame({"n_prompts": [1, 0]})) == "Too few prompts for an interval."
    assert figures.look.bars(pd.DataFrame({"n_prompts": []})) == "Too few prompts for an interval."


def test_the_diagram_says_what_was_not_measured(results):
    primary = int(np.flatnonzero(results.writers.table["kind"] == "primary")[0])
    title = figures.circuit_figure(results.writers, results.neurons, sink=primary).layout.title.text.replace(
        "<br>", " "
    )
    assert "Not measured: neurons and readers." in title
    with pytest.raises(InputError, match="sink = 99: at most 4"):
        figures.circuit_figure(results.writers, sink=99)


def test_tokens_in_the_diagram_stay_text(results):
    writers = type(results.writers)(
        results.writers.data, results.writers.table.assign(token=HOSTILE, prompt=HOSTILE), results.writers.manifest
    )
    text = figures.circuit_figure(writers).to_json()
    assert "<b>&x" not in text and "\\u202e" not in text
    assert "&lt;b&gt;" in text or "\\u0026lt;b" in text
