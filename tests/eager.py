"""Small random Hugging Face models, and the eager forward pass of any of them as the other side of parity tests.

It imports nothing of the project: weights are drawn here, edits are made by plain module hooks, attention weights are
those that Hugging Face's eager attention returns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import transformers
from torch import Tensor, nn

N_LAYERS, N_HEADS, D_MODEL, D_VOCAB, N_CTX, WINDOW = 4, 4, 32, 80, 128, 12

_PLAIN = {
    "hidden_size": D_MODEL, "num_hidden_layers": N_LAYERS, "num_attention_heads": N_HEADS, "num_key_value_heads": 2,
    "intermediate_size": 48, "vocab_size": D_VOCAB, "max_position_embeddings": N_CTX, "attn_implementation": "eager",
}  # fmt: skip
_COMMON = {**_PLAIN, "head_dim": 8}
_MIXED = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"] * 2}
_GEMMA = {**_COMMON, **_MIXED, "query_pre_attn_scalar": 8}
_CASES = {
    "llama": ("Llama", _PLAIN),
    "qwen3": ("Qwen3", _COMMON),
    "mistral": ("Mistral", {**_COMMON, "sliding_window": WINDOW}),
    "gemma2": ("Gemma2", {**_GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0}),
    "gemma3": ("Gemma3", _GEMMA),
    "gpt-oss": ("GptOss", {**_COMMON, **_MIXED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "gpt-neox": ("GPTNeoX", {**{k: v for k, v in _PLAIN.items() if k != "num_key_value_heads"}, "use_parallel_residual": True}),
}  # fmt: skip
WINDOWS = {
    "mistral": (WINDOW,) * 4,
    **dict.fromkeys(("gemma2", "gemma3", "gpt-oss"), (WINDOW, None, WINDOW, None)),
    **dict.fromkeys(("llama", "qwen3", "gpt-neox"), (None,) * 4),
}
NAMES = tuple(_CASES)


@torch.no_grad()
def tiny(name: str, seed: int = 0):
    """A random model of this architecture, with weights large enough that attention is far from even."""
    family, arguments = _CASES[name]
    config_name = f"{family}TextConfig" if family == "Gemma3" else f"{family}Config"
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        config = getattr(transformers, config_name)(**arguments)
        model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    model.config.architectures = [type(model).__name__]
    for parameter_name, parameter in model.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator)
        if "norm" in parameter_name and not parameter_name.endswith("bias"):
            parameter.copy_(0.2 * drawn + (0.0 if family.startswith("Gemma") else 1.0))  # Gemma's norms add one
        elif parameter.ndim > 1:
            parameter.copy_(1.5 * parameter.shape[-1] ** -0.5 * drawn)
        else:
            parameter.copy_(0.5 * drawn)
    return model


class Run(NamedTuple):
    residuals: Tensor  # output of every block, before any final norm [layer, pos, d_model]
    pattern: Tensor  # [layer, head, query, key]
    contributions: Tensor  # what each MLP adds to the residual stream, after the edit [layer, pos, d_model]
    logits: Tensor  # [pos, d_vocab]


def blocks_of(model) -> nn.ModuleList:
    return next(
        m for name, m in model.named_modules() if name.endswith(("layers", ".h")) and isinstance(m, nn.ModuleList)
    )


@torch.no_grad()
def forward(model, tokens: Tensor, edits: Mapping[tuple[int, int], float | Callable] | None = None) -> Run:
    """One eager pass of tokens [pos]; `edits[layer, pos]` scales (or maps) what that MLP adds at that position."""
    edits = edits or {}
    residuals, contributions, hooks = [], [], []

    def add(layer: int) -> Callable:
        def hook(module, args, output):
            value = (output[0] if isinstance(output, tuple) else output).clone()
            for (at, pos), edit in edits.items():
                if at == layer:
                    value[0, pos] = edit(value[0, pos]) if callable(edit) else edit * value[0, pos]
            contributions.append(value[0])
            return (value, *output[1:]) if isinstance(output, tuple) else value

        return hook

    def keep(module, args, output):
        residuals.append((output[0] if isinstance(output, tuple) else output).reshape(len(tokens), -1))

    for layer, block in enumerate(blocks_of(model)):
        writer = block.post_feedforward_layernorm if hasattr(block, "post_feedforward_layernorm") else block.mlp
        hooks += [writer.register_forward_hook(add(layer)), block.register_forward_hook(keep)]
    try:
        output = model(tokens[None], output_attentions=True, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    pattern = torch.stack(output.attentions)[:, 0]
    return Run(torch.stack(residuals), pattern, torch.stack(contributions), output.logits[0])


def seen_by(key: int, n: int, window: int | None, inclusive: bool = False) -> list[int]:
    """The queries whose attention on `key` is averaged: later ones (or from its own on) that can see it."""
    stop = n if window is None else min(n, key + window)
    return list(range(key if inclusive else key + 1, stop))


def scores(pattern: Tensor, windows, *, inclusive: bool = False, min_queries: int = 1) -> Tensor:
    """Sink scores [layer, head, key] by definition, a mean over the queries of each key; NaN for fewer than asked."""
    return _means(pattern.double(), windows, inclusive, min_queries)


def log_odds(pattern: Tensor, windows, *, min_queries: int = 1) -> Tensor:
    """Attention log-odds [layer, head, key]: all that the key does not get counts as rest, learned sinks included."""
    p = pattern.double()
    return _means(p.log() - torch.log1p(-p), windows, False, min_queries)


def _means(values: Tensor, windows, inclusive: bool, min_queries: int) -> Tensor:
    n_layers, n_heads, n, _ = values.shape
    out = torch.full((n_layers, n_heads, n), math.nan, dtype=torch.float64)
    for layer, window in enumerate(windows):
        for key in range(n):
            queries = seen_by(key, n, window, inclusive)
            if len(queries) >= min_queries:
                out[layer, :, key] = values[layer, :, queries, key].mean(-1)
    return out


def random_tokens(n: int, seed: int = 0) -> Tensor:
    return torch.randint(0, D_VOCAB, (n,), generator=torch.Generator().manual_seed(seed))
