"""Results: what every result carries (its manifest) and how files are written: whole or not at all, never pickled."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import re
import tempfile
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import xarray as xr

from sink_circuits import arguments
from sink_circuits.errors import ResultError

FORMAT = 1
"""Version of the file formats; files of another version are refused."""


@dataclass(frozen=True)
class Manifest:
    """What is needed to make a result again: model and weights, inputs, settings, versions, execution path, seeds.

    `weights`: hash of the parameters as they were used. `revision`: what they were loaded from, a Hugging Face commit
    (40 hex digits) or the SHA-256 of a GGUF file (64), empty where that is not known. `seed`: "names", for every draw is
    seeded by the hash of names that stand in the result (`statistics.seed_of`), never by a global state. `device`: "cpu",
    or "cuda: " and the name of the GPU. Files of versions that did not note these load with them empty.
    """

    what: str
    model: str
    weights: str
    dtype: str
    tokens: str
    n_prompts: int
    path: str
    settings: Mapping = field(default_factory=dict)
    versions: Mapping = field(default_factory=dict)
    revision: str = ""
    seed: str = ""
    device: str = ""
    format: int = FORMAT

    @staticmethod
    def of(adapter, tokens, *, what: str, path: str, thresholds=None, **settings) -> Manifest:
        """The manifest of a result made with this model and these `Tokens`."""
        if thresholds is not None:
            settings["thresholds"] = dataclasses.asdict(thresholds)
        versions = {
            name: importlib.metadata.version(name) for name in ("torch", "transformers", "transformer-lens", "numpy", "pandas")
        } | {"sink_circuits": _own_version()}  # fmt: skip
        return Manifest(
            what=what, model=adapter.name, weights=adapter.weights_hash, dtype=str(adapter.cfg.dtype).removeprefix("torch."),
            tokens=tokens.hash, n_prompts=len(tokens), path=path, settings=json.loads(json.dumps(settings, default=str)), versions=versions,
            revision=adapter.revision, seed="names", device=adapter.device_name,
        )  # fmt: skip

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(fields: Mapping) -> Manifest:
        try:
            manifest = Manifest(**fields)
        except (TypeError, ValueError) as error:
            raise ResultError(
                f"the manifest of this file cannot be read ({error}): it was not written by this package."
            ) from error
        if manifest.format != FORMAT:
            raise ResultError(
                f"this file has format {manifest.format}, this version reads {FORMAT}: use the version that wrote it."
            )
        return manifest


def _own_version() -> str:
    try:
        return importlib.metadata.version("sink_circuits")
    except importlib.metadata.PackageNotFoundError:
        return "uninstalled"


def write_whole(path: str | Path, write: Callable[[Path], object], *, overwrite: bool = False) -> None:
    """Write a file under a temporary name beside `path` and move it there in one step, so that no half file is seen.

    Raises ResultError when `path` exists (unless `overwrite`) or its folder cannot be written.
    """
    from safetensors import SafetensorError  # what its writer raises for a full disk

    path = arguments.path(path)
    check_target(path, overwrite=overwrite)
    temporary = path.with_name(f".{uuid.uuid4().hex}.part")  # short: any name that fits can be written
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with open(temporary, "rb+") as handle:
            os.fsync(handle.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # safetensors makes its files readable by their owner alone
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise _cannot_write(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def check_target(path: str | Path, *, overwrite: bool = False) -> None:
    """Before long work: can a result be written at `path`? Leaves nothing behind. Raises ResultError if not."""
    path = arguments.path(path)
    arguments.flag(overwrite, "overwrite")
    if path.is_dir():
        raise ResultError(f"{path} is a folder: name a file in it.")
    if path.exists() and not overwrite:
        raise ResultError(f"{path} exists already: choose another name, or pass overwrite=True (--overwrite).")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise _cannot_write(path, error) from error


def _cannot_write(path: Path, error: Exception) -> ResultError:
    reason = getattr(error, "strerror", None) or error
    return ResultError(f"{path} cannot be written ({reason}): choose a folder with space and write permission.")


def read_parquet(path: str | Path, columns: Sequence[str]) -> pd.DataFrame:
    """A table written by this package, with its metadata in `attrs`. Raises ResultError otherwise."""
    path = arguments.path(path)
    try:
        frame = pd.read_parquet(path)
        digest = frame_digest(frame, str(frame.attrs.get("sink_circuits")))
    except Exception as error:  # of a damaged file pyarrow says anything, from KeyError to its own classes
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ResultError(f"{path} cannot be read as a parquet table ({first}): check the path.") from error
    if "sink_circuits" not in frame.attrs or list(frame.columns) != list(columns):
        raise ResultError(
            f"{path} is not a table of sinks written by this package: make it with Sinks.save or `sink-circuits detect`."
        )
    if frame.attrs.get("sha256") != digest:
        raise ResultError(f"{path} is damaged (its SHA-256 is not the one it was written with): make the result again.")
    return frame


def write_dataset(path: str | Path, data: xr.Dataset, meta: Mapping, *, overwrite: bool = False) -> None:
    """Named-axis arrays as one safetensors file; axes, coordinates and `meta` travel as JSON in its header."""
    from safetensors.numpy import save_file

    fields = {
        "format": FORMAT, "meta": meta,
        "dims": {str(name): list(array.dims) for name, array in data.data_vars.items()},
        "coords": {str(name): coord.values.tolist() for name, coord in data.coords.items()},
    }  # fmt: skip
    arrays = {str(name): np.ascontiguousarray(array.values) for name, array in data.data_vars.items()}
    header = {"sink_circuits": _sealed(json.dumps(fields), arrays)}
    write_whole(path, lambda temporary: save_file(arrays, temporary, metadata=header), overwrite=overwrite)


def write_result(
    path: str | Path, kind: str, data: xr.Dataset, table: pd.DataFrame, manifest: Manifest, *, overwrite: bool = False, **more
) -> None:  # fmt: skip
    """A result with its table of sinks and manifest as one file. `more`: further tables, or what JSON holds, by name.

    Raises ResultError when `path` exists or cannot be written.
    """
    fields = {
        name: value.to_dict(orient="list") if isinstance(value, pd.DataFrame) else value
        for name, value in {"table": table, **more}.items()
    }
    write_dataset(path, data, {"kind": kind, **fields, "manifest": manifest.to_dict()}, overwrite=overwrite)


def read_result(path: str | Path, kind: str, noun: str) -> tuple[xr.Dataset, pd.DataFrame, Manifest, dict]:
    """What `write_result` wrote: arrays, table, manifest, and all that the file says. Raises ResultError for anything but `noun`."""
    data, meta = read_dataset(path)
    if meta.get("kind") != kind:
        raise ResultError(f"{path} is not {noun}: check the path.")
    return data, pd.DataFrame(meta["table"]), Manifest.from_dict(meta["manifest"]), meta


SEAL = re.compile(r', "sha256": "([0-9a-f]{64})"}$')


def _sealed(header: str, arrays: Mapping[str, np.ndarray]) -> str:
    """The JSON object `header` with a last key, "sha256". (One key of metadata: safetensors writes several in any order.)"""
    return f'{header[:-1]}, "sha256": "{_digest(header, arrays)}"}}'


def _is_whole(header: str, arrays: Mapping[str, np.ndarray]) -> bool:
    """Whether there is a seal, and it is that of what stands in the file."""
    seal = SEAL.search(header)
    return seal is not None and seal[1] == _digest(f"{header[: seal.start()]}}}", arrays)


def _digest(header: str, arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of all that a file says: neither safetensors nor parquet notices a changed byte in its numbers."""
    digest = hashlib.sha256(header.encode())
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name}{array.dtype.str}{array.shape}".encode() + array.tobytes())
    return digest.hexdigest()


