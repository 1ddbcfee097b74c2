"""Mass accounts: against sums over patterns written by hand and Hugging Face's eager ones, key by key."""

from __future__ import annotations

import functools

import eager
import hand
import numpy as np
import pandas as pd
import pytest
import torch
from common import BACKENDS, SINK, by_hand, lens, no_forward_pass, prompt
from hypothesis import given
from hypothesis import strategies as st

import sink_circuits as sc
from sink_circuits.errors import InputError, ResultError
from sink_circuits.mass import GROUPS, MassAccount, key_groups, mass_account, measure_mass

N, POS = 40, 7
RUNS = [("bridge", "fast"), ("bridge", "reference"), *([("hooked", "reference")] if "hooked" in BACKENDS else [])]


def by_definition(pattern, windows, treated: int, primary: int, others=(), min_queries: int = 16) -> np.ndarray:
    """[layer, head, group], one query and one key at a time."""
    pattern = pattern.double().numpy()
    n = pattern.shape[-1]
    out = np.full((*pattern.shape[:2], len(GROUPS)), np.nan)
    for window in set(windows):
        layers = [layer for layer, own in enumerate(windows) if own == window]
        own = pattern[layers]
        queries = [q for q in range(n) if q > treated and q > primary and (window is None or q - treated < window)]
        if len(queries) < min_queries:
            continue
        totals = dict.fromkeys(GROUPS, 0.0)
        for q in queries:
            for k in range(q + 1):
                if k == q:
                    group = "self"
                elif k == treated:
                    group = "treated"
                elif k == primary:
                    group = "primary"
                elif k in others:
                    group = "other sinks"
                else:
                    group = "before" if k < treated else "after"
                totals[group] = totals[group] + own[:, :, q, k]
            totals["learned sink"] = totals["learned sink"] + 1 - own[:, :, q].sum(-1)
        for index, group in enumerate(GROUPS):
            out[layers, :, index] = totals[group] / len(queries)
    return out


@functools.cache
def planted_sinks(*sinks: int) -> sc.Sinks:
    return sc.find_sinks(lens(), prompt(sinks), verbose=False)


def sinks_of(tokens: torch.Tensor, *places: tuple[int, int]) -> sc.Sinks:
    """A table of (position, primary's position) in random text: what is measured is arithmetic, not whether they are sinks."""
    found = planted_sinks(SINK)
    rows = [
        {**found.table.iloc[0].to_dict(), "prompt": "prompt-0", "pos": pos, "primary_pos": primary, "token_id": int(tokens[pos]),
         "l_start": 0, "l_end": 2}
        for pos, primary in places
    ]  # fmt: skip
    return sc.Sinks(pd.DataFrame(rows), ("prompt-0",), found.manifest)


@pytest.mark.parametrize(("backend", "path"), RUNS)
def test_masses_are_those_by_hand(backend, path):
    """Two sinks, each the other's "other sink", in one run each."""
    tokens, known = prompt((SINK, 20)), planted_sinks(SINK, 20)
    found = mass_account(
        lens(backend), tokens, known.select("secondary"), layers=(6, 7), found=known, path=path, verbose=False
    )
    assert found.manifest.path == path
    clean = by_hand(tokens).pattern
    for sink, (pos, other) in enumerate(((20, SINK), (SINK, 20))):
        edited = by_hand(tokens, {(6, pos): 0.0, (7, pos): 0.0}).pattern
        for name, pattern in (("clean_mass", clean), ("mass", edited)):
            expected = by_definition(pattern, [None] * 24, pos, 0, (other,))
            masses = found.data[name].sel(sink=sink).squeeze().to_numpy()
            assert np.abs(masses - expected).max() < 2e-5
    assert np.abs(found.data["mass"].sum("group") - 1).max() < 1e-5
    assert np.abs(found.change().sum("group")).max() < 1e-6
    assert (found.change().isel(layer=slice(0, 7)) == 0).all(), "the edited layer is read before the edit"
    assert (found.data["n_queries"].sel(sink=1) == 96 - 1 - SINK).all()


