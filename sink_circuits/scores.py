"""Sink scores: how much attention a position draws, per layer and head, and its log-odds.

Definitions (Gu et al., 2410.10781, section 3; Wong et al., 2512.22213): the score s[l, h, k] is the mean of
A[l, h, q, k] over the later queries q > k that can see k. With fewer than `min_queries` such queries it is undefined:
NaN, never 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from sink_circuits import arguments
from sink_circuits.adapters import Adapter, adapt
from sink_circuits.arguments import MOST, is_whole, shown
from sink_circuits.clean_runs import CleanRun, Columns, check_chosen, resolve_path, run_clean
from sink_circuits.errors import InputError
from sink_circuits.prompts import Tokens, as_tokens

MIN_QUERIES = 16
"""Later queries that a score needs: the mean of fewer is dominated by which tokens they happen to be."""


@dataclass(frozen=True)
class SinkScores:
    """Scores of every position of every prompt: `scores[i]` is [layer, head, key] of prompt i, NaN where undefined.

    `keys[i]`: the positions of prompt i that were asked for, NaN at all others; None: all positions were.
    """

    scores: tuple[Float[Tensor, "layer head key"], ...]
    tokens: Tokens
    inclusive: bool
    min_queries: int
    keys: tuple[tuple[int, ...], ...] | None = None

    def to_dataframe(self) -> pd.DataFrame:
        """One row per prompt, layer, head and key asked for: columns prompt, layer, head, pos, token_id, score."""
        frames = []
        keys = self.keys or [range(len(ids)) for ids in self.tokens]
        for name, ids, scores, own in zip(self.tokens.names, self.tokens.ids, self.scores, keys, strict=True):
            axes = [range(scores.shape[0]), range(scores.shape[1]), own]
            index = pd.MultiIndex.from_product(axes, names=["layer", "head", "pos"])
            values = scores[..., list(own)].reshape(-1).cpu().numpy()
            frame = pd.DataFrame({"score": values}, index=index).reset_index()
            frame.insert(0, "prompt", name)
            frame.insert(4, "token_id", ids.cpu().numpy()[frame["pos"]])
            frames.append(frame)
        return pd.concat(frames, ignore_index=True)

    def sink_rate(self, eps: float = 0.3) -> float:
        """Sink^eps of the first position: share of (prompt, layer, head) with score > eps (Gu et al., section 3).

        Raises InputError when scores were asked for other positions only.
        """
        eps = arguments.number(eps, "eps", 0, 1)
        for name, keys in zip(self.tokens.names, self.keys or (), strict=self.keys is not None):
            if 0 not in keys:
                raise InputError(f"the sink rate is position 0's, and prompt {name!r} has scores of {keys}: add key 0.")
        first = torch.cat([s[..., 0].reshape(-1) for s in self.scores])
        return (first[first.isfinite()] > eps).double().mean().item()


def sink_scores(
    model, tokens, *, keys: Sequence[int] | Sequence[Sequence[int]] | None = None, attention_mask=None, inclusive: bool = False,
    min_queries: int = MIN_QUERIES, clean_cache=None, path: str = "auto",
) -> SinkScores:  # fmt: skip
    """Exact scores of all positions, or of the chosen ones, in memory linear in the number of tokens on the fast path.

    `keys`: positions whose scores are wanted, for every prompt the same or a list for each; scores of all others are
    NaN. A few keys cost little beyond the forward pass itself. `inclusive`: count the query at the key itself too (Gu
    et al.'s alpha). Values lie in [0, 1] or are NaN. Raises InputError for tokens that do not fit the model or a key
    that is negative, out of range or named twice, CacheError for a cache that misses hooks.
    """
    check_min_queries(min_queries)
    arguments.flag(inclusive, "inclusive")
    adapter = adapt(model)
    tokens = as_tokens(model, tokens, attention_mask)
    chosen = None if keys is None else keys_of_prompts(keys, tokens)
    scores = []
    for row, ids in enumerate(tokens):
        if chosen is not None and clean_cache is None and resolve_path(adapter, path) == "fast":
            sums = _chosen_sums(adapter, ids, chosen[row], inclusive)
            scores.append(_mean_over_queries(sums, adapter.windows, inclusive, min_queries))
            continue
        mask = None if attention_mask is None else torch.as_tensor(attention_mask)[row]
        clean = run_clean(model, ids, clean_cache=clean_cache, row=row, mask=mask, resumable=False, path=path)
        every = scores_of(clean, adapter.windows, inclusive=inclusive, min_queries=min_queries)
        if chosen is not None:
            others = [position for position in range(len(ids)) if position not in chosen[row]]
            every[..., others] = torch.nan
        scores.append(every)
    return SinkScores(tuple(scores), tokens, inclusive, min_queries, chosen)


def keys_of_prompts(
    keys: Sequence[int] | Sequence[Sequence[int]], tokens: Sequence[Tensor]
) -> tuple[tuple[int, ...], ...]:
    """The key positions of each prompt, checked; a flat list is every prompt's. Raises InputError."""
    keys = arguments.several(keys, "keys", empty=True)
    each: list[Any] = list(keys) if any(np.ndim(own) for own in keys) else [keys] * len(tokens)
    if len(each) != len(tokens):
        raise InputError(
            f"keys of {len(each)} prompts for {len(tokens)} prompts: give each its own list, or one for all."
        )
    checked = tuple(check_chosen(own, len(ids)) for own, ids in zip(each, tokens, strict=True))
    if not all(checked):
        raise InputError("no keys are named for a prompt: name at least one, or leave `keys` out for all.")
    return checked


@torch.no_grad()
def _chosen_sums(
    adapter: Adapter, ids: Tensor, keys: Sequence[int], inclusive: bool
) -> Float[Tensor, "layer head key"]:
    """Attention on the chosen keys summed over later queries, NaN elsewhere; one layer's columns are held at a time."""
    inputs = adapter.twin.block_inputs(ids)
    sums = torch.full((adapter.n_layers, adapter.n_heads, len(ids)), torch.nan, device=ids.device)
    layers = range(adapter.n_layers)
    for run in adapter.twin.run(inputs.embed, inputs, layers, chosen=torch.tensor(keys), odds=False):
        weights = run.tap.attention.log_attention[0].exp_()
        for index, key in enumerate(keys):
            sums[run.layer, :, key] = weights[:, key + (not inclusive) :, index].sum(dim=-1)
    return sums


def scores_of(
    clean: CleanRun, windows: Sequence[int | None], *, inclusive: bool = False, min_queries: int = MIN_QUERIES
) -> Float[Tensor, "layer head key"]:
    """Scores of all positions from a clean run's attention sums."""
    check_min_queries(min_queries)
    sums = clean.later + clean.diagonal if inclusive else clean.later
    return _mean_over_queries(sums, windows, inclusive, min_queries)


def _mean_over_queries(sums: Tensor, windows: Sequence[int | None], inclusive: bool, min_queries: int) -> Tensor:
    counts = query_counts(sums.shape[-1], windows, device=sums.device) + int(inclusive)
    return (sums / counts[:, None]).masked_fill(counts[:, None] < min_queries, torch.nan)


def check_min_queries(min_queries: int) -> None:
    if not is_whole(min_queries):
        raise InputError(f"min_queries = {shown(min_queries)}: give a whole number, at least 1.")
    arguments.whole(min_queries, "min_queries", low=-MOST)
    if min_queries < 1:
        raise InputError(f"min_queries = {min_queries}: at least 1, a mean over no queries is undefined.")


def query_counts(n_positions: int, windows: Sequence[int | None], device=None) -> Float[Tensor, "layer key"]:
    """How many strictly later queries can see each key: T - 1 - k, at most window - 1."""
    later = torch.arange(n_positions - 1, -1, -1, device=device, dtype=torch.float32)
    return torch.stack([later if window is None else later.clamp(max=window - 1) for window in windows])


def column_scores(
    columns: Columns, windows: Sequence[int | None], min_queries: int = MIN_QUERIES
) -> Float[Tensor, "layer head chosen"]:
    """Scores of the chosen keys from their columns; NaN with fewer than `min_queries` later queries."""
    return _column_mean(columns.log_attention.exp(), columns, windows, min_queries)


def column_log_odds(
    columns: Columns, windows: Sequence[int | None], min_queries: int = MIN_QUERIES
) -> Float[Tensor, "layer head chosen"]:
    """Mean over later queries of log A - log(sum of A over all other keys): no floor and no ceiling."""
    return _column_mean(columns.log_attention - columns.log_rest, columns, windows, min_queries)


def _column_mean(values: Tensor, columns: Columns, windows: Sequence[int | None], min_queries: int) -> Tensor:
    n_layers, n_heads, n_query, _ = values.shape
    out = torch.full((n_layers, n_heads, len(columns.chosen)), torch.nan, device=values.device)
    for index, key in enumerate(columns.chosen):
        for window in set(windows):
            layers = [layer for layer, own in enumerate(windows) if own == window]
            stop = n_query if window is None else min(n_query, key + window)
            if stop - key - 1 >= min_queries:
                out[layers, :, index] = values[layers, :, key + 1 : stop, index].mean(-1)
    return out
