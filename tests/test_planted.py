"""The minimal planted model holds what it says, measured by a forward pass written by hand (`hand.py`) and by nothing else.

Each `fact_*` asserts one planted fact with numbers written here, not taken from `Planted.truth`. With the part that
carries it left out, the fact must fail; where no other part depends on it, the other facts must survive. Random plants
are in `test_random_plants.py`.
"""

from __future__ import annotations

import functools
import importlib.util

import hand
import pytest
import torch
from torch import Tensor

from sink_circuits import planted
from sink_circuits.errors import InputError

torch.set_num_threads(1)

SINK, DECOY = 40, 60  # positions in the default prompt
SINK_HEADS = [0, 1]
PRIMARY_LAYERS, SECONDARY_LAYERS = list(range(2, 21)), list(range(6, 13))
ALL_LAYERS = list(range(24))
PARTS = ["primary", "secondary", "stand_in", "decoy", "shared", "eraser"]
HAS_HOOKED = importlib.util.find_spec("transformer_lens.HookedTransformer") is not None


@functools.cache
def model(*without: str) -> planted.Planted:
    return planted.minimal(without)


def run(subject: planted.Planted, edits: dict | None = None, **prompt) -> hand.Run:
    return hand.forward(subject.hf_model.state_dict(), subject.hf_model.config, subject.tokens(**prompt), edits)


def ordinary(tokens: Tensor) -> Tensor:
    return (tokens > 2).nonzero().flatten()


def centred(residuals: Tensor) -> Tensor:
    return residuals - residuals.median(dim=1, keepdim=True).values


def cosine_with_primary(residuals: Tensor) -> Tensor:
    """Centred cosine with position 0 [layer, pos]."""
    x = centred(residuals)
    return torch.cosine_similarity(x, x[:, :1], dim=-1)


def norm_ratio(residuals: Tensor) -> Tensor:
    """Raw norm over the layer's median raw norm [layer, pos]."""
    norm = residuals.norm(dim=-1)
    return norm / norm.median(dim=1, keepdim=True).values


def in_sink_state(residuals: Tensor, cosine: float = 0.9, ratio: float = 2.5) -> Tensor:
    return (cosine_with_primary(residuals) > cosine) & (norm_ratio(residuals) > ratio)


def layers_of(state: Tensor) -> list[int]:
    return state.nonzero().flatten().tolist()


def score(result: hand.Run) -> Tensor:
    """Sink score averaged over the sink heads [layer, pos]."""
    return hand.sink_scores(result.pattern)[:, SINK_HEADS].mean(1)


def official(residuals: Tensor) -> tuple[int, dict[int, tuple[str, list[int]]]]:
    """The published procedure on resid_post: the BOS sink's position, and label and layers of each flagged position."""
    n_layers, n_pos = residuals.shape[:2]
    norm = residuals.norm(dim=-1)
    bos = int(norm[:, :2].mean(0).argmax())
    rise = norm[1:, bos] - norm[:-1, bos]
    start = int(rise.argmax()) + 1
    end = start + 1 + int(rise[start:].argmin())
    raw = torch.cosine_similarity(residuals, residuals[:, bos : bos + 1], dim=-1).abs()
    flagged = {}
    for pos in range(bos + 1, n_pos):
        layers = [layer for layer in range(start, end) if raw[layer, pos] > 0.9]
        n = len(layers)
        if n:
            label = "secondary" if 4 < n < n_layers - 15 else "bos_sink" if n >= n_layers - 15 else "noise"
            flagged[pos] = (label, layers)
    return bos, flagged


def fact_primary(subject: planted.Planted) -> None:
    """BOS is in sink state after blocks 2..20 (wide margin both ways) and draws most attention one block later."""
    result = run(subject)
    ratio, bos_score = norm_ratio(result.residuals)[:, 0], score(result)[:, 0]
    others = [layer for layer in ALL_LAYERS if layer not in PRIMARY_LAYERS]
    assert ratio[PRIMARY_LAYERS].min() > 5
    assert ratio[others].max() < 2
    assert official(result.residuals)[0] == 0
    drawn = [layer + 1 for layer in PRIMARY_LAYERS]
    assert bos_score[drawn].min() > 0.5
    assert bos_score[[layer for layer in ALL_LAYERS if layer not in drawn]].max() < 0.1


