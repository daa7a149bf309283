"""The oracle: a plan interpreted operator by operator in numpy.

In exact mode (rounding=None) everything is float64 and nothing is rounded: the answer that transformers in
float32 approximates. With rounding="bf16" values are rounded where the kernels round them (Gemm inputs, q, k,
v and the softmax's weights before they meet v), so that a kernel can be compared operator by operator with a
tolerance of a few units of float32 accumulation instead of bf16's 2^-9. An int8 KV cache is quantised in either
mode, for that is what the cache holds.

Shapes: T tokens and R logit rows of the step; D = head_dim, H = n_heads, G = n_kv_heads of an operator.
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
    ExpertsIn,
    ExpertsOut,
    Gemm,
    I32Array,
    Norm,
    NormKind,
    Permute,
    Plan,
    Quantise,
    Rope,
    RopeKV,
    Route,
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
        # The packed engine stores matrices in bf16; vectors stay float32 there, and a mapped table what it is.
        packed = {name for name, shape in plan.weights.items() if shape.k is not None and not shape.mapped}
        self.weights = {
            name: self._round(np.asarray(value, dtype)) if name in packed else np.asarray(value, dtype)
            for name, value in weights.items()
        }
        shapes = [(n_blocks * block_size, layer.n_kv_heads, layer.head_dim) for layer in plan.kv]
        # NaN where nothing was written: reading a cell too many shows at once.
        self.k = [
            np.full(shape, np.nan, dtype) for shape in shapes
        ]  # of each layer [n_blocks * block_size, G, D]
        self.v = [
            np.full(shape, np.nan, dtype) for shape in shapes
        ]  # integers with int8; v_scale makes them values
        self.v_scale = [np.full((*shape[:-1], 1), np.nan, dtype) for shape in shapes]  # 1 with bf16
        self._group_of = {layer: i for i, group in enumerate(plan.groups()) for layer in group.layers}
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
            elif isinstance(op, Quantise):
                self._quantise(op)
            elif isinstance(op, Permute):
                self._permute(op)
            elif isinstance(op, Route):
                self._route(op)
            elif isinstance(op, ExpertsIn):
                self._experts_in(op)
            elif isinstance(op, ExpertsOut):
                self._experts_out(op)
            else:
                self._select(op, batch)
            if self.trace is not None:
                # Operators build new arrays and never write into old ones, so references are enough.
                self.trace[op.name] = {**self._slots, **extra}
        return self._slots[self.plan.logits]

    def _embed(self, op: Embed, batch: Batch) -> None:
        x: Array = np.zeros((batch.n_tokens, self.plan.slots[op.dst].width), self.dtype)
        if op.add:
            x = x + self._slots[op.dst]
        if op.weight is not None:
            x = x + op.scale * self.weights[op.weight][batch.token_ids]  # [T, dim]
        if op.positions is not None:
            x = x + self.weights[op.positions][batch.positions() + op.offset]
        self._store(op.dst, op.post * x)

    def _norm(self, op: Norm) -> None:
        x = self._slots[op.src]
        groups = x.reshape(len(x), op.groups, x.shape[1] // op.groups)
        y = norm(groups, self._vector(op.weight), self._vector(op.bias), op.kind, op.eps).reshape(x.shape)
        if op.add:
            y = self._slots[op.dst] + y
        self._store(op.dst, y if op.scale is None else self.weights[op.scale] * y)

    def _gemm(self, op: Gemm) -> None:
        dst = self.plan.slots[op.dst]
        y = self._slots[op.src] @ self.weights[op.weight].T  # [rows, n]
        if op.bias is not None:
            y = y + self.weights[op.bias]
        if op.epilogue == "gated":
            gate, up = split_gated(y)
            y = (activate(gate, op.act) * up)[:, : dst.width]
        elif op.epilogue == "add":
            by_row = 1 if op.other is None else self._slots[op.other][:, op.at, None]
            y = self._slots[op.dst] + op.scale * by_row * y
        else:
            y = op.scale * activate(y, op.act)
            if op.cap is not None:
                y = op.cap * np.tanh(y / op.cap)
            if op.other is not None:
                y = y * self._slots[op.other][:, op.at : op.at + dst.width]
        self._store(op.dst, y)

    def _quantise(self, op: Quantise) -> None:
        x = self._slots[op.src]
        if self.rounding is not None:
            groups = x.reshape(len(x), -1, 32)
            q, scale = quantise(groups)
            x = (q * scale).reshape(x.shape)
        self._slots[op.dst] = x

    def _permute(self, op: Permute) -> None:
        self._store(op.dst, self._slots[op.src][:, self.weights[op.order].astype(np.intp)])

    def _route(self, op: Route) -> None:
        logits = self._slots[op.src]  # [T, E]
        ids, weights = route(op, logits, self._vector(op.choice))  # [T, k] each
        if op.expert_scale is not None:
            weights = weights * self.weights[op.expert_scale][ids]
        self._store(op.dst, np.concatenate([ids.astype(self.dtype), weights], axis=1))

    def _sorted(self, slot: str) -> tuple[I32Array, I32Array, Array]:
        """Expert, row and weight of every choice in a slot that `Route` wrote, sorted by expert: [T * k] each."""
        chosen = self._slots[slot]
        k = chosen.shape[1] // 2
        ids = chosen[:, :k].astype(np.int32).reshape(-1)
        order = np.argsort(ids, kind="stable")
        return ids[order], (order // k).astype(np.int32), chosen[:, k:].reshape(-1)[order]

    def _experts_in(self, op: ExpertsIn) -> None:
        ids, rows, weights = self._sorted(op.route)
        x = self._slots[op.src][rows]  # [T k, k of W]
        if op.on_input:
            x = self._round(x * weights[:, None])
        out: Array = np.empty((len(rows), self.plan.slots[op.dst].width), self.dtype)
        for e in np.unique(ids):
            y = x[ids == e] @ self.weights[op.weight][e].T
            if op.bias is not None:
                y = y + self.weights[op.bias][e]
            gate, up = split_gated(y)
            if op.limit:
                gate, up = np.minimum(gate, op.limit), np.clip(up, -op.limit, op.limit)
                y = (up + 1) * gate / (1 + np.exp(-op.alpha * gate))
            else:
                y = activate(gate, op.act) * up
            out[ids == e] = y[:, : out.shape[1]]
        self._store(op.dst, out)

    def _experts_out(self, op: ExpertsOut) -> None:
        ids, rows, weights = self._sorted(op.route)
        x, chosen = self._slots[op.src], self._slots[op.route]
        out = np.zeros((len(chosen), self.plan.slots[op.dst].width), self.dtype)
        if op.add:
            out = out + self._slots[op.dst]
        for e in np.unique(ids):
            y = x[ids == e] @ self.weights[op.weight][e].T
            if op.bias is not None:
                y = y + self.weights[op.bias][e]
            out[rows[ids == e]] += op.scale * y * (weights[ids == e][:, None] if op.weigh else 1)
        self._store(op.dst, out)

    def _rope_kv(self, op: RopeKV, batch: Batch) -> dict[str, Array]:
        kv, positions = self.plan.kv[op.kv], self._positions(op.src, batch)
        x = self._slots[op.src]
        heads = x.reshape(len(x), x.shape[1] // kv.head_dim, kv.head_dim)  # [T, H + 2 G, D], or fewer
        q, k, v = np.split(heads, [op.n_heads, op.n_heads + kv.n_kv_heads], axis=1)
        q = self._norm_and_rotate(op, q, op.q_norm, positions)
        if op.temperature is not None:
            scale, floor, offset = op.temperature
            q = q * (1 + scale * np.log(1 + np.floor((positions + offset) / floor)))[:, None, None]
        self._store(op.dst, q.reshape(len(x), op.n_heads * kv.head_dim))
        if not op.append:
            return {}
        v = k if op.k_is_v else v
        if op.v_norm:
            v = norm(v, None, None, "rms", op.norm_eps, op.norm_width)
        return self._append(op.kv, self._norm_and_rotate(op, k, op.k_norm, positions), v, batch)

    def _norm_and_rotate(self, op: RopeKV, x: Array, weight: str | None, positions: I32Array) -> Array:
        """Heads x [T, heads, D] of q or k."""
        if op.rope is not None and op.norm_after_rope:
            x = rotate(x, positions, self.plan.ropes[op.rope])
        if op.qk_norm != "none":
            w = self._vector(weight)
            if w is not None and op.norm_scope != "head":
                w = w.reshape(x.shape[1:])
            axes = (-2, -1) if op.norm_scope == "full" else (-1,)
            x = norm(x, w, None, op.qk_norm, op.norm_eps, op.norm_width, axes)
        if op.rope is not None and not op.norm_after_rope:
            x = rotate(x, positions, self.plan.ropes[op.rope])
        return x

    def _append(self, layer: int, k: Array, v: Array, batch: Batch) -> dict[str, Array]:
        """Store k and v [T, G, D] of the step's tokens; returns them as the cache holds them."""
        if self.kv_dtype == "int8":
            (k, k_scale), (v, v_scale) = quantise(k), quantise(v)
        else:
            k, v = self._round(k), self._round(v)
            k_scale = v_scale = np.ones((*k.shape[:-1], 1), self.dtype)
        cells = self._cells(batch, layer, batch.positions())  # [T]
        self.k[layer][cells] = k * k_scale
        self.v[layer][cells] = v
        self.v_scale[layer][cells] = v_scale
        return {"k": k * k_scale, "v": v * v_scale}

    def _attention(self, op: Attention, batch: Batch) -> None:
        x = self._slots[op.src]
        q = x.reshape(len(x), op.n_heads, self.plan.kv[op.kv].head_dim)  # [T, H, D]
        sinks = self._vector(op.sinks)
        out = np.empty_like(q)
        positions, sequence = self._positions(op.src, batch), self._sequences(op.src, batch)
        for s in range(batch.n_seqs):
            rows = sequence == s
            visible = visible_to(positions[rows], int(batch.kv_len[s]), op.window, op.chunk)
            seen = np.flatnonzero(visible.any(axis=0)).astype(
                np.int32
            )  # a table may lead nowhere for the others
            cells = self._cells_of(self._table(batch, op.kv)[s], seen)
            k, v, v_scale = (cache[op.kv][cells] for cache in (self.k, self.v, self.v_scale))
            out[rows] = self._attend(op, q[rows], k, v, v_scale, visible[:, seen], sinks)
        self._store(op.dst, out.reshape(x.shape))

    def _attend(
        self,
        op: Attention,
        q: Array,
        k: Array,
        v: Array,
        v_scale: Array,
        visible: npt.NDArray[np.bool_],
        sinks: Array | None,
    ) -> Array:
        """One sequence: q [n, H, D] over k, v [m, G, D], v_scale [m, G, 1] where visible [n, m] -> [n, H, D]."""
        group = op.n_heads // self.plan.kv[op.kv].n_kv_heads
        k, v, v_scale = (np.repeat(x, group, axis=1) for x in (k, v, v_scale))  # [m, H, D or 1]
        scores = op.scale * np.einsum("qhd,khd->hqk", q, k)  # [H, n, m]
        if op.softcap is not None:
            scores = op.softcap * np.tanh(scores / op.softcap)
        scores = np.where(visible, scores, -np.inf)
        top = scores.max(axis=-1, keepdims=True)  # [H, n, 1]
        if sinks is not None:
            top = np.maximum(top, sinks[:, None, None])
        p = np.exp(scores - top)
        total = p.sum(axis=-1, keepdims=True)  # the sum sees p before rounding
        if sinks is not None:
            total = total + np.exp(sinks[:, None, None] - top)
        p = self._round(self._round(p) * v_scale[:, :, 0].T[:, None, :])  # the scale is 1 with bf16
        return np.asarray(np.einsum("hqk,khd->qhd", p / total, v))

    def _select(self, op: Select, batch: Batch) -> None:
        self._store(op.dst, self._slots[op.src][batch.logit_rows])

    def _vector(self, name: str | None) -> Array | None:
        return None if name is None else self.weights[name]

    def _store(self, slot: str, value: Array) -> None:
        self._slots[slot] = self._round(value) if self.plan.slots[slot].dtype == "bf16" else value

    def _round(self, value: Array) -> Array:
        return value if self.rounding is None else round_bf16(value)

    def _positions(self, slot: str, batch: Batch) -> I32Array:
        """Position of every row of a slot."""
        positions = batch.positions()
        return positions if self.plan.slots[slot].rows == "tokens" else positions[batch.logit_rows]

    def _sequences(self, slot: str, batch: Batch) -> I32Array:
        """Sequence of every row of a slot."""
        sequences = np.repeat(np.arange(batch.n_seqs, dtype=np.int32), np.diff(batch.q_start))
        return sequences if self.plan.slots[slot].rows == "tokens" else sequences[batch.logit_rows]

    def _table(self, batch: Batch, layer: int) -> I32Array:
        """The block table of a layer's group, or the one that all share."""
        return batch.tables[self._group_of[layer] if len(batch.tables) > 1 else 0]

    def _cells(self, batch: Batch, layer: int, positions: I32Array) -> Array:
        """KV cell of every row in a layer: [T]."""
        table = self._table(batch, layer)
        parts = [
            self._cells_of(table[s], positions[batch.q_start[s] : batch.q_start[s + 1]])
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
    """Integers and scales [..., 1] of heads x [..., D] as an int8 KV cache stores them, or of groups of 32 columns as an
    int8 slot does (see _ext/kernels.h)."""
    amax = np.abs(x).max(axis=-1, keepdims=True)
    scale = np.where(np.isfinite(amax), amax / 127, np.nan)
    return np.rint(np.divide(x, scale, out=np.zeros_like(x), where=scale > 0)), scale


MXFP4_VALUES: Final = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes that the lower three bits of a code of MXFP4 choose from; the fourth is the sign."""


def dequantise_mxfp4(blocks: npt.NDArray[np.uint8], scales: npt.NDArray[np.uint8]) -> Array:
    """Weights of MXFP4 as gpt-oss stores them.

    Args:
        blocks: [..., k / 32, 16], two codes a byte, that of the lower k in the low nibble.
        scales: [..., k / 32], bytes e of 2^(e - 127).

    Returns:
        [..., k], exact.
    """
    codes = np.stack([blocks & 15, blocks >> 4], -1).reshape(*scales.shape, 32)
    values = np.array(MXFP4_VALUES + tuple(-x for x in MXFP4_VALUES))[codes]
    weights: Array = np.ldexp(values, scales[..., None].astype(np.int32) - 127)
    return weights.reshape(*scales.shape[:-1], -1)


def route(op: Route, logits: Array, choice: Array | None) -> tuple[I32Array, Array]:
    """Numbers and weights of the experts that rows with these logits [T, E] choose: [T, k] each, best first."""
    scores = 1 / (1 + np.exp(-logits)) if op.order == "sigmoid" else logits
    # Alone the logits choose, as they do in the kernels: the sigmoids of 30 and 31 are nearly one number.
    by = scores + choice if choice is not None else scores if op.n_groups > 1 else logits
    if op.n_groups > 1:
        groups = by.reshape(len(by), op.n_groups, -1)
        best = np.sort(groups, axis=-1)[:, :, -2:].sum(axis=-1)  # [T, groups]
        kept = np.argsort(-best, axis=-1, kind="stable")[:, : op.top_groups]
        mask = np.zeros(best.shape, bool)
        np.put_along_axis(mask, kept, True, axis=-1)
        by = np.where(mask[:, :, None], groups, -np.inf).reshape(by.shape)
    ids = np.argsort(-by, axis=-1, kind="stable")[:, : op.top_k].astype(np.int32)
    return ids, weigh(op, logits, ids)


def weigh(op: Route, logits: Array, ids: I32Array) -> Array:
    """Weights [T, k] of the experts `ids` of rows with these logits [T, E]."""
    scores = 1 / (1 + np.exp(-logits)) if op.order == "sigmoid" else logits
    chosen = np.take_along_axis(scores, ids, axis=-1)
    if op.order == "sigmoid":
        weights = chosen
    else:
        top = logits.max(axis=-1, keepdims=True)
        over = chosen if op.order == "chosen" else logits
        weights = np.exp(chosen - top) / np.exp(over - top).sum(axis=-1, keepdims=True)
    if op.renormalise:
        weights = weights / (weights.sum(axis=-1, keepdims=True) + (1e-20 if op.order == "sigmoid" else 0))
    return np.asarray(op.scale * weights)


def norm(
    x: Array,
    weight: Array | None,
    bias: Array | None,
    kind: NormKind,
    eps: float,
    width: int | None = None,
    axes: tuple[int, ...] = (-1,),
) -> Array:
    """Normalise x over `axes`, the last one among them; of that only the first `width` columns count and change."""
    if kind == "none":
        return x
    counted = np.arange(x.shape[-1]) < (x.shape[-1] if width is None else width)
    if kind == "layer":
        x = np.where(counted, x - x.mean(axis=axes, keepdims=True, where=counted), 0)
    y = x / np.sqrt((x * x).mean(axis=axes, keepdims=True, where=counted) + eps)
    if weight is not None:
        y = y * (1 + weight if kind == "rms1" else weight)
    return np.asarray(y if bias is None else y + bias)


def visible_to(
    positions: I32Array, kv_len: int, window: int | None = None, chunk: int | None = None
) -> npt.NDArray[np.bool_]:
    """Which of kv_len cached tokens the queries at `positions` [n] see: [n, kv_len]."""
    query, key = positions[:, None], np.arange(kv_len)[None, :]
    visible = key <= query
    if window is not None:
        visible &= key > query - window
    if chunk is not None:
        visible &= key // chunk == query // chunk
    return visible


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
    if act in ("relu", "relu2"):
        return np.maximum(x, 0) ** (1 if act == "relu" else 2)
    if act == "sigmoid":
        return np.asarray(1 / (1 + np.exp(-x)))
    if act == "quick_gelu":
        return np.asarray(x / (1 + np.exp(-1.702 * x)))
    if act == "gelu":
        return np.asarray(0.5 * x * (1 + (_erf(x / math.sqrt(2)) if x.size else x)), x.dtype)
    return np.asarray(0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))))


def round_bf16(values: Array) -> Array:
    """Round to the nearest bf16 (ties to even) and return in the same dtype; NaN stays NaN."""
    bits = values.astype(np.float32).view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) & 0xFFFF0000).astype(np.uint32).view(np.float32)
    return np.where(np.isnan(values), values, rounded.astype(values.dtype))
