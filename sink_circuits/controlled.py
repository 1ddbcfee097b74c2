"""`Controlled`: effects beside those of their controls, as `with_controls` returns them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import xarray as xr

from sink_circuits import arguments, statistics
from sink_circuits.effects import Effect
from sink_circuits.errors import InputError
from sink_circuits.outcomes import in_order
from sink_circuits.results import Manifest, read_result, write_result


@dataclass(frozen=True)
class Controlled:
    """Effects of one experiment, and of its controls, each a mean over heads and the layers that read the sink.

    `data`: `effect_<outcome>` [sink, edit], `control_<outcome>` [sink, control, edit] (NaN: not matched),
    `random_<outcome>` [sink, draw, edit], for every outcome of the experiment, a user's own too. `matches`: one row per sink and
    control with the position or layers taken, or the `reason` why there is none. `effect`: the treated sinks' full result; None in
    a loaded one (save it by itself).
    """

    data: xr.Dataset
    table: pd.DataFrame
    matches: pd.DataFrame
    manifest: Manifest
    effect: Effect | None = None

    @property
    def outcomes(self) -> tuple[str, ...]:
        """What was measured: built-in outcomes as listed, then a user's own by name."""
        names = [str(name) for name in self.data.data_vars]
        return tuple(in_order(name.removeprefix("effect_") for name in names if name.startswith("effect_")))

    def compare(self, outcome: str = "log_odds", confidence: float = 0.95) -> pd.DataFrame:
        """One row per edit and control: effect, control's effect and their difference over prompts.

        Columns: edit, control, effect, control_effect (means over the prompts with both), difference, low, high (bootstrap
        over prompts), p, smallest_p (sign-flip, two-sided), n_prompts, n_sinks, n_unmatched, and for random perturbations
        rank: 1 when the mean effect is beyond every draw's, on its own side. Raises InputError for an unknown outcome.
        """
        self._check(outcome)
        prompts, rows = self.table["prompt"], []
        for edit in self.data["edit"].values:
            effects = self.data[f"effect_{outcome}"].sel(edit=edit).to_numpy()
            random = self.data[f"random_{outcome}"].sel(edit=edit).to_numpy()
            by_name = {
                str(c): self.data[f"control_{outcome}"].sel(edit=edit, control=c).to_numpy()
                for c in self.data["control"].values
            }
            by_name = {name: values for name, values in by_name.items() if name in self.matches["control"].values}
            if self.matches.loc[self.matches["control"] == "random model", "reason"].astype(bool).all():
                by_name.pop("random model")  # none was given
            for name, controls in {**by_name, "random perturbation": random}.items():
                found = statistics.difference_to_controls(
                    effects, controls, prompts, name=f"{name}/{outcome}/{edit}", confidence=confidence
                )
                per_sink = controls if controls.ndim == 1 else _row_means(controls)
                both = np.isfinite(effects) & np.isfinite(per_sink)
                row = {
                    "edit": edit, "control": name, "effect": _mean(effects[both], prompts[both]),
                    "control_effect": _mean(per_sink[both], prompts[both]), "difference": found.estimate.mean,
                    "low": found.estimate.low, "high": found.estimate.high, "p": found.test.p, "smallest_p": found.test.smallest_p,
                    "n_prompts": found.estimate.n, "n_sinks": found.n_sinks, "n_unmatched": found.n_unmatched, "rank": np.nan,
                }  # fmt: skip
                if controls.ndim == 2 and both.any():
                    draws = np.array([_mean(draw[both], prompts[both]) for draw in controls.T])
                    side = "less" if row["effect"] < 0 else "greater"
                    row["rank"] = statistics.rank_among_controls(row["effect"], draws, alternative=side).statistic
                rows.append(row)
        return pd.DataFrame(rows)

    def by_sink(self, outcome: str = "log_odds") -> pd.DataFrame:
        """One row per sink and edit: its effect, and where that stands among all controls of this sink.

        Columns: prompt, pos, token, kind, edit, effect, `rank` (1: farther than every control, to the effect's own side; ties count
        against it), `n_controls` (matched ones and random draws) and `unmatched` (the kinds of control that this sink has not).
        """
        self._check(outcome)
        rows = []
        for sink, row in self.table.iterrows():
            own = self.matches[self.matches["sink"] == sink]
            missing = ", ".join(own.loc[own["reason"].astype(bool), "control"])
            for edit in self.data["edit"].values:
                effect, single, draws = (
                    self.data[f"{kind}_{outcome}"].sel(sink=sink, edit=edit).to_numpy()
                    for kind in ("effect", "control", "random")
                )
                side = "less" if effect < 0 else "greater"
                found = statistics.rank_among_controls(float(effect), [*single, *draws], alternative=side)
                rows.append(
                    {
                        **row[["prompt", "pos", "token", "kind"]], "edit": edit, "effect": float(effect), "rank": found.statistic,
                        "n_controls": found.n, "unmatched": missing,
                    }
                )  # fmt: skip
        return pd.DataFrame(rows)

    def _check(self, outcome: str) -> None:
        if not isinstance(outcome, str) or outcome not in self.outcomes:
            raise InputError(
                f"outcome {arguments.shown(outcome)} was not measured: there are {', '.join(self.outcomes)}."
            )

    def to_dataframe(self) -> pd.DataFrame:
        """Long format: one row per sink, edit and control (draws one by one), a column for every outcome."""
        frames, names = [], list(self.outcomes)
        for kind, dim in (("effect", None), ("control", "control"), ("random", "draw")):
            columns = {o: self.data[f"{kind}_{o}"].to_series() for o in names}
            frame = pd.DataFrame(columns).reset_index()
            named = "treated" if dim is None else frame[dim].astype(str).radd("" if kind == "control" else "random ")
            frames.append(frame.assign(control=named)[["sink", "edit", "control", *names]])
        return pd.concat(frames, ignore_index=True).join(self.table[["prompt", "pos", "token", "kind"]], on="sink")

    def plot(self, outcome: str = "log_odds"):
        """The effect beside every control's (plotly)."""
        from sink_circuits import figures

        return figures.controls_figure(self, outcome)

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """One safetensors file, whole or not at all. Raises ResultError when `path` exists or cannot be written."""
        write_result(path, "controls", self.data, self.table, self.manifest, overwrite=overwrite, matches=self.matches)

    @staticmethod
    def load(path: str | Path) -> Controlled:
        """Read what `save` wrote. Raises ResultError for any other file."""
        data, table, manifest, meta = read_result(path, "controls", "a result with controls")
        return Controlled(data, table, pd.DataFrame(meta["matches"]), manifest)

    def __repr__(self) -> str:
        table = self.compare().to_string(index=False, float_format=lambda x: f"{x:.3g}")
        return f"Controlled({len(self.table)} sinks in {self.table['prompt'].nunique()} prompts, effects in log-odds)\n{table}"


def _row_means(values: np.ndarray) -> np.ndarray:
    counts = np.isfinite(values).sum(axis=1)
    return np.where(counts > 0, np.nansum(values, axis=1) / np.maximum(counts, 1), np.nan)


def _mean(values: np.ndarray, prompts) -> float:
    means = statistics.prompt_means(values, prompts)
    return float(means.mean()) if len(means) else np.nan
