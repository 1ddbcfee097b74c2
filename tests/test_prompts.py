"""Whatever a researcher passes as tokens, checked and unpadded before anything is run."""

from __future__ import annotations

import copy
import functools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from common import lens, no_forward_pass, prompt
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import PreTrainedTokenizerFast

import sink_circuits as sc
from sink_circuits import weights
from sink_circuits.errors import InputError
from sink_circuits.prompts import Prompt, PromptSet, Tokens, as_tokens, load_prompts, token_texts

WORDS = ["<s>", "[user]", "[/user]", "a", "b", "c", "<unk>"]


class Model(nn.Module):
    """All that prompts need of a model: its limits, its device, its tokenizer."""

    def __init__(self, tokenizer=None):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.cfg = SimpleNamespace(n_ctx=12, d_vocab=7)
        self.tokenizer = tokenizer


def tokenizer(bos: bool = True, template: bool = True) -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    made = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", unk_token="<unk>")
    if template:
        made.chat_template = "{% for m in messages %}<s> [user] {{ m['content'] }} [/user]{% endfor %}"
    return made


def lists(tokens: Tokens) -> list[list[int]]:
    return [ids.tolist() for ids in tokens]


def test_the_tokenizers_own_bos_is_there_once_and_none_is_added():
    texts = PromptSet((Prompt("x", "text", "a b c"), Prompt("y", "text", "c")))
    with_bos = texts.tokens(Model(tokenizer()))
    assert lists(with_bos) == [[0, 3, 4, 5], [0, 5]]
    assert with_bos.names == ("x", "y")
    assert lists(texts.tokens(Model(tokenizer(bos=False)))) == [[3, 4, 5], [5]]
    assert lists(texts.tokens(Model(tokenizer()), chat=True)) == [[0, 1, 3, 4, 5, 2], [0, 1, 5, 2]]
    assert lists(texts.tokens(Model(tokenizer()), max_tokens=2)) == [[0, 3], [0, 5]]


@pytest.mark.parametrize("form", ["text", "texts", "prompts", "1d", "2d", "list", "numpy", "numbers", "tokens"])
def test_every_form_gives_the_same_ids(form):
    rows = [[0, 3, 4]] if form in ("text", "1d") else [[0, 3, 4], [0, 4, 5]]
    given_as = {
        "text": "a b", "texts": ["a b", "b c"], "1d": torch.tensor(rows[0]), "2d": torch.tensor(rows),
        "prompts": PromptSet((Prompt("p", "t", "a b"), Prompt("q", "t", "b c"))),
        "list": [torch.tensor(r, dtype=torch.int32) for r in rows], "numpy": np.array(rows), "numbers": rows,
        "tokens": Tokens(tuple(torch.tensor(r) for r in rows), ("p", "q")),
    }[form]  # fmt: skip
    tokens = as_tokens(Model(tokenizer()), given_as)
    assert lists(tokens) == rows
    assert all(ids.dtype == torch.long for ids in tokens)
    assert len(set(tokens.names)) == len(rows)


@given(st.data(), st.lists(st.integers(1, 8), min_size=1, max_size=5), st.booleans())
def test_unpadding_gives_back_the_texts(data, lengths, left):
    texts = [data.draw(st.lists(st.integers(0, 6), min_size=n, max_size=n)) for n in lengths]
    width = max(lengths) + data.draw(st.integers(0, 3))
    pad = [width - n for n in lengths]
    tokens = torch.tensor([[6] * p + t if left else t + [6] * p for p, t in zip(pad, texts, strict=True)])
    mask = torch.tensor([[0] * p + [1] * n if left else [1] * n + [0] * p for p, n in zip(pad, lengths, strict=True)])
    assert lists(as_tokens(Model(), tokens, mask)) == texts
    assert lists(as_tokens(Model(), tokens, mask.bool())) == texts


