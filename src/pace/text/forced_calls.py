"""Grammars of outputs that must be calls: `tool_choice` required, or one function."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from pace.errors import RequestError
from pace.text.call_reader import Functions
from pace.text.harmony import CHANNEL, CONSTRAIN, MESSAGE
from pace.text.preamble import terminal
from pace.text.structure import json_rule
from pace.text.tokenizer import Tokenizer
from pace.text.tools import HARMONY

__all__ = ["forced_calls"]

_NAME = "\ue000"  # where the function's name stands


class _Form(NamedTuple):
    """How a family writes calls whose arguments are JSON; with `between` None only one."""

    before: str
    after: str
    between: str | None = None
    begin: str = ""
    end: str = ""


_OBJECT = f'{{"name": "{_NAME}", "arguments": '

_FORMS = {
    "hermes": _Form(f"<tool_call>\n{_OBJECT}", "}\n</tool_call>", "\n"),
    "phi4_mini": _Form(_OBJECT, "}", ", ", "<|tool_call|>[", "]<|/tool_call|>"),
    "mistral": _Form(_OBJECT, "}", ", ", "[TOOL_CALLS][", "]"),
    "mistral, new": _Form(f"[TOOL_CALLS]{_NAME}[ARGS]", "", ""),
    "llama": _Form(f'{{"name": "{_NAME}", "parameters": ', "}", "; "),
    "deepseek": _Form(
        f"<｜tool▁call▁begin｜>{_NAME}<｜tool▁sep｜>",
        "<｜tool▁call▁end｜>",
        "",
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁calls▁end｜>",
    ),
    "deepseek, old": _Form(
        f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{_NAME}\n```json\n",
        "\n```<｜tool▁call▁end｜>",
        "\n",
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁calls▁end｜>",
    ),
    HARMONY: _Form(f"{CHANNEL}commentary to=functions.{_NAME} {CONSTRAIN}json{MESSAGE}", ""),
}
_MARKER = re.compile(r"(<[^<>\n]*>|\[[A-Z_]+\])")  # of the forms above, never of what a model wrote


def forced_calls(
    form: str | None, template: str, functions: Functions, name: str | None, tokenizer: Tokenizer
) -> str:
    """A Lark grammar of calls.

    Args:
        form: of `TOOL_PARSERS`, or harmony.
        template: the chat template's source, which tells old forms from new ones.
        functions: that may be called.
        name: the one that is called, once; None: any, once or several times.
        tokenizer: tells which markers are special tokens.

    Raises:
        RequestError: calls of this form can't be forced.
    """
    if form == "mistral" and "[ARGS]" in template:
        form = "mistral, new"
    if form == "deepseek" and "```json" in template:
        form = "deepseek, old"
    chosen = None if form is None else _FORMS.get(form)
    if chosen is None:
        raise RequestError(
            f"tool_choice can't force calls of this model's form ({form or 'unknown'}), only of "
            f"{', '.join(sorted(key for key in _FORMS if ',' not in key))}; use auto"
        )
    wanted = [name] if name is not None else list(functions)
    rules, calls = [], []
    for i, function in enumerate(wanted):
        before = chosen.before.replace(_NAME, json.dumps(function, ensure_ascii=False)[1:-1])
        rules.append(f"call{i}: {_terms(before, tokenizer)} arguments{i} {_terms(chosen.after, tokenizer)}")
        rules.append(json_rule(f"arguments{i}", _object(functions[function])))
        calls.append(f"call{i}")
    more = (
        "" if name is not None or chosen.between is None else f"({_terms(chosen.between, tokenizer)} call)*"
    )
    start = f"start: {_terms(chosen.begin, tokenizer)} call {more} {_terms(chosen.end, tokenizer)}"
    return "\n".join([start, f"call: {' | '.join(calls)}", *rules])


def _object(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A schema of arguments, which are an object whether it says so or not."""
    return {**schema, "type": "object"}


def _terms(text: str, tokenizer: Tokenizer) -> str:
    """A text in a grammar, its markers apart."""
    return " ".join(terminal(part, tokenizer) for part in _MARKER.split(text) if part)
