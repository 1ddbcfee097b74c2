"""Gradients: sink scores as differentiable functions of MLP contributions and neurons.

One route for both TransformerLens classes: their own hooks with gradients on, where a pattern is a plain softmax; the fast
path computes in place and has none. Parameters are frozen meanwhile, so that a backward pass costs about one forward pass.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sink_circuits.adapters import Adapter, adapt
from sink_circuits.clean_runs import TINY, Columns, check_chosen
from sink_circuits.errors import InputError, ModelError
from sink_circuits.scores import MIN_QUERIES, check_min_queries, column_log_odds, column_scores

MEANS = {"score": column_scores, "log_odds": column_log_odds}
GRAPH_BYTES = 4 << 30
"""Bytes that what autograd keeps of one pass may take. Above it blocks are run again in the backward pass; a text of
which a single block takes more is refused."""


@contextmanager
def frozen(model) -> Iterator[None]:
    """Within, no parameter asks for a gradient; afterwards those that did do so again."""
    asking = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in asking:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)


class _Reached(Exception):
    """The last pattern that is read has been computed: nothing above it is run."""


def _log_columns(
    pattern: Float[Tensor, "batch head query key"], chosen: tuple[int, ...], learned_sinks: bool
) -> tuple[Tensor, Tensor]:
    """log A[q, k] and the log of all other keys' summed weights (the learned sink's too), [head, query, chosen].

    Floored as in `Columns`: below the floor the gradient is 0.
    """
    pattern = pattern[0].to(torch.promote_types(pattern.dtype, torch.float32))
    rest = [pattern[..., :key].sum(-1) + pattern[..., key + 1 :].sum(-1) for key in chosen]
    log_rest = torch.stack(rest, dim=-1)
    if learned_sinks:  # what the keys leave of 1
        log_rest = log_rest + (1 - pattern.sum(-1, keepdim=True))
    return pattern[..., list(chosen)].clamp(min=TINY).log().float(), log_rest.clamp(min=TINY).log().float()


@contextmanager
def _pass(
    adapter: Adapter, ids: Int[Tensor, " pos"], chosen: tuple[int, ...], hooks: Sequence[tuple[str, Callable]], stop: int,
    *, recompute: bool = False,
) -> Iterator[Columns]:  # fmt: skip
    """One pass of one text up to the pattern of block `stop - 1`: columns [stop, head, query, chosen] on the graph.

    The hooks stand until the context is left, for a block that is run again in the backward pass needs them too.
    """
    kept: dict[int, tuple[Tensor, Tensor]] = {}
    learned_sinks = any(form.sinks is not None for form in adapter.forms)

    def reader(layer: int) -> tuple[str, Callable]:
        def read(pattern: Tensor, hook) -> None:
            first = layer not in kept
            columns = _log_columns(pattern, chosen, learned_sinks)
            if first:
                kept[layer] = columns
            if first and layer == stop - 1:
                raise _Reached

        return adapter.pattern_hook(layer), read

    readers = [reader(layer) for layer in range(stop)]
    # A block that is run again would find its own keys in the cache.
    no_cache = {"use_cache": False} if adapter.backend == "bridge" else {}
    with ExitStack() as stack:
        stack.enter_context(frozen(adapter.model))
        stack.enter_context(adapter.model.hooks(fwd_hooks=[*hooks, *readers]))
        if recompute:
            stack.enter_context(_recomputed(adapter.model))
        with suppress(_Reached):
            adapter.model(ids[None], return_type=None, **no_cache)
        if missing := [adapter.pattern_hook(layer) for layer in range(stop) if layer not in kept]:
            raise ModelError(
                f"hook {missing[0]} did not fire on a forward pass: this model cannot be measured through its hooks."
            )
        yield Columns(chosen, *(torch.stack([kept[layer][i] for layer in range(stop)]) for i in (0, 1)))


@contextmanager
def _recomputed(model) -> Iterator[None]:
    """Within, autograd keeps only each block's input and runs the block again in the backward pass."""
    for block in model.blocks:  # not by setattr: a bridge hands attributes on to the module that it wraps
        again = functools.partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
        vars(block)["forward"] = again
    try:
        yield
    finally:
        for block in model.blocks:
            del vars(block)["forward"]


