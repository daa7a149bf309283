"""The plan: one forward pass as a flat list of operators over named activation slots.

`decoder.py` writes a plan, `_ext/plan.c` executes it, `reference.py` interprets it in float64. Nothing here
computes; the dataclasses, here, in `operators.py` and in `expert_operators.py`, are the contract between those
three. A batch is the argument of one step.

Two row sets exist in a step: `tokens` (T rows, every token of the step) and `logits` (R <= T rows, those
whose logits were asked for). `Select` crosses from the first to the second.

Weight names in operators are plan names ("layers.3.qkv"), not checkpoint names. Matrices are [n, k] and are
multiplied as `src @ W.T`. The rows of the weight (and bias) of a *gated* Gemm alternate in blocks of 16: 16
rows of gate, 16 rows of up, and so on, so that both halves of one output live in one kernel panel (see
`gated_rows`). Where the output is no multiple of 16 wide, the last block of each is filled with zero rows.

Heads whose width is no multiple of 16 are padded with zero columns, in weights and slots alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from pace.models.expert_operators import ExpertsIn, ExpertsOut, Route, RouterOrder
from pace.models.operators import (
    GATED_BLOCK,
    Activation,
    Attention,
    Embed,
    Epilogue,
    Gemm,
    Norm,
    NormKind,
    NormScope,
    Permute,
    QKNorm,
    Quantise,
    RopeKV,
    Select,
)
from pace.models.shapes import Blocks, Dtype, KVLayer, PartName, Rows, Slot, SlotShape, WeightShape
from pace.models.weight_formats import WeightFormat

__all__ = [
    "GATED_BLOCK",
    "Activation",
    "Attention",
    "Batch",
    "Bf16Array",
    "Blocks",
    "Dtype",
    "Embed",
    "Epilogue",
    "ExpertsIn",
    "ExpertsOut",
    "F32Array",
    "Gemm",
    "I32Array",
    "KVGroup",
    "KVLayer",
    "Norm",
    "NormKind",
    "NormScope",
    "Op",
    "PartMode",
    "PartName",
    "Permute",
    "Plan",
    "QKNorm",
    "Quantise",
    "Rope",
    "RopeKV",
    "Route",
    "RouterOrder",
    "Rows",
    "Runner",
    "Select",
    "Slot",
    "SlotShape",
    "WeightFormat",
    "WeightShape",
    "gated_rows",
]

Op = Embed | Norm | Gemm | RopeKV | Attention | Select | Quantise | Permute | Route | ExpertsIn | ExpertsOut

PartMode = Literal["rows", "gate", "up"]

F32Array = npt.NDArray[np.float32]
I32Array = npt.NDArray[np.int32]
Bf16Array = npt.NDArray[np.uint16]


@dataclass(frozen=True, slots=True, eq=False)
class Rope:
    """One rotary table: angle[p, i] = f32(p) * inv_freq[i], cos and sin of it times attention_factor.

    Args:
        inv_freq: f32 [rotary_dim / 2].
        attention_factor: multiplies cos and sin (yarn, longrope); 1.0 otherwise.
        interleaved: pairs are (2i, 2i + 1) as in GPT-J; otherwise (i, i + rotary_dim / 2), "rotate half".
        rotary_dim: leading columns of a head that rotate; the rest pass through.
    """

    inv_freq: F32Array
    attention_factor: float
    interleaved: bool
    rotary_dim: int


@dataclass(frozen=True, eq=False)
class Plan:
    """One model's forward pass.

    Args:
        slots: every activation buffer by name.
        ops: operators in order of execution.
        ropes: rotary tables that RopeKV refers to by index.
        kv: the layers that own keys and values.
        logits: name of the f32 slot [R, vocab_size] that holds the result.
        hidden: name of the bf16 slot [R, dim] that holds what the last norm made of the same rows; "": there is none.
    """

    slots: dict[str, Slot]
    ops: tuple[Op, ...]
    ropes: tuple[Rope, ...]
    kv: tuple[KVLayer, ...]
    vocab_size: int
    dim: int
    logits: str
    hidden: str = ""

    @cached_property
    def weights(self) -> Mapping[str, WeightShape]:
        """Every weight that the operators name, with its shape, in order of first use.

        A name used twice (the tied embedding: by Embed and by the LM head's Gemm) appears once.
        """
        found: dict[str, WeightShape] = {}
        for op in self.ops:
            for field, shape in op.needs(self):
                name = getattr(op, field)
                if isinstance(shape, WeightShape) and name is not None:
                    found.setdefault(name, shape)
        return MappingProxyType(found)

    @property
    def kv_width(self) -> int:
        """Keys and values of one token, over all layers and heads."""
        return sum(2 * layer.n_kv_heads * layer.head_dim for layer in self.kv)

    def groups(self) -> tuple[KVGroup, ...]:
        """The layers of `kv` that share a pool and a block table, in order of their first: those that are equal."""
        layers: dict[KVLayer, list[int]] = {}
        for i, layer in enumerate(self.kv):
            layers.setdefault(layer, []).append(i)
        return tuple(KVGroup(layer, tuple(indices)) for layer, indices in layers.items())

    def check(self) -> None:
        """Check every operator against its slots and itself.

        Raises:
            ValueError: it names no slot of the plan, or one of the wrong shape, or contradicts itself.
        """
        for op in self.ops:
            for field in ("src", "dst", "other", "route"):
                name = getattr(op, field, None)
                if name is not None and name not in self.slots:
                    raise ValueError(f"{op.name}: the plan has no slot {name!r}")
            for field, shape in op.needs(self):
                name = getattr(op, field)
                if isinstance(shape, SlotShape) and name is not None:
                    self._check_slot(op, self.slots[name], shape)

    def _check_slot(self, op: Op, slot: Slot, shape: SlotShape) -> None:
        for what in ("width", "dtype", "rows", "times"):
            got, want = getattr(slot, what), getattr(shape, what)
            if want is not None and got != want:
                raise ValueError(f"{op.name}: slot {slot.name} has {what} {got}, expected {want}")


@dataclass(frozen=True, slots=True)
class KVGroup:
    """Layers whose keys and values lie in one pool, block by block under one table.

    Args:
        layer: what each of them is.
        layers: their indices in `Plan.kv`, ascending.
    """

    layer: KVLayer
    layers: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """What one step computes. S sequences, T tokens in all, R rows that need logits.

    Args:
        token_ids: i32 [T], sequence after sequence.
        q_start: i32 [S + 1]; rows q_start[s] .. q_start[s + 1] belong to sequence s.
        kv_len: i32 [S]; cached length *including* this step's tokens, so that row i of sequence s is at
            position kv_len[s] - q_len[s] + i.
        block_tables: one for each of `Plan.groups()`, i32 [S, columns]; table[s, p // block_size] holds position p. With
            a contiguous KV cache i32 [S, 1]: position p is in block table[s, 0] + p // block_size. Only blocks that hold a
            position of the step or one that its first row sees (of the group's reach, then in whole groups of 32) are
            looked at. One array: all layers lie in one pool.
        logit_rows: i32 [R], ascending rows of T.
    """

    token_ids: I32Array
    q_start: I32Array
    kv_len: I32Array
    block_tables: I32Array | tuple[I32Array, ...]
    logit_rows: I32Array

    @property
    def n_tokens(self) -> int:
        """T, the rows of this step."""
        return len(self.token_ids)

    @property
    def n_seqs(self) -> int:
        """S, the sequences of this step."""
        return len(self.kv_len)

    @property
    def tables(self) -> tuple[I32Array, ...]:
        """The block tables, one for each group."""
        return self.block_tables if isinstance(self.block_tables, tuple) else (self.block_tables,)

    def positions(self) -> I32Array:
        """Position of every row in its sequence: i32 [T]."""
        q_len = np.diff(self.q_start)
        first = self.kv_len - q_len
        within = np.arange(self.n_tokens, dtype=np.int32) - np.repeat(self.q_start[:-1], q_len)
        return (np.repeat(first, q_len) + within).astype(np.int32)


class Runner(Protocol):
    """Anything that executes a plan: the compiled executor or the reference."""

    def step(self, batch: Batch) -> F32Array:
        """Run one step; f32 [R, vocab_size], a view that is valid until the next step."""
        ...


class Executor(Runner, Protocol):
    """A runner that keeps few logits at a time: `step` returns the first ones of a batch that asks for many."""

    def logits_from(self, first: int) -> F32Array:
        """Those of the last step's logit rows from `first` on, as many as it keeps; they overwrite the last ones."""
        ...

    def hidden(self) -> Bf16Array:
        """bf16 as u16 [R, dim]: what the last norm made of all logit rows of the last step; valid until the next."""
        ...


def gated_rows(n: int, mode: PartMode) -> npt.NDArray[np.int64]:
    """Rows of a fused weight that the n source rows of one part fill, relative to the part's offset.

    rows: 0 .. n - 1.  gate: (i // 16) * 32 + i % 16.  up: 16 further.
    """
    i = np.arange(n, dtype=np.int64)
    if mode == "rows":
        return i
    return (i // GATED_BLOCK) * (2 * GATED_BLOCK) + i % GATED_BLOCK + (GATED_BLOCK if mode == "up" else 0)
