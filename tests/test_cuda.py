"""On a CUDA device every instrument tells what it tells on the CPU. Skipped where there is none."""

from __future__ import annotations

import functools

import numpy as np
import pandas as pd
import pytest
import test_architectures as architectures
import torch
import xarray as xr
from anatomies import repeated_tokens
from common import BACKENDS, lens, prompt, sizes, subject
from planted_sweep import study
from test_generation import PROMPTS, words

import sink_circuits as sc
from sink_circuits import anatomy
from sink_circuits.adapters import adapt
from sink_circuits.attention import AttentionForm, streamed_attention
from sink_circuits.token_scores import token_scores

DEVICE = "cuda"
QUIET = {"verbose": False}
TEXTS = sc.Tokens((prompt(), prompt((30, 55), 96, "b")), ("a", "b"))

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)


@functools.cache
def model_on(device: str, backend: str):
    return lens(backend) if device == "cpu" else getattr(subject(), backend)().to(device)


@functools.cache
def sinks_on(device: str, backend: str) -> tuple[sc.Sinks, sc.Sinks]:
    found = sc.find_sinks(model_on(device, backend), TEXTS, **QUIET)
    return found, found.select("secondary")


def repeated() -> tuple[list, sc.Sinks]:
    texts, sinks = repeated_tokens()
    return list(texts.values()), sinks


def neurons_ablated(model, found, sinks):
    return anatomy.ablate_neurons(
        model, TEXTS, sinks, anatomy.neurons(model, TEXTS, sinks, layer=6, **QUIET), n=1, n_random=2, **QUIET
    )


INSTRUMENTS = {
    "found": lambda model, found, sinks: found,
    "found, official": lambda model, found, sinks: sc.find_sinks(model, TEXTS, method="official", **QUIET),
    "sink scores": lambda model, found, sinks: sc.sink_scores(model, TEXTS),
    "token scores": lambda model, found, sinks: token_scores(model, TEXTS),
    "layer map": lambda model, found, sinks: sc.layer_map(model, TEXTS, sinks, layers=[2, 6], loss=True, **QUIET),
    "dose-response": lambda model, found, sinks: sc.dose_response(
        model, TEXTS, sinks, layer=6, factors=[0, 0.5, 1, 2], kl=True, **QUIET
    ),
    "ablation": lambda model, found, sinks: sc.ablate(model, TEXTS, sinks, layers=[6, 7], **QUIET),
    "norm and direction": lambda model, found, sinks: sc.norm_and_direction(
        model, TEXTS, sinks, layers=[6, 7], found=found, **QUIET
    ),
    "sufficiency": lambda model, found, sinks: sc.sufficiency(
        model, TEXTS, sinks, layers=[6, 7], found=found, n_random=2, **QUIET
    ),
    "controls": lambda model, found, sinks: sc.with_controls(
        model, TEXTS, sinks, layer=6, found=found, n_random=2, **QUIET
    ),
    "attribution": lambda model, found, sinks: sc.attribute(model, TEXTS, sinks, targets=("contributions",), **QUIET),
    "paths": lambda model, found, sinks: sc.path_effects(model, TEXTS, sinks, layer=6, **QUIET),
    "mass": lambda model, found, sinks: sc.mass_account(model, TEXTS, sinks, layers=[6, 7], found=found, **QUIET),
    "writers": lambda model, found, sinks: anatomy.writers(model, TEXTS, found, **QUIET),
    "neurons": lambda model, found, sinks: anatomy.neurons(model, TEXTS, sinks, layer=6, **QUIET),
    "neurons ablated": neurons_ablated,
    "key and query geometry": lambda model, found, sinks: anatomy.key_query_geometry(model, TEXTS, sinks, **QUIET),
    "attention patterns": lambda model, found, sinks: anatomy.attention_patterns(model, TEXTS, sinks, **QUIET),
    "MLP stages": lambda model, found, sinks: anatomy.mlp_stages(model, TEXTS, sinks, layer=6, **QUIET),
    "norms by layer": lambda model, found, sinks: anatomy.norms_by_layer(model, TEXTS, found, **QUIET),
    "matrix entropy": lambda model, found, sinks: anatomy.matrix_entropy(model, TEXTS, found, **QUIET),
    "principal components": lambda model, found, sinks: anatomy.pca(model, *repeated(), layer=6, **QUIET),
    "clustering": lambda model, found, sinks: anatomy.clustering(model, *repeated(), **QUIET),
    "score by lifetime": lambda model, found, sinks: anatomy.score_by_lifetime(model, TEXTS, sinks, **QUIET),
}


