"""`pace serve`: an OpenAI-compatible server."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from pace.commands import options
from pace.errors import ConfigError
from pace.params import MAX_N
from pace.text.reasoning import REASONING_PARSERS
from pace.text.tools import PARSER_ALIASES, TOOL_PARSERS
from pace.vllm_names import ENGINE_OPTIONS, REQUEST_OPTIONS, Foreign


def add(commands: Any) -> None:
    """Describe the command."""
    text = "serve a model to clients of OpenAI's API"
    parser = options.add_command(commands, "serve", run, text, "pace serve ./Llama-3.2-1B --port 8000")
    parser.set_defaults(config_parser=parser)
    options.add_engine_options(parser, positional=True)
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="YAML with the names of these options, model among them; what is given here wins",
    )
    _add_chats(parser.add_argument_group("chats"))
    _add_server(parser.add_argument_group("server"))
    _add_engines(parser.add_argument_group("engines"))
    _add_limits(parser.add_argument_group("limits"))


def _add_chats(group: Any) -> None:
    group.add_argument(
        "--tool-call-parser",
        choices=sorted({*TOOL_PARSERS, *PARSER_ALIASES}),
        metavar="FORM",
        help=f"of tool calls: {', '.join(sorted(TOOL_PARSERS))}, or vLLM's name (default: what the chat template shows)",
    )
    group.add_argument(
        "--reasoning-parser",
        choices=sorted(REASONING_PARSERS),
        metavar="FORM",
        help="of reasoning: think, mistral, seed_oss, gemma4, or vLLM's name; none: it stays in the text (default: what "
        "the chat template shows)",
    )
    group.add_argument(
        "--enable-auto-tool-choice",
        action="store_true",
        help="changes nothing, for callers of vLLM: models may always call tools",
    )
    group.add_argument(
        "--chat-template", metavar="FILE", help="a Jinja template in place of the checkpoint's"
    )
    group.add_argument(
        "--chat-template-content-format",
        type=_asks_for_nothing(REQUEST_OPTIONS["chat_template_content_format"]),
        metavar="auto|string",
        help="changes nothing, for callers of vLLM: templates that loop over a message's content get lists of parts, "
        "others one text",
    )


def _add_server(group: Any) -> None:
    group.add_argument("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1)")
    group.add_argument("--port", type=_port, default=8000, metavar="N", help="default: 8000; 0: any free one")
    group.add_argument("--uds", type=_name, metavar="PATH", help="listen at a unix socket instead")
    group.add_argument("--ssl-certfile", metavar="FILE", help="serve TLS with this certificate")
    group.add_argument("--ssl-keyfile", metavar="FILE", help="its key")
    group.add_argument("--ssl-ca-certs", metavar="FILE", help="ask clients for certificates signed by these")
    group.add_argument(
        "--api-key",
        action="append",
        default=[],
        metavar="KEY",
        help="a key that clients must send; may be repeated; other users of this machine can see it",
    )
    group.add_argument("--api-key-file", metavar="FILE", help="such keys, one a line")
    group.add_argument(
        "--allowed-origins",
        nargs="+",
        default=[],
        metavar="ORIGIN",
        help="web pages that may ask from browsers",
    )
    group.add_argument(
        "--access-log",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="write a line of JSON for each request to stderr, without its text (default: on)",
    )
    group.add_argument(
        "--disable-log-requests",
        dest="access_log",
        action="store_false",
        help="vLLM's name of --no-access-log",
    )
    group.add_argument(
        "--page",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="answer / with a page to chat (default: on)",
    )
    group.add_argument(
        "--otlp-traces-endpoint",
        metavar="URL",
        help="send a span for each request there, as OTLP over HTTP, without its text (default: off)",
    )
    group.add_argument("--root-path", default="", metavar="PATH", help="prefix that a proxy in front adds")
    group.add_argument(
        "--served-model-name",
        type=_name,
        nargs="+",
        metavar="NAME",
        help="what clients call the model (default: as given)",
    )
    group.add_argument(
        "--shutdown-timeout",
        type=_seconds,
        default=30.0,
        metavar="S",
        help="how long streams may go on after SIGTERM (default: 30)",
    )


def _add_engines(group: Any) -> None:
    options.add_data_parallel(group)
    group.add_argument(
        "--seed", type=int, default=0, metavar="S", help="of requests that give none (default: 0)"
    )
    group.add_argument(
        "--dtype",
        type=_asks_for_nothing(ENGINE_OPTIONS["dtype"]),
        metavar="auto|bfloat16",
        help="changes nothing, for callers of vLLM: everything is computed in bfloat16 with float32 sums",
    )
    group.add_argument(
        "--on-engine-death",
        choices=("restart", "exit"),
        default="restart",
        help="what to do when an engine's process ends or hangs (default: restart)",
    )
    group.add_argument(
        "--stall-timeout",
        type=_seconds,
        default=300.0,
        metavar="S",
        help="an engine that makes no step for so long, though it should, is taken for dead (default: 300)",
    )


def _add_limits(group: Any) -> None:
    group.add_argument(
        "--max-num-waiting",
        type=_count,
        default=512,
        metavar="N",
        help="sequences that may wait beside those that run; more are answered with 429 (default: 512)",
    )
    group.add_argument(
        "--max-open-per-key", type=options.positive, metavar="N", help="requests that a key may have open"
    )
    group.add_argument(
        "--head-timeout",
        type=_seconds,
        default=5.0,
        metavar="S",
        help="for the head of a request (default: 5)",
    )
    group.add_argument(
        "--body-timeout", type=_seconds, default=30.0, metavar="S", help="for its body (default: 30)"
    )
    group.add_argument(
        "--max-body-bytes", type=options.positive, default=8 << 20, metavar="N", help="of a request"
    )
    group.add_argument(
        "--slow-client-timeout",
        type=_seconds,
        default=60.0,
        metavar="S",
        help="a stream whose client takes nothing for so long is ended (default: 60)",
    )
    group.add_argument(
        "--max-n",
        type=_max_n,
        default=16,
        metavar="N",
        help=f"completions of a prompt, at most {MAX_N} (default: 16)",
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
    from pace.server.keys import read_keys
    from pace.server.service import Limits
    from pace.server.wire import Parsers

    if args.model is None:
        raise ConfigError("which model? name it behind serve, or as model in the file of --config")
    keys = [*args.api_key, *([] if args.api_key_file is None else read_keys(args.api_key_file))]
    return serve(
        ServeOptions(
            config=options.engine_config(args, seed=args.seed, chat_template=args.chat_template),
            names=tuple(dict.fromkeys(args.served_model_name or (args.model,))),
            host=args.host,
            port=args.port,
            uds=args.uds,
            ssl_certfile=args.ssl_certfile,
            ssl_keyfile=args.ssl_keyfile,
            ssl_ca_certs=args.ssl_ca_certs,
            api_keys=tuple(keys),
            max_open_per_key=args.max_open_per_key,
            origins=tuple(args.allowed_origins),
            access_log=args.access_log,
            has_page=args.page,
            otlp_traces_endpoint=args.otlp_traces_endpoint,
            root_path=args.root_path,
            head_timeout_s=args.head_timeout,
            shutdown_timeout_s=args.shutdown_timeout,
            data_parallel=args.data_parallel,
            restarts=args.on_engine_death == "restart",
            stall_timeout_s=args.stall_timeout,
            parsers=Parsers(args.tool_call_parser, args.reasoning_parser),
            limits=Limits(
                max_body_bytes=args.max_body_bytes,
                body_timeout_s=args.body_timeout,
                slow_client_timeout_s=args.slow_client_timeout,
                max_n=args.max_n,
                max_waiting=args.max_num_waiting,
                trust_request_chat_template=args.trust_request_chat_template,
            ),
        )
    )


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) < 1 << 16):
        raise argparse.ArgumentTypeError(f"{text!r} is not a port, 0 to 65535")
    return int(text)


def _name(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError(f"{text!r} is no name")
    return text


def _asks_for_nothing(option: Foreign) -> Callable[[str], str]:
    """Takes the values of an option of vLLM that pace can do without."""

    def take(text: str) -> str:
        if text not in (option.neutral or ()):
            raise argparse.ArgumentTypeError(f"{text!r} is what pace does not have: {option.instead}")
        return text

    return take


def _max_n(text: str) -> int:
    if options.positive(text) > MAX_N:
        raise argparse.ArgumentTypeError(f"{text!r} is above {MAX_N}")
    return int(text)


def _count(text: str) -> int:
    return 0 if text == "0" else options.positive(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e9:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds")
    return value