def fact_primary_needs_mlp_2(subject: planted.Planted) -> None:
    cut = run(subject, {(2, 0): 0.0})
    assert score(run(subject))[3:22, 0].min() > 0.5
    assert score(cut)[:, 0].max() < 0.1
    assert norm_ratio(cut.residuals)[:, 0].max() < 2


def fact_secondary(subject: planted.Planted) -> None:
    """The secondary token is in sink state after blocks 6..12 and no other; scores follow; official says so too."""
    result = run(subject)
    cosine, ratio = cosine_with_primary(result.residuals)[:, SINK], norm_ratio(result.residuals)[:, SINK]
    others = [layer for layer in ALL_LAYERS if layer not in SECONDARY_LAYERS]
    assert cosine[SECONDARY_LAYERS].min() > 0.98
    assert ratio[SECONDARY_LAYERS].min() > 3.5
    assert cosine[others].abs().max() < 0.5
    assert ratio[others].max() < 2
    assert layers_of(in_sink_state(result.residuals)[:, SINK]) == SECONDARY_LAYERS
    assert official(result.residuals) == (0, {SINK: ("secondary", SECONDARY_LAYERS)})
    drawn = [layer + 1 for layer in SECONDARY_LAYERS]
    typical = score(result)[:, ordinary(subject.tokens())].nanmedian(1).values
    assert (score(result)[:, SINK] / typical)[drawn].min() > 10
    assert (score(result)[:, SINK] / score(result)[:, 0])[drawn].max() < 1
    assert (score(result)[:, SINK] / typical)[[layer for layer in ALL_LAYERS if layer not in drawn]].max() < 3


def fact_secondary_weakens_primary(subject: planted.Planted) -> None:
    both, alone = score(run(subject))[7:14, 0], score(run(subject, sinks=()))[7:14, 0]
    assert both.min() > 0.5
    assert (both < 0.9 * alone).all()


def fact_stand_in(subject: planted.Planted) -> None:
    """MLPs 6 and 7 both write; either alone makes the sink; without both there is none, and nothing to erase."""
    direction = subject.truth.direction.double()
    clean = run(subject)
    no_6, no_7 = run(subject, {(6, SINK): 0.0}), run(subject, {(7, SINK): 0.0})
    neither = run(subject, {(6, SINK): 0.0, (7, SINK): 0.0})
    assert (clean.contributions[[6, 7], SINK] @ direction).min() > 5
    assert layers_of(in_sink_state(no_6.residuals)[:, SINK]) == SECONDARY_LAYERS[1:]
    assert layers_of(in_sink_state(no_7.residuals)[:, SINK]) == SECONDARY_LAYERS
    assert not in_sink_state(neither.residuals, cosine=0.5, ratio=1.5)[:, SINK].any()
    assert score(no_6)[8:14, SINK].min() > 0.8 * score(clean)[8:14, SINK].min()
    assert score(no_7)[7:14, SINK].min() > 0.8 * score(clean)[7:14, SINK].min()
    assert score(neither)[7:14, SINK].max() < 0.05 * score(clean)[7:14, SINK].min()
    assert neither.contributions[13, SINK].norm() < 1


def fact_dose(subject: planted.Planted) -> None:
    """More of MLPs 6 and 7 together is more attention, saturating; the eraser takes away what there is."""
    factors = [0.0, 0.1, 0.25, 0.5, 1.0, 2.0]
    runs = [run(subject, {(6, SINK): factor, (7, SINK): factor}) for factor in factors]
    odds = torch.stack([hand.log_odds(r.pattern)[8:14, SINK_HEADS, SINK].mean(1) for r in runs])  # [dose, layer]
    step = odds.diff(dim=0)
    assert (step > 0).all()
    assert (step[0] > 10 * step[-1]).all()
    left = torch.stack([r.residuals[13, SINK] @ subject.truth.direction.double() for r in runs])
    assert left.abs().max() < 3


