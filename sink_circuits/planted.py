"""Models with a sink circuit put in by hand: the known answer every instrument is held to.

`minimal()` sets the weights of a small Llama by formula; nothing is trained. Its residual stream is spanned by an
orthonormal set of named directions (`FEATURES`) and, orthogonal to them, a noise space in which tokens differ:

- every token carries the `shared` direction; all queries read it, so they are the same wherever no sink has formed;
- MLP 2 reads "this token is BOS" and writes along `sink`: the primary sink, until MLP 21 erases it;
- MLPs 6 and 7 read "this token is of the secondary kind" and write along `sink`, each enough alone; MLP 13 erases it;
- MLP 4 writes as large a vector along `decoy` at the decoy token: a massive norm that no key reads;
- keys of the sink heads read `sink`, so a token in sink state after block l draws attention in block l + 1.

Attention outputs and the other neurons write small vectors into the noise space only, so they never make or break a
planted state. Each `Write` says which neurons add what; other plants are other lists of writes.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import LlamaForCausalLM

PARTS = ("primary", "secondary", "stand_in", "decoy", "shared", "eraser")
FEATURES = ("shared", "sink", "decoy", "is_bos", "is_secondary", "is_decoy")
BOS, SECONDARY, DECOY, FIRST_ORDINARY = 0, 1, 2, 3  # token ids
TOKEN_FEATURES = {BOS: "is_bos", SECONDARY: "is_secondary", DECOY: "is_decoy"}

D_MODEL, N_LAYERS, N_HEADS, N_KEY_HEADS, D_HEAD, D_MLP, D_VOCAB, N_CTX = 64, 24, 4, 2, 16, 32, 64, 1024
ROPE_THETA = 1e8  # the slowest rotary pair turns by 1e-4 over the whole context: it carries the sink heads' keys
SINK_LOGITS = {0: 7.0, 1: 6.0}  # sink head -> attention logit of a saturated sink (ordinary tokens: about 0)

SHARED_NORM, FEATURE_NORM, NOISE_NORM = 10.0, 3.0, 2.0  # of the parts of an embedding
PRIMARY_NORM, SECONDARY_NORM, STAND_IN_READS_SINK = 80.0, 40.0, 0.35


@dataclass(frozen=True)
class Neuron:
    """One MLP neuron: silu(gate . x) * (up . x), where x is the normalised residual and weights are per feature."""

    gate: Mapping[str, float]
    up: Mapping[str, float]


@dataclass(frozen=True)
class Write:
    """What one MLP adds at one kind of token, along one feature.

    `norm` is how much (None: minus what is there, an eraser). `parts` are the names that take the write out.
    """

    layer: int
    token: int
    feature: str
    norm: float | None
    neurons: tuple[Neuron, ...]
    parts: tuple[str, ...]


@dataclass(frozen=True)
class Sink:
    """One kind of planted sink: every token with id `token` is in sink state after blocks l_start..l_end.

    `forming`: MLPs whose joint removal takes it away. `eraser`: the MLP that ends it (None: it lives to the end).
    """

    token: int
    kind: str
    l_start: int
    l_end: int
    forming: tuple[int, ...]
    eraser: int | None

    @property
    def layers(self) -> list[int]:
        return list(range(self.l_start, self.l_end + 1))


@dataclass(frozen=True, eq=False)
class Truth:
    """What was planted. Directions are unit vectors [d_model]; `sink_heads` are the same heads in every layer."""

    sinks: tuple[Sink, ...]
    primary_position: int | None
    decoy_layer: int | None
    eraser_layers: tuple[int, ...]
    sink_heads: tuple[int, ...]
    direction: Tensor
    decoy_direction: Tensor
    shared_direction: Tensor

    def sink(self, kind: str) -> Sink:
        """The planted sink of this kind ("primary" or "secondary")."""
        for sink in self.sinks:
            if sink.kind == kind:
                return sink
        raise KeyError(f"no sink of kind {kind!r} is planted here; planted kinds: {[s.kind for s in self.sinks]}")


@dataclass(frozen=True, eq=False)
class Planted:
    """A Hugging Face model with a planted circuit, and the truth about it."""

    hf_model: LlamaForCausalLM
    truth: Truth

    def tokens(
        self,
        n_tokens: int = 96,
        sinks: Iterable[int] = (40,),
        decoys: Iterable[int] = (60,),
        seed_name: str = "prompt",
    ) -> Tensor:
        """A prompt [n_tokens]: BOS, secondary and decoy tokens at the given positions, ordinary tokens elsewhere.

        The ordinary tokens depend on `seed_name` only: one name, one text, cut to `n_tokens`.
        """
        sinks, decoys = list(sinks), list(decoys)
        if not 1 < n_tokens <= N_CTX:
            raise ValueError(f"n_tokens is {n_tokens}; the planted models take 2..{N_CTX}")
        for pos in sinks + decoys:
            if not 0 < pos < n_tokens:
                raise ValueError(f"position {pos} is outside 1..{n_tokens - 1}: position 0 holds BOS")
        if both := sorted(set(sinks) & set(decoys)):
            raise ValueError(f"positions {both} are asked to hold both a sink and a decoy; name each position once")
        text = torch.randint(FIRST_ORDINARY, D_VOCAB, (N_CTX,), generator=_generator(f"tokens/{seed_name}"))
        tokens = text[:n_tokens].clone()
        tokens[0] = BOS
        tokens[sinks] = SECONDARY
        tokens[decoys] = DECOY
        return tokens

    def bridge(self) -> TransformerBridge:
        """A TransformerBridge without a tokenizer, around a copy of the model (a bridge changes what it wraps)."""
        from transformer_lens.model_bridge.sources import build_bridge_from_module

        hf_model = copy.deepcopy(self.hf_model)
        return build_bridge_from_module(
            hf_model, "LlamaForCausalLM", hf_config=hf_model.config, tokenizer=None, model_name="planted"
        )

    def hooked(self) -> HookedTransformer:
        """A HookedTransformer without a tokenizer, with a copy of the weights, neither folded nor centred."""
        try:
            from transformer_lens import HookedTransformer, HookedTransformerConfig
            from transformer_lens.pretrained.weight_conversions import convert_llama_weights
        except ImportError as error:
            raise ImportError(
                "HookedTransformer was removed in TransformerLens 4: install transformer-lens 3.9 or use bridge()."
            ) from error
        cfg = HookedTransformerConfig(
            n_layers=N_LAYERS, d_model=D_MODEL, n_ctx=N_CTX, d_head=D_HEAD, n_heads=N_HEADS, d_mlp=D_MLP,
            n_key_value_heads=N_KEY_HEADS, d_vocab=D_VOCAB, act_fn="silu", gated_mlp=True, normalization_type="RMS",
            final_rms=True, eps=self.hf_model.config.rms_norm_eps, positional_embedding_type="rotary",
            rotary_dim=D_HEAD, rotary_base=int(ROPE_THETA), rotary_adjacent_pairs=False, init_weights=False,
            model_name="planted", device="cpu",
        )  # fmt: skip
        model = HookedTransformer(cfg, move_to_device=False)
        model.load_and_process_state_dict(
            convert_llama_weights(copy.deepcopy(self.hf_model), cfg),
            fold_ln=False, center_writing_weights=False, center_unembed=False, fold_value_biases=False,
        )  # fmt: skip
        return model.eval()


def minimal(without: Collection[str] = ()) -> Planted:
    """The smallest circuit with everything in it: primary, secondary with a stand-in, decoy, shared direction, erasers.

    `without` names parts (`PARTS`) whose weights are left out: the negative twin of each planted fact.
    """
    without = {without} if isinstance(without, str) else set(without)
    if unknown := sorted(without - set(PARTS)):
        raise ValueError(f"unknown part(s) to leave out: {unknown}; allowed are {list(PARTS)}")

    def token_neuron(feature: str, **up: float) -> tuple[Neuron, ...]:
        return (Neuron(gate={feature: 1.0}, up={feature: 1.0, **up}),)

    # In the order in which their amounts are set: the stand-in before MLP 6, so that it is worth a whole sink alone.
    # With MLP 6 there, the token feature it reads is normalised down: it adds less, but still reads and adds to the
    # sink, so both MLPs write visibly in the clean run.
    writes = [
        Write(2, BOS, "sink", PRIMARY_NORM, token_neuron("is_bos"), ("primary",)),
        Write(4, DECOY, "decoy", SECONDARY_NORM, token_neuron("is_decoy"), ("decoy",)),
        Write(7, SECONDARY, "sink", SECONDARY_NORM, token_neuron("is_secondary", sink=STAND_IN_READS_SINK),
              ("secondary", "stand_in")),
        Write(6, SECONDARY, "sink", SECONDARY_NORM, token_neuron("is_secondary"), ("secondary",)),
        Write(13, SECONDARY, "sink", None, _eraser_neurons(spared="is_bos"), ("eraser",)),
        Write(21, BOS, "sink", None, _eraser_neurons(), ("eraser",)),
    ]  # fmt: skip
    return _plant([write for write in writes if not without & set(write.parts)], shared="shared" not in without)


def _plant(writes: list[Write], shared: bool) -> Planted:
    """Build the model that holds these writes, in the order given, and derive what is true of it."""
    features, noise_space = _directions()
    model = _base_model(features, noise_space, shared)
    sinks = _sinks(writes)
    truth = Truth(
        sinks=sinks,
        primary_position=0 if any(sink.kind == "primary" for sink in sinks) else None,
        decoy_layer=next((write.layer for write in writes if write.feature == "decoy"), None),
        eraser_layers=tuple(write.layer for write in writes if write.norm is None),
        sink_heads=tuple(SINK_LOGITS) if shared else (),
        direction=features["sink"],
        decoy_direction=features["decoy"],
        shared_direction=features["shared"],
    )
    planted = Planted(model, truth)
    prompt = planted.tokens(seed_name="calibration")
    n_used = [0] * N_LAYERS
    for write in writes:
        columns = slice(n_used[write.layer], n_used[write.layer] + len(write.neurons))
        n_used[write.layer] = columns.stop
        _install(model, write, columns, features, prompt)
    return planted


def _sinks(writes: list[Write]) -> tuple[Sink, ...]:
    """The sinks that a list of writes forms, one for each kind of token."""
    sinks = []
    for token, kind in ((BOS, "primary"), (SECONDARY, "secondary")):
        on_sink = [write for write in writes if write.token == token and write.feature == "sink"]
        forming = tuple(sorted(write.layer for write in on_sink if write.norm is not None))
        eraser = next((write.layer for write in on_sink if write.norm is None), None)
        if forming:
            l_end = N_LAYERS - 1 if eraser is None else eraser - 1
            sinks.append(Sink(token, kind, forming[0], l_end, forming, eraser))
    return tuple(sinks)


def _eraser_neurons(spared: str | None = None) -> tuple[Neuron, ...]:
    """Neurons that together undo any amount along the sink direction up to about 120, and nothing where none is.

    After RMSNorm only the ratio of the sink part to the shared part tells the amount, and the neurons have to undo the
    division: a sum of hinges in that ratio, fitted to the amount by least squares. So a halved or doubled sink is
    erased as well, and a removed one leaves nothing to erase. Tokens with the feature `spared` are left alone.
    """
    hinges, steepness = (0.2, 1.0, 2.5, 5.0), 10.0
    amounts = torch.linspace(0, 12 * SHARED_NORM, 241, dtype=torch.float64)
    rest = SHARED_NORM**2 + NOISE_NORM**2  # squared norm of everything but the sink direction
    rms = ((amounts**2 + rest) / D_MODEL).sqrt()
    sink, shared = amounts / rms, SHARED_NORM / rms
    gates = torch.stack([torch.nn.functional.silu(steepness * (sink - hinge * shared)) for hinge in hinges], dim=1)
    basis = torch.cat([gates * sink[:, None], gates * shared[:, None]], dim=1)  # [amount, 2 * neuron]
    up_sink, up_shared = torch.linalg.lstsq(basis, -amounts[:, None]).solution.reshape(2, len(hinges)).tolist()
    closed = {} if spared is None else {spared: -200.0 * steepness}  # the feature is small beside a saturated sink
    return tuple(
        Neuron({"sink": steepness, "shared": -steepness * hinge, **closed}, {"sink": a, "shared": b})
        for hinge, a, b in zip(hinges, up_sink, up_shared, strict=True)
    )


@torch.no_grad()
def _install(
    model: LlamaForCausalLM, write: Write, columns: slice, features: dict[str, Tensor], prompt: Tensor
) -> None:
    """Put a write into its MLP, in place of noise neurons, and set its amount by one forward pass of the prompt."""
    block = model.model.layers[write.layer]
    gain = block.post_attention_layernorm.weight  # divided out: neurons read the residual, not the scaled residual
    direction = features[write.feature]

    def reader(weights: Mapping[str, float]) -> Tensor:
        return sum(weight * features[name] for name, weight in weights.items()) / gain

    block.mlp.gate_proj.weight[columns] = torch.stack([reader(neuron.gate) for neuron in write.neurons])
    block.mlp.up_proj.weight[columns] = torch.stack([reader(neuron.up) for neuron in write.neurons])
    block.mlp.down_proj.weight[:, columns] = direction[:, None]

    seen: dict[str, Tensor] = {}
    hooks = [
        block.post_attention_layernorm.register_forward_pre_hook(lambda _, args: seen.update(base=args[0])),
        block.mlp.register_forward_hook(lambda _, args, output: seen.update(contribution=output)),
    ]
    model(prompt[None])
    for hook in hooks:
        hook.remove()
    pos = int((prompt == write.token).nonzero()[0])
    base, written = float(seen["base"][0, pos] @ direction), float(seen["contribution"][0, pos] @ direction)
    wanted = write.norm if write.norm is not None else -base
    if abs(wanted) > 1:  # otherwise an eraser without anything to erase: it keeps the amount it was fitted to
        block.mlp.down_proj.weight[:, columns] *= wanted / written


@torch.no_grad()
def _base_model(features: dict[str, Tensor], noise_space: Tensor, shared: bool) -> LlamaForCausalLM:
    """The model without any write: embeddings, heads, unembedding, and neurons that only stir the noise space."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=D_MODEL, num_hidden_layers=N_LAYERS, num_attention_heads=N_HEADS, head_dim=D_HEAD,
        num_key_value_heads=N_KEY_HEADS, intermediate_size=D_MLP, vocab_size=D_VOCAB, max_position_embeddings=N_CTX,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA}, rms_norm_eps=1e-6, use_cache=False,
        tie_word_embeddings=False, bos_token_id=BOS, eos_token_id=None, architectures=["LlamaForCausalLM"],
        attn_implementation="eager", dtype="float32",
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):  # the constructor draws weights that are all replaced below
        model = LlamaForCausalLM(config).eval()

    def noise(name: str, *shape: int) -> Tensor:
        """Seeded vectors [*shape, d_model] of about unit norm in the noise space."""
        n_noise = len(noise_space)
        return torch.randn(*shape, n_noise, generator=_generator(name)) @ noise_space / n_noise**0.5

    for name, parameter in model.named_parameters():
        if "norm" in name:  # not all ones, so that leaving a gain out shows
            parameter.copy_(1 + 0.2 * torch.rand(D_MODEL, generator=_generator(name)))

    embedding = torch.nn.functional.normalize(noise("embedding", D_VOCAB), dim=-1) * NOISE_NORM
    for token, feature in TOKEN_FEATURES.items():
        embedding[token] += FEATURE_NORM * features[feature]
    model.model.embed_tokens.weight.copy_(embedding + SHARED_NORM * shared * features["shared"])
    model.lm_head.weight.copy_(3 * noise("unembedding", D_VOCAB))

    slow = D_HEAD // 2 - 1  # first coordinate of the slowest rotary pair
    for layer, block in enumerate(model.model.layers):
        attn_gain, mlp_gain = block.input_layernorm.weight, block.post_attention_layernorm.weight

        # Every query is a constant: it reads the shared direction. Sink heads look in the slow pair only; the others
        # look everywhere, at keys of noise, and so attend almost evenly. Normalised features reach sqrt(d_model) = 8.
        query = 0.05 * torch.randn(N_HEADS, D_HEAD, 1, generator=_generator(f"{layer}/query")) * features["shared"]
        key = noise(f"{layer}/key", N_KEY_HEADS, D_HEAD)  # [key head, d_head, d_model]
        for head, logit in SINK_LOGITS.items():
            query[head] = 0
            query[head, slow] = logit * D_HEAD**0.5 / D_MODEL * features["shared"]
        for key_head in {head * N_KEY_HEADS // N_HEADS for head in SINK_LOGITS}:
            key[key_head, slow] = features["sink"] + 0.3 * key[key_head, slow]
        value = noise(f"{layer}/value", N_KEY_HEADS, D_HEAD)
        output = noise(f"{layer}/output", N_HEADS, D_HEAD) * 0.1
        block.self_attn.q_proj.weight.copy_(query.flatten(0, 1) / attn_gain)
        block.self_attn.k_proj.weight.copy_(key.flatten(0, 1) / attn_gain)
        block.self_attn.v_proj.weight.copy_(value.flatten(0, 1) / attn_gain)
        block.self_attn.o_proj.weight.copy_(output.flatten(0, 1).T)

        # Gates open by the shared direction, more or less: ordinary tokens get small contributions of their own.
        gate = 0.1 * torch.randn(D_MLP, 1, generator=_generator(f"{layer}/gate")) * features["shared"]
        block.mlp.gate_proj.weight.copy_((gate + 0.1 * noise(f"{layer}/gate noise", D_MLP)) / mlp_gain)
        block.mlp.up_proj.weight.copy_(noise(f"{layer}/up", D_MLP) / mlp_gain)
        block.mlp.down_proj.weight.copy_(0.3 * noise(f"{layer}/down", D_MLP).T)
    return model


def _directions() -> tuple[dict[str, Tensor], Tensor]:
    """An orthonormal basis of the residual stream: the features by name, and the noise space [n_noise, d_model]."""
    basis = torch.linalg.qr(torch.randn(D_MODEL, D_MODEL, generator=_generator("basis"), dtype=torch.float64)).Q.T
    basis = basis.float()
    return dict(zip(FEATURES, basis, strict=False)), basis[len(FEATURES) :]


def _generator(name: str) -> torch.Generator:
    """A generator whose seed is derived from a name: the same numbers in every process, whatever ran before."""
    seed = int.from_bytes(hashlib.sha256(f"planted/{name}".encode()).digest()[:7], "big")
    return torch.Generator().manual_seed(seed)
