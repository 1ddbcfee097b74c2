"""Attention patterns around sinks, head by head, by circuitsvis: data for a page, drawn when its box is opened."""

from __future__ import annotations

import html

import numpy as np

from sink_circuits import arguments
from sink_circuits.anatomy.patterns import Window
from sink_circuits.figures.files import script_json
from sink_circuits.figures.look import visible
from sink_circuits.figures.token_view import TOKEN_CSS, VIEW_SCRIPT, circuitsvis_source, target_of

ELSEWHERE = "elsewhere"
"""The first key: everything that lies outside the window."""


def attention_view(window, *, name: str = "patterns", library: bool = True) -> str:
    """Patterns of one text (`anatomy.AttentionPatterns.of`) as circuitsvis' attention heads, in HTML.

    `name` must differ between the views of a page. `library`: bring styles and scripts along (a notebook); a report does so
    once for all its views. Weights are rounded to three digits behind the point. circuitsvis draws tokens on a canvas: they
    cannot become markup.
    """
    arguments.instance(window, "window", Window, "pass AttentionPatterns.of(prompt)")
    arguments.text(name, "name")
    arguments.flag(library, "library")
    tokens, attention = window.tokens, np.nan_to_num(window.attention)
    labels = [ELSEWHERE, *(f"{row.pos}:{visible(str(row.token))}" for row in tokens.itertuples())]
    rest = np.nan_to_num(window.elsewhere)[:, :, None]
    rows = np.concatenate([rest, attention], axis=2)
    rows = np.concatenate([np.zeros_like(rows[:, :1]), rows], axis=1)  # "elsewhere" asks nothing
    bound = bound_of(window)
    props = {
        "attention": np.round(rows.astype(float), 3).tolist(), "tokens": labels,
        "attentionHeadNames": [f"L{layer}H{head}" for layer, head, _ in window.heads],
        "maxValue": bound, "minValue": -bound, "positiveColor": "#0072B2",
    }  # fmt: skip
    heads = ", ".join(f"L{layer}H{head} ({score:.2g})" for layer, head, score in window.heads)
    sinks = [f"{row.pos} ({row.kind})" for row in tokens.itertuples() if row.kind]
    note = (
        f"Heads with their sink score: {heads}. Rows ask, columns are attended to; each label is the position and its token, and the "
        f"number in brackets only counts labels. Sinks at {', '.join(sinks)}. “{ELSEWHERE}” is all that lies outside these "
        f"{len(tokens)} positions. Full colour: {bound:.2g} and more."
    )
    target, text = target_of(name), html.escape(visible(str(tokens["prompt"].iloc[0]), spaces=False))
    box = (
        f'<details class="cv"><summary>Attention patterns around the sinks of {text}, interactive (circuitsvis)</summary>'
        f'<p class="tok-note">{html.escape(note)}</p><div class="cv-box whole" id="{target}"></div>'
        f'<script type="application/json" class="cv-data" data-component="AttentionHeads" data-target="{target}">{script_json(props)}'
        "</script></details>"
    )
    if not library:
        return box
    return f"<style>{TOKEN_CSS}</style>{box}<script>{circuitsvis_source()}</script><script>{VIEW_SCRIPT}</script>"


def bound_of(window) -> float:
    """The weight of full colour: the largest on a key that is no primary sink. A primary would leave all others white."""
    others = ~window.tokens["kind"].isin(["primary", "bos_sink"]).to_numpy()
    below = np.tril(np.ones(window.attention.shape[1:], dtype=bool), -1)[:, others]
    given = window.attention[:, :, others][:, below]
    largest = float(np.nanmax(given)) if given.size and np.isfinite(given).any() else 1.0
    return round(min(1.0, max(largest, 0.01)), 3)
