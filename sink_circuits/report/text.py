"""What the page says in words and numbers: question, answers, limits; written from the results by fixed rules.

A direction is named only where the interval excludes 0 and there are prompts enough to say so.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import numpy as np

from sink_circuits.errors import InputError

MIN_PROMPTS = 6
"""Prompts needed to name a direction: n prompts of one sign come about by chance with 2 / 2^n, below 5% from 6 on: no
test over fewer decides a direction, whatever their interval."""


def question(sinks, effects: Sequence, others: Collection[str] = ()) -> list[str]:
    """What was asked, a sentence per experiment, and how it is answered. `others`: as in `limits`."""
    model = model_name(sinks)
    asked = {
        "layer_map": f"Which MLPs of {model} form its attention sinks?",
        "dose_response": f"Does the amount that an MLP of {model} writes decide how much attention a sink draws?",
        "ablate": f"Do the attention sinks of {model} fall when an MLP's contribution is taken away?",
        "ablate_neurons": f"Do the attention sinks of {model} hang on single neurons of an MLP?",
    }
    own = "What do edits of an MLP's contribution (“{}”) do to the attention sinks of {}?"  # a user's experiment

    def ask(effect) -> str:
        named = own_intervention(effect) if effect.kind in ("ablate", "dose_response") else ""
        return own.format(named or effect.kind, model) if named or effect.kind not in asked else asked[effect.kind]

    asks = list(dict.fromkeys(map(ask, effects)))
    more = {
        "claims": f"Do the claims about secondary sinks hold in {model}?",
        "paths": f"By which paths does the removal of an MLP's contribution reach the attention sinks of {model}?",
        "mass": f"Where does the attention go that a sink of {model} loses?",
        "sweep": "Which layers and factors move the attention sinks?",
        "controls": f"Would any other edit do the same to the attention sinks of {model}?",
    }
    asks += [text for kind, text in more.items() if kind in others and (kind != "controls" or not asks)]
    asks += [f"How is an attention sink of {model} made, read and erased?"] if "anatomy" in others else []
    if not asks:
        return [
            f"Which tokens of these prompts are attention sinks in {model}?",
            "No question of cause is answered by a number here.",
        ]
    how = (
        "Each answer comes from editing what an MLP adds at a sink's own position and comparing the edited run with the clean run."
        if effects or set(others) - {"anatomy"}
        else "Nothing was edited: what components write and heads read is observed."
    )
    return [asks[0], *(ask.replace(f" of {model}", "") for ask in asks[1:]), how]


def found(sinks) -> str:
    """How many sinks of which kinds were found."""
    n_prompts, counts = len(sinks.prompts), kind_counts(sinks)
    if not counts:
        return f"In {count(n_prompts, 'prompt')}, no sink was found."
    kinds = join([f"{n} {kind}" for kind, n in counts.items()])
    return (
        f"In {count(n_prompts, 'prompt')}, {kinds} {'sinks were' if sum(counts.values()) != 1 else 'sink was'} found."
    )


def sentences(effect) -> list[str]:
    summary = effect.summary()
    treated = who(effect)
    rows = {
        outcome: summary[summary["outcome"] == outcome].reset_index(drop=True)
        for outcome in summary["outcome"].unique()
    }
    if effect.kind == "layer_map":
        odds = rows["log_odds"]
        if odds["effect"].isna().all():
            return [
                f"The layer map on {treated} has no defined effect: the sinks stand too near the end of their texts."
            ]
        least = odds.loc[odds["effect"].idxmin()]
        edit = number_or_text(least["edit"])
        how = effect.manifest.settings.get("intervention", "edited")
        done, without = ("removed", "without it") if how == "zero" else (f"edited ({how})", "with it edited")
        out = [
            f"Of {len(odds)} MLPs {done} one at a time on {treated}, MLP {edit} has the most negative mean effect: "
            f"{without} their attention "
            f"log-odds {moved(least, 'nats', plural=True)}. The interval is not corrected for picking one layer of "
            f"{len(odds)}."
        ]
        score = rows["score"].loc[rows["score"]["edit"] == least["edit"]].iloc[0]
        out.append(f"Their mean score goes from {number(score['clean'])} to {number(score['edited'])}.")
        try:
            forming = effect.forming().value_counts()
            out.append(
                "Sink by sink, the most negative effect is that of "
                + join([f"MLP {layer} for {count(int(n), 'sink')}" for layer, n in forming.items()])
                + "."
            )
        except InputError:
            out.append("Not every sink has a defined effect.")
        return out
    if effect.kind == "ablate_neurons":
        return _neurons(effect, rows["log_odds"], treated)
    where = f"the contribution of {_layers(effect)} on {treated}"
    if effect.kind == "dose_response":
        odds = rows["log_odds"].sort_values("edit")
        if odds["effect"].isna().all():
            return [f"The dose-response on {treated} has no defined effect."]
        diffs = np.diff(odds["effect"].to_numpy())
        named = own_intervention(effect)
        dose, done = ("dose", f"Editing by “{named}”") if named else ("factor", "Rescaling")
        ends = odds if named else odds[odds["edit"] != 1]  # a rescaling by 1 is the clean model
        if not len(ends):
            return [f"{done} {where}: only the factor 1 was run, which is the clean model."]
        said = [
            f"at {dose} {row['edit']:g} their attention log-odds {moved(row, 'nats', plural=True)}"
            for _, row in ends.iloc[[0, -1]].drop_duplicates("edit").iterrows()
        ]
        out = [f"{done} {where}: {'; '.join(said)}."]
        if len(odds) > 2 and np.isfinite(diffs).all():
            if (diffs > 0).all():
                out.append(
                    f"The mean rises with every step of the {dose}, by {number(diffs[0])} at the first step and "
                    f"{number(diffs[-1])} at the last."
                )
            else:
                out.append(f"The mean does not rise with every step of the {dose}.")
    else:
        out = []
        for edit in rows["log_odds"]["edit"]:
            row = rows["log_odds"].loc[rows["log_odds"]["edit"] == edit].iloc[0]
            verb = {"zero": "Removing", "mean": "Replacing by its mean"}.get(str(edit), f"Edit “{edit}” of")
            out.append(f"{verb} {where}: their attention log-odds {moved(row, 'nats', plural=True)}.")
            score = rows["score"].loc[rows["score"]["edit"] == edit].iloc[0]
            out.append(f"Their mean score goes from {number(score['clean'])} to {number(score['edited'])}.")
            primary = rows["primary_score"].loc[rows["primary_score"]["edit"] == edit].iloc[0]
            if math.isfinite(primary["effect"]) and not (effect.table["kind"] == "primary").all():
                out.append(f"In the same layers the primary sink's score {moved(primary)}.")
    return out


def _neurons(effect, odds, treated: str) -> list[str]:
    """The named neurons against as many random ones of the same MLP, however many draws there are."""
    from sink_circuits.anatomy import against_random

    named, found = odds[odds["edit"] == "named"].iloc[0], against_random(effect).iloc[0]
    out = [f"Removing the named neurons on {treated}: their attention log-odds {moved(named, 'nats', plural=True)}."]
    if math.isfinite(found["random"]):
        random, difference = (number(found[name], signed=True) for name in ("random", "difference"))
        draws, ends = count(int(found["n_draws"]), "draw"), f" {interval(found)}".rstrip()
        out.append(
            f"As many random neurons of the same MLPs ({draws}) change them by {random}; the difference is {difference}{ends}."
        )
    return out


def moved(row, unit: str = "", *, plural: bool = False) -> str:
    """What an outcome did; a direction is named only when enough prompts give an interval that excludes 0."""
    s, unit = "" if plural else "s", f" {unit}" if unit else ""
    if not math.isfinite(row["effect"]):
        return f"{'have' if plural else 'has'} no defined effect (too few later queries)"
    change = f"{number(row['effect'], signed=True)} {interval(row)}".strip() + f"{unit} ({basis(row)})"
    if not math.isfinite(row["low"]) or row["n_prompts"] < MIN_PROMPTS:
        return f"differ{s} by {change}"
    if row["low"] <= 0 <= row["high"]:
        return f"change{s} by {change}, an interval that includes 0, so that the direction is not decided"
    size = f"{number(abs(row['effect']))} {interval(row, absolute=True)}{unit}"
    return f"{'fall' if row['effect'] < 0 else 'rise'}{s} by {size} ({basis(row)})"


def interval(row, *, absolute: bool = False) -> str:
    if not math.isfinite(row["low"]):
        return ""
    ends = sorted((abs(row["low"]), abs(row["high"]))) if absolute else (row["low"], row["high"])
    return f"[{number(ends[0], signed=not absolute)}, {number(ends[1], signed=not absolute)}]"


def basis(row) -> str:
    n = int(row["n_prompts"])
    if n < 2:
        return f"{count(n, 'prompt')}, not enough for an interval"
    few = "" if n >= MIN_PROMPTS else ", too few to decide a direction"
    return f"95% interval over {n} prompts{few}"


def _few(n: int) -> str:
    """What so few prompts do to an interval; measured in docs/statistics.md."""
    if n < 2:
        return " One has none."
    if n < MIN_PROMPTS:
        return " Intervals over so few are too narrow (two or three prompts: no more than their range)."
    return " Those of skewed effects are a little too narrow with so few." if n < 10 else ""


def limits(sinks, effects: Sequence, others: Collection[str] = ()) -> list[str]:
    """What the results do not show, by what was and was not done. `others`: kinds of results beside the effects."""
    lines = []
    kinds = {effect.kind for effect in effects}
    n = max((int(effect.table["prompt"].nunique()) for effect in effects), default=len(sinks.prompts))
    is_causal = bool(effects) or bool(set(others) - {"anatomy"})
    if not is_causal:
        lines.append(
            "Nothing was intervened on. Geometry and attention scores describe sinks; they do not say what makes them."
        )
    if any(_single_layer(effect) for effect in effects):
        lines.append(
            "One MLP was edited at a time. MLPs that stand in for each other are missed or understated this way: "
            "where two can each form the sink, "
            "removing one leaves the other. Only joint edits (layers=[…]) can show that."
        )
    if "layer_map" in kinds:
        lines.append(
            "The map looks at many layers; its intervals are for each layer by itself and are not corrected for "
            "having looked at all of them. "
            "A layer picked from the map should be confirmed on other prompts."
        )
    if any(_picks_layers(effect) for effect in effects):
        lines.append(
            "Each sink's forming MLP is the layer with the most negative effect on that sink. Where dose-response and "
            "ablation treat the prompts that it was picked on, they show that edit in detail and are no second "
            "confirmation of it, and its effect tends to be overstated."
        )
    if is_causal:
        lines.append(
            f"Intervals are over prompts, {n} here: they say how the result would vary over prompts like these, not "
            "over models, kinds of text or "
            "languages." + _few(n)
        )
        told = (
            "Only the section on paths tells the two apart."
            if "paths" in others
            else "The two are not told apart here."
        )
        lines.append(
            "The effect is total: everything above the edit runs anew, so that the change may pass through the "
            f"treated position's own stream or through other tokens that have attended to it. {told}"
        )
        together = any(effect.manifest.settings.get("together") for effect in effects)
        if together:
            lines.append(
                "All sinks of a prompt were edited in one run in at least one experiment, so that their effects are "
                "mixed there."
            )
        elif effects:
            lines.append("One sink was edited per run. What several removals do together may differ from their sum.")
        if "controls" in others:
            lines.append(
                "Controls repeat one experiment, the one that stands in their figure, and not every one on this page. They are "
                "matched one by one: a token nearby, another layer. Sinks without a match are left out of that row."
            )
        elif "claims" not in others and kinds <= {"layer_map", "dose_response", "ablate"}:
            lines.append(
                "No controls are on this page: other positions, other tokens and random directions of equal norm would "
                "show how specific the effect is. "
                "A removal also changes the norm that later layers divide by."
            )
    if "claims" in others:
        lines.append(
            "Verdicts follow a rule fixed before the run (docs/claims.md) and hold for this model, these kinds of sink and prompts like "
            "these; a claim that is not decided is neither true nor false."
        )
    if "attribution" in others:
        lines.append(
            "Attributions are slopes, not removals: where they disagree with exact runs, the exact runs are right."
        )
    if "anatomy" in others:
        lines.append(
            "The anatomy observes. Direct writes, neurons and attention say what stands where, not what the sink hangs on; the experiments "
            "say that. Shares are along one direction, and the circuit is that of one sink."
        )
    if any(effect.kind == "dose_response" and not own_intervention(effect) for effect in effects):
        lines.append(
            "A factor changes the contribution's norm and leaves its direction; factors above 1 lie outside what the "
            "model does by itself."
        )
    if str(sinks.manifest.what).endswith("official"):
        lines.append(
            "Sinks were found by the published procedure, which looks only at layers after the primary's greatest rise."
        )
    else:
        lines.append(
            "Which tokens count as sinks depends on the thresholds below. Attention took no part in finding them, so "
            "a sink may draw little."
        )
    return lines


def own_intervention(effect) -> str:
    """The name of a user's own intervention; empty for the built-in ones."""
    labels = effect.data["edit"].values
    alone = str(labels[0]) if effect.kind == "ablate" and len(labels) == 1 else ""  # the edit has its name there
    name = str(effect.manifest.settings.get("intervention", alone))
    return "" if name in ("", "rescale", "zero", "mean") else name