def differentiable_scores(
    model, tokens: Int[Tensor, " pos"], chosen: Sequence[int], deltas: Mapping[int, Float[Tensor, "pos d_model"]], *,
    outcome: str = "score", min_queries: int = MIN_QUERIES,
) -> Float[Tensor, "layer head chosen"]:  # fmt: skip
    """Sink scores in [0, 1] (or "log_odds") of the chosen keys of one text, differentiable in what is added to contributions.

    `deltas[layer]` is added to the contribution of that MLP at every position; zeros that require a gradient leave the
    run as it is. NaN, without a gradient, where a key has fewer than `min_queries` later queries. Raises InputError.
    """
    adapter = adapt(model)
    check_min_queries(min_queries)
    chosen = check_chosen(chosen, len(tokens))
    if outcome not in MEANS:
        raise InputError(f"outcome {outcome!r} is unknown: use one of {', '.join(MEANS)}.")
    for layer, delta in deltas.items():
        if not 0 <= layer < adapter.n_layers or delta.shape != (len(tokens), adapter.cfg.d_model):
            raise InputError(
                f"the delta of layer {layer} has shape {tuple(delta.shape)}: layers are 0..{adapter.n_layers - 1}, shapes "
                f"({len(tokens)}, {adapter.cfg.d_model})."
            )

    def adder(layer: int) -> tuple[str, Callable]:
        return adapter.contribution_hook(layer), lambda value, hook: value + deltas[layer]

    hooks = [adder(layer) for layer in deltas]
    with torch.enable_grad(), _pass(adapter, tokens, chosen, hooks, adapter.n_layers) as columns:
        return MEANS[outcome](columns, adapter.windows, min_queries)


# ------------------------------------------------------------------------------------------------------- memory
def graph_bytes_of(adapter: Adapter, n_positions: int, n_blocks: int) -> int:
    """Upper estimate of what autograd keeps of so many blocks, a pass of one text; the inputs of all blocks besides.

    Measured on fourteen architectures: 1 to 2.3 patterns per block, and less than these activations per token.
    """
    cfg = adapter.cfg
    pattern = 2.5 * adapter.n_heads * n_positions**2
    tokens = n_positions * (6 * cfg.d_model + 4 * adapter.n_heads * cfg.d_head + 3 * (cfg.d_mlp or 4 * cfg.d_model))
    inputs = adapter.n_layers * n_positions * cfg.d_model
    return round(4 * (n_blocks * (pattern + tokens) + inputs))


def check_memory(adapter: Adapter, n_positions: int, graph_bytes: int = GRAPH_BYTES) -> bool:
    """Must blocks be run again in the backward pass, for a text of this length to fit into `graph_bytes`?

    Raises InputError, naming the longest text that does fit, where even one block at a time does not.
    """
    if graph_bytes_of(adapter, n_positions, adapter.n_layers) <= graph_bytes:
        return False
    if graph_bytes_of(adapter, n_positions, 1) <= graph_bytes:
        return True
    fits = next((n for n in range(n_positions, 0, -1) if graph_bytes_of(adapter, n, 1) <= graph_bytes), 0)
    raise InputError(
        f"gradients of a text of {n_positions} tokens take more than graph_bytes = {graph_bytes}, which is enough for {fits}: "
        "shorten it (max_tokens=), or raise graph_bytes."
    )


