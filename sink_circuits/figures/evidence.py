"""Figures of evidence: controls beside an effect, nested paths, mass accounts, claims. No model is run here.

What is compared stands on the vertical axis by name, its number on the horizontal one, with its interval: names of any
length stay legible on a phone.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sink_circuits import arguments
from sink_circuits.attribution import Attribution
from sink_circuits.claims import HYPOTHESES, Claims
from sink_circuits.controlled import Controlled
from sink_circuits.effects import Effect
from sink_circuits.errors import InputError
from sink_circuits.figures.look import (
    BLUE,
    GREEN,
    INK,
    MUTED,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    axis,
    bars,
    finish,
    interval_trace,
    layer_ticks,
    layers_of,
    model_of,
    named,
    nones,
    safe,
    whose,
)
from sink_circuits.mass import MassAccount
from sink_circuits.paths import PathEffect
from sink_circuits.statistics import bootstrap_over_prompts
from sink_circuits.sweep_results import SweepResult

LOOKS = (
    (VERMILLION, "circle", "solid"), (BLUE, "square", "dash"), (GREEN, "diamond", "dot"), (ORANGE, "triangle-up", "dashdot"),
    (PURPLE, "cross", "longdash"), (SKY, "x", "longdashdot"), (INK, "star", "solid"),
)  # fmt: skip
"""Colour, marker and dash of the members of a figure, told apart by each of the three."""
LEFT = 132
"""Pixels at the left for the names of the rows."""
LABEL_LENGTH = 20
"""Characters of a name beside a row that leave a phone's width to the numbers."""
STEP_NAMES = {
    "residual": "residual stream alone",
    "own components": "own later attention and MLPs",
    "other positions": "left over: other positions",
}
PATH_NAMES = {"residual": "residual stream alone", "own stream": "own stream", "total": "total"}
HOLD_NAMES = {"k": "keys", "q": "queries", "v": "values"}
HELD = ", norm scales held"
"""Ends the name of a path in which the scales of the norms are held at their clean values."""
UNITS = {
    "aligned": "cosine",
    "dose": "rank corr.",
    "lifetime": "rank corr.",
    "weakens": "rank corr.",
    "levels recur": "pairs",
}
"""Units of the hypotheses that are not in nats of log-odds."""
HOLDS = {
    "yes": ("holds", BLUE, "circle"), "no": ("fails", VERMILLION, "x"), "small": ("small", PURPLE, "diamond"),
    "open": ("open", MUTED, "circle-open"),
}  # fmt: skip


# Controls.


