"""The sections of the page: of each result its figures, the table of its numbers, and what it says in a sentence or two."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from sink_circuits import figures
from sink_circuits.anatomy.patterns import AttentionPatterns
from sink_circuits.anatomy.result import Anatomy
from sink_circuits.anatomy_of_one import OF_AN_MLP
from sink_circuits.attribution import Attribution
from sink_circuits.claims import Claims
from sink_circuits.controlled import Controlled
from sink_circuits.effects import Effect
from sink_circuits.errors import InputError
from sink_circuits.figures.look import title_of
from sink_circuits.mass import MassAccount
from sink_circuits.outcomes import BUILT_IN
from sink_circuits.paths import PathEffect
from sink_circuits.report.text import count, interval, join, number, number_or_text, own_intervention, sentences
from sink_circuits.sweep_results import SweepResult

CAUSES = {
    "layer_map": "Layer map: one MLP edited at a time",
    "dose_response": "Dose-response: the contribution rescaled",
    "ablate": "Ablation: the contribution taken away",
    "ablate_neurons": "Ablation of neurons: the named ones, and as many others",
}
OWN_CAUSES = {
    "dose_response": "Dose-response: the contribution edited by “{}”",
    "ablate": "Experiment: the contribution edited by “{}”",
}
"""Titles where the intervention is a user's own."""
OWN_CAPTIONS = {
    "dose_response": (
        "Read from left to right: the dose that the intervention was given. Thin lines are single sinks, the thick one is their mean with "
        "its interval. The dashed line is the clean model. The lower panel shows whether the primary sink gains what the treated one loses."
    ),
}
CAPTIONS = {
    "layer_map": (
        "Above: how far the outcome moves when the contribution of one MLP is edited at the sink's position; each point is one edited "
        "layer, 0 is no change. Below: the same change by the layer in which attention is read. Layers at or below the edited one cannot "
        "change and are grey. A forming MLP shows as a deep column of one colour that begins just above the diagonal."
    ),
    "dose_response": (
        "Read from left to right: the contribution of the MLP is multiplied by the factor on the axis, 0 removes it and 1 leaves the model "
        "as it is. Thin lines are single sinks, the thick one is their mean with its interval. A curve that rises and then levels off says "
        "that the amount matters up to the point where the norm layers divide it away. The lower panel shows whether the primary sink "
        "gains what the treated one loses."
    ),
    "ablate": (
        "Blue, solid, round: the clean model. Vermillion, dashed, square: the edited one. The two coincide up to the edited layer. Their "
        "intervals include the differences between prompts; the paired change, which is free of them, is in the table below."
    ),
    "many": "Each row is one edit. Where the rows are draws, the one that counts should stand apart from them.",
    "controls": (
        "Above: the effect at the sinks (filled) and the same edit where it should do nothing (hollow); thin strokes are single random "
        "perturbations. Below: the one less the other. A random perturbation of a contribution's own size tells how fragile the "
        "sink is to any change there; it is no evidence against the MLP."
    ),
    "paths": (
        "The paths are nested: the treated position's residual stream alone, its own later attention and MLPs as well, everything. "
        "What the last step adds came by other positions that had attended to it. Below: what is missing when keys, queries or values "
        "are held clean."
    ),
    "mass": "Every query's attention sums to 1: what one group of positions loses, others gain. The bars sum to 0, in every layer too.",
    "claims": "Estimates with their intervals against 0 and, in grey, the margin within which an effect counts as none.",
    "attribution": "Gradients are a filter: how far they tell what exact removals tell stands beside them.",
    "sweep": "Effects of every layer and factor of the sweep, means over prompts.",
    "circuit": (
        "Layers rise from the bottom. At the left who writes the sink's direction into its residual stream and who takes it out again, "
        "at the right the heads that attend to it. Direct writes are observed: that a component writes much does not say that the sink "
        "hangs on it."
    ),
    "mlp_stages": "Where in the MLP the sink begins to look like the primary: a cosine that rises from one stage to the next.",
    "writers": "What stands along the sink's direction, who put it there, and who takes it away at the end of its life.",
    "neurons": "A line that reaches 1 within few neurons says that few carry the write. Below: what the input looks like that fires them.",
    "norms_by_layer": "A sink's hidden state is long and its values are short: attention that goes there does little.",
    "levels": "Sinks that begin in the same layer and live equally long in many prompts are a level.",
    "score_by_lifetime": "Observed, not caused: the dose-response is the experiment.",
    "pca": "How the MLP answers one direction of its input at a time: a jump at one sign and scale is what a sink's input sets off.",
    "clustering": "Sinks against the same token where it is no sink; the silhouette says whether the separation is real.",
    "matrix_entropy": "Low entropy: few directions hold most of the hidden states' size, as when one token outweighs all others.",
    "attention_patterns": (
        "The heads that attend most to the sinks of one text. A sink is a column: later queries, whatever they are, give it weight. "
        "Positions are a window around the sinks; what queries give to all others is not drawn."
    ),
    "key_query_geometry": "Above the dotted line the sink's key wins: by its angle to the queries, by its norm, or by both.",
}  # fmt: skip
EDITS = {"layer_map": "edited layer", "dose_response": "factor"}
CONTROLS = {
    "same token": "the same edit at the same token where it is no sink",
    "same range": "the same edit at another ordinary token nearby",
    "norm matched": "the same edit at the ordinary token whose norm is nearest",
    "wrong layer": "at the sink, another layer's MLP",
    "attention output": "at the sink, what attention wrote, in the MLP's place",
    "random model": "the same edit in a model of random weights",
    "random perturbation": "at the sink, a change of the same size in random directions",
}
ANATOMY = {
    "mlp_stages": "Stages of the MLP",
    "writers": "Writers and erasers",
    "neurons": "Neurons",
    "norms_by_layer": "Norms by layer",
    "levels": "Levels",
    "score_by_lifetime": "Score and lifetime",
    "pca": "Principal components",
    "clustering": "Clustering",
    "matrix_entropy": "Matrix entropy",
    "key_query_geometry": "Keys and queries",
    "attention_patterns": "Attention patterns",
}
"""Sections of the anatomy in their order."""
BUILT_IN_NAMES = {one.name for one in BUILT_IN}
MAX_PATTERNS = 3
"""Texts whose attention patterns a page shows."""
TEXT, NAME, WIDE = "text", "text name", "text name wide"
"""Cells of text; of text that may be long; of sentences. All others are numbers."""


