"""`pace eval …`: how good a model's predictions are, not how fast."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from pace.commands import options
from pace.config import KV_CACHE_DTYPES, parse_cpus
from pace.console import out
from pace.errors import ConfigError, RequestError, show


def add(commands: Any) -> None:
    """Describe the commands."""
    evaluate = commands.add_parser("eval", help="measure how good predictions are")
    evaluations = evaluate.add_subparsers(metavar="EVALUATION", required=True)
    _add_perplexity(evaluations)


def _add_perplexity(commands: Any) -> None:
    parser = options.add_command(
        commands,
        "perplexity",
        run_perplexity,
        "measure how well a model predicts a text, and how far it is from another one",
        "pace eval perplexity --model ./Llama-3.2-1B --kv-cache-dtype int8 --data book.txt --against ./Llama-3.2-1B",
    )
    options.add_engine_options(parser)
    group = parser.add_argument_group("evaluation")
    group.add_argument(
        "--data",
        required=True,
        metavar="FILE",
        help='UTF-8 text, or JSONL with one {"text": ...} a line: each is scored by itself',
    )
    group.add_argument(
        "--window",
        type=options.positive,
        metavar="N",
        help="tokens read at once (default: 2048, or the context)",
    )
    group.add_argument(
        "--stride",
        type=options.positive,
        metavar="N",
        help="tokens that each window scores behind the one before (default: half of it)",
    )
    group.add_argument(
        "--against", metavar="MODEL", help="compare with this model: KL divergence and greedy agreement"
    )
    group.add_argument(
        "--against-kv-cache-dtype", choices=KV_CACHE_DTYPES, help="of that model (default: bf16)"
    )
    group.add_argument("--json", action="store_true", help="as JSON")
    group.add_argument("--output-json", metavar="FILE", help="write the JSON to a file, too")


def run_perplexity(args: argparse.Namespace) -> int:
    """Carry `pace eval perplexity` out."""
    from pace.benchmarks import perplexity
    from pace.config import EngineConfig

    options.check_folder(args.output_json)
    texts = _read_texts(args.data)
    defaults: dict[str, Any] = {"max_num_seqs": 1}
    if args.window is not None:
        defaults["max_model_len"] = args.window + 1
    config = options.engine_config(args, **defaults)
    against = None
    if args.against is not None:
        against = EngineConfig(
            model=args.against,
            max_num_seqs=1,
            max_model_len=config.max_model_len,
            kv_cache_dtype=args.against_kv_cache_dtype or "bf16",
            n_threads=args.threads,
            cpus=None if args.cpus is None else parse_cpus(args.cpus),
        )
    elif args.against_kv_cache_dtype is not None:
        raise ConfigError("--against-kv-cache-dtype needs --against MODEL")
    result = perplexity.run(
        config,
        args.data,
        texts,
        window=args.window,
        stride=args.stride,
        against=against,
        on_plan=options.print_plan,
    )
    text = json.dumps(result.to_json(), indent=2)
    out(text if args.json else perplexity.format_perplexity(result))
    if args.output_json is not None:
        options.write_file(args.output_json, text + "\n")
    return options.EXIT_OK


def _read_texts(path: str) -> list[str]:
    """The texts of a file, every byte of them.

    Raises:
        RequestError: it can't be read, is not UTF-8, or has a line that is no {"text": TEXT}; the message names the line.
    """
    try:
        whole = Path(path).read_bytes().decode("utf-8")
    except OSError as error:
        raise RequestError(f"{path}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise RequestError(f"{path}: not UTF-8 at byte {error.start}") from None
    if not path.endswith(".jsonl"):
        return [whole]
    texts = []
    for number, line in enumerate(whole.split("\n"), 1):
        if not line.strip():
            continue
        try:
            values: Any = json.loads(line)
        except ValueError as error:
            raise RequestError(f"{path}:{number}: not JSON: {error}") from None
        text = values.get("text") if isinstance(values, dict) else None
        if not isinstance(text, str):
            raise RequestError(f'{path}:{number}: {show(values)}, expected {{"text": TEXT}}')
        texts.append(text)
    return texts
