"""Attribution: what gradients say each MLP contribution and neuron does to a sink, beside what exact runs say.

A filter, never evidence: it costs about four forward passes where a layer map runs one for each layer, and it is as good as
the outcome is linear, which next to a sink it is not. So it always comes with its agreement with the exact runs, and names
the layers it missed.

- `gradient`: attribution patching (Kramar et al., AtP*, 2403.00745), the first-order effect of setting the
  contribution of MLP l at the treated position to zero, `gradient . (0 - contribution)`, through everything above: later
  MLPs, attention, norms whose scales are recomputed.
- `integrated_gradients` (Sundararajan et al., 1703.01365): the same product with the mean gradient along a path on which all
  contributions at the treated position go from their clean values to zero together, each a common factor of its clean
  value. Attributions add up to the effect of removing them all; the residual is reported. What an MLP makes later
  MLPs of the same token write is credited to those. (A path on which they answer was tried: on Gemma 3 the outcome jumps on
  it, and 32 nodes left a residual of four fifths of the effect.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.stats
import torch
import xarray as xr
from jaxtyping import Float
from tqdm.auto import tqdm

from sink_circuits import arguments
from sink_circuits.adapters import Adapter, adapt
from sink_circuits.detection import Sinks
from sink_circuits.effects import Effect
from sink_circuits.errors import InputError, ModelError
from sink_circuits.experiments import layer_map
from sink_circuits.gradients import GRAPH_BYTES, MEANS, Subject, check_memory, neuron_hook
from sink_circuits.measurement import check_handed_on, check_options
from sink_circuits.prompts import Tokens, as_tokens
from sink_circuits.results import Manifest, read_result, write_result

METHODS = ("gradient", "integrated_gradients")
OUTCOMES = {
    "score": ("pos", MEANS["score"]),
    "log_odds": ("pos", MEANS["log_odds"]),
    "primary_score": ("primary_pos", MEANS["score"]),
    "primary_log_odds": ("primary_pos", MEANS["log_odds"]),
}
"""Outcome: (column of the sink table that names its key, the mean over the later queries)."""
TARGETS = ("contributions", "neurons", "direct")
N_STEPS = 16
"""Nodes on the path (`gradients.path_nodes`)."""


# --------------------------------------------------------------------------------------------- agreement with runs
@dataclass(frozen=True)
class Agreement:
    """How far an attribution tells what exact runs tell, per sink.

    `table`, one row per sink: `n_layers` compared (those with a defined exact effect), `rank_correlation` (Spearman, of
    signed effects; NaN for fewer than three layers or constant values), `k` and `recall` (share of the k layers of
    largest absolute exact effect that are among the k of largest absolute attribution), `largest_exact` and
    `largest_attributed` (layers), and the counts of both kinds of miss.

    `misses`, one row per layer that one of the two makes much of and the other does not:
    - "false negative": a large exact effect, attributed less than the share `small` of it, or with the other sign. `reason`
      for gradients: "cancellation", when most of what is missing is in the `direct` effect, that is, when later MLPs of the
      same token take it back to first order (what AtP* drops gradients for); otherwise "saturation": the gradient at the clean run is
      not the one along the removal, for norms divide by the sink and softmax has no more to give. For integrated
      gradients "indirect": it matters by what it makes later MLPs of the token write, which is theirs on the path, or in
      company only.
    - "false positive": a large attribution, an exact effect smaller than the share `small` of it, or of the other sign.
      `reason`: for gradients "curvature", the slope at the clean run does not last; for integrated gradients "stand-in": the
      path credits what no single removal shows, because other MLPs make up for it or because it takes their removal too.
    A reason is a reading of these numbers; edit those layers jointly to confirm it.
    Large: at least the share `large` of the sink's largest absolute value.
    """

    table: pd.DataFrame
    misses: pd.DataFrame

    @property
    def false_negatives(self) -> pd.DataFrame:
        """The layers that the attribution missed."""
        return self.misses[self.misses["miss"] == "false negative"].reset_index(drop=True)


def compare(
    attribution: Float[xr.DataArray, "sink layer"], exact: Float[xr.DataArray, "sink layer"],
    direct: Float[xr.DataArray, "sink layer"] | None = None, *, k: int = 3, large: float = 0.25, small: float = 0.25,
) -> Agreement:  # fmt: skip
    """Agreement of two estimates of one effect on the axes [sink, layer]; NaN in either leaves a layer out.

    `direct`: the part that does not pass through later MLPs of the same token; without it misses are those of integrated
    gradients. Equal values rank in the order of layers. Raises InputError for other shapes, k < 1, or shares outside (0, 1].
    """
    if attribution.shape != exact.shape:
        raise InputError(f"attributions have shape {attribution.shape}, exact effects {exact.shape}: they must agree.")
    if k < 1 or not 0 < large <= 1 or not 0 < small <= 1:
        raise InputError(f"k = {k}, large = {large}, small = {small}: k is at least 1, both shares are in (0, 1].")
    rows, misses = [], []
    for sink in range(len(exact)):
        a, x = (np.asarray(values[sink], dtype=float) for values in (attribution, exact))
        d = None if direct is None else np.asarray(direct[sink], dtype=float)
        layers = np.flatnonzero(np.isfinite(a) & np.isfinite(x))
        own = _misses(a, x, d, layers, large, small)
        misses += [{"sink": sink, **miss} for miss in own]
        top = [layers[np.argsort(-np.abs(values[layers]), kind="stable")][:k] for values in (x, a)]
        nothing = not np.abs(x[layers]).sum() > 0
        rows.append(
            {
                "sink": sink, "n_layers": len(layers), "rank_correlation": _spearman(a[layers], x[layers]), "k": len(top[0]),
                "recall": np.nan if nothing else len(set(top[0]) & set(top[1])) / len(top[0]),
                "largest_exact": -1 if nothing else int(top[0][0]),
                "largest_attributed": int(top[1][0]) if len(layers) else -1,
                "false_negatives": sum(miss["miss"] == "false negative" for miss in own),
                "false_positives": sum(miss["miss"] == "false positive" for miss in own),
            }
        )  # fmt: skip
    columns = ["sink", "layer", "miss", "reason", "exact", "attribution", "direct"]
    return Agreement(pd.DataFrame(rows), pd.DataFrame(misses, columns=columns))


def _spearman(a: np.ndarray, x: np.ndarray) -> float:
    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(x) == 0:
        return np.nan
    return float(scipy.stats.spearmanr(a, x).statistic)


def _misses(a, x, d, layers, large: float, small: float) -> list[dict]:
    found = []
    for layer in layers:
        miss = reason = None
        if abs(x[layer]) >= large * np.abs(x[layers]).max() and a[layer] * np.sign(x[layer]) < small * abs(x[layer]):
            taken_back = None if d is None else (d[layer] - a[layer]) / (x[layer] - a[layer])
            miss = "false negative"
            reason = "indirect" if taken_back is None else "cancellation" if taken_back >= 0.5 else "saturation"
        elif abs(a[layer]) >= large * np.abs(a[layers]).max() and x[layer] * np.sign(a[layer]) < small * abs(a[layer]):
            miss, reason = "false positive", "stand-in" if d is None else "curvature"
        if miss is not None:
            direct = np.nan if d is None else d[layer]
            found.append(
                {"layer": int(layer), "miss": miss, "reason": reason, "exact": x[layer], "attribution": a[layer], "direct": direct}
            )  # fmt: skip
    return found


def exact_effects(
    effect: Effect, outcome: str, readers: Float[xr.DataArray, "sink layer head"]
) -> Float[xr.DataArray, "sink layer"]:
    """A layer map's effect on the mean over `readers` above the edit; the axis `layer` is the edited layer.

    With the readers of a lifetime it is `Effect.over_lifetime`. NaN for layers not in the map, or without readers above.
    """
    edited = effect.data["first_layer"]
    weights = readers.where(readers["layer"] > edited, 0)
    total = (effect.effect(outcome).fillna(0) * weights).sum(("layer", "head"))
    means = (total / weights.sum(("layer", "head"))).transpose("sink", "edit")
    return means.rename(edit="layer").reindex(layer=readers["layer"])


# ------------------------------------------------------------------------------------------------------- results
@dataclass(frozen=True)
class Attribution:
    """Attributed effects of setting MLP contributions and neurons to zero, with the exact effects beside them.

    `data` (xarray), all effects edited minus clean, as `Effect.over_lifetime` counts them (the mean over the readers above
    the edited layer; NaN where there are none):
    - `attribution` [sink, layer]: of the contribution at the treated position; `direct` [sink, layer] (gradient only): the
      part that does not pass through later MLPs at that position;
    - `neurons` [sink, layer, neuron]: of each neuron there. They add up to the layer's attribution where the down
      projection has no bias and no norm follows it. With a post-norm (Gemma 2 and 3, OLMo 2) they add up to about
      0: the gradient passes through the norm, which takes a common factor of all neurons away again;
    - `positions` [sink, layer, pos] (where asked for): of the contribution at every position; NaN past the text's end;
    - `exact` [sink, layer]: the layer map's;
    - `share` [sink, layer]: the share of the readers that lie above a layer; attribution * share is what adds up;
    - `readers` [sink, layer, head]: 1 where the outcome is read; `clean` [sink] and `removed` [sink]: the outcome over all
      readers, clean and with all contributions set to zero that were scaled along the path.
    `table`: one row per sink.
    """

    data: xr.Dataset
    table: pd.DataFrame
    manifest: Manifest

    @property
    def agreement(self) -> Agreement:
        """With the exact runs; `compare` takes other k and shares."""
        return compare(self.data["attribution"], self.data["exact"], self.data.get("direct"))

    @property
    def completeness(self) -> pd.DataFrame:
        """Do attributions add up to the joint removal? One row per sink: clean, removed, joint_effect, attributed, residual.

        `residual` = attributed - joint_effect: about 0 for integrated gradients with enough steps; for gradients it says how
        far from linear the removal is.
        """
        data = self.data
        parts = data["positions"] if self.manifest.settings["positions"] == "all" else data["attribution"]
        added = (parts * data["share"]).sum([d for d in parts.dims if d != "sink"])
        frame = pd.DataFrame({"clean": data["clean"].values, "removed": data["removed"].values})
        frame["joint_effect"] = frame["removed"] - frame["clean"]
        frame["attributed"] = np.where(frame["clean"].isna(), np.nan, added.values)
        frame["residual"] = frame["attributed"] - frame["joint_effect"]
        return frame

    def summary(self) -> pd.DataFrame:
        """One row per sink: agreement with the exact runs (`Agreement.table`) and completeness."""
        sinks = self.table[["prompt", "pos", "token", "kind", "l_start", "l_end"]]
        return pd.concat([sinks, self.agreement.table.drop(columns="sink"), self.completeness], axis=1)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per sink and layer: attribution, exact, share, direct (NaN where not computed)."""
        names = [name for name in ("attribution", "exact", "share", "direct") if name in self.data]
        frame = self.data[names].to_dataframe().reset_index()
        frame["direct"] = frame.get("direct", np.nan)
        return frame.join(self.table[["prompt", "pos", "token", "kind", "l_start", "l_end"]], on="sink")

    def top_neurons(self, n: int = 10) -> pd.DataFrame:
        """The n neurons of largest absolute attribution of each sink, those of 0 left out: sink, layer, neuron, attribution.

        Raises InputError when neurons were not among the targets.
        """
        n = arguments.whole(n, "n", low=1)
        if "neurons" not in self.data:
            raise InputError("neurons were not attributed: ask for targets=('contributions', 'neurons').")
        rows = []
        for sink, effects in enumerate(self.data["neurons"].values):
            order = np.argsort(-np.abs(np.nan_to_num(effects)), axis=None, kind="stable")[:n]
            places = zip(*np.unravel_index(order, effects.shape), strict=True)
            rows += [(sink, layer, neuron, effects[layer, neuron]) for layer, neuron in places]
        frame = pd.DataFrame(rows, columns=["sink", "layer", "neuron", "attribution"])
        return frame[frame["attribution"].abs() > 0].reset_index(drop=True)

    def plot(self):
        """Attributed beside exact effects (plotly)."""
        from sink_circuits import figures

        return figures.attribution_figure(self)

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """One safetensors file, whole or not at all. Raises ResultError when `path` exists or cannot be written."""
        write_result(path, "attribution", self.data, self.table, self.manifest, overwrite=overwrite)

    @staticmethod
    def load(path: str | Path) -> Attribution:
        """Read what `save` wrote. Raises ResultError for any other file."""
        return Attribution(*read_result(path, "attribution", "an attribution")[:3])

    def __repr__(self) -> str:
        settings = self.manifest.settings
        columns = ["prompt", "pos", "rank_correlation", "k", "recall", "false_negatives", "joint_effect", "residual"]
        table = self.summary()[columns].to_string(max_rows=40, float_format=lambda x: f"{x:.3g}")
        return f"Attribution({settings['method']} of {settings['outcome']}, {len(self.table)} sinks)\n{table}"


