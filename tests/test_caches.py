"""Clean runs from the user's own cache: the same numbers, and refused where hooks, texts or rows are missing."""

from __future__ import annotations

import pytest
import torch
from common import BACKENDS, by_hand, lens, prompt
from edits_by_hand import CHOSEN, EDITS, check_columns, edits_of
from torch.nn.modules.module import register_module_forward_pre_hook

import sink_circuits as sc
from sink_circuits import planted
from sink_circuits.errors import CacheError, SinkCircuitsError


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("hooks", ["pattern", "rotated"])
def test_the_users_cache_gives_the_same(backend, hooks):
    model, batch = lens(backend), torch.stack([prompt((20,), 96, "b"), prompt()])
    wanted = sc.names_filter(model)
    if hooks == "rotated":
        patterns = wanted

        def wanted(name):
            return (patterns(name) and "pattern" not in name) or name.endswith(("hook_rot_q", "hook_rot_k"))

    _, cache = model.run_with_cache(batch, names_filter=wanted)
    clean = sc.run_clean(model, batch[1], chosen=CHOSEN, clean_cache=cache, row=1)
    direct = sc.run_clean(model, batch[1], chosen=CHOSEN)
    assert clean.path == "cache"
    assert (clean.later - direct.later).abs().max() < 1e-4
    assert (clean.diagonal - direct.diagonal).abs().max() < 1e-5
    check_columns(clean.columns, by_hand(prompt()).pattern)
    (run,) = sc.run_edited(model, clean, [edits_of(EDITS["joint"])])
    assert run.path == ("fast" if backend == "bridge" else "reference")
    check_columns(run.columns, by_hand(prompt(), EDITS["joint"]).pattern)
    assert torch.equal(run.columns.log_attention[:7], clean.columns.log_attention[:7])


def test_a_cache_without_batch_axis_serves():
    _, cache = lens().run_with_cache(prompt()[None], names_filter=sc.names_filter(lens()))
    clean = sc.run_clean(lens(), prompt(), chosen=CHOSEN, clean_cache=cache.remove_batch_dim())
    check_columns(clean.columns, by_hand(prompt()).pattern)


def test_a_cache_may_be_a_plain_dictionary():
    _, cache = lens().run_with_cache(prompt()[None], names_filter=sc.names_filter(lens()))
    clean = sc.run_clean(lens(), prompt(), chosen=CHOSEN, clean_cache={name: cache[name] for name in cache})
    check_columns(clean.columns, by_hand(prompt()).pattern)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_row_of_the_users_cache(side):
    """Residuals and patterns of the row's own positions; only those of the text itself."""
    short = prompt((20,), 70, "b")
    where = slice(26, 96) if side == "left" else slice(0, 70)
    tokens, mask = torch.full((2, 96), 5), torch.zeros(2, 96, dtype=torch.long)
    tokens[0], mask[0] = prompt(), 1
    tokens[1, where], mask[1, where] = short, 1
    _, cache = lens().run_with_cache(tokens, attention_mask=mask, names_filter=sc.names_filter(lens()))
    clean = sc.run_clean(lens(), short, chosen=(0, 20), clean_cache=cache, row=1, mask=mask[1])
    expected = by_hand(short)
    assert (torch.stack([clean.resid_post(i) for i in range(24)]) - expected.residuals).abs().max() < 1e-3
    check_columns(clean.columns, expected.pattern)


@pytest.mark.parametrize("letters", [("q", "k"), ("q",)])
def test_plain_queries_and_keys_serve_where_positions_are_learned(letters):
    """GPT-2 rotates nothing: what stands at hook_q and hook_k is what the scores are made from. One alone is not enough."""
    plant = planted.random_plant("cache", variant="gpt2", n_secondary=1)
    model, tokens = plant.bridge(), plant.prompt("x")
    wanted, ends = sc.names_filter(model), tuple(f"attn.hook_{letter}" for letter in letters)
    _, cache = model.run_with_cache(
        tokens[None], names_filter=lambda name: (wanted(name) and "pattern" not in name) or name.endswith(ends)
    )
    if len(letters) == 1:
        with pytest.raises(CacheError, match="hook_pattern"):
            sc.run_clean(model, tokens, clean_cache=cache)
        return
    with torch.no_grad():
        pattern = torch.stack(plant.hf_model(tokens[None], output_attentions=True).attentions)[:, 0].double()
    clean = sc.run_clean(model, tokens, chosen=(0, 30), clean_cache=cache)
    later = (pattern * torch.ones(80, 80).tril(-1)).sum(-2)
    assert (clean.later - later).abs().max() < 1e-4 * later.max()
    assert (clean.diagonal - pattern.diagonal(dim1=-2, dim2=-1)).abs().max() < 1e-4
    assert (clean.columns.log_attention.exp() - pattern[..., [0, 30]]).abs().max() < 1e-4


def test_only_block_0_is_run_again_where_a_cache_is_given():
    model = lens("hooked" if "hooked" in BACKENDS else "bridge")
    _, cache = model.run_with_cache(prompt()[None])
    sc.adapt(model)
    blocks, entered = list(model.blocks), set()

    def note(module, args):
        entered.update(i for i, block in enumerate(blocks) if block is module)

    handle = register_module_forward_pre_hook(note)  # a hook on the model itself would be the user's: checked anew
    try:
        assert sc.run_clean(model, prompt(), chosen=CHOSEN, clean_cache=cache).path == "cache"
    finally:
        handle.remove()
    assert entered and entered <= {0, 1}, "TransformerLens 4 enters block 1 and stops there"


@pytest.mark.parametrize("dropped", ["hook_resid_mid", "hook_mlp_out", "hook_pattern"])
def test_missing_hooks_are_named(dropped):
    wanted = sc.names_filter(lens())
    _, cache = lens().run_with_cache(prompt()[None], names_filter=lambda name: wanted(name) and dropped not in name)
    with pytest.raises(CacheError, match=rf"lacks 24 hooks, the first blocks\.0\..*{dropped}.*names_filter"):
        sc.run_clean(lens(), prompt(), clean_cache=cache)
    _, cache = lens().run_with_cache(
        prompt()[None],
        names_filter=lambda name: wanted(name) and f"blocks.7.{dropped}" not in name.replace("attn.", ""),
    )
    with pytest.raises(CacheError, match=rf"lacks 1 hooks, the first blocks\.7\..*{dropped}"):
        sc.run_clean(lens(), prompt(), clean_cache=cache)


def test_the_cache_of_another_text_is_refused():
    _, longer = lens().run_with_cache(prompt(n_tokens=100)[None], names_filter=sc.names_filter(lens()))
    with pytest.raises(CacheError, match="100 positions.*the text 96: cache the same tokens"):
        sc.run_clean(lens(), prompt(), clean_cache=longer)
    _, other = lens().run_with_cache(prompt(seed_name="other")[None], names_filter=sc.names_filter(lens()))
    with pytest.raises(CacheError, match="another text|same tokens"):
        sc.run_clean(lens(), prompt(), clean_cache=other)


def test_a_row_that_the_cache_lacks_is_refused():
    _, cache = lens().run_with_cache(prompt()[None], names_filter=sc.names_filter(lens()))
    with pytest.raises(SinkCircuitsError, match="row"):
        sc.run_clean(lens(), prompt(), clean_cache=cache, row=1)
