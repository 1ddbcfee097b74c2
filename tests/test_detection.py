"""Robust detection: planted circuits with known answers, hand-made geometries, and a second implementation."""

from __future__ import annotations

import math

import eager
import pytest
import torch
from common import BACKENDS, REAL, SINK, by_hand, lens, no_forward_pass, prompt, real, real_run
from test_planted import CARRIED, cosine_with_primary, norm_ratio, score
from test_sink_states import naive_robust

import sink_circuits as sc
from sink_circuits.detection import (
    COLUMNS,
)
from sink_circuits.errors import CacheError, InputError

PRIMARY, SECONDARY = ("primary", 2, 20), ("secondary", 6, 12)


def found(table, prompt_name: str = "prompt-0") -> dict[int, tuple[str, int, int]]:
    own = table[table["prompt"] == prompt_name]
    assert own["pos"].is_unique
    return {row.pos: (row.kind, row.l_start, row.l_end) for row in own.itertuples()}


# ------------------------------------------------------------------------------------------------------- planted
@pytest.mark.parametrize("path", ["auto", "reference"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_planted_sinks_are_found_and_nothing_else(backend, path):
    texts = [prompt(), prompt((5, 20, 90), 128, "b"), prompt((), seed_name="c")]
    sinks = sc.find_sinks(lens(backend), texts, path=path, verbose=False)
    assert tuple(sinks.table.columns) == COLUMNS
    assert found(sinks.table, "prompt-0") == {0: PRIMARY, SINK: SECONDARY}
    assert found(sinks.table, "prompt-1") == {0: PRIMARY, 5: SECONDARY, 20: SECONDARY, 90: SECONDARY}
    assert found(sinks.table, "prompt-2") == {0: PRIMARY}
    assert set(sinks.table.primary_pos) == {0}
    assert set(sinks.table.phase_start) == {2}
    assert (sinks.table.lifetime == sinks.table.l_end - sinks.table.l_start + 1).all()
    assert sinks.table.token_id.tolist() == [0, 1, 0, 1, 1, 1, 0]
    assert len(sinks.select("secondary")) == 4
    assert len(sinks.select("primary", "secondary")) == 7
    assert len(sinks.select("primary-like")) == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_evidence_beside_each_sink_is_what_a_forward_pass_by_hand_gives(backend):
    run = by_hand(prompt())
    table = sc.find_sinks(lens(backend), prompt(), verbose=False).table.set_index("pos")
    all_heads = eager.scores(run.pattern, [None] * 24, min_queries=16).mean(1)  # [layer, pos]
    for position, first, last in ((0, 2, 20), (SINK, 6, 12)):
        row, life, readers = table.loc[position], slice(first, last + 1), slice(first + 1, last + 2)
        assert row.cosine == pytest.approx(cosine_with_primary(run.residuals)[life, position].mean().item(), abs=1e-5)
        assert row.norm == pytest.approx(run.residuals[life, position].norm(dim=-1).max().item(), rel=1e-5)
        assert row.norm_ratio == pytest.approx(norm_ratio(run.residuals)[life, position].max().item(), rel=1e-5)
        assert row.score == pytest.approx(all_heads[readers, position].mean().item(), rel=1e-4)
        near = [p for p in range(96) if abs(p - position) <= 32 and p not in (0, SINK) and 95 - p >= 16]
        ordinary = all_heads[readers][:, near].mean(0).quantile(0.5, interpolation="lower").item()
        assert row.score_ordinary == pytest.approx(ordinary, rel=1e-4)
        assert row.score_ratio == pytest.approx(row.score / ordinary, rel=1e-4)
        assert row.score_ratio > 10
    assert score(run)[7:14, SINK].min() > 0.1


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ("primary", {}),
        ("secondary", {0: PRIMARY}),
        ("stand_in", {0: PRIMARY, SINK: SECONDARY}),
        ("decoy", {0: PRIMARY, SINK: SECONDARY}),
        ("shared", {0: PRIMARY, SINK: SECONDARY}),
        ("eraser", {0: ("primary", 2, 23), SINK: ("secondary", 6, 23)}),
    ],
)
def test_a_part_left_out_is_seen(part, expected):
    """What detection says without each part, where `test_planted` shows that the part carries that fact."""
    sinks = sc.find_sinks(lens("bridge", part), prompt(), verbose=False)
    assert found(sinks.table) == expected
    if "secondary" not in CARRIED[part]:
        assert SINK in expected
    if part == "shared":  # the states are there and draw nothing: attention is evidence, it never decides
        for row in sinks.table.itertuples():
            even = sum(1 / (q + 1) for q in range(row.pos + 1, 96)) / (95 - row.pos)
            assert row.score == pytest.approx(even, rel=1e-4)
    assert tuple(sinks.table.columns) == COLUMNS
    full = sc.find_sinks(lens(), prompt(), verbose=False).table
    assert (sinks.table.dtypes.drop(["prompt", "token", "kind"]) == full.dtypes.drop(["prompt", "token", "kind"])).all()


