"""The command line, run as a user runs it: real processes for what must be light, `main` for the rest."""

import json
import subprocess
import sys

import pandas as pd
import pytest

from sink_circuits import Effect, Sinks, planted, records
from sink_circuits.cli import COMMANDS, main


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
    assert found["pos"].tolist() == [30] * 3
    assert set(found["sink_type"]) == {"secondary"}


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
    assert "log_odds" in capsys.readouterr().out


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
        "report.html",
    }
    page = (out / "report.html").read_text()
    assert "secondary" in page and "sink-circuits" in page
    before = (out / "report.html").stat().st_mtime_ns
    assert main(["demo", folder, *texts, "--folder", str(out)]) == 2, "a folder that holds results is not written to"
    assert (out / "report.html").stat().st_mtime_ns == before


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
        (["map", "MODEL", "TEXTS", "--layers", "-1"], "layer -1 is out of range"),
        (["ablate", "MODEL", "TEXTS", "--layers", "3", "3"], "name each layer once"),
        (["dose", "MODEL", "TEXTS", "--factors", "-1"], "factor -1.0 is not allowed"),
        (["dose", "MODEL", "TEXTS", "--factors", "nan"], "factor nan is not allowed"),
        (["dose", "MODEL", "TEXTS", "--factors", "inf"], "factor inf is not allowed"),
        (["dose", "MODEL", "TEXTS", "--factors", "1", "1"], "give each once"),
        (["map", "MODEL", "TEXTS", "--kinds", "primary-like"], "no sinks of kind primary-like"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(model, arguments, sentence, capsys, monkeypatch, tmp_path):
    import re

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder, texts = model
    filled = []
    for word in arguments:
        filled += [folder] if word == "MODEL" else texts if word == "TEXTS" else [word]
    assert main(filled) == 2
    error = capsys.readouterr().err
    assert re.search(sentence, error), error
    assert "Traceback" not in error
    assert len([line for line in error.splitlines() if line.startswith("sink-circuits:")]) == 1
    assert not list(tmp_path.iterdir()), "a refused command left files behind"


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