def controls_figure(controlled, outcome: str = "log_odds") -> go.Figure:
    """The effect at the sinks beside that of every control, and below their difference with its interval.

    Means over the prompts that have both (`Controlled.compare`). The random perturbations are drawn one by one, and the
    rank of the effect among them is named. Controls that matched no sink are left out and named in the note. Raises
    InputError for an outcome that was not measured, or when no control matched.
    """
    arguments.instance(controlled, "controlled", Controlled, "pass what with_controls returns")
    table = controlled.compare(outcome)
    there = table[table["n_sinks"] > 0]
    if not len(there):
        if controlled.data[f"effect_{outcome}"].isnull().all():
            raise InputError(
                f"no sink has a defined effect on {outcome!r}: too few queries come after them; give longer texts."
            )
        raise InputError("no control matched any of these sinks: there is nothing to draw; `matches` says why.")
    edits = list(dict.fromkeys(there["edit"]))
    of = [f"{safe(str(edit))}: " if len(edits) > 1 else "" for edit in edits]
    titles = [
        f"{name}{what}"
        for name in of
        for what in ("effect at the sinks, and the control's", "effect less the control's")
    ]
    figure = _panels(titles, [int((there["edit"] == edit).sum()) for edit in edits for _ in range(2)])
    for index, edit in enumerate(edits):
        own = there[there["edit"] == edit].reset_index(drop=True)
        labels = [_control_label(row, controlled.data.sizes["draw"]) for row in own.to_dict("records")]
        draws = _draws(controlled, edit, outcome)
        for row, what in ((2 * index + 1, "effect"), (2 * index + 2, "difference")):
            _name_rows(figure, row, labels)
            if what == "difference":
                trace = _points(own, what, labels, "difference", INK, "diamond").update(showlegend=False)
                figure.add_trace(trace, row=row, col=1)
                continue
            at_random = own.index[own["control"] == "random perturbation"]
            if len(at_random) and len(draws):
                # Above and below the row in turns, so that near ones stay apart.
                y = int(at_random[0]) + 0.13 * (np.arange(len(draws)) % 3 - 1)
                dots = _marks(draws, y, "random", SKY, "line-ns-open", f"draw %{{y}}, {axis(outcome)}")
                dots.text, dots.marker.size = [f"draw {i}" for i in range(len(draws))], 12
                figure.add_trace(
                    dots.update(hovertemplate="%{text}: %{x:.3g}<extra></extra>", showlegend=index == 0), row=row, col=1
                )
            for name, column, colour, symbol in (
                ("control", "control_effect", BLUE, "square-open"),
                ("sinks", "effect", VERMILLION, "circle"),
            ):
                values = own[column].to_numpy(dtype=float)
                trace = _marks(values, np.arange(len(own)), name, colour, symbol, "%{text}")
                figure.add_trace(trace.update(text=labels, showlegend=index == 0), row=row, col=1)
            figure.update_xaxes(title_text=f"change, {axis(outcome)}", row=row, col=1)
        figure.update_xaxes(title_text=f"difference, {axis(outcome)}", row=2 * index + 2, col=1)
    missing = [str(name) for name in table.loc[table["n_sinks"] == 0, "control"].unique()]
    left = f" No match for: {', '.join(missing)}." if missing else ""
    text = (
        f"{whose(controlled)}; {layers_of(controlled)} edited, mean over heads and the layers that read the sink. "
        f"{bars(there)} p: sign flips over prompts (in brackets the smallest so many allow).{left}"
    )
    n_rows = sum(len(there[there["edit"] == edit]) for edit in edits)
    title = f"Controls: {named(outcome)}"
    return _finished(figure, title, text, height=190 * len(edits) + 2 * 44 * n_rows, legend_rows=2)


def _draws(controlled, edit, outcome: str) -> np.ndarray:
    """The mean over prompts of every random perturbation's effect, over the sinks that `compare` takes."""
    from sink_circuits.statistics import prompt_means

    effects = controlled.data[f"effect_{outcome}"].sel(edit=edit).to_numpy()
    random = controlled.data[f"random_{outcome}"].sel(edit=edit).transpose("sink", "draw").to_numpy()
    both = np.isfinite(effects) & np.isfinite(random).any(axis=1) if random.shape[1] else np.zeros(len(effects), bool)
    if not both.any():
        return np.empty(0)
    prompts = controlled.table["prompt"][both]
    return np.array([float(prompt_means(draw, prompts).mean()) for draw in random[both].T])


def _control_label(row: dict, n_draws: int) -> str:
    name = str(row["control"])
    if name == "random perturbation" and np.isfinite(row["rank"]):
        said = f"rank {row['rank']:.0f} of {n_draws + 1}"
    elif np.isfinite(row["p"]):
        said = f"p = {row['p']:.2g} ({row['smallest_p']:.2g})"
    else:
        said = f"{row['n_sinks']} sinks"
    return f"{safe(name)}<br>{said}"


# Paths.


