"""Edited runs: forward passes with contributions edited and activations held, on the fast path or through TransformerLens' hooks.

An edited run resumes above the first edited block, from the clean base and the edited contribution, and computes only
positions from the first edited one on: what comes before is unchanged, its keys and values are the clean ones. At
further edited blocks base and contribution are the edited run's own.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from queue import SimpleQueue
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sink_circuits import arguments
from sink_circuits.adapters import Adapter, adapt, one_at_a_time
from sink_circuits.attention import each, threads_for
from sink_circuits.clean_runs import (
    LOG_TINY,
    CleanRun,
    Columns,
    PatternTap,
    clean_loss,
    columns_of,
    learned_sinks,
    resolve_path,
)
from sink_circuits.edits import Edit
from sink_circuits.errors import InputError
from sink_circuits.groups import KeyGroups, Masses
from sink_circuits.holds import Hold, hold_functions, hook_of, n_held
from sink_circuits.losses import loss_of_logits, next_token_kl, next_token_loss
from sink_circuits.twin import Twin, TwinRefused

Resume = tuple[int, int]
"""(first edited layer, first edited position) of the rows of a batch: an edited run starts there."""


@dataclass(frozen=True)
class EditedRun:
    """One edited forward pass as measured: layers up to the first edited one hold the clean values exactly.

    `columns` covers the whole text; `resid_post_chosen` [layer, chosen, d_model] are the chosen positions' residuals
    (manipulation checks). None when not asked for: `loss` [pos], the next-token loss, NaN at the last position; `kl` [pos],
    KL(clean || edited) of the next-token distributions in nats, >= 0, exactly 0 before the first edited position; `mass`,
    for each of the row's `KeyGroups` the mean attention that each group of keys gets, NaN at the layers up to the first
    edited one, where it is the clean run's.
    """

    edits: tuple[Edit, ...]
    columns: Columns
    resid_post_chosen: Float[Tensor, "layer chosen d_model"]
    loss: Float[Tensor, " pos"] | None
    path: str
    holds: tuple[Hold, ...] = ()
    kl: Float[Tensor, " pos"] | None = None
    mass: tuple[Float[Tensor, "layer head group"], ...] | None = None


class _Row(NamedTuple):
    """One row of a batch: what is edited, what is held, and by which groups of keys its attention is summed."""

    edits: tuple[Edit, ...] = ()
    holds: tuple[Hold, ...] = ()
    groups: tuple[KeyGroups, ...] = ()


@one_at_a_time
@torch.no_grad()
def run_edited(
    model, clean: CleanRun, rows: Sequence[Sequence[Edit | Hold]], *, loss: bool = False, kl: bool = False,
    groups: Sequence[Sequence[KeyGroups]] | None = None, path: str = "auto",
) -> list[EditedRun]:  # fmt: skip
    """Run several edits of one text as the rows of one batch; an empty row is an unedited one.

    A row is a list of edits and, with them, holds: activations kept at the values of an unedited row, which is added to
    the batch. `clean` must hold the columns of the keys to measure (`run_clean(..., chosen=...)`), edited positions among
    them or not. `loss`, `kl`: on the tokens from each position on; `groups`: for each row, how its attention is summed
    (`sink_circuits.mass`). Raises InputError for a layer or position out of range or a hold that reaches nothing,
    before anything is run.
    """
    adapter = adapt(model)
    arguments.instance(clean, "clean", CleanRun, "make it with run_clean(model, tokens, chosen=positions)")
    arguments.flag(loss, "loss")
    arguments.flag(kl, "kl")
    parts = [_check_row(row) for row in arguments.several(rows, "rows", empty=True)]
    if not parts:
        return []
    if clean.columns is None or clean.contribution is None:
        raise InputError(
            "the clean run holds no columns, or cannot be resumed: make it with run_clean(..., chosen=positions)."
        )
    if clean.state not in ("", adapter.state):
        raise InputError(
            "the weights or hooks of this model are others than when the clean run was made: call run_clean again."
        )
    groups = None if groups is None else [_check_groups(own) for own in arguments.several(groups, "groups", empty=True)]
    if groups is not None and len(groups) != len(parts):
        raise InputError(f"groups of {len(groups)} rows for {len(parts)} rows: give each row its own.")
    cells = [_row_of(row, () if groups is None else tuple(groups[i])) for i, row in enumerate(parts)]
    for cell in cells:
        for edit in cell.edits:
            edit.check(adapter.n_layers, clean.n_positions)
        if len({(e.layer, p) for e in cell.edits for p in e.positions}) < sum(len(e.positions) for e in cell.edits):
            raise InputError("two edits of one run change the same layer and position: join them into one function.")
        for hold in cell.holds:
            hold.check(cell.edits, adapter.n_layers, clean.n_positions)
    resolved = resolve_path(adapter, path)
    if path == "fast" and clean.inputs is None:
        raise InputError(
            "the fast path needs a clean run of its own, this one is the reference path's: use path='auto'."
        )
    fast = resolved == "fast" and clean.inputs is not None
    runs: list[EditedRun | None] = [None] * len(cells)
    plan = batches([cell.edits for cell in cells], alone=adapter.mixes_rows)
    work = []
    for resume, members in plan:
        batch = [cells[i] for i in members]
        unedited = [_Row()] if any(cell.holds for cell in batch) or (kl and not fast) else []
        work.append((resume, unedited + batch))
    made = (_edited_fast if fast else _edited_reference)(adapter, clean, work, loss, kl)
    for (_, members), own in zip(plan, made, strict=True):
        for i, run in zip(members, own[-len(members) :], strict=True):
            runs[i] = run if groups is not None else replace(run, mass=None)
    return runs


def _check_row(row) -> tuple[Edit | Hold, ...]:
    parts = arguments.several([row] if isinstance(row, Edit | Hold) else row, "a row of edits", empty=True)
    return tuple(
        arguments.instance(part, "a part of a row", Edit | Hold, "a row is a list of edits, [zero(6, 40)]")
        for part in parts
    )


def _check_groups(groups) -> tuple[KeyGroups, ...]:
    own = arguments.several(groups, "the groups of a row", empty=True)
    return tuple(arguments.instance(one, "groups", KeyGroups, "make them with mass.key_groups()") for one in own)


def _row_of(parts: tuple[Edit | Hold, ...], groups: tuple[KeyGroups, ...]) -> _Row:
    holds = tuple(part for part in parts if isinstance(part, Hold))
    return _Row(tuple(part for part in parts if not isinstance(part, Hold)), holds, groups)


def first_edit(parts: Sequence[Edit | Hold]) -> tuple[int, int]:
    """(first edited layer, first edited position) of one run: nothing below the one or before the other can change.

    (-1, 0) when nothing is edited; holds do not count.
    """
    edits = [part for part in parts if isinstance(part, Edit)]
    return min((e.layer for e in edits), default=-1), min((p for e in edits for p in e.positions), default=0)


def batches(rows: Sequence[Sequence[Edit]], *, alone: bool = False) -> list[tuple[Resume, list[int]]]:
    """(resume point, indices of the rows that share a batch): those whose first edited layer and position are the same.

    So every cell that cannot change is the clean one by construction. Unedited rows join the largest batch. `alone`:
    one row per batch, each at the same resume point as it would have had in company.
    """
    groups: dict[tuple[int, int], list[int]] = {}
    for index, edits in enumerate(rows):
        if edits:
            groups.setdefault(first_edit(edits), []).append(index)
    unedited = [index for index, edits in enumerate(rows) if not edits]
    if unedited:
        largest = max(groups.values(), key=len) if groups else groups.setdefault(first_edit(()), [])
        largest += unedited
    if alone:
        return [(resume, [index]) for resume, group in groups.items() for index in group]
    return [(resume, sorted(group)) for resume, group in groups.items()]


def _row_edit(rows: Sequence[_Row], layer: int, first: int, counter: list[int]) -> Callable[[Tensor], Tensor] | None:
    """The edits of `layer`, each in its own row of the batch, as one function of the batch's contributions."""
    here = [(row, edit) for row, cell in enumerate(rows) for edit in cell.edits if edit.layer == layer]
    if not here:
        return None

    def function(contributions: Float[Tensor, "batch pos d_model"]) -> Tensor:
        edited = contributions.clone()
        for row, edit in here:
            edited[row] = edit.written_into(edited[row], first)
            counter[0] += 1
        return edited

    return function


