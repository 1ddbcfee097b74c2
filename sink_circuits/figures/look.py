"""How figures look: colours, axes, titles and labels that all of them share.

Colours are Okabe-Ito's, told apart by colour-blind readers, and lines differ in dash and marker too, so that a page
printed in grey can be read. Panels are stacked, never side by side: they stay legible on a phone.
"""

from __future__ import annotations

import html
import re
import textwrap
import unicodedata

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from sink_circuits import arguments

BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9"
INK, MUTED, GRID, IMPOSSIBLE = "#222222", "#5a5a5a", "#e4e4e4", "#c9c9c9"
DIVERGING = [[0.0, "#00456d"], [0.25, "#4a9ccb"], [0.5, "#f7f7f7"], [0.75, "#e8955a"], [1.0, "#8a3c00"]]
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, 'Liberation Sans', sans-serif"
LINE_LENGTH = 50
"""Characters of a figure's title that fit a phone of 360 px."""
PICTURE_WIDTH, WIDE_LENGTH = 760, 108
"""Pixels of a picture's width, and the characters that fit it."""
LEGEND_ROW = 22
"""Pixels of a legend's row."""

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
"""plotly's own options, for every page."""


def nones(values: np.ndarray) -> list:
    """Nested lists with None for NaN: JSON has no NaN, and plotly draws a gap for None."""
    return np.where(np.isfinite(values), values.astype(object), None).tolist()


def interval_trace(
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
        y=nones(middle),
        mode="lines+markers",
        name=name,
        text=shown,
        line={"color": colour, "width": 2.4, "dash": dash},
        marker={"size": 7, "symbol": marker, "color": colour},
        error_y={
            "type": "data",
            "symmetric": False,
            "array": nones(ends[:, 1] - middle),
            "arrayminus": nones(middle - ends[:, 0]),
            "thickness": 1.5,
            "width": 4,
            "color": colour,
        },
        hovertemplate=f"{where}<br>%{{text}}<extra>{name}</extra>",
    )


def layer_ticks(layers) -> dict:
    layers = np.asarray(layers)
    step = next(s for s in (1, 2, 4, 5, 10, 20, 50) if (layers.max() - layers.min()) / s <= 12 or s == 50)
    return {"tickmode": "linear", "tick0": 0, "dtick": step}


def title_text(title: str, text: str, length: int = LINE_LENGTH) -> str:
    """A figure's title and the note below it as plotly's markup, in lines of at most so many characters."""
    # A page takes the lines apart again (`title_of`): none may end within a word.
    heading, note = (
        "<br>".join(safe(line) for line in textwrap.wrap(one, most, break_on_hyphens=False))
        for one, most in ((title, round(0.76 * length)), (text, length))
    )
    # The font's own size sets the distance of all lines.
    return f"<b><span style='font-size:15px'>{heading}</span></b><br><span style='color:{MUTED}'>{note}</span>"


def title_of(figure: go.Figure) -> tuple[str, str]:
    """Title and note of a figure as plain text without line breaks: what `title_text` was made of."""
    parts = (figure.layout.title.text or "").partition("</b>")[::2]
    heading, note = (html.unescape(re.sub("<[^>]*>", "", part.replace("<br>", " "))).strip() for part in parts)
    return heading, note


def widened(figure: go.Figure, length: int = WIDE_LENGTH) -> go.Figure:
    """The figure with lines of its title as long as a picture of known width allows, and as much less height.

    Figures that `finish` did not make come back as they are.
    """
    before = figure.layout.title.text or ""
    if not before.startswith("<b><span") or figure.layout.height is None:
        return figure
    after = title_text(*title_of(figure), length)
    less = 16 * (before.count("<br>") - after.count("<br>")) + LEGEND_ROW * _spare_rows(figure)
    wide = go.Figure(figure)
    return wide.update_layout(title_text=after, height=wide.layout.height - less, margin_t=wide.layout.margin.t - less)


