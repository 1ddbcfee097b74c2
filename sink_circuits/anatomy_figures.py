"""Figures of the anatomy: pure functions of its results, in the look of `figures`; no model is run here.

Axes, groups and units are those of the study's figures (Wong et al., 2512.22213): norms by layer, levels, MLP stages,
principal components, clustering, score by lifetime, matrix entropy. Stacked panels, but for the small multiples of
the clustering, which have no axes to read.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.colors import sample_colorscale
from plotly.subplots import make_subplots

from sink_circuits.figures.attention_view import bound_of
from sink_circuits.figures.look import (
    BLUE,
    GREEN,
    GRID,
    INK,
    LEGEND_ROW,
    MUTED,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    bars,
    finish,
    interval_trace,
    layer_ticks,
    model_of,
    nones,
    safe,
    sink_name,
    visible,
    whose,
)
from sink_circuits.statistics import bootstrap_columns

COLOURS = (BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY)
MARKERS = ("circle", "square", "diamond", "triangle-up", "cross", "x")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
KIND_LOOK = {
    "secondary": (VERMILLION, "solid", "square"), "primary-like": (GREEN, "dash", "diamond"), "bos_sink": (BLUE, "solid", "circle"),
    "noise": (PURPLE, "dot", "cross"), "primary": (BLUE, "dashdot", "circle"), "rest": (MUTED, "dash", "x"),
}  # fmt: skip
"""Colour, dash and marker of each kind of sink, in the order in which they are drawn."""
SEQUENTIAL = [[i / 9, c] for i, c in enumerate(sample_colorscale("Cividis", [i / 10 for i in range(10)]))]
"""Even in grey and for colour-blind readers; without its last, palest tenth."""
COUNTS = [[0.0, "#ffffff"], [0.15, "#d3e4f0"], [0.5, "#4a9ccb"], [1.0, "#00304d"]]
SPACE_NAMES = {"resid_post": "residual stream", "attn_out": "attention output", "mlp_in": "MLP input"}
STAGE_NAMES = {"input": "MLP input", "output": "output (contribution)"}
MAX_SHARE = 2.0
"""The highest share of a write that the neurons' figure shows: where writes cancel, sums of the largest ones exceed the whole."""
MAX_NAMED = 24
"""Sinks that are named on an axis; where there are more, only hovering names them."""


def mlp_stages_figure(result) -> go.Figure:
    """Cosine with the primary at the same stage (open, small: the same token where it is no sink), by sink instance.

    Below, for input and output: the cosine with the primary direction. A mixture of experts has one panel per branch.
    """
    # Without shared experts nothing is left for the branch "rest".
    there = np.isfinite(result.data["cosine"].to_numpy()).any(axis=(0, 2))
    branches = [str(b) for b, known in zip(result.data["branch"].values, there, strict=True) if known]
    same = "cosine with the primary at the same stage"
    titles = [same] if len(branches) == 1 else [f"{_branch_name(branch)}: {same}" for branch in branches]
    figure = _stacked([*titles, "cosine with the primary direction"], 0.24)
    panels = [(result.data["cosine"].sel(branch=b), result.data["ordinary"].sel(branch=b)) for b in branches]
    panels.append((result.data["direction"], result.data["ordinary_direction"]))
    sinks, shown = [sink_name(sink) for _, sink in result.table.iterrows()], set()
    for row, (cosine, ordinary) in enumerate(panels, 1):
        for i, stage in enumerate(str(s) for s in result.data["stage"].values):
            own, other = (values.sel(stage=stage).to_numpy() for values in (cosine, ordinary))
            if not np.isfinite(own).any():
                continue
            x, name = np.arange(len(own)) + (i - 2.5) * 0.12, STAGE_NAMES.get(stage, stage)
            marks = [
                _marks(x, own, sinks, name, COLOURS[i], MARKERS[i], size=9, showlegend=stage not in shown),
                _marks(x + 0.05, other, sinks, f"{name}: same token, no sink", COLOURS[i], f"{MARKERS[i]}-open", size=6, showlegend=False),
            ]  # fmt: skip
            _add(figure, row, *(mark.update(legendrank=i + 1) for mark in marks))
            shown.add(stage)
    figure.update_yaxes(range=[-1.08, 1.08], title_text="cosine")
    _sink_axis(figure, result.table, len(panels))
    layers = sorted({int(x) for x in result.data["layer"].values})
    missing = f"Does not exist here: {'; '.join(result.missing())}." if result.missing() else ""
    text = (
        f"{whose(result)}; MLP{'s' * (len(layers) > 1)} {', '.join(map(str, layers))}. Small open marks: mean of ordinary tokens, "
        f"of the same token id where there are any. {missing}"
    )
    title = "MLP stages: when a sink begins to look like the primary"
    return _finished(figure, title, text, height=190 + 210 * len(panels), bottom=110 if len(sinks) > 6 else 56)


