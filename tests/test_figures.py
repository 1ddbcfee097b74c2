"""Figures hold the numbers of the results they draw, and no token's text becomes markup."""

import html.parser
import json
import re
from types import SimpleNamespace

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
import torch

import sink_circuits as sc
from sink_circuits import figures, planted
from sink_circuits.errors import InputError, ResultError
from sink_circuits.figures import look

HOSTILE = [
    "<bos>",
    "</div>",
    "</script>",
    "<img src=x onerror=alert(1)>",
    "<!--",
    "&lt;b&gt;",
    "&amp",
    "<script>alert(2)</script>",
    "שלום",
    "\u202eevil",
    "\u200b",
    "\x00\x1b",
    "a\nb",
    '"><svg onload=alert(3)>',
    "{{7*7}}",
    "`${1}`",
    "\u2028",
    "",
    "\ud800",
    "日本",
]


@pytest.fixture(scope="module")
def results():
    torch.set_num_threads(1)
    plant = planted.minimal()
    model = plant.bridge()
    tokens = [plant.tokens(), plant.tokens(seed_name="b", sinks=(30, 55))]
    sinks = sc.find_sinks(model, tokens, verbose=False)
    secondary = sinks.select("secondary")
    return SimpleNamespace(
        sinks=sinks,
        layer_map=sc.layer_map(model, tokens, secondary, verbose=False, layers=[2, 6, 7, 13]),
        dose_response=sc.dose_response(
            model, tokens, secondary, layers=[6, 7], factors=[0, 2, 1, 0.5], loss=True, verbose=False
        ),
        ablate=sc.ablate(model, tokens, secondary, layers=[6, 7], verbose=False),
        scores=sc.sink_scores(model, tokens),
    )


def rows_of(effect, outcome):
    table = effect.summary()
    return table[table["outcome"] == outcome]


def traces(figure, kind):
    return [trace for trace in figure.data if trace.type == kind]


def same(drawn, expected):
    np.testing.assert_allclose([np.nan if v is None else v for v in drawn], expected, rtol=1e-6, atol=1e-7)


class Elements(html.parser.HTMLParser):
    """Names, attributes and text of a page's elements; text in <script> and <style> apart."""

    def __init__(self, text):
        super().__init__()
        self.names, self.attributes, self.text, self.inside = [], [], "", None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)
        self.attributes.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self.inside = tag

    def handle_endtag(self, tag):
        self.inside = None if tag == self.inside else self.inside

    def handle_data(self, data):
        self.text += "" if self.inside else data


# --------------------------------------------------------------------------------------------------- experiments
@pytest.mark.parametrize("outcome", ["log_odds", "score"])
def test_layer_map_draws_the_summary(results, outcome):
    figure = figures.layer_map_figure(results.layer_map, outcome)
    rows = rows_of(results.layer_map, outcome)
    (line,) = traces(figure, "scatter")
    assert list(line.x) == [2, 6, 7, 13]
    same(line.y, rows["effect"])
    drawn = rows["low"].notna().to_numpy()
    same(np.array(line.error_y.array)[drawn].astype(float), (rows["high"] - rows["effect"])[drawn])
    same(np.array(line.error_y.arrayminus)[drawn].astype(float), (rows["effect"] - rows["low"])[drawn])


def hostile(clean, edited, sink):
    return edited.resid_post_chosen[:, 0].norm(dim=-1)


