"""Every architecture the table in the docs names, from small random configurations: nothing is downloaded."""

import pytest
import torch
import transformers

import sink_circuits as sc
from sink_circuits.errors import ModelError
from sink_circuits.models import adapt
from sink_circuits.runs import run_clean, run_edited
from sink_circuits.scores import column_log_odds, column_scores, scores_of

N = 60
PLAIN = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
NARROW = {**PLAIN, "head_dim": 16}
WINDOWED = {**NARROW, "sliding_window": 24}
EXPERTS = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
OLD = {"vocab_size": 128, "n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 256}
FALCON = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
NO_GROUPS = {k: v for k, v in PLAIN.items() if k != "num_key_value_heads"}
# name: (model class, config class, config, execution path, parallel blocks)
ARCHITECTURES = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", OLD, "fast", False),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", NO_GROUPS, "fast", True),
    "gptj": ("GPTJForCausalLM", "GPTJConfig", {**OLD, "rotary_dim": 8}, "reference", True),
    "llama": ("LlamaForCausalLM", "LlamaConfig", PLAIN, "fast", False),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**PLAIN, "sliding_window": 24}, "fast", False),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", PLAIN, "fast", False),
    "qwen2_moe": ("Qwen2MoeForCausalLM", "Qwen2MoeConfig", {**PLAIN, **EXPERTS, "shared_expert_intermediate_size": 64}, "fast", False),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", NARROW, "fast", False),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**NARROW, **EXPERTS}, "fast", False),
    "phi": ("PhiForCausalLM", "PhiConfig", PLAIN, "fast", True),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", PLAIN, "fast", False),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", NARROW, "fast", False),
    "gemma2": (
        "Gemma2ForCausalLM", "Gemma2Config",
        {**WINDOWED, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 16}, "fast", False,
    ),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**WINDOWED, "query_pre_attn_scalar": 16}, "fast", False),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", PLAIN, "fast", False),
    "gpt_oss": ("GptOssForCausalLM", "GptOssConfig", {**WINDOWED, "num_local_experts": 4, "num_experts_per_tok": 2}, "fast", False),
    "falcon": ("FalconForCausalLM", "FalconConfig", {**FALCON, "alibi": False}, "reference", True),
    "falcon_alibi": (
        "FalconForCausalLM", "FalconConfig",
        {**FALCON, "alibi": True, "new_decoder_architecture": False, "parallel_attn": False, "multi_query": False}, "reference", False,
    ),
    "bloom": ("BloomForCausalLM", "BloomConfig", {"vocab_size": 128, "hidden_size": 64, "n_layer": 4, "n_head": 4}, "reference", False),
    "cohere": ("CohereForCausalLM", "CohereConfig", PLAIN, "fast", True),
    "stablelm": ("StableLmForCausalLM", "StableLmConfig", PLAIN, "fast", False),
}  # fmt: skip
NEEDS_TL4 = {"cohere": "TransformerLens 3.9 computes Cohere's logits wrongly, and the load check says so"}


def build(name: str, **how):
    """The same random Hugging Face model each time, with weights large enough to tell positions apart."""
    model_class, config_class, config, path, parallel = ARCHITECTURES[name]
    torch.manual_seed(0)
    model = getattr(transformers, model_class)._from_config(getattr(transformers, config_class)(**config), **how).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.08)
    return model, path, parallel


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(3, 128, (N,), generator=torch.Generator().manual_seed(1))


def hugging_face(name: str, tokens):
    """What the unwrapped model says with eager attention: pattern [layer, head, query, key], logits [pos, d_vocab]."""
    model, _, _ = build(name, attn_implementation="eager")
    with torch.no_grad():
        out = model(tokens[None], output_attentions=True)
    return torch.stack([a[0] for a in out.attentions]).double(), out.logits[0]


def load(name: str):
    from importlib.metadata import version

    model, path, parallel = build(name)
    if name in NEEDS_TL4 and version("transformer-lens").startswith("3."):
        with pytest.raises(ModelError, match="log-probabilities equal plain Hugging Face's"):
            sc.load_model(model)
        pytest.skip(NEEDS_TL4[name])
    return sc.load_model(model), path, parallel


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_scores_paths_and_edits(name, tokens):
    pattern, logits = hugging_face(name, tokens)
    model, path, parallel = load(name)
    adapter = adapt(model)
    assert adapter.parallel == parallel
    cleans = {
        "auto": run_clean(model, tokens, chosen=(0, 20)),
        "reference": run_clean(model, tokens, chosen=(0, 20), path="reference"),
    }
    assert cleans["auto"].path == path, adapter.twin_refusal
    position = torch.arange(N)
    for clean in cleans.values():
        scores = scores_of(clean, adapter.windows, min_queries=8)
        for layer, window in enumerate(adapter.windows):
            distance = position[:, None] - position[None]
            visible = (distance > 0) & (distance < (window or N))
            expected = (pattern[layer] * visible).sum(-2) / visible.sum(-2)
            enough = visible.sum(-2) >= 8
            torch.testing.assert_close(scores[layer][:, enough].double(), expected[:, enough], atol=2e-6, rtol=1e-4)
            assert scores[layer][:, ~enough].isnan().all()

    rows = [[sc.zero(1, 20)], [sc.zero(0, 20), sc.rescale(2, 30, 3.0)], [sc.rescale(1, 20, 1.0)], []]
    runs = {how: run_edited(model, clean, rows, loss=True, path=how) for how, clean in cleans.items()}
    own_loss = torch.nn.functional.cross_entropy(logits[:-1].float(), tokens[1:], reduction="none")
    for how, edited in runs.items():
        clean = cleans[how]
        torch.testing.assert_close(edited[3].loss[:-1], own_loss, atol=1e-5, rtol=1e-5)
        for a, b in (
            (edited[2].columns.log_attention, edited[3].columns.log_attention),
            (edited[2].columns.log_rest, edited[3].columns.log_rest),
        ):
            assert torch.equal(a, b), "a no-op differs from an unedited row of the same batch"
        assert torch.equal(edited[0].columns.log_attention[:2], clean.columns.log_attention[:2])
        changed = column_scores(edited[0].columns, adapter.windows, 8) - column_scores(
            clean.columns, adapter.windows, 8
        )
        assert changed[2:].abs().nan_to_num().max() > 1e-5, "the edit did not reach the later layers"
    for fast, reference in zip(runs["auto"], runs["reference"], strict=True):
        torch.testing.assert_close(
            column_log_odds(fast.columns, adapter.windows, 8), column_log_odds(reference.columns, adapter.windows, 8),
            atol=2e-5, rtol=1e-5, equal_nan=True,
        )  # fmt: skip
        torch.testing.assert_close(fast.loss, reference.loss, atol=1e-5, rtol=1e-5, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_half_precision_agrees_with_float32(name, dtype, tokens):
    exact = sc.sink_scores(load(name)[0], tokens, min_queries=8).scores[0]
    model = sc.load_model(build(name)[0].to(dtype))
    scores = sc.sink_scores(model, tokens, min_queries=8).scores[0]
    assert scores.isfinite().eq(exact.isfinite()).all()
    assert (scores - exact).abs().nan_to_num().max() < (0.02 if dtype is torch.bfloat16 else 0.003)


def test_a_model_without_mlp_outputs_is_refused():
    config = transformers.MambaConfig(vocab_size=128, hidden_size=32, num_hidden_layers=2, state_size=4)
    with pytest.raises(ModelError):
        sc.load_model(transformers.MambaForCausalLM(config).eval())
