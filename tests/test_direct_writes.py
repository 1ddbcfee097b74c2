"""Who writes and erases the direction of a sink, as planted, as by hand and as in plain Hugging Face."""

import dataclasses

import eager
import numpy as np
import pytest
import test_architectures as architectures
import torch
from anatomies import ORDINARY, QUIET, found, load, primary_direction, secondary, sinks_at, unit
from common import BACKENDS, SINK, by_hand, lens, prompt

import sink_circuits as sc
from sink_circuits import anatomy
from sink_circuits.anatomy import direct_writes, reading
from sink_circuits.errors import InputError, ModelError


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


def test_the_writing_mlp_is_the_planted_one():
    result = anatomy.writers(lens(), [prompt()], found(), **QUIET)
    assert dict(zip(result.table["pos"], result.writing_mlp(), strict=True)) == {0: 2, SINK: 6}
    # Only MLPs up to l_start count, and one that writes against the direction is none.
    late = dataclasses.replace(result, table=result.table.assign(l_start=[1] * len(result.table)))
    data = late.data.assign(write=-late.data["write"].clip(min=0), ordinary=late.data["ordinary"] * 0)
    assert dataclasses.replace(late, data=data).writing_mlp().tolist() == [-1] * len(result.table)


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
