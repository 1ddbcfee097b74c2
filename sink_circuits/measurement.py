"""Measuring: run labelled edits at sinks, one sink per run or all together, and note every outcome beside the clean one.

`measure` is what every experiment is made of; the checks and plans in it serve paths and mass accounts too.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr
from tqdm.auto import tqdm

from sink_circuits import arguments
from sink_circuits.adapters import Adapter, adapt
from sink_circuits.arguments import MOST, is_whole, shown
from sink_circuits.clean_runs import CleanRun, resolve_path, run_clean
from sink_circuits.detection import COLUMNS, Sinks, Thresholds, check_table
from sink_circuits.edited_runs import EditedRun, first_edit, run_edited
from sink_circuits.edits import Edit
from sink_circuits.effects import Effect
from sink_circuits.errors import InputError
from sink_circuits.holds import Hold
from sink_circuits.memory import check_memory, need_of, rows_within
from sink_circuits.outcomes import Definitions, Outcome, as_outcomes, built_in, medians_of, unedited, value_of
from sink_circuits.prompts import Tokens, as_tokens
from sink_circuits.results import Manifest
from sink_circuits.scores import MIN_QUERIES, check_min_queries

Parts = Edit | Hold | Sequence[Edit | Hold]
"""What one run does: one edit, or several, and with them what is held clean."""
EditsOf = Callable[[Any, pd.Series], Parts]
"""(label, row of the sink table) -> the edits of that run."""


def measure(
    model, tokens, sinks: Sinks, labels: Sequence | Mapping[Any, Parts | Callable[[pd.Series], Parts]],
    edits_of: EditsOf | None = None, *, what: str = "measure", outcomes=None, loss: bool = False,
    kl: bool = False, together: bool = False, min_queries: int = MIN_QUERIES, batch_size: int | None = None,
    memory: float | None = None, attention_mask=None, clean_cache=None, path: str = "auto",
    verbose: bool = True, settings: Mapping | None = None,
) -> Effect:  # fmt: skip
    """Run `edits_of(label, sink)` for every label and sink and measure all outcomes.

    It gives an `Edit`, or several, and with them `Hold`s, what that run keeps clean. Without it `labels` are
    {label: edits, or a function of the row of the sink table that gives them}: `{"mine": lambda sink: zero(2, sink.pos)}`.
    One sink is edited per run unless `together`, which edits all sinks of a prompt in one run (each is still measured
    by itself). `labels` name the axis `edit` of the result. `outcomes`: your own, {name: function of (clean, edited,
    sink)} or a list of functions or `Outcome`s (see `outcomes.OutcomeFunction`); they are tried on the first clean run.
    `loss`, `kl`: these too. `memory`: GiB to use beside the model's weights (None: what is free); edited rows per forward
    pass follow from it, unless `batch_size` gives them. `settings` go into the manifest. A run without edits, or whose
    edits change nothing (a rescaling by 1), is the clean one: copied, not run. All edits are made and checked before the
    first forward pass. Raises InputError, before it too for a text that does not fit the memory.
    """
    adapter = adapt(model)
    arguments.text(what, "what")
    flags = {"loss": loss, "kl": kl, "together": together, "verbose": verbose}
    check_options(adapter, min_queries, batch_size, path, outcomes, memory, settings, **flags)
    labels, edits_of = _labelled(labels, edits_of)
    labels = check_labels(labels)
    own = as_outcomes(outcomes)
    tokens = as_tokens(model, tokens, attention_mask)
    table = check_sinks(sinks, tokens, adapter.n_layers)
    plan = plan_of(edits_of, labels, table)
    for row, cells in zip(table.itertuples(), plan, strict=True):
        n_positions = len(tokens.ids[tokens.names.index(row.prompt)])
        for cell in cells:
            check_parts(cell, adapter, n_positions)
    rows_of = rows_per_batch(adapter, tokens, table, path, memory, loss or kl)
    notes = _Notes.empty(table, labels, adapter)
    left_out = [name for name, wanted in (("loss", loss), ("kl", kl)) if not wanted]
    used = path
    bar = tqdm(total=len(table) * len(labels), desc=what.replace("_", " "), unit="run", disable=not verbose)
    for index, (name, ids) in enumerate(zip(tokens.names, tokens.ids, strict=True)):
        rows = np.flatnonzero(table["prompt"] == name)
        if not len(rows):
            continue
        positions = sorted({int(p) for r in rows for p in (table["pos"].iloc[r], table["primary_pos"].iloc[r])})
        mask = None if attention_mask is None else torch.as_tensor(attention_mask)[index]
        cells = _cells(rows, plan, len(labels), together)
        reused = max(first_edit(edits)[1] for edits, _ in cells)
        clean = run_clean(
            model, ids, chosen=positions, clean_cache=clean_cache, row=index, mask=mask, loss=loss, prefix=reused, path=path
        )  # fmt: skip
        how = Definitions(adapter.windows, min_queries, _thresholds_of(sinks), medians_of(clean))
        measured = (*built_in(how, left_out), *own)
        used, clean_again = clean.path, unedited(clean)
        if kl:
            clean_again = dataclasses.replace(clean_again, kl=torch.zeros(len(ids), device=ids.device))
        for sink in rows:
            notes.note(measured, clean, clean_again, int(sink), None)
        for edits, members in [cell for cell in cells if change_nothing(cell)]:
            notes.note_run(measured, clean, clean_again, edits, members)
            bar.update(len(members))
        cells = [cell for cell in cells if not change_nothing(cell)]
        for chunk in chunks(cells, batch_size or rows_of[name]):
            runs = run_edited(model, clean, [edits for edits, _ in chunk], loss=loss, kl=kl, path=path)
            for run, (edits, members) in zip(runs, chunk, strict=True):
                notes.note_run(measured, clean, run, edits, members)
                bar.update(len(members))
            used = runs[0].path
    bar.close()
    if own:
        settings = {**(settings or {}), "outcomes": {one.name: one.meaning or _origin(one.function) for one in own}}
    manifest = Manifest.of(
        adapter, tokens, what=what, path=used, together=together, min_queries=min_queries,
        found=dict(sinks.manifest.settings), **(settings or {}),
    )  # fmt: skip
    return Effect(what, xr.Dataset(notes.arrays, coords=notes.coords), table, manifest)


def _labelled(labels, edits_of: EditsOf | None) -> tuple[Any, EditsOf]:
    """Labels and what they stand for, from both or from a mapping. Raises InputError where both or neither say it."""
    if isinstance(labels, Mapping) is (edits_of is not None):
        raise InputError(
            "give labels and edits_of, a function of (label, row of the sink table), or {label: edits} alone."
        )
    if not isinstance(labels, Mapping):
        return labels, edits_of
    given = dict(labels)
    return list(given), lambda label, row: given[label](row) if callable(given[label]) else given[label]


def check_parts(parts: Sequence[Edit | Hold], adapter: Adapter, n_positions: int) -> None:
    """Raises InputError for a layer or position that is not there, or a hold that reaches nothing."""
    edits = [part for part in parts if isinstance(part, Edit)]
    for part in parts:
        if isinstance(part, Hold):
            part.check(edits, adapter.n_layers, n_positions)
        else:
            part.check(adapter.n_layers, n_positions)


def _origin(function: Callable) -> str:
    """Where a user's function stands, for the manifest: module and name."""
    return f"{getattr(function, '__module__', '')}:{getattr(function, '__qualname__', type(function).__name__)}"


