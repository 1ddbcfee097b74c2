"""The fast execution path: a plain Hugging Face module that shares its parameters with the user's TransformerBridge.

TransformerLens' own attention builds the whole pattern in every layer of every forward pass; the twin computes it in
blocks (`sink_circuits.attention`) and can start above any block, in the middle of a text. What it gives is held against
the bridge when a model is adapted (`sink_circuits.adapters`); where it cannot serve, the reference path takes over.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from sink_circuits.attention import AttentionForm, AttentionSums, streamed_attention
from sink_circuits.errors import InputError
from sink_circuits.losses import Unembedding

ATTENTION_NAME = "sink_circuits_streamed"


class TwinRefused(RuntimeError):
    """The twin cannot serve this model; the message says why. The reference path serves instead."""


@dataclass
class Tap:
    """What one block's hooks and attention read and write during one pass; owned by the twin, one per block."""

    chosen: Tensor | None = None
    sums: bool = False
    odds: bool = True
    prefix: tuple[Tensor, Tensor] | None = None
    edit: Callable[[Tensor], Tensor] | None = None
    holds: Mapping[str, Callable[[Tensor, int], Tensor]] = field(default_factory=dict)
    groups: Float[Tensor, "row key group"] | None = None
    form: AttentionForm | None = None
    key: Tensor | None = None
    value: Tensor | None = None
    attention: AttentionSums | None = None
    grouped: Float[Tensor, "batch query head group"] | None = None
    base: Tensor | None = None
    contribution: Tensor | None = None
    attn_out: Tensor | None = None

    def held(self, what: str, activation: Tensor, position_axis: int) -> Tensor:
        """The activation, with clean values where some row of the batch holds it."""
        return self.holds[what](activation, position_axis) if what in self.holds else activation

    def clear(self) -> None:
        """Let everything go: a tap holds tensors only while its block's pass is looked at."""
        for name, default in vars(Tap()).items():
            setattr(self, name, default)


def attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask, scaling=None, sliding_window=None,
    softcap=None, s_aux=None, **kwargs,
):  # fmt: skip
    """Hugging Face's attention interface, served by `streamed_attention`; the block's `Tap` says what to keep."""
    if attention_mask is not None:
        raise TwinRefused("the model builds an attention mask of its own")
    tap: Tap = module.sink_circuits_tap  # type: ignore[assignment]  # put there by Twin
    # Behind the rotary embedding, which is the same for all rows: as good as before it.
    query, key, value = (tap.held(what, x, 2) for what, x in (("q", query), ("k", key), ("v", value)))
    if tap.prefix is not None:
        key = torch.cat([tap.prefix[0].expand(len(key), -1, -1, -1), key], dim=2)
        value = torch.cat([tap.prefix[1].expand(len(value), -1, -1, -1), value], dim=2)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    tap.form = AttentionForm(float(scaling), sliding_window, softcap, s_aux)
    tap.key, tap.value = key, value
    if tap.groups is None:
        out, tap.attention = streamed_attention(
            query, key, value, tap.form, chosen=tap.chosen, sums=tap.sums, odds=tap.odds
        )
        return out, None
    # A value that is 1 for the keys of a group and 0 for the others comes out as the weight that the group was given.
    indicators = tap.groups[:, None].expand(len(value), value.shape[1], -1, -1).float()
    values = torch.cat([value.float(), indicators], dim=-1)
    out, tap.attention = streamed_attention(query.float(), key, values, tap.form, chosen=tap.chosen, sums=tap.sums)
    out, tap.grouped = out.split([value.shape[-1], indicators.shape[-1]], dim=-1)
    return out.to(query.dtype), None


AttentionInterface.register(ATTENTION_NAME, attention_forward)
AttentionMaskInterface.register(ATTENTION_NAME, lambda *args, **kwargs: None)


@dataclass(frozen=True)
class BlockInputs:
    """What the model hands to each block beside the residual stream (positions, rotary tables), for one text length."""

    embed: Float[Tensor, "1 pos d_model"]
    kwargs: tuple[Mapping, ...]

    def suffix(self, layer: int, start: int) -> Mapping:
        """The same from position `start` on. Raises TwinRefused for a tensor whose position axis is not known."""
        return (
            {name: _from_position(name, x, start) for name, x in self.kwargs[layer].items()}
            if start
            else self.kwargs[layer]
        )


