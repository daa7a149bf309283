"""JSON as it is being written: where a value ends, and whether it still is one."""

from __future__ import annotations

import json
from enum import Enum, auto

__all__ = ["MAX_DEPTH", "MAX_WORD", "WHITE", "WORD", "JsonScanner", "is_object", "is_word", "quoted"]

MAX_DEPTH = 64  # arguments of tools that are nested deeper are not read; parsers of clients may recurse
MAX_WORD = 1024  # characters of a number

WHITE = " \t\r\n"
"""What JSON skips."""

WORD = frozenset("+-.0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
_HEX = frozenset("0123456789abcdefABCDEF")


class _At(Enum):
    """What comes next."""

    VALUE = auto()
    FIRST_ITEM = auto()
    FIRST_KEY = auto()
    KEY = auto()
    COLON = auto()
    COMMA = auto()
    STRING = auto()
    ESCAPE = auto()
    WORD = auto()


class JsonScanner:
    """Follows one JSON value, character by character.

    Attributes:
        done: the value is complete.
        broken: what came is no JSON; nothing more is read.
    """

    def __init__(self) -> None:
        self.done = self.broken = False
        self._at = _At.VALUE
        self._stack: list[str] = []  # closing brackets
        self._word = ""
        self._is_key = False
        self._n_hex = 0  # digits of a character's number, behind \\u, that are still to come

    def feed(self, text: str) -> tuple[int, str]:
        """Read on, up to the end of the value or to what breaks it.

        Returns:
            How many characters were read, and what they are as strict JSON: control characters inside strings, which
            models write as they are, become escapes.
        """
        out: list[str] = []
        for i, char in enumerate(text):
            told = self._read(char)
            if told is None:  # the character belongs to what follows
                return i, "".join(out)
            out.append(told)
            if self.done:
                return i + 1, "".join(out)
        return len(text), "".join(out)

    def _read(self, char: str) -> str | None:
        at = self._at
        if at is _At.STRING:
            return self._read_string(char)
        if at is _At.ESCAPE:
            return self._read_escape(char)
        if at is _At.WORD:
            if char in WORD and len(self._word) < MAX_WORD:
                self._word += char
                return char
            if not is_word(self._word):
                return self._break()
            self._end_value()
            return None if self.done else self._read(char)
        if char in WHITE:
            return char
        if at is _At.COLON:
            return self._go(_At.VALUE, char) if char == ":" else self._break()
        if at is _At.COMMA and char == ",":
            return self._go(_At.KEY if self._stack[-1] == "}" else _At.VALUE, char)
        if at in (_At.COMMA, _At.FIRST_KEY, _At.FIRST_ITEM) and char == self._stack[-1]:
            self._stack.pop()
            self._end_value()
            return char
        if at in (_At.KEY, _At.FIRST_KEY):
            self._is_key = True
            return self._go(_At.STRING, char) if char == '"' else self._break()
        return self._break() if at is _At.COMMA else self._begin_value(char)

    def _begin_value(self, char: str) -> str | None:
        if char in "{[" and len(self._stack) < MAX_DEPTH:
            self._stack.append("}" if char == "{" else "]")
            return self._go(_At.FIRST_KEY if char == "{" else _At.FIRST_ITEM, char)
        if char == '"':
            self._is_key = False
            return self._go(_At.STRING, char)
        if char in WORD:
            self._word = char
            return self._go(_At.WORD, char)
        return self._break()

    def _read_string(self, char: str) -> str:
        if char == "\\":
            return self._go(_At.ESCAPE, char)
        if char == '"':
            if self._is_key:
                return self._go(_At.COLON, char)
            self._end_value()
            return char
        return char if char >= " " else f"\\u{ord(char):04x}"

    def _read_escape(self, char: str) -> str | None:
        if self._n_hex:
            if char not in _HEX:
                return self._break()
            self._n_hex -= 1
            return self._go(_At.ESCAPE if self._n_hex else _At.STRING, char)
        if char == "u":
            self._n_hex = 4
            return char
        return self._go(_At.STRING, char) if char in '"\\/bfnrt' else self._break()

    def _end_value(self) -> None:
        self._at = _At.COMMA
        self.done = not self._stack

    def _go(self, at: _At, char: str) -> str:
        self._at = at
        return char

    def _break(self) -> str | None:
        self.broken = True
        return None


def is_object(text: str) -> bool:
    """Whether `text` is one JSON object, as strict as the scanner."""
    scanner = JsonScanner()
    body = text.strip(WHITE)
    return body[:1] == "{" and scanner.feed(body)[0] == len(body) and scanner.done


def quoted(text: str) -> str:
    """A text as JSON, with escapes only where they must be: half a character has no other form."""
    plain = json.dumps(text, ensure_ascii=False)
    return (
        plain
        if plain.isascii() or not any("\ud800" <= char <= "\udfff" for char in text)
        else json.dumps(text)
    )


def is_word(word: str) -> bool:
    """Whether it is true, false, null or a number."""
    return word in ("true", "false", "null") or _is_number(word)


def _is_number(word: str) -> bool:
    mantissa, e, exponent = word.replace("E", "e").partition("e")
    whole, dot, fraction = mantissa.removeprefix("-").partition(".")
    return (
        _is_digits(whole)
        and (whole == "0" or whole[0] != "0")
        and (not dot or _is_digits(fraction))
        and (not e or _is_digits(exponent[1:] if exponent[:1] in ("+", "-") else exponent))
    )


def _is_digits(text: str) -> bool:
    return text.isascii() and text.isdigit()
