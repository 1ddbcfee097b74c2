"""Paths: by which way an edit of a contribution reaches the later sink scores of the treated position.

Nested parts of the total effect, each an edited run in which something is held at its clean value (`sink_circuits.holds`):

- `residual`: every later component held. The treated position's residual stream is the clean one plus the change of the
  edited contribution, everything else is clean; scores change because its keys are read from that stream.
- `own stream`: the treated position's own attention and MLPs are live, all other positions' residual streams are held.
- `total`: everything is live.

Beside them, `hold <what>`: the total with keys, queries or values held over a range of layers; what is missing then was
lost by the hold. Norm scales are recomputed from the changed residual stream in all of them. Beside each nested path
stands the same one with norm scales held: every norm above the edit divides by its clean denominator (`Hold("norm_scale")`), so
that a norm is linear and what is left of an effect did not come by what a longer stream is divided by. With edits of
several layers, the later ones are made of the clean contribution in `residual` (the changes add up), and of the run's own
in the others. Compare path patching (Wang et al., 2211.00593, section 3.1), which holds what is off the path as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import pandas as pd
import torch
import xarray as xr
from tqdm.auto import tqdm

from sink_circuits import arguments, statistics
from sink_circuits.adapters import Adapter, adapt
from sink_circuits.clean_runs import CleanRun, run_clean
from sink_circuits.detection import Sinks
from sink_circuits.edited_runs import EditedRun, run_edited
from sink_circuits.edits import Contribution, Edit
from sink_circuits.errors import InputError
from sink_circuits.experiments import at_layers, check_found, prepare_removal
from sink_circuits.holds import NORM_SCALE, Hold, norm_scale_hooks
from sink_circuits.measurement import as_parts, check_handed_on, check_options, measure, rows_per_batch
from sink_circuits.prompts import as_tokens
from sink_circuits.results import Manifest, read_result, write_result
from sink_circuits.scores import MIN_QUERIES, column_log_odds, column_scores

OWN_STREAM = (Hold("resid_post", positions="others"),)
RESIDUAL = (*OWN_STREAM, Hold("attn_out", positions="treated"), Hold("mlp_out", positions="treated"))
PATHS: Mapping[str, tuple[Hold, ...]] = {"residual": RESIDUAL, "own stream": OWN_STREAM, "total": ()}
"""The nested paths, from the narrowest to the total, and what is held in each."""

HOLDS = (Hold("k"), Hold("k", positions="treated"), Hold("q"), Hold("v"))
"""Held by default, one at a time, in all layers above the edit."""

STEPS = {"residual": "residual", "own components": "own stream", "other positions": "total"}
"""What each path adds to the one before: step -> path. They sum to the total; the last is what the others leave over."""

OUTCOMES = {"score": column_scores, "log_odds": column_log_odds}
NORM_SCALES = "recomputed"
SCALES_HELD: Mapping[str, tuple[Hold, ...]] = {
    f"{name}, norm scales held": (*held, Hold(NORM_SCALE)) for name, held in PATHS.items()
}
"""The nested paths again, with every norm's denominator held as well, at all positions."""


