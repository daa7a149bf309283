"""`pace run-batch`: a file of requests in OpenAI's batch format, answered into another one by the server's own endpoints.

A line of the output is written when its request has ended, whole and at once, so that a run that was ended goes on where it
stopped: what has a line is not asked again, and half a line at the end is cut off.
"""

from __future__ import annotations

import asyncio
import json
import os
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import uvloop
from starlette.types import ASGIApp, Message

from pace import ops
from pace.config import EngineConfig
from pace.console import OutputError, err, progress_bar
from pace.errors import PaceError, RequestError, show
from pace.server.app import make_app
from pace.server.placement import place
from pace.server.router import Router
from pace.server.service import Limits, Service
from pace.server.signals import on_signals

__all__ = ["BATCH_PATHS", "BatchOptions", "run_batch"]

BATCH_PATHS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/v1/responses",
)

MAX_ID = 512  # characters of a custom_id
WAITING = 2  # requests that wait for each that runs: an engine never looks round for work
N_TRIES = 4  # of a request whose engine died under it
TRANSIENT = (429, 503)  # what another try may change
POLL_S = 0.1


@dataclass(frozen=True)
class BatchOptions:
    """Everything about a run.

    Attributes:
        config: of every engine.
        names: what requests may call the model.
        input, output: files of JSON lines.
        limits: what a request may take.
        data_parallel: engines; None: one per NUMA node.
        show_progress: a bar on stderr; None: where that is a terminal.
    """

    config: EngineConfig
    names: tuple[str, ...]
    input: Path
    output: Path
    limits: Limits
    data_parallel: int | None = None
    show_progress: bool | None = None


