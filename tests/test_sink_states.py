"""The rule of `robust`: states, runs and phases of hand-made residual streams, and a second writing of the whole."""

from __future__ import annotations

import math

import pandas as pd
import pytest
import torch
from common import SINK, by_hand, lens, prompt, subject
from hypothesis import given, settings
from hypothesis import strategies as st
from test_planted import centred, norm_ratio

import sink_circuits as sc
from sink_circuits.clean_runs import CleanRun
from sink_circuits.detection import (
    find_primary,
    geometry_of,
    layer_runs,
    primary_direction,
    robust_rows,
    split_phases,
)
from sink_circuits.errors import InputError, ResultError

N_POS = 40
AXIS = 0  # the primary's direction


def clean_of(resid: torch.Tensor) -> CleanRun:
    """A clean run with this residual stream [layer, pos, d_model] and even attention."""
    n_layers, n_pos, _ = resid.shape
    attention = torch.ones(n_layers, 1, n_pos)
    return CleanRun(
        torch.zeros(n_pos, dtype=torch.long), resid.float(), torch.zeros_like(resid).float(), attention, attention, None,
        None, None, None, "fast",
    )  # fmt: skip


def stream(n_layers: int, shared: float = 5.0) -> torch.Tensor:
    """Ordinary tokens: a shared part along axis 1 and unit noise in the rest. Median norm about `shared` + 1."""
    generator = torch.Generator().manual_seed(n_layers)
    resid = 0.2 * torch.randn(n_layers, N_POS, 20, generator=generator)
    resid[:, :, AXIS] = 0
    resid[:, :, 1] += shared
    return resid


def put(resid: torch.Tensor, position: int, layers, size: float = 50.0) -> None:
    resid[list(layers), position, AXIS] += size


def rows_of(resid: torch.Tensor, **thresholds) -> dict[int, list[tuple[str, int, int, int]]]:
    rows: dict[int, list] = {}
    for row in robust_rows(clean_of(resid), [None] * len(resid), sc.Thresholds(**thresholds)):
        rows.setdefault(row["pos"], []).append((row["kind"], row["l_start"], row["l_end"], row["phase_start"]))
    return rows


def test_two_phases_of_the_primary():
    """The same start layer is judged by the phase it falls in."""
    resid = stream(20)
    put(resid, 0, [*range(2, 7), *range(11, 18)])
    put(resid, 10, range(2, 6))
    put(resid, 11, range(4, 7))
    put(resid, 12, range(11, 15))
    put(resid, 13, range(13, 18))
    put(resid, 14, [*range(3, 6), *range(12, 15)])  # a sink in both
    put(resid, 15, range(7, 11))  # large while the primary is not: no sink state
    put(resid, 16, range(5, 13))  # goes on through the primary's pause
    assert rows_of(resid) == {
        0: [("primary", 2, 6, 2), ("primary", 11, 17, 11)],
        10: [("primary-like", 2, 5, 2)],
        11: [("secondary", 4, 6, 2)],
        12: [("primary-like", 11, 14, 11)],
        13: [("secondary", 13, 17, 11)],
        14: [("secondary", 3, 5, 2), ("secondary", 12, 14, 11)],
        16: [("secondary", 5, 6, 2), ("primary-like", 11, 12, 11)],
    }


def test_gaps_are_bridged_up_to_the_number_given():
    resid = stream(20)
    put(resid, 0, range(1, 19))
    put(resid, 10, [4, 5, 7, 8])
    put(resid, 11, [4, 5, 8, 9])
    put(resid, 12, [4, 6, 8])
    put(resid, 13, [4, 9])
    assert rows_of(resid) == {
        0: [("primary", 1, 18, 1)], 10: [("secondary", 4, 8, 1)],
        11: [("secondary", 4, 5, 1), ("secondary", 8, 9, 1)], 12: [("secondary", 4, 8, 1)],
    }  # fmt: skip
    assert rows_of(resid, bridge=0) == {
        0: [("primary", 1, 18, 1)], 10: [("secondary", 4, 5, 1), ("secondary", 7, 8, 1)],
        11: [("secondary", 4, 5, 1), ("secondary", 8, 9, 1)],
    }  # fmt: skip
    assert rows_of(resid, bridge=2)[11] == [("secondary", 4, 9, 1)]
    assert rows_of(resid, bridge=0, min_lifetime=1)[13] == [("secondary", 4, 4, 1), ("secondary", 9, 9, 1)]


