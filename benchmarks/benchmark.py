"""Time and memory of sink_circuits against its peers, on this machine, side by side in one run.

    python benchmarks/benchmark.py [--only attention find sweep growth] [--models smollm2-135m gemma-3-270m] [--device cuda]
        [--out benchmark.json]

Prints one line per comparison and writes them as JSON after every part, with a figure of the growth beside it. Seconds
(wall and processor) are medians over rounds in alternating order, ratios medians of the rounds' own ratios; `target` is
the ratio to stay below, `difference` the largest of the numbers computed both ways. Peers are run from their public
APIs. Where a peer takes too long, a seeded sample of its cells is timed and scaled up: such rows say "extrapolated".
The whole takes an hour and more on two cores; `--every`, `--repeats` and the lengths make it shorter.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import random
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import torch

Row = dict[str, object]

PARTS = ("attention", "find", "sweep", "growth")
FACTORS = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 4.0)


def spent(work: Callable, *args) -> np.ndarray:
    """Seconds that `work` takes: on the wall's clock, and of processor time over all threads."""
    finish()
    before = np.array([time.perf_counter(), time.process_time()])
    work(*args)
    finish()
    return np.array([time.perf_counter(), time.process_time()]) - before


def finish() -> None:
    """Wait for what a GPU still has to do."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def alternate(works: dict[str, Callable], repeats: int) -> dict[str, np.ndarray]:
    """What each work spends in each round; a round runs every work once, and one round before them warms up."""
    rounds = [{name: spent(work) for name, work in works.items()} for _ in range(repeats + 1)]
    return {name: np.stack([round_[name] for round_ in rounds[1:]]) for name in works}


def compared(own: np.ndarray, peer: str, other: np.ndarray) -> Row:
    """Medians over rounds [round, clock] of a work and its peer, and of the rounds' own ratios.

    On a machine that others use too, the ratio of processor times is the one to look at.
    """
    row: Row = {"peer": peer, "rounds": len(own)}
    for clock, name in enumerate(("", "cpu_")):
        row |= {
            f"{name}seconds": float(np.median(own[:, clock])), f"peer_{name}seconds": float(np.median(other[:, clock])),
            f"{name}ratio": float(np.median(own[:, clock] / other[:, clock])),
        }  # fmt: skip
    return row


def peak_extra(work: Callable, *args) -> float:
    """MiB that `work` takes at its highest beyond what was held before: of a GPU where one is used, else of this process
    (Linux: the kernel's own peak, reset first)."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        work(*args)
        return (torch.cuda.max_memory_allocated() - held) / 2**20
    clear = Path("/proc/self/clear_refs")
    if not os.access(clear, os.W_OK):
        return float("nan")
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    clear.write_text("5")
    before = _status("VmRSS")
    work(*args)
    return (_status("VmHWM") - before) / 1024


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1])
    raise KeyError(field)


