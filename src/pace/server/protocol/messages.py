"""`/v1/messages`: Anthropic's shape of a conversation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import msgspec

from pace.server.protocol.common import Strict

__all__ = [
    "AnthropicError",
    "AnthropicMessage",
    "CountTokensRequest",
    "MessagesRequest",
    "MessagesUsage",
    "TokenCount",
]


class ToolSpec(msgspec.Struct, kw_only=True):
    """A tool that the model may call."""

    name: str
    input_schema: dict[str, Any] | None = None
    description: str | None = None
    type: str | None = None


class MessagesRequest(Strict, kw_only=True):
    """Answer a conversation.

    Attributes:
        messages: of user and assistant, their content text or a list of blocks: text, tool_use, tool_result, thinking. The
            answer goes on where a last one of the assistant ends.
        max_tokens: of the answer.
        system: instructions, as text or text blocks.
        metadata, service_tier: taken, and without effect.
        thinking: type "enabled" or "disabled" reaches the chat template as enable_thinking, "adaptive" leaves it to the
            template; a budget is not kept.
        tool_choice: {"type": "auto"}, "none", "any", or "tool" with a name; with disable_parallel_tool_use the first call
            alone is returned.
    """

    engine_names: ClassVar[Mapping[str, str]] = {"stop": "stop_sequences"}

    messages: list[dict[str, Any]]
    max_tokens: int
    model: str | None = None
    system: str | list[dict[str, Any]] | None = None
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    tools: list[ToolSpec] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None


class CountTokensRequest(Strict, kw_only=True):
    """How many tokens is a conversation? Fields as in `MessagesRequest`."""

    messages: list[dict[str, Any]]
    model: str | None = None
    system: str | list[dict[str, Any]] | None = None
    tools: list[ToolSpec] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None


class TokenCount(msgspec.Struct):
    """So many."""

    input_tokens: int


class MessagesUsage(msgspec.Struct):
    """How many tokens a request took; input_tokens are those that were not in the prefix cache."""

    input_tokens: int
    output_tokens: int
    cache_read_input_tokens: int = 0
    cache_creation_input_tokens: int = 0


class AnthropicMessage(msgspec.Struct):
    """The answer."""

    id: str
    model: str
    content: list[dict[str, Any]]
    stop_reason: str | None
    stop_sequence: str | None
    usage: MessagesUsage
    type: str = "message"
    role: str = "assistant"


class AnthropicErrorObject(msgspec.Struct):
    """What went wrong."""

    type: str
    message: str


class AnthropicError(msgspec.Struct):
    """An answer that is no success."""

    error: AnthropicErrorObject
    type: str = "error"

    @classmethod
    def of(cls, status: int, message: str) -> AnthropicError:
        """With the type that belongs to a status."""
        return cls(AnthropicErrorObject(_TYPES.get(status, _kind(status)), message))


_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def _kind(status: int) -> str:
    return "api_error" if status >= 500 else "invalid_request_error"
