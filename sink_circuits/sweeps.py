"""Sweeps: a study over models, prompts, layers and factors, cut into cells that any pool of workers can compute.

A cell is one prompt of one model, all its drawn sinks, some of the layers and all factors: enough edited runs to repay
the clean run it begins with, few enough that little is lost when it is. It is named by the hash of its content
(weights, token ids, edits, thresholds, format), so that one plan has one set of names in every process. A worker
answers with the bytes of the cell's file, and the process that called `sweep` writes it, whole or not at all: workers
share no disk with it, and an interrupted sweep has nothing to mend. Only plain data crosses to workers and back.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import json
import multiprocessing
import os
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pandas as pd
import torch
import xarray as xr
from tqdm.auto import tqdm

from sink_circuits import arguments, statistics
from sink_circuits.adapters import adapt
from sink_circuits.clean_runs import resolve_path
from sink_circuits.detection import Sinks, find_sinks
from sink_circuits.edits import Edit
from sink_circuits.effects import Effect
from sink_circuits.errors import InputError, ModelError, ResultError, SinkCircuitsError
from sink_circuits.experiments import dosed, layer_map
from sink_circuits.measurement import measure
from sink_circuits.memory import need_of, rows_within
from sink_circuits.models import load_model
from sink_circuits.outcomes import Outcome, as_outcomes
from sink_circuits.prompts import Prompt, PromptSet, Tokens, as_tokens
from sink_circuits.results import FORMAT, Manifest, check_target, write_whole
from sink_circuits.studies import Study, fingerprint, own_function
from sink_circuits.sweep_results import (
    FAILURES,
    STUDY,
    SweepResult,
    cell_path,
    layers_text,
    load_sweep,
    read_cell,
    read_json,
)
from sink_circuits.weights import REGISTRY

LOCK = ".lock"
ATTEMPTS = 3
"""How often a cell is given to a worker before a dying worker is taken for the cell's own fault."""
POLL = 0.1
"""Seconds between looks at futures that cannot be waited for (submitit's jobs, for example)."""


# ------------------------------------------------------------------------------------------------------- cells
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


# ----------------------------------------------------------------------------------------------------- workers
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


# --------------------------------------------------------------------------------------------------- executors
class WorkerPool(concurrent.futures.Executor):
    """Worker processes (spawned), each a pool of its own: one that dies takes its own task along and no other's.

    (concurrent.futures' pool of several processes is broken as a whole by the death of one.) The next task gets a fresh
    process. Workers leave when the process that started them is gone, however it went.
    """

    def __init__(self, workers: int):
        self._threads = concurrent.futures.ThreadPoolExecutor(arguments.whole(workers, "workers", low=1))
        self._own = threading.local()
        self._pools: list[concurrent.futures.ProcessPoolExecutor] = []

    def submit(self, function, /, *args, **kwargs):
        return self._threads.submit(self._in_own_process, function, *args, **kwargs)

    def _in_own_process(self, function, *args, **kwargs):
        if getattr(self._own, "pool", None) is None:
            context = multiprocessing.get_context("spawn")
            self._own.pool = concurrent.futures.ProcessPoolExecutor(1, context, _leave_with_parent)
            self._pools.append(self._own.pool)
        try:
            return self._own.pool.submit(function, *args, **kwargs).result()
        except concurrent.futures.BrokenExecutor:
            self._own.pool = None
            raise

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self._threads.shutdown(wait, cancel_futures=cancel_futures)
        for pool in self._pools:
            pool.shutdown(wait, cancel_futures=cancel_futures)


def _leave_with_parent() -> None:
    """A worker of a killed parent would wait for tasks for ever, with a model in memory."""

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class _InThisProcess:
    """`submit` that has run the function when it returns."""

    def submit(self, function, /, *args):
        future: concurrent.futures.Future = concurrent.futures.Future()
        future.set_result(function(*args))
        return future


def _submitter(executor) -> Any:
    """Anything with `submit`; a dask Client through its own concurrent.futures face, nothing taken for done before."""
    if executor is None:
        return _InThisProcess()
    if not hasattr(executor, "submit"):
        raise InputError(
            f"executor of type {type(executor).__name__} has no `submit`: pass a pool, a dask Client or None."
        )
    return executor.get_executor(pure=False) if hasattr(executor, "get_executor") else executor


