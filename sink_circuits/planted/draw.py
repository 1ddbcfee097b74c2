"""Random plants: recipes drawn from a name, of everything an instrument should find and not find."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sink_circuits import arguments
from sink_circuits.errors import InputError
from sink_circuits.planted.architectures import ARCHITECTURES, Architecture
from sink_circuits.planted.build import build, n_eraser_neurons
from sink_circuits.planted.circuits import Decoy, Recipe, Shape, Sink, Write, name_of
from sink_circuits.planted.models import Plant

VARIANTS = tuple(ARCHITECTURES)
PHASES = ("one", "apart", "fall")
"""The primary: one phase; two with layers between in which it is no sink; two cut by a fall that leaves it one."""
PRIMARY = 0
"""Token id of the primary; secondary kinds and decoys follow."""
WINDOW = 40

NORM = (38.0, 75.0)  # a sink's, and a decoy's; ordinary tokens have 10 to 13
OPPOSITE_NORM = (45.0, 75.0)
OBLIQUE = (0.75, 0.66)  # shares along the sink direction and another: no cosine near 0.9
NOISE = (0.25, 0.5, 1.0)  # of what is loud in an architecture
PRIMARY_NORM = (80.0, 160.0)
FALL_NORMS = (200.0, 38.0, 400.0)  # before, in the trough and after: falls by more than 4, rises by more than 8
CHAIN_START = (15.0, 18.0)  # too small for sink state


def random_plant(
    name: str | int, *, variant: str | None = None, phases: str | None = None, n_secondary: int | None = None, noise: float | None = None
) -> Plant:  # fmt: skip
    """A model with a circuit drawn from `name` (a seed will do); what is given is not drawn.

    `variant`: one of `VARIANTS`. `phases` of the primary: one of `PHASES`. `n_secondary`: how many kinds of secondary (or
    primary-like) sinks, 0 to 3. `noise`: size of what blocks add to the noise space, at most what is `loud` in the architecture.
    Raises InputError.
    """
    return _plant(random_recipe(name, variant=variant, phases=phases, n_secondary=n_secondary, noise=noise))


def null_plant(name: str | int, *, variant: str | None = None, noise: float | None = None) -> Plant:
    """The model of `random_plant(name)` without its sinks: no MLP writes at their tokens. Decoys stay."""
    recipe = random_recipe(name, variant=variant, noise=noise)
    tokens = {sink.token for sink in recipe.sinks}
    writes = tuple(write for write in recipe.writes if write.token not in tokens)
    return _plant(replace(recipe, writes=writes, sinks=(), embedded=()))


def _plant(recipe: Recipe) -> Plant:
    import torch

    shape = recipe.shape
    prompt = (
        torch.arange(recipe.n_special, recipe.n_special + 48) % (shape.d_vocab - recipe.n_special) + recipe.n_special
    )
    others = [token for token in range(recipe.n_special) if token != PRIMARY]
    prompt[recipe.primary_position] = PRIMARY
    for index, token in enumerate(others):
        prompt[4 + 4 * index] = token
    model, truth = build(recipe, prompt)
    return Plant(model, recipe, truth)


def random_recipe(
    name: str | int, *, variant: str | None = None, phases: str | None = None, n_secondary: int | None = None, noise: float | None = None
) -> Recipe:  # fmt: skip
    """What `random_plant` builds. Every choice is drawn whether it is used or not, so that one can be fixed alone."""
    rng = np.random.default_rng(
        int.from_bytes(hashlib.sha256(f"planted/recipe/{name_of(name)}".encode()).digest()[:8], "little")
    )
    drawn = {
        "variant": str(rng.choice(VARIANTS)), "phases": str(rng.choice(PHASES, p=(0.5, 0.25, 0.25))),
        "n_secondary": int(rng.choice(4, p=(0.1, 0.4, 0.3, 0.2))), "noise": float(rng.choice(NOISE)),
    }  # fmt: skip
    given = {"variant": variant, "phases": phases, "n_secondary": n_secondary}
    chosen: dict[str, Any] = {key: drawn[key] if value is None else value for key, value in given.items()}
    arguments.one_of(chosen["variant"], "variant", VARIANTS)
    arguments.one_of(chosen["phases"], "phases", PHASES)
    chosen["n_secondary"] = arguments.whole(chosen["n_secondary"], "n_secondary", high=3)
    architecture = ARCHITECTURES[chosen["variant"]]
    noise = drawn["noise"] * architecture.loud if noise is None else arguments.number(noise, "noise")
    if not 0 <= noise <= architecture.loud:
        raise InputError(
            f"noise is {noise}: from 0 to {architecture.loud} the planted states keep apart from it in {architecture.name}."
        )
    n_layers = int(rng.integers(10, 13)) + (0 if chosen["phases"] == "one" else 2)
    key_heads = int(rng.choice((1, 2, 4)))
    shape = Shape(
        n_layers, n_key_heads=key_heads if architecture.grouped else 4, window=WINDOW if architecture.windowed else None
    )
    columns = _Columns(rng, shape, architecture)
    lives = _primary_phases(rng, chosen["phases"], n_layers)
    writes, sinks = _plant_primary(rng, chosen["phases"], lives, columns)
    for token in range(1, 1 + chosen["n_secondary"]):
        own, sink = _plant_secondary(rng, token, lives, n_layers, columns, sinks)
        writes, sinks = writes + own, [*sinks, *sink]
    token = 1 + chosen["n_secondary"]
    embedded, more_sinks = _embedded(rng, token, chosen["phases"], lives)
    token += len(embedded)
    decoys, more = _decoys(rng, token, n_layers, columns)
    sinks, writes = [*sinks, *more_sinks], writes + more
    n_special = token + len(decoys)
    # Whatever stands along the sink direction at other tokens is left alone.
    writes = [
        replace(write, spares=tuple(one for one in range(n_special) if one != write.token))
        if write.role in ("erase", "amplify")
        else write
        for write in writes
    ]
    heads, attending = _heads(rng, shape.n_heads, (5.5, 8.0)), _heads(rng, shape.n_heads, (4.0, 6.0))
    return Recipe(
        name=f"random {name}", variant=chosen["variant"], shape=shape, n_special=n_special,
        writes=tuple(sorted(writes, key=lambda write: write.layer)), sinks=tuple(sinks), decoys=decoys, sink_logits=heads,
        attended_logits=attending, noise=noise, primary_position=int(rng.choice((0, 0, 0, 1, 2))), embedded=embedded,
    )  # fmt: skip


@dataclass
class _Columns:
    """Neurons not yet given away, in an order drawn for each layer."""

    rng: np.random.Generator
    shape: Shape
    architecture: Architecture

    def __post_init__(self):
        self.free: list[Iterator[int]] = [
            iter(self.rng.permutation(self.shape.d_mlp).tolist()) for _ in range(self.shape.n_layers)
        ]

    def few(self, layer: int) -> tuple[int, ...]:
        return self._take(layer, int(self.rng.integers(1, 5)))

    def eraser(self, layer: int) -> tuple[int, ...]:
        return self._take(layer, n_eraser_neurons(self.architecture))

    def _take(self, layer: int, n: int) -> tuple[int, ...]:
        return tuple(next(self.free[layer]) for _ in range(n))


def _primary_phases(rng: np.random.Generator, phases: str, n_layers: int) -> list[tuple[int, int]]:
    """(first, last) layer of every phase of the primary."""
    last = n_layers - 1 if rng.random() < 0.4 else n_layers - int(rng.integers(2, 4))
    if phases == "one":
        return [(int(rng.integers(0, 3)), last)]
    start = int(rng.integers(0, 2))
    end = start + int(rng.integers(2, 4))
    again = end + 1 + int(rng.integers(2, 4))  # a trough or gap of one layer is bridged
    return (
        [(start, end), (again, max(last, again + 2))]
        if phases == "apart"
        else [(start, again - 1), (again, max(last, again + 2))]
    )


def _plant_primary(rng: np.random.Generator, phases: str, lives: list[tuple[int, int]], columns: _Columns):
    n_layers = columns.shape.n_layers
    writes: list[Write] = []
    sinks: list[Sink] = []
    norm = float(rng.uniform(*PRIMARY_NORM))
    before, trough, after = FALL_NORMS
    for phase, (first, last) in enumerate(lives):
        fall = phases == "fall" and phase == 0
        eraser = last + 1 if last < n_layers - 1 else None
        risen = norm * (1 + phase)
        if phases == "fall":
            risen, eraser = (before, last - 1) if fall else (after, eraser)
        neurons = columns.few(first)
        left = trough if phases == "fall" and phase else 0.0
        writes.append(Write(first, PRIMARY, "sink", "form", neurons, risen - left))
        if eraser is not None:
            writes.append(
                Write(eraser, PRIMARY, "sink", "erase", columns.eraser(eraser), leave=trough if fall else 0.0)
            )
        forming, of = [first], [neurons]
        if left:
            forming, of = [lives[0][0], first], [sinks[0].neurons[0], neurons]
        redundancy = "residue" if left else "one"
        eraser = None if fall else eraser
        sinks.append(Sink(PRIMARY, "primary", first, last, tuple(forming), eraser, redundancy, tuple(of), risen))
    return writes, sinks


def _plant_secondary(
    rng: np.random.Generator, token: int, lives: list[tuple[int, int]], n_layers: int, columns: _Columns, sinks: list[Sink]
) -> tuple[list[Write], list[Sink]]:  # fmt: skip
    """One more kind of sink, of another level (l_start, lifetime) than those there are, in a phase of the primary."""
    for _ in range(1000):
        first, last = lives[int(rng.integers(len(lives)))]
        l_start = first if rng.random() < 0.2 else int(rng.integers(first + 1, last))
        l_end = int(rng.integers(l_start + 1, last + 1))
        redundancy = str(rng.choice(("one", "stand_in", "chain"), p=(0.5, 0.25, 0.25)))
        other = l_start + int(rng.integers(1, 3)) if redundancy == "stand_in" else l_start - int(rng.integers(1, 3))
        fits = redundancy == "one" or (0 <= other < l_end if redundancy == "stand_in" else other >= 0)
        levels = {(sink.l_start, sink.l_end) for sink in sinks}
        if fits and (l_start, l_end) not in levels:
            break
    else:
        raise ValueError(f"no room for secondary kind {token} in phases {lives} of {n_layers} layers")
    norm = float(rng.uniform(*NORM))
    if redundancy == "chain":
        start = float(rng.uniform(*CHAIN_START))
        parts = [(other, "form", start), (l_start, "amplify", norm - start)]
    elif redundancy == "stand_in":
        parts = [(l_start, "form", norm), (other, "stand_in", norm)]
    else:
        parts = [(l_start, "form", norm)]
    writes = [Write(layer, token, "sink", role, columns.few(layer), size) for layer, role, size in parts]
    eraser = l_end + 1 if l_end < n_layers - 1 else None
    forming, neurons = tuple(write.layer for write in writes), tuple(write.neurons for write in writes)
    if eraser is not None:
        writes.append(Write(eraser, token, "sink", "erase", columns.eraser(eraser)))
    kind = "primary-like" if l_start in {life[0] for life in lives} else "secondary"
    return writes, [Sink(token, kind, l_start, l_end, forming, eraser, redundancy, neurons, norm)]


def _embedded(rng: np.random.Generator, token: int, phases: str, lives: list[tuple[int, int]]):
    """A kind of token that holds the sink direction from the embedding on: a sink wherever the primary is one."""
    norm = float(rng.uniform(*NORM))
    if rng.random() > 0.3:
        return (), []
    own = [(lives[0][0], lives[-1][1])] if phases == "fall" else lives
    return ((token, norm),), [
        Sink(token, "primary-like", first, last, (), None, "none", (), norm) for first, last in own
    ]


def _decoys(
    rng: np.random.Generator, token: int, n_layers: int, columns: _Columns
) -> tuple[tuple[Decoy, ...], list[Write]]:
    decoys: list[Decoy] = []
    writes: list[Write] = []
    attended = bool(rng.random() < 0.5)  # the direction that "norm" and "oblique" share
    for kind, share in (("norm", 0.6), ("oblique", 0.3), ("opposite", 0.3), ("attention", 0.6)):
        layer, norm, here = int(rng.integers(0, n_layers - 4)), float(rng.uniform(*NORM)), rng.random() < share
        against = float(rng.uniform(*OPPOSITE_NORM))
        if not here:
            continue
        own = token + len(decoys)
        if kind == "norm":
            writes.append(Write(layer, own, "decoy", "form", columns.few(layer), norm))
        elif kind == "oblique":
            parts = ((layer, "decoy", OBLIQUE[1]), (layer + 1, "sink", OBLIQUE[0]))
            writes += [Write(at, own, feature, "form", columns.few(at), size * norm) for at, feature, size in parts]
        elif kind == "opposite":
            writes.append(Write(layer, own, "sink", "form", columns.few(layer), -against))
        looked_for = kind == "attention" or (attended and kind in ("norm", "oblique"))
        decoys.append(Decoy(own, kind, None if kind == "attention" else layer, looked_for))
    return tuple(decoys), writes


def _heads(rng: np.random.Generator, n_heads: int, logits: tuple[float, float]) -> tuple[tuple[int, float], ...]:
    chosen = np.flatnonzero(rng.random(n_heads) < 0.5)
    chosen = chosen if len(chosen) else np.array([int(rng.integers(n_heads))])
    return tuple((int(head), float(rng.uniform(*logits))) for head in chosen)
