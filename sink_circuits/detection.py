"""Detection: which tokens are in sink state, from the geometry of the residual stream alone.

`robust` follows this package's definitions: centred cosine with the primary and norm against the layer's median, at any
depth, in every phase of the primary. `official` is the published procedure, exactly (Wong et al., 2512.22213).
Attention is the outcome that experiments measure, so it never decides; it stands beside each sink as evidence.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from sink_circuits import arguments
from sink_circuits.adapters import adapt
from sink_circuits.arguments import MOST, is_number, is_whole, shown
from sink_circuits.clean_runs import CleanRun, resolve_path, run_clean
from sink_circuits.errors import InputError, ResultError
from sink_circuits.memory import check_memory, need_of, rows_within
from sink_circuits.prompts import Tokens, as_tokens, token_texts
from sink_circuits.results import Manifest, frame_digest, write_whole
from sink_circuits.scores import MIN_QUERIES, scores_of


@dataclass(frozen=True)
class Thresholds:
    """What counts as sink state, and as a sink.

    `cosine`: centred cosine with the primary, above. `norm_ratio`: norm over the layer's median norm, above.
    `min_lifetime`: layers a run of sink states must last. `bridge`: gaps of so many layers inside a run are bridged.
    `first_positions`: candidates for the primary (None: 0..3; for `official` 0, 1, as without a chat template).
    `neighbours`: ordinary tokens within this distance are a sink's comparison. `phase_fall`, `phase_rise`: the primary's
    phase also ends, without leaving sink state, when its norm ratio falls below its peak by the one factor and then rises
    from the trough by the other.

    Defaults were set on the bundled models, where attention confirms them: on Gemma 3 tokens with a norm of 1.5 to 2.5
    medians draw no more attention than ordinary ones, those above 2.5 draw 8 to 280 times as much; there the primary
    falls from 25 to 5 and comes back to 17 medians, which is one phase.
    """

    cosine: float = 0.9
    norm_ratio: float = 2.5
    min_lifetime: int = 2
    bridge: int = 1
    first_positions: tuple[int, ...] | None = None
    min_queries: int = MIN_QUERIES
    neighbours: int = 32
    phase_fall: float = 4.0
    phase_rise: float = 8.0

    def __post_init__(self):
        for name, low, high in (
            ("cosine", -1.0, 1.0), ("norm_ratio", 0.0, float("inf")), ("min_lifetime", 1, float("inf")), ("bridge", 0, float("inf")),
            ("min_queries", 1, float("inf")), ("neighbours", 1, float("inf")), ("phase_fall", 1.0, float("inf")),
            ("phase_rise", 1.0, float("inf")),
        ):  # fmt: skip
            value = getattr(self, name)
            if not is_number(value):
                raise InputError(f"threshold {name} = {shown(value)} is not a number.")
            if not low <= value <= high:
                raise InputError(f"threshold {name} = {value} is out of range: {low} to {high}.")
            if not math.isfinite(value):
                raise InputError(f"threshold {name} = {value} is not finite: nothing would be found, give a number.")
            if isinstance(type(self).__dataclass_fields__[name].default, int) and int(value) != value:
                raise InputError(f"threshold {name} = {value} is not a whole number: it counts layers or tokens.")
            if value > MOST:
                raise InputError(
                    f"threshold {name} = {shown(value)} is out of range: nothing would be found above {MOST}."
                )
            counts = isinstance(type(self).__dataclass_fields__[name].default, int)
            object.__setattr__(self, name, int(value) if counts else float(value))
        first = self.first_positions
        if first is None:
            return
        if not hasattr(first, "__len__"):
            raise InputError(f"first_positions = {shown(first)}: give several positions, such as ({shown(first)},).")
        first = arguments.several(first, "first_positions", empty=True)
        if not first or any(not is_whole(p) or p < 0 for p in first):
            raise InputError(f"first_positions = {shown(first)}: name at least one position, counted from 0.")
        if len(set(first)) < len(first):
            raise InputError(f"first_positions = {first}: name each once.")
        object.__setattr__(self, "first_positions", tuple(int(p) for p in first))


COLUMNS = (
    "prompt", "pos", "token_id", "token", "kind", "l_start", "l_end", "lifetime", "phase_start", "primary_pos", "cosine", "norm",
    "norm_ratio", "score", "score_ordinary", "score_ratio",
)  # fmt: skip


@dataclass(frozen=True)
class Sinks:
    """Found sinks, one row each: a run of layers in which a token is in sink state.

    Columns: prompt (id), pos, token_id, token, kind ("primary", "secondary", "primary-like"), l_start, l_end, lifetime,
    phase_start (where the primary's phase began), primary_pos; evidence: cosine (mean centred cosine over the
    lifetime), norm and norm_ratio (largest over the lifetime); beside it: score (mean over heads and over the layers
    that read the sink, l_start+1..l_end+1), score_ordinary (median of the ordinary tokens nearby, same layers) and
    their ratio. `official` results hold NaN where the published procedure says nothing.
    """

    table: pd.DataFrame
    prompts: tuple[str, ...]
    manifest: Manifest

    def __len__(self) -> int:
        return len(self.table)

    def to_dataframe(self) -> pd.DataFrame:
        return self.table.copy()

    def _repr_html_(self) -> str:
        return self.table.to_html(escape=True, float_format=lambda x: f"{x:.3g}")

    def __repr__(self) -> str:
        kinds = ", ".join(f"{n} {kind}" for kind, n in self.table["kind"].value_counts().items()) or "none"
        return f"Sinks in {len(self.prompts)} prompts: {kinds}\n{self.table.to_string(max_rows=40, float_format=lambda x: f'{x:.3g}')}"

    def select(self, *kinds: str) -> Sinks:
        """Only these kinds. Raises InputError for an unknown one."""
        for kind in kinds:
            arguments.one_of(kind, "kind", ("bos_sink", "noise", "primary", "primary-like", "secondary"))
        return Sinks(self.table[self.table["kind"].isin(kinds)].reset_index(drop=True), self.prompts, self.manifest)

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write the table as parquet with the manifest inside; whole or not at all. Raises ResultError."""
        frame = self.table.copy()
        meta = json.dumps({"manifest": self.manifest.to_dict(), "prompts": list(self.prompts)})
        frame.attrs = {"sink_circuits": meta, "sha256": frame_digest(frame, meta)}
        write_whole(path, lambda temporary: frame.to_parquet(temporary), overwrite=overwrite)

    @staticmethod
    def load(path: str | Path) -> Sinks:
        """Read what `save` wrote. Raises ResultError for a file that is not such a table."""
        from sink_circuits.results import read_parquet

        frame = read_parquet(path, COLUMNS)
        try:
            meta = json.loads(frame.attrs["sink_circuits"])
            prompts, manifest = tuple(meta["prompts"]), meta["manifest"]
        except (ValueError, KeyError, TypeError) as error:
            raise ResultError(f"{path} has metadata that cannot be read ({error!r}): make the result again.") from error
        frame.attrs = {}
        return Sinks(frame, prompts, Manifest.from_dict(manifest))