def _answers(submitter, function: Callable[[Any], Answer], tasks: Sequence) -> Iterator[tuple[Any, Answer]]:
    """(task, answer) as they come. A task whose worker died is given to another, `ATTEMPTS` times in all."""
    waiting = deque(range(len(tasks)))
    running: dict[Any, int] = {}  # future -> index of its task
    lost: Counter[int] = Counter()
    # Here and now, a second task would only delay the writing of the first one's result.
    width = 1 if isinstance(submitter, _InThisProcess) else len(tasks)
    try:
        while waiting or running:
            while waiting and len(running) < width:
                index = waiting.popleft()
                try:
                    running[submitter.submit(function, tasks[index])] = index
                except Exception as error:  # a pool that has broken takes nothing any more
                    yield tasks[index], Answer(cause=_loss(error))
            for future in _first_done(list(running)):
                index = running.pop(future)
                try:
                    outcome = future.result()
                except (Exception, asyncio.CancelledError) as error:  # `function` itself raises nothing
                    lost[index] += 1
                    # dask has tried several workers itself before it says KilledWorker
                    if lost[index] < ATTEMPTS and type(error).__name__ != "KilledWorker":
                        waiting.append(index)
                        continue
                    outcome = Answer(cause=_loss(error))
                yield tasks[index], outcome
    finally:
        for future in running:
            future.cancel()


def _loss(error: BaseException) -> str:
    first = (str(error).strip().splitlines() or ["no message"])[0]
    return f"no worker returned it ({type(error).__name__}: {first}): killed, out of memory, or the pool is broken; sweep again."


def _first_done(futures: list) -> list:
    """Those that are done, at least one; whatever kind of future they are."""
    if all(isinstance(future, concurrent.futures.Future) for future in futures):
        return (
            list(concurrent.futures.wait(futures, return_when=concurrent.futures.FIRST_COMPLETED).done)
            if futures
            else []
        )
    while not (done := [future for future in futures if future.done()]):
        time.sleep(POLL)
    return done


# ------------------------------------------------------------------------------------------------------ sweeps
def sweep(study: Study, folder: str | Path, executor=None, *, verbose: bool = True) -> SweepResult:
    """Compute the cells of `study` that `folder` lacks, and return all of its results.

    `executor`: anything with concurrent.futures' `submit` (a process pool with the spawn method, `WorkerPool`, a dask
    Client, submitit, Ray, MPI pools); None computes in this process. Each worker process loads a model once and holds
    one at a time. May be stopped at any moment, kill -9 included: the same call goes on and ends with the same values
    (to the bit, since `study.threads` is fixed; the machines' arithmetic permitting). A cell that fails is said at
    once, listed in the result, and tried again by the next call. Raises InputError, ModelError and ResultError before
    any long work: for layers, prompts or models that do not fit, and a folder of another study.
    """
    arguments.instance(study, "study", Study, "make it with Study(models=[...]) or read_study(path)")
    arguments.flag(verbose, "verbose")
    folder, submitter = arguments.path(folder, "folder"), _submitter(executor)
    prompts, settings = study.prompts.read(), shared_settings(study)
    record = {"format": FORMAT, "study": study.to_dict(), "prompts": fingerprint(prompts)}
    with _claimed(folder, record):
        try:
            cells = _planned(study, prompts, settings, submitter)
            _note_plan(folder, record, cells)
            _fill(folder, cells, submitter, verbose)
        finally:
            if executor is None:
                release_model()
    return load_sweep(folder)


@contextmanager
def _claimed(folder: Path, record: Mapping) -> Iterator[None]:
    """Make the folder this study's, for one sweep at a time. Raises ResultError for another's folder."""
    check_target(folder / STUDY, overwrite=True)
    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        raise ResultError(f"another sweep is at work in {folder}: wait for it, or choose another folder.") from error
    except OSError as error:
        raise ResultError(f"{folder / LOCK} cannot be locked ({error.strerror}): choose another folder.") from error
    try:
        if (folder / STUDY).exists():
            _check_same(folder, read_json(folder / STUDY), record)
        elif any(not path.name.startswith(".") for path in folder.iterdir()):
            raise ResultError(f"folder {folder} is not empty and holds no sweep: choose another folder.")
        else:
            _write_json(folder / STUDY, record)
        try:
            for leftover in folder.glob(".*.part"):  # of a killed sweep: under the lock they belong to nobody
                leftover.unlink(missing_ok=True)
            (folder / FAILURES).unlink(missing_ok=True)  # failed cells are tried again
        except OSError as error:
            raise ResultError(
                f"{error.filename} cannot be removed ({error.strerror}): it is not a sweep's, choose another folder."
            ) from error
        yield
    finally:
        lock.release()


