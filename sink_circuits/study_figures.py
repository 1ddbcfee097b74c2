"""The study's figures (Wong et al., 2512.22213): what each shows, and which function of `anatomy` makes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from sink_circuits import anatomy
from sink_circuits.detection import Sinks
from sink_circuits.prompts import Tokens
from sink_circuits.records import Record, records_table

LEVEL_KINDS = ("primary", "secondary", "primary-like", "bos_sink", "noise")
"""Figure 2 as published counts every candidate, the BOS sink and noise too."""


@dataclass(frozen=True)
class Subject:
    """One model, the texts it is looked at on, and all sinks found in them."""

    model: object
    tokens: Tokens
    found: Sinks
    kinds: tuple[str, ...]
    verbose: bool = False

    def of(self, function: Callable, *kinds: str, **options):
        """What a function of `anatomy` says of the sinks of these kinds (those of the plan when none are named)."""
        sinks = self.found.select(*(kinds or self.kinds))
        return function(self.model, self.tokens, sinks, verbose=self.verbose, **options)


@dataclass(frozen=True)
class StudyFigure:
    """A figure of the study: its files' name, its title, what it shows, and how it is made of a `Subject` (figure 2: of many)."""

    name: str
    title: str
    caption: str
    make: Callable[..., anatomy.Anatomy]


FIGURES = (
    StudyFigure(
        "norms_by_layer", "Figure 1: norms by layer",
        "l2 norms of keys, values (mean over heads) and hidden states of each primary and each secondary sink, and the mean of the rest.",
        lambda s: s.of(anatomy.norms_by_layer, "primary", *s.kinds),
    ),
    StudyFigure(
        "mlp_stages", "MLP stages",
        "For each sink, at the layer where it begins: cosine with the primary sink at each stage of the MLP, input to output.",
        lambda s: s.of(anatomy.mlp_stages, layer="l_start"),
    ),
    StudyFigure(
        "pca", "Figure 5: the MLP's response along principal directions",
        "Norm of MLP(alpha * pc), and its cosine with the MLP's output at the primary, for the first components of the centred MLP inputs "
        "of sinks and as many same-token non-sinks, both signs; at the layer where most sinks begin.",
        lambda s: s.of(anatomy.pca, layer="l_start"),
    ),
    StudyFigure(
        "clustering", "Figure 6: do sinks stand apart?",
        "Two-dimensional embeddings of residual stream, attention output and MLP input: sinks against the same tokens where they are no "
        "sinks, around the layer where most begin.",
        lambda s: s.of(anatomy.clustering),
    ),
    StudyFigure(
        "score_by_lifetime", "Figure 7: sink score, lifetime and the MLP's output",
        "Mean sink score by lifetime and by layer, and the norm of the MLP's output by layer; sinks coloured by lifetime.",
        lambda s: s.of(anatomy.score_by_lifetime),
    ),
    StudyFigure(
        "matrix_entropy", "Matrix entropy of the hidden states",
        "Entropy of the spectrum of the Gram matrix of the first tokens' hidden states, by layer, as more tokens are seen; with and "
        "without sinks.",
        lambda s: anatomy.matrix_entropy(s.model, s.tokens, s.found, verbose=s.verbose),
    ),
)  # fmt: skip


def _kinds_in(sources: Mapping[str, Sinks | Sequence[Record]]) -> list[str]:
    """All kinds that there are: the figure names what it counts."""
    found: set[str] = set()
    for source in sources.values():
        found |= set(source.table["kind"] if isinstance(source, Sinks) else records_table(source)["sink_type"])
    return [kind for kind in LEVEL_KINDS if kind in found] or list(LEVEL_KINDS)


LEVELS = StudyFigure(
    "levels", "Figure 2: sink levels",
    "Heat map of log(1 + count) by the layer in which a sink begins and its lifetime, one panel per model. As published, every candidate "
    "counts, the primary sink too.",
    lambda sources: anatomy.levels(sources, kinds=_kinds_in(sources)),
)  # fmt: skip


def tables_of(result: anatomy.Anatomy) -> dict[str, pd.DataFrame]:
    """What a figure shows, as tables by the suffix of their file: one, or two where its panels have different rows."""
    more: dict[str, pd.DataFrame] = {}
    if isinstance(result, anatomy.Clustering):
        embedding = result.data["embedding"].to_dataframe().reset_index()
        more = {"_embedding": embedding.join(result.table.rename(columns={"token": "token_text"}), on="token")}
    elif isinstance(result, anatomy.Pca):
        more = {"_coordinates": result.coordinates()}
    elif isinstance(result, anatomy.ScoreByLifetime):
        more = {"_by_lifetime": result.by_lifetime()}
    return {"": result.to_dataframe(), **more}
