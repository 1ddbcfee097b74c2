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
from sink_circuits import anatomy, figures, planted, report
from sink_circuits.detection import Sinks
from sink_circuits.effects import Effect
from sink_circuits.errors import InputError, ResultError
from sink_circuits.report import page as page_module
from sink_circuits.report import text as words
from sink_circuits.report.again import in_python
from sink_circuits.report.sections import anatomy_sections, causal_sections, lift_title

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


@pytest.mark.parametrize(("device", "line"), [
    ("cpu", "model = sc.load_model('planted')  # weights w"),
    ("", "model = sc.load_model('planted')  # weights w"),  # of a version that noted none
    ("cuda: NVIDIA H100", "model = sc.load_model('planted', device='cuda')  # weights w, on NVIDIA H100"),
    ("mps", "model = sc.load_model('planted', device='mps')  # weights w"),
])  # fmt: skip
def test_the_calls_that_make_it_again_say_where_it_was_made(made, device, line):
    manifest = dataclasses.replace(made.sinks.manifest, model="planted", weights="w", device=device)
    assert line in in_python(Sinks(made.sinks.table, made.sinks.prompts, manifest), made.effects).splitlines()


def test_what_an_intervention_of_ones_own_did_is_not_called_a_rescaling(made):
    plant = planted.minimal()
    model, tokens = plant.bridge(), sc.Tokens((plant.tokens(),), ("a",))
    sinks = sc.find_sinks(model, tokens, verbose=False).select("secondary")

    def capped(contribution, dose=1.0):
        return contribution.clamp(-dose, dose)

    own = sc.dose_response(model, tokens, sinks, layers=[6, 7], intervention=capped, factors=[1, 15, 30], verbose=False)
    effect = own.over_lifetime("log_odds").sel(edit=1).item()
    assert effect < -1  # the dose 1 is the strongest here, and no clean model
    (section,) = causal_sections([own])
    assert section.title == "Dose-response: the contribution edited by “capped”"
    assert f"at dose 1 their attention log-odds differ by {words.number(effect, signed=True)} nats" in section.answer
    everything = [*words.question(sinks, [own]), section.answer, section.caption, *words.limits(sinks, [own], {})]
    for wrong in ("escal", "multiplied", "leaves its direction", "as it is", "factor"):
        assert not any(wrong in sentence for sentence in everything), wrong
    rescaled = sc.dose_response(model, tokens, sinks, layers=[6, 7], factors=[1], verbose=False)
    assert "only the factor 1 was run, which is the clean model" in causal_sections([rescaled])[0].answer
    taken = sc.ablate(model, tokens, sinks, layers=[6, 7], intervention=capped, verbose=False)
    assert causal_sections([taken])[0].title == "Experiment: the contribution edited by “capped”"
    assert "taken away" not in words.question(sinks, [taken])[0]


def test_outcomes_of_ones_own_are_drawn_beside_the_others(made):
    plant = planted.minimal()
    model, tokens = plant.bridge(), sc.Tokens((plant.tokens(),), ("a",))
    sinks = sc.find_sinks(model, tokens, verbose=False).select("secondary")
    own = sc.ablate(model, tokens, sinks, layers=[6], outcomes={"<b>x</b>": lambda c, e, s: 1.0}, verbose=False)
    (section,) = causal_sections([own])
    drawn = dict(section.figures[-1])
    assert (
        len(section.figures) == 3 and drawn.pop("heading") == "Effect of every edit on the <b>x</b>"
    )  # the page escapes it
    assert "<b>x" not in str(drawn)


def page_of(made, **changed):
    parts = {
        "sinks": made.sinks,
        "results": made.effects,
        "texts": made.texts,
        "scores": made.scores,
        "title": "A <b>title</b>",
        "command": "sink-circuits report <model>\n  --prompts a&b",
    }
    return report.render(**{**parts, **changed})


@pytest.mark.parametrize("layers, said", [([2, 6, 13], False), ([2, 13], True)])
def test_a_section_says_when_it_is_not_of_the_forming_mlp(made, layers, said):
    """A map that lacks the writing MLP 6 picks another."""
    plant = planted.minimal()
    model, tokens = plant.bridge(), sc.Tokens((plant.tokens(),), ("a",))
    sinks = sc.find_sinks(model, tokens, verbose=False).select("secondary")
    mapped = sc.layer_map(model, tokens, sinks, layers=layers, verbose=False)
    stages = anatomy.mlp_stages(model, tokens, sinks, layer=6, verbose=False)
    section = next(one for one in anatomy_sections([mapped, stages]) if one.title == "Stages of the MLP")
    forming = int(mapped.forming().iloc[0])
    assert (f"MLP 6, which writes the sink, not MLP {forming}, whose removal" in section.caption) == said
    assert (forming == 6) != said
    assert "whose removal" not in anatomy_sections([stages])[-1].caption  # without a map nothing is known


