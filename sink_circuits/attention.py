"""Streamed attention: a layer's output and its sink sums, without ever holding the layer's pattern.

The only room that knows attention's fine print: grouped queries, sliding windows, soft-capping, learned sinks, and
queries that start in the middle of a text whose earlier keys are already known.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

BLOCK_FLOATS = 1 << 19
"""Floats in one block of attention weights: 2 MiB, which stays in a core's cache (measured best of 2^18..2^22; twice
that where a text is so long that the block would hold fewer than `2 * MIN_BLOCK_ROWS` rows)."""

MIN_BLOCK_ROWS = 64
"""Queries that a block should have before it takes in another key head."""


@dataclass(frozen=True)
class AttentionForm:
    """How one layer turns scores into weights, as its own configuration says.

    `window`: a query sees keys with `query - key < window` (None: all earlier keys). `softcap`: scores become
    `softcap * tanh(score / softcap)` (Gemma 2, 2408.00118, section 2). `sinks`: one learned logit per head that takes
    part in the softmax and writes nothing (GPT-OSS), shape [head].
    """

    scaling: float
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None


@dataclass(frozen=True)
class AttentionSums:
    """What is kept of a layer's pattern A[head, query, key].

    `later`: sum of A over the queries strictly later than the key, [batch, head, key]; None when only chosen keys were
    asked for. `diagonal`: A[q, q], [batch, head, query]. `log_attention` and `log_rest`: log A[q, k] and
    log(sum of A[q, j] over all other keys j and the learned sink) for the chosen keys, [batch, head, query, chosen];
    -inf and 0 where the query cannot see the key. `log_rest` is summed directly, not as log(1 - A): a key that takes
    nearly everything still has exact log-odds.
    """

    later: Float[Tensor, "batch head key"] | None
    diagonal: Float[Tensor, "batch head query"] | None
    log_attention: Float[Tensor, "batch head query chosen"] | None
    log_rest: Float[Tensor, "batch head query chosen"] | None


def streamed_attention(
    query: Float[Tensor, "batch head query d_head"],
    key: Float[Tensor, "batch key_head key d_head"],
    value: Float[Tensor, "batch key_head key d_value"],
    form: AttentionForm,
    *,
    chosen: Tensor | None = None,
    sums: bool = True,
) -> tuple[Float[Tensor, "batch query head d_value"], AttentionSums]:
    """Causal attention of the last `query` positions of a text over all its `key` positions, in blocks of queries.

    Each block of queries is scored against the keys it can see, normalised, multiplied with the values, summed into its
    keys and dropped, so memory is linear in the number of tokens. Scores are computed in float32 whatever the inputs.
    `query` must be already rotated and the last query stands at the last key. `chosen`: positions of keys whose
    weights are wanted for every query. Raises ValueError when there are more queries than keys.
    """
    batch, n_heads, n_query, d_head = query.shape
    n_key_heads, n_key = key.shape[1:3]
    if n_query > n_key:
        raise ValueError(f"{n_query} queries cannot end at key {n_key}: pass the keys of the earlier positions too.")
    group = n_heads // n_key_heads
    offset = n_key - n_query
    dtype, device = query.dtype, query.device
    d_value = value.shape[-1]
    # The query heads of one key head become rows of one matrix: keys and values are never repeated.
    rows_query = rearrange(query.float(), "b (k g) q d -> (b k) g q d", g=group) * form.scaling
    columns_key = rearrange(key.float(), "b k n d -> (b k) d n")
    rows_value = rearrange(value.float(), "b k n d -> (b k) n d")
    out = torch.empty(batch * n_key_heads, group, n_query, d_value, device=device)
    later = torch.zeros(batch * n_key_heads, group, n_key, device=device) if sums else None
    diagonal = torch.empty(batch * n_key_heads, group, n_query, device=device) if sums else None
    log_attention = log_rest = None
    if chosen is not None:
        shape = (batch * n_key_heads, group, n_query, len(chosen))
        log_attention = torch.full(shape, -torch.inf, device=device)
        log_rest = torch.zeros(shape, device=device)
    sink_logits = None
    if form.sinks is not None:
        sink_logits = form.sinks.float().reshape(1, n_key_heads, group, 1, 1)
        sink_logits = sink_logits.expand(batch, -1, -1, -1, -1).reshape(batch * n_key_heads, group, 1, 1)

    # Few heads at a time where texts are long: a block of many queries makes the better matrix product.
    n_flat = batch * n_key_heads
    budget = max(BLOCK_FLOATS, 2 * MIN_BLOCK_ROWS * min(n_key, form.window or n_key))
    slab = min(n_flat, max(1, budget // (group * MIN_BLOCK_ROWS * n_key)))
    blocks = list(query_blocks(n_query, offset, form.window, budget / (slab * group)))
    size = max((stop - start) * (offset + stop - first) for start, stop, first in blocks) * slab * group
    buffer = torch.empty(size, device=device)  # one block's scores, then its weights: reused, never freed in between
    for low in range(0, n_flat, slab):
        at = slice(low, min(low + slab, n_flat))
        own_sinks = None if sink_logits is None else sink_logits[at]
        for start, stop, first in blocks:
            rows, last = stop - start, offset + stop
            width, here = last - first, slice(start, stop)
            queries = rows_query[at, :, here].reshape(-1, group * rows, d_head)
            weights = buffer[: len(queries) * group * rows * width].view(-1, group * rows, width)
            torch.bmm(queries, columns_key[at, :, first:last], out=weights)
            by_head = weights.view(-1, group, rows, width)
            if form.softcap is not None:
                by_head.div_(form.softcap).tanh_().mul_(form.softcap)
            mask_block(by_head, offset + start - first, form.window)
            sink_share = softmax_(by_head, own_sinks)
            out[at, :, here] = torch.bmm(weights, rows_value[at, first:last]).view(-1, group, rows, d_value)
            if chosen is not None:
                note_chosen(by_head, sink_share, chosen - first, log_attention[at, :, here], log_rest[at, :, here])
            if sums:
                own = by_head.diagonal(offset=width - rows, dim1=-2, dim2=-1)
                diagonal[at, :, here] = own
                own.zero_()  # before summing: subtracting it afterwards would cancel where a token mostly sees itself
                later[at, :, first:last] += by_head.sum(dim=-2)

    def heads(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.reshape(batch, n_heads, *x.shape[2:])

    kept = AttentionSums(heads(later), heads(diagonal), heads(log_attention), heads(log_rest))
    return heads(out).transpose(1, 2).to(dtype), kept


def query_blocks(n_query: int, offset: int, window: int | None, budget: float):
    """Cut the queries into (start, stop, first visible key) so that a block of rows * keys fits `budget`."""
    start = 0
    while start < n_query:
        first = 0 if window is None else max(0, offset + start - window + 1)
        visible = offset + start + 1 - first
        # rows * (visible + rows) <= budget, solved for rows
        rows = max(1, int((-visible + (visible**2 + 4 * budget) ** 0.5) / 2))
        stop = min(n_query, start + rows)
        yield start, stop, first
        start = stop


def mask_block(scores: Float[Tensor, "batch group query key"], first_query: int, window: int | None) -> None:
    """Set to -inf, in place, what a query cannot see; row 0 of the block is the query at column `first_query`."""
    rows, width = scores.shape[-2:]
    upper = torch.ones(rows, width - first_query, dtype=torch.bool, device=scores.device).triu_(1)
    scores[..., first_query:].masked_fill_(upper, -torch.inf)
    if window is not None and (hidden := rows + first_query - window) > 0:
        lower = torch.ones(rows, hidden, dtype=torch.bool, device=scores.device).tril_(first_query - window)
        scores[..., :hidden].masked_fill_(lower, -torch.inf)


def softmax_(scores: Tensor, sink_logits: Tensor | None) -> Tensor | None:
    """Softmax over the last axis in place; returns the learned sinks' share [batch, group, query], if there are any."""
    if sink_logits is None:
        torch.softmax(scores, dim=-1, out=scores)
        return None
    log_total = torch.logaddexp(scores.logsumexp(dim=-1, keepdim=True), sink_logits)
    scores.sub_(log_total).exp_()
    return (sink_logits - log_total).exp_().squeeze(-1)


def note_chosen(weights, sink_share, chosen, log_attention, log_rest) -> None:
    """Write log A[q, k] and the log of all other keys' summed weights, for the chosen keys of one block.

    The rest is 1 - A where A <= 0.9 (exact to 1e-6 of it) and a sum over the other keys where A is larger.
    """
    width = weights.shape[-1]
    for index, key in enumerate(chosen.tolist()):
        if not 0 <= key < width:
            continue
        own = weights[..., key]
        rest = 1 - own
        if (large := own > 0.9).any():
            others = weights[large]
            others[..., key] = 0
            rest[large] = (
                others.sum(dim=-1) if sink_share is None else others.sum(dim=-1) + sink_share.expand_as(own)[large]
            )
        log_attention[..., index] = own.log()
        log_rest[..., index] = rest.log()
