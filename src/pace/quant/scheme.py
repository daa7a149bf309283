"""How a module's tensors are to be read: what a quantization_config says of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pace.quant.matrices import Block

__all__ = ["Layout", "Scheme"]

Layout = Literal["packed", "plain", "gptq", "awq", "nvfp4"]


@dataclass(frozen=True, slots=True)
class Scheme:
    """How a matrix is quantised.

    Args:
        layout: which tensors it has.
        bits: of a code.
        kind: what a code is.
        symmetric: there are no zero points, or only ones in the middle.
        block: what shares a scale; None: all, or a row, as the scales' shape is.
        zero_at: what a stored zero point is short of: 1 in GPTQ's first version.
    """

    layout: Layout
    bits: int = 8
    kind: Literal["int", "float"] = "int"
    symmetric: bool = True
    block: Block | None = None
    zero_at: int = 0
