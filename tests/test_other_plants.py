"""Every instrument on circuits planted by other means than the package's own, judged by eager Hugging Face with module hooks."""

from __future__ import annotations

import copy
import functools

import eager
import numpy as np
import other_plants
import pytest
import torch
from common import HAS_HOOKED
from other_plants import BOS, EARLY, HEADED, KINDS, LATE, LAYERS, Other, forward, text

import sink_circuits as sc
from sink_circuits.anatomy.carriers import ablate_neurons, neurons


def plants(*every_run: str) -> list:
    """Four plants of every kind; the first of these kinds in every run of the tests, the others in the slow one."""
    return [
        pytest.param(kind, seed, marks=[pytest.mark.slow] if seed or kind not in every_run else [])
        for seed in range(4)
        for kind in KINDS
    ]


def kinds(*names: str) -> list:
    return [names[0], *(pytest.param(kind, marks=pytest.mark.slow) for kind in names[1:])]


FACTORS = (0.0, 0.5, 2.0)


@functools.cache
def plant(kind: str, seed: int) -> Other:
    return other_plants.plant(kind, seed)


@functools.cache
def loaded(kind: str, seed: int):
    return sc.load_model(copy.deepcopy(plant(kind, seed).model), verbose=False)


@functools.cache
def found(kind: str, seed: int) -> sc.Sinks:
    return sc.find_sinks(loaded(kind, seed), plant(kind, seed).tokens, verbose=False)


def treated(kind: str, seed: int) -> sc.Sinks:
    """The secondary sinks that an MLP forms."""
    sinks = found(kind, seed)
    table = sinks.table[sinks.table["token_id"].isin([EARLY, LATE])].reset_index(drop=True)
    return sc.Sinks(table, sinks.prompts, sinks.manifest)


def truth_of(other: Other, token_id: int, what: str = "layer") -> int:
    return getattr(other, what)["early" if token_id == EARLY else "late"]


@pytest.mark.parametrize(("kind", "seed"), plants(*KINDS))
def test_all_that_is_planted_is_found_and_nothing_else(kind, seed):
    other, table = plant(kind, seed), found(kind, seed).table
    lives = set(table[["pos", "l_start", "l_end", "kind"]].itertuples(index=False, name=None))
    assert lives == other.lives
    _, pattern = forward(other, other.tokens)
    scores = sc.sink_scores(loaded(kind, seed), other.tokens).scores[0]
    expected = eager.scores(pattern, other.windows, min_queries=16)
    torch.testing.assert_close(scores.double(), expected, atol=2e-6, rtol=1e-4, equal_nan=True)
    for row in table.itertuples():  # attention, which never decides, says the same
        assert row.score > 5 * row.score_ordinary, row


@pytest.mark.parametrize(("kind", "seed"), plants("llama", "gemma2"))
def test_layer_map_eraser_and_dose_are_what_was_planted(kind, seed):
    other, model, sinks = plant(kind, seed), loaded(kind, seed), treated(kind, seed)
    mapped = sc.layer_map(model, other.tokens, sinks, verbose=False)
    forming = mapped.forming()
    effects = mapped.over_lifetime("log_odds").to_numpy()
    for index, row in sinks.table.iterrows():
        planted = truth_of(other, row["token_id"])
        assert forming[index] == planted
        others = np.delete(effects[index, : row["l_end"] + 1], planted)
        assert effects[index, planted] < -1.5 and np.nanmax(np.abs(others)) < 0.3
        if row["token_id"] == EARLY and other.layer["eraser"] < LAYERS - 1:  # without its eraser the sink lives on
            above = (
                mapped.effect("log_odds")
                .sel(sink=index, edit=other.layer["eraser"])
                .isel(layer=slice(other.layer["eraser"] + 1, None))
            )
            assert float(above.sel(head=0).min()) > 1.5
    one = sinks.table.iloc[:1].reset_index(drop=True)
    layer, pos = truth_of(other, one["token_id"][0]), int(one["pos"][0])
    dose = sc.dose_response(
        model, other.tokens, sc.Sinks(one, sinks.prompts, sinks.manifest), layer=layer, factors=FACTORS, verbose=False
    )
    for factor in FACTORS:
        _, pattern = forward(other, other.tokens, {(layer, pos): factor})
        expected = eager.scores(pattern, other.windows, min_queries=16)[:, :, pos].numpy()
        np.testing.assert_allclose(dose.data["score"].sel(edit=factor).to_numpy()[0], expected, atol=5e-6)
        expected = eager.log_odds(pattern, other.windows, min_queries=16)[:, :, pos].numpy()
        measured = dose.data["log_odds"].sel(edit=factor).to_numpy()[0]
        there = expected > np.log(np.finfo(np.float32).tiny)  # below, here is a floor and there is minus infinity
        np.testing.assert_allclose(measured[there], expected[there], atol=5e-4)


