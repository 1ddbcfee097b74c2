"""The five claims about secondary sinks (Wong et al., 2512.22213), put to the test by a rule that is fixed here.

The rule, before any run. Prompts are split by name: on the discovery prompts a layer map names the forming layer (the one
whose removal lowers log-odds most, on average over prompts) and the forming set; everything else is measured on the
confirmation prompts alone. Where a layer is declared instead, no prompt is needed to find it, and all are for
confirmation. Every hypothesis below is one number per sink, averaged per prompt, tested one-sided by sign flips over
prompts. Holm's correction runs over all hypotheses of the run, once for the predicted side and once against it.

- A hypothesis holds when its adjusted p is at most `ALPHA`. It fails when the opposite side's adjusted p is, or when the
  effect is shown to be within its margin of 0 (equivalence test, adjusted likewise). Where both it and its smallness are
  shown it is "small": there, but less than the margin.
- A claim is *supported* when all its deciding hypotheses hold, *contradicted* when one of them fails, else *not decided*.

Hypotheses that do not decide are measured and shown beside the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr

from sink_circuits import arguments, statistics
from sink_circuits.adapters import adapt
from sink_circuits.arguments import one_or_several, shown
from sink_circuits.clean_runs import run_clean
from sink_circuits.controlled import Controlled
from sink_circuits.controls import Intervention, with_controls
from sink_circuits.detection import Sinks, find_sinks, primary_direction
from sink_circuits.edits import Edit
from sink_circuits.effects import Effect
from sink_circuits.errors import InputError
from sink_circuits.experiments import FACTORS, check_layers, dose_response, layer_map
from sink_circuits.interventions import keep_direction, remove_direction, set_norm, swap_direction, zero
from sink_circuits.matching import match_positions
from sink_circuits.measurement import measure
from sink_circuits.prompts import Tokens, as_tokens
from sink_circuits.results import Manifest, read_result, write_result
from sink_circuits.studies import KINDS
from sink_circuits.transplants import stand_ins, sufficiency

ALPHA = 0.05
MARGIN = 0.5
"""Log-odds: a mean effect within this of 0 counts as none (odds change by less than a factor of 1.65)."""
COSINE = 0.5
"""A contribution points along the primary direction when its cosine with it is above this, on average."""
SET_SHARE = 0.25
"""The forming set: layers whose removal has at least this share of the forming layer's effect, at most `SET_LAYERS`."""
SET_LAYERS = 4
DISCOVERY_SHARE = 0.34
PER_PROMPT = 2
"""Sinks treated per prompt: those of the largest norm ratio. The prompt is the unit; more of them buy little."""
N_RANDOM = 8
N_PERMUTATIONS = 9999

CLAIMS = {
    1: "Specific MLPs form the sinks: necessary, sufficient, specific",
    2: "Their contributions point along the primary direction",
    3: "The norm of the contribution determines score and lifetime",
    4: "The primary sink weakens where these sinks stand, and recovers without them",
    5: "Levels (l_start, lifetime) recur over prompts more than chance",
}


@dataclass(frozen=True)
class Hypothesis:
    """One declared hypothesis: the number named by `statement` is above 0 ("greater") or below ("less")."""

    claim: int
    name: str
    statement: str
    alternative: str
    decides: bool = True
    margin: float | None = MARGIN