def fact_decoy(subject: planted.Planted) -> None:
    """After block 4 the decoy is as large as the secondary sink, points elsewhere, and draws nothing extra."""
    result = run(subject)
    ratio, cosine = norm_ratio(result.residuals)[:, DECOY], cosine_with_primary(result.residuals)[:, DECOY]
    assert ratio[:4].max() < 2
    assert ratio[4:].min() > 3.5
    assert cosine.abs().max() < 0.2
    assert abs(float(result.residuals[4, DECOY] @ subject.truth.direction.double())) < 1e-3
    typical = score(result)[:, [DECOY - 1, DECOY + 1]].mean(1)  # neighbours: as many later queries
    assert (score(result)[:, DECOY] / typical - 1).abs().max() < 0.5


def fact_shared(subject: planted.Planted) -> None:
    """Raw cosines between different ordinary tokens exceed 0.9, centred ones are noise; sinks draw attention."""
    result, tokens = run(subject), subject.tokens()
    positions = ordinary(tokens)
    different = tokens[positions][:, None] != tokens[positions]
    for residuals, low, high in ((result.residuals, 0.9, 1.0), (centred(result.residuals), -0.6, 0.6)):
        unit = torch.nn.functional.normalize(residuals[:, positions], dim=-1)
        cosines = (unit @ unit.mT)[:, different]
        assert cosines.min() > low
        assert cosines.max() < high
    assert score(result)[3:22, 0].min() > 0.5


def fact_eraser(subject: planted.Planted) -> None:
    """MLPs 13 and 21 end the two sinks, and only at tokens that are sinks."""
    direction = subject.truth.direction.double()
    result = run(subject)
    assert (result.residuals[12, SINK] @ direction) > 30
    assert (result.residuals[13:, SINK] @ direction).abs().max() < 1
    assert (result.residuals[20, 0] @ direction) > 60
    assert (result.residuals[21:, 0] @ direction).abs().max() < 1
    others = ordinary(subject.tokens())
    assert (result.contributions[[13, 21]][:, others] @ direction).abs().max() < 1e-3
    assert result.contributions[13, 0].norm() < 0.1


FACTS = {name.removeprefix("fact_"): fact for name, fact in globals().items() if name.startswith("fact_")}
# The facts that each part carries: with the part left out these must fail and all others must hold.
CARRIED = {
    "primary": {"primary", "primary_needs_mlp_2", "secondary", "secondary_weakens_primary", "stand_in", "shared",
                "eraser"},
    "secondary": {"secondary", "secondary_weakens_primary", "stand_in", "dose", "eraser"},
    "stand_in": {"stand_in"},
    "decoy": {"decoy"},
    "shared": {"primary", "primary_needs_mlp_2", "secondary", "secondary_weakens_primary", "stand_in", "dose",
               "shared"},
    "eraser": {"primary", "secondary", "stand_in", "dose", "eraser"},
}  # fmt: skip


@pytest.mark.parametrize("name", FACTS)
def test_fact_holds(name):
    FACTS[name](model())


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", FACTS)
def test_fact_fails_exactly_without_its_part(name, part):
    if name in CARRIED[part]:
        with pytest.raises(AssertionError):
            FACTS[name](model(part))
    else:
        FACTS[name](model(part))


def test_without_each_part_the_opposite_is_seen():
    """Not just any failure: what each absence must look like."""
    no_primary, no_secondary = run(model("primary")), run(model("secondary"))
    assert norm_ratio(no_primary.residuals)[:, 0].max() < 2
    assert score(no_primary)[:, 0].max() < 0.1
    assert norm_ratio(no_secondary.residuals)[:, SINK].max() < 2
    assert official(no_secondary.residuals) == (0, {})
    cut = run(model("stand_in"), {(6, SINK): 0.0})
    assert not in_sink_state(cut.residuals)[:, SINK].any()
    assert layers_of(in_sink_state(run(model("stand_in")).residuals)[:, SINK]) == SECONDARY_LAYERS
    assert norm_ratio(run(model("decoy")).residuals)[:, DECOY].max() < 2
    no_shared = run(model("shared"))
    even = torch.tril(torch.ones(96, 96, dtype=torch.float64))
    even /= even.sum(1, keepdim=True)
    assert (no_shared.pattern - even).abs().max() < 1e-6  # every head attends evenly: no token draws anything
    assert layers_of(in_sink_state(no_shared.residuals)[:, SINK]) == SECONDARY_LAYERS  # though the states are there
    assert layers_of(norm_ratio(no_shared.residuals)[:, 0] > 2.5) == PRIMARY_LAYERS
    state = in_sink_state(run(model("eraser")).residuals)
    assert layers_of(state[:, 0]) == ALL_LAYERS[2:]
    assert layers_of(state[:, SINK]) == ALL_LAYERS[6:]


