"""Figures as files: pages that need no network, and pictures for a paper."""

from __future__ import annotations

import html
import json
from pathlib import Path

import plotly.graph_objects as go

from sink_circuits import arguments
from sink_circuits.errors import InputError, ResultError
from sink_circuits.figures.look import CONFIG, PICTURE_WIDTH, first_line, widened
from sink_circuits.results import check_target, write_whole
from sink_circuits.text_files import has_surrogate

LIBRARY = "plotly.min.js"
"""What `save_library` calls the file that pages may share."""


def save_figure(
    figure: go.Figure, path: str | Path, *, library: str | None = None, overwrite: bool = False
) -> None:  # fmt: skip
    """Write a figure: .html (self-contained, no network), or .svg, .pdf, .png by way of kaleido and a Chromium browser.

    `library`: for .html, where plotly.js lies, relative to the page (`save_library` writes it): 5 MB that many pages share.
    Raises ResultError for another suffix, an existing file, or when kaleido or its browser is missing.
    """
    arguments.instance(figure, "figure", go.Figure, "pass what plot() returns")
    path = arguments.path(path)
    if library is not None and has_surrogate(arguments.text(library, "library")):
        raise InputError(f"library = {library!r}: give a name that can be written as UTF-8.")
    check_target(path, overwrite=overwrite)
    kind = path.suffix.lower().removeprefix(".")
    if kind == "html":
        data = _figure_page(figure, library).encode()
    elif kind in ("svg", "pdf", "png"):
        try:
            wide = widened(figure)
            data = wide.to_image(
                format=kind, width=PICTURE_WIDTH, height=wide.layout.height, scale=2 if kind == "png" else 1
            )
        except (
            Exception
        ) as error:  # plotly and kaleido raise ValueError, RuntimeError, ImportError and their own classes
            raise ResultError(
                f"a .{kind} figure needs the package kaleido and a Chromium browser ({first_line(error)}): "
                "pip install 'sink-circuits[static]', or save .html."
            ) from error
    else:
        raise ResultError(
            f"figures cannot be written as {path.suffix or 'a file without a suffix'!r}: use .html, .svg, .pdf or .png."
        )

    def write(temporary: Path) -> None:
        temporary.write_bytes(data)

    write_whole(path, write, overwrite=overwrite)


def save_library(path: str | Path, *, overwrite: bool = False) -> None:
    """Write plotly.js, for pages that share it. Raises ResultError when `path` exists or cannot be written."""
    from plotly.offline import get_plotlyjs

    write_whole(path, lambda temporary: temporary.write_text(get_plotlyjs(), "utf-8"), overwrite=overwrite)


def figure_json(figure: go.Figure) -> str:
    """A figure as JSON that may stand inside a <script> element: `<`, `>` and `&` are written as escapes."""
    arguments.instance(figure, "figure", go.Figure, "pass what plot() returns")
    return script_json(json.loads(figure.to_json()))


def script_json(value) -> str:
    """JSON for a <script type="application/json"> element: no character in it can end the element. NaN is refused."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _figure_page(figure: go.Figure, library: str | None) -> str:
    """The page; without `library` plotly.js stands in it."""
    from plotly.offline import get_plotlyjs

    shared = "" if library is None else html.escape(library)
    # 'self' is the page's own server; of pages opened from a disk browsers compare the scheme.
    own = "" if library is None else " 'self' file:"
    script = f"<script>{get_plotlyjs()}</script>" if library is None else f'<script src="{shared}"></script>'
    waiting = f"This figure is drawn by {shared}, which was written with it and is not there." if shared else ""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; script-src 'unsafe-inline'{own}; "
        "style-src 'unsafe-inline'; img-src data: blob:\"><title>figure</title></head>"
        f'<body style="margin:0 auto;max-width:860px"><div id="figure">{waiting}</div>{script}'
        f'<script type="application/json" id="data">{figure_json(figure)}</script>'
        '<script>const f = JSON.parse(document.getElementById("data").textContent), place = document.getElementById("figure");'
        f"if (window.Plotly) {{ place.replaceChildren(); Plotly.newPlot(place, f.data, f.layout, {json.dumps(CONFIG)}); }}"
        "</script></body></html>"
    )
