"""Edits: a layer, positions and a function of the contribution there, and how they enter a run.

`resid_post[layer][pos] = base + f(contribution)`: an `Edit` is a layer, positions and such an f. Anything that maps
[pos, d_model] to [pos, d_model] is an intervention (`custom`); those with names are in `interventions`.

The contribution is what the block adds to the residual stream: behind any norm that follows the MLP. Edits compose
(`compose`), windows of layers are tuples of edits (`window`), and a joint set is any tuple of edits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sink_circuits import arguments
from sink_circuits.arguments import is_whole, shown
from sink_circuits.errors import InputError

Contribution = Float[Tensor, "pos d_model"]


@dataclass(frozen=True)
class Edit:
    """Replace the contribution of MLP `layer` at `positions` by `function(contribution)`.

    `function` maps [pos, d_model] to the same shape, pure, one row per position in the order given. `name` and
    `parameter` describe it in results.
    """

    layer: int
    positions: tuple[int, ...]
    function: Callable[[Contribution], Contribution]
    name: str = "custom"
    parameter: float | None = None

    def __post_init__(self):
        object.__setattr__(self, "positions", as_positions(self.positions))
        object.__setattr__(self, "layer", as_whole(self.layer, "layer"))
        arguments.function(self.function, "the edit's function", "the contribution [pos, d_model]")
        arguments.text(self.name, "the edit's name")
        if self.parameter is not None:
            arguments.number(self.parameter, "the edit's parameter")
        if not self.positions:
            raise InputError(f"edit {self.name!r} of layer {self.layer} names no positions: give at least one.")
        if len(set(self.positions)) < len(self.positions):
            raise InputError(f"edit {self.name!r} of layer {self.layer} names a position twice: {self.positions}.")
        if min(self.positions) < 0:
            raise InputError(f"position {min(self.positions)} is negative: count from the first token, 0.")
        if self.layer < 0:
            raise InputError(f"layer {self.layer} is negative: count from the first block, 0.")

    @property
    def changes_nothing(self) -> bool:
        """True for an edit that is known to leave every contribution as it is: a rescaling by 1."""
        return self.function is keep

    def check(self, n_layers: int, n_positions: float) -> None:
        """Raises InputError when the layer or a position lies outside the model or the text."""
        if self.layer >= n_layers:
            raise InputError(f"layer {self.layer} is out of range: the model has layers 0..{n_layers - 1}.")
        if max(self.positions) >= n_positions:
            raise InputError(
                f"position {max(self.positions)} is out of range: the text has positions 0..{n_positions - 1:.0f}."
            )

    def apply(self, contribution: Float[Tensor, "pos d_model"]) -> Float[Tensor, "pos d_model"]:
        """`function`, with its answer held to the contract: same shape, finite. Raises InputError otherwise."""
        edited = self.function(contribution)
        if not isinstance(edited, Tensor) or edited.shape != contribution.shape:
            shape = tuple(edited.shape) if isinstance(edited, Tensor) else type(edited).__name__
            raise InputError(
                f"edit {self.name!r} returned {shape} for a contribution of shape {tuple(contribution.shape)}: return the same shape."
            )
        if edited.is_complex():
            raise InputError(f"edit {self.name!r} of layer {self.layer} returned complex values: return real ones.")
        if torch.isfinite(edited).all() and not edited.float().square().sum(dim=-1).isfinite().all():
            raise InputError(
                f"edit {self.name!r} of layer {self.layer} made a contribution too long to square (norm above 1e19), which norm "
                "layers must: use smaller values."
            )
        if not torch.isfinite(edited).all():
            raise InputError(
                f"edit {self.name!r} of layer {self.layer} returned NaN or infinite values: return finite ones."
            )
        return edited.to(contribution.dtype)

    def written_into(
        self, contributions: Float[Tensor, "all_pos d_model"], first: int = 0
    ) -> Float[Tensor, "all_pos d_model"]:
        """A copy of one text's contributions, whose first row is position `first`, with this edit made."""
        index = torch.tensor(self.positions, device=contributions.device) - first
        edited = contributions.clone()
        edited[index] = self.apply(contributions[index])
        return edited

    def hooks(self, model) -> list[tuple[str, Callable]]:
        """`fwd_hooks` for the user's own `model.run_with_hooks(tokens, fwd_hooks=edit.hooks(model))`.

        The edit is made in every row of the batch, at these positions of the tensor as given. Raises InputError before
        the run for a layer that the model lacks, and in the run for a position beyond its text.
        """
        self.check(model.cfg.n_layers, math.inf)

        def hook(contributions: Tensor, hook) -> Tensor:
            self.check(model.cfg.n_layers, contributions.shape[1])
            return torch.stack([self.written_into(row) for row in contributions])

        return [(f"blocks.{self.layer}.hook_mlp_out", hook)]