def frame_digest(frame: pd.DataFrame, meta: str) -> str:
    """SHA-256 of a table and of the metadata it is saved with."""
    rows = json.dumps({str(name): frame[name].tolist() for name in frame.columns}, default=str)
    return hashlib.sha256(f"{meta}{rows}".encode()).hexdigest()


class _Meta(dict):
    """What a result file says beside its arrays. Of another version it may lack something: one sentence says what."""

    def __init__(self, path: Path, entries: Mapping):
        super().__init__(entries)
        self.path = path

    def __missing__(self, key: str):
        raise ResultError(f"{self.path} lacks {key!r}, which this version reads: make the result again.")


def read_dataset(path: str | Path) -> tuple[xr.Dataset, dict]:
    """What `write_dataset` wrote. Raises ResultError for any other file."""
    from safetensors import SafetensorError, safe_open

    path = arguments.path(path)
    try:
        with safe_open(str(path), framework="np") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError, TypeError, ValueError) as error:
        raise ResultError(
            f"{path} cannot be read as a result ({error}): check the path, or make the result again."
        ) from error
    header = metadata.get("sink_circuits")
    if header is None:
        raise ResultError(f"{path} is a safetensors file but not a result of this package: check the path.")
    try:
        fields = json.loads(header)
        if fields["format"] != FORMAT:
            raise ResultError(
                f"{path} has format {fields['format']}, this version reads {FORMAT}: use the version that wrote it."
            )
        if not _is_whole(header, arrays):
            raise ResultError(
                f"{path} is damaged (its SHA-256 is not the one it was written with): make the result again."
            )
        data = xr.Dataset(
            {name: (fields["dims"][name], array) for name, array in arrays.items()}, coords=fields["coords"]
        )
        return data, _Meta(path, fields["meta"])
    except ResultError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ResultError(f"{path} has a header that cannot be read ({error!r}): make the result again.") from error
