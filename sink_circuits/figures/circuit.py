"""The circuit of one sink: who writes its direction, by which neurons, who reads it, who erases it. No model is run here."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from sink_circuits import arguments
from sink_circuits.anatomy import KeyQueryGeometry, Neurons, Writers
from sink_circuits.errors import InputError
from sink_circuits.figures.look import (
    BLUE,
    GREEN,
    INK,
    MUTED,
    ORANGE,
    PURPLE,
    VERMILLION,
    finish,
    model_of,
    safe,
    visible,
)

ROLES = {
    "writer": ("writes", BLUE, "solid"), "carrier": ("adds", PURPLE, "dashdot"), "neuron": ("neuron", ORANGE, "solid"),
    "reader": ("attends", GREEN, "dot"), "eraser": ("erases", VERMILLION, "dash"),
}  # fmt: skip
"""What each kind of edge is called, its colour and its dash."""
KEY = ("prompt", "pos", "l_start")
STREAM, LEFT, RIGHT = 0.6, 0.0, 1.0
"""Where the residual stream and the two columns of components stand, from 0 to 1."""
MIN_SHARE = 0.01
"""Writes of less than this share are left out."""
MIN_ROWS = 6
ROW_HEIGHT = 34


def circuit_edges(writers, neurons=None, heads=None, *, sink: int = 0, n: int = 4) -> pd.DataFrame:
    """The measured weights of one sink's circuit, a row per edge, from low layers to high.

    `writers`: `anatomy.writers`; `neurons`, `heads`: `anatomy.neurons` and `anatomy.key_query_geometry` of the same sinks, each may
    be left out. `sink`: row of `writers.table`. `n`: edges of each role at most. Columns: role, component, target, layer,
    weight: of writers the share of what stands along the sink's direction after l_start, of carriers (later writers) the
    share of its peak, of erasers the same and negative (`Writers.top`); of neurons the share of their MLP's write along it; of
    readers the sink score of a head, the mean attention that the sink gets there. An MLP whose neurons are given is always
    listed, also when it writes nothing along the direction, or against it. Raises InputError for a row that does not exist.
    """
    arguments.instance(writers, "writers", Writers, "pass what anatomy.writers returns")
    for name, value, kind in (("neurons", neurons, Neurons), ("heads", heads, KeyQueryGeometry)):
        if value is not None:
            arguments.instance(
                value, name, kind, "pass what anatomy.neurons and anatomy.key_query_geometry return, or None"
            )
    sink = arguments.whole(sink, "sink", high=len(writers.table) - 1)
    n = arguments.whole(n, "n", low=1)
    own = writers.table.iloc[sink]
    top = writers.top(len(writers.data["component"]))
    top = top[top["sink"] == sink]
    mlp = None
    row = None if neurons is None else _row_of(neurons.table, own)
    if neurons is not None and row is not None:
        mlp = f"L{int(neurons.data['layer'][row])} mlp"
    rows = []
    for role, given in top.groupby("role", sort=False):
        kept = given[given["share"].abs() >= MIN_SHARE].head(n)
        listed = pd.concat([kept, given[(given["component"] == mlp) & (role != "eraser")]]).drop_duplicates("component")
        for one in listed.itertuples():
            rows.append((role, one.component, "residual stream", int(one.layer), float(one.share)))
    if mlp is not None and mlp not in [component for _, component, *_ in rows]:
        rows.append(_small(writers, sink, mlp))
    if neurons is not None and row is not None:
        write, whole = neurons.data["write"].to_numpy()[row].astype(float), float(neurons.data["contribution"][row])
        for index in np.argsort(-write, kind="stable")[:n]:
            if whole > 0 and write[index] >= MIN_SHARE * whole:
                rows.append(
                    (
                        "neuron",
                        f"neuron {neurons.name_of(row, index)}",
                        mlp,
                        int(neurons.data["layer"][row]),
                        write[index] / whole,
                    )
                )
    row = None if heads is None else _row_of(heads.table, own)
    if heads is not None and row is not None:
        found = zip(*(heads.data[name].to_numpy()[row] for name in ("layer", "head", "score")), strict=True)
        for layer, head, score in list(found)[:n]:
            if layer >= 0:
                rows.append(("reader", f"L{layer}H{head}", "head", int(layer), float(score)))
    frame = pd.DataFrame(rows, columns=["role", "component", "target", "layer", "weight"])
    order = {"writer": 0, "neuron": 1, "carrier": 2, "reader": 3, "eraser": 4}
    # An attention head of a layer reads and writes before the MLP of that layer.
    frame["_part"] = frame["component"].str.endswith("mlp") | (frame["role"] == "neuron")
    frame["_role"] = frame["role"].map(order)
    frame = frame.sort_values(["layer", "_part", "_role"], kind="stable", ignore_index=True)
    return frame.drop(columns=["_part", "_role"])


def _small(writers, sink: int, component: str) -> tuple[str, str, str, int, float]:
    """The edge of a component that is among no role's largest: its share, small or negative, by the direction of its layer."""
    own, layer = writers.table.iloc[sink], int(writers.data["component_layer"].sel(component=component))
    role = "writer" if layer <= int(own["l_start"]) else "carrier"
    direction, whole_at = (
        ("start", int(own["l_start"])) if role == "writer" else ("life", int(writers.peak("life")[sink]))
    )
    excess, whole = (
        float(values.sel(sink=sink, direction=direction, **at))
        for values, at in ((writers.excess(), {"component": component}), (writers.so_far(), {"layer": whole_at}))
    )
    return role, component, "residual stream", layer, excess / whole