def _thresholds_of(sinks: Sinks) -> Thresholds:
    """Those the sinks were found with; the defaults for what their manifest does not say."""
    noted = sinks.manifest.settings.get("thresholds", {})
    return Thresholds(**{name: noted[name] for name in Thresholds.__dataclass_fields__ if name in noted})


@dataclass(frozen=True)
class _Notes:
    """The arrays of an `Effect` as they fill. An outcome has the axes of its first value, the first sink's clean one."""

    table: pd.DataFrame
    coords: dict[str, Any]
    arrays: dict[str, tuple[tuple[str, ...], np.ndarray]]

    @staticmethod
    def empty(table: pd.DataFrame, labels: Sequence, adapter: Adapter) -> _Notes:
        layers, heads = np.arange(adapter.n_layers), np.arange(adapter.n_heads)
        coords = {"edit": list(labels), "layer": layers, "head": heads, "sink": np.arange(len(table))}
        shape = (len(table), len(labels))
        names = ("first_layer", "last_edited")
        return _Notes(table, coords, {name: (("sink", "edit"), np.full(shape, -1, dtype=np.int64)) for name in names})

    def note(self, outcomes: Iterable[Outcome], clean: CleanRun, run: EditedRun, sink: int, label: int | None) -> None:
        """One run's outcomes for one sink; label None stands for the clean run, which comes first."""
        row = self.table.iloc[sink]
        for outcome in outcomes:
            value = value_of(outcome, clean, run, row, len(self.coords["layer"]), len(self.coords["head"]))
            if f"clean_{outcome.name}" not in self.arrays:
                self._add(outcome.name, value.shape)
            name, where = (f"clean_{outcome.name}", (sink,)) if label is None else (outcome.name, (sink, label))
            array = self.arrays[name][1]
            if array[where].shape != value.shape:
                raise InputError(
                    f"outcome {outcome.name!r} returned shape {list(value.shape)} here and {list(array[where].shape)} "
                    "for the first clean run: return one shape."
                )
            array[where] = value

    def _add(self, name: str, shape: tuple[int, ...]) -> None:
        own = ("layer", "head")[: len(shape)]
        for prefix, dims in (("clean_", ("sink", *own)), ("", ("sink", "edit", *own))):
            sizes = [len(self.coords[dim]) for dim in dims]
            self.arrays[prefix + name] = dims, np.full(sizes, np.nan, dtype=np.float32)

    def note_run(
        self, outcomes: Sequence[Outcome], clean: CleanRun, run: EditedRun, parts: Sequence[Edit | Hold], members
    ) -> None:
        layers = [part.layer for part in parts if isinstance(part, Edit)]
        for sink, label in members:
            self.note(outcomes, clean, run, sink, label)
            self.arrays["first_layer"][1][sink, label] = first_edit(parts)[0]
            self.arrays["last_edited"][1][sink, label] = max(layers, default=-1)


