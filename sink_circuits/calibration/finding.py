"""Is every sink found, with its layers, and nothing else? Detection, robust and official."""

from __future__ import annotations

from sink_circuits.adapters import adapt
from sink_circuits.calibration.subjects import Answer, Row, Subject, answer, listed
from sink_circuits.detection import find_sinks
from sink_circuits.planted.closed_form import primary_norms

_LIFE = "every planted life is found, with l_start and l_end"
ROWS = (
    Row("detection: primary", _LIFE),
    Row("detection: secondary", _LIFE),
    Row("detection: primary-like", _LIFE),
    Row("detection: nothing else", "every sink found was planted"),
    Row(
        "detection: official",
        "planted lives (and opposite decoys), cut to the layers that the published procedure looks at",
    ),
    Row("null: detection", "no sink in a model without a circuit"),
)


def judge_detection(subject: Subject) -> list[Answer]:
    expected: dict[str, set] = {"primary": set(), "secondary": set(), "primary-like": set()}
    for name, ids in zip(subject.tokens.names, subject.tokens.ids, strict=True):
        for pos, sink in subject.plant.truth.lives(ids):
            expected[sink.kind].add((name, pos, sink.kind, sink.l_start, sink.l_end))
    table = subject.found.table
    found = set(zip(table["prompt"], table["pos"], table["kind"], table["l_start"], table["l_end"], strict=True))
    answers = []
    for kind, own in expected.items():
        if own:
            answers.append(Answer(f"detection: {kind}", len(own & found), len(own), listed("missed", own - found)))
    surplus = found - set().union(*expected.values())
    return [
        *answers,
        Answer("detection: nothing else", len(found) - len(surplus), len(found), listed("surplus", surplus)),
    ]


def judge_official(subject: Subject) -> list[Answer]:
    """The published procedure looks at the layers from the primary's greatest rise to its steepest fall, the last one among
    them only behind the final norm. Asked where it can be told by hand: the primary is one of its two candidates, its
    rise is not block 0's, and no sink is half formed before it starts."""
    plant, truth = subject.plant, subject.plant.truth
    if adapt(
        subject.model
    ).processed:  # centred by its own circuit, which a HookedTransformer cannot tell from processing
        return []
    first = min(sink.l_start for sink in truth.sinks if sink.kind == "primary")
    if plant.recipe.primary_position > 1 or first == 0 or any(sink.redundancy == "chain" for sink in truth.sinks):
        return []
    norms = primary_norms(plant)
    norms[-1] = plant.recipe.shape.d_model**0.5
    rises = norms.diff()
    start = int(rises.argmax()) + 1
    end = start + 1 + int(rises[start:].argmin()) if start < len(rises) else start + 1
    expected = set()
    for name, ids in zip(subject.tokens.names, subject.tokens.ids, strict=True):
        for pos, sink in truth.lives(ids):
            layers = [layer for layer in sink.layers if start <= layer < end]
            if sink.kind != "primary" and layers:
                expected.add((name, pos, layers[0], layers[-1]))
        for decoy in truth.decoys:  # it asks for a large cosine of either sign
            pos = int((ids == decoy.token).nonzero()[0])
            layers = list(range(max(start, decoy.layer or 0), end))
            if decoy.kind == "opposite" and layers:
                expected.add((name, pos, layers[0], layers[-1]))
    table = find_sinks(subject.model, subject.tokens, method="official", verbose=False).table
    found = set(zip(table["prompt"], table["pos"], table["l_start"], table["l_end"], strict=True))
    wrong = listed("missed", expected - found) + listed(" surplus", found - expected)
    return [answer("detection: official", expected == found, wrong)]


def judge_nothing_found(subject: Subject) -> list[Answer]:
    with_sinks = subject.found.table["prompt"].nunique()
    return [
        Answer(
            "null: detection",
            len(subject.tokens) - with_sinks,
            len(subject.tokens),
            listed("found", subject.found.table["pos"]),
        )
    ]


JUDGES = (judge_detection, judge_official)
NULL_JUDGES = (judge_nothing_found,)
