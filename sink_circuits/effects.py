"""Effects: what an experiment returns, clean and edited outcomes on named axes, and what two experiments say together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import xarray as xr

from sink_circuits import arguments, statistics
from sink_circuits.arguments import shown
from sink_circuits.errors import InputError, ResultError
from sink_circuits.outcomes import CHECKS, in_order
from sink_circuits.results import Manifest, read_dataset, write_result

_AXES = ("sink", "edit", "layer", "head")


@dataclass(frozen=True)
class Effect:
    """Clean and edited outcomes of one experiment.

    `data` (xarray): for each outcome the clean value `clean_<outcome>` [sink, ...] and the edited one `<outcome>`
    [sink, edit, ...], with the axes layer and head that the outcome has: built-in ones are listed in
    `outcomes.BUILT_IN`, a user's own stand beside them. So do the manipulation checks `norm` and `cosine` (with the clean
    primary, raw) of the treated position's resid_post [sink, edit, layer]. Attention in layers at or below the first
    edited one is exactly the clean one. `first_layer`, `last_edited` [sink, edit]: the outermost edited layers. `table`:
    one row per sink.
    """

    kind: str
    data: xr.Dataset
    table: pd.DataFrame
    manifest: Manifest

    @property
    def outcomes(self) -> tuple[str, ...]:
        """What was measured, manipulation checks aside: built-in outcomes as listed, then a user's own by name."""
        return tuple(name for name in self._measured() if name not in CHECKS)

    def _measured(self) -> list[str]:
        names = [str(name) for name in self.data.data_vars]
        return in_order(name.removeprefix("clean_") for name in names if name.startswith("clean_"))

    def effect(self, outcome: str = "score") -> xr.DataArray:
        """Edited minus clean, [sink, edit] and the outcome's own axes. Raises InputError for an unknown outcome."""
        if not isinstance(outcome, str) or f"clean_{outcome}" not in self.data:
            raise InputError(f"outcome {shown(outcome)} was not measured: there are {', '.join(self._measured())}.")
        return self.data[outcome] - self.data[f"clean_{outcome}"]

    def reading(self) -> xr.DataArray:
        """Which layers read the sink and lie above the edit: l_start+1..l_end+1 and > first edited layer; [sink, edit, layer]."""
        layer = self.data["layer"]
        start = xr.DataArray(self.table["l_start"].to_numpy(), dims="sink")
        end = xr.DataArray(self.table["l_end"].to_numpy(), dims="sink")
        return (layer > start) & (layer <= end + 1) & (layer > self.data["first_layer"])

    def over_lifetime(self, outcome: str = "score", what: str = "effect") -> xr.DataArray:
        """Mean over heads and over the layers that read the sink above the edit, [sink, edit]; NaN where there are none.

        An outcome without heads or layers is not averaged over them. `what`: "effect", "edited" or "clean".
        """
        difference = self.effect(outcome)
        values = {
            "effect": difference,
            "edited": self.data[outcome],
            "clean": self.data[f"clean_{outcome}"].broadcast_like(difference),
        }
        arguments.one_of(what, "what", values, "use 'effect', 'edited' or 'clean'")
        if outcome in CHECKS:
            raise InputError(f"{outcome!r} is a manipulation check, no outcome: read effect.data[{outcome!r}].")
        return _lifetime_mean(values[what], self.reading())

    def by_sink(self, outcome: str = "log_odds", what: str = "effect") -> pd.DataFrame:
        """One row per sink, one column per edit: `over_lifetime` beside prompt, pos, token and kind."""
        values = self.over_lifetime(outcome, what).transpose("sink", "edit").to_numpy()
        columns = pd.DataFrame(values, index=self.table.index, columns=self.data["edit"].values.tolist())
        return pd.concat([self.table[["prompt", "pos", "token", "kind"]], columns], axis=1)

    def summary(self, outcome: str | None = None, *, confidence: float = 0.95) -> pd.DataFrame:
        """One row per edit and outcome (or of this one): mean over prompts of the effect over the lifetime, with its interval.

        Columns: edit, outcome, clean, edited, effect, low, high (over prompts), n_prompts, n_sinks. Intervals are NaN
        for a single prompt.
        """
        rows = []
        for name in self.outcomes if outcome is None else (outcome,):
            effects = self.over_lifetime(name)
            clean = self.over_lifetime(name, "clean")
            for edit in self.data["edit"].values:
                values = effects.sel(edit=edit).to_numpy()
                seed = f"{self.kind}/{name}/{edit}"
                estimate = statistics.bootstrap_over_prompts(
                    values, self.table["prompt"], name=seed, confidence=confidence
                )
                base = statistics.prompt_means(
                    np.where(np.isnan(values), np.nan, clean.sel(edit=edit).to_numpy()), self.table["prompt"]
                )
                clean_mean = float(base.mean()) if len(base) else np.nan
                rows.append(
                    {
                        "edit": edit, "outcome": name, "clean": clean_mean, "edited": clean_mean + estimate.mean,
                        "effect": estimate.mean,
                        "low": estimate.low, "high": estimate.high, "n_prompts": estimate.n, "n_sinks": int(np.isfinite(values).sum()),
                    }
                )  # fmt: skip
        return pd.DataFrame(rows)

    def tests(self, outcome: str = "log_odds", *, alternative: str = "two-sided") -> pd.DataFrame:
        """Is the effect over the lifetime 0? One row per edit (of a layer map: per layer), by sign flips over prompts.

        Columns: edit, outcome, effect (mean over prompts), p (`sign_flip_test`), p_max_t (`max_t`: for all edits together, the
        family-wise error; for maps), p_bh (Benjamini-Hochberg of p: the false discovery rate; for maps that are searched), p_holm (Holm of
        p: for edits declared beforehand), smallest_p (no p of these data can be smaller), n_prompts, n_sinks. Raises InputError.
        """
        values = self.over_lifetime(outcome).transpose("sink", "edit").to_numpy()
        by_prompt = statistics.prompt_table(values, self.table["prompt"])
        names = [f"{self.kind}/{outcome}/{edit}" for edit in self.data["edit"].values]
        single = [
            statistics.sign_flip_test(column, range(len(column)), alternative=alternative, name=name)
            for column, name in zip(by_prompt.T, names, strict=True)
        ]
        family = statistics.max_t(by_prompt, alternative=alternative, name=f"{self.kind}/{outcome}")
        p = [test.p for test in single]
        return pd.DataFrame(
            {
                "edit": self.data["edit"].values, "outcome": outcome, "effect": [test.statistic for test in single], "p": p,
                "p_max_t": family.p, "p_bh": statistics.benjamini_hochberg(p), "p_holm": statistics.holm(p),
                "smallest_p": [test.smallest_p for test in single], "n_prompts": [test.n for test in single],
                "n_sinks": np.isfinite(values).sum(axis=0),
            }
        )  # fmt: skip

    def trend(self, outcome: str = "log_odds", *, alternative: str = "greater") -> statistics.TestResult:
        """Does the outcome over the lifetime rise with the dose, the axis `edit`? `statistics.trend_test` over prompts.

        Raises InputError where the edits are no numbers, as those of a layer map are none, or fewer than 3.
        """
        doses = self.data["edit"].values
        if self.kind == "layer_map" or not np.issubdtype(doses.dtype, np.number):
            raise InputError(f"a trend needs doses, this is a {self.kind}: use dose_response(...).trend().")
        values = self.over_lifetime(outcome, "edited").transpose("sink", "edit").to_numpy()
        name = f"{self.kind}/{outcome}/trend"
        return statistics.trend_test(doses, values, self.table["prompt"], alternative=alternative, name=name)

    def forming(self, max_layer_of: str = "l_end") -> pd.Series:
        """Each sink's forming layer: the edit (a layer) that lowers its log-odds most over its lifetime, up to l_end.

        Only for a layer map. A layer whose removal another can make up for is found only by joint edits.
        """
        if self.kind != "layer_map":
            raise InputError(
                f"forming layers are read from a layer map, this is a {self.kind}: use layer_map(...).forming()."
            )
        arguments.one_of(max_layer_of, "max_layer_of", ("l_start", "l_end"))
        effects = self.over_lifetime("log_odds").to_numpy().copy()
        edits = self.data["edit"].to_numpy()
        effects[edits[None, :] > self.table[max_layer_of].to_numpy()[:, None]] = np.nan
        if np.isnan(effects).all(axis=1).any():
            raise InputError(
                "a sink has no layer with a defined effect: it stands too near the end of its text; leave it out."
            )
        return pd.Series(edits[np.nanargmin(effects, axis=1)].astype(int), index=self.table.index, name="forming")

    def to_dataframe(self) -> pd.DataFrame:
        """Long format, one row per sink, edit, outcome, layer and head (<NA> where the outcome has none): edited, clean, effect."""
        frames = []
        for outcome in self.outcomes:
            edited, clean = (self.data[name] for name in (outcome, f"clean_{outcome}"))
            frame = xr.Dataset({"edited": edited, "clean": clean.broadcast_like(edited)}).to_dataframe().reset_index()
            frames.append(frame.assign(outcome=outcome))
        frame = pd.concat(frames, ignore_index=True)
        frame["effect"] = frame["edited"] - frame["clean"]
        frame = frame.reindex(columns=["outcome", *_AXES, "edited", "clean", "effect"])
        frame = frame.astype({"layer": "Int64", "head": "Int64"})
        sinks = self.table[["prompt", "pos", "token", "kind", "l_start", "l_end"]]
        return frame.join(sinks, on="sink")

    def plot(self, outcome: str = "score"):
        """The experiment's figure (plotly)."""
        from sink_circuits import figures

        return figures.effect_figure(self, outcome)

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """One safetensors file, whole or not at all. Raises ResultError when `path` exists or cannot be written."""
        write_result(path, self.kind, self.data, self.table, self.manifest, overwrite=overwrite)

    @staticmethod
    def load(path: str | Path) -> Effect:
        """Read what `save` wrote. Raises ResultError for any other file."""
        data, meta = read_dataset(path)
        if not {"kind", "table", "manifest"} <= set(meta) or (data.data_vars and "last_edited" not in data):
            raise ResultError(f"{path} is not an experiment's result: check the path.")
        return Effect(meta["kind"], data, pd.DataFrame(meta["table"]), Manifest.from_dict(meta["manifest"]))

    def __repr__(self) -> str:
        prompts = self.table["prompt"].nunique()
        edits = self.data["edit"].values.tolist()
        summary = self.summary().to_string(float_format=lambda x: f"{x:.4g}")
        return f"Effect({self.kind}: {len(self.table)} sinks in {prompts} prompts, edits {edits})\n{summary}"


