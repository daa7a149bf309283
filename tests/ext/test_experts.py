"""A mixture of experts: who is chosen, what it weighs, and the two products, on every tier, against float64.

Tolerance. Weights: exp, its sum and a quotient are good to a few units each, 2^-20 in all. Products as in test_gemm: a
sum of k products is off by (k + 2) u S; the clamped activation stretches that by its slope, at most alpha + 1 in gate
and 1 in up at these sizes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from ext.kit import (
    F64,
    U_BF16,
    U_F32,
    assert_close,
    bf16,
    build,
    chosen,
    memory,
    poison,
    put,
    rng,
    rows_batch,
    take,
)
from ext.test_mxfp4 import quantised, random_mxfp4

from pace import ops
from pace.models import plan as ir
from pace.reference import activate, route, split_gated

WEIGHT_ERROR = 2.0**-20

ROUTES = {
    "softmax": {"order": "softmax"},
    "softmax-renormalised": {"order": "softmax", "renormalise": True},
    "chosen": {"order": "chosen"},
    "sigmoid": {"order": "sigmoid"},
    "sigmoid-choice": {"order": "sigmoid", "choice": "choice", "renormalise": True, "scale": 2.5},
    "groups": {
        "order": "sigmoid",
        "choice": "choice",
        "n_groups": 4,
        "top_groups": 2,
        "renormalise": True,
    },
    "own-scale": {"order": "softmax", "renormalise": True, "expert_scale": "own"},
}


def router(team: ops.Team, kernel: str, n_experts: int, top_k: int, **options: Any) -> ops.Plan:
    r = rng("router", n_experts)
    op = ir.Route("r", "l", "route", top_k, **options)
    slots = [ir.Slot("l", n_experts, "f32", "tokens"), ir.Slot("route", 2 * top_k, "f32", "tokens")]
    # Larger than any score: the choice must not weigh.
    vectors = {
        "choice": (4 * r.standard_normal(n_experts)).astype(np.float32),
        "own": r.uniform(0.5, 2, n_experts).astype(np.float32),
    }
    return build(team, [op], slots, vectors, kernels=chosen(kernel))


def routed(plan: ops.Plan, logits: Any) -> tuple[F64, F64]:
    """Numbers and weights of the rows' experts."""
    put(plan, "l", logits)
    poison(plan, "route")
    plan.step(rows_batch(len(logits)))
    ids, weights = np.split(take(plan, "route", len(logits)), 2, axis=1)
    return ids, weights


@pytest.mark.parametrize("shift", [0.0, -30.0, 30.0])
@pytest.mark.parametrize("options", ROUTES.values(), ids=ROUTES)
@pytest.mark.parametrize(("n_experts", "top_k"), [(4, 1), (4, 2), (32, 4), (60, 8), (128, 8), (8, 4)])
def test_routes(
    kernel: str, team: ops.Team, n_experts: int, top_k: int, options: dict[str, Any], shift: float
) -> None:
    """Shifted far down or up: all logits negative, sigmoids at 0 or 1."""
    if n_experts // options.get("n_groups", 1) < 2:
        pytest.skip("groups of one")
    plan = router(team, kernel, n_experts, top_k, **options)
    logits = rng("logits", n_experts).standard_normal((37, n_experts)).astype(np.float32) + np.float32(shift)
    ids, weights = routed(plan, logits)
    op = plan.ir.ops[0]
    assert isinstance(op, ir.Route)
    choice = plan._weights["choice"] if op.choice else None
    assert choice is None or isinstance(choice, np.ndarray)
    want_ids, want = route(op, logits.astype(np.float64), choice)
    if shift <= 0 or op.choice is None:  # at 30 sigmoids are equal in f32, and biases decide both ways
        assert (ids == want_ids).all()
    if op.expert_scale is not None:
        want = want * np.asarray(plan._weights["own"], np.float64)[want_ids]
    if (ids == want_ids).all():
        assert_close(weights, want, WEIGHT_ERROR * want)


@pytest.mark.parametrize("order", ["softmax", "chosen", "sigmoid"])
def test_ties_go_to_the_lower_number(kernel: str, team: ops.Team, order: ir.RouterOrder) -> None:
    plan = router(team, kernel, 16, 4, order=order)
    logits = np.zeros((3, 16), np.float32)
    logits[1, [3, 9]] = 1
    logits[2] = -np.float32(3.0)
    ids, _ = routed(plan, logits)
    assert ids.tolist() == [[0, 1, 2, 3], [3, 9, 0, 1], [0, 1, 2, 3]]