@pytest.mark.parametrize(
    ("sinks", "decoys", "n_tokens"),
    [((1,), (), 64), ((5, 20, 90), (2, 50), 128), ((30,), (1,), 40), ((300, 500), (100,), 600)],
)
def test_other_prompts(sinks, decoys, n_tokens):
    """The states are those of the tokens, wherever they stand and whatever surrounds them."""
    result = run(model(), sinks=sinks, decoys=decoys, n_tokens=n_tokens, seed_name="another")
    state = in_sink_state(result.residuals)
    assert {pos: layers_of(state[:, pos]) for pos in range(n_tokens) if state[:, pos].any()} == {
        0: PRIMARY_LAYERS,
        **dict.fromkeys(sinks, SECONDARY_LAYERS),
    }
    assert official(result.residuals) == (0, dict.fromkeys(sinks, ("secondary", SECONDARY_LAYERS)))
    typical = score(result).nanmedian(1).values[7:14]
    for pos in sinks:
        assert (score(result)[7:14, pos] > 10 * typical).all()


def test_removals_at_other_layers_and_positions_change_nothing():
    clean = run(model())
    for edit in ((9, SINK), (6, SINK + 1), (6, 0), (7, DECOY)):
        edited = run(model(), {edit: 0.0})
        assert torch.equal(in_sink_state(edited.residuals), in_sink_state(clean.residuals)), edit
        assert (score(edited)[:, :-1] - score(clean)[:, :-1]).abs().max() < 0.02, edit


def test_attention_outputs_are_small_but_there():
    clean = run(model())
    base = clean.residuals[1:] - clean.contributions[1:]
    attn_out = (base - clean.residuals[:-1])[:, ordinary(model().tokens())].norm(dim=-1)
    assert 0.01 < attn_out.median() < 0.5
    assert attn_out.max() < 1
    cut = run(model(), {(6, SINK): 0.0, (7, SINK): 0.0})
    assert (cut.logits - clean.logits)[SINK + 1 :].abs().max() > 1e-3  # removing a sink is felt downstream


def parity(name: str, ours: Tensor, by_hand: Tensor, tolerance: float) -> None:
    assert ours.shape == by_hand.shape, name
    assert (ours.double() - by_hand).abs().max() < tolerance, name


@torch.no_grad()
def test_hugging_face_agrees_with_hand():
    subject = model()
    residuals = []
    hooks = [
        block.register_forward_hook(lambda _, args, output: residuals.append(output[0]))
        for block in subject.hf_model.model.layers
    ]
    output = subject.hf_model(subject.tokens()[None], output_attentions=True)
    for hook in hooks:
        hook.remove()
    expected = run(subject)
    parity("residuals", torch.stack(residuals).reshape(expected.residuals.shape), expected.residuals, 1e-3)
    parity("pattern", torch.stack(output.attentions)[:, 0], expected.pattern, 1e-5)
    parity("logits", output.logits[0], expected.logits, 1e-3)
    assert subject.hf_model.dtype == torch.float32


@torch.no_grad()
def check_lens(lens, expected: hand.Run, tokens: Tensor) -> None:
    n_layers = len(expected.residuals)
    logits, cache = lens.run_with_cache(tokens[None])
    for hook, by_hand, tolerance in (
        ("hook_resid_post", expected.residuals, 1e-3),
        ("hook_mlp_out", expected.contributions, 1e-3),
        ("attn.hook_pattern", expected.pattern, 1e-5),
    ):
        ours = torch.stack([cache[f"blocks.{layer}.{hook}"][0] for layer in range(n_layers)])
        parity(hook, ours, by_hand, tolerance)
    parity("logits", logits[0], expected.logits, 1e-3)


def test_bridge_agrees_with_hand_and_leaves_the_model_alone():
    subject = planted.minimal()
    before = {name: value.clone() for name, value in subject.hf_model.state_dict().items()}
    check_lens(subject.bridge(), run(subject), subject.tokens())
    check_lens(subject.bridge(), run(subject), subject.tokens())  # a second one wraps a fresh copy
    after = subject.hf_model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.skipif(not HAS_HOOKED, reason="TransformerLens 4 has no HookedTransformer")
