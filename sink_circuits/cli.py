"""The command line: the same functions from a shell. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from sink_circuits.errors import InputError, ResultError, SinkCircuitsError
from sink_circuits.sweep_command import Sweep

Kind = Literal["primary", "secondary", "primary-like"]
Model = Annotated[
    str,
    tyro.conf.Positional,
    tyro.conf.arg(
        help="A name from `sink-circuits models`, a folder, a GGUF file, or a Hugging Face id org/name@revision."
    ),
]


@dataclass(frozen=True)
class Texts:
    """Which texts, as the model's own tokenizer cuts them."""

    prompts: str = "maths"
    """Bundled prompts of a kind (maths, prose, code, lists, dialogue, all), a .jsonl file with a `text` each, or a .txt file."""
    n_prompts: int | None = 4
    """Only the first so many prompts."""
    max_tokens: int | None = None
    """Cut every prompt after so many tokens."""
    chat: bool = False
    """Wrap every text as a user's message in the chat template."""


@dataclass(frozen=True)
class Finding:
    """What counts as a sink."""

    kinds: tuple[Kind, ...] = ("secondary", "primary-like")
    """Which kinds of sink to treat."""
    cosine: float = 0.9
    """Centred cosine with the primary sink, above."""
    norm_ratio: float = 2.5
    """Norm over the layer's median norm, above."""
    max_sinks: int | None = 8
    """Treat only the first so many sinks of all prompts; what is left out is said."""


@dataclass(frozen=True)
class Output:
    """Where results go."""

    out: Path | None = None
    """Write the result here (.safetensors; tables .parquet or .csv); without it only the summary is printed."""
    figure: Path | None = None
    """Write the figure here (.html, or .svg, .pdf, .png)."""
    overwrite: bool = False
    """Replace files that exist."""
    path: Literal["auto", "fast", "reference"] = "auto"
    """Execution path: `reference` goes through TransformerLens' hooks alone."""
    quiet: bool = False
    """No progress bars."""


@dataclass(frozen=True)
class Table:
    """Where the table goes."""

    out: Path | None = None
    """Write the sinks here: .parquet, .csv, or (official) .jsonl in the published format."""
    overwrite: bool = False
    """Replace a file that exists."""
    path: Literal["auto", "fast", "reference"] = "auto"
    """Execution path: `reference` goes through TransformerLens' hooks alone."""
    quiet: bool = False
    """No progress bars."""


@dataclass(frozen=True)
class Models:
    """List the models whose weights ship inside Python packages, with their licences and whether they are cached."""

    def run(self) -> None:
        from sink_circuits import weights

        for name, model in sorted(weights.REGISTRY.items()):
            folder = weights.cache_root() / "models" / model.gguf_sha256[:16]
            state = "cached" if weights.is_complete(folder, model.gguf_sha256) else "will be fetched on first use"
            print(f"{name:16} {model.licence:28} {state}")
            if model.notice:
                print(f"{'':16} {model.notice}")
        print(
            "\nAlso: a folder in Hugging Face format, a GGUF file, or a Hugging Face id org/name@revision while online."
        )


@dataclass(frozen=True)
class Detect:
    """Find the attention sinks in texts: which tokens, from which layer to which, and the evidence.

    Example: sink-circuits detect gemma-3-270m --prompts maths --n-prompts 3
    """

    model: Model
    texts: Texts = field(default_factory=Texts)
    method: Literal["robust", "official"] = "robust"
    """`official` is the published procedure, exactly; with --out x.jsonl it writes the published format."""
    cosine: float = 0.9
    """Centred cosine with the primary sink, above (robust)."""
    norm_ratio: float = 2.5
    """Norm over the layer's median norm, above (robust)."""
    output: Table = field(default_factory=Table)

    def run(self) -> None:
        _free(self.output.out, self.output.overwrite)
        _check_suffix(self.output.out, (".parquet", ".csv", ".jsonl"))
        if self.output.out and self.output.out.suffix == ".jsonl" and self.method != "official":
            raise InputError(
                f"{self.output.out} is in the published format, which holds official detections: add --method official."
            )
        model, tokens = _load(self.model, self.texts, self.output)
        from sink_circuits import detection

        # The published procedure looks for the BOS sink at 0 and 1, behind a chat template at 2 too.
        first = ((0, 1, 2) if self.texts.chat else (0, 1)) if self.method == "official" else None
        sinks = detection.find_sinks(
            model, tokens, method=self.method, cosine=self.cosine, norm_ratio=self.norm_ratio, first_positions=first,
            path=self.output.path, verbose=not self.output.quiet,
        )  # fmt: skip
        print(_table(sinks.table))
        counts = ", ".join(f"{n} {kind}" for kind, n in sinks.table["kind"].value_counts().items()) or "no sinks"
        print(
            f"\n{counts} in {len(tokens)} prompts ({sum(len(t) for t in tokens)} tokens); "
            "scores stand beside the geometry, they never decide."
        )
        if self.output.out and self.output.out.suffix == ".jsonl":
            _write_official(model, tokens, first, self.output)
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
class Map:
    """Which MLPs form the sinks? Zero one MLP's output at one sink at a time, at every layer, and measure what falls.

    Example: sink-circuits map gemma-3-270m --n-prompts 2 --figure map.html
    """

    model: Model
    texts: Texts = field(default_factory=Texts)
    finding: Finding = field(default_factory=Finding)
    layers: tuple[int, ...] = ()
    """Only these layers; all when none are named."""
    loss: bool = False
    """Measure the next-token loss too (slower: logits are needed)."""
    output: Output = field(default_factory=Output)

    def run(self) -> None:
        from functools import partial

        def experiment(model, tokens, sinks, **options):
            from sink_circuits import experiments

            return experiments.layer_map(model, tokens, sinks, layers=self.layers or None, **options)

        effect = _experiment(self, partial(experiment, loss=self.loss))
        forming = effect.table.assign(forming=effect.forming())[
            ["prompt", "pos", "token", "kind", "l_start", "l_end", "forming"]
        ]
        print(
            "\nThe layer whose removal lowers each sink's log-odds most "
            "(one that another can stand in for is found only by joint edits):"
        )
        print(_table(forming))


