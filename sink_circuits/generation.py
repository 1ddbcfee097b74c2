"""Generation: a model answers prompts itself, in the study's format, one JSON line `prompt`, `output` each.

Hugging Face's `generate` runs on a plain module around the model's own parameters (`twin.plain_module`), with a KV cache:
hooks on the TransformerLens object, its fast path and its checks are neither used nor touched.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor, nn
from tqdm.auto import tqdm

from sink_circuits import arguments
from sink_circuits.adapters import adapt
from sink_circuits.errors import InputError, ResultError
from sink_circuits.prompts import Prompt, PromptSet
from sink_circuits.results import Manifest, check_target, write_whole
from sink_circuits.statistics import seed_of
from sink_circuits.twin import TwinRefused, plain_module

LINES_AT_ONCE = 8
"""Answers that are written together: what an interruption by force can lose."""


COLDEST = 1e-4
"""The lowest temperature that logits can be divided by and stay finite in float32."""


@dataclass(frozen=True)
class Decoding:
    """How answers are generated. `temperature` 0 is greedy; above, tokens are drawn from the softmax of logits / temperature,
    restricted to the smallest set whose probability reaches `top_p`.

    `seed` is a name: each prompt's draws are seeded by it and the prompt's id, whatever was generated before. `chat`: the
    prompt stands in the chat template. Raises InputError for values out of range.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: str = "generate"
    chat: bool = False

    def __post_init__(self):
        checked = {
            "max_new_tokens": arguments.whole(self.max_new_tokens, "max_new_tokens", low=1),
            "temperature": arguments.number(self.temperature, "temperature", 0),
            "top_p": arguments.number(self.top_p, "top_p", 0, 1),
            "seed": arguments.instance(self.seed, "seed", str, "give a name"),
            "chat": arguments.flag(self.chat, "chat"),
        }
        if 0 < checked["temperature"] < COLDEST:
            raise InputError(f"temperature = {self.temperature}: 0, which is greedy, or at least {COLDEST}.")
        if not checked["top_p"] > 0:
            raise InputError(f"top_p = {self.top_p}: above 0, at most 1.")
        for name, value in checked.items():  # plain numbers, which a manifest can hold
            object.__setattr__(self, name, value)


def generate(
    model, prompts: PromptSet, path: str | Path | None = None, *, decoding: Decoding | None = None, overwrite: bool = False,
    verbose: bool = True,
) -> PromptSet:  # fmt: skip
    """The prompts with the model's own answers in `output`, which end before the end-of-text token or at the limit.

    With `path`, a JSON-lines file that `load_prompts` reads; `path` with ".manifest.json" beside it says how it was made.
    The file grows by `LINES_AT_ONCE` whole lines at a time, and the same call goes on where one was stopped; it may ask for
    more prompts then, for no other model or decoding. One prompt at a time, so that no answer depends on another.

    Raises InputError for prompts that hold an output already, that leave no room for an answer in the model's context, or
    for a model that Hugging Face cannot run; ResultError when `path` holds something else (unless `overwrite`).
    """
    decoding = (
        Decoding()
        if decoding is None
        else arguments.instance(decoding, "decoding", Decoding, "make it with Decoding()")
    )
    arguments.instance(prompts, "prompts", PromptSet, "make them with load_prompts() or PromptSet((Prompt(...), ...))")
    path = None if path is None else arguments.path(path)
    arguments.flag(overwrite, "overwrite")
    arguments.flag(verbose, "verbose")
    if answered := [prompt.id for prompt in prompts if prompt.output]:
        raise InputError(f"prompt {answered[0]!r} has an output already: generate from prompts without one.")
    adapter = adapt(model)
    tokens = prompts.tokens(model, chat=decoding.chat)
    for prompt, ids in zip(prompts, tokens, strict=True):
        if len(ids) + decoding.max_new_tokens > adapter.n_ctx:
            raise InputError(
                f"prompt {prompt.id!r} has {len(ids)} tokens, which with max_new_tokens = {decoding.max_new_tokens} are more than the "
                f"model's context of {adapter.n_ctx}: ask for fewer."
            )
    settings = dataclasses.asdict(decoding)
    manifest = Manifest.of(adapter, tokens, what="generate", path="hugging face", **settings)
    book = None if path is None else _Book.open(Path(path), manifest, overwrite=overwrite)
    done = {} if book is None else book.answers_to(prompts)
    todo = [(prompt, ids) for prompt, ids in zip(prompts, tokens, strict=True) if prompt.id not in done]
    if todo:
        plain = _plain(model, adapter)
        stops = stop_ids(model)
        fresh: list[Prompt] = []
        try:
            for prompt, ids in tqdm(todo, desc="generating", unit="prompt", disable=not verbose):
                new = continuation(plain, ids, decoding, stops, seed_of("generate", decoding.seed, prompt.id))
                fresh.append(replace(prompt, output=_text_behind(model.tokenizer, ids, new)))
                done[prompt.id] = fresh[-1].output
                if book is not None and len(fresh) == LINES_AT_ONCE:
                    book, fresh = book.extended(fresh), []
        finally:  # also when interrupted: what is finished is kept
            if book is not None and fresh:
                book.extended(fresh)
    return PromptSet(tuple(replace(prompt, output=done[prompt.id]) for prompt in prompts))