def _branch_name(branch: str) -> str:
    """What a panel of a mixture of experts shows; experts are those of the sink, by rank of their router weight."""
    named = {"all": "the whole MLP", "rest": "what no expert chosen writes"}
    return named.get(branch, f"expert of rank {branch.removeprefix('expert ')}")


def writers_figure(result) -> go.Figure:
    """What embedding, attention and MLPs write along the sink's direction, by layer, beyond ordinary tokens.

    One panel per kind of sink. Bars: mean over prompts; line: what has been written so far, their sum, with its interval.
    """
    groups = _groups(result.table)
    figure = _stacked([name for name, _ in groups])
    parts, so_far = result.by_part(), result.so_far().sel(direction="life").to_numpy()
    layers = result.data["layer"].to_numpy()
    looks = (("embed", "embedding", PURPLE), ("attn", "attention", SKY), ("mlp", "MLP", VERMILLION))
    parts["prompt"] = parts["sink"].map(result.table["prompt"])
    estimates = []
    for row, (group, rows) in enumerate(groups, 1):
        by_prompt = parts[parts["sink"].isin(rows)].groupby(["prompt", "part", "layer"])["excess"].mean()
        mean = by_prompt.groupby(["part", "layer"]).mean()
        for part, name, colour in looks:
            own = mean.loc[part]
            bar = go.Bar(
                x=own.index.tolist(), y=own.tolist(), name=name, showlegend=row == 1,
                marker={"color": colour, "line": {"color": INK, "width": 0.4}},
                hovertemplate=f"{name}, layer %{{x}}: %{{y:.4g}}<extra></extra>",
            )  # fmt: skip
            _add(figure, row, bar)
        estimates.append(_over_prompts(so_far[rows], result.table["prompt"].iloc[rows], f"writers/{group}"))
        line = interval_trace(layers, estimates[-1], "mean", INK, "written so far", "after layer %{x}")
        line.update(showlegend=row == 1, line_width=1.6, marker_size=4, error_y_thickness=1.1, error_y_width=3)
        _add(figure, row, line)
        start, end = (float(result.table[name].iloc[rows].median()) for name in ("l_start", "l_end"))
        shade = {"fillcolor": ORANGE, "opacity": 0.14, "line_width": 0, "layer": "below"}
        figure.add_vrect(x0=start - 0.5, x1=end + 0.5, row=row, col=1, **shade)
        figure.add_hline(y=0, line={"color": MUTED, "width": 1}, row=row, col=1)
    figure.update_layout(barmode="relative", bargap=0.3)
    step = layer_ticks(layers)["dtick"]
    ticks = [-1, *range(0 if step == 1 else step, int(layers[-1]) + 1, step)]  # a name at -1 leaves no room for 0
    named = {"tickvals": ticks, "ticktext": ["emb", *map(str, ticks[1:])]}
    figure.update_xaxes(showticklabels=True, range=[-1.7, layers[-1] + 0.7], **named)
    figure.update_xaxes(title_text="layer (emb: embedding)", row=len(groups), col=1)
    figure.update_yaxes(title_text="projection")
    text = (
        f"{whose(result)}. Projection on the primary direction of each sink's life, less the mean of ordinary tokens "
        f"(units of the residual stream). Means over prompts. {bars(pd.concat(estimates), 'On the line')} Shaded: the sinks' life (median)."
    )
    title = "Who writes a sink's direction, and who erases it"
    return _finished(figure, title, text, height=160 + 230 * len(groups), bottom=64)


