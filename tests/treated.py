"""What the tests of experiments and effects share: two texts with their three secondary sinks."""

from __future__ import annotations

import functools

from common import SINK, lens, prompt

import sink_circuits as sc

TEXTS = (prompt(), prompt((30, 55), 96, "b"))
TREATED = ((0, SINK), (1, 30), (1, 55))  # (text, position) of the three secondary sinks
OUTCOMES = ("score", "log_odds", "primary_score", "primary_log_odds")  # those of attention, by layer and head


@functools.cache
def secondary(backend: str = "bridge") -> sc.Sinks:
    return sc.find_sinks(lens(backend), list(TEXTS), verbose=False).select("secondary")


@functools.cache
def secondary_of_one() -> sc.Sinks:
    return sc.find_sinks(lens(), prompt(), verbose=False).select("secondary")
