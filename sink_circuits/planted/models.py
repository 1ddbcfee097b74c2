"""Planted models as a researcher meets them: a Hugging Face model, or either of TransformerLens' classes around a copy."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sink_circuits import arguments
from sink_circuits.errors import InputError
from sink_circuits.planted.architectures import ARCHITECTURES, EPS, ROPE_THETA, Architecture
from sink_circuits.planted.circuits import Recipe, Truth, generator, name_of

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer
    from transformer_lens.model_bridge import TransformerBridge

FIRST_FREE, LAST_FREE = 4, 18  # random prompts hold no special token but the primary before the one, or so near the end
CROWD = 8


@dataclass(frozen=True, eq=False)
class Plant:
    """A Hugging Face model with a planted circuit, what it was made from, and the truth about it."""

    hf_model: nn.Module
    recipe: Recipe
    truth: Truth

    @property
    def variant(self) -> str:
        return self.recipe.variant

    @property
    def architecture(self) -> Architecture:
        return ARCHITECTURES[self.recipe.variant]

    def window(self, layer: int) -> int | None:
        """The layer's sliding window: a query sees a key when query - key < window; None sees all."""
        layer = arguments.whole(layer, "layer", high=self.recipe.shape.n_layers - 1)
        if not self.architecture.windowed or (self.variant == "gemma2" and layer % 2):
            return None
        return self.recipe.shape.window

    def text(self, name: str, n_tokens: int) -> Tensor:
        """Ordinary tokens [n_tokens] that depend on `name` only: one name, one text, cut to length. Raises InputError."""
        shape, n_tokens = self.recipe.shape, arguments.whole(n_tokens, "n_tokens")
        if not 1 < n_tokens <= shape.n_ctx:
            raise InputError(f"n_tokens is {n_tokens}: this planted model takes 2..{shape.n_ctx}.")
        ordinary = (self.recipe.n_special, shape.d_vocab, (shape.n_ctx,))
        return torch.randint(*ordinary, generator=generator(f"tokens/{name_of(name)}"))[:n_tokens].clone()

    def prompt(self, name: str, n_tokens: int = 80) -> Tensor:
        """A prompt [n_tokens] drawn from `name`: the primary at its position, one or two of every other kind of sink (in one
        prompt of four `CROWD` more of one kind) and one of every decoy, anywhere between the first tokens and the last.

        Raises InputError where they have no room.
        """
        tokens = self.text(name, n_tokens)
        first = [sink.token for sink in self.truth.sinks if sink.kind == "primary"]
        others = sorted({sink.token for sink in self.truth.sinks if sink.kind != "primary"})
        draw = generator(f"places/{name}")
        again = [token for token in others if torch.rand((), generator=draw) < 0.5]
        if others and torch.rand((), generator=draw) < 0.25:
            again += [others[int(torch.randint(len(others), (), generator=draw))]] * CROWD
        special = [*others, *again, *(decoy.token for decoy in self.truth.decoys)]
        free = torch.arange(FIRST_FREE, n_tokens - LAST_FREE)
        if len(special) > len(free):
            raise InputError(
                f"n_tokens is {n_tokens}: too short for {len(special)} special tokens and queries behind them."
            )
        places = free[torch.randperm(len(free), generator=draw)[: len(special)]]
        tokens[places] = torch.tensor(special, dtype=tokens.dtype)
        if first:
            tokens[self.recipe.primary_position] = first[0]
        return tokens

    def bridge(self) -> TransformerBridge:
        """A TransformerBridge without a tokenizer, around a copy of the model (a bridge changes what it wraps)."""
        from transformer_lens.model_bridge.sources import build_bridge_from_module

        hf_model = copy.deepcopy(self.hf_model)
        return build_bridge_from_module(
            hf_model, self.architecture.model_class, hf_config=hf_model.config, tokenizer=None, model_name="planted"
        )

    def hooked(self) -> HookedTransformer:
        """A HookedTransformer without a tokenizer, with a copy of the weights, neither folded nor centred."""
        try:
            from transformer_lens import HookedTransformer, HookedTransformerConfig
        except ImportError as error:
            raise ImportError(
                "HookedTransformer was removed in TransformerLens 4: install transformer-lens 3.9 or use bridge()."
            ) from error
        from transformer_lens.pretrained import weight_conversions

        cfg = HookedTransformerConfig(**hooked_config(self.recipe))
        convert = getattr(weight_conversions, f"convert_{_CONVERTERS.get(self.variant, self.variant)}_weights")
        model = HookedTransformer(cfg, move_to_device=False)
        model.load_and_process_state_dict(
            convert(copy.deepcopy(self.hf_model), cfg),
            fold_ln=False, center_writing_weights=False, center_unembed=False, fold_value_biases=False,
        )  # fmt: skip
        return model.eval()


