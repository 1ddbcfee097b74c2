"""Geometry of sinks against the same tokens where they are no sinks: principal components, and whether they part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb, prod
from typing import ClassVar

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Bool, Float
from torch import Tensor

from sink_circuits import arguments
from sink_circuits.anatomy.mlp import mlp_of
from sink_circuits.anatomy.reading import (
    activations,
    candidates_in,
    layers_of,
    manifest_of,
    matched_controls,
    prepare,
    texts,
)
from sink_circuits.anatomy.result import Anatomy
from sink_circuits.detection import Sinks
from sink_circuits.errors import InputError
from sink_circuits.statistics import seed_of

SPACES = ("resid_post", "attn_out", "mlp_in")
N_COMPONENTS = 6
N_PERMUTATIONS = 999
TOKEN_COLUMNS = ["prompt", "pos", "token_id", "token", "is_sink", "pair"]


@dataclass(frozen=True)
class _Gathered:
    """Vectors of sinks and of their same-token non-sinks: `vectors[space, layer]` is [token, d_model], in the table's order."""

    table: pd.DataFrame
    vectors: dict[tuple[str, int], Float[Tensor, "token d_model"]]
    primary: dict[int, Float[Tensor, " d_model"]]
    unmatched: int
    path: str


def _gather(
    model, tokens, sinks: Sinks, table: pd.DataFrame, layers: Sequence[int], name: str, verbose: bool
) -> _Gathered:
    """One pass over all texts: the sinks of `table` (once per position), each with an ordinary token of its id, if there is one.

    None of `sinks` is ordinary, whether in `table` or not.
    """
    table = table.drop_duplicates(["prompt", "pos"]).reset_index(drop=True)
    first = {(row.prompt, row.pos): i for i, row in enumerate(table.itertuples())}
    frames, primary_rows = [], []
    parts: dict[tuple[str, int], list[Tensor]] = {(space, layer): [] for space in SPACES for layer in layers}
    for text in texts(model, tokens, sinks, everywhere=True, verbose=verbose):
        path = text.clean.path
        candidates = candidates_in(text, table["token_id"].tolist())
        own = table[table["prompt"] == text.name]
        positions = [*own["pos"], *candidates["pos"]]
        if not positions:
            continue
        kept = activations(model, text.ids, [f"blocks.{layer}.hook_attn_out" for layer in layers], mlp_inputs=layers)
        for layer in layers:
            here = {
                "resid_post": text.clean.resid_post(layer),
                "attn_out": kept[f"blocks.{layer}.hook_attn_out"],
                "mlp_in": kept[layer],
            }
            for space, values in here.items():
                parts[space, layer].append(values[positions].float())
        if len(own):
            primary_rows.append({layer: kept[layer][int(own["primary_pos"].iloc[0])].float() for layer in layers})
        frames.append(
            pd.concat([own[["prompt", "pos", "token_id"]].assign(is_sink=True), candidates.assign(is_sink=False)])
        )
    everything = pd.concat(frames, ignore_index=True)
    vectors = {key: torch.cat(values) for key, values in parts.items()}
    matched = matched_controls(table, everything[~everything["is_sink"].astype(bool)], name)
    at = {(r.prompt, r.pos): i for i, r in zip(everything.index, everything.itertuples(), strict=True)}
    chosen = [(at[key], True, i) for key, i in first.items()] + [(c, False, i) for i, c in enumerate(matched) if c >= 0]
    rows = everything.loc[[c for c, _, _ in chosen]].reset_index(drop=True)
    rows["pair"] = [i for _, _, i in chosen]
    rows["token"] = [table["token"].iloc[i] for i in rows["pair"]]
    index = [c for c, _, _ in chosen]
    primary = {layer: torch.stack([row[layer] for row in primary_rows]).mean(dim=0) for layer in layers}
    return _Gathered(rows[TOKEN_COLUMNS], {k: v[index] for k, v in vectors.items()}, primary, matched.count(-1), path)