def test_a_token_is_no_markup_in_a_notebook():
    sinks = sc.find_sinks(lens(), prompt(), verbose=False)
    hostile = sc.Sinks(sinks.table.assign(token="<script>x</script>"), sinks.prompts, sinks.manifest)
    assert "<script>" not in hostile._repr_html_() and "&lt;script&gt;" in hostile._repr_html_()


def test_no_sinks_prints_as_none():
    sinks = sc.find_sinks(lens("bridge", "primary"), prompt(), verbose=False)
    assert len(sinks) == 0
    assert "none" in repr(sinks)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"cosine": 0.999}, {0: PRIMARY}),
        ({"norm_ratio": 6.0}, {0: PRIMARY}),
        ({"norm_ratio": 9.0}, {}),
        ({"min_lifetime": 8}, {0: PRIMARY}),
        ({"min_lifetime": 7}, {0: PRIMARY, SINK: SECONDARY}),
        ({"min_lifetime": 20}, {}),
        ({"cosine": -1.0}, {0: PRIMARY, SINK: SECONDARY, 60: ("secondary", 4, 20)}),  # norm alone flags the decoy
        ({"norm_ratio": 0.5, "cosine": 0.98}, {0: ("primary", 0, 23), SINK: ("secondary", 6, 12)}),
        ({"first_positions": (SINK,)}, {SINK: ("primary", 6, 12), 0: ("primary-like", 6, 12)}),
    ],
)
def test_thresholds_do_what_they_say(changed, expected):
    table = sc.find_sinks(lens(), prompt(), verbose=False, **changed).table
    assert found(table) == expected
    given_whole = sc.find_sinks(lens(), prompt(), thresholds=sc.Thresholds(**changed), verbose=False).table
    assert given_whole.equals(table)


def test_random_weights_have_no_sinks():
    """Negative control: the method finds nothing where nothing was put in."""
    for seed in range(3):
        model = sc.load_model(eager.tiny("llama", seed), verbose=False)
        assert len(sc.find_sinks(model, eager.random_tokens(100, seed), verbose=False)) == 0


def test_padded_batches_and_caches_give_the_same_sinks():
    texts = [prompt(), prompt((20,), 70, "b")]
    expected = sc.find_sinks(lens(), texts, verbose=False).table
    tokens, mask = torch.full((2, 96), 5), torch.ones(2, 96)
    tokens[0], tokens[1, 26:], mask[1, :26] = texts[0], texts[1], 0
    assert sc.find_sinks(lens(), tokens, attention_mask=mask, verbose=False).table.equals(expected)
    batch = torch.stack([prompt(), prompt((20,), 96, "b")])
    _, cache = lens().run_with_cache(batch, names_filter=sc.names_filter(lens()))
    direct = sc.find_sinks(lens(), batch, verbose=False).table
    cached = sc.find_sinks(lens(), batch, clean_cache=cache, verbose=False).table
    assert found(cached, "prompt-0") == found(direct, "prompt-0")
    assert found(cached, "prompt-1") == found(direct, "prompt-1") == {0: PRIMARY, 20: SECONDARY}
    assert abs(cached.score - direct.score).max() < 1e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "magic"}, "method 'magic' is unknown: use 'robust' or 'official'"),
        ({"cosin": 0.5}, "threshold 'cosin' is unknown: there are cosine, norm_ratio"),
        ({"cosine": 1.5}, r"threshold cosine = 1\.5 is out of range: -1\.0 to 1\.0"),
        ({"cosine": math.nan}, "threshold cosine = nan"),
        ({"norm_ratio": -1.0}, r"threshold norm_ratio = -1\.0 is out of range: 0\.0 to inf"),
        ({"min_lifetime": 0}, "threshold min_lifetime = 0 is out of range: 1"),
        ({"bridge": -1}, "threshold bridge = -1"),
        ({"min_queries": 0}, "threshold min_queries = 0"),
        ({"neighbours": 0}, "threshold neighbours = 0"),
        ({"first_positions": ()}, r"first_positions = \(\): name at least one"),
        ({"first_positions": (-1,)}, r"first_positions = \(-1,\)"),
        ({"first_positions": (0, 0)}, r"first_positions = \(0, 0\).*name each once"),
        ({"first_positions": (0.5,)}, r"first_positions = \(0\.5,\)"),
        ({"first_positions": 3}, "first_positions = 3: .*several"),
        ({"first_positions": (9999,)}, r"'prompt-0' has 96 tokens, and no first position \(9999\) lies in it"),
        ({"first_positions": (96, 97), "method": "official"}, r"no first position \(96, 97\) lies in it"),
        ({"norm_ratio": math.inf}, "threshold norm_ratio = inf is not finite"),
        ({"min_lifetime": 2.5}, r"threshold min_lifetime = 2\.5 is not a whole number"),
        ({"method": "official", "cosine": 0.9}, "threshold cosine = 0.9 does not belong to official.*leave it out"),
        ({"method": "official", "norm_ratio": 2.5}, "threshold norm_ratio = 2.5 does not belong"),
        ({"method": "official", "thresholds": sc.Thresholds(bridge=0)}, "threshold bridge = 0 does not belong"),
        ({"path": "slow"}, "path 'slow' is unknown"),
    ],
)
def test_bad_arguments_are_refused_before_anything_runs(options, message):
    sc.adapt(lens())
    with no_forward_pass(), pytest.raises(InputError, match=message):
        sc.find_sinks(lens(), prompt(), **options)


