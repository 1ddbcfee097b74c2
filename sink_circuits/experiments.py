"""Experiments: edit MLP contributions at sinks, measure what becomes of attention in the later layers.

Every experiment is a list of labelled edits per sink, run by `measure`, and comes back as an `Effect`: named-axis
arrays of the clean and the edited outcome, the sinks they belong to, and a manifest.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from sink_circuits import statistics
from sink_circuits.detection import Sinks, find_sinks
from sink_circuits.errors import InputError, ResultError
from sink_circuits.interventions import Contribution, Edit, check_factor, replace, rescale, zero
from sink_circuits.models import Adapter, adapt
from sink_circuits.prompts import Tokens, as_tokens
from sink_circuits.results import Manifest, read_dataset, write_dataset
from sink_circuits.runs import CleanRun, EditedRun, first_edit, resolve_path, run_clean, run_edited
from sink_circuits.scores import MIN_QUERIES, check_min_queries, column_log_odds, column_scores

FACTORS = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)
ROW_FLOATS = 1 << 27
"""Floats one batch of edited rows may take in its widest activations (512 MiB); rows per batch follow from it."""

OUTCOMES = {
    "score": "sink score of the treated position",
    "log_odds": "attention log-odds of the treated position",
    "primary_score": "sink score of the primary sink",
    "primary_log_odds": "attention log-odds of the primary sink",
}


@dataclass(frozen=True)
class Effect:
    """Clean and edited outcomes of one experiment.

    `data` (xarray): for each outcome of `OUTCOMES` the clean value `clean_<outcome>` [sink, layer, head] and the edited
    one `<outcome>` [sink, edit, layer, head]; `loss` [sink, edit] and `clean_loss` [sink], the mean next-token loss from
    the treated position on, where asked for; as manipulation checks the treated position's `norm` and `cosine` (with
    the clean primary, raw) of resid_post [sink, edit, layer]. Layers at or below the first edited one hold exactly the
    clean values. `first_layer`, `last_edited` [sink, edit]: the outermost edited layers. `table`: one row per sink.
    """

    kind: str
    data: xr.Dataset
    table: pd.DataFrame
    manifest: Manifest

    def effect(self, outcome: str = "score") -> xr.DataArray:
        """Edited minus clean, [sink, edit, layer, head] (loss: [sink, edit]). Raises InputError for an unknown outcome."""
        if f"clean_{outcome}" not in self.data:
            known = [str(name).removeprefix("clean_") for name in self.data.data_vars if str(name).startswith("clean_")]
            raise InputError(f"outcome {outcome!r} was not measured: there are {', '.join(known)}.")
        return self.data[outcome] - self.data[f"clean_{outcome}"]

    def reading(self) -> xr.DataArray:
        """Which layers read the sink and lie above the edit: l_start+1..l_end+1 and > first edited layer; [sink, edit, layer]."""
        layer = self.data["layer"]
        start = xr.DataArray(self.table["l_start"].to_numpy(), dims="sink")
        end = xr.DataArray(self.table["l_end"].to_numpy(), dims="sink")
        return (layer > start) & (layer <= end + 1) & (layer > self.data["first_layer"])

    def over_lifetime(self, outcome: str = "score", what: str = "effect") -> xr.DataArray:
        """Mean over heads and over the layers that read the sink above the edit, [sink, edit]; NaN where there are none.

        `what`: "effect", "edited" or "clean".
        """
        difference = self.effect(outcome)
        values = {
            "effect": difference,
            "edited": self.data[outcome],
            "clean": self.data[f"clean_{outcome}"].broadcast_like(difference),
        }
        if what not in values:
            raise InputError(f"{what!r} is unknown: use 'effect', 'edited' or 'clean'.")
        if outcome == "loss":
            return values[what]
        if "head" not in difference.dims:
            raise InputError(
                f"{outcome!r} has no heads to average over, it is a manipulation check: read effect.data[{outcome!r}]."
            )
        return values[what].mean("head").where(self.reading()).mean("layer")

    def summary(self, confidence: float = 0.95) -> pd.DataFrame:
        """One row per edit and outcome: mean over prompts of the effect over the lifetime, with its bootstrap interval.

        Columns: edit, outcome, clean, edited, effect, low, high (over prompts), n_prompts, n_sinks. Intervals are NaN
        for a single prompt.
        """
        rows = []
        outcomes = [*OUTCOMES, *(["loss"] if "loss" in self.data else [])]
        for outcome in outcomes:
            effects = self.over_lifetime(outcome)
            clean = self.over_lifetime(outcome, "clean")
            for edit in self.data["edit"].values:
                values = effects.sel(edit=edit).to_numpy()
                name = f"{self.kind}/{outcome}/{edit}"
                estimate = statistics.bootstrap_over_prompts(
                    values, self.table["prompt"], name=name, confidence=confidence
                )
                base = statistics.prompt_means(
                    np.where(np.isnan(values), np.nan, clean.sel(edit=edit).to_numpy()), self.table["prompt"]
                )
                clean_mean = float(base.mean()) if len(base) else np.nan
                rows.append(
                    {
                        "edit": edit, "outcome": outcome, "clean": clean_mean, "edited": clean_mean + estimate.mean,
                        "effect": estimate.mean,
                        "low": estimate.low, "high": estimate.high, "n_prompts": estimate.n, "n_sinks": int(np.isfinite(values).sum()),
                    }
                )  # fmt: skip
        return pd.DataFrame(rows)

    def forming(self, max_layer_of: str = "l_end") -> pd.Series:
        """Each sink's forming layer: the edit (a layer) that lowers its log-odds most over its lifetime, up to l_end.

        Only for a layer map. A layer whose removal another can make up for is found only by joint edits.
        """
        if self.kind != "layer_map":
            raise InputError(
                f"forming layers are read from a layer map, this is a {self.kind}: use layer_map(...).forming()."
            )
        effects = self.over_lifetime("log_odds").to_numpy().copy()
        edits = self.data["edit"].to_numpy()
        effects[edits[None, :] > self.table[max_layer_of].to_numpy()[:, None]] = np.nan
        if np.isnan(effects).all(axis=1).any():
            raise InputError(
                "a sink has no layer with a defined effect: it stands too near the end of its text; leave it out."
            )
        return pd.Series(edits[np.nanargmin(effects, axis=1)].astype(int), index=self.table.index, name="forming")

    def to_dataframe(self) -> pd.DataFrame:
        """Long format, one row per sink, edit, outcome, layer and head: edited, clean and effect."""
        frames = []
        for outcome in OUTCOMES:
            edited = self.data[outcome].to_dataframe(name="edited").reset_index()
            clean = self.data[f"clean_{outcome}"].to_dataframe(name="clean").reset_index()
            frame = edited.merge(clean, on=["sink", "layer", "head"])
            frame.insert(0, "outcome", outcome)
            frames.append(frame)
        frame = pd.concat(frames, ignore_index=True)
        frame["effect"] = frame["edited"] - frame["clean"]
        sinks = self.table[["prompt", "pos", "token", "kind", "l_start", "l_end"]]
        return frame.join(sinks, on="sink")

    def plot(self, outcome: str = "score"):
        """The experiment's figure (plotly)."""
        from sink_circuits import figures

        return figures.effect_figure(self, outcome)

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """One safetensors file, whole or not at all. Raises ResultError when `path` exists or cannot be written."""
        meta = {"kind": self.kind, "table": self.table.to_dict(orient="list"), "manifest": self.manifest.to_dict()}
        write_dataset(Path(path), self.data, meta, overwrite=overwrite)

    @staticmethod
    def load(path: str | Path) -> Effect:
        """Read what `save` wrote. Raises ResultError for any other file."""
        data, meta = read_dataset(path)
        if not {"kind", "table", "manifest"} <= set(meta):
            raise ResultError(f"{path} is not an experiment's result: check the path.")
        return Effect(meta["kind"], data, pd.DataFrame(meta["table"]), Manifest.from_dict(meta["manifest"]))

    def __repr__(self) -> str:
        prompts = self.table["prompt"].nunique()
        edits = self.data["edit"].values.tolist()
        summary = self.summary().to_string(float_format=lambda x: f"{x:.4g}")
        return f"Effect({self.kind}: {len(self.table)} sinks in {prompts} prompts, edits {edits})\n{summary}"


