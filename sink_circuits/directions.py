"""Norm or direction: what of an MLP's contribution makes the sink, its length or where it points.

One experiment of six edits, each sink against an ordinary token nearby and against the primary direction of its own prompt
and layer (Wong et al., 2512.22213: contributions align with the primary sink, and their norm sets the score).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import pandas as pd
import torch

from sink_circuits.clean_runs import run_clean
from sink_circuits.detection import Sinks, primary_direction
from sink_circuits.edits import Edit
from sink_circuits.effects import Effect
from sink_circuits.errors import InputError
from sink_circuits.experiments import prepare
from sink_circuits.interventions import (
    keep_direction,
    random_direction,
    remove_direction,
    swap_direction,
    swap_norm,
    zero,
)
from sink_circuits.matching import match_positions
from sink_circuits.measurement import measure
from sink_circuits.prompts import Tokens
from sink_circuits.scores import MIN_QUERIES

NORM_AND_DIRECTION = (
    "zero", "swap_norm", "swap_direction", "remove_direction", "keep_direction", "random_direction",
)  # fmt: skip
"""The edits, by the names of the interventions they are; "zero" is what the others are measured against."""


@dataclass(frozen=True)
class _Reference:
    """What one sink's contribution is compared with, by layer: an ordinary token's, and the primary direction."""

    ordinary: dict[int, torch.Tensor]
    direction: dict[int, torch.Tensor]


def norm_and_direction(
    model, tokens, sinks: Sinks | None = None, *, layer=None, layers: Sequence[int] | None = None, forming: pd.Series | None = None,
    found: Sinks | None = None, **options,
) -> Effect:  # fmt: skip
    """Six edits of one MLP's contribution c, or of a joint set's, at each sink; the axis `edit` is `NORM_AND_DIRECTION`.

    "zero"; "swap_norm", the norm of an ordinary token's contribution, direction kept; "swap_direction", its direction, norm
    kept; "remove_direction", c without its part along the primary direction u of that layer; "keep_direction", that part
    alone; "random_direction", the same norm in a direction drawn by name. The ordinary token is the nearest within reach
    that is no sink (`matching.match_positions`, "same range"); u is taken at the sink's own primary.
    `Effect.by_sink()` is the table of it. `layer`, `layers`, `forming` as in `ablate`; `found`: all sinks of these prompts, none of
    which is an ordinary token (looked for when None); other options as in `measure`. Raises InputError, also for a sink without
    an ordinary token near it.
    """
    if options.get("attention_mask") is not None or options.get("clean_cache") is not None:
        raise InputError(
            "norm and direction are measured on texts of their own length: leave out attention_mask and clean_cache."
        )
    prepared = prepare(model, tokens, sinks, layer, layers, forming, options, found)
    tokens, sinks = prepared.tokens, prepared.sinks
    path, found = options.get("path", "auto"), prepared.all_sinks(model, options)
    table = sinks.table.reset_index(drop=True)
    treated = Sinks(table, sinks.prompts, sinks.manifest)
    own_layers = [prepared.layers_of(row) for _, row in table.iterrows()]
    min_queries = options.get("min_queries", MIN_QUERIES)
    matches = match_positions(model, tokens, treated, found, min_queries=min_queries, path=path)
    nearby = matches[matches["control"] == "same range"].set_index("sink")
    for index, row in nearby[nearby["pos"] < 0].iterrows():
        sink = table.loc[index]
        raise InputError(
            f"the sink at position {sink['pos']} of prompt {sink['prompt']!r} has no ordinary token to be compared with "
            f"({row['reason']}): leave it out."
        )
    references = _references(model, tokens, table, own_layers, nearby["pos"], path)

    def edits(label: str, row: pd.Series) -> tuple[Edit, ...]:
        index, pos = cast(int, row.name), int(row["pos"])  # the table's index counts its rows
        return tuple(_edit(label, one, pos, references[index], str(row["prompt"])) for one in own_layers[index])

    settings = {"layers": prepared.layers_said, "ordinary": nearby["pos"].tolist()}
    return measure(
        model, tokens, treated, list(NORM_AND_DIRECTION), edits, what="norm_and_direction", settings=settings, **options
    )


def _edit(label: str, layer: int, pos: int, reference: _Reference, prompt: str) -> Edit:
    ordinary, direction = reference.ordinary[layer], reference.direction[layer]
    made = {
        "zero": lambda: zero(layer, pos),
        "swap_norm": lambda: swap_norm(layer, pos, ordinary),
        "swap_direction": lambda: swap_direction(layer, pos, ordinary),
        "remove_direction": lambda: remove_direction(layer, pos, direction),
        "keep_direction": lambda: keep_direction(layer, pos, direction),
        "random_direction": lambda: random_direction(layer, pos, "norm and direction", prompt),
    }
    return made[label]()


@torch.no_grad()
def _references(
    model, tokens: Tokens, table: pd.DataFrame, own_layers: Sequence[Sequence[int]], ordinary: pd.Series, path: str
) -> dict[int, _Reference]:
    references: dict[int, _Reference] = {}
    for name, ids in zip(tokens.names, tokens.ids, strict=True):
        rows = np.flatnonzero(table["prompt"] == name)
        if not len(rows):
            continue
        clean = run_clean(model, ids, path=path)
        contribution = clean.contribution
        assert contribution is not None  # a run that can be resumed holds them
        for index in map(int, rows):
            references[index] = _Reference(
                {layer: contribution[layer, int(ordinary[index])].clone() for layer in own_layers[index]},
                {layer: primary_direction(clean, layer, table.loc[index]) for layer in own_layers[index]},
            )
    return references