def _plain(model, adapter) -> nn.Module:
    if adapter.backend != "bridge":
        raise InputError(
            "a HookedTransformer has no Hugging Face model to generate with: load it as a TransformerBridge."
        )
    if adapter.processed:
        raise InputError(
            f"this model's weights were processed ({', '.join(adapter.processed)}), and Hugging Face would run them wrongly: load it "
            "without folding and centring."
        )
    reasons = []
    for implementation in ("sdpa", "eager"):
        try:
            return plain_module(model, implementation)
        except TwinRefused as reason:
            reasons.append(str(reason))
    raise InputError(f"this model cannot be run by Hugging Face ({reasons[-1]}): generate its answers elsewhere.")


def stop_ids(model) -> list[int]:
    """Ids that end an answer, by the model's configuration, its generation configuration and its tokenizer."""
    original = model.original_model
    places = (original.config, getattr(original, "generation_config", None), model.tokenizer)
    given = [getattr(place, "eos_token_id", None) for place in places]
    ids = [one for value in given for one in (value if isinstance(value, list | tuple) else [value])]
    return sorted({int(one) for one in ids if one is not None})


@torch.no_grad()
def continuation(
    plain: nn.Module, ids: Int[Tensor, " pos"], decoding: Decoding, stops: list[int], seed: int
) -> Int[Tensor, " new"]:
    """The tokens that follow `ids`, without the one that stops. The process' random state is as it was before."""
    from transformers import GenerationConfig

    sampling = {
        "do_sample": True,
        "temperature": float(decoding.temperature),
        "top_p": float(decoding.top_p),
        "top_k": 0,
    }
    config = GenerationConfig(
        max_new_tokens=decoding.max_new_tokens, use_cache=True, eos_token_id=stops or None, pad_token_id=stops[0] if stops else 0,
        **(sampling if decoding.temperature else {"do_sample": False}),
    )  # fmt: skip
    # What the module came with (a temperature, a penalty) would fill in whatever this one leaves open.
    plain.generation_config = config
    devices = [ids.device] if ids.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed % 2**63)
        out = plain.generate(ids[None], attention_mask=torch.ones_like(ids)[None], generation_config=config)[0]
    new = out[len(ids) :]
    return new[:-1] if len(new) and int(new[-1]) in stops else new


def _text_behind(tokenizer, ids: Tensor, new: Tensor) -> str:
    """What the new tokens add to the text: some tokenizers drop a leading space when they decode a piece by itself."""
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    before = tokenizer.decode(ids.tolist(), **options)
    whole = tokenizer.decode([*ids.tolist(), *new.tolist()], **options)
    return whole[len(before) :] if whole.startswith(before) else tokenizer.decode(new.tolist(), **options)


@dataclass(frozen=True)
class _Book:
    """A file of answers: the lines that it holds, and what they were made with."""

    path: Path
    manifest: Manifest
    lines: tuple[Mapping, ...]

    @staticmethod
    def open(path: Path, manifest: Manifest, *, overwrite: bool) -> _Book:
        """The file as it is, if the same model and decoding made it; raises ResultError otherwise."""
        check_target(path, overwrite=True)
        beside = manifest_path(path)
        if overwrite or not (path.exists() or beside.exists()):
            return _Book(path, manifest, ())
        try:
            made = Manifest.from_dict(json.loads(beside.read_text("utf-8")))
            text = path.read_text("utf-8") if path.exists() else ""
            lines = tuple(json.loads(line) for line in text.split("\n") if line.strip())
            wrong = [line for line in lines if not {"id", "prompt", "output"} <= set(line)]
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise ResultError(
                f"{path} exists and cannot be gone on with ({error}): choose another name, or pass overwrite=True."
            ) from error
        if wrong:
            raise ResultError(
                f"{path} holds a line without id, prompt or output: choose another name, or pass overwrite=True."
            )
        for name in ("model", "weights", "dtype", "device", "settings"):  # each device draws in its own way
            before, now = getattr(made, name), getattr(manifest, name)
            if before not in (now, ""):  # earlier versions noted no device
                raise ResultError(
                    f"{path} was made with {name} {before}, not {now}: choose another name, or pass overwrite=True."
                )
        return _Book(path, manifest, lines)

    def answers_to(self, prompts: Iterable[Prompt]) -> dict[str, str]:
        """Outputs by id. Raises ResultError where an id stands for another prompt."""
        held = {str(line["id"]): line for line in self.lines}
        for prompt in prompts:
            if prompt.id in held and held[prompt.id]["prompt"] != prompt.text:
                raise ResultError(
                    f"{self.path} answers another prompt under the id {prompt.id!r}: choose another name, or pass overwrite=True."
                )
        return {prompt.id: held[prompt.id]["output"] for prompt in prompts if prompt.id in held}

    def extended(self, answered: Iterable[Prompt]) -> _Book:
        """The file with these behind the others, written whole; the manifest first, so that no answer is without one."""
        lines = (*self.lines, *map(_line, answered))
        note = json.dumps(self.manifest.to_dict(), indent=1)
        write_whole(manifest_path(self.path), lambda temporary: temporary.write_text(note, "utf-8"), overwrite=True)
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_whole(self.path, lambda temporary: temporary.write_text(text, "utf-8"), overwrite=True)
        return replace(self, lines=lines)


def _line(prompt: Prompt) -> dict:
    answer = {"answer": prompt.answer} if prompt.answer else {}
    return {"id": prompt.id, "kind": prompt.kind, "prompt": prompt.text, "output": prompt.output, **answer}


def manifest_path(path: Path) -> Path:
    """Where the manifest of a file of answers stands."""
    return path.with_name(f"{path.name}.manifest.json")
