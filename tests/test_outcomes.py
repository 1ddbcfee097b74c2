"""Outcomes: built-in ones and a user's own against numbers by hand, and the worked example, run as it is printed."""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import math
import re
import sys
from pathlib import Path

import hand
import numpy as np
import pytest
import torch
from common import BACKENDS, REAL, SINK, by_hand, lens, prompt, real, subject
from hypothesis import given
from hypothesis import strategies as st

import sink_circuits as sc
from sink_circuits import measurement, outcomes
from sink_circuits.clean_runs import CleanRun, Columns
from sink_circuits.edited_runs import EditedRun
from sink_circuits.errors import InputError
from sink_circuits.outcomes import Definitions, Medians, Outcome, as_outcomes, key_column, resid_post_at

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "your_own_intervention_and_outcome.md"
TEXTS = (prompt(), prompt((30, 55), 96, "b"))
PATHS = [("bridge", "fast"), (BACKENDS[-1], "reference")]


@functools.cache
def found(backend: str = "bridge") -> sc.Sinks:
    return sc.find_sinks(lens(backend), list(TEXTS), verbose=False)


@functools.cache
def run(text: int, *edits: tuple) -> hand.Run:
    return by_hand(TEXTS[text], {(layer, pos): how for layer, pos, how in edits})


def ablated(**options) -> sc.Effect:
    return sc.ablate(lens(), list(TEXTS), found().select("secondary"), layers=[6, 7], verbose=False, **options)


def edits_of(sink) -> tuple:
    """What `ablated` does to this sink, by hand."""
    return (6, sink.pos, 0.0), (7, sink.pos, 0.0)