def _from_position(name: str, x, start: int):
    if isinstance(x, tuple | list):
        return type(x)(_from_position(name, part, start) for part in x)
    if not isinstance(x, Tensor):
        return x
    if name == "position_embeddings":
        return x[..., start:, :]
    if name in ("position_ids", "cache_position"):
        return x[..., start:]
    raise TwinRefused(f"the blocks take a tensor {name!r} whose position axis is not known")


@dataclass(frozen=True)
class BlockRun:
    """One block's pass, seen from outside: residual stream in, residual stream out, and what its tap kept."""

    layer: int
    resid_post: Float[Tensor, "batch pos d_model"]
    tap: Tap


@dataclass
class Twin:
    """The plain module with a tap in every block. Build it with `Twin.of_bridge`."""

    module: nn.Module
    blocks: nn.ModuleList
    contributions: list[nn.Module]
    readers: list[nn.Module]
    attentions: list[nn.Module]
    final_norm: nn.Module
    parallel: bool
    argument_names: tuple[str, ...]
    taps: list[Tap] = field(default_factory=list)
    others: list[Twin] = field(default_factory=list)

    def beside(self, bridge, n: int) -> list[Twin]:
        """`n` twins of one bridge, for as many threads: this one, and others around the same parameters, made once."""
        while len(self.others) < n - 1:
            self.others.append(Twin.of_bridge(bridge))
        return [self, *self.others[: n - 1]]

    @staticmethod
    def of_bridge(bridge) -> Twin:
        """Rebuild the bridge's Hugging Face model around the very same parameters. Raises TwinRefused with the reason."""
        module = plain_module(bridge, ATTENTION_NAME)
        parts = bridge.adapter.component_mapping
        blocks = module.get_submodule(parts["blocks"].name)
        if not isinstance(blocks, nn.ModuleList):
            raise TwinRefused("the blocks are not a list of modules")
        if any(isinstance(part, nn.Conv1d) for part in blocks.modules()):
            # A run that resumes in the middle of a text gives keys and values of what came before, not such a state.
            raise TwinRefused("the blocks mix tokens beside attention, by convolutions or a state space")
        if not isinstance(module.get_output_embeddings(), nn.Linear):
            raise TwinRefused("the unembedding is not one linear map")
        writer, side = _place(bridge, "hook_mlp_out")
        attn_writer, attn_side = _place(bridge, "hook_attn_out")
        parallel = "blocks.0.hook_resid_mid" not in bridge.hook_dict
        reader, reader_side = (attn_writer, "in") if parallel else _place(bridge, "hook_resid_mid")
        if (side, attn_side, reader_side) != ("out", "out", "in"):
            raise TwinRefused("the bridge's residual hooks do not stand at the outputs of attention and MLP")
        twin = Twin(
            module=module,
            blocks=blocks,
            contributions=[b.get_submodule(writer) for b in blocks],
            readers=[b.get_submodule(reader) for b in blocks],
            attentions=[b.get_submodule(attn_writer) for b in blocks],
            final_norm=module.get_submodule(parts["ln_final"].name),
            parallel=parallel,
            argument_names=tuple(inspect.signature(type(blocks[0]).forward).parameters)[1:],
        )
        twin._install_taps(parts["blocks"].submodules["attn"].name, _norms(bridge))
        return twin

    def _install_taps(self, attn_name: str, norms: Mapping[str, str]) -> None:
        for index, block in enumerate(self.blocks):
            tap = Tap()
            self.taps.append(tap)
            block.get_submodule(attn_name).sink_circuits_tap = tap  # type: ignore[assignment]  # plain state, not a module
            if not self.parallel:
                self.readers[index].register_forward_pre_hook(lambda m, args, tap=tap: _keep(tap, "base", args[0]))
            self.attentions[index].register_forward_hook(lambda m, args, out, tap=tap: _attend(tap, out))
            self.contributions[index].register_forward_hook(lambda m, args, out, tap=tap: _contribute(tap, out))
            for hook, path in norms.items():  # after the hooks above: of a post-norm they see what its own hook leaves
                block.get_submodule(path).register_forward_hook(
                    lambda m, args, out, tap=tap, hook=hook: _normalise(tap, hook, m, args[0], out), prepend=True
                )

    def block_inputs(self, tokens: Int[Tensor, " pos"]) -> BlockInputs:
        """Embed a text and note what every block would be given; no block is computed."""
        seen: list[Mapping] = []
        embed: list[Tensor] = []

        def note(block, args, kwargs):
            given = {**dict(zip(self.argument_names, args, strict=False)), **kwargs}
            embed.append(given.pop(self.argument_names[0]))
            seen.append({k: v for k, v in given.items() if k not in ("past_key_values", "layer_past", "use_cache")})
            return args, kwargs

        with _skipped(self.blocks), _hooked(self.blocks, note):
            self.module.base_model(input_ids=tokens[None], use_cache=False)
        return BlockInputs(embed[0], tuple(seen))

    def run(
        self, resid: Float[Tensor, "batch pos d_model"], inputs: BlockInputs, layers: range, *, start: int = 0,
        prefix: Callable[[int], tuple[Tensor, Tensor]] | None = None, chosen: Tensor | None = None, sums: bool = False,
        odds: bool = True, edits: Mapping[int, Callable[[Tensor], Tensor]] | None = None,
        holds: Mapping[int, Mapping[str, Callable[[Tensor, int], Tensor]]] | None = None, groups: Tensor | None = None,
    ) -> Iterator[BlockRun]:  # fmt: skip
        """Run `layers` one after the other from the residual stream `resid`, whose first position is `start`.

        `prefix(layer)` gives the keys and values of the positions before `start`. `edits[layer]` maps that block's
        contribution [batch, pos, d_model] to another. `holds[layer]` maps activations to what stands in their place
        (`sink_circuits.holds`). `groups` [1 or batch, key, group]: weights of every key, whose sums over each query's
        attention the tap's `grouped` holds. Each block's tap is valid until the next block is asked for.
        """
        edits, holds = edits or {}, holds or {}
        for layer in layers:
            tap = self.taps[layer]
            tap.chosen, tap.sums, tap.odds = chosen, sums, odds
            tap.edit, tap.holds, tap.groups = edits.get(layer), holds.get(layer, {}), groups
            tap.prefix = prefix(layer) if prefix is not None and start else None
            resid_pre = resid
            out = self.blocks[layer](resid, **inputs.suffix(layer, start))
            resid = tap.held("resid_post", _first(out), 1)
            if self.parallel:
                tap.base = resid_pre + tap.attn_out
            yield BlockRun(layer, resid, tap)
            tap.clear()

    @property
    def logits(self) -> Unembedding:
        """Final residual stream -> logits, whole or in parts of the vocabulary."""
        linear, config = self.module.get_output_embeddings(), self.module.config
        scale, softcap = (getattr(config, name, None) for name in ("logit_scale", "final_logit_softcapping"))
        return Unembedding(self.final_norm, linear.weight, getattr(linear, "bias", None), scale, softcap)


