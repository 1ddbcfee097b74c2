"""Every architecture the table in the docs names, from small random configurations: nothing is downloaded."""

import functools
import re
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import transformers

import sink_circuits as sc
from sink_circuits.adapters import adapt
from sink_circuits.clean_runs import run_clean
from sink_circuits.edited_runs import run_edited
from sink_circuits.errors import ModelError
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
    "phi3": ("Phi3ForCausalLM", "Phi3Config", {**PLAIN, "sliding_window": 24}, "fast", False),
    "phi4": ("Phi3ForCausalLM", "Phi3Config", {**PLAIN, "partial_rotary_factor": 0.75, "tie_word_embeddings": True}, "fast", False),
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
    "olmo3": ("Olmo3ForCausalLM", "Olmo3Config", {**PLAIN, "sliding_window": 24}, "fast", False),
    "starcoder2": ("Starcoder2ForCausalLM", "Starcoder2Config", {**PLAIN, "sliding_window": 24}, "fast", False),
    "nemotron": ("NemotronForCausalLM", "NemotronConfig", PLAIN, "fast", False),
    "granite": ("GraniteForCausalLM", "GraniteConfig", PLAIN, "reference", False),
    "opt": (
        "OPTForCausalLM", "OPTConfig",
        {**FALCON, "ffn_dim": 96, "max_position_embeddings": 256, "word_embed_proj_dim": 64}, "reference", False,
    ),
    "gpt_neo": (
        "GPTNeoForCausalLM", "GPTNeoConfig",
        {"vocab_size": 128, "hidden_size": 64, "num_layers": 4, "num_heads": 4, "attention_types": [[["global", "local"], 2]],
         "window_size": 24, "max_position_embeddings": 256}, "reference", False,
    ),
    "llama4": ("Llama4ForCausalLM", "Llama4TextConfig", {**NARROW, "num_local_experts": 2}, "reference", False),
    "mpt": (
        "MptForCausalLM", "MptConfig", {"vocab_size": 128, "d_model": 64, "n_layers": 4, "n_heads": 4, "max_seq_len": 256},
        "reference", False,
    ),
}  # fmt: skip
BESIDE = ("olmo3", "starcoder2", "nemotron", "granite", "opt", "gpt_neo", "llama4", "mpt")
"""Beyond those that every run of the tests must cover."""
NAMES = [pytest.param(name, marks=pytest.mark.slow if name in BESIDE else ()) for name in ARCHITECTURES]
NEEDS_TL4 = {"cohere": "TransformerLens 3.9 computes Cohere's logits wrongly, and the load check says so"}
REFUSED = {
    "mamba": ("MambaForCausalLM", "MambaConfig", {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}),
    "bert": ("BertForMaskedLM", "BertConfig", {**FALCON, "intermediate_size": 96}),
    "t5": (
        "T5ForConditionalGeneration", "T5Config",
        {"vocab_size": 128, "d_model": 64, "num_layers": 2, "num_heads": 4, "d_ff": 96, "d_kv": 16},
    ),
}  # fmt: skip
DOCS = Path(__file__).parents[1] / "docs" / "architectures.md"


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


def checks_of(adapter):
    """Without those that the fast path failed, where it was refused for that."""
    return [check for check in adapter.checks if adapter.twin is not None or "fast path" not in check.name]


def load(name: str):
    refused = name in NEEDS_TL4 and version("transformer-lens").startswith("3.")
    return (_refused if refused else _loaded)(name)


@functools.cache
def _loaded(name: str):
    """Shared by tests: none may change it."""
    model, path, parallel = build(name)
    return sc.load_model(model), path, parallel


def _refused(name: str):
    model, _, _ = build(name)
    with pytest.raises(ModelError, match="log-probabilities equal plain Hugging Face's"):
        sc.load_model(model)
    pytest.skip(NEEDS_TL4[name])


@pytest.mark.parametrize("name", NAMES)
def test_scores_paths_and_edits(name, tokens):
    pattern, logits = hugging_face(name, tokens)
    model, path, parallel = load(name)
    adapter = adapt(model)
    assert adapter.parallel == parallel
    assert all(check.passed for check in checks_of(adapter))
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


