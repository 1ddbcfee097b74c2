"""Models: loading by name, path or object, one thin adapter over the two TransformerLens classes, checks at load."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial, wraps
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from sink_circuits import arguments, weights
from sink_circuits.arguments import shown
from sink_circuits.attention import AttentionForm
from sink_circuits.conversion import loader_bars
from sink_circuits.errors import InputError, ModelError
from sink_circuits.load_checks import (  # noqa: F401 (tolerances and errors are read from here elsewhere)
    CHECK_TOKENS,
    TOLERANCES,
    Check,
    check_finite,
    check_plain,
    check_reference,
    check_shapes,
    check_twin,
    reference_pass,
    relative_error,
)
from sink_circuits.twin import Twin, TwinRefused, fingerprint


@dataclass(frozen=True)
class Adapter:
    """What the rest of the package knows of a model. Made by `adapt`, kept on the model itself.

    `twin` is the fast path, or None with the reason in `twin_refusal`. `processed` names the weight processing that
    was found (folded norms, centred writing weights); residuals then differ from the published ones.
    """

    model: nn.Module
    backend: str
    twin: Twin | None
    twin_refusal: str
    processed: tuple[str, ...]
    parallel: bool
    forms: tuple[AttentionForm, ...]
    weights_hash: str
    checks: tuple[Check, ...]

    @property
    def cfg(self):
        return self.model.cfg

    @property
    def state(self) -> str:
        """What a run depends on beside its text: the weights, and whether hooks of the user's take part."""
        return f"{self.weights_hash} {self.twin_refusal}"

    @property
    def n_layers(self) -> int:
        return self.cfg.n_layers

    @property
    def n_heads(self) -> int:
        return self.cfg.n_heads

    @property
    def n_ctx(self) -> int:
        return self.cfg.n_ctx

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Sliding window of each layer: a query sees a key when `query - key < window`; None sees all."""
        return tuple(form.window for form in self.forms)

    @property
    def mixes_rows(self) -> bool:
        """True for mixtures of experts: an expert multiplies the tokens of all rows in one product, so that a row's last
        bits depend on the others; such rows are run one by one."""
        config = getattr(getattr(self.model, "original_model", None), "config", self.cfg)
        return any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts"))

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def tokenizer(self):
        return getattr(self.model, "tokenizer", None)

    @property
    def name(self) -> str:
        return str(getattr(self.cfg, "model_name", type(self.model).__name__))

    @property
    def revision(self) -> str:
        """What the weights were loaded from: a Hugging Face commit or a GGUF file's SHA-256; empty where not known."""
        config = getattr(getattr(self.model, "original_model", None), "config", None)
        noted = self.model.__dict__.get("_sink_circuits_revision", "")
        return noted or getattr(config, "_commit_hash", None) or ""

    def base_hooks(self, layer: int) -> tuple[str, ...]:
        """Hooks whose sum is the base of block `layer`, what its MLP's contribution is added to."""
        if self.parallel:
            return (f"blocks.{layer}.hook_resid_pre", f"blocks.{layer}.hook_attn_out")
        return (f"blocks.{layer}.hook_resid_mid",)

    def contribution_hook(self, layer: int) -> str:
        return f"blocks.{layer}.hook_mlp_out"

    def pattern_hook(self, layer: int) -> str:
        return f"blocks.{layer}.attn.hook_pattern"


ONE_AT_A_TIME = threading.RLock()
"""Runs and checks put taps and hooks on the model and set torch's number of threads, of which a process has one: threads of the
user's that call them take turns."""

_Returned = TypeVar("_Returned")
_Given = ParamSpec("_Given")


def one_at_a_time(function: Callable[_Given, _Returned]) -> Callable[_Given, _Returned]:
    """The function, which threads of one process call one after the other."""

    @wraps(function)
    def alone(*args: _Given.args, **kwargs: _Given.kwargs) -> _Returned:
        with ONE_AT_A_TIME:
            return function(*args, **kwargs)

    return alone