def _row_of(table: pd.DataFrame, sink) -> int | None:
    """Where this sink stands in another result's table; None where it does not."""
    found = np.flatnonzero(np.logical_and.reduce([(table[name] == sink[name]).to_numpy() for name in KEY]))
    return int(found[0]) if len(found) else None


def circuit_figure(writers, neurons=None, heads=None, *, sink: int = 0, n: int = 4) -> go.Figure:
    """The circuit diagram of one sink, layers upwards: its residual stream in the middle, components at the left, readers at the right.

    Every edge is one row with its measured weight (`circuit_edges`): writers and what adds to them point at the stream,
    erasers take from it, dashed and with a minus; readers are the heads that attend to it; neurons hang below their MLP. The
    stream comes to every row as wide as what stands along the sink's direction before that row's layer, against its peak. Raises
    InputError for a row that does not exist, or when nothing is left to draw.
    """
    edges = circuit_edges(writers, neurons, heads, sink=sink, n=n)
    if not len(edges):
        raise InputError(f"no component writes a share of {MIN_SHARE:.0%} of sink {sink}: there is no circuit to draw.")
    own = writers.table.iloc[sink]
    edges = _neurons_below(edges)
    figure = go.Figure()
    _stream(figure, writers, sink, edges)
    rows: dict[str, int] = {}
    for y, component in enumerate(edges["component"]):  # an MLP may add and erase: its neurons hang below its first row
        rows.setdefault(component, y)
    shown: set[str] = set()
    for y, edge in enumerate(edges.itertuples()):
        name, colour, dash = ROLES[edge.role]
        weight = f"{edge.weight:.3f}" if edge.role == "reader" else _percent(edge.weight)
        if edge.role == "neuron":
            x, ys = [0.05, 0.05, 0.14], [rows[edge.target], y, y]
        else:
            x, ys = ([0.02, STREAM] if edge.role != "reader" else [STREAM, RIGHT - 0.02]), [y, y]
        figure.add_trace(
            go.Scatter(
                x=x, y=ys, mode="lines", name=name, legendgroup=edge.role, showlegend=edge.role not in shown,
                customdata=[edge.weight] * len(x), line={"color": colour, "dash": dash, "width": 1.2 + 5 * min(1.0, abs(edge.weight))},
                hovertemplate=f"{safe(edge.component)} {name}: %{{customdata:.4g}}<extra></extra>",
            )
        )  # fmt: skip
        shown.add(edge.role)
        _box(figure, edge, y, colour, weight)
        if edge.role != "neuron":  # whose weight stands in its box
            figure.add_annotation(
                x=0.7 if edge.role == "reader" else 0.46, y=y, text=weight, showarrow=False, bgcolor="#ffffff", borderpad=1,
                font={"size": 12, "color": INK},
            )  # fmt: skip
            # The arrow's head: at the stream, or at the reader.
            at_stream = {"writer": "triangle-right", "carrier": "triangle-right", "eraser": "line-ns-open"}
            head = at_stream.get(edge.role, "triangle-right")
            figure.add_trace(
                go.Scatter(
                    x=[STREAM - 0.025 if edge.role != "reader" else 0.79], y=[y], mode="markers", showlegend=False, hoverinfo="skip",
                    marker={"symbol": head, "size": 11, "color": colour, "line": {"width": 3 if "open" in head else 0, "color": colour}},
                )
            )  # fmt: skip
    ends = {"font": {"size": 12, "color": INK}, "showarrow": False, "x": STREAM, "bgcolor": "#ffffff"}
    top = len(edges) - 0.3
    figure.add_annotation(
        y=-0.75, yanchor="top", text=f"<b>{safe(visible(str(own['token'])))}</b> at position {own['pos']}", **ends
    )
    figure.add_annotation(y=top, yanchor="bottom", text="up to the last layer", **ends)
    _shade_life(figure, edges["layer"].tolist(), int(own["l_start"]), int(own["l_end"]))
    figure.update_xaxes(range=[-0.01, 1.01], visible=False)
    figure.update_yaxes(range=[-1.6, len(edges) + 0.5], visible=False)
    missing = [
        name
        for name, one in (("neurons", neurons), ("readers", heads))
        if one is None or _row_of(one.table, own) is None
    ]
    row = None if neurons is None else _row_of(neurons.table, own)
    if row is not None and not (edges["role"] == "neuron").any():
        mlp = int(neurons.data["layer"][row])
        missing.append(f"shares of neurons (MLP {mlp} writes nothing along the direction, or against it)")
    erased = "" if (edges["role"] == "eraser").any() else " Nothing takes it away: it lasts to the last layers."
    text = (
        f"{model_of(writers)}, {own['kind']} sink of {own['prompt']}; layers upwards. Shares: writers, of what stands along the "
        "primary direction after the sink's first layer; what adds and erases, of its peak; neurons, of their MLP's write. Readers: "
        "mean attention that the sink gets in that head. The stream comes to each row as wide as what stands there before its "
        "layer; shaded: the sink's life, "
        f"layers {own['l_start']} to {own['l_end']}.{erased}"
        + (f" Not measured: {' and '.join(missing)}." if missing else "")
    )
    height = 130 + ROW_HEIGHT * max(MIN_ROWS, len(edges) + 2)
    finish(figure, f"Circuit of the sink at position {own['pos']}", text, height=height, bottom=12, legend_rows=3)
    return figure.update_layout(margin_l=10, margin_r=10)


