"""Files: whole or not at all, read back as they were, and any other file refused in one sentence."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from common import SINK, lens, prompt
from hypothesis import given
from hypothesis import strategies as st

import sink_circuits as sc
from sink_circuits.detection import OfficialResult, official
from sink_circuits.errors import InputError, ResultError
from sink_circuits.prompts import as_tokens
from sink_circuits.records import CandidateSink, Record, read_records, record_of, records_table, write_records
from sink_circuits.results import Manifest, check_target, read_dataset, write_dataset, write_whole

# ------------------------------------------------------------------------------------------------ records


def write(path, text: str):
    path.write_text(text, "utf-8")
    return path


LINE = (
    '{"candidate_sinks": {"0": {"layer": [11, 12, 13, 14, 15], "token_id": 7, "sink_type": "bos_sink"}, '
    '"17": {"layer": [11, 12, 14], "token_id": 262, "sink_type": "secondary"}, '
    '"3": {"layer": [12], "token_id": 5, "sink_type": "noise"}}, '
    '"sample_index": 4, "prompt_len": 20, "response_len": 5, "full_text_len": 25}\n'
)


def test_a_line_is_written_byte_for_byte_as_published(tmp_path):
    found = OfficialResult(0, 11, 15, {3: [12], 17: [11, 12, 14]}, {3: "noise", 17: "secondary"})
    ids = torch.zeros(25, dtype=torch.long)
    ids[0], ids[17], ids[3] = 7, 262, 5
    record = record_of(found, ids, 4, n_layers=20, prompt_len=20)
    write_records(tmp_path / "r.jsonl", [record, record])
    assert (tmp_path / "r.jsonl").read_bytes() == LINE.encode() * 2
    assert read_records(tmp_path / "r.jsonl") == [record, record]
    assert record_of(found, ids, 4, n_layers=20).prompt_len == 25
    assert record_of(found, ids.tolist(), 4, n_layers=20).response_len == 0
    longer = record_of(found, ids, 4, n_layers=24).candidate_sinks[0]
    assert longer.sink_type == "secondary", "the published code labels the BOS sink by its number of layers too"


def test_a_published_line_is_read(tmp_path):
    (record,) = read_records(write(tmp_path / "r.jsonl", LINE))
    assert record.candidate_sinks == {
        0: CandidateSink((11, 12, 13, 14, 15), 7, "bos_sink"),
        17: CandidateSink((11, 12, 14), 262, "secondary"),
        3: CandidateSink((12,), 5, "noise"),
    }
    assert (record.sample_index, record.prompt_len, record.response_len, record.full_text_len) == (4, 20, 5, 25)


def test_cliff_is_the_older_name_of_secondary(tmp_path):
    old = read_records(write(tmp_path / "r.jsonl", LINE.replace("secondary", "cliff") + "\n" + LINE))
    assert old[0] == old[1]


def test_table_of_records(tmp_path):
    table = records_table(read_records(write(tmp_path / "r.jsonl", LINE)))
    assert table["sink_type"].tolist() == ["bos_sink", "secondary", "noise"]
    assert table.to_dict("records")[1:] == [
        {
            "sample_index": 4,
            "pos": 17,
            "token_id": 262,
            "sink_type": "secondary",
            "l_start": 11,
            "l_end": 14,
            "lifetime": 3,
        },
        {"sample_index": 4, "pos": 3, "token_id": 5, "sink_type": "noise", "l_start": 12, "l_end": 12, "lifetime": 1},
    ]
    empty = records_table([])
    assert list(empty.columns) == list(table.columns)
    assert (empty.dtypes.drop("sink_type") == table.dtypes.drop("sink_type")).all()


counts = st.integers(0, 10**6)
candidates = st.builds(
    CandidateSink, st.lists(st.integers(0, 80), min_size=1, unique=True).map(sorted).map(tuple), counts,
    st.sampled_from(["secondary", "bos_sink", "noise"]),
)  # fmt: skip
any_record = st.builds(Record, st.dictionaries(counts, candidates, max_size=4), counts, counts, counts, counts)


@given(st.lists(any_record, max_size=4))
def test_records_survive_a_file(tmp_path_factory, records):
    path = tmp_path_factory.mktemp("records") / "r.jsonl"
    write_records(path, records)
    assert read_records(path) == records
    for line, record in zip(path.read_text().splitlines(), records, strict=True):
        fields = json.loads(line)
        assert list(fields) == ["candidate_sinks", "sample_index", "prompt_len", "response_len", "full_text_len"]
        assert [list(sink) for sink in fields["candidate_sinks"].values()] == [
            ["layer", "token_id", "sink_type"] for _ in record.candidate_sinks
        ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ("secondary", "tertiary"),
            r"sink_type 'tertiary' of the sink at position 17 is unknown: secondary, bos_sink, noise, cliff",
        ),
        (('"sink_type": "secondary"', '"sink_type": null'), "sink_type None"),
        (('"sink_type": "secondary"', '"sink_type": ["x"]'), "sink_type"),
        (('"17"', '"x17"'), "position 'x17' is not a whole number"),
        (('"17"', '"-1"'), "position '-1' is not a whole number"),
        (('"17"', '"1.5"'), "position '1.5' is not a whole number"),
        (('"token_id": 262, ', ""), "the sink at position 17 lacks token_id"),
        (('"token_id": 262', '"token_id": "262"'), "token_id of the sink at position 17 is '262'"),
        (("[11, 12, 14]", "[]"), r"layer of the sink at position 17 is \[\]"),
        (("[11, 12, 14]", "[11, 1.5]"), r"layer of the sink at position 17 is \[11, 1.5\]"),
        (("[11, 12, 14]", "11"), "layer of the sink at position 17 is 11"),
        (('"sample_index": 4, ', ""), "the line lacks sample_index"),
        (('"prompt_len": 20, "response_len": 5, ', ""), "the line lacks prompt_len, response_len"),
        (('"prompt_len": 20', '"prompt_len": true'), "prompt_len is True"),
        (('{"candidate_sinks": {', '{"candidate_sinks": 3, "x": {'), "candidate_sinks is 3"),
        (('{"layer": [12], "token_id": 5, "sink_type": "noise"}', "7"), "the sink at position 3 is int, a JSON object"),
        (('"full_text_len": 25}\n', ""), "not a whole JSON object.*cut off"),
        ((LINE, "[1, 2]\n"), "the line is list, a JSON object is needed"),
    ],
)
def test_broken_lines_are_named(tmp_path, change, message):
    broken = LINE.replace(*change)
    assert broken != LINE
    path = write(tmp_path / "r.jsonl", LINE + broken)
    with pytest.raises(ResultError, match=rf"r\.jsonl, line 2: .*{message}"):
        read_records(path)


@given(st.data())
def test_a_file_cut_anywhere_is_refused_or_loses_whole_lines_only(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("records") / "r.jsonl"
    whole = LINE * 3
    cut = data.draw(st.integers(0, len(whole)))
    write(path, whole[:cut])
    if cut % len(LINE) in (0, len(LINE) - 1):  # at a line's end, with or without its line break
        assert len(read_records(path)) == (cut + 1) // len(LINE)
    else:
        with pytest.raises(ResultError, match=f"line {cut // len(LINE) + 1}"):
            read_records(path)


def test_records_that_do_not_fit_their_text_are_refused():
    found = OfficialResult(0, 1, 2, {17: [1]}, {17: "noise"})
    with pytest.raises(InputError, match="a sink at position 17 in a text of 10 tokens"):
        record_of(found, range(10), 0, n_layers=24)
    with pytest.raises(InputError, match=r"prompt_len = 30 is out of range: the text has 20 tokens"):
        record_of(found, range(20), 0, n_layers=24, prompt_len=30)


def test_record_of_a_planted_text(tmp_path):
    clean = sc.run_clean(lens(), prompt())
    states = torch.stack([clean.resid_post(layer) for layer in range(24)])
    record = record_of(official(states), prompt(), 0, n_layers=24)
    assert record.candidate_sinks == {
        0: CandidateSink(tuple(range(2, 21)), 0, "bos_sink"),
        SINK: CandidateSink(tuple(range(6, 13)), 1, "secondary"),
    }


def test_records_files_are_not_overwritten_unasked(tmp_path):
    path = write(tmp_path / "r.jsonl", "mine")
    with pytest.raises(ResultError, match="exists already"):
        write_records(path, [])
    assert path.read_text() == "mine"
    write_records(path, [], overwrite=True)
    assert path.read_text() == ""
    with pytest.raises(ResultError, match=r"nothing\.jsonl cannot be read.*check the path"):
        read_records(tmp_path / "nothing.jsonl")


# ------------------------------------------------------------------------------------------------ whole files
def test_a_failing_writer_leaves_nothing_behind_and_the_old_file_whole(tmp_path):
    path = write(tmp_path / "a", "old")

    def half(temporary):
        temporary.write_text("half")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        write_whole(path, half, overwrite=True)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


def test_every_name_that_fits_can_be_written(tmp_path):
    path = tmp_path / ("x" * 251 + ".csv")  # 255: the most that file systems take
    write_whole(path, lambda temporary: temporary.write_text("1"))
    assert path.read_text() == "1"
    with pytest.raises(InputError, match="cannot be reached .File name too long.: check the path"):
        write_whole(tmp_path / ("x" * 256), lambda temporary: temporary.write_text("1"))


def test_folders_are_made_and_existing_files_kept(tmp_path):
    path = tmp_path / "x" / "y" / "a"
    write_whole(path, lambda temporary: temporary.write_text("1"))
    assert path.read_text() == "1"
    with pytest.raises(ResultError, match=r"a exists already: choose another name, or pass overwrite=True"):
        write_whole(path, lambda temporary: temporary.write_text("2"))
    assert path.read_text() == "1"
    write_whole(path, lambda temporary: temporary.write_text("2"), overwrite=True)
    assert path.read_text() == "2"
    assert os.listdir(path.parent) == ["a"]


def dataset() -> xr.Dataset:
    return xr.Dataset(
        {"x": (("sink", "layer"), np.arange(6, dtype=np.float32).reshape(2, 3))}, coords={"layer": [0, 1, 2]}
    )


@pytest.mark.parametrize("target", ["file/a.safetensors", "/proc/none/a.safetensors", "/proc/a.safetensors"])
def test_folders_that_cannot_be_written_are_named_beforehand_and_when_writing(tmp_path, target):
    write(tmp_path / "file", "in the way")
    path = tmp_path / target
    with pytest.raises(ResultError, match=r"a\.safetensors cannot be written.*choose a folder"):
        check_target(path)
    with pytest.raises(ResultError, match=r"a\.safetensors cannot be written.*choose a folder"):
        write_dataset(path, dataset(), {})


def test_targets_are_checked_without_leaving_a_trace(tmp_path):
    check_target(tmp_path / "new" / "a")
    assert os.listdir(tmp_path) == []
    write(tmp_path / "a", "old")
    with pytest.raises(ResultError, match="exists already"):
        check_target(tmp_path / "a")
    check_target(tmp_path / "a", overwrite=True)
    with pytest.raises(ResultError, match="is a folder: name a file in it"):
        check_target(tmp_path, overwrite=True)


@pytest.mark.skipif(sys.platform != "linux", reason="a file-size limit stands for a full disk")
def test_a_full_disk_leaves_the_old_file(tmp_path):
    code = f"""
