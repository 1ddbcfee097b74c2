"""Sweeps on planted models: the values, functions of one's own, what is refused, and what fails."""

from __future__ import annotations

import concurrent.futures
import hashlib
import importlib
import json
import shutil
import sys
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import filelock
import numpy as np
import pandas as pd
import pytest
from common import lens
from planted_sweep import (
    FACTORS,
    LAYERS,
    SINKS,
    contents,
    copied,
    counted,
    failing,
    finished,
    ids_of,
    place,
    study,
    write_tokens,
)

import sink_circuits as sc
from sink_circuits import cells, measurement, sweep_results, sweeps
from sink_circuits.cells import Answer, Cell
from sink_circuits.edits import Edit
from sink_circuits.errors import InputError, ModelError, ResultError
from sink_circuits.prompts import Tokens, as_tokens
from sink_circuits.report.sections import causal_sections
from sink_circuits.report.text import number
from sink_circuits.studies import Study, own_function
from sink_circuits.sweeps import load_sweep, sweep


def test_a_sweep_says_what_the_experiments_say():
    result = finished()
    assert result.complete and len(result.cells) == 3 * 2
    assert list(result.cells["n_sinks"]) == [1, 1, 1, 1, 0, 0]
    table = result.to_dataframe()
    assert len(table) == 2 * len(LAYERS) * len(FACTORS) * 6
    assert set(table["intervention"]) == {"rescale"}
    for name in ("a", "b"):
        tokens = as_tokens(lens(), Tokens((ids_of(name, SINKS[name]),), (name,)))
        sinks = sc.find_sinks(lens(), tokens, verbose=False).select("secondary")
        for layers in LAYERS:
            joint = layers if isinstance(layers, list) else [layers]
            effect = sc.dose_response(lens(), tokens, sinks, layers=joint, factors=FACTORS, loss=True, verbose=False)
            own = table[(table["prompt"] == name) & (table["layers"] == "+".join(map(str, joint)))]
            assert set(zip(own["first_layer"], own["last_layer"], own["pos"], strict=True)) == {
                (joint[0], joint[-1], SINKS[name])
            }
            for (outcome, factor), row in own.set_index(["outcome", "factor"]).iterrows():
                for what in ("clean", "edited", "effect"):
                    expected = effect.over_lifetime(outcome, what).sel(edit=factor).item()
                    assert row[what] == pytest.approx(expected, abs=2e-6, nan_ok=True), (outcome, factor, what)
    assert (table.loc[table["factor"] == 1, "effect"].dropna() == 0).all()
    assert (
        table.loc[(table["layers"] == "6+7") & (table["factor"] == 0) & (table["outcome"] == "score"), "effect"] < -0.1
    ).all()


OWN = """
def bent(contribution, dose):
    return contribution + dose * contribution.flip(-1)


def share_of_heads(clean, edited, sink):
    attention = edited.columns.log_attention[..., sink.pos + 1 :, edited.columns.chosen.index(sink.pos)].exp()
    return (attention.mean(-1) > 0.1).float().mean(-1)
"""


