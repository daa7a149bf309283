"""Reading what a model writes: text that passes through marked channels, as it comes, token by token.

A `Reader` takes the text of a stream in pieces of any size and says of each part which channel it belongs to: the final
answer, reasoning, or whatever else a family has (tool calls, harmony's commentary). It holds back only what may be the
beginning of a marker, so that the result does not depend on how the text was cut, and gives everything out in the end.
Markers may be special tokens or be written in several ordinary ones; the reader sees text in both cases, because the
detokeniser keeps the special tokens among `markers`. Where only the token itself divides, and text that reads like it does
not (harmony), a reader names it among `tokens` and is given it apart.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

__all__ = ["FINAL", "REASONING", "TOOL_CALL", "Chain", "MarkedReader", "Piece", "Reader", "State"]

FINAL, REASONING, TOOL_CALL = "final", "reasoning", "tool_call"


class Piece(NamedTuple):
    """A part of the text: which channel it belongs to, and the text without markers.

    In the channel TOOL_CALL a piece with a name begins a call of that function, and its text and that of the pieces behind
    it, joined, are the arguments.
    """

    channel: str
    text: str
    name: str | None = None


class Reader(ABC):
    """Divides one stream of text; made anew for each.

    Attributes:
        markers: the texts that divide; those that are special tokens must reach the reader all the same.
        tokens: special tokens that reach it through `push_token`, and never as text.
    """

    markers: frozenset[str] = frozenset()
    tokens: frozenset[str] = frozenset()

    @abstractmethod
    def push(self, text: str) -> list[Piece]:
        """Add text; returns the pieces that are certain with it."""

    def push_token(self, token: str) -> list[Piece]:
        """Add one of `tokens`; returns the pieces that are certain with it."""
        return self.push(token)

    @abstractmethod
    def finish(self) -> list[Piece]:
        """End the stream; returns what was held back."""


class Chain(Reader):
    """One reader behind another: the first one's final text is what the second one reads."""

    def __init__(self, first: Reader, second: Reader) -> None:
        self._first, self._second = first, second
        self.markers = first.markers | second.markers

    def push(self, text: str) -> list[Piece]:
        """See `Reader`."""
        return self._pass_on(self._first.push(text))

    def finish(self) -> list[Piece]:
        """See `Reader`."""
        return self._pass_on(self._first.finish()) + self._second.finish()

    def _pass_on(self, pieces: list[Piece]) -> list[Piece]:
        result: list[Piece] = []
        for piece in pieces:
            result += self._second.push(piece.text) if piece.channel == FINAL else [piece]
        return result


@dataclass(frozen=True)
class State:
    """Where a reader may be.

    Attributes:
        channel: of the text that is read here; None: it is a header, which chooses the next state.
        exits: marker -> name of the next state.
        choose: for a header: its text and the marker -> name of the next state, in place of the marker's.
        otherwise: where set, markers count at the beginning only, behind white space; anything else leads there.
        trims: newlines at the end belong to the marker that follows.
    """

    channel: str | None
    exits: Mapping[str, str] = field(default_factory=dict)
    choose: Callable[[str, str], str] | None = None
    otherwise: str | None = None
    trims: bool = False


class MarkedReader(Reader):
    """A reader made of states and the markers that lead from one to the next.

    Args:
        states: by name.
        start: the name of the first.
    """

    def __init__(self, states: Mapping[str, State], start: str) -> None:
        self._states = states
        self._state = states[start]
        self._held = ""
        self._is_fresh = self._state.trims  # right behind a marker, where newlines belong to it
        self.markers = frozenset(marker for state in states.values() for marker in state.exits)

    def push(self, text: str) -> list[Piece]:
        """See `Reader`."""
        self._held += text
        pieces: list[Piece] = []
        while self._advance(pieces):
            pass
        return pieces

    def finish(self) -> list[Piece]:
        """See `Reader`; a marker that was not completed is text."""
        pieces: list[Piece] = []
        if self._state.otherwise is not None:
            self._state = self._states[self._state.otherwise]
        text = self._held.rstrip("\n") if self._state.trims else self._held
        self._held = ""
        self._add(pieces, text)
        return pieces

    def _advance(self, pieces: list[Piece]) -> bool:
        """Take the held text to the next state; False where it takes more text to do so."""
        state = self._state
        if state.otherwise is not None:
            rest = self._held.lstrip()
            if any(marker != rest and marker.startswith(rest) for marker in state.exits):
                return False
            if not rest.startswith(tuple(state.exits)):
                self._state = self._states[state.otherwise]
                return True
        marker = self._first_marker()
        if marker is None:
            n_hold = self._n_uncertain()
            at = len(self._held) - n_hold
            self._add(pieces, self._held[:at])
            self._held = self._held[at:]
            return False
        text, _, self._held = self._held.partition(marker)
        if state.otherwise is None:
            self._add(pieces, text.rstrip("\n") if state.trims else text)
        name = state.exits[marker] if state.choose is None else state.choose(text, marker)
        self._state, self._is_fresh = self._states[name], True
        return True

    def _first_marker(self) -> str | None:
        """The marker that begins first in the held text, of several there the longest."""
        found = [
            (at, -len(marker), marker) for marker in self._state.exits if (at := self._held.find(marker)) >= 0
        ]
        return min(found)[2] if found else None

    def _n_uncertain(self) -> int:
        """How much of the held text's end may become a marker, or belongs to one that may follow."""
        if self._state.channel is None:
            return len(self._held)
        longest = max(map(len, self._state.exits), default=1) - 1
        tail = self._held[-longest:] if longest else ""
        starts = (
            i for i in range(len(tail)) if any(marker.startswith(tail[i:]) for marker in self._state.exits)
        )
        n_hold = len(tail) - next(starts, len(tail))
        if self._state.trims:
            certain = self._held[: len(self._held) - n_hold]
            n_hold += len(certain) - len(certain.rstrip("\n"))
        return n_hold

    def _add(self, pieces: list[Piece], text: str) -> None:
        if self._is_fresh:
            text = text.lstrip("\n")
        if text and self._state.channel is not None:
            self._is_fresh = False
            pieces.append(Piece(self._state.channel, text))
