"""The page: one self-contained HTML file that says what was found, shows it, and says what it does not show."""

from __future__ import annotations

import base64
import gzip
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from sink_circuits import arguments, figures
from sink_circuits.anatomy.result import Anatomy
from sink_circuits.attribution import Attribution
from sink_circuits.claims import Claims
from sink_circuits.controlled import Controlled
from sink_circuits.detection import Sinks, check_table
from sink_circuits.effects import Effect
from sink_circuits.errors import InputError, ResultError
from sink_circuits.mass import MassAccount
from sink_circuits.paths import PathEffect
from sink_circuits.report.again import in_python
from sink_circuits.report.sections import Section, anatomy_sections, causal_sections
from sink_circuits.report.text import found, join, kind_counts, limits, number, question
from sink_circuits.results import check_target, write_whole
from sink_circuits.sweep_results import SweepResult

MAX_VIEWS = 8
"""Prompts whose tokens are shown: a page of hundreds would be too large to open."""

PATHS = {
    "fast": "fast: the plain Hugging Face module, checked against TransformerLens' hooks when the model was loaded",
    "reference": "reference: TransformerLens' hooks",
}
MAX_NAMES = 12
"""Prompts, or sinks that were left out, that are named one by one."""


def write_report(
    path: str | Path, *, sinks, results: Sequence = (), texts: Mapping[str, Sequence[str]] | None = None, scores: Mapping | None = None,
    title: str = "Attention sinks and what forms them", command: str = "", notes: Sequence[str] = (), overwrite: bool = False,
) -> None:  # fmt: skip
    """Write the report: one HTML file that needs no network and forbids itself any.

    `sinks`: found sinks (`Sinks`). `results`: anything measured on them, each gets its figure: experiments (`Effect`), `Controlled`,
    `PathEffect`, `MassAccount`, `Claims`, `Attribution`, `SweepResult`, and the anatomy. `texts[prompt]`: the prompt's tokens as
    text; `scores[prompt]`: [layer, key] or [layer, head, key], needed to show the tokens. `command`: how to make this again.
    `notes`: sentences about what is missing. Raises ResultError when `path` exists, cannot be written, or the results are of
    different models; InputError when texts or scores do not fit the sinks.
    """
    check_target(path, overwrite=overwrite)
    data = render(
        sinks=sinks, results=results, texts=texts, scores=scores, title=title, command=command, notes=notes
    ).encode("utf-8")

    def write(temporary: Path) -> None:
        temporary.write_bytes(data)

    write_whole(path, write, overwrite=overwrite)


