"""Interventions: small pure functions of an MLP's contribution at chosen positions, and how they enter a run.

`resid_post[layer][pos] = base + f(contribution)`: an `Edit` is a layer, positions and such an f. Anything that maps
[pos, d_model] to [pos, d_model] is an intervention; those below are the ones with names.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

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
        object.__setattr__(self, "positions", _positions(self.positions))
        object.__setattr__(self, "layer", _whole(self.layer, "layer"))
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


def _positions(positions: int | Sequence[int]) -> tuple[int, ...]:
    single = isinstance(positions, str) or not hasattr(positions, "__iter__") or getattr(positions, "ndim", 1) == 0
    return tuple(_whole(p, "position") for p in ([positions] if single else positions))


def _whole(value, what: str) -> int:
    try:
        return operator.index(value)  # also integers of numpy and torch
    except TypeError as error:
        raise InputError(
            f"{what} {value!r} is not a whole number: whole numbers, counted from 0, are needed."
        ) from error


def zero(layer: int, positions: int | Sequence[int]) -> Edit:
    """f(c) = 0: the MLP writes nothing. Zero ablation (Zhang & Nanda, 2309.16042, section 2)."""
    return Edit(layer, _positions(positions), torch.zeros_like, "zero", 0.0)


def keep(contribution: Contribution) -> Contribution:
    """f(c) = c. Experiments copy the clean outcomes instead of running edits that only keep."""
    return contribution


def rescale(layer: int, positions: int | Sequence[int], factor: float) -> Edit:
    """f(c) = factor * c. Raises InputError for a negative, NaN or infinite factor."""
    factor = check_factor(factor)
    return Edit(layer, _positions(positions), keep if factor == 1 else lambda c: c * factor, "rescale", factor)


def replace(
    layer: int, positions: int | Sequence[int], donor: Float[Tensor, "pos d_model"], name: str = "replace"
) -> Edit:
    """f(c) = donor: a contribution taken from elsewhere, one row per position (or one row for all).

    Mean ablation, resampling and patching are this with their donors. Raises InputError when the rows do not fit.
    """
    positions = _positions(positions)
    donor = donor.detach()
    rows = donor.expand(len(positions), -1) if donor.ndim == 1 or len(donor) == 1 else donor
    if len(rows) != len(positions):
        raise InputError(f"{len(rows)} donor rows for {len(positions)} positions: give one row, or one per position.")
    return Edit(layer, positions, lambda c: rows.to(c), name)


def check_factor(factor: float) -> float:
    """The factor as float; raises InputError unless it is finite and not negative."""
    try:
        value = float(factor)
    except (TypeError, ValueError) as error:
        raise InputError(f"factor {factor!r} is not a number.") from error
    if not math.isfinite(value) or value < 0:
        raise InputError(
            f"factor {factor} is not allowed: factors are finite and at least 0 (a negative one turns the contribution round)."
        )
    return value
