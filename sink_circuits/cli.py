"""The command line: the same functions from a shell. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import importlib.util
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from sink_circuits.errors import InputError, ResultError, SinkCircuitsError
from sink_circuits.report_command import Report
from sink_circuits.reproduce_command import Reproduce
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
    skip: int = 0
    """Leave out so many prompts before those, for texts that were not looked at before."""
    max_tokens: int | None = None
    """Cut every prompt after so many tokens."""
    chat: bool = False
    """Wrap every text as a user's message in the chat template."""


def _threshold(kind: str, default: float):
    """An option that is None unless given, for `official` refuses it; its default is written where it is used."""
    return tyro.conf.arg(metavar=kind, help_behavior_hint=f"(default: {default})")


@dataclass(frozen=True)
class Criteria:
    """What counts as a sink."""

    cosine: Annotated[float | None, _threshold("FLOAT", 0.9)] = None
    """Centred cosine with the primary sink, above."""
    norm_ratio: Annotated[float | None, _threshold("FLOAT", 2.5)] = None
    """Norm over the layer's median norm, above."""
    min_lifetime: Annotated[int | None, _threshold("INT", 2)] = None
    """Layers that a sink must last."""
    bridge: Annotated[int | None, _threshold("INT", 1)] = None
    """Gaps of so many layers inside a sink's life are bridged."""
    min_queries: Annotated[int | None, _threshold("INT", 16)] = None
    """Later tokens that a score needs; with fewer it is undefined."""
    first_positions: Annotated[
        tuple[int, ...], tyro.conf.arg(help_behavior_hint="(default: 0 1 2 3; official: 0 1, with --chat 0 1 2)")
    ] = ()
    """Where the primary sink (official: the BOS sink) is looked for."""

    def given(self) -> dict[str, Any]:
        """The thresholds that were given, as `find_sinks` takes them."""
        values = {name: getattr(self, name) for name in Criteria.__dataclass_fields__}
        return {name: value for name, value in values.items() if value is not None and value != ()}


@dataclass(frozen=True)
class Selection:
    """Which of the sinks are treated."""

    kinds: tuple[Kind, ...] = ("secondary", "primary-like")
    """Which kinds of sink to treat."""
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
    memory: float | None = None
    """GiB to use beside the model's weights; what is free when not given. A text that does not fit is refused."""
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
    memory: float | None = None
    """GiB to use beside the model's weights; what is free when not given. A text that does not fit is refused."""
    quiet: bool = False
    """No progress bars."""


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
    quiet: bool = False
    """No progress bars."""

    def run(self) -> int:
        import pandas as pd

        from sink_circuits.invariants import check_invariants
        from sink_circuits.models import adapt, load_model

        model = load_model(self.model, verbose=not self.quiet)
        adapter = adapt(model)
        checks = (*adapter.checks, *check_invariants(model))
        rows = [
            {"check": check.name, "error": check.error, "limit": check.limit, "": "ok" if check.passed else "FAILED"}
            for check in checks
        ]
        print(_table(pd.DataFrame(rows)))
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
        _free(self.output.out, self.output.overwrite)
        _check_suffix(self.output.out, (".parquet", ".csv", ".jsonl"))
        _check_memory(self.output.memory)
        if self.output.out and self.output.out.suffix == ".jsonl" and self.method != "official":
            raise InputError(
                f"{self.output.out} is in the published format, which holds official detections: add --method official."
            )
        given = self.criteria.given()
        if self.method == "official":
            # The published procedure looks for the BOS sink at 0 and 1, behind a chat template at 2 too.
            given = {"first_positions": (0, 1, 2) if self.texts.chat else (0, 1)} | given
        model, tokens = _load(self.model, self.texts, given, method=self.method, verbose=not self.output.quiet)
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
            print(_table(sinks.table))
        counts = ", ".join(f"{n} {kind}" for kind, n in sinks.table["kind"].value_counts().items()) or "no sinks"
        print(
            f"\n{counts} in {len(tokens)} prompt{'s' * (len(tokens) > 1)} ({sum(len(t) for t in tokens)} tokens); "
            "scores stand beside the geometry, they never decide."
        )
        if self.output.out and self.output.out.suffix == ".jsonl":
            _write_official(model, tokens, given["first_positions"], self.output)
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
    selection: Selection = field(default_factory=Selection)
    criteria: Criteria = field(default_factory=Criteria)
    layers: tuple[int, ...] = ()
    """Only these layers; all when none are named."""
    loss: bool = False
    """Measure the next-token loss too (slower: logits are needed)."""
    output: Output = field(default_factory=Output)

    def run(self) -> None:
        from functools import partial

        def experiment(model, tokens, sinks, found, **options):
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
    selection: Selection = field(default_factory=Selection)
    criteria: Criteria = field(default_factory=Criteria)
    layers: tuple[int, ...] = ()
    """One layer or a joint set; each sink's own forming layer (found by a layer map) when none are named."""
    method: Literal["zero", "mean"] = "zero"
    """What the contribution is replaced by."""
    n_random: int = 20
    """Controls run beside it: other tokens, another layer, attention's output, and so many random perturbations; 0 for none."""
    together: bool = False
    """Edit all sinks of a prompt in one run, instead of one sink per run."""
    loss: bool = False
    """Measure the next-token loss too (slower: logits are needed)."""
    output: Output = field(default_factory=Output)

    def run(self) -> None:
        _check_beside(self)

        def experiment(model, tokens, sinks, found, **options):
            from sink_circuits import experiments

            mean = {"found": found} if self.method == "mean" else {}
            effect = experiments.ablate(
                model, tokens, sinks, intervention=self.method, together=self.together, loss=self.loss, **_layers(self.layers), **mean,
                **options,
            )  # fmt: skip
            _with_controls(self, effect, model, tokens, sinks, intervention=self.method, found=found, **options)
            return effect

        _experiment(self, experiment)


