"""What the dense families ask of the operators beyond a Llama, on every tier against the exact float64 reference.

Tolerances. A result stored as bf16 is off by 2^-8 of itself; f32 arithmetic by a few 2^-24 of the largest number that
goes into a result, which `floor` counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from ext.kit import (
    U_BF16,
    U_F32,
    Array,
    Beside,
    assert_close,
    bf16,
    build,
    chosen,
    poison,
    rng,
    take,
    to_bf16,
)
from golden.harness import batch_of

from pace import ops
from pace.errors import ConfigError
from pace.models import plan as ir

STEPS = [
    batch_of([([5, 1, 9, 9], 0, [3, 7])]),
    batch_of([([4], 4, [3, 7]), ([8, 8, 2, 11, 30], 0, [1])]),
    batch_of([([7] * 14, 5, [3, 7]), ([96], 5, [1])]),
]


def slot(name: str, width: int, dtype: ir.Dtype = "f32", rows: ir.Rows = "tokens") -> ir.Slot:
    return ir.Slot(name, width, dtype, rows)


def check_rows(pair: Beside, name: str, unit: float, floor: float) -> None:
    """Every step: |got - want| <= unit |want| + floor * the largest."""
    for batch in STEPS:
        pair.step(batch)
        want = pair.want(name)
        assert_close(
            pair.got(name, batch.n_tokens), want, unit * np.abs(want) + floor * (np.abs(want).max() + 1)
        )


# ---- embedding --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 17, 256, 300])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_embed_with_positions(kernel: str, team: ops.Team, width: int, dtype: ir.Dtype) -> None:
    """Tokens, positions from row 2 on, a factor on both; and positions alone."""
    tables = {"w": rng("w").standard_normal((97, width)), "p": rng("p").standard_normal((40, width))}
    unit = U_BF16 if dtype == "bf16" else 0.0
    op = ir.Embed("e", "x", "w", 2.5, "p", 40, offset=2, post=0.7)
    check_rows(Beside(team, kernel, [op], {}, [slot("x", width, dtype)], tables), "x", unit, 16 * U_F32)
    op = ir.Embed("e", "x", None, positions="p", n_positions=40, offset=1)
    pair = Beside(team, kernel, [op], {}, [slot("x", width, dtype)], {"p": tables["p"]})
    check_rows(pair, "x", 0.0, 0.0)


def test_embed_adds(kernel: str, team: ops.Team) -> None:
    """post * (dst + scale * row), what per-layer inputs are made of."""
    w = {"w": rng("w").standard_normal((97, 40))}
    operators: list[ir.Op] = [
        ir.Embed("e", "x", "w", 16.0, add=True, post=0.70710678),
        ir.Norm("n", "x", "y", None, kind="none"),
    ]
    check_rows(Beside(team, kernel, operators, {"x": 40}, [slot("y", 40)], w), "y", 0.0, 16 * U_F32)


@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
@pytest.mark.parametrize("width", [1, 15, 300])
def test_embed_from_a_mapped_table(kernel: str, team: ops.Team, width: int, dtype: str) -> None:
    """The rows as they are, unrounded; the last row ends where the memory does."""
    rows = rng("mapped", width).standard_normal((97, width)).astype(np.float32)
    forms: dict[str, npt.NDArray[Any]]
    forms = {"bf16": to_bf16(rows), "f16": rows.astype(np.float16), "f32": rows}
    given = forms[dtype]
    held = bf16(rows) if dtype == "bf16" else given.astype(np.float64)
    op = ir.Embed("e", "x", "w", mapped=True)
    plan = build(team, [op], [slot("x", width)], {"w": ops.MappedTable(given, dtype)}, kernels=chosen(kernel))
    poison(plan, "x")
    plan.step(batch_of([([96, 0, 50], 0, [0])]))
    assert np.array_equal(take(plan, "x", 3), held[[96, 0, 50]])


def test_a_position_beyond_the_table_is_refused(team: ops.Team) -> None:
    op = ir.Embed("e", "x", None, positions="p", n_positions=10, offset=2)
    pair = Beside(team, "", [op], {}, [slot("x", 8)], {"p": np.ones((10, 8))})
    pair.kernels.step(batch_of([([1] * 8, 0, [0])]))
    with pytest.raises(ValueError, match="length 9, the model has 8 positions"):
        pair.kernels.step(batch_of([([1], 8, [0])]))


# ---- norms ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["rms", "rms1", "layer", "none"])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize(("width", "groups"), [(96, 3), (85, 5), (64, 1)])
def test_norm_in_groups(
    kernel: str, team: ops.Team, kind: ir.NormKind, weighted: bool, width: int, groups: int
) -> None:
    """With and without weights, times a stored scalar, in place."""
    weighted = weighted and kind != "none"
    w = {"w": rng("w").standard_normal(width // groups), "s": np.array([0.37])}
    op = ir.Norm("n", "x", "x", "w" if weighted else None, kind=kind, groups=groups, scale="s")
    pair = Beside(
        team, kernel, [op, ir.Norm("y", "x", "y", None, kind="none")], {"x": width}, [slot("y", width)], w
    )
    check_rows(pair, "y", (width / 8 + 16) * U_F32, 16 * U_F32)


def test_norm_adds_then_scales(kernel: str, team: ops.Team) -> None:
    w = {"w": rng("w").standard_normal(50), "s": np.array([1.7])}
    operators = [ir.Norm("n", "x", "r", "w", add=True, scale="s"), ir.Norm("y", "r", "y", None, kind="none")]
    pair = Beside(team, kernel, operators, {"x": 50, "r": 50}, [slot("y", 50, "bf16")], w)
    check_rows(pair, "y", U_BF16, 32 * U_F32)


# ---- GEMM -------------------------------------------------------------------------------------------------


def gemm(
    team: ops.Team, kernel: str, op: ir.Gemm, k: int, dst: ir.Slot, w: dict[str, Array], **more: int
) -> Beside:
    """`op` on a bf16 copy of an f32 input of width k."""
    copy = ir.Norm("copy", "x", "a", None, kind="none")
    return Beside(team, kernel, [copy, op], {"x": k, **more}, [slot("a", k, "bf16"), dst], w)


@pytest.mark.parametrize("act", ["relu2", "quick_gelu", "gelu", None])
@pytest.mark.parametrize(("n", "k"), [(40, 33), (16, 100), (7, 456)])
def test_gemm_product(kernel: str, team: ops.Team, n: int, k: int, act: ir.Activation | None) -> None:
    """act(y) times columns of another slot, with bias; sums are of k terms."""
    w = {"w": rng("w").standard_normal((n, k)), "b": rng("b").standard_normal(n)}
    op = ir.Gemm("g", "a", "y", "w", "b", "mul", act, 0.5, other="z", at=3)
    check_rows(gemm(team, kernel, op, k, slot("y", n, "bf16"), w, z=n + 5), "y", U_BF16, 8 * k * U_F32)


@pytest.mark.parametrize("scale", [1.0, 0.2])
def test_gemm_cap(kernel: str, team: ops.Team, scale: float) -> None:
    """30 tanh(x / 30) is within 2^-23 of 30 by its own error."""
    w = {"w": 4 * rng("w").standard_normal((70, 64))}
    op = ir.Gemm("g", "a", "y", "w", scale=scale, cap=30.0)
    check_rows(gemm(team, kernel, op, 64, slot("y", 70), w), "y", 0.0, 64 * U_F32)


@pytest.mark.parametrize("act", ["relu", "relu2", "quick_gelu", "gelu_tanh"])
def test_gemm_without_gate(kernel: str, team: ops.Team, act: ir.Activation) -> None:
    w = {"w": 0.3 * rng("w").standard_normal((33, 50)), "b": rng("b").standard_normal(33)}
    op = ir.Gemm("g", "a", "y", "w", "b", act=act)
    check_rows(gemm(team, kernel, op, 50, slot("y", 33, "bf16"), w), "y", U_BF16, 256 * U_F32)


@pytest.mark.parametrize(("width", "k"), [(456, 48), (7, 100), (20, 33)])
def test_gated_of_any_width(team: ops.Team, kernel: str, width: int, k: int) -> None:
    """The last block of 16 is filled with zeros, and the next product, of `width` terms, sees none of it."""
    fused = np.zeros((-(-width // 16) * 32, k))
    parts = rng("gated", width).standard_normal((2, width, k)) * k**-0.5
    fused[ir.gated_rows(width, "gate")], fused[ir.gated_rows(width, "up")] = parts
    w = {"w": fused, "d": rng("down").standard_normal((24, width))}
    operators: list[ir.Op] = [
        ir.Norm("copy", "x", "a", None, kind="none"),
        ir.Gemm("g", "a", "h", "w", epilogue="gated", act="silu"),
        ir.Gemm("d", "h", "y", "d"),
    ]
    slots = [slot("a", k, "bf16"), slot("h", width, "bf16"), slot("y", 24)]
    # h is rounded to bf16 before the sum of `width` terms of either sign.
    check_rows(Beside(team, kernel, operators, {"x": k}, slots, w), "y", 0.0, 8 * U_BF16)


# ---- rotation ---------------------------------------------------------------------------------------------

HALVES = ir.Rope((1e4 ** -(np.arange(0, 32, 2) / 32)).astype(np.float32), 1.0, False, 32)
PAIRS = ir.Rope((1e4 ** -(np.arange(0, 20, 2) / 20)).astype(np.float32), 1.2, True, 20)
WIDE = ir.Rope((1e4 ** -(np.arange(0, 100, 2) / 100)).astype(np.float32), 1.0, False, 100)

VARIANTS: dict[str, tuple[dict[str, Any], int, int]] = {  # fields, head_dim, of which not padding
    "plain": ({}, 48, 48),
    "full-width": ({"qk_norm": "rms", "norm_scope": "full"}, 48, 48),
    "full-width-after": ({"qk_norm": "rms", "norm_scope": "full", "norm_after_rope": True}, 48, 48),
    "full-width-layer-after": ({"qk_norm": "layer", "norm_scope": "full", "norm_after_rope": True}, 48, 48),
    "own-weights": ({"qk_norm": "layer", "norm_scope": "head_own"}, 48, 48),
    "after": ({"qk_norm": "rms1", "norm_after_rope": True}, 48, 48),
    "values": ({"v_norm": True}, 48, 48),
    "keys-are-values": ({"k_is_v": True, "v_norm": True, "qk_norm": "rms"}, 48, 48),
    "warm": ({"temperature": (0.3, 4.0, 1.0), "qk_norm": "rms"}, 48, 48),
    "interleaved": ({"rope": 1}, 48, 48),
    "padded": ({"rope": 2, "qk_norm": "rms", "v_norm": True}, 112, 100),
    "padded-layer": ({"rope": 2, "qk_norm": "layer", "norm_scope": "full"}, 112, 100),
    "padded-layer-after": ({"rope": 2, "qk_norm": "layer", "norm_after_rope": True}, 112, 100),
    "wide": ({"qk_norm": "rms"}, 512, 512),
}


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_rope_variants(kernel: str, team: ops.Team, variant: str, weighted: bool) -> None:
    """q as stored, and k and v through an attention that sees one token (v) or all of them (k)."""
    fields, d, width = VARIANTS[variant]
    h, g = 4, 2
    own = fields.get("norm_scope", "head") != "head"
    used = np.arange(d) < width
    weights: dict[str, Array] = {
        "qn": np.tile(used, h if own else 1) * rng("qn").standard_normal((h if own else 1) * d),
        "kn": np.tile(used, g if own else 1) * rng("kn").standard_normal((g if own else 1) * d),
    }
    has = weighted and fields.get("qk_norm", "none") != "none"
    rope = ir.RopeKV(
        "r", "x", "q", h, 0, norm_width=width, norm_eps=1e-3, q_norm="qn" if has else None,
        k_norm="kn" if has else None, **{"rope": 0, **fields},
    )  # fmt: skip
    n = h + g * (1 if rope.k_is_v else 2)
    x = np.where(np.tile(used, n), rng("x").standard_normal((97, n * d)), 0)
    one, every = (
        ir.Attention(o, "q", o, h, 0, width**-0.5, window=w) for o, w in (("one", 1), ("every", None))
    )
    slots = [slot(name, h * d, "bf16") for name in ("q", "one", "every")]
    pair = Beside(
        team, kernel, [rope, one, every], {"x": n * d}, slots, weights, (ir.KVLayer(g, d),), (HALVES, PAIRS, WIDE),
        tables={"in.x": x},
    )  # fmt: skip
    for batch in STEPS:
        pair.step(batch)
        rows = batch.n_tokens
        for name, unit in (("q", U_BF16), ("one", 2 * U_BF16), ("every", 2 * U_BF16)):
            want = pair.want(name)
            # Scores of a few units are off by 2^-8 of themselves where q and k were rounded.
            floor = 64 * U_F32 if name == "q" else 4 * U_BF16 if name == "every" else 0.0
            top = np.abs(want).reshape(rows, h, d).max(-1, keepdims=True)
            limit = unit * np.abs(want).reshape(rows, h, d) + floor * top
            assert_close(pair.got(name, rows), want, limit.reshape(want.shape))
        padding = np.tile(~used, h)
        assert not pair.got("every", rows)[:, padding].any() and not pair.got("q", rows)[:, padding].any()


def test_bits_of_rope_do_not_depend_on_the_company(isa: str, team: ops.Team) -> None:
    """A norm over all heads, behind the rotation: alone, in one step, among others."""
    rope = ir.RopeKV(
        "r",
        "x",
        "q",
        4,
        0,
        0,
        qk_norm="rms",
        norm_scope="full",
        norm_after_rope=True,
        temperature=(0.1, 8.0, 0.0),
    )
    slots = [slot("q", 192, "bf16")]

    def run(parts: Sequence[tuple[list[int], int, list[int]]], row: int) -> bytes:
        pair = Beside(team, "", [rope], {"x": 8 * 48}, slots, kv=(ir.KVLayer(2, 48),), ropes=(HALVES,))
        pair.kernels.step(batch_of(parts))
        values: bytes = pair.kernels.slot("q")[row].tobytes()
        return values

    alone = run([([7], 40, [0, 1, 2])], 0)
    assert alone == run([([3, 4, 7, 5], 38, [0, 1, 2]), ([1] * 60, 0, [4, 5, 6, 7])], 2)
    assert alone == run([([1] * 33, 2, [4, 5, 6]), ([9] * 40 + [7], 0, [0, 1, 2])], 73)


# ---- layers that share, rows that nobody needs, groups of layers ---------------------------------------------


def two_layers(second_rows: ir.Rows) -> tuple[list[ir.Op], list[ir.Slot]]:
    """A windowed layer of 2 heads of 32, a full one of 1 head of 64, and a third that reads the second's cache; it runs on
    the given rows."""
    operators: list[ir.Op] = [
        ir.RopeKV("r0", "x0", "q0", 4, 0, 0),
        ir.Attention("a0", "q0", "o0", 4, 0, 0.2, window=20),
        ir.RopeKV("r1", "x1", "q1", 4, 1, 0),
        ir.Attention("a1", "q1", "o1", 4, 1, 0.2),
    ]
    slots = [
        slot("q0", 128, "bf16"),
        slot("o0", 128, "bf16"),
        slot("q1", 256, "bf16"),
        slot("o1", 256, "bf16"),
    ]
    source = "x2"
    if second_rows == "logits":
        operators.append(ir.Select("s", "x2", "x3"))
        slots.append(slot("x3", 256, rows="logits"))
        source = "x3"
    operators += [
        ir.RopeKV("r2", source, "q2", 4, 1, 0, append=False),
        ir.Attention("a2", "q2", "o2", 4, 1, 0.2),
    ]
    return operators, [*slots, *(slot(name, 256, "bf16", second_rows) for name in ("q2", "o2"))]


LAYERS = (ir.KVLayer(2, 32, reach=20), ir.KVLayer(1, 64))
INPUTS = {"x0": 8 * 32, "x1": 6 * 64, "x2": 4 * 64}


def grouped(batch: ir.Batch, *tables: Array) -> ir.Batch:
    return ir.Batch(batch.token_ids, batch.q_start, batch.kv_len, tables, batch.logit_rows)


def run_layers(
    team: ops.Team, kernel: str, rows: ir.Rows, freed: int, cuts: Sequence[int]
) -> dict[str, bytes]:
    """Two sequences of 70 and 9 tokens, fed in pieces that end at `cuts`; bits of the last step's last rows.

    Args:
        freed: what stands in the windowed layer's table where nobody looks any more.
    """
    operators, slots = two_layers(rows)
    pair = Beside(team, kernel, operators, INPUTS, slots, kv=LAYERS, ropes=(HALVES,))
    tokens = rng("tokens").integers(0, 97, 70).tolist()
    for begin, end in zip([0, *cuts[:-1]], cuts, strict=True):
        others = ([1, 2, 3], 0, [9]) if begin == 0 else ([4], 3, [9])
        n = end - begin
        logit_rows = [n - 1, n + len(others[0]) - 1]
        batch = batch_of([(tokens[begin:end], begin, [1, 2, 3, 4, 5]), others], logit_rows)
        windowed = np.array([[11, 12, 13, 14, 15], [8, 0, 0, 0, 0]], np.int32)
        windowed[0, : max(0, begin - 20 + 1) // 32 * 2] = freed
        batch = grouped(batch, windowed, np.asarray(batch.tables[0]))
        pair.step(batch)
    last = end - begin - 1
    found = {}
    for name in ("o0", "o1", "o2"):
        got, want = (
            pair.got(name, batch.n_tokens)[: 2 if rows == "logits" and name == "o2" else None],
            pair.want(name),
        )
        top = np.abs(want).max(-1, keepdims=True)
        assert_close(got, want, 8 * U_BF16 * top)
        row = 0 if rows == "logits" and name == "o2" else last
        found[name] = pair.kernels.slot(name)[row].tobytes()
    return found


def test_groups_of_layers(kernel: str, team: ops.Team) -> None:
    """One table per group; what a window has left behind is never looked at; layers share and skip rows; and none of it,
    nor how the prompt was cut, changes a bit."""
    whole = run_layers(team, kernel, "tokens", 0, [69, 70])
    assert whole == run_layers(team, kernel, "tokens", -7, [69, 70])
    assert whole == run_layers(team, kernel, "logits", 1 << 30, [69, 70])
    assert whole == run_layers(team, kernel, "logits", -1, [40, 60, 69, 70])
    assert whole == run_layers(team, kernel, "tokens", 9, [33, 66, 70])


def test_groups_need_their_tables_and_pools(team: ops.Team) -> None:
    operators, slots = two_layers("tokens")
    pair = Beside(team, "", operators, INPUTS, slots, kv=LAYERS, ropes=(HALVES,))
    batch = batch_of([([1] * 60, 0, [0, 1, 2, 3])])
    full = np.asarray(batch.tables[0])
    with pytest.raises(ValueError, match="1 block tables for 2 groups of layers"):
        pair.kernels.step(batch)
    # The first row sees everything, so does the check; a later step's sees from position 32 on.
    with pytest.raises(ValueError, match="sequence 0 names block 99 of 16"):
        pair.kernels.step(grouped(batch, np.array([[99, 1, 2, 3]], np.int32), full))
    pair.kernels.step(grouped(batch, full, full))
    later = batch_of([([1], 60, [0, 1, 2, 3])])
    pair.kernels.step(grouped(later, np.array([[99, -1, 2, 3]], np.int32), full))
    with pytest.raises(ValueError, match="sequence 0 names block 99 of 16"):
        pair.kernels.step(grouped(later, np.array([[0, 1, 99, 3]], np.int32), full))
    one = ops.KVPool(2, 2, 32, 4, 16)
    with pytest.raises(
        ConfigError, match=r"KV pool of 2 layers of 2 heads of 32; the plan has .*\(2, 1, 64\), \(2, 2, 32\)"
    ):
        ops.Plan(team, pair.plan, {}, one, 8, 2, 8)
    with pytest.raises(ConfigError, match="3 KV pools for 2 groups of layers"):
        ops.Plan(team, pair.plan, {}, [one] * 3, 8, 2, 8)


@pytest.mark.parametrize("contiguous", [False, True])
def test_a_table_that_slid_may_begin_before_the_pool(team: ops.Team, contiguous: bool) -> None:
    """A windowed extent keeps its last blocks: block 0 of a sequence of 6 blocks would be block -3."""
    layer = ir.KVLayer(1, 16, reach=17)
    shape = ir.Plan(
        {s.name: s for s in (slot("x", 48), slot("q", 16, "bf16"), slot("o", 16, "bf16"))},
        (ir.RopeKV("r", "x", "q", 1, 0), ir.Attention("a", "q", "o", 1, 0, 0.3, window=17)),
        (),
        (layer,),
        97,
        8,
        "o",
    )
    outputs = []
    for slid in (False, True):
        pool = ops.KVPool(1, 1, 16, 8, 16, contiguous=contiguous)
        plan = ops.Plan(team, shape, {}, [pool], 128, 2, 128)
        plan.slot("x")[:90] = rng("slid").standard_normal((90, 48))
        plan.step(batch_of([([1] * 90, 0, [0] if contiguous else [0, 1, 2, 3, 4, 5])]))
        table = [0] if contiguous else [0, 1, 2, 3, 4, 5]
        if slid:  # blocks 4 and 5 move to 1 and 2
            for block in (4, 5):
                pool.copy(block, block - 3, 16)
            table = [-3] if contiguous else [77, 77, 77, 77, 1, 2]
        plan.slot("x")[:1] = 0.5
        plan.step(batch_of([([1], 90, table)]))
        outputs.append(plan.slot("o")[0].tobytes())
    assert outputs[0] == outputs[1]
