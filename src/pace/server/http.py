"""HTTP beneath the endpoints: bodies within limits, JSON answers, event streams whose clients may leave or be slow."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, TypeVar

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from pace.server.protocol.errors import ApiError

__all__ = [
    "Disconnected",
    "EventStream",
    "SlowClients",
    "decode",
    "error_response",
    "json_bytes",
    "json_response",
    "read_body",
    "until_disconnect",
]

T = TypeVar("T")

SSE_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",
}

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


def error_response(error: ApiError) -> Response:
    """The answer that an error is."""
    return json_response(error.body, error.status, error.headers)


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


class SlowClients:
    """Ends streams whose clients have taken nothing for a while; memory and a sequence's KV cache wait for them.

    Args:
        timeout_s: how long a client may take nothing.
    """

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self.streams: set[EventStream] = set()

    def end_slow(self) -> None:
        """Look at all streams; called every second or so."""
        too_old = time.monotonic() - self.timeout_s
        for stream in list(self.streams):
            if stream.sending_since is not None and stream.sending_since < too_old:
                stream.drop()


class EventStream(Response):
    """A stream of server-sent events.

    Args:
        chunks: their bytes; the iterator ends soon where the client has gone.
        close: called in any case at the end.
        slow: watches over slow clients.
    """

    def __init__(self, chunks: AsyncIterator[bytes], close: Callable[[], None], slow: SlowClients) -> None:
        super().__init__(headers=SSE_HEADERS)
        del self.headers["content-length"]
        self.sending_since: float | None = None
        self._chunks = chunks
        self._close = close
        self._slow = slow
        self._abort: Callable[[], None] | None = None

    def drop(self) -> None:
        """End the connection without a farewell."""
        self._close()
        if self._abort is not None:
            self._abort()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        transport = scope.get("pace.transport")
        self._abort = None if transport is None else transport.abort
        self._slow.streams.add(self)
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for chunk in self._chunks:
                self.sending_since = time.monotonic()
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
                self.sending_since = None
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self._slow.streams.discard(self)
            self._close()