def agreement(attribution: Attribution, exact: Effect, **how) -> Agreement:
    """Agreement of an attribution with any layer map of the same sinks; `how`: k and shares as in `compare`.

    Raises InputError for an effect that is not a layer map of these sinks.
    """
    if exact.kind != "layer_map" or not _same_sinks(exact.table, attribution.table):
        raise InputError(f"exact is a {exact.kind} of {len(exact.table)} sinks: pass the layer_map of these sinks.")
    effects = exact_effects(exact, attribution.manifest.settings["outcome"], attribution.data["readers"])
    return compare(attribution.data["attribution"], effects, attribution.data.get("direct"), **how)


# ---------------------------------------------------------------------------------------------------------- main
def attribute(
    model, tokens, sinks: Sinks | None = None, *, outcome: str = "log_odds", method: str = "gradient", exact: Effect | None = None,
    readers: Sequence[tuple[int, int]] | None = None, targets: Sequence[str] = TARGETS, positions: str = "treated",
    n_steps: int = N_STEPS, graph_bytes: int = GRAPH_BYTES, verbose: bool = True, **options,
) -> Attribution:  # fmt: skip
    """Attribute a sink score to every MLP contribution and neuron, and say how far exact runs agree.

    `outcome`: one of `OUTCOMES`, averaged over heads and the layers that read the sink, or over `readers`, a list of
    (layer, head). `method`: see the module; `n_steps`: nodes of integrated gradients. `exact`: the zeroing layer map of
    these sinks, run here when None, with `options` as in `measure`. `targets`: "contributions" and with them, if named,
    "neurons" of the treated position and "direct", the part of a gradient that does not pass through later MLPs there.
    `positions`: "treated", or "all" to attribute to the contributions at every position too (a path then scales all of
    them). Sinks whose outcome is undefined have NaN.

    Cost per sink, beside `exact`: "gradient" two forward and two backward passes (one without "direct"), up to the last
    layer that is read and without logits; parameters ask for no gradients, so that a backward pass costs no more than a
    forward one. "integrated_gradients": n_steps times one forward and one backward pass, and two to four passes more.
    Where texts are so long that blocks are run again in the backward pass, each backward pass costs one forward pass more.

    Raises InputError (arguments; a text too long for `graph_bytes`) and ModelError naming a missing hook, before any pass.
    """
    adapter = adapt(model)
    targets = arguments.several(targets, "targets")
    if wrong := {"together", "intervention"} & set(options):
        raise InputError(
            f"option {min(wrong)!r} is of no use here: the layer map of an attribution zeroes one sink at a time."
        )
    arguments.number(graph_bytes, "graph_bytes", low=1)
    if exact is not None:
        arguments.instance(exact, "exact", Effect, "make it with layer_map()")
    if sinks is not None:
        arguments.instance(sinks, "sinks", Sinks, "pass what find_sinks returns")
    check_handed_on(options)
    check_options(adapter, verbose=verbose, **options)
    _check_arguments(adapter, outcome, method, targets, positions, n_steps, readers)
    given, tokens = tokens, as_tokens(model, tokens, options.get("attention_mask"))
    recompute = check_memory(adapter, max(map(len, tokens)), graph_bytes)
    if exact is None:
        exact = layer_map(model, given, sinks, verbose=verbose, **options)
    _check_exact(exact, adapter, tokens, sinks)
    table = exact.table.reset_index(drop=True)
    min_queries = int(exact.manifest.settings["min_queries"])
    weights = reader_weights(exact, outcome, readers)
    key, mean = OUTCOMES[outcome]
    arrays = _empty(adapter, len(table), max(map(len, tokens)), method, targets, positions)
    for row in tqdm(range(len(table)), desc="attribution", unit="sink", disable=not verbose):
        read = torch.from_numpy(weights.values[row] > 0)
        if not read[1:].any():  # nothing above any MLP is read
            continue
        ids, pos = tokens.ids[tokens.names.index(table["prompt"][row])], int(table["pos"][row])
        sites = torch.arange(len(ids)) if positions == "all" else torch.tensor([pos])
        subject = Subject(
            adapter, ids, int(table[key][row]), pos, read.to(ids.device), mean, min_queries, sites.to(ids.device), targets, recompute
        )  # fmt: skip
        found = subject.by_gradient() if method == "gradient" else subject.by_integration(n_steps)
        for name in arrays.keys() & found.keys():
            values = torch.as_tensor(found[name]).cpu().numpy()
            arrays[name][1][(row, *map(slice, values.shape))] = values
    data = xr.Dataset(
        arrays, coords={"sink": range(len(table)), "layer": range(adapter.n_layers), "head": range(adapter.n_heads)}
    )
    share = _share(weights)
    for name in data.keys() & {"attribution", "direct", "neurons", "positions"}:
        # From all readers to those above the edit, for those below cannot change.
        data[name] = (data[name] / share.where(share > 0)).transpose(*data[name].dims).astype("float32")
    data["share"], data["readers"] = share.astype("float32"), weights.astype("int8")
    data["exact"] = exact_effects(exact, outcome, weights).astype("float32")
    manifest = Manifest.of(
        adapter, tokens, what="attribution", path="reference", outcome=outcome, method=method, positions=positions,
        targets=targets, n_steps=n_steps if method == "integrated_gradients" else 1, recompute=recompute,
        readers="lifetime" if readers is None else [list(map(int, pair)) for pair in readers], min_queries=min_queries,
        exact=dict(exact.manifest.settings),
    )  # fmt: skip
    return Attribution(data, table, manifest)


