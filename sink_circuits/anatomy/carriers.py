"""Neurons: the few or many that carry the forming write, what makes them fire, and whether the sink hangs on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from sink_circuits import arguments, statistics
from sink_circuits.anatomy.mlp import ChosenExperts, Experts, checked_output, mlp_of
from sink_circuits.anatomy.reading import (
    activations,
    candidates_in,
    check_equal,
    layers_of,
    linear_gains,
    manifest_of,
    prepare,
    texts,
)
from sink_circuits.anatomy.result import SINK_COLUMNS, Anatomy
from sink_circuits.detection import Sinks, primary_direction
from sink_circuits.edits import Edit
from sink_circuits.effects import Effect
from sink_circuits.errors import InputError
from sink_circuits.interventions import neuron_contribution, part_through_norm, without_neurons
from sink_circuits.measurement import check_handed_on, measure
from sink_circuits.statistics import seed_of


@dataclass(frozen=True, repr=False)
class Neurons(Anatomy):
    """What each neuron of the forming MLP writes along u, the primary direction of that layer (centred).

    All [sink, neuron]: `write`, post[n] * (W_out[n] . u) at the sink, with any norm behind the MLP held at its actual
    scale, so that writes and `bias` [sink] add up to `contribution` [sink], the MLP's contribution . u (checked); `ordinary`, its mean over
    ordinary tokens; `same_token`, over those of the sink's own token id (NaN without any; `n_same_token` [sink]);
    `post`, the activation. What the input looks like: `cos_in`, `cos_gate`, the cosine of the MLP's input at the sink with the neuron's
    columns of W_in and W_gate (NaN: not gated), and `same_token_cos_in`, `same_token_cos_gate`. `layer` [sink].

    In a mixture of experts the neurons are those of the experts that the sink is sent to, one expert after the other by rank of
    its router weight: `expert`, its number (-1: not a mixture), `unit`, the neuron's number within it. `post` and the writes
    hold the router's weight (0 for tokens that are sent elsewhere); shared experts stand in `bias`.
    """

    kind: ClassVar[str] = "neurons"
    long: ClassVar[tuple[str, ...]] = (
        "write", "ordinary", "same_token", "post", "cos_in", "cos_gate", "same_token_cos_in", "same_token_cos_gate",
    )  # fmt: skip

    def carriers(self, share: float) -> pd.Series:
        """How few neurons carry this share of the write: the fewest whose writes, largest first, sum to it; by sink.

        Neurons that write the other way make it possible that fewer than all carry more than the whole. NaN where the
        neurons together write nothing along the direction, or against it. Raises InputError for a share outside (0, 1].
        """
        share, counts = arguments.share(share, "share", whole=True), []
        for values in self.data["write"].to_numpy().astype(float):
            sums = np.cumsum(-np.sort(-values))
            counts.append(
                float(np.argmax(sums >= share * values.sum() * (1 - 1e-12)) + 1) if values.sum() > 0 else np.nan
            )
        return pd.Series(counts, index=self.table.index, name=f"{share:.0%}")

    def participation(self) -> pd.Series:
        """Participation ratio of the writes' sizes, by sink: (sum |w|)^2 / sum w^2, from 1 (one neuron) to d_mlp (all alike)."""
        size = np.abs(self.data["write"].to_numpy().astype(float))
        total = (size**2).sum(axis=1)
        return pd.Series(
            np.where(total > 0, size.sum(axis=1) ** 2 / np.where(total > 0, total, 1), np.nan), index=self.table.index
        )

    def named(self, sink: int, n: int | None = None, share: float = 0.9) -> list[int]:
        """The neurons with the largest writes at one sink: `n` of them, or those that carry `share`. Raises InputError."""
        sink = arguments.whole(sink, "sink", high=len(self.table) - 1)
        if n is None:
            fewest = self.carriers(share).iloc[sink]
            if np.isnan(fewest):
                layer = int(self.data["layer"][sink])
                raise InputError(
                    f"the MLP of layer {layer} writes nothing along the direction of sink {sink}: leave the sink out, give n, or "
                    "take the neurons of the layer that writes (layer='l_start')."
                )
            n = int(fewest)
        n = arguments.whole(n, "n", low=1, high=self.data.sizes["neuron"])
        return [int(i) for i in np.argsort(-self.data["write"].to_numpy()[sink], kind="stable")[:n]]

    def name_of(self, sink: int, neuron: int) -> str:
        """A neuron as it is called: its number, or "E3N17" for number 17 of expert 3."""
        sink = arguments.whole(sink, "sink", high=len(self.table) - 1)
        neuron = arguments.whole(neuron, "neuron", high=self.data.sizes["neuron"] - 1)
        if "expert" not in self.data:  # a file of an earlier version
            return str(neuron)
        expert, unit = (int(self.data[name][sink, neuron]) for name in ("expert", "unit"))
        return str(unit) if expert < 0 else f"E{expert}N{unit}"

    def summary(self) -> pd.DataFrame:
        """One row per sink: layer, contribution . u, how few neurons carry 50 and 90 %, participation ratio, the largest ones."""
        names = [
            ", ".join(self.name_of(sink, one) for one in self.named(sink, min(5, self.data.sizes["neuron"])))
            for sink in range(len(self.table))
        ]
        return self.table.assign(
            layer=self.data["layer"].to_numpy(), contribution=self.data["contribution"].to_numpy(), n_50=self.carriers(0.5),
            n_90=self.carriers(0.9), participation=self.participation(), largest=names,
        )  # fmt: skip

    def recurring(self, n: int = 10) -> pd.DataFrame:
        """Neurons by layer: at how many sinks each is among the n largest, and its mean share of their contribution . u."""
        n = arguments.whole(n, "n", low=1)
        shares = self.data["write"].to_numpy() / self.data["contribution"].to_numpy()[:, None]
        layer = self.data["layer"].to_numpy()
        is_mixture = "expert" in self.data and bool((self.data["expert"] >= 0).any())
        rows = [
            (layer[sink], self.name_of(sink, one) if is_mixture else one, shares[sink, one])
            for sink in range(len(self.table))
            for one in self.named(sink, min(n, shares.shape[1]))
        ]
        frame = pd.DataFrame(rows, columns=["layer", "neuron", "share"])
        grouped = frame.groupby(["layer", "neuron"])["share"].agg(n_sinks="size", share="mean").reset_index()
        grouped["of"] = grouped["layer"].map(pd.Series(layer).value_counts())
        return grouped.sort_values(["n_sinks", "share"], ascending=False, ignore_index=True)


