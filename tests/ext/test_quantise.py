"""Rows of a bf16 checkpoint rounded to int8, int4 and FP8 while they are packed, on every tier."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from ext.kit import bf16, rng, to_bf16
from ext.test_group_formats import FORMATS, e4m3, random_rows

from pace import ops
from pace.errors import CheckpointError
from pace.models.weight_formats import group_of


def quantised(team: ops.Team, format: str, w: Any, dtype: str = "f32") -> Any:
    """Unpacked weights, float64."""
    n, k = w.shape
    matrix = ops.PackedMatrix(team, n, k, format=format)
    source = {"f32": np.float32, "f16": np.float16}
    matrix.pack(to_bf16(w) if dtype == "bf16" else np.ascontiguousarray(w, source[dtype]), dtype)
    return matrix.unpack().astype(np.float64)


def groups(w: Any, format: str) -> Any:
    """[rows, groups, columns], the last group filled with zeros."""
    size = group_of(format) or w.shape[1]
    return np.pad(w, ((0, 0), (0, -w.shape[1] % size))).reshape(len(w), -1, size)


def square_error(x: Any, y: Any, format: str) -> Any:
    """What int4's search makes least: in groups of 128, large weights count for more."""
    return (np.square(x - y) * (np.abs(x) if format == "int4g128" else 1)).sum(-1)


@pytest.mark.parametrize("isa", ops.isas())
@pytest.mark.parametrize("format", FORMATS)
def test_every_weight_is_the_nearest_step(isa: str, team: ops.Team, format: str) -> None:
    """Of the scale that the group has: half a step away at most, but for what int4 clips on purpose."""
    for n, k in ((17, 288), (33, 100), (1, 1)):
        w = rng("quantise", n, k).standard_normal((n, k)).astype(np.float32)
        w[0] = 0
        with ops.using_isa(isa):
            got = quantised(team, format, w)
        x, y = groups(w.astype(np.float64), format), groups(got, format)
        top = np.abs(x).max(-1, keepdims=True)
        assert not got[0].any()
        if format.startswith("fp8"):
            scale = top / 448
            scale = scale if x.shape[1] == 1 else bf16(scale)
            scale = np.where(scale > 0, scale, 1)
            step = scale * np.exp2(np.floor(np.log2(np.maximum(np.abs(x) / scale, 2.0**-6)))) / 8
            assert (np.abs(x - y) <= 0.5001 * step + 0.004 * top * (np.abs(x) > 0.99 * top)).all()
        elif format.startswith("int8"):
            assert (
                np.abs(x - y) <= 0.5001 * top / 127 * (1 + 2.0**-8) + 0.004 * top * (np.abs(x) > 0.99 * top)
            ).all()
        else:
            plain = top / 7
            rounded = np.clip(np.rint(x / np.where(plain > 0, plain, 1)), -8, 7) * plain
            error, least = (square_error(x, each, format) for each in (y, rounded))
            assert error.sum() < (0.95 if k > 1 else 1.01) * least.sum() + 1e-9  # the search pays


@pytest.mark.parametrize("format", ["int4g32", "int4g64", "int4g128"])
def test_a_search_never_loses_to_the_extreme_at_minus_eight(team: ops.Team, format: str) -> None:
    w = rng("search").standard_t(4, (64, 256)).astype(np.float32)
    y, x = groups(quantised(team, format, w), format), groups(w.astype(np.float64), format)
    at = np.abs(x).argmax(-1)[..., None]
    scale = bf16(np.take_along_axis(x, at, -1) / -8)
    plain = np.clip(np.rint(x / scale), -8, 7) * scale
    assert (square_error(x, y, format) <= square_error(x, plain, format) * 1.0001).all()


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_sources_of_sixteen_bits(team: ops.Team, dtype: str) -> None:
    """The same as from their values as f32."""
    w = rng(dtype).standard_normal((20, 96))
    w = bf16(w) if dtype == "bf16" else w.astype(np.float16).astype(np.float64)
    for format in ("int8g32", "int4g32", "fp8"):
        assert quantised(team, format, w, dtype).tobytes() == quantised(team, format, w).tobytes()


def test_numbers_of_e4m3_stay(team: ops.Team) -> None:
    """Ties to even between them; the largest makes the scale 1."""
    values = np.sort(e4m3()[[i for i in range(256) if i & 127 != 127]])
    w = np.concatenate([values, (values[1:] + values[:-1]) / 2])[None].repeat(2, 0)
    got = quantised(team, "fp8", w)[0]
    assert np.array_equal(got[: len(values)], values)
    halves = got[len(values) :]
    assert (np.abs(halves - w[0, len(values) :]) <= np.diff(values) / 2).all()
    codes = {value: code for code, value in enumerate(e4m3()) if code & 127 != 127}
    assert all(codes[value] % 2 == 0 for value in halves)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("format", ["int8", "int4g32", "fp8g128"])
def test_a_weight_that_is_no_number(team: ops.Team, format: str, value: float) -> None:
    w = np.ones((40, 256))
    w[37, 200] = value
    with pytest.raises(CheckpointError, match="row 37 has a weight that is no finite number"):
        quantised(team, format, w)


def test_elements_for_what_has_zeros(team: ops.Team) -> None:
    matrix = ops.PackedMatrix(team, 32, 64, format="int4g32")
    matrix.pack_groups(random_rows("int4g32", 16, 64, "zeros"))
    with pytest.raises(ValueError, match="expected its codes and scales"):
        matrix.pack(np.ones((16, 64), np.float32), "f32", at=16)
