"""`/v1/completions`: text in, text on."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from pace.server.protocol.common import Sampling, Usage

__all__ = ["Choice", "Completion", "CompletionRequest", "Logprobs"]


class CompletionRequest(Sampling, kw_only=True):
    """Continue a prompt, or each of several.

    Attributes:
        prompt: text, token ids, or a list of either.
        suffix: refused unless empty: no model of pace fills in middles.
        echo: the text begins with the prompt.
        logprobs: so many most probable tokens at each position, besides the drawn one.
        best_of: only with the value of n, which changes nothing.
        add_special_tokens: whether a text prompt gets what the tokenizer adds, such as BOS; only true.
    """

    prompt: str | list[str | int | list[int]]
    suffix: str | None = None
    echo: bool | None = None
    logprobs: int | None = None
    best_of: int | None = None
    add_special_tokens: bool | None = None


class Logprobs(msgspec.Struct):
    """Log probabilities of a text's tokens; null for the first of an echoed prompt, which nothing predicts."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class Choice(msgspec.Struct):
    """One completion, or what is new of it."""

    index: int
    text: str
    logprobs: Logprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: list[dict[str, Any] | None] | UnsetType = UNSET


class Completion(msgspec.Struct):
    """An answer, or a chunk of one."""

    id: str
    created: int
    model: str
    choices: list[Choice]
    object: str = "text_completion"
    system_fingerprint: str | None = None
    usage: Usage | UnsetType | None = UNSET
    speculative: dict[str, Any] | UnsetType = UNSET
