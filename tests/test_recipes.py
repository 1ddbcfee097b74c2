"""The recipes of docs/recipes.md run as they stand, and give what was planted."""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import sink_circuits as sc

RECIPES = Path(__file__).resolve().parents[1] / "docs" / "recipes.md"


@pytest.fixture(scope="module")
def names() -> dict:
    """What the recipes leave behind, all blocks run in one namespace."""
    namespace: dict = {}
    with contextlib.redirect_stdout(io.StringIO()):
        for block in re.findall(r"^```python\n(.*?)^```$", RECIPES.read_text("utf-8"), re.DOTALL | re.MULTILINE):
            exec(compile(block, str(RECIPES), "exec"), namespace)
    return namespace


def test_the_planted_sinks_are_treated(names):
    table = names["secondary"].table
    assert table["pos"].tolist() == [40, 40]
    assert names["redundant"] is True


def test_a_transplanted_contribution_makes_a_sink(names):
    gained, clean = names["gained"], names["clean"]
    before = clean.columns.log_attention[:, :, 51:, names["column"]].exp().mean(dim=(1, 2))
    assert float(gained[9]) > 5 * float(before[9])
    assert np.allclose(gained[:7], before[:7])


def test_one_of_two_stand_ins_brings_the_sink_back(names):
    def weight(run) -> float:
        column = list(run.columns.chosen).index(0)
        return float(run.columns.log_attention[9, :, 41:, column].exp().mean())

    clean, without, back = (weight(names[name]) for name in ("clean", "without", "back"))
    assert without > clean  # the primary gets back what the sink no longer takes
    assert abs(back - clean) < 0.1 * abs(without - clean)


def test_the_accounts_and_paths_are_of_these_sinks(names):
    assert len(names["paths"].table) == len(names["account"].table) == 2
    frame = names["carriers"].to_dataframe()
    assert frame["neuron"].iloc[frame["write"].argmax()] == 0  # the planted one


def test_writers_and_erasers_are_the_planted_ones(names):
    top = names["writers"].top(1).groupby("role")["component"].agg(set)
    assert top["writer"] == {"L6 mlp"} and top["eraser"] == {"L13 mlp"}
    assert len(names["diagram"].data) and (names["folder"] / "writers.html").stat().st_size > 1e6


def test_the_reference_has_every_public_name(tmp_path):
    pytest.importorskip("pdoc")
    make = RECIPES.with_name("make_reference.py")
    done = subprocess.run([sys.executable, make, tmp_path], capture_output=True, text=True, check=True)
    page = (tmp_path / "sink_circuits.html").read_text("utf-8")
    missing = [name for name in sc.__all__ if f'id="{name}"' not in page]
    assert not missing
    assert "does not resolve" not in done.stderr