def test_a_gap_of_the_primary_inside_a_sinks_life_is_bridged_too():
    resid = stream(20)
    put(resid, 0, [1, 2, 3, 5, 6, 7])
    put(resid, 10, range(2, 8))
    assert rows_of(resid) == {0: [("primary", 1, 7, 1)], 10: [("secondary", 2, 7, 1)]}


def test_a_shared_direction_alone_makes_no_sink():
    """Where every token points the same way the raw cosine flags all of them; the centred one does not."""
    resid = stream(16, shared=200.0)
    put(resid, 0, range(2, 14), size=1000.0)
    put(resid, 10, range(5, 12), size=1000.0)
    resid[:, 0, 1] += 3000.0  # the primary also holds much of what all share
    raw = torch.cosine_similarity(resid[8], resid[8, :1], dim=-1)
    assert (raw > 0.9).float().mean() > 0.9
    resid[:, 0, 1] -= 3000.0
    assert rows_of(resid) == {0: [("primary", 2, 13, 2)], 10: [("secondary", 5, 11, 2)]}


def test_a_large_norm_elsewhere_makes_no_sink():
    resid = stream(16)
    put(resid, 0, range(2, 14))
    resid[3:12, 10, 5] += 80.0
    resid[3:12, 11, AXIS] -= 80.0  # the opposite direction is not the sink's
    assert rows_of(resid) == {0: [("primary", 2, 13, 2)]}


def test_a_small_part_along_the_primary_makes_no_sink():
    """A perfect centred cosine with a norm within the ordinary: attention does not confirm those."""
    resid = stream(16)
    put(resid, 0, range(2, 14))
    put(resid, 10, range(4, 12), size=8.0)
    assert geometry_of(clean_of(resid), 0).cosine[6, 10] > 0.98
    assert rows_of(resid) == {0: [("primary", 2, 13, 2)]}


def test_the_primary_is_the_largest_candidate_and_the_earliest_of_equals():
    resid = stream(16)
    put(resid, 1, range(2, 14), size=60.0)
    put(resid, 0, range(4, 9))
    put(resid, 7, range(2, 14), size=500.0)  # not among the first: never the primary
    assert rows_of(resid) == {
        1: [("primary", 2, 13, 2)], 0: [("secondary", 4, 8, 2)], 7: [("primary-like", 2, 13, 2)],
    }  # fmt: skip
    assert rows_of(resid, first_positions=(0,))[0] == [("primary", 4, 8, 4)]
    resid = stream(16)
    resid[:, 0] = resid[:, 2]
    put(resid, 0, range(2, 14))
    put(resid, 2, range(2, 14))
    assert rows_of(resid) == {0: [("primary", 2, 13, 2)], 2: [("primary-like", 2, 13, 2)]}


def test_only_the_first_four_positions_are_candidates():
    resid = stream(16)
    put(resid, 4, range(2, 14), size=500.0)
    assert rows_of(resid) == {}
    put(resid, 3, range(2, 14))
    assert rows_of(resid)[3] == [("primary", 2, 13, 2)]


def test_a_candidate_counts_by_the_layers_that_it_lasts():
    """Runs below min_lifetime add nothing, whatever their size; those at min_lifetime do."""
    resid = stream(16)
    put(resid, 1, [10, 11], size=5000.0)
    put(resid, 0, range(2, 6))
    assert rows_of(resid, min_lifetime=3)[0] == [("primary", 2, 5, 2)]
    assert rows_of(resid, min_lifetime=2)[1] == [("primary", 10, 11, 10)]


def test_a_flash_of_one_layer_is_no_primary():
    resid = stream(16)
    put(resid, 0, [5], size=5000.0)
    assert rows_of(resid) == {}
    assert rows_of(resid, min_lifetime=1) == {0: [("primary", 5, 5, 5)]}


def test_exactly_the_norm_threshold_is_not_above_it():
    resid = torch.zeros(6, N_POS, 4)
    resid[:, :, 1] = 1.0
    resid[:, 0, 1], resid[1:5, 0, 0] = 0.0, 2.5
    assert rows_of(resid) == {}
    resid[1:5, 0, 0] = 2.500001
    assert rows_of(resid) == {0: [("primary", 1, 4, 1)]}


def test_a_primary_that_only_touches_the_threshold_ends_before_it():
    resid = torch.zeros(8, N_POS, 4)
    resid[:, :, 1] = 1.0
    resid[:, 0, 1], resid[1:7, 0, 0] = 0.0, 40.0
    resid[5, 0, 0] = resid[6, 0, 0] = 2.5
    assert rows_of(resid) == {0: [("primary", 1, 4, 1)]}


