"""A request's output as text."""

from __future__ import annotations

from collections.abc import Sequence

from pace.text.detokenizer import IncrementalDetokenizer
from pace.text.readers import FINAL, REASONING, Reader
from pace.text.stop import StopChecker
from pace.text.tokenizer import Tokenizer

__all__ = ["TextStream"]


class TextStream:
    """A request's output as text: tokens in, text that may be shown out.

    Where a reader divides it, the text is the final answer, and stop strings are searched in that alone: one that the
    model mentions in its reasoning ends nothing.

    Attributes:
        text: all text returned so far.
        reasoning: what the reader found of it so far; None: nothing.
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
        self._checker = StopChecker(stop, include_in_output=include_stop_str_in_output)
        self._parts: list[str] = []
        self._thoughts: list[str] = []

    def push(self, token_id: int, *, check_stop: bool = True) -> str:
        """Add a token; returns the new text that may be shown. Look at `matched` afterwards."""
        return self._keep(self._checker.push(self._read(self._detokenizer.push(token_id)), check=check_stop))

    def extend(self, token_ids: Sequence[int]) -> str:
        """`push` of each at once (128 tokens: 23 instead of 75 us); for an output without stop strings, whose match
        must end at its token."""
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

    def _read(self, text: str, *, last: bool = False) -> str:
        """Put reasoning aside; returns what belongs to the answer."""
        if self._reader is None:
            return text
        pieces = self._reader.push(text)
        if last:
            pieces += self._reader.finish()
        self._thoughts += [piece.text for piece in pieces if piece.channel == REASONING]
        return "".join([piece.text for piece in pieces if piece.channel == FINAL])

    def _keep(self, text: str) -> str:
        if text:
            self._parts.append(text)
        return text


def _joined(parts: list[str]) -> str:
    """The text of all parts, which become one."""
    if len(parts) > 1:
        parts[:] = ["".join(parts)]
    return parts[0] if parts else ""
