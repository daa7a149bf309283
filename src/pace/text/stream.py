"""A request's output as text."""

from __future__ import annotations

import secrets
import string
from collections.abc import Sequence
from dataclasses import dataclass, field

from pace.outputs import ToolCall
from pace.text.detokenizer import IncrementalDetokenizer
from pace.text.readers import FINAL, REASONING, TOOL_CALL, Piece, Reader
from pace.text.stop import StopChecker
from pace.text.tokenizer import Tokenizer

__all__ = ["TextStream"]

_ID_CHARS = string.ascii_letters + string.digits


@dataclass
class _Call:
    """A tool call so far."""

    name: str
    # Mistral's templates take no others than nine letters and digits.
    id: str = field(default_factory=lambda: "".join(secrets.choice(_ID_CHARS) for _ in range(9)))
    parts: list[str] = field(default_factory=list)


class TextStream:
    """A request's output as text: tokens in, text that may be shown out.

    Where a reader divides it, the text is the final answer, and stop strings are searched in that alone: one that the
    model mentions in its reasoning, or in the arguments of a call, ends nothing.

    Attributes:
        text: all text returned so far.
        reasoning: what the reader found of it so far; None: nothing.
        calls: the tool calls that it found so far, the last one perhaps with a part of its arguments.
        matched: the stop string that ended the output, or None.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_token_ids: Sequence[int] = (),
        *,
        stop: Sequence[str] = (),
        include_stop_str_in_output: bool = False,
        skip_special_tokens: bool = True,
        reader: Reader | None = None,
    ) -> None:
        self._detokenizer = IncrementalDetokenizer(
            tokenizer,
            prompt_token_ids,
            skip_special_tokens=skip_special_tokens,
            keep=() if reader is None else reader.markers,
        )
        self._reader = reader
        # Tokens that the reader takes apart from the text, by id.
        self._tokens = {} if reader is None else _by_id(tokenizer, reader)
        self._checker = StopChecker(stop, include_in_output=include_stop_str_in_output)
        self._parts: list[str] = []
        self._thoughts: list[str] = []
        self._calls: list[_Call] = []

    def push(self, token_id: int, *, check_stop: bool = True) -> str:
        """Add a token; returns the new text that may be shown. Look at `matched` afterwards."""
        text = self._read_token(token_id) if self._tokens else self._read(self._detokenizer.push(token_id))
        return self._keep(self._checker.push(text, check=check_stop))

    def extend(self, token_ids: Sequence[int]) -> str:
        """`push` of each at once (128 tokens: 23 instead of 75 us); for an output without stop strings, whose match
        must end at its token."""
        if self._tokens:
            return self._keep("".join([self._read_token(token_id) for token_id in token_ids]))
        return self._keep(self._read(self._detokenizer.extend(token_ids)))

    def finish(self, *, check_stop: bool = True) -> str:
        """End the output; returns the text that was held back. It may complete a stop string: look at
        `matched`."""
        text = self._read(self._detokenizer.finish(), last=True)
        tail = self._checker.push(text, check=check_stop)
        return self._keep(tail + self._checker.finish())

    @property
    def matched(self) -> str | None:
        return self._checker.matched

    @property
    def text(self) -> str:
        return _joined(self._parts)

    @property
    def reasoning(self) -> str | None:
        return _joined(self._thoughts) if self._thoughts else None

    @property
    def calls(self) -> list[ToolCall]:
        return [ToolCall(i, call.id, call.name, _joined(call.parts)) for i, call in enumerate(self._calls)]

    def _read(self, text: str, *, last: bool = False) -> str:
        """Put aside what doesn't belong to the answer; returns what does."""
        if self._reader is None:
            return text
        pieces = self._reader.push(text)
        if last:
            pieces += self._reader.finish()
        return self._sort(pieces)

    def _read_token(self, token_id: int) -> str:
        """`_read` of a token, where the reader takes some apart."""
        token = self._tokens.get(token_id)
        if token is None or self._reader is None:
            return self._read(self._detokenizer.push(token_id))
        # A character that is incomplete before it stays so.
        return self._read(self._detokenizer.flush()) + self._sort(self._reader.push_token(token))

    def _sort(self, pieces: list[Piece]) -> str:
        """Keep reasoning and calls; returns the answer's text."""
        answer = []
        for channel, text, name in pieces:
            if channel == FINAL:
                answer.append(text)
            elif channel == REASONING:
                self._thoughts.append(text)
            elif channel == TOOL_CALL:
                if name is not None:
                    self._calls.append(_Call(name))
                if text:
                    self._calls[-1].parts.append(text)
        return "".join(answer)

    def _keep(self, text: str) -> str:
        if text:
            self._parts.append(text)
        return text


def _by_id(tokenizer: Tokenizer, reader: Reader) -> dict[int, str]:
    ids = {token: tokenizer.token_to_id(token) for token in reader.tokens}
    return {token_id: token for token, token_id in ids.items() if token_id is not None}


def _joined(parts: list[str]) -> str:
    """The text of all parts, which become one."""
    if len(parts) > 1:
        parts[:] = ["".join(parts)]
    return parts[0] if parts else ""
