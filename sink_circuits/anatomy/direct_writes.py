"""Writers: which component writes a sink's direction into the residual stream, and which takes it out again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from sink_circuits import arguments
from sink_circuits.adapters import adapt
from sink_circuits.anatomy.reading import (
    SKIP_FIRST,
    activations,
    check_equal,
    linear_gains,
    manifest_of,
    norms_behind,
    prepare,
    texts,
)
from sink_circuits.anatomy.result import SINK_COLUMNS, Anatomy
from sink_circuits.clean_runs import CleanRun
from sink_circuits.detection import Sinks, primary_direction
from sink_circuits.errors import InputError, ModelError

PARTS = ("embed", "head", "attn_bias", "attn", "mlp")
DIRECTIONS = ("start", "life", "end")
ROLES = {"writer": "start", "carrier": "life", "eraser": "end"}


@dataclass(frozen=True, repr=False)
class Writers(Anatomy):
    """What every component writes along the primary direction, in units of the residual stream.

    The primary direction turns from layer to layer, and components of all layers add up only along one: `direction`
    "start" is that of l_start, "end" that of l_end, "life" the mean over the layers of the sink's life, each a unit
    vector u of the centred primary. `write` [sink, direction, component]: c . u for what the component adds at the sink;
    `ordinary`: its mean over the ordinary tokens of the text. `component`: "embed" (all that stands before block 0), "L3H2" (a
    head, through W_O and any norm behind attention, its scale held at its actual value), "L3 bias" (of attention), "L3
    attn" (where heads cannot be told apart), "L3 mlp"; `component_layer` (-1 for embed) and `part` (index into `PARTS`)
    [component]. They add up: the sum over components of layers <= l is `resid` [sink, direction, layer], resid_post . u; likewise
    `ordinary_resid`. `agreement` [sink, direction, layer]: cosine of u with the layer's own primary direction. `error`
    [sink]: largest error of the sum, relative to the largest value added so far.
    """

    kind: ClassVar[str] = "writers"
    long: ClassVar[tuple[str, ...]] = ("write", "ordinary")

    def excess(self) -> xr.DataArray:
        """What a component writes at the sink beyond what it writes at ordinary tokens, [sink, direction, component]."""
        return self.data["write"] - self.data["ordinary"]

    def so_far(self) -> xr.DataArray:
        """The excess written by all components up to a layer: that of the residual stream, [sink, direction, layer]."""
        return self.data["resid"] - self.data["ordinary_resid"]

    def peak(self, direction: str = "end") -> np.ndarray:
        """The layer of each sink's life after which its excess along the direction is largest, [sink]."""
        arguments.one_of(direction, "direction", DIRECTIONS)
        layer = self.data["layer"]
        start, end = (xr.DataArray(self.table[name].to_numpy(), dims="sink") for name in ("l_start", "l_end"))
        alive = (layer >= start) & (layer <= end)
        return self.so_far().sel(direction=direction).where(alive, -np.inf).argmax("layer").to_numpy()

    def fall_end(self) -> np.ndarray:
        """The layer at which the fall that ends each sink's life ends: from l_end on, the last of those after which less stands."""
        ends = []
        for values, last in zip(
            self.so_far().sel(direction="end").to_numpy(), self.table["l_end"].astype(int), strict=True
        ):
            rises = np.flatnonzero(np.diff(values[last:]) >= 0)
            ends.append(last + int(rises[0]) if len(rises) else len(values) - 1)
        return np.array(ends)

    def by_part(self, direction: str = "life") -> pd.DataFrame:
        """Excess by sink, layer and part (embed, attn, mlp); attn is the sum over heads and bias."""
        arguments.one_of(direction, "direction", DIRECTIONS)
        frame = self.excess().sel(direction=direction, drop=True).to_dataframe("excess").reset_index()
        layer, part = (self.data[name].to_series() for name in ("component_layer", "part"))
        frame["layer"] = frame["component"].map(layer)
        frame["part"] = [{"embed": "embed", "mlp": "mlp"}.get(PARTS[i], "attn") for i in frame["component"].map(part)]
        return frame.groupby(["sink", "layer", "part"])["excess"].sum().reset_index()

    def top(self, n: int = 5) -> pd.DataFrame:
        """Each sink's largest writers, carriers and erasers, n of each.

        Writers: largest positive excess along "start", among components up to l_start; share of what stands there after
        l_start. Carriers: along "life", in l_start+1..l_end; share of the peak. Erasers: largest negative excess along
        "end", from above the peak of the life to the end of its fall (`fall_end`); share of the peak, negative. A sink that
        lives and grows to the last layer has none.
        Columns: sink, prompt, pos, token, role, component, layer, excess, share.
        """
        n = arguments.whole(n, "n", low=1)
        excess, layer, so_far = self.excess(), self.data["component_layer"].to_numpy(), self.so_far()
        names, peaks, rows = self.data["component"].to_numpy(), {d: self.peak(d) for d in DIRECTIONS}, []
        fall_end, starts, ends = (
            self.fall_end(),
            *(self.table[name].astype(int).tolist() for name in ("l_start", "l_end")),
        )
        for index, sink in enumerate(self.table.itertuples()):
            first, last = starts[index], ends[index]
            falling = (layer > peaks["end"][index]) & (layer <= fall_end[index])
            where = {"writer": layer <= first, "carrier": (layer > first) & (layer <= last), "eraser": falling}
            whole_at = {"writer": first, "carrier": peaks["life"][index], "eraser": peaks["end"][index]}
            for role, direction in ROLES.items():
                sign = -1 if role == "eraser" else 1
                values = excess.sel(sink=index, direction=direction).to_numpy()
                whole = float(so_far.sel(sink=index, direction=direction)[whole_at[role]])
                chosen = [i for i in np.argsort(-sign * values) if where[role][i] and sign * values[i] > 0][:n]
                rows += [
                    {
                        "sink": index, "prompt": sink.prompt, "pos": sink.pos, "token": sink.token, "role": role,
                        "component": names[i], "layer": layer[i], "excess": values[i], "share": values[i] / whole,
                    }
                    for i in chosen
                ]  # fmt: skip
        columns = ["sink", "prompt", "pos", "token", "role", "component", "layer", "excess", "share"]
        return pd.DataFrame(rows, columns=columns)

    def writing_mlp(self) -> pd.Series:
        """The layer of the MLP with the largest positive excess along "start" among those up to l_start, [sink]; -1 where none writes.

        It need not be the forming MLP, whose removal takes most from the sink: an earlier one may make the token that this
        one then writes upon.
        """
        excess = self.excess().sel(direction="start").where(self.data["part"] == PARTS.index("mlp"), -np.inf)
        layer = self.data["component_layer"]
        start = xr.DataArray(self.table["l_start"].to_numpy(), dims="sink")
        excess = excess.where(layer <= start, -np.inf)
        found = layer.to_numpy()[excess.argmax("component").to_numpy()]
        return pd.Series(np.where(excess.max("component").to_numpy() > 0, found, -1))