def as_positions(positions, what: str = "position") -> tuple[int, ...]:
    single = (
        isinstance(positions, str | bytes) or not hasattr(positions, "__iter__") or getattr(positions, "ndim", 1) == 0
    )
    return tuple(as_whole(p, what) for p in ([positions] if single else positions))


def as_whole(value, what: str) -> int:
    if not is_whole(value):
        raise InputError(f"{what} {shown(value)} is not a whole number: whole numbers, counted from 0, are needed.")
    return int(value)


def keep(contribution: Contribution) -> Contribution:
    """f(c) = c. Experiments copy the clean outcomes instead of running edits that only keep."""
    return contribution


def custom(
    layer: int, positions: int | Sequence[int], function: Callable[[Contribution], Contribution],
    name: str | None = None, parameter: float | None = None,
) -> Edit:  # fmt: skip
    """A function of your own, [pos, d_model] -> [pos, d_model], pure; `name` is the function's own unless given."""
    arguments.function(function, "function", "the contribution [pos, d_model]")
    name = getattr(function, "__name__", "custom") if name is None else name
    return Edit(layer, as_positions(positions), function, name, parameter)


def compose(*edits: Edit) -> Edit:
    """One after the other at one layer and the same positions: f(c) = last(...(first(c))).

    A run takes one edit per layer and position; this joins several. Raises InputError when layers or positions differ.
    """
    if not edits:
        raise InputError("compose was given no edits: give at least one.")
    first = edits[0]
    for edit in edits:
        arguments.instance(edit, "an edit to compose", Edit, "make it with zero(), rescale(), custom(), ...")
        if (edit.layer, edit.positions) != (first.layer, first.positions):
            raise InputError(
                f"edits of layer {first.layer} at {first.positions} and of layer {edit.layer} at {edit.positions} do "
                "not compose: give the same layer and positions, or hand both to the run as a tuple."
            )
    working = [edit for edit in edits if not edit.changes_nothing]
    if len(working) < 2:
        return working[0] if working else first

    def function(contribution: Contribution) -> Contribution:
        for edit in working:
            contribution = edit.apply(contribution)
        return contribution

    return Edit(first.layer, first.positions, function, " then ".join(edit.name for edit in working))


def window(layers: Iterable[int], make: Callable[[int], Edit]) -> tuple[Edit, ...]:
    """A joint set over layers: `window(range(6, 9), lambda layer: zero(layer, 40))` edits 6, 7 and 8 in one run.

    Layers above the first get the edited run's own contribution: a function of it (zero, rescale, a direction) acts on
    what is there, a donor replaces it by what was noted. Raises InputError for no layers or one named twice.
    """
    layers = [as_whole(layer, "layer") for layer in arguments.several(layers, "layers", empty=True)]
    arguments.function(make, "make", "the layer")
    if not layers or len(set(layers)) < len(layers):
        raise InputError(f"layers {layers}: name each layer of a window once, and at least one.")
    return tuple(make(layer) for layer in layers)
