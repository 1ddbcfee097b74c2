"""Profiles over layers: norms of keys, values and hidden states; levels; sink score against lifetime and MLP norm."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from sink_circuits import arguments, statistics
from sink_circuits.adapters import adapt
from sink_circuits.anatomy.reading import activations, manifest_of, prepare, queries_or_keys, texts
from sink_circuits.anatomy.result import SINK_COLUMNS, Anatomy
from sink_circuits.detection import Sinks
from sink_circuits.errors import InputError
from sink_circuits.records import Record, read_records, records_table
from sink_circuits.results import Manifest
from sink_circuits.scores import MIN_QUERIES, scores_of

REST = "rest"
KINDS = ("bos_sink", "noise", "primary", "primary-like", "secondary")


@dataclass(frozen=True, repr=False)
class NormsByLayer(Anatomy):
    """l2 norms by layer, [line, layer]: `key` and `value` (as attention uses them, mean over heads) and `hidden` (resid_post).

    A line is a sink's position (once, however many lives it has), or the mean over the ordinary tokens of a text (kind "rest", pos -1).
    """

    kind: ClassVar[str] = "norms_by_layer"
    row_axis: ClassVar[str] = "line"
    long: ClassVar[tuple[str, ...]] = ("key", "value", "hidden")


@torch.no_grad()
def norms_by_layer(model, tokens, sinks: Sinks, *, attention_mask=None, verbose: bool = True) -> NormsByLayer:
    """Norms of keys, values and hidden states by layer: each primary, each other sink, and the mean of the rest.

    Keys are those that meet the queries: behind any norm on keys (rotation keeps their norm).
    """
    tokens, table = prepare(model, tokens, sinks, attention_mask, verbose)
    rows, values = [], []
    for text in texts(model, tokens, sinks, verbose=verbose):
        own = table.iloc[text.rows].drop_duplicates("pos")
        keys, vectors = _keys_values(model, text)
        hidden = torch.stack([text.clean.resid_post(layer).float().norm(dim=-1) for layer in range(len(keys))])
        norms = torch.stack([keys, vectors, hidden])  # [what, layer, pos]
        rows += own[["prompt", "pos", "token", "kind"]].to_dict("records")
        rows.append({"prompt": text.name, "pos": -1, "token": "", "kind": REST})
        values += [*norms[:, :, own["pos"].tolist()].permute(2, 0, 1), norms[:, :, text.ordinary].mean(dim=-1)]
    stacked = torch.stack(values).cpu().numpy()
    data = xr.Dataset(
        {name: (("line", "layer"), stacked[:, i]) for i, name in enumerate(NormsByLayer.long)},
        coords={"line": np.arange(len(rows)), "layer": np.arange(stacked.shape[-1])},
    )
    manifest = manifest_of(model, tokens, sinks, what="norms_by_layer", path=text.clean.path)
    return NormsByLayer(data, pd.DataFrame(rows), manifest)


def _keys_values(model, text) -> tuple[Float[Tensor, "layer pos"], Float[Tensor, "layer pos"]]:
    """Norms of keys and values, mean over their heads."""
    if text.clean.keys is not None:
        pairs = [
            (key[0].transpose(0, 1), value[0].transpose(0, 1))
            for key, value in zip(text.clean.keys, text.clean.values, strict=True)
        ]
    else:
        layers = range(adapt(model).n_layers)
        names = {x: [f"blocks.{layer}.attn.hook_{x}" for layer in layers] for x in ("k", "v", "rot_k", "k_normed")}
        kept = activations(model, text.ids, [*names["k"], *names["v"]], optional=[*names["k_normed"], *names["rot_k"]])
        keys = [kept.get(name, queries_or_keys(kept, layer, "k")) for layer, name in enumerate(names["rot_k"])]
        pairs = list(zip(keys, (kept[name] for name in names["v"]), strict=True))
    means = [torch.stack([x.float().norm(dim=-1).mean(dim=-1) for x in pair]) for pair in pairs]
    return tuple(torch.stack(means).unbind(dim=1))  # type: ignore[return-value]


# Levels.


@dataclass(frozen=True, repr=False)
class Levels(Anatomy):
    """How many sinks begin in which layer and live how long: `count` [model, l_start, lifetime]; `n_prompts` [model].

    `table`: one row per cell that is not 0.
    """

    kind: ClassVar[str] = "levels"
    row_axis: ClassVar[str] = "cell"
    long: ClassVar[tuple[str, ...]] = ("count",)


def levels(
    sources: Mapping[str, Sinks | Sequence[Record] | str | Path] | Sinks, *, kinds: Sequence[str] = ("secondary",)
) -> Levels:
    """Sink levels (Wong et al., 2512.22213): counts by creation layer and lifetime, one panel per model.

    `sources`: by model name a sink table, records of the published code, or their JSON-lines file; or one sink table.
    `kinds`: which sinks count ("secondary"; "primary-like", "primary" and, in records, "bos_sink", "noise" may be asked for).
    In records l_start is the first layer found and the lifetime their number. Raises InputError when nothing counts.
    """
    if isinstance(sources, Sinks):
        sources = {str(sources.manifest.model).rstrip("/").rsplit("/", 1)[-1]: sources}
    remedy = "pass a table of sinks, or records, by model name"
    if not arguments.instance(sources, "sources", Mapping, remedy):
        raise InputError(f"no sinks were given: {remedy}.")
    kinds = arguments.several(kinds, "kinds")
    for kind in kinds:
        arguments.one_of(kind, "kind", KINDS)
    frames, manifests, n_prompts = [], [], []
    for name, source in sources.items():
        if isinstance(source, Sinks):
            frame = source.table
            manifests.append(source.manifest)
            n_prompts.append(len(source.prompts))
        else:
            records = read_records(source) if isinstance(source, str | Path) else arguments.several(source, "records")
            frame = records_table(records).rename(columns={"sink_type": "kind"})
            n_prompts.append(len(records))
        frames.append(frame.loc[frame["kind"].isin(kinds), ["l_start", "lifetime"]].assign(model=str(name)))
    frame = pd.concat(frames, ignore_index=True)
    if not len(frame):
        raise InputError(f"no sinks of kind {' or '.join(kinds)} are among those given: name other kinds.")
    counts = frame.groupby(["model", "l_start", "lifetime"]).size()
    starts, lives = (np.arange(int(frame[x].min()), int(frame[x].max()) + 1) for x in ("l_start", "lifetime"))
    index = pd.MultiIndex.from_product([[str(n) for n in sources], starts, lives], names=counts.index.names)
    data = xr.Dataset.from_dataframe(counts.reindex(index, fill_value=0).rename("count").to_frame())
    data = data.reindex(model=[str(n) for n in sources])  # from_dataframe sorts them
    data["n_prompts"] = ("model", np.array(n_prompts))
    shared: dict = {
        "what": "levels",
        "model": ", ".join(map(str, sources)),
        "n_prompts": max(n_prompts),
    }  # the same prompts, often
    settings: dict = {"kinds": list(kinds), "sources": {str(k): type(v).__name__ for k, v in sources.items()}}
    if len(manifests) == len(sources):
        settings["found"] = [dict(m.settings) for m in manifests]
        manifest = dataclasses.replace(manifests[0], **shared, settings=settings)
    else:  # records say nothing of the model's weights
        manifest = Manifest(**shared, weights="", dtype="", tokens="", path="records", settings=settings)
    return Levels(data, counts.rename("count").reset_index(), manifest)


# Score by lifetime.


@dataclass(frozen=True, repr=False)
class ScoreByLifetime(Anatomy):
    """[sink, layer]: `score` (mean over heads of the sink score; NaN where undefined), `mlp_norm`, the norm of the MLP's contribution.

    `table` adds `life_score`: the mean score over the layers that read the sink, l_start+1..l_end+1.
    """

    kind: ClassVar[str] = "score_by_lifetime"
    long: ClassVar[tuple[str, ...]] = ("score", "mlp_norm")

    def by_lifetime(self, confidence: float = 0.95) -> pd.DataFrame:
        """Mean score over the reading layers by lifetime, over prompts, with its bootstrap interval.

        Columns: lifetime, mean, low, high, n_prompts, n_sinks.
        """
        rows = []
        for lifetime, own in self.table.groupby("lifetime"):
            estimate = statistics.bootstrap_over_prompts(
                own["life_score"], own["prompt"], name=f"lifetime {lifetime}", confidence=confidence
            )
            rows.append(
                {
                    "lifetime": lifetime,
                    "mean": estimate.mean,
                    "low": estimate.low,
                    "high": estimate.high,
                    "n_prompts": estimate.n,
                    "n_sinks": int(own["life_score"].notna().sum()),
                }
            )
        return pd.DataFrame(rows)


@torch.no_grad()
def score_by_lifetime(
    model, tokens, sinks: Sinks, *, min_queries: int = MIN_QUERIES, attention_mask=None, verbose: bool = True
) -> ScoreByLifetime:  # fmt: skip
    """Sink score and norm of the MLP's output by layer, for every sink (Wong et al., 2512.22213: the norm sets score and lifetime).

    Observed, not caused: dose-response is the experiment. The norm is the contribution's, behind any norm after the MLP.
    """
    min_queries = arguments.whole(min_queries, "min_queries", low=1)
    tokens, table = prepare(model, tokens, sinks, attention_mask, verbose)
    score: list[np.ndarray] = [np.empty(0)] * len(table)
    norm = list(score)
    for text in texts(model, tokens, sinks, verbose=verbose):
        scores = scores_of(text.clean, adapt(model).windows, min_queries=min_queries).mean(dim=1)
        for row in text.rows:
            pos = int(table["pos"].iloc[row])
            score[row] = scores[:, pos].cpu().numpy()
            norm[row] = text.clean.contribution[:, pos].float().norm(dim=-1).cpu().numpy()
    data = xr.Dataset(
        {"score": (("sink", "layer"), np.stack(score)), "mlp_norm": (("sink", "layer"), np.stack(norm))},
        coords={"sink": np.arange(len(table)), "layer": np.arange(len(score[0]))},
    )
    life = [one[first + 1 : last + 2] for one, first, last in zip(score, table["l_start"], table["l_end"], strict=True)]
    means = [float(one.mean()) if len(one) else np.nan for one in life]
    manifest = manifest_of(
        model, tokens, sinks, what="score_by_lifetime", path=text.clean.path, min_queries=min_queries
    )
    return ScoreByLifetime(data, table[list(SINK_COLUMNS)].assign(life_score=means), manifest)
