"""The command line: the same functions from a shell. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from sink_circuits.command_options import (
    Criteria,
    Device,
    Kind,
    Model,
    Selection,
    Table,
    Texts,
    as_table,
    check_budget,
    check_free,
    check_suffix,
    load_texts,
    prompts_of,
)
from sink_circuits.errors import InputError, ResultError, SinkCircuitsError
from sink_circuits.experiment_commands import Ablate, Dose, Map
from sink_circuits.report_command import Report
from sink_circuits.reproduce_command import Reproduce
from sink_circuits.sweep_command import Sweep


@dataclass(frozen=True)
class Models:
    """List the models whose weights ship inside Python packages, with their licences and whether they are cached."""

    def run(self) -> None:
        from sink_circuits import weights

        for name, model in sorted(weights.REGISTRY.items()):
            cached = weights.is_complete(weights.cached_folder(name), model.gguf_sha256)
            state = "cached" if cached else "will be fetched on first use"
            print(f"{name:16} {model.licence:28} {state}")
            if model.notice:
                print(f"{'':16} {model.notice}")
        print(
            "\nAlso: a folder in Hugging Face format, a GGUF file, or a Hugging Face id org/name@revision while online."
        )


@dataclass(frozen=True)
class Check:
    """Check a model of your own: the invariants that every measurement here rests on, and which execution path serves it.

    Example: sink-circuits check path/to/model.gguf
    """

    model: Model
    device: Device = "cpu"
    quiet: bool = False
    """No progress bars."""

    def run(self) -> int:
        import pandas as pd

        from sink_circuits.adapters import adapt
        from sink_circuits.invariants import check_invariants
        from sink_circuits.models import load_model

        model = load_model(self.model, device=self.device, verbose=not self.quiet)
        adapter = adapt(model)
        checks = (*adapter.checks, *check_invariants(model))
        rows = [
            {"check": check.name, "error": check.error, "limit": check.limit, "": "ok" if check.passed else "FAILED"}
            for check in checks
        ]
        print(as_table(pd.DataFrame(rows)))
        windows = sorted({window for window in adapter.windows if window is not None})
        print(
            f"\n{adapter.name}: {adapter.n_layers} layers, {adapter.n_heads} heads, {adapter.cfg.dtype}, weights {adapter.weights_hash}"
            + (f", sliding windows of {', '.join(map(str, windows))}" if windows else "")
        )
        if adapter.processed:
            print(f"The weights were processed: {', '.join(adapter.processed)}.")
        print(f"Execution path: {f'reference only ({adapter.twin_refusal})' if adapter.twin is None else 'fast'}.")
        failed = [
            check for check in checks if not check.passed and not (adapter.twin is None and "fast path" in check.name)
        ]
        for check in failed:
            print(f"{check.name}: {check.remedy}", file=sys.stderr)
        return int(bool(failed))


@dataclass(frozen=True)
class Detect:
    """Find the attention sinks in texts: which tokens, from which layer to which, and the evidence.

    Example: sink-circuits detect gemma-3-270m --prompts maths --n-prompts 3
    """

    model: Model
    texts: Texts = field(default_factory=Texts)
    method: Literal["robust", "official"] = "robust"
    """`official` is the published procedure, exactly, with its own criteria; with --out x.jsonl it writes the published format."""
    criteria: Criteria = field(default_factory=Criteria)
    output: Table = field(default_factory=Table)

    def run(self) -> None:
        check_free(self.output.out, self.output.overwrite)
        check_suffix(self.output.out, (".parquet", ".csv", ".jsonl"))
        check_budget(self.output.memory)
        if self.output.out and self.output.out.suffix == ".jsonl" and self.method != "official":
            raise InputError(
                f"{self.output.out} is in the published format, which holds official detections: add --method official."
            )
        given = self.criteria.given()
        if self.method == "official":
            # The published procedure looks for the BOS sink at 0 and 1, behind a chat template at 2 too.
            given = {"first_positions": (0, 1, 2) if self.texts.chat else (0, 1)} | given
        model, tokens = load_texts(
            self.model, self.texts, given, method=self.method, device=self.output.device, verbose=not self.output.quiet
        )
        from sink_circuits import detection

        sinks = detection.find_sinks(
            model,
            tokens,
            method=self.method,
            path=self.output.path,
            memory=self.output.memory,
            verbose=not self.output.quiet,
            **given,
        )
        if len(sinks):
            print(as_table(sinks.table))
        counts = ", ".join(f"{n} {kind}" for kind, n in sinks.table["kind"].value_counts().items()) or "no sinks"
        print(
            f"\n{counts} in {len(tokens)} prompt{'s' * (len(tokens) > 1)} ({sum(len(t) for t in tokens)} tokens); "
            "scores stand beside the geometry, they never decide."
        )
        if self.output.out and self.output.out.suffix == ".jsonl":
            _write_official(model, tokens, self.texts, given["first_positions"], self.output)
        elif self.output.out and self.output.out.suffix == ".csv":
            from sink_circuits.results import write_whole

            write_whole(
                self.output.out,
                lambda temporary: sinks.table.to_csv(temporary, index=False),
                overwrite=self.output.overwrite,
            )
        elif self.output.out:
            sinks.save(self.output.out, overwrite=self.output.overwrite)


@dataclass(frozen=True)
class Claims:
    """Put the five claims about secondary sinks to the test: supported, contradicted or not decided, by a rule fixed beforehand.

    The rule is in docs/claims.md. Example: sink-circuits claims gemma-3-270m --n-prompts 24 --out claims.safetensors
    """

    model: Model
    texts: Texts = field(default_factory=lambda: Texts(n_prompts=24))
    kinds: tuple[Kind, ...] = ("secondary", "primary-like")
    """Which kinds of sink to treat."""
    criteria: Criteria = field(default_factory=Criteria)
    per_prompt: int = 2
    """Sinks treated per prompt, those of the largest norm ratio; the prompt is the unit."""
    n_random: int = 8
    """Random directions and perturbations per sink."""
    layer: int | None = None
    """The forming layer put to the test, declared before these texts were looked at; found on a third of them when not given."""
    layers: tuple[int, ...] = ()
    """The declared forming set (claim 1, sufficient); the declared layer alone when not given."""
    out: Path | None = None
    """Write everything measured here (.safetensors)."""
    overwrite: bool = False
    """Replace a file that exists."""
    path: Literal["auto", "fast", "reference"] = "auto"
    """Execution path: `reference` goes through TransformerLens' hooks alone."""
    device: Device = "cpu"
    quiet: bool = False
    """No progress bars."""

    def run(self) -> None:
        from sink_circuits import claims

        check_free(self.out, self.overwrite)
        check_suffix(self.out, (".safetensors",))
        claims.check_counts(self.per_prompt, self.n_random)
        declared = claims.declared_layers(self.layer, self.layers or None)
        given, selection = self.criteria.given(), Selection(self.kinds, None)
        model, tokens = load_texts(
            self.model, self.texts, given, selection=selection, layers=declared, device=self.device, verbose=not self.quiet
        )  # fmt: skip
        from sink_circuits.detection import find_sinks

        found = find_sinks(model, tokens, path=self.path, verbose=not self.quiet, **given)
        result = claims.test_claims(
            model, tokens, found, kinds=self.kinds, layer=self.layer, layers=self.layers or None, n_random=self.n_random,
            per_prompt=self.per_prompt, path=self.path, verbose=not self.quiet,
        )  # fmt: skip
        print(result)
        if self.out is not None:
            result.save(self.out, overwrite=self.overwrite)