def reader_weights(
    exact: Effect, outcome: str, readers: Sequence[tuple[int, int]] | None = None
) -> Float[xr.DataArray, "sink layer head"]:
    """1 for every (layer, head) whose attention the outcome averages: l_start+1..l_end+1, or `readers`; 0 where undefined."""
    clean = exact.data[f"clean_{outcome}"].transpose("sink", "layer", "head")
    if readers is None:
        start, end = (xr.DataArray(exact.table[name].to_numpy(), dims="sink") for name in ("l_start", "l_end"))
        read = (clean["layer"] > start) & (clean["layer"] <= end + 1)
    else:
        read = xr.zeros_like(clean[0], dtype=bool)
        for layer, head in readers:
            read[layer, head] = True
    return (read & np.isfinite(clean)).transpose("sink", "layer", "head").astype(float)


def _share(weights: Float[xr.DataArray, "sink layer head"]) -> Float[xr.DataArray, "sink layer"]:
    """The share of the readers that lie above each layer; 0 without readers."""
    per_layer = weights.sum("head")
    total = per_layer.sum("layer")
    above = total - per_layer.cumsum("layer")
    return (above / total.where(total > 0)).fillna(0).transpose("sink", "layer")


def _empty(
    adapter: Adapter, n_sinks: int, n_positions: int, method: str, targets: Sequence[str], positions: str
) -> dict:
    sizes = {"sink": n_sinks, "layer": adapter.n_layers, "neuron": adapter.cfg.d_mlp, "pos": n_positions}
    axes: dict[str, tuple[str, ...]] = {"attribution": ("sink", "layer"), "clean": ("sink",), "removed": ("sink",)}
    if "neurons" in targets:
        axes["neurons"] = ("sink", "layer", "neuron")
    if "direct" in targets and method == "gradient":
        axes["direct"] = ("sink", "layer")
    if positions == "all":
        axes["positions"] = ("sink", "layer", "pos")
    return {name: (dims, np.full([sizes[dim] for dim in dims], np.nan, np.float32)) for name, dims in axes.items()}


