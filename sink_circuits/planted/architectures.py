"""The Hugging Face architectures that planted circuits are put into: how each is built, and where its weights go.

A circuit is stated over the normalised residual stream: readers are weights on it, and `read_through` divides out the gain
and bias of the norm in front. What differs between architectures stands here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sink_circuits.planted.circuits import NOISE_NORM, SHARED_NORM, Shape

ROPE_THETA = 1e8  # the slowest rotary pair turns by 1e-4 over a whole context: it carries the sink heads' keys
EPS = 1e-6


@dataclass(frozen=True)
class Architecture:
    """One variant. `reads`: what MLP and attention see of the residual stream: "rms", "layer" (norm) or "raw".

    `norms`: the block's norms by place ("attn_in", "mlp_in", "attn_out", "mlp_out"), where there are any. `gated`,
    `parallel`, `windowed`, `grouped` (queries share keys) say what kind of model it is. `biased`: linear maps and norms
    have biases. `gain_offset`: a norm's gain is this plus its weight. `rotary`: how many of a head's coordinates turn
    (0: learned positions). `qk_norm`: queries and keys are normalised. `loud`: the noise that makes ordinary tokens' norm
    grow by about a quarter.
    """

    name: str
    model_class: str
    config_class: str
    config: Callable[[Shape], dict]
    blocks: str
    norms: dict[str, str]
    activation: str
    reads: str = "rms"
    gated: bool = True
    parallel: bool = False
    windowed: bool = False
    grouped: bool = True
    biased: bool = False
    gain_offset: float = 0.0
    rotary: float = 1.0
    qk_norm: bool = False
    loud: float = 4.0

    @property
    def post_norm(self) -> bool:
        return "mlp_out" in self.norms

    def make(self, shape: Shape) -> nn.Module:
        """The Hugging Face model, in evaluation mode with eager attention; its random weights mean nothing yet."""
        import transformers

        config = getattr(transformers, self.config_class)(
            **self.config(shape), architectures=[self.model_class], attn_implementation="eager", dtype="float32",
            use_cache=False, bos_token_id=0, eos_token_id=None, tie_word_embeddings=False,
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):  # the constructor draws weights that are all replaced later
            return getattr(transformers, self.model_class)(config).eval()

    def layers(self, model: nn.Module) -> nn.ModuleList:
        return model.get_submodule(self.blocks)  # type: ignore[return-value]

    def norm(self, block: nn.Module, place: str) -> nn.Module | None:
        return block.get_submodule(self.norms[place]) if place in self.norms else None

    def mlp_reader(self, block: nn.Module) -> nn.Module:
        """The module whose input is the residual stream that the MLP reads."""
        return self.norm(block, "mlp_in") or block.get_submodule("mlp")

    def normalise(self, resid: Tensor) -> Tensor:
        """What readers see of the residual stream [..., d_model], but for gain and bias: norm sqrt(d_model), or for
        models that read it raw, so scaled that an ordinary token's is."""
        d_model = resid.shape[-1]
        if self.reads == "raw":
            return resid * (d_model / (SHARED_NORM**2 + NOISE_NORM**2)) ** 0.5
        centred = resid - resid.mean(-1, keepdim=True) if self.reads == "layer" else resid
        return centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt()

    def act(self, x: Tensor) -> Tensor:
        from transformers.activations import ACT2FN

        return ACT2FN[self.activation](x)

    def read_through(self, norm: nn.Module | None, weights: Tensor) -> tuple[Tensor, Tensor]:
        """(weight, bias) of a linear map behind `norm` that reads `weights` [..., d_model] of the normalised stream."""
        if norm is None:
            return weights * (weights.shape[-1] / (SHARED_NORM**2 + NOISE_NORM**2)) ** 0.5, torch.zeros(
                weights.shape[:-1]
            )
        weight = weights / self.gain(norm)
        bias = -(weight @ norm.get_parameter("bias")) if self.biased else torch.zeros(weights.shape[:-1])
        return weight, bias

    def gain(self, norm: nn.Module) -> Tensor:
        return self.gain_offset + norm.get_parameter("weight")

    def set_gain(self, norm: nn.Module, gain: Tensor) -> None:
        norm.get_parameter("weight").copy_(gain - self.gain_offset)

    def set_embedding(self, model: nn.Module, embedding: Tensor) -> None:
        """What the residual stream starts from (learned positions aside)."""
        scale = embedding.shape[1] ** 0.5 if self.name == "gemma2" else 1.0
        model.get_input_embeddings().weight.copy_(embedding / scale)

    def set_heads(self, block: nn.Module, query: Tensor, key: Tensor, value: Tensor, output: Tensor) -> None:
        """Readers [head, d_head, d_model] of the normalised stream, and output [head, d_head, d_model]."""
        norm = self.norm(block, "attn_in")
        (q, q_bias), (k, k_bias), (v, v_bias) = (self.read_through(norm, x) for x in (query, key, value))
        out = output.flatten(0, 1).T
        if self.name == "gpt2":
            _fill(block, "attn.c_attn.weight", torch.cat([x.flatten(0, 1) for x in (q, k, v)]).T)
            _fill(block, "attn.c_attn.bias", torch.cat([x.flatten() for x in (q_bias, k_bias, v_bias)]))
            _fill(block, "attn.c_proj.weight", out.T)
        elif self.name == "gpt_neox":
            _fill(block, "attention.query_key_value.weight", torch.stack([q, k, v], dim=1).flatten(0, 2))
            _fill(block, "attention.query_key_value.bias", torch.stack([q_bias, k_bias, v_bias], dim=1).flatten())
            _fill(block, "attention.dense.weight", out)
        else:
            for name, weight in (("q_proj", q), ("k_proj", k), ("v_proj", v)):
                _fill(block, f"self_attn.{name}.weight", weight.flatten(0, 1))
            _fill(block, "self_attn.o_proj.weight", out)

    def set_neurons(self, block: nn.Module, columns, gate: Tensor, up: Tensor, out: Tensor) -> None:
        """Readers `gate`, `up` [neuron, d_model] of the normalised stream (`gate` alone where there is no gate) and what
        the neurons write, `out` [neuron, d_model]."""
        norm = self.norm(block, "mlp_in")
        weight, bias = self.read_through(norm, gate)
        if self.gated:
            _fill(block, "mlp.gate_proj.weight", weight, columns)
            _fill(block, "mlp.up_proj.weight", self.read_through(norm, up)[0], columns)
            _fill(block, "mlp.down_proj.weight", out.T, (slice(None), columns))
        elif self.name == "gpt2":
            _fill(block, "mlp.c_fc.weight", weight.T, (slice(None), columns))
            _fill(block, "mlp.c_fc.bias", bias, columns)
            _fill(block, "mlp.c_proj.weight", out, columns)
        else:
            _fill(block, "mlp.dense_h_to_4h.weight", weight, columns)
            _fill(block, "mlp.dense_h_to_4h.bias", bias, columns)
            _fill(block, "mlp.dense_4h_to_h.weight", out.T, (slice(None), columns))

    def contribution_module(self, block: nn.Module) -> nn.Module:
        """The module whose output is what the MLP adds to the residual stream."""
        return self.norm(block, "mlp_out") or block.get_submodule("mlp")

    def output_module(self, block: nn.Module) -> nn.Module:
        """The down-projection, whose input are the neurons' activations."""
        names = {"gpt2": "c_proj", "gpt_neox": "dense_4h_to_h"}
        return block.get_submodule("mlp").get_submodule(names.get(self.name, "down_proj"))

    def output_map(self, block: nn.Module) -> tuple[Tensor, Tensor | float]:
        """W_out [d_mlp, d_model] and its bias."""
        module = self.output_module(block)
        weight = module.get_parameter("weight")
        return weight if self.name == "gpt2" else weight.T, module.get_parameter("bias") if self.biased else 0.0

    def output_biases(self, block: nn.Module) -> list[Tensor]:
        """Biases that are added to the residual stream."""
        if self.name == "gpt2":
            return [block.get_parameter("attn.c_proj.bias"), block.get_parameter("mlp.c_proj.bias")]
        if self.name == "gpt_neox":
            return [block.get_parameter("attention.dense.bias"), block.get_parameter("mlp.dense_4h_to_h.bias")]
        return []

    def coordinates(self, d_head: int) -> tuple[int, int, tuple[int, int]]:
        """Coordinates of a head in which position (almost) does not tell: for sinks, for attended decoys, and a pair to
        spare."""
        if self.rotary == 1.0:
            slowest = d_head // 2 - 1
            return slowest, d_head - 1, (slowest - 1, d_head - 2)
        return d_head - 1, d_head - 2, (d_head - 3, d_head - 4)


