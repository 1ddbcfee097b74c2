"""One MLP taken apart: its stages from its own weights, dense (gated or not) or a mixture of experts.

Stages are named: `gate` (input @ W_gate), `up` (input @ W_in), `activation` (the non-linearity of the gate, or of `up`
where there is no gate), `product` (activation * up), `output` (product @ W_out). They are computed by hand and held
against what the model itself adds to the residual stream, so a wrong guess about an architecture is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sink_circuits.adapters import backend_of
from sink_circuits.anatomy.reading import check_equal, norms_behind
from sink_circuits.errors import ModelError

STAGES = ("input", "gate", "up", "activation", "product", "output")
Rows = Float[Tensor, "pos width"]


@dataclass(frozen=True)
class Mlp:
    """A dense MLP. Weights as TransformerLens has them: W_in, W_gate [d_model, d_mlp], W_out [d_mlp, d_model].

    `W_gate` None: not gated. `late_bias`: b_in is added to the product (HookedTransformer's gated MLP). `post_norm`: the
    norm between the MLP and the residual stream, or None.
    """

    layer: int
    module: nn.Module
    W_in: Float[Tensor, "d_model d_mlp"]
    W_out: Float[Tensor, "d_mlp d_model"]
    W_gate: Float[Tensor, "d_model d_mlp"] | None
    b_in: Tensor | float
    b_gate: Tensor | float
    b_out: Tensor | float
    activation: Callable[[Tensor], Tensor]
    late_bias: bool
    post_norm: Callable[[Tensor], Tensor] | None

    def stages(self, x: Float[Tensor, "pos d_model"]) -> dict[str, Rows]:
        """Every stage that exists, from the MLP's input; `output` is before any norm behind the MLP."""
        up = x @ self.W_in + (0.0 if self.late_bias else self.b_in)
        if self.W_gate is None:
            activation = product = self.activation(up)
            found = {"input": x, "up": up, "activation": activation}
        else:
            gate = x @ self.W_gate + self.b_gate
            activation = self.activation(gate)
            product = activation * up + (self.b_in if self.late_bias else 0.0)
            found = {"input": x, "gate": gate, "up": up, "activation": activation, "product": product}
        return {**found, "output": product @ self.W_out + self.b_out}

    def output(self, x: Float[Tensor, "pos d_model"]) -> Rows:
        """What the MLP gives for these inputs (behind its own norm), before any norm that follows it."""
        return self.stages(x)["output"]

    def post(self, x: Float[Tensor, "pos d_model"]) -> Float[Tensor, "pos d_mlp"]:
        """The neurons' activations, the down-projection's input."""
        found = self.stages(x)
        return found.get("product", found["activation"])


@dataclass(frozen=True)
class Experts:
    """A mixture of experts: `module` is the whole MLP, `experts` what holds their weights (Hugging Face's own module)."""

    layer: int
    module: nn.Module
    experts: nn.Module
    hooked: nn.Module
    post_norm: Callable[[Tensor], Tensor] | None

    def route(self, x: Float[Tensor, "pos d_model"]) -> tuple[Tensor, Tensor, Tensor]:
        """(output [pos, d_model], chosen experts [pos, rank], their weights [pos, rank]), largest weight first."""
        seen: list = []
        handle = self.hooked.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append((*args, *kwargs.values())), with_kwargs=True
        )
        try:
            output = _first(self.module(x[None]))[0]
        finally:
            handle.remove()
        given = [value for value in seen[0] if isinstance(value, Tensor)] if seen else []
        if (
            len(given) != 3
            or given[1].is_floating_point()
            or given[1].shape != given[2].shape
            or given[1].shape[0] != len(x)
        ):
            raise ModelError(
                f"the experts of layer {self.layer} are not called with (input, chosen experts, weights): their parts do not "
                "exist here, only the whole MLP's input and output."
            )
        order = given[2].argsort(dim=-1, descending=True)
        return output, given[1].gather(-1, order), given[2].gather(-1, order)

    def output(self, x: Float[Tensor, "pos d_model"]) -> Rows:
        """What the MLP gives for these inputs (behind its own norm), before any norm that follows it."""
        return self.route(x)[0]

    def written(
        self, x: Float[Tensor, "pos d_model"], expert: Int[Tensor, " pos"], weight: Float[Tensor, " pos"]
    ) -> Rows:
        """What each position's chosen expert adds, times its weight."""
        return self.experts(x, expert[:, None], weight[:, None].to(x.dtype))

    def at(self, x: Float[Tensor, "1 d_model"]) -> ChosenExperts:
        """The experts that the router chose for one position's input, as one MLP. Raises ModelError where weights cannot be read."""
        output, index, weight = self.route(x)
        numbers = index[0].tolist()
        rest, bias = output[0], torch.zeros_like(output[0])
        for rank, expert in enumerate(numbers):
            rest = rest - self.written(x, index[:, rank], weight[:, rank])[0]
            bias = bias + weight[0, rank] * _bias(self.experts, "down_proj_bias", expert)
        return self.of(numbers, rest + bias)

    def of(self, numbers: Sequence[int], b_out: Tensor | float = 0.0) -> ChosenExperts:
        """These experts as one MLP. Raises ModelError where their weights cannot be read."""
        packed, down = (getattr(self.experts, name, None) for name in ("gate_up_proj", "down_proj"))
        if not isinstance(packed, Tensor) or not isinstance(down, Tensor):
            raise ModelError(
                f"the weights of the experts of layer {self.layer} cannot be read: their neurons are not known, only what each expert "
                "writes (mlp_stages)."
            )
        transposed = bool(getattr(self.experts, "is_transposed", False))
        both = [self._halves(packed[one] if transposed else packed[one].T) for one in numbers]
        W_gate, W_in = (torch.cat(parts, dim=-1).detach() for parts in zip(*both, strict=True))
        W_out = torch.cat([down[one] if transposed else down[one].T for one in numbers]).detach()
        return ChosenExperts(
            self.layer, self, tuple(int(one) for one in numbers), W_in, W_gate, W_out, b_out, self.post_norm
        )

    def _halves(self, both: Tensor) -> tuple[Tensor, Tensor]:
        """Gate and up, which lie packed in the last axis."""
        if getattr(self.experts, "is_concatenated", True):
            gate, up = both.chunk(2, dim=-1)
            return gate, up
        return both[..., ::2], both[..., 1::2]

    def stages(self, x: Float[Tensor, "pos d_model"], expert: int) -> dict[str, Rows]:
        """The stages of one expert on these inputs, whether they are sent to it or not; only those that can be read.

        Experts with packed weights (gate and up in one) have all; of others only input and output are known.
        """
        ones = torch.ones(len(x), dtype=x.dtype, device=x.device)
        output = self.written(x, torch.full((len(x),), expert, device=x.device), ones)
        packed, down = (getattr(self.experts, name, None) for name in ("gate_up_proj", "down_proj"))
        activation, apply_gate = (getattr(self.experts, name, None) for name in ("act_fn", "_apply_gate"))
        if not isinstance(packed, Tensor) or not isinstance(down, Tensor) or apply_gate is None:
            return {"input": x, "output": output}
        transposed = bool(getattr(self.experts, "is_transposed", False))
        both = x @ (packed[expert] if transposed else packed[expert].T) + _bias(
            self.experts, "gate_up_proj_bias", expert
        )
        product = apply_gate(both)
        by_hand = product @ (down[expert] if transposed else down[expert].T) + _bias(
            self.experts, "down_proj_bias", expert
        )
        check_equal(
            by_hand, output, f"expert {expert} of layer {self.layer}, computed from its weights, differs", x.dtype
        )
        gate, up = self._halves(both)
        found = {"input": x, "gate": gate, "up": up, "product": product, "output": output}
        if activation is not None and torch.allclose(activation(gate) * up, product, atol=1e-6, rtol=1e-4):
            found["activation"] = activation(gate)  # elsewhere (GPT-OSS) the product is no activation times up
        return {name: found[name] for name in STAGES if name in found}


