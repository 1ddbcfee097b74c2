"""Records: the JSON-lines format of the published code (Wong et al., 2512.22213), one text a line.

`{"candidate_sinks": {"<pos>": {"layer": [..], "token_id": int, "sink_type": str}}, "sample_index": int,
"prompt_len": int, "response_len": int, "full_text_len": int}`, keys in this order. The BOS sink is one of the candidates,
with the layers that were looked at. `prompt_len` counts the prompt alone, without any chat template, `response_len` the
rest of the text. Older files say `cliff` for `secondary`, which reading makes of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from sink_circuits import arguments
from sink_circuits.arguments import MOST, shown
from sink_circuits.detection import OfficialResult, official_type
from sink_circuits.errors import InputError, ResultError
from sink_circuits.results import write_whole
from sink_circuits.text_files import parse_json, read_text

SINK_TYPES = ("secondary", "bos_sink", "noise")
OLD_TYPES = {"cliff": "secondary"}
LENGTHS = ("sample_index", "prompt_len", "response_len", "full_text_len")


@dataclass(frozen=True)
class CandidateSink:
    """One token as the published procedure sees it: the layers of high cosine (ascending), its id, its type.

    Raises InputError for what a line could not say.
    """

    layers: tuple[int, ...]
    token_id: int
    sink_type: str

    def __post_init__(self):
        layers = tuple(arguments.whole(layer, "layer") for layer in arguments.several(self.layers, "layers"))
        if list(layers) != sorted(set(layers)):
            raise InputError(f"layers = {shown(layers)}: give ascending numbers, each once.")
        object.__setattr__(self, "layers", layers)
        object.__setattr__(self, "token_id", arguments.whole(self.token_id, "token_id"))
        arguments.one_of(self.sink_type, "sink_type", SINK_TYPES)


@dataclass(frozen=True)
class Record:
    """One line: the candidate sinks of one text by position, and how long prompt, response and both together are.

    Raises InputError for what a line could not say.
    """

    candidate_sinks: Mapping[int, CandidateSink]
    sample_index: int
    prompt_len: int
    response_len: int
    full_text_len: int

    def __post_init__(self):
        remedy = "give CandidateSinks by position"
        sinks = arguments.instance(self.candidate_sinks, "candidate_sinks", Mapping, remedy)
        for sink in sinks.values():
            arguments.instance(sink, "a candidate sink", CandidateSink, remedy)
        made = {arguments.whole(position, "position"): sink for position, sink in sinks.items()}
        object.__setattr__(self, "candidate_sinks", made)
        for name in LENGTHS:
            object.__setattr__(self, name, arguments.whole(getattr(self, name), name))

    def to_json(self) -> str:
        """The line, without its line break."""
        sinks = {
            str(position): {"layer": list(sink.layers), "token_id": sink.token_id, "sink_type": sink.sink_type}
            for position, sink in self.candidate_sinks.items()
        }
        return json.dumps({"candidate_sinks": sinks, **{name: getattr(self, name) for name in LENGTHS}})


def record_of(
    found: OfficialResult, token_ids, sample_index: int, *, n_layers: int, prompt_len: int | None = None
) -> Record:
    """The record of one text, whose `token_ids` [pos] hold prompt and response; `prompt_len` None: all is prompt.

    As the published code writes it: the BOS sink stands first, with the layers that were looked at and the type that their
    number gives in a model of `n_layers`; then the others in the order in which they are met, layer by layer. Raises
    InputError when the result belongs to another text or model or the prompt is longer than the text.
    """
    arguments.instance(found, "found", OfficialResult, "pass what official() returns")
    ids = [arguments.whole(i, "token id") for i in arguments.several(token_ids, "token_ids")]
    n_layers = arguments.whole(n_layers, "n_layers", low=1)
    if found.last_layer >= n_layers:
        raise InputError(
            f"n_layers = {n_layers}, but layer {found.last_layer} was looked at: give the model that it was found in."
        )
    prompt_len = len(ids) if prompt_len is None else arguments.whole(prompt_len, "prompt_len")
    if prompt_len > len(ids):
        raise InputError(f"prompt_len = {prompt_len} is out of range: the text has {len(ids)} tokens.")
    if beyond := [position for position in (found.bos, *found.layers) if position >= len(ids)]:
        raise InputError(
            f"a sink at position {beyond[0]} in a text of {len(ids)} tokens: pass the tokens it was found in."
        )
    looked_at = tuple(range(found.first_layer, found.last_layer + 1))
    sinks = {found.bos: CandidateSink(looked_at, ids[found.bos], official_type(len(looked_at), n_layers))}
    for position in sorted(found.layers, key=lambda one: (found.layers[one][0], one)):
        layers = tuple(found.layers[position])
        sinks[position] = CandidateSink(layers, ids[position], found.sink_type[position])
    return Record(sinks, sample_index, prompt_len, len(ids) - prompt_len, len(ids))


def write_records(path: str | Path, records: Sequence[Record], overwrite: bool = False) -> None:
    """One JSON line per record, whole or not at all. Raises ResultError when `path` exists or cannot be written."""
    path, records = arguments.path(path), _records(records)
    text = "".join(record.to_json() + "\n" for record in records)
    write_whole(path, lambda temporary: temporary.write_text(text, "utf-8"), overwrite=overwrite)


def read_records(path: str | Path) -> list[Record]:
    """Records of this package or of the published code; empty lines are skipped.

    Raises ResultError naming file, line and what is wrong there.
    """
    try:
        text = read_text(arguments.path(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ResultError(f"records {path} cannot be read ({error}): check the path.") from error
    records = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            records.append(_parsed(parse_json(line)))
        except json.JSONDecodeError as error:
            raise ResultError(
                f"{path}, line {number}: not a whole JSON object ({error}); was the file cut off?"
            ) from error
        except (ValueError, RecursionError) as error:
            raise ResultError(f"{path}, line {number}: {error}.") from error
    return records


def records_table(records: Sequence[Record]) -> pd.DataFrame:
    """One row per candidate sink: sample_index, pos, token_id, sink_type, l_start, l_end, lifetime.

    `l_start` and `l_end` are the outermost of its layers, `lifetime` is their number (gaps are not counted).
    """
    rows = [
        (r.sample_index, position, s.token_id, s.sink_type, min(s.layers), max(s.layers), len(s.layers))
        for r in _records(records)
        for position, s in r.candidate_sinks.items()
    ]
    table = pd.DataFrame(rows, columns=["sample_index", "pos", "token_id", "sink_type", "l_start", "l_end", "lifetime"])
    return table.astype({name: "int64" for name in table.columns if name != "sink_type"})


def _records(records) -> tuple[Record, ...]:
    made = arguments.several(records, "records", empty=True)
    for one in made:
        arguments.instance(one, "a record", Record, "make it with record_of(), or read_records()")
    return made


def _parsed(fields) -> Record:
    """A line's JSON as a record. Raises ValueError saying what is wrong."""
    _need(fields, ("candidate_sinks", *LENGTHS), "the line")
    sinks = fields["candidate_sinks"]
    if not isinstance(sinks, dict):
        raise ValueError(f"candidate_sinks is {sinks!r}, an object by position is needed")
    candidates: dict[int, CandidateSink] = {}
    for key, sink in sinks.items():
        if not (key.isascii() and key.isdigit()):
            raise ValueError(f"position {key!r} is not a whole number")
        if int(key) in candidates:
            raise ValueError(f"position {int(key)} is there twice")
        where = f"the sink at position {key}"
        _need(sink, ("layer", "token_id", "sink_type"), where)
        layers, kind = sink["layer"], sink["sink_type"]
        kind = OLD_TYPES.get(kind, kind) if isinstance(kind, str) else kind
        if kind not in SINK_TYPES:
            raise ValueError(
                f"sink_type {kind!r} of {where} is unknown: {', '.join((*SINK_TYPES, *OLD_TYPES))} are known"
            )
        if not isinstance(layers, list) or not layers or not all(_is_count(layer) for layer in layers):
            raise ValueError(f"layer of {where} is {layers!r}, a list of whole numbers is needed")
        if layers != sorted(set(layers)):
            raise ValueError(f"layer of {where} is {layers!r}, ascending numbers are needed, each once")
        if not _is_count(sink["token_id"]):
            raise ValueError(f"token_id of {where} is {sink['token_id']!r}, a whole number is needed")
        candidates[int(key)] = CandidateSink(tuple(layers), sink["token_id"], kind)
    for name in LENGTHS:
        if not _is_count(fields[name]):
            raise ValueError(f"{name} is {fields[name]!r}, a whole number is needed")
    return Record(candidates, *(fields[name] for name in LENGTHS))


def _need(fields, names: Sequence[str], where: str) -> None:
    if not isinstance(fields, dict):
        raise ValueError(f"{where} is {type(fields).__name__}, a JSON object is needed")
    if missing := [name for name in names if name not in fields]:
        raise ValueError(f"{where} lacks {', '.join(missing)}")


def _is_count(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MOST