def paths_figure(result, outcome: str = "log_odds") -> go.Figure:
    """The nested paths of an effect, what each adds to the one before, and what holding a part clean takes from the total.

    Means over prompts with intervals, from `PathEffect.summary`; beside each name its share of the total. The steps sum to
    the total: the last, what other positions do, is what the treated position's own stream leaves over. Raises
    InputError for an outcome that was not measured.
    """
    arguments.instance(result, "result", PathEffect, "pass what path_effects returns")
    result.effect(outcome)  # refuses what was not measured
    table = result.summary()
    table = table[table["outcome"] == outcome].reset_index(drop=True)
    held = table["part"].str.endswith(HELD)
    table.loc[held, "kind"] = "held path"
    table["part"] = table["part"].str.removesuffix(HELD)
    known: tuple[tuple[str, str, dict[str, str], str, str], ...] = (
        ("path", "nested paths", PATH_NAMES, VERMILLION, "circle"),
        ("held path", "the same with norm scales held (own scale)", PATH_NAMES, PURPLE, "cross"),
        ("step", "what each adds; together the total", STEP_NAMES, BLUE, "square"),
        ("hold", "what is lost of the total when held clean", {}, GREEN, "diamond"),
    )
    parts = [part for part in known if (table["kind"] == part[0]).any()]
    figure = _panels([title for _, title, *_ in parts], [int((table["kind"] == part[0]).sum()) for part in parts])
    for row, (kind, _, names, colour, symbol) in enumerate(parts, 1):
        own = table[table["kind"] == kind].reset_index(drop=True)
        labels = [_path_label(part, names, share) for part, share in zip(own["part"], own["share"], strict=True)]
        _name_rows(figure, row, labels)
        figure.add_trace(_points(own, "effect", labels, kind, colour, symbol).update(showlegend=False), row=row, col=1)
    # One scale for all, so that parts can be held against the total; effects with norm scales held can be many times as large.
    every = table[["effect", "low", "high"]].to_numpy(dtype=float)
    for row, (kind, *_) in enumerate(parts, 1):
        ends = every if kind == "held path" else every[(table["kind"] != "held path").to_numpy()]
        if np.isfinite(ends).any():
            low, high = min(0.0, float(np.nanmin(ends))), max(0.0, float(np.nanmax(ends)))
            margin = 0.05 * (high - low or 1)
            figure.update_xaxes(range=[low - margin, high + margin], row=row, col=1)
    figure.update_xaxes(title_text=f"change, {axis(outcome)}", row=len(parts), col=1)
    figure.update_xaxes(title_text=f"effect lost, {axis(outcome)}", row=len(parts), col=1) if parts[-1][
        0
    ] == "hold" else None
    text = (
        f"{whose(result)}; {layers_of(result)}, mean over heads and the layers that read the sink. {bars(table)} In brackets: share of the "
        f"total. Norm scales: {result.norm_scales}."
    )
    return _finished(figure, f"Paths of the effect on the {named(outcome)}", text, height=170 + 44 * len(table))


def _path_label(part: str, names: dict, share: float) -> str:
    name = names.get(part) or hold_name(part)
    said = f" ({share:.0%})" if np.isfinite(share) else ""
    return "<br>".join(safe(line) for line in textwrap.wrap(f"{name}{said}", LABEL_LENGTH))


def hold_name(label: str) -> str:
    """A hold's label with its letter in words."""
    label = arguments.text(label, "label")
    head, _, rest = label.partition(" ")
    return f"{HOLD_NAMES.get(head, head)} {rest}".strip()


# Mass accounts.