@torch.no_grad()
def writers(model, tokens, sinks: Sinks, *, attention_mask=None, verbose: bool = True) -> Writers:
    """Who writes each sink's direction into the residual stream, and who erases it at the end of its life.

    These are direct writes (the decomposition of direct logit attribution, Elhage et al. 2021, along another direction);
    what made a head or MLP write them is no part of it, and a large write need not be one that the sink hangs on. Raises
    InputError for a text without ordinary tokens, against which the writes are held; ModelError when the components do not
    add up to the whole residual stream within the dtype's tolerance (2e-4 of the largest value added so far in float32).
    """
    tokens, table = prepare(model, tokens, sinks, attention_mask, verbose)
    layers = range(adapt(model).n_layers)
    names = [f"blocks.{layer}.hook_{part}_out" for layer in layers for part in ("attn", "mlp")]
    z = [f"blocks.{layer}.attn.hook_z" for layer in layers]
    found: dict[str, dict[int, Tensor]] = {
        name: {} for name in ("write", "ordinary", "resid", "ordinary_resid", "agreement", "error")
    }
    components: list[tuple[str, int, str]] = []
    for text in texts(model, tokens, sinks, verbose=verbose):
        if not text.ordinary.any():
            raise InputError(
                f"prompt {text.name!r} of {len(text.ids)} tokens has none beside its sinks and the first {SKIP_FIRST}, against which "
                "writes are held: give a longer text."
            )
        kept = activations(model, text.ids, ["blocks.0.hook_resid_pre", *names], optional=z)
        error = _check_sum(text.clean, kept, layers)
        units = torch.cat([_directions(text.clean, table.iloc[row]) for row in text.rows])
        components, writes = _writes(model, kept, units, layers)
        resid = torch.stack([text.clean.resid_post(layer).float() @ units.T for layer in layers])
        for i, row in enumerate(text.rows):
            sink, own = table.iloc[row], slice(3 * i, 3 * i + 3)
            primary = torch.stack([primary_direction(text.clean, layer, int(sink["primary_pos"])) for layer in layers])
            for name, values in (("write", writes), ("resid", resid)):  # [component or layer, pos, direction]
                found[name][row] = values[:, int(sink["pos"]), own].T
                found["ordinary" if name == "write" else "ordinary_resid"][row] = (
                    values[:, text.ordinary][..., own].mean(dim=1).T
                )
            found["agreement"][row], found["error"][row] = units[own] @ primary.T, torch.tensor(error)
    dims = dict.fromkeys(("write", "ordinary"), ("sink", "direction", "component")) | {"error": ("sink",)}
    arrays = {
        name: (
            dims.get(name, ("sink", "direction", "layer")),
            torch.stack([own[row] for row in range(len(table))]).cpu().numpy(),
        )
        for name, own in found.items()
    }
    data = xr.Dataset(
        {
            **arrays,
            "component_layer": ("component", np.array([layer for _, layer, _ in components])),
            "part": ("component", np.array([PARTS.index(part) for _, _, part in components])),
        },
        coords={
            "sink": np.arange(len(table)), "direction": list(DIRECTIONS), "component": [name for name, _, _ in components],
            "layer": np.array(layers),
        },
    )  # fmt: skip
    manifest = manifest_of(model, tokens, sinks, what="writers", path=text.clean.path)
    return Writers(data, table[list(SINK_COLUMNS)], manifest)


