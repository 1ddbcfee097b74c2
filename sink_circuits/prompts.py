"""Prompts: texts with ids and kinds, and the token ids that everything else works on."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from sink_circuits import arguments
from sink_circuits.arguments import MOST, shown
from sink_circuits.errors import InputError
from sink_circuits.text_files import has_surrogate, parse_json, read_text


@dataclass(frozen=True)
class Prompt:
    """One text, with its id and kind ("maths", "prose", ...).

    `output`: what a model wrote after it, which `tokens` puts behind it. `answer`: the right answer where a data set
    gives one; no model is ever shown it.
    """

    id: str
    kind: str
    text: str
    output: str = ""
    answer: str = ""

    def __post_init__(self):
        for name in self.__dataclass_fields__:
            value = arguments.instance(getattr(self, name), f"a prompt's {name}", str, "give a string")
            if has_surrogate(value):
                raise InputError(f"a prompt's {name} holds half a character (a surrogate): mend {shown(value)}.")


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

        A prompt's `output` stands directly behind its text, or behind the whole template, and both are cut into tokens
        as one text (Wong et al., 2512.22213). `chat`: wrap each text as a user's message in the tokenizer's chat
        template, which then says whether there is a BOS: none is added to it. A text that begins with the BOS token's
        own text, as a rendered chat may, gets no second one. Raises InputError for a model without a tokenizer, a
        tokenizer without a template, a text that holds a template already, an empty prompt, or one longer than the context.
        """
        tokenizer = _tokenizer_of(model)
        max_tokens = None if max_tokens is None else arguments.whole(max_tokens, "max_tokens", low=1)
        arguments.flag(chat, "chat")
        ids = []
        for prompt in self.prompts:
            arguments.instance(prompt, "a prompt", Prompt, "make it with load_prompts() or Prompt(id, kind, text)")
            if not prompt.text.strip():
                raise InputError(f"prompt {prompt.id!r} is empty: give it some text.")
            ids.append(torch.tensor(_encode(tokenizer, prompt, chat)[:max_tokens]))
        return as_tokens(model, Tokens(tuple(ids), tuple(p.id for p in self.prompts)))

    def template_positions(self, model) -> dict[str, tuple[int, ...]]:
        """By prompt id, the positions that the chat template put around the text, in `tokens(model, chat=True)`.

        They are the same tokens in every prompt: that one of them is a sink says nothing of the text. Where one token
        holds both template and text it counts as text. Raises InputError as `tokens` does, and where the template changes
        with the text.
        """
        tokenizer = _tokenizer_of(model)
        found = {}
        for prompt in self.prompts:
            ids = _encode(tokenizer, prompt, chat=True)
            header, text, footer = _framed(tokenizer, prompt.text)
            parts = (header, header + text, header + text + footer)
            known = [_plain_ids(tokenizer, part) for part in parts]
            ends = [_n_shared(part, ids) for part in known]
            begin = ends[1]
            if begin < len(known[1]):  # the text's end and the template's next token became one: it counts as text
                behind = _n_shared(_plain_ids(tokenizer, footer)[::-1], ids[: ends[2]][::-1])
                begin = max(begin, ends[2] - behind)
            found[prompt.id] = (*range(ends[0]), *range(begin, ends[2]))
        return found

    def prompt_lengths(self, model) -> tuple[int, ...]:
        """Tokens of each text by itself, without template or output: `prompt_len` of the published records."""
        tokenizer = _tokenizer_of(model)
        return tuple(len(tokenizer(prompt.text)["input_ids"]) for prompt in self.prompts)

    def worded(self, wording: str) -> PromptSet:
        """Every text put in the place of `{question}` in `wording`. Raises InputError where it has no such place, or is not one."""
        arguments.text(wording, "wording")
        if wording.count("{question}") != 1:
            raise InputError(
                f"wording {wording[:60]!r} holds `{{question}}` {wording.count('{question}')} times: once is needed."
            )
        return PromptSet(tuple(replace(p, text=wording.replace("{question}", p.text)) for p in self.prompts))


