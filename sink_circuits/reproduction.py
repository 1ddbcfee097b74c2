"""The published study, from prompts to its figures and tables, for one model or many (Wong et al., 2512.22213).

Each figure is a function of `anatomy`, written into one folder as a table (parquet, CSV), SVG and HTML, with an index
page. Everything here observes; what causes a sink is for `experiments` to say.
"""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import torch

from sink_circuits import arguments, study_page
from sink_circuits.adapters import adapt
from sink_circuits.arguments import shown
from sink_circuits.clean_runs import run_clean
from sink_circuits.detection import (
    COLUMNS,
    Sinks,
    find_sinks,
    official,
    official_hidden_states,
    score_evidence,
    thresholds_of,
)
from sink_circuits.errors import InputError, ResultError, SinkCircuitsError
from sink_circuits.figures import LIBRARY, save_library
from sink_circuits.generation import Decoding, generate
from sink_circuits.models import check_device, load_model
from sink_circuits.prompts import PromptSet, Tokens, token_texts
from sink_circuits.records import Record, read_records, record_of, write_records
from sink_circuits.results import check_target, write_whole
from sink_circuits.scores import scores_of
from sink_circuits.study_figures import FIGURES, LEVELS, StudyFigure, Subject
from sink_circuits.study_folder import (
    FORMATS,
    Made,
    is_complete,
    make_figure,
    models_in,
    read_note,
    read_plan,
    states_of,
)

SECONDARIES = ("secondary", "primary-like")
FIGURE_NAMES = (LEVELS.name, *(figure.name for figure in FIGURES))
FILES = ("sinks.parquet", "sinks.csv")
LONGEST_NAME = 100
"""Characters of a model's name that its folder keeps."""


@dataclass(frozen=True)
class Plan:
    """What a folder of figures is made from: the same for all its models.

    `method`: "robust", or "official", the published procedure. `kinds`: the sinks whose figures are drawn beside the
    primary ones. `decoding`: how each model answers the prompts itself before it is looked at, None where it does not (its
    `chat` must be the plan's). `thresholds` by name, as `find_sinks` takes them. Raises InputError.
    """

    prompts: PromptSet
    method: str = "robust"
    kinds: tuple[str, ...] = SECONDARIES
    max_tokens: int | None = None
    chat: bool = False
    decoding: Decoding | None = None
    thresholds: Mapping = field(default_factory=dict)

    def __post_init__(self):
        arguments.instance(
            self.prompts, "prompts", PromptSet, "make them with load_prompts() or PromptSet((Prompt(...), ...))"
        )
        arguments.instance(self.thresholds, "thresholds", Mapping, "give values by name, as {'cosine': 0.95}")
        if unknown := [name for name in self.thresholds if not isinstance(name, str)]:
            raise InputError(f"threshold {shown(unknown[0])} is unknown: name thresholds by strings.")
        arguments.one_of(self.method, "method", ("robust", "official"))
        thresholds_of(self.method, **self.thresholds)
        kinds = arguments.several(self.kinds, "kinds", empty=True)
        for kind in kinds:
            arguments.one_of(kind, "kind", SECONDARIES, "here use {}")
        if len(set(kinds)) < len(kinds):
            raise InputError(f"kinds {shown(kinds)}: name each once.")
        if not kinds or not len(self.prompts):
            raise InputError("a study needs at least one kind of sink and one prompt.")
        object.__setattr__(self, "kinds", kinds)
        if self.max_tokens is not None:
            object.__setattr__(self, "max_tokens", arguments.whole(self.max_tokens, "max_tokens", low=1))
        arguments.flag(self.chat, "chat")
        if self.decoding is not None:
            arguments.instance(self.decoding, "decoding", Decoding, "make it with Decoding()")
        if self.decoding is not None and self.decoding.chat != self.chat:
            raise InputError(
                "answers are generated and looked at in the same form: give decoding the chat of the plan."
            )

    def settings(self) -> dict:
        """As plain data; prompts by the hash of their ids, texts and outputs."""
        texts = json.dumps([dataclasses.astuple(prompt) for prompt in self.prompts])
        return {
            "prompts": hashlib.sha256(texts.encode()).hexdigest()[:16], "n_prompts": len(self.prompts), "method": self.method,
            "kinds": list(self.kinds), "max_tokens": self.max_tokens, "chat": self.chat,
            "decoding": None if self.decoding is None else dataclasses.asdict(self.decoding),
            "thresholds": json.loads(json.dumps(dict(self.thresholds))),
        }  # fmt: skip


