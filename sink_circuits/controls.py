"""Controls: the same experiment where it should do nothing, run beside it, with what could not be matched said.

An effect counts only against what would have happened anyway. Ordinary tokens score near 0 and cannot fall, so
differences to controls are taken in log-odds; the unit is the prompt (`statistics.difference_to_controls`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
import xarray as xr

from sink_circuits import arguments, statistics
from sink_circuits.adapters import adapt, backend_of
from sink_circuits.clean_runs import run_clean
from sink_circuits.controlled import Controlled
from sink_circuits.detection import Sinks
from sink_circuits.edits import Contribution, Edit
from sink_circuits.effects import Effect
from sink_circuits.errors import InputError, ModelError
from sink_circuits.experiments import FACTORS, REMOVALS, check_doses, dosed, name_of, prepare, removal
from sink_circuits.interventions import random_perturbation, zero
from sink_circuits.matching import NORM_RATIO, POSITION_CONTROLS, REACH, match_positions, moved
from sink_circuits.measurement import (
    as_edits,
    check_handed_on,
    check_labels,
    check_options,
    check_sinks,
    measure,
)
from sink_circuits.models import load_model
from sink_circuits.prompts import Tokens
from sink_circuits.results import Manifest
from sink_circuits.scores import MIN_QUERIES

N_RANDOM = 20
"""Random perturbations of equal norm: with 20, beyond all of them is p = 1/21."""

CONTROLS = (*POSITION_CONTROLS, "wrong layer", "attention output", "random model")
"""Controls with one value per sink; random perturbations have one per draw."""

Intervention = Callable[[int, pd.Series], Edit]
"""(layer, row of the sink table) -> an edit: `lambda layer, sink: rescale(layer, sink.pos, 2)`."""


def with_controls(
    model, tokens, sinks: Sinks | None = None, *, layer=None, layers: Sequence[int] | None = None, forming: pd.Series | None = None,
    intervention: str | Callable | Mapping[str, Intervention] = "zero", factors: Sequence[float] | None = None,
    found: Sinks | None = None, controls: Sequence[str] = CONTROLS, n_random: int = N_RANDOM, also_forming: Sequence[int] = (),
    random_model=None, verbose: bool = True, **options,
) -> Controlled:  # fmt: skip
    """An experiment at the sinks and beside it the same one at every control (docs/glossary.md, "control").

    `intervention`: "zero", "mean" or a function of the contribution, as in `ablate`; "rescale", or with `factors` a family of your own, a
    function of (contribution, dose), as in `dose_response`, whose factors are the labels; or several, {label: function of (layer,
    row of the sink table) that gives an Edit}. `layer`, `layers`, `forming` as in `ablate`.
    Position controls (`match_positions`): the same edit at a token that is no sink. "wrong layer": at the sink, as many
    other layers, drawn by name from those up to l_end that form no sink: neither those in `forming` of any sink of the prompt
    nor `also_forming` (a forming set). "attention output": the same function of what attention wrote at the sink, in the MLP's
    place (its removal where the intervention is "mean", which is of MLPs). "random model": the same edit in `random_model`, where
    given (True: `randomly_initialised(model)`). Random perturbations: `n_random` changes of the same norm in directions drawn by
    name. `controls`: which of `CONTROLS` are run; the others stay NaN. `found`: all sinks of these prompts, none of which may be a
    control (looked for when None). Other options as in `measure`. Raises InputError.
    """
    for name in arguments.several(controls, "controls", empty=True):
        arguments.one_of(name, "control", CONTROLS, "there are {}")
    if not arguments.is_whole(n_random) or not 0 <= n_random <= arguments.MOST:
        raise InputError(f"n_random = {arguments.shown(n_random)}: a whole number, at least 0; 20 allow p <= 0.05.")
    check_handed_on(options)
    n_random = int(n_random)
    check_options(adapt(model), verbose=verbose, **options)
    if options.get("together") or options.get("attention_mask") is not None or options.get("clean_cache") is not None:
        raise InputError(
            "controls are run one sink at a time on texts of their own length: leave out together, attention_mask and clean_cache."
        )
    doses = _doses(intervention, factors)
    if random_model is not None and random_model is not True:
        adapt(random_model)
    shared = {**options, "verbose": verbose}
    prepared = prepare(model, tokens, sinks, layer, layers, forming, shared, found)
    tokens, sinks = prepared.tokens, prepared.sinks
    table = check_sinks(sinks, tokens)
    treated = Sinks(table, sinks.prompts, sinks.manifest)
    path, found = options.get("path", "auto"), prepared.all_sinks(model, shared)
    random_model = randomly_initialised(model) if random_model is True else random_model
    interventions = _by_label(model, tokens, treated, intervention, doses, found, path)
    own_layers = tuple(prepared.layers_of(row) for _, row in table.iterrows())
    treatment = _Treatment(model, tokens, treated, own_layers, interventions, shared)
    settings = {"layers": prepared.layers_said, "n_random": n_random}
    effect = treatment.measure(treated, treatment.edits, "treated", settings=settings)
    beside = []
    if asked := [name for name in POSITION_CONTROLS if name in controls]:
        stand_ins = match_positions(
            model, tokens, treated, found, min_queries=options.get("min_queries", MIN_QUERIES), path=path
        )
        beside += [_at_position(treatment, name, stand_ins[stand_ins["control"] == name]) for name in asked]
    if "wrong layer" in controls:
        beside.append(_at_wrong_layer(treatment, also_forming, by_sink=isinstance(layer, str)))
    if "attention output" in controls:
        beside.append(_of_attention(treatment, replacing_mean=intervention == "mean"))
    beside.append(_in_random_model(treatment, random_model))
    manifest = Manifest.of(
        adapt(model), tokens, what="controls", path=effect.manifest.path, found=dict(sinks.manifest.settings),
        reach=REACH, norm_ratio=NORM_RATIO, controls=list(controls), also_forming=sorted(also_forming), **settings,
    )  # fmt: skip
    data = _side_by_side(effect, beside, _random_draws(treatment, n_random))
    return Controlled(data, table, pd.concat([one.matches for one in beside], ignore_index=True), manifest, effect)


@dataclass(frozen=True)
class _Treatment:
    """The experiment that every control repeats: which edits each sink is given, and how they are measured."""

    model: Any
    tokens: Tokens
    sinks: Sinks
    own_layers: Sequence[Sequence[int]]
    interventions: Mapping[Any, Intervention]
    options: Mapping[str, Any]

    @property
    def table(self) -> pd.DataFrame:
        return self.sinks.table

    @property
    def labels(self) -> list:
        return list(self.interventions)

    def edits(self, label, row: pd.Series) -> tuple[Edit, ...]:
        return self.edits_at(label, row, self.own_layers[cast(int, row.name)])  # the table's index counts its rows

    def edits_at(self, label, row: pd.Series, layers: Sequence[int]) -> tuple[Edit, ...]:
        return tuple(edit for layer in layers for edit in as_edits(self.interventions[label](layer, row)))

    def some(self, of: Sequence[int]) -> Sinks:
        table = self.table.iloc[list(of)].reset_index(drop=True)
        return Sinks(table, self.sinks.prompts, self.sinks.manifest)

    def measure(
        self, sinks: Sinks, edits: Callable, what: str, labels: Sequence | None = None, model=None, **own
    ) -> Effect:
        """`own`: options that differ from the experiment's."""
        model, labels = model or self.model, self.labels if labels is None else labels
        return measure(model, self.tokens, sinks, labels, edits, what=what, **{**self.options, **own})


