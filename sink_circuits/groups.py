"""Groups of keys: where a query's attention goes, summed over groups that cover every key once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sink_circuits.adapters import Adapter


@dataclass(frozen=True)
class KeyGroups:
    """A partition of one text's keys, and the queries over which each group's attention is averaged.

    `of_key`: which group each key belongs to, 0..n_key_groups-1. Two more groups follow: the query's own key ("self",
    taken out of the group that it belongs to) and the learned sink (0 in models without one), so that the masses of
    one query sum to 1. The queries are those from `first_query` on that can see key `seen` (in a sliding-window
    layer: query - seen < window).
    """

    of_key: Int[Tensor, " key"]
    n_key_groups: int
    first_query: int
    seen: int

    @property
    def n_groups(self) -> int:
        return self.n_key_groups + 2

    def indicator(self) -> Float[Tensor, "key key_group"]:
        """1 where the key belongs to the group."""
        return torch.nn.functional.one_hot(self.of_key.long(), self.n_key_groups).float()

    def queries(self, window: int | None) -> range:
        """The queries averaged in a layer with this sliding window; none where they are all too far away."""
        n = len(self.of_key)
        return range(self.first_query, n if window is None else min(n, self.seen + window))

    def mean(
        self, grouped: Float[Tensor, "query head key_group"], diagonal: Float[Tensor, "head query"], start: int,
        window: int | None, learned_sink: bool,
    ) -> Float[Tensor, "head group"]:  # fmt: skip
        """Mean over the queries of the mass of every group, NaN where there are none; the first query is `start`.

        `grouped`: each query's attention summed by `indicator`; `diagonal`: A[q, q].
        """
        queries = self.queries(window)
        if not len(queries):
            return torch.full((grouped.shape[1], self.n_groups), torch.nan, device=grouped.device)
        index = torch.arange(queries.start, queries.stop)
        by_key = grouped[index - start].double()  # [query, head, key_group]
        own = diagonal[:, index - start].double().T  # [query, head]
        if not learned_sink:  # a pattern kept in half precision sums to 1 only up to its rounding
            total = by_key.sum(-1)
            by_key, own = by_key / total[..., None], own / total
        others = by_key - own[..., None] * self.indicator()[index][:, None].to(by_key)
        learned = 1 - by_key.sum(-1) if learned_sink else torch.zeros_like(own)
        masses = torch.cat([others, own[..., None], learned[..., None]], dim=-1)
        return masses.clamp(min=0).mean(0).float()


@dataclass(frozen=True)
class Masses:
    """Collects, layer by layer, the masses that the rows of a batch ask for: `of_row[row][i]` is [layer, head, group].

    `columns` [row, key, column]: the indicators of all of a row's groups side by side, 0 where it asks for fewer than
    another row; None where no row asks for any. Layers that are not noted stay NaN.
    """

    groups: tuple[tuple[KeyGroups, ...], ...]
    columns: Float[Tensor, "row key column"] | None
    of_row: list[tuple[Float[Tensor, "layer head group"], ...]]
    windows: tuple[int | None, ...]

    @staticmethod
    def of(adapter: Adapter, groups: Sequence[Sequence[KeyGroups]], n_positions: int) -> Masses:
        rows = tuple(tuple(own) for own in groups)
        columns = None
        if any(rows):
            widths = [sum(g.n_key_groups for g in own) for own in rows]
            columns = torch.zeros(len(rows), n_positions, max(widths))
            for row, own in enumerate(rows):
                if own:
                    columns[row, :, : widths[row]] = torch.cat([g.indicator() for g in own], dim=1)
            columns = columns.to(adapter.device)
        shape = (adapter.n_layers, adapter.n_heads)
        masses = [tuple(torch.full((*shape, g.n_groups), torch.nan) for g in own) for own in rows]
        return Masses(rows, columns, masses, adapter.windows)

    @property
    def first_query(self) -> int | float:
        return min((g.first_query for own in self.groups for g in own), default=math.inf)

    def note(
        self, layer: int, grouped: Float[Tensor, "row query head column"], diagonal: Float[Tensor, "row head query"],
        start: int, learned_sink: bool,
    ) -> None:  # fmt: skip
        """Take one layer's sums over the columns and A[q, q], for the queries from `start` on."""
        for row, groups in enumerate(self.groups):
            at = 0
            for own, masses in zip(groups, self.of_row[row], strict=True):
                here = grouped[row, :, :, at : at + own.n_key_groups]
                masses[layer] = own.mean(here, diagonal[row], start, self.windows[layer], learned_sink).cpu()
                at += own.n_key_groups
