"""uvicorn's HTTP protocol with the bounds that it lacks: on the head of a request, in bytes, lines and seconds.

Measured on uvicorn 0.54 with httptools: one header of 200 MB took 200 MB of memory, and 500 half-open requests stayed open.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from pace.server.http import json_bytes
from pace.server.protocol.errors import ErrorBody, ErrorObject

__all__ = ["Guarded", "Output", "guarded"]

MAX_HEAD_BYTES = 64 << 10
MAX_HEADERS = 100
HEAD_TIMEOUT_S = 5.0


class Output:
    """Writes the body of a stream straight to the client, once its head has been sent.

    Args:
        transport: the connection's.
        flow: knows whether the client keeps up.
        cycle: the request's; uvicorn would send a client of HTTP/1.0 chunks, which it can't read.
    """

    def __init__(self, transport: asyncio.Transport, flow: FlowControl, cycle: RequestResponseCycle) -> None:
        self.n_bytes = 0
        self._transport = transport
        self._flow = flow
        self._cycle = cycle
        self._is_chunked = cycle.scope["http_version"] != "1.0"

    def begin(self) -> None:
        """Before the head: whether chunks follow, or bytes until the connection ends."""
        if not self._is_chunked:
            self._cycle.chunked_encoding = False

    def write(self, data: bytes) -> None:
        """Write a piece of the body; never waits."""
        if data and not self._transport.is_closing():
            self._transport.write(b"%x\r\n%b\r\n" % (len(data), data) if self._is_chunked else data)
            self.n_bytes += len(data)

    def end(self, data: bytes) -> bytes:
        """Write the last piece; returns what is left of it for the server, which ends the body."""
        if self._is_chunked:
            return data  # in one write with the last chunk
        self.write(data)
        return b""

    @property
    def is_paused(self) -> bool:
        """Whether 64 KiB wait for the client to take them."""
        return self._flow.write_paused

    async def drain(self) -> None:
        """Wait until it has taken most of them, or has gone."""
        await self._flow.drain()

    def abort(self) -> None:
        """End the connection at once."""
        self._transport.abort()


class Guarded(HttpToolsProtocol):
    """One connection; gives endpoints its `Output` as scope["pace.output"]."""

    head_timeout_s = HEAD_TIMEOUT_S

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client has come: it has so many seconds for the head of its first request."""
        super().connection_made(transport)  # type: ignore[arg-type]  # as uvicorn declares it
        self._n_head_bytes = 0
        self._in_head = True
        self._timer = self._arm()

    def _arm(self) -> asyncio.TimerHandle:
        return asyncio.get_running_loop().call_later(self.head_timeout_s, self._head_timeout)

    def _head_timeout(self) -> None:
        if self._in_head and not self.transport.is_closing():
            self.transport.close()

    def data_received(self, data: bytes) -> None:
        """Count what belongs to a head that is not complete."""
        if self._in_head:
            self._n_head_bytes += len(data)
            if self._n_head_bytes > MAX_HEAD_BYTES and self._parse_ends_head(data):
                return
        super().data_received(data)

    def _parse_ends_head(self, data: bytes) -> bool:
        """Refuse a head that is too long; False where its end and the beginning of the body are in `data`."""
        end = data.find(b"\r\n\r\n")
        if end >= 0 and self._n_head_bytes - len(data) + end <= MAX_HEAD_BYTES:
            return False
        self._refuse(
            431, "Request Header Fields Too Large", f"the head of a request is over {MAX_HEAD_BYTES} bytes"
        )
        return True

    def on_message_begin(self) -> None:
        """The first byte of a request."""
        if not self._in_head:  # of a later one on this connection
            self._in_head = True
            self._n_head_bytes = 0
            self._timer = self._arm()
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        """One line of the head."""
        if len(self.headers) >= MAX_HEADERS:
            raise ValueError(f"more than {MAX_HEADERS} headers")  # httptools ends the connection with 400
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The head is complete."""
        self._in_head = False
        self._timer.cancel()
        super().on_headers_complete()
        scope: Any = self.scope
        scope["pace.output"] = Output(self.transport, self.flow, self.cycle)

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP is answered as every other error."""
        self._refuse(400, "Bad Request", msg)

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has gone."""
        self._timer.cancel()
        super().connection_lost(exc)

    def _refuse(self, status: int, phrase: str, message: str) -> None:
        body = json_bytes(ErrorBody(ErrorObject(message, "invalid_request_error", None, "bad_request")))
        head = (
            f"HTTP/1.1 {status} {phrase}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
            "connection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()


def guarded(head_timeout_s: float) -> type[Guarded]:
    """The protocol with another time for heads."""
    return type("Guarded", (Guarded,), {"head_timeout_s": head_timeout_s})
