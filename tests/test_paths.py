"""Nested paths and holds: both execution paths and both backends against forward passes written by hand."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools

import eager
import hand
import numpy as np
import pandas as pd
import pytest
import torch
from common import BACKENDS, SINK, by_hand, lens, no_forward_pass, prompt, subject
from hypothesis import given
from hypothesis import strategies as st

import sink_circuits as sc
from sink_circuits.errors import InputError, ResultError
from sink_circuits.holds import HOLDABLE, Hold, _of_scale, norm_scale_hooks
from sink_circuits.paths import HOLDS, PATHS, SCALES_HELD, STEPS, PathEffect, measure_paths, path_effects, ratio_to
from sink_circuits.scores import column_log_odds, column_scores
from sink_circuits.twin import Tap, _normalise

ALL_PATHS = {**PATHS, **SCALES_HELD}
N, POS, CHOSEN = 40, 7, (0, 7, 20)
RUNS = [("bridge", "fast"), ("bridge", "reference"), *([("hooked", "reference")] if "hooked" in BACKENDS else [])]


def flip(c: torch.Tensor) -> torch.Tensor:
    return 0.5 * c.flip(-1)


EDITS = {
    "single": {(0, POS): 0.0},
    "joint": {(0, POS): 0.0, (1, POS): 3.0, (2, POS): flip},
}  # fmt: skip
PLANTED = {(6, SINK): 0.0, (7, SINK): 0.0}


@functools.cache
def random_llama():
    """A small random Llama: every head attends unevenly, so that all paths carry something."""
    return eager.tiny("llama")


@functools.cache
def random_lens(backend: str):
    if backend == "bridge":
        return sc.load_model(copy.deepcopy(random_llama()), verbose=False)
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_llama_weights

    config = random_llama().config
    cfg = HookedTransformerConfig(
        n_layers=config.num_hidden_layers, d_model=config.hidden_size, n_ctx=config.max_position_embeddings, d_head=config.head_dim,
        n_heads=config.num_attention_heads, d_mlp=config.intermediate_size, n_key_value_heads=config.num_key_value_heads,
        d_vocab=config.vocab_size, act_fn="silu", gated_mlp=True, normalization_type="RMS", final_rms=True, eps=config.rms_norm_eps,
        positional_embedding_type="rotary", rotary_dim=config.head_dim, rotary_base=int(config.rope_parameters["rope_theta"]),
        rotary_adjacent_pairs=False, init_weights=False, model_name="random", device="cpu",
    )  # fmt: skip
    model = HookedTransformer(cfg, move_to_device=False)
    model.load_and_process_state_dict(
        convert_llama_weights(copy.deepcopy(random_llama()), cfg),
        fold_ln=False, center_writing_weights=False, center_unembed=False, fold_value_biases=False,
    )  # fmt: skip
    return model.eval()


@functools.cache
def random_by_hand(case: str | None = None, held: tuple[tuple[str, int, int], ...] = ()) -> hand.Run:
    model, clean = random_llama(), random_by_hand() if held else None
    return hand.forward(
        model.state_dict(), model.config, eager.random_tokens(N), EDITS[case] if case else None, clean, held
    )


def nested_by_hand(state_dict, config, tokens, edits, pos) -> dict[str, torch.Tensor]:
    clean, first = hand.forward(state_dict, config, tokens), min(layer for layer, _ in edits)
    scales = [
        (name, layer, p)
        for name in ("scale1", "scale2") for layer in range(first + 1, config.num_hidden_layers) for p in range(len(tokens))
    ]  # fmt: skip
    return {
        "residual": hand.residual_only(state_dict, config, tokens, edits),
        "own stream": hand.own_stream(state_dict, config, tokens, edits, pos),
        "total": hand.forward(state_dict, config, tokens, edits).pattern,
        "residual, norm scales held": hand.residual_only(state_dict, config, tokens, edits, scales_held=True),
        "own stream, norm scales held": hand.own_stream(state_dict, config, tokens, edits, pos, scales_held=True),
        "total, norm scales held": hand.forward(state_dict, config, tokens, edits, clean, scales).pattern,
    }


@functools.cache
def random_nested_by_hand(case: str) -> dict[str, torch.Tensor]:
    model = random_llama()
    return nested_by_hand(model.state_dict(), model.config, eager.random_tokens(N), EDITS[case], POS)


@functools.cache
def planted_nested_by_hand() -> dict[str, torch.Tensor]:
    model = subject().hf_model
    return nested_by_hand(model.state_dict(), model.config, prompt(), PLANTED, SINK)


def edits_of(edited: dict) -> list[sc.Edit]:
    return [
        sc.Edit(layer, (pos,), f) if callable(f) else sc.rescale(layer, pos, f) for (layer, pos), f in edited.items()
    ]


def check(run, pattern: torch.Tensor) -> None:
    chosen = list(run.columns.chosen)
    full = [None] * len(pattern)
    assert (column_scores(run.columns, full, 1) - hand.sink_scores(pattern)[..., chosen]).abs().max() < 2e-6
    assert (column_log_odds(run.columns, full, 1) - hand.log_odds(pattern)[..., chosen]).abs().max() < 2e-4


def positions_of(hold: Hold) -> list[int]:
    if isinstance(hold.positions, tuple):
        return list(hold.positions)
    named = {None: range(N), "treated": [POS], "others": [p for p in range(N) if p != POS]}
    return list(named[hold.positions])


# ------------------------------------------------------------------------------------------- runs, written by hand
@pytest.mark.parametrize("case", EDITS)
@pytest.mark.parametrize(("backend", "path"), RUNS)
def test_nested_paths_are_those_by_hand(backend, path, case):
    tokens, expected = eager.random_tokens(N), random_nested_by_hand(case)
    clean = sc.run_clean(random_lens(backend), tokens, chosen=CHOSEN, path=path)
    rows = [[*edits_of(EDITS[case]), *held] for held in ALL_PATHS.values()]
    runs = sc.run_edited(random_lens(backend), clean, rows, path=path)
    for run, (name, pattern) in zip(runs, expected.items(), strict=True):
        check(run, pattern)
        assert run.path == path
        assert run.holds == ALL_PATHS[name]
        assert torch.equal(run.columns.log_attention[:1], clean.columns.log_attention[:1])
        assert torch.equal(run.columns.log_attention[:, :, :POS], clean.columns.log_attention[:, :, :POS])
    scores = [hand.sink_scores(pattern)[..., POS] for pattern in expected.values()]
    assert all((a - b).abs().max() > 1e-3 for a, b in itertools.pairwise(scores)), "paths tell nothing apart"


@pytest.mark.parametrize(("backend", "path"), RUNS)
def test_nested_paths_of_the_planted_sink_are_those_by_hand(backend, path):
    expected = planted_nested_by_hand()
    clean = sc.run_clean(lens(backend), prompt(), chosen=(0, SINK), path=path)
    runs = sc.run_edited(lens(backend), clean, [[*edits_of(PLANTED), *held] for held in ALL_PATHS.values()], path=path)
    untouched = hand.sink_scores(by_hand(prompt()).pattern)[8:13, :2, SINK]
    for run, pattern in zip(runs, expected.values(), strict=True):
        scores = column_scores(run.columns, [None] * 24, 1)[..., 1]
        assert (scores - hand.sink_scores(pattern)[..., SINK]).abs().max() < 2e-5
        # The plant: the sink heads' keys read the residual stream, so all of the effect is in the narrowest path.
        assert (scores[8:13, :2] < 0.2 * untouched).all()


HELD = {
    "keys": (Hold("k"),),
    "keys of the treated": (Hold("k", positions="treated"),),
    "queries in two layers": (Hold("q", layers=(1, 2)),),
    "values at two positions": (Hold("v", positions=(9, POS)),),
    "attention of the treated": (Hold("attn_out", positions="treated"),),
    "one MLP": (Hold("mlp_out", layers=2),),
    "others behind one block": (Hold("resid_post", layers=(1,), positions="others"),),
    "keys and queries of different layers": (Hold("k", layers=(1,)), Hold("q", layers=range(2, 4), positions="others")),
}


@pytest.mark.parametrize("name", HELD)
@pytest.mark.parametrize(("backend", "path"), RUNS)
def test_holds_are_those_by_hand(backend, path, name):
    held = tuple(
        (hold.what, layer, pos)
        for hold in HELD[name] for layer in (range(1, 4) if hold.layers is None else hold.layers) for pos in positions_of(hold)
    )  # fmt: skip
    clean = sc.run_clean(random_lens(backend), eager.random_tokens(N), chosen=CHOSEN, path=path)
    for case in EDITS:
        rows = [[*edits_of(EDITS[case]), *HELD[name]], edits_of(EDITS[case])]
        run, free = sc.run_edited(random_lens(backend), clean, rows, path=path)
        check(run, random_by_hand(case, held).pattern)
        check(free, random_by_hand(case).pattern)  # the other rows of its batch are not held


@pytest.mark.parametrize(("backend", "path"), RUNS)
def test_what_changes_nothing_is_bit_identical_to_an_unedited_row_whatever_is_held(backend, path):
    clean = sc.run_clean(random_lens(backend), eager.random_tokens(N), chosen=CHOSEN, path=path)
    same = sc.Edit(1, (POS,), lambda c: c.clone())
    all_holds = [*ALL_PATHS.values(), *((Hold(what),) for what in HOLDABLE)]
    rows = [[sc.zero(1, POS)], [], *([same, *held] for held in all_holds)]
    _, untouched, *runs = sc.run_edited(random_lens(backend), clean, rows, loss=True, path=path)
    for run in runs:
        assert torch.equal(run.columns.log_attention, untouched.columns.log_attention)
        assert torch.equal(run.columns.log_rest, untouched.columns.log_rest)
        assert torch.equal(run.resid_post_chosen, untouched.resid_post_chosen)
        assert torch.equal(run.loss[:-1], untouched.loss[:-1])


@pytest.mark.parametrize(("backend", "path"), RUNS)
def test_everything_held_leaves_nothing_of_the_edit(backend, path):
    """With keys and queries clean the patterns are, to the bit, those of an unedited row."""
    clean = sc.run_clean(random_lens(backend), eager.random_tokens(N), chosen=CHOSEN, path=path)
    rows = [[sc.zero(1, POS), Hold("k"), Hold("q")], [sc.zero(1, POS)], []]
    held, free, untouched = sc.run_edited(random_lens(backend), clean, rows, path=path)
    assert torch.equal(held.columns.log_attention, untouched.columns.log_attention)
    assert not torch.equal(free.columns.log_attention, untouched.columns.log_attention)


def hugging_face(name: str, tokens, edits, held: Hold | None, clean: dict | None = None):
    """Hugging Face's eager pass with the edits made and, in every block above, `held` taken from the clean pass."""
    model, kept, hooks = eager.tiny(name), {}, []

    def module_of(layer: int, what: str):
        block = eager.blocks_of(model)[layer]
        return block if what == "resid_post" else block.get_submodule(f"self_attn.{what}_proj")

    def keeper(layer: int, what: str):
        def hook(module, args, output):
            value = (output[0] if isinstance(output, tuple) else output).clone()
            value = value.reshape(len(tokens), -1)
            kept[layer, what] = value.clone()
            if held is not None and what == held.what and layer > 1:
                value[positions_of(held)] = clean[layer, what][positions_of(held)]
            value = value.reshape(1, len(tokens), -1)
            return (value, *output[1:]) if isinstance(output, tuple) else value

        return hook

    whats = ("resid_post",) if name == "gpt-neox" else ("resid_post", "q", "k", "v")  # GPT-NeoX joins its projections
    for layer in range(eager.N_LAYERS):
        hooks += [module_of(layer, what).register_forward_hook(keeper(layer, what)) for what in whats]
    try:
        return eager.forward(model, tokens, edits), kept
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "mistral", "gpt-oss", "gpt-neox", "qwen3"])
def test_holds_and_paths_of_other_architectures(name):
    """Post-norms, sliding windows, normalised keys, experts, parallel blocks: against plain hooks on Hugging Face's model."""
    tokens, windows, edits = eager.random_tokens(N), eager.WINDOWS[name], {(1, POS): 0.0}
    model = sc.load_model(eager.tiny(name), verbose=False)
    _, clean_parts = hugging_face(name, tokens, {}, None)
    holds = [Hold("resid_post", positions="others")]
    holds += [] if name == "gpt-neox" else [Hold("k"), Hold("k", positions="treated"), Hold("q"), Hold("v")]
    clean = sc.run_clean(model, tokens, chosen=CHOSEN)
    for path in ("fast", "reference"):
        rows = [[sc.zero(1, POS), hold] for hold in holds]
        for run, hold in zip(sc.run_edited(model, clean, rows, path=path), holds, strict=True):
            expected, _ = hugging_face(name, tokens, edits, hold, clean_parts)
            scores = eager.scores(expected.pattern, windows)[..., list(CHOSEN)]
            assert (column_scores(run.columns, windows, 1) - scores).abs().max() < 1e-5, (path, hold.label)
    # The residual path needs no hold of components: blocks that are given the clean stream plus the change.
    untouched = eager.forward(eager.tiny(name), tokens)
    change = -untouched.contributions[1, POS]

    def given_to(layer: int):
        def hook(module, args, kwargs):
            resid = untouched.residuals[layer - 1].clone()
            resid[POS] += change
            return (resid[None], *args[1:]), kwargs

        return hook

    plain = eager.tiny(name)
    hooks = [
        block.register_forward_pre_hook(given_to(layer), with_kwargs=True)
        for layer, block in enumerate(eager.blocks_of(plain)) if layer > 1
    ]  # fmt: skip
    expected = eager.forward(plain, tokens)
    for hook in hooks:
        hook.remove()
    scores = eager.scores(expected.pattern, windows)[..., list(CHOSEN)]
    for path in ("fast", "reference"):
        (run,) = sc.run_edited(model, clean, [[sc.zero(1, POS), *PATHS["residual"]]], path=path)
        assert (column_scores(run.columns, windows, 1) - scores).abs().max() < 1e-5, path