@pytest.mark.parametrize("name", NAMES)
def test_invariants_of_edited_runs(name):
    """No-op, impossible cells (layers and queries) and both paths: what `sink-circuits check` says of a model of one's own."""
    for check in sc.check_invariants(load(name)[0]):
        assert check.passed, f"{check.name}: {check.error}"


@pytest.mark.parametrize("name", NAMES)
def test_padding_on_either_side_changes_no_number(name, tokens):
    """Rows of a batch of different lengths give what each text gives by itself, to the bit."""
    model = load(name)[0]
    rows = [tokens, tokens[:37].flip(0)]
    alone = sc.sink_scores(model, rows, min_queries=8).scores
    for side in ("left", "right"):
        padded, mask = torch.zeros(2, N, dtype=torch.long), torch.zeros(2, N, dtype=torch.long)
        for index, row in enumerate(rows):
            where = slice(N - len(row), None) if side == "left" else slice(len(row))
            padded[index, where], mask[index, where] = row, 1
        batch = sc.sink_scores(model, padded, attention_mask=mask, min_queries=8).scores
        assert all(
            torch.equal(one.nan_to_num(-1), other.nan_to_num(-1)) for one, other in zip(batch, alone, strict=True)
        )


EVERY_RUN = ("llama", "gemma3", "gpt2")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in EVERY_RUN else pytest.mark.slow) for name in ARCHITECTURES]
)
def test_half_precision_agrees_with_float32(name, dtype, tokens):
    """Scores are means of weights of at most 1: they differ by less than the type's epsilon (measured: at most half of it)."""
    model, path, _ = load(name)
    exact = sc.sink_scores(model, tokens, min_queries=8).scores[0]
    half = sc.load_model(build(name)[0].to(dtype))
    assert (adapt(half).twin is None) == (path == "reference")
    assert all(check.passed for check in checks_of(adapt(half)))
    scores = sc.sink_scores(half, tokens, min_queries=8).scores[0]
    assert scores.isfinite().eq(exact.isfinite()).all()
    assert (scores - exact).abs().nan_to_num().max() < torch.finfo(dtype).eps


def test_a_state_space_beside_attention_takes_the_reference_path():
    """However little it writes: what it carries from before an edit is no key and no value."""
    config = transformers.FalconH1Config(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_n_groups=1, mamba_d_state=8, max_position_embeddings=128,
    )  # fmt: skip
    torch.manual_seed(0)
    try:
        model = sc.load_model(transformers.FalconH1ForCausalLM(config).eval())
    except ModelError as error:  # TransformerLens versions that do not know it say so
        assert str(error).endswith(".")
    else:
        assert adapt(model).twin_refusal == "the blocks mix tokens beside attention, by convolutions or a state space"


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_such_blocks_is_refused(name):
    model_class, config_class, config = REFUSED[name]
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**config)).eval()
    with pytest.raises(ModelError) as error:
        sc.load_model(model)
    said = str(error.value)
    assert "\n" not in said and said.endswith(".")
    told = next(line for line in DOCS.read_text().splitlines() if line.startswith(f"| `{name}`"))
    quoted = re.search(r"\*(.+?)\*", told.split("|")[3])[1]
    assert said.startswith(quoted.removesuffix("...")), f"the docs say {quoted!r}, the program {said!r}"


def test_the_table_in_the_docs_names_what_is_run_here():
    rows = {}
    for line in DOCS.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if re.fullmatch(r"`\w+`", cells[0]):
            rows[cells[0].strip("`")] = cells[1:]
    assert set(rows) == {*ARCHITECTURES, *REFUSED}
    for name, (_, _, _, path, _) in ARCHITECTURES.items():
        first, second = rows[name][1].split(",") if "," in rows[name][1] else (rows[name][1], rows[name][1])
        assert first.strip() == ("refused by 3.9" if name in NEEDS_TL4 else path), name
        assert path in second, name
