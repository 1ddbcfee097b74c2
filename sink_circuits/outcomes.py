"""Outcomes: what is read from an edited run, each one function of the clean run, the edited run and the sink.

The clean value of an outcome is the same function of a run without edits, so built-in outcomes and a user's own are
measured, saved, tabulated and tested alike. Attention is what an intervention is asked about; the residual stream's norm
and cosine (`CHECKS`) only show that it did what it was meant to.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from sink_circuits import arguments
from sink_circuits.arguments import is_whole, shown
from sink_circuits.clean_runs import CleanRun, Columns
from sink_circuits.detection import Thresholds, layer_runs, split_phases
from sink_circuits.edited_runs import EditedRun
from sink_circuits.errors import InputError
from sink_circuits.scores import column_log_odds, column_scores

OutcomeFunction = Callable[[CleanRun, EditedRun, pd.Series], Tensor]
"""(clean run, edited run, row of the sink table) -> a tensor of shape [], [layer] or [layer, head]; pure.

Both runs hold the attention columns (`key_column`) of all treated and primary positions of the prompt, and the edited
one their residual stream too (`edited.resid_post_chosen[:, edited.columns.chosen.index(pos)]`). NaN says "undefined
here" and is left out of every mean; infinite values are refused.
"""


@dataclass(frozen=True)
class Outcome:
    """An outcome with its name in results; `meaning` is noted in their manifest."""

    name: str
    function: Callable[..., Tensor]
    meaning: str = ""


# ------------------------------------------------------------------------------------------------ reading a run
def key_column(run: CleanRun | EditedRun, pos: int) -> Columns:
    """The attention of all queries on the key at `pos`, as `Columns` of this one key: [layer, head, query, 1].

    Raises InputError for a position that was not asked for when the run was made.
    """
    _check_run(run)
    columns = run.columns
    if columns is None or not is_whole(pos) or int(pos) not in columns.chosen:
        have = () if columns is None else columns.chosen
        raise InputError(f"the run holds no attention on position {shown(pos)}: it was made with chosen={tuple(have)}.")
    index = columns.chosen.index(int(pos))
    log_attention, log_rest = (
        values[..., index : index + 1].contiguous() for values in (columns.log_attention, columns.log_rest)
    )
    return Columns((int(pos),), log_attention, log_rest)


def resid_post_at(run: CleanRun | EditedRun, pos: int) -> Float[Tensor, "layer d_model"]:
    """The residual stream at `pos` after every block, float32. Raises InputError for a position the run does not hold."""
    _check_run(run)
    if isinstance(run, EditedRun):
        if not is_whole(pos) or int(pos) not in run.columns.chosen:
            raise InputError(
                f"the edited run holds no residual stream at position {shown(pos)}: only at {run.columns.chosen}."
            )
        return run.resid_post_chosen[:, run.columns.chosen.index(int(pos))].float()
    pos = arguments.whole(pos, "position", high=run.n_positions - 1)
    base = run.base[:, pos]
    return (base if run.contribution is None else base + run.contribution[:, pos]).float()


def _check_run(run) -> None:
    arguments.instance(run, "the run", CleanRun | EditedRun, "make it with run_clean() or run_edited()")


def unedited(clean: CleanRun) -> EditedRun:
    """The clean run as a run without edits: what an outcome's clean value is computed from. Needs attention columns."""
    chosen = clean.columns.chosen
    resid = torch.stack([resid_post_at(clean, pos) for pos in chosen], dim=1)
    return EditedRun((), clean.columns, resid.to(clean.base.dtype), clean.loss, clean.path)


@dataclass(frozen=True)
class Medians:
    """Of one clean run, over all positions: of each coordinate of resid_post, and of its norm (as in `geometry_of`)."""

    resid_post: Float[Tensor, "layer d_model"]
    norm: Float[Tensor, " layer"]


def medians_of(clean: CleanRun) -> Medians:
    coordinates, norms = [], []
    for layer in range(len(clean.base)):
        resid = clean.resid_post(layer).float()
        coordinates.append(resid.median(dim=0).values)
        norms.append(resid.norm(dim=-1).median())
    return Medians(torch.stack(coordinates), torch.stack(norms).clamp(min=1e-12))


# ------------------------------------------------------------------------------------------------ built-in ones
@dataclass(frozen=True)
class Definitions:
    """What the built-in outcomes need besides the runs: how a score and a sink state are defined, and the clean medians.

    `windows`: each layer's sliding window (`adapt(model).windows`); `thresholds`: those the sinks were found with.
    """

    windows: Sequence[int | None]
    min_queries: int
    thresholds: Thresholds
    medians: Medians