@pytest.fixture(scope="module")
def page(made):
    return page_of(made)


def answers(effects):
    """What the page says of each, before anything is drawn."""
    return [section.answer for section in causal_sections(effects)]


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
    call = {"sinks": made.sinks}
    report.write_report(tmp_path / "r.html", **call)
    with pytest.raises(ResultError, match="exists already"):
        report.write_report(tmp_path / "r.html", **call)
    report.write_report(tmp_path / "r.html", **call, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["r.html"]


def test_page_without_experiments_or_sinks(made):
    none = Sinks(made.sinks.table.iloc[:0], made.sinks.prompts, made.sinks.manifest)
    text = Elements(page_of(made, sinks=none, results=[], texts={}, scores=None, command="")).text
    assert "In 2 prompts, no sink was found." in text
    assert "Nothing was intervened on" in text
    assert "No experiment was given." in text


def test_results_of_two_models_are_refused(made):
    other = dataclasses.replace(made.effects[0].manifest, weights="other")
    effect = Effect("layer_map", made.effects[0].data, made.effects[0].table, other)
    with pytest.raises(ResultError, match="of 2 different models"):
        page_of(made, results=[effect])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table.assign(norm_ratio="large"), "column 'norm_ratio' holds no numbers"),
        (lambda table: table.assign(pos=True), "column 'pos' holds no numbers"),
        (lambda table: table.drop(columns="l_end"), "lacks the column 'l_end'"),
        (lambda table: table.to_dict(), "table is of type dict"),
    ],
)
def test_a_table_altered_by_hand_is_refused(made, change, message):
    sinks = made.sinks
    with pytest.raises(InputError, match=message):
        page_of(made, sinks=Sinks(change(sinks.table), sinks.prompts, sinks.manifest))


def test_texts_and_scores_must_fit(made):
    with pytest.raises(InputError, match="whose texts have 3 tokens"):
        page_of(made, texts={NAMES[1]: list("abc")}, scores=None)
    with pytest.raises(InputError, match="were given without its texts"):
        page_of(made, texts={})
    with pytest.raises(InputError, match="96 tokens but scores of 90"):
        page_of(made, scores={NAMES[0]: made.scores[NAMES[0]][..., :90]})


# --------------------------------------------------------------------------------------------------- its sentences
def test_answers_hold_the_numbers_of_the_summary(made):
    _, _, ablation = answers(made.effects)
    assert words.found(made.sinks) == "In 2 prompts, 3 secondary and 2 primary sinks were found."
    row = made.effects[2].summary().set_index("outcome").loc["log_odds"]
    assert row["high"] < 0
    assert f"differ by {words.number(row['effect'])} [" in ablation
    assert "95% interval over 2 prompts, too few to decide a direction" in ablation
    assert "MLPs 6 and 7 together" in ablation


def test_an_experiment_of_ones_own_is_a_question_of_cause(made):
    own = Effect("turned away", *(getattr(made.effects[2], name) for name in ("data", "table", "manifest")))
    asked = words.question(made.sinks, [own])
    assert "(“turned away”)" in asked[0] and "No question of cause" not in " ".join(asked)
    neurons = Effect("ablate_neurons", own.data, own.table, own.manifest)
    assert "single neurons" in words.question(made.sinks, [neurons])[0]


def test_no_direction_without_an_interval(made):
    (text,) = answers([one_prompt(made.effects[2])])
    assert "differ by −" in text
    assert "1 prompt, not enough for an interval" in text
    assert "fall" not in text