def module_of_ones_own(folder: Path, monkeypatch, text: str = OWN) -> str:
    """Writes a module that can be imported here, under a name of its own."""
    name = f"own_{hashlib.sha256(str(folder).encode()).hexdigest()[:8]}"
    (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(folder)
    return name


def test_functions_of_ones_own_rank_with_the_built_in_ones(tmp_path, monkeypatch):
    name = module_of_ones_own(tmp_path, monkeypatch)
    prompts = {"tokens": str(place() / "ids.jsonl"), "n": 2}
    own = {"interventions": ["rescale", f"{name}:bent"], "outcomes": [f"{name}:share_of_heads"], "kl": True}
    made = study(layers=[[6, 7]], factors=[0, 0.5], prompts=prompts, **own)
    assert Study(**json.loads(json.dumps(made.to_dict()))) == made
    result = sweep(made, tmp_path / "s", verbose=False)
    module = importlib.import_module(name)
    options = {"layers": [6, 7], "factors": [0, 0.5], "loss": True, "kl": True, "verbose": False}
    for prompt in ("a", "b"):
        tokens = as_tokens(lens(), Tokens((ids_of(prompt, SINKS[prompt]),), (prompt,)))
        sinks = sc.find_sinks(lens(), tokens, verbose=False).select("secondary")
        for intervention in (f"{name}:bent", "rescale"):
            how = {} if intervention == "rescale" else {"intervention": module.bent}
            expected = sc.dose_response(lens(), tokens, sinks, outcomes=[module.share_of_heads], **how, **options)
            assert {"share_of_heads", "kl", "lifetime"} < set(expected.outcomes)
            for outcome in expected.outcomes:
                rows = result.table.query("prompt == @prompt and intervention == @intervention and outcome == @outcome")
                values = expected.over_lifetime(outcome).to_numpy()[0]
                assert rows["effect"].tolist() == pytest.approx(values, abs=2e-6), (outcome, intervention)
    summary = result.summary(["share_of_heads"])
    assert list(zip(summary["intervention"], summary["factor"], strict=True)) == [
        ("rescale", 0.0), ("rescale", 0.5), (f"{name}:bent", 0.0), (f"{name}:bent", 0.5),
    ]  # fmt: skip
    assert (summary["effect"].iloc[:1] < -0.1).all() and summary["effect"].iloc[2] == 0
    assert set(result.summary()["outcome"]) == set(expected.outcomes)


def test_the_dose_1_of_ones_own_intervention_is_a_dose_like_any_other(tmp_path, monkeypatch):
    """Of a rescaling it is the clean model; what else it is only the function knows."""
    name = module_of_ones_own(tmp_path, monkeypatch)
    prompts = {"tokens": str(place() / "ids.jsonl"), "n": 1}
    made = study(layers=[[6, 7]], factors=[1], prompts=prompts, interventions=[f"{name}:bent"])
    result = sweep(made, tmp_path / "s", verbose=False)
    (row,) = result.summary(["log_odds"]).to_dict(orient="records")
    assert row["factor"] == 1 and abs(row["effect"]) > 0.01
    assert list(result.plot().data[0].y) == [row["effect"]]
    assert f"factor 1: {number(row['effect'], signed=True)}" in causal_sections([result])[0].answer


def test_a_cell_without_sinks_says_so(tmp_path):
    write_tokens(tmp_path / "ids.jsonl", {"none": None})
    made = study(layers=[6], factors=[0], prompts={"tokens": str(tmp_path / "ids.jsonl")})
    result = sweep(made, tmp_path / "s", verbose=False)
    (cell,) = result.cells.to_dict(orient="records")
    assert (cell["state"], cell["n_sinks"]) == ("done", 0)
    with pytest.raises(ResultError, match="has no sinks of these kinds"):
        result.effect(cell["cell"])


def test_another_version_of_ones_own_functions_is_another_sweep(tmp_path, monkeypatch):
    name = module_of_ones_own(tmp_path, monkeypatch)
    prompts = {"tokens": str(place() / "ids.jsonl"), "n": 1}
    made = study(layers=[6], factors=[0.5], prompts=prompts, interventions=[f"{name}:bent"])
    sweep(made, tmp_path / "s", verbose=False)
    settings = {**cells.shared_settings(made), "functions": {f"{name}:bent": "older"}}
    answer = cells.compute(Cell("planted", str(place() / "planted"), "w", "a", (0, 5, 6), ((6,),), settings))
    assert answer.cause == f"{name}:bent is another version on this worker than where the sweep began: use one copy."
    module_of_ones_own(tmp_path, monkeypatch, OWN.replace("flip(-1)", "roll(1, -1)"))
    sweep(made, tmp_path / "s", verbose=False)  # this process still has the version that it imported
    own_function.cache_clear()  # as in a new process
    del sys.modules[name]
    with pytest.raises(ResultError, match="other functions under the same name: choose another folder"):
        sweep(made, tmp_path / "s", verbose=False)
    assert load_sweep(tmp_path / "s").complete


def test_functions_that_cannot_be_had_are_known_before_anything_is_begun(tmp_path, monkeypatch):
    name = module_of_ones_own(tmp_path, monkeypatch, OWN + "number = 3\ndef score(clean, edited, sink): return 1.0\n")
    (tmp_path / "broken_module_of_ones_own.py").write_text("def f(:")
    for changed, message in (
        (
            {"interventions": ["nowhere_at_all:f"]},
            "nowhere_at_all:f cannot be imported .*name its folder in PYTHONPATH",
        ),
        ({"interventions": ["broken_module_of_ones_own:f"]}, r"cannot be imported \(SyntaxError"),
        ({"interventions": ["__main__:f"]}, "stands in the program itself.*move it to a module"),
        ({"outcomes": [f"{name}:nothing"]}, f"{name}:nothing is no function"),
        ({"outcomes": [f"{name}:number"]}, f"{name}:number is no function"),
        ({"outcomes": [f"{name}:score"]}, "outcome name 'score' is taken"),
    ):
        with pytest.raises(InputError, match=message):
            sweep(study(**changed), tmp_path / "s", verbose=False)
    assert not (tmp_path / "s").exists()


def test_nothing_is_run_for_the_factor_1(monkeypatch):
    tokens, pos = ids_of("a", 30), 30
    sinks = sc.find_sinks(lens(), [tokens], verbose=False).select("secondary")
    run = sc.measure(
        lens(), [tokens], sinks, [1.0], lambda factor, row: (Edit(6, (pos,), lambda c: c * 1.0),), what="run", loss=True, verbose=False
    )  # fmt: skip
    monkeypatch.setattr(measurement, "run_edited", None)
    for path in ("fast", "reference"):
        options = {"loss": True, "verbose": False, "path": path}
        copied = sc.dose_response(lens(), [tokens], sinks, layer=6, factors=[1], **options)
        empty = sc.measure(lens(), [tokens], sinks, ["none"], lambda label, row: (), what="nothing", **options)
        for effect in (copied, empty):
            assert effect.manifest.path == path
            for name in (*effect.outcomes, "norm", "cosine"):
                difference = effect.effect(name).values
                assert (difference[np.isfinite(difference)] == 0).all()
                np.testing.assert_allclose(effect.data[name].values, run.data[name].values, atol=2e-3)
        assert (copied.data["first_layer"].item(), copied.data["last_edited"].item()) == (6, 6)


def test_forming_layers_are_each_sinks_own(tmp_path):
    """Without the stand-in, MLP 6 alone forms the sink."""
    made = study(
        models=[str(place() / "alone")],
        layers="forming",
        factors=[0],
        prompts={"tokens": str(place() / "ids.jsonl"), "n": 2},
    )
    result = sweep(made, tmp_path / "s", verbose=False)
    assert list(result.cells["layers"]) == ["forming"] * 2
    assert set(result.table["first_layer"]) == set(result.table["last_layer"]) == {6}
    assert (result.table.loc[result.table["outcome"] == "score", "effect"] < -0.1).all()


def test_the_summary_is_a_bootstrap_over_prompts():
    result = finished()
    summary = result.summary()
    assert list(summary["layers"].drop_duplicates()) == ["2", "6", "6+7", "13"]
    assert len(summary) == len(LAYERS) * len(FACTORS) * 6
    row = summary[(summary["layers"] == "6+7") & (summary["factor"] == 0) & (summary["outcome"] == "score")].iloc[0]
    table = result.table
    own = table[(table["layers"] == "6+7") & (table["factor"] == 0) & (table["outcome"] == "score")]
    assert row["effect"] == pytest.approx(own["effect"].mean())
    assert row["edited"] - row["clean"] == pytest.approx(row["effect"])
    assert row["low"] <= row["effect"] <= row["high"] and (row["n_prompts"], row["n_sinks"]) == (2, 2)
    assert set(result.summary(["loss"])["outcome"]) == {"loss"}
    with pytest.raises(InputError, match="outcome 'norm' was not measured"):
        result.summary(["norm"])


def test_cells_hold_everything_by_layer_and_head(tmp_path):
    result = finished()
    name = result.cells["cell"].iloc[0]
    effect = result.effect(name)
    assert effect.data["score"].sizes == {"sink": 1, "edit": 2 * len(FACTORS), "layer": 24, "head": 4}
    assert sc.Effect.load(result.folder / f"{name}.safetensors").manifest.settings["cell"] == name
    with pytest.raises(ResultError, match="cell nothing is not done"):
        result.effect("nothing")


def test_the_long_table_is_saved(tmp_path):
    result = finished()
    result.save(tmp_path / "t.parquet")
    result.save(tmp_path / "t.csv")
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "t.parquet"), result.table, check_dtype=False)
    assert len(pd.read_csv(tmp_path / "t.csv")) == len(result.table)
    with pytest.raises(InputError, match="use .parquet or .csv"):
        result.save(tmp_path / "t.txt")
    with pytest.raises(ResultError, match="exists already"):
        result.save(tmp_path / "t.csv")