def mass_figure(account) -> go.Figure:
    """Where the attention mass went: change of every group of positions with its interval, and below it by layer.

    Above: `MassAccount.summary`, one mark per edit. Below, a panel per edit: means over prompts (of sinks and heads) of
    the change in every layer. In each layer, and above, the groups sum to 0. Groups that no model position is in are left out.
    """
    arguments.instance(account, "account", MassAccount, "pass what mass_account returns")
    table = account.summary()
    edits = list(account.data["edit"].values)
    change = account.change().mean("head")
    known = [str(g) for g in account.data["group"].values]
    groups = [g for g in known if _ever(account, g)] or known  # all, without marks, where nothing is defined
    table = table[table["group"].isin(groups)]
    names = [f"by layer{f', {safe(str(edit))}' if len(edits) > 1 else ''}" for edit in edits]
    n_by_layer = [len(groups)] * len(edits)
    figure = _panels(["over the layers that read the sink", *names], [len(groups), *n_by_layer])
    order = {group: i for i, group in enumerate(groups)}
    sums = []
    for index, edit in enumerate(edits):
        own = table[table["edit"] == edit].sort_values("group", key=lambda g: g.map(order)).reset_index(drop=True)
        colour, symbol, _ = LOOKS[index % len(LOOKS)]
        labels = [f"{row.group}: {row.clean:.3g} to {row.edited:.3g}" for row in own.itertuples()]
        trace = _points(own, "change", labels, safe(str(edit)), INK if len(edits) == 1 else colour, symbol)
        trace.y = (np.arange(len(own)) + 0.18 * (index - (len(edits) - 1) / 2)).tolist()
        if len(edits) == 1:  # as below: a colour and a marker for each group
            looks = LOOKS[: len(groups)]
            trace.marker.update(color=[look[0] for look in looks], symbol=[look[1] for look in looks])
        figure.add_trace(trace.update(showlegend=len(edits) > 1), row=1, col=1)
        sums.append(float(own["change"].sum(min_count=1)))
    _name_rows(figure, 1, [_group_label(table, group, edits) for group in groups])
    figure.update_xaxes(title_text="change of attention mass (share)", row=1, col=1)
    layers = account.data["layer"].to_numpy()
    for index, edit in enumerate(edits):
        for number, group in enumerate(groups):
            values = change.sel(edit=edit, group=group).transpose("sink", "layer").to_numpy().astype(float)
            estimates = [
                bootstrap_over_prompts(column, account.table["prompt"], name=f"mass/{group}/{edit}/{layer}")
                for layer, column in zip(layers, values.T, strict=True)
            ]
            rows = pd.DataFrame({"mean": e.mean, "low": e.low, "high": e.high} for e in estimates)
            colour, symbol, dash = LOOKS[number % len(LOOKS)]
            trace = interval_trace(layers, rows, "mean", colour, safe(group), "layer %{x}", dash=dash, marker=symbol)
            trace.update(showlegend=index == 0, legendgroup=group, line_width=1.8, marker_size=6, error_y_thickness=1)
            figure.add_trace(trace, row=2 + index, col=1)
        figure.add_hline(y=0, line={"color": MUTED, "width": 1}, row=2 + index, col=1)
        figure.update_yaxes(title_text="change of mass (share)", row=2 + index, col=1)
        figure.update_xaxes(row=2 + index, col=1, **layer_ticks(layers))
    figure.update_xaxes(title_text="layer whose attention is read", row=1 + len(edits), col=1)
    finite = [abs(value) for value in sums if np.isfinite(value)]
    told = (
        f"The changes sum to 0 (to {max(finite):.1g})."
        if finite
        else "Nothing is defined: the sinks stand too near their texts' ends."
    )
    text = f"{whose(account)}; {layers_of(account)} edited. Shares of each query's attention, clean to edited. {told} {bars(table)}"
    height = 210 + 40 * len(groups) + 290 * len(edits)
    return _finished(figure, "Where the attention mass went", text, height=height, legend_rows=3)


def _ever(account, group: str) -> bool:
    """Whether any position is in this group: a model without learned sinks has no mass there."""
    mass = account.data["clean_mass"].sel(group=group).to_numpy()
    return bool(
        (np.nan_to_num(mass) != 0).any() or (np.nan_to_num(account.data["mass"].sel(group=group).to_numpy()) != 0).any()
    )


def _group_label(table: pd.DataFrame, group: str, edits: Sequence) -> str:
    own = table[(table["group"] == group) & (table["edit"] == edits[0])].iloc[0]
    said = f"<br>{own['clean']:.3g} to {own['edited']:.3g}" if len(edits) == 1 and np.isfinite(own["clean"]) else ""
    return f"{safe(group)}{said}"


# Claims.


