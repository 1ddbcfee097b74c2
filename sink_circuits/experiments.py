"""Experiments with names: layer map, ablation, dose-response, each a list of labelled edits per sink that `measure` runs.

They come back as an `Effect`: named-axis arrays of the clean and the edited outcome, the sinks they belong to, and a manifest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from sink_circuits import arguments
from sink_circuits.adapters import adapt
from sink_circuits.arguments import MOST, is_whole, one_or_several, shown
from sink_circuits.clean_runs import run_clean
from sink_circuits.detection import Sinks, find_sinks
from sink_circuits.edits import Contribution, Edit, custom
from sink_circuits.effects import Effect
from sink_circuits.errors import InputError
from sink_circuits.interventions import check_factor, replace, rescale, zero
from sink_circuits.measurement import check_handed_on, check_known, check_options, check_sinks, measure
from sink_circuits.prompts import Tokens, as_tokens
from sink_circuits.scores import MIN_QUERIES

FACTORS = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)
REMOVALS = ("zero", "mean")
"""Interventions that experiments know by name, beside functions of the contribution."""

Dosed = Callable[[Contribution, float], Contribution]
"""A family of interventions of a user's own: (contribution [pos, d_model], dose) -> the same shape."""


def resolve_layers(model, layer, layers, forming: pd.Series | None = None) -> Callable[[pd.Series], tuple[int, ...]]:
    """What `layer=`/`layers=` mean for each sink: one layer, a joint set, or "forming", each sink's own.

    Raises InputError for none or both, an unknown word, or a layer out of range.
    """
    n_layers = model.cfg.n_layers
    if (layer is None) == (layers is None):
        raise InputError("give either layer= (a number or 'forming') or layers= (a joint set), not both.")
    if forming is not None and not (isinstance(layer, str) and layer == "forming"):
        raise InputError("forming layers were given and would not be used: pass layer='forming' with them.")
    if isinstance(layer, str):
        if layer != "forming":
            raise InputError(f"layer {shown(layer)} is unknown: give a number or 'forming'.")
        if forming is None:
            raise InputError("forming layers are not known: pass forming=layer_map(...).forming().")
        forming = arguments.several(forming, "forming")
        check_layers(forming, n_layers)
        own = [int(one) for one in forming]
        return lambda row: (own[cast(int, row.name)],)  # the table's index counts its rows
    joint = (layer,) if layers is None else one_or_several(layers)
    if layers is None and isinstance(layer, Iterable):
        raise InputError(f"layer {shown(layer)} names several: pass layers={shown(layer)} for a joint set.")
    check_layers(joint, n_layers)
    if not joint or len(set(joint)) < len(joint):
        raise InputError(f"layers {joint}: name each layer once, and at least one.")
    return lambda row: tuple(int(one) for one in joint)


def check_layers(layers, n_layers: int) -> None:
    for one in layers:
        if not is_whole(one) or not 0 <= one < n_layers:
            there = f"the model has layers 0..{n_layers - 1}" if n_layers < MOST else "layers are counted from 0"
            raise InputError(f"layer {shown(one)} is out of range: {there}.")


@dataclass(frozen=True)
class Prepared:
    """What an experiment works on, once all its arguments were checked and what was not given was found.

    `layers_of`: row of the sink table -> the layers that are edited at it; `layers_said`: what was asked for, for the manifest.
    `known`: all sinks of the prompts, those that are not treated too; None when they were neither given nor looked for.
    """

    tokens: Tokens
    sinks: Sinks
    layers_of: Callable[[pd.Series], tuple[int, ...]]
    layers_said: str
    known: Sinks | None

    def all_sinks(self, model, options: Mapping) -> Sinks:
        """`known`, or looked for."""
        shared = {name: options[name] for name in ("path", "verbose") if name in options}
        return find_sinks(model, self.tokens, **shared) if self.known is None else self.known


def prepare(
    model, tokens, sinks: Sinks | None, layer, layers, forming: pd.Series | None, options: Mapping, found: Sinks | None = None
) -> Prepared:  # fmt: skip
    """Check all arguments before anything is run, then find what was not given. Raises InputError."""
    check_handed_on(options)
    layers = None if layers is None else one_or_several(layers)
    waits = isinstance(layer, str) and layer == "forming" and layers is None and forming is None
    adapter = adapt(model)
    layers_of = None if waits else resolve_layers(model, layer, layers, forming)
    check_options(adapter, **options)
    given, tokens = tokens, as_tokens(model, tokens, options.get("attention_mask"))
    if found is not None:
        check_known(found, tokens)
    shared = {
        name: options[name]
        for name in ("clean_cache", "path", "verbose", "attention_mask", "memory")
        if name in options
    }
    if sinks is None:
        sinks = find_sinks(model, given, **shared)
        found = sinks if found is None else found
    table = check_sinks(sinks, tokens)
    if layer == "forming" and forming is not None and len(forming) != len(sinks):
        raise InputError(f"forming holds {len(forming)} layers for {len(sinks)} sinks: map the sinks that are treated.")
    if layers_of is None:
        _check_late_sinks(table, tokens, options.get("min_queries", MIN_QUERIES))
        shared |= {name: options[name] for name in ("batch_size", "min_queries", "outcomes") if name in options}
        forming = layer_map(model, given, sinks, layers=range(int(table["l_end"].max()) + 1), **shared).forming()
        layers_of = resolve_layers(model, layer, layers, forming)
    return Prepared(tokens, sinks, layers_of, str(layer if layers is None else list(layers)), found)