@pytest.mark.parametrize(
    ("tokens", "mask", "message"),
    [
        ([], None, "no prompts were given"),
        (torch.zeros(0, 5, dtype=torch.long), torch.zeros(0, 5), "no prompts were given"),
        (torch.zeros(0, dtype=torch.long), None, "prompt 0 is empty"),
        ([[1, 2], []], None, "prompt 1 is empty"),
        (torch.tensor([[1, 2]]), torch.zeros(1, 2), "prompt 0 is empty"),
        (torch.zeros(2, 13, dtype=torch.long), None, "prompt 0 has 13 tokens, the model's context 12: shorten it"),
        (torch.tensor([3, 7]), None, r"prompt 0 holds token id 7, the vocabulary 0\.\.6"),
        ([[3], [-1, 3]], None, r"prompt 1 holds token id -1, the vocabulary 0\.\.6"),
        (torch.tensor([0.5, 1.0]), None, r"shape \(2,\) and type torch.float32; integers of shape \[pos\]"),
        (torch.tensor([True, False]), None, "type torch.bool"),
        (torch.zeros(1, 2, 3, dtype=torch.long), None, r"tokens have shape \(1, 2, 3\)"),
        ([1, 2, 3], None, r"shape \(\)"),
        (5, None, "tokens of type int cannot be read"),
        (None, None, "tokens of type NoneType cannot be read"),
        (torch.tensor([[1, 2, 3]]), torch.tensor([[1, 0, 1]]), "attention_mask has holes"),
        (torch.tensor([[1, 2, 3]]), torch.ones(1, 2), r"attention_mask has shape \(1, 2\), tokens \(1, 3\)"),
        ([torch.tensor([1, 2])], torch.ones(1, 2), "attention_mask belongs to tokens of shape"),
        ("a b", None, "no tokenizer: pass token ids"),
    ],
)
def test_what_does_not_fit_is_refused(tokens, mask, message):
    with pytest.raises(InputError, match=message):
        as_tokens(Model(), tokens, mask)


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("", {}, "prompt 'p' is empty: give it some text"),
        (" \n", {}, "prompt 'p' is empty"),
        ("a " * 12, {}, "prompt 0 has 13 tokens, the model's context 12"),
        ("a", {"max_tokens": 0}, "max_tokens = 0.*at least 1"),
        ("a b c", {"max_tokens": -1}, "max_tokens = -1.*at least 1"),
    ],
)
def test_texts_that_do_not_fit_are_refused(text, options, message):
    with pytest.raises(InputError, match=message):
        PromptSet((Prompt("p", "text", text),)).tokens(Model(tokenizer()), **options)


def test_a_tokenizer_without_a_template_cannot_chat():
    with pytest.raises(InputError, match="no chat template: leave `chat` off"):
        load_prompts("maths", 1).tokens(Model(tokenizer(template=False)), chat=True)


@pytest.mark.parametrize("template", ["{{ messages[0]['content'] + 1 }}", "{{ nothing.there }}", "{% bad"])
def test_a_template_that_fails_is_named(template):
    """A template is a program that came with the model."""
    broken = tokenizer()
    broken.chat_template = template
    with pytest.raises(InputError, match="chat template of this tokenizer cannot be filled in .*leave `chat` off"):
        load_prompts("maths", 1).tokens(Model(broken), chat=True)


def test_hash_tells_token_sequences_apart():
    def hash_of(*rows):
        return Tokens(tuple(torch.tensor(r) for r in rows), tuple("abcd"[: len(rows)])).hash

    assert hash_of([1, 2, 3]) == hash_of([1, 2, 3])
    assert (
        len({hash_of([1, 2], [3]), hash_of([1], [2, 3]), hash_of([1, 2, 3]), hash_of([3], [1, 2]), hash_of([2, 1, 3])})
        == 5
    )


def test_half_a_character_in_a_name_is_refused_before_any_run():
    sc.adapt(lens())  # whose checks run the model
    with no_forward_pass(), pytest.raises(InputError, match=r"name holds half a character.*mend '\\ud800'"):
        sc.find_sinks(lens(), Tokens((prompt(),), ("\ud800",)), verbose=False)


def test_slices_keep_names_with_ids():
    tokens = as_tokens(Model(), [[1], [2, 3], [4]])
    assert lists(tokens[1:]) == [[2, 3], [4]]
    assert tokens[1:].names == ("prompt-1", "prompt-2")
    assert tokens[1].tolist() == [2, 3]


def test_bundled_prompts_are_there_in_every_kind():
    kinds = {"maths", "prose", "code", "lists", "dialogue"}
    everything = load_prompts()
    assert {p.kind for p in everything} == kinds
    assert len({p.id for p in everything}) == len(everything)
    for kind in kinds:
        own = load_prompts(kind)
        assert [p for p in everything if p.kind == kind] == list(own)
        assert all(len(p.text) > 50 for p in own)
    assert list(load_prompts("maths", 2)) == list(load_prompts("maths"))[:2]
    assert isinstance(load_prompts()[:2], PromptSet)