@contextmanager
def threads_of(threads: int):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def attention_rows(lengths: Sequence[int], repeats: int, device: str) -> list[Row]:
    """One layer: all keys' scores, and chosen keys without and with exact log-odds, against SDPA's forward alone."""
    from sink_circuits.attention import AttentionForm, streamed_attention

    rows: list[Row] = []
    shapes = (("SmolLM2", 9, 3, 64), ("Gemma 3 270M", 4, 1, 256))
    for name, heads, key_heads, d_head in shapes:
        for n in lengths:
            query, key, value = (torch.randn(1, h, n, d_head, device=device) for h in (heads, key_heads, key_heads))
            form = AttentionForm(d_head**-0.5)

            def sdpa(q=query, k=key, v=value):
                torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

            def chosen(count: int, odds: bool, q=query, k=key, v=value, f=form, n=n):
                keys = torch.arange(count) * (n // count)
                return lambda: streamed_attention(q, k, v, f, chosen=keys, sums=False, odds=odds)

            works = {
                "SDPA forward": sdpa, "all keys": lambda q=query, k=key, v=value, f=form: streamed_attention(q, k, v, f),
                "2 keys": chosen(2, False), "2 keys, log-odds": chosen(2, True),
                "64 keys": chosen(64, False), "64 keys, log-odds": chosen(64, True),
            }  # fmt: skip
            for threads in sorted({1, torch.get_num_threads()}) if device == "cpu" else (1,):
                with threads_of(threads):
                    times = alternate(works, repeats)
                    for work in list(works)[1:]:
                        row = {"work": f"one layer, {work}", "shape": name, "T": n, "threads": threads}
                        row |= compared(times[work], "SDPA forward", times["SDPA forward"])
                        row |= {"MiB": peak_extra(works[work])}
                        if "log-odds" not in work:  # more than scores: the targets are theirs
                            row["target"] = 1.5 if work == "all keys" else 1.15
                        rows.append(row)
    return rows


def text_of(model, n: int) -> torch.Tensor:
    """The bundled prompts, one after the other, cut at n tokens."""
    import sink_circuits as sc

    ids = torch.cat(list(sc.load_prompts("all").tokens(model)))
    return ids.repeat(-(-n // len(ids)))[:n].to(next(model.parameters()).device)


@torch.no_grad()
def find_rows(name: str, lengths: Sequence[int], repeats: int, device: str) -> list[Row]:
    """find_sinks against Hugging Face: eager with output_attentions (up to 2048), and SDPA without logits."""
    import sink_circuits as sc
    from sink_circuits.twin import plain_module

    model = sc.load_model(name, device=device, verbose=False)
    eager, sdpa = plain_module(model, "eager"), plain_module(model, "sdpa")
    rows: list[Row] = []
    for n in lengths:
        ids = text_of(model, n)
        works = {
            "find": lambda ids=ids: sc.find_sinks(model, ids, verbose=False),
            "SDPA forward, no logits": lambda ids=ids: sdpa.base_model(input_ids=ids[None], use_cache=False),
        }
        if n <= 2048:
            works["eager, output_attentions"] = lambda ids=ids: eager(
                input_ids=ids[None], use_cache=False, output_attentions=True
            )
        times = alternate(works, repeats if n <= 2048 else 1)
        memory = {work: peak_extra(run) for work, run in works.items()}
        for peer in list(works)[1:]:
            row = {"work": "find_sinks", "model": name, "T": n} | compared(times["find"], peer, times[peer])
            row |= {"MiB": memory["find"], "peer_MiB": memory[peer], "target": 1.2 if "SDPA" in peer else 1 / 2.2}
            rows.append(row)
    return rows


@torch.no_grad()
def naive_cell(model, tokens, layer: int, position: int, factor: float, keys: Sequence[int]) -> dict[str, torch.Tensor]:
    """One cell of the naive loop: TransformerLens hooks, patterns cached in every later layer, logits for the loss."""
    kept: dict[int, torch.Tensor] = {}

    def edit(value, hook):
        value = value.clone()
        value[:, position] *= factor
        return value

    def keep(at: int):
        def hook(pattern, hook):
            kept[at] = pattern

        return f"blocks.{at}.attn.hook_pattern", hook

    later = range(layer + 1, model.cfg.n_layers)
    hooks = [(f"blocks.{layer}.hook_mlp_out", edit), *(keep(at) for at in later)]
    logits = model.run_with_hooks(tokens[None], fwd_hooks=hooks)
    # Keys as early as these are seen by as many queries in every layer: sums compare, windows or not.
    scores = [torch.stack([kept[at][0, :, key + 1 :, key].sum(-1) for key in keys]) for at in later]
    loss = torch.nn.functional.cross_entropy(logits[0, position:-1].float(), tokens[position + 1 :])
    return {"scores": torch.stack(scores) if scores else torch.zeros(0), "loss": loss}


@torch.no_grad()
def patching_spent(model, tokens, cells: Sequence[tuple[int, int]], position: int, keys: Sequence[int]) -> np.ndarray:
    """Spent per cell by TransformerLens' generic_activation_patch, with the same edits and the same metric."""
    from transformer_lens.patching import generic_activation_patch

    sums: dict[int, torch.Tensor] = {}

    def read(at: int):
        def hook(pattern, hook):
            sums[at] = torch.stack([pattern[0, :, key + 1 :, key].sum(-1) for key in keys])

        return hook

    def setter(activation, index, clean):
        activation = activation.clone()
        activation[:, position] = FACTORS[index[1]] * clean[:, position]
        return activation

    def metric(logits):
        loss = torch.nn.functional.cross_entropy(logits[0, position:-1].float(), tokens[position + 1 :])
        return loss + torch.stack(list(sums.values())).sum()

    layers = range(model.cfg.n_layers)
    _, cache = model.run_with_cache(tokens[None], names_filter=[f"blocks.{layer}.hook_mlp_out" for layer in layers])
    for layer in layers:  # permanent: those of a run are taken away after it
        model.add_hook(f"blocks.{layer}.attn.hook_pattern", read(layer), is_permanent=True)
    index = pd.DataFrame(list(cells), columns=["layer", "factor"])
    try:
        whole = spent(
            lambda: generic_activation_patch(model, tokens[None], cache, metric, setter, "mlp_out", index_df=index)
        )
    finally:
        model.reset_hooks(including_permanent=True)
    return whole / len(cells)


def largest_difference(model, tokens, layer: int, position: int, factor: float) -> float:
    """Of one cell, sink_circuits against the naive loop: mean attention in all later layers, and loss."""
    import sink_circuits as sc

    keys = (0, position)
    clean = sc.run_clean(model, tokens, chosen=keys, loss=True)
    run = sc.run_edited(model, clean, [[sc.rescale(layer, position, factor)]], loss=True)[0]
    expected = naive_cell(model, tokens, layer, position, factor, keys)
    attention = run.columns.log_attention[layer + 1 :].exp()
    differences = [float((run.loss[position:-1].mean() - expected["loss"]).abs())]
    for index, key in enumerate(keys if len(attention) else ()):
        found = attention[:, :, key + 1 :, index].sum(-1)
        differences.append(float((found - expected["scores"][:, index]).abs().max()) / (len(tokens) - 1 - key))
    return max(differences)


def sink_at(model, tokens, position: int):
    """A sink table with one row, as if `position` were a sink through all layers: what is timed, not what is found."""
    import sink_circuits as sc
    from sink_circuits.detection import COLUMNS
    from sink_circuits.results import Manifest

    row = dict.fromkeys(COLUMNS, 0) | {
        "prompt": tokens.names[0], "pos": position, "token_id": int(tokens.ids[0][position]), "token": "", "kind": "secondary",
        "l_end": model.cfg.n_layers - 1,
    }  # fmt: skip
    manifest = Manifest.of(sc.adapt(model), tokens, what="benchmark", path="auto")
    return sc.Sinks(pd.DataFrame([row]), tokens.names, manifest)


def own_sweep(model, ids, position: int, layers: Sequence[int], factors: Sequence[float] = FACTORS) -> None:
    """The sweep: treated and primary scores in all later layers, and the loss, for every layer and factor."""
    import sink_circuits as sc

    tokens = sc.Tokens((ids,), ("text",))
    cells = {f"{layer}:{factor}": (layer, factor) for layer in layers for factor in factors}

    def edits(label: str, sink) -> tuple:
        layer, factor = cells[label]
        return (sc.rescale(layer, position, factor),)

    sinks = sink_at(model, tokens, position)
    sc.measure(model, tokens, sinks, list(cells), edits, what="benchmark", loss=True, verbose=False)


@torch.no_grad()
def limit_spent(sdpa, ids, position: int) -> np.ndarray:
    """Plain SDPA forwards of just what a sweep can change, logits of the later tokens, and the clean forward.

    What can change: blocks above the edited one, tokens from the position on, for every factor but 1. A forward pass of n
    tokens takes a n + b n^2 (b: its attention); a and b follow from the text and its first half, and the tokens from
    `position` on take a (n - position) + b (n^2 - position^2), as their queries see the earlier keys too.
    """
    n, n_layers = len(ids), sdpa.config.get_text_config().num_hidden_layers
    hidden: list[torch.Tensor] = []

    def forward(length: int) -> np.ndarray:
        run = lambda: hidden.append(sdpa.base_model(input_ids=ids[None, :length], use_cache=False)[0])  # noqa: E731
        run()
        return np.minimum(spent(run), spent(run))

    half, whole = forward(n // 2), forward(n)
    quadratic = np.maximum(0, 2 * (whole - 2 * half)) / n**2
    linear = whole / n - quadratic * n
    suffix = linear * (n - position) + quadratic * (n**2 - position**2)
    unembed = 4 * spent(lambda: sdpa.get_output_embeddings()(hidden[-1][:, : n // 4]))
    share = sum((n_layers - 1 - layer) / n_layers for layer in range(n_layers))
    return (len(FACTORS) - 1) * (suffix * share + n_layers * unembed * (n - position) / n) + whole


def sweep_rows(name: str, lengths: Sequence[int], every: int, n_cells: int, device: str) -> list[Row]:
    """Every layer x 7 factors at one position: treated and primary scores in all later layers, and the loss."""
    import sink_circuits as sc
    from sink_circuits.twin import plain_module

    model = sc.load_model(name, device=device, verbose=False)
    sc.adapt(model)
    sdpa = plain_module(model, "sdpa")
    return [
        row | {"model": name} for n in lengths for row in _sweep_rows(model, sdpa, text_of(model, n), every, n_cells)
    ]


def _sweep_rows(model, sdpa, ids: torch.Tensor, every: int, n_cells: int) -> list[Row]:
    n, n_layers, rng = len(ids), model.cfg.n_layers, random.Random(len(ids))
    cells = [(rng.randrange(n_layers), rng.randrange(len(FACTORS))) for _ in range(n_cells)]
    early = n // 8
    keys = (0, early)
    naive = sum(spent(naive_cell, model, ids, a, early, FACTORS[b], keys) for a, b in cells) / n_cells
    patching = patching_spent(model, ids, cells, early, keys)
    naive_memory = peak_extra(naive_cell, model, ids, 0, early, 0.5, keys)
    difference = max(largest_difference(model, ids, a, early, FACTORS[b]) for a, b in cells[:2])
    n_all, sampled = n_layers * len(FACTORS), f"extrapolated from {n_cells} seeded cells"
    layers = list(range(rng.randrange(min(every, n_layers)), n_layers, every))
    own_note = f"; own: {len(layers)} of {n_layers} layers timed" if every > 1 else ""
    rows: list[Row] = []
    for where, position in (("first quarter", early), ("second half", 5 * n // 8)):
        if ids.is_cuda:  # kernels are loaded and memory is taken when first needed
            own_sweep(model, ids, position, layers)
        seconds = spent(own_sweep, model, ids, position, layers) * n_layers / len(layers)
        memory = peak_extra(own_sweep, model, ids, position, [0])
        goal = (1 / 3 if n < 2048 else 1 / 5) / (1 if where == "first quarter" else 2)
        for peer, other, target, note in (
            ("naive loop, TransformerLens hooks", naive * n_all, goal, sampled),
            ("generic_activation_patch", patching * n_all, goal, sampled),
            (
                "limit: SDPA of what can change",
                limit_spent(sdpa, ids, position),
                1.25,
                "from timed forwards of the text and its half",
            ),
        ):
            row: Row = {"work": f"sweep {n_layers} x {len(FACTORS)}, {where}", "T": n}
            row |= compared(seconds[None], peer, other[None]) | {
                "target": target,
                "difference": difference,
                "MiB": memory,
            }
            if peer.startswith("naive"):
                row["peer_MiB"] = naive_memory
            rows.append(row | {"note": note + own_note})
    return rows


@torch.no_grad()
def growth_rows(name: str, lengths: Sequence[int], sweep_length: int, device: str) -> list[Row]:
    """Seconds against tokens (find_sinks, and an SDPA forward), against layers swept, and against factors."""
    import sink_circuits as sc
    from sink_circuits.twin import plain_module

    model = sc.load_model(name, device=device, verbose=False)
    sdpa, n_layers = plain_module(model, "sdpa"), model.cfg.n_layers
    rows: list[Row] = []

    def note(work: str, axis: str, value: int, run: Callable) -> None:
        seconds, cpu_seconds = map(float, spent(run))
        rows.append(
            {"work": work, "model": name, "axis": axis, axis: value, "seconds": seconds, "cpu_seconds": cpu_seconds}
        )

    sc.find_sinks(model, text_of(model, 64), verbose=False)
    for n in lengths:
        ids = text_of(model, n)
        note("find_sinks", "T", n, lambda ids=ids: sc.find_sinks(model, ids, verbose=False))
        note("SDPA forward", "T", n, lambda ids=ids: sdpa.base_model(input_ids=ids[None], use_cache=False))
    ids, position = text_of(model, sweep_length), sweep_length // 8
    for count in (n_layers // 8, n_layers // 4, n_layers // 2, n_layers):
        layers = [(2 * i + 1) * n_layers // (2 * count) for i in range(count)]  # evenly: a late layer costs less
        note("sweep, 2 factors", "layers", count, lambda at=layers: own_sweep(model, ids, position, at, (0.0, 0.5)))
    for count in (1, 2, 4, 8):
        factors = [i / 8 for i in range(count)]
        note(
            "sweep, 2 layers",
            "factors",
            count,
            lambda f=factors: own_sweep(model, ids, position, [1, n_layers // 2], f),
        )
    return rows


def growth_figure(rows: Sequence[Row]):
    """Seconds on log axes, one panel per axis: a straight line of slope 1 is linear growth, of slope 2 quadratic."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    axes = {"T": "tokens", "layers": "layers swept", "factors": "factors"}
    figure = make_subplots(rows=1, cols=len(axes), subplot_titles=[f"against {text}" for text in axes.values()])
    table = pd.DataFrame(rows)
    for column, (axis, text) in enumerate(axes.items(), 1):
        for (work, model), own in table[table["axis"] == axis].groupby(["work", "model"]):
            line = go.Scatter(x=own[axis], y=own["seconds"], mode="lines+markers", name=f"{work}, {model}")
            figure.add_trace(line, row=1, col=column)
        figure.update_xaxes(type="log", title_text=text, row=1, col=column)
        figure.update_yaxes(type="log", title_text="seconds" if column == 1 else None, row=1, col=column)
    return figure.update_layout(title="Time of sink_circuits as the work grows", template="plotly_white", height=420)


def line_of(row: Row) -> str:
    return "  ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--models", nargs="+", default=["smollm2-135m", "gemma-3-270m"])
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1...; MiB are then those of the GPU")
    parser.add_argument("--repeats", type=int, default=3, help="rounds of the attention and find parts")
    parser.add_argument("--attention-lengths", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--find-lengths", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--sweep-lengths", type=int, nargs="+", default=[512])
    parser.add_argument("--growth-lengths", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096, 8192])
    parser.add_argument("--growth-sweep-length", type=int, default=512, help="tokens of the sweeps in the growth part")
    parser.add_argument("--every", type=int, default=1, help="time only every so many layers of our sweep; scaled up")
    parser.add_argument("--cells", type=int, default=10, help="seeded cells of the peers' sweeps that are timed")
    parser.add_argument("--out", type=Path, default=Path("benchmark.json"))
    options = parser.parse_args()
    if options.every < 1 or options.cells < 1 or options.repeats < 1:
        parser.error("--every, --cells and --repeats count from 1")

    device = options.device
    parts: dict[str, Callable[[str], list[Row]]] = {
        "find": lambda model: find_rows(model, options.find_lengths, options.repeats, device),
        "sweep": lambda model: sweep_rows(model, options.sweep_lengths, options.every, options.cells, device),
        "growth": lambda model: growth_rows(model, options.growth_lengths, options.growth_sweep_length, device),
    }
    machine = {
        "machine": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads(), "torch": torch.__version__,
        "python": platform.python_version(), "device": device,
        "gpu": torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else None,
    }  # fmt: skip
    rows: list[Row] = []
    for part in options.only:
        if part == "attention":
            found = [attention_rows(options.attention_lengths, options.repeats, device)]
        else:
            found = (parts[part](model) for model in options.models)
        for own in found:
            rows += [{"part": part, **row} for row in own]
            print(*map(line_of, own), sep="\n", flush=True)
            options.out.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1))
    if growth := [row for row in rows if row["part"] == "growth"]:
        from sink_circuits.figures import save_figure

        figure = options.out.with_suffix(".growth.html")
        save_figure(growth_figure(growth), figure, overwrite=True)
        print(f"growth drawn in {figure}")
    print(f"{machine}\nwritten to {options.out}")


if __name__ == "__main__":
    main()