def neurons_figure(result, n_shown: int = 8) -> go.Figure:
    """How few neurons carry the write (share by number, a line per sink), and what the input of the largest looks like.

    Sinks whose MLP writes nothing along the direction, or against it, have no such share: the note counts them.
    """
    below = f"input's cosine with the {n_shown} largest ones' weights"
    figure = _stacked(["share of the MLP's write, largest neurons first", below], 0.4)
    writes = result.data["write"].to_numpy().astype(float)
    at = np.unique(np.geomspace(1, writes.shape[1], min(writes.shape[1], 120)).round().astype(int))
    sums = np.cumsum(-np.sort(-writes, axis=1), axis=1)
    writing = sums[:, -1] > 0
    shares = (sums / np.where(writing, sums[:, -1], np.nan)[:, None])[:, at - 1]
    for kind in _kinds(result.table[writing]):
        rows = np.flatnonzero((result.table["kind"] == kind).to_numpy() & writing)
        names = [sink_name(result.table.iloc[row]) for row in rows]
        _add(figure, 1, _lines(at, shares[rows], names, f"{kind} sinks", KIND_LOOK[kind], "%{x} neurons"))
    for share in (0.5, 0.9, 1.0):
        figure.add_hline(y=share, line={"color": MUTED, "width": 1, "dash": "dot"}, row=1, col=1)
    order = np.argsort(-writes, axis=1)[:, :n_shown]
    ranks = np.arange(1, order.shape[1] + 1)
    for i, (name, label) in enumerate((("cos_gate", "gate"), ("cos_in", "up"))):
        for j, (prefix, who) in enumerate((("", "sinks"), ("same_token_", "same token, no sink"))):
            values = np.take_along_axis(result.data[prefix + name].to_numpy(), order, axis=1)
            if np.isfinite(values).any():
                symbol = f"{MARKERS[i]}{'-open' * j}"
                _add(
                    figure,
                    2,
                    _spread(ranks - 0.18 + 0.24 * i + 0.12 * j, values, COLOURS[i + 2], symbol, f"{label}: {who}"),
                )
    figure.add_hline(y=0, line={"color": MUTED, "width": 1}, row=2, col=1)
    figure.update_xaxes(type="log", title_text="number of neurons (log scale)", dtick=1, row=1, col=1)
    figure.update_xaxes(title_text="neuron of the sink, by size of its write", dtick=1, row=2, col=1)
    highest = float(np.nanmax(shares)) if writing.any() else 1.0
    figure.update_yaxes(title_text="share of the write", range=[0, 1.05 * min(highest, MAX_SHARE)], row=1, col=1)
    figure.update_yaxes(title_text="cosine", row=2, col=1)
    carried = [f"{share:.0%}: {result.carriers(share).median():.3g}" for share in (0.5, 0.9)] if writing.any() else []
    said = f"Neurons that carry {', '.join(carried)} of {writes.shape[1]}" if carried else f"{writes.shape[1]} neurons"
    text = f"{whose(result)}. {said}; participation ratio {result.participation().median():.3g} (medians). "
    if not writing.all():
        n = int((~writing).sum())
        text += f"Of {n} sink{'s' * (n != 1)} the MLP writes nothing along the direction, or against it: no line. "
    if highest > MAX_SHARE:
        text += f"Shares above {MAX_SHARE:g} are cut off: there neurons write much that others take back. "
    text += "Below: median and range over sinks; the sign of up alone is a convention."
    return _finished(figure, "The neurons that carry the forming write", text, height=640, bottom=60, legend_rows=2)


def norms_by_layer_figure(result) -> go.Figure:
    """Figure 1 of the study: l2 norm of keys, values, hidden states by layer; each sink, and the mean of the rest."""
    panels = {
        "key": "keys (mean over heads)",
        "value": "values (mean over heads)",
        "hidden": "hidden states (log scale)",
    }
    figure = _stacked(list(panels.values()))
    layers = result.data["layer"].to_numpy()
    for row, what in enumerate(panels, 1):
        for kind in _kinds(result.table):
            rows = np.flatnonzero(result.table["kind"] == kind)
            own = result.table.iloc[rows]
            names = [safe(f"rest of {x['prompt']}") if kind == "rest" else sink_name(x) for _, x in own.iterrows()]
            width = 1.2 if kind == "secondary" else 2.0
            name = "mean of the rest" if kind == "rest" else kind
            trace = _lines(
                layers, result.data[what].to_numpy()[rows], names, name, KIND_LOOK[kind], "layer %{x}", width
            )
            _add(figure, row, trace.update(showlegend=row == 1, legendgroup=kind))
        figure.update_yaxes(title_text="l2 norm", rangemode="tozero", row=row, col=1)
    figure.update_yaxes(type="log", tickformat="~s", dtick=1, row=3, col=1)
    figure.update_xaxes(showticklabels=True, **layer_ticks(layers))
    figure.update_xaxes(title_text="layer", row=3, col=1)
    text = f"{model_of(result)}, {_prompts(result.table)}: a line for each sink, and for each prompt the mean of its ordinary tokens."
    return _finished(figure, "Norms of keys, values and hidden states", text, height=760, bottom=56)


