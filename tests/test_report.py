"""The report says what the results say, holds no foreign markup, and draws itself in a browser without a network."""

import dataclasses
import html
import json
import re
import shutil
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_figures import HOSTILE, Elements

import sink_circuits as sc
from sink_circuits import planted, report
from sink_circuits.detection import Sinks
from sink_circuits.errors import InputError, ResultError
from sink_circuits.experiments import Effect

NAMES = ["</script><img src=x onerror=alert(1)>", "b & <i>c</i>"]
CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)


@pytest.fixture(scope="module")
def made():
    torch.set_num_threads(1)
    plant = planted.minimal()
    model = plant.bridge()
    tokens = sc.Tokens((plant.tokens(), plant.tokens(seed_name="b", sinks=(30, 55))), tuple(NAMES))
    sinks = sc.find_sinks(model, tokens, verbose=False)
    secondary = sinks.select("secondary")
    effects = [
        sc.layer_map(model, tokens, secondary, verbose=False, layers=[2, 6, 7, 13]),
        sc.dose_response(model, tokens, secondary, layers=[6, 7], verbose=False),
        sc.ablate(model, tokens, secondary, layers=[6, 7], verbose=False),
    ]
    scores = dict(zip(NAMES, sc.sink_scores(model, tokens).scores, strict=True))
    texts = {name: [HOSTILE[i % len(HOSTILE)] for i in range(96)] for name in NAMES}
    table = sinks.table.assign(token=[texts[row.prompt][row.pos] for row in sinks.table.itertuples()])
    return SimpleNamespace(
        sinks=Sinks(table, sinks.prompts, sinks.manifest), effects=effects, texts=texts, scores=scores
    )


def page_of(made, **changed):
    parts = {
        "sinks": made.sinks,
        "effects": made.effects,
        "texts": made.texts,
        "scores": made.scores,
        "title": "A <b>title</b>",
        "command": "sink-circuits report <model>\n  --prompts a&b",
    }
    return report.render(**{**parts, **changed})


@pytest.fixture(scope="module")
def page(made):
    return page_of(made)


def one_prompt(effect):
    rows = np.flatnonzero(effect.table["prompt"] == NAMES[0])
    return Effect(
        effect.kind, effect.data.isel(sink=rows), effect.table.iloc[rows].reset_index(drop=True), effect.manifest
    )


# --------------------------------------------------------------------------------------------------- the page
def test_nothing_foreign_becomes_markup(page):
    elements = Elements(page)
    assert not {"img", "svg", "i", "b", "iframe", "object", "link"} & set(elements.names)
    assert not [a for _, a in elements.attributes if any(name.startswith("on") for name in a)]
    assert "A <b>title</b>" in elements.text
    assert "--prompts a&b" in elements.text
    assert all(name in elements.text for name in NAMES)
    assert "<img src=x onerror=alert(1)>" in elements.text.replace("·", " ")
    assert "\u202e" not in page
    assert "\u200b" not in page


