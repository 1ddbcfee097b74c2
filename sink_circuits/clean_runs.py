"""Clean runs: one unedited forward pass of a text, with all that is measured in it and what an edited run resumes from.

It comes from the fast path (the twin), from TransformerLens' hooks, or from a cache of the user's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sink_circuits import arguments
from sink_circuits.adapters import Adapter, adapt, one_at_a_time
from sink_circuits.arguments import is_whole, shown
from sink_circuits.attention import AttentionSums, streamed_attention
from sink_circuits.errors import CacheError, InputError
from sink_circuits.load_checks import TOLERANCES, relative_error
from sink_circuits.losses import loss_of_logits, next_token_loss
from sink_circuits.prompts import as_tokens
from sink_circuits.twin import BlockInputs

TINY = torch.finfo(torch.float32).tiny
LOG_TINY = torch.tensor(TINY).log().item()
"""The floor of logarithms of weights."""


@dataclass(frozen=True)
class Columns:
    """Attention weights on chosen keys, for every query of a text.

    `log_attention`: log A[q, k]; `log_rest`: log of the summed weights of all other keys and learned sinks; both
    [layer, head, query, chosen], float32, floored at log(1.2e-38). Their difference is the attention log-odds.
    """

    chosen: tuple[int, ...]
    log_attention: Float[Tensor, "layer head query chosen"]
    log_rest: Float[Tensor, "layer head query chosen"]


@dataclass(frozen=True)
class CleanRun:
    """Everything an analysis needs of one text's unedited forward pass.

    `base` + `contribution` is `resid_post`; `later[layer, head, key]` sums attention over strictly later queries and
    `diagonal` is A[q, q]; `keys`, `values` (rotated; of the first positions) exist where edited runs can reuse them. `path` is "fast",
    "reference" or "cache". A run that nothing will be resumed from (`resumable=False`) holds resid_post in `base`, no
    contribution, keys or values: a quarter of the memory. `loss` [pos]: next-token loss, NaN at the last position, where it was asked for.
    `state`: the weights and hooks that it was made with (`Adapter.state`).
    """

    tokens: Int[Tensor, " pos"]
    base: Float[Tensor, "layer pos d_model"]
    contribution: Float[Tensor, "layer pos d_model"] | None
    later: Float[Tensor, "layer head key"]
    diagonal: Float[Tensor, "layer head query"]
    columns: Columns | None
    keys: tuple[Tensor, ...] | None
    values: tuple[Tensor, ...] | None
    inputs: BlockInputs | None
    path: str
    loss: Float[Tensor, " pos"] | None = None
    state: str = ""

    @property
    def n_positions(self) -> int:
        return len(self.tokens)

    def resid_post(self, layer: int) -> Float[Tensor, "pos d_model"]:
        return self.base[layer] if self.contribution is None else self.base[layer] + self.contribution[layer]


def names_filter(model) -> Callable[[str], bool]:
    """Pass it to `run_with_cache`: keeps just the hooks that `clean_cache` needs in every routine here.

    These are each block's base and contribution, and its attention pattern (drop the pattern hooks and keep
    `attn.hook_rot_q`, `attn.hook_rot_k` instead where memory is short).
    """
    adapter = adapt(model)
    wanted = {
        name
        for layer in range(adapter.n_layers)
        for name in (*adapter.base_hooks(layer), adapter.contribution_hook(layer), adapter.pattern_hook(layer))
    }
    return lambda name: name in wanted


@one_at_a_time
@torch.no_grad()
def run_clean(
    model, tokens: Int[Tensor, " pos"], *, chosen: Sequence[int] = (), clean_cache=None, row: int = 0,
    mask: Bool[Tensor, " padded_pos"] | None = None, loss: bool = False, resumable: bool = True, prefix: int | None = None,
    path: str = "auto",
) -> CleanRun:  # fmt: skip
    """The clean run of one text; `chosen` are key positions whose attention columns are wanted.

    `clean_cache`: an ActivationCache of the same text from the user's own `run_with_cache` (row `row` of its batch);
    nothing is run again but block 0, to see that it is the same text; `mask`: that row's attention mask, where the
    batch was padded. `prefix`: keys and values of so many positions are kept for edited runs to reuse (None: of all); a
    run whose first edit is later computes what lies between anew. `path`: "auto" takes the fast path where it serves,
    "reference" TransformerLens' hooks.
    Raises CacheError naming the hooks that a cache misses, InputError for an unknown path or a position out of range.
    """
    adapter = adapt(model)
    tokens = as_tokens(model, [tokens]).ids[0]
    chosen = check_chosen(chosen, len(tokens))
    arguments.flag(loss, "loss")
    arguments.flag(resumable, "resumable")
    row = arguments.whole(row, "row")
    prefix = len(tokens) if prefix is None else arguments.whole(prefix, "prefix")
    if mask is not None:
        mask = _check_mask(mask, len(tokens))
    if clean_cache is not None:
        clean = _clean_from_cache(adapter, tokens, clean_cache, row, mask, chosen)
    elif resolve_path(adapter, path) == "fast":
        clean = _clean_fast(adapter, tokens, chosen, resumable, prefix)
    else:
        clean = _clean_reference(adapter, tokens, chosen)
    clean = replace(clean, state=adapter.state)
    return replace(clean, loss=clean_loss(model, clean)) if loss else clean


def resolve_path(adapter: Adapter, path: str) -> str:
    """Which path serves: "fast" needs a twin and a model without hooks of the user's own."""
    arguments.one_of(path, "path", ("auto", "fast", "reference"), "use 'auto', 'fast' or 'reference'")
    if path == "reference":
        return path
    if path == "fast" and adapter.twin is None:
        raise InputError(
            f"the fast path cannot serve this model ({adapter.twin_refusal}): use path='auto' or 'reference'."
        )
    return "reference" if adapter.twin is None else "fast"


