"""The `report` subcommand. Nothing heavy is imported before it runs."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from sink_circuits.command_options import Device
from sink_circuits.errors import InputError


@dataclass(frozen=True)
class Report:
    """One page from saved results: question, sinks in their text, causal evidence with controls, anatomy, limits, how to run it again.

    Example: sink-circuits report demo --out report.html

    RESULTS are files that any command or `.save()` wrote (.parquet, .safetensors), or folders of them, or a sweep's folder; all of one
    model. The page needs no network. With --model the texts are shown with their sinks, and one sink is taken apart; name the prompts
    of the run then.
    """

    results: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Result files and folders."""
    out: Path = Path("report.html")
    """The page."""
    title: str = "Attention sinks and what forms them"
    """Its title."""
    model: str | None = None
    """The model of the results, loaded to show the texts and the anatomy of one sink: a name, folder, GGUF file or Hugging Face id."""
    prompts: str = "maths"
    """With --model: the prompts of the run, a bundled kind or a file; as many as the results have, unless --n-prompts says otherwise."""
    n_prompts: int | None = None
    """With --model: only the first so many prompts."""
    max_tokens: int | None = None
    """With --model: as in the run."""
    chat: bool = False
    """With --model: as in the run."""
    overwrite: bool = False
    """Replace a page that exists."""
    device: Device = "cpu"
    quiet: bool = False
    """No progress bars."""

    def run(self) -> None:
        self._check_options()
        from sink_circuits.report import read_results, render, sinks_of, write_report
        from sink_circuits.token_scores import TokenScores

        results = read_results(self.results)
        sinks = sinks_of(results)
        texts: dict = {}
        scores: dict = {}
        notes = []
        for result in (one for one in results if isinstance(one, TokenScores)):
            texts |= result.texts
            scores |= result.scores
        shown = [one for one in results if type(one).__name__ not in ("Sinks", "TokenScores")]
        if not any(type(one).__name__ == "Sinks" for one in results):
            notes.append("No table of all sinks was among the results: those shown are the ones that they treat.")
        options = {"title": self.title, "command": shlex.join(["sink-circuits", *sys.argv[1:]])}
        if self.model is not None:
            # What does not fit is told before a model is loaded.
            render(sinks=sinks, results=shown, texts=texts, scores=scores or None, notes=notes, **options)
            more = self._with_model(sinks, shown)
            texts, scores, shown, notes = texts | more[0], scores | more[1], [*shown, *more[2]], [*notes, *more[3]]
        write_report(
            self.out,
            sinks=sinks,
            results=shown,
            texts=texts,
            scores=scores or None,
            notes=notes,
            overwrite=self.overwrite,
            **options,
        )
        print(f"Report: {self.out.resolve()}")

    def _check_options(self) -> None:
        from sink_circuits.results import check_target

        if not self.results:
            raise InputError("no results were named: give the files and folders that a run wrote.")
        if self.out.suffix != ".html":
            raise InputError(f"--out {self.out}: the page is an .html file.")
        check_target(self.out, overwrite=self.overwrite)
        given = {"--n-prompts": self.n_prompts, "--max-tokens": self.max_tokens, "--chat": self.chat or None}
        if self.model is None and (useless := [name for name, value in given.items() if value is not None]):
            raise InputError(
                f"{useless[0]} says how to make the texts again, which needs their model: give --model too."
            )
        for name, value in (("--n-prompts", self.n_prompts), ("--max-tokens", self.max_tokens)):
            if value is not None and value < 1:
                raise InputError(f"{name} {value}: at least 1.")

    def _with_model(self, sinks, results) -> tuple[dict, dict, list, list[str]]:
        """Texts, scores, the anatomy of one sink and what it lacks, from the model that made the results."""
        from sink_circuits.prompts import load_prompts

        prompts = load_prompts(self.prompts, self.n_prompts or sinks.manifest.n_prompts)
        from sink_circuits.adapters import adapt
        from sink_circuits.anatomy.result import Anatomy
        from sink_circuits.anatomy_of_one import anatomy_of_one
        from sink_circuits.detection import Sinks
        from sink_circuits.effects import Effect
        from sink_circuits.models import load_model
        from sink_circuits.report.page import MAX_VIEWS
        from sink_circuits.token_scores import token_scores

        model = load_model(self.model, device=self.device, verbose=not self.quiet)
        if (own := adapt(model).weights_hash) != sinks.manifest.weights:
            raise InputError(
                f"--model {self.model} has weights {own}, the results are of {sinks.manifest.model} with weights "
                f"{sinks.manifest.weights}: name the model that made them."
            )
        tokens = prompts.tokens(model, max_tokens=self.max_tokens, chat=self.chat)
        if tokens.hash != sinks.manifest.tokens:
            raise InputError(
                f"these prompts ({self.prompts}, {len(tokens)} of them) have tokens {tokens.hash}, those of the results "
                f"{sinks.manifest.tokens}: give --prompts, --n-prompts, --max-tokens and --chat as in the run."
            )
        with_sinks = sinks.table["prompt"].drop_duplicates().tolist()[:MAX_VIEWS]
        made = token_scores(model, tokens, with_sinks)
        if any(isinstance(one, Anatomy) for one in results):
            return made.texts, made.scores, [], []
        mapped = next((one for one in results if isinstance(one, Effect) and one.kind == "layer_map"), None)
        if mapped is None:
            parts, missing = anatomy_of_one(model, tokens, sinks, verbose=not self.quiet)
        else:
            treated = Sinks(mapped.table, sinks.prompts, sinks.manifest)
            parts, missing = anatomy_of_one(model, tokens, treated, mapped.forming(), verbose=not self.quiet)
        return made.texts, made.scores, parts, missing
