"""The anatomy says what was planted, and what a forward pass written by hand or by plain Hugging Face says."""

import functools
import json
import math
import re
import sys
from itertools import combinations, product

import eager
import hand
import numpy as np
import pandas as pd
import pytest
import test_architectures as architectures
import torch
from common import BACKENDS, SINK, by_hand, lens, prompt, real, subject
from hypothesis import given, settings
from hypothesis import strategies as st

import sink_circuits as sc
from sink_circuits import anatomy, figures
from sink_circuits.anatomy import attended, carriers, direct_writes, geometry, mlp, patterns, profiles, reading, spectra
from sink_circuits.detection import COLUMNS, Sinks
from sink_circuits.errors import InputError, ModelError, ResultError
from sink_circuits.models import adapt
from sink_circuits.records import CandidateSink, Record, write_records
from sink_circuits.results import Manifest

torch.set_num_threads(1)
QUIET = {"verbose": False}


@functools.cache
def found(backend: str = "bridge", *without: str) -> Sinks:
    return sc.find_sinks(lens(backend, *without), [prompt()], **QUIET)


@functools.cache
def secondary(backend: str = "bridge", *without: str) -> Sinks:
    return found(backend, *without).select("secondary")


@functools.cache
def load(name: str):
    return architectures.load(name)[0]


def sinks_at(
    *places: tuple[str, int, int], token_ids, primary: int = 0, l_start: int = 1, l_end: int = 2, kind="secondary"
) -> Sinks:
    """A table of sinks as a researcher might write it: (prompt, pos) of models that form none by themselves."""
    life = {
        "kind": kind,
        "l_start": l_start,
        "l_end": l_end,
        "lifetime": l_end - l_start + 1,
        "phase_start": 0,
        "primary_pos": primary,
    }
    rows = [
        {"prompt": name, "pos": pos, "token_id": int(token_ids[name][pos]), "token": f"<{pos}>", **life}
        for name, pos in places
    ]
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    return Sinks(table, tuple(token_ids), Manifest("find_sinks", "random", "", "float32", "", 1, "fast"))


def unit(vector: torch.Tensor) -> torch.Tensor:
    return vector / vector.norm()


def primary_direction(residuals: torch.Tensor, layer: int) -> torch.Tensor:
    """By definition: resid_post at position 0 less the median over positions, of norm 1."""
    return unit(residuals[layer, 0] - residuals[layer].median(dim=0).values)


ORDINARY = [pos for pos in range(4, 96) if pos != SINK]