@torch.no_grad()
def neurons(
    model, tokens, sinks: Sinks, *, layer="forming", forming: pd.Series | None = None, attention_mask=None, verbose: bool = True
) -> Neurons:  # fmt: skip
    """The neurons that carry the forming write of each sink, and what their input looks like.

    `layer`: a number, "l_start", or "forming" (found by a layer map unless `forming` is given). In a mixture of experts: the neurons of
    the experts that the sink is sent to. Raises InputError for layers of which only some are mixtures, ModelError when neurons
    do not add up to the contribution or experts' weights cannot be read.
    """
    tokens, table = prepare(model, tokens, sinks, attention_mask, verbose)
    layers = layers_of(model, tokens, sinks, layer, forming, verbose)
    mlps = {one: mlp_of(model, one) for one in set(layers)}
    if len({isinstance(one, Experts) for one in mlps.values()}) > 1:
        raise InputError(
            f"of layers {sorted(mlps)} only some are mixtures of experts: take the sinks of one layer at a time."
        )
    rows: list[dict[str, np.ndarray]] = [{} for _ in layers]
    for text in texts(model, tokens, sinks, verbose=verbose):
        inputs = activations(model, text.ids, mlp_inputs={layers[row] for row in text.rows})
        for row in text.rows:
            rows[row] = _one_sink(mlps[layers[row]], inputs[layers[row]], text, table.iloc[row])
    arrays = {
        name: (("sink", "neuron") if np.ndim(rows[0][name]) else ("sink",), np.stack([row[name] for row in rows]))
        for name in rows[0]
    }
    data = xr.Dataset(
        {**arrays, "layer": ("sink", np.array(layers))},
        coords={"sink": np.arange(len(rows)), "neuron": np.arange(rows[0]["write"].shape[-1])},
    )
    manifest = manifest_of(model, tokens, sinks, what="neurons", path=text.clean.path, layer=str(layer))
    return Neurons(data, table[list(SINK_COLUMNS)], manifest)