# ---------------------------------------------------------------------------------------------------- gradients
class _Taps:
    """Where one pass is differentiated: in the contributions at `sites`, and in the neurons at `pos` if asked for.

    A contribution leaves its hook as it came (or, with `clean`, as `factor` times the clean one, so that nothing that
    happens at a site reaches later MLPs' contributions there), plus a delta of zero. Neurons are multiplied with a gate of one.
    """

    def __init__(
        self, adapter: Adapter, sites: Int[Tensor, " site"], pos: int, *, neurons: bool = False,
        clean: Mapping[int, Float[Tensor, "site d_model"]] | None = None, factor: float = 1.0,
    ):  # fmt: skip
        self.sites, self.pos, self.clean, self.factor = sites, sites.new_tensor([pos]), clean, factor
        self.live: dict[int, Tensor] = {}
        self.deltas: dict[int, Tensor] = {}
        self.gates: dict[int, Tensor] = {}
        self._blocked = [False]
        layers = range(adapter.n_layers)
        self.hooks = [(adapter.contribution_hook(layer), self._contribution(layer)) for layer in layers]
        if neurons:
            self.hooks += [(neuron_hook(layer), self._neurons(layer)) for layer in layers]

    # Hooks know tensors, not `self`: a graph that holds what holds the graph would never be freed by counting references.
    def _contribution(self, layer: int) -> Callable:
        sites, clean, factor, kept, deltas, blocked = (
            self.sites,
            self.clean,
            self.factor,
            self.live,
            self.deltas,
            self._blocked,
        )
        others = (sites != self.pos)[:, None]

        def block(gradient: Float[Tensor, "site d_model"]) -> Tensor | None:
            return gradient * others if blocked[0] else None

        def tap(value: Float[Tensor, "1 pos d_model"], hook) -> Tensor:
            live = value[0, sites]
            kept.setdefault(layer, live)  # not again when the block is run again
            if live.requires_grad:
                live.register_hook(block)
            delta = deltas.setdefault(layer, _leaf(torch.zeros_like(live)))
            out = live if clean is None else factor * clean[layer]
            return value.index_copy(1, sites, (out + delta)[None])

        return tap

    def _neurons(self, layer: int) -> Callable:
        pos, gates = self.pos, self.gates

        def tap(value: Float[Tensor, "1 pos d_mlp"], hook) -> Tensor:
            if value.ndim != 3:
                raise ModelError(f"{neuron_hook(layer)} has shape {tuple(value.shape)}: [batch, pos, d_mlp] is needed.")
            gate = gates.setdefault(layer, _leaf(torch.ones_like(value[0, pos])))
            return value.index_copy(1, pos, value[:, pos] * gate)

        return tap

    @property
    def contributions(self) -> dict[int, Float[Tensor, "site d_model"]]:
        return {layer: live.detach() for layer, live in self.live.items()}

    def gradients(self, value: Tensor, layers: Sequence[int], *, blocked: bool = False) -> tuple[list, list]:
        """Of `value` in the contributions [site, d_model] and in the gates [1, d_mlp] (if any) of these layers.

        `blocked`: MLPs hand no gradient on at `pos`; what is left is the direct effect.
        """
        leaves = [self.deltas[layer] for layer in layers] + [self.gates[layer] for layer in layers if self.gates]
        self._blocked[0] = blocked
        found = (
            torch.autograd.grad(value, leaves, retain_graph=True, allow_unused=True) if value.requires_grad else [None]
        )
        self._blocked[0] = False
        if any(gradient is None for gradient in found):
            raise ModelError(
                "attention patterns do not depend on what is written to hook_mlp_out or mlp.hook_post: this model's hooks "
                "have no gradients, use a layer map."
            )
        return list(found[: len(layers)]), list(found[len(layers) :])


def _leaf(value: Tensor) -> Tensor:
    return value.detach().requires_grad_(torch.is_grad_enabled())


def neuron_hook(layer: int) -> str:
    """The neurons' activations after gating: what the down projection multiplies."""
    return f"blocks.{layer}.mlp.hook_post"


def path_nodes(n_steps: int) -> list[tuple[float, float]]:
    """(factor, weight) of a quadrature over factors from 0 to 1: Gauss-Legendre in u, factor = (100^u - 1) / 99.

    Norms divide by the contributions, so that most changes where little is left of them: there the nodes are closest. Of the
    substitutions tried (powers, other bases) it left the smallest residuals on the bundled models.
    """
    nodes, weights = np.polynomial.legendre.leggauss(n_steps)  # on [-1, 1]
    powers = 100.0 ** ((nodes + 1) / 2)
    return list(zip(((powers - 1) / 99).tolist(), (weights / 2 * np.log(100) * powers / 99).tolist(), strict=True))


