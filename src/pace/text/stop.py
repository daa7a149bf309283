"""The search for stop strings in a stream of text."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["StopChecker"]


class StopChecker:
    """Searches a stream of text for stop strings, and holds back only what may be the start of one.

    The match that is complete first wins, of several at the same end the longest: the result does not depend
    on how the text was cut into pieces. One Knuth-Morris-Pratt automaton per string makes that O(1) per
    character and string.

    Attributes:
        matched: the stop string that was found, or None.
    """

    def __init__(self, stop: Sequence[str], *, include_in_output: bool = False) -> None:
        self.matched: str | None = None
        self._include = include_in_output
        self._stop = tuple(sorted(set(stop), key=len, reverse=True))
        self._failures = [_failure_function(string) for string in self._stop]
        self._states = [0] * len(self._stop)
        self._held = ""

    def push(self, text: str, *, check: bool = True) -> str:
        """Add text; returns what may be shown. After a match: the rest of the output, and "" from then on.

        Args:
            text: the new text.
            check: False while the output is shorter than min_tokens: a complete match is then ignored.
        """
        if self.matched is not None:
            return ""
        if not self._stop:
            return text
        pending = self._held + text
        start = len(self._held)
        for position, char in enumerate(text, start + 1):
            match = self._advance(char)
            if match is not None and check:
                self.matched, self._held = match, ""
                return pending[: position if self._include else position - len(match)]
        # With include_in_output no text can turn out to be unwanted.
        n_hold = 0 if self._include else max(self._states)
        self._held = pending[len(pending) - n_hold :]
        return pending[: len(pending) - n_hold]

    def finish(self) -> str:
        """Return what was held back; it didn't become a stop string."""
        held, self._held = self._held, ""
        return held

    def _advance(self, char: str) -> str | None:
        match = None
        for i, string in enumerate(self._stop):
            state, failure = self._states[i], self._failures[i]
            while state and string[state] != char:
                state = failure[state - 1]
            if string[state] == char:
                state += 1
            if state == len(string):
                match = match or string  # the strings are sorted, the longest first
                state = failure[state - 1]
            self._states[i] = state
        return match


def _failure_function(string: str) -> tuple[int, ...]:
    """For each prefix of `string`, the length of its longest proper prefix that is also its suffix."""
    failure = [0] * len(string)
    state = 0
    for i in range(1, len(string)):
        while state and string[state] != string[i]:
            state = failure[state - 1]
        if string[state] == string[i]:
            state += 1
        failure[i] = state
    return tuple(failure)