@pytest.mark.parametrize(("kind", "seed"), plants("gpt_neox"))
def test_neurons_and_paths_are_what_was_planted(kind, seed):
    other, model, sinks = plant(kind, seed), loaded(kind, seed), treated(kind, seed)
    layers = {truth_of(other, token) for token in sinks.table["token_id"]}
    for layer in layers:
        rows = sinks.table[[truth_of(other, token) == layer for token in sinks.table["token_id"]]].reset_index(
            drop=True
        )
        own = sc.Sinks(rows, sinks.prompts, sinks.manifest)
        carriers = neurons(model, other.tokens, own, layer=layer, verbose=False)
        for index, token in enumerate(rows["token_id"]):
            assert carriers.named(index, 1) == [truth_of(other, token, "neuron")]
        effect = ablate_neurons(model, other.tokens, own, carriers, n=1, n_random=3, verbose=False).over_lifetime(
            "log_odds"
        )
        assert (effect.sel(edit="named") < -1.5).all()
        assert all((abs(effect.sel(edit=f"random {draw}")) < 0.3).all() for draw in range(3))
        # Heads look at the sink token itself: all of the effect goes through its own stream, as its keys.
        paths = sc.path_effects(model, other.tokens, own, layer=layer, verbose=False)
        values = paths.over_lifetime("log_odds")
        np.testing.assert_allclose(values.sel(run="residual"), values.sel(run="total"), atol=0.1)


@pytest.mark.parametrize("kind", kinds(*KINDS))
def test_controls_form_and_break_no_sink(kind):
    other, model, sinks = plant(kind, 0), loaded(kind, 0), treated(kind, 0)
    forming = sc.layer_map(model, other.tokens, sinks, verbose=False).forming()
    controlled = sc.with_controls(
        model, other.tokens, sinks, layer="forming", forming=forming, found=found(kind, 0), n_random=3, verbose=False
    )
    compared = controlled.compare().set_index("control")
    assert compared.index[compared["effect"].isna()].tolist() == [
        "same token",
        "norm matched",
    ]  # no other token is like them
    for control in ("same range", "wrong layer", "attention output"):
        assert compared.loc[control, "effect"] < -1.5 and abs(compared.loc[control, "control_effect"]) < 0.5, control

    # Written at an ordinary token the contribution makes it a sink; a random direction of its norm, or a later layer, does not.
    clean = sc.run_clean(model, other.tokens, chosen=())
    layer, sink = other.layer["early"], other.places(EARLY)[0]
    ordinary = next(p for p in range(8, 50) if int(other.tokens[p]) >= other_plants.SPECIAL)
    donor = clean.contribution[layer, sink]
    noise = torch.randn(len(donor), generator=torch.Generator().manual_seed(0))
    # Across the write: with norms of queries and keys (qwen3) the eighth of it that lay along would be stretched to a whole key.
    noise -= (noise @ donor) / (donor @ donor) * donor
    rows = {
        "written": sc.replace(layer, ordinary, donor),
        "random": sc.replace(layer, ordinary, donor.norm() * torch.nn.functional.normalize(noise, dim=0)),
    }
    run = sc.run_clean(model, other.tokens, chosen=(ordinary,))
    edited = sc.run_edited(model, run, [[edit] for edit in rows.values()])
    reads = slice(layer + 1, other.layer["eraser"])

    def log_odds(columns) -> float:
        seen = (columns.log_attention - columns.log_rest)[reads, 0, ordinary + 1 : ordinary + 30, 0]
        return float(seen.mean())

    gained = {name: log_odds(one.columns) - log_odds(run.columns) for name, one in zip(rows, edited, strict=True)}
    assert gained["written"] > 3 * max(gained["random"], 1)


