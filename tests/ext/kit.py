"""What tests of kernels share: plans of one or two operators, bf16, poison, and comparisons that a NaN fails.

A kernel is reached the way the engine reaches it, through a plan: write into `plan.slot(name)`, step, read.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from golden.harness import Model, batch_of

from pace import ops
from pace.models import plan as ir
from pace.reference import Reference

Array = npt.NDArray[Any]
F64 = npt.NDArray[np.float64]

U_F32 = 2.0**-24
"""Unit roundoff of f32: half a unit in the last of 24 bits."""
U_BF16 = 2.0**-8
"""Unit roundoff of bf16: half a unit in the last of 8 bits."""
TINY = 2.0**-120
"""Below this results may be flushed to zero (a step runs without denormals)."""

NAN_BF16 = 0x7FC0
SENTINEL = {
    np.dtype(np.float32): np.float32(np.nan),
    np.dtype(np.uint16): np.uint16(NAN_BF16),
    np.dtype(np.int8): np.int8(-128),  # the one integer that quantising never gives
}


def to_bf16(x: Array) -> npt.NDArray[np.uint16]:
    """To bf16 bits: nearest, ties to even; NaN stays NaN."""
    x = np.asarray(x, np.float32)
    bits = x.view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), (bits >> 16).astype(np.uint16) | 0x40, rounded).astype(np.uint16)


def from_bf16(bits: npt.NDArray[np.uint16]) -> F64:
    """bf16 bits as float64, exactly."""
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def bf16(x: Array) -> F64:
    """Round to bf16 and back."""
    return from_bf16(to_bf16(x))


def rng(*key: object) -> np.random.Generator:
    """A generator seeded by the text of its arguments."""
    return np.random.Generator(np.random.PCG64(list(repr(key).encode())))


def packed(team: ops.Team, w: Array, format: str = "bf16") -> ops.PackedMatrix:
    """A matrix [n, k], or several [count, n, k], packed from float32."""
    each = w if w.ndim == 3 else w[None]
    count, n, k = each.shape
    matrix = ops.PackedMatrix(team, n, k, count=count, format=format)
    for i, one in enumerate(each):
        matrix.pack(np.ascontiguousarray(one, np.float32), "f32", matrix=i)
    return matrix


SMALL_KV = ir.KVLayer(n_kv_heads=1, head_dim=16)


def build(
    team: ops.Team,
    plan_ops: Sequence[ir.Op],
    slots: Sequence[ir.Slot],
    weights: Mapping[str, Any] | None = None,
    *,
    kernels: Mapping[str, str] | None = None,
    pool: ops.KVPool | None = None,
    kv: ir.KVLayer = SMALL_KV,
    vocab_size: int = 97,
    max_tokens: int = 320,
    max_seqs: int = 8,
    ropes: tuple[ir.Rope, ...] = (),
) -> ops.Plan:
    """A plan of just these operators; its logits are the last slot."""
    shape = ir.Plan(
        slots={slot.name: slot for slot in slots},
        ops=tuple(plan_ops),
        ropes=ropes,
        kv=(kv,) * (pool.n_layers if pool else 1),
        vocab_size=vocab_size,
        dim=slots[0].width,
        logits=slots[-1].name,
    )
    pool = pool or ops.KVPool(1, kv.n_kv_heads, kv.head_dim, max_seqs, 512)
    return ops.Plan(team, shape, weights or {}, pool, max_tokens, max_seqs, max_tokens, kernels)


def rows_batch(n: int) -> ir.Batch:
    """n rows of one sequence, for operators that do not look at sequences."""
    return batch_of([([0] * n, 0, [0])])


def memory(plan: ops.Plan, name: str) -> Array:
    """A slot with its padding: [rows, ld], writable."""
    view = plan.slot(name)
    ld = view.strides[0] // view.itemsize
    base = view.base
    assert isinstance(base, np.ndarray)
    return base[: len(view) * ld].reshape(len(view), ld)


def poison(plan: ops.Plan, *names: str) -> None:
    """Fill slots with NaN, padding included."""
    for name in names:
        whole = memory(plan, name)
        whole[...] = SENTINEL[whole.dtype]


def put(plan: ops.Plan, name: str, values: Array) -> F64:
    """Write the first rows of a slot; padding columns become 0, other rows NaN. Returns what it holds."""
    whole = memory(plan, name)
    n, width = values.shape
    whole[...] = SENTINEL[whole.dtype]
    whole[:n] = 0
    if whole.dtype == np.uint16:
        whole[:n, :width] = bits = to_bf16(values)
        return from_bf16(bits)
    whole[:n, :width] = values
    return whole[:n, :width].astype(np.float64)


def take(plan: ops.Plan, name: str, n: int) -> F64:
    """The first n rows of a slot, after checking that everything beside and below them is still poison."""
    whole, width = memory(plan, name), plan.slot(name).shape[1]
    poison_bits = np.array([SENTINEL[whole.dtype]]).view(np.uint8).tobytes()
    assert whole[:n, width:].tobytes() == poison_bits * whole[:n, width:].size, "wrote beside the row"
    assert whole[n:].tobytes() == poison_bits * whole[n:].size, "wrote below the last row"
    rows = whole[:n, :width]
    return from_bf16(rows) if rows.dtype == np.uint16 else rows.astype(np.float64)


def assert_close(got: Array, want: Array, tolerance: Array | float) -> None:
    """|got - want| <= tolerance everywhere; a NaN on either side fails."""
    assert got.shape == want.shape
    assert np.isfinite(want).all(), "the oracle must be finite"
    error = np.abs(got.astype(np.float64) - want)
    bad = ~(error <= tolerance + TINY)
    if bad.any():
        at = tuple(int(i[0]) for i in np.nonzero(bad))
        limit = np.broadcast_to(tolerance, want.shape)[at]
        raise AssertionError(
            f"{int(bad.sum())} of {bad.size} outside the tolerance; first at {at}: "
            f"got {got[at]!r}, want {want[at]!r}, tolerance {limit:.3e}"
        )


def sample_params(n: int, **fields: Any) -> np.ndarray:
    """n rows of parameters with everything off: temperature 1, no filters, no penalties, no logprobs."""
    rows = np.zeros(n, ops.SAMPLE_DTYPE)
    defaults = {"temperature": 1.0, "top_p": 1.0, "repetition_penalty": 1.0, "n_logprobs": -1}
    for name, value in {**defaults, **fields}.items():
        rows[name] = value
    return rows


NO_IDS = np.empty(0, np.int32)
NO_BIAS = np.empty(0, np.float32)


def constraints(
    prompt: Any = NO_IDS,
    output: Any = NO_IDS,
    banned: Any = NO_IDS,
    bias_ids: Any = NO_IDS,
    bias: Any = NO_BIAS,
    allowed: Any = NO_IDS,
) -> Any:
    """One row's history; what is not given concerns nothing."""
    ids = [np.asarray(part, np.int32) for part in (prompt, output, banned, bias_ids, allowed)]
    return (*ids[:4], np.asarray(bias, np.float32), ids[4])


