"""`pace bench serve`: load on a server of OpenAI's API."""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

from pace.commands import options
from pace.console import out
from pace.errors import RequestError

NUM_PROMPTS, INPUT_LEN, OUTPUT_LEN = 100, 128, 64


def add(commands: Any) -> None:
    """Describe the command."""
    text = "measure a server of OpenAI's API under load"
    parser = options.add_command(
        commands,
        "serve",
        run,
        text,
        "pace bench serve --port 8000 --dataset-name sharegpt-like --request-rate 2",
    )
    group = parser.add_argument_group("server")
    group.add_argument("--base-url", metavar="URL", help="of the server (default: http://HOST:PORT)")
    group.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1")
    group.add_argument("--port", type=options.positive, default=8000, metavar="N", help="default: 8000")
    group.add_argument("--model", metavar="NAME", help="default: the first that the server has")
    group.add_argument("--api-key", metavar="KEY")
    group.add_argument(
        "--backend",
        choices=("openai", "openai-chat"),
        default="openai",
        help="completions or chats (default: openai)",
    )
    group.add_argument(
        "--ignore-eos",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="ask for outputs of full length; OpenAI's own API has no such field (default: on)",
    )
    group.add_argument("--extra-body", metavar="JSON", help="fields of every request")
    group.add_argument(
        "--timeout", type=float, default=600.0, metavar="S", help="of a request (default: 600)"
    )
    _add_requests(parser.add_argument_group("requests"))
    group = parser.add_argument_group("figures")
    group.add_argument(
        "--goodput",
        nargs="+",
        default=[],
        metavar="METRIC:MS",
        help="count requests that keep ttft, tpot, e2el",
    )
    group.add_argument("--metric-percentiles", default="50,90,99", metavar="LIST", help="default: 50,90,99")
    group.add_argument("--result-filename", metavar="FILE", help="write the figures as JSON, too")
    group.add_argument("--save-detailed", action="store_true", help="with the values of every request")
    group.add_argument("--json", action="store_true", help="as JSON")


def _add_requests(group: Any) -> None:
    group.add_argument(
        "--dataset-name",
        choices=("random", "sharegpt-like", "burstgpt-like"),
        default="random",
        help="lengths of made-up prompts and outputs (default: random)",
    )
    group.add_argument(
        "--dataset", metavar="FILE", help='JSONL: {"prompt": TEXT} with "max_tokens" or "output_len"'
    )
    group.add_argument(
        "--num-prompts", type=options.positive, metavar="N", help=f"default: {NUM_PROMPTS}, or the whole file"
    )
    group.add_argument(
        "--input-len", type=options.positive, default=INPUT_LEN, metavar="N", help=f"default: {INPUT_LEN}"
    )
    group.add_argument("--output-len", type=options.positive, metavar="N", help=f"default: {OUTPUT_LEN}")
    group.add_argument(
        "--random-range-ratio", type=float, default=0.0, metavar="R", help="see bench throughput"
    )
    group.add_argument("--random-prefix-len", type=int, default=0, metavar="N", help="tokens that all share")
    group.add_argument(
        "--length-scale", type=float, default=1.0, metavar="X", help="multiplies the lengths of a trace"
    )
    group.add_argument(
        "--request-rate",
        type=float,
        default=float("inf"),
        metavar="R",
        help="a second (default: all at once)",
    )
    group.add_argument(
        "--burstiness",
        type=float,
        metavar="X",
        help="shape of the gaps' gamma distribution: 1 is Poisson, less is bursts (default: the trace's, else 1)",
    )
    group.add_argument(
        "--burst-size", type=options.positive, default=1, metavar="N", help="requests that arrive together"
    )
    group.add_argument(
        "--max-concurrency", type=options.positive, metavar="N", help="open requests at a time (default: any)"
    )
    group.add_argument("--seed", type=int, default=0, metavar="S", help="of lengths, texts and times")


def run(args: argparse.Namespace) -> int:
    """Carry the command out."""
    import asyncio  # not at the top: 30 ms of every command's start

    from pace.benchmarks import serve
    from pace.benchmarks.dataset import read_jsonl
    from pace.benchmarks.serve_figures import format_serve, summary
    from pace.benchmarks.traces import TRACES, arrivals, shapes_of

    percentiles = _percentiles(args.metric_percentiles)
    goodput = _goodput(args.goodput)
    options.check_folder(args.result_filename)
    requests: Any
    if args.dataset is not None:
        requests = read_jsonl(args.dataset, args.num_prompts, args.output_len)
    else:
        requests = shapes_of(
            args.dataset_name,
            args.num_prompts or NUM_PROMPTS,
            input_len=args.input_len,
            output_len=args.output_len or OUTPUT_LEN,
            prefix_len=args.random_prefix_len,
            range_ratio=args.random_range_ratio,
            scale=args.length_scale,
            seed=args.seed,
        )
    burstiness = args.burstiness
    if burstiness is None:
        burstiness = TRACES[args.dataset_name].burstiness if args.dataset_name in TRACES else 1.0
    times = arrivals(
        len(requests), args.request_rate, burstiness=burstiness, burst_size=args.burst_size, seed=args.seed
    )
    extra = {} if args.extra_body is None else options.parse_json(args.extra_body, "--extra-body", dict)
    load = serve.Load(
        args.base_url or f"http://{args.host}:{args.port}",
        args.model,
        args.backend == "openai-chat",
        args.api_key,
        args.max_concurrency,
        args.ignore_eos,
        args.timeout,
        extra,
    )
    model, outcomes, duration_s = asyncio.run(serve.run(load, requests, times.tolist(), seed=args.seed))
    result: dict[str, Any] = {
        "date": time.strftime("%Y%m%d-%H%M%S"),
        "backend": args.backend,
        "base_url": load.base_url,
        "model_id": model,
        "num_prompts": len(requests),
        "request_rate": "inf" if args.request_rate == float("inf") else args.request_rate,
        "burstiness": burstiness,
        "max_concurrency": args.max_concurrency,
        "goodput": " ".join(args.goodput),
    } | summary(
        outcomes, duration_s, percentiles=percentiles, goodput=goodput, is_detailed=args.save_detailed
    )
    text = json.dumps(result)
    if args.result_filename is not None:
        options.write_file(args.result_filename, text + "\n")
    out(text if args.json else format_serve(result, percentiles))
    return options.EXIT_OK if result["completed"] else options.EXIT_FAILURE


def _percentiles(text: str) -> list[float]:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = [-1.0]
    if not all(0 <= value <= 100 for value in values):
        raise RequestError(f"--metric-percentiles is {text!r}, expected numbers from 0 to 100, such as 50,99")
    return values


def _goodput(pairs: list[str]) -> dict[str, float]:
    from pace.benchmarks.serve_figures import GOODPUT_METRICS

    limits = {}
    for pair in pairs:
        name, _, limit = pair.partition(":")
        try:
            limits[name] = float(limit)
        except ValueError:
            limits[name] = -1.0
        if name not in GOODPUT_METRICS or limits[name] < 0:
            raise RequestError(
                f"--goodput has {pair!r}, expected {', '.join(GOODPUT_METRICS)} with milliseconds, such as ttft:200"
            )
    return limits