@dataclass(frozen=True)
class _Beside:
    """One control: its effect (None: nowhere matched) at the sinks numbered `of`, and what was matched for all of them."""

    control: str
    matches: pd.DataFrame
    of: Sequence[int] = ()
    effect: Effect | None = None


def _at_position(treatment: _Treatment, control: str, matches: pd.DataFrame) -> _Beside:
    """The same edit at the tokens that stand in for the sinks."""
    matched = matches[matches["pos"] >= 0]
    if not len(matched):
        return _Beside(control, matches)
    of = matched["sink"].tolist()
    at = moved(treatment.model, treatment.sinks, treatment.tokens, of, matched["pos"].tolist(), control)

    def edits(label, row: pd.Series) -> tuple[Edit, ...]:
        return treatment.edits_at(label, row, treatment.own_layers[of[cast(int, row.name)]])

    return _Beside(control, matches, of, treatment.measure(at, edits, control))


def _at_wrong_layer(treatment: _Treatment, also_forming: Sequence[int], by_sink: bool) -> _Beside:
    """The same edit at layers that form no sink; `by_sink`: each sink's own layers form it, and are no control for its prompt."""
    control, table, own_layers = "wrong layer", treatment.table, treatment.own_layers
    known = _forming_by_prompt(table, own_layers) if by_sink else {}
    barred = [{*own, *also_forming, *known.get(p, ())} for own, p in zip(own_layers, table["prompt"], strict=True)]
    wrong, reasons = _wrong_layers(table, own_layers, barred, adapt(treatment.model).n_layers)
    matches = _layer_matches(control, wrong, reasons)
    of = [index for index, layers in enumerate(wrong) if layers]
    if not of:
        return _Beside(control, matches)

    def edits(label, row: pd.Series) -> tuple[Edit, ...]:
        return treatment.edits_at(label, row, wrong[of[cast(int, row.name)]])

    return _Beside(control, matches, of, treatment.measure(treatment.some(of), edits, control))


