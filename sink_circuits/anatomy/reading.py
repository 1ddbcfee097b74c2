"""What the anatomy reads from a model: clean runs with their ordinary tokens, activations at hooks, same-token controls.

An ordinary token is one that is in sink state in no layer, is not among the sinks given, and does not stand among the
first `SKIP_FIRST` positions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from sink_circuits import arguments
from sink_circuits.adapters import adapt, backend_of
from sink_circuits.clean_runs import CleanRun, run_clean
from sink_circuits.detection import Sinks, Thresholds, find_primary, geometry_of
from sink_circuits.errors import InputError, ModelError
from sink_circuits.experiments import layer_map, resolve_layers
from sink_circuits.load_checks import TOLERANCES, relative_error
from sink_circuits.measurement import check_sinks
from sink_circuits.prompts import Tokens, as_tokens
from sink_circuits.results import Manifest
from sink_circuits.statistics import seed_of

SKIP_FIRST = 4
"""Positions at the start of a text that are never ordinary: the primary and its candidates."""


@dataclass(frozen=True)
class Text:
    """One prompt: its clean run, which tokens are sinks (of those given, or by state), and its rows of the sink table."""

    name: str
    ids: Int[Tensor, " pos"]
    clean: CleanRun
    sink: Bool[Tensor, " pos"]
    rows: list[int]

    @property
    def ordinary(self) -> Bool[Tensor, " pos"]:
        return ~self.sink & (torch.arange(len(self.sink)) >= SKIP_FIRST)


def prepare(model, tokens, sinks: Sinks, attention_mask=None, verbose: bool = True) -> tuple[Tokens, pd.DataFrame]:
    """Tokens and the table of sinks (index 0..n-1), checked against each other. Raises InputError."""
    arguments.flag(verbose, "verbose")
    adapt(model)  # refuses what is no model
    tokens = as_tokens(model, tokens, attention_mask)
    return tokens, check_sinks(sinks, tokens, model.cfg.n_layers)


def texts(
    model, tokens: Tokens, sinks: Sinks, *, everywhere: bool = False, path: str = "auto", verbose: bool = True
) -> Iterator[Text]:  # fmt: skip
    """The prompts that hold sinks, one after the other (`everywhere`: the others too, for their ordinary tokens)."""
    table = sinks.table.reset_index(drop=True)
    wanted = [i for i, name in enumerate(tokens.names) if everywhere or (table["prompt"] == name).any()]
    for index in tqdm(wanted, desc="anatomy", unit="prompt", disable=not verbose or len(wanted) < 2):
        name, ids = tokens.names[index], tokens.ids[index]
        clean = run_clean(model, ids, path=path)
        rows = np.flatnonzero(table["prompt"] == name).tolist()
        sink = ever_in_sink_state(clean, thresholds_of(sinks))
        sink[table["pos"].iloc[rows].tolist()] = True
        yield Text(name, ids, clean, sink, rows)


def thresholds_of(sinks: Sinks) -> Thresholds:
    """The thresholds that these sinks were found with (the defaults, where the manifest has none)."""
    given = dict(sinks.manifest.settings.get("thresholds", {}))
    if given.get("first_positions"):
        given["first_positions"] = tuple(given["first_positions"])
    return Thresholds(**{k: v for k, v in given.items() if k in Thresholds.__dataclass_fields__})


def ever_in_sink_state(clean: CleanRun, thresholds: Thresholds) -> Bool[Tensor, " pos"]:
    """Tokens that are in sink state (centred cosine and norm ratio above the thresholds) in some layer."""
    ratio = geometry_of(clean, 0).norm_ratio
    primary = find_primary(ratio, thresholds)
    if primary is None:
        return torch.zeros(clean.n_positions, dtype=torch.bool)
    geometry = geometry_of(clean, primary)
    state = (geometry.cosine > thresholds.cosine) & (geometry.norm_ratio > thresholds.norm_ratio)
    return (state & state[:, primary : primary + 1]).any(dim=0).cpu()


def manifest_of(model, tokens: Tokens, sinks: Sinks, *, what: str, path: str = "auto", **settings) -> Manifest:
    return Manifest.of(adapt(model), tokens, what=what, path=path, found=dict(sinks.manifest.settings), **settings)


def layers_of(model, tokens, sinks: Sinks, layer, forming: pd.Series | None, verbose: bool) -> list[int]:
    """Each sink's MLP: `layer` a number for all, "l_start", or "forming" (by a layer map unless `forming` is given).

    Raises InputError for an unknown word or a layer out of range.
    """
    table = sinks.table.reset_index(drop=True)
    if isinstance(layer, str) and layer == "l_start" and forming is None:
        return table["l_start"].astype(int).tolist()
    if isinstance(layer, str) and layer == "forming" and forming is None:
        forming = layer_map(
            model, tokens, sinks, layers=range(int(table["l_end"].max()) + 1), verbose=verbose
        ).forming()
    own = resolve_layers(model, layer, None, forming)
    if forming is not None and len(forming) != len(table):
        raise InputError(f"forming holds {len(forming)} layers for {len(table)} sinks: map the sinks that are treated.")
    return [own(row)[0] for _, row in table.iterrows()]


@torch.no_grad()
def activations(
    model, ids: Int[Tensor, " pos"], names: Iterable[str] = (), mlp_inputs: Iterable[int] = (), optional: Iterable[str] = ()
) -> dict:  # fmt: skip
    """What stands at these hooks in one text's clean run, without the batch axis; one forward pass by TransformerLens.

    `mlp_inputs`: layers whose MLP's input (behind its norm) is wanted, under the layer's number. Names in `optional`
    may be missing in the model or never fire; for others ModelError says so.
    """
    there, mlp_inputs = model.hook_dict, sorted(set(mlp_inputs))
    names, optional = list(dict.fromkeys(names)), [name for name in optional if name in there]
    if unknown := [name for name in names if name not in there]:
        raise ModelError(f"{unknown[0]} is not a hook of this model: this part of the anatomy cannot be read from it.")
    inputs: dict[int, Tensor] = {}

    def keep(layer: int):
        return lambda module, args, kwargs: inputs.update({layer: (*args, *kwargs.values())[0][0].clone()})

    wanted = {*names, *optional}
    last = max([int(name.split(".")[1]) for name in wanted if name.startswith("blocks.")] + mlp_inputs, default=0)
    # HookedTransformer has no hook between the norm and the MLP: the module's own input serves both backends.
    handles = [model.blocks[layer].mlp.register_forward_pre_hook(keep(layer), with_kwargs=True) for layer in mlp_inputs]
    try:
        _, cache = model.run_with_cache(ids[None], names_filter=lambda name: name in wanted, stop_at_layer=last + 1)
    finally:
        for handle in handles:
            handle.remove()
    kept = inputs | {name: cache[name][0] for name in wanted if name in cache}
    if missing := [name for name in (*names, *mlp_inputs) if name not in kept]:
        where = f"the MLP of layer {missing[0]}" if isinstance(missing[0], int) else missing[0]
        raise ModelError(
            f"{where} did not run in a forward pass: this part of the anatomy cannot be read from this model."
        )
    return kept


def queries_or_keys(kept: dict, layer: int, letter: str) -> Tensor:
    """Queries ("q") or keys ("k") of one layer, [pos, head, d_head], behind any norm that a hook shows, before rotation.

    From what stands at `hook_q` (`hook_k`) and, where it fires, at `hook_q_normed`, whose axes differ between architectures.
    """
    plain = kept[f"blocks.{layer}.attn.hook_{letter}"]
    normed = kept.get(f"blocks.{layer}.attn.hook_{letter}_normed")
    if normed is None:
        return plain
    if normed.ndim == 3 and normed.shape != plain.shape:
        normed = normed.transpose(0, 1)
    return normed.reshape(plain.shape)


def norms_behind(model, part: str, layers: Sequence[int]) -> list:
    """By layer the norm between attention or MLP (`part` "attn" or "mlp") and the residual stream, or None.

    Gemma 2 and 3 and OLMo 2 have one.
    """
    blocks = [model.blocks[layer] for layer in layers]
    if backend_of(model) == "hooked":
        number = "1" if part == "attn" else "2"
        post_only = str(getattr(model.cfg, "original_architecture", "")).startswith(("Olmo2", "Olmo3"))
        only = [getattr(block, f"ln{number}") if post_only else None for block in blocks]
        return [getattr(block, f"ln{number}_post", None) or one for block, one in zip(blocks, only, strict=True)]
    points = model.hook_dict  # TransformerLens 3.9 makes it anew each time
    places = [(points[f"blocks.{layer}.hook_{part}_out"].name or "").split(".") for layer in layers]
    return [
        getattr(block, place[2]) if len(place) > 3 and place[2].startswith("ln") else None
        for block, place in zip(blocks, places, strict=True)
    ]


@torch.no_grad()
def linear_gains(norm, x: Float[Tensor, "pos d_model"]) -> tuple[Float[Tensor, "pos 1"], Float[Tensor, " d_model"]]:
    """(scale, g) with norm(x) = scale * g * x: what the norm multiplies by, its scale held at what it is.

    So a sum that stands before the norm can be taken apart behind it; without a norm (None) both are 1. RMS norms only:
    scale = 1 / rms(x). Raises ModelError for a norm that centres or adds a bias.
    """
    if norm is None:
        return torch.ones_like(x[:, :1]), torch.ones_like(x[0])
    per_coordinate = norm(torch.ones_like(x[:1]))[0]  # g, up to a common factor
    scaled, out = per_coordinate * x, norm(x)
    size = scaled.square().sum(dim=-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
    scale = (scaled * out).sum(dim=-1, keepdim=True) / size
    check_equal(scale * scaled, out, "a norm behind attention or MLP is not a product with its scale", x.dtype)
    return scale, per_coordinate


def check_equal(found: Tensor, expected: Tensor, what: str, dtype: torch.dtype, largest: float = 0.0) -> float:
    """The largest error relative to the largest expected value, or to `largest` where that is more; ModelError when it is
    above the dtype's tolerance."""
    limit = TOLERANCES.get(dtype, 2e-4)
    error, size = relative_error(found, expected), expected.abs().max().item()
    if largest > size:
        error *= size / largest
    if error > limit:
        raise ModelError(
            f"{what} (error {error:.2g}, at most {limit:.2g} is accepted): this part of the anatomy is not known for this architecture."
        )
    return error