def with_clean_denominators(name: str, tokens, edits, first: int):
    """Hugging Face's eager pass in which every norm above block `first` divides by what it divided by in the clean pass."""
    model, denominators, held = eager.tiny(name), {}, [False]
    gemma = name.startswith("gemma")

    def hook(module, args, output, path, layer):
        x = args[0].double()
        centred = isinstance(module, torch.nn.LayerNorm)
        x = x - x.mean(-1, keepdim=True) if centred else x
        eps = module.eps if hasattr(module, "eps") else module.variance_epsilon
        own = (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()
        if not held[0]:
            denominators[path] = own
            return None
        if layer <= first:
            return None
        gain = module.weight.double() + (1 if gemma else 0)
        return (x / denominators[path] * gain + (module.bias if centred else 0)).to(output.dtype)

    hooks = [
        module.register_forward_hook(functools.partial(hook, path=(layer, path), layer=layer))
        for layer, block in enumerate(eager.blocks_of(model)) for path, module in block.named_modules()
        if path.rpartition(".")[2].endswith("norm")
    ]  # fmt: skip
    try:
        eager.forward(model, tokens)
        held[0] = True
        return eager.forward(model, tokens, edits), len(hooks) // eager.N_LAYERS
    finally:
        for one in hooks:
            one.remove()


@pytest.mark.parametrize(
    ("name", "n_norms"), [("gemma2", 4), ("gemma3", 6), ("qwen3", 4), ("gpt-oss", 2), ("gpt-neox", 2)]
)
def test_norm_scales_of_other_architectures(name, n_norms):
    """RMSNorm and LayerNorm, with and without bias, post-norms, norms of queries and keys, learned sinks."""
    tokens, windows = eager.random_tokens(N), eager.WINDOWS[name]
    expected, found = with_clean_denominators(name, tokens, {(1, POS): 0.0}, 1)
    assert found == n_norms
    model = sc.load_model(eager.tiny(name), verbose=False)
    assert len(norm_scale_hooks(sc.adapt(model))) == n_norms
    clean = sc.run_clean(model, tokens, chosen=CHOSEN)
    scores = eager.scores(expected.pattern, windows)[..., list(CHOSEN)]
    for path in ("fast", "reference"):
        held, free = sc.run_edited(model, clean, [[sc.zero(1, POS), Hold("norm_scale")], [sc.zero(1, POS)]], path=path)
        assert (column_scores(held.columns, windows, 1) - scores).abs().max() < 1e-5, path
        free = column_scores(free.columns, windows, 1)
        assert (free - scores).abs().max() > 1e-3, "held or not makes no difference here"


def test_norm_scales_that_cannot_be_held_are_refused():
    model = random_lens("bridge")
    adapter = sc.adapt(model)

    class WithoutNorms:
        cfg = model.cfg

        @property
        def hook_dict(self):
            return {name: point for name, point in model.hook_dict.items() if not name.endswith("hook_scale")}

    with pytest.raises(InputError, match=r"norm scales cannot be held in .*: its blocks have no norm hooks"):
        norm_scale_hooks(dataclasses.replace(adapter, model=WithoutNorms()))
    block = adapter.twin.blocks[1]
    norm = next(module for name, module in block.named_modules() if name == "input_layernorm")
    tap = Tap(holds={"ln1.hook_scale": lambda scale, axis: scale})

    class Other(torch.nn.Module):
        eps = 1e-6

    with pytest.raises(InputError, match="Other has no denominator that is known here: .*path='reference'"):
        _normalise(tap, "ln1.hook_scale", Other(), torch.ones(1, 2, 4), torch.ones(1, 2, 4))
    with pytest.raises(InputError, match="which axis counts the 5 positions: they cannot be held"):
        _of_scale(lambda scale, axis: scale, 5)(torch.ones(2, 5, 5, 1), 1)
    x = torch.randn(1, 3, norm.weight.shape[0])
    assert torch.equal(_normalise(tap, "ln1.hook_scale", norm, x, norm(x)), norm(x))  # its own denominator, to the bit


# ------------------------------------------------------------------------------------------------------ the result
def sinks_at(*places: tuple[str, int]) -> sc.Sinks:
    """A table of sinks as `find_sinks` returns it, of random text: what is measured is arithmetic, not whether they are sinks."""
    found = sc.find_sinks(lens(), prompt(), verbose=False)
    tokens = eager.random_tokens(N)
    rows = [
        {**found.table.iloc[0].to_dict(), "prompt": name, "pos": pos, "token_id": int(tokens[pos]), "l_start": 0, "l_end": 2}
        for name, pos in places
    ]  # fmt: skip
    return sc.Sinks(pd.DataFrame(rows), tuple(dict.fromkeys(name for name, _ in places)), found.manifest)


@functools.cache
def two_prompts() -> sc.Tokens:
    tokens = eager.random_tokens(N)
    other = tokens.clone()
    other[1:5] = eager.random_tokens(4, seed=1)
    return sc.Tokens((tokens, other), ("a", "b"))


@functools.cache
def result(path: str = "auto") -> PathEffect:
    sinks = sinks_at(("a", POS), ("a", 12), ("b", POS))
    return path_effects(random_lens("bridge"), two_prompts(), sinks, layers=(0, 2), path=path, verbose=False)


@pytest.mark.parametrize("path", ["fast", "reference"])
def test_the_total_is_what_measure_gives_to_the_bit(path):
    sinks = sinks_at(("a", POS), ("a", 12), ("b", POS))
    total = sc.ablate(random_lens("bridge"), two_prompts(), sinks, layers=(0, 2), path=path, verbose=False)
    for outcome in ("score", "log_odds"):
        np.testing.assert_array_equal(result(path).data[outcome].sel(run="total"), total.data[outcome].sel(edit="zero"))
        np.testing.assert_array_equal(result(path).data[f"clean_{outcome}"], total.data[f"clean_{outcome}"])
    np.testing.assert_array_equal(
        result(path).data["reading"], total.reading().sel(edit="zero").transpose("sink", "layer")
    )


def test_the_result_holds_what_is_by_hand():
    model, tokens = random_llama(), two_prompts()
    for sink, (text, pos) in enumerate(((0, POS), (0, 12), (1, POS))):
        edits = {(0, pos): 0.0, (2, pos): 0.0}
        expected = nested_by_hand(model.state_dict(), model.config, tokens.ids[text], edits, pos)
        clean = hand.forward(model.state_dict(), model.config, tokens.ids[text])
        held = {
            "hold q": [("q", layer, p) for layer in range(1, 4) for p in range(N)],
            "hold k at treated": [("k", layer, pos) for layer in range(1, 4)],
        }
        for run, places in held.items():
            expected[run] = hand.forward(
                model.state_dict(), model.config, tokens.ids[text], edits, clean, places
            ).pattern
        for run, pattern in expected.items():
            found = result().data["score"].sel(sink=sink, run=run).to_numpy()
            assert np.abs(found - hand.sink_scores(pattern)[..., pos].numpy()).max() < 2e-6
            found = result().data["log_odds"].sel(sink=sink, run=run).to_numpy()
            assert np.abs(found - hand.log_odds(pattern)[..., pos].numpy()).max() < 2e-4


def test_steps_losses_and_shares_add_up():
    found = result()
    assert list(found.data["run"].values) == [*ALL_PATHS, "hold k", "hold k at treated", "hold q", "hold v"]
    assert found.paths == tuple(ALL_PATHS)
    assert found.holds == tuple(hold.label for hold in HOLDS)
    for outcome in ("score", "log_odds"):
        effect = found.effect(outcome)
        assert (effect.isel(layer=0) == 0).all(), "the edited layer is read before the edit"
        np.testing.assert_allclose(found.steps(outcome).sum("step"), effect.sel(run="total"), atol=1e-6)
        np.testing.assert_allclose(
            found.lost(outcome).sel(hold="q"), effect.sel(run="total") - effect.sel(run="hold q"), atol=0
        )
    summary = found.summary().set_index(["outcome", "kind", "part"])
    for outcome in ("score", "log_odds"):
        rows = summary.loc[outcome]
        total = rows.loc[("path", "total")]
        assert total["share"] == pytest.approx(1) and total["share_low"] == pytest.approx(1)
        assert rows.loc["step"]["effect"].sum() == pytest.approx(total["effect"], rel=1e-4)
        assert rows.loc["step"]["share"].sum() == pytest.approx(1, rel=1e-4)
        assert list(rows.loc["step"].index) == list(STEPS)
        assert (rows["n_prompts"] == 2).all() and (rows["n_sinks"] == 3).all()
        own = found.over_lifetime(outcome).sel(run="residual").to_numpy()
        assert rows.loc[("path", "residual"), "effect"] == pytest.approx((own[:2].mean() + own[2]) / 2, rel=1e-5)
        np.testing.assert_allclose(rows["share"], rows["effect"] / total["effect"], rtol=1e-5)
    frame = found.to_dataframe()
    assert len(frame) == 2 * 3 * 10 * 4 * 4
    np.testing.assert_allclose(frame["effect"], frame["edited"] - frame["clean"], atol=1e-6)
    assert (frame.loc[frame["run"] == "total", "left_over"] == 0).all()
    held = summary.reset_index().query("norm_scales == 'held'")
    assert held["part"].tolist() == [*SCALES_HELD] * 2 and set(held["kind"]) == {"path"}
    assert "norm scales recomputed, and held where" in repr(found)
    assert found.manifest.settings["norm_scales"] == found.norm_scales
    pd.testing.assert_frame_equal(found.summary("score"), found.summary().query("outcome == 'score'"))
    for what, values in (("steps", found.steps("score")), ("lost", found.lost("score"))):
        expected = values.mean("head").where(found.data["reading"]).mean("layer")
        np.testing.assert_array_equal(found.over_lifetime("score", what), expected)
    clean = found.over_lifetime("score", "edited") - found.over_lifetime("score")
    np.testing.assert_allclose(clean, found.over_lifetime("score", "clean"), atol=1e-6)
    with pytest.raises(InputError, match="'half' is unknown"):
        found.over_lifetime(what="half")


@pytest.mark.parametrize("path", ["fast", "reference"])
def test_no_change_has_no_effect_by_any_path(path):
    def clone(c):
        return c.clone()

    sinks = sinks_at(("a", POS), ("b", POS))
    for intervention in (clone, lambda c: 1.0 * c):
        found = path_effects(
            random_lens("bridge"),
            two_prompts(),
            sinks,
            layers=(0, 2),
            intervention=intervention,
            path=path,
            verbose=False,
        )
        for outcome in ("score", "log_odds"):
            assert (found.effect(outcome) == 0).all()
        assert found.summary()["share"].isna().all(), "there is no total to take a share of"


def test_batches_and_the_users_cache_do_not_change_the_result():
    sinks = sinks_at(("a", POS))
    tokens = two_prompts().ids[0]
    sinks = sc.Sinks(sinks.table.assign(prompt="prompt-0"), ("prompt-0",), sinks.manifest)
    model = random_lens("bridge")
    options = {"layers": (0, 2), "verbose": False}
    one = path_effects(model, tokens, sinks, batch_size=1, **options)
    for outcome in ("score", "log_odds"):
        np.testing.assert_allclose(one.data[outcome], result().data[outcome].sel(sink=[0]), atol=1e-5)
    _, cache = model.run_with_cache(tokens[None], names_filter=sc.names_filter(model))
    cached = path_effects(model, tokens, sinks, clean_cache=cache, **options)
    for outcome in ("score", "log_odds"):
        np.testing.assert_allclose(cached.data[outcome], one.data[outcome], atol=1e-5)


def test_a_result_comes_back_from_its_file(tmp_path):
    result().save(tmp_path / "paths.safetensors")
    back = PathEffect.load(tmp_path / "paths.safetensors")
    assert back.data.equals(result().data)
    assert back.table.equals(result().table)
    assert (back.manifest, back.norm_scales) == (result().manifest, result().norm_scales)
    pd.testing.assert_frame_equal(back.summary(), result().summary())
    effect = sc.ablate(random_lens("bridge"), two_prompts(), sinks_at(("a", POS)), layer=0, verbose=False)
    effect.save(tmp_path / "effect.safetensors")
    with pytest.raises(ResultError, match="not a result with paths"):
        PathEffect.load(tmp_path / "effect.safetensors")


def test_each_sink_has_its_own_forming_layer_and_edits():
    sinks = sinks_at(("a", POS), ("b", POS))
    model, forming = random_lens("bridge"), pd.Series([0, 2])
    found = path_effects(model, two_prompts(), sinks, layer="forming", forming=forming, holds=(), verbose=False)
    assert found.data["first_layer"].values.tolist() == [0, 2]
    assert found.lost().sizes["hold"] == 0
    own = measure_paths(
        model, two_prompts(), sinks, lambda row: [sc.zero([0, 2][row.name], int(row.pos))], holds=(), verbose=False
    )
    assert own.data.equals(found.data)


# ------------------------------------------------------------------------------------------------------ refusals
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Hold("pattern"), "'pattern' cannot be held: use one of q, k, v"),
        (lambda: Hold("k", layers=()), r"a hold of layers \(\): name each once"),
        (lambda: Hold("k", layers=(2, 2)), r"a hold of layers \(2, 2\): name each once"),
        (lambda: Hold("k", layers=(-1,)), "counted from 0"),
        (lambda: Hold("k", positions="all"), "positions 'all' are unknown: use 'treated', 'others'"),
        (lambda: Hold("k", positions=()), "name at least one"),
        (lambda: Hold("k", layers=(1.5,)), "layer 1.5 is not a whole number"),
    ],
)
def test_holds_that_say_nothing_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_labels_say_what_is_held():
    assert Hold("k").label == "k"
    assert Hold("k", positions="treated").label == "k at treated"
    assert Hold("q", layers=range(6, 10)).label == "q in layers 6-9"
    assert Hold("v", layers=(3, 5), positions=(40,)).label == "v in layers 3,5 at 40"
    assert Hold("v", layers=3).label == "v in layers 3"


