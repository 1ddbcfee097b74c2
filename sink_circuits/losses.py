"""Next-token loss and divergence from residual streams, logits made in slices and dropped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sink_circuits.attention import each, threads_for

LOGIT_SLICE_FLOATS = 1 << 25
"""Floats of logits held at once where a loss is asked for (128 MiB): Gemma's vocabulary is 262,144."""
TILE_POSITIONS, TILE_TOKENS = 512, 512
"""One tile of logits on a CPU (1 MiB)."""


@dataclass(frozen=True)
class Unembedding:
    """From a final residual stream to logits: final norm, one linear map, the model's own scaling or soft-capping."""

    norm: Callable[[Tensor], Tensor]
    weight: Float[Tensor, "d_vocab d_model"]
    bias: Float[Tensor, " d_vocab"] | None = None
    scale: float | None = None
    softcap: float | None = None

    def __call__(self, resid_post: Float[Tensor, "*pos d_model"]) -> Float[Tensor, "*pos d_vocab"]:
        return self.finished(torch.nn.functional.linear(self.norm(resid_post), self.weight, self.bias))

    def finished(self, logits: Tensor) -> Tensor:
        """What follows the linear map, on any part of the vocabulary."""
        if self.scale is not None:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits

    def part(self, normed: Float[Tensor, "pos d_model"], tokens: slice) -> Float[Tensor, "pos part"]:
        """Logits of some tokens of the vocabulary, in float32."""
        bias = None if self.bias is None else self.bias[tokens]
        return self.finished(torch.nn.functional.linear(normed, self.weight[tokens], bias)).float()

    def of(self, normed: Float[Tensor, "pos d_model"], tokens: Int[Tensor, " pos"]) -> Float[Tensor, " pos"]:
        """At every position the logit of one token, in float32."""
        logits = torch.bmm(normed[:, None], self.weight[tokens][..., None])[:, 0, 0]
        return self.finished(logits if self.bias is None else logits + self.bias[tokens]).float()


def next_token_loss(
    unembedding: Unembedding, resid_post: Float[Tensor, "pos d_model"], tokens: Int[Tensor, " pos"]
) -> Float[Tensor, " pos"]:
    """-log p(next token) at every position, NaN at the last.

    Logits are made in tiles of positions and vocabulary, summed and dropped: a tile stays in the core's cache, a
    slice of a whole vocabulary would go through memory several times.
    """
    losses = torch.full((len(tokens),), torch.nan, device=tokens.device)
    n_vocab, on_cpu = len(unembedding.weight), tokens.device.type == "cpu"
    rows = TILE_POSITIONS if on_cpu else max(1, LOGIT_SLICE_FLOATS // n_vocab)
    width = TILE_TOKENS if on_cpu else n_vocab  # on a GPU the number of kernels counts

    def of_block(start: int) -> None:
        here = slice(start, min(start + rows, len(tokens) - 1))
        normed = unembedding.norm(resid_post[here])
        totals = [log_sum_exp(unembedding.part(normed, slice(a, a + width))) for a in range(0, n_vocab, width)]
        losses[here] = torch.stack(totals).logsumexp(dim=0) - unembedding.of(
            normed, tokens[here.start + 1 : here.stop + 1]
        )

    starts = range(0, len(tokens) - 1, rows)
    each(of_block, starts, threads_for(len(starts), len(tokens) * n_vocab, tokens.device))
    return losses


def log_sum_exp(logits: Float[Tensor, "pos part"]) -> Float[Tensor, " pos"]:
    """log of the summed exponentials of each row; `logits` are used up."""
    top = logits.amax(dim=-1, keepdim=True)
    return logits.sub_(top).exp_().sum(dim=-1).log_().add_(top[:, 0])


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
