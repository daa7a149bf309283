"""Plans with matrices in other formats."""

from __future__ import annotations

import pytest
from golden import families, tiny

from pace.config import QUANTIZATIONS
from pace.models.decoder import lower
from pace.models.formats import SCHEMES, formats_of, int8_candidates, with_formats
from pace.models.plan import Embed, ExpertsIn, ExpertsOut, Gemm, Plan, Quantise, Route
from pace.models.registry import parse_config


def plan_of(name: str) -> Plan:
    spec, _ = parse_config((tiny.CASES | families.CASES)[name].config, name)
    return lower(spec, 64)


def test_every_scheme_has_its_name() -> None:
    assert tuple(SCHEMES) == QUANTIZATIONS


def test_every_matrix_but_tables_and_routers() -> None:
    plan = plan_of("llama-gqa4-tied")
    formats = formats_of(plan, "int4")
    gemms = {op.weight for op in plan.ops if isinstance(op, Gemm)}
    assert set(formats) == gemms
    (head,) = (op.weight for op in plan.ops if isinstance(op, Gemm) and op.dst == plan.logits)
    assert formats[head] == "int8g32" and {formats[name] for name in gemms - {head}} == {"int4g32"}
    shapes = with_formats(plan, formats).weights
    assert all(shapes[name].format == formats[name] for name in formats)
    assert any(isinstance(op, Embed) and op.weight == head for op in plan.ops), "the head is the table"


def test_the_head_alone() -> None:
    for name in ("llama-gqa4-tied", "llama-mha"):
        plan = plan_of(name)
        (head,) = (op.weight for op in plan.ops if isinstance(op, Gemm) and op.dst == plan.logits)
        assert formats_of(plan, "int8-head") == {head: "int8g32"}


def test_rows_are_rounded_once_for_all_that_read_them() -> None:
    plan = plan_of("llama-gqa4-tied")
    plan = with_formats(plan, formats_of(plan, "int4"))
    candidates = int8_candidates(plan)
    got = with_formats(plan, {}, "int8")
    got.check()
    assert sum(isinstance(op, Quantise) for op in got.ops) == len(candidates)
    rounded = {op.weight for op in got.ops if isinstance(op, Gemm) and got.slots[op.src].dtype == "int8"}
    assert rounded == candidates, "not the rows of 208 columns, which are no whole groups of 32"
    assert with_formats(plan, {}, "bf16").ops == plan.ops
    one = sorted(candidates)[0]
    some = with_formats(plan, {}, {one: "int8"})
    assert [op.weight for op in some.ops if isinstance(op, Gemm) and some.slots[op.src].dtype == "int8"] == [
        one
    ]


def test_a_format_for_what_is_no_matrix() -> None:
    with pytest.raises(ValueError, match="a format for nothing, which is no packed matrix"):
        with_formats(plan_of("llama-gqa4-tied"), {"nothing": "int8"})


def test_routers_keep_their_numbers() -> None:
    names = [name for name in families.CASES if any(isinstance(op, Route) for op in plan_of(name).ops)]
    assert names
    for name in names:
        plan = plan_of(name)
        formats = formats_of(plan, "int8")
        routed = {op.src for op in plan.ops if isinstance(op, Route)}
        assert not {op.weight for op in plan.ops if isinstance(op, Gemm) and op.dst in routed} & set(formats)
        experts = [op for op in plan.ops if isinstance(op, ExpertsIn | ExpertsOut)]
        assert {op.weight for op in experts if op.format == "bf16"} <= set(formats)
        with_formats(with_formats(plan, formats), {}, "int8").check()