def _check_late_sinks(table: pd.DataFrame, tokens: Tokens, min_queries: int) -> None:
    """Raises InputError, before a layer map is run, for a sink whose score would be undefined in every layer."""
    for prompt, pos in zip(table["prompt"], table["pos"].tolist(), strict=True):
        later = len(tokens.ids[tokens.names.index(prompt)]) - 1 - pos
        if later < min_queries:
            raise InputError(
                f"the sink at position {pos} of prompt {prompt!r} has {later} later queries, its score needs {min_queries}: "
                "leave it out (Sinks.table holds NaN scores there), or lower min_queries."
            )


def layer_map(
    model, tokens, sinks: Sinks | None = None, *, intervention: str | Callable[[Contribution], Contribution] = "zero",
    layers: Sequence[int] | None = None, found: Sinks | None = None, **options,
) -> Effect:  # fmt: skip
    """One intervention tried at every layer (or `layers`), one layer and one sink per run: which MLPs form the sinks?

    `intervention` and `found` as in `ablate`. The axis `edit` is the edited layer. For the other options see `measure`.
    Raises InputError.
    """
    layers = tuple(range(adapt(model).n_layers)) if layers is None else one_or_several(layers)
    name, treated, made = prepare_removal(
        model, tokens, sinks, None, layers, None, intervention, check_found(found, intervention), options
    )
    labels = [int(layer) for layer in layers]

    def edits(label: int, row: pd.Series) -> tuple[Edit, ...]:
        return (made(label, row),)

    return measure(
        model, tokens, treated.sinks, labels, edits, what="layer_map", settings={"intervention": name}, **options
    )


def ablate(
    model, tokens, sinks: Sinks | None = None, *, layer=None, layers: Sequence[int] | None = None,
    intervention: str | Callable[[Contribution], Contribution] = "zero", forming: pd.Series | None = None,
    found: Sinks | None = None, **options,
) -> Effect:  # fmt: skip
    """Take the contribution of one MLP, or of a joint set, away at each sink.

    `intervention`: "zero"; "mean", the mean contribution of that MLP over all ordinary tokens of these prompts; or a function
    of the contribution [pos, d_model]. `layer`: a number or "forming" (each sink's own; found by a layer map unless
    `forming` is given); `layers`: a joint set. `found`, for "mean": all sinks of these prompts, none of which is an ordinary
    token (looked for when None). The axis `edit` has one label, its name. For the other options see `measure`. Raises InputError.
    """
    name, treated, made = prepare_removal(
        model, tokens, sinks, layer, layers, forming, intervention, check_found(found, intervention), options
    )
    edits = at_layers(treated.layers_of, made)
    settings = {"layers": treated.layers_said}
    return measure(model, tokens, treated.sinks, [name], edits, what="ablate", settings=settings, **options)


def dose_response(
    model, tokens, sinks: Sinks | None = None, *, layer=None, layers: Sequence[int] | None = None, factors: Sequence[float] = FACTORS,
    intervention: str | Dosed = "rescale", forming: pd.Series | None = None, **options,
) -> Effect:  # fmt: skip
    """Rescale the contribution of one MLP, or of a joint set by one common factor, at each sink.

    `intervention`: "rescale", or a family of your own, a function of (contribution [pos, d_model], dose): `factors` are
    its doses. The axis `edit` is the factor. `layer`, `layers`, `forming` as in `ablate`; other options as in `measure`.
    Raises InputError for a NaN or infinite factor, one given twice, or a negative one of a rescaling.
    """
    name = name_of(intervention, ("rescale",))
    factors = check_doses(intervention, factors)
    treated = prepare(model, tokens, sinks, layer, layers, forming, options)

    def edits(factor: float, row: pd.Series) -> tuple[Edit, ...]:
        return tuple(dosed(intervention, one, int(row.pos), factor, name) for one in treated.layers_of(row))

    settings = {"layers": treated.layers_said, "intervention": name}
    return measure(model, tokens, treated.sinks, factors, edits, what="dose_response", settings=settings, **options)


def check_doses(intervention: str | Dosed, factors: Sequence[float]) -> tuple[float, ...]:
    """Raises InputError for no factors, one given twice, or one that "rescale" or a family of a user's own cannot take."""
    doses = [
        check_factor(factor) if isinstance(intervention, str) else _dose(factor) for factor in one_or_several(factors)
    ]
    if not doses or len(set(doses)) < len(doses):
        raise InputError(f"factors {doses}: give each once, and at least one.")
    return tuple(doses)


