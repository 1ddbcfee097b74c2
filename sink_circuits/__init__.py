"""sink_circuits: find attention sinks in language models, and prove by intervention what makes them."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sink_circuits.adapters import adapt
    from sink_circuits.attribution import Agreement, Attribution, attribute
    from sink_circuits.claims import Claims, test_claims
    from sink_circuits.clean_runs import names_filter, run_clean
    from sink_circuits.controlled import Controlled
    from sink_circuits.controls import randomly_initialised, with_controls
    from sink_circuits.detection import Sinks, Thresholds, find_sinks, official, primary_direction
    from sink_circuits.directions import norm_and_direction
    from sink_circuits.edited_runs import run_edited
    from sink_circuits.edits import Edit, compose, custom, window
    from sink_circuits.effects import Effect, interaction
    from sink_circuits.errors import SinkCircuitsError
    from sink_circuits.experiments import ablate, dose_response, layer_map
    from sink_circuits.generation import Decoding, generate
    from sink_circuits.holds import Hold
    from sink_circuits.interventions import (
        denoising,
        keep_direction,
        mean_over_corpus,
        mean_over_same_token,
        noising,
        patch,
        random_direction,
        remove_direction,
        replace,
        resample,
        rescale,
        set_norm,
        swap_direction,
        swap_norm,
        transplant,
        zero,
    )
    from sink_circuits.invariants import check_invariants
    from sink_circuits.mass import MassAccount, mass_account, measure_mass
    from sink_circuits.measurement import measure
    from sink_circuits.models import load_model
    from sink_circuits.outcomes import Outcome, key_column, resid_post_at
    from sink_circuits.paths import PathEffect, measure_paths, path_effects
    from sink_circuits.prompts import Prompt, PromptSet, Tokens, load_prompts
    from sink_circuits.reproduction import Plan, reproduce
    from sink_circuits.scores import SinkScores, sink_scores
    from sink_circuits.studies import Study, read_study
    from sink_circuits.sweeps import SweepResult, WorkerPool, load_sweep, sweep
    from sink_circuits.transplants import sufficiency

_ROOMS = {
    "errors": ("SinkCircuitsError",),
    "detection": ("Sinks", "Thresholds", "find_sinks", "official", "primary_direction"),
    "attribution": ("Agreement", "Attribution", "attribute"),
    "claims": ("Claims", "test_claims"),
    "clean_runs": ("names_filter", "run_clean"),
    "controls": ("Controlled", "randomly_initialised", "with_controls"),
    "directions": ("norm_and_direction",),
    "edited_runs": ("run_edited",),
    "edits": ("Edit", "compose", "custom", "window"),
    "effects": ("Effect", "interaction"),
    "experiments": ("ablate", "dose_response", "layer_map", "measure"),
    "generation": ("Decoding", "generate"),
    "holds": ("Hold",),
    "invariants": ("check_invariants",),
    "mass": ("MassAccount", "mass_account", "measure_mass"),
    "outcomes": ("Outcome", "key_column", "resid_post_at"),
    "paths": ("PathEffect", "measure_paths", "path_effects"),
    "interventions": (
        "denoising",
        "keep_direction",
        "mean_over_corpus",
        "mean_over_same_token",
        "noising",
        "patch",
        "random_direction",
        "remove_direction",
        "replace",
        "resample",
        "rescale",
        "set_norm",
        "swap_direction",
        "swap_norm",
        "transplant",
        "zero",
    ),
    "models": ("adapt", "load_model"),
    "prompts": ("Prompt", "PromptSet", "Tokens", "load_prompts"),
    "reproduction": ("Plan", "reproduce"),
    "scores": ("SinkScores", "sink_scores"),
    "studies": ("Study", "read_study"),
    "sweeps": ("SweepResult", "WorkerPool", "load_sweep", "sweep"),
    "transplants": ("sufficiency",),
}
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names}
__all__ = sorted(_ROOM_OF)
_OPEN_ROOMS = (
    "anatomy", "calibration", "claims", "controls", "experiments", "figures", "interventions", "outcomes", "paths", "planted", "records",
    "report", "scores", "statistics",
)  # fmt: skip
"""Modules of the package that are reached as `sink_circuits.anatomy`, without importing them first."""


def __getattr__(name: str):
    """Public names are imported when first used: torch and TransformerLens cost seconds, `--help` should not."""
    if name in _OPEN_ROOMS:
        return importlib.import_module(f"sink_circuits.{name}")
    if name not in _ROOM_OF:
        raise AttributeError(f"module 'sink_circuits' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f"sink_circuits.{_ROOM_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