def _single_layer(effect) -> bool:
    return effect.kind == "layer_map" or "," not in str(effect.manifest.settings.get("layers", ","))


def _picks_layers(effect) -> bool:
    return effect.manifest.settings.get("layers") == "forming"


def _layers(effect) -> str:
    layers = str(effect.manifest.settings.get("layers", "")).strip("[]() ")
    if layers == "forming":
        return "each sink's own forming MLP"
    return (
        f"MLPs {join(layers.split(', '))} together"
        if "," in layers
        else f"MLP {layers}"
        if layers
        else "the edited MLPs"
    )


def who(effect) -> str:
    kinds = effect.table["kind"].unique()
    kind = f"{kinds[0]} " if len(kinds) == 1 else ""
    return f"{count(len(effect.table), f'{kind}sink')} in {count(effect.table['prompt'].nunique(), 'prompt')}"


def model_name(result) -> str:
    return str(result.manifest.model).rstrip("/").rsplit("/", 1)[-1] or "this model"


def kind_counts(sinks) -> dict[str, int]:
    return {str(kind): int(n) for kind, n in sinks.table["kind"].value_counts().items()}


def count(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"


def join(parts: Sequence[str]) -> str:
    parts = list(parts)
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def number(value, signed: bool = False) -> str:
    """Three significant digits; a true minus sign; a dash for what is not defined."""
    if value is None or not math.isfinite(value):
        return "–"
    text = f"{value:+#.3g}" if signed else f"{value:#.3g}"
    if "e" in text:
        mantissa, exponent = text.split("e")
        text = f"{value:,.0f}" if 1e3 <= abs(value) < 1e7 else f"{mantissa}×10^{int(exponent)}"
    return "0" if value == 0 else text.rstrip(".").replace("-", "−")


def number_or_text(value) -> str:
    try:
        return f"{float(value):g}"
    except (TypeError, ValueError):
        return str(value)
