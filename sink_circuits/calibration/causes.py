"""Is what makes a sink named: its layers, heads and neurons, its eraser, and the dose curve?"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sink_circuits import anatomy, statistics
from sink_circuits.calibration.plain import LEFT, PLAIN_TOLERANCE, Silenced, plain_falls
from sink_circuits.calibration.subjects import (
    NOTHING,
    Answer,
    Row,
    Subject,
    answer,
    each_life,
    first_effects,
    lives_of,
    logits_of,
)
from sink_circuits.experiments import ablate, dose_response, layer_map
from sink_circuits.interventions import neuron_contribution, part_through_norm, without_neurons
from sink_circuits.measurement import measure
from sink_circuits.planted import Plant, Sink
from sink_circuits.planted.architectures import EPS
from sink_circuits.planted.closed_form import dose_curve

ROWS = (
    Row("layer map: one MLP", "the largest fall is at the forming MLP"),
    Row("layer map: chain", "the two largest falls are at the two MLPs that are both needed"),
    Row("layer map: stand-ins", "the largest fall is at one of the MLPs that stand in for each other"),
    Row("layer map: no MLP", "no MLP is to blame for a sink that stands in the embedding"),
    Row("layer map: attention decoy", "no MLP is to blame for attention that comes from the embedding"),
    Row(
        "joint ablation",
        "removing all forming MLPs ends the sink: log-odds fall as in a plain forward pass that leaves nothing",
    ),
    Row("heads", "the heads whose log-odds fall are those planted"),
    Row("dose curve", "the closed form, in the first layer that reads the sink"),
    Row(
        "neurons: removed", "the planted neurons take everything, as a plain forward pass says; as many others nothing"
    ),
    Row("neurons: named", "the neurons with the largest writes are those planted"),
    Row("eraser: prolonged", "the MLP whose removal prolongs a secondary is its planted eraser, and no other"),
    Row("eraser: named", "the component with the most negative write is the planted eraser"),
    Row(
        "writer: named", "the component with the largest write is the planted one, the embedding where it stands there"
    ),
)

FACTORS = (0.0, 0.25, 0.5, 2.0)
DOSE_TOLERANCE = 0.05
"""Of the effect of removal."""
N_RANDOM_NEURONS = 3
N_DECOY_LAYERS = 4
"""Layers tried, drawn by name, at tokens whose attention no MLP makes."""


def judge_layers(subject: Subject) -> list[Answer]:
    """The layer map, and on it the eraser: the MLP without which the sink lives longer."""
    sinks, table = subject.planted()
    effect = layer_map(subject.model, subject.tokens, table, verbose=False)
    log_odds = effect.over_lifetime("log_odds").to_numpy()
    best, answers = effect.forming(), []
    for index, sink in enumerate(sinks):
        if not sink.forming:
            answers.append(
                _no_forming(subject, sink, float(np.nanmin(log_odds[index])), logits_of(subject, table, sink, index))
            )
            continue
        top = [int(layer) for layer in np.argsort(log_odds[index]) if layer <= sink.l_end][: len(sink.forming)]
        name = {"one": "one MLP", "chain": "chain"}.get(sink.redundancy, "stand-ins")
        whole = best[index] in sink.forming if name == "stand-ins" else set(top) == set(sink.forming)
        detail = f"{sink.kind} {sink.forming}: {best[index]}, {top}, falls {log_odds[index].round(2)}"
        answers.append(answer(f"layer map: {name}", whole and best[index] == top[0], detail))
        if sink.kind != "primary":
            answers.append(_eraser(subject.plant, sink, effect.effect("lifetime").to_numpy()[index]))
    return answers


def _no_forming(subject: Subject, sink: Sink, fall: float, logits: dict[int, float]) -> Answer:
    share = -fall * subject.plant.recipe.shape.n_heads / sum(logits.values())
    return answer("layer map: no MLP", share < NOTHING, f"{sink.kind}: one MLP takes {share:.2f} of it")


def _eraser(plant: Plant, sink: Sink, longer: np.ndarray) -> Answer:
    """Removing the eraser prolongs a sink where the clean primary still is one: elsewhere there is no sink state, by the
    definition of the outcome `lifetime`, and so the primary's own eraser is not asked for here."""
    primary_after = any(
        one.kind == "primary" and one.l_start <= sink.l_end + 1 <= one.l_end for one in plant.truth.sinks
    )
    expected = [sink.eraser] if sink.eraser is not None and primary_after else []
    named = np.flatnonzero(longer > 0).tolist()
    return answer("eraser: prolonged", named == expected, f"{sink.kind} {sink.eraser}: prolonged by {named}")


