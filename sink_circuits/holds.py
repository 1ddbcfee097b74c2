"""Holds: activations kept at their clean values in an edited run, so that what would have passed through them does not.

An edited run with holds shares its batch with an unedited row, row 0; a hold writes that row's activation into its own
row. So both rows come from the same kernels, and where nothing differs nothing changes, to the bit.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sink_circuits.adapters import Adapter
from sink_circuits.arguments import shown
from sink_circuits.edits import Edit, as_positions
from sink_circuits.errors import InputError

NORM_SCALE = "norm_scale"
HOLDABLE = ("q", "k", "v", "attn_out", "mlp_out", "resid_post", NORM_SCALE)
"""What can be held, as TransformerLens names it: queries, keys and values of every head, what attention and MLP add to
the residual stream, the residual stream behind a block, and the denominators of all norms in a block (`ln1.hook_scale` and so
on, post-norms and those of queries and keys among them): a norm with a held denominator is linear."""

Held = Callable[[Tensor, int], Tensor]
"""(activation, its axis of positions) -> the activation with row 0's values in the rows that hold it; axis 0 is the batch."""


@dataclass(frozen=True)
class Hold:
    """Keep `what` (`HOLDABLE`) at its clean value in these layers, at these positions.

    `layers`: None for all above the first edited one; lower ones among those named hold clean values anyway.
    `positions`: numbers, None for all, "treated" for those that the run edits, "others" for the rest. Where an edited MLP's output
    is held too, the edit is made of the clean contribution.
    """

    what: str
    layers: tuple[int, ...] | None = None
    positions: tuple[int, ...] | str | None = None

    def __post_init__(self):
        if not isinstance(self.what, str) or self.what not in HOLDABLE:
            raise InputError(f"{shown(self.what)} cannot be held: use one of {', '.join(HOLDABLE)}.")
        if self.layers is not None:
            object.__setattr__(self, "layers", as_positions(self.layers, "layer"))
            if not self.layers or min(self.layers) < 0 or len(set(self.layers)) < len(self.layers):
                raise InputError(f"a hold of layers {self.layers}: name each once, counted from 0, at least one.")
        if isinstance(self.positions, str):
            if self.positions not in ("treated", "others"):
                raise InputError(f"positions {self.positions!r} are unknown: use 'treated', 'others', numbers or None.")
        elif self.positions is not None:
            object.__setattr__(self, "positions", as_positions(self.positions))
            if not self.positions or min(self.positions) < 0:
                raise InputError(f"a hold at positions {self.positions}: count from 0, and name at least one.")

    @property
    def label(self) -> str:
        """How results name it: "k", "k at treated", "q in layers 6-9", "v in layers 3,5 at 40"."""
        words = [self.what]
        if self.layers is not None:
            first, last = min(self.layers), max(self.layers)
            whole = len(self.layers) == last - first + 1 > 1
            words.append(f"in layers {first}-{last}" if whole else f"in layers {','.join(map(str, self.layers))}")
        if self.positions is not None:
            at = self.positions if isinstance(self.positions, str) else ",".join(map(str, self.positions))
            words.append(f"at {at}")
        return " ".join(words)

    def check(self, edits: Sequence[Edit], n_layers: int, n_positions: int) -> None:
        """Raises InputError for layers or positions out of range, or when nothing that is held could have changed."""
        if self.layers is not None and max(self.layers) >= n_layers:
            raise InputError(f"layer {max(self.layers)} is out of range: the model has layers 0..{n_layers - 1}.")
        if isinstance(self.positions, tuple) and max(self.positions) >= n_positions:
            raise InputError(
                f"position {max(self.positions)} is out of range: the text has positions 0..{n_positions - 1}."
            )
        if not edits:
            raise InputError(f"the hold of {self.label!r} stands in a run without edits, which is clean: add an edit.")
        first_layer, first = min(e.layer for e in edits), min(p for e in edits for p in e.positions)
        if not self.reached(first_layer, n_layers):
            raise InputError(
                f"the hold of {self.label!r} reaches nothing: up to layer {first_layer}, the first edited one, all is clean; "
                "hold layers above it."
            )
        if isinstance(self.positions, tuple) and max(self.positions) < first:
            raise InputError(
                f"the hold of {self.label!r} reaches nothing: before position {first}, the first edited one, all is clean; "
                "hold later positions."
            )

    def reached(self, first_layer: int, n_layers: int) -> tuple[int, ...]:
        """The layers in which it holds anything: those above the first edited one."""
        layers = range(n_layers) if self.layers is None else self.layers
        return tuple(layer for layer in layers if first_layer < layer < n_layers)

    def index(self, edits: Sequence[Edit], start: int, n_positions: int) -> Tensor:
        """The held positions of an activation whose first position is `start`, counted from there."""
        treated = {p for edit in edits for p in edit.positions}
        if isinstance(self.positions, tuple):
            held: Iterable[int] = self.positions
        elif self.positions == "treated":
            held = sorted(treated)
        else:
            held = [p for p in range(n_positions) if self.positions is None or p not in treated]
        return torch.tensor([p - start for p in held if p >= start], dtype=torch.long)