def levels_figure(result) -> go.Figure:
    """Figure 2 of the study: creation layer by lifetime, colour log(1 + count), counts written in; one panel per model."""
    models, counts = [str(m) for m in result.data["model"].values], result.data["count"].to_numpy()
    starts, lives = (result.data[name].to_numpy() for name in ("l_start", "lifetime"))
    sizes = [f"{n} sink{'s' * (n != 1)}" for n in counts.sum(axis=(1, 2)).tolist()]
    if "n_prompts" in result.data:  # a file of an earlier version has one number for all models
        of = result.data["n_prompts"].values.tolist()
        sizes = [f"{size} in {n} prompt{'s' * (n != 1)}" for size, n in zip(sizes, of, strict=True)]
    titles = [f"{safe(m)}: {size}" for m, size in zip(models, sizes, strict=True)]
    figure = _stacked(titles)
    ticks = [c for c in (0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 10000) if c <= counts.max()]
    written = "%{text}" if max(len(starts), len(lives)) <= 40 else ""
    for row, own in enumerate(counts, 1):
        heat = go.Heatmap(
            x=starts.tolist(), y=lives.tolist(), z=np.log1p(own).T.tolist(), zmin=0, zmax=float(np.log1p(counts).max()),
            colorscale=COUNTS, xgap=1, ygap=1, text=[[str(c) if c else "" for c in line] for line in own.T.tolist()],
            texttemplate=written, textfont={"size": 11}, showscale=row == 1,
            hovertemplate="l_start %{x}, lifetime %{y}: %{text} sinks<extra></extra>",
            colorbar={**_scale_bar("sinks"), "tickvals": np.log1p(ticks).tolist(), "ticktext": [str(c) for c in ticks]},
        )  # fmt: skip
        _add(figure, row, heat)
    figure.update_xaxes(
        showgrid=False, showticklabels=True, range=[starts[0] - 0.5, starts[-1] + 0.5], **layer_ticks(starts)
    )
    figure.update_yaxes(
        showgrid=False, title_text="lifetime (layers)", range=[lives[0] - 0.5, lives[-1] + 0.5], **layer_ticks(lives)
    )
    figure.update_xaxes(title_text="creation layer l_start", row=len(models), col=1)
    text = (
        f"How many sinks begin in which layer and live how long (kinds: {', '.join(result.manifest.settings.get('kinds', []))}). "
        "Colour: log(1 + count)."
    )
    return _finished(figure, "Sink levels", text, height=150 + 300 * len(models), bottom=56).update_layout(margin_r=70)


def score_by_lifetime_figure(result) -> go.Figure:
    """Figure 7 of the study: mean sink score by lifetime and by layer, norm of the MLP's output by layer; colour: lifetime."""
    figure = _stacked(
        ["mean sink score by lifetime", "sink score by layer", "norm of the MLP's output by layer (log scale)"]
    )
    lives, layers = result.table["lifetime"].to_numpy(), result.data["layer"].to_numpy()
    names, scale, means = [sink_name(sink) for _, sink in result.table.iterrows()], _scale(lives), result.by_lifetime()
    points = _marks(lives, result.table["life_score"].to_numpy(dtype=float), names, "sinks", INK, "circle", size=8)
    points.marker.update(
        color=lives.tolist(),
        line={"color": INK, "width": 0.6},
        colorbar=_scale_bar("lifetime<br>(layers)") | layer_ticks(lives),
        **scale,
    )
    mean = interval_trace(
        means["lifetime"].to_numpy(), means, "mean", MUTED, "mean over prompts", "lifetime %{x}", marker="diamond-open"
    )
    _add(figure, 1, points, mean)
    for row, what in ((2, "score"), (3, "mlp_norm")):
        for life in sorted(set(lives.tolist())):
            rows = np.flatnonzero(lives == life)
            look = (_shade(life, scale), "solid", "")
            trace = _lines(
                layers,
                result.data[what].to_numpy()[rows],
                [names[i] for i in rows],
                "",
                look,
                f"lifetime {life}, layer %{{x}}",
            )
            _add(figure, row, trace.update(showlegend=False))
    for row in (1, 2):
        figure.update_yaxes(title_text="score (share)", rangemode="tozero", row=row, col=1)
    figure.update_yaxes(title_text="l2 norm", type="log", tickformat="~s", dtick=1, row=3, col=1)
    figure.update_xaxes(title_text="lifetime (layers)", row=1, col=1, **layer_ticks(lives))
    figure.update_xaxes(row=2, col=1, **layer_ticks(layers))
    figure.update_xaxes(title_text="layer", row=3, col=1, **layer_ticks(layers))
    text = f"{whose(result)}. Means over heads; by lifetime also over the layers that read the sink. {bars(means)}"
    title = "Sink score, lifetime and the MLP's output"
    return _finished(figure, title, text, height=840, bottom=56).update_layout(margin_r=70)


