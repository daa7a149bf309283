"""Drafters for tests: they guess by a function of the tokens, wrong as often as they are told."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping

from pace.engine.sequence import Sequence
from pace.speculative.drafter import Drafter, Proposal

Continue = Callable[[Sequence, list[int]], int]
"""The token behind these, of a sequence."""


class Guesser(Drafter):
    """Guesses what `follow` says, and something else where a hash of the history says so.

    Args:
        follow: the next token; it is right as long as nothing before it was guessed wrong.
        max_tokens: K.
        wrong: of 8 guesses, how many are wrong; more than 8: ids that no vocabulary has, too.
        ragged: guess fewer than are wanted, sometimes none.
        fails_after: rounds until it raises.
    """

    name = "guesser"

    def __init__(
        self,
        follow: Continue,
        max_tokens: int,
        *,
        wrong: int = 0,
        ragged: bool = False,
        fails_after: int | None = None,
    ) -> None:
        self.max_tokens = max_tokens
        self.follow = follow
        self.wrong = wrong
        self.ragged = ragged
        self.fails_after = fails_after
        self.n_rounds = 0
        self.held: set[Sequence] = set()
        self.closed = False

    def propose(self, wanted: Mapping[Sequence, int]) -> dict[Sequence, Proposal]:
        assert not self.closed
        self.n_rounds += 1
        if self.fails_after is not None and self.n_rounds > self.fails_after:
            raise RuntimeError("out of guesses")
        self.held |= set(wanted)
        return {seq: Proposal(self.guess(seq, n)) for seq, n in wanted.items()}

    def guess(self, seq: Sequence, n: int) -> list[int]:
        assert 0 <= n <= self.max_tokens and (n == 0 or seq.n_tokens - seq.n_computed == 1)
        history: list[int] = seq.tokens[: seq.n_tokens].tolist()
        mark = zlib.crc32(bytes(str(history), "ascii"))
        if self.ragged:
            n = mark % (n + 1)
        guesses = []
        for i in range(n):
            token = self.follow(seq, history)
            if (mark >> i) % 8 < self.wrong:
                token = token + (1 << 20) if self.wrong > 8 and i else (token + 1) % 90
            guesses.append(token)
            history.append(token)
        return guesses

    def observe(self, seq: Sequence, n_verified: int, n_accepted: int) -> None:
        assert seq in self.held and 0 <= n_accepted <= n_verified <= self.max_tokens

    def end(self, seq: Sequence) -> None:
        self.held.discard(seq)

    def close(self) -> None:
        self.closed = True
