"""Interventions with names: closed forms, donors, neurons, what they refuse, and what they make of planted sinks."""

from __future__ import annotations

import hashlib
import math
from types import SimpleNamespace

import eager
import hand
import numpy as np
import pytest
import torch
from common import SINK, by_hand, lens, no_forward_pass, prompt, subject
from hypothesis import given
from hypothesis import strategies as st

import sink_circuits as sc
from sink_circuits import interventions as iv
from sink_circuits.errors import InputError

# Closed forms. Rows of any size a float32 squares without loss, in double so that 1e-9 means something.

seeds = st.integers(0, 10_000)
norms = st.floats(1e-3, 1e6)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-9) -> bool:
    return bool((found - expected).abs().max() <= tolerance * max(1.0, expected.abs().max().item()))


def cosines(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cosine_similarity(a, b.expand_as(a), dim=-1)


AT = (4, 9, 2)


@given(seed=seeds, size=norms, norm=norms)
def test_setting_the_norm_sets_it_and_keeps_the_direction(seed, size, norm):
    c = drawn(3, 7, seed=seed) * size
    edit = iv.set_norm(5, AT, norm)
    edited = edit.apply(c)
    assert close(edited.norm(dim=-1), torch.full((3,), norm, dtype=torch.float64))
    assert close(cosines(edited, c), torch.ones(3).double())
    assert close(edit.apply(edited), edited)
    assert (edit.name, edit.parameter) == ("set_norm", norm)
    assert not iv.set_norm(5, AT, 0).apply(c).any()


@given(seed=seeds, size=norms, donor_size=norms)
def test_norm_and_direction_of_one_donor_make_the_donor(seed, size, donor_size):
    c, donor = drawn(3, 7, seed=seed) * size, drawn(3, 7, seed=seed + 1) * donor_size
    by_norm, by_direction = iv.swap_norm(5, AT, donor), iv.swap_direction(5, AT, donor)
    assert close(by_norm.apply(c).norm(dim=-1), donor.norm(dim=-1))
    assert close(cosines(by_norm.apply(c), c), torch.ones(3).double())
    assert close(by_direction.apply(c).norm(dim=-1), c.norm(dim=-1))
    assert close(cosines(by_direction.apply(c), donor), torch.ones(3).double())
    assert close(sc.compose(by_norm, by_direction).apply(c), donor)
    assert close(sc.compose(by_direction, by_norm).apply(c), donor)


@given(seed=seeds, size=norms, length=norms)
def test_kept_and_removed_direction_add_up(seed, size, length):
    c, direction = drawn(3, 7, seed=seed) * size, drawn(7, seed=seed + 1) * length
    keep, remove = iv.keep_direction(5, AT, direction), iv.remove_direction(5, AT, direction)
    kept, rest = keep.apply(c), remove.apply(c)
    assert close(kept + rest, c)
    assert close(keep.apply(kept), kept)
    assert close(remove.apply(rest), rest)
    assert close(cosines(kept, direction).abs(), torch.ones(3).double())
    assert close(rest @ direction / (size * length), torch.zeros(3).double())
    assert close(sc.compose(keep, remove).apply(c) / size, torch.zeros(3, 7).double())
    assert close(iv.keep_direction(5, AT, -direction).apply(c), kept)  # a direction's sign does not matter here


@given(seed=seeds, factors=st.lists(st.floats(0, 10), min_size=1, max_size=4))
def test_rescaling_composes_to_the_product(seed, factors):
    c = drawn(3, 7, seed=seed)
    edit = sc.compose(*(iv.rescale(5, AT, factor) for factor in factors))
    assert close(edit.apply(c), c * math.prod(factors))
    assert edit.changes_nothing == all(factor == 1 for factor in factors)


@given(seed=seeds, size=norms)
def test_random_directions_keep_the_norm_and_depend_on_names_alone(seed, size):
    c = drawn(3, 64, seed=seed) * size
    edited = iv.random_direction(5, AT, "control", seed).apply(c)
    assert close(edited.norm(dim=-1), c.norm(dim=-1))
    assert torch.equal(iv.random_direction(5, AT, "control", seed).apply(c), edited)
    alone = iv.random_direction(5, AT[1], "control", seed).apply(c[1:2])
    assert torch.equal(alone, edited[1:2])
    for other in (iv.random_direction(6, AT, "control", seed), iv.random_direction(5, AT, "control", seed + 1)):
        assert cosines(other.apply(c), edited).abs().max() < 0.8
    assert close(iv.random_direction(5, AT, "control", seed).apply(c.flip(-1)), edited)  # nothing of c but |c|
    barred = drawn(64, seed=seed + 2)
    orthogonal = iv.random_direction(5, AT, "control", seed, orthogonal_to=barred).apply(c)
    assert close(orthogonal.norm(dim=-1), c.norm(dim=-1))
    assert cosines(orthogonal, barred).abs().max() < 1e-9


def test_random_directions_are_uniform_on_the_sphere():
    """2000 draws in 16 dimensions: mean 0 and second moment 1/16 in every coordinate, within five standard errors."""
    c = torch.ones(2000, 16, dtype=torch.float64) / 4
    r = iv.random_direction(3, range(2000), "uniform").apply(c)
    assert r.mean(0).abs().max() < 5 * (1 / 16 / 2000) ** 0.5
    assert ((r.T @ r) / 2000 - torch.eye(16) / 16).abs().max() < 5 * (2 / 16**2 / 2000) ** 0.5


def gaussian(size: int, *names) -> torch.Tensor:
    """From the names alone: their seed is the first eight bytes of a digest."""
    digest = hashlib.sha256("\x1f".join(map(str, names)).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
    return torch.randn(size, generator=generator, dtype=torch.float64)


def test_random_directions_are_those_of_their_names():
    """Cells run again in another process, or by another release, get the same directions."""
    c = drawn(3, 7)
    for row, position in enumerate(AT):
        u = gaussian(7, "direction", "control", 1, 5, position)
        assert close(iv.random_direction(5, AT, "control", 1).apply(c)[row], c[row].norm() * u / u.norm())
        u = gaussian(7, "perturbation", "control", 1, 5, position)
        moved = iv.random_perturbation(iv.rescale(5, AT, 3.0), "control", 1).apply(c)[row] - c[row]
        assert close(moved, 2 * c[row].norm() * u / u.norm())


@given(seed=seeds, size=norms, factor=st.floats(0, 5))
def test_a_random_perturbation_moves_as_far_as_the_edit(seed, size, factor):
    c = drawn(3, 64, seed=seed) * size
    edit = sc.compose(iv.rescale(5, AT, factor), sc.custom(5, AT, lambda x: x + size, "shift"))
    perturbed = iv.random_perturbation(edit, "control", seed)
    moved = perturbed.apply(c) - c
    assert close(moved.norm(dim=-1) / size, (edit.apply(c) - c).norm(dim=-1) / size)
    assert cosines(moved, edit.apply(c) - c).abs().max() < 0.8
    assert (perturbed.layer, perturbed.positions) == (5, AT)
    assert perturbed.name == f"random_perturbation of {edit.name}"
    keep = iv.rescale(5, AT, 1.0)
    assert iv.random_perturbation(keep, "control") is keep


def test_half_precision_is_computed_wide_and_rounded_once():
    c, u = (drawn(3, 512) * 300).bfloat16(), drawn(512, seed=1)
    for make in (iv.remove_direction, iv.keep_direction):
        edited = make(5, AT, u).apply(c)
        assert edited.dtype == torch.bfloat16
        assert torch.equal(edited, make(5, AT, u).apply(c.float()).bfloat16())
    assert torch.equal(iv.set_norm(5, AT, 70).apply(c), iv.set_norm(5, AT, 70).apply(c.float()).bfloat16())


def test_what_norm_zero_does_is_defined():
    c = drawn(3, 7)
    c[1] = 0
    donor, u = drawn(3, 7, seed=1), drawn(7, seed=2)
    for edit in (
        iv.swap_direction(5, AT, donor), iv.random_direction(5, AT, "x"), iv.keep_direction(5, AT, u), iv.remove_direction(5, AT, u),
    ):  # fmt: skip
        assert not edit.apply(c)[1].any()
        assert edit.apply(c)[[0, 2]].any(dim=-1).all()
    for edit in (iv.set_norm(5, AT, 2.0), iv.swap_norm(5, AT, donor)):
        with pytest.raises(InputError, match=r"at layer 5 needs a direction and was given a vector of norm 0: leave"):
            edit.apply(c)
    donor[1] = 0
    assert not iv.swap_norm(5, AT, donor).apply(c)[1].any()
    assert not iv.swap_norm(5, AT, torch.zeros(7)).apply(c).any()
    assert not iv.set_norm(5, AT, 0).apply(c).any()
    with pytest.raises(InputError, match=r"the donor of swap_direction at layer 5 .* norm 0"):
        iv.swap_direction(5, AT, donor)
    tiny = torch.full((3, 7), 1e-30)
    assert close(iv.set_norm(5, AT, 2.0).apply(tiny).norm(dim=-1), torch.full((3,), 2.0), 1e-6)


def test_writing_along_a_direction_forgets_the_contribution():
    direction = drawn(7)
    edited = iv.write_along(5, AT, 3 * direction, 12.0).apply(drawn(3, 7, seed=1))
    assert close(edited, 12 * (direction / direction.norm()).expand(3, 7))


def test_edits_compose_in_order_and_windows_are_tuples():
    c = drawn(3, 7)
    both = sc.compose(iv.set_norm(5, AT, 8.0), sc.custom(5, AT, lambda x: x + 1, "shift"))
    assert close(both.apply(c), 8 * c / c.norm(dim=-1, keepdim=True) + 1)
    assert both.name == "set_norm then shift"
    again = sc.compose(both, iv.rescale(5, AT, 0.5))  # an edit of an edit of an edit
    assert close(again.apply(c), both.apply(c) / 2)
    assert sc.compose(iv.rescale(5, AT, 1), iv.zero(5, AT)).name == "zero"
    edits = sc.window(range(3, 6), lambda layer: iv.rescale(layer, 7, layer))
    assert [(edit.layer, edit.parameter) for edit in edits] == [(3, 3.0), (4, 4.0), (5, 5.0)]


def test_a_function_of_ones_own_is_an_edit():
    def halved_and_turned(c):
        return -c / 2

    edit = sc.custom(5, AT, halved_and_turned)
    assert (edit.name, edit.positions, edit.layer) == ("halved_and_turned", AT, 5)
    assert torch.equal(edit.apply(drawn(3, 7)), -drawn(3, 7) / 2)
    assert sc.custom(5, 4, torch.neg, "turned", 2.0).parameter == 2.0


# Donors, from runs that are made up: position and token id stand in the last two numbers of each contribution.


def made_up(*tokens: int, n_layers: int = 3):
    """Position p's contribution depends on its context alone, as a causal model's would."""
    rows = torch.zeros(n_layers, len(tokens), 6)
    for p, token in enumerate(tokens):
        rows[:, p, :4] = drawn(n_layers, 4, seed=hash(tuple(tokens[: p + 1])) % 10_000).float()
        rows[:, p, 4:] = torch.tensor([p, token]).float()
    return SimpleNamespace(tokens=torch.tensor(tokens), contribution=rows)


def found(edit: sc.Edit) -> torch.Tensor:
    return edit.apply(torch.full((len(edit.positions), 6), 99.0))


def test_patches_take_what_they_say():
    run = made_up(0, 5, 6, 5, 7)
    assert torch.equal(found(iv.patch(1, (3, 1), run)), run.contribution[1, [3, 1]])
    assert torch.equal(found(iv.patch(1, (3, 1), run, (4, 2))), run.contribution[1, [4, 2]])
    assert torch.equal(found(iv.transplant(2, (8, 9), run, 3)), run.contribution[2, 3].expand(2, 6))
    assert torch.equal(found(iv.noising(1, 9, run, 3)), found(iv.denoising(1, 9, run, 3)))
    assert (iv.noising(1, 3, run).name, iv.denoising(1, 3, run).name) == ("noising", "denoising")
    u = drawn(6)
    written = iv.transplant_norm(2, 8, run, 3, u)
    assert close(found(written)[0], run.contribution[2, 3].norm() * (u / u.norm()).float(), 1e-6)
    assert (written.name, written.parameter) == ("transplant_norm", pytest.approx(run.contribution[2, 3].norm().item()))


def test_contributions_are_read_by_layer_and_position():
    run = made_up(0, 5, 6, 5, 7)
    assert torch.equal(iv.contribution_of(run, 2, 3), run.contribution[2, [3]])
    assert torch.equal(iv.contribution_of(run, torch.tensor(1), np.array([3, 0])), run.contribution[1, [3, 0]])
    for layer, position in ((3, 0), (0, 5)):
        with pytest.raises(InputError, match="out of range"):
            iv.contribution_of(run, layer, position)


def test_mean_over_a_corpus():
    corpus = [made_up(0, 5, 6), made_up(0, 7, 8, 9)]
    everything = torch.cat([run.contribution[1] for run in corpus]).mean(0)
    assert close(found(iv.mean_over_corpus(1, (4, 6), iter(corpus))), everything.expand(2, 6), 1e-6)
    masks = [torch.tensor([False, True, False]), torch.tensor([False, True, True, False])]
    some = torch.stack([corpus[0].contribution[1, 1], *corpus[1].contribution[1, 1:3]]).mean(0)
    assert close(found(iv.mean_over_corpus(1, 4, corpus, masks))[0], some, 1e-6)
    with pytest.raises(InputError, match="no position of the corpus counts"):
        iv.mean_over_corpus(1, 4, corpus, [~torch.ones(3).bool(), ~torch.ones(4).bool()])


def test_mean_over_the_same_token_leaves_the_position_and_its_context_out():
    run, other = made_up(0, 5, 6, 5, 7, 5), made_up(0, 5, 5)
    edit = iv.mean_over_same_token(1, (3, 5), run, [run, other, made_up(0, 5, 6, 5)])
    own, theirs = run.contribution[1], other.contribution[1]
    # Position 1 of all three texts is one context and counts once; so is position 3 of the first and the last.
    assert close(found(edit)[0], torch.stack([own[1], own[5], theirs[2]]).mean(0), 1e-6)
    assert close(found(edit)[1], torch.stack([own[1], own[3], theirs[2]]).mean(0), 1e-6)
    masks = [torch.tensor([False, False, True])]
    assert close(found(iv.mean_over_same_token(1, 3, run, [other], masks))[0], theirs[2], 1e-6)


@given(
    texts=st.lists(st.lists(st.sampled_from([5, 5, 6]), min_size=2, max_size=12), min_size=1, max_size=4), name=st.text(max_size=4)
)  # fmt: skip
def test_resampling_is_a_derangement_within_the_token_id(texts, name):
    runs = [made_up(0, *text) for text in texts]
    run = runs[0]
    contexts = {tuple(r.tokens[: p + 1].tolist()): r.contribution[1, p] for r in runs for p in range(len(r.tokens))}
    for token in (5, 6):
        of_token = {context: row for context, row in contexts.items() if context[-1] == token}
        positions = [p for p in range(len(run.tokens)) if run.tokens[p] == token]
        if not positions:
            continue
        if len(of_token) < 2:
            with pytest.raises(InputError, match="has no other occurrence"):
                iv.resample(1, positions, run, runs, name=name)
            continue
        rows = found(iv.resample(1, positions, run, runs, name=name))
        for p, row in zip(positions, rows, strict=True):
            donors = [context for context, own in of_token.items() if torch.equal(row, own)]
            assert donors  # of the same token id
            assert tuple(run.tokens[: p + 1].tolist()) not in donors  # and not its own
            assert torch.equal(found(iv.resample(1, p, run, runs, name=name))[0], row)  # the same when treated alone
        assert len({tuple(row.tolist()) for row in rows}) == len(positions)
        assert torch.equal(found(iv.resample(1, positions, run, runs[::-1], name=name)), rows)


def test_resampling_takes_one_occurrence_for_a_window_and_every_one_under_some_name():
    run = made_up(0, *[5, 6] * 5)
    drawn_positions = set()
    for index in range(60):
        places = [found(iv.resample(layer, 3, run, name=f"draw {index}"))[0, 4].item() for layer in range(3)]
        assert len(set(places)) == 1
        drawn_positions.add(places[0])
    assert drawn_positions == {1.0, 5.0, 7.0, 9.0}
    masks = [torch.arange(11) == 7]
    assert found(iv.resample(1, (1, 3), run, [run], name="x", counted=masks))[:, 4].tolist() == [7.0, 7.0]


def test_a_first_token_cannot_be_resampled_from_other_texts():
    """After the same (empty) prefix every text holds the same contribution: that would be a treatment without effect."""
    with pytest.raises(
        InputError, match=r"token id 0 at position 0 has no other occurrence that counts: give a corpus"
    ):
        iv.resample(1, 0, made_up(0, 5), [made_up(0, 6), made_up(0, 7)], name="x")


RUN = made_up(0, 5, 6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: iv.set_norm(3, 5, -1), r"norm -1 is not allowed: norms are finite and at least 0"),
        (lambda: iv.set_norm(3, 5, math.nan), r"norm nan is not allowed"),
        (lambda: iv.set_norm(3, 5, "big"), r"norm 'big' is not a number"),
        (lambda: iv.write_along(3, 5, torch.ones(4), math.inf), r"norm inf is not allowed"),
        (lambda: iv.remove_direction(3, 5, torch.zeros(4)), r"the direction is zero, NaN or infinite"),
        (lambda: iv.keep_direction(3, 5, torch.full((4,), math.nan)), r"the direction is zero, NaN or infinite"),
        (lambda: iv.keep_direction(3, 5, torch.ones(2, 4)), r"shape \(2, 4\) is not one vector: give \[d_model\]"),
        (lambda: iv.random_direction(3, 5, "x", orthogonal_to=torch.zeros(4)), r"the direction is zero"),
        (lambda: iv.swap_norm(3, (5, 6, 7), torch.ones(2, 4)), r"2 donor rows for 3 positions"),
        (lambda: iv.swap_direction(3, 5, torch.ones(1, 1, 4)), r"shape \(1, 1, 4\) has no rows to give"),
        (lambda: iv.without_neurons(3, (5, 6, 7), torch.ones(2, 4)), r"2 donor rows for 3 positions"),
        (lambda: sc.custom(3, 5, "zero"), r"function 'zero' cannot be called"),
        (lambda: sc.compose(), r"compose was given no edits"),
        (lambda: sc.compose(iv.zero(3, 5), iv.zero(4, 5)), r"layer 3 at \(5,\) and of layer 4 at \(5,\) do not compose"),
        (lambda: sc.compose(iv.zero(3, (5, 6)), iv.zero(3, (6, 5))), r"do not compose: give the same layer and positions"),
        (lambda: sc.window([], lambda layer: iv.zero(layer, 5)), r"name each layer of a window once, and at least one"),
        (lambda: sc.window(3, lambda layer: iv.zero(layer, 5)), r"layers = 3: give a list"),
        (lambda: iv.replace(3, 5, [1.0, 2.0]), r"a donor is \[1\.0, 2\.0\]: give a tensor of real numbers"),
        (lambda: iv.replace(3, 5, torch.ones(4) * 1j), r"a donor is .*: give a tensor of real numbers"),
        (lambda: iv.mean_over_corpus(1, 1, ["x"]), r"make it with run_clean"),
        (lambda: sc.window([3, 3], lambda layer: iv.zero(layer, 5)), r"layers \[3, 3\]: name each layer"),
        (lambda: iv.patch(3, 1, RUN), r"layer 3 is out of range: the model has layers 0\.\.2"),
        (lambda: iv.patch(1, 3, RUN), r"position 3 is out of range: the text has positions 0\.\.2"),
        (lambda: iv.patch(1, (0, 1, 2), RUN, (0, 1)), r"2 donor rows for 3 positions"),
        (lambda: iv.transplant(1, 5, RUN, (0, 1)), r"the sink's position \(0, 1\) is not a whole number"),
        (lambda: iv.resample(1, 1, RUN, name="x"), r"token id 5 at position 1 has no other occurrence that counts"),
        (lambda: iv.mean_over_same_token(1, 1, RUN), r"leave this position out"),
        (lambda: iv.mean_over_corpus(1, 1, [RUN], [torch.ones(2).bool()]), r"of shape \(2,\) for 3 tokens: give Bool"),
        (lambda: iv.mean_over_corpus(1, 1, [RUN], [torch.ones(3)]), r"a mask torch\.float32 of shape"),
        (lambda: iv.mean_over_corpus(1, 1, [RUN], []), r"fewer masks than runs"),
        (lambda: iv.mean_over_corpus(1, 1, [], [torch.ones(3).bool()]), r"more masks than runs"),
        (lambda: iv.patch(1, 1, SimpleNamespace(tokens=RUN.tokens, contribution=None)), r"holds no contributions"),
        (lambda: iv.neuron_contribution(torch.ones(2, 3), torch.ones(4, 5), [0]), r"\(2, 3\) and weights \(4, 5\) do not"),
        (lambda: iv.neuron_contribution(torch.ones(2, 4), torch.ones(4, 5), [4]), r"neurons \[4\]: name each once, in 0\.\.3"),
        (lambda: iv.neuron_contribution(torch.ones(2, 4), torch.ones(4, 5), [1, 1]), r"neurons \[1, 1\]: name each once"),
        (lambda: iv.neuron_contribution(torch.ones(2, 4), torch.ones(4, 5), [1], torch.ones(3)), r"one activation per neuron"),
        (lambda: iv.part_through_norm(torch.ones(2, 4), torch.ones(1, 4), torch.neg), r"give the same shape"),
        (lambda: iv.keep_direction(3, 5, torch.ones(3)).apply(torch.ones(1, 7)), r"the direction has 3 entries, the contribution 7"),
        (lambda: iv.swap_norm(3, 5, torch.ones(3)).apply(torch.ones(1, 7)), r"the donor has 3 entries, the contribution 7"),
        (lambda: sc.Edit(3, 5, torch.neg, "mine", "large"), r"the edit's parameter.* 'large'"),
        (lambda: sc.Edit(3, 5, torch.neg, 7), r"the edit's name.* 7"),
    ],
)  # fmt: skip
def test_impossible_interventions_are_refused_in_one_sentence(make, message):
    with no_forward_pass(), pytest.raises(InputError, match=message) as error:
        make()
    assert str(error.value).count(". ") == 0
    assert "\n" not in str(error.value)


