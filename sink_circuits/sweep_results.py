"""What a sweep's folder holds: its cells' results as one table, read without any model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from sink_circuits import arguments, statistics
from sink_circuits.effects import Effect
from sink_circuits.errors import InputError, ResultError
from sink_circuits.outcomes import BUILT_IN, CHECKS, ON_REQUEST
from sink_circuits.results import FORMAT, write_whole
from sink_circuits.studies import Study

STUDY, FAILURES = "study.json", "failures.json"


def layers_text(layers: Sequence[int]) -> str:
    """A joint set in tables: "6+7"."""
    return "+".join(map(str, layers))


def _by_layer(text: str) -> tuple[int, ...]:
    """Sorts what `layers_text` wrote, and "forming"."""
    return () if text == "forming" else tuple(map(int, text.split("+")))


def cell_path(folder: Path, name: str) -> Path:
    return folder / f"{name}.safetensors"


def read_cell(folder: str | Path, name: str) -> Effect | None:
    """The cell's result; None where there is none, a damaged one, or another's under this name."""
    path = cell_path(Path(folder), name)
    if not path.is_file():
        return None
    try:
        effect = Effect.load(path)
    except (ResultError, ValueError):
        return None
    return effect if effect.manifest.settings.get("cell") == name else None


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text("utf-8"))
        if not isinstance(content, dict):
            raise ValueError("not a JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise ResultError(
            f"{path} cannot be read ({error}): it was not written by a sweep; choose another folder."
        ) from error
    return content


@dataclass(frozen=True)
class SweepResult:
    """What a sweep's folder holds.

    `cells`: one row per cell: cell (its name), model, weights, prompt, layers, state ("done", "failed", "missing"),
    n_sinks, cause. `table`: one row per sink, edit and outcome: model, prompt, pos, token_id, token, kind, l_start,
    l_end, layers ("6+7", or "forming"), first_layer and last_layer edited, intervention, factor, outcome, and its mean
    over heads and the layers that read the sink above the edit: clean, edited, effect (NaN where there are none).
    """

    study: Study
    folder: Path
    cells: pd.DataFrame
    table: pd.DataFrame

    @property
    def failed(self) -> pd.DataFrame:
        """The cells that failed, with their causes."""
        return self.cells[self.cells["state"] == "failed"].reset_index(drop=True)

    @property
    def complete(self) -> bool:
        return bool((self.cells["state"] == "done").all())

    def to_dataframe(self) -> pd.DataFrame:
        """Long format, one row per sink, edit and outcome; a copy of `table`."""
        return self.table.copy()

    def effect(self, cell: str) -> Effect:
        """All that was measured in one cell, by layer and head. Raises ResultError where it is not done, or its prompt has no sinks."""
        if (effect := read_cell(self.folder, cell)) is None:
            raise ResultError(f"cell {cell} is not done in {self.folder}: `cells` lists those that are.")
        if not len(effect.table):
            raise ResultError(
                f"the prompt of cell {cell} has no sinks of these kinds, so that nothing was measured: see `cells`."
            )
        return effect

    def summary(self, outcomes: Sequence[str] | None = None, confidence: float = 0.95) -> pd.DataFrame:
        """One row per model, layers, intervention, factor and outcome: means over prompts, the effect with its bootstrap interval.

        Columns as in `Effect.summary`: clean, edited, effect, low, high, n_prompts, n_sinks. `outcomes`: only these.
        Raises InputError for one that was not measured.
        """
        left_out = (*CHECKS, *(name for name in ON_REQUEST if not getattr(self.study, name)))
        known = [one.name for one in BUILT_IN if one.name not in left_out]
        known += [path.split(":")[1] for path in self.study.outcomes]
        if unknown := [name for name in arguments.several(outcomes or (), "outcomes", empty=True) if name not in known]:
            raise InputError(f"outcome {unknown[0]!r} was not measured: there are {', '.join(known)}.")
        table = self.table[self.table["outcome"].isin(list(known if outcomes is None else outcomes))]
        rows = []

        def place(keys) -> tuple:
            model, layers, intervention, factor, outcome = keys
            own = self.study.interventions.index(intervention)
            return self.study.models.index(model), _by_layer(layers), own, factor, known.index(outcome)

        groups = table.groupby(list(_SUMMARY[:5]), sort=False)
        for keys, group in sorted(groups, key=lambda pair: place(pair[0])):
            model, layers, intervention, *rest = keys
            own = () if intervention == "rescale" else (intervention,)
            name = "/".join(map(str, (self.study.seed, "sweep", model, layers, *own, *rest)))
            estimate = statistics.bootstrap_over_prompts(
                group["effect"], group["prompt"], name=name, confidence=confidence
            )
            clean = statistics.prompt_means(group["clean"].where(group["effect"].notna()), group["prompt"])
            mean = float(clean.mean()) if len(clean) else np.nan
            rows.append(
                dict(zip(_SUMMARY[:5], keys, strict=True))
                | {
                    "clean": mean, "edited": mean + estimate.mean, "effect": estimate.mean, "low": estimate.low,
                    "high": estimate.high, "n_prompts": estimate.n, "n_sinks": int(group["effect"].notna().sum()),
                }
            )  # fmt: skip
        return pd.DataFrame(rows, columns=list(_SUMMARY))

    def plot(self, outcome: str = "log_odds"):
        """Effects by layer and factor, a panel per model (plotly)."""
        from sink_circuits import figures

        return figures.sweep_figure(self, outcome)

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """The long table as .parquet or .csv, whole or not at all; the folder itself is what `load_sweep` reads.

        Raises InputError for another ending, ResultError when it cannot be written.
        """
        path = arguments.path(path)
        if path.suffix not in (".parquet", ".csv"):
            raise InputError(f"{path} has no known ending: use .parquet or .csv.")
        frame = self.to_dataframe()
        frame.attrs = {"sink_circuits": json.dumps({"study": self.study.to_dict()})}
        writer = (
            frame.to_parquet if path.suffix == ".parquet" else lambda temporary: frame.to_csv(temporary, index=False)
        )
        write_whole(path, writer, overwrite=overwrite)

    def __repr__(self) -> str:
        states = ", ".join(f"{n} {state}" for state, n in self.cells["state"].value_counts().items()) or "not planned"
        sinks = self.table[["model", "prompt", "pos", "l_start"]].drop_duplicates()
        return f"SweepResult({self.folder}: cells {states}; {len(sinks)} sinks in {len(self.study.models)} models)"


_TABLE = {
    "model": "object", "prompt": "object", "pos": "int64", "token_id": "int64", "token": "object", "kind": "object",
    "l_start": "int64", "l_end": "int64", "layers": "object", "first_layer": "int64", "last_layer": "int64",
    "intervention": "object", "factor": "float64", "outcome": "object", "clean": "float64", "edited": "float64", "effect": "float64",
}  # fmt: skip


_SUMMARY = (
    "model", "layers", "intervention", "factor", "outcome", "clean", "edited", "effect", "low", "high", "n_prompts", "n_sinks",
)  # fmt: skip


def load_sweep(folder: str | Path) -> SweepResult:
    """What the sweep in `folder` has computed so far. Raises ResultError for a folder without a sweep."""
    folder = arguments.path(folder, "folder")
    record = read_json(folder / STUDY)
    if record.get("format") != FORMAT:
        raise ResultError(
            f"{folder} has format {record.get('format')}, this version reads {FORMAT}: use the version that wrote it."
        )
    failures = read_json(folder / FAILURES) if (folder / FAILURES).exists() else {}
    try:
        study, plans = Study(**record["study"]), _plans(record.get("cells", []))
    except (TypeError, ValueError, KeyError) as error:
        raise ResultError(f"{folder / STUDY} is damaged ({error}): sweep into another folder.") from error
    cells, frames = [], []
    for plan in plans:
        effect = read_cell(folder, plan["cell"])
        state = "done" if effect is not None else "failed" if plan["cell"] in failures else "missing"
        row = {**plan, "layers": ", ".join(plan["layers"]), "state": state}
        cells.append(
            {**row, "n_sinks": 0 if effect is None else len(effect.table), "cause": failures.get(plan["cell"], "")}
        )
        if effect is not None and len(effect.table):
            frames.append(_rows(effect, plan["model"]))
    columns = ["cell", "model", "weights", "prompt", "layers", "state", "n_sinks", "cause"]
    table = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=list(_TABLE))
    return SweepResult(study, folder, pd.DataFrame(cells, columns=columns), table.astype(_TABLE))


def _plans(cells) -> list[dict]:
    """The plan of a sweep as `sweep` writes it. Raises ValueError otherwise."""
    keys = {"cell", "model", "weights", "prompt", "layers"}
    if not isinstance(cells, list) or not all(isinstance(one, dict) and set(one) == keys for one in cells):
        raise ValueError("its plan of cells is not what a sweep writes")
    if not all(
        isinstance(one["layers"], list)
        and all(isinstance(part, str) for part in one["layers"])
        and Path(str(one["cell"])).name == one["cell"]
        for one in cells
    ):
        raise ValueError("a cell of its plan has no proper name or layers")
    return cells


def _rows(effect: Effect, model: str) -> pd.DataFrame:
    """The long table of one cell, in the columns of `_TABLE`."""
    n_sinks, edits = len(effect.table), effect.manifest.settings["edits"]
    sinks = effect.table[["prompt", "pos", "token_id", "token", "kind", "l_start", "l_end"]]
    frame = sinks.loc[sinks.index.repeat(len(edits))].reset_index(drop=True)
    frame["model"] = model
    for name in ("layers", "intervention", "factor"):
        frame[name] = [edit.get(name, "rescale") for edit in edits] * n_sinks  # older files know only rescalings
    for name, source in (("first_layer", "first_layer"), ("last_layer", "last_edited")):
        frame[name] = effect.data[source].transpose("sink", "edit").to_numpy().ravel()
    frames = []
    for outcome in effect.outcomes:
        values = {
            what: effect.over_lifetime(outcome, what).transpose("sink", "edit").to_numpy().ravel()
            for what in ("clean", "edited", "effect")
        }
        frames.append(frame.assign(outcome=outcome, **values))
    return pd.concat(frames, ignore_index=True)[list(_TABLE)]