@pytest.mark.parametrize("path", ["fast", "reference"])
@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([sc.zero(1, POS), Hold("k", layers=(0, 1))], "'k in layers 0-1' reaches nothing: up to layer 1, the first edited"),
        ([sc.zero(1, POS), Hold("q", positions=(3, 4))], "'q at 3,4' reaches nothing: before position 7, the first edited"),
        ([sc.zero(3, POS), Hold("v")], "'v' reaches nothing: up to layer 3"),
        ([Hold("v")], "in a run without edits, which is clean"),
        ([sc.zero(1, POS), Hold("k", layers=(4,))], r"layer 4 is out of range: the model has layers 0\.\.3"),
        ([sc.zero(1, POS), Hold("k", positions=(N,))], r"position 40 is out of range: the text has positions 0\.\.39"),
    ],
)  # fmt: skip
def test_holds_that_reach_nothing_are_refused_before_any_run(row, message, path):
    clean = sc.run_clean(random_lens("bridge"), eager.random_tokens(N), chosen=CHOSEN)
    with no_forward_pass(), pytest.raises(InputError, match=message):
        sc.run_edited(random_lens("bridge"), clean, [row], path=path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": 1, "holds": (Hold("k", layers=(0, 1)),)}, "at position 7 of prompt 'a': the hold of 'k in layers 0-1' reaches nothing"),
        ({"layer": 3}, "reaches nothing: up to layer 3"),
        ({"layer": 1, "holds": ("k",)}, "'k' is not a Hold"),
        ({"layer": 1, "holds": (Hold("k"), Hold("k"))}, "name each once"),
        ({"layer": 1, "intervention": "erase"}, "intervention 'erase' is unknown"),
        ({"layer": 1, "together": True}, "option 'together' is unknown here: there are min_queries"),
        ({"layer": 1, "batch_size": 0}, "batch_size = 0"),
        ({"layer": 1, "norm_scales": "held"}, "norm_scales 'held' is unknown: use 'auto', 'both' or 'recomputed'"),
        ({"layer": 9}, "layer 9 is out of range"),
        ({}, "give either layer="),
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_refused_before_any_run(options, message):
    sinks, model = sinks_at(("a", POS)), random_lens("bridge")
    sc.adapt(model)
    with no_forward_pass(), pytest.raises(InputError, match=message):
        path_effects(model, two_prompts(), sinks, verbose=False, **options)


def test_an_unknown_outcome_is_refused():
    with pytest.raises(InputError, match="outcome 'loss' was not measured: there are score, log_odds"):
        result().effect("loss")


# ------------------------------------------------------------------------------------------------------ shares
@given(
    st.lists(st.tuples(st.integers(0, 3), st.floats(0.5, 2), st.floats(-1, 1)), min_size=1, max_size=8),
    st.floats(-2, 2),
)
def test_a_share_is_the_ratio_of_the_means_over_prompts(sinks, factor):
    prompts, whole, part = (np.array(column) for column in zip(*sinks, strict=True))
    by_prompt = [(whole[prompts == p].mean(), part[prompts == p].mean()) for p in dict.fromkeys(prompts.tolist())]
    wholes, parts = np.array(by_prompt).T
    found = ratio_to(whole, part, prompts, name="test")
    assert found.mean == pytest.approx(parts.mean() / wholes.mean(), abs=1e-9)
    assert found.n == len(by_prompt)
    if len(by_prompt) > 1:
        assert found.low <= found.mean + 1e-9 and found.mean <= found.high + 1e-9
    exact = ratio_to(whole, factor * whole, prompts, name="test")  # a constant share is known exactly
    assert exact.mean == pytest.approx(factor, abs=1e-9)
    if len(by_prompt) > 1:
        assert (exact.low, exact.high) == (pytest.approx(factor, abs=1e-9), pytest.approx(factor, abs=1e-9))


def test_shares_of_nothing_are_undefined():
    assert np.isnan(ratio_to(np.zeros(3), np.ones(3), [0, 1, 2], name="test").mean)
    assert np.isnan(ratio_to(np.full(3, np.nan), np.ones(3), [0, 1, 2], name="test").mean)
    found = ratio_to(np.array([1.0, np.nan, 3.0]), np.array([1.0, 5.0, np.nan]), [0, 1, 2], name="test")
    assert (found.mean, found.n) == (1.0, 1)


# ------------------------------------------------------------------------------------------------- trained weights
@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2-135m", "gemma-3-270m"])
def test_real_weights_give_the_same_by_both_execution_paths(name):
    from common import real

    model, _, tokens = real(name)
    found = sc.find_sinks(model, tokens, verbose=False)
    table = found.table[(found.table["kind"] != "primary") & (found.table["pos"] < 200)].head(2)
    sinks = sc.Sinks(table.reset_index(drop=True), found.prompts, found.manifest)
    layer = int(table["l_start"].min())
    fast, reference = (
        path_effects(model, tokens, sinks, layer=layer, path=path, verbose=False) for path in ("fast", "reference")
    )
    np.testing.assert_allclose(fast.data["score"], reference.data["score"], atol=1e-4)
    np.testing.assert_allclose(fast.data["log_odds"], reference.data["log_odds"], atol=2e-3)
