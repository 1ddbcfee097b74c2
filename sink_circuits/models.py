"""Models: loading by name, path or object, checked and returned as the TransformerLens object that they are."""

from __future__ import annotations

import contextlib
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from sink_circuits import arguments, weights
from sink_circuits.adapters import adapt
from sink_circuits.arguments import shown
from sink_circuits.conversion import loader_bars
from sink_circuits.errors import InputError, ModelError


def load_model(
    source, *, device: str | torch.device | None = None, dtype: torch.dtype | None = None, tokenizer=None,
    trust_remote_code: bool = False, verbose: bool = True,
):  # fmt: skip
    """Load a model, check it, and return it as the TransformerLens object it is.

    `source`: a bundled name (`sink-circuits models` lists them), a Hugging Face id `org/name@revision`, a local
    directory in Hugging Face format, a GGUF file, a Hugging Face model, or a TransformerBridge or HookedTransformer,
    which is checked and returned as it is. `device`, `dtype`: None is the CPU and float32, whatever the weights are stored
    in; for a model object what it has. Raises ModelError or WeightsError, each in one sentence.
    """
    arguments.flag(trust_remote_code, "trust_remote_code")
    arguments.flag(verbose, "verbose")
    check_device(device)
    if dtype is not None and (not isinstance(dtype, torch.dtype) or not dtype.is_floating_point):
        raise ModelError(f"dtype {shown(dtype)} is not one that models compute in: use torch.float32.")
    if isinstance(source, nn.Module):
        own = next((parameter.dtype for parameter in source.parameters()), dtype)
        if dtype not in (None, own):
            raise ModelError(
                f"dtype {dtype} was asked for, and this model is of {own}: convert it first, model.to({dtype})."
            )
        if hasattr(source, "config") and not hasattr(source, "hook_dict"):
            return _bridge(
                source, tokenizer, str(getattr(source.config, "name_or_path", "") or type(source).__name__), device
            )
        if device is not None or tokenizer is not None:
            raise ModelError(
                f"a {type(source).__name__} is returned as it is: leave device and tokenizer out, and set them on the model itself."
            )
        adapter = adapt(source)
        if adapter.processed and verbose:
            warnings.warn(
                f"the weights of this {type(source).__name__} were processed ({', '.join(adapter.processed)}): residuals "
                "differ from the published model's; `official` detection refuses them.",
                stacklevel=2,
            )
        return source
    if not isinstance(source, str | Path) or not str(source).strip():
        raise ModelError(f"{shown(source)} is not a model: give a name, a folder, a GGUF file or a model object.")
    folder, where = _find(str(source), verbose)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        with loader_bars(verbose):
            hf, info = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype or torch.float32, trust_remote_code=trust_remote_code, output_loading_info=True,
                use_safetensors=True, **where,  # other formats are pickles, which can run code
            )  # fmt: skip
            if tokenizer is None and not _lacks_tokenizer(folder):
                tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, **where)
    except Exception as error:  # a folder that was altered ends in anything, from ZeroDivisionError to tokenizers' own
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"{str(source)!r} could not be loaded ({first}): {_choices()}.") from error
    _check_complete(str(source), hf, info)
    bridge = _bridge(hf.eval(), tokenizer, str(source) if where else Path(str(source)).name, device or "cpu")
    bridge.__dict__["_sink_circuits_revision"] = _revision(folder, where)
    return bridge


