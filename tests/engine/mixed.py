"""Tiny models whose layers differ: what they see, how wide their heads are, whose keys they read. Random weights.

And two of families that golden cases cannot stand for in a crowd: experts, and Gemma 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from ext.kit import bf16, packed, rng
from golden import tiny

from pace import ops
from pace.models.decoder import lower
from pace.models.plan import Attention, Plan
from pace.models.spec import (
    AttentionSpec,
    DecoderSpec,
    DenseSpec,
    HeadNorm,
    LayerSpec,
    MoESpec,
    NormSpec,
    Placement,
    RopeSpec,
    RouterSpec,
)

DIM, N_HEADS = 64, 4
ROPES = tuple(RopeSpec(10000.0, width, 512, 512) for width in (16, 32))


def mixer(
    head_dim: int = 16, n_kv_heads: int = 2, window: int | None = None, **options: Any
) -> AttentionSpec:
    """Attention with the rope of its width."""
    return AttentionSpec(N_HEADS, n_kv_heads, head_dim, window, rope=int(head_dim == 32), **options)


MIXERS: dict[str, list[AttentionSpec]] = {
    "windows-and-full": [mixer(window=24), mixer(), mixer(window=24)],
    "two-windows": [mixer(window=40), mixer(window=70), mixer(window=40)],
    # As Gemma 4: full layers with wider heads and fewer of them, and layers that read an earlier one's keys.
    "two-widths-shared": [
        mixer(window=33),
        mixer(32, 1),
        mixer(window=33, kv_from=0),
        mixer(32, 1, kv_from=1),
    ],
    "chunks-and-full": [mixer(window=48), mixer(), mixer(window=48)],  # windows become chunks
}
MODELS = tuple(MIXERS)
FAMILIES = ("experts", "gemma-3")


def experts() -> DecoderSpec:
    """As Qwen's: the best 3 of 9 experts, one for every row beside them, and a layer without."""
    dense = DenseSpec(96, "silu")
    moe = MoESpec(
        9, 3, 48, "silu", RouterSpec(renormalise=True), shared=DenseSpec(64, "silu"), shared_gate=True
    )
    layers = (LayerSpec(mixer(), moe), LayerSpec(mixer(), dense), LayerSpec(mixer(window=70), moe))
    return DecoderSpec(
        DIM, tiny.VOCAB_SIZE, 512, NormSpec("rms", 1e-6), layers, ROPES, scale=0.25, tied=False
    )


def gemma3() -> DecoderSpec:
    """Windows of 24 tokens and full attention in turn, a rope for each, norms on both sides and of queries and keys."""
    norm = HeadNorm("rms1")
    local = LayerSpec(mixer(32, window=24, norm=norm), DenseSpec(96, "gelu_tanh"))
    whole = LayerSpec(replace(local.mixer, window=None, rope=2), DenseSpec(96, "gelu_tanh"))
    ropes = (*ROPES, RopeSpec(1e6, 32, 512, 512, "linear", factor=8.0))
    return DecoderSpec(
        DIM,
        tiny.VOCAB_SIZE,
        512,
        NormSpec("rms1", 1e-6),
        (local, whole, local, whole),
        ropes,
        scale=32**-0.5,
        tied=True,
        placement=Placement.SANDWICH,
        embed_scale=8.0,
    )


def plan_of(name: str, max_model_len: int, taps: tuple[int, ...] = ()) -> Plan:
    """One of the models; taps are for families only."""
    if name in FAMILIES:
        return lower(experts() if name == "experts" else gemma3(), max_model_len, taps)
    layers = tuple(LayerSpec(m, DenseSpec(96, "silu")) for m in MIXERS[name])
    norm = NormSpec("rms", 1e-6)
    spec = DecoderSpec(DIM, tiny.VOCAB_SIZE, 512, norm, layers, ROPES, scale=0.25, tied=False)
    plan = lower(spec, max_model_len)
    if not name.startswith("chunks"):
        return plan
    chunked = tuple(
        replace(op, chunk=op.window, window=None) if isinstance(op, Attention) else op for op in plan.ops
    )
    return replace(plan, ops=chunked)


def weights_of(plan: Plan) -> dict[str, np.ndarray]:
    """Matrices of variance 1 / k, and norms about 1."""
    draw = rng("mixed", len(plan.ops))
    return {
        name: 1 + 0.1 * draw.standard_normal(shape.n).astype(np.float32)
        if shape.k is None
        else (
            draw.standard_normal((shape.count, shape.n, shape.k)[shape.count == 1 :]) * 2 / shape.k**0.5
        ).astype(np.float32)
        for name, shape in plan.weights.items()
    }


def pack(team: ops.Team, plan: Plan) -> dict[str, Any]:
    """Its weights as the kernels take them."""
    return in_formats(team, plan, weights_of(plan))


def in_formats(team: ops.Team, plan: Plan, weights: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """A plan's weights, packed in the formats that it names."""
    shapes = plan.weights
    return {
        name: np.ascontiguousarray(w, np.float32) if w.ndim == 1 else packed(team, w, shapes[name].format)
        for name, w in weights.items()
    }


def rounded(w: np.ndarray) -> np.ndarray:
    """A matrix as the kernels hold it; vectors stay as they are."""
    return bf16(w) if w.ndim == 2 else w