def _edited_fast(
    adapter: Adapter, clean: CleanRun, work: Sequence[tuple[Resume, list[_Row]]], loss: bool, kl: bool
) -> list[list[EditedRun]]:
    """Batches beside each other, one thread for each, where they can be; the others one after another, on all threads.

    A thread of its own is the faster way: most operations of a block are too short to be divided. Edits of a batch's
    first layer are made here, in order: a function of the user's is never called from another thread.
    """
    floats = sum(len(rows) * clean.base[:, resume[1] :].numel() for resume, rows in work)
    threads = 1
    if all(_is_apart(rows, resume) for resume, rows in work):
        threads = threads_for(sum(len(rows) for _, rows in work), floats, clean.base.device)
    shares = [(i, resume, share) for i, (resume, rows) in enumerate(work) for share in _shares(rows, threads)]
    threads = min(threads, len(shares))
    begun = [_begin(adapter, clean, rows, resume) for _, resume, rows in shares]
    twins: SimpleQueue[Twin] = SimpleQueue()
    for twin in adapter.twin.beside(adapter.model, threads):
        twins.put(twin)

    def run(share: _Begun) -> list[EditedRun]:
        twin = twins.get()
        try:
            return _resumed(adapter, clean, twin, share, loss, kl)
        finally:
            twins.put(twin)

    made: list[list[EditedRun]] = [[] for _ in work]
    for (i, _, _), runs in zip(shares, each(run, begun, threads), strict=True):
        made[i] += runs
    return made