@pytest.mark.parametrize("kind", kinds(*other_plants.HAS_HEADED))
def test_a_sink_that_attention_makes_has_no_forming_mlp(kind):
    """It is found, for it is in sink state; but no MLP's removal takes it away."""
    other, model, sinks = plant(kind, 0), loaded(kind, 0), found(kind, 0)
    table = sinks.table[sinks.table["token_id"] == HEADED].reset_index(drop=True)
    mapped = sc.layer_map(model, other.tokens, sc.Sinks(table, sinks.prompts, sinks.manifest), verbose=False)
    assert len(table) == 1
    assert np.nanmax(np.abs(mapped.over_lifetime("log_odds").to_numpy())) < 0.3


@pytest.mark.skipif(not HAS_HOOKED, reason="TransformerLens 4 has no HookedTransformer")
@pytest.mark.parametrize("kind", kinds("gpt2", "llama"))
def test_a_hooked_transformer_says_the_same(kind):
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained import weight_conversions

    other = plant(kind, 0)
    config = {
        "n_layers": LAYERS, "d_model": 64, "n_ctx": 128, "d_head": 16, "n_heads": 4, "d_mlp": 64, "d_vocab": 48, "init_weights": False,
        "device": "cpu", "act_fn": "gelu_new", "normalization_type": "LN", "eps": 1e-5,
    }  # fmt: skip
    if kind == "llama":
        config |= {
            "act_fn": "silu", "normalization_type": "RMS", "final_rms": True, "gated_mlp": True, "n_key_value_heads": 2, "eps": 1e-6,
            "positional_embedding_type": "rotary", "rotary_dim": 16, "rotary_base": 10**12, "original_architecture": "LlamaForCausalLM",
        }  # fmt: skip
    cfg = HookedTransformerConfig(**config)
    model = HookedTransformer(cfg, move_to_device=False)
    state = getattr(weight_conversions, f"convert_{kind}_weights")(copy.deepcopy(other.model), cfg)
    model.load_and_process_state_dict(
        state, fold_ln=False, center_writing_weights=False, center_unembed=False, fold_value_biases=False
    )
    sinks = sc.find_sinks(model, other.tokens, verbose=False)
    columns = ["pos", "l_start", "l_end", "kind"]
    assert set(sinks.table[columns].itertuples(index=False, name=None)) == other.lives
    np.testing.assert_allclose(sinks.table["score"], found(kind, 0).table["score"], atol=1e-5)
    own = sinks.select("secondary")
    mapped, again = (
        sc.layer_map(one, other.tokens, own, layers=[3, 4, 5], verbose=False) for one in (model, loaded(kind, 0))
    )
    np.testing.assert_allclose(mapped.data["log_odds"], again.data["log_odds"], atol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "gpt_neox"])
def test_the_claims_hold_where_they_were_planted(kind):
    other, model = plant(kind, 1), loaded(kind, 1)
    texts = [text(100 + seed) for seed in range(16)]
    claims = sc.test_claims(model, texts, n_random=2, verbose=False)
    verdicts = claims.verdicts.set_index("claim")["verdict"]
    assert verdicts["1"] == "supported" and verdicts["2"] == "supported", claims
    assert int((other.tokens == BOS).sum()) == 1
