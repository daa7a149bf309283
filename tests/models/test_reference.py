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
    Embed,
    Gemm,
    Norm,
    NormKind,
    Op,
    Plan,
    RopeKV,
    Slot,
)
from pace.reference import Array, Reference, activate, norm, quantise, round_bf16, split_gated

N_HEADS, N_KV_HEADS, HEAD_DIM = 4, 2, 16
Q_DIM, KV_DIM = N_HEADS * HEAD_DIM, N_KV_HEADS * HEAD_DIM
QKV_DIM = Q_DIM + 2 * KV_DIM


def plan_of(ops: tuple[Op, ...], slots: list[Slot], vocab_size: int = 50) -> Plan:
    return Plan(
        {slot.name: slot for slot in slots},
        ops,
        (),
        n_layers=1,
        n_heads=N_HEADS,
        n_kv_heads=N_KV_HEADS,
        head_dim=HEAD_DIM,
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
            RopeKV("rope", "x", "q", layer=0, rope=None),
            Attention("attn", "q", "out", layer=0, scale=0.5, **options),
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
        (None, 1.0, -2.0),
    ],
)
def test_activations(act: Activation | None, at_one: float, at_minus_two: float) -> None:
    got = activate(np.array([1.0, -2.0, 0.0, 40.0]), act)
    np.testing.assert_allclose(got, [at_one, at_minus_two, 0.0, 40.0], rtol=1e-12, atol=1e-15)


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
            Gemm("second", "x", "y", "w", "b", epilogue=epilogue, act=act, scale=0.25),  # type: ignore[arg-type]
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