def _is_apart(rows: Sequence[_Row], resume: Resume) -> bool:
    """Rows that need nothing of each other, nor an edit in the middle of a run; holds copy an unedited row beside them."""
    return resume[0] >= 0 and not any(row.holds or any(e.layer > resume[0] for e in row.edits) for row in rows)


def _shares(rows: list[_Row], threads: int) -> list[list[_Row]]:
    """A batch in as many parts as there are threads, where that leaves no remainder: rows of unequal parts would round
    in different ways, and a no-op would not be an unedited row to the bit."""
    size = len(rows) // threads if len(rows) % threads == 0 else len(rows)
    return [rows[at : at + size] for at in range(0, len(rows), size)]


class _Begun(NamedTuple):
    """Rows whose first edited layer's residual stream is there: where they resume, and what has been counted so far."""

    rows: list[_Row]
    resume: Resume
    masses: Masses
    start: int
    resid: Tensor
    counter: list[int]


def _begin(adapter: Adapter, clean: CleanRun, rows: list[_Row], resume: Resume) -> _Begun:
    first_layer, unchanged_before = resume
    masses = Masses.of(adapter, [row.groups for row in rows], clean.n_positions)
    # Without keys to reuse, the prefix is run again.
    n_kept = 0 if clean.keys is None else min(key.shape[2] for key in clean.keys)
    start = int(min(unchanged_before, masses.first_query, n_kept))
    counter = [0]
    if first_layer < 0:
        return _Begun(rows, resume, masses, start, clean.inputs.embed.expand(len(rows), -1, -1), counter)
    contribution = clean.contribution[first_layer, start:].expand(len(rows), -1, -1)
    edit = _row_edit(rows, first_layer, start, counter) or (lambda unedited: unedited)
    return _Begun(rows, resume, masses, start, clean.base[first_layer, start:] + edit(contribution), counter)