def claims_figure(claims) -> go.Figure:
    """Every declared hypothesis: estimate, interval, the margin within which it counts as none, and what the rule says.

    A panel per claim, with its verdict. Filled and hollow marks of different shape: holds, fails, small (there, but
    within the margin), open. Beside each name its unit and the predicted side of 0; those in brackets do not decide.
    """
    arguments.instance(claims, "claims", Claims, "pass what test_claims returns")
    margins = {h.name: h.margin for h in HYPOTHESES}
    verdicts = claims.verdicts[claims.verdicts["claim"].isin([str(c) for c in claims.table["claim"].unique()])]
    by_claim = [
        claims.table[claims.table["claim"].astype(str) == str(c)].reset_index(drop=True) for c in verdicts["claim"]
    ]
    titles = [_claim_title(row) for row in verdicts.to_dict("records")]
    figure = _panels(titles, [len(own) + 1 for own in by_claim])
    shown: set[str] = set()
    for row, own in enumerate(by_claim, 1):
        labels = [_hypothesis_label(one) for one in own.to_dict("records")]
        _name_rows(figure, row, labels)
        for y, name in enumerate(own["hypothesis"]):
            if margin := margins.get(name):
                band = go.Scatter(
                    x=[-margin, margin], y=[y, y], mode="lines", name="margin", legendgroup="margin", showlegend="margin" not in shown,
                    line={"color": "#cfcfcf", "width": 14}, hovertemplate=f"margin {margin:g}<extra></extra>",
                )  # fmt: skip
                figure.add_trace(band, row=row, col=1)
                shown.add("margin")
        for state, (name, colour, symbol) in HOLDS.items():
            mine = own[own["holds"] == state]
            if len(mine):
                trace = _points(mine, "estimate", [labels[i] for i in mine.index], name, colour, symbol)
                trace.y = mine.index.tolist()
                trace.text = [_told(one) for one in mine.to_dict("records")]
                figure.add_trace(trace.update(showlegend=state not in shown, legendgroup=state), row=row, col=1)
                shown.add(state)
    figure.update_xaxes(rangemode="tozero")
    figure.update_xaxes(title_text="estimate, in the unit named at the left", row=len(by_claim), col=1)
    n = int(claims.table["n_prompts"].max())
    text = (
        f"{model_of(claims)}, {n} confirmation prompts; forming layer {claims.forming_layer}, forming set "
        f"{', '.join(map(str, claims.forming_set))}. Bars: 95% interval over prompts. Grey: the margin "
        "within which an effect counts as none; small: shown, but within it. < 0 or > 0: what was predicted, in nats of "
        "log-odds or the unit named. In brackets: measured, does not decide."
    )
    return _finished(
        figure, "Claims put to the test", text, height=230 + 46 * (len(claims.table) + 2 * len(by_claim)), legend_rows=2
    )


def _claim_title(row: dict) -> str:
    lines = textwrap.wrap(f"{row['claim']}. {row['statement']}", 44)
    return "<br>".join(safe(line) for line in lines) + f"<br><b>{safe(str(row['verdict']))}</b>"


def _hypothesis_label(row: dict) -> str:
    side = {"less": "< 0", "greater": "> 0"}.get(row["predicted"], "")
    name = row["hypothesis"] if row["decides"] else f"({row['hypothesis']})"
    lines = [*textwrap.wrap(name, LABEL_LENGTH), f"{UNITS.get(row['hypothesis'], 'nats')} {side}"]
    return "<br>".join(safe(line) for line in lines)


def _told(row: dict) -> str:
    ends = f" [{row['low']:.3g}, {row['high']:.3g}]" if np.isfinite(row["low"]) else ""
    lines = textwrap.wrap(str(row["statement"]), LABEL_LENGTH * 2)
    return (
        "<br>".join(safe(line) for line in lines) + f"<br>{row['estimate']:.3g}{ends}, p = {row['p_holm']:.2g} (Holm)"
    )


# Many edits, attributions, sweeps.


def edits_figure(effect, outcome: str = "score") -> go.Figure:
    """The effect of every edit with its interval, one below the other: for more edits than lines can be told apart.

    Means over prompts of the effect over the lifetime (`Effect.summary`). Raises InputError for an outcome that was not measured.
    """
    arguments.instance(effect, "effect", Effect, "pass what an experiment returns")
    effect.over_lifetime(outcome)  # refuses what is no outcome
    table = effect.summary()
    table = table[table["outcome"] == outcome].reset_index(drop=True)
    labels = [safe(str(edit)) for edit in table["edit"]]
    figure = _panels(["over the layers that read the sink"], [len(table)])
    _name_rows(figure, 1, labels)
    figure.add_trace(_points(table, "effect", labels, "effect", VERMILLION, "circle").update(showlegend=False))
    figure.update_xaxes(title_text=f"change, {axis(outcome)}")
    text = f"{whose(effect)}; {layers_of(effect)} edited. {bars(table)}"
    return _finished(
        figure, f"Effect of every edit on the {named(outcome)}", text, height=120 + 22 * max(4, len(table))
    )


