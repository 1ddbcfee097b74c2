"""Prompts: texts with ids and kinds, and the token ids that everything else works on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from sink_circuits.errors import InputError


@dataclass(frozen=True)
class Prompt:
    """One text, with its id and kind ("maths", "prose", ...)."""

    id: str
    kind: str
    text: str


@dataclass(frozen=True)
class Tokens(Sequence):
    """Token ids of several prompts, each of its own length, never padded: position 0 is a prompt's first own token.

    `ids[i]`: LongTensor [pos]. `names[i]`: the prompt's id.
    """

    ids: tuple[Int[Tensor, " pos"], ...]
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index):
        """`tokens[i]` and `tokens["maths-001"]` are LongTensor [pos]; a slice is again `Tokens`."""
        if isinstance(index, str):
            if index not in self.names:
                raise InputError(f"prompt {index!r} is not here: there are {', '.join(map(str, self.names[:8]))}.")
            return self.ids[self.names.index(index)]
        if isinstance(index, slice):
            return Tokens(self.ids[index], self.names[index])
        return self.ids[index]

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.ids)

    def __repr__(self) -> str:
        shown = ", ".join(f"{name} [{len(ids)}]" for name, ids in list(zip(self.names, self.ids, strict=True))[:8])
        return f"Tokens({len(self)} prompts: {shown}{', ...' if len(self) > 8 else ''})"

    @property
    def hash(self) -> str:
        """SHA-256 over all ids and lengths, first 16 hex digits: says whether two results were made from one input."""
        digest = hashlib.sha256()
        for ids in self.ids:
            digest.update(len(ids).to_bytes(8, "little") + ids.cpu().to(torch.int64).numpy().tobytes())
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class PromptSet(Sequence):
    """Texts in order; `tokens(model)` turns them into ids with the model's own tokenizer."""

    prompts: tuple[Prompt, ...]

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index):
        return PromptSet(self.prompts[index]) if isinstance(index, slice) else self.prompts[index]

    def tokens(self, model, *, max_tokens: int | None = None, chat: bool = False) -> Tokens:
        """Token ids as the tokenizer itself gives them (its own BOS, none added), at most `max_tokens` of each.

        `chat`: wrap each text as a user's message in the tokenizer's chat template. Raises InputError for a model
        without a tokenizer, a tokenizer without a template, an empty prompt, or one longer than the context.
        """
        tokenizer = getattr(model, "tokenizer", None)
        if tokenizer is None:
            raise InputError("this model has no tokenizer: pass token ids (LongTensor [pos]) instead of texts.")
        if max_tokens is not None and max_tokens < 1:
            raise InputError(f"max_tokens = {max_tokens}: at least 1.")
        ids = []
        for prompt in self.prompts:
            if not prompt.text.strip():
                raise InputError(f"prompt {prompt.id!r} is empty: give it some text.")
            ids.append(torch.tensor(_encode(tokenizer, prompt.text, chat)[:max_tokens]))
        return as_tokens(model, Tokens(tuple(ids), tuple(p.id for p in self.prompts)))


def _encode(tokenizer, text: str, chat: bool) -> list[int]:
    if not chat:
        return list(tokenizer(text)["input_ids"])
    if not getattr(tokenizer, "chat_template", None):
        raise InputError("this tokenizer has no chat template: leave `chat` off.")
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
    )
    return list(tokenizer(rendered, add_special_tokens=False)["input_ids"])


def load_prompts(source: str | Path = "all", n: int | None = None) -> PromptSet:
    """The bundled prompts of one kind ("maths", "prose", "code", "lists", "dialogue"), "all", or a file of one's own.

    A file is JSON lines with a `text` (or `problem`, `question`, `prompt`) and optional `id` and `kind`, or plain text
    (one prompt). Raises InputError for an unknown kind, a file that is missing, or a line that cannot be read.
    """
    if n is not None and n < 1:
        raise InputError(f"n = {n} prompts asked for: at least 1.")
    path = Path(source)
    if os.path.exists(path) and not os.path.isdir(path):
        return PromptSet(tuple(_read_file(path)[:n]))
    bundled = _parse_lines(files("sink_circuits").joinpath("data/prompts.jsonl").read_text("utf-8"), "bundled prompts")
    prompts = [p for p in bundled if source in ("all", p.kind)]
    if not prompts:
        kinds = ", ".join([*sorted({p.kind for p in bundled}), "all"])
        if str(source) and os.path.isdir(path):
            raise InputError(f"prompt source {path} is a folder: name a file in it, or a bundled kind ({kinds}).")
        if path.suffix or len(path.parts) > 1:  # no kind looks like that: a file was meant
            raise InputError(f"prompt file {path} does not exist: check the path, or name a bundled kind ({kinds}).")
        raise InputError(f"{str(source)!r} is neither a kind of bundled prompt ({kinds}) nor a file: give one of them.")
    return PromptSet(tuple(prompts[:n]))


