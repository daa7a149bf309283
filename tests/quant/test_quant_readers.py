"""Every layout of quantised tensors: exactly the weights that its documentation says, or an error in one line."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from quant import layouts

from pace.checkpoint import Checkpoint
from pace.errors import PaceError, WeightsError
from pace.models.quantisation import quantisation
from pace.quant.groups import GroupedRows
from pace.quant.matrices import Matrix, by_group

N, K = 40, 128


def opened(quantised: layouts.Quantised) -> Matrix:
    """The one matrix of a checkpoint that holds these tensors as module "m.q_proj"."""
    checkpoint = layouts.Memory({f"m.q_proj.{end}": value for end, value in quantised.tensors.items()})
    config = quantisation({"quantization_config": quantised.config})
    assert config is not None
    (found,) = config.find(checkpoint)
    assert found.name == "m.q_proj.weight"
    assert set(found.members) <= set(checkpoint.tensors)
    return found.open(("m.q_proj",))


def values(matrix: Matrix, part: slice | None = None) -> npt.NDArray[Any]:
    rows = matrix.rows(slice(0, matrix.shape[0], 1) if part is None else part)
    return rows if isinstance(rows, np.ndarray) else rows.dequantised()


CASES: dict[str, Callable[[], layouts.Quantised]] = {
    "compressed w4 g32": lambda: layouts.compressed(N, K),
    "compressed w4 g128": lambda: layouts.compressed(N, K, group=128),
    "compressed w4 channel": lambda: layouts.compressed(N, K, group=None),
    "compressed w4 asymmetric": lambda: layouts.compressed(N, K, symmetric=False),
    "compressed w4 of odd width": lambda: layouts.compressed(N, 100, group=50),
    "compressed w8 g32": lambda: layouts.compressed(N, K, 8),
    "compressed w8 asymmetric": lambda: layouts.compressed(N, K, 8, symmetric=False),
    **{
        f"compressed w{bits}{' asymmetric' * (not symmetric)}{', whole words' * whole}": (
            partial(layouts.compressed, N, K, bits, symmetric=symmetric, whole=whole)
        )
        for bits in (2, 3, 5, 6, 7)
        for symmetric in (True, False)
        for whole in (True, False)
    },
    "compressed int8 channel": lambda: layouts.int8(N, K),
    "compressed int8 tensor": lambda: layouts.int8(N, K, tensor=True),
    "compressed int8 asymmetric": lambda: layouts.int8(N, K, symmetric=False),
    "compressed int8 tensor asymmetric": lambda: layouts.int8(N, K, tensor=True, symmetric=False),
    "gptq v1": lambda: layouts.gptq(N, K),
    "gptq v2": lambda: layouts.gptq(N, K, version=2),
    "gptq symmetric v1": lambda: layouts.gptq(N, K, symmetric=True),
    "gptq symmetric v2": lambda: layouts.gptq(N, K, symmetric=True, version=2),
    "gptq w8": lambda: layouts.gptq(N, K, 8),
    "gptq w8 symmetric": lambda: layouts.gptq(N, K, 8, symmetric=True),
    "gptq w3": lambda: layouts.gptq(64, 96, 3),
    "gptq w2": lambda: layouts.gptq(N + 8, K, 2),
    "gptq desc_act": lambda: layouts.gptq(N, K, order=1),
    "gptq desc_act v2": lambda: layouts.gptq(N, K, order=1, version=2),
    "gptq desc_act symmetric": lambda: layouts.gptq(N, K, order=1, symmetric=True),
    "gptq w8 desc_act": lambda: layouts.gptq(N, K, 8, order=1),
    "gptq w3 desc_act": lambda: layouts.gptq(64, 96, 3, order=1),
    "compressed w4 actorder": lambda: layouts.compressed(N, K, order=1),
    "compressed w4 actorder asymmetric": lambda: layouts.compressed(N, K, symmetric=False, order=1),
    "compressed w8 actorder": lambda: layouts.compressed(N, K, 8, order=1),
    "compressed int8 in groups": lambda: layouts.int8_groups(N, K),
    "compressed int8 in groups, actorder": lambda: layouts.int8_groups(N, K, order=1),
    "awq": lambda: layouts.awq(N, K),
    "fp8 blocks": lambda: layouts.fp8(300, 200),
    "fp8 tensor": lambda: layouts.fp8(N, K, "tensor"),
    "fp8 rows": lambda: layouts.fp8(N, K, "row"),
    "nvfp4": lambda: layouts.nvfp4(N, K),
    "nvfp4 of modelopt": lambda: layouts.nvfp4(N, K, modelopt=True),
}


@pytest.mark.parametrize("name", CASES)
def test_reads_what_the_layout_means(name: str) -> None:
    """Exact in float32 for scales of 16 bits; f32 scales of FP8 and NVFP4 round a product once."""
    quantised = CASES[name]()
    matrix = opened(quantised)
    assert matrix.shape == quantised.weights.shape
    np.testing.assert_array_equal(values(matrix), quantised.weights.astype(np.float32))
    if not name.startswith(("fp8", "nvfp4")):
        np.testing.assert_array_equal(values(matrix), quantised.weights)


@pytest.mark.parametrize("name", [name for name in CASES if "desc_act" in name or "actorder" in name])
def test_columns_in_any_order_keep_their_bits_by_group(name: str) -> None:
    """Codes as the file has them, each once, and the weights bit for bit."""
    quantised = CASES[name]()
    found = by_group(opened(quantised))
    assert found is not None
    assert sorted(found.order) == list(range(quantised.weights.shape[1]))
    (groups,) = (array for end, (array, _) in quantised.tensors.items() if end.endswith("g_idx"))
    assert (np.diff(groups[found.order]) >= 0).all()
    for part in (slice(0, len(quantised.weights), 1), slice(1, 40, 2)):
        rows = found.matrix.rows(part)
        assert rows.bits == (8 if "8" in name else 4)
        np.testing.assert_array_equal(rows.dequantised(), quantised.weights[part][:, found.order])


def test_groups_of_several_sizes_are_read_but_not_by_group() -> None:
    quantised = layouts.compressed(N, K, order=1)
    groups = quantised.tensors["weight_g_idx"][0]
    groups[np.flatnonzero(groups == 0)[0]] = 1
    matrix = opened(quantised)
    assert by_group(matrix) is None
    fields, scales, _ = layouts.parts(N, K, 4, 32)
    meant = (fields - 8) * layouts.widen(layouts.bf16(scales))[:, groups]
    np.testing.assert_array_equal(values(matrix), meant)


def test_columns_that_nobody_ordered() -> None:
    """The order that compressed-tensors begins with is -1 everywhere: columns stand in the order of their groups."""
    quantised = layouts.compressed(N, K)
    quantised.tensors["weight_g_idx"] = np.full(K, -1, np.int32), "I32"
    matrix = opened(quantised)
    assert matrix.kind == "grouped"
    np.testing.assert_array_equal(values(matrix), quantised.weights)


@pytest.mark.parametrize(
    "name", ["compressed w3", "compressed w4 asymmetric", "gptq v1", "awq", "fp8 blocks"]
)
def test_any_rows_can_be_read(name: str) -> None:
    quantised = CASES[name]()
    matrix = opened(quantised)
    for part in (slice(0, 1, 1), slice(5, 29, 1), slice(1, 40, 2), slice(33, 40, 3)):
        np.testing.assert_array_equal(values(matrix, part), quantised.weights.astype(np.float32)[part])


@pytest.mark.parametrize("name", CASES)
def test_tensors_at_any_address_of_a_file(name: str, tmp_path: Path) -> None:
    """llama.cpp#16479: tensors begin where others end, here at odd addresses; the reader copies such ones."""
    quantised = CASES[name]()
    path = tmp_path / "model.safetensors"
    tensors = {f"m.q_proj.{end}": value for end, value in quantised.tensors.items()}
    layouts.write_safetensors(path, {"odd": (np.zeros(1, np.uint8), "U8"), **tensors})
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + size] + b" " * (-(8 + size) % 64)  # so that the data begins at a cache line
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + size :])
    with Checkpoint(tmp_path) as checkpoint:
        config = quantisation({"quantization_config": quantised.config})
        assert config is not None
        (found,) = config.find(checkpoint)
        got = values(found.open(("m.q_proj",)))
        np.testing.assert_array_equal(got, quantised.weights.astype(np.float32))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_symmetric_codes_stay_symmetric_in_the_wider_range(bits: int) -> None:
    rows = opened(layouts.compressed(N, K, bits)).rows(slice(0, N, 1))
    assert isinstance(rows, GroupedRows) and rows.offsets is None
    assert rows.bits == (4 if bits <= 4 else 8) and int(rows.codes.max()) < 1 << rows.bits


