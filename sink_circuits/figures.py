"""Figures: what an experiment measured, drawn. Pure functions of results; no model is run here.

Colours are Okabe-Ito's, told apart by colour-blind readers, and lines differ in dash and marker too, so that a page
printed in grey can be read. Panels are stacked, never side by side: they stay legible on a phone.
"""

from __future__ import annotations

import html
import json
import math
import textwrap
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sink_circuits import statistics
from sink_circuits.errors import InputError, ResultError
from sink_circuits.results import write_whole

BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9"
INK, MUTED, GRID, IMPOSSIBLE = "#222222", "#5a5a5a", "#e4e4e4", "#c9c9c9"
DIVERGING = [[0.0, "#00456d"], [0.25, "#4a9ccb"], [0.5, "#f7f7f7"], [0.75, "#e8955a"], [1.0, "#8a3c00"]]
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, 'Liberation Sans', sans-serif"
LINE_LENGTH = 50
"""Characters of a figure's title that fit a phone of 360 px."""

AXIS_LABELS = {
    "score": "sink score (share)",
    "log_odds": "log-odds (nats)",
    "primary_score": "primary's score (share)",
    "primary_log_odds": "primary's log-odds (nats)",
    "loss": "next-token loss (nats)",
    "lifetime": "lifetime (layers)",
    "kl": "KL divergence (nats)",
}
NAMES = {
    "score": "sink score",
    "log_odds": "attention log-odds",
    "primary_score": "primary sink's score",
    "primary_log_odds": "primary sink's log-odds",
    "loss": "next-token loss",
    "lifetime": "lifetime",
    "kl": "KL divergence of the next token",
}
CONFIG = {"responsive": True, "displaylogo": False, "modeBarButtons": [["toImage"]]}


# --------------------------------------------------------------------------------------------------- experiments
def effect_figure(effect, outcome: str = "score") -> go.Figure:
    """The figure of this kind of experiment: layer map, dose-response, or clean against edited by layer for all others.

    Raises InputError for an outcome that was not measured.
    """
    if effect.kind == "layer_map":
        return layer_map_figure(effect, outcome)
    if effect.kind == "dose_response":
        return dose_response_figure(effect, outcome)
    return ablation_figure(effect, outcome)


def layer_map_figure(effect, outcome: str = "log_odds") -> go.Figure:
    """Which layers matter: the effect by edited layer, above the effect by edited and reading layer.

    Above: `effect.summary()`'s mean over prompts, bars its interval. Below: mean over sinks and heads; grey where an
    effect is impossible (reading layer at or below the edited one) or not defined. Raises InputError for an outcome
    that was not measured or has no layers, and for edits that are not layers.
    """
    effects = _by_layer(effect, outcome)
    edited = _numbers(effect, "layers")
    rows = _summary(effect, outcome)
    start, end = (float(effect.table[name].median()) for name in ("l_start", "l_end"))
    reading = effects["layer"].to_numpy()
    # All-NaN cells (a sink too near its text's end) warn in nanmean; they stay grey.
    cells = effects.mean([dim for dim in ("sink", "head") if dim in effects.dims])
    cells = cells.transpose("layer", "edit").to_numpy().astype(float)
    cells[reading[:, None] <= edited[None, :]] = np.nan
    # Layers that were not tried get columns of their own, grey: plotly would stretch their neighbours over the gap.
    columns = np.arange(edited.min(), edited.max() + 1)
    every = np.full((len(reading), len(columns)), np.nan)
    every[:, (edited - edited.min()).astype(int)] = cells

    figure = make_subplots(
        rows=2,
        cols=1,
        shared_xaxes=True,
        row_heights=[0.42, 0.58],
        vertical_spacing=0.09,
        subplot_titles=["mean over the layers that read the sink", "by reading layer (grey: impossible)"],
    )
    figure.add_vrect(
        x0=start - 0.5,
        x1=end + 0.5,
        fillcolor=ORANGE,
        opacity=0.16,
        line_width=0,
        layer="below",
        row=1,
        col=1,
        exclude_empty_subplots=False,
    )
    figure.add_hline(y=0, line={"color": MUTED, "width": 1}, row=1, col=1, exclude_empty_subplots=False)
    figure.add_trace(
        _interval_trace(edited, rows, "effect", VERMILLION, "mean effect", "edited layer %{x}"), row=1, col=1
    )
    bound = float(np.nanmax(np.abs(cells))) if np.isfinite(cells).any() else 1.0
    figure.add_trace(
        go.Heatmap(
            x=columns.tolist(),
            y=reading.tolist(),
            z=_nones(every),
            zmin=-(bound or 1.0),
            zmax=bound or 1.0,
            colorscale=DIVERGING,
            hoverongaps=False,
            name="effect",
            xgap=1,
            ygap=1,
            hovertemplate="edited layer %{x}<br>reading layer %{y}<br>effect %{z:.3g}<extra></extra>",
            colorbar={
                "orientation": "h",
                "y": -0.1,
                "yanchor": "top",
                "thickness": 10,
                "len": 0.9,
                "nticks": 5,
                "outlinewidth": 0,
                "title": {"text": f"change of {_axis(outcome)}", "side": "bottom", "font": {"size": 12}},
            },
        ),
        row=2,
        col=1,
    )
    for edge in (start + 0.5, min(end + 1.5, reading[-1] + 0.5)):
        figure.add_hline(y=edge, line={"color": INK, "width": 1, "dash": "dot"}, row=2, col=1)
    figure.update_xaxes(range=[edited.min() - 0.6, edited.max() + 0.6], **_layer_ticks(edited))
    figure.update_xaxes(title_text="edited layer", title_standoff=4, showticklabels=True, row=2, col=1)
    figure.update_xaxes(showticklabels=True, row=1, col=1)
    figure.update_yaxes(title_text=f"change, {_axis(outcome)}", row=1, col=1)
    figure.update_yaxes(title_text="reading layer", showgrid=False, row=2, col=1, **_layer_ticks(reading))
    figure.update_xaxes(showgrid=False, row=2, col=1)
    # A heat map's gaps show what lies behind: a grey rectangle says "impossible" where white would say "no effect".
    figure.add_shape(
        type="rect",
        xref="x2 domain",
        yref="y2 domain",
        x0=0,
        x1=1,
        y0=0,
        y1=1,
        fillcolor=IMPOSSIBLE,
        line_width=0,
        layer="below",
    )
    life = f"Shaded: median life of the sinks, layers {start:g} to {end:g}; dotted: the layers that read them."
    return _finish(
        figure,
        f"Effect of editing one MLP on the {_named(outcome)}",
        f"{_whose(effect)}. {_bars(rows)} {life}",
        height=760,
        bottom=92,
    )


