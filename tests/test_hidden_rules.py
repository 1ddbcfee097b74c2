"""Rules that a model's attention does not say by itself: windows in masks, chunks, learned sinks, scalings; threads; stale runs."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import test_architectures as architectures
import torch
import transformers

import sink_circuits as sc
from sink_circuits.adapters import adapt
from sink_circuits.clean_runs import run_clean
from sink_circuits.edited_runs import run_edited
from sink_circuits.errors import InputError, ModelError
from sink_circuits.scores import column_log_odds, scores_of

TOKENS = torch.randint(3, 128, (60,), generator=torch.Generator().manual_seed(1))
WINDOW = 24


def random_model(model_class: str, config_class: str, **config):
    torch.manual_seed(0)
    model = getattr(transformers, model_class)._from_config(getattr(transformers, config_class)(**config)).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.08)
    return model


def log_odds(model, path: str = "auto") -> torch.Tensor:
    clean = run_clean(model, TOKENS, chosen=(0, 20), path=path)
    return column_log_odds(clean.columns, adapt(model).windows, 4)


def test_a_window_that_stands_in_the_mask_alone_takes_the_reference_path():
    """Qwen2-MoE hands its attention no window: on the short text of the load checks nothing shows."""
    config = {
        **architectures.PLAIN, **architectures.EXPERTS, "shared_expert_intermediate_size": 64, "use_sliding_window": True,
        "sliding_window": WINDOW, "max_window_layers": 2,
    }  # fmt: skip
    plain = random_model("Qwen2MoeForCausalLM", "Qwen2MoeConfig", **config)
    kinds = plain.config.layer_types
    with torch.no_grad():
        plain.set_attn_implementation("eager")
        out = plain(TOKENS[None], output_attentions=True)
    patterns = torch.stack([attention[0] for attention in out.attentions])
    model = sc.load_model(plain)
    assert adapt(model).twin is None and "in the model's attention mask alone" in adapt(model).twin_refusal
    assert adapt(model).windows == tuple(WINDOW if kind == "sliding_attention" else None for kind in kinds)
    assert set(adapt(model).windows) == {WINDOW, None}
    clean = run_clean(model, TOKENS, chosen=(20,), loss=True)
    assert (clean.columns.log_attention[..., 0].exp() - patterns[..., 20]).abs().max() < 1e-5
    expected = torch.nn.functional.cross_entropy(out.logits[0, :-1], TOKENS[1:], reduction="none")
    assert (clean.loss[:-1] - expected).abs().max() < 1e-4


def test_attention_in_chunks_is_refused():
    config = {**architectures.NARROW, "num_local_experts": 2, "attention_chunk_size": 16}
    with pytest.raises(
        ModelError, match="attend within chunks of 16 tokens.* use a model of full or sliding attention"
    ):
        sc.load_model(random_model("Llama4ForCausalLM", "Llama4TextConfig", **config))


def test_a_hook_that_does_nothing_changes_no_number():
    """With hooks on it the model has no fast path; learned sinks and scalings are known all the same."""
    for name in ("gpt_oss", "gemma2"):
        model = sc.load_model(architectures.build(name)[0])
        before, forms, clean = log_odds(model), adapt(model).forms, run_clean(model, TOKENS)
        model.add_hook("blocks.0.hook_resid_pre", lambda value, hook: value)
        assert adapt(model).twin is None
        assert (log_odds(model) - before).abs().nan_to_num().max() < 1e-4, name
        for own, other in zip(adapt(model).forms, forms, strict=True):
            assert own.scaling == pytest.approx(other.scaling)
            assert own.window == other.window and own.softcap == other.softcap
            assert (own.sinks is None) == (other.sinks is None)
        # From queries and keys alone, where scaling and learned sinks are not to be had from a pattern.
        wanted = [
            h for h in model.hook_dict if h.endswith(("hook_rot_q", "hook_rot_k", "hook_resid_mid", "hook_mlp_out"))
        ]
        _, cache = model.run_with_cache(TOKENS[None], names_filter=lambda hook, wanted=wanted: hook in wanted)
        cached = run_clean(model, TOKENS, clean_cache=cache)
        windows = adapt(model).windows
        assert (scores_of(cached, windows) - scores_of(clean, windows)).abs().nan_to_num().max() < 1e-5, name


def test_a_scaling_of_the_configuration_is_followed():
    """`query_pre_attn_scalar` is another number than the size of a head."""
    config = {**architectures.WINDOWED, "query_pre_attn_scalar": 64}
    model = sc.load_model(random_model("Gemma2ForCausalLM", "Gemma2Config", **config))
    assert {form.scaling for form in adapt(model).forms} == {0.125}
    model.add_hook("blocks.0.hook_resid_pre", lambda value, hook: value)
    assert {form.scaling for form in adapt(model).forms} == {0.125}


def test_an_edited_run_needs_the_model_of_its_clean_run():
    model = sc.load_model(architectures.build("llama")[0])
    clean = run_clean(model, TOKENS, chosen=(20,))
    with torch.no_grad():
        for parameter in model.original_model.parameters():
            parameter.mul_(1.3)
    with pytest.raises(InputError, match="weights or hooks of this model are others than when the clean run was made"):
        run_edited(model, clean, [[sc.zero(1, 20)]])
    again = run_clean(model, TOKENS, chosen=(20,))
    assert len(run_edited(model, again, [[sc.zero(1, 20)]])) == 1
    model.add_hook("blocks.0.hook_resid_pre", lambda value, hook: value)
    with pytest.raises(InputError, match="call run_clean again"):
        run_edited(model, again, [[sc.zero(1, 20)]])


def test_threads_of_one_process_give_the_numbers_of_one():
    model = sc.load_model(architectures.build("llama")[0])
    texts = [torch.randint(3, 128, (50,), generator=torch.Generator().manual_seed(seed)) for seed in range(4)]

    def measured(text):
        clean = run_clean(model, text, chosen=(20,))
        (run,) = run_edited(model, clean, [[sc.rescale(1, 20, 0.5)]], loss=True)
        return run.columns.log_attention, run.loss

    alone = [measured(text) for text in texts]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as pool:
            beside = list(pool.map(measured, texts * 10))
    finally:
        sys.setswitchinterval(interval)
    for index, (attention, loss) in enumerate(beside):
        assert torch.equal(attention, alone[index % 4][0]) and torch.equal(loss[:-1], alone[index % 4][1][:-1])


def test_a_window_as_long_as_the_context_is_measured_within_it():
    config = {
        "vocab_size": 128, "hidden_size": 64, "num_layers": 4, "num_heads": 4, "attention_types": [[["global", "local"], 2]],
        "window_size": 60, "max_position_embeddings": 64,
    }  # fmt: skip
    assert adapt(sc.load_model(random_model("GPTNeoForCausalLM", "GPTNeoConfig", **config))).windows == (
        None,
        60,
        None,
        60,
    )


def test_dropout_by_another_name_is_seen():
    config = {
        "vocab_size": 128,
        "hidden_size": 64,
        "n_layer": 4,
        "n_head": 4,
        "hidden_dropout": 0.2,
        "attention_dropout": 0.0,
    }
    model = sc.load_model(random_model("BloomForCausalLM", "BloomConfig", **config))
    model.original_model.train()
    with pytest.raises(ModelError, match="training mode, where dropout makes every run different"):
        run_clean(model, TOKENS)
