"""A folder of study figures: each one's files, and the note beside them that makes it complete."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from sink_circuits.errors import ResultError, SinkCircuitsError
from sink_circuits.figures import LIBRARY, save_figure
from sink_circuits.results import check_target, write_whole
from sink_circuits.study_figures import FIGURES, LEVELS, StudyFigure, tables_of

FORMATS = ("html", "svg")
"""What figures are written as, unless told."""


@dataclass(frozen=True)
class Made:
    """Where one figure (or, with figure "", one model) stands: "made", "absent" (there is nothing to draw) or "failed", and why."""

    model: str
    figure: str
    state: str
    reason: str = ""
    seconds: float = 0.0


def read_plan(folder: Path) -> dict | None:
    """The settings that this folder's figures were made with; None where there are none yet."""
    try:
        plan = json.loads((folder / "plan.json").read_text("utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise ResultError(f"{folder / 'plan.json'} cannot be read ({error}): choose another folder.") from error
    return plan if isinstance(plan, dict) else None


def make_figure(
    figure: StudyFigure, subject, name: str, folder: Path, formats: Sequence[str] = FORMATS, **note
) -> Made:
    """One figure's files, or the note that says why there are none; the note is written last and makes it complete.

    `folder`: the study's own for a figure of all models (`name` is then ""), else the model's. Pages share plotly.js, which lies in
    the study's folder.
    """
    started = time.monotonic()
    _note_path(folder, figure.name).unlink(missing_ok=True)
    try:
        result = figure.make(subject)
        drawn = result.plot()
    except SinkCircuitsError as none:
        made = Made(name, figure.name, "absent", str(none), time.monotonic() - started)
        _note(folder, made, [], {}, note)
        return made
    except Exception as error:  # the other figures are still worth having
        return Made(name, figure.name, "failed", f"{type(error).__name__}: {error}", time.monotonic() - started)
    files, unwritten = [], {}
    for suffix, table in tables_of(result).items():
        for ending, write in ((".parquet", table.to_parquet), (".csv", partial(table.to_csv, index=False))):
            path = folder / f"{figure.name}{suffix}{ending}"
            write_whole(path, write, overwrite=True)
            files.append(path.name)
    result.save(folder / f"{figure.name}.safetensors", overwrite=True)
    files.append(f"{figure.name}.safetensors")
    for kind in formats:
        path = folder / f"{figure.name}.{kind}"
        check_target(path, overwrite=True)
        try:
            save_figure(drawn, path, library=f"../{LIBRARY}" if name else LIBRARY, overwrite=True)
            files.append(path.name)
        except ResultError as error:  # no kaleido or no browser: the tables and the page are still there
            unwritten[kind] = str(error)
    made = Made(name, figure.name, "made", " ".join(unwritten.values()), time.monotonic() - started)
    _note(folder, made, files, unwritten, note)
    return made


def _note_path(folder: Path, name: str) -> Path:
    return folder / f"{name}.json"


def _note(folder: Path, made: Made, files: Sequence[str], unwritten: Mapping[str, str], note: Mapping) -> None:
    text = json.dumps({**dataclasses.asdict(made), "files": list(files), "unwritten": unwritten, **note}, indent=1)
    path = _note_path(folder, made.figure)
    write_whole(path, lambda temporary: temporary.write_text(text, "utf-8"), overwrite=True)


def read_note(folder: Path, name: str) -> dict | None:
    """What a figure's note says, with its files; None without one, or where it cannot be read."""
    try:
        note = json.loads(_note_path(folder, name).read_text("utf-8"))
        return (
            note
            if isinstance(note, dict) and {"state", "reason", "seconds", "files", "unwritten"} <= set(note)
            else None
        )
    except (OSError, ValueError, TypeError, RecursionError):
        return None


def is_complete(folder: Path, name: str, formats: Sequence[str] = FORMATS, **expected) -> bool:
    """Whether a figure's note is there, with what is expected of it, and every file that it should have."""
    note = read_note(folder, name)
    if note is None or any(note.get(key) != value for key, value in expected.items()):
        return False
    drawn = (
        {f"{name}.{kind}" for kind in formats if kind not in note["unwritten"]} if note["state"] == "made" else set()
    )
    return all((folder / file).is_file() for file in drawn.union(note["files"]))


def models_in(folder: Path) -> list[str]:
    """Models whose sinks this folder holds, by name."""
    return sorted(path.parent.name for path in folder.glob("*/sinks.parquet"))


def states_of(folder: Path) -> list[Made]:
    """Every figure that has a note, models in order."""
    notes = [("", LEVELS.name, read_note(folder, LEVELS.name))]
    notes += [
        (name, figure.name, read_note(folder / name, figure.name)) for name in models_in(folder) for figure in FIGURES
    ]
    return [
        Made(model, figure, note["state"], note["reason"], note["seconds"])
        for model, figure, note in notes
        if note is not None
    ]