@dataclass(frozen=True)
class Calibrate:
    """Hold every instrument to random planted circuits, whose truth is known, and to models without any.

    Example: sink-circuits calibrate --n-plants 30
    """

    n_plants: int = 30
    """Random plants; variants of architecture take turns."""
    n_null: int | None = None
    """Models without a circuit; as many as plants when not given."""
    seed: int = 0
    """Names the plants: another seed, other plants."""
    out: Path | None = None
    """Write the table by variant here (.csv)."""
    overwrite: bool = False
    """Replace a file that exists."""
    quiet: bool = False
    """No progress bars."""

    def run(self) -> int:
        check_free(self.out, self.overwrite)
        check_suffix(self.out, (".csv",))
        from sink_circuits.calibration import calibrate

        result = calibrate(self.n_plants, self.seed, n_null=self.n_null, verbose=not self.quiet)
        print(result)
        if len(result.misses()):
            print(f"\nMisses (the name makes the plant again):\n{as_table(result.misses())}")
        if self.out is not None:
            from sink_circuits.results import write_whole

            frame = result.to_dataframe()
            write_whole(self.out, lambda temporary: frame.to_csv(temporary, index=False), overwrite=self.overwrite)
        return int(not result.holds)


@dataclass(frozen=True)
class Demo:
    """The main job, start to end: find sinks, map and dose the MLPs that form them, and write a report that opens offline.

    Example: sink-circuits demo --folder results/demo
    """

    model: Annotated[str, tyro.conf.Positional] = "gemma-3-270m"
    texts: Texts = field(default_factory=lambda: Texts(n_prompts=6))
    selection: Selection = field(default_factory=lambda: Selection(max_sinks=10))
    criteria: Criteria = field(default_factory=Criteria)
    folder: Path = Path("demo")
    """Results and report.html are written here."""
    overwrite: bool = False
    """Replace results that exist in the folder."""
    device: Device = "cpu"
    quiet: bool = False
    """No progress bars."""

    def run(self) -> None:
        from sink_circuits import arguments

        arguments.path(self.folder, "--folder")
        if self.folder.is_dir() and any(self.folder.iterdir()) and not self.overwrite:
            raise ResultError(
                f"folder {self.folder} exists and is not empty: choose another --folder, or pass --overwrite."
            )
        check_free(self.folder / "report.html", overwrite=True)
        given = self.criteria.given()
        model, tokens = load_texts(
            self.model, self.texts, given, selection=self.selection, device=self.device, verbose=not self.quiet
        )
        from sink_circuits import demo

        report = demo.run(
            model, tokens, folder=self.folder, kinds=self.selection.kinds, max_sinks=self.selection.max_sinks,
            command=shlex.join(["sink-circuits", *sys.argv[1:]]), verbose=not self.quiet, **given,
        )  # fmt: skip
        print(f"\nReport: {report.resolve()}")


