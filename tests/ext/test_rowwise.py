"""Row-wise kernels on every tier: packing, embedding, selection, norms, softmax, argmax."""

from __future__ import annotations

import numpy as np
import pytest
from ext.kit import (
    U_BF16,
    U_F32,
    assert_close,
    bf16,
    build,
    chosen,
    from_bf16,
    memory,
    packed,
    poison,
    put,
    rng,
    rows_batch,
    take,
    to_bf16,
)
from golden.harness import batch_of

from pace import ops
from pace.models import plan as ir
from pace.models.plan import gated_rows
from pace.reference import norm

# ---- packing ----------------------------------------------------------------------------------------------


def special_values(n: int, k: int) -> np.ndarray:
    """Random normals with NaN, infinities, zeros, ties and the largest numbers among them."""
    x = rng("pack", n, k).standard_normal((n, k)).astype(np.float32)
    ties = np.array([0x3F808000, 0x3F818000, 0x3F7FFFFF, 0x7F7F7FFF], np.uint32).view(np.float32)
    special = np.concatenate([[np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0, 3.3e38, 1e-37], ties])
    flat = x.reshape(-1)
    flat[:: max(1, flat.size // 12)][: len(special)] = special[: len(flat[:: max(1, flat.size // 12)])]
    return x


@pytest.mark.parametrize(
    ("n", "k"),
    [
        (1, 1),
        (15, 16),
        (16, 17),
        (17, 31),
        (33, 32),
        (1, 33),
        (307, 255),
        (33, 300),
        (307, 1),
        (16, 256),
        (5, 257),
    ],
)
def test_pack_round_trip(isa: str, team: ops.Team, n: int, k: int) -> None:
    """bf16 exactly, f32 rounded to nearest even, f16 converted exactly first."""
    x = special_values(n, k)
    with np.errstate(over="ignore"):
        half = x.astype(np.float16)
    for source, dtype, want in (
        (to_bf16(x), "bf16", bf16(x)),
        (x, "f32", bf16(x)),
        (half, "f16", bf16(half.astype(np.float32))),
    ):
        matrix = ops.PackedMatrix(team, n, k)
        matrix.pack(source, dtype)
        np.testing.assert_array_equal(matrix.unpack(), want)  # NaN equals NaN here, and only NaN
        assert matrix.nbytes == -(-n // 32) * 32 * (-(-k // 32) * 32) * 2


@pytest.mark.parametrize(("inner", "k"), [(16, 32), (48, 33), (208, 100)])
def test_pack_parts(isa: str, team: ops.Team, inner: int, k: int) -> None:
    """Gate and up alternate in blocks of 16; plain parts go where `at` says."""
    r = rng("parts", inner)
    gate, up = (bf16(r.standard_normal((inner, k))) for _ in range(2))
    fused = ops.PackedMatrix(team, 2 * inner, k)
    fused.pack(to_bf16(up), "bf16", mode="up")
    fused.pack(to_bf16(gate), "bf16", mode="gate")
    got = fused.unpack()
    assert np.array_equal(got[gated_rows(inner, "gate")], gate)
    assert np.array_equal(got[gated_rows(inner, "up")], up)
    stacked = ops.PackedMatrix(team, 2 * inner + 5, k)
    stacked.pack(to_bf16(up), "bf16", at=inner)
    stacked.pack(to_bf16(gate), "bf16")
    stacked.pack(to_bf16(up[:5]), "bf16", at=2 * inner)
    assert np.array_equal(stacked.unpack(), np.concatenate([gate, up, up[:5]]))


@pytest.mark.parametrize(
    ("rows", "dtype", "at", "mode"),
    [
        (np.zeros((4, 32), np.float32), "bf16", 0, "rows"),
        (np.zeros((4, 31), np.float32), "f32", 0, "rows"),
        (np.zeros((32, 4), np.float32).T, "f32", 0, "rows"),
        (np.zeros(32, np.float32), "f32", 0, "rows"),
        (np.zeros((4, 32), np.float32), "f32", 8, "rows"),
        (np.zeros((4, 32), np.float32), "f32", -16, "rows"),
        (np.zeros((4, 32), np.float32), "f32", 64, "rows"),
        (np.zeros((65, 32), np.float32), "f32", 0, "rows"),
        (np.zeros((33, 32), np.float32), "f32", 0, "up"),
        (np.zeros((0, 32), np.float32), "f32", 0, "rows"),
    ],
)
def test_pack_refuses(team: ops.Team, rows: np.ndarray, dtype: str, at: int, mode: str) -> None:
    with pytest.raises(ValueError, match=r"rows|source|expected"):
        ops.PackedMatrix(team, 64, 32).pack(rows, dtype, at=at, mode=mode)


# ---- embedding and selection ------------------------------------------------------------------------------


def test_one_of_several_matrices(team: ops.Team) -> None:
    """Experts of a layer: each is packed and read by itself, and begins on a page."""
    r = rng("experts")
    w = bf16(r.standard_normal((3, 40, 70))).astype(np.float32)
    matrix = ops.PackedMatrix(team, 40, 70, count=3)
    for i in (2, 0, 1):
        matrix.pack(w[i], "f32", matrix=i)
    for i in range(3):
        assert matrix.unpack(i).tobytes() == w[i].tobytes()
    assert matrix.nbytes == 3 * 4096 * -(-64 * 96 * 2 // 4096)
    for call in (lambda: matrix.pack(w[0], "f32", matrix=3), lambda: matrix.unpack(-1)):
        with pytest.raises(ValueError, match=r"matrix (3|-1) of 3"):
            call()


@pytest.mark.parametrize("scale", [1.0, 11.3125])
@pytest.mark.parametrize(("n", "k"), [(307, 128), (33, 17), (97, 300)])
def test_embed(kernel: str, team: ops.Team, n: int, k: int, scale: float) -> None:
    """One product in f32 of two f32 numbers: equal, not close."""
    table = packed(team, rng("embed", n, k).standard_normal((n, k)))
    slots = [ir.Slot("x", k, "f32", "tokens")]
    op = ir.Embed("e", "x", "w", scale)
    plan = build(team, [op], slots, {"w": table}, kernels=chosen(kernel), vocab_size=n)
    tokens = [0, n - 1, *rng(n).integers(0, n, 40).tolist()]
    poison(plan, "x")
    plan.step(batch_of([(tokens, 0, [0])]))
    want = table.unpack()[tokens] * np.float32(scale)
    assert np.array_equal(take(plan, "x", len(tokens)), want)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("width", [1, 17, 128])
def test_select(kernel: str, team: ops.Team, width: int, dtype: ir.Dtype) -> None:
    slots = [ir.Slot("x", width, dtype, "tokens"), ir.Slot("y", width, dtype, "logits")]
    plan = build(team, [ir.Select("s", "x", "y")], slots, kernels=chosen(kernel))
    x = put(plan, "x", rng(width).standard_normal((30, width)))
    for rows in ([], [0], [29], [0, 3, 4, 28], list(range(30))):
        poison(plan, "y")
        plan.step(batch_of([([1] * 30, 0, [0])], logit_rows=rows))
        assert np.array_equal(take(plan, "y", len(rows)), x[rows])


@pytest.mark.parametrize("width", [1, 17, 128, 1003])
def test_permute(kernel: str, team: ops.Team, width: int) -> None:
    """Bits as they are, NaN too; what fills rows up stays 0."""
    slots = [ir.Slot("x", width, "bf16", "tokens"), ir.Slot("y", width, "bf16", "tokens")]
    order = rng("order", width).permutation(width)
    op = ir.Permute("p", "x", "y", "w.order", "w")
    plan = build(team, [op], slots, {"w.order": order.astype(np.float32)}, kernels=chosen(kernel))
    put(plan, "x", special_values(30, width))
    plan.step(batch_of([([1] * 30, 0, [0])]))
    assert plan.slot("y")[:30].tobytes() == plan.slot("x")[:30, order].tobytes()
    assert not plan.slot("y")[30:].any()


# ---- norms ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 17, 31, 128, 1003])
@pytest.mark.parametrize("kind", ["rms", "rms1", "layer"])
@pytest.mark.parametrize(("dtype", "add"), [("f32", False), ("bf16", False), ("f32", True)])
def test_norm(kernel: str, team: ops.Team, kind: ir.NormKind, width: int, dtype: ir.Dtype, add: bool) -> None:
    """The sum of squares has n / 16 terms per lane (8 on avx2), all positive: (n / 8 + 8) u relative. The
    mean of a layer norm is off by that much of mean |x|, which its row then carries times inv * w.
    """
    r = rng("norm", width, kind)
    x = 3 * r.standard_normal((41, width)) + 0.5
    w, b = (r.standard_normal(width).astype(np.float32) for _ in range(2))
    bias = "b" if kind == "layer" else None
    slots = [ir.Slot("x", width, "f32", "tokens"), ir.Slot("y", width, dtype, "tokens")]
    op = ir.Norm("n", "x", "y", "w", bias, kind, 1e-5, add)
    plan = build(team, [op], slots, {"w": w, "b": b}, kernels=chosen(kernel), max_tokens=48)
    for m in (1, 3, 41):
        xs = put(plan, "x", x[:m])
        poison(plan, "y")
        before = np.zeros((m, width))
        if add:
            memory(plan, "y")[:m, :width] = before = r.standard_normal((m, width)).astype(np.float32)
        plan.step(rows_batch(m))
        w64, b64 = w.astype(np.float64), b.astype(np.float64)
        y = norm(xs, w64, b64 if bias else None, kind, 1e-5)
        centred = xs - xs.mean(-1, keepdims=True) if kind == "layer" else xs
        inv = 1 / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
        gain = inv * np.abs(1 + w64 if kind == "rms1" else w64)
        spread = np.abs(xs) + np.abs(xs).mean(-1, keepdims=True) * (kind == "layer")
        tolerance = (width / 8 + 12) * U_F32 * gain * spread + 4 * U_F32 * (np.abs(before) + np.abs(b64))
        if kind == "layer":
            # Deviations inherit the mean's error, and so does their root mean square.
            tolerance *= 1 + inv * spread.max(-1, keepdims=True)
        tolerance += (U_BF16 if dtype == "bf16" else U_F32) * np.abs(y)
        assert_close(take(plan, "y", m), before + y, tolerance)


def test_norm_of_zeros_is_zero(kernel: str, team: ops.Team) -> None:
    """eps keeps an empty row finite."""
    slots = [ir.Slot("x", 33, "f32", "tokens"), ir.Slot("y", 33, "bf16", "tokens")]
    op = ir.Norm("n", "x", "y", "w")
    plan = build(team, [op], slots, {"w": np.ones(33, np.float32)}, kernels=chosen(kernel))
    put(plan, "x", np.zeros((2, 33)))
    poison(plan, "y")
    plan.step(rows_batch(2))
    assert not take(plan, "y", 2).any()


# ---- rows of logits ---------------------------------------------------------------------------------------

WIDTHS = [1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 1000, 4099]


@pytest.mark.parametrize("n", WIDTHS)
def test_softmax(isa: str, n: int) -> None:
    """x - max is rounded once (its size times u), exp is good to 4 units, the sum to n / 8 units."""
    x = (8 * rng("softmax", n).standard_normal(n)).astype(np.float32)
    if n > 8:
        x[3] = -np.inf
    got = x.copy()
    ops.softmax(got)
    shifted = x.astype(np.float64) - x.max()
    want = np.exp(shifted) / np.exp(shifted).sum()
    depth = np.where(np.isfinite(shifted), np.abs(shifted), 0)
    assert_close(got, want, (depth + n / 8 + 12) * U_F32 * want + 2.0**-126)


@pytest.mark.parametrize("n", WIDTHS)
def test_argmax(isa: str, n: int) -> None:
    x = rng("argmax", n).standard_normal(n).astype(np.float32)
    for i in {0, n // 2, n - 1}:
        y = x.copy()
        y[i] = 9.0
        assert ops.argmax(y) == i
        y[n // 3 :] = 9.0
        assert ops.argmax(y) == min(i, n // 3), "the lowest of equal indices"
        y[i] = np.nan
        assert ops.argmax(y) == -1
    assert ops.argmax(np.full(n, -np.inf, np.float32)) == 0
    masked = np.full(n, -np.inf, np.float32)
    masked[-1] = -3.0
    assert ops.argmax(masked) == n - 1
    masked[-1] = np.inf
    assert ops.argmax(masked) == n - 1


def test_argmax_of_nothing(isa: str) -> None:
    assert ops.argmax(np.empty(0, np.float32)) == -1


def test_kit_rounds_like_numpy_would() -> None:
    """The oracle's own bf16: exact values pass through, ties go to even, NaN stays NaN."""
    exact = from_bf16(np.arange(0, 0x7F80, dtype=np.uint16))
    assert np.array_equal(bf16(exact.astype(np.float32)), exact)
    middle = ((exact[:-1] + exact[1:]) / 2).astype(np.float32)
    even = to_bf16(middle)
    assert not (even & 1).any()
    assert np.isnan(bf16(np.array([np.nan], np.float32))).all()
