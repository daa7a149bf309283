"""The front-end's side of engines: calls that wait for the events of their jobs, and who hands these out."""

from __future__ import annotations

import asyncio
import itertools
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from dataclasses import dataclass
from typing import Any

from pace import errors
from pace.errors import PaceError
from pace.server.wire import (
    Accepted,
    Answer,
    Delta,
    Detokenize,
    Done,
    Embedded,
    Event,
    Failed,
    Info,
    Job,
    Refused,
    Scores,
    Tokenize,
)

__all__ = ["Backend", "Call", "Health", "error_of"]

_OF_JOBS = (Delta, Done, Accepted, Scores, Failed, Embedded)


def error_of(refused: Refused) -> PaceError:
    """The error that an engine raised, in this process."""
    kind = getattr(errors, refused.error, PaceError)
    if not (isinstance(kind, type) and issubclass(kind, PaceError)):
        kind = PaceError
    return kind(refused.message)


@dataclass(frozen=True)
class Health:
    """Whether requests are served.

    Attributes:
        ok: all engines run.
        ready: new requests are taken.
        reason: why not; "" where all is well.
    """

    ok: bool
    ready: bool
    reason: str = ""


class Call:
    """The jobs of one HTTP request, and the events of them that nobody has read yet.

    Whoever reads slower than the engine writes gets several tokens in one event: what is unread of a completion is joined,
    so that memory is bounded by the outputs. Where tokens are wanted one by one, it is bounded by their number.
    """

    def __init__(
        self, backend: Backend, n_jobs: int, listen: Callable[[Event], None] = lambda event: None
    ) -> None:
        self._backend = backend
        self._listen = listen
        self._unread: list[Event] = []
        self._last: dict[tuple[int, int], Delta] = {}  # unread, by job and completion
        self._reader: asyncio.Future[None] | None = None
        self.ids = [next(backend.ids) for _ in range(n_jobs)]
        self.positions = {number: i for i, number in enumerate(self.ids)}
        self.accepted: list[Accepted | None] = [None] * n_jobs
        self._open = set(self.ids)
        self._watcher: asyncio.Task[None] | None = None
        self.one_by_one = False
        """Whether unread tokens stay events of their own."""
        self.is_cancelled = False
        self.pump: Callable[[Event], bool] | None = None
        """Takes events where they arrive; False: whoever waits for events shall look."""

    def watch(self, watching: Coroutine[Any, Any, None]) -> None:
        """Run what watches over the client, until the call is closed."""
        self._watcher = asyncio.ensure_future(watching)

    def put(self, event: Event) -> None:
        """Add an event of one of the jobs."""
        self._listen(event)
        if isinstance(event, (Done, Failed, Refused)):
            self._open.discard(event.id)
            self._backend.forget(event.id)
        if self.pump is not None and not self._unread:
            if not self.pump(event):
                self._wake()
            return
        if isinstance(event, Delta) and not self.one_by_one:
            key = (event.id, event.index)
            old = self._last.get(key)
            if old is not None:
                _join(old, event)
                return
            self._last[key] = event
        self._unread.append(event)
        self._wake()

    async def start(self, jobs: Iterable[Job]) -> None:
        """Submit the jobs, and wait until the engine has accepted all of them.

        Raises:
            PaceError: one was refused; the others have been ended. Its `args` name its position where there are several.
        """
        try:
            for job in jobs:
                self._backend.submit(job, self)
            while any(accepted is None for accepted in self.accepted) and not self.is_cancelled:
                if not any(isinstance(event, (Accepted, Refused, Failed)) for event in self._unread):
                    await self.wait()
                self._take_accepted()
        except BaseException:
            self.close()
            raise

    @property
    def is_open(self) -> bool:
        """Whether events are still to come."""
        return bool(self._open) and not self.is_cancelled

    def take(self) -> list[Event]:
        """What has come since the last time."""
        unread, self._unread = self._unread, []
        self._last.clear()
        return unread

    async def events(self) -> AsyncIterator[list[Event]]:
        """What has come since the last time, until all jobs have ended or the call was cancelled."""
        while True:
            if self._unread and not self.is_cancelled:
                yield self.take()
            elif self.is_open:
                await self.wait()
            else:
                return

    async def wait(self) -> None:
        """Sleep until something comes, or the call is cancelled."""
        self._reader = asyncio.get_running_loop().create_future()
        try:
            await self._reader
        finally:
            self._reader = None

    def cancel(self) -> None:
        """The client has left: end what has not ended; who waits for events stops waiting."""
        self.is_cancelled = True
        self._end()

    def close(self) -> None:
        """Nobody reads any more."""
        if self._watcher is not None:
            self._watcher.cancel()
            self._watcher = None  # it refers to us
        self._end()

    def _end(self) -> None:
        for number in self._open:
            self._backend.abort(number)
        self._open.clear()
        self._wake()

    def _take_accepted(self) -> None:
        """Look for the engine's answers to the jobs among what is unread."""
        rest: list[Event] = []
        for event in self._unread:
            if isinstance(event, Accepted):
                self.accepted[self.positions[event.id]] = event
            elif isinstance(event, Refused):
                error = error_of(event)
                if len(self.ids) > 1:
                    error = type(error)(f"prompt {self.positions[event.id]}: {error}")
                raise error
            elif isinstance(event, Failed) and self.accepted[self.positions[event.id]] is None:
                raise errors.EngineDeadError(event.message)
            else:
                rest.append(event)
        self._unread = rest

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)


