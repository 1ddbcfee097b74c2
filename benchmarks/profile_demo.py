"""Where the demo's time goes: seconds within each step, and within the functions that take most themselves.

    python benchmarks/profile_demo.py [MODEL] [--n-prompts 6] [--out demo_profile.csv]

Steps contain one another (a layer map contains its edited runs), functions do not: theirs add up to the whole.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import tempfile
from pathlib import Path

import pandas as pd

STEPS = {
    "load_model": "load the model", "adapt": "check the model", "find_sinks": "find sinks", "layer_map": "layer map",
    "dose_response": "dose-response", "ablate": "ablation", "with_controls": "controls", "write_report": "report",
    "run_clean": "clean runs", "run_edited": "edited runs", "streamed_attention": "attention", "next_token_loss": "logits and loss",
    "bootstrap_over_prompts": "bootstrap intervals",
}  # fmt: skip


def profiled(name: str, n_prompts: int) -> pstats.Stats:
    """The demo, from loading the model to the report, under the profiler of the standard library."""
    import sink_circuits as sc
    from sink_circuits import demo

    profile = cProfile.Profile()
    with tempfile.TemporaryDirectory() as folder, profile:
        model = sc.load_model(name)
        tokens = sc.load_prompts("maths", n_prompts).tokens(model)
        demo.run(model, tokens, folder=Path(folder) / "demo")
    return pstats.Stats(profile)


def tables(stats: pstats.Stats, n_functions: int = 15) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(steps, functions), seconds each; of a function that is called by itself, the outermost call counts."""
    rows = [
        {"file": Path(file).name, "line": line, "function": name, "calls": calls, "own_seconds": own, "seconds": whole}
        for (file, line, name), (_, calls, own, whole, _) in stats.stats.items()  # type: ignore[attr-defined]
    ]
    table = pd.DataFrame(rows).sort_values("own_seconds", ascending=False)
    package = {path.name for path in (Path(__file__).parents[1] / "sink_circuits").rglob("*.py")}
    own = table[table["function"].isin(STEPS) & table["file"].isin(package)]
    steps = own.assign(step=own["function"].map(STEPS), share=own["seconds"] / stats.total_tt)  # type: ignore[attr-defined]
    order = {step: index for index, step in enumerate(STEPS.values())}
    steps = steps.sort_values("step", key=lambda column: column.map(order))[["step", "calls", "seconds", "share"]]
    return steps, table.head(n_functions)[["file", "line", "function", "calls", "own_seconds"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="gemma-3-270m")
    parser.add_argument("--n-prompts", type=int, default=6)
    parser.add_argument("--out", type=Path, help="write the steps here, as CSV")
    options = parser.parse_args()
    stats = profiled(options.model, options.n_prompts)
    steps, functions = tables(stats)
    print(f"\n{stats.total_tt:.0f} s in all\n")  # type: ignore[attr-defined]
    print(steps.to_string(index=False, float_format="{:.3g}".format), end="\n\n")
    print(functions.to_string(index=False, float_format="{:.3g}".format))
    if options.out is not None:
        steps.to_csv(options.out, index=False)


if __name__ == "__main__":
    main()
