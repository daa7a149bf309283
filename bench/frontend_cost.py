"""What a streamed token costs the front-end: `python bench/frontend_cost.py`.

64 streams of 200 tokens, twice, from an engine that only pretends and ticks every 5 ms; a client in another process.
Told is the CPU time of the server's process per token, and before it the floor: as many writes without HTTP.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import socket
import time
from typing import Any, ClassVar, cast

import uvicorn
import uvloop

from pace.server.app import make_app
from pace.server.backend import Backend, Call, Health
from pace.server.guard import Guarded
from pace.server.service import Service
from pace.server.wire import Accepted, Delta, Detokenize, Done, Event, Frames, Info, Job, Tokenize, frame

N_STREAMS, N_TOKENS, TICK_S = 64, 200, 0.005


class Pretender(Backend):
    """An engine that says the same for everybody; its events take the way through bytes that a worker's take."""

    def __init__(self) -> None:
        super().__init__()
        self.info = Info(1, "pretender", 4096, {}, {})
        self.n_steps = 0
        self._jobs: dict[int, int] = {}
        self._frames = Frames(Event)

    def submit(self, job: Job, call: Call) -> None:
        self._calls[job.id] = call
        accepted: list[Event] = [Accepted(job.id, 5)]
        asyncio.get_running_loop().call_soon(self.dispatch, accepted)
        self._jobs[job.id] = 0

    async def step(self) -> None:
        """Run."""
        while True:
            await asyncio.sleep(TICK_S)
            if len(self._jobs) < N_STREAMS and self.n_steps == 0:
                continue
            events: list[Any] = []
            for number, n in list(self._jobs.items()):
                last = n + 1 == N_TOKENS
                events.append(Delta(number, 0, " token", [n], finish_reason="length" if last else None))
                self._jobs[number] = n + 1
                if last:
                    events.append(Done(number, 5, 0, N_TOKENS))
                    del self._jobs[number]
            if events:
                self.n_steps += 1
                self.dispatch(self._frames.push(frame(events)))
            else:
                self.n_steps = 0

    def abort(self, number: int) -> None:
        self.forget(number)
        self._jobs.pop(number, None)

    def send_question(self, question: Tokenize | Detokenize) -> None:
        raise AssertionError("no questions here")

    def health(self) -> Health:
        return Health(True, True)

    def stats(self) -> list[dict[str, Any]]:
        return [{}]

    async def close(self) -> None:
        pass


def read_all(port: int, path: str) -> None:
    """The client: all streams, to their ends."""

    async def one() -> int:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        body: dict[str, Any] = {"stream": True, "max_tokens": N_TOKENS}
        body |= {"messages": [{"role": "user", "content": "x"}]} if "chat" in path else {"prompt": "x"}
        data = json.dumps(body).encode()
        writer.write(
            f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(data)}\r\n\r\n".encode() + data
        )
        received = b""
        while b"[DONE]" not in received[-64:]:
            received += await reader.read(1 << 16)
        writer.close()
        return received.count(b"data: ")

    async def main() -> None:
        counts = await asyncio.gather(*(one() for _ in range(N_STREAMS)))
        if min(counts) < N_TOKENS:
            raise SystemExit(f"a stream had only {min(counts)} events")

    for _ in range(2):
        asyncio.run(main())


class Writer(asyncio.Protocol):
    """The floor: writes a chunk per tick to whoever has sent something, and the end after the last."""

    open: ClassVar[list[Writer]] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.n = 0

    def data_received(self, data: bytes) -> None:
        Writer.open.append(self)

    @staticmethod
    async def step() -> None:
        """Run."""
        chunk = b"data: " + b"x" * 250
        while True:
            await asyncio.sleep(TICK_S)
            if len(Writer.open) == N_STREAMS or any(writer.n for writer in Writer.open):
                for writer in list(Writer.open):
                    writer.n += 1
                    writer.transport.write(chunk if writer.n <= N_TOKENS else b"[DONE]")
                    if writer.n > N_TOKENS:
                        Writer.open.remove(writer)


async def floor() -> float:
    """CPU time per write, in microseconds."""
    server = await asyncio.get_running_loop().create_server(Writer, "127.0.0.1", 0)
    stepping = asyncio.ensure_future(Writer.step())
    seconds = await serve_client(server.sockets[0].getsockname()[1], "/v1/completions")
    stepping.cancel()
    server.close()
    return seconds / (2 * N_STREAMS * N_TOKENS) * 1e6


async def serve_client(port: int, path: str) -> float:
    """CPU seconds of this process while a client in another one reads all streams."""
    client = multiprocessing.get_context("spawn").Process(target=read_all, args=(port, path))
    client.start()
    begin = time.process_time()
    while client.is_alive():
        await asyncio.sleep(0.05)
    seconds = time.process_time() - begin
    if client.exitcode != 0:
        raise SystemExit("the client failed")
    return seconds


async def measure(path: str) -> float:
    """CPU time per token, in microseconds."""
    backend = Pretender()
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    config = uvicorn.Config(
        make_app(Service(backend, ["m"])),
        http=Guarded,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
    )
    server = uvicorn.Server(config)
    stepping = asyncio.ensure_future(backend.step())
    serving = asyncio.ensure_future(server.serve(sockets=[listener]))
    await asyncio.sleep(0.3)
    seconds = await serve_client(listener.getsockname()[1], path)
    server.should_exit = True
    stepping.cancel()
    await serving
    return seconds / (2 * N_STREAMS * N_TOKENS) * 1e6


def main() -> None:
    """Measure the floor and both endpoints."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    loop = uvloop.new_event_loop()
    print(f"floor: {loop.run_until_complete(floor()):.1f} us of CPU per write")
    for path in ("/v1/completions", "/v1/chat/completions"):
        print(f"{path}: {loop.run_until_complete(measure(path)):.1f} us of CPU per streamed token")
    loop.close()


if __name__ == "__main__":
    main()
