"""An engine in a child process: orders come and events go over one inherited socket, `python -m pace.server.worker FD`."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from contextlib import suppress
from typing import Any

import uvloop

from pace import log
from pace.config import EngineConfig
from pace.console import err
from pace.errors import PaceError, one_line
from pace.server.station import Station
from pace.server.wire import (
    Abort,
    Beat,
    Configure,
    Detokenize,
    Event,
    Frames,
    Job,
    Order,
    Refused,
    Tokenize,
    frame,
)

__all__ = ["BEAT_S", "main"]

BEAT_S = 0.25


def main(number: int) -> int:
    """Serve the front-end at the other end of a socket until it closes it.

    Args:
        number: of the inherited descriptor.
    """
    log.configure()
    link = socket.socket(fileno=number)
    frames = Frames(Order)
    configure: list[Any] = []
    while not configure:
        data = link.recv(1 << 16)
        if not data:
            return 0
        configure = frames.push(data)
    order = configure[0]
    try:
        station = _load(order)
    except Exception as error:
        with suppress(OSError):
            link.sendall(frame([_last_words(error)]))
        return 1
    loop = uvloop.new_event_loop()
    try:
        return loop.run_until_complete(_serve(station, link, frames))
    finally:
        station.close()
        loop.close()


def _last_words(error: Exception) -> Refused:
    """Why there is no engine, or none any more."""
    kind = type(error).__name__ if isinstance(error, PaceError) else "PaceError"
    text = str(error) if isinstance(error, PaceError) else f"{type(error).__name__}: {error}"
    return Refused(0, kind, one_line(text))


def _load(order: Configure) -> Station:
    from pace.speculative import load

    if order.cpus:
        os.sched_setaffinity(
            0, order.cpus
        )  # before anything is allocated: memory lies where it is first touched
    config = EngineConfig(**order.config)
    on_plan = (lambda plan: err(f"[memory: {plan.describe()}]")) if order.talks else None
    station = Station.from_loaded(
        config, load(config, on_plan=on_plan, show_progress=None if order.talks else False)
    )
    station.parsers = order.parsers
    return station


async def _serve(station: Station, link: socket.socket, frames: Frames) -> int:
    """Returns the exit code: 0 where the front-end has closed the link, 1 where the engine can't go on."""
    loop = asyncio.get_running_loop()
    closed = asyncio.Event()
    transport, _ = await loop.create_unix_connection(lambda: _Link(station, frames, closed), sock=link)

    def tell(events: list[Event]) -> None:
        if not transport.is_closing():
            transport.write(frame(events))

    station.open(loop, tell)
    tell([station.info()])
    while not closed.is_set():
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(closed.wait(), BEAT_S)
        try:
            station.check()
        except PaceError as error:  # a process that lives on would be taken for an engine that works
            tell([_last_words(error)])
            transport.close()
            return 1
        tell([Beat(station.beat())])
    transport.close()
    return 0


class _Link(asyncio.Protocol):
    """Reads orders."""

    def __init__(self, station: Station, frames: Frames, closed: asyncio.Event) -> None:
        self._station = station
        self._frames = frames
        self._closed = closed

    def data_received(self, data: bytes) -> None:
        for order in self._frames.push(data):
            if isinstance(order, Job):
                self._station.submit(order)
            elif isinstance(order, Abort):
                self._station.abort(order.id)
            elif isinstance(order, Tokenize):
                self._station.tokenize(order)
            elif isinstance(order, Detokenize):
                self._station.detokenize(order)

    def connection_lost(self, error: Exception | None) -> None:
        self._closed.set()


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
