"""Next-token loss and divergence from residual streams, logits made in slices and dropped."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

LOGIT_SLICE_FLOATS = 1 << 25
"""Floats of logits held at once where a loss is asked for (128 MiB): Gemma's vocabulary is 262,144."""


def next_token_loss(
    logits_of: Callable[[Tensor], Tensor], resid_post: Float[Tensor, "pos d_model"], tokens: Int[Tensor, " pos"]
) -> Float[Tensor, " pos"]:
    """-log p(next token) at every position, NaN at the last; logits are made in slices and dropped."""
    losses = torch.full((len(tokens),), torch.nan, device=tokens.device)
    step = None
    position = 0
    while position < len(tokens) - 1:
        stop = min(position + (step or 1), len(tokens) - 1)
        logits = logits_of(resid_post[position:stop]).float()
        step = max(1, LOGIT_SLICE_FLOATS // logits.shape[-1])
        losses[position:stop] = torch.nn.functional.cross_entropy(
            logits, tokens[position + 1 : stop + 1], reduction="none"
        )
        position = stop
    return losses


def next_token_kl(
    logits_of: Callable[[Tensor], Tensor], clean: Float[Tensor, "pos d_model"], edited: Float[Tensor, "row pos d_model"]
) -> Float[Tensor, "row pos"]:
    """KL(clean || edited) of the next-token distributions of two final residual streams, in nats, at every position.

    Logits are made in slices and dropped. Differences of log-probabilities are taken in float64: in float32 their
    rounding would stand where a small divergence should.
    """
    out = torch.zeros(edited.shape[:2], device=edited.device)
    step = max(1, LOGIT_SLICE_FLOATS // (4 * logits_of(clean[:1]).shape[-1]))
    for position in range(0, len(clean), step):
        here = slice(position, position + step)
        log_p = logits_of(clean[here]).double().log_softmax(-1)
        for row, resid in enumerate(edited[:, here]):
            log_q = logits_of(resid).double().log_softmax(-1)
            out[row, here] = (log_p.exp() * (log_p - log_q)).sum(-1).clamp(min=0).float()
    return out


def loss_of_logits(logits: Float[Tensor, "pos d_vocab"], tokens: Int[Tensor, " pos"]) -> Float[Tensor, " pos"]:
    own = torch.nn.functional.cross_entropy(logits[:-1].float(), tokens[1:], reduction="none")
    return torch.cat([own, own.new_full((1,), torch.nan)])
