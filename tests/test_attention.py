"""Streamed attention against the whole pattern in float64, over random shapes and every feature a layer may have."""

from __future__ import annotations

import math
import threading
from contextlib import contextmanager

import pytest
import torch
from common import sizes, threads_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sink_circuits import attention
from sink_circuits.attention import AttentionForm, AttentionSums, each, streamed_attention

torch.set_num_threads(1)

LOWEST = -80.0  # logs of weights below exp(-80) are at the end of float32's range and are not compared


def visible(n_query: int, n_key: int, window: int | None) -> Tensor:
    """[query, key]: what each query can see, one by one."""
    offset = n_key - n_query
    seen = torch.zeros(n_query, n_key, dtype=torch.bool)
    for row in range(n_query):
        for key in range(n_key):
            seen[row, key] = key <= row + offset and (window is None or row + offset - key < window)
    return seen


def dense(query: Tensor, key: Tensor, value: Tensor, form: AttentionForm) -> dict[str, Tensor]:
    """The layer with all its weights at once, in float64."""
    query, key, value = query.double(), key.double(), value.double()
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    scores = query @ key.mT * form.scaling
    largest = scores.abs().max().item()
    if form.softcap is not None:
        scores = form.softcap * (scores / form.softcap).tanh()
    seen = visible(query.shape[2], key.shape[2], form.window)
    scores = scores.masked_fill(~seen, -math.inf)
    columns = scores
    if form.sinks is not None:
        learned = form.sinks.double()[None, :, None, None].expand(*scores.shape[:3], 1)
        columns = torch.cat([scores, learned], dim=-1)
    log_total = columns.logsumexp(-1, keepdim=True)
    n_key = key.shape[2]
    others = [columns.index_fill(-1, torch.tensor([k]), -math.inf).logsumexp(-1) for k in range(n_key)]
    return {
        "pattern": (scores - log_total).exp(),
        "out": ((scores - log_total).exp() @ value).transpose(1, 2),
        "log_attention": scores - log_total,
        "log_rest": torch.stack(others, -1) - log_total,
        "largest": torch.tensor(largest),
    }


@contextmanager
def blocks_of(floats: int):
    with sizes(BLOCK_FLOATS=floats, SLAB_FLOATS=floats):
        yield


FLASH = {"FLASH_KEYS": 1}


@st.composite
def layers(draw):
    """Inputs of one layer: shapes, window, soft-cap, learned sinks, size of the logits, block size."""
    batch, n_kv, group = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    n_query, prefix = draw(st.integers(1, 40)), draw(st.sampled_from([0, 0, 1, 7, 30]))
    n_key, d_head = n_query + prefix, draw(st.integers(1, 8))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    size = draw(st.sampled_from([0.1, 1.0, 4.0, 12.0]))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    form = AttentionForm(
        scaling=draw(st.sampled_from([1.0, 0.25, d_head**-0.5])),
        window=draw(st.none() | st.integers(1, n_key + 2)),
        softcap=draw(st.none() | st.sampled_from([0.5, 5.0, 50.0])),
        sinks=normal(n_kv * group) * size if draw(st.booleans()) else None,
    )
    query, key = normal(batch, n_kv * group, n_query, d_head) * size, normal(batch, n_kv, n_key, d_head) * size
    value = normal(batch, n_kv, n_key, draw(st.integers(1, 8)))
    chosen = draw(st.lists(st.integers(0, n_key - 1), unique=True, max_size=4))
    return query, key, value, form, chosen, draw(st.sampled_from([1, 37, 300, 5000, 1 << 20]))


def assert_logs(found: Tensor, expected: Tensor, tolerance: float) -> None:
    compared = expected > LOWEST
    assert not found.isnan().any()
    assert ((found.double() - expected)[compared].abs() < tolerance).all()
    assert (found[~compared] < LOWEST + 1).all()