@dataclass(frozen=True)
class Ablate:
    """Take MLP outputs away at the sinks (zero, or the mean over ordinary tokens) and measure the sink scores above.

    Example: sink-circuits ablate smollm2-135m --layers 2 --loss
    """

    model: Model
    texts: Texts = field(default_factory=Texts)
    finding: Finding = field(default_factory=Finding)
    layers: tuple[int, ...] = ()
    """One layer or a joint set; each sink's own forming layer (found by a layer map) when none are named."""
    method: Literal["zero", "mean"] = "zero"
    """What the contribution is replaced by."""
    together: bool = False
    """Edit all sinks of a prompt in one run, instead of one sink per run."""
    loss: bool = False
    """Measure the next-token loss too (slower: logits are needed)."""
    output: Output = field(default_factory=Output)

    def run(self) -> None:
        def experiment(model, tokens, sinks, **options):
            from sink_circuits import experiments

            return experiments.ablate(
                model, tokens, sinks, method=self.method, together=self.together, loss=self.loss, **_layers(self.layers), **options
            )  # fmt: skip

        _experiment(self, experiment)


@dataclass(frozen=True)
class Dose:
    """Rescale MLP outputs at the sinks by several factors: how does the sink score answer the dose?

    Example: sink-circuits dose gemma-3-270m --layers 2 3 --factors 0 0.5 1 2
    """

    model: Model
    texts: Texts = field(default_factory=Texts)
    finding: Finding = field(default_factory=Finding)
    layers: tuple[int, ...] = ()
    """One layer or a joint set; each sink's own forming layer (found by a layer map) when none are named."""
    factors: tuple[float, ...] = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)
    """Factors, finite and at least 0; 1 is the unedited model."""
    together: bool = False
    """Edit all sinks of a prompt in one run, instead of one sink per run."""
    loss: bool = False
    """Measure the next-token loss too (slower: logits are needed)."""
    output: Output = field(default_factory=Output)

    def run(self) -> None:
        from sink_circuits.interventions import check_factor

        for factor in self.factors:
            check_factor(factor)

        def experiment(model, tokens, sinks, **options):
            from sink_circuits import experiments

            return experiments.dose_response(
                model, tokens, sinks, factors=self.factors, together=self.together, loss=self.loss, **_layers(self.layers), **options
            )  # fmt: skip

        _experiment(self, experiment)


@dataclass(frozen=True)
class Demo:
    """The main job, start to end: find sinks, map and dose the MLPs that form them, and write a report that opens offline.

    Example: sink-circuits demo --folder results/demo
    """

    model: Annotated[str, tyro.conf.Positional] = "gemma-3-270m"
    texts: Texts = field(default_factory=lambda: Texts(n_prompts=6))
    finding: Finding = field(default_factory=lambda: Finding(max_sinks=10))
    folder: Path = Path("demo")
    """Results and report.html are written here."""
    overwrite: bool = False
    """Replace results that exist in the folder."""
    quiet: bool = False
    """No progress bars."""

    def run(self) -> None:
        from sink_circuits import demo

        if self.folder.is_dir() and any(self.folder.iterdir()) and not self.overwrite:
            raise ResultError(
                f"folder {self.folder} exists and is not empty: choose another --folder, or pass --overwrite."
            )
        _free(self.folder / "report.html", overwrite=True)
        model, tokens = _load(self.model, self.texts, Output(quiet=self.quiet))
        report = demo.run(
            model, tokens, folder=self.folder, kinds=self.finding.kinds, max_sinks=self.finding.max_sinks, cosine=self.finding.cosine,
            norm_ratio=self.finding.norm_ratio, command=shlex.join(["sink-circuits", *sys.argv[1:]]), verbose=not self.quiet,
        )  # fmt: skip
        print(f"\nReport: {report.resolve()}")


