"""One prompt's tokens coloured by sink score: a strip readable without scripts, and circuitsvis in it."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd

from sink_circuits import arguments
from sink_circuits.errors import InputError
from sink_circuits.figures.files import script_json
from sink_circuits.figures.look import visible

KIND_CLASSES = {
    "primary": "primary",
    "secondary": "secondary",
    "primary-like": "primary-like",
    "bos_sink": "primary",
    "noise": "noise",
}
N_VIEW_LAYERS = 5


def sink_tokens_view(
    tokens_text: Sequence[str], scores_by_layer, sinks: pd.DataFrame, *, name: str = "tokens", library: bool = True
) -> str:
    """One prompt's tokens coloured by sink score, as HTML: a strip readable without scripts, and circuitsvis in it.

    `scores_by_layer`: [layer, key] or [layer, head, key] (then the mean over heads), NaN where undefined.
    `sinks`: this prompt's rows of a sink table; the index gives each its number. `name` must differ between the views
    of a page. `library`: bring styles and scripts along (a notebook); a report does so once for all its views.
    Raises InputError when lengths differ or a sink lies outside the text.
    """
    tokens_text = arguments.several(tokens_text, "tokens_text")
    for token in tokens_text:
        if not isinstance(token, str):
            raise InputError(f"token {arguments.shown(token)} is no text: pass each token as a string.")
    arguments.instance(sinks, "sinks", pd.DataFrame, "pass this prompt's rows of a sink table")
    if lacking := [column for column in ("pos", "kind", "l_start", "l_end") if column not in sinks]:
        raise InputError(f"sinks lack the column {lacking[0]!r}: pass this prompt's rows of a sink table.")
    arguments.text(name, "name")
    arguments.flag(library, "library")
    scores = _layer_key(scores_by_layer)
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
    scores = arguments.numbers(scores, "scores", axes=None, infinite=True)
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
    target = target_of(name)
    return (
        f'<details class="cv"><summary>The same by layer, interactive (circuitsvis)</summary><p class="tok-note">Choose a layer above the '
        f"text; hover over a token for its scores. One scale for all layers; the bound can be changed.{note}</p>"
        f'<div class="cv-box" id="{target}"></div><script type="application/json" class="cv-data" data-target="{target}">'
        f"{script_json(props)}</script></details>"
    )


def target_of(name: str) -> str:
    """The id of the element that circuitsvis draws into."""
    return "cv-" + "".join(f"{ord(c):x}" if not (c.isascii() and c.isalnum()) else c for c in name)


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
    ready.then(() => CircuitsVis.render(data.dataset.target, CircuitsVis[data.dataset.component || "ColoredTokensMulti"],
      JSON.parse(data.textContent)));
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
.cv-box.whole{max-height:none}
.cv-box:empty{display:none}
@media print{.tok-strip{max-height:none;overflow:visible}.tok,.ramp{-webkit-print-color-adjust:exact;
print-color-adjust:exact}details.cv{display:none}}
"""
