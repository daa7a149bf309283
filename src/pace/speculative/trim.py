"""A draft that guesses fewer tokens than it knows: its LM head has rows for the usual ones only.

The head of a small model is a fifth of its weights (Llama-3.2-1B: 525 MB of 2.5 GB), and 32k of 128k tokens make nearly all
of a text. What the draft never guesses the target still says.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pace import ops
from pace.checkpoint import read_json
from pace.engine.packing import PackedSink
from pace.errors import ConfigError, show
from pace.models.plan import Gemm, I32Array, Plan, WeightShape
from pace.models.weights import SourcePart

__all__ = ["TrimmingSink", "read_ids", "trimmed"]

HEAD = "lm_head.trimmed"


def read_ids(path: str, vocab_size: int, never: I32Array) -> I32Array:
    """The tokens that a draft may guess, i32 [n], ascending, from a JSON file {"token_ids": [...]}.

    Args:
        vocab_size: of the draft.
        never: ids that it may not guess anyway.

    Raises:
        ConfigError: there is no such file, or it is no list of ids below vocab_size, or nothing is left of it.
        CheckpointError: it is no JSON.
    """
    if not Path(path).is_file():
        raise ConfigError(f"speculative: draft_vocab {show(path)} is no file")
    values = read_json(Path(path)).get("token_ids")
    if not isinstance(values, list):
        raise ConfigError(f"speculative: draft_vocab {path} has no list of token_ids")
    for value in values:
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < vocab_size:
            raise ConfigError(
                f"speculative: draft_vocab {path} has {show(value)}, expected token ids below {vocab_size}"
            )
    ids = np.setdiff1d(np.array(values, np.int32), never).astype(np.int32)
    if not len(ids):
        raise ConfigError(f"speculative: draft_vocab {path} has no token that can be guessed")
    return ids


def trimmed(plan: Plan, n_ids: int) -> Plan:
    """The plan with n_ids columns of logits, whose head is the weight that `TrimmingSink` makes."""
    head = plan.ops[-1]
    if not isinstance(head, Gemm):
        raise ConfigError("speculative: draft_vocab needs a draft whose last operator is its LM head")
    bias = None if head.bias is None else f"{HEAD}.bias"
    logits = replace(plan.slots[plan.logits], width=n_ids)
    return replace(
        plan,
        slots=plan.slots | {plan.logits: logits},
        ops=(*plan.ops[:-1], replace(head, weight=HEAD, bias=bias)),
    )


class TrimmingSink(PackedSink):
    """Packs some rows of the head beside all other weights.

    Args:
        team: as of `PackedSink`.
        plan: whose weights come: the whole one.
        ids: i32 [n]: rows of its head, ascending.
    """

    def __init__(self, team: ops.Team, plan: Plan, ids: I32Array) -> None:
        super().__init__(team)
        head = plan.ops[-1]
        self._ids = ids
        self._weight = head.weight if isinstance(head, Gemm) else ""
        self._bias = head.bias if isinstance(head, Gemm) else None
        # A tied head is the embedding, which is needed whole.
        self._is_shared = sum(getattr(op, "weight", None) == self._weight for op in plan.ops) > 1

    def matrix(self, name: str, shape: WeightShape, parts: Iterator[SourcePart]) -> None:
        """Pack matrices [n, k] part by part, of the head the chosen rows."""
        if name != self._weight:
            super().matrix(name, shape, parts)
            return
        kept: list[tuple[npt.NDArray[Any], str]] = []

        def chosen() -> Iterator[SourcePart]:
            for part in parts:
                first, end = np.searchsorted(self._ids, (part.at, part.at + len(part.array)))
                rows, dtype = part.array, part.dtype
                if not isinstance(rows, np.ndarray):
                    rows, dtype = rows.dequantised(), "f32"
                kept.append((rows[self._ids[first:end] - part.at], dtype))
                yield part

        if self._is_shared:
            super().matrix(name, shape, chosen())
        else:
            for _ in chosen():
                pass
        packed = ops.PackedMatrix(self.team, len(self._ids), shape.k or 1)
        packed.pack(np.concatenate([rows for rows, _ in kept]), kept[0][1])
        self.weights[HEAD] = packed

    def vector(self, name: str, values: Any) -> None:
        """Keep a vector [n], of the head's bias the chosen entries."""
        if name == self._bias:
            super().vector(f"{HEAD}.bias", np.ascontiguousarray(values[self._ids]))
        else:
            super().vector(name, values)
