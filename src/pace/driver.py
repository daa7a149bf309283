"""The thread that steps an engine, and how its outputs reach those who wait for them."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from queue import Empty, SimpleQueue
from typing import TypeAlias

from pace.engine.core import Engine
from pace.engine.request import Request
from pace.errors import CapacityError, EngineDeadError, ForkError, PaceError, RequestError, one_line, show
from pace.outputs import CompletionOutput, RequestOutput, ToolCall
from pace.params import RequestOutputKind

__all__ = ["Driver", "Inbox", "Notify", "Ticket", "merged"]

NO_THREADS = "raise the limit on processes (ulimit -u, or the container's pids limit)"

Notify: TypeAlias = "Callable[[list[Ticket]], None]"


class Ticket:
    """A request in the engine, and the output of it that nobody has read yet.

    One slot, whatever the reader's pace: memory stays bounded. In an output of kind DELTA the unread parts
    are joined, of the other kinds the newest says everything. Only a request that wants its tokens one by one
    keeps all that are unread.

    Args:
        request: prepared by the engine.
        notify: called in the engine's thread, once per step, with those of its tickets that got something
            to read. It may raise RuntimeError where nobody can read any more.
    """

    __slots__ = ("_is_delta", "_is_joined", "_lock", "_unread", "finished", "notify", "request", "request_id")

    def __init__(self, request: Request, notify: Notify) -> None:
        self.request = request
        self.request_id = request.request_id
        self.notify = notify
        self.finished = False  # the last output has been put here
        self._is_delta = request.stream and request.params.output_kind is RequestOutputKind.DELTA
        self._is_joined = not (self._is_delta and request.one_by_one)
        self._unread: deque[RequestOutput] = deque()
        self._lock = threading.Lock()

    def put(self, output: RequestOutput) -> bool:
        """Add an output; returns whether there was nothing to read before."""
        with self._lock:
            was_empty = not self._unread
            if not was_empty and self._is_joined:
                old = self._unread.pop()
                output = merged(old, output) if self._is_delta else output
            self._unread.append(output)
            self.finished = self.finished or output.finished
            return was_empty

    def take(self) -> RequestOutput | None:
        """Read what has come since the last call; None: nothing."""
        with self._lock:
            return self._unread.popleft() if self._unread else None


Inbox: TypeAlias = "SimpleQueue[list[Ticket]]"
"""Of a caller who sleeps until one of its tickets has something to read: their `notify` is its `put`.

Written in C, as is Bell's lock: Ctrl-C raises KeyboardInterrupt between any two lines of Python, and in the
middle of a Condition's it would leave a lock behind that nobody opens.
"""


class Bell:
    """Wakes one thread. A ring is remembered until it is heard; further ones until then are the same one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()

    def ring(self) -> None:
        with suppress(RuntimeError):  # it rings already
            self._lock.release()

    def wait(self) -> None:
        self._lock.acquire()