import resource, signal
import numpy as np, xarray as xr
from pathlib import Path
from sink_circuits.errors import ResultError
from sink_circuits.results import write_dataset
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
data = xr.Dataset({{"x": (("a",), np.zeros(100000))}})
path = Path({str(tmp_path / "a")!r})
write_dataset(path, data[{{"a": slice(3)}}], {{}})
resource.setrlimit(resource.RLIMIT_FSIZE, (50000, 50000))
try:
    write_dataset(path, data, {{}}, overwrite=True)
except ResultError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "cannot be written" in done.stdout, done.stderr[-500:]
    assert read_dataset(tmp_path / "a")[0].sizes == {"a": 3}
    assert os.listdir(tmp_path) == ["a"]


# ------------------------------------------------------------------------------------------------ datasets, tables
names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=5)
labels = st.one_of(
    st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=4, unique=True),
    st.lists(st.integers(-(2**40), 2**40), min_size=1, max_size=4, unique=True),
    st.lists(names, min_size=1, max_size=4, unique=True),
)


@given(labels, st.integers(0, 3), st.dictionaries(names, st.integers() | st.text(st.characters(codec="utf-8"))))
def test_arrays_and_axes_survive_a_file(tmp_path_factory, edits, n_sinks, meta):
    path = tmp_path_factory.mktemp("data") / "d.safetensors"
    values = np.random.default_rng(0).normal(size=(n_sinks, len(edits))).astype(np.float32)
    if n_sinks:
        values[0, 0] = np.nan
    data = xr.Dataset(
        {"x": (("sink", "edit"), values), "n": (("edit", "sink"), np.full(values.T.shape, 7))},
        coords={"edit": edits, "sink": np.arange(n_sinks)},
    )
    write_dataset(path, data, meta)
    read, read_meta = read_dataset(path)
    assert read.equals(data)
    assert {n: a.dtype for n, a in read.data_vars.items()} == {n: a.dtype for n, a in data.data_vars.items()}
    assert read_meta == meta