def _of_attention(treatment: _Treatment, replacing_mean: bool) -> _Beside:
    """The same function of what attention wrote; `replacing_mean`: its removal, for a corpus mean is one of MLPs."""
    control, table, labels = "attention output", treatment.table, treatment.labels
    cells = [[treatment.edits(label, row) for label in labels] for _, row in table.iterrows()]
    written = _attention_writes(treatment, cells)

    def edits(label, row: pd.Series) -> tuple[Edit, ...]:
        index = cast(int, row.name)
        own = cells[index][labels.index(label)]
        made = [zero(edit.layer, edit.positions) if replacing_mean else edit for edit in own]
        return tuple(_instead(edit, written[index][edit.layer, edit.positions]) for edit in made)

    measured = treatment.measure(treatment.sinks, edits, control)
    matches = _layer_matches(control, treatment.own_layers, [""] * len(table))
    return _Beside(control, matches, range(len(table)), measured)


def _in_random_model(treatment: _Treatment, random_model) -> _Beside:
    """The same edit in a model that learned nothing."""
    control, n = "random model", len(treatment.table)
    if random_model is None:
        return _Beside(control, _layer_matches(control, [()] * n, ["no random model was given"] * n))
    measured = treatment.measure(treatment.sinks, treatment.edits, control, model=random_model, path="auto")
    return _Beside(control, _layer_matches(control, treatment.own_layers, [""] * n), range(n), measured)


def _random_draws(treatment: _Treatment, n_random: int) -> Effect | None:
    """Changes as large in random directions: one edit for every (draw, label), draws first."""
    if not n_random:
        return None
    pairs = [(draw, label) for draw in range(n_random) for label in treatment.labels]

    def perturbed(index: int, row: pd.Series) -> tuple[Edit, ...]:
        draw, label = pairs[index]
        return tuple(random_perturbation(edit, row["prompt"], draw) for edit in treatment.edits(label, row))

    return treatment.measure(treatment.sinks, perturbed, "random perturbation", labels=range(len(pairs)))


def _side_by_side(effect: Effect, beside: Sequence[_Beside], draws: Effect | None) -> xr.Dataset:
    """`Controlled.data`: every outcome of the experiment, its controls and draws, averaged over heads and lifetimes."""
    labels, sinks = list(effect.data["edit"].values), np.arange(len(effect.table))

    def values(measured: Effect, outcome: str) -> np.ndarray:
        return measured.over_lifetime(outcome).transpose("sink", "edit").to_numpy().astype(np.float64)

    data: dict[str, Any] = {}
    n_draws = 0 if draws is None else draws.data.sizes["edit"] // len(labels)
    for outcome in effect.outcomes:
        controls = np.full((len(sinks), len(CONTROLS), len(labels)), np.nan)
        for one in beside:
            if one.effect is not None:
                controls[list(one.of), CONTROLS.index(one.control)] = values(one.effect, outcome)
        random = np.empty((len(sinks), 0)) if draws is None else values(draws, outcome)
        data[f"effect_{outcome}"] = (("sink", "edit"), values(effect, outcome))
        data[f"control_{outcome}"] = (("sink", "control", "edit"), controls)
        data[f"random_{outcome}"] = (("sink", "draw", "edit"), random.reshape(len(sinks), n_draws, len(labels)))
    coords = {"sink": sinks, "edit": labels, "control": list(CONTROLS), "draw": np.arange(n_draws)}
    return xr.Dataset(data, coords=coords)


def _doses(intervention, factors: Sequence[float] | None) -> tuple[float, ...] | None:
    """The factors of a family of interventions, None for one that has none. Raises InputError for what does not go together."""
    if isinstance(intervention, str) and intervention == "rescale":
        return check_doses(intervention, FACTORS if factors is None else factors)
    if not isinstance(intervention, Mapping):
        name_of(intervention, (*REMOVALS, "rescale"))
    if factors is None:
        return None
    if not callable(intervention):
        raise InputError(
            "factors were given and would not be used: pass intervention='rescale' or a family of your own."
        )
    return check_doses(intervention, factors)


def _by_label(
    model, tokens: Tokens, sinks: Sinks, intervention, doses: Sequence[float] | None, found: Sinks, path: str
) -> dict[Any, Intervention]:
    """What `with_controls` is given as `intervention`, as label -> (layer, row of the sink table) -> Edit."""
    if isinstance(intervention, Mapping):
        for label in check_labels(list(intervention)):
            arguments.function(intervention[label], f"intervention {label!r}", "(layer, row of the sink table)")
        return dict(intervention)
    if doses is not None:
        name = name_of(intervention, ("rescale",))
        return {dose: partial(_dosed_at, intervention, dose, name) for dose in doses}
    name = name_of(intervention, REMOVALS)
    return {name: removal(model, tokens, sinks, intervention, found, {"path": path})}