def check_table(table, columns: Sequence[str] = COLUMNS) -> pd.DataFrame:
    """A table of sinks as it is. Raises InputError for what is none: a column lacks, or holds no numbers where it should."""
    arguments.instance(table, "the sinks' table", pd.DataFrame, "pass what find_sinks returns")
    for name in columns:
        if name not in table:
            raise InputError(f"the sink table lacks the column {name!r}: pass what find_sinks returns.")
        numeric = pd.api.types.is_numeric_dtype(table[name]) and not pd.api.types.is_bool_dtype(table[name])
        if len(table) and name not in ("prompt", "token", "kind") and not numeric:
            raise InputError(f"the sink table's column {name!r} holds no numbers: pass what find_sinks returns.")
    return table


def find_sinks(
    model, tokens, *, method: str = "robust", thresholds: Thresholds | None = None, attention_mask=None, clean_cache=None,
    path: str = "auto", memory: float | None = None, verbose: bool = True, **changed,
) -> Sinks:  # fmt: skip
    """Find the attention sinks of every prompt.

    `method`: "robust" or "official". `memory`: GiB to use beside the model's weights (None: what is free).
    Thresholds may be given one by one: `find_sinks(model, tokens, cosine=0.8)`.
    Raises InputError for tokens or texts that do not fit, an unknown method, a threshold that is unknown or not the method's, or
    first positions none of which lies in a prompt; CacheError for a cache without the hooks needed; for `official`, InputError
    when the weights were processed (its residuals would not be the model's).
    """
    thresholds = thresholds_of(method, thresholds, **changed)
    arguments.flag(verbose, "verbose")
    adapter = adapt(model)
    tokens = as_tokens(model, tokens, attention_mask)
    _check_first_positions(thresholds.first_positions, tokens)
    if clean_cache is None:
        longest = max(map(len, tokens.ids))
        need = need_of(adapter, longest, n_chosen=0, path=resolve_path(adapter, path), resumable=False)
        rows_within(check_memory(memory), adapter, need, longest)
    if method == "official" and adapter.processed:
        raise InputError(
            f"official detection needs the published residuals, and this model's weights were processed ({', '.join(adapter.processed)}): "
            "load it without folding and centring."
        )
    rows: list[dict] = []
    bar = tqdm(tokens.ids, desc="finding sinks", unit="prompt", disable=not verbose or len(tokens) < 2)
    for index, ids in enumerate(bar):
        mask = None if attention_mask is None else torch.as_tensor(attention_mask)[index]
        clean = run_clean(model, ids, clean_cache=clean_cache, row=index, mask=mask, resumable=False, path=path)
        found = (
            robust_rows(clean, adapter.windows, thresholds)
            if method == "robust"
            else official_rows(model, clean, thresholds)
        )
        texts = token_texts(model, ids)
        rows += [
            {"prompt": tokens.names[index], "token_id": int(ids[r["pos"]]), "token": texts[r["pos"]], **r}
            for r in found
        ]
    manifest = Manifest.of(adapter, tokens, what=f"find_sinks:{method}", thresholds=thresholds, path=clean.path)
    table = pd.DataFrame(rows, columns=list(COLUMNS)).astype(_DTYPES)
    return Sinks(table, tokens.names, manifest)


