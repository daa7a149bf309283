"""A server as a process, as its users start it; and one whose engine says what a test wants."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import httpx

from pace.server.app import make_app
from pace.server.backend import Backend, Call, Health
from pace.server.service import Limits, Service
from pace.server.wire import Accepted, Detokenize, Event, Info, Job, Tokenize

START_S = 60.0


class Server:
    """`pace serve demo` in a process of its own."""

    def __init__(self, *args: str, port: int = 0, model: str = "demo", **environment: str) -> None:
        command = [sys.executable, "-m", "pace", "serve", model, "--port", str(port), *args]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | environment,
        )
        self.lines: list[str] = []
        self._address: str | None = None
        self._found = threading.Event()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            found = re.search(r" at (\S+)\]", line)
            if found is not None:
                self._address = found[1]
                self._found.set()
        self._found.set()

    @property
    def url(self) -> str:
        """Where it listens."""
        self._found.wait(START_S)
        assert self._address is not None, "".join(self.lines)
        return self._address

    def ready(self) -> Server:
        """Wait until /health answers 200."""
        end = time.monotonic() + START_S
        while time.monotonic() < end:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/health/ready").status_code == 200:
                    return self
            assert self.process.poll() is None, "".join(self.lines)
            time.sleep(0.02)
        raise AssertionError("the server did not become ready")

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal, wait for the end, return the exit code."""
        self.process.send_signal(number)
        return self.process.wait(START_S)

    def kill(self) -> None:
        """Be rid of it."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(START_S)

    def connect(self) -> socket.socket:
        """A raw connection."""
        url = httpx.URL(self.url)
        return socket.create_connection((url.host, url.port or 80), timeout=20)


Script = Callable[[Job], Sequence[Sequence[Event]]]


class ScriptedBackend(Backend):
    """Answers every job with the batches of events that a script gives for it, one batch per turn of the loop."""

    def __init__(self, script: Script) -> None:
        super().__init__()
        self._script = script
        self.jobs: list[Job] = []
        self.aborted: list[int] = []
        self.info: Info | None = Info(1, "scripted", 512, {"max_num_seqs": 32}, {})
        self.state = Health(True, True)

    def submit(self, job: Job, call: Call) -> None:
        self.jobs.append(job)
        self._calls[job.id] = call
        loop = asyncio.get_running_loop()

        def play(batches: list[Sequence[Event]]) -> None:
            self.dispatch(list(batches[0]))
            if batches[1:]:
                loop.call_later(0.001, play, batches[1:])

        loop.call_soon(play, [[Accepted(job.id, 3)], *self._script(job)])

    def abort(self, number: int) -> None:
        self.forget(number)
        self.aborted.append(number)

    def send_question(self, question: Tokenize | Detokenize) -> None:
        raise AssertionError("no questions here")

    def health(self) -> Health:
        return self.state

    def stats(self) -> list[dict[str, Any]]:
        return [{}]

    async def close(self) -> None:
        pass


def scripted(
    script: Script, method: str, path: str, limits: Limits | None = None, **request: Any
) -> tuple[httpx.Response, ScriptedBackend]:
    """One request to an app whose engine is scripted."""

    async def main() -> tuple[httpx.Response, ScriptedBackend]:
        backend = ScriptedBackend(script)
        app = make_app(Service(backend, ["scripted"], limits))
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            headers = {"x-request-id": "r"} | request.pop("headers", {})
            return await client.request(method, path, headers=headers, **request), backend

    return asyncio.run(main())


@contextlib.contextmanager
def running(*args: str, model: str = "demo", **environment: str) -> Iterator[Server]:
    """A server for the length of a with block."""
    server = Server(*args, port=0, model=model, **environment)
    try:
        yield server.ready()
    finally:
        server.kill()
