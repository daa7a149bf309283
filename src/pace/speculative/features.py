"""What a PARD-2 draft sees of the target: hidden states, projected and added to the embeddings of its tokens.

A token is paired with the target's state at the position before it, from which the target predicted it; the first token has
none and gets zeros. Masks share the state of the last token before them. (Shifted to the left as EAGLE does, the first pair
is lost, and acceptance with it: 7.7 tokens of a round became 2.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from pace.engine.schedule import Schedule
from pace.engine.sequence import Sequence
from pace.models.decoder import tap_slot
from pace.models.plan import Bf16Array, Embed, Gemm, Plan, Slot

__all__ = ["PROJECTION", "SLOT", "Features", "with_features"]

SLOT, PROJECTION = "features", "target_proj"

KEPT = 256
"""States of one sequence that are kept while drafting does not pay and nobody reads them: 8 MB beside a target of 8B."""


def with_features(plan: Plan, width: int, scale: float, bias: bool) -> Plan:
    """The plan of a draft whose input is embed(tokens) + scale * target_proj(features).

    Args:
        width: columns of the features, all taps side by side.
        scale: of the projection.
        bias: whether the projection has one.
    """
    embed = plan.ops[0]
    if not isinstance(embed, Embed):
        raise RuntimeError(f"the plan begins with {embed.name}, not with its embedding")
    project = Gemm(
        PROJECTION,
        SLOT,
        embed.dst,
        PROJECTION,
        f"{PROJECTION}.bias" if bias else None,
        epilogue="add",
        scale=scale,
    )
    return replace(
        plan,
        slots=plan.slots | {SLOT: Slot(SLOT, width, "bf16", "tokens")},
        ops=(embed, project, *plan.ops[1:]),
    )


@dataclass(slots=True)
class _States:
    """The target's states of one sequence at positions first, first + 1, ..."""

    first: int
    rows: Bf16Array


class Features:
    """Keeps the target's hidden states of running sequences until the draft has read the tokens behind them.

    Where there are none, because the target found a prompt in its cache and the draft did not, a token gets zeros, as the
    draft was trained to expect now and then.

    Args:
        depths: of the target's taps, in the order in which the projection takes them.
    """

    def __init__(self, depths: tuple[int, ...]) -> None:
        self._depths = depths
        self._taps: list[Bf16Array] = []
        self._states: dict[Sequence, _States] = {}

    def bind(self, slot: Callable[[str], npt.NDArray[Any]]) -> None:
        """Where the target's taps are."""
        self._taps = [slot(tap_slot(depth)) for depth in self._depths]

    def ran(self, step: Schedule) -> None:
        """Keep the states of a step's rows; those of wrong guesses are overwritten by the next step."""
        at = 0
        for seq, n_new in zip(step.seqs, step.n_new, strict=True):
            rows = np.concatenate([tap[at : at + n_new] for tap in self._taps], axis=1)
            at += n_new
            old, first = self._states.get(seq), seq.n_computed
            if old is None or not old.first <= first <= old.first + len(old.rows):
                self._states[seq] = _States(first, rows)
            else:
                old.rows = np.concatenate([old.rows[: first - old.first], rows])
                surplus = len(old.rows) - max(KEPT, n_new)
                if surplus > 0:
                    old.first, old.rows = old.first + surplus, old.rows[surplus:]

    def fill(self, into: Bf16Array, seq: Sequence, first: int, n_tokens: int) -> None:
        """Write the features of a part's rows: n_tokens tokens from position `first` on, and masks behind them.

        Args:
            into: bf16 [rows, width] of the draft's slot.
        """
        into[:] = 0
        states = self._states.get(seq)
        if states is None:
            return
        # Row i stands for the token at first + i, which the state before it predicted.
        begin = max(first - 1, states.first)
        end = min(first + n_tokens - 1, states.first + len(states.rows))
        if begin < end:
            at = begin - (first - 1)
            into[at : at + end - begin] = states.rows[begin - states.first : end - states.first]
        if n_tokens:
            into[n_tokens:] = into[n_tokens - 1]
        # What lies before the state of the last token will not be asked for again.
        drop = max(0, min(first + n_tokens - 1 - states.first, len(states.rows)))
        states.first, states.rows = states.first + drop, states.rows[drop:]

    def end(self, seq: Sequence) -> None:
        """The sequence does not run any more."""
        self._states.pop(seq, None)
