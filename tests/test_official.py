"""The published procedure against hand-made hidden states, and against a second implementation of its description."""

from __future__ import annotations

import math

import pytest
import torch
from common import BACKENDS, REAL, SINK, by_hand, lens, no_forward_pass, prompt, real, subject
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import sink_circuits as sc
from sink_circuits.detection import official, official_hidden_states, official_type
from sink_circuits.errors import InputError


def naive(
    hidden: list[list[list[float]]], first_positions
) -> tuple[int, int, int, dict[int, list[int]], dict[int, str]]:
    """Steps 1 to 4 in plain Python, from their description alone."""
    n_layers, n_positions = len(hidden), len(hidden[0])

    def norm(vector):
        return math.sqrt(sum(x * x for x in vector))

    candidates = [p for p in first_positions if p < n_positions]
    bos = candidates[0]
    for p in candidates[1:]:
        if sum(norm(h[p]) for h in hidden) > sum(norm(h[bos]) for h in hidden):
            bos = p
    rise = [norm(hidden[i + 1][bos]) - norm(hidden[i][bos]) for i in range(n_layers - 1)]
    start = rise.index(max(rise)) + 1
    end = start + 1 + rise[start:].index(min(rise[start:])) if rise[start:] else start + 1
    layers: dict[int, list[int]] = {}
    for layer in range(start, end):
        for t in range(bos + 1, n_positions):
            a, b = hidden[layer][t], hidden[layer][bos]
            size = norm(a) * norm(b)
            if size and abs(sum(x * y for x, y in zip(a, b, strict=True))) / size > 0.9:
                layers.setdefault(t, []).append(layer)
    kinds = {}
    for t, found in layers.items():
        n = len(found)
        kinds[t] = "secondary" if 4 < n < n_layers - 15 else "bos_sink" if n >= n_layers - 15 else "noise"
    return bos, start, end - 1, layers, kinds


def as_tuple(found):
    return found.bos, found.first_layer, found.last_layer, found.layers, found.sink_type


@settings(max_examples=200)
@given(st.data())
def test_equals_a_second_implementation(data):
    n_layers = data.draw(st.integers(2, 30))
    n_positions = data.draw(st.integers(1, 8))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    hidden = torch.randn(n_layers, n_positions, 3, generator=generator, dtype=torch.float64)
    hidden = hidden + 2 * torch.randn(1, n_positions, 3, generator=generator)  # directions that last over layers
    size = torch.rand(n_layers, n_positions, 1, generator=generator) * 10
    hidden = (hidden * size).float()
    first_positions = data.draw(st.sampled_from([(0, 1), (0, 1, 2), (0,), (2, 0)]))
    expected = naive(hidden.double().tolist(), first_positions)
    cosines = torch.cosine_similarity(hidden.double(), hidden.double()[:, expected[0]][:, None], dim=-1).abs()
    assume(not ((cosines - 0.9).abs() < 1e-6).any())  # float32 may fall on the other side
    assert as_tuple(official(hidden, first_positions)) == expected


def states(n_layers: int, n_positions: int, bos_norms, *, bos: int = 0) -> torch.Tensor:
    """Every token points elsewhere (an axis of its own) with norm 1; the BOS sink has the given norms."""
    hidden = torch.zeros(n_layers, n_positions, n_positions + 1)
    for position in range(n_positions):
        hidden[:, position, position + 1] = 1.0
    hidden[:, bos] = 0
    hidden[:, bos, 0] = torch.tensor([float(x) for x in bos_norms])
    return hidden


def turn(hidden: torch.Tensor, position: int, layers, sign: float = 1.0, bos: int = 0) -> None:
    for layer in layers:
        hidden[layer, position] = sign * 3 * hidden[layer, bos] / hidden[layer, bos].norm()


RISE_AND_FALL = [1, 1, 50, *[50] * 18, 1, 1, 1]  # 24 layers: up at 2, down at 21


def test_looks_from_the_greatest_rise_to_the_greatest_fall():
    hidden = states(24, 6, RISE_AND_FALL)
    turn(hidden, 3, range(24))
    found = official(hidden)
    assert (found.bos, found.first_layer, found.last_layer) == (0, 2, 20)
    assert found.layers == {3: list(range(2, 21))}