# The planted model: MLPs 6 and 7 write along `direction` at the secondary sink; heads 0 and 1 of layers 7 to 13 read it.

ORDINARY = 50


@pytest.fixture(scope="module")
def clean():
    return sc.run_clean(lens(), prompt(), chosen=(0, SINK, ORDINARY))


def score_by_hand(pos: int, *edits: sc.Edit, tokens: torch.Tensor | None = None) -> float:
    """Score of a position, mean over the sink heads and layers 7 to 13, of the forward pass written by hand."""

    def on_one(edit: sc.Edit, position: int):
        return lambda c: edit.written_into(c.float().expand(max(edit.positions) + 1, -1))[position].double()

    functions = {(edit.layer, position): on_one(edit, position) for edit in edits for position in edit.positions}
    run = by_hand(prompt() if tokens is None else tokens, functions)
    return hand.sink_scores(run.pattern)[7:14, :2, pos].mean().item()


def test_the_transplanted_contribution_makes_a_sink_and_random_directions_do_not(clean):
    direction = subject().truth.direction
    sink, ordinary = score_by_hand(SINK), score_by_hand(ORDINARY)
    assert sink > 0.4
    assert ordinary < 0.01
    transplant = iv.transplant(6, ORDINARY, clean, SINK)
    assert score_by_hand(ORDINARY, transplant) > 0.25
    assert score_by_hand(ORDINARY, iv.transplant_norm(6, ORDINARY, clean, SINK, direction)) > 0.25
    assert score_by_hand(ORDINARY, iv.swap_norm(6, ORDINARY, clean.contribution[6, SINK])) < 0.01  # the norm alone
    assert score_by_hand(ORDINARY, iv.swap_direction(6, ORDINARY, clean.contribution[6, SINK])) < 0.01
    for seed in range(20):
        control = sc.compose(transplant, iv.random_direction(6, ORDINARY, "control", seed))
        assert score_by_hand(ORDINARY, control) < 0.02


