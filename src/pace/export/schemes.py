"""What a matrix becomes in a file: its tensors and its config, as compressed-tensors has them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from pace.quant.groups import F32Array, U8Array

__all__ = ["SCHEMES", "WrittenScheme", "written"]

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class WrittenScheme:
    """How a matrix is rounded and stored.

    Args:
        kind, bits: of a code.
        group: columns that share a scale; None: a row.
    """

    kind: Literal["int", "float"]
    bits: int
    group: int | None

    @property
    def packed(self) -> bool:
        """Whether codes are packed into words; int8 and FP8 with a scale a row are tensors of their own type."""
        return self.bits == 4 or self.group is not None

    def fits(self, k: int) -> bool:
        """Whether rows of k columns have whole groups, and whole words, which other readers want."""
        return (self.group is None or k % self.group == 0) and (not self.packed or k * self.bits % 32 == 0)

    def narrower(self) -> WrittenScheme | None:
        """The next finer one; None: there is none."""
        return (
            None if self.group in (None, 32) else WrittenScheme(self.kind, self.bits, (self.group or 64) // 2)
        )

    def tensors(self, n: int, k: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Ends of names, dtypes and shapes of a matrix [n, k]."""
        scales = "BF16", (n, 1 if self.group is None else k // self.group)
        if not self.packed:
            return {"weight": ("I8" if self.kind == "int" else "F8_E4M3", (n, k)), "weight_scale": scales}
        words = "I32", (n, k * self.bits // 32)
        return {"weight_packed": words, "weight_scale": scales, "weight_shape": ("I64", (2,))}

    def config(self, targets: list[str]) -> dict[str, Any]:
        """A group of quantization_config."""
        weights: dict[str, Any] = {
            "num_bits": self.bits,
            "type": self.kind,
            "symmetric": True,
            "dynamic": False,
        }
        weights |= (
            {"strategy": "channel"} if self.group is None else {"strategy": "group", "group_size": self.group}
        )
        inputs = None
        if not self.packed:  # what readers expect beside these: rows rounded token by token
            inputs = {
                "num_bits": 8,
                "type": self.kind,
                "symmetric": True,
                "strategy": "token",
                "dynamic": True,
            }
        return {
            "targets": targets,
            "weights": weights,
            "input_activations": inputs,
            "output_activations": None,
            "format": self.format,
        }

    @property
    def format(self) -> str:
        """The format's name in compressed-tensors."""
        return (
            "pack-quantized" if self.packed else "int-quantized" if self.kind == "int" else "float-quantized"
        )


SCHEMES: Final[Mapping[str, WrittenScheme]] = {
    "w8": WrittenScheme("int", 8, None),
    "w8g32": WrittenScheme("int", 8, 32),
    "w8g64": WrittenScheme("int", 8, 64),
    "w8g128": WrittenScheme("int", 8, 128),
    "w4g32": WrittenScheme("int", 4, 32),
    "w4g64": WrittenScheme("int", 4, 64),
    "w4g128": WrittenScheme("int", 4, 128),
    "fp8": WrittenScheme("float", 8, None),
}
"""By the names of `pace quantize --scheme`."""


def written(codes: U8Array, scales: F32Array, scheme: WrittenScheme) -> dict[str, Array]:
    """Codes [rows, k] and scales of 16 bits as their tensors have them; `weight_shape` is the caller's."""
    bits = (scales.view(np.uint32) >> 16).astype(np.uint16)
    if scheme.packed:
        return {"weight_packed": packed(codes, scheme.bits), "weight_scale": bits}
    return {
        "weight": codes if scheme.kind == "float" else (codes ^ np.uint8(128)).view(np.int8),
        "weight_scale": bits,
    }


def packed(codes: U8Array, bits: int) -> npt.NDArray[np.int32]:
    """Codes [rows, k] of 4 or 8 bits in words, the lowest column in the lowest bits: int32 [rows, k * bits / 32]."""
    stream = codes if bits == 8 else codes[:, 0::2] | codes[:, 1::2] << 4
    return np.ascontiguousarray(stream).view(np.int32)