@dataclass(frozen=True)
class PathEffect:
    """The nested paths of one edit per sink, and the total with something held.

    `data` (xarray): `score` and `log_odds` of the treated position [sink, run, layer, head] and their clean values
    `clean_<outcome>` [sink, layer, head]. `run`: "residual", "own stream", "total", the same three with ", norm scales held",
    and "hold <label>" for every hold.
    Layers up to the first edited one (`first_layer` [sink]) hold the clean values exactly. `reading` [sink, layer]: the
    layers that read the sink above the edit, l_start+1..l_end+1. `table`: one row per sink. `norm_scales`: what was done with
    them; "recomputed" from the changed residual stream unless a run says that they are held.
    """

    data: xr.Dataset
    table: pd.DataFrame
    manifest: Manifest
    norm_scales: str = NORM_SCALES

    @property
    def holds(self) -> tuple[str, ...]:
        """What was held, one run each."""
        return tuple(str(run).removeprefix("hold ") for run in self.data["run"].values if str(run).startswith("hold "))

    @property
    def paths(self) -> tuple[str, ...]:
        """The nested paths that were measured, those with norm scales held behind the others."""
        return tuple(str(run) for run in self.data["run"].values if not str(run).startswith("hold "))

    def effect(self, outcome: str = "score") -> xr.DataArray:
        """Edited minus clean, [sink, run, layer, head]. Raises InputError for an unknown outcome."""
        if not isinstance(outcome, str) or outcome not in OUTCOMES:
            raise InputError(f"outcome {arguments.shown(outcome)} was not measured: there are {', '.join(OUTCOMES)}.")
        return self.data[outcome] - self.data[f"clean_{outcome}"]

    def steps(self, outcome: str = "score") -> xr.DataArray:
        """What each path adds to the one before, [sink, step, layer, head]; the steps sum to the total.

        "residual"; "own components": own stream - residual; "other positions": total - own stream, what the treated
        position's own stream leaves over.
        """
        paths = self.effect(outcome).sel(run=list(PATHS))
        steps = xr.concat([paths.isel(run=[0]), paths.diff("run")], dim="run")
        return steps.assign_coords(run=list(STEPS)).rename(run="step")

    def lost(self, outcome: str = "score") -> xr.DataArray:
        """Total minus the total with something held, [sink, hold, layer, head]: the effect that went through what is held."""
        effects = self.effect(outcome)
        held = effects.sel(run=[f"hold {label}" for label in self.holds])
        lost = effects.sel(run="total", drop=True) - held
        return lost.assign_coords(run=list(self.holds)).rename(run="hold").transpose("sink", "hold", ...)

    def over_lifetime(self, outcome: str = "score", what: str = "effect") -> xr.DataArray:
        """Mean over heads and over the layers that read the sink above the edit, [sink, ...]; NaN where there are none.

        `what`: "effect", "edited" or "clean", [sink, run]; "steps" [sink, step] or "lost" [sink, hold]. Raises InputError.
        """
        effect = self.effect(outcome)  # refuses what was not measured
        values = {
            "effect": lambda: effect,
            "edited": lambda: self.data[outcome],
            "clean": lambda: self.data[f"clean_{outcome}"].broadcast_like(effect),
            "steps": lambda: self.steps(outcome),
            "lost": lambda: self.lost(outcome),
        }
        arguments.one_of(what, "what", values, "use {}")
        return values[what]().mean("head").where(self.data["reading"]).mean("layer")

    def summary(self, outcome: str | None = None, *, confidence: float = 0.95) -> pd.DataFrame:
        """One row per outcome (or of this one) and part: its mean over prompts and its share of the total, with intervals.

        Columns: outcome, kind ("path", "step", "hold"), part, norm_scales ("recomputed" or "held"), effect (of a hold: the
        effect lost), low, high, share (of the total: ratio of the means), share_low, share_high, n_prompts, n_sinks. Shares
        may lie outside [0, 1], where parts work against each other. The share's interval is that of the linearised ratio
        (`ratio_to`).
        """
        rows = []
        for name in OUTCOMES if outcome is None else (outcome,):
            effects = self.over_lifetime(name)
            total = effects.sel(run="total").to_numpy()
            parts = (
                ("path", "run", effects.sel(run=list(self.paths))),
                ("step", "step", self.over_lifetime(name, "steps")),
                ("hold", "hold", self.over_lifetime(name, "lost")),
            )
            for kind, dim, values in parts:
                for label in values[dim].values:
                    own = values.sel({dim: label}).to_numpy()
                    seed = f"paths/{name}/{kind}/{label}"
                    mean = statistics.bootstrap_over_prompts(
                        own, self.table["prompt"], name=seed, confidence=confidence
                    )
                    share = ratio_to(total, own, self.table["prompt"], name=f"{seed}/share", confidence=confidence)
                    rows.append(
                        {
                            "outcome": name, "kind": kind, "part": label,
                            "norm_scales": "held" if str(label) in SCALES_HELD else NORM_SCALES, "effect": mean.mean, "low": mean.low,
                            "high": mean.high, "share": share.mean, "share_low": share.low, "share_high": share.high,
                            "n_prompts": mean.n, "n_sinks": int(np.isfinite(own).sum()),
                        }
                    )  # fmt: skip
        return pd.DataFrame(rows)

    def to_dataframe(self) -> pd.DataFrame:
        """Long format, one row per outcome, sink, run, layer and head: edited, clean, effect, and left_over = total - effect."""
        frames = []
        for outcome in OUTCOMES:
            effect = self.effect(outcome)
            arrays = {
                "edited": self.data[outcome], "clean": self.data[f"clean_{outcome}"].broadcast_like(effect),
                "effect": effect, "left_over": effect.sel(run="total", drop=True) - effect,
            }  # fmt: skip
            frames.append(xr.Dataset(arrays).to_dataframe().reset_index().assign(outcome=outcome))
        frame = pd.concat(frames, ignore_index=True)
        columns = ["outcome", "sink", "run", "layer", "head", "edited", "clean", "effect", "left_over"]
        return frame[columns].join(self.table[["prompt", "pos", "token", "kind", "l_start", "l_end"]], on="sink")

    def plot(self, outcome: str = "log_odds"):
        """Nested paths, what each adds, and what holds take away (plotly)."""
        from sink_circuits import figures

        return figures.paths_figure(self, outcome)

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """One safetensors file, whole or not at all. Raises ResultError when `path` exists or cannot be written."""
        write_result(
            path, "paths", self.data, self.table, self.manifest, overwrite=overwrite, norm_scales=self.norm_scales
        )

    @staticmethod
    def load(path: str | Path) -> PathEffect:
        """Read what `save` wrote. Raises ResultError for any other file."""
        data, table, manifest, meta = read_result(path, "paths", "a result with paths")
        return PathEffect(data, table, manifest, meta["norm_scales"])

    def __repr__(self) -> str:
        head = f"PathEffect({len(self.table)} sinks in {self.table['prompt'].nunique()} prompts, norm scales {self.norm_scales})"
        return f"{head}\n{self.summary().to_string(float_format=lambda x: f'{x:.4g}')}"


