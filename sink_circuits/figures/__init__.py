"""Figures: what was measured, drawn. Pure functions of results; no model is run here.

Every result reaches its figure by its own `.plot()`; `save_figure` writes any of them.
"""

from sink_circuits.figures.attention_view import attention_view
from sink_circuits.figures.circuit import circuit_edges, circuit_figure
from sink_circuits.figures.evidence import (
    attribution_figure,
    claims_figure,
    controls_figure,
    edits_figure,
    hold_name,
    mass_figure,
    paths_figure,
    sweep_figure,
)
from sink_circuits.figures.experiments import (
    MAX_EDITS,
    ablation_figure,
    dose_response_figure,
    effect_figure,
    layer_map_figure,
)
from sink_circuits.figures.files import LIBRARY, figure_json, save_figure, save_library, script_json
from sink_circuits.figures.look import AXIS_LABELS, CONFIG, LINE_LENGTH, NAMES, visible
from sink_circuits.figures.token_view import TOKEN_CSS, VIEW_SCRIPT, circuitsvis_source, sink_tokens_view

__all__ = [
    "AXIS_LABELS", "CONFIG", "LIBRARY", "LINE_LENGTH", "MAX_EDITS", "NAMES", "TOKEN_CSS", "VIEW_SCRIPT", "ablation_figure",
    "attention_view", "attribution_figure", "circuit_edges", "circuit_figure", "circuitsvis_source", "claims_figure", "controls_figure",
    "dose_response_figure", "edits_figure", "effect_figure", "figure_json", "hold_name", "layer_map_figure", "mass_figure", "paths_figure",
    "save_figure", "save_library", "script_json", "sink_tokens_view", "sweep_figure", "visible",
]  # fmt: skip