def _read_file(path: Path) -> list[Prompt]:
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"prompt file {path} cannot be read as UTF-8 text ({error}): check path and encoding."
        ) from error
    if path.suffix == ".txt":
        if not text.strip():
            raise InputError(f"prompt file {path} is empty: give it some text.")
        return [Prompt(path.stem, "text", text)]
    return _parse_lines(text, str(path))


def _parse_lines(text: str, where: str) -> list[Prompt]:
    prompts: list[Prompt] = []
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines(): texts may hold U+2028 and its like
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            body = next(record[key] for key in ("text", "problem", "question", "prompt") if key in record)
            if not isinstance(body, str):
                raise TypeError("the text is not a string")
        except (ValueError, StopIteration, TypeError, AttributeError) as error:
            raise InputError(
                f"{where}, line {number}: not a JSON object with a `text` ({str(error) or 'no text'}); mend or remove the line."
            ) from error
        prompts.append(Prompt(str(record.get("id", f"line-{number}")), str(record.get("kind", "text")), body))
    if not prompts:
        raise InputError(f"{where} holds no prompts: give at least one line.")
    if len({p.id for p in prompts}) < len(prompts):
        raise InputError(f"{where}: two prompts share an id; give each its own.")
    return prompts


def as_tokens(model, tokens, attention_mask: Int[Tensor, "batch pos"] | None = None) -> Tokens:
    """Whatever a researcher has, as `Tokens` on the model's device, checked before any long work.

    `tokens`: `Tokens`, a PromptSet, one text or several, LongTensor [pos] or [batch, pos] (with `attention_mask` where
    padded, on either side), or a list of LongTensors [pos]. Raises InputError naming what is wrong.
    """
    names: tuple[str, ...] | None = None
    attention_mask = None if attention_mask is None else torch.as_tensor(attention_mask)
    if isinstance(tokens, str):
        tokens = PromptSet((Prompt("text", "text", tokens),))
    if (
        isinstance(tokens, Sequence)
        and not isinstance(tokens, Tokens | PromptSet)
        and tokens
        and isinstance(tokens[0], str)
    ):
        tokens = PromptSet(tuple(Prompt(f"text-{i}", "text", t) for i, t in enumerate(tokens)))
    if attention_mask is not None and not isinstance(tokens, Tensor):
        raise InputError(
            "attention_mask belongs to tokens of shape [batch, pos]: leave it out, texts and lists are not padded."
        )
    if isinstance(tokens, PromptSet):
        return tokens.tokens(model)
    if isinstance(tokens, Tokens):
        rows, names = list(tokens.ids), tokens.names
    elif isinstance(tokens, Tensor):
        rows = _unpadded(tokens, attention_mask)
    else:
        try:
            rows = [torch.as_tensor(row) for row in tokens]
        except (TypeError, ValueError) as error:
            raise InputError(
                f"tokens of type {type(tokens).__name__} cannot be read: pass LongTensor [pos] or a list of them."
            ) from error
    if not rows:
        raise InputError("no prompts were given: pass at least one.")
    cfg, device = model.cfg, next(model.parameters()).device
    checked = []
    for index, row in enumerate(rows):
        if row.ndim == 1 and len(row) == 0:
            raise InputError(f"prompt {index} is empty: give it at least one token.")
        if row.ndim != 1 or row.is_floating_point() or row.dtype == torch.bool:
            raise InputError(
                f"prompt {index}: tokens have shape {tuple(row.shape)} and type {row.dtype}; integers of shape [pos] are needed."
            )
        if len(row) > cfg.n_ctx:
            raise InputError(
                f"prompt {index} has {len(row)} tokens, the model's context {cfg.n_ctx}: shorten it (max_tokens=)."
            )
        if row.min() < 0 or row.max() >= cfg.d_vocab:
            wrong = int(row.max() if row.max() >= cfg.d_vocab else row.min())
            raise InputError(f"prompt {index} holds token id {wrong}, the vocabulary 0..{cfg.d_vocab - 1}.")
        checked.append(row.to(device=device, dtype=torch.long))
    return Tokens(tuple(checked), names or tuple(f"prompt-{i}" for i in range(len(checked))))


def _unpadded(tokens: Tensor, attention_mask: Tensor | None) -> list[Tensor]:
    if tokens.ndim == 1:
        tokens = tokens[None]
    if tokens.ndim != 2:
        raise InputError(f"tokens have shape {tuple(tokens.shape)}: [pos] or [batch, pos] is needed.")
    if attention_mask is None:
        return list(tokens)
    if attention_mask.shape != tokens.shape:
        raise InputError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, tokens {tuple(tokens.shape)}: they must agree."
        )
    mask = attention_mask.bool()
    if ((mask[:, 1:] != mask[:, :-1]).sum(-1) > 1).any():
        raise InputError("attention_mask has holes: only padding on the left or on the right is supported.")
    return [row[keep] for row, keep in zip(tokens, mask, strict=True)]


def token_texts(model, ids: Int[Tensor, " pos"]) -> list[str]:
    """Each token as text, for display; without a tokenizer `<id>`."""
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        return [f"<{int(i)}>" for i in ids]
    return [tokenizer.decode([int(i)], clean_up_tokenization_spaces=False) for i in ids]
