"""What several test files share: the planted models on every backend there is, and a watch on forward passes."""

from __future__ import annotations

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
