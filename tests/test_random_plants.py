"""Random plants hold what their truth says, measured on the plain Hugging Face model by forward hooks and by nothing else."""

from __future__ import annotations

import copy
import functools
import importlib.util
import math
from collections.abc import Mapping
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sink_circuits import planted
from sink_circuits.errors import InputError
from sink_circuits.planted.closed_form import dose_curve, drawn_logits, key_share, primary_norms, standing
from sink_circuits.planted.draw import random_recipe

torch.set_num_threads(1)

ALL_DECOYS = "decoys 15"
VARIANTS = ("llama", "mistral", "gpt2", "gpt_neox", "gemma2", "olmo2")
HAS_HOOKED = importlib.util.find_spec("transformer_lens.HookedTransformer") is not None
BACKENDS = ("bridge", "hooked") if HAS_HOOKED else ("bridge",)
CONTRIBUTIONS = {"gemma2": "post_feedforward_layernorm", "olmo2": "post_feedforward_layernorm"}  # elsewhere: mlp
NAMES = {  # plants that between them hold every kind of phase, redundancy and decoy
    "llama": "a", "mistral": "b", "gpt2": "c", "gpt_neox": "d", "gemma2": "e", "olmo2": "f",
}  # fmt: skip


class Plain(NamedTuple):
    resid: Tensor  # resid_post [layer, pos, d_model]
    contribution: Tensor  # [layer, pos, d_model]
    pattern: Tensor  # [layer, head, query, key]


def blocks(model) -> list:
    base = model.base_model
    return list(getattr(base, "layers", None) or base.h)


@torch.no_grad()
def forward(plant: planted.Plant, tokens: Tensor, zeroed: Mapping[int, int] | None = None, model=None) -> Plain:
    """The plain model; `zeroed[layer]` is the position at which that MLP's contribution is taken out."""
    model, zeroed, resid, contributions, handles = model or plant.hf_model, zeroed or {}, [], [], []

    def contribute(layer):
        def hook(module, args, out):
            if layer in zeroed:
                out = out.clone()
                out[0, zeroed[layer]] = 0
            contributions.append(out[0].double())
            return out

        return hook

    for layer, block in enumerate(blocks(model)):
        part = getattr(block, CONTRIBUTIONS.get(plant.variant, "mlp"))
        handles.append(part.register_forward_hook(contribute(layer)))
        handles.append(
            block.register_forward_hook(
                lambda m, a, out: resid.append((out[0] if isinstance(out, tuple) else out).double())
            )
        )
    pattern = model(tokens[None], output_attentions=True).attentions
    for handle in handles:
        handle.remove()
    n = len(tokens)
    return Plain(torch.stack(resid).reshape(len(resid), n, -1), torch.stack(contributions), torch.cat(pattern).double())


@functools.cache
def plant(variant: str) -> planted.Plant:
    return planted.random_plant(NAMES[variant], variant=variant)


@functools.cache
def clean(variant: str, name: str = "a text") -> tuple[Tensor, Plain]:
    tokens = plant(variant).prompt(name)
    return tokens, forward(plant(variant), tokens)


def in_state(resid: Tensor, primary: int) -> Tensor:
    """Centred cosine with the primary above 0.9, norm above 2.5 medians, the primary's too [layer, pos]."""
    norm = resid.norm(dim=-1)
    ratio = norm / norm.median(dim=1, keepdim=True).values
    centred = resid - resid.median(dim=1, keepdim=True).values
    cosine = torch.cosine_similarity(centred, centred[:, [primary]], dim=-1)
    return (cosine > 0.9) & (ratio > 2.5) & (ratio[:, [primary]] > 2.5)


def lives(subject: planted.Plant, tokens: Tensor) -> list[tuple[int, planted.Sink]]:
    """First place of every kind of sink."""
    first = {}
    for pos, sink in subject.truth.lives(tokens):
        first.setdefault(sink, pos)
    return [(pos, sink) for sink, pos in first.items()]


