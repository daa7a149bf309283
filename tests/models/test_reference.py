"""Operators of the reference against formulas written out element by element."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from golden.harness import BLOCK_SIZE, batch_of

from pace.models.plan import (
    Activation,
    Attention,
    Blocks,
    Embed,
    Gemm,
    KVLayer,
    Norm,
    NormKind,
    NormScope,
    Op,
    Plan,
    Rope,
    RopeKV,
    Slot,
    WeightShape,
    gated_rows,
)
from pace.reference import (
    Array,
    Reference,
    activate,
    norm,
    quantise,
    rotate,
    round_bf16,
    split_gated,
    visible_to,
)

N_HEADS, N_KV_HEADS, HEAD_DIM = 4, 2, 16
Q_DIM, KV_DIM = N_HEADS * HEAD_DIM, N_KV_HEADS * HEAD_DIM
QKV_DIM = Q_DIM + 2 * KV_DIM


def plan_of(ops: tuple[Op, ...], slots: list[Slot], vocab_size: int = 50) -> Plan:
    return Plan(
        {slot.name: slot for slot in slots},
        ops,
        (),
        kv=(KVLayer(N_KV_HEADS, HEAD_DIM),),
        vocab_size=vocab_size,
        dim=QKV_DIM,
        logits=slots[-1].name,
    )


def attend(
    rounding: Any = None, cache: dict[str, Any] | None = None, table: Sequence[int] = (3, 1), **options: Any
) -> tuple[Array, Array, Array, Array, Array]:
    """Attention of a 21-token prompt without rotation: (result, q, k, v, sinks)."""
    rng = np.random.default_rng(3)
    embedding = rng.standard_normal((50, QKV_DIM))
    sinks = rng.standard_normal(N_HEADS)
    plan = plan_of(
        (
            Embed("embed", "x", "embed"),
            RopeKV("rope", "x", "q", N_HEADS, kv=0),
            Attention("attn", "q", "out", N_HEADS, kv=0, scale=0.5, **options),
        ),
        [
            Slot("x", QKV_DIM, "f32", "tokens"),
            Slot("q", Q_DIM, "bf16", "tokens"),
            Slot("out", Q_DIM, "bf16", "tokens"),
        ],
    )
    tokens = [int(t) for t in rng.integers(0, 50, 21)]
    weights = {"embed": embedding, "sinks": sinks}
    runner = Reference(plan, weights, 4, BLOCK_SIZE, rounding=rounding, **(cache or {}))
    out = runner.step(batch_of([(tokens, 0, table)])).reshape(21, N_HEADS, HEAD_DIM)
    q, k, v = np.split(embedding[tokens].reshape(21, -1, HEAD_DIM), [N_HEADS, N_HEADS + N_KV_HEADS], axis=1)
    return out, q, k, v, sinks


@pytest.mark.parametrize("window", [None, 1, 5, 21, 100])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_attention(window: int | None, softcap: float | None, with_sinks: bool) -> None:
    out, q, k, v, sinks = attend(window=window, softcap=softcap, sinks="sinks" if with_sinks else None)
    for p in range(21):
        for head in range(N_HEADS):
            first = 0 if window is None else max(0, p - window + 1)
            total = math.exp(sinks[head]) if with_sinks else 0.0
            want = np.zeros(HEAD_DIM)
            for j in range(first, p + 1):
                score = 0.5 * float(q[p, head] @ k[j, head // 2])
                if softcap is not None:
                    score = softcap * math.tanh(score / softcap)
                total += math.exp(score)
                want += math.exp(score) * v[j, head // 2]
            np.testing.assert_allclose(out[p, head], want / total, rtol=1e-9, atol=1e-12)


def test_attention_rounds_where_the_kernels_do() -> None:
    exact, rounded = attend()[0], attend(rounding="bf16")[0]
    assert np.array_equal(rounded, round_bf16(rounded))
    assert 1e-4 < np.abs(exact - rounded).max() < 0.1


def test_attention_over_an_extent() -> None:
    blocks, extent = attend(table=[2, 3])[0], attend(cache={"contiguous": True}, table=[2])[0]
    assert blocks.tobytes() == extent.tobytes()


def test_attention_over_an_int8_cache() -> None:
    """Every head of k and v becomes integers times its largest element / 127, and nothing else changes."""
    out, q, k, v, _ = attend(cache={"kv_dtype": "int8"})
    for x in (k, v):
        for at in np.ndindex(x.shape[:2]):
            scale = max(abs(e) for e in x[at]) / 127
            x[at] = [round(e / scale) * scale for e in x[at]]
    for p in range(21):
        for h in range(N_HEADS):
            weights = [math.exp(0.5 * float(q[p, h] @ k[j, h // 2])) for j in range(p + 1)]
            want = sum(w * v[j, h // 2] for j, w in enumerate(weights)) / sum(weights)
            np.testing.assert_allclose(out[p, h], want, rtol=1e-9, atol=1e-12)


def test_quantise_zero_and_what_is_no_number() -> None:
    integers, scales = quantise(np.array([[0.0, 0.0], [1.0, np.inf], [np.nan, 1.0], [-2.54, 1.27]]))
    np.testing.assert_array_equal(scales[:3], [[0.0], [np.nan], [np.nan]])
    np.testing.assert_array_equal(integers, [[0, 0], [0, 0], [0, 0], [-127, 64]])  # 63.5 to even


@pytest.mark.parametrize("kind", ["rms", "rms1", "layer"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_norm(kind: NormKind, with_bias: bool) -> None:
    rng = np.random.default_rng(4)
    x, w, b = rng.standard_normal((3, 20)) + 0.5, rng.standard_normal(20), rng.standard_normal(20)
    got = norm(x, w, b if with_bias else None, kind, 1e-3)
    for row, values in zip(got, x, strict=True):
        mean = sum(values) / 20 if kind == "layer" else 0.0
        scale = 1 / math.sqrt(sum((v - mean) ** 2 for v in values) / 20 + 1e-3)
        for i, v in enumerate(values):
            want = (v - mean) * scale * (1 + w[i] if kind == "rms1" else w[i]) + (b[i] if with_bias else 0)
            assert row[i] == pytest.approx(want, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize(
    ("act", "at_one", "at_minus_two"),
    [
        ("silu", 0.7310585786300049, -0.2384058440442351),
        ("gelu", 0.8413447460685429, -0.0455002638963584),
        ("gelu_tanh", 0.8411919906082768, -0.04540230591222494),
        ("relu", 1.0, 0.0),
        ("quick_gelu", 0.8457957659328212, -0.06434137685579186),
        (None, 1.0, -2.0),
    ],
)
def test_activations(act: Activation | None, at_one: float, at_minus_two: float) -> None:
    got = activate(np.array([1.0, -2.0, 0.0, 40.0]), act)
    np.testing.assert_allclose(got, [at_one, at_minus_two, 0.0, 40.0], rtol=1e-12, atol=1e-15)


def test_relu_squared() -> None:
    np.testing.assert_array_equal(activate(np.array([3.0, -2.0, 0.0]), "relu2"), [9.0, 0.0, 0.0])


def test_embedding_scale_positions_and_residual_norm() -> None:
    """scale * table[t] + positions[offset + p], then x += norm(x)."""
    rng = np.random.default_rng(5)
    weights = {
        "embed": rng.standard_normal((50, QKV_DIM)),
        "positions": rng.standard_normal((12, QKV_DIM)),
        "w": rng.standard_normal(QKV_DIM),
    }
    plan = plan_of(
        (
            Embed("embed", "x", "embed", scale=3.0, positions="positions", offset=2),
            Norm("norm", "x", "x", "w", eps=1e-6, add=True),
        ),
        [Slot("x", QKV_DIM, "f32", "tokens")],
    )
    got = Reference(plan, weights, 1, BLOCK_SIZE).step(batch_of([([7, 9, 7], 4, [0])]))
    x = 3.0 * weights["embed"][[7, 9, 7]] + weights["positions"][[6, 7, 8]]
    rms = np.sqrt((x**2).mean(axis=1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(got, x + x / rms * weights["w"], rtol=1e-12)


def test_gemm_scales_after_its_bias() -> None:
    rng = np.random.default_rng(6)
    weights = {n: rng.standard_normal(s) for n, s in (("embed", (50, 96)), ("w", (32, 96)), ("b", 32))}
    for epilogue, act in (("store", "relu"), ("add", None)):
        ops: tuple[Op, ...] = (
            Embed("embed", "x", "embed"),
            Gemm("first", "x", "y", "w"),
            Gemm("second", "x", "y", "w", "b", epilogue=epilogue, act=act, scale=0.25),  # type: ignore[arg-type]  # names, as parametrised
        )
        slots = [Slot("x", 96, "bf16", "tokens"), Slot("y", 32, "f32", "tokens")]
        got = Reference(plan_of(ops, slots), weights, 1, BLOCK_SIZE).step(batch_of([([4, 5], 0, [0])]))
        plain = weights["embed"][[4, 5]] @ weights["w"].T
        y = plain + weights["b"]
        want = 0.25 * np.maximum(y, 0) if epilogue == "store" else plain + 0.25 * y
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)


def test_split_gated_alternates_blocks_of_16() -> None:
    gate, up = split_gated(np.arange(64, dtype=np.float64)[None])
    assert gate[0].tolist() == [*range(16), *range(32, 48)]
    assert up[0].tolist() == [*range(16, 32), *range(48, 64)]


def test_round_bf16_is_to_nearest_even() -> None:
    ulp = 2.0**-7  # of bf16 values in [1, 2)
    got = round_bf16(np.array([1 + ulp / 2, 1 + 3 * ulp / 2, 1 + 0.51 * ulp, -1 - ulp / 2, np.inf]))
    assert got.tolist() == [1.0, 1 + 2 * ulp, 1 + ulp, -1.0, np.inf]
    assert np.isnan(round_bf16(np.array([np.nan]))).all()


# ---- what the dense families add --------------------------------------------------------------------------

T = 5
TOKENS = [3, 1, 4, 1, 5]


def run(
    ops: Sequence[Op], widths: dict[str, int], weights: dict[str, Array], *ropes: Rope
) -> dict[str, Array]:
    """Slots after one step of five tokens at positions 7 to 11. "name.in": what a slot held that no operator wrote
    before, rows of the table "in.name".
    """
    rng = np.random.default_rng(9)
    written = {op.dst for op in ops if not (isinstance(op, (Embed, Norm)) and op.add)}
    sources = [name for name in widths if name not in written]
    weights = {f"in.{name}": rng.standard_normal((50, widths[name])) for name in sources} | weights
    slots = {name: Slot(name, width, "f32", "tokens") for name, width in widths.items()}
    makers = tuple(Embed(f"make.{name}", name, f"in.{name}") for name in sources)
    kv = (KVLayer(N_KV_HEADS, HEAD_DIM),)
    plan = Plan(slots, (*makers, *ops), ropes, kv, vocab_size=50, dim=8, logits=ops[-1].dst)
    runner = Reference(plan, weights, 4, BLOCK_SIZE, trace=True)
    runner.step(batch_of([([0] * 7, 0, [0, 1])]))
    runner.step(batch_of([(TOKENS, 7, [0, 1])]))
    assert runner.trace is not None
    return runner.trace[ops[-1].name] | {f"{name}.in": weights[f"in.{name}"][TOKENS] for name in sources}


def test_embed_adds_positions_and_scales() -> None:
    rng = np.random.default_rng(1)
    weights = {"w": rng.standard_normal((50, 6)), "p": rng.standard_normal((40, 6))}
    op = Embed("e", "x", "w", 2.0, "p", 40, offset=2, add=True, post=0.5)
    got = run([op], {"x": 6}, weights)
    for r, token in enumerate(TOKENS):
        want = 0.5 * (got["x.in"][r] + 2.0 * weights["w"][token] + weights["p"][7 + r + 2])
        np.testing.assert_allclose(got["x"][r], want)
    alone = run([Embed("e", "x", None, positions="p", n_positions=40)], {"x": 6}, weights)
    np.testing.assert_array_equal(alone["x"], weights["p"][7:12])


def test_norm_in_groups_without_weight_and_scaled() -> None:
    weights = {"s": np.array([0.25])}
    got = run([Norm("n", "x", "y", None, groups=3, scale="s", add=True)], {"y": 12, "x": 12}, weights)
    for r in range(T):
        for g in range(0, 12, 4):
            x = got["x"][r, g : g + 4]
            want = 0.25 * (got["y.in"][r, g : g + 4] + x / math.sqrt(float(x @ x) / 4 + 1e-6))
            np.testing.assert_allclose(got["y"][r, g : g + 4], want)


def test_gemm_cap_and_product() -> None:
    rng = np.random.default_rng(2)
    weights = {"w": rng.standard_normal((4, 6)), "b": rng.standard_normal(4)}

    def y(got: dict[str, Array]) -> Array:
        return got["x"] @ weights["w"].T + weights["b"]

    got = run([Gemm("g", "x", "y", "w", "b", scale=3.0, cap=2.0)], {"x": 6, "y": 4}, weights)
    np.testing.assert_allclose(got["y"], 2 * np.tanh(3 * y(got) / 2))
    op = Gemm("g", "x", "y", "w", "b", "mul", "relu2", 0.5, other="z", at=3)
    got = run([op], {"x": 6, "z": 9, "y": 4}, weights)
    np.testing.assert_allclose(got["y"], 0.5 * np.maximum(y(got), 0) ** 2 * got["z"][:, 3:7])


def test_gated_gemm_of_any_width() -> None:
    """A width of 20 is two blocks of 16, the second filled with zero rows, which no column shows."""
    rng = np.random.default_rng(3)
    gate, up = rng.standard_normal((20, 6)), rng.standard_normal((20, 6))
    fused = np.zeros((64, 6))
    fused[gated_rows(20, "gate")], fused[gated_rows(20, "up")] = gate, up
    got = run([Gemm("g", "x", "y", "w", epilogue="gated", act="silu")], {"x": 6, "y": 20}, {"w": fused})
    np.testing.assert_allclose(got["y"], activate(got["x"] @ gate.T, "silu") * (got["x"] @ up.T))


ROPE = Rope(np.array([1.0, 0.3], np.float32), 1.0, False, 4)


@pytest.mark.parametrize("scope", ["head", "head_own", "full"])
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("kind", ["rms", "rms1", "layer"])
@pytest.mark.parametrize("weighted", [True, False])
def test_rope_norms(scope: NormScope, after: bool, kind: NormKind, weighted: bool) -> None:
    """Heads of 16 columns of which 12 count: q and k against the formula, head by head."""
    rng = np.random.default_rng(4)
    widths = (HEAD_DIM, HEAD_DIM) if scope == "head" else (Q_DIM, KV_DIM)
    w, wk = (np.where(np.arange(n) % HEAD_DIM < 12, rng.standard_normal(n), 0) for n in widths)
    rows = rng.standard_normal((50, QKV_DIM))
    rows.reshape(50, -1, HEAD_DIM)[..., 12:] = 0
    op = RopeKV(
        "r", "x", "q", N_HEADS, 0, 0,
        qk_norm=kind, q_norm="w" if weighted else None, k_norm="wk" if weighted else None,
        norm_scope=scope, norm_eps=1e-3, norm_width=12, norm_after_rope=after,
    )  # fmt: skip
    got = run([op], {"x": QKV_DIM, "q": Q_DIM}, {"w": w, "wk": wk, "in.x": rows}, ROPE)

    def normed(x: Array, weight: Array) -> Array:
        y = x.copy()
        for r, h in np.ndindex(x.shape[:2]):
            counted = x[r, :, :12] if scope == "full" else x[r, h, :12]
            mean = counted.mean() if kind == "layer" else 0.0
            inv = 1 / math.sqrt(float(((counted - mean) ** 2).mean()) + 1e-3)
            gain = weight.reshape(-1, HEAD_DIM)[0 if scope == "head" else h, :12] + (kind == "rms1")
            y[r, h, :12] = (x[r, h, :12] - mean) * inv * (gain if weighted else 1)
        return y

    positions = np.arange(7, 12, dtype=np.int32)
    q, k, v = np.split(got["x.in"].reshape(T, -1, HEAD_DIM), [N_HEADS, N_HEADS + N_KV_HEADS], axis=1)
    for x, weight, result in ((q, w, got["q"].reshape(q.shape)), (k, wk, got["k"])):
        want = (
            normed(rotate(x, positions, ROPE), weight)
            if after
            else rotate(normed(x, weight), positions, ROPE)
        )
        np.testing.assert_allclose(result, want, atol=1e-12)
    np.testing.assert_array_equal(got["v"], v)


def test_rope_with_keys_for_values_and_temperature() -> None:
    """v is the raw k, normalised without weight; q grows with log(1 + floor((position + 1) / 4))."""
    op = RopeKV(
        "r", "x", "q", N_HEADS, 0, 0, k_is_v=True, v_norm=True, norm_eps=1e-3, temperature=(0.5, 4.0, 1.0)
    )
    got = run([op], {"x": Q_DIM + KV_DIM, "q": Q_DIM}, {}, ROPE)
    q, k = np.split(got["x.in"].reshape(T, -1, HEAD_DIM), [N_HEADS], axis=1)
    positions = np.arange(7, 12, dtype=np.int32)
    grow = [1 + 0.5 * math.log(1 + (p + 1) // 4) for p in range(7, 12)]
    np.testing.assert_allclose(
        got["q"].reshape(q.shape), rotate(q, positions, ROPE) * np.array(grow)[:, None, None]
    )
    np.testing.assert_allclose(got["k"], rotate(k, positions, ROPE))
    np.testing.assert_allclose(got["v"], k / np.sqrt((k**2).mean(-1, keepdims=True) + 1e-3))


def test_a_layer_that_shares_appends_nothing() -> None:
    op = RopeKV("r", "x", "q", N_HEADS, 0, append=False)
    got = run([op], {"x": Q_DIM, "q": Q_DIM}, {})
    np.testing.assert_array_equal(got["q"], got["x.in"])
    assert "k" not in got


@pytest.mark.parametrize(
    ("window", "chunk", "first"),
    [
        (None, None, [0, 0, 0]),
        (3, None, [5, 6, 7]),
        (None, 4, [4, 8, 8]),
        (2, 4, [6, 8, 8]),
        (9, 4, [4, 8, 8]),
    ],
)
def test_visible_to(window: int | None, chunk: int | None, first: list[int]) -> None:
    visible = visible_to(np.array([7, 8, 9], np.int32), 12, window, chunk)
    assert [np.flatnonzero(row).tolist() for row in visible] == [
        list(range(begin, at + 1)) for begin, at in zip(first, (7, 8, 9), strict=True)
    ]


def test_weights_of_every_operator() -> None:
    """Each with its shape, fused ones with their parts, in order of first use."""
    f32, wide = ("f32", "tokens"), Q_DIM + KV_DIM
    slots = {
        name: Slot(name, width, *f32)  # type: ignore[arg-type]  # width and dtype
        for name, width in (("x", 24), ("qkv", QKV_DIM), ("qk", wide), ("q", Q_DIM), ("h", 20))
    }
    qkv = tuple(
        Blocks(part, n, HEAD_DIM - 2, HEAD_DIM)  # type: ignore[arg-type]  # a name of parts
        for part, n in (("q", N_HEADS), ("k", N_KV_HEADS), ("v", N_KV_HEADS))
    )
    gated, columns = (Blocks("gate", 1, 20, 32), Blocks("up", 1, 20, 32)), Blocks("all", 3, 5, 8)
    ops: tuple[Op, ...] = (
        Embed("e", "x", "table", positions="p", n_positions=66, offset=2, mapped=True),
        Norm("n", "x", "x", None, groups=3, scale="s"),
        Norm("m", "x", "x", "m", "m.bias", "layer", groups=3),
        Gemm("g", "x", "qkv", "qkv", "qkv.bias", blocks=qkv, columns=columns),
        RopeKV("r", "qkv", "q", N_HEADS, 0, qk_norm="rms", q_norm="qn", k_norm="kn", norm_scope="full"),
        Attention("a", "q", "q", N_HEADS, 0, 1.0, sinks="sinks"),
        Gemm("g2", "x", "qk", "qk"),
        RopeKV("r2", "qk", "q", N_HEADS, 0, k_is_v=True, qk_norm="rms", q_norm="qn2", k_norm=None),
        Gemm("g3", "x", "h", "gu", "gu.bias", "gated", "silu"),
    )
    plan = Plan(slots, ops, (), (KVLayer(N_KV_HEADS, HEAD_DIM),), 50, 24, "h")
    assert plan.weights == {
        "table": WeightShape(50, 24, mapped=True),
        "p": WeightShape(66, 24),
        "s": WeightShape(1),
        "m": WeightShape(8),
        "m.bias": WeightShape(8),
        "qkv": WeightShape(QKV_DIM, 24, qkv, columns),
        "qkv.bias": WeightShape(QKV_DIM, None, qkv),
        "qn": WeightShape(Q_DIM, None, (Blocks("all", N_HEADS, HEAD_DIM, HEAD_DIM),)),
        "kn": WeightShape(KV_DIM, None, (Blocks("all", N_KV_HEADS, HEAD_DIM, HEAD_DIM),)),
        "sinks": WeightShape(N_HEADS),
        "qk": WeightShape(wide, 24, (Blocks("all", 1, wide, wide),)),
        "qn2": WeightShape(HEAD_DIM, None, (Blocks("all", 1, HEAD_DIM, HEAD_DIM),)),
        "gu": WeightShape(64, 24, gated),
        "gu.bias": WeightShape(64, None, gated),
    }