def pca_figure(result) -> go.Figure:
    """Figure 5 of the study: the MLP's response along each principal direction of its centred inputs, both signs."""
    figure = _stacked(["norm of MLP(alpha * pc)", "cosine with the MLP's output at the primary"])
    alpha = result.data["alpha"].to_numpy()
    for i, component in enumerate(result.data["component"].values):
        name = f"pc {component} ({float(result.data['explained'].sel(space='mlp_in', component=component)):.0%})"
        for row, what in ((1, "response_norm"), (2, "response_cosine")):
            values = result.data[what].to_numpy()[i : i + 1]
            trace = _lines(
                alpha, values, [f"pc {component}"], name, (COLOURS[i % 6], DASHES[i % 6], ""), "alpha %{x:.3g}", 2.0
            )
            _add(figure, row, trace.update(showlegend=row == 1, legendgroup=str(component)))
    scale = float(result.data["input_norm"].mean())
    for row in (1, 2):
        for x in (-scale, scale):
            figure.add_vline(x=x, line={"color": MUTED, "width": 1, "dash": "dot"}, row=row, col=1)
    figure.update_xaxes(showticklabels=True)
    figure.update_xaxes(title_text="scale alpha", row=2, col=1)
    figure.update_yaxes(title_text="l2 norm", rangemode="tozero", row=1, col=1)
    figure.update_yaxes(title_text="cosine", range=[-1.05, 1.05], row=2, col=1)
    n = int(result.table["is_sink"].sum())
    others = len(result.table) - n
    text = (
        f"{model_of(result)}, MLP {result.manifest.settings.get('layer')}: components of its centred inputs at {n} "
        f"sink{'s' * (n != 1)} and {others} same-token non-sink{'s' * (others != 1)} (share of variance); positive: "
        "the sinks' side. alpha * pc replaces the normed input. Dotted: the inputs' mean norm."
    )
    return _finished(figure, "The MLP's response along principal directions", text, height=620, bottom=56)


def clustering_figure(result) -> go.Figure:
    """Figure 6 of the study: first two principal components of sinks and same-token non-sinks, by space and layer."""
    spaces, layers = [str(s) for s in result.data["space"].values], [int(x) for x in result.data["layer"].values]
    titles = []
    for space in spaces:
        for layer in layers:
            value, p = (float(result.data[name].sel(space=space, layer=layer)) for name in ("silhouette", "p"))
            titles.append(f"{SPACE_NAMES[space]}, layer {layer}<br>silhouette {value:.2f}, p {p:.2g}")
    gaps = {"vertical_spacing": 0.1, "horizontal_spacing": 0.03}
    figure = make_subplots(rows=len(spaces), cols=len(layers), subplot_titles=titles, **gaps)
    is_sink = result.table["is_sink"].to_numpy(dtype=bool)
    names = [sink_name(token) for _, token in result.table.iterrows()]
    groups = ((is_sink, "sinks", VERMILLION, "circle"), (~is_sink, "same token, no sink", BLUE, "square-open"))
    for i in range(len(spaces)):
        for j in range(len(layers)):
            points = result.data["embedding"].to_numpy()[i, j]
            for mask, name, colour, symbol in groups:
                own = [names[k] for k in np.flatnonzero(mask)]
                trace = _marks(
                    points[mask, 0], points[mask, 1], own, name, colour, symbol, size=8, showlegend=i == j == 0
                )
                figure.add_trace(trace, row=i + 1, col=j + 1)
    figure.update_xaxes(showticklabels=False)
    figure.update_yaxes(showticklabels=False)
    text = (
        f"{model_of(result)}: {int(is_sink.sum())} sinks and as many tokens of the same ids where they are no sinks, in "
        f"{_prompts(result.table)}; two principal components. p: labels permuted within token ids, at least "
        f"{float(result.data['smallest_p'].max()):.2g}; silhouettes are of the whole space."
    )
    places = [(a.x, a.xanchor) for a in figure.layout.annotations]
    height = 180 + 190 * len(spaces)
    finished = _finished(figure, "Do sinks stand apart?", text, height=height, bottom=30, legend_rows=2)
    for annotation, (x, anchor) in zip(
        finished.layout.annotations, places, strict=True
    ):  # centred over their own panels
        annotation.update(x=x, xanchor=anchor, font_size=11)
    box = {"ticks": "", "showline": True, "mirror": True, "linecolor": GRID}
    finished.update_xaxes(**box).update_yaxes(**box)
    return finished.update_layout(margin_l=14, legend_y=finished.layout.legend.y + 0.02)


