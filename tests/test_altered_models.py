"""Models that were changed behind the program's back: it follows the change, or says that it cannot."""

from __future__ import annotations

import math

import eager
import pytest
import torch
import transformers
from common import HAS_HOOKED, lens, prompt

import sink_circuits as sc
from sink_circuits.adapters import adapt
from sink_circuits.errors import InputError, ModelError

TOKENS = eager.random_tokens(40)


def scores(model, path: str = "auto") -> torch.Tensor:
    return sc.sink_scores(model, TOKENS, min_queries=4, path=path).scores[0]


def one_sentence(error: pytest.ExceptionInfo) -> None:
    said = str(error.value)
    assert "\n" not in said and said.endswith(".") and len(said) < 500, said


# --------------------------------------------------------------------------------------------- hooks of torch's own
def silenced(module, args, output):
    return torch.zeros_like(output)


def doubled(module, args):
    return (2 * args[0],)


def by_hook(mlp):
    return mlp.register_forward_hook(silenced).remove


def by_pre_hook(mlp):
    return mlp.register_forward_pre_hook(doubled).remove


def by_forward(mlp):
    vars(mlp)["forward"] = lambda x, *args, **kwargs: torch.zeros_like(x)
    return lambda: vars(mlp).pop("forward")


@pytest.mark.parametrize("change", [by_hook, by_pre_hook, by_forward])
@pytest.mark.parametrize("when", ["before", "after"])
def test_what_torch_puts_into_a_module_is_measured_and_not_passed_over(change, when):
    """The fast path rebuilds the model from its parameters, and would not see it."""
    hf = eager.tiny("llama")
    plain = eager.tiny("llama")
    undone = change(plain.model.layers[1].mlp)
    changed = eager.scores(eager.forward(plain, TOKENS).pattern, (None,) * 4, min_queries=4)
    undone()
    own = eager.scores(eager.forward(plain, TOKENS).pattern, (None,) * 4, min_queries=4)
    assert (changed - own).abs().nan_to_num().max() > 1e-3
    if when == "before":
        undo = change(hf.model.layers[1].mlp)
        model = sc.load_model(hf)
    else:
        model = sc.load_model(hf)
        torch.testing.assert_close(scores(model).double(), own, atol=2e-6, rtol=1e-4, equal_nan=True)
        undo = change(model.original_model.model.layers[1].mlp._original_component)  # what Hugging Face's class is
    assert adapt(model).twin_refusal == "hooks of your own stand on the model"
    torch.testing.assert_close(scores(model).double(), changed, atol=2e-6, rtol=1e-4, equal_nan=True)
    if when == "after":
        undo()
        assert adapt(model).twin is not None
        torch.testing.assert_close(scores(model).double(), own, atol=2e-6, rtol=1e-4, equal_nan=True)


def test_a_hook_behind_transformer_lens_own_is_refused():
    """It changes what the block adds after the hook that reports it."""
    model = sc.load_model(eager.tiny("llama"))
    model.blocks[1].mlp.register_forward_hook(silenced)
    with pytest.raises(ModelError, match="failed while hooks of your own stand on the model: call") as error:
        scores(model)
    one_sentence(error)


def test_the_libraries_own_hooks_are_no_users():
    model = sc.load_model(eager.tiny("llama"))
    assert any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert adapt(model).twin is not None
    opt = transformers.OPTConfig(
        vocab_size=80, hidden_size=32, num_hidden_layers=2, ffn_dim=48, num_attention_heads=4, word_embed_proj_dim=32,
        max_position_embeddings=64,
    )  # fmt: skip
    checks = adapt(sc.load_model(transformers.OPTForCausalLM(opt).eval())).checks  # 4.3 puts hooks of its own on it
    assert "log-probabilities equal plain Hugging Face's" in {check.name for check in checks}