@dataclass(frozen=True, repr=False)
class Pca(Anatomy):
    """Principal components of sinks plus as many same-token non-sinks, in three spaces, and the MLP's response along them.

    Spaces: "mlp_in" (the MLP's input, behind its norm), "attn_out", "resid_post", all at one layer. `coordinate` [space,
    token, component]: of the centred vectors; `explained` [space, component]: share of their variance. Components are signed so
    that sinks have the larger mean coordinate. `response_norm`, `response_cosine` [component, alpha]: norm of MLP(alpha * pc) for the
    unit components pc of "mlp_in", and its cosine with the MLP's output at the primary (mean input over texts), both
    before any norm that follows the MLP. alpha * pc takes the place of the MLP's input: no norm is applied to it and the
    inputs' mean is not added. `input_norm` [token]: norm of the inputs themselves, the scale of a realistic alpha.
    """

    kind: ClassVar[str] = "pca"
    row_axis: ClassVar[str] = "token"
    long: ClassVar[tuple[str, ...]] = ("response_norm", "response_cosine")

    def coordinates(self) -> pd.DataFrame:
        """Long format: one row per space, token and component."""
        named = self.table.rename(columns={"token": "token_text"})
        return self.data["coordinate"].to_dataframe().reset_index().join(named, on="token")


@torch.no_grad()
def pca(
    model, tokens, sinks: Sinks, *, layer="forming", forming: pd.Series | None = None, alphas: Sequence[float] | None = None,
    attention_mask=None, verbose: bool = True,
) -> Pca:  # fmt: skip
    """Principal components of MLP inputs (attention outputs, residuals) of sinks and non-sinks, and the MLP's response.

    `layer`: a number, or "forming" or "l_start": the most frequent one of the sinks, and those sinks alone. `alphas`: by default
    25 from -R to R, R the largest norm of an input. Six components, fewer where fewer vectors are given. Raises
    InputError with fewer than two sinks and non-sinks together, or alphas that are not finite.
    """
    tokens, table = prepare(model, tokens, sinks, attention_mask, verbose)
    scales = None if alphas is None else arguments.numbers(alphas, "alphas")
    if scales is not None and (not len(scales) or np.isnan(scales).any()):
        raise InputError(f"alphas = {arguments.shown(alphas)}: give finite numbers, at least one.")
    layers = layers_of(model, tokens, sinks, layer, forming, verbose)
    chosen = most_common(layers)
    own = table[[one == chosen for one in layers]]
    gathered = _gather(model, tokens, sinks, own, [chosen], "pca", verbose)
    is_sink = torch.tensor(gathered.table["is_sink"].to_numpy(dtype=bool))
    if len(is_sink) < 2 or is_sink.all():
        raise InputError(
            f"sinks of layer {chosen}: {int(is_sink.sum())}, same-token non-sinks: {int((~is_sink).sum())}; at least one of each is "
            "needed: give more or longer prompts."
        )
    found = {space: principal_components(gathered.vectors[space, chosen], is_sink) for space in SPACES}
    n = min(len(explained) for _, _, explained in found.values())
    inputs = gathered.vectors["mlp_in", chosen]
    reach = float(inputs.norm(dim=-1).max())
    alpha = np.linspace(-reach, reach, 25) if scales is None else scales
    norms, cosines = mlp_response(mlp_of(model, chosen), found["mlp_in"][0][:n], alpha, gathered.primary[chosen])
    data = xr.Dataset(
        {
            "coordinate": (("space", "token", "component"), np.stack([c[:, :n] for _, c, _ in found.values()])),
            "explained": (("space", "component"), np.stack([e[:n] for _, _, e in found.values()])),
            "response_norm": (("component", "alpha"), norms), "response_cosine": (("component", "alpha"), cosines),
            "input_norm": ("token", inputs.norm(dim=-1).cpu().numpy()),
        },
        coords={"space": list(SPACES), "token": np.arange(len(is_sink)), "component": np.arange(1, n + 1), "alpha": alpha},
    )  # fmt: skip
    manifest = manifest_of(
        model, tokens, sinks, what="pca", path=gathered.path, layer=chosen, n_sinks=int(is_sink.sum()),
        n_other_layers=len(table) - len(own), n_unmatched=gathered.unmatched,
    )  # fmt: skip
    return Pca(data, gathered.table, manifest)


