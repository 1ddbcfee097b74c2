"""Clean and edited runs: both execution paths and both backends against a forward pass written by hand."""

from __future__ import annotations

import copy
import math
import threading

import eager
import hand
import pytest
import torch
from common import BACKENDS, SINK, by_hand, lens, no_forward_pass, prompt, subject, threads_of
from edits_by_hand import CHOSEN, EDITS, FULL, PATHS, cases, check_columns, edits_of

import sink_circuits as sc
from sink_circuits.clean_runs import resolve_path
from sink_circuits.edited_runs import batches
from sink_circuits.errors import InputError
from sink_circuits.scores import column_log_odds, column_scores


@pytest.mark.parametrize(("backend", "path"), PATHS)
def test_clean_run_is_the_one_by_hand(backend, path):
    expected = by_hand(prompt())
    clean = sc.run_clean(lens(backend), prompt(), chosen=CHOSEN, path=path)
    assert clean.path == path
    resid = torch.stack([clean.resid_post(layer) for layer in range(24)])
    assert (resid - expected.residuals).abs().max() < 1e-3
    assert (clean.contribution - expected.contributions).abs().max() < 1e-3
    assert (clean.base - (expected.residuals - expected.contributions)).abs().max() < 1e-3
    later = torch.ones(96, 96, dtype=torch.bool).tril(-1)
    assert (clean.later - (expected.pattern * later).sum(-2)).abs().max() < 1e-3
    assert (clean.diagonal - expected.pattern.diagonal(dim1=-2, dim2=-1)).abs().max() < 1e-5
    check_columns(clean.columns, expected.pattern)


@pytest.mark.parametrize(
    ("backend", "path", "name"), cases("far apart", "joint", *sorted(EDITS.keys() - {"far apart", "joint"}))
)
def test_edited_run_is_the_one_by_hand(backend, path, name):
    expected = by_hand(prompt(), EDITS[name])
    clean = sc.run_clean(lens(backend), prompt(), chosen=CHOSEN, path=path)
    (run,) = sc.run_edited(lens(backend), clean, [edits_of(EDITS[name])], loss=True, path=path)
    assert run.path == path
    check_columns(run.columns, expected.pattern)
    assert (run.resid_post_chosen - expected.residuals[:, list(CHOSEN)]).abs().max() < 2e-3
    loss = torch.nn.functional.cross_entropy(expected.logits[:-1], prompt()[1:], reduction="none")
    assert (run.loss[:-1] - loss).abs().max() < 1e-3
    assert run.loss[-1].isnan()


@pytest.mark.parametrize(("backend", "path"), PATHS)
def test_edits_in_one_batch_do_not_touch_each_other(backend, path):
    rows = [edits_of(EDITS[name]) for name in ("joint", "far apart", "positions")] + [[]]
    clean = sc.run_clean(lens(backend), prompt(), chosen=CHOSEN, path=path)
    runs = sc.run_edited(lens(backend), clean, rows, path=path)
    for run, name in zip(runs, ("joint", "far apart", "positions", None), strict=True):
        check_columns(run.columns, by_hand(prompt(), EDITS.get(name)).pattern)


@pytest.mark.parametrize(
    "rows", [("single", "single"), ("single", "first layer", "last layer", "single"), ("joint", "single"), ("single",)]
)
def test_rows_on_threads_are_the_ones_by_hand(rows):
    """Beside each other where nothing is edited in the middle of a run, one after another where there is."""
    clean = sc.run_clean(lens(), prompt(), chosen=CHOSEN, loss=True)
    with threads_of(2):
        runs = sc.run_edited(lens(), clean, [edits_of(EDITS[name]) for name in rows], loss=True, path="fast")
    for run, name in zip(runs, rows, strict=True):
        expected = by_hand(prompt(), EDITS[name])
        check_columns(run.columns, expected.pattern)
        loss = torch.nn.functional.cross_entropy(expected.logits[:-1], prompt()[1:], reduction="none")
        assert (run.loss[:-1] - loss).abs().max() < 1e-3


def test_rows_on_threads_are_in_order_and_alike_to_the_bit():
    clean = sc.run_clean(lens(), prompt(), chosen=CHOSEN)
    factors = [0.0, 1.0, 0.5, 0.0, 1.0, 0.5]
    with threads_of(3):
        runs = sc.run_edited(lens(), clean, [[sc.rescale(6, SINK, f)] for f in factors], path="fast")
    for i in range(3):
        assert torch.equal(runs[i].columns.log_attention, runs[i + 3].columns.log_attention)
        assert torch.equal(runs[i].resid_post_chosen, runs[i + 3].resid_post_chosen)
    resid = [float(run.resid_post_chosen[6, 2].norm()) for run in runs[:3]]
    assert resid[0] < resid[2] < resid[1], "each row is in its own place"


