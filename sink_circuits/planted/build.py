"""From a recipe to a Hugging Face model: base weights by formula, then the planted neurons, set in one forward pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sink_circuits.planted.architectures import ARCHITECTURES, Architecture
from sink_circuits.planted.circuits import (
    FEATURE_NORM,
    FIXED_FEATURES,
    NOISE_NORM,
    SHARED_NORM,
    Recipe,
    Truth,
    Write,
    own_feature,
)

STEEP = 10.0  # slope of gates that open at a hinge
STAND_IN_READS_SINK = 0.35
WASTE_GAIN = 1e-3  # of the direction into which a norm behind the MLP lets a write's surplus vanish


@dataclass(frozen=True)
class Neuron:
    """One MLP neuron: act(gate . x) * (up . x), x the normalised residual stream, or act(gate . x) where there is no gate.

    Weights are per feature. `share` of the write goes through this neuron.
    """

    gate: Mapping[str, float]
    up: Mapping[str, float]
    share: float = 1.0


@dataclass(frozen=True, eq=False)
class Basis:
    """An orthonormal basis of the residual stream: features by name, the noise space [n_noise, d_model]."""

    features: dict[str, Tensor]
    noise: Tensor

    def reader(self, weights: Mapping[str, float]) -> Tensor:
        return sum((weight * self.features[name] for name, weight in weights.items()), torch.zeros(self.noise.shape[1]))


def build(recipe: Recipe, prompt: Tensor) -> tuple[nn.Module, Truth]:
    """The model that holds a recipe's writes, and the truth about it. `prompt` [pos] holds every special token."""
    architecture = ARCHITECTURES[recipe.variant]
    basis = basis_of(recipe, architecture)
    model = architecture.make(recipe.shape)
    norms: list[float] = []
    with torch.no_grad():
        _set_base_weights(model, recipe, architecture, basis)
        handles = [
            architecture.mlp_reader(block).register_forward_pre_hook(
                lambda _, args, block=block, layer=layer: _install(
                    block, layer, args[0][0], prompt, recipe, architecture, basis, norms
                )
            )
            for layer, block in enumerate(architecture.layers(model))
        ]
        model(prompt[None])
        for handle in handles:
            handle.remove()
    return model, _truth(recipe, basis, norms)


def _truth(recipe: Recipe, basis: Basis, norms: list[float]) -> Truth:
    directions = {name: basis.features[name] for name in FIXED_FEATURES}
    return Truth(
        sinks=recipe.sinks,
        primary_position=recipe.primary_position if any(sink.kind == "primary" for sink in recipe.sinks) else None,
        decoy_layer=next((decoy.layer for decoy in recipe.decoys if decoy.layer is not None), None),
        eraser_layers=tuple(sorted({write.layer for write in recipe.writes if write.role == "erase"})),
        sink_heads=tuple(head for head, _ in recipe.sink_logits) if recipe.shared else (),
        direction=directions["sink"],
        decoy_direction=directions["decoy"],
        shared_direction=directions["shared"],
        sink_logits=recipe.sink_logits if recipe.shared else (),
        decoys=recipe.decoys,
        noise=recipe.noise,
        ordinary_norms=tuple(norms),
    )


def basis_of(recipe: Recipe, architecture: Architecture) -> Basis:
    """Random directions; along coordinates where a norm follows the MLP, whose gain can then tell features apart;
    orthogonal to (1, ..., 1) where norms take the mean out."""
    d_model = recipe.shape.d_model
    names = recipe.features()
    random = torch.randn(d_model, d_model, generator=recipe.generator("basis"), dtype=torch.float64)
    if architecture.post_norm:
        names = (*names, "waste")
        order = torch.randperm(d_model, generator=recipe.generator("coordinates"))
        rows = torch.diag(random[0].sign())[order].float()
    elif architecture.reads == "layer":
        rows = (
            torch.linalg.qr(torch.cat([torch.ones(d_model, 1, dtype=torch.float64), random[:, 1:]], dim=1))
            .Q.T[1:]
            .float()
        )
    else:
        rows = torch.linalg.qr(random).Q.T.float()
    return Basis(dict(zip(names, rows, strict=False)), rows[len(names) :])