def dosed(intervention: str | Dosed, layer: int, pos: int, dose: float, name: str | None = None) -> Edit:
    """One dose of "rescale", or of a family of a user's own."""
    if isinstance(intervention, str):
        return rescale(layer, pos, dose)
    return custom(layer, pos, lambda contribution: intervention(contribution, dose), name, dose)


def check_found(found: Sinks | None, intervention) -> Sinks | None:
    """`found`. Raises InputError for what is no table of sinks, and for one that would not be used."""
    if found is None:
        return found
    arguments.instance(found, "found", Sinks, "pass what find_sinks returns")
    if not isinstance(intervention, str) or intervention != "mean":
        raise InputError(
            "found was given and would not be used: it says over which tokens intervention='mean' is taken."
        )
    return found


Removal = Callable[[int, pd.Series], Edit]
"""(layer, row of the sink table) -> one of `REMOVALS`, or a function of the contribution, at that sink."""


def prepare_removal(
    model, tokens, sinks: Sinks | None, layer, layers, forming: pd.Series | None,
    intervention: str | Callable[[Contribution], Contribution], found: Sinks | None, options: Mapping,
) -> tuple[str, Prepared, Removal]:  # fmt: skip
    """What all experiments that take contributions away begin with: the intervention's name, what is treated, and its edit."""
    name = name_of(intervention, REMOVALS)
    treated = prepare(model, tokens, sinks, layer, layers, forming, options, found)
    return name, treated, removal(model, tokens, treated.sinks, intervention, treated.known, options)


def at_layers(
    layers_of: Callable[[pd.Series], tuple[int, ...]], made: Removal
) -> Callable[[Any, pd.Series], tuple[Edit, ...]]:
    """(label, row of the sink table) -> the removal at each of that sink's layers, whatever the label."""
    return lambda label, row: tuple(made(one, row) for one in layers_of(row))


def removal(
    model, tokens, sinks: Sinks, intervention: str | Callable[[Contribution], Contribution], found: Sinks | None, options: Mapping
) -> Removal:  # fmt: skip
    """One of `REMOVALS`, or a function of the contribution, for `sinks`.

    `found`: all sinks of these prompts, which a mean must not hold (looked for when None).
    """
    if not isinstance(intervention, str):
        name = name_of(intervention, ())
        return lambda layer, row: custom(layer, int(row["pos"]), intervention, name)
    if intervention == "zero":
        return lambda layer, row: zero(layer, int(row["pos"]))
    shared = {name: options[name] for name in ("clean_cache", "path", "attention_mask") if name in options}
    if found is None:
        found = find_sinks(model, tokens, verbose=options.get("verbose", True), **shared)
    known = Sinks(pd.concat([sinks.table, found.table], ignore_index=True), sinks.prompts, sinks.manifest)
    donors = mean_contributions(model, tokens, known, **shared)
    return lambda layer, row: replace(layer, int(row["pos"]), donors[layer], "mean")


def name_of(intervention, known: tuple[str, ...]) -> str:
    """What an intervention is called in results. Raises InputError for neither one of the `known` names nor a function."""
    if callable(intervention):
        return getattr(intervention, "__name__", "custom")
    names = " or ".join(map(repr, known))
    return arguments.one_of(intervention, "intervention", known, f"use {names} or a function of the contribution")


def _dose(dose) -> float:
    if not arguments.is_number(dose) or not math.isfinite(dose):
        raise InputError(f"dose {shown(dose)} is not allowed: give a finite number.")
    return float(dose)


def mean_contributions(
    model, tokens, sinks: Sinks, *, skip_first: int = 4, attention_mask=None, clean_cache=None, path: str = "auto"
) -> Float[Tensor, "layer d_model"]:  # fmt: skip
    """Mean contribution of every MLP over the ordinary tokens of these prompts: neither `sinks`, all there are, nor the first
    `skip_first`."""
    tokens = as_tokens(model, tokens, attention_mask)
    total, count = None, 0
    for row, (name, ids) in enumerate(zip(tokens.names, tokens.ids, strict=True)):
        mask = None if attention_mask is None else torch.as_tensor(attention_mask)[row]
        clean = run_clean(model, ids, clean_cache=clean_cache, row=row, mask=mask, path=path)
        keep = torch.ones(len(ids), dtype=torch.bool)
        keep[:skip_first] = False
        keep[sinks.table.loc[sinks.table["prompt"] == name, "pos"].tolist()] = False
        own = clean.contribution[:, keep].double().sum(dim=1)
        total, count = own if total is None else total + own, count + int(keep.sum())
    if not count:
        raise InputError("no ordinary tokens are left to take a mean over: give longer prompts.")
    return (total / count).to(clean.contribution.dtype)
