"""What a plain Hugging Face forward pass says of a plant: eager attention, one hook per block, nothing of the package's own
measuring. The judges hold the instruments to it where a closed form leaves out the noise that keys hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from sink_circuits.planted import Plant, Sink

PLAIN_TOLERANCE = 2e-3
"""Nats, between the package's effects and a plain forward pass (float32)."""
LEFT = 1e-3
"""Share of what stood along the sink direction: where less is left, all of it was taken away."""


@dataclass(frozen=True)
class Silenced:
    """What is set to 0 in one row of a batch, at one position: an MLP's contribution, or some of its `neurons`."""

    row: int
    layer: int
    pos: int
    neurons: tuple[int, ...] | None = None


@dataclass(frozen=True)
class PlainRun:
    """Attention and what each block but the last leaves behind, float64."""

    pattern: list[Float[Tensor, "row head query key"]]
    resid_post: list[Float[Tensor, "row pos d_model"]]


@torch.no_grad()
def plain_run(plant: Plant, texts: Sequence[Tensor], silenced: Sequence[Silenced] = ()) -> PlainRun:
    """One forward pass of texts of equal length."""
    architecture, handles = plant.architecture, []
    for layer, block in enumerate(architecture.layers(plant.hf_model)):
        own = [one for one in silenced if one.layer == layer]
        if whole := [one for one in own if one.neurons is None]:
            handles.append(architecture.contribution_module(block).register_forward_hook(_zero_contribution(whole)))
        if some := [one for one in own if one.neurons is not None]:
            handles.append(architecture.output_module(block).register_forward_pre_hook(_zero_neurons(some)))
    try:
        out = plant.hf_model(torch.stack(list(texts)), output_attentions=True, output_hidden_states=True)
    finally:
        for handle in handles:
            handle.remove()
    return PlainRun([a.double() for a in out.attentions], [x.double() for x in out.hidden_states[1:-1]])


def _zero_contribution(silenced: Sequence[Silenced]):
    def hook(module: nn.Module, args, out: Tensor) -> Tensor:
        out = out.clone()
        for one in silenced:
            out[one.row, one.pos] = 0
        return out

    return hook


def _zero_neurons(silenced: Sequence[Silenced]):
    def hook(module: nn.Module, args) -> tuple[Tensor, ...]:
        post = args[0].clone()
        for one in silenced:
            post[one.row, one.pos, list(one.neurons)] = 0
        return (post, *args[1:])

    return hook


def plain_log_odds(run: PlainRun, plant: Plant, layer: int, row: int, pos: int) -> Float[np.ndarray, " head"]:
    """Log-odds of the key at `pos`, mean over the later queries that see it."""
    window = plant.window(layer)
    later = run.pattern[layer][row, :, pos + 1 : None if window is None else pos + window]
    own = later[..., pos]
    return (own.log() - (later.sum(-1) - own).log()).mean(-1).numpy()


def plain_effects(
    plant: Plant, texts: Sequence[Tensor], treated: Sequence[tuple[int, Sink]]
) -> Float[np.ndarray, " prompt"]:
    """Effect on log-odds of zeroing the forming MLPs at one position of each text, over its life and all heads."""
    zeroed = [Silenced(row, layer, pos) for row, (pos, sink) in enumerate(treated) for layer in sink.forming]
    clean, after = plain_run(plant, texts), plain_run(plant, texts, zeroed)
    effects = []
    for row, (pos, sink) in enumerate(treated):
        layers = range(max(sink.l_start, min(sink.forming)) + 1, min(sink.l_end + 2, len(clean.pattern)))
        values = [[plain_log_odds(run, plant, layer, row, pos).mean() for layer in layers] for run in (clean, after)]
        effects.append(np.mean(values[1]) - np.mean(values[0]))
    return np.array(effects)


def plain_falls(
    plant: Plant, text: Tensor, pos: int, sink: Sink, silenced: Sequence[Silenced]
) -> tuple[Float[np.ndarray, " head"], float]:
    """(effect on log-odds by head in the first layer that reads the sink; the share of what stood along the planted direction
    after l_start that is left)."""
    clean, after = plain_run(plant, [text]), plain_run(plant, [text], silenced)
    odds = [plain_log_odds(run, plant, sink.l_start + 1, 0, pos) for run in (clean, after)]
    stands = [run.resid_post[sink.l_start][0, pos] @ plant.truth.direction.double() for run in (clean, after)]
    return odds[1] - odds[0], float(stands[1] / stands[0])