_DTYPES = dict.fromkeys(
    ("pos", "token_id", "l_start", "l_end", "lifetime", "phase_start", "primary_pos"), "int64"
) | dict.fromkeys(("cosine", "norm", "norm_ratio", "score", "score_ordinary", "score_ratio"), "float64")


OFFICIAL_THRESHOLDS = ("first_positions", "min_queries", "neighbours")
"""What may be changed with `official`: where it looks for the BOS sink, and the evidence beside its sinks."""


def thresholds_of(method: str, thresholds: Thresholds | None = None, **changed) -> Thresholds:
    """`thresholds` (the defaults for None) with those in `changed`, as `find_sinks` uses them with this method.

    Raises InputError for an unknown method, a threshold that is unknown or out of range, or one that the published
    procedure fixes and that would be ignored with `official`.
    """
    arguments.one_of(method, "method", ("robust", "official"), "use 'robust' or 'official'")
    if thresholds is not None:
        arguments.instance(
            thresholds, "thresholds", Thresholds, "make it with Thresholds(cosine=0.9), or give them one by one"
        )
    default, known = Thresholds(), [field.name for field in fields(Thresholds)]
    if unknown := set(changed) - set(known):
        raise InputError(f"threshold {sorted(unknown)[0]!r} is unknown: there are {', '.join(known)}.")
    made = replace(thresholds or default, **changed)
    for name in known if method == "official" else ():
        value = getattr(made, name)
        if name not in OFFICIAL_THRESHOLDS and (name in changed or value != getattr(default, name)):
            raise InputError(
                f"threshold {name} = {value} does not belong to official detection, which is the published procedure "
                "unchanged: leave it out, or use the robust method."
            )
    return made