def attribution_figure(result) -> go.Figure:
    """Attributed beside exact effects: above by layer, means over prompts with intervals; below every sink and layer.

    On the dotted line the attribution is what an exact removal gives.
    """
    arguments.instance(result, "result", Attribution, "pass what attribute returns")
    defined = np.flatnonzero(np.isfinite(result.data["attribution"]).any("sink").to_numpy())
    layers = result.data["layer"].to_numpy()
    if len(defined):
        layers = layers[: defined[-1] + 1]  # no later layer reads a sink
    figure = make_subplots(
        rows=2, cols=1, vertical_spacing=0.16, row_heights=[0.5, 0.5],
        subplot_titles=["by layer of the MLP", "every sink and layer (dotted: equal)"],
    )  # fmt: skip
    outcome, prompts = str(result.manifest.settings.get("outcome", "log_odds")), result.table["prompt"]
    for name, label, colour, dash, marker in (
        ("exact", "exact removal", BLUE, "solid", "circle"), ("attribution", "attributed", VERMILLION, "dash", "square"),
    ):  # fmt: skip
        values = result.data[name].transpose("sink", "layer").to_numpy().astype(float)[:, : len(layers)]
        estimates = [
            bootstrap_over_prompts(own, prompts, name=f"attribution/{name}/{layer}")
            for layer, own in zip(layers, values.T, strict=True)
        ]
        rows = pd.DataFrame({"mean": e.mean, "low": e.low, "high": e.high, "n_prompts": e.n} for e in estimates)
        trace = interval_trace(layers, rows, "mean", colour, label, "layer %{x}", dash=dash, marker=marker)
        figure.add_trace(trace, row=1, col=1)
    exact, attributed = (
        result.data[name].transpose("sink", "layer").to_numpy().astype(float)[:, : len(layers)].ravel()
        for name in ("exact", "attribution")
    )
    dots = go.Scatter(
        x=nones(exact), y=nones(attributed), mode="markers", showlegend=False, name="sink and layer",
        marker={"size": 6, "color": INK, "symbol": "circle-open"}, text=[f"layer {layer}" for layer in layers] * len(result.table),
        hovertemplate="%{text}: exact %{x:.3g}, attributed %{y:.3g}<extra></extra>",
    )  # fmt: skip
    figure.add_trace(dots, row=2, col=1)
    both = np.isfinite(exact) & np.isfinite(attributed)
    if both.any():
        ends = [float(f(exact[both])) for f in (np.min, np.max)]
        line = go.Scatter(
            x=ends,
            y=ends,
            mode="lines",
            showlegend=False,
            hoverinfo="skip",
            line={"color": MUTED, "width": 1, "dash": "dot"},
        )
        figure.add_trace(line, row=2, col=1)
    figure.add_hline(y=0, line={"color": MUTED, "width": 1}, row=1, col=1)
    figure.update_xaxes(title_text="layer", row=1, col=1, **layer_ticks(layers))
    figure.update_yaxes(title_text=f"change, {axis(outcome)}", row=1, col=1)
    figure.update_xaxes(title_text=f"exact effect, {axis(outcome)}", row=2, col=1)
    figure.update_yaxes(title_text="attributed effect", row=2, col=1)
    mean = float(result.agreement.table["rank_correlation"].mean())
    method = str(result.manifest.settings.get("method", "")).replace("_", " ")
    text = f"{whose(result)}; {method}. {bars(rows)} Rank correlation over layers: {mean:.2f} (mean over sinks)."
    return finish(figure, f"Attributed and exact effects on the {named(outcome)}", text, height=620, bottom=56)


