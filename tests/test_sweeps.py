"""Sweeps on planted models: the plan, the values, what is refused, and going on after any kind of interruption."""

from __future__ import annotations

import atexit
import concurrent.futures
import functools
import hashlib
import importlib
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path

import filelock
import numpy as np
import pandas as pd
import pytest
from common import lens, subject
from hypothesis import given
from hypothesis import strategies as st

import sink_circuits as sc
from sink_circuits import cells, cli, experiments, measurement, results, scores, sweep_results, sweeps
from sink_circuits.cells import Answer, Cell, Facts, Question
from sink_circuits.edits import Edit
from sink_circuits.errors import InputError, ModelError, ResultError
from sink_circuits.prompts import Tokens, as_tokens
from sink_circuits.report.sections import causal_sections
from sink_circuits.report.text import number
from sink_circuits.studies import Study, Texts, own_function, read_study, read_token_file
from sink_circuits.sweeps import SweepResult, WorkerPool, load_sweep, sweep

SINKS = {"a": 30, "b": 33, "none": None}  # prompt -> position of its secondary sink
LAYERS, FACTORS = [2, 6, [6, 7], 13], [0, 1, 2]
ROOT = Path(__file__).resolve().parents[1]
DEADLINE = 180  # seconds that anything waited for may take


@functools.cache
def place() -> Path:
    """A folder with the planted model in Hugging Face format (no tokenizer), and its prompts as token ids."""
    folder = Path(tempfile.mkdtemp(prefix="sink_circuits-tests-"))
    # Not when the module is left: a worker that takes tests from another may come back to it.
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    subject().hf_model.save_pretrained(folder / "planted")
    subject("stand_in").hf_model.save_pretrained(folder / "alone")
    write_tokens(folder / "ids.jsonl", SINKS)
    return folder


