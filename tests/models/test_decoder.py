"""The lowering: which operators, in which order, over which slots."""

from __future__ import annotations

from pathlib import Path

import pytest
from golden import tiny

import pace.models.decoder
from pace.models.decoder import lower
from pace.models.plan import Attention, Embed, Gemm, Norm, Plan, RopeKV, Select
from pace.models.registry import ARCHITECTURES, parse_config


def plan_of(name: str) -> Plan:
    return lower(parse_config(tiny.CASES[name].config)[0], 64)


def test_operators_of_a_two_layer_model() -> None:
    layer = ["attn_norm", "qkv", "rope", "attn", "o", "mlp_norm", "gate_up", "down"]
    first = [f"layers.0.{name}" for name in layer]
    last = [f"layers.1.{name}" for name in layer]
    selected = ["select.x", "select.attn"]
    expected = ["embed", *first, *last[:4], *selected, *last[4:], "norm", "lm_head"]
    assert [op.name for op in plan_of("llama-mha").ops] == expected


@pytest.mark.parametrize("name", sorted(tiny.CASES))
def test_slots_are_consistent(name: str) -> None:
    """Every operator's operands exist, were written before, and have the widths, dtypes and rows it needs."""
    plan = plan_of(name)
    spec = parse_config(tiny.CASES[name].config)[0]
    written: set[str] = set()
    for op in plan.ops:
        dst = plan.slots[op.dst]
        if isinstance(op, Embed):
            assert (dst.width, dst.dtype, dst.rows) == (plan.dim, "f32", "tokens")
            written.add(op.dst)
            continue
        src = plan.slots[op.src]
        assert op.src in written
        if isinstance(op, Select):
            assert (src.rows, dst.rows) == ("tokens", "logits")
            assert (src.width, src.dtype) == (dst.width, dst.dtype)
        else:
            assert src.rows == dst.rows
        if isinstance(op, Norm):
            assert (src.dtype, dst.dtype, src.width) == ("f32", "bf16", dst.width)
        elif isinstance(op, Gemm):
            assert src.dtype == "bf16"
            assert dst.dtype == ("bf16" if op.epilogue == "gated" else "f32")
            assert op.epilogue != "add" or op.dst in written
        elif isinstance(op, RopeKV):
            assert (src.width, src.dtype) == (spec.q_dim + 2 * spec.kv_dim, "f32")
            assert (dst.width, dst.dtype) == (spec.q_dim, "bf16")
            assert op.rope is not None
            assert 0 <= op.rope < len(plan.ropes)
        elif isinstance(op, Attention):
            assert (src.width, dst.width, src.dtype, dst.dtype) == (spec.q_dim, spec.q_dim, "bf16", "bf16")
            assert op.scale == spec.head_dim**-0.5
        written.add(op.dst)
    assert written == set(plan.slots)
    assert plan.slots[plan.logits].width == plan.vocab_size
    assert plan.slots[plan.logits].rows == "logits"
    assert len({op.name for op in plan.ops}) == len(plan.ops)


def test_tied_head_shares_the_embedding() -> None:
    tied, untied = plan_of("qwen2-tied"), plan_of("qwen3")
    assert tied.ops[-1].weight == tied.ops[0].weight == "embed"  # type: ignore[union-attr]
    assert "lm_head" not in tied.weights()
    assert {"embed", "lm_head"} <= set(untied.weights())


def test_last_layer_selects_before_its_output_projection() -> None:
    ops = {op.name: op for op in plan_of("llama-one-layer-relu").ops}
    names = list(ops)
    assert names.index("layers.0.attn") < names.index("select.x") < names.index("layers.0.o")


def test_every_weight_has_a_source() -> None:
    for name, case in tiny.CASES.items():
        spec, weight_map = parse_config(case.config)
        known = {k.replace("{i}", str(i)) for k in weight_map for i in range(len(spec.layers))}
        assert set(lower(spec, 64).weights()) <= known, name


def test_decoder_does_not_know_architectures() -> None:
    text = Path(pace.models.decoder.__file__ or "").read_text().lower()
    for architecture in ARCHITECTURES.values():
        assert architecture.model_type not in text
    assert "model_type" not in text