EditsOf = Callable[[Any, pd.Series], tuple[Edit, ...]]
"""(label, row of the sink table) -> the edits of that run."""


def measure(
    model, tokens, sinks: Sinks, labels: Sequence, edits_of: EditsOf, *, what: str, loss: bool = False, together: bool = False,
    min_queries: int = MIN_QUERIES, batch_size: int | None = None, attention_mask=None, clean_cache=None, path: str = "auto",
    verbose: bool = True, settings: Mapping | None = None,
) -> Effect:  # fmt: skip
    """Run `edits_of(label, sink)` for every label and sink and measure all outcomes.

    One sink is edited per run unless `together`, which edits all sinks of a prompt in one run (each is still measured
    by itself). `labels` name the axis `edit` of the result. `batch_size`: edited rows per forward pass, chosen by
    memory when None. `settings` go into the manifest. A run without edits, or whose edits change nothing (a rescaling
    by 1), is the clean one: copied, not run. All edits are made and checked before the first forward pass. Raises
    InputError.
    """
    adapter = adapt(model)
    _check_options(adapter, min_queries, batch_size, path)
    tokens = as_tokens(model, tokens, attention_mask)
    table = _check_sinks(sinks, tokens)
    plan = [[tuple(edits_of(label, row)) for label in labels] for _, row in table.iterrows()]
    for row, cells in zip(table.itertuples(), plan, strict=True):
        n_positions = len(tokens.ids[tokens.names.index(row.prompt)])
        for edit in (edit for cell in cells for edit in cell):
            edit.check(adapter.n_layers, n_positions)
    arrays = _empty_arrays(len(table), len(labels), adapter, loss)
    used = path
    bar = tqdm(total=len(table) * len(labels), desc=what.replace("_", " "), unit="run", disable=not verbose)
    for index, (name, ids) in enumerate(zip(tokens.names, tokens.ids, strict=True)):
        rows = np.flatnonzero(table["prompt"] == name)
        if not len(rows):
            continue
        positions = sorted({int(p) for r in rows for p in (table["pos"].iloc[r], table["primary_pos"].iloc[r])})
        mask = None if attention_mask is None else torch.as_tensor(attention_mask)[index]
        clean = run_clean(
            model, ids, chosen=positions, clean_cache=clean_cache, row=index, mask=mask, loss=loss, path=path
        )
        _note(arrays, None, rows, table, clean, clean.columns, clean.loss, adapter, min_queries)
        used, unedited = clean.path, EditedRun((), clean.columns, None, clean.loss, clean.path)
        cells = _cells(rows, plan, len(labels), together)
        for edits, members in [cell for cell in cells if _changes_nothing(cell)]:
            _note_run(arrays, members, table, clean, unedited, edits, adapter, min_queries)
            bar.update(len(members))
        cells = [cell for cell in cells if not _changes_nothing(cell)]
        for chunk in _chunks(cells, batch_size or _row_budget(adapter, len(ids))):
            runs = run_edited(model, clean, [edits for edits, _ in chunk], loss=loss, path=path)
            for run, (edits, members) in zip(runs, chunk, strict=True):
                _note_run(arrays, members, table, clean, run, edits, adapter, min_queries)
                bar.update(len(members))
            used = runs[0].path
    bar.close()
    manifest = Manifest.of(
        adapter, tokens, what=what, path=used, together=together, min_queries=min_queries,
        found=dict(sinks.manifest.settings), **(settings or {}),
    )  # fmt: skip
    coords = {
        "edit": list(labels),
        "layer": np.arange(adapter.n_layers),
        "head": np.arange(adapter.n_heads),
        "sink": np.arange(len(table)),
    }
    return Effect(what, xr.Dataset(arrays, coords=coords), table, manifest)