def test_all_experts_can_be_chosen(kernel: str, team: ops.Team) -> None:
    plan = router(team, kernel, 8, 8, order="softmax")
    logits = rng("all").standard_normal((5, 8)).astype(np.float32)
    ids, weights = routed(plan, logits)
    assert (np.sort(ids) == np.arange(8)).all() and np.allclose(weights.sum(axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("options", ROUTES.values(), ids=ROUTES)
def test_a_nan_weighs_nan_and_harms_nobody(kernel: str, team: ops.Team, options: dict[str, Any]) -> None:
    plan = router(team, kernel, 8, 2, **options)
    logits = rng("nan").standard_normal((3, 8)).astype(np.float32)
    alone = [x.copy() for x in routed(plan, logits)]
    logits[1, 7] = np.nan
    ids, weights = routed(plan, logits)
    assert ids[1].tolist() == [0, 1] and np.isnan(weights[1]).all()
    for got, want in zip((ids, weights), alone, strict=True):
        assert got[[0, 2]].tobytes() == want[[0, 2]].tobytes()


def packed_experts(team: ops.Team, w: Any, gated: bool) -> ops.PackedMatrix:
    """Matrices [E, n, k]; gated: n / 2 rows of gate, then as many of up."""
    n_experts, n, k = w.shape
    matrix = ops.PackedMatrix(team, n, k, n_experts)
    for e in range(n_experts):
        if gated:
            matrix.pack(np.ascontiguousarray(w[e, : n // 2]), "f32", 0, "gate", e)
            matrix.pack(np.ascontiguousarray(w[e, n // 2 :]), "f32", 0, "up", e)
        else:
            matrix.pack(np.ascontiguousarray(w[e]), "f32", 0, "rows", e)
    return matrix


def mxfp4_experts(team: ops.Team, n_experts: int, n: int, k: int) -> ops.PackedMatrix:
    matrix = ops.PackedMatrix(team, n, k, n_experts, "mxfp4")
    for e in range(n_experts):
        blocks, scales = random_mxfp4(n, k, e)
        matrix.pack_mxfp4(blocks, scales, matrix=e)
    return matrix


def in_bf16(team: ops.Team, matrix: ops.PackedMatrix) -> ops.PackedMatrix:
    """The same values in panels of bf16."""
    copy = ops.PackedMatrix(team, matrix.n, matrix.k, matrix.count)
    for e in range(matrix.count):
        copy.pack(matrix.unpack(e), "f32", matrix=e)
    return copy


def held(plan: ops.Plan, slot: str, n: int) -> F64:
    """The values that the first n rows of an int8 slot mean."""
    width = plan.slot(slot).shape[1]
    q, scales, _ = quantised(memory(plan, slot)[:n], width)
    values: F64 = q.astype(np.float64) * np.repeat(scales.astype(np.float64), 32, axis=1)
    return values


class Mixture:
    """Route, ExpertsIn and ExpertsOut over random weights, or over `matrices`; with int8, of quantised rows."""

    def __init__(
        self,
        team: ops.Team,
        kernel: str,
        n_experts: int = 8,
        top_k: int = 2,
        width: int = 64,
        dim: int = 96,
        bias: bool = False,
        add: bool = False,
        scale: float = 1.0,
        matrices: dict[str, ops.PackedMatrix] | None = None,
        int8: bool = False,
        **options: Any,
    ) -> None:
        r = rng("mixture", n_experts, width, dim)
        self.add, self.scale, self.int8 = add, scale, int8
        filled = -(-width // 32) * 32  # behind width zeros, as a plan has them
        halves = np.zeros((n_experts, 2, filled, dim), np.float32)
        halves[:, :, :width] = r.standard_normal((n_experts, 2, width, dim))
        w_in = halves.reshape(n_experts, 2 * filled, dim)
        w_out = r.standard_normal((n_experts, dim, filled)).astype(np.float32)
        self.on_input = options.get("on_input", False)
        self.matrices = matrices or {
            "in": packed_experts(team, w_in, True),
            "out": packed_experts(team, w_out, False),
        }
        self.vectors = {
            "in.bias": r.standard_normal((n_experts, 2 * filled)).astype(np.float32),
            "out.bias": r.standard_normal((n_experts, dim)).astype(np.float32),
        }
        self.bias = bias
        biases = ("in.bias", "out.bias") if bias else (None, None)
        self.ops = (
            ir.Route("r", "l", "route", top_k, order="softmax", renormalise=True),
            ir.ExpertsIn(
                "i", "x8" if int8 else "x", "inner", "route", "in", n_experts, filled, biases[0], **options
            ),
            ir.ExpertsOut(
                "o",
                "inner8" if int8 else "inner",
                "y",
                "route",
                "out",
                n_experts,
                None,
                biases[1],
                scale,
                add,
                weigh=not self.on_input,
            ),
        )
        slots = [
            ir.Slot("l", n_experts, "f32", "tokens"),
            ir.Slot("route", 2 * top_k, "f32", "tokens"),
            ir.Slot("x", dim, "bf16", "tokens"),
            ir.Slot("inner", filled, "bf16", "tokens", top_k),
            *((ir.Slot("x8", dim, "int8", "tokens"),) if int8 else ()),
            *((ir.Slot("inner8", filled, "int8", "tokens", top_k),) if int8 else ()),
            ir.Slot("y", dim, "f32", "tokens"),
        ]
        route, first, second = self.ops
        quantising = ir.Quantise("q", "x", "x8"), ir.Quantise("p", "inner", "inner8", top_k)
        steps = (route, quantising[0], first, quantising[1], second) if int8 else self.ops
        self.plan = build(team, steps, slots, self.matrices | self.vectors, kernels=chosen(kernel))

    def run(self, logits: Any, x: Any, before: Any) -> F64:
        """The result's rows."""
        m = len(logits)
        put(self.plan, "l", logits)
        put(self.plan, "x", x)
        poison(self.plan, "route", "inner", "y", *(("x8", "inner8") if self.int8 else ()))
        if self.add:
            memory(self.plan, "y")[:m, : before.shape[1]] = before
        self.plan.step(rows_batch(m))
        return take(self.plan, "y", m)

    def check(self, logits: Any, x: Any, before: Any) -> None:
        """Each operator against float64 over what the one before it stored."""
        got, m = self.run(logits, x, before), len(logits)
        op_in = self.ops[1]
        assert isinstance(op_in, ir.ExpertsIn)
        ids, weights = np.split(take(self.plan, "route", m), 2, axis=1)
        k = ids.shape[1]
        order = np.argsort(ids.reshape(-1), kind="stable")
        rows, expert, weight = order // k, ids.reshape(-1)[order].astype(int), weights.reshape(-1)[order]
        a = held(self.plan, "x8", m)[rows] if self.int8 else put(self.plan, "x", x)[rows]
        if self.on_input:
            a = bf16(a * weight[:, None])
        inner = take(self.plan, "inner", m * k)
        want = np.full(inner.shape, np.nan)
        tolerance = np.full(inner.shape, np.nan)
        src = held(self.plan, "inner8", m * k) if self.int8 else inner
        y = before.astype(np.float64) if self.add else np.zeros(got.shape)
        y_size = np.abs(y)
        for e in np.unique(expert):
            own = expert == e
            w = self.matrices["in"].unpack(e).astype(np.float64)
            b = self.vectors["in.bias"][e].astype(np.float64) if self.bias else 0.0
            size = np.abs(a[own]) @ np.abs(w).T + np.abs(b)
            (gate, up), (g_size, u_size) = split_gated(a[own] @ w.T + b), split_gated(size)
            unit = (w.shape[1] + 2) * U_F32
            if op_in.limit:
                g = np.minimum(gate, op_in.limit)
                u = np.clip(up, -op_in.limit, op_in.limit)
                act = g / (1 + np.exp(-op_in.alpha * g))
                value, error = (u + 1) * act, unit * ((op_in.alpha + 1) * g_size * np.abs(u + 1))
                error += unit * u_size * np.abs(act) + 2.0**-20 * np.abs(value)
            else:
                act = activate(gate, op_in.act)
                value = act * up
                error = unit * (1.13 * g_size * np.abs(up) + u_size * np.abs(act)) + 2.0**-20 * np.abs(value)
            want[own] = value[:, : inner.shape[1]]
            tolerance[own] = (error + U_BF16 * np.abs(value))[:, : inner.shape[1]]
            w = self.matrices["out"].unpack(e).astype(np.float64)
            b = self.vectors["out.bias"][e].astype(np.float64) if self.bias else 0.0
            by = self.scale * (1.0 if self.on_input else weight[own][:, None])
            y[rows[own]] += by * (src[own] @ w.T + b)
            y_size[rows[own]] += np.abs(by) * (np.abs(src[own]) @ np.abs(w).T + np.abs(b))
        assert_close(inner, want, tolerance)
        assert_close(got, y, (inner.shape[1] + 2 + 3 * k) * U_F32 * y_size)


def asked(m: int, n_experts: int = 8, dim: int = 96) -> tuple[Any, Any, Any]:
    r = rng("asked", n_experts)
    shapes = (n_experts, dim, dim)
    logits, x, before = (r.standard_normal((300, n)).astype(np.float32)[:m] for n in shapes)
    return logits, x, before


CLAMPED: dict[str, Any] = {"limit": 7.0, "alpha": 1.702}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True, "add": True, "scale": 0.5},
    "clamped": {"bias": True, **CLAMPED},
    "tight": {"limit": 0.5, "alpha": 1.702},
    "on-input": {"on_input": True, "add": True},
    "gelu": {"act": "gelu_tanh"},
    "odd": {"width": 23, "dim": 100},
    "one": {"n_experts": 4, "top_k": 1},
    "all": {"n_experts": 4, "top_k": 4},
    "many": {"n_experts": 64, "top_k": 6, "width": 32, "dim": 40},
}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_experts(kernel: str, team: ops.Team, options: dict[str, Any]) -> None:
    mixture = Mixture(team, kernel, **options)
    n_experts, dim = options.get("n_experts", 8), options.get("dim", 96)
    for m in (1, 3) if kernel == "reference" else (1, 2, 3, 17, 70, 300):
        mixture.check(*asked(m, n_experts, dim))


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_a_row_is_the_same_in_any_company(kernel: str, team: ops.Team, options: dict[str, Any]) -> None:
    """Alone, in every subset and in every order: the same bytes, whoever else chose its experts."""
    if kernel == "reference":
        pytest.skip("one row after the other by construction")
    mixture = Mixture(team, kernel, **options)
    logits, x, before = asked(300, options.get("n_experts", 8), options.get("dim", 96))
    whole = mixture.run(logits, x, before)
    r = rng("company")
    for n in (1, 2, 13, 40, 140, 299):
        rows = r.permutation(300)[:n]
        got = mixture.run(logits[rows], x[rows], before[rows])
        assert got.tobytes() == whole[rows].tobytes()


@pytest.fixture
def four_bits(kernel: str, team: ops.Team) -> dict[str, ops.PackedMatrix]:
    """The matrices of a Mixture as gpt-oss has them."""
    return {"in": mxfp4_experts(team, 8, 128, 96), "out": mxfp4_experts(team, 8, 96, 64)}


def test_mxfp4_is_the_same_product(
    kernel: str, team: ops.Team, four_bits: dict[str, ops.PackedMatrix]
) -> None:
    """Bit for bit that with the dequantised matrices, through the same clamps and biases."""
    options: dict[str, Any] = {"bias": True, "add": True, **CLAMPED}
    packs = four_bits, {name: in_bf16(team, matrix) for name, matrix in four_bits.items()}
    packed, plain = (Mixture(team, kernel, matrices=matrices, **options) for matrices in packs)
    for m in (1, 3) if kernel == "reference" else (1, 2, 3, 17, 70, 300):
        asking = asked(m)
        assert packed.run(*asking).tobytes() == plain.run(*asking).tobytes()


def test_mxfp4_times_int8_rows(kernel: str, team: ops.Team, four_bits: dict[str, ops.PackedMatrix]) -> None:
    """Beside float64 over what quantising left, and each row the same bytes in any company."""
    mixture = Mixture(team, kernel, matrices=four_bits, int8=True, bias=True, add=True, **CLAMPED)
    for m in (1, 3) if kernel == "reference" else (1, 2, 17, 70, 300):
        mixture.check(*asked(m))
    logits, x, before = asked(3 if kernel == "reference" else 300)
    whole = mixture.run(logits, x, before)
    for n in (1, len(x) // 7 + 1, len(x) // 2 + 1):
        rows = rng("company").permutation(len(x))[:n]
        assert mixture.run(logits[rows], x[rows], before[rows]).tobytes() == whole[rows].tobytes()


def test_one_expert_that_everybody_wants(kernel: str, team: ops.Team) -> None:
    """More rows than are gathered at a time, and experts that nobody chooses."""
    mixture = Mixture(team, kernel, top_k=1)
    logits, x, before = asked(9 if kernel == "reference" else 300)
    logits[:] = -1
    logits[:, 5] = 1
    mixture.check(logits, x, before)
    assert set(mixture.plan.op_experts().values()) == {1}


def test_a_nan_row_is_nan_and_alone(kernel: str, team: ops.Team) -> None:
    mixture = Mixture(team, kernel)
    logits, x, before = asked(5)
    alone = mixture.run(logits, x, before)
    logits[2, 1] = np.nan
    got = mixture.run(logits, x, before)
    assert np.isnan(got[2]).all()
    assert np.delete(got, 2, 0).tobytes() == np.delete(alone, 2, 0).tobytes()


def test_a_clamped_nan_stays(kernel: str, team: ops.Team) -> None:
    mixture = Mixture(team, kernel, **CLAMPED)
    logits, x, before = asked(3)
    x[1, 7] = np.nan
    got = mixture.run(logits, x, before)
    assert np.isnan(got[1]).all() and np.isfinite(got[[0, 2]]).all()


@pytest.mark.parametrize("n_threads", [1, 2, 3])
def test_the_team_changes_nothing(n_threads: int, team: ops.Team) -> None:
    asking = asked(64)
    want = Mixture(team, ops.isa()).run(*asking)
    own = ops.Team(n_threads)
    try:
        assert Mixture(own, ops.isa()).run(*asking).tobytes() == want.tobytes()
    finally:
        own.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_k": 9}, "9 of 8 experts"),
        ({"n_groups": 3}, "1 of 3 groups of 8 experts"),
        ({"n_groups": 8}, "two best"),
        ({"choice": "c"}, "choice with softmax"),
    ],
)
def test_routes_that_contradict_themselves(team: ops.Team, change: dict[str, Any], message: str) -> None:
    op = ir.Route("r", "l", "route", **({"top_k": 2} | change))
    slots = [ir.Slot("l", 8, "f32", "tokens"), ir.Slot("route", 2 * op.top_k, "f32", "tokens")]
    with pytest.raises(ValueError, match=message):
        build(team, [op], slots)


def test_a_matrix_of_too_few_experts_is_refused(team: ops.Team) -> None:
    w = packed_experts(team, np.zeros((3, 32, 32), np.float32), True)
    op = ir.ExpertsIn("i", "x", "inner", "route", "w", 4, 16)
    slots = [
        ir.Slot("route", 2, "f32", "tokens"),
        ir.Slot("x", 32, "bf16", "tokens"),
        ir.Slot("inner", 16, "bf16", "tokens"),
    ]
    with pytest.raises(ValueError, match="3 matrices, the operator needs 4"):
        build(team, [op], slots, {"w": w})


def test_a_gemm_adds_by_row(kernel: str, team: ops.Team) -> None:
    """What gates a shared expert: the sum times one number of each row."""
    r = rng("by row")
    matrix = ops.PackedMatrix(team, 40, 64)
    matrix.pack(r.standard_normal((40, 64)).astype(np.float32), "f32")
    op = ir.Gemm("g", "a", "c", "w", epilogue="add", scale=0.5, other="gate", at=1)
    slots = [
        ir.Slot("a", 64, "bf16", "tokens"),
        ir.Slot("gate", 3, "f32", "tokens"),
        ir.Slot("c", 40, "f32", "tokens"),
    ]
    plan = build(team, [op], slots, {"w": matrix}, kernels=chosen(kernel))
    a, gate = put(plan, "a", r.standard_normal((5, 64))), put(plan, "gate", r.standard_normal((5, 3)))
    poison(plan, "c")
    memory(plan, "c")[:5, :40] = before = r.standard_normal((5, 40)).astype(np.float32)
    plan.step(rows_batch(5))
    w = matrix.unpack().astype(np.float64)
    want = before + 0.5 * gate[:, 1:2] * (a @ w.T)
    size = np.abs(before) + np.abs(gate[:, 1:2]) * (np.abs(a) @ np.abs(w).T)
    assert_close(take(plan, "c", 5), want, 70 * U_F32 * size)
