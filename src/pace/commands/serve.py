"""`pace serve`: an OpenAI-compatible server."""

from __future__ import annotations

import argparse
from typing import Any

from pace.commands import options
from pace.errors import ConfigError


def add(commands: Any) -> None:
    """Describe the command."""
    text = "serve a model to clients of OpenAI's API"
    parser = options.add_command(commands, "serve", run, text, "pace serve ./Llama-3.2-1B --port 8000")
    options.add_engine_options(parser, positional=True)
    group = parser.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1)")
    group.add_argument("--port", type=_port, default=8000, metavar="N", help="default: 8000; 0: any free one")
    group.add_argument("--uds", metavar="PATH", help="listen at a unix socket instead")
    group.add_argument("--ssl-certfile", metavar="FILE", help="serve TLS with this certificate")
    group.add_argument("--ssl-keyfile", metavar="FILE", help="its key")
    group.add_argument("--root-path", default="", metavar="PATH", help="prefix that a proxy in front adds")
    group.add_argument(
        "--served-model-name",
        nargs="+",
        metavar="NAME",
        help="what clients call the model (default: as given)",
    )
    group.add_argument(
        "--shutdown-timeout",
        type=float,
        default=30.0,
        metavar="S",
        help="how long streams may go on after SIGTERM (default: 30)",
    )
    group = parser.add_argument_group("limits")
    group.add_argument(
        "--max-body-bytes", type=options.positive, default=8 << 20, metavar="N", help="of a request"
    )
    group.add_argument(
        "--slow-client-timeout", type=float, default=60.0, metavar="S", help="ends streams that nobody takes"
    )
    group.add_argument(
        "--max-n", type=options.positive, default=16, metavar="N", help="completions of a prompt"
    )
    group.add_argument(
        "--trust-request-chat-template", action="store_true", help="take chat templates from requests"
    )


def run(args: argparse.Namespace) -> int:
    """Carry the command out."""
    try:
        from pace.server.serve import ServeOptions, serve
    except ModuleNotFoundError as error:
        raise ConfigError(
            f'the server needs {error.name}; install it with: pip install "pace[serve]"'
        ) from None
    from pace.server.service import Limits

    return serve(
        ServeOptions(
            config=options.engine_config(args),
            names=tuple(args.served_model_name or (args.model,)),
            host=args.host,
            port=args.port,
            uds=args.uds,
            ssl_certfile=args.ssl_certfile,
            ssl_keyfile=args.ssl_keyfile,
            root_path=args.root_path,
            shutdown_timeout_s=args.shutdown_timeout,
            limits=Limits(
                max_body_bytes=args.max_body_bytes,
                slow_client_timeout_s=args.slow_client_timeout,
                max_n=args.max_n,
                trust_request_chat_template=args.trust_request_chat_template,
            ),
        )
    )


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) < 1 << 16):
        raise argparse.ArgumentTypeError(f"{text!r} is not a port, 0 to 65535")
    return int(text)