def _dosed_at(intervention, dose: float, name: str, layer: int, sink: pd.Series) -> Edit:
    return dosed(intervention, layer, int(sink["pos"]), dose, name)


def randomly_initialised(model, name: str = "random model"):
    """A model of the same shape and configuration with random weights, drawn from `name`; the same backend, device and tokenizer.

    Raises ModelError when the architecture cannot be built from its configuration alone.
    """
    adapter = adapt(model)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(statistics.seed_of("initialise", name) % 2**63)  # no GPU's: not forked
        if backend_of(model) == "hooked":
            from transformer_lens import HookedTransformer

            config = copy.deepcopy(model.cfg)
            config.init_weights, config.seed = True, None  # drawn from the seed above
            return HookedTransformer(config, tokenizer=adapter.tokenizer).eval()
        original = model.original_model
        try:
            random = type(original)._from_config(copy.deepcopy(original.config), dtype=adapter.cfg.dtype)
        except (TypeError, ValueError, AttributeError) as error:
            raise ModelError(
                f"a random {type(original).__name__} cannot be made from its configuration ({error}): leave this control out."
            ) from error
    return load_model(random.eval(), tokenizer=adapter.tokenizer, device=adapter.device, verbose=False)


def _instead(edit: Edit, written: torch.Tensor) -> Edit:
    """`edit` made of what attention wrote there, the contribution left as it is; one that changes nothing stays one."""
    if edit.changes_nothing:
        return edit

    def function(contribution: Contribution) -> Contribution:
        own = written.to(contribution)
        return contribution + (edit.apply(own) - own)

    return Edit(edit.layer, edit.positions, function, f"{edit.name} of attention")


def _forming_by_prompt(table: pd.DataFrame, own_layers: Sequence[Sequence[int]]) -> dict[Any, set[int]]:
    """The forming layers of all sinks of each prompt."""
    known: dict[Any, set[int]] = {}
    for prompt, own in zip(table["prompt"], own_layers, strict=True):
        known.setdefault(prompt, set()).update(own)
    return known


def _wrong_layers(
    table: pd.DataFrame, own_layers: Sequence[Sequence[int]], barred: Sequence[set[int]], n_layers: int
) -> tuple[list[tuple[int, ...]], list[str]]:
    """For every sink as many layers as are edited, none of them barred, and why there are none where too few are left.

    The model's last layer is none: no attention reads what its MLP writes.
    """
    chosen, reasons = [], []
    for (_, row), own, out in zip(table.iterrows(), own_layers, barred, strict=True):
        others = [layer for layer in range(min(int(row["l_end"]) + 1, n_layers - 1)) if layer not in out]
        few = len(others) < len(own)
        rng = np.random.default_rng(statistics.seed_of("wrong layer", row["prompt"], row["pos"], *own))
        chosen.append(() if few else tuple(sorted(int(x) for x in rng.choice(others, size=len(own), replace=False))))
        reasons.append(f"{len(others)} layers up to l_end form no sink, {len(own)} are needed" if few else "")
    return chosen, reasons


def _layer_matches(control: str, layers: Sequence[Sequence[int]], reasons: Sequence[str]) -> pd.DataFrame:
    rows = [
        {"sink": i, "control": control, "pos": -1, "norm_ratio": np.nan, "reason": reason, "layers": str(list(own))}
        for i, (own, reason) in enumerate(zip(layers, reasons, strict=True))
    ]  # fmt: skip
    return pd.DataFrame(rows)


@torch.no_grad()
def _attention_writes(
    treatment: _Treatment, cells: Sequence[Sequence[Sequence[Edit]]]
) -> list[dict[tuple[int, tuple[int, ...]], torch.Tensor]]:
    """What attention adds to the residual stream where each sink's edits stand, by (layer, positions): base less resid_pre."""
    model, tokens, table = treatment.model, treatment.tokens, treatment.table
    writes: list[dict[tuple[int, tuple[int, ...]], torch.Tensor]] = [{} for _ in range(len(table))]
    for name, ids in zip(tokens.names, tokens.ids, strict=True):
        rows = np.flatnonzero(table["prompt"] == name)
        if not len(rows):
            continue
        clean = run_clean(model, ids, path=treatment.options.get("path", "auto"))
        first: list[torch.Tensor] = []
        hook = [("blocks.0.hook_resid_pre", lambda value, hook, first=first: first.append(value[0].detach().clone()))]
        adapt(model).model.run_with_hooks(ids[None], fwd_hooks=hook, stop_at_layer=1)
        for index in rows:
            for edit in (edit for edits in cells[int(index)] for edit in edits):
                at, layer = list(edit.positions), edit.layer
                before = (clean.resid_post(layer - 1) if layer else first[0])[at]
                writes[index][layer, edit.positions] = clean.base[layer, at] - before
    return writes