def check_chosen(chosen: Sequence[int], n_positions: int) -> tuple[int, ...]:
    chosen = arguments.several(chosen, "chosen positions", empty=True)
    for position in chosen:
        if not is_whole(position):
            raise InputError(f"position {shown(position)} is not a whole number: give positions counted from 0.")
        if not 0 <= position < n_positions:
            raise InputError(f"position {position} is out of range: the text has positions 0..{n_positions - 1}.")
    positions = tuple(int(p) for p in chosen)
    if len(set(positions)) < len(positions):
        raise InputError(f"a position is named twice in {positions}.")
    return positions


def _check_mask(mask, n_tokens: int) -> Bool[Tensor, " padded_pos"]:
    """The attention mask of one padded row, whose ones are the text's own tokens."""
    try:
        mask = torch.as_tensor(mask)
    except (TypeError, ValueError, RuntimeError):
        mask = torch.zeros(())
    if mask.ndim != 1 or int(mask.bool().sum()) != n_tokens:
        raise InputError(
            f"the mask does not leave the text's {n_tokens} tokens: give its row of the attention mask, [padded_pos]."
        )
    return mask.bool()


def _clean_fast(adapter: Adapter, tokens: Tensor, chosen: tuple[int, ...], resumable: bool, prefix: int) -> CleanRun:
    twin = adapter.twin
    inputs = twin.block_inputs(tokens)
    n_layers, n, d = adapter.n_layers, len(tokens), inputs.embed.shape[-1]
    base = torch.empty(n_layers, n, d, dtype=inputs.embed.dtype, device=tokens.device)
    contribution = torch.empty_like(base) if resumable else None
    later = torch.empty(n_layers, adapter.n_heads, n, device=tokens.device)
    diagonal = torch.empty_like(later)
    keys, values = [], []
    keep_key, keep_value, keep_attention, keep_rest = (_Layers(n_layers) for _ in range(4))
    chosen_tensor = torch.tensor(chosen) if chosen else None
    for run in twin.run(inputs.embed, inputs, range(n_layers), chosen=chosen_tensor, sums=True):
        if resumable:
            base[run.layer], contribution[run.layer] = run.tap.base[0], run.tap.contribution[0]
            keys.append(keep_key(run.layer, run.tap.key[:, :, :prefix]))
            values.append(keep_value(run.layer, run.tap.value[:, :, :prefix]))
        else:
            base[run.layer] = run.resid_post[0]
        attention = run.tap.attention
        later[run.layer], diagonal[run.layer] = attention.later[0], attention.diagonal[0]
        if chosen:
            keep_attention(run.layer, attention.log_attention[0])
            keep_rest(run.layer, attention.log_rest[0])
    columns = (
        Columns(chosen, *(one.whole.clamp_(min=LOG_TINY) for one in (keep_attention, keep_rest))) if chosen else None
    )
    kept = (tuple(keys), tuple(values)) if resumable else (None, None)
    return CleanRun(tokens, base, contribution, later, diagonal, columns, *kept, inputs, "fast")


