"""Values in notations that are nearly JSON: Python's, and Gemma 4's."""

from __future__ import annotations

from typing import NamedTuple

from pace.text.call_reader import MAX_NAME, CallReader
from pace.text.json_scanner import MAX_DEPTH, MAX_WORD, WORD, is_word, quoted
from pace.text.script import Ask

__all__ = ["GEMMA", "PYTHON", "Notation", "literal"]


class Notation(NamedTuple):
    """How values are written.

    Attributes:
        quotes: around texts; between those of one character a backslash escapes.
        has_bare_texts: keys, and texts of one word, may lack them.
    """

    quotes: tuple[str, ...]
    has_bare_texts: bool


PYTHON = Notation(("'", '"'), has_bare_texts=False)
GEMMA = Notation(('<|"|>', '"'), has_bare_texts=True)

_WORDS = {"True": "true", "False": "false", "None": "null"}
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "0": "\0", "\n": ""}
_CODES = {"x": 2, "u": 4, "U": 8}  # digits


def literal(reader: CallReader, notation: Notation, depth: int = 0) -> Ask[bool]:
    """Tell the value that follows as JSON, while it comes; False where it is none, or the stream ends in it."""
    char = yield from reader.white()
    quote = yield from reader.take(*notation.quotes)
    if quote:
        return (yield from _text(reader, quote))
    if not char or char not in "{[":
        return (yield from _word(reader, notation))
    if depth == MAX_DEPTH:
        return False
    closer = "}" if char == "{" else "]"
    reader.at += 1
    reader.argue(char)
    is_first = True
    while True:
        char = yield from reader.white()
        if char == closer:
            break
        if not is_first:
            if char != ",":
                return False
            reader.at += 1
            if (yield from reader.white()) == closer:
                break
            reader.argue(", ")
        is_first = False
        if closer == "}":
            if not (yield from _key(reader, notation)):
                return False
            reader.argue(": ")
        if not (yield from literal(reader, notation, depth + 1)):
            return False
    reader.at += 1
    reader.argue(closer)
    return True


def _key(reader: CallReader, notation: Notation) -> Ask[bool]:
    quote = yield from reader.take(*notation.quotes)
    if quote:
        if not (yield from _text(reader, quote)):
            return False
        yield from reader.white()
        return bool((yield from reader.take(":")))
    if not notation.has_bare_texts:
        return False
    key, marker = yield from reader.until(":", longest=MAX_NAME)
    reader.argue(quoted(key.strip()) if marker else quoted(key)[:-1])
    return bool(marker)


def _text(reader: CallReader, quote: str) -> Ask[bool]:
    """Tell what is between the opening quote and the next one, in parts: it may be a whole file."""
    reader.argue('"')
    markers = (quote, "\\") if len(quote) == 1 else (quote,)
    while True:
        text, marker = yield from reader.until(*markers)
        reader.argue(quoted(text)[1:-1])
        if marker == quote:
            reader.argue('"')
            return True
        if not marker:
            return False
        reader.argue(quoted((yield from _escape(reader)))[1:-1])


def _escape(reader: CallReader) -> Ask[str]:
    """What stands for behind a backslash."""
    char = yield from reader.peek()
    if not char:
        return ""
    reader.at += 1
    if char not in _CODES:
        return _ESCAPES.get(char, char if char in "\\'\"/" else "\\" + char)
    digits = ""
    while len(digits) < _CODES[char] and (yield from reader.peek()) in tuple("0123456789abcdefABCDEF"):
        digits += yield from reader.peek()
        reader.at += 1
    code = int(digits, 16) if len(digits) == _CODES[char] else -1
    return chr(code) if 0 <= code < 0x110000 else "\\" + char + digits


def _word(reader: CallReader, notation: Notation) -> Ask[bool]:
    word = ""
    while len(word) < MAX_WORD:
        char = yield from reader.peek()
        if not char or not (char in WORD or (notation.has_bare_texts and char not in ",}]:\n")):
            break
        word += char
        reader.at += 1
    bare = word.rstrip()
    bare = _WORDS.get(bare, bare)
    if is_word(bare):
        reader.argue(bare)
        return True
    if not notation.has_bare_texts or not bare:
        reader.argue(word)  # as it is, for whoever wants to know what was wrong
        return False
    reader.argue(quoted(bare))
    return True
