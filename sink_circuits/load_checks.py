"""The checks at load: a model's hooks on a text of random tokens, held against each other and against plain Hugging Face."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sink_circuits.attention import AttentionForm
from sink_circuits.errors import ModelError
from sink_circuits.twin import TwinRefused, plain_module

if TYPE_CHECKING:
    from sink_circuits.adapters import Adapter

CHECK_TOKENS = 24
"""Tokens of the text on which a model is checked: long enough for every block to mix positions, short enough to cost nothing."""

TOLERANCES = {torch.float32: 2e-4, torch.float64: 1e-9, torch.bfloat16: 6e-2, torch.float16: 8e-3}
"""Largest relative error a check accepts: about 20 times what was measured on SmolLM2, Gemma 3 and small random models."""


@dataclass(frozen=True)
class Check:
    """One check of a model on itself: what was compared, the error found and the largest one accepted."""

    name: str
    error: float
    limit: float
    remedy: str

    @property
    def passed(self) -> bool:
        return self.error <= self.limit


@dataclass(frozen=True)
class Reference:
    tokens: Tensor
    resid_post: list[Tensor]
    base: list[Tensor]
    contribution: list[Tensor]
    pattern: list[Tensor]
    logits: Tensor


def check_text(model) -> Tensor:
    if model.cfg.d_vocab < 1:
        raise ModelError(f"this model has a vocabulary of {model.cfg.d_vocab} tokens: use a language model.")
    generator = torch.Generator().manual_seed(int.from_bytes(b"sink_circuits check text"[:7], "big"))
    length = min(CHECK_TOKENS, model.cfg.n_ctx)
    return torch.randint(0, model.cfg.d_vocab, (length,), generator=generator)


@torch.no_grad()
def reference_pass(adapter: Adapter) -> Reference:
    model = adapter.model
    tokens = check_text(model).to(adapter.device)
    names = [
        name
        for layer in range(adapter.n_layers)
        for name in (
            *adapter.base_hooks(layer), adapter.contribution_hook(layer), adapter.pattern_hook(layer), f"blocks.{layer}.hook_resid_post",
        )
    ]  # fmt: skip
    logits, cache = model.run_with_cache(tokens[None], names_filter=lambda name: name in set(names))
    missing = [name for name in names if name not in cache]
    if missing:
        raise ModelError(
            f"hook {missing[0]} did not fire on a forward pass: this model cannot be measured through its hooks."
        )
    layers = range(adapter.n_layers)
    return Reference(
        tokens=tokens,
        resid_post=[cache[f"blocks.{layer}.hook_resid_post"] for layer in layers],
        base=[sum(cache[name] for name in adapter.base_hooks(layer)) for layer in layers],
        contribution=[cache[adapter.contribution_hook(layer)] for layer in layers],
        pattern=[cache[adapter.pattern_hook(layer)] for layer in layers],
        logits=logits,
    )


def check_shapes(adapter: Adapter, reference: Reference) -> None:
    """Raises ModelError for hooks without the residual stream's axes: a position would be taken for a row of the batch."""
    for layer, resid in enumerate(reference.resid_post):
        for name, found in (
            ("base", reference.base[layer]),
            (adapter.contribution_hook(layer), reference.contribution[layer]),
        ):
            if found.shape != resid.shape:
                raise ModelError(
                    f"{name if name != 'base' else adapter.base_hooks(layer)[0]} has shape {tuple(found.shape)} and the residual stream "
                    f"{tuple(resid.shape)}: edits of this architecture would land elsewhere; use another model."
                )


