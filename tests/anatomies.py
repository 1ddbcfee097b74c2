"""What the tests of anatomy share: planted sinks, sinks at chosen places of random models, directions by definition."""

import functools

import pandas as pd
import test_architectures as architectures
import torch
from common import SINK, lens, prompt

import sink_circuits as sc
from sink_circuits.detection import COLUMNS, Sinks
from sink_circuits.results import Manifest

torch.set_num_threads(1)
QUIET = {"verbose": False}


@functools.cache
def found(backend: str = "bridge", *without: str) -> Sinks:
    return sc.find_sinks(lens(backend, *without), [prompt()], **QUIET)


@functools.cache
def secondary(backend: str = "bridge", *without: str) -> Sinks:
    return found(backend, *without).select("secondary")


@functools.cache
def load(name: str):
    return architectures.load(name)[0]


def sinks_at(
    *places: tuple[str, int, int], token_ids, primary: int = 0, l_start: int = 1, l_end: int = 2, kind="secondary"
) -> Sinks:
    """A table of sinks as a researcher might write it: (prompt, pos) of models that form none by themselves."""
    life = {
        "kind": kind,
        "l_start": l_start,
        "l_end": l_end,
        "lifetime": l_end - l_start + 1,
        "phase_start": 0,
        "primary_pos": primary,
    }
    rows = [
        {"prompt": name, "pos": pos, "token_id": int(token_ids[name][pos]), "token": f"<{pos}>", **life}
        for name, pos in places
    ]
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    return Sinks(table, tuple(token_ids), Manifest("find_sinks", "random", "", "float32", "", 1, "fast"))


def unit(vector: torch.Tensor) -> torch.Tensor:
    return vector / vector.norm()


def primary_direction(residuals: torch.Tensor, layer: int) -> torch.Tensor:
    """By definition: resid_post at position 0 less the median over positions, of norm 1."""
    return unit(residuals[layer, 0] - residuals[layer].median(dim=0).values)


ORDINARY = [pos for pos in range(4, 96) if pos != SINK]


def repeated_tokens():
    """Two texts in which ids 5 and 6 recur, and a table that calls four of them sinks."""
    generator = torch.Generator().manual_seed(3)
    texts = {f"prompt-{i}": torch.randint(10, 60, (48,), generator=generator) for i in range(2)}
    for ids in texts.values():
        ids[[8, 15, 22, 29]] = 5
        ids[[11, 18, 25]] = 6
    places = [("prompt-0", 8), ("prompt-0", 11), ("prompt-1", 15), ("prompt-1", 18)]
    return texts, sinks_at(*places, token_ids=texts)
