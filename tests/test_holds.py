"""Holds and nested paths in single runs, against passes by hand and by Hugging Face, on both execution paths."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import eager
import hand
import pytest
import torch
from common import BACKENDS, SINK, by_hand, in_transformer_lens, lens, prompt, subject

import sink_circuits as sc
from sink_circuits.errors import InputError
from sink_circuits.holds import HOLDABLE, Hold, _of_scale, norm_scale_hooks
from sink_circuits.paths import PATHS, SCALES_HELD
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
    return in_transformer_lens(random_llama(), backend)


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