@dataclass(frozen=True)
class Table:
    """Numbers behind a section. `head`: (text, class of the column); `rows`: cells as text, the first names the row."""

    caption: str
    head: tuple[tuple[str, str], ...]
    rows: tuple[tuple[str, ...], ...]
    is_open: bool = False


@dataclass(frozen=True)
class Section:
    """One result on the page. `figures`: as `_drawn` gives them; `answer`: what it says, in a sentence or two; `views`: of circuitsvis."""

    id: str
    title: str
    caption: str
    figures: tuple[Mapping, ...]
    tables: tuple[Table, ...] = ()
    answer: str = ""
    views: tuple[Markup, ...] = ()

    @property
    def label(self) -> str:
        return self.title.partition(":")[0]


def causal_sections(results: Sequence) -> list[Section]:
    """A section per experiment, in the order in which they are given."""
    makers = (
        (Effect, _effect), (Controlled, _controls), (PathEffect, _paths), (MassAccount, _mass), (Claims, _claims),
        (Attribution, _attribution), (SweepResult, _sweep),
    )  # fmt: skip
    own: list[tuple] = [(maker, result) for result in results for kind, maker in makers if isinstance(result, kind)]
    controls = [result for result in results if isinstance(result, Controlled)]
    return [
        _effect(place, result, _of_these(controls, result)) if maker is _effect else maker(place, result)
        for place, (maker, result) in enumerate(own, 1)
    ]


