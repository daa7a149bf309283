"""What every endpoint needs: the engines, the names of the model, the limits, the counters."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

import pace
from pace.errors import show
from pace.server.backend import Backend, Call
from pace.server.http import Disconnected, decode, read_body, until_disconnect
from pace.server.keys import Keys
from pace.server.metrics import Meter, Metrics
from pace.server.protocol.errors import ApiError
from pace.server.slow import SlowClients
from pace.server.tracing import Tracer
from pace.server.wire import Delta, Event, Failed, Info, Job

__all__ = ["FINGERPRINT", "Endpoint", "Limits", "Service", "check_failed", "check_headers"]

T = TypeVar("T")
Endpoint = Callable[[HttpRequest], Awaitable[Response]]

FINGERPRINT = f"pace-{pace.__version__}"


@dataclass(frozen=True)
class Limits:
    """What a request may take.

    Attributes:
        max_body_bytes: of a request.
        body_timeout_s: until a body has come.
        slow_client_timeout_s: a stream whose client takes nothing for so long is ended.
        max_n: completions of a prompt.
        max_waiting: sequences that wait beside those that run; more are answered with 429.
        trust_request_chat_template: take chat templates from requests.
    """

    max_body_bytes: int = 8 << 20
    body_timeout_s: float = 30.0
    slow_client_timeout_s: float = 60.0
    max_n: int = 16
    max_waiting: int = 512
    trust_request_chat_template: bool = False


class Service:
    """The server's parts, for its endpoints.

    Args:
        backend: the engines.
        names: what clients may call the model; the first is the one that answers carry.
        limits: what a request may take.
        keys: who may ask; None: everybody.
        tracer: told of every request; None: nobody is.
    """

    def __init__(
        self,
        backend: Backend,
        names: Sequence[str],
        limits: Limits | None = None,
        keys: Keys | None = None,
        tracer: Tracer | None = None,
    ) -> None:
        self.backend = backend
        self.names = tuple(names)
        self.limits = Limits() if limits is None else limits
        self.slow = SlowClients(self.limits.slow_client_timeout_s)
        self.started_s = time.time()
        self.keys = Keys() if keys is None else keys
        self.metrics = Metrics(self)
        self.tracer = tracer
        self.is_draining = False

    @property
    def info(self) -> Info:
        """What the engines say of themselves.

        Raises:
            ApiError: none is ready yet.
        """
        if self.backend.info is None:
            raise ApiError(503, self.backend.health().reason, code="not_ready")
        return self.backend.info

    async def read(self, http: HttpRequest, kind: type[T]) -> T:
        """A request's body as `kind`.

        Raises:
            ApiError: too large, too slow, in another coding, or not of this type.
        """
        limits = self.limits
        check_headers(http)
        body = await read_body(http.scope, http.receive, limits.max_body_bytes, limits.body_timeout_s)
        return decode(kind, body)

    def check_model(self, name: str | None) -> str:
        """The name that the answer carries.

        Raises:
            ApiError: no such model is served.
        """
        if name is None:
            return self.names[0]
        if name not in self.names:
            raise ApiError(
                404,
                f"the model {name[:200]!r} does not exist here; this server has {', '.join(self.names)}",
                param="model",
                code="model_not_found",
            )
        return name

    def check_n(self, n: int | None) -> None:
        """Raises ApiError where a prompt asks for more completions than are allowed."""
        if n is not None and n > self.limits.max_n:
            raise ApiError(400, f"n is {n}, expected at most {self.limits.max_n}", param="n")

    async def call(self, http: HttpRequest, jobs: Callable[[Call], Sequence[Job]], n_jobs: int) -> Call:
        """Submit the jobs of a request; returns when all are accepted, and a client that leaves ends them.

        Close the call in the end.

        Raises:
            PaceError: one was refused.
            Disconnected: the client has left already.
        """
        _ = self.info  # or it is still being loaded
        meter = http.scope["pace.meter"] = Meter(self.metrics)
        call = Call(self.backend, n_jobs, meter)
        call.watch(until_disconnect(http.receive, call.cancel))
        wanted = jobs(call)
        call.one_by_one = any(job.one_by_one for job in wanted)
        await call.start(wanted)
        if call.is_cancelled:
            call.close()
            raise Disconnected
        return call

    async def collect(self, call: Call, take: Callable[[Event], None]) -> None:
        """Give all events of a call to `take`, and close it.

        Raises:
            ApiError: an engine failed.
            Disconnected: the client left.
        """
        try:
            async for events in call.events():
                for event in events:
                    check_failed(event)
                    take(event)
            if call.is_cancelled:
                raise Disconnected
        finally:
            call.close()


def check_headers(http: HttpRequest) -> None:
    """Raises ApiError where a body is compressed, or comes from a web page that no preflight has stopped.

    Pages may send text and forms anywhere without the server's leave; JSON they may not. Other clients have no Origin and
    may call it what they want.
    """
    coding = http.headers.get("content-encoding", "identity")
    if coding.strip().lower() not in ("", "identity"):
        raise ApiError(
            415, f"content-encoding is {show(coding)}; send the body as it is", code="unsupported_coding"
        )
    kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if "origin" in http.headers and kind != "application/json":
        raise ApiError(
            415,
            f"content-type is {show(kind)}; web pages must send application/json",
            code="unsupported_type",
        )


def check_failed(event: Event) -> None:
    """Raises ApiError where a job failed: 400 where its own request is to blame, or a client would ask again."""
    if isinstance(event, Delta):  # nearly always
        if event.finish_reason not in ("error", "abort"):
            return
        reason = event.stop_reason or "the request was ended by the server"
        raise ApiError(400 if event.is_request_error else 500, str(reason), code="generation_failed")
    if isinstance(event, Failed):
        raise ApiError(503, event.message, code="engine_failed")
