"""The invariants hold on the planted model and on small random ones, and each can fail."""

from __future__ import annotations

import pytest
import torch
from common import BACKENDS, lens

import sink_circuits as sc
from sink_circuits import invariants
from sink_circuits.invariants import check_invariants


@pytest.mark.parametrize("backend", BACKENDS)
def test_they_hold_on_the_planted_model(backend):
    checks = check_invariants(lens(backend))
    assert all(check.passed for check in checks), checks
    assert len(checks) == (7 if backend == "bridge" else 3)


def test_a_run_that_ignores_edits_is_found_out(monkeypatch):
    """The edited rows come back as if nothing had been edited."""

    def deaf(model, clean, rows, **options):
        return sc.run_edited(model, clean, [() for _ in rows], **options)

    monkeypatch.setattr(invariants, "run_edited", deaf)
    failed = {check.name for check in check_invariants(lens()) if not check.passed}
    assert failed >= {f"{path} path: an edit reaches later layers" for path in ("fast", "reference")}


def test_a_run_that_leaks_is_found_out(monkeypatch):
    """A rounding error in the layers below the edit, another in the no-op's row."""

    def leaking(model, clean, rows, **options):
        out = sc.run_edited(model, clean, rows, **options)
        out[1].resid_post_chosen[-1] += 1e-3
        out[2].columns.log_attention[0] += 1e-6
        return out

    monkeypatch.setattr(invariants, "run_edited", leaking)
    failed = [check.name for check in check_invariants(lens()) if not check.passed]
    assert [name.split(": ")[1].split(" ")[0] for name in failed] == ["a", "impossible"] * 2


def test_a_text_that_is_short_for_the_model_is_enough():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=50, max_position_embeddings=12
    )  # fmt: skip
    model = sc.load_model(LlamaForCausalLM(config).eval(), verbose=False)
    assert all(check.passed for check in check_invariants(model))
