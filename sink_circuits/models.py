"""Models: loading by name, path or object, one thin adapter over the two TransformerLens classes, checks at load."""

from __future__ import annotations

import contextlib
import hashlib
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from sink_circuits import arguments, weights
from sink_circuits.arguments import shown
from sink_circuits.attention import AttentionForm
from sink_circuits.conversion import loader_bars
from sink_circuits.errors import ModelError
from sink_circuits.twin import Twin, TwinRefused, fingerprint, plain_module

CHECK_TOKENS = 24
"""Tokens of the text on which a model is checked: long enough for every block to mix positions, short enough to cost nothing."""

TOLERANCES = {torch.float32: 2e-4, torch.float64: 1e-9, torch.bfloat16: 6e-2, torch.float16: 8e-3}
"""Largest relative error a check accepts: about 20 times what was measured on SmolLM2, Gemma 3 and small random models."""


@dataclass(frozen=True)
class Check:
    """One check of a model on itself: what was compared, the error found and the largest one accepted."""

    name: str
    error: float
    limit: float
    remedy: str

    @property
    def passed(self) -> bool:
        return self.error <= self.limit


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


def adapt(model) -> Adapter:
    """The adapter of a HookedTransformer or TransformerBridge; made once, and again when its weights have changed.

    Raises ModelError, naming the failed check and the remedy, for a model whose hooks do not mean what they should.
    """
    backend_of(model)
    state = (fingerprint(model), _has_user_hooks(model))  # hooks of the user's change what the checks would see
    kept = model.__dict__.get("_sink_circuits_adapter")
    if kept is not None and kept[0] == state:
        return kept[1]
    made = _make_adapter(model)
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


def _has_user_hooks(model) -> bool:
    return any(point.fwd_hooks or point.bwd_hooks for point in model.hook_dict.values())


def _make_adapter(model) -> Adapter:
    backend = backend_of(model)
    inner = getattr(model, "original_model", model)
    if inner.training and any(isinstance(part, nn.Dropout) and part.p > 0 for part in inner.modules()):
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
    processed = find_processing(model, backend)
    parallel = "blocks.0.hook_resid_mid" not in model.hook_dict
    twin, refusal = None, ""
    if backend == "hooked":
        refusal = "HookedTransformer has no Hugging Face module behind it"
    elif _has_user_hooks(model):
        refusal = "hooks of your own stand on the model"
    elif processed:
        refusal = f"the weights were processed ({', '.join(processed)})"
    else:
        try:
            twin = Twin.of_bridge(model)
        except TwinRefused as error:
            refusal = str(error)
    comparable = backend == "bridge" and not processed and not _has_user_hooks(model)
    draft = Adapter(model, backend, twin, refusal, processed, parallel, (), "", ())
    try:
        reference = _reference_pass(draft)
    except (RuntimeError, IndexError, ValueError, TypeError, AttributeError) as error:
        if isinstance(error, ModelError):
            raise
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"a forward pass over {CHECK_TOKENS} tokens fails ({first}): check that weights and configuration belong together."
        ) from error
    _check_shapes(draft, reference)
    checks = _check_reference(draft, reference) + (_check_plain(model, reference) if comparable else ())
    for check in checks:
        if not check.passed and _has_user_hooks(model):
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
            forms, twin_checks = _check_twin(draft, reference)
            checks = (*checks, *twin_checks)
            failed = [c for c in twin_checks if not c.passed]
            if failed:
                twin, refusal = None, f"{failed[0].name}: error {failed[0].error:.2g} above {failed[0].limit:.2g}"
        except Exception as error:  # whatever an unforeseen architecture does, the reference path serves, and says why
            twin, refusal = None, f"{type(error).__name__}: {error}"
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


@dataclass(frozen=True)
class _Reference:
    tokens: Tensor
    resid_post: list[Tensor]
    base: list[Tensor]
    contribution: list[Tensor]
    pattern: list[Tensor]
    logits: Tensor


def _check_text(model) -> Tensor:
    generator = torch.Generator().manual_seed(int.from_bytes(b"sink_circuits check text"[:7], "big"))
    length = min(CHECK_TOKENS, model.cfg.n_ctx)
    return torch.randint(0, model.cfg.d_vocab, (length,), generator=generator)