# ---------------------------------------------------------------------------------------------------------- lifetime
def lower_median(values: np.ndarray, axis: int) -> np.ndarray:
    ordered = np.sort(values, axis=axis)
    return ordered.take((values.shape[axis] - 1) // 2, axis=axis)


def longest_shared(states: str, bridge: int, min_lifetime: int, start: int, end: int) -> int:
    """The lifetime from a string of 0 and 1, one per layer."""
    best, shared = 0, 0
    for match in re.finditer(rf"1(?:0{{0,{bridge}}}1)*", states):
        first, last = match.start(), match.end() - 1
        both = len(set(range(first, last + 1)) & set(range(start, end + 1)))
        if last - first + 1 >= min_lifetime and both > shared:
            best, shared = last - first + 1, both
    return best


def lifetime_by_hand(sink, edits: tuple) -> int:
    text = int(sink.prompt[-1])
    clean, edited = run(text).residuals.numpy(), run(text, *edits).residuals.numpy()
    states = ""
    for before, after in zip(clean, edited, strict=True):
        median, norm = lower_median(before, 0), lower_median(np.linalg.norm(before, axis=1), 0)
        one, primary = after[sink.pos] - median, before[sink.primary_pos] - median
        cosine = one @ primary / np.linalg.norm(one) / np.linalg.norm(primary)
        ratios = np.linalg.norm(after[sink.pos]) / norm, np.linalg.norm(before[sink.primary_pos]) / norm
        states += str(int(cosine > 0.9 and min(ratios) > 2.5))
    return longest_shared(states, 1, 2, sink.l_start, sink.l_end)


@pytest.mark.parametrize(("backend", "path"), PATHS)
def test_lifetime_is_what_the_geometry_says_by_hand(backend, path):
    """The stand-in's sink lives a layer less, without the eraser a sink lives on, one that is wiped out comes back no more."""
    changes = {
        "none": (), "first": ((6, 0.0),), "both": ((6, 0.0), (7, 0.0)), "eraser": ((13, 0.0),), "half": ((6, 0.5), (7, 0.5)),
        "little": ((6, 0.1), (7, 0.1)),
    }  # fmt: skip
    wipe = -80 * subject().truth.direction  # leaves the sink state at layer 9 and comes back at 12

    def edits(label, row):
        if label == "gap":
            return tuple(sc.custom(layer, row.pos, lambda c, s=s: c + s * wipe) for layer, s in ((9, 1), (12, -1)))
        return tuple(sc.rescale(layer, row.pos, how) for layer, how in changes[label])

    def by_hand_too(label, sink) -> tuple:
        if label == "gap":
            return tuple((layer, sink.pos, lambda c, s=s: c + s * wipe.double()) for layer, s in ((9, 1), (12, -1)))
        return tuple((layer, sink.pos, how) for layer, how in changes[label])

    labels = [*changes, "gap"]
    sinks = found(backend).select("secondary")
    effect = sc.measure(lens(backend), list(TEXTS), sinks, labels, edits, what="mine", path=path, verbose=False)
    life = subject().truth.sink("secondary")
    assert (effect.data["clean_lifetime"] == life.l_end - life.l_start + 1).all()
    for index, sink in effect.table.iterrows():
        for label in labels:
            measured = effect.data["lifetime"].sel(sink=index, edit=label).item()
            assert measured == lifetime_by_hand(sink, by_hand_too(label, sink)), (label, index)
    mean = effect.over_lifetime("lifetime", "edited").mean("sink").to_series()
    assert mean["first"] == 6 and mean["both"] == mean["little"] == 0 and 0 < mean["half"] <= 7
    assert mean["eraser"] > 7 and 0 < mean["gap"] < 6


def test_clean_lifetime_is_that_of_the_sink_table():
    """The primary too, whose runs are cut into phases."""
    effect = sc.measure(lens(), list(TEXTS), found(), ["none"], lambda label, row: (), what="nothing", verbose=False)
    assert set(effect.table["kind"]) == {"primary", "secondary"}
    assert effect.data["clean_lifetime"].values.tolist() == effect.table["lifetime"].tolist()
    assert (effect.effect("lifetime") == 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_real_models_clean_lifetimes_are_those_of_the_sink_table(name):
    model, _, tokens = real(name)
    sinks = sc.find_sinks(model, tokens, verbose=False)
    effect = sc.measure(model, tokens, sinks, ["none"], lambda label, row: (), what="nothing", verbose=False)
    assert len(sinks) > 5
    assert effect.data["clean_lifetime"].values.tolist() == effect.table["lifetime"].tolist()


def test_lifetime_follows_the_thresholds_the_sinks_were_found_with():
    strict = sc.find_sinks(lens(), list(TEXTS), min_lifetime=7, verbose=False).select("secondary")
    cut = {"layer": 6, "verbose": False}  # the stand-in's sink lives for 6 layers
    assert (sc.ablate(lens(), list(TEXTS), found().select("secondary"), **cut).data["lifetime"] == 6).all()
    assert (sc.ablate(lens(), list(TEXTS), strict, **cut).data["lifetime"] == 0).all()


@given(
    states=st.lists(st.booleans(), min_size=1, max_size=12), life=st.tuples(st.integers(0, 11), st.integers(0, 11)),
    bridge=st.integers(0, 2), min_lifetime=st.integers(1, 4),
)  # fmt: skip
def test_the_sinks_own_run_is_the_one_that_shares_most_layers(states, life, bridge, min_lifetime):
    start, end = sorted(life)
    along = torch.tensor([3.0, 0.0]).expand(len(states), 2)
    resid = torch.stack([along, torch.where(torch.tensor(states)[:, None], along, along.flip(-1))], dim=1)
    nothing = torch.zeros(len(states), 1, 1, 2)
    clean = CleanRun(torch.zeros(2), resid, torch.zeros_like(resid), None, None, None, None, None, None, "fast")
    edited = EditedRun((), Columns((0, 1), nothing, nothing), resid, None, "fast")
    how = Definitions(
        (), 1, sc.Thresholds(bridge=bridge, min_lifetime=min_lifetime), Medians(resid[:, 0] * 0, torch.ones(len(states)))
    )  # fmt: skip
    sink = found().table.iloc[0].copy()
    sink[["pos", "primary_pos", "l_start", "l_end"]] = 1, 0, start, end
    expected = longest_shared("".join(str(int(state)) for state in states), bridge, min_lifetime, start, end)
    assert outcomes.lifetime(how, clean, edited, sink) == expected


# -------------------------------------------------------------------------------------------------------------- KL
@pytest.mark.parametrize("path", ["fast", "reference"])
def test_kl_is_that_of_the_next_token_distributions(path):
    effect = ablated(kl=True, path=path)
    assert effect.outcomes == ("score", "log_odds", "primary_score", "primary_log_odds", "lifetime", "kl")
    assert (effect.data["clean_kl"] == 0).all()
    for index, sink in effect.table.iterrows():
        text = int(sink.prompt[-1])
        p, q = (run(text, *edits).logits.log_softmax(-1) for edits in ((), edits_of(sink)))
        expected = (p.exp() * (p - q)).sum(-1)[sink.pos : -1].mean().item()
        assert effect.data["kl"].sel(sink=index, edit="zero").item() == pytest.approx(expected, rel=1e-3, abs=1e-7)
        assert expected > 0
    options = {"layer": 6, "factors": [1], "kl": True, "path": path, "verbose": False}
    same = sc.dose_response(lens(), list(TEXTS), found().select("secondary"), **options)
    assert (same.data["kl"] == 0).all()


# ----------------------------------------------------------------------------------------------------- a user's own
def by_query(clean, edited, sink):
    """[]: attention of the last query on the sink, summed over layers and heads."""
    return key_column(edited, sink.pos).log_attention[:, :, -1, 0].exp().sum()


def by_layer(clean, edited, sink):
    """[layer]: how far the sink's residual stream is from the clean one, per norm of that."""
    before = resid_post_at(clean, sink.pos)
    return (resid_post_at(edited, sink.pos) - before).norm(dim=-1) / before.norm(dim=-1)


def by_head(clean, edited, sink):
    """[layer, head]: the largest attention of a later query on the sink."""
    return key_column(edited, sink.pos).log_attention[:, :, sink.pos + 1 :, 0].exp().amax(-1)


def own_by_hand(sink, edits: tuple) -> dict[str, torch.Tensor]:
    text = int(sink.prompt[-1])
    result, clean = run(text, *edits), run(text)
    before, after = clean.residuals[:, sink.pos], result.residuals[:, sink.pos]
    return {
        "by_query": result.pattern[:, :, -1, sink.pos].sum(),
        "by_layer": (after - before).norm(dim=-1) / before.norm(dim=-1),
        "by_head": result.pattern[:, :, sink.pos + 1 :, sink.pos].amax(-1),
    }


@pytest.mark.parametrize("how", ["functions", "names", "outcomes"])
def test_outcomes_of_ones_own_equal_numbers_by_hand(how):
    functions = [by_query, by_layer, by_head]
    named = {function.__name__: function for function in functions}
    given = {
        "functions": functions, "names": named, "outcomes": [Outcome(n, f, f.__doc__) for n, f in named.items()],
    }  # fmt: skip
    effect = ablated(outcomes=given[how])
    for index, sink in effect.table.iterrows():
        clean, edited = own_by_hand(sink, ()), own_by_hand(sink, edits_of(sink))
        for name in named:
            for expected, measured in (
                (clean, effect.data[f"clean_{name}"]),
                (edited, effect.data[name].sel(edit="zero")),
            ):
                difference = torch.tensor(measured.sel(sink=index).values) - expected[name]
                assert difference.abs().max() < 2e-5 * max(1, float(expected[name].max())), name
    meaning = by_head.__doc__ if how == "outcomes" else f"{__name__}:by_head"
    assert effect.manifest.settings["outcomes"]["by_head"] == meaning


def test_outcomes_of_ones_own_rank_with_the_built_in_ones(tmp_path):
    effect = ablated(outcomes=[by_query, by_layer, by_head], loss=True)
    built_in = ("score", "log_odds", "primary_score", "primary_log_odds", "lifetime", "loss")
    assert effect.outcomes == (*built_in, "by_head", "by_layer", "by_query")
    assert effect.summary()["outcome"].tolist() == list(effect.outcomes)
    changes = []
    for index, sink in effect.table.iterrows():
        clean, edited = own_by_hand(sink, ()), own_by_hand(sink, edits_of(sink))
        reads = slice(7, 14)  # the layers above the edit that read it
        expected = {name: edited[name] - clean[name] for name in clean}
        means = {
            "by_query": expected["by_query"],
            "by_layer": expected["by_layer"][reads],
            "by_head": expected["by_head"][reads],
        }
        changes.append({name: value.mean().item() for name, value in means.items()})
        for name, value in changes[-1].items():
            assert effect.over_lifetime(name).sel(sink=index, edit="zero").item() == pytest.approx(
                value, rel=1e-4, abs=1e-6
            )
    row = effect.summary().set_index("outcome").loc["by_head"]
    assert row.effect == pytest.approx(
        (changes[0]["by_head"] + (changes[1]["by_head"] + changes[2]["by_head"]) / 2) / 2
    )
    assert row.effect < -0.1 and (row.n_prompts, row.n_sinks) == (2, 3) and row.low <= row.effect <= row.high
    table = effect.to_dataframe()
    assert table.groupby("outcome").size()[["by_query", "by_layer", "by_head"]].tolist() == [3, 3 * 24, 3 * 24 * 4]
    assert table.query("outcome == 'by_layer'")["head"].isna().all()
    effect.save(tmp_path / "a")
    read = sc.Effect.load(tmp_path / "a")
    assert read.data.identical(effect.data) and read.outcomes == effect.outcomes
    assert read.manifest == effect.manifest


def test_clean_values_are_those_of_a_run_without_edits():
    seen = []

    def edits(clean, edited, sink):
        seen.append((len(edited.edits), edited.resid_post_chosen.shape[1], edited.loss is None, edited.kl is None))
        return 0

    effect = ablated(outcomes=[edits])
    assert seen == [(0, 2, True, True), (2, 2, True, True), *[(0, 3, True, True)] * 2, *[(2, 3, True, True)] * 2]
    assert (effect.effect("edits") == 0).all()
    seen.clear()
    ablated(outcomes=[edits], loss=True, kl=True)
    assert {state[2:] for state in seen} == {(False, False)}


def test_undefined_values_are_left_out():
    def only_late(clean, edited, sink):
        return math.nan if sink.pos < 50 else by_query(clean, edited, sink)

    row = ablated(outcomes=[only_late]).summary().set_index("outcome").loc["only_late"]
    assert (row.n_prompts, row.n_sinks) == (1, 1) and row.effect < 0 and math.isnan(row.low)


def test_numbers_of_any_kind_are_taken():
    kinds = {
        "number": lambda clean, edited, sink: 3, "flag": lambda clean, edited, sink: torch.tensor(True),
        "array": lambda clean, edited, sink: np.arange(24), "double": lambda clean, edited, sink: torch.arange(24.0).double(),
        "gradient": lambda clean, edited, sink: torch.ones((), requires_grad=True) * 2,
    }  # fmt: skip
    data = ablated(outcomes=kinds).data
    assert [data[name].values.ravel()[-1] for name in kinds] == [3, 1, 23, 23, 2]
    assert {data[name].dtype for name in kinds} == {np.dtype("float32")}


def broken(clean, edited, sink):
    raise KeyError("no such thing\nat all")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (broken, rf"outcome 'mine' failed at position {SINK} of prompt 'prompt-0' \(KeyError: 'no such thing.*\): mend its"),
        (lambda clean, sink: 1, r"outcome 'mine' failed .*TypeError: .*positional argument"),
        (lambda clean, edited, sink: None, "outcome 'mine' failed"),
        (lambda clean, edited, sink: "high", "outcome 'mine' failed"),
        (lambda clean, edited, sink: torch.zeros(4), r"shape \[4\]: return \[\], \[layer\] = \[24\] or \[layer, head\] = \[24, 4\]"),
        (lambda clean, edited, sink: torch.zeros(4, 24), r"'mine' returned shape \[4, 24\]"),
        (lambda clean, edited, sink: torch.zeros(1, 24, 4), r"'mine' returned shape \[1, 24, 4\]"),
        (lambda clean, edited, sink: math.inf, "'mine' returned infinite .*: return real ones, NaN where undefined"),
        (lambda clean, edited, sink: 1e60, "'mine' returned infinite .or too large for float32"),
        (lambda clean, edited, sink: 1j, "'mine' returned complex values"),
        (lambda clean, edited, sink: edited.columns.log_attention.exp_().mean(), "'mine' writes into the runs it is shown"),
        (lambda clean, edited, sink: clean.base[3].mul_(2).mean(), "'mine' writes into the runs it is shown"),
        (lambda clean, edited, sink: key_column(edited, 3).log_attention.sum(), r"on position 3: it was made with chosen=\(0, 40\)"),
        (lambda clean, edited, sink: resid_post_at(edited, 3).sum(), r"no residual stream at position 3: only at \(0, 40\)"),
    ],
)  # fmt: skip
def test_outcomes_that_do_not_work_are_refused_before_any_edited_run(monkeypatch, function, message):
    monkeypatch.setattr(measurement, "run_edited", None)
    with pytest.raises(InputError, match=message) as refused:
        ablated(outcomes={"mine": function})
    assert "\n" not in str(refused.value)