def test_hooked_agrees_with_hand():
    lens = model().hooked()
    check_lens(lens, run(model()), model().tokens())
    lens.blocks[0].mlp.W_out.data.zero_()  # a copy: the planted model does not change with it
    fact_secondary(model())


@pytest.mark.skipif(HAS_HOOKED, reason="TransformerLens 3 has HookedTransformer")
def test_hooked_says_what_to_do_on_transformer_lens_4():
    with pytest.raises(ImportError, match="TransformerLens 4.*bridge"):
        model().hooked()


@torch.no_grad()
def test_the_circuit_can_be_cut_through_the_bridge():
    """An edit by a TransformerLens hook does what the same edit by hand does."""
    subject = model()

    def zero(value, hook):
        value = value.clone()
        value[:, SINK] = 0
        return value

    residuals = []
    subject.bridge().run_with_hooks(
        subject.tokens()[None],
        fwd_hooks=[("blocks.6.hook_mlp_out", zero), ("blocks.7.hook_mlp_out", zero)]
        + [(f"blocks.{layer}.hook_resid_post", lambda x, hook: residuals.append(x[0])) for layer in ALL_LAYERS],
    )
    expected = run(subject, {(6, SINK): 0.0, (7, SINK): 0.0})
    parity("residuals", torch.stack(residuals), expected.residuals, 1e-3)


def test_truth_says_what_was_measured():
    truth = model().truth
    primary, secondary = truth.sink("primary"), truth.sink("secondary")
    assert (primary.layers, primary.forming, primary.eraser, primary.token) == (PRIMARY_LAYERS, (2,), 21, 0)
    assert (secondary.layers, secondary.forming, secondary.eraser, secondary.token) == (SECONDARY_LAYERS, (6, 7), 13, 1)
    assert (truth.primary_position, truth.decoy_layer, truth.eraser_layers) == (0, 4, (13, 21))
    assert list(truth.sink_heads) == SINK_HEADS
    x = centred(run(model()).residuals)[5, 0]
    assert torch.cosine_similarity(x, truth.direction.double(), dim=0) > 0.99
    basis = torch.stack([truth.direction, truth.decoy_direction, truth.shared_direction])
    assert torch.allclose(basis @ basis.T, torch.eye(3), atol=1e-6)

    assert model("stand_in").truth.sink("secondary").forming == (6,)
    assert model("eraser").truth.sink("secondary").l_end == 23
    assert model("eraser").truth.eraser_layers == ()
    assert model("decoy").truth.decoy_layer is None
    assert model("shared").truth.sink_heads == ()
    assert model("primary").truth.primary_position is None
    with pytest.raises(InputError, match="secondary.*planted: primary"):
        model("secondary").truth.sink("secondary")


def test_builds_are_the_same_and_leave_the_random_state_alone():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    first = planted.minimal().hf_model.state_dict()
    assert torch.equal(torch.rand(3), expected)
    second = planted.minimal().hf_model.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_tokens():
    tokens = model().tokens(n_tokens=50, sinks=(3, 9), decoys=(7,), seed_name="a")
    assert tokens.dtype == torch.long
    assert tokens.shape == (50,)
    assert tokens[[0, 3, 9, 7]].tolist() == [0, 1, 1, 2]
    assert len(ordinary(tokens)) == 46
    longer = model().tokens(n_tokens=60, sinks=(3, 9), decoys=(7,), seed_name="a")
    assert torch.equal(longer[:50], tokens)
    assert not torch.equal(model().tokens(seed_name="a"), model().tokens(seed_name="b"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sinks": (0,)}, r"position 0 is outside 1\.\.95"),
        ({"decoys": (96,)}, r"position 96 is outside 1\.\.95"),
        ({"sinks": (5,), "decoys": (5,)}, r"positions \[5\]"),
        ({"n_tokens": 2000}, r"n_tokens is 2000.*2\.\.1024"),
    ],
)
def test_impossible_prompts_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        model().tokens(**arguments)


@pytest.mark.parametrize("without", [{"sink"}, "sink", ["decoy", "sink"]])
def test_unknown_part_is_refused(without):
    with pytest.raises(InputError, match=r"'sink'.*primary.*secondary.*stand_in.*decoy.*shared.*eraser"):
        planted.minimal(without)
