"""HookedTransformer and TransformerBridge hold the same real weights and must tell the same numbers."""

import functools

import pytest
import torch
from common import BACKENDS, real

import sink_circuits as sc
from sink_circuits.adapters import adapt
from sink_circuits.clean_runs import run_clean
from sink_circuits.edited_runs import run_edited
from sink_circuits.scores import column_log_odds, column_scores, scores_of

hooked_only = pytest.mark.skipif("hooked" not in BACKENDS, reason="TransformerLens 4 has no HookedTransformer")


def hooked_smollm2(*, processed: bool = False, n_ctx: int = 512):
    """SmolLM2's weights in a HookedTransformer, as a user of TransformerLens 3 would load a local folder."""
    from transformer_lens import HookedTransformer
    from transformer_lens.loading_from_pretrained import get_pretrained_model_config, get_pretrained_state_dict
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from sink_circuits.weights import fetch

    folder = str(fetch("smollm2-135m", verbose=False))
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    cfg = get_pretrained_model_config(folder, hf_cfg=hf.config.to_dict())
    cfg.rotary_base = int(hf.config.rope_parameters["rope_theta"])
    cfg.n_ctx = n_ctx  # its causal mask is n_ctx squared
    state = get_pretrained_state_dict(folder, cfg, hf)
    model = HookedTransformer(cfg, AutoTokenizer.from_pretrained(folder), move_to_device=False)
    model.load_and_process_state_dict(
        state, fold_ln=processed, center_writing_weights=False, center_unembed=False, fold_value_biases=False
    )
    return model.eval()


@functools.cache
def hooked_gemma3(*, n_ctx: int = 1024):
    """Gemma 3's weights in a HookedTransformer: its configuration is in TransformerLens 3.9, by name, so that no hub is
    asked; the recipe for local folders knows no Gemma 3, whose rotary bases differ by kind of layer."""
    from transformer_lens import HookedTransformer

    bridge, plain, _ = real("gemma-3-270m")
    return HookedTransformer.from_pretrained_no_processing(
        "google/gemma-3-270m",
        hf_model=plain,
        tokenizer=bridge.tokenizer,
        dtype=torch.float32,
        n_ctx=n_ctx,
        device="cpu",
    ).eval()


HOOKED = {"smollm2-135m": hooked_smollm2, "gemma-3-270m": hooked_gemma3}
PROMPTS = {"smollm2-135m": (0, 1), "gemma-3-270m": (0, 30)}  # Gemma's second is longer than its window
MAX_TOKENS = {"smollm2-135m": 200, "gemma-3-270m": None}
FORMING = {"smollm2-135m": (1, 2), "gemma-3-270m": (2, 3)}


def both(name):
    """The model in a HookedTransformer and in a bridge, and two texts."""
    bridge = real(name)[0]
    tokens = sc.load_prompts("maths").tokens(bridge, max_tokens=MAX_TOKENS[name])
    chosen = PROMPTS[name]
    return HOOKED[name](), bridge, sc.Tokens(tuple(tokens[i] for i in chosen), tuple(tokens.names[i] for i in chosen))


@hooked_only
@pytest.mark.slow
@torch.no_grad()
def test_hooked_gemma_is_the_hugging_face_model_beyond_its_window():
    """Two rotary bases, norms of queries and keys, and windows: all three must be right for these to be equal."""
    hooked, _, tokens = both("gemma-3-270m")
    ids, plain = tokens[1], real("gemma-3-270m")[1]
    adapter = adapt(hooked)
    assert adapter.processed == ()
    assert adapter.windows == (*(512,) * 5, None) * 3
    assert len(ids) > 512 + 32
    out = plain(ids[None], output_attentions=True, output_hidden_states=True)
    logits, cache = hooked.run_with_cache(ids[None], names_filter=lambda name: name.endswith(("pattern", "resid_post")))
    torch.testing.assert_close(logits[0].log_softmax(-1), out.logits[0].log_softmax(-1), atol=1e-3, rtol=1e-4)
    for layer, pattern in enumerate(out.attentions):
        torch.testing.assert_close(cache["pattern", layer][0], pattern[0], atol=1e-4, rtol=1e-3)
    for layer, residual in enumerate(out.hidden_states[1:-1]):  # the last one is after the final norm
        limit = 1e-5 * residual.abs().max().item()
        torch.testing.assert_close(cache["resid_post", layer][0], residual[0], atol=limit, rtol=1e-4)


@hooked_only
@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", HOOKED)
def test_the_same_numbers_from_both(name):
    hooked, bridge, tokens = both(name)
    found = {name: sc.find_sinks(model, tokens, verbose=False) for name, model in (("h", hooked), ("b", bridge))}
    exact = ["prompt", "pos", "token_id", "kind", "l_start", "l_end"]
    assert len(found["b"]) >= 6
    assert found["h"].table[exact].equals(found["b"].table[exact])
    for column in ("cosine", "norm", "norm_ratio", "score", "score_ratio"):
        assert found["h"].table[column].to_numpy() == pytest.approx(
            found["b"].table[column].to_numpy(), rel=2e-3, nan_ok=True
        )

    row = found["b"].select("secondary", "primary-like").table.iloc[0]
    ids, chosen = tokens[tokens.names.index(row.prompt)], (int(row.primary_pos), int(row.pos))
    first, second = (sc.zero(layer, chosen[1]) for layer in FORMING[name])
    rows = [[first], [second], [first, second]]
    cleans, runs = [], []
    for model in (hooked, bridge):
        cleans.append(run_clean(model, ids, chosen=chosen))
        runs.append(run_edited(model, cleans[-1], rows, loss=True))
    assert [clean.path for clean in cleans] == ["reference", "fast"]
    windows = adapt(bridge).windows
    torch.testing.assert_close(*(scores_of(clean, windows) for clean in cleans), atol=2e-5, rtol=1e-3, equal_nan=True)
    for one, other in zip(*runs, strict=True):
        torch.testing.assert_close(
            column_scores(one.columns, windows),
            column_scores(other.columns, windows),
            atol=2e-5,
            rtol=1e-3,
            equal_nan=True,
        )
        torch.testing.assert_close(
            column_log_odds(one.columns, windows),
            column_log_odds(other.columns, windows),
            atol=2e-3,
            rtol=1e-3,
            equal_nan=True,
        )
        torch.testing.assert_close(one.loss, other.loss, atol=1e-3, rtol=1e-3, equal_nan=True)


@hooked_only
@pytest.mark.slow
def test_processed_weights_are_said_and_official_refuses_them():
    model = hooked_smollm2(processed=True)
    with pytest.warns(UserWarning, match="folded norms"):
        assert sc.load_model(model) is model
    tokens = torch.randint(100, 5000, (64,), generator=torch.Generator().manual_seed(0))
    with pytest.raises(sc.SinkCircuitsError, match="processed.*without folding"):
        sc.find_sinks(model, tokens, method="official", verbose=False)
