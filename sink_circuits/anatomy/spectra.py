"""Matrix entropy of the hidden states: how many directions a text's tokens use, as more and more of them are seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from sink_circuits import arguments
from sink_circuits.adapters import adapt
from sink_circuits.anatomy.reading import manifest_of, prepare, texts
from sink_circuits.anatomy.result import Anatomy
from sink_circuits.detection import Sinks
from sink_circuits.errors import InputError
from sink_circuits.experiments import resolve_layers
from sink_circuits.prompts import as_tokens

N_STEPS = 12
"""Numbers of tokens at which the entropy is taken, unless told."""
GROUPS = ("all tokens", "without sinks")


@dataclass(frozen=True, repr=False)
class MatrixEntropy(Anatomy):
    """`entropy` [prompt, group, layer, seen] in nats: of the first `seen` tokens' resid_post, all or without sinks.

    -sum p log p over the eigenvalues p of the Gram matrix divided by its trace: 0 where all tokens lie on one line, at
    most log(min(seen, d_model)); NaN past a text's end. Not centred and not normalised: a massive activation counts as
    it is, which "without sinks" shows by leaving out every token that is ever in sink state.
    """

    kind: ClassVar[str] = "matrix_entropy"
    row_axis: ClassVar[str] = "prompt"
    long: ClassVar[tuple[str, ...]] = ("entropy",)


@torch.no_grad()
def matrix_entropy(
    model, tokens, sinks: Sinks, *, layers: Sequence[int] | None = None, seen: Sequence[int] | None = None, attention_mask=None,
    verbose: bool = True,
) -> MatrixEntropy:  # fmt: skip
    """Matrix-based (von Neumann) entropy of hidden states by layer and tokens seen (Giraldo et al., 1211.2459; Skean et al., 2502.02013).

    `layers`: all by default. `seen`: numbers of tokens, by default 12 spread evenly on a log scale up to the longest
    text. Raises InputError for a number below 1 or a layer out of range.
    """
    arguments.flag(verbose, "verbose")
    adapt(model)  # refuses what is no model
    tokens = as_tokens(model, tokens, attention_mask)
    if len(arguments.instance(sinks, "sinks", Sinks, "pass what find_sinks returns")):
        prepare(model, tokens, sinks)
    layers = list(range(model.cfg.n_layers)) if layers is None else list(arguments.several(layers, "layers"))
    resolve_layers(model, None, tuple(layers))
    layers = [int(layer) for layer in layers]
    longest = max(len(ids) for ids in tokens)
    seen = (
        sorted({int(x) for x in np.geomspace(min(4, longest), longest, N_STEPS).round()})
        if seen is None
        else [arguments.whole(one, "seen", low=1) for one in arguments.several(seen, "seen")]
    )
    if len(set(seen)) < len(seen):
        raise InputError(f"seen = {seen}: numbers of tokens, at least 1, each once.")
    values = np.full((len(tokens), len(GROUPS), len(layers), len(seen)), np.nan)
    for index, text in enumerate(texts(model, tokens, sinks, everywhere=True, verbose=verbose)):
        for i, layer in enumerate(layers):
            resid = text.clean.resid_post(layer).double().cpu()
            for j, count in enumerate(seen):
                if count <= len(text.ids):
                    values[index, 0, i, j] = spectral_entropy(resid[:count])
                    values[index, 1, i, j] = spectral_entropy(resid[:count][~text.sink[:count]])
        path = text.clean.path
    data = xr.Dataset(
        {"entropy": (("prompt", "group", "layer", "seen"), values)},
        coords={"prompt": np.arange(len(tokens)), "group": list(GROUPS), "layer": layers, "seen": seen},
    )
    manifest = manifest_of(model, tokens, sinks, what="matrix_entropy", path=path)
    table = pd.DataFrame({"name": list(tokens.names), "n_tokens": [len(ids) for ids in tokens]})
    return MatrixEntropy(data, table, manifest)


def spectral_entropy(x: Float[Tensor, "token d_model"]) -> float:
    """-sum p log p in nats, p the eigenvalues of x x^T over their sum; NaN without tokens or where all are 0."""
    if not len(x):
        return float("nan")
    gram = x @ x.T if len(x) <= x.shape[1] else x.T @ x
    size = torch.linalg.eigvalsh(gram).clamp(min=0)
    if not size.sum() > 0:
        return float("nan")
    p = size / size.sum()
    return float(-torch.special.xlogy(p, p).sum())