def test_files_of_ones_own(tmp_path):
    lines = tmp_path / "mine.jsonl"
    lines.write_text('{"problem": "1 + 1", "id": 7, "kind": "sums"}\n\n{"text": "für"}\n', "utf-8")
    assert list(load_prompts(lines)) == [Prompt("7", "sums", "1 + 1"), Prompt("line-3", "text", "für")]
    text = tmp_path / "essay.txt"
    text.write_text("one\ntwo", "utf-8")
    assert list(load_prompts(str(text))) == [Prompt("essay", "text", "one\ntwo")]


AIME = {"ID": "2024-I-1", "Problem": "How many?", "Solution": "Count.", "Answer": 204}
MATH = {
    "problem": "Find x.",
    "level": "Level 2",
    "type": "Algebra",
    "solution": "x = 3",
    "answer": "3",
    "unique_id": "test/algebra/7.json",
}
GSM8K = {"question": "Ann has 2 eggs.", "answer": "She has 2.\n#### 2"}
GENERATION = {  # as the published code writes them: all that the data set said, and what was made of it
    "id": 60, "problem": "How many?", "solution": "Count.", "answer": "204", "question": "How many?", "prompt": "Solve: How many?",
    "index": 0, "output": " It is 204.", "prefill_tokens": 5, "output_tokens": 4, "total_tokens": 9, "sample_idx": 0, "generation_idx": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("record", "prompt"),
    [
        (AIME, Prompt("2024-I-1", "text", "How many?", answer="204")),
        (MATH, Prompt("test/algebra/7.json", "text", "Find x.", answer="3")),
        (GSM8K, Prompt("line-2", "text", "Ann has 2 eggs.", answer="She has 2.\n#### 2")),
        (GENERATION, Prompt("60", "text", "Solve: How many?", " It is 204.", "204")),
        (GENERATION | {"generation_idx": 3}, Prompt("60/3", "text", "Solve: How many?", " It is 204.", "204")),
        ({"prompt": "a", "output": ""}, Prompt("line-2", "text", "a")),
        ({"prompt": "a", "answer": None}, Prompt("line-2", "text", "a")),
    ],
)  # fmt: skip
def test_the_studys_formats_are_told_by_their_keys(tmp_path, record, prompt):
    path = tmp_path / "data.jsonl"
    path.write_text("\n" + json.dumps(record), "utf-8")
    assert list(load_prompts(path)) == [prompt]


def test_an_id_does_not_depend_on_the_other_lines(tmp_path):
    lines = [json.dumps(GENERATION | {"generation_idx": i}) for i in range(3)]
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(lines), "utf-8")
    assert [p.id for p in load_prompts(path)] == ["60", "60/1", "60/2"]
    path.write_text(lines[2], "utf-8")
    assert [p.id for p in load_prompts(path)] == ["60/2"]


def test_an_output_stands_behind_its_prompt_as_one_text():
    given_as = PromptSet((Prompt("x", "text", "a b", " c a"), Prompt("y", "text", "a", "b")))
    model = Model(tokenizer())
    assert lists(given_as.tokens(model)) == [[0, 3, 4, 5, 3], [0, 6]], "ab is one word: both are cut as one text"
    assert lists(given_as[:1].tokens(model, chat=True)) == [[0, 1, 3, 4, 2, 5, 3]]
    assert given_as.prompt_lengths(model) == (3, 2)
    assert lists(given_as.tokens(model, max_tokens=4)) == [[0, 3, 4, 5], [0, 6]]


def test_bos_is_never_doubled():
    rendered = PromptSet((Prompt("x", "text", "<s> [user] a [/user]", " b"),))
    assert lists(rendered.tokens(Model(tokenizer()))) == [[0, 1, 3, 2, 4]]
    with pytest.raises(InputError, match="prompt 'x' begins with '<s>', a token of a chat template: leave `chat` off"):
        rendered.tokens(Model(tokenizer()), chat=True)


def test_positions_of_the_template_are_those_of_every_other_text():
    model = Model(tokenizer())
    given_as = PromptSet((Prompt("x", "text", "a b c", " a"), Prompt("y", "text", "[/user]", "")))
    assert lists(given_as.tokens(model, chat=True)) == [[0, 1, 3, 4, 5, 2, 3], [0, 1, 2, 2]]
    assert given_as.template_positions(model) == {"x": (0, 1, 5), "y": (0, 1, 3)}


