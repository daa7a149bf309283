"""Which engine gets which job; what becomes of jobs whose engine dies."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import fields
from typing import Any

from pace.config import EngineConfig
from pace.errors import EngineDeadError, PaceError, QueueFullError
from pace.log import logger
from pace.server.backend import Backend, Call, Health
from pace.server.wire import (
    Abort,
    Answer,
    Configure,
    Detokenize,
    Done,
    Event,
    Failed,
    Job,
    Parsers,
    Refused,
    Tokenize,
)
from pace.server.workers import WATCH_S, Worker

__all__ = ["Affinity", "Router", "prefix_keys"]

PIECE_CHARS = 512  # a prompt's beginnings are remembered in steps of so many characters, or ids
MAX_PIECES = 64
MAX_KEYS = 1 << 16
SLACK = 4  # sequences that an engine may have more than the idlest and still get what it has the beginning of
MAX_RESTARTS = 3  # of one engine in RESTARTS_S: then the server gives up
RESTARTS_S = 120.0


def prefix_keys(job: Job) -> list[int]:
    """Hashes of a prompt's beginnings, the shortest first: of each message, or of each 512 characters or ids."""
    key = hash(job.cache_salt)
    keys = []
    if job.chat is not None:
        key = hash((key, repr(job.chat.tools)))
        for message in job.chat.messages[:MAX_PIECES]:
            key = hash((key, repr(message)))
            keys.append(key)
        return keys
    prompt = job.prompt or ""
    for at in range(0, min(len(prompt), PIECE_CHARS * MAX_PIECES), PIECE_CHARS):
        piece = prompt[at : at + PIECE_CHARS]
        if len(piece) == PIECE_CHARS:
            key = hash((key, piece if isinstance(piece, str) else tuple(piece)))
            keys.append(key)
    return keys


class Affinity:
    """Remembers which engine has seen which beginning last."""

    def __init__(self) -> None:
        self._engines: OrderedDict[int, int] = OrderedDict()

    def find(self, keys: Sequence[int]) -> int | None:
        """The engine that has seen the longest of these beginnings."""
        for key in reversed(keys):
            engine = self._engines.get(key)
            if engine is not None:
                return engine
        return None

    def note(self, keys: Sequence[int], engine: int) -> None:
        """An engine is about to see these beginnings."""
        for key in keys:
            self._engines[key] = engine
            self._engines.move_to_end(key)
        while len(self._engines) > MAX_KEYS:
            self._engines.popitem(last=False)


