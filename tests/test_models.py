"""Loading and checking models: what is accepted, what is refused and how, and what the adapter says of a model."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import eager
import pytest
import torch
from common import BACKENDS, SINK, lens, no_forward_pass, prompt, subject
from test_prompts import tokenizer
from test_weights import write_gguf
from torch import nn
from transformers import GPT2Config, GPTNeoConfig, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import sink_circuits as sc
from sink_circuits import weights
from sink_circuits.adapters import hash_weights
from sink_circuits.errors import InputError, ModelError, SinkCircuitsError
from sink_circuits.load_checks import relative_error
from sink_circuits.models import layers_of_config


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


def test_a_parameter_of_zeros_does_not_change_the_weights_hash():
    """TransformerLens 3.9 puts one beside every unembedding, 4.3 does not: it is the same checkpoint."""
    model = torch.nn.Linear(3, 2, bias=False)
    before = hash_weights(model)
    model.bias = torch.nn.Parameter(torch.zeros(2))
    assert hash_weights(model) == before
    with torch.no_grad():
        model.bias[1] = 1
    assert hash_weights(model) != before


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
    """conftest.py switches the hub off, as a user may."""
    with pytest.raises(
        ModelError,
        match=r"nobody/nothing@main is not in the local cache, and the .*hub cannot be reached .*smollm2-135m",
    ) as caught:
        sc.load_model("nobody/nothing@main")
    assert "\n" not in str(caught.value)


HUB = """
import http.server, json, pathlib, sys, threading
import sink_circuits as sc
folder, commit, port, answer = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), pathlib.Path(sys.argv[4])
revisions = ("main", "v2", commit)

class Hub(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        path, tree = self.path.partition("?")[0], b""
        if path.startswith("/api/models/org/tiny/tree/") and path.rpartition("/")[2] in revisions:
            tree = json.dumps([
                {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": "0"} for file in folder.iterdir()
            ]).encode()
        revision, _, name = path.partition("/org/tiny/resolve/")[2].partition("/")
        file = folder / (name or "-")
        found = tree or (revision in revisions and file.is_file())
        body = tree or (file.read_bytes() if found else b"")
        self.send_response(200 if found else 404)
        self.send_header("Content-Length", str(len(body)))
        if found:
            self.send_header("ETag", f'"{name}"')
            self.send_header("X-Repo-Commit", commit)
        else:
            self.send_header("X-Error-Code", "EntryNotFound" if "/org/tiny/" in path else "RepoNotFound")
        self.end_headers()
        self.wfile.write(body if self.command == "GET" else b"")

    do_HEAD = do_GET

    def log_message(self, *args):
        pass

hub = http.server.ThreadingHTTPServer(("127.0.0.1", port), Hub)
threading.Thread(target=hub.serve_forever, daemon=True).start()
said = {}

def attempt(what, source):
    try:
        model = sc.load_model(source, verbose=False)
        adapter = sc.adapt(model)
        said[what] = [adapter.name, adapter.revision, adapter.weights_hash, model.tokenizer("a b")["input_ids"]]
    except sc.SinkCircuitsError as error:
        said[what] = str(error)

attempt("online", "org/tiny")
attempt("revision", "org/tiny@v2")
attempt("unknown", "org/other")
hub.shutdown()
hub.server_close()
attempt("cached", "org/tiny")
attempt("cached revision", "org/tiny@v2")
attempt("not cached", "org/tiny@v3")
attempt("never seen", "org/other")
answer.write_text(json.dumps(said))
"""


@pytest.mark.slow
def test_hub_ids_online_offline_and_in_the_cache(tmp_path):
    """huggingface_hub itself against a hub of this machine's, which then goes away."""
    folder, commit, answer = tmp_path / "served", "c" * 40, tmp_path / "answer.json"
    eager.tiny("llama").save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = {
        **os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(Path(sc.__file__).parents[1]),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", HUB, str(folder), commit, port, str(answer)], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(answer.read_text())
    weights_hash = sc.adapt(model_of("llama")).weights_hash
    ids = tokenizer()("a b")["input_ids"]
    assert said["online"] == said["cached"] == ["org/tiny", commit, weights_hash, ids]
    assert said["revision"] == said["cached revision"] == ["org/tiny@v2", commit, weights_hash, ids]
    assert "'org/other' could not be loaded" in said["unknown"]
    for what in ("not cached", "never seen"):
        assert "cannot be reached" in said[what] and "not in the local cache" in said[what]
    assert "Retrying" not in done.stderr, "a dead network is tried again and again"
    assert "%|" not in done.stderr, "bars although verbose=False"


def test_loading_quietly_shows_no_bars(tmp_path, capfd):
    from transformers.utils import logging

    eager.tiny("llama").save_pretrained(tmp_path)
    assert logging.is_progress_bar_enabled()
    sc.load_model(tmp_path)
    assert "Loading weights" in capfd.readouterr().err
    sc.load_model(tmp_path, verbose=False)
    assert capfd.readouterr() == ("", "")
    assert logging.is_progress_bar_enabled(), "the bars of the user's own code are left as they were"
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="could not be loaded"):
        sc.load_model(tmp_path, verbose=False)
    assert logging.is_progress_bar_enabled()


def test_the_revision_of_a_gguf_is_its_hash(tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "toy.gguf")
    monkeypatch.setenv(weights.CACHE_VARIABLE, str(tmp_path / "cache"))
    expected = hashlib.sha256(path.read_bytes()).hexdigest()
    model = sc.load_model(path, verbose=False)
    assert sc.adapt(model).revision == expected
    folder = weights.convert_gguf(path, verbose=False)
    assert sc.adapt(sc.load_model(folder, verbose=False)).revision == expected
    sinks = sc.find_sinks(model, torch.arange(40), verbose=False)
    assert sinks.manifest.revision == expected
    (folder / "manifest.json").write_text("[1]")  # someone else's
    assert sc.adapt(sc.load_model(folder, verbose=False)).revision == ""


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_revision_of_a_model_in_memory_is_not_known(backend):
    assert sc.adapt(lens(backend)).revision == ""


@pytest.mark.parametrize(
    ("config", "n_layers"),
    [
        (LlamaConfig(num_hidden_layers=5), 5),
        (GPT2Config(n_layer=3), 3),
        (GPTNeoConfig(num_layers=4, attention_types=[[["global", "local"], 2]]), 4),
    ],
)
def test_layers_are_counted_from_the_configuration_alone(tmp_path, monkeypatch, config, n_layers):
    config.save_pretrained(tmp_path)
    assert layers_of_config(str(tmp_path)) == n_layers
    monkeypatch.setenv(weights.CACHE_VARIABLE, str(tmp_path / "cache"))
    for unknown in ("smollm2-135m", "org/name", "/nowhere", "x.gguf", ""):
        assert layers_of_config(unknown) is None
    cached = tmp_path / "cache" / "models" / weights.REGISTRY["smollm2-135m"].gguf_sha256[:16]
    config.save_pretrained(cached)
    assert layers_of_config("smollm2-135m") == n_layers
    (tmp_path / "config.json").write_text("{")
    assert layers_of_config(str(tmp_path)) is None


def test_folders_that_hold_no_model_are_refused(tmp_path):
    with pytest.raises(ModelError, match=r"holds no config\.json: give a folder in Hugging Face format"):
        sc.load_model(tmp_path)
    eager.tiny("llama").save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
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
