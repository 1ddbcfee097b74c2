"""Cells: named by their content, every layer of every prompt once, and whose sinks they draw."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

import sink_circuits as sc
from sink_circuits import cells, results
from sink_circuits.cells import Cell, Facts, Question
from sink_circuits.errors import InputError
from sink_circuits.studies import Study


def cell(**changed) -> Cell:
    fields = {
        "model": "m", "source": "/here/m", "weights": "abc", "prompt": "p", "ids": (0, 5), "layers": ((3,), (6, 7)),
        "settings": cells.shared_settings(Study(("m",))),
    }  # fmt: skip
    return Cell(**{**fields, **changed})


def test_a_cell_is_named_by_its_content():
    one = cell()
    content = {
        "format": results.FORMAT, "model": "m", "weights": "abc", "prompt": "p", "ids": [0, 5], "layers": [[3], [6, 7]],
        "settings": {
            "kinds": ["secondary", "primary-like"], "sinks_per_prompt": None, "factors": [0.0, 0.25, 0.5, 1.0, 2.0, 4.0],
            "interventions": ["rescale"], "outcomes": [], "functions": {}, "loss": False, "kl": False, "min_queries": 16,
            "device": "cpu", "path": "auto", "threads": 1, "seed": "study", "thresholds": {"min_queries": 16},
        },
    }  # fmt: skip
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    assert one.name == hashlib.sha256(text.encode()).hexdigest()[:32]
    assert cell(source="/there/m").name == cell(memory=2.0).name == one.name
    others = [
        cell(model="n"), cell(weights="abd"), cell(prompt="q"), cell(ids=(0, 6)), cell(layers=((3,),)), cell(layers=None),
        *(cell(settings=cells.shared_settings(Study(("m",), **changed))) for changed in (
            {"kinds": ["primary"]}, {"sinks_per_prompt": 1}, {"factors": [0]}, {"loss": True}, {"min_queries": 15},
            {"device": "cuda"}, {"path": "reference"}, {"threads": 2}, {"seed": "s"}, {"thresholds": {"cosine": 0.8}},
            {"kl": True}, {"interventions": ["math:copysign"]}, {"outcomes": ["math:hypot"]},
        )),
    ]  # fmt: skip
    assert len({one.name, *(other.name for other in others)}) == 20


@given(
    n_layers=st.integers(1, 40), per_cell=st.integers(1, 12), n_prompts=st.integers(1, 4),
    joint=st.lists(st.sets(st.integers(0, 39), min_size=1, max_size=3).map(sorted), min_size=1, max_size=9, unique_by=tuple),
    everything=st.booleans(),
)  # fmt: skip
def test_cells_cover_every_layer_of_every_prompt_once(n_layers, per_cell, n_prompts, joint, everything):
    made = Study(("m",), layers="all" if everything else joint, layers_per_cell=per_cell)
    prompts = tuple((f"p{i}", (i,)) for i in range(n_prompts))
    question = Question("m", "m", prompts, None, False, cells.shared_settings(made))
    facts = Facts("w", n_layers, tuple(ids for _, ids in prompts))
    highest = 0 if everything else max(max(group) for group in joint)
    if highest >= n_layers:
        with pytest.raises(InputError, match=f"layer {highest} is out of range: m has layers 0..{n_layers - 1}"):
            cells.cells_of(made, question, facts)
        return
    planned = cells.cells_of(made, question, facts)
    groups = [(layer,) for layer in range(n_layers)] if everything else [tuple(group) for group in joint]
    covered = [(one.prompt, group) for one in planned for group in one.layers]
    assert sorted(covered) == sorted((name, group) for name, _ in prompts for group in groups)
    sizes = [len(one.layers) for one in planned]
    assert max(sizes) <= per_cell and max(sizes) - min(sizes) <= 1
    assert len({one.name for one in planned}) == len(planned)


def test_a_draw_is_of_the_right_sinks_and_grows_with_its_limit():
    table = pd.DataFrame(
        {"prompt": ["a"] * 8 + ["b"] * 3, "kind": ["secondary"] * 6 + ["primary"] + ["secondary"] * 4,
         "score": [0.1, np.nan, *[0.1] * 9], "pos": range(11)}
    )  # fmt: skip
    found = sc.Sinks(table, ("a", "b"), None)
    allowed = [0, 2, 3, 4, 5, 7, 8, 9, 10]
    assert list(cells.drawn(found, ["secondary"], None, "s").table["pos"]) == allowed
    before: set[int] = set()
    for limit in range(1, 8):
        drawn = cells.drawn(found, ["secondary"], limit, "s").table
        assert list(drawn.groupby("prompt").size()) == [min(limit, 6), min(limit, 3)]
        assert before <= set(drawn["pos"]) <= set(allowed) and list(drawn["pos"]) == sorted(drawn["pos"])
        before = set(drawn["pos"])
    draws = {tuple(cells.drawn(found, ["secondary"], 2, f"seed {i}").table["pos"]) for i in range(20)}
    assert len(draws) > 5
    alone = sc.Sinks(table[table["prompt"] == "b"], ("b",), None)  # a prompt's draw does not depend on the others
    drawn = cells.drawn(found, ["secondary"], 2, "s").table
    assert list(cells.drawn(alone, ["secondary"], 2, "s").table["pos"]) == list(drawn[drawn["prompt"] == "b"]["pos"])
