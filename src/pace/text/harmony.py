"""gpt-oss' harmony format: messages on channels, told apart by special tokens."""

from __future__ import annotations

from collections.abc import Collection
from enum import Enum, auto

from pace.text.call_reader import Functions
from pace.text.readers import FINAL, REASONING, TOOL_CALL, Piece, Reader
from pace.text.tokenizer import Tokenizer

__all__ = ["Harmony", "end_ids"]

START, END, MESSAGE, CHANNEL = "<|start|>", "<|end|>", "<|message|>", "<|channel|>"
CONSTRAIN, CALL, RETURN = "<|constrain|>", "<|call|>", "<|return|>"

_ROLES = ("assistant", "system", "developer", "user", "tool")
_THOUGHTS = ("analysis", "commentary")


class _In(Enum):
    """Where in the stream."""

    HEADER = auto()
    BODY = auto()
    BETWEEN = auto()


class Harmony(Reader):
    """Reads messages `role to=recipient<|channel|>name <|constrain|>type<|message|>text<|end|>`, `<|start|>` before each.

    The channel final is the answer. Analysis is reasoning, and so is commentary, unless its recipient is one of the
    functions: then it is a call, whatever the channel. Only the tokens divide; text that reads like them is text. Where the
    order is not harmony's nothing is lost: text without a channel is the answer's.

    Args:
        functions: that may be called.
        prompt: the rendered chat, whose last message the stream continues.
    """

    tokens = frozenset((START, END, MESSAGE, CHANNEL, CONSTRAIN, CALL, RETURN))
    markers = tokens

    def __init__(self, functions: Functions, prompt: str = START + "assistant") -> None:
        self._functions = functions
        self._in = _In.BETWEEN
        self._header = ""
        self._destination = FINAL
        self._pieces: list[Piece] = []
        self._told: set[str] = set()  # destinations that have text
        self._is_fresh = False  # no text of this message yet
        self._read_prompt(prompt)

    def push(self, text: str) -> list[Piece]:
        """See `Reader`."""
        if self._in is _In.BODY:
            self._tell(text)
        elif self._in is _In.BETWEEN:
            if text.strip():
                self._begin(FINAL)
                self._tell(text.lstrip())
        else:
            self._header += text
            if _is_answer(self._header):
                self._drop_header()
                self._in = _In.BODY
        return self._take()

    def push_token(self, token: str) -> list[Piece]:
        """See `Reader`."""
        if token == START:
            self._leave(_In.HEADER)
        elif token == CHANNEL and (self._in is not _In.HEADER or CHANNEL in self._header):
            self._leave(_In.HEADER)
            self._header = CHANNEL
        elif token in (CHANNEL, CONSTRAIN):
            self._header += token if self._in is _In.HEADER else ""
        elif token == MESSAGE:
            if self._in is not _In.BODY:
                self._open()
        else:
            self._leave(_In.BETWEEN)
        return self._take()

    def finish(self) -> list[Piece]:
        """See `Reader`."""
        self._leave(_In.BETWEEN)
        return self._take()

    def _take(self) -> list[Piece]:
        pieces, self._pieces = self._pieces, []
        return pieces

    def _open(self) -> None:
        """The header is complete: where its message goes."""
        channel, recipient, _ = _parse(self._header)
        self._header = ""
        name = recipient.removeprefix("functions.")
        if recipient and name in self._functions:
            self._begin(TOOL_CALL)
            self._pieces.append(Piece(TOOL_CALL, "", name))
        else:
            self._begin(REASONING if channel in _THOUGHTS else FINAL)

    def _begin(self, destination: str) -> None:
        self._in, self._destination, self._is_fresh = _In.BODY, destination, True

    def _tell(self, text: str) -> None:
        if not text:
            return
        destination = self._destination
        if self._is_fresh and destination in self._told and destination != TOOL_CALL:
            text = "\n" + text
        self._is_fresh = False
        self._told.add(destination)
        self._pieces.append(Piece(destination, text))

    def _leave(self, place: _In) -> None:
        """The message, or its header, is over."""
        if self._in is _In.HEADER:
            self._drop_header()
        elif self._in is _In.BODY and self._destination == TOOL_CALL and self._is_fresh:
            self._tell("{}")
        self._in = place

    def _drop_header(self) -> None:
        """A header that has no message: what is no header's is text."""
        _, _, rest = _parse(self._header)
        self._header = ""
        if rest.strip():
            self._begin(FINAL)
            self._tell(rest)

    def _read_prompt(self, prompt: str) -> None:
        """Go to where the prompt ends."""
        rest = prompt[max(0, prompt.rfind(START)) :]
        while rest:
            at, token = min(
                ((at, token) for token in self.tokens if (at := rest.find(token)) >= 0),
                default=(len(rest), ""),
            )
            self.push(rest[:at])
            if token:
                self.push_token(token)
            rest = rest[at + len(token) :]
        self._told.clear()


def _split_role(header: str) -> str:
    """A header without the role, or a part of one, that it begins with."""
    role = next((role for role in _ROLES if header.startswith(role)), "")
    return "" if any(role.startswith(header) for role in _ROLES) else header[len(role) :]


def _is_answer(header: str) -> bool:
    """Whether this can't become a header: text where a channel should have come."""
    rest = _split_role(header).lstrip()
    return CHANNEL not in header and not ("to=".startswith(rest) or rest.startswith("to="))


def _parse(header: str) -> tuple[str, str, str]:
    """(channel, recipient, text that is no part of a header)."""
    before, _, behind = header.partition(CHANNEL)
    before = _split_role(before)
    words, _, _ = behind.partition(CONSTRAIN)
    recipient = next((word[3:] for word in (*before.split(), *words.split()) if word.startswith("to=")), "")
    channel, _, rest = words.strip().partition(" ")
    others = [word for word in rest.split() if not word.startswith("to=")]
    if CHANNEL in header:
        # A word behind is the type of the content; more are somebody's text.
        return channel, recipient, words if len(others) > 1 else ""
    return "", recipient, before


def end_ids(tokenizer: Tokenizer, ids: Collection[int]) -> frozenset[int]:
    """The ids that end an output, where the tokenizer has harmony's tokens: files of fine-tunes forget `<|call|>`, or add
    `<|end|>`, which ends only a thought.

    Args:
        ids: those of the checkpoint's files; returned as they are for any other tokenizer.
    """
    found = {token: tokenizer.token_to_id(token) for token in (CHANNEL, MESSAGE, END, CALL, RETURN)}
    if None in found.values():
        return frozenset(ids)
    ends = {token_id for token in (CALL, RETURN) if (token_id := found[token]) is not None}
    return (frozenset(ids) | ends) - {found[END]}