@one_at_a_time
def adapt(model) -> Adapter:
    """The adapter of a HookedTransformer or TransformerBridge; made once, and again when its weights have changed.

    Raises ModelError, naming the failed check and the remedy, for a model whose hooks do not mean what they should.
    """
    backend_of(model)
    modules = _modules(model)
    # Hooks of the user's change what the checks would see; in training mode every run draws its own dropout.
    state = (fingerprint(model), _has_user_hooks(modules), _drops_out(modules))
    kept = model.__dict__.get("_sink_circuits_adapter")
    if kept is not None and kept[0] == state:
        return kept[1]
    made = _make_adapter(model, modules)
    model.__dict__["_sink_circuits_adapter"] = (state, made)
    return made


def hash_weights(model: nn.Module) -> str:
    """Twelve hex digits over samples of every parameter: tells two checkpoints of one name apart."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // 64)].float().cpu()
        digest.update(f"{name}{tuple(parameter.shape)}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()[:12]


OF_LIBRARIES = ("transformers", "transformer_lens", "torch", "accelerate")
"""Packages whose own hooks and forwards belong to the model."""


def _modules(model) -> list[nn.Module]:
    return list(getattr(model, "original_model", model).modules())


def _has_user_hooks(modules: Iterable[nn.Module]) -> bool:
    """Hooks of TransformerLens' or of torch's, or a `forward` put in a module's place, that are none of the libraries' own."""
    for state in map(vars, modules):
        # TransformerLens 4.3 says which function a handle is of, and puts some of its own there.
        handles = (*state.get("fwd_hooks", ()), *state.get("bwd_hooks", ()))
        if any(_package_of(getattr(handle, "user_hook", None)) not in OF_LIBRARIES for handle in handles):
            return True
        functions = (
            *state["_forward_hooks"].values(),
            *state["_forward_pre_hooks"].values(),
            *filter(None, [state.get("forward")]),
        )
        if any(_package_of(function) not in (*OF_LIBRARIES, "sink_circuits") for function in functions):
            return True
    return False


def _package_of(function) -> str:
    while isinstance(function, partial):
        function = function.func
    return (getattr(function, "__module__", None) or type(function).__module__).partition(".")[0]


DROPOUTS = (
    "p",
    "dropout",
    "attention_dropout",
    "hidden_dropout",
    "resid_dropout",
    "residual_dropout",
    "activation_dropout",
)
"""What modules call a rate that they drop out at."""


def _drops_out(modules: Iterable[nn.Module]) -> bool:
    """Whether anything drops out: in training mode, at a rate above 0, in modules of their own or by a number that attention holds."""
    for part in modules:
        state = vars(part)
        if state["training"] and any(
            isinstance(rate := state.get(name), float) and rate > 0 and (name != "p" or isinstance(part, nn.Dropout))
            for name in DROPOUTS
        ):
            return True
    return False


def _make_adapter(model, modules: Sequence[nn.Module]) -> Adapter:
    backend = backend_of(model)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ModelError("the meta device holds no numbers: load the model's weights first.")
    hooked = _has_user_hooks(modules)
    if _drops_out(modules):
        raise ModelError(
            "the model is in training mode, where dropout makes every run different: call model.eval() first."
        )
    for layer in (0, model.cfg.n_layers - 1):
        for name in ("hook_mlp_out", "hook_resid_post", "attn.hook_pattern"):
            if f"blocks.{layer}.{name}" not in model.hook_dict:
                raise ModelError(
                    f"blocks.{layer}.{name} is not a hook of this model: sink_circuits needs decoder blocks with "
                    f"attention patterns and MLP outputs; see the table of supported architectures."
                )
    _check_attention(model)
    processed = find_processing(model, backend)
    parallel = "blocks.0.hook_resid_mid" not in model.hook_dict
    twin, refusal = None, ""
    if backend == "hooked":
        refusal = "HookedTransformer has no Hugging Face module behind it"
    elif hooked:
        refusal = "hooks of your own stand on the model"
    elif processed:
        refusal = f"the weights were processed ({', '.join(processed)})"
    else:
        try:
            twin = Twin.of_bridge(model)
        except TwinRefused as error:
            refusal = str(error)
        except Exception as error:  # as below
            refusal = f"{type(error).__name__}: {error}"
    comparable = backend == "bridge" and not processed and not hooked
    draft = Adapter(model, backend, twin, refusal, processed, parallel, (), "", ())
    try:
        reference = reference_pass(draft)
    except (RuntimeError, IndexError, ValueError, TypeError, AttributeError) as error:
        if isinstance(error, ModelError):
            raise
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"a forward pass over {CHECK_TOKENS} tokens fails ({first}): check that weights and configuration belong together, or use "
            "another architecture."
        ) from error
    check_shapes(draft, reference)
    check_finite(reference)
    checks = check_reference(draft, reference) + (check_plain(model, reference) if comparable else ())
    for check in checks:
        if not check.passed and hooked:
            raise ModelError(
                f"check {check.name!r} failed while hooks of your own stand on the model: call model.reset_hooks() and add them "
                "inside the run, with run_with_hooks."
            )
        if not check.passed:
            raise ModelError(
                f"check {check.name!r} failed: error {check.error:.2g}, at most {check.limit:.2g} is accepted; {check.remedy}"
            )
    forms: tuple[AttentionForm, ...] = ()
    if twin is not None:
        try:
            forms, twin_checks = check_twin(draft, reference)
            _check_windows(model, forms)
            checks = (*checks, *twin_checks)
            failed = [c for c in twin_checks if not c.passed]
            if failed:
                twin, refusal = None, f"{failed[0].name}: error {failed[0].error:.2g} above {failed[0].limit:.2g}"
        except Exception as error:  # whatever an unforeseen architecture does, the reference path serves, and says why
            twin, forms, refusal = (
                None,
                (),
                str(error) if isinstance(error, TwinRefused) else f"{type(error).__name__}: {error}",
            )
    if not forms:
        forms = _with_measured_windows(
            model, tuple(_configured_form(model, layer) for layer in range(model.cfg.n_layers)), backend
        )
    return Adapter(model, backend, twin, refusal, processed, parallel, forms, hash_weights(model), tuple(checks))


def backend_of(model) -> str:
    """'bridge' or 'hooked'; raises ModelError for anything else."""
    names = {cls.__name__ for cls in type(model).__mro__}
    if "TransformerBridge" in names:
        return "bridge"
    if "HookedTransformer" in names:
        return "hooked"
    raise ModelError(
        f"a {type(model).__name__} is neither a TransformerBridge nor a HookedTransformer: wrap a Hugging Face model "
        "with sink_circuits.load_model(hf_model, tokenizer=...)."
    )


def find_processing(model, backend: str) -> tuple[str, ...]:
    """Which of TransformerLens' weight processing the model has been through, as far as it can be told.

    Folded norms leave no scale in the norm (or the class ...Pre); centred writing weights leave rows of mean zero.
    """
    found = []
    if backend == "bridge":
        if getattr(model, "compatibility_mode", False) or getattr(model.cfg, "layer_norm_folding", False):
            found.append("compatibility mode")
        return tuple(found)
    if str(model.cfg.normalization_type).endswith("Pre"):
        found.append("folded norms")
    embed = model.W_E
    if embed.float().mean(-1).abs().max() < 1e-5 * embed.float().abs().mean():
        found.append("centred writing weights")
    return tuple(found)


def _check_windows(model, forms: Sequence[AttentionForm]) -> None:
    """Raises TwinRefused where a layer's window stands in the model's attention mask alone (Qwen2-MoE), which the fast path does not
    build: on a short text the two agree."""
    for layer, kind in enumerate(layer_types_of(model)):
        if (
            kind == "sliding_attention"
            and forms[layer].window is None
            and _configured_form(model, layer).window is not None
        ):
            raise TwinRefused(f"the window of layer {layer} is in the model's attention mask alone")


def _text_config(model):
    """The configuration of the text model; TransformerLens' own where there is no Hugging Face model behind it."""
    config = getattr(getattr(model, "original_model", None), "config", model.cfg)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def layer_types_of(model) -> Sequence[str]:
    """What the configuration calls each layer's attention ("full_attention", "sliding_attention", ...); none where it does not say."""
    kinds = getattr(_text_config(model), "layer_types", None) or ()
    return kinds if len(kinds) == model.cfg.n_layers else ()