class Router(Backend):
    """Serves jobs with engines in child processes.

    Args:
        config: of every engine.
        places: for each engine its CPUs ([]: any) and threads, as `placement.place` finds them.
        max_waiting: sequences that may wait beside those that run.
        restarts: start an engine that died again; False: give up at once.
        on_fatal: called once where the server can't go on.
        stall_timeout_s: see `Worker`.
        parsers: how they read answers.
    """

    def __init__(
        self,
        config: EngineConfig,
        places: Sequence[tuple[list[int], int]],
        *,
        max_waiting: int,
        restarts: bool,
        on_fatal: Callable[[PaceError], None],
        stall_timeout_s: float,
        parsers: Parsers | None = None,
    ) -> None:
        super().__init__()
        self._config = config
        self._places = places
        self._max_waiting = max_waiting
        self._restarts = restarts
        self._on_fatal = on_fatal
        self._stall_timeout_s = stall_timeout_s
        self._parsers = Parsers() if parsers is None else parsers
        self._workers: list[Worker] = []
        self._owners: dict[int, Worker] = {}  # by job or question
        self._affinity = Affinity()
        self._deaths: list[float] = []
        self._closing = False
        self._tasks: set[asyncio.Task[None]] = set()

    # ---- engines --------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start the engines, one after the other: each finds the memory that the others have left.

        Raises:
            PaceError: the model can't be loaded.
        """
        self._spawn(self._watch())
        for index in range(len(self._places)):
            worker = self._make(index)
            self._workers.append(worker)
            await worker.start()
            while worker.state == "loading":
                await asyncio.sleep(WATCH_S / 4)
            if worker.state == "dead":
                raise worker.error or EngineDeadError(worker.why)

    def _make(self, index: int) -> Worker:
        cpus, n_threads = self._places[index]
        config = {
            f.name: value
            for f in fields(self._config)
            if (value := getattr(self._config, f.name)) != f.default or f.name == "model"
        }
        config["kernels"] = dict(self._config.kernels)
        if len(self._places) > 1:
            config["n_threads"] = n_threads
            config.pop("cpus", None)
        return Worker(
            index,
            Configure(_plain(config), cpus, index == 0 and not self.n_restarts, self._parsers),
            self._hear,
            self._on_state,
            self._stall_timeout_s,
        )

    def _on_state(self, worker: Worker) -> None:
        if worker.state == "ready" and worker.info is not None:
            self.info = worker.info
        elif worker.state == "dead":
            message = f"{worker.why}; the request was lost, send it again"
            for number in list(worker.numbers):
                self._lose(number, message)
            for number, owner in list(self._owners.items()):  # questions
                if owner is worker:
                    self.dispatch([Refused(number, "EngineDeadError", message)])
            worker.numbers.clear()
            was_ready = worker.info is not None
            if not self._closing and was_ready:
                self._spawn(self._restart(worker))

    def _lose(self, number: int, message: str) -> None:
        self._release(number)
        self.dispatch([Failed(number, message)])

    async def _restart(self, worker: Worker) -> None:
        now_s = asyncio.get_running_loop().time()
        self._deaths = [*(at for at in self._deaths if now_s - at < RESTARTS_S), now_s]
        if not self._restarts or len(self._deaths) > MAX_RESTARTS:
            self._on_fatal(EngineDeadError(f"engine {worker.index}: {worker.why}"))
            return
        await worker.gone()  # its memory is free then
        self.n_restarts += 1
        logger.warning("engine %d is started again", worker.index)
        new = self._make(worker.index)
        self._workers[worker.index] = new
        await new.start()
        while new.state == "loading":
            await asyncio.sleep(WATCH_S / 4)
        if new.state == "dead" and new.info is None and not self._closing:
            self._on_fatal(new.error or EngineDeadError(new.why))

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(WATCH_S)
            for worker in self._workers:
                with suppress(AttributeError):  # it has no process yet
                    worker.watch()

    def _spawn(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """See `Backend`."""
        self._closing = True
        for task in list(self._tasks):
            task.cancel()
        for worker in self._workers:
            worker.state = "dead"
            worker.hang_up()
        await asyncio.gather(*(worker.gone() for worker in self._workers))

    # ---- jobs -----------------------------------------------------------------------------------------------

    def submit(self, job: Job, call: Call) -> None:
        """See `Backend`."""
        ready = [worker for worker in self._workers if worker.state == "ready"]
        if not ready:
            raise EngineDeadError(self._workers[0].why if self._workers else "the model is being loaded")
        n = job.params.get("n", 1)
        n = n if isinstance(n, int) and n > 0 else 1
        room = len(ready) * self._config.n_places + self._max_waiting
        n_open = sum(worker.n_open for worker in ready)
        if n_open + n > max(room, n):
            raise QueueFullError(f"{n_open} sequences run or wait, the limit is {room}; try again later")
        worker = self._choose(job, ready)
        worker.send(job)
        self._calls[job.id] = call
        self._owners[job.id] = worker
        worker.numbers[job.id] = n
        worker.n_open += n

    def _choose(self, job: Job, ready: Sequence[Worker]) -> Worker:
        """The engine that has the least to do, or the one that has seen the prompt's beginning and hardly more."""
        idlest = min(ready, key=lambda worker: worker.n_open)
        if len(self._workers) == 1:
            return idlest
        keys = prefix_keys(job)
        known = self._affinity.find(keys)
        chosen = next(
            (worker for worker in ready if worker.index == known and worker.n_open <= idlest.n_open + SLACK),
            idlest,
        )
        self._affinity.note(keys, chosen.index)
        return chosen

    def abort(self, number: int) -> None:
        """See `Backend`."""
        self.forget(number)
        worker = self._release(number)
        if worker is not None:
            worker.send(Abort(number))

    def _release(self, number: int) -> Worker | None:
        worker = self._owners.pop(number, None)
        if worker is not None:
            worker.n_open -= worker.numbers.pop(number, 0)
        return worker

    def send_question(self, question: Tokenize | Detokenize) -> None:
        """See `Backend`."""
        worker = next((worker for worker in self._workers if worker.state == "ready"), None)
        if worker is None:
            raise EngineDeadError("no engine is ready")
        worker.send(question)
        self._owners[question.id] = worker

    def _hear(self, worker: Worker, events: list[Event]) -> None:
        for event in events:
            if isinstance(event, (Done, Failed, Refused, Answer)):
                self._release(event.id)
        self.dispatch(events)

    # ---- how they are -----------------------------------------------------------------------------------------

    def health(self) -> Health:
        """See `Backend`."""
        bad = next((worker for worker in self._workers if worker.state != "ready"), None)
        n_ready = sum(worker.state == "ready" for worker in self._workers)
        if len(self._workers) < len(self._places) or bad is not None:
            why = "the model is being loaded" if bad is None else f"engine {bad.index}: {bad.why}"
            return Health(False, n_ready > 0, why)
        return Health(True, True)

    def stats(self) -> list[dict[str, Any]]:
        """See `Backend`."""
        return [worker.stats for worker in self._workers]


def _plain(value: Any) -> Any:
    """Options as lists, dicts and numbers."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "__dataclass_fields__"):
        return {name: _plain(getattr(value, name)) for name in value.__dataclass_fields__}
    return value
