"""Memory: what a run takes beside the model's weights, said before it starts, and the rows per batch that a budget allows.

Estimates count the tensors that are alive at the worst moment; they are held against measured peaks in the tests and
lean to the high side.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import psutil
import torch

from sink_circuits import arguments
from sink_circuits.adapters import Adapter
from sink_circuits.attention import block_floats
from sink_circuits.errors import InputError
from sink_circuits.losses import LOGIT_SLICE_FLOATS

GIB = 1 << 30
BATCH_BYTES = 1 << 29
"""What one batch of edited rows takes at most, however much memory there is (512 MiB): larger ones are no faster."""
BATCH_TOKENS = 1024
"""Tokens of edited rows that one thread of a CPU takes at once, where one row has no more: larger shares are no faster."""
SPARE = 0.9
"""Share of the memory that is free now which a run may take when no budget is set."""


@dataclass(frozen=True)
class Need:
    """Bytes beside the model's weights: `clean`, of the unedited run and what is kept of it; `row`, of one edited row."""

    clean: int
    row: int


def check_memory(memory) -> float | None:
    """`memory` in GiB, or None. Raises InputError for anything but a positive, finite number."""
    if memory is None:
        return None
    if not arguments.is_number(memory) or not 0 < float(memory) < math.inf:
        raise InputError(f"memory = {arguments.shown(memory)}: give GiB, more than 0, or None for what is free.")
    return float(memory)


def available(device: torch.device) -> int:
    """Bytes that are free on a device now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def need_of(
    adapter: Adapter, n_positions: int, *, n_chosen: int = 1, path: str = "fast", resumable: bool = True,
    logits: bool = False,
) -> Need:  # fmt: skip
    """What a text of so many tokens needs. `n_chosen`: keys whose columns are kept; `logits`: for a loss or divergence."""
    cfg, n = adapter.cfg, n_positions
    n_layers, n_heads = adapter.n_layers, adapter.n_heads
    element = torch.finfo(cfg.dtype).bits // 8
    key_heads = getattr(cfg, "n_key_value_heads", None) or n_heads
    key_width, query_width = key_heads * cfg.d_head, n_heads * cfg.d_head
    sums, columns = 4 * 2 * n_layers * n_heads * n, 4 * 2 * n_layers * n_heads * n * n_chosen
    kept = element * n_layers * n * cfg.d_model
    detection = 0 if resumable else 2 * kept  # residuals centred on their layer's mean, and their norms
    # Of a block: the residual stream and its norms, queries, keys and values as they are and in float32, the MLP's widest.
    block = n * (element * (6 * cfg.d_model + 3 * (cfg.d_mlp or 4 * cfg.d_model)) + 4 * 3 * (query_width + key_width))
    threads = torch.get_num_threads() if adapter.device.type == "cpu" else 1
    buffers = 4 * block_floats(adapter.device) * threads + (8 * LOGIT_SLICE_FLOATS if logits else 0)
    if path == "reference":
        pattern = 4 * n_heads * n * n
        whole = 4 * 2 * n * cfg.d_vocab if logits else 0
        return Need(
            4 * kept + sums + columns + block + 5 * pattern + buffers + whole, columns + block + 5 * pattern + whole
        )
    clean = kept if not resumable else 2 * kept + element * 2 * n_layers * n * key_width
    return Need(clean + detection + sums + columns + block + buffers, 2 * columns + block + element * 2 * n * key_width)


def rows_within(memory: float | None, adapter: Adapter, need: Need, n_positions: int) -> int:
    """Edited rows per batch that fit `memory` GiB beside the model, or what is free now; at least 1.

    Raises InputError when not even the clean run and one row fit.
    """
    limit = available(adapter.device) * SPARE if memory is None else memory * GIB
    if need.clean + need.row > limit:
        whose = "are free" if memory is None else "are allowed by memory="
        raise InputError(
            f"a text of {n_positions} tokens needs about {(need.clean + need.row) / GIB:.2g} GiB beside the model and "
            f"{limit / GIB:.2g} GiB {whose}: cut the text, or allow more memory."
        )
    if not need.row:
        return 1
    rows = int(min(limit - need.clean, BATCH_BYTES) // need.row)
    if adapter.device.type == "cpu":
        threads = torch.get_num_threads()
        rows = min(rows, threads * max(1, BATCH_TOKENS // n_positions))
        rows -= rows % threads if rows > threads else 0  # each thread takes a share of them
    return max(1, rows)