def _one_sink(mlp, inputs: Tensor, text, row) -> dict[str, np.ndarray]:
    same = candidates_in(text, [int(row["token_id"])])["pos"].tolist()
    ordinary = text.ordinary.nonzero().flatten().tolist()
    positions = [int(row["pos"]), *ordinary]
    contribution = text.clean.contribution[mlp.layer, positions]
    x = inputs[positions]
    if isinstance(mlp, Experts):
        mlp = mlp.at(x[:1])
    # Tokens that are sent to other experts are not made up of these neurons.
    summed = slice(0, 1) if isinstance(mlp, ChosenExperts) else slice(None)
    output = checked_output(mlp, x, contribution)
    unit = primary_direction(text.clean, mlp.layer, int(row["primary_pos"]))
    scale, gain = (part.float() for part in linear_gains(mlp.post_norm, output))
    writes = scale * mlp.post(x).float() * (mlp.W_out.float() @ (gain * unit))
    b_out = mlp.b_out.float() if isinstance(mlp.b_out, Tensor) else torch.zeros_like(unit)
    bias = scale[:, 0] * (b_out @ (gain * unit))
    along = contribution.float() @ unit
    check_equal(
        (writes.sum(dim=-1) + bias)[summed],
        along[summed],
        f"the neurons of layer {mlp.layer} do not add up to its contribution",
        x.dtype,
    )
    index = [1 + ordinary.index(pos) for pos in same]
    found = {
        "write": writes[0], "ordinary": writes[1:].mean(dim=0), "same_token": _mean(writes[index]), "post": mlp.post(x[:1])[0].float(),
        "contribution": along[0], "bias": bias[0], "n_same_token": torch.tensor(len(same)),
    }  # fmt: skip
    width = writes.shape[1]
    numbers = mlp.numbers if isinstance(mlp, ChosenExperts) else (-1,)
    found["expert"] = torch.tensor(numbers).repeat_interleave(width // len(numbers))
    found["unit"] = torch.arange(width) % (width // len(numbers))
    for name, weights in (("in", mlp.W_in), ("gate", mlp.W_gate)):
        cosines = torch.full_like(writes, torch.nan) if weights is None else _cosines(x.float(), weights.float())
        found[f"cos_{name}"], found[f"same_token_cos_{name}"] = cosines[0], _mean(cosines[index])
    return {name: value.cpu().numpy() for name, value in found.items()}


def _cosines(x: Float[Tensor, "pos d_model"], weights: Float[Tensor, "d_model neuron"]) -> Float[Tensor, "pos neuron"]:
    return (x @ weights) / (x.norm(dim=-1, keepdim=True) * weights.norm(dim=0)).clamp(min=1e-12)


def _mean(rows: Float[Tensor, "pos neuron"]) -> Float[Tensor, " neuron"]:
    return rows.mean(dim=0)  # NaN without rows


# The causal check.


def ablate_neurons(
    model, tokens, sinks: Sinks, found: Neurons, *, n: int | None = None, share: float = 0.9, n_random: int = 20, **options
) -> Effect:  # fmt: skip
    """Take the named neurons' part out of the contribution at each sink, and as many random ones in their place.

    The axis `edit` holds "named" (the `n` neurons with the largest writes, or those that carry `share`) and "random 0",
    ...: as many others of the same MLP, drawn by name. With a norm behind the MLP the part is norm(output) - norm(output - part): the
    scale is recomputed. `found` must be of these sinks. Other options as in `measure`. Raises InputError.
    """
    check_handed_on(options)
    tokens, table = prepare(model, tokens, sinks, options.get("attention_mask"))
    arguments.instance(found, "found", Neurons, "pass what neurons() returns")
    key = ["prompt", "pos", "l_start"]
    if table[key].to_numpy().tolist() != found.table[key].to_numpy().tolist():
        raise InputError(
            f"the neurons of {len(found.table)} sinks were given for {len(table)} others: pass neurons() of these sinks."
        )
    n_random = arguments.whole(n_random, "n_random", low=1)
    share = arguments.share(share, "share", whole=True)
    layers, post = found.data["layer"].to_numpy(), torch.as_tensor(found.data["post"].to_numpy())
    mlps = [
        _as_one(mlp_of(model, int(one)), numbers)
        for one, numbers in zip(layers, found.data["expert"].to_numpy(), strict=True)
    ]
    named = [found.named(sink, n, share) for sink in range(len(table))]
    labels = ["named", *(f"random {draw}" for draw in range(n_random))]

    def edits(label: str, row: pd.Series) -> tuple[Edit, ...]:
        sink = cast(int, row.name)  # the table's index counts its rows
        chosen = named[sink] if label == "named" else _others(named[sink], post.shape[1], label, row)
        part = neuron_part(mlps[sink], post[sink : sink + 1], chosen)
        return (without_neurons(int(layers[sink]), int(row["pos"]), part),)

    settings = {"n": n, "share": share, "n_random": n_random, "neurons": str(named)}
    return measure(model, tokens, sinks, labels, edits, what="ablate_neurons", settings=settings, **options)


def _as_one(mlp, numbers: np.ndarray):
    """The MLP whose neurons were measured at a sink: the experts chosen there, in a mixture."""
    if not isinstance(mlp, Experts):
        return mlp
    if mlp.post_norm is not None:
        raise InputError(
            f"a norm stands behind the experts of layer {mlp.layer}: what one neuron's removal leaves of it is not known here; "
            "neurons() still says what each writes."
        )
    return mlp.of(list(dict.fromkeys(numbers.tolist())))


@torch.no_grad()
def neuron_part(mlp, post: Float[Tensor, "pos d_mlp"], chosen: Sequence[int]) -> Float[Tensor, "pos d_model"]:
    """What taking these neurons out takes out of the contribution, the norm behind the MLP computed anew."""
    post = post.to(mlp.W_out)
    part = neuron_contribution(post, mlp.W_out, chosen)
    return part if mlp.post_norm is None else part_through_norm(post @ mlp.W_out + mlp.b_out, part, mlp.post_norm)


def _others(named: Sequence[int], d_mlp: int, label: str, row) -> list[int]:
    free = np.setdiff1d(np.arange(d_mlp), named)
    if len(free) < len(named):
        raise InputError(
            f"{len(named)} of {d_mlp} neurons are named, too few are left to draw as many others: give a smaller n or share."
        )
    drawn = np.random.default_rng(seed_of("neurons", label, row["prompt"], row["pos"])).choice(
        free, len(named), replace=False
    )
    return sorted(int(one) for one in drawn)


def against_random(effect: Effect, outcome: str = "log_odds") -> pd.DataFrame:
    """One row: mean effect of the named neurons over prompts, of the random ones, and the difference.

    Columns: named, random, difference, low, high (bootstrap over prompts), p, smallest_p (sign-flip), rank (1: below every
    draw's mean), n_draws, n_prompts, n_sinks. Raises InputError for another experiment.
    """
    arguments.instance(effect, "effect", Effect, "pass what ablate_neurons returns")
    if effect.kind != "ablate_neurons":
        raise InputError(f"this is a {effect.kind}: pass what ablate_neurons returns.")
    values, prompts = effect.over_lifetime(outcome), effect.table["prompt"]
    named = values.sel(edit="named").to_numpy()
    draws = values.drop_sel(edit="named").to_numpy()
    found = statistics.difference_to_controls(named, draws, prompts, name=f"neurons/{outcome}", alternative="less")
    means = [statistics.prompt_means(draw, prompts).mean() for draw in draws.T]
    own = statistics.prompt_means(named, prompts).mean()
    rank = statistics.rank_among_controls(own, means, alternative="less")
    row = {
        "outcome": outcome, "named": own, "random": float(np.mean(means)), "difference": found.estimate.mean, "low": found.estimate.low,
        "high": found.estimate.high, "p": found.test.p, "smallest_p": found.test.smallest_p, "rank": rank.statistic, "n_draws": rank.n,
        "n_prompts": found.estimate.n, "n_sinks": found.n_sinks,
    }  # fmt: skip
    return pd.DataFrame([row])