def test_one_model_is_held_at_a_time_and_loaded_once_for_all_its_cells(tmp_path, monkeypatch):
    models = [str(place() / "planted"), str(place() / "alone")]
    held = []
    original = cells.load_model

    def load(source, **options):
        held.append((Path(source).name, len(cells._held)))
        return original(source, **options)

    monkeypatch.setattr(cells, "load_model", load)
    result = sweep(study(models=models, layers=[6, 7], layers_per_cell=1, factors=[0]), tmp_path / "s", verbose=False)
    assert held == [("alone", 0), ("planted", 0), ("alone", 0)]  # asked in reverse: the first one is there already
    assert not cells._held
    means = (
        result.table[(result.table["outcome"] == "score") & (result.table["layers"] == "6")]
        .groupby("model")["effect"]
        .mean()
    )
    assert means[models[1]] < 3 * means[models[0]] < 0  # the stand-in makes up for MLP 6 where there is one


def test_a_folder_of_another_study_is_refused(tmp_path, monkeypatch):
    folder = copied(tmp_path / "s")
    before = contents(folder)
    with counted(monkeypatch, "ask") as asked:
        with pytest.raises(ResultError, match=r"belongs to another study \(it differs in factors, seed\)"):
            sweep(study(factors=[0], seed="other"), folder, verbose=False)
        (tmp_path / "notes").mkdir()
        (tmp_path / "notes" / "a.txt").write_text("mine")
        with pytest.raises(ResultError, match="is not empty and holds no sweep"):
            sweep(study(), tmp_path / "notes", verbose=False)
        with filelock.FileLock(folder / sweeps.LOCK), pytest.raises(ResultError, match="another sweep is at work"):
            sweep(study(), folder, verbose=False)
        with pytest.raises(ResultError, match="cannot be written"):
            sweep(study(), tmp_path / "notes" / "a.txt" / "s", verbose=False)
    assert not asked and contents(folder) == before
    assert contents(tmp_path / "notes") == {"a.txt": b"mine"}


