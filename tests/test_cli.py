"""The command line, run as a user runs it: real processes for what must be light, `main` for the rest."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from typing import get_type_hints

import pandas as pd
import pytest

from sink_circuits import Effect, Sinks, Thresholds, planted, records
from sink_circuits.cli import COMMANDS, Criteria, main
from sink_circuits.controlled import Controlled
from sink_circuits.demo import RESULTS


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The planted model as a folder in Hugging Face format, with a tokenizer of one token per word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("planted")
    plant = planted.minimal()
    plant.hf_model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w63"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w63").save_pretrained(folder)
    texts = folder / "texts.jsonl"
    lines = [plant.tokens(seed_name=name, sinks=(30,)) for name in "abc"]
    texts.write_text(
        "\n".join(
            json.dumps({"id": f"p{n}", "text": " ".join(f"w{int(i)}" for i in ids)}) for n, ids in enumerate(lines)
        )
    )
    return str(folder), ["--prompts", str(texts), "--quiet"]


def test_help_is_light_and_teaches():
    code = "import sys; from sink_circuits.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.rstrip().endswith("False"), "--help imports torch"
    for name in COMMANDS:
        assert name in done.stdout
    assert done.stdout.count("Example: sink-circuits") >= 5


def test_models_lists_licences(capsys):
    assert main(["models"]) == 0
    out = capsys.readouterr().out
    assert "gemma-3-270m" in out and "Gemma Terms of Use" in out
    assert "smollm2-135m" in out and "Apache-2.0" in out


def test_detect_finds_the_planted_sinks(model, tmp_path, capsys):
    folder, texts = model
    out = tmp_path / "sinks.parquet"
    assert main(["detect", folder, *texts, "--out", str(out)]) == 0
    table = Sinks.load(out).table
    secondary = table[table.kind == "secondary"]
    assert secondary[["prompt", "pos", "l_start", "l_end"]].to_numpy().tolist() == [
        [f"p{n}", 30, 6, 12] for n in range(3)
    ]
    assert "3 secondary" in capsys.readouterr().out
    csv = tmp_path / "sinks.csv"
    assert main(["detect", folder, *texts, "--out", str(csv)]) == 0
    assert (pd.read_csv(csv).pos == table.pos).all()


def test_detect_official_writes_the_published_format(model, tmp_path):
    folder, texts = model
    out = tmp_path / "sinks.jsonl"
    assert main(["detect", folder, *texts, "--method", "official", "--out", str(out)]) == 0
    found = records.records_table(records.read_records(out))
    assert found["pos"].tolist() == [0, 30] * 3
    assert found["sink_type"].tolist() == ["bos_sink", "secondary"] * 3


def test_official_records_tell_prompt_from_response_and_number_the_source(model, tmp_path):
    folder, _ = model
    words = [
        " ".join(f"w{int(i)}" for i in planted.minimal().tokens(seed_name=name, sinks=(30,))).split() for name in "ab"
    ]
    answers = tmp_path / "answers.jsonl"
    lines = [
        {"id": str(n), "prompt": " ".join(own[:10]), "output": " " + " ".join(own[10:])} for n, own in enumerate(words)
    ]
    answers.write_text("\n".join(map(json.dumps, lines)))
    out = tmp_path / "sinks.jsonl"
    args = ["--prompts", str(answers), "--quiet", "--skip", "1"]
    assert main(["detect", folder, *args, "--method", "official", "--out", str(out)]) == 0
    (record,) = records.read_records(out)
    assert (record.sample_index, record.prompt_len, record.response_len) == (1, 10, len(words[1]) - 10)


@pytest.mark.parametrize(("say", "code"), [("| true", 0), ("> /dev/full", 1)])
def test_a_listener_that_leaves_costs_no_result(model, tmp_path, say, code):
    """Standard output that closes, or is full, while the work goes on."""
    if "/dev/full" in say and not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    folder, texts = model
    out = tmp_path / "sinks.csv"
    command = shlex.join([sys.executable, "-u", "-m", "sink_circuits.cli", "detect", folder, *texts, "--out", str(out)])
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command} {say}"], capture_output=True, text=True)
    assert done.returncode == code
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    assert ("standard output cannot be written" in done.stderr) == bool(code)
    assert (pd.read_csv(out)["kind"] == "secondary").sum() == 3


def test_tokens_that_the_terminal_cannot_show_do_not_end_the_work(model, tmp_path):
    folder, _ = model
    page = tmp_path / "\u65e5.html"
    assert main(["detect", folder, *model[1], "--out", str(tmp_path / "sinks.parquet")]) == 0
    command = [sys.executable, "-m", "sink_circuits.cli", "report", str(tmp_path / "sinks.parquet"), "--out", str(page)]
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    done = subprocess.run(command, capture_output=True, env=environment)
    assert done.returncode == 0 and b"\\u65e5.html" in done.stdout
    assert page.is_file()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may enter every folder")
def test_a_folder_that_may_not_be_entered_is_named(tmp_path, capsys):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o000)
    for args in (["check", str(locked)], ["report", str(locked)], ["demo", "--folder", str(locked)]):
        assert main(args) == 2
        assert str(locked) in capsys.readouterr().err


def test_an_error_of_the_system_is_one_sentence(capsys, monkeypatch):
    """Wherever it comes from: what a command does not foresee is still no traceback."""

    def refused(*_):
        raise PermissionError(13, "Permission denied", "some/folder")

    monkeypatch.setattr(COMMANDS["models"], "run", refused)
    assert main(["models"]) == 2
    assert capsys.readouterr().err == "sink-circuits: some/folder cannot be read or written (Permission denied).\n"


def test_map_ablate_and_dose(model, tmp_path, capsys):
    folder, texts = model
    one = [*texts, "--n-prompts", "1"]
    mapped, figure = tmp_path / "map.safetensors", tmp_path / "map.html"
    assert main(["map", folder, *one, "--layers", "5", "6", "7", "--out", str(mapped), "--figure", str(figure)]) == 0
    assert Effect.load(mapped).forming().tolist() == [6]
    assert figure.stat().st_size > 1e5
    both, long = tmp_path / "both.safetensors", tmp_path / "dose.csv"
    assert main(["ablate", folder, *one, "--layers", "6", "7", "--out", str(both), "--loss"]) == 0
    alone = Effect.load(mapped).over_lifetime("log_odds").sel(edit=6).item()
    joint = Effect.load(both).over_lifetime("log_odds").item()
    assert joint < alone - 1, "removing both takes the sink away, removing one does not"
    assert main(["dose", folder, *one, "--layers", "6", "7", "--factors", "0", "1", "--out", str(long)]) == 0
    frame = pd.read_csv(long)
    assert frame[frame.edit == 1].effect.abs().max() == 0
    told = capsys.readouterr().out
    assert "log_odds" in told and told.count("random perturbation") == 3, (
        "once for ablate, once for each of two factors"
    )
    beside = Controlled.load(tmp_path / "dose.controls.safetensors")
    assert beside.data["edit"].values.tolist() == [0, 1] and beside.data.sizes["draw"] == 4
    assert main(["dose", folder, *one, "--layers", "6", "--factors", "0", "--n-random", "0"]) == 0
    assert "No controls were run: n_random is 0." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "thresholds", "found"),
    [
        (["--cosine", "0.999", "--norm-ratio", "2"], {"cosine": 0.999, "norm_ratio": 2.0}, [(0, "primary")]),
        (["--min-lifetime", "8", "--bridge", "3"], {"min_lifetime": 8, "bridge": 3}, [(0, "primary")]),
        (["--min-queries", "70"], {"min_queries": 70, "min_lifetime": 2}, [(0, "primary"), (30, "secondary")]),
        (["--first-positions", "30"], {"first_positions": [30]}, [(0, "primary-like"), (30, "primary")]),
    ],
)  # fmt: skip
def test_thresholds_are_passed_on_and_recorded(model, tmp_path, options, thresholds, found):
    folder, texts = model
    out = tmp_path / "sinks.parquet"
    assert main(["detect", folder, *texts, "--n-prompts", "1", *options, "--out", str(out)]) == 0
    sinks = Sinks.load(out)
    assert list(zip(sinks.table.pos, sinks.table.kind, strict=True)) == found
    recorded = sinks.manifest.settings["thresholds"]
    assert {name: recorded[name] for name in thresholds} == thresholds
    if "min_queries" in thresholds:  # 65 queries come after position 30
        assert sinks.table.set_index("pos").score.isna().to_dict() == {0: False, 30: True}


def test_experiments_use_the_thresholds_and_record_them(model, tmp_path, capsys):
    folder, texts = model
    out = tmp_path / "map.safetensors"
    given = ["--n-prompts", "1", "--min-queries", "64", "--min-lifetime", "3", "--layers", "6"]
    assert main(["map", folder, *texts, *given, "--out", str(out)]) == 0
    settings = Effect.load(out).manifest.settings
    assert settings["min_queries"] == settings["found"]["thresholds"]["min_queries"] == 64
    assert settings["found"]["thresholds"]["min_lifetime"] == 3
    for command in (["dose", "--layers", "6"], ["demo", "--folder", str(tmp_path / "d")]):
        assert main([command[0], folder, *texts, *command[1:], "--n-prompts", "1", "--min-lifetime", "8"]) == 2
        assert "no sinks of kind secondary" in capsys.readouterr().err
    assert not (tmp_path / "d").exists(), "a demo without sinks left files behind"


def test_help_states_the_thresholds_own_defaults():
    hints = get_type_hints(Criteria, include_extras=True)
    for name in ("cosine", "norm_ratio", "min_lifetime", "bridge", "min_queries"):
        shown = hints[name].__metadata__[0].help_behavior_hint
        assert shown == f"(default: {getattr(Thresholds(), name)})"


def test_demo_writes_its_results_and_the_report(model, tmp_path):
    folder, texts = model
    out = tmp_path / "demo"
    assert main(["demo", folder, *texts, "--folder", str(out)]) == 0
    names = {path.name for path in out.iterdir()}
    assert names == {
        "sinks.parquet",
        "layer_map.safetensors",
        "dose_response.safetensors",
        "ablation.safetensors",
        "controls.safetensors",
        "token_scores.safetensors",
        "mlp_stages.safetensors",
        "writers.safetensors",
        "neurons.safetensors",
        "key_query_geometry.safetensors",
        "attention_patterns.safetensors",
        "report.html",
    }
    page = (out / "report.html").read_text()
    row = page.split("wrong layer</th>")[1][:400]
    assert 'id="circuit-figure"' in page
    controls = Controlled.load(out / "controls.safetensors").compare().set_index("control")
    assert f"{abs(controls.loc['wrong layer', 'difference']):.3f}" in row
    assert "No controls are on this page" not in page
    assert "secondary" in page and "sink-circuits" in page
    assert names == set(RESULTS), "what is not named there stands in the way of --overwrite"
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert main(["demo", folder, *texts, "--folder", str(out)]) == 2, "a folder that holds results is not written to"
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.slow
def test_a_demo_is_made_again_over_an_earlier_one(model, tmp_path):
    folder, texts = model
    made = []
    for more in ([], ["--overwrite"]):
        assert main(["demo", folder, *texts, "--folder", str(tmp_path / "demo"), *more]) == 0
        made.append({path.name: path.read_bytes() for path in (tmp_path / "demo").iterdir() if path.suffix != ".html"})
    assert made[0] == made[1]


def test_a_report_with_its_model_shows_texts_and_takes_one_sink_apart(model, tmp_path, capsys):
    folder, texts = model
    assert main(["detect", folder, *texts, "--out", str(tmp_path / "sinks.parquet")]) == 0
    call = ["report", str(tmp_path / "sinks.parquet"), "--model", folder, *texts, "--out", str(tmp_path / "page.html")]
    capsys.readouterr()
    assert main([*call, "--max-tokens", "40"]) == 2, "other tokens than those of the results"
    assert "give --prompts, --n-prompts, --max-tokens and --chat as in the run" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["sinks.parquet"]
    assert main(call) == 0
    page = (tmp_path / "page.html").read_text("utf-8")
    assert page.count('class="tok-strip"') == 3  # three texts, each with a sink
    assert 'id="circuit-figure"' in page and "Nothing was intervened on" in page


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["detect", "no-such-model"], "no-such-model.*gemma-3-270m"),
        (["detect", "a/b/c"], "a/b/c"),
        (["detect", "MODEL", "--prompts", "poetry"], "poetry.*maths"),
        (["detect", "MODEL", "--prompts", "/nowhere/x.jsonl"], "/nowhere/x.jsonl"),
        (["detect", "MODEL", "TEXTS", "--n-prompts", "0"], "0 prompts.*at least 1"),
        (["detect", "MODEL", "TEXTS", "--max-tokens", "0"], "max_tokens = 0"),
        (["detect", "MODEL", "TEXTS", "--cosine", "2"], "cosine = 2.0 is out of range"),
        (["detect", "MODEL", "TEXTS", "--chat"], "no chat template"),
        (["detect", "MODEL", "TEXTS", "--out", "x.xlsx"], r"x\.xlsx has no known ending"),
        (["detect", "MODEL", "TEXTS", "--out", "x.jsonl"], "add --method official"),
        (["map", "MODEL", "TEXTS", "--layers", "24"], r"layer 24 is out of range.*0\.\.23"),
        (["map", "MODEL", "TEXTS", "--kinds", "primary-like"], "no sinks of kind primary-like"),
        (["detect", "MODEL", "TEXTS", "--first-positions", "96"], r"'p0' has 96 tokens, and no first position"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(model, arguments, sentence, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder, texts = model
    filled = []
    for word in arguments:
        filled += [folder] if word == "MODEL" else texts if word == "TEXTS" else [word]
    refused(filled, sentence, capsys)
    assert not list(tmp_path.iterdir()), "a refused command left files behind"


def refused(arguments, sentence, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert re.search(sentence, error), error
    assert "Traceback" not in error
    assert len([line for line in error.splitlines() if line.startswith("sink-circuits:")]) == 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["map", "--layers", "-1"], "layer -1 is out of range.*from 0"),
        (["ablate", "--layers", "3", "3"], "layers 3 3.*name each layer once"),
        (["dose", "--layers", "2", "-2"], "layer -2 is out of range"),
        (["dose", "--layers", "6", "--n-random", "-1"], "n_random = -1: at least 0"),
        (["dose", "--factors", "-1"], r"factor -1\.0 is not allowed"),
        (["dose", "--factors", "nan"], "factor nan is not allowed"),
        (["dose", "--factors", "inf"], "factor inf is not allowed"),
        (["dose", "--factors", "1", "1"], r"factors 1\.0 1\.0.*give each once"),
        (["dose", "--factors"], "give each once, and at least one"),
        (["detect", "--cosine", "2"], r"cosine = 2\.0 is out of range: -1\.0 to 1\.0"),
        (["map", "--cosine", "nan"], "cosine = nan is out of range"),
        (["demo", "--cosine", "-1.5"], r"cosine = -1\.5 is out of range"),
        (["ablate", "--norm-ratio", "-1"], r"norm_ratio = -1\.0 is out of range"),
        (["detect", "--norm-ratio", "nan"], "norm_ratio = nan is out of range"),
        (["detect", "--norm-ratio", "inf"], "norm_ratio = inf is not finite"),
        (["dose", "--min-lifetime", "0"], "min_lifetime = 0 is out of range: 1"),
        (["map", "--bridge", "-1"], "bridge = -1 is out of range: 0"),
        (["map", "--min-queries", "0"], "min_queries = 0 is out of range: 1"),
        (["demo", "--first-positions", "-1"], r"first_positions = \(-1,\)"),
        (["detect", "--first-positions", "1", "1"], r"first_positions = \(1, 1\).*each once"),
        (["map", "--max-sinks", "0"], "max_sinks = 0: at least 1"),
        (["demo", "--max-sinks", "-2"], "max_sinks = -2: at least 1"),
        (["map", "--kinds"], "no kinds of sink"),
        (["map", "--max-tokens", "0"], "max_tokens = 0: at least 1"),
        (["demo", "--n-prompts", "-3"], "n = -3 prompts asked for: at least 1"),
        (["detect", "--prompts", "nofile.txt"], r"prompt file nofile\.txt does not exist: check the path"),
        (["map", "--prompts", "some/nofile.jsonl"], r"prompt file some/nofile\.jsonl does not exist"),
        (["demo", "--prompts", "."], "is a folder: name a file in it"),
        (["map", "--prompts", "poetry"], "poetry.*maths"),
        (["dose", "--out", "x.xlsx"], r"x\.xlsx has no known ending: use one of \.safetensors"),
        (["map", "--figure", "x.gif"], r"x\.gif has no known ending: use one of \.html"),
        (["map", "--figure", "x"], "x has no known ending"),
        (["detect", "--method", "official", "--cosine", "0.9"], "threshold cosine = 0.9 does not belong to official"),
        (["detect", "--method", "official", "--norm-ratio", "3"], "threshold norm_ratio = 3.0 does not belong"),
        (["detect", "--method", "official", "--bridge", "0"], "threshold bridge = 0 does not belong"),
        *(
            ([name, "--device", "warp"], r"device 'warp' cannot be used .*use device='cpu'")
            for name in ("check", "detect", "map", "claims", "demo", "reproduce")
        ),
        (["sweep", "no-study.toml"], r"study no-study\.toml cannot be read"),
        (["sweep", "no-study.toml", "--workers", "-1"], "workers -1: at least 0"),
    ],
)
def test_what_can_be_told_before_the_model_is_loaded_is_told_before(arguments, sentence, capsys, monkeypatch, tmp_path):
    """The model does not exist: whoever tries to load it says so, and not what is wrong with the options."""
    monkeypatch.chdir(tmp_path)
    name = [] if arguments[0] == "sweep" else ["no-such-model"]
    refused([arguments[0], *name, *arguments[1:]], sentence, capsys)
    assert not list(tmp_path.iterdir()), "a refused command left files behind"


def test_layers_are_checked_against_the_configuration_before_the_weights_are_read(model, tmp_path, capsys):
    folder, texts = model
    shutil.copy(f"{folder}/config.json", tmp_path)  # and no weights, so that a load fails
    refused(["map", str(tmp_path), *texts, "--layers", "3", "24"], r"layer 24 is out of range.*0\.\.23", capsys)
    refused(["map", str(tmp_path), *texts, "--layers", "23"], "could not be loaded", capsys)


def test_an_existing_result_is_kept(model, tmp_path, capsys):
    folder, texts = model
    out = tmp_path / "sinks.parquet"
    out.write_bytes(b"precious")
    assert main(["detect", folder, *texts, "--out", str(out)]) == 2
    assert out.read_bytes() == b"precious"
    assert "exists already" in capsys.readouterr().err
    assert main(["detect", folder, *texts, "--out", str(out), "--overwrite"]) == 0
    assert len(Sinks.load(out)) == 6


def test_a_folder_that_cannot_be_made_is_told_before_any_work(model, tmp_path, capsys):
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert main(["detect", "no-such-model", "--out", str(blocked / "sub" / "x.csv")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_an_interrupted_demo_keeps_what_it_has(model, tmp_path, capsys, monkeypatch):
    """Ctrl-C, a real signal, as soon as the layer map is on disk; results of an earlier run are not mixed in."""
    folder, texts = model
    out = tmp_path / "demo"
    out.mkdir()
    stale = (
        "layer_map.safetensors",
        "ablation.safetensors",
        "token_scores.safetensors",
        "writers.safetensors",
        "report.html",
    )
    for name in (*stale, "notes.txt"):
        (out / name).write_text("of an earlier run")
    save = Effect.save

    def save_and_interrupt(effect, path, **options):
        save(effect, path, **options)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Effect, "save", save_and_interrupt)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job is born deaf to it
    try:
        assert main(["demo", folder, *texts, "--folder", str(out), "--overwrite"]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    error = capsys.readouterr().err
    kept = {path.name for path in out.iterdir()} - {"notes.txt"}
    assert {"sinks.parquet", "layer_map.safetensors"} <= kept
    assert "report.html" not in kept, "the report of an earlier run stands beside new results"
    assert "interrupted" in error and str(out) in error
    assert all(name in error for name in kept), error
    assert len(Sinks.load(out / "sinks.parquet")) == 6
    assert Effect.load(out / "layer_map.safetensors").forming().tolist() == [6] * 3


def test_check_says_what_holds_and_which_path_serves(model, capsys):
    assert main(["check", model[0], "--quiet"]) == 0
    said = capsys.readouterr().out
    assert "Execution path: fast" in said
    assert "a no-op is an unedited row, bit for bit" in said
    assert "FAILED" not in said


def test_claims_and_controls_need_sensible_counts(model, capsys):
    folder, texts = model
    assert main(["claims", folder, *texts, "--n-random", "0"]) == 2
    assert main(["ablate", folder, *texts, "--n-random", "-1"]) == 2
    assert capsys.readouterr().err.count("n_random") == 2


def test_calibrate_prints_its_table(tmp_path, capsys):
    out = tmp_path / "calibration.csv"
    main(["calibrate", "--n-plants", "1", "--n-null", "0", "--out", str(out), "--quiet"])
    assert "detection: secondary" in capsys.readouterr().out
    table = pd.read_csv(out)
    assert (table["right"] <= table["n"]).all()
    assert main(["calibrate", "--n-plants", "0", "--quiet"]) == 2
