"""Studies: what a sweep runs over, as a frozen dataclass or a TOML file, checked wholly before any long work.

Everything here is plain data: it crosses to workers, and its fingerprint names what was computed from it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import json
import math
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sink_circuits import arguments
from sink_circuits.arguments import MOST, flag, number, one_of, several, shown, text, whole
from sink_circuits.errors import InputError
from sink_circuits.text_files import has_surrogate, parse_json, read_text

KINDS = ("primary", "secondary", "primary-like")
FACTORS = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)
MOST_THREADS = 1024
"""More than any machine has cores: where threads cannot be had, torch ends the process."""


@dataclass(frozen=True)
class Texts:
    """Which prompts: `source` as `load_prompts` takes it, or `tokens`, a JSON-lines file of token ids.

    A line of `tokens` is {"id": "a", "tokens": [0, 17, 4]}: for models without a tokenizer. `n`: only the first so
    many; `max_tokens`: cut each after so many tokens; `chat`: wrap each in the chat template. Relative paths are
    relative to the working directory.
    """

    source: str = "all"
    tokens: str | None = None
    n: int | None = None
    max_tokens: int | None = None
    chat: bool = False

    def __post_init__(self):
        text(self.source, "prompts.source")
        if self.tokens is not None:
            text(self.tokens, "prompts.tokens")
            if self.chat or self.source != "all":
                raise InputError("prompts.tokens are token ids already: leave prompts.source and prompts.chat out.")
        for name in ("n", "max_tokens"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, whole(getattr(self, name), f"prompts.{name}", low=1))
        object.__setattr__(self, "chat", flag(self.chat, "prompts.chat"))

    def read(self) -> tuple[tuple[str, str | tuple[str, str] | tuple[int, ...]], ...]:
        """(id, text, or text and output, or token ids) of every prompt. Raises InputError for an unknown kind, a file that cannot be
        read, or one that holds fewer than `n`."""
        if self.tokens is not None:
            found: Sequence[tuple] = read_token_file(Path(self.tokens))[: self.n]
        else:
            from sink_circuits.prompts import load_prompts

            prompts = load_prompts(self.source, self.n)
            found = [(one.id, (one.text, one.output) if one.output else one.text) for one in prompts]
        if self.n is not None and len(found) < self.n:
            raise InputError(
                f"prompts.n = {self.n}, and {self.tokens or self.source!r} holds {len(found)}: ask for no more."
            )
        return tuple(found)


@dataclass(frozen=True)
class Study:
    """A sweep over models, prompts, layers and factors: edit MLP contributions at the sinks of every prompt.

    `kinds` of sinks are treated, at most `sinks_per_prompt` of them, drawn by `seed` (None: all). `layers`: "all" (each
    by itself), "forming" (each sink's own, by a layer map), or numbers and joint sets: [3, [6, 7]]. Contributions are
    multiplied by each of `factors` (0 ablates; 1 is the clean run and is not run). `interventions`: "rescale", or
    functions of your own of (contribution [pos, d_model], factor) as "module:function"; `outcomes`: functions of your own
    of (clean, edited, sink), likewise (see `own_function`). `loss`, `kl`: the next-token loss, the KL divergence too.
    `min_queries`: later queries that a score needs; `thresholds` of detection by name (see `detection.Thresholds`).
    `layers_per_cell`: layers (or joint sets) of one prompt in one unit of work. `threads`: torch threads of a worker,
    part of the study because the last bits depend on it. `memory`: GiB that each worker may use beside the model (None: what
    is free there); it decides how many runs share a batch, and may be changed between two calls. `path` as in `run_clean`.
    Raises InputError.
    """

    models: tuple[str, ...]
    prompts: Texts = field(default_factory=Texts)
    kinds: tuple[str, ...] = ("secondary", "primary-like")
    sinks_per_prompt: int | None = None
    layers: str | tuple[tuple[int, ...], ...] = "all"
    factors: tuple[float, ...] = FACTORS
    interventions: tuple[str, ...] = ("rescale",)
    outcomes: tuple[str, ...] = ()
    loss: bool = False
    kl: bool = False
    min_queries: int = 16
    thresholds: Mapping[str, Any] = field(default_factory=dict)
    layers_per_cell: int = 8
    device: str = "cpu"
    path: str = "auto"
    threads: int = 1
    memory: float | None = None
    seed: str = "study"

    def __post_init__(self):
        settle = object.__setattr__
        settle(self, "models", tuple(text(m, "a model") for m in several(self.models, "models")))
        prompts = _fields(Texts, self.prompts, "prompts") if isinstance(self.prompts, Mapping) else self.prompts
        if not isinstance(prompts, Texts):
            raise InputError(f"prompts = {shown(prompts)}: give a table of source or tokens, n, max_tokens, chat.")
        settle(self, "prompts", prompts)
        settle(self, "kinds", tuple(one_of(kind, "kind", KINDS) for kind in several(self.kinds, "kinds")))
        settle(self, "layers", _layers(self.layers))
        settle(self, "interventions", tuple(_intervention(i) for i in several(self.interventions, "interventions")))
        settle(self, "outcomes", tuple(map(_own, several(self.outcomes, "outcomes", empty=True))))
        low = 0 if "rescale" in self.interventions else -math.inf
        settle(self, "factors", tuple(number(f, "factor", low=low) for f in several(self.factors, "factors")))
        for name in ("models", "kinds", "layers", "factors", "interventions", "outcomes"):
            if isinstance(values := getattr(self, name), tuple) and len(set(values)) < len(values):
                raise InputError(f"{name} = {list(values)}: name each once.")
        names = [path.split(":")[1] for path in self.outcomes]
        if twice := [name for name in names if names.count(name) > 1]:
            raise InputError(f"two outcomes are named {twice[0]!r}: name each its own.")
        for name in ("sinks_per_prompt", "min_queries", "layers_per_cell", "threads"):
            if name != "sinks_per_prompt" or self.sinks_per_prompt is not None:
                settle(
                    self,
                    name,
                    whole(getattr(self, name), name, low=1, high=MOST_THREADS if name == "threads" else MOST),
                )
        if self.memory is not None:
            if number(self.memory, "memory") <= 0:
                raise InputError(f"memory = {self.memory}: give GiB, more than 0, or leave it out for what is free.")
            settle(self, "memory", number(self.memory, "memory"))
        for name in ("loss", "kl"):
            settle(self, name, flag(getattr(self, name), name))
        one_of(self.path, "path", ("auto", "fast", "reference"))
        for name in ("device", "seed"):
            text(getattr(self, name), name)
        settle(self, "thresholds", _thresholds(self.thresholds))

    def detection_thresholds(self) -> dict[str, Any]:
        """`thresholds`, with `min_queries` for the evidence too unless they say otherwise."""
        return {"min_queries": self.min_queries, **self.thresholds}

    def to_dict(self) -> dict:
        """Plain lists, numbers and strings; `Study(**fields)` reads it back."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


def read_study(path: str | Path) -> Study:
    """A study from a TOML file whose keys are the fields of `Study`. Raises InputError for anything else."""
    path = arguments.path(path, "study")
    try:
        content = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"study {path} cannot be read ({error}): check the path.") from error
    try:
        fields = tomllib.loads(content)
    except (
        ValueError,
        RecursionError,
    ) as error:  # TOMLDecodeError, a number of thousands of digits, brackets in brackets
        raise InputError(f"study {path} is not TOML ({error}): mend that line.") from error
    try:
        return _fields(Study, fields, "the study")
    except InputError as error:
        raise InputError(f"study {path}: {error}") from error