def test_page_is_self_contained_and_small(page):
    elements = Elements(page)
    assert len(page.encode()) < 5_000_000
    assert page.count('id="library-plotly"') == page.count('id="library-circuitsvis"') == 1
    policy = next(a["content"] for tag, a in elements.attributes if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    assert "'unsafe-eval'" not in policy
    links = [a.get("src") or a["href"] for _, a in elements.attributes if "src" in a or "href" in a]
    assert all(link.startswith("#") for link in links)
    ids = [a["id"] for _, a in elements.attributes if "id" in a]
    assert len(ids) == len(set(ids))
    assert {link[1:] for link in links} <= set(ids)
    named = {a["aria-labelledby"] for _, a in elements.attributes if "aria-labelledby" in a}
    assert named <= set(ids)


def test_sections_stand_in_order(page):
    headings = re.findall(r"<h2[^>]*>(.*?)</h2>", page)
    assert [re.sub("<[^>]+>", "", h) for h in headings] == [
        "The question, and the answer in numbers",
        "Model and data",
        "Sinks found",
        "Causal evidence",
        "Terms",
        "What this does not show",
        "How to run it again",
    ]


def test_same_results_give_the_same_page(made, page):
    assert page_of(made) == page


def test_table_holds_every_sink(made, page):
    assert page.count('<th scope="row">') >= len(made.sinks)
    for row in made.sinks.table.itertuples():
        assert f"<td>{row.l_start}–{row.l_end}</td>" in page


def test_write_report_never_overwrites_unasked(made, tmp_path):
    call = {"sinks": made.sinks, "effects": [], "texts": {}, "scores": None}
    report.write_report(tmp_path / "r.html", **call)
    with pytest.raises(ResultError, match="exists already"):
        report.write_report(tmp_path / "r.html", **call)
    report.write_report(tmp_path / "r.html", **call, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["r.html"]


def test_page_without_experiments_or_sinks(made):
    none = Sinks(made.sinks.table.iloc[:0], made.sinks.prompts, made.sinks.manifest)
    text = Elements(page_of(made, sinks=none, effects=[], texts={}, scores=None, command="")).text
    assert "In 2 prompts no sink was found." in text
    assert "Nothing was intervened on" in text
    assert "No experiment was given." in text


def test_results_of_two_models_are_refused(made):
    other = dataclasses.replace(made.effects[0].manifest, weights="other")
    effect = Effect("layer_map", made.effects[0].data, made.effects[0].table, other)
    with pytest.raises(ResultError, match="of 2 different models"):
        page_of(made, effects=[effect])


def test_texts_and_scores_must_fit(made):
    with pytest.raises(InputError, match="whose texts have 3 tokens"):
        page_of(made, texts={NAMES[1]: list("abc")}, scores=None)
    with pytest.raises(InputError, match="were given without its texts"):
        page_of(made, texts={})
    with pytest.raises(InputError, match="96 tokens but scores of 90"):
        page_of(made, scores={NAMES[0]: made.scores[NAMES[0]][..., :90]})


# --------------------------------------------------------------------------------------------------- its sentences
def test_answers_hold_the_numbers_of_the_summary(made):
    found, _, _, ablation = report.answers(made.sinks, made.effects)
    assert found == "In 2 prompts 3 secondary and 2 primary sinks were found."
    row = made.effects[2].summary().set_index("outcome").loc["log_odds"]
    assert row["high"] < 0
    assert f"differ by {report._number(row['effect'])} [" in ablation
    assert "95% interval over 2 prompts, too few to decide a direction" in ablation
    assert "MLPs 6 and 7 together" in ablation


def test_no_direction_without_an_interval(made):
    (text,) = report.answers(made.sinks, [one_prompt(made.effects[2])])[1:]
    assert "differ by −" in text
    assert "1 prompt, not enough for an interval" in text
    assert "fall" not in text


@pytest.mark.parametrize(
    ("low", "high", "n", "said"),
    [
        (-2.0, -0.5, 6, "falls by 1.00 [0.500, 2.00]"),
        (-2.0, 0.5, 6, "the direction is not decided"),
        (np.nan, np.nan, 1, "differs by −1.00 (1 prompt, not enough"),
        (
            -2.0,
            -0.5,
            5,
            "differs by −1.00 [−2.00, −0.500] (95% interval over 5 prompts, too few to decide a direction)",
        ),
    ],
)
def test_a_direction_is_named_only_when_the_interval_excludes_zero(low, high, n, said):
    text = report._moved({"effect": -1.0, "low": low, "high": high, "n_prompts": n})
    assert said in text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (-4.6, "−4.60"),
        (0.00012, "0.000120"),
        (151.2, "151"),
        (1.04e5, "104,000"),
        (1e-7, "1.00×10^-7"),
        (np.nan, "–"),
    ],
)
def test_numbers_are_written_with_three_digits(value, text):
    assert report._number(value) == text.replace("-", "−")


def test_limits_follow_from_what_was_done(made):
    text = " ".join(report.limits(made.sinks, made.effects))
    assert "stand in for each other" in text
    assert "over prompts, 2 here" in text
    assert "rough" in text
    joint = " ".join(report.limits(made.sinks, made.effects[2:]))
    assert "stand in for each other" not in joint
    assert "picked from the map" not in joint