def write_tokens(path: Path, sinks: dict) -> None:
    lines = [{"id": name, "tokens": ids_of(name, pos).tolist()} for name, pos in sinks.items()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def ids_of(name: str, pos: int | None):
    return subject().tokens(64, () if pos is None else (pos,), (50,), name)


def study(**changed) -> Study:
    fields = {
        "models": [str(place() / "planted")], "prompts": {"tokens": str(place() / "ids.jsonl")}, "kinds": ["secondary"],
        "layers": LAYERS, "factors": FACTORS, "layers_per_cell": 2, "loss": True,
    }  # fmt: skip
    return Study(**{**fields, **changed})


@functools.cache
def finished() -> SweepResult:
    """An uninterrupted sweep in this process. Shared: copy its folder before changing anything."""
    return sweep(study(), place() / "finished", verbose=False)


def copied(to: Path) -> Path:
    shutil.copytree(finished().folder, to)
    return to


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the lock, hidden ones too."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != sweeps.LOCK}


def cell_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


@contextmanager
def counted(monkeypatch, name: str = "compute"):
    calls = []
    original = getattr(sweeps, name)
    with monkeypatch.context() as patch:
        patch.setattr(sweeps, name, lambda *args, **kwargs: calls.append(args) or original(*args, **kwargs))
        yield calls


# --------------------------------------------------------------------------------------------------------- studies
def test_a_study_is_read_from_toml(tmp_path):
    (tmp_path / "study.toml").write_text(
        'models = ["m"]\nlayers = [3, [7, 6]]\nfactors = [0, 0.5]\nloss = true\n'
        '[prompts]\nsource = "maths"\nn = 2\n[thresholds]\ncosine = 0.8\nfirst_positions = [0, 1]\n'
    )
    read = read_study(tmp_path / "study.toml")
    assert (read.models, read.layers, read.factors) == (("m",), ((3,), (6, 7)), (0.0, 0.5))
    assert (read.loss, read.prompts) == (True, Texts(source="maths", n=2))
    assert read.thresholds == {"cosine": 0.8, "first_positions": (0, 1)}
    assert Study(**json.loads(json.dumps(read.to_dict()))) == read


def test_defaults_are_those_of_the_experiments():
    assert Study(("m",)).factors == experiments.FACTORS
    assert Study(("m",)).min_queries == scores.MIN_QUERIES
    assert Study(("m",), min_queries=9).detection_thresholds() == {"min_queries": 9}
    assert Study(("m",), thresholds={"min_queries": 5}).detection_thresholds() == {"min_queries": 5}


def test_the_example_is_a_study_of_both_bundled_models():
    example = read_study(ROOT / "examples" / "study.toml")
    assert set(example.models) == set(sweeps.REGISTRY)
    assert len(example.prompts.read()) == 24


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"models": []}, "models is empty"),
        ({"models": "gemma"}, "models = 'gemma': give a list"),
        ({"models": ["m", "m"]}, "name each once"),
        ({"models": [3]}, "a model = 3"),
        ({"kinds": ["tertiary"]}, "kind 'tertiary' is unknown: use one of primary, secondary, primary-like"),
        ({"layers": "some"}, "layers 'some' is unknown: use one of all, forming"),
        ({"layers": []}, "layers is empty"),
        ({"layers": [3, 3]}, "name each once"),
        ({"layers": [[3, 3]]}, "names a layer twice"),
        ({"layers": [[3, 4], [4, 3]]}, "name each once"),
        ({"layers": [-1]}, "layer = -1: at least 0"),
        ({"layers": [True]}, "layer = True"),
        ({"layers": [1.5]}, "layer = 1.5: give a whole number"),
        ({"factors": []}, "factors is empty"),
        ({"factors": [1, 1.0]}, "name each once"),
        ({"factors": [-0.5]}, "factor = -0.5: at least 0"),
        ({"factors": [-0.5], "interventions": ["a:b", "rescale"]}, "factor = -0.5: at least 0"),
        ({"factors": [math.nan]}, "give a finite number"),
        ({"factors": [math.inf]}, "give a finite number"),
        ({"factors": ["1"]}, "give a finite number"),
        ({"sinks_per_prompt": 0}, "sinks_per_prompt = 0: at least 1"),
        ({"layers_per_cell": 0}, "layers_per_cell = 0: at least 1"),
        ({"threads": 1.0}, "threads = 1.0: give a whole number"),
        ({"min_queries": 0}, "min_queries = 0: at least 1"),
        ({"memory": 0}, "memory = 0: give GiB, more than 0"),
        ({"memory": "2"}, "memory = '2': give a finite number"),
        ({"loss": "yes"}, "loss = 'yes': give true or false"),
        ({"kl": 1}, "kl = 1: give true or false"),
        ({"interventions": []}, "interventions is empty"),
        ({"interventions": ["zero"]}, "'zero' names no function: write 'module:function'"),
        ({"interventions": ["a:b", "a:b"]}, "name each once"),
        ({"outcomes": "a:b"}, "outcomes = 'a:b': give a list"),
        ({"outcomes": ["a:b()"]}, "'a:b()' names no function"),
        ({"outcomes": [3]}, "3 names no function"),
        ({"outcomes": ["a:b", "a:b"]}, "name each once"),
        ({"outcomes": ["a:b", "c:b"]}, "two outcomes are named 'b'"),
        ({"path": "quick"}, "path 'quick' is unknown"),
        ({"seed": ""}, "seed = ''"),
        ({"prompts": "maths"}, "prompts = 'maths': give a table"),
        ({"prompts": {"kind": "maths"}}, "prompts has no key 'kind': there are source, tokens, n, max_tokens, chat"),
        ({"prompts": {"n": 0}}, "prompts.n = 0: at least 1"),
        ({"prompts": {"max_tokens": 0}}, "prompts.max_tokens = 0: at least 1"),
        ({"prompts": {"tokens": "x.jsonl", "chat": True}}, "token ids already"),
        ({"thresholds": {"cosin": 0.9}}, "threshold 'cosin' is unknown: there are cosine"),
        ({"thresholds": {"cosine": 2}}, "threshold cosine = 2.0 is out of range"),
        ({"thresholds": {"cosine": "high"}}, "threshold cosine = 'high': give a finite number"),
        ({"thresholds": {"bridge": 1.5}}, "threshold bridge = 1.5: give a whole number"),
        ({"thresholds": {"first_positions": [-1]}}, "a first position = -1"),
        ({"thresholds": [0.9]}, "give a table"),
    ],
)
def test_a_study_that_cannot_be_is_refused_in_one_sentence(changed, message):
    with pytest.raises(InputError) as refused:
        Study(**{"models": ["m"], **changed})
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "text, message",
    [
        ("layers = 3", "lacks the key 'models'"),
        ('models = ["m"]\nlayer = 3', "has no key 'layer': there are models, prompts, kinds"),
        ("models = [", "is not TOML"),
        ('models = ["m"]\nfactors = [-1]', "study.toml: factor = -1: at least 0"),
        (None, "cannot be read"),
    ],
)
def test_a_study_file_that_cannot_be_is_refused(tmp_path, text, message):
    if text is not None:
        (tmp_path / "study.toml").write_text(text)
    with pytest.raises(InputError) as refused:
        read_study(tmp_path / "study.toml")
    assert message in str(refused.value)