def _lifetime_mean(values: xr.DataArray, reading: xr.DataArray) -> xr.DataArray:
    means = values.mean("head") if "head" in values.dims else values
    return means.where(reading).mean("layer") if "layer" in values.dims else means


@dataclass(frozen=True)
class Interaction:
    """What it does to a sink that the other sinks of its prompt are edited in the same run.

    `table`: one row per sink, edit and outcome, means over heads and the layers that read the sink above its own edit:
    `separate` (only this sink edited), `together` (all), `interaction` = together - separate, and `n_joint`, how many
    sinks were edited together: where it is 1 there is nothing to interact with.
    """

    table: pd.DataFrame

    def summary(self, outcome: str | None = None, *, confidence: float = 0.95) -> pd.DataFrame:
        """One row per edit and outcome (or of this one): means over prompts, the interaction with its bootstrap interval over prompts.

        Columns: edit, outcome, separate, together, interaction, low, high, n_prompts, n_sinks, and n_alone: sinks alone
        in their prompt, which are left out.
        """
        rows = []
        if outcome is not None and outcome not in set(self.table["outcome"]):
            raise InputError(
                f"outcome {outcome!r} was not measured: there are {', '.join(self.table['outcome'].unique())}."
            )
        table = self.table if outcome is None else self.table[self.table["outcome"] == outcome]
        for (edit, name), group in table.groupby(["edit", "outcome"], sort=False):
            joint = group[(group["n_joint"] > 1) & group["interaction"].notna()]
            estimate = statistics.bootstrap_over_prompts(
                joint["interaction"], joint["prompt"], name=f"interaction/{name}/{edit}", confidence=confidence
            )
            means = joint.groupby("prompt")[["separate", "together"]].mean().mean()
            rows.append(
                {
                    "edit": edit, "outcome": name, "separate": means["separate"], "together": means["together"],
                    "interaction": estimate.mean, "low": estimate.low, "high": estimate.high, "n_prompts": estimate.n,
                    "n_sinks": len(joint), "n_alone": int((group["n_joint"] == 1).sum()),
                }
            )  # fmt: skip
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        return f"Interaction\n{self.summary().to_string(float_format=lambda x: f'{x:.4g}')}"