@pytest.mark.parametrize(
    ("low", "high", "n", "said"),
    [
        (-2.0, -0.5, 6, "falls by 1.00 [0.500, 2.00]"),
        (-2.0, 0.5, 6, "changes by −1.00 [−2.00, +0.500] (95% interval over 6 prompts), an interval that includes 0"),
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
    text = words.moved({"effect": -1.0, "low": low, "high": high, "n_prompts": n})
    assert said in text
    assert said.partition("]")[0] + "] nats" in words.moved(
        {"effect": -1.0, "low": low, "high": high, "n_prompts": n}, "nats"
    ) or np.isnan(low)


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
    assert words.number(value) == text.replace("-", "−")


def test_limits_follow_from_what_was_done(made):
    text = " ".join(words.limits(made.sinks, made.effects))
    assert "stand in for each other" in text
    assert "over prompts, 2 here" in text
    assert "no more than their range" in text
    assert "no second confirmation" not in text
    joint = " ".join(words.limits(made.sinks, made.effects[2:]))
    assert "stand in for each other" not in joint
    assert "picked from the map" not in joint


@pytest.mark.parametrize(
    ("n", "said"),
    [(1, "One has none"), (2, "are too narrow"), (5, "are too narrow"), (6, "skewed"), (9, "skewed"), (10, "")],
)
def test_what_few_prompts_do_to_an_interval_is_a_limit(made, n, said):
    (effect,) = made.effects[:1]
    prompts = [f"prompt {index % n}" for index in range(20)]
    more = Effect(
        effect.kind,
        effect.data.isel(sink=[0] * 20),
        effect.table.iloc[[0] * 20].assign(prompt=prompts).reset_index(drop=True),
        effect.manifest,
    )
    (line,) = [line for line in words.limits(made.sinks, [more]) if line.startswith("Intervals are over prompts")]
    assert f"over prompts, {n} here" in line
    assert said in line.partition("languages.")[2] if said else line.endswith("languages.")


def with_settings(effect, **changed):
    manifest = dataclasses.replace(effect.manifest, settings={**effect.manifest.settings, **changed})
    return Effect(effect.kind, effect.data, effect.table, manifest)


def test_a_layer_picked_on_the_same_prompts_is_a_limit(made):
    picked = with_settings(made.effects[2], layers="forming")
    assert "no second confirmation" in " ".join(words.limits(made.sinks, [made.effects[0], picked]))
    assert "each sink's own forming MLP" in answers([picked])[0]


def test_dose_response_is_told_by_its_two_ends(made):
    rows = made.effects[1].summary().query("outcome == 'log_odds'").set_index("edit")["effect"]
    (text,) = answers([made.effects[1]])
    assert f"at factor 0 their attention log-odds differ by {words.number(rows[0.0])} [" in text
    assert f"at factor 4 their attention log-odds differ by {words.number(rows[4.0], signed=True)} [" in text
    assert text.count("nats (95% interval over 2 prompts, too few to decide a direction)") == 2


def test_every_answer_leads_to_its_section(made, page):
    answers = re.findall(r'<strong><a href="#([^"]+)">([^<]+)\.</a></strong>', page)
    assert answers == [
        ("found", "Sinks"),
        ("effect-1", "Layer map"),
        ("effect-2", "Dose-response"),
        ("effect-3", "Ablation"),
    ]


def test_page_says_which_sinks_were_treated(made):
    assert page_module.treated(made.sinks, made.effects) == (
        "The experiments treat 3 of 3 secondary sinks, numbered as in the table above. No primary sink was treated."
    )
    secondary = made.sinks.table.index[made.sinks.table["kind"] == "secondary"]
    rows = [0, 2]
    effect = made.effects[2]
    some = Effect(effect.kind, effect.data.isel(sink=rows), effect.table.iloc[rows], effect.manifest)
    said = page_module.treated(made.sinks, [some])
    assert f"treat 2 of 3 secondary sinks, numbered as in the table above. Left out: sink {secondary[1]}." in said
    assert page_module.treated(made.sinks, []) == ""


def test_model_and_data_are_on_the_page(made, page):
    config = planted.minimal().hf_model.config
    facts = dict(page_module._facts(made.sinks, made.effects))
    assert facts["Size"] == f"{config.num_hidden_layers} layers, {config.num_attention_heads} heads in each"
    assert facts["Prompts"] == f"2: {', '.join(NAMES)}"
    assert facts["Tokens (hash)"] == made.sinks.manifest.tokens
    assert facts["Execution path"].startswith("fast: the plain Hugging Face module")
    many = Sinks(made.sinks.table, tuple(f"p{n}" for n in range(20)), made.sinks.manifest)
    assert dict(page_module._facts(many, []))["Prompts"].endswith("p10, p11 and 8 more")
    assert "Size" not in dict(page_module._facts(many, []))
    text = Elements(page).text
    assert all(value in text for name, value in facts.items() if name != "Prompts")


def test_settings_are_listed_flat_and_once(made):
    found, *others = page_module._models([made.sinks, *made.effects])
    assert "cosine = 0.9" in found["settings"]
    assert "first_positions = not set" in found["settings"]
    assert "thresholds" not in found["settings"]
    for one in others:
        assert one["settings"].endswith("; sinks found as above")
        assert "cosine" not in one["settings"]
    other = with_settings(made.effects[0], found={"thresholds": {"cosine": 0.5}})
    assert "cosine = 0.5" in page_module._models([made.sinks, other])[1]["settings"]


def test_titles_of_figures_stand_in_the_page(made, page):
    for heading in (
        "Effect of editing one MLP on the attention log-odds",
        "Dose-response: attention log-odds",
        "Clean and edited attention log-odds, by layer",
    ):
        assert f">{heading}</h4>" in page
    figure = figures.effect_figure(made.effects[0], "log_odds")
    top, height = figure.layout.margin.t, figure.layout.height
    heading, note = lift_title(figure)
    assert heading == "Effect of editing one MLP on the attention log-odds"
    assert note.startswith("planted: 3 secondary sinks, 2 prompts. Bars: 95% interval over 2 prompts. Shaded: ")
    assert figure.layout.title.text is None
    assert height - figure.layout.height == top - figure.layout.margin.t > 0


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
  const canvases = [...document.querySelectorAll("details.cv canvas")];
  if (seen.painted !== canvases.length)
    seen.painted = canvases.filter((canvas) => {
      const blank = Object.assign(document.createElement("canvas"), {width: canvas.width, height: canvas.height});
      return canvas.width > 20 && canvas.toDataURL() !== blank.toDataURL();
    }).length;
  seen.drawn = document.documentElement.dataset.drawn; seen.svgs = document.querySelectorAll("svg.main-svg").length;
  seen.cut = [...document.querySelectorAll("svg.main-svg .gtitle, svg.main-svg .xtitle, svg.main-svg .legendtext")].filter((text) => {
    const own = text.getBoundingClientRect(), svg = text.closest("svg").getBoundingClientRect();
    return own.left < svg.left - 1 || own.right > svg.right + 1 || own.top < svg.top - 1;
  }).map((text) => text.textContent);
  const seenAt = (box) => box.getBoundingClientRect();
  // Boxes whose right-hand part is out of sight: [its label, can be reached by keyboard, a line above says so].
  const cut = (box) => box.scrollWidth > box.clientWidth + 1;
  seen.sideways = [...document.querySelectorAll(".scroll, .tok-strip")].filter(cut).map((box) => {
    const hint = box.previousElementSibling && box.previousElementSibling.querySelector(".hint");
    return [box.getAttribute("aria-label"), box.tabIndex, !!hint && getComputedStyle(hint).display !== "none"];
  });
  seen.headings = [...document.querySelectorAll("h4 + .note")].map((note) => seenAt(note).width / seenAt(note.parentElement).width);
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
    return text.replace('<details class="cv">', '<details class="cv" open>').replace("<details>", "<details open>")


def in_a_frame(page, folder, width, n_figures=5):
    """What is seen at a phone's width: Chromium's own window is never narrower than 500 px, a frame in it can be."""
    (folder / "page.html").write_text(page, encoding="utf-8")
    frame = (
        f'<!doctype html><body style="margin:0"><iframe src="page.html" style="border:0;width:{width}px;height:900px"></iframe><script>'
        'addEventListener("message", (e) => { document.documentElement.dataset.seen = JSON.stringify(e.data); });</script>'
    )
    (folder / "phone.html").write_text(frame, encoding="utf-8")
    dom, log = browse(folder / "phone.html", folder, "--dump-dom", size="600,900")
    return seen_in(dom, log, width, n_figures)


def seen_in(dom, log, width, n_figures=5):
    found = re.search(r'data-seen="([^"]*)"', dom)
    assert found, log[-2000:]
    seen = json.loads(html.unescape(found.group(1)))
    assert seen["errors"] == seen["blocked"] == seen["fetched"] == seen["cut"] == []
    assert seen["width"] == width
    assert seen["needed"] <= width, "the page scrolls sideways"
    assert seen["drawn"] == str(n_figures)
    assert seen["svgs"] >= n_figures
    assert len(seen["headings"]) == n_figures
    assert min(seen["headings"]) > 0.9, "a figure's note is wrapped short of the page's width"
    assert all(label and tab == 0 for label, tab, _ in seen["sideways"]), seen["sideways"]
    return seen


@pytest.mark.slow
@needs_browser
def test_a_browser_draws_the_page_and_fetches_nothing(page, tmp_path):
    (tmp_path / "page.html").write_text(probed(page), encoding="utf-8")
    dom, log = browse(tmp_path / "page.html", tmp_path, "--dump-dom", size="1280,2000")
    assert seen_in(dom, log, 1280)["sideways"] == [], "a table is cut on a wide screen"
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
    seen = in_a_frame(probed(page), tmp_path, width)
    assert len(seen["sideways"]) == 4  # the sinks, and the numbers of three experiments
    assert all(hinted for _, _, hinted in seen["sideways"]), "a table is cut and nothing says so"


@pytest.mark.slow
@needs_browser
def test_a_browser_takes_its_picture(page, tmp_path):
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    _, log = browse(tmp_path / "page.html", tmp_path, f"--screenshot={tmp_path / 'page.png'}", size="1280,2000")
    assert (tmp_path / "page.png").stat().st_size > 20_000, log[-2000:]