def _check_options(
    adapter: Adapter, min_queries: int = MIN_QUERIES, batch_size: int | None = None, path: str = "auto", **_
) -> None:
    check_min_queries(min_queries)
    resolve_path(adapter, path)
    if batch_size is not None and (not isinstance(batch_size, int) or batch_size < 1):
        raise InputError(f"batch_size = {batch_size}: at least 1, or None to choose by memory.")


def _check_sinks(sinks: Sinks, tokens: Tokens) -> pd.DataFrame:
    if not isinstance(sinks, Sinks):
        raise InputError(f"sinks of type {type(sinks).__name__} cannot be read: pass what find_sinks returns.")
    table = sinks.table.reset_index(drop=True)
    if not len(table):
        raise InputError("there are no sinks to treat: find_sinks found none of this kind in these prompts.")
    if len(set(tokens.names)) < len(tokens):
        raise InputError("two prompts share a name: give each its own.")
    if missing := set(table["prompt"]) - set(tokens.names):
        raise InputError(
            f"sinks of prompt {sorted(missing)[0]!r} were given without its tokens: pass the tokens they were found in."
        )
    for prompt, pos, token_id in zip(table["prompt"], table["pos"].tolist(), table["token_id"], strict=True):
        ids = tokens.ids[tokens.names.index(prompt)]
        if not 0 <= pos < len(ids) or int(ids[pos]) != token_id:
            raise InputError(
                f"the sink at position {pos} of prompt {prompt!r} is another token there: pass the tokens it was found in."
            )
    return table


