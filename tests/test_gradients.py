"""Gradients of sink scores against finite differences of forward passes by hand and by Hugging Face."""

from __future__ import annotations

import copy

import eager
import hand
import numpy as np
import pytest
import torch
from attributions import POS, N, random_llama, sinks_at, slope, wrapped
from common import BACKENDS, no_forward_pass

import sink_circuits as sc
from sink_circuits.attribution import attribute
from sink_circuits.errors import InputError, ModelError
from sink_circuits.gradients import differentiable_scores, path_nodes


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("outcome", ["score", "log_odds"])
def test_scores_and_gradients_are_those_of_a_forward_pass_by_hand(backend, outcome):
    model, tokens = wrapped(backend), eager.random_tokens(N)
    state, config = random_llama().state_dict(), random_llama().config
    of = {"score": hand.sink_scores, "log_odds": hand.log_odds}[outcome]
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(4, N, config.hidden_size, generator=generator, dtype=torch.float64)
    deltas = {layer: torch.zeros_like(direction[0], requires_grad=True) for layer in range(4)}
    values = differentiable_scores(model, tokens, (0, POS), deltas, outcome=outcome)
    clean = of(hand.forward(state, config, tokens).pattern)[..., [0, POS]]
    assert (values.detach() - clean).abs().max() < (1e-6 if outcome == "score" else 1e-4)

    def moved(layer: int, pos: int):
        def at(step: float) -> torch.Tensor:
            edit = {(layer, pos): lambda c: c + step * direction[layer, pos]}
            return of(hand.forward(state, config, tokens, edit).pattern)

        return at

    for layer, pos, reader, key in (
        (0, POS, (2, 1), 1),
        (1, POS, (3, 2), 1),
        (2, POS, (3, 0), 1),
        (0, 5, (2, 3), 1),
        (0, 30, (3, 1), 0),
    ):
        (gradient,) = torch.autograd.grad(values[(*reader, key)], deltas[layer], retain_graph=True)
        at = moved(layer, pos)
        expected = slope(lambda step: at(step)[(*reader, (0, POS)[key])].item())  # noqa: B023
        # Hugging Face's norms and softmax, which the bridge calls, are in float32 whatever the model is in.
        assert (gradient[pos] @ direction[layer, pos]).item() == pytest.approx(expected, rel=1e-3, abs=2e-6)
    assert not torch.autograd.grad(values[1].sum(), deltas[1])[
        0
    ].any()  # a contribution comes after its own layer's attention


@pytest.mark.parametrize(("backend", "positions"), [("bridge", "all"), (BACKENDS[-1], "treated")])
def test_attribution_of_contributions_and_neurons_by_hand(backend, positions):
    """grad . (0 - c) is minus the slope in a factor on the contribution; a neuron's, in a factor on what it writes."""
    model, tokens = wrapped(backend), eager.random_tokens(N)
    state, config = random_llama().state_dict(), random_llama().config
    sinks = sinks_at(model, tokens, (POS, 0, 2))
    result = attribute(model, tokens, sinks, positions=positions, verbose=False)
    clean = hand.forward(state, config, tokens)

    def outcome(layer: int, pos: int, change) -> float:
        run = hand.forward(state, config, tokens, {(layer, pos): lambda c: c + change})
        return hand.log_odds(run.pattern)[layer + 1 :, :, POS].mean().item()  # the readers are 1..3, those above count

    for layer in range(3):
        c = clean.contributions[layer, POS]
        expected = -slope(lambda step: outcome(layer, POS, step * c))  # noqa: B023
        assert result.data["attribution"].sel(layer=layer).item() == pytest.approx(expected, rel=1e-3)
        direct = held_slope(layer, POS)
        assert result.data["direct"].sel(layer=layer).item() == pytest.approx(direct, rel=1e-3)
        weights = {
            name: state[f"model.layers.{layer}.{name}.weight"].double()
            for name in ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
        }
        base = clean.residuals[layer, POS] - c
        normed = hand.rms_norm(
            base, state[f"model.layers.{layer}.post_attention_layernorm.weight"].double(), config.rms_norm_eps
        )
        neurons = torch.nn.functional.silu(weights["mlp.gate_proj"] @ normed) * (weights["mlp.up_proj"] @ normed)
        for neuron in (0, 31):
            written = neurons[neuron] * weights["mlp.down_proj"][:, neuron]
            expected = -slope(lambda step: outcome(layer, POS, step * written))  # noqa: B023
            assert result.data["neurons"][0, layer, neuron].item() == pytest.approx(expected, rel=1e-3, abs=1e-6)
        assert result.data["neurons"][0, layer].sum().item() == pytest.approx(
            result.data["attribution"][0, layer].item(), rel=1e-4
        )
    assert result.data["attribution"].sel(layer=3).isnull().all()  # no reader above
    if positions == "all":
        assert result.data["positions"].sel(layer=1)[0, POS].item() == pytest.approx(
            result.data["attribution"][0, 1].item()
        )
        for layer, pos in ((0, 3), (1, 40)):
            expected = -slope(lambda step: outcome(layer, pos, step * clean.contributions[layer, pos]))  # noqa: B023
            assert result.data["positions"][0, layer, pos].item() == pytest.approx(expected, rel=1e-3, abs=1e-6)