@dataclass(frozen=True)
class Reproduction:
    """What `reproduce` left: the folder, its page, and a line for each figure."""

    folder: Path
    figures: tuple[Made, ...]

    @property
    def index(self) -> Path:
        return self.folder / "index.html"

    @property
    def failed(self) -> tuple[Made, ...]:
        return tuple(one for one in self.figures if one.state == "failed")


def reproduce(
    models: Sequence, plan: Plan | None, folder: str | Path, *, records: Mapping[str, Sequence[Record]] | None = None,
    figures: Sequence[str] = FIGURE_NAMES, formats: Sequence[str] = FORMATS, command: str = "", overwrite: bool = False,
    device: str | None = None, verbose: bool = True,
) -> Reproduction:  # fmt: skip
    """All figures and tables of the study for these models, one after the other, in `folder` with an index page.

    `models`: whatever `load_model` takes. `records`: records of the published code, which figure 2 shows beside them, by
    the name of the panel; with them alone, `plan` may be None. A figure whose files are there is not made again (a model
    is known by its name), so the same call goes on where one was stopped, and a later one adds models. A figure that does
    not exist for a model (no sinks of that kind, too few of them) is told with its reason; so is what fails, which the
    next call tries again. `figures`: only these, by name. `formats`: html, svg, pdf, png; where a browser is missing for
    the last three, the page says so. `command`: how to make this again, for the page. `device`: as `load_model` takes it.

    Raises InputError for an unknown figure or format, two models of one name or a study of nothing; ResultError for a
    folder that holds something else or was made by another plan (unless `overwrite`); and what `load_model` raises where
    there is one model only.
    """
    folder = arguments.path(folder, "folder")
    models = [models] if isinstance(models, str | Path) else arguments.several(models, "models", empty=True)
    names = [name_of(model) for model in models]
    if plan is not None:
        arguments.instance(plan, "plan", Plan, "make it with Plan(prompts)")
    if records is not None:
        arguments.instance(
            records, "records", Mapping, "give lists of records by name, as {'published': read_records(path)}"
        )
        for name, own in records.items():
            arguments.text(name, "a name of records")
            for one in arguments.several(own, f"the records named {shown(name)}", empty=True):
                arguments.instance(one, "a record", Record, "read them with records.read_records(path)")
    arguments.flag(overwrite, "overwrite")
    arguments.flag(verbose, "verbose")
    check_device(device)
    arguments.instance(command, "command", str, "give it as it was typed")
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(f"two models are named {twice[0]!r}: their figures would share a folder.")
    files = [_safe_name(name) for name in records or {}]
    if twice := [name for name, file in zip(records or {}, files, strict=True) if files.count(file) > 1]:
        raise InputError(
            f"records {' and '.join(map(repr, twice))} would share a file: give them names that differ in letters or digits."
        )
    if clash := set(names) & set(files):
        raise InputError(
            f"records and a model would both be called {sorted(clash)[0]!r}: give the records another name."
        )
    if (plan is None) if names else not records:
        raise InputError("nothing to reproduce: give models and a plan with prompts, or records of the published code.")
    formats, figures = (
        arguments.several(formats, "formats", empty=True),
        arguments.several(figures, "figures", empty=True),
    )
    for what, given, known in (("format", formats, ("html", "svg", "pdf", "png")), ("figure", figures, FIGURE_NAMES)):
        for one in given:
            arguments.one_of(one, what, known, "use {}")
    wanted = [figure for figure in FIGURES if figure.name in figures]
    _check_folder(folder, plan, overwrite)
    for name, own in (records or {}).items():
        write_records(folder / "records" / f"{_safe_name(name)}.jsonl", own, overwrite=True)
    failed: list[Made] = []
    try:
        if "html" in formats and not (folder / LIBRARY).is_file():
            save_library(folder / LIBRARY)
        for name, model in zip(names, models, strict=True):
            try:
                failed += _one_model(model, name, plan, folder, wanted, formats, overwrite, device, verbose)
            except (SinkCircuitsError, MemoryError) as error:
                if len(names) == 1 or isinstance(error, ResultError):
                    raise
                failed.append(Made(name, "", "failed", str(error) or type(error).__name__))
            gc.collect()  # the next model's weights take the place of this one's
        failed += _levels(folder, formats, overwrite, verbose) if LEVELS.name in figures else []
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(f"{folder} keeps what was made, and the same command goes on with the rest") from stop
    finally:
        states = (*states_of(folder), *failed)
        if folder.is_dir():
            page = study_page.render(folder, states, figures, command)
            write_whole(folder / "index.html", lambda temporary: temporary.write_text(page, "utf-8"), overwrite=True)
    return Reproduction(folder, states)