# Same-token controls.


def matched_controls(table: pd.DataFrame, candidates: pd.DataFrame, name: str) -> list[int]:
    """For each sink the index of a candidate with the same token id, -1 where none is left; each is taken once.

    Candidates (columns prompt, pos, token_id) are drawn by `name`, those of the sink's own prompt first. A position that is
    a sink twice gets the same control.
    """
    taken: set[int] = set()
    chosen: dict[tuple, int] = {}
    for prompt, pos, token in zip(table["prompt"], table["pos"], table["token_id"], strict=True):
        if (prompt, pos) in chosen:
            continue
        free = candidates.index[candidates["token_id"] == token].difference(list(taken))

        def order(i: int, prompt=prompt, pos=pos):
            at = candidates.loc[i]
            return at["prompt"] != prompt, seed_of("control", name, prompt, pos, at["prompt"], at["pos"])

        chosen[prompt, pos] = min(free, key=order, default=-1)
        taken.add(chosen[prompt, pos])
    return [chosen[prompt, pos] for prompt, pos in zip(table["prompt"], table["pos"], strict=True)]


def candidates_in(text: Text, token_ids: Sequence[int]) -> pd.DataFrame:
    """The ordinary tokens of one text whose id is among `token_ids`."""
    same = torch.isin(text.ids.cpu(), torch.as_tensor(sorted(set(token_ids)), dtype=torch.long))
    positions = (text.ordinary & same).nonzero().flatten().tolist()
    ids = [int(text.ids[position]) for position in positions]
    return pd.DataFrame({"prompt": [text.name] * len(positions), "pos": positions, "token_id": ids})
