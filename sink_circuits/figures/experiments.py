"""Figures of experiments: layer map, dose-response, clean against edited by layer. No model is run here."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sink_circuits import arguments, statistics
from sink_circuits.controlled import Controlled
from sink_circuits.effects import Effect
from sink_circuits.errors import InputError
from sink_circuits.figures.evidence import edits_figure
from sink_circuits.figures.look import (
    BLUE,
    DIVERGING,
    GREEN,
    IMPOSSIBLE,
    INK,
    MUTED,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    axis,
    bars,
    finish,
    first_line,
    interval_trace,
    layer_ticks,
    layers_of,
    named,
    nones,
    panel,
    safe,
    sink_name,
    whose,
)

MAX_EDITS = 5
"""Edits that are told apart as lines of one panel."""


def effect_figure(effect, outcome: str = "score") -> go.Figure:
    """The figure of this kind of experiment: layer map, dose-response, or clean against edited by layer for all others.

    More than `MAX_EDITS` of those, and outcomes without layers, stand one below the other instead. Raises InputError for an
    outcome that was not measured.
    """
    arguments.instance(effect, "effect", Effect, "pass what an experiment returns")
    if effect.kind == "layer_map" and (outcome not in effect.outcomes or "layer" in effect.data[outcome].dims):
        return layer_map_figure(effect, outcome)
    if effect.kind == "dose_response":
        return dose_response_figure(effect, outcome)
    has_layers = outcome not in effect.outcomes or "layer" in effect.data[outcome].dims
    if effect.data.sizes["edit"] > MAX_EDITS or not has_layers:
        return edits_figure(effect, outcome)
    return ablation_figure(effect, outcome)


def layer_map_figure(effect, outcome: str = "log_odds", controls=None) -> go.Figure:
    """Which layers matter: the effect by edited layer, above the effect by edited and reading layer.

    Above: `effect.summary()`'s mean over prompts, bars its interval. Below: mean over sinks and heads; grey where an
    effect is impossible (reading layer at or below the edited one) or not defined. `controls`: a `Controlled` of these
    sinks; a grey band spans the intervals of the same removal where it should do nothing (`control_band`). Raises InputError for
    an outcome that was not measured or has no layers, and for edits that are not layers.
    """
    arguments.instance(effect, "effect", Effect, "pass what an experiment returns")
    if controls is not None:
        arguments.instance(controls, "controls", Controlled, "pass what with_controls returns")
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
        interval_trace(edited, rows, "effect", VERMILLION, "mean effect", "edited layer %{x}"), row=1, col=1
    )
    band = control_band(controls, outcome)
    if band is not None:
        look = {"fillcolor": MUTED, "opacity": 0.22, "line_width": 0, "layer": "below"}
        figure.add_hrect(y0=band[0], y1=band[1], row=1, col=1, exclude_empty_subplots=False, **look)
    bound = float(np.nanmax(np.abs(cells))) if np.isfinite(cells).any() else 1.0
    figure.add_trace(
        go.Heatmap(
            x=columns.tolist(),
            y=reading.tolist(),
            z=nones(every),
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
                "title": {"text": f"change of {axis(outcome)}", "side": "bottom", "font": {"size": 12}},
            },
        ),
        row=2,
        col=1,
    )
    for edge in (start + 0.5, min(end + 1.5, reading[-1] + 0.5)):
        figure.add_hline(y=edge, line={"color": INK, "width": 1, "dash": "dot"}, row=2, col=1)
    figure.update_xaxes(range=[edited.min() - 0.6, edited.max() + 0.6], **layer_ticks(edited))
    figure.update_xaxes(title_text="edited layer", title_standoff=4, showticklabels=True, row=2, col=1)
    figure.update_xaxes(showticklabels=True, row=1, col=1)
    figure.update_yaxes(title_text=f"change, {axis(outcome)}", row=1, col=1)
    figure.update_yaxes(title_text="reading layer", showgrid=False, row=2, col=1, **layer_ticks(reading))
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
    if band is not None:
        edit = controls.data["edit"].values[0]
        what = "removal" if edit == "zero" else f"edit “{edit}”"
        life += f" Grey band: the intervals of {len(band[2])} controls of the {what} at {layers_of(controls)} ({', '.join(band[2])})."
    return finish(
        figure,
        f"Effect of editing one MLP on the {named(outcome)}",
        f"{whose(effect)}. {bars(rows)} {life}",
        height=760,
        bottom=92,
    )


def control_band(controls, outcome: str) -> tuple[float, float, list[str]] | None:
    """(lowest, highest end, names) of the intervals over prompts of the effects at other tokens and of other layers.

    A control of too few prompts for an interval counts with its mean. None where there are no controls of this outcome.
    """
    if controls is None or f"control_{outcome}" not in controls.data:
        return None
    ends, names = [], []
    for name in ("same token", "same range", "norm matched", "wrong layer"):
        values = controls.data[f"control_{outcome}"].sel(control=name).isel(edit=0).to_numpy().astype(float)
        if np.isfinite(values).any():
            own = statistics.bootstrap_over_prompts(values, controls.table["prompt"], name=f"{name}/{outcome}/band")
            ends += [end if np.isfinite(end) else own.mean for end in (own.low, own.high)]
            names.append(name if np.isfinite(own.low) else f"{name}: one prompt's mean")
    return (min(ends), max(ends), names) if names else None


def dose_response_figure(effect, outcome: str = "score") -> go.Figure:
    """The outcome over the lifetime by factor, a thin line per sink and the mean with its interval; below, the primary.

    Factors stand evenly spaced, not to scale: 0, 1/4, 1/2, 1, 2, 4 has no scale on which all can be told apart. Bars are
    intervals of the edited outcome itself: a change's interval, moved to where the mean stands, can leave the range that
    a score can have. Raises InputError for an outcome that was not measured, or edits that are not factors.
    """
    arguments.instance(effect, "effect", Effect, "pass what an experiment returns")
    effect.effect(outcome)  # refuses what was not measured
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
        subplot_titles=[panel(name) for name in panels],
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
            thin_y += [*nones(values), None]
            hover += [sink_name(effect.table.iloc[sink])] * len(labels) + [None]
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
        trace = interval_trace(
            labels, rows, "mean", colour, "mean", "factor %{x}", marker="circle" if row == 1 else "square"
        )
        trace.showlegend = row == 1
        figure.add_trace(trace, row=row, col=1)
        clean = float(_summary(effect, name)["clean"].mean())
        figure.add_hline(y=clean, line={"color": INK, "width": 1.2, "dash": "dash"}, row=row, col=1)
        # In the panel's title: in the panel, wherever it stood, it would lie on some curve's points.
        figure.layout.annotations[row - 1].text += f" (dashed: clean, {clean:.3g})".replace("-", "\u2212")
        figure.update_yaxes(title_text=axis(name), row=row, col=1)
    figure.update_xaxes(
        type="category", categoryorder="array", categoryarray=labels, showticklabels=True, showgrid=True
    )
    figure.update_xaxes(title_text=f"{dose}<br>(evenly spaced, not to scale)", row=len(panels), col=1)
    text = f"{whose(effect)}; {layers_of(effect)} {done}. {bars(_summary(effect, outcome))}{ends}"
    return finish(figure, f"Dose-response: {named(outcome)}", text, height=400 + 260 * (len(panels) - 1), bottom=72)


def ablation_figure(effect, outcome: str = "score") -> go.Figure:
    """Clean against edited outcome by layer: above at the treated positions, below at the primary sink.

    Means over prompts (of the mean over sinks and heads) with bootstrap intervals, from the first edited layer on: at
    that layer and below nothing can change. Raises InputError for an outcome that was not measured or has no layers.
    """
    arguments.instance(effect, "effect", Effect, "pass what an experiment returns")
    effect.effect(outcome)  # refuses what was not measured
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
        subplot_titles=[panel(name) for name in panels],
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
            trace = interval_trace(layers, rows, "mean", colour, safe(label), "layer %{x}", dash=dash, marker=marker)
            trace.showlegend = row == 1
            figure.add_trace(trace, row=row, col=1)
        figure.update_yaxes(title_text=axis(name), row=row, col=1)
        if name.endswith("score"):
            figure.update_yaxes(rangemode="tozero", row=row, col=1)
    figure.update_xaxes(showticklabels=True, **layer_ticks(layers))
    figure.update_xaxes(title_text="layer whose attention is read", row=len(panels), col=1)
    text = (
        f"{whose(effect)}; {layers_of(effect)} edited. {bars(pd.DataFrame({'n_prompts': [n_prompts]}))} "
        "Shaded: layers that read the sinks (median)."
    )
    return finish(
        figure, f"Clean and edited {named(own)}, by layer", text, height=380 + 260 * (len(panels) - 1), bottom=64
    )


# Numbers behind.


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
            f"this figure needs an experiment whose edits are {what}, this {effect.kind} has {first_line(list(edits))}."
        )
    return edits


def _doses(effect) -> tuple[str, str, str]:
    """What the doses of a dose-response are, what was done to the MLPs, and what its ends mean."""
    name = effect.manifest.settings.get("intervention", "rescale")
    if name == "rescale":
        return "factor on the MLP's contribution", "rescaled", " 1 is the clean model, 0 removes the contribution."
    return f"dose of {safe(name)}", f"edited by {name}", ""  # an axis, and the note, which `title_text` makes safe