def test_the_direction_alone_is_the_sink(clean):
    direction = subject().truth.direction
    sink = score_by_hand(SINK)

    def both(make):
        return score_by_hand(SINK, *sc.window((6, 7), make))

    assert both(lambda layer: iv.keep_direction(layer, SINK, direction)) == pytest.approx(sink, abs=0.01)
    assert both(lambda layer: iv.remove_direction(layer, SINK, direction)) < 0.01
    assert both(lambda layer: iv.random_direction(layer, SINK, "control")) < 0.02
    assert both(lambda layer: iv.set_norm(layer, SINK, 0)) == pytest.approx(both(lambda layer: iv.zero(layer, SINK)))
    curve = [both(lambda layer, norm=norm: iv.set_norm(layer, SINK, norm)) for norm in (2, 5, 10, 20, 40)]
    assert curve == sorted(curve)
    ordinary = torch.ones(96, dtype=torch.bool)
    ordinary[[0, SINK, 60]] = False
    assert both(lambda layer: iv.mean_over_corpus(layer, SINK, [clean], [ordinary])) < 0.01


def test_noising_breaks_the_sink_and_denoising_restores_it(clean):
    """Clean: the secondary token at 40. Corrupted: the same text with an ordinary token there."""
    corrupted_tokens = prompt(sinks=())
    corrupted = sc.run_clean(lens(), corrupted_tokens)
    noised = score_by_hand(SINK, *sc.window((6, 7), lambda layer: iv.noising(layer, SINK, corrupted)))
    denoised = score_by_hand(
        SINK, *sc.window((6, 7), lambda layer: iv.denoising(layer, SINK, clean)), tokens=corrupted_tokens
    )
    assert score_by_hand(SINK, tokens=corrupted_tokens) < 0.01
    assert noised < 0.01
    assert denoised == pytest.approx(score_by_hand(SINK), abs=0.05)


