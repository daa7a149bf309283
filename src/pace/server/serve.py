"""Runs the server: sockets, engines, signals, and an end that lets streams finish."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import uvicorn
import uvloop

from pace import ops
from pace.config import EngineConfig
from pace.console import err
from pace.errors import ConfigError, PaceError
from pace.server.app import make_app
from pace.server.guard import HEAD_TIMEOUT_S, guarded
from pace.server.keys import Keys
from pace.server.placement import place
from pace.server.router import Router
from pace.server.service import Limits, Service
from pace.server.signals import on_signals
from pace.server.tracing import Tracer
from pace.server.wire import Parsers

__all__ = ["ServeOptions", "serve", "warn_if_open"]

TICK_S = 0.5  # slow clients are looked for so often
ABORT_S = 0.5  # what the farewells of aborted streams may take


@dataclass(frozen=True)
class ServeOptions:
    """Everything about a server but its model.

    Attributes:
        config: of every engine.
        names: what clients call the model.
        host, port: where to listen; port 0: any that is free.
        uds: a unix socket in their place.
        ssl_certfile, ssl_keyfile: for TLS.
        ssl_ca_certs: clients must bring a certificate that one of these has signed.
        api_keys, max_open_per_key: see `Keys`.
        origins, access_log, has_page: see `make_app`.
        otlp_traces_endpoint: where spans of requests go; None: nowhere.
        root_path: a prefix that a proxy in front removes.
        limits: what a request may take.
        head_timeout_s: until the head of a request has come.
        shutdown_timeout_s: how long streams may go on after SIGTERM.
        data_parallel: engines; None: one per NUMA node.
        restarts: start an engine that died again; False: end the server.
        stall_timeout_s: an engine that makes no step for so long, though it should, is taken for dead.
        parsers: how engines read tool calls and reasoning.
    """

    config: EngineConfig
    names: tuple[str, ...]
    host: str = "127.0.0.1"
    port: int = 8000
    uds: str | None = None
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None
    ssl_ca_certs: str | None = None
    api_keys: tuple[str, ...] = ()
    max_open_per_key: int | None = None
    origins: tuple[str, ...] = ()
    access_log: bool = True
    has_page: bool = True
    otlp_traces_endpoint: str | None = None
    root_path: str = ""
    limits: Limits = field(default_factory=Limits)
    head_timeout_s: float = HEAD_TIMEOUT_S
    shutdown_timeout_s: float = 30.0
    data_parallel: int | None = None
    restarts: bool = True
    stall_timeout_s: float = 300.0
    parsers: Parsers = field(default_factory=Parsers)


class _Server(uvicorn.Server):
    """Leaves signals to us."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Nothing: an end is more than closing sockets."""
        yield


def serve(options: ServeOptions) -> int:
    """Serve until a signal; returns the exit code.

    Raises:
        ConfigError: the address can't be used, or traces can't be sent.
        PaceError: the model can't be loaded.
    """
    endpoint = options.otlp_traces_endpoint
    tracer = None if endpoint is None else Tracer.to(endpoint, options.names[0])
    _check_tls(options)
    listener = _listen(options)
    warn_if_open(options)
    loop = uvloop.new_event_loop()
    try:
        asyncio.set_event_loop(loop)
        code = loop.run_until_complete(_Run(options, listener, tracer).run())
        if tracer is not None and code == 0:
            tracer.close()
        return code
    finally:
        listener.close()
        if options.uds is not None:
            Path(options.uds).unlink(missing_ok=True)
        asyncio.set_event_loop(None)
        loop.close()


def warn_if_open(options: ServeOptions) -> None:
    """Say so where others can reach a server that asks for no key."""
    is_local = options.uds is not None or options.host in ("127.0.0.1", "::1", "localhost")
    if not is_local and not options.api_keys:
        err(f"pace: warning: others can reach {options.host} and no --api-key is set: everybody may ask")


def _check_tls(options: ServeOptions) -> None:
    """Try certificates and keys before anything is loaded.

    Raises:
        ConfigError: one can't be used, or would not be.
    """
    if options.ssl_certfile is None:
        for name in ("ssl_keyfile", "ssl_ca_certs"):
            if getattr(options, name) is not None:
                raise ConfigError(f"{name} is given without ssl_certfile: nothing would be encrypted")
        return
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # A key with a password would be asked for at a terminal.
        context.load_cert_chain(options.ssl_certfile, options.ssl_keyfile, password=lambda: "")
    except (OSError, ValueError) as error:
        key = options.ssl_keyfile or "its key in the same file"
        raise ConfigError(f"{options.ssl_certfile} and {key} can't serve TLS: {error}") from None
    if options.ssl_ca_certs is not None:
        try:
            context.load_verify_locations(options.ssl_ca_certs)
        except OSError as error:
            raise ConfigError(f"{options.ssl_ca_certs} can't check clients' certificates: {error}") from None