def test_sym_gptq_with_zeros_of_v2_under_the_label_of_v1() -> None:
    """vllm#38966, vllm#26092: a field of 8 means 8 in every symmetric file, whatever its label; q = 8 is weight 0."""
    for version, label in ((2, "gptq"), (1, "gptq_v2")):
        quantised = layouts.gptq(N, K, symmetric=True, version=version, label=label)
        np.testing.assert_array_equal(values(opened(quantised)), quantised.weights)


def test_gptq_zero_of_0_is_stored_as_15() -> None:
    """GPTQModel#2350, TGI#2120: q = 3, z = 0, s = 1 is 3, not -12 nor -13; neighbours keep theirs."""
    quantised = layouts.gptq(8, 32)
    zeros = quantised.tensors["qzeros"][0]
    fields = zeros.view(np.uint32)
    assert fields[0, 0] & 15 == 15  # the one that layouts.parts puts there
    np.testing.assert_array_equal(values(opened(quantised)), quantised.weights)


def test_awq_zero_of_0_stays_0() -> None:
    """Conversions of AWQ to GPTQ subtract 1 from it."""
    quantised = layouts.awq(8, 32)
    assert (quantised.weights[0] >= 0).all()  # z = 0 there
    np.testing.assert_array_equal(values(opened(quantised)), quantised.weights)


