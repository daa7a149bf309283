"""Readers of reasoning: what a model thinks before it answers, in the forms that families have."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

from pace.text.readers import FINAL, REASONING, MarkedReader, Reader, State

__all__ = ["find_reader", "first_thought"]

START = "start"
HEADER = "header"

_CHANNEL_END = "<channel|>"

# Opening and closing tags: R1, Qwen3, SmolLM3 and most; Magistral; Seed-OSS.
_TAGS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<seed:think>", "</seed:think>"))


@cache
def _between_tags(opening: str, closing: str, start: str) -> Callable[[], Reader]:
    """Reasoning once, at the beginning; what looks like a tag later on is text about tags."""
    states = {
        START: State(FINAL, {opening: REASONING}, otherwise=FINAL),
        REASONING: State(REASONING, {closing: FINAL}, trims=True),
        FINAL: State(FINAL),
    }
    return partial(MarkedReader, states, start)


def _channel_of(header: str, marker: str) -> str:
    """Gemma 4 writes the channel's name in a line of its own; it has no other channel than this one yet."""
    return REASONING if header.strip() == "thought" and marker == "\n" else FINAL


# Gemma 4: <|channel>thought\n...<channel|>, perhaps several times; its smaller models may leave an empty one.
_CHANNELS = {
    START: State(FINAL, {"<|channel>": HEADER, "<channel|>": FINAL}),
    HEADER: State(None, {"\n": FINAL, "<channel|>": FINAL}, choose=_channel_of),
    REASONING: State(REASONING, {"<channel|>": FINAL, "<|channel>": HEADER}, trims=True),
    FINAL: State(FINAL, {"<|channel>": HEADER, "<channel|>": FINAL}),
}


def find_reader(template: str, prompt: str, continued: str | None = None) -> Callable[[], Reader] | None:
    """What reads the outputs that follow a rendered chat.

    Args:
        template: the chat template's source, which knows the family's markers.
        prompt: what it has rendered. Its end tells where the output begins: templates of R1 and its kin write the
            opening tag themselves, so that the model writes only the closing one, and where thinking is disabled they
            write both.
        continued: the beginning of the answer, where the prompt ends with one.

    Returns:
        A function that makes a reader for one output; None where the output is the final text.
    """
    found = first_thought(template, prompt, continued)
    if found is None:
        return None
    opening, closing, start = found
    if closing == _CHANNEL_END:
        return partial(MarkedReader, _CHANNELS, start)
    return None if start == FINAL else _between_tags(opening, closing, start)


def first_thought(template: str, prompt: str, continued: str | None = None) -> tuple[str, str, str] | None:
    """What opens and closes reasoning, and the state in which the output begins: START, REASONING or FINAL; None: there is
    no reasoning. Arguments as `find_reader`."""
    for opening, closing in (*_TAGS, ("<|channel>thought", _CHANNEL_END)):
        if closing in template:
            return opening, closing, _first_state(prompt, continued, opening, closing)
    return None


def _first_state(prompt: str, continued: str | None, opening: str, closing: str) -> str:
    if continued is not None:
        return REASONING if continued.rfind(opening) > continued.rfind(closing) else FINAL
    end = prompt.rstrip()
    if end.endswith(opening):
        return REASONING
    return FINAL if end.endswith(closing) else START
