"""Experiments: edit MLP contributions at sinks, measure what becomes of attention in the later layers.

Every experiment is a list of labelled edits per sink, run by `measure`, and comes back as an `Effect`: named-axis
arrays of the clean and the edited outcome, the sinks they belong to, and a manifest.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from sink_circuits import arguments
from sink_circuits.arguments import MOST, is_whole, shown
from sink_circuits.detection import COLUMNS, Sinks, Thresholds, find_sinks
from sink_circuits.effects import Effect
from sink_circuits.errors import InputError
from sink_circuits.holds import Hold
from sink_circuits.interventions import Contribution, Edit, check_factor, custom, replace, rescale, zero
from sink_circuits.memory import check_memory, need_of, rows_within
from sink_circuits.models import Adapter, adapt
from sink_circuits.outcomes import Definitions, Outcome, as_outcomes, built_in, medians_of, unedited, value_of
from sink_circuits.prompts import Tokens, as_tokens
from sink_circuits.results import Manifest
from sink_circuits.runs import CleanRun, EditedRun, first_edit, resolve_path, run_clean, run_edited
from sink_circuits.scores import MIN_QUERIES, check_min_queries

FACTORS = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)
REMOVALS = ("zero", "mean")
"""Interventions that experiments know by name, beside functions of the contribution."""

Dosed = Callable[[Contribution, float], Contribution]
"""A family of interventions of a user's own: (contribution [pos, d_model], dose) -> the same shape."""
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
    _check_options(adapter, min_queries, batch_size, path, outcomes, memory, settings, **flags)
    labels, edits_of = _labelled(labels, edits_of)
    labels = check_labels(labels)
    own = as_outcomes(outcomes)
    tokens = as_tokens(model, tokens, attention_mask)
    table = _check_sinks(sinks, tokens, adapter.n_layers)
    plan = plan_of(edits_of, labels, table)
    for row, cells in zip(table.itertuples(), plan, strict=True):
        n_positions = len(tokens.ids[tokens.names.index(row.prompt)])
        for cell in cells:
            check_parts(cell, adapter, n_positions)
    rows_of = _rows_per_batch(adapter, tokens, table, path, memory, loss or kl)
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
        clean = run_clean(
            model, ids, chosen=positions, clean_cache=clean_cache, row=index, mask=mask, loss=loss, path=path
        )
        how = Definitions(adapter.windows, min_queries, _thresholds_of(sinks), medians_of(clean))
        measured = (*built_in(how, left_out), *own)
        used, clean_again = clean.path, unedited(clean)
        if kl:
            clean_again = dataclasses.replace(clean_again, kl=torch.zeros(len(ids), device=ids.device))
        for sink in rows:
            notes.note(measured, clean, clean_again, int(sink), None)
        cells = _cells(rows, plan, len(labels), together)
        for edits, members in [cell for cell in cells if _changes_nothing(cell)]:
            notes.note_run(measured, clean, clean_again, edits, members)
            bar.update(len(members))
        cells = [cell for cell in cells if not _changes_nothing(cell)]
        for chunk in _chunks(cells, batch_size or rows_of[name]):
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