def _check_arguments(adapter: Adapter, outcome, method, targets, positions, n_steps, readers) -> None:
    for name, value, known in (
        ("outcome", outcome, OUTCOMES), ("method", method, METHODS), ("positions", positions, ("treated", "all")),
        *(("target", target, TARGETS) for target in targets),
    ):  # fmt: skip
        arguments.one_of(value, name, known)
    if "contributions" not in targets:
        raise InputError(f"targets = {targets}: name 'contributions', the others come with them.")
    arguments.whole(n_steps, "n_steps", low=1)
    readers = None if readers is None else arguments.several(readers, "readers", empty=True)
    if readers is not None and not readers:
        raise InputError("readers is empty: name at least one (layer, head), or leave it out.")
    for pair in readers or ():
        if len(arguments.several(pair, "a reader")) != 2 or not all(map(arguments.is_whole, pair)):
            raise InputError(f"reader {arguments.shown(pair)}: give (layer, head).")
        layer, head = pair
        if not 0 <= layer < adapter.n_layers or not 0 <= head < adapter.n_heads:
            raise InputError(
                f"reader ({layer}, {head}) is out of range: layers 0..{adapter.n_layers - 1}, heads 0..{adapter.n_heads - 1}."
            )
    if "neurons" in targets:
        _check_neurons(adapter.model, adapter.n_layers)


