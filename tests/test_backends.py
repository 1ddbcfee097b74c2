"""HookedTransformer and TransformerBridge hold the same real weights and must tell the same numbers."""

import pytest
import torch
from common import BACKENDS

import sink_circuits as sc
from sink_circuits.models import adapt
from sink_circuits.runs import run_clean, run_edited
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


@hooked_only
@pytest.mark.slow
@torch.no_grad()
def test_the_same_numbers_from_both_on_smollm2():
    hooked, bridge = hooked_smollm2(), sc.load_model("smollm2-135m", verbose=False)
    tokens = sc.load_prompts("maths", 2).tokens(bridge, max_tokens=200)
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
    rows = [[sc.zero(1, chosen[1])], [sc.zero(2, chosen[1])], [sc.zero(1, chosen[1]), sc.zero(2, chosen[1])]]
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
