"""Edits in the words of the hand-written forward pass, and the paths on which they are run."""

from __future__ import annotations

import hand
import torch
from common import BACKENDS, SINK

import sink_circuits as sc
from sink_circuits.clean_runs import Columns
from sink_circuits.scores import column_log_odds, column_scores

FULL = [None] * 24
PATHS = [("bridge", "fast"), ("bridge", "reference"), *([("hooked", "reference")] if "hooked" in BACKENDS else [])]
CHOSEN = (0, 10, SINK, 70)


def kl_by_hand(clean: torch.Tensor, edited: torch.Tensor) -> torch.Tensor:
    """KL(clean || edited) of logits [pos, d_vocab], from the probabilities themselves."""
    p, q = clean.double().softmax(-1), edited.double().softmax(-1)
    return (p * (p / q).log()).sum(-1)


def flip(c: torch.Tensor) -> torch.Tensor:
    return 0.5 * c.flip(-1)


def edits_of(edited: dict) -> list[sc.Edit]:
    """{(layer, pos): factor or function} as edits, each position for itself."""
    return [
        sc.Edit(layer, (pos,), f) if callable(f) else sc.rescale(layer, pos, f) for (layer, pos), f in edited.items()
    ]


# One run each, as the hand-written forward pass takes them: single edits, windows of layers, joint sets, several
# positions, positions at both ends, layers at both ends, factors above one, a function of the user's own.
EDITS = {
    "single": {(6, SINK): 0.0},
    "joint": {(6, SINK): 0.0, (7, SINK): 0.0},
    "window": {(layer, SINK): 0.5 for layer in range(4, 10)},
    "positions": {(5, 10): 0.0, (5, 70): 2.0, (7, SINK): 0.0},
    "primary": {(2, 0): 0.0},
    "first layer": {(0, 1): 0.0, (0, 50): 3.0},
    "last layer": {(23, 70): 0.0},
    "last position": {(3, 95): 4.0},
    "far apart": {(2, 70): 3.0, (12, 10): 0.0, (20, SINK): 2.0},
    "function": {(6, SINK): flip, (8, SINK): flip},
}  # fmt: skip


def cases(*names: str) -> list[tuple[str, str, str]]:
    """Every path with every name; the slowest path with the first two alone where another reference path has all."""
    slow = ("bridge", "reference") if "hooked" in BACKENDS else None
    return [(*path, name) for path in PATHS for name in (names[:2] if path == slow else names)]


def check_columns(columns: Columns, pattern: torch.Tensor) -> None:
    chosen = list(columns.chosen)
    scores = hand.sink_scores(pattern)[..., chosen]
    assert (column_scores(columns, FULL, 1) - scores).abs().max() < 2e-5
    assert (column_log_odds(columns, FULL, 1) - hand.log_odds(pattern)[..., chosen]).abs().max() < 2e-3
    seen = torch.arange(pattern.shape[-1])[:, None] >= torch.tensor(chosen)
    assert (columns.log_attention.exp() - pattern[..., chosen]).abs().max() < 1e-4
    assert (columns.log_attention[..., ~seen] < -80).all()
    assert columns.log_rest.isfinite().all()
    assert columns.log_attention.isfinite().all()