def _resumed(
    adapter: Adapter, clean: CleanRun, twin: Twin, begun: _Begun, loss: bool, kl: bool
) -> list[EditedRun]:  # fmt: skip
    """The blocks above the first edited layer, and what is measured in them."""
    rows, (first_layer, unchanged_before), masses, start, resid, counter = begun
    functions = {
        layer: f for layer in range(first_layer + 1, adapter.n_layers) if (f := _row_edit(rows, layer, start, counter))
    }
    held = hold_functions([row[:2] for row in rows], first_layer, start, adapter, clean.n_positions, counter)
    chosen = clean.columns.chosen
    log_attention = [clean.columns.log_attention.clone() for _ in rows]
    log_rest = [clean.columns.log_rest.clone() for _ in rows]
    chosen_now = [(i, p - start) for i, p in enumerate(chosen) if p >= unchanged_before]
    resid_chosen = _resid_chosen(clean).expand(len(rows), -1, -1, -1).clone()

    def note_residual(layer: int, resid: Tensor) -> None:
        for i, position in chosen_now:
            resid_chosen[:, layer, i] = resid[:, position]

    if first_layer >= 0:
        note_residual(first_layer, resid)

    def prefix(layer: int) -> tuple[Tensor, Tensor]:
        return clean.keys[layer][:, :, :start], clean.values[layer][:, :, :start]

    layers = range(first_layer + 1, adapter.n_layers)
    for run in twin.run(
        resid, clean.inputs, layers, start=start, prefix=prefix, chosen=torch.tensor(chosen), edits=functions, holds=held,
        groups=masses.columns, sums=masses.columns is not None,
    ):  # fmt: skip
        for row in range(len(rows)):
            log_attention[row][run.layer, :, start:] = run.tap.attention.log_attention[row].clamp(min=LOG_TINY)
            log_rest[row][run.layer, :, start:] = run.tap.attention.log_rest[row].clamp(min=LOG_TINY)
        if masses.columns is not None:
            masses.note(run.layer, run.tap.grouped, run.tap.attention.diagonal, start, learned_sinks(adapter))
        note_residual(run.layer, run.resid_post)
        resid = run.resid_post
    expected = _n_expected(rows, first_layer, adapter)
    if counter[0] != expected:
        raise TwinRefused(f"{expected} edits and holds were asked for and {counter[0]} were made: report this model.")
    losses: list[Tensor | None] = [None] * len(rows)
    if loss:
        before = clean.loss if clean.loss is not None or not start else clean_loss(adapter.model, clean)
        for row in range(len(rows)):
            own = next_token_loss(twin.logits, resid[row], clean.tokens[start:])
            losses[row] = torch.cat([before[:start], own]) if start else own
    columns = [Columns(chosen, *pair) for pair in zip(log_attention, log_rest, strict=True)]
    again = slice(start, unchanged_before)  # computed once more and unchanged: exactly the clean values
    for one in columns:
        one.log_attention[:, :, again] = clean.columns.log_attention[:, :, again]
        one.log_rest[:, :, again] = clean.columns.log_rest[:, :, again]
    divergence = None
    if kl:
        divergence = torch.zeros(len(rows), clean.n_positions, device=resid.device)
        clean_resid = clean.resid_post(adapter.n_layers - 1)[unchanged_before:]
        own = resid[:, unchanged_before - start :]
        divergence[:, unchanged_before:] = next_token_kl(twin.logits, clean_resid, own)
    return [
        EditedRun(row.edits, columns[i], resid_chosen[i], losses[i], "fast", row.holds, None if divergence is None else divergence[i],
                  masses.of_row[i])
        for i, row in enumerate(rows)
    ]  # fmt: skip


def _n_expected(rows: Sequence[_Row], first_layer: int, adapter: Adapter) -> int:
    return sum(len(row.edits) for row in rows) + n_held([row[:2] for row in rows], first_layer, adapter)


def _resid_chosen(clean: CleanRun) -> Float[Tensor, "layer chosen d_model"]:
    return torch.stack([clean.resid_post(layer)[list(clean.columns.chosen)] for layer in range(len(clean.base))])