@dataclass(frozen=True)
class Dose:
    """Rescale MLP outputs at the sinks by several factors: how does the sink score answer the dose?

    Example: sink-circuits dose gemma-3-270m --layers 2 3 --factors 0 0.5 1 2
    """

    model: Model
    texts: Texts = field(default_factory=Texts)
    selection: Selection = field(default_factory=Selection)
    criteria: Criteria = field(default_factory=Criteria)
    layers: tuple[int, ...] = ()
    """One layer or a joint set; each sink's own forming layer (found by a layer map) when none are named."""
    factors: tuple[float, ...] = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)
    """Factors, finite and at least 0; 1 is the unedited model."""
    n_random: int = 4
    """Controls run beside every factor: other tokens, another layer, attention's output, and so many random perturbations; 0 for none."""
    together: bool = False
    """Edit all sinks of a prompt in one run, instead of one sink per run."""
    loss: bool = False
    """Measure the next-token loss too (slower: logits are needed)."""
    output: Output = field(default_factory=Output)

    def run(self) -> None:
        from sink_circuits.interventions import check_factor

        for factor in self.factors:
            check_factor(factor)
        if not self.factors or len(set(self.factors)) < len(self.factors):
            raise InputError(f"factors {' '.join(map(str, self.factors))}: give each once, and at least one.")
        _check_beside(self)

        def experiment(model, tokens, sinks, found, **options):
            from sink_circuits import experiments

            effect = experiments.dose_response(
                model, tokens, sinks, factors=self.factors, together=self.together, loss=self.loss, **_layers(self.layers), **options
            )  # fmt: skip
            _with_controls(
                self, effect, model, tokens, sinks, intervention="rescale", factors=self.factors, found=found, **options
            )
            return effect

        _experiment(self, experiment)


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
    quiet: bool = False
    """No progress bars."""

    def run(self) -> None:
        from sink_circuits import claims

        _free(self.out, self.overwrite)
        _check_suffix(self.out, (".safetensors",))
        claims.check_counts(self.per_prompt, self.n_random)
        declared = claims.declared_layers(self.layer, self.layers or None)
        given, selection = self.criteria.given(), Selection(self.kinds, None)
        model, tokens = _load(
            self.model, self.texts, given, selection=selection, layers=declared, verbose=not self.quiet
        )
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
        _free(self.out, self.overwrite)
        _check_suffix(self.out, (".csv",))
        from sink_circuits.calibration import calibrate

        result = calibrate(self.n_plants, self.seed, n_null=self.n_null, verbose=not self.quiet)
        print(result)
        if len(result.misses()):
            print(f"\nMisses (the name makes the plant again):\n{_table(result.misses())}")
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
    quiet: bool = False
    """No progress bars."""

    def run(self) -> None:
        from sink_circuits import arguments

        arguments.path(self.folder, "--folder")
        if self.folder.is_dir() and any(self.folder.iterdir()) and not self.overwrite:
            raise ResultError(
                f"folder {self.folder} exists and is not empty: choose another --folder, or pass --overwrite."
            )
        _free(self.folder / "report.html", overwrite=True)
        given = self.criteria.given()
        model, tokens = _load(self.model, self.texts, given, selection=self.selection, verbose=not self.quiet)
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
    except KeyboardInterrupt as stop:
        print(f"\nsink-circuits: interrupted; {str(stop) or 'files already written are whole'}.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `| head` has read enough
        sys.stderr.close()
        return 0
    return code


def _load(
    name: str, texts: Texts, thresholds: dict, *, verbose: bool, method: str = "robust", selection: Selection | None = None,
    layers: tuple[int, ...] = (),
):  # fmt: skip
    """The model and its tokens; what can be wrong with the options is told before the model's weights are read."""
    from sink_circuits.prompts import load_prompts

    if texts.max_tokens is not None and texts.max_tokens < 1:
        raise InputError(f"max_tokens = {texts.max_tokens}: at least 1.")
    prompts = load_prompts(texts.prompts, None if texts.n_prompts is None else texts.n_prompts + texts.skip)
    if not 0 <= texts.skip < len(prompts):
        raise InputError(f"skip = {texts.skip} of {len(prompts)} prompts: at least 0, and one must be left.")
    prompts = prompts[texts.skip :]
    _check_layers(layers)
    from sink_circuits import detection, models

    detection.thresholds_of(method, **thresholds)
    if selection is not None:
        from sink_circuits import demo

        demo.check_selection(selection.kinds, selection.max_sinks)
    if layers:
        _check_layers(layers, models.layers_of_config(name))
    model = models.load_model(name, verbose=verbose)
    _check_layers(layers, model.cfg.n_layers)
    return model, prompts.tokens(model, max_tokens=texts.max_tokens, chat=texts.chat)


def _check_layers(layers: tuple[int, ...], n_layers: int | None = None) -> None:
    """Raises InputError for a layer named twice or out of range; `n_layers` None: how many there are is not known yet."""
    if len(set(layers)) < len(layers):
        raise InputError(f"layers {' '.join(map(str, layers))}: name each layer once.")
    for layer in layers:
        if layer < 0 or (n_layers is not None and layer >= n_layers):
            there = "layers are counted from 0" if n_layers is None else f"the model has layers 0..{n_layers - 1}"
            raise InputError(f"layer {layer} is out of range: {there}.")


def _experiment(command, experiment):
    """Load, find, select, run, print, save: what map, ablate and dose have in common."""
    output, selection, given = command.output, command.selection, command.criteria.given()
    for target in (output.out, output.figure):
        _free(target, output.overwrite)
    _check_suffix(output.out, (".safetensors", ".csv", ".parquet"))
    _check_suffix(output.figure, (".html", ".svg", ".pdf", ".png"))
    if output.figure and output.figure.suffix != ".html" and importlib.util.find_spec("kaleido") is None:
        raise InputError(
            f"figure {output.figure} needs the package kaleido: pip install 'sink-circuits[static]', or name .html."
        )
    _check_memory(output.memory)
    model, tokens = _load(
        command.model, command.texts, given, selection=selection, layers=command.layers, verbose=not output.quiet
    )
    from sink_circuits import demo, detection

    options = {"path": output.path, "memory": output.memory, "verbose": not output.quiet}
    found = detection.find_sinks(model, tokens, **given, **options)
    sinks = demo.spread_over_prompts(found, selection.kinds, selection.max_sinks, verbose=not output.quiet)
    measured = {name: value for name, value in given.items() if name == "min_queries"}
    effect = experiment(model, tokens, sinks, found, **measured, **options)
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


def _beside(command) -> Path | None:
    """Where the controls of an experiment go: beside its own file."""
    out = command.output.out
    if out is None or not command.n_random or command.together:
        return None
    return out.with_name(f"{out.stem}.controls.safetensors")


def _check_beside(command) -> None:
    if command.n_random < 0:
        raise InputError(f"n_random = {command.n_random}: at least 0; 20 allow p <= 0.05.")
    if (beside := _beside(command)) is not None:
        _free(beside, command.output.overwrite)


def _with_controls(command, effect, model, tokens, sinks, **options) -> None:
    """The same experiment at its controls: a table, and a file beside the experiment's own."""
    if not command.n_random or command.together:
        print(
            "No controls were run: "
            + ("all sinks of a prompt were edited at once." if command.together else "n_random is 0.")
        )
        return
    from sink_circuits import controls

    layers = _layers(command.layers)
    if not command.layers:
        layers["forming"] = effect.data["first_layer"].isel(edit=0).to_series()
    controlled = controls.with_controls(model, tokens, sinks, n_random=command.n_random, **layers, **options)
    print("\nAgainst controls, in log-odds over the lifetime (difference: effect less the control's):")
    table = controlled.compare().drop(columns=["smallest_p", "n_sinks"])
    print(_table(table if table["edit"].nunique() > 1 else table.drop(columns="edit")) + "\n")
    if (beside := _beside(command)) is not None:
        controlled.save(beside, overwrite=command.output.overwrite)


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
        result = detection.official(states, first_positions)
        found.append(records.record_of(result, ids, index, n_layers=len(states)))
    records.write_records(output.out, found, overwrite=output.overwrite)


def _free(target: Path | None, overwrite: bool) -> None:
    """Raises before any long work when a result could not be written."""
    if target is not None:
        from sink_circuits.results import check_target

        check_target(target, overwrite=overwrite)


def _check_memory(memory: float | None) -> None:
    if memory is not None:
        from sink_circuits.memory import check_memory

        check_memory(memory)


def _check_suffix(target: Path | None, allowed: tuple[str, ...]) -> None:
    if target is not None and target.suffix not in allowed:
        raise InputError(f"{target} has no known ending: use one of {', '.join(allowed)}.")


if __name__ == "__main__":
    raise SystemExit(main())
