"""Golden values of both bundled models: sinks, layer map, dose curve. A drift in a dependency that changes the science is caught.

`python tests/test_golden.py` measures them anew and writes tests/golden.json; look at the difference before you commit it.
TransformerLens 4.3 and two threads moved nothing by as much as the rounding here (1e-4 log-odds, 1e-6 score); the two execution
paths differ by up to 1.2e-4 log-odds. The tolerances leave room for other machines' kernels.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

import sink_circuits as sc

GOLDEN = Path(__file__).with_name("golden.json")
MODELS = ("gemma-3-270m", "smollm2-135m")
FACTORS = (0.0, 0.5, 2.0)
LOG_ODDS, SCORE = 5e-3, 1e-4


def measure(name: str) -> dict:
    torch.set_num_threads(1)
    model = sc.load_model(name, verbose=False)
    tokens = sc.load_prompts("maths", 2).tokens(model, max_tokens=200)
    sinks = sc.find_sinks(model, tokens, verbose=False)
    treated = sc.Sinks(
        sinks.select("secondary", "primary-like").table.groupby("prompt").head(1).reset_index(drop=True),
        sinks.prompts,
        sinks.manifest,
    )
    mapped = sc.layer_map(model, tokens, treated, verbose=False)
    dosed = sc.dose_response(
        model, tokens, treated, layer="forming", forming=mapped.forming(), factors=FACTORS, verbose=False
    )
    columns = ["prompt", "pos", "token", "kind", "l_start", "l_end"]
    return {
        "weights": sinks.manifest.weights,
        "sinks": sinks.table[columns].to_dict(orient="list"),
        "scores": sinks.table["score"].round(6).tolist(),
        "layer_map": mapped.over_lifetime("log_odds").to_numpy().round(4).tolist(),
        "dose": dosed.over_lifetime("score", "edited").to_numpy().round(6).tolist(),
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_the_bundled_models_say_what_they_said(name):
    golden, now = json.loads(GOLDEN.read_text())[name], measure(name)
    assert now["weights"] == golden["weights"]
    assert now["sinks"] == golden["sinks"]
    nan_ok = {"nan_ok": True}
    for key, tolerance in (("scores", SCORE), ("layer_map", LOG_ODDS), ("dose", SCORE)):
        for ours, theirs in zip(_flat(now[key]), _flat(golden[key]), strict=True):
            assert ours == pytest.approx(theirs, abs=tolerance, **nan_ok), key


def _flat(values) -> list[float]:
    return [x for row in values for x in row] if values and isinstance(values[0], list) else values


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps({name: measure(name) for name in sys.argv[1:] or MODELS}, indent=1) + "\n")
