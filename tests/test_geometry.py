"""Principal components, responses and clustering: known shapes, closed forms, arrangements counted."""

import math
from itertools import combinations, product

import hand
import numpy as np
import pandas as pd
import pytest
import torch
from anatomies import QUIET, repeated_tokens, secondary
from common import by_hand, lens, prompt, subject
from hypothesis import given
from hypothesis import strategies as st

from sink_circuits import anatomy
from sink_circuits.anatomy import geometry, reading
from sink_circuits.errors import InputError


def test_controls_have_the_sinks_token_and_are_taken_once():
    texts, sinks = repeated_tokens()
    frames = [pd.DataFrame({"prompt": name, "pos": range(48), "token_id": ids.numpy()}) for name, ids in texts.items()]
    everything = pd.concat(frames, ignore_index=True)
    free = everything[
        ~everything.set_index(["prompt", "pos"]).index.isin(sinks.table.set_index(["prompt", "pos"]).index)
    ]
    chosen = reading.matched_controls(sinks.table, free, "test")
    assert len(set(chosen)) == 4 and -1 not in chosen
    assert everything.loc[chosen, "token_id"].tolist() == sinks.table["token_id"].tolist()
    assert everything.loc[chosen, "prompt"].tolist() == sinks.table["prompt"].tolist()
    assert reading.matched_controls(sinks.table, free.iloc[:0], "test") == [-1] * 4


def test_principal_components_and_the_mlps_response():
    texts, sinks = repeated_tokens()
    model, ids = lens(), list(texts.values())
    result = anatomy.pca(model, ids, sinks, layer=6, alphas=[-2.0, 0.0, 3.0], **QUIET)
    assert result.table["is_sink"].tolist() == [True] * 4 + [False] * 4
    assert result.table["token_id"].tolist() == [5, 6, 5, 6] * 2
    clean = [by_hand(one) for one in ids]
    block = {name: p.detach().double() for name, p in subject().hf_model.model.layers[6].named_parameters()}
    normed = [
        hand.rms_norm(run.residuals[6] - run.contributions[6], block["post_attention_layernorm.weight"], 1e-6)
        for run in clean
    ]
    rows = torch.stack(
        [normed[int(name[-1])][pos] for name, pos in zip(result.table["prompt"], result.table["pos"], strict=True)]
    )
    values, vectors = np.linalg.eigh(np.cov(rows.numpy().T))
    np.testing.assert_allclose(
        result.data["explained"].sel(space="mlp_in"), (values[::-1] / values.sum())[:6], atol=1e-5
    )

    def by_hand_mlp(x):
        gate = torch.nn.functional.silu(x @ block["mlp.gate_proj.weight"].T)
        return (gate * (x @ block["mlp.up_proj.weight"].T)) @ block["mlp.down_proj.weight"].T

    direction = torch.tensor(vectors[:, -1])
    coordinates = (rows - rows.mean(dim=0)) @ direction
    direction = direction if coordinates[:4].mean() > coordinates[4:].mean() else -direction
    out = by_hand_mlp(torch.tensor([-2.0, 0.0, 3.0], dtype=torch.float64)[:, None] * direction)
    np.testing.assert_allclose(result.data["response_norm"].sel(component=1), out.norm(dim=-1), rtol=1e-3, atol=1e-6)
    primary = by_hand_mlp(torch.stack([one[0] for one in normed]).mean(dim=0))
    expected = torch.cosine_similarity(out, primary[None], dim=-1)
    np.testing.assert_allclose(result.data["response_cosine"].sel(component=1)[[0, 2]], expected[[0, 2]], atol=1e-3)
    assert result.data["response_cosine"].sel(component=1)[1].isnull()