def fingerprint(parameters: Sequence[Tensor]) -> tuple:
    """Changes when a parameter is replaced or written to: a twin made before that no longer speaks for the model."""
    # `parameter.data.normal_()` does not count as a version: a few values are looked at too, all of a device in one go.
    values: dict[tuple, list[Tensor]] = {}
    for flat in (p.detach().reshape(-1) for p in parameters if p.numel() and not p.is_meta):
        values.setdefault((flat.device, flat.dtype), []).extend((flat[0], flat[len(flat) // 2], flat[-1]))
    seen = (tuple(torch.stack(own).float().tolist()) for own in values.values())
    return tuple((p.data_ptr(), p._version) for p in parameters) + tuple(seen)


def plain_module(bridge, attn_implementation: str) -> nn.Module:
    """The bridge's Hugging Face model as plain modules around the bridge's own parameters; nothing is copied.

    Raises TwinRefused when the architecture does not take the attention implementation, or a tensor is missing.
    """
    original = bridge.original_model
    try:
        with torch.device("meta"):
            module = type(original)._from_config(
                copy.deepcopy(original.config), attn_implementation=attn_implementation, dtype=bridge.cfg.dtype
            )
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise TwinRefused(
            f"{type(original).__name__} does not take attention function {attn_implementation!r} ({error})"
        ) from error
    for kind in ("parameters", "buffers"):
        tensors = _plain_names(dict(getattr(original, f"named_{kind}")(remove_duplicate=False)))
        for path, old in list(getattr(module, f"named_{kind}")(remove_duplicate=False)):
            if path not in tensors or tensors[path].shape != old.shape:
                raise TwinRefused(f"{path} of the plain model is not in the bridge")
            parent, _, leaf = path.rpartition(".")
            getattr(module.get_submodule(parent), f"_{kind}")[leaf] = tensors[path]
    return module.eval()


def _place(bridge, hook: str) -> tuple[str, str]:
    """Where a hook of a block stands: (name of the Hugging Face submodule within the block, "in" or "out")."""
    point = bridge.hook_dict.get(f"blocks.0.{hook}")
    match = re.fullmatch(r"blocks\.0\.(\w+)\.hook_(in|out)", point.name or "") if point is not None else None
    component = bridge.adapter.component_mapping["blocks"].submodules.get(match[1]) if match else None
    if component is None or component.name is None:
        raise TwinRefused(f"blocks.0.{hook} does not stand at a named part of the block")
    return component.name, match[2]


def _plain_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names as the unwrapped Hugging Face model spells them."""
    return {name.replace("._original_component", ""): tensor for name, tensor in tensors.items()}


def _norms(bridge) -> dict[str, str]:
    """The norms of a block: TransformerLens' hook of the denominator -> Hugging Face's submodule within the block."""
    parts = bridge.adapter.component_mapping["blocks"].submodules
    attn = parts["attn"]
    places = [(name, part, "") for name, part in parts.items()]
    places += [(f"attn.{name}", part, f"{attn.name}.") for name, part in (attn.submodules or {}).items()]
    return {
        f"{name}.hook_scale": f"{parent}{part.name}"
        for name, part, parent in places
        if part.name and f"blocks.0.{name}.hook_scale" in bridge.hook_dict
    }


def _normalise(tap: Tap, hook: str, norm: nn.Module, x: Tensor, out: Tensor) -> Tensor | None:
    """A norm's output with the denominator that stands in its own's place; None where it is its own.

    RMSNorm and LayerNorm: out = gain * numerator / denominator + bias, so the rest needs not be known.
    """
    if hook not in tap.holds:
        return None
    eps = getattr(norm, "eps", getattr(norm, "variance_epsilon", None))
    kind = type(norm).__name__
    if not isinstance(eps, int | float) or not kind.endswith(("RMSNorm", "LayerNorm")):
        raise InputError(f"{kind} has no denominator that is known here: hold norm scales with path='reference'.")
    wide = x.float()
    wide = wide - wide.mean(-1, keepdim=True) if kind.endswith("LayerNorm") else wide
    own = (wide.square().mean(-1, keepdim=True) + eps).sqrt()
    held = tap.held(hook, own, 1)
    bias = getattr(norm, "bias", None)
    shift = 0.0 if bias is None else bias.float()
    return torch.where(held == own, out, ((out.float() - shift) * (own / held) + shift).to(out.dtype))


def _first(out):
    return out[0] if isinstance(out, tuple) else out


def _keep(tap: Tap, name: str, value) -> None:
    setattr(tap, name, _first(value))


def _attend(tap: Tap, out):
    tap.attn_out = tap.held("attn_out", _first(out), 1)
    return _replaced(out, tap.attn_out)


def _contribute(tap: Tap, out):
    contribution = tap.held("mlp_out", _first(out), 1)
    tap.contribution = contribution if tap.edit is None else tap.edit(contribution)
    return _replaced(out, tap.contribution)


def _replaced(out, value: Tensor):
    """What a forward hook returns: None where the value is the module's own."""
    if value is _first(out):
        return None
    return (value, *out[1:]) if isinstance(out, tuple) else value


@contextmanager
def _skipped(blocks: nn.ModuleList):
    """For the moment every block hands its input on unchanged."""
    for block in blocks:
        block.forward = lambda hidden_states=None, *args, **kwargs: hidden_states
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


@contextmanager
def _hooked(blocks: nn.ModuleList, hook):
    handles = [block.register_forward_pre_hook(hook, with_kwargs=True) for block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
