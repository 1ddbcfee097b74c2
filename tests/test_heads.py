"""Keys and queries of the reading heads, rotary included, by hand and as Hugging Face rotates them."""

import sys

import hand
import numpy as np
import pytest
import test_architectures as architectures
import torch
from anatomies import ORDINARY, QUIET, load, secondary, sinks_at
from common import BACKENDS, SINK, by_hand, lens, prompt

import sink_circuits as sc
from sink_circuits import anatomy
from sink_circuits.adapters import adapt
from sink_circuits.anatomy import attended


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_of_the_reading_heads_are_those_of_the_hand_written_pattern(backend):
    """log A[q, k] - log A[q, j] is the difference of two logits, whatever the rest of the row."""
    result, run = (
        anatomy.key_query_geometry(lens(backend), [prompt()], secondary(backend), n_heads=3, **QUIET),
        by_hand(prompt()),
    )
    scores = hand.sink_scores(run.pattern)[7:14, :, SINK]
    best = [(7 + int(i) // 4, int(i) % 4) for i in scores.flatten().argsort(descending=True)[:3]]
    assert (
        list(zip(result.data["layer"].values[0].tolist(), result.data["head"].values[0].tolist(), strict=True)) == best
    )
    for rank, (layer, head) in enumerate(best, 1):
        log = run.pattern[layer, head].log()
        gaps = [log[q, SINK] - log[q, [k for k in ORDINARY if k < q]].mean() for q in range(SINK + 1, 96)]
        at = result.data.sel(sink=0, rank=rank, when="after rotary")
        assert float(at["logit"] - at["logit_ordinary"]) == pytest.approx(float(torch.stack(gaps).mean()), abs=1e-3)
        assert float(at["cosine"]) > 0.99 and abs(float(at["cosine_ordinary"])) < 0.1
        before = result.data.sel(sink=0, rank=rank, when="before rotary")
        assert float(at["key_norm"]) == pytest.approx(float(before["key_norm"]), rel=1e-5)


EVERY_KIND = (
    "gemma3", "qwen3", "gpt2", "olmo2", "phi3", "phi4", "gpt_neox", "gptj", "falcon", "gpt_neo",
    pytest.param("granite", marks=pytest.mark.slow), pytest.param("llama4", marks=pytest.mark.slow),
    pytest.param("stablelm", marks=pytest.mark.slow), pytest.param("phi", marks=pytest.mark.slow),
)  # fmt: skip


@pytest.mark.parametrize("name", EVERY_KIND)
def test_keys_and_queries_of_other_architectures(name):
    """Rotary dimensions that are a part of the head's, fused projections, other scales, attention that takes no function."""
    ids = torch.arange(3, 43)
    sinks = sinks_at(("prompt-0", 9), token_ids={"prompt-0": ids})
    result = anatomy.key_query_geometry(load(name), [ids], sinks, n_heads=2, min_queries=4, **QUIET)
    before, rotated = (result.data.sel(when=when) for when in ("before rotary", "after rotary"))
    assert rotated["logit"].notnull().all() and before["logit"].notnull().all() and not result.missing()
    pattern, _ = architectures.hugging_face(name, ids)
    layer, head = int(result.data["layer"][0, 0]), int(result.data["head"][0, 0])
    window = adapt(load(name)).forms[layer].window or 40
    queries = [q for q in range(10, 40) if q - 9 < window]
    log = pattern[layer, head].log()
    gaps = [log[q, 9] - log[q, [k for k in range(max(4, q - window + 1), q) if k != 9]].mean() for q in queries]
    found_gap = float((rotated["logit"] - rotated["logit_ordinary"])[0, 0])
    assert found_gap == pytest.approx(float(torch.stack(gaps).mean()), abs=1e-3)
    if name in ("gpt2", "gpt_neo"):  # no rotary position
        assert before.drop_vars("when").equals(rotated.drop_vars("when"))
    else:
        assert abs(rotated["cosine"] - before["cosine"]).max() > 1e-3
    if name != "llama4":  # whose norm of queries and keys stands behind the rotation
        np.testing.assert_allclose(before["key_norm"], rotated["key_norm"], rtol=1e-4)


@pytest.mark.parametrize("name", ["gpt_neox", "phi3", "falcon"])
def test_queries_and_keys_behind_rotary_are_what_hugging_face_rotates(name, monkeypatch):
    ids, made = torch.arange(3, 43), []
    room = f"transformers.models.{name}.modeling_{name}"
    rotate = sys.modules[room].apply_rotary_pos_emb

    def noted(*args, **kwargs):
        made.append(rotate(*args, **kwargs))
        return made[-1]

    with monkeypatch.context() as patch:
        patch.setattr(f"{room}.apply_rotary_pos_emb", noted)
        architectures.hugging_face(name, ids)
    found = attended.attended(load(name), ids, [0, 2])
    for layer in (0, 2):
        for own, whole in zip(found[layer].after, made[layer], strict=True):
            heads = whole[0].transpose(0, 1)  # a key that serves several queries may stand here several times
            heads = heads.repeat_interleave(own.shape[1] // heads.shape[1], dim=1)
            torch.testing.assert_close(own, heads, atol=1e-5, rtol=1e-5)


def test_what_cannot_be_seen_is_said():
    """Folded norms: no plain Hugging Face model runs these weights, and no hook of NeoX shows the rotated ones."""
    ids = torch.arange(3, 43)
    model = sc.load_model(architectures.build("gpt_neox")[0], verbose=False)
    model.enable_compatibility_mode(disable_warnings=True)
    sinks = sinks_at(("prompt-0", 9), token_ids={"prompt-0": ids})
    result = anatomy.key_query_geometry(model, [ids], sinks, n_heads=2, min_queries=4, **QUIET)
    assert result.data["logit"].sel(when="after rotary").isnull().all()
    assert result.data["logit"].sel(when="before rotary").notnull().all()
    (sentence,) = result.missing()
    assert sentence.startswith("queries and keys after rotary position cannot be seen")
    assert sentence in " ".join(result.plot().layout.title.text.replace("<br>", " ").split())
