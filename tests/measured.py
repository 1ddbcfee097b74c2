"""One planted model, measured once by everything that a report can show; its prompts and tokens hold hostile text."""

from __future__ import annotations

import dataclasses
import functools
from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch
import xarray as xr

import sink_circuits as sc
from sink_circuits import anatomy, planted
from sink_circuits.claims import HYPOTHESES, Claims, judge, verdicts_of
from sink_circuits.detection import Sinks
from sink_circuits.token_scores import TokenScores, token_scores

QUIET = {"verbose": False}
NAMES = ("</script><img src=x onerror=alert(1)>", "b & <i>\u05e9\u05dc\u05d5\u05dd</i> \u202e")
TOKENS = (
    "</script>",
    "<b>bold</b>",
    "\u05e9\u05dc\u05d5\u05dd",
    "\u0645\u0631\u062d\u0628\u0627",
    "\u202eevil",
    "&amp;",
    "a\nb",
    "{{7*7}}",
)


@functools.cache
def measured() -> SimpleNamespace:
    """Every kind of result of one model and two prompts, as a study would save them."""
    torch.set_num_threads(1)
    plant = planted.minimal()
    model = plant.bridge()
    tokens = sc.Tokens((plant.tokens(), plant.tokens(seed_name="b", sinks=(30, 55))), NAMES)
    found = sc.find_sinks(model, tokens, **QUIET)
    found = Sinks(
        found.table.assign(token=[TOKENS[pos % len(TOKENS)] for pos in found.table["pos"]]),
        found.prompts,
        found.manifest,
    )
    sinks = found.select("secondary")
    scored = token_scores(model, tokens)
    carrying = anatomy.neurons(model, tokens, sinks, layer=6, **QUIET)
    shown = scored.table.assign(token=[TOKENS[pos % len(TOKENS)] for pos in scored.table["pos"]])
    return SimpleNamespace(
        found=found,
        sinks=sinks,
        layer_map=sc.layer_map(model, tokens, sinks, layers=[2, 6], **QUIET),
        many=sc.dose_response(model, tokens, sinks, layer=6, factors=[0, 0.2, 0.4, 0.6, 0.8, 2], **QUIET),
        attribution=sc.attribute(model, tokens, sinks, targets=("contributions",), **QUIET),
        ablate=sc.ablate(model, tokens, sinks, layers=[6, 7], **QUIET),
        mass=sc.mass_account(model, tokens, sinks, layers=[6, 7], found=found, **QUIET),
        paths=sc.path_effects(model, tokens, sinks, layer=6, **QUIET),
        controls=sc.with_controls(model, tokens, sinks, layer=6, found=found, n_random=3, **QUIET),
        writers=anatomy.writers(model, tokens, found, **QUIET),
        neurons=carrying,
        ablate_neurons=anatomy.ablate_neurons(model, tokens, sinks, carrying, n=1, n_random=3, **QUIET),
        key_query_geometry=anatomy.key_query_geometry(model, tokens, sinks, **QUIET),
        attention_patterns=with_tokens(anatomy.attention_patterns(model, tokens, sinks, **QUIET)),
        mlp_stages=anatomy.mlp_stages(model, tokens, sinks, layer=6, **QUIET),
        token_scores=TokenScores(scored.data, shown, scored.manifest),
        claims=judged(sinks),
    )


def with_tokens(result):
    """The same with hostile text in its table's tokens."""
    table = result.table.assign(token=[TOKENS[pos % len(TOKENS)] for pos in result.table["pos"]])
    return dataclasses.replace(result, table=table)


def judged(sinks: Sinks) -> Claims:
    """Claims judged by the rule from numbers that are written here: every state of a hypothesis occurs."""
    prompts = [f"p{i}" for i in range(12)]
    spread = np.linspace(-0.05, 0.05, 12)
    values = {
        h.name: (2 if h.alternative == "greater" else -2) + spread for h in HYPOTHESES if h.name != "levels recur"
    }
    values["alignment matters"] = -values["alignment matters"]  # fails: the other side
    values["more than a disturbance"] = 3 * np.where(np.arange(12) % 2, 1.0, -1.0)  # open
    values["recovers"] = 0.02 + 0.01 * spread  # there, but within its margin
    levels = {"estimate": 30.0, "p": 0.0001, "p_against": 1.0, "n_prompts": 12, "n_sinks": 20}
    table = judge(values, pd.Series(prompts), levels)
    data = xr.Dataset({"value": (("hypothesis", "sink"), np.stack(list(values.values())))})
    given = {
        "verdicts": verdicts_of(table), "table": table, "forming_layer": 6, "forming_set": (6, 7), "data": data, "sinks": sinks.table,
        "controls": pd.DataFrame(), "manifest": sinks.manifest,
    }  # fmt: skip
    return Claims(**{name: value for name, value in given.items() if name in Claims.__dataclass_fields__})
