"""Sink scores against their definition, a mean over named queries of Hugging Face's own eager attention weights."""

from __future__ import annotations

import functools
import math

import eager
import pytest
import torch
from common import BACKENDS, by_hand, lens, no_forward_pass, prompt
from hypothesis import given
from hypothesis import strategies as st

import sink_circuits as sc
from sink_circuits import attention
from sink_circuits.errors import InputError
from sink_circuits.scores import MIN_QUERIES, column_log_odds, column_scores, query_counts

N = 48


@functools.cache
def model_of(name: str):
    return sc.load_model(eager.tiny(name), verbose=False)


@functools.cache
def pattern_of(name: str, n: int = N, seed: int = 0) -> torch.Tensor:
    return eager.forward(eager.tiny(name), eager.random_tokens(n, seed)).pattern


def assert_same(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert found.shape == expected.shape
    assert torch.equal(found.isnan(), expected.isnan())
    assert (found.double() - expected).abs().nan_to_num().max() < tolerance


@pytest.mark.parametrize("path", ["fast", "reference"])
@pytest.mark.parametrize("name", eager.NAMES)
def test_scores_are_means_of_the_eager_weights(name, path):
    windows = eager.WINDOWS[name]
    assert sc.adapt(model_of(name)).windows == windows
    for inclusive, min_queries in ((False, 1), (True, 1), (False, 5), (True, 5), (False, eager.WINDOW)):
        found = sc.sink_scores(
            model_of(name), eager.random_tokens(N), inclusive=inclusive, min_queries=min_queries, path=path
        )
        expected = eager.scores(pattern_of(name), windows, inclusive=inclusive, min_queries=min_queries)
        assert_same(found.scores[0], expected)


def test_a_window_too_short_for_the_queries_asked_for_leaves_its_layers_undefined():
    scores = sc.sink_scores(model_of("gemma3"), eager.random_tokens(N), min_queries=eager.WINDOW).scores[0]
    assert scores[[0, 2]].isnan().all()
    assert scores[[1, 3], :, : N - eager.WINDOW].isfinite().all()
    assert scores[[1, 3], :, N - eager.WINDOW :].isnan().all()


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "gpt-oss", "mistral"])
def test_columns_give_the_scores_and_log_odds_of_chosen_keys(name):
    chosen, windows = (0, 7, N - 10, N - 1), eager.WINDOWS[name]
    for path in ("fast", "reference"):
        clean = sc.run_clean(model_of(name), eager.random_tokens(N), chosen=chosen, path=path)
        for min_queries in (1, 10):
            found = column_scores(clean.columns, windows, min_queries)
            assert_same(found, eager.scores(pattern_of(name), windows, min_queries=min_queries)[..., list(chosen)])
            odds = column_log_odds(clean.columns, windows, min_queries)
            assert_same(
                odds, eager.log_odds(pattern_of(name), windows, min_queries=min_queries)[..., list(chosen)], 1e-4
            )