def _check_first_positions(first: Sequence[int] | None, tokens: Tokens) -> None:
    """Raises InputError for a prompt in which no candidate lies: it would look as if it had no sinks."""
    for name, ids in zip(tokens.names, tokens.ids, strict=True):
        if first and min(first) >= len(ids):
            raise InputError(
                f"prompt {name!r} has {len(ids)} tokens, and no first position ({', '.join(map(str, first))}) lies in it: "
                "name one that does, counted from 0."
            )


@dataclass(frozen=True)
class Geometry:
    """What the sink state is read from, for every layer and position of one text.

    `norm`: of resid_post. `norm_ratio`: over the layer's median norm. `cosine`: of resid_post less the layer's
    coordinatewise median over positions, with the primary's. All [layer, pos].
    """

    norm: Float[Tensor, "layer pos"]
    norm_ratio: Float[Tensor, "layer pos"]
    cosine: Float[Tensor, "layer pos"]


def geometry_of(clean: CleanRun, primary: int) -> Geometry:
    """Geometry against the token at position `primary`, on the CPU: it is looked at entry by entry. A token of norm 0 has cosine 0."""
    n_layers = len(clean.base)
    norms, cosines = [], []
    for layer in range(n_layers):
        resid = clean.resid_post(layer).float()
        norms.append(resid.norm(dim=-1))
        centred = resid - resid.median(dim=0).values
        cosines.append(
            torch.nn.functional.cosine_similarity(centred, centred[primary : primary + 1], dim=-1, eps=1e-12)
        )
    norm = torch.stack(norms).cpu()
    return Geometry(norm, norm / norm.median(dim=-1, keepdim=True).values.clamp(min=1e-12), torch.stack(cosines).cpu())


def primary_direction(
    clean: CleanRun, layer: int, primary: int | Sinks | pd.Series | None = None, *, raw: bool = False
) -> Float[Tensor, " d_model"]:
    """Unit vector of resid_post[layer] at the primary, after subtracting the tokens' median (`raw`: as it is).

    `primary`: a position; a row of a sink table, or sinks of this one prompt, for their own primary; None to look for it in
    this run, as `find_sinks` does. Raises InputError where there is none, and for sinks of several prompts.
    """
    arguments.instance(clean, "clean", CleanRun, "make it with run_clean(model, tokens)")
    layer = arguments.whole(layer, "layer", high=len(clean.base) - 1)
    arguments.flag(raw, "raw")
    primary = arguments.whole(_primary_of(clean, primary), "primary", high=clean.n_positions - 1)
    resid = clean.resid_post(layer).float()
    vector = resid[primary] if raw else resid[primary] - resid.median(dim=0).values
    return vector / vector.norm().clamp(min=1e-12)


def _primary_of(clean: CleanRun, primary: int | Sinks | pd.Series | None) -> int:
    if isinstance(primary, Sinks):
        places = primary.table[["prompt", "primary_pos"]].drop_duplicates()
        if len(places) != 1:
            raise InputError(
                f"the sinks have {len(places)} primaries, of {places['prompt'].nunique()} prompts: pass those of this run's prompt, "
                "or one row of the table."
            )
        primary = int(places["primary_pos"].iloc[0])
    elif isinstance(primary, pd.Series):
        if "primary_pos" not in primary:
            raise InputError(
                f"a row with {arguments.shown(list(primary.index))} has no primary_pos: pass a row of a sink table."
            )
        primary = arguments.whole(primary["primary_pos"], "primary_pos")
    elif primary is None:
        norm = torch.stack([clean.resid_post(one).float().norm(dim=-1) for one in range(len(clean.base))])
        ratio = norm / norm.median(dim=-1, keepdim=True).values.clamp(min=1e-12)
        primary = find_primary(ratio, Thresholds())
        if primary is None:
            raise InputError(
                "no primary sink was found in this run: say which position, primary_direction(clean, layer, 0)."
            )
    return primary


