"""`/v1/responses`: OpenAI's newer API, without anything that a server would have to remember."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import msgspec
from msgspec import UNSET, UnsetType

from pace.server.protocol.common import Strict

__all__ = ["ResponseObject", "ResponseUsage", "ResponsesRequest"]


class ResponseStreamOptions(Strict, kw_only=True):
    """How a stream is cut into events; counts always come in the last one.

    Attributes:
        one_token_per_chunk: tokens that one step has accepted together come in events of their own.
        include_obfuscation: taken for OpenAI's clients; nothing is ever obfuscated.
    """

    one_token_per_chunk: bool | None = None
    include_obfuscation: bool | None = None


class ResponsesRequest(Strict, kw_only=True):
    """Answer an input.

    Attributes:
        input: text, or a list of items: messages, function_call, function_call_output, reasoning.
        instructions: a message of the system before it.
        store: only false or absent means what it says: nothing is kept, whatever it is.
        text: {"format": {"type": "text" | "json_object" | "json_schema", ...}}.
        reasoning: {"effort": ...} reaches the chat template as reasoning_effort; a summary is not made.
        tools: of type function.
        metadata, user, service_tier, safety_identifier, prompt_cache_key, prompt_cache_retention, max_tool_calls (of
            tools that a server runs), truncation, include: taken, and without effect; truncation only as "disabled",
            include without log probabilities.
        previous_response_id, conversation, prompt, background, top_logprobs: refused where they ask for something.
        top_k, min_p, repetition_penalty, seed, stop, chat_template_kwargs, cache_salt, priority: as in chats.
    """

    engine_names: ClassVar[Mapping[str, str]] = {"max_tokens": "max_output_tokens", "messages": "input"}

    input: str | list[dict[str, Any]]
    model: str | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    store: bool | None = None
    text: dict[str, Any] | None = None
    reasoning: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    truncation: str | None = None
    include: list[str] | None = None
    metadata: dict[str, Any] | None = None
    user: str | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    max_tool_calls: int | None = None
    previous_response_id: str | None = None
    conversation: str | dict[str, Any] | None = None
    prompt: dict[str, Any] | None = None
    background: bool | None = None
    top_logprobs: int | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    cache_salt: str | None = None
    priority: int | None = None


class ResponseUsage(msgspec.Struct):
    """How many tokens a response took."""

    input_tokens: int
    output_tokens: int
    total_tokens: int
    input_tokens_details: dict[str, int]
    output_tokens_details: dict[str, int]


class ResponseObject(msgspec.Struct):
    """The response, or its state in a stream."""

    id: str
    created_at: int
    model: str
    status: str
    output: list[dict[str, Any]]
    object: str = "response"
    error: dict[str, Any] | None = None
    incomplete_details: dict[str, Any] | None = None
    instructions: str | None = None
    metadata: dict[str, Any] = {}
    parallel_tool_calls: bool = True
    previous_response_id: None = None
    temperature: float | None = None
    top_p: float | None = None
    max_output_tokens: int | None = None
    tool_choice: str | dict[str, Any] = "auto"
    tools: list[dict[str, Any]] = []
    text: dict[str, Any] | UnsetType = UNSET
    usage: ResponseUsage | None = None