def test_a_sweep_goes_on_with_another_memory(tmp_path, monkeypatch):
    folder = copied(tmp_path / "s")
    with counted(monkeypatch) as calls:
        assert sweep(study(memory=2.0), folder, verbose=False).complete
    assert not calls


def test_changed_prompts_or_weights_are_refused(tmp_path):
    write_tokens(tmp_path / "ids.jsonl", SINKS)
    shutil.copytree(place() / "planted", tmp_path / "model")
    made = study(models=[str(tmp_path / "model")], prompts={"tokens": str(tmp_path / "ids.jsonl"), "n": 1}, layers=[6])
    sweep(made, tmp_path / "s", verbose=False)
    write_tokens(tmp_path / "ids.jsonl", {"a": 31})
    with pytest.raises(ResultError, match="it differs in the prompts' texts"):
        sweep(made, tmp_path / "s", verbose=False)
    write_tokens(tmp_path / "ids.jsonl", SINKS)
    shutil.copyfile(place() / "alone" / "model.safetensors", tmp_path / "model" / "model.safetensors")
    with pytest.raises(ResultError, match="other weights, another tokenizer or other functions"):
        sweep(made, tmp_path / "s", verbose=False)


def test_what_does_not_fit_a_model_is_known_before_any_cell(tmp_path, monkeypatch):
    with counted(monkeypatch) as calls:
        with pytest.raises(InputError, match=r"layer 24 is out of range: .*planted has layers 0..23"):
            sweep(study(layers=[3, 24]), tmp_path / "a", verbose=False)
        with pytest.raises(ModelError, match="nowhere: .*neither a known model"):
            sweep(study(models=[str(place() / "planted"), "nowhere"]), tmp_path / "b", verbose=False)
        with pytest.raises(ModelError, match="this model has no tokenizer"):
            sweep(study(prompts={"source": "maths", "n": 1}), tmp_path / "c", verbose=False)
        with pytest.raises(ModelError, match=r"planted: a text of .* tokens needs about .* GiB are allowed by memory="):
            sweep(study(memory=1e-5), tmp_path / "e", verbose=False)
        with pytest.raises(InputError, match="has no `submit`"):
            sweep(study(), tmp_path / "d", executor=3, verbose=False)
    assert not calls