class _Layers:
    """One tensor for all layers, made when the first one comes: between a pass' passing tensors nothing is left that stays, so
    that their memory is used again. A layer of another shape keeps its own tensor."""

    def __init__(self, n_layers: int):
        self.n_layers = n_layers
        self.whole: Any = None

    def __call__(self, layer: int, part: Tensor) -> Tensor:
        if self.whole is None:
            self.whole = part.new_empty(self.n_layers, *part.shape)
        if part.shape != self.whole.shape[1:]:
            return part
        self.whole[layer] = part
        return self.whole[layer]


def columns_of(chosen: tuple[int, ...], attentions: Sequence[AttentionSums], row: int = 0) -> Columns:
    return Columns(
        chosen,
        torch.stack([a.log_attention[row] for a in attentions]).clamp(min=LOG_TINY),
        torch.stack([a.log_rest[row] for a in attentions]).clamp(min=LOG_TINY),
    )


@dataclass
class PatternTap:
    """Reads what is wanted from one layer's pattern as TransformerLens computes it, then lets the pattern go."""

    chosen: tuple[int, ...]
    learned_sinks: bool
    groups: Float[Tensor, "batch key group"] | None = None
    attention: AttentionSums | None = None
    grouped: Float[Tensor, "batch query head group"] | None = None

    def __call__(self, pattern: Float[Tensor, "batch head query key"], hook=None) -> None:
        pattern = pattern.float()
        diagonal = pattern.diagonal(dim1=-2, dim2=-1).clone()
        later = pattern.tril(-1).sum(-2)
        log_attention = log_rest = None
        if self.chosen:
            log_attention, rests = pattern[..., list(self.chosen)].log(), []
            total = pattern.sum(-1)
            for key in self.chosen:
                others = pattern.clone()
                others[..., key] = 0
                rest = others.sum(-1)
                rests.append(rest + (1 - total) if self.learned_sinks else rest)
            log_rest = torch.stack(rests, -1).clamp(min=0).log()
        self.attention = AttentionSums(later, diagonal, log_attention, log_rest)
        if self.groups is not None:
            self.grouped = (pattern @ self.groups[:, None]).transpose(1, 2)


def learned_sinks(adapter: Adapter) -> bool:
    return any(form.sinks is not None for form in adapter.forms)


def _clean_reference(adapter: Adapter, tokens: Tensor, chosen: tuple[int, ...]) -> CleanRun:
    layers = range(adapter.n_layers)
    kept: dict[str, Tensor] = {}
    taps = [PatternTap(chosen, learned_sinks(adapter)) for _ in layers]

    def keeper(name: str):
        def hook(value: Tensor, hook) -> None:
            kept[name] = value[0].detach().clone()  # activations alias live tensors

        return name, hook

    hooks = [
        pair
        for layer in layers
        for pair in (
            *(keeper(name) for name in adapter.base_hooks(layer)), keeper(adapter.contribution_hook(layer)),
            (adapter.pattern_hook(layer), taps[layer]),
        )
    ]  # fmt: skip
    adapter.model.run_with_hooks(tokens[None], fwd_hooks=hooks, stop_at_layer=adapter.n_layers)
    base = torch.stack([_sum(kept[name] for name in adapter.base_hooks(layer)) for layer in layers])
    contribution = torch.stack([kept[adapter.contribution_hook(layer)] for layer in layers])
    later = torch.stack([tap.attention.later[0] for tap in taps])
    diagonal = torch.stack([tap.attention.diagonal[0] for tap in taps])
    columns = columns_of(chosen, [tap.attention for tap in taps]) if chosen else None
    return CleanRun(tokens, base, contribution, later, diagonal, columns, None, None, None, "reference")


