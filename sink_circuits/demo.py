"""The main job from start to end: sinks, layer map, dose-response, ablation, and the report that shows them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from sink_circuits.anatomy_of_one import PARTS, anatomy_of_one
from sink_circuits.controls import with_controls
from sink_circuits.detection import Sinks, find_sinks
from sink_circuits.errors import InputError
from sink_circuits.experiments import ablate, dose_response, layer_map
from sink_circuits.prompts import Tokens
from sink_circuits.token_scores import token_scores

RESULTS = (
    "sinks.parquet",
    "layer_map.safetensors",
    "dose_response.safetensors",
    "ablation.safetensors",
    "controls.safetensors",
    "token_scores.safetensors",
    *(f"{name}.safetensors" for name in PARTS),
    "report.html",
)
"""What `run` writes, in this order; parts of the anatomy that the model does not have are not there."""
N_RANDOM = 5
"""Random perturbations per sink in the demo: few, for its time."""


def select_sinks(
    model, tokens: Tokens, kinds: Sequence[str], max_sinks: int | None, *, verbose: bool = True, **thresholds
) -> Sinks:
    """Sinks of these kinds, the first `max_sinks` in turns over the prompts; says what is left out.

    Raises InputError for no kinds or a `max_sinks` below 1, before anything is run, and when there are no such sinks.
    """
    check_selection(kinds, max_sinks)
    found = find_sinks(model, tokens, verbose=verbose, **thresholds)
    return spread_over_prompts(found, kinds, max_sinks, verbose=verbose)


def check_selection(kinds: Sequence[str], max_sinks: int | None) -> None:
    """Raises InputError for what would leave no sink to treat."""
    if not kinds:
        raise InputError("no kinds of sink to treat: name at least one of primary, secondary, primary-like (--kinds).")
    if max_sinks is not None and max_sinks < 1:
        raise InputError(f"max_sinks = {max_sinks}: at least 1, or None for all.")


def spread_over_prompts(found: Sinks, kinds: Sequence[str], max_sinks: int | None, *, verbose: bool = True) -> Sinks:
    """At most `max_sinks` sinks of these kinds with a defined score, one prompt after the other: prompts are the unit."""
    check_selection(kinds, max_sinks)
    chosen = found.select(*kinds)
    counts = ", ".join(f"{n} {kind}" for kind, n in found.table["kind"].value_counts().items()) or "none"
    if not len(chosen):
        raise InputError(
            f"no sinks of kind {' or '.join(kinds)} were found in {len(found.prompts)} prompts (found: {counts}): "
            "treat other kinds (--kinds), or more prompts."
        )
    usable = chosen.table[chosen.table["score"].notna()]
    if not len(usable):
        raise InputError(
            f"all {len(chosen)} sinks stand too near the end of their texts for a score: give longer prompts."
        )
    turn = usable.groupby("prompt", sort=False).cumcount()
    table = usable.loc[turn.sort_values(kind="stable").index[:max_sinks]].sort_index().reset_index(drop=True)
    if verbose and len(table) < len(chosen):
        print(f"Treating {len(table)} of {len(chosen)} sinks ({counts} found); raise --max-sinks to treat more.")
    return Sinks(table, found.prompts, found.manifest)


def run(
    model, tokens: Tokens, *, folder: Path, kinds: Sequence[str] = ("secondary", "primary-like"), max_sinks: int | None = 10,
    command: str = "", verbose: bool = True, **thresholds,
) -> Path:  # fmt: skip
    """Find sinks, map, dose and ablate their forming MLPs; each result lands in `folder` as soon as it is made, whole.

    `thresholds` as in `find_sinks`; `min_queries` holds for the experiments too. Returns the report's path. Raises
    InputError when no sinks of these kinds are found, before anything is written; a KeyboardInterrupt says what was kept.
    """
    from sink_circuits.report import write_report

    check_selection(kinds, max_sinks)
    started = time.monotonic()
    found = find_sinks(model, tokens, verbose=verbose, **thresholds)
    sinks = spread_over_prompts(found, kinds, max_sinks, verbose=verbose)
    needed = {name: thresholds[name] for name in ("min_queries",) if name in thresholds}
    options = {"verbose": verbose, **needed}
    folder.mkdir(parents=True, exist_ok=True)
    for name in RESULTS:  # of an earlier run: one folder holds one run
        (folder / name).unlink(missing_ok=True)
    try:
        found.save(folder / "sinks.parquet")
        mapped = layer_map(model, tokens, sinks, **options)
        mapped.save(folder / "layer_map.safetensors")
        forming = mapped.forming()
        dosed = dose_response(model, tokens, sinks, layer="forming", forming=forming, **options)
        dosed.save(folder / "dose_response.safetensors")
        ablated = ablate(model, tokens, sinks, layer="forming", forming=forming, loss=True, **options)
        ablated.save(folder / "ablation.safetensors")
        controlled = with_controls(
            model, tokens, sinks, layer="forming", forming=forming, found=found, n_random=N_RANDOM, **options
        )
        controlled.save(folder / "controls.safetensors")
        shown = token_scores(model, tokens, [sinks.table["prompt"].iloc[0]], **needed)
        shown.save(folder / "token_scores.safetensors")
        parts, missing = anatomy_of_one(model, tokens, sinks, forming, verbose=verbose)
        for part in parts:
            part.save(folder / f"{part.kind}.safetensors")
        report = folder / "report.html"
        write_report(
            report, sinks=found, results=[mapped, dosed, ablated, controlled, *parts], texts=shown.texts, scores=shown.scores,
            title=f"Attention sinks in {found.manifest.model}", command=command, notes=missing,
        )  # fmt: skip
    except KeyboardInterrupt as stop:
        kept = [name for name in RESULTS if (folder / name).is_file()]
        raise KeyboardInterrupt(f"{folder} keeps {', '.join(kept) or 'nothing'}, each whole") from stop
    if verbose:
        print(f"Done in {time.monotonic() - started:.0f} s.")
    return report