def _check_attention(model) -> None:
    """Raises ModelError for attention whose keys come and go by other rules than a window."""
    chunk = getattr(_text_config(model), "attention_chunk_size", None)
    if "chunked_attention" in layer_types_of(model) and isinstance(chunk, int) and chunk < model.cfg.n_ctx:
        raise ModelError(
            f"layers of this model attend within chunks of {chunk} tokens, so that which queries see a key changes along the text: sink "
            "scores of such layers are not defined here; use a model of full or sliding attention."
        )


@torch.no_grad()
def _with_measured_windows(model, forms: tuple[AttentionForm, ...], backend: str) -> tuple[AttentionForm, ...]:
    """The forms with the windows that the patterns themselves show, on a text longer than the configured window.

    Only for bridges whose configuration speaks of a window that may hold for some layers (GPT-Neo): which ones, no
    two architectures say alike. Raises ModelError where the window is too long to be looked at.
    """
    config = getattr(getattr(model, "original_model", None), "config", None)
    window = getattr(config, "sliding_window", None) or getattr(config, "window_size", None)
    if backend != "bridge" or not isinstance(window, int) or window >= model.cfg.n_ctx:
        return forms
    if window > 2048:
        raise ModelError(f"the window of {window} tokens cannot be checked without the fast path: at most 2048 can.")
    tokens = torch.arange(min(window + 8, model.cfg.n_ctx), device=next(model.parameters()).device) % model.cfg.d_vocab
    first_seen: dict[int, int] = {}

    def hook(layer: int):
        def look(pattern: Tensor, hook) -> None:
            first_seen[layer] = int((pattern[0, :, -1] > 0).any(dim=0).int().argmax())

        return f"blocks.{layer}.attn.hook_pattern", look

    model.run_with_hooks(tokens[None], fwd_hooks=[hook(layer) for layer in range(len(forms))], stop_at_layer=len(forms))
    return tuple(
        replace(form, window=len(tokens) - first_seen[layer] if first_seen[layer] > 0 else None)
        for layer, form in enumerate(forms)
    )


