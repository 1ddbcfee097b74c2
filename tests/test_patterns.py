"""Attention patterns, their windows and views, by hand and by eager Hugging Face."""

import json
import re

import hand
import numpy as np
import pytest
import test_architectures as architectures
import torch
from anatomies import QUIET, found, load, sinks_at
from common import SINK, by_hand, lens, prompt
from hypothesis import given
from hypothesis import strategies as st

import sink_circuits as sc
from sink_circuits import anatomy, figures
from sink_circuits.anatomy import patterns
from sink_circuits.errors import InputError


def test_patterns_are_those_of_the_hand_written_pass():
    result, run = anatomy.attention_patterns(lens(), [prompt()], found(), n_heads=3, **QUIET), by_hand(prompt())
    window = result.of()
    scores = hand.sink_scores(run.pattern)[7:14, :, SINK]
    best = [(7 + int(i) // 4, int(i) % 4) for i in scores.flatten().argsort(descending=True)[:3]]
    assert [(layer, head) for layer, head, _ in window.heads] == best
    pos = window.tokens["pos"].tolist()
    assert len(pos) == 48 and {0, 1, 2, 3, *range(SINK - 3, SINK + 4)} <= set(pos)
    for (layer, head, score), values, rest in zip(window.heads, window.attention, window.elsewhere, strict=True):
        pattern = run.pattern[layer, head]
        np.testing.assert_allclose(values, pattern[pos][:, pos], atol=2e-5)
        np.testing.assert_allclose(rest, 1 - pattern[pos][:, pos].sum(-1), atol=2e-5)
        assert score == pytest.approx(float(scores[layer - 7, head]), abs=1e-5)
    kinds = dict(zip(window.tokens["pos"], window.tokens["kind"], strict=True))
    assert {p: kind for p, kind in kinds.items() if kind} == {0: "primary", SINK: "secondary"}
    frame = result.to_dataframe()
    assert len(frame) == 3 * 48 * 49 // 2 and (frame["key"] <= frame["query"]).all()
    row = frame[(frame["query"] == pos[-1]) & (frame["key"] == SINK)].iloc[0]
    assert row["attention"] == pytest.approx(float(run.pattern[row["layer"], row["head"], pos[-1], SINK]), abs=2e-5)


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "falcon"])
def test_patterns_of_other_architectures_are_eager_hugging_faces(name):
    """Sliding windows, learned sinks, the reference path; texts of two lengths."""
    texts = {"a": torch.arange(3, 43), "b": torch.arange(3, 33)}
    sinks = sinks_at(("a", 9), ("b", 12), token_ids=texts)
    tokens = sc.Tokens(tuple(texts.values()), tuple(texts))
    result = anatomy.attention_patterns(load(name), tokens, sinks, n_heads=2, min_queries=4, n_positions=35, **QUIET)
    assert result.prompts == ["a", "b"]
    for prompt_name, ids in texts.items():
        window, (pattern, _) = result.of(prompt_name), architectures.hugging_face(name, ids)
        pos = window.tokens["pos"].tolist()
        assert len(pos) == min(35, len(ids))
        for (layer, head, _), values, rest in zip(window.heads, window.attention, window.elsewhere, strict=True):
            np.testing.assert_allclose(values, pattern[layer, head][pos][:, pos], atol=2e-5)
            np.testing.assert_allclose(rest + values.sum(-1), 1, atol=2e-5)
    with pytest.raises(InputError, match="prompt 'c' has no patterns here: there are a, b"):
        result.of("c")


def test_patterns_refuse_what_they_cannot_use():
    args = (lens(), [prompt()], found())
    for options, said in (
        ({"n_heads": 0}, "n_heads = 0: at least 1"), ({"n_positions": 1}, "n_positions = 1: at least 2"),
        ({"around": -1}, "around = -1: at least 0"), ({"min_queries": 96}, "no head has a defined score"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=said):
            anatomy.attention_patterns(*args, **options, **QUIET)


@given(st.lists(st.integers(0, 59), min_size=1, max_size=20), st.integers(2, 80), st.integers(0, 5))
def test_a_window_holds_sinks_first_and_never_too_much(sinks, size, around):
    window = patterns.window_around(sinks, 60, size, around)
    assert window == sorted(set(window)) and len(window) == min(size, 60) and set(window) <= set(range(60))
    assert sinks[0] in window
    if len(set(sinks)) * (2 * around + 1) <= size:
        assert {p for s in sinks for p in range(s - around, s + around + 1) if 0 <= p < 60} <= set(window)


def test_the_view_is_small_rounded_and_sums_to_one():
    result = anatomy.attention_patterns(lens(), [prompt()], found(), **QUIET)
    window = result.of()
    view = figures.attention_view(window, name="a b", library=False)
    assert len(view) < 200_000 and "CircuitsVis=(" not in view and 'id="cv-a20b"' in view
    data = json.loads(re.search(r'class="cv-data"[^>]*>(.*?)</script>', view, re.DOTALL)[1])
    values = np.array(data["attention"])
    assert values.shape == (len(window.heads), 49, 49) and len(data["tokens"]) == 49
    np.testing.assert_allclose(values[:, 1:].sum(-1), 1, atol=49 * 0.0005)
    assert np.allclose(values, values.round(3)) and not values[:, 0].any()
    assert result.view().count("CircuitsVis=(") == 1