def layer_runs(state: Sequence[bool], bridge: int) -> list[tuple[int, int]]:
    """Runs (first, last) of True, gaps of at most `bridge` bridged: layer_runs([1,1,0,1,0,0,1], 1) = [(0, 3), (6, 6)]."""
    layers = np.flatnonzero(np.asarray(state, dtype=bool))
    if not len(layers):
        return []
    breaks = np.flatnonzero(np.diff(layers) > bridge + 1)
    firsts, lasts = np.r_[0, breaks + 1], np.r_[breaks, len(layers) - 1]
    return [(int(layers[a]), int(layers[b])) for a, b in zip(firsts, lasts, strict=True)]


def find_primary(norm_ratio: Float[Tensor, "layer pos"], thresholds: Thresholds) -> int | None:
    """The candidate first position that is largest over its life: the greatest summed norm ratio over its sink layers.

    None when no candidate's norm stays above the threshold for `min_lifetime` layers. Ties go to the earliest.
    """
    best, best_size = None, 0.0
    for position in sorted(set(thresholds.first_positions or range(4))):
        if position >= norm_ratio.shape[1]:
            continue  # a text shorter than the usual four candidates
        ratios = norm_ratio[:, position]
        runs = layer_runs((ratios > thresholds.norm_ratio).tolist(), thresholds.bridge)
        size = sum(ratios[a : b + 1].sum().item() for a, b in runs if b - a + 1 >= thresholds.min_lifetime)
        if size > best_size:
            best, best_size = position, size
    return best


def split_phases(ratios: Sequence[float], first: int, last: int, thresholds: Thresholds) -> list[tuple[int, int]]:
    """One run of the primary's sink states, cut where its norm ratio falls far and rises far again.

    A phase is one rise and what follows until it falls; the new one begins in the layer that has risen from the trough
    by `phase_rise`. A trough of no more than `bridge` layers on end is a gap, and bridged.
    """
    phases, start, peak = [], first, ratios[first]
    trough: list[float] = []
    for layer in range(first, last + 1):
        ratio = ratios[layer]
        if len(trough) > thresholds.bridge and ratio > min(trough) * thresholds.phase_rise:
            phases.append((start, layer - 1))
            start, peak, trough = layer, ratio, []
        else:
            trough = [*trough, ratio] if ratio * thresholds.phase_fall < peak else []
        peak = max(peak, ratio)
    return [*phases, (start, last)]


