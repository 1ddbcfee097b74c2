"""A sweep that was stopped at any moment, or lost a worker, goes on and ends with the same bytes."""

from __future__ import annotations

import concurrent.futures
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from planted_sweep import (
    DEADLINE,
    ROOT,
    cell_files,
    contents,
    copied,
    counted,
    environment,
    finished,
    study,
    wait_for,
    write_study,
)

from sink_circuits import sweeps
from sink_circuits.studies import read_study
from sink_circuits.sweeps import WorkerPool, load_sweep, sweep


def test_what_is_there_is_not_computed_again(tmp_path, monkeypatch):
    folder = copied(tmp_path / "s")
    with counted(monkeypatch) as calls:
        result = sweep(study(), folder, verbose=False)
    assert not calls
    assert contents(folder) == contents(finished().folder)
    pd.testing.assert_frame_equal(result.table, finished().table)
    pd.testing.assert_frame_equal(load_sweep(folder).cells, finished().cells)


def test_missing_and_damaged_cells_are_computed_again(tmp_path, monkeypatch):
    folder = copied(tmp_path / "s")
    files = cell_files(folder)
    whole = [path.read_bytes() for path in files]
    files[0].unlink()
    for path, damaged in zip(files[1:], (b"", whole[2][:1000], whole[3][:-1], whole[5], b"{" * 5000), strict=True):
        path.write_bytes(damaged)
    (folder / ".cell.safetensors.abc.part").write_bytes(b"half")
    before = load_sweep(folder)
    assert list(before.cells["state"]) == ["missing"] * 6 and not len(before.table)
    with counted(monkeypatch) as calls:
        sweep(study(), folder, verbose=False)
    assert len(calls) == 6
    assert contents(folder) == contents(finished().folder)


def interrupted(folder: Path, prepare=lambda: None, moment: float | None = None) -> int:
    """Sweep in a forked process, killed at `moment` (seconds) or by what `prepare()` has arranged there; its exit code."""
    finished()  # what is shared is made before the fork
    process = multiprocessing.get_context("fork").Process(target=_sweep_in_child, args=(folder, prepare))
    process.start()
    process.join(DEADLINE if moment is None else moment)
    if moment is not None:
        process.kill()
        process.join()
    return process.exitcode