@pytest.mark.parametrize("name", ["gemma3", "gpt-oss", "gpt-neox", "qwen3"])
def test_windows_learned_sinks_and_other_architectures(name):
    tokens, windows = eager.random_tokens(N), eager.WINDOWS[name]
    model = sc.load_model(eager.tiny(name), verbose=False)
    sinks = sinks_of(tokens, (POS, 0), (3, 9), (0, 0))  # one before the primary, one that is the primary itself
    patterns = {(): eager.forward(eager.tiny(name), tokens).pattern}
    for pos in (POS, 3, 0):
        patterns[pos] = eager.forward(eager.tiny(name), tokens, {(1, pos): 0.0}).pattern
    for path in ("fast", "reference"):
        found = mass_account(model, tokens, sinks, layer=1, min_queries=2, path=path, verbose=False)
        for sink, (pos, primary) in enumerate(((POS, 0), (3, 9), (0, 0))):
            others = {POS, 3, 0} - {pos, primary}
            for masses, pattern in (("clean_mass", patterns[()]), ("mass", patterns[pos])):
                expected = by_definition(pattern, windows, pos, primary, others, min_queries=2)
                values = found.data[masses].sel(sink=sink).squeeze().to_numpy()
                np.testing.assert_allclose(values, expected, atol=1e-5, err_msg=f"{path} {sink} {masses}")
        assert np.abs(found.change().sum("group", skipna=False)).max() < 1e-5
        learned = found.data["mass"].sel(group="learned sink")
        assert (learned > 0).all() if name == "gpt-oss" else (learned == 0).all()


