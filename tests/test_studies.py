"""Studies, as files and objects: what is read, what is refused, and the texts that they name."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from planted_sweep import ROOT, ids_of, place

import sink_circuits as sc
from sink_circuits import cells, experiments, scores, sweeps
from sink_circuits.errors import InputError
from sink_circuits.studies import Study, Texts, read_study, read_token_file


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


def refused(path: Path, text: str | None, read, message: str) -> None:
    """A file of this text, or none where it is None."""
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError) as error:
        read(path)
    assert message in str(error.value)


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
    refused(tmp_path / "study.toml", text, read_study, message)


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
    refused(tmp_path / "ids.jsonl", text, read_token_file, message)
