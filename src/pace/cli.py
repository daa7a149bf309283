"""The command line: arguments in, calls of `LLM` and of the benchmarks out."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from pace import __version__, log
from pace.config import ENVIRONMENT, PACE_LOG_LEVEL, EngineConfig, parse_cpus, parse_kernels
from pace.errors import PaceError, RequestError, one_line

if TYPE_CHECKING:
    from pace.llm import LLM
    from pace.outputs import RequestOutput
    from pace.params import SamplingParams

__all__ = ["main"]

EXIT_OK, EXIT_FAILURE, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130

MAX_PROMPT_BYTES = (
    256 << 20
)  # of a file or stdin; the tokenizer's own limit is far lower and depends on the model

EXAMPLES = """examples:
  pace generate --model demo --prompt "def fibonacci(n):" --max-tokens 64 --temperature 0
  pace generate --model ./Llama-3.2-1B --prompt-file question.txt --temperature 0.7 --top-p 0.9 --seed 1
  echo "Once upon a time" | pace generate --model demo
  pace chat --model ./Qwen3-0.6B --system "Answer briefly."
  pace info
  pace bench roofline --threads 1 2 4
  pace bench latency --model ./Llama-3.2-1B --batch-size 1 8 32 --json
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program.

    Args:
        argv: arguments without the program's name; None: those of the process.

    Returns:
        0: done; 1: it failed; 2: wrong usage or input; 130: interrupted.
    """
    args = _parser().parse_args(argv)
    try:
        log.configure()
        return int(args.run(args))
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has gone. Python flushes stdout once more at exit, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILURE
    except PaceError as error:
        _complain(f"error: {error}")
        return EXIT_USAGE
    except Exception as error:
        _complain(
            f"internal error: {type(error).__name__}: {one_line(error)}; PACE_LOG_LEVEL=debug shows where"
        )
        return EXIT_FAILURE


def _complain(line: str) -> None:
    with contextlib.suppress(PaceError):  # the variable itself may be what is wrong
        if PACE_LOG_LEVEL.get() == "debug":
            traceback.print_exc()
    print(f"pace: {line}", file=sys.stderr)


# ---- arguments -------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    environment = "environment:\n" + "\n".join(f"  {v.name:<15} {v.doc}" for v in ENVIRONMENT)
    parser = argparse.ArgumentParser(
        prog="pace",
        description="Run large language models on the CPU.",
        epilog=f"{EXAMPLES}\n{environment}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"pace {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_generate(commands)
    _add_chat(commands)
    _add_info(commands)
    bench = commands.add_parser("bench", help="measure the machine or a model")
    benches = bench.add_subparsers(metavar="BENCHMARK", required=True)
    _add_roofline(benches)
    _add_latency(benches)
    return parser


def _command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], text: str, example: str
) -> Any:
    parser = commands.add_parser(
        name,
        help=text,
        description=f"{text[0].upper()}{text[1:]}.",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def _add_generate(commands: Any) -> None:
    parser = _command(
        commands,
        "generate",
        _generate,
        "complete one prompt or several",
        'pace generate --model demo --prompt "def fibonacci(n):" --max-tokens 64 --temperature 0',
    )
    _add_model_options(parser)
    group = parser.add_argument_group("prompts")
    group.add_argument(
        "--prompt", action="append", metavar="TEXT", help="a prompt; '-' reads it from stdin; may be repeated"
    )
    group.add_argument(
        "--prompt-file", action="append", metavar="FILE", help="a file that holds one prompt; may be repeated"
    )
    _add_sampling_options(parser, max_tokens=256)
    _add_output_options(parser, "one JSON object per prompt and line")


def _add_chat(commands: Any) -> None:
    parser = _command(
        commands,
        "chat",
        _chat,
        "talk with a model; /reset forgets, /exit leaves, Ctrl-C stops an answer",
        'pace chat --model ./Qwen3-0.6B --system "Answer briefly."',
    )
    _add_model_options(parser)
    parser.add_argument("--system", metavar="TEXT", help="the system message")
    parser.add_argument(
        "--chat-template", metavar="FILE", help="a jinja2 template instead of the checkpoint's"
    )
    _add_sampling_options(parser, max_tokens=1024)
    parser.add_argument("--no-stats", dest="stats", action="store_false", help="don't print tokens/s")


def _add_info(commands: Any) -> None:
    text = "show the CPU, the kernels that run on it, threads and versions"
    parser = _command(commands, "info", _info, text, "PACE_ISA=avx2 pace info --json")
    parser.add_argument("--json", action="store_true", help="as JSON")


def _add_roofline(commands: Any) -> None:
    text = "measure the memory-read and dot-product roofs of this machine"
    parser = _command(commands, "roofline", _roofline, text, "pace bench roofline --threads 1 2 4")
    parser.add_argument(
        "--threads",
        type=_positive,
        nargs="+",
        metavar="N",
        help="thread counts (default: 1 and what engines take)",
    )
    parser.add_argument("--cpus", metavar="LIST", help="pin the threads to these CPUs, such as 0-3,8")
    parser.add_argument(
        "--repeat", type=_positive, default=5, metavar="N", help="runs per figure (default: 5)"
    )
    parser.add_argument("--json", action="store_true", help="as JSON")


def _add_latency(commands: Any) -> None:
    parser = _command(
        commands,
        "latency",
        _latency,
        "measure prefill and decode speed, and their shares of the machine's roofs",
        "pace bench latency --model ./Llama-3.2-1B --input-len 512 1920 --batch-size 1 8 32 --json",
    )
    _add_model_options(parser, lengths=False)
    counts = {"type": _positive, "nargs": "+", "metavar": "N"}
    parser.add_argument(
        "--input-len", default=[512], help="prompt lengths for prefill (default: 512)", **counts
    )
    parser.add_argument(
        "--batch-size", default=[1, 8, 32], help="sequences that decode (default: 1 8 32)", **counts
    )
    parser.add_argument("--context", default=[128], help="tokens before decoding (default: 128)", **counts)
    parser.add_argument(
        "--output-len",
        type=_positive,
        default=32,
        metavar="N",
        help="decode steps per repetition (default: 32)",
    )
    parser.add_argument("--repeat", type=_positive, default=5, metavar="N", help="repetitions (default: 5)")
    parser.add_argument(
        "--random-weights",
        action="store_true",
        help="of the model read only config.json, and invent the weights",
    )
    parser.add_argument("--json", action="store_true", help="as JSON")


def _add_model_options(parser: argparse.ArgumentParser, lengths: bool = True) -> None:
    group = parser.add_argument_group("model and engine")
    group.add_argument(
        "--model",
        required=True,
        help="a checkpoint folder, a hub id org/name, or demo for the embedded model",
    )
    group.add_argument("--revision", help="branch, tag or commit of a hub id")
    if lengths:
        group.add_argument("--tokenizer", metavar="DIR", help="take the tokenizer from there")
        group.add_argument("--trust-tokenizer", action="store_true", help="skip the tokenizer's allow-list")
        group.add_argument(
            "--max-model-len", type=_positive, metavar="N", help="longest prompt and output, in tokens"
        )
        group.add_argument("--max-num-seqs", type=_positive, default=32, metavar="N", help="default: 32")
        group.add_argument(
            "--max-num-batched-tokens", type=_positive, default=2048, metavar="N", help="default: 2048"
        )
    group.add_argument(
        "--threads", type=_positive, metavar="N", help="default: the physical cores that are ours"
    )
    group.add_argument("--cpus", metavar="LIST", help="pin the threads to these CPUs, such as 0-3,8")
    group.add_argument(
        "--kernels", metavar="LIST", help="force kernels, such as attention=reference,gemm=avx2"
    )


def _add_sampling_options(parser: argparse.ArgumentParser, max_tokens: int) -> None:
    group = parser.add_argument_group(
        "sampling", "What is not given comes from the checkpoint's generation_config.json."
    )
    group.add_argument(
        "--max-tokens", type=int, default=max_tokens, metavar="N", help=f"default: {max_tokens}"
    )
    group.add_argument("--min-tokens", type=int, metavar="N")
    group.add_argument("--temperature", type=float, metavar="T", help="0 takes the most probable token")
    group.add_argument("--top-p", type=float, metavar="P")
    group.add_argument("--top-k", type=int, metavar="K")
    group.add_argument("--min-p", type=float, metavar="P")
    group.add_argument("--repetition-penalty", type=float, metavar="X")
    group.add_argument("--presence-penalty", type=float, metavar="X")
    group.add_argument("--frequency-penalty", type=float, metavar="X")
    group.add_argument("--seed", type=int, metavar="S", help="makes the output repeatable")
    group.add_argument("--stop", action="append", metavar="TEXT", help="ends the output; may be repeated")
    group.add_argument(
        "--ignore-eos", action="store_true", default=None, help="don't stop where the model does"
    )


def _add_output_options(parser: argparse.ArgumentParser, json_help: str) -> None:
    group = parser.add_argument_group("output")
    group.add_argument("--echo", action="store_true", help="print the prompt before its completion")
    group.add_argument(
        "--logprobs", type=int, metavar="N", help="with --json: also the N most probable tokens"
    )
    group.add_argument(
        "--no-stats", dest="stats", action="store_false", help="don't print tokens/s to stderr"
    )
    group.add_argument("--json", action="store_true", help=json_help)


def _positive(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 0 < int(text) < 1 << 31):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


SAMPLING_FIELDS = (
    "max_tokens",
    "min_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "stop",
    "ignore_eos",
    "logprobs",
)


def _sampling_params(args: argparse.Namespace) -> SamplingParams:
    from pace.params import SamplingParams

    given = {name: getattr(args, name, None) for name in SAMPLING_FIELDS}
    return SamplingParams(**{name: value for name, value in given.items() if value is not None})


def _load(args: argparse.Namespace) -> LLM:
    from pace.llm import LLM  # brings numpy and the kernels' tables; `pace --help` needs neither

    return LLM(
        args.model,
        revision=args.revision,
        tokenizer=args.tokenizer,
        trust_tokenizer=args.trust_tokenizer,
        max_model_len=args.max_model_len,
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=args.max_num_batched_tokens,
        threads=args.threads,
        cpus=args.cpus,
        kernels=None if args.kernels is None else parse_kernels(args.kernels),
    )


# ---- pace generate ---------------------------------------------------------------------------------------


def _generate(args: argparse.Namespace) -> int:
    prompts = _prompts(args)
    params = _sampling_params(args)
    start = time.perf_counter()
    with _load(args) as llm:
        load_s = time.perf_counter() - start
        if len(prompts) == 1 and not args.json:
            outputs = [_print_stream(llm, prompts[0], params, args.echo)]
        else:
            outputs = llm.generate(prompts, params)
            for i, output in enumerate(outputs):
                print(json.dumps(_to_json(i, output)) if args.json else _titled(i, output, args.echo))
    if args.stats:
        print(_stats_line(outputs, time.perf_counter() - start - load_s, load_s), file=sys.stderr)
    failed = [output.outputs[0] for output in outputs if output.outputs[0].finish_reason == "error"]
    for completion in failed:
        print(f"pace: error: {completion.stop_reason}", file=sys.stderr)
    return EXIT_FAILURE if failed else EXIT_OK


def _prompts(args: argparse.Namespace) -> list[str]:
    texts = [_read_stdin() if text == "-" else text for text in args.prompt or ()]
    texts += [_read_stdin() if name == "-" else _read_file(name) for name in args.prompt_file or ()]
    if not texts and not sys.stdin.isatty():
        texts = [_read_stdin()]
    if not texts:
        raise RequestError("no prompt; give --prompt TEXT, --prompt-file FILE, or pipe it to stdin")
    return texts


def _read_stdin() -> str:
    return _decode(sys.stdin.buffer.read(MAX_PROMPT_BYTES), "stdin")


def _read_file(name: str) -> str:
    try:
        with Path(name).open("rb") as file:
            return _decode(file.read(MAX_PROMPT_BYTES), name)
    except OSError as error:
        raise RequestError(f"{name}: cannot be read: {error.strerror or error}") from None


def _decode(data: bytes, where: str) -> str:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"{where}: not UTF-8 at byte {error.start}") from None
    return text[:-1] if text.endswith("\n") else text  # the one that editors and echo add


def _print_stream(llm: LLM, prompt: str, params: SamplingParams, echo: bool) -> RequestOutput:
    if echo:
        print(prompt, end="", flush=True)
    last, shown = None, 0
    for last in llm.stream(prompt, params):
        text = last.outputs[0].text
        print(text[shown:], end="", flush=True)
        shown = len(text)
    print()
    if last is None:
        raise PaceError("the engine ended without an output")
    return last


def _titled(i: int, output: RequestOutput, echo: bool) -> str:
    return f"--- {i}\n{output.prompt if echo else ''}{output.outputs[0].text}"


def _to_json(i: int, output: RequestOutput) -> dict[str, Any]:
    completion = output.outputs[0]
    values: dict[str, Any] = {
        "index": i,
        "prompt": output.prompt,
        "prompt_token_ids": list(output.prompt_token_ids),
        "text": completion.text,
        "token_ids": list(completion.token_ids),
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
    }
    if completion.logprobs is not None:
        values["cumulative_logprob"] = completion.cumulative_logprob
        values["logprobs"] = [
            {
                str(token): {
                    "logprob": entry.logprob,
                    "rank": entry.rank,
                    "decoded_token": entry.decoded_token,
                }
                for token, entry in entries.items()
            }
            for entries in completion.logprobs
        ]
    return values


def _stats_line(outputs: list[RequestOutput], run_s: float, load_s: float | None = None) -> str:
    n_prompt = sum(output.metrics.n_prompt_tokens for output in outputs)
    n_output = sum(output.metrics.n_output_tokens for output in outputs)
    parts = [] if load_s is None else [f"loaded in {load_s:.2f} s"]
    parts.append(f"{n_prompt} prompt tokens, {n_output} new tokens in {run_s:.2f} s")
    if len(outputs) == 1:
        first, rate = outputs[0].metrics.time_to_first_token_s, outputs[0].metrics.decode_tokens_per_s
        parts += [] if first is None else [f"first token after {first:.3f} s"]
        parts += [] if rate is None else [f"{rate:.1f} tokens/s"]
    else:
        parts.append(f"{n_output / run_s:.1f} tokens/s")
    return f"[{'; '.join(parts)}]"


# ---- pace chat -------------------------------------------------------------------------------------------

CHAT_HELP = """/reset  forget the conversation
/exit   leave (so does Ctrl-D)
/help   this list
Ctrl-C stops an answer."""


def _chat(args: argparse.Namespace) -> int:
    template = None if args.chat_template is None else _read_file(args.chat_template)
    params = _sampling_params(args)
    interactive = sys.stdin.isatty()
    if interactive:
        with contextlib.suppress(ImportError):  # some Python builds lack it
            import readline  # noqa: F401  # its import gives input() a history and line editing
    start = [] if args.system is None else [{"role": "system", "content": args.system}]
    messages = list(start)
    with _load(args) as llm:
        if interactive:
            print(
                f"{args.model}, {llm.loaded.team.n_threads} threads; /help lists the commands",
                file=sys.stderr,
            )
        while (line := _read_line(interactive)) is not None:
            text = line.strip()
            if text == "/exit":
                break
            if text == "/reset":
                messages = list(start)
            elif text == "/help":
                print(CHAT_HELP, file=sys.stderr)
            elif text.startswith("/") and " " not in text:
                print(f"{text} is not a command; /help lists them", file=sys.stderr)
            elif text:
                messages.append({"role": "user", "content": text})
                answer = _answer(llm, messages, params, template, args.stats)
                if answer is None:
                    messages.pop()  # it could not even be asked
                else:
                    messages.append({"role": "assistant", "content": answer})
    return EXIT_OK


def _read_line(interactive: bool) -> str | None:
    """The next line; None at the end of the input."""
    while True:
        try:
            return input("> ") if interactive else input()
        except EOFError:
            return None
        except KeyboardInterrupt:
            if not interactive:
                raise
            print("\n(/exit or Ctrl-D leaves)", file=sys.stderr)
        except UnicodeDecodeError as error:
            raise RequestError(f"stdin: not UTF-8 at byte {error.start}") from None


def _answer(
    llm: LLM, messages: list[dict[str, str]], params: SamplingParams, template: str | None, stats: bool
) -> str | None:
    """Print an answer while it grows; returns what there is of it, None where the messages were refused."""
    text, output, start = "", None, time.perf_counter()
    try:
        stream = llm.stream_chat(messages, params, chat_template=template)
        with contextlib.closing(stream):  # type: ignore[type-var]  # a generator, as its docstring says
            for output in stream:
                new = output.outputs[0].text
                print(new[len(text) :], end="", flush=True)
                text = new
    except KeyboardInterrupt:
        pass
    except RequestError as error:
        print(f"pace: error: {error}; /reset forgets the conversation", file=sys.stderr)
        return None
    print()
    if output is not None:
        completion = output.outputs[0]
        if completion.finish_reason == "error":
            print(f"pace: error: {completion.stop_reason}", file=sys.stderr)
        if stats:
            print(_stats_line([output], time.perf_counter() - start), file=sys.stderr)
    return text


# ---- pace info -------------------------------------------------------------------------------------------


def _info(args: argparse.Namespace) -> int:
    from pace import show_config

    config = show_config()
    if args.json:
        print(json.dumps(config, indent=2, default=str))
    else:
        _print_tree(config, sys.stdout)
    return EXIT_OK


def _print_tree(values: dict[str, Any], out: TextIO, indent: str = "") -> None:
    width = max((len(str(key)) for key in values), default=0)
    for key, value in values.items():
        if isinstance(value, dict):
            print(f"{indent}{key}", file=out)
            _print_tree(value, out, indent + "  ")
        else:
            text = ", ".join(map(str, value)) if isinstance(value, (list, tuple, set, frozenset)) else value
            print(f"{indent}{key!s:<{width}}  {text}", file=out)


# ---- pace bench ------------------------------------------------------------------------------------------


def _roofline(args: argparse.Namespace) -> int:
    from pace import ops
    from pace.benchmarks import roofline

    cpus = None if args.cpus is None else parse_cpus(args.cpus)
    default = ops.default_threads()[0] if cpus is None else len(cpus)
    results = roofline.measure(args.threads or sorted({1, default}), cpus, args.repeat)
    if args.json:
        print(json.dumps([roofs.to_json() for roofs in results], indent=2))
    else:
        print(roofline.format_roofs(results))
    return EXIT_OK


def _latency(args: argparse.Namespace) -> int:
    from pace.benchmarks import latency

    longest = max(max(args.input_len) + 1, max(args.context) + 1 + args.repeat * args.output_len)
    config = EngineConfig(
        model=args.model,
        revision=args.revision,
        max_model_len=longest,
        max_num_seqs=max(args.batch_size),
        max_num_batched_tokens=max(2048, *args.input_len, *args.batch_size),
        n_threads=args.threads,
        cpus=None if args.cpus is None else parse_cpus(args.cpus),
        kernels={} if args.kernels is None else parse_kernels(args.kernels),
    )
    result = latency.run(
        config,
        input_lens=args.input_len,
        batch_sizes=args.batch_size,
        contexts=args.context,
        output_len=args.output_len,
        repeat=args.repeat,
        random_weights=args.random_weights,
    )
    print(json.dumps(result.to_json(), indent=2) if args.json else latency.format_latency(result))
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
