"""The neurons that carry the write, as planted, by hand, and by removing them."""

import dataclasses

import eager
import hand
import numpy as np
import pandas as pd
import pytest
import test_architectures as architectures
import torch
from anatomies import ORDINARY, QUIET, found, load, primary_direction, secondary, sinks_at
from common import BACKENDS, SINK, by_hand, lens, prompt, subject

import sink_circuits as sc
from sink_circuits import anatomy
from sink_circuits.anatomy import carriers, mlp
from sink_circuits.errors import InputError


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layer", [6, 7])
def test_the_planted_neuron_carries_the_write(backend, layer):
    result = anatomy.neurons(lens(backend), [prompt()], secondary(backend), layer=layer, **QUIET)
    assert result.named(0, 1) == [0]
    assert result.carriers(0.5).tolist() == result.carriers(0.9).tolist() == [1]
    assert result.participation().iloc[0] == pytest.approx(1, abs=1e-3)
    assert result.recurring(1)[["layer", "neuron", "n_sinks"]].to_numpy().tolist() == [[layer, 0, 1]]


def test_neurons_are_those_of_the_hand_written_pass():
    result, run = anatomy.neurons(lens(), [prompt()], secondary(), layer=6, **QUIET), by_hand(prompt())
    model = subject().hf_model
    block = {name: p.detach().double() for name, p in model.model.layers[6].named_parameters()}
    base = run.residuals[6] - run.contributions[6]
    x = hand.rms_norm(base, block["post_attention_layernorm.weight"], model.config.rms_norm_eps)
    gate, up = x @ block["mlp.gate_proj.weight"].T, x @ block["mlp.up_proj.weight"].T
    u = primary_direction(run.residuals, 6)
    writes = torch.nn.functional.silu(gate) * up * (u @ block["mlp.down_proj.weight"])
    np.testing.assert_allclose(result.data["write"][0], writes[SINK], atol=1e-4)
    np.testing.assert_allclose(result.data["ordinary"][0], writes[ORDINARY].mean(dim=0), atol=1e-5)
    for name, weight in (("cos_gate", "gate_proj"), ("cos_in", "up_proj")):
        rows = block[f"mlp.{weight}.weight"]
        expected = torch.cosine_similarity(x[SINK : SINK + 1], rows, dim=-1)
        np.testing.assert_allclose(result.data[name][0], expected, atol=1e-4)
    assert result.data["same_token"].isnull().all() and int(result.data["n_same_token"][0]) == 0


@pytest.mark.parametrize("name", ["gemma3", "olmo2", "gpt2", "phi3", "bloom"])
def test_neurons_add_up_to_the_contribution_behind_a_norm_too(name):
    """Post-norms, biases, ungated and packed MLPs: sum of writes and bias is what eager Hugging Face adds, along u."""
    ids = torch.arange(3, 43)
    model = load(name)
    result = anatomy.neurons(model, [ids], sinks_at(("prompt-0", 9), token_ids={"prompt-0": ids}), layer=2, **QUIET)
    plain, _, _ = architectures.build(name, attn_implementation="eager")
    block, states, inputs = eager.blocks_of(plain)[2], [], []
    writer = getattr(block, "post_feedforward_layernorm", block.mlp)
    writer.register_forward_hook(lambda m, a, out: states.append(out[0]))
    block.register_forward_hook(
        lambda m, a, out: inputs.append((out[0] if isinstance(out, tuple) else out).reshape(40, -1))
    )
    if name == "bloom":  # its MLP adds the residual stream itself
        block.mlp.register_forward_pre_hook(lambda m, a: states.append(-a[1][0]))
    with torch.no_grad():
        plain(ids[None])
    u = primary_direction(inputs[0][None], 0)
    expected = float(sum(states)[9] @ u)
    assert float(result.data["write"].sum() + result.data["bias"][0]) == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert float(result.data["contribution"][0]) == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert result.data["cos_gate"].isnull().all() == (name in ("gpt2", "bloom"))