def _tokenizer_of(model):
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise InputError("this model has no tokenizer: pass token ids (LongTensor [pos]) instead of texts.")
    return tokenizer


def _plain_ids(tokenizer, text: str) -> list[int]:
    """Ids of a text as it stands, with no special token added."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []


def _encode(tokenizer, prompt: Prompt, chat: bool) -> list[int]:
    if not chat:
        text = prompt.text + prompt.output
        bos = tokenizer.bos_token
        return _plain_ids(tokenizer, text) if bos and text.startswith(bos) else list(tokenizer(text)["input_ids"])
    rendered = _rendered(tokenizer, prompt.text)
    marks = [mark for mark in tokenizer.all_special_tokens if mark]
    if prompt.text.lstrip().startswith(tuple(marks)):
        raise InputError(
            f"prompt {prompt.id!r} begins with {next(m for m in marks if prompt.text.lstrip().startswith(m))!r}, a token of a chat "
            "template: leave `chat` off for texts that hold one already."
        )
    return _plain_ids(tokenizer, rendered + prompt.output)


def _rendered(tokenizer, text: str) -> str:
    """The text as a user's message, up to where the model's own turn begins."""
    if not getattr(tokenizer, "chat_template", None):
        raise InputError("this tokenizer has no chat template: leave `chat` off.")
    try:
        return tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # a template is a program of the model's: it may raise anything
        raise InputError(
            f"the chat template of this tokenizer cannot be filled in ({error}): leave `chat` off."
        ) from error


def _framed(tokenizer, text: str) -> tuple[str, str, str]:
    """What the template puts before the text, the text as it stands in it, and what comes behind."""
    one, other = (_rendered(tokenizer, letter) for letter in "ab")
    header, footer = one[: _n_shared(one, other)], one[len(one) - _n_shared(one[::-1], other[::-1]) :]
    rendered = _rendered(tokenizer, text)
    if not (rendered.startswith(header) and rendered[len(header) :].endswith(footer)):
        raise InputError(
            "the chat template changes with the text, so that the text cannot be told from it: leave `chat` off."
        )
    return header, rendered[len(header) : len(rendered) - len(footer)], footer


def _n_shared(first: Sequence, second: Sequence) -> int:
    """Length of the common beginning."""
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


def load_prompts(source: str | Path = "all", n: int | None = None) -> PromptSet:
    """The bundled prompts of one kind ("maths", "prose", "code", "lists", "dialogue"), "all", or a file of one's own.

    A file ending in .txt is one prompt. Any other is JSON lines, each told by its keys (in small or capital letters):
    `prompt` and `output`, a generation; else the text under `text`, `problem` (AIME, MATH), `question` (GSM8K) or `prompt`,
    the first that is there. Optional: `id` (or `unique_id`; else "line-" and the number of the line; with a
    `generation_idx` above 0 it follows behind a slash), `kind`, `answer`. Raises InputError for an unknown kind, a file that
    is missing, or naming the line and key that cannot be read.
    """
    n = None if n is None else arguments.whole(n, "n", low=-MOST)
    if n is not None and n < 1:
        raise InputError(f"n = {n} prompts asked for: at least 1.")
    path = Path(arguments.instance(source, "source", str | Path, "give a bundled kind, or the path of a file"))
    if str(source):
        arguments.path(path, "prompt source")
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
        text = read_text(path)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"prompt file {path} cannot be read as UTF-8 text ({error}): check path and encoding."
        ) from error
    if path.suffix == ".txt":
        if not text.strip():
            raise InputError(f"prompt file {path} is empty: give it some text.")
        return [Prompt(path.stem, "text", text)]
    return _parse_lines(text, str(path))


TEXT_KEYS = ("text", "problem", "question", "prompt")


def _parse_lines(text: str, where: str) -> list[Prompt]:
    prompts: list[Prompt] = []
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines(): texts may hold U+2028 and its like
        if not line.strip():
            continue
        try:
            prompts.append(_parsed(parse_json(line), number))
        except json.JSONDecodeError as error:
            raise InputError(
                f"{where}, line {number}: not a whole JSON object ({error.msg}, column {error.colno}); mend or remove the line."
            ) from error
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}, line {number}: {error}; mend or remove the line.") from error
    if not prompts:
        raise InputError(f"{where} holds no prompts: give at least one line.")
    counts = Counter(prompt.id for prompt in prompts)
    if len(counts) < len(prompts):
        raise InputError(f"{where}: two prompts share an id ({counts.most_common(1)[0][0]!r}); give each its own.")
    return prompts


def _parsed(record, number: int) -> Prompt:
    """One line's prompt. Raises ValueError saying what is wrong with it."""
    if not isinstance(record, dict):
        raise ValueError(f"a {type(record).__name__} is not a JSON object with a `text`")
    fields = {key.lower(): value for key, value in record.items()}
    if len(fields) < len(record):
        raise ValueError(f"its keys ({', '.join(record)}) hold one of them twice, in small and capital letters")
    generated = "output" in fields
    keys = ("prompt",) if generated else TEXT_KEYS
    key = next((one for one in keys if one in fields), None)
    if key is None:
        wanted = "an `output` needs its `prompt`" if generated else f"one of {', '.join(TEXT_KEYS)} is needed"
        raise ValueError(f"no text under its keys ({', '.join(map(str, record)) or 'none'}): {wanted}")
    for one in (key, "output") if generated else (key,):
        if not isinstance(fields[one], str):
            raise ValueError(f"`{one}` is not a string but {type(fields[one]).__name__}")
    for one, kinds, wanted in (("id", str | int, "a string"), ("unique_id", str | int, "a string"), ("kind", str, "a string"),
                               ("generation_idx", int, "a whole number")):  # fmt: skip
        if isinstance(value := fields.get(one), bool) or (value is not None and not isinstance(value, kinds)):
            raise ValueError(f"`{one}` is not {wanted} but {type(value).__name__}")
    name = next((str(fields[one]) for one in ("id", "unique_id") if fields.get(one) is not None), None)
    generation = fields.get("generation_idx") or 0
    name = f"line-{number}" if name is None else f"{name}/{generation}" if generation else name
    answer = fields.get("answer")
    return Prompt(
        name,
        fields.get("kind") or "text",
        fields[key],
        fields["output"] if generated else "",
        "" if answer is None else str(answer),
    )


