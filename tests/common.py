"""What several test files share: the planted models on every backend there is, and a watch on forward passes."""

from __future__ import annotations

import copy
import functools
import importlib.util
from contextlib import contextmanager

import eager
import hand
import torch
from torch.nn.modules.module import register_module_forward_pre_hook

import sink_circuits as sc
from sink_circuits import attention, planted, weights

torch.set_num_threads(1)

HAS_HOOKED = importlib.util.find_spec("transformer_lens.HookedTransformer") is not None
BACKENDS = ("bridge", "hooked") if HAS_HOOKED else ("bridge",)
REAL = ("smollm2-135m", "gemma-3-270m")
SINK = 40  # position of the secondary sink in the default planted prompt


@functools.cache
def subject(*without: str) -> planted.Planted:
    return planted.minimal(without)


@functools.cache
def lens(backend: str = "bridge", *without: str):
    """A planted model as TransformerLens holds it. Shared by tests: none may change it."""
    return getattr(subject(*without), backend)()


def by_hand(tokens: torch.Tensor, edits: dict | None = None, *without: str) -> hand.Run:
    model = subject(*without).hf_model
    return hand.forward(model.state_dict(), model.config, tokens, edits)


@functools.cache
def prompt(sinks: tuple[int, ...] = (SINK,), n_tokens: int = 96, seed_name: str = "prompt") -> torch.Tensor:
    return subject().tokens(n_tokens=n_tokens, sinks=sinks, seed_name=seed_name)


@functools.cache
def real(name: str):
    """(model, plain Hugging Face model with eager attention, token ids of three texts) of a bundled model."""
    from transformers import AutoModelForCausalLM

    model = sc.load_model(name, verbose=False)
    folder = weights.fetch(name, verbose=False)
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    return model, plain, sc.load_prompts("maths", 3).tokens(model, max_tokens=300)


@functools.cache
def real_run(name: str, text: int, *edits: tuple[int, int, float]) -> eager.Run:
    """The plain model's forward pass; edits are (layer, position, factor)."""
    _, plain, tokens = real(name)
    return eager.forward(plain, tokens[text], {(layer, pos): factor for layer, pos, factor in edits})


@contextmanager
def no_forward_pass():
    """Fails when any torch module at all is run inside."""
    calls: list[str] = []
    handle = register_module_forward_pre_hook(lambda module, args: calls.append(type(module).__name__))
    try:
        yield
    finally:
        handle.remove()
    assert not calls, f"modules were run: {calls[:5]}"


@contextmanager
def sizes(**limits: int):
    """Limits of the room `attention` (floats in a block, keys from which the flash kernel serves...), changed for small layers."""
    before = {name: getattr(attention, name) for name in limits}
    vars(attention).update(limits)
    try:
        yield
    finally:
        vars(attention).update(before)


@contextmanager
def threads_of(threads: int):
    """So many threads, started for however little work."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with sizes(THREADED_FLOATS=0, BLOCK_ROWS=8):
            yield
    finally:
        torch.set_num_threads(before)


def in_transformer_lens(llama, backend: str):
    """A copy of a Llama in a TransformerBridge ("bridge") or, weights unprocessed, in a HookedTransformer ("hooked"), in its own dtype."""
    if backend == "bridge":
        return sc.load_model(copy.deepcopy(llama), verbose=False)
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_llama_weights

    config = llama.config
    cfg = HookedTransformerConfig(
        n_layers=config.num_hidden_layers, d_model=config.hidden_size, n_ctx=config.max_position_embeddings, d_head=config.head_dim,
        n_heads=config.num_attention_heads, d_mlp=config.intermediate_size, n_key_value_heads=config.num_key_value_heads,
        d_vocab=config.vocab_size, act_fn="silu", gated_mlp=True, normalization_type="RMS", final_rms=True, eps=config.rms_norm_eps,
        positional_embedding_type="rotary", rotary_dim=config.head_dim, rotary_base=int(config.rope_parameters["rope_theta"]),
        rotary_adjacent_pairs=False, init_weights=False, model_name="random", device="cpu", dtype=llama.dtype,
    )  # fmt: skip
    model = HookedTransformer(cfg, move_to_device=False)
    model.load_and_process_state_dict(
        convert_llama_weights(copy.deepcopy(llama), cfg),
        fold_ln=False, center_writing_weights=False, center_unembed=False, fold_value_biases=False,
    )  # fmt: skip
    return model.to(llama.dtype).eval()
