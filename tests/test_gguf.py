"""GGUF files of many architectures, against the Hugging Face models that they were written from.

The files are written here as llama.cpp's converter writes them: the same keys, tensor names and layouts (names by
gguf-py's own table), so that a file holds all that llama.cpp knows of the model. Weights are random, but for two tokens
whose embeddings are long and alike: sinks, so that there is something to find and to edit.
"""

import functools
import json
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import common  # noqa: F401 (one thread)
import numpy as np
import pytest
import torch
import transformers

import sink_circuits as sc
from sink_circuits.adapters import adapt
from sink_circuits.errors import ModelError, WeightsError

gguf = pytest.importorskip("gguf")

N, SINKS, D_VOCAB = 60, {0: 2, 20: 9}, 318  # tokens; token ids of the sinks by position
TEXT = "The quick brown fox doesn't jump over THE lazy dog.\n\nIf 12 + 1234 = 1246,  then the other answer is 42."
PLAIN = {
    "vocab_size": D_VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None,
}  # fmt: skip
WIDE = {**PLAIN, "num_attention_heads": 2, "num_key_value_heads": 1, "sliding_window": 24}  # heads of 256, as Gemma's
NARROW = {**PLAIN, "head_dim": 16, "sliding_window": 24, "query_pre_attn_scalar": 16}
OLD = {"vocab_size": D_VOCAB, "hidden_size": 64, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
GPT2 = {"vocab_size": D_VOCAB, "n_embd": 64, "n_layer": 4, "n_head": 4, "bos_token_id": 0, "eos_token_id": 1}
FALCON = {**OLD, "num_hidden_layers": 4, "num_attention_heads": 4, "alibi": False, "bias": False}


# --- what llama.cpp's converter does -----------------------------------------------------------
def rotary_halves(w, n_heads):
    """Rows of each head from (first halves, second halves) of the rotary pairs to pair after pair."""
    return w.reshape(n_heads, 2, len(w) // n_heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def as_they_are(name, w, config):
    return w


def llama_tensors(name, w, config):
    heads = {"attn_q": config.num_attention_heads, "attn_k": getattr(config, "num_key_value_heads", None)}
    return rotary_halves(w, heads[kind]) if (kind := name.split(".")[-2]) in heads else w


def norms_plus_one(name, w, config):
    return w + 1 if name.endswith("norm.weight") else w


def transposed(name, w, config):
    inner = ("attn_qkv.weight", "attn_output.weight", "ffn_up.weight", "ffn_down.weight")
    return w.T if name.endswith(inner) else w


def queries_first(name, w, config):
    """Bloom's fused rows, from (q, k, v) head by head to all queries, all keys, all values."""
    if "attn_qkv" not in name:
        return w
    by_head = w.reshape(config.n_head, 3, config.hidden_size // config.n_head, *w.shape[1:])
    return np.concatenate([by_head[:, part].reshape(-1, *w.shape[1:]) for part in range(3)])


def common_keys(config) -> dict:
    """What every converter states of a model, where its config has it."""
    names = {
        "block_count": ("num_hidden_layers",),
        "context_length": ("max_position_embeddings",),
        "embedding_length": ("hidden_size",),
        "feed_forward_length": ("intermediate_size", "ffn_hidden_size"),
        "attention.head_count": ("num_attention_heads",),
        "attention.head_count_kv": ("num_key_value_heads",),
        "attention.layer_norm_rms_epsilon": ("rms_norm_eps",),
        "attention.layer_norm_epsilon": ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps"),
        "attention.key_length": ("head_dim",),
        "attention.value_length": ("head_dim",),
        "attention.sliding_window": ("sliding_window",),
        "attn_logit_softcapping": ("attn_logit_softcapping",),
        "final_logit_softcapping": ("final_logit_softcapping",),
    }
    stated = {}
    for key, attributes in names.items():
        values = [value for name in attributes if (value := getattr(config, name, None)) is not None]
        stated |= {key: values[0]} if values else {}
    rope = getattr(config, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)
    if "rope_theta" in rope:
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        stated["rope.freq_base"] = float(rope["rope_theta"])
        stated["rope.dimension_count"] = int(rope.get("partial_rotary_factor", 1.0) * head_dim)
    if rope.get("rope_type") in ("linear", "yarn"):
        stated |= {"rope.scaling.type": rope["rope_type"], "rope.scaling.factor": rope["factor"]}
        if "original_max_position_embeddings" in rope:
            stated["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
    return stated


def rope_factors(config) -> dict:
    """Llama 3's rotary scaling, which a file holds as a table of divisors and nothing else."""
    rope = config.rope_parameters
    if rope["rope_type"] != "llama3":
        return {}
    scaled = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")[0].double().numpy()
    plain = rope["rope_theta"] ** (-np.arange(len(scaled)) / len(scaled))
    return {"rope_freqs.weight": (plain / scaled).astype(np.float32)}


# --- cases --------------------------------------------------------------------------------------
class Case(NamedTuple):
    model: str
    config: dict
    architecture: str
    tensors: Callable = as_they_are
    keys: Mapping = MappingProxyType({})  # beyond the common ones
    split: str = "default"  # of the tokenizer, see SPLITS


def rope(theta, **more):
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta, **more}}


def gemma3_rope(theta, **more):
    full = {"rope_type": "default", "rope_theta": theta, **more}
    return {
        "rope_parameters": {"full_attention": full, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    }


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip
GEMMA3 = {**NARROW, "num_hidden_layers": 6}
FOUR = {"feed_forward_length": 256}
CASES = {
    "llama": Case("Llama", PLAIN | rope(5e5), "llama", llama_tensors),
    "llama-wide-heads": Case("Llama", {**PLAIN, "head_dim": 32, "rms_norm_eps": 0.01}, "llama", llama_tensors),
    "llama-bpe": Case("Llama", PLAIN, "llama", llama_tensors, split="llama-bpe"),
    "llama-biases": Case("Llama", {**PLAIN, "attention_bias": True}, "llama", llama_tensors),
    "llama3": Case("Llama", PLAIN | rope(5e5, **LLAMA3), "llama", llama_tensors),
    "llama-linear": Case("Llama", PLAIN | rope(1e4, rope_type="linear", factor=4.0), "llama", llama_tensors),
    "mistral": Case("Mistral", {**PLAIN, "sliding_window": None}, "llama", llama_tensors),
    "qwen2": Case("Qwen2", PLAIN | rope(1e6), "qwen2", split="qwen2"),
    "qwen2-yarn": Case(
        "Qwen2", PLAIN | rope(1e6, rope_type="yarn", factor=4.0, original_max_position_embeddings=64), "qwen2",
        split="qwen2",
    ),
    "qwen3": Case("Qwen3", {**PLAIN, "head_dim": 128} | rope(1e6), "qwen3", split="qwen2"),
    "qwen3-narrow-heads": Case("Qwen3", {**PLAIN, "head_dim": 16} | rope(1e6), "qwen3", split="qwen2"),
    "phi3": Case("Phi3", {**PLAIN, "sliding_window": None}, "phi3"),
    "phi3-window": Case("Phi3", {**PLAIN, "sliding_window": 24}, "phi3"),
    "gemma2": Case("Gemma2", WIDE, "gemma2", norms_plus_one),
    "gemma2-soft-caps": Case(
        "Gemma2", {**WIDE, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}, "gemma2", norms_plus_one
    ),
    "gemma2-narrow-heads": Case("Gemma2", NARROW, "gemma2", norms_plus_one),
    "gemma3": Case("Gemma3", {**WIDE, "num_hidden_layers": 6} | gemma3_rope(1e5), "gemma3", norms_plus_one),
    "gemma3-narrow-heads": Case("Gemma3", GEMMA3, "gemma3", norms_plus_one),
    "gemma3-linear": Case(
        "Gemma3", {**WIDE, "num_hidden_layers": 6} | gemma3_rope(1e6, rope_type="linear", factor=8.0), "gemma3",
        norms_plus_one,
    ),
    "gpt2": Case("GPT2", GPT2, "gpt2", transposed, FOUR | {"context_length": 1024}),
    "gpt2-short": Case("GPT2", {**GPT2, "n_positions": 128}, "gpt2", transposed, FOUR | {"context_length": 128}),
    "falcon": Case("Falcon", FALCON, "falcon", keys={"attention.head_count_kv": 1, "context_length": 2048}),
    "falcon-epsilon": Case(
        "Falcon", {**FALCON, "layer_norm_epsilon": 0.01}, "falcon",
        keys={"attention.head_count_kv": 1, "context_length": 2048},
    ),
    "starcoder2": Case("Starcoder2", {**PLAIN, "sliding_window": None}, "starcoder2"),
    "starcoder2-base": Case("Starcoder2", {**PLAIN, "sliding_window": None} | rope(1e6), "starcoder2"),
    "stablelm": Case("StableLm", PLAIN, "stablelm"),
    "stablelm-half": Case("StableLm", PLAIN | rope(1e4, partial_rotary_factor=0.5), "stablelm"),
    "bloom": Case("Bloom", {**OLD, "n_layer": 4, "n_head": 4}, "bloom", queries_first, FOUR | {"context_length": 2048}),
    "nemotron": Case("Nemotron", PLAIN, "nemotron", norms_plus_one),
    "nemotron-epsilon": Case("Nemotron", {**PLAIN, "norm_eps": 0.01}, "nemotron", norms_plus_one),
}  # fmt: skip
FAST = ("llama", "qwen2", "phi3", "gemma3", "gpt2")
UNSUPPORTED = {
    "olmo2": Case("Olmo2", PLAIN, "olmo2"),
    "gemma": Case("Gemma", {**PLAIN, "head_dim": 16}, "gemma", norms_plus_one),
    "gptneox": Case("GPTNeoX", {k: v for k, v in PLAIN.items() if k != "num_key_value_heads"}, "gptneox"),
    "phi2": Case("Phi", PLAIN, "phi2"),
    "command-r": Case("Cohere", PLAIN, "command-r"),
}


def build(case: Case):
    """The random Hugging Face model of a case."""
    generator = torch.Generator().manual_seed(1)
    config_name = f"{case.model}{'Text' if case.model == 'Gemma3' else ''}Config"
    suffix = "LMHeadModel" if case.model == "GPT2" else "ForCausalLM"
    with torch.random.fork_rng(devices=[]):
        config = getattr(transformers, config_name)(**case.config)
        model = getattr(transformers, case.model + suffix)._from_config(config, attn_implementation="eager").eval()
    for name, parameter in model.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator)
        is_scale = parameter.ndim == 1 and not name.endswith("bias")
        parameter.data = 0.12 * drawn if parameter.ndim > 1 else 0.2 * drawn + (parameter.data if is_scale else 0.0)
    embedding = model.get_input_embeddings().weight.data
    direction = torch.nn.functional.normalize(torch.randn(embedding.shape[1], generator=generator), dim=0)
    for token in SINKS.values():
        embedding[token] = 300 * direction + 0.1 * torch.randn(embedding.shape[1], generator=generator)
    model.tie_weights()
    return model


def write(model, case: Case, path, kind="F32"):
    """The model as a GGUF file; matrices in the number format `kind`, and what they round to put into the model."""
    writer = gguf.GGUFWriter(str(path), case.architecture)
    writer.add_name("toy")
    for key, value in ({"vocab_size": D_VOCAB} | common_keys(model.config) | dict(case.keys)).items():
        add = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32}[type(value)]
        add(f"{case.architecture}.{key}", value)
    if case.architecture.startswith("gemma"):
        add_sentencepieces(writer)
    else:
        add_byte_level(writer, case.split)
    names = gguf.get_tensor_name_map(
        {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[case.architecture], model.config.num_hidden_layers
    )
    number_format = gguf.GGMLQuantizationType[kind]
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        stored = name.removeprefix("transformer.") if case.architecture == "bloom" else name
        to = names.get_name(stored, try_suffixes=(".weight", ".bias"))
        assert to is not None, name
        values = np.ascontiguousarray(case.tensors(to, tensor.numpy().astype(np.float32), model.config))
        if tensor.ndim > 1 and kind != "F32":
            packed = gguf.quants.quantize(values, number_format)
            writer.add_tensor(to, packed, raw_dtype=number_format)
            # Rounding works on rows, and a permutation of rows keeps them whole: round in the model's own order.
            own = gguf.quants.dequantize(
                gguf.quants.quantize(tensor.numpy().astype(np.float32), number_format), number_format
            )
            tensor.copy_(torch.from_numpy(own))
        else:
            writer.add_tensor(to, values)
    if case.model == "Llama":
        for to, values in rope_factors(model.config).items():
            writer.add_tensor(to, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


SPLITS = {  # tokenizer.ggml.pre, and how such a tokenizer cuts a text before it merges
    "default": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",  # GPT-2
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}


@functools.cache
def byte_level(split="default"):
    """A byte-level BPE tokenizer with merges of a few short sentences."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLITS[split]), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.train_from_iterator(
        [TEXT, "the then there these other another mother", "answers to the quick question"] * 3,
        trainers.BpeTrainer(
            vocab_size=D_VOCAB, special_tokens=["<s>", "</s>"], show_progress=False,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        ),
    )  # fmt: skip
    return tokenizer


def add_byte_level(writer, split):
    tokenizer = byte_level(split)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    assert len(vocabulary) == D_VOCAB
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list([token for token, _ in vocabulary])
    writer.add_token_types([3, 3] + [1] * (D_VOCAB - 2))
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(1)


PIECES = ("t", "th", "the", "he", "er", "qu", "▁t", "▁th", "▁the", "▁qu", "▁", *sorted(set(TEXT) - set(" theq")))


def add_sentencepieces(writer):
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES]
    kinds = [3, 3, 3, 2] + [6] * 256 + [1] * len(PIECES)
    unused = [f"<unused{number}>" for number in range(D_VOCAB - len(tokens))]
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens + unused)
    writer.add_token_scores([-float(number) for number in range(D_VOCAB)])
    writer.add_token_types(kinds + [4] * len(unused))
    for name, number in {"pad": 0, "eos": 1, "bos": 2, "unk": 3}.items():
        getattr(writer, f"add_{name}_token_id")(number)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)


# --- tests --------------------------------------------------------------------------------------
@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv(sc.weights.CACHE_VARIABLE, str(tmp_path / "cache"))


@pytest.fixture
def ids():
    drawn = torch.randint(10, D_VOCAB, (N,), generator=torch.Generator().manual_seed(3))
    for position, token in SINKS.items():
        drawn[position] = token
    return drawn


@torch.no_grad()
def difference(model, plain, ids) -> float:
    """The largest difference of two models' log-probabilities, as a share of the largest log-probability."""
    expected = plain(ids[None]).logits[0].log_softmax(-1)
    return ((model(ids[None])[0].log_softmax(-1) - expected).abs().max() / expected.abs().max()).item()


def marked(names):
    """Slow but for a few."""
    for name in names:
        marks = [] if name in FAST else [pytest.mark.slow]
        yield pytest.param(name, marks=marks)


@pytest.mark.parametrize("name", list(marked(CASES)))
def test_a_file_gives_the_model_it_was_written_from(name, ids, tmp_path):
    case = CASES[name]
    plain = build(case)
    model = sc.load_model(write(plain, case, tmp_path / f"{name}.gguf"), verbose=False)
    assert difference(model, plain, ids) < 1e-5
    if not case.architecture.startswith("gemma"):
        own = model.tokenizer(TEXT, add_special_tokens=False)["input_ids"]
        assert own == byte_level(case.split).encode(TEXT).ids
    assert model.tokenizer.decode(model.tokenizer(TEXT)["input_ids"], skip_special_tokens=True) == TEXT

    # Bloom's norm after the embedding leaves no long tokens: its sinks are found by their direction.
    sinks = sc.find_sinks(model, ids, cosine=0.5, norm_ratio=0.5 if name == "bloom" else 2.0, verbose=False)
    assert set(SINKS) <= set(sinks.table["pos"]) or (name == "bloom" and len(sinks))
    effect = sc.layer_map(model, ids, sinks.select(*sinks.table["kind"].unique()), verbose=False)
    assert effect.data.sizes["edit"] == plain.config.num_hidden_layers
    assert np.nanmax(np.abs(effect.effect("log_odds"))) > 1e-4


@pytest.mark.parametrize("kind", ["F16", "Q8_0", *(pytest.param(k, marks=pytest.mark.slow) for k in (
    "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1"))])  # fmt: skip
def test_number_formats_are_read_as_they_round(kind, ids, tmp_path):
    case = CASES["llama"]
    exact, plain = build(case), build(case)
    model = sc.load_model(write(plain, case, tmp_path / f"{kind}.gguf", kind), verbose=False)
    assert adapt(model).weights_hash != adapt(sc.load_model(exact)).weights_hash
    assert difference(model, plain, ids) < 1e-5


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_an_unsupported_architecture_is_named_in_one_sentence(name, tmp_path):
    case = UNSUPPORTED[name]
    with pytest.raises(WeightsError, match=rf"cannot read {name}.gguf \(GGUF architecture '{name}'\)") as caught:
        sc.load_model(write(build(case), case, tmp_path / f"{name}.gguf"), verbose=False)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_tokenizer_that_changes_when_saved_is_refused(tmp_path):
    """transformers gives Qwen models Qwen's way to cut texts, whatever the file says."""
    case = CASES["qwen2"]._replace(split="default")
    with pytest.raises(WeightsError, match="the tokenizer of qwen2.gguf changes when transformers saves it"):
        sc.load_model(write(build(case), case, tmp_path / "qwen2.gguf"), verbose=False)


@pytest.mark.slow
def test_a_model_that_transformer_lens_computes_wrongly_is_refused(tmp_path):
    """TransformerLens 3.9 reads a norm's epsilon under another name than StarCoder 2's."""
    plain = build(case := Case("Starcoder2", {**PLAIN, "sliding_window": None, "norm_epsilon": 0.01}, "starcoder2"))
    with pytest.raises(ModelError, match="log-probabilities equal plain Hugging Face's"):
        sc.load_model(write(plain, case, tmp_path / "epsilon.gguf"), verbose=False)