COMMANDS: dict[str, Callable] = {
    "models": Models,
    "detect": Detect,
    "map": Map,
    "ablate": Ablate,
    "dose": Dose,
    "sweep": Sweep,
    "demo": Demo,
}
DESCRIPTION = """Find attention sinks in language models, and prove by intervention which MLPs form them.

Start with `sink-circuits demo`; then `detect` on a text of your own, `map` to see which MLPs matter, `ablate` and `dose` to prove it."""


def main(args: list[str] | None = None) -> int:
    """Entry point; returns the exit code: 0, 1 when a part failed, 2 for what the user can mend, 130 when interrupted."""
    try:
        command = tyro.extras.subcommand_cli_from_dict(
            COMMANDS, prog="sink-circuits", description=DESCRIPTION, args=args,
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
        )  # fmt: skip
        code = command.run() or 0
    except SinkCircuitsError as error:
        print(f"sink-circuits: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nsink-circuits: interrupted; files already written are whole.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `| head` has read enough
        sys.stderr.close()
        return 0
    return code


def _load(name: str, texts: Texts, output: Output | Table):
    """The model and its tokens; the prompts are read first, so that a bad file is known before a long load."""
    from sink_circuits.prompts import load_prompts

    if texts.max_tokens is not None and texts.max_tokens < 1:
        raise InputError(f"max_tokens = {texts.max_tokens}: at least 1.")
    prompts = load_prompts(texts.prompts, texts.n_prompts)
    from sink_circuits.models import load_model

    model = load_model(name, verbose=not output.quiet)
    return model, prompts.tokens(model, max_tokens=texts.max_tokens, chat=texts.chat)


def _experiment(command, experiment):
    """Load, find, select, run, print, save: what map, ablate and dose have in common."""
    output, finding = command.output, command.finding
    for target in (output.out, output.figure):
        _free(target, output.overwrite)
    _check_suffix(output.out, (".safetensors", ".csv", ".parquet"))
    _check_suffix(output.figure, (".html", ".svg", ".pdf", ".png"))
    if finding.max_sinks is not None and finding.max_sinks < 1:
        raise InputError(f"max_sinks = {finding.max_sinks}: at least 1.")
    model, tokens = _load(command.model, command.texts, output)
    from sink_circuits import demo

    sinks = demo.select_sinks(
        model,
        tokens,
        finding.kinds,
        finding.max_sinks,
        cosine=finding.cosine,
        norm_ratio=finding.norm_ratio,
        path=output.path,
        verbose=not output.quiet,
    )
    effect = experiment(model, tokens, sinks, path=output.path, verbose=not output.quiet)
    print(_table(effect.summary()))
    if output.out is not None and output.out.suffix == ".safetensors":
        effect.save(output.out, overwrite=output.overwrite)
    elif output.out is not None:
        from sink_circuits.results import write_whole

        frame = effect.to_dataframe()
        writer = (
            frame.to_parquet
            if output.out.suffix == ".parquet"
            else lambda temporary: frame.to_csv(temporary, index=False)
        )
        write_whole(output.out, writer, overwrite=output.overwrite)
    if output.figure is not None:
        from sink_circuits import figures

        figures.save_figure(effect.plot("log_odds"), output.figure, overwrite=output.overwrite)
    return effect


def _layers(layers: tuple[int, ...]) -> dict:
    return {"layers": layers} if layers else {"layer": "forming"}


def _table(frame) -> str:
    return frame.to_string(
        index=False, float_format=lambda x: f"{x:.3g}", formatters={"token": ascii_token} if "token" in frame else None
    )


def ascii_token(token: str) -> str:
    """A token in quotes, with control and other unprintable characters escaped: a terminal shows it as data."""
    return repr(token)


def _write_official(model, tokens, first_positions, output: Table) -> None:
    from sink_circuits import detection, records
    from sink_circuits.runs import run_clean

    found = []
    for index, ids in enumerate(tokens):
        states = detection.official_hidden_states(model, run_clean(model, ids, resumable=False))
        found.append(records.record_of(detection.official(states, first_positions), ids, index))
    records.write_records(output.out, found, overwrite=output.overwrite)


def _free(target: Path | None, overwrite: bool) -> None:
    """Raises before any long work when a result could not be written."""
    if target is not None:
        from sink_circuits.results import check_target

        check_target(target, overwrite=overwrite)


def _check_suffix(target: Path | None, allowed: tuple[str, ...]) -> None:
    if target is not None and target.suffix not in allowed:
        raise InputError(f"{target} has no known ending: use one of {', '.join(allowed)}.")


if __name__ == "__main__":
    raise SystemExit(main())
