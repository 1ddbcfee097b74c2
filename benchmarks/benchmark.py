"""Time and memory of sink_circuits against its peers, on this machine, side by side in one run.

    python benchmarks/benchmark.py [--only attention find sweep] [--model smollm2-135m] [--out benchmark.json]

Medians over repetitions in alternating order. Peers are run from their public APIs. Where a peer takes too long, a
seeded sample of its cells is timed and scaled up: such rows say "extrapolated".
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

Row = dict[str, object]


def alternate(works: dict[str, Callable], repeats: int) -> dict[str, float]:
    """Median seconds of each work; one warm-up, then rounds in which every work runs once."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for round_ in range(repeats + 1):
        for name, work in works.items():
            began = time.perf_counter()
            work()
            if round_:
                times[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in times.items()}


def peak_extra(work: Callable) -> float:
    """MiB that `work` takes at its highest beyond what was held before (Linux: the kernel's own peak, reset first)."""
    clear = Path("/proc/self/clear_refs")
    if not os.access(clear, os.W_OK):
        return float("nan")
    import ctypes
    import gc

    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    clear.write_text("5")
    before = _status("VmRSS")
    work()
    return (_status("VmHWM") - before) / 1024


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1])
    raise KeyError(field)


def attention_rows(repeats: int) -> list[Row]:
    """One layer: all keys' scores, and two chosen keys with exact log-odds, against SDPA's forward alone."""
    from sink_circuits.attention import AttentionForm, streamed_attention

    rows: list[Row] = []
    for name, heads, key_heads, d_head in (("SmolLM2", 9, 3, 64), ("Gemma 3 270M", 4, 1, 256)):
        for n in (2048, 8192):
            query, key, value = (torch.randn(1, h, n, d_head) for h in (heads, key_heads, key_heads))
            wide = [x.repeat_interleave(heads // key_heads, 1) for x in (key, value)]
            form, few, many = AttentionForm(d_head**-0.5), torch.tensor([0, n // 3]), torch.arange(0, n, n // 64)[:64]
            works = {
                "SDPA": lambda q=query, w=wide: torch.nn.functional.scaled_dot_product_attention(q, *w, is_causal=True),
                "all keys": lambda q=query, k=key, v=value, f=form: streamed_attention(q, k, v, f),
                "2 keys, log-odds": lambda q=query, k=key, v=value, f=form, c=few: streamed_attention(
                    q, k, v, f, chosen=c, sums=False
                ),
                "64 keys, log-odds": lambda q=query, k=key, v=value, f=form, c=many: streamed_attention(
                    q, k, v, f, chosen=c, sums=False
                ),
            }
            seconds = alternate(works, repeats)
            for work in list(works)[1:]:
                rows.append(
                    {
                        "work": f"one layer, {work}", "shape": name, "T": n, "seconds": seconds[work], "peer": "SDPA forward",
                        "peer_seconds": seconds["SDPA"], "ratio": seconds[work] / seconds["SDPA"], "MiB": peak_extra(works[work]),
                    }
                )  # fmt: skip
    return rows


def text_of(model, n: int) -> torch.Tensor:
    """The bundled prompts, one after the other, cut at n tokens."""
    import sink_circuits as sc

    ids = torch.cat(list(sc.load_prompts("all").tokens(model)))
    return ids.repeat(-(-n // len(ids)))[:n]


def find_rows(name: str, lengths: list[int], repeats: int) -> list[Row]:
    """find_sinks against Hugging Face: eager with output_attentions (up to 2048), and SDPA without logits."""
    import sink_circuits as sc
    from sink_circuits.twin import plain_module

    model = sc.load_model(name, verbose=False)
    eager, sdpa = plain_module(model, "eager"), plain_module(model, "sdpa")
    rows: list[Row] = []
    for n in lengths:
        ids = text_of(model, n)
        works = {
            "find": lambda ids=ids: sc.find_sinks(model, ids, verbose=False),
            "SDPA": lambda ids=ids: sdpa.base_model(input_ids=ids[None], use_cache=False),
        }
        if n <= 2048:
            works["eager"] = lambda ids=ids: eager(input_ids=ids[None], use_cache=False, output_attentions=True)
        with torch.no_grad():
            seconds = alternate(works, repeats if n <= 2048 else 1)
            memory = {work: peak_extra(run) for work, run in works.items()}
        for peer, label in (("SDPA", "SDPA forward, no logits"), ("eager", "eager, output_attentions")):
            if peer in seconds:
                rows.append(
                    {
                        "work": "find_sinks", "model": name, "T": n, "seconds": seconds["find"], "peer": label,
                        "peer_seconds": seconds[peer], "ratio": seconds["find"] / seconds[peer], "MiB": memory["find"],
                        "peer_MiB": memory[peer],
                    }
                )  # fmt: skip
    return rows


def naive_cell(model, tokens, layer: int, position: int, factor: float, keys: tuple[int, int]) -> float:
    """One cell of the naive loop: TransformerLens hooks, patterns cached in every later layer, logits for the loss."""
    kept: dict[str, torch.Tensor] = {}

    def edit(value, hook):
        value = value.clone()
        value[:, position] *= factor
        return value

    def keep(name):
        def hook(value, hook):
            kept[name] = value

        return hook

    names = [f"blocks.{at}.attn.hook_pattern" for at in range(layer + 1, model.cfg.n_layers)]
    logits = model.run_with_hooks(
        tokens[None], fwd_hooks=[(f"blocks.{layer}.hook_mlp_out", edit), *((name, keep(name)) for name in names)]
    )
    scores = [kept[name][0, :, key + 1 :, key].mean() for name in names for key in keys]
    loss = torch.nn.functional.cross_entropy(logits[0, position:-1].float(), tokens[position + 1 :])
    return float(loss) + sum(map(float, scores))


def sweep_rows(name: str, lengths: list[int], every: int, naive_cells: int) -> list[Row]:
    """Every layer x 7 factors at one position: treated and primary scores in all later layers, and the loss."""
    import pandas as pd

    import sink_circuits as sc
    from sink_circuits.detection import COLUMNS
    from sink_circuits.results import Manifest
    from sink_circuits.twin import plain_module

    model = sc.load_model(name, verbose=False)
    sdpa = plain_module(model, "sdpa")
    factors = [0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 4.0]
    n_layers = model.cfg.n_layers
    rows: list[Row] = []
    for n in lengths:
        ids = text_of(model, n)
        tokens = sc.Tokens((ids,), ("text",))
        began = time.perf_counter()
        with torch.no_grad():
            hidden = sdpa.base_model(input_ids=ids[None], use_cache=False)[0]
        forward = time.perf_counter() - began
        began = time.perf_counter()
        with torch.no_grad():
            sdpa.get_output_embeddings()(hidden[:, : n // 4])
        unembed = 4 * (time.perf_counter() - began)
        rng = random.Random(n)
        cells = [(rng.randrange(n_layers), rng.choice(factors)) for _ in range(naive_cells)]
        began = time.perf_counter()
        with torch.no_grad():
            for layer, factor in cells:
                naive_cell(model, ids, layer, n // 8, factor, (0, n // 8))
        naive = (time.perf_counter() - began) / len(cells) * n_layers * len(factors)
        for where, position in (("first quarter", n // 8), ("second half", 5 * n // 8)):
            row = dict.fromkeys(COLUMNS, 0) | {
                "prompt": "text", "pos": position, "token_id": int(ids[position]), "token": "", "kind": "secondary", "l_end": n_layers - 1,
            }  # fmt: skip
            sinks = sc.Sinks(
                pd.DataFrame([row]), ("text",), Manifest.of(sc.adapt(model), tokens, what="benchmark", path="auto")
            )
            layers = list(range(rng.randrange(every), n_layers, every))
            labels = [(layer, factor) for layer in layers for factor in factors]
            began = time.perf_counter()
            sc.measure(
                model, tokens, sinks, [f"{a}:{b}" for a, b in labels],
                lambda label, sink, p=position: (sc.rescale(int(label.split(":")[0]), p, float(label.split(":")[1])),),
                what="benchmark", loss=True, verbose=False,
            )  # fmt: skip
            seconds = (time.perf_counter() - began) * n_layers / len(layers)
            # What can change: blocks above the edited one, tokens from the position on, in 6 runs (factor 1 is the clean
            # one). Blocks are charged by their tokens, which forgives the suffix that its queries see more keys.
            share = sum((n_layers - 1 - layer) / n_layers for layer in range(n_layers)) * (n - position) / n
            limit = 6 * (forward * share + n_layers * unembed * (n - position) / n) + forward
            own = f"; own: every {every}th layer" if every > 1 else ""
            for peer, other, note in (
                ("naive loop, TransformerLens hooks", naive, f"extrapolated from {len(cells)} seeded cells"),
                ("limit: SDPA of what can change", limit, "from one timed forward"),
            ):
                rows.append(
                    {
                        "work": f"sweep {n_layers} x 7, {where}", "model": name, "T": n, "seconds": seconds, "peer": peer,
                        "peer_seconds": other, "ratio": seconds / other, "note": note + own,
                    }
                )  # fmt: skip
    return rows


def growth_rows(name: str, lengths: list[int]) -> list[Row]:
    """Seconds of find_sinks against the number of tokens."""
    import sink_circuits as sc

    model = sc.load_model(name, verbose=False)
    rows: list[Row] = []
    for n in lengths:
        ids = text_of(model, n)
        began = time.perf_counter()
        sc.find_sinks(model, ids, verbose=False)
        rows.append({"work": "find_sinks", "model": name, "T": n, "seconds": time.perf_counter() - began})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=["attention", "find", "sweep", "growth"])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--find-lengths", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--sweep-lengths", type=int, nargs="+", default=[512])
    parser.add_argument("--growth-lengths", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096, 8192])
    parser.add_argument(
        "--every", type=int, default=1, help="time only every so many layers of our sweep, and scale up"
    )
    parser.add_argument("--naive-cells", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("benchmark.json"))
    options = parser.parse_args()
    parts: dict[str, Callable[[], list[Row]]] = {
        "attention": lambda: attention_rows(options.repeats),
        "find": lambda: find_rows(options.model, options.find_lengths, options.repeats),
        "sweep": lambda: sweep_rows(options.model, options.sweep_lengths, options.every, options.naive_cells),
        "growth": lambda: growth_rows(options.model, options.growth_lengths),
    }
    machine = {
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    rows: list[Row] = []
    for part in options.only:
        for row in parts[part]():
            rows.append(row)
            print("  ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)
        options.out.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1))
    print(f"{machine}\nwritten to {options.out}")


if __name__ == "__main__":
    main()
