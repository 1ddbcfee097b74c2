"""Sweeps: a study over models, prompts, layers and factors, whose cells any pool of workers can compute.

The process that called `sweep` writes the bytes that a worker answers with, whole or not at all: workers share no disk
with it, and an interrupted sweep has nothing to mend.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import multiprocessing
import os
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock
from tqdm.auto import tqdm

from sink_circuits import arguments
from sink_circuits.cells import Answer, Cell, Facts, Question, ask, cells_of, compute, release_model, shared_settings
from sink_circuits.errors import InputError, ModelError, ResultError
from sink_circuits.results import FORMAT, check_target, write_whole
from sink_circuits.studies import Study, fingerprint
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
