"""What other threads ask of an engine: requests, and their ends."""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Iterator

from pace.engine.heap import LazyHeap
from pace.engine.request import Request
from pace.engine.sampler import MASK64, derive_seed
from pace.engine.scheduler import Scheduler
from pace.engine.sequence import Sequence, Status
from pace.errors import QueueFullError, RequestError, show

__all__ = ["Intake"]

MIN_ENDS = 16
"""Requests that may be ended before a step, however short steps are."""


class Intake:
    """The requests of an engine that have not finished, and the way to it from other threads.

    `submit` and `cancel` may be called from any thread at any time; everything else belongs to the engine's.

    Args:
        scheduler: where requests wait.
        max_num_waiting: sequences that may wait to run; a bounded submit refuses more.
        seed: seeds the requests that give none.
    """

    def __init__(self, scheduler: Scheduler, max_num_waiting: int, seed: int = 0) -> None:
        self.requests: dict[str, Request] = {}  # accepted and not finished
        self._scheduler = scheduler
        self._max_num_waiting = max_num_waiting
        self._seed = seed
        self._numbers = itertools.count()
        self._lock = threading.Lock()  # two submits must not both take the last place of the queue
        self._arrived: deque[Sequence] = deque()
        self._ends: deque[Request] = deque()  # cancelled
        self._deadlines: LazyHeap[Request] = LazyHeap()

    @property
    def n_waiting(self) -> int:
        """Sequences that have not started, preempted ones included."""
        return len(self._arrived) + self._scheduler.n_waiting

    @property
    def has_news(self) -> bool:
        """Whether `receive` has anything to do; most steps find nothing."""
        return bool(self._arrived or self._ends or self._deadlines)

    @property
    def has_ends(self) -> bool:
        """Whether a request was cancelled and its end is still to come."""
        return bool(self._ends)

    def submit(self, request: Request, *, bounded: bool = True) -> None:
        """Accept a prepared request; it starts to run in one of the next steps.

        Args:
            bounded: refuse it where the queue is full.

        Raises:
            RequestError: the request id is in use.
            QueueFullError: as many sequences as max_num_waiting are waiting.
        """
        seqs = request.seqs
        with self._lock:
            if bounded and self.n_waiting + len(seqs) > self._max_num_waiting:
                raise QueueFullError(
                    f"{self.n_waiting} sequences wait, max_num_waiting is {self._max_num_waiting}; try again "
                    "later or raise it"
                )
            if self.requests.setdefault(request.request_id, request) is not request:
                raise RequestError(f"request id {show(request.request_id)} is in use; choose another")
            number = next(self._numbers)
            given = request.params.seed
            seed = derive_seed(self._seed, number) if given is None else given & MASK64
            for seq in seqs:
                seq.seed = seed
                seq.key = (seq.priority, number, seq.index)
            self._arrived.extend(seqs)

    def cancel(self, request: Request) -> None:
        """From now on the request does not start any more, and where it runs it ends before the next step."""
        request.cancel()
        self._ends.append(request)

    def receive(self, seconds: float) -> Iterator[tuple[Request, str | None]]:
        """Take in what has been asked for.

        Requests that run end at once; of those that wait, whose number nothing bounds, as many as `seconds` allow, and
        MIN_ENDS at least: they don't start any more, and the others of them wait no longer for their step.

        Yields:
            Requests that end now, with their stop_reason.
        """
        while self._arrived:
            seq = self._arrived[0]
            if seq.status is Status.WAITING:
                self._scheduler.add(seq)  # in this order the two counts of n_waiting never miss one
                request = self.requests[seq.request_id]
                if request.deadline_s is not None and seq.index == 0:
                    self._deadlines.push(request.deadline_s, request)
            self._arrived.popleft()
        if self._ends:
            for seq in tuple(self._scheduler.running):
                if seq.cancelled and seq.status is Status.RUNNING:
                    yield self.requests[seq.request_id], None
        if self._ends or self._deadlines:
            yield from self._late(seconds)

    def _late(self, seconds: float) -> Iterator[tuple[Request, str | None]]:
        now_s = time.monotonic()
        until_s = now_s + seconds
        n_ended = 0
        while self._ends and (n_ended < MIN_ENDS or time.monotonic() < until_s):
            request = self._ends.popleft()
            if self.requests.get(request.request_id) is request:
                yield request, None
                n_ended += 1
        while n_ended < MIN_ENDS or time.monotonic() < until_s:
            late = self._deadlines.peek()
            if late is None or self._deadlines.peek_key() > now_s:
                return
            yield late, "deadline"
            n_ended += 1

    def release(self, request: Request) -> None:
        """The request has finished: its id is free, and nothing here refers to it."""
        del self.requests[request.request_id]
        self._deadlines.discard(request)
