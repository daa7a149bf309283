"""The operators of a plan, with what each needs of its slots and weights; those of experts are in `expert_operators.py`.

A class here and a struct in `_ext/kernels.h` describe one operator to the two sides of the language border; their fields
have the same names, and the struct is filled from them without a line for any one operator. `needs` is the one place
that knows which shapes fit: weights are loaded by it and plans are checked by it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from pace.models.shapes import Blocks, KVLayer, SlotShape, WeightShape
from pace.models.weight_formats import WeightFormat

if TYPE_CHECKING:
    from pace.models.plan import Plan

NormKind = Literal["rms", "rms1", "layer", "none"]
QKNorm = Literal["none", "rms", "rms1", "layer"]
NormScope = Literal["head", "head_own", "full"]
Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2", "quick_gelu", "sigmoid"]
Epilogue = Literal["store", "add", "gated", "mul"]
GATED_BLOCK = 16
"""Rows of gate that are followed by as many rows of up in the weight of a gated Gemm."""

MAX_HEAD_DIM = 512
"""Columns of the widest head that the attention kernels hold."""

MAX_QUERY_GROUP = 64
"""Query heads per kv head: the rows of an attention tile."""

Needs = Iterator[tuple[str, SlotShape | WeightShape]]
"""(field, what it must name) for every field that names a slot or a weight and is not None."""


def require(holds: bool, text: str) -> None:
    """ValueError of this text where an operator does not fit its slots and weights."""
    if not holds:
        raise ValueError(text)


@dataclass(frozen=True, slots=True)
class Embed:
    """dst[t] = post * (scale * table[token_ids[t]] + positions[offset + position[t]]); with `add`, post * (dst + ...).

    Args:
        dst: slot [T, dim], f32 or bf16; f32 when `add`.
        weight: matrix [vocab_size, dim], or None for learned positions alone.
        positions: matrix [n_positions, dim], or None.
        n_positions: rows of `positions`, those before `offset` included.
        offset: row of `positions` that stands for position 0.
        mapped: the table's rows are read from the checkpoint file where they stand; it is never packed.
        format: of `weight` in memory.
    """

    operator: ClassVar[str] = "embed"

    name: str
    dst: str
    weight: str | None
    scale: float = 1.0
    positions: str | None = None
    n_positions: int = 0
    offset: int = 0
    add: bool = False
    post: float = 1.0
    mapped: bool = False
    format: WeightFormat = "bf16"

    def needs(self, plan: Plan) -> Needs:
        """See `Needs`."""
        dim = plan.slots[self.dst].width
        require(self.weight is not None or self.positions is not None, f"{self.name} names no table")
        yield "dst", SlotShape(dtype="f32" if self.add else None, rows="tokens")
        yield "weight", WeightShape(plan.vocab_size, dim, mapped=self.mapped, format=self.format)
        yield "positions", WeightShape(self.n_positions, dim)


@dataclass(frozen=True, slots=True)
class Norm:
    """dst = s * norm(src); with `add`, dst = s * (dst + norm(src)). src and dst may be one slot.

    Statistics are per row, over each of `groups` equal ranges of columns by itself.

    rms: x / sqrt(mean(x^2) + eps) * w.  rms1: the same with (1 + w).
    layer: (x - mean) / sqrt(var + eps) * w + bias.
    none: x, so that a Gemm can read an f32 slot.

    Args:
        src: f32 slot.
        dst: f32 or bf16 slot of the same width; f32 when `add`.
        weight: vector [width / groups], shared by the groups, or None for 1 (rms and layer).
        bias: vector [width / groups] or None (layer only).
        scale: vector [1], s above; None: 1.
    """

    operator: ClassVar[str] = "norm"

    name: str
    src: str
    dst: str
    weight: str | None
    bias: str | None = None
    kind: NormKind = "rms"
    eps: float = 1e-6
    add: bool = False
    groups: int = 1
    scale: str | None = None

    def needs(self, plan: Plan) -> Needs:
        """See `Needs`."""
        src = plan.slots[self.src]
        require(
            self.groups >= 1 and src.width % self.groups == 0,
            f"{self.name}: {self.groups} groups of {src.width}",
        )
        require(
            self.bias is None or self.kind == "layer", f"{self.name}: a norm of kind {self.kind} with a bias"
        )
        yield "src", SlotShape(dtype="f32")
        yield "dst", SlotShape(src.width, "f32" if self.add else None, src.rows)
        yield "weight", WeightShape(src.width // self.groups)
        yield "bias", WeightShape(src.width // self.groups)
        yield "scale", WeightShape(1)


@dataclass(frozen=True, slots=True)
class Gemm:
    """y = src @ W.T + bias, then the epilogue.

    store: dst = scale * act(y), through cap * tanh(. / cap) when given.
    add: dst += scale * y (dst f32), each row times other[:, at] where there is such a slot.
    gated: dst = act(gate) * up; W holds gate and up in alternating blocks of 16 rows, dst is half as wide.
    mul: dst = scale * act(y) * other[:, at : at + n].

    Args:
        src: bf16 slot [rows, k], or an int8 one where the weight is MXFP4.
        dst: slot [rows, n], or [rows, n / 2] when gated.
        weight: matrix [n, k].
        bias: vector [n] (same row order as the weight) or None.
        other: f32 slot of the same rows, at least at + n wide (mul), or at + 1 (add).
        blocks: of the weight's rows, where they are fused or padded; () where they are as the checkpoint has them.
        columns: the same of its columns.
        format: of the weight in memory.
        by_group: the weight's columns stand in another order, in which `Permute` has put those of src.
    """

    operator: ClassVar[str] = "gemm"

    name: str
    src: str
    dst: str
    weight: str
    bias: str | None = None
    epilogue: Epilogue = "store"
    act: Activation | None = None
    scale: float = 1.0
    cap: float | None = None
    other: str | None = None
    at: int = 0
    blocks: tuple[Blocks, ...] = ()
    columns: Blocks | None = None
    format: WeightFormat = "bf16"
    by_group: bool = False

    def needs(self, plan: Plan) -> Needs:
        """See `Needs`."""
        src, width = plan.slots[self.src], plan.slots[self.dst].width
        require(self.epilogue == "store" or self.cap is None, f"{self.name}: cap with {self.epilogue}")
        require(self.epilogue != "add" or self.act is None, f"{self.name}: activation with add")
        require(
            self.epilogue == "add" or (self.other is not None) == (self.epilogue == "mul"),
            f"{self.name}: other belongs to mul and add",
        )
        if self.other is not None:
            other, read = plan.slots[self.other].width, 1 if self.epilogue == "add" else width
            require(
                0 <= self.at <= other - read,
                f"{self.name}: columns {self.at} to {self.at + read} of {other}",
            )
        blocks = self.blocks or (Blocks("all", 1, width, width),)
        if self.epilogue == "gated" and not self.blocks:
            filled = -(-width // GATED_BLOCK) * GATED_BLOCK
            blocks = Blocks("gate", 1, width, filled), Blocks("up", 1, width, filled)
        n = sum(block.n for block in blocks)
        require(
            self.epilogue == "gated" or n == width, f"{self.name}: blocks of {n} rows for a slot of {width}"
        )
        yield "src", SlotShape(dtype="int8" if src.dtype == "int8" else "bf16")
        yield "dst", SlotShape(dtype="f32" if self.epilogue == "add" else None, rows=src.rows)
        yield "other", SlotShape(dtype="f32", rows=src.rows)
        yield (
            "weight",
            WeightShape(n, src.width, blocks, self.columns, format=self.format, by_group=self.by_group),
        )
        yield "bias", WeightShape(n, blocks=blocks)


@dataclass(frozen=True, slots=True)
class RopeKV:
    """Normalise (optional) and rotate the heads of q and k, keep q, append k and v to the KV cache.

    Args:
        src: f32 slot [T, (n_heads + 2 * n_kv_heads) * head_dim], columns q | k | v; q | k when `k_is_v`, q alone
            unless `append`.
        dst: bf16 slot [T, n_heads * head_dim].
        kv: index into `Plan.kv` of the layer whose heads these are.
        rope: index into `Plan.ropes`, or None for no rotation.
        append: False: the keys and values are another operator's; nothing is stored.
        k_is_v: v is the k of `src`, before norm and rotation.
        qk_norm: norm of q and k.
        q_norm, k_norm: its weights, or None for 1; [head_dim], or [heads * head_dim] where the scope isn't "head".
        norm_scope: "head": each head by itself with one weight; "head_own": each with its own; "full": statistics
            over all heads of q, and of k.
        norm_width: leading columns of a head that count in the statistics, those before padding; None: head_dim.
        norm_after_rope: rotate first.
        v_norm: weightless RMS norm of each head of v, with norm_eps.
        temperature: (scale, floor, offset): q *= 1 + scale * log(1 + floor((position + offset) / floor)), after norm
            and rotation.
    """

    operator: ClassVar[str] = "rope"

    name: str
    src: str
    dst: str
    n_heads: int
    kv: int
    rope: int | None = None
    append: bool = True
    k_is_v: bool = False
    qk_norm: QKNorm = "none"
    q_norm: str | None = None
    k_norm: str | None = None
    norm_scope: NormScope = "head"
    norm_eps: float = 0.0
    norm_width: int | None = None
    norm_after_rope: bool = False
    v_norm: bool = False
    temperature: tuple[float, float, float] | None = None

    def needs(self, plan: Plan) -> Needs:
        """See `Needs`."""
        kv = _kv_of(self, plan)
        rows = plan.slots[self.dst].rows
        require(not self.append or rows == "tokens", f"{self.name} appends only some rows")
        if self.rope is not None:
            require(0 <= self.rope < len(plan.ropes), f"{self.name}: rope {self.rope} of {len(plan.ropes)}")
            rotary_dim = plan.ropes[self.rope].rotary_dim
            require(
                0 < rotary_dim <= kv.head_dim and rotary_dim % 2 == 0,
                f"{self.name}: {rotary_dim} columns of {kv.head_dim} rotate",
            )
        width = kv.head_dim if self.norm_width is None else self.norm_width
        require(1 <= width <= kv.head_dim, f"{self.name}: norm_width {width} of {kv.head_dim}")
        require(
            self.qk_norm != "none" or (self.q_norm is None and self.k_norm is None),
            f"{self.name}: weights of a norm that it doesn't have",
        )
        heads = self.n_heads + kv.n_kv_heads * (0 if not self.append else 1 if self.k_is_v else 2)
        q, k = (1, 1) if self.norm_scope == "head" else (self.n_heads, kv.n_kv_heads)
        yield "src", SlotShape(heads * kv.head_dim, "f32", rows)
        yield "dst", SlotShape(self.n_heads * kv.head_dim, "bf16")
        for field, count in (("q_norm", q), ("k_norm", k)):
            block = Blocks("all", count, width, kv.head_dim)
            yield field, WeightShape(block.n, blocks=(block,))


@dataclass(frozen=True, slots=True)
class Attention:
    """Causal attention of q over the KV cache of a layer.

    A query at position p sees positions max(0, p - window + 1) .. p, and of those only the ones of its own chunk: k
    with k // chunk == p // chunk. Scores are scale * q.k, passed through softcap * tanh(score / softcap) when given;
    `sinks` adds one logit per query head to the softmax's denominator.

    Args:
        src: bf16 slot [T, n_heads * head_dim].
        dst: bf16 slot [T, n_heads * head_dim].
        kv: index into `Plan.kv`.
        sinks: vector [n_heads] or None.
    """

    operator: ClassVar[str] = "attention"

    name: str
    src: str
    dst: str
    n_heads: int
    kv: int
    scale: float
    window: int | None = None
    chunk: int | None = None
    softcap: float | None = None
    sinks: str | None = None

    def needs(self, plan: Plan) -> Needs:
        """See `Needs`."""
        kv = _kv_of(self, plan)
        limits = [n for n in (self.window, self.chunk) if n is not None]
        require(all(n >= 1 for n in limits), f"{self.name}: window {self.window}, chunk {self.chunk}")
        require(
            kv.reach is None or (bool(limits) and min(limits) <= kv.reach),
            f"{self.name} sees more than the {kv.reach} tokens that layer {self.kv} keeps",
        )
        width = self.n_heads * kv.head_dim
        yield "src", SlotShape(width, "bf16")
        yield "dst", SlotShape(width, "bf16", plan.slots[self.src].rows)
        yield "sinks", WeightShape(self.n_heads)


@dataclass(frozen=True, slots=True)
class Select:
    """dst[i] = src[logit_rows[i]]: src has rows="tokens", dst rows="logits", both of one width and dtype."""

    operator: ClassVar[str] = "select"

    name: str
    src: str
    dst: str

    def needs(self, plan: Plan) -> Needs:
        """See `Needs`."""
        src = plan.slots[self.src]
        yield "src", SlotShape(rows="tokens")
        yield "dst", SlotShape(src.width, src.dtype, "logits")


@dataclass(frozen=True, slots=True)
class Quantise:
    """dst = src in int8: of each row and group of columns the scale amax / 127, and x / scale to the nearest integer.

    Args:
        src: bf16 slot.
        dst: int8 slot of the same width and rows.
        times: that of both slots.
    """

    operator: ClassVar[str] = "quantise"

    name: str
    src: str
    dst: str
    times: int = 1

    def needs(self, plan: Plan) -> Needs:
        """See `Needs`."""
        src = plan.slots[self.src]
        yield "src", SlotShape(dtype="bf16", times=self.times)
        yield "dst", SlotShape(src.width, "int8", src.rows, self.times)


@dataclass(frozen=True, slots=True)
class Permute:
    """dst[r, i] = src[r, order[i]]: columns as a matrix has them whose groups are no neighbours in the checkpoint.

    Args:
        src: bf16 slot.
        dst: bf16 slot of the same width and rows.
        order: vector [width]: every column once.
        matrix: the weight that has this order.
        columns: of the matrix in the order of the checkpoint, as of `Gemm`.
    """

    operator: ClassVar[str] = "permute"

    name: str
    src: str
    dst: str
    order: str
    matrix: str
    columns: Blocks | None = None

    def needs(self, plan: Plan) -> Needs:
        """See `Needs`."""
        src = plan.slots[self.src]
        yield "src", SlotShape(dtype="bf16")
        yield "dst", SlotShape(src.width, "bf16", src.rows)
        yield "order", WeightShape(src.width, columns=self.columns, order_of=self.matrix)


def _kv_of(op: RopeKV | Attention, plan: Plan) -> KVLayer:
    """The layer whose keys and values an operator works with, after a check that its heads fit."""
    require(0 <= op.kv < len(plan.kv), f"{op.name}: layer {op.kv} of {len(plan.kv)}")
    kv = plan.kv[op.kv]
    require(
        kv.head_dim % 16 == 0 and 16 <= kv.head_dim <= MAX_HEAD_DIM,
        f"{op.name}: head_dim is {kv.head_dim}, expected a multiple of 16 up to {MAX_HEAD_DIM}",
    )
    group, rest = divmod(op.n_heads, kv.n_kv_heads) if kv.n_kv_heads >= 1 else (0, 0)
    require(
        rest == 0 and 1 <= group <= MAX_QUERY_GROUP,
        f"{op.name}: {op.n_heads} query heads over {kv.n_kv_heads} kv heads, expected 1 to {MAX_QUERY_GROUP} times as many",
    )
    return kv