def dose_response_figure(effect, outcome: str = "score") -> go.Figure:
    """The outcome over the lifetime by factor, a thin line per sink and the mean with its interval; below, the primary.

    Factors stand evenly spaced, not to scale: 0, 1/4, 1/2, 1, 2, 4 has no scale on which all can be told apart. Bars are
    intervals of the edited outcome itself: a change's interval, moved to where the mean stands, can leave the range that
    a score can have. Raises InputError for an outcome that was not measured, or edits that are not factors.
    """
    factors = _numbers(effect, "factors")
    dose, done, ends = _doses(effect)
    order = np.argsort(factors)
    labels = [f"{factors[i]:g}" for i in order]
    panels = (
        [outcome]
        if outcome.startswith("primary")
        else [outcome, "primary_log_odds" if outcome == "log_odds" else "primary_score"]
    )
    figure = make_subplots(
        rows=len(panels),
        cols=1,
        shared_xaxes=True,
        vertical_spacing=0.12,
        row_heights=[0.6, 0.4][: len(panels)],
        subplot_titles=[_panel(name) for name in panels],
    )
    for row, name in enumerate(panels, 1):
        edited = _edited(effect, name)[:, order]
        rows = _by_prompt(edited, effect.table["prompt"], f"{effect.kind}/{name}/edited")
        if not np.isfinite(edited).any():
            continue
        # One trace for all sinks, broken by None: hundreds of sinks stay one node of the legend and few bytes.
        thin_x, thin_y, hover = [], [], []
        for sink, values in enumerate(edited):
            thin_x += [*labels, None]
            thin_y += [*_nones(values), None]
            hover += [_sink_name(effect.table.iloc[sink])] * len(labels) + [None]
        figure.add_trace(
            go.Scatter(
                x=thin_x,
                y=thin_y,
                text=hover,
                mode="lines",
                line={"color": "rgba(90,90,90,0.45)", "width": 1},
                name="single sinks",
                hovertemplate="%{text}<br>factor %{x}: %{y:.4g}<extra></extra>",
                showlegend=row == 1,
            ),
            row=row,
            col=1,
        )
        colour = VERMILLION if row == 1 else BLUE
        trace = _interval_trace(
            labels, rows, "mean", colour, "mean", "factor %{x}", marker="circle" if row == 1 else "square"
        )
        trace.showlegend = row == 1
        figure.add_trace(trace, row=row, col=1)
        clean = float(_summary(effect, name)["clean"].mean())
        figure.add_hline(y=clean, line={"color": INK, "width": 1.2, "dash": "dash"}, row=row, col=1)
        figure.add_annotation(
            x=1,
            xref="x domain",
            y=clean,
            text=f"clean {clean:.3g}",
            showarrow=False,
            xanchor="right",
            yanchor="bottom",
            font={"size": 11, "color": INK},
            bgcolor="rgba(255,255,255,0.75)",
            row=row,
            col=1,
        )
        figure.update_yaxes(title_text=_axis(name), row=row, col=1)
    figure.update_xaxes(
        type="category", categoryorder="array", categoryarray=labels, showticklabels=True, showgrid=True
    )
    figure.update_xaxes(title_text=f"{dose}<br>(evenly spaced, not to scale)", row=len(panels), col=1)
    text = f"{_whose(effect)}; {_layers_of(effect)} {done}. {_bars(_summary(effect, outcome))}{ends}"
    return _finish(figure, f"Dose-response: {_named(outcome)}", text, height=400 + 260 * (len(panels) - 1), bottom=72)