def matrix_entropy_figure(result) -> go.Figure:
    """Matrix entropy of the hidden states against tokens seen, a line per layer; all tokens, and without sinks."""
    groups = [str(g) for g in result.data["group"].values]
    figure = _stacked(groups)
    layers, seen = (result.data[name].to_numpy() for name in ("layer", "seen"))
    scale, values = _scale(layers), result.data["entropy"].mean("prompt")
    for row, group in enumerate(groups, 1):
        for layer in layers:
            line = values.sel(group=group, layer=layer).to_numpy()[None]
            trace = _lines(seen, line, [f"layer {layer}"], "", (_shade(layer, scale), "solid", ""), "%{x} tokens")
            _add(figure, row, trace.update(showlegend=False))
    bar = go.Scatter(x=[None], y=[None], mode="markers", showlegend=False)
    bar.marker.update(
        color=[float(layers[0])], showscale=True, colorbar=_scale_bar("layer") | layer_ticks(layers), **scale
    )
    _add(figure, 1, bar)
    ticks = [x for x in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000) if seen[0] <= x <= seen[-1]]
    figure.update_xaxes(type="log", showticklabels=True, tickvals=ticks)
    figure.update_xaxes(title_text="tokens seen (log scale)", row=len(groups), col=1)
    figure.update_yaxes(title_text="entropy (nats)", rangemode="tozero")
    n, shortest = result.data.sizes["prompt"], int(result.table["n_tokens"].min())
    reach = f" (beyond {shortest} tokens, over those that are as long)" if seen[-1] > shortest else ""
    text = (
        f"{model_of(result)}, mean over {n} prompt{'s' * (n != 1)}{reach}. Spectrum of the Gram matrix of the first tokens' hidden states, "
        "as they are: a massive activation counts as it is."
    )
    return _finished(figure, "Matrix entropy of the hidden states", text, height=600, bottom=56).update_layout(
        margin_r=70
    )


def key_query_geometry_figure(result) -> go.Figure:
    """The sink's key against ordinary keys for the heads that attend to it: cosine with the queries, norm, logit."""
    panels = {
        "cosine": "cosine of queries and key",
        "key_norm": "norm of the key",
        "logit": "attention logit (query . key, scaled)",
    }
    figure = _stacked(list(panels.values()))
    frame = result.to_dataframe()
    for row, what in enumerate(panels, 1):
        given = frame.dropna(subset=[what, f"{what}_ordinary"])
        for when, fill in (("before rotary", "-open"), ("after rotary", "")):
            for kind in _kinds(given):
                own = given[(given["when"] == when) & (given["kind"] == kind)]
                names = [
                    f"{sink_name(s)}<br>layer {s['layer']}, head {s['head']}, score {s['score']:.3f}"
                    for _, s in own.iterrows()
                ]
                colour, _, marker = KIND_LOOK[kind]
                legend = row == 1 and not fill
                x, y = own[f"{what}_ordinary"].to_numpy(), own[what].to_numpy()
                _add(
                    figure,
                    row,
                    _marks(x, y, names, f"{kind} sinks", colour, f"{marker}{fill}", size=8, showlegend=legend),
                )
        if len(given):
            ends = [float(f(given[[what, f"{what}_ordinary"]].to_numpy())) for f in (np.min, np.max)]
            line = {"color": MUTED, "width": 1, "dash": "dot"}
            _add(figure, row, go.Scatter(x=ends, y=ends, mode="lines", showlegend=False, hoverinfo="skip", line=line))
        figure.update_xaxes(title_text="ordinary keys (mean)", row=row, col=1)
        figure.update_yaxes(title_text="the sink's key", row=row, col=1)
    text = (
        f"{whose(result)}; the {result.data.sizes['rank']} heads that attend most to each. Means over the queries that see the sink. "
        "Open marks: before rotary; dotted: equal." + "".join(f" Missing: {one}." for one in result.missing())
    )
    return _finished(figure, "Keys and queries of the heads that attend to a sink", text, height=860, bottom=60)