def read_token_file(path: Path) -> list[tuple[str, tuple[int, ...]]]:
    """(id, token ids) of every line. Raises InputError naming the line that cannot be read."""
    try:
        lines = read_text(arguments.path(path, "prompts.tokens")).split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"token file {path} cannot be read ({error}): check the path.") from error
    prompts: dict[str, tuple[int, ...]] = {}
    for count, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = parse_json(line)
            given, ids = record.get("id", f"line-{count}"), record["tokens"]
            name = str(given)
            if isinstance(given, bool) or not isinstance(given, str | int) or has_surrogate(name):
                raise ValueError("the id is not a string")
            if not isinstance(ids, list) or not ids or any(type(i) is not int or not 0 <= i <= MOST for i in ids):
                raise ValueError("the ids are not whole numbers from 0")
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise InputError(f'{path}, line {count}: {error}; a line is {{"id": "a", "tokens": [0, 17]}}.') from error
        if name in prompts:
            raise InputError(f"{path}, line {count}: the id {name!r} is taken; give each prompt its own.")
        prompts[name] = tuple(ids)
    if not prompts:
        raise InputError(f"{path} holds no prompts: give at least one line.")
    return list(prompts.items())


def fingerprint(content: Any) -> str:
    """SHA-256 of plain data, 32 hex digits: the same for equal content, in every process and version of Python."""
    plain = json.dumps(content, sort_keys=True, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(plain.encode()).hexdigest()[:32]


@functools.cache  # a module is imported once: the version noted must be that of the code which runs, not of a newer file
def own_function(path: str) -> tuple[Callable, str]:
    """The function at "module:function", and the version of its module: a hash of the file's content.

    The module is imported by name in every process that computes: install it, or name its folder in PYTHONPATH. Code is
    never sent. Raises InputError when it cannot be imported or called.
    """
    module_name, name = _own(path).split(":")
    if module_name == "__main__":
        raise InputError(f"{path} stands in the program itself, which workers do not import: move it to a module.")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the user's module raises
        raise InputError(
            f"{path} cannot be imported ({type(error).__name__}: {error}): install its module, or name its folder in PYTHONPATH."
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise InputError(f"{path} is no function: module {module_name} has none of this name.")
    file = getattr(module, "__file__", None)
    return function, hashlib.sha256(Path(file).read_bytes() if file else module_name.encode()).hexdigest()[:32]


def _own(path) -> str:
    if not isinstance(path, str) or not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*", path):
        raise InputError(f"{shown(path)} names no function: write 'module:function'.")
    return path


def _intervention(name) -> str:
    return name if name == "rescale" else _own(name)


def _fields(cls, given: Mapping, where: str):
    """`cls(**given)`, with unknown and missing keys named."""
    known = [f.name for f in dataclasses.fields(cls)]
    if unknown := sorted(set(given) - set(known)):
        raise InputError(f"{where} has no key {unknown[0]!r}: there are {', '.join(known)}.")
    required = [f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING]
    if missing := [name for name in required if name not in given]:
        raise InputError(f"{where} lacks the key {missing[0]!r}: give it.")
    return cls(**given)


def _layers(layers) -> str | tuple[tuple[int, ...], ...]:
    if isinstance(layers, str):
        return one_of(layers, "layers", ("all", "forming"))
    groups = []
    for one in several(layers, "layers"):
        joint = several(one, "a joint set of layers") if isinstance(one, list | tuple) else (one,)
        group = tuple(sorted(whole(layer, "layer") for layer in joint))
        if len(set(group)) < len(group):
            raise InputError(f"the joint set {list(group)} names a layer twice: name each once.")
        groups.append(group)
    return tuple(groups)


def _thresholds(given) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise InputError(f"thresholds = {shown(given)}: give a table, cosine = 0.9 for example.")
    from sink_circuits.detection import Thresholds

    known = Thresholds.__dataclass_fields__
    checked: dict[str, Any] = {}
    for name, value in given.items():
        if name not in known:
            raise InputError(f"threshold {shown(name)} is unknown: there are {', '.join(known)}.")
        if name == "first_positions":
            positions = several(value, "first_positions") if value is not None else None
            checked[name] = positions and tuple(whole(p, "a first position") for p in positions)
        elif isinstance(known[name].default, int):
            checked[name] = whole(value, f"threshold {name}", low=-MOST)
        else:
            checked[name] = number(value, f"threshold {name}")
    Thresholds(**checked)
    return checked