def test_a_candidates_size_is_that_of_its_sink_layers_alone():
    ratio = torch.ones(6, 8)
    ratio[1:4, 0], ratio[4, 0] = 10.0, 2.4  # what stands behind its life is none of it
    ratio[1:4, 1], ratio[4, 1] = 10.5, 0.0
    assert find_primary(ratio, sc.Thresholds()) == 1


def test_sinks_at_the_last_layer_and_the_last_token():
    """Nothing reads the last layer's residual, few queries see the last tokens: their scores are not defined."""
    resid = stream(10)
    put(resid, 0, range(1, 10))
    put(resid, N_POS - 1, range(8, 10))
    put(resid, 9, range(8, 10))
    rows = {row["pos"]: row for row in robust_rows(clean_of(resid), [None] * 10, sc.Thresholds())}
    assert {p: (r["kind"], r["l_start"], r["l_end"]) for p, r in rows.items()} == {
        0: ("primary", 1, 9), 9: ("secondary", 8, 9), N_POS - 1: ("secondary", 8, 9),
    }  # fmt: skip
    assert math.isnan(rows[N_POS - 1]["score"])
    assert rows[9]["score"] == pytest.approx(1 / 30)  # layer 9 alone reads it; 30 later queries
    only_last = stream(10)
    put(only_last, 0, range(1, 10))
    put(only_last, 9, [9])
    row = robust_rows(clean_of(only_last), [None] * 10, sc.Thresholds(min_lifetime=1))[-1]
    assert (row["pos"], row["l_start"]) == (9, 9)
    assert math.isnan(row["score"])


def test_tokens_of_norm_zero_and_short_texts_do_no_harm():
    resid = stream(8)
    put(resid, 0, range(2, 7))
    resid[:, 20] = 0
    assert rows_of(resid) == {0: [("primary", 2, 6, 2)]}
    assert rows_of(torch.zeros(8, N_POS, 4)) == {}
    assert rows_of(stream(8)[:, :1]) == {}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_are_refused(value):
    """NaN compares as False: it would look like a text without sinks."""
    resid = stream(8)
    put(resid, 0, range(2, 7))
    resid[3, 7, 2] = value
    with pytest.raises(InputError, match="layer 3 is not finite at position 7: load the model in float32"):
        rows_of(resid)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_the_scale_of_the_residual_stream_does_not_matter(scale):
    resid = stream(16)
    put(resid, 0, range(2, 14))
    put(resid, 10, range(5, 12))
    assert rows_of(scale * resid) == rows_of(resid) == {0: [("primary", 2, 13, 2)], 10: [("secondary", 5, 11, 2)]}
    small, usual = (geometry_of(clean_of(x), 0) for x in (scale * resid, resid))
    assert (small.cosine - usual.cosine).abs().max() < 1e-5
    assert (small.norm_ratio / usual.norm_ratio - 1).abs().max() < 1e-5
    unit = primary_direction(clean_of(scale * resid), 8)
    assert unit.norm().item() == pytest.approx(1, abs=1e-5)
    assert unit[AXIS] > 0.99


def test_ordinary_tokens_that_draw_nothing_leave_no_ratio():
    resid = stream(12)
    put(resid, 0, range(2, 10))
    clean = clean_of(resid)
    clean.later[:, :, 1:] = 0
    (row,) = robust_rows(clean, [None] * 12, sc.Thresholds())
    assert row["score"] == pytest.approx(1 / (N_POS - 1))
    assert row["score_ordinary"] == 0
    assert math.isnan(row["score_ratio"])


