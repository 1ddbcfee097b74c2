"""Heads that attend to a sink: what makes its key win, angle or norm, before and after rotation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from sink_circuits import arguments
from sink_circuits.adapters import adapt
from sink_circuits.anatomy.attended import attended
from sink_circuits.anatomy.reading import manifest_of, prepare, texts
from sink_circuits.anatomy.result import SINK_COLUMNS, Anatomy
from sink_circuits.detection import Sinks
from sink_circuits.scores import MIN_QUERIES, scores_of

WHEN = ("before rotary", "after rotary")


@dataclass(frozen=True, repr=False)
class KeyQueryGeometry(Anatomy):
    """Queries and keys of the heads that attend most to each sink.

    [sink, rank]: `layer`, `head` (-1: fewer heads have a defined score), `score`, the head's sink score. [sink, rank,
    when], `when` "before rotary" and "after rotary": `cosine`, of the later queries with the sink's key; `cosine_ordinary`,
    of the same queries with the ordinary keys that they see; `key_norm`, `key_norm_ordinary`, `query_norm`; `logit`,
    `logit_ordinary`: query . key times attention's scale, before any soft-cap and without ALiBi's bias. All means over queries
    that can see the sink. Where there is no rotary position both `when` are the same; NaN: it cannot be seen in this
    model (`missing`).
    """

    kind: ClassVar[str] = "key_query_geometry"
    long: ClassVar[tuple[str, ...]] = (
        "cosine", "cosine_ordinary", "key_norm", "key_norm_ordinary", "query_norm", "logit", "logit_ordinary",
    )  # fmt: skip

    def missing(self) -> list[str]:
        """What does not exist in this model, or cannot be seen from outside, a sentence each."""
        there = self.data["logit"].where(self.data["layer"] >= 0).notnull().any(["sink", "rank"])
        said = {
            "before rotary": "queries and keys before rotary position cannot be seen: no hook stands behind their norm",
            "after rotary": "queries and keys after rotary position cannot be seen: no hook shows them, and there is no plain Hugging "
            "Face model to ask (processed weights, or a HookedTransformer)",
        }
        named = bool((self.data["layer"] >= 0).any())
        return [said[when] for when in WHEN if named and not bool(there.sel(when=when))]

    def to_dataframe(self):
        frame = super().to_dataframe()
        named = self.data[["layer", "head", "score"]].to_dataframe()
        return frame.join(named, on=["sink", "rank"])


@torch.no_grad()
def key_query_geometry(
    model, tokens, sinks: Sinks, *, n_heads: int = 4, min_queries: int = MIN_QUERIES, attention_mask=None, verbose: bool = True
) -> KeyQueryGeometry:  # fmt: skip
    """Geometry of the `n_heads` heads that attend most to each sink, among the layers that read it, l_start+1..l_end+1.

    Raises InputError for n_heads below 1; ModelError when the model shows neither queries nor keys.
    """
    n_heads = arguments.whole(n_heads, "n_heads", low=1)
    min_queries = arguments.whole(min_queries, "min_queries", low=1)
    tokens, table = prepare(model, tokens, sinks, attention_mask, verbose)
    n_heads = min(n_heads, adapt(model).n_layers * model.cfg.n_heads)
    adapter = adapt(model)
    shape = (len(table), n_heads)
    cells = {name: np.full((*shape, len(WHEN)), np.nan, dtype=np.float32) for name in KeyQueryGeometry.long}
    named = {"layer": np.full(shape, -1), "head": np.full(shape, -1), "score": np.full(shape, np.nan, dtype=np.float32)}
    for text in texts(model, tokens, sinks, verbose=verbose):
        scores = scores_of(text.clean, adapter.windows, min_queries=min_queries)
        attending = {row: readers(scores, table.iloc[row], n_heads) for row in text.rows}
        layers = sorted({layer for own in attending.values() for layer, _ in own})
        if not layers:
            continue
        vectors = attended(model, text.ids, layers)
        for row, own in attending.items():
            for rank, (layer, head) in enumerate(own):
                pos = int(table["pos"].iloc[row])
                named["layer"][row, rank], named["head"][row, rank] = layer, head
                named["score"][row, rank] = float(scores[layer, head, pos])
                for when, pair in enumerate((vectors[layer].before, vectors[layer].after)):
                    if pair is None:
                        continue
                    query, key = pair
                    found = _geometry(
                        query[:, head],
                        key[:, head * key.shape[1] // query.shape[1]],
                        pos,
                        text.ordinary,
                        adapter.forms[layer].window,
                        vectors[layer].scaling,
                    )
                    for name, value in found.items():
                        cells[name][row, rank, when] = value
    data = xr.Dataset(
        {
            **{name: (("sink", "rank", "when"), values) for name, values in cells.items()},
            **{name: (("sink", "rank"), values) for name, values in named.items()},
        },
        coords={"sink": np.arange(len(table)), "rank": np.arange(1, n_heads + 1), "when": list(WHEN)},
    )
    manifest = manifest_of(
        model, tokens, sinks, what="key_query_geometry", path=text.clean.path, min_queries=min_queries
    )
    return KeyQueryGeometry(data, table[list(SINK_COLUMNS)], manifest)


def readers(scores, row, n_heads: int) -> list[tuple[int, int]]:
    """(layer, head) with the largest defined scores of this sink, largest first."""
    first = int(row["l_start"]) + 1
    own = scores[first : int(row["l_end"]) + 2, :, int(row["pos"])]
    order = own.flatten().nan_to_num(-1.0).argsort(descending=True)[:n_heads].tolist()
    return [(first + i // own.shape[1], i % own.shape[1]) for i in order if own.flatten()[i].isfinite()]


def _geometry(
    query: Tensor, key: Tensor, pos: int, ordinary: Tensor, window: int | None, scaling: float
) -> dict[str, float]:
    """Means over the later queries that can see the sink; each query's mean over the ordinary keys that it sees."""
    stop = len(query) if window is None else min(len(query), pos + window)
    queries = query[pos + 1 : stop].float()
    keys = key.float()
    at = torch.arange(pos + 1, stop)[:, None]
    position = torch.arange(len(keys))[None]
    visible = (position < at) & ordinary[None]
    if window is not None:
        visible &= at - position < window
    visible = visible.to(keys.device)
    logits = queries @ keys.T * scaling
    size = queries.norm(dim=-1)[:, None] * keys.norm(dim=-1)[None]
    cosines = queries @ keys.T / size.clamp(min=1e-12)
    counted = visible.any(dim=1)

    def over_ordinary(values: Tensor) -> float:
        means = (values * visible).sum(dim=1) / visible.sum(dim=1).clamp(min=1)
        return float(means[counted].mean())

    return {
        "cosine": float(cosines[:, pos].mean()), "cosine_ordinary": over_ordinary(cosines),
        "key_norm": float(keys[pos].norm()), "key_norm_ordinary": float(keys[ordinary].norm(dim=-1).mean()),
        "query_norm": float(queries.norm(dim=-1).mean()), "logit": float(logits[:, pos].mean()), "logit_ordinary": over_ordinary(logits),
    }  # fmt: skip