@dataclass(frozen=True)
class ChosenExperts:
    """Some experts of a mixture as one MLP: their neurons one expert after the other, `numbers` their order.

    Weights as in `Mlp`, [d_model, rank * d_mlp] and [rank * d_mlp, d_model]. `b_out` [d_model]: what none of their neurons
    writes at the position where they were chosen (shared experts, biases).
    """

    layer: int
    experts: Experts
    numbers: tuple[int, ...]
    W_in: Float[Tensor, "d_model neuron"]
    W_gate: Float[Tensor, "d_model neuron"]
    W_out: Float[Tensor, "neuron d_model"]
    b_out: Tensor | float
    post_norm: Callable[[Tensor], Tensor] | None

    def output(self, x: Float[Tensor, "pos d_model"]) -> Rows:
        """What the whole mixture gives for these inputs, before any norm that follows it."""
        return self.experts.output(x)

    def post(self, x: Float[Tensor, "pos d_model"]) -> Float[Tensor, "pos neuron"]:
        """The neurons' activations times the router's weight of their expert: 0 where a position is not sent to it."""
        _, index, weight = self.experts.route(x)
        parts = []
        for expert in self.numbers:
            own = (weight * (index == expert)).sum(dim=-1, keepdim=True)
            parts.append(self.experts.stages(x, expert)["product"] * own.to(x.dtype))
        return torch.cat(parts, dim=-1)