@pytest.mark.parametrize("layers", [(6,), (6, 8)])
def test_a_users_function_is_called_in_order_and_from_the_users_thread(layers):
    """It may draw numbers, count, or hold what only one thread may touch."""
    clean, called = sc.run_clean(lens(), prompt(), chosen=CHOSEN), []

    def own(label: str):
        def function(c: torch.Tensor) -> torch.Tensor:
            called.append((label, threading.current_thread() is threading.main_thread()))
            return c * 0.5

        return function

    rows = [[sc.custom(layer, SINK, own(f"{row}.{layer}")) for layer in layers] for row in range(4)]
    with threads_of(2):
        sc.run_edited(lens(), clean, rows, path="fast")
    assert called == [(f"{row}.{layer}", True) for layer in layers for row in range(4)]


def test_what_fails_on_a_thread_is_told(monkeypatch):
    clean = sc.run_clean(lens(), prompt(), chosen=CHOSEN)
    rows = [[sc.zero(layer, SINK)] for layer in (6, 7, 8)]
    monkeypatch.setattr("sink_circuits.edited_runs._n_expected", lambda *given: 99)
    with threads_of(2), pytest.raises(RuntimeError, match="99 edits and holds were asked for and 1 were made"):
        sc.run_edited(lens(), clean, rows, path="fast")
    monkeypatch.undo()
    assert len(sc.run_edited(lens(), clean, rows, path="fast")) == 3, "no twin was lost"


@pytest.mark.parametrize("prefix", [0, 20, SINK, 95, None])
def test_however_few_keys_are_kept_an_edited_run_is_the_one_by_hand(prefix):
    clean = sc.run_clean(lens(), prompt(), chosen=CHOSEN, loss=True, prefix=prefix)
    assert {key.shape[2] for key in (*clean.keys, *clean.values)} == {96 if prefix is None else prefix}
    (run,) = sc.run_edited(lens(), clean, [edits_of(EDITS["single"])], loss=True, kl=True, path="fast")
    check_columns(run.columns, by_hand(prompt(), EDITS["single"]).pattern)
    for part in ("log_attention", "log_rest"):
        before, after = getattr(clean.columns, part), getattr(run.columns, part)
        assert torch.equal(before[:, :, :SINK], after[:, :, :SINK])
        assert not torch.equal(before[:, :, SINK:], after[:, :, SINK:])
    assert not run.kl[:SINK].any() and (run.kl[SINK:] >= 0).all()
    for i, position in enumerate(CHOSEN):
        unedited = torch.stack([clean.resid_post(layer)[position] for layer in range(24)])
        assert torch.equal(run.resid_post_chosen[:, i], unedited) == (position < SINK)


@pytest.mark.parametrize("backend_path", [("bridge", "fast", "fast"), ("bridge", "reference", "reference"), ("bridge", "fast", "reference"),
                                          *([("hooked", "reference", "reference")] if "hooked" in BACKENDS else [])])  # fmt: skip
@pytest.mark.parametrize("layer", [0, 6, 23])
def test_a_no_op_is_bit_identical_to_an_unedited_row_of_its_batch(backend_path, layer):
    backend, clean_path, path = backend_path
    clean = sc.run_clean(lens(backend), prompt(), chosen=CHOSEN, path=clean_path)
    same = sc.Edit(layer, (SINK,), lambda c: c.clone())
    _, scaled, untouched, custom = sc.run_edited(
        lens(backend), clean, [[sc.zero(layer, SINK)], [sc.rescale(layer, SINK, 1.0)], [], [same]], loss=True, path=path
    )
    for run in (scaled, custom):
        assert torch.equal(run.columns.log_attention, untouched.columns.log_attention)
        assert torch.equal(run.columns.log_rest, untouched.columns.log_rest)
        assert torch.equal(run.resid_post_chosen, untouched.resid_post_chosen)
        assert torch.equal(run.loss[:-1], untouched.loss[:-1])


