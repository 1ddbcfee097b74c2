"""A Llama forward pass written out by hand in float64, from the state dict alone: the other side of every parity test.

It imports nothing of the project and nothing of transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

Edit = float | Callable[[Tensor], Tensor]  # a factor, or a function of the contribution [d_model]


class Run(NamedTuple):
    residuals: Tensor  # resid_post, before any final norm [layer, pos, d_model]
    pattern: Tensor  # [layer, head, query, key]
    contributions: Tensor  # what each MLP really added, after the edit [layer, pos, d_model]
    logits: Tensor  # [pos, d_vocab]
    parts: dict[
        tuple[str, int], Tensor
    ]  # (name, layer) -> q, k, v before rotation [head, pos, d_head]; others [pos, d_model]


def rms_norm(x: Tensor, gain: Tensor, eps: float, scale: Tensor | None = None) -> Tensor:
    """`scale` [pos, 1]: another denominator than x's own."""
    return x / (rms(x, eps) if scale is None else scale) * gain


def rms(x: Tensor, eps: float) -> Tensor:
    return (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def rotate(x: Tensor, theta: float) -> Tensor:
    """Rotary embedding of [head, pos, d_head]: coordinate i turns with coordinate i + d_head / 2."""
    n_pos, d_head = x.shape[1:]
    frequency = theta ** (-torch.arange(0, d_head, 2, dtype=x.dtype) / d_head)
    angle = torch.arange(n_pos, dtype=x.dtype)[:, None] * frequency  # [pos, d_head / 2]
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], dim=-1)


def layer_weights(weights: Mapping[str, Tensor], layer: int) -> dict[str, Tensor]:
    prefix = f"model.layers.{layer}."
    return {
        name.removeprefix(prefix).removesuffix(".weight"): tensor
        for name, tensor in weights.items()
        if name.startswith(prefix)
    }


def mlp(w: Mapping[str, Tensor], x: Tensor, eps: float, scale: Tensor | None = None) -> Tensor:
    """What the MLP adds to the residual stream x."""
    normed = rms_norm(x, w["post_attention_layernorm"], eps, scale)
    gate = torch.nn.functional.silu(normed @ w["mlp.gate_proj"].T)
    return (gate * (normed @ w["mlp.up_proj"].T)) @ w["mlp.down_proj"].T