def test_ordinary_tokens_are_those_within_the_distance_that_are_no_sinks():
    """Scores by position, so that the median tells who was asked: position / 1000, lower of two in the middle."""
    resid = stream(12)
    put(resid, 0, range(2, 10))
    put(resid, 20, range(4, 9))
    put(resid, 22, range(4, 9))
    clean = clean_of(resid)
    clean.later[:] = torch.arange(N_POS) / 1000 * torch.arange(N_POS - 1, -1, -1)
    for neighbours, near in (
        (1, [19, 21]),
        (2, [18, 19, 21]),
        (5, [15, 16, 17, 18, 19, 21, 23]),
        (30, [*range(1, 20), 21, 23]),
    ):
        rows = robust_rows(clean, [None] * 12, sc.Thresholds(neighbours=neighbours))
        row = next(r for r in rows if r["pos"] == 20)
        assert row["score"] == pytest.approx(0.02)
        assert row["score_ordinary"] == pytest.approx(sorted(near)[(len(near) - 1) // 2] / 1000)
    (*_, alone) = robust_rows(clean_of(only_neighbours()), [None] * 12, sc.Thresholds(neighbours=1))
    assert math.isnan(alone["score_ordinary"]) and math.isnan(alone["score_ratio"])


def only_neighbours() -> torch.Tensor:
    """The last token of three in a row has no neighbour that is no sink, and the text ends."""
    resid = stream(12)[:, :22]
    put(resid, 0, range(2, 10))
    for position in (20, 21):
        put(resid, position, range(4, 9))
    return resid


def test_thresholds_may_stand_at_the_ends_of_their_ranges():
    lowest = {
        "cosine": -1.0, "norm_ratio": 0.0, "min_lifetime": 1, "bridge": 0, "min_queries": 1, "neighbours": 1, "phase_fall": 1.0,
        "phase_rise": 1.0,
    }  # fmt: skip
    made = sc.Thresholds(**lowest)
    assert {name: getattr(made, name) for name in lowest} == lowest
    assert sc.Thresholds(cosine=1.0).cosine == 1
    for name, low in lowest.items():
        with pytest.raises(InputError, match=rf"threshold {name} = .* is out of range: {low}"):
            sc.Thresholds(**{name: low - 1})
    defaults = sc.Thresholds()
    assert (defaults.cosine, defaults.norm_ratio, defaults.min_lifetime, defaults.bridge) == (0.9, 2.5, 2, 1)
    assert (defaults.min_queries, defaults.neighbours, defaults.phase_fall, defaults.phase_rise) == (16, 32, 4.0, 8.0)


def test_a_phase_ends_where_the_norm_falls_and_rises_by_the_factors():
    """Peak 80; a trough below 80 / 4 for more than one layer, then more than 8 times the trough's least."""
    limits = sc.Thresholds()
    for ratios, expected in (
        ([80, 19, 18, 145], [(0, 2), (3, 3)]),
        ([80, 19, 18, 144], [(0, 3)]),  # not above 8 * 18
        ([80, 20, 20, 200], [(0, 3)]),  # not below 80 / 4
        ([80, 19, 200, 200], [(0, 3)]),  # one layer is a gap
        ([80, 19, 30, 18, 200], [(0, 4)]),  # two of one layer each
        ([80, 19, 18, 200, 300, 70, 70, 600], [(0, 2), (3, 6), (7, 7)]),  # the new phase has a peak of its own
        ([80, 100, 24, 24, 200], [(0, 3), (4, 4)]),  # the peak is the largest so far
    ):
        assert split_phases([float(x) for x in ratios], 0, len(ratios) - 1, limits) == expected
    assert split_phases([1.0, 80.0, 19.0, 18.0, 145.0, 1.0], 1, 4, limits) == [(1, 3), (4, 4)]
    assert split_phases([80.0, 19.0, 200.0], 0, 2, sc.Thresholds(bridge=0)) == [(0, 1), (2, 2)]
    assert split_phases([80.0, 45.0, 45.0, 100.0], 0, 3, sc.Thresholds(phase_fall=1.5, phase_rise=2.0)) == [
        (0, 2),
        (3, 3),
    ]


def test_saved_sinks_come_back_as_they_were(tmp_path):
    sinks = sc.find_sinks(lens(), [prompt(), prompt((), seed_name="c")], verbose=False)
    sinks.save(tmp_path / "sinks.parquet")
    again = sc.detection.Sinks.load(tmp_path / "sinks.parquet")
    assert again.table.equals(sinks.table)
    assert again.table.attrs == sinks.table.attrs == {}
    assert again.prompts == sinks.prompts == ("prompt-0", "prompt-1")
    assert again.manifest == sinks.manifest
    with pytest.raises(ResultError, match="exists"):
        sinks.save(tmp_path / "sinks.parquet")
    sinks.select("secondary").save(tmp_path / "sinks.parquet", overwrite=True)
    assert len(sc.detection.Sinks.load(tmp_path / "sinks.parquet")) == 1


def test_attention_never_decides():
    resid = stream(12)
    put(resid, 0, range(2, 10))
    put(resid, 10, range(4, 9))
    clean = clean_of(resid)
    without = robust_rows(clean, [None] * 12, sc.Thresholds())
    clean.later[:] = torch.rand(clean.later.shape, generator=torch.Generator().manual_seed(0)) * 20
    with_other = robust_rows(clean, [None] * 12, sc.Thresholds())
    evidence = ("score", "score_ordinary", "score_ratio")
    assert [{k: v for k, v in r.items() if k not in evidence} for r in without] == [
        {k: v for k, v in r.items() if k not in evidence} for r in with_other
    ]
    assert without[1]["score"] != with_other[1]["score"]


# --------------------------------------------------------------------------------------- against a second writing
def naive_runs(state: list[bool], bridge: int) -> list[tuple[int, int]]:
    """Fill every gap between two True of at most `bridge` layers, then read off what is connected."""
    filled = list(state)
    for i, here in enumerate(state):
        for j in range(i + 1, len(state)):
            if here and state[j] and not any(state[i + 1 : j]) and j - i - 1 <= bridge:
                filled[i:j] = [True] * (j - i)
    runs, start = [], None
    for i, here in enumerate([*filled, False]):
        if here and start is None:
            start = i
        if not here and start is not None:
            runs.append((start, i - 1))
            start = None
    return runs


@given(st.lists(st.booleans(), max_size=40), st.integers(0, 5))
def test_layer_runs(state, bridge):
    assert layer_runs(state, bridge) == naive_runs(state, bridge)


def naive_robust(resid: torch.Tensor, cosine: float, ratio: float, lifetime: int, bridge: int, firsts) -> dict:
    """The definitions, layer by layer and token by token, in float64."""
    resid = resid.double()
    large = norm_ratio(resid) > ratio
    n_layers, n_pos = large.shape
    sizes = {}
    for position in firsts:
        runs = [r for r in naive_runs(large[:, position].tolist(), bridge) if r[1] - r[0] + 1 >= lifetime]
        if runs:
            sizes[position] = sum(norm_ratio(resid)[a : b + 1, position].sum().item() for a, b in runs)
    if not sizes:
        return {}
    primary = max(sizes, key=sizes.get)
    x = centred(resid)
    same_way = torch.cosine_similarity(x, x[:, primary : primary + 1], dim=-1) > cosine
    phases = naive_runs(large[:, primary].tolist(), bridge)
    rows: dict[int, list] = {}
    for position in range(n_pos):
        state = [bool(same_way[i, position] and large[i, position] and large[i, primary]) for i in range(n_layers)]
        for first, last in naive_runs(state, bridge):
            if last - first + 1 >= lifetime:
                begun = next(a for a, b in phases if a <= first <= b)
                kind = "primary" if position == primary else "primary-like" if first == begun else "secondary"
                rows.setdefault(position, []).append((kind, first, last, begun))
    return rows


@settings(max_examples=150)
@given(st.data())
def test_equals_a_second_implementation(data):
    """Random lives of a few tokens, with pauses, on random ordinary ones."""
    n_layers = data.draw(st.integers(2, 16))
    resid = stream(n_layers)
    for position in data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=6, unique=True)):
        layers = data.draw(st.lists(st.integers(0, n_layers - 1), unique=True))
        put(resid, position, layers, data.draw(st.sampled_from([8.0, 30.0, 50.0, 400.0, -50.0])))
        if data.draw(st.booleans()):
            resid[layers, position, 3] += data.draw(st.sampled_from([5.0, 60.0]))
    bridge, lifetime = data.draw(st.integers(0, 3)), data.draw(st.integers(1, 4))
    firsts = data.draw(st.sampled_from([(0,), (0, 1, 2, 3), (2, 1)]))
    found_rows = rows_of(resid, bridge=bridge, min_lifetime=lifetime, first_positions=firsts)
    assert found_rows == naive_robust(resid, 0.9, 2.5, lifetime, bridge, sorted(firsts))


def test_primary_direction():
    run = by_hand(prompt())
    clean = sc.run_clean(lens(), prompt())
    for layer in (4, 12):
        centre = centred(run.residuals)[layer, 0]
        assert (primary_direction(clean, layer) - centre / centre.norm()).abs().max() < 1e-5
        raw = run.residuals[layer, 0]
        assert (primary_direction(clean, layer, raw=True) - raw / raw.norm()).abs().max() < 1e-5
        assert primary_direction(clean, layer) @ subject().truth.direction > 0.99
    with pytest.raises(InputError, match=r"a row with \['pos'\] has no primary_pos: pass a row of a sink table"):
        primary_direction(clean, 8, pd.Series({"pos": 3}))
    centre = centred(run.residuals)[8, SINK]
    assert (primary_direction(clean, 8, SINK) - centre / centre.norm()).abs().max() < 1e-5
