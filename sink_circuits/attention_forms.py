"""How each layer of a model attends, as its configuration says; windows where only the patterns themselves tell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from sink_circuits.attention import AttentionForm
from sink_circuits.errors import ModelError
from sink_circuits.twin import TwinRefused


def configured_form(model, layer: int) -> AttentionForm:
    """A layer's attention as the configuration states it, for models without a twin."""
    cfg = model.cfg
    window = None
    if getattr(cfg, "use_local_attn", False) and cfg.attn_types and cfg.attn_types[layer] == "local":
        window = cfg.window_size
    kinds = layer_types_of(model)
    if kinds and kinds[layer] == "sliding_attention":
        hf_config = getattr(getattr(model, "original_model", None), "config", cfg)
        window = getattr(hf_config, "sliding_window", None)
    cap = getattr(cfg, "attn_scores_soft_cap", -1.0)
    scale = getattr(cfg, "attn_scale", -1.0)
    own = getattr(_attention_of(model, layer), "scaling", None)  # a bridge's `attn_scale` may be the default one
    scaling = own if isinstance(own, float) else 1.0 / scale if scale and scale > 0 else cfg.d_head**-0.5
    sinks = getattr(_attention_of(model, layer), "sinks", None)
    learned = sinks.detach() if isinstance(sinks, torch.Tensor) and sinks.shape == (cfg.n_heads,) else None
    return AttentionForm(scaling, window, cap if cap and cap > 0 else None, learned)


@torch.no_grad()
def with_measured_windows(model, forms: tuple[AttentionForm, ...], backend: str) -> tuple[AttentionForm, ...]:
    """The forms with the windows that the patterns themselves show, on a text longer than the configured window.

    Only for bridges whose configuration speaks of a window that may hold for some layers (GPT-Neo): which ones, no
    two architectures say alike. Raises ModelError where the window is too long to be looked at.
    """
    config = getattr(getattr(model, "original_model", None), "config", None)
    window = getattr(config, "sliding_window", None) or getattr(config, "window_size", None)
    if backend != "bridge" or not isinstance(window, int) or window >= model.cfg.n_ctx:
        return forms
    if window > 2048:
        raise ModelError(f"the window of {window} tokens cannot be checked without the fast path: at most 2048 can.")
    tokens = torch.arange(min(window + 8, model.cfg.n_ctx), device=next(model.parameters()).device) % model.cfg.d_vocab
    first_seen: dict[int, int] = {}

    def hook(layer: int):
        def look(pattern: Tensor, hook) -> None:
            first_seen[layer] = int((pattern[0, :, -1] > 0).any(dim=0).int().argmax())

        return f"blocks.{layer}.attn.hook_pattern", look

    model.run_with_hooks(tokens[None], fwd_hooks=[hook(layer) for layer in range(len(forms))], stop_at_layer=len(forms))
    return tuple(
        replace(form, window=len(tokens) - first_seen[layer] if first_seen[layer] > 0 else None)
        for layer, form in enumerate(forms)
    )


def layer_types_of(model) -> Sequence[str]:
    """What the configuration calls each layer's attention ("full_attention", "sliding_attention", ...); none where it does not say."""
    kinds = getattr(_text_config(model), "layer_types", None) or ()
    return kinds if len(kinds) == model.cfg.n_layers else ()


def check_windows(model, forms: Sequence[AttentionForm]) -> None:
    """Raises TwinRefused where a layer's window stands in the model's attention mask alone (Qwen2-MoE), which the fast path does not
    build: on a short text the two agree."""
    for layer, kind in enumerate(layer_types_of(model)):
        if (
            kind == "sliding_attention"
            and forms[layer].window is None
            and configured_form(model, layer).window is not None
        ):
            raise TwinRefused(f"the window of layer {layer} is in the model's attention mask alone")


def check_attention(model) -> None:
    """Raises ModelError for attention whose keys come and go by other rules than a window."""
    chunk = getattr(_text_config(model), "attention_chunk_size", None)
    if "chunked_attention" in layer_types_of(model) and isinstance(chunk, int) and chunk < model.cfg.n_ctx:
        raise ModelError(
            f"layers of this model attend within chunks of {chunk} tokens, so that which queries see a key changes along the text: sink "
            "scores of such layers are not defined here; use a model of full or sliding attention."
        )


def _text_config(model):
    """The configuration of the text model; TransformerLens' own where there is no Hugging Face model behind it."""
    config = getattr(getattr(model, "original_model", None), "config", model.cfg)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _attention_of(model, layer: int):
    """The Hugging Face module that a bridge's attention stands for; None for a HookedTransformer."""
    blocks = getattr(model, "blocks", None)
    return getattr(getattr(blocks[layer], "attn", None), "original_component", None) if blocks is not None else None
