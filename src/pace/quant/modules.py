"""Which tensors of a checkpoint are one quantised module: by their names and dtypes, whatever its config says."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Final, NamedTuple

from pace.quant.matrices import Tensor, Tensors, TensorSource

__all__ = ["Module", "modules"]

_MEMBER: Final = re.compile(
    r"(?P<module>.+)\.(?P<end>weight(?:_packed|_scale|_scale_inv|_zero_point|_shape|_g_idx|_global_scale|_scale_2)?"
    r"|qweight|qzeros|scales|g_idx|input_scale|input_zero_point|input_global_scale)",
    re.ASCII,
)
_CODES: Final = ("I8", "U8", "I32", "F8_E4M3", "F8_E5M2")
"""Dtypes of a `weight` that has scales beside it."""


class Module(NamedTuple):
    """A quantised matrix.

    Args:
        name: the file's, without the ends of its tensors' names.
        members: those tensors by these ends.
    """

    name: str
    members: Tensors


def modules(names: Iterable[str], source: TensorSource) -> Iterator[Module]:
    """The quantised ones among a checkpoint's modules: those with codes, not those with scales alone."""
    found: dict[str, dict[str, Tensor]] = {}
    for name in names:
        match = _MEMBER.fullmatch(name)
        if match is not None:
            found.setdefault(match["module"], {})[match["end"]] = Tensor(name, source)
    for module, members in found.items():
        if _holds_codes(members):
            yield Module(module, members)


def _holds_codes(members: Mapping[str, Tensor]) -> bool:
    if "weight_packed" in members or "qweight" in members:
        return True
    return "weight" in members and members["weight"].dtype in _CODES
