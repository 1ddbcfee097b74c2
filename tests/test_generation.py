"""Answers are those of an eager Hugging Face model without a cache, token by token; files of them grow by whole lines."""

import copy
import functools
import json

import pytest
import test_architectures as architectures
import torch
from common import lens, real
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import sink_circuits as sc
from sink_circuits import generation
from sink_circuits.adapters import adapt
from sink_circuits.errors import InputError, ResultError
from sink_circuits.generation import Decoding, generate
from sink_circuits.prompts import Prompt, PromptSet, load_prompts

torch.set_num_threads(1)
QUIET = {"verbose": False}


def words(n: int = 128, vocabulary: dict | None = None) -> PreTrainedTokenizerFast:
    """One token per word: w0, w1, ...; text and ids are the same thing."""
    made = Tokenizer(models.WordLevel(vocabulary or {f"w{i}": i for i in range(n)}, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="w0")
    tokenizer.chat_template = "w7 {{ messages[0]['content'] }} w8"
    return tokenizer


@functools.cache
def load(name: str):
    return sc.load_model(architectures.build(name)[0], tokenizer=words())


PROMPTS = PromptSet(
    (Prompt("a", "maths", "w5 w17 w40 w3", answer="204"), Prompt("b", "maths", "w9 w11"), Prompt("c", "t", "w90"))
)


def greedy(name: str, ids: list[int], n: int, stops=(2,)) -> list[int]:
    """The largest logit each time, of the whole text anew, with eager attention."""
    plain, _, _ = architectures.build(name, attn_implementation="eager")
    ids, start = list(ids), len(ids)
    with torch.no_grad():
        for _ in range(n):
            ids.append(int(plain(torch.tensor(ids)[None], use_cache=False).logits[0, -1].argmax()))
            if ids[-1] in stops:
                return ids[start:-1]
    return ids[start:]


def numbers(text: str) -> list[int]:
    return [int(word[1:]) for word in text.split()]


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "gpt_neox", "gptj", "falcon", "qwen3_moe", "gpt_oss"])
def test_greedy_answers_are_those_of_eager_hugging_face(name):
    model = load(name)
    stops = generation.stop_ids(model)
    for prompt in generate(model, PROMPTS[:2], decoding=Decoding(30), **QUIET):
        assert numbers(prompt.output) == greedy(name, numbers(prompt.text), 30, stops)
        tokens = PromptSet((prompt,)).tokens(model)
        assert tokens[0].tolist() == numbers(prompt.text) + numbers(prompt.output)


def test_the_model_is_left_as_it_was():
    model = load("llama")
    tokens = PROMPTS.tokens(model)[0]
    adapter, before = adapt(model), sc.run_clean(model, tokens)
    names = {name: len(point.fwd_hooks) for name, point in model.hook_dict.items()}
    state = torch.random.get_rng_state()
    config = copy.deepcopy(model.original_model.generation_config)
    generate(model, PROMPTS, decoding=Decoding(4, temperature=1.0), **QUIET)
    assert adapt(model) is adapter and adapter.twin is not None
    assert {name: len(point.fwd_hooks) for name, point in model.hook_dict.items()} == names
    assert torch.equal(torch.random.get_rng_state(), state), "the process' random state moved"
    assert model.original_model.generation_config == config
    assert model.original_model.config._attn_implementation == "eager"
    after = sc.run_clean(model, tokens)
    assert torch.equal(torch.stack(list(before.contribution)), torch.stack(list(after.contribution)))


def test_a_stop_token_ends_an_answer_and_is_no_part_of_it(monkeypatch):
    model, ids = load("llama"), numbers(PROMPTS[0].text)
    whole = greedy("llama", ids, 12, stops=())
    stop = whole[5]
    monkeypatch.setattr(model.original_model.config, "eos_token_id", [stop, 2])
    assert generation.stop_ids(model)[-1:] == [max(stop, 2)]
    (answered,) = generate(model, PROMPTS[:1], decoding=Decoding(12), **QUIET)
    assert numbers(answered.output) == whole[: whole.index(stop)]


