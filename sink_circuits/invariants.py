"""Invariants of edited runs, on any model: what must hold whatever the weights are. `sink-circuits check` runs them."""

from __future__ import annotations

import torch

from sink_circuits.adapters import adapt
from sink_circuits.clean_runs import Columns, run_clean
from sink_circuits.edited_runs import EditedRun, run_edited
from sink_circuits.edits import custom
from sink_circuits.errors import InputError
from sink_circuits.interventions import zero
from sink_circuits.load_checks import TOLERANCES, Check
from sink_circuits.scores import column_log_odds
from sink_circuits.statistics import seed_of

N_TOKENS = 40
POSITION = 13


@torch.no_grad()
def check_invariants(model) -> tuple[Check, ...]:
    """An edit of the middle layer on a text of random tokens, on every path that serves the model.

    A no-op sent through the run is bit-identical to an unedited row of its batch; cells that cannot change (layers up to
    the edited one, queries before the position) are exactly clean; a zeroed contribution changes later layers; both
    paths give the same log-odds, to the dtype's tolerance. Each is 0 or an error; see `Check`.
    """
    adapter = adapt(model)
    generator = torch.Generator().manual_seed(seed_of("invariants") % 2**63)
    n_tokens = min(N_TOKENS, adapter.n_ctx)
    if n_tokens < 2:
        raise InputError(
            f"the model's context is {adapter.n_ctx} token: at least 2 are needed for attention to differ."
        )
    tokens = torch.randint(0, adapter.cfg.d_vocab, (n_tokens,), generator=generator).to(adapter.device)
    position, layer = min(POSITION, n_tokens // 2), adapter.n_layers // 2
    no_op = custom(layer, position, lambda c: c.clone(), "no-op")
    limit = TOLERANCES.get(adapter.cfg.dtype, 2e-4)
    checks, measured = [], {}
    for path in ("reference",) if adapter.twin is None else ("fast", "reference"):
        clean = run_clean(model, tokens, chosen=(0, position), path=path)
        unedited, same, zeroed = run_edited(model, clean, [(), (no_op,), (zero(layer, position),)], path=path)
        moved = _largest(zeroed.columns, clean.columns, slice(layer + 1, None), slice(position, None))
        impossible = max(
            _largest(zeroed.columns, clean.columns, slice(0, layer + 1), slice(None)),
            _largest(zeroed.columns, clean.columns, slice(None), slice(0, position)),
        )
        noise = _largest(unedited.columns, clean.columns, slice(layer + 1, None), slice(position, None))  # rounding
        last = layer == adapter.n_layers - 1
        checks += [
            Check(f"{path} path: a no-op is an unedited row, bit for bit", _different(unedited, same), 0.0, "report this model."),
            Check(f"{path} path: impossible cells are exactly clean", impossible, 0.0, "report this model."),
            Check(f"{path} path: an edit reaches later layers", float(moved <= 2 * noise and not last), 0.5,
                  f"zeroing MLP {layer} changed no later attention: edits of this model would be silent no-ops."),
        ]  # fmt: skip
        measured[path] = column_log_odds(zeroed.columns, adapter.windows, min_queries=1)
    if len(measured) == 2:
        error = (measured["fast"] - measured["reference"]).abs().nan_to_num().max().item()
        checks.append(
            Check("log-odds of an edited run: fast path against reference", error, 50 * limit, "use path='reference'.")
        )
    return tuple(checks)


def _largest(one: Columns, other: Columns, layers: slice, queries: slice) -> float:
    difference = (one.log_attention - other.log_attention)[layers, :, queries]
    return difference.abs().max().item() if difference.numel() else 0.0


def _different(one: EditedRun, other: EditedRun) -> float:
    pairs = (
        (one.columns.log_attention, other.columns.log_attention),
        (one.columns.log_rest, other.columns.log_rest),
        (one.resid_post_chosen, other.resid_post_chosen),
    )
    return float(not all(torch.equal(a, b) for a, b in pairs))