def _clean_from_cache(
    adapter: Adapter, tokens: Tensor, cache, row: int, mask: Tensor | None, chosen: tuple[int, ...]
) -> CleanRun:  # fmt: skip
    layers = range(adapter.n_layers)
    if not hasattr(cache, "keys"):
        raise CacheError(
            f"clean_cache is a {type(cache).__name__}: pass the cache itself, the second thing that run_with_cache returns."
        )
    have = set(cache.keys())
    names = [name for layer in layers for name in (*adapter.base_hooks(layer), adapter.contribution_hook(layer))]
    missing = [name for name in names if name not in have]
    has_patterns = all(adapter.pattern_hook(layer) in have for layer in layers)
    rotary = [tuple(_attention_input(adapter, have, layer, x) for x in "qk") for layer in layers]
    has_inputs = all(q and k for q, k in rotary)
    if not has_patterns and not has_inputs:
        missing += [adapter.pattern_hook(layer) for layer in layers if adapter.pattern_hook(layer) not in have]
    if missing:
        raise CacheError(
            f"clean_cache lacks {len(missing)} hooks, the first {', '.join(missing[:3])}: make it with "
            "model.run_with_cache(tokens, names_filter=sink_circuits.names_filter(model))."
        )

    def take(name: str) -> Tensor:
        value = cache[name]
        if getattr(cache, "has_batch_dim", True):
            if not 0 <= row < len(value):
                raise CacheError(
                    f"clean_cache has {len(value)} rows and row {row} was asked for: cache the same batch."
                )
            value = value[row]
        is_pattern = name.endswith("hook_pattern")
        if mask is not None:
            own = mask.bool().to(value.device)
            value = value[:, own][:, :, own] if is_pattern else value[own]
        n_positions = value.shape[-1] if is_pattern else len(value)
        if n_positions != len(tokens):
            raise CacheError(
                f"clean_cache holds {n_positions} positions at {name}, the text {len(tokens)}: cache the same tokens."
            )
        return value

    base = torch.stack([_sum(take(name) for name in adapter.base_hooks(layer)) for layer in layers])
    contribution = torch.stack([take(adapter.contribution_hook(layer)) for layer in layers])
    _check_same_text(adapter, tokens, contribution[0])
    attentions = []
    for layer in layers:
        if has_patterns:
            tap = PatternTap(chosen, learned_sinks(adapter))
            tap(take(adapter.pattern_hook(layer))[None])
            attentions.append(tap.attention)
        else:
            query, key = (take(name).transpose(0, 1)[None] for name in rotary[layer])
            _, sums = streamed_attention(
                query, key, key, adapter.forms[layer], chosen=torch.tensor(chosen) if chosen else None
            )
            attentions.append(sums)
    later = torch.stack([a.later[0] for a in attentions])
    diagonal = torch.stack([a.diagonal[0] for a in attentions])
    columns = columns_of(chosen, attentions) if chosen else None
    inputs = adapter.twin.block_inputs(tokens) if resolve_path(adapter, "auto") == "fast" else None
    return CleanRun(tokens, base, contribution, later, diagonal, columns, None, None, inputs, "cache")


def _check_same_text(adapter: Adapter, tokens: Tensor, contribution: Float[Tensor, "pos d_model"]) -> None:
    """Raises CacheError when block 0's contribution to these tokens is not what the cache holds."""
    seen: list[Tensor] = []
    hooks = [(adapter.contribution_hook(0), lambda value, hook: seen.append(value[0].detach().clone()))]
    adapter.model.run_with_hooks(tokens[None], fwd_hooks=hooks, stop_at_layer=1)
    limit = 10 * TOLERANCES.get(contribution.dtype, 2e-4)
    if (error := relative_error(contribution, seen[0])) > limit:
        raise CacheError(
            f"clean_cache is of another text or model (block 0 differs by {error:.2g}, at most {limit:.2g}): cache the same tokens."
        )


def _sum(tensors: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(tensors)).sum(dim=0)


def _attention_input(adapter: Adapter, have: set[str], layer: int, letter: str) -> str | None:
    """The cached hook that holds queries or keys as the scores are made from them, or None.

    Rotated ones where the model rotates; plain ones only where nothing else carries position into the scores.
    """
    rotated, plain = f"blocks.{layer}.attn.hook_rot_{letter}", f"blocks.{layer}.attn.hook_{letter}"
    if rotated in adapter.model.hook_dict:
        return rotated if rotated in have else None
    positions = str(getattr(adapter.cfg, "positional_embedding_type", ""))
    return plain if plain in have and positions in ("standard", "shortformer") and not adapter.processed else None


def clean_loss(model, clean: CleanRun) -> Float[Tensor, " pos"]:
    """Next-token loss of the unedited text, [pos], NaN at the last position."""
    adapter = adapt(model)
    if adapter.twin is not None and clean.path != "reference":
        return next_token_loss(adapter.twin.logits, clean.resid_post(adapter.n_layers - 1), clean.tokens)
    with torch.no_grad():
        return loss_of_logits(adapter.model(clean.tokens[None], return_type="logits")[0], clean.tokens)