@pytest.mark.parametrize(("backend", "path", "name"), cases("window", "last layer", "single", "far apart"))
def test_what_an_edit_cannot_reach_is_exactly_clean(backend, path, name):
    """Layers up to the first edited one, and queries before the first edited position: not only to rounding."""
    first_layer, first_position = min(layer for layer, _ in EDITS[name]), min(pos for _, pos in EDITS[name])
    clean = sc.run_clean(lens(backend), prompt(), chosen=CHOSEN, path=path)
    run, _ = sc.run_edited(lens(backend), clean, [edits_of(EDITS[name]), [sc.zero(3, 20)]], path=path)
    for part in ("log_attention", "log_rest"):
        before, after = getattr(clean.columns, part), getattr(run.columns, part)
        assert torch.equal(after[: first_layer + 1], before[: first_layer + 1])
        assert torch.equal(after[:, :, :first_position], before[:, :, :first_position])
    for layer in range(first_layer):
        assert torch.equal(run.resid_post_chosen[layer], clean.resid_post(layer)[list(CHOSEN)])
    if name != "last layer":
        assert not torch.equal(run.columns.log_attention, clean.columns.log_attention)


def test_windows_and_post_norms_through_both_paths():
    """Random Gemma 3, Mistral, GPT-OSS, GPT-NeoX: edits against plain hooks on Hugging Face's eager model."""
    tokens, edited, chosen = eager.random_tokens(40), {(1, 5): 0.0, (2, 5): 0.0, (2, 20): 3.0}, (0, 5, 20, 30)
    for name in ("gemma2", "gemma3", "mistral", "gpt-oss", "gpt-neox", "qwen3"):
        expected, windows = eager.forward(eager.tiny(name), tokens, edited), eager.WINDOWS[name]
        model = sc.load_model(eager.tiny(name), verbose=False)
        clean = sc.run_clean(model, tokens, chosen=chosen)
        untouched = eager.forward(eager.tiny(name), tokens)
        assert (clean.contribution - untouched.contributions).abs().max() < 1e-4 * untouched.contributions.abs().max()
        for path in ("fast", "reference"):
            (run,) = sc.run_edited(model, clean, [edits_of(edited)], loss=True, path=path)
            assert run.path == path
            scores = eager.scores(expected.pattern, windows)[..., list(chosen)]
            assert (column_scores(run.columns, windows, 1) - scores).abs().max() < 1e-5, (name, path)
            odds = eager.log_odds(expected.pattern, windows)[..., list(chosen)]
            assert (column_log_odds(run.columns, windows, 1) - odds).abs().max() < 1e-3, (name, path)
            largest = expected.residuals.abs().max()
            assert (run.resid_post_chosen - expected.residuals[:, list(chosen)]).abs().max() < 1e-5 * largest, (
                name,
                path,
            )
            loss = torch.nn.functional.cross_entropy(expected.logits[:-1], tokens[1:], reduction="none")
            assert (run.loss[:-1] - loss).abs().max() < 1e-4, (name, path)


# ----------------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, c: sc.run_clean(m, prompt(), chosen=(96,)), r"position 96 is out of range: the text has positions 0\.\.95"),
        (lambda m, c: sc.run_clean(m, prompt(), chosen=(-1,)), "position -1 is out of range"),
        (lambda m, c: sc.run_clean(m, prompt(), chosen=(3, 3)), r"named twice in \(3, 3\)"),
        (lambda m, c: sc.run_clean(m, prompt(), path="quick"), "path 'quick' is unknown: use 'auto', 'fast' or 'reference'"),
        (lambda m, c: sc.run_edited(m, c, [[sc.zero(24, 3)]]), r"layer 24 is out of range: the model has layers 0\.\.23"),
        (lambda m, c: sc.run_edited(m, c, [[], [sc.zero(3, 96)]]), r"position 96 is out of range"),
        (lambda m, c: sc.run_edited(m, c, [[sc.zero(3, 5), sc.rescale(3, (4, 5), 2.0)]]), "two edits of one run change the same"),
        (lambda m, c: sc.run_edited(m, c, [[sc.zero(3, 5)]], path="quick"), "path 'quick' is unknown"),
    ],
)  # fmt: skip
def test_what_cannot_be_run_is_refused_first(call, message):
    clean = sc.run_clean(lens(), prompt(), chosen=CHOSEN)
    with no_forward_pass(), pytest.raises(InputError, match=message):
        call(lens(), clean)


def test_a_clean_run_without_columns_is_refused():
    with pytest.raises(InputError, match="make it with run_clean"):
        sc.run_edited(lens(), sc.run_clean(lens(), prompt()), [[sc.zero(3, 5)]])