def test_an_architecture_whose_parts_have_other_names_ends_in_one_sentence():
    config = transformers.OpenAIGPTConfig(vocab_size=80, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    with pytest.raises(ModelError) as error:
        sc.load_model(transformers.OpenAIGPTLMHeadModel(config).eval())
    one_sentence(error)


@pytest.mark.parametrize("rate", ["resid_pdrop", "attn_pdrop"])
def test_training_mode_is_refused_even_when_it_comes_after_loading(rate):
    config = transformers.GPT2Config(
        vocab_size=80, n_embd=32, n_layer=2, n_head=4, n_positions=64,
        **{"resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0, rate: 0.5},
    )  # fmt: skip
    model = sc.load_model(transformers.GPT2LMHeadModel(config).eval())
    before = scores(model)
    model.original_model.train()
    for path in ("auto", "reference"):
        with pytest.raises(ModelError, match=r"training mode.*call model.eval\(\) first") as error:
            scores(model, path)
        one_sentence(error)
    model.original_model.eval()
    assert torch.equal(scores(model).nan_to_num(-1), before.nan_to_num(-1))


def test_a_rate_of_attention_alone_is_seen():
    hf = eager.tiny("llama")
    for layer in hf.model.layers:
        layer.self_attn.attention_dropout = 0.3
    model = sc.load_model(hf)
    model.original_model.train()
    with pytest.raises(ModelError, match="training mode"):
        scores(model)


# ------------------------------------------------------------------------------------------------ numbers that are none
@pytest.mark.parametrize(
    ("name", "value", "place"),
    [
        ("model.layers.2.mlp.down_proj.weight", math.nan, r"blocks\.2\.hook_resid_post"),
        ("model.layers.2.mlp.down_proj.weight", 1e38, r"blocks\.2\.hook_resid_post"),
        ("lm_head.weight", math.inf, "the logits"),
    ],
)
def test_weights_that_are_damaged_or_overflow_are_named_as_such(name, value, place):
    hf = eager.tiny("llama")
    hf.get_parameter(name).data.fill_(value)
    with pytest.raises(ModelError, match=f"NaN or infinity at {place}: the weights are damaged, or too large") as error:
        sc.load_model(hf)
    one_sentence(error)


def test_weights_on_the_meta_device_hold_no_numbers():
    with torch.device("meta"):
        hf = transformers.LlamaForCausalLM(eager.tiny("llama").config)
    with pytest.raises(ModelError, match="meta device holds no numbers") as error:
        sc.load_model(hf)
    one_sentence(error)
    with pytest.raises(ModelError, match="meta device holds no numbers"):
        sc.load_model(eager.tiny("llama"), device="meta")


# ----------------------------------------------------------------------------------------- what is asked of an object
def test_what_cannot_be_done_to_a_model_object_is_not_passed_over():
    hf = eager.tiny("llama")
    with pytest.raises(ModelError, match=r"bfloat16 was asked for.*is of torch.float32: convert it first") as error:
        sc.load_model(hf, dtype=torch.bfloat16)
    one_sentence(error)
    model = sc.load_model(hf, dtype=torch.float32, device="cpu")
    for more in ({"tokenizer": object()}, {"device": "cpu"}):
        with pytest.raises(ModelError, match="returned as it is: leave device and tokenizer out"):
            sc.load_model(model, **more)


# ----------------------------------------------------------------------------------------------------- both directions
@pytest.mark.skipif(not HAS_HOOKED, reason="TransformerLens 4 has no HookedTransformer")
def test_attention_that_looks_ahead_is_refused():
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    config = {
        "n_layers": 2,
        "d_model": 16,
        "n_ctx": 64,
        "d_head": 8,
        "d_vocab": 80,
        "act_fn": "gelu",
        "seed": 0,
        "device": "cpu",
    }
    adapt(HookedTransformer(HookedTransformerConfig(**config)))
    with pytest.raises(ModelError, match=r"'attention looks at no later token' failed.*use a decoder") as error:
        adapt(HookedTransformer(HookedTransformerConfig(**config, attention_dir="bidirectional")))
    one_sentence(error)


# ---------------------------------------------------------------------------------------------------------- sinks' table
def test_sinks_of_a_deeper_model_are_refused():
    """Two sizes of one family share a tokenizer, so that tokens and positions agree."""
    sinks = sc.find_sinks(lens(), tokens := prompt(), verbose=False)
    shallow = sc.load_model(transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=128,
    )).eval())  # fmt: skip
    for run in (sc.layer_map, lambda *a, **k: sc.mass_account(*a, layer=1, **k)):
        with pytest.raises(InputError, match="which this model has not: pass sinks that were found in it") as error:
            run(shallow, tokens, sinks.select("secondary"), verbose=False)
        one_sentence(error)


def test_a_context_of_one_token_has_nothing_to_check():
    config = transformers.LlamaConfig(
        vocab_size=9,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=1,
    )
    with pytest.raises(InputError, match="context is 1 token: at least 2"):
        sc.check_invariants(sc.load_model(transformers.LlamaForCausalLM(config).eval()))
