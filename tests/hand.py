"""A Llama forward pass written out by hand in float64, from the state dict alone: the other side of every parity test.

It imports nothing of the project and nothing of transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

Edit = float | Callable[[Tensor], Tensor]  # a factor, or a function of the contribution [d_model]


class Run(NamedTuple):
    residuals: Tensor  # resid_post, before any final norm [layer, pos, d_model]
    pattern: Tensor  # [layer, head, query, key]
    contributions: Tensor  # what each MLP really added, after the edit [layer, pos, d_model]
    logits: Tensor  # [pos, d_vocab]


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * gain


def rotate(x: Tensor, theta: float) -> Tensor:
    """Rotary embedding of [head, pos, d_head]: coordinate i turns with coordinate i + d_head / 2."""
    n_pos, d_head = x.shape[1:]
    frequency = theta ** (-torch.arange(0, d_head, 2, dtype=x.dtype) / d_head)
    angle = torch.arange(n_pos, dtype=x.dtype)[:, None] * frequency  # [pos, d_head / 2]
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], dim=-1)


def forward(
    state_dict: Mapping[str, Tensor], config: Any, tokens: Tensor, edits: Mapping[tuple[int, int], Edit] | None = None
) -> Run:
    """Run tokens [pos]; `edits[layer, pos]` scales (or replaces by a function of it) that MLP contribution."""
    edits = dict(edits or {})
    weights = {name: tensor.detach().double() for name, tensor in state_dict.items()}
    n_heads, n_kv, d_head = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    theta, eps = config.rope_parameters["rope_theta"], config.rms_norm_eps
    n_pos = len(tokens)
    hidden = torch.ones(n_pos, n_pos, dtype=torch.bool).triu(1)

    x = weights["model.embed_tokens.weight"][tokens]
    residuals, patterns, contributions = [], [], []
    for layer in range(config.num_hidden_layers):
        w = {
            name.removeprefix(f"model.layers.{layer}.").removesuffix(".weight"): tensor
            for name, tensor in weights.items()
            if name.startswith(f"model.layers.{layer}.")
        }
        normed = rms_norm(x, w["input_layernorm"], eps)

        def heads(name: str, n: int) -> Tensor:
            return (normed @ w[f"self_attn.{name}"].T).reshape(n_pos, n, d_head).transpose(0, 1)  # noqa: B023

        query = rotate(heads("q_proj", n_heads), theta)  # [head, pos, d_head]
        key = rotate(heads("k_proj", n_kv), theta).repeat_interleave(n_heads // n_kv, dim=0)
        value = heads("v_proj", n_kv).repeat_interleave(n_heads // n_kv, dim=0)
        scores = (query @ key.transpose(1, 2) / d_head**0.5).masked_fill(hidden, -torch.inf)
        pattern = scores.softmax(-1)
        attended = (pattern @ value).transpose(0, 1).reshape(n_pos, -1)
        x = x + attended @ w["self_attn.o_proj"].T

        normed = rms_norm(x, w["post_attention_layernorm"], eps)
        gate = torch.nn.functional.silu(normed @ w["mlp.gate_proj"].T)
        contribution = (gate * (normed @ w["mlp.up_proj"].T)) @ w["mlp.down_proj"].T
        for pos in range(n_pos):
            edit = edits.pop((layer, pos), None)
            if edit is not None:
                contribution[pos] = edit(contribution[pos]) if callable(edit) else edit * contribution[pos]
        x = x + contribution
        residuals.append(x)
        patterns.append(pattern)
        contributions.append(contribution)
    if edits:
        raise ValueError(f"edits outside the run: {sorted(edits)}")
    logits = rms_norm(x, weights["model.norm.weight"], eps) @ weights["lm_head.weight"].T
    return Run(torch.stack(residuals), torch.stack(patterns), torch.stack(contributions), logits)


def sink_scores(pattern: Tensor) -> Tensor:
    """Mean attention [layer, head, key] over the later queries; NaN for the last key, which has none."""
    n_pos = pattern.shape[-1]
    later = torch.ones(n_pos, n_pos, dtype=torch.bool).tril(-1)  # [query, key]
    return (pattern * later).sum(-2) / later.sum(-2)


def log_odds(pattern: Tensor) -> Tensor:
    """Log-odds [layer, head, key] of the key against all others, averaged over the later queries."""
    n_pos = pattern.shape[-1]
    later = torch.ones(n_pos, n_pos, dtype=torch.bool).tril(-1)
    odds = torch.where(later, pattern.log() - torch.log1p(-pattern), 0.0)
    return odds.sum(-2) / later.sum(-2)