def test_three_bits_in_twelve_words_and_in_thirteen() -> None:
    """compressed-tensors#715: the packing changed under one name; the width tells."""
    new, old = (layouts.compressed(N, 128, 3, whole=whole) for whole in (False, True))
    assert new.tensors["weight_packed"][0].shape[1] == 12
    assert old.tensors["weight_packed"][0].shape[1] == 13
    np.testing.assert_array_equal(values(opened(new)), values(opened(old)))


def test_widths_that_both_packings_have_are_refused() -> None:
    quantised = layouts.compressed(N, 5, 7, group=None)
    with pytest.raises(WeightsError, match="older and the newer packing"):
        opened(quantised)


def test_int8_has_minus_128() -> None:
    """ggml#1393, openvino#36764: -128 and -5 are themselves."""
    quantised = layouts.int8(2, 32)
    codes = quantised.tensors["weight"][0]
    codes[0, :2] = -128, -5
    quantised.tensors["weight_scale"] = (layouts.bf16(np.ones((2, 1), np.float32)), "BF16")
    np.testing.assert_array_equal(values(opened(quantised))[0, :2], [-128, -5])


def test_block_sizes_come_from_the_config_not_from_shapes() -> None:
    """TensorRT-Model-Connect#1115: 1000 rows with 8 scales are 7 blocks of 128 and one of 104: row 126 has scale 0."""
    quantised = layouts.fp8(1000, 128)
    assert quantised.tensors["weight_scale_inv"][0].shape == (8, 1)
    np.testing.assert_array_equal(values(opened(quantised)), quantised.weights.astype(np.float32))


def test_blocks_of_576_rows() -> None:
    """transformers#36026: a last block that is half one."""
    quantised = layouts.fp8(576, 64)
    np.testing.assert_array_equal(values(opened(quantised)), quantised.weights.astype(np.float32))


def test_blocks_move_with_their_rows() -> None:
    """sglang#35703: permuting rows by blocks and their scales alike commutes with dequantising."""
    plain = layouts.fp8(256, 64)
    swapped = layouts.Quantised(dict(plain.tensors), plain.weights, plain.config)
    swapped.tensors["weight"] = (np.roll(plain.tensors["weight"][0], 128, 0), "F8_E4M3")
    swapped.tensors["weight_scale_inv"] = (np.roll(plain.tensors["weight_scale_inv"][0], 1, 0), "F32")
    np.testing.assert_array_equal(values(opened(swapped)), np.roll(values(opened(plain)), 128, 0))


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F8_E8M0"])
def test_scale_inv_multiplies_in_every_dtype(dtype: str) -> None:
    quantised = layouts.fp8(256, 128)
    exponents = np.array([[-3], [2]])
    stored = {
        "F32": np.ldexp(np.float32(1), exponents),
        "BF16": layouts.bf16(np.ldexp(np.float32(1), exponents)),
        "F8_E8M0": (exponents + 127).astype(np.uint8),
    }[dtype]
    quantised.tensors["weight_scale_inv"] = (stored, dtype)
    found = values(opened(quantised))
    codes = layouts.e4m3(quantised.tensors["weight"][0])
    np.testing.assert_array_equal(found[:128], codes[:128] / 8)
    np.testing.assert_array_equal(found[128:], codes[128:] * 4)


