"""The oracle: a plan interpreted operator by operator in numpy.

In exact mode (rounding=None) everything is float64 and nothing is rounded: the answer that transformers in
float32 approximates. With rounding="bf16" values are rounded where the kernels round them (Gemm inputs, q, k,
v and the softmax's weights before they meet v), so that a kernel can be compared operator by operator with a
tolerance of a few units of float32 accumulation instead of bf16's 2^-9. An int8 KV cache is quantised in either
mode, for that is what the cache holds.

Shapes: T tokens and R logit rows of the step, D = head_dim, H = n_heads, G = n_kv_heads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from pace.models.plan import (
    GATED_BLOCK,
    Activation,
    Attention,
    Batch,
    Embed,
    Gemm,
    I32Array,
    Norm,
    NormKind,
    Plan,
    Rope,
    RopeKV,
    Select,
)

Array = npt.NDArray[Any]


class Reference:
    """Runs a plan on plain arrays, with a KV cache addressed through block tables like the engine's.

    Args:
        plan: the forward pass.
        weights: plan weight name -> [n, k] matrix or [n] vector (see `weights.DenseSink`).
        n_blocks, block_size: of the KV cache, per layer.
        kv_dtype, contiguous: as of `ops.KVPool`; "bf16" is exact unless `rounding` says otherwise.
        dtype: of the arithmetic.
        rounding: None for exact arithmetic, "bf16" for the kernels' rounding points.
        trace: keep every slot after every operator in `self.trace`.
    """

    def __init__(
        self,
        plan: Plan,
        weights: Mapping[str, Array],
        n_blocks: int,
        block_size: int,
        dtype: type[np.floating[Any]] = np.float64,
        rounding: Literal["bf16"] | None = None,
        trace: bool = False,
        kv_dtype: Literal["bf16", "int8"] = "bf16",
        contiguous: bool = False,
    ) -> None:
        self.plan = plan
        self.dtype = dtype
        self.rounding = rounding
        self.block_size = block_size
        self.kv_dtype = kv_dtype
        self.contiguous = contiguous
        # The packed engine stores matrices in bf16; vectors stay float32 there.
        self.weights = {
            name: self._round(np.asarray(value, dtype)) if value.ndim == 2 else np.asarray(value, dtype)
            for name, value in weights.items()
        }
        shape = (plan.n_layers, n_blocks * block_size, plan.n_kv_heads, plan.head_dim)
        # NaN where nothing was written: reading a cell too many shows at once.
        self.k = np.full(shape, np.nan, dtype)  # [n_layers, n_blocks * block_size, G, D]
        self.v = np.full(shape, np.nan, dtype)  # integers with int8, which v_scale makes values
        self.v_scale = np.full((*shape[:-1], 1), np.nan, dtype)  # 1 with bf16
        self.trace: dict[str, dict[str, Array]] | None = {} if trace else None
        """Operator name -> slot name -> value after it; RopeKV adds "k" and "v": [T, G, D] as appended."""
        self._slots: dict[str, Array] = {}

    def step(self, batch: Batch) -> Array:
        """Run one step; returns logits [R, vocab_size] in `dtype`."""
        self._slots = {}
        for op in self.plan.ops:
            extra: dict[str, Array] = {}
            if isinstance(op, Embed):
                self._embed(op, batch)
            elif isinstance(op, Norm):
                self._norm(op)
            elif isinstance(op, Gemm):
                self._gemm(op)
            elif isinstance(op, RopeKV):
                extra = self._rope_kv(op, batch)
            elif isinstance(op, Attention):
                self._attention(op, batch)
            else:
                self._select(op, batch)
            if self.trace is not None:
                # Operators build new arrays and never write into old ones, so references are enough.
                self.trace[op.name] = {**self._slots, **extra}
        return self._slots[self.plan.logits]

    def _embed(self, op: Embed, batch: Batch) -> None:
        x = op.scale * self.weights[op.weight][batch.token_ids]  # [T, dim]
        if op.positions is not None:
            x = x + self.weights[op.positions][batch.positions() + op.offset]
        self._store(op.dst, x)

    def _norm(self, op: Norm) -> None:
        bias = None if op.bias is None else self.weights[op.bias]
        y = norm(self._slots[op.src], self.weights[op.weight], bias, op.kind, op.eps)
        self._store(op.dst, self._slots[op.dst] + y if op.add else y)

    def _gemm(self, op: Gemm) -> None:
        y = self._slots[op.src] @ self.weights[op.weight].T  # [rows, n]
        if op.bias is not None:
            y = y + self.weights[op.bias]
        if op.epilogue == "gated":
            gate, up = split_gated(y)
            self._store(op.dst, activate(gate, op.act) * up)
        elif op.epilogue == "add":
            self._store(op.dst, self._slots[op.dst] + op.scale * y)
        else:
            self._store(op.dst, op.scale * activate(y, op.act))

    def _rope_kv(self, op: RopeKV, batch: Batch) -> dict[str, Array]:
        plan = self.plan
        n_heads, n_kv_heads, head_dim = plan.n_heads, plan.n_kv_heads, plan.head_dim
        heads = self._slots[op.src].reshape(-1, n_heads + 2 * n_kv_heads, head_dim)  # [T, H + 2G, D]
        q, k, v = np.split(heads, [n_heads, n_heads + n_kv_heads], axis=1)
        if op.q_norm is not None:
            q = norm(q, self.weights[op.q_norm], None, op.norm_kind, op.norm_eps)
        if op.k_norm is not None:
            k = norm(k, self.weights[op.k_norm], None, op.norm_kind, op.norm_eps)
        positions = batch.positions()
        if op.rope is not None:
            rope = plan.ropes[op.rope]
            q, k = rotate(q, positions, rope), rotate(k, positions, rope)
        if self.kv_dtype == "int8":
            (k, k_scale), (v, v_scale) = quantise(k), quantise(v)
        else:
            k, v = self._round(k), self._round(v)
            k_scale = v_scale = np.ones((*k.shape[:-1], 1), self.dtype)
        cells = self._cells(batch, positions)  # [T]
        self.k[op.layer][cells] = k * k_scale
        self.v[op.layer][cells] = v
        self.v_scale[op.layer][cells] = v_scale
        self._store(op.dst, q.reshape(len(q), n_heads * head_dim))
        return {"k": k * k_scale, "v": v * v_scale}

    def _attention(self, op: Attention, batch: Batch) -> None:
        plan = self.plan
        q = self._slots[op.src].reshape(-1, plan.n_heads, plan.head_dim)  # [T, H, D]
        sinks = None if op.sinks is None else self.weights[op.sinks]
        out = np.empty_like(q)
        for s in range(batch.n_seqs):
            rows = slice(int(batch.q_start[s]), int(batch.q_start[s + 1]))
            kv_positions = np.arange(int(batch.kv_len[s]), dtype=np.int32)  # [kv_len]
            cells = self._cells_of(batch.block_tables[s], kv_positions)
            k, v, v_scale = (cache[op.layer][cells] for cache in (self.k, self.v, self.v_scale))
            out[rows] = self._attend(op, q[rows], k, v, v_scale, batch.positions()[rows], sinks)
        self._store(op.dst, out.reshape(len(out), plan.n_heads * plan.head_dim))

    def _attend(
        self,
        op: Attention,
        q: Array,
        k: Array,
        v: Array,
        v_scale: Array,
        positions: I32Array,
        sinks: Array | None,
    ) -> Array:
        """One sequence: q [n, H, D] over k, v [kv_len, G, D], v_scale [kv_len, G, 1] -> [n, H, D]."""
        group = self.plan.n_heads // self.plan.n_kv_heads
        k, v, v_scale = (np.repeat(x, group, axis=1) for x in (k, v, v_scale))  # [kv_len, H, D or 1]
        scores = op.scale * np.einsum("qhd,khd->hqk", q, k)  # [H, n, kv_len]
        if op.softcap is not None:
            scores = op.softcap * np.tanh(scores / op.softcap)
        age = positions[:, None] - np.arange(len(k))[None, :]  # [n, kv_len]
        window = len(k) if op.window is None else op.window
        visible: npt.NDArray[np.bool_] = np.asarray((age >= 0) & (age < window))
        scores = np.where(visible, scores, -np.inf)
        top = scores.max(axis=-1, keepdims=True)  # [H, n, 1]
        if sinks is not None:
            top = np.maximum(top, sinks[:, None, None])
        p = np.exp(scores - top)
        total = p.sum(axis=-1, keepdims=True)  # the sum sees p before rounding
        if sinks is not None:
            total = total + np.exp(sinks[:, None, None] - top)
        # A masked cell may hold NaN (never written), and 0 * NaN is NaN: take it out of v as well.
        seen: npt.NDArray[np.bool_] = np.asarray(visible.any(axis=0))
        v, v_scale = (np.where(seen[:, None, None], x, 0) for x in (v, v_scale))
        p = self._round(self._round(p) * v_scale[:, :, 0].T[:, None, :])  # the scale is 1 with bf16
        return np.asarray(np.einsum("hqk,khd->qhd", p / total, v))

    def _select(self, op: Select, batch: Batch) -> None:
        self._store(op.dst, self._slots[op.src][batch.logit_rows])

    def _store(self, slot: str, value: Array) -> None:
        self._slots[slot] = self._round(value) if self.plan.slots[slot].dtype == "bf16" else value

    def _round(self, value: Array) -> Array:
        return value if self.rounding is None else round_bf16(value)

    def _cells(self, batch: Batch, positions: I32Array) -> Array:
        """KV cell of every row: [T]."""
        parts = [
            self._cells_of(batch.block_tables[s], positions[batch.q_start[s] : batch.q_start[s + 1]])
            for s in range(batch.n_seqs)
        ]
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def _cells_of(self, block_table: I32Array, positions: I32Array) -> Array:
        """KV cells of positions of one sequence."""
        size = self.block_size
        i = positions // size
        block = block_table[0] + i if self.contiguous else block_table[i]
        return block.astype(np.int64) * size + positions % size


def quantise(x: Array) -> tuple[Array, Array]:
    """Integers and scales [..., 1] of heads x [..., D] as an int8 KV cache stores them (see _ext/kernels.h)."""
    amax = np.abs(x).max(axis=-1, keepdims=True)
    scale = np.where(np.isfinite(amax), amax / 127, np.nan)
    return np.rint(np.divide(x, scale, out=np.zeros_like(x), where=scale > 0)), scale


def norm(x: Array, weight: Array, bias: Array | None, kind: NormKind, eps: float) -> Array:
    """Normalise the last axis of x."""
    if kind == "layer":
        x = x - x.mean(axis=-1, keepdims=True)
    y = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps)
    y = y * (1 + weight if kind == "rms1" else weight)
    return np.asarray(y if bias is None else y + bias)


def rotate(x: Array, positions: I32Array, rope: Rope) -> Array:
    """Rotate the leading rotary_dim columns of x [T, heads, D] by the angles of positions [T]."""
    # The product in float32, as in transformers and the kernels: at position 100,000 its rounding is 0.004
    # rad.
    angle = positions.astype(np.float32)[:, None] * rope.inv_freq[None, :]  # [T, rotary_dim / 2]
    cos = (np.cos(angle.astype(x.dtype)) * rope.attention_factor)[:, None, :]
    sin = (np.sin(angle.astype(x.dtype)) * rope.attention_factor)[:, None, :]
    half = rope.rotary_dim // 2
    first = slice(0, rope.rotary_dim, 2) if rope.interleaved else slice(0, half)
    second = slice(1, rope.rotary_dim, 2) if rope.interleaved else slice(half, rope.rotary_dim)
    a, b = x[..., first], x[..., second]
    y = x.copy()
    y[..., first] = a * cos - b * sin
    y[..., second] = b * cos + a * sin
    return y


def split_gated(y: Array) -> tuple[Array, Array]:
    """Gate and up of a gated Gemm's result [rows, n]: two arrays [rows, n / 2]."""
    n = y.shape[1] // 2
    blocks = y.reshape(len(y), n // GATED_BLOCK, 2, GATED_BLOCK)
    return blocks[:, :, 0].reshape(len(y), n), blocks[:, :, 1].reshape(len(y), n)


_erf: Final = np.vectorize(math.erf, otypes=[np.float64])


def activate(x: Array, act: Activation | None) -> Array:
    """The activation of each element; None is the identity."""
    if act is None:
        return x
    if act == "silu":
        return np.asarray(x / (1 + np.exp(-x)))
    if act == "relu":
        return np.maximum(x, 0)
    if act == "gelu":
        return np.asarray(0.5 * x * (1 + (_erf(x / math.sqrt(2)) if x.size else x)), x.dtype)
    return np.asarray(0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))))


def round_bf16(values: Array) -> Array:
    """Round to the nearest bf16 (ties to even) and return in the same dtype; NaN stays NaN."""
    bits = values.astype(np.float32).view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) & 0xFFFF0000).astype(np.uint32).view(np.float32)
    return np.where(np.isnan(values), values, rounded.astype(values.dtype))
