"""Weights of int8, int4 and FP8 with a scale per row or per group of columns, on every tier, by bf16 rows.

Tolerances. Products of a bf16 number and an integer up to 256, or a number of E4M3, are exact in float64. Their sum in f32
over a group of g columns is off by (g + 1) u S, the fma with the scale and the sum over G groups by (G + 1) u S more; an
offset is one more fma a group, and the sum of the row's own numbers: S then holds |x| (|u s| + |o|).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from ext.kit import U_F32, assert_close, bf16, build, chosen, memory, poison, put, rng, rows_batch, take
from ext.test_mxfp4 import FEW_ROWS, MANY_ROWS, int8_plan, quantised
from golden.harness import batch_of

from pace import ops
from pace.errors import CheckpointError
from pace.models import plan as ir
from pace.models.weight_formats import group_of

FORMATS = (
    "int8", "int8g16", "int8g32", "int8g64", "int8g128", "int4", "int4g32", "int4g64", "int4g128", "fp8", "fp8g128",
)  # fmt: skip
INTEGERS = tuple(name for name in FORMATS if name.startswith("int"))
KINDS = ("symmetric", "zeros", "offsets")
SCALES = ("f32", "f16", "bf16")
SIZE = {"f32": 4, "f16": 2, "bf16": 2}


@dataclass(frozen=True)
class Rows:
    """What `pack_groups` and `pack_fp8` take."""

    codes: Any
    bits: int
    group: int
    scales: Any
    offsets: Any = None

    def __getitem__(self, rows: slice) -> Rows:
        offsets = None if self.offsets is None else self.offsets[rows]
        return Rows(self.codes[rows], self.bits, self.group, self.scales[rows], offsets)


def e4m3() -> Any:
    """The value of each code."""
    code = np.arange(256)
    exponent, mantissa = code >> 3 & 15, code & 7
    value = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0))
    return np.where(code & 128, -value, value)


def random_rows(format: str, n: int, k: int, kind: str = "symmetric", scales: str = "f16") -> Rows:
    """Codes [n, k] over the whole range, the largest and the least in the first rows."""
    r = rng(format, n, k, kind, scales)
    group = group_of(format) or k
    shape = n, -(-k // group)
    s = (r.uniform(0.5, 1, shape) * 2.0 ** r.integers(-9, -5, shape)).astype(np.float32)
    s = (
        bf16(s).astype(np.float32)
        if scales == "bf16"
        else s.astype(np.float16 if scales == "f16" else np.float32)
    )
    s = s.astype(np.float32)
    if format.startswith("fp8"):
        codes = r.integers(0, 256, (n, k), np.uint8)
        codes[codes & 127 == 127] -= 1
        return Rows(codes, 8, group, s)
    bits = 4 if format.startswith("int4") else 8
    codes = r.integers(0, 1 << bits, (n, k), np.uint8)
    codes[0], codes[-1] = 0, (1 << bits) - 1
    if kind == "symmetric":
        return Rows(codes, bits, group, s)
    zeros = r.integers(0, 1 << bits, shape).astype(np.float32)
    offsets = -zeros * s if kind == "zeros" else r.standard_normal(shape).astype(np.float32)
    return Rows(codes, bits, group, s, offsets)


def matrix_of(team: ops.Team, format: str, rows: Rows) -> ops.PackedMatrix:
    n, k = rows.codes.shape
    matrix = ops.PackedMatrix(team, n, k, format=format)
    place(matrix, rows)
    return matrix


def place(matrix: ops.PackedMatrix, rows: Rows, **where: Any) -> None:
    if matrix.format.startswith("fp8"):
        matrix.pack_fp8(rows, **where)
    else:
        matrix.pack_groups(rows, **where)


def dense(format: str, rows: Rows) -> Any:
    """The weights, float64."""

    def wide(x: Any) -> Any:
        return np.repeat(x.astype(np.float64), rows.group, axis=1)[:, : rows.codes.shape[1]]

    if format.startswith("fp8"):
        return e4m3()[rows.codes] * wide(rows.scales)
    offsets = wide(rows.scales) * -(2.0 ** (rows.bits - 1)) if rows.offsets is None else wide(rows.offsets)
    return rows.codes * wide(rows.scales) + offsets


def cases() -> list[Any]:
    some = [(f, kind, "f16") for f in INTEGERS for kind in KINDS] + [(f, "symmetric", "f32") for f in FORMATS]
    return [pytest.param(*case, id="-".join(case)) for case in [*some, ("int4g32", "zeros", "bf16")]]


@pytest.mark.parametrize("isa", ops.isas())
@pytest.mark.parametrize(("format", "kind", "scales"), cases())
def test_packing_is_exact(isa: str, team: ops.Team, format: str, kind: str, scales: str) -> None:
    """Whatever n and k, in as few bytes as the numbers allow."""
    for n, k in ((1, 1), (17, 33), (40, 100), (33, 288)):
        rows = random_rows(format, n, k, kind, scales)
        with ops.using_isa(isa):
            matrix = matrix_of(team, format, rows)
            got = matrix.unpack()
        assert got.tobytes() == dense(format, rows).astype(np.float32).tobytes()
    panels, groups = 2, 3 if rows.group >= k else -(-288 // rows.group)
    if rows.group < k:
        size = 4 if kind == "offsets" else SIZE[scales]
        head = 32 * (size + {"symmetric": 0, "zeros": 2, "offsets": size}[kind])
        assert matrix.nbytes == panels * (groups * head + 288 * 32 * matrix.bits // 8)


def test_every_number_of_e4m3(kernel: str, team: ops.Team) -> None:
    """Subnormal ones and -0 among them, through the packed bytes and through a product."""
    codes = np.arange(256, dtype=np.uint8)
    codes[[127, 255]] = 0
    rows = Rows(codes[None].repeat(2, 0), 8, 256, np.ones((2, 1), np.float32))
    matrix = matrix_of(team, "fp8", rows)
    want = e4m3()[codes].astype(np.float32)
    assert matrix.unpack()[0].tobytes() == want.tobytes()
    slots = [ir.Slot("a", 256, "bf16", "tokens"), ir.Slot("c", 2, "f32", "tokens")]
    plan = build(team, [ir.Gemm("g", "a", "c", "w")], slots, {"w": matrix}, kernels=chosen(kernel))
    put(plan, "a", np.eye(256))
    poison(plan, "c")
    plan.step(rows_batch(256))
    assert np.array_equal(take(plan, "c", 256)[:, 1], want)


@pytest.mark.parametrize(
    ("format", "kind"),
    [(f, "symmetric") for f in FORMATS]
    + [(f, k) for f in ("int8g32", "int4", "int4g128") for k in KINDS[1:]],
)
def test_products_of_bf16_rows(kernel: str, team: ops.Team, format: str, kind: str) -> None:
    """Close to float64 at every m, and each row the same bytes at every m; k that divides by nothing among them."""
    for n, k in ((33, 544), (17, 100), (1, 31)):
        rows = random_rows(format, n, k, kind)
        slots = [ir.Slot("a", k, "bf16", "tokens"), ir.Slot("c", n, "f32", "tokens")]
        weights = {"w": matrix_of(team, format, rows)}
        plan = build(team, [ir.Gemm("g", "a", "c", "w")], slots, weights, kernels=chosen(kernel))
        x = rng("rows", k).standard_normal((300, k))
        a, w = bf16(x), dense(format, rows)
        groups = -(-k // min(rows.group, 256))
        size = (
            np.abs(w)
            if rows.offsets is None
            else np.abs(w) + 2 * np.abs(np.repeat(rows.offsets, rows.group, 1)[:, :k])
        )
        tolerance = (min(rows.group, k) + 2 * groups + 4) * U_F32 * (np.abs(a) @ size.T)
        whole = b""
        for m in sorted(FEW_ROWS if kernel == "reference" else MANY_ROWS, reverse=True):
            put(plan, "a", x[:m])
            poison(plan, "c")
            plan.step(rows_batch(m))
            got = take(plan, "c", m)
            if not whole:
                assert_close(got, a[:m] @ w.T, tolerance[:m])
                whole = got.tobytes()
            assert got.tobytes() == whole[: got.nbytes], f"{m} rows differ"


@pytest.mark.parametrize("format", ["int8", "int4", "fp8"])
@pytest.mark.parametrize("isa", ops.isas())
def test_more_rows_and_k_than_are_expanded_at_once(isa: str, team: ops.Team, format: str) -> None:
    """Columns with one scale, in chunks of 2048 k and blocks of 512 rows: close to float64, and the bytes of a row
    alone.
    """
    n, k, m = 33, 4200, 520
    rows = random_rows(format, n, k)
    slots = [ir.Slot("a", k, "bf16", "tokens"), ir.Slot("c", n, "f32", "tokens")]
    with ops.using_isa(isa):
        plan = build(
            team, [ir.Gemm("g", "a", "c", "w")], slots, {"w": matrix_of(team, format, rows)}, max_tokens=m
        )
    x = rng("rows", k).standard_normal((m, k))
    put(plan, "a", x)
    poison(plan, "c")
    plan.step(batch_of([([0] * (m // 2), 0, [0])] * 2))
    got = take(plan, "c", m)
    a, w = bf16(x), dense(format, rows)
    assert_close(got, a @ w.T, (k + 2 * -(-k // 256) + 4) * U_F32 * (np.abs(a) @ np.abs(w).T))
    for r in (0, 300, m - 1):
        put(plan, "a", x[r : r + 1])
        poison(plan, "c")
        plan.step(rows_batch(1))
        assert take(plan, "c", 1).tobytes() == got[r : r + 1].tobytes()


INT8_ROWS = [(f, kind) for f in ("int8", "int8g32", "int8g128", "int4g32", "int4g128") for kind in KINDS] + [
    ("int8g16", "symmetric"), ("int8g64", "zeros"), ("int4", "symmetric"), ("int4g64", "symmetric"),
]  # fmt: skip


@pytest.mark.parametrize(("format", "kind"), INT8_ROWS)
def test_products_of_int8_rows(kernel: str, team: ops.Team, format: str, kind: str) -> None:
    """Close to float64 at every m, and each row the same bytes at every m; the largest integers of one sign among them.

    A group's integers are exact, below 2^24 in groups and rounded once in whole rows; a product with the row's scale, an
    fma with the column's and one for its zero, and two products before that: (2 G + 4) u S.
    """
    for n, k in ((33, 544), (17, 96), (1, 32), (300, 1088)):
        rows = random_rows(format, n, k, kind)
        for group in (group_of(format),) if "g" in format else (0, 32, 128):
            plan = int8_plan(team, kernel, matrix_of(team, format, rows), group)
            x = rng("rows", k).standard_normal((300, k)) * 4
            x[1] = 100
            w = dense(format, rows)
            whole = b""
            for m in sorted(FEW_ROWS if kernel == "reference" else MANY_ROWS, reverse=True):
                put(plan, "a", x[:m])
                poison(plan, "c", "q")
                plan.step(rows_batch(m))
                got = take(plan, "c", m)
                if not whole:
                    q, scale, _ = quantised(memory(plan, "q")[:m], k, min(group or k, k))
                    a = q * np.repeat(scale.astype(np.float64), min(group or k, k), 1)[:, :k]
                    zeros = (
                        0 if rows.offsets is None else np.abs(np.repeat(rows.offsets, rows.group, 1)[:, :k])
                    )
                    size = np.abs(a) @ (np.abs(w) + 2 * zeros).T
                    assert_close(got, a @ w.T, (2 * scale.shape[1] + 4) * U_F32 * size)
                    whole = got.tobytes()
                assert got.tobytes() == whole[: got.nbytes], f"{m} rows differ"


@pytest.mark.parametrize(("format", "bits"), [("int8", 8), ("int8g128", 8), ("int4g128", 4), ("int4", 4)])
def test_the_largest_integers_do_not_saturate(kernel: str, team: ops.Team, format: str, bits: int) -> None:
    """255 and 255 times 127 and 127 in 16 bits would be 32767; -128 has no negative in 8 bits."""
    top, k = (1 << bits) - 1, 512
    codes = np.array([[0] * k, [top] * k, [0, top] * (k // 2)], np.uint8)
    group = group_of(format) or k
    plan = int8_plan(
        team,
        kernel,
        matrix_of(team, format, Rows(codes, bits, group, np.ones((3, k // group), np.float32))),
        group % k,
    )
    x = np.array([[127.0] * k, [-127.0] * k, [127.0, -127.0] * (k // 2), [1.0] + [0.0] * (k - 2) + [127.0]])
    put(plan, "a", x)
    plan.step(rows_batch(4))
    assert np.array_equal(take(plan, "c", 4), x @ (codes - 2.0 ** (bits - 1)).T)


@pytest.mark.parametrize("group", [16, 64, 128, 0])
def test_quantised_rows_of_any_group(kernel: str, team: ops.Team, group: int) -> None:
    """To the bit what float32 says, the last group shorter."""
    width = 416
    x = rng("quantise", group).standard_normal((9, width)) * 3
    x[3, 5], x[4, :128] = 1000, 0
    slots = [ir.Slot("a", width, "bf16", "tokens"), ir.Slot("q", width, "int8", "tokens", group=group)]
    plan = build(team, [ir.Quantise("g", "a", "q")], slots, kernels=chosen(kernel))
    a = put(plan, "a", x).astype(np.float32)
    poison(plan, "q")
    plan.step(rows_batch(9))
    size = group or width
    q, scales, sums = quantised(memory(plan, "q")[:9], width, size)
    for i, at in enumerate(range(0, width, size)):
        part, ints = a[:, at : at + size], q[:, at : at + size]
        want = np.abs(part).max(-1) / np.float32(127)
        assert scales[:, i].tobytes() == want.tobytes()
        steps = np.divide(part, want[:, None], out=np.zeros_like(part), where=want[:, None] > 0)
        assert np.array_equal(ints, np.rint(steps))
        assert np.array_equal(sums[:, i], -16 * ints.sum(-1, dtype=np.int32))


def test_gate_up_and_experts(team: ops.Team) -> None:
    """Parts of a gated matrix, of one of several."""
    rows = random_rows("int4g32", 2 * 40, 96, "zeros")
    matrix = ops.PackedMatrix(team, 2 * 48, 96, count=2, format="int4g32")
    for part, name in enumerate(("gate", "up")):
        matrix.pack_groups(rows[slice(40 * part, 40 * part + 40)], mode=name, matrix=1)
    want = dense("int4g32", rows).astype(np.float32)
    halves = matrix.unpack(1).reshape(3, 2, 16, 96)
    for part in range(2):
        got = halves[:, part].reshape(48, 96)
        assert np.array_equal(got[:40], want[40 * part : 40 * part + 40]) and not got[40:].any()
    assert not matrix.unpack(0).any()


@pytest.mark.parametrize(
    "second", [("symmetric", "f32"), ("zeros", "f16"), ("zeros", "f32"), ("offsets", "f16")]
)
def test_later_rows_that_need_wider_scales(team: ops.Team, second: tuple[str, str]) -> None:
    """The first rows keep their values bit for bit, whichever comes first."""
    for format in ("int4g32", "int8g64", "int8"):
        parts = [random_rows(format, 32, 160, "symmetric", "f16"), random_rows(format, 32, 160, *second)]
        for order in (parts, parts[::-1]):
            matrix = ops.PackedMatrix(team, 64, 160, format=format)
            for i, part in enumerate(order):
                matrix.pack_groups(part, at=32 * i)
            want = np.concatenate([dense(format, part).astype(np.float32) for part in order])
            assert matrix.unpack().tobytes() == want.tobytes()


def test_codes_of_four_bits_and_longer_groups_in_a_finer_matrix(team: ops.Team) -> None:
    """What a file mixes in one fused matrix goes into the finest of its forms."""
    parts = [random_rows("int4g64", 16, 128, kind) for kind in KINDS] + [random_rows("int8", 16, 128)]
    matrix = ops.PackedMatrix(team, 64, 128, format="int8g16")
    for i, part in enumerate(parts):
        matrix.pack_groups(part, at=16 * i)
    want = np.concatenate([dense("", part).astype(np.float32) for part in parts])
    assert matrix.unpack().tobytes() == want.tobytes()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_scales_and_offsets_that_are_no_numbers(team: ops.Team, value: float) -> None:
    for name in ("scales", "offsets"):
        rows = random_rows("int8g32", 40, 64, "offsets")
        getattr(rows, name)[33, 1] = value
        with pytest.raises(CheckpointError, match="row 33 has a scale or an offset that is no finite number"):
            matrix_of(team, "int8g32", rows)


def test_codes_that_are_none(team: ops.Team) -> None:
    rows = random_rows("int4g32", 40, 64)
    rows.codes[21, 63] = 16
    with pytest.raises(CheckpointError, match=r"row 21 .* or a code above 15"):
        matrix_of(team, "int4g32", rows)
    rows = random_rows("fp8", 40, 64)
    rows.codes[7, 9] = 255
    with pytest.raises(CheckpointError, match=r"row 7 .* or a NaN"):
        matrix_of(team, "fp8", rows)


def test_what_does_not_fit(team: ops.Team) -> None:
    rows = random_rows("int8g32", 8, 64)
    matrix = matrix_of(team, "int8g32", rows)
    for wrong, message in [
        (Rows(rows.codes, 8, 32, rows.scales[:7]), r"scales \[7, 2\], expected \[rows, 64\] and \[rows, 2\]"),
        (
            Rows(rows.codes, 8, 16, np.repeat(rows.scales, 2, 1)),
            "groups of 16 columns, the matrix has groups of 32",
        ),
        (Rows(rows.codes.view(np.int8), 8, 32, rows.scales), "codes are int8"),
        (Rows(rows.codes, 8, 32, rows.scales.astype(np.float64)), "scales float64"),
    ]:
        with pytest.raises(ValueError, match=message):
            matrix.pack_groups(wrong)
    with pytest.raises(ValueError, match="8 rows at 32 do not fit"):
        matrix.pack_groups(rows, at=32)
    with pytest.raises(ValueError, match="rows of 8-bit integers for a matrix of int4g32"):
        ops.PackedMatrix(team, 8, 64, format="int4g32").pack_groups(rows)
    with pytest.raises(ValueError, match="rows of 8-bit integers for a matrix of bf16"):
        ops.PackedMatrix(team, 8, 64).pack_groups(rows)
    with pytest.raises(ValueError, match="rows of FP8 for a matrix of int8g32"):
        matrix.pack_fp8(rows)


@pytest.mark.parametrize("format", ["int8", "int8g32", "int4g128", "fp8"])
def test_rows_of_a_table(kernel: str, team: ops.Team, format: str) -> None:
    """A tied embedding is the LM head's matrix, whatever its format."""
    rows = random_rows(format, 97, 272)
    table = matrix_of(team, format, rows)
    slots = [ir.Slot("x", 272, "f32", "tokens")]
    plan = build(team, [ir.Embed("e", "x", "w")], slots, {"w": table}, kernels=chosen(kernel))
    ids = [0, 96, 41]
    plan.step(rows_batch_of(ids))
    assert np.array_equal(plan.slot("x")[:3], dense(format, rows).astype(np.float32)[ids])


def rows_batch_of(ids: list[int]) -> ir.Batch:
    n = np.int32(len(ids))
    return ir.Batch(
        np.array(ids, np.int32),
        np.array([0, n], np.int32),
        np.array([n], np.int32),
        np.zeros((1, 1), np.int32),
        np.array([0], np.int32),
    )