def test_ablating_the_named_neuron_is_ablating_the_sink():
    model, sinks = lens("bridge", "stand_in"), secondary("bridge", "stand_in")
    carrying = anatomy.neurons(model, [prompt()], sinks, layer=6, **QUIET)
    effect = anatomy.ablate_neurons(model, [prompt()], sinks, carrying, n_random=3, **QUIET)
    whole = float(sc.ablate(model, [prompt()], sinks, layer=6, **QUIET).over_lifetime("log_odds")[0, 0])
    own, *random = effect.over_lifetime("log_odds").to_numpy()[0]
    assert own == pytest.approx(whole, rel=0.02) and own < -3
    assert np.abs(random).max() < 0.01
    row = anatomy.against_random(effect).iloc[0]
    assert (row["rank"], row.n_draws) == (1, 3) and row.named == pytest.approx(own)
    edited = by_hand(prompt(), {(6, SINK): lambda c: c - _neuron_by_hand(c)}, "stand_in")
    expected = hand.log_odds(edited.pattern)[7:15, :, SINK].mean()
    at = effect.data["log_odds"].sel(edit="named", sink=0, layer=slice(7, 14)).mean()
    assert float(at) == pytest.approx(float(expected), abs=1e-3)


@torch.no_grad()
def _neuron_by_hand(contribution):
    """What neuron 0 of MLP 6 writes at the sink in the model without the stand-in."""
    run, model = by_hand(prompt(), None, "stand_in"), subject("stand_in").hf_model
    block = {name: p.detach().double() for name, p in model.model.layers[6].named_parameters()}
    x = hand.rms_norm(
        (run.residuals[6] - run.contributions[6])[SINK],
        block["post_attention_layernorm.weight"],
        model.config.rms_norm_eps,
    )
    gate, up = block["mlp.gate_proj.weight"][0] @ x, block["mlp.up_proj.weight"][0] @ x
    return torch.nn.functional.silu(gate) * up * block["mlp.down_proj.weight"][:, 0].to(contribution)


def test_neuron_part_behind_a_norm_computes_the_norm_anew():
    """Gemma 3: what is left of the contribution is that of an MLP without the neurons' down-projection rows."""
    model = load("gemma3")
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    part = mlp.mlp_of(model, 1)
    with torch.no_grad():
        left = part.post_norm(part.output(x)) - carriers.neuron_part(part, part.post(x), [4, 7])
        plain, _, _ = architectures.build("gemma3")
        block = plain.model.layers[1]
        block.mlp.down_proj.weight[:, [4, 7]] = 0
        torch.testing.assert_close(left, block.post_feedforward_layernorm(block.mlp(x)), atol=1e-5, rtol=1e-4)


def test_neurons_refuse_what_they_cannot_do():
    model, sinks = lens(), secondary()
    carrying = anatomy.neurons(model, [prompt()], sinks, layer=6, **QUIET)
    for wrong in (0, -0.5, 1.5):
        with pytest.raises(InputError, match="share"):
            carrying.carriers(wrong)
    with pytest.raises(InputError, match="n = 33: at most 32"):
        carrying.named(0, 33)
    with pytest.raises(InputError, match="n_random"):
        anatomy.ablate_neurons(model, [prompt()], sinks, carrying, n_random=0)
    with pytest.raises(InputError, match="too few are left"):
        anatomy.ablate_neurons(model, [prompt()], sinks, carrying, n=20, **QUIET)
    with pytest.raises(InputError, match="pass neurons\\(\\) of these sinks"):
        anatomy.ablate_neurons(model, [prompt()], found(), carrying)
    other = dataclasses.replace(carrying, table=carrying.table.assign(prompt="another"))
    with pytest.raises(InputError, match="pass neurons\\(\\) of these sinks"):  # at the same position, of another text
        anatomy.ablate_neurons(model, [prompt()], sinks, other)
    for option in ("what", "settings", "speed"):
        with pytest.raises(InputError, match=f"option '{option}' is unknown here"):
            anatomy.ablate_neurons(model, [prompt()], sinks, carrying, **{option: "x"})
    with pytest.raises(InputError, match="pass what ablate_neurons returns"):
        anatomy.against_random(sc.ablate(model, [prompt()], sinks, layer=6, **QUIET))
    with pytest.raises(InputError, match="forming holds 3 layers for 1 sinks"):
        anatomy.neurons(model, [prompt()], sinks, forming=pd.Series([6, 6, 6]), **QUIET)
    with pytest.raises(InputError, match="layer 24 is out of range"):
        anatomy.neurons(model, [prompt()], sinks, layer=24, **QUIET)
