"""`sink-circuits report`: one page from saved files; what does not fit is told in a sentence before anything is written."""

import html
import json
import re

import numpy as np
import pytest
from measured import NAMES, measured
from safetensors.numpy import save_file
from test_figures import Elements, assert_no_foreign_markup, strings
from test_report import browse, in_a_frame, needs_browser, probed, seen_in

import sink_circuits as sc
from sink_circuits import cli, figures, planted
from sink_circuits.anatomy import against_random
from sink_circuits.errors import ResultError
from sink_circuits.report import read_results, sinks_of
from sink_circuits.results import read_dataset, write_dataset
from sink_circuits.studies import Texts
from sink_circuits.token_scores import TokenScores

PARTS = (
    "layer_map", "ablate", "ablate_neurons", "controls", "paths", "mass", "claims", "writers", "neurons", "key_query_geometry",
    "mlp_stages", "token_scores", "attention_patterns",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    for name in PARTS:
        getattr(measured(), name).save(folder / f"{name}.safetensors")
    measured().found.save(folder / "sinks.parquet")
    return folder


@pytest.fixture(scope="module")
def page(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("page") / "page.html"
    assert cli.main(["report", str(folder), "--out", str(out), "--title", "A <b>title</b>"]) == 0
    return out.read_text("utf-8")


def run(capsys, *args) -> tuple[int, str]:
    code = cli.main(["report", *map(str, args)])
    return code, capsys.readouterr().err


# What is on the page.


def test_every_result_has_its_section_and_its_sentence(page):
    text = Elements(page).text
    for heading in (
        "Layer map", "Ablation", "Controls", "Paths", "Mass", "Claims", "Circuit", "Stages of the MLP", "Writers and erasers", "Neurons",
        "Keys and queries", "Attention patterns",
    ):  # fmt: skip
        assert re.search(f"<h3 id=[^>]*>{heading}", page), heading
    labels = re.findall(r'<strong><a href="#([^"]+)">([^<]+)\.</a></strong>', page)
    assert [label for _, label in labels] == [
        "Sinks",
        "Layer map",
        "Ablation",
        "Ablation of neurons",
        "Controls",
        "Paths",
        "Mass",
        "Claims",
        "Circuit",
    ]
    ids = {a["id"] for _, a in Elements(page).attributes if "id" in a}
    assert {target for target, _ in labels} <= ids
    row = against_random(measured().ablate_neurons).iloc[0]
    said = re.search(
        r"Removing the named neurons on 3 secondary sinks in 2 prompts: [^;]*; the difference is (\S+)", text
    )
    assert said and said[1].rstrip(".") == f"{row['difference']:.3g}".replace("-", "−"), (
        "one sentence, however many draws"
    )
    assert "Edit “random" not in text
    share = measured().paths.summary().query("outcome == 'log_odds' and kind == 'step'").set_index("part")["share"]
    assert f"{share['residual']:.0%} goes by the residual stream alone" in text.replace("−", "-")
    edges = json.loads(re.search(r'data-target="circuit-figure">(.*?)</script>', page).group(1))
    assert any("L6 MLP" in str(annotation.get("text")) for annotation in edges["layout"]["annotations"])


def test_tokens_and_names_stay_text(page):
    elements = Elements(page)
    assert not {"img", "svg", "i", "b", "iframe", "object", "link"} & set(elements.names)
    assert not [a for _, a in elements.attributes if any(name.startswith("on") for name in a)]
    assert "A <b>title</b>" in elements.text
    assert NAMES[0] in elements.text
    assert "\u202e" not in page
    assert len(page.encode()) < 5_000_000


def test_figures_hold_no_foreign_markup(page):
    """Titles, labels, legends and hover texts: plotly shows <b> as bold and <a> as a link."""
    drawn = re.findall(r'class="figure-data"[^>]*>(.*?)</script>', page, re.DOTALL)
    assert len(drawn) > 10
    assert_no_foreign_markup([json.loads(one) for one in drawn])
    assert any("&lt;b&gt;bold" in text for one in drawn for text in strings(json.loads(one))), "no token is shown"


def test_attention_patterns_stand_in_the_page_once_for_each_text(page):
    views = re.findall(r'data-component="AttentionHeads"[^>]*>(.*?)</script>', page, re.DOTALL)
    assert len(views) == len(NAMES)
    for view in views:
        assert len(view) < 300_000 and not {"<", ">", "&"} & set(view)
        data = json.loads(view)
        assert len(data["tokens"]) == 1 + 48 and any("</script>" in token for token in data["tokens"])
    assert page.count('id="library-circuitsvis"') == 1
    named = [
        summary for summary in re.findall("<summary>(.*?)</summary>", page) if summary.startswith("Attention patterns")
    ]
    shown = [html.escape(figures.visible(name, spaces=False)) for name in NAMES]
    assert named == [f"Attention patterns around the sinks of {name}, interactive (circuitsvis)" for name in shown]


def test_the_page_says_how_to_make_the_results_again(page):
    code = re.findall(r"<pre><code>(.*?)</code></pre>", page, re.DOTALL)[-1]
    for line in (
        "sc.find_sinks(model, tokens)", "sc.layer_map(model, tokens, treated)", "sc.ablate(model, tokens, treated, layers=[6, 7])",
        "sc.path_effects(model, tokens, treated, layer=6)", "sc.with_controls(model, tokens, treated, found=sinks, layer=6, n_random=3)",
        "sc.anatomy.writers(model, tokens, treated)",
    ):  # fmt: skip
        assert line in code, line
    assert measured().found.manifest.weights in code
    assert all(callable(getattr(sc.__getattr__("anatomy"), name)) for name in re.findall(r"sc\.anatomy\.(\w+)\(", code))


def test_the_same_files_give_the_same_page(folder, page, tmp_path):
    out = tmp_path / "again.html"
    assert (
        cli.main(["report", str(folder / "sinks.parquet"), str(folder), "--out", str(out), "--title", "A <b>title</b>"])
        == 0
    )
    body = [text.partition("How to run it again")[0] for text in (page, out.read_text("utf-8"))]
    assert body[0] == body[1]


def test_without_a_table_the_treated_sinks_are_shown(folder, tmp_path):
    out = tmp_path / "page.html"
    assert cli.main(["report", str(folder / "mass.safetensors"), "--out", str(out)]) == 0
    text = Elements(out.read_text("utf-8")).text
    assert "No table of all sinks was among the results" in text
    assert f"{len(measured().sinks)} secondary sinks were found" in text


def test_a_sweeps_folder_is_a_result(tmp_path):
    plant = planted.minimal()
    plant.hf_model.save_pretrained(tmp_path / "planted")
    ids = [{"id": name, "tokens": plant.tokens(64, (30,), seed_name=name).tolist()} for name in "ab"]
    (tmp_path / "ids.jsonl").write_text("".join(json.dumps(line) + "\n" for line in ids))
    study = sc.Study(
        (str(tmp_path / "planted"),),
        prompts=Texts(tokens=str(tmp_path / "ids.jsonl")),
        kinds=("secondary",),
        layers=((6,), (6, 7)),
        factors=(0.0,),
    )
    sweep = sc.sweep(study, tmp_path / "sweep", verbose=False)
    out = tmp_path / "page.html"
    assert cli.main(["report", str(tmp_path / "sweep"), "--out", str(out)]) == 0
    text = Elements(out.read_text("utf-8")).text
    effect = sweep.summary(["log_odds"]).set_index("layers").loc["6+7", "effect"]
    assert f"that of MLP 6+7 of planted, rescale, factor 0: {effect:.2f}".replace("-", "−") in text
    assert "In 2 prompts, 2 secondary sinks were found." in text
    assert "sc.load_sweep('sweep')" in text
    assert "No controls are on this page" in text and "Nothing was intervened on" not in text


def test_files_come_back_as_what_they_are(folder):
    results = read_results([folder])
    assert sinks_of(results).table.equals(measured().found.table)
    by_type = {type(result).__name__ for result in results}
    assert by_type >= {
        "Sinks",
        "Effect",
        "Controlled",
        "PathEffect",
        "MassAccount",
        "Claims",
        "Writers",
        "Neurons",
        "TokenScores",
    }
    scored = next(result for result in results if isinstance(result, TokenScores))
    for name in NAMES:
        np.testing.assert_array_equal(scored.scores[name], measured().token_scores.scores[name])
        assert scored.texts[name] == measured().token_scores.texts[name]
        assert scored.scores[name].shape[1] == len(scored.texts[name]) == 96


# What does not fit.


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("missing.safetensors", None, "does not exist"),
        ("empty", "folder", "holds no results"),
        ("table.csv", b"a,b", "is no result: those end in .parquet or .safetensors"),
        ("torn.safetensors", b"\x08\x00\x00", "cannot be read as a result"),
        ("torn.parquet", b"PAR1", "cannot be read as a parquet table"),
        ("other.safetensors", "weights", "is a safetensors file but not a result of this package"),
        ("strange.safetensors", "strange", "is not an experiment's result|cannot read"),
    ],
)
def test_bad_files_are_told_and_nothing_is_written(capsys, tmp_path, folder, name, content, said):
    path = tmp_path / name
    if content == "folder":
        path.mkdir()
    elif content == "weights":
        save_file({"w": np.zeros(2, dtype=np.float32)}, path)
    elif content == "strange":
        write_dataset(path, measured().mass.data, {"kind": "strange"})
    elif content is not None:
        path.write_bytes(content)
    out = tmp_path / "out" / "page.html"
    code, error = run(capsys, folder / "sinks.parquet", path, "--out", out)
    assert code == 2
    assert re.search(said, error) and name in error
    assert error.count("\n") == 1, "one sentence, no traceback"
    assert not out.exists() and not out.parent.exists()