def _empty_arrays(
    n_sinks: int, n_edits: int, adapter: Adapter, loss: bool
) -> dict[str, tuple[tuple[str, ...], np.ndarray]]:
    layers, heads = adapter.n_layers, adapter.n_heads

    def empty(*dims: str) -> tuple[tuple[str, ...], np.ndarray]:
        sizes = {"sink": n_sinks, "edit": n_edits, "layer": layers, "head": heads}
        return dims, np.full([sizes[d] for d in dims], np.nan, dtype=np.float32)

    arrays = {f"clean_{name}": empty("sink", "layer", "head") for name in OUTCOMES}
    arrays |= {name: empty("sink", "edit", "layer", "head") for name in OUTCOMES}
    arrays |= {name: empty("sink", "edit", "layer") for name in ("norm", "cosine")}
    arrays |= {f"clean_{name}": empty("sink", "layer") for name in ("norm", "cosine")}
    arrays |= {
        name: (("sink", "edit"), np.full((n_sinks, n_edits), -1, dtype=np.int64))
        for name in ("first_layer", "last_edited")
    }
    if loss:
        arrays |= {"clean_loss": empty("sink"), "loss": empty("sink", "edit")}
    return arrays


def _cells(rows: np.ndarray, plan: list[list[tuple[Edit, ...]]], n_labels: int, together: bool):
    """(edits of one run, [(sink, label index), ...] that are measured in it), in an order that shares resume points."""
    if together:
        return [(_joined([e for r in rows for e in plan[r][k]]), [(int(r), k) for r in rows]) for k in range(n_labels)]
    cells = [(plan[r][k], [(int(r), k)]) for r in rows for k in range(n_labels)]
    return sorted(cells, key=lambda cell: (first_edit(cell[0]), cell[1]))


def _changes_nothing(cell: tuple[Sequence[Edit], list]) -> bool:
    return all(edit.changes_nothing for edit in cell[0])


def _joined(edits: list[Edit]) -> tuple[Edit, ...]:
    """One position that is a sink twice (in two phases of the primary) is edited once in each layer."""
    seen: dict[tuple, Edit] = {}
    for edit in edits:
        seen.setdefault((edit.layer, edit.positions), edit)
    return tuple(seen.values())


