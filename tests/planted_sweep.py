"""What tests of sweeps share: a planted model in a folder, a study of it, the finished sweep, and processes that are waited for."""

from __future__ import annotations

import atexit
import functools
import json
import os
import shutil
import subprocess
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

from common import subject

from sink_circuits import cells, sweeps
from sink_circuits.studies import Study
from sink_circuits.sweeps import SweepResult, sweep

SINKS = {"a": 30, "b": 33, "none": None}  # prompt -> position of its secondary sink
LAYERS, FACTORS = [2, 6, [6, 7], 13], [0, 1, 2]
ROOT = Path(__file__).resolve().parents[1]
DEADLINE = 180  # seconds that anything waited for may take


@functools.cache
def place() -> Path:
    """A folder with the planted model in Hugging Face format (no tokenizer), and its prompts as token ids."""
    folder = Path(tempfile.mkdtemp(prefix="sink_circuits-tests-"))
    # Not when the module is left: a worker that takes tests from another may come back to it.
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    subject().hf_model.save_pretrained(folder / "planted")
    subject("stand_in").hf_model.save_pretrained(folder / "alone")
    write_tokens(folder / "ids.jsonl", SINKS)
    return folder


def write_tokens(path: Path, sinks: dict) -> None:
    lines = [{"id": name, "tokens": ids_of(name, pos).tolist()} for name, pos in sinks.items()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def ids_of(name: str, pos: int | None):
    return subject().tokens(64, () if pos is None else (pos,), (50,), name)


def study(**changed) -> Study:
    fields = {
        "models": [str(place() / "planted")], "prompts": {"tokens": str(place() / "ids.jsonl")}, "kinds": ["secondary"],
        "layers": LAYERS, "factors": FACTORS, "layers_per_cell": 2, "loss": True,
    }  # fmt: skip
    return Study(**{**fields, **changed})


@functools.cache
def finished() -> SweepResult:
    """An uninterrupted sweep in this process. Shared: copy its folder before changing anything."""
    return sweep(study(), place() / "finished", verbose=False)


def copied(to: Path) -> Path:
    shutil.copytree(finished().folder, to)
    return to


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the lock, hidden ones too."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != sweeps.LOCK}


def cell_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


@contextmanager
def counted(monkeypatch, name: str = "compute"):
    calls = []
    original = getattr(sweeps, name)
    with monkeypatch.context() as patch:
        patch.setattr(sweeps, name, lambda *args, **kwargs: calls.append(args) or original(*args, **kwargs))
        yield calls


def failing(monkeypatch, error: Exception):
    original = cells.measured

    def measured(model, one):
        if one.prompt == "b":
            raise error
        return original(model, one)

    monkeypatch.setattr(cells, "measured", measured)


def write_study(path: Path, **changed) -> Path:
    made = study(**changed).to_dict()
    lines = [
        f"{name} = {json.dumps(made[name])}"
        for name in ("models", "kinds", "layers", "factors", "layers_per_cell", "loss")
    ]
    path.write_text("\n".join([*lines, f"prompts = {{tokens = {json.dumps(made['prompts']['tokens'])}}}"]))
    return path


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def wait_for(condition, process: subprocess.Popen | None = None):
    """The first true value of `condition()`, looked at until the deadline, or until `process` has ended."""
    deadline = time.monotonic() + DEADLINE
    while time.monotonic() < deadline:
        if value := condition():
            return value
        if process is not None and process.poll() is not None:
            return condition()
        time.sleep(0.02)
    raise AssertionError("waited too long")
