"""Every public function, given what it cannot use: one sentence of the package's own, before anything is computed.

All of `JUNK` that a parameter of `TABLE` does not take must be refused, whatever is typed at the command line ends with exit code 2,
and no message steers a terminal.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable

import pandas as pd
import pytest
import torch
from common import prompt
from doors import JUNK, TABLE
from hypothesis import given, settings
from hypothesis import strategies as st

import sink_circuits as sc
from sink_circuits import anatomy, arguments, calibration, planted, records, statistics
from sink_circuits.arguments import shown
from sink_circuits.cli import main
from sink_circuits.errors import InputError, SinkCircuitsError


def test_the_table_lists_every_public_name():
    results = {
        "Agreement", "Attribution", "Claims", "Controlled", "Effect", "MassAccount", "Outcome", "PathEffect", "PromptSet",
        "SinkCircuitsError", "SinkScores", "Sinks", "Study", "SweepResult", "Tokens", "WorkerPool", "denoising",
    }  # fmt: skip
    assert {name.partition(".")[0].partition(",")[0] for name in TABLE} | results >= set(sc.__all__)


def test_the_table_lists_every_function_of_the_open_rooms():
    inner = {"judge_plant", "judge_null_plant", "subject_of", "seed_of"}  # of names, which may be anything; of plants
    listed = {name.partition(",")[0].rpartition(".")[2] for name in TABLE} | inner
    for room in (anatomy, calibration, planted, records, statistics):
        public = {
            name
            for name, one in inspect.getmembers(room, inspect.isfunction)
            if not name.startswith("_") and one.__module__.startswith(room.__name__)
        }
        assert public <= listed, public - listed


DOORS = [(name, parameter) for name, (_, takes) in TABLE.items() for parameter in takes]


def refused(call: Callable, value) -> str | None:
    """What is wrong with how `call` took a value that it cannot use; None when it was refused as it should be."""
    try:
        call()
    except SinkCircuitsError as error:
        said = str(error)
        if "\n" in said or not said.endswith(".") or len(said) > 500:
            return f"{shown(value)}: no single sentence: {said!r}"
        return None
    except Exception as error:
        return f"{shown(value)}: {type(error).__name__}: {str(error)[:100]}"
    return f"{shown(value)} was taken"


@pytest.mark.parametrize("share", ["some", pytest.param("all", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("door", "parameter"), DOORS, ids=[f"{door}-{parameter}" for door, parameter in DOORS])
def test_what_cannot_be_used_is_refused_in_one_sentence(door, parameter, share, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made, takes = TABLE[door]
    call, arguments = made()
    bad = [value for value in JUNK if not takes[parameter](value)]
    if share == "some":
        bad = random.Random(f"{door}/{parameter}").sample(bad, min(8, len(bad)))
    wrong = [refused(lambda value=value: call(**{**arguments, parameter: value}), value) for value in bad]
    if found := list(filter(None, wrong)):
        pytest.fail(f"{len(found)} of {len(wrong)}: {'; '.join(found[:4])}", pytrace=False)
    assert not list(tmp_path.iterdir()), "a refused call left files behind"


numbers = (
    st.integers()
    | st.floats()
    | st.booleans()
    | st.text()
    | st.none()
    | st.complex_numbers()
    | st.binary()
    | st.fractions()
)


@given(numbers, st.integers(-5, 5), st.integers(0, 9))
def test_a_whole_number_in_range_is_itself_and_nothing_else_passes(value, low, width):
    good = type(value) is int and low <= value <= low + width
    try:
        assert arguments.whole(value, "n", low, low + width) == value and good
    except InputError as error:
        assert not good and str(error).startswith("n = ") and "\n" not in str(error)


@given(st.text(max_size=40), st.text(max_size=200))
def test_no_message_has_two_lines_or_steers_a_terminal(name, value):
    with pytest.raises(InputError) as error:
        arguments.one_of(value + "?", f"option {name}", ("a", "b"))
    assert str(error.value).isprintable() and "use one of a, b" in str(error.value)


def test_a_padded_batch_without_its_mask_is_refused():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w63"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w5", unk_token="w63")
    model = sc.load_model(planted.minimal().hf_model, tokenizer=tokenizer, verbose=False)
    text = prompt(n_tokens=64)
    text[text == 5] = 6
    for side in ("left", "right"):
        padded, mask = torch.full((2, 70), 5), torch.zeros(2, 70, dtype=torch.long)
        for row, n in enumerate((64, 69)):
            where = slice(70 - n, None) if side == "left" else slice(n)
            padded[row, where], mask[row, where] = text.repeat(2)[:n], 1
        for batch in (padded, padded[:1]):
            with pytest.raises(InputError, match=r"padding token \(5\): pass attention_mask"):
                sc.find_sinks(model, batch, verbose=False)
        alone = sc.find_sinks(model, [text, text.repeat(2)[:69]], verbose=False).table
        pd.testing.assert_frame_equal(sc.find_sinks(model, padded, attention_mask=mask, verbose=False).table, alone)
    whole = torch.stack([text, text])
    assert len(sc.find_sinks(model, whole, verbose=False).prompts) == 2


WORDS = st.sampled_from([
    "--n-prompts", "--max-tokens", "--cosine", "--norm-ratio", "--layers", "--factors", "--kinds", "--out", "--figure", "--prompts",
    "--path", "--first-positions", "--max-sinks", "--n-random", "--chat", "--overwrite", "--no-such", "-1", "0", "1", "nan", "1e400",
    "x", "",
]) | st.text(st.characters(blacklist_characters="\0"), max_size=5).filter(lambda word: not word.startswith("-h"))  # fmt: skip


@settings(max_examples=15)
@given(
    command=st.sampled_from(["detect", "map", "ablate", "dose", "claims", "check"]), words=st.lists(WORDS, max_size=4)
)
def test_whatever_is_typed_ends_with_exit_code_2_and_no_traceback(command, words, tmp_path_factory):
    import contextlib
    import io

    said, place = io.StringIO(), tmp_path_factory.mktemp("typed")
    with contextlib.chdir(place), contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            code = main([command, "no-such-model", *words])
        except SystemExit as stop:  # the parser's own
            code = stop.code
    assert code == 2, said.getvalue()
    assert "Traceback" not in said.getvalue()
    assert not list(place.iterdir())
