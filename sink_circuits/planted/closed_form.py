"""What follows from a planted circuit by pencil and paper: logits that sinks draw, dose curves."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from sink_circuits.planted.circuits import FEATURE_NORM, SHARED_NORM, Sink
from sink_circuits.planted.models import Plant


def key_share(amount: float, rest_norm: float) -> float:
    """How much of a saturated sink's logit a key with `amount` along the sink direction draws: a / sqrt(a^2 + rest^2)."""
    return amount / math.hypot(amount, rest_norm)


def rest_norm(plant: Plant, layer: int) -> float:
    """Norm of what else a sink's key in this layer is divided by: the rest of its residual stream."""
    if plant.architecture.qk_norm:  # keys are normalised by themselves, beside a part as large as the shared one
        return SHARED_NORM
    return math.hypot(plant.truth.ordinary_norms[layer], FEATURE_NORM)


def standing(plant: Plant, token: int, layer: int) -> float:
    """Norm of what is planted at a kind of token, over all features but its own, in front of block `layer`."""
    amounts = {"sink": dict(plant.recipe.embedded).get(token, 0.0)}
    for write in plant.recipe.writes:
        if write.token == token and write.layer < layer:
            amounts[write.feature] = (
                write.leave if write.role == "erase" else amounts.get(write.feature, 0.0) + write.norm
            )
    return math.hypot(*amounts.values())


def drawn_logits(plant: Plant, tokens: Tensor, pos: int, sink: Sink) -> dict[int, float]:
    """Mean attention logit, by sink head, that the sink at `pos` draws from the later queries in layer l_start + 1.

    logit * key share * mean query share. Queries read the shared direction: an ordinary one has all but the noise's part of
    it, one at which something massive stands, a sink or a decoy, nearly none (all have it where queries are normalised).
    Keys hold noise beside the sink direction, of which nothing is said here.
    """
    layer, window = sink.l_start + 1, plant.window(sink.l_start + 1)
    rest = rest_norm(plant, layer)
    queries = torch.arange(pos + 1, len(tokens) if window is None else min(len(tokens), pos + window))
    shares = torch.full((len(tokens),), SHARED_NORM / plant.truth.ordinary_norms[layer], dtype=torch.float64)
    for token in range(plant.recipe.n_special):
        shares[tokens == token] = SHARED_NORM / math.hypot(standing(plant, token, layer), rest)
    if plant.architecture.qk_norm:
        shares[:] = 1.0
    mean = key_share(sink.norm, rest) * shares[queries].mean().item()
    cap = getattr(plant.hf_model.config, "attn_logit_softcapping", None)
    return {
        head: logit * mean if cap is None else cap * math.tanh(logit * mean / cap)
        for head, logit in plant.truth.sink_logits
    }


def dose_curve(plant: Plant, sink: Sink, factors: Float[Tensor, " factor"]) -> Float[Tensor, " factor"]:
    """The effect of rescaling the one forming MLP, as a share of the effect of removing it, in layer l_start + 1.

    1 - g(f a) / g(a) with g the key share: 1 at factor 0, 0 at 1, and saturating above, as the norm divides by what grows.
    """
    rest = rest_norm(plant, sink.l_start + 1)
    shares = torch.tensor([key_share(factor * sink.norm, rest) for factor in factors.tolist()], dtype=torch.float64)
    return 1 - shares / key_share(sink.norm, rest)


def primary_norms(plant: Plant) -> Float[Tensor, " layer"]:
    """Norm of the primary's residual stream after every block, noise at its median."""
    amounts = torch.zeros(plant.recipe.shape.n_layers, dtype=torch.float64)
    for sink in plant.truth.sinks:
        if sink.kind == "primary":
            amounts[sink.layers] = sink.norm
    for write in plant.recipe.writes:
        if write.role == "erase" and write.leave:  # down to a trough that lasts until it rises again
            rise = min(
                sink.l_start for sink in plant.truth.sinks if sink.kind == "primary" and sink.l_start > write.layer
            )
            amounts[write.layer : rise] = write.leave
    rest = (torch.tensor(plant.truth.ordinary_norms, dtype=torch.float64).square() + FEATURE_NORM**2).sqrt()
    return torch.hypot(amounts, rest)
