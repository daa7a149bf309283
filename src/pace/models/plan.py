"""The plan: one forward pass as a flat list of operators over named activation slots.

`decoder.py` writes a plan, `_ext/plan.c` executes it, `reference.py` interprets it in float64. Nothing here
computes; the dataclasses are the contract between those three. A batch is the argument of one step.

Two row sets exist in a step: `tokens` (T rows, every token of the step) and `logits` (R <= T rows, those
whose logits were asked for). `Select` crosses from the first to the second.

Weight names in operators are plan names ("layers.3.qkv"), not checkpoint names. Matrices are [n, k] and are
multiplied as `src @ W.T`. The rows of the weight (and bias) of a *gated* Gemm alternate in blocks of 16: 16
rows of gate, 16 rows of up, and so on, so that both halves of one output live in one kernel panel (see
`gated_rows`). Where the output is no multiple of 16 wide, the last block of each is filled with zero rows.

Heads whose width is no multiple of 16 are padded with zero columns, in weights and slots alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

Dtype = Literal["f32", "bf16"]
Rows = Literal["tokens", "logits"]
NormKind = Literal["rms", "rms1", "layer", "none"]
QKNorm = Literal["none", "rms", "rms1", "layer"]
NormScope = Literal["head", "head_own", "full"]
Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2", "quick_gelu"]
Epilogue = Literal["store", "add", "gated", "mul"]
PartMode = Literal["rows", "gate", "up"]
PartName = Literal["all", "q", "k", "v", "gate", "up"]

GATED_BLOCK = 16
"""Rows of gate that are followed by as many rows of up in the weight of a gated Gemm."""

F32Array = npt.NDArray[np.float32]
I32Array = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Slot:
    """One activation buffer of the arena: [rows, width].

    Args:
        name: unique within the plan.
        width: columns (elements).
        dtype: "f32" or "bf16"; the reference in exact mode keeps both in float64.
        rows: "tokens" (T rows) or "logits" (R rows).
    """

    name: str
    width: int
    dtype: Dtype
    rows: Rows


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
class Embed:
    """dst[t] = post * (scale * table[token_ids[t]] + positions[offset + position[t]]); with `add`, post * (dst + ...).

    Args:
        dst: slot [T, dim], f32 or bf16; f32 when `add`.
        weight: matrix [vocab_size, dim], or None for learned positions alone.
        positions: matrix [n_positions, dim], or None.
        n_positions: rows of `positions`, those before `offset` included.
        offset: row of `positions` that stands for position 0.
        mapped: the table's rows are read from the checkpoint file where they stand; it is never packed.
    """

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


@dataclass(frozen=True, slots=True)
class Gemm:
    """y = src @ W.T + bias, then the epilogue.

    store: dst = scale * act(y), through cap * tanh(. / cap) when given.
    add: dst += scale * y (dst f32).
    gated: dst = act(gate) * up; W holds gate and up in alternating blocks of 16 rows, dst is half as wide.
    mul: dst = scale * act(y) * other[:, at : at + n].

    Args:
        src: bf16 slot [rows, k].
        dst: slot [rows, n], or [rows, n / 2] when gated.
        weight: matrix [n, k].
        bias: vector [n] (same row order as the weight) or None.
        other: f32 slot of the same rows, at least at + n wide (mul only).
        blocks: of the weight's rows, where they are fused or padded; () where they are as the checkpoint has them.
        columns: the same of its columns.
    """

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


@dataclass(frozen=True, slots=True)
class Select:
    """dst[i] = src[logit_rows[i]]: src has rows="tokens", dst rows="logits", both of one width and dtype."""

    name: str
    src: str
    dst: str


Op = Embed | Norm | Gemm | RopeKV | Attention | Select


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


@dataclass(frozen=True, slots=True)
class WeightShape:
    """What an operator needs under a weight name: a matrix [n, k], or a vector [n] when k is None.

    Args:
        blocks: of the rows; several where the weight is fused.
        columns: None where they are as the checkpoint has them.
        mapped: a table whose rows are read where the checkpoint file has them.
    """

    n: int
    k: int | None = None
    blocks: tuple[Blocks, ...] = ()
    columns: Blocks | None = None
    mapped: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """One model's forward pass.

    Args:
        slots: every activation buffer by name.
        ops: operators in order of execution.
        ropes: rotary tables that RopeKV refers to by index.
        kv: the layers that own keys and values.
        logits: name of the f32 slot [R, vocab_size] that holds the result.
    """

    slots: dict[str, Slot]
    ops: tuple[Op, ...]
    ropes: tuple[Rope, ...]
    kv: tuple[KVLayer, ...]
    vocab_size: int
    dim: int
    logits: str

    def weights(self) -> dict[str, WeightShape]:
        """Every weight that the operators name, with its shape, in order of first use.

        A name used twice (the tied embedding: by Embed and by the LM head's Gemm) appears once.
        """
        found: dict[str, WeightShape] = {}
        for op in self.ops:
            for name, shape in self._weights_of(op):
                if name is not None:
                    found.setdefault(name, shape)
        return found

    def _weights_of(self, op: Op) -> Iterator[tuple[str | None, WeightShape]]:
        """Weights of an operator; a name of None stands for one that it does without."""
        if isinstance(op, Embed):
            dim = self.slots[op.dst].width
            yield op.weight, WeightShape(self.vocab_size, dim, mapped=op.mapped)
            yield op.positions, WeightShape(op.n_positions, dim)
        elif isinstance(op, Norm):
            width = self.slots[op.src].width // op.groups
            yield from ((name, WeightShape(width)) for name in (op.weight, op.bias))
            yield op.scale, WeightShape(1)
        elif isinstance(op, Gemm):
            blocks = self._gemm_blocks(op)
            n = sum(block.n for block in blocks)
            yield op.weight, WeightShape(n, self.slots[op.src].width, blocks, op.columns)
            yield op.bias, WeightShape(n, blocks=blocks)
        elif isinstance(op, RopeKV):
            kv = self.kv[op.kv]
            q, k = (1, 1) if op.norm_scope == "head" else (op.n_heads, kv.n_kv_heads)
            for name, count in ((op.q_norm, q), (op.k_norm, k)):
                block = Blocks("all", count, op.norm_width or kv.head_dim, kv.head_dim)
                yield name, WeightShape(block.n, blocks=(block,))
        elif isinstance(op, Attention):
            yield op.sinks, WeightShape(op.n_heads)

    def _gemm_blocks(self, op: Gemm) -> tuple[Blocks, ...]:
        width = self.slots[op.dst].width
        if op.epilogue == "gated":
            filled = -(-width // GATED_BLOCK) * GATED_BLOCK
            return Blocks("gate", 1, width, filled), Blocks("up", 1, width, filled)
        return op.blocks or (Blocks("all", 1, width, width),)


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """What one step computes. S sequences, T tokens in all, R rows that need logits.

    Args:
        token_ids: i32 [T], sequence after sequence.
        q_start: i32 [S + 1]; rows q_start[s] .. q_start[s + 1] belong to sequence s.
        kv_len: i32 [S]; cached length *including* this step's tokens, so that row i of sequence s is at
            position kv_len[s] - q_len[s] + i.
        block_tables: i32 [S, max_blocks]; block_tables[s, p // block_size] holds position p. With a contiguous
            KV cache i32 [S, 1]: position p is in block block_tables[s, 0] + p // block_size.
        logit_rows: i32 [R], ascending rows of T.
    """

    token_ids: I32Array
    q_start: I32Array
    kv_len: I32Array
    block_tables: I32Array
    logit_rows: I32Array

    @property
    def n_tokens(self) -> int:
        """T, the rows of this step."""
        return len(self.token_ids)

    @property
    def n_seqs(self) -> int:
        """S, the sequences of this step."""
        return len(self.kv_len)

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


def gated_rows(n: int, mode: PartMode) -> npt.NDArray[np.int64]:
    """Rows of a fused weight that the n source rows of one part fill, relative to the part's offset.

    rows: 0 .. n - 1.  gate: (i // 16) * 32 + i % 16.  up: 16 further.
    """
    i = np.arange(n, dtype=np.int64)
    if mode == "rows":
        return i
    return (i // GATED_BLOCK) * (2 * GATED_BLOCK) + i % GATED_BLOCK + (GATED_BLOCK if mode == "up" else 0)
