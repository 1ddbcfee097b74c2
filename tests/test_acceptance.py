"""What a sceptical user found once, so that it is not found again."""

import pandas as pd
import pytest
import torch
import transformers
from common import SINK, lens, prompt

import sink_circuits as sc
from sink_circuits.adapters import adapt
from sink_circuits.detection import Thresholds, split_phases
from sink_circuits.errors import CacheError, InputError, ModelError

SMALL = {"vocab_size": 101, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 128}


def test_unrotated_keys_are_not_taken_for_rotated_ones():
    tokens = prompt()
    names = ("hook_resid_mid", "hook_mlp_out", "attn.hook_q", "attn.hook_k")
    _, cache = lens().run_with_cache(tokens[None], names_filter=lambda name: name.endswith(names))
    with pytest.raises(CacheError, match=r"hook_pattern"):
        sc.sink_scores(lens(), tokens, clean_cache=cache)


def test_windows_of_some_layers_are_read_from_the_patterns():
    config = transformers.GPTNeoConfig(
        vocab_size=101, hidden_size=32, num_layers=4, num_heads=4, max_position_embeddings=256, window_size=16,
        attention_types=[[["global", "local"], 2]],
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.GPTNeoForCausalLM._from_config(config, attn_implementation="eager").eval()
    tokens = torch.arange(80) % 101
    with torch.no_grad():
        pattern = torch.stack([a[0] for a in model(tokens[None], output_attentions=True).attentions])
    bridge = sc.load_model(model)
    assert adapt(bridge).windows == (None, 16, None, 16)
    scores = sc.sink_scores(bridge, tokens, min_queries=8).scores[0]
    local = torch.ones(80, 80, dtype=torch.bool).tril(-1).triu(-15)
    expected = (pattern[1] * local).sum(-2) / local.sum(-2)
    torch.testing.assert_close(scores[1][:, :60], expected[:, :60], atol=1e-6, rtol=1e-4)


def test_a_far_fall_and_rise_is_a_new_phase_without_leaving_sink_state():
    two = [1.0] + [80.0] * 8 + [15.0] * 2 + [2500.0] * 5
    assert split_phases(two, 1, 15, Thresholds()) == [(1, 10), (11, 15)]
    gemma = [25.3, 5.4, 5.4, 7.4, 12.2, 12.7, 17.1, 13.2, 15.7, 14.2, 9.2]
    assert split_phases(gemma, 0, 10, Thresholds()) == [(0, 10)]
    assert split_phases([5.0, 5.0], 0, 1, Thresholds()) == [(0, 1)]
    gaps = [50.0, 1.0, 50.0, 1.0, 1.0, 1.0, 50.0]  # two bridged gaps are not one long trough
    assert split_phases(gaps, 0, 6, Thresholds(bridge=3)) == [(0, 6)]


@pytest.mark.parametrize("device", ["foo", "cuda:7"])
def test_a_device_that_is_not_there_is_said(device):
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**SMALL))
    with pytest.raises(ModelError, match=f"device '{device}' cannot be used"):
        sc.load_model(model, device=device)


def test_a_model_in_training_mode_is_evaluated_or_refused():
    bridge = sc.load_model(transformers.GPT2LMHeadModel(transformers.GPT2Config(**SMALL)).train())
    assert not bridge.original_model.training
    bridge.original_model.train()
    bridge.__dict__.pop("_sink_circuits_adapter")
    with pytest.raises(ModelError, match=r"training mode.*model\.eval\(\)"):
        sc.adapt(bridge)


def test_too_large_a_factor_is_refused():
    sinks = sc.find_sinks(lens(), prompt(), verbose=False).select("secondary")
    with pytest.raises(InputError, match="too long to square"):
        sc.dose_response(lens(), prompt(), sinks, layer=6, factors=[1e30], verbose=False)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("cached", [False, True])