def _chunks(cells: list, size: int):
    """Runs of cells that resume at one layer and position, at most `size` long: their rows share a batch."""
    chunk: list = []
    for cell in cells:
        same = chunk and first_edit(chunk[0][0]) == first_edit(cell[0])
        if chunk and (not same or len(chunk) >= size):
            yield chunk
            chunk = []
        chunk.append(cell)
    if chunk:
        yield chunk


def _row_budget(adapter: Adapter, n_positions: int) -> int:
    width = 6 * adapter.cfg.d_model + 3 * (adapter.cfg.d_mlp or 4 * adapter.cfg.d_model)
    return max(1, ROW_FLOATS // (n_positions * width))


def _note_run(
    arrays, members, table, clean: CleanRun, run: EditedRun, edits: Sequence[Edit], adapter: Adapter, min_queries: int
) -> None:
    for sink, label in members:
        _note(arrays, label, [sink], table, clean, run.columns, run.loss, adapter, min_queries, run.resid_post_chosen)
        arrays["first_layer"][1][sink, label] = first_edit(edits)[0]
        arrays["last_edited"][1][sink, label] = max((edit.layer for edit in edits), default=-1)


def _note(
    arrays, label, sinks, table, clean: CleanRun, columns, loss, adapter: Adapter, min_queries: int, resid_chosen=None
) -> None:
    """Write one run's outcomes for these sinks into the arrays; label None stands for the clean run."""
    scores = column_scores(columns, adapter.windows, min_queries).cpu().numpy()
    log_odds = column_log_odds(columns, adapter.windows, min_queries).cpu().numpy()
    if resid_chosen is None:
        resid_chosen = torch.stack([clean.resid_post(layer)[list(columns.chosen)] for layer in range(adapter.n_layers)])
    prefix = "clean_" if label is None else ""
    for sink in sinks:
        own, primary = (columns.chosen.index(int(table[c].iloc[sink])) for c in ("pos", "primary_pos"))
        where = (sink,) if label is None else (sink, label)
        for name, values in (
            ("score", scores[..., own]), ("log_odds", log_odds[..., own]), ("primary_score", scores[..., primary]),
            ("primary_log_odds", log_odds[..., primary]),
        ):  # fmt: skip
            arrays[f"{prefix}{name}"][1][where] = values
        resid = resid_chosen[:, own].float()
        clean_primary = torch.stack(
            [clean.resid_post(layer)[int(table["primary_pos"].iloc[sink])] for layer in range(adapter.n_layers)]
        )
        arrays[f"{prefix}norm"][1][where] = resid.norm(dim=-1).cpu().numpy()
        cosine = torch.nn.functional.cosine_similarity(resid, clean_primary.float(), dim=-1)
        arrays[f"{prefix}cosine"][1][where] = cosine.cpu().numpy()
        if loss is not None:
            tail = loss[int(table["pos"].iloc[sink]) : -1]
            arrays[f"{prefix}loss"][1][where] = tail.mean().item() if len(tail) else np.nan


def _several(values) -> tuple:
    """One value or several, as a tuple."""
    return tuple(values) if isinstance(values, Iterable) and not isinstance(values, str) else (values,)


def resolve_layers(model, layer, layers, forming: pd.Series | None = None) -> Callable[[pd.Series], tuple[int, ...]]:
    """What `layer=`/`layers=` mean for each sink: one layer, a joint set, or "forming", each sink's own.

    Raises InputError for none or both, an unknown word, or a layer out of range.
    """
    n_layers = model.cfg.n_layers
    if (layer is None) == (layers is None):
        raise InputError("give either layer= (a number or 'forming') or layers= (a joint set), not both.")
    if isinstance(layer, str):
        if layer != "forming":
            raise InputError(f"layer {layer!r} is unknown: give a number or 'forming'.")
        if forming is None:
            raise InputError("forming layers are not known: pass forming=layer_map(...).forming().")
        _check_layers(forming, n_layers)
        own = [int(one) for one in forming]
        return lambda row: (own[cast(int, row.name)],)  # the table's index counts its rows
    joint = (layer,) if layers is None else _several(layers)
    if layers is None and isinstance(layer, Iterable):
        raise InputError(f"layer {layer!r} names several: pass layers={layer!r} for a joint set.")
    if not joint or len(set(joint)) < len(joint):
        raise InputError(f"layers {joint}: name each layer once, and at least one.")
    _check_layers(joint, n_layers)
    return lambda row: tuple(int(one) for one in joint)


def _check_layers(layers, n_layers: int) -> None:
    for one in layers:
        if isinstance(one, bool) or not isinstance(one, int | np.integer) or not 0 <= one < n_layers:
            raise InputError(f"layer {one!r} is out of range: the model has layers 0..{n_layers - 1}.")


def _prepare(model, tokens, sinks: Sinks | None, layer, layers, forming: pd.Series | None, options: Mapping):
    """Check all arguments before anything is run, then find what was not given: (tokens, sinks, layers of each sink)."""
    if unknown := set(options) - set(inspect.signature(measure).parameters):
        raise InputError(f"option {sorted(unknown)[0]!r} is unknown: see measure() for those that there are.")
    waits = isinstance(layer, str) and layer == "forming" and layers is None and forming is None
    adapter = adapt(model)
    layers_of = None if waits else resolve_layers(model, layer, layers, forming)
    _check_options(adapter, **options)
    given, tokens = tokens, as_tokens(model, tokens, options.get("attention_mask"))
    shared = {name: options[name] for name in ("clean_cache", "path", "verbose", "attention_mask") if name in options}
    sinks = find_sinks(model, given, **shared) if sinks is None else sinks
    table = _check_sinks(sinks, tokens)
    if layer == "forming" and forming is not None and len(forming) != len(sinks):
        raise InputError(f"forming holds {len(forming)} layers for {len(sinks)} sinks: map the sinks that are treated.")
    if waits:
        _check_late_sinks(table, tokens, options.get("min_queries", MIN_QUERIES))
        shared |= {name: options[name] for name in ("batch_size", "min_queries") if name in options}
        forming = layer_map(model, given, sinks, layers=range(int(table["l_end"].max()) + 1), **shared).forming()
        layers_of = resolve_layers(model, layer, layers, forming)
    return tokens, sinks, layers_of


def _check_late_sinks(table: pd.DataFrame, tokens: Tokens, min_queries: int) -> None:
    """Raises InputError, before a layer map is run, for a sink whose score would be undefined in every layer."""
    for prompt, pos in zip(table["prompt"], table["pos"].tolist(), strict=True):
        later = len(tokens.ids[tokens.names.index(prompt)]) - 1 - pos
        if later < min_queries:
            raise InputError(
                f"the sink at position {pos} of prompt {prompt!r} has {later} later queries, its score needs {min_queries}: "
                "leave it out (Sinks.table holds NaN scores there), or lower min_queries."
            )


def layer_map(
    model, tokens, sinks: Sinks | None = None, *, intervention: str | Callable[[Contribution], Contribution] = "zero",
    layers: Sequence[int] | None = None, **options,
) -> Effect:  # fmt: skip
    """One intervention tried at every layer (or `layers`), one layer and one sink per run: which MLPs form the sinks?

    `intervention`: "zero" or a function of the contribution [pos, d_model]. The axis `edit` is the edited layer. For the
    other options see `measure`. Raises InputError.
    """
    if isinstance(intervention, str) and intervention != "zero":
        raise InputError(f"intervention {intervention!r} is unknown: use 'zero' or a function of the contribution.")
    layers = tuple(range(adapt(model).n_layers)) if layers is None else _several(layers)
    _, sinks, _ = _prepare(model, tokens, sinks, None, layers, None, options)
    name = "zero" if isinstance(intervention, str) else getattr(intervention, "__name__", "custom")

    def edits(label: int, row: pd.Series) -> tuple[Edit, ...]:
        if isinstance(intervention, str):
            return (zero(label, int(row.pos)),)
        return (Edit(label, (int(row.pos),), intervention, name),)

    return measure(
        model,
        tokens,
        sinks,
        [int(layer) for layer in layers],
        edits,
        what="layer_map",
        settings={"intervention": name},
        **options,
    )


def ablate(
    model, tokens, sinks: Sinks | None = None, *, layer=None, layers: Sequence[int] | None = None, method: str = "zero",
    forming: pd.Series | None = None, **options,
) -> Effect:  # fmt: skip
    """Take the contribution of one MLP, or of a joint set, away at each sink.

    `method`: "zero", or "mean": the mean contribution of that MLP over all ordinary tokens of these prompts. `layer`: a
    number or "forming" (each sink's own; found by a layer map unless `forming` is given); `layers`: a joint set. The
    axis `edit` has one label, the method. For the other options see `measure`. Raises InputError.
    """
    if method not in ("zero", "mean"):
        raise InputError(f"method {method!r} is unknown: use 'zero' or 'mean'.")
    layers = None if layers is None else _several(layers)
    _, sinks, layers_of = _prepare(model, tokens, sinks, layer, layers, forming, options)
    shared = {name: options[name] for name in ("clean_cache", "path", "attention_mask") if name in options}
    donors = mean_contributions(model, tokens, sinks, **shared) if method == "mean" else None

    def edits(label: str, row: pd.Series) -> tuple[Edit, ...]:
        if donors is None:
            return tuple(zero(one, int(row.pos)) for one in layers_of(row))
        return tuple(replace(one, int(row.pos), donors[one], "mean") for one in layers_of(row))

    return measure(
        model,
        tokens,
        sinks,
        [method],
        edits,
        what="ablate",
        settings={"layers": str(layer if layers is None else list(layers))},
        **options,
    )


def dose_response(
    model, tokens, sinks: Sinks | None = None, *, layer=None, layers: Sequence[int] | None = None, factors: Sequence[float] = FACTORS,
    forming: pd.Series | None = None, **options,
) -> Effect:  # fmt: skip
    """Rescale the contribution of one MLP, or of a joint set by one common factor, at each sink.

    The axis `edit` is the factor. `layer`, `layers`, `forming` as in `ablate`; other options as in `measure`. Raises
    InputError for a negative, NaN or infinite factor, or one given twice.
    """
    factors = [check_factor(factor) for factor in _several(factors)]
    if not factors or len(set(factors)) < len(factors):
        raise InputError(f"factors {factors}: give each once, and at least one.")
    layers = None if layers is None else _several(layers)
    _, sinks, layers_of = _prepare(model, tokens, sinks, layer, layers, forming, options)

    def edits(factor: float, row: pd.Series) -> tuple[Edit, ...]:
        return tuple(rescale(one, int(row.pos), factor) for one in layers_of(row))

    settings = {"layers": str(layer if layers is None else list(layers))}
    return measure(model, tokens, sinks, factors, edits, what="dose_response", settings=settings, **options)


def mean_contributions(
    model, tokens, sinks: Sinks, *, skip_first: int = 4, attention_mask=None, clean_cache=None, path: str = "auto"
) -> Float[Tensor, "layer d_model"]:  # fmt: skip
    """Mean contribution of every MLP over the ordinary tokens of these prompts: neither sinks nor the first `skip_first`."""
    tokens = as_tokens(model, tokens, attention_mask)
    total, count = None, 0
    for row, (name, ids) in enumerate(zip(tokens.names, tokens.ids, strict=True)):
        mask = None if attention_mask is None else torch.as_tensor(attention_mask)[row]
        clean = run_clean(model, ids, clean_cache=clean_cache, row=row, mask=mask, path=path)
        keep = torch.ones(len(ids), dtype=torch.bool)
        keep[:skip_first] = False
        keep[sinks.table.loc[sinks.table["prompt"] == name, "pos"].tolist()] = False
        own = clean.contribution[:, keep].double().sum(dim=1)
        total, count = own if total is None else total + own, count + int(keep.sum())
    if not count:
        raise InputError("no ordinary tokens are left to take a mean over: give longer prompts.")
    return (total / count).to(clean.contribution.dtype)