# Writers.


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_planted_writers_and_erasers_come_out(backend):
    top = anatomy.writers(lens(backend), [prompt()], found(backend), **QUIET).top(2)
    by_role = {(row.pos, row.role): row for row in top.drop_duplicates(["sink", "role"]).itertuples()}
    assert by_role[0, "writer"].component == "L2 mlp" and by_role[0, "eraser"].component == "L21 mlp"
    assert by_role[SINK, "writer"].component == "L6 mlp" and by_role[SINK, "carrier"].component == "L7 mlp"
    assert by_role[SINK, "eraser"].component == "L13 mlp"
    assert by_role[SINK, "writer"].excess == pytest.approx(40, abs=0.1)
    assert by_role[SINK, "writer"].share == pytest.approx(1, abs=1e-2)
    assert by_role[SINK, "eraser"].share == pytest.approx(-1, abs=1e-2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_writes_are_those_of_the_hand_written_pass(backend):
    result, run = anatomy.writers(lens(backend), [prompt()], secondary(backend), **QUIET), by_hand(prompt())
    sink = result.table.iloc[0]
    lives = [primary_direction(run.residuals, layer) for layer in range(sink.l_start, sink.l_end + 1)]
    directions = {"start": lives[0], "life": unit(torch.stack(lives).mean(dim=0)), "end": lives[-1]}
    layer, part = result.data["component_layer"].to_numpy(), result.data["part"].to_numpy()
    for name, u in directions.items():
        for what, at in (("write", [SINK]), ("ordinary", ORDINARY)):
            writes = result.data[what].sel(sink=0, direction=name).to_numpy()
            mlps = writes[part == direct_writes.PARTS.index("mlp")]
            np.testing.assert_allclose(mlps, (run.contributions[:, at] @ u).mean(dim=1), atol=2e-4)
            before = torch.cat([torch.zeros_like(run.residuals[:1]), run.residuals[:-1]])
            attention = (run.residuals - before - run.contributions)[1:, at] @ u
            heads = np.array(
                [writes[(layer == one) & (part == direct_writes.PARTS.index("head"))].sum() for one in range(1, 24)]
            )
            np.testing.assert_allclose(heads, attention.mean(dim=1), atol=2e-4)
        np.testing.assert_allclose(
            result.data["resid"].sel(sink=0, direction=name), run.residuals[:, SINK] @ u, rtol=1e-4, atol=1e-3
        )
        np.testing.assert_allclose(
            result.data["agreement"].sel(sink=0, direction=name)[7],
            float(u @ primary_direction(run.residuals, 7)),
            atol=1e-5,
        )


@pytest.mark.parametrize("name", ["gemma3", "gpt2", "gpt_neox", "bloom", "qwen3_moe"])
def test_writes_add_up_to_the_residual_stream_of_hugging_face(name):
    tokens = {"a": torch.arange(3, 43)}
    plain, _, _ = architectures.build(name, attn_implementation="eager")
    states = []
    for block in eager.blocks_of(plain):
        block.register_forward_hook(
            lambda m, a, out: states.append((out[0] if isinstance(out, tuple) else out).reshape(40, -1))
        )
    with torch.no_grad():
        plain(tokens["a"][None])
    result = anatomy.writers(
        load(name), [tokens["a"]], sinks_at(("prompt-0", 9), token_ids={"prompt-0": tokens["a"]}), **QUIET
    )
    u = primary_direction(torch.stack(states), 1)
    writes, layer = (
        result.data["write"].sel(sink=0, direction="start").to_numpy(),
        result.data["component_layer"].to_numpy(),
    )
    for one in range(4):
        assert writes[layer <= one].sum() == pytest.approx(float(states[one][9] @ u), rel=1e-4, abs=1e-4)
    heads = result.data["part"].to_numpy() == direct_writes.PARTS.index("head")
    assert heads.sum() == (0 if name == "bloom" else 16) or name == "bloom"
    assert ("L0 bias" in result.data["component"].values) == (name in ("gpt2", "gpt_neox", "bloom"))


def test_writes_need_ordinary_tokens_to_be_held_against():
    """A mean of none would be NaN, and no component a writer."""
    texts = {"short": prompt()[:5]}
    sinks = sinks_at(("short", 4), token_ids=texts)
    with pytest.raises(InputError, match="'short' of 5 tokens has none beside its sinks and the first 4"):
        anatomy.writers(lens(), sc.Tokens(tuple(texts.values()), tuple(texts)), sinks, **QUIET)


def test_components_that_do_not_add_up_are_an_error():
    clean = sc.run_clean(lens(), prompt())
    names = [f"blocks.{layer}.hook_{part}_out" for layer in range(24) for part in ("attn", "mlp")]
    kept = reading.activations(lens(), prompt(), ["blocks.0.hook_resid_pre", *names])
    assert direct_writes._check_sum(clean, kept, range(24)) < 1e-5
    kept["blocks.3.hook_attn_out"] = 2 * kept["blocks.3.hook_attn_out"]
    with pytest.raises(ModelError, match="up to layer 3 do not add up to the residual stream"):
        direct_writes._check_sum(clean, kept, range(24))


# Neurons.


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
    with pytest.raises(InputError, match="pass what ablate_neurons returns"):
        anatomy.against_random(sc.ablate(model, [prompt()], sinks, layer=6, **QUIET))
    with pytest.raises(InputError, match="forming holds 3 layers for 1 sinks"):
        anatomy.neurons(model, [prompt()], sinks, forming=pd.Series([6, 6, 6]), **QUIET)
    with pytest.raises(InputError, match="layer 24 is out of range"):
        anatomy.neurons(model, [prompt()], sinks, layer=24, **QUIET)


# Stages.


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


# Profiles.


@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_norms_are_those_of_the_hand_written_pass(backend):
    result, run = anatomy.norms_by_layer(lens(backend), [prompt()], found(backend), **QUIET), by_hand(prompt())
    assert result.table["kind"].tolist() == ["primary", "secondary", "rest"]
    lines = [[0], [SINK], ORDINARY]
    model = subject().hf_model
    for i, at in enumerate(lines):
        np.testing.assert_allclose(result.data["hidden"][i], run.residuals[:, at].norm(dim=-1).mean(dim=1), rtol=1e-4)
        for layer in (1, 8):
            block = model.model.layers[layer]
            normed = hand.rms_norm(
                run.residuals[layer - 1], block.input_layernorm.weight.double(), model.config.rms_norm_eps
            )
            for what, projection in (("key", block.self_attn.k_proj), ("value", block.self_attn.v_proj)):
                heads = (normed @ projection.weight.double().T).reshape(96, 2, 16).norm(dim=-1).mean(dim=-1)
                assert float(result.data[what][i, layer]) == pytest.approx(float(heads[at].mean()), rel=1e-4)


def test_scores_and_norms_by_lifetime_are_those_of_the_hand_written_pass():
    result, run = anatomy.score_by_lifetime(lens(), [prompt()], found(), **QUIET), by_hand(prompt())
    scores = hand.sink_scores(run.pattern).mean(dim=1)
    for i, pos in enumerate((0, SINK)):
        np.testing.assert_allclose(result.data["score"][i], scores[:, pos], atol=1e-5)
        np.testing.assert_allclose(
            result.data["mlp_norm"][i], run.contributions[:, pos].norm(dim=-1), rtol=1e-3, atol=1e-4
        )
    assert result.table["life_score"][1] == pytest.approx(float(scores[7:14, SINK].mean()), abs=1e-5)
    assert result.by_lifetime()["mean"].tolist() == pytest.approx(
        [result.table["life_score"][1], result.table["life_score"][0]]
    )


def test_levels_count_sinks_and_records(tmp_path):
    sinks = [
        CandidateSink((3, 4, 5), 7, "secondary"),
        CandidateSink((3, 5, 6), 8, "secondary"),
        CandidateSink((9,), 9, "noise"),
    ]
    write_records(
        tmp_path / "r.jsonl", [Record(dict(enumerate(sinks)), 0, 20, 0, 20), Record({4: sinks[0]}, 1, 20, 0, 20)]
    )
    result = anatomy.levels({"planted": found(), "published": tmp_path / "r.jsonl"})
    assert result.table.to_numpy().tolist() == [["planted", 6, 7, 1], ["published", 3, 3, 3]]
    assert (
        int(result.data["count"].sel(model="published", l_start=3, lifetime=3)) == 3
        and int(result.data["count"].sum()) == 4
    )
    assert result.data["n_prompts"].values.tolist() == [1, 2]
    figure = result.plot()
    titles = [one.text for one in figure.layout.annotations]
    assert titles == ["planted: 1 sink in 1 prompt", "published: 3 sinks in 2 prompts"], "counted over both models"
    np.testing.assert_allclose(
        np.array(figure.data[1].z), np.log1p(result.data["count"].sel(model="published").to_numpy().T)
    )
    assert figure.data[1].zmax == pytest.approx(math.log(4))
    older = type(result)(result.data.drop_vars("n_prompts"), result.table, result.manifest).plot()
    assert older.layout.annotations[1].text == "published: 3 sinks"
    everything = anatomy.levels({"published": tmp_path / "r.jsonl"}, kinds=("secondary", "noise"))
    assert int(everything.data["count"].sel(l_start=9, lifetime=1).sum()) == 1
    with pytest.raises(InputError, match="no sinks of kind bos_sink"):
        anatomy.levels(found(), kinds=["bos_sink"])
    with pytest.raises(InputError, match="no sinks were given"):
        anatomy.levels({})


# Geometry.


def repeated_tokens():
    """Two texts in which ids 5 and 6 recur, and a table that calls four of them sinks."""
    generator = torch.Generator().manual_seed(3)
    texts = {f"prompt-{i}": torch.randint(10, 60, (48,), generator=generator) for i in range(2)}
    for ids in texts.values():
        ids[[8, 15, 22, 29]] = 5
        ids[[11, 18, 25]] = 6
    places = [("prompt-0", 8), ("prompt-0", 11), ("prompt-1", 15), ("prompt-1", 18)]
    return texts, sinks_at(*places, token_ids=texts)


def test_controls_have_the_sinks_token_and_are_taken_once():
    texts, sinks = repeated_tokens()
    frames = [pd.DataFrame({"prompt": name, "pos": range(48), "token_id": ids.numpy()}) for name, ids in texts.items()]
    everything = pd.concat(frames, ignore_index=True)
    free = everything[
        ~everything.set_index(["prompt", "pos"]).index.isin(sinks.table.set_index(["prompt", "pos"]).index)
    ]
    chosen = reading.matched_controls(sinks.table, free, "test")
    assert len(set(chosen)) == 4 and -1 not in chosen
    assert everything.loc[chosen, "token_id"].tolist() == sinks.table["token_id"].tolist()
    assert everything.loc[chosen, "prompt"].tolist() == sinks.table["prompt"].tolist()
    assert reading.matched_controls(sinks.table, free.iloc[:0], "test") == [-1] * 4


def test_principal_components_and_the_mlps_response():
    texts, sinks = repeated_tokens()
    model, ids = lens(), list(texts.values())
    result = anatomy.pca(model, ids, sinks, layer=6, alphas=[-2.0, 0.0, 3.0], **QUIET)
    assert result.table["is_sink"].tolist() == [True] * 4 + [False] * 4
    assert result.table["token_id"].tolist() == [5, 6, 5, 6] * 2
    clean = [by_hand(one) for one in ids]
    block = {name: p.detach().double() for name, p in subject().hf_model.model.layers[6].named_parameters()}
    normed = [
        hand.rms_norm(run.residuals[6] - run.contributions[6], block["post_attention_layernorm.weight"], 1e-6)
        for run in clean
    ]
    rows = torch.stack(
        [normed[int(name[-1])][pos] for name, pos in zip(result.table["prompt"], result.table["pos"], strict=True)]
    )
    values, vectors = np.linalg.eigh(np.cov(rows.numpy().T))
    np.testing.assert_allclose(
        result.data["explained"].sel(space="mlp_in"), (values[::-1] / values.sum())[:6], atol=1e-5
    )

    def by_hand_mlp(x):
        gate = torch.nn.functional.silu(x @ block["mlp.gate_proj.weight"].T)
        return (gate * (x @ block["mlp.up_proj.weight"].T)) @ block["mlp.down_proj.weight"].T

    direction = torch.tensor(vectors[:, -1])
    coordinates = (rows - rows.mean(dim=0)) @ direction
    direction = direction if coordinates[:4].mean() > coordinates[4:].mean() else -direction
    out = by_hand_mlp(torch.tensor([-2.0, 0.0, 3.0], dtype=torch.float64)[:, None] * direction)
    np.testing.assert_allclose(result.data["response_norm"].sel(component=1), out.norm(dim=-1), rtol=1e-3, atol=1e-6)
    primary = by_hand_mlp(torch.stack([one[0] for one in normed]).mean(dim=0))
    expected = torch.cosine_similarity(out, primary[None], dim=-1)
    np.testing.assert_allclose(result.data["response_cosine"].sel(component=1)[[0, 2]], expected[[0, 2]], atol=1e-3)
    assert result.data["response_cosine"].sel(component=1)[1].isnull()


def test_pca_takes_the_most_frequent_layer_and_refuses_sinks_without_controls():
    texts, sinks = repeated_tokens()
    result = anatomy.pca(lens(), list(texts.values()), sinks, forming=pd.Series([3, 6, 6, 6]), **QUIET)
    assert (
        result.manifest.settings["layer"],
        result.manifest.settings["n_sinks"],
        result.manifest.settings["n_other_layers"],
    ) == (6, 3, 1)
    places = set(zip(result.table["prompt"], result.table["pos"], strict=True))
    assert ("prompt-0", 8) not in places  # a sink of another layer is no control
    with pytest.raises(InputError, match="sinks of layer 6: 1, same-token non-sinks: 0; at least one"):
        anatomy.pca(lens(), [prompt()], secondary(), layer=6, **QUIET)
    with pytest.raises(InputError, match="alphas"):
        anatomy.pca(lens(), list(texts.values()), sinks, layer=6, alphas=[math.nan], **QUIET)


def test_silhouette_by_definition():
    rng = np.random.default_rng(0)
    x, labels = rng.normal(size=(9, 4)), np.array([1, 1, 1, 0, 0, 0, 0, 0, 1], dtype=bool)
    distance = np.linalg.norm(x[:, None] - x[None], axis=-1)
    values = []
    for i in range(9):
        a = np.mean([distance[i, j] for j in range(9) if j != i and labels[j] == labels[i]])
        b = np.mean([distance[i, j] for j in range(9) if labels[j] != labels[i]])
        values.append((b - a) / max(a, b))
    assert geometry.silhouette(distance, labels) == pytest.approx(np.mean(values))
    assert geometry.silhouette(np.zeros((4, 4)), np.array([True, True, False, False])) == 0
    assert geometry.silhouette(distance[:3, :3], np.array([True, False, False])) <= 1


def test_separation_finds_groups_that_part_and_no_others():
    rng = np.random.default_rng(1)
    is_sink, token = np.tile([True, False], 10), np.repeat(np.arange(5), 4)
    x = rng.normal(size=(20, 8))
    _, p = geometry.separation(x + 10 * token[:, None], is_sink, token, name="none")  # tokens part, states do not
    assert p > 0.05
    value, p = geometry.separation(x + 10 * is_sink[:, None], is_sink, token, name="apart")
    assert value > 0.5 and p <= 0.002


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 4)), min_size=1, max_size=3))
def test_the_smallest_p_is_what_arrangements_allow(sizes):
    sizes = [(n, min(k, n)) for n, k in sizes]
    is_sink = np.concatenate([np.arange(n) < k for n, k in sizes])
    token = np.repeat(np.arange(len(sizes)), [n for n, _ in sizes])
    arrangements = list(product(*[list(combinations(range(n), k)) for n, k in sizes]))
    mirror = all(2 * k == n for n, k in sizes)
    assert geometry.smallest_separation_p(is_sink, token) == pytest.approx(max((1 + mirror) / len(arrangements), 1e-3))


