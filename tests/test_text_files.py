"""Files that people write: what an editor adds does not count, what could be read in two ways is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import sink_circuits as sc
from sink_circuits import arguments
from sink_circuits.errors import LONGEST, InputError, SinkCircuitsError
from sink_circuits.records import read_records
from sink_circuits.report.sources import read_results
from sink_circuits.results import check_target
from sink_circuits.studies import read_token_file

BOM = b"\xef\xbb\xbf"
RECORD = {"candidate_sinks": {}, "sample_index": 0, "prompt_len": 1, "response_len": 0, "full_text_len": 1}
SINK = {"layer": [1, 2], "token_id": 1, "sink_type": "noise"}
READERS = {
    "prompts": sc.load_prompts, "records": read_records, "tokens": read_token_file, "study": sc.read_study, "sinks": sc.Sinks.load,
    "effect": sc.Effect.load, "results": lambda path: read_results([path]), "sweep": sc.load_sweep,
}  # fmt: skip


def one_sentence(error: pytest.ExceptionInfo) -> str:
    said = str(error.value)
    assert "\n" not in said and said.endswith((".", "?")) and len(said) <= LONGEST, said
    return said


def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path):
    """As a prompt's first character it would be its first token, the primary sink."""
    path = tmp_path / "a"
    for name, content in (("a.txt", b"hello"), ("a.jsonl", b'{"text": "hello"}\n')):
        (tmp_path / name).write_bytes(BOM + content)
        assert sc.load_prompts(tmp_path / name)[0].text == "hello"
    path.write_bytes(BOM + json.dumps(RECORD).encode())
    assert len(read_records(path)) == 1
    path.write_bytes(BOM + b'{"id": "a", "tokens": [1, 2]}\r\n')
    assert read_token_file(path) == [("a", (1, 2))]
    path.write_bytes(BOM + b'models = ["m"]\r\n')
    assert sc.read_study(path).models == ("m",)


TWICE = {
    "a prompt": (sc.load_prompts, '{"text": "a", "text": "b"}', "line 1: the key 'text' is there twice; mend"),
    "in two cases": (sc.load_prompts, '{"text": "a", "Text": "b"}', "line 1: its keys .text, Text. hold one of them twice"),
    "tokens": (read_token_file, '{"tokens": [1], "tokens": [2]}', "line 1: the key 'tokens' is there twice"),
    "a sink": (
        read_records, json.dumps(RECORD).replace("{}", f'{{"1": {json.dumps(SINK)}, "1": {json.dumps(SINK)}}}'),
        "line 1: the key '1' is there twice",
    ),
    "a sink, spelt otherwise": (
        read_records, json.dumps({**RECORD, "candidate_sinks": {"1": SINK, "01": SINK}}), "line 1: position 1 is there twice",
    ),
    "layers": (
        read_records, json.dumps({**RECORD, "candidate_sinks": {"1": {**SINK, "layer": [5, 1, 1]}}}), "ascending numbers are needed",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", TWICE)
def test_what_could_be_read_in_two_ways_is_refused(tmp_path, what):
    read, content, message = TWICE[what]
    path = tmp_path / "twice.jsonl"
    path.write_text(content + "\n")
    with pytest.raises(SinkCircuitsError, match=message) as error:
        read(path)
    one_sentence(error)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"id": {"a": 1}}, "`id` is not a string but dict"),
        ({"id": True}, "`id` is not a string but bool"),
        ({"unique_id": 1.5}, "`unique_id` is not a string but float"),
        ({"id": "a", "generation_idx": [1]}, "`generation_idx` is not a whole number but list"),
        ({"id": "a", "generation_idx": float("inf")}, "`generation_idx` is not a whole number but float"),
        ({"kind": 7}, "`kind` is not a string but int"),
    ],
)
def test_an_id_is_a_name_and_not_whatever_stands_there(tmp_path, fields, message):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"text": "a", **fields}) + "\n")
    with pytest.raises(InputError, match=f"line 1: {message}; mend") as error:
        sc.load_prompts(path)
    one_sentence(error)
    path.write_text(json.dumps({"text": "a", "kind": None, "id": 3, "generation_idx": None}) + "\n")
    assert sc.load_prompts(path)[0] == sc.Prompt("3", "text", "a")


