"""A plant as the instruments meet it, and what is said about it. Every room of judges builds on this one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from sink_circuits.adapters import adapt
from sink_circuits.detection import COLUMNS, Sinks, find_sinks
from sink_circuits.effects import Effect
from sink_circuits.planted import Plant, Sink
from sink_circuits.planted.closed_form import drawn_logits
from sink_circuits.prompts import Tokens

N_PROMPTS, N_TOKENS = 4, 80
"""Prompts on which sinks are looked for, and the length of every prompt."""
LEVEL = 0.95
"""Of all intervals."""
NOTHING = 0.1
"""An effect smaller than this share of what the sink draws is none."""


@dataclass(frozen=True)
class Row:
    """One line of the calibration table. `rule`: "all" answers must be right; "at least" or "at most" the `nominal` rate."""

    instrument: str
    asks: str
    nominal: float = 1.0
    rule: str = "all"


@dataclass(frozen=True)
class Answer:
    """How often an instrument was right about one plant: `right` of `of`. `detail`: what was wrong."""

    instrument: str
    right: int
    of: int
    detail: str = ""


@dataclass(frozen=True)
class Judged:
    """All answers about one plant, and the seconds it took to build and to judge."""

    plant: str
    variant: str
    answers: tuple[Answer, ...]
    seconds: tuple[float, float]


@dataclass(frozen=True, eq=False)
class Subject:
    """One plant as the instruments meet it: through TransformerLens, on prompts. `found`: what detection says."""

    name: str
    plant: Plant
    model: torch.nn.Module
    tokens: Tokens
    found: Sinks

    def prompts(self, what: str, n: int) -> Tokens:
        names = [f"{self.name}/{what}/{i}" for i in range(n)]
        return Tokens(tuple(self.plant.prompt(name, N_TOKENS) for name in names), tuple(names))

    def rows(self, tokens: Tokens, places: Iterable[tuple[int, int, str, int, int]]) -> Sinks:
        """A sink table of given places: (prompt's index, position, kind, l_start, l_end)."""
        primary = self.plant.recipe.primary_position
        table = pd.DataFrame(
            [
                (tokens.names[i], pos, int(tokens.ids[i][pos]), kind, first, last)
                for i, pos, kind, first, last in places
            ],
            columns=["prompt", "pos", "token_id", "kind", "l_start", "l_end"],
        )
        table = table.assign(
            token=table["token_id"].astype(str), lifetime=table["l_end"] - table["l_start"] + 1, phase_start=table["l_start"],
            primary_pos=primary,
        ).reindex(columns=list(COLUMNS))  # fmt: skip
        return Sinks(table, tokens.names, self.found.manifest)

    def planted(self) -> tuple[list[Sink], Sinks]:
        """Every life of every kind of planted sink, and its first place in the first prompt."""
        lives: dict[Sink, int] = {}
        for pos, sink in self.plant.truth.lives(self.tokens.ids[0]):
            lives.setdefault(sink, pos)
        places = [(0, pos, sink.kind, sink.l_start, sink.l_end) for sink, pos in lives.items()]
        return list(lives), self.rows(self.tokens, places)


Judge = Callable[[Subject], list[Answer]]


def subject_of(name: str, plant: Plant, backend: str = "bridge") -> Subject:
    """A plant in TransformerLens, with prompts and what detection finds in them. `backend`: "bridge" or "hooked"."""
    model = plant.bridge() if backend == "bridge" else plant.hooked()
    adapt(model)
    prompts = {f"{name}/{i}": plant.prompt(f"{name}/{i}", N_TOKENS) for i in range(N_PROMPTS)}
    tokens = Tokens(tuple(prompts.values()), tuple(prompts))
    return Subject(name, plant, model, tokens, find_sinks(model, tokens, verbose=False))


def answer(instrument: str, right: bool, detail: str) -> Answer:
    """Of one question; `detail` is kept where it is wrong."""
    return Answer(instrument, int(right), 1, "" if right else detail)


def listed(what: str, values: Iterable) -> str:
    """What is missing or too much, at most five of it; empty for nothing."""
    shown = sorted(map(str, values))
    return f"{what} {'; '.join(shown[:5])}" + (f" and {len(shown) - 5} more" if len(shown) > 5 else "") if shown else ""


def lives_of(sinks: Sequence[Sink], sink: Sink) -> list[Sink]:
    """All lives of this kind of token."""
    return [one for one in sinks if one.token == sink.token]


def each_life(subject: Subject, redundancy: str | None = None) -> Iterator[tuple[Sink, Sinks]]:
    """Planted lives that MLPs form, one by one, with a table of one row each."""
    sinks, table = subject.planted()
    for index, sink in enumerate(sinks):
        if sink.forming and redundancy in (None, sink.redundancy):
            yield sink, Sinks(table.table.iloc[[index]].reset_index(drop=True), table.prompts, table.manifest)


def first_effects(effect: Effect, sink: Sink, edit: int = 0) -> np.ndarray:
    """Effect on log-odds [head] in the first layer that reads the sink: no other key has changed there."""
    return effect.effect("log_odds").isel(sink=0, edit=edit).sel(layer=sink.l_start + 1).to_numpy()


def logits_of(subject: Subject, table: Sinks, sink: Sink, index: int = 0) -> dict[int, float]:
    """The logit that the sink in row `index` of the table draws in the first layer that reads it, by sink head."""
    return drawn_logits(subject.plant, subject.tokens.ids[0], int(table.table["pos"].iloc[index]), sink)