def _of_key(mean: Callable[[Columns, Sequence[int | None], int], Tensor], column: str) -> Callable[..., Tensor]:
    """A mean over the later queries of the attention on the position in `column` of the sink table, [layer, head]."""

    def outcome(how: Definitions, clean: CleanRun, edited: EditedRun, sink: pd.Series) -> Tensor:
        return mean(key_column(edited, sink[column]), how.windows, how.min_queries)[..., 0]

    return outcome


def _later_mean(name: str) -> Callable[..., Tensor]:
    """Mean from the treated position on, up to the last that predicts a token of the text, []; NaN where there is none."""

    def outcome(how: Definitions, clean: CleanRun, edited: EditedRun, sink: pd.Series) -> Tensor:
        return getattr(edited, name)[int(sink["pos"]) : -1].mean()  # the mean of nothing is NaN

    return outcome


def lifetime(how: Definitions, clean: CleanRun, edited: EditedRun, sink: pd.Series) -> Float[Tensor, ""]:
    """How many layers the sink lives in the edited run, by geometry alone: l_end - l_start + 1, or 0.

    A layer counts as in `find_sinks(method="robust")`: the cosine of resid_post less the clean median with the clean
    primary direction above `cosine`, its norm above `norm_ratio` clean medians, and the clean primary itself in sink
    state there (elsewhere its direction means nothing). Runs bridge gaps of `bridge` layers and last `min_lifetime`; the
    primary's are cut into phases. The sink's own run is the one that shares most layers with its clean life, the
    earliest of equals; 0 where none shares any.
    """
    pos, limits, medians = int(sink["pos"]), how.thresholds, how.medians
    primary, resid = resid_post_at(clean, sink["primary_pos"]), resid_post_at(edited, pos)
    cosine = torch.nn.functional.cosine_similarity(
        resid - medians.resid_post, primary - medians.resid_post, dim=-1, eps=1e-12
    )
    ratio, primary_ratio = (vector.norm(dim=-1) / medians.norm for vector in (resid, primary))
    state = (cosine > limits.cosine) & (ratio > limits.norm_ratio) & (primary_ratio > limits.norm_ratio)
    runs = [(a, b) for a, b in layer_runs(state.tolist(), limits.bridge) if b - a + 1 >= limits.min_lifetime]
    if pos == sink["primary_pos"]:
        runs = [phase for first, last in runs for phase in split_phases(ratio.tolist(), first, last, limits)]

    def shared(run: tuple[int, int]) -> int:
        return min(run[1], sink["l_end"]) - max(run[0], sink["l_start"]) + 1

    first, last = max(runs, key=shared, default=(0, -1))
    return torch.tensor(float(last - first + 1) if runs and shared((first, last)) > 0 else 0.0)


def _norm(how: Definitions, clean: CleanRun, edited: EditedRun, sink: pd.Series) -> Float[Tensor, " layer"]:
    return resid_post_at(edited, sink["pos"]).norm(dim=-1)


def _cosine(how: Definitions, clean: CleanRun, edited: EditedRun, sink: pd.Series) -> Float[Tensor, " layer"]:
    primary = resid_post_at(clean, sink["primary_pos"])
    return torch.nn.functional.cosine_similarity(resid_post_at(edited, sink["pos"]), primary, dim=-1)


BUILT_IN = (
    Outcome("score", _of_key(column_scores, "pos"), "sink score of the treated position"),
    Outcome("log_odds", _of_key(column_log_odds, "pos"), "attention log-odds of the treated position"),
    Outcome("primary_score", _of_key(column_scores, "primary_pos"), "sink score of the primary sink"),
    Outcome("primary_log_odds", _of_key(column_log_odds, "primary_pos"), "attention log-odds of the primary sink"),
    Outcome("lifetime", lifetime, "layers in which the treated position is in sink state, in one run"),
    Outcome("loss", _later_mean("loss"), "mean next-token loss from the treated position on, nats"),
    Outcome("kl", _later_mean("kl"), "mean KL of the next-token distributions, clean to edited, from there on, nats"),
    Outcome("norm", _norm, "norm of resid_post at the treated position (manipulation check)"),
    Outcome("cosine", _cosine, "raw cosine of resid_post with the clean primary's (manipulation check)"),
)
"""All built-in outcomes; their functions take `Definitions` first."""
CHECKS = ("norm", "cosine")
"""Manipulation checks: did the edit do what it was meant to? Never outcomes."""
ON_REQUEST = ("loss", "kl")
"""Measured only where asked for: they need the logits."""