def _of_these(controls: Sequence[Controlled], effect: Effect) -> Controlled | None:
    """The controls of this experiment's sinks, where there are any."""
    key = ["prompt", "pos", "l_start"]
    own = effect.table[key].to_numpy().tolist()
    return next((one for one in controls if one.table[key].to_numpy().tolist() == own), None)


def anatomy_sections(results: Sequence) -> list[Section]:
    """The circuit diagram of one sink, where its writers are among the results, and every result's own figure."""
    own = [result for result in results if isinstance(result, Anatomy)]
    by_kind: dict[str, Anatomy] = {}
    for result in own:
        by_kind.setdefault(result.kind, result)
    sections = [_circuit(by_kind)] if "writers" in by_kind else []
    order = list(ANATOMY)
    for index, result in enumerate(sorted(own, key=lambda one: order.index(one.kind) if one.kind in order else 99), 1):
        drawn = (_drawn(f"anatomy-{index}-figure", result.plot()),)
        title = ANATOMY.get(result.kind, result.kind)
        views = _views(index, result) if isinstance(result, AttentionPatterns) else ()
        said = [CAPTIONS.get(result.kind, ""), _not_forming(result, results) if result.kind in OF_AN_MLP else ""]
        caption = " ".join(sentence for sentence in said if sentence)
        sections.append(Section(f"anatomy-{index}", title, caption, drawn, views=views))
    return [one for one in sections if one is not None]


def _not_forming(result: Anatomy, results: Sequence) -> str:
    """Says so where the MLP that was looked into is not the one whose removal takes most from the sink, by the layer map."""
    key = ["prompt", "pos", "l_start"]
    forming: dict[tuple, int] = {}
    for mapped in (one for one in results if isinstance(one, Effect) and one.kind == "layer_map"):
        try:
            layers = mapped.forming()
        except InputError:  # a sink without a defined effect: the map's own section says so
            continue
        forming |= {
            tuple(sink): int(layer) for sink, layer in zip(mapped.table[key].to_numpy().tolist(), layers, strict=True)
        }
    own = zip(map(tuple, result.table[key].to_numpy().tolist()), map(int, result.data["layer"].to_numpy()), strict=True)
    pairs = sorted({(layer, forming[sink]) for sink, layer in own if layer != forming.get(sink, layer)})
    said = [
        f"MLP {layer}, which writes the sink, not MLP {removed}, whose removal takes most from it"
        for layer, removed in pairs
    ]
    return f"Shown is {join(said)}." if said else ""


def _views(index: int, result: AttentionPatterns) -> tuple[Markup, ...]:
    """The patterns of the first texts; the weights of each are about 100 kB."""
    return tuple(
        Markup(result.view(prompt, name=f"patterns-{index}-{number}", library=False))
        for number, prompt in enumerate(result.prompts[:MAX_PATTERNS])
    )


# One result each.