@pytest.mark.parametrize("variant", VARIANTS)
def test_sinks_are_in_sink_state_where_they_live_and_nothing_else_is(variant):
    tokens, run = clean(variant)
    subject = plant(variant)
    state = in_state(run.resid, subject.recipe.primary_position)
    expected = torch.zeros_like(state)
    for pos, sink in subject.truth.lives(tokens):
        expected[sink.layers, pos] = True
    assert torch.equal(state, expected)
    amount = run.resid @ subject.truth.direction.double()
    for pos, sink in subject.truth.lives(tokens):
        if sink.redundancy in ("one", "chain"):
            whole = [sink.l_start] if sink.kind == "primary" else sink.layers  # a primary may fall to a trough
            assert amount[whole, pos].numpy() == pytest.approx(sink.norm, rel=0.05)
        if sink.eraser is not None and sink.eraser < subject.recipe.shape.n_layers:
            assert amount[sink.eraser, pos].abs() < 0.02 * sink.norm
    ordinary = tokens >= subject.recipe.n_special
    assert amount[:, ordinary].abs().max() < 0.01
    norm = run.resid.norm(dim=-1)[:, ordinary]
    assert (norm.amax(1) / norm.amin(1)).max() < 1.4
    assert torch.tensor(subject.truth.ordinary_norms).numpy() == pytest.approx(norm.median(1).values.numpy(), rel=0.1)


@pytest.mark.parametrize("variant", VARIANTS)
def test_removals_do_what_the_redundancy_says(variant):
    tokens, _ = clean(variant)
    subject = plant(variant)
    primary = subject.recipe.primary_position
    for pos, sink in lives(subject, tokens):
        if sink.kind == "primary" or not sink.forming:
            continue  # without a primary there is no direction to be compared with
        amount = {
            removed: (
                forward(subject, tokens, dict.fromkeys(removed, pos)).resid[sink.l_end, pos]
                @ subject.truth.direction.double()
            ).item()
            for removed in [sink.forming, *((layer,) for layer in sink.forming)]
        }
        assert abs(amount.pop(sink.forming)) < 0.5
        for left in amount.values():
            if sink.redundancy == "stand_in":
                assert left > 25
            elif sink.redundancy == "chain":
                assert left < 20
        if sink.eraser is not None:
            kept = forward(subject, tokens, {sink.eraser: pos}).resid
            assert (kept[-1, pos] @ subject.truth.direction.double()).item() == pytest.approx(sink.norm, rel=0.1) or (
                sink.redundancy == "stand_in"
            )
            assert in_state(kept, primary)[sink.eraser, pos] == in_state(kept, primary)[sink.eraser, primary]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_planted_neurons_carry_the_write(variant):
    subject = plant(variant)
    tokens, run = clean(variant)
    down = {"gpt2": "c_proj", "gpt_neox": "dense_4h_to_h"}.get(variant, "down_proj")
    for pos, sink in lives(subject, tokens):
        if sink.redundancy != "one":
            continue
        layer, own = sink.forming[0], list(sink.neurons[0])
        others = [n for n in range(subject.recipe.shape.d_mlp) if n not in own]
        written = []
        for silenced in (own, others):
            model = copy.deepcopy(subject.hf_model)
            weight = getattr(blocks(model)[layer].mlp, down).weight
            with torch.no_grad():
                weight[silenced] = 0.0 if variant == "gpt2" else weight[silenced]
                if variant != "gpt2":
                    weight[:, silenced] = 0.0
            written.append(
                (
                    forward(subject, tokens, model=model).contribution[layer, pos] @ subject.truth.direction.double()
                ).item()
            )
        whole = (run.contribution[layer, pos] @ subject.truth.direction.double()).item()
        assert abs(written[0]) < 0.01 * whole
        assert written[1] == pytest.approx(whole, rel=0.01)


@pytest.mark.parametrize("variant", VARIANTS)
def test_heads_attend_as_planted_and_as_the_closed_form_says(variant):
    subject = plant(variant)
    tokens, run = clean(variant)
    heads = dict(subject.truth.sink_logits)
    assert list(heads) == list(subject.truth.sink_heads)
    for pos, sink in lives(subject, tokens):
        layer = sink.l_start + 1
        if not sink.forming:
            continue
        without = forward(subject, tokens, dict.fromkeys(sink.forming, pos))
        window = subject.window(layer)
        later = slice(pos + 1, None if window is None else pos + window)
        odds = [torch.logit(one.pattern[layer, :, later, pos], eps=1e-12).mean(-1) for one in (run, without)]
        drawn = drawn_logits(subject, tokens, pos, sink)
        for head, fall in enumerate((odds[0] - odds[1]).tolist()):
            assert fall == pytest.approx(drawn.get(head, 0.0), abs=0.08 * 8)