def test_one_weight_in_every_format_has_one_value() -> None:
    """vllm#41892: the same integers, scales and zeros through every reader of integers."""
    plain = layouts.compressed(N, K, symmetric=False, seed=5)
    scales = layouts.bf16(layouts.parts(N, K, 4, 32, 5)[1])
    others = [layouts.gptq(N, K, seed=5), layouts.gptq(N, K, version=2, seed=5), layouts.awq(N, K, seed=5)]
    for other in others:
        f16 = layouts.widen(scales).astype(np.float16)
        other.tensors["scales"] = (np.ascontiguousarray(f16.T), "F16")
        np.testing.assert_array_equal(values(opened(other)), values(opened(plain)))


Breaks = Callable[[dict[str, tuple[npt.NDArray[Any], str]]], None]


def _drop(end: str) -> Breaks:
    return lambda tensors: tensors.__delitem__(end) if end in tensors else None


def _set(end: str, dtype: str, change: Callable[[npt.NDArray[Any]], npt.NDArray[Any]]) -> Breaks:
    def apply(tensors: dict[str, tuple[npt.NDArray[Any], str]]) -> None:
        tensors[end] = (np.ascontiguousarray(change(tensors[end][0])), dtype)

    return apply


def _nan_at_the_end(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    array = array.copy()
    array.reshape(-1)[-1] = 0x7FC0 if array.dtype == np.uint16 else np.nan
    return array


BROKEN: dict[str, tuple[str, Breaks, str]] = {
    "no scales": ("compressed w4 g32", _drop("weight_scale"), "m.q_proj.weight_scale is missing"),
    "no shape": ("compressed w4 g32", _drop("weight_shape"), "weight_shape is missing"),
    "no zeros": ("compressed w4 asymmetric", _drop("weight_zero_point"), "weight_zero_point is missing"),
    "scales of fewer groups": (
        "compressed w4 g32",
        _set("weight_scale", "BF16", lambda a: a[:, :2]),
        "weight_scale is [40, 2], expected [40, 4]",
    ),
    "packed as u8": (
        "compressed w4 g32",
        _set("weight_packed", "U8", lambda a: a.view(np.uint8)),
        "expected I32",
    ),
    "packed too short": (
        "compressed w4 g32",
        _set("weight_packed", "I32", lambda a: a[:, :9]),
        "expected [40, 16]",
    ),
    "scales of NaN": (
        "compressed w4 g32",
        _set("weight_scale", "BF16", _nan_at_the_end),
        "a scale of row 39",
    ),
    "a negative shape": (
        "compressed w4 g32",
        _set("weight_shape", "I64", lambda a: -a),
        "expected rows and columns",
    ),
    "zeros of another shape": (
        "compressed w4 asymmetric",
        _set("weight_zero_point", "I32", lambda a: a[:, :3]),
        "weight_zero_point is [5, 3], expected [5, 4]",
    ),
    "int8 stored as FP8": ("compressed int8 channel", _set("weight", "F8_E4M3", lambda a: a), "expected I8"),
    "int8 without scales": ("compressed int8 channel", _drop("weight_scale"), "weight_scale is missing"),
    "gptq without zeros": ("gptq v1", _drop("qzeros"), "m.q_proj.qzeros is missing"),
    "gptq with scales of fewer groups": (
        "gptq v1",
        _set("scales", "F16", lambda a: a[:2]),
        "expected [4, 40]",
    ),
    "gptq with integers as scales": (
        "gptq v1",
        _set("scales", "I32", lambda a: a.astype(np.int32)),
        "has dtype I32",
    ),
    "gptq with NaN": ("gptq v1", _set("scales", "F16", _nan_at_the_end), "a scale of row 39"),
    "gptq with groups that do not exist": (
        "gptq v1",
        _set("g_idx", "I32", lambda a: a + 1),
        "expected groups from 0",
    ),
    "gptq with too few columns": (
        "gptq v1",
        _set("g_idx", "I32", lambda a: a[:9]),
        "g_idx is [9], expected [128]",
    ),
    "gptq with groups that are no integers": (
        "gptq desc_act",
        _set("g_idx", "F32", lambda a: a.astype(np.float32)),
        "g_idx has dtype F32, expected I32 or I64",
    ),
    "compressed with groups that do not exist": (
        "compressed w4 actorder",
        _set("weight_g_idx", "I32", lambda a: a - 1),
        "weight_g_idx holds -1 to 2, expected groups from 0 to 3",
    ),
    "compressed with groups of too many columns": (
        "compressed w4 actorder",
        _set("weight_g_idx", "I32", lambda a: np.tile(a, 2)),
        "weight_g_idx is [256], expected [128]",
    ),
    "int8 with groups of other columns": (
        "compressed int8 in groups, actorder",
        _set("weight_g_idx", "I32", lambda a: a[:, None]),
        "weight_g_idx is [128, 1], expected [128]",
    ),
    "awq with zeros of fewer groups": ("awq", _set("qzeros", "I32", lambda a: a[:1]), "expected [4, 5]"),
    "fp8 without scales": ("fp8 blocks", _drop("weight_scale_inv"), "weight_scale is missing"),
    "fp8 in other blocks": (
        "fp8 blocks",
        _set("weight_scale_inv", "F32", lambda a: a[:2]),
        "expected [3, 2]",
    ),
    "fp8 with NaN": ("fp8 rows", _set("weight", "F8_E4M3", lambda a: a | 0x7F), "holds a NaN"),
    "fp8 with infinite scales": (
        "fp8 tensor",
        _set("weight_scale", "F32", lambda a: a * np.inf),
        "no finite number",
    ),
    "nvfp4 without its whole scale": (
        "nvfp4",
        _drop("weight_global_scale"),
        "m.q_proj.weight_global_scale is missing",
    ),
    "nvfp4 with a whole scale of 0": (
        "nvfp4",
        _set("weight_global_scale", "F32", lambda a: a * 0),
        "holds 0.0, expected a finite number",
    ),
    "nvfp4 with scales of wider groups": (
        "nvfp4",
        _set("weight_scale", "F8_E4M3", lambda a: a[:, :4]),
        "weight_scale is [40, 4], expected [40, 8]",
    ),
    "nvfp4 with scales that are no numbers": (
        "nvfp4 of modelopt",
        _set("weight_scale", "F8_E4M3", lambda a: a | 0x7F),
        "a scale of row 0 is no finite number",
    ),
    "nvfp4 in words": ("nvfp4", _set("weight_packed", "I32", lambda a: a.view(np.int32)), "expected U8"),
    "nvfp4 of odd width": (
        "nvfp4",
        _set("weight_packed", "U8", lambda a: a[:, :-3]),
        "expected a multiple of 16",
    ),
    "fp8 with groups of columns": (
        "fp8 rows",
        lambda tensors: tensors.update(weight_g_idx=(np.zeros(K, np.int32), "I32")),
        "weight_g_idx orders columns of FP8",
    ),
    "fp8 as e5m2": ("fp8 rows", _set("weight", "F8_E5M2", lambda a: a), "has dtype F8_E5M2"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_bad_tensors_are_refused_in_one_line(name: str) -> None:
    case, breaks, message = BROKEN[name]
    quantised = CASES[case]()
    breaks(quantised.tensors)
    with pytest.raises(PaceError) as caught:
        values(opened(quantised))
    assert message in str(caught.value)


RAGGED: dict[str, tuple[Callable[[], layouts.Quantised], str, int]] = {
    "packed": (lambda: layouts.compressed(N, K, group=48), "weight_scale", 1),
    "packed w8": (lambda: layouts.compressed(N, K, 8, 48, symmetric=False), "weight_scale", 1),
    "int8": (lambda: layouts.int8_groups(N, K, 48), "weight_scale", 1),
    "gptq": (lambda: layouts.gptq(N, K, group=48), "scales", 0),
    "gptq desc_act": (lambda: layouts.gptq(N, K, group=48, order=1), "scales", 0),
    "awq": (lambda: layouts.awq(N, K, 48), "scales", 0),
}


@pytest.mark.parametrize("name", RAGGED)
def test_groups_that_do_not_divide_the_columns(name: str) -> None:
    """128 columns in groups of 48: the 32 that are left have a scale of their own, else the file is refused in one line.

    GGUF's blocks have no such rest: tests/checkpoint/test_gguf_hostile.py.
    """
    make, end, axis = RAGGED[name]
    quantised = make()
    np.testing.assert_array_equal(values(opened(quantised)), quantised.weights.astype(np.float32))
    scales, dtype = quantised.tensors[end]
    quantised.tensors[end] = np.ascontiguousarray(np.take(scales, (0, 1), axis)), dtype
    with pytest.raises(PaceError, match=rf"{end} is \[.*\], expected \[") as caught:
        values(opened(quantised))
    assert "\n" not in str(caught.value)
