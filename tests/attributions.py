"""What the tests of gradients, attribution and agreement share: a random Llama in float64, and the planted sink attributed."""

from __future__ import annotations

import functools

import eager
import numpy as np
import pandas as pd
import torch
from common import in_transformer_lens, lens, prompt

import sink_circuits as sc
from sink_circuits.adapters import adapt
from sink_circuits.attribution import Attribution, attribute
from sink_circuits.results import Manifest

N, POS = 48, 17  # of the random texts


@functools.cache
def random_llama():
    """A random Llama of four layers in float64."""
    return eager.tiny("llama").double()


@functools.cache
def wrapped(backend: str):
    return in_transformer_lens(random_llama(), backend)


def sinks_at(model, tokens: torch.Tensor, *places: tuple[int, int, int]) -> sc.Sinks:
    """(position, l_start, l_end) as a table of sinks, whether they are sinks or not."""
    rows = [
        {"prompt": "prompt-0", "pos": pos, "token_id": int(tokens[pos]), "token": "", "kind": "secondary", "l_start": start, "l_end": end,
         "lifetime": end - start + 1, "phase_start": 0, "primary_pos": 0, "cosine": 1.0, "norm": 1.0, "norm_ratio": 1.0,
         "score": np.nan, "score_ordinary": np.nan, "score_ratio": np.nan}
        for pos, start, end in places
    ]  # fmt: skip
    manifest = Manifest.of(adapt(model), sc.Tokens((tokens,), ("prompt-0",)), what="find_sinks:robust", path="fast")
    return sc.Sinks(pd.DataFrame(rows), ("prompt-0",), manifest)


def slope(f, h: float = 1e-2) -> float:
    """Derivative of f at 0: central differences of fourth order."""
    return (8 * (f(h) - f(-h)) - (f(2 * h) - f(-2 * h))) / (12 * h)


@functools.cache
def found(*without: str):
    """(model, text, the secondary sink, its layer map) of the planted circuit."""
    model = lens("bridge", *without)
    sinks = sc.find_sinks(model, prompt(), verbose=False).select("secondary")
    return model, prompt(), sinks, sc.layer_map(model, prompt(), sinks, layers=range(1, 14), verbose=False)


@functools.cache
def planted(method: str, *without: str) -> Attribution:
    model, text, sinks, exact = found(*without)
    return attribute(model, text, sinks, exact=exact, method=method, n_steps=8, verbose=False)
