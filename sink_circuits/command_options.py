"""Options that subcommands share, and the checks that are made of them before weights are read. Nothing heavy is imported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from sink_circuits.errors import InputError

Kind = Literal["primary", "secondary", "primary-like"]
Model = Annotated[
    str,
    tyro.conf.Positional,
    tyro.conf.arg(
        help="A name from `sink-circuits models`, a folder, a GGUF file, or a Hugging Face id org/name@revision."
    ),
]

Device = Annotated[str, tyro.conf.arg(help="Where the model runs: cpu, cuda, cuda:1.")]


@dataclass(frozen=True)
class Texts:
    """Which texts, as the model's own tokenizer cuts them."""

    prompts: str = "maths"
    """Bundled prompts of a kind (maths, prose, code, lists, dialogue, all), a .jsonl file with a `text` each, or a .txt file."""
    n_prompts: int | None = 4
    """Only the first so many prompts."""
    skip: int = 0
    """Leave out so many prompts before those, for texts that were not looked at before."""
    max_tokens: int | None = None
    """Cut every prompt after so many tokens."""
    chat: bool = False
    """Wrap every text as a user's message in the chat template."""


def _threshold(kind: str, default: float):
    """An option that is None unless given, for `official` refuses it; its default is written where it is used."""
    return tyro.conf.arg(metavar=kind, help_behavior_hint=f"(default: {default})")


@dataclass(frozen=True)
class Criteria:
    """What counts as a sink."""

    cosine: Annotated[float | None, _threshold("FLOAT", 0.9)] = None
    """Centred cosine with the primary sink, above."""
    norm_ratio: Annotated[float | None, _threshold("FLOAT", 2.5)] = None
    """Norm over the layer's median norm, above."""
    min_lifetime: Annotated[int | None, _threshold("INT", 2)] = None
    """Layers that a sink must last."""
    bridge: Annotated[int | None, _threshold("INT", 1)] = None
    """Gaps of so many layers inside a sink's life are bridged."""
    min_queries: Annotated[int | None, _threshold("INT", 16)] = None
    """Later tokens that a score needs; with fewer it is undefined."""
    first_positions: Annotated[
        tuple[int, ...], tyro.conf.arg(help_behavior_hint="(default: 0 1 2 3; official: 0 1, with --chat 0 1 2)")
    ] = ()
    """Where the primary sink (official: the BOS sink) is looked for."""

    def given(self) -> dict[str, Any]:
        """The thresholds that were given, as `find_sinks` takes them."""
        values = {name: getattr(self, name) for name in Criteria.__dataclass_fields__}
        return {name: value for name, value in values.items() if value is not None and value != ()}


@dataclass(frozen=True)
class Selection:
    """Which of the sinks are treated."""

    kinds: tuple[Kind, ...] = ("secondary", "primary-like")
    """Which kinds of sink to treat."""
    max_sinks: int | None = 8
    """Treat only the first so many sinks of all prompts; what is left out is said."""


@dataclass(frozen=True)
class Output:
    """Where results go."""

    out: Path | None = None
    """Write the result here (.safetensors; tables .parquet or .csv); without it only the summary is printed."""
    figure: Path | None = None
    """Write the figure here (.html, or .svg, .pdf, .png)."""
    overwrite: bool = False
    """Replace files that exist."""
    path: Literal["auto", "fast", "reference"] = "auto"
    """Execution path: `reference` goes through TransformerLens' hooks alone."""
    memory: float | None = None
    """GiB to use beside the model's weights; what is free when not given. A text that does not fit is refused."""
    device: Device = "cpu"
    quiet: bool = False
    """No progress bars."""


@dataclass(frozen=True)
class Table:
    """Where the table goes."""

    out: Path | None = None
    """Write the sinks here: .parquet, .csv, or (official) .jsonl in the published format."""
    overwrite: bool = False
    """Replace a file that exists."""
    path: Literal["auto", "fast", "reference"] = "auto"
    """Execution path: `reference` goes through TransformerLens' hooks alone."""
    memory: float | None = None
    """GiB to use beside the model's weights; what is free when not given. A text that does not fit is refused."""
    device: Device = "cpu"
    quiet: bool = False
    """No progress bars."""


def prompts_of(texts: Texts):
    """The prompts that these options choose. Raises InputError when they choose none."""
    from sink_circuits.prompts import load_prompts

    prompts = load_prompts(texts.prompts, None if texts.n_prompts is None else texts.n_prompts + texts.skip)
    if not 0 <= texts.skip < len(prompts):
        raise InputError(f"skip = {texts.skip} of {len(prompts)} prompts: at least 0, and one must be left.")
    return prompts[texts.skip :]


def load_texts(
    name: str, texts: Texts, thresholds: dict, *, verbose: bool, method: str = "robust", selection: Selection | None = None,
    layers: tuple[int, ...] = (), device: str = "cpu",
):  # fmt: skip
    """The model and its tokens; what can be wrong with the options is told before the model's weights are read."""
    if texts.max_tokens is not None and texts.max_tokens < 1:
        raise InputError(f"max_tokens = {texts.max_tokens}: at least 1.")
    prompts = prompts_of(texts)
    check_layers(layers)
    from sink_circuits import detection, models

    detection.thresholds_of(method, **thresholds)
    if selection is not None:
        from sink_circuits import demo

        demo.check_selection(selection.kinds, selection.max_sinks)
    if layers:
        check_layers(layers, models.layers_of_config(name))
    model = models.load_model(name, device=device, verbose=verbose)
    check_layers(layers, model.cfg.n_layers)
    return model, prompts.tokens(model, max_tokens=texts.max_tokens, chat=texts.chat)


def check_layers(layers: tuple[int, ...], n_layers: int | None = None) -> None:
    """Raises InputError for a layer named twice or out of range; `n_layers` None: how many there are is not known yet."""
    if len(set(layers)) < len(layers):
        raise InputError(f"layers {' '.join(map(str, layers))}: name each layer once.")
    for layer in layers:
        if layer < 0 or (n_layers is not None and layer >= n_layers):
            there = "layers are counted from 0" if n_layers is None else f"the model has layers 0..{n_layers - 1}"
            raise InputError(f"layer {layer} is out of range: {there}.")


def check_free(target: Path | None, overwrite: bool) -> None:
    """Raises before any long work when a result could not be written."""
    if target is not None:
        from sink_circuits.results import check_target

        check_target(target, overwrite=overwrite)


def check_budget(gib: float | None) -> None:
    """Raises InputError for a `--memory` that is none; the room that knows is heavy, and not needed where none was given."""
    if gib is not None:
        from sink_circuits.memory import check_memory

        check_memory(gib)


def check_suffix(target: Path | None, allowed: tuple[str, ...]) -> None:
    if target is not None and target.suffix not in allowed:
        raise InputError(f"{target} has no known ending: use one of {', '.join(allowed)}.")


def as_table(frame) -> str:
    return frame.to_string(
        index=False, float_format=lambda x: f"{x:.3g}", formatters={"token": ascii_token} if "token" in frame else None
    )


def ascii_token(token: str) -> str:
    """A token in quotes, with control and other unprintable characters escaped: a terminal shows it as data."""
    return repr(token)