def _effect(index: int, effect: Effect, controls: Controlled | None) -> Section:
    outcomes = ["log_odds"] if effect.kind == "layer_map" else ["score", "log_odds"]
    own = [name for name in effect.outcomes if name not in BUILT_IN_NAMES]
    there = [*(name for name in outcomes if name in effect.outcomes), *own]

    def draw(outcome: str):
        if effect.kind == "layer_map" and outcome not in own:
            return figures.layer_map_figure(effect, outcome, controls)
        return figures.effect_figure(effect, outcome)

    is_long = effect.data.sizes["edit"] > figures.MAX_EDITS and effect.kind not in CAPTIONS
    summary, rows = effect.summary(), []
    for row in summary.to_dict(orient="records"):
        outcome = figures.NAMES.get(row["outcome"], row["outcome"])
        numbers = (number(row["clean"]), number(row["edited"]), number(row["effect"], signed=True), _ends(row))
        rows.append((number_or_text(row["edit"]), outcome, *numbers, _n(row)))
    edit = "dose" if effect.kind == "dose_response" and own_intervention(effect) else EDITS.get(effect.kind, "edit")
    head = ((edit, ""), ("outcome", NAME), ("clean", ""), ("edited", ""), ("effect", ""), ("95% interval", ""),
            ("prompts, sinks", ""))  # fmt: skip
    caption = "Mean over prompts of the mean over heads and the layers that read the sink above the edit; 95% bootstrap interval."
    title, said = (
        CAUSES.get(effect.kind, f"Experiment: {effect.kind}"),
        CAPTIONS.get("many" if is_long else effect.kind, CAPTIONS["ablate"]),
    )
    if effect.kind in OWN_CAUSES and (intervention := own_intervention(effect)):
        title, said = OWN_CAUSES[effect.kind].format(intervention), OWN_CAPTIONS.get(effect.kind, said)
    return Section(
        f"effect-{index}", title, said,
        tuple(_drawn(f"figure-{index}-{place if name in own else name}", draw(name)) for place, name in enumerate(there)),
        (Table(caption, head, tuple(rows)),), " ".join(sentences(effect)),
    )  # fmt: skip


def _controls(index: int, controls: Controlled) -> Section:
    reasons = controls.matches[controls.matches["reason"] != ""].groupby("control")["reason"].first()
    table, rows = controls.compare(), []
    several = table["edit"].nunique() > 1
    for row in table.to_dict(orient="records"):
        name = f"{row['edit']}: {row['control']}" if several else row["control"]
        p = f"{row['p']:.2g} ({row['smallest_p']:.2g})" if row["n_prompts"] else "–"
        left = str(row["n_unmatched"])
        changes = tuple(number(row[name], signed=True) for name in ("effect", "control_effect", "difference"))
        rows.append((name, *changes, _ends(row), p, _n(row), left))
    head = (("control", NAME), ("effect", ""), ("control's", ""), ("difference", ""), ("95% interval", ""),
            ("p (smallest)", ""), ("prompts, sinks", ""), ("without a match", ""))  # fmt: skip
    caption = (
        "In log-odds (nats), mean over heads and the layers that read the sink; difference: effect less the control's, over the prompts "
        "that have both, with its 95% bootstrap interval; p: sign flips over prompts, two-sided, and the smallest that so few allow. "
        f"Controls: {'; '.join(f'{name}, {CONTROLS[name]}' for name in dict.fromkeys(table['control']) if name in CONTROLS)}."
    )
    said = [f"{name}: {reason}" for name, reason in reasons.items() if (table["control"] == name).any()]
    caption += f" Without a match, for example: {'; '.join(said)}." if said else ""
    try:
        drawn: tuple = (_drawn(f"figure-{index}-controls", controls.plot()),)
    except InputError:  # no control matched, or no effect is defined: the answer says which
        drawn = ()
    there = table[(table["n_sinks"] > 0) & (table["edit"] == table["edit"].iloc[0])].to_dict(orient="records")
    told = [f"{row['control']} {number(row['difference'], signed=True)} {interval(row)}".strip() for row in there]
    undefined = controls.data["effect_log_odds"].isnull().all()
    none = (
        "The sinks stand too near the end of their texts for an effect."
        if undefined
        else "No control matched any of these sinks."
    )
    answer = f"Effect less the control's, in nats: {'; '.join(told)}." if told else none
    ranks = [row for row in there if np.isfinite(row["rank"])]
    if ranks:
        answer += f" Among {controls.data.sizes['draw']} random perturbations of the same size the effect has rank {ranks[0]['rank']:.0f}."
    title = "Controls: would any edit do?"
    return Section(
        f"controls-{index}",
        title,
        CAPTIONS["controls"],
        drawn,
        (Table(caption, head, tuple(rows), is_open=True),),
        answer,
    )