def as_tokens(model, tokens, attention_mask: Int[Tensor, "batch pos"] | None = None) -> Tokens:
    """Whatever a researcher has, as `Tokens` on the model's device, checked before any long work.

    `tokens`: `Tokens`, a PromptSet, one text or several, LongTensor [pos] or [batch, pos] (with `attention_mask` where
    padded, on either side), or a list of LongTensors [pos]. Raises InputError naming what is wrong.
    """
    names: tuple[str, ...] | None = None
    attention_mask = None if attention_mask is None else _as_mask(attention_mask)
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
        rows, names = _rows_of(tokens.ids), _names_of(tokens)
    elif isinstance(tokens, Tensor):
        rows = _unpadded(tokens, attention_mask)
        if attention_mask is None:
            _check_padding(rows, getattr(getattr(model, "tokenizer", None), "pad_token_id", None))
    else:
        rows = _rows_of(tokens)
    if not rows:
        raise InputError("no prompts were given: pass at least one.")
    cfg, device = model.cfg, next(model.parameters()).device
    checked = []
    for index, row in enumerate(rows):
        if row.layout != torch.strided or row.is_meta or row.is_quantized or row.is_nested:
            raise InputError(f"prompt {index}: {_unreadable(row)} cannot be read: pass LongTensor [pos].")
        if row.ndim == 1 and len(row) == 0:
            raise InputError(f"prompt {index} is empty: give it at least one token.")
        if row.ndim != 1 or row.is_floating_point() or row.is_complex() or row.dtype == torch.bool:
            raise InputError(
                f"prompt {index}: tokens have shape {tuple(row.shape)} and type {row.dtype}; integers of shape [pos] are needed."
            )
        row = row.to(torch.long)  # torch compares no other unsigned numbers than bytes
        if len(row) > cfg.n_ctx:
            raise InputError(
                f"prompt {index} has {len(row)} tokens, the model's context {cfg.n_ctx}: shorten it (max_tokens=)."
            )
        if row.min() < 0 or row.max() >= cfg.d_vocab:
            wrong = int(row.max() if row.max() >= cfg.d_vocab else row.min())
            raise InputError(f"prompt {index} holds token id {wrong}, the vocabulary 0..{cfg.d_vocab - 1}.")
        checked.append(row.to(device))
    return Tokens(tuple(checked), names or tuple(f"prompt-{i}" for i in range(len(checked))))