def test_clustering_pairs_sinks_with_their_tokens():
    texts, sinks = repeated_tokens()
    result = anatomy.clustering(lens(), list(texts.values()), sinks, **QUIET)
    assert result.data["layer"].values.tolist() == [0, 1, 2] and len(result.table) == 8
    assert (result.table.groupby("pair")["token_id"].nunique() == 1).all()
    assert (result.data["p"] >= result.data["smallest_p"] - 1e-12).all()
    rows = by_hand(texts["prompt-0"]).residuals[1], by_hand(texts["prompt-1"]).residuals[1]
    x = torch.stack(
        [rows[int(name[-1])][pos] for name, pos in zip(result.table["prompt"], result.table["pos"], strict=True)]
    )
    expected = geometry.silhouette(torch.cdist(x, x).numpy(), result.table["is_sink"].to_numpy(dtype=bool))
    assert float(result.data["silhouette"].sel(space="resid_post", layer=1)) == pytest.approx(expected, abs=1e-3)
    with pytest.raises(InputError, match="sinks with a same-token non-sink: 0, at least 2"):
        anatomy.clustering(lens(), [prompt()], secondary(), **QUIET)
    with pytest.raises(InputError, match="name each once"):
        anatomy.clustering(lens(), list(texts.values()), sinks, layers=[1, 1], **QUIET)