def _paths(index: int, paths: PathEffect) -> Section:
    table = paths.summary()
    rows = [
        (row["part"], row["kind"], figures.NAMES[row["outcome"]], number(row["effect"], signed=True), _ends(row),
         _percent(row["share"]), _n(row))
        for row in table.to_dict(orient="records")
    ]  # fmt: skip
    head = (
        ("part", NAME),
        ("kind", TEXT),
        ("outcome", NAME),
        ("effect", ""),
        ("95% interval", ""),
        ("share of total", ""),
        ("prompts, sinks", ""),
    )
    caption = "Path: the effect by it; step: what it adds to the one before; hold: what of the total is lost. Means over prompts."
    share = table[table["outcome"] == "log_odds"].set_index(["kind", "part"])["share"]
    answer = (
        f"Of the total effect on the log-odds {_percent(share['step', 'residual'])} goes by the residual stream alone, "
        f"{_percent(share['step', 'own components'])} by the treated position's own later attention and MLPs, and "
        f"{_percent(share['step', 'other positions'])} is left over to other positions."
    )
    if paths.holds:
        held = [f"{figures.hold_name(hold)} take {_percent(share['hold', hold])}" for hold in paths.holds]
        answer += f" Held clean, {join(held)} of it away."
    drawn = (_drawn(f"figure-{index}-paths", paths.plot("log_odds")),)
    return Section(
        f"paths-{index}",
        "Paths: by which way the effect comes",
        CAPTIONS["paths"],
        drawn,
        (Table(caption, head, tuple(rows)),),
        answer,
    )


def _mass(index: int, account: MassAccount) -> Section:
    table = account.summary()
    rows = tuple(
        (str(row["edit"]), row["group"], number(row["clean"]), number(row["edited"]), number(row["change"], signed=True),
         _ends(row), _n(row))
        for row in table.to_dict(orient="records")
    )  # fmt: skip
    head = (
        ("edit", TEXT),
        ("group", TEXT),
        ("clean", ""),
        ("edited", ""),
        ("change", ""),
        ("95% interval", ""),
        ("prompts, sinks", ""),
    )
    caption = (
        "Shares of the attention of the queries that can see the treated position; means over heads, over the layers that read it, "
        "over prompts."
    )
    own = table[table["edit"] == table["edit"].iloc[0]].dropna(subset="change")
    changes = own.reindex(own["change"].abs().sort_values(ascending=False).index).head(4).to_dict(orient="records")
    told = [f"{row['group']} {number(row['change'], signed=True)} {interval(row)}".strip() for row in changes]
    answer = (
        f"Change of the share of attention by group of positions: {'; '.join(told)}."
        if told
        else "No change is defined."
    )
    drawn = (_drawn(f"figure-{index}-mass", account.plot()),)
    return Section(
        f"mass-{index}",
        "Mass: where the attention went",
        CAPTIONS["mass"],
        drawn,
        (Table(caption, head, rows),),
        answer,
    )


def _claims(index: int, claims: Claims) -> Section:
    verdicts = tuple(
        (str(row["claim"]), row["statement"], row["verdict"], row["reason"])
        for row in claims.verdicts.to_dict(orient="records")
    )
    rows = tuple(
        (row["hypothesis"], row["statement"], number(row["estimate"], signed=True), _ends(row), number(row["p_holm"]), row["holds"],
         "yes" if row["decides"] else "no", _n(row))
        for row in claims.table.to_dict(orient="records")
    )  # fmt: skip
    tables = (
        Table(
            "Verdicts, by the rule that was fixed before the run.",
            (("claim", ""), ("statement", WIDE), ("verdict", TEXT), ("why", WIDE)), verdicts, is_open=True,
        ),
        Table(
            "Every hypothesis: mean over prompts with its 95% interval, p of the predicted side after Holm's correction.",
            (("hypothesis", NAME), ("the number", WIDE), ("estimate", ""), ("95% interval", ""), ("p", ""), ("holds", TEXT),
             ("decides", TEXT), ("prompts, sinks", "")), rows,
        ),
    )  # fmt: skip
    by_verdict = claims.verdicts.groupby("verdict", sort=False)["claim"].agg(list)
    told = [
        f"claim{'s' * (len(own) > 1)} {join([str(c) for c in own])} {verdict}" for verdict, own in by_verdict.items()
    ]
    answer = f"On {count(int(claims.table['n_prompts'].max()), 'confirmation prompt')}: {'; '.join(told)}."
    drawn = (_drawn(f"figure-{index}-claims", claims.plot()),)
    return Section(f"claims-{index}", "Claims: put to the test", CAPTIONS["claims"], drawn, tables, answer)