# --------------------------------------------------------------------------------------------------- a browser
PROBE = """<script>
const seen = {errors: [], blocked: [], fetched: []};
addEventListener("error", (e) => seen.errors.push(String(e.message)));
addEventListener("unhandledrejection", (e) => seen.errors.push(String(e.reason)));
document.addEventListener("securitypolicyviolation", (e) => seen.blocked.push(e.violatedDirective + " " + e.blockedURI));
window.alert = () => seen.errors.push("alert");
const note = () => {
  seen.fetched = performance.getEntriesByType("resource").map((e) => e.name);
  seen.width = innerWidth; seen.needed = document.documentElement.scrollWidth;
  seen.policy = document.querySelectorAll("meta[http-equiv]").length;
  seen.drawn = document.documentElement.dataset.drawn; seen.svgs = document.querySelectorAll("svg.main-svg").length;
  seen.cut = [...document.querySelectorAll("svg.main-svg .gtitle, svg.main-svg .xtitle, svg.main-svg .legendtext")].filter((text) => {
    const own = text.getBoundingClientRect(), svg = text.closest("svg").getBoundingClientRect();
    return own.left < svg.left - 1 || own.right > svg.right + 1 || own.top < svg.top - 1;
  }).map((text) => text.textContent);
  document.documentElement.dataset.seen = JSON.stringify(seen);
  if (parent !== window) parent.postMessage(seen, "*");
};
setInterval(note, 200);
</script>"""


def browse(path, folder, *flags, size="1280,2000"):
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--enable-logging=stderr",
        f"--user-data-dir={folder}/profile",
        "--virtual-time-budget=30000",
        f"--window-size={size}",
        *flags,
        path.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, timeout=240, check=False)
    return done.stdout.decode("utf-8", "replace"), done.stderr.decode("utf-8", "replace")


needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium browser on this machine: the page cannot be opened"
)


def probed(page):
    """The page with all boxes open and a probe in it, before the policy: there when the first rule could be broken."""
    text = page.replace('<meta charset="utf-8">', f'<meta charset="utf-8">{PROBE}', 1)
    return text.replace('<details class="cv">', '<details class="cv" open>')


def seen_in(dom, log, width):
    found = re.search(r'data-seen="([^"]*)"', dom)
    assert found, log[-2000:]
    seen = json.loads(html.unescape(found.group(1)))
    assert seen["errors"] == seen["blocked"] == seen["fetched"] == seen["cut"] == []
    assert seen["width"] == width
    assert seen["needed"] <= width, "the page scrolls sideways"
    assert seen["drawn"] == "5"
    assert seen["svgs"] >= 5
    return seen


@pytest.mark.slow
@needs_browser
def test_a_browser_draws_the_page_and_fetches_nothing(page, tmp_path):
    (tmp_path / "page.html").write_text(probed(page), encoding="utf-8")
    dom, log = browse(tmp_path / "page.html", tmp_path, "--dump-dom", size="1280,2000")
    seen_in(dom, log, 1280)
    console = [line for line in log.splitlines() if "CONSOLE" in line and "GL" not in line]
    assert not console
    assert dom.count('class="colored-tokens"') == 2
    # circuitsvis writes tokens as HTML: what it drew must be text and nothing else.
    drawn = Elements(dom)
    assert not {"img", "iframe", "object"} & set(drawn.names)
    assert not [a for _, a in drawn.attributes if any(name.startswith("on") for name in a)]
    for box in re.findall(r'class="colored-tokens".*?</details>', dom, re.DOTALL):
        assert not {"b", "script"} & set(Elements(box.split("<script")[0]).names)
        assert "<\u2060/div>" in Elements(box).text


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize("width", [390, 360])
def test_the_page_fits_a_phone(page, tmp_path, width):
    # Chromium's own window is never narrower than 500 px, a frame in it can be.
    (tmp_path / "page.html").write_text(probed(page), encoding="utf-8")
    frame = (
        f'<!doctype html><body style="margin:0"><iframe src="page.html" style="border:0;width:{width}px;height:900px"></iframe><script>'
        'addEventListener("message", (e) => { document.documentElement.dataset.seen = JSON.stringify(e.data); });</script>'
    )
    (tmp_path / "phone.html").write_text(frame, encoding="utf-8")
    seen_in(*browse(tmp_path / "phone.html", tmp_path, "--dump-dom", size="600,900"), width)


@pytest.mark.slow
@needs_browser
def test_a_browser_takes_its_picture(page, tmp_path):
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    _, log = browse(tmp_path / "page.html", tmp_path, f"--screenshot={tmp_path / 'page.png'}", size="1280,2000")
    assert (tmp_path / "page.png").stat().st_size > 20_000, log[-2000:]