def test_prompts_of_a_study():
    assert Texts("maths", n=2).read() == tuple((p.id, p.text) for p in sc.load_prompts("maths", 2))
    assert Texts(tokens=str(place() / "ids.jsonl"), n=1).read() == (("a", tuple(ids_of("a", 30).tolist())),)
    with pytest.raises(InputError, match="ask for no more"):
        Texts("maths", n=10_000).read()
    with pytest.raises(InputError, match="prompts.n = 50, and .*ids.jsonl' holds"):
        Texts(tokens=str(place() / "ids.jsonl"), n=50).read()


def test_generations_are_swept_with_their_answers(tmp_path):
    """As every command reads them: what the model wrote is part of the text."""
    file = tmp_path / "answers.jsonl"
    lines = [{"id": "a", "prompt": "one two", "output": " three four five"}, {"id": "b", "prompt": "six", "output": ""}]
    file.write_text("\n".join(map(json.dumps, lines)))
    read = Texts(str(file)).read()
    assert read == (("a", ("one two", " three four five")), ("b", "six"))
    assert [(p.id, p.text, p.output) for p in cells._texts(read)] == [
        (p.id, p.text, p.output) for p in sc.load_prompts(str(file))
    ]
    assert cells._texts(Texts(tokens=str(place() / "ids.jsonl")).read()) == ()


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "holds no prompts"),
        ("[1, 2]", "line 1"),
        ('{"id": "a"}', "line 1: 'tokens'"),
        ('{"tokens": []}', "not whole numbers from 0"),
        ('{"tokens": [1, true]}', "not whole numbers from 0"),
        ('{"tokens": [-1]}', "not whole numbers from 0"),
        ('{"id": 1, "tokens": [1]}\n{"id": "1", "tokens": [1]}', "line 2: the id '1' is taken"),
        (None, "cannot be read"),
    ],
)
def test_a_token_file_that_cannot_be_is_refused(tmp_path, text, message):
    if text is not None:
        (tmp_path / "ids.jsonl").write_text(text)
    with pytest.raises(InputError) as refused:
        read_token_file(tmp_path / "ids.jsonl")
    assert message in str(refused.value)


# ----------------------------------------------------------------------------------------------------------- cells
def cell(**changed) -> Cell:
    fields = {
        "model": "m", "source": "/here/m", "weights": "abc", "prompt": "p", "ids": (0, 5), "layers": ((3,), (6, 7)),
        "settings": cells.shared_settings(Study(("m",))),
    }  # fmt: skip
    return Cell(**{**fields, **changed})


def test_a_cell_is_named_by_its_content():
    one = cell()
    content = {
        "format": results.FORMAT, "model": "m", "weights": "abc", "prompt": "p", "ids": [0, 5], "layers": [[3], [6, 7]],
        "settings": {
            "kinds": ["secondary", "primary-like"], "sinks_per_prompt": None, "factors": [0.0, 0.25, 0.5, 1.0, 2.0, 4.0],
            "interventions": ["rescale"], "outcomes": [], "functions": {}, "loss": False, "kl": False, "min_queries": 16,
            "device": "cpu", "path": "auto", "threads": 1, "seed": "study", "thresholds": {"min_queries": 16},
        },
    }  # fmt: skip
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    assert one.name == hashlib.sha256(text.encode()).hexdigest()[:32]
    assert cell(source="/there/m").name == cell(memory=2.0).name == one.name
    others = [
        cell(model="n"), cell(weights="abd"), cell(prompt="q"), cell(ids=(0, 6)), cell(layers=((3,),)), cell(layers=None),
        *(cell(settings=cells.shared_settings(Study(("m",), **changed))) for changed in (
            {"kinds": ["primary"]}, {"sinks_per_prompt": 1}, {"factors": [0]}, {"loss": True}, {"min_queries": 15},
            {"device": "cuda"}, {"path": "reference"}, {"threads": 2}, {"seed": "s"}, {"thresholds": {"cosine": 0.8}},
            {"kl": True}, {"interventions": ["math:copysign"]}, {"outcomes": ["math:hypot"]},
        )),
    ]  # fmt: skip
    assert len({one.name, *(other.name for other in others)}) == 20