def judge_attention_decoy(subject: Subject) -> list[Answer]:
    decoys = [decoy for decoy in subject.plant.truth.decoys if decoy.kind == "attention"]
    if not decoys:
        return []
    pos = int((subject.tokens.ids[0] == decoys[0].token).nonzero()[0])
    last = subject.plant.recipe.shape.n_layers - 1
    table = subject.rows(subject.tokens, [(0, pos, "secondary", 0, last)])
    layers = np.random.default_rng(statistics.seed_of("decoy", subject.name)).choice(
        last, N_DECOY_LAYERS, replace=False
    )
    effect = layer_map(subject.model, subject.tokens, table, layers=sorted(layers.tolist()), verbose=False)
    heads = [head for head, _ in subject.plant.recipe.attended_logits]
    drawn = float(np.mean([logit for _, logit in subject.plant.recipe.attended_logits]))
    falls = effect.effect("log_odds").sel(head=heads).mean("head").where(effect.reading()).mean("layer").to_numpy()[0]
    return [
        answer(
            "layer map: attention decoy", np.nanmin(falls) > -NOTHING * drawn, f"falls {falls.round(2)} of {drawn:.1f}"
        )
    ]


def judge_joint_ablation(subject: Subject) -> list[Answer]:
    """Joint removal ends the sink by geometry, and log-odds fall, head by head, as in a plain forward pass in which nothing is
    left along the planted direction."""
    answers = []
    for sink, table in each_life(subject):
        effect = ablate(subject.model, subject.tokens, table, layers=sink.forming, verbose=False)
        falls, expected = first_effects(effect, sink), logits_of(subject, table, sink)
        heads = sorted(expected)
        pos, life = int(table.table["pos"].iloc[0]), effect.data["lifetime"].to_numpy().item()
        error, left = _against_plain(subject, sink, pos, falls, [Silenced(0, layer, pos) for layer in sink.forming])
        detail = f"{sink.kind} {sink.forming}: lives {life:.0f}, error {error:.2g}, left {left:.2g}"
        answers.append(answer("joint ablation", life == 0 and error < PLAIN_TOLERANCE and abs(left) < LEFT, detail))
        fallen = [head for head, fall in enumerate(falls) if fall < -0.25 * min(expected.values())]
        answers.append(answer("heads", fallen == heads, f"{sink.kind}: {fallen} for {heads}, falls {falls.round(2)}"))
    return answers


def _against_plain(
    subject: Subject, sink: Sink, pos: int, falls: np.ndarray, silenced: Sequence[Silenced]
) -> tuple[float, float]:
    """(largest error of the falls, in nats; share of the sink that is left) against a plain forward pass."""
    expected, left = plain_falls(subject.plant, subject.tokens.ids[0], pos, sink, silenced)
    return float(np.abs(falls - expected).max()), left


def judge_dose(subject: Subject) -> list[Answer]:
    answers = []
    for sink, table in each_life(subject, "one"):
        effect = dose_response(
            subject.model, subject.tokens, table, layers=sink.forming, factors=FACTORS, verbose=False
        )
        heads = sorted(logits_of(subject, table, sink))
        effects = effect.effect("log_odds").sel(layer=sink.l_start + 1, head=heads).mean("head").to_numpy()[0]
        curve = dose_curve(subject.plant, sink, torch.tensor(FACTORS)).numpy()
        error = np.abs(effects / effects[0] - curve).max()
        answers.append(
            answer("dose curve", error < DOSE_TOLERANCE, f"{sink.kind}: error {error:.3f}, {effects.round(2)}")
        )
    return answers