@pytest.mark.parametrize("variant", VARIANTS)
def test_decoys_are_what_they_say(variant):
    subject = planted.random_plant(ALL_DECOYS, variant=variant, n_secondary=1)
    tokens = subject.prompt("x")
    kinds = {decoy.kind: decoy for decoy in subject.truth.decoys}
    assert set(kinds) == {"norm", "oblique", "opposite", "attention"}
    run = forward(subject, tokens)
    norm = run.resid.norm(dim=-1)
    ratio = norm / norm.median(dim=1, keepdim=True).values
    centred = run.resid - run.resid.median(dim=1, keepdim=True).values
    cosine = torch.nn.functional.normalize(centred, dim=-1) @ subject.truth.direction.double()
    at = {kind: int((tokens == decoy.token).nonzero()[0]) for kind, decoy in kinds.items()}
    for kind, low, high in (("norm", -0.1, 0.1), ("oblique", 0.6, 0.82), ("opposite", -1.0, -0.95)):
        formed = slice(kinds[kind].layer + (kind == "oblique"), None)
        assert ratio[formed, at[kind]].min() > 2.5
        assert ratio[: kinds[kind].layer, at[kind]].max().item() < 1.6 if kinds[kind].layer else True
        assert cosine[formed, at[kind]].min() > low
        assert cosine[formed, at[kind]].max() < high
    assert ratio[:, at["attention"]].max() < 1.6
    assert abs(run.resid[:, at["attention"]] @ subject.truth.direction.double()).max() < 0.01
    heads = [head for head, _ in subject.recipe.attended_logits]
    ordinary = (tokens >= subject.recipe.n_special).nonzero().flatten()
    for kind in ("norm", "attention"):
        neighbour = int(ordinary[(ordinary - at[kind]).abs().argmin()])
        later = slice(max(at[kind], neighbour) + 1, max(at[kind], neighbour) + 17)
        drawn = (run.pattern[-1, heads, later, at[kind]] / run.pattern[-1, heads, later, neighbour]).median(-1).values
        assert drawn.min() > 5 if kinds[kind].attended else drawn.max() < 3


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_null_plant_is_the_same_without_the_circuit(variant):
    name = NAMES[variant]
    null, twin = planted.null_plant(name, variant=variant), plant(variant)
    assert null.truth.sinks == ()
    assert null.truth.primary_position is None
    assert null.recipe.shape == twin.recipe.shape
    tokens = null.prompt("x")
    run = forward(null, tokens)
    sinks, decoys = {sink.token for sink in twin.truth.sinks}, {decoy.token for decoy in null.truth.decoys}
    assert not sinks & set(tokens.tolist()) - {0}
    quiet = torch.tensor([int(t) not in decoys for t in tokens])
    norm = run.resid.norm(dim=-1)
    assert (run.resid[:, quiet] @ null.truth.direction.double()).abs().max() < 1e-3
    assert (norm[:, quiet] / norm.median(dim=1, keepdim=True).values).max() < 1.5
    own, other = null.hf_model.state_dict(), twin.hf_model.state_dict()
    differ = [key for key in own if not torch.allclose(own[key], other[key], rtol=1e-2)]  # decoys' amounts are set anew
    assert all("mlp" in key or "feedforward" in key or "embed_" in key or "wte" in key for key in differ)
    touched = {write.layer for write in twin.recipe.writes if write.token in sinks}
    assert {int(part) for key in differ for part in key.split(".") if part.isdigit()} <= touched


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_transformer_lens_computes_the_same(variant, backend):
    tokens, run = clean(variant)
    before = {name: value.clone() for name, value in plant(variant).hf_model.state_dict().items()}
    lens = getattr(plant(variant), backend)()
    _, cache = lens.run_with_cache(tokens[None])
    for layer in range(len(run.resid)):
        for hook, expected, tolerance in (
            ("hook_resid_post", run.resid, 1e-2), ("hook_mlp_out", run.contribution, 1e-2), ("attn.hook_pattern", run.pattern, 1e-3),
        ):  # fmt: skip
            torch.testing.assert_close(
                cache[f"blocks.{layer}.{hook}"][0].double(), expected[layer], atol=tolerance, rtol=1e-4
            )
    after = plant(variant).hf_model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_closed_forms():
    subject = plant("llama")
    sink = planted.Sink(1, "secondary", 3, 5, (3,), None, norm=50.0)
    assert key_share(30.0, 40.0) == pytest.approx(0.6)
    curve = dose_curve(subject, sink, torch.tensor([0.0, 0.5, 1.0, 1e6], dtype=torch.float64))
    assert curve[0] == 1
    assert curve[2] == pytest.approx(0.0, abs=1e-12)
    rest = math.hypot(subject.truth.ordinary_norms[4], 3.0)
    assert curve[1].item() == pytest.approx(1 - 25 / math.hypot(25, rest) * math.hypot(50, rest) / 50)
    assert curve[3].item() == pytest.approx(1 - math.hypot(50, rest) / 50)