# ---------------------------------------------------------------------------------------------------- base weights
def _set_base_weights(model: nn.Module, recipe: Recipe, architecture: Architecture, basis: Basis) -> None:
    """Everything but the planted writes: embeddings, heads, unembedding, and neurons that only stir the noise space."""
    shape, features = recipe.shape, basis.features

    def noise(name: str, *size: int) -> Tensor:
        """Seeded vectors [*size, d_model] of about unit norm in the noise space."""
        n_noise = len(basis.noise)
        return torch.randn(*size, n_noise, generator=recipe.generator(name)) @ basis.noise / n_noise**0.5

    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 and ("norm" in name or ".ln_" in name):  # not all ones, so that leaving a gain out shows
            if name.endswith("weight"):
                gain = 1 + 0.2 * torch.rand(len(parameter), generator=recipe.generator(name))
                parameter.copy_(gain - architecture.gain_offset)
            else:
                parameter.copy_(0.1 * torch.randn(len(parameter), generator=recipe.generator(name)))

    embedding = torch.nn.functional.normalize(noise("embedding", shape.d_vocab), dim=-1) * NOISE_NORM
    for token in range(recipe.n_special):
        embedding[token] += FEATURE_NORM * features[own_feature(token)]
    for token, amount in recipe.embedded:
        embedding[token] += amount * features["sink"]
    architecture.set_embedding(model, embedding + SHARED_NORM * recipe.shared * features["shared"])
    if architecture.rotary == 0.0:
        model.get_submodule("transformer.wpe").weight.copy_(0.3 * noise("positions", shape.n_ctx))
    model.get_output_embeddings().weight.copy_(3 * noise("unembedding", shape.d_vocab))

    for layer, block in enumerate(architecture.layers(model)):
        query, key = _queries_and_keys(layer, block, recipe, architecture, basis, noise)
        value = noise(f"{layer}/value", *key.shape[:2])
        output = noise(f"{layer}/output", *query.shape[:2]) * 0.1 * recipe.noise
        architecture.set_heads(block, query, key, value, output)
        # Gates open by the shared direction, more or less: ordinary tokens get small contributions of their own.
        gate = 0.1 * torch.randn(shape.d_mlp, 1, generator=recipe.generator(f"{layer}/gate")) * features["shared"]
        gate = gate + 0.1 * noise(f"{layer}/gate noise", shape.d_mlp)
        out = 0.3 * recipe.noise * noise(f"{layer}/down", shape.d_mlp)
        if not architecture.gated:
            gate, out = 3 * gate, out / 3
        architecture.set_neurons(block, slice(None), gate, noise(f"{layer}/up", shape.d_mlp), out)
        for index, bias in enumerate(architecture.output_biases(block)):
            bias.copy_(0.1 * recipe.noise * noise(f"{layer}/bias {index}"))
        for place, size in (("attn_out", 0.2), ("mlp_out", 0.4)):
            if (norm := architecture.norm(block, place)) is not None:
                spread = 1 + 0.2 * torch.rand(shape.d_model, generator=recipe.generator(f"{layer}/{place}"))
                architecture.set_gain(norm, size * recipe.noise * spread / shape.d_model**0.5)


