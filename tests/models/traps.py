"""What the tests of traps share: cases with their configs changed, their plans and their distance from transformers.

A trap is a bug that other engines had (numbers as in the notes on models); a test is named after it. Those of layouts of
experts are in test_expert_layouts.py, those of tokens and chats in tests/text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from golden import families, tiny
from golden.harness import (
    Model,
    prefill,
    relative_error,
)

from pace.models.decoder import lower
from pace.models.plan import Plan
from pace.models.registry import parse_config
from pace.models.spec import DecoderSpec
from pace.models.weights import tensor_shapes

FULL, SLIDING = "full_attention", "sliding_attention"
TOLERANCE = 3e-5

FamilyModel = Callable[..., Model]


def config_of(name: str, **changes: Any) -> dict[str, Any]:
    """A case's config with some keys changed; `...` removes one."""
    return {k: v for k, v in {**families.CASES[name].config, **changes}.items() if v is not ...}


def spec_of(name: str, **changes: Any) -> DecoderSpec:
    return parse_config(config_of(name, **changes))[0]


def plan_of(name: str, **changes: Any) -> Plan:
    return lower(spec_of(name, **changes), 48)


def shapes_of(name: str, **changes: Any) -> dict[str, tuple[int, ...]]:
    """Tensors of a checkpoint with this config."""
    spec, weight_map = parse_config(config_of(name, **changes))
    found = tensor_shapes(lower(spec, 48), weight_map, len(spec.layers))
    return {name: tensor.shape for name, tensor in found.items()}


def ffns(name: str) -> list[object]:
    return [layer.ffn for layer in spec_of(name).layers]


def ops_of(plan: Plan, kind: type) -> list[Any]:
    return [op for op in plan.ops if isinstance(op, kind)]


def prompt(name: str) -> list[int]:
    return tiny.prompt(name, families.VOCAB_SIZE)


def error_of(model: Model, name: str, golden: dict[str, np.ndarray], **changes: Any) -> float:
    """Distance of a model (with its plan changed) from transformers' logits."""
    logits = prefill(model.reference(**changes), prompt(name))
    return relative_error(logits[list(tiny.GOLDEN_ROWS)], golden[name])


def with_ops(plan: Plan, kind: type, change: Callable[[Any], dict[str, Any]]) -> tuple[Any, ...]:
    """The plan's operators, those of a kind with some fields changed."""
    return tuple(replace(op, **change(op)) if isinstance(op, kind) else op for op in plan.ops)
