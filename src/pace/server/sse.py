"""Server-sent events: one JSON object per event, and how a stream ends."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

from pace.server.backend import Call
from pace.server.http import json_bytes
from pace.server.protocol.errors import ApiError
from pace.server.service import check_failed
from pace.server.wire import Event

__all__ = ["DONE", "event", "named_event", "stream"]

DONE = b"data: [DONE]\n\n"


def event(value: object) -> bytes:
    """An event whose data is a JSON object."""
    return b"data: " + json_bytes(value) + b"\n\n"


def named_event(name: str, value: object) -> bytes:
    """An event with a name, as Anthropic's and OpenAI's newer streams have them."""
    return b"event: " + name.encode() + b"\ndata: " + json_bytes(value) + b"\n\n"


async def stream(
    call: Call,
    first: bytes,
    take: Callable[[Event], bytes],
    last: Callable[[], bytes],
    fail: Callable[[ApiError], bytes] = lambda error: event(error.body),
) -> AsyncIterator[bytes]:
    """The bytes of a stream: what comes in one step goes out in one piece.

    Args:
        first: before everything.
        take: an event of the engine as bytes.
        last: behind everything, where nothing failed.
        fail: the farewell where an engine did.
    """
    try:
        if first:
            yield first
        async for events in call.events():
            parts = []
            for one in events:
                check_failed(one)
                parts.append(take(one))
            chunk = b"".join(parts)
            if chunk:
                yield chunk
        if not call.is_cancelled:
            yield last()
    except ApiError as error:
        yield fail(error)
    finally:
        call.close()
