"""The anatomy of one sink that a report shows: stages of its MLP, writers and erasers, neurons, heads that read it, their patterns."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import pandas as pd

from sink_circuits import anatomy
from sink_circuits.anatomy.direct_writes import Writers
from sink_circuits.anatomy.reading import layers_of
from sink_circuits.anatomy.result import Anatomy
from sink_circuits.detection import Sinks
from sink_circuits.errors import InputError, ModelError
from sink_circuits.prompts import Tokens, as_tokens

PARTS = ("mlp_stages", "writers", "neurons", "key_query_geometry", "attention_patterns")
"""Functions of `anatomy`, and the kinds of what they return."""
OF_AN_MLP = ("mlp_stages", "neurons")
"""Those that are of one MLP of each sink."""


def strongest_sink(sinks: Sinks, forming: pd.Series | None = None) -> tuple[Sinks, pd.Series | None]:
    """The sink with the highest defined score, those that are no primary first, and its forming layer where one is given."""
    table = sinks.table.reset_index(drop=True)
    order = table.assign(defined=table["score"].notna(), later=table["kind"] != "primary").sort_values(
        ["defined", "later", "score"], ascending=False, kind="stable"
    )
    row = int(order.index[0])
    one = Sinks(table.iloc[[row]].reset_index(drop=True), sinks.prompts, sinks.manifest)
    return one, None if forming is None else pd.Series([int(forming.iloc[row])])


def anatomy_of_one(
    model, tokens, sinks: Sinks, forming: pd.Series | None = None, *, verbose: bool = True
) -> tuple[list[Anatomy], list[str]]:  # fmt: skip
    """(results, sentences about what this model does not have) of the strongest of these sinks.

    Stages and neurons are those of the MLP that writes the sink's direction (`Writers.writing_mlp`), mostly the forming one, and of
    the forming one where none writes. `forming`: the sinks' forming layers; found by a layer map of that sink when None. A
    part that a model's architecture does not have is left out and named. Raises InputError when there are no sinks.
    """
    if not len(sinks):
        raise InputError("there are no sinks to take apart: find some first, or give other texts.")
    one, own = strongest_sink(sinks, forming)
    tokens = as_tokens(model, tokens)
    prompt = one.table["prompt"].iloc[0]
    text = Tokens((tokens.ids[tokens.names.index(prompt)],), (prompt,))
    forming_layer = layers_of(model, text, one, "forming", own, verbose)[0]
    # A pattern shows all sinks of the text that are given.
    beside = Sinks(sinks.table[sinks.table["prompt"] == prompt].reset_index(drop=True), sinks.prompts, sinks.manifest)
    made: dict[str, Anatomy] = {}
    missing: list[str] = []
    layer = forming_layer
    for name in sorted(PARTS, key=lambda part: part != "writers"):  # they say whose stages and neurons are worth seeing
        part: Callable[..., Anatomy] = getattr(anatomy, name)
        options = {"layer": layer} if name in OF_AN_MLP else {}
        try:
            made[name] = part(model, text, beside if name == "attention_patterns" else one, verbose=False, **options)
        except (InputError, ModelError) as error:
            missing.append(f"No {name.replace('_', ' ')}: {error}")
        if name == "writers" and name in made:
            writing = int(cast(Writers, made[name]).writing_mlp().iloc[0])
            layer = forming_layer if writing < 0 else writing
    return [made[name] for name in PARTS if name in made], missing