def test_results_of_two_models_are_refused(capsys, tmp_path, folder):
    data, meta = read_dataset(folder / "mass.safetensors")
    meta["manifest"]["weights"] = "another"
    write_dataset(tmp_path / "other.safetensors", data, meta)
    code, error = run(capsys, folder, tmp_path / "other.safetensors", "--out", tmp_path / "page.html")
    assert code == 2 and "of 2 different models" in error
    assert [p.name for p in tmp_path.iterdir()] == ["other.safetensors"]


def test_two_tables_of_sinks_are_refused(tmp_path):
    for name in ("a", "b"):
        measured().found.save(tmp_path / f"{name}.parquet")
    with pytest.raises(ResultError, match="2 tables of sinks were given"):
        sinks_of(read_results([tmp_path]))


def test_options_are_checked_before_anything_is_read(capsys, tmp_path):
    nowhere = tmp_path / "nowhere"
    (tmp_path / "there.html").write_text("mine")
    for options, said in (
        (("--out", tmp_path / "page.pdf"), "the page is an .html file"),
        (("--out", tmp_path / "there.html"), "exists already"),
        (("--max-tokens", 9, "--out", tmp_path / "p.html"), "--max-tokens says how to make the texts again"),
        (("--model", "gemma-3-270m", "--n-prompts", 0, "--out", tmp_path / "p.html"), "--n-prompts 0: at least 1"),
    ):
        code, error = run(capsys, nowhere, *options)
        assert code == 2 and said in error, error
    assert (tmp_path / "there.html").read_text() == "mine"


# A browser.


@pytest.mark.slow
@needs_browser
def test_a_browser_draws_every_figure_and_fetches_nothing(page, tmp_path):
    (tmp_path / "page.html").write_text(probed(page), encoding="utf-8")
    dom, log = browse(tmp_path / "page.html", tmp_path, "--dump-dom", size="1280,2000")
    seen = seen_in(dom, log, 1280, n_figures=page.count('class="figure-data"'))
    assert seen["sideways"] == [], "a table is cut on a wide screen"
    assert not [line for line in log.splitlines() if "CONSOLE" in line and "GL" not in line]
    assert not {"img", "iframe", "object"} & set(Elements(dom).names)
    assert seen["painted"] == len(NAMES) * 5, "four heads and the chosen one of each text"


@pytest.mark.slow
@needs_browser
def test_every_section_fits_a_phone(page, tmp_path):
    seen = in_a_frame(probed(page), tmp_path, 390, n_figures=page.count('class="figure-data"'))
    assert all(hinted for _, _, hinted in seen["sideways"]), "a table is cut and nothing says so"