def _check_neurons(model, n_layers: int) -> None:
    """A mixture of experts has no such hook, or (on the bridge) an alias of that name at the MLP's output."""
    for layer in range(n_layers):
        point = model.hook_dict.get(neuron_hook(layer))
        if point is None or point is model.hook_dict.get(f"blocks.{layer}.mlp.hook_out"):
            raise ModelError(
                f"{neuron_hook(layer)} does not hold the neurons of this model's MLP (a mixture of experts has no such hook): "
                "use targets=('contributions', 'direct')."
            )


def _check_exact(exact: Effect, adapter: Adapter, tokens: Tokens, sinks: Sinks | None) -> None:
    settings = exact.manifest.settings
    if exact.kind != "layer_map" or settings.get("intervention") != "zero" or settings.get("together"):
        raise InputError(
            "exact is not a layer map with intervention 'zero', one sink per run: make it with layer_map()."
        )
    if exact.manifest.tokens != tokens.hash or exact.manifest.weights != adapter.weights_hash:
        raise InputError("exact was made with other tokens or another model: make it with layer_map() of these.")
    if sinks is not None and not _same_sinks(exact.table, sinks.table):
        raise InputError("exact is of other sinks: pass the sinks it was made with, or leave them out.")


def _same_sinks(one: pd.DataFrame, other: pd.DataFrame) -> bool:
    names = ["prompt", "pos", "l_start", "l_end"]
    return one[names].reset_index(drop=True).equals(other[names].reset_index(drop=True))
