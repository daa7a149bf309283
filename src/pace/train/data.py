"""Documents: JSON lines through the tokenizer and its chat template, answered by the target where that is wanted."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pace.checkpoint import load_generation_defaults, read_json, resolve
from pace.console import progress_bar
from pace.errors import ConfigError, PaceError, RequestError, show
from pace.llm import LLM
from pace.params import SamplingParams
from pace.text.chat import ChatTemplates
from pace.text.tokenizer import Tokenizer
from pace.train.recipe import Data

__all__ = ["Document", "Line", "Target", "load_documents", "read_lines"]

PIECE = 256
"""Prompts that the target answers between two writes: what a kill costs at most."""


@dataclass(frozen=True)
class Document:
    """Token ids i64[n], and where in them the answer begins: its tokens, the end token included, are learnt."""

    ids: npt.NDArray[np.int64]
    begin: int


@dataclass(frozen=True)
class Line:
    """What a line of a data file says: a conversation or a raw prompt, and the answer to it."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    prompt: str = ""
    answer: str = ""


class Target:
    """The target's text side, and its engine from the first answer on."""

    def __init__(self, model: str, context_len: int, threads: int | None) -> None:
        """Read its tokenizer.

        Args:
            model: a folder, a hub id, or "demo".
            context_len: tokens of the longest document.
            threads: of its engine.

        Raises:
            CheckpointError: there is no such model, or its tokenizer can't be used.
        """
        self.directory = resolve(model)
        config = read_json(self.directory / "config.json")
        vocab_size = config.get("vocab_size")
        if type(vocab_size) is not int:
            raise ConfigError(
                f"{self.directory}: config.json says no vocab_size, expected a causal language model"
            )
        self.context_len = context_len
        self.tokenizer = Tokenizer(self.directory, vocab_size=vocab_size, max_model_len=context_len)
        defaults = load_generation_defaults(
            self.directory, config, vocab_size=vocab_size, tokenizer_eos_id=self.tokenizer.eos_token_id
        )
        self._eos_ids, self._eos_id = defaults.eos_token_ids, defaults.eos_token_id
        self._templates = ChatTemplates.load(self.directory, self.tokenizer)
        self._threads = threads
        self._llm: LLM | None = None

    def close(self) -> None:
        """Give the engine back."""
        if self._llm is not None:
            self._llm.close()
            self._llm = None

    def prompt(self, line: Line) -> list[int]:
        """Token ids up to where the answer begins, as a request with this prompt has them."""
        if not line.messages:
            return self.tokenizer.encode(line.prompt)
        return self.tokenizer.encode_chats([self._templates.choose().render(line.messages)])[0]

    def document(self, line: Line) -> Document:
        """A line with its own answer, which ends with the first end token that the template writes, else with EOS."""
        ids = self.prompt(line)
        begin = len(ids)
        if line.messages:
            answered = [*line.messages, {"role": "assistant", "content": line.answer}]
            text = self._templates.choose().render(answered, add_generation_prompt=False)
            ids = self.tokenizer.encode_chats([text])[0]
            if ids[:begin] != self.prompt(line):
                raise RequestError(
                    "the chat template writes an answered conversation otherwise than its prompt; "
                    'let the target answer it (answers = "target")'
                )
        else:
            ids = ids + self.tokenizer.encode(line.answer, add_special_tokens=False)
        ends = [i for i in range(begin, len(ids)) if ids[i] in self._eos_ids]
        end = [] if ends or self._eos_id is None else [self._eos_id]
        return Document(np.array(ids[: ends[0] + 1] if ends else ids + end, np.int64), begin)

    def answer(self, prompts: Sequence[list[int]], params: Sequence[SamplingParams]) -> list[Document | None]:
        """Let the engine answer; None where it failed. An answer that ended by itself has its end token."""
        if self._llm is None:
            self._llm = LLM(self.directory, max_model_len=self.context_len, threads=self._threads)
        outputs = self._llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        return [
            Document(np.array([*ids, *output.outputs[0].token_ids], np.int64), len(ids))
            if output.outputs[0].finish_reason in ("stop", "length")
            else None
            for ids, output in zip(prompts, outputs, strict=True)
        ]


