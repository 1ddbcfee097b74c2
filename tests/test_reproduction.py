"""From prompts to figures: what stands in the files is what was planted, and a folder goes on where it was stopped."""

import dataclasses
import functools
import json
import re
from typing import get_args

import numpy as np
import pandas as pd
import pytest
import torch
from common import REAL, by_hand, no_forward_pass, subject
from test_figures import Elements, assert_no_foreign_markup, strings
from test_generation import words

import sink_circuits as sc
from sink_circuits import anatomy, reproduction, study_figures, study_folder
from sink_circuits.cli import main
from sink_circuits.detection import Sinks
from sink_circuits.errors import InputError, ModelError, ResultError
from sink_circuits.generation import Decoding
from sink_circuits.prompts import Prompt, PromptSet
from sink_circuits.records import read_records
from sink_circuits.reproduce_command import Figure, named
from sink_circuits.reproduction import Plan, reproduce

torch.set_num_threads(1)
PLACES = {"a": (30,), "b": (25, 50), "c": ()}  # of the secondary sinks


def text(ids) -> str:
    return " ".join(f"w{int(one)}" for one in ids)


PROMPTS = PromptSet(
    tuple(Prompt(name, "t", text(subject().tokens(96, places, seed_name=name))) for name, places in PLACES.items())
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The planted model as a folder in Hugging Face format, with a token for each word."""
    made = tmp_path_factory.mktemp("models") / "planted"
    subject().hf_model.save_pretrained(made)
    words(64).save_pretrained(made)
    return str(made)


@functools.cache
def model(name: str = "planted"):
    """The planted model, or "bare", the same without any sink, with a tokenizer of its own."""
    made = subject(*(() if name == "planted" else ("primary", "secondary", "stand_in", "decoy"))).bridge()
    made.tokenizer, made.cfg.model_name = words(64), name
    return made


ALL = {"figures": reproduction.FIGURE_NAMES, "formats": ("html",)}
FEW = ("levels", "norms_by_layer", "mlp_stages")


def study(models, out, plan=None, **options):
    """Few figures, undrawn, where only the folder matters."""
    return reproduce(models, plan or Plan(PROMPTS), out, **{"figures": FEW, "formats": (), "verbose": False} | options)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    out = tmp_path_factory.mktemp("study") / "out"
    return study([model()], out, **ALL, command="sink-circuits reproduce <planted>")


def stamps(folder) -> dict:
    return {
        str(path.relative_to(folder)): path.stat().st_mtime_ns for path in sorted(folder.rglob("*")) if path.is_file()
    }


def state_of(made, model="planted") -> dict:
    return {one.figure: one.state for one in made.figures if one.model == model}


# What is in the files.


def test_every_row_of_the_study_has_its_figure(done):
    absent = {"pca", "clustering"}  # a planted token of that kind is a sink wherever it stands
    assert state_of(done) == {f.name: "absent" if f.name in absent else "made" for f in study_figures.FIGURES}
    assert state_of(done, "") == {"levels": "made"}
    for folder, name in [(done.folder / "planted", f.name) for f in study_figures.FIGURES] + [(done.folder, "levels")]:
        endings = () if name in absent else ("parquet", "csv", "html", "safetensors")
        assert {path.name for path in folder.glob(f"{name}.*")} == {f"{name}.{ending}" for ending in (*endings, "json")}
    assert not done.failed


def test_the_table_of_sinks_is_what_was_planted(done):
    table = Sinks.load(done.folder / "planted" / "sinks.parquet").table
    rows = table[["prompt", "pos", "kind", "l_start", "l_end"]].itertuples(index=False, name=None)
    places = [(name, pos) for name, positions in PLACES.items() for pos in positions]
    expected = [(name, 0, "primary", 2, 20) for name in PLACES] + [
        (name, pos, "secondary", 6, 12) for name, pos in places
    ]
    assert sorted(rows) == sorted(expected)
    assert pd.read_csv(done.folder / "planted" / "sinks.csv")["pos"].tolist() == table["pos"].tolist()


def test_norms_are_those_of_the_hand_written_pass(done):
    frame = pd.read_parquet(done.folder / "planted" / "norms_by_layer.parquet")
    assert pd.read_csv(done.folder / "planted" / "norms_by_layer.csv").shape == frame.shape
    run = by_hand(subject().tokens(96, PLACES["b"], seed_name="b"))
    for pos in (0, *PLACES["b"]):
        own = frame[(frame["prompt"] == "b") & (frame["pos"] == pos)].sort_values("layer")
        np.testing.assert_allclose(own["hidden"], run.residuals[:, pos].norm(dim=-1), rtol=1e-4)
    assert set(frame["kind"]) == {"primary", "secondary", "rest"}


def test_levels_count_what_was_planted(done):
    frame = pd.read_parquet(done.folder / "levels.parquet")
    found = {(row.l_start, row.lifetime): row.count for row in frame[frame["count"] > 0].itertuples(index=False)}
    assert found == {(2, 19): 3, (6, 7): 3}
    assert anatomy.Anatomy.load(done.folder / "levels.safetensors").manifest.n_prompts == 3


def test_stages_are_taken_at_the_layer_where_a_sink_begins(done):
    result = anatomy.Anatomy.load(done.folder / "planted" / "mlp_stages.safetensors")
    assert result.data["layer"].to_numpy().tolist() == [6, 6, 6]
    assert float(result.data["direction"].sel(stage="output").min()) > 0.99, (
        "the planted write is along the primary's direction"
    )


def test_the_page_shows_what_is_there_and_says_what_is_not(done):
    page = done.index.read_text("utf-8")
    elements = Elements(page)
    assert page.count("There is none for these texts") == 2 and "give more or longer prompts" in page
    links = [
        value for _, attributes in elements.attributes for name, value in attributes.items() if name in ("href", "src")
    ]
    local = [link for link in links if not link.startswith("#")]
    assert {"planted/norms_by_layer.html", "planted/sinks.csv", "levels.parquet"} <= set(local)
    assert all((done.folder / link).is_file() for link in local)
    assert (
        "sink-circuits reproduce &lt;planted&gt;" in page
        and "3 prompts" in page
        and "http" not in re.sub(r"http-equiv", "", page)
    )
    assert "3 primary, 3 secondary" in page


def test_pages_of_figures_share_one_library(done):
    pages = sorted(done.folder.rglob("*.html"))
    assert len(pages) == 6 and (done.folder / "plotly.min.js").stat().st_size > 3_000_000
    for page in pages:
        if page.name == "index.html":
            continue
        assert page.stat().st_size < 500_000
        (script,) = (a["src"] for _, a in Elements(page.read_text("utf-8")).attributes if "src" in a)
        assert (page.parent / script).resolve() == (done.folder / "plotly.min.js").resolve()


def test_a_library_that_is_gone_is_written_again(tmp_path):
    options = {"figures": ("levels",), "formats": ("html",)}
    made = study([model()], tmp_path / "out", **options)
    (made.folder / "plotly.min.js").unlink()
    study([model()], made.folder, **options)
    assert (made.folder / "plotly.min.js").is_file()


@pytest.mark.parametrize(("formats", "n_links"), [((), 0), (("html",), 1)])
def test_a_page_without_pictures_says_so_and_leads_nowhere_else(tmp_path, formats, n_links):
    page = study([model()], tmp_path / "out", figures=("levels",), formats=formats).index.read_text("utf-8")
    assert "There is no picture here" in page and "None" not in page
    assert page.count("The figure as a page") == n_links


def test_a_prompts_name_is_no_markup(tmp_path):
    hostile = PromptSet((dataclasses.replace(PROMPTS[0], id="<script>alert(1)</script>\u202e"),))
    page = study([model()], tmp_path / "out", Plan(hostile)).index.read_text("utf-8")
    assert "script" not in Elements(page).names and "\u202e" not in page
    assert "&lt;script&gt;" in page


def test_tokens_of_hostile_text_are_no_markup(tmp_path):
    token = "<img/src=x/onerror=alert(1)>\u202e<b>bold</b>\u05e9\u05dc\u05d5\u05dd"
    hostile = subject().bridge()
    vocabulary = {(token if i == 1 else f"w{i}"): i for i in range(64)}  # w1 forms a sink
    hostile.tokenizer, hostile.cfg.model_name = words(64, vocabulary), "<i>planted"
    prompts = PromptSet(tuple(dataclasses.replace(p, text=re.sub(r"\bw1\b", token, p.text)) for p in PROMPTS))
    made = study([hostile], tmp_path / "out", Plan(prompts), **ALL)
    page = made.index.read_text("utf-8")
    assert "alert(1)" in page and "\u202e" not in page and "\u05e9" in page
    assert not {"script"} & set(Elements(page).names)
    assert not [a for tag, a in Elements(page).attributes if "onerror" in a or (tag == "img" and a["src"] == "x")]
    drawn = [path.read_text("utf-8") for path in made.folder.rglob("*.html") if path != made.index]
    texts = [json.loads(re.search(r'id="data">(.*?)</script>', one, re.DOTALL)[1]) for one in drawn]
    assert len(texts) == 5
    assert_no_foreign_markup(texts)
    assert any("&lt;b&gt;bold" in text for text in strings(texts))


# Going on.


def test_what_is_there_is_not_made_again(done):
    before = stamps(done.folder)
    with no_forward_pass():
        again = study([model()], done.folder, **ALL, command="sink-circuits reproduce <planted>")
    assert again.figures == done.figures
    after = stamps(done.folder)
    assert {name for name in before if before[name] != after[name]} == {"index.html"}


def test_a_file_that_is_gone_is_made_again_alone(tmp_path):
    first = study([model()], tmp_path / "out")
    before = stamps(first.folder)
    (first.folder / "planted" / "mlp_stages.csv").unlink()
    study([model()], first.folder)
    after = stamps(first.folder)
    changed = {name for name in after if before.get(name) != after[name]}
    assert changed == {f"planted/mlp_stages.{e}" for e in ("csv", "parquet", "safetensors", "json")} | {
        "index.html",
        "plan.json",
    }


def test_an_interrupted_study_goes_on(tmp_path, monkeypatch):
    figures, calls = list(study_figures.FIGURES), []

    def interrupt(subject):
        calls.append(subject)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return figures[1].make(subject)

    monkeypatch.setattr(reproduction, "FIGURES", (figures[0], dataclasses.replace(figures[1], make=interrupt)))
    with pytest.raises(KeyboardInterrupt, match="the same command goes on"):
        study([model()], tmp_path / "out")
    assert "Not made yet" in (tmp_path / "out" / "index.html").read_text("utf-8")
    before = stamps(tmp_path / "out")
    assert state_of(study([model()], tmp_path / "out"))["mlp_stages"] == "made"
    after = stamps(tmp_path / "out")
    assert all(before[name] == after[name] for name in before if name.startswith("planted/norms") or "sinks" in name)


def test_other_settings_need_another_folder_or_overwrite(tmp_path):
    first = study([model()], tmp_path / "out")
    shorter = Plan(PROMPTS, max_tokens=60)
    before = stamps(first.folder)
    with pytest.raises(
        ResultError, match="was made with max_tokens None, not 60: choose another one, or pass overwrite"
    ):
        study([model()], first.folder, shorter)
    assert stamps(first.folder) == before
    (first.folder / "planted" / "mine.txt").write_text("kept")
    assert not study([model("bare")], first.folder, shorter, overwrite=True).failed
    assert (first.folder / "planted" / "mine.txt").read_text() == "kept"
    assert [p.name for p in (first.folder / "planted").iterdir()] == ["mine.txt"], (
        "figures of the old settings are left"
    )
    assert study_folder.models_in(first.folder) == ["bare"]


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ResultError, match="holds something else"):
        study([model()], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


# Many models, and what cannot be made.


def test_models_without_sinks_or_that_cannot_be_loaded_do_not_stop_the_others(tmp_path):
    few = ("levels", "norms_by_layer", "matrix_entropy")
    made = study([model("bare"), "no/such/model", model()], tmp_path / "out", figures=few)
    assert state_of(made, "bare") == {"norms_by_layer": "absent", "matrix_entropy": "made"}, "entropy needs no sink"
    (failed,) = made.failed
    assert failed.model == "model" and "no/such/model" in failed.reason
    frame = pd.read_parquet(made.folder / "levels.parquet")
    assert set(frame["model"]) == {"bare", "planted"}
    page = made.index.read_text("utf-8")
    assert "What failed" in page and "None were found in these texts" in page
    later = study([model()], made.folder, figures=few)
    assert {one.model for one in later.figures} == {"", "bare", "planted"}, "the page keeps the models of earlier runs"


def test_a_single_model_that_cannot_be_loaded_is_an_error_and_writes_nothing(tmp_path):
    with pytest.raises(ModelError, match="no/such/model"):
        study(["no/such/model"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_figure_that_fails_is_told_and_tried_again(tmp_path, monkeypatch):
    def broken(subject):
        raise RuntimeError("out of luck")

    with monkeypatch.context() as patch:
        patch.setattr(
            reproduction,
            "FIGURES",
            (dataclasses.replace(study_figures.FIGURES[0], make=broken), *study_figures.FIGURES[1:]),
        )
        made = study([model()], tmp_path / "out")
    (failed,) = made.failed
    assert (failed.figure, failed.reason) == ("norms_by_layer", "RuntimeError: out of luck")
    assert "out of luck" in made.index.read_text("utf-8")
    assert state_of(made)["mlp_stages"] == "made"
    assert not study([model()], tmp_path / "out").failed


@pytest.mark.parametrize(
    ("models", "options", "message"),
    [
        (["x/planted", "y/planted"], {}, "two models are named 'planted'"),
        ([], {}, "nothing to reproduce"),
        (["planted"], {"records": {"planted": []}}, "records and a model would both be called 'planted'"),
        (["planted"], {"records": {"planted ": []}}, "records and a model would both be called 'planted'"),
        (["planted"], {"records": {"a b": [], "a_b": []}}, "records 'a b' and 'a_b' would share a file"),
        (["planted"], {"formats": ("html", "gif")}, "format 'gif' is unknown"),
        (["planted"], {"figures": ("figure 9",)}, "figure 'figure 9' is unknown: use levels, norms_by_layer"),
    ],
)
def test_studies_of_nothing_are_refused(tmp_path, models, options, message):
    with pytest.raises(InputError, match=message):
        study(models, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kinds": ("noise",)}, "kind 'noise' is unknown: here use secondary, primary-like"),
        ({"kinds": ()}, "at least one kind of sink"),
        ({"method": "best"}, "method 'best'"),
        ({"thresholds": {"cosinus": 1}}, "threshold 'cosinus' is unknown"),
        ({"chat": True, "decoding": Decoding()}, "give decoding the chat of the plan"),
    ],
)
def test_plans_that_are_none_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        Plan(PROMPTS, **options)


def test_the_command_offers_every_figure():
    assert get_args(Figure) == reproduction.FIGURE_NAMES


def test_names_are_safe_for_a_folder():
    assert reproduction.name_of("org/Name-1.5@abc") == "Name-1.5@abc"
    assert reproduction.name_of("/x/my model/") == "my_model"
    assert reproduction.name_of("..") == "model"
    assert reproduction.name_of("x/records") == "records_"


# Records of the published code.

PUBLISHED = """\
{"candidate_sinks": {"0": {"layer": [4, 5, 6, 7, 8, 9, 10, 11], "token_id": 151646, "sink_type": "bos_sink"}, \
"65": {"layer": [6, 7, 8, 9, 10], "token_id": 220, "sink_type": "cliff"}, "12": {"layer": [7, 9], "token_id": 16, "sink_type": "noise"}}, \
"sample_index": 0, "prompt_len": 20, "response_len": 80, "full_text_len": 100}
{"candidate_sinks": {"0": {"layer": [4, 5, 6, 7, 8, 9, 10, 11], "token_id": 151646, "sink_type": "bos_sink"}, \
"31": {"layer": [6, 7, 8, 9, 10], "token_id": 61, "sink_type": "secondary"}}, \
"sample_index": 1, "prompt_len": 22, "response_len": 60, "full_text_len": 82}
"""


@functools.cache
def published_levels() -> dict:
    """By hand: (first layer, number of layers) of every candidate, as the study's notebook counts them."""
    return {(4, 8): 2, (6, 5): 2, (7, 2): 1}


def counted(folder, model: str) -> dict:
    frame = pd.read_parquet(folder / "levels.parquet")
    own = frame[(frame["model"] == model) & (frame["count"] > 0)]
    return {(row.l_start, row.lifetime): row.count for row in own.itertuples(index=False)}


def test_figure_2_from_published_records_alone(tmp_path, capsys):
    file = tmp_path / "qwen" / "sink_detection.jsonl"
    file.parent.mkdir()
    file.write_text(PUBLISHED, "utf-8")
    out = tmp_path / "out"
    command = [
        "reproduce",
        "--records",
        str(file),
        f"twice={file}",
        f"twice={file}",
        "--out",
        str(out),
        "--formats",
        "html",
    ]
    assert main([*command, "--quiet"]) == 0
    assert counted(out, "qwen-sink_detection") == published_levels()
    assert counted(out, "twice") == {level: 2 * n for level, n in published_levels().items()}
    assert "Figures: 1 made." in capsys.readouterr().out
    assert read_records(out / "records" / "twice.jsonl") == 2 * read_records(file)


def test_records_stand_beside_models(done, tmp_path):
    (tmp_path / "r.jsonl").write_text(PUBLISHED, "utf-8")
    made = study([model()], tmp_path / "out", records={"published": read_records(tmp_path / "r.jsonl")})
    assert counted(made.folder, "published") == published_levels()
    assert counted(made.folder, "planted") == {(2, 19): 3, (6, 7): 3}


def test_names_of_record_files(tmp_path):
    assert named("a=b/c.jsonl") == ("a", "b/c.jsonl")
    assert named("b/c.jsonl") == ("b-c", "b/c.jsonl")
    assert named("c.jsonl") == ("c", "c.jsonl")


# The published procedure, answers, chat.


def test_figures_of_other_sinks_are_not_kept(tmp_path):
    """New weights, and one figure made anew: the others are of sinks that the folder no longer holds."""
    out = tmp_path / "out"
    study([model()], out)
    before = stamps(out)
    changed = model()
    with torch.no_grad():
        changed.original_model.lm_head.weight.mul_(1.5)
    made = study([changed], out, figures=("norms_by_layer",), overwrite=True)
    assert set(state_of(made)) == {"norms_by_layer"}
    made = study([changed], out)
    assert set(state_of(made)) == {"norms_by_layer", "mlp_stages"}
    after = stamps(out)
    assert after["planted/mlp_stages.safetensors"] != before["planted/mlp_stages.safetensors"]
    assert after["levels.safetensors"] != before["levels.safetensors"]
    fewer = Plan(PROMPTS[:1])
    made = study([changed], out, fewer, figures=("norms_by_layer",), overwrite=True)
    assert not list(out.glob("levels.*"))  # another plan's


def test_a_run_without_a_model_leaves_a_folder_that_can_be_used(tmp_path):
    with pytest.raises(ModelError):
        study([str(tmp_path / "nosuchmodel")], tmp_path / "out", formats=("html",))
    assert (tmp_path / "out" / "index.html").is_file()
    made = study([model()], tmp_path / "out")
    assert state_of(made)["mlp_stages"] == "made"


def test_official_records_are_written_and_drawn(tmp_path):
    made = study([model()], tmp_path / "out", Plan(PROMPTS, method="official"))
    records = read_records(made.folder / "planted" / "records.jsonl")
    for index, (record, places) in enumerate(zip(records, PLACES.values(), strict=True)):
        layers = {pos: list(sink.layers) for pos, sink in record.candidate_sinks.items()}
        assert layers == {0: list(range(2, 21)), **{pos: list(range(6, 13)) for pos in places}}
        assert (record.sample_index, record.prompt_len, record.response_len, record.full_text_len) == (index, 96, 0, 96)
    assert counted(made.folder, "planted") == {(2, 19): 3, (6, 7): 3}
    table = Sinks.load(made.folder / "planted" / "sinks.parquet").table
    primary = table[table["kind"] == "primary"]
    assert primary[["pos", "l_start", "l_end"]].to_numpy().tolist() == [[0, 2, 20]] * 3
    run = by_hand(subject().tokens(96, PLACES["b"], seed_name="b"))
    assert primary["norm"].iloc[1] == pytest.approx(run.residuals[2:21, 0].norm(dim=-1).max().item(), rel=1e-4)
    assert set(state_of(made).values()) == {"made"}


def test_a_model_answers_before_it_is_looked_at(tmp_path):
    plan = Plan(PROMPTS[:2], method="official", decoding=Decoding(6))
    made = study([model()], tmp_path / "out", plan)
    answers = [
        json.loads(line) for line in (made.folder / "planted" / "generations.jsonl").read_text("utf-8").splitlines()
    ]
    assert [line["id"] for line in answers] == ["a", "b"]
    for line, record in zip(answers, read_records(made.folder / "planted" / "records.jsonl"), strict=True):
        n_new = len(line["output"].split())
        assert n_new == 6 and (record.prompt_len, record.response_len, record.full_text_len) == (96, n_new, 96 + n_new)
    with no_forward_pass():
        study([model()], made.folder, plan)


def test_sinks_of_the_template_are_no_sinks_of_the_text(tmp_path):
    chatty = subject().bridge()
    chatty.tokenizer = words(64)
    chatty.tokenizer.chat_template = (
        "w0 w9 w9 w9 w9 w1 {{ messages[0]['content'] }} w1 w5"  # w1 forms a sink wherever it stands
    )
    prompts = PromptSet(tuple(dataclasses.replace(p, text=p.text.removeprefix("w0 ")) for p in PROMPTS))
    made = study([chatty], tmp_path / "out", Plan(prompts, chat=True))
    table = Sinks.load(next(made.folder.glob("*/sinks.parquet"))).table
    found = {(row.prompt, row.pos) for row in table.itertuples() if row.kind == "secondary"}
    assert found == {(name, pos + 5) for name, places in PLACES.items() for pos in places}
    assert (table["kind"] == "primary").sum() == 3
    plain = study(
        [chatty], tmp_path / "plain", Plan(PromptSet((Prompt("x", "t", f"w0 w9 w9 w9 w9 w1 {prompts[0].text}"),)))
    )
    table = Sinks.load(next(plain.folder.glob("*/sinks.parquet"))).table
    assert 5 in table["pos"].tolist(), "without a template the same token counts"


def test_the_command_says_what_it_made(folder, tmp_path, capsys):
    lines = tmp_path / "gsm8k.jsonl"
    lines.write_text("\n".join(json.dumps({"question": p.text, "answer": "#### 2"}) for p in PROMPTS), "utf-8")
    command = [
        "reproduce",
        folder,
        "--prompts",
        str(lines),
        "--out",
        str(tmp_path / "out"),
        "--formats",
        "html",
    ]
    command += ["--figures", "levels", "norms_by_layer", "clustering"]
    assert main([*command, "--n-prompts", "2"]) == 0
    out = capsys.readouterr().out
    assert "planted: Figure 1: norms by layer: " in out and "absent: planted, clustering: " in out
    assert "Figures: 2 made, 1 absent." in out and "index.html" in out
    assert main([*command, "--n-prompts", "3"]) == 2
    assert "was made with prompts" in capsys.readouterr().err
    assert main([*command, "--generate", "9"]) == 2
    assert "holds 3 prompts, ask for no more" in capsys.readouterr().err
    assert main([*command, "--wording", "Solve it."]) == 2
    assert "once is needed" in capsys.readouterr().err


@pytest.fixture(scope="module")
def real_study(tmp_path_factory):
    prompts = sc.load_prompts("maths", 3)
    return reproduce(REAL, Plan(prompts, max_tokens=256), tmp_path_factory.mktemp("real") / "out", verbose=False)


@pytest.mark.slow
def test_every_figure_of_both_bundled_models(real_study):
    assert not real_study.failed
    assert [one for one in real_study.figures if one.state == "absent"] == []
    for one in real_study.figures:
        folder = real_study.folder / one.model
        assert (folder / f"{one.figure}.svg").stat().st_size > 5_000 and not one.reason
        assert len(pd.read_parquet(folder / f"{one.figure}.parquet"))
    frame = pd.read_parquet(real_study.folder / "levels.parquet")
    assert set(frame["model"]) == set(REAL)


@pytest.mark.slow
def test_a_browser_shows_the_page_and_fetches_nothing(real_study, tmp_path):
    from test_report import CHROMIUM, browse

    if CHROMIUM is None:
        pytest.skip("no Chromium browser on this machine: the page cannot be opened")
    probe = """<script>addEventListener("load", () => { const shown = [...document.images].map((i) => i.naturalWidth > 100);
    document.documentElement.dataset.seen = JSON.stringify([shown.length, shown.every(Boolean),
    document.documentElement.scrollWidth <= innerWidth]); });
    </script>"""
    page = real_study.index.read_text("utf-8")
    probed = real_study.folder / "probed.html"
    probed.write_text(page.replace('<meta charset="utf-8">', f'<meta charset="utf-8">{probe}', 1), "utf-8")
    dom, log = browse(probed, tmp_path, "--dump-dom", size="900,1400")
    probed.unlink()
    made = sum(one.state == "made" for one in real_study.figures)
    assert f'data-seen="[{made},true,true]"' in dom, log[-2000:]
    assert not [line for line in log.splitlines() if "CONSOLE" in line and "GL" not in line]
    for figure in (real_study.folder / "levels.html", real_study.folder / REAL[0] / "norms_by_layer.html"):
        dom, log = browse(figure, tmp_path, "--dump-dom", size="900,1400")
        assert "main-svg" in dom and not [line for line in log.splitlines() if "CONSOLE" in line and "GL" not in line]