def test_a_reference_run_is_not_resumed_on_the_fast_path():
    clean = sc.run_clean(lens(), prompt(), chosen=CHOSEN, path="reference")
    assert clean.path == "reference"
    with (
        no_forward_pass(),
        pytest.raises(InputError, match="needs a clean run of its own, this one is the reference path's"),
    ):
        sc.run_edited(lens(), clean, [[sc.zero(3, 5)]], path="fast")


def test_positions_and_masks_are_checked_before_a_run():
    for chosen in ((2.5,), (True,), ("3",)):
        with no_forward_pass(), pytest.raises(InputError, match="is not a whole number: give positions counted from 0"):
            sc.run_clean(lens(), prompt(), chosen=chosen)
    with no_forward_pass(), pytest.raises(InputError, match="mask"):
        sc.run_clean(lens(), prompt(), mask=torch.ones(5, dtype=torch.bool))


def test_rows_that_resume_at_one_place_share_a_batch_unless_they_run_alone():
    rows = [[sc.zero(6, SINK)], [sc.zero(7, SINK)], [], [sc.rescale(6, SINK, 2.0)]]
    assert batches(rows) == [((6, SINK), [0, 2, 3]), ((7, SINK), [1])]
    assert batches(rows, alone=True) == [((6, SINK), [0]), ((6, SINK), [3]), ((6, SINK), [2]), ((7, SINK), [1])]


@pytest.mark.parametrize("path", ["fast", "reference"])
def test_the_path_that_was_asked_for_serves(path):
    assert resolve_path(sc.adapt(lens()), path) == path
    assert sc.run_clean(lens(), prompt(), path=path).path == path


def test_no_rows_no_runs():
    assert sc.run_edited(lens(), sc.run_clean(lens(), prompt(), chosen=(0,)), []) == []


@pytest.mark.parametrize(("path", "layer"), [("fast", 2), ("fast", 9), ("reference", 9)])
@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda c: c[:, :3], "same shape"),
        (lambda c: c * math.nan, "NaN or infinite"),
        (lambda c: c.sum(), "same shape"),
    ],
)
def test_broken_functions_are_refused_in_a_run(function, message, path, layer):
    clean = sc.run_clean(lens(), prompt(), chosen=CHOSEN)
    row = [sc.zero(2, 30), sc.Edit(layer, (SINK,), function, "mine")]
    with pytest.raises(InputError, match=message):
        sc.run_edited(lens(), clean, [row], path=path)
    (again,) = sc.run_edited(lens(), clean, [edits_of(EDITS["single"])], path=path)  # nothing is left behind
    check_columns(again.columns, by_hand(prompt(), EDITS["single"]).pattern)


def test_an_edit_that_writes_in_place_reaches_no_clean_value():
    clean = sc.run_clean(lens(), prompt(), chosen=CHOSEN)
    before = clean.contribution.clone()
    for path in ("fast", "reference"):
        (run,) = sc.run_edited(lens(), clean, [[sc.Edit(6, (SINK,), lambda c: c.mul_(0))]], path=path)
        check_columns(run.columns, by_hand(prompt(), EDITS["single"]).pattern)
    assert torch.equal(clean.contribution, before)


# --------------------------------------------------------------------------------------- the user's hooks, weights
def halve(value, hook):
    return value * 0.5


def test_the_users_own_hooks_force_the_reference_path_and_take_part():
    model = subject().bridge()
    sc.adapt(model)
    model.add_hook("blocks.3.hook_mlp_out", halve)
    clean = sc.run_clean(model, prompt(), chosen=CHOSEN)
    expected = by_hand(prompt(), {(3, pos): 0.5 for pos in range(96)})
    assert clean.path == "reference"
    assert (clean.contribution - expected.contributions).abs().max() < 1e-3
    (run,) = sc.run_edited(model, clean, [[sc.zero(6, SINK)]])
    assert run.path == "reference"
    check_columns(run.columns, by_hand(prompt(), {**{(3, pos): 0.5 for pos in range(96)}, (6, SINK): 0.0}).pattern)
    with pytest.raises(InputError, match="hooks of your own stand on the model.*path='auto' or 'reference'"):
        sc.run_clean(model, prompt(), path="fast")
    model.reset_hooks()
    assert sc.run_clean(model, prompt()).path == "fast"


def test_a_model_met_with_hooks_on_it_is_fast_once_they_are_gone():
    model = subject().bridge()
    model.add_hook("blocks.3.hook_mlp_out", halve)
    assert sc.run_clean(model, prompt()).path == "reference"
    model.reset_hooks()
    assert sc.run_clean(model, prompt()).path == "fast"