def test_outcomes_that_do_not_work_are_refused_before_forming_layers_are_mapped(monkeypatch):
    monkeypatch.setattr(measurement, "run_edited", None)
    with pytest.raises(InputError, match="outcome 'broken' failed"):
        sc.ablate(lens(), list(TEXTS), found().select("secondary"), layer="forming", outcomes=[broken], verbose=False)


def test_an_outcome_has_one_shape():
    def changing(clean, edited, sink):
        return torch.zeros(24) if edited.edits else 0.0

    with pytest.raises(InputError, match=r"'changing' returned shape \[24\] here and \[\] for the first clean run"):
        ablated(outcomes=[changing])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"x": 3}, "outcome 'x' cannot be called: give a function of"),
        ([3], "outcome 'int' cannot be called"),
        ([lambda clean, edited, sink: 1], "outcome '<lambda>' has no name: give outcomes={'name': function}"),
        ({"": by_head}, "outcome '' has no name"),
        ({3: by_head}, "outcome 3 has no name"),
        ([by_head, by_head], "two outcomes are named 'by_head'"),
        ({"loss": by_head}, "outcome name 'loss' is taken: choose another"),
        ({"layer": by_head}, "outcome name 'layer' is taken"),
        ({"clean_x": by_head}, "outcome name 'clean_x' is taken"),
        ("by_head", "outcomes = 'by_head': give"),
        (by_head, "give {name: function} or a list of functions"),
    ],
)  # fmt: skip
def test_outcomes_that_cannot_be_are_refused(given, message):
    with pytest.raises(InputError, match=message):
        as_outcomes(given)


# ---------------------------------------------------------------------------------------------- the worked example
def blocks(text: str) -> list[tuple[str, str, str]]:
    """(language, file name or "", content) of every fenced block of a document, in order."""
    return re.findall(r"^```(\w+)(?: file=(\S+))?\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def run_document(text: str) -> list[tuple[str, str]]:
    """Runs the blocks in the working directory, in one namespace; (printed, the text block that follows) of each."""
    said, names, out = [], {}, io.StringIO()
    for language, file, content in blocks(text):
        if file:
            Path(file).write_text(content)
        elif language == "python":
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(compile(content, str(DOCUMENT), "exec"), names)
        else:
            said.append((out.getvalue(), content))
    return said


def test_the_worked_example_prints_what_it_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    try:
        said = run_document(DOCUMENT.read_text("utf-8"))
    finally:
        sys.modules.pop("yours", None)
    assert len(said) >= 6
    for printed, expected in said:
        assert printed.strip() == expected.strip()