@pytest.mark.parametrize(
    "ids", ["[99999999999999999999999]", "[2147483648]", "[-1]", "[true]", "[1.0]", "[]", '"7"', "[[1]]"]
)
def test_ids_that_no_model_has_are_refused(tmp_path, ids):
    path = tmp_path / "ids.jsonl"
    path.write_text(f'{{"id": "a", "tokens": {ids}}}\n')
    with pytest.raises(InputError, match="the ids are not whole numbers from 0") as error:
        read_token_file(path)
    one_sentence(error)


@pytest.mark.parametrize("name", ['"\\ud800"', "{}", "true", "1.5"])
def test_ids_of_token_files_are_names(tmp_path, name):
    path = tmp_path / "ids.jsonl"
    path.write_text(f'{{"id": {name}, "tokens": [1]}}\n')
    with pytest.raises(InputError, match="the id is not a string"):
        read_token_file(path)


@pytest.mark.parametrize(
    "content",
    [
        "models = " + "[" * 50_000 + "]" * 50_000, "models = " + "{a = " * 20_000 + "1" + "}" * 20_000,
        'models = ["m"]\nlayers = [' + "9" * 5000 + "]", 'models = ["m"]\nseed = 2020-13-45',
    ],
    ids=["brackets", "tables", "digits", "a date"],
)  # fmt: skip
def test_toml_that_python_cannot_hold_is_refused(tmp_path, content):
    path = tmp_path / "study.toml"
    path.write_text(content)
    with pytest.raises(InputError, match=r"study .* is not TOML") as error:
        sc.read_study(path)
    one_sentence(error)


def test_more_threads_than_any_machine_has_are_refused():
    """Where threads cannot be had, OpenMP ends the process."""
    with pytest.raises(InputError, match="threads = 999999999: at most 1024"):
        sc.Study(models=["m"], threads=999_999_999)


# -------------------------------------------------------------------------------------------------------------- paths
@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("path", ["a\0b", "\ud800", "x" * 300, "x" * 5000, "file/below", "loop", "nothing"], ids=repr)
def test_a_path_that_leads_nowhere_is_told_in_one_sentence(reader, path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("loop").symlink_to("loop")
    Path("nothing").symlink_to("absent")
    with pytest.raises(SinkCircuitsError) as error:
        READERS[reader](path)
    one_sentence(error)


def test_a_device_is_no_result():
    with pytest.raises(SinkCircuitsError, match="/dev/null is neither a file nor a folder") as error:
        read_results(["/dev/null"])
    one_sentence(error)


@pytest.mark.parametrize(
    "source", ["x" * 300, "~no-such-user/model", "\ud800", "a\0b", "loop", "file/config.json"], ids=repr
)
def test_a_model_that_leads_nowhere_is_told_in_one_sentence(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("loop").symlink_to("loop")
    with pytest.raises(SinkCircuitsError) as error:
        sc.load_model(source)
    one_sentence(error)
    with pytest.raises(SinkCircuitsError) as error:
        sc.sweep(sc.Study(models=[source]), "sweep", verbose=False)
    one_sentence(error)


@pytest.fixture
def as_nobody(tmp_path):
    """This process without root's powers, before a folder that it may not enter."""
    closed = tmp_path / "closed"
    closed.mkdir()
    (closed / "there").write_text("x")
    root = os.geteuid() == 0
    closed.chmod(0)
    for folder in (tmp_path, *tmp_path.parents[:2]):
        if root:
            folder.chmod(0o755)
    if root:
        os.seteuid(65534)
    try:
        yield closed
    finally:
        if root:
            os.seteuid(0)
        closed.chmod(0o755)


def test_a_folder_that_may_not_be_entered_is_named(as_nobody):
    for name, read in {**READERS, "target": check_target}.items():
        with pytest.raises(SinkCircuitsError, match="Permission denied") as error:
            read(as_nobody / "there")
        one_sentence(error)
        assert name and "closed" in str(error.value)


def test_arguments_path():
    assert arguments.path("absent/file") == Path("absent/file")
    with pytest.raises(InputError, match=r"--out = '\\ud800': give the path of a file"):
        arguments.path("\ud800", "--out")
    with pytest.raises(InputError, match="cannot be reached .File name too long.: check the path"):
        arguments.path("x" * 300)


# ----------------------------------------------------------------------------------------------------------- messages
@pytest.mark.parametrize("length", [LONGEST - 1, LONGEST, LONGEST + 1, 10 * LONGEST])
def test_a_message_is_short_and_keeps_both_its_ends(length):
    said = str(SinkCircuitsError("begin " + "x" * (length - 16) + " remedy.."))
    assert said.startswith("begin x") and said.endswith("x remedy..")
    assert len(said) == min(length - 1, LONGEST)