def test_interventions_and_outcomes_of_ones_own_are_drawn(results):
    """A [layer], a [layer, head] and a [] outcome, in every figure that has their axes; names are text, never markup."""
    plant = planted.minimal()
    model, tokens = plant.bridge(), [plant.tokens()]
    sinks = results.sinks
    sinks = sc.Sinks(sinks.table[sinks.table["prompt"] == "prompt-0"], sinks.prompts, sinks.manifest).select(
        "secondary"
    )

    def bent(contribution, dose=0.5):
        return dose * contribution

    bent.__name__ = "<b>bent</b>"
    options = {
        "outcomes": {
            "<i>norms</i>": hostile,
            "heads": lambda c, e, s: e.columns.log_rest[..., -1, 0],
            "one": lambda c, e, s: 1.0,
        }
    }
    options |= {"verbose": False}
    drawn = {
        "layer_map": sc.layer_map(model, tokens, sinks, intervention=bent, layers=[6, 7], **options),
        "dose_response": sc.dose_response(model, tokens, sinks, layer=6, intervention=bent, factors=[0, -2], **options),
        "ablate": sc.ablate(model, tokens, sinks, layer=6, intervention=bent, **options),
    }
    for kind, effect in drawn.items():
        if kind != "ablate":
            with pytest.raises(InputError, match="'norm' is a manipulation check"):
                effect.plot("norm")
        for outcome in ("<i>norms</i>", "heads", "one", "lifetime"):
            figure = effect.plot(outcome)
            text = json.dumps(figure.to_plotly_json(), default=str)
            assert "<i>" not in text and "<b>bent" not in text and "&amp;" not in text
            rows = rows_of(effect, outcome)
            if kind != "dose_response" and outcome in ("one", "lifetime"):  # without layers: edit by edit
                same(traces(figure, "scatter")[0].x, rows["effect"])
                with pytest.raises(InputError, match=f"outcome '{outcome}' has no layers to draw: use one of score"):
                    (figures.layer_map_figure if kind == "layer_map" else figures.ablation_figure)(effect, outcome)
                continue
            if "i>" in outcome:  # as it was named, once
                assert "<i>norms</i>" in " ".join(look.title_of(figure))
            if kind == "layer_map":
                same(traces(figure, "scatter")[0].y, rows["effect"])
            elif kind == "dose_response":
                assert "dose of &lt;b&gt;bent" in text and "rescaled" not in text
                same(traces(figure, "scatter")[1].y, rows["edited"].iloc[::-1])
            else:
                values = effect.data[outcome].sel(edit="<b>bent</b>", layer=slice(6, None))
                same(traces(figure, "scatter")[1].y, values.mean([d for d in values.dims if d != "layer"]))


def test_heat_map_is_centred_and_leaves_impossible_cells_empty(results):
    heat = traces(figures.layer_map_figure(results.layer_map, "log_odds"), "heatmap")[0]
    assert heat.zmin == -heat.zmax
    assert list(heat.x) == list(range(2, 14))
    cells = results.layer_map.effect("log_odds").mean(["sink", "head"])
    for column, edited in enumerate(heat.x):
        for row, reading in enumerate(heat.y):
            if edited not in (2, 6, 7, 13) or reading <= edited:
                assert heat.z[row][column] is None
            else:
                assert heat.z[row][column] == pytest.approx(float(cells.sel(edit=edited, layer=reading)), rel=1e-5)


@pytest.mark.parametrize("outcome", ["score", "log_odds", "loss"])
def test_dose_response_draws_each_sink_and_the_mean(results, outcome):
    effect = results.dose_response
    figure = figures.dose_response_figure(effect, outcome)
    thin, mean = traces(figure, "scatter")[:2]
    assert list(mean.x) == ["0", "0.5", "1", "2"]
    assert figure.layout.xaxis.type == "category"
    same(mean.y, rows_of(effect, outcome).sort_values("edit")["edited"])
    values = effect.data["loss"] if outcome == "loss" else effect.over_lifetime(outcome, "edited")
    drawn = np.array([np.nan if v is None else v for v in thin.y]).reshape(len(effect.table), 5)[:, :4]
    same(drawn.ravel(), values.sortby("edit").to_numpy().ravel())
    clean = [shape.y0 for shape in figure.layout.shapes if shape.type == "line"]
    assert clean[0] == pytest.approx(rows_of(effect, outcome)["clean"].mean())
    if outcome == "score":
        same(traces(figure, "scatter")[3].y, rows_of(effect, "primary_score").sort_values("edit")["edited"])


def test_an_interval_of_scores_never_leaves_their_range(results):
    for trace in traces(figures.dose_response_figure(results.dose_response, "score"), "scatter")[1::2]:
        assert min(y - e for y, e in zip(trace.y, trace.error_y.arrayminus, strict=True)) >= -1e-9


def test_ablation_draws_means_over_prompts_by_layer(results):
    figure = figures.ablation_figure(results.ablate, "score")
    clean, edited = traces(figure, "scatter")[:2]
    assert clean.x[0] == 6
    frame = (
        results.ablate.data["clean_score"]
        .mean("head")
        .to_pandas()
        .groupby(results.ablate.table["prompt"].to_numpy())
        .mean()
        .mean()
    )
    same(clean.y, frame[6:])
    frame = (
        results.ablate.data["score"]
        .sel(edit="zero")
        .mean("head")
        .to_pandas()
        .groupby(results.ablate.table["prompt"].to_numpy())
        .mean()
        .mean()
    )
    same(edited.y, frame[6:])
    assert (clean.line.dash, clean.marker.symbol) != (edited.line.dash, edited.marker.symbol)


