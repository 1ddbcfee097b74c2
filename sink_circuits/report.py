"""The report: one self-contained HTML page that says what was found, shows it, and says what it does not show.

Sentences are written from the results by fixed rules: a direction is named only where the interval excludes 0 and
there are prompts enough to say so.
"""

from __future__ import annotations

import base64
import gzip
import html
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from sink_circuits import figures
from sink_circuits.errors import InputError, ResultError
from sink_circuits.results import write_whole

MAX_VIEWS = 8
"""Prompts whose tokens are shown: a page of hundreds would be too large to open."""

MIN_PROMPTS = 6
"""Prompts needed to name a direction: n prompts of one sign come about by chance with 2 / 2^n, below 5% from 6 on, and
the bootstrap interval of fewer excludes 0 as soon as their signs agree."""

CAUSES = {
    "layer_map": "Layer map: one MLP edited at a time",
    "dose_response": "Dose-response: the contribution rescaled",
    "ablate": "Ablation: the contribution taken away",
}
CAPTIONS = {
    "layer_map": (
        "Above: how far the outcome moves when the contribution of one MLP is edited at the sink's position; each "
        "point is one edited layer, "
        "0 is no change. Below: the same change by the layer in which attention is read. Layers at or below the "
        "edited one cannot "
        "change and are grey. A forming MLP shows as a deep column of one colour that begins just above the diagonal."
    ),
    "dose_response": (
        "Read from left to right: the contribution of the MLP is multiplied by the factor on the axis, 0 removes it "
        "and 1 leaves the model as it "
        "is. Thin lines are single sinks, the thick one is their mean with its interval. A curve that rises and then "
        "levels off says that the amount matters up to the point where "
        "the norm layers divide it away. The lower panel shows whether the primary sink gains what the treated one "
        "loses."
    ),
    "ablate": (
        "Blue, solid, round: the clean model. Vermillion, dashed, square: the edited one. The two coincide up to the "
        "edited layer. Their "
        "intervals include the differences between prompts; the paired change, which is free of them, is in the "
        "table below."
    ),
}
OTHER_CAPTION = CAPTIONS["ablate"]
EDITS = {"layer_map": "edited layer", "dose_response": "factor"}
PATHS = {
    "fast": "fast: the plain Hugging Face module, checked against TransformerLens' hooks when the model was loaded",
    "reference": "reference: TransformerLens' hooks",
}
CONTROLS = {
    "same token": "the same edit at the same token where it is no sink",
    "same range": "the same edit at another ordinary token nearby",
    "norm matched": "the same edit at the ordinary token whose norm is nearest",
    "wrong layer": "at the sink, another layer's MLP",
    "attention output": "at the sink, what attention wrote, in the MLP's place",
    "random model": "the same edit in a model of random weights",
    "random perturbation": "at the sink, a change of the same size in random directions",
}
MAX_NAMES = 12
"""Prompts, or sinks that were left out, that are named one by one."""


def write_report(
    path: str | Path,
    *,
    sinks,
    effects: Sequence,
    texts: Mapping[str, Sequence[str]],
    scores: Mapping | None = None,
    title: str = "Attention sinks and what forms them",
    command: str = "",
    controls=None,
    overwrite: bool = False,
) -> None:
    """Write the report: one HTML file that needs no network and forbids itself any.

    `sinks`: found sinks (`Sinks`). `effects`: experiments on them, each gets its figure. `texts[prompt]`: the prompt's
    tokens as text; `scores[prompt]`: [layer, head, key], needed to show the tokens. `command`: how to make this again.
    `controls`: a `Controlled`, the same removal where it should do nothing.
    Raises ResultError when `path` exists, cannot be written, or the results are of different models; InputError when
    texts or scores do not fit the sinks.
    """
    page = render(
        sinks=sinks, effects=effects, texts=texts, scores=scores, title=title, command=command, controls=controls
    )
    data = page.encode("utf-8")

    def write(temporary: Path) -> None:
        temporary.write_bytes(data)

    write_whole(Path(path), write, overwrite=overwrite)