def test_padded_batches_go_through_every_experiment(side, cached):
    rows = [prompt(), prompt(n_tokens=80, seed_name="short")]
    padded, mask = torch.full((2, 96), 5), torch.zeros(2, 96, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(96 - len(row), 96) if side == "left" else slice(0, len(row))
        padded[i, where], mask[i, where] = row, 1
    options = {"attention_mask": mask, "verbose": False}
    if cached:
        _, cache = lens().run_with_cache(padded, attention_mask=mask, names_filter=sc.names_filter(lens()))
        options["clean_cache"] = cache
    sinks = sc.find_sinks(lens(), padded, **options).select("secondary")
    assert sinks.table["pos"].tolist() == [SINK, SINK]
    plain = {"verbose": False}
    for run in (
        lambda tokens, o: sc.layer_map(lens(), tokens, sinks, layers=[6, 7], **o),
        lambda tokens, o: sc.ablate(lens(), tokens, sinks, layers=[6, 7], **o),
        lambda tokens, o: sc.ablate(lens(), tokens, sinks, layer=6, intervention="mean", **o),
        lambda tokens, o: sc.dose_response(lens(), tokens, sinks, layer="forming", factors=[0, 2], **o),
        lambda tokens, o: sc.ablate(lens(), tokens, layer=6, **o),
    ):
        ours, expected = run(padded, options), run(rows, plain)
        for outcome in ("score", "primary_score"):
            difference = abs(ours.data[outcome] - expected.data[outcome]).max().item()
            assert difference < 2e-5, f"{outcome} differs by {difference}"


def test_a_late_sink_is_named_before_the_map_is_run():
    tokens = prompt()[: SINK + 5]
    sinks = sc.find_sinks(lens(), tokens, verbose=False).select("secondary")
    assert len(sinks) == 1
    with pytest.raises(
        InputError, match=f"position {SINK} of prompt 'prompt-0' has 4 later queries, its score needs 16"
    ):
        sc.ablate(lens(), tokens, sinks, layer="forming", verbose=False)


def test_one_value_serves_where_several_may_stand():
    sinks = sc.find_sinks(lens(), prompt(), verbose=False).select("secondary")
    one = sc.ablate(lens(), prompt(), sinks, layers=6, verbose=False)
    same = sc.ablate(lens(), prompt(), sinks, layer=6, verbose=False)
    assert one.data.equals(same.data)
    assert sc.dose_response(lens(), prompt(), sinks, layer=6, factors=0.5, verbose=False).data["edit"].values == [0.5]


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda s: sc.ablate(lens(), prompt(), s, layer=[2, 3]), r"layer \[2, 3\] names several: pass layers="),
        (lambda s: sc.ablate(lens(), prompt(), s.table, layer=2), "sinks of type DataFrame cannot be read"),
        (lambda s: sc.ablate(lens(), prompt(), s, layer=2, batchsize=3), "option 'batchsize' is unknown"),
        (lambda s: sc.ablate(lens(), prompt(), s, layer=2, batch_size="a"), "batch_size = 'a'"),
        (lambda s: sc.find_sinks(lens(), prompt(), cosine="a"), "threshold cosine = 'a' is not a number"),
        (
            lambda s: sc.find_sinks(lens(), prompt(), clean_cache=(1, 2)),
            "clean_cache is a tuple: pass the cache itself",
        ),
        (
            lambda s: sc.ablate(lens(), prompt(), s, layer=6, verbose=False).over_lifetime("norm"),
            "a manipulation check",
        ),
    ],
)
def test_slips_end_in_a_sentence(call, sentence):
    sinks = sc.find_sinks(lens(), prompt(), verbose=False).select("secondary")
    with pytest.raises(sc.SinkCircuitsError, match=sentence):
        call(sinks)


def test_hooks_of_the_users_that_spoil_a_check_are_named():
    model = sc.load_model(transformers.GPT2LMHeadModel(transformers.GPT2Config(**SMALL)))
    model.add_hook("blocks.2.hook_mlp_out", lambda value, hook: value * 0)
    with pytest.raises(ModelError, match="hooks of your own stand on the model"):
        sc.find_sinks(model, torch.arange(40))
    model.reset_hooks()
    assert isinstance(sc.find_sinks(model, torch.arange(40), verbose=False).table, pd.DataFrame)