# Spectra.


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**31), st.floats(0.01, 100))
@settings(max_examples=40)
def test_entropy_lies_between_one_direction_and_all(n, d, seed, factor):
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    entropy = spectra.spectral_entropy(x)
    assert -1e-9 <= entropy <= math.log(min(n, d)) + 1e-9
    assert spectra.spectral_entropy(factor * x) == pytest.approx(entropy, abs=1e-9)
    p = np.linalg.svd(x.numpy(), compute_uv=False) ** 2
    p = p / p.sum()
    assert entropy == pytest.approx(-(p * np.log(np.where(p > 0, p, 1))).sum(), abs=1e-6)


def test_entropy_in_closed_form():
    assert spectra.spectral_entropy(torch.eye(7, dtype=torch.float64)) == pytest.approx(math.log(7))
    assert spectra.spectral_entropy(torch.ones(5, 3, dtype=torch.float64)) == pytest.approx(0, abs=1e-9)
    assert math.isnan(spectra.spectral_entropy(torch.zeros(3, 3, dtype=torch.float64)))
    assert math.isnan(spectra.spectral_entropy(torch.zeros(0, 3, dtype=torch.float64)))


def test_matrix_entropy_with_and_without_sinks():
    short = subject().tokens(n_tokens=20, sinks=(), decoys=(), seed_name="b")
    result, run = (
        anatomy.matrix_entropy(lens(), [prompt(), short], found(), layers=[1, 8], seen=[10, 50], **QUIET),
        by_hand(prompt()),
    )
    for i, layer in enumerate((1, 8)):
        for j, seen in enumerate((10, 50)):
            rows = run.residuals[layer, :seen]
            kept = [pos for pos in range(seen) if pos not in (0, SINK)]
            assert float(result.data["entropy"][0, 0, i, j]) == pytest.approx(spectra.spectral_entropy(rows), abs=1e-4)
            assert float(result.data["entropy"][0, 1, i, j]) == pytest.approx(
                spectra.spectral_entropy(rows[kept]), abs=1e-4
            )
    assert (
        result.data["entropy"].sel(prompt=1, seen=50).isnull().all()
        and result.data["entropy"].sel(prompt=1, seen=10).notnull().all()
    )
    with pytest.raises(InputError, match="seen"):
        anatomy.matrix_entropy(lens(), [prompt()], found(), seen=[0])


