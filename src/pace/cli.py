"""The command line: arguments in, exit code out. What the commands do is in `commands/`."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import re
import sys
import traceback
from collections.abc import Sequence

from pace import __version__, console, log
from pace.commands import config_file
from pace.commands.options import EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_USAGE
from pace.config import ENVIRONMENT, PACE_LOG_LEVEL
from pace.errors import PaceError, one_line
from pace.vllm_names import ENGINE_OPTIONS, SAMPLING_FIELDS

__all__ = ["main"]

COMMANDS = {
    "generate": "generate",
    "chat": "chat",
    "serve": "serve",
    "run-batch": "run_batch",
    "info": "info",
    "bench": "bench",
    "eval": "evaluate",
    "quantize": "quantize",
    "pack": "pack",
    "train": "train",
}
"""Names, and the modules of `pace.commands` that have them."""

EXAMPLES = """examples:
  pace generate --model demo --prompt "def fibonacci(n):" --max-tokens 64 --temperature 0
  pace generate --model ./Llama-3.2-1B --prompt-file question.txt --temperature 0.7 --top-p 0.9 --seed 1
  echo "Once upon a time" | pace generate --model demo
  pace chat --model ./Qwen3-0.6B --system "Answer briefly."
  pace serve demo --port 8000
  pace run-batch -i requests.jsonl -o answers.jsonl --model ./Llama-3.2-1B
  pace info
  pace bench roofline --threads 1 2 4
  pace bench latency --model ./Llama-3.2-1B --batch-size 1 8 32 --json
  pace bench throughput --model ./Llama-3.2-1B --num-prompts 64 --kv-cache-type paged --profile steps.png
  pace bench serve --port 8000 --dataset-name sharegpt-like --request-rate 2
  pace eval perplexity --model demo --data text.txt --json
  pace quantize ./Llama-3.2-1B ./Llama-3.2-1B-w4g64 --scheme w4g64
  pace pack ./Llama-3.2-1B ./Llama-3.2-1B-packed
  pace train pard --config recipe.toml --out my-draft
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program.

    Args:
        argv: arguments without the program's name; None: those of the process.

    Returns:
        0: done; 1: it failed; 2: wrong usage or input; 130: interrupted.
    """
    console.open_missing()
    try:
        args = _parse(sys.argv[1:] if argv is None else argv)
        log.configure()
        return int(args.run(args))
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # whoever read our output has gone
        console.abandon_stdout()
        return EXIT_FAILURE
    except console.OutputError as error:
        console.abandon_stdout()
        _complain(f"error: {error}")
        return EXIT_FAILURE
    except PaceError as error:
        _complain(f"error: {error}")
        return EXIT_USAGE
    except Exception as error:
        _complain(
            f"internal error: {type(error).__name__}: {one_line(error)}; PACE_LOG_LEVEL=debug shows where"
        )
        return EXIT_FAILURE
    finally:
        console.settle_stderr()


def _complain(line: str) -> None:
    with contextlib.suppress(PaceError):  # the variable itself may be what is wrong
        if PACE_LOG_LEVEL.get() == "debug":
            console.err(traceback.format_exc(), end="")
    console.err(f"pace: {line}")


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments; as vLLM, options may have underscores, and those of vLLM that pace lacks are answered by name."""
    end = list(argv).index("--") if "--" in argv else len(argv)
    # What has a space is a text that begins with dashes.
    names = [re.fullmatch(r"(--[A-Za-z0-9_-]+)(=\S*)?", arg) for arg in argv[:end]]
    dashed = [
        arg if name is None else name[1].replace("_", "-") + (name[2] or "")
        for arg, name in zip(argv, names, strict=False)
    ]
    arguments = [*dashed, *argv[end:]]
    parser = _parser(arguments[:1])
    args, unknown = parser.parse_known_args(arguments)
    if unknown:
        name = unknown[0].partition("=")[0].removeprefix("--").replace("-", "_")
        foreign = (ENGINE_OPTIONS | SAMPLING_FIELDS).get(name)
        hint = (
            "" if foreign is None else f"; pace does not have --{name.replace('_', '-')}: {foreign.instead}"
        )
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    own = getattr(args, "config_parser", None)  # of a command whose options may stand in a file
    if own is not None and args.config is not None:
        return config_file.merged(args.config, own, arguments[1:])
    return args


def _parser(first: Sequence[str] = ()) -> argparse.ArgumentParser:
    """What reads the command line.

    Args:
        first: its first argument: of the command that this names, the others are left out, whose options take longer to
            import and describe than it takes to read a packed model.
    """
    environment = "environment:\n" + "\n".join(f"  {v.name:<15} {v.doc}" for v in ENVIRONMENT)
    parser = argparse.ArgumentParser(
        prog="pace",
        description="Run large language models on the CPU.",
        epilog=f"{EXAMPLES}\n{environment}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"pace {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name in COMMANDS.keys() & first or COMMANDS:
        importlib.import_module(f"pace.commands.{COMMANDS[name]}").add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
