"""Readers of reasoning: what a model thinks before it answers, in the forms that families have."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial

from pace.text.readers import FINAL, REASONING, MarkedReader, Reader, State

__all__ = ["REASONING_PARSERS", "find_reader", "first_thought"]

START = "start"
HEADER = "header"

_CHANNEL_END = "<channel|>"

_TAGS = {
    "think": ("<think>", "</think>"),  # R1, Qwen3, SmolLM3 and most
    "mistral": ("[THINK]", "[/THINK]"),
    "seed_oss": ("<seed:think>", "</seed:think>"),
    "gemma4": ("<|channel>thought", _CHANNEL_END),
}
"""Opening and closing tags by form; in this order they are looked for in a template."""

REASONING_PARSERS: Mapping[str, str] = {name: name for name in (*_TAGS, "none")} | {
    "deepseek_r1": "think", "deepseek_v3": "think", "qwen3": "think", "glm45": "think", "hunyuan_a13b": "think",
    "minimax_m2": "think", "olmo3": "think", "openai_gptoss": "none",
}  # fmt: skip
"""What a form may be called: pace's name, or vLLM's. none: it stays in the text. (gpt-oss' is read with its calls.)"""


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


def find_reader(
    template: str, prompt: str, continued: str | None = None, form: str | None = None
) -> Callable[[], Reader] | None:
    """What reads the outputs that follow a rendered chat.

    Args:
        template: the chat template's source, which knows the family's markers.
        prompt: what it has rendered. Its end tells where the output begins: templates of R1 and its kin write the
            opening tag themselves, so that the model writes only the closing one, and where thinking is disabled they
            write both.
        continued: the beginning of the answer, where the prompt ends with one.
        form: a name of `REASONING_PARSERS`, whatever the template says; None: the template's.

    Returns:
        A function that makes a reader for one output; None where the output is the final text.
    """
    found = first_thought(template, prompt, continued, form)
    if found is None:
        return None
    opening, closing, start = found
    if closing == _CHANNEL_END:
        return partial(MarkedReader, _CHANNELS, start)
    return None if start == FINAL else _between_tags(opening, closing, start)


def first_thought(
    template: str, prompt: str, continued: str | None = None, form: str | None = None
) -> tuple[str, str, str] | None:
    """What opens and closes reasoning, and the state in which the output begins: START, REASONING or FINAL; None: there is
    no reasoning. Arguments as `find_reader`."""
    wanted = None if form is None else REASONING_PARSERS[form]
    for name, (opening, closing) in _TAGS.items():
        if name == wanted or (wanted is None and closing in template):
            return opening, closing, _first_state(prompt, continued, opening, closing)
    return None


def _first_state(prompt: str, continued: str | None, opening: str, closing: str) -> str:
    if continued is not None:
        return REASONING if continued.rfind(opening) > continued.rfind(closing) else FINAL
    end = prompt.rstrip()
    if end.endswith(opening):
        return REASONING
    return FINAL if end.endswith(closing) else START