def judge_neurons(subject: Subject) -> list[Answer]:
    """Planted neurons against as many others of the same MLP, taken out of the contribution."""
    answers = []
    for sink, table in each_life(subject, "one"):
        layer, own = sink.forming[0], sink.neurons[0]
        pos = int(table.table["pos"].iloc[0])
        draw = np.random.default_rng(statistics.seed_of("other neurons", subject.name, sink.token))
        free = np.setdiff1d(np.arange(subject.plant.recipe.shape.d_mlp), own)
        sets = [own, *(tuple(draw.choice(free, len(own), replace=False).tolist()) for _ in range(N_RANDOM_NEURONS))]
        parts = [neuron_part(subject, layer, pos, chosen) for chosen in sets]
        effect = measure(
            subject.model, subject.tokens, table, range(len(sets)), lambda i, row: (without_neurons(layer, pos, parts[i]),),  # noqa: B023
            what="neurons", verbose=False,
        )  # fmt: skip
        drawn = logits_of(subject, table, sink)
        falls = [
            -first_effects(effect, sink, i)[sorted(drawn)].mean() / np.mean(list(drawn.values()))
            for i in range(len(sets))
        ]
        error, left = _against_plain(subject, sink, pos, first_effects(effect, sink), [Silenced(0, layer, pos, own)])
        whole = error < PLAIN_TOLERANCE and abs(left) < LEFT
        right = whole and all(abs(fall) < NOTHING for fall in falls[1:])
        detail = f"{sink.kind} L{layer} {own}: shares {np.round(falls, 3)}, error {error:.2g}, left {left:.2g}"
        answers.append(answer("neurons: removed", right, detail))
        named = anatomy.neurons(subject.model, subject.tokens, table, layer=layer, verbose=False).named(0, n=len(own))
        answers.append(answer("neurons: named", set(named) == set(own), f"{sink.kind} L{layer} {own}: {named}"))
    return answers


@torch.no_grad()
def neuron_part(subject: Subject, layer: int, pos: int, neurons: Sequence[int]) -> Float[Tensor, "1 d_model"]:
    """What these neurons write at `pos` of the first prompt, from the plain model's own weights."""
    plant = subject.plant
    seen: dict[str, Tensor] = {}
    block = plant.architecture.layers(plant.hf_model)[layer]
    W_out, b_out = plant.architecture.output_map(block)
    handle = plant.architecture.output_module(block).register_forward_pre_hook(
        lambda _, args: seen.update(post=args[0][0, pos])
    )
    plant.hf_model(subject.tokens.ids[0][None])
    handle.remove()
    # In float64: behind a norm an output of norm 1000 is subtracted from itself, and what is left made as large again.
    post, W_out = seen["post"][None].double(), W_out.double()
    part = neuron_contribution(post, W_out, neurons)
    norm = plant.architecture.norm(block, "mlp_out")
    if norm is not None:
        part = part_through_norm(post @ W_out + b_out, part, _in_double(norm))
    return part.float()


def _in_double(norm: torch.nn.Module) -> Callable[[Tensor], Tensor]:
    """A planted RMS norm in float64 (Hugging Face's own compute in float32): its gain is what it does to (1, ..., 1)."""

    def normalised(x: Tensor) -> Tensor:
        gain = norm(torch.ones(1, x.shape[-1])).double() * (1 + EPS) ** 0.5
        return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * gain

    return normalised


def judge_writers(subject: Subject) -> list[Answer]:
    sinks, table = subject.planted()
    top = anatomy.writers(subject.model, subject.tokens, table, verbose=False).top(1)
    answers = []
    for index, sink in enumerate(sinks):
        if sink.redundancy in ("one", "none") and (sink.kind != "primary" or len(lives_of(sinks, sink)) == 1):
            named = top.loc[(top["sink"] == index) & (top["role"] == "writer"), "component"].tolist()
            expected = [f"L{sink.forming[0]} mlp" if sink.forming else "embed"]
            answers.append(answer("writer: named", named == expected, f"{sink.kind} {expected}: {named}"))
        if sink.eraser is not None and len(lives_of(sinks, sink)) == 1:
            named = top.loc[(top["sink"] == index) & (top["role"] == "eraser"), "component"].tolist()
            answers.append(
                answer("eraser: named", named == [f"L{sink.eraser} mlp"], f"{sink.kind} L{sink.eraser}: {named}")
            )
    return answers


JUDGES = (judge_layers, judge_attention_decoy, judge_joint_ablation, judge_dose, judge_neurons, judge_writers)
NULL_JUDGES = ()
