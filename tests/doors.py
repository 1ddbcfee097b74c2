"""Every public function with arguments that work, and of each parameter which values it takes (`TABLE`); `JUNK` is what is tried."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from common import SINK, lens, prompt
from hostile_values import (
    direction,
    donor,
    flag,
    inside,
    labels,
    none_of_them,
    nothing,
    number,
    one_by_name,
    optional,
    own_function,
    pvalues,
    real,
    seed,
    several,
    text,
    tokens,
    up_to_one,
    values,
    whole,
    word,
)

import sink_circuits as sc
from sink_circuits import anatomy, calibration, planted, records, statistics
from sink_circuits.clean_runs import CleanRun
from sink_circuits.outcomes import as_outcomes

N_LAYERS, N_TOKENS = 24, 96


class Odd:
    """Something no function knows, with a representation of many lines."""

    def __repr__(self):
        return "an odd\nthing " + "x" * 500


JUNK = (
    None, True, False, np.True_, -1, 0, 1, 10**6, 10**30, -0.5, 1.5, math.nan, math.inf, -math.inf, "", " ", "x", "6", "a\nb", b"x", [], {},
    (), [None], [True], ["a"], [-1], [6, 6], [[6]], [10**30], Odd(), object, np.int64(-1), np.float64(6.5), np.float64("nan"), 1j,
    np.array([6]), np.array(["a"]), torch.tensor([6]), torch.tensor(True), torch.tensor(math.nan), torch.zeros(0), torch.zeros(3, 3),
    torch.full((9,), math.nan), pd.Series([6]), pd.DataFrame({"pos": [1]}), range(0), {"a": 1}, {"a": None}, Path("x"), Odd,
    lambda *a, **k: None, iter(()),
)  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- doors
@functools.cache
def found() -> sc.Sinks:
    return sc.find_sinks(lens(), prompt(), verbose=False)


@functools.cache
def clean() -> CleanRun:
    return sc.run_clean(lens(), prompt(), chosen=(0, SINK))


@functools.cache
def mapped() -> sc.Effect:
    return sc.layer_map(lens(), prompt(), found().select("secondary"), layers=[6, 7], verbose=False)


def on(**more) -> dict:
    return {"model": lens(), "tokens": prompt(), **more}


def at(**more) -> dict:
    return on(sinks=found().select("secondary"), verbose=False, **more)


@functools.cache
def carriers() -> anatomy.Neurons:
    return anatomy.neurons(**at(layer=6))


@functools.cache
def writing() -> anatomy.Writers:
    return anatomy.writers(**at())


@functools.cache
def patterns() -> anatomy.AttentionPatterns:
    return anatomy.attention_patterns(**at())


@functools.cache
def minimal() -> planted.Planted:
    return planted.minimal()


def official() -> records.OfficialResult:
    return records.OfficialResult(0, 1, 3, {0: [1], 5: [1, 2]}, {0: "noise", 5: "noise"})


CANDIDATE = records.CandidateSink((1, 2), 3, "secondary")
RECORD = records.Record({5: CANDIDATE}, 0, 1, 1, 2)


def zeroed(label, row):
    return [sc.zero(6, int(row["pos"]))]


def where(**more) -> dict:
    return {"layer": 6, "positions": 50, **more}


LAYER, POSITION, QUERIES = whole(0, N_LAYERS - 1), whole(0, N_TOKENS - 1), whole(1)
LAYERS, PLACES = several(LAYER, one=True), several(POSITION, one=True)
PATH = word("auto", "fast", "reference")
OUTCOMES = ("score", "log_odds", "primary_score", "primary_log_odds", "lifetime")
NONE = optional(nothing)


def threshold(low: float, high: float = 2**31 - 1, *, counts: bool = False) -> Callable:
    return lambda value: number(low, high)(value) and (not counts or int(value) == value)


THRESHOLDS = {
    "cosine": number(-1, 1), "norm_ratio": threshold(0), "min_lifetime": threshold(1, counts=True), "bridge": threshold(0, counts=True),
    "min_queries": threshold(1, counts=True), "neighbours": threshold(1, counts=True), "phase_fall": threshold(1),
    "phase_rise": threshold(1), "first_positions": optional(several(whole(0, 10**40))),
}  # fmt: skip
MEASURED = {
    "min_queries": QUERIES, "batch_size": optional(whole(1, 10**40)), "memory": optional(number(1e-9)), "path": PATH, "verbose": flag,
    "attention_mask": NONE, "clean_cache": NONE,
}  # fmt: skip
SETTINGS = {"settings": optional(lambda value: isinstance(value, dict))}
FLAGS = {"loss": flag, "kl": flag, "together": flag, "outcomes": optional(none_of_them)}
EXPERIMENT = {**MEASURED, **FLAGS, "model": nothing, "tokens": tokens, "sinks": NONE, "no_such": nothing}
TREATED = {"layer": LAYER, "forming": NONE}
EDIT = {
    "layer": whole(0, 10**40),
    "positions": several(whole(0, 10**40), one=True),
}  # the run says what its model and text have
LABELS = {"labels": lambda value: several(number())(value) or several(text)(value)}
FILE, TARGET = {"path": nothing}, {"path": lambda value: isinstance(value, str | Path) and str(value) != "."}

# name: (the function and arguments that work, {parameter: the values it takes})
TABLE: dict[str, tuple[Callable[[], tuple[Callable, dict]], dict[str, Callable]]] = {
    "find_sinks": (lambda: (sc.find_sinks, on(verbose=False)), {
        **MEASURED, **THRESHOLDS, "model": nothing, "tokens": tokens, "method": word("robust", "official"), "thresholds": NONE,
        "first_positions": optional(several(POSITION)), "batch_size": nothing, "no_such": nothing,
    }),
    "Thresholds": (lambda: (sc.Thresholds, {}), THRESHOLDS),
    "sink_scores": (lambda: (sc.sink_scores, on()), {
        "model": nothing, "tokens": tokens, "attention_mask": NONE, "inclusive": flag, "min_queries": QUERIES, "path": PATH,
        "clean_cache": NONE, "keys": optional(lambda value: several(POSITION)(value) or (isinstance(value, list) and value == [[6]])),
    }),
    "run_clean": (lambda: (sc.run_clean, on()), {
        "model": nothing, "tokens": lambda value: tokens(value) or several(whole(0, 63), distinct=False)(value), "row": whole(),
        "chosen": several(POSITION, empty=True), "clean_cache": NONE, "mask": NONE, "loss": flag, "resumable": flag,
        "prefix": optional(whole()), "path": PATH,
    }),
    "run_edited": (lambda: (sc.run_edited, {"model": lens(), "clean": clean(), "rows": [[sc.zero(6, SINK)]]}), {
        "model": nothing, "clean": nothing, "rows": none_of_them, "loss": flag, "kl": flag, "groups": NONE, "path": PATH,
    }),
    "measure": (lambda: (sc.measure, at(labels=["a"], edits_of=zeroed, what="zero")), {
        **{name: takes for name, takes in EXPERIMENT.items() if name != "no_such"}, **SETTINGS, **LABELS, "sinks": nothing, "what": text,
        "edits_of": own_function,
    }),
    "layer_map": (lambda: (sc.layer_map, at(layers=[6])), {
        **EXPERIMENT, "intervention": one_by_name("zero", "mean"), "layers": optional(LAYERS), "found": NONE,
    }),
    "ablate": (lambda: (sc.ablate, at(layer=6)), {
        **EXPERIMENT, **TREATED, "intervention": one_by_name("zero", "mean"), "method": nothing, "found": NONE,
    }),
    "ablate, jointly": (lambda: (sc.ablate, at(layers=[6, 7])), {"layers": LAYERS, "layer": NONE}),
    "ablate, forming": (lambda: (sc.ablate, at(layer="forming", forming=[6])), {
        "forming": optional(lambda value: several(LAYER)(value) and len(value) == 1),
    }),
    "dose_response": (lambda: (sc.dose_response, at(layer=6, factors=[0])), {
        **TREATED, "factors": several(number(0), one=True), "intervention": one_by_name("rescale"),
    }),
    "norm_and_direction": (lambda: (sc.norm_and_direction, at(layer=6)), {**EXPERIMENT, **TREATED, "layers": NONE, "found": NONE}),
    "sufficiency": (lambda: (sc.sufficiency, at(layer=6)), {
        **EXPERIMENT, **TREATED, "layers": NONE, "found": NONE, "onto": optional(several(whole(6, 6))), "n_random": whole(),
    }),
    "mass_account": (lambda: (sc.mass_account, at(layer=6)), {
        **MEASURED, **TREATED, "found": NONE, "intervention": one_by_name("zero", "mean"), "no_such": nothing,
    }),
    "measure_mass": (lambda: (sc.measure_mass, at(labels=["a"], edits_of=zeroed)), {
        **MEASURED, **SETTINGS, **LABELS, "sinks": nothing, "edits_of": own_function,
    }),
    "path_effects": (lambda: (sc.path_effects, at(layer=6)), {
        **MEASURED, **TREATED, "holds": none_of_them, "intervention": one_by_name("zero", "mean"), "found": NONE, "no_such": nothing,
    }),
    "measure_paths": (lambda: (sc.measure_paths, at(edits_of=lambda row: zeroed(0, row))), {
        **MEASURED, **SETTINGS, "sinks": nothing, "edits_of": own_function,
    }),
    "with_controls": (lambda: (sc.with_controls, at(layer=6)), {
        **TREATED, "model": nothing, "tokens": tokens, "sinks": NONE, "layers": NONE, "found": NONE, "n_random": whole(),
        "random_model": lambda value: value is None or value is True, "no_such": nothing, "path": PATH, "factors": NONE,
        "together": lambda value: flag(value) and not value, "intervention": one_by_name("zero", "mean", "rescale"),
        "min_queries": QUERIES, "controls": none_of_them,
    }),
    "attribute": (lambda: (sc.attribute, at()), {
        **MEASURED, "model": nothing, "tokens": tokens, "sinks": NONE, "outcome": word("score", "log_odds"), "exact": NONE,
        "method": word("gradient", "integrated_gradients"), "readers": NONE, "targets": nothing, "positions": word("treated", "all"),
        "n_steps": QUERIES, "graph_bytes": number(10**9), "no_such": nothing,
    }),
    "test_claims": (lambda: (sc.test_claims, on(verbose=False)), {
        "model": nothing, "tokens": tokens, "sinks": NONE, "kinds": nothing, "n_random": QUERIES, "per_prompt": QUERIES, "path": PATH,
        "layer": optional(LAYER), "verbose": flag,
    }),
    "zero": (lambda: (sc.zero, where()), EDIT),
    "rescale": (lambda: (sc.rescale, where(factor=2)), {**EDIT, "factor": number(0)}),
    "replace": (lambda: (sc.replace, where(donor=torch.ones(9))), {"donor": donor, "name": text}),
    "custom": (lambda: (sc.custom, where(function=torch.zeros_like)), {
        **EDIT, "function": callable, "name": optional(text), "parameter": optional(number()),
    }),
    "set_norm": (lambda: (sc.set_norm, where(norm=1.0)), {"norm": number(0)}),
    "swap_norm": (lambda: (sc.swap_norm, where(donor=torch.ones(9))), {"donor": donor}),
    "swap_direction": (lambda: (sc.swap_direction, where(donor=torch.ones(9))), {
        "donor": lambda value: donor(value) and bool(value.any()),
    }),
    "remove_direction": (lambda: (sc.remove_direction, where(direction=torch.ones(9))), {"direction": direction}),
    "keep_direction": (lambda: (sc.keep_direction, where(direction=torch.ones(9))), {"direction": direction}),
    "random_direction": (lambda: (functools.partial(sc.random_direction, 6, 50, "a"), {}), {"orthogonal_to": optional(direction)}),
    "patch": (lambda: (sc.patch, where(run=clean())), {"run": nothing, "source": optional(PLACES)}),
    "noising": (lambda: (sc.noising, where(corrupted=clean())), {"corrupted": nothing, "source": optional(PLACES)}),
    "denoising": (lambda: (sc.denoising, where(clean=clean())), {"clean": nothing, "source": optional(PLACES)}),
    "transplant": (lambda: (sc.transplant, where(run=clean(), sink=SINK)), {
        "layer": LAYER, "positions": EDIT["positions"], "run": nothing, "sink": POSITION,
    }),
    "mean_over_corpus": (lambda: (sc.mean_over_corpus, where(corpus=[clean()])), {"corpus": nothing, "counted": NONE}),
    "mean_over_same_token": (lambda: (sc.mean_over_same_token, where(run=clean())), {
        "run": nothing, "counted": optional(none_of_them), "corpus": lambda value: none_of_them(value) or value is JUNK[14],
    }),
    "resample": (lambda: (sc.resample, where(run=clean(), name="a")), {"run": nothing, "name": lambda value: isinstance(value, str)}),
    "compose": (lambda: (lambda edit: sc.compose(edit), {}), {"edit": nothing}),
    "window": (lambda: (sc.window, {"layers": [6, 7], "make": lambda layer: sc.zero(layer, 50)}), {
        "layers": several(whole(0, 10**40)), "make": callable,
    }),
    "Edit": (lambda: (sc.Edit, where(function=torch.zeros_like)), {**EDIT, "function": callable, "name": text}),
    "Hold": (lambda: (sc.Hold, {"what": "k"}), {
        "what": nothing, "layers": optional(EDIT["positions"]), "positions": optional(several(whole(0, 10**40), one=True, distinct=False)),
    }),
    "primary_direction": (lambda: (sc.primary_direction, {"clean": clean(), "layer": 6}), {
        "clean": nothing, "layer": LAYER, "primary": optional(POSITION), "raw": flag,
    }),
    "official": (lambda: (sc.official, {"hidden_states": torch.ones(5, 4, 3)}), {
        "hidden_states": nothing, "first_positions": several(whole(0, 3)),
    }),
    "key_column": (lambda: (sc.key_column, {"run": clean(), "pos": SINK}), {"run": nothing, "pos": whole(0, 0)}),
    "resid_post_at": (lambda: (sc.resid_post_at, {"run": clean(), "pos": SINK}), {"run": nothing, "pos": POSITION}),
    "names_filter": (lambda: (sc.names_filter, {}), {"model": nothing}),
    "adapt": (lambda: (sc.adapt, {}), {"model": nothing}),
    "check_invariants": (lambda: (sc.check_invariants, {}), {"model": nothing}),
    "randomly_initialised": (lambda: (sc.randomly_initialised, {}), {"model": nothing}),
    "load_model": (lambda: (sc.load_model, {"source": lens()}), {"source": nothing}),
    "load_prompts": (lambda: (sc.load_prompts, {}), {"source": word("all"), "n": optional(QUERIES)}),
    "PromptSet.tokens": (lambda: (sc.load_prompts("all", 1).tokens, {"model": lens()}), {  # which has no tokenizer
        "model": nothing, "max_tokens": nothing, "chat": nothing,
    }),
    "Prompt": (lambda: (sc.Prompt, {"id": "a", "kind": "b", "text": "c"}), {
        name: lambda value: isinstance(value, str) for name in ("id", "kind", "text")
    }),
    "read_study": (lambda: (sc.read_study, {}), FILE),
    "Decoding": (lambda: (sc.Decoding, {}), {
        "max_new_tokens": whole(1), "temperature": number(0), "top_p": number(1e-9, 1), "chat": flag,
        "seed": lambda value: isinstance(value, str),
    }),
    "generate": (lambda: (sc.generate, {"model": lens(), "prompts": sc.load_prompts("all", 1)}), {  # which has no tokenizer
        "model": nothing, "prompts": nothing, "path": nothing, "decoding": nothing, "overwrite": nothing, "verbose": nothing,
    }),
    "Plan": (lambda: (sc.Plan, {"prompts": sc.load_prompts("all", 1)}), {
        "prompts": nothing, "method": word("robust", "official"), "kinds": several(word("secondary", "primary-like")),
        "max_tokens": optional(QUERIES), "chat": flag, "decoding": NONE, "thresholds": lambda value: isinstance(value, dict) and not value,
    }),
    "reproduce": (lambda: (sc.reproduce, {"models": [lens()], "plan": sc.Plan(sc.load_prompts("all", 1)), "folder": "/proc/none/x"}), {
        "models": nothing, "plan": nothing, "folder": TARGET["path"], "records": nothing, "figures": nothing, "formats": nothing,
        "command": nothing, "overwrite": nothing, "verbose": nothing,
    }),
    "load_sweep": (lambda: (sc.load_sweep, {}), {"folder": nothing}),
    "sweep": (lambda: (sc.sweep, {"study": sc.Study(models=["no-such-model"]), "folder": "/proc/none/x"}), {
        "study": nothing, "folder": TARGET["path"], "executor": NONE,
    }),
    "interaction": (lambda: (sc.interaction, {"separate": mapped(), "together": mapped()}), {"separate": nothing, "together": nothing}),
    "Effect.load": (lambda: (sc.Effect.load, {}), FILE),
    "Effect.save": (lambda: (mapped().save, {}), TARGET),
    "Effect.effect": (lambda: (mapped().effect, {}), {"outcome": word(*OUTCOMES, "norm", "cosine")}),
    "Effect.over_lifetime": (lambda: (mapped().over_lifetime, {}), {
        "outcome": word(*OUTCOMES), "what": word("effect", "edited", "clean"),
    }),
    "Effect.summary": (lambda: (mapped().summary, {}), {"confidence": nothing}),
    "Sinks.load": (lambda: (sc.Sinks.load, {}), FILE),
    "Sinks.save": (lambda: (found().save, {}), TARGET),
    "Sinks.select": (lambda: (lambda kind: found().select(kind), {}), {
        "kind": word("primary", "secondary", "primary-like", "bos_sink", "noise"),
    }),
    "as_outcomes": (lambda: (as_outcomes, {}), {"given": optional(none_of_them)}),
}  # fmt: skip

TEXTS = {"model": nothing, "tokens": tokens, "sinks": nothing, "attention_mask": NONE, "verbose": flag}
OWN_LAYER = {"layer": LAYER, "forming": NONE}
TABLE |= {
    "anatomy.neurons": (lambda: (anatomy.neurons, at(layer=6)), {**TEXTS, **OWN_LAYER}),
    "anatomy.mlp_stages": (lambda: (anatomy.mlp_stages, at(layer=6)), {**TEXTS, **OWN_LAYER}),
    "anatomy.pca": (lambda: (anatomy.pca, at(layer=6)), {  # one sink has no same-token control: nothing is taken
        "layer": nothing, "forming": nothing, "alphas": nothing, "sinks": nothing,
    }),
    "anatomy.clustering": (lambda: (anatomy.clustering, at(layers=[6])), {"layers": nothing, "sinks": nothing}),
    "anatomy.writers": (lambda: (anatomy.writers, at()), TEXTS),
    "anatomy.norms_by_layer": (lambda: (anatomy.norms_by_layer, at()), TEXTS),
    "anatomy.score_by_lifetime": (lambda: (anatomy.score_by_lifetime, at()), {**TEXTS, "min_queries": QUERIES}),
    "anatomy.key_query_geometry": (lambda: (anatomy.key_query_geometry, at()), {
        **TEXTS, "min_queries": QUERIES, "n_heads": QUERIES,
    }),
    "anatomy.attention_patterns": (lambda: (anatomy.attention_patterns, at()), {
        **TEXTS, "n_heads": QUERIES, "n_positions": whole(2, 512), "around": whole(), "min_queries": whole(1, 55),
    }),
    "anatomy.matrix_entropy": (lambda: (anatomy.matrix_entropy, at(layers=[6], seen=[9])), {
        **TEXTS, "layers": optional(several(LAYER)), "seen": optional(several(QUERIES)),
    }),
    "anatomy.ablate_neurons": (lambda: (anatomy.ablate_neurons, at(found=carriers(), n=1, n_random=1)), {
        **TEXTS, "found": nothing, "n": optional(whole(1, 16)), "n_random": whole(1), "share": up_to_one, "no_such": nothing,
    }),
    "anatomy.against_random": (lambda: (anatomy.against_random, {}), {"effect": nothing}),
    "anatomy.levels": (lambda: (anatomy.levels, {"sources": found()}), {"sources": nothing, "kinds": nothing}),
    "Neurons.carriers": (lambda: (carriers().carriers, {}), {"share": up_to_one}),
    "Neurons.named": (lambda: (carriers().named, {"sink": 0, "n": 1}), {"sink": whole(0, 0), "n": optional(whole(1, 32))}),
    "Neurons.name_of": (lambda: (carriers().name_of, {"sink": 0, "neuron": 0}), {"sink": whole(0, 0), "neuron": whole(0, 31)}),
    "Neurons.recurring": (lambda: (carriers().recurring, {}), {"n": QUERIES}),
    "Writers.peak": (lambda: (writing().peak, {}), {"direction": word("start", "life", "end")}),
    "Writers.by_part": (lambda: (writing().by_part, {}), {"direction": word("start", "life", "end")}),
    "Writers.top": (lambda: (writing().top, {}), {"n": QUERIES}),
    "Writers.save": (lambda: (writing().save, {}), TARGET),
    "AttentionPatterns.of": (lambda: (patterns().of, {}), {"prompt": NONE}),
    "Anatomy.load": (lambda: (anatomy.Anatomy.load, {}), FILE),
    "Effect.forming": (lambda: (mapped().forming, {}), {"max_layer_of": word("l_start", "l_end")}),
    "WorkerPool": (lambda: (sc.WorkerPool, {}), {"workers": whole(1)}),
    "PromptSet.worded": (lambda: (sc.load_prompts("all", 1).worded, {}), {"wording": nothing}),
    "SinkScores.sink_rate": (lambda: (sc.sink_scores(**on()).sink_rate, {}), {"eps": number(0, 1)}),
    "CandidateSink": (lambda: (records.CandidateSink, {"layers": (1, 2), "token_id": 3, "sink_type": "noise"}), {
        "layers": lambda value: several(whole())(value) and sorted(value) == list(value), "token_id": whole(),
        "sink_type": word("secondary", "bos_sink", "noise"),
    }),
    "Record": (lambda: (records.Record, dict(vars(RECORD))), {
        "candidate_sinks": lambda value: isinstance(value, dict) and not value, **dict.fromkeys(records.LENGTHS, whole()),
    }),
    "record_of": (lambda: (records.record_of, {"found": official(), "token_ids": range(9), "sample_index": 0, "n_layers": 24}), {
        "found": nothing, "token_ids": lambda value: several(whole(), distinct=False)(value) and len(value) > 5, "sample_index": whole(),
        "n_layers": whole(4), "prompt_len": optional(whole(0, 9)),
    }),
    "write_records": (lambda: (records.write_records, {"path": "x", "records": [RECORD]}), {**TARGET, "overwrite": flag}),
    "write_records, records": (lambda: (records.write_records, {"path": "/proc/none/x"}), {"records": nothing}),
    "read_records": (lambda: (records.read_records, {}), FILE),
    "records_table": (lambda: (records.records_table, {}), {"records": none_of_them}),
    "planted.minimal": (lambda: (planted.minimal, {}), {"without": none_of_them}),
    "random_plant": (lambda: (planted.random_plant, {"name": "x"}), {
        "name": seed, "variant": NONE, "phases": NONE, "n_secondary": optional(whole(0, 3)), "noise": optional(number(0, 2)),
    }),
    "null_plant": (lambda: (planted.null_plant, {"name": "x"}), {"name": seed, "variant": NONE, "noise": optional(number(0, 2))}),
    "Plant.window": (lambda: (minimal().window, {}), {"layer": LAYER}),
    "Plant.text": (lambda: (minimal().text, {"name": "a", "n_tokens": 50}), {"name": seed, "n_tokens": whole(2, 1024)}),
    "Planted.tokens": (lambda: (minimal().tokens, {}), {
        "n_tokens": whole(61, 1024), "seed_name": seed,
        **dict.fromkeys(("sinks", "decoys"), several(whole(1, 95), empty=True, distinct=False)),
    }),
    "Truth.sink": (lambda: (minimal().truth.sink, {}), {"kind": word("primary", "secondary")}),
    "Truth.lives": (lambda: (minimal().truth.lives, {}), {"tokens": several(whole(), distinct=False)}),
    "calibrate": (lambda: (calibration.calibrate, {"n_plants": 1, "n_null": 0, "judges": (), "verbose": False}), {
        "n_plants": whole(1), "seed": seed, "n_null": optional(whole()), "variants": nothing, "backend": word("bridge", "hooked"),
        "judges": none_of_them, "null_judges": none_of_them, "executor": NONE, "verbose": flag,
    }),
}  # fmt: skip


def one_name(value) -> bool:
    """Of one column: itself, or in a list."""
    return isinstance(value, str) or (isinstance(value, list | np.ndarray) and list(value) == ["a"])


SIDES, NAMED = {"alternative": word(*statistics.ALTERNATIVES)}, {"name": lambda value: isinstance(value, str)}
PAIR = {"values": [1.0, 2.0], "prompts": ["a", "b"]}
TABLE |= {
    "prompt_means": (lambda: (statistics.prompt_means, PAIR), {"values": values(2), "prompts": labels(2)}),
    "prompt_table": (lambda: (statistics.prompt_table, {"values": [[1.0], [2.0]], "prompts": ["a", "b"]}), {
        "values": nothing, "prompts": labels(2),
    }),
    "bootstrap_over_prompts": (lambda: (statistics.bootstrap_over_prompts, {**PAIR, "name": "n"}), {
        **NAMED, "values": values(2), "prompts": labels(2), "confidence": inside,
    }),
    "bootstrap_columns": (lambda: (statistics.bootstrap_columns, {"values": [[1.0], [2.0]], "prompts": ["a", "b"], "name": "n"}), {
        "values": nothing, "prompts": labels(2), "name": one_name,
        "confidence": inside,
    }),
    "expanded_tail": (lambda: (statistics.expanded_tail, {"n": 5}), {"n": whole(2), "confidence": inside}),
    "sign_flip_test": (lambda: (statistics.sign_flip_test, PAIR), {**SIDES, **NAMED, "values": values(2), "prompts": labels(2)}),
    "max_t": (lambda: (statistics.max_t, {"effects": [[1.0], [2.0]]}), {
        **SIDES, **NAMED, "effects": lambda value: real(value) and np.ndim(value) == 2,
    }),
    "smallest_sign_flip_p": (lambda: (statistics.smallest_sign_flip_p, {"n": 5}), {**SIDES, "n": whole()}),
    "prompts_needed": (lambda: (statistics.prompts_needed, {}), {**SIDES, "alpha": up_to_one}),
    "trend_test": (lambda: (statistics.trend_test, {"dose": [1, 2, 3], "values": [[1.0, 2, 3], [3, 2, 1]]}), {
        **SIDES, **NAMED, "dose": nothing, "values": values(3, 3), "prompts": optional(labels(2)),
    }),
    "equivalence_test": (lambda: (statistics.equivalence_test, {**PAIR, "margin": 5}), {
        **NAMED, "values": values(2), "prompts": labels(2), "margin": lambda value: number(0)(value) and value > 0,
    }),
    "difference_to_controls": (lambda: (statistics.difference_to_controls, {
        "effects": [1.0, 2.0], "controls": [0.0, 1.0], "prompts": ["a", "b"], "name": "n",
    }), {**SIDES, **NAMED, "effects": values(2), "controls": values(2), "prompts": labels(2), "confidence": inside}),
    "rank_among_controls": (lambda: (statistics.rank_among_controls, {"value": 1.0, "controls": [0.0, 2.0]}), {
        **SIDES, "value": lambda value: real(value) and np.ndim(value) == 0, "controls": real,
    }),
    "holm": (lambda: (statistics.holm, {}), {"pvalues": pvalues}),
    "benjamini_hochberg": (lambda: (statistics.benjamini_hochberg, {}), {"pvalues": pvalues}),
    "discovery_confirmation_split": (lambda: (statistics.discovery_confirmation_split, {"prompts": ["a", "b"], "name": "n"}), {
        **NAMED, "prompts": nothing, "kinds": optional(labels(2)), "share": inside,
    }),
}  # fmt: skip
