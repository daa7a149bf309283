"""HTTP beneath the endpoints: bodies within limits, JSON answers, event streams whose clients may leave or be slow."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope

from pace.server.protocol.errors import ApiError
from pace.server.protocol.messages import AnthropicError

__all__ = [
    "Disconnected",
    "decode",
    "error_response",
    "json_bytes",
    "json_response",
    "read_body",
    "until_disconnect",
]

T = TypeVar("T")

_encoder = msgspec.json.Encoder()
_decoders: dict[type, msgspec.json.Decoder[Any]] = {}


class Disconnected(Exception):
    """The client has gone before its request was complete."""


def json_bytes(value: object) -> bytes:
    """A value as JSON."""
    return _encoder.encode(value)


def json_response(value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """An answer with a JSON body."""
    return Response(json_bytes(value), status, headers, media_type="application/json")


def error_response(error: ApiError, path: str = "") -> Response:
    """The answer that an error is at a path: at Anthropic's it has Anthropic's shape."""
    is_anthropic = path.split("/")[1:3] == ["v1", "messages"]
    body = AnthropicError.of(error.status, str(error)) if is_anthropic else error.body
    return json_response(body, error.status, error.headers)


async def read_body(scope: Scope, receive: Receive, max_bytes: int, timeout_s: float) -> bytes:
    """A request's body.

    Raises:
        ApiError: it is larger than max_bytes (413), or took longer than timeout_s (408).
        Disconnected: the client left.
    """
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit() and int(value[:20]) > max_bytes:
            raise _too_large(max_bytes)

    async def read() -> bytes:
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise Disconnected
            body += message.get("body", b"")
            if len(body) > max_bytes:
                raise _too_large(max_bytes)
            if not message.get("more_body", False):
                return bytes(body)

    try:
        return await asyncio.wait_for(read(), timeout_s)
    except asyncio.TimeoutError:
        raise ApiError(
            408, f"the body took longer than {timeout_s:g} s", headers={"connection": "close"}
        ) from None


def _too_large(max_bytes: int) -> ApiError:
    return ApiError(
        413,
        f"the body is larger than {max_bytes} bytes, the limit of this server; raise --max-body-bytes",
        code="body_too_large",
        headers={"connection": "close"},
    )


def decode(kind: type[T], body: bytes) -> T:
    """A request's JSON as its type.

    Raises:
        ApiError: it is no JSON, or not of this type; the message names the field.
    """
    decoder = _decoders.get(kind)
    if decoder is None:
        decoder = _decoders[kind] = msgspec.json.Decoder(kind)
    try:
        return decoder.decode(body)  # type: ignore[no-any-return]  # the table is by kind
    except msgspec.ValidationError as error:
        message = str(error)
        field = message.split("`")[1] if "unknown field" in message or "required field" in message else ""
        at = message.rpartition("`$.")[2].rstrip("`") if "`$." in message else ""
        param = ".".join(part for part in (at, field) if part) or None
        unknown = "unknown field" in message
        hint = "; this server refuses fields that it does not know" if unknown else ""
        raise ApiError(
            400, message[:500] + hint, param=param, code="unknown_field" if unknown else "invalid_value"
        ) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ApiError(400, f"the body is not valid JSON: {error}"[:500], code="invalid_json") from None
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply", code="invalid_json") from None


async def until_disconnect(receive: Receive, leave: Callable[[], None]) -> None:
    """Call `leave` when the client goes; run as a task beside the answer, its body read before."""
    while (await receive())["type"] != "http.disconnect":
        pass
    leave()