def most_common(layers: Sequence[int]) -> int:
    """The most frequent layer, the earliest of equals."""
    return min(set(layers), key=lambda layer: (-list(layers).count(layer), layer))


def principal_components(
    x: Float[Tensor, "token d_model"], is_sink: Bool[Tensor, " token"]
) -> tuple[Tensor, np.ndarray, np.ndarray]:
    """(components [component, d_model], coordinates [token, component], explained share [component]), at most six.

    Of the centred rows, by singular value decomposition in float64; components beyond the rank are left out.
    """
    centred = (x - x.mean(dim=0)).double().cpu()
    _, size, rows = torch.linalg.svd(centred, full_matrices=False)
    total = size.square().sum().clamp(min=torch.finfo(torch.float64).tiny)
    n = max(1, min(N_COMPONENTS, int((size > 1e-6 * size[0].clamp(min=1e-300)).sum())))
    coordinates = centred @ rows[:n].T
    sign = torch.where(coordinates[is_sink].mean(dim=0) < coordinates[~is_sink].mean(dim=0), -1.0, 1.0).double()
    return (rows[:n] * sign[:, None]).to(x), (coordinates * sign).numpy(), (size[:n].square() / total).numpy()


def mlp_response(
    mlp, components: Tensor, alpha: np.ndarray, primary: Float[Tensor, " d_model"]
) -> tuple[np.ndarray, np.ndarray]:
    """Norm of MLP(alpha * pc) and its cosine with MLP(primary's input), both [component, alpha]; NaN where the norm is 0."""
    scales = torch.as_tensor(alpha).to(components)
    inputs = (scales[None, :, None] * components[:, None]).reshape(-1, components.shape[-1])
    dtype = next(mlp.module.parameters()).dtype
    out = mlp.output(inputs.to(dtype)).float().reshape(len(components), len(alpha), -1)
    target = mlp.output(primary[None].to(dtype)).float()[0]
    norm = out.norm(dim=-1)
    cosine = torch.nn.functional.cosine_similarity(out, target, dim=-1).where(norm > 0, torch.nan)
    return norm.cpu().numpy(), cosine.cpu().numpy()


# Clustering.


@dataclass(frozen=True, repr=False)
class Clustering(Anatomy):
    """Do sinks stand apart from the same tokens where they are no sinks, and from which layer on?

    `embedding` [space, layer, token, axis]: the first two principal components; `silhouette` [space, layer]: mean silhouette
    (Rousseeuw, 1987) of the two groups by Euclidean distance in the whole space, in -1..1, 0 where they do not part; `p`:
    share of permutations of the labels, each within one token id, that reach it; `smallest_p`: what the number of
    tokens allows.
    """

    kind: ClassVar[str] = "clustering"
    row_axis: ClassVar[str] = "token"
    long: ClassVar[tuple[str, ...]] = ("silhouette", "p", "smallest_p")


