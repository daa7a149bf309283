"""A client that measures: HTTP/1.1 over asyncio's streams, an answer as pieces of its body with the time of each.

Of our own, because what a client does beside reading is measured with it, and pace depends on no HTTP client.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

from pace.errors import PaceError, RequestError, show

__all__ = ["Answer", "Client"]

MAX_HEAD = 1 << 16  # bytes
MAX_READ = 1 << 16


class Answer:
    """An answer whose head has come.

    Attributes:
        status: of HTTP.
        keeps_open: whether the connection can be used again once the body has been read.
    """

    def __init__(self, reader: asyncio.StreamReader, status: int, headers: dict[str, str]) -> None:
        self.status = status
        self._reader = reader
        self._is_chunked = "chunked" in headers.get("transfer-encoding", "").lower()
        self._length = headers.get("content-length")
        is_bounded = self._is_chunked or self._length is not None
        self.keeps_open = is_bounded and headers.get("connection", "").lower() != "close"

    async def pieces(self) -> AsyncIterator[tuple[float, bytes]]:
        """The body as it comes, with `time.perf_counter()` of each piece.

        Raises:
            PaceError: the connection ends before the body does.
        """
        if not self._is_chunked:
            async for piece in self._read(None if self._length is None else int(self._length)):
                yield piece
            return
        while size := int((await _line(self._reader)).split(b";")[0], 16):
            async for piece in self._read(size):
                yield piece
            await _line(self._reader)
        await _line(self._reader)

    async def _read(self, left: int | None) -> AsyncIterator[tuple[float, bytes]]:
        """So many bytes; None: up to the end of the connection."""
        while left is None or left > 0:
            data = await self._reader.read(MAX_READ if left is None else min(left, MAX_READ))
            if not data:
                if left is None:
                    return
                raise PaceError("the server has closed the connection in the middle of an answer")
            yield time.perf_counter(), data
            left = None if left is None else left - len(data)

    async def body(self) -> bytes:
        """All of it."""
        return b"".join([data async for _, data in self.pieces()])

    async def events(self) -> AsyncIterator[tuple[float, bytes]]:
        """The data of server-sent events, with `time.perf_counter()` of each."""
        held = b""
        async for now_s, data in self.pieces():
            held += data.replace(b"\r\n", b"\n")
            *events, held = held.split(b"\n\n")
            for event in events:
                for line in event.split(b"\n"):
                    if line.startswith(b"data:"):
                        yield now_s, line[5:].strip()


class Client:
    """Connections to one server; those that are idle are used again.

    Args:
        base_url: such as http://127.0.0.1:8000; what it has of a path stands before every path.
        api_key: sent as bearer.
    """

    def __init__(self, base_url: str, api_key: str | None = None) -> None:
        url = urlsplit(base_url)
        if url.scheme not in ("http", "https") or not url.hostname:
            raise RequestError(f"base URL is {show(base_url)}, expected one such as http://127.0.0.1:8000")
        self._host = url.hostname
        self._port = url.port or (443 if url.scheme == "https" else 80)
        self._tls = ssl.create_default_context() if url.scheme == "https" else None
        self._prefix = url.path.rstrip("/")
        self._head = f"Host: {url.netloc.rpartition('@')[2]}\r\nAccept: */*\r\n"
        if api_key is not None:
            self._head += f"Authorization: Bearer {api_key}\r\n"
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    @asynccontextmanager
    async def request(self, method: str, path: str, body: bytes = b"") -> AsyncIterator[Answer]:
        """Send a request; the answer is to be read within the with block.

        Raises:
            PaceError: there is no connection, or no answer.
        """
        head = f"{method} {self._prefix}{path} HTTP/1.1\r\n{self._head}Content-Length: {len(body)}\r\n"
        data = f"{head}Content-Type: application/json\r\n\r\n".encode() + body
        answer: Answer | None = None
        writer: asyncio.StreamWriter | None = None
        is_read = False
        try:
            reader, writer, is_used = await self._connect()
            try:
                writer.write(data)
                await writer.drain()
                answer = await _head(reader)
            except (OSError, asyncio.IncompleteReadError):
                if not is_used:
                    raise
                # The server has just closed what was idle: that is no answer to this request.
                writer.close()
                self.close()
                reader, writer, _ = await self._connect()
                writer.write(data)
                answer = await _head(reader)
            yield answer
            is_read = True
        except (OSError, ValueError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
            raise PaceError(f"{self._host}:{self._port}: {error or type(error).__name__}") from None
        finally:
            if writer is not None:
                if is_read and answer is not None and answer.keeps_open:
                    self._idle.append((reader, writer))
                else:
                    writer.close()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter, bool]:
        """A connection, and whether it has been used before."""
        while self._idle:
            reader, writer = self._idle.pop()
            if not (reader.at_eof() or writer.is_closing()):
                return reader, writer, True
            writer.close()
        reader, writer = await asyncio.open_connection(self._host, self._port, ssl=self._tls, limit=MAX_HEAD)
        return reader, writer, False

    def close(self) -> None:
        """Close the connections."""
        for _, writer in self._idle:
            writer.close()
        self._idle.clear()


async def _line(reader: asyncio.StreamReader) -> bytes:
    return (await reader.readuntil(b"\r\n"))[:-2]


async def _head(reader: asyncio.StreamReader) -> Answer:
    lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    status = int(lines[0].split(" ")[1])
    headers = {}
    for line in lines[1:]:
        name, _, value = line.partition(":")
        headers[name.strip().lower()] = value.strip()
    return Answer(reader, status, headers)