def test_sampling_is_seeded_by_name_and_prompt():
    model, hot = load("llama"), Decoding(12, temperature=1.5, top_p=0.9)
    first = generate(model, PROMPTS, decoding=hot, **QUIET)
    again = generate(model, PROMPTS[1:], decoding=hot, **QUIET)
    assert list(again) == list(first[1:]), "an answer depends on what was generated before it"
    other = generate(model, PROMPTS, decoding=Decoding(12, temperature=1.5, top_p=0.9, seed="again"), **QUIET)
    assert all(a.output != b.output for a, b in zip(first, other, strict=True))
    nearly_greedy = generate(model, PROMPTS[:1], decoding=Decoding(12, temperature=1.5, top_p=1e-6), **QUIET)
    assert numbers(nearly_greedy[0].output) == greedy("llama", numbers(PROMPTS[0].text), 12)


def test_chat_answers_stand_behind_the_template():
    (answered,) = generate(load("llama"), PROMPTS[:1], decoding=Decoding(6, chat=True), **QUIET)
    ids = [7, *numbers(PROMPTS[0].text), 8]
    assert numbers(answered.output) == greedy("llama", ids, 6)
    tokens = PromptSet((answered,)).tokens(load("llama"), chat=True)
    assert tokens[0].tolist() == ids + numbers(answered.output)


def many(n: int) -> PromptSet:
    return PromptSet(tuple(Prompt(f"p{i}", "t", f"w{3 + i} w{50 - i}") for i in range(n)))


def test_a_stopped_run_goes_on(tmp_path, monkeypatch):
    path, model, decoding = tmp_path / "out" / "answers.jsonl", load("llama"), Decoding(3)
    whole = generate(model, many(11), decoding=decoding, **QUIET)
    made, real_continuation = [], generation.continuation

    def interrupted(plain, ids, *rest):
        if len(made) == 10:
            raise KeyboardInterrupt
        made.append(ids)
        return real_continuation(plain, ids, *rest)

    monkeypatch.setattr(generation, "continuation", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate(model, many(11), path, decoding=decoding, **QUIET)
    assert list(load_prompts(path)) == list(whole)[:10], "finished answers were lost"
    made.clear()
    assert list(generate(model, many(11), path, decoding=decoding, **QUIET)) == list(whole)
    assert len(made) == 1, "answers that were there were made again"
    assert list(load_prompts(path)) == list(whole)
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    assert lines[0] == {"id": "p0", "kind": "t", "prompt": "w3 w50", "output": whole[0].output}
    made.clear()
    assert list(generate(model, many(11)[2:5], path, decoding=decoding, **QUIET)) == list(whole)[2:5]
    assert not made and len(load_prompts(path)) == 11
    assert sorted(p.name for p in path.parent.iterdir()) == ["answers.jsonl", "answers.jsonl.manifest.json"]


def test_a_file_of_something_else_is_left_alone(tmp_path):
    model, path = load("llama"), tmp_path / "answers.jsonl"
    path.write_text('{"prompt": "mine", "output": "mine"}\n')
    with pytest.raises(ResultError, match=r"answers\.jsonl exists and cannot be gone on with"):
        generate(model, PROMPTS, path, decoding=Decoding(2), **QUIET)
    assert path.read_text() == '{"prompt": "mine", "output": "mine"}\n'
    first = generate(model, PROMPTS, path, decoding=Decoding(2), overwrite=True, **QUIET)
    assert list(load_prompts(path)) == list(first)
    for changed, message in (
        ({"decoding": Decoding(3)}, "was made with settings .*'max_new_tokens': 2.*not .*'max_new_tokens': 3"),
        ({"model": load("gpt2"), "decoding": Decoding(2)}, "was made with (model|weights)"),
        ({"prompts": PromptSet((Prompt("a", "t", "w1"),)), "decoding": Decoding(2)}, "another prompt under the id 'a'"),
    ):
        with pytest.raises(ResultError, match=message):
            generate(changed.pop("model", model), changed.pop("prompts", PROMPTS), path, **changed, **QUIET)
    path.write_text('{"id": "a"}\n')
    with pytest.raises(ResultError, match="a line without id, prompt or output"):
        generate(model, PROMPTS, path, decoding=Decoding(2), **QUIET)
    with pytest.raises(ResultError, match="is a folder"):
        generate(model, PROMPTS, tmp_path, decoding=Decoding(2), **QUIET)


def test_answers_of_another_device_are_not_gone_on_with(tmp_path):
    """Each device draws in its own way; a file whose version noted none is gone on with."""
    model, path = load("llama"), tmp_path / "answers.jsonl"
    generate(model, PROMPTS, path, decoding=Decoding(2), **QUIET)
    beside = generation.manifest_path(path)
    made = json.loads(beside.read_text())
    assert made["device"] == "cpu"
    beside.write_text(json.dumps(made | {"device": "cuda: NVIDIA H100"}))
    with pytest.raises(ResultError, match="was made with device cuda: NVIDIA H100, not cpu"):
        generate(model, PROMPTS, path, decoding=Decoding(2), **QUIET)
    beside.write_text(json.dumps(made | {"device": ""}))
    assert list(generate(model, PROMPTS, path, decoding=Decoding(2), **QUIET)) == list(load_prompts(path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens = 0: at least 1"),
        ({"max_new_tokens": 2.0}, "max_new_tokens = 2.0"),
        ({"temperature": -1}, "temperature = -1"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"temperature": 1e-40}, "temperature = 1e-40: 0, which is greedy, or at least 0.0001"),
        ({"top_p": 0}, "top_p = 0: above 0, at most 1"),
    ],
)
def test_decodings_that_are_none_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        Decoding(**options)


