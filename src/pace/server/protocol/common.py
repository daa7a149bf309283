"""What completions and chats have in common: how tokens are drawn, streaming, counts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import msgspec
from msgspec import UNSET, UnsetType

__all__ = [
    "IGNORED",
    "JsonSchemaFormat",
    "ModelCard",
    "ModelList",
    "ResponseFormat",
    "Sampling",
    "StreamOptions",
    "Strict",
    "StructuredOutputs",
    "Usage",
]

IGNORED = frozenset({
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
})  # fmt: skip
"""Fields that say something to OpenAI's own service and nothing about the answer: taken, and without effect."""


class Strict(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Base of what is read: a field that is not listed is refused by name."""

    engine_names: ClassVar[Mapping[str, str]] = {}
    """Names of the engine's parameters to those that this request has for them; for messages of errors."""


class StreamOptions(Strict, kw_only=True):
    """How a stream is cut into chunks, and how it ends.

    Attributes:
        include_usage: a last chunk tells how many tokens there were.
        continuous_usage_stats: every chunk does.
        one_token_per_chunk: tokens that one step has accepted together come in chunks of their own.
        include_obfuscation: taken for OpenAI's clients; nothing is ever obfuscated.
    """

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    one_token_per_chunk: bool | None = None
    include_obfuscation: bool | None = None


class JsonSchemaFormat(msgspec.Struct, kw_only=True):
    """A JSON schema with a name."""

    name: str
    schema: dict[str, Any] | bool | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(Strict, kw_only=True):
    """OpenAI's form of structured output: type is text, json_object or json_schema."""

    type: str
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputs(Strict, kw_only=True):
    """vLLM's form of structured output: exactly one field."""

    json: dict[str, Any] | str | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class Sampling(Strict, kw_only=True):
    """How tokens are drawn: the fields of `SamplingParams`, and what else completions and chats share.

    null counts as not given.
    """

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    logit_bias: dict[str, float] | None = None
    bad_words: list[str] | None = None
    allowed_token_ids: list[int] | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    speculative: str | int | None = None
    structured_outputs: StructuredOutputs | None = None
    response_format: ResponseFormat | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    priority: int | None = None
    cache_salt: str | None = None
    request_id: str | None = None
    return_token_ids: bool | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None


class PromptDetails(msgspec.Struct):
    """Of the prompt's tokens."""

    cached_tokens: int = 0


class CompletionDetails(msgspec.Struct):
    """Of the output's tokens."""

    reasoning_tokens: int = 0


class Usage(msgspec.Struct):
    """How many tokens a request took."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0
    prompt_tokens_details: PromptDetails | None = None
    completion_tokens_details: CompletionDetails | UnsetType = UNSET


class ModelCard(msgspec.Struct):
    """One model that is served."""

    id: str
    created: int
    max_model_len: int
    root: str
    object: str = "model"
    owned_by: str = "pace"
    parent: str | None = None
    permission: list[dict[str, Any]] = []


class ModelList(msgspec.Struct):
    """The models that are served."""

    data: list[ModelCard]
    object: str = "list"