def test_resampling_a_sink_token_from_other_sinks_leaves_the_sink(clean):
    other = sc.run_clean(lens(), prompt(sinks=(20, 70), seed_name="other"))
    edits = sc.window((6, 7), lambda layer: iv.resample(layer, SINK, clean, [clean, other], name="x"))
    assert score_by_hand(SINK, *edits) == pytest.approx(score_by_hand(SINK), abs=0.02)
    mean = sc.window((6, 7), lambda layer: iv.mean_over_same_token(layer, SINK, clean, [other]))
    assert score_by_hand(SINK, *mean) == pytest.approx(score_by_hand(SINK), abs=0.02)


@pytest.mark.parametrize("path", ["fast", "reference"])
def test_edited_runs_are_those_of_the_pass_written_by_hand(clean, path):
    direction = subject().truth.direction
    rows = [
        [iv.transplant(6, ORDINARY, clean, SINK)],
        [sc.compose(iv.transplant(6, ORDINARY, clean, SINK), iv.random_direction(6, ORDINARY, "x"))],
        list(sc.window((6, 7), lambda layer: iv.remove_direction(layer, SINK, direction))),
        list(sc.window((6, 7), lambda layer: iv.set_norm(layer, SINK, 10.0))),
    ]
    own = clean if path == "fast" else sc.run_clean(lens(), prompt(), chosen=(0, SINK, ORDINARY), path=path)
    for edits, run in zip(rows, sc.run_edited(lens(), own, rows, path=path), strict=True):
        assert run.path == path
        scores = run.columns.log_attention.exp()
        for index, pos in ((1, SINK), (2, ORDINARY)):
            ours = scores[7:14, :2, pos + 1 :, index].mean().item()
            assert ours == pytest.approx(score_by_hand(pos, *edits), abs=2e-5)


