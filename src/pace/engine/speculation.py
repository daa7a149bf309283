"""What the engine's loop asks of speculative decoding; `pace.speculative` implements it."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any, Protocol

import numpy.typing as npt

from pace import ops
from pace.engine.memory import MemoryPlan
from pace.engine.schedule import Schedule
from pace.engine.sequence import Sequence
from pace.models.spec import DecoderSpec
from pace.text.tokenizer import Tokenizer

__all__ = ["Speculation", "SpeculationMaker", "Target"]


@dataclass(frozen=True)
class Target:
    """The model whose tokens are guessed.

    Attributes:
        vocab_size: columns of its logits.
        dim: columns of its hidden states.
        memory: what it allocates.
        tokenizer: its tokenizer; None: it was loaded without one.
        team: the threads that run it, and whatever runs beside it.
        show_progress: of what is loaded; None: where stderr is a terminal.
    """

    vocab_size: int
    dim: int
    memory: MemoryPlan
    tokenizer: Tokenizer | None
    team: ops.Team
    show_progress: bool | None = None


class SpeculationMaker(Protocol):
    """Makes the speculation of an engine that is being loaded. What can be refused without the target was refused before.

    Attributes:
        max_draft_rows: of the speculation that it makes; the target needs logits for as many rows.
        n_bytes: what it allocates beside a KV cache.
        kv_width: keys and values of a token in a KV cache of its own, over all layers and heads; 0: it has none.
    """

    max_draft_rows: int
    n_bytes: int
    kv_width: int

    def taps(self, spec: DecoderSpec) -> tuple[int, ...]:
        """Depths of the target at which it wants hidden states, as `models.decoder.lower` takes them."""
        ...

    def make(self, target: Target) -> Speculation:
        """Load what guesses.

        Raises:
            CheckpointError, ConfigError, CapacityError: it does not fit the target.
        """
        ...


class Speculation(Protocol):
    """Guesses tokens of running sequences, and learns what became of the guesses. No method raises but what ends the loop.

    Attributes:
        max_draft_rows: drafted tokens of all sequences that one step may verify.
        max_tokens: drafted tokens of one sequence at most.
    """

    max_draft_rows: int
    max_tokens: int

    def bind(self, slot: Callable[[str], npt.NDArray[Any]]) -> None:
        """Where the target leaves what was tapped: slot(name) is an activation slot, [rows, width]."""
        ...

    def ran(self, step: Schedule) -> None:
        """The target ran a step; its rows are still in its slots, and nothing is committed."""
        ...

    def propose(self, running: Seq[Sequence]) -> None:
        """Before a step is planned: `Sequence.draft` for those that decode and may speculate."""
        ...

    def accepts(self, drafted: int, drawn: int, i: int) -> bool:
        """Whether a guess stands, the i-th of its draft, when the target drew `drawn` in its place: they are equal. (Only a
        benchmark that simulates an acceptance says otherwise.)"""
        ...

    def verified(self, seq: Sequence, n_draft: int, n_accepted: int, n_tokens: int) -> None:
        """A sequence's `n_draft` guesses were verified; the first `n_accepted` became output, of n_tokens tokens in all."""
        ...

    def distrust(self, seq: Sequence) -> None:
        """A draft of this sequence led to logits that hold NaN: no more drafts for it."""
        ...

    def after_step(self, running: Seq[Sequence], n_rows: int, n_prompt: int, seconds: float) -> None:
        """A step is over.

        Args:
            running: those that go on; whoever ran and is not among them holds nothing any more.
            n_rows: rows of the step, n_prompt of them of prompts.
            seconds: that the model took; 0 rows: nothing ran.
        """
        ...

    def close(self) -> None:
        """Give back memory."""
        ...

    def stats(self) -> dict[str, Any]:
        """Numbers for `Engine.stats`."""
        ...