def ablation_figure(effect, outcome: str = "score") -> go.Figure:
    """Clean against edited outcome by layer: above at the treated positions, below at the primary sink.

    Means over prompts (of the mean over sinks and heads) with bootstrap intervals, from the first edited layer on: at
    that layer and below nothing can change. Raises InputError for an outcome that was not measured or has no layers.
    """
    _by_layer(effect, outcome)
    own = outcome.removeprefix("primary_")
    panels = [outcome] if outcome == f"primary_{own}" else [outcome, f"primary_{own}"]
    panels = [name for name in panels if f"clean_{name}" in effect.data]
    first_edited = effect.data["first_layer"].to_numpy()
    first = max(0, int(first_edited.min()))
    layers = effect.data["layer"].to_numpy()[first:]
    figure = make_subplots(
        rows=len(panels),
        cols=1,
        shared_xaxes=True,
        vertical_spacing=0.12,
        row_heights=[0.55, 0.45][: len(panels)],
        subplot_titles=[_panel(name) for name in panels],
    )
    start, end = (float(effect.table[name].median()) for name in ("l_start", "l_end"))
    n_prompts = 0
    edits = effect.data["edit"].values
    for row, name in enumerate(panels, 1):
        low, high = max(start + 0.5, first - 0.5), min(end + 1.5, layers[-1] + 0.5)
        figure.add_vrect(
            x0=low,
            x1=high,
            fillcolor=ORANGE,
            opacity=0.14,
            line_width=0,
            layer="below",
            row=row,
            col=1,
            exclude_empty_subplots=False,
        )
        # A sink without an edited value (it stands too near the end) is left out of the clean line too: like with like.
        lines = [("clean", effect.data[f"clean_{name}"], BLUE, "solid", "circle")]
        for colour, marker, edit in zip(
            (VERMILLION, GREEN, PURPLE, SKY, ORANGE),
            ("square", "diamond", "cross", "x", "triangle-up"),
            edits,
            strict=False,
        ):
            lines.append((f"edited: {edit}", effect.data[name].sel(edit=edit), colour, "dash", marker))
        for label, values, colour, dash, marker in lines:
            means = values.mean("head") if "head" in values.dims else values
            rows = _by_prompt(means.to_numpy()[:, first:], effect.table["prompt"], f"{effect.kind}/{name}/{label}")
            n_prompts = max(n_prompts, int(rows["n_prompts"].max()))
            trace = _interval_trace(layers, rows, "mean", colour, _safe(label), "layer %{x}", dash=dash, marker=marker)
            trace.showlegend = row == 1
            figure.add_trace(trace, row=row, col=1)
        figure.update_yaxes(title_text=_axis(name), row=row, col=1)
        if name.endswith("score"):
            figure.update_yaxes(rangemode="tozero", row=row, col=1)
    figure.update_xaxes(showticklabels=True, **_layer_ticks(layers))
    figure.update_xaxes(title_text="layer whose attention is read", row=len(panels), col=1)
    text = (
        f"{_whose(effect)}; {_layers_of(effect)} edited. {_bars(pd.DataFrame({'n_prompts': [n_prompts]}))} "
        "Shaded: layers that read the sinks (median)."
    )
    return _finish(
        figure, f"Clean and edited {_named(own)}, by layer", text, height=380 + 260 * (len(panels) - 1), bottom=64
    )


