"""What every result of the anatomy is: named-axis arrays, the tokens they belong to, and a manifest."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, TypeVar

import pandas as pd
import xarray as xr

from sink_circuits.errors import ResultError
from sink_circuits.results import Manifest, read_dataset, write_result

SINK_COLUMNS = ("prompt", "pos", "token", "kind", "l_start", "l_end", "lifetime")
Self = TypeVar("Self", bound="Anatomy")


@dataclass(frozen=True, repr=False)
class Anatomy:
    """Base of the anatomy's results. `data`: named-axis arrays; `table`: one row per entry of the axis `row_axis`.

    Each subclass says what its arrays are. `long` names those that `to_dataframe` lays out: they share their axes.
    """

    data: xr.Dataset
    table: pd.DataFrame
    manifest: Manifest
    kind: ClassVar[str] = ""
    row_axis: ClassVar[str] = "sink"
    long: ClassVar[tuple[str, ...]] = ()

    def to_dataframe(self) -> pd.DataFrame:
        """Long format: one row per cell of the main arrays, with the columns of its sink or token."""
        frame = self.data[list(self.long)].to_dataframe().reset_index()
        columns = [name for name in self.table if name not in frame]
        return frame.join(self.table[columns], on=self.row_axis) if self.row_axis in frame else frame

    def plot(self):
        """The figure of this result (plotly)."""
        from sink_circuits import anatomy_figures

        return anatomy_figures.FIGURES[self.kind](self)

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """One safetensors file, whole or not at all. Raises ResultError when `path` exists or cannot be written."""
        write_result(path, self.kind, self.data, self.table, self.manifest, overwrite=overwrite)

    @classmethod
    def load(cls: type[Self], path: str | Path) -> Self:
        """Read what `save` wrote; `Anatomy.load` reads any kind. Raises ResultError for any other file."""
        data, meta = read_dataset(path)
        kinds: dict[str, type[Self]] = {one.kind: one for one in (cls, *cls.__subclasses__()) if one.kind}
        if not {"kind", "table", "manifest"} <= set(meta) or meta["kind"] not in kinds:
            raise ResultError(
                f"{path} holds {meta.get('kind', 'something else')!r}, {cls.__name__}.load reads {', '.join(sorted(kinds))}: "
                "check the path."
            )
        return kinds[meta["kind"]](data, pd.DataFrame(meta["table"]), Manifest.from_dict(meta["manifest"]))

    def __repr__(self) -> str:
        sizes = ", ".join(f"{size} {name}" for name, size in self.data.sizes.items())
        return f"{type(self).__name__}({self.manifest.model}: {sizes})"
