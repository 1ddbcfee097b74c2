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
    if AutoTokenizer.from_pretrained(folder)(_SAMPLE)["input_ids"] != tokenizer(_SAMPLE)["input_ids"]:
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
            field = read(str(gguf)).fields["general.architecture"]
            architecture = bytes(field.parts[field.data[0]]).decode()
        except Exception as error:  # a cut header ends in any of IndexError, ValueError, KeyError, OverflowError
            size = gguf.stat().st_size
            raise WeightsError(f"{gguf} is truncated or damaged ({size} bytes; {error}): download it again") from error
        try:  # an empty folder and an absolute file: nothing beside the GGUF or in the current folder is read
            model, info = transformers.AutoModelForCausalLM.from_pretrained(
                empty, gguf_file=str(gguf), dtype=torch.float32, output_loading_info=True, **unpack
            )
            tokenizer = transformers.AutoTokenizer.from_pretrained(empty, gguf_file=str(gguf))
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
    return model, tokenizer


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
