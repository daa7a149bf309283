"""What a model may write before the answer that has to follow a grammar: its reasoning."""

from __future__ import annotations

import json
from typing import NamedTuple

from pace.text.harmony import CHANNEL, END, MESSAGE, START
from pace.text.readers import FINAL, REASONING
from pace.text.reasoning import first_thought
from pace.text.tokenizer import Tokenizer
from pace.text.tools import HARMONY, find_parser

__all__ = ["NO_PREAMBLE", "Preamble", "find_preamble", "terminal"]


class Preamble(NamedTuple):
    """A part of a Lark grammar.

    Attributes:
        parts: what stands before the answer; "": nothing.
        rules: those that `parts` names.
    """

    parts: str = ""
    rules: str = ""

    def before(self, lark: str) -> str:
        """The grammar of this and an answer that follows `lark`."""
        if not self.parts:
            return lark
        return f"start: {self.parts} answer\nanswer: %lark {{\n{lark}\n}}\n{self.rules}"


NO_PREAMBLE = Preamble()


def find_preamble(
    template: str,
    prompt: str,
    continued: str | None,
    tokenizer: Tokenizer,
    *,
    is_call: bool = False,
    thoughts: str | None = None,
) -> Preamble:
    """What may precede the final text of the answers to a rendered chat; arguments as `answer_reader`.

    Args:
        tokenizer: tells which markers are special tokens, that a grammar names apart from text.
        is_call: not the final text, but a call, which harmony writes on another channel.
    """

    def term(text: str) -> str:
        return terminal(text, tokenizer)

    if find_parser(template) == HARMONY:
        if not prompt.endswith(f"{START}assistant"):
            return NO_PREAMBLE
        thought = (
            f'{term(CHANNEL)} "analysis" {term(MESSAGE)} /(.|\\n)*/ {term(END)} {term(START)} "assistant"'
        )
        final = "" if is_call else f' {term(CHANNEL)} "final" {term(MESSAGE)}'
        return Preamble(f"(thought)?{final}", f"thought: {thought}\n")
    found = first_thought(template, prompt, continued, thoughts)
    if found is None or found[2] == FINAL:
        return NO_PREAMBLE
    opening, closing, state = found
    end = terminal(closing, tokenizer)
    rule = f"thought[suffix={end}]: /(.|\\n)*/\n" if end.startswith('"') else f"thought: /(.|\\n)*/ {end}\n"
    parts = "thought space" if state == REASONING else f"({_opening(opening, tokenizer)} thought space)?"
    return Preamble(parts, rule + "space: /\\s*/\n")


def terminal(text: str, tokenizer: Tokenizer) -> str:
    """A marker in a grammar: a special token by its id, anything else as text."""
    token_id = tokenizer.token_to_id(text)
    if token_id is not None and tokenizer.is_special(token_id):
        return f"<[{token_id}]>"
    return json.dumps(text, ensure_ascii=False)


def _opening(text: str, tokenizer: Tokenizer) -> str:
    """An opening marker, of which only the beginning may be a token."""
    marker, bracket, name = text.rpartition(">")
    if not bracket or not name:
        return terminal(text, tokenizer)
    return f"{terminal(marker + bracket, tokenizer)} {json.dumps(name)}"