def save_figure(figure: go.Figure, path: str | Path, *, overwrite: bool = False) -> None:
    """Write a figure: .html (self-contained, no network), or .svg, .pdf, .png by way of kaleido and a Chromium browser.

    Raises ResultError for another suffix, an existing file, or when kaleido or its browser is missing.
    """
    path = Path(path)
    kind = path.suffix.lower().removeprefix(".")
    if kind == "html":
        data = _figure_page(figure).encode()
    elif kind in ("svg", "pdf", "png"):
        try:
            data = figure.to_image(format=kind, width=760, height=figure.layout.height, scale=2 if kind == "png" else 1)
        except (
            Exception
        ) as error:  # plotly and kaleido raise ValueError, RuntimeError, ImportError and their own classes
            raise ResultError(
                f"a .{kind} figure needs the package kaleido and a Chromium browser ({_first_line(error)}): install both, or save .html."
            ) from error
    else:
        raise ResultError(
            f"figures cannot be written as {path.suffix or 'a file without a suffix'!r}: use .html, .svg, .pdf or .png."
        )

    def write(temporary: Path) -> None:
        temporary.write_bytes(data)

    write_whole(path, write, overwrite=overwrite)


def figure_json(figure: go.Figure) -> str:
    """A figure as JSON that may stand inside a <script> element: `<`, `>` and `&` are written as escapes."""
    return script_json(json.loads(figure.to_json()))


def script_json(value) -> str:
    """JSON for a <script type="application/json"> element: no character in it can end the element. NaN is refused."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _figure_page(figure: go.Figure) -> str:
    from plotly.offline import get_plotlyjs

    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; script-src 'unsafe-inline'; "
        "style-src 'unsafe-inline'; img-src data: blob:\"><title>figure</title></head>"
        '<body style="margin:0 auto;max-width:860px"><div id="figure"></div>'
        f'<script>{get_plotlyjs()}</script><script type="application/json" id="data">{figure_json(figure)}</script>'
        '<script>const f = JSON.parse(document.getElementById("data").textContent);'
        f'Plotly.newPlot("figure", f.data, f.layout, {json.dumps(CONFIG)});</script></body></html>'
    )


# --------------------------------------------------------------------------------------------------- numbers behind
def _summary(effect, outcome: str) -> pd.DataFrame:
    """The outcome's rows of `effect.summary()`."""
    effect.over_lifetime(outcome)  # refuses what is no outcome
    table = effect.summary()
    return table[table["outcome"] == outcome].reset_index(drop=True)


def _edited(effect, outcome: str) -> np.ndarray:
    """The edited outcome over the lifetime, [sink, edit]."""
    return effect.over_lifetime(outcome, "edited").to_numpy().astype(float)


def _by_layer(effect, outcome: str):
    effects = effect.effect(outcome)
    if "layer" not in effects.dims:
        raise InputError(
            f"outcome {outcome!r} has no layers to draw: use one of "
            f"{', '.join(name for name in effect.outcomes if 'layer' in effect.data[name].dims)}."
        )
    return effects


def _by_prompt(values: np.ndarray, prompts: pd.Series, name: str) -> pd.DataFrame:
    """Mean over prompts of each column of values [sink, layer], with its interval; columns mean, low, high, n_prompts."""
    estimates = [
        statistics.bootstrap_over_prompts(column, prompts, name=f"{name}/{index}")
        for index, column in enumerate(values.T)
    ]
    return pd.DataFrame({"mean": e.mean, "low": e.low, "high": e.high, "n_prompts": e.n} for e in estimates)


def _numbers(effect, what: str) -> np.ndarray:
    edits = effect.data["edit"].values
    if edits.dtype.kind not in "iuf":
        raise InputError(
            f"this figure needs an experiment whose edits are {what}, this {effect.kind} has {_first_line(list(edits))}."
        )
    return edits


def _nones(values: np.ndarray) -> list:
    """Nested lists with None for NaN: JSON has no NaN, and plotly draws a gap for None."""
    return np.where(np.isfinite(values), values.astype(object), None).tolist()


# --------------------------------------------------------------------------------------------------- look
def _interval_trace(
    x, rows: pd.DataFrame, column: str, colour: str, name: str, where: str, *, dash="solid", marker="circle"
) -> go.Scatter:
    """A line through the means in `column` with error bars from `low` to `high`."""
    middle = rows[column].to_numpy(dtype=float)
    ends = rows[["low", "high"]].to_numpy(dtype=float)
    shown = [
        f"{m:.3g} [{a:.3g}, {b:.3g}]" if np.isfinite(a) else f"{m:.3g}" for m, (a, b) in zip(middle, ends, strict=True)
    ]
    return go.Scatter(
        x=list(x) if isinstance(x, list) else x.tolist(),
        y=_nones(middle),
        mode="lines+markers",
        name=name,
        text=shown,
        line={"color": colour, "width": 2.4, "dash": dash},
        marker={"size": 7, "symbol": marker, "color": colour},
        error_y={
            "type": "data",
            "symmetric": False,
            "array": _nones(ends[:, 1] - middle),
            "arrayminus": _nones(middle - ends[:, 0]),
            "thickness": 1.5,
            "width": 4,
            "color": colour,
        },
        hovertemplate=f"{where}<br>%{{text}}<extra>{name}</extra>",
    )


