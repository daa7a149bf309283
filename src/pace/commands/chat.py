"""`pace chat`: a conversation in the terminal."""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pace.commands import options
from pace.console import err, is_terminal, out
from pace.errors import RequestError

if TYPE_CHECKING:
    from pace.llm import LLM
    from pace.params import SamplingParams

CHAT_HELP = """/reset  forget the conversation
/exit   leave (so does Ctrl-D)
/help   this list
Ctrl-C stops an answer."""


def add(commands: Any) -> None:
    """Describe the command."""
    parser = options.add_command(
        commands,
        "chat",
        run,
        "talk with a model; /reset forgets, /exit leaves, Ctrl-C stops an answer",
        'pace chat --model ./Qwen3-0.6B --system "Answer briefly."',
    )
    options.add_engine_options(parser)
    parser.add_argument("--system", type=options.text_argument, metavar="TEXT", help="the system message")
    parser.add_argument(
        "--chat-template",
        metavar="FILE|NAME",
        help="a jinja2 template instead of the checkpoint's, or which of the checkpoint's",
    )
    parser.add_argument(
        "--chat-template-kwargs",
        type=options.text_argument,
        metavar="JSON",
        help="""variables of the template, such as '{"enable_thinking": false}'""",
    )
    parser.add_argument(
        "--include-reasoning", action="store_true", help="print what the model thinks before it answers, too"
    )
    parser.add_argument("--tools", metavar="FILE", help="JSON list of tools that the model may call")
    options.add_sampling_options(parser, max_tokens=1024)
    parser.add_argument(
        "--no-stats", dest="stats", action="store_false", help="don't print the memory plan and tokens/s"
    )


def run(args: argparse.Namespace) -> int:
    """Carry the command out."""
    chat_options = _chat_options(args)
    params = options.sampling_params(args)
    interactive = is_terminal(sys.stdin)
    if interactive:
        with contextlib.suppress(ImportError):  # some Python builds lack it
            import readline  # noqa: F401  # its import gives input() a history and line editing
    start = [] if args.system is None else [{"role": "system", "content": args.system}]
    messages = list(start)
    with options.load_llm(args) as llm:
        if interactive:
            err(f"{args.model}, {llm.loaded.team.n_threads} threads; /help lists the commands")
        while (line := _read_line(interactive)) is not None:
            text = line.strip()
            if text == "/exit":
                break
            if text == "/reset":
                messages = list(start)
            elif text == "/help":
                err(CHAT_HELP)
            elif text.startswith("/") and " " not in text:
                err(f"{text} is not a command; /help lists them")
            elif text:
                messages.append({"role": "user", "content": text})
                if args.seed is None:
                    params = params.clone(seed=options.draw_seed())
                answer = _answer(llm, messages, params, chat_options, args.stats)
                if answer is None:
                    messages.pop()  # it could not even be asked
                else:
                    messages.append({"role": "assistant", "content": answer})
    return options.EXIT_OK


def _chat_options(args: argparse.Namespace) -> dict[str, Any]:
    """What is given of `LLM.chat`'s options.

    Raises:
        RequestError: a file can't be read, or is not what it must be.
    """
    given: dict[str, Any] = {"include_reasoning": True} if args.include_reasoning else {}
    if args.chat_template is not None:
        # A name has neither dot nor slash as a rule; a file of that name is what was meant, where there is one.
        is_name = not Path(args.chat_template).exists() and re.fullmatch(r"[\w-]+", args.chat_template)
        given["chat_template"] = args.chat_template if is_name else options.read_file(args.chat_template)
    if args.chat_template_kwargs is not None:
        given["chat_template_kwargs"] = options.parse_json(
            args.chat_template_kwargs, "--chat-template-kwargs", dict
        )
    if args.tools is not None:
        given["tools"] = options.parse_json(options.read_file(args.tools), args.tools, list)
    return given


def _read_line(interactive: bool) -> str | None:
    """The next line; None at the end of the input."""
    if not interactive:
        line = b"" if sys.stdin is None else sys.stdin.buffer.readline()
        return options.decode(line, "stdin") if line else None
    while True:
        try:
            return input("> ")
        except EOFError:
            return None
        except KeyboardInterrupt:
            err("\n(/exit or Ctrl-D leaves)")
        except UnicodeDecodeError as error:
            raise RequestError(f"stdin: not UTF-8 at byte {error.start}") from None


def _answer(
    llm: LLM,
    messages: list[dict[str, str]],
    params: SamplingParams,
    chat_options: dict[str, Any],
    stats: bool,
) -> str | None:
    """Print an answer while it grows; returns what there is of it, None where the messages were refused."""
    text, output, start = "", None, time.perf_counter()
    try:
        stream = llm.stream_chat(messages, params, **chat_options)
        with contextlib.closing(stream):
            for output in stream:
                new = output.outputs[0].text
                out(new[len(text) :], end="")
                text = new
    except KeyboardInterrupt:
        pass
    except RequestError as error:
        err(f"pace: error: {error}; /reset forgets the conversation")
        return None
    out("")
    if output is not None:
        completion = output.outputs[0]
        if completion.finish_reason == "error":
            err(f"pace: error: {completion.stop_reason}")
        if stats:
            seed = None if params.greedy else params.seed
            err(options.stats_line([output], time.perf_counter() - start, seed=seed))
    return text
