"""Readers that are written as programs: generators that ask for text and go on when there is some."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Generator
from typing import TypeVar

from pace.text.json_scanner import WHITE, JsonScanner
from pace.text.readers import FINAL, Piece, Reader

__all__ = ["Ask", "Script"]

T = TypeVar("T")

Ask = Generator[None, None, T]
"""What may need more text before it can return a T."""


class Script(Reader):
    """A reader whose `script` reads the stream from its beginning to its end, in a straight line.

    What a script decides may depend on what the text says, never on how much of it is there: the methods here wait for as
    much as a decision needs. Positions count from the beginning of the stream.
    """

    def __init__(self) -> None:
        self._held = ""
        self._base = 0  # position of the held text
        self._ended = False
        self.at = 0
        self.keep: int | None = None  # the text from here on stays, to be given back
        self.pieces: list[Piece] = []
        self._script = self.script()
        next(self._script, None)

    @abstractmethod
    def script(self) -> Ask[None]:
        """Read the whole stream."""

    def push(self, text: str) -> list[Piece]:
        """See `Reader`."""
        first = self.at if self.keep is None else min(self.keep, self.at)
        self._held = self._held[first - self._base :] + text
        self._base = first
        return self._run()

    def finish(self) -> list[Piece]:
        """See `Reader`."""
        self._ended = True
        return self._run()

    def _run(self) -> list[Piece]:
        next(self._script, None)
        pieces, self.pieces = self.pieces, []
        return pieces

    def put(self, channel: str, text: str) -> None:
        """A part of the text is certain."""
        if text:
            self.pieces.append(Piece(channel, text))

    def held(self, first: int, end: int | None = None) -> str:
        """The text between two positions."""
        return self._held[first - self._base : None if end is None else end - self._base]

    # ---- reading on -----------------------------------------------------------------------------------------

    def peek(self) -> Ask[str]:
        """The next character, which stays; "" at the end of the stream."""
        while self.at >= self._base + len(self._held):
            if self._ended:
                return ""
            yield
        return self._held[self.at - self._base]

    def white(self) -> Ask[str]:
        """Skip white space; returns the character behind it, as `peek`."""
        while True:
            char = yield from self.peek()
            if not char or char not in WHITE:
                return char
            self.at += 1

    def take(self, *words: str) -> Ask[str]:
        """Skip the one of `words` that follows, of several the longest; returns it, "" where none does."""
        longest = max(map(len, words))
        while True:
            rest = self.held(self.at, self.at + longest)
            if self._ended or not any(word != rest and word.startswith(rest) for word in words):
                break
            yield
        word = max((word for word in words if rest.startswith(word)), key=len, default="")
        self.at += len(word)
        return word

    def until(self, *markers: str, longest: int = 0) -> Ask[tuple[str, str]]:
        """Read through the first of `markers`.

        Args:
            longest: characters before the marker at most; 0: any number.

        Returns:
            The text before it and the marker. Where none comes: the rest of the stream, or `longest` characters, and "".
        """
        start, kept = self.at, self.keep
        self.keep = start if kept is None else min(kept, start)
        n_marker = max(map(len, markers), default=1)
        searched = start
        while True:
            at, marker = self._find(markers, searched)
            end = self._base + len(self._held)
            if longest and (at - start > longest or (not marker and end - start >= longest + n_marker)):
                at, marker = min(end, start + longest), ""
                break
            if marker or self._ended:
                break
            searched = max(start, end - n_marker + 1)
            yield
        self.at = at + len(marker)
        self.keep = kept
        return self.held(start, at), marker

    def value(self, sink: Callable[[str], None]) -> Ask[bool]:
        """Read a JSON value; False where what follows is none, or the stream ends in it.

        Args:
            sink: is given what was read, as it comes.
        """
        scanner = JsonScanner()
        while True:
            n_read, text = scanner.feed(self.held(self.at))
            self.at += n_read
            sink(text)
            if scanner.done or scanner.broken:
                return scanner.done
            if self._ended:
                return False
            yield

    def _find(self, markers: tuple[str, ...], first: int) -> tuple[int, str]:
        """Position and text of the marker that begins first from a position on, of several the longest; the end of the held
        text and "" where there is none."""
        found = [
            (at, -len(marker), marker)
            for marker in markers
            if (at := self._held.find(marker, first - self._base)) >= 0
        ]
        if not found:
            return self._base + len(self._held), ""
        at, _, marker = min(found)
        return self._base + at, marker

    def text_until(self, *openers: str) -> Ask[str]:
        """Say the text up to the first of `openers`, which is read and kept; returns it, "" at the end of the stream."""
        while True:
            at, opener = self._find(openers, self.at)
            if not opener and not self._ended:
                at -= self._n_uncertain(openers)
            self.say(self.held(self.at, at))
            self.at = at + len(opener)
            if opener or self._ended:
                self.keep = at
                return opener
            yield

    def _n_uncertain(self, openers: tuple[str, ...]) -> int:
        """How much of the end of the held text may become one of `openers`."""
        tail = self.held(max(self.at, self._base + len(self._held) - max(map(len, openers), default=1) + 1))
        starts = (i for i in range(len(tail)) if any(opener.startswith(tail[i:]) for opener in openers))
        return len(tail) - next(starts, len(tail))

    def say(self, text: str) -> None:
        """Text of the answer."""
        self.put(FINAL, text)