class _Line(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A request."""

    custom_id: str
    method: str
    url: str
    body: dict[str, Any]


class _Answer(msgspec.Struct, kw_only=True):
    """What became of a request; its body is JSON already."""

    status_code: int
    request_id: str
    body: msgspec.Raw


class _Done(msgspec.Struct, kw_only=True):
    """A line of the output."""

    id: str
    custom_id: str
    response: _Answer
    error: None = None


# ---- files --------------------------------------------------------------------------------------------------


def read_requests(path: Path) -> Iterator[tuple[int, _Line]]:
    """The lines of a file with their numbers; empty ones are left out.

    Raises:
        RequestError: it can't be read, or a line is no request; the message names it.
    """
    decoder = msgspec.json.Decoder(_Line)
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                text = line.strip()
                if not text:
                    continue
                try:
                    request = decoder.decode(text)
                except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
                    raise RequestError(f"{path}:{number}: {error}"[:500]) from None
                _check(request, f"{path}:{number}")
                yield number, request
    except OSError as error:
        raise RequestError(f"{path}: cannot be read: {error.strerror or error}") from None


def _check(request: _Line, where: str) -> None:
    if not 0 < len(request.custom_id) <= MAX_ID:
        raise RequestError(
            f"{where}: custom_id is {show(request.custom_id)}, expected 1 to {MAX_ID} characters"
        )
    if request.method != "POST":
        raise RequestError(f"{where}: method is {show(request.method)}, expected POST")
    if request.url not in BATCH_PATHS:
        raise RequestError(f"{where}: url is {show(request.url)}, expected one of {', '.join(BATCH_PATHS)}")
    if request.body.get("stream"):
        raise RequestError(
            f"{where}: stream is {show(request.body['stream'])}; an answer in a file has no stream"
        )


def check_requests(path: Path) -> set[str]:
    """The ids of all requests of a file, before any of them runs.

    Raises:
        RequestError: as `read_requests`, or an id is there twice.
    """
    seen: set[str] = set()
    for number, request in read_requests(path):
        if request.custom_id in seen:
            raise RequestError(f"{path}:{number}: custom_id {show(request.custom_id)} is there twice")
        seen.add(request.custom_id)
    if not seen:
        raise RequestError(f"{path}: holds no requests; expected one JSON object per line")
    return seen


def repair(path: Path) -> set[str]:
    """The ids of the requests that a file has answers to; half a line at its end is cut off.

    Raises:
        RequestError: it is no such file.
        OutputError: it can't be read or written.
    """
    done: set[str] = set()
    try:
        with path.open("rb+") as file:
            end = 0
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break  # whoever wrote it was ended
                try:
                    done.add(msgspec.json.decode(line, type=_Told).custom_id)
                except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
                    raise RequestError(
                        f"{path}:{number}: not the answer to a request; name another file as output"
                    ) from None
                end += len(line)
            file.truncate(end)
    except FileNotFoundError:
        return done
    except OSError as error:
        raise OutputError(f"{path}: cannot be read and written: {error.strerror or error}") from None
    return done


class _Told(msgspec.Struct):
    """What counts of a line that was written."""

    custom_id: str


# ---- requests -----------------------------------------------------------------------------------------------


async def ask(app: ASGIApp, path: str, body: bytes, number: str) -> tuple[int, bytes]:
    """One request to an ASGI application: status and body of the answer."""
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
        "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "", "client": None, "server": None,
        "headers": [(b"content-type", b"application/json"), (b"x-request-id", number.encode())],
    }  # fmt: skip
    waiting = [{"type": "http.request", "body": body, "more_body": False}]
    status, parts = 0, []

    async def receive() -> Message:
        if waiting:
            return waiting.pop()
        never: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        return await never  # this client does not leave

    async def send(message: Message) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
        else:
            parts.append(message.get("body", b""))

    await app(scope, receive, send)
    return status, b"".join(parts)


class _Batch:
    """A run over a loaded model."""

    def __init__(self, app: ASGIApp, is_ready: Callable[[], bool], output: BinaryIO, bar: Any) -> None:
        self._app = app
        self._is_ready = is_ready
        self._output = output
        self._bar = bar
        self.n_failed = 0  # were answered with an error
        self.n_lost = 0  # have no answer

    async def one(self, request: _Line) -> None:
        """Answer a request, and write the answer."""
        number = f"batch_req_{uuid.uuid4().hex}"
        body = json.dumps(request.body).encode()
        for _ in range(N_TRIES):
            while (
                not self._is_ready()
            ):  # an engine that has died is being loaded; the run ends where that fails
                await asyncio.sleep(POLL_S)
            status, answer = await ask(self._app, request.url, body, number)
            if status not in TRANSIENT:
                break
        else:
            self.n_lost += 1
            err(f"pace: {request.custom_id[:100]}: {answer[:300].decode('utf-8', 'replace')}")
            return
        self.n_failed += status != 200
        done = _Done(
            id=number,
            custom_id=request.custom_id,
            response=_Answer(status_code=status, request_id=number, body=msgspec.Raw(answer)),
        )
        self._write(msgspec.json.encode(done) + b"\n")
        if self._bar is not None:
            self._bar.update()

    def _write(self, line: bytes) -> None:
        try:
            self._output.write(line)
            self._output.flush()
        except OSError as error:
            raise OutputError(f"{self._output.name}: cannot be written: {error.strerror or error}") from None

    async def all(self, requests: Iterator[_Line], n_open: int) -> None:
        """Answer all, `n_open` at a time."""
        running: set[asyncio.Task[None]] = set()
        try:
            for request in requests:
                running.add(asyncio.ensure_future(self.one(request)))
                if len(running) >= n_open:
                    ended, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                    for task in ended:
                        task.result()
            await asyncio.gather(*running)
        finally:
            for task in running:
                task.cancel()


def run_batch(options: BatchOptions) -> int:
    """Answer every request that has no answer yet; returns the exit code: 0, or 1 where one has got none.

    Raises:
        RequestError: a file holds something else; nothing has run.
        OutputError: the output can't be written.
        PaceError: the model can't be loaded, or its engines die again and again.
        KeyboardInterrupt: SIGINT or SIGTERM; what is written stays.
    """
    wanted = check_requests(options.input)
    done = repair(options.output) & wanted
    if done:
        err(f"[{len(done)} of {len(wanted)} requests are answered in {options.output} already]")
    if len(done) == len(wanted):
        return 0
    try:
        with options.output.open("ab") as output:
            return uvloop.run(_run(options, output, done, len(wanted)))
    except OSError as error:
        raise OutputError(f"{options.output}: cannot be written: {error.strerror or error}") from None


async def _run(options: BatchOptions, output: BinaryIO, done: set[str], n_wanted: int) -> int:
    config = options.config
    places = place(options.data_parallel, config.cpus, config.n_threads or ops.default_threads()[0])
    ended: asyncio.Future[PaceError | None] = asyncio.get_running_loop().create_future()

    def end(error: PaceError | None) -> None:
        if not ended.done():
            ended.set_result(error)

    router = Router(
        config, places, max_waiting=1 << 30, restarts=True, on_fatal=end, stall_timeout_s=float("inf")
    )
    bar = None
    with on_signals(lambda: end(None)):
        try:
            if not await _before(ended, router.start()):
                raise ended.result() or KeyboardInterrupt
            bar = progress_bar(
                options.show_progress, total=n_wanted, initial=len(done), desc="requests", unit="request"
            )
            app = make_app(Service(router, options.names, options.limits))
            batch = _Batch(app, lambda: router.health().ready, output, bar)
            requests = (line for _, line in read_requests(options.input) if line.custom_id not in done)
            n_open = WAITING * len(places) * config.n_places
            if not await _before(ended, batch.all(requests, n_open)):
                raise ended.result() or KeyboardInterrupt
        finally:
            if bar is not None:
                bar.close()
            await router.close()
    os.fsync(output.fileno())
    err(
        f"[{n_wanted - len(done) - batch.n_lost} requests answered, {batch.n_failed} of them with an error"
        + (f"; {batch.n_lost} have no answer: run it again]" if batch.n_lost else "]")
    )
    return 1 if batch.n_lost else 0


async def _before(ended: asyncio.Future[PaceError | None], work: Any) -> bool:
    """Run `work` to its end, or until the run is ended; returns which, and raises what `work` raised."""
    task = asyncio.ensure_future(work)
    await asyncio.wait({ended, task}, return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        task.result()
        return True
    task.cancel()
    await asyncio.wait({task})
    return False