@torch.no_grad()
def _reference_pass(adapter: Adapter) -> _Reference:
    model = adapter.model
    tokens = _check_text(model).to(adapter.device)
    names = [
        name
        for layer in range(adapter.n_layers)
        for name in (
            *adapter.base_hooks(layer), adapter.contribution_hook(layer), adapter.pattern_hook(layer), f"blocks.{layer}.hook_resid_post",
        )
    ]  # fmt: skip
    logits, cache = model.run_with_cache(tokens[None], names_filter=lambda name: name in set(names))
    missing = [name for name in names if name not in cache]
    if missing:
        raise ModelError(
            f"hook {missing[0]} did not fire on a forward pass: this model cannot be measured through its hooks."
        )
    layers = range(adapter.n_layers)
    return _Reference(
        tokens=tokens,
        resid_post=[cache[f"blocks.{layer}.hook_resid_post"] for layer in layers],
        base=[sum(cache[name] for name in adapter.base_hooks(layer)) for layer in layers],
        contribution=[cache[adapter.contribution_hook(layer)] for layer in layers],
        pattern=[cache[adapter.pattern_hook(layer)] for layer in layers],
        logits=logits,
    )


def _check_shapes(adapter: Adapter, reference: _Reference) -> None:
    """Raises ModelError for hooks without the residual stream's axes: a position would be taken for a row of the batch."""
    for layer, resid in enumerate(reference.resid_post):
        for name, found in (
            ("base", reference.base[layer]),
            (adapter.contribution_hook(layer), reference.contribution[layer]),
        ):
            if found.shape != resid.shape:
                raise ModelError(
                    f"{name if name != 'base' else adapter.base_hooks(layer)[0]} has shape {tuple(found.shape)} and the residual stream "
                    f"{tuple(resid.shape)}: edits of this architecture would land elsewhere; use another model."
                )


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest absolute difference, as a share of the largest absolute value expected; NaN counts as infinite."""
    if found.shape != expected.shape:
        return float("inf")
    error = ((found.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1e-30)).item()
    return error if error == error else float("inf")


def _has_learned_sinks(adapter: Adapter) -> bool:
    return any("sinks" in name.rpartition(".")[2] for name, _ in adapter.model.named_parameters())


@torch.no_grad()
def _check_reference(adapter: Adapter, reference: _Reference) -> tuple[Check, ...]:
    limit = TOLERANCES.get(reference.logits.dtype, 2e-4)
    parts = max(
        relative_error(base + contribution, post)
        for base, contribution, post in zip(reference.base, reference.contribution, reference.resid_post, strict=True)
    )
    rows = torch.stack([pattern.float().sum(-1) for pattern in reference.pattern])
    excess = (rows - 1).clamp(min=0).max() if _has_learned_sinks(adapter) else (rows - 1).abs().max()
    layer = adapter.n_layers // 2
    hook_calls = []

    def halve(contribution: Tensor, hook) -> Tensor:
        hook_calls.append(hook)
        edited = contribution.clone()
        edited[:, -1] *= 0.5
        return edited

    edited = adapter.model.run_with_hooks(reference.tokens[None], fwd_hooks=[(adapter.contribution_hook(layer), halve)])
    moved = (edited - reference.logits)[:, -1].abs().max().item() if hook_calls else 0.0
    return (
        Check("base + contribution == resid_post", parts, limit,
              "the MLP output hook of this architecture is not what is added to the residual stream, so an edit of it would lie."),
        Check("attention rows sum to 1", excess.item(), max(limit, 1e-3),
              "the pattern hook does not hold attention weights: use attn_implementation='eager'."),
        Check("an edit of a contribution reaches the logits", 0.0 if moved > 0 else 1.0, 0.5,
              f"halving {adapter.contribution_hook(layer)} changed nothing: edits of this model would be silent no-ops."),
    )  # fmt: skip


@torch.no_grad()
def _check_plain(model, reference: _Reference) -> tuple[Check, ...]:
    """The bridge against the plain Hugging Face forward pass with the same parameters, where that can be built."""
    try:
        plain = plain_module(model, "eager")
        logits = plain(input_ids=reference.tokens[None], use_cache=False).logits
    except (TwinRefused, RuntimeError, TypeError, ValueError, AttributeError) as refusal:
        warnings.warn(
            f"the plain Hugging Face forward pass could not be run beside the bridge ({refusal}).", stacklevel=2
        )
        return ()
    error = relative_error(reference.logits.float().log_softmax(-1), logits.float().log_softmax(-1))
    remedy = "this TransformerLens version computes the architecture wrongly: use another version, or another model."
    return (Check("log-probabilities equal plain Hugging Face's", error, TOLERANCES.get(logits.dtype, 2e-4), remedy),)


@torch.no_grad()
def _check_twin(adapter: Adapter, reference: _Reference) -> tuple[tuple[AttentionForm, ...], tuple[Check, ...]]:
    twin, limit = adapter.twin, TOLERANCES.get(reference.logits.dtype, 2e-4)
    inputs = twin.block_inputs(reference.tokens)
    forms, errors, sums, parts, keys, values = [], [], [], [], [], []
    n = len(reference.tokens)
    strictly_later = torch.ones(n, n, dtype=torch.bool, device=reference.tokens.device).tril(-1)
    for run in twin.run(inputs.embed, inputs, range(adapter.n_layers), sums=True):
        forms.append(run.tap.form)
        errors.append(relative_error(run.resid_post, reference.resid_post[run.layer]))
        same = (
            run.tap.base.shape == run.tap.contribution.shape == run.resid_post.shape
        )  # Llama 4's experts drop the batch axis
        parts.append(relative_error(run.tap.base + run.tap.contribution, run.resid_post) if same else float("inf"))
        expected = (reference.pattern[run.layer].float() * strictly_later).sum(-2)
        sums.append((run.tap.attention.later - expected).abs().max().item())
        keys.append(run.tap.key)
        values.append(run.tap.value)
        final = run.resid_post
    start = n // 2  # as edited runs do: above the first block, in the middle of the text

    def prefix(layer: int) -> tuple[Tensor, Tensor]:
        return keys[layer][:, :, :start], values[layer][:, :, :start]

    resid = reference.resid_post[0][:, start:]
    resumed = [
        relative_error(run.resid_post, reference.resid_post[run.layer][:, start:])
        for run in twin.run(resid, inputs, range(1, adapter.n_layers), start=start, prefix=prefix)
    ]
    log_probs = relative_error(twin.logits(final).float().log_softmax(-1), reference.logits.float().log_softmax(-1))
    remedy = "the reference path is used instead."
    return tuple(forms), (
        Check("fast path: resid_post of every block", max(errors), limit, remedy),
        Check("fast path: base + contribution == resid_post", max(parts), limit, remedy),
        Check("fast path: attention received", max(sums), max(limit, 1e-3), remedy),
        Check("fast path: log-probabilities", log_probs, limit, remedy),
        Check("fast path: resumed in the middle of a text", max(resumed, default=0.0), limit, remedy),
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
    tokens = torch.arange(window + 8, device=next(model.parameters()).device) % model.cfg.d_vocab
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
    layer_types = getattr(cfg, "layer_types", None)
    if layer_types is not None and layer_types[layer] == "sliding_attention":
        hf_config = getattr(getattr(model, "original_model", None), "config", cfg)
        window = getattr(hf_config, "sliding_window", None)
    cap = getattr(cfg, "attn_scores_soft_cap", -1.0)
    scale = getattr(cfg, "attn_scale", -1.0)
    scaling = 1.0 / scale if scale and scale > 0 else cfg.d_head**-0.5
    return AttentionForm(scaling, window, cap if cap and cap > 0 else None)


def load_model(
    source, *, device: str = "cpu", dtype: torch.dtype = torch.float32, tokenizer=None, trust_remote_code: bool = False,
    verbose: bool = True,
):  # fmt: skip
    """Load a model, check it, and return it as the TransformerLens object it is.

    `source`: a bundled name (`sink-circuits models` lists them), a Hugging Face id `org/name@revision`, a local
    directory in Hugging Face format, a GGUF file, a Hugging Face model, or a TransformerBridge or HookedTransformer,
    which is checked and returned as it is. Raises ModelError or WeightsError, each in one sentence.
    """
    if isinstance(source, nn.Module):
        if hasattr(source, "config") and not hasattr(source, "hook_dict"):
            return _bridge(
                source, tokenizer, str(getattr(source.config, "name_or_path", "") or type(source).__name__), device
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
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ModelError(f"dtype {shown(dtype)} is not one that models compute in: use torch.float32.")
    arguments.flag(trust_remote_code, "trust_remote_code")
    folder, where = _find(str(source), verbose)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        with loader_bars(verbose):
            hf, info = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, trust_remote_code=trust_remote_code, output_loading_info=True,
                use_safetensors=True, **where,  # other formats are pickles, which can run code
            )  # fmt: skip
            if tokenizer is None and not _lacks_tokenizer(folder):
                tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, **where)
    except Exception as error:  # a folder that was altered ends in anything, from ZeroDivisionError to tokenizers' own
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"{str(source)!r} could not be loaded ({first}): {_choices()}.") from error
    _check_complete(str(source), hf, info)
    bridge = _bridge(hf.eval(), tokenizer, str(source) if where else Path(str(source)).name, device)
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

    folder = weights.cached_folder(source) if source in weights.REGISTRY else Path(source).expanduser()
    if not source or not (folder / "config.json").is_file():
        return None
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)  # otherwise it may ask, and wait
        return config.get_text_config().num_hidden_layers
    except (OSError, ValueError, KeyError, AttributeError):
        return None


def _find(source: str, verbose: bool) -> tuple[str, dict]:
    """Where `source` is: a folder and no more, or a hub's id with what `from_pretrained` needs to find it."""
    if source in weights.REGISTRY:
        return str(weights.fetch(source, verbose=verbose)), {}
    path = Path(source).expanduser()
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


def _bridge(hf, tokenizer, name: str, device: str):
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    hf = hf.eval()
    hf.config.architectures = [type(hf).__name__]
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