def _attribution(index: int, result: Attribution) -> Section:
    table = result.summary()
    rows = tuple(
        (f"{row['prompt']}, {row['pos']}", number(row["rank_correlation"]), number(row["recall"]), number(row["joint_effect"], signed=True),
         number(row["residual"], signed=True))
        for row in table.to_dict(orient="records")
    )  # fmt: skip
    head = (
        ("sink (prompt, position)", NAME),
        ("rank correlation", ""),
        ("recall of the largest", ""),
        ("joint removal", ""),
        ("left over", ""),
    )
    caption = "Per sink: agreement of attributed with exact effects over layers, and how far attributions add up to the joint removal."
    method, mean = str(result.manifest.settings.get("method", "")).replace("_", " "), table["rank_correlation"].mean()
    answer = (
        f"By {method} the layers' attributions rank as the exact removals do with a correlation of {number(mean)} "
        f"(Spearman, mean over {count(int(table['rank_correlation'].notna().sum()), 'sink')})."
    )
    drawn = (_drawn(f"figure-{index}-attribution", figures.attribution_figure(result)),)
    return Section(
        f"attribution-{index}",
        "Attribution: gradients beside exact runs",
        CAPTIONS["attribution"],
        drawn,
        (Table(caption, head, rows),),
        answer,
    )


def _sweep(index: int, sweep: SweepResult) -> Section:
    table = sweep.summary(["log_odds", "score"])
    rows = tuple(
        (_short(row["model"]), row["layers"], row["intervention"], number_or_text(row["factor"]), figures.NAMES[row["outcome"]],
         number(row["effect"], signed=True), _ends(row), _n(row))
        for row in table.to_dict(orient="records")
    )  # fmt: skip
    head = (("model", NAME), ("layers", TEXT), ("intervention", TEXT), ("factor", ""), ("outcome", NAME), ("effect", ""),
            ("95% interval", ""), ("prompts, sinks", ""))  # fmt: skip
    states = ", ".join(f"{n} {state}" for state, n in sweep.cells["state"].value_counts().items())
    answer = f"{count(len(sweep.cells), 'cell')}: {states}."
    own = table[
        (table["outcome"] == "log_odds")
        & ((table["factor"] != 1) | (table["intervention"] != "rescale"))
        & table["effect"].notna()
    ]
    if len(own):
        row = own.loc[own["effect"].abs().idxmax()]
        answer += (
            f" The largest mean effect on the log-odds is that of MLP {row['layers']} of {_short(row['model'])}, {row['intervention']}, "
            f"factor {row['factor']:g}: {number(row['effect'], signed=True)} {interval(row)}".rstrip()
            + " nats."
        )
    drawn = (_drawn(f"figure-{index}-sweep", figures.sweep_figure(sweep)),) if len(own) else ()
    caption = "Means over prompts of the mean over heads and over the layers that read the sink above the edit."
    return Section(
        f"sweep-{index}", "Sweep: layers and factors", CAPTIONS["sweep"], drawn, (Table(caption, head, rows),), answer
    )