def _sweep_in_child(folder: Path, prepare) -> None:
    prepare()
    sweep(study(), folder, verbose=False)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Dying:
    """Makes the `count`-th file that a process writes into `folder` its last: killed `when` "half", "before" or "after"."""

    def __init__(self, folder: Path, count: int, when: str):
        self.folder, self.count, self.when, self.seen = folder, count, when, 0

    def __call__(self) -> None:
        whole, replace = Path.write_bytes, os.replace

        def half(path, content):
            if self.when == "half" and path.parent == self.folder and self.seen + 1 == self.count:
                whole(path, content[: len(content) // 2])
                die()
            return whole(path, content)

        def moved(source, target):
            self.seen += Path(target).parent == self.folder
            if self.when == "before" and self.seen == self.count:
                die()
            replace(source, target)
            if self.when == "after" and self.seen == self.count:
                die()

        Path.write_bytes, os.replace = half, moved


@pytest.mark.parametrize("when", ["half", "before", "after"])
def test_killed_at_any_write_it_goes_on(tmp_path, when):
    """Files are written in order: the study, the plan, then the cells; the count starts again with every run."""
    for count in (1, 2, 4):
        assert interrupted(tmp_path / "s", Dying(tmp_path / "s", count, when)) == -signal.SIGKILL
        for path in cell_files(tmp_path / "s"):
            assert path.read_bytes() == (finished().folder / path.name).read_bytes()
        if (tmp_path / "s" / sweeps.STUDY).exists():
            assert set(load_sweep(tmp_path / "s").cells["state"]) <= {"done", "missing"}
    sweep(study(), tmp_path / "s", verbose=False)
    assert contents(tmp_path / "s") == contents(finished().folder)


@pytest.mark.parametrize(("seed", "kills"), [(0, 3), pytest.param(1, 50, marks=pytest.mark.slow)])
def test_killed_at_random_moments_it_goes_on(tmp_path, seed, kills):
    draw = random.Random(f"kills/{seed}")
    started = time.monotonic()
    assert interrupted(tmp_path / "uninterrupted") == 0
    duration = time.monotonic() - started
    for _ in range(kills):
        interrupted(tmp_path / "s", moment=draw.uniform(0, duration))
    sweep(study(), tmp_path / "s", verbose=False)
    assert contents(tmp_path / "s") == contents(tmp_path / "uninterrupted") == contents(finished().folder)


@pytest.mark.slow
def test_a_process_pool_gives_the_same_bytes(tmp_path):
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(2, context) as pool:
        sweep(study(), tmp_path / "s", pool, verbose=False)
    assert contents(tmp_path / "s") == contents(finished().folder)


@pytest.mark.slow
def test_a_killed_worker_costs_its_cell_a_second_try_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    with WorkerPool(2) as pool, concurrent.futures.ThreadPoolExecutor(1) as aside:
        running = aside.submit(sweep, study(layers="all", layers_per_cell=4), tmp_path / "s", pool, verbose=False)
        wait_for(lambda: cell_files(tmp_path / "s") or running.done())
        victim = next(iter(pool._pools[0]._processes))
        os.kill(victim, signal.SIGKILL)
        result = running.result(DEADLINE)
    assert len(pool._pools) == 3  # two, and the one that took the dead one's place
    assert result.complete
    again = sweep(study(layers="all", layers_per_cell=4), tmp_path / "here", verbose=False)
    assert contents(tmp_path / "s") == contents(again.folder)


@pytest.mark.slow
def test_a_broken_pool_is_reported_for_every_cell_it_owed(tmp_path):
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, context) as pool, concurrent.futures.ThreadPoolExecutor(1) as aside:
        running = aside.submit(sweep, study(layers="all", layers_per_cell=1), tmp_path / "s", pool, verbose=False)
        wait_for(lambda: cell_files(tmp_path / "s") or running.done())
        os.kill(next(iter(pool._processes)), signal.SIGKILL)
        result = running.result(DEADLINE)
    assert set(result.cells["state"]) == {"done", "failed"}
    assert all("BrokenProcessPool" in cause for cause in result.failed["cause"])
    assert sweep(study(layers="all", layers_per_cell=1), tmp_path / "s", verbose=False).complete


def start_command(study_file: Path, folder: Path, *arguments: str) -> subprocess.Popen:
    command = [
        sys.executable,
        "-m",
        "sink_circuits.cli",
        "sweep",
        str(study_file),
        "--folder",
        str(folder),
        "--quiet",
        *arguments,
    ]
    return subprocess.Popen(
        command, env=environment(), start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("whole_group", [True, False])
def test_a_killed_command_goes_on(tmp_path, whole_group):
    """Killed with its workers, or alone: then the workers must leave by themselves."""
    study_file = write_study(tmp_path / "study.toml", layers=list(range(0, 24, 2)), layers_per_cell=1)
    draw = random.Random(f"command/{whole_group}")
    for _ in range(3 if whole_group else 1):
        process = start_command(study_file, tmp_path / "s", "--workers", "2")
        wanted = len(cell_files(tmp_path / "s")) + draw.randint(1, 6)
        wait_for(lambda wanted=wanted: len(cell_files(tmp_path / "s")) >= wanted, process)
        (os.killpg if whole_group else os.kill)(process.pid, signal.SIGKILL)
        process.wait(DEADLINE)
        wait_for(lambda process=process: _gone(process.pid))
    process = start_command(study_file, tmp_path / "s", "--workers", "2")
    assert process.wait(DEADLINE) == 0
    (tmp_path / "s" / "summary.csv").unlink()
    here = sweep(read_study(study_file), tmp_path / "here", verbose=False)
    assert contents(tmp_path / "s") == contents(here.folder)


def _gone(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.slow
def test_a_dask_cluster_that_loses_a_worker_gives_the_same_bytes(tmp_path):
    distributed = pytest.importorskip("distributed")
    address_file, processes = tmp_path / "scheduler.json", []

    def start(module: str, *arguments: str) -> subprocess.Popen:
        with open(tmp_path / f"log-{len(processes)}.txt", "w") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", f"distributed.cli.{module}", *arguments], env=environment(), cwd=tmp_path, stdout=log, stderr=log
            )  # fmt: skip
        processes.append(process)
        return process

    try:
        start(
            "dask_scheduler",
            "--host",
            "127.0.0.1",
            "--port",
            "0",
            "--no-dashboard",
            "--scheduler-file",
            str(address_file),
        )
        address = wait_for(
            lambda: (
                address_file.exists() and address_file.read_text() and json.loads(address_file.read_text())["address"]
            )
        )
        options = ("--host", "127.0.0.1", "--nthreads", "1", "--no-nanny", "--no-dashboard", "--death-timeout", "60")
        workers = [start("dask_worker", address, *options) for _ in range(2)]
        made = study(layers=list(range(0, 24, 2)), layers_per_cell=1)
        with (
            distributed.Client(address, set_as_default=False) as client,
            concurrent.futures.ThreadPoolExecutor(1) as aside,
        ):
            client.wait_for_workers(2, timeout=DEADLINE)
            running = aside.submit(sweep, made, tmp_path / "s", client, verbose=False)
            wait_for(lambda: len(cell_files(tmp_path / "s")) >= 3 or running.done())
            workers[0].kill()
            assert not running.done()
            result = running.result(DEADLINE)
        assert workers[0].wait(DEADLINE) == -signal.SIGKILL and workers[1].poll() is None
    finally:
        for process in reversed(processes):
            process.kill()
            process.wait()
    assert result.complete
    assert contents(tmp_path / "s") == contents(sweep(made, tmp_path / "here", verbose=False).folder)