@pytest.fixture(scope="module")
def found() -> sc.Sinks:
    return sc.find_sinks(lens(), [prompt(), prompt((20,), 70, "b")], verbose=False, cosine=0.8)


def test_sinks_survive_a_file(tmp_path, found):
    path = tmp_path / "s.parquet"
    found.save(path)
    read = sc.Sinks.load(path)
    pd.testing.assert_frame_equal(read.table, found.table)
    assert read.prompts == found.prompts
    assert read.manifest == found.manifest
    with pytest.raises(ResultError, match="exists already"):
        found.save(path)
    found.save(path, overwrite=True)
    none = sc.find_sinks(lens("bridge", "primary"), prompt(), verbose=False)
    none.save(tmp_path / "none.parquet")
    pd.testing.assert_frame_equal(sc.Sinks.load(tmp_path / "none.parquet").table, none.table)


def test_manifest_says_how_a_result_was_made(found):
    manifest = found.manifest
    assert (manifest.what, manifest.n_prompts, manifest.path, manifest.dtype) == (
        "find_sinks:robust",
        2,
        "fast",
        "float32",
    )
    assert manifest.settings["thresholds"]["cosine"] == 0.8
    assert manifest.weights == sc.adapt(lens()).weights_hash
    assert manifest.tokens == as_tokens(lens(), [prompt(), prompt((20,), 70, "b")]).hash
    assert manifest.versions["torch"] == torch.__version__
    assert Manifest.from_dict(json.loads(json.dumps(manifest.to_dict()))) == manifest