def load_documents(source: Data, target: Target, cache: Path, seed: int) -> list[Document]:
    """The documents of a source; answers of the target are kept in `cache`, from which a killed run goes on.

    Args:
        source: where they come from.
        target: whose they become.
        cache: a file of JSON lines, written here.
        seed: of sampled answers.

    Raises:
        ConfigError: the file can't be read or a line has a wrong form; the message names the line.
    """
    lines = list(islice(read_lines(source.file), source.limit))
    documents: list[Document | None] = []
    if source.answers == "file":
        for number, line in enumerate(lines, 1):
            try:
                documents.append(target.document(line))
            except PaceError as error:
                raise ConfigError(f"{source.file}: document {number}: {error}") from None
    else:
        documents = _answered(source, lines, target, cache, seed)
    size = target.context_len
    return [
        Document(d.ids[:size], d.begin)
        for d in documents
        if d is not None and d.begin < min(len(d.ids), size)
    ]


def _answered(
    source: Data, lines: Sequence[Line], target: Target, cache: Path, seed: int
) -> list[Document | None]:
    """A document for each line, with the target's answer; those of an earlier run are taken from `cache`."""
    documents = _read_cache(cache)
    bar = progress_bar(None, total=len(lines), initial=len(documents), desc="answers", unit="prompt")
    while len(documents) < len(lines):
        first = len(documents)
        prompts, params = [], []
        for number, line in enumerate(lines[first : first + PIECE], first):
            try:
                prompts.append(target.prompt(line)[: target.context_len - 1])
                values = {"temperature": 0.0, **source.sampling}
                params.append(SamplingParams(max_tokens=source.max_tokens, seed=seed + number, **values))
            except (PaceError, TypeError) as error:
                raise ConfigError(f"{source.file}: document {number + 1}: {error}") from None
        answers = target.answer(prompts, params)
        _write_cache(cache, answers)
        documents += answers
        if bar is not None:
            bar.update(len(answers))
    if bar is not None:
        bar.close()
    return documents[: len(lines)]


def _read_cache(path: Path) -> list[Document | None]:
    """What `_write_cache` wrote; a line that a kill cut short is taken off the file."""
    if not path.exists():
        return []
    whole = path.read_bytes()
    kept = whole[: whole.rfind(b"\n") + 1]
    if kept != whole:
        path.write_bytes(kept)
    values = [json.loads(line) for line in kept.splitlines()]
    return [None if v is None else Document(np.array(v["ids"], np.int64), v["begin"]) for v in values]


def _write_cache(path: Path, documents: Sequence[Document | None]) -> None:
    with path.open("a", encoding="utf-8") as file:
        for document in documents:
            value = None if document is None else {"begin": document.begin, "ids": document.ids.tolist()}
            file.write(json.dumps(value) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_lines(path: str) -> Iterator[Line]:
    """The lines of a data file; see `recipe.Data` for their forms.

    Raises:
        ConfigError: it can't be read, or a line has another form; the message names the line.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 at byte {error.start}") from None
    for number, row in enumerate(text.split("\n"), 1):
        if row.strip():
            try:
                yield _line(json.loads(row))
            except (ValueError, KeyError, TypeError, IndexError) as error:
                reason = f"{type(error).__name__}: {error}"
                raise ConfigError(
                    f"{path}:{number}: {show(row)}: {reason}; expected messages, conversation, prompt or text"
                ) from None


def _line(value: Any) -> Line:
    """One line's value in any of the forms."""
    if "conversation" in value:  # PARD's own files: their first turn counts
        turn = value["conversation"][0]
        return Line([{"role": "user", "content": turn["human"]}], answer=_text(turn.get("assistant", "")))
    if "messages" in value:
        messages = list(value["messages"])
        last = messages[-1]
        if last["role"] != "assistant":
            return Line(messages)
        if len(messages) == 1:
            raise ValueError("a conversation begins with its answer")
        return Line(messages[:-1], answer=_text(last["content"]))
    if "prompt" in value:
        return Line(prompt=_text(value["prompt"]), answer=_text(value.get("completion", "")))
    return Line(answer=_text(value["text"]))


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{show(value)} is no text")
    return value