def check_options(
    adapter: Adapter,
    min_queries: int = MIN_QUERIES,
    batch_size: int | None = None,
    path: str = "auto",
    outcomes=None,
    memory: float | None = None,
    settings: Mapping | None = None,
    **flags,
) -> None:
    as_outcomes(outcomes)
    check_min_queries(min_queries)
    resolve_path(adapter, path)
    check_memory(memory)
    if batch_size is not None and (not arguments.is_whole(batch_size) or batch_size < 1):
        raise InputError(f"batch_size = {arguments.shown(batch_size)}: at least 1, or None to let memory decide.")
    if settings is not None:
        arguments.instance(settings, "settings", Mapping, "give {name: value}, for the manifest")
    for name in ("loss", "kl", "together", "verbose"):
        arguments.flag(flags.get(name, False), name)


def check_handed_on(options: Mapping, known: Sequence[str] | None = None) -> None:
    """Raises InputError for an option that is none of the `known`: those of `measure` that experiments do not give it themselves."""
    own = ("model", "tokens", "sinks", "labels", "edits_of", "what", "settings")
    known = [name for name in inspect.signature(measure).parameters if name not in own] if known is None else known
    if unknown := sorted(set(options) - set(known)):
        raise InputError(f"option {unknown[0]!r} is unknown here: there are {', '.join(known)}.")


def check_labels(labels) -> tuple:
    """What names the axis `edit`: numbers or texts, each once. Raises InputError."""
    labels = arguments.several(labels, "labels")
    for label in labels:
        if not isinstance(label, str) and not (arguments.is_number(label) and math.isfinite(label)):
            raise InputError(f"label {arguments.shown(label)} is neither a number nor a text: give one of them.")
    if len(set(labels)) < len(labels):
        raise InputError(f"labels {arguments.shown(labels)}: name each once.")
    return labels


def plan_of(edits_of: EditsOf, labels: Sequence, table: pd.DataFrame) -> list[list[tuple[Edit | Hold, ...]]]:
    """The edits of every sink and label, and what is held beside them. Raises InputError for a function that does not give them."""
    arguments.function(edits_of, "edits_of", "(label, row of the sink table)")
    return [[as_parts(edits_of(label, row)) for label in labels] for _, row in table.iterrows()]


def as_parts(made) -> tuple[Edit | Hold, ...]:
    """What one run does, from one edit or several, with holds among them. Raises InputError for anything else."""
    parts = tuple(made) if isinstance(made, Iterable) and not isinstance(made, str) else (made,)
    for part in parts:
        if not isinstance(part, Edit | Hold):
            raise InputError(
                f"{shown(part)} is neither an Edit nor a Hold: give a list of them, [zero(6, row.pos)] for example."
            )
    return parts


def as_edits(made) -> tuple[Edit, ...]:
    """What a user's `edits_of` returned. Raises InputError for anything but edits."""
    made = arguments.several((made,) if isinstance(made, Edit) else made, "what edits_of returns", empty=True)
    remedy = "let it return a list of edits, [zero(6, row.pos)]"
    return tuple(arguments.instance(edit, "what edits_of returns", Edit, remedy) for edit in made)


