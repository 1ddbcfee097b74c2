"""How to make the results of a page again, in Python, written from their manifests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sink_circuits.detection import Thresholds
from sink_circuits.effects import Effect
from sink_circuits.prompts import load_prompts
from sink_circuits.sweep_results import SweepResult

CALLS = {
    "layer_map": "sc.layer_map(model, tokens, treated{more})", "dose_response": "sc.dose_response(model, tokens, treated{more})",
    "ablate": "sc.ablate(model, tokens, treated{more})", "controls": "sc.with_controls(model, tokens, treated, found=sinks{more})",
    "paths": "sc.path_effects(model, tokens, treated{more})", "mass": "sc.mass_account(model, tokens, treated, found=sinks{more})",
    "claims": "sc.test_claims(model, tokens, sinks{more})", "attribution": "sc.attribute(model, tokens, treated{more})",
}  # fmt: skip
"""By what a manifest says that it is. Everything of the anatomy is called by its own name."""
ANATOMY = (
    "mlp_stages", "writers", "neurons", "norms_by_layer", "score_by_lifetime", "pca", "clustering", "matrix_entropy",
    "key_query_geometry", "attention_patterns",
)  # fmt: skip
KEPT = ("layer", "layers", "intervention", "method", "outcome", "n_random", "per_prompt", "together")
"""Settings that are arguments of the call, where they differ from its default."""
DEFAULTS = {
    "intervention": ("zero", "rescale"), "method": ("zero", "gradient"), "outcome": ("log_odds",), "n_random": (20,), "per_prompt": (2,),
    "together": (False,),
}  # fmt: skip


def in_python(sinks, results: Sequence) -> str:
    """The calls that give these results, one per line; settings that are the defaults are left out.

    Interventions of a user's own are named, not defined: their functions stand in no manifest.
    """
    manifest, settings = sinks.manifest, sinks.manifest.settings
    kind, _, chip = manifest.device.partition(": ")
    device = "" if kind in ("", "cpu") else f", device={kind!r}"
    lines = [
        "import sink_circuits as sc",
        "",
        f"model = sc.load_model({manifest.model!r}{device})  # weights {manifest.weights}"
        + (f", on {chip}" if chip else ""),
    ]
    lines.append(
        f"tokens = {_prompts(sinks.prompts)}.tokens(model)"
        + (f"  # cut and wrapped as then: tokens.hash == {manifest.tokens!r}" if manifest.tokens else "")
    )
    given = {
        **_changed(settings.get("thresholds", {})),
        **({"method": "official"} if str(manifest.what).endswith("official") else {}),
    }
    lines.append(f"sinks = sc.find_sinks(model, tokens{_arguments(given)})")
    sweeps = [result for result in results if isinstance(result, SweepResult)]
    results = [result for result in results if not isinstance(result, SweepResult)]
    tables = [result.table for result in results if {"kind", "l_start", "pos"} <= set(result.table)]
    if tables:
        kinds = ", ".join(repr(str(kind)) for kind in tables[0]["kind"].unique())
        lines.append(f"treated = sinks.select({kinds})  # {len(tables[0])} of them: those in the table of each result")
    for result in results:
        what = str(result.manifest.what)
        call = CALLS.get(what) or (f"sc.anatomy.{what}(model, tokens, treated{{more}})" if what in ANATOMY else "")
        if call:
            lines.append(call.format(more=_arguments(_settings(result))))
    lines += [
        f"sc.load_sweep({one.folder.name!r})  # its study.json holds the study, `sink-circuits sweep` runs it"
        for one in sweeps
    ]
    return "\n".join(lines)


def _prompts(names: Sequence[str]) -> str:
    """The bundled set that holds these prompts in this order; a file of the user's own otherwise."""
    kind = str(names[0]).rpartition("-")[0] if names else ""
    if kind in ("maths", "prose", "code", "lists", "dialogue"):
        bundled = load_prompts(kind)
        if [prompt.id for prompt in bundled][: len(names)] == [str(name) for name in names]:
            return f"sc.load_prompts({kind!r}, {len(names)})"
    return "sc.load_prompts('prompts.jsonl')"


def _changed(thresholds: Mapping) -> dict:
    defaults = Thresholds()
    return {
        name: value
        for name, value in thresholds.items()
        if value is not None and value != getattr(defaults, name, value)
    }


def _settings(result) -> dict:
    settings = {name: value for name, value in result.manifest.settings.items() if name in KEPT}
    if isinstance(result, Effect) and result.kind == "dose_response":
        settings["factors"] = result.data["edit"].values.tolist()
    if "layers" in settings and not str(settings["layers"]).startswith(("[", "(")):
        settings = {"layer": settings.pop("layers"), **settings}  # `layer=` stands there as text, "forming" or a number
    if str(settings.get("layer")).isdigit():
        settings["layer"] = int(settings["layer"])
    return {name: value for name, value in settings.items() if value not in DEFAULTS.get(name, ())}


def _arguments(given: Mapping) -> str:
    return "".join(f", {name}={value if name == 'layers' else repr(value)}" for name, value in given.items())