def _configured_form(model, layer: int) -> AttentionForm:
    """A layer's attention as the configuration states it, for models without a twin."""
    cfg = model.cfg
    window = None
    if getattr(cfg, "use_local_attn", False) and cfg.attn_types and cfg.attn_types[layer] == "local":
        window = cfg.window_size
    kinds = layer_types_of(model)
    if kinds and kinds[layer] == "sliding_attention":
        hf_config = getattr(getattr(model, "original_model", None), "config", cfg)
        window = getattr(hf_config, "sliding_window", None)
    cap = getattr(cfg, "attn_scores_soft_cap", -1.0)
    scale = getattr(cfg, "attn_scale", -1.0)
    own = getattr(_attention_of(model, layer), "scaling", None)  # a bridge's `attn_scale` may be the default one
    scaling = own if isinstance(own, float) else 1.0 / scale if scale and scale > 0 else cfg.d_head**-0.5
    sinks = getattr(_attention_of(model, layer), "sinks", None)
    learned = sinks.detach() if isinstance(sinks, torch.Tensor) and sinks.shape == (cfg.n_heads,) else None
    return AttentionForm(scaling, window, cap if cap and cap > 0 else None, learned)


def _attention_of(model, layer: int):
    """The Hugging Face module that a bridge's attention stands for; None for a HookedTransformer."""
    blocks = getattr(model, "blocks", None)
    return getattr(getattr(blocks[layer], "attn", None), "original_component", None) if blocks is not None else None


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
    if device is not None and not isinstance(device, torch.device):
        arguments.text(device, "device")
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
    if torch.device("meta") in (device, *(parameter.device for parameter in hf.parameters())) or str(device) == "meta":
        raise ModelError("the meta device holds no numbers: load the model's weights, on device='cpu'.")
    try:
        hf = hf.to(device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ModelError(
            f"device {device!r} cannot be used ({str(error).splitlines()[0]}): use device='cpu'."
        ) from error
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
