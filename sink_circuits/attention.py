"""Streamed attention: a layer's output and its sink sums, without ever holding the layer's pattern.

The only room that knows attention's fine print: grouped queries, sliding windows, soft-capping, learned sinks, and
queries that start in the middle of a text whose earlier keys are already known. Two ways lead to the same numbers:
blocks of queries serve every layer and every sum; where only chosen keys of a long text are wanted, a flash kernel over
all other keys is joined with them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from queue import SimpleQueue
from typing import Any, TypeVar

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

BLOCK_ROWS = 64
"""Queries in one block of attention weights: more waste work above the diagonal, fewer make poorer matrix products. On a
GPU, where the number of kernels counts, only GPU_BLOCK_FLOATS bounds them."""

BLOCK_FLOATS = 1 << 21
"""Floats that one block may hold (8 MiB) where texts are so long that fewer queries must do."""

GPU_BLOCK_FLOATS = 1 << 26
"""The same on a GPU (256 MiB), where larger blocks are fewer kernels."""

SLAB_FLOATS = 1 << 19
"""Floats up to which a block takes in further key heads (2 MiB): more would leave the core's cache. A GPU's blocks have
no such bound."""

JOINED_FLOATS = 1 << 17
"""Floats of queries, or of chosen keys' weights, that join the other keys at once (512 KiB)."""

FLASH_KEYS = 1024
"""Keys from which on the flash kernel is faster than blocks of queries."""

BANDS = 16
"""Pieces into which a layer is cut for threads: the same number on every machine, so that sums are added in one order."""

THREADED_FLOATS = 1 << 20
"""Weights, or outputs, that a layer must have before threads are worth starting."""

