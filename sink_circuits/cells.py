"""Cells: what a sweep's work is cut into, and how a worker computes one.

A cell is one prompt of one model, all its drawn sinks, some of the layers and all factors: enough edited runs to repay
the clean run it begins with, few enough that little is lost when it is. It is named by the hash of its content
(weights, token ids, edits, thresholds, format), so that one plan has one set of names in every process. A worker
answers with the bytes of the cell's file. Only plain data crosses to workers and back.
"""

from __future__ import annotations

import gc
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr

from sink_circuits import statistics
from sink_circuits.adapters import adapt
from sink_circuits.clean_runs import resolve_path
from sink_circuits.detection import Sinks, find_sinks
from sink_circuits.edits import Edit
from sink_circuits.effects import Effect
from sink_circuits.errors import InputError, ModelError, SinkCircuitsError
from sink_circuits.experiments import dosed, layer_map
from sink_circuits.measurement import measure
from sink_circuits.memory import need_of, rows_within
from sink_circuits.models import load_model
from sink_circuits.outcomes import Outcome, as_outcomes
from sink_circuits.prompts import Prompt, PromptSet, Tokens, as_tokens
from sink_circuits.results import FORMAT, Manifest
from sink_circuits.studies import Study, fingerprint, own_function
from sink_circuits.sweep_results import (
    layers_text,
)


@dataclass(frozen=True)
class Cell:
    """One unit of work. `layers`: joint sets, each edited in runs of its own; None: each sink's forming layer.

    `source` is where a worker loads `model` from, `memory` what it may use (GiB beside the model): they and nothing else are
    left out of the `name`.
    """

    model: str
    source: str
    weights: str
    prompt: str
    ids: tuple[int, ...]
    layers: tuple[tuple[int, ...], ...] | None
    settings: Mapping[str, Any]
    memory: float | None = None

    @property
    def content(self) -> dict[str, Any]:
        return {
            "format": FORMAT, "model": self.model, "weights": self.weights, "prompt": self.prompt,
            "layers": self.layers, "settings": self.settings,
        }  # fmt: skip

    @property
    def name(self) -> str:
        return fingerprint({**self.content, "ids": self.ids})

    @property
    def edits(self) -> dict[str, tuple[str, tuple[int, ...] | None, str, float]]:
        """label -> (layers as text, layers or None for the sink's forming one, intervention, factor)."""
        groups = [("forming", None)] if self.layers is None else [(layers_text(group), group) for group in self.layers]
        return {
            f"{text} {'x' if name == 'rescale' else name} {factor!r}": (text, group, name, factor)
            for text, group in groups
            for name in self.settings["interventions"]
            for factor in self.settings["factors"]
        }


@dataclass(frozen=True)
class Question:
    """What is asked about a model before any cell can be named. `prompts` as `studies.Texts.read` gives them."""

    model: str
    source: str
    prompts: tuple[tuple[str, str | tuple[str, str] | tuple[int, ...]], ...]
    max_tokens: int | None
    chat: bool
    settings: Mapping[str, Any]
    memory: float | None = None


@dataclass(frozen=True)
class Facts:
    """What a model says of itself and of the prompts; `ids` in the order of the question's prompts."""

    weights: str
    n_layers: int
    ids: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Answer:
    """A worker's answer: `value` (a cell's file as bytes, or `Facts`), or `cause`, why there is none."""

    value: Any = None
    cause: str | None = None


def shared_settings(study: Study) -> dict[str, Any]:
    """What every cell of a study has in common, as plain data; the version of each of the user's functions with it.

    Raises InputError for a function that cannot be imported, or an outcome whose name is taken.
    """
    fields = study.to_dict()
    names = (
        "kinds", "sinks_per_prompt", "factors", "interventions", "outcomes", "loss", "kl", "min_queries", "device", "path",
        "threads", "seed",
    )  # fmt: skip
    own = [path for path in (*study.interventions, *study.outcomes) if path != "rescale"]
    as_outcomes(_own_outcomes(study.outcomes))
    return {name: fields[name] for name in names} | {
        "thresholds": study.detection_thresholds(), "functions": {path: own_function(path)[1] for path in own},
    }  # fmt: skip