@settings(max_examples=150)
@given(layers())
def test_equals_the_dense_pattern(layer):
    query, key, value, form, chosen, block = layer
    with blocks_of(block):
        keys = torch.tensor(chosen) if chosen else None
        out, sums = streamed_attention(query, key, value, form, chosen=keys)
        _, without = streamed_attention(query, key, value, form, chosen=keys, odds=False)
    expected = dense(query, key, value, form)
    pattern, n_key, n_query = expected["pattern"], key.shape[2], query.shape[2]
    offset = n_key - n_query
    tolerance = 2e-6 * (1 + expected["largest"].item())  # float32 scores carry an error in proportion to their size
    assert out.shape == (query.shape[0], n_query, query.shape[1], value.shape[-1])
    assert (out - expected["out"]).abs().max() < tolerance * (1 + value.abs().max())
    own = pattern.diagonal(offset=offset, dim1=-2, dim2=-1)
    assert (sums.diagonal - own).abs().max() < tolerance
    later = pattern * torch.ones(n_query, n_key, dtype=torch.bool).tril(offset - 1)
    assert (sums.later - later.sum(-2)).abs().max() < tolerance * (1 + n_query)
    for kept in (out, sums.later, sums.diagonal):
        assert kept.isfinite().all()
    assert without.log_rest is None
    if not chosen:
        assert sums.log_attention is None
        assert sums.log_rest is None
        return
    assert torch.equal(without.log_attention, sums.log_attention)
    assert_logs(sums.log_attention, expected["log_attention"][..., chosen], 5 * tolerance)
    assert_logs(sums.log_rest, expected["log_rest"][..., chosen], 5 * tolerance)
    unseen = ~visible(n_query, n_key, form.window)[:, chosen]
    assert (sums.log_attention[:, :, unseen] == -math.inf).all()
    assert (sums.log_rest[:, :, unseen].abs() < 1e-5).all()  # everything goes elsewhere


@settings(max_examples=150)
@given(layers(), st.data())
def test_chosen_keys_alone_equal_the_dense_pattern(layer, data):
    """Through the flash kernel, also where every key that a query sees is a chosen one."""
    query, key, _, form, chosen, block = layer
    n_key, n_query = key.shape[2], query.shape[2]
    chosen = data.draw(st.sampled_from([chosen, [0], list(range(n_key))[:5], list(range(n_key))]))
    odds = data.draw(st.booleans())
    value = torch.randn(key.shape, generator=torch.Generator().manual_seed(0))
    with sizes(**FLASH, JOINED_FLOATS=block, BLOCK_ROWS=data.draw(st.sampled_from([1, 7, 64]))):
        out, sums = streamed_attention(
            query, key, value, form, chosen=torch.tensor(chosen, dtype=torch.long), sums=False, odds=odds
        )
    expected = dense(query, key, value, form)
    tolerance = 2e-6 * (1 + expected["largest"].item())
    assert (out - expected["out"]).abs().max() < tolerance * (1 + value.abs().max())
    assert sums.later is None
    assert sums.diagonal is None
    assert sums.log_attention.shape == (*query.shape[:3], len(chosen))
    assert (sums.log_rest is not None) == odds
    if not chosen:
        return
    assert_logs(sums.log_attention, expected["log_attention"][..., chosen], 5 * tolerance)
    unseen = ~visible(n_query, n_key, form.window)[:, chosen]
    assert (sums.log_attention[:, :, unseen] == -math.inf).all()
    if not odds:
        return
    assert_logs(sums.log_rest, expected["log_rest"][..., chosen], 5 * tolerance)
    assert (sums.log_rest[:, :, unseen].abs() < 1e-5).all()


@settings(max_examples=30)
@given(layers())
def test_half_precision_inputs_are_scored_in_float32(layer):
    query, key, value, form, chosen, block = layer
    query, key, value = query.bfloat16(), key.bfloat16(), value.bfloat16()
    with blocks_of(block):
        out, sums = streamed_attention(query, key, value, form, chosen=torch.tensor(chosen) if chosen else None)
    expected = dense(query, key, value, form)  # of the rounded inputs: only the output is rounded again
    tolerance = 2e-6 * (1 + expected["largest"].item())
    assert out.dtype == torch.bfloat16
    assert (out.double() - expected["out"]).abs().max() <= tolerance * 10 + 2**-8 * expected["out"].abs().max()
    later = expected["pattern"] * torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril(
        key.shape[2] - query.shape[2] - 1
    )
    assert sums.later.dtype == torch.float32
    assert (sums.later - later.sum(-2)).abs().max() < tolerance * (1 + query.shape[2])
    if chosen:
        assert_logs(sums.log_rest, expected["log_rest"][..., chosen], 5 * tolerance)


