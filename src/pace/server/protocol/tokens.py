"""`/tokenize` and `/detokenize`, as vLLM has them."""

from __future__ import annotations

from typing import Any

import msgspec

from pace.server.protocol.chat import Tool
from pace.server.protocol.common import Strict

__all__ = ["DetokenizeRequest", "Detokenized", "TokenizeRequest", "Tokenized"]


class TokenizeRequest(Strict, kw_only=True):
    """Which tokens is a prompt, or a conversation? Exactly one of both.

    Attributes:
        return_token_strs: also the text of each.
        The other fields: as in completions and chats.
    """

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[Tool] | None = None


class Tokenized(msgspec.Struct):
    """The tokens."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(Strict, kw_only=True):
    """Which text is that?"""

    tokens: list[int]
    model: str | None = None


class Detokenized(msgspec.Struct):
    """The text."""

    prompt: str