def test_queries_at_massive_tokens_read_little_and_the_closed_form_knows_them():
    """Without noise the closed form is exact: the primary of a plant with half-formed chains and a decoy among its queries."""
    subject = planted.random_plant("2/79", variant="mistral", noise=0.0)
    chain, decoy = subject.truth.sinks[2], subject.truth.decoys[0]
    assert (chain.redundancy, decoy.kind) == ("chain", "opposite")
    assert standing(subject, chain.token, chain.l_start) == pytest.approx(subject.recipe.writes[2].norm)
    assert standing(subject, chain.token, chain.l_start + 1) == pytest.approx(chain.norm)
    assert standing(subject, chain.token, chain.eraser + 1) == 0
    assert standing(subject, decoy.token, decoy.layer) == 0 < 45 < standing(subject, decoy.token, decoy.layer + 1)
    tokens = subject.prompt("x")
    tokens[5:13], tokens[20:26] = chain.token, decoy.token
    primary = subject.truth.sink("primary")
    clean_run, without = forward(subject, tokens), forward(subject, tokens, dict.fromkeys(primary.forming, 0))
    layer, later = primary.l_start + 1, slice(1, subject.window(0))
    odds = [torch.logit(one.pattern[layer, :, later, 0], eps=1e-12).mean(-1) for one in (clean_run, without)]
    fall = odds[0] - odds[1]
    for head, drawn in drawn_logits(subject, tokens, 0, primary).items():
        assert fall[head].item() == pytest.approx(drawn, rel=0.05)
        assert fall[head].item() < 0.85 * dict(subject.truth.sink_logits)[head]  # what the massive queries do not give


@pytest.mark.parametrize("phases", ["one", "apart", "fall"])
def test_phases(phases):
    subject = planted.random_plant("phases", variant="llama", phases=phases)
    tokens = subject.prompt("x")
    primary = subject.recipe.primary_position
    norms = forward(subject, tokens).resid.norm(dim=-1)
    assert norms[:, primary].numpy() == pytest.approx(primary_norms(subject).numpy(), rel=0.03)
    ratio = norms[:, primary] / norms.median(dim=1).values
    own = [sink for sink in subject.truth.sinks if sink.kind == "primary"]
    assert len(own) == {"one": 1, "apart": 2, "fall": 2}[phases]
    if phases == "apart":
        gap = ratio[own[0].l_end + 1 : own[1].l_start]
        assert len(gap) >= 2
        assert gap.max() < 1.5
    if phases == "fall":
        assert own[0].l_end == own[1].l_start - 1
        peak, trough = ratio[own[0].l_start], ratio[own[0].l_end]
        assert 2.5 < trough < peak / 4
        assert ratio[own[0].l_end - 1] == pytest.approx(trough.item(), rel=0.05)
        assert ratio[own[1].l_start] > 8 * trough


# What is drawn. No model is built here.


