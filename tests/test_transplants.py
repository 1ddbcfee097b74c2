"""Sufficiency: transplants against a forward pass by hand; on the planted circuit they make sinks and random directions none."""

from __future__ import annotations

import functools

import hand
import numpy as np
import pytest
import torch
from common import by_hand, lens, prompt, subject

import sink_circuits as sc
from sink_circuits.errors import InputError
from sink_circuits.transplants import EDITS

TEXTS = sc.Tokens((prompt(), prompt((30, 55), 96, "b")), ("a", "b"))


@functools.cache
def found() -> sc.Sinks:
    return sc.find_sinks(lens(), TEXTS, verbose=False)


@functools.cache
def measured(path: str = "auto") -> sc.Effect:
    return sc.sufficiency(
        lens(), TEXTS, found().select("secondary"), layers=[6, 7], found=found(), n_random=3, path=path, verbose=False
    )


@pytest.mark.parametrize("path", ["fast", "reference"])
def test_every_edit_is_the_one_by_hand(path):
    result = measured(path)
    assert result.data["edit"].values.tolist()[:2] == list(EDITS)
    for index, row in result.table.iterrows():
        clean = by_hand(TEXTS[row.prompt])
        assert abs(row.pos - row.donor_pos) == 1 and row.kind == "same range"  # the same token is a sink everywhere
        token = int(TEXTS.ids[TEXTS.names.index(row.prompt)][row.pos])
        assert (row.token_id, row.token) == (token, f"<{token}>")  # of the treated token, not of the donor's

        def of(label, layer, clean=clean, row=row):
            donor, resid = clean.contributions[layer, row.donor_pos], clean.residuals[layer]
            direction = resid[0] - resid.median(dim=0).values
            return lambda c: donor if label == "transplant" else donor.norm() * direction / direction.norm()

        for label in EDITS:
            edited = by_hand(TEXTS[row.prompt], {(layer, row.pos): of(label, layer) for layer in (6, 7)})
            scores = hand.sink_scores(edited.pattern)[..., row.pos]
            assert np.abs(result.data["score"].sel(sink=index, edit=label) - scores.numpy()).max() < 2e-5, label


def test_a_transplanted_write_makes_a_sink_that_lasts_and_random_directions_none():
    planted = subject().truth.sink("secondary")
    result = measured()
    lifetime = result.over_lifetime("lifetime", "edited").to_pandas()
    assert (result.over_lifetime("lifetime", "clean") == 0).all()
    assert (lifetime[list(EDITS)] >= planted.l_end - planted.l_start + 1).all(axis=None)
    drawn = [name for name in lifetime if name.startswith("random_direction")]
    assert len(drawn) == 3 and (lifetime[drawn] == 0).all(axis=None)
    change = result.over_lifetime("log_odds").to_pandas()
    assert (change["transplant"] > 3).all()
    assert (change[drawn].lt(change["transplant"] - 2, axis=0)).all(axis=None)
    assert "sufficiency" in repr(result) and result.plot("score") is not None


def test_a_wrong_layers_write_makes_no_sink():
    result = sc.sufficiency(lens(), TEXTS, found().select("secondary"), layer=9, found=found(), verbose=False)
    assert (result.over_lifetime("lifetime", "edited").sel(edit="transplant") == 0).all()


def test_where_it_is_written_may_be_given(tmp_path):
    secondary = found().select("secondary")
    onto = [int(pos) + 5 for pos in secondary.table["pos"]]
    result = sc.sufficiency(lens(), TEXTS, secondary, layer=6, onto=onto, found=found(), verbose=False)
    assert result.table["pos"].tolist() == onto and set(result.table["kind"]) == {"given"}
    assert result.table["donor_pos"].tolist() == secondary.table["pos"].tolist()
    result.save(tmp_path / "s.safetensors")
    assert sc.Effect.load(tmp_path / "s.safetensors").table["donor_pos"].tolist() == result.table["donor_pos"].tolist()


def test_a_token_of_the_same_id_is_taken_before_one_nearby():
    from sink_circuits.matching import match_positions
    from sink_circuits.transplants import stand_ins

    matches = match_positions(lens(), TEXTS, found().select("secondary"), found())
    same, nearby = matches["control"] == "same token", matches["control"] == "same range"
    matches.loc[same & (matches["sink"] == 1), "pos"] = 70
    matches.loc[nearby & (matches["sink"] == 2), "pos"] = -1
    chosen = stand_ins(matches)
    assert chosen["control"].tolist()[:2] == ["same range", "same token"]
    assert chosen.loc[1, "pos"] == 70 and chosen.loc[2, "pos"] == -1


def test_random_directions_depend_on_names_alone():
    one = found().select("secondary")
    row = sc.Sinks(one.table.iloc[[2]].reset_index(drop=True), one.prompts, one.manifest)
    options = {"layers": [6, 7], "found": found(), "n_random": 2, "batch_size": 1, "verbose": False}
    alone, together = sc.sufficiency(lens(), TEXTS, row, **options), sc.sufficiency(lens(), TEXTS, one, **options)
    torch.testing.assert_close(
        torch.tensor(alone.data["log_odds"].values[0]), torch.tensor(together.data["log_odds"].values[2]), rtol=0, atol=0,
        equal_nan=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"layer": 6, "onto": [41]}, "onto names 1 positions for 3 sinks"),
        ({"layer": 6, "onto": [41, 55, 31]}, "position 55 of prompt 'b' is a sink itself"),
        ({"layer": 6, "onto": [41, 96, 31]}, "position = 96: at most 95"), ({"layer": 6, "n_random": -1}, "n_random = -1"),
        ({"layer": 6, "attention_mask": torch.ones(2, 96)}, "texts of their own length"), ({}, "give either layer="),
    ],
)  # fmt: skip
def test_bad_input_is_told_in_a_sentence(options, said):
    with pytest.raises(InputError, match=said):
        sc.sufficiency(lens(), TEXTS, found().select("secondary"), found=found(), verbose=False, **options)
