"""`pace generate`: complete prompts."""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import TYPE_CHECKING, Any

from pace.commands import options
from pace.console import err, is_terminal, out
from pace.errors import PaceError, RequestError

if TYPE_CHECKING:
    from pace.llm import LLM
    from pace.outputs import CompletionOutput, RequestOutput
    from pace.params import SamplingParams


def add(commands: Any) -> None:
    """Describe the command."""
    parser = options.add_command(
        commands,
        "generate",
        run,
        "complete one prompt or several",
        'pace generate --model demo --prompt "def fibonacci(n):" --max-tokens 64 --temperature 0',
    )
    options.add_engine_options(parser)
    group = parser.add_argument_group("prompts")
    group.add_argument(
        "--prompt",
        action="append",
        type=options.text_argument,
        metavar="TEXT",
        help="a prompt; '-' reads it from stdin; may be repeated",
    )
    group.add_argument(
        "--prompt-file", action="append", metavar="FILE", help="a file that holds one prompt; may be repeated"
    )
    options.add_sampling_options(parser, max_tokens=256)
    group = parser.add_argument_group("output")
    group.add_argument("--n", type=options.positive, metavar="N", help="completions of each prompt")
    group.add_argument("--echo", action="store_true", help="print the prompt before its completion")
    group.add_argument(
        "--logprobs", type=int, metavar="N", help="with --json: also the N most probable tokens"
    )
    group.add_argument(
        "--no-stats",
        dest="stats",
        action="store_false",
        help="don't print the memory plan and tokens/s to stderr",
    )
    group.add_argument("--json", action="store_true", help="one JSON object per completion and line")


def run(args: argparse.Namespace) -> int:
    """Carry the command out."""
    prompts = _prompts(args)
    params = options.sampling_params(args)
    start = time.perf_counter()
    with options.load_llm(args) as llm:
        load_s = time.perf_counter() - start
        if len(prompts) == 1 and not args.json and args.n in (None, 1):
            outputs = [_print_stream(llm, prompts[0], params, args.echo)]
        else:
            outputs = llm.generate(prompts, params)
            for i, output in enumerate(outputs):
                for completion in output.outputs:
                    if args.json:
                        out(json.dumps(_to_json(i, output, completion, params.seed)))
                    else:
                        out(_titled(i, output, completion, args.echo))
    if args.stats:
        seed = None if params.greedy else params.seed
        err(options.stats_line(outputs, time.perf_counter() - start - load_s, load_s, seed))
    failed = [c for output in outputs for c in output.outputs if c.finish_reason == "error"]
    for completion in failed:
        err(f"pace: error: {completion.stop_reason}")
    return options.EXIT_FAILURE if failed else options.EXIT_OK


def _prompts(args: argparse.Namespace) -> list[str]:
    texts = [_read_stdin() if text == "-" else text for text in args.prompt or ()]
    texts += [_read_stdin() if name == "-" else options.read_file(name) for name in args.prompt_file or ()]
    if not texts and not is_terminal(sys.stdin):
        texts = [_read_stdin()]
    if not texts:
        raise RequestError("no prompt; give --prompt TEXT, --prompt-file FILE, or pipe it to stdin")
    return texts


def _read_stdin() -> str:
    if sys.stdin is None:
        raise RequestError("stdin is closed; give --prompt TEXT or --prompt-file FILE")
    return options.decode(sys.stdin.buffer.read(options.MAX_PROMPT_BYTES), "stdin")


def _print_stream(llm: LLM, prompt: str, params: SamplingParams, echo: bool) -> RequestOutput:
    if echo:
        out(prompt, end="")
    last, shown = None, 0
    for last in llm.stream(prompt, params):
        text = last.outputs[0].text
        out(text[shown:], end="")
        shown = len(text)
    out("")
    if last is None:
        raise PaceError("the engine ended without an output")
    return last


def _titled(i: int, output: RequestOutput, completion: CompletionOutput, echo: bool) -> str:
    number = f"{i}" if len(output.outputs) == 1 else f"{i}.{completion.index}"
    return f"--- {number}\n{output.prompt if echo else ''}{completion.text}"


def _to_json(i: int, output: RequestOutput, completion: CompletionOutput, seed: int | None) -> dict[str, Any]:
    values: dict[str, Any] = {
        "index": i,
        "completion": completion.index,
        "prompt": output.prompt,
        "prompt_token_ids": list(output.prompt_token_ids),
        "text": completion.text,
        "token_ids": list(completion.token_ids),
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
        "seed": seed,
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
