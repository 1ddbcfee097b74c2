"""Mass accounts: where the attention went that a sink lost, by groups of positions, over one common query set.

A query's attention sums to 1, so what one group loses another gains: the changes of the groups sum to 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import xarray as xr
from tqdm.auto import tqdm

from sink_circuits import arguments, statistics
from sink_circuits.adapters import Adapter, adapt
from sink_circuits.clean_runs import run_clean
from sink_circuits.detection import Sinks
from sink_circuits.edited_runs import first_edit, run_edited
from sink_circuits.edits import Contribution
from sink_circuits.experiments import at_layers, prepare_removal
from sink_circuits.groups import KeyGroups
from sink_circuits.measurement import (
    EditsOf,
    change_nothing,
    check_handed_on,
    check_known,
    check_labels,
    check_options,
    check_parts,
    check_sinks,
    chunks,
    plan_of,
    rows_per_batch,
)
from sink_circuits.paths import OPTIONS
from sink_circuits.prompts import as_tokens
from sink_circuits.results import Manifest, read_result, write_result
from sink_circuits.scores import MIN_QUERIES

GROUPS = ("treated", "primary", "other sinks", "before", "after", "self", "learned sink")
"""Every key is in one group: the treated position; the primary sink; the other sinks of the table; ordinary positions before
the treated one; those after it; the query's own position, whatever else it is; the head's learned sink (GPT-OSS)."""
_SINKS_AT_ONCE = 16
"""Sinks whose clean masses are taken in one pass: each widens the values by five columns."""


def key_groups(n_positions: int, treated: int, primary: int, others: Iterable[int] = ()) -> KeyGroups:
    """`GROUPS` for one sink of a text, and the query set of its account.

    Queries are those later than both the treated position and the primary that can see the treated one: where the primary
    stands before it, the queries of its sink score, so that the mass of "treated" is that score.
    """
    of_key = torch.where(torch.arange(n_positions) < treated, GROUPS.index("before"), GROUPS.index("after"))
    of_key[list(others)] = GROUPS.index("other sinks")
    of_key[primary] = GROUPS.index("primary")
    of_key[treated] = GROUPS.index("treated")
    return KeyGroups(of_key, GROUPS.index("self"), max(treated, primary) + 1, treated)


@dataclass(frozen=True)
class MassAccount:
    """Mean attention that each group of positions gets, clean and edited, over one query set per sink and layer.

    `data` (xarray): `mass` [sink, edit, layer, head, group] and `clean_mass` [sink, layer, head, group], each in [0, 1] and
    summing to 1 over `GROUPS`; NaN in layers with fewer than `min_queries` queries in the set (`n_queries` [sink,
    layer]). Layers up to the first edited one hold the clean values exactly. `reading` [sink, edit, layer]: the layers that
    read the sink above the edit, l_start+1..l_end+1. `table`: one row per sink.
    """

    data: xr.Dataset
    table: pd.DataFrame
    manifest: Manifest

    def change(self) -> xr.DataArray:
        """Edited minus clean, [sink, edit, layer, head, group]; sums to 0 over the groups."""
        return self.data["mass"] - self.data["clean_mass"]

    def over_lifetime(self, outcome: str = "mass", what: str = "effect") -> xr.DataArray:
        """Mean over heads and over the layers that read the sink above the edit, [sink, edit, group]; NaN where there are none.

        `outcome`: "mass", the only one. `what`: "effect" (the change), "edited" or "clean". Raises InputError for others.
        """
        arguments.one_of(outcome, "outcome", ("mass",), "there is {}")
        values = {
            "effect": self.change(),
            "edited": self.data["mass"],
            "clean": self.data["clean_mass"].broadcast_like(self.data["mass"]),
        }
        arguments.one_of(what, "what", values, "use 'effect', 'edited' or 'clean'")
        return values[what].mean("head").where(self.data["reading"]).mean("layer").transpose("sink", "edit", "group")

    def summary(self, *, confidence: float = 0.95) -> pd.DataFrame:
        """One row per edit and group: means over prompts over the lifetime, the change with its bootstrap interval.

        Columns: edit, group, clean, edited, change, low, high, n_prompts, n_sinks.
        """
        rows, prompts = [], self.table["prompt"]
        change, clean = self.over_lifetime(), self.over_lifetime(what="clean")
        for edit in self.data["edit"].values:
            for group in self.data["group"].values:
                own, before = (x.sel(edit=edit, group=group).to_numpy() for x in (change, clean))
                name = f"mass/{group}/{edit}"
                estimate = statistics.bootstrap_over_prompts(own, prompts, name=name, confidence=confidence)
                means = statistics.prompt_means(np.where(np.isnan(own), np.nan, before), prompts)
                mean = float(means.mean()) if len(means) else np.nan
                rows.append(
                    {
                        "edit": edit, "group": group, "clean": mean, "edited": mean + estimate.mean,
                        "change": estimate.mean, "low": estimate.low, "high": estimate.high, "n_prompts": estimate.n,
                        "n_sinks": int(np.isfinite(own).sum()),
                    }
                )  # fmt: skip
        return pd.DataFrame(rows)

    def to_dataframe(self) -> pd.DataFrame:
        """Long format, one row per sink, edit, layer, head and group: edited, clean, change and n_queries."""
        change = self.change()
        arrays = {
            "edited": self.data["mass"], "clean": self.data["clean_mass"].broadcast_like(change), "change": change,
            "n_queries": self.data["n_queries"].broadcast_like(change),
        }  # fmt: skip
        frame = xr.Dataset(arrays).to_dataframe().reset_index()
        columns = ["sink", "edit", "layer", "head", "group", *arrays]
        return frame[columns].join(self.table[["prompt", "pos", "token", "kind", "l_start", "l_end"]], on="sink")

    def plot(self):
        """Where the attention mass went, by group and layer (plotly)."""
        from sink_circuits import figures

        return figures.mass_figure(self)

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """One safetensors file, whole or not at all. Raises ResultError when `path` exists or cannot be written."""
        write_result(path, "mass", self.data, self.table, self.manifest, overwrite=overwrite)

    @staticmethod
    def load(path: str | Path) -> MassAccount:
        """Read what `save` wrote. Raises ResultError for any other file."""
        return MassAccount(*read_result(path, "mass", "a mass account")[:3])

    def __repr__(self) -> str:
        head = f"MassAccount({len(self.table)} sinks in {self.table['prompt'].nunique()} prompts)"
        return f"{head}\n{self.summary().to_string(float_format=lambda x: f'{x:.4g}')}"


def mass_account(
    model, tokens, sinks: Sinks | None = None, *, layer=None, layers: Sequence[int] | None = None, forming: pd.Series | None = None,
    intervention: str | Callable[[Contribution], Contribution] = "zero", found: Sinks | None = None, **options,
) -> MassAccount:  # fmt: skip
    """Where the attention goes when an intervention is made on one MLP, or a joint set, at each sink.

    `intervention`, `layer`, `layers`, `forming` as in `ablate`. `found`: all sinks that are to count as such, where `sinks` are only
    those to treat (for "mean" looked for when None, the groups still being of those given). The axis `edit` has one label, the
    intervention's name. Options (`paths.OPTIONS`) as in `measure`. Raises InputError.
    """
    check_handed_on(options, OPTIONS)
    if found is not None:
        arguments.instance(found, "found", Sinks, "pass what find_sinks returns")
    name, treated, made = prepare_removal(model, tokens, sinks, layer, layers, forming, intervention, found, options)
    edits = at_layers(treated.layers_of, made)
    settings = {"layers": treated.layers_said, "intervention": name}
    return measure_mass(model, tokens, treated.sinks, [name], edits, found=found, settings=settings, **options)


def measure_mass(
    model, tokens, sinks: Sinks, labels: Sequence, edits_of: EditsOf, *, found: Sinks | None = None, min_queries: int = MIN_QUERIES,
    batch_size: int | None = None, memory: float | None = None, attention_mask=None, clean_cache=None, path: str = "auto",
    verbose: bool = True, settings: Mapping | None = None,
) -> MassAccount:  # fmt: skip
    """Mass accounts of any edits: `edits_of(label, row of the sink table)`, one sink per run; labels name the axis `edit`.

    A run without edits, or whose edits change nothing (a rescaling by 1), is the clean one: copied, not run. All edits are
    made and checked before the first forward pass. Raises InputError.
    """
    adapter = adapt(model)
    check_options(adapter, min_queries, batch_size, path, memory=memory, settings=settings, verbose=verbose)
    labels = check_labels(labels)
    tokens = as_tokens(model, tokens, attention_mask)
    table = check_sinks(sinks, tokens, adapter.n_layers)
    known = table if found is None else pd.concat([table, check_known(found, tokens).table], ignore_index=True)
    plan = plan_of(edits_of, labels, table)
    for prompt, cells in zip(table["prompt"], plan, strict=True):
        for cell in cells:
            check_parts(cell, adapter, len(tokens.ids[tokens.names.index(prompt)]))
    rows_of = rows_per_batch(adapter, tokens, table, path, memory)
    shape = (adapter.n_layers, adapter.n_heads, len(GROUPS))
    clean_mass = np.full((len(table), *shape), np.nan, dtype=np.float32)
    mass = np.full((len(table), len(labels), *shape), np.nan, dtype=np.float32)
    first = np.array([[first_edit(cell)[0] for cell in cells] for cells in plan])
    n_queries = np.zeros((len(table), adapter.n_layers), dtype=np.int64)
    used = path
    bar = tqdm(total=len(table) * len(labels), desc="mass accounts", unit="run", disable=not verbose)
    for index, (prompt, ids) in enumerate(zip(tokens.names, tokens.ids, strict=True)):
        rows = np.flatnonzero(table["prompt"] == prompt)
        if not len(rows):
            continue
        mask = None if attention_mask is None else torch.as_tensor(attention_mask)[index]
        clean = run_clean(model, ids, chosen=(0,), clean_cache=clean_cache, row=index, mask=mask, path=path)
        others_here = known.loc[known["prompt"] == prompt, "pos"].tolist()
        groups = {
            int(sink): key_groups(
                len(ids), int(table["pos"].iloc[sink]), int(table["primary_pos"].iloc[sink]), others_here
            )
            for sink in rows
        }
        for sink, own in groups.items():
            n_queries[sink] = [len(own.queries(window)) for window in adapter.windows]
        for low in range(0, len(rows), _SINKS_AT_ONCE):
            some = rows[low : low + _SINKS_AT_ONCE]
            (run,) = run_edited(model, clean, [()], groups=[[groups[int(sink)] for sink in some]], path=path)
            clean_mass[some] = torch.stack(run.mass).numpy()
        mass[rows] = clean_mass[rows][:, None]
        treated = [(plan[sink][label], (int(sink), label)) for sink in rows for label in range(len(labels))]
        treated = [(edits, at) for edits, at in treated if not change_nothing((edits, []))]
        treated.sort(key=lambda cell: (first_edit(cell[0]), cell[1]))
        for chunk in chunks(treated, batch_size or rows_of[prompt]):
            asked = [[groups[sink]] for _, (sink, _) in chunk]
            runs = run_edited(model, clean, [edits for edits, _ in chunk], groups=asked, path=path)
            for run, (_, (sink, label)) in zip(runs, chunk, strict=True):
                above = first[sink, label] + 1
                mass[sink, label, above:] = run.mass[0][above:].numpy()
        used = run.path
        bar.update(len(rows) * len(labels))
    bar.close()
    few = n_queries < min_queries
    clean_mass[few], mass[np.repeat(few[:, None], len(labels), axis=1)] = np.nan, np.nan
    manifest = Manifest.of(
        adapter,
        tokens,
        what="mass",
        path=used,
        min_queries=min_queries,
        found=dict(sinks.manifest.settings),
        **(settings or {}),
    )
    data = _dataset(adapter, labels, table, mass, clean_mass, first, n_queries)
    return MassAccount(data, table, manifest)


def _dataset(adapter: Adapter, labels, table: pd.DataFrame, mass, clean_mass, first, n_queries) -> xr.Dataset:
    layer = np.arange(adapter.n_layers)
    start, end = (table[name].to_numpy()[:, None, None] for name in ("l_start", "l_end"))
    reading = (layer > start) & (layer <= end + 1) & (layer > first[:, :, None])
    arrays = {
        "mass": (("sink", "edit", "layer", "head", "group"), mass),
        "clean_mass": (("sink", "layer", "head", "group"), clean_mass),
        "reading": (("sink", "edit", "layer"), reading),
        "first_layer": (("sink", "edit"), first),
        "n_queries": (("sink", "layer"), n_queries),
    }
    coords = {
        "sink": np.arange(len(table)), "edit": list(labels), "layer": layer, "head": np.arange(adapter.n_heads),
        "group": list(GROUPS),
    }  # fmt: skip
    return xr.Dataset(arrays, coords=coords)
