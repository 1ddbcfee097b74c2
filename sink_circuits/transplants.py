"""Sufficiency: what MLPs write at a sink, written at a token that is none. Does that become a sink, how strong, for how long?

A transplant replaces the token's own contribution, so what it does is the write's doing in another token's stream (Wong et al.,
2512.22213: the MLP's output makes the sink). Beside it stand the write's norm alone, along the primary direction, and the same norm
in directions drawn by name, which should make none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import pandas as pd
import torch

from sink_circuits import arguments
from sink_circuits.clean_runs import run_clean
from sink_circuits.detection import Sinks, primary_direction
from sink_circuits.edits import Edit, compose
from sink_circuits.effects import Effect
from sink_circuits.errors import InputError
from sink_circuits.experiments import prepare
from sink_circuits.interventions import random_direction, replace, write_along
from sink_circuits.matching import match_positions, moved
from sink_circuits.measurement import measure
from sink_circuits.prompts import Tokens

EDITS = ("transplant", "transplant_norm")
"""The edits, by the names of the interventions they are; "random_direction 0" and so on follow."""


@dataclass(frozen=True)
class _Written:
    """What is written at one sink, by layer, and the primary direction there."""

    contribution: dict[int, torch.Tensor]
    direction: dict[int, torch.Tensor]


def sufficiency(
    model, tokens, sinks: Sinks | None = None, *, layer=None, layers: Sequence[int] | None = None, forming: pd.Series | None = None,
    onto: Sequence[int] | None = None, found: Sinks | None = None, n_random: int = 1, **options,
) -> Effect:  # fmt: skip
    """What one MLP, or a joint set, writes at each sink, written at a token of the same text that is no sink.

    The axis `edit`: "transplant", f(c) = the sink's contribution of that layer in the clean run; "transplant_norm", its norm
    along the primary direction of that layer; "random_direction 0", ...: its norm in a direction drawn by name. `table` is of the
    treated tokens: `pos` is where it was written, `donor_pos` the sink, `kind` how the token was chosen; l_start, l_end and primary
    are the sink's, so that the layers that read it are read. Outcomes as in `measure`, all of the treated token: `score` and `log_odds`
    say how strong a sink it becomes, `lifetime` for how long (0: it is none; of its run that shares most layers with the sink's).
    `onto`: a position for each sink; None: the nearest token of the same id that is no sink, else the nearest ordinary token
    (`matching.match_positions`, "same token", "same range"). `layer`, `layers`, `forming` as in `ablate`; `found`: all sinks of these
    prompts (looked for when None); other options as in `measure`. Raises InputError, also for a position that is a sink, and for a sink
    without such a token.
    """
    if options.get("attention_mask") is not None or options.get("clean_cache") is not None:
        raise InputError("transplants are made in texts of their own length: leave out attention_mask and clean_cache.")
    n_random = arguments.whole(n_random, "n_random")
    prepared = prepare(model, tokens, sinks, layer, layers, forming, options, found)
    tokens, sinks = prepared.tokens, prepared.sinks
    path, found = options.get("path", "auto"), prepared.all_sinks(model, options)
    table = sinks.table.reset_index(drop=True)
    treated = Sinks(table, sinks.prompts, sinks.manifest)
    own_layers = [prepared.layers_of(row) for _, row in table.iterrows()]
    chosen = (
        _stand_ins(model, tokens, treated, found, options) if onto is None else _given(onto, tokens, treated, found)
    )
    at = moved(model, treated, tokens, range(len(table)), chosen["pos"].tolist(), chosen["control"].tolist())
    at = Sinks(at.table.assign(donor_pos=table["pos"]), at.prompts, at.manifest)
    written = _written(model, tokens, table, own_layers, path)

    def edits(label: str, row: pd.Series) -> tuple[Edit, ...]:
        index = cast(int, row.name)  # the table's index counts its rows
        return tuple(_edit(label, one, row, written[index]) for one in own_layers[index])

    labels = [*EDITS, *(f"random_direction {draw}" for draw in range(n_random))]
    settings = {"layers": prepared.layers_said, "n_random": n_random}
    return measure(model, tokens, at, labels, edits, what="sufficiency", settings=settings, **options)


def _edit(label: str, layer: int, row: pd.Series, written: _Written) -> Edit:
    pos, contribution = int(row["pos"]), written.contribution[layer]
    if label == "transplant_norm":
        return write_along(layer, pos, written.direction[layer], contribution.float().norm().item())
    transplant = replace(layer, pos, contribution, "transplant")
    if label == "transplant":
        return transplant
    return compose(transplant, random_direction(layer, pos, row["prompt"], int(label.split()[-1])))


def _stand_ins(model, tokens: Tokens, treated: Sinks, found: Sinks, options: Mapping) -> pd.DataFrame:
    """Where each sink's contribution is written: columns pos, control. Raises InputError for a sink without such a token."""
    own = {name: options[name] for name in ("min_queries", "path") if name in options}
    chosen = stand_ins(match_positions(model, tokens, treated, found, **own))
    for index in np.flatnonzero(chosen["pos"].to_numpy() < 0):
        sink = treated.table.loc[index]
        raise InputError(
            f"near the sink at position {sink['pos']} of prompt {sink['prompt']!r} there is no ordinary token to write at: name one in "
            "onto=, or leave the sink out."
        )
    return chosen


def stand_ins(matches: pd.DataFrame) -> pd.DataFrame:
    """Of `match_positions`, for every sink the same token where there is one, else the one nearby; pos -1 where there is neither."""
    same, nearby = (matches[matches["control"] == name].set_index("sink") for name in ("same token", "same range"))
    columns = ["pos", "control"]
    return same[columns].where(same["pos"] >= 0, nearby[columns]).sort_index().astype({"pos": int})


def _given(onto: Sequence[int], tokens: Tokens, treated: Sinks, found: Sinks) -> pd.DataFrame:
    onto = arguments.several(onto, "onto")
    if len(onto) != len(treated):
        raise InputError(f"onto names {len(onto)} positions for {len(treated)} sinks: give one for each.")
    for pos, prompt in zip(onto, treated.table["prompt"], strict=True):
        arguments.whole(pos, "position", high=len(tokens.ids[tokens.names.index(prompt)]) - 1)
        known = pd.concat([treated.table, found.table])
        if pos in known.loc[known["prompt"] == prompt, ["pos", "primary_pos"]].to_numpy():
            raise InputError(f"position {pos} of prompt {prompt!r} is a sink itself: name a token that is none.")
    return pd.DataFrame({"pos": [int(pos) for pos in onto], "control": "given"})


@torch.no_grad()
def _written(
    model, tokens: Tokens, table: pd.DataFrame, own_layers: Sequence[Sequence[int]], path: str
) -> dict[int, _Written]:
    written: dict[int, _Written] = {}
    for name, ids in zip(tokens.names, tokens.ids, strict=True):
        rows = np.flatnonzero(table["prompt"] == name)
        if not len(rows):
            continue
        clean = run_clean(model, ids, path=path)
        contribution = clean.contribution
        assert contribution is not None  # a run that can be resumed holds them
        for index in map(int, rows):
            pos = int(table.loc[index, "pos"])
            written[index] = _Written(
                {layer: contribution[layer, pos].clone() for layer in own_layers[index]},
                {layer: primary_direction(clean, layer, table.loc[index]) for layer in own_layers[index]},
            )
    return written
