"""Sink scores: how much attention a position draws, per layer and head, and its log-odds.

Definitions (Gu et al., 2410.10781, section 3; Wong et al., 2512.22213): the score s[l, h, k] is the mean of
A[l, h, q, k] over the later queries q > k that can see k. With fewer than `min_queries` such queries it is undefined:
NaN, never 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from sink_circuits.errors import InputError
from sink_circuits.models import adapt
from sink_circuits.prompts import Tokens, as_tokens
from sink_circuits.runs import CleanRun, Columns, run_clean

MIN_QUERIES = 16
"""Later queries that a score needs: the mean of fewer is dominated by which tokens they happen to be."""


@dataclass(frozen=True)
class SinkScores:
    """Scores of every position of every prompt: `scores[i]` is [layer, head, key] of prompt i, NaN where undefined."""

    scores: tuple[Float[Tensor, "layer head key"], ...]
    tokens: Tokens
    inclusive: bool
    min_queries: int

    def to_dataframe(self) -> pd.DataFrame:
        """One row per prompt, layer, head and key: columns prompt, layer, head, pos, token_id, score."""
        frames = []
        for name, ids, scores in zip(self.tokens.names, self.tokens.ids, self.scores, strict=True):
            index = pd.MultiIndex.from_product([range(n) for n in scores.shape], names=["layer", "head", "pos"])
            frame = pd.DataFrame({"score": scores.reshape(-1).cpu().numpy()}, index=index).reset_index()
            frame.insert(0, "prompt", name)
            frame.insert(4, "token_id", ids.cpu().numpy()[frame["pos"]])
            frames.append(frame)
        return pd.concat(frames, ignore_index=True)

    def sink_rate(self, eps: float = 0.3) -> float:
        """Sink^eps of the first position: share of (prompt, layer, head) with score > eps (Gu et al., section 3)."""
        first = torch.cat([s[..., 0].reshape(-1) for s in self.scores])
        return (first[first.isfinite()] > eps).double().mean().item()


def sink_scores(
    model, tokens, *, attention_mask=None, inclusive: bool = False, min_queries: int = MIN_QUERIES, clean_cache=None, path: str = "auto"
) -> SinkScores:  # fmt: skip
    """Exact scores of all positions, in memory linear in the number of tokens on the fast path.

    `inclusive`: count the query at the key itself too (Gu et al.'s alpha). Values lie in [0, 1] or are NaN.
    Raises InputError for tokens that do not fit the model, CacheError for a cache that misses hooks.
    """
    check_min_queries(min_queries)
    windows = adapt(model).windows
    tokens = as_tokens(model, tokens, attention_mask)
    scores = []
    for row, ids in enumerate(tokens):
        mask = None if attention_mask is None else torch.as_tensor(attention_mask)[row]
        clean = run_clean(model, ids, clean_cache=clean_cache, row=row, mask=mask, resumable=False, path=path)
        scores.append(scores_of(clean, windows, inclusive=inclusive, min_queries=min_queries))
    return SinkScores(tuple(scores), tokens, inclusive, min_queries)


def scores_of(
    clean: CleanRun, windows: Sequence[int | None], *, inclusive: bool = False, min_queries: int = MIN_QUERIES
) -> Float[Tensor, "layer head key"]:
    """Scores of all positions from a clean run's attention sums."""
    check_min_queries(min_queries)
    sums = clean.later + clean.diagonal if inclusive else clean.later
    counts = query_counts(clean.n_positions, windows, device=sums.device) + int(inclusive)
    return (sums / counts[:, None]).masked_fill(counts[:, None] < min_queries, torch.nan)


def check_min_queries(min_queries: int) -> None:
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