def test_a_text_without_any_first_position_is_named():
    texts = [prompt(), prompt()[:50]]
    assert len(sc.find_sinks(lens(), texts, first_positions=(0, 60), verbose=False)) > 0
    with (
        no_forward_pass(),
        pytest.raises(InputError, match=r"'prompt-1' has 50 tokens, and no first position \(60, 70\)"),
    ):
        sc.find_sinks(lens(), texts, first_positions=(60, 70))


def test_official_takes_the_thresholds_that_are_its_own():
    """Those of the evidence beside the sinks; the published procedure has no others."""
    changed = {"first_positions": (0,), "min_queries": 60, "neighbours": 8}
    sinks = sc.find_sinks(lens(), prompt(), method="official", verbose=False, **changed)
    same = sc.find_sinks(lens(), prompt(), method="official", verbose=False, thresholds=sc.Thresholds(**changed))
    assert same.table.equals(sinks.table)
    assert sinks.manifest.settings["thresholds"]["min_queries"] == 60
    assert sinks.table.set_index("pos").score.isna()[SINK]  # 55 queries come after it


def test_unknown_kinds_are_refused():
    sinks = sc.find_sinks(lens(), prompt(), verbose=False)
    with pytest.raises(InputError, match="kind 'cliff' is unknown: use one of.*secondary"):
        sinks.select("cliff")


def test_a_cache_without_the_hooks_is_refused():
    _, cache = lens().run_with_cache(prompt()[None], names_filter=lambda name: "pattern" in name)
    with pytest.raises(CacheError, match=r"hook_resid_mid.*names_filter"):
        sc.find_sinks(lens(), prompt(), clean_cache=cache)


# ------------------------------------------------------------------------------------------------------ real models
@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_real_models_flagged_tokens_draw_attention_and_those_that_draw_it_are_flagged(name):
    """Geometry decides, and Hugging Face's eager attention, which detection never saw, confirms it."""
    model, _, tokens = real(name)
    table = sc.find_sinks(model, tokens, verbose=False).table
    windows = sc.adapt(model).windows
    ratios, wanted = [], []
    for text in range(3):
        n = len(tokens[text])
        scores = eager.scores(real_run(name, text).pattern, windows, min_queries=16).mean(1)  # [layer, pos]
        relative = scores / scores[:, 4:].nanmedian(1, keepdim=True).values
        own = table[table.prompt == tokens.names[text]]
        assert own.query("kind == 'primary'").pos.unique().tolist() == [0]
        for row in own.query("kind != 'primary'").itertuples():
            ratios.append(relative[row.l_start + 1 : row.l_end + 2, row.pos].mean().item())
        for pos in range(4, n - 40):  # draws ten times what is usual, in three layers on end
            if any((relative[layer : layer + 3, pos] > 10).all() for layer in range(len(scores) - 2)):
                wanted.append(pos in set(own.pos))
    ratios = [r for r in ratios if not math.isnan(r)]  # a sink in the last few tokens has no score
    assert len(ratios) >= 4
    assert sorted(ratios)[len(ratios) // 2] > 3
    assert sum(r > 2 for r in ratios) > 0.8 * len(ratios)
    assert len(wanted) >= 4
    assert sum(wanted) >= 0.75 * len(wanted)


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_real_models_sinks_are_those_of_the_definitions(name):
    """Against the second implementation, on Hugging Face's own residuals, and through the reference path."""
    model, _, tokens = real(name)
    found_rows = sc.find_sinks(model, tokens[:2], verbose=False).table
    reference = sc.find_sinks(model, tokens[:2], path="reference", verbose=False).table
    exact = ["prompt", "pos", "kind", "l_start", "l_end", "phase_start", "primary_pos"]
    assert found_rows[exact].equals(reference[exact])
    assert (found_rows.score - reference.score).abs().max() < 1e-4
    for text in (0, 1):
        expected = naive_robust(real_run(name, text).residuals, 0.9, 2.5, 2, 1, range(4))
        own = found_rows[found_rows.prompt == tokens.names[text]]
        rows: dict[int, list] = {}
        for row in own.itertuples():
            rows.setdefault(row.pos, []).append((row.kind, row.l_start, row.l_end, row.phase_start))
        assert rows == expected