def robust_rows(clean: CleanRun, windows: Sequence[int | None], thresholds: Thresholds) -> list[dict]:
    """Sinks of one text by this package's definitions; see `Sinks` for the columns. Empty when there is no primary.

    A phase of the primary is one run of its sink states. A sink whose run begins in a phase is "secondary" when it
    begins strictly later than the phase, "primary-like" when in the same layer.
    """
    norm = torch.stack([clean.resid_post(layer).float().norm(dim=-1) for layer in range(len(clean.base))]).cpu()
    _check_finite(norm)
    ratio = norm / norm.median(dim=-1, keepdim=True).values.clamp(min=1e-12)
    primary = find_primary(ratio, thresholds)
    if primary is None:
        return []
    geometry = geometry_of(clean, primary)
    primary_state = geometry.norm_ratio[:, primary] > thresholds.norm_ratio
    phases = [
        phase
        for first, last in layer_runs(primary_state.tolist(), thresholds.bridge)
        if last - first + 1 >= thresholds.min_lifetime
        for phase in split_phases(geometry.norm_ratio[:, primary].tolist(), first, last, thresholds)
    ]
    state: Bool[Tensor, "layer pos"] = (
        (geometry.cosine > thresholds.cosine) & (geometry.norm_ratio > thresholds.norm_ratio) & primary_state[:, None]
    )
    scores = scores_of(clean, windows, min_queries=thresholds.min_queries).mean(dim=1).cpu()
    ever = state.any(dim=0)
    rows = []
    for position in ever.nonzero().flatten().tolist():
        runs = phases if position == primary else layer_runs(state[:, position].tolist(), thresholds.bridge)
        for first, last in runs:
            if position != primary and last - first + 1 < thresholds.min_lifetime:
                continue
            phase = max((p for p in phases if p[0] <= first), default=None)
            if phase is None:
                continue
            kind = "primary" if position == primary else "secondary" if first > phase[0] else "primary-like"
            life = slice(first, last + 1)
            rows.append(
                {
                    "pos": position, "kind": kind, "l_start": first, "l_end": last, "lifetime": last - first + 1,
                    "phase_start": phase[0], "primary_pos": primary,
                    "cosine": geometry.cosine[life, position].mean().item(),
                    "norm": geometry.norm[life, position].max().item(),
                    "norm_ratio": geometry.norm_ratio[life, position].max().item(),
                    **score_evidence(scores, position, first, last, ever, thresholds.neighbours),
                }
            )  # fmt: skip
    return rows


def _check_finite(norm: Float[Tensor, "layer pos"]) -> None:
    """Half precision overflows at massive activations; NaN compares as False and would look like "no sinks"."""
    if not norm.isfinite().all():
        layer, position = (~norm.isfinite()).nonzero()[0].tolist()
        raise InputError(
            f"the residual stream of layer {layer} is not finite at position {position}: load the model in float32."
        )


def score_evidence(
    scores: Float[Tensor, "layer pos"],
    position: int,
    first: int,
    last: int,
    ever_sink: Bool[Tensor, " pos"],
    neighbours: int,
) -> dict[str, float]:
    """Mean score over the layers that read resid_post[first..last], and the median of ordinary tokens nearby."""
    layers = slice(first + 1, min(last + 2, len(scores)))
    own = scores[layers, position].mean().item() if first + 1 < len(scores) else float("nan")
    low, high = max(0, position - neighbours), min(scores.shape[1], position + neighbours + 1)
    ordinary = [p for p in range(low, high) if not ever_sink[p]]
    around = scores[layers][:, ordinary].mean(dim=0)
    around = around[around.isfinite()]
    other = around.median().item() if len(around) else float("nan")
    return {"score": own, "score_ordinary": other, "score_ratio": own / other if other > 0 else float("nan")}


# --------------------------------------------------------------------------------------------------- official
@dataclass(frozen=True)
class OfficialResult:
    """What the published procedure says of one text: the BOS sink, the layers looked at, and every candidate sink.

    `layers[pos]`: the layers (ascending) in which |cos| with the BOS sink exceeds 0.9; `sink_type[pos]`: "secondary",
    "bos_sink" or "noise".
    """

    bos: int
    first_layer: int
    last_layer: int
    layers: dict[int, list[int]]
    sink_type: dict[int, str]


OFFICIAL_COSINE, OFFICIAL_NOISE, OFFICIAL_BOS_MARGIN = 0.9, 4, 15