@given(
    n_layers=st.integers(1, 40), per_cell=st.integers(1, 12), n_prompts=st.integers(1, 4),
    joint=st.lists(st.sets(st.integers(0, 39), min_size=1, max_size=3).map(sorted), min_size=1, max_size=9, unique_by=tuple),
    everything=st.booleans(),
)  # fmt: skip
def test_cells_cover_every_layer_of_every_prompt_once(n_layers, per_cell, n_prompts, joint, everything):
    made = Study(("m",), layers="all" if everything else joint, layers_per_cell=per_cell)
    prompts = tuple((f"p{i}", (i,)) for i in range(n_prompts))
    question = Question("m", "m", prompts, None, False, cells.shared_settings(made))
    facts = Facts("w", n_layers, tuple(ids for _, ids in prompts))
    highest = 0 if everything else max(max(group) for group in joint)
    if highest >= n_layers:
        with pytest.raises(InputError, match=f"layer {highest} is out of range: m has layers 0..{n_layers - 1}"):
            cells.cells_of(made, question, facts)
        return
    planned = cells.cells_of(made, question, facts)
    groups = [(layer,) for layer in range(n_layers)] if everything else [tuple(group) for group in joint]
    covered = [(one.prompt, group) for one in planned for group in one.layers]
    assert sorted(covered) == sorted((name, group) for name, _ in prompts for group in groups)
    sizes = [len(one.layers) for one in planned]
    assert max(sizes) <= per_cell and max(sizes) - min(sizes) <= 1
    assert len({one.name for one in planned}) == len(planned)


def test_a_draw_is_of_the_right_sinks_and_grows_with_its_limit():
    table = pd.DataFrame(
        {"prompt": ["a"] * 8 + ["b"] * 3, "kind": ["secondary"] * 6 + ["primary"] + ["secondary"] * 4,
         "score": [0.1, np.nan, *[0.1] * 9], "pos": range(11)}
    )  # fmt: skip
    found = sc.Sinks(table, ("a", "b"), None)
    allowed = [0, 2, 3, 4, 5, 7, 8, 9, 10]
    assert list(cells.drawn(found, ["secondary"], None, "s").table["pos"]) == allowed
    before: set[int] = set()
    for limit in range(1, 8):
        drawn = cells.drawn(found, ["secondary"], limit, "s").table
        assert list(drawn.groupby("prompt").size()) == [min(limit, 6), min(limit, 3)]
        assert before <= set(drawn["pos"]) <= set(allowed) and list(drawn["pos"]) == sorted(drawn["pos"])
        before = set(drawn["pos"])
    draws = {tuple(cells.drawn(found, ["secondary"], 2, f"seed {i}").table["pos"]) for i in range(20)}
    assert len(draws) > 5
    alone = sc.Sinks(table[table["prompt"] == "b"], ("b",), None)  # a prompt's draw does not depend on the others
    drawn = cells.drawn(found, ["secondary"], 2, "s").table
    assert list(cells.drawn(alone, ["secondary"], 2, "s").table["pos"]) == list(drawn[drawn["prompt"] == "b"]["pos"])


# ---------------------------------------------------------------------------------------------------------- values
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


# -------------------------------------------------------------------------------------------------------- going on
def test_what_is_there_is_not_computed_again(tmp_path, monkeypatch):
    folder = copied(tmp_path / "s")
    with counted(monkeypatch) as calls:
        result = sweep(study(), folder, verbose=False)
    assert not calls
    assert contents(folder) == contents(finished().folder)
    pd.testing.assert_frame_equal(result.table, finished().table)
    pd.testing.assert_frame_equal(load_sweep(folder).cells, finished().cells)