def _fill(block: nn.Module, name: str, values: Tensor, where=slice(None)) -> None:
    block.get_parameter(name)[where] = values


def _llama(shape: Shape) -> dict:
    return {
        "hidden_size": shape.d_model, "num_hidden_layers": shape.n_layers, "num_attention_heads": shape.n_heads, "head_dim": shape.d_head,
        "num_key_value_heads": shape.n_key_heads, "intermediate_size": shape.d_mlp, "vocab_size": shape.d_vocab,
        "max_position_embeddings": shape.n_ctx, "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_THETA}, "rms_norm_eps": EPS,
        "pad_token_id": None,
    }  # fmt: skip


def _gemma2(shape: Shape) -> dict:
    return {
        **_llama(shape), "sliding_window": shape.window, "query_pre_attn_scalar": shape.d_head, "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0, "hidden_activation": "gelu_pytorch_tanh",
    }  # fmt: skip


def _gpt2(shape: Shape) -> dict:
    return {
        "n_embd": shape.d_model, "n_layer": shape.n_layers, "n_head": shape.n_heads, "n_inner": shape.d_mlp, "vocab_size": shape.d_vocab,
        "n_positions": shape.n_ctx, "layer_norm_epsilon": EPS,
    }  # fmt: skip


def _gpt_neox(shape: Shape) -> dict:
    return {
        "hidden_size": shape.d_model, "num_hidden_layers": shape.n_layers, "num_attention_heads": shape.n_heads,
        "intermediate_size": shape.d_mlp, "vocab_size": shape.d_vocab, "max_position_embeddings": shape.n_ctx, "layer_norm_eps": EPS,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
    }  # fmt: skip