def render(
    *, sinks, results: Sequence = (), texts: Mapping | None = None, scores: Mapping | None = None, title: str = "", command: str = "",
    notes: Sequence[str] = (),
) -> str:  # fmt: skip
    """The page as text; see `write_report`."""
    texts = {} if texts is None else texts
    results, notes = _taken(sinks, results, texts, scores, title, command, notes)
    with_manifest = [result for result in results if not isinstance(result, SweepResult)]
    _check(sinks, with_manifest, texts, scores)
    effects = [result for result in results if isinstance(result, Effect)]
    kinds = _kinds(results)
    views = _views(sinks, texts, scores)
    causes, anatomy = causal_sections(results), anatomy_sections(results)
    interactive = bool(views) or any(section.views for section in anatomy)
    shown = sinks.table["prompt"].drop_duplicates().tolist()
    environment = Environment(
        loader=PackageLoader("sink_circuits", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number
    environment.filters["visible"] = lambda text: figures.visible(str(text))
    environment.filters["plain"] = lambda text: figures.visible(str(text), spaces=False)
    return environment.get_template("report.html.j2").render(
        title=title,
        command=command,
        python=in_python(sinks, results),
        question=question(sinks, effects, kinds),
        answers=_labelled(sinks, [*causes, *anatomy]),
        facts=_facts(sinks, effects),
        treated=treated(sinks, with_manifest),
        models=_models([sinks, *with_manifest]),
        manifest=sinks.manifest,
        rows=_sink_rows(sinks),
        kinds=kind_counts(sinks),
        views=views,
        left_out=max(0, len(shown) - len(views)) if scores is not None else 0,
        causes=causes,
        anatomy=anatomy,
        notes=notes,
        limits=limits(sinks, effects, kinds),
        libraries=_libraries(bool(causes or anatomy), interactive),
        interactive=interactive,
        token_css=Markup(figures.TOKEN_CSS),
        view_script=Markup(figures.VIEW_SCRIPT),
        config=Markup(figures.script_json(figures.CONFIG)),
        other_tokens=sorted({str(one.manifest.what) for one in with_manifest if _is_elsewhere(one, sinks)}),
    )


RESULTS = (Effect, Controlled, PathEffect, MassAccount, Claims, Attribution, SweepResult, Anatomy)


def _taken(sinks, results, texts, scores, title, command, notes) -> tuple[tuple, tuple]:
    """(results, notes). Raises InputError for what a page cannot be made of."""
    check_table(arguments.instance(sinks, "sinks", Sinks, "pass what find_sinks returns").table)
    results, notes = (
        arguments.several(given, name, empty=True) for name, given in (("results", results), ("notes", notes))
    )
    for one in results:
        if not isinstance(one, RESULTS):
            raise InputError(
                f"result {arguments.shown(one)} cannot be shown: pass what experiments and the anatomy return."
            )
    for name, given in (("texts", texts), ("scores", {} if scores is None else scores)):
        arguments.instance(given, name, Mapping, "give them by prompt")
    for prompt, given in texts.items():
        if not all(isinstance(one, str) for one in arguments.several(given, f"texts of prompt {prompt!r}", empty=True)):
            raise InputError(f"texts of prompt {prompt!r} hold {arguments.shown(given)}: give each token as a string.")
    for name, given in (("title", title), ("command", command), *(("note", one) for one in notes)):
        if not isinstance(given, str):
            raise InputError(f"{name} = {arguments.shown(given)}: give a string.")
    return results, notes


def _check(sinks, results: Sequence, texts: Mapping, scores: Mapping | None) -> None:
    weights = {one.manifest.weights for one in (sinks, *results) if one.manifest.weights}
    if len(weights) > 1:
        raise ResultError(
            f"these results are of {len(weights)} different models ({', '.join(sorted(weights))}): make one report "
            "for each."
        )
    if scores is not None and (missing := [name for name in scores if name not in texts]):
        raise InputError(
            f"scores of prompt {missing[0]!r} were given without its texts: pass the token texts of every prompt."
        )
    for row in sinks.table.itertuples():
        if row.prompt in texts and not 0 <= row.pos < len(texts[row.prompt]):
            raise InputError(
                f"a sink stands at position {row.pos} of prompt {row.prompt!r}, whose texts have "
                f"{len(texts[row.prompt])} tokens: "
                "pass the texts that the sinks were found in."
            )


def _kinds(results: Sequence) -> frozenset[str]:
    """What there is beside the effects: "controls", "paths", "mass", "claims", "attribution", "sweep", "anatomy"."""
    named = {"Controlled": "controls", "PathEffect": "paths", "MassAccount": "mass", "Claims": "claims", "Attribution": "attribution",
             "SweepResult": "sweep"}  # fmt: skip
    return frozenset(
        "anatomy" if isinstance(one, Anatomy) else named[type(one).__name__]
        for one in results
        if isinstance(one, Anatomy) or type(one).__name__ in named
    )


def _is_elsewhere(result, sinks) -> bool:
    own, shown = result.manifest.tokens, sinks.manifest.tokens
    return bool(own) and bool(shown) and own != shown


def _labelled(sinks, sections: Sequence[Section]) -> list[dict]:
    """The answers with what each is about and where on the page it is shown."""
    lines = [{"label": "Sinks", "target": "found", "text": found(sinks)}]
    return lines + [{"label": one.label, "target": one.id, "text": one.answer} for one in sections if one.answer]


def _facts(sinks, effects: Sequence) -> list[tuple[str, str]]:
    """Model and data as (name, value)."""
    manifest = sinks.manifest
    sizes = [effect.data.sizes for effect in effects if {"layer", "head"} <= set(effect.data.sizes)]
    names = list(map(str, sinks.prompts))
    more = len(names) - MAX_NAMES
    rows = [
        ("Model", manifest.model),
        ("Size", f"{sizes[0]['layer']} layers, {sizes[0]['head']} heads in each" if sizes else ""),
        ("Loaded from", manifest.revision),
        ("Weights (hash)", manifest.weights),
        ("Number format", manifest.dtype),
        ("Device", manifest.device),
        ("Prompts", f"{len(names)}: {', '.join(names[:MAX_NAMES])}{f' and {more} more' if more > 0 else ''}"),
        ("Tokens (hash)", manifest.tokens),
        ("Sinks found by", str(manifest.what).partition(":")[2]),
        ("Execution path", PATHS.get(manifest.path, manifest.path)),
    ]
    return [(name, str(value)) for name, value in rows if value]


def treated(sinks, results: Sequence) -> str:
    """How many of the sinks found the experiments treat, and which of their kinds were left out."""
    key = ["prompt", "pos", "l_start"]
    own = sinks.table.set_index(key)["kind"]
    tables = [
        result.sinks if isinstance(result, Claims) else result.table
        for result in results
        if not isinstance(result, Anatomy)
    ]
    keys = {row for table in tables for row in table[key].itertuples(index=False, name=None)}
    is_treated = own.index.isin(keys)
    if not is_treated.any():
        return ""
    kinds = [kind for kind in own.unique() if (is_treated & (own == kind)).any()]
    counts = [f"{int((is_treated & (own == kind)).sum())} of {int((own == kind).sum())} {kind}" for kind in kinds]
    out = [f"The experiments treat {join(counts)} sinks, numbered as in the table above."]
    left = sinks.table.index[~is_treated & own.isin(kinds).to_numpy()].tolist()
    if left and len(left) <= MAX_NAMES:
        out.append(f"Left out: sink{'s' * (len(left) > 1)} {join([str(number) for number in left])}.")
    if others := [str(kind) for kind in own.unique() if kind not in kinds]:
        out.append(f"No {' or '.join(others)} sink was treated.")
    return " ".join(out)


def _sink_rows(sinks) -> list[dict]:
    return [
        {"number": number, **row}
        for number, row in zip(sinks.table.index, sinks.table.to_dict(orient="records"), strict=True)
    ]


def _models(results: Sequence) -> list[dict]:
    """Every result's settings; how its sinks were found is said once where it is as for the sinks of this page."""
    shared = results[0].manifest.settings
    return [
        {
            **r.manifest.to_dict(),
            "settings": ", ".join(_flat({k: v for k, v in r.manifest.settings.items() if k != "found" or v != shared}))
            + ("; sinks found as above" if r.manifest.settings.get("found") == shared else ""),
        }
        for r in results
    ]


def _flat(settings: Mapping) -> list[str]:
    parts = []
    for name, value in settings.items():
        parts += _flat(value) if isinstance(value, Mapping) else [f"{name} = {'not set' if value is None else value}"]
    return parts


def _views(sinks, texts: Mapping, scores: Mapping | None) -> list[dict]:
    views: list[dict] = []
    for name in sinks.table["prompt"].drop_duplicates() if scores is not None else ():
        if name not in texts or name not in scores:
            continue
        if len(views) == MAX_VIEWS:
            break
        own = sinks.table[sinks.table["prompt"] == name]
        try:
            # The position in the row of views keeps ids apart where two names differ only in what an id cannot hold.
            view = figures.sink_tokens_view(texts[name], scores[name], own, name=f"{len(views)}-{name}", library=False)
        except InputError as error:
            raise InputError(f"prompt {name!r}: {error}") from error
        views.append({"name": str(name), "html": Markup(view), "n_tokens": len(texts[name])})
    return views


def _libraries(plotly: bool, circuitsvis: bool) -> list[dict]:
    """The scripts, compressed: plain they are 6 MB, so 2.4 MB."""
    needed = [name for name, is_needed in (("plotly", plotly), ("circuitsvis", circuitsvis)) if is_needed]
    return [{"name": name, "data": Markup(_packed(name))} for name in needed]


@lru_cache(maxsize=2)
def _packed(name: str) -> str:
    """A script as base64 of gzip. No time stamp goes in: one input gives one page."""
    from plotly.offline import get_plotlyjs

    source = get_plotlyjs() if name == "plotly" else figures.circuitsvis_source()
    return base64.b64encode(gzip.compress(source.encode("utf-8"), 9, mtime=0)).decode("ascii")
