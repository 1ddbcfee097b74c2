"""Tokens as text with their sink scores: what shows sinks in their text when the model is not at hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Float

from sink_circuits.adapters import adapt
from sink_circuits.errors import InputError
from sink_circuits.prompts import Tokens, as_tokens, token_texts
from sink_circuits.results import Manifest, read_result, write_result
from sink_circuits.scores import MIN_QUERIES, sink_scores


@dataclass(frozen=True)
class TokenScores:
    """`data`: `score` [token, layer], mean over heads of the sink score in [0, 1] (NaN: too few later queries).

    `table`: one row per token of every prompt: prompt, pos, token (its text).
    """

    data: xr.Dataset
    table: pd.DataFrame
    manifest: Manifest

    @property
    def texts(self) -> dict[str, list[str]]:
        """Each prompt's tokens as text."""
        return {str(name): own["token"].tolist() for name, own in self.table.groupby("prompt", sort=False)}

    @property
    def scores(self) -> dict[str, Float[np.ndarray, "layer key"]]:
        """Each prompt's scores."""
        values = self.data["score"].to_numpy()
        return {str(name): values[own.index].T for name, own in self.table.groupby("prompt", sort=False)}

    def to_dataframe(self) -> pd.DataFrame:
        """Long format: one row per token and layer."""
        return self.data["score"].to_dataframe().reset_index().join(self.table, on="token_index")

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """One safetensors file, whole or not at all. Raises ResultError when `path` exists or cannot be written."""
        write_result(path, "token_scores", self.data, self.table, self.manifest, overwrite=overwrite)

    @staticmethod
    def load(path: str | Path) -> TokenScores:
        """Read what `save` wrote. Raises ResultError for any other file."""
        return TokenScores(*read_result(path, "token_scores", "a result with scores of tokens")[:3])


def token_scores(
    model, tokens, prompts: Sequence[str] | None = None, *, min_queries: int = MIN_QUERIES, path: str = "auto"
) -> TokenScores:  # fmt: skip
    """Texts and scores of the tokens of some prompts (all, when None). Raises InputError for a prompt that is not there."""
    tokens = as_tokens(model, tokens)
    names = tokens.names if prompts is None else tuple(prompts)
    if unknown := [name for name in names if name not in tokens.names]:
        raise InputError(f"prompt {unknown[0]!r} is none of these: there are {', '.join(map(str, tokens.names))}.")
    values, rows = [], []
    for name in names:
        ids = tokens.ids[tokens.names.index(name)]
        scores = sink_scores(model, Tokens((ids,), (name,)), min_queries=min_queries, path=path).scores[0]
        values.append(scores.float().mean(dim=1).T.cpu().numpy())
        rows += [{"prompt": name, "pos": pos, "token": text} for pos, text in enumerate(token_texts(model, ids))]
    stacked = np.concatenate(values).astype(np.float32)
    coords = {"token_index": np.arange(len(stacked)), "layer": np.arange(stacked.shape[1])}
    data = xr.Dataset({"score": (("token_index", "layer"), stacked)}, coords=coords)
    manifest = Manifest.of(adapt(model), tokens, what="token_scores", path=path, min_queries=min_queries)
    return TokenScores(data, pd.DataFrame(rows), manifest)