def test_effect_figure_knows_each_kind(results):
    for kind in ("layer_map", "dose_response", "ablate"):
        figure = figures.effect_figure(getattr(results, kind), "score")
        assert isinstance(figure, go.Figure)
        assert all(axis.title.text for axis in figure.select_yaxes())
        lines = figure.layout.title.text.split("<br>")
        assert max(len(re.sub("<[^>]*>", "", line)) for line in lines) <= figures.LINE_LENGTH
        assert results.layer_map.plot("score").layout.title.text
        json.loads(figures.figure_json(figure))


@pytest.mark.parametrize("kind", ["layer_map", "dose_response", "ablate"])
def test_unknown_outcome_is_an_error(results, kind):
    with pytest.raises(InputError, match="outcome 'nonsense' was not measured: there are"):
        figures.effect_figure(getattr(results, kind), "nonsense")


def test_loss_has_no_layers(results):
    with pytest.raises(InputError, match="has no layers"):
        figures.ablation_figure(results.dose_response, "loss")


def test_edits_that_are_not_numbers_are_no_layers(results):
    with pytest.raises(InputError, match="whose edits are layers"):
        figures.layer_map_figure(results.ablate)
    with pytest.raises(InputError, match="whose edits are factors"):
        figures.dose_response_figure(results.ablate)


def test_one_prompt_has_no_interval(results):
    effect = results.ablate
    rows = np.flatnonzero(effect.table["prompt"] == effect.table["prompt"].iloc[0])
    one = type(effect)(
        effect.kind, effect.data.isel(sink=rows), effect.table.iloc[rows].reset_index(drop=True), effect.manifest
    )
    figure = figures.ablation_figure(one)
    assert "Too few prompts for an interval" in figure.layout.title.text.replace("<br>", " ")
    assert all(v is None for v in figure.data[0].error_y.array)


def strings(value) -> list[str]:
    """Every text in nested lists and dicts, keys left out."""
    if isinstance(value, str):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return [text for one in inner for text in strings(one)]


def assert_no_foreign_markup(drawn) -> None:
    """Of plotly's pseudo-HTML a figure uses bold headings, line breaks and the grey of notes; nothing else stands in it."""
    for text in strings(drawn):
        assert set(re.findall(r"</?([a-zA-Z!][^\s>/]*)", text)) <= {"b", "br", "span", "extra"}, text
        assert "<b>bold" not in text and not set("\u202e\u200b\x00") & set(text), text


# --------------------------------------------------------------------------------------------------- files
def test_save_figure_as_a_page_that_needs_no_network(results, tmp_path):
    figure = figures.ablation_figure(results.ablate)
    figures.save_figure(figure, tmp_path / "f.html")
    text = (tmp_path / "f.html").read_text()
    assert "default-src 'none'" in text
    assert not [a for tag, a in Elements(text).attributes if "src" in a or "href" in a]
    with pytest.raises(ResultError, match="exists already"):
        figures.save_figure(figure, tmp_path / "f.html")


def test_pages_may_share_the_library(results, tmp_path):
    figures.save_library(tmp_path / "p.js")
    figures.save_figure(figures.ablation_figure(results.ablate), tmp_path / "f.html", library='p.js"><i>')
    elements = Elements((tmp_path / "f.html").read_text())
    assert [a["src"] for _, a in elements.attributes if "src" in a] == ['p.js"><i>'] and "i" not in elements.names
    assert (tmp_path / "f.html").stat().st_size < 200_000 < (tmp_path / "p.js").stat().st_size
    with pytest.raises(ResultError, match="exists already"):
        figures.save_library(tmp_path / "p.js")


def test_save_figure_refuses_other_kinds(tmp_path):
    with pytest.raises(ResultError, match="cannot be written as '.gif': use .html, .svg, .pdf or .png"):
        figures.save_figure(go.Figure(), tmp_path / "f.gif")


def test_save_figure_says_what_a_picture_needs(tmp_path, monkeypatch):
    def missing(*_, **__):
        raise ValueError("\nkaleido is not there\nsecond line")  # plotly's own begins with an empty line

    monkeypatch.setattr(go.Figure, "to_image", missing)
    with pytest.raises(ResultError, match=r"needs the package kaleido and a Chromium browser \(kaleido is not there\)"):
        figures.save_figure(go.Figure(), tmp_path / "f.svg")
    assert not list(tmp_path.iterdir())


