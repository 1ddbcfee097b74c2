"""Figures as files: pages that need no network, and pictures for a paper."""

from __future__ import annotations

import json
from pathlib import Path

import plotly.graph_objects as go

from sink_circuits.errors import ResultError
from sink_circuits.figures.look import CONFIG, first_line
from sink_circuits.results import write_whole


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
                f"a .{kind} figure needs the package kaleido and a Chromium browser ({first_line(error)}): install both, or save .html."
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