@pytest.mark.parametrize(
    ("n", "kind"),
    [
        (1, "noise"),
        (4, "noise"),
        (5, "secondary"),
        (8, "secondary"),
        (9, "bos_sink"),
        (10, "bos_sink"),
        (19, "bos_sink"),
    ],
)
def test_types_at_their_boundaries(n, kind):
    """L = 24: secondary for 4 < n < 9."""
    hidden = states(24, 6, RISE_AND_FALL)
    turn(hidden, 4, range(2, 2 + n))
    assert official(hidden).sink_type == {4: kind}


@given(n_layers=st.integers(2, 60), n=st.integers(1, 60))
def test_types_by_their_inequalities(n_layers, n):
    kind = official_type(n, n_layers)
    assert (kind == "secondary") == (4 < n < n_layers - 15)
    assert (kind == "bos_sink") == (n >= n_layers - 15 and not 4 < n < n_layers - 15)
    if n_layers <= 20:
        assert kind != "secondary"


@pytest.mark.parametrize(("n_layers", "possible"), [(18, False), (20, False), (21, True)])
def test_up_to_twenty_layers_nothing_is_secondary(n_layers, possible):
    kinds = set()
    for n in range(1, n_layers - 3):
        hidden = states(n_layers, 4, [1, 50, *[50] * (n_layers - 3), 1])
        turn(hidden, 2, range(1, 1 + n))
        kinds |= set(official(hidden).sink_type.values())
    assert ("secondary" in kinds) == possible
    assert "bos_sink" in kinds


def test_the_greatest_rise_at_the_last_layer_looks_at_that_layer_alone():
    hidden = states(6, 4, [1, 2, 3, 4, 5, 90])
    turn(hidden, 2, range(6))
    found = official(hidden)
    assert (found.first_layer, found.last_layer) == (5, 5)
    assert found.layers == {2: [5]}


def test_without_a_rise_the_smallest_fall_counts_as_one():
    hidden = states(6, 4, [60, 50, 30, 29, 20, 18])  # falls of 10, 20, 1, 9, 2: the greatest "rise" is -1, into layer 3
    turn(hidden, 2, range(6))
    found = official(hidden)
    assert (found.first_layer, found.last_layer) == (3, 3)  # then -9 is the least: layer 4 is the end


def test_a_constant_norm_takes_the_first_of_equals():
    hidden = states(5, 4, [7, 7, 7, 7, 7])
    found = official(hidden)
    assert (found.first_layer, found.last_layer) == (1, 1)


def test_equal_rises_and_falls_take_the_first():
    found = official(states(8, 4, [1, 11, 1, 11, 1, 11, 1, 11]))
    assert (found.first_layer, found.last_layer) == (1, 1)


def test_bos_is_the_candidate_of_largest_mean_norm_and_the_first_of_equals():
    hidden = states(24, 6, RISE_AND_FALL, bos=1)
    turn(hidden, 0, range(24), bos=1)  # before the BOS sink: never looked at
    turn(hidden, 3, range(2, 8), bos=1)
    found = official(hidden)
    assert found.bos == 1
    assert found.layers == {3: [2, 3, 4, 5, 6, 7]}
    hidden[:, 2] = 100.0
    assert official(hidden).bos == 1
    assert official(hidden, (0, 1, 2)).bos == 2
    equal = states(24, 6, RISE_AND_FALL)
    equal[:, 1] = equal[:, 0]
    assert official(equal).bos == 0


def test_gaps_are_counted_out_not_bridged():
    hidden = states(24, 6, RISE_AND_FALL)
    layers = [2, 3, 5, 8, 12, 20]
    turn(hidden, 5, layers)
    found = official(hidden)
    assert found.layers == {5: layers}
    assert found.sink_type == {5: "secondary"}


def test_the_opposite_direction_counts_too():
    hidden = states(24, 6, RISE_AND_FALL)
    turn(hidden, 5, range(3, 9), sign=-1.0)
    assert official(hidden).layers == {5: list(range(3, 9))}


def test_exactly_the_threshold_is_not_above_it():
    """(9, 4, 1, 1, 1) has norm 10 and cosine 0.9 with the first axis, without any rounding."""
    hidden = states(6, 4, [1, 50, 50, 50, 1, 1])
    hidden[:, 2] = torch.tensor([9.0, 4.0, 1.0, 1.0, 1.0])
    assert official(hidden).layers == {}
    hidden[:, 2] = torch.tensor([9.001, 4.0, 1.0, 1.0, 1.0])
    assert official(hidden).layers == {2: [1, 2, 3]}


def test_one_position_alone_has_no_sinks():
    assert official(states(6, 1, [1, 50, 50, 50, 1, 1])).layers == {}