def path_effects(
    model, tokens, sinks: Sinks | None = None, *, layer=None, layers: Sequence[int] | None = None, forming: pd.Series | None = None,
    intervention: str | Callable[[Contribution], Contribution] = "zero", found: Sinks | None = None, holds: Sequence[Hold] = HOLDS,
    norm_scales: str = "auto", **options,
) -> PathEffect:  # fmt: skip
    """By which paths an intervention on one MLP, or a joint set, reaches the sinks' later scores.

    `intervention`, `layer`, `layers`, `forming`, `found` as in `ablate`; `holds`: what is held clean, one run each. Options
    (`OPTIONS`) as in `measure`, and `norm_scales` as in `measure_paths`. Takes one row for the total and 6 + len(holds) for the
    others. Raises InputError, also for a hold that reaches nothing.
    """
    check_handed_on(options, OPTIONS)
    name, treated, made = prepare_removal(
        model, tokens, sinks, layer, layers, forming, intervention, check_found(found, intervention), options
    )
    edits = at_layers(treated.layers_of, made)
    settings = {"layers": treated.layers_said, "intervention": name}
    return measure_paths(
        model, tokens, treated.sinks, lambda row: edits(name, row), holds=holds, norm_scales=norm_scales, settings=settings, **options
    )  # fmt: skip


OPTIONS = ("min_queries", "batch_size", "memory", "attention_mask", "clean_cache", "path", "verbose")
"""Options of `measure` that paths and mass accounts take too."""


