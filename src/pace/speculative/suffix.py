"""The suffix drafter: what follows is what followed the longest and most frequent of the same contexts before.

It needs no model, and costs a microsecond for a token and a few for a guess. It guesses well where an output repeats its
prompt or itself: edits of code, extraction, tables, quotations; and it says nothing where nothing repeats.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from pace.engine.sequence import Sequence
from pace.models.plan import I32Array
from pace.ops import SUFFIX_BREAK, SuffixGuess, SuffixIndex
from pace.speculative.drafter import Drafter, Proposal

__all__ = ["LEAST", "PastOutputs", "SuffixDrafter"]

LEAST = 0.2
"""Guesses end before a token that is right less often, together with those before it. With this limit a context of a single
token pays, without it two are needed: on HumanEval, GSM8K and MATH-500 SmolLM2 then says 1.76 to 1.99 tokens a step, for
2.5 to 3.2 drafted rows, instead of 1.63 to 1.81 for 1.8 to 2.9. Tokens are right about as often as confidences say."""

READ_TOKENS = 8192
"""Read of all sequences in one step at most, about 3 ms, so that a long prompt doesn't hold the others up. There is time:
the target reads it over many steps."""


class PastOutputs:
    """What requests were answered with, for the guesses of later ones. Its memory is bounded: it keeps the newest half of
    its capacity at least, all of it at most.

    Outputs fill one index; when that has half of the capacity, it becomes the old one, and the one before goes. So
    forgetting costs nothing, and nothing is ever taken out of an automaton.

    Args:
        capacity: tokens, >= 2; each costs about 110 bytes, 250 at most.
    """

    def __init__(self, capacity: int) -> None:
        self._half = capacity // 2
        self._new, self._old = SuffixIndex(), SuffixIndex()

    def add(self, output: I32Array) -> None:
        """Keep an output, i32 [n]; of one that is longer than half the capacity, its end."""
        output = output[max(0, len(output) - self._half + 1) :]
        if len(self._new) + len(output) + 1 > self._half:
            self._old, self._new = self._new, SuffixIndex()
        self._new.add(output)
        self._new.add(_BREAK)

    def propose(self, context: I32Array, max_tokens: int, least: float = LEAST) -> SuffixGuess:
        """Guess what follows `context`, i32 [n]."""
        return self._new.propose(max_tokens, least=least, context=context, past=(self._old,))

    @property
    def indexes(self) -> tuple[SuffixIndex, SuffixIndex]:
        """All that it holds."""
        return self._new, self._old

    @property
    def n_tokens(self) -> int:
        """Tokens that it holds, one for the end of each output included."""
        return len(self._new) + len(self._old)

    @property
    def nbytes(self) -> int:
        """Memory that it holds."""
        return self._new.nbytes + self._old.nbytes


_BREAK = np.array([SUFFIX_BREAK], np.int32)


class SuffixDrafter(Drafter):
    """Guesses from a sequence's own prompt and output, and from past outputs where it may.

    Args:
        max_tokens: K.
        least: guesses end before a token that is right, together with those before it, with a probability below this.
        past_tokens: capacity of the cache of past outputs; 0: none. Sequences with a cache salt neither read nor fill it:
            what one user was answered would come a little faster for another.
    """

    name = "suffix"

    def __init__(self, max_tokens: int, *, least: float = LEAST, past_tokens: int = 0) -> None:
        self.max_tokens = max_tokens
        self._least = least
        self._texts: dict[Sequence, SuffixIndex] = {}
        self._past = PastOutputs(past_tokens) if past_tokens else None

    def propose(self, wanted: Mapping[Sequence, int]) -> dict[Sequence, Proposal]:
        """As `Drafter.propose`."""
        return {
            seq: Proposal(guess.token_ids, guess.confidences) for seq, guess in self.guesses(wanted).items()
        }

    def guesses(self, wanted: Mapping[Sequence, int]) -> dict[Sequence, SuffixGuess]:
        """As `propose`, with the length of each guess's context and how many tokens of it are likely to be right."""
        room = READ_TOKENS
        found = {}
        for seq, n in wanted.items():
            text = self._texts.get(seq)
            if text is None:
                text = self._texts[seq] = SuffixIndex()
            at = len(text)
            end = min(seq.n_tokens, at + room)
            text.add(seq.tokens[at:end])
            room -= end - at
            if n and end == seq.n_tokens:
                guess = self._guess(seq, text, n)
                if guess.token_ids:
                    found[seq] = guess
        return found

    def _guess(self, seq: Sequence, text: SuffixIndex, n: int) -> SuffixGuess:
        past = () if self._past is None or seq.cache_salt is not None else self._past.indexes
        return text.propose(n, least=self._least, past=past)

    def end(self, seq: Sequence) -> None:
        """As `Drafter.end`; an output that is whole joins the past ones."""
        if self._texts.pop(seq, None) is None or self._past is None or seq.cache_salt is not None:
            return
        if seq.finish_reason in ("stop", "length"):
            self._past.add(seq.tokens[seq.n_prompt : seq.n_tokens])

    def close(self) -> None:
        """As `Drafter.close`."""
        self._texts.clear()
        self._past = None

    def stats(self) -> dict[str, Any]:
        """suffix_bytes: memory of all indexes; past_tokens: that the cache of past outputs holds."""
        past = self._past
        texts = sum(text.nbytes for text in list(self._texts.values()))  # a copy: the engine's thread goes on
        return {
            "suffix_bytes": texts + (0 if past is None else past.nbytes),
            "past_tokens": 0 if past is None else past.n_tokens,
        }