def _join(old: Delta, new: Delta) -> None:
    old.text += new.text
    old.token_ids += new.token_ids
    if new.reasoning is not None:
        old.reasoning = (old.reasoning or "") + new.reasoning
    if new.tool_calls is not None:
        old.tool_calls = [*(old.tool_calls or ()), *new.tool_calls]
    if new.logprobs is not None:
        old.logprobs = [*(old.logprobs or ()), *new.logprobs]
    old.finish_reason, old.stop_reason = new.finish_reason, new.stop_reason
    old.is_request_error = new.is_request_error
    old.cumulative_logprob = new.cumulative_logprob


class Backend(ABC):
    """Engines that take jobs; belongs to one event loop."""

    info: Info | None = None
    """What an engine says of itself; None while none is ready."""

    n_restarts = 0
    """Engines that died and were started again."""

    def __init__(self) -> None:
        self.ids = itertools.count(1)
        self._calls: dict[int, Call] = {}  # by job id
        self._answers: dict[int, asyncio.Future[Any]] = {}

    @abstractmethod
    def submit(self, job: Job, call: Call) -> None:
        """Hand a job to an engine.

        Raises:
            PaceError: there is no engine that could take it, or too many wait.
        """

    @abstractmethod
    def abort(self, number: int) -> None:
        """End a job."""

    @abstractmethod
    def send_question(self, question: Tokenize | Detokenize) -> None:
        """Hand a question to an engine; its `Answer` or `Refused` is dispatched."""

    @abstractmethod
    def health(self) -> Health:
        """How the engines are."""

    @abstractmethod
    def stats(self) -> list[dict[str, Any]]:
        """The newest counters of each engine."""

    @abstractmethod
    async def close(self) -> None:
        """End the engines."""

    @property
    def n_calls(self) -> int:
        """Jobs whose end is still to come."""
        return len(self._calls)

    def fail_all(self, message: str) -> None:
        """End every job, and tell those who wait for them why."""
        for number, call in list(self._calls.items()):
            self.abort(number)
            call.put(Failed(number, message))

    def forget(self, number: int) -> None:
        """Hand no more events of a job out."""
        self._calls.pop(number, None)

    def dispatch(self, events: list[Event]) -> None:
        """Give each event to whom it belongs; those of jobs that nobody waits for any more are dropped."""
        calls, answers = self._calls, self._answers
        for event in events:
            if isinstance(event, _OF_JOBS):
                call = calls.get(event.id)
                if call is not None:
                    call.put(event)
            elif isinstance(event, (Refused, Answer)):
                future = answers.get(event.id)
                if future is None:
                    call = calls.get(event.id)
                    if call is not None and isinstance(event, Refused):
                        call.put(event)
                elif not future.done():
                    if isinstance(event, Refused):
                        future.set_exception(error_of(event))
                    else:
                        future.set_result(event.value)

    async def ask(self, question: Tokenize | Detokenize) -> Any:
        """The answer to a question.

        Raises:
            PaceError: the engine refused it.
        """
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._answers[question.id] = future
        try:
            self.send_question(question)
            return await future
        finally:
            del self._answers[question.id]

    def next_id(self) -> int:
        """A number for a question."""
        return next(self.ids)