def _rows_of(tokens) -> list[Tensor]:
    try:
        if isinstance(tokens, bytes | Mapping):
            raise TypeError
        return [torch.as_tensor(row) for row in tokens]
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise InputError(
            f"tokens of type {type(tokens).__name__} cannot be read: pass LongTensor [pos] or a list of them."
        ) from error


def _unreadable(tokens: Tensor) -> str:
    """What kind of tensor has no numbers to be looked at one by one."""
    kind = (
        "on the meta device" if tokens.is_meta else "quantised" if tokens.is_quantized else f"of layout {tokens.layout}"
    )
    return f"a tensor {kind}"


def _names_of(tokens: Tokens) -> tuple[str, ...]:
    names = tuple(tokens.names) if isinstance(tokens.names, tuple | list) else ()
    if len(names) != len(tokens.ids) or not all(isinstance(name, str) for name in names):
        raise InputError(
            f"Tokens of {len(tokens.ids)} prompts have names {shown(tokens.names)}: give each prompt a string."
        )
    if broken := [name for name in names if has_surrogate(name)]:
        raise InputError(f"a prompt's name holds half a character (a surrogate): mend {shown(broken[0])}.")
    if len(set(names)) < len(names):
        raise InputError("two prompts share a name: give each its own.")
    return names


def _as_mask(mask) -> Tensor:
    """An attention mask as Bool. Raises InputError for anything but zeros and ones."""
    try:
        made = torch.as_tensor(mask)
        binary = not made.is_complex() and bool(((made == 0) | (made == 1)).all())
    except (TypeError, ValueError, RuntimeError) as error:  # sparse tensors and the like compare with nothing
        raise InputError(f"attention_mask = {shown(mask)}: give a tensor of zeros and ones, [batch, pos].") from error
    if not binary:
        raise InputError(f"attention_mask = {shown(mask)}: give zeros and ones, 1 where there is text.")
    return made.bool()


def _check_padding(rows: Sequence[Tensor], pad: int | None) -> None:
    """Raises InputError for rows that look padded and came without a mask: padding would be measured as text.

    They do when one begins or ends with two of the tokenizer's padding tokens, or when only some begin or end with one.
    """
    if pad is None:
        return
    for side in (slice(2), slice(-1, -3, -1)):
        ends = [[token == pad for token in row.tolist()[side]] for row in rows]
        if any(len(end) > 1 and all(end) for end in ends) or len({end[0] for end in ends if end}) > 1:
            raise InputError(
                f"some rows begin or end with the tokenizer's padding token ({pad}): pass attention_mask, with ones where "
                "there is text, or a list of rows of their own length."
            )


def _unpadded(tokens: Tensor, attention_mask: Tensor | None) -> list[Tensor]:
    if tokens.is_nested:
        return list(tokens.unbind())
    if tokens.layout != torch.strided or tokens.is_meta or tokens.is_quantized:
        raise InputError(f"{_unreadable(tokens)} cannot be read: pass LongTensor [pos] or [batch, pos].")
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
        return [f"<{i}>" for i in ids.tolist()]
    return [tokenizer.decode([i], clean_up_tokenization_spaces=False) for i in ids.tolist()]
