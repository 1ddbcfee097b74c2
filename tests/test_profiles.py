"""Norms by layer, scores by lifetime and levels, by hand and from records."""

import math

import hand
import numpy as np
import pytest
import torch
from anatomies import ORDINARY, QUIET, found
from common import BACKENDS, SINK, by_hand, lens, prompt, subject

from sink_circuits import anatomy
from sink_circuits.errors import InputError
from sink_circuits.records import CandidateSink, Record, write_records


@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_norms_are_those_of_the_hand_written_pass(backend):
    result, run = anatomy.norms_by_layer(lens(backend), [prompt()], found(backend), **QUIET), by_hand(prompt())
    assert result.table["kind"].tolist() == ["primary", "secondary", "rest"]
    lines = [[0], [SINK], ORDINARY]
    model = subject().hf_model
    for i, at in enumerate(lines):
        np.testing.assert_allclose(result.data["hidden"][i], run.residuals[:, at].norm(dim=-1).mean(dim=1), rtol=1e-4)
        for layer in (1, 8):
            block = model.model.layers[layer]
            normed = hand.rms_norm(
                run.residuals[layer - 1], block.input_layernorm.weight.double(), model.config.rms_norm_eps
            )
            for what, projection in (("key", block.self_attn.k_proj), ("value", block.self_attn.v_proj)):
                heads = (normed @ projection.weight.double().T).reshape(96, 2, 16).norm(dim=-1).mean(dim=-1)
                assert float(result.data[what][i, layer]) == pytest.approx(float(heads[at].mean()), rel=1e-4)


def test_scores_and_norms_by_lifetime_are_those_of_the_hand_written_pass():
    result, run = anatomy.score_by_lifetime(lens(), [prompt()], found(), **QUIET), by_hand(prompt())
    scores = hand.sink_scores(run.pattern).mean(dim=1)
    for i, pos in enumerate((0, SINK)):
        np.testing.assert_allclose(result.data["score"][i], scores[:, pos], atol=1e-5)
        np.testing.assert_allclose(
            result.data["mlp_norm"][i], run.contributions[:, pos].norm(dim=-1), rtol=1e-3, atol=1e-4
        )
    assert result.table["life_score"][1] == pytest.approx(float(scores[7:14, SINK].mean()), abs=1e-5)
    assert result.by_lifetime()["mean"].tolist() == pytest.approx(
        [result.table["life_score"][1], result.table["life_score"][0]]
    )


def test_levels_count_sinks_and_records(tmp_path):
    sinks = [
        CandidateSink((3, 4, 5), 7, "secondary"),
        CandidateSink((3, 5, 6), 8, "secondary"),
        CandidateSink((9,), 9, "noise"),
    ]
    write_records(
        tmp_path / "r.jsonl", [Record(dict(enumerate(sinks)), 0, 20, 0, 20), Record({4: sinks[0]}, 1, 20, 0, 20)]
    )
    result = anatomy.levels({"planted": found(), "published": tmp_path / "r.jsonl"})
    assert result.table.to_numpy().tolist() == [["planted", 6, 7, 1], ["published", 3, 3, 3]]
    assert (
        int(result.data["count"].sel(model="published", l_start=3, lifetime=3)) == 3
        and int(result.data["count"].sum()) == 4
    )
    assert result.data["n_prompts"].values.tolist() == [1, 2]
    figure = result.plot()
    titles = [one.text for one in figure.layout.annotations]
    assert titles == ["planted: 1 sink in 1 prompt", "published: 3 sinks in 2 prompts"], "counted over both models"
    np.testing.assert_allclose(
        np.array(figure.data[1].z), np.log1p(result.data["count"].sel(model="published").to_numpy().T)
    )
    assert figure.data[1].zmax == pytest.approx(math.log(4))
    older = type(result)(result.data.drop_vars("n_prompts"), result.table, result.manifest).plot()
    assert older.layout.annotations[1].text == "published: 3 sinks"
    everything = anatomy.levels({"published": tmp_path / "r.jsonl"}, kinds=("secondary", "noise"))
    assert int(everything.data["count"].sel(l_start=9, lifetime=1).sum()) == 1
    with pytest.raises(InputError, match="no sinks of kind bos_sink"):
        anatomy.levels(found(), kinds=["bos_sink"])
    with pytest.raises(InputError, match="no sinks were given"):
        anatomy.levels({})
