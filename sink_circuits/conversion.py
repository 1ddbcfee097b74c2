"""Conversion of a GGUF file to a folder in Hugging Face format with dequantised float32 weights."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path

from tqdm.auto import tqdm

from sink_circuits.errors import WeightsError

_SAMPLE = "The quick brown fox, 12345 naïve — 日本語!\n  def f(x):\n\treturn x"


def convert(gguf: Path, folder: Path, name: str, verbose: bool) -> None:
    """Write config, float32 weights and tokenizer of ``gguf`` into ``folder``.

    Raises WeightsError when transformers cannot read the file as a language model.
    """
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    model, tokenizer = _load_gguf(gguf, name, verbose)
    # Tied tensors share memory and are stored once; the loader ties them again from the config.
    state = model.state_dict()
    first = {tensor.data_ptr(): key for key, tensor in reversed(state.items())}
    save_file(
        {key: state[key].cpu().contiguous() for key in first.values()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    model.config.architectures = [type(model).__name__]
    for stale in ("_name_or_path", "_model_name_or_path", "quantization_config"):
        vars(model.config).pop(stale, None)
    model.config.save_pretrained(folder)
    shutil.copymode(folder / "config.json", folder / "model.safetensors")  # it is born readable by its owner alone
    tokenizer.save_pretrained(folder)
    try:
        kept = AutoTokenizer.from_pretrained(folder)(_SAMPLE)["input_ids"] == tokenizer(_SAMPLE)["input_ids"]
    except Exception as error:  # tokenizers raises nothing more precise
        raise WeightsError(f"the tokenizer of {name} cannot be used ({error}): pass a model folder instead") from error
    if not kept:
        raise WeightsError(f"the tokenizer of {name} changes when transformers saves it: pass a model folder instead")


def _load_gguf(gguf: Path, name: str, verbose: bool) -> tuple:
    """``(model, tokenizer)`` as transformers reads them from a GGUF file, dequantised to float32."""
    import torch
    import transformers

    # Newer versions keep some architectures' weights packed unless told otherwise.
    packing = getattr(transformers, "GgufConfig", None)
    unpack = {"quantization_config": packing(dequantize=True)} if packing else {}
    with _one_reader(verbose) as read, tempfile.TemporaryDirectory() as empty:
        try:
            reader = read(str(gguf))
            architecture = reader.fields["general.architecture"].contents()
        except Exception as error:  # a cut header ends in any of IndexError, ValueError, KeyError, OverflowError
            size = gguf.stat().st_size
            raise WeightsError(f"{gguf} is truncated or damaged ({size} bytes; {error}): download it again") from error
        try:  # an empty folder and an absolute file: nothing beside the GGUF or in the current folder is read
            config = transformers.AutoConfig.from_pretrained(empty, gguf_file=str(gguf))
            _as_stated(config, reader, architecture, name)
            model, info = transformers.AutoModelForCausalLM.from_pretrained(
                empty, gguf_file=str(gguf), config=config, dtype=torch.float32, output_loading_info=True,
                ignore_mismatched_sizes=True, **unpack,
            )  # fmt: skip
            tokenizer = transformers.AutoTokenizer.from_pretrained(empty, gguf_file=str(gguf))
        except WeightsError:
            raise
        except Exception as error:
            raise WeightsError(
                f"transformers {transformers.__version__} cannot read {name} (GGUF architecture {architecture!r}): "
                f"{error}; update transformers, or convert the model to a Hugging Face folder and pass that"
            ) from error
    missing = sorted(info["missing_keys"])  # transformers fills them with random numbers and only warns
    if missing:
        raise WeightsError(
            f"{name} (GGUF architecture {architecture!r}) lacks {len(missing)} tensors, such as "
            f"{missing[0]}: get the complete file, or pass a model folder instead"
        )
    if unlike := sorted(info["mismatched_keys"]):
        key, stored, expected = unlike[0]
        raise WeightsError(
            f"{name} (GGUF architecture {architecture!r}) stores {key} with shape {tuple(stored)}, where transformers "
            f"{transformers.__version__} expects {tuple(expected)}: pass a Hugging Face folder of this model instead"
        )
    # A bias or a factor that no part of the model takes is passed over without a word: count what was taken.
    held = {tensor.data_ptr(): tensor.numel() for tensor in model.state_dict().values()}
    stored = sum(int(tensor.n_elements) for tensor in reader.tensors if tensor.name not in ROPE_TENSORS)
    if stored > sum(held.values()) and not _stores_tied_output(model, reader):
        raise WeightsError(
            f"{name} (GGUF architecture {architecture!r}) holds {stored} numbers, of which transformers "
            f"{transformers.__version__} takes {sum(held.values())}: pass a Hugging Face folder of this model instead"
        )
    return model, tokenizer


ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
_SAME_NAME = {  # GGUF key -> names that a config may have for it
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", "layer_norm_epsilon", "norm_eps"),
    "attention.layer_norm_epsilon": ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps"),
    "attention.key_length": ("head_dim",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "attention.sliding_window": ("sliding_window",),
    "context_length": ("n_positions",),  # GPT-2's position embeddings
}


def _as_stated(config, reader, architecture: str, name: str) -> None:
    """Make a config say what the GGUF file states and transformers' reader passes over without a word.

    It reads sizes and takes its own defaults for much of the rest: rotary bases (StarCoder2), partial rotary widths
    (StableLM), rotary scaling (Llama 3, Gemma 3, YaRN), sliding windows (Phi-3), soft caps and the query scale (Gemma),
    norm epsilons (Falcon, Nemotron), biases. Raises WeightsError for what this config cannot say.
    """
    prefix = f"{architecture}."
    stated = {key.removeprefix(prefix): f.contents() for key, f in reader.fields.items() if key.startswith(prefix)}
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}

    def refuse(key: str, value) -> WeightsError:
        return WeightsError(
            f"{name} (GGUF architecture {architecture!r}) states {key} = {value}, which transformers does not read: "
            "pass a Hugging Face folder of this model instead"
        )

    for key, attributes in _SAME_NAME.items():
        if key not in stated:
            continue
        known = [attribute for attribute in attributes if hasattr(config, attribute)]
        for attribute in known:
            value = stated[key]
            value = None if attribute == "sliding_window" and value == 0 else value
            if getattr(config, attribute) != value:
                setattr(config, attribute, value)
        if key == "attention.sliding_window" and not known and stated[key]:
            raise refuse(key, stated[key])
    if "blk.0.attn_q.bias" in tensors and hasattr(config, "attention_bias"):
        config.attention_bias = True
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    if hasattr(config, "query_pre_attn_scalar"):
        # No key states it: llama.cpp scales by the head's width, but for the two 27B models, known by their depth.
        wide = (architecture, config.num_hidden_layers) in (("gemma2", 46), ("gemma3", 62))
        config.query_pre_attn_scalar = config.hidden_size // heads if wide else head_dim
    rope = getattr(config, "rope_parameters", None)
    if not rope:
        return
    rope = rope.get("full_attention", rope)
    if "rope.freq_base" in stated:
        rope["rope_theta"] = stated["rope.freq_base"]
    width = stated.get("rope.dimension_count", head_dim)
    if "partial_rotary_factor" in rope:
        rope["partial_rotary_factor"] = width / head_dim
    elif width != head_dim:
        raise refuse("rope.dimension_count", width)
    scaling, factor = stated.get("rope.scaling.type", "none"), stated.get("rope.scaling.factor")
    if scaling in ("linear", "yarn") and factor:
        rope |= {"rope_type": scaling, "factor": factor}
        if scaling == "yarn":
            rope["original_max_position_embeddings"] = stated["rope.scaling.original_context_length"]
    elif scaling != "none":
        raise refuse("rope.scaling.type", scaling)
    if "rope_freqs.weight" in tensors and not _is_llama3(config, rope, tensors["rope_freqs.weight"]):
        raise refuse("rope_freqs", "a table of its own")
    if "rope_factors_long.weight" in tensors:
        raise refuse("rope_factors_long", "a table of its own")


def _is_llama3(config, rope: dict, factors) -> bool:
    """Set Llama 3's rotary scaling when its formula gives the file's factors; the file holds nothing but these."""
    import numpy as np
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    factor, plain = float(factors.max()), dict(rope)
    base = float(plain["rope_theta"]) ** (-np.arange(len(factors)) / len(factors))
    for original in (8192, int(config.max_position_embeddings / factor)):
        rope |= {
            "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": original,
        }  # fmt: skip
        frequencies = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")[0].numpy()
        if np.allclose(base / frequencies, factors, rtol=1e-4):
            return True
    rope.clear()
    rope |= plain
    return False


def _stores_tied_output(model, reader) -> bool:
    return model.config.tie_word_embeddings and any(tensor.name == "output.weight" for tensor in reader.tensors)


@contextmanager
def _one_reader(verbose: bool) -> Iterator[Callable]:
    """Let transformers parse a GGUF header once, and faster; without progress bars unless ``verbose``.

    It makes a ``gguf.GGUFReader`` for the config and again for the weights, 15 s each with Gemma's 262144 tokens,
    half of it because slicing a numpy.memmap is slow; a plain view of the same memory is not.
    """
    import gguf
    import numpy as np
    from transformers import modeling_gguf_pytorch_utils as loader

    class Reader(gguf.GGUFReader):
        def _get(self, *args, **kwargs):
            self.data = np.asarray(self.data)  # type: ignore[assignment]
            return super()._get(*args, **kwargs)

    original, bar = gguf.GGUFReader, getattr(loader, "tqdm", None)
    gguf.GGUFReader = lru_cache(maxsize=1)(Reader)  # type: ignore[assignment,misc]
    if not verbose:
        loader.tqdm = partial(tqdm, disable=True)  # this module does not ask the setting
    try:
        with loader_bars(verbose):
            yield gguf.GGUFReader
    finally:
        gguf.GGUFReader, loader.tqdm = original, bar  # type: ignore[misc]


@contextmanager
def loader_bars(verbose: bool) -> Iterator[None]:
    """The progress bars of transformers and huggingface_hub as they are set, or off inside unless ``verbose``."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars
    from transformers.utils import logging

    shown, hub_hidden = logging.is_progress_bar_enabled(), are_progress_bars_disabled()
    if not verbose:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown and not verbose:  # this turns on the hub's too
            logging.enable_progress_bar()
            if hub_hidden:
                disable_progress_bars()
