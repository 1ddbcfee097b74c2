"""Stages and parts of MLPs: gated or not, mixtures of experts, from weights; by hand and by Hugging Face."""

import re

import eager
import hand
import numpy as np
import pandas as pd
import pytest
import test_architectures as architectures
import torch
from anatomies import ORDINARY, QUIET, load, primary_direction, secondary, sinks_at, unit
from common import BACKENDS, SINK, by_hand, lens, prompt, subject
from hypothesis import given, settings
from hypothesis import strategies as st

import sink_circuits as sc
from sink_circuits import anatomy
from sink_circuits.anatomy import mlp, reading
from sink_circuits.errors import ModelError


@pytest.mark.parametrize("backend", BACKENDS)
def test_stages_are_those_of_the_hand_written_pass(backend):
    result = anatomy.mlp_stages(lens(backend), [prompt()], secondary(backend), forming=pd.Series([6]), **QUIET)
    run, model = by_hand(prompt()), subject().hf_model
    block = {name: p.detach().double() for name, p in model.model.layers[6].named_parameters()}
    x = hand.rms_norm(
        run.residuals[6] - run.contributions[6], block["post_attention_layernorm.weight"], model.config.rms_norm_eps
    )
    gate, up = x @ block["mlp.gate_proj.weight"].T, x @ block["mlp.up_proj.weight"].T
    act = torch.nn.functional.silu(gate)
    stages = {
        "input": x,
        "gate": gate,
        "up": up,
        "activation": act,
        "product": act * up,
        "output": run.contributions[6],
    }
    for stage, rows in stages.items():
        cosines = torch.cosine_similarity(rows, rows[:1], dim=-1)
        at = result.data.sel(sink=0, branch="mlp", stage=stage)
        assert float(at["cosine"]) == pytest.approx(float(cosines[SINK]), abs=1e-4)
        assert float(at["ordinary"]) == pytest.approx(float(cosines[ORDINARY].mean()), abs=1e-4)
    u = primary_direction(run.residuals, 6)
    assert float(result.data["direction"].sel(sink=0, stage="output")) == pytest.approx(
        float(unit(run.contributions[6, SINK]) @ u), abs=1e-4
    )
    assert result.missing() == []


def test_an_ungated_mlp_has_no_gate_and_no_product():
    ids = torch.arange(3, 43)
    model = load("gpt2")
    result = anatomy.mlp_stages(model, [ids], sinks_at(("prompt-0", 9), token_ids={"prompt-0": ids}), layer=1, **QUIET)
    assert [line.split(":")[0] for line in result.missing()] == ["gate", "product"]
    assert result.data["cosine"].sel(stage=["input", "up", "activation", "output"]).notnull().all()
    plain, _, _ = architectures.build("gpt2")
    kept = []
    plain.transformer.h[1].mlp.act.register_forward_hook(lambda m, a, out: kept.append(out[0]))
    with torch.no_grad():
        plain(ids[None])
    expected = torch.cosine_similarity(kept[0][9], kept[0][0], dim=-1)
    assert float(result.data["cosine"].sel(sink=0, branch="mlp", stage="activation")) == pytest.approx(
        float(expected), abs=1e-4
    )