_Task = TypeVar("_Task")
_Result = TypeVar("_Result")


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
    nearly everything still has exact log-odds. It is None when no odds were asked for.
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
    chosen: Int[Tensor, " chosen"] | None = None,
    sums: bool = True,
    odds: bool = True,
) -> tuple[Float[Tensor, "batch query head d_value"], AttentionSums]:
    """Causal attention of the last `query` positions of a text over all its `key` positions, never a whole pattern.

    Memory is linear in the number of tokens. Scores are computed in float32 whatever the inputs. `query` must be
    already rotated and the last query stands at the last key. `chosen`: distinct positions of keys whose weights are
    wanted for every query, and with `odds` what all other keys have. Raises ValueError when there are more queries than
    keys.
    """
    n_heads, n_query, d_head = query.shape[1:]
    n_key_heads, n_key = key.shape[1:3]
    if n_query > n_key:
        raise ValueError(f"{n_query} queries cannot end at key {n_key}: pass the keys of the earlier positions too.")
    if form.window is not None and form.window >= n_key:
        form = replace(form, window=None)
    if form.sinks is not None:
        logits = form.sinks.float().reshape(1, n_key_heads, -1, 1).expand(len(query), -1, -1, -1)
        form = replace(form, sinks=logits.flatten(0, 1))
    # The query heads of one key head become rows of one matrix: keys and values are never repeated.
    rows_query = rearrange(query.float(), "b (k g) q d -> (b k) g q d", k=n_key_heads)
    rows_key = rearrange(key.float(), "b k n d -> (b k) n d")
    rows_value = rearrange(value.float(), "b k n d -> (b k) n d")
    asked = [] if chosen is None else chosen.tolist()
    keys = sorted(asked)
    fits = form.window is None and form.softcap is None and value.shape[-1] == d_head
    if fits and not sums and query.device.type == "cpu" and n_key >= FLASH_KEYS:
        out, kept = _flash(rows_query, rows_key, rows_value, form, keys, odds)
    else:
        out, kept = _in_blocks(rows_query, rows_key, rows_value, form, keys, sums, odds)

    def heads(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.reshape(len(query), n_heads, *x.shape[2:])

    logs: list[Tensor | None] = [None, None]
    if chosen is not None:
        order = [keys.index(key) for key in asked]
        logs = [heads(x if x is None or asked == keys else x[..., order]) for x in (kept.log_attention, kept.log_rest)]
    return heads(out).transpose(1, 2).to(query.dtype), AttentionSums(heads(kept.later), heads(kept.diagonal), *logs)


def each(work: Callable[[_Task], _Result], tasks: Sequence[_Task], threads: int) -> list[_Result]:
    """`work` of every task, in order, on so many threads.

    Each thread computes alone: operations on one block are so short that waking torch's own threads for every one of
    them costs more than it brings.
    """
    if threads == 1:
        return [work(task) for task in tasks]
    gradient, inference, before = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_num_threads()
    results: list[Any] = [None] * len(tasks)
    waiting = deque(range(len(tasks)))

    def take() -> None:
        with torch.inference_mode(inference), torch.set_grad_enabled(gradient):  # both belong to a thread
            while waiting:
                try:
                    index = waiting.popleft()
                except IndexError:  # another thread took the last one
                    return
                try:
                    results[index] = work(tasks[index])
                except BaseException:
                    waiting.clear()
                    raise

    try:
        with ThreadPoolExecutor(threads - 1, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            others = [pool.submit(take) for _ in range(threads - 1)]
            torch.set_num_threads(1)
            take()  # this thread too: what it frees is used again by what comes after
            for other in others:
                other.result()
    finally:
        torch.set_num_threads(before)  # a thread that torch has not seen yet takes what was set last
    return results


def threads_for(n_tasks: int, floats: int, device: torch.device) -> int:
    """Threads worth starting for `n_tasks` tasks that compute so many floats in all."""
    return max(1, min(torch.get_num_threads(), n_tasks)) if device.type == "cpu" and floats >= THREADED_FLOATS else 1


def block_floats(device: torch.device) -> int:
    """Floats that one block of attention weights may hold."""
    return BLOCK_FLOATS if device.type == "cpu" else GPU_BLOCK_FLOATS


# ------------------------------------------------------------------------------------------------ blocks of queries
def _in_blocks(
    query: Float[Tensor, "flat group query d_head"], key: Float[Tensor, "flat key d_head"],
    value: Float[Tensor, "flat key d_value"], form: AttentionForm, keys: Sequence[int], sums: bool, odds: bool,
) -> tuple[Float[Tensor, "flat group query d_value"], AttentionSums]:  # fmt: skip
    """Each block of queries is scored against the keys it can see, normalised, multiplied with the values, summed into
    its keys and dropped. `form.sinks` is [flat, group, 1]; `keys` are the chosen ones, in rising order."""
    n_flat, group, n_query, d_head = query.shape
    n_key, d_value = value.shape[1:]
    offset = n_key - n_query
    float32: dict[str, Any] = {"dtype": torch.float32, "device": query.device}
    out = torch.empty(n_query, n_flat, group, d_value, **float32).permute(1, 2, 0, 3)
    later = torch.zeros(n_flat, group, n_key, **float32) if sums else None
    diagonal = torch.empty(n_flat, group, n_query, **float32) if sums else None
    log_attention = torch.full((n_flat, group, n_query, len(keys)), -torch.inf, **float32)
    log_rest = torch.zeros_like(log_attention) if odds else None

    on_cpu, floats = query.device.type == "cpu", block_floats(query.device)
    widest = n_key if form.window is None else min(n_key, form.window + BLOCK_ROWS)
    slab = min(n_flat, max(1, (SLAB_FLOATS if on_cpu else floats) // (group * BLOCK_ROWS * widest)))
    slabs = [slice(low, min(low + slab, n_flat)) for low in range(0, n_flat, slab)]
    blocks = list(
        query_blocks(n_query, offset, form.window, floats / (slab * group), BLOCK_ROWS if on_cpu else n_query)
    )
    areas = [(stop - start) * (offset + stop - first) for start, stop, first in blocks]
    runs = [blocks[own] for own in bands(areas, -(-BANDS // len(slabs)))]
    tasks = [(at, run) for run in runs for at in slabs]
    threads = threads_for(len(tasks), sum(areas) * n_flat * group, query.device)
    buffers: SimpleQueue[Tensor] = SimpleQueue()  # one block's scores, then its weights: reused, never freed in between
    for _ in range(threads):
        buffers.put(torch.empty(max(areas) * slab * group, **float32))
    rows_of_largest = max(stop - start for start, stop, _ in blocks)
    triangle = torch.ones(rows_of_largest, rows_of_largest, dtype=torch.bool, device=query.device).triu_(1)
    columns = torch.tensor(keys, dtype=torch.long, device=query.device)

    def block(at: slice, start: int, stop: int, first: int, buffer: Tensor) -> Tensor | None:
        rows, last = stop - start, offset + stop
        width, here = last - first, slice(start, stop)
        queries = query[at, :, here].reshape(-1, group * rows, d_head)
        weights = buffer[: len(queries) * group * rows * width].view(-1, group * rows, width)
        torch.baddbmm(weights, queries, key[at, first:last].mT, beta=0, alpha=form.scaling, out=weights)
        by_head = weights.view(-1, group, rows, width)
        if form.softcap is not None:
            by_head.div_(form.softcap).tanh_().mul_(form.softcap)
        mask_block(by_head, triangle[:rows, :rows], form.window)
        sink_share = softmax_(by_head, None if form.sinks is None else form.sinks[at, :, None])
        out[at, :, here] = torch.bmm(weights, value[at, first:last]).view(-1, group, rows, d_value)
        seen = slice(bisect_left(keys, first), bisect_left(keys, last))
        if seen.start < seen.stop:
            own = by_head.index_select(-1, columns[seen] - first)
            if log_rest is not None:
                log_rest[at, :, here, seen] = rest_of(own, by_head, columns[seen] - first, sink_share).log_()
            log_attention[at, :, here, seen] = own.log_()
        if diagonal is None:
            return None
        own = by_head.diagonal(offset=width - rows, dim1=-2, dim2=-1)
        diagonal[at, :, here] = own
        own.zero_()  # before summing: subtracting it afterwards would cancel where a token mostly sees itself
        return by_head.sum(dim=-2)

    def band(task: tuple[slice, Sequence[tuple[int, int, int]]]) -> Tensor | None:
        at, run = task
        low = run[0][2]
        total = torch.zeros(at.stop - at.start, group, offset + run[-1][1] - low, **float32) if sums else None
        buffer = buffers.get()
        try:
            for start, stop, first in run:
                summed = block(at, start, stop, first, buffer)
                if summed is not None:
                    total[..., first - low : offset + stop - low] += summed
        finally:
            buffers.put(buffer)
        return total

    for (at, run), total in zip(tasks, each(band, tasks, threads), strict=True):
        if later is not None:
            later[at, :, run[0][2] : offset + run[-1][1]] += total
    return out, AttentionSums(later, diagonal, log_attention, log_rest)


def query_blocks(
    n_query: int, offset: int, window: int | None, budget: float, most_rows: int
) -> Iterator[tuple[int, int, int]]:
    """Cut the queries into (start, stop, first visible key): `most_rows`, or so many that rows * keys fit `budget`."""
    start = 0
    while start < n_query:
        first = 0 if window is None else max(0, offset + start - window + 1)
        visible = offset + start + 1 - first
        # rows * (visible + rows) <= budget, solved for rows
        rows = max(1, int((-visible + (visible**2 + 4 * budget) ** 0.5) / 2))
        stop = min(n_query, start + min(rows, most_rows))
        yield start, stop, first
        start = stop


def bands(areas: Sequence[int], n: int) -> list[slice]:
    """Cut consecutive blocks into at most `n` runs of about equal area."""
    edges, done, total = [0], 0, sum(areas)
    for index, area in enumerate(areas, 1):
        done += area
        if done * n >= total * len(edges):
            edges.append(index)
    return [slice(a, b) for a, b in pairwise(edges)]


def mask_block(scores: Float[Tensor, "batch group query key"], triangle: Tensor, window: int | None) -> None:
    """Set to -inf, in place, what a query cannot see; the block's last query stands at its last key.

    `triangle` [query, query] is True above its diagonal.
    """
    rows, width = scores.shape[-2:]
    first_query = width - rows
    scores[..., first_query:].masked_fill_(triangle, -torch.inf)
    if window is not None and (hidden := width - window) > 0:
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


def rest_of(
    own: Float[Tensor, "batch group query chosen"], weights: Float[Tensor, "batch group query key"], columns: Tensor,
    sink_share: Tensor | None,
) -> Float[Tensor, "batch group query chosen"]:  # fmt: skip
    """What the other keys have beside the weight A of each chosen column: 1 - A, or their sum where A is 0.6 or more.

    So it is exact also where A is nearly 1; only one key of a row can have so much.
    """
    top, which = own.max(dim=-1, keepdim=True)
    largest = columns[which]
    beside = weights.scatter_(-1, largest, 0).sum(dim=-1, keepdim=True)
    weights.scatter_(-1, largest, top)
    return torch.lerp(1 - own, beside if sink_share is None else beside + sink_share[..., None], most_of(own))


def most_of(weights: Tensor) -> Tensor:
    """1.0 where a weight is 0.6 or more, 0.0 elsewhere: selecting by a float is many times faster than by a bool."""
    return (weights + 0.4).floor_()


# ------------------------------------------------------------------------------------------------- chosen keys alone
def _flash(
    query: Float[Tensor, "flat group query d_head"], key: Float[Tensor, "flat key d_head"],
    value: Float[Tensor, "flat key d_head"], form: AttentionForm, keys: Sequence[int], odds: bool,
) -> tuple[Float[Tensor, "flat group query d_head"], AttentionSums]:  # fmt: skip
    """A flash kernel, whose log of the summed weights turns the scores of the chosen keys (`keys`, rising) into log A.

    Where odds are wanted it runs over all keys but the chosen ones, which then join: it gives the others' output and
    summed weights, so nothing is ever subtracted from nearly the same number and log-odds are exact also where one key
    takes nearly everything. `form.sinks` is [flat, group, 1].
    """
    n_flat, group, n_query, d_head = query.shape
    n_key = key.shape[1]
    offset = n_key - n_query
    columns = torch.tensor(keys, dtype=torch.long)
    hidden = torch.zeros(n_key, dtype=torch.bool).index_fill_(0, columns, odds)
    # The kernel's causal mask puts the first query at the first key: earlier keys, which all can see, come apart.
    parts = [
        flash_of(query, key[:, a:b], value[:, a:b], form.scaling, hidden[a:b], causal)
        for a, b, causal in ((offset, n_key, True), (0, offset, False))
        if not hidden[a:b].all()
    ]
    out = parts[0][0] if parts else torch.zeros_like(query)
    # Queries last: every step below then runs along them, whatever the number of keys that a block can see.
    log_attention = torch.empty(n_flat, group, len(keys), n_query)
    log_rest = torch.empty_like(log_attention) if odds else None
    kept = AttentionSums(None, None, log_attention.mT, None if log_rest is None else log_rest.mT)
    whole = len(parts) == 1 and form.sinks is None and not (keys and odds)  # nothing has to join the kernel's output
    if whole and not keys:
        return out, kept
    chosen_key, chosen_value = key[:, None, columns] * form.scaling, value[:, None, columns]

    def join(here: slice) -> None:
        """Chosen keys, earlier keys and learned sinks take their share of one block's output, in place."""
        log_parts = [log_part[:, :, here] for _, log_part in parts]
        log_total = torch.full((n_flat, group, 1), -torch.inf) if form.sinks is None else form.sinks
        for log_part in log_parts:
            log_total = torch.logaddexp(log_total, log_part)
        seen = bisect_left(keys, offset + here.stop)
        joined = share = None
        if seen:
            scores = chosen_key[:, :, :seen] @ query[:, :, here].mT
            late = bisect_left(keys, offset + here.start)  # the keys from here on are not seen by every query
            positions = torch.arange(offset + here.start, offset + here.stop)
            scores[:, :, late:].masked_fill_(positions < columns[late:seen, None], -torch.inf)
            if log_rest is not None:
                weights, total, peak = join_chosen(scores, log_total, out=log_rest[:, :, :seen, here])
                log_total = peak + total.log()
                joined, share = weights.mT @ chosen_value[:, :, :seen], total.reciprocal_()[..., None]
            own_log = torch.sub(scores, log_total[:, :, None], out=log_attention[:, :, :seen, here])
            own_log.clamp_(max=0)  # of scores in the thousands float32 rounds away more than is left
        log_attention[:, :, seen:, here] = -torch.inf
        if log_rest is not None:
            log_rest[:, :, seen:, here] = 0
        if whole:
            return
        own = out[:, :, here]
        if parts:
            own *= (log_parts[0] - log_total).exp_()[..., None]
        for (part, _), log_part in zip(parts[1:], log_parts[1:], strict=True):
            own.addcmul_(part[:, :, here], (log_part - log_total).exp_()[..., None])
        if joined is not None:
            own.addcmul_(joined, share)

    rows = max(1, JOINED_FLOATS // (n_flat * group * max(d_head, len(keys)) * BLOCK_ROWS)) * BLOCK_ROWS
    blocks = [slice(start, min(start + rows, n_query)) for start in range(0, n_query, rows)]
    for here in blocks:  # torch's own threads, still awake from the kernel, are faster here than others
        join(here)
    return out, kept


def flash_of(query, key, value, scaling: float, hidden: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """Attention over the keys that are not hidden: output, and log of the summed weights (-inf: none can be seen)."""
    group, n_query = query.shape[1:3]
    key, value = (x[:, None].expand(-1, group, -1, -1) for x in (key, value))
    bias = None
    if hidden.any():
        bias = torch.zeros(len(hidden)).masked_fill_(hidden, -torch.inf).expand(1, 1, n_query, -1)
    out, log_total = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, causal, attn_mask=bias, scale=scaling
    )
    if causal and hidden[0]:  # what the kernel gives for a query that sees no key is not defined
        blind = int((~hidden).int().argmax())
        out[:, :, :blind] = 0
        log_total[:, :, :blind] = -torch.inf
    return out, log_total


def join_chosen(
    scores: Float[Tensor, "flat group chosen query"], log_others: Float[Tensor, "flat group query"],
    out: Float[Tensor, "flat group chosen query"],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Softmax over the chosen keys and the sum of all others, not yet divided: (exp(scores - peak), their total, peak).

    The log of what is left beside each key is written into `out`: log(1 - A), or of the others' sum where A is 0.6 or more,
    so that it is exact also where A is nearly 1. Only one key of a query can have so much.
    """
    highest = scores.amax(dim=-2)
    peak = torch.maximum(highest, log_others)
    weights = (scores - peak[:, :, None]).exp_()
    others = (log_others - peak).exp_()
    total = weights.sum(dim=-2).add_(others)
    torch.mul(weights, -total.reciprocal()[:, :, None], out=out).log1p_()
    most = ((highest - peak).exp_() >= 0.6 * total).nonzero(as_tuple=True)
    if len(most[0]):
        beside = weights.mT[most]
        largest = beside.argmax(dim=-1)
        beside.scatter_(-1, largest[:, None], 0)
        flat, group, query = most
        out[flat, group, largest, query] = ((beside.sum(dim=-1) + others[most]) / total[most]).log_()
    return weights, total, peak