PLAN = {"cell": "c", "model": "m", "weights": "w", "prompt": "p", "layers": [1]}
NO_NAMES = json.dumps({"format": sweep_results.FORMAT, "study": {"models": ["m"]}, "cells": [PLAN]})  # layers are texts


@pytest.mark.parametrize("text", ["", "[]", '{"format": 99}', None, NO_NAMES])
def test_a_folder_without_a_sweep_is_not_read(tmp_path, text):
    if text is not None:
        (tmp_path / sweeps.STUDY).write_text(text)
    with pytest.raises(ResultError):
        load_sweep(tmp_path)


def test_a_worker_with_other_weights_fails_the_cell():
    made = study()
    settings = cells.shared_settings(made)
    one = Cell("planted", str(place() / "planted"), "other", "a", (0, 5, 6), ((6,),), settings)
    try:
        outcome = cells.compute(one)
    finally:
        cells.release_model()
    assert outcome.value is None and "has weights" in outcome.cause and "other where the sweep began" in outcome.cause


def test_a_cell_that_fails_is_reported_and_does_not_stop_the_rest(tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        failing(patch, RuntimeError("no luck\nat all"))
        result = sweep(study(), tmp_path / "s")
    assert list(result.cells["state"]) == ["done"] * 2 + ["failed"] * 2 + ["done"] * 2 and not result.complete
    assert all(cause.startswith("RuntimeError: no luck (planted_sweep.py, line ") for cause in result.failed["cause"])
    said = capsys.readouterr().err
    assert "prompt b, layers 2, 6+7 (cell" in said and "RuntimeError: no luck" in said and "failed=2" in said
    assert set(result.table["prompt"]) == {"a"}
    assert list(load_sweep(tmp_path / "s").failed["prompt"]) == ["b", "b"]
    with counted(monkeypatch) as calls:
        sweep(study(), tmp_path / "s", verbose=False)
    assert len(calls) == 2
    assert contents(tmp_path / "s") == contents(finished().folder)


class Job:
    """A future with `done` and `result` alone, as submitit's."""

    def __init__(self, result):
        self._result, self.asked = result, 0

    def done(self) -> bool:
        self.asked += 1
        return self.asked > 1

    def result(self):
        if isinstance(self._result, Exception):
            raise self._result
        return self._result

    def cancel(self) -> None:
        pass


class Pool:
    """Gives prepared answers: a list of results or errors per task; "refuse" raises at `submit`."""

    def __init__(self, answers: dict, future=Job):
        self.answers, self.future, self.given = {k: list(v) for k, v in answers.items()}, future, []

    def submit(self, function, task):
        self.given.append(task)
        answer = self.answers[task].pop(0)
        if answer == "refuse":
            raise BrokenProcessPool("broken")
        return self.future(answer)


def done_future(answer):
    future = concurrent.futures.Future()
    future.set_exception(answer) if isinstance(answer, Exception) else future.set_result(answer)
    return future


class KilledWorker(Exception):
    pass


@pytest.mark.parametrize("future", [Job, done_future])
def test_tasks_of_dying_workers_are_given_to_others(future):
    good = Answer("good")
    pool = Pool(
        {
            "fine": [good], "once": [BrokenProcessPool("died"), good], "always": [BrokenProcessPool("died")] * 9,
            "broken": ["refuse"], "dask": [KilledWorker("4 workers")], "failed": [Answer(cause="because")],
        },
        future,
    )  # fmt: skip
    outcomes = dict(sweeps._answers(pool, cells.compute, list(pool.answers)))
    assert outcomes["fine"] == outcomes["once"] == good
    assert pool.given.count("always") == sweeps.ATTEMPTS
    assert "BrokenProcessPool: died" in outcomes["always"].cause
    assert (
        "BrokenProcessPool: broken" in outcomes["broken"].cause and "KilledWorker: 4 workers" in outcomes["dask"].cause
    )
    assert outcomes["failed"].cause == "because"
    assert [pool.given.count(name) for name in ("fine", "once", "broken", "dask", "failed")] == [1, 2, 1, 1, 1]


def test_threads_of_one_process_take_turns(tmp_path):
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        sweep(study(), tmp_path / "s", pool, verbose=False)
    cells.release_model()
    assert contents(tmp_path / "s") == contents(finished().folder)