@pytest.mark.parametrize("path", ["fast", "reference"])
def test_the_treated_group_has_the_sink_score(path):
    """Where the primary stands before it, both are means over the same queries; in windows too."""
    for name in ("gemma3", "llama"):
        tokens = eager.random_tokens(N)
        model = sc.load_model(eager.tiny(name), verbose=False)
        sinks = sinks_of(tokens, (POS, 0), (12, 0))
        options = {"layer": 0, "min_queries": 8, "path": path, "verbose": False}
        masses = mass_account(model, tokens, sinks, **options)
        scores = sc.ablate(model, tokens, sinks, **options)
        for mass, score in (("mass", "score"), ("clean_mass", "clean_score")):
            np.testing.assert_allclose(masses.data[mass].sel(group="treated"), scores.data[score], atol=1e-6)
        np.testing.assert_allclose(
            masses.over_lifetime().sel(group="treated"), scores.over_lifetime("score"), atol=1e-6
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("path", ["fast", "reference"])
def test_masses_sum_up_in_half_precision(dtype, path):
    """Also where TransformerLens keeps the pattern itself in half precision."""
    tokens = eager.random_tokens(N)
    model = sc.load_model(eager.tiny("gemma3").to(dtype), verbose=False)
    options = {"layer": 0, "min_queries": 2, "verbose": False}
    found = mass_account(model, tokens, sinks_of(tokens, (POS, 0)), path=path, **options)
    assert np.abs(found.data["mass"].sum("group") - 1).max() < 1e-5
    assert np.abs(found.change().sum("group")).max() < 1e-5
    exact = mass_account(
        sc.load_model(eager.tiny("gemma3"), verbose=False), tokens, sinks_of(tokens, (POS, 0)), **options
    )
    assert np.abs(found.data["mass"] - exact.data["mass"]).max() < 0.05


@given(
    st.integers(2, 30).flatmap(
        lambda n: st.tuples(
            st.just(n), st.integers(0, n - 1), st.integers(0, n - 1), st.sets(st.integers(0, n - 1)),
            st.one_of(st.none(), st.integers(1, 40)), st.integers(0, 2**30),
        )
    )
)  # fmt: skip
def test_groups_cover_every_key_once(case):
    n, treated, primary, others, window, seed = case
    groups = key_groups(n, treated, primary, others)
    pattern = torch.rand(1, 2, n, n, generator=torch.Generator().manual_seed(seed)).tril()
    pattern /= pattern.sum(-1, keepdim=True)
    assert (groups.indicator().sum(-1) == 1).all()
    found = groups.mean(
        (pattern[0] @ groups.indicator()).transpose(0, 1), pattern[0].diagonal(dim1=-2, dim2=-1), 0, window, False
    )
    expected = by_definition(pattern, [window], treated, primary, others, min_queries=1)[0]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert len(groups.queries(window)) == 0 or (found.sum(-1) - 1).abs().max() < 1e-5


@functools.cache
def result() -> MassAccount:
    tokens = sc.Tokens((prompt(), prompt((30,), 96, "b")), ("a", "b"))
    known = sc.find_sinks(lens(), tokens, verbose=False)
    return mass_account(lens(), tokens, known.select("secondary"), layers=(6, 7), found=known, verbose=False)


def test_the_summary_adds_up():
    """What the planted secondary sink loses goes to the primary, in the layers in which both live."""
    summary = result().summary().set_index("group")
    assert list(summary.index) == list(GROUPS)
    np.testing.assert_allclose(summary["edited"] - summary["clean"], summary["change"], atol=1e-9)
    assert summary["change"].sum() == pytest.approx(0, abs=1e-6)
    assert summary.loc["treated", "change"] < -0.1
    assert summary.loc["primary", "change"] > 0.5 * -summary.loc["treated", "change"]
    assert (summary["n_prompts"] == 2).all() and (summary["n_sinks"] == 2).all()
    assert (summary["low"] <= summary["change"] + 1e-12).all() and (summary["change"] <= summary["high"] + 1e-12).all()
    frame = result().to_dataframe()
    assert len(frame) == 2 * 24 * 4 * len(GROUPS)
    np.testing.assert_allclose(frame["change"], frame["edited"] - frame["clean"], atol=1e-7)
    with pytest.raises(InputError, match="'change' is unknown: use 'effect', 'edited' or 'clean'"):
        result().over_lifetime(what="change")


def test_a_result_comes_back_from_its_file(tmp_path):
    result().save(tmp_path / "mass.safetensors")
    back = MassAccount.load(tmp_path / "mass.safetensors")
    assert back.data.equals(result().data) and back.table.equals(result().table)
    assert back.manifest == result().manifest
    sc.ablate(lens(), prompt(), planted_sinks(SINK), layer=6, verbose=False).save(tmp_path / "effect.safetensors")
    with pytest.raises(ResultError, match="is not a mass account"):
        MassAccount.load(tmp_path / "effect.safetensors")


def test_several_edits_and_one_that_changes_nothing():
    tokens, model = eager.random_tokens(N), sc.load_model(eager.tiny("llama"), verbose=False)
    labels = [0.0, 1.0, 3.0]
    sinks = sinks_of(tokens, (POS, 0), (12, 0))
    found = measure_mass(
        model,
        tokens,
        sinks,
        labels,
        lambda factor, row: (sc.rescale(1, int(row.pos), factor),),
        verbose=False,
        batch_size=2,
    )
    assert list(found.data["edit"].values) == labels
    assert (found.change().sel(edit=1.0) == 0).all()
    for factor in (0.0, 3.0):
        pattern = eager.forward(eager.tiny("llama"), tokens, {(1, 12): factor}).pattern
        expected = by_definition(pattern, [None] * 4, 12, 0, (POS,))
        np.testing.assert_allclose(found.data["mass"].sel(sink=1, edit=factor), expected, atol=1e-5)


def test_too_few_queries_are_undefined():
    tokens, model = eager.random_tokens(N), sc.load_model(eager.tiny("gemma3"), verbose=False)
    found = mass_account(model, tokens, sinks_of(tokens, (POS, 0), (30, 0)), layer=0, verbose=False)
    assert found.data["n_queries"].values.tolist() == [[11, 32, 11, 32], [9, 9, 9, 9]]  # windows of 12
    assert found.data["mass"].isel(layer=[0, 2]).isnull().all(), "fewer than 16 queries see the key"
    assert found.data["mass"].sel(sink=0).isel(layer=[1, 3]).notnull().all()
    assert found.data["mass"].sel(sink=1).isnull().all()
    assert found.summary()["n_sinks"].tolist() == [1] * len(GROUPS)


def test_the_users_cache_serves():
    tokens, model = prompt(), lens()
    _, cache = model.run_with_cache(tokens[None], names_filter=sc.names_filter(model))
    secondary = planted_sinks(SINK).select("secondary")
    options = {"layers": (6, 7), "found": planted_sinks(SINK), "verbose": False}
    cached = mass_account(model, tokens, secondary, clean_cache=cache, **options)
    direct = mass_account(model, tokens, secondary, **options)
    np.testing.assert_allclose(cached.data["mass"], direct.data["mass"], atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": 1, "loss": True}, "option 'loss' is unknown here: there are min_queries"),
        ({"layer": 1, "intervention": "erase"}, "intervention 'erase' is unknown"),
        ({"layer": 24}, r"layer 24 is out of range: the model has layers 0\.\.23"),
        ({"layer": 1, "min_queries": 0}, "min_queries = 0"),
        ({"layer": 1, "path": "quick"}, "path 'quick' is unknown"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_any_run(options, message):
    secondary = planted_sinks(SINK).select("secondary")
    sc.adapt(lens())
    with no_forward_pass(), pytest.raises(InputError, match=message):
        mass_account(lens(), prompt(), secondary, verbose=False, **options)


def test_groups_for_other_rows_are_refused():
    clean = sc.run_clean(lens(), prompt(), chosen=(0,))
    with no_forward_pass(), pytest.raises(InputError, match="groups of 1 rows for 2 rows"):
        sc.run_edited(lens(), clean, [[], [sc.zero(3, 5)]], groups=[[key_groups(96, 5, 0)]])


def test_rows_may_ask_for_different_accounts():
    """Masses stand by row and group; layers up to the edited one are left to the clean run's."""
    clean = sc.run_clean(lens(), prompt(), chosen=(0, SINK))
    groups = [[key_groups(96, SINK, 0), key_groups(96, 20, 0)], [], [key_groups(96, SINK, 0)]]
    rows = [[sc.zero(6, SINK)], [sc.zero(6, SINK)], []]
    for path in ("fast", "reference"):
        edited, without, untouched = sc.run_edited(lens(), clean, rows, groups=groups, path=path)
        assert (len(edited.mass), len(without.mass), len(untouched.mass)) == (2, 0, 1)
        pattern = by_hand(prompt(), {(6, SINK): 0.0}).pattern
        for mass, pos in zip(edited.mass, (SINK, 20), strict=True):
            assert mass[:7].isnan().all()
            assert np.abs(mass[7:].numpy() - by_definition(pattern, [None] * 24, pos, 0)[7:]).max() < 2e-5
        (alone,) = sc.run_edited(lens(), clean, [[]], groups=[[key_groups(96, SINK, 0)]], path=path)
        assert alone.mass[0].isfinite().all()
        assert (
            np.abs(alone.mass[0].numpy() - by_definition(by_hand(prompt()).pattern, [None] * 24, SINK, 0)).max() < 2e-5
        )
    assert sc.run_edited(lens(), clean, rows)[0].mass is None
    assert hand.sink_scores(pattern)[8, 0, SINK] == pytest.approx(edited.mass[0][8, 0, 0].item(), abs=2e-5)