def _check_options(
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


def _check_sinks(sinks: Sinks, tokens: Tokens, n_layers: int = MOST) -> pd.DataFrame:
    """The table of sinks (index 0..n-1). Raises InputError unless it is one of sinks in these tokens, in a model of so many layers."""
    if not isinstance(sinks, Sinks):
        raise InputError(f"sinks of type {type(sinks).__name__} cannot be read: pass what find_sinks returns.")
    table = arguments.instance(sinks.table, "the sinks' table", pd.DataFrame, "pass what find_sinks returns")
    table = table.reset_index(drop=True)
    if lacking := [name for name in COLUMNS[:10] if name not in table]:
        raise InputError(f"the sink table lacks the column {lacking[0]!r}: pass what find_sinks returns.")
    if not len(table):
        raise InputError("there are no sinks to treat: find_sinks found none of this kind in these prompts.")
    if len(set(tokens.names)) < len(tokens):
        raise InputError("two prompts share a name: give each its own.")
    if missing := set(table["prompt"]) - set(tokens.names):
        raise InputError(
            f"sinks of prompt {sorted(missing)[0]!r} were given without its tokens: pass the tokens they were found in."
        )
    for row in table.itertuples():
        ids = tokens.ids[tokens.names.index(row.prompt)]
        there = all(is_whole(place) and 0 <= place < len(ids) for place in (row.pos, row.primary_pos))
        if not there or int(ids[row.pos]) != row.token_id:
            raise InputError(
                f"the sink at position {row.pos} of prompt {row.prompt!r} is another token there: pass the tokens it was found in."
            )
        if not (is_whole(row.l_start) and is_whole(row.l_end) and 0 <= row.l_start <= row.l_end < n_layers):
            raise InputError(
                f"the sink at position {row.pos} of prompt {row.prompt!r} lives in layers {shown(row.l_start)}..{shown(row.l_end)}, "
                "which this model has not: pass sinks that were found in it."
            )
    return table


def _cells(rows: np.ndarray, plan: list[list[tuple[Edit | Hold, ...]]], n_labels: int, together: bool):
    """(edits of one run, [(sink, label index), ...] that are measured in it), in an order that shares resume points."""
    if together:
        return [(_joined([e for r in rows for e in plan[r][k]]), [(int(r), k) for r in rows]) for k in range(n_labels)]
    cells = [(plan[r][k], [(int(r), k)]) for r in rows for k in range(n_labels)]
    return sorted(cells, key=lambda cell: (first_edit(cell[0]), cell[1]))


def _changes_nothing(cell: tuple[Sequence[Edit | Hold], list]) -> bool:
    return all(part.changes_nothing for part in cell[0] if isinstance(part, Edit))


def _joined(parts: list[Edit | Hold]) -> tuple[Edit | Hold, ...]:
    """One position that is a sink twice (in two phases of the primary) is edited once in each layer; one hold serves all."""
    seen: dict[Any, Edit | Hold] = {}
    for part in parts:
        seen.setdefault((part.layer, part.positions) if isinstance(part, Edit) else part, part)
    return tuple(seen.values())


def _chunks(cells: list, size: int):
    """At most `size` cells each, in order: those that resume at one layer and position share batches (`runs.batches`)."""
    return (cells[at : at + size] for at in range(0, len(cells), size))


def _rows_per_batch(
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


def _several(values) -> tuple:
    """One value or several, as a tuple."""
    single = isinstance(values, str | bytes) or not isinstance(values, Iterable) or getattr(values, "ndim", 1) == 0
    return (values,) if single else tuple(values)


def resolve_layers(model, layer, layers, forming: pd.Series | None = None) -> Callable[[pd.Series], tuple[int, ...]]:
    """What `layer=`/`layers=` mean for each sink: one layer, a joint set, or "forming", each sink's own.

    Raises InputError for none or both, an unknown word, or a layer out of range.
    """
    n_layers = model.cfg.n_layers
    if (layer is None) == (layers is None):
        raise InputError("give either layer= (a number or 'forming') or layers= (a joint set), not both.")
    if forming is not None and not (isinstance(layer, str) and layer == "forming"):
        raise InputError("forming layers were given and would not be used: pass layer='forming' with them.")
    if isinstance(layer, str):
        if layer != "forming":
            raise InputError(f"layer {shown(layer)} is unknown: give a number or 'forming'.")
        if forming is None:
            raise InputError("forming layers are not known: pass forming=layer_map(...).forming().")
        forming = arguments.several(forming, "forming")
        _check_layers(forming, n_layers)
        own = [int(one) for one in forming]
        return lambda row: (own[cast(int, row.name)],)  # the table's index counts its rows
    joint = (layer,) if layers is None else _several(layers)
    if layers is None and isinstance(layer, Iterable):
        raise InputError(f"layer {shown(layer)} names several: pass layers={shown(layer)} for a joint set.")
    _check_layers(joint, n_layers)
    if not joint or len(set(joint)) < len(joint):
        raise InputError(f"layers {joint}: name each layer once, and at least one.")
    return lambda row: tuple(int(one) for one in joint)


def _check_layers(layers, n_layers: int) -> None:
    for one in layers:
        if not is_whole(one) or not 0 <= one < n_layers:
            there = f"the model has layers 0..{n_layers - 1}" if n_layers < MOST else "layers are counted from 0"
            raise InputError(f"layer {shown(one)} is out of range: {there}.")


def check_handed_on(options: Mapping) -> None:
    """Raises InputError for what is no option of `measure`, or one that experiments give it themselves."""
    own = {"model", "tokens", "sinks", "labels", "edits_of", "what", "settings"}
    if unknown := sorted(set(options) - (set(inspect.signature(measure).parameters) - own)):
        raise InputError(f"option {unknown[0]!r} is unknown: see measure() for those that there are.")


def _prepare(model, tokens, sinks: Sinks | None, layer, layers, forming: pd.Series | None, options: Mapping):
    """Check all arguments before anything is run, then find what was not given: (tokens, sinks, layers of each sink)."""
    check_handed_on(options)
    waits = isinstance(layer, str) and layer == "forming" and layers is None and forming is None
    adapter = adapt(model)
    layers_of = None if waits else resolve_layers(model, layer, layers, forming)
    _check_options(adapter, **options)
    given, tokens = tokens, as_tokens(model, tokens, options.get("attention_mask"))
    shared = {
        name: options[name]
        for name in ("clean_cache", "path", "verbose", "attention_mask", "memory")
        if name in options
    }
    sinks = find_sinks(model, given, **shared) if sinks is None else sinks
    table = _check_sinks(sinks, tokens)
    if layer == "forming" and forming is not None and len(forming) != len(sinks):
        raise InputError(f"forming holds {len(forming)} layers for {len(sinks)} sinks: map the sinks that are treated.")
    if waits:
        _check_late_sinks(table, tokens, options.get("min_queries", MIN_QUERIES))
        shared |= {name: options[name] for name in ("batch_size", "min_queries", "outcomes") if name in options}
        forming = layer_map(model, given, sinks, layers=range(int(table["l_end"].max()) + 1), **shared).forming()
        layers_of = resolve_layers(model, layer, layers, forming)
    return tokens, sinks, layers_of


def _check_late_sinks(table: pd.DataFrame, tokens: Tokens, min_queries: int) -> None:
    """Raises InputError, before a layer map is run, for a sink whose score would be undefined in every layer."""
    for prompt, pos in zip(table["prompt"], table["pos"].tolist(), strict=True):
        later = len(tokens.ids[tokens.names.index(prompt)]) - 1 - pos
        if later < min_queries:
            raise InputError(
                f"the sink at position {pos} of prompt {prompt!r} has {later} later queries, its score needs {min_queries}: "
                "leave it out (Sinks.table holds NaN scores there), or lower min_queries."
            )


def layer_map(
    model, tokens, sinks: Sinks | None = None, *, intervention: str | Callable[[Contribution], Contribution] = "zero",
    layers: Sequence[int] | None = None, found: Sinks | None = None, **options,
) -> Effect:  # fmt: skip
    """One intervention tried at every layer (or `layers`), one layer and one sink per run: which MLPs form the sinks?

    `intervention` and `found` as in `ablate`. The axis `edit` is the edited layer. For the other options see `measure`.
    Raises InputError.
    """
    name = _name(intervention, "intervention", REMOVALS)
    layers = tuple(range(adapt(model).n_layers)) if layers is None else _several(layers)
    check_found(found, intervention)
    given = sinks
    _, sinks, _ = _prepare(model, tokens, sinks, None, layers, None, options)
    made = removal(model, tokens, sinks, intervention, sinks if given is None else found, options)

    def edits(label: int, row: pd.Series) -> tuple[Edit, ...]:
        return (made(label, row),)

    return measure(
        model,
        tokens,
        sinks,
        [int(layer) for layer in layers],
        edits,
        what="layer_map",
        settings={"intervention": name},
        **options,
    )


def ablate(
    model, tokens, sinks: Sinks | None = None, *, layer=None, layers: Sequence[int] | None = None,
    intervention: str | Callable[[Contribution], Contribution] = "zero", forming: pd.Series | None = None,
    found: Sinks | None = None, **options,
) -> Effect:  # fmt: skip
    """Take the contribution of one MLP, or of a joint set, away at each sink.

    `intervention`: "zero"; "mean", the mean contribution of that MLP over all ordinary tokens of these prompts; or a function
    of the contribution [pos, d_model]. `layer`: a number or "forming" (each sink's own; found by a layer map unless
    `forming` is given); `layers`: a joint set. `found`, for "mean": all sinks of these prompts, none of which is an ordinary
    token (looked for when None). The axis `edit` has one label, its name. For the other options see `measure`. Raises InputError.
    """
    name = _name(intervention, "intervention", REMOVALS)
    layers = None if layers is None else _several(layers)
    check_found(found, intervention)
    given = sinks
    _, sinks, layers_of = _prepare(model, tokens, sinks, layer, layers, forming, options)
    made = removal(model, tokens, sinks, intervention, sinks if given is None else found, options)

    def edits(label: str, row: pd.Series) -> tuple[Edit, ...]:
        return tuple(made(one, row) for one in layers_of(row))

    return measure(
        model,
        tokens,
        sinks,
        [name],
        edits,
        what="ablate",
        settings={"layers": str(layer if layers is None else list(layers))},
        **options,
    )


def dose_response(
    model, tokens, sinks: Sinks | None = None, *, layer=None, layers: Sequence[int] | None = None, factors: Sequence[float] = FACTORS,
    intervention: str | Dosed = "rescale", forming: pd.Series | None = None, **options,
) -> Effect:  # fmt: skip
    """Rescale the contribution of one MLP, or of a joint set by one common factor, at each sink.

    `intervention`: "rescale", or a family of your own, a function of (contribution [pos, d_model], dose): `factors` are
    its doses. The axis `edit` is the factor. `layer`, `layers`, `forming` as in `ablate`; other options as in `measure`.
    Raises InputError for a NaN or infinite factor, one given twice, or a negative one of a rescaling.
    """
    name = _name(intervention, "intervention", ("rescale",))
    factors = check_doses(intervention, factors)
    layers = None if layers is None else _several(layers)
    _, sinks, layers_of = _prepare(model, tokens, sinks, layer, layers, forming, options)

    def edits(factor: float, row: pd.Series) -> tuple[Edit, ...]:
        return tuple(dosed(intervention, one, int(row.pos), factor, name) for one in layers_of(row))

    settings = {"layers": str(layer if layers is None else list(layers)), "intervention": name}
    return measure(model, tokens, sinks, factors, edits, what="dose_response", settings=settings, **options)


def check_doses(intervention: str | Dosed, factors: Sequence[float]) -> tuple[float, ...]:
    """Raises InputError for no factors, one given twice, or one that "rescale" or a family of a user's own cannot take."""
    doses = [check_factor(factor) if isinstance(intervention, str) else _dose(factor) for factor in _several(factors)]
    if not doses or len(set(doses)) < len(doses):
        raise InputError(f"factors {doses}: give each once, and at least one.")
    return tuple(doses)


def dosed(intervention: str | Dosed, layer: int, pos: int, dose: float, name: str | None = None) -> Edit:
    """One dose of "rescale", or of a family of a user's own."""
    if isinstance(intervention, str):
        return rescale(layer, pos, dose)
    return custom(layer, pos, lambda contribution: intervention(contribution, dose), name, dose)


def check_found(found: Sinks | None, intervention) -> None:
    """Raises InputError for what is no table of sinks, and for one that would not be used."""
    if found is None:
        return
    arguments.instance(found, "found", Sinks, "pass what find_sinks returns")
    if not isinstance(intervention, str) or intervention != "mean":
        raise InputError(
            "found was given and would not be used: it says over which tokens intervention='mean' is taken."
        )


def removal(
    model, tokens, sinks: Sinks, intervention: str | Callable[[Contribution], Contribution], found: Sinks | None, options: Mapping
) -> Callable[[int, pd.Series], Edit]:  # fmt: skip
    """(layer, row of the sink table) -> one of `REMOVALS`, or a function of the contribution, at that sink.

    `found`: all sinks of these prompts, which a mean must not hold (looked for when None).
    """
    if not isinstance(intervention, str):
        name = _name(intervention, "intervention", ())
        return lambda layer, row: custom(layer, int(row["pos"]), intervention, name)
    if intervention == "zero":
        return lambda layer, row: zero(layer, int(row["pos"]))
    shared = {name: options[name] for name in ("clean_cache", "path", "attention_mask") if name in options}
    if found is None:
        found = find_sinks(model, tokens, verbose=options.get("verbose", True), **shared)
    known = Sinks(pd.concat([sinks.table, found.table], ignore_index=True), sinks.prompts, sinks.manifest)
    donors = mean_contributions(model, tokens, known, **shared)
    return lambda layer, row: replace(layer, int(row["pos"]), donors[layer], "mean")


def _name(intervention, what: str, known: tuple[str, ...]) -> str:
    """What an intervention is called in results. Raises InputError for neither one of the `known` names nor a function."""
    if callable(intervention):
        return getattr(intervention, "__name__", "custom")
    names = " or ".join(map(repr, known))
    return arguments.one_of(intervention, what, known, f"use {names} or a function of the contribution")


def _dose(dose) -> float:
    if not arguments.is_number(dose) or not math.isfinite(dose):
        raise InputError(f"dose {shown(dose)} is not allowed: give a finite number.")
    return float(dose)


def mean_contributions(
    model, tokens, sinks: Sinks, *, skip_first: int = 4, attention_mask=None, clean_cache=None, path: str = "auto"
) -> Float[Tensor, "layer d_model"]:  # fmt: skip
    """Mean contribution of every MLP over the ordinary tokens of these prompts: neither `sinks`, all there are, nor the first
    `skip_first`."""
    tokens = as_tokens(model, tokens, attention_mask)
    total, count = None, 0
    for row, (name, ids) in enumerate(zip(tokens.names, tokens.ids, strict=True)):
        mask = None if attention_mask is None else torch.as_tensor(attention_mask)[row]
        clean = run_clean(model, ids, clean_cache=clean_cache, row=row, mask=mask, path=path)
        keep = torch.ones(len(ids), dtype=torch.bool)
        keep[:skip_first] = False
        keep[sinks.table.loc[sinks.table["prompt"] == name, "pos"].tolist()] = False
        own = clean.contribution[:, keep].double().sum(dim=1)
        total, count = own if total is None else total + own, count + int(keep.sum())
    if not count:
        raise InputError("no ordinary tokens are left to take a mean over: give longer prompts.")
    return (total / count).to(clean.contribution.dtype)