def held_slope(layer: int, pos: int) -> float:
    """Minus the slope in a factor on one contribution while all others of that token stay what they are."""
    state, config, tokens = random_llama().state_dict(), random_llama().config, eager.random_tokens(N)
    clean = hand.forward(state, config, tokens).contributions[:, pos]

    def outcome(step: float) -> float:
        held = {(other, pos): lambda c, other=other: (1 + step * (other == layer)) * clean[other] for other in range(4)}
        return hand.log_odds(hand.forward(state, config, tokens, held).pattern)[layer + 1 :, :, pos].mean().item()

    return -slope(outcome)


@pytest.mark.parametrize("name", ["gemma3", "gemma2", "gpt-neox", "gpt-oss"])
def test_other_architectures(name):
    """Post-norms, windows, soft-caps, parallel blocks, learned sinks: slopes of an eager Hugging Face model."""
    hf = eager.tiny(name)
    model, tokens = sc.load_model(copy.deepcopy(hf)), eager.random_tokens(N)
    experts = name == "gpt-oss"
    sinks = sinks_at(model, tokens, (POS, 0, 2))
    if experts:
        with (
            no_forward_pass(),
            pytest.raises(ModelError, match=r"blocks\.0\.mlp\.hook_post.*mixture of experts.*targets="),
        ):
            attribute(model, tokens, sinks, min_queries=8, verbose=False)
    targets = ("contributions",) if experts else ("contributions", "neurons")
    result = attribute(model, tokens, sinks, targets=targets, min_queries=8, verbose=False)

    def outcome(run: eager.Run, layer: int) -> float:
        return eager.log_odds(run.pattern, eager.WINDOWS[name], min_queries=8)[layer + 1 :, :, POS].mean().item()

    for layer in range(3):
        at = lambda step: outcome(eager.forward(hf, tokens, {(layer, POS): 1 + step}), layer)  # noqa: B023, E731
        assert result.data["attribution"].sel(layer=layer).item() == pytest.approx(-slope(at, 0.05), rel=5e-3, abs=1e-4)
    if experts:
        assert "neurons" not in result.data
        with pytest.raises(InputError, match="neurons were not attributed"):
            result.top_neurons()
        return
    down = "dense_4h_to_h" if name == "gpt-neox" else "down_proj"
    neuron = int(abs(result.data["neurons"][0, 1]).values.argmax())

    def scaled(step: float) -> float:
        def scale(module, args):
            neurons = args[0].clone()
            neurons[0, POS, neuron] *= 1 + step
            return (neurons,)

        handle = getattr(eager.blocks_of(hf)[1].mlp, down).register_forward_pre_hook(scale)
        try:
            return outcome(eager.forward(hf, tokens), 1)
        finally:
            handle.remove()

    assert result.data["neurons"][0, 1, neuron].item() == pytest.approx(-slope(scaled, 0.05), rel=5e-3, abs=1e-4)
    if name.startswith("gemma"):  # the post-norm takes a common factor away again
        total = result.data["neurons"].sum("neuron")[0, :3]
        assert (abs(total) < 1e-4 * abs(result.data["neurons"]).sum("neuron")[0, :3]).all()


def test_integrated_gradients_by_hand():
    """Three nodes of the path by hand: contributions held at a factor of the clean ones, slopes by finite differences."""
    model, tokens = wrapped(BACKENDS[-1]), eager.random_tokens(N)
    state, config = random_llama().state_dict(), random_llama().config
    result = attribute(
        model, tokens, sinks_at(model, tokens, (POS, 0, 2)), method="integrated_gradients", n_steps=3, verbose=False
    )
    clean = hand.forward(state, config, tokens).contributions[:, POS]

    def outcome(factors: list[float], first: int) -> float:
        edits = {(layer, POS): lambda c, layer=layer: factors[layer] * clean[layer] for layer in range(4)}
        return hand.log_odds(hand.forward(state, config, tokens, edits).pattern)[first:, :, POS].mean().item()

    for layer in range(3):
        expected = 0.0
        for factor, weight in path_nodes(3):
            at = lambda step: outcome([factor + step * (other == layer) for other in range(4)], layer + 1)  # noqa: B023, E731
            expected -= weight * slope(at)
        assert result.data["attribution"].sel(layer=layer).item() == pytest.approx(expected, rel=1e-3)
        assert result.data["neurons"][0, layer].sum().item() == pytest.approx(expected, rel=1e-3)
    completeness = result.completeness.iloc[0]
    assert completeness["clean"] == pytest.approx(outcome([1.0] * 4, 1), abs=1e-5)
    assert completeness["removed"] == pytest.approx(outcome([0.0] * 4, 1), abs=1e-5)


def test_the_nodes_are_a_quadrature():
    factors, weights = np.array(path_nodes(16)).T
    assert ((factors > 0) & (factors < 1)).all()
    for power in (0, 1, 5):
        assert weights @ factors**power == pytest.approx(1 / (power + 1))
    scale = 1 / 50  # f / (f + scale) is what a norm makes of a vector that grows on a small one
    assert weights @ (scale / (factors + scale) ** 2) == pytest.approx(1 / (1 + scale), rel=1e-4)