def test_our_hooks_do_not_stay_on_the_model():
    model = subject().bridge()
    clean = sc.run_clean(model, prompt(), chosen=CHOSEN, path="reference")
    sc.run_edited(model, clean, [[sc.zero(6, SINK)]], path="reference")
    assert not any(point.fwd_hooks for point in model.hook_dict.values())
    with torch.no_grad():
        assert (model(prompt()[None])[0] - by_hand(prompt()).logits).abs().max() < 1e-3


@torch.no_grad()
@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_changed_in_place_make_the_adapter_again(backend):
    model = getattr(subject(), backend)()
    before = sc.adapt(model)
    hash_before = before.weights_hash
    assert sc.adapt(model) is before
    changed = copy.deepcopy(subject().hf_model)
    changed.model.layers[2].mlp.down_proj.weight.mul_(0.5)
    for name, parameter in model.named_parameters():
        if ("blocks.2.mlp" in name and name.endswith("W_out")) or "layers.2.mlp.down_proj" in name.replace(
            "_original_component.", ""
        ):
            parameter.mul_(0.5)
            break
    else:
        pytest.fail("the parameter is not there")
    after = sc.adapt(model)
    assert after is not before
    assert after.weights_hash != hash_before
    expected = hand.forward(changed.state_dict(), changed.config, prompt())
    clean = sc.run_clean(model, prompt())
    assert (clean.contribution - expected.contributions).abs().max() < 1e-3
    assert (expected.contributions - by_hand(prompt()).contributions).abs().max() > 1


def test_an_edited_run_does_not_change_the_model():
    model = subject().bridge()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    clean = sc.run_clean(model, prompt(), chosen=CHOSEN)
    sc.run_edited(model, clean, [edits_of(EDITS["window"])], loss=True)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.skipif("hooked" not in BACKENDS, reason="TransformerLens 4 has no HookedTransformer")
def test_both_backends_agree():
    clean = {kind: sc.run_clean(lens(kind), prompt(), chosen=CHOSEN) for kind in BACKENDS}
    runs = {kind: sc.run_edited(lens(kind), clean[kind], [edits_of(EDITS["joint"])])[0] for kind in BACKENDS}
    a, b = (column_log_odds(runs[kind].columns, FULL, 1) for kind in BACKENDS)
    assert (a - b).abs().max() < 1e-3
    assert (runs["bridge"].resid_post_chosen - runs["hooked"].resid_post_chosen).abs().max() < 1e-3


def test_names_filter_keeps_what_every_routine_needs_and_no_more():
    _, cache = lens().run_with_cache(prompt()[None], names_filter=sc.names_filter(lens()))
    assert len(cache) == 3 * 24
    _, parallel = (model := sc.load_model(eager.tiny("gpt-neox"), verbose=False)).run_with_cache(
        eager.random_tokens(20)[None], names_filter=sc.names_filter(model)
    )
    assert len(parallel) == 4 * 4  # the base of a parallel block is a sum of two hooks
    clean = sc.run_clean(model, eager.random_tokens(20), clean_cache=parallel)
    expected = eager.forward(eager.tiny("gpt-neox"), eager.random_tokens(20))
    assert (clean.contribution - expected.contributions).abs().max() < 1e-4
    assert (torch.stack([clean.resid_post(i) for i in range(4)]) - expected.residuals).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chosen": 5}, "chosen positions"),
        ({"row": "x"}, "row"),
        ({"mask": "x"}, "mask does not leave the text's 96 tokens"),
    ],
)
def test_what_a_clean_run_cannot_use_is_refused_at_once(options, message):
    with no_forward_pass(), pytest.raises(InputError, match=message):
        sc.run_clean(lens(), prompt(), **options)


@pytest.mark.parametrize(("backend", "path"), PATHS)
def test_an_edit_of_the_first_layer_is_seen_in_its_own_residual_stream(backend, path):
    model = lens(backend)
    clean = sc.run_clean(model, prompt(), chosen=CHOSEN, path=path)
    (run,) = sc.run_edited(model, clean, [(sc.zero(0, SINK),)], path=path)
    base = by_hand(prompt()).residuals[0][SINK] - by_hand(prompt()).contributions[0][SINK]
    assert (run.resid_post_chosen[0, CHOSEN.index(SINK)] - base).abs().max() < 1e-4
    assert torch.equal(run.resid_post_chosen[0, CHOSEN.index(10)], clean.resid_post(0)[10])