class Driver:
    """Steps an engine in a thread of its own, which sleeps while there is nothing to do.

    Its own thread, because Python runs signal handlers in the main one: were the step to run there, Ctrl-C
    could end it halfway and leave the engine in no state at all.

    Args:
        engine: nobody else may step it.
        release: called once when the thread ends; frees what the engine needs.
        on_demand: step only while somebody is in `wait`, so that an engine runs no further than its callers
            read; otherwise whenever a request has not finished.
    """

    def __init__(self, engine: Engine, release: Callable[[], None], *, on_demand: bool) -> None:
        self._engine = engine
        self._release = release
        self._on_demand = on_demand
        self._pid = os.getpid()
        self._bell = Bell()
        self._tickets: dict[str, Ticket] = {}  # by request id
        self._waiting: set[Inbox] = set()
        self._closing = False
        self._ended: Callable[[], PaceError] | None = None  # why nothing can be asked any more
        self._thread = threading.Thread(target=self._run, name="pace-engine", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:  # the only one that it raises here
            raise CapacityError(f"the engine needs a thread of its own: {error}; {NO_THREADS}") from None

    def check(self) -> None:
        """Raises ForkError, EngineDeadError or PaceError where the engine can't be used any more."""
        if os.getpid() != self._pid:
            raise ForkError(
                "this engine belongs to the parent process; build it after the fork, or use spawn"
            )
        if self._ended is not None:
            raise self._ended()
        if self._closing:
            raise PaceError("this engine is closed")

    def submit(self, ticket: Ticket, *, bounded: bool = True) -> None:
        """Accept a request; whatever happens then, `drop` it in the end.

        Args:
            bounded: refuse it where the engine's queue is full.

        Raises:
            RequestError: its id is in use.
            QueueFullError: too many requests wait.
        """
        self.check()
        request_id = ticket.request_id
        if self._tickets.setdefault(request_id, ticket) is not ticket:
            raise RequestError(f"request id {show(request_id)} is in use; choose another")
        try:
            self._engine.submit(ticket.request, bounded=bounded)
        except BaseException:
            # A KeyboardInterrupt may have come when the engine had it already: then its outputs will come too.
            if self._engine.intake.requests.get(request_id) is not ticket.request:
                del self._tickets[request_id]
            raise
        self.check()  # once more: had the thread ended before it could see the ticket, nobody would wake us
        self._bell.ring()

    def abort(self, request_id: str) -> None:
        """End a request before the next step; its reader gets what there is of it. Others are ignored."""
        self.check()
        ticket = self._tickets.get(request_id)
        if ticket is not None:
            self.drop(ticket)

    def drop(self, ticket: Ticket) -> None:
        """End a request before the next step, where it still runs."""
        if os.getpid() != self._pid:
            return  # a generator that a forked child inherited
        if self._ended is None and self.holds(ticket):
            self._engine.cancel(ticket.request)
            self._bell.ring()

    def holds(self, ticket: Ticket) -> bool:
        """Whether the ticket's last output is still to come."""
        return self._tickets.get(ticket.request_id) is ticket

    def wait(self, inbox: Inbox, timeout_s: float | None = None) -> list[Ticket]:
        """Sleep until tickets of this inbox have something to read; meanwhile the engine steps.

        Returns:
            These tickets; none where `timeout_s` seconds went by.
        """
        try:
            return inbox.get_nowait()
        except Empty:
            self.check()
        self._waiting.add(inbox)
        self._bell.ring()
        try:
            tickets = inbox.get(timeout=timeout_s)
        except Empty:
            return []
        finally:
            self._waiting.discard(inbox)
        return tickets

    def close(self) -> None:
        """End the thread after the step that it is in; requests in flight end with an error."""
        if os.getpid() != self._pid:
            return  # the threads belong to the parent
        self._closing = True
        self._bell.ring()
        if threading.current_thread() is not self._thread:  # the garbage collector runs in any thread
            self._thread.join()

    def _run(self) -> None:
        ended: Callable[[], PaceError] = _closed
        try:
            while not self._closing:
                if self._has_work():
                    self._deliver(self._engine.step())
                else:
                    self._bell.wait()
        except BaseException as error:  # faults of a request stay inside step(): this one has no owner
            ended = _dead(error)
        finally:
            self._ended = ended
            try:
                for ticket in list(self._tickets.values()):
                    self._notify(ticket.notify, [ticket])
            finally:
                self._release()

    def _has_work(self) -> bool:
        if not self._engine.has_unfinished:
            return False
        # What is dropped ends at once: its memory shall not wait until somebody calls.
        return (
            not self._on_demand
            or self._engine.intake.has_ends
            or any(inbox.empty() for inbox in tuple(self._waiting))
        )

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        news: dict[Notify, list[Ticket]] = {}
        for output in outputs:
            ticket = self._tickets[output.request_id]
            if output.finished:
                del self._tickets[output.request_id]
            if ticket.put(output):
                news.setdefault(ticket.notify, []).append(ticket)
        for notify, tickets in news.items():
            self._notify(notify, tickets)

    def _notify(self, notify: Notify, tickets: list[Ticket]) -> None:
        try:
            notify(tickets)
        except RuntimeError:  # the event loop of their readers is closed
            for ticket in tickets:
                self.drop(ticket)


def _closed() -> PaceError:
    return PaceError("this engine is closed")


def _dead(error: BaseException) -> Callable[[], PaceError]:
    message = one_line(f"the engine has stopped after {type(error).__name__}: {error}; build a new one")

    def make() -> PaceError:  # each caller raises its own: a shared one would gather all their tracebacks
        dead = EngineDeadError(message)
        dead.__cause__ = error
        return dead

    return make


def merged(old: RequestOutput, new: RequestOutput) -> RequestOutput:
    """Two deltas of one request as one."""
    outputs = {completion.index: completion for completion in old.outputs}
    for completion in new.outputs:
        before = outputs.get(completion.index)
        outputs[completion.index] = completion if before is None else _joined(before, completion)
    return replace(
        new,
        outputs=[outputs[index] for index in sorted(outputs)],
        prompt_logprobs=old.prompt_logprobs if new.prompt_logprobs is None else new.prompt_logprobs,
    )


def _joined(old: CompletionOutput, new: CompletionOutput) -> CompletionOutput:
    logprobs = None if old.logprobs is None or new.logprobs is None else old.logprobs + new.logprobs
    reasoning = None if new.reasoning is None else (old.reasoning or "") + new.reasoning
    return replace(
        new,
        text=old.text + new.text,
        token_ids=[*old.token_ids, *new.token_ids],
        logprobs=logprobs,
        reasoning=reasoning,
        tool_calls=_joined_calls(old.tool_calls, new.tool_calls),
    )


def _joined_calls(old: list[ToolCall] | None, new: list[ToolCall] | None) -> list[ToolCall] | None:
    if old is None or new is None:
        return new if old is None else old
    calls = {call.index: call for call in old}
    for call in new:
        before = calls.get(call.index)
        calls[call.index] = (
            call if before is None else replace(call, arguments=before.arguments + call.arguments)
        )
    return [calls[index] for index in sorted(calls)]