def interaction(separate: Effect, together: Effect) -> Interaction:
    """The difference between editing all sinks of a prompt in one run and one sink per run, sink by sink.

    `separate` and `together`: the same experiment, without and with `together=True`. Raises InputError where they differ
    in anything else.
    """
    for effect, name, joint in ((separate, "separate", False), (together, "together", True)):
        arguments.instance(effect, name, Effect, "pass what an experiment returns")
        if bool(effect.manifest.settings.get("together")) is not joint:
            raise InputError(f"{name} was run with together={not joint}: run it with together={joint}.")
    for what, one, other in zip(_COMPARED, _compared(separate), _compared(together), strict=True):
        if one != other:
            raise InputError(f"the two experiments differ in {what}: run the same one with together=False and True.")
    outcomes = [name for name in separate.outcomes if name in together.outcomes]
    n_joint = separate.table.groupby("prompt")["pos"].transform("nunique")
    sinks = separate.table[["prompt", "pos", "token", "kind", "l_start", "l_end"]].assign(n_joint=n_joint)
    frames = []
    for outcome in outcomes:
        values = xr.Dataset(
            {
                "separate": separate.over_lifetime(outcome, "edited"),
                "together": _lifetime_mean(together.data[outcome], separate.reading()),  # the same layers
            }
        )
        frame = values.to_dataframe().reset_index().assign(outcome=outcome)
        frames.append(frame[["sink", "edit", "outcome", "separate", "together"]])
    table = pd.concat(frames, ignore_index=True)
    table["interaction"] = table["together"] - table["separate"]
    return Interaction(table.join(sinks, on="sink"))


_COMPARED = ("the experiment", "the edits", "the sinks", "the model", "the tokens", "the settings")


def _compared(effect: Effect) -> Sequence:
    settings = {name: value for name, value in effect.manifest.settings.items() if name != "together"}
    sinks = effect.table[["prompt", "pos", "l_start", "l_end"]].to_dict(orient="list")
    manifest = effect.manifest
    return effect.kind, effect.data["edit"].values.tolist(), sinks, manifest.weights, manifest.tokens, settings