def name_of(model) -> str:
    """The name of a model's folder and of its panels: the last part of its path or hub name, without special characters."""
    if isinstance(model, str | Path):
        return _safe_name(str(model).rstrip("/").rsplit("/", 1)[-1])
    config = getattr(model, "config", None)
    name = getattr(getattr(model, "cfg", None), "model_name", None) or getattr(config, "name_or_path", None)
    return _safe_name(str(name or type(model).__name__).rstrip("/").rsplit("/", 1)[-1])


def _safe_name(name: str) -> str:
    safe = re.sub(r"[^\w.@+-]+", "_", name)[:LONGEST_NAME].strip("._") or "model"
    return f"{safe}_" if safe in ("records", "levels", "index") else safe


def _check_folder(folder: Path, plan: Plan | None, overwrite: bool) -> None:
    """Raises ResultError for a folder that is neither new nor this plan's."""
    check_target(folder / "index.html", overwrite=True)
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    before = read_plan(folder)
    begun = {LIBRARY, "index.html"}  # all that a run leaves whose models could not be loaded
    if before is None and not (folder / "records").is_dir() and {path.name for path in folder.iterdir()} - begun:
        raise ResultError(f"folder {folder} holds something else: choose another one.")
    settings = None if plan is None else plan.settings()
    if before is None or settings is None or overwrite:
        return
    if changed := [name for name in settings if before.get(name) != settings[name]]:
        raise ResultError(
            f"folder {folder} was made with {changed[0]} {before.get(changed[0])}, not {settings[changed[0]]}: choose another one, or "
            "pass overwrite=True (--overwrite)."
        )


def _claim(folder: Path, plan: Plan) -> None:
    """Notes the plan before the first result; figures of another plan, which only `overwrite` lets in, are removed."""
    settings = plan.settings()
    if read_plan(folder) not in (None, settings):
        _forget(folder, [LEVELS])
        for name in models_in(folder):
            _forget(folder / name, FIGURES)
            for file in (*FILES, "records.jsonl", "generations.jsonl", "generations.jsonl.manifest.json"):
                (folder / name / file).unlink(missing_ok=True)
    text = json.dumps(settings, indent=1)
    write_whole(folder / "plan.json", lambda temporary: temporary.write_text(text, "utf-8"), overwrite=True)


def _forget(folder: Path, figures: Sequence[StudyFigure]) -> None:
    """Takes figures away that are of other sinks than the folder is about to hold; their note goes first."""
    for figure in figures:
        note = read_note(folder, figure.name)
        for file in (f"{figure.name}.json", *(note["files"] if note else ())):
            (folder / Path(file).name).unlink(missing_ok=True)


def _one_model(
    source, name: str, plan: Plan, top: Path, figures: Sequence[StudyFigure], formats: Sequence[str], overwrite: bool,
    device: str | None, verbose: bool,
) -> list[Made]:  # fmt: skip
    """Makes what is missing of one model's figures; returns those that failed."""
    folder = top / name
    files = (*FILES, *(("records.jsonl",) if plan.method == "official" else ()))
    found_before = not overwrite and all((folder / file).is_file() for file in files)
    wanted = [figure for figure in figures if not found_before or not is_complete(folder, figure.name, formats)]
    if found_before and not wanted:
        return []
    model = load_model(source, device=device, verbose=verbose)
    prompts = plan.prompts
    prompts.tokens(
        model, max_tokens=plan.max_tokens, chat=plan.chat
    )  # what does not fit is told before anything is written
    _claim(top, plan)
    if plan.decoding is not None:
        answers = folder / "generations.jsonl"
        prompts = generate(model, prompts, answers, decoding=plan.decoding, overwrite=overwrite, verbose=verbose)
    tokens = prompts.tokens(model, max_tokens=plan.max_tokens, chat=plan.chat)
    if found_before:
        found = Sinks.load(folder / "sinks.parquet")
        if (found.manifest.weights, found.manifest.tokens) != (adapt(model).weights_hash, tokens.hash):
            raise ResultError(
                f"folder {folder} was made with other weights or texts than {name} has now: choose another one, or pass "
                "overwrite=True (--overwrite)."
            )
    else:
        _forget(top, [LEVELS])
        _forget(folder, FIGURES)
        found = _found(model, prompts, tokens, plan, folder, verbose)
    failed = []
    for figure in wanted:
        made = make_figure(figure, Subject(model, tokens, found, plan.kinds, verbose), name, folder, formats)
        if verbose:
            print(f"{name}: {figure.title}: {made.reason or f'{made.seconds:.1f} s'}")
        failed += [made] if made.state == "failed" else []
    return failed


# Sinks.


