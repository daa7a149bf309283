"""MXFP4 weights: packing is exact, and a product with them is that with the dequantised matrix, on every tier.

On bf16 rows the weights become bf16, which loses nothing, so the bits must be those of the product with bf16 panels:
its tolerance (see test_gemm) is this one's.

On int8 rows a group's sum of integers is exact (below 2^24). Its product with the row's scale is rounded once, and once
more where it is added to the groups before: (k / 32 + 1) u S for S = sum |a| |w| of the quantised row.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from ext.kit import (
    U_F32,
    assert_close,
    bf16,
    build,
    chosen,
    memory,
    packed,
    poison,
    put,
    rng,
    rows_batch,
    take,
)

from pace import ops
from pace.errors import CheckpointError
from pace.models import plan as ir
from pace.reference import dequantise_mxfp4

U8 = np.uint8
MANY_ROWS = (*range(1, 41), 65, 300)
FEW_ROWS = (1, 2, 13, 33)


def random_mxfp4(n: int, k: int, *key: object) -> tuple[Any, Any]:
    """Blocks [n, k / 32, 16] of any codes, and scales [n, k / 32] within 2^10 of each other."""
    r = rng("mxfp4", n, k, *key)
    return r.integers(0, 256, (n, k // 32, 16), U8), r.integers(117, 128, (n, k // 32), U8)


def packed_mxfp4(team: ops.Team, blocks: Any, scales: Any) -> ops.PackedMatrix:
    matrix = ops.PackedMatrix(team, len(blocks), 32 * scales.shape[1], format="mxfp4")
    matrix.pack_mxfp4(blocks, scales)
    return matrix


def every_code(scale: int) -> tuple[Any, Any]:
    """Two groups of one row: every code in both nibbles of a byte; the second has the codes backwards."""
    codes = np.arange(16, dtype=U8)
    up = np.concatenate([codes[:8], codes[8:]]) | codes << 4
    return np.stack([up, up[::-1]])[None], np.full((1, 2), scale, U8)


@pytest.mark.parametrize("isa", ops.isas())
def test_every_code_and_scale_is_exact(isa: str, team: ops.Team) -> None:
    """0 .. 252 entirely; what is below 2^-126 is zero, as products take it, with its sign."""
    blocks = np.concatenate([every_code(0)[0]] * 253)
    scales = np.repeat(np.arange(253, dtype=U8)[:, None], 2, 1)
    want = dequantise_mxfp4(blocks, scales)
    want[np.abs(want) < 2.0**-126] *= 0.0
    with ops.using_isa(isa):
        got = packed_mxfp4(team, blocks, scales).unpack().astype(np.float64)
    assert got.tobytes() == want.tobytes()


@pytest.mark.parametrize(("scale", "largest"), [(253, 5), (254, 3)])
def test_large_scales_of_small_codes_are_exact(team: ops.Team, scale: int, largest: int) -> None:
    blocks, scales = every_code(scale)
    blocks = (
        np.minimum(blocks & 7, largest)
        | blocks & 8
        | np.minimum(blocks >> 4 & 7, largest) << 4
        | blocks & 128
    )
    got = packed_mxfp4(team, blocks, scales).unpack().astype(np.float64)
    assert got.tobytes() == dequantise_mxfp4(blocks, scales).tobytes()


@pytest.mark.parametrize(("scale", "code"), [(253, 6), (253, 14), (254, 4), (254, 12), (255, 0)])
def test_what_is_no_number_is_refused(team: ops.Team, scale: int, code: int) -> None:
    """255 is NaN in OCP MX, whatever the codes; 2^128 and more are beyond bf16. The row is named."""
    blocks, scales = np.zeros((40, 3, 16), U8), np.full((40, 3), 127, U8)
    blocks[37, 1, 5], scales[37, 1] = code << 4, scale
    with pytest.raises(
        CheckpointError, match=r"row 37 has a scale of 255, which is NaN, or a weight of 2\^128"
    ) as info:
        packed_mxfp4(team, blocks, scales)
    assert "\n" not in str(info.value)


def test_gate_and_up_of_alternating_rows(team: ops.Team) -> None:
    """gpt-oss has gate in the even rows and up in the odd ones: views with a stride, into one of several experts."""
    blocks, scales = random_mxfp4(2 * 40, 96)
    matrix = ops.PackedMatrix(team, 2 * 48, 96, count=3, format="mxfp4")
    for part, name in enumerate(("gate", "up")):
        matrix.pack_mxfp4(blocks[part::2], scales[part::2], mode=name, matrix=1)
    got, want = matrix.unpack(1), dequantise_mxfp4(blocks, scales)
    halves = got.reshape(3, 2, 16, 96)
    for part in range(2):
        rows = halves[:, part].reshape(48, 96)
        assert np.array_equal(rows[:40], want[part::2]) and not rows[40:].any()
    assert not matrix.unpack(0).any() and not matrix.unpack(2).any()
    assert matrix.nbytes == 3 * 4096 * -(-3 * 2 * 1088 // 4096)


def test_shapes_that_do_not_fit(team: ops.Team) -> None:
    with pytest.raises(ValueError, match=r"MXFP4 matrix is \[8, 48\], its rows must be whole groups of 32"):
        ops.PackedMatrix(team, 8, 48, format="mxfp4")
    with pytest.raises(
        ValueError, match="weight format is 'int3', expected one of bf16, mxfp4, int8, int8g16"
    ):
        ops.PackedMatrix(team, 8, 64, format="int3")
    blocks, scales = random_mxfp4(8, 64)
    matrix = packed_mxfp4(team, blocks, scales)
    for b, s, message in [
        (blocks[:, :1], scales, "blocks of 8 rows of 16 bytes"),
        (blocks, scales[:7], "scales of 7 rows"),
        (blocks[:0], scales[:0], "no rows"),
        (blocks.astype(np.int8), scales, "blocks are int8"),
        (blocks, scales[0], "scales are uint8"),
        (blocks[::-1], scales, "run backwards"),
    ]:
        with pytest.raises(ValueError, match=message):
            matrix.pack_mxfp4(b, s)
    with pytest.raises(ValueError, match="8 rows at 32 do not fit"):
        matrix.pack_mxfp4(blocks, scales, at=32)
    with pytest.raises(ValueError, match="expected its codes and scales"):
        matrix.pack(np.zeros((8, 64), np.float32), "f32")
    with pytest.raises(ValueError, match="for a matrix of another format"):
        ops.PackedMatrix(team, 8, 64).pack_mxfp4(blocks, scales)


def test_no_table_of_tokens(team: ops.Team) -> None:
    table = packed_mxfp4(team, *random_mxfp4(97, 64))
    with pytest.raises(TypeError, match="e: table w is mxfp4"):
        build(team, [ir.Embed("e", "x", "w")], [ir.Slot("x", 64, "f32", "tokens")], {"w": table})


@pytest.mark.parametrize("k", [32, 64, 96, 544, 1120])
@pytest.mark.parametrize("n", [1, 17, 33, 307])
def test_products(kernel: str, team: ops.Team, n: int, k: int) -> None:
    """At every m the bits of the product with the dequantised matrix, which is close to float64."""
    blocks, scales = random_mxfp4(n, k)
    w = dequantise_mxfp4(blocks, scales)
    weights = {"mx": packed_mxfp4(team, blocks, scales), "w": packed(team, w)}
    slots = [ir.Slot("a", k, "bf16", "tokens")] + [ir.Slot(c, n, "f32", "tokens") for c in ("c", "d")]
    gemms = [ir.Gemm("g", "a", "c", "mx"), ir.Gemm("h", "a", "d", "w")]
    plan = build(team, gemms, slots, weights, kernels=chosen(kernel))
    rows = FEW_ROWS if kernel == "reference" else MANY_ROWS
    x = rng("rows", k).standard_normal((max(rows), k))
    a = bf16(x)
    want, tolerance = a @ w.T, (k + 3) * U_F32 * (np.abs(a) @ np.abs(w).T)
    whole = b""
    for m in sorted(rows, reverse=True):
        put(plan, "a", x[:m])
        poison(plan, "c", "d")
        plan.step(rows_batch(m))
        got = take(plan, "c", m)
        if not whole:
            assert_close(got, want, tolerance)
            whole = got.tobytes()
        assert got.tobytes() == take(plan, "d", m).tobytes(), f"{m} rows: not those of bf16 panels"
        assert got.tobytes() == whole[: got.nbytes], f"{m} rows differ from {max(rows)}"


def quantised(bits: Any, width: int, group: int = 32) -> tuple[Any, Any, Any]:
    """Integers, scales and sums of int8 rows [rows, ld]: [rows, width], [rows, groups] twice."""
    order = np.array([0, 4, 1, 5, 2, 6, 3, 7])
    q = np.empty((len(bits), width // 8, 8), np.int8)
    q[:, :, order] = bits[:, :width].reshape(len(bits), -1, 8)
    half = 4 * -(-width // group)
    beside = np.ascontiguousarray(bits[:, width : width + 2 * half])
    scales, sums = beside[:, :half].copy().view(np.float32), beside[:, half:].copy().view(np.int32)
    return q.reshape(len(bits), width), scales, sums


def quantise_plan(team: ops.Team, kernel: str, width: int) -> ops.Plan:
    slots = [ir.Slot("a", width, "bf16", "tokens"), ir.Slot("q", width, "int8", "tokens")]
    return build(team, [ir.Quantise("g", "a", "q")], slots, kernels=chosen(kernel))


@pytest.mark.parametrize("width", [32, 64, 416])
def test_quantised_rows(kernel: str, team: ops.Team, width: int) -> None:
    """To the bit what float32 says, of rows with any spread, one outlier, ties, and zeros."""
    r = rng("quantise", width)
    x = r.standard_normal((9, width)) * 10.0 ** r.uniform(-9, 9, (9, width // 32)).repeat(32, 1)
    x[3, 5] *= 1000
    x[4, :32] = 0
    x[5, :32] = np.arange(32) - 15.5  # amax 15.5: many halves of 127 / 31
    plan = quantise_plan(team, kernel, width)
    a = put(plan, "a", x).astype(np.float32).reshape(9, -1, 32)
    poison(plan, "q")
    plan.step(rows_batch(9))
    whole = memory(plan, "q")
    q, scales, sums = quantised(whole[:9], width)
    want = np.abs(a).max(-1) / np.float32(127)
    assert scales.tobytes() == want.tobytes()
    steps = np.divide(a, want[..., None], out=np.zeros_like(a), where=want[..., None] > 0)
    assert np.array_equal(q, np.rint(steps).reshape(9, width))
    assert np.array_equal(sums, -16 * q.reshape(9, -1, 32).sum(-1, dtype=np.int32))
    assert (whole[:9, width + width // 4 :] == -128).all() and (whole[9:] == -128).all(), (
        "wrote beside the rows"
    )


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_group_with_no_number_has_no_scale(kernel: str, team: ops.Team, value: float) -> None:
    """Its row's products are NaN, nobody else's."""
    blocks, scales = random_mxfp4(20, 96)
    plan = int8_plan(team, kernel, packed_mxfp4(team, blocks, scales))
    x = rng("nan").standard_normal((9, 96))
    put(plan, "a", x)
    plan.step(rows_batch(9))
    clean = take(plan, "c", 9)
    x[4, 40] = value
    put(plan, "a", x)
    poison(plan, "c")
    plan.step(rows_batch(9))
    got = take(plan, "c", 9)
    assert np.isnan(got[4]).all()
    assert np.delete(got, 4, 0).tobytes() == np.delete(clean, 4, 0).tobytes()


def int8_plan(team: ops.Team, kernel: str, matrix: ops.PackedMatrix, group: int = 32) -> ops.Plan:
    slots = [
        ir.Slot("a", matrix.k, "bf16", "tokens"),
        ir.Slot("q", matrix.k, "int8", "tokens", group=group),
        ir.Slot("c", matrix.n, "f32", "tokens"),
    ]
    chain: list[ir.Op] = [ir.Quantise("g", "a", "q"), ir.Gemm("h", "q", "c", "w")]
    plan = build(team, chain, slots, {"w": matrix}, kernels=chosen(kernel))
    poison(plan, "c")
    return plan


@pytest.mark.parametrize("k", [32, 64, 96, 544, 1120])
@pytest.mark.parametrize("n", [1, 17, 33, 307])
def test_products_of_int8_rows(kernel: str, team: ops.Team, n: int, k: int) -> None:
    """Close to float64 at every m, and each row the same bytes at every m."""
    blocks, scales = random_mxfp4(n, k)
    w = dequantise_mxfp4(blocks, scales)
    plan = int8_plan(team, kernel, packed_mxfp4(team, blocks, scales))
    rows = FEW_ROWS if kernel == "reference" else MANY_ROWS
    x = rng("rows", k).standard_normal((max(rows), k)) * 4
    x[1] = 100 * np.where(np.arange(k) % 2, 1, -1)  # the largest integers there are
    whole = b""
    for m in sorted(rows, reverse=True):
        put(plan, "a", x[:m])
        poison(plan, "c", "q")
        plan.step(rows_batch(m))
        got = take(plan, "c", m)
        if not whole:
            q, scale, _ = quantised(memory(plan, "q")[:m], k)
            a = q * scale.astype(np.float64).repeat(32, 1)
            assert_close(got, a @ w.T, (k // 32 + 1) * U_F32 * (np.abs(a) @ np.abs(w).T))
            whole = got.tobytes()
        assert got.tobytes() == whole[: got.nbytes], f"{m} rows differ from {max(rows)}"


def test_sums_of_the_largest_integers_do_not_saturate(kernel: str, team: ops.Team) -> None:
    """vpmaddubsw adds pairs in 16 bits: every weight 6 or -6, every integer 127 or -127, all products of one sign."""
    k, signs = 64, rng("signs").choice([-1, 1], (8, 64))
    codes = np.where(signs < 0, 15, 7).astype(U8)
    blocks = (codes[:, 0::2] | codes[:, 1::2] << 4).reshape(8, k // 32, 16)
    plan = int8_plan(team, kernel, packed_mxfp4(team, blocks, np.full((8, k // 32), 127, U8)))
    put(plan, "a", np.concatenate([signs, -signs]) * 127.0)
    plan.step(rows_batch(16))
    got = take(plan, "c", 16)
    want = np.concatenate([signs, -signs]) * 127.0 @ (6.0 * signs.T)
    assert np.array_equal(got, want)
    assert got.max() == 6 * 127 * k and got.min() == -got.max()


def test_int8_rows_want_mxfp4(team: ops.Team) -> None:
    slots = [ir.Slot("q", 64, "int8", "tokens"), ir.Slot("c", 8, "f32", "tokens")]
    with pytest.raises(TypeError, match="h: int8 rows times weight w in bf16, expected mxfp4, int8 or int4"):
        build(team, [ir.Gemm("h", "q", "c", "w")], slots, {"w": packed(team, np.ones((8, 64)))})
    with pytest.raises(ValueError, match="slot of 48 columns of int8: int8 wants whole groups of 32"):
        build(team, [], [ir.Slot("q", 48, "int8", "tokens"), ir.Slot("c", 8, "f32", "tokens")])


@pytest.mark.live
def test_transformers_reads_the_same(team: ops.Team) -> None:
    """Every code with every scale whose values are normal numbers."""
    torch = pytest.importorskip("torch")
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    blocks = np.concatenate([every_code(0)[0]] * 251)
    scales = np.repeat(np.arange(2, 253, dtype=U8)[:, None], 2, 1)
    theirs = mxfp4._convert_moe_packed_tensors(torch.from_numpy(blocks)[None], torch.from_numpy(scales)[None])
    want = theirs[0].T.float().numpy()  # [n, k]; theirs is [1, k, n]
    got = packed_mxfp4(team, blocks, scales).unpack()
    assert got.tobytes() == np.ascontiguousarray(want).tobytes()