def official(
    hidden_states: Float[Tensor, "layer pos d_model"], first_positions: Sequence[int] = (0, 1)
) -> OfficialResult:
    """The published procedure on the outputs of every block (Wong et al., 2512.22213, and their code), exactly.

    The BOS sink is the candidate of largest mean norm (the earliest of equals). With D the rises of its norm from layer
    to layer, start = argmax D + 1 and end = start + 1 + argmin D[start:]; layers start <= l < end are looked at, or
    `start` alone when the greatest rise is the last. A later token is a candidate in a layer when
    |cos| > 0.9; with n such layers it is `secondary` for 4 < n < L - 15, `bos_sink` for n >= L - 15, else `noise`.
    For L <= 20 nothing can be secondary. Raises InputError for fewer than 2 layers, no candidate in the text, or values
    that are not finite.
    """
    shape = tuple(hidden_states.shape) if isinstance(hidden_states, Tensor) else ()
    if len(shape) != 3 or shape[0] < 2 or not hidden_states.is_floating_point():
        raise InputError(f"hidden states {shown(hidden_states)}: a tensor [layer >= 2, pos, d_model] is needed.")
    Thresholds(first_positions=arguments.several(first_positions, "first_positions"))  # checks them
    n_layers, n_positions = hidden_states.shape[:2]
    candidates = [p for p in first_positions if 0 <= p < n_positions]
    if not candidates:
        raise InputError(
            f"no candidate first position {tuple(first_positions)} lies in a text of {n_positions} tokens."
        )
    hidden = hidden_states.float()
    _check_finite(hidden.norm(dim=-1))
    norms = hidden[:, candidates].norm(dim=-1)
    bos = candidates[int(norms.mean(dim=0).argmax())]
    rises = hidden[:, bos].norm(dim=-1).diff()
    start = int(rises.argmax()) + 1
    end = start + 1 + int(rises[start:].argmin()) if start < len(rises) else start + 1
    layers: dict[int, list[int]] = {}
    for layer in range(start, end):
        cosines = torch.nn.functional.cosine_similarity(hidden[layer], hidden[layer, bos : bos + 1], dim=-1)
        for position in (cosines[bos + 1 :].abs() > OFFICIAL_COSINE).nonzero().flatten().tolist():
            layers.setdefault(bos + 1 + position, []).append(layer)
    types = {position: official_type(len(found), n_layers) for position, found in layers.items()}
    return OfficialResult(bos, start, end - 1, dict(sorted(layers.items())), dict(sorted(types.items())))


def official_type(n_found: int, n_layers: int) -> str:
    """`secondary` if 4 < n < L - 15, `bos_sink` if n >= L - 15, otherwise `noise`; in this order."""
    if OFFICIAL_NOISE < n_found < n_layers - OFFICIAL_BOS_MARGIN:
        return "secondary"
    return "bos_sink" if n_found >= n_layers - OFFICIAL_BOS_MARGIN else "noise"


def official_hidden_states(model, clean: CleanRun) -> Float[Tensor, "layer pos d_model"]:
    """What the published code is fed: HF's `hidden_states[1:]`, whose last entry is after the final norm."""
    adapter = adapt(model)
    states = torch.stack([clean.resid_post(layer) for layer in range(adapter.n_layers)])
    final = adapter.twin.final_norm if adapter.twin is not None else adapter.model.ln_final
    with torch.no_grad():
        states[-1] = final(states[-1:])[0]
    return states


def official_rows(model, clean: CleanRun, thresholds: Thresholds) -> list[dict]:
    """The published procedure's sinks in the columns of `Sinks`; `l_start`, `l_end` are the outermost layers found."""
    found = official(official_hidden_states(model, clean), thresholds.first_positions or (0, 1))
    nan = float("nan")
    scores = scores_of(clean, adapt(model).windows, min_queries=thresholds.min_queries).mean(dim=1).cpu()
    ever = torch.zeros(clean.n_positions, dtype=torch.bool)
    ever[[found.bos, *found.layers]] = True
    return [
        {
            "pos": position, "kind": found.sink_type[position], "l_start": layers[0], "l_end": layers[-1], "lifetime": len(layers),
            "phase_start": found.first_layer, "primary_pos": found.bos, "cosine": nan,
            "norm": max(clean.resid_post(layer)[position].norm().item() for layer in layers), "norm_ratio": nan,
            **score_evidence(scores, position, layers[0], layers[-1], ever, thresholds.neighbours),
        }
        for position, layers in found.layers.items()
    ]  # fmt: skip
