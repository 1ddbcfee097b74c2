"""Losses and divergences: Hugging Face's own, made in slices and tiles, and what they are where they are extreme."""

from __future__ import annotations

import dataclasses

import eager
import pytest
import torch
from common import BACKENDS, SINK, by_hand, lens, prompt, subject
from edits_by_hand import CHOSEN, EDITS, cases, edits_of, kl_by_hand

import sink_circuits as sc
from sink_circuits.clean_runs import clean_loss
from sink_circuits.holds import Hold
from sink_circuits.losses import Unembedding, next_token_kl, next_token_loss


@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_loss_is_hugging_faces_cross_entropy(backend):
    clean = sc.run_clean(lens(backend), prompt(), chosen=(0,))
    expected = subject().hf_model(prompt()[None], labels=prompt()[None]).loss.item()
    loss = clean_loss(lens(backend), clean)
    assert loss[:-1].mean().item() == pytest.approx(expected, abs=1e-5)
    assert loss[-1].isnan()
    (run,) = sc.run_edited(lens(backend), clean, [[]], loss=True)
    assert run.loss[:-1].mean().item() == pytest.approx(expected, abs=1e-5)


def test_the_loss_before_the_first_edit_is_the_clean_runs():
    clean = sc.run_clean(lens(), prompt(), chosen=CHOSEN, loss=True)
    given = dataclasses.replace(clean, loss=torch.full((96,), 7.0))
    (run,) = sc.run_edited(lens(), given, [[sc.zero(6, SINK)]], loss=True)
    assert (run.loss[:SINK] == 7).all()
    (own,) = sc.run_edited(lens(), dataclasses.replace(clean, loss=None), [[sc.zero(6, SINK)]], loss=True)
    assert (own.loss[:SINK] - clean.loss[:SINK]).abs().max() < 1e-5
    assert torch.equal(run.loss[SINK:-1], own.loss[SINK:-1])


def test_clean_runs_of_half_precision_models_sum_in_float32():
    model = sc.load_model(eager.tiny("llama").bfloat16(), verbose=False)
    clean = sc.run_clean(model, eager.random_tokens(30), chosen=(0, 5), path="reference")
    for tensor in (clean.later, clean.diagonal, clean.columns.log_attention, clean.columns.log_rest):
        assert tensor.dtype == torch.float32


@torch.no_grad()
def test_loss_with_capped_logits():
    """Gemma 2 caps its logits after the unembedding."""
    hf, tokens = eager.tiny("gemma2"), eager.random_tokens(30)
    expected = hf(tokens[None], labels=tokens[None]).loss.item()
    model = sc.load_model(eager.tiny("gemma2"), verbose=False)
    for path in ("fast", "reference"):
        clean = sc.run_clean(model, tokens, chosen=(0,), path=path)
        assert clean_loss(model, clean)[:-1].mean().item() == pytest.approx(expected, abs=1e-5)


# ----------------------------------------------------------------------------------------------------- divergences
@pytest.mark.parametrize(("backend", "path", "name"), cases("window", "far apart", "last layer", "last position"))
def test_kl_is_that_of_the_distributions_by_hand(backend, path, name):
    expected = kl_by_hand(by_hand(prompt()).logits, by_hand(prompt(), EDITS[name]).logits)
    clean = sc.run_clean(lens(backend), prompt(), chosen=CHOSEN, path=path)
    rows = [edits_of(EDITS[name]), [sc.rescale(3, 20, 1.0)]]
    run, same = sc.run_edited(lens(backend), clean, rows, kl=True, path=path)
    assert run.loss is None
    assert run.kl.shape == (96,)
    assert ((run.kl - expected).abs() <= 1e-7 + 1e-3 * expected).all()
    assert expected.max() > 1e-5
    first = min(pos for _, pos in EDITS[name])
    assert (run.kl[:first] == 0).all()
    assert (same.kl >= 0).all()
    assert same.kl.max() < (1e-9 if path == "fast" else 1e-12)
    (without,) = sc.run_edited(lens(backend), clean, rows[:1], path=path)
    assert without.kl is None