def test_missing_and_damaged_cells_are_computed_again(tmp_path, monkeypatch):
    folder = copied(tmp_path / "s")
    files = cell_files(folder)
    whole = [path.read_bytes() for path in files]
    files[0].unlink()
    for path, damaged in zip(files[1:], (b"", whole[2][:1000], whole[3][:-1], whole[5], b"{" * 5000), strict=True):
        path.write_bytes(damaged)
    (folder / ".cell.safetensors.abc.part").write_bytes(b"half")
    before = load_sweep(folder)
    assert list(before.cells["state"]) == ["missing"] * 6 and not len(before.table)
    with counted(monkeypatch) as calls:
        sweep(study(), folder, verbose=False)
    assert len(calls) == 6
    assert contents(folder) == contents(finished().folder)


def interrupted(folder: Path, prepare=lambda: None, moment: float | None = None) -> int:
    """Sweep in a forked process, killed at `moment` (seconds) or by what `prepare()` has arranged there; its exit code."""
    finished()  # what is shared is made before the fork
    process = multiprocessing.get_context("fork").Process(target=_sweep_in_child, args=(folder, prepare))
    process.start()
    process.join(DEADLINE if moment is None else moment)
    if moment is not None:
        process.kill()
        process.join()
    return process.exitcode


def _sweep_in_child(folder: Path, prepare) -> None:
    prepare()
    sweep(study(), folder, verbose=False)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Dying:
    """Makes the `count`-th file that a process writes into `folder` its last: killed `when` "half", "before" or "after"."""

    def __init__(self, folder: Path, count: int, when: str):
        self.folder, self.count, self.when, self.seen = folder, count, when, 0

    def __call__(self) -> None:
        whole, replace = Path.write_bytes, os.replace

        def half(path, content):
            if self.when == "half" and path.parent == self.folder and self.seen + 1 == self.count:
                whole(path, content[: len(content) // 2])
                die()
            return whole(path, content)

        def moved(source, target):
            self.seen += Path(target).parent == self.folder
            if self.when == "before" and self.seen == self.count:
                die()
            replace(source, target)
            if self.when == "after" and self.seen == self.count:
                die()

        Path.write_bytes, os.replace = half, moved


@pytest.mark.parametrize("when", ["half", "before", "after"])
def test_killed_at_any_write_it_goes_on(tmp_path, when):
    """Files are written in order: the study, the plan, then the cells; the count starts again with every run."""
    for count in (1, 2, 4):
        assert interrupted(tmp_path / "s", Dying(tmp_path / "s", count, when)) == -signal.SIGKILL
        for path in cell_files(tmp_path / "s"):
            assert path.read_bytes() == (finished().folder / path.name).read_bytes()
        if (tmp_path / "s" / sweeps.STUDY).exists():
            assert set(load_sweep(tmp_path / "s").cells["state"]) <= {"done", "missing"}
    sweep(study(), tmp_path / "s", verbose=False)
    assert contents(tmp_path / "s") == contents(finished().folder)


@pytest.mark.parametrize(("seed", "kills"), [(0, 3), pytest.param(1, 50, marks=pytest.mark.slow)])
def test_killed_at_random_moments_it_goes_on(tmp_path, seed, kills):
    draw = random.Random(f"kills/{seed}")
    started = time.monotonic()
    assert interrupted(tmp_path / "uninterrupted") == 0
    duration = time.monotonic() - started
    for _ in range(kills):
        interrupted(tmp_path / "s", moment=draw.uniform(0, duration))
    sweep(study(), tmp_path / "s", verbose=False)
    assert contents(tmp_path / "s") == contents(tmp_path / "uninterrupted") == contents(finished().folder)


# --------------------------------------------------------------------------------------------------------- refusals
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


# --------------------------------------------------------------------------------------------------------- failures
def failing(monkeypatch, error: Exception):
    original = cells.measured

    def measured(model, one):
        if one.prompt == "b":
            raise error
        return original(model, one)

    monkeypatch.setattr(cells, "measured", measured)


def test_a_cell_that_fails_is_reported_and_does_not_stop_the_rest(tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        failing(patch, RuntimeError("no luck\nat all"))
        result = sweep(study(), tmp_path / "s")
    assert list(result.cells["state"]) == ["done"] * 2 + ["failed"] * 2 + ["done"] * 2 and not result.complete
    assert all(cause.startswith("RuntimeError: no luck (test_sweeps.py, line ") for cause in result.failed["cause"])
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


# ----------------------------------------------------------------------------------------------------- command line
def write_study(path: Path, **changed) -> Path:
    made = study(**changed).to_dict()
    lines = [
        f"{name} = {json.dumps(made[name])}"
        for name in ("models", "kinds", "layers", "factors", "layers_per_cell", "loss")
    ]
    path.write_text("\n".join([*lines, f"prompts = {{tokens = {json.dumps(made['prompts']['tokens'])}}}"]))
    return path


def test_the_command_sweeps_and_says_what_failed(tmp_path, monkeypatch, capsys):
    command = ["sweep", str(write_study(tmp_path / "study.toml")), "--folder", str(tmp_path / "s"), "--quiet"]
    with monkeypatch.context() as patch:
        failing(patch, RuntimeError("no luck"))
        assert cli.main(command) == 1
    said = capsys.readouterr()
    assert "6 cells: 4 done, 2 failed." in said.out and "1 prompts without such sinks" in said.out
    assert "prompt b, layers 2, 6+7" in said.out and "RuntimeError: no luck" in said.out and not said.err
    assert cli.main(command) == 0
    said = capsys.readouterr()
    assert "6 cells: 6 done, 0 failed." in said.out and "6+7" in said.out.splitlines()[2]
    summary = pd.read_csv(tmp_path / "s" / "summary.csv", dtype={"layers": str})
    pd.testing.assert_frame_equal(summary, finished().summary(), check_dtype=False)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--workers", "-1"], "--workers -1: at least 0"),
        (["--workers", "2", "--scheduler", "tcp://127.0.0.1:1"], "give one of them"),
        (["--scheduler", ""], "--scheduler is empty"),
    ],
)
def test_the_command_refuses_in_one_sentence(tmp_path, capsys, arguments, message):
    assert (
        cli.main(["sweep", str(write_study(tmp_path / "study.toml")), "--folder", str(tmp_path / "s"), *arguments]) == 2
    )
    assert message in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


def test_the_help_is_light():
    program = (
        "import sys\nfrom sink_circuits import cli\n"
        "try: cli.main(['sweep', '--help'])\nexcept SystemExit: pass\n"
        "assert not {'torch', 'pandas', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    assert "study.toml" in done.stdout and "--scheduler" in done.stdout


# ------------------------------------------------------------------------------------------------- real processes
def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def wait_for(condition, process: subprocess.Popen | None = None):
    """The first true value of `condition()`, looked at until the deadline, or until `process` has ended."""
    deadline = time.monotonic() + DEADLINE
    while time.monotonic() < deadline:
        if value := condition():
            return value
        if process is not None and process.poll() is not None:
            return condition()
        time.sleep(0.02)
    raise AssertionError("waited too long")


@pytest.mark.slow
def test_a_process_pool_gives_the_same_bytes(tmp_path):
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(2, context) as pool:
        sweep(study(), tmp_path / "s", pool, verbose=False)
    assert contents(tmp_path / "s") == contents(finished().folder)


@pytest.mark.slow
def test_a_killed_worker_costs_its_cell_a_second_try_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    with WorkerPool(2) as pool, concurrent.futures.ThreadPoolExecutor(1) as aside:
        running = aside.submit(sweep, study(layers="all", layers_per_cell=4), tmp_path / "s", pool, verbose=False)
        wait_for(lambda: cell_files(tmp_path / "s") or running.done())
        victim = next(iter(pool._pools[0]._processes))
        os.kill(victim, signal.SIGKILL)
        result = running.result(DEADLINE)
    assert len(pool._pools) == 3  # two, and the one that took the dead one's place
    assert result.complete
    again = sweep(study(layers="all", layers_per_cell=4), tmp_path / "here", verbose=False)
    assert contents(tmp_path / "s") == contents(again.folder)


@pytest.mark.slow
def test_a_broken_pool_is_reported_for_every_cell_it_owed(tmp_path):
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, context) as pool, concurrent.futures.ThreadPoolExecutor(1) as aside:
        running = aside.submit(sweep, study(layers="all", layers_per_cell=1), tmp_path / "s", pool, verbose=False)
        wait_for(lambda: cell_files(tmp_path / "s") or running.done())
        os.kill(next(iter(pool._processes)), signal.SIGKILL)
        result = running.result(DEADLINE)
    assert set(result.cells["state"]) == {"done", "failed"}
    assert all("BrokenProcessPool" in cause for cause in result.failed["cause"])
    assert sweep(study(layers="all", layers_per_cell=1), tmp_path / "s", verbose=False).complete


def start_command(study_file: Path, folder: Path, *arguments: str) -> subprocess.Popen:
    command = [
        sys.executable,
        "-m",
        "sink_circuits.cli",
        "sweep",
        str(study_file),
        "--folder",
        str(folder),
        "--quiet",
        *arguments,
    ]
    return subprocess.Popen(
        command, env=environment(), start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("whole_group", [True, False])
def test_a_killed_command_goes_on(tmp_path, whole_group):
    """Killed with its workers, or alone: then the workers must leave by themselves."""
    study_file = write_study(tmp_path / "study.toml", layers=list(range(0, 24, 2)), layers_per_cell=1)
    draw = random.Random(f"command/{whole_group}")
    for _ in range(3 if whole_group else 1):
        process = start_command(study_file, tmp_path / "s", "--workers", "2")
        wanted = len(cell_files(tmp_path / "s")) + draw.randint(1, 6)
        wait_for(lambda wanted=wanted: len(cell_files(tmp_path / "s")) >= wanted, process)
        (os.killpg if whole_group else os.kill)(process.pid, signal.SIGKILL)
        process.wait(DEADLINE)
        wait_for(lambda process=process: _gone(process.pid))
    process = start_command(study_file, tmp_path / "s", "--workers", "2")
    assert process.wait(DEADLINE) == 0
    (tmp_path / "s" / "summary.csv").unlink()
    here = sweep(read_study(study_file), tmp_path / "here", verbose=False)
    assert contents(tmp_path / "s") == contents(here.folder)


def _gone(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.slow
def test_a_dask_cluster_that_loses_a_worker_gives_the_same_bytes(tmp_path):
    distributed = pytest.importorskip("distributed")
    address_file, processes = tmp_path / "scheduler.json", []

    def start(module: str, *arguments: str) -> subprocess.Popen:
        with open(tmp_path / f"log-{len(processes)}.txt", "w") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", f"distributed.cli.{module}", *arguments], env=environment(), cwd=tmp_path, stdout=log, stderr=log
            )  # fmt: skip
        processes.append(process)
        return process

    try:
        start(
            "dask_scheduler",
            "--host",
            "127.0.0.1",
            "--port",
            "0",
            "--no-dashboard",
            "--scheduler-file",
            str(address_file),
        )
        address = wait_for(
            lambda: (
                address_file.exists() and address_file.read_text() and json.loads(address_file.read_text())["address"]
            )
        )
        options = ("--host", "127.0.0.1", "--nthreads", "1", "--no-nanny", "--no-dashboard", "--death-timeout", "60")
        workers = [start("dask_worker", address, *options) for _ in range(2)]
        made = study(layers=list(range(0, 24, 2)), layers_per_cell=1)
        with (
            distributed.Client(address, set_as_default=False) as client,
            concurrent.futures.ThreadPoolExecutor(1) as aside,
        ):
            client.wait_for_workers(2, timeout=DEADLINE)
            running = aside.submit(sweep, made, tmp_path / "s", client, verbose=False)
            wait_for(lambda: len(cell_files(tmp_path / "s")) >= 3 or running.done())
            workers[0].kill()
            assert not running.done()
            result = running.result(DEADLINE)
        assert workers[0].wait(DEADLINE) == -signal.SIGKILL and workers[1].poll() is None
    finally:
        for process in reversed(processes):
            process.kill()
            process.wait()
    assert result.complete
    assert contents(tmp_path / "s") == contents(sweep(made, tmp_path / "here", verbose=False).folder)


@pytest.mark.slow
def test_the_command_speaks_to_a_scheduler(tmp_path, capsys):
    distributed = pytest.importorskip("distributed")
    study_file = write_study(tmp_path / "study.toml")
    options = {
        "n_workers": 1,
        "threads_per_worker": 1,
        "processes": False,
        "dashboard_address": None,
        "host": "127.0.0.1",
    }
    with distributed.LocalCluster(**options, protocol="tcp://") as cluster:
        command = [
            "sweep",
            str(study_file),
            "--folder",
            str(tmp_path / "s"),
            "--quiet",
            "--scheduler",
            cluster.scheduler_address,
        ]
        assert cli.main(command) == 0
    cells.release_model()
    (tmp_path / "s" / "summary.csv").unlink()
    assert contents(tmp_path / "s") == contents(finished().folder)