def _circuit(by_kind: Mapping[str, Anatomy]) -> Section | None:
    writers, parts = by_kind["writers"], (by_kind.get("neurons"), by_kind.get("key_query_geometry"))
    sink = circuit_sink(by_kind)
    edges = figures.circuit_edges(writers, *parts, sink=sink)
    if not len(edges):
        return None
    own, answer = writers.table.iloc[sink], []
    for role, said in (
        ("writer", "{0} writes {1} of what stands along its direction"), ("neuron", "{0} carries {1} of the write of {3}"),
        ("eraser", "{0} takes away {1} of the peak"), ("reader", "{0} attends to it most, with {2} of its attention"),
    ):  # fmt: skip
        mine = edges[edges["role"] == role]
        if len(mine):
            edge = mine.loc[mine["weight"].abs().idxmax()]
            names = [str(edge[name]).replace(" mlp", "'s MLP") for name in ("component", "target")]
            answer.append(said.format(names[0], _percent(abs(edge["weight"])), number(edge["weight"]), names[1]))
    rows = tuple(
        (
            edge.component,
            edge.role,
            str(edge.layer),
            number(edge.weight) if edge.role == "reader" else _percent(edge.weight),
        )
        for edge in edges.itertuples()
    )
    head = (("component", TEXT), ("role", TEXT), ("layer", ""), ("weight", ""))
    caption = (
        "The measured weights. Writer: share of what stands after the sink's first layer; carrier, eraser: share of the peak; neuron: "
        "share of its MLP's write; reader: mean attention that the sink gets."
    )
    drawn = (_drawn("circuit-figure", figures.circuit_figure(writers, *parts, sink=sink)),)
    said = f"Of the sink at position {own['pos']} of {own['prompt']}: {'; '.join(answer)}." if answer else ""
    return Section("circuit", "Circuit: of one sink", CAPTIONS["circuit"], drawn, (Table(caption, head, rows),), said)


def circuit_sink(by_kind: Mapping[str, Anatomy]) -> int:
    """The row of the writers' table whose circuit is drawn: whose neurons and heads were measured too, no primary if possible."""
    table = by_kind["writers"].table
    keys = [tuple(row) for row in table[["prompt", "pos", "l_start"]].itertuples(index=False)]
    held = np.zeros(len(table), dtype=int)
    for kind in ("neurons", "key_query_geometry"):
        if kind in by_kind:
            others = set(by_kind[kind].table[["prompt", "pos", "l_start"]].itertuples(index=False, name=None))
            held += np.array([key in others for key in keys])
    return int(np.argmax(2 * held + (table["kind"] != "primary").to_numpy()))


# What the sections share.


def _drawn(name: str, figure) -> dict:
    heading, note = lift_title(figure)
    return {
        "id": name, "heading": heading, "note": note, "json": Markup(figures.figure_json(figure)), "height": figure.layout.height,
    }  # fmt: skip


def lift_title(figure) -> tuple[str, str]:
    """Take title and note out of a figure, as plain text: the page wraps them to its width, plotly wraps nothing.

    A figure's own lines are those of a phone (`figures.look.title_text`).
    """
    title = figure.layout.title.text or ""
    heading, note = title_of(figure)
    # What stays above the panels: the first panel's own title, and the legend where there is one.
    margin = max(32, figure.layout.margin.t - 46 - 16 * title.count("<br>"))
    figure.update_layout(title=None, height=figure.layout.height - figure.layout.margin.t + margin, margin_t=margin)
    return heading, note


def _ends(row: Mapping) -> str:
    return interval(row).replace("+", "") or "–"


def _n(row: Mapping) -> str:
    return f"{int(row['n_prompts'])}, {int(row['n_sinks'])}"


def _short(model: str) -> str:
    return str(model).rstrip("/").rsplit("/", 1)[-1]


def _percent(value: float) -> str:
    return f"{value:.0%}".replace("-", "−") if np.isfinite(value) else "–"
