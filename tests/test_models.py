"""Loading and checking models: what is accepted, what is refused and how, and what the adapter says of a model."""

from __future__ import annotations

import functools

import eager
import pytest
import torch
from common import BACKENDS, SINK, lens, no_forward_pass, prompt, subject
from test_prompts import tokenizer
from torch import nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import sink_circuits as sc
from sink_circuits.errors import InputError, ModelError, SinkCircuitsError
from sink_circuits.models import relative_error


@functools.cache
def model_of(name: str):
    return sc.load_model(eager.tiny(name), verbose=False)


@torch.no_grad()
@pytest.mark.parametrize("name", eager.NAMES)
def test_a_hugging_face_model_is_wrapped_unchanged(name):
    tokens = eager.random_tokens(30)
    expected = eager.forward(eager.tiny(name), tokens)
    adapter = sc.adapt(model_of(name))
    assert (model_of(name)(tokens[None])[0] - expected.logits).abs().max() < 1e-4
    assert adapter.windows == eager.WINDOWS[name]
    assert (adapter.n_layers, adapter.n_heads, adapter.n_ctx) == (4, 4, 128)
    assert adapter.backend == "bridge"
    assert adapter.processed == ()
    assert adapter.parallel == (name == "gpt-neox")
    assert adapter.twin is not None, adapter.twin_refusal
    assert all(check.passed for check in adapter.checks)
    assert len(adapter.checks) >= 5


@pytest.mark.parametrize("backend", BACKENDS)
def test_adapters_of_the_planted_model(backend):
    adapter = sc.adapt(lens(backend))
    assert adapter.backend == backend
    assert adapter.windows == (None,) * 24
    assert (adapter.n_layers, adapter.n_heads, adapter.n_ctx) == (24, 4, 1024)
    assert (adapter.twin is None) == (backend == "hooked")
    assert ("HookedTransformer" in adapter.twin_refusal) == (backend == "hooked")
    assert sc.adapt(lens(backend)) is adapter
    if backend == "hooked":
        with pytest.raises(InputError, match=r"fast path cannot serve.*HookedTransformer"):
            sc.run_clean(lens(backend), prompt(), path="fast")


def test_the_twin_shares_the_parameters():
    """No second copy of the weights: every parameter of the fast path is one of the bridge's."""
    own = {p.data_ptr() for p in lens().parameters()}
    twin = list(sc.adapt(lens()).twin.module.parameters())
    assert len(twin) > 100
    assert {p.data_ptr() for p in twin} <= own


@torch.no_grad()
def test_weights_hash_tells_checkpoints_apart():
    hashes = {sc.adapt(sc.load_model(eager.tiny("llama", seed), verbose=False)).weights_hash for seed in range(3)}
    again = sc.adapt(sc.load_model(eager.tiny("llama", 0), verbose=False)).weights_hash
    assert len(hashes) == 3
    assert again in hashes


def test_compatibility_mode_is_seen_as_processing():
    model = subject().bridge()
    assert sc.adapt(model).processed == ()
    model.enable_compatibility_mode(disable_warnings=True)
    adapter = sc.adapt(model)
    assert adapter.processed
    assert adapter.twin is None
    assert "processed" in adapter.twin_refusal
    with pytest.warns(UserWarning, match="weights.*processed.*official"):
        assert sc.load_model(model) is model
    with pytest.raises(InputError, match="weights were processed"):
        sc.find_sinks(model, prompt(), method="official")
    expected = sc.find_sinks(lens(), prompt(), verbose=False).table
    found = sc.find_sinks(model, prompt(), verbose=False).table
    columns = ["pos", "kind", "l_start", "l_end"]
    assert found[columns].equals(expected[columns])  # an RMS model's residuals stay what they were


@pytest.mark.skipif("hooked" not in BACKENDS, reason="TransformerLens 4 has no HookedTransformer")
def test_folded_norms_are_seen_as_processing():
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_llama_weights

    plain = lens("hooked")
    cfg = HookedTransformerConfig.from_dict({**plain.cfg.to_dict(), "device": "cpu"})
    model = HookedTransformer(cfg, move_to_device=False)
    model.load_and_process_state_dict(convert_llama_weights(subject().hf_model, cfg))
    assert "folded norms" in sc.adapt(model).processed
    assert sc.adapt(plain).processed == ()
    with pytest.raises(InputError, match="folded norms"):
        sc.find_sinks(model, prompt(), method="official")