# ---- other processes ----------------------------------------------------------------------------------------------


def python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a script in a fresh interpreter."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), **env},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


# ---- golden models on the compiled executor ---------------------------------------------------------------


@dataclass(frozen=True)
class Packed:
    """A golden model with its weights as the kernels take them."""

    model: Model
    weights: dict[str, Any]

    def runner(
        self,
        team: ops.Team,
        *,
        n_blocks: int = 16,
        block_size: int = 16,
        max_tokens: int = 512,
        max_seqs: int = 8,
        kernels: Mapping[str, str] | None = None,
        kv_dtype: str = "bf16",
        contiguous: bool = False,
    ) -> ops.Plan:
        """The executor with fresh KV pools; a batch's one block table serves every group of layers."""
        plan = self.model.plan
        pools = [
            ops.KVPool(
                len(g.layers),
                g.layer.n_kv_heads,
                g.layer.head_dim,
                n_blocks,
                block_size,
                kv_dtype,
                contiguous,
            )
            for g in plan.groups()
        ]
        return OneTable(team, plan, self.weights, pools, max_tokens, max_seqs, max_tokens, kernels)


class OneTable(ops.Plan):
    """A plan whose pools are of one size, so that blocks of one number can belong together."""

    def step(self, batch: ir.Batch) -> Array:
        """One step with the batch's only table for every group."""
        return super().step(replace(batch, block_tables=batch.tables * len(self.ir.groups())))