def measure_paths(
    model, tokens, sinks: Sinks, edits_of: Callable[[pd.Series], Sequence[Edit]], *, holds: Sequence[Hold] = HOLDS,
    norm_scales: str = "auto", min_queries: int = MIN_QUERIES, batch_size: int | None = None, memory: float | None = None,
    attention_mask=None, clean_cache=None, path: str = "auto", verbose: bool = True, settings: Mapping | None = None,
) -> PathEffect:  # fmt: skip
    """`path_effects` of any edits: `edits_of(row of the sink table)` are those of that sink's run.

    `norm_scales`: "both", every nested path with norm scales recomputed and with them held; "recomputed" only; "auto", both where the
    model's norms can be held, else recomputed, with the reason in the result's `norm_scales`.
    The total is what `measure` gives for the same edits. Edits that leave every clean contribution as it is, to the bit,
    are the clean run: copied, all effects exactly 0. All edits and holds are checked before the first forward pass.
    """
    adapter = adapt(model)
    check_options(adapter, min_queries, batch_size, path, memory=memory, settings=settings, verbose=verbose)
    holds = tuple(_check_hold(hold) for hold in arguments.several(holds, "holds", empty=True))
    arguments.function(edits_of, "edits_of", "a row of the sink table")
    if len({hold.label for hold in holds}) < len(holds):
        raise InputError(f"holds {[hold.label for hold in holds]}: name each once.")
    scales, nested = _scales(adapter, norm_scales)
    given, tokens = tokens, as_tokens(model, tokens, attention_mask)
    runs = {**nested, **{f"hold {hold.label}": (hold,) for hold in holds}}
    lengths = {name: len(ids) for name, ids in zip(tokens.names, tokens.ids, strict=True)}

    def edits(label: str, row: pd.Series) -> tuple[Edit, ...]:
        parts = as_parts(edits_of(row))
        if held := [part.label for part in parts if isinstance(part, Hold)]:
            raise InputError(f"the hold of {held[0]!r} stands among the edits: give it in holds=, beside the paths.")
        own = cast(tuple[Edit, ...], parts)
        for edit in own:
            edit.check(adapter.n_layers, lengths[row.prompt])
        for hold in (hold for held in runs.values() for hold in held):
            _check_reach(hold, own, row, adapter.n_layers, lengths[row.prompt])
        return own

    total = measure(
        model, given, sinks, ["total"], edits, what="paths", min_queries=min_queries, batch_size=batch_size, memory=memory, path=path,
        attention_mask=attention_mask, clean_cache=clean_cache, verbose=False,
        settings={**(settings or {}), "holds": [hold.label for hold in holds], "norm_scales": scales},
    )  # fmt: skip
    table = total.table
    rows_of = rows_per_batch(adapter, tokens, table, path, memory)
    values = {name: np.repeat(total.data[name].to_numpy(), len(runs), axis=1) for name in OUTCOMES}
    held_runs = [(index, held) for index, held in enumerate(runs.values()) if held]
    bar = tqdm(total=len(table) * len(held_runs), desc="paths", unit="run", disable=not verbose)
    for index, (prompt, ids) in enumerate(zip(tokens.names, tokens.ids, strict=True)):
        rows = table[table["prompt"] == prompt]
        if not len(rows):
            continue
        mask = None if attention_mask is None else torch.as_tensor(attention_mask)[index]
        chosen = sorted(set(rows["pos"]))
        clean = run_clean(model, ids, chosen=chosen, clean_cache=clean_cache, row=index, mask=mask, path=path)
        for sink, row in rows.iterrows():
            own = edits("", row)
            if _changes_nothing(own, clean):
                for name in OUTCOMES:
                    values[name][sink] = total.data[f"clean_{name}"].to_numpy()[sink]
            else:
                for run, made in _held_runs(model, clean, own, held_runs, batch_size or rows_of[prompt], path):
                    column = made.columns.chosen.index(int(row.pos))
                    for name, of_columns in OUTCOMES.items():
                        found = of_columns(made.columns, adapter.windows, min_queries)[..., column]
                        values[name][sink, run] = found.cpu().numpy()
            bar.update(len(held_runs))
    bar.close()
    reading = total.reading().isel(edit=0, drop=True).transpose("sink", "layer")
    arrays: dict[str, tuple[tuple[str, ...], np.ndarray]] = {
        **{name: (("sink", "run", "layer", "head"), array) for name, array in values.items()},
        **{f"clean_{name}": (("sink", "layer", "head"), total.data[f"clean_{name}"].to_numpy()) for name in OUTCOMES},
        "first_layer": (("sink",), total.data["first_layer"].to_numpy()[:, 0]),
        "reading": (("sink", "layer"), reading.to_numpy()),
    }
    coords = {name: np.arange(size) for name, size in total.data.sizes.items() if name != "edit"} | {"run": list(runs)}
    return PathEffect(xr.Dataset(arrays, coords=coords), table, total.manifest, scales)