def check_device(device: str | torch.device | None) -> None:
    """Raises ModelError for a device that torch cannot compute on here, InputError for what is none."""
    if device is None:
        return
    if not isinstance(device, torch.device):
        arguments.text(device, "device")
    try:
        made = torch.ones(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        raise _unusable(device, error) from error
    if made.is_meta:
        raise ModelError("the meta device holds no numbers: load the model's weights, on device='cpu'.")


def _unusable(device, error: Exception) -> ModelError:
    return ModelError(f"device {str(device)!r} cannot be used ({str(error).splitlines()[0]}): use device='cpu'.")


def _check_complete(source: str, hf, info: Mapping) -> None:
    """Raises ModelError for weights that do not fill the model: transformers draws what is missing at random and warns."""
    remedy = "give the weights and the config.json that belong together"
    if missing := sorted(info["missing_keys"]):
        raise ModelError(f"{source!r} lacks {len(missing)} tensors, such as {missing[0]}: {remedy}.")
    n_layers = getattr(hf.config.get_text_config(), "num_hidden_layers", None)
    for key in sorted(info["unexpected_keys"]):
        block = re.search(r"\.(?:layers|h|blocks)\.(\d+)\.", f".{key}")
        if block and isinstance(n_layers, int) and int(block[1]) >= n_layers:
            raise ModelError(
                f"{source!r} holds weights of block {block[1]} and a config.json of {n_layers} blocks: {remedy}."
            )


def _revision(folder: str, where: dict) -> str:
    """What `Adapter.revision` says of a model just loaded: the hub's cache keeps one folder for each commit."""
    if not where:
        return weights.gguf_sha256_of(Path(folder))
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(folder, "config.json", revision=where["revision"])
    return Path(config).parent.name if isinstance(config, str) else ""


def _lacks_tokenizer(folder: str) -> bool:
    """True for a local folder without any tokenizer file: such a model is measured on token ids."""
    hints = ("token", "vocab", "merges", "spiece", "sentencepiece")
    path = Path(folder)
    return path.is_dir() and not any(hint in file.name.lower() for file in path.iterdir() for hint in hints)


def known_names() -> str:
    return ", ".join(sorted(weights.REGISTRY))


def _choices() -> str:
    return (
        f"give one of {known_names()}, a folder with config.json and safetensors, a GGUF file, or a Hugging Face id "
        "while online"
    )


def layers_of_config(source: str) -> int | None:
    """How many layers the model has, from its config.json alone: before weights are read, so that a wrong layer is known.

    None where there is no such file on this machine (a hub's id, a GGUF file, weights not fetched yet) or it cannot be
    read: then only loading tells.
    """
    from transformers import AutoConfig

    if not source:
        return None
    folder = weights.cached_folder(source) if source in weights.REGISTRY else _as_path(source)
    if not (folder / "config.json").is_file():
        return None
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)  # otherwise it may ask, and wait
        n_layers = config.get_text_config().num_hidden_layers
        return n_layers if isinstance(n_layers, int) else None
    except Exception:  # whatever stands there: loading says what is wrong with it
        return None


def _as_path(source: str) -> Path:
    """Raises ModelError for what no file system takes; `~` of a user who is none stays as it is."""
    try:
        return arguments.path(os.path.expanduser(source), "model")
    except InputError as error:
        raise ModelError(str(error)) from error


def _find(source: str, verbose: bool) -> tuple[str, dict]:
    """Where `source` is: a folder and no more, or a hub's id with what `from_pretrained` needs to find it."""
    if source in weights.REGISTRY:
        return str(weights.fetch(source, verbose=verbose)), {}
    path = _as_path(source)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(
                f"folder {path} holds no config.json: give a folder in Hugging Face format or a GGUF file."
            )
        return str(path), {}
    if path.suffix.lower() == ".gguf" or path.is_file():
        if not path.is_file():
            raise ModelError(f"GGUF file {path} does not exist: check the path.")
        return str(weights.convert_gguf(path, verbose=verbose)), {}
    name, _, revision = source.partition("@")
    if name.count("/") != 1 or not all(name.split("/")):
        raise ModelError(
            f"{source!r} is neither a known model ({known_names()}), a folder, a GGUF file nor a Hugging Face id like org/name@revision."
        )
    revision = revision or "main"
    return name, {"revision": revision, "local_files_only": not _hub_answers(name, revision)}


def _hub_answers(name: str, revision: str) -> bool:
    """One request to the hub: with a network that is down, transformers tries for half a minute.

    False when nothing answers and the local cache has the model. Raises ModelError when it has not.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json", revision=revision))
    except (HfHubHTTPError, HFValidationError):  # an answer, if no good one: loading says what is wrong
        return True
    except Exception as error:  # the class for a dead network differs between versions and between httpx and httpx2
        if isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str):
            return False
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"{name}@{revision} is not in the local cache, and the Hugging Face hub cannot be reached ({first}): {_choices()}."
        ) from error
    return True


def _bridge(hf, tokenizer, name: str, device: str | torch.device | None):
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    hf = hf.eval()
    hf.config.architectures = [type(hf).__name__]
    device = next((parameter.device for parameter in hf.parameters()), "cpu") if device is None else device
    if any(parameter.is_meta for parameter in hf.parameters()):
        raise ModelError("the meta device holds no numbers: load the model's weights, on device='cpu'.")
    try:
        hf = hf.to(device)
    except RuntimeError as error:  # a GPU without memory for it
        raise _unusable(device, error) from error
    with contextlib.suppress(ValueError, AttributeError):  # patterns exist only there; some models know no other
        hf.set_attn_implementation("eager")
    try:  # boot_transformers does the same, but takes every name for a hub's and warns about aliases
        bridge = build_bridge_from_module(
            hf,
            type(hf).__name__,
            hf_config=hf.config,
            tokenizer=tokenizer,
            dtype=hf.dtype,
            device=device,
            model_name=name,
        )
    except Exception as error:  # whatever it meets in an architecture that it does not know
        raise ModelError(
            f"TransformerLens has no bridge for {type(hf).__name__} ({str(error).splitlines()[0]}): use a decoder architecture it supports."
        ) from error
    adapt(bridge)
    return bridge