def test_what_cannot_be_answered_is_refused():
    with pytest.raises(
        InputError,
        match="prompt 'a' has 4 tokens, which with max_new_tokens = 253 are more than the model's context of 256",
    ):
        generate(load("llama"), PROMPTS, decoding=Decoding(253), **QUIET)
    with pytest.raises(InputError, match="prompt 'x' has an output already"):
        generate(load("llama"), PromptSet((Prompt("x", "t", "w1", "w2"),)), **QUIET)
    with pytest.raises(InputError, match="no tokenizer"):
        generate(lens(), PROMPTS, **QUIET)


def test_weights_that_were_processed_are_not_run():
    model = sc.load_model(architectures.build("llama")[0], tokenizer=words())
    model.enable_compatibility_mode(disable_warnings=True)
    with pytest.raises(InputError, match="weights were processed.*without folding"):
        generate(model, PROMPTS, decoding=Decoding(2), **QUIET)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2-135m", "gemma-3-270m"])
def test_a_bundled_model_answers_as_plain_hugging_face_does(name):
    model, plain, _ = real(name)
    prompts = PromptSet((Prompt("a", "maths", "Question: What is 12 + 30? Answer:"),))
    (answered,) = generate(model, prompts, decoding=Decoding(12), **QUIET)
    ids = model.tokenizer(prompts[0].text, return_tensors="pt")["input_ids"][0].tolist()
    start, stops = len(ids), generation.stop_ids(model)
    with torch.no_grad():
        while len(ids) < start + 12 and not (ids[start:] and ids[-1] in stops):
            ids.append(int(plain(torch.tensor(ids)[None], use_cache=False).logits[0, -1].argmax()))
    assert answered.output.strip() == model.tokenizer.decode(ids[start:], skip_special_tokens=True).strip()
    assert PromptSet((answered,)).tokens(model)[0].tolist()[:start] == ids[:start]