def test_pca_takes_the_most_frequent_layer_and_refuses_sinks_without_controls():
    texts, sinks = repeated_tokens()
    result = anatomy.pca(lens(), list(texts.values()), sinks, forming=pd.Series([3, 6, 6, 6]), **QUIET)
    assert (
        result.manifest.settings["layer"],
        result.manifest.settings["n_sinks"],
        result.manifest.settings["n_other_layers"],
    ) == (6, 3, 1)
    places = set(zip(result.table["prompt"], result.table["pos"], strict=True))
    assert ("prompt-0", 8) not in places  # a sink of another layer is no control
    with pytest.raises(InputError, match="sinks of layer 6: 1, same-token non-sinks: 0; at least one"):
        anatomy.pca(lens(), [prompt()], secondary(), layer=6, **QUIET)
    with pytest.raises(InputError, match="alphas"):
        anatomy.pca(lens(), list(texts.values()), sinks, layer=6, alphas=[math.nan], **QUIET)


def test_silhouette_by_definition():
    rng = np.random.default_rng(0)
    x, labels = rng.normal(size=(9, 4)), np.array([1, 1, 1, 0, 0, 0, 0, 0, 1], dtype=bool)
    distance = np.linalg.norm(x[:, None] - x[None], axis=-1)
    values = []
    for i in range(9):
        a = np.mean([distance[i, j] for j in range(9) if j != i and labels[j] == labels[i]])
        b = np.mean([distance[i, j] for j in range(9) if labels[j] != labels[i]])
        values.append((b - a) / max(a, b))
    assert geometry.silhouette(distance, labels) == pytest.approx(np.mean(values))
    assert geometry.silhouette(np.zeros((4, 4)), np.array([True, True, False, False])) == 0
    assert geometry.silhouette(distance[:3, :3], np.array([True, False, False])) <= 1


def test_separation_finds_groups_that_part_and_no_others():
    rng = np.random.default_rng(1)
    is_sink, token = np.tile([True, False], 10), np.repeat(np.arange(5), 4)
    x = rng.normal(size=(20, 8))
    _, p = geometry.separation(x + 10 * token[:, None], is_sink, token, name="none")  # tokens part, states do not
    assert p > 0.05
    value, p = geometry.separation(x + 10 * is_sink[:, None], is_sink, token, name="apart")
    assert value > 0.5 and p <= 0.002


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 4)), min_size=1, max_size=3))
def test_the_smallest_p_is_what_arrangements_allow(sizes):
    sizes = [(n, min(k, n)) for n, k in sizes]
    is_sink = np.concatenate([np.arange(n) < k for n, k in sizes])
    token = np.repeat(np.arange(len(sizes)), [n for n, _ in sizes])
    arrangements = list(product(*[list(combinations(range(n), k)) for n, k in sizes]))
    mirror = all(2 * k == n for n, k in sizes)
    assert geometry.smallest_separation_p(is_sink, token) == pytest.approx(max((1 + mirror) / len(arrangements), 1e-3))


def test_clustering_pairs_sinks_with_their_tokens():
    texts, sinks = repeated_tokens()
    result = anatomy.clustering(lens(), list(texts.values()), sinks, **QUIET)
    assert result.data["layer"].values.tolist() == [0, 1, 2] and len(result.table) == 8
    assert (result.table.groupby("pair")["token_id"].nunique() == 1).all()
    assert (result.data["p"] >= result.data["smallest_p"] - 1e-12).all()
    rows = by_hand(texts["prompt-0"]).residuals[1], by_hand(texts["prompt-1"]).residuals[1]
    x = torch.stack(
        [rows[int(name[-1])][pos] for name, pos in zip(result.table["prompt"], result.table["pos"], strict=True)]
    )
    expected = geometry.silhouette(torch.cdist(x, x).numpy(), result.table["is_sink"].to_numpy(dtype=bool))
    assert float(result.data["silhouette"].sel(space="resid_post", layer=1)) == pytest.approx(expected, abs=1e-3)
    with pytest.raises(InputError, match="sinks with a same-token non-sink: 0, at least 2"):
        anatomy.clustering(lens(), [prompt()], secondary(), **QUIET)
    with pytest.raises(InputError, match="name each once"):
        anatomy.clustering(lens(), list(texts.values()), sinks, layers=[1, 1], **QUIET)
