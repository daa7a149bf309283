"""`/v1/embeddings`."""

from __future__ import annotations

import base64
from functools import partial
from typing import Any

import msgspec
import numpy as np
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from pace.pooling_params import PoolingParams
from pace.server.backend import Call
from pace.server.http import json_bytes, json_response
from pace.server.protocol.embeddings import EmbeddingsRequest, EmbeddingUsage
from pace.server.protocol.errors import ApiError
from pace.server.requests import MAX_FAN_OUT, id_of, texts_of
from pace.server.service import Service
from pace.server.wire import Embedded, Event, Job, Pooling

__all__ = ["embeddings"]

MAX_INPUTS = 2048  # of one request, as OpenAI


class _Item(msgspec.Struct):
    """An `EmbeddingObject` whose vector is JSON already: 2000 of them at once would hold up every stream for a second."""

    index: int
    embedding: msgspec.Raw
    object: str = "embedding"


class _Body(msgspec.Struct):
    data: list[_Item]
    model: str
    usage: EmbeddingUsage
    object: str = "list"


class _Writer:
    """Writes the answer to one request; its inputs come in several calls.

    Args:
        as_base64: in place of numbers.
    """

    def __init__(self, as_base64: bool) -> None:
        self._as_base64 = as_base64
        self.items: dict[int, _Item] = {}
        self.n_prompt = 0

    def add(self, call: Call, first: int, one: Event) -> None:
        """Keep what an event says of the call whose inputs begin at `first`."""
        if isinstance(one, Embedded):
            at = first + call.positions[one.id]
            self.items[at] = _Item(at, msgspec.Raw(json_bytes(self._vector(one.data))))
            self.n_prompt += one.n_prompt

    def _vector(self, data: bytes) -> Any:
        if self._as_base64:
            return base64.b64encode(data).decode()
        return np.frombuffer(data, dtype="<f4").tolist()

    def whole(self, model: str) -> _Body:
        """The answer."""
        items = [self.items[at] for at in sorted(self.items)]
        return _Body(items, model, EmbeddingUsage(self.n_prompt, self.n_prompt))


async def embeddings(service: Service, http: HttpRequest) -> Response:
    """Turn texts into vectors."""
    request = await service.read(http, EmbeddingsRequest)
    model = service.check_model(request.model)
    if request.add_special_tokens is False:
        raise ApiError(
            400,
            "add_special_tokens is false; give token ids to say exactly what the input is",
            param="add_special_tokens",
            code="unsupported_parameter",
        )
    normalize = request.normalize is not False
    PoolingParams(pooling=request.pooling, normalize=normalize, dimensions=request.dimensions)
    pooling = Pooling(request.pooling, normalize, request.dimensions)
    inputs = texts_of(request.input, "input")
    if len(inputs) > MAX_INPUTS:
        raise ApiError(400, f"input has {len(inputs)} entries, expected at most {MAX_INPUTS}", param="input")
    number = id_of(request.request_id, http.scope["pace.id"])
    writer = _Writer(request.encoding_format == "base64")
    # Not all at once: they would fill the queue, and be refused where a part of them would not.
    for first in range(0, len(inputs), MAX_FAN_OUT):
        some = inputs[first : first + MAX_FAN_OUT]

        def jobs(call: Call, some: list[str | list[int]] = some) -> list[Job]:
            return [
                Job(
                    call.ids[i],
                    number,
                    text,
                    None,
                    {},
                    request.priority or 0,
                    request.cache_salt,
                    pooling=pooling,
                )
                for i, text in enumerate(some)
            ]

        call = await service.call(http, jobs, len(some))
        await service.collect(call, partial(writer.add, call, first))
    return json_response(writer.whole(model))