def forward(
    state_dict: Mapping[str, Tensor], config: Any, tokens: Tensor, edits: Mapping[tuple[int, int], Edit] | None = None,
    clean: Run | None = None, held: Collection[tuple[str, int, int]] = (),
) -> Run:  # fmt: skip
    """Run tokens [pos]; `edits[layer, pos]` scales (or replaces by a function of it) that MLP contribution.

    `held`: (name, layer, pos) of what is taken from the run `clean` instead: "q", "k", "v", "attn_out", "mlp_out" (which
    is then edited), "resid_post", or the norms' denominators "scale1" (before attention) and "scale2" (before the MLP).
    """
    edits = dict(edits or {})
    weights = {name: tensor.detach().double() for name, tensor in state_dict.items()}
    n_heads, n_kv, d_head = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    theta, eps = config.rope_parameters["rope_theta"], config.rms_norm_eps
    n_pos = len(tokens)
    hidden = torch.ones(n_pos, n_pos, dtype=torch.bool).triu(1)
    parts: dict[tuple[str, int], Tensor] = {}

    def part(name: str, layer: int, x: Tensor) -> Tensor:
        positions = [pos for what, at, pos in held if (what, at) == (name, layer)]
        if positions:
            x = x.clone()
            x[..., positions, :] = clean.parts[name, layer][..., positions, :]
        parts[name, layer] = x.clone()
        return x

    x = weights["model.embed_tokens.weight"][tokens]
    residuals, patterns, contributions = [], [], []
    for layer in range(config.num_hidden_layers):
        w = layer_weights(weights, layer)
        normed = rms_norm(x, w["input_layernorm"], eps, part("scale1", layer, rms(x, eps)))

        def heads(name: str, n: int) -> Tensor:
            projected = (normed @ w[f"self_attn.{name}_proj"].T).reshape(n_pos, n, d_head).transpose(0, 1)  # noqa: B023
            return part(name, layer, projected)  # noqa: B023

        query = rotate(heads("q", n_heads), theta)  # [head, pos, d_head]
        key = rotate(heads("k", n_kv), theta).repeat_interleave(n_heads // n_kv, dim=0)
        value = heads("v", n_kv).repeat_interleave(n_heads // n_kv, dim=0)
        scores = (query @ key.transpose(1, 2) / d_head**0.5).masked_fill(hidden, -torch.inf)
        pattern = scores.softmax(-1)
        attended = (pattern @ value).transpose(0, 1).reshape(n_pos, -1)
        x = x + part("attn_out", layer, attended @ w["self_attn.o_proj"].T)

        contribution = part("mlp_out", layer, mlp(w, x, eps, part("scale2", layer, rms(x, eps))))
        for pos in range(n_pos):
            edit = edits.pop((layer, pos), None)
            if edit is not None:
                contribution[pos] = edit(contribution[pos]) if callable(edit) else edit * contribution[pos]
        x = part("resid_post", layer, x + contribution)
        residuals.append(x)
        patterns.append(pattern)
        contributions.append(contribution)
    if edits:
        raise ValueError(f"edits outside the run: {sorted(edits)}")
    logits = rms_norm(x, weights["model.norm.weight"], eps) @ weights["lm_head.weight"].T
    return Run(torch.stack(residuals), torch.stack(patterns), torch.stack(contributions), logits, parts)


def patterns_of(
    state_dict: Mapping[str, Tensor], config: Any, embed: Tensor, residuals: Tensor, scales: Mapping[int, Tensor] | None = None
) -> Tensor:  # fmt: skip
    """The patterns [layer, head, query, key] that these residual streams [layer, pos, d_model] give, block by block.

    Nothing is handed from block to block: each reads the stream behind the one before, the first the embedding [pos, d_model].
    `scales`: denominators [pos, 1] of the norm before attention, of the layers in which they are not the stream's own.
    """
    weights = {name: tensor.detach().double() for name, tensor in state_dict.items()}
    n_heads, n_kv, d_head = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    n_pos = embed.shape[0]
    hidden = torch.ones(n_pos, n_pos, dtype=torch.bool).triu(1)
    patterns = []
    for layer, x in enumerate([embed, *residuals[:-1]]):
        w = layer_weights(weights, layer)
        normed = rms_norm(x, w["input_layernorm"], config.rms_norm_eps, (scales or {}).get(layer))
        query, key = (
            rotate((normed @ w[f"self_attn.{name}_proj"].T).reshape(n_pos, -1, d_head).transpose(0, 1),
                   config.rope_parameters["rope_theta"])
            for name in "qk"
        )  # fmt: skip
        scores = query @ key.repeat_interleave(n_heads // n_kv, dim=0).transpose(1, 2) / d_head**0.5
        patterns.append(scores.masked_fill(hidden, -torch.inf).softmax(-1))
    return torch.stack(patterns)


def clean_scales(clean: Run, edits: Mapping[tuple[int, int], Edit]) -> dict[int, Tensor]:
    """The clean denominators before attention, of all layers above the first edited one."""
    first = min(layer for layer, _ in edits)
    return {layer: clean.parts["scale1", layer] for layer in range(first + 1, len(clean.residuals))}


def residual_only(
    state_dict: Mapping[str, Tensor], config: Any, tokens: Tensor, edits: Mapping[tuple[int, int], Edit], scales_held: bool = False
) -> Tensor:  # fmt: skip
    """Patterns [layer, head, query, key] where an edit acts through the residual stream alone.

    Behind an edited MLP the edited position's stream is the clean one plus what the edit changes of the clean
    contribution; all else is clean.
    """
    clean = forward(state_dict, config, tokens)
    residuals = clean.residuals.clone()
    for (layer, pos), edit in edits.items():
        before = clean.contributions[layer, pos]
        residuals[layer:, pos] += (edit(before) if callable(edit) else edit * before) - before
    scales = clean_scales(clean, edits) if scales_held else None
    return patterns_of(state_dict, config, _embed(state_dict, tokens), residuals, scales)


def own_stream(
    state_dict: Mapping[str, Tensor], config: Any, tokens: Tensor, edits: Mapping[tuple[int, int], Edit], pos: int,
    scales_held: bool = False,
) -> Tensor:  # fmt: skip
    """Patterns where position `pos` alone is run again, one vector through all blocks; all others keep their clean streams."""
    clean = forward(state_dict, config, tokens)
    weights = {name: tensor.detach().double() for name, tensor in state_dict.items()}
    n_heads, n_kv, d_head = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    theta, eps = config.rope_parameters["rope_theta"], config.rms_norm_eps
    residuals, embed = clean.residuals.clone(), _embed(state_dict, tokens)
    x, first = embed[pos], min(layer for layer, _ in edits)
    for layer in range(config.num_hidden_layers):
        w = layer_weights(weights, layer)
        hold = scales_held and layer > first
        before, behind = (clean.parts[f"scale{i}", layer][pos] if hold else None for i in (1, 2))
        normed = rms_norm(x, w["input_layernorm"], eps, before)
        own = {name: (normed @ w[f"self_attn.{name}_proj"].T).reshape(-1, d_head) for name in "qkv"}
        keys, values = (clean.parts[name, layer][:, : pos + 1].clone() for name in "kv")  # [key head, pos, d_head]
        keys[:, pos], values[:, pos] = own["k"], own["v"]
        queries = torch.zeros(n_heads, pos + 1, d_head, dtype=x.dtype)
        queries[:, pos] = own["q"]
        attended = []
        for head in range(n_heads):
            key_head = head // (n_heads // n_kv)
            query = rotate(queries[head][None], theta)[0, pos]
            weights_of_keys = (rotate(keys[key_head][None], theta)[0] @ query / d_head**0.5).softmax(-1)
            attended.append(weights_of_keys @ values[key_head])
        x = x + torch.cat(attended) @ w["self_attn.o_proj"].T
        contribution = mlp(w, x, eps, behind)
        if (edit := edits.get((layer, pos))) is not None:
            contribution = edit(contribution) if callable(edit) else edit * contribution
        x = x + contribution
        residuals[layer, pos] = x
    return patterns_of(state_dict, config, embed, residuals, clean_scales(clean, edits) if scales_held else None)


def _embed(state_dict: Mapping[str, Tensor], tokens: Tensor) -> Tensor:
    return state_dict["model.embed_tokens.weight"].detach().double()[tokens]


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