COMMANDS: dict[str, Callable] = {
    "models": Models,
    "check": Check,
    "detect": Detect,
    "map": Map,
    "ablate": Ablate,
    "dose": Dose,
    "claims": Claims,
    "calibrate": Calibrate,
    "sweep": Sweep,
    "report": Report,
    "reproduce": Reproduce,
    "demo": Demo,
}
DESCRIPTION = """Find attention sinks in language models, and prove by intervention which MLPs form them.

Start with `sink-circuits demo`; then `detect` on a text of your own, `map` to see which MLPs matter, `ablate` and `dose` to prove it,
`claims` for verdicts."""


class Listener:
    """A stream for what is said while the work goes on: one that closes, or is full, costs the words and not the results."""

    def __init__(self, stream):
        self.stream, self.error = stream, None
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # for tokens that the terminal cannot show

    def write(self, text: str) -> int:
        self._tried(lambda: self.stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._tried(self.stream.flush)

    def _tried(self, work: Callable) -> None:
        if self.error is None:
            try:
                work()
            except OSError as error:
                self.error = error
                with contextlib.suppress(OSError, ValueError):  # what it still holds goes nowhere when Python ends
                    os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


def main(args: list[str] | None = None) -> int:
    """Entry point; returns the exit code: 0, 1 when a part failed, 2 for what the user can mend, 130 when interrupted."""
    with contextlib.redirect_stdout(Listener(sys.stdout)) as said:
        try:
            code = _run(args)
        finally:  # --help leaves by SystemExit
            said.flush()
    if said.error is not None and not isinstance(said.error, BrokenPipeError):  # `| head` has read enough
        print(
            f"sink-circuits: standard output cannot be written ({said.error.strerror}); files are not touched by that.",
            file=sys.stderr,
        )
        return code or 1
    return code


def _run(args: list[str] | None) -> int:
    try:
        command = tyro.extras.subcommand_cli_from_dict(
            COMMANDS, prog="sink-circuits", description=DESCRIPTION, args=args,
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
        )  # fmt: skip
        return command.run() or 0
    except SinkCircuitsError as error:
        print(f"sink-circuits: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"\nsink-circuits: interrupted; {str(stop) or 'files already written are whole'}.", file=sys.stderr)
        return 130
    except OSError as error:  # a folder that may not be entered, a disk that is full
        print(
            f"sink-circuits: {error.filename or 'a file'} cannot be read or written ({error.strerror or error}).",
            file=sys.stderr,
        )
        return 2


def _write_official(model, tokens, texts: Texts, first_positions, output: Table) -> None:
    """Records as the published code writes them: numbered in the prompts' own source, response apart from prompt."""
    from sink_circuits import detection, records
    from sink_circuits.clean_runs import run_clean

    found, lengths = [], prompts_of(texts).prompt_lengths(model)
    for index, ids in enumerate(tokens):
        states = detection.official_hidden_states(model, run_clean(model, ids, resumable=False))
        result = detection.official(states, first_positions)
        prompt_len = min(lengths[index], len(ids))
        found.append(records.record_of(result, ids, texts.skip + index, n_layers=len(states), prompt_len=prompt_len))
    records.write_records(output.out, found, overwrite=output.overwrite)


if __name__ == "__main__":
    raise SystemExit(main())
