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
    for name in nothing.data_vars:
        nothing[name][...] = np.nan
    empty = type(results.controls)(nothing, results.controls.table, results.controls.matches, results.controls.manifest)
    with pytest.raises(InputError, match="no control matched"):
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
    assert "Grey band" in figure.layout.title.text.replace("<br>", " ")
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
    figure = results.attribution.plot()
    for name, label in (("exact", "exact removal"), ("attribution", "attributed")):
        (line,) = named(figure, label)
        values = (
            results.attribution.data[name]
            .to_pandas()
            .groupby(results.attribution.table["prompt"].to_numpy())
            .mean()
            .mean()
        )
        same(line.y, values)
    (dots,) = named(figure, "sink and layer")
    same(dots.x, results.attribution.data["exact"].to_numpy().ravel())
    same(dots.y, results.attribution.data["attribution"].to_numpy().ravel())


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