def test_a_token_of_text_and_template_is_text():
    """Where the template goes on with a line break, tokenizers merge it with the text's last punctuation."""
    pieces = ["<s>", "<|user|>", "<|assistant|>", "\n", "?", "?\n", "Why", "so", " ", "<unk>"]
    merging = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="<unk>"))
    pattern = Regex(r"<\|user\|>|<\|assistant\|>|\?\n|\n|\?| |[^\s?<]+")
    merging.pre_tokenizer = pre_tokenizers.Split(pattern, "isolated")
    made = PreTrainedTokenizerFast(tokenizer_object=merging, unk_token="<unk>")
    made.chat_template = "<|user|>\n{{ messages[0]['content'] }}\n<|assistant|>"
    model = Model(made)
    model.cfg.d_vocab = len(pieces)
    for text, template in (("Why so?", (0, 1, 6)), ("Why so", (0, 1, 5, 6))):
        prompts = PromptSet((Prompt("x", "text", text),))
        ids = prompts.tokens(model, chat=True)[0].tolist()
        assert [pieces[i] for i in ids[2:5]] == ["Why", " ", "so"] and pieces[ids[5]] == (
            "?\n" if "?" in text else "\n"
        )
        assert prompts.template_positions(model)["x"] == template


@given(st.lists(st.sampled_from(["a", "b", "c", "[user]", "[/user]"]), min_size=1, max_size=6), st.booleans())
def test_without_the_template_the_text_is_left(words, answered):
    model = Model(tokenizer())
    prompts = PromptSet((Prompt("x", "text", " ".join(words), " c b" if answered else ""),))
    ids, template = prompts.tokens(model, chat=True)[0].tolist(), prompts.template_positions(model)["x"]
    plain = [WORDS.index(word) for word in words]
    assert [token for pos, token in enumerate(ids) if pos not in template] == plain + [5, 4] * answered


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{{ raise_exception('only for tools') }}",
            "the chat template of this tokenizer cannot be filled in.*only for tools",
        ),
        (
            "{{ messages[0]['content'] | length }} {{ messages[0]['content'] }}",
            "the chat template changes with the text",
        ),
    ],
)
def test_templates_that_do_not_serve_are_refused(template, message):
    made = tokenizer()
    made.chat_template = template
    with pytest.raises(InputError, match=message):
        PromptSet((Prompt("x", "text", "a b"),)).template_positions(Model(made))


def test_wording():
    given_as = PromptSet((Prompt("x", "text", "How {many}?", answer="2"),))
    assert given_as.worded("Solve: {question}\nThink. \\boxed{}")[0] == Prompt(
        "x", "text", "Solve: How {many}?\nThink. \\boxed{}", answer="2"
    )
    for wording in ("Solve.", "{question} {question}"):
        with pytest.raises(InputError, match="once is needed"):
            given_as.worded(wording)


@functools.cache
def bundled_tokenizer(name: str):
    from transformers import AutoTokenizer

    made = AutoTokenizer.from_pretrained(weights.fetch(name, verbose=False))
    model = Model(made)
    model.cfg = SimpleNamespace(n_ctx=2048, d_vocab=len(made))
    return model


QUESTION = PromptSet((Prompt("x", "maths", "What is 1 + 1?", " It is 2."),))


@pytest.mark.slow
def test_the_chat_of_smollm2():
    model = bundled_tokenizer("smollm2-135m")
    ids, template = QUESTION.tokens(model, chat=True)[0], QUESTION.template_positions(model)["x"]
    texts = token_texts(model, ids)
    assert texts[:3] == ["<|im_start|>", "system", "\n"], (
        "its template holds a system message; the tokenizer has no BOS"
    )
    assert "".join(texts[pos] for pos in range(len(ids)) if pos not in template) == "What is 1 + 1? It is 2."
    assert "".join(texts[pos] for pos in template).endswith("<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n")
    own = model.tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION[0].text}], add_generation_prompt=True
    )["input_ids"]
    assert ids[: len(own)].tolist() == list(own)
    assert token_texts(model, QUESTION.tokens(model)[0])[0] == "What"