@pytest.mark.parametrize(
    ("shape", "first_positions", "message"),
    [
        ((1, 4, 3), (0, 1), r"shape \(1, 4, 3\): .*\[layer >= 2"),
        ((4, 3), (0, 1), r"shape \(4, 3\)"),
        ((4, 2, 3), (2, 5), r"no candidate first position \(2, 5\) lies in a text of 2 tokens"),
    ],
)
def test_what_it_cannot_read_is_refused(shape, first_positions, message):
    with pytest.raises(InputError, match=message):
        official(torch.ones(shape), first_positions)


def test_hidden_states_that_are_not_numbers_are_refused():
    hidden = states(6, 4, [1, 50, 50, 50, 1, 1])
    hidden[3, 2, 0] = math.inf
    with pytest.raises(InputError, match="layer 3.*float32"):
        official(hidden)


@pytest.mark.parametrize("backend", BACKENDS)
def test_planted_sinks_are_found(backend):
    """Positive case of 24 layers; the last entry is after the final norm, as in Hugging Face's hidden_states."""
    tokens = prompt((30, 55), seed_name="b")
    run = by_hand(tokens)
    expected = naive(run.residuals.tolist(), (0, 1))  # the greatest fall is at layer 21: the final norm plays no part
    table = sc.find_sinks(lens(backend), tokens, method="official", verbose=False).table
    assert expected[:3] == (0, 2, 20)
    assert expected[4] == {30: "secondary", 55: "secondary"}
    assert dict(zip(table.pos, table.kind, strict=True)) == expected[4]
    assert table.l_start.tolist() == [6, 6]
    assert table.l_end.tolist() == [12, 12]
    assert table.lifetime.tolist() == [7, 7]
    assert table.primary_pos.tolist() == [0, 0]
    assert table.phase_start.tolist() == [2, 2]
    norm = run.residuals.norm(dim=-1)[6:13, [30, 55]].max(0).values
    assert table.norm.to_numpy() == pytest.approx(norm.numpy(), rel=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_last_hidden_state_is_after_the_final_norm(backend):
    model, tokens = lens(backend), prompt()
    expected = torch.stack(subject().hf_model(tokens[None], output_hidden_states=True).hidden_states[1:])[:, 0]
    found = official_hidden_states(model, sc.run_clean(model, tokens))
    assert (found - expected).abs().max() < 1e-3
    assert (found[-1] - sc.run_clean(model, tokens).resid_post(23)).abs().max() > 1  # not the residual


def test_only_the_primarys_greatest_rise_is_looked_at():
    """A known blind spot: sinks of an earlier, smaller phase are not found."""
    hidden = states(24, 6, [1, 30, *[30] * 6, 1, 1, 1, 90, *[90] * 10, 1, 1])
    turn(hidden, 3, range(1, 8))
    assert official(hidden).layers == {}


def test_first_positions_can_be_given_and_processed_weights_are_refused():
    tokens = prompt()
    table = sc.find_sinks(lens(), tokens, method="official", first_positions=(SINK,), verbose=False).table
    assert set(table.primary_pos) <= {SINK}
    assert (table.pos > SINK).all()
    processed = subject().bridge()
    processed.enable_compatibility_mode(disable_warnings=True)
    sc.adapt(processed)
    with no_forward_pass(), pytest.raises(InputError, match="weights were processed.*load it without"):
        sc.find_sinks(processed, tokens, method="official")


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", REAL)
def test_real_models_give_what_the_description_gives_on_hugging_faces_hidden_states(name):
    model, plain, tokens = real(name)
    table = sc.find_sinks(model, tokens[:2], method="official", verbose=False).table
    n_found = 0
    for text in (0, 1):
        hidden = torch.stack(plain(tokens[text][None], output_hidden_states=True).hidden_states[1:])[:, 0]
        bos, first, _, layers, kinds = naive(hidden.double().tolist(), (0, 1))
        own = table[table.prompt == tokens.names[text]].set_index("pos")
        assert dict(own.kind) == kinds
        assert {p: (r.l_start, r.l_end, r.lifetime) for p, r in own.iterrows()} == {
            p: (found[0], found[-1], len(found)) for p, found in layers.items()
        }
        if len(own):
            assert set(own.primary_pos) == {bos}
            assert set(own.phase_start) == {first}
        n_found += len(own)
    assert n_found > 0 or name == "smollm2-135m"  # looks at the second phase only, where it has no secondary sinks
