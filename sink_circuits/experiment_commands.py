"""The `map`, `ablate` and `dose` subcommands. Nothing heavy is imported before they run."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from sink_circuits.command_options import (
    Criteria,
    Model,
    Output,
    Selection,
    Texts,
    as_table,
    check_budget,
    check_free,
    check_suffix,
    load_texts,
)
from sink_circuits.errors import InputError


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
        print(as_table(forming))


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


def _experiment(command, experiment):
    """Load, find, select, run, print, save: what map, ablate and dose have in common."""
    output, selection, given = command.output, command.selection, command.criteria.given()
    for target in (output.out, output.figure):
        check_free(target, output.overwrite)
    check_suffix(output.out, (".safetensors", ".csv", ".parquet"))
    check_suffix(output.figure, (".html", ".svg", ".pdf", ".png"))
    if output.figure and output.figure.suffix != ".html" and importlib.util.find_spec("kaleido") is None:
        raise InputError(
            f"figure {output.figure} needs the package kaleido: pip install 'sink-circuits[static]', or name .html."
        )
    check_budget(output.memory)
    model, tokens = load_texts(
        command.model, command.texts, given, selection=selection, layers=command.layers, device=output.device,
        verbose=not output.quiet,
    )  # fmt: skip
    from sink_circuits import demo, detection

    options = {"path": output.path, "memory": output.memory, "verbose": not output.quiet}
    found = detection.find_sinks(model, tokens, **given, **options)
    sinks = demo.spread_over_prompts(found, selection.kinds, selection.max_sinks, verbose=not output.quiet)
    measured = {name: value for name, value in given.items() if name == "min_queries"}
    effect = experiment(model, tokens, sinks, found, **measured, **options)
    print(as_table(effect.summary()))
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
        check_free(beside, command.output.overwrite)


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
    print(as_table(table if table["edit"].nunique() > 1 else table.drop(columns="edit")) + "\n")
    if (beside := _beside(command)) is not None:
        controlled.save(beside, overwrite=command.output.overwrite)


def _layers(layers: tuple[int, ...]) -> dict:
    return {"layers": layers} if layers else {"layer": "forming"}