def _found(model, prompts: PromptSet, tokens: Tokens, plan: Plan, folder: Path, verbose: bool) -> Sinks:
    """All sinks of these texts, saved as tables; by the official method as records too."""
    if plan.method == "official":
        options = {"first_positions": (0, 1, 2) if plan.chat else (0, 1), "verbose": verbose, **plan.thresholds}
        found, records = official_sinks(model, tokens, prompts.prompt_lengths(model), **options)
        write_records(folder / "records.jsonl", records, overwrite=True)
    else:
        found = find_sinks(model, tokens, verbose=verbose, **plan.thresholds)
        if plan.chat:
            found = outside_template(found, prompts.template_positions(model))
    write_whole(folder / "sinks.csv", lambda temporary: found.table.to_csv(temporary, index=False), overwrite=True)
    found.save(folder / "sinks.parquet", overwrite=True)
    return found


def outside_template(found: Sinks, template: Mapping[str, Sequence[int]]) -> Sinks:
    """The sinks less those, but for the primary, that stand at a position of the chat template, by prompt.

    The template's tokens are the same in every prompt: their sinks would recur as if texts had formed them.
    """
    table = found.table
    inside = [pos in template.get(prompt, ()) for prompt, pos in zip(table["prompt"], table["pos"], strict=True)]
    kept = table[~pd.Series(inside, index=table.index, dtype=bool) | (table["kind"] == "primary")]
    return dataclasses.replace(found, table=kept.reset_index(drop=True))


def official_sinks(
    model, tokens: Tokens, prompt_lens: Sequence[int] | None = None, *, first_positions: Sequence[int] = (0, 1), verbose: bool = True,
    **thresholds,
) -> tuple[Sinks, list[Record]]:  # fmt: skip
    """What the published procedure finds, as a table and as records; the table holds the BOS sink too, as `primary`.

    Its life is the layers that were looked at. `prompt_lens`: tokens of each prompt by itself (None: all is prompt).
    Raises as `find_sinks` does.
    """
    first_positions = tuple(first_positions)
    used = thresholds_of("official", first_positions=first_positions, **thresholds)
    found = find_sinks(model, tokens, method="official", thresholds=used, verbose=verbose)
    tables, records = [], []
    for index, (name, ids) in enumerate(zip(tokens.names, tokens.ids, strict=True)):
        clean = run_clean(model, ids, resumable=False)
        states = official_hidden_states(model, clean)
        result = official(states, first_positions)
        prompt_len = None if prompt_lens is None else min(prompt_lens[index], len(ids))
        records.append(record_of(result, ids, index, n_layers=len(states), prompt_len=prompt_len))
        scores = scores_of(clean, adapt(model).windows, min_queries=used.min_queries)
        ever = torch.zeros(len(ids), dtype=torch.bool)
        ever[[result.bos, *result.layers]] = True
        first, last = result.first_layer, result.last_layer
        bos = {
            "prompt": name, "pos": result.bos, "token_id": int(ids[result.bos]), "token": token_texts(model, ids)[result.bos],
            "kind": "primary", "l_start": first, "l_end": last, "lifetime": last - first + 1, "phase_start": first,
            "primary_pos": result.bos, "norm": float(states[first : last + 1, result.bos].float().norm(dim=-1).max()),
            **score_evidence(scores.mean(dim=1), result.bos, first, last, ever, used.neighbours),
        }  # fmt: skip
        own = found.table[found.table["prompt"] == name]
        tables.append(pd.DataFrame([bos], columns=list(COLUMNS)).astype(found.table.dtypes))
        tables += [own] if len(own) else []
    return dataclasses.replace(found, table=pd.concat(tables, ignore_index=True)), records


def _levels(folder: Path, formats: Sequence[str], overwrite: bool, verbose: bool) -> list[Made]:
    """Figure 2 of everything that the folder holds: its models, and records of the published code."""
    sources: dict[str, Path] = {}
    for name in models_in(folder):
        own = folder / name / "records.jsonl"
        sources[name] = own if own.is_file() else folder / name / "sinks.parquet"
    sources |= {path.stem: path for path in sorted((folder / "records").glob("*.jsonl"))}
    if not sources:
        return []
    hashes = {name: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for name, path in sources.items()}
    if not overwrite and is_complete(folder, LEVELS.name, formats, sources=hashes):
        return []
    read = {
        name: Sinks.load(path) if path.suffix == ".parquet" else read_records(path) for name, path in sources.items()
    }
    made = make_figure(LEVELS, read, "", folder, formats, sources=hashes)
    if verbose:
        print(f"{LEVELS.title}: {made.reason or f'{made.seconds:.1f} s'}")
    return [made] if made.state == "failed" else []
