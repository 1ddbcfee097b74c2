"""The `reproduce` subcommand. Nothing heavy is imported before it runs."""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args

import tyro

from sink_circuits.command_options import Device
from sink_circuits.errors import InputError

Figure = Literal["levels", "norms_by_layer", "mlp_stages", "pca", "clustering", "score_by_lifetime", "matrix_entropy"]


@dataclass(frozen=True)
class Reproduce:
    """The published study's figures and tables, from prompts to a page of them, for one model or many.

    Example: sink-circuits reproduce gemma-3-270m smollm2-135m --prompts maths --out study

    The folder gets one subfolder for each model and index.html. What is there is not made again: the same command goes on
    where it was stopped, and one with more models adds them. Exits with 1 when a part failed.
    """

    models: Annotated[
        tuple[str, ...],
        tyro.conf.Positional,
        tyro.conf.arg(
            help="Names from `sink-circuits models`, folders, GGUF files, or Hugging Face ids org/name@revision."
        ),
    ] = ()
    prompts: str = "maths"
    """Bundled prompts of a kind (maths, prose, code, lists, dialogue, all), or a .jsonl file: AIME, MATH (`problem`), GSM8K (`question`),
    generations (`prompt`, `output`), or a `text` each; a .txt file is one prompt."""
    n_prompts: int | None = 8
    """Only the first so many prompts."""
    max_tokens: int | None = None
    """Cut every text after so many tokens."""
    chat: bool = False
    """Put every prompt into the model's chat template; sinks at the template's own tokens are left out, but for the primary."""
    wording: str | None = None
    """Words around every prompt, with {question} in its place."""
    method: Literal["robust", "official"] = "robust"
    """`official` is the published procedure, exactly, and writes its records; models of at most 20 layers have no secondary sinks by it."""
    kinds: tuple[Literal["secondary", "primary-like"], ...] = ("secondary", "primary-like")
    """Sinks that the figures show, beside the primary ones."""
    generate: int = 0
    """Each model first answers the first so many prompts itself (in place of --n-prompts), and is studied on prompt and answer."""
    max_new_tokens: int = 256
    """Tokens of an answer, at most."""
    temperature: float = 0.0
    """0 is greedy; above, answers are drawn by --seed."""
    seed: str = "generate"
    """Names the draws of sampled answers."""
    records: tuple[str, ...] = ()
    """JSON lines that the published code wrote, shown in figure 2: FILE, or NAME=FILE (files of one name make one panel)."""
    out: Path = Path("study")
    """The folder of figures, tables and index.html."""
    figures: tuple[Figure, ...] = get_args(Figure)
    """Only these figures."""
    formats: tuple[Literal["html", "svg", "pdf", "png"], ...] = ("html", "svg")
    """What figures are written as, beside their tables; all but html need the extra `static` and a browser."""
    overwrite: bool = False
    """Make everything anew in a folder of another study's settings."""
    device: Device = "cpu"
    quiet: bool = False
    """No progress bars, no lines for figures."""

    def run(self) -> int:
        if self.generate < 0:
            raise InputError(f"--generate {self.generate}: at least 0.")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise InputError(f"max_tokens = {self.max_tokens}: at least 1.")
        from sink_circuits.prompts import load_prompts
        from sink_circuits.records import read_records

        prompts = load_prompts(self.prompts, self.generate or self.n_prompts)  # told before torch is loaded
        if self.generate > len(prompts):
            raise InputError(
                f"--generate {self.generate}: {self.prompts} holds {len(prompts)} prompts, ask for no more."
            )
        if self.wording is not None:
            prompts = prompts.worded(self.wording)
        records: dict = {}
        for name, path in map(named, self.records):
            records.setdefault(name, []).extend(read_records(path))
        from sink_circuits.generation import Decoding
        from sink_circuits.reproduction import Plan, reproduce

        decoding = Decoding(self.max_new_tokens, self.temperature, seed=self.seed, chat=self.chat)
        plan = Plan(
            prompts, self.method, self.kinds, max_tokens=self.max_tokens, chat=self.chat, decoding=decoding if self.generate else None
        )  # fmt: skip
        study = reproduce(
            self.models, plan if self.models else None, self.out, records=records, figures=self.figures, formats=self.formats,
            command=shlex.join(["sink-circuits", *sys.argv[1:]]), overwrite=self.overwrite, device=self.device,
            verbose=not self.quiet,
        )  # fmt: skip
        _report(study)
        return int(bool(study.failed))


def named(option: str) -> tuple[str, str]:
    """NAME=FILE as (name, file); FILE alone is named after its folder and itself, as the published code files them by model."""
    name, equals, path = option.partition("=")
    if equals and name and path and not os.path.exists(option):
        return name, path
    file = Path(option)
    return (f"{file.parent.name}-{file.stem}" if file.parent.name else file.stem), option


def _report(study) -> None:
    """What was made, what there is none of and why, and where the page is."""
    states = [one.state for one in study.figures]
    counts = ", ".join(f"{states.count(state)} {state}" for state in ("made", "absent", "failed") if state in states)
    print(f"\nFigures: {counts or 'none'}.")
    for one in study.figures:
        if one.state != "made":
            where = ", ".join(part for part in (one.model, one.figure.replace("_", " ")) if part)
            print(f"{one.state}: {where}: {one.reason}")
    if study.index.is_file():
        print(f"Page: {study.index.resolve()}")
