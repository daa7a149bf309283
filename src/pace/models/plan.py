"""The plan: one forward pass as a flat list of operators over named activation slots.

`decoder.py` writes a plan, `_ext/plan.c` executes it, `reference.py` interprets it in float64. Nothing here
computes; the dataclasses are the contract between those three. A batch is the argument of one step.

Two row sets exist in a step: `tokens` (T rows, every token of the step) and `logits` (R <= T rows, those
whose logits were asked for). `Select` crosses from the first to the second.

Weight names in operators are plan names ("layers.3.qkv"), not checkpoint names. Matrices are [n, k] and are
multiplied as `src @ W.T`. The rows of the weight (and bias) of a *gated* Gemm alternate in blocks of 16: 16
rows of gate, 16 rows of up, and so on, so that both halves of one output live in one kernel panel (see
`gated_rows`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

Dtype = Literal["f32", "bf16"]
Rows = Literal["tokens", "logits"]
NormKind = Literal["rms", "rms1", "layer"]
Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
Epilogue = Literal["store", "add", "gated"]
PartMode = Literal["rows", "gate", "up"]

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
class Embed:
    """dst[t] = scale * table[token_ids[t]] (+ positions[offset + position[t]] for learned positions).

    Args:
        dst: f32 slot [T, dim].
        weight: matrix [vocab_size, dim].
        positions: matrix [n_positions + offset, dim], or None.
        offset: first row of `positions` that stands for position 0.
    """

    name: str
    dst: str
    weight: str
    scale: float = 1.0
    positions: str | None = None
    offset: int = 0


@dataclass(frozen=True, slots=True)
class Norm:
    """dst = norm(src) or, with `add`, dst += norm(src); per row over the whole width.

    rms: x / sqrt(mean(x^2) + eps) * w.  rms1: the same with (1 + w).
    layer: (x - mean) / sqrt(var + eps) * w + bias.

    Args:
        src: f32 slot.
        dst: f32 or bf16 slot of the same width; f32 when `add`.
        weight: vector [width].
        bias: vector [width] or None (layer only).
    """

    name: str
    src: str
    dst: str
    weight: str
    bias: str | None = None
    kind: NormKind = "rms"
    eps: float = 1e-6
    add: bool = False


@dataclass(frozen=True, slots=True)
class Gemm:
    """y = src @ W.T + bias, then the epilogue.

    store: dst = scale * act(y).  add: dst += scale * y (dst f32).
    gated: dst = act(gate) * up; W holds gate and up in alternating blocks of 16 rows, dst is half as wide.

    Args:
        src: bf16 slot [rows, k].
        dst: slot [rows, n], or [rows, n / 2] when gated.
        weight: matrix [n, k].
        bias: vector [n] (same row order as the weight) or None.
    """

    name: str
    src: str
    dst: str
    weight: str
    bias: str | None = None
    epilogue: Epilogue = "store"
    act: Activation | None = None
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class RopeKV:
    """Normalise (optional) and rotate the heads of q and k, keep q, append k and v to the KV cache.

    Args:
        src: f32 slot [T, (n_heads + 2 * n_kv_heads) * head_dim], columns q | k | v.
        dst: bf16 slot [T, n_heads * head_dim].
        layer: KV cache layer.
        rope: index into `Plan.ropes`, or None for no rotation.
        q_norm: vector [head_dim] applied to each query head before the rotation, or None.
        k_norm: the same for key heads.
    """

    name: str
    src: str
    dst: str
    layer: int
    rope: int | None
    q_norm: str | None = None
    k_norm: str | None = None
    norm_kind: NormKind = "rms"
    norm_eps: float = 0.0


@dataclass(frozen=True, slots=True)
class Attention:
    """Causal attention of q over the KV cache of `layer`.

    A query at position p sees positions max(0, p - window + 1) .. p. Scores are scale * q.k, passed through
    softcap * tanh(score / softcap) when given; `sinks` adds one logit per query head to the softmax's
    denominator.

    Args:
        src: bf16 slot [T, n_heads * head_dim].
        dst: bf16 slot [T, n_heads * head_dim].
        sinks: vector [n_heads] or None.
    """

    name: str
    src: str
    dst: str
    layer: int
    scale: float
    window: int | None = None
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
    """What an operator needs under a weight name: a matrix [n, k], or a vector [n] when k is None."""

    n: int
    k: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """One model's forward pass.

    Args:
        slots: every activation buffer by name.
        ops: operators in order of execution.
        ropes: rotary tables that RopeKV refers to by index.
        n_layers: KV cache layers.
        logits: name of the f32 slot [R, vocab_size] that holds the result.
    """

    slots: dict[str, Slot]
    ops: tuple[Op, ...]
    ropes: tuple[Rope, ...]
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    vocab_size: int
    dim: int
    logits: str

    def weights(self) -> dict[str, WeightShape]:
        """Every weight that the operators name, with its shape, in order of first use.

        A name used twice (the tied embedding: by Embed and by the LM head's Gemm) appears once.
        """
        found: dict[str, WeightShape] = {}
        for op in self.ops:
            if isinstance(op, Embed):
                # Learned positions get their row count when a family that has them is added.
                found.setdefault(op.weight, WeightShape(self.vocab_size, self.slots[op.dst].width))
            elif isinstance(op, Norm):
                for name in (op.weight, op.bias):
                    if name is not None:
                        found.setdefault(name, WeightShape(self.slots[op.src].width))
            elif isinstance(op, Gemm):
                n = self.slots[op.dst].width * (2 if op.epilogue == "gated" else 1)
                found.setdefault(op.weight, WeightShape(n, self.slots[op.src].width))
                if op.bias is not None:
                    found.setdefault(op.bias, WeightShape(n))
            elif isinstance(op, RopeKV):
                for name in (op.q_norm, op.k_norm):
                    if name is not None:
                        found.setdefault(name, WeightShape(self.head_dim))
            elif isinstance(op, Attention) and op.sinks is not None:
                found.setdefault(op.sinks, WeightShape(self.n_heads))
        return found


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