@pytest.mark.parametrize("name", ["qwen3_moe", "qwen2_moe", "gpt_oss"])
def test_a_mixture_of_experts_comes_apart_by_expert(name):
    ids = torch.arange(3, 43)
    model = load(name)
    sinks = sinks_at(("prompt-0", 9), token_ids={"prompt-0": ids})
    result = anatomy.mlp_stages(model, [ids], sinks, layer=1, **QUIET)
    plain, _, _ = architectures.build(name)
    block, given = eager.blocks_of(plain)[1].mlp, []
    block.experts.register_forward_pre_hook(
        lambda m, args, kwargs: given.append((*args, *kwargs.values())), with_kwargs=True
    )
    with torch.no_grad():
        plain(ids[None])
        x, chosen, weight = given[0]
        rank = int(weight[9].argmax())
        expert = int(chosen[9, rank])
        assert int(result.data["expert"].sel(sink=0, branch="expert 1")) == expert
        assert float(result.data["weight"].sel(sink=0, branch="expert 1")) == pytest.approx(
            float(weight[9, rank]), rel=1e-4
        )
        packed, bias = block.experts.gate_up_proj[expert], getattr(block.experts, "gate_up_proj_bias", None)
        both = x @ packed + bias[expert] if name == "gpt_oss" else x @ packed.T
        gate = both[:, ::2] if name == "gpt_oss" else both[:, : both.shape[1] // 2]
        cosine = torch.cosine_similarity(gate[9], gate[0], dim=-1)
    assert float(result.data["cosine"].sel(sink=0, branch="expert 1", stage="gate")) == pytest.approx(
        float(cosine), abs=1e-4
    )
    assert bool(result.data["cosine"].sel(branch="rest", stage="output").notnull().all()) == (
        name == "qwen2_moe"
    )  # its shared expert
    assert [line.split(":")[0] for line in result.missing()] == (["activation"] if name == "gpt_oss" else [])


@pytest.mark.parametrize("name", ["qwen3_moe", "qwen2_moe", "gpt_oss"])
def test_the_neurons_of_the_experts_that_a_sink_is_sent_to(name):
    """Against the plain model's own experts; with a shared expert, and with biases and another product (GPT-OSS)."""
    ids = torch.arange(3, 43)
    ids[[20, 30]] = int(ids[9])
    sinks = sinks_at(("prompt-0", 9), token_ids={"prompt-0": ids})
    result = anatomy.neurons(load(name), [ids], sinks, layer=1, **QUIET)
    plain, _, _ = architectures.build(name)
    block, given, residuals, written = eager.blocks_of(plain)[1], [], [], []
    block.mlp.experts.register_forward_pre_hook(
        lambda m, args, kwargs: given.append((*args, *kwargs.values())), with_kwargs=True
    )
    block.register_forward_hook(lambda m, a, out: residuals.append((out[0] if isinstance(out, tuple) else out)[0]))
    block.mlp.register_forward_hook(lambda m, a, out: written.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        plain(ids[None])
        x, chosen, weight = given[0]
        u = primary_direction(residuals[0][None], 0)
        order, experts = weight[9].argsort(descending=True), block.mlp.experts
        assert list(dict.fromkeys(result.data["expert"].values[0].tolist())) == chosen[9][order].tolist()
        whole = 0.0
        for rank in order.tolist():
            expert = int(chosen[9, rank])
            units = np.flatnonzero(result.data["expert"].values[0] == expert)
            assert result.data["unit"].values[0, units].tolist() == list(range(32 if "qwen" in name else 96))
            # A neuron's write: what the expert gives less what it gives with that column of its down-projection gone.
            one_weight, index = torch.ones(1, 1), torch.tensor([[expert]])
            full = experts(x[9:10], index, one_weight)[0] * weight[9, rank]
            for unit_ in (0, 7):
                down = experts.down_proj
                kept = down[expert].clone()
                (down.data[expert][unit_] if name == "gpt_oss" else down.data[expert][:, unit_]).zero_()
                part = full - experts(x[9:10], index, one_weight)[0] * weight[9, rank]
                down.data[expert] = kept
                assert float(result.data["write"][0, units[unit_]]) == pytest.approx(float(part @ u), abs=1e-6)
            whole = whole + full @ u
        along = written[0].reshape(-1, 64)[9] @ u
    total = float(result.data["write"].sum() + result.data["bias"][0])
    assert (
        total == pytest.approx(float(along), abs=1e-5) == pytest.approx(float(result.data["contribution"][0]), abs=1e-5)
    )
    assert (float(result.data["bias"][0]) == pytest.approx(0, abs=1e-6)) == (name == "qwen3_moe")
    assert result.data["n_same_token"].values.tolist() == [2] and result.data["same_token"].notnull().all()
    assert re.fullmatch(r"(E\d+N\d+, ){4}E\d+N\d+", result.summary()["largest"][0])
    assert result.recurring()["neuron"].str.startswith("E").all() and result.plot().data


def test_removing_an_experts_neurons_is_what_plain_hugging_face_says():
    ids = torch.arange(3, 43)
    sinks, model = sinks_at(("prompt-0", 9), token_ids={"prompt-0": ids}), load("qwen2_moe")
    carrying = anatomy.neurons(model, [ids], sinks, layer=1, **QUIET)
    effect = anatomy.ablate_neurons(model, [ids], sinks, carrying, n=3, n_random=1, min_queries=4, **QUIET)
    plain, _, _ = architectures.build("qwen2_moe", attn_implementation="eager")
    block, given = plain.model.layers[1].mlp, []
    block.experts.register_forward_pre_hook(lambda m, args: given.append(args))
    part = torch.zeros(64)
    with torch.no_grad():
        plain(ids[None])
        x, chosen, weight = given[0]
        for neuron in carrying.named(0, 3):
            expert, unit_ = (int(carrying.data[what][0, neuron]) for what in ("expert", "unit"))
            gate, up = (x[9] @ block.experts.gate_up_proj[expert].T).chunk(2)
            product = torch.nn.functional.silu(gate) * up * weight[9][chosen[9] == expert]
            part += product[unit_] * block.experts.down_proj[expert][:, unit_]

        def without(module, args, out):
            out = out.clone()
            out[0, 9] -= part
            return out

        block.register_forward_hook(without)
        pattern = plain(ids[None], output_attentions=True).attentions[3][0]
    score = effect.data["score"].sel(edit="named", layer=3, sink=0)
    np.testing.assert_allclose(score, pattern[:, 10:, 9].mean(dim=1), atol=1e-5)


def test_experts_add_up():
    model = load("qwen2_moe")
    part, x = mlp.mlp_of(model, 0), torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    plain, _, _ = architectures.build("qwen2_moe")
    block = plain.model.layers[0].mlp
    with torch.no_grad():
        output, expert, weight = part.route(x)
        torch.testing.assert_close(output, block(x[None])[0], atol=1e-5, rtol=1e-4)
        routed = sum(part.written(x, expert[:, k], weight[:, k]) for k in range(expert.shape[1]))
        shared = torch.sigmoid(block.shared_expert_gate(x)) * block.shared_expert(x)
        torch.testing.assert_close(routed + shared, output, atol=1e-5, rtol=1e-4)
    assert (weight.diff(dim=-1) <= 0).all()


@pytest.mark.parametrize("name", ["stablelm", "phi", "falcon", "gptj"])
def test_an_mlp_from_its_weights_is_the_models_own(name):
    """`checked_output` raises where they differ; a wrong contribution must make it raise."""
    model, ids = load(name), torch.arange(3, 43)
    x = reading.activations(model, ids, mlp_inputs=[2])[2]
    contribution = sc.run_clean(model, ids).contribution[2]
    mlp.checked_output(mlp.mlp_of(model, 2), x, contribution)
    with pytest.raises(ModelError, match="MLP of layer 2, computed from its weights, differs"):
        mlp.checked_output(mlp.mlp_of(model, 2), x, 1.01 * contribution)


@given(st.integers(0, 2**31), st.integers(2, 40))
@settings(max_examples=20)
def test_linear_gains_are_those_of_an_rms_norm(seed, width):
    generator = torch.Generator().manual_seed(seed)
    norm = torch.nn.RMSNorm(width, eps=1e-6)
    norm.weight.data = 1 + torch.rand(width, generator=generator)
    x = 5 * torch.randn(3, width, generator=generator)
    scale, gain = reading.linear_gains(norm, x)
    expected = norm.weight / (x.double().square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close((scale * gain).double(), expected, rtol=1e-4, atol=1e-6, check_dtype=False)


def test_a_norm_that_centres_is_no_product():
    with pytest.raises(ModelError, match="not a product with its scale"):
        reading.linear_gains(torch.nn.LayerNorm(8), torch.arange(24.0).reshape(3, 8) ** 2)


def test_a_hook_that_is_missing_or_silent_is_an_error():
    with pytest.raises(ModelError, match="blocks.0.nothing is not a hook"):
        reading.activations(lens(), prompt(), ["blocks.0.nothing"])
    with pytest.raises(ModelError, match="did not run in a forward pass"):
        reading.activations(load("phi3"), torch.arange(3, 20), ["blocks.1.attn.hook_rot_q"])