_IN = {"attn_in": "input_layernorm", "mlp_in": "post_attention_layernorm"}
_OUT = {"attn_out": "post_attention_layernorm", "mlp_out": "post_feedforward_layernorm"}

ARCHITECTURES = {
    one.name: one
    for one in (
        Architecture("llama", "LlamaForCausalLM", "LlamaConfig", _llama, "model.layers", _IN, "silu"),
        Architecture(
            "mistral", "MistralForCausalLM", "MistralConfig", lambda shape: {**_llama(shape), "sliding_window": shape.window},
            "model.layers", _IN, "silu", windowed=True,
        ),
        Architecture(
            "gpt2", "GPT2LMHeadModel", "GPT2Config", _gpt2, "transformer.h", {"attn_in": "ln_1", "mlp_in": "ln_2"}, "gelu_new",
            reads="layer", gated=False, grouped=False, biased=True, rotary=0.0, loud=2.0,
        ),
        Architecture(
            "gpt_neox", "GPTNeoXForCausalLM", "GPTNeoXConfig", _gpt_neox, "gpt_neox.layers", _IN, "gelu",
            reads="layer", gated=False, parallel=True, grouped=False, biased=True, rotary=0.25, loud=2.0,
        ),
        Architecture(
            "gemma2", "Gemma2ForCausalLM", "Gemma2Config", _gemma2, "model.layers",
            {"attn_in": "input_layernorm", "mlp_in": "pre_feedforward_layernorm", **_OUT}, "gelu_pytorch_tanh",
            windowed=True, gain_offset=1.0, loud=3.0,
        ),
        Architecture(
            "olmo2", "Olmo2ForCausalLM", "Olmo2Config", _llama, "model.layers", _OUT, "silu", reads="raw", grouped=False, qk_norm=True,
            loud=3.0,
        ),
    )
}  # fmt: skip
"""Plain gated; sliding windows; ungated with learned positions; ungated and parallel; norms before and after; after only."""
