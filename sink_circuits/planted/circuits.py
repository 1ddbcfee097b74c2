"""What is planted: writes, sinks, decoys, and the recipe of a whole model. Plain data; nothing here knows a model.

The residual stream is spanned by an orthonormal set of named directions, the features, and, orthogonal to them, a noise
space in which tokens differ. Every token carries `shared`; a special token carries a feature of its own, "is <token id>".
"""

from __future__ import annotations

import hashlib
import operator
from dataclasses import dataclass

import torch
from torch import Tensor

from sink_circuits import arguments
from sink_circuits.errors import InputError

SHARED_NORM, FEATURE_NORM, NOISE_NORM = 10.0, 3.0, 2.0
"""Norms of the parts of an embedding: the shared direction, a special token's own feature, noise."""

FIXED_FEATURES = ("shared", "sink", "decoy")


@dataclass(frozen=True)
class Shape:
    """Sizes of a planted model. `window`: of sliding-window layers, in the variants that have them."""

    n_layers: int
    n_heads: int = 4
    n_key_heads: int = 2
    d_head: int = 16
    d_model: int = 64
    d_mlp: int = 64
    d_vocab: int = 64
    n_ctx: int = 128
    window: int | None = None


@dataclass(frozen=True)
class Write:
    """What one MLP adds at one kind of token along one feature, through the neurons with these indices.

    `role`: "form" reads the token's own feature; "stand_in" does too, its amount set as if nothing stood along the
    feature yet, so that it is worth a whole sink alone; "amplify" fires only where something stands along the feature
    already, at this kind of token; "erase" takes what stands there down to `leave`, whatever `norm` says.
    `spares`: tokens that may be in sink state too, which "amplify" and "erase" leave alone.
    """

    layer: int
    token: int
    feature: str
    role: str
    neurons: tuple[int, ...]
    norm: float = 0.0
    leave: float = 0.0
    spares: tuple[int, ...] = ()


@dataclass(frozen=True)
class Sink:
    """One planted life of a kind of sink: tokens with id `token` are in sink state after blocks l_start..l_end.

    `kind`: "primary", "secondary" or "primary-like". `forming`: the MLPs whose joint removal takes it away, `neurons` of
    each. `redundancy`: "one" MLP forms it; "stand_in": each of two is enough; "chain": the second only adds where the
    first has written, so that both are needed; "residue": what an earlier phase left is enough too; "none": it stands in
    the embedding, no MLP forms it. `eraser`: the MLP that ends it (None: it lives as long as the primary). `norm`: of
    what stands along the sink direction once it is formed.
    """

    token: int
    kind: str
    l_start: int
    l_end: int
    forming: tuple[int, ...]
    eraser: int | None
    redundancy: str = "one"
    neurons: tuple[tuple[int, ...], ...] = ()
    norm: float = 0.0

    @property
    def layers(self) -> list[int]:
        return list(range(self.l_start, self.l_end + 1))


@dataclass(frozen=True)
class Decoy:
    """A kind of token that is no sink. `kind`: "norm": a massive vector along another direction, from MLP `layer` on;
    "oblique": along both, neither near the sink direction nor far from it; "opposite": against the sink direction;
    "attention": drawn for what its embedding holds, by heads that no MLP serves (`layer` None). `attended`: whether
    heads look for it by something else than the sink direction.
    """

    token: int
    kind: str
    layer: int | None
    attended: bool


@dataclass(frozen=True)
class Recipe:
    """Everything a planted model is made from. Random numbers are drawn from `name`.

    `n_special`: token ids below it are special, those above are ordinary. `sink_logits`: (head, attention logit of a
    saturated sink), the same in every layer; ordinary tokens get about 0. `attended_logits`: the same for heads that look
    for attended decoys. `noise`: size of what blocks add to the noise space; an `Architecture.loud` of it makes ordinary
    tokens' norm grow from 10 to 12 or 13. `shared` False leaves the shared direction out. `embedded`: (token, norm) of
    what stands along the sink direction from the embedding on.
    """

    name: str
    variant: str
    shape: Shape
    n_special: int
    writes: tuple[Write, ...]
    sinks: tuple[Sink, ...]
    decoys: tuple[Decoy, ...] = ()
    sink_logits: tuple[tuple[int, float], ...] = ((0, 7.0), (1, 6.0))
    attended_logits: tuple[tuple[int, float], ...] = ()
    noise: float = 1.0
    shared: bool = True
    primary_position: int = 0
    embedded: tuple[tuple[int, float], ...] = ()

    def features(self) -> tuple[str, ...]:
        return (*FIXED_FEATURES, *(own_feature(token) for token in range(self.n_special)))

    def generator(self, what: str) -> torch.Generator:
        """A generator whose seed is derived from names: the same numbers in every process, whatever ran before."""
        return generator(f"{self.name}/{what}" if self.name else what)


@dataclass(frozen=True, eq=False)
class Truth:
    """What was planted. Directions are unit vectors [d_model]; `sink_heads` are the same heads in every layer.

    `primary_position`: where prompts hold the primary (None: no primary). `ordinary_norms`: median norm of ordinary
    tokens' residual stream as each layer's MLP reads it: what noise has added up to there (for closed forms).
    """

    sinks: tuple[Sink, ...]
    primary_position: int | None
    decoy_layer: int | None
    eraser_layers: tuple[int, ...]
    sink_heads: tuple[int, ...]
    direction: Tensor
    decoy_direction: Tensor
    shared_direction: Tensor
    sink_logits: tuple[tuple[int, float], ...]
    decoys: tuple[Decoy, ...]
    noise: float
    ordinary_norms: tuple[float, ...]

    def sink(self, kind: str) -> Sink:
        """The first planted sink of this kind ("primary", "secondary" or "primary-like"). Raises InputError."""
        planted = list(dict.fromkeys(sink.kind for sink in self.sinks))
        arguments.one_of(kind, "kind", planted, "here are planted: {}")
        return next(sink for sink in self.sinks if sink.kind == kind)

    def lives(self, tokens: Tensor) -> list[tuple[int, Sink]]:
        """(position, sink) of every life of every sink that these tokens [pos] hold."""
        given = tokens.tolist() if hasattr(tokens, "tolist") else tokens
        ids = [arguments.whole(token, "token") for token in arguments.several(given, "tokens")]
        return [(pos, sink) for pos, token in enumerate(ids) for sink in self.sinks if sink.token == token]


def own_feature(token: int) -> str:
    return f"is {token}"


def name_of(name: str | int) -> str:
    """What random numbers are drawn from, as text. Raises InputError for what has no text of its own."""
    if not isinstance(name, str) and not arguments.is_whole(name):
        raise InputError(f"name = {arguments.shown(name)}: give a text or a whole number.")
    text = name if isinstance(name, str) else str(operator.index(name))
    return text.encode("utf-8", "backslashreplace").decode()


def generator(name: str) -> torch.Generator:
    seed = int.from_bytes(hashlib.sha256(f"planted/{name_of(name)}".encode()).digest()[:7], "big")
    return torch.Generator().manual_seed(seed)