def _percent(share: float) -> str:
    """A share with its sign; one that rounds to 0 has none."""
    return f"{share:+.0%}".replace("-", "−") if abs(share) >= 0.005 else "0%"


def _shade_life(figure: go.Figure, layers: list[int], start: int, end: int) -> None:
    rows = [y for y, layer in enumerate(layers) if start <= layer <= end]
    if rows:
        figure.add_hrect(
            y0=rows[0] - 0.5, y1=rows[-1] + 0.5, fillcolor=ORANGE, opacity=0.13, line_width=0, layer="below"
        )


def _neurons_below(edges: pd.DataFrame) -> pd.DataFrame:
    """Rows from the lowest up: an MLP's neurons directly below it, the largest nearest; all others as they are."""
    neurons = edges[edges["role"] == "neuron"].sort_values("weight", kind="stable")
    rows = []
    for edge in edges[edges["role"] != "neuron"].itertuples(index=False):
        if len(neurons) and edge.component == neurons["target"].iloc[0]:
            rows += list(neurons.itertuples(index=False))
            neurons = neurons.iloc[:0]
        rows.append(edge)
    return pd.DataFrame(rows, columns=list(edges))


def _stream(figure: go.Figure, writers, sink: int, edges: pd.DataFrame) -> None:
    """The residual stream, as wide as the excess along the direction, against its peak.

    It comes to each row as what stands before that row's layer (what a head of the layer reads), and leaves the last row as
    what stands after it.
    """
    so_far = writers.so_far().sel(sink=sink, direction="life").to_numpy().astype(float)
    peak = float(np.nanmax(so_far)) or 1.0
    embedding = float(writers.excess().sel(sink=sink, direction="life", component="embed"))
    before = [0.0, embedding, *so_far[:-1]]  # of the embedding, of layer 0, ...
    layers = [int(layer) for layer in edges["layer"]]
    shares = np.clip([*(before[layer + 1] for layer in layers), so_far[max(layers)]], 0, peak) / peak
    ys = [-0.7, *range(len(layers)), len(layers) - 0.4]
    for row, share in enumerate(shares.tolist()):
        figure.add_trace(
            go.Scatter(
                x=[STREAM, STREAM], y=ys[row : row + 2], mode="lines", name="residual stream", legendgroup="stream", showlegend=row == 0,
                customdata=[share, share], line={"color": MUTED, "width": 2 + 12 * share},
                hovertemplate="residual stream: %{customdata:.3g} of its peak<extra></extra>",
            )
        )  # fmt: skip


def _box(figure: go.Figure, edge, y: int, colour: str, weight: str) -> None:
    is_reader, is_neuron = edge.role == "reader", edge.role == "neuron"
    name = edge.component.replace(" mlp", " MLP").replace(" attn", " attention").replace("embed", "embedding")
    name += f": {weight}" if is_neuron else ""
    figure.add_annotation(
        x=RIGHT if is_reader else 0.12 if is_neuron else LEFT, xanchor="right" if is_reader else "left", y=y, text=safe(name),
        showarrow=False, bgcolor="#ffffff", bordercolor=colour, borderwidth=1 if is_neuron else 2, borderpad=3,
        font={"size": 11 if is_neuron else 12, "color": INK},
    )  # fmt: skip