def render(
    *, sinks, effects: Sequence, texts: Mapping, scores: Mapping | None, title: str, command: str, controls=None
) -> str:
    """The page as text; see `write_report`."""
    _check(sinks, [*effects, *([] if controls is None else [controls])], texts, scores)
    views = _views(sinks, texts, scores)
    sections = [_section(number, effect) for number, effect in enumerate(effects, 1)]
    shown = sinks.table["prompt"].drop_duplicates().tolist()
    environment = Environment(
        loader=PackageLoader("sink_circuits", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = _number
    environment.filters["change"] = lambda value: _number(value, signed=True)
    environment.filters["interval"] = lambda row: _interval(row).replace("+", "") or "–"
    environment.filters["visible"] = lambda text: figures.visible(str(text))
    environment.filters["plain"] = lambda text: figures.visible(str(text), spaces=False)
    return environment.get_template("report.html.j2").render(
        title=title,
        command=command,
        question=question(sinks, effects),
        answers=_labelled(answers(sinks, effects), sections),
        facts=_facts(sinks, effects),
        treated=treated(sinks, effects),
        models=_models([sinks, *effects]),
        manifest=sinks.manifest,
        rows=_sink_rows(sinks),
        kinds=_kind_counts(sinks),
        views=views,
        left_out=max(0, len(shown) - len(views)) if scores is not None else 0,
        sections=sections,
        limits=limits(sinks, effects, controls is not None),
        controls=_control_rows(controls),
        libraries=_libraries(bool(sections), bool(views)),
        token_css=Markup(figures.TOKEN_CSS),
        view_script=Markup(figures.VIEW_SCRIPT),
        config=Markup(figures.script_json(figures.CONFIG)),
        other_tokens=[e.kind for e in effects if e.manifest.tokens != sinks.manifest.tokens],
    )


def _check(sinks, effects: Sequence, texts: Mapping, scores: Mapping | None) -> None:
    weights = {sinks.manifest.weights, *(effect.manifest.weights for effect in effects)}
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


# --------------------------------------------------------------------------------------------------- sentences
def question(sinks, effects: Sequence) -> list[str]:
    """What was asked, a sentence per experiment, and how it is answered."""
    model = _model_name(sinks)
    asked = {
        "layer_map": f"Which MLPs of {model} form its attention sinks?",
        "dose_response": f"Does the amount that an MLP of {model} writes decide how much attention a sink draws?",
        "ablate": f"Do the attention sinks of {model} fall when an MLP's contribution is taken away?",
    }
    asks = list(dict.fromkeys(asked[e.kind] for e in effects if e.kind in asked))
    if not asks:
        return [
            f"Which tokens of these prompts are attention sinks in {model}?",
            "No question of cause is answered by a number here.",
        ]
    return [
        asks[0],
        *(ask.replace(f" of {model}", "") for ask in asks[1:]),
        "Each answer comes from editing what an MLP adds at a sink's own position and comparing the edited run with "
        "the clean run.",
    ]


def answers(sinks, effects: Sequence) -> list[str]:
    """What was found, a sentence or two per result, in numbers."""
    n_prompts, counts = len(sinks.prompts), _kind_counts(sinks)
    if not counts:
        return [f"In {_count(n_prompts, 'prompt')}, no sink was found."]
    found = [f"{n} {kind}" for kind, n in counts.items()]
    lines = [
        f"In {_count(n_prompts, 'prompt')}, {_join(found)} {'sinks were' if sum(counts.values()) != 1 else 'sink was'} "
        "found."
    ]
    for effect in effects:
        lines.append(" ".join(_sentences(effect)))
    return lines


def _sentences(effect) -> list[str]:
    summary = effect.summary()
    who = _who(effect)
    rows = {
        outcome: summary[summary["outcome"] == outcome].reset_index(drop=True)
        for outcome in summary["outcome"].unique()
    }
    if effect.kind == "layer_map":
        odds = rows["log_odds"]
        if odds["effect"].isna().all():
            return [f"The layer map on {who} has no defined effect: the sinks stand too near the end of their texts."]
        least = odds.loc[odds["effect"].idxmin()]
        edit = _number_or_text(least["edit"])
        how = effect.manifest.settings.get("intervention", "edited")
        done, without = ("removed", "without it") if how == "zero" else (f"edited ({how})", "with it edited")
        out = [
            f"Of {len(odds)} MLPs {done} one at a time on {who}, MLP {edit} has the most negative mean effect: "
            f"{without} their attention "
            f"log-odds {_moved(least, 'nats', plural=True)}. The interval is not corrected for picking one layer of "
            f"{len(odds)}."
        ]
        score = rows["score"].loc[rows["score"]["edit"] == least["edit"]].iloc[0]
        out.append(f"Their mean score goes from {_number(score['clean'])} to {_number(score['edited'])}.")
        try:
            forming = effect.forming().value_counts()
            out.append(
                "Sink by sink, the most negative effect is that of "
                + _join([f"MLP {layer} for {_count(int(n), 'sink')}" for layer, n in forming.items()])
                + "."
            )
        except InputError:
            out.append("Not every sink has a defined effect.")
        return out
    where = f"the contribution of {_layers(effect)} on {who}"
    if effect.kind == "dose_response":
        odds = rows["log_odds"].sort_values("edit")
        if odds["effect"].isna().all():
            return [f"The dose-response on {who} has no defined effect."]
        diffs = np.diff(odds["effect"].to_numpy())
        ends = odds[odds["edit"] != 1].iloc[[0, -1]].drop_duplicates("edit")
        said = [
            f"at factor {row['edit']:g} their attention log-odds {_moved(row, 'nats', plural=True)}"
            for _, row in ends.iterrows()
        ]
        out = [f"Rescaling {where}: {'; '.join(said)}."]
        if len(odds) > 2 and np.isfinite(diffs).all():
            if (diffs > 0).all():
                out.append(
                    f"The mean rises with every step of the factor, by {_number(diffs[0])} at the first step and "
                    f"{_number(diffs[-1])} at the last."
                )
            else:
                out.append("The mean does not rise with every step of the factor.")
    else:
        out = []
        for edit in rows["log_odds"]["edit"]:
            row = rows["log_odds"].loc[rows["log_odds"]["edit"] == edit].iloc[0]
            verb = {"zero": "Removing", "mean": "Replacing by its mean"}.get(str(edit), f"Edit “{edit}” of")
            out.append(f"{verb} {where}: their attention log-odds {_moved(row, 'nats', plural=True)}.")
            score = rows["score"].loc[rows["score"]["edit"] == edit].iloc[0]
            out.append(f"Their mean score goes from {_number(score['clean'])} to {_number(score['edited'])}.")
            primary = rows["primary_score"].loc[rows["primary_score"]["edit"] == edit].iloc[0]
            if math.isfinite(primary["effect"]) and not (effect.table["kind"] == "primary").all():
                out.append(f"In the same layers the primary sink's score {_moved(primary)}.")
    return out


def _moved(row, unit: str = "", *, plural: bool = False) -> str:
    """What an outcome did; a direction is named only when enough prompts give an interval that excludes 0."""
    s, unit = "" if plural else "s", f" {unit}" if unit else ""
    if not math.isfinite(row["effect"]):
        return f"{'have' if plural else 'has'} no defined effect (too few later queries)"
    change = f"{_number(row['effect'], signed=True)} {_interval(row)}".strip() + f"{unit} ({_basis(row)})"
    if not math.isfinite(row["low"]) or row["n_prompts"] < MIN_PROMPTS:
        return f"differ{s} by {change}"
    if row["low"] <= 0 <= row["high"]:
        return f"change{s} by {change}, an interval that includes 0, so that the direction is not decided"
    size = f"{_number(abs(row['effect']))} {_interval(row, absolute=True)}{unit}"
    return f"{'fall' if row['effect'] < 0 else 'rise'}{s} by {size} ({_basis(row)})"


def _interval(row, *, absolute: bool = False) -> str:
    if not math.isfinite(row["low"]):
        return ""
    ends = sorted((abs(row["low"]), abs(row["high"]))) if absolute else (row["low"], row["high"])
    return f"[{_number(ends[0], signed=not absolute)}, {_number(ends[1], signed=not absolute)}]"


def _basis(row) -> str:
    n = int(row["n_prompts"])
    if n < 2:
        return f"{_count(n, 'prompt')}, not enough for an interval"
    few = "" if n >= MIN_PROMPTS else ", too few to decide a direction"
    return f"95% interval over {n} prompts{few}"


def limits(sinks, effects: Sequence, controlled: bool = False) -> list[str]:
    """What the results do not show, by what was and was not done."""
    lines = []
    kinds = {effect.kind for effect in effects}
    n = max((int(effect.table["prompt"].nunique()) for effect in effects), default=len(sinks.prompts))
    if not effects:
        lines.append(
            "Nothing was intervened on. Geometry and attention scores describe sinks; they do not say what makes them."
        )
    if any(_single_layer(effect) for effect in effects):
        lines.append(
            "One MLP was edited at a time. MLPs that stand in for each other are missed or understated this way: "
            "where two can each form the sink, "
            "removing one leaves the other. Only joint edits (layers=[…]) can show that."
        )
    if "layer_map" in kinds:
        lines.append(
            "The map looks at many layers; its intervals are for each layer by itself and are not corrected for "
            "having looked at all of them. "
            "A layer picked from the map should be confirmed on other prompts."
        )
    if any(_picks_layers(effect) for effect in effects):
        lines.append(
            "Each sink's forming MLP is the layer with the most negative effect on that sink. Where dose-response and "
            "ablation treat the prompts that it was picked on, they show that edit in detail and are no second "
            "confirmation of it, and its effect tends to be overstated."
        )
    if effects:
        lines.append(
            f"Intervals are over prompts, {n} here: they say how the result would vary over prompts like these, not "
            "over models, kinds of text or "
            "languages."
            + (" With so few prompts a bootstrap interval is rough, and tends to be too narrow." if n < 10 else "")
        )
        lines.append(
            "The effect is total: everything above the edit runs anew, so that the change may pass through the "
            "treated position's own stream or "
            "through other tokens that have attended to it. The two are not told apart here."
        )
        together = any(effect.manifest.settings.get("together") for effect in effects)
        lines.append(
            "All sinks of a prompt were edited in one run in at least one experiment, so that their effects are "
            "mixed there."
            if together
            else "One sink was edited per run. What several removals do together may differ from their sum."
        )
        if controlled:
            lines.append(
                "Controls stand beside the removal alone, not beside the map and the doses, and are matched one by one: "
                "a token nearby, another layer. Sinks without a match are left out of that row."
            )
        elif kinds <= set(CAUSES):
            lines.append(
                "No controls are on this page: other positions, other tokens and random directions of equal norm would "
                "show how specific the effect is. "
                "A removal also changes the norm that later layers divide by."
            )
    if "dose_response" in kinds:
        lines.append(
            "A factor changes the contribution's norm and leaves its direction; factors above 1 lie outside what the "
            "model does by itself."
        )
    if str(sinks.manifest.what).endswith("official"):
        lines.append(
            "Sinks were found by the published procedure, which looks only at layers after the primary's greatest rise."
        )
    else:
        lines.append(
            "Which tokens count as sinks depends on the thresholds below. Attention took no part in finding them, so "
            "a sink may draw little."
        )
    return lines


def _single_layer(effect) -> bool:
    return effect.kind == "layer_map" or "," not in str(effect.manifest.settings.get("layers", ","))


def _picks_layers(effect) -> bool:
    return effect.manifest.settings.get("layers") == "forming"


def _layers(effect) -> str:
    layers = str(effect.manifest.settings.get("layers", "")).strip("[]() ")
    if layers == "forming":
        return "each sink's own forming MLP"
    return (
        f"MLPs {_join(layers.split(', '))} together"
        if "," in layers
        else f"MLP {layers}"
        if layers
        else "the edited MLPs"
    )


def _who(effect) -> str:
    kinds = effect.table["kind"].unique()
    kind = f"{kinds[0]} " if len(kinds) == 1 else ""
    return f"{_count(len(effect.table), f'{kind}sink')} in {_count(effect.table['prompt'].nunique(), 'prompt')}"


def _model_name(result) -> str:
    return str(result.manifest.model).rstrip("/").rsplit("/", 1)[-1] or "this model"


def _kind_counts(sinks) -> dict[str, int]:
    return {str(kind): int(n) for kind, n in sinks.table["kind"].value_counts().items()}


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"


def _join(parts: Sequence[str]) -> str:
    parts = list(parts)
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _number(value, signed: bool = False) -> str:
    """Three significant digits; a true minus sign; a dash for what is not defined."""
    if value is None or not math.isfinite(value):
        return "–"
    text = f"{value:+#.3g}" if signed else f"{value:#.3g}"
    if "e" in text:
        mantissa, exponent = text.split("e")
        text = f"{value:,.0f}" if 1e3 <= abs(value) < 1e7 else f"{mantissa}×10^{int(exponent)}"
    return "0" if value == 0 else text.rstrip(".").replace("-", "−")


def _number_or_text(value) -> str:
    try:
        return f"{float(value):g}"
    except (TypeError, ValueError):
        return str(value)


# --------------------------------------------------------------------------------------------------- parts of the page
def _labelled(lines: Sequence[str], sections: Sequence[dict]) -> list[dict]:
    """The answers with what each is about and where on the page it is shown."""
    heads = [("Sinks", "found"), *((section["title"].partition(":")[0], section["id"]) for section in sections)]
    return [
        {"label": label, "target": target, "text": line} for line, (label, target) in zip(lines, heads, strict=False)
    ]


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
        ("Prompts", f"{len(names)}: {', '.join(names[:MAX_NAMES])}{f' and {more} more' if more > 0 else ''}"),
        ("Tokens (hash)", manifest.tokens),
        ("Sinks found by", str(manifest.what).partition(":")[2] or manifest.what),
        ("Execution path", PATHS.get(manifest.path, manifest.path)),
    ]
    return [(name, str(value)) for name, value in rows if value]


def treated(sinks, effects: Sequence) -> str:
    """How many of the sinks found the experiments treat, and which of their kinds were left out."""
    key = ["prompt", "pos", "l_start"]
    own = sinks.table.set_index(key)["kind"]
    keys = {row for effect in effects for row in effect.table[key].itertuples(index=False, name=None)}
    is_treated = own.index.isin(keys)
    if not is_treated.any():
        return ""
    kinds = [kind for kind in own.unique() if (is_treated & (own == kind)).any()]
    counts = [f"{int((is_treated & (own == kind)).sum())} of {int((own == kind).sum())} {kind}" for kind in kinds]
    out = [f"The experiments treat {_join(counts)} sinks, numbered as in the table above."]
    left = sinks.table.index[~is_treated & own.isin(kinds).to_numpy()].tolist()
    if left and len(left) <= MAX_NAMES:
        out.append(f"Left out: sink{'s' * (len(left) > 1)} {_join([str(number) for number in left])}.")
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


def _section(number: int, effect) -> dict:
    outcomes = ["log_odds"] if effect.kind == "layer_map" else ["score", "log_odds"]
    summary = effect.summary()
    columns = ("edit", "outcome", "clean", "edited", "effect", "low", "high", "n_prompts", "n_sinks")
    table = [{column: row[column] for column in columns} for row in summary.to_dict(orient="records")]
    for row in table:
        row["edit"], row["outcome"] = _number_or_text(row["edit"]), figures.NAMES.get(row["outcome"], row["outcome"])
    drawn = []
    for outcome in outcomes:
        figure = figures.effect_figure(effect, outcome)
        heading, note = _lift_title(figure)
        drawn.append(
            {
                "id": f"figure-{number}-{outcome}",
                "heading": heading,
                "note": note,
                "json": Markup(figures.figure_json(figure)),
                "height": figure.layout.height,
            }
        )
    return {
        "id": f"effect-{number}",
        "title": CAUSES.get(effect.kind, f"Experiment: {effect.kind}"),
        "caption": CAPTIONS.get(effect.kind, OTHER_CAPTION),
        "edit": EDITS.get(effect.kind, "edit"),
        "table": table,
        "figures": drawn,
    }


def _control_rows(controls) -> list[dict]:
    """Rows of the table of controls; one that matched no sink says why instead of a number."""
    if controls is None:
        return []
    reasons = controls.matches[controls.matches["reason"] != ""].groupby("control")["reason"].first()
    rows = controls.compare().to_dict(orient="records")
    for row in rows:
        row["reason"] = reasons.get(row["control"], "") if row["n_unmatched"] else ""
        row["meaning"] = CONTROLS.get(row["control"], "")
    return rows


def _lift_title(figure) -> tuple[str, str]:
    """Take title and note out of a figure, as plain text: the page wraps them to its width, plotly wraps nothing.

    A figure's title is `<b>title</b><br><span>note</span>` with line breaks for a phone (`figures.look.finish`).
    """
    parts = (figure.layout.title.text or "").partition("</b>")[::2]
    heading, note = (html.unescape(re.sub("<[^>]*>", "", part.replace("<br>", " "))).strip() for part in parts)
    # What stays above the panels: the first panel's own title, and the legend where there is one.
    margin = 48 if figure.layout.showlegend else 32
    figure.update_layout(title=None, height=figure.layout.height - figure.layout.margin.t + margin, margin_t=margin)
    return heading, note


def _libraries(plotly: bool, circuitsvis: bool) -> list[dict]:
    """The scripts, compressed: plain they are 6 MB, so 2.4 MB. No time stamp goes in: one input gives one page."""
    from plotly.offline import get_plotlyjs

    sources = ([("plotly", get_plotlyjs)] if plotly else []) + (
        [("circuitsvis", figures.circuitsvis_source)] if circuitsvis else []
    )
    return [
        {
            "name": name,
            "data": Markup(base64.b64encode(gzip.compress(source().encode("utf-8"), 9, mtime=0)).decode("ascii")),
        }
        for name, source in sources
    ]