def test_manifest_says_where_the_weights_and_the_seeds_come_from(found):
    manifest = found.manifest
    assert manifest.revision == "", "made in memory: there is no commit and no file"
    assert manifest.device == "cpu"
    assert manifest.seed == "names"
    older = manifest.to_dict()
    del older["revision"], older["seed"], older["device"]
    read = Manifest.from_dict(older)
    assert (read.revision, read.seed, read.device, read.format) == ("", "", "", 1)
    assert dataclasses.replace(read, seed="names", device="cpu") == manifest


def test_files_of_another_format_or_origin_are_refused(tmp_path, found):
    with pytest.raises(ResultError, match="format 2, this version reads 1"):
        Manifest.from_dict(dataclasses.replace(found.manifest, format=2).to_dict())
    with pytest.raises(ResultError, match="manifest of this file cannot be read"):
        Manifest.from_dict({"what": "x"})
    path = tmp_path / "s.parquet"
    for broken in (b"", b"PAR1", b"x" * 100):
        path.write_bytes(broken)
        with pytest.raises(ResultError, match=r"s\.parquet cannot be read as a parquet table"):
            sc.Sinks.load(path)
    found.save(path, overwrite=True)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ResultError, match=r"s\.parquet cannot be read as a parquet table"):
        sc.Sinks.load(path)
    found.table.to_parquet(path)
    with pytest.raises(ResultError, match="not a table of sinks written by this package"):
        sc.Sinks.load(path)
    for absent in (tmp_path / "nowhere.parquet", tmp_path):
        with pytest.raises(ResultError, match="cannot be read|not a table"):
            sc.Sinks.load(absent)


def test_safetensors_of_other_origin_are_refused(tmp_path):
    from safetensors.numpy import save_file

    path = tmp_path / "d.safetensors"
    save_file({"x": np.zeros(3)}, path)
    with pytest.raises(ResultError, match="not a result of this package: check the path"):
        read_dataset(path)
    for header in ("{", "[]", '{"format": 1}'):
        save_file({"x": np.zeros(3)}, path, metadata={"sink_circuits": header})
        with pytest.raises(ResultError, match=r"d\.safetensors"):
            read_dataset(path)
    save_file(
        {"x": np.zeros(3)}, path, metadata={"sink_circuits": '{"format": 9, "meta": {}, "dims": {}, "coords": {}}'}
    )
    with pytest.raises(ResultError, match="format 9, this version reads 1"):
        read_dataset(path)
    write_dataset(path, dataset(), {"a": 1}, overwrite=True)
    whole = path.read_bytes()
    for cut in (0, 5, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(ResultError, match=r"d\.safetensors cannot be read as a result"):
            read_dataset(path)
    for absent in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(ResultError, match="cannot be read as a result"):
            read_dataset(absent)
    write_dataset(path, dataset(), {"a": 1}, overwrite=True)
    with pytest.raises(ResultError, match="not an experiment's result"):
        sc.Effect.load(path)


def test_a_file_that_lacks_an_entry_says_which(tmp_path):
    """As a version might have written it that knew no controls."""
    file = tmp_path / "claims.safetensors"
    data = xr.Dataset({"value": (("sink",), np.zeros(2))}, coords={"sink": [0, 1]})
    manifest = Manifest("claims", "m", "w", "float32", "t", 1, "fast").to_dict()
    write_dataset(file, data, {"kind": "claims", "verdicts": {}, "table": {}, "sinks": {}, "manifest": manifest})
    with pytest.raises(ResultError, match="lacks 'controls', which this version reads: make the result again"):
        sc.Claims.load(file)