@dataclass(frozen=True)
class Subject:
    """One sink's outcome, and the passes that its attribution takes.

    `read` [layer, head]: whose attention on `key` is averaged. `sites`: positions at which contributions are attributed to,
    `pos`, the treated one, among them.
    """

    adapter: Adapter
    ids: Int[Tensor, " pos"]
    key: int
    pos: int
    read: Tensor
    mean: Callable[[Columns, Sequence[int | None], int], Tensor]
    min_queries: int
    sites: Int[Tensor, " site"]
    targets: tuple[str, ...]
    recompute: bool

    @property
    def stop(self) -> int:
        return int(self.read.any(-1).nonzero().max()) + 1

    @property
    def layers(self) -> range:
        """Layers whose contributions any reader can see."""
        return range(self.stop - 1)

    def taps(self, *, neurons: bool = False, **held) -> _Taps:
        return _Taps(self.adapter, self.sites, self.pos, neurons=neurons and "neurons" in self.targets, **held)

    @contextmanager
    def outcome(self, taps: _Taps) -> Iterator[Float[Tensor, ""]]:
        """One pass; the outcome as it depends on the taps."""
        with _pass(self.adapter, self.ids, (self.key,), taps.hooks, self.stop, recompute=self.recompute) as columns:
            values = self.mean(columns, self.adapter.windows[: self.stop], self.min_queries)[..., 0]
            yield values[self.read[: self.stop]].mean()

    def value(self, taps: _Taps) -> float:
        with torch.no_grad(), self.outcome(taps) as value:
            return value.item()

    def by_gradient(self) -> dict[str, Tensor | float]:
        """Two forward passes (clean, removed) and one or two backward ones."""
        found, contributions = self._at_clean()
        return {**found, "removed": self.value(self.taps(clean=contributions, factor=0.0))}

    def _at_clean(self) -> tuple[dict[str, Tensor | float], dict[int, Tensor]]:
        taps = self.taps(neurons=True)
        with torch.enable_grad(), self.outcome(taps) as value:
            contributions = taps.contributions
            found = self._found(contributions, *taps.gradients(value, self.layers))
            if "direct" in self.targets:
                direct, _ = taps.gradients(value, self.layers, blocked=True)
                found["direct"] = self._found(contributions, direct, [])["attribution"]
            return {**found, "clean": value.item()}, contributions

    def by_integration(self, n_steps: int) -> dict[str, Tensor | float]:
        """Two forward passes (clean, removed), `n_steps` forward and backward, and one more of both for neurons."""
        taps = self.taps()
        clean = self.value(taps)
        contributions = taps.contributions
        means = [torch.zeros_like(contributions[layer]) for layer in self.layers]
        for factor, weight in path_nodes(n_steps):
            means = [mean + weight * g for mean, g in zip(means, self._on_path(contributions, factor), strict=True)]
        gates = self._local(contributions, means) if "neurons" in self.targets else []
        removed = self.value(self.taps(clean=contributions, factor=0.0))
        return {**self._found(contributions, means, gates), "clean": clean, "removed": removed}

    def _on_path(self, contributions: Mapping[int, Tensor], factor: float) -> list[Float[Tensor, "site d_model"]]:
        taps = self.taps(clean=contributions, factor=factor)
        with torch.enable_grad(), self.outcome(taps) as value:
            return taps.gradients(value, self.layers)[0]

    def _local(self, contributions: Mapping[int, Tensor], gradients: Sequence[Tensor]) -> Sequence[Tensor]:
        """From gradients in contributions to those in the gates of their own neurons, in the clean run."""
        taps = self.taps(neurons=True, clean=contributions)
        with torch.enable_grad(), self.outcome(taps):
            outputs, gates = ([part[layer] for layer in self.layers] for part in (taps.live, taps.gates))
            return torch.autograd.grad(outputs, gates, self._at_pos(gradients))

    def _at_pos(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        return [gradient * (self.sites == self.pos)[:, None] for gradient in gradients]

    def _found(self, contributions: Mapping[int, Tensor], gradients: Sequence[Tensor], gates: Sequence[Tensor]) -> dict:
        """gradient . (0 - contribution), in float64."""
        pairs = zip(self.layers, gradients, strict=True)
        effects = torch.stack([-(g.double() * contributions[layer].double()).sum(-1) for layer, g in pairs])
        found = {"attribution": effects[:, self.sites == self.pos][:, 0], "positions": effects}
        return found | ({"neurons": -torch.cat(list(gates)).double()} if gates else {})
