"""What operators of a plan read and write: activations, keys and values, weights, each as a shape with a name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pace.models.weight_formats import WeightFormat

Dtype = Literal["f32", "bf16", "int8"]
Rows = Literal["tokens", "logits"]
PartName = Literal["all", "q", "k", "v", "gate", "up"]


@dataclass(frozen=True, slots=True)
class Slot:
    """One activation buffer of the arena: [rows, width].

    Args:
        name: unique within the plan.
        width: columns (elements).
        dtype: "f32", "bf16", or "int8": integers and scales, width a multiple of 32. The reference in exact mode keeps all
            in float64.
        rows: "tokens" (T rows) or "logits" (R rows).
        times: rows for each of those: one for each expert that a row takes.
        group: of int8, columns of a row that share a scale: 16, 32, 64, 128, or 0 for all.
    """

    name: str
    width: int
    dtype: Dtype
    rows: Rows
    times: int = 1
    group: int = 32


@dataclass(frozen=True, slots=True)
class KVLayer:
    """One layer that owns keys and values; its index in `Plan.kv` is what operators call it by.

    Args:
        n_kv_heads: heads of keys, and of values.
        head_dim: columns of a head, padding included: a multiple of 16 up to 512.
        reach: tokens that a query sees at most, its own included (the window or the chunk of the layer's readers);
            None: all of them.
    """

    n_kv_heads: int
    head_dim: int
    reach: int | None = None


@dataclass(frozen=True, slots=True)
class Blocks:
    """Rows (or columns) of a weight: `count` blocks of `width`, each followed by zeros up to `filled`.

    Args:
        part: what they are; several make up a fused weight, in their order.
        count: heads, or 1.
        width: of a block in the checkpoint.
        filled: of a block in the plan.
    """

    part: PartName
    count: int
    width: int
    filled: int

    @property
    def n(self) -> int:
        """Rows in the plan."""
        return self.count * self.filled


@dataclass(frozen=True, slots=True)
class SlotShape:
    """What an operator needs of a slot; None: anything."""

    width: int | None = None
    dtype: Dtype | None = None
    rows: Rows | None = None
    times: int = 1


@dataclass(frozen=True, slots=True)
class WeightShape:
    """What an operator needs under a weight name: a matrix [n, k], or a vector [n] when k is None.

    Args:
        blocks: of the rows; several where the weight is fused.
        columns: None where they are as the checkpoint has them.
        mapped: a table whose rows are read where the checkpoint file has them.
        count: of such matrices or vectors, those of a layer's experts.
        format: of the matrix in memory.
        by_group: the matrix' columns stand in the order of the groups that share a scale in the checkpoint.
        order_of: the vector is the order of that matrix' columns.
    """

    n: int
    k: int | None = None
    blocks: tuple[Blocks, ...] = ()
    columns: Blocks | None = None
    mapped: bool = False
    count: int = 1
    format: WeightFormat = "bf16"
    by_group: bool = False
    order_of: str | None = None