def attention_patterns_figure(result, n_shown: int = 2) -> go.Figure:
    """Patterns of the heads that attend most to the first text's sinks, between the positions of its window."""
    window = result.of()
    heads = window.heads[:n_shown]
    figure = _stacked([f"layer {layer}, head {head} (sink score {score:.2g})" for layer, head, score in heads], 0.26)
    labels = [safe(f"{row.pos} {visible(str(row.token))}") for row in window.tokens.itertuples()]
    bound = bound_of(window)
    ticks = [c for c in (0, 0.001, 0.01, 0.05, 0.1, 0.2, 0.5, 1) if c <= bound]
    for row, (values, _) in enumerate(zip(window.attention, heads, strict=False), 1):
        seen = np.where(np.tril(np.ones_like(values, dtype=bool)), np.round(values.astype(float), 4), np.nan)
        heat = go.Heatmap(
            x=labels, y=labels, z=nones(np.sqrt(np.minimum(seen, bound)).round(3)), customdata=nones(seen), zmin=0,
            zmax=float(np.sqrt(bound)), colorscale=COUNTS, showscale=row == 1,
            hovertemplate="query %{y}<br>key %{x}<br>weight %{customdata:.3g}<extra></extra>",
            colorbar={**_scale_bar("weight"), "tickvals": np.sqrt(ticks).tolist(), "ticktext": [f"{c:g}" for c in ticks]},
        )  # fmt: skip
        _add(figure, row, heat)
    named: list[int] = []
    for index in np.flatnonzero((window.tokens["kind"] != "").to_numpy()).tolist():
        named += [index] if not named or index >= named[-1] + 2 else []  # names of neighbours would lie on each other
    shared = {
        "type": "category", "tickmode": "array", "tickvals": [labels[i] for i in named], "showgrid": False, "tickfont_size": 10,
    }  # fmt: skip
    numbers = [str(window.tokens["pos"].iloc[i]) for i in named]
    figure.update_xaxes(
        **shared, ticktext=numbers, tickangle=0, showticklabels=True, title_text="position of the key (named: sinks)"
    )
    texts = [visible(str(window.tokens["token"].iloc[i])) for i in named]
    texts = [
        safe(f"{number} {text if len(text) <= 9 else text[:8] + '…'}")
        for number, text in zip(numbers, texts, strict=True)
    ]
    figure.update_yaxes(**shared, ticktext=texts, autorange="reversed", title_text="query", automargin=True)
    n = len(window.tokens)
    text = (
        f"{model_of(result)}, {window.tokens['prompt'].iloc[0]}: weights between {n} positions around its sinks, and some of the "
        f"rest. Full colour: {bound:.2g}, the largest on a key that is no primary sink; colour by the square root."
    )
    title = "Attention patterns around the sinks"
    return _finished(figure, title, text, height=120 + 340 * len(heads), bottom=56).update_layout(margin_r=70)


FIGURES = {
    "mlp_stages": mlp_stages_figure, "writers": writers_figure, "neurons": neurons_figure, "norms_by_layer": norms_by_layer_figure,
    "levels": levels_figure, "score_by_lifetime": score_by_lifetime_figure, "pca": pca_figure, "clustering": clustering_figure,
    "matrix_entropy": matrix_entropy_figure, "key_query_geometry": key_query_geometry_figure,
    "attention_patterns": attention_patterns_figure,
}  # fmt: skip


# What the figures share.


def _stacked(titles: list[str], spacing: float = 0.34) -> go.Figure:
    """Panels one below the other; `spacing`: what the gaps take of the height together."""
    return make_subplots(
        rows=len(titles), cols=1, subplot_titles=titles, vertical_spacing=min(0.2, spacing / len(titles))
    )


def _add(figure: go.Figure, row: int, *traces) -> None:
    for trace in traces:
        figure.add_trace(trace, row=row, col=1)


def _finished(figure: go.Figure, title: str, text: str, *, height: int, bottom: int, legend_rows: int = 1) -> go.Figure:
    """`look.finish`, with room for a legend of bars."""
    figure = finish(figure, title, text, height=height, bottom=bottom, legend_rows=legend_rows)
    plot = figure.layout.height - figure.layout.margin.t - bottom
    bars = any(trace.type == "bar" for trace in figure.data) and not figure.layout.showlegend
    if not bars:
        return figure
    height, top = (value + LEGEND_ROW * legend_rows for value in (figure.layout.height, figure.layout.margin.t))
    return figure.update_layout(height=height, margin_t=top, showlegend=True, legend_y=1 + 24 / plot)