def built_in(how: Definitions, left_out: Collection[str] = ()) -> tuple[Outcome, ...]:
    """The built-in outcomes as functions of (clean, edited, sink), without those named in `left_out`."""
    kept = [outcome for outcome in BUILT_IN if outcome.name not in left_out]
    return tuple(dataclasses.replace(one, function=functools.partial(one.function, how)) for one in kept)


def in_order(names: Iterable[str]) -> list[str]:
    """Built-in outcomes as listed, then a user's own by name."""
    known = [outcome.name for outcome in BUILT_IN]
    return sorted(names, key=lambda name: (known.index(name) if name in known else len(known), name))


# ------------------------------------------------------------------------------------------------ a user's own
_TAKEN = {one.name for one in BUILT_IN} | {"first_layer", "last_edited", "sink", "edit", "layer", "head"}


def as_outcomes(given) -> tuple[Outcome, ...]:
    """A user's outcomes from {name: function}, functions (named as they are) or `Outcome`s; None: none.

    Raises InputError for what cannot be called, and for a name that is missing, given twice or taken.
    """
    if given is None:
        return ()
    if isinstance(given, Mapping):
        made = [Outcome(name, function) for name, function in given.items()]
    elif isinstance(given, Iterable) and not isinstance(given, str) and getattr(given, "ndim", None) != 0:
        made = [
            one if isinstance(one, Outcome) else Outcome(getattr(one, "__name__", type(one).__name__), one)
            for one in given
        ]
    else:
        raise InputError(f"outcomes = {shown(given)}: give {{name: function}} or a list of functions.")
    for index, (name, function) in enumerate((one.name, one.function) for one in made):
        if not callable(function):
            raise InputError(f"outcome {name!r} cannot be called: give a function of (clean, edited, sink).")
        if not isinstance(name, str) or not name.strip() or name == "<lambda>":
            raise InputError(f"outcome {name!r} has no name: give outcomes={{'name': function}}.")
        if name in _TAKEN or name.startswith("clean_"):
            raise InputError(f"outcome name {name!r} is taken: choose another.")
        if name in [one.name for one in made[:index]]:
            raise InputError(f"two outcomes are named {name!r}: name each its own.")
    return tuple(made)


def value_of(
    outcome: Outcome, clean: CleanRun, edited: EditedRun, sink: pd.Series, n_layers: int, n_heads: int
) -> np.ndarray:
    """The outcome's value, float32, of shape [], [layer] or [layer, head].

    Raises InputError naming the outcome when its function fails, writes into the runs it is shown, or returns another shape,
    infinite values or no numbers.
    """
    before = _versions(clean, edited)
    try:
        value = torch.as_tensor(outcome.function(clean, edited, sink)).detach()
    except Exception as error:
        first = (str(error).strip().splitlines() or ["no message"])[0].rstrip(".")
        raise InputError(
            f"outcome {outcome.name!r} failed at position {sink['pos']} of prompt {sink['prompt']!r} "
            f"({type(error).__name__}: {first}): mend its function."
        ) from error
    if _versions(clean, edited) != before:  # every later value would be of other runs
        raise InputError(
            f"outcome {outcome.name!r} writes into the runs it is shown: let its function compute new tensors (log() for log_())."
        )
    if tuple(value.shape) not in ((), (n_layers,), (n_layers, n_heads)):
        raise InputError(
            f"outcome {outcome.name!r} returned shape {list(value.shape)}: return [], [layer] = [{n_layers}] or "
            f"[layer, head] = [{n_layers}, {n_heads}]."
        )
    if value.is_complex() or value.float().isinf().any():
        kind = "complex" if value.is_complex() else "infinite (or too large for float32)"
        raise InputError(f"outcome {outcome.name!r} returned {kind} values: return real ones, NaN where undefined.")
    return value.float().cpu().numpy()


def _versions(*runs: CleanRun | EditedRun) -> list[int]:
    """How often each tensor of the runs has been written to, as torch counts it."""
    parts = [part for run in runs for part in (*vars(run).values(), *vars(run.columns or run).values())]
    return [part._version for part in parts if isinstance(part, Tensor) and not part.is_inference()]