def _is_served(path: Path) -> bool:
    """Whether somebody listens at a unix socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as trial:
        return trial.connect_ex(str(path)) == 0


def _listen(options: ServeOptions) -> socket.socket:
    """The bound socket; before anything is loaded, so that a port in use is told at once."""
    try:
        if options.uds is not None:
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            path = Path(options.uds)
            if path.is_socket() and not _is_served(path):  # its server has not ended well
                path.unlink()
            listener.bind(options.uds)
        else:
            family, *_, address = socket.getaddrinfo(
                options.host, options.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            listener = socket.socket(family, socket.SOCK_STREAM)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
    except OSError as error:
        where = options.uds or f"{options.host} port {options.port}"
        raise ConfigError(f"can't listen at {where}: {error.strerror or error}; choose another") from None
    return listener


class _Run:
    """One run of the server."""

    def __init__(self, options: ServeOptions, listener: socket.socket, tracer: Tracer | None) -> None:
        self._options = options
        self._tracer = tracer
        self._listener = listener
        self._stop = asyncio.Event()
        self._n_signals = 0
        self._error: PaceError | None = None  # why the server can't go on

    async def run(self) -> int:
        """Serve until a signal; returns the exit code.

        Raises:
            PaceError: the model can't be loaded, or no engine lives any more.
        """
        with on_signals(self._on_signal):
            return await self._run()

    async def _run(self) -> int:
        options = self._options
        config = options.config
        n_threads = config.n_threads or ops.default_threads()[0]
        backend = Router(
            config,
            place(options.data_parallel, config.cpus, n_threads),
            max_waiting=options.limits.max_waiting,
            restarts=options.restarts,
            on_fatal=self._on_fatal,
            stall_timeout_s=options.stall_timeout_s,
            parsers=options.parsers,
        )
        keys = Keys(options.api_keys, options.max_open_per_key)
        service = Service(backend, options.names, options.limits, keys, self._tracer)
        server = _Server(self._uvicorn(service))
        serving = asyncio.ensure_future(server.serve(sockets=[self._listener]))
        ticking = asyncio.ensure_future(_tick(service))
        loading = asyncio.ensure_future(self._load(backend))
        stopping = asyncio.ensure_future(self._stop.wait())
        try:
            await asyncio.wait({stopping, serving}, return_when=asyncio.FIRST_COMPLETED)
            service.is_draining = True
            if self._error is None:
                await self._drain(service)
            backend.fail_all("the server is shutting down")
            server.should_exit = True
            server.force_exit = self._n_signals > 1
            ended, _ = await asyncio.wait({serving}, timeout=ABORT_S + 1.0)
            for task in ended:
                task.result()  # or what it died of
        finally:
            stopping.cancel()
            loading.cancel()
            ticking.cancel()
            await backend.close()
        if self._error is not None:
            raise self._error
        return 0 if self._n_signals <= 1 else 1

    async def _load(self, backend: Router) -> None:
        try:
            await backend.start()
        except PaceError as error:
            self._on_fatal(error)
        else:
            err(f"[pace serves {', '.join(self._options.names)} at {self._address()}]")

    def _on_fatal(self, error: PaceError) -> None:
        self._error = self._error or error
        self._stop.set()

    def _on_signal(self) -> None:
        self._n_signals += 1
        self._stop.set()

    async def _drain(self, service: Service) -> None:
        """Wait until nothing runs any more, the time is over, or a second signal comes."""
        loop = asyncio.get_running_loop()
        end = loop.time() + self._options.shutdown_timeout_s
        while service.backend.n_calls and loop.time() < end and self._n_signals <= 1:
            await asyncio.sleep(0.02)

    def _uvicorn(self, service: Service) -> uvicorn.Config:
        options = self._options
        return uvicorn.Config(
            make_app(
                service,
                access_log=options.access_log,
                origins=options.origins,
                has_page=options.has_page,
            ),
            http=guarded(options.head_timeout_s),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            date_header=False,
            proxy_headers=False,
            root_path=options.root_path,
            ssl_certfile=options.ssl_certfile,
            ssl_keyfile=options.ssl_keyfile,
            ssl_ca_certs=options.ssl_ca_certs,
            ssl_cert_reqs=ssl.CERT_NONE if options.ssl_ca_certs is None else ssl.CERT_REQUIRED,
            timeout_graceful_shutdown=1,
        )

    def _address(self) -> str:
        options = self._options
        if options.uds is not None:
            return f"unix:{options.uds}"
        host, port = self._listener.getsockname()[:2]
        return (
            f"{'https' if options.ssl_certfile else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"
        )


async def _tick(service: Service) -> None:
    while True:
        await asyncio.sleep(TICK_S)
        service.slow.end_slow()