@dataclass(frozen=True, eq=False)
class Planted(Plant):
    """The minimal planted model: prompts hold its kinds of token wherever they are asked for."""

    def tokens(
        self, n_tokens: int = 96, sinks: Iterable[int] = (40,), decoys: Iterable[int] = (60,), seed_name: str = "prompt"
    ) -> Tensor:
        """A prompt [n_tokens]: BOS, secondary and decoy tokens at the given positions, ordinary tokens elsewhere.

        The ordinary tokens depend on `seed_name` only: one name, one text, cut to `n_tokens`.
        """
        tokens = self.text(seed_name, n_tokens)
        sinks, decoys = (
            [arguments.whole(pos, name) for pos in arguments.several(given, name, empty=True)]
            for name, given in (("sinks", sinks), ("decoys", decoys))
        )
        for pos in sinks + decoys:
            if not 0 < pos < n_tokens:
                raise InputError(f"position {pos} is outside 1..{n_tokens - 1}: position 0 holds BOS.")
        if both := sorted(set(sinks) & set(decoys)):
            raise InputError(f"positions {both} are asked to hold both a sink and a decoy: name each position once.")
        tokens[0], tokens[sinks], tokens[decoys] = 0, 1, 2
        return tokens


_CONVERTERS = {"gpt_neox": "neox", "gemma2": "gemma"}


def hooked_config(recipe: Recipe) -> dict:
    """What HookedTransformerConfig needs to know of a planted model."""
    shape, architecture = recipe.shape, ARCHITECTURES[recipe.variant]
    config = {
        "n_layers": shape.n_layers, "d_model": shape.d_model, "n_ctx": shape.n_ctx, "d_head": shape.d_head, "n_heads": shape.n_heads,
        "d_mlp": shape.d_mlp, "d_vocab": shape.d_vocab, "act_fn": architecture.activation, "gated_mlp": architecture.gated, "eps": EPS,
        "init_weights": False, "model_name": "planted", "device": "cpu", "original_architecture": architecture.model_class,
        "parallel_attn_mlp": architecture.parallel, "normalization_type": "LN" if architecture.reads == "layer" else "RMS",
    }  # fmt: skip
    if architecture.reads != "layer":
        config["final_rms"] = True
    if architecture.grouped:
        config["n_key_value_heads"] = shape.n_key_heads
    if architecture.rotary:
        config |= {
            "positional_embedding_type": "rotary", "rotary_dim": int(shape.d_head * architecture.rotary), "rotary_adjacent_pairs": False,
            "rotary_base": int(ROPE_THETA) if architecture.rotary == 1.0 else 10000,
        }  # fmt: skip
    if architecture.windowed:
        every = ["local", "global"] if recipe.variant == "gemma2" else ["local"]
        config |= {
            "use_local_attn": True,
            "window_size": shape.window,
            "attn_types": (every * shape.n_layers)[: shape.n_layers],
        }
    if recipe.variant == "gemma2":
        config |= {
            "use_normalization_before_and_after": True,
            "attn_scores_soft_cap": 50.0,
            "output_logits_soft_cap": 30.0,
        }
    return config