def _lines(x, rows: np.ndarray, names: Sequence[str], name: str, look, where: str, width: float = 1.5) -> go.Scatter:
    """Lines of rows [line, x] as one trace, broken by None: hundreds of them stay one entry of the legend."""
    n, (colour, dash, _) = len(x), look
    return go.Scatter(
        x=[*x.tolist(), None] * len(rows), y=[value for row in rows for value in (*nones(row), None)],
        text=[text for one in names for text in (*[one] * n, None)], mode="lines", name=name,
        line={"color": colour, "width": width, "dash": dash}, hovertemplate=f"%{{text}}<br>{where}: %{{y:.4g}}<extra></extra>",
    )  # fmt: skip


def _over_prompts(values: np.ndarray, prompts: pd.Series, name: str) -> pd.DataFrame:
    """Mean over prompts of each column of values [sink, layer] with its interval; columns mean, low, high, n_prompts."""
    found = bootstrap_columns(values, prompts, name=name)
    return pd.DataFrame({"mean": e.mean, "low": e.low, "high": e.high, "n_prompts": e.n} for e in found)


def _marks(
    x, y, names: Sequence[str], name: str, colour: str, symbol: str, *, size: int, showlegend: bool = True
) -> go.Scatter:
    return go.Scatter(
        x=x.tolist(), y=nones(y), text=list(names), mode="markers", name=name, showlegend=showlegend,
        marker={"color": colour, "symbol": symbol, "size": size}, hovertemplate=f"%{{text}}<br>%{{y:.4g}}<extra>{name}</extra>",
    )  # fmt: skip


def _spread(x, values: np.ndarray, colour: str, symbol: str, name: str) -> go.Scatter:
    """Medians over rows of values [sink, rank], bars from the smallest to the largest."""
    given = values[np.isfinite(values).any(axis=1)]
    middle, low, high = np.nanmedian(given, axis=0), np.nanmin(given, axis=0), np.nanmax(given, axis=0)
    ends = {"array": nones(high - middle), "arrayminus": nones(middle - low)}
    trace = _marks(x, middle, [f"neuron {rank}" for rank in range(1, len(x) + 1)], name, colour, symbol, size=8)
    return trace.update(
        error_y={"type": "data", "symmetric": False, "thickness": 1.2, "width": 3, "color": colour, **ends}
    )


def _sink_axis(figure: go.Figure, table: pd.DataFrame, last: int) -> None:
    n = len(table)
    if n <= MAX_NAMED:
        labels = [safe(f"{visible(str(sink.token))} {sink.pos}") for sink in table.itertuples()]
        figure.update_xaxes(tickvals=list(range(n)), ticktext=labels, tickangle=-60 if n > 6 else 0)
    figure.update_xaxes(range=[-0.6, n - 0.4], showgrid=False, showticklabels=False)
    title = "sink instance (token, position)"
    figure.update_xaxes(title_text=title, showticklabels=n <= MAX_NAMED, row=last, col=1)


def _groups(table: pd.DataFrame) -> list[tuple[str, list[int]]]:
    """Sinks drawn together: by kind, and primaries by the layer at which their phase begins."""
    groups: dict[str, list[int]] = {}
    for index, sink in enumerate(table.itertuples()):
        name = f"primary, from layer {sink.l_start}" if sink.kind == "primary" else f"{sink.kind} sinks"
        groups.setdefault(name, []).append(index)
    return [(f"{name} (n = {len(rows)})", rows) for name, rows in groups.items()]


def _kinds(table: pd.DataFrame) -> list[str]:
    return [kind for kind in KIND_LOOK if (table["kind"] == kind).any()]


def _scale(values: np.ndarray) -> dict:
    return {"cmin": float(values.min()) - 0.5, "cmax": float(values.max()) + 0.5, "colorscale": SEQUENTIAL}


def _shade(value: float, scale: dict) -> str:
    return sample_colorscale(scale["colorscale"], (float(value) - scale["cmin"]) / (scale["cmax"] - scale["cmin"]))[0]


def _scale_bar(title: str) -> dict:
    return {"title": {"text": f"{title}<br> ", "font": {"size": 12}}, "thickness": 10, "outlinewidth": 0, "len": 0.8}


def _prompts(table: pd.DataFrame) -> str:
    n = table["prompt"].nunique()
    return f"{n} prompt{'s' * (n != 1)}"