def test_an_object_of_transformer_lens_is_returned_as_it_is():
    for backend in BACKENDS:
        assert sc.load_model(lens(backend)) is lens(backend)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_folder_in_hugging_face_format(tmp_path, dtype):
    hf = eager.tiny("llama")
    hf.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    tokens = eager.random_tokens(30)
    expected = hf(tokens[None]).logits.log_softmax(-1)
    model = sc.load_model(tmp_path, dtype=dtype, verbose=False)
    assert next(model.parameters()).dtype == dtype
    error = (model(tokens[None]).float().log_softmax(-1) - expected).abs()
    assert error.mean() < (1e-5 if dtype == torch.float32 else 0.1)
    assert model.tokenizer is not None
    assert [ids.tolist() for ids in sc.load_prompts("maths", 1).tokens(model, max_tokens=1)] == [[0]]
    scores = sc.sink_scores(model, tokens, min_queries=1).scores[0]
    truth = eager.scores(eager.forward(hf, tokens).pattern, [None] * 4)
    assert (scores - truth).abs().nan_to_num().max() < (1e-5 if dtype == torch.float32 else 0.1)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "smollm3",
            r"'smollm3' is neither a known model \(.*smollm2-135m.*\), a folder, a GGUF file nor a Hugging Face id",
        ),
        ("a/b/c", "neither a known model"),
        ("/nowhere/at/all", "neither a known model"),
        ("", "'' is not a model: give a name, a folder, a GGUF file or a model object"),
        (None, "None is not a model"),
        (7, "7 is not a model"),
        ("nothing.gguf", "GGUF file nothing.gguf does not exist: check the path"),
    ],
)
def test_unknown_models_are_refused(source, message):
    with no_forward_pass(), pytest.raises(ModelError, match=message) as caught:
        sc.load_model(source)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, SinkCircuitsError)


def test_a_hub_id_offline_is_refused_with_what_works_instead():
    with pytest.raises(ModelError, match=r"could not be loaded.*smollm2-135m.*while online"):
        sc.load_model("nobody/nothing@main")


def test_folders_that_hold_no_model_are_refused(tmp_path):
    with pytest.raises(ModelError, match=r"holds no config\.json: give a folder in Hugging Face format"):
        sc.load_model(tmp_path)
    eager.tiny("llama").save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="could not be loaded"):
        sc.load_model(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="could not be loaded"):
        sc.load_model(tmp_path)


def test_objects_that_are_no_language_models_are_refused():
    for thing in (nn.Linear(2, 2), "text", None):
        with pytest.raises(ModelError, match="is neither a TransformerBridge nor a HookedTransformer: wrap"):
            sc.adapt(thing)
    with pytest.raises(ModelError, match="is neither a TransformerBridge nor a HookedTransformer"):
        sc.find_sinks(nn.Linear(2, 2), torch.tensor([1, 2, 3]))


class Lying(LlamaDecoderLayer):
    """A block that adds more to the residual stream than its attention and its MLP."""

    def forward(self, hidden_states, **kwargs):
        return super().forward(hidden_states, **kwargs) + 0.3 * hidden_states


def test_an_mlp_output_that_is_not_all_that_is_added_is_refused():
    """The contract of the whole package: base + contribution == resid_post."""
    hf = eager.tiny("llama")
    hf.model.layers[2].__class__ = Lying
    with pytest.raises(
        ModelError, match=r"'base \+ contribution == resid_post' failed: error .*, at most 0.0002 is accepted"
    ):
        sc.load_model(hf, verbose=False)


def test_processed_or_not_the_users_hooks_are_kept():
    model = subject().bridge()
    calls = []
    model.add_hook("blocks.3.hook_mlp_out", lambda value, hook: calls.append(hook.name))
    sc.find_sinks(model, prompt(), verbose=False)
    assert calls
    assert len(model.hook_dict["blocks.3.hook_mlp_out"].fwd_hooks) == 1


@pytest.mark.parametrize(
    ("found", "expected", "error"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([1.0, 2.5], [1.0, 2.0], 0.25),
        ([1.0], [1.0, 2.0], float("inf")),
        ([float("nan")], [1.0], float("inf")),
    ],
)
def test_relative_error(found, expected, error):
    assert relative_error(torch.tensor(found), torch.tensor(expected)) == pytest.approx(error)


def test_a_sink_at_the_end_of_the_context_is_run():
    """As long as the model allows: 1024 tokens, sinks at both ends."""
    tokens = subject().tokens(n_tokens=1024, sinks=(1000, 1), decoys=())
    table = sc.find_sinks(lens(), tokens, verbose=False).table
    assert {r.pos: (r.kind, r.l_start, r.l_end) for r in table.itertuples()} == {
        0: ("primary", 2, 20), 1: ("secondary", 6, 12), 1000: ("secondary", 6, 12),
    }  # fmt: skip
    with pytest.raises(InputError, match="1025 tokens, the model's context 1024"):
        sc.find_sinks(lens(), torch.zeros(1025, dtype=torch.long))
    assert SINK < 1024