@pytest.mark.slow
def test_the_chat_of_gemma():
    model = bundled_tokenizer("gemma-3-270m")
    with pytest.raises(InputError, match="no chat template"):
        QUESTION.tokens(model, chat=True)
    with pytest.raises(InputError, match="no chat template"):
        QUESTION.template_positions(model)
    assert token_texts(model, QUESTION.tokens(model)[0])[:2] == ["<bos>", "What"]
    instructed = copy.copy(model)  # the template of its sisters that are trained for it, in short
    instructed.tokenizer = copy.deepcopy(model.tokenizer)
    user, turn = "{{ bos_token }}<start_of_turn>user\n", "<end_of_turn>\n<start_of_turn>model{{ '\\n' }}"
    instructed.tokenizer.chat_template = user + "{{ messages[0]['content'] | trim }}" + turn
    texts = token_texts(model, QUESTION.tokens(instructed, chat=True)[0])
    assert texts[:4] == ["<bos>", "<start_of_turn>", "user", "\n"] and texts.count("<bos>") == 1
    assert QUESTION.template_positions(instructed)["x"] == (
        0,
        1,
        2,
        3,
        *(texts.index("<end_of_turn>") + i for i in range(5)),
    )
    rendered = PromptSet((Prompt("y", "text", "<bos><start_of_turn>user\nHello"),))
    assert token_texts(model, rendered.tokens(model)[0]).count("<bos>") == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            b'{"text": "x"}\n{"tex": "y", "n": 1}',
            r"a.jsonl, line 2: no text under its keys \(tex, n\): one of text, problem, question, prompt is needed; mend or remove",
        ),
        ("a.jsonl", b"{}", r"line 1: no text under its keys \(none\)"),
        (
            "a.jsonl",
            b'{"text": "x"}\n{"text": "y',
            "a.jsonl, line 2: not a whole JSON object .*mend or remove the line",
        ),
        ("a.jsonl", b'{"text": 5}', "a.jsonl, line 1: `text` is not a string but int"),
        ("a.jsonl", b'{"question": ["x"], "answer": "1"}', "line 1: `question` is not a string but list"),
        ("a.jsonl", b'{"prompt": "x", "output": null}', "line 1: `output` is not a string but NoneType"),
        (
            "a.jsonl",
            b'{"problem": "x", "output": "y"}',
            r"line 1: no text .*\(problem, output\): an `output` needs its `prompt`",
        ),
        ("a.jsonl", b"[1]", "a.jsonl, line 1: a list is not a JSON object"),
        ("a.jsonl", b'"text"', "a.jsonl, line 1: a str is not a JSON object"),
        ("a.jsonl", b"\n", "holds no prompts"),
        ("a.jsonl", b'{"text": "x", "id": 1}\n{"text": "y", "id": "1"}', r"two prompts share an id \('1'\)"),
        ("a.txt", b" ", "a.txt is empty"),
        ("a.txt", b"\xff\xfe\xff", "cannot be read as UTF-8"),
    ],
)
def test_broken_files_are_refused_with_their_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        load_prompts(tmp_path / name)


@pytest.mark.parametrize(
    ("source", "n", "message"),
    [
        ("poetry", None, "'poetry' is neither a kind of bundled prompt.*maths.*nor a file"),
        ("nowhere/a.jsonl", None, "prompt file nowhere/a.jsonl does not exist: check the path.*maths"),
        ("nofile.txt", None, "prompt file nofile.txt does not exist"),
        ("mine/essay", None, "prompt file mine/essay does not exist"),
        ("essay.md", None, "prompt file essay.md does not exist"),
        ("", None, "'' is neither a kind"),
        (".", None, r"prompt source \. is a folder: name a file in it"),
        ("maths", 0, "n = 0 prompts asked for: at least 1"),
    ],
)
def test_unknown_sources_are_refused(source, n, message):
    with pytest.raises(InputError, match=message):
        load_prompts(source, n)


TEXTS = st.text(st.characters(codec="utf-8"), min_size=1)


@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=5, unique_by=lambda p: p[1]))
def test_any_text_survives_a_file(tmp_path_factory, pairs):
    path = tmp_path_factory.mktemp("prompts") / "p.jsonl"
    path.write_text(
        "".join(json.dumps({"text": text, "id": name}, ensure_ascii=False) + "\n" for text, name in pairs), "utf-8"
    )
    assert [(p.text, p.id) for p in load_prompts(path)] == pairs


def test_token_texts():
    assert token_texts(Model(tokenizer()), torch.tensor([0, 3, 5])) == ["<s>", "a", "c"]
    assert token_texts(Model(), torch.tensor([0, 3])) == ["<0>", "<3>"]


def test_tokens_are_looked_up_by_name_and_shown_in_a_line():
    tokens = Tokens((torch.arange(5), torch.arange(3)), ("a", "b"))
    assert torch.equal(tokens["b"], torch.arange(3))
    assert repr(tokens) == "Tokens(2 prompts: a [5], b [3])"
    with pytest.raises(InputError, match="prompt 'c' is not here: there are a, b"):
        tokens["c"]