def _layer_ticks(layers) -> dict:
    layers = np.asarray(layers)
    step = next(s for s in (1, 2, 4, 5, 10, 20, 50) if (layers.max() - layers.min()) / s <= 12 or s == 50)
    return {"tickmode": "linear", "tick0": 0, "dtick": step}


def _finish(figure: go.Figure, title: str, text: str, *, height: int, bottom: int) -> go.Figure:
    lines = textwrap.wrap(text, LINE_LENGTH)
    heading = "<br>".join(_safe(line) for line in textwrap.wrap(title, LINE_LENGTH - 12))
    note = "<br>".join(_safe(line) for line in lines)
    has_legend = sum(trace.showlegend is not False and trace.type == "scatter" for trace in figure.data) > 1
    top = 46 + 20 * heading.count("<br>") + 16 * len(lines) + (54 if has_legend else 30)
    figure.update_layout(
        template="none",
        autosize=True,
        height=height + 16 * len(lines),
        paper_bgcolor="#ffffff",
        plot_bgcolor="#ffffff",
        hovermode="closest",
        dragmode=False,  # on a phone a finger on the figure scrolls the page
        font={"family": FONT, "size": 12, "color": INK},
        margin={"l": 58, "r": 14, "t": top, "b": bottom},
        showlegend=has_legend,
        title={
            "text": f"<b>{heading}</b><br><span style='font-size:12px;color:{MUTED}'>{note}</span>",
            "font": {"size": 15},
            "x": 0,
            "xref": "container",
            "xanchor": "left",
            "y": 1,
            "yref": "container",
            "yanchor": "top",
            "pad": {"l": 8, "t": 22},
        },
        legend={
            "orientation": "h",
            "x": 0,
            "xanchor": "left",
            "y": 1,
            "yref": "paper",
            "yanchor": "bottom",
            "font": {"size": 12},
        },
    )
    if has_legend:  # above the first panel's own title
        figure.update_layout(legend_y=1 + 24 / (figure.layout.height - top - bottom))
    figure.update_xaxes(
        gridcolor=GRID, zeroline=False, linecolor=MUTED, ticks="outside", ticklen=4, tickcolor=MUTED, title_font_size=12
    )
    figure.update_yaxes(
        gridcolor=GRID,
        zeroline=False,
        linecolor=MUTED,
        ticks="outside",
        ticklen=4,
        tickcolor=MUTED,
        title_font_size=12,
        title_standoff=6,
    )
    for annotation in figure.layout.annotations:
        if annotation.yref == "paper":  # panel titles: small, at the left
            annotation.update(font={"size": 12, "color": INK}, x=0, xanchor="left", yanchor="bottom")
    return figure


def _safe(text: str) -> str:
    """Text for plotly, which reads some HTML in labels."""
    return html.escape(visible(text, spaces=False), quote=False)


def _axis(outcome: str) -> str:
    return AXIS_LABELS.get(outcome) or _safe(outcome)  # a user's own outcome has its name alone


def _named(outcome: str) -> str:
    return NAMES.get(outcome) or _safe(outcome)


def _doses(effect) -> tuple[str, str, str]:
    """What the doses of a dose-response are, what was done to the MLPs, and what its ends mean."""
    name = effect.manifest.settings.get("intervention", "rescale")
    if name == "rescale":
        return "factor on the MLP's contribution", "rescaled", " 1 is the clean model, 0 removes the contribution."
    return f"dose of {_safe(name)}", f"edited by {_safe(name)}", ""


def _panel(outcome: str) -> str:
    return "primary sink" if outcome.startswith("primary") else "treated positions"


def _first_line(value) -> str:
    return (str(value).splitlines() or [""])[0][:160]


def _whose(effect) -> str:
    kinds = effect.table["kind"].unique()
    kind = f"{kinds[0]} " if len(kinds) == 1 else ""
    n, prompts = len(effect.table), effect.table["prompt"].nunique()
    model = str(effect.manifest.model).rstrip("/").rsplit("/", 1)[-1]
    return f"{model}: {n} {kind}sink{'s' * (n != 1)}, {prompts} prompt{'s' * (prompts != 1)}"


