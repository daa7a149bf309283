"""Engines as child processes: how they are started, heard, watched and ended."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pace.errors import PaceError, RequestError
from pace.log import logger
from pace.server.backend import error_of
from pace.server.wire import Beat, Configure, Event, Frames, Info, Order, Refused, frame

__all__ = ["WATCH_S", "Worker"]

WATCH_S = 0.1  # processes are looked at so often
N_STOPPED = 3  # looks at which a process was stopped: then it is taken for dead
SILENCE_S = 30.0  # without a heartbeat
LATE_S = 1.0  # a look that comes so late says that this process did not run either
END_S = 2.0  # a process may take to end


class Worker:
    """One engine's process.

    Attributes:
        state: "loading", "ready" or "dead".
        info, stats: what it says of itself.
        n_open: sequences that it has and that have not ended.
        numbers: {job id: sequences} of the jobs that it has.

    Args:
        index: which of the engines it is.
        configure: its first order.
        on_events: takes what it says.
        on_state: called when it becomes ready, or dies.
        stall_timeout_s: unfinished requests and no step for so long: it hangs.
    """

    def __init__(
        self,
        index: int,
        configure: Configure,
        on_events: Callable[[Worker, list[Event]], None],
        on_state: Callable[[Worker], None],
        stall_timeout_s: float,
    ) -> None:
        self.index = index
        self.state = "loading"
        self.why = "the model is being loaded"
        self.error: PaceError | None = None  # why loading failed
        self.info: Info | None = None
        self.stats: dict[str, Any] = {}
        self.n_open = 0
        self.numbers: dict[int, int] = {}
        self._configure = configure
        self._on_events = on_events
        self._on_state = on_state
        self._stall_timeout_s = stall_timeout_s
        self._n_stopped = 0
        self._transport: asyncio.WriteTransport | None = None

    async def start(self) -> None:
        """Start the process; it becomes ready later."""
        ours, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "pace.server.worker", str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C and Ctrl-Z are the front-end's
            )
        loop = asyncio.get_running_loop()
        ours.setblocking(False)
        self._heard_s = self._moved_s = self._watched_s = loop.time()
        transport, _ = await loop.create_unix_connection(lambda: _Link(self), sock=ours)
        self._transport = transport
        self.send(self._configure)

    def send(self, order: Order) -> None:
        """Tell it something.

        Raises:
            RequestError: a number in it is beyond what a message can hold.
        """
        try:
            data = frame([order])
        except OverflowError:
            raise RequestError("a number in the request is beyond 64 bits, expected one below") from None
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    def hear(self, events: list[Event]) -> None:
        """It has said something."""
        now_s = asyncio.get_running_loop().time()
        self._heard_s = now_s
        rest: list[Event] = []
        for event in events:
            if isinstance(event, Beat):
                self._note(event.stats, now_s)
            elif isinstance(event, Info):
                self.info = event
                self._note(event.stats, now_s)
                self.state, self.why = "ready", ""
                self._on_state(self)
            elif isinstance(event, Refused) and event.id == 0:
                self.error = error_of(event)
                self.die(str(self.error))
            else:
                rest.append(event)
        if rest:
            self._on_events(self, rest)

    def _note(self, stats: dict[str, Any], now_s: float) -> None:
        if stats.get("n_steps") != self.stats.get("n_steps") or not stats.get("n_requests"):
            self._moved_s = now_s
        self.stats = stats

    def watch(self) -> None:
        """Look whether it lives and moves."""
        if self.state == "dead":
            return
        code = self.process.poll()
        if code is not None:
            self.die(f"the engine's process has ended with code {code}")
            return
        self._n_stopped = self._n_stopped + 1 if _is_stopped(self.process.pid) else 0
        now_s = asyncio.get_running_loop().time()
        late_s = now_s - self._watched_s - WATCH_S
        self._watched_s = now_s
        if late_s > LATE_S:  # after Ctrl-Z and fg, say: what it said meanwhile has not been read yet
            self._heard_s += late_s
            self._moved_s += late_s
        if self._n_stopped >= N_STOPPED:
            self.die("the engine's process has been stopped")
        elif self.state == "ready" and now_s - self._heard_s > SILENCE_S:
            self.die(f"the engine's process has been silent for {SILENCE_S:g} s")
        elif self.state == "ready" and now_s - self._moved_s > self._stall_timeout_s:
            self.die(f"the engine has made no step for {self._stall_timeout_s:g} s")

    def die(self, why: str) -> None:
        """End it, whatever it does; the first reason counts."""
        if self.state == "dead":
            return
        logger.error("engine %d: %s", self.index, why)
        self.state, self.why = "dead", why
        self.end()
        self._on_state(self)

    def end(self) -> None:
        """Kill the process, where it runs."""
        if self._transport is not None:
            self._transport.abort()
        if self.process.poll() is None:
            self.process.kill()

    def hang_up(self) -> None:
        """Let it end by itself."""
        if self._transport is not None:
            self._transport.close()

    async def gone(self) -> None:
        """Wait until the process has ended; it is killed where it takes too long."""
        loop = asyncio.get_running_loop()
        try:
            await loop.run_in_executor(None, self.process.wait, END_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            await loop.run_in_executor(None, self.process.wait)


class _Link(asyncio.Protocol):
    """Reads what a worker says."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._frames = Frames(Event)

    def data_received(self, data: bytes) -> None:
        try:
            events = self._frames.push(data)
        except ValueError as error:
            self._worker.die(f"the engine's process says what is no message: {error}")
        else:
            self._worker.hear(events)

    def connection_lost(self, error: Exception | None) -> None:
        self._worker.die("the engine's process has ended")


def _is_stopped(pid: int) -> bool:
    """Whether a signal or a debugger holds the process."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return False
    return state in "Tt"