# Neurons.


def post_activations(mlp, x: torch.Tensor) -> torch.Tensor:
    seen = []
    handle = mlp.down_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    mlp(x)
    handle.remove()
    return seen[0].detach()


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_neurons_taken_out_are_those_whose_weights_are_zero(family):
    """Against the same MLP with columns of its down-projection zeroed; Gemma 3 has a norm behind it."""
    block = eager.blocks_of(eager.tiny(family))[1]
    norm = getattr(block, "post_feedforward_layernorm", torch.nn.Identity())
    x, neurons = drawn(5, eager.D_MODEL).float(), [3, 17, 40]
    with torch.no_grad():
        pre, post = block.mlp(x), post_activations(block.mlp, x)
        W_out = block.mlp.down_proj.weight.T.clone()
        block.mlp.down_proj.weight[:, neurons] = 0
        expected, contribution = norm(block.mlp(x)), norm(pre)
    part = iv.neuron_contribution(post, W_out, neurons)
    through = iv.part_through_norm(pre, part, norm).detach()
    edited = iv.without_neurons(1, range(5), through).apply(contribution.detach())
    assert close(edited, expected, 1e-5)
    naive = iv.without_neurons(1, range(5), part).apply(contribution.detach())
    assert close(naive, expected, 1e-5) == (family == "llama")


