"""Edits: what they change and what they refuse, alone, and in the user's own run_with_hooks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from common import BACKENDS, by_hand, lens, no_forward_pass, prompt
from hypothesis import given
from hypothesis import strategies as st

import sink_circuits as sc
from sink_circuits.errors import InputError
from sink_circuits.interventions import check_factor


def rows(n: int = 3) -> torch.Tensor:
    return torch.randn(n, 5, generator=torch.Generator().manual_seed(1))


def test_named_edits_are_what_their_names_say():
    c = rows()
    assert torch.equal(sc.zero(0, (1, 2, 3)).apply(c), torch.zeros(3, 5))
    assert torch.equal(sc.rescale(0, (1, 2, 3), 2.5).apply(c), 2.5 * c)
    assert torch.equal(sc.rescale(0, (1, 2, 3), 1).apply(c), c)
    one, each = torch.arange(5.0), torch.arange(15.0).reshape(3, 5)
    assert torch.equal(sc.replace(0, (1, 2, 3), one).apply(c), one.expand(3, 5))
    assert torch.equal(sc.replace(0, (1, 2, 3), one[None]).apply(c), one.expand(3, 5))
    assert torch.equal(sc.replace(0, (1, 2, 3), each).apply(c), each)
    assert (sc.zero(4, 7).name, sc.zero(4, 7).parameter) == ("zero", 0.0)
    assert (sc.rescale(4, 7, 3).name, sc.rescale(4, 7, 3).parameter) == ("rescale", 3.0)


@given(
    n=st.integers(2, 12), first=st.integers(0, 3), data=st.data(), factor=st.floats(0, 100, width=32),
)  # fmt: skip
def test_only_the_named_rows_change_and_each_gets_its_own(n, first, data, factor):
    positions = data.draw(st.lists(st.integers(first, first + n - 1), min_size=1, unique=True))
    contributions = torch.randn(n, 5, generator=torch.Generator().manual_seed(n))
    before = contributions.clone()
    donors = torch.arange(len(positions) * 5.0).reshape(-1, 5)
    scaled = sc.rescale(0, positions, factor).written_into(contributions, first)
    replaced = sc.replace(0, positions, donors).written_into(contributions, first)
    assert torch.equal(contributions, before)  # never in place
    for row in range(n):
        if row + first in positions:
            assert torch.equal(scaled[row], before[row] * factor)
            assert torch.equal(replaced[row], donors[positions.index(row + first)])
        else:
            assert torch.equal(scaled[row], before[row])
            assert torch.equal(replaced[row], before[row])


def test_the_type_of_the_contribution_is_kept():
    c = rows().bfloat16()
    edit = sc.Edit(0, (0, 1, 2), lambda x: x.double() * 2)
    assert edit.apply(c).dtype == torch.bfloat16
    assert torch.equal(edit.apply(c), c * 2)
    assert sc.replace(0, (0, 1, 2), torch.ones(5)).apply(c).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "position", [7, np.int64(7), torch.tensor(7), [7], (np.int64(7),), torch.tensor([7]), np.array([7])]
)
def test_positions_may_be_given_in_any_integer_form(position):
    for edit in (sc.zero(3, position), sc.rescale(3, position, 2.0), sc.replace(3, position, torch.ones(4))):
        assert edit.positions == (7,)
        assert type(edit.positions[0]) is int
    assert type(sc.zero(np.int64(3), 7).layer) is int


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sc.zero(3, []), r"'zero' of layer 3 names no positions: give at least one"),
        (lambda: sc.zero(3, (5, 5)), r"names a position twice: \(5, 5\)"),
        (lambda: sc.zero(3, (-1, 5)), r"position -1 is negative: count from the first token"),
        (lambda: sc.zero(-2, 5), r"layer -2 is negative"),
        (lambda: sc.zero(3, 5.5), r"5\.5.*whole numbers"),
        (lambda: sc.zero(2.5, 5), r"2\.5.*whole number"),
        (lambda: sc.rescale(3, 5, -1), r"factor -1 is not allowed.*at least 0"),
        (lambda: sc.rescale(3, 5, math.nan), r"factor nan is not allowed.*finite"),
        (lambda: sc.rescale(3, 5, math.inf), r"factor inf is not allowed.*finite"),
        (lambda: sc.rescale(3, 5, "much"), r"factor 'much' is not a number"),
        (lambda: sc.replace(3, (5, 6, 7), torch.ones(2, 4)), r"2 donor rows for 3 positions"),
    ],
)
def test_impossible_edits_are_refused_when_made(make, message):
    with no_forward_pass(), pytest.raises(InputError, match=message):
        make()


@given(st.floats(allow_nan=True, allow_infinity=True))
def test_factors_are_finite_and_not_negative(factor):
    if math.isfinite(factor) and factor >= 0:
        assert check_factor(factor) == factor
    else:
        with pytest.raises(InputError, match="factor"):
            check_factor(factor)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda c: c[:1], r"'mine' returned \(1, 5\) for a contribution of shape \(3, 5\): return the same shape"),
        (lambda c: c.sum(), r"returned \(\)"),
        (lambda c: None, r"returned NoneType"),
        (lambda c: c / 0, r"'mine' of layer 2 returned NaN or infinite values"),
        (lambda c: c * 1j, r"'mine' of layer 2 returned complex values: return real ones"),
        (lambda c: c * math.nan, r"NaN or infinite"),
        (lambda c: c.where(c.abs() < c.abs().max(), math.inf), r"NaN or infinite"),
        (lambda c: c * 0 + 1e30, r"'mine' of layer 2 made a contribution too long to square"),
        # each square is finite, and so is the sum over three positions: a norm is over d_model
        (lambda c: c * 0 + 9e18, r"'mine' of layer 2 made a contribution too long to square"),
    ],
)
def test_broken_functions_of_the_user_are_refused(function, message):
    with pytest.raises(InputError, match=message):
        sc.Edit(2, (0, 1, 2), function, "mine").apply(rows())


@pytest.mark.parametrize("backend", BACKENDS)
def test_hooks_in_the_users_own_run_do_what_the_edit_does(backend):
    model, tokens = lens(backend), prompt()
    edits = [sc.rescale(6, (40, 50), 0.5), sc.zero(7, 40)]
    seen = {}

    def keep(value, hook, layer):
        seen[layer] = value.detach().clone()

    hooks = [pair for edit in edits for pair in edit.hooks(model)]
    hooks += [
        (f"blocks.{layer}.hook_resid_post", lambda v, hook, layer=layer: keep(v, hook, layer)) for layer in range(24)
    ]
    with torch.no_grad():
        model.run_with_hooks(torch.stack([tokens, tokens]), fwd_hooks=hooks)
    expected = by_hand(tokens, {(6, 40): 0.5, (6, 50): 0.5, (7, 40): 0.0}).residuals
    found = torch.stack([seen[layer] for layer in range(24)], dim=1)
    for row in (0, 1):
        assert (found[row] - expected).abs().max() < 1e-3
    clean = sc.run_clean(model, tokens, chosen=(0, 40, 50, 95))
    ours = sc.run_edited(model, clean, [edits])[0].resid_post_chosen
    assert (found[0][:, [0, 40, 50, 95]] - ours).abs().max() < 1e-3


def test_hooks_name_layers_and_positions_that_are_not_there():
    model = lens()
    sc.adapt(model)
    with no_forward_pass(), pytest.raises(InputError, match=r"layer 24 is out of range: the model has layers 0\.\.23"):
        sc.zero(24, 3).hooks(model)
    with (
        torch.no_grad(),
        pytest.raises(InputError, match=r"position 96 is out of range: the text has positions 0\.\.95"),
    ):
        model.run_with_hooks(prompt()[None], fwd_hooks=sc.zero(3, 96).hooks(model))