@settings(max_examples=60)
@given(st.integers(0, 10**9))
def test_recipes_keep_their_promises(seed):
    recipe = random_recipe(seed)
    n_layers, taken = recipe.shape.n_layers, {}
    phases = [(sink.l_start, sink.l_end) for sink in recipe.sinks if sink.kind == "primary"]
    assert phases
    assert phases == sorted(phases)
    for sink in recipe.sinks:
        assert 0 <= sink.l_start < sink.l_end < n_layers
        assert len(sink.neurons) == len(sink.forming) == {"one": 1, "none": 0}.get(sink.redundancy, 2)
        if sink.redundancy == "none":
            assert sink.token in dict(recipe.embedded)
            assert sink.l_start in {phase[0] for phase in phases}
            assert sink.l_end in {phase[1] for phase in phases}
        elif sink.kind != "primary":
            inside = [phase for phase in phases if phase[0] <= sink.l_start and sink.l_end <= phase[1]]
            assert len(inside) == 1
            assert (sink.kind == "primary-like") == (sink.l_start == inside[0][0])
            assert sink.eraser == (None if sink.l_end == n_layers - 1 else sink.l_end + 1)
            assert sink.l_start == (sink.forming[-1] if sink.redundancy == "chain" else sink.forming[0])
    levels = [(sink.l_start, sink.l_end) for sink in recipe.sinks if sink.forming]
    assert len(set(levels)) == len(levels)
    for write in recipe.writes:
        for neuron in write.neurons:
            assert 0 <= neuron < recipe.shape.d_mlp
            assert taken.setdefault((write.layer, neuron), write) is write
        assert 0 <= write.token < recipe.n_special
        assert write.token not in write.spares
    assert {decoy.token for decoy in recipe.decoys} == set(
        range(recipe.n_special - len(recipe.decoys), recipe.n_special)
    )


@given(st.integers(0, 10**9), st.sampled_from(VARIANTS))
@settings(max_examples=20)
def test_a_name_plants_the_same_circuit_in_every_variant(seed, variant):
    one, other = random_recipe(seed, variant="llama"), random_recipe(seed, variant=variant)
    assert [(s.kind, s.l_start, s.l_end, s.forming, s.redundancy) for s in one.sinks] == [
        (s.kind, s.l_start, s.l_end, s.forming, s.redundancy) for s in other.sinks
    ]
    assert one.sink_logits == other.sink_logits


def test_builds_are_the_same_and_leave_the_random_state_alone():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    first = planted.random_plant(5, variant="gpt2").hf_model.state_dict()
    assert torch.equal(torch.rand(3), expected)
    second, other = (planted.random_plant(name, variant="gpt2").hf_model.state_dict() for name in (5, 6))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_prompts():
    subject = plant("llama")
    tokens = subject.prompt("p", 70)
    assert tokens.shape == (70,)
    assert tokens.dtype == torch.long
    assert torch.equal(tokens, subject.prompt("p", 70))
    assert not torch.equal(tokens, subject.prompt("q", 70))
    special = (tokens < subject.recipe.n_special).nonzero().flatten().tolist()
    assert subject.recipe.primary_position in special
    assert all(4 <= pos < 52 for pos in special if pos != subject.recipe.primary_position)
    for token in range(subject.recipe.n_special):
        assert 1 <= int((tokens == token).sum()) <= 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"variant": "bert"}, r"'bert' is unknown.*llama.*olmo2"),
        ({"phases": "three"}, r"'three' is unknown.*one, apart, fall"),
        ({"n_secondary": 4}, r"n_secondary = 4: at most 3"),
        ({"noise": 5.0, "variant": "gpt2"}, r"5.0: from 0 to 2.0.*gpt2"),
    ],
)
def test_impossible_plants_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        planted.random_plant(0, **arguments)


@pytest.mark.parametrize(
    ("n_tokens", "message"), [(23, "23: too short"), (500, r"500.*2\.\.128"), (1, r"1: .*2\.\.128")]
)
def test_impossible_prompts_are_refused(n_tokens, message):
    with pytest.raises(InputError, match=message):
        plant("mistral").prompt("x", n_tokens)
