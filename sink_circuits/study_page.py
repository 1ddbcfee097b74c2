"""The index page of a folder of study figures: what is there, what is not and why. It reads files; no model is run here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from sink_circuits.detection import Sinks
from sink_circuits.figures import visible
from sink_circuits.study_figures import FIGURES, LEVELS, StudyFigure
from sink_circuits.study_folder import Made, models_in, read_note, read_plan

TABLES = ("sinks.parquet", "sinks.csv", "records.jsonl", "generations.jsonl")
MAX_ROWS = 40
"""Sinks that the page lists of each model; the table files hold all."""


def render(folder: Path, states: Sequence[Made], wanted: Sequence[str], command: str = "") -> str:
    """The page as text. `states`: what there is of each figure; those in `wanted` that are not there are named.

    Paths in the page are relative to `folder`.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("sink_circuits", "templates"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["visible"] = lambda text: visible(str(text))
    environment.filters["plain"] = lambda text: visible(str(text), spaces=False)
    environment.filters["url"] = lambda text: quote(str(text))
    environment.filters["number"] = lambda value: "–" if value != value else f"{value:.3g}"
    by_place = {(one.model, one.figure): one for one in states}

    def shown(model: str, figures: Sequence[StudyFigure]) -> list[dict]:
        own = [figure for figure in figures if figure.name in wanted or (model, figure.name) in by_place]
        return [_figure(folder, model, figure, by_place) for figure in own]

    models = [_model(folder, name, shown(name, FIGURES)) for name in models_in(folder)]
    return environment.get_template("study.html.j2").render(
        command=command, plan=read_plan(folder) or {}, models=models,
        levels=shown("", [LEVELS]),
        records=sorted(path.stem for path in (folder / "records").glob("*.jsonl")),
        failed=[one for one in states if one.state == "failed"],
    )  # fmt: skip


def _model(folder: Path, name: str, figures: list[dict]) -> dict:
    found = Sinks.load(folder / name / "sinks.parquet")
    table, manifest = found.table, found.manifest
    return {
        "name": name, "manifest": manifest, "figures": figures, "n_sinks": len(table),
        "kinds": [(str(kind), int(n)) for kind, n in table["kind"].value_counts().items()],
        "rows": table.head(MAX_ROWS).to_dict("records"),
        "files": [file for file in TABLES if (folder / name / file).is_file()],
        "seconds": sum(figure["made"].seconds for figure in figures if figure["made"] is not None),
    }  # fmt: skip


def _figure(folder: Path, model: str, figure: StudyFigure, by_place: dict) -> dict:
    note = read_note(folder / model, figure.name)
    files = note["files"] if note else []
    at = f"{quote(model)}/" if model else ""
    return {
        "title": figure.title, "caption": figure.caption, "made": by_place.get((model, figure.name)),
        "links": [(*_described(Path(file), figure.name), at + quote(file)) for file in files],
        "image": next((at + quote(file) for kind in (".svg", ".png") for file in files if file.endswith(kind)), None),
        "page": next((at + quote(file) for file in files if file.endswith(".html")), None),
    }  # fmt: skip


def _described(file: Path, figure: str) -> tuple[str, str]:
    """A file's kind, and which of the figure's tables it is, where there are two."""
    return file.suffix.removeprefix(".").upper(), file.stem.removeprefix(figure).strip("_")