def _scales(adapter: Adapter, norm_scales: str) -> tuple[str, Mapping[str, tuple[Hold, ...]]]:
    """What is done with norm scales, in words, and the nested paths that are run."""
    if norm_scales not in ("auto", "both", "recomputed"):
        raise InputError(f"norm_scales {norm_scales!r} is unknown: use 'auto', 'both' or 'recomputed'.")
    if norm_scales == "recomputed":
        return NORM_SCALES, PATHS
    try:
        norm_scale_hooks(adapter)
    except InputError as error:
        if norm_scales == "both":
            raise
        return f"{NORM_SCALES} only: {error}", PATHS
    return f"{NORM_SCALES}, and held where a path says so", {**PATHS, **SCALES_HELD}


def _check_hold(hold) -> Hold:
    if not isinstance(hold, Hold):
        raise InputError(f"hold {hold!r} is not a Hold: write Hold('k', layers=range(4, 8)), for example.")
    return hold


def _check_reach(hold: Hold, edits: Sequence[Edit], row: pd.Series, n_layers: int, n_positions: int) -> None:
    try:
        hold.check(edits, n_layers, n_positions)
    except InputError as error:
        raise InputError(f"at position {row.pos} of prompt {row.prompt!r}: {error}") from error


def _changes_nothing(edits: Sequence[Edit], clean: CleanRun) -> bool:
    """True where every clean contribution comes out of its edit as it went in: by induction the run is the clean one."""
    here = [(edit, clean.contribution[edit.layer, list(edit.positions)]) for edit in edits]
    return all(edit.changes_nothing or torch.equal(edit.apply(own.clone()), own) for edit, own in here)


def _held_runs(model, clean: CleanRun, edits: tuple[Edit, ...], held_runs, size: int, path: str):
    """(index of the run, the run) for all runs in which something is held."""
    for start in range(0, len(held_runs), size):
        chunk = held_runs[start : start + size]
        made: list[EditedRun] = run_edited(model, clean, [(*edits, *held) for _, held in chunk], path=path)
        yield from zip([index for index, _ in chunk], made, strict=True)


def ratio_to(
    whole: np.ndarray, part: np.ndarray, prompts, *, name: str, confidence: float = 0.95
) -> statistics.Estimate:  # fmt: skip
    """Mean of `part` over mean of `whole`, both means over prompts of their sinks, with a bootstrap interval over prompts.

    The interval is that of the linearised ratio R + (part - R * whole) / mean(whole) (Efron & Tibshirani, ch. 22; the
    influence of one prompt on R): a bootstrap of the ratio itself breaks down when a resample's whole comes near 0.
    Sinks where either is undefined are left out; NaN where the whole is 0.
    """
    both = np.isfinite(whole) & np.isfinite(part)
    whole, part = np.where(both, whole, np.nan), np.where(both, part, np.nan)
    wholes, parts = statistics.prompt_means(whole, prompts), statistics.prompt_means(part, prompts)
    mean = float(wholes.mean()) if len(wholes) else 0.0
    if mean == 0:
        return statistics.Estimate(math.nan, math.nan, math.nan, len(wholes))
    ratio = float(parts.mean()) / mean
    return statistics.bootstrap_over_prompts(
        ratio + (part - ratio * whole) / mean, prompts, name=name, confidence=confidence
    )
