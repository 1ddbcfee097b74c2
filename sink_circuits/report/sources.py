"""Reading results: any files and folders that this package saved, each told by what it holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from sink_circuits import arguments
from sink_circuits.anatomy.result import Anatomy
from sink_circuits.attribution import Attribution
from sink_circuits.claims import Claims
from sink_circuits.controlled import Controlled
from sink_circuits.detection import COLUMNS, Sinks
from sink_circuits.effects import Effect
from sink_circuits.errors import ResultError
from sink_circuits.mass import MassAccount
from sink_circuits.paths import PathEffect
from sink_circuits.results import read_dataset
from sink_circuits.sweep_results import STUDY, SweepResult, load_sweep, read_cell
from sink_circuits.token_scores import TokenScores

SUFFIXES = (".parquet", ".safetensors")
LOADERS = {
    "controls": Controlled.load, "paths": PathEffect.load, "mass": MassAccount.load, "claims": Claims.load,
    "attribution": Attribution.load, "token_scores": TokenScores.load,
}  # fmt: skip
"""By the kind that stands in a file; anatomy has its own, all others are experiments."""
ORDER = ("layer_map", "dose_response", "ablate", "ablate_neurons")
"""Experiments in the order of the argument; all others follow."""


def read_results(paths: Iterable[str | Path]) -> list:
    """Everything that these files and folders hold: results of any kind, each file once.

    A folder is a sweep's, or its .parquet and .safetensors files are read. Raises ResultError, naming the path, for what is
    missing, empty, of another kind, or cannot be read.
    """
    results, seen = [], set()
    for path in map(arguments.path, arguments.several(paths, "paths", empty=True)):
        for file in _files(path):
            if file.resolve() not in seen:
                seen.add(file.resolve())
                results.append(load_sweep(file) if file.is_dir() else read_result(file))
    return sorted(results, key=_place)


def read_result(path: str | Path) -> Any:
    """The result in one file. Raises ResultError for a file that holds none."""
    path = arguments.path(path)
    if path.suffix == ".parquet":
        return Sinks.load(path)
    if path.suffix != ".safetensors":
        raise ResultError(
            f"{path} is no result: those end in {' or '.join(SUFFIXES)} (tables in .csv and figures cannot be read back)."
        )
    _, meta = read_dataset(path)
    kind = meta.get("kind")
    try:
        if kind in LOADERS:
            return LOADERS[kind](path)
        if kind in {one.kind for one in Anatomy.__subclasses__()}:
            return Anatomy.load(path)
        return Effect.load(path)
    except (KeyError, TypeError, ValueError) as error:  # a header of the right kind with something missing
        raise ResultError(f"{path} holds a {kind} that this version cannot read ({error!r}): make it again.") from error


def sinks_of(results: Sequence) -> Sinks:
    """The sinks of these results: the table that was found where it is among them, else all that they treat.

    Raises ResultError when tables of several models or texts are given, or none of the results says what it treats.
    """
    results = arguments.several(results, "results", empty=True)
    tables = [one for one in results if isinstance(one, Sinks)]
    if len(tables) > 1:
        raise ResultError(f"{len(tables)} tables of sinks were given: a report shows one; name the results of one run.")
    if tables:
        return tables[0]
    frames = [(_table(result), result) for result in results]
    frames = [(frame, result) for frame, result in frames if frame is not None and len(frame)]
    if not frames:
        raise ResultError(
            "none of these results names the sinks that it treats: give the sinks.parquet of the run beside them."
        )
    table = pd.concat([frame.reindex(columns=list(COLUMNS)) for frame, _ in frames], ignore_index=True)
    table = table.drop_duplicates(["prompt", "pos", "l_start"]).sort_values(
        ["prompt", "pos", "l_start"], ignore_index=True
    )
    prompts, manifest = tuple(dict.fromkeys(table["prompt"])), _manifest(frames[0][1])
    is_sweep = isinstance(frames[0][1], SweepResult)  # whose cells know the tokens of one prompt each
    manifest = dataclasses.replace(
        manifest, what="sinks treated", n_prompts=len(prompts) if is_sweep else manifest.n_prompts,
        tokens="" if is_sweep else manifest.tokens, settings=manifest.settings.get("found", {}),
    )  # fmt: skip
    return Sinks(table, prompts, manifest)


def _files(path: Path) -> list[Path]:
    if not path.exists():
        raise ResultError(f"{path} does not exist: name results that were saved, or their folder.")
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ResultError(f"{path} is neither a file nor a folder: name results that were saved, or their folder.")
    if (path / STUDY).is_file():
        return [path]
    found = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES and file.is_file())
    if not found:
        raise ResultError(f"{path} holds no results ({' or '.join(SUFFIXES)} files, or a sweep): check the path.")
    return found


def _place(result) -> tuple[int, int]:
    """The order of the argument: sinks, experiments, controls, paths, mass, claims, the rest; files' order within."""
    kinds = (Sinks, Effect, Controlled, PathEffect, MassAccount, Attribution, Claims, SweepResult, Anatomy)
    first = next((i for i, kind in enumerate(kinds) if isinstance(result, kind)), len(kinds))
    second = ORDER.index(result.kind) if isinstance(result, Effect) and result.kind in ORDER else len(ORDER)
    return first, second


def _table(result) -> pd.DataFrame | None:
    """The sinks that a result treats; None where it does not say."""
    if isinstance(result, Claims):
        return result.sinks
    if isinstance(result, SweepResult):
        cells = [read_cell(result.folder, name) for name in result.cells["cell"]]
        tables = [cell.table for cell in cells if cell is not None]
        return pd.concat(tables, ignore_index=True) if tables else None
    table = getattr(result, "table", None)
    return table if table is not None and {"prompt", "pos", "l_start", "kind", "token"} <= set(table) else None


def _manifest(result):
    if isinstance(result, SweepResult):
        cells = (read_cell(result.folder, name) for name in result.cells["cell"])
        return next(cell.manifest for cell in cells if cell is not None)
    return result.manifest
