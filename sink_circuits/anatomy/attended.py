"""Queries and keys as they meet in attention: before rotary position, and behind it.

TransformerLens' hooks show them where they fire. Where they do not (rotary dimensions that are a part of the head's, fused
projections, attention left to Hugging Face), the plain Hugging Face model says what it multiplies with what.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sink_circuits.adapters import Adapter, adapt
from sink_circuits.anatomy.reading import activations, queries_or_keys
from sink_circuits.twin import TwinRefused, plain_module

Pair = tuple[Float[Tensor, "pos head d_head"], Float[Tensor, "pos key_head d_head"]]
PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__)


@dataclass(frozen=True)
class Attended:
    """Queries and keys of one layer, or None where nothing shows them; `scaling`: what their product is multiplied by."""

    before: Pair | None
    after: Pair | None
    scaling: float


def attended(model, ids: Int[Tensor, " pos"], layers: Sequence[int]) -> dict[int, Attended]:
    """By layer the queries and keys of one text. Raises ModelError when no hook shows either."""
    adapter = adapt(model)

    def names(kind: str) -> list[str]:
        return [f"blocks.{layer}.attn.{kind}" for layer in layers]

    kinds = ["hook_q_normed", "hook_k_normed", "hook_rot_q", "hook_rot_k"]
    kinds += ["hook_pattern"] if adapter.twin is None else []
    kept = activations(
        model, ids, [*names("hook_q"), *names("hook_k")], optional=[name for kind in kinds for name in names(kind)]
    )
    rotates = "rotary" in str(getattr(adapter.cfg, "positional_embedding_type", ""))
    unseen = [layer for layer in layers if rotates and f"blocks.{layer}.attn.hook_rot_q" not in kept]
    products = multiplied(model, adapter, ids, unseen) if unseen else {}
    found = {}
    for layer in layers:
        at, attn = f"blocks.{layer}.attn.", model.blocks[layer].attn
        # A norm on queries and keys follows hook_q; where no hook shows what is behind it, this is not known.
        hidden = isinstance(getattr(attn, "q_norm", None), nn.Module) and f"{at}hook_q_normed" not in kept
        before = None if hidden else (queries_or_keys(kept, layer, "q"), queries_or_keys(kept, layer, "k"))
        after = before
        if layer in unseen:
            after = products.get(layer)
        elif rotates:
            after = (kept[f"{at}hook_rot_q"], kept[f"{at}hook_rot_k"])
        form = adapter.forms[layer]
        pattern = kept.get(f"{at}hook_pattern")
        measured = None if pattern is None or after is None or form.softcap else scale_of(pattern, *after)
        found[layer] = Attended(before, after, form.scaling if measured is None else measured)
    return found


def scale_of(pattern: Float[Tensor, "head query key"], query: Tensor, key: Tensor) -> float | None:
    """The s with log A[q, k] = s * query . key + a number of the row, by least squares over what each query sees.

    None where that is not how the pattern came about: a bias by distance (ALiBi), a soft cap.
    """
    n_heads = query.shape[1]
    keys = key.repeat_interleave(n_heads // key.shape[1], dim=1)
    product = torch.einsum("qhd,khd->hqk", query.double(), keys.double())
    seen = (pattern > 1e-30) & torch.ones_like(pattern, dtype=torch.bool).tril()
    log = pattern.double().clamp(min=1e-30).log()

    def centred(x: Tensor) -> Tensor:
        mean = (x * seen).sum(-1, keepdim=True) / seen.sum(-1, keepdim=True).clamp(min=1)
        return (x - mean) * seen

    x, y = centred(product), centred(log)
    if not x.square().sum() > 0:
        return None
    scale = (x * y).sum() / x.square().sum()
    unexplained = (y - scale * x).square().sum() / y.square().sum().clamp(min=1e-30)
    return float(scale) if unexplained < 1e-4 else None


class _Products(TorchFunctionMode):
    """Notes what the attention of `layer` multiplies first to something of [query, key]: queries by keys."""

    def __init__(self, n_positions: int):
        super().__init__()
        self.n_positions = n_positions
        self.layer: int | None = None
        self.found: dict[int, Pair] = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in PRODUCTS and self.layer is not None and self.layer not in self.found and len(args) == 2:
            query, key = args
            if query.ndim == key.ndim == 4 and query.shape[-2] == key.shape[-1] == self.n_positions:
                self.found[self.layer] = (query[0].transpose(0, 1).clone(), key[0].permute(2, 0, 1).clone())
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def multiplied(model, adapter: Adapter, ids: Int[Tensor, " pos"], layers: Sequence[int]) -> dict[int, Pair]:
    """What the plain Hugging Face model's eager attention multiplies; nothing where there is no such model."""
    if adapter.backend != "bridge" or adapter.processed:
        return {}
    parts = model.adapter.component_mapping
    try:
        plain = plain_module(model, "eager")
    except TwinRefused:
        return {}
    own = _Products(len(ids))
    handles = []
    for layer in layers:
        path = f"{parts['blocks'].name}.{layer}.{parts['blocks'].submodules['attn'].name}"
        attention = plain.get_submodule(path)
        handles.append(
            attention.register_forward_pre_hook(
                lambda *_, layer=layer, **__: setattr(own, "layer", layer), with_kwargs=True
            )
        )
        handles.append(attention.register_forward_hook(lambda *_: setattr(own, "layer", None)))
    with own:
        plain.base_model(input_ids=ids[None], use_cache=False)
    return own.found