def _check_same(folder: Path, held: Mapping, record: Mapping) -> None:
    other = held.get("study") if isinstance(held.get("study"), Mapping) else {}
    # A sweep may go on with more memory, or less.
    changed = [name for name in record["study"] if name != "memory" and other.get(name) != record["study"][name]]
    if held.get("format") != record["format"]:
        changed.append("the file format")
    if not changed and held.get("prompts") != record["prompts"]:
        changed.append("the prompts' texts")
    if changed:
        raise ResultError(
            f"folder {folder} belongs to another study (it differs in {', '.join(changed)}): choose another folder for this one."
        )


def _planned(study: Study, prompts: tuple, settings: Mapping[str, Any], submitter) -> list[Cell]:
    """All cells, model by model, so that a worker changes its model as seldom as can be. Raises what `sweep` raises."""
    texts = study.prompts
    questions = [
        Question(m, _source(m), prompts, texts.max_tokens, texts.chat, settings, study.memory) for m in study.models
    ]
    facts: dict[str, Facts] = {}
    for question, outcome in _answers(submitter, ask, questions[::-1]):  # the first model last: it is held already
        if outcome.cause is not None:
            raise ModelError(f"{question.model}: {outcome.cause}")
        facts[question.model] = outcome.value
    return [cell for question in questions for cell in cells_of(study, question, facts[question.model])]


def _source(model: str) -> str:
    """Where workers load it from: they may stand in another working directory."""
    path = os.path.expanduser(model)
    return os.path.abspath(path) if model not in REGISTRY and os.path.exists(path) else model


def _note_plan(folder: Path, record: Mapping, cells: Sequence[Cell]) -> None:
    plan = [
        {"cell": cell.name, "model": cell.model, "weights": cell.weights, "prompt": cell.prompt,
         "layers": ["forming"] if cell.layers is None else [layers_text(group) for group in cell.layers]}
        for cell in cells
    ]  # fmt: skip
    held = read_json(folder / STUDY).get("cells")
    if held is not None and held != plan:
        raise ResultError(
            f"folder {folder} was begun with other weights, another tokenizer or other functions under the same name: choose "
            "another folder."
        )
    _write_json(folder / STUDY, {**record, "cells": plan})


def _fill(folder: Path, cells: Sequence[Cell], submitter, verbose: bool) -> None:
    """Compute and write the cells that are not there, or damaged."""
    missing = [cell for cell in cells if read_cell(folder, cell.name) is None]
    failures: dict[str, str] = {}
    bar = tqdm(
        total=len(cells), initial=len(cells) - len(missing), desc="sweep", unit="cell", smoothing=0.05, disable=not verbose
    )  # fmt: skip
    with bar:
        bar.set_postfix(failed=0)
        for cell, outcome in _answers(submitter, compute, missing):
            if outcome.cause is None:
                _write_bytes(cell_path(folder, cell.name), outcome.value)
            else:
                failures[cell.name] = outcome.cause
                _write_json(folder / FAILURES, failures)
                if verbose:
                    tqdm.write(f"failed: {_described(cell)}: {outcome.cause}", file=sys.stderr)
            bar.set_postfix(failed=len(failures), refresh=False)
            bar.update()


def _described(cell: Cell) -> str:
    layers = "forming" if cell.layers is None else ", ".join(map(layers_text, cell.layers))
    return f"{cell.model}, prompt {cell.prompt}, layers {layers} (cell {cell.name[:8]})"


def _write_json(path: Path, content: Mapping) -> None:
    _write_bytes(path, json.dumps(content, indent=1).encode())


def _write_bytes(path: Path, content: bytes) -> None:
    def write(temporary: Path) -> None:
        temporary.write_bytes(content)

    write_whole(path, write, overwrite=True)