def sweep_figure(result, outcome: str = "log_odds") -> go.Figure:
    """Effects of a sweep: a panel per model and intervention, layers on the horizontal axis, a line with intervals per factor.

    Means over prompts (`SweepResult.summary`); the factor 1 of "rescale" is the clean model and is left out. Raises InputError
    for an outcome that was not measured, or when nothing is done yet.
    """
    arguments.instance(result, "result", SweepResult, "pass what sweep returns")
    table = result.summary([outcome])
    table = table[((table["factor"] != 1) | (table["intervention"] != "rescale")) & table["effect"].notna()]
    if not len(table):
        raise InputError(f"no cell of this sweep has a defined effect on {outcome!r} yet: run the sweep on.")
    panels = list(dict.fromkeys(zip(table["model"], table["intervention"], strict=True)))
    titles = [safe(f"{str(model).rstrip('/').rsplit('/', 1)[-1]}, {intervention}") for model, intervention in panels]
    figure = make_subplots(
        rows=len(panels), cols=1, subplot_titles=titles, vertical_spacing=min(0.16, 0.4 / len(panels))
    )
    factors = sorted(table["factor"].unique())
    shown: set[float] = set()
    for row, (model, intervention) in enumerate(panels, 1):
        own = table[(table["model"] == model) & (table["intervention"] == intervention)]
        layers = list(dict.fromkeys(own["layers"]))
        for number, factor in enumerate(factors):
            mine = own[own["factor"] == factor]
            if not len(mine):
                continue
            colour, marker, dash = LOOKS[number % len(LOOKS)]
            trace = interval_trace(
                [safe(one) for one in mine["layers"]],
                mine,
                "effect",
                colour,
                f"factor {factor:g}",
                "layer %{x}",
                dash=dash,
                marker=marker,
            )
            figure.add_trace(trace.update(showlegend=factor not in shown, legendgroup=str(factor)), row=row, col=1)
            shown.add(factor)
        figure.add_hline(y=0, line={"color": MUTED, "width": 1}, row=row, col=1)
        figure.update_xaxes(type="category", categoryorder="array", categoryarray=layers, row=row, col=1)
        figure.update_yaxes(title_text=f"change, {axis(outcome)}", row=row, col=1)
    figure.update_xaxes(title_text="edited layer (joined by +: a joint set)", row=len(panels), col=1)
    text = f"{len(result.cells)} cells, {int((result.cells['state'] == 'done').sum())} done. {bars(table)}"
    return finish(figure, f"Sweep: effect on the {named(outcome)}", text, height=140 + 270 * len(panels), bottom=56)


# What the figures share.


def _panels(titles: Sequence[str], n_rows: Sequence[int]) -> go.Figure:
    """Panels one below the other, each as high as it has rows."""
    figure = make_subplots(
        rows=len(titles), cols=1, subplot_titles=list(titles), row_heights=list(n_rows),
        vertical_spacing=min(0.16, 0.42 / len(titles)) if len(titles) > 1 else 0,
    )  # fmt: skip
    return figure


def _finished(figure: go.Figure, title: str, text: str, *, height: int, legend_rows: int = 1) -> go.Figure:
    finish(figure, title, text, height=height, bottom=56, legend_rows=legend_rows)
    figure.update_layout(margin_l=LEFT)
    for annotation in figure.layout.annotations:
        if annotation.yref == "paper":
            annotation.update(xshift=10 - LEFT)  # the names of rows take a third of a phone: titles start left of them
    return figure


def _name_rows(figure: go.Figure, row: int, labels: Sequence[str]) -> None:
    """Names on the vertical axis, the first at the top; a line at 0."""
    line = {"color": MUTED, "width": 1.3}
    figure.add_vline(x=0, line=line, row=row, col=1, layer="below", exclude_empty_subplots=False)
    figure.update_yaxes(
        tickvals=list(range(len(labels))), ticktext=list(labels), range=[len(labels) - 0.4, -0.6], showgrid=True, tickfont_size=11,
        row=row, col=1,
    )  # fmt: skip


def _points(rows: pd.DataFrame, column: str, labels: Sequence[str], name: str, colour: str, symbol: str) -> go.Scatter:
    """Estimates in `column` as marks with bars from `low` to `high`, one row each."""
    middle, ends = rows[column].to_numpy(dtype=float), rows[["low", "high"]].to_numpy(dtype=float)
    trace = _marks(middle, np.arange(len(rows)), name, colour, symbol, "%{text}")
    trace.text = list(labels)
    trace.error_x = {
        "type": "data", "symmetric": False, "array": nones(ends[:, 1] - middle), "arrayminus": nones(middle - ends[:, 0]),
        "thickness": 1.6, "width": 4, "color": colour,
    }  # fmt: skip
    trace.hovertemplate = f"%{{text}}<br>%{{x:.3g}}<extra>{name}</extra>"
    return trace


def _marks(x: np.ndarray, y: np.ndarray, name: str, colour: str, symbol: str, where: str) -> go.Scatter:
    return go.Scatter(
        x=nones(np.asarray(x, dtype=float)), y=np.asarray(y).tolist(), mode="markers", name=name,
        marker={"size": 9, "symbol": symbol, "color": colour, "line": {"width": 1.6 if "open" in symbol else 0, "color": colour}},
        hovertemplate=f"{where}: %{{x:.3g}}<extra>{name}</extra>",
    )  # fmt: skip
