"""Which function reads which layout."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from pace.quant.awq import open_awq
from pace.quant.gptq import open_gptq
from pace.quant.matrices import Matrix, Tensors
from pace.quant.nvfp4 import open_nvfp4
from pace.quant.packed import open_packed
from pace.quant.plain import open_plain
from pace.quant.scheme import Layout, Scheme

Reader = Callable[[str, Tensors, Scheme], Matrix]
"""From a module's name, its tensors and its scheme; checks shapes and dtypes, and reads no weight."""

READERS: Final[Mapping[Layout, Reader]] = {
    "packed": open_packed,
    "plain": open_plain,
    "gptq": open_gptq,
    "awq": open_awq,
    "nvfp4": open_nvfp4,
}