def _layers_of(effect) -> str:
    layers = str(effect.manifest.settings.get("layers", "")).strip("[]()")
    if layers == "forming":
        return "each sink's forming MLP"
    return f"MLP{'s' * (',' in layers)} {layers}" if layers else "MLPs"


def _bars(rows: pd.DataFrame) -> str:
    n = int(rows["n_prompts"].max()) if len(rows) else 0
    return f"Bars: 95% interval over {n} prompts." if n > 1 else "Too few prompts for an interval."


def _sink_name(row) -> str:
    return _safe(f"{row['prompt']}, position {row['pos']}, {visible(str(row['token']))}")


# --------------------------------------------------------------------------------------------------- tokens
KIND_CLASSES = {
    "primary": "primary",
    "secondary": "secondary",
    "primary-like": "primary-like",
    "bos_sink": "primary",
    "noise": "noise",
}
N_VIEW_LAYERS = 5


def visible(text: str, *, spaces: bool = True) -> str:
    """A token's text with what cannot be seen made visible: spaces as `·`, newlines as `↵`, controls by number.

    `spaces`: off for running text, whose spaces, tabs and newlines stay. Direction marks, zero-width and other format
    characters would reorder or hide text; they are shown as ⟨U+202E⟩.
    """
    out = []
    for char in text:
        if char == " " or (char == "\u2581" and spaces):  # sentencepiece's own mark for a space
            out.append("·" if spaces else " ")
        elif char in "\n\t\r" and spaces:
            out.append({"\n": "↵", "\t": "⇥", "\r": "␍"}[char])
        elif char in "\n\t":
            out.append(char)
        elif unicodedata.category(char) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp") or (
            char.isspace() and char != " "
        ):
            out.append(f"⟨U+{ord(char):04X}⟩")
        else:
            out.append(char)
    return "".join(out) or "∅"


def sink_tokens_view(
    tokens_text: Sequence[str], scores_by_layer, sinks: pd.DataFrame, *, name: str = "tokens", library: bool = True
) -> str:
    """One prompt's tokens coloured by sink score, as HTML: a strip readable without scripts, and circuitsvis in it.

    `scores_by_layer`: [layer, key] or [layer, head, key] (then the mean over heads), NaN where undefined.
    `sinks`: this prompt's rows of a sink table; the index gives each its number. `name` must differ between the views
    of a page. `library`: bring styles and scripts along (a notebook); a report does so once for all its views.
    Raises InputError when lengths differ or a sink lies outside the text.
    """
    scores = np.array([[float(v) for v in row] for row in _layer_key(scores_by_layer)])
    if scores.shape[1] != len(tokens_text):
        raise InputError(
            f"{len(tokens_text)} tokens but scores of {scores.shape[1]} positions: pass those of one prompt."
        )
    outside = [int(p) for p in sinks["pos"] if not 0 <= p < len(tokens_text)]
    if outside:
        raise InputError(
            f"a sink stands at position {outside[0]}, the prompt has {len(tokens_text)} tokens: pass its own prompt's tokens."
        )
    layers = _view_layers(scores, sinks)
    if not layers:
        raise InputError("no layer has a defined score: the text is too short for the queries that a score needs.")
    with np.errstate(all="ignore"):
        defined = np.isfinite(scores).any(axis=0)
        top = np.where(defined, np.nanmax(np.where(np.isfinite(scores), scores, -np.inf), axis=0), np.nan)
    # The primary draws so much that a scale up to it would leave every other sink white.
    others = np.delete(top, [int(p) for p in sinks.loc[sinks["kind"].isin(["primary", "bos_sink"]), "pos"]])
    bound = float(np.nanmax(others)) if np.isfinite(others).any() else float(np.nanmax(top))
    bound = max(bound, 1e-4)
    parts = [f"<style>{TOKEN_CSS}</style>" if library else "", '<div class="sink-tokens">', _legend(bound, sinks)]
    parts += [
        _strip(tokens_text, scores, top, layers, bound, sinks, name),
        _circuitsvis(tokens_text, scores, top, layers, bound, name),
    ]
    parts += ["</div>", f"<script>{circuitsvis_source()}</script><script>{VIEW_SCRIPT}</script>" if library else ""]
    return "".join(parts)


def _layer_key(scores) -> np.ndarray:
    scores = np.asarray(scores.detach().cpu() if hasattr(scores, "detach") else scores, dtype=float)
    if scores.ndim == 3:
        scores = scores.mean(axis=1)
    if scores.ndim != 2:
        raise InputError(f"scores of shape {scores.shape}: [layer, key] or [layer, head, key] is needed.")
    return scores


