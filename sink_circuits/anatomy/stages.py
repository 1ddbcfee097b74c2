"""MLP stages: at which stage of the forming MLP a sink begins to look like the primary sink."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pandas as pd
import torch
import xarray as xr
from torch import Tensor

from sink_circuits.anatomy.mlp import STAGES, Experts, checked_output, mlp_of
from sink_circuits.anatomy.reading import (
    activations,
    candidates_in,
    layers_of,
    manifest_of,
    prepare,
    texts,
)
from sink_circuits.anatomy.result import SINK_COLUMNS, Anatomy
from sink_circuits.detection import Sinks, primary_direction

cosine = torch.nn.functional.cosine_similarity


@dataclass(frozen=True, repr=False)
class MlpStages(Anatomy):
    """Cosines of each stage of one MLP, at the sink and at the primary of the same text.

    `cosine` [sink, branch, stage]: between the sink's vector and the primary's at the same stage of the same MLP (in
    -1..1; the neurons' space of another layer would be another space). `ordinary`: the mean of the same for ordinary
    tokens of the sink's own token id in its text (all ordinary tokens where there is none; `n_same_token` says how many).
    `direction` [sink, stage], input and output only: cosine with the layer's primary direction (centred), and `ordinary_direction`.
    `branch`: "mlp"; in a mixture of experts "all", each chosen expert by rank of its weight, and "rest" (what is not
    written by them: shared experts); `expert`, `weight` [sink, branch]: which expert, -1 for none, and its router weight.
    `layer` [sink]. The stage "output" of the whole MLP is its contribution, behind any norm that follows the MLP. NaN:
    the stage does not exist (`missing`).
    """

    kind: ClassVar[str] = "mlp_stages"
    long: ClassVar[tuple[str, ...]] = ("cosine", "ordinary")

    def missing(self) -> list[str]:
        """Stages that do not exist in these MLPs, with the reason."""
        absent = np.isnan(self.data["cosine"].to_numpy()).all(axis=(0, 1))
        stages = [str(stage) for stage, gone in zip(self.data["stage"].values, absent, strict=True) if gone]
        if "all" not in self.data["branch"].values:
            return [f"{stage}: the MLP is not gated" for stage in stages]
        reason = (
            "the experts' product is no activation times up"
            if stages == ["activation"]
            else "the experts' weights cannot be read"
        )
        return [f"{stage}: {reason}" for stage in stages]


@torch.no_grad()
def mlp_stages(
    model, tokens, sinks: Sinks, *, layer="forming", forming: pd.Series | None = None, attention_mask=None, verbose: bool = True
) -> MlpStages:  # fmt: skip
    """Cosine with the primary sink of every stage of the forming MLP, at each sink (Wong et al., 2512.22213).

    `layer`: a number, "l_start", or "forming" (found by a layer map unless `forming` is given). A primary's own cosines
    are 1. Ungated MLPs have no gate and no product; a mixture of experts has them within each expert, where the primary's
    input is sent through the sink's expert too. Raises InputError for tokens or layers that do not fit, ModelError for an
    MLP that cannot be read.
    """
    tokens, table = prepare(model, tokens, sinks, attention_mask, verbose)
    layers = layers_of(model, tokens, sinks, layer, forming, verbose)
    mlps = {one: mlp_of(model, one) for one in set(layers)}
    rows: list[dict] = [{} for _ in layers]
    for text in texts(model, tokens, sinks, verbose=verbose):
        inputs = activations(model, text.ids, mlp_inputs={layers[row] for row in text.rows})
        for row in text.rows:
            rows[row] = _one_sink(mlps[layers[row]], inputs[layers[row]], text, table.iloc[row], layers[row])
    n_ranks = max(len(row["experts"]) for row in rows)
    branches = ["all", *(f"expert {rank + 1}" for rank in range(n_ranks)), "rest"] if n_ranks else ["mlp"]
    shape = (len(rows), len(branches), len(STAGES))
    arrays = {name: np.full(shape, np.nan, dtype=np.float32) for name in ("cosine", "ordinary")}
    expert = np.full(shape[:2], -1, dtype=np.int64)
    weight = np.full(shape[:2], np.nan, dtype=np.float32)
    for index, own in enumerate(rows):
        for name, cells in own["cells"].items():
            at = branches.index(name if n_ranks else "mlp")
            for stage, pair in cells.items():
                for what, value in zip(("cosine", "ordinary"), pair, strict=True):
                    arrays[what][index, at, STAGES.index(stage)] = value
        for rank, (chosen, share) in enumerate(own["experts"]):
            expert[index, rank + 1], weight[index, rank + 1] = chosen, share
    data = xr.Dataset(
        {
            **{name: (("sink", "branch", "stage"), values) for name, values in arrays.items()},
            "direction": (("sink", "stage"), _stack(rows, "direction", 0)),
            "ordinary_direction": (("sink", "stage"), _stack(rows, "direction", 1)),
            "expert": (("sink", "branch"), expert), "weight": (("sink", "branch"), weight),
            "layer": ("sink", np.array(layers)), "n_same_token": ("sink", np.array([row["n"] for row in rows])),
        },
        coords={"sink": np.arange(len(rows)), "branch": branches, "stage": list(STAGES)},
    )  # fmt: skip
    manifest = manifest_of(model, tokens, sinks, what="mlp_stages", path=text.clean.path, layer=str(layer))
    return MlpStages(data, table[list(SINK_COLUMNS)], manifest)


def _one_sink(mlp, inputs: Tensor, text, row, layer: int) -> dict:
    """Cosines of one sink: row 0 of every stage is the primary, row 1 the sink, the rest ordinary tokens."""
    same = candidates_in(text, [int(row["token_id"])])["pos"].tolist()
    others = same or text.ordinary.nonzero().flatten().tolist()
    positions = [int(row["primary_pos"]), int(row["pos"]), *others]
    x = inputs[positions]
    contribution = text.clean.contribution[layer, positions]
    output = checked_output(mlp, x, contribution)
    cells: dict[str, dict] = {}
    experts: list[tuple[int, float]] = []
    if isinstance(mlp, Experts):
        _, index, weight = mlp.route(x)
        rest = output.clone()
        for rank in range(index.shape[1]):
            chosen = int(index[1, rank])
            experts.append((chosen, float(weight[1, rank])))
            cells[f"expert {rank + 1}"] = {name: _against_primary(v) for name, v in mlp.stages(x, chosen).items()}
            rest = rest - mlp.written(x, index[:, rank], weight[:, rank])
        if rest.norm() > 1e-3 * output.norm():  # shared experts; otherwise rounding
            cells["rest"] = {"output": _against_primary(rest)}
        cells["all"] = {"input": _against_primary(x), "output": _against_primary(contribution)}
    else:
        cells["mlp"] = {name: _against_primary(v) for name, v in {**mlp.stages(x), "output": contribution}.items()}
    unit = primary_direction(text.clean, layer, int(row["primary_pos"]))
    direction = {
        name: (float(cosine(v[1], unit, dim=-1)), _mean(cosine(v[2:].float(), unit[None], dim=-1)))
        for name, v in (("input", x.float()), ("output", contribution.float()))
    }
    return {"cells": cells, "experts": experts, "direction": direction, "n": len(same)}


def _against_primary(vectors: Tensor) -> tuple[float, float]:
    found = cosine(vectors[1:].float(), vectors[:1].float(), dim=-1)
    return float(found[0]), _mean(found[1:])


def _mean(values: Tensor) -> float:
    return float(values.mean()) if len(values) else np.nan


def _stack(rows: list[dict], name: str, which: int) -> np.ndarray:
    return np.array(
        [[row[name].get(stage, (np.nan, np.nan))[which] for stage in STAGES] for row in rows], dtype=np.float32
    )