# Heads.


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_of_the_reading_heads_are_those_of_the_hand_written_pattern(backend):
    """log A[q, k] - log A[q, j] is the difference of two logits, whatever the rest of the row."""
    result, run = (
        anatomy.key_query_geometry(lens(backend), [prompt()], secondary(backend), n_heads=3, **QUIET),
        by_hand(prompt()),
    )
    scores = hand.sink_scores(run.pattern)[7:14, :, SINK]
    best = [(7 + int(i) // 4, int(i) % 4) for i in scores.flatten().argsort(descending=True)[:3]]
    assert (
        list(zip(result.data["layer"].values[0].tolist(), result.data["head"].values[0].tolist(), strict=True)) == best
    )
    for rank, (layer, head) in enumerate(best, 1):
        log = run.pattern[layer, head].log()
        gaps = [log[q, SINK] - log[q, [k for k in ORDINARY if k < q]].mean() for q in range(SINK + 1, 96)]
        at = result.data.sel(sink=0, rank=rank, when="after rotary")
        assert float(at["logit"] - at["logit_ordinary"]) == pytest.approx(float(torch.stack(gaps).mean()), abs=1e-3)
        assert float(at["cosine"]) > 0.99 and abs(float(at["cosine_ordinary"])) < 0.1
        before = result.data.sel(sink=0, rank=rank, when="before rotary")
        assert float(at["key_norm"]) == pytest.approx(float(before["key_norm"]), rel=1e-5)


EVERY_KIND = (
    "gemma3", "qwen3", "gpt2", "olmo2", "phi3", "phi4", "gpt_neox", "gptj", "falcon", "gpt_neo",
    pytest.param("granite", marks=pytest.mark.slow), pytest.param("llama4", marks=pytest.mark.slow),
    pytest.param("stablelm", marks=pytest.mark.slow), pytest.param("phi", marks=pytest.mark.slow),
)  # fmt: skip


@pytest.mark.parametrize("name", EVERY_KIND)
def test_keys_and_queries_of_other_architectures(name):
    """Rotary dimensions that are a part of the head's, fused projections, other scales, attention that takes no function."""
    ids = torch.arange(3, 43)
    sinks = sinks_at(("prompt-0", 9), token_ids={"prompt-0": ids})
    result = anatomy.key_query_geometry(load(name), [ids], sinks, n_heads=2, min_queries=4, **QUIET)
    before, rotated = (result.data.sel(when=when) for when in ("before rotary", "after rotary"))
    assert rotated["logit"].notnull().all() and before["logit"].notnull().all() and not result.missing()
    pattern, _ = architectures.hugging_face(name, ids)
    layer, head = int(result.data["layer"][0, 0]), int(result.data["head"][0, 0])
    window = adapt(load(name)).forms[layer].window or 40
    queries = [q for q in range(10, 40) if q - 9 < window]
    log = pattern[layer, head].log()
    gaps = [log[q, 9] - log[q, [k for k in range(max(4, q - window + 1), q) if k != 9]].mean() for q in queries]
    found_gap = float((rotated["logit"] - rotated["logit_ordinary"])[0, 0])
    assert found_gap == pytest.approx(float(torch.stack(gaps).mean()), abs=1e-3)
    if name in ("gpt2", "gpt_neo"):  # no rotary position
        assert before.drop_vars("when").equals(rotated.drop_vars("when"))
    else:
        assert abs(rotated["cosine"] - before["cosine"]).max() > 1e-3
    if name != "llama4":  # whose norm of queries and keys stands behind the rotation
        np.testing.assert_allclose(before["key_norm"], rotated["key_norm"], rtol=1e-4)


@pytest.mark.parametrize("name", ["gpt_neox", "phi3", "falcon"])
def test_queries_and_keys_behind_rotary_are_what_hugging_face_rotates(name, monkeypatch):
    ids, made = torch.arange(3, 43), []
    room = f"transformers.models.{name}.modeling_{name}"
    rotate = sys.modules[room].apply_rotary_pos_emb

    def noted(*args, **kwargs):
        made.append(rotate(*args, **kwargs))
        return made[-1]

    with monkeypatch.context() as patch:
        patch.setattr(f"{room}.apply_rotary_pos_emb", noted)
        architectures.hugging_face(name, ids)
    found = attended.attended(load(name), ids, [0, 2])
    for layer in (0, 2):
        for own, whole in zip(found[layer].after, made[layer], strict=True):
            heads = whole[0].transpose(0, 1)  # a key that serves several queries may stand here several times
            heads = heads.repeat_interleave(own.shape[1] // heads.shape[1], dim=1)
            torch.testing.assert_close(own, heads, atol=1e-5, rtol=1e-5)


def test_what_cannot_be_seen_is_said():
    """Folded norms: no plain Hugging Face model runs these weights, and no hook of NeoX shows the rotated ones."""
    ids = torch.arange(3, 43)
    model = sc.load_model(architectures.build("gpt_neox")[0], verbose=False)
    model.enable_compatibility_mode(disable_warnings=True)
    sinks = sinks_at(("prompt-0", 9), token_ids={"prompt-0": ids})
    result = anatomy.key_query_geometry(model, [ids], sinks, n_heads=2, min_queries=4, **QUIET)
    assert result.data["logit"].sel(when="after rotary").isnull().all()
    assert result.data["logit"].sel(when="before rotary").notnull().all()
    (sentence,) = result.missing()
    assert sentence.startswith("queries and keys after rotary position cannot be seen")
    assert sentence in " ".join(result.plot().layout.title.text.replace("<br>", " ").split())


# Patterns.


def test_patterns_are_those_of_the_hand_written_pass():
    result, run = anatomy.attention_patterns(lens(), [prompt()], found(), n_heads=3, **QUIET), by_hand(prompt())
    window = result.of()
    scores = hand.sink_scores(run.pattern)[7:14, :, SINK]
    best = [(7 + int(i) // 4, int(i) % 4) for i in scores.flatten().argsort(descending=True)[:3]]
    assert [(layer, head) for layer, head, _ in window.heads] == best
    pos = window.tokens["pos"].tolist()
    assert len(pos) == 48 and {0, 1, 2, 3, *range(SINK - 3, SINK + 4)} <= set(pos)
    for (layer, head, score), values, rest in zip(window.heads, window.attention, window.elsewhere, strict=True):
        pattern = run.pattern[layer, head]
        np.testing.assert_allclose(values, pattern[pos][:, pos], atol=2e-5)
        np.testing.assert_allclose(rest, 1 - pattern[pos][:, pos].sum(-1), atol=2e-5)
        assert score == pytest.approx(float(scores[layer - 7, head]), abs=1e-5)
    kinds = dict(zip(window.tokens["pos"], window.tokens["kind"], strict=True))
    assert {p: kind for p, kind in kinds.items() if kind} == {0: "primary", SINK: "secondary"}
    frame = result.to_dataframe()
    assert len(frame) == 3 * 48 * 49 // 2 and (frame["key"] <= frame["query"]).all()
    row = frame[(frame["query"] == pos[-1]) & (frame["key"] == SINK)].iloc[0]
    assert row["attention"] == pytest.approx(float(run.pattern[row["layer"], row["head"], pos[-1], SINK]), abs=2e-5)


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "falcon"])
def test_patterns_of_other_architectures_are_eager_hugging_faces(name):
    """Sliding windows, learned sinks, the reference path; texts of two lengths."""
    texts = {"a": torch.arange(3, 43), "b": torch.arange(3, 33)}
    sinks = sinks_at(("a", 9), ("b", 12), token_ids=texts)
    tokens = sc.Tokens(tuple(texts.values()), tuple(texts))
    result = anatomy.attention_patterns(load(name), tokens, sinks, n_heads=2, min_queries=4, n_positions=35, **QUIET)
    assert result.prompts == ["a", "b"]
    for prompt_name, ids in texts.items():
        window, (pattern, _) = result.of(prompt_name), architectures.hugging_face(name, ids)
        pos = window.tokens["pos"].tolist()
        assert len(pos) == min(35, len(ids))
        for (layer, head, _), values, rest in zip(window.heads, window.attention, window.elsewhere, strict=True):
            np.testing.assert_allclose(values, pattern[layer, head][pos][:, pos], atol=2e-5)
            np.testing.assert_allclose(rest + values.sum(-1), 1, atol=2e-5)
    with pytest.raises(InputError, match="prompt 'c' has no patterns here: there are a, b"):
        result.of("c")


def test_patterns_refuse_what_they_cannot_use():
    args = (lens(), [prompt()], found())
    for options, said in (
        ({"n_heads": 0}, "n_heads = 0: at least 1"), ({"n_positions": 1}, "n_positions = 1: at least 2"),
        ({"around": -1}, "around = -1: at least 0"), ({"min_queries": 96}, "no head has a defined score"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=said):
            anatomy.attention_patterns(*args, **options, **QUIET)


@given(st.lists(st.integers(0, 59), min_size=1, max_size=20), st.integers(2, 80), st.integers(0, 5))
def test_a_window_holds_sinks_first_and_never_too_much(sinks, size, around):
    window = patterns.window_around(sinks, 60, size, around)
    assert window == sorted(set(window)) and len(window) == min(size, 60) and set(window) <= set(range(60))
    assert sinks[0] in window
    if len(set(sinks)) * (2 * around + 1) <= size:
        assert {p for s in sinks for p in range(s - around, s + around + 1) if 0 <= p < 60} <= set(window)


def test_the_view_is_small_rounded_and_sums_to_one():
    window = every_result()["attention_patterns"].of()
    view = figures.attention_view(window, name="a b", library=False)
    assert len(view) < 200_000 and "CircuitsVis=(" not in view and 'id="cv-a20b"' in view
    data = json.loads(re.search(r'class="cv-data"[^>]*>(.*?)</script>', view, re.DOTALL)[1])
    values = np.array(data["attention"])
    assert values.shape == (len(window.heads), 49, 49) and len(data["tokens"]) == 49
    np.testing.assert_allclose(values[:, 1:].sum(-1), 1, atol=49 * 0.0005)
    assert np.allclose(values, values.round(3)) and not values[:, 0].any()
    assert every_result()["attention_patterns"].view().count("CircuitsVis=(") == 1


# Results and figures.


@functools.cache
def every_result() -> dict[str, anatomy.Anatomy]:
    texts, fake = repeated_tokens()
    model, ids = lens(), list(texts.values())
    args = (model, [prompt()])
    made = [
        anatomy.mlp_stages(*args, secondary(), layer="l_start", **QUIET), anatomy.writers(*args, found(), **QUIET),
        anatomy.neurons(*args, secondary(), layer=6, **QUIET), anatomy.norms_by_layer(*args, found(), **QUIET), anatomy.levels(found()),
        anatomy.score_by_lifetime(*args, found(), **QUIET), anatomy.pca(model, ids, fake, layer=6, **QUIET),
        anatomy.clustering(model, ids, fake, **QUIET), anatomy.matrix_entropy(*args, found(), layers=[0, 8], **QUIET),
        anatomy.key_query_geometry(*args, found(), **QUIET), anatomy.attention_patterns(*args, found(), **QUIET),
    ]  # fmt: skip
    return {one.kind: one for one in made}


KINDS = sorted(one.kind for one in anatomy.Anatomy.__subclasses__())


@pytest.mark.parametrize("kind", KINDS)
def test_results_come_back_from_files_as_they_were(kind, tmp_path):
    result = every_result()[kind]
    result.save(tmp_path / "r.safetensors")
    back = anatomy.Anatomy.load(tmp_path / "r.safetensors")
    assert type(back) is type(result) is type(type(result).load(tmp_path / "r.safetensors"))
    assert back.manifest == result.manifest
    pd.testing.assert_frame_equal(back.to_dataframe(), result.to_dataframe(), check_dtype=False)
    pd.testing.assert_frame_equal(back.table, result.table, check_dtype=False)
    assert back.plot().to_json() == result.plot().to_json()
    other = next(one for one in anatomy.Anatomy.__subclasses__() if one.kind != kind)
    with pytest.raises(ResultError, match=f"{other.__name__}.load reads {other.kind}"):
        other.load(tmp_path / "r.safetensors")
    with pytest.raises(ResultError, match="exists"):
        result.save(tmp_path / "r.safetensors")


@pytest.mark.parametrize("kind", KINDS)
def test_frames_are_tidy(kind):
    frame = every_result()[kind].to_dataframe()
    assert len(frame) and set(every_result()[kind].long) <= set(frame.columns) and frame.columns.is_unique


def test_figures_draw_the_numbers():
    results = every_result()
    norms, figure = results["norms_by_layer"], results["norms_by_layer"].plot()
    rest = [trace for trace in figure.data if trace.name == "mean of the rest"]
    assert [list(trace.y[:-1]) for trace in rest] == [
        norms.data[what][2].to_numpy().tolist() for what in ("key", "value", "hidden")
    ]
    figure = results["writers"].plot()
    mlp_bars = [trace for trace in figure.data if trace.name == "MLP"]
    own = results["writers"].excess().sel(sink=1, direction="life").to_numpy()
    is_mlp = results["writers"].data["part"].to_numpy() == direct_writes.PARTS.index("mlp")
    np.testing.assert_allclose(mlp_bars[1].y, own[is_mlp], rtol=1e-5)
    assert figure.layout.showlegend
    pca, figure = results["pca"], results["pca"].plot()
    np.testing.assert_allclose(figure.data[0].y[:-1], pca.data["response_norm"][0])
    assert profiles.REST in norms.table["kind"].values


@pytest.mark.parametrize(("name", "n_panels"), [("qwen3_moe", 4), ("qwen2_moe", 5)])
def test_a_branch_that_does_not_exist_has_no_panel(name, n_panels):
    """The whole, two experts, shared experts where there are some, the direction; stages in the legend in their order."""
    model = load(name)
    torch.manual_seed(3)
    texts = {"a": torch.randint(3, model.cfg.d_vocab, (40,))}
    result = anatomy.mlp_stages(
        model, sc.Tokens((texts["a"],), ("a",)), sinks_at(("a", 20), token_ids=texts), layer=1, **QUIET
    )
    figure = result.plot()
    assert len(list(figure.select_yaxes())) == n_panels == sum(one.yref == "paper" for one in figure.layout.annotations)
    ranks = {trace.name: trace.legendrank for trace in figure.data if trace.showlegend}
    assert sorted(ranks, key=ranks.get) == ["MLP input", "gate", "up", "activation", "product", "output (contribution)"]


def test_layers_are_whole_numbers_on_an_axis():
    figure = every_result()["score_by_lifetime"].plot()
    assert figure.layout.xaxis.dtick >= 1 and figure.data[0].marker.colorbar.dtick >= 1


def test_hostile_tokens_stay_text():
    result = every_result()["mlp_stages"]
    hostile = type(result)(result.data, result.table.assign(token="<b>&x</b>\u202e"), result.manifest)
    labels = hostile.plot().layout.xaxis.ticktext
    assert "<b>" not in labels[0] and "&lt;b&gt;" in labels[0] and "\u202e" not in labels[0]


def test_no_sinks_and_foreign_tokens_are_refused_before_any_work():
    empty = Sinks(found().table.iloc[:0], found().prompts, found().manifest)
    for function in (
        anatomy.writers,
        anatomy.mlp_stages,
        anatomy.norms_by_layer,
        anatomy.clustering,
        anatomy.key_query_geometry,
    ):
        with pytest.raises(InputError, match="there are no sinks"):
            function(lens(), [prompt()], empty, **QUIET)
        with pytest.raises(InputError, match="another token there"):
            function(lens(), [prompt(sinks=(41,))], secondary(), **QUIET)


def test_forming_layers_are_found_where_none_are_given():
    sinks = secondary("bridge", "stand_in")
    result = anatomy.neurons(lens("bridge", "stand_in"), [prompt()], sinks, **QUIET)
    assert result.data["layer"].values.tolist() == [6]


# Real models.


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2-135m", "gemma-3-270m"])
def test_everything_on_real_models(name, tmp_path):
    model, _, tokens = real(name)
    sinks = sc.find_sinks(model, tokens[:2], **QUIET)
    own = sinks.select("secondary")
    own = Sinks(own.table[own.table["score"].notna()].reset_index(drop=True), own.prompts, own.manifest)
    args = (model, tokens[:2])
    written = anatomy.writers(*args, sinks, **QUIET)
    assert float(written.data["error"].max()) < 2e-4
    life = [
        float(written.data["agreement"].sel(sink=i, direction="start", layer=s))
        for i, s in enumerate(written.table["l_start"])
    ]
    np.testing.assert_allclose(life, 1, atol=1e-4)
    layer = 2
    carrying = anatomy.neurons(*args, own, layer=layer, **QUIET)
    assert carrying.carriers(0.5).median() <= 20
    effect = anatomy.ablate_neurons(*args, own, carrying, share=0.9, n_random=5, **QUIET)
    row = anatomy.against_random(effect).iloc[0]
    assert row.named < -0.5 and row["rank"] == 1
    results = [
        written, carrying, anatomy.mlp_stages(*args, own, layer=layer, **QUIET), anatomy.norms_by_layer(*args, sinks, **QUIET),
        anatomy.levels(sinks), anatomy.score_by_lifetime(*args, sinks, **QUIET), anatomy.key_query_geometry(*args, sinks, **QUIET),
        anatomy.matrix_entropy(*args, sinks, layers=[0, 8], **QUIET), anatomy.clustering(*args, own, **QUIET),
        anatomy.pca(*args, own, layer=layer, **QUIET), anatomy.attention_patterns(*args, sinks, **QUIET),
    ]  # fmt: skip
    for result in results:
        result.save(tmp_path / f"{result.kind}.safetensors")
        assert anatomy.Anatomy.load(tmp_path / f"{result.kind}.safetensors").plot().data
