"""`/v1/chat/completions`: a conversation in, the next message out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import msgspec
from msgspec import UNSET, UnsetType

from pace.server.protocol.common import Sampling, Strict, Usage

__all__ = [
    "ChatChoice",
    "ChatChunk",
    "ChatCompletion",
    "ChatLogprobs",
    "ChatRequest",
    "ChoiceDelta",
    "ChunkChoice",
    "Function",
    "Message",
    "TokenEntry",
    "Tool",
    "ToolCallChunk",
    "ToolCallObject",
    "TopEntry",
]


class FunctionSpec(msgspec.Struct, kw_only=True):
    """A function that the model may call."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict, kw_only=True):
    """A tool; type is function."""

    type: str
    function: FunctionSpec


class ChatRequest(Sampling, kw_only=True):
    """Answer a conversation.

    Attributes:
        messages: each with a role; further keys are the chat template's business.
        max_completion_tokens: as max_tokens; without either the answer may fill the context.
        logprobs, top_logprobs: return log probabilities, of so many most probable tokens besides the drawn one.
        tools, tool_choice, parallel_tool_calls: functions that the model may call; none, auto, required, or one of them;
            false: the first call alone is returned.
        reasoning_effort: reaches the chat template as a variable.
        chat_template: a name of the checkpoint's, or where the server allows it a template.
        chat_template_kwargs: further variables of the template.
        add_generation_prompt, continue_final_message, include_reasoning: as `LLM.chat`; include_reasoning: false leaves
            reasoning out of the answer.
    """

    engine_names: ClassVar[Mapping[str, str]] = {"logprobs": "top_logprobs"}

    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Tool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    include_reasoning: bool | None = None


class TopEntry(msgspec.Struct):
    """A probable token at one position."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenEntry(msgspec.Struct):
    """The drawn token at one position, and the most probable ones."""

    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[TopEntry]


class ChatLogprobs(msgspec.Struct):
    """Log probabilities of an answer's tokens."""

    content: list[TokenEntry]
    refusal: None = None


class Function(msgspec.Struct):
    """A called function, its arguments as JSON text."""

    name: str
    arguments: str


class ToolCallObject(msgspec.Struct):
    """A call that the model has made."""

    id: str
    function: Function
    type: str = "function"


class FunctionChunk(msgspec.Struct, omit_defaults=True):
    """What is new of a called function."""

    name: str | UnsetType = UNSET
    arguments: str | UnsetType = UNSET


class ToolCallChunk(msgspec.Struct):
    """What is new of a call: id, type and name come once."""

    index: int
    id: str | UnsetType = UNSET
    type: str | UnsetType = UNSET
    function: FunctionChunk | UnsetType = UNSET


class Message(msgspec.Struct):
    """The answer."""

    content: str | None
    role: str = "assistant"
    refusal: None = None
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCallObject] | UnsetType = UNSET


class ChatChoice(msgspec.Struct):
    """One answer."""

    index: int
    message: Message
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | UnsetType = UNSET


class ChatCompletion(msgspec.Struct):
    """All answers to a conversation."""

    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    object: str = "chat.completion"
    system_fingerprint: str | None = None
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: list[dict[str, Any] | None] | UnsetType = UNSET
    speculative: dict[str, Any] | UnsetType = UNSET


class ChoiceDelta(msgspec.Struct):
    """What is new of an answer."""

    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCallChunk] | UnsetType = UNSET


class ChunkChoice(msgspec.Struct):
    """What is new of one answer."""

    index: int
    delta: ChoiceDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | UnsetType = UNSET
    token_ids: list[int] | UnsetType = UNSET


class ChatChunk(msgspec.Struct):
    """A part of a streamed answer."""

    id: str
    created: int
    model: str
    choices: list[ChunkChoice]
    object: str = "chat.completion.chunk"
    system_fingerprint: str | None = None
    usage: Usage | UnsetType | None = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: list[dict[str, Any] | None] | UnsetType = UNSET
    speculative: dict[str, Any] | UnsetType = UNSET
