"""The contract of drafters: who guesses what a sequence will say next.

The loop is the engine's: once per step, before the step is planned, the drafter is asked for all running sequences
together (`propose`); the target then runs its own pending token and the proposed ones as rows of one step, and draws its
own token at every row with the request's sampler. It accepts while the draw equals the proposal ("sample and match"), so a
draft decides how fast an output comes and never what it is: a drafter may be wrong, lazy or out of date at no risk.

What a drafter may read of a `Sequence`, all of it constant while `propose` runs:

- `tokens[:n_tokens]`, i32: prompt and output so far; the last one is not in the target's KV cache yet when it decodes.
- `n_prompt`, `n_tokens`; `n_computed`: how many of them the target has in its cache. `n_tokens - n_computed` is 1 while it
  decodes, more while its prompt is read (or read again after a preemption).
- `cache_salt`: what is shared between sequences (caches of past outputs, prefixes) is shared within one salt only.
- `params`, `request_id`, `index`, `max_tokens` (the length beyond which it can't grow).

It writes nothing of it. Sequences hash by identity, so a drafter's own state may be a dict by sequence.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy.typing as npt

from pace.engine.schedule import Schedule
from pace.engine.sequence import Sequence
from pace.models.plan import Plan

__all__ = ["Drafter", "Passes", "Proposal"]

Passes = Literal["none", "one", "many"]


@dataclass(frozen=True, slots=True)
class Proposal:
    """What a drafter guesses to follow `tokens[:n_tokens]` of a sequence.

    Attributes:
        token_ids: the next tokens, at most as many as were wanted; an id that the target doesn't know ends it there.
        confidences: for each of them the probability, 0 .. 1, with which the drafter believes in it, given that those
            before it are right; None: it does not know. The controller verifies only what pays, by these and by what it has
            learnt.
    """

    token_ids: list[int]
    confidences: list[float] | None = None

    def first(self, n: int) -> Proposal:
        """Only so many of the tokens."""
        return Proposal(self.token_ids[:n], None if self.confidences is None else self.confidences[:n])


class Drafter(ABC):
    """Proposes tokens for running sequences. One thread at a time calls it: the engine's.

    An exception out of any method turns speculation off for good, with a warning; the requests go on without.

    Attributes:
        name: of the method, in statistics: "pard", "suffix" ...
        max_tokens: most that `propose` is ever asked for, the K of `num_speculative_tokens`.
        passes: of its model for k guesses of every sequence: "one" with k rows of each, "many" (k) with a row of each;
            "none" without a model, or where it decides itself what that may cost.
        decided_s: of the last `propose`, seconds that the drafter itself has decided to be worth it; the controller judges
            what is left.
    """

    name: str
    max_tokens: int
    passes: Passes = "none"
    decided_s: float = 0.0

    @property
    def plan(self) -> Plan | None:
        """Of its model, for benchmarks; None: it has none."""
        return None

    @property
    def n_run(self) -> tuple[int, int]:
        """Passes and rows of its model so far; none without one."""
        return 0, 0

    def bind(self, slot: Callable[[str], npt.NDArray[Any]]) -> None:
        """Where the target leaves the hidden states that the drafter's maker asked for; see `Speculation.bind`."""
        return

    def ran(self, step: Schedule) -> None:
        """The target ran a step; see `Speculation.ran`. Rows of drafted tokens may turn out to be wrong."""
        return

    @abstractmethod
    def propose(self, wanted: Mapping[Sequence, int]) -> dict[Sequence, Proposal]:
        """Guess on for the sequences of one step.

        Args:
            wanted: every running sequence that may ever be drafted for, with the number of tokens that it wants now,
                0 .. max_tokens. 0: nothing, because its prompt is still being read or because drafting does not pay; a
                drafter with a cache of its own may use the step to keep it near `n_computed`, or do so later. A sequence
                appears when it begins to run, and with more tokens than the last time whenever it has grown.

        Returns:
            Proposals of those that it has a guess for; without one, or with an empty one, a sequence decodes plainly.
        """

    def observe(self, seq: Sequence, n_verified: int, n_accepted: int) -> None:  # noqa: B027  # most drafters learn nothing
        """Of its last proposal the first `n_verified` tokens were verified, and of these the first `n_accepted` were right;
        they and the target's own next one are in `seq.tokens` now. Called after each step in which a proposal was verified,
        before the next `propose`.
        """

    def end(self, seq: Sequence) -> None:
        """The sequence does not run any more: it has finished, or was preempted and will appear anew. Its tokens are what
        they were. Let go of what is held for it; unknown ones are ignored.
        """
        return

    def close(self) -> None:
        """Give back memory; nothing is called afterwards."""
        return

    def stats(self) -> dict[str, Any]:
        """Numbers of this drafter beside those that the engine counts for all; see docs/speculative.md."""
        return {}