def _unchanged_from(clean: Columns, edited: Columns, first_layer: int, start: int) -> Columns:
    """`edited`, with the clean values where nothing can have changed: layers up to the first edited, queries before it."""
    tensors = []
    for own, new in ((clean.log_attention, edited.log_attention), (clean.log_rest, edited.log_rest)):
        joined = new.clone()
        joined[: first_layer + 1] = own[: first_layer + 1]
        joined[:, :, :start] = own[:, :, :start]
        tensors.append(joined)
    return Columns(clean.chosen, *tensors)


def _edited_reference(
    adapter: Adapter, clean: CleanRun, work: Sequence[tuple[Resume, list[_Row]]], loss: bool, kl: bool
) -> list[list[EditedRun]]:
    return [_hooked_batch(adapter, clean, rows, resume, loss, kl) for resume, rows in work]


def _hooked_batch(
    adapter: Adapter, clean: CleanRun, rows: list[_Row], resume: Resume, loss: bool, kl: bool
) -> list[EditedRun]:  # fmt: skip
    layers = range(adapter.n_layers)
    first_layer, start = resume
    chosen = clean.columns.chosen
    masses = Masses.of(adapter, [row.groups for row in rows], clean.n_positions)
    taps = [PatternTap(chosen, learned_sinks(adapter), masses.columns) for _ in layers]
    residuals: dict[int, Tensor] = {}
    counter = [0]
    held = hold_functions([row[:2] for row in rows], first_layer, 0, adapter, clean.n_positions, counter)

    def keep_residual(layer: int):
        def hook(value: Tensor, hook) -> None:
            residuals[layer] = value[:, list(chosen)].detach().clone()

        return f"blocks.{layer}.hook_resid_post", hook

    hooks: list[tuple[str, Callable]] = []
    for layer in layers:
        # Hooks of one name are called in this order: what is held is held before it is edited, or kept.
        hooks += [
            (hook_of(adapter, what, layer), lambda value, hook, f=function: f(value, 1))
            for what, function in held.get(layer, {}).items()
        ]
        if function := _row_edit(rows, layer, 0, counter):
            hooks.append((adapter.contribution_hook(layer), lambda value, hook, f=function: f(value)))
        hooks += [(adapter.pattern_hook(layer), taps[layer]), keep_residual(layer)]
    tokens = clean.tokens.expand(len(rows), -1)
    with (
        warnings.catch_warnings()
    ):  # a held norm is computed from its hooks, to rounding the same: the bridge says so each time
        warnings.filterwarnings("ignore", message="A forward hook edited hook_scale")
        final = adapter.model.run_with_hooks(
            tokens, fwd_hooks=hooks, **({} if loss or kl else {"stop_at_layer": adapter.n_layers})
        )
    clean_resid = _resid_chosen(clean)
    expected = _n_expected(rows, first_layer, adapter)
    if counter[0] != expected:
        raise InputError(
            f"{expected} edits and holds were asked for and {counter[0]} fired: a hook is dead in this model."
        )
    for layer in range(first_layer + 1, adapter.n_layers) if masses.columns is not None else ():
        masses.note(layer, taps[layer].grouped, taps[layer].attention.diagonal, 0, learned_sinks(adapter))
    out = []
    for index, row in enumerate(rows):
        columns = columns_of(chosen, [tap.attention for tap in taps], index)
        resid = torch.stack([residuals[layer][index] for layer in layers])
        # Cells that cannot have changed hold the clean values: exact, not only to the kernels' rounding.
        columns = _unchanged_from(clean.columns, columns, first_layer, start)
        before = [i for i, position in enumerate(chosen) if position < start]
        resid[:, before] = clean_resid[:, before]
        resid[: max(first_layer, 0)] = clean_resid[: max(first_layer, 0)]
        row_loss = loss_of_logits(final[index], clean.tokens) if loss else None
        divergence = None
        if kl:
            divergence = next_token_kl(lambda logits: logits, final[0], final[index : index + 1])[0]
            divergence[:start] = 0
        out.append(
            EditedRun(row.edits, columns, resid, row_loss, "reference", row.holds, divergence, masses.of_row[index])
        )
    return out
