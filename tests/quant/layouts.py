"""Quantised tensors as their formats document them, packed here bit by bit, and the weights that they mean in float64.

The readers are tested against these: nothing is shared with them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import safe_open

Array = npt.NDArray[Any]

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Row of the nibble at bit 4 i of a word."""


@dataclass
class Quantised:
    """A module's tensors, and what they mean.

    Args:
        tensors: by the ends of their names: array and dtype as safetensors spells it.
        weights: float64 [n, k].
        config: quantization_config that describes them.
    """

    tensors: dict[str, tuple[Array, str]]
    weights: Array
    config: dict[str, Any] = field(default_factory=dict)


def pack_bits(fields: Array, bits: int, whole: bool = False) -> Array:
    """Rows of fields as int32 words: a little-endian stream, or with `whole` no field in two words."""
    per = 32 // bits
    words = -(-fields.shape[1] // per) if whole else -(-fields.shape[1] * bits // 32)
    packed = np.zeros((len(fields), words + 1), np.uint64)
    for i in range(fields.shape[1]):
        word, bit = (i // per, i % per * bits) if whole else divmod(i * bits, 32)
        value = fields[:, i].astype(np.uint64) << np.uint64(bit)
        packed[:, word] |= value & np.uint64(0xFFFFFFFF)
        packed[:, word + 1] |= value >> np.uint64(32)
    return packed[:, :words].astype(np.uint32).view(np.int32)


def bf16(values: Array) -> Array:
    """The bits of values that bf16 has exactly, or of those cut off."""
    return (np.ascontiguousarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def widen(bits: Array) -> Array:
    """bf16 bits as float64."""
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def spread(of_groups: Array, group: int, k: int) -> Array:
    """[n, groups] at every column."""
    return np.repeat(of_groups, group, axis=1)[:, :k]


def parts(n: int, k: int, bits: int, group: int, seed: int = 0) -> tuple[Array, Array, Array]:
    """Fields [n, k] over the full range, f16 scales and zero points [n, groups]; 0 and 2^bits - 1 are among those. Weights
    are of one size whatever the bits."""
    rng = np.random.default_rng(seed)
    groups = -(-k // group)
    fields = rng.integers(0, 1 << bits, (n, k))
    fields[0, :2] = 0, (1 << bits) - 1
    scales = (rng.uniform(0.002, 0.02, (n, groups)) * 2.0 ** (4 - bits)).astype(np.float16)
    zeros = rng.integers(0, 1 << bits, (n, groups))
    zeros[0, 0], zeros[-1, -1] = 0, (1 << bits) - 1
    return fields, scales, zeros


def groups_of(k: int, group: int, order: int | None) -> Array:
    """i32 [k]: the group that each column belongs to; `order` is the seed of a random one, None: side by side."""
    columns = (np.arange(k) // group).astype(np.int32)
    return columns if order is None else np.random.default_rng(order).permutation(columns)


def compressed(
    n: int,
    k: int,
    bits: int = 4,
    group: int | None = 32,
    *,
    symmetric: bool = True,
    whole: bool = False,
    order: int | None = None,
    seed: int = 0,
) -> Quantised:
    """pack-quantized of compressed-tensors; `order` as of `groups_of`."""
    size = k if group is None else group
    fields, scales, zeros = parts(n, k, bits, size, seed)
    zeros = np.full_like(zeros, 1 << bits - 1) if symmetric else zeros
    bits16 = bf16(scales)
    tensors = {
        "weight_packed": (pack_bits(fields, bits, whole), "I32"),
        "weight_scale": (bits16, "BF16"),
        "weight_shape": (np.array([n, k], np.int64), "I64"),
    }
    if not symmetric:
        tensors["weight_zero_point"] = (np.ascontiguousarray(pack_bits(zeros.T, bits, whole).T), "I32")
    columns = groups_of(k, size, order)
    weights = (fields - zeros[:, columns]) * widen(bits16)[:, columns]
    strategy: dict[str, Any] = {"strategy": "channel"}
    if group is not None:
        strategy = {"strategy": "group", "group_size": group}
    if order is not None:
        tensors["weight_g_idx"] = (columns, "I32")
        strategy["actorder"] = "group"
    return Quantised(
        tensors, weights, ct_config("pack-quantized", num_bits=bits, symmetric=symmetric, **strategy)
    )


def ct_config(form: str, ignore: tuple[str, ...] = ("lm_head",), **weights: Any) -> dict[str, Any]:
    """A quantization_config of compressed-tensors with one group."""
    group = {"targets": ["Linear"], "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "ignore": list(ignore),
        "kv_cache_scheme": None,
        "config_groups": {"group_0": {**group, "weights": {"type": "int", "dynamic": False, **weights}}},
    }


def int8_groups(n: int, k: int, group: int = 32, *, order: int | None = None, seed: int = 0) -> Quantised:
    """int-quantized of compressed-tensors in groups; `order` as of `groups_of`."""
    fields, scales, _ = parts(n, k, 8, group, seed)
    bits16, columns = bf16(scales), groups_of(k, group, order)
    tensors = {"weight": ((fields - 128).astype(np.int8), "I8"), "weight_scale": (bits16, "BF16")}
    if order is not None:
        tensors["weight_g_idx"] = (columns, "I32")
    config = ct_config("int-quantized", num_bits=8, symmetric=True, strategy="group", group_size=group)
    return Quantised(tensors, (fields - 128) * widen(bits16)[:, columns], config)


def int8(n: int, k: int, *, tensor: bool = False, symmetric: bool = True, seed: int = 0) -> Quantised:
    """int-quantized of compressed-tensors: -128 included."""
    fields, scales, zeros = parts(n, k, 8, k, seed)
    scales, zeros = (scales[:1], zeros[:1]) if tensor else (scales, zeros)
    bits16, codes = bf16(scales), (fields - 128).astype(np.int8)
    zeros = np.zeros_like(zeros) if symmetric else zeros - 128
    tensors = {"weight": (codes, "I8"), "weight_scale": (bits16.reshape(-1) if tensor else bits16, "BF16")}
    if not symmetric:
        tensors["weight_zero_point"] = (zeros.astype(np.int8).reshape(tensors["weight_scale"][0].shape), "I8")
    weights = (codes.astype(np.float64) - zeros) * widen(bits16)
    strategy = "tensor" if tensor else "channel"
    return Quantised(
        tensors, weights, ct_config("int-quantized", num_bits=8, symmetric=symmetric, strategy=strategy)
    )


def gptq(
    n: int,
    k: int,
    bits: int = 4,
    group: int = 32,
    *,
    symmetric: bool = False,
    version: int = 1,
    label: str | None = None,
    order: int | None = None,
    seed: int = 0,
) -> Quantised:
    """GPTQ; `label` is the checkpoint_format that the config claims, the version's own unless given; `order` (desc_act) as
    of `groups_of`.
    """
    fields, scales, zeros = parts(n, k, bits, group, seed)
    zeros = np.full_like(zeros, 1 << bits - 1) if symmetric else zeros
    columns = groups_of(k, group, order)
    stored = (zeros - (version == 1)) & ((1 << bits) - 1)
    tensors = {
        "qweight": (np.ascontiguousarray(pack_bits(fields, bits).T), "I32"),
        "qzeros": (pack_bits(stored.T, bits), "I32"),
        "scales": (np.ascontiguousarray(scales.T), "F16"),
        "g_idx": (columns, "I32"),
    }
    weights = (fields - zeros[:, columns]) * scales.astype(np.float64)[:, columns]
    config = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group,
        "sym": symmetric,
        "desc_act": order is not None,
    }
    config["checkpoint_format"] = label or ("gptq" if version == 1 else "gptq_v2")
    return Quantised(tensors, weights, config)


def awq(n: int, k: int, group: int = 32, *, seed: int = 0) -> Quantised:
    """AWQ of the GEMM version."""
    fields, scales, zeros = parts(n, k, 4, group, seed)

    def pack(values: Array) -> Array:  # [..., n]
        inner = values.reshape(len(values), -1, 8)[:, :, list(AWQ_ORDER)]
        return pack_bits(inner.reshape(len(values), -1), 4)

    tensors = {
        "qweight": (pack(np.ascontiguousarray(fields.T)), "I32"),
        "qzeros": (pack(np.ascontiguousarray(zeros.T)), "I32"),
        "scales": (np.ascontiguousarray(scales.T), "F16"),
    }
    weights = (fields - spread(zeros, group, k)) * spread(scales.astype(np.float64), group, k)
    return Quantised(
        tensors, weights, {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm"}
    )


def e4m3(codes: Array) -> Array:
    """Values of FP8 codes, from their bits."""
    sign, exponent, mantissa = codes >> 7, (codes >> 3 & 15).astype(int), codes & 7
    size = np.where(exponent > 0, (1 + mantissa / 8) * 2.0 ** (exponent - 7), mantissa / 8 * 2.0**-6)
    return np.where(sign == 1, -size, size)


def fp8(n: int, k: int, block: tuple[int, int] | str = (128, 128), *, seed: int = 0) -> Quantised:
    """FP8 with scales of blocks, or "tensor", "row"."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 256, (n, k)).astype(np.uint8)
    codes[codes & 0x7F == 0x7F] = 0x7E
    if isinstance(block, tuple):
        shape = (-(-n // block[0]), -(-k // block[1]))
        scales = rng.uniform(1e-4, 1e-3, shape).astype(np.float32)
        wide = np.repeat(np.repeat(scales, block[0], 0), block[1], 1)[:n, :k]
        config: dict[str, Any] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(block)}
        return Quantised(
            {"weight": (codes, "F8_E4M3"), "weight_scale_inv": (scales, "F32")}, e4m3(codes) * wide, config
        )
    scales = rng.uniform(1e-4, 1e-3, (1 if block == "tensor" else n, 1)).astype(np.float32)
    stored = scales.reshape(()) if block == "tensor" else scales
    tensors: dict[str, tuple[Array, str]]
    tensors = {"weight": (codes, "F8_E4M3"), "weight_scale": (stored, "F32")}
    return Quantised(tensors, e4m3(codes) * scales, {"quant_method": "fp8", "activation_scheme": "dynamic"})


E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def nvfp4(n: int, k: int, *, modelopt: bool = False, seed: int = 0) -> Quantised:
    """NVFP4 of compressed-tensors, or modelopt's: scales of 16 columns times one of the matrix, or divided by it."""
    rng = np.random.default_rng(seed)
    codes, scales = rng.integers(0, 16, (n, k)), rng.integers(1, 0x7F, (n, k // 16)).astype(np.uint8)
    codes[0, :16] = np.arange(16)
    packed = (codes[:, ::2] | codes[:, 1::2] << 4).astype(np.uint8)
    whole = np.array([1 / 640 if modelopt else 704.0], np.float32)
    stored = e4m3(scales).astype(np.float32)
    values = (stored * whole if modelopt else stored / whole).astype(np.float64)
    weights = np.where(codes & 8, -1, 1) * E2M1[codes & 7] * spread(values, 16, k)
    tensors: dict[str, tuple[Array, str]]
    if modelopt:
        tensors = {"weight": (packed, "U8"), "weight_scale_2": (whole.reshape(()), "F32")}
        config: dict[str, Any] = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]}
    else:
        tensors = {"weight_packed": (packed, "U8"), "weight_global_scale": (whole, "F32")}
        config = ct_config(
            "nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=16
        )
    tensors["weight_scale"] = scales, "F8_E4M3"
    tensors["input_scale" if modelopt else "input_global_scale"] = np.ones(1, np.float32), "F32"
    return Quantised(tensors, weights, config)


def quantise_folder(directory: Path, make: Callable[[int, int, int], Quantised]) -> dict[str, Array]:
    """Give a checkpoint's linear layers other weights, those of `make(n, k, seed)`; returns what they mean, by name."""
    with safe_open(directory / "model.safetensors", "np") as file:
        plain = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no dict
    tensors, meant = dict[str, tuple[Array, str]](), dict[str, Array]()
    config = json.loads((directory / "config.json").read_text())
    for seed, (name, values) in enumerate(sorted(plain.items())):
        if not name.endswith("_proj.weight"):
            tensors[name] = values, "F32"
            continue
        n, k = values.shape
        made = make(n, k, seed)
        config["quantization_config"] = made.config
        meant[name] = made.weights
        tensors |= {name.removesuffix("weight") + end: tensor for end, tensor in made.tensors.items()}
    write_safetensors(directory / "model.safetensors", tensors)
    (directory / "config.json").write_text(json.dumps(config))
    return meant


class Memory:
    """A checkpoint in memory: name -> array and dtype."""

    def __init__(self, tensors: Mapping[str, tuple[Array, str]]) -> None:
        self.tensors = dict(tensors)
        self.dropped: set[str] = set()

    def names(self) -> tuple[str, ...]:
        return tuple(self.tensors)

    def info(self, name: str) -> Any:
        array, dtype = self.tensors[name]
        return Info(dtype, array.shape)

    def tensor(self, name: str) -> Array:
        return self.tensors[name][0]

    def drop(self, name: str) -> None:
        self.dropped.add(name)


@dataclass
class Info:
    """As a header says it."""

    dtype: str
    shape: tuple[int, ...]


def write_safetensors(path: Path, tensors: Mapping[str, tuple[Array, str]]) -> None:
    """A file of these; safetensors' own writer lacks numpy types for some."""
    header: dict[str, Any] = {}
    at = 0
    for name, (array, dtype) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [at, at + array.nbytes]}
        at += array.nbytes
    text = json.dumps(header).encode()
    data = b"".join(np.ascontiguousarray(array).tobytes() for array, _ in tensors.values())
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