def test_a_picture_has_lines_as_long_as_it_is_wide(results):
    """Pages wrap for a phone; a picture's width is known, so its note need not fill half of it."""
    figure = figures.layer_map_figure(results.layer_map)
    wide = look.widened(figure)
    before, after = (one.layout.title.text.count("<br>") for one in (figure, wide))
    assert before > after and look.title_of(wide) == look.title_of(figure)
    lines = re.sub("<(?!br)[^>]*>", "", wide.layout.title.text).split("<br>")
    assert look.LINE_LENGTH < max(map(len, lines)) <= look.WIDE_LENGTH
    plots = [one.layout.height - one.layout.margin.t - one.layout.margin.b for one in (figure, wide)]
    assert plots[0] == plots[1] and figure.layout.height - wide.layout.height == 16 * (before - after)
    own = go.Figure().update_layout(title="a<br>title of one's own")
    assert look.widened(own) is own


def test_save_figure_as_svg(results, tmp_path):
    pytest.importorskip("kaleido", reason="kaleido is not installed: figures cannot be written as .svg here")
    figures.save_figure(figures.ablation_figure(results.ablate), tmp_path / "f.svg")
    assert (tmp_path / "f.svg").read_text().startswith("<svg")


# --------------------------------------------------------------------------------------------------- tokens
def sinks_at(*positions):
    return pd.DataFrame(
        {"pos": positions, "kind": ["primary", "secondary"][: len(positions)], "l_start": 0, "l_end": 2},
        index=range(len(positions)),
    )


def test_hostile_tokens_stay_text():
    scores = torch.rand(4, 2, len(HOSTILE)) * 0.1
    page = Elements(figures.sink_tokens_view(HOSTILE, scores, sinks_at(0, 2), library=False))
    assert not {"img", "svg", "b"} & set(page.names)
    assert not [a for _, a in page.attributes if any(name.startswith("on") for name in a)]
    assert page.names.count("script") == 1  # circuitsvis' data
    for token in HOSTILE:
        assert figures.visible(token) in page.text
    assert "\u202e" not in page.text
    assert "\u200b" not in page.text


def test_circuitsvis_data_cannot_start_a_tag_or_an_entity():
    text = figures.sink_tokens_view(HOSTILE, np.full((2, len(HOSTILE)), 0.1), sinks_at(0), library=False)
    data = json.loads(re.search(r'class="cv-data"[^>]*>(.*?)</script>', text, re.DOTALL).group(1))
    for token in data["tokens"]:
        assert not re.search("[<&](?!\u2060)", token)


def test_view_values_are_rounded_floats_and_undefined_ones_are_left_out():
    scores = np.full((3, 5), 0.123456789, dtype=np.float32)
    scores[:, 4] = np.nan
    text = figures.sink_tokens_view(list("abcde"), scores, sinks_at(0, 2), library=False)
    data = json.loads(re.search(r'class="cv-data"[^>]*>(.*?)</script>', text, re.DOTALL).group(1))
    assert data["tokens"] == list("abcd")
    assert {v for row in data["values"] for v in row} == {0.1235}
    assert "The last 1 tokens" in text
    assert "score not defined" in text


def test_view_brings_the_library_once_or_not_at_all():
    call = (list("abc"), np.full((2, 3), 0.1), sinks_at(0))
    assert figures.sink_tokens_view(*call).count("CircuitsVis=(") == 1
    assert "CircuitsVis=(" not in figures.sink_tokens_view(*call, library=False)
    assert "</script" not in figures.circuitsvis_source()


def test_view_of_a_real_prompt_labels_its_sinks(results):
    own = results.sinks.table[results.sinks.table["prompt"] == "prompt-1"]
    texts = [f"<{int(i)}>" for i in results.scores.tokens.ids[1]]
    page = Elements(figures.sink_tokens_view(texts, results.scores.scores[1], own, library=False))
    tips = [a["data-tip"] for _, a in page.attributes if "data-tip" in a]
    assert len(tips) == own["pos"].nunique()
    assert all(a.get("tabindex") == "0" for _, a in page.attributes if "data-tip" in a)


def test_view_errors():
    with pytest.raises(InputError, match="3 tokens but scores of 4 positions"):
        figures.sink_tokens_view(list("abc"), np.zeros((2, 4)), sinks_at(0))
    with pytest.raises(InputError, match="a sink stands at position 7"):
        figures.sink_tokens_view(list("abc"), np.zeros((2, 3)), sinks_at(7))
    with pytest.raises(InputError, match="no layer has a defined score"):
        figures.sink_tokens_view(list("abc"), np.full((2, 3), np.nan), sinks_at(0))
    with pytest.raises(InputError, match="scores of shape"):
        figures.sink_tokens_view(list("abc"), np.zeros(3), sinks_at(0))
