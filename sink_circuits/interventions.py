"""Interventions with names: small pure functions of an MLP's contribution at chosen positions, each made into an `Edit`.

In their formulas c is the contribution at one position, a vector [d_model], and |c| its Euclidean norm.

Sources: Zhang & Nanda, 2309.16042 (kinds of ablation and corruption); Heimersheim & Nanda, 2404.15255 (noising,
denoising, what each can show); Wong et al., 2512.22213 (the contribution's direction and norm make the sink).
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sink_circuits import arguments
from sink_circuits.arguments import is_number, shown
from sink_circuits.clean_runs import CleanRun
from sink_circuits.edits import Contribution, Edit, as_positions, as_whole, keep
from sink_circuits.errors import InputError
from sink_circuits.statistics import seed_of


def zero(layer: int, positions: int | Sequence[int]) -> Edit:
    """f(c) = 0: the MLP writes nothing. Zero ablation (Zhang & Nanda, 2309.16042, section 2)."""
    return Edit(layer, as_positions(positions), torch.zeros_like, "zero", 0.0)


def rescale(layer: int, positions: int | Sequence[int], factor: float) -> Edit:
    """f(c) = factor * c. Raises InputError for a negative, NaN or infinite factor."""
    factor = check_factor(factor)
    return Edit(layer, as_positions(positions), keep if factor == 1 else lambda c: c * factor, "rescale", factor)


def replace(
    layer: int, positions: int | Sequence[int], donor: Float[Tensor, "pos d_model"], name: str = "replace"
) -> Edit:
    """f(c) = donor: a contribution taken from elsewhere, one row per position (or one row for all).

    Mean ablation, resampling and patching are this with their donors. Raises InputError when the rows do not fit.
    """
    positions = as_positions(positions)
    rows = _donor_rows(donor, positions)
    return Edit(layer, positions, lambda c: rows.to(c), name)


# Norm and direction. Where a vector of norm 0 would have to give a direction, InputError says so; where it gives a
# norm, the result is 0. Half precision is computed in float32 and rounded once.


def set_norm(layer: int, positions: int | Sequence[int], norm: float) -> Edit:
    """f(c) = norm * c/|c|: the norm alone, the direction kept (Wong et al., 2512.22213: the norm sets the sink score).

    Raises InputError for a negative or infinite norm, and in the run where c = 0 is to be given a norm above 0.
    """
    norm = _norm(norm)
    function = torch.zeros_like if norm == 0 else lambda c: norm * _unit(_wide(c), f"set_norm at layer {layer}")
    return Edit(layer, as_positions(positions), function, "set_norm", norm)


def swap_norm(layer: int, positions: int | Sequence[int], donor: Float[Tensor, "pos d_model"]) -> Edit:
    """f(c) = |donor| * c/|c|: the donor's norm, its own direction; one donor row per position, or one for all.

    A donor of norm 0 gives 0. Raises InputError for rows that do not fit, and in the run where c = 0 and donor is not.
    """
    positions = as_positions(positions)
    donors = _donor_rows(donor, positions)
    norms = _wide(donors).norm(dim=-1, keepdim=True)

    def function(c: Contribution) -> Contribution:
        wide = _wide(c)
        _same_width(wide, donors, "the donor")
        wanted = norms.to(wide)
        return wanted * _unit(wide, f"swap_norm at layer {layer}", needed=wanted[:, 0] > 0)

    return Edit(layer, positions, function, "swap_norm")


def swap_direction(layer: int, positions: int | Sequence[int], donor: Float[Tensor, "pos d_model"]) -> Edit:
    """f(c) = |c| * donor/|donor|: the donor's direction, its own norm; one donor row per position, or one for all.

    c = 0 stays 0. Raises InputError for rows that do not fit and for a donor of norm 0.
    """
    positions = as_positions(positions)
    units = _unit(_wide(_donor_rows(donor, positions)), f"the donor of swap_direction at layer {layer}")

    def function(c: Contribution) -> Contribution:
        wide = _wide(c)
        return wide.norm(dim=-1, keepdim=True) * units.to(wide)

    return Edit(layer, positions, function, "swap_direction")


def remove_direction(layer: int, positions: int | Sequence[int], direction: Float[Tensor, " d_model"]) -> Edit:
    """f(c) = c - (c.u) u with u = direction/|direction|: what is written along the direction is taken out.

    With the primary direction of that layer: is it this that makes the sink? (Wong et al., 2512.22213: contributions
    align with the primary sink.) The rest's norm is smaller, which alone may tell: compare with `set_norm`. Raises
    InputError for a direction of norm 0.
    """
    unit = _direction(direction)
    return Edit(layer, as_positions(positions), lambda c: _wide(c) - _along(c, unit), "remove_direction")


def keep_direction(layer: int, positions: int | Sequence[int], direction: Float[Tensor, " d_model"]) -> Edit:
    """f(c) = (c.u) u with u = direction/|direction|: only what is written along it, sign included.

    It and `remove_direction` add up to c. Raises InputError for a direction of norm 0.
    """
    unit = _direction(direction)
    return Edit(layer, as_positions(positions), lambda c: _along(c, unit), "keep_direction")


def random_direction(
    layer: int, positions: int | Sequence[int], *names, orthogonal_to: Float[Tensor, " d_model"] | None = None
) -> Edit:
    """f(c) = |c| * r, r uniform on the unit sphere: the same norm, no direction of its own. c = 0 stays 0.

    Drawn from `names`, the layer and the position: a position gets the same direction alone and among others.
    `orthogonal_to` takes that direction out of r first: in few dimensions r is not far from everything (|cosine| of
    about 1/sqrt(d_model)). A control for direction (Heimersheim & Nanda, 2404.15255, on what a patch can show).
    """
    positions = as_positions(positions)
    barred = None if orthogonal_to is None else _direction(orthogonal_to)

    def function(c: Contribution) -> Contribution:
        wide = _wide(c)
        drawn = torch.stack([_gaussian(c.shape[-1], "direction", *names, layer, position) for position in positions])
        drawn = drawn.to(wide)
        if barred is not None:
            drawn = drawn - _along(drawn, barred)
        return wide.norm(dim=-1, keepdim=True) * _unit(drawn, "random_direction")

    return Edit(layer, positions, function, "random_direction")


def random_perturbation(edit: Edit, *names) -> Edit:
    """f(c) = c + |edit(c) - c| * r, r uniform on the unit sphere: a change of the same size, in no direction of its own.

    The control for "any disturbance of that size would do". Drawn from `names`, the layer and the position, as in
    `random_direction`. An edit that changes nothing stays one.
    """
    if edit.changes_nothing:
        return edit

    def function(c: Contribution) -> Contribution:
        wide = _wide(c)
        drawn = [_gaussian(c.shape[-1], "perturbation", *names, edit.layer, position) for position in edit.positions]
        size = (_wide(edit.apply(c)) - wide).norm(dim=-1, keepdim=True)
        return wide + size * _unit(torch.stack(drawn).to(wide), "random_perturbation")

    return Edit(edit.layer, edit.positions, function, f"random_perturbation of {edit.name}")


def write_along(layer: int, positions: int | Sequence[int], direction: Float[Tensor, " d_model"], norm: float) -> Edit:
    """f(c) = norm * direction/|direction|, whatever c was. Raises InputError for a norm below 0 or a direction of norm 0."""
    norm, unit = _norm(norm), _direction(direction)
    return Edit(layer, as_positions(positions), lambda c: (norm * unit).to(c).expand_as(c), "write_along", norm)


# Donors: contributions of clean runs. A run is of one text; `contribution` is [layer, pos, d_model].


def contribution_of(run: CleanRun, layer: int, positions: int | Sequence[int]) -> Contribution:
    """Rows [pos, d_model] that MLP `layer` adds in this run. Raises InputError outside the model or text."""
    _check_donor_run(run)
    positions = as_positions(positions)
    Edit(layer, positions, keep, "donor").check(len(run.contribution), len(run.tokens))
    return run.contribution[as_whole(layer, "layer")][list(positions)]


def _check_donor_run(run) -> None:
    if getattr(run, "contribution", None) is None:  # not a run at all, or one that nothing can be resumed from
        what = "this clean run" if hasattr(run, "resid_post") else shown(run)
        raise InputError(f"{what} holds no contributions: make it with run_clean(model, tokens), resumable.")


def patch(
    layer: int, positions: int | Sequence[int], run: CleanRun, source: int | Sequence[int] | None = None,
    name: str = "patch",
) -> Edit:  # fmt: skip
    """f(c) = the contribution of the same MLP at `source` in `run`: another position, prompt or run.

    `source`: one position for all, or one for each (None: the same positions). Interchange intervention, activation
    patching (Zhang & Nanda, 2309.16042, section 2). Raises InputError for positions that are not there.
    """
    positions = as_positions(positions)
    source = positions if source is None else as_positions(source)
    return replace(layer, positions, contribution_of(run, layer, source), name)


def noising(
    layer: int, positions: int | Sequence[int], corrupted: CleanRun, source: int | Sequence[int] | None = None
) -> Edit:
    """For a run of the CLEAN prompt: its contribution is overwritten by the CORRUPTED run's (corrupted -> clean).

    If the sink goes, the contribution was necessary (Heimersheim & Nanda, 2404.15255). `source`: where in
    the corrupted text, when its positions are others. Otherwise as `patch`.
    """
    return patch(layer, positions, corrupted, source, "noising")


def denoising(
    layer: int, positions: int | Sequence[int], clean: CleanRun, source: int | Sequence[int] | None = None
) -> Edit:
    """For a run of the CORRUPTED prompt: its contribution is overwritten by the CLEAN run's (clean -> corrupted).

    If the sink comes back, the contribution was sufficient there (Heimersheim & Nanda, 2404.15255).
    `source`: where in the clean text, when its positions are others. Otherwise as `patch`.
    """
    return patch(layer, positions, clean, source, "denoising")


def transplant(layer: int, positions: int | Sequence[int], run: CleanRun, sink: int) -> Edit:
    """f(c) = what MLP `layer` writes at position `sink` of `run`: write it at tokens that are no sinks.

    Sufficiency: do they become sinks? (Wong et al., 2512.22213: the MLP's output makes the sink.) The token's own
    contribution is replaced. Raises InputError for a position that is not there.
    """
    return patch(layer, positions, run, _one(sink), "transplant")


def transplant_norm(
    layer: int, positions: int | Sequence[int], run: CleanRun, sink: int, direction: Float[Tensor, " d_model"]
) -> Edit:
    """f(c) = |c_sink| * direction/|direction|: only the norm of a sink's contribution, written along a direction.

    With the layer's primary direction: are norm and primary direction alone enough? Raises InputError as `transplant`
    and `write_along`.
    """
    norm = _wide(contribution_of(run, layer, _one(sink))).norm().item()
    edit = write_along(layer, positions, direction, norm)
    return Edit(edit.layer, edit.positions, edit.function, "transplant_norm", norm)


def mean_over_corpus(
    layer: int, positions: int | Sequence[int], corpus: Iterable[CleanRun], counted: Iterable[Tensor] | None = None
) -> Edit:
    """f(c) = mean contribution of this MLP over all positions of the corpus (Zhang & Nanda, 2309.16042, section 2).

    `counted`: for each run which positions count, Bool [pos]; leave the sinks out, or the mean holds what is to be
    removed. Raises InputError when none count.
    """
    total, count = None, 0
    for run, mask in _with_masks(corpus, counted):
        where = mask.nonzero().flatten().tolist()
        if where:
            own = contribution_of(run, layer, where).double().sum(dim=0)
            total, count = own if total is None else total + own, count + len(where)
    if not count:
        raise InputError("no position of the corpus counts: give longer texts, or masks that leave some.")
    return replace(layer, positions, total / count, "mean_over_corpus")


def mean_over_same_token(
    layer: int, positions: int | Sequence[int], run: CleanRun, corpus: Iterable[CleanRun] = (),
    counted: Iterable[Tensor] | None = None,
) -> Edit:  # fmt: skip
    """f(c) = mean contribution over the other occurrences of the same token id, in the treated text `run` and `corpus`.

    So the token stays what it is and only its context is averaged out. Contexts that repeat count once and the
    position's own never: a causal model writes the same after the same prefix, a BOS always. `counted`: for each run of
    the corpus which positions count, Bool [pos]; given it, those of `run` count only if it is in the corpus. Raises
    InputError when no other occurrence counts.
    """
    positions = as_positions(positions)
    occurrences = _Occurrences.of(layer, positions, run, corpus, counted)
    means = [torch.cat(occurrences.others(position)).double().mean(dim=0) for position in positions]
    return replace(layer, positions, torch.stack(means), "mean_over_same_token")


def resample(
    layer: int, positions: int | Sequence[int], run: CleanRun, corpus: Iterable[CleanRun] = (), *, name: str,
    counted: Iterable[Tensor] | None = None,
) -> Edit:  # fmt: skip
    """f(c) = the contribution of another occurrence of the same token id, drawn from `name`: resample ablation.

    A derangement: all occurrences (as in `mean_over_same_token`) are laid in a circle in an order drawn from `name`
    and each takes the next one that counts; no position gets its own, and where all count no two get the same. The
    donor depends neither on the layer (a window takes one occurrence's) nor on what else is treated. Zhang & Nanda,
    2309.16042; Heimersheim & Nanda, 2404.15255. Raises InputError when no other occurrence counts.
    """
    positions = as_positions(positions)
    arguments.instance(name, "name", str, "the donor is drawn from a text, such as the prompt's id")
    occurrences = _Occurrences.of(layer, positions, run, corpus, counted)
    order = functools.partial(seed_of, "resample", name)
    return replace(layer, positions, torch.cat([occurrences.others(p, order)[0] for p in positions]), "resample")


# Neurons. An MLP's output is a sum over its neurons: post @ W_out (+ b_out).


def neuron_contribution(
    post: Float[Tensor, "pos d_mlp"], W_out: Float[Tensor, "d_mlp d_model"], neurons: Sequence[int],
    instead: Float[Tensor, " d_mlp"] | None = None,
) -> Contribution:  # fmt: skip
    """What these neurons write: sum over n of (post[:, n] - instead[n]) * W_out[n], [pos, d_model].

    `post`: activations after the non-linearity (and the gate's product), the down-projection's input; `W_out` as
    TransformerLens has it (Hugging Face's `down_proj.weight` is its transpose). `instead`: what the neurons are set to
    when the result is taken off, 0 when None, their mean activations [d_mlp] for mean ablation. Before any norm that
    follows the MLP. Raises InputError for shapes that do not fit or a neuron out of range or named twice.
    """
    if post.ndim != 2 or W_out.ndim != 2 or post.shape[1] != W_out.shape[0]:
        raise InputError(
            f"activations {tuple(post.shape)} and weights {tuple(W_out.shape)} do not fit: give [pos, d_mlp] and [d_mlp, d_model]."
        )
    chosen = [as_whole(neuron, "neuron") for neuron in arguments.several(neurons, "neurons", empty=True)]
    if len(set(chosen)) < len(chosen) or any(not 0 <= neuron < len(W_out) for neuron in chosen):
        raise InputError(f"neurons {chosen[:8]}: name each once, in 0..{len(W_out) - 1}.")
    if instead is not None and instead.shape != post.shape[1:]:
        raise InputError(f"`instead` has shape {tuple(instead.shape)}: give one activation per neuron, [{len(W_out)}].")
    excess = post[:, chosen] if instead is None else post[:, chosen] - instead.to(post)[chosen]
    return excess @ W_out[chosen]


def part_through_norm(
    pre_norm: Float[Tensor, "pos d_model"], part: Float[Tensor, "pos d_model"], norm: Callable[[Tensor], Tensor]
) -> Contribution:
    """norm(pre_norm) - norm(pre_norm - part): what taking `part` out before a norm takes out of the contribution.

    For models with a norm between the MLP and the residual stream (Gemma 2 and 3, OLMo 2): there the contribution is
    norm(output), no sum over neurons, and `part` itself would be wrong in scale and, through the norm of what is left,
    in direction. `pre_norm`: the MLP's output before that norm; `norm`: the model's module, positions by themselves.
    """
    if pre_norm.shape != part.shape:
        raise InputError(f"the part is {tuple(part.shape)}, the output {tuple(pre_norm.shape)}: give the same shape.")
    return norm(pre_norm) - norm(pre_norm - part)


def without_neurons(layer: int, positions: int | Sequence[int], part: Float[Tensor, "pos d_model"]) -> Edit:
    """f(c) = c - part, `part` from `neuron_contribution`, through `part_through_norm` where a norm follows the MLP.

    `part` is of the clean run: exact where the contribution is the clean one (the first edited layer at that position);
    above it the neurons of the edited run have other activations, and what is taken off is the clean amount. Raises
    InputError when the rows do not fit.
    """
    positions = as_positions(positions)
    rows = _donor_rows(part, positions)
    return Edit(layer, positions, lambda c: c - rows.to(c), "without_neurons")


def check_factor(factor: float) -> float:
    """The factor as float; raises InputError unless it is finite and not negative."""
    if not is_number(factor):
        raise InputError(f"factor {shown(factor)} is not a number: give a finite one of at least 0.")
    value = float(factor)
    if not math.isfinite(value) or value < 0:
        raise InputError(
            f"factor {factor} is not allowed: factors are finite and at least 0 (a negative one turns the contribution round)."
        )
    return value


def _norm(norm: float) -> float:
    if not is_number(norm):
        raise InputError(f"norm {shown(norm)} is not a number: give a finite one of at least 0.")
    value = float(norm)
    if not math.isfinite(value) or value < 0:
        raise InputError(f"norm {norm} is not allowed: norms are finite and at least 0.")
    return value


def _one(position: int) -> int:
    return as_whole(position, "the sink's position")


def _donor_rows(donor: Float[Tensor, "pos d_model"], positions: tuple[int, ...]) -> Contribution:
    """One row per position, of one row for all or as many as there are positions."""
    donor = _vectors(donor, "a donor")
    if donor.ndim not in (1, 2) or not donor.numel():
        raise InputError(
            f"a donor of shape {tuple(donor.shape)} has no rows to give: give [d_model] or [pos, d_model]."
        )
    rows = donor.expand(len(positions), -1) if donor.ndim == 1 or len(donor) == 1 else donor
    if len(rows) != len(positions):
        raise InputError(f"{len(rows)} donor rows for {len(positions)} positions: give one row, or one per position.")
    return rows


def _vectors(given, what: str) -> Tensor:
    """A tensor of real numbers, no part of a graph."""
    if not isinstance(given, Tensor) or given.is_complex() or given.dtype == torch.bool:
        raise InputError(f"{what} is {shown(given)}: give a tensor of real numbers, [d_model] or [pos, d_model].")
    return given.detach()


def _same_width(rows: Contribution, given: Tensor, what: str) -> None:
    """Broadcasting would take a vector of width 1 without a word; a donor's norm is one of any width."""
    if rows.shape[-1] != given.shape[-1]:
        raise InputError(f"{what} has {given.shape[-1]} entries, the contribution {rows.shape[-1]}: give [d_model].")


def _wide(rows: Tensor) -> Tensor:
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


def _unit(rows: Float[Tensor, "pos d_model"], what: str, needed: Tensor | None = None) -> Float[Tensor, "pos d_model"]:
    """Rows of norm 1, and 0 for rows of 0 that are not `needed` (None: all are; then InputError)."""
    largest = rows.abs().amax(dim=-1, keepdim=True)  # first, so that no square under- or overflows
    if ((largest[:, 0] == 0) & (True if needed is None else needed)).any():
        raise InputError(f"{what} needs a direction and was given a vector of norm 0: leave this position out.")
    scaled = rows / largest.where(largest > 0, 1)
    return scaled / scaled.norm(dim=-1, keepdim=True).where(largest > 0, 1)


def _direction(direction: Float[Tensor, " d_model"]) -> Float[Tensor, " d_model"]:
    direction = _vectors(direction, "a direction")
    if direction.ndim != 1:
        raise InputError(f"a direction of shape {tuple(direction.shape)} is not one vector: give [d_model].")
    if not torch.isfinite(direction).all() or not direction.any():
        raise InputError("the direction is zero, NaN or infinite: give a vector that points somewhere.")
    return _unit(_wide(direction)[None], "the direction")[0]


def _along(rows: Float[Tensor, "pos d_model"], unit: Float[Tensor, " d_model"]) -> Float[Tensor, "pos d_model"]:
    wide = _wide(rows)
    _same_width(wide, unit, "the direction")
    unit = unit.to(wide)
    return (wide * unit).sum(dim=-1, keepdim=True) * unit


def _gaussian(size: int, *names) -> Float[Tensor, " size"]:
    generator = torch.Generator().manual_seed(seed_of(*names))
    return torch.randn(size, generator=generator, dtype=torch.float64)


def _with_masks(corpus: Iterable[CleanRun], counted: Iterable[Tensor] | None) -> Iterator[tuple[CleanRun, Tensor]]:
    """Each run with its mask; one run at a time, so that a corpus may be a generator."""
    arguments.iterable(corpus, "corpus", "give a list of clean runs")
    if counted is not None:
        arguments.iterable(counted, "counted", "give one mask [pos] for each run of the corpus")
    masks = None if counted is None else iter(counted)
    for run in corpus:
        _check_donor_run(run)
        mask = torch.ones(len(run.tokens), dtype=torch.bool) if masks is None else next(masks, None)
        if mask is None:
            raise InputError("there are fewer masks than runs: give one mask [pos] for each run of the corpus.")
        if not isinstance(mask, Tensor):
            raise InputError(f"the mask {shown(mask)} is no tensor: give Bool [pos].")
        if mask.dtype != torch.bool or mask.shape != run.tokens.shape:
            raise InputError(
                f"a mask {mask.dtype} of shape {tuple(mask.shape)} for {len(run.tokens)} tokens: give Bool [pos]."
            )
        yield run, mask.cpu()
    if masks is not None and next(masks, None) is not None:
        raise InputError("there are more masks than runs: give one mask [pos] for each run of the corpus.")


@dataclass(frozen=True)
class _Occurrences:
    """What one MLP writes wherever the token ids at some positions of a text stand, by context.

    `pools[token id]`: context -> (contribution [1, d_model], counts); a context that stands in several texts is held
    once. A context is a digest of the text up to and with the token: after the same prefix a causal model writes the same.
    """

    tokens: list[int]
    pools: dict[int, dict[str, tuple[Contribution, bool]]]

    @staticmethod
    def of(
        layer: int, positions: tuple[int, ...], run: CleanRun, corpus: Iterable[CleanRun],
        counted: Iterable[Tensor] | None,
    ) -> _Occurrences:  # fmt: skip
        contribution_of(run, layer, positions)  # refuses what is not there
        wanted = {int(run.tokens[position]) for position in positions}
        pools: dict[int, dict[str, tuple[Contribution, bool]]] = {token: {} for token in wanted}
        own_mask = torch.full((len(run.tokens),), counted is None)
        for one, mask in itertools.chain([(run, own_mask)], _with_masks(corpus, counted)):
            ids = one.tokens.tolist()
            for position, token in enumerate(ids):
                if token in wanted:
                    context = _context(ids[: position + 1])
                    row, counts = pools[token].get(context) or (contribution_of(one, layer, position), False)
                    pools[token][context] = (row, counts or bool(mask[position]))
        return _Occurrences(run.tokens.tolist(), pools)

    def others(self, position: int, order: Callable[[str], object] = str) -> list[Contribution]:
        """What is written at the other occurrences that count, from the one after this on in a circle of all."""
        ids = self.tokens[: position + 1]
        pool = self.pools[ids[-1]]
        circle = sorted(pool, key=order)  # type: ignore[arg-type]
        start = circle.index(_context(ids))
        others = [pool[context][0] for context in circle[start + 1 :] + circle[:start] if pool[context][1]]
        if not others:
            raise InputError(
                f"token id {ids[-1]} at position {position} has no other occurrence that counts: give a corpus with one "
                "in another context, or leave this position out."
            )
        return others


def _context(ids: list[int]) -> str:
    return hashlib.sha256(",".join(map(str, ids)).encode()).hexdigest()