def _queries_and_keys(layer: int, block: nn.Module, recipe: Recipe, architecture: Architecture, basis: Basis, noise):
    """Readers [head, d_head, d_model]. Every query is a constant: it reads the shared direction.

    Sink heads look in one coordinate, where keys read the sink direction; heads that are drawn by decoys in another; the
    others look everywhere, at keys of noise, and so attend almost evenly. Normalised features reach sqrt(d_model).
    """
    shape, features = recipe.shape, basis.features
    group = shape.n_heads // shape.n_key_heads
    sinks, attended, spare = architecture.coordinates(shape.d_head)
    shared = features["shared"]
    query = 0.05 * torch.randn(shape.n_heads, shape.d_head, 1, generator=recipe.generator(f"{layer}/query")) * shared
    key = noise(f"{layer}/key", shape.n_key_heads, shape.d_head)
    for head, logit in recipe.sink_logits:
        query[head] = 0
        query[head, sinks] = logit * shape.d_head**0.5 / shape.d_model * shared
    sink_keys = {head // group for head, _ in recipe.sink_logits}
    for head in range(shape.n_heads):  # those that share a key head with them look past what it holds for others
        if head // group in sink_keys and head not in dict(recipe.sink_logits):
            query[head, sinks] = 0
    for key_head in sink_keys:
        key[key_head, sinks] = features["sink"] + 0.3 * key[key_head, sinks]
    ordinary = FEATURE_NORM / (SHARED_NORM**2 + NOISE_NORM**2 + FEATURE_NORM**2) ** 0.5  # of a token's own feature
    decoys = [decoy for decoy in recipe.decoys if decoy.attended]
    if decoys:
        query[:, attended] = 0
    for head, logit in recipe.attended_logits if decoys else ():
        query[head, attended] = logit * shape.d_head**0.5 / (shape.d_model * ordinary) * shared
    for key_head in {head // group for head, _ in recipe.attended_logits} if decoys else ():
        # Where keys read the residual stream raw, a massive norm is not yet divided by itself.
        loud = ordinary * (0.2 if architecture.reads == "raw" else 1.0)
        of = {"norm": loud * features["decoy"]}
        key[key_head, attended] = 0.3 * key[key_head, attended] + sum(
            of.get(decoy.kind, features[own_feature(decoy.token)]) for decoy in decoys
        )
    if architecture.qk_norm:
        # The norm of queries is undone; that of keys does what a norm in front of the block does elsewhere, thanks to a
        # coordinate that holds every token's shared part and that no query reads.
        n_sink_keys = max(len(sink_keys), 1)
        query[:, list(spare)] = 0
        key[0, spare[0]] = n_sink_keys**0.5 * shared
        spread = 1 + 0.2 * torch.rand(query.shape[:2].numel(), generator=recipe.generator(f"{layer}/q_norm"))
        length = query @ shared * shape.d_model**0.5  # [head, d_head], of an ordinary token
        query = query / spread.view(*query.shape[:2], 1)
        q_norm, k_norm = (block.get_parameter(f"self_attn.{name}.weight") for name in ("q_norm", "k_norm"))
        q_norm.copy_(spread * (length.flatten() / spread).square().mean().sqrt())
        k_norm.fill_((shape.d_model * n_sink_keys / key.shape[:2].numel()) ** 0.5)
    return query, key


# -------------------------------------------------------------------------------------------------- planted writes
def _install(
    block: nn.Module, layer: int, resid: Tensor, prompt: Tensor, recipe: Recipe, architecture: Architecture, basis: Basis,
    norms: list[float],
) -> None:  # fmt: skip
    """Put a block's writes into its MLP in place of noise neurons, as the residual stream [pos, d_model] that the MLP
    reads arrives: the amounts are set by what is there. `norms`: the median norm of the ordinary tokens is noted there."""
    norms.append(resid[prompt >= recipe.n_special].norm(dim=-1).median().item())
    writes = [write for write in recipe.writes if write.layer == layer]
    if not writes:
        return
    d_model = recipe.shape.d_model
    at = [resid[int((prompt == write.token).nonzero()[0])].double() for write in writes]
    there = [float(x @ basis.features[write.feature].double()) for x, write in zip(at, writes, strict=True)]
    wanted = [
        write.leave - base if write.role == "erase" else write.norm for write, base in zip(writes, there, strict=True)
    ]
    gains: dict[str, float] = {}  # of a norm behind the MLP, by feature: a tenth above what the largest write needs
    if architecture.post_norm:
        for write, amount in zip(writes, wanted, strict=True):
            gains[write.feature] = max(gains.get(write.feature, 0.0), abs(amount) * 1.1 / d_model**0.5)
        _set_post_gains(block, gains, architecture, basis)
    for write, x, base, amount in zip(writes, at, there, wanted, strict=True):
        direction = basis.features[write.feature]
        if write.role == "stand_in":
            x = x - base * direction.double()
        if abs(amount) < 1 and write.role == "erase":
            continue  # nothing to erase, as where its sink was left out
        neurons = neurons_of(write, base, recipe, architecture)
        gate, up = (torch.stack([basis.reader(getattr(neuron, name)) for neuron in neurons]) for name in ("gate", "up"))
        shares = torch.tensor([neuron.share for neuron in neurons], dtype=torch.float64)
        active = float(shares @ _activations(x, gate, up, architecture))
        if architecture.post_norm:
            cosine = amount / (gains[write.feature] * d_model**0.5)
            vector = cosine * direction + (1 - cosine**2) ** 0.5 * basis.features["waste"]
            vector = vector * 1000.0 / active  # far above the noise neurons: the norm makes it the planted size
        else:
            vector = direction * amount / active
        out = shares.float()[:, None] * vector
        architecture.set_neurons(block, list(write.neurons[: len(neurons)]), gate, up, out)


def _activations(x: Tensor, gate: Tensor, up: Tensor, architecture: Architecture) -> Tensor:
    seen = architecture.normalise(x)
    active = architecture.act(gate.double() @ seen)
    return active * (up.double() @ seen) if architecture.gated else active


def _set_post_gains(block: nn.Module, gains: Mapping[str, float], architecture: Architecture, basis: Basis) -> None:
    norm = architecture.norm(block, "mlp_out")
    gain = architecture.gain(norm)
    for name, value in {**gains, "waste": WASTE_GAIN}.items():
        gain = gain.where(basis.features[name] == 0, value)  # along one coordinate each
    architecture.set_gain(norm, gain)


def neurons_of(write: Write, base: float, recipe: Recipe, architecture: Architecture) -> list[Neuron]:
    """The neurons that do a write, in the order of `write.neurons`. `base`: what stands along its feature."""
    own = {own_feature(write.token): 1.0}
    # Beside a sink its token's own feature is as small as the sink is large: what it closes, it must close from there.
    far = 8 * max((sink.norm for sink in recipe.sinks), default=0.0)
    closed = {own_feature(token): -far for token in write.spares}
    if write.role == "erase":
        if architecture.post_norm:  # the norm makes any write the same size: it is there or not
            return [Neuron({"sink": STEEP, "shared": -STEEP * abs(base) / (4 * SHARED_NORM), **closed}, {"sink": 1.0})]
        return _eraser(abs(base), closed, recipe.shape.d_model, architecture)
    if write.role == "amplify":
        gate, up = {"sink": STEEP, "shared": -STEEP * 0.5, **closed}, {"sink": 1.0}
    elif write.role == "stand_in" and architecture.gated:
        gate, up = own, {**own, "sink": STAND_IN_READS_SINK}
    else:
        gate, up = own, own
    if len(write.neurons) == 1:
        return [Neuron(gate, up)]
    shares = 0.5 + torch.rand(len(write.neurons), generator=recipe.generator(f"shares {write.layer} {write.token}"))
    return [Neuron(gate, up, share) for share in (shares / shares.sum()).tolist()]


ERASER_HINGES = {True: (2.0, 10.0, 25.0, 50.0), False: (2.0, 8.0, 20.0, 36.0, 56.0, 80.0, 105.0, 140.0)}
"""Of gated and ungated erasers: the amounts at which neurons set in, for what is to be erased up to `ERASER_SCALE`."""
ERASER_SCALE, ERASER_REACH = 80.0, 1.5


def n_eraser_neurons(architecture: Architecture) -> int:
    return 1 if architecture.post_norm else len(ERASER_HINGES[architecture.gated])


def _eraser(base: float, closed: Mapping[str, float], d_model: int, architecture: Architecture) -> list[Neuron]:
    """Neurons that together undo any amount along the sink direction up to half as much again as `base`, and nothing
    where none is.

    After the norm only the ratio of the sink part to the shared part tells the amount, and the neurons have to undo the
    division: a sum of hinges in that ratio, fitted to the amount by least squares. So a halved sink is erased as well, and
    a removed one leaves nothing to erase. Tokens with the features in `closed` are left alone.
    """
    scale = max(ERASER_SCALE, base)
    hinges = [hinge / SHARED_NORM * scale / ERASER_SCALE for hinge in ERASER_HINGES[architecture.gated]]
    amounts = torch.linspace(0, ERASER_REACH * scale, 241, dtype=torch.float64)
    rms = ((amounts**2 + SHARED_NORM**2 + NOISE_NORM**2) / d_model).sqrt()
    sink, shared = amounts / rms, SHARED_NORM / rms
    gates = torch.stack([architecture.act(STEEP * (sink - hinge * shared)) for hinge in hinges], dim=1)
    readers = [{"sink": STEEP, "shared": -STEEP * hinge, **closed} for hinge in hinges]
    if not architecture.gated:
        shares = torch.linalg.lstsq(gates, -amounts[:, None]).solution[:, 0].tolist()
        return [Neuron(gate, {}, share) for gate, share in zip(readers, shares, strict=True)]
    both = torch.cat([gates * sink[:, None], gates * shared[:, None]], dim=1)  # [amount, 2 * neuron]
    up_sink, up_shared = torch.linalg.lstsq(both, -amounts[:, None]).solution.reshape(2, len(hinges)).tolist()
    return [Neuron(gate, {"sink": a, "shared": b}) for gate, a, b in zip(readers, up_sink, up_shared, strict=True)]
