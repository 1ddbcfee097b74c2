"""Attention patterns at the layers and heads that attend to sinks, in a window of positions around them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from sink_circuits import arguments
from sink_circuits.adapters import adapt
from sink_circuits.anatomy.heads import readers
from sink_circuits.anatomy.reading import manifest_of, prepare, texts
from sink_circuits.anatomy.result import Anatomy
from sink_circuits.clean_runs import run_clean
from sink_circuits.detection import Sinks
from sink_circuits.errors import InputError
from sink_circuits.prompts import token_texts
from sink_circuits.scores import MIN_QUERIES, scores_of

N_POSITIONS = 48
"""Positions of a window, unless told: more cannot be told apart in a picture."""
AROUND = 3
"""Positions before and after each sink that a window holds."""
PRIMARIES = ("primary", "bos_sink")


@dataclass(frozen=True)
class Window:
    """The patterns of one text: rows of the result's table, the heads, A[q, k] and what went to keys outside."""

    tokens: pd.DataFrame
    heads: list[tuple[int, int, float]]
    attention: Float[np.ndarray, "rank query key"]
    elsewhere: Float[np.ndarray, "rank query"]


@dataclass(frozen=True, repr=False)
class AttentionPatterns(Anatomy):
    """Patterns of the heads that attend most to a text's sinks, between the positions of a window.

    `table`: a row per position of a window, text after text: prompt, pos, token, kind ("" where no sink stands).
    `attention` [token, rank, slot]: A[q, k] in 0..1, from the row's position as the query to the window's slot-th position as
    the key; 0 where the query cannot see the key, NaN behind the window's end. `elsewhere` [token, rank]: what the query
    gives to all keys outside the window, and to a learned sink: with it a row sums to 1. `layer`, `head`, `score` [token, rank]:
    the head (-1: fewer heads have a defined score), and its largest sink score; the same in all rows of a text.
    """

    kind: ClassVar[str] = "attention_patterns"
    row_axis: ClassVar[str] = "token"
    long: ClassVar[tuple[str, ...]] = ("attention",)

    @property
    def prompts(self) -> list[str]:
        """The texts that are shown."""
        return self.table["prompt"].drop_duplicates().tolist()

    def of(self, prompt: str | None = None) -> Window:
        """The window of one text, the first when None. Raises InputError for a text that is not here."""
        prompt = self.prompts[0] if prompt is None else prompt
        if not isinstance(prompt, str) or prompt not in self.prompts:
            raise InputError(
                f"prompt {arguments.shown(prompt)} has no patterns here: there are {', '.join(map(str, self.prompts[:8]))}."
            )
        rows = np.flatnonzero((self.table["prompt"] == prompt).to_numpy())
        own = self.data.isel(token=rows)
        ranks = np.flatnonzero(own["layer"].to_numpy()[0] >= 0)
        named = [own[name].to_numpy()[0, ranks].tolist() for name in ("layer", "head", "score")]
        attention = own["attention"].to_numpy()[:, ranks, : len(rows)].transpose(1, 0, 2)
        tokens = self.table.iloc[rows].reset_index(drop=True)
        return Window(tokens, list(zip(*named, strict=True)), attention, own["elsewhere"].to_numpy()[:, ranks].T)

    def to_dataframe(self) -> pd.DataFrame:
        """Long format, one row per head, query and key up to it: prompt, layer, head, query, query_token, key, key_token, attention."""
        frames = []
        for prompt in self.prompts:
            own = self.of(prompt)
            q, k = np.tril_indices(len(own.tokens))
            pos, token = own.tokens["pos"].to_numpy(), own.tokens["token"].to_numpy()
            for (layer, head, _), values in zip(own.heads, own.attention, strict=True):
                columns = {"prompt": prompt, "layer": layer, "head": head, "query": pos[q], "query_token": token[q]}
                frames.append(
                    pd.DataFrame({**columns, "key": pos[k], "key_token": token[k], "attention": values[q, k]})
                )
        return pd.concat(frames, ignore_index=True)

    def view(self, prompt: str | None = None, *, name: str = "patterns", library: bool = True) -> str:
        """circuitsvis' attention heads of one text as HTML, for a notebook or a page: `figures.attention_view`."""
        from sink_circuits.figures import attention_view

        return attention_view(self.of(prompt), name=name, library=library)