def pack_model(team: ops.Team, model: Model) -> Packed:
    """Pack every matrix; they hold bf16 values already, so this loses nothing."""
    weights: dict[str, Any] = {}
    for name, shape in model.plan.weights.items():
        value = model.weights[name]
        if shape.k is None:
            weights[name] = np.ascontiguousarray(value, np.float32)
        else:
            weights[name] = packed(team, value)
    return Packed(model, weights)


def chosen(kernel: str) -> dict[str, str] | None:
    """`kernels=` of a plan: tiers come from `using_isa`, the scalar C table is named for every operator."""
    return dict.fromkeys(ops.OPERATORS, "reference") if kernel == "reference" else None


# ---- operators beside the float64 reference ---------------------------------------------------------------


class Beside:
    """A plan on the kernels and in exact float64, stepped together.

    Args:
        inputs: f32 slots that no operator writes first, with their width: each is filled by an Embed from a table of bf16
            values, so that both sides begin with the same numbers.
        slots: the others.
        weights: vectors as f32 arrays; matrices [n, k] are rounded to bf16 and packed.
    """

    def __init__(
        self,
        team: ops.Team,
        kernel: str,
        operators: Sequence[ir.Op],
        inputs: Mapping[str, int],
        slots: Sequence[ir.Slot],
        weights: Mapping[str, Array] | None = None,
        kv: Sequence[ir.KVLayer] = (SMALL_KV,),
        ropes: tuple[ir.Rope, ...] = (),
        tables: Mapping[str, Array] | None = None,
        n_blocks: int = 16,
        max_tokens: int = 320,
    ) -> None:
        vocab = 97
        dense: dict[str, npt.NDArray[Any]]
        dense = {name: np.asarray(value, np.float32) for name, value in (weights or {}).items()}
        dense |= {f"in.{name}": rng(name).standard_normal((vocab, n)) for name, n in inputs.items()}
        dense |= tables or {}
        dense = {
            name: bf16(value).astype(np.float32) if value.ndim == 2 else value
            for name, value in dense.items()
        }
        makers = [ir.Embed(f"make.{name}", name, f"in.{name}") for name in inputs]
        made = [ir.Slot(name, n, "f32", "tokens") for name, n in inputs.items()]
        self.plan = ir.Plan(
            {slot.name: slot for slot in (*made, *slots)},
            (*makers, *operators),
            ropes,
            tuple(kv),
            vocab,
            8,
            slots[-1].name,
        )
        packs = {name: packed(team, value) if value.ndim == 2 else value for name, value in dense.items()}
        pools = [
            ops.KVPool(len(g.layers), g.layer.n_kv_heads, g.layer.head_dim, n_blocks, 16)
            for g in self.plan.groups()
        ]
        self.kernels = ops.Plan(team, self.plan, packs, pools, max_tokens, 8, max_tokens, chosen(kernel))
        self.exact = Reference(self.plan, dense, n_blocks, 16, trace=True)

    def step(self, batch: ir.Batch) -> None:
        """One step on both sides."""
        self.kernels.step(batch)
        self.exact.step(batch)

    def got(self, slot: str, n: int) -> F64:
        """The first n rows that the kernels computed."""
        rows = self.kernels.slot(slot)[:n]
        return from_bf16(rows) if rows.dtype == np.uint16 else rows.astype(np.float64)

    def want(self, slot: str) -> F64:
        """What the reference computed."""
        return np.asarray(self.exact._slots[slot], np.float64)