def _directions(clean: CleanRun, row) -> Float[Tensor, "3 d_model"]:
    """The primary directions of a sink's first layer, of its life, and of its last layer, as in `DIRECTIONS`."""
    units = torch.stack(
        [
            primary_direction(clean, layer, int(row["primary_pos"]))
            for layer in range(int(row["l_start"]), int(row["l_end"]) + 1)
        ]
    )
    mean = units.mean(dim=0)
    return torch.stack([units[0], mean / mean.norm().clamp(min=1e-12), units[-1]])


def _check_sum(clean: CleanRun, kept: dict, layers: range) -> float:
    """The largest error of embed + attention + MLPs against resid_post. Raises ModelError above the tolerance.

    Relative to the largest value added so far: where a massive write is taken out again, its rounding stays in what is left.
    """
    total, error = kept["blocks.0.hook_resid_pre"].clone(), 0.0
    largest = total.abs().max().item()
    for layer in layers:
        for part in (kept[f"blocks.{layer}.hook_attn_out"], kept[f"blocks.{layer}.hook_mlp_out"]):
            total, largest = total + part, max(largest, part.abs().max().item())
        what = f"embedding, attention and MLPs up to layer {layer} do not add up to the residual stream"
        error = max(error, check_equal(total, clean.resid_post(layer), what, total.dtype, largest))
    return error


def _writes(model, kept: dict, units: Float[Tensor, "direction d_model"], layers: range):
    """(components, what each writes along the directions [component, pos, direction])."""
    components, writes = [("embed", -1, "embed")], [kept["blocks.0.hook_resid_pre"].float() @ units.T]
    for layer, norm in zip(layers, norms_behind(model, "attn", layers), strict=True):
        for name, part, values in _attention_writes(model, layer, norm, kept, units):
            components.append((name, layer, part))
            writes.append(values)
        components.append((f"L{layer} mlp", layer, "mlp"))
        writes.append(kept[f"blocks.{layer}.hook_mlp_out"].float() @ units.T)
    return components, torch.stack(writes)


def _attention_writes(
    model, layer: int, norm, kept: dict, units: Tensor
) -> list[tuple[str, str, Float[Tensor, "pos direction"]]]:
    """(name, part, writes) of every head and the bias; of attention as a whole where they cannot be told apart.

    `norm`: the one behind attention, or None.
    """
    out = kept[f"blocks.{layer}.hook_attn_out"]
    whole = [(f"L{layer} attn", "attn", out.float() @ units.T)]
    attn, z = model.blocks[layer].attn, kept.get(f"blocks.{layer}.attn.hook_z")
    W_O, b_O = getattr(attn, "W_O", None), getattr(attn, "b_O", None)
    if z is None or not isinstance(W_O, Tensor) or W_O.shape[:2] != z.shape[1:]:
        return whole
    before = torch.einsum("phd,hdm->pm", z, W_O) + (0 if b_O is None else b_O)
    try:
        scale, gain = linear_gains(norm, before)
        check_equal(
            scale * gain * before, out, f"the heads of layer {layer} do not add up to attention's output", out.dtype
        )
    except ModelError:
        return whole
    through = gain.float() * units
    by_head = (
        torch.einsum("phd,hdu->phu", z.float(), torch.einsum("hdm,um->hdu", W_O.float(), through))
        * scale.float()[:, None]
    )
    parts = [(f"L{layer}H{head}", "head", by_head[:, head]) for head in range(by_head.shape[1])]
    return parts if b_O is None else [*parts, (f"L{layer} bias", "attn_bias", scale.float() * (through @ b_O.float()))]