def _spare_rows(figure: go.Figure, width: int = PICTURE_WIDTH) -> int:
    """Rows that the figure keeps free for its legend and a picture so wide does not fill."""
    kept = (figure.layout.meta or {}).get("legend_rows", 1) if figure.layout.showlegend else 1
    widths = [44 + 7 * len(trace.name or "") for trace in figure.data if trace.showlegend is not False]
    room = width - figure.layout.margin.l - figure.layout.margin.r
    # plotly sets entries in columns of the widest's width where one row does not hold them.
    needed = 1 if sum(widths) <= room else -(-len(widths) // max(1, int(room // max(widths))))
    return max(0, kept - needed)


def finish(
    figure: go.Figure, title: str, text: str, *, height: int, bottom: int, legend_rows: int = 1
) -> go.Figure:  # fmt: skip
    """Looks that all figures share. `legend_rows`: rows that the legend takes on a phone; a wide picture needs fewer (`widened`)."""
    title = title_text(title, text)
    n_heading, n_lines = (part.count("<br>") for part in title.split("</b>"))
    has_legend = sum(trace.showlegend is not False and trace.type == "scatter" for trace in figure.data) > 1
    panels = [one for one in figure.layout.annotations if one.yref == "paper"]
    more = 15 * panels[0].text.count("<br>") if panels else 0  # a first panel whose title has several lines
    further = LEGEND_ROW * (legend_rows - 1) if has_legend else 0
    top = 40 + 16 * (n_heading + n_lines) + (54 if has_legend else 30) + more + further
    figure.update_layout(
        template="none",
        autosize=True,
        height=height + 16 * n_lines + more + further,
        meta={"legend_rows": legend_rows},
        paper_bgcolor="#ffffff",
        plot_bgcolor="#ffffff",
        hovermode="closest",
        dragmode=False,  # on a phone a finger on the figure scrolls the page
        font={"family": FONT, "size": 12, "color": INK},
        margin={"l": 58, "r": 14, "t": top, "b": bottom},
        showlegend=has_legend,
        title={
            "text": title,
            "font": {"size": 12},
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
        figure.update_layout(legend_y=1 + (24 + more) / (figure.layout.height - top - bottom))
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
    for annotation in panels:  # their titles: small, at the left
        annotation.update(font={"size": 12, "color": INK}, x=0, xanchor="left", yanchor="bottom", align="left")
    return figure


def safe(text: str) -> str:
    """Text for plotly, which reads some HTML in labels."""
    return html.escape(visible(text, spaces=False), quote=False)


def axis(outcome: str) -> str:
    return AXIS_LABELS.get(outcome) or safe(outcome)  # a user's own outcome has its name alone


def named(outcome: str) -> str:
    """For titles and notes, which `title_text` makes safe."""
    return NAMES.get(outcome) or outcome


def panel(outcome: str) -> str:
    return "primary sink" if outcome.startswith("primary") else "treated positions"


def first_line(value) -> str:
    return (str(value).strip().splitlines() or [""])[0][:160]


def model_of(result) -> str:
    """The model's name without the folder or organisation before it."""
    return str(result.manifest.model).rstrip("/").rsplit("/", 1)[-1]


def whose(effect) -> str:
    kinds = effect.table["kind"].unique()
    kind = f"{kinds[0]} " if len(kinds) == 1 else ""
    n, prompts = len(effect.table), effect.table["prompt"].nunique()
    return f"{model_of(effect)}: {n} {kind}sink{'s' * (n != 1)}, {prompts} prompt{'s' * (prompts != 1)}"


def layers_of(effect) -> str:
    settings = effect.manifest.settings
    if getattr(effect, "kind", "") == "ablate_neurons":
        n, share = settings.get("n"), settings.get("share")
        which = f"the {n} with the largest writes" if n else f"those that carry {share:.0%} of the write"
        return f"neurons (named: {which}; random: as many others)"
    layers = str(settings.get("layers", "")).strip("[]()")
    if layers == "forming":
        return "each sink's forming MLP"
    return f"MLP{'s' * (',' in layers)} {layers}" if layers else "MLPs"


def bars(rows: pd.DataFrame, what: str = "Bars") -> str:
    """What the bars are: of how many prompts, the least and the most, where rows differ. A row of one prompt has none."""
    n = rows.loc[rows["n_prompts"] > 1, "n_prompts"].astype(int)
    if not len(n):
        return "Too few prompts for an interval."
    return f"{what}: 95% interval over {n.max() if n.min() == n.max() else f'{n.min()} to {n.max()}'} prompts."


def sink_name(row) -> str:
    return safe(f"{row['prompt']}, position {row['pos']}, {visible(str(row['token']))}")


def visible(text: str, *, spaces: bool = True) -> str:
    """A token's text with what cannot be seen made visible: spaces as `·`, newlines as `↵`, controls by number.

    `spaces`: off for running text, whose spaces, tabs and newlines stay. Direction marks, zero-width and other format
    characters would reorder or hide text; they are shown as ⟨U+202E⟩.
    """
    arguments.instance(text, "text", str, "give a string")
    arguments.flag(spaces, "spaces")
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
