"""What reads the answer to a chat: reasoning, tool calls, final text."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from pace.text.call_reader import Functions
from pace.text.harmony import Harmony
from pace.text.readers import Chain, Reader
from pace.text.reasoning import find_reader
from pace.text.tools import HARMONY, PARSER_ALIASES, find_parser, make_call_reader

__all__ = ["answer_reader"]


def answer_reader(
    template: str,
    prompt: str,
    continued: str | None = None,
    functions: Functions | None = None,
    parser: str | None = None,
    thoughts: str | None = None,
) -> Callable[[], Reader] | None:
    """What divides the outputs that follow a rendered chat.

    Args:
        template: the chat template's source, which knows the family's forms.
        prompt: what it has rendered.
        continued: the beginning of the answer, where the prompt ends with one.
        functions: that may be called; none: calls are text.
        parser: the form of the calls, of `TOOL_PARSERS`; None: the template's.
        thoughts: the form of the reasoning, of `REASONING_PARSERS`; None: the template's.

    Returns:
        A function that makes a reader for one output; None where the output is the final text.

    Raises:
        RequestError: there is no such form.
    """
    functions = functions or {}
    form = find_parser(template)
    if form == HARMONY and (parser is None or PARSER_ALIASES.get(parser, parser) == HARMONY):
        return partial(Harmony, functions, prompt)
    first = find_reader(template, prompt, continued, thoughts)
    name = parser or form
    second = make_call_reader(name, functions) if functions and name is not None else None
    if first is None or second is None:
        return first or second
    return partial(_chain, first, second)


def _chain(first: Callable[[], Reader], second: Callable[[], Reader]) -> Reader:
    return Chain(first(), second())
