"""Quantised checkpoints in the engine: their own format in memory, and the weights that the file means."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from golden import tiny
from models.test_quantisation import checkpoint
from quant import layouts

from pace import ops
from pace.engine.packing import PackedSink
from pace.models.decoder import lower
from pace.models.formats import with_formats
from pace.models.held import held_formats
from pace.models.quantisation import quantisation
from pace.models.registry import parse_config
from pace.models.weights import DenseSink, Tensors, load_weights

CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "compressed-tensors in groups of 32": ("compressed", {}, "int4g32"),
    "compressed-tensors asymmetric": ("compressed", {"symmetric": False}, "int4g32"),
    "compressed-tensors of 8 bits": ("compressed", {"bits": 8}, "int8g32"),
    "compressed-tensors of 6 bits": ("compressed", {"bits": 6}, "int8g32"),
    "int8 a row": ("int8", {}, "int8"),
    "gptq": ("gptq", {}, "int4g32"),
    "awq": ("awq", {}, "int4g32"),
    "nvfp4": ("nvfp4", {}, "int8g16"),
    "fp8 in blocks": ("fp8", {}, "fp8g128"),
}


@pytest.mark.parametrize("name", CASES)
def test_packed_is_what_the_file_means(name: str, team: ops.Team) -> None:
    """Bit for bit for scales of 16 bits, and for f32 scales of FP8 too, as one product is rounded once."""
    format, options, expected = CASES[name]
    config, tensors, _ = checkpoint(format, **options)
    spec, weight_map = parse_config(config)
    opened = Tensors(layouts.Memory(tensors), weight_map, len(spec.layers), quantisation(config))
    plan = lower(spec, tiny.N_TOKENS)
    formats = held_formats(plan, opened)
    # Rows of 128 columns are one group of 128.
    assert set(formats.values()) - {"fp8"} == {expected}
    assert set(formats) == {
        f"layers.{i}.{part}" for i in range(2) for part in ("qkv", "o", "gate_up", "down")
    }
    plan = with_formats(plan, formats)
    packed, dense = PackedSink(team), DenseSink()
    load_weights(plan, opened, packed)
    load_weights(plan, opened, dense)
    for weight in formats:
        matrix = packed.weights[weight]
        assert isinstance(matrix, ops.PackedMatrix) and matrix.format == formats[weight]
        np.testing.assert_array_equal(
            matrix.unpack(), dense.weights[weight].astype(np.float32), err_msg=weight
        )


def test_columns_in_any_order_become_bf16(caplog: pytest.LogCaptureFixture) -> None:
    config, tensors, _ = checkpoint("gptq", desc_act=True)
    spec, weight_map = parse_config(config)
    opened = Tensors(layouts.Memory(tensors), weight_map, len(spec.layers), quantisation(config))
    assert held_formats(lower(spec, 8), opened) == {}
    assert "become bf16" in caplog.text
