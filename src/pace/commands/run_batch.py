"""`pace run-batch`: answer a file of requests."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pace.commands import options
from pace.errors import ConfigError


def add(commands: Any) -> None:
    """Describe the command."""
    parser = options.add_command(
        commands,
        "run-batch",
        run,
        "answer a file of requests in OpenAI's batch format",
        "pace run-batch -i requests.jsonl -o answers.jsonl --model ./Llama-3.2-1B",
    )
    group = parser.add_argument_group("files")
    group.add_argument(
        "-i",
        "--input-file",
        required=True,
        metavar="FILE",
        help='JSON lines: {"custom_id": ID, "method": "POST", "url": "/v1/chat/completions", "body": {...}}',
    )
    group.add_argument(
        "-o",
        "--output-file",
        required=True,
        metavar="FILE",
        help="JSON lines of answers, in the order in which they come; requests that have one there are left out",
    )
    options.add_engine_options(parser)
    group = parser.add_argument_group("server")
    group.add_argument(
        "--served-model-name", nargs="+", metavar="NAME", help="what requests call it (default: as given)"
    )
    options.add_data_parallel(group)
    group.add_argument(
        "--max-n", type=options.positive, default=16, metavar="N", help="completions of a prompt"
    )


def run(args: argparse.Namespace) -> int:
    """Carry the command out."""
    try:
        from pace.server.batch import BatchOptions, run_batch
    except ModuleNotFoundError as error:
        raise ConfigError(
            f'run-batch needs {error.name}; install it with: pip install "pace[serve]"'
        ) from None
    from pace.server.service import Limits

    options.check_folder(args.output_file)
    if Path(args.input_file).absolute() == Path(args.output_file).absolute():
        raise ConfigError(f"{args.output_file} is input and output; name another file")
    return run_batch(
        BatchOptions(
            config=options.engine_config(args),
            names=tuple(args.served_model_name or (args.model,)),
            input=Path(args.input_file),
            output=Path(args.output_file),
            limits=Limits(max_n=args.max_n, max_waiting=1 << 30),
            data_parallel=args.data_parallel,
        )
    )
