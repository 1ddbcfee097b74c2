"""Experiments on planted circuits against a forward pass by hand, and their tables and files on made-up effects."""

from __future__ import annotations

import functools
import math

import eager
import hand
import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from common import BACKENDS, REAL, SINK, by_hand, lens, no_forward_pass, prompt, real, real_run, subject
from treated import TEXTS, TREATED, secondary, secondary_of_one

import sink_circuits as sc
from sink_circuits.edits import Edit
from sink_circuits.effects import interaction
from sink_circuits.errors import InputError
from sink_circuits.experiments import mean_contributions, resolve_layers

PATHS = [("bridge", "fast"), (BACKENDS[-1], "reference")]  # test_runs.py has every pair


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
