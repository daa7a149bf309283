"""`pace bench …`: measure the machine or a model."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from pace.commands import bench_serve, options
from pace.config import parse_cpus
from pace.console import out
from pace.errors import ConfigError, RequestError

if TYPE_CHECKING:
    from pace.benchmarks.profile import StepProfile

NUM_PROMPTS, INPUT_LEN, OUTPUT_LEN = 100, 1024, 128  # of a throughput run, unless told otherwise


def add(commands: Any) -> None:
    """Describe the commands."""
    bench = commands.add_parser("bench", help="measure the machine or a model")
    benches = bench.add_subparsers(metavar="BENCHMARK", required=True)
    _add_roofline(benches)
    _add_latency(benches)
    _add_throughput(benches)
    bench_serve.add(benches)


def _add_roofline(commands: Any) -> None:
    text = "measure the memory-read and dot-product roofs of this machine"
    parser = options.add_command(
        commands, "roofline", run_roofline, text, "pace bench roofline --threads 1 2 4"
    )
    parser.add_argument(
        "--threads",
        type=options.positive,
        nargs="+",
        metavar="N",
        help="thread counts (default: 1 and what engines take)",
    )
    parser.add_argument("--cpus", metavar="LIST", help="pin the threads to these CPUs, such as 0-3,8")
    parser.add_argument(
        "--repeat", type=options.positive, default=5, metavar="N", help="runs per figure (default: 5)"
    )
    parser.add_argument("--json", action="store_true", help="as JSON")


def _add_latency(commands: Any) -> None:
    parser = options.add_command(
        commands,
        "latency",
        run_latency,
        "measure prefill and decode speed, and their shares of the machine's roofs",
        "pace bench latency --model ./Llama-3.2-1B --input-len 512 1920 --batch-size 1 8 32 --json",
    )
    options.add_engine_options(parser, tokenizer=False)
    group = parser.add_argument_group("measurement")
    counts = {"type": options.positive, "nargs": "+", "metavar": "N"}
    group.add_argument(
        "--input-len", default=[512], help="prompt lengths for prefill (default: 512)", **counts
    )
    group.add_argument(
        "--batch-size", default=[1, 8, 32], help="sequences that decode (default: 1 8 32)", **counts
    )
    group.add_argument("--context", default=[128], help="tokens before decoding (default: 128)", **counts)
    group.add_argument(
        "--output-len",
        type=options.positive,
        default=32,
        metavar="N",
        help="decode steps per repetition (default: 32)",
    )
    group.add_argument(
        "--repeat", type=options.positive, default=5, metavar="N", help="repetitions (default: 5)"
    )
    _add_measuring_options(group)


def _add_throughput(commands: Any) -> None:
    parser = options.add_command(
        commands,
        "throughput",
        run_throughput,
        "measure how many tokens/s many requests get together",
        "pace bench throughput --model ./Llama-3.2-1B --num-prompts 64 --input-len 512 --output-len 128",
    )
    options.add_engine_options(parser)
    group = parser.add_argument_group("requests")
    group.add_argument(
        "--dataset-name", choices=["random"], default="random", help="made-up prompts; --dataset overrides it"
    )
    group.add_argument(
        "--dataset",
        metavar="FILE",
        help='JSONL: {"prompt": TEXT} or {"prompt_token_ids": [...]}, with "max_tokens" or "output_len"',
    )
    group.add_argument(
        "--num-prompts",
        type=options.positive,
        metavar="N",
        help=f"requests (default: {NUM_PROMPTS}, or the whole file)",
    )
    group.add_argument(
        "--input-len", type=options.positive, metavar="N", help=f"tokens of a prompt (default: {INPUT_LEN})"
    )
    group.add_argument(
        "--output-len",
        type=options.positive,
        metavar="N",
        help=f"tokens to generate (default: {OUTPUT_LEN}, or what the file says)",
    )
    group.add_argument(
        "--random-prefix-len",
        type=int,
        default=0,
        metavar="N",
        help="tokens that all prompts share, before those of --input-len",
    )
    group.add_argument(
        "--random-range-ratio",
        type=float,
        default=0.0,
        metavar="R",
        help="lengths vary between (1 - R) and (1 + R) of what they are (default: 0)",
    )
    group.add_argument("--seed", type=int, default=0, metavar="S", help="of the random prompts (default: 0)")
    group = parser.add_argument_group("measurement")
    group.add_argument(
        "--warmup", type=int, default=1, metavar="N", help="requests before the measurement (default: 1)"
    )
    _add_measuring_options(group)


def _add_measuring_options(group: Any) -> None:
    group.add_argument(
        "--random-weights",
        action="store_true",
        help="of the model read only config.json, and invent the weights",
    )
    group.add_argument(
        "--profile",
        nargs="?",
        const="",
        metavar="PNG",
        help="break steps down by operator: as a table, and as a chart where a file is named",
    )
    group.add_argument("--json", action="store_true", help="as JSON")
    group.add_argument("--output-json", metavar="FILE", help="write the JSON to a file, too")


def run_roofline(args: argparse.Namespace) -> int:
    """Carry `pace bench roofline` out."""
    from pace import ops
    from pace.benchmarks import roofline

    cpus = None if args.cpus is None else parse_cpus(args.cpus)
    default = ops.default_threads()[0] if cpus is None else len(cpus)
    results = roofline.measure(args.threads or sorted({1, default}), cpus, args.repeat)
    if args.json:
        out(json.dumps([roofs.to_json() for roofs in results], indent=2))
    else:
        out(roofline.format_roofs(results))
    return options.EXIT_OK


def run_latency(args: argparse.Namespace) -> int:
    """Carry `pace bench latency` out."""
    from pace.benchmarks import latency

    _check_files(args)
    n_rows = args.max_num_batched_tokens or max(2048, *args.input_len, *args.batch_size)
    lengths = (args.input_len, args.batch_size, args.context, args.output_len, args.repeat)
    need = {"max_model_len": latency.longest(*lengths, n_rows), "max_num_seqs": max(args.batch_size)}
    for name, value in need.items():
        given = getattr(args, name)
        if given is not None and given < value:
            raise ConfigError(f"{name} is {given}, these measurements need {value}")
    config = options.engine_config(args, max_num_batched_tokens=n_rows, **need)
    result = latency.run(
        config,
        input_lens=args.input_len,
        batch_sizes=args.batch_size,
        contexts=args.context,
        output_len=args.output_len,
        repeat=args.repeat,
        random_weights=args.random_weights,
        profile=args.profile is not None,
        on_plan=options.print_plan,
    )
    _report(args, result.to_json(), latency.format_latency(result), result.profile)
    return options.EXIT_OK


def run_throughput(args: argparse.Namespace) -> int:
    """Carry `pace bench throughput` out."""
    from pace.benchmarks import dataset, throughput

    _check_files(args)
    for name in ("random_prefix_len", "seed", "warmup"):
        if getattr(args, name) < 0:
            raise RequestError(f"{name} is {getattr(args, name)}, expected 0 or more")
    if args.dataset is None:
        shapes = dataset.random_shapes(
            args.num_prompts or NUM_PROMPTS,
            args.input_len or INPUT_LEN,
            args.output_len or OUTPUT_LEN,
            prefix_len=args.random_prefix_len,
            range_ratio=args.random_range_ratio,
            seed=args.seed,
        )
        n, has_text = len(shapes), False
        longest = max(s.prefix_len + s.input_len + s.output_len for s in shapes)

        def make_requests(vocab_size: int) -> list[dataset.BenchRequest]:
            return dataset.random_requests(shapes, vocab_size, args.seed)

    else:
        if args.input_len is not None or args.random_prefix_len or args.random_range_ratio:
            raise RequestError("--dataset brings its own prompts; leave out --input-len and --random-...")
        requests = dataset.read_jsonl(args.dataset, args.num_prompts, args.output_len)
        n, has_text = len(requests), any(isinstance(request.prompt, str) for request in requests)
        longest = max(len(request.prompt) + request.output_len for request in requests)

        def make_requests(vocab_size: int) -> list[dataset.BenchRequest]:
            return requests

    defaults: dict[str, Any] = {"max_num_waiting": max(1 << 16, n)}
    if not has_text:  # of texts the length is known only to the tokenizer
        defaults["max_model_len"] = longest
    result = throughput.run(
        options.engine_config(args, **defaults),
        make_requests,
        warmup=args.warmup,
        random_weights=args.random_weights,
        skip_tokenizer=not has_text,
        profile=args.profile is not None,
        on_plan=options.print_plan,
    )
    _report(args, result.to_json(), throughput.format_throughput(result), result.profile)
    return options.EXIT_OK


def _check_files(args: argparse.Namespace) -> None:
    """Refuse what could not be written in the end, before any work is done."""
    if args.profile:
        from pace.benchmarks.chart import check_chart

        check_chart(args.profile)
    options.check_folder(args.output_json)


def _report(
    args: argparse.Namespace, values: dict[str, Any], table: str, profiles: list[StepProfile]
) -> None:
    text = json.dumps(values, indent=2)
    out(text if args.json else table)
    if args.output_json is not None:
        options.write_file(args.output_json, text + "\n")
    if args.profile:
        from pace.benchmarks.chart import save_chart

        save_chart(profiles, args.profile, f"{args.model}: where the time of a step goes")
