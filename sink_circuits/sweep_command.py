"""The `sweep` subcommand. Nothing heavy is imported before it runs."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from sink_circuits.errors import InputError


@dataclass(frozen=True)
class Sweep:
    """Rescale MLP outputs at the sinks of many prompts and models, at every layer; stop at any time, go on later.

    Example: sink-circuits sweep study.toml --folder results/sweep --workers 2

    study.toml, in short (every key but models has a default):

        models = ["gemma-3-270m", "smollm2-135m"]
        layers = "all"             # or "forming", or numbers and joint sets: [3, [6, 7]]
        factors = [0, 0.5, 1, 2]   # 0 ablates, 1 is the clean run
        sinks_per_prompt = 2
        prompts = {source = "maths", n = 24, max_tokens = 256}

    The folder keeps one file per cell of work, the plan and the summary; the same command goes on where it was stopped,
    with the same values. Exits with 1 when a cell failed.
    """

    study: Annotated[Path, tyro.conf.Positional]
    """The study, a TOML file."""
    folder: Path = Path("sweep")
    """Results are written here; it belongs to one study."""
    workers: int = 0
    """Worker processes on this machine, each with the model in memory; 0 computes in this process."""
    scheduler: str | None = None
    """Address of a dask scheduler instead, tcp://host:8786 (needs the extra `cluster`)."""
    quiet: bool = False
    """No progress bar."""

    def run(self) -> int:
        if self.workers < 0:
            raise InputError(f"--workers {self.workers}: at least 0.")
        if self.workers and self.scheduler:
            raise InputError("--workers and --scheduler are two ways of computing: give one of them.")
        if self.scheduler is not None and not self.scheduler.strip():
            raise InputError("--scheduler is empty: give the address of a dask scheduler, tcp://host:8786.")
        from sink_circuits.studies import read_study

        study = read_study(self.study)
        study.prompts.read()  # what is wrong with the study is known before a worker is started
        from sink_circuits.sweeps import sweep

        with _executor(self.workers, self.scheduler) as executor:
            result = sweep(study, self.folder, executor, verbose=not self.quiet)
        _report(result)
        return 0 if result.complete else 1


@contextmanager
def _executor(workers: int, scheduler: str | None):
    if workers:
        from sink_circuits.sweeps import WorkerPool

        with WorkerPool(workers) as pool:
            yield pool
    elif scheduler:
        with _client(scheduler) as client:
            yield client
    else:
        yield None


def _client(address: str):
    """A dask client. Raises InputError when the extra is not installed or nothing answers."""
    try:
        from distributed import Client
    except ImportError as error:
        raise InputError("--scheduler needs dask.distributed: pip install 'sink-circuits[cluster]'.") from error
    try:
        return Client(address, timeout=20, set_as_default=False)
    except (OSError, ValueError) as error:  # a timeout is an OSError
        raise InputError(
            f"no dask scheduler answers at {address} ({error}): check the address, tcp://host:8786."
        ) from error


def _report(result) -> None:
    """The strongest layers, what failed and why, and where everything is."""
    from sink_circuits.results import write_whole

    summary = result.summary()
    path = result.folder / "summary.csv"
    write_whole(path, lambda temporary: summary.to_csv(temporary, index=False), overwrite=True)
    shown = summary[(summary["outcome"] == "log_odds") & (summary["factor"] != 1) & summary["effect"].notna()]
    if len(shown):
        strongest = (
            shown.loc[shown["effect"].abs().sort_values(ascending=False).index].groupby("model", sort=False).head(6)
        )
        print("The largest effects on the attention log-odds of the sinks (mean over prompts, 95 % interval):")
        print(strongest.drop(columns="outcome").to_string(index=False, float_format=lambda x: f"{x:.3g}"))
    cells = result.cells
    counts = ", ".join(f"{(cells['state'] == state).sum()} {state}" for state in ("done", "failed"))
    empty = cells.loc[(cells["state"] == "done") & (cells["n_sinks"] == 0), ["model", "prompt"]].drop_duplicates()
    print(
        f"\n{len(cells)} cells: {counts}. {len(empty)} prompts without such sinks. {path} and one file per cell are in {result.folder}."
    )
    failed = result.failed
    for cause, group in failed.groupby("cause", sort=False):
        where = [f"{row.model}, prompt {row.prompt}, layers {row.layers}" for row in group.itertuples()]
        more = f" and {len(where) - 3} more" if len(where) > 3 else ""
        print(f"failed: {'; '.join(where[:3])}{more}: {cause}")
    if len(failed):
        print("The same command tries the failed cells again.")
