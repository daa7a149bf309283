"""Readers of tool calls: what all families share."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

from pace.text.json_scanner import WHITE, is_object
from pace.text.readers import FINAL, TOOL_CALL, Piece
from pace.text.script import Ask, Script

__all__ = ["MAX_NAME", "CallReader", "Functions"]

MAX_NAME = 256  # characters of a function's name

Functions = Mapping[str, Mapping[str, Any]]
"""The functions that may be called: name -> JSON schema of its arguments."""


class CallReader(Script):
    """Text in which calls begin with one of `openers`.

    What turns out to be no call of one of the functions is text, markers included. As soon as the name and the beginning of
    the arguments are there it is a call, and the arguments are told as they come; where they break off, or are no JSON,
    what the model wrote is told as it is. White space beside a call is its layout and left out.
    """

    openers: tuple[str, ...] = ()

    def __init__(self, functions: Functions) -> None:
        self.functions = functions
        self._space = ""  # at the end of the text so far; a call may follow
        self._has_said = self._is_behind_call = False
        super().__init__()
        self.markers = frozenset(self.openers)

    def script(self) -> Ask[None]:
        """See `Script`."""
        while opener := (yield from self.text_until(*self.openers)):
            if not (yield from self.calls(opener)):
                self.give_back()
            self.keep = None
        if not self._is_behind_call:
            self.put(FINAL, self._space)

    @abstractmethod
    def calls(self, opener: str) -> Ask[bool]:
        """Read what follows an opener; False where it is no call, or there is more than a call."""

    def say(self, text: str) -> None:
        """Text of the answer."""
        if self._is_behind_call:
            text = text.lstrip(WHITE)
            if not text:
                return
            self._is_behind_call = False
        text = self._space + text
        body = text.rstrip(WHITE)
        self._space = text[len(body) :]
        if body:
            self.put(FINAL, body)
            self._has_said = True

    def give_back(self) -> None:
        """What was read from `keep` on is text."""
        if self.keep is not None:
            self.say(self.held(self.keep, self.at))

    def begin(self, name: str) -> None:
        """It is a call."""
        self._space = self._space if self._has_said else ""  # between this text and what may follow the call
        self._is_behind_call = True
        self.keep = None
        self.pieces.append(Piece(TOOL_CALL, "", name))

    def argue(self, text: str) -> None:
        """A part of the arguments."""
        self.put(TOOL_CALL, text)

    def arguments(self, *closers: str) -> Ask[bool]:
        """Tell the JSON object that follows; where it is none the text up to one of `closers`, and False."""
        is_whole = yield from self.value(self.argue)
        if not is_whole:
            yield from self.break_off(*closers)
        self.keep = self.at
        return is_whole

    def break_off(self, *closers: str) -> Ask[None]:
        """Tell text up to one of `closers`: arguments that are not what they should be."""
        text, closer = yield from self.until(*closers)
        self.argue(text)
        self.at -= len(closer)
        self.keep = self.at

    def closed(self, *closers: str) -> Ask[bool]:
        """Skip a closer; always True: models forget it, and the stream may end."""
        yield from self.white()
        yield from self.take(*closers)
        self.keep = self.at
        return True

    # ---- {"name": ..., "arguments": {...}} -------------------------------------------------------------------

    def json_calls(self, *closers: str) -> Ask[bool]:
        """Read an object that is a call, or a list of them; False where it is none."""
        char = yield from self.white()
        if char != "[":
            return (yield from self.json_call(*closers))
        self.at += 1
        while True:
            if not (yield from self.json_call(*closers)):
                return False
            char = yield from self.white()
            if char not in ("]", ","):
                return not char or (yield from self.is_at(*closers))
            self.at += 1
            self.keep = self.at
            if char == "]":
                return True

    def is_at(self, *closers: str) -> Ask[bool]:
        """Whether one of `closers` follows."""
        if not closers:
            return False
        closer = yield from self.take(*closers)
        self.at -= len(closer)
        return bool(closer)

    def json_call(self, *closers: str) -> Ask[bool]:
        """Read an object that is a call; False where it is none."""
        if (yield from self.white()) != "{":
            return False
        self.at += 1
        members: dict[str, str] = {}
        has_begun = False
        char = yield from self.white()
        while char != "}":
            key = yield from self._text()
            if key is None or (yield from self.white()) != ":":
                break
            self.at += 1
            char = yield from self.white()
            name = members.get("name", "")
            if (
                key in ("arguments", "parameters")
                and char == "{"
                and name in self.functions
                and not has_begun
            ):
                self.begin(name)
                has_begun = True
                if not (yield from self.arguments(*closers)):
                    return True
            else:
                value: list[str] = []
                if not (yield from self.value(value.append)):
                    break
                is_name = key == "name" and char == '"'
                members[key] = json.loads("".join(value)) if is_name else "".join(value)
            char = yield from self.white()
            if char == ",":
                self.at += 1
                char = yield from self.white()
            elif char != "}":
                break
        if char == "}":
            self.at += 1
            return has_begun or self._whole_call(members)
        return has_begun and not char

    def _text(self) -> Ask[str | None]:
        """Read a JSON string; None where none follows."""
        if (yield from self.white()) != '"':
            return None
        parts: list[str] = []
        if not (yield from self.value(parts.append)):
            return None
        text: str = json.loads("".join(parts))
        return text

    def _whole_call(self, members: Mapping[str, str]) -> bool:
        """Tell a call whose arguments came before its name, or not as an object."""
        name = members.get("name", "")
        arguments = members.get("arguments", members.get("parameters", "{}"))
        if arguments.startswith('"'):  # JSON in a string
            arguments = json.loads(arguments)
        if arguments == "null":
            arguments = "{}"
        if name not in self.functions or not is_object(arguments) or not _is_unicode(arguments):
            return False
        self.begin(name)
        self.argue(arguments)
        self.keep = self.at
        return True


def _is_unicode(text: str) -> bool:
    """JSON in a string may have spelt half a character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
