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
    written: set[str] = set()
    for op in plan.ops:
        dst = plan.slots[op.dst]
        if isinstance(op, Embed):
            assert dst.rows == "tokens"
            assert dst.dtype == "f32" or not op.add
            assert not op.add or op.dst in written
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
            assert (src.dtype, src.width) == ("f32", dst.width)
            assert dst.dtype == "f32" if op.add else op.src != op.dst or dst.dtype == "f32"
            assert not op.add or op.dst in written
        elif isinstance(op, Gemm):
            assert src.dtype == "bf16"
            assert op.epilogue != "add" or (op.dst in written and dst.dtype == "f32")
            assert op.epilogue == "gated" or sum(b.n for b in op.blocks) in (0, dst.width)
            assert op.columns is None or op.columns.n == src.width
            if op.epilogue == "mul":
                assert op.other in written
                other = plan.slots[op.other]
                assert (other.dtype, other.rows) == ("f32", dst.rows)
                assert op.at + dst.width <= other.width
        elif isinstance(op, RopeKV):
            kv = plan.kv[op.kv]
            n = op.n_heads + (0 if not op.append else kv.n_kv_heads * (1 if op.k_is_v else 2))
            assert (src.width, src.dtype) == (n * kv.head_dim, "f32")
            assert (dst.width, dst.dtype) == (op.n_heads * kv.head_dim, "bf16")
            assert op.rope is None or 0 <= op.rope < len(plan.ropes)
            assert src.rows == "tokens" or not op.append
        elif isinstance(op, Attention):
            width = op.n_heads * plan.kv[op.kv].head_dim
            assert (src.width, dst.width, src.dtype, dst.dtype) == (width, width, "bf16", "bf16")
        written.add(op.dst)
    assert written == set(plan.slots)
    assert plan.slots[plan.logits].width == plan.vocab_size
    assert plan.slots[plan.logits].rows == "logits"
    assert len({op.name for op in plan.ops}) == len(plan.ops)


def test_tied_head_shares_the_embedding() -> None:
    tied, untied = plan_of("qwen2-tied"), plan_of("qwen3")
    assert tied.ops[-1].weight == tied.ops[0].weight == "embed"  # type: ignore[union-attr]  # it is there, or the test fails
    assert "lm_head" not in tied.weights
    assert {"embed", "lm_head"} <= set(untied.weights)


def test_weights_are_found_once() -> None:
    plan = plan_of("qwen3")
    assert plan.weights is plan.weights
    with pytest.raises(TypeError, match="does not support item assignment"):
        plan.weights["embed"] = plan.weights["lm_head"]  # type: ignore[index]  # wrong on purpose


def test_last_layer_selects_before_its_output_projection() -> None:
    ops = {op.name: op for op in plan_of("llama-one-layer-relu").ops}
    names = list(ops)
    assert names.index("layers.0.attn") < names.index("select.x") < names.index("layers.0.o")


def test_every_weight_has_a_source() -> None:
    for name, case in tiny.CASES.items():
        spec, weight_map = parse_config(case.config)
        known = {k.replace("{i}", str(i)) for k in weight_map for i in range(len(spec.layers))}
        assert set(lower(spec, 64).weights) <= known, name


def test_decoder_does_not_know_architectures() -> None:
    text = Path(pace.models.decoder.__file__ or "").read_text().lower()
    for architecture in ARCHITECTURES.values():
        assert architecture.model_type not in text
    assert "model_type" not in text