@pytest.mark.parametrize("chosen", [[0], [30, 0, 7]])
@pytest.mark.parametrize("sums", [True, False])
@pytest.mark.parametrize("gap", [0.0, 5.0, 20.0, 40.0, 75.0])
def test_log_rest_is_exact_where_one_key_takes_nearly_everything(gap, sums, chosen):
    """At a gap of 20 the others have 1e-8 of the weight: log(1 - A) of a float32 A would be -inf."""
    n = 50
    query, key = torch.ones(1, 1, n, 1), torch.zeros(1, 1, n, 1)
    key[0, 0, 0] = gap
    first = [chosen.index(0)]
    with sizes(**FLASH):
        _, sums = streamed_attention(
            query, key, torch.zeros(1, 1, n, 1), AttentionForm(1.0), chosen=torch.tensor(chosen), sums=sums
        )
    sums = AttentionSums(None, None, sums.log_attention[..., first], sums.log_rest[..., first])
    q = torch.arange(n, dtype=torch.float64)[1:]  # query q sees q other keys, all of logit 0
    log_total = torch.logaddexp(torch.tensor(gap, dtype=torch.float64), q.log())
    assert (sums.log_rest[0, 0, 1:, 0] - (q.log() - log_total)).abs().max() < 1e-4
    assert (sums.log_attention[0, 0, 1:, 0] - (gap - log_total)).abs().max() < 1e-4
    odds = sums.log_attention[0, 0, 1:, 0] - sums.log_rest[0, 0, 1:, 0]
    assert (odds - (gap - q.log())).abs().max() < 1e-4


def test_a_learned_sink_takes_its_share():
    """One learned logit of log(3) against n keys of logit 0: every key gets 1 / (n + 3)."""
    n = 9
    zeros = torch.zeros(1, 2, n, 4)
    form = AttentionForm(1.0, sinks=torch.tensor([3.0, 1e-30]).log())
    out, sums = streamed_attention(zeros, zeros, torch.ones(1, 2, n, 1), form, chosen=torch.tensor([1]))
    seen = torch.arange(1, n + 1)
    assert torch.allclose(sums.diagonal[0, 0], 1 / (seen + 3))
    assert torch.allclose(sums.diagonal[0, 1], 1 / seen)
    assert torch.allclose(out[0, :, 0, 0], seen / (seen + 3))
    assert torch.allclose(sums.log_rest[0, 0, 1:, 0].exp(), ((seen + 2) / (seen + 3))[1:])


def test_sums_can_be_left_out():
    x = torch.randn(1, 2, 6, 4, generator=torch.Generator().manual_seed(0))
    out, sums = streamed_attention(x, x, x, AttentionForm(0.5), chosen=torch.tensor([2]), sums=False)
    whole, kept = streamed_attention(x, x, x, AttentionForm(0.5), chosen=torch.tensor([2]))
    assert sums.later is None
    assert sums.diagonal is None
    assert torch.equal(out, whole)
    assert torch.equal(sums.log_attention, kept.log_attention)


def test_chosen_keys_of_a_long_text_by_both_ways():
    """Long enough for the flash kernel as it is; a suffix of queries sees earlier keys through a call of its own."""
    generator = torch.Generator().manual_seed(5)
    n, chosen = attention.FLASH_KEYS + 70, torch.tensor([900, 0, 1, 1080])
    query, key, value = (torch.randn(2, heads, n, 16, generator=generator) for heads in (4, 2, 2))
    key[:, :, 0] += 2 * query.mean(dim=2).unflatten(1, (2, 2)).sum(dim=2) * n**0.5  # a sink for many queries
    blocks, expected = streamed_attention(query, key, value, AttentionForm(0.25), chosen=chosen)
    assert expected.log_attention.exp()[:, :, 500:, 1].max() > 0.9
    for start in (0, 600):
        out, sums = streamed_attention(query[:, :, start:], key, value, AttentionForm(0.25), chosen=chosen, sums=False)
        assert torch.allclose(out, blocks[:, start:], atol=1e-5)
        for name in ("log_attention", "log_rest"):
            found, own = getattr(sums, name), getattr(expected, name)[:, :, start:]
            assert torch.equal(found == -math.inf, own == -math.inf)
            assert (found - own).abs().nan_to_num().max() < 2e-5