HYPOTHESES = (
    Hypothesis(1, "necessary", "log-odds effect of zeroing the forming MLP, less that at an ordinary token nearby", "less"),
    Hypothesis(
        1, "specific layer", "effect of zeroing the forming MLP, less that of zeroing a layer outside the forming set", "less"
    ),
    Hypothesis(
        1, "sufficient", "log-odds effect of writing the forming set's contributions at a token that is no sink, less that of writing "
        "random directions of the same norms", "greater",
    ),
    Hypothesis(
        1, "more than at the same token", "effect of zeroing, less that at the same token where it is no sink", "less", decides=False
    ),
    Hypothesis(
        1, "more than a disturbance", "effect of zeroing, less that of random perturbations of equal norm", "less", decides=False
    ),
    Hypothesis(2, "aligned", f"cosine of the contribution with the primary direction, less {COSINE}", "greater", margin=None),
    Hypothesis(
        2, "alignment matters", "effect of removing the primary direction from the contribution, less that of keeping it alone", "less"
    ),
    Hypothesis(3, "dose", "rank correlation of factor and log-odds within a sink", "greater", margin=None),
    Hypothesis(
        3, "norm alone", "effect of giving the contribution an ordinary token's norm, direction kept, less that at that token", "less"
    ),
    Hypothesis(3, "lifetime", "rank correlation of factor and lifetime within a sink", "greater", margin=None),
    Hypothesis(
        3, "norm more than direction", "effect of an ordinary token's norm, less that of its direction", "less", decides=False
    ),
    Hypothesis(
        4, "recovers", "effect on the primary's log-odds of removing a prompt's sinks together, less that at ordinary tokens", "greater",
        margin=0.05,
    ),
    Hypothesis(4, "weakens", "rank correlation of factor and the primary's log-odds", "less", margin=None),
    Hypothesis(
        5, "levels recur", "pairs of sinks of different prompts with one level, less what permuted lifetimes give", "greater", margin=None
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Claims:
    """Verdicts and what they rest on.

    `verdicts`: one row per claim (claim, statement, verdict, reason). `table`: one row per hypothesis: claim,
    hypothesis, statement, decides, predicted ("greater"/"less"), estimate, low, high, p, p_holm, p_against (Holm),
    p_none (equivalence, Holm), holds, n_prompts, n_sinks.
    `controls`: the effect of zeroing the forming MLP beside every matched control (`Controlled.compare`). `forming_layer`,
    `forming_set`: declared, or from the discovery prompts. `data`: every hypothesis' number per sink [hypothesis, sink].
    """

    verdicts: pd.DataFrame
    table: pd.DataFrame
    forming_layer: int
    forming_set: tuple[int, ...]
    data: xr.Dataset
    sinks: pd.DataFrame
    controls: pd.DataFrame
    manifest: Manifest

    def to_dataframe(self) -> pd.DataFrame:
        return self.table.copy()

    def plot(self):
        """Estimate, interval, margin and verdict of every hypothesis (plotly)."""
        from sink_circuits import figures

        return figures.claims_figure(self)

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """One safetensors file, whole or not at all. Raises ResultError when `path` exists or cannot be written."""
        write_result(
            path, "claims", self.data, self.table, self.manifest, overwrite=overwrite, verdicts=self.verdicts, sinks=self.sinks,
            controls=self.controls, forming_layer=self.forming_layer, forming_set=list(self.forming_set),
        )  # fmt: skip

    @staticmethod
    def load(path: str | Path) -> Claims:
        """Read what `save` wrote. Raises ResultError for any other file."""
        data, table, manifest, meta = read_result(path, "claims", "a result of claims")
        verdicts, sinks, controls = (pd.DataFrame(meta[name]) for name in ("verdicts", "sinks", "controls"))
        return Claims(
            verdicts, table, meta["forming_layer"], tuple(meta["forming_set"]), data, sinks, controls, manifest
        )

    def __repr__(self) -> str:
        shown = self.table[
            ["claim", "hypothesis", "decides", "estimate", "low", "high", "p_holm", "holds", "n_prompts", "n_sinks"]
        ]
        how = self.manifest.settings["layer_from"]
        compared = ["control", "effect", "control_effect", "difference", "low", "high", "p", "n_prompts", "rank"]
        controls = self.controls[compared].to_string(index=False, float_format=lambda x: f"{x:.3g}")
        return (
            f"Forming layer {self.forming_layer}, forming set {list(self.forming_set)} ({how})\n"
            f"{shown.to_string(index=False, float_format=lambda x: f'{x:.3g}')}\n\n"
            f"Zeroing MLP {self.forming_layer} beside its controls, log-odds\n{controls}\n\n{self.verdicts.to_string(index=False)}"
        )


def test_claims(
    model, tokens, sinks: Sinks | None = None, *, kinds: Sequence[str] = ("secondary", "primary-like"), layer: int | None = None,
    layers: Sequence[int] | None = None, n_random: int = N_RANDOM, per_prompt: int = PER_PROMPT, path: str = "auto",
    verbose: bool = True,
) -> Claims:  # fmt: skip
    """Put the five claims to the test on these prompts, by the rule at the head of this module.

    `sinks`: all sinks of these prompts (found here when None; those of a trained model, to treat a randomly initialised
    one at the same positions; claim 5, which is about where sinks stand, is then not judged). `kinds`: which of them to
    treat. `layer`: the forming layer, and `layers` the forming set (of it alone when None), declared before these prompts were
    looked at; nothing is discovered then. `n_random`: random perturbations per sink. Raises InputError when there are no
    sinks of these kinds, on both sides of the split where there is one.
    """
    check_counts(per_prompt, n_random)
    if sinks is not None:
        arguments.instance(sinks, "sinks", Sinks, "pass what find_sinks returns, or leave them out")
    kinds = arguments.several(kinds, "kinds")
    for kind in kinds:
        arguments.one_of(kind, "kind", KINDS)
    declared = declared_layers(layer, layers)
    check_layers(declared, adapt(model).n_layers)
    tokens = as_tokens(model, tokens)
    found = find_sinks(model, tokens, path=path, verbose=verbose) if sinks is None else sinks
    names = tuple(tokens.names)
    split = (
        statistics.Split((), names) if declared
        else statistics.discovery_confirmation_split(names, "claims", share=DISCOVERY_SHARE)
    )  # fmt: skip
    chosen = strongest(found, kinds, per_prompt)
    options: dict[str, Any] = {"path": path, "verbose": verbose}
    discovery, confirmation = (_of_prompts(chosen, side) for side in (split.discovery, split.confirmation))
    if not len(confirmation) or not (len(discovery) or declared):
        needed = "one is needed" if declared else "both sides of the split need one"
        raise InputError(
            f"{chosen.table['prompt'].nunique()} of {len(tokens)} prompts hold sinks of kind {' or '.join(kinds)} with later tokens enough "
            f"for a score, and {needed}: give more prompts, or other kinds."
        )
    if layer is not None:
        forming_layer, forming_set = int(layer), tuple(sorted(int(one) for one in declared))
    else:
        last = int(discovery.table["l_end"].max())
        forming_layer, forming_set = forming_layers(
            layer_map(model, tokens, discovery, layers=range(last + 1), **options)
        )
    own = confirmation.table.reset_index(drop=True)
    treated = Sinks(own.assign(origin=np.arange(len(own))), confirmation.prompts, confirmation.manifest)
    values, controls = _measure_all(model, tokens, treated, found, forming_layer, forming_set, n_random, options)
    at_home = found.manifest.weights == adapt(model).weights_hash
    levels = _of_prompts(found.select(*kinds), split.confirmation if at_home else ()).table
    table = judge(values, treated.table["prompt"], levels_test(levels))
    measured = [h.name for h in HYPOTHESES if h.name in values]
    data = xr.Dataset(
        {"value": (("hypothesis", "sink"), np.stack([values[name] for name in measured]))},
        {"hypothesis": measured, "sink": np.arange(len(own))},
    )
    manifest = Manifest.of(
        adapt(model), tokens, what="claims", path=path, kinds=list(kinds), n_random=n_random, per_prompt=per_prompt, alpha=ALPHA,
        margin=MARGIN, layer_from="declared" if declared else "discovered", forming_layer=forming_layer, forming_set=list(forming_set),
        discovery=list(split.discovery), confirmation=list(split.confirmation), found=dict(found.manifest.settings),
    )  # fmt: skip
    return Claims(verdicts_of(table), table, forming_layer, forming_set, data, own, controls, manifest)


test_claims.__test__ = False  # type: ignore[attr-defined]  # its name makes pytest think that it is one


def declared_layers(layer: int | None, layers: Sequence[int] | None) -> tuple[int, ...]:
    """The declared forming set, () where none is declared. Raises InputError for a set without its layer."""
    layers = None if layers is None else one_or_several(layers)
    if layer is None and layers is not None:
        raise InputError(f"layers {list(layers)} declare a forming set without its forming layer: give layer= too.")
    if layer is None:
        return ()
    declared = (layer,) if layers is None else tuple(layers)
    check_layers(declared, arguments.MOST)
    if layer not in declared or len(set(declared)) < len(declared):
        raise InputError(
            f"layers {list(declared)}: a forming set names each layer once, and the forming layer {layer} too."
        )
    return declared


def check_counts(per_prompt: int, n_random: int) -> None:
    if any(not arguments.is_whole(n) or n < 1 for n in (per_prompt, n_random)):
        raise InputError(f"per_prompt = {shown(per_prompt)}, n_random = {shown(n_random)}: each at least 1.")


def strongest(found: Sinks, kinds: Sequence[str], per_prompt: int) -> Sinks:
    """At most `per_prompt` sinks of these kinds of each prompt, with a defined score: the largest norm ratios."""
    table = found.select(*kinds).table
    table = table[table["score"].notna()].sort_values("norm_ratio", ascending=False, kind="stable")
    table = table.groupby("prompt", sort=False).head(per_prompt).sort_index()
    return Sinks(table.reset_index(drop=True), found.prompts, found.manifest)


def forming_layers(mapped: Effect) -> tuple[int, tuple[int, ...]]:
    """(forming layer, forming set) of a layer map: prompts' mean log-odds effect, up to each sink's l_end."""
    effects = mapped.over_lifetime("log_odds").to_numpy().copy()
    layers = mapped.data["edit"].to_numpy().astype(int)
    effects[layers[None] > mapped.table["l_end"].to_numpy()[:, None]] = np.nan
    table = statistics.prompt_table(effects, mapped.table["prompt"])
    mean = pd.DataFrame(table).mean().to_numpy()  # NaN, without a warning, for layers above every sink's last
    best = int(np.nanargmin(mean))
    if not mean[best] < 0:
        return int(layers[best]), (int(layers[best]),)
    members = [i for i in np.argsort(mean)[:SET_LAYERS] if mean[i] <= SET_SHARE * mean[best]]
    return int(layers[best]), tuple(sorted(int(layers[i]) for i in members))


@dataclass(frozen=True)
class _Donors:
    """What the interventions at one sink need of the clean run, at the forming layer."""

    direction: torch.Tensor
    ordinary: torch.Tensor
    cosine: float


@torch.no_grad()
def _donors(model, tokens: Tokens, table: pd.DataFrame, matches: pd.DataFrame, layer: int, path: str) -> list[_Donors]:
    nearby = matches[matches["control"] == "same range"].set_index("sink")["pos"]
    donors: dict[int, _Donors] = {}
    for name, ids in zip(tokens.names, tokens.ids, strict=True):
        rows = np.flatnonzero(table["prompt"] == name)
        if not len(rows):
            continue
        clean = run_clean(model, ids, path=path)
        for index in rows:
            pos, primary, other = (
                int(x) for x in (table["pos"].iloc[index], table["primary_pos"].iloc[index], nearby[index])
            )
            direction = primary_direction(clean, layer, primary)
            written = clean.contribution[layer, pos].float()
            ordinary = clean.contribution[layer, other if other >= 0 else min(pos + 1, len(ids) - 1)]
            donors[int(index)] = _Donors(
                direction, ordinary.clone(), torch.nn.functional.cosine_similarity(written, direction, dim=0).item()
            )
    return [donors[index] for index in range(len(table))]


def _measure_all(
    model, tokens: Tokens, treated: Sinks, found: Sinks, layer: int, layers: Sequence[int], n_random: int, options: dict
) -> tuple[dict[str, np.ndarray], pd.DataFrame]:
    """Every hypothesis' number, one per treated sink (NaN where it could not be measured), and zeroing beside its controls."""
    table = treated.table
    matches = match_positions(model, tokens, treated, found, path=options["path"])
    donors = _donors(model, tokens, table, matches, layer, options["path"])

    def donor(row: pd.Series) -> _Donors:
        return donors[int(row["origin"])]

    edits: dict[str, Intervention] = {
        "remove_direction": lambda one, row: remove_direction(one, int(row["pos"]), donor(row).direction),
        "keep_direction": lambda one, row: keep_direction(one, int(row["pos"]), donor(row).direction),
        "ordinary_direction": lambda one, row: swap_direction(one, int(row["pos"]), donor(row).ordinary[None]),
    }
    ordinary_norm: dict[str, Intervention] = {
        "ordinary_norm": lambda one, row: set_norm(one, int(row["pos"]), donor(row).ordinary.float().norm().item())
    }
    shared = {**options, "layer": layer, "found": found, "also_forming": layers}
    zeroed = with_controls(model, tokens, treated, n_random=n_random, **shared)
    normed = with_controls(
        model, tokens, treated, intervention=ordinary_norm, controls=("same range",), n_random=0, **shared
    )
    turned = measure(
        model, tokens, treated, list(edits), lambda label, row: (edits[label](layer, row),), what="directions", **options
    ).over_lifetime("log_odds")  # fmt: skip
    dosed = dose_response(model, tokens, treated, layer=layer, **options)
    less = _less(zeroed, "zero")
    alone = matches.loc[(matches["control"] == "same range") & (matches["pos"] < 0), "sink"].to_numpy(dtype=int)
    norm_less_direction = _effects(normed, "ordinary_norm") - turned.sel(edit="ordinary_direction").to_numpy()
    norm_less_direction[alone] = np.nan  # there is no ordinary token whose norm or direction these were
    values = {
        "necessary": less["same range"],
        "specific layer": less["wrong layer"],
        "more than at the same token": less["same token"],
        "more than a disturbance": less["random"],
        "sufficient": _sufficiency(model, tokens, treated, found, matches, layers, n_random, options),
        "aligned": np.array([one.cosine - COSINE for one in donors]),
        "alignment matters": (turned.sel(edit="remove_direction") - turned.sel(edit="keep_direction")).to_numpy(),
        "dose": _within(dosed, "log_odds"),
        "norm alone": _less(normed, "ordinary_norm")["same range"],
        "norm more than direction": norm_less_direction,
        "lifetime": _within(dosed, "lifetime"),
        "recovers": _recovery(model, tokens, treated, matches, layer, options),
        "weakens": _within(dosed, "primary_log_odds"),
    }
    return values, zeroed.compare()


def _effects(controlled: Controlled, edit: str) -> np.ndarray:
    return controlled.data["effect_log_odds"].sel(edit=edit).to_numpy()


def _less(controlled: Controlled, edit: str) -> dict[str, np.ndarray]:
    """Effect less each control's, per sink."""
    own = _effects(controlled, edit)
    controls = controlled.data["control_log_odds"].sel(edit=edit)
    less = {str(name): own - controls.sel(control=name).to_numpy() for name in controls["control"].values}
    if controlled.data.sizes["draw"]:
        draws = controlled.data["random_log_odds"].sel(edit=edit)
        less["random"] = own - draws.mean("draw", skipna=True).to_numpy()
    return less


def _sufficiency(
    model, tokens, treated: Sinks, found: Sinks, matches, layers, n_random: int, options: dict
) -> np.ndarray:
    """Log-odds effect of the forming set's contributions at a stand-in (the same token if there is one), less random directions'."""
    onto = stand_ins(matches)["pos"].to_numpy()
    of, out = np.flatnonzero(onto >= 0), np.full(len(treated), np.nan)
    if len(of):
        some = Sinks(treated.table.iloc[of].reset_index(drop=True), treated.prompts, treated.manifest)
        effect = sufficiency(
            model, tokens, some, layers=layers, onto=onto[of].tolist(), found=found, n_random=n_random, **options
        ).over_lifetime("log_odds")
        drawn = effect.sel(edit=[f"random_direction {draw}" for draw in range(n_random)]).mean("edit", skipna=True)
        out[of] = (effect.sel(edit="transplant", drop=True) - drawn).to_numpy()
    return out


def _recovery(model, tokens, treated: Sinks, matches, layer: int, options) -> np.ndarray:
    """Effect on the primary's log-odds of zeroing all treated sinks of a prompt together, less that at ordinary tokens."""

    def zeros(label, row: pd.Series) -> tuple[Edit, ...]:
        return (zero(layer, int(row["pos"])),)

    def effect(at: Sinks) -> np.ndarray:
        run = measure(model, tokens, at, ["zero"], zeros, what="joint removal", together=True, **options)
        return run.over_lifetime("primary_log_odds").to_numpy()[:, 0]

    of, at = _as_many_ordinary(treated, matches, tokens)
    out = np.full(len(treated), np.nan)
    if of:
        out[of] = effect(treated)[of] - effect(at)
    return out


def _as_many_ordinary(treated: Sinks, matches: pd.DataFrame, tokens: Tokens) -> tuple[list[int], Sinks]:
    """The sinks of prompts in which each has an ordinary neighbour of its own, and those neighbours.

    Elsewhere a joint edit at the neighbours would be of fewer tokens than the one at the sinks: there is nothing to compare.
    """
    nearby = matches[matches["control"] == "same range"].set_index("sink")["pos"].sort_index()
    prompts = treated.table["prompt"]
    alone = nearby.lt(0) | pd.DataFrame({"prompt": prompts, "pos": nearby}).duplicated(keep=False)
    of = np.flatnonzero(~alone.groupby(prompts).transform("any")).tolist()
    table = treated.table.iloc[of].reset_index(drop=True).assign(pos=nearby.iloc[of].to_numpy())
    table["token_id"] = [
        int(tokens.ids[tokens.names.index(prompt)][pos])
        for prompt, pos in zip(table["prompt"], table["pos"], strict=True)
    ]
    return of, Sinks(table, treated.prompts, treated.manifest)


def _within(dosed: Effect, outcome: str) -> np.ndarray:
    """Rank correlation of factor and outcome within each sink; 0 where the outcome never changes, NaN where undefined."""
    if outcome in dosed.data and dosed.data[outcome].dims == ("sink", "edit"):
        values = dosed.data[outcome].to_numpy().astype(float)
    else:
        values = dosed.over_lifetime(outcome, "edited").to_numpy()
    factors = np.asarray(FACTORS)
    out = np.full(len(values), np.nan)
    for index, row in enumerate(values):
        if np.isfinite(row).all():
            out[index] = statistics.trend_test(factors, row[None]).statistic
    return out


def levels_test(levels: pd.DataFrame) -> dict[str, float]:
    """Do levels recur? Pairs of sinks of different prompts that share (l_start, lifetime), against permuted lifetimes.

    Under the null the lifetimes are dealt out anew among all sinks, whatever their l_start (`N_PERMUTATIONS` times, drawn
    by name; the observed one counted). Where all sinks share an l_start or a lifetime nothing can be told: p is 1.
    """
    if levels["prompt"].nunique() < 2:
        return {
            "estimate": np.nan,
            "p": np.nan,
            "p_against": np.nan,
            "n_prompts": levels["prompt"].nunique(),
            "n_sinks": len(levels),
        }
    prompts, start = pd.factorize(levels["prompt"])[0], levels["l_start"].to_numpy()
    other = np.triu(prompts[:, None] != prompts[None, :], 1) & (start[:, None] == start[None, :])

    def shared(lifetime: np.ndarray) -> int:
        return int((other & (lifetime[:, None] == lifetime[None, :])).sum())

    rng = np.random.default_rng(statistics.seed_of("levels", *levels["prompt"], *start))
    lifetime = levels["lifetime"].to_numpy()
    seen, null = shared(lifetime), np.array([shared(rng.permutation(lifetime)) for _ in range(N_PERMUTATIONS)])
    return {
        "estimate": float(seen - null.mean()), "p": (1 + (null >= seen).sum()) / (N_PERMUTATIONS + 1),
        "p_against": (1 + (null <= seen).sum()) / (N_PERMUTATIONS + 1), "n_prompts": int(prompts.max()) + 1, "n_sinks": len(levels),
    }  # fmt: skip


def judge(values: dict[str, np.ndarray], prompts, levels: dict[str, float]) -> pd.DataFrame:
    """One row per hypothesis, by the rule: estimates, one-sided p both ways and for "none", Holm over all, `holds`.

    `holds` is "yes", "no", "small" (shown, and shown to be within the margin) or "open".
    """
    opposite = {"greater": "less", "less": "greater"}
    rows = []
    for h in HYPOTHESES:
        row: dict = {
            "claim": h.claim,
            "hypothesis": h.name,
            "statement": h.statement,
            "decides": h.decides,
            "predicted": h.alternative,
        }
        if h.name == "levels recur":
            row |= {"low": np.nan, "high": np.nan, "p_none": np.nan, **levels}
        else:
            own = np.asarray(values[h.name], dtype=float)
            estimate = statistics.bootstrap_over_prompts(own, prompts, name=f"claims/{h.name}")
            equivalence = np.nan if h.margin is None else statistics.equivalence_test(own, prompts, h.margin).p
            row |= {
                "estimate": estimate.mean, "low": estimate.low, "high": estimate.high,
                "p": statistics.sign_flip_test(own, prompts, alternative=h.alternative, name=h.name).p,
                "p_against": statistics.sign_flip_test(own, prompts, alternative=opposite[h.alternative], name=h.name).p,
                "p_none": equivalence, "n_prompts": estimate.n, "n_sinks": int(np.isfinite(own).sum()),
            }  # fmt: skip
        rows.append(row)
    table = pd.DataFrame(rows)
    table.insert(list(table).index("p") + 1, "p_holm", statistics.holm(table["p"]))
    for column in ("p_against", "p_none"):
        table[column] = statistics.holm(table[column])
    shown, none, against = (table[column].to_numpy() <= ALPHA for column in ("p_holm", "p_none", "p_against"))
    table["holds"] = np.where(shown & none, "small", np.where(shown, "yes", np.where(none | against, "no", "open")))
    return table


def verdicts_of(table: pd.DataFrame) -> pd.DataFrame:
    """One row per claim: supported, contradicted or not decided, and by which hypotheses."""
    rows = []
    for claim, statement in CLAIMS.items():
        own = table[(table["claim"] == claim) & table["decides"]]
        by_state = {state: own.loc[own["holds"] == state, "hypothesis"].tolist() for state in ("no", "small", "open")}
        undecided = by_state["small"] or by_state["open"]
        verdict = "contradicted" if by_state["no"] else "not decided" if undecided else "supported"
        words = {"no": "fails", "small": "there, but within the margin", "open": "open"}
        given = [f"{words[state]}: {', '.join(names)}" for state, names in by_state.items() if names]
        reason = "; ".join(given) or "all hypotheses hold"
        rows.append({"claim": str(claim), "statement": statement, "verdict": verdict, "reason": reason})
    rows.append({"claim": "5b", "statement": "Levels recur more in larger models", "verdict": "not decided",
                 "reason": "needs three sizes of one family"})  # fmt: skip
    return pd.DataFrame(rows)


def _of_prompts(sinks: Sinks, prompts: Sequence) -> Sinks:
    table = sinks.table[sinks.table["prompt"].isin(prompts)].reset_index(drop=True)
    return Sinks(table, sinks.prompts, sinks.manifest)
