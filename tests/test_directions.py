"""Norm and direction: every edit against a forward pass by hand, and what the planted circuit says of them."""

from __future__ import annotations

import functools

import hand
import numpy as np
import pytest
import torch
from common import SINK, by_hand, lens, prompt, subject

import sink_circuits as sc
from sink_circuits.detection import primary_direction
from sink_circuits.directions import NORM_AND_DIRECTION
from sink_circuits.errors import InputError

TEXTS = sc.Tokens((prompt(), prompt((30, 55), 96, "b")), ("a", "b"))


@functools.cache
def found() -> sc.Sinks:
    return sc.find_sinks(lens(), TEXTS, verbose=False)


@functools.cache
def measured(path: str = "auto") -> sc.Effect:
    return sc.norm_and_direction(
        lens(), TEXTS, found().select("secondary"), layers=[6, 7], found=found(), path=path, verbose=False
    )


def centred_primary(clean: hand.Run, layer: int) -> torch.Tensor:
    resid = clean.residuals[layer]
    direction = resid[0] - resid.median(dim=0).values
    return direction / direction.norm()


@pytest.mark.parametrize("path", ["fast", "reference"])
def test_every_edit_is_the_one_by_hand(path):
    result = measured(path)
    assert result.data["edit"].values.tolist() == list(NORM_AND_DIRECTION)
    for index, row in result.table.iterrows():
        text = TEXTS[row.prompt]
        clean = by_hand(text)
        other = result.manifest.settings["ordinary"][index]
        assert other not in found().table.query("prompt == @row.prompt")["pos"].tolist()
        assert abs(other - row.pos) == 1

        def swap_norm(c, given):
            return c / c.norm() * given.norm()

        def of(label, layer, clean=clean, other=other):
            given, u = clean.contributions[layer, other], centred_primary(clean, layer)
            return {
                "zero": lambda c: 0 * c, "swap_norm": lambda c: swap_norm(c, given), "swap_direction": lambda c: swap_norm(given, c),
                "remove_direction": lambda c: c - (c @ u) * u, "keep_direction": lambda c: (c @ u) * u,
            }[label]  # fmt: skip

        for label in NORM_AND_DIRECTION[:-1]:
            edited = by_hand(text, {(layer, row.pos): of(label, layer) for layer in (6, 7)})
            scores = hand.sink_scores(edited.pattern)[..., row.pos]
            assert np.abs(result.data["score"].sel(sink=index, edit=label) - scores.numpy()).max() < 2e-5, label


def test_the_plant_points_along_the_primary_and_random_directions_make_no_sink():
    table = measured().by_sink()
    assert table[["prompt", "pos"]].to_numpy().tolist() == [["a", SINK], ["b", 30], ["b", 55]]
    for label in ("zero", "swap_norm", "swap_direction", "remove_direction", "random_direction"):
        assert (table[label] < -1).all(), label
    assert (table["keep_direction"].abs() < 0.2).all()
    np.testing.assert_array_equal(table["zero"], measured().over_lifetime("log_odds").sel(edit="zero"))


def test_the_random_direction_has_the_norm_and_any_sink_alone_gives_the_same():
    one = found().select("secondary")
    alone = sc.Sinks(one.table.iloc[[2]].reset_index(drop=True), one.prompts, one.manifest)
    result = sc.norm_and_direction(lens(), TEXTS, alone, layers=[6, 7], found=found(), batch_size=1, verbose=False)
    for outcome in ("score", "log_odds"):
        np.testing.assert_allclose(result.data[outcome][0], measured().data[outcome][2], atol=1e-6, rtol=1e-5)


def test_the_primary_direction_is_that_of_the_sinks_own_primary():
    """A text whose first token is no primary: the position must come from the table or from the run, not be 0."""
    clean = sc.run_clean(lens(), TEXTS["a"])
    expected = primary_direction(clean, 8, 0)
    assert torch.equal(primary_direction(clean, 8), expected)
    row = found().table.iloc[0]
    assert torch.equal(primary_direction(clean, 8, row), expected)
    moved = found().table.assign(primary_pos=5)
    assert torch.equal(primary_direction(clean, 8, moved.iloc[0]), primary_direction(clean, 8, 5))
    of_one = sc.Sinks(moved.query("prompt == 'a'"), ("a",), found().manifest)
    assert torch.equal(primary_direction(clean, 8, of_one), primary_direction(clean, 8, 5))
    with pytest.raises(InputError, match="2 primaries, of 2 prompts: pass those of this run's prompt"):
        primary_direction(clean, 8, found())
    with pytest.raises(InputError, match=f"primary = {clean.n_positions}.*at most {clean.n_positions - 1}"):
        primary_direction(clean, 8, clean.n_positions)
    no_primary = sc.run_clean(lens(), subject().tokens(40, sinks=[], decoys=[], seed_name="none")[1:])
    if not len(sc.find_sinks(lens(), no_primary.tokens, verbose=False)):
        with pytest.raises(InputError, match="no primary sink was found in this run"):
            primary_direction(no_primary, 8)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "give either layer="), ({"layer": 99}, "layer 99 is out of range"), ({"layer": 6, "speed": 1}, "option 'speed' is unknown"),
        ({"layer": 6, "attention_mask": torch.ones(1, 96)}, "leave out attention_mask and clean_cache"),
    ],
)  # fmt: skip
def test_bad_input_is_told_in_a_sentence(options, said):
    with pytest.raises(InputError, match=said):
        sc.norm_and_direction(lens(), TEXTS, found().select("secondary"), found=found(), verbose=False, **options)