@torch.no_grad()
def attention_patterns(
    model, tokens, sinks: Sinks, *, n_heads: int = 4, n_positions: int = N_POSITIONS, around: int = AROUND,
    min_queries: int = MIN_QUERIES, attention_mask=None, verbose: bool = True,
) -> AttentionPatterns:  # fmt: skip
    """Patterns of the `n_heads` heads that attend most to each text's sinks (to the primary where no other is given).

    A window holds the primary and the other sinks, those with the highest score first, `around` positions before and after
    each, and positions spread evenly over the rest of the text while fewer than `n_positions` are there. Whole patterns are
    never held. Raises InputError for numbers out of range, or when no head has a defined score.
    """
    n_heads = arguments.whole(n_heads, "n_heads", low=1)
    n_positions = arguments.whole(n_positions, "n_positions", low=2, high=512)
    around = arguments.whole(around, "around")
    min_queries = arguments.whole(min_queries, "min_queries", low=1)
    tokens, table = prepare(model, tokens, sinks, attention_mask, verbose)
    windows, rows, path = [], [], "auto"
    for text in texts(model, tokens, sinks, verbose=verbose):
        own, path = table.iloc[text.rows], text.clean.path
        scores = scores_of(text.clean, adapt(model).windows, min_queries=min_queries)
        heads = _heads(scores, own, n_heads)
        if not heads:
            continue
        secondary = own[~own["kind"].isin(PRIMARIES)].sort_values("score", ascending=False)["pos"].tolist()
        first = sorted({*own["primary_pos"].astype(int), *own.loc[own["kind"].isin(PRIMARIES), "pos"]})
        window = window_around([*first, *secondary], len(text.ids), n_positions, around)
        attention = _attention(model, text.ids, window, heads)
        named, kinds = (
            token_texts(model, text.ids),
            {**dict.fromkeys(first, "primary"), **dict(zip(own["pos"], own["kind"], strict=True))},
        )
        rows += [{"prompt": text.name, "pos": pos, "token": named[pos], "kind": kinds.get(pos, "")} for pos in window]
        windows.append((attention, heads))
    if not windows:
        raise InputError("no head has a defined score for these sinks: give longer texts, or a lower min_queries.")
    n_slots, n_ranks = max(len(a) for a, _ in windows), max(len(heads) for _, heads in windows)
    shape = (len(rows), n_ranks)
    cells = np.full((*shape, n_slots), np.nan, dtype=np.float32)
    elsewhere, score = np.full(shape, np.nan, dtype=np.float32), np.full(shape, np.nan, dtype=np.float32)
    layer, head = np.full(shape, -1), np.full(shape, -1)
    start = 0
    for attention, heads in windows:
        at = (slice(start, start + len(attention)), slice(0, len(heads)))
        cells[*at, : attention.shape[-1]] = attention
        elsewhere[at] = 1 - attention.sum(axis=-1)
        layer[at], head[at], score[at] = zip(*heads, strict=True)
        start += len(attention)
    data = xr.Dataset(
        {
            "attention": (("token", "rank", "slot"), cells), "elsewhere": (("token", "rank"), elsewhere.clip(0, 1)),
            "layer": (("token", "rank"), layer), "head": (("token", "rank"), head), "score": (("token", "rank"), score),
        },
        coords={"token": np.arange(len(rows)), "rank": np.arange(1, n_ranks + 1), "slot": np.arange(n_slots)},
    )  # fmt: skip
    manifest = manifest_of(model, tokens, sinks, what="attention_patterns", path=path, min_queries=min_queries)
    return AttentionPatterns(data, pd.DataFrame(rows), manifest)


def window_around(sinks: Sequence[int], n_tokens: int, n_positions: int, around: int) -> list[int]:
    """At most `n_positions` of a text's positions, in order: sinks with their neighbours, the first ones first, then evenly spread ones."""
    chosen: set[int] = set()
    for pos in sinks:
        near = {p for p in range(pos - around, pos + around + 1) if 0 <= p < n_tokens}
        for more in (near, {pos}):
            if len(chosen | more) <= n_positions:
                chosen |= more
                break
    rest = [pos for pos in range(n_tokens) if pos not in chosen]
    room = min(n_positions - len(chosen), len(rest))
    return sorted(chosen | {rest[int(i)] for i in np.linspace(0, len(rest) - 1, room).round()})


def _heads(scores: Float[Tensor, "layer head key"], own: pd.DataFrame, n_heads: int) -> list[tuple[int, int, float]]:
    """(layer, head, score) of the heads with the largest score of any of these sinks, largest first."""
    later = own[~own["kind"].isin(PRIMARIES)]
    best: dict[tuple[int, int], float] = {}
    for _, row in (later if len(later) else own).iterrows():
        for layer, head in readers(scores, row, n_heads):
            best[layer, head] = max(best.get((layer, head), 0.0), float(scores[layer, head, int(row["pos"])]))
    ordered = sorted(best.items(), key=lambda one: (-one[1], one[0]))
    return [(layer, head, score) for (layer, head), score in ordered[:n_heads]]


def _attention(model, ids: Int[Tensor, " pos"], window: list[int], heads) -> Float[np.ndarray, "query rank key"]:
    columns = run_clean(model, ids, chosen=window, resumable=False).columns
    order = [columns.chosen.index(pos) for pos in window]
    own = [columns.log_attention[layer, head][window][:, order].exp() for layer, head, _ in heads]
    values = torch.stack(own, dim=1).cpu().numpy()
    values[values < 1e-30] = 0.0  # what a query cannot see stands at the floor of its logarithm
    return values
