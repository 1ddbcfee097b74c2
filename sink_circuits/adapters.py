"""The adapter: the one thin layer over TransformerBridge and HookedTransformer, made when a model passes its checks."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial, wraps
from typing import ParamSpec, TypeVar

import torch
from torch import nn

from sink_circuits.attention import AttentionForm
from sink_circuits.attention_forms import check_attention, check_windows, configured_form, with_measured_windows
from sink_circuits.errors import ModelError
from sink_circuits.load_checks import (
    CHECK_TOKENS,
    Check,
    check_finite,
    check_plain,
    check_reference,
    check_shapes,
    check_twin,
    reference_pass,
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
    def device_name(self) -> str:
        """What the model is on: "cpu", or "cuda" with the name of the GPU behind it, "cuda: NVIDIA H100"."""
        kind = self.device.type
        return f"{kind}: {torch.cuda.get_device_name(self.device)}" if kind == "cuda" else kind

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
    parameters = {id(p): p for part in modules for p in part._parameters.values() if p is not None}
    state = (fingerprint(list(parameters.values())), _has_user_hooks(modules), _drops_out(modules))
    kept = model.__dict__.get("_sink_circuits_adapter")
    if kept is not None and kept[0] == state:
        return kept[1]
    made = _make_adapter(model, modules)
    model.__dict__["_sink_circuits_adapter"] = (state, made)
    return made


def hash_weights(model: nn.Module) -> str:
    """Twelve hex digits over samples of every parameter: tells two checkpoints of one name apart.

    One of zeros counts as none: TransformerLens 3.9 gives every unembedding a bias of zeros, 4.3 does not.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if not parameter.any():
            continue
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
    held = ("fwd_hooks", "bwd_hooks", "_forward_hooks", "_forward_pre_hooks", "forward")
    for state in map(vars, modules):
        if not any(map(state.get, held)):  # most modules: of thousands
            continue
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
    check_attention(model)
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
            check_windows(model, forms)
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
        forms = with_measured_windows(
            model, tuple(configured_form(model, layer) for layer in range(model.cfg.n_layers)), backend
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