def _view_layers(scores: np.ndarray, sinks: pd.DataFrame) -> list[int]:
    """A few layers, evenly spread over those that read a sink of this prompt (over all, where there is none)."""
    known = [layer for layer in range(len(scores)) if np.isfinite(scores[layer]).any()]
    low, high = (int(sinks["l_start"].min()) + 1, int(sinks["l_end"].max()) + 1) if len(sinks) else (0, len(scores))
    reading = [layer for layer in known if low <= layer <= high] or known
    chosen = np.linspace(0, len(reading) - 1, min(N_VIEW_LAYERS, len(reading))).round().astype(int)
    return [reading[i] for i in chosen]


def _legend(bound: float, sinks: pd.DataFrame) -> str:
    kinds = "".join(
        f'<span class="tok sink {KIND_CLASSES.get(kind, "noise")}">{html.escape(kind)}</span> '
        for kind in dict.fromkeys(sinks["kind"])
    )
    return (
        f'<p class="tok-legend"><span>score, highest layer: 0</span><span class="ramp" aria-hidden="true"></span><span>{bound:.2g} '
        f"and more</span> <span>{kinds}</span></p>"
    )


def _strip(tokens, scores, top, layers, bound: float, sinks: pd.DataFrame, name: str) -> str:
    numbers: dict[int, list] = {}
    for number, row in sinks.iterrows():
        numbers.setdefault(int(row["pos"]), []).append((number, row))
    parts = [
        f'<div class="tok-strip" role="region" tabindex="0" aria-label="tokens of {html.escape(visible(name, spaces=False))}">'
    ]
    for pos, token in enumerate(tokens):
        text = html.escape(visible(token))
        value = float(top[pos])
        depth = 0.0 if not math.isfinite(value) else min(1.0, max(value, 0.0) / bound)
        shade = f"background:rgba(0,114,178,{depth:.2f})" + (";color:#fff" if depth > 0.62 else "")
        score = f"{value:.4g} at most" if math.isfinite(value) else "not defined"
        rows = numbers.get(pos, [])
        if not rows:
            plain = "" if depth < 0.02 else f' style="{shade}"'
            parts.append(f'<span class="tok"{plain} title="position {pos}, score {score}"><bdi>{text}</bdi></span>')
        else:
            by_layer = ", ".join(
                f"layer {layer}: {float(scores[layer, pos]):.4g}"
                for layer in layers
                if math.isfinite(scores[layer, pos])
            )
            what = "; ".join(
                f"sink {number}, {row['kind']}, layers {row['l_start']} to {row['l_end']}" for number, row in rows
            )
            tip = html.escape(f"{what}. Position {pos}, score {score}. {by_layer}")
            kind = KIND_CLASSES.get(rows[0][1]["kind"], "noise")
            label = html.escape(" ".join(str(number) for number, _ in rows))
            parts.append(
                f'<span class="tok sink {kind}" style="{shade}" tabindex="0" role="img" aria-label="{text}: {tip}" data-tip="{tip}">'
                f'<bdi>{text}</bdi><sup class="num">{label}</sup></span>'
            )
        if "\n" in token:
            parts.append("<br>")
    return "".join([*parts, "</div>"])


def _circuitsvis(tokens, scores, top, layers, bound: float, name: str) -> str:
    """circuitsvis' ColoredTokensMulti as data; `VIEW_SCRIPT` draws it when its box is opened.

    circuitsvis writes tokens as HTML in the text and as plain text in its tooltips, so that escaping would be wrong in
    one of them. A word joiner (no width) after `<` and `&` is right in both: by the HTML standard a `<` or `&` that no
    letter, digit, `/`, `!`, `?` or `#` follows is text.
    """
    # Scores are undefined near the end of the text; 0 would be a false value, so those tokens are left out here.
    keep = [pos for pos in range(len(tokens)) if np.isfinite(scores[layers, pos]).all() and math.isfinite(top[pos])]
    values = [[round(float(v), 4) for v in (top[pos], *scores[layers, pos])] for pos in keep]
    props = {
        "tokens": [visible(tokens[pos]).replace("<", "<\u2060").replace("&", "&\u2060") for pos in keep],
        "values": values,
        "labels": ["highest", *(f"layer {layer}" for layer in layers)],
        "positiveBounds": [round(bound, 4)] * (len(layers) + 1),
    }
    missing = len(tokens) - len(keep)
    note = f" The last {missing} tokens have too few later queries for a score and are left out." if missing else ""
    target = "cv-" + "".join(f"{ord(c):x}" if not (c.isascii() and c.isalnum()) else c for c in name)
    return (
        f'<details class="cv"><summary>The same by layer, interactive (circuitsvis)</summary><p class="tok-note">Choose a layer above the '
        f"text; hover over a token for its scores. One scale for all layers; the bound can be changed.{note}</p>"
        f'<div class="cv-box" id="{target}"></div><script type="application/json" class="cv-data" data-target="{target}">'
        f"{script_json(props)}</script></details>"
    )