@pytest.mark.parametrize("sums", [True, False])
@pytest.mark.parametrize(
    "form", [AttentionForm(0.5), AttentionForm(0.5, window=20, softcap=3.0, sinks=torch.tensor([0.5, -1.0, 2.0, 0.0]))]
)
def test_threads_change_no_bit(form, sums):
    generator = torch.Generator().manual_seed(4)
    query, key, value = (torch.randn(2, heads, 90, 8, generator=generator) for heads in (4, 2, 2))
    found = {}
    for threads in (1, 2, 3):
        with threads_of(threads), sizes(**FLASH, JOINED_FLOATS=64):
            for mode in (torch.no_grad, torch.inference_mode):
                with mode():
                    out, kept = streamed_attention(query, key, value, form, chosen=torch.tensor([3, 0]), sums=sums)
                found[threads, mode] = [x for x in (out, *vars(kept).values()) if x is not None]
            assert torch.get_num_threads() == threads
    first = found.pop((1, torch.no_grad))
    assert all(torch.equal(a, b) for other in found.values() for a, b in zip(first, other, strict=True))


def test_what_fails_on_a_thread_is_raised_and_leaves_none_behind():
    def work(task: int) -> int:
        if task == 5:
            raise RuntimeError("task 5")
        return torch.get_num_threads()

    alive, before = threading.active_count(), torch.get_num_threads()
    with pytest.raises(RuntimeError, match="task 5"):
        each(work, range(50), threads=3)
    assert threading.active_count() == alive
    assert torch.get_num_threads() == before
    assert each(work, range(5), threads=3) == [1] * 5  # torch's own threads rest meanwhile


def test_a_suffix_of_queries_gives_the_same_numbers_as_all_of_them():
    generator = torch.Generator().manual_seed(3)
    query, key, value = (torch.randn(1, heads, 60, 8, generator=generator) for heads in (4, 2, 2))
    form, chosen = AttentionForm(0.4, window=17, softcap=4.0), torch.tensor([5, 30, 58])
    whole, all_sums = streamed_attention(query, key, value, form, chosen=chosen)
    for start in (1, 29, 59):
        out, sums = streamed_attention(query[:, :, start:], key, value, form, chosen=chosen)
        assert torch.allclose(out, whole[:, start:], atol=1e-6)
        assert torch.allclose(sums.log_attention, all_sums.log_attention[:, :, start:], atol=1e-5)
        assert torch.allclose(sums.diagonal, all_sums.diagonal[:, :, start:], atol=1e-6)


def test_more_queries_than_keys_are_refused():
    x = torch.zeros(1, 1, 5, 2)
    with pytest.raises(ValueError, match="5 queries cannot end at key 4"):
        streamed_attention(x, x[:, :, :4], x[:, :, :4], AttentionForm(1.0))


@pytest.mark.parametrize("odds", [True, False])
def test_no_weight_is_above_1_however_large_the_scores(odds):
    """Scores in the thousands, of which float32 keeps three decimals: what is taken from them must not leave the range."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 4, 64, 64, generator=generator) for _ in range(3))
    direction = torch.randn(64, generator=generator)
    query, key = 3 * query + 5 * direction, 0.1 * key
    key[:, :, 0] = 3 * direction
    with sizes(**FLASH):
        _, kept = streamed_attention(
            query, key, value, AttentionForm(1.0), chosen=torch.tensor([0, 5]), sums=False, odds=odds
        )
    assert (kept.log_attention <= 0).all()
    assert (kept.log_attention[:, :, 1:, 0] > -1e-2).all()
