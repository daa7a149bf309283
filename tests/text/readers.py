"""What readers make of a text, whole and in pieces."""

from __future__ import annotations

import random
import re
from collections.abc import Callable

from pace.text.readers import FINAL, REASONING, TOOL_CALL, Piece, Reader

Read = tuple[str, str, list[tuple[str, str]]]
"""Final text, reasoning, calls as (name, arguments)."""

FUNCTIONS = {
    "f": {
        "type": "object",
        "properties": {
            "a": {"type": "string"},
            "n": {"type": "integer"},
            "o": {"anyOf": [{"type": "object"}, {"type": "array"}]},
            "s": {"type": ["string", "null"]},
        },
    },
    "g": {},
}


def fold(pieces: list[Piece]) -> Read:
    texts = {FINAL: "", REASONING: ""}
    calls: list[tuple[str, str]] = []
    for channel, text, name in pieces:
        if channel != TOOL_CALL:
            texts[channel] += text
        elif name is not None:
            calls.append((name, text))
        else:
            calls[-1] = (calls[-1][0], calls[-1][1] + text)
    return texts[FINAL], texts[REASONING], calls


def read(make: Callable[[], Reader], text: str, size: Callable[[], int] = lambda: 1 << 30) -> Read:
    """Feed a text in pieces; the reader's tokens apart."""
    reader = make()
    tokens = sorted(reader.tokens)
    parts = re.split("(" + "|".join(map(re.escape, tokens)) + ")", text) if tokens else [text]
    pieces: list[Piece] = []
    for part in parts:
        if part in tokens:
            pieces += reader.push_token(part)
            continue
        while part:
            n = size()
            pieces += reader.push(part[:n])
            part = part[n:]
    return fold(pieces + reader.finish())


def check_cuts(make: Callable[[], Reader], text: str, rng: random.Random, n: int = 8) -> Read:
    """The result, which is the same however the text is cut."""
    whole = read(make, text)
    assert read(make, text, lambda: 1) == whole
    for _ in range(n):
        assert read(make, text, lambda: rng.randrange(1, 7)) == whole
    return whole


def garbled(text: str, rng: random.Random, alphabet: list[str]) -> str:
    """The text with a few things replaced, taken out or put in, perhaps cut."""
    parts = list(text)
    for _ in range(rng.randrange(4)):
        at = rng.randrange(len(parts) + 1)
        parts[at : at + rng.randrange(3)] = [rng.choice(alphabet)] * rng.randrange(2)
    return "".join(parts)[: rng.randrange(len(text) + 8)]