def assert_same(own, expected, limit: float = 2e-3) -> None:
    """Numbers to `limit` of their size, everything else to the letter."""
    assert type(own) is type(expected)
    if isinstance(own, sc.SinkScores):
        for one, other in zip(own.scores, expected.scores, strict=True):
            torch.testing.assert_close(one.cpu(), other, rtol=limit, atol=limit, equal_nan=True)
        return
    assert (own.manifest.device == "cpu", expected.manifest.device) == (DEVICE == "cpu", "cpu")
    for name, value in vars(expected).items():
        other = getattr(own, name)
        if isinstance(value, pd.DataFrame):
            pd.testing.assert_frame_equal(other, value, rtol=limit, atol=limit)
        elif isinstance(value, xr.Dataset):
            assert set(other.variables) == set(value.variables)
            for key, variable in value.variables.items():
                if variable.dtype.kind in "OUSTb":
                    assert (other[key].values == variable.values).all(), key
                else:
                    np.testing.assert_allclose(other[key].values, variable.values, rtol=limit, atol=limit, err_msg=key)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", INSTRUMENTS)
def test_an_instrument_tells_what_it_tells_on_the_cpu(name, backend):
    own, expected = (
        INSTRUMENTS[name](model_on(device, backend), *sinks_on(device, backend)) for device in (DEVICE, "cpu")
    )
    assert_same(own, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("chosen", [None, (0, 5, 30)])
@pytest.mark.parametrize("sums", [True, False])
def test_streamed_attention_is_that_of_the_cpu(dtype, window, softcap, learned, chosen, sums):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, heads, n, 8, generator=generator).to(dtype) for heads, n in ((4, 37), (2, 41), (2, 41))
    )
    logits = torch.randn(4, generator=generator) if learned else None
    keys = None if chosen is None else torch.tensor(chosen)

    def on(device):
        form = AttentionForm(8**-0.5, window, softcap, None if logits is None else logits.to(device))
        moved = (x.to(device) for x in (query, key, value))
        return streamed_attention(*moved, form, chosen=None if keys is None else keys.to(device), sums=sums)

    (own, own_sums), (expected, sums_expected) = on(DEVICE), on("cpu")
    torch.testing.assert_close(own.cpu(), expected, atol=1e-5 if dtype == torch.float32 else 1e-2, rtol=1e-4)
    for name, whole in vars(sums_expected).items():
        found = getattr(own_sums, name)
        assert (found is None) == (whole is None)
        if whole is not None:
            assert found.device.type == DEVICE
            torch.testing.assert_close(found.cpu(), whole, atol=1e-5, rtol=1e-4)


def test_a_long_text_is_that_of_the_cpu():
    """Several blocks of queries on both, beyond the flash kernel's bound on the CPU."""
    generator = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(1, heads, 3000, 16, generator=generator) for heads in (6, 2, 2))
    for sums in (True, False):
        with sizes(GPU_BLOCK_FLOATS=1 << 20):
            outs = [
                streamed_attention(
                    *(x.to(device) for x in (query, key, value)), AttentionForm(0.25), chosen=torch.tensor([2, 1500]), sums=sums
                )
                for device in (DEVICE, "cpu")
            ]  # fmt: skip
        torch.testing.assert_close(outs[0][0].cpu(), outs[1][0], atol=1e-5, rtol=1e-4)
        for name in ("later", "diagonal", "log_attention", "log_rest"):
            own, whole = (getattr(out[1], name) for out in outs)
            if whole is not None:
                torch.testing.assert_close(own.cpu(), whole, atol=2e-4, rtol=1e-4)


def test_greedy_answers_are_those_of_the_cpu():
    llama = architectures.build("llama")[0]
    own, expected = (
        sc.generate(sc.load_model(llama, tokenizer=words(), device=device, **QUIET), PROMPTS, decoding=sc.Decoding(6), **QUIET)
        for device in (DEVICE, "cpu")
    )  # fmt: skip
    assert [p.output for p in own] == [p.output for p in expected]
    assert all(p.output for p in own)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_random_model_has_the_weights_that_it_has_on_the_cpu(backend):
    state = torch.cuda.get_rng_state()
    own = sc.controls.randomly_initialised(model_on(DEVICE, backend))
    assert torch.equal(torch.cuda.get_rng_state(), state)
    for one, other in zip(own.parameters(), sc.controls.randomly_initialised(lens(backend)).parameters(), strict=True):
        assert one.device.type == DEVICE
        assert torch.equal(one.cpu(), other)


def test_a_sweep_on_the_device_is_that_of_the_cpu(tmp_path):
    cpu = sc.sweep(study(), tmp_path / "cpu", **QUIET)
    cuda = sc.sweep(study(device=DEVICE), tmp_path / "cuda", **QUIET)
    assert len(cpu.table) == len(cuda.table) > 0
    numbers = cpu.table.select_dtypes("float").columns
    np.testing.assert_allclose(cuda.table[numbers], cpu.table[numbers], rtol=2e-3, atol=2e-3)


def test_the_two_paths_agree_there():
    model = model_on(DEVICE, "bridge")
    assert adapt(model).device.type == DEVICE
    sinks = sinks_on(DEVICE, "bridge")[1]
    own, expected = (sc.ablate(model, TEXTS, sinks, layers=[6], path=path, **QUIET) for path in ("fast", "reference"))
    assert (own.manifest.path, expected.manifest.path) == ("fast", "reference")
    np.testing.assert_allclose(own.data["score"].values, expected.data["score"].values, atol=2e-5, rtol=1e-3)