@lru_cache(maxsize=1)
def circuitsvis_source() -> str:
    """circuitsvis' script, fit to be inlined in a classic <script> element."""
    import circuitsvis

    source = (Path(circuitsvis.__file__).parent / "dist" / "cdn" / "iife.js").read_text("utf-8")
    return source.replace("</script", "<\\/script")  # within a string literal, where the backslash changes nothing


VIEW_SCRIPT = """
(() => {
  const draw = (box) => {
    const data = box.querySelector("script.cv-data");
    if (!data || box.dataset.drawn) return;
    box.dataset.drawn = "yes";
    const ready = window.sinkCircuitsLibrary ? window.sinkCircuitsLibrary("circuitsvis") : Promise.resolve();
    ready.then(() => CircuitsVis.render(data.dataset.target, CircuitsVis.ColoredTokensMulti, JSON.parse(data.textContent)));
  };
  document.querySelectorAll("details.cv").forEach((box) => {
    if (box.open) draw(box);
    box.addEventListener("toggle", () => box.open && draw(box));
  });
  // A tip by script, because the strip scrolls and would cut off one made by styles alone.
  let tip = null;
  const hide = () => { if (tip) { tip.remove(); tip = null; } };
  const show = (event) => {
    hide();
    const token = event.target.closest ? event.target.closest(".tok[data-tip]") : null;
    if (!token) return;
    tip = document.createElement("div");
    tip.className = "tok-tip";
    tip.setAttribute("role", "tooltip");
    tip.textContent = token.dataset.tip;
    document.body.append(tip);
    const at = token.getBoundingClientRect(), own = tip.getBoundingClientRect();
    tip.style.left = Math.max(4, Math.min(at.left, innerWidth - own.width - 4)) + "px";
    tip.style.top = (at.bottom + own.height + 8 < innerHeight ? at.bottom + 6 : at.top - own.height - 6) + "px";
  };
  ["mouseover", "focusin"].forEach((kind) => document.addEventListener(kind, show));
  ["focusout", "scroll"].forEach((kind) => document.addEventListener(kind, hide, true));
})();
"""

TOKEN_CSS = """
.sink-tokens{font:15px/1.9 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono","Liberation Mono",monospace;color:#222}
.tok-strip{max-height:23rem;overflow:auto;border:1px solid #d8d8d8;border-radius:6px;padding:.7rem .8rem 1rem;background:#fff}
.tok{display:inline-block;white-space:pre-wrap;overflow-wrap:anywhere;max-width:100%;line-height:1.35;
border-radius:2px;margin:0 1px 1px 0}
.tok.sink{outline:2px solid #D55E00;outline-offset:1px;padding:0 .25em;margin:0 4px 3px;position:relative;border-radius:3px}
.tok.sink.primary{outline-color:#000;outline-style:double;outline-width:4px}
.tok.sink.primary-like{outline-color:#009E73;outline-style:dashed}
.tok.sink.noise{outline-color:#777;outline-style:dotted}
.tok.sink:focus{outline-width:4px}
.tok .num{font:700 .72em/1 system-ui,sans-serif;margin-left:.2em}
.tok-legend,.tok-note{font:13px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Liberation Sans",sans-serif;color:#444;
margin:.3rem 0 .5rem;display:flex;
flex-wrap:wrap;gap:.3rem .6rem;align-items:center}
.tok-note{display:block}
.ramp{display:inline-block;width:7rem;height:.7rem;border:1px solid #bbb;
background:linear-gradient(to right,rgba(0,114,178,0),rgba(0,114,178,1))}
.tok-legend .tok{font-size:12px}
.tok-tip{position:fixed;z-index:9;max-width:min(20rem,90vw);background:#222;color:#fff;
font:13px/1.4 system-ui,sans-serif;padding:.4rem .6rem;
border-radius:4px;pointer-events:none}
details.cv{margin:.5rem 0 0}
details.cv>summary{font:13px/1.6 system-ui,sans-serif;cursor:pointer;color:#00588a}
.cv-box{overflow-x:auto;max-height:34rem;overflow-y:auto;border:1px solid #d8d8d8;border-radius:6px;padding:.6rem;
background:#fff;font-size:14px;line-height:1.6}
.cv-box:empty{display:none}
@media print{.tok-strip{max-height:none;overflow:visible}.tok,.ramp{-webkit-print-color-adjust:exact;
print-color-adjust:exact}details.cv{display:none}}
"""