@given(seed=seeds, data=st.data())
def test_neurons_add_up(seed, data):
    post, W_out = drawn(3, 6, seed=seed), drawn(6, 4, seed=seed + 1)
    some = data.draw(st.lists(st.integers(0, 5), unique=True))
    rest = [n for n in range(6) if n not in some]
    parts = iv.neuron_contribution(post, W_out, some), iv.neuron_contribution(post, W_out, rest)
    assert close(parts[0] + parts[1], post @ W_out)
    mean = post.mean(0)
    held = post.clone()
    held[:, some] = mean[some]
    assert close(post @ W_out - iv.neuron_contribution(post, W_out, some, mean), held @ W_out)


def test_the_planted_neuron_is_the_sink(clean):
    """Neuron 0 of MLP 6 and of MLP 7 read the token and write the sink: without them there is none."""
    model = subject().hf_model
    parts = {}
    for layer in (6, 7):
        block = model.model.layers[layer]
        with torch.no_grad():
            post = post_activations(block.mlp, block.post_attention_layernorm(clean.base[layer, [SINK]]))
        parts[layer] = [
            iv.neuron_contribution(post, block.mlp.down_proj.weight.detach().T, neurons)
            for neurons in ([0], range(1, 32))
        ]
        assert close(sum(parts[layer])[0], clean.contribution[layer, SINK], 1e-5)
    first = [iv.without_neurons(6, SINK, parts[6][0]), iv.zero(7, SINK)]
    assert score_by_hand(SINK, *first) < 0.01
    others = sc.window((6, 7), lambda layer: iv.without_neurons(layer, SINK, parts[layer][1]))
    assert score_by_hand(SINK, *others) == pytest.approx(score_by_hand(SINK), abs=0.01)
