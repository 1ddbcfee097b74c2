"""Sink circuits planted a second time, by other means than `sink_circuits.planted`: it imports nothing of the project.

Tokens: `BOS` becomes the primary sink, `EARLY` a secondary one that an MLP ends later, `LATE` one that lives to the end. Beside them
decoys: `LOUD`, a massive vector along a direction that no head looks for; `DRAWN`, whose embedding a head looks for;
`HEADED`, which an attention head (no MLP) turns to the sink direction. All tokens share a direction of twice their own norm.
Two heads look for the sink direction from layer 0 on, in the one coordinate that rotation leaves alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import transformers
from torch import Tensor, nn

D, HEADS, D_HEAD, D_MLP, VOCAB, CONTEXT, LAYERS = 64, 4, 16, 64, 48, 128, 12
BOS, EARLY, LATE, LOUD, DRAWN, HEADED = range(1, 7)
SPECIAL = 7
N_TOKENS, WINDOW = 96, 48
KINDS = ("llama", "gpt2", "gpt_neox", "gemma2", "mistral", "qwen3")
LOOK, LOOK_SELF = (
    D_HEAD - 1,
    D_HEAD - 2,
)  # coordinates of a head: what sinks are looked for in, what a token finds itself by

_PLAIN = {
    "vocab_size": VOCAB, "hidden_size": D, "intermediate_size": D_MLP, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "max_position_embeddings": CONTEXT, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
_GROUPED = {**_PLAIN, "num_key_value_heads": 2, "rope_parameters": {"rope_type": "default", "rope_theta": 1e12}}
_CONFIGS = {
    "llama": ("Llama", _GROUPED),
    "mistral": ("Mistral", {**_GROUPED, "head_dim": D_HEAD, "sliding_window": WINDOW}),
    "qwen3": ("Qwen3", {**_GROUPED, "head_dim": D_HEAD}),
    "gemma2": ("Gemma2", {**_GROUPED, "head_dim": D_HEAD, "query_pre_attn_scalar": D_HEAD, "sliding_window": WINDOW}),
    "gpt_neox": ("GPTNeoX", {**_PLAIN, "use_parallel_residual": True, "rotary_pct": 0.5}),
    "gpt2": (
        "GPT2",
        {"vocab_size": VOCAB, "n_embd": D, "n_layer": LAYERS, "n_head": HEADS, "n_positions": CONTEXT, "n_inner": D_MLP,
         "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 0},
    ),
}  # fmt: skip
WINDOWS = {"mistral": (WINDOW,) * LAYERS, "gemma2": (WINDOW, None) * (LAYERS // 2)}
UNGATED = ("gpt2", "gpt_neox")
HAS_HEADED = ("llama", "gpt2", "gpt_neox", "mistral")  # norms of queries, keys or attention's output would undo it


@dataclass(frozen=True)
class Other:
    """One planted model and what was put into it; layers, norms of what is written, the neuron that writes it."""

    kind: str
    model: nn.Module
    tokens: Tensor
    layer: dict[str, int]  # bos, early, late, eraser, loud, headed
    norm: dict[str, float]
    neuron: dict[str, int]
    direction: Tensor

    def places(self, token: int) -> list[int]:
        return (self.tokens == token).nonzero()[:, 0].tolist()

    @property
    def lives(self) -> set[tuple[int, int, int, str]]:
        """(position, first layer, last layer, kind) of all that is in sink state."""
        ends = [(BOS, "bos", LAYERS - 1, "primary"), (EARLY, "early", self.layer["eraser"] - 1, "secondary"),
                (LATE, "late", LAYERS - 1, "secondary")]  # fmt: skip
        if self.kind in HAS_HEADED:
            ends.append((HEADED, "headed", LAYERS - 1, "secondary"))
        return {(pos, self.layer[name], end, what) for token, name, end, what in ends for pos in self.places(token)}

    @property
    def windows(self) -> tuple[int | None, ...]:
        return WINDOWS.get(self.kind, (None,) * LAYERS)


def text(seed: int, n: int = N_TOKENS) -> Tensor:
    """Ordinary tokens behind BOS, with two of each sink and one of each decoy among them."""
    generator = torch.Generator().manual_seed(10_000 + seed)
    ids = torch.randint(SPECIAL, VOCAB, (n,), generator=generator)
    ids[0] = BOS
    places = torch.randperm(n - 36, generator=generator) + 6
    for place, token in zip(places[:7].tolist(), (EARLY, EARLY, LATE, LATE, LOUD, DRAWN, HEADED), strict=True):
        ids[place] = token
    return ids


def blocks(model: nn.Module) -> nn.ModuleList:
    base = model.base_model
    return base.h if hasattr(base, "h") else base.layers


def writer(kind: str, block: nn.Module) -> nn.Module:
    """The module whose output is what the MLP adds to the residual stream."""
    return block.post_feedforward_layernorm if kind == "gemma2" else block.mlp


@torch.no_grad()
def plant(kind: str, seed: int) -> Other:
    generator = torch.Generator().manual_seed(seed)
    family, config = _CONFIGS[kind]
    with torch.random.fork_rng(devices=[]):
        model_class = getattr(
            transformers, f"{family}{'LMHead' if family == 'GPT2' else 'ForCausalLM'}".replace("LMHead", "LMHeadModel")
        )
        model = model_class(getattr(transformers, f"{family}Config")(**config)).eval()
    model.config.architectures = [model_class.__name__]
    for name, parameter in model.named_parameters():
        parameter.fill_(1.0 if "norm" in name and name.endswith("weight") and kind != "gemma2" else 0.0)
    if kind == "gpt2":
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if ".ln_" in name and name.endswith("weight") else 0.0)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    layer = {"bos": draw(0, 2), "early": draw(3, 5), "loud": draw(1, 4), "headed": draw(3, 5)}
    layer |= {"late": layer["early"] + draw(1, 2), "eraser": layer["early"] + draw(3, 4)}
    norm = {"bos": draw(60, 120), "early": draw(20, 40), "late": draw(20, 40), "loud": 80.0, "headed": 40.0}
    norm["eraser"] = -norm["early"]
    neuron = {"bos": 63, "loud": 62, "early": draw(0, 20), "late": draw(21, 40), "eraser": draw(41, 60)}

    axes = torch.randn(D, D, generator=generator, dtype=torch.float64)
    if kind in UNGATED:
        axes[:, 0] = 1  # LayerNorm takes out the mean
        rows = torch.linalg.qr(axes).Q.T[1:].float()
    else:
        rows = torch.linalg.qr(axes).Q.T.float()
    if kind == "gemma2":  # a norm behind the MLP: its gain is set coordinate by coordinate
        rows = torch.eye(D)[torch.randperm(D, generator=generator)]
    shared, sink, loud, drawn, *rest = rows
    own, noise = dict(zip(range(SPECIAL), rest, strict=False)), torch.stack(rest[SPECIAL:])

    def stir(*size: int) -> Tensor:
        return torch.randn(*size, len(noise), generator=generator) @ noise / len(noise) ** 0.5

    embedding = 6 * shared + 3 * nn.functional.normalize(stir(VOCAB), dim=-1)
    for token, feature in own.items():
        embedding[token] += 3 * feature
    embedding[DRAWN] += 3 * drawn
    model.get_input_embeddings().weight.copy_(embedding / (D**0.5 if kind == "gemma2" else 1))
    if kind == "gpt2":
        model.transformer.wpe.weight.copy_(0.5 * stir(CONTEXT))
    if kind != "gemma2":
        model.get_output_embeddings().weight.copy_(2 * stir(VOCAB))
    for index, block in enumerate(blocks(model)):
        _set_heads(kind, block, stir, shared, sink, drawn, own[HEADED] if index == layer["headed"] else None)
        for neuron_index in range(D_MLP):
            _set_neuron(kind, block, neuron_index, 0.3 * stir(), stir(), 0.05 * stir())
        if kind == "gemma2":
            block.post_feedforward_layernorm.weight.fill_(0.02 - 1)
            block.post_attention_layernorm.weight.fill_(0.01 - 1)

    tokens = text(seed)
    writes = [
        ("bos", BOS, sink),
        ("early", EARLY, sink),
        ("late", LATE, sink),
        ("loud", LOUD, loud),
        ("eraser", EARLY, sink),
    ]
    for name, token, direction in sorted(writes, key=lambda write: layer[write[0]]):
        block, amount = blocks(model)[layer[name]], norm[name]
        if kind == "gemma2":  # 300 is far above the other neurons: what the norm leaves is its gain, and the sign
            gain = block.post_feedforward_layernorm.weight
            gain[direction.abs().argmax()] = abs(amount) / D**0.5 - 1
            _set_neuron(kind, block, neuron[name], own[token], own[token], direction * 300 * (1 if amount > 0 else -1))
            continue
        active = _activation(kind, model, block, tokens, token, own[token])
        steep = 4 if kind in UNGATED else 1
        _set_neuron(kind, block, neuron[name], steep * own[token], own[token], direction * amount / active)
    if kind == "gemma2":
        model.tie_weights()
    return Other(kind, model, tokens, layer, norm, neuron, sink)


def _set_heads(
    kind: str, block: nn.Module, stir, shared: Tensor, sink: Tensor, drawn: Tensor, turned: Tensor | None
) -> None:
    n_keys = HEADS if kind in UNGATED else 2
    query, key, value, out = (
        scale * stir(n, D_HEAD) for scale, n in ((0.05, HEADS), (0.3, n_keys), (1.0, n_keys), (0.03, HEADS))
    )
    query[:, LOOK] = 0
    query[0], query[1] = 0, 0
    query[0, LOOK], query[1, LOOK] = 0.5 * shared, 0.4 * shared
    key[0, LOOK] = sink
    if n_keys == HEADS:
        key[1, LOOK] = sink
    if kind == "qwen3":
        block.self_attn.q_norm.weight.fill_(1.4)
        block.self_attn.k_norm.weight.fill_(1.4)
    else:
        key[-1, LOOK], query[3] = drawn, 0
        query[3, LOOK] = 0.6 * shared
    if turned is not None and kind in HAS_HEADED:
        # Head 2 looks for itself where it carries this feature, and writes the sink direction there.
        third = 2 if n_keys == HEADS else 1
        query[2] = 0
        query[2, LOOK_SELF], key[third, LOOK_SELF], value[third, 0] = 8 * turned, 8 * turned, 4 * turned
        out[2, 0] = 3 * sink
        if n_keys < HEADS:
            out[3, 0] = 0  # shares these values
    if kind == "gpt2":
        block.attn.c_attn.weight.copy_(torch.cat([part.reshape(-1, D) for part in (query, key, value)]).T)
        block.attn.c_proj.weight.copy_(out.reshape(-1, D))
    elif kind == "gpt_neox":
        block.attention.query_key_value.weight.copy_(torch.stack([query, key, value], dim=1).reshape(-1, D))
        block.attention.dense.weight.copy_(out.reshape(-1, D).T)
    else:
        attention = block.self_attn
        for name, part in (("q_proj", query), ("k_proj", key), ("v_proj", value)):
            attention.get_submodule(name).weight.copy_(part.reshape(-1, D))
        attention.o_proj.weight.copy_(out.reshape(-1, D).T)


def _set_neuron(kind: str, block: nn.Module, index: int, gate: Tensor, up: Tensor, out: Tensor) -> None:
    if kind == "gpt2":
        block.mlp.c_fc.weight[:, index], block.mlp.c_proj.weight[index] = gate, out
    elif kind == "gpt_neox":
        block.mlp.dense_h_to_4h.weight[index], block.mlp.dense_4h_to_h.weight[:, index] = gate, out
    else:
        block.mlp.gate_proj.weight[index], block.mlp.up_proj.weight[index] = gate, up
        block.mlp.down_proj.weight[:, index] = out


def _activation(kind: str, model: nn.Module, block: nn.Module, tokens: Tensor, token: int, feature: Tensor) -> Tensor:
    """What a neuron that reads `feature` is worth at `token`, from what arrives at the MLP."""
    seen = {}
    handle = block.mlp.register_forward_pre_hook(lambda module, args: seen.update(x=args[0][0]))
    model(tokens[None])
    handle.remove()
    read = seen["x"][int((tokens == token).nonzero()[0])] @ feature
    if kind not in UNGATED:
        return nn.functional.silu(read) * read
    return nn.functional.gelu(4 * read, approximate="tanh" if kind == "gpt2" else "none")


@torch.no_grad()
def forward(other: Other, tokens: Tensor, edits: dict[tuple[int, int], float] | None = None) -> tuple[Tensor, Tensor]:
    """Eager Hugging Face: (resid_post [layer, pos, d_model], pattern [layer, head, query, key]); `edits[layer, pos]` is the
    factor of what that MLP adds there."""
    edits, resid, handles = edits or {}, [], []

    def scaled(layer: int):
        def hook(module, args, out):
            out = out.clone()
            for (at, pos), factor in edits.items():
                if at == layer:
                    out[0, pos] *= factor
            return out

        return hook

    for layer, block in enumerate(blocks(other.model)):
        handles.append(writer(other.kind, block).register_forward_hook(scaled(layer)))
        handles.append(
            block.register_forward_hook(
                lambda m, a, out: resid.append((out[0] if isinstance(out, tuple) else out).reshape(-1, D))
            )
        )
    other.model.set_attn_implementation("eager")
    pattern = other.model(tokens[None], output_attentions=True).attentions
    for handle in handles:
        handle.remove()
    return torch.stack(resid), torch.cat(pattern).double()