def _own_outcomes(paths: Sequence[str]) -> list[Outcome]:
    return [Outcome(path.split(":")[1], own_function(path)[0]) for path in paths]


def _check_functions(settings: Mapping[str, Any]) -> None:
    """Raises InputError on a worker that has another version of a user's function."""
    for path, version in settings["functions"].items():
        if own_function(path)[1] != version:
            raise InputError(f"{path} is another version on this worker than where the sweep began: use one copy.")


def cells_of(study: Study, question: Question, facts: Facts) -> list[Cell]:
    """The cells of one model. Raises InputError for a layer that the model lacks.

    The layers of a prompt are dealt out in turn, every k-th to one cell: early layers cost more than late ones (more
    blocks above them are run again), so dealt out the cells cost about the same, and the time left can be told.
    """
    if study.layers == "forming":
        chunks: list = [None]
    else:
        groups = [(layer,) for layer in range(facts.n_layers)] if isinstance(study.layers, str) else list(study.layers)
        if (highest := max(layer for group in groups for layer in group)) >= facts.n_layers:
            raise InputError(f"layer {highest} is out of range: {question.model} has layers 0..{facts.n_layers - 1}.")
        n_chunks = -(-len(groups) // study.layers_per_cell)
        chunks = [tuple(groups[i::n_chunks]) for i in range(n_chunks)]
    return [
        Cell(question.model, question.source, facts.weights, name, ids, chunk, question.settings, question.memory)
        for (name, _), ids in zip(question.prompts, facts.ids, strict=True)
        for chunk in chunks
    ]


# What a worker does.

_held: dict[tuple[str, str], Any] = {}
"""The model this process holds, by (source, device): the one cache a process has, and of one model."""
_one_at_a_time = threading.Lock()  # a worker process with several threads has still one model and one torch


def _hold(source: str, device: str, *, anew: bool = False):
    """The model, loaded unless this process has it. The one held before goes first: two may not fit."""
    if anew or (source, device) not in _held:
        release_model()
        with _no_bars():
            _held[source, device] = load_model(source, device=device, verbose=False)
    return _held[source, device]


@contextmanager
def _no_bars() -> Iterator[None]:
    """transformers' own bars would break into the sweep's, from every worker."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar() if shown else None


def release_model() -> None:
    """Let go of the model that this process holds."""
    _held.clear()
    gc.collect()


def ask(question: Question) -> Answer:
    """Load the model as it is now, and cut the prompts with its own tokenizer."""

    def answer() -> Facts:
        _check_functions(question.settings)
        model = _hold(question.source, question.settings["device"], anew=True)
        if texts := _texts(question.prompts):
            tokens = PromptSet(texts).tokens(model, max_tokens=question.max_tokens, chat=question.chat)
        else:
            rows = tuple(torch.tensor(ids[: question.max_tokens]) for _, ids in question.prompts)
            tokens = as_tokens(model, Tokens(rows, tuple(name for name, _ in question.prompts)))
        longest, settings = max(map(len, tokens)), question.settings
        path = resolve_path(adapter := adapt(model), settings["path"])
        need = need_of(adapter, longest, n_chosen=2, path=path, logits=settings["loss"] or settings["kl"])
        rows_within(question.memory, adapter, need, longest)  # what cannot fit is said before any cell is begun
        return Facts(adapter.weights_hash, model.cfg.n_layers, tuple(tuple(ids.tolist()) for ids in tokens))

    return _caught(answer, question.settings["threads"])


def _texts(prompts: Sequence[tuple]) -> tuple[Prompt, ...]:
    """The prompts that `studies.Texts.read` gives as texts; none where they are token ids."""
    pairs = [(name, (one, "") if isinstance(one, str) else one) for name, one in prompts]
    return tuple(Prompt(name, "text", pair[0], pair[1]) for name, pair in pairs if isinstance(pair[0], str))


def compute(cell: Cell) -> Answer:
    """Find the cell's sinks, run its edits, and answer with its file's bytes."""

    def answer() -> bytes:
        _check_functions(cell.settings)
        device = cell.settings["device"]
        model = _hold(cell.source, device)
        if adapt(model).weights_hash != cell.weights:  # a worker that outlived a change of the model's folder
            model = _hold(cell.source, device, anew=True)
        if (found := adapt(model).weights_hash) != cell.weights:
            raise ModelError(
                f"{cell.source} has weights {found} on this worker and {cell.weights} where the sweep began: use one copy."
            )
        with tempfile.TemporaryDirectory(prefix="sink_circuits-") as folder:
            path = Path(folder) / "cell.safetensors"
            measured(model, cell).save(path)
            return path.read_bytes()

    return _caught(answer, cell.settings["threads"])


def _caught(answer: Callable[[], Any], threads: int) -> Answer:
    """Every failure as text: an exception's class may be unknown, or not to be unpickled, in the other process."""
    with _one_at_a_time, _torch_threads(threads):
        try:
            return Answer(answer())
        except SinkCircuitsError as error:
            return Answer(cause=str(error))
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            first = (str(error).strip().splitlines() or ["no message"])[0]
            return Answer(cause=f"{type(error).__name__}: {first} ({Path(place.filename).name}, line {place.lineno})")


@contextmanager
def _torch_threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def measured(model, cell: Cell) -> Effect:
    """The cell's runs as an `Effect` of kind "sweep"; without sinks in the prompt it has an empty table and no data."""
    settings, edits = cell.settings, cell.edits
    tokens = as_tokens(model, Tokens((torch.tensor(cell.ids),), (cell.prompt,)))
    found = find_sinks(
        model, tokens, path=settings["path"], memory=cell.memory, verbose=False, **settings["thresholds"]
    )
    sinks = drawn(found, settings["kinds"], settings["sinks_per_prompt"], settings["seed"])
    own = {
        "cell": cell.name, "content": cell.content,
        "edits": [
            {"edit": label, "layers": text, "intervention": name, "factor": factor}
            for label, (text, _, name, factor) in edits.items()
        ],
    }  # fmt: skip
    if not len(sinks):
        manifest = Manifest.of(adapt(model), tokens, what="sweep", path=found.manifest.path, **own)
        return Effect("sweep", xr.Dataset(), sinks.table, manifest)
    options = {
        "path": settings["path"], "min_queries": settings["min_queries"], "memory": cell.memory, "verbose": False
    }  # fmt: skip
    forming = None
    if cell.layers is None:
        forming = (
            layer_map(model, tokens, sinks, layers=range(int(sinks.table["l_end"].max()) + 1), **options)
            .forming()
            .to_dict()
        )

    def edits_of(label: str, row: pd.Series) -> tuple[Edit, ...]:
        _, layers, name, factor = edits[label]
        layers = (int(forming[row.name]),) if layers is None else layers
        intervention = name if name == "rescale" else own_function(name)[0]
        return tuple(dosed(intervention, layer, int(row.pos), factor, name) for layer in layers)

    return measure(
        model, tokens, sinks, list(edits), edits_of, what="sweep", outcomes=_own_outcomes(settings["outcomes"]),
        loss=settings["loss"], kl=settings["kl"], settings=own, **options,
    )  # fmt: skip


def drawn(found: Sinks, kinds: Sequence[str], limit: int | None, seed: str) -> Sinks:
    """Sinks of these kinds with a defined score, at most `limit` of each prompt: a draw that `seed` and prompt decide.

    A greater limit keeps what a smaller one drew.
    """
    table = found.select(*kinds).table
    table = table[table["score"].notna()]
    keep: list[int] = []
    for prompt, own in table.groupby("prompt", sort=False):
        order = np.random.default_rng(statistics.seed_of("sinks", seed, prompt)).permutation(len(own))
        keep += sorted(own.index[order[:limit]])
    return Sinks(table.loc[keep].reset_index(drop=True), found.prompts, found.manifest)
