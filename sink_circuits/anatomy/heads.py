"""Heads that attend to a sink: what makes its key win, angle or norm, before and after rotation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from sink_circuits.anatomy.reading import activations, manifest_of, prepare, queries_or_keys, texts
from sink_circuits.anatomy.result import SINK_COLUMNS, Anatomy
from sink_circuits.detection import Sinks
from sink_circuits.errors import InputError
from sink_circuits.models import adapt
from sink_circuits.scores import MIN_QUERIES, scores_of

WHEN = ("before rotary", "after rotary")


@dataclass(frozen=True, repr=False)
class KeyQueryGeometry(Anatomy):
    """Queries and keys of the heads that attend most to each sink.

    [sink, rank]: `layer`, `head` (-1: fewer heads have a defined score), `score`, the head's sink score. [sink, rank,
    when], `when` "before rotary" and "after rotary": `cosine`, of the later queries with the sink's key; `cosine_ordinary`,
    of the same queries with the ordinary keys that they see; `key_norm`, `key_norm_ordinary`, `query_norm`; `logit`,
    `logit_ordinary`: query . key times attention's scale, before any soft-cap. All means over queries that can see the
    sink. Where there is no rotary position both `when` are the same; NaN: the model's hooks do not show it.
    """

    kind: ClassVar[str] = "key_query_geometry"
    long: ClassVar[tuple[str, ...]] = (
        "cosine", "cosine_ordinary", "key_norm", "key_norm_ordinary", "query_norm", "logit", "logit_ordinary",
    )  # fmt: skip

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
    if isinstance(n_heads, bool) or not isinstance(n_heads, int) or n_heads < 1:
        raise InputError(f"n_heads = {n_heads!r}: a whole number, at least 1.")
    tokens, table = prepare(model, tokens, sinks, attention_mask)
    adapter = adapt(model)
    shape = (len(table), n_heads)
    cells = {name: np.full((*shape, len(WHEN)), np.nan, dtype=np.float32) for name in KeyQueryGeometry.long}
    named = {"layer": np.full(shape, -1), "head": np.full(shape, -1), "score": np.full(shape, np.nan, dtype=np.float32)}
    for text in texts(model, tokens, sinks, verbose=verbose):
        scores = scores_of(text.clean, adapter.windows, min_queries=min_queries)
        readers = {row: _readers(scores, table.iloc[row], n_heads) for row in text.rows}
        layers = sorted({layer for own in readers.values() for layer, _ in own})
        if not layers:
            continue
        vectors = _queries_keys(model, text.ids, layers)
        for row, own in readers.items():
            for rank, (layer, head) in enumerate(own):
                pos = int(table["pos"].iloc[row])
                named["layer"][row, rank], named["head"][row, rank] = layer, head
                named["score"][row, rank] = float(scores[layer, head, pos])
                for when, (query, key) in enumerate(vectors[layer]):
                    if query is None:
                        continue
                    found = _geometry(
                        query[:, head],
                        key[:, head * key.shape[1] // query.shape[1]],
                        pos,
                        text.ordinary,
                        adapter.forms[layer],
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


def _readers(scores, row, n_heads: int) -> list[tuple[int, int]]:
    """(layer, head) with the largest defined scores of this sink, largest first."""
    first = int(row["l_start"]) + 1
    own = scores[first : int(row["l_end"]) + 2, :, int(row["pos"])]
    order = own.flatten().nan_to_num(-1.0).argsort(descending=True)[:n_heads].tolist()
    return [(first + i // own.shape[1], i % own.shape[1]) for i in order if own.flatten()[i].isfinite()]


def _queries_keys(model, ids, layers) -> dict[int, list[tuple[Tensor | None, Tensor | None]]]:
    """By layer [(query, key) before rotary, after rotary], each [pos, head, d_head], or None where no hook shows them."""
    adapter = adapt(model)

    def names(kind: str) -> list[str]:
        return [f"blocks.{layer}.attn.{kind}" for layer in layers]

    kinds = ("hook_q_normed", "hook_k_normed", "hook_rot_q", "hook_rot_k")
    kept = activations(
        model, ids, [*names("hook_q"), *names("hook_k")], optional=[name for kind in kinds for name in names(kind)]
    )
    rotates = "rotary" in str(getattr(adapter.cfg, "positional_embedding_type", ""))
    found = {}
    for layer in layers:
        at, attn = f"blocks.{layer}.attn.", model.blocks[layer].attn
        # A norm on queries and keys follows hook_q; where no hook shows what is behind it, this is not known.
        hidden = isinstance(getattr(attn, "q_norm", None), torch.nn.Module) and f"{at}hook_q_normed" not in kept
        before = [None if hidden else queries_or_keys(kept, layer, x) for x in "qk"]
        after = [kept.get(f"{at}hook_rot_{x}") for x in "qk"] if rotates else before
        found[layer] = [
            (None, None) if pair[0] is None or pair[1] is None else (pair[0], pair[1]) for pair in (before, after)
        ]
    return found


def _geometry(query: Tensor, key: Tensor, pos: int, ordinary: Tensor, form) -> dict[str, float]:
    """Means over the later queries that can see the sink; each query's mean over the ordinary keys that it sees."""
    stop = len(query) if form.window is None else min(len(query), pos + form.window)
    queries = query[pos + 1 : stop].float()
    keys = key.float()
    at = torch.arange(pos + 1, stop)[:, None]
    position = torch.arange(len(keys))[None]
    visible = (position < at) & ordinary[None]
    if form.window is not None:
        visible &= at - position < form.window
    visible = visible.to(keys.device)
    logits = queries @ keys.T * form.scaling
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
