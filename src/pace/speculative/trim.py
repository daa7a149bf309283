"""A draft that guesses fewer tokens than it knows: its LM head has rows for the usual ones only.

The head of a small model is a fifth of its weights (Llama-3.2-1B: 525 MB of 2.5 GB), and 32k of 128k tokens make nearly all
of a text. What the draft never guesses the target still says.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from pace import ops
from pace.checkpoint import read_json
from pace.engine.packing import PackedSink
from pace.errors import ConfigError, show
from pace.models.plan import Gemm, I32Array, Plan

__all__ = ["read_ids", "trim", "trimmed"]

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
    """The plan with n_ids columns of logits, whose head is the weight that `trim` makes."""
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


def trim(sink: PackedSink, plan: Plan, ids: I32Array) -> None:
    """Give a sink the head of `trimmed`, in the place of the whole one.

    Args:
        sink: has all weights of the plan.
        plan: the whole one.
        ids: i32 [n]: rows of its head, ascending.
    """
    head = plan.ops[-1]
    whole = sink.weights[head.weight] if isinstance(head, Gemm) else None
    if not isinstance(head, Gemm) or not isinstance(whole, ops.PackedMatrix):
        raise ConfigError("speculative: draft_vocab needs a draft whose last operator is its LM head")
    packed = ops.PackedMatrix(sink.team, len(ids), whole.k, format=whole.format)
    packed.pack(whole.unpack(rows=ids), "f32")
    sink.weights[HEAD] = packed
    # A tied head is the embedding, which is needed whole.
    if sum(getattr(op, "weight", None) == head.weight for op in plan.ops) == 1:
        del sink.weights[head.weight]
    bias = None if head.bias is None else sink.weights.pop(head.bias)
    if isinstance(bias, np.ndarray):
        sink.weights[f"{HEAD}.bias"] = np.ascontiguousarray(bias[ids])
