"""`/v1/embeddings`, as OpenAI has it."""

from __future__ import annotations

from typing import Literal

import msgspec

from pace.server.protocol.common import Strict

__all__ = ["EmbeddingObject", "EmbeddingUsage", "Embeddings", "EmbeddingsRequest"]


class EmbeddingsRequest(Strict, kw_only=True):
    """Turn texts into vectors.

    Attributes:
        input: a text, its token ids, or a list of either.
        encoding_format: float (the default), or base64 of little-endian f32.
        dimensions: keep the first so many numbers.
        pooling: last or mean; by default what the checkpoint names, else last.
        normalize: divide by the length (true by default).
        add_special_tokens: only true: token ids say exactly what the prompt is.
        priority, cache_salt, request_id: as in completions.
        user: taken, and without effect.
    """

    input: str | list[str | int | list[int]]
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    pooling: Literal["last", "mean"] | None = None
    normalize: bool | None = None
    add_special_tokens: bool | None = None
    priority: int | None = None
    cache_salt: str | None = None
    request_id: str | None = None
    user: str | None = None


class EmbeddingObject(msgspec.Struct):
    """One vector."""

    index: int
    embedding: list[float] | str
    object: str = "embedding"


class EmbeddingUsage(msgspec.Struct):
    """How many tokens a request took."""

    prompt_tokens: int
    total_tokens: int


class Embeddings(msgspec.Struct):
    """The vectors, in the order of the texts."""

    data: list[EmbeddingObject]
    model: str
    usage: EmbeddingUsage
    object: str = "list"