@pytest.mark.parametrize("backend", BACKENDS)
def test_planted_prompts_of_different_lengths(backend):
    texts = [prompt(), prompt((20, 30), 70, "b"), prompt((), 17 + 60, "c")]
    scores = sc.sink_scores(lens(backend), texts, min_queries=1).scores
    assert [s.shape for s in scores] == [(24, 4, len(t)) for t in texts]
    for text, found in zip(texts, scores, strict=True):
        pattern = by_hand(text).pattern
        assert_same(found, eager.scores(pattern, [None] * 24), 2e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_padding_changes_no_number(name, side):
    texts = [eager.random_tokens(n, seed=n) for n in (40, 25, 33)]
    tokens = torch.full((3, 40), 7)
    mask = torch.zeros(3, 40, dtype=torch.long)
    for row, text in enumerate(texts):
        where = slice(40 - len(text), 40) if side == "left" else slice(0, len(text))
        tokens[row, where], mask[row, where] = text, 1
    padded = sc.sink_scores(model_of(name), tokens, attention_mask=mask, min_queries=3)
    for row, text in enumerate(texts):
        assert torch.equal(padded.tokens.ids[row], text)
        assert_same(
            padded.scores[row], eager.scores(pattern_of(name, len(text), len(text)), eager.WINDOWS[name], min_queries=3)
        )
    alone = sc.sink_scores(model_of(name), texts, min_queries=3)
    assert all(
        torch.equal(a.nan_to_num(-1), b.nan_to_num(-1)) for a, b in zip(padded.scores, alone.scores, strict=True)
    )


@pytest.mark.parametrize("inclusive", [False, True])
@pytest.mark.parametrize("path", ["fast", "fast, as for long texts", "reference"])
@pytest.mark.parametrize("name", ["gpt-oss", "gemma3"])
def test_chosen_keys_get_the_scores_that_all_keys_get(name, path, inclusive, monkeypatch):
    if path.endswith("long texts"):
        monkeypatch.setattr(attention, "FLASH_KEYS", 1)
    texts, keys = [eager.random_tokens(N), eager.random_tokens(33, seed=1)], ((7, 0, N - 3), (32,))
    options = {"inclusive": inclusive, "min_queries": 2, "path": path.split(",")[0]}
    found = sc.sink_scores(model_of(name), texts, keys=keys, **options)
    assert found.keys == keys
    for text, own, scores in zip(texts, keys, found.scores, strict=True):
        expected = torch.full(scores.shape, math.nan, dtype=torch.double)
        pattern = eager.forward(eager.tiny(name), text).pattern
        every = eager.scores(pattern, eager.WINDOWS[name], inclusive=inclusive, min_queries=2)
        expected[..., list(own)] = every[..., list(own)]
        assert_same(scores, expected)
    table = found.to_dataframe()
    assert table.groupby("prompt")["pos"].agg(set).tolist() == [set(own) for own in keys]
    row = table.query("prompt == 'prompt-0' and layer == 1 and head == 2 and pos == 7").iloc[0]
    assert row.score == pytest.approx(found.scores[0][1, 2, 7].item())
    with pytest.raises(InputError, match=r"prompt-1.*add key 0"):
        found.sink_rate()


def test_one_list_of_keys_serves_every_prompt():
    texts = [prompt(), prompt((20,), 80, "b")]
    whole, first = sc.sink_scores(lens(), texts), sc.sink_scores(lens(), texts, keys=[0])
    assert first.keys == ((0,), (0,))
    assert [s.isfinite().any(0).any(0).nonzero().flatten().tolist() for s in first.scores] == [[0], [0]]
    assert first.sink_rate() == whole.sink_rate()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ([-1], "position -1 is out of range"), ([0, 96], r"position 96.*0\.\.95"), ([[0], [1]], "keys of 2 prompts for 1"),
        ([3, 3], "named twice"), ([], "no keys are named"), ([[]], "no keys are named"),
    ],
)  # fmt: skip
def test_keys_are_checked_first(keys, message):
    sc.adapt(lens())
    with no_forward_pass(), pytest.raises(InputError, match=message):
        sc.sink_scores(lens(), prompt(), keys=keys)


@given(
    n=st.integers(1, 30),
    windows=st.lists(st.none() | st.integers(1, 40), min_size=1, max_size=4),
)
def test_query_counts(n, windows):
    expected = [[len(eager.seen_by(key, n, window)) for key in range(n)] for window in windows]
    assert query_counts(n, windows).tolist() == expected


def test_sink_rate_is_the_share_of_heads_that_see_a_sink_at_the_first_token():
    texts = [prompt(), prompt((20,), 80, "b")]
    found = sc.sink_scores(lens(), texts, inclusive=True)
    alpha = torch.cat([eager.scores(by_hand(t).pattern, [None] * 24, inclusive=True)[..., 0].flatten() for t in texts])
    for eps in (0.05, 0.3, 0.6):
        assert (alpha - eps).abs().min() > 1e-5  # no head stands on the threshold
        assert found.sink_rate(eps) == pytest.approx((alpha > eps).double().mean().item())
    assert 0 < found.sink_rate() < 1
    assert math.isnan(sc.sink_scores(lens(), prompt()[:5]).sink_rate())  # too few queries: undefined, not 0


def test_table_holds_every_value_at_its_place():
    texts = [prompt(), prompt((20,), 80, "b")]
    found = sc.sink_scores(lens(), texts)
    table = found.to_dataframe()
    assert list(table.columns) == ["prompt", "layer", "head", "pos", "token_id", "score"]
    assert len(table) == 24 * 4 * (96 + 80)
    row = table.query("prompt == 'prompt-1' and layer == 9 and head == 1 and pos == 20").iloc[0]
    assert row.score == pytest.approx(eager.scores(by_hand(texts[1]).pattern, [None] * 24)[9, 1, 20].item(), abs=1e-5)
    assert row.token_id == 1
    assert table.query("prompt == 'prompt-0' and pos > 79").score.isna().all()


def test_sixteen_later_queries_are_asked_for_unless_said():
    """The last position that has a score has 16 of them."""
    assert MIN_QUERIES == 16
    for scores in (
        sc.sink_scores(lens(), prompt()).scores[0],
        sc.sink_scores(lens(), prompt(), keys=[79, 80]).scores[0],
    ):
        assert scores[..., 79].isfinite().all()
        assert scores[..., 80:].isnan().all()
    clean = sc.run_clean(lens(), prompt(), chosen=(79, 80))
    for found in (column_scores(clean.columns, [None] * 24), column_log_odds(clean.columns, [None] * 24)):
        assert found[..., 0].isfinite().all()
        assert found[..., 1].isnan().all()


def test_min_queries_is_checked_first():
    sc.adapt(lens())
    with no_forward_pass(), pytest.raises(InputError, match=r"min_queries = 0.*at least 1"):
        sc.sink_scores(lens(), prompt(), min_queries=0)