def check_sinks(sinks: Sinks, tokens: Tokens, n_layers: int = MOST) -> pd.DataFrame:
    """The table of sinks (index 0..n-1). Raises InputError unless it is one of sinks in these tokens, in a model of so many layers."""
    if not isinstance(sinks, Sinks):
        raise InputError(f"sinks of type {type(sinks).__name__} cannot be read: pass what find_sinks returns.")
    table = check_table(sinks.table, COLUMNS[:10]).reset_index(drop=True)
    if not len(table):
        raise InputError("there are no sinks to treat: find_sinks found none of this kind in these prompts.")
    if len(set(tokens.names)) < len(tokens):
        raise InputError("two prompts share a name: give each its own.")
    if missing := set(table["prompt"]) - set(tokens.names):
        raise InputError(
            f"sinks of prompt {sorted(missing)[0]!r} were given without its tokens: pass the tokens they were found in."
        )
    for row in table.itertuples():
        _check_place(row, tokens)
        if not (is_whole(row.l_start) and is_whole(row.l_end) and 0 <= row.l_start <= row.l_end < n_layers):
            raise InputError(
                f"the sink at position {row.pos} of prompt {row.prompt!r} lives in layers {shown(row.l_start)}..{shown(row.l_end)}, "
                "which this model has not: pass sinks that were found in it."
            )
    return table


def check_known(found: Sinks, tokens: Tokens) -> Sinks:
    """`found`, sinks that are known beside those treated. Raises InputError unless those of these prompts stand in these tokens;
    sinks of other prompts are no matter."""
    if not isinstance(found, Sinks):
        raise InputError(f"found of type {type(found).__name__} cannot be read: pass what find_sinks returns.")
    for row in check_table(found.table, COLUMNS[:10]).itertuples():
        if row.prompt in tokens.names:
            _check_place(row, tokens)
    return found


def _check_place(row, tokens: Tokens) -> None:
    ids = tokens.ids[tokens.names.index(row.prompt)]
    there = all(is_whole(place) and 0 <= place < len(ids) for place in (row.pos, row.primary_pos))
    if not there or int(ids[row.pos]) != row.token_id:
        raise InputError(
            f"the sink at position {row.pos} of prompt {row.prompt!r} is another token there: pass the tokens it was found in."
        )


def _cells(rows: np.ndarray, plan: list[list[tuple[Edit | Hold, ...]]], n_labels: int, together: bool):
    """(edits of one run, [(sink, label index), ...] that are measured in it), in an order that shares resume points."""
    if together:
        return [(_joined([e for r in rows for e in plan[r][k]]), [(int(r), k) for r in rows]) for k in range(n_labels)]
    cells = [(plan[r][k], [(int(r), k)]) for r in rows for k in range(n_labels)]
    return sorted(cells, key=lambda cell: (first_edit(cell[0]), cell[1]))


def change_nothing(cell: tuple[Sequence[Edit | Hold], list]) -> bool:
    return all(part.changes_nothing for part in cell[0] if isinstance(part, Edit))


def _joined(parts: list[Edit | Hold]) -> tuple[Edit | Hold, ...]:
    """One position that is a sink twice (in two phases of the primary) is edited once in each layer; one hold serves all."""
    seen: dict[Any, Edit | Hold] = {}
    for part in parts:
        seen.setdefault((part.layer, part.positions) if isinstance(part, Edit) else part, part)
    return tuple(seen.values())


def chunks(cells: list, size: int):
    """At most `size` cells each, in order: those that resume at one layer and position share batches (`edited_runs.batches`)."""
    return (cells[at : at + size] for at in range(0, len(cells), size))


def rows_per_batch(
    adapter: Adapter, tokens: Tokens, table: pd.DataFrame, path: str, memory: float | None, logits: bool = False
) -> dict[str, int]:
    """Edited rows per batch of every prompt with sinks. Raises InputError for one that does not fit the memory."""
    rows = {}
    for prompt, own in table.groupby("prompt", sort=False):
        n = len(tokens.ids[tokens.names.index(prompt)])
        n_chosen = len({*own["pos"], *own["primary_pos"]})
        need = need_of(adapter, n, n_chosen=n_chosen, path=resolve_path(adapter, path), logits=logits)
        rows[prompt] = rows_within(memory, adapter, need, n)
    return rows