def check_finite(reference: Reference) -> None:
    """Raises ModelError for a pass that overflows or meets NaN: every check behind it would fail, and name something else."""
    places = [(f"blocks.{layer}.hook_resid_post", resid) for layer, resid in enumerate(reference.resid_post)]
    for name, values in (*places, ("the logits", reference.logits)):
        if not values.isfinite().all():
            raise ModelError(
                f"a forward pass over {len(reference.tokens)} random tokens gives NaN or infinity at {name}: the weights are damaged, or "
                f"too large for {values.dtype}; get them again, or load them in float32."
            )


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest absolute difference, as a share of the largest absolute value expected; NaN counts as infinite."""
    if found.shape != expected.shape:
        return float("inf")
    error = ((found.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1e-30)).item()
    return error if error == error else float("inf")


def has_learned_sinks(adapter: Adapter) -> bool:
    return any("sinks" in name.rpartition(".")[2] for name, _ in adapter.model.named_parameters())


@torch.no_grad()
def check_reference(adapter: Adapter, reference: Reference) -> tuple[Check, ...]:
    limit = TOLERANCES.get(reference.logits.dtype, 2e-4)
    parts = max(
        relative_error(base + contribution, post)
        for base, contribution, post in zip(reference.base, reference.contribution, reference.resid_post, strict=True)
    )
    rows = torch.stack([pattern.float().sum(-1) for pattern in reference.pattern])
    excess = (rows - 1).clamp(min=0).max() if has_learned_sinks(adapter) else (rows - 1).abs().max()
    ahead = max(pattern.float().triu(1).abs().max().item() for pattern in reference.pattern)
    layer = adapter.n_layers // 2
    hook_calls = []

    def halve(contribution: Tensor, hook) -> Tensor:
        hook_calls.append(hook)
        edited = contribution.clone()
        edited[:, -1] *= 0.5
        return edited

    edited = adapter.model.run_with_hooks(reference.tokens[None], fwd_hooks=[(adapter.contribution_hook(layer), halve)])
    moved = (edited - reference.logits)[:, -1].abs().max().item() if hook_calls else 0.0
    return (
        Check("base + contribution == resid_post", parts, limit,
              "the MLP output hook of this architecture is not what is added to the residual stream, so an edit of it would lie."),
        Check("attention rows sum to 1", excess.item(), max(limit, 1e-3),
              "the pattern hook does not hold attention weights: use attn_implementation='eager'."),
        Check("attention looks at no later token", ahead, 0.0,
              "scores and edited runs rest on causal attention: use a decoder, not a model that looks both ways."),
        Check("an edit of a contribution reaches the logits", 0.0 if moved > 0 else 1.0, 0.5,
              f"halving {adapter.contribution_hook(layer)} changed nothing: edits of this model would be silent no-ops."),
    )  # fmt: skip


@torch.no_grad()
def check_plain(model, reference: Reference) -> tuple[Check, ...]:
    """The bridge against the plain Hugging Face forward pass with the same parameters, where that can be built."""
    try:
        plain = plain_module(model, "eager")
        logits = plain(input_ids=reference.tokens[None], use_cache=False).logits
    except (TwinRefused, RuntimeError, TypeError, ValueError, AttributeError) as refusal:
        warnings.warn(
            f"the plain Hugging Face forward pass could not be run beside the bridge ({refusal}).", stacklevel=2
        )
        return ()
    error = relative_error(reference.logits.float().log_softmax(-1), logits.float().log_softmax(-1))
    remedy = "this TransformerLens version computes the architecture wrongly: use another version, or another model."
    return (Check("log-probabilities equal plain Hugging Face's", error, TOLERANCES.get(logits.dtype, 2e-4), remedy),)


@torch.no_grad()
def check_twin(adapter: Adapter, reference: Reference) -> tuple[tuple[AttentionForm, ...], tuple[Check, ...]]:
    twin, limit = adapter.twin, TOLERANCES.get(reference.logits.dtype, 2e-4)
    inputs = twin.block_inputs(reference.tokens)
    forms, errors, sums, parts, keys, values = [], [], [], [], [], []
    n = len(reference.tokens)
    strictly_later = torch.ones(n, n, dtype=torch.bool, device=reference.tokens.device).tril(-1)
    for run in twin.run(inputs.embed, inputs, range(adapter.n_layers), sums=True):
        forms.append(run.tap.form)
        errors.append(relative_error(run.resid_post, reference.resid_post[run.layer]))
        same = (
            run.tap.base.shape == run.tap.contribution.shape == run.resid_post.shape
        )  # Llama 4's experts drop the batch axis
        parts.append(relative_error(run.tap.base + run.tap.contribution, run.resid_post) if same else float("inf"))
        expected = (reference.pattern[run.layer].float() * strictly_later).sum(-2)
        sums.append((run.tap.attention.later - expected).abs().max().item())
        keys.append(run.tap.key)
        values.append(run.tap.value)
        final = run.resid_post
    start = n // 2  # as edited runs do: above the first block, in the middle of the text

    def prefix(layer: int) -> tuple[Tensor, Tensor]:
        return keys[layer][:, :, :start], values[layer][:, :, :start]

    resid = reference.resid_post[0][:, start:]
    resumed = [
        relative_error(run.resid_post, reference.resid_post[run.layer][:, start:])
        for run in twin.run(resid, inputs, range(1, adapter.n_layers), start=start, prefix=prefix)
    ]
    log_probs = relative_error(twin.logits(final).float().log_softmax(-1), reference.logits.float().log_softmax(-1))
    remedy = "the reference path is used instead."
    return tuple(forms), (
        Check("fast path: resid_post of every block", max(errors), limit, remedy),
        Check("fast path: base + contribution == resid_post", max(parts), limit, remedy),
        Check("fast path: attention received", max(sums), max(limit, 1e-3), remedy),
        Check("fast path: log-probabilities", log_probs, limit, remedy),
        Check("fast path: resumed in the middle of a text", max(resumed, default=0.0), limit, remedy),
    )