def norm_scale_hooks(adapter: Adapter) -> tuple[str, ...]:
    """The hooks of a block's norm denominators, without the block: "ln1.hook_scale", "attn.q_norm.hook_scale".

    Raises InputError where they cannot be held: a model without such norms, blocks with different ones, or (HookedTransformer)
    normalised queries and keys, whose hooks do not know rows and positions.
    """
    pattern = re.compile(r"blocks\.(\d+)\.(.+\.hook_scale)")
    by_layer: list[list[str]] = [[] for _ in range(adapter.n_layers)]
    names: Iterable[str] = adapter.model.hook_dict  # type: ignore[assignment]
    for match in filter(None, map(pattern.fullmatch, names)):
        by_layer[int(match[1])].append(match[2])
    if not by_layer[0] or any(sorted(own) != sorted(by_layer[0]) for own in by_layer):
        raise InputError(
            f"norm scales cannot be held in {adapter.name}: its blocks have no norm hooks (hook_scale), or not all the same."
        )
    if type(adapter.model).__name__ == "HookedTransformer" and any("attn." in name for name in by_layer[0]):
        raise InputError(
            "norm scales cannot be held in a HookedTransformer that normalises queries and keys: use a TransformerBridge."
        )
    return tuple(sorted(by_layer[0]))


def _activations(hold: Hold, adapter: Adapter) -> tuple[str, ...]:
    """What a hold writes to in every layer."""
    return norm_scale_hooks(adapter) if hold.what == NORM_SCALE else (hold.what,)


def hold_functions(
    rows: Sequence[tuple[Sequence[Edit], Sequence[Hold]]], first_layer: int, start: int, adapter: Adapter, n_positions: int,
    counter: list[int],
) -> dict[int, dict[str, Held]]:  # fmt: skip
    """For every layer and activation that some row holds, the function that holds it; each adds its holds to `counter`."""
    cells: dict[int, dict[str, list[tuple[int, Tensor]]]] = {}
    for row, (edits, holds) in enumerate(rows):
        for hold in holds:
            index = hold.index(edits, start, n_positions)
            for layer in hold.reached(first_layer, adapter.n_layers):
                for what in _activations(hold, adapter):
                    cells.setdefault(layer, {}).setdefault(what, []).append((row, index))
    return {
        layer: {what: _function(what, members, counter, n_positions - start) for what, members in by_what.items()}
        for layer, by_what in cells.items()
    }


def _function(what: str, cells: Sequence[tuple[int, Tensor]], counter: list[int], n_positions: int) -> Held:
    return _of_scale(_held(cells, counter), n_positions) if what.endswith("hook_scale") else _held(cells, counter)


def _of_scale(held: Held, n_positions: int) -> Held:
    """Denominators stand on [batch, pos, 1], those of queries and keys on [batch, pos, head, 1] or [batch, head, pos, 1]."""

    def function(scale: Tensor, position_axis: int) -> Tensor:
        axes = [axis for axis in range(1, scale.ndim - 1) if scale.shape[axis] == n_positions]
        if len(axes) != 1:
            raise InputError(
                f"norm scales of shape {tuple(scale.shape)} do not show which axis counts the {n_positions} positions: they cannot be "
                "held here (norm_scales='recomputed'); a text of another length may do."
            )
        return held(scale, axes[0])

    return function


def _held(cells: Sequence[tuple[int, Tensor]], counter: list[int]) -> Held:
    waiting = list(range(len(cells)))  # HookedTransformer normalises queries', keys' and values' inputs one by one

    def function(activation: Tensor, position_axis: int) -> Tensor:
        held = activation.clone()  # activations alias live tensors
        view = held.movedim(position_axis, 1)
        for row, index in cells:
            view[row, index.to(held.device)] = view[0, index.to(held.device)]
        counter[0] += len(waiting)
        waiting.clear()
        return held

    return function


def n_held(rows: Sequence[tuple[Sequence[Edit], Sequence[Hold]]], first_layer: int, adapter: Adapter) -> int:
    """How often the functions of one pass must have held something."""
    return sum(
        len(hold.reached(first_layer, adapter.n_layers)) * len(_activations(hold, adapter))
        for _, holds in rows
        for hold in holds
    )


def hook_of(adapter: Adapter, what: str, layer: int) -> str:
    """TransformerLens' hook of an activation that can be held. Raises InputError where the model lacks it."""
    if what.endswith("hook_scale"):
        return f"blocks.{layer}.{what}"
    names = {"mlp_out": adapter.contribution_hook(layer)} | {x: f"blocks.{layer}.attn.hook_{x}" for x in "qkv"}
    name = names.get(what, f"blocks.{layer}.hook_{what}")
    if name not in adapter.model.hook_dict:
        raise InputError(f"{name} is not a hook of this model: {what!r} cannot be held on the reference path.")
    return name
