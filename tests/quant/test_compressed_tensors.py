"""Against the format's own tool, where it is installed: its dequantised values, bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from quant import layouts

from pace.models.quantisation import quantisation
from pace.quant.matrices import Matrix

pytestmark = pytest.mark.live

TORCH = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "int8": "I8", "int32": "I32", "int64": "I64"}
TORCH |= {"float8_e4m3fn": "F8_E4M3", "uint8": "U8"}

SCHEMES: dict[str, tuple[str, dict[str, Any]]] = {
    **{
        f"packed {bits} {'symmetric' if symmetric else 'asymmetric'} {group or 'channel'}": (
            "pack-quantized",
            {"num_bits": bits, "type": "int", "symmetric": symmetric}
            | ({"strategy": "group", "group_size": group} if group else {"strategy": "channel"}),
        )
        for bits in (2, 3, 4, 5, 6, 7, 8)
        for symmetric in (True, False)
        for group in (32, 128, None)
    },
    "int8 channel": (
        "int-quantized",
        {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"},
    ),
    "int8 channel asymmetric": (
        "int-quantized",
        {"num_bits": 8, "type": "int", "symmetric": False, "strategy": "channel"},
    ),
    "fp8 channel": (
        "float-quantized",
        {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"},
    ),
    "fp8 tensor": (
        "float-quantized",
        {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor"},
    ),
    "fp8 block": (
        "float-quantized",
        {
            "num_bits": 8,
            "type": "float",
            "symmetric": True,
            "strategy": "block",
            "block_structure": [128, 128],
        },
    ),
}


def bits_of(tensor: Any) -> tuple[np.ndarray, str]:
    """A torch tensor as numpy has its bytes, and its dtype's name."""
    import torch

    dtype = TORCH[str(tensor.dtype).removeprefix("torch.")]
    if dtype == "BF16":
        return tensor.contiguous().view(torch.int16).numpy().view(np.uint16), dtype
    if dtype == "F8_E4M3":
        return tensor.contiguous().view(torch.uint8).numpy(), dtype
    return tensor.contiguous().numpy(), dtype


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", SCHEMES)
def test_values_are_the_tools(name: str, dtype: str) -> None:
    """It multiplies in the scales' dtype: R(f32(q - z) * f32(s)); pace's value is that before rounding."""
    pytest.importorskip("compressed_tensors")
    import torch
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    form, weights = SCHEMES[name]
    args = QuantizationArgs(**weights)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    n, k = 160, 256
    torch.manual_seed(len(name))
    weight = torch.randn(n, k, dtype=torch.float32).to(getattr(torch, dtype))
    if args.strategy == "block":
        blocks = torch.nn.functional.pad(weight, (0, 0, 0, -n % 128)).reshape(-1, 128, k // 128, 128)
        low, high = blocks.amin((1, 3)), blocks.amax((1, 3))
    elif args.strategy == "tensor":
        low, high = weight.amin().reshape(1), weight.amax().reshape(1)
    else:
        groups = weight.reshape(n, -1, args.group_size or k)
        low, high = groups.amin(-1), groups.amax(-1)
    scale, zero = calculate_qparams(low, high, args)
    compressor = BaseCompressor.get_value_from_registry(form)
    state = {"weight": weight, "weight_scale": scale.to(weight.dtype)}
    if not args.symmetric:
        state["weight_zero_point"] = zero
    stored = compressor.compress(state, scheme)
    expected = compressor.decompress(stored, scheme)["weight"]
    quantised = layouts.Quantised(
        {end: bits_of(tensor) for end, tensor in stored.items()},
        np.empty(0),
        layouts.ct_config(form, **weights),
    )
    assert_equal(quantised, expected)


def assert_equal(quantised: layouts.Quantised, expected: Any) -> None:
    """The reader's values, rounded to the tool's type, are the tool's; of zeros the sign is free."""
    import torch

    matrix = opened(quantised)
    rows = matrix.rows(slice(0, matrix.shape[0], 1))
    values = rows if isinstance(rows, np.ndarray) else rows.dequantised()
    rounded = torch.from_numpy(values).to(expected.dtype)
    assert torch.equal((rounded + 0).view(torch.int16), (expected + 0).view(torch.int16))


def test_nvfp4_is_the_tools() -> None:
    """It divides the scales by the global one in f32, and rounds the product with a code once."""
    pytest.importorskip("compressed_tensors")
    import torch
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    own = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group", "group_size": 16}
    own |= {"scale_dtype": torch.float8_e4m3fn, "zp_dtype": torch.float8_e4m3fn}
    args = QuantizationArgs(**own)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    torch.manual_seed(0)
    weight = torch.randn(96, 256, dtype=torch.float32).to(torch.bfloat16)
    groups = weight.reshape(96, -1, 16)
    whole = generate_gparam(weight.amin().reshape(1), weight.amax().reshape(1))
    scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), args, global_scale=whole)
    compressor = BaseCompressor.get_value_from_registry("nvfp4-pack-quantized")
    state = {"weight": weight, "weight_scale": scale, "weight_global_scale": whole}
    stored = compressor.compress(state, scheme)
    expected = compressor.decompress(dict(stored), scheme)["weight"]
    config = layouts.nvfp4(16, 16).config
    tensors = {end: bits_of(tensor) for end, tensor in stored.items()}
    assert_equal(layouts.Quantised(tensors, np.empty(0), config), expected)


def opened(quantised: layouts.Quantised) -> Matrix:
    """The matrix of module "m.q_proj"."""
    checkpoint = layouts.Memory({f"m.q_proj.{end}": value for end, value in quantised.tensors.items()})
    config = quantisation({"quantization_config": quantised.config})
    assert config is not None
    (found,) = config.find(checkpoint)
    return found.open(("m.q_proj",))