@torch.no_grad()
def clustering(
    model, tokens, sinks: Sinks, *, layers: Sequence[int] | None = None, attention_mask=None, verbose: bool = True
) -> Clustering:  # fmt: skip
    """Sinks and as many same-token non-sinks in residual stream, attention output and MLP input, around creation.

    `layers`: by default the most frequent l_start, the layer before it and the one after. Sinks without a same-token non-sink are left
    out (the manifest counts them): where token and state go together, nothing can be told apart. The
    permutation takes tokens for independent, also those of one prompt. Raises InputError with fewer than two pairs.
    """
    tokens, table = prepare(model, tokens, sinks, attention_mask, verbose)
    n_layers = model.cfg.n_layers
    middle = most_common(table["l_start"].astype(int).tolist())
    around = [one for one in (middle - 1, middle, middle + 1) if 0 <= one < n_layers]
    layers = around if layers is None else list(arguments.several(layers, "layers"))
    layers = [arguments.whole(one, "layer", high=n_layers - 1) for one in layers]
    if not layers or len(set(layers)) < len(layers):
        raise InputError(f"layers {layers}: name each once, and at least one.")
    gathered = _gather(model, tokens, sinks, table, layers, "clustering", verbose)
    counts = gathered.table["pair"].value_counts()
    paired = gathered.table["pair"].map(counts).to_numpy() == 2
    if paired.sum() < 4:
        raise InputError(
            f"sinks with a same-token non-sink: {int(paired.sum()) // 2}, at least 2 are needed: give more or longer prompts."
        )
    rows = gathered.table[paired].reset_index(drop=True)
    is_sink, token_id = rows["is_sink"].to_numpy(dtype=bool), rows["token_id"].to_numpy()
    shape = (len(SPACES), len(layers))
    embedding = np.zeros((*shape, len(rows), 2))
    silhouettes, p = np.zeros(shape), np.zeros(shape)
    for i, space in enumerate(SPACES):
        for j, layer in enumerate(layers):
            x = gathered.vectors[space, layer][torch.tensor(paired)]
            _, coordinates, _ = principal_components(x, torch.tensor(is_sink))
            embedding[i, j, :, : min(2, coordinates.shape[1])] = coordinates[:, :2]
            silhouettes[i, j], p[i, j] = separation(
                x.double().cpu().numpy(), is_sink, token_id, name=f"{space}/{layer}"
            )
    floor = np.full(shape, smallest_separation_p(is_sink, token_id))
    data = xr.Dataset(
        {
            "embedding": (("space", "layer", "token", "axis"), embedding), "silhouette": (("space", "layer"), silhouettes),
            "p": (("space", "layer"), p), "smallest_p": (("space", "layer"), floor),
        },
        coords={"space": list(SPACES), "layer": layers, "token": np.arange(len(rows)), "axis": [1, 2]},
    )  # fmt: skip
    manifest = manifest_of(
        model, tokens, sinks, what="clustering", path=gathered.path, n_unmatched=gathered.unmatched, l_start=middle
    )
    return Clustering(data, rows, manifest)


def silhouette(distance: Float[np.ndarray, "token token"], labels: Bool[np.ndarray, " token"]) -> float:
    """Mean over tokens of (b - a) / max(a, b): a, b the mean distance to the own and to the other group (Rousseeuw, 1987).

    A token that is alone in its group counts 0, as one whose distances are all 0.
    """
    same = labels[:, None] == labels[None]
    np.fill_diagonal(same, False)
    n_same, n_other = same.sum(axis=1), (labels[:, None] != labels[None]).sum(axis=1)
    a = (distance * same).sum(axis=1) / np.maximum(n_same, 1)
    b = (distance * (labels[:, None] != labels[None])).sum(axis=1) / np.maximum(n_other, 1)
    largest = np.maximum(a, b)
    values = np.where((n_same > 0) & (n_other > 0) & (largest > 0), (b - a) / np.where(largest > 0, largest, 1), 0.0)
    return float(values.mean())


def separation(
    x: Float[np.ndarray, "token d_model"], is_sink: np.ndarray, token_id: np.ndarray, *, name: str
) -> tuple[float, float]:
    """(silhouette, p): labels permuted within each token id, the observed order counted too; drawn by `name`."""
    square = (x**2).sum(axis=1)
    distance = np.sqrt(np.maximum(square[:, None] + square[None] - 2 * x @ x.T, 0.0))
    np.fill_diagonal(distance, 0.0)
    observed = silhouette(distance, is_sink)
    rng = np.random.default_rng(seed_of("separation", name))
    groups = [np.flatnonzero(token_id == one) for one in np.unique(token_id)]
    reached = 0
    for _ in range(N_PERMUTATIONS):
        labels = is_sink.copy()
        for group in groups:
            labels[group] = rng.permutation(labels[group])
        reached += silhouette(distance, labels) >= observed - 1e-12
    return observed, (1 + reached) / (1 + N_PERMUTATIONS)


def smallest_separation_p(is_sink: np.ndarray, token_id: np.ndarray) -> float:
    """No p can be smaller: two of the distinct arrangements (labels exchanged in all groups are the same partition) reach any."""
    sizes = [(int((token_id == one).sum()), int(is_sink[token_id == one].sum())) for one in np.unique(token_id)]
    mirrored = all(2 * k == n for n, k in sizes)
    arrangements = prod(comb(n, k) for n, k in sizes)
    return max((1 + mirrored) / arrangements, 1 / (1 + N_PERMUTATIONS))
