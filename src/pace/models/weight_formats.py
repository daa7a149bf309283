"""The forms that a packed matrix can have in memory; `kernels.h` says what their bytes are."""

from __future__ import annotations

from typing import Final, Literal, get_args

WeightFormat = Literal[
    "bf16", "mxfp4", "int8", "int8g16", "int8g32", "int8g64", "int8g128",
    "int4", "int4g32", "int4g64", "int4g128", "fp8", "fp8g128",
]  # fmt: skip
FORMATS: Final = get_args(WeightFormat)
"""Forms of a packed matrix: a code of 8 or 4 bits for each weight, or FP8 E4M3, and a scale for each row, or for each
group of so many columns of it."""


def bits_of(format: WeightFormat) -> float:
    """Bits of a weight, scales included: of 16 bits, as most are."""
    if format in ("bf16", "mxfp4"):
        return 16 if format == "bf16" else 4.25
    group = group_of(format)
    return (4 if format.startswith("int4") else 8) + (16 / group if group else 0)


def int8_group(format: str) -> int | None:
    """Columns that share a scale in int8 rows that weights of a format are multiplied by; 0: any number, and None: such
    rows can't be."""
    if format == "mxfp4":
        return 32
    return None if format == "bf16" or format.startswith("fp8") else group_of(format)


def group_of(format: str) -> int:
    """Columns that share a scale; 0: all of a row."""
    return int(format.partition("g")[2] or 0)