@pytest.mark.parametrize("path", ["fast", "reference"])
def test_kl_with_capped_logits_and_held_activations(path):
    hf, tokens = eager.tiny("gemma2"), eager.random_tokens(30)
    model = sc.load_model(eager.tiny("gemma2"), verbose=False)
    clean = sc.run_clean(model, tokens, chosen=(5,), path=path)
    free, held = sc.run_edited(
        model, clean, [[sc.zero(1, 5)], [sc.zero(1, 5), Hold("resid_post", positions="others")]], kl=True, path=path
    )
    logits = eager.forward(hf, tokens).logits
    expected = kl_by_hand(logits, eager.forward(hf, tokens, {(1, 5): 0.0}).logits)
    assert (free.kl - expected).abs().max() < 1e-4 * expected.max()
    assert held.kl[5] > 1e-5
    assert (held.kl[torch.arange(30) != 5] < 1e-9).all(), "all other positions are held"


@pytest.mark.parametrize("n", [1, 2, 5])
def test_divergences_made_in_slices_are_those_made_at_once(monkeypatch, n):
    generator = torch.Generator().manual_seed(n)
    weight, clean, edited = (torch.randn(shape, generator=generator) for shape in ((9, 4), (n, 4), (3, n, 4)))
    monkeypatch.setattr("sink_circuits.losses.LOGIT_SLICE_FLOATS", 72)  # two positions at a time
    found = next_token_kl(lambda x: x @ weight.T, clean, edited)
    for row in range(3):
        expected = kl_by_hand(clean @ weight.T, edited[row] @ weight.T)
        torch.testing.assert_close(found[row].double(), expected, atol=1e-6, rtol=1e-5)
    assert (next_token_kl(lambda x: x @ weight.T, clean, clean[None]) == 0).all()


def test_small_divergences_are_not_rounding():
    """A change of 1e-5 in the logits makes a divergence of about 1e-11; probabilities in float32 would say 1e-7."""
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(0))
    moved = logits + 1e-5 * torch.randn(1, 50, generator=torch.Generator().manual_seed(1))
    found = next_token_kl(lambda x: x, logits, moved[None])[0]
    assert found.item() == pytest.approx(kl_by_hand(logits, moved).item(), rel=1e-3)
    assert 1e-13 < found.item() < 1e-9


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    "more", [{}, {"bias": True}, {"scale": 0.3}, {"softcap": 2.0}, {"bias": True, "scale": 3.0, "softcap": 5.0}]
)
@pytest.mark.parametrize("n", [1, 2, 4, 17])
def test_losses_made_in_tiles_are_those_made_at_once(monkeypatch, n, more, threads):
    monkeypatch.setattr("sink_circuits.losses.TILE_POSITIONS", 3)
    monkeypatch.setattr("sink_circuits.losses.TILE_TOKENS", 4)
    monkeypatch.setattr("sink_circuits.attention.THREADED_FLOATS", 1)
    generator = torch.Generator().manual_seed(0)
    weight, resid = 3 * torch.randn(9, 4, generator=generator), 3 * torch.randn(n, 4, generator=generator)
    tokens, bias = torch.arange(n) % 9, torch.randn(9, generator=generator) if more.get("bias") else None
    made = Unembedding(torch.nn.Identity(), weight, bias, more.get("scale"), more.get("softcap"))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = next_token_loss(made, resid, tokens)
    finally:
        torch.set_num_threads(before)
    logits = resid.double() @ weight.double().T + (0 if bias is None else bias.double())
    logits = logits * more.get("scale", 1)
    logits = logits if "softcap" not in more else more["softcap"] * (logits / more["softcap"]).tanh()
    log_p = logits.log_softmax(-1)
    for position in range(n - 1):
        assert found[position].item() == pytest.approx(-log_p[position, tokens[position + 1]].item(), abs=1e-5)
    assert found[-1].isnan()
    torch.testing.assert_close(made(resid).double(), logits, atol=1e-5, rtol=1e-5)


def test_a_certain_next_token_has_a_loss_of_zero_and_an_impossible_one_a_large_one():
    made = Unembedding(torch.nn.Identity(), torch.tensor([[100.0], [-100.0]]))
    found = next_token_loss(made, torch.ones(3, 1), torch.tensor([0, 0, 1]))
    assert found[:2].tolist() == [0.0, 200.0]