def mlp_of(model, layer: int) -> Mlp | Experts:
    """The MLP of one block. Raises ModelError where neither weights nor experts can be read."""
    module = model.blocks[layer].mlp
    original = _unwrapped(module)
    post_norm = norms_behind(model, "mlp", [layer])[0]
    hooked = getattr(original, "experts", None)
    if isinstance(hooked, nn.Module) and not isinstance(hooked, nn.ModuleList):
        return Experts(layer, module, _unwrapped(hooked), hooked, post_norm)
    weights = {name: _weight(module, original, name) for name in ("W_in", "W_out", "W_gate")}
    if weights["W_in"] is None or weights["W_out"] is None:
        raise ModelError(
            f"the MLP of layer {layer} ({type(original).__name__}) is no gated or plain MLP, nor experts that can be read: its "
            "stages and neurons do not exist here."
        )
    b_in, b_gate, b_out = (
        0.0 if b is None else b for b in (getattr(module, name, None) for name in ("b_in", "b_gate", "b_out"))
    )
    late_bias = backend_of(model) == "hooked" and weights["W_gate"] is not None
    activation = _activation(module, original, layer)
    return Mlp(
        layer,
        module,
        weights["W_in"],
        weights["W_out"],
        weights["W_gate"],
        b_in,
        b_gate,
        b_out,
        activation,
        late_bias,
        post_norm,
    )


@torch.no_grad()
def checked_output(
    mlp: Mlp | Experts | ChosenExperts, x: Float[Tensor, "pos d_model"], contribution: Float[Tensor, "pos d_model"]
) -> Rows:
    """The output of each position, before any norm behind the MLP; ModelError when it is not what the model adds."""
    output = mlp.output(x)
    behind = output if mlp.post_norm is None else mlp.post_norm(output)
    check_equal(
        behind,
        contribution,
        f"the MLP of layer {mlp.layer}, computed from its weights, differs from what it adds",
        x.dtype,
    )
    return output


def _first(out):
    return out[0] if isinstance(out, tuple) else out


def _unwrapped(module):
    """The Hugging Face module behind a bridge's component; HookedTransformer's own modules are as they are."""
    while isinstance(inner := getattr(module, "original_component", None), nn.Module):
        module = inner
    return module


def _weight(module, original, name: str) -> Tensor | None:
    own = getattr(module, name, None)
    if isinstance(own, Tensor):
        return own.detach()
    plain = getattr(original, {"W_in": "up_proj", "W_gate": "gate_proj", "W_out": "down_proj"}[name], None)
    return plain.weight.detach().T if isinstance(plain, nn.Linear) else None


def _activation(module, original, layer: int) -> Callable[[Tensor], Tensor]:
    for owner in (module, original):
        for name in ("act_fn", "activation_fn", "act", "activation", "gelu_impl"):
            if callable(found := getattr(owner, name, None)):
                return found
    raise ModelError(
        f"the MLP of layer {layer} ({type(original).__name__}) names no activation function: its stages are not known."
    )


def _bias(experts: nn.Module, name: str, expert: int) -> Tensor | float:
    bias = getattr(experts, name, None)
    return 0.0 if bias is None else bias[expert]
