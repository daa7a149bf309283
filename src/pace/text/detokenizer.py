"""Tokens to text one by one."""

from __future__ import annotations

import codecs
from collections.abc import Collection, Sequence

from pace.text.tokenizer import Tokenizer

__all__ = ["IncrementalDetokenizer"]

MAX_PENDING_TOKENS = (
    5  # a character has at most four bytes, each at most one token; the fifth proves it invalid
)


class IncrementalDetokenizer:
    """Turns tokens into text one by one; what it returns is always whole characters, and never taken back.

    Byte-level tokenizers go through an incremental UTF-8 decoder: exactly the text of the whole, at O(1) per
    token. For the others (SentencePiece-like), where a token's text depends on its neighbours, each token is
    decoded together with the few before it and the difference is returned; text that ends in U+FFFD waits, at
    most for four more tokens.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_token_ids: Sequence[int] = (),
        *,
        skip_special_tokens: bool = True,
        keep: Collection[str] = (),
    ) -> None:
        """Start after a prompt, whose last tokens say whether the output's leading space is real.

        Args:
            keep: special tokens that are never skipped.
        """
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._kept = frozenset(tokenizer.token_to_id(token) for token in keep)
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._context: list[int] = []  # tokens whose text has been returned
        self._pending: list[int] = []  # tokens whose text hasn't
        self._context_text = ""
        if not tokenizer.byte_level:
            # More than the window needs, because the ends of chat prompts are special tokens.
            recent = [int(token_id) for token_id in prompt_token_ids[-64:] if self._has_text(token_id)]
            self._context = recent[-MAX_PENDING_TOKENS:]
            self._context_text = tokenizer.decode_window(self._context) if self._context else ""

    def push(self, token_id: int) -> str:
        """Add a token; returns the text that is complete with it, "" if none is."""
        if not self._has_text(token_id):
            return ""
        if self._tokenizer.byte_level:
            return self._utf8.decode(self._tokenizer.token_bytes(token_id))
        self._pending.append(token_id)
        text = self._tokenizer.decode_window(self._context + self._pending)
        complete = len(text) > len(self._context_text) and not text.endswith("\ufffd")
        return self._emit(text) if complete or len(self._pending) >= MAX_PENDING_TOKENS else ""

    def extend(self, token_ids: Sequence[int]) -> str:
        """`push` of each; returns the text of all together."""
        if self._tokenizer.byte_level:
            token_bytes = self._tokenizer.token_bytes
            return self._utf8.decode(b"".join([token_bytes(i) for i in token_ids if self._has_text(i)]))
        return "".join([self.push(token_id) for token_id in token_ids])

    def flush(self) -> str:
        """`finish`, where another text follows."""
        text = self.finish()
        self._utf8.reset()
        return text

    def finish(self) -> str:
        """Return what was held back, an incomplete character as U+FFFD."""
        if self._tokenizer.byte_level:
            return self._utf8.decode(b"", final=True)
        return (
            self._emit(self._tokenizer.decode_window(self._context + self._pending)) if self._pending else ""
        )

    def _has_text(self, token_id: int) -> bool:
        # Skipped tokens must not become context either: a leading space is dropped where nothing precedes it.
        return not (self._skip and self._tokenizer.is_special(token_id)) or token_id in self._kept

    def _emit(self, text: str) -> str:
        n_old = len(self._context_text)
        if not text.startswith(self._context_text):
            # Invalid bytes that were returned as U+FFFD have become part of something else: keep what was
            # said.
            pairs = zip(text, self._context_text, strict=False)
            n_old = next((i for i, (new, old) in enumerate(pairs) if new != old), min(n_old, len(text)))
        self._context, self._pending = self._pending, []
        self._context_text = self._tokenizer.decode_window(self._context)
        return text[n_old:]
