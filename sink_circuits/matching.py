"""Matching: for a sink, ordinary tokens of the same text that can stand in for it, or why there are none."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch

from sink_circuits.clean_runs import run_clean
from sink_circuits.detection import Sinks
from sink_circuits.prompts import Tokens, token_texts
from sink_circuits.scores import MIN_QUERIES

SKIP_FIRST = 4
"""Positions at the start of a text that are never controls: the primary and its candidates."""
REACH = 64
"""Farthest a control of the same position range may stand from its sink."""
NORM_RATIO = 1.5
"""A control matched by norm has at most so many times the sink's norm, and at least its inverse."""
POSITION_CONTROLS = ("same token", "same range", "norm matched")
"""What a token is matched by, one control each."""


def match_positions(
    model,
    tokens: Tokens,
    sinks: Sinks,
    found: Sinks | None = None,
    *,
    min_queries: int = MIN_QUERIES,
    path: str = "auto",
) -> pd.DataFrame:
    """For every sink and position control the token that stands in for it: columns sink, control, pos, norm_ratio, reason.

    Candidates are tokens of the same text that are never a sink (in `found`, all sinks of these prompts; `sinks` when
    None), do not stand among the first `SKIP_FIRST`, and have `min_queries` later queries, enough for a score. "same token": the same
    token id, the nearest; "same range": another token within `REACH` positions, the nearest; "norm matched": the norm
    of resid_post[l_start] nearest to the sink's, within a factor `NORM_RATIO`. Ties go to the earlier. `pos` is -1 and
    `reason` says why where there is none; `norm_ratio` is the control's norm over the sink's.
    """
    taken = pd.concat([sinks.table, (found or sinks).table])[["prompt", "pos", "primary_pos"]]
    rows = []
    for name, ids in zip(tokens.names, tokens.ids, strict=True):
        own = sinks.table[sinks.table["prompt"] == name]
        if not len(own):
            continue
        clean = run_clean(model, ids, resumable=False, path=path)
        here = taken[taken["prompt"] == name]
        free = torch.ones(len(ids), dtype=torch.bool)
        free[: min(SKIP_FIRST, len(ids))] = False
        free[max(0, len(ids) - min_queries) :] = False
        free[sorted({*here["pos"], *here["primary_pos"]})] = False
        for index, row in own.iterrows():
            norm = clean.resid_post(int(row["l_start"])).float().norm(dim=-1).cpu()
            ratio = norm / norm[int(row["pos"])].clamp(min=1e-12)
            for control, (pos, reason) in _matched(row, ids.cpu(), free, ratio).items():
                value = float(ratio[pos]) if pos >= 0 else np.nan
                rows.append({"sink": index, "control": control, "pos": pos, "norm_ratio": value, "reason": reason})
    return pd.DataFrame(rows, columns=["sink", "control", "pos", "norm_ratio", "reason"])


def _matched(row, ids, free, ratio) -> dict[str, tuple[int, str]]:
    pos = int(row["pos"])
    distance = (torch.arange(len(ids)) - pos).abs()
    same = ids == ids[pos]
    far = (ratio.clamp(min=1e-12).log()).abs()

    def nearest(candidates, measure, reason: str) -> tuple[int, str]:
        if not candidates.any():
            return -1, reason
        return int(torch.where(candidates, measure.double(), torch.inf).argmin()), ""

    closest = float(ratio[free][far[free].argmin()]) if free.any() else np.nan
    return {
        "same token": nearest(free & same, distance, "the same token does not occur where it is no sink"),
        "same range": nearest(
            free & ~same & (distance <= REACH), distance, f"no other ordinary token within {REACH} positions"
        ),
        "norm matched": nearest(
            free & (far <= np.log(NORM_RATIO)), far, f"the nearest ordinary norm is {closest:.2g} times the sink's"
        ),
    }


def moved(model, sinks: Sinks, tokens: Tokens, of: Sequence[int], positions: Sequence[int], control: str) -> Sinks:
    """The sinks' rows at other positions, of another token: their layers and primary stay, so that the same cells are read."""
    table = sinks.table.iloc[list(of)].reset_index(drop=True).assign(pos=list(positions), kind=control)
    ids = [int(tokens.ids[tokens.names.index(p)][pos]) for p, pos in zip(table["prompt"], table["pos"], strict=True)]
    return Sinks(table.assign(token_id=ids, token=token_texts(model, torch.tensor(ids))), sinks.prompts, sinks.manifest)
