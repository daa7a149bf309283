"""In which packed form a plan's matrices hold what a quantised checkpoint has, exactly."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import gcd
from typing import Final, NamedTuple, cast

import numpy as np

from pace.log import logger
from pace.models.formats import products
from pace.models.plan import Plan
from pace.models.shapes import Blocks
from pace.models.sources import check
from pace.models.tensors import Tensors
from pace.models.weight_formats import FORMATS, WeightFormat
from pace.quant.groups import Fp8Rows, GroupedRows
from pace.quant.matrices import Matrix, QuantisedRows, by_group

__all__ = ["Held", "held_formats"]

_ENDS: Final = {"g128": 128, "g64": 64, "g32": 32, "g16": 16}
"""Columns that may share a scale in memory; where more do in the file, scales are repeated."""


class Held(NamedTuple):
    """How a plan's matrices are held.

    Args:
        formats: of each that has one.
        by_group: those of them whose columns stand by the groups that share a scale.
        rounded: matrices that are quantised in the checkpoint, or in part, and bf16 here.
    """

    formats: dict[str, WeightFormat]
    by_group: frozenset[str] = frozenset()
    rounded: frozenset[str] = frozenset()


def held_formats(plan: Plan, tensors: Tensors) -> Held:
    """The format of each matrix that has one; others become bf16, which rounds a weight once.

    Parts of a fused matrix that differ get the wider codes and the shorter groups, so that all are exact.

    Raises:
        WeightsError: the checkpoint does not match the plan.
    """
    formats: dict[str, WeightFormat] = {}
    ordered: set[str] = set()
    rounded: list[str] = []
    needed, multiplied = plan.weights, products(plan)
    for name, sources in check(needed, tensors).items():
        if not any(source.quantised for source in sources):
            continue
        matrices = [tensors.matrix(tensor) for tensor in dict.fromkeys(source.name for source in sources)]
        sorted_ = _by_group(matrices) if name in multiplied else None
        found = _format(needed[name].columns, matrices) if sorted_ is None else _format(None, sorted_)
        if found is None:
            rounded.append(name)
            continue
        formats[name] = found
        if sorted_ is not None:
            ordered.add(name)
    if rounded:
        logger.warning(
            "%d matrices, the first of them %s, become bf16: no packed form holds their groups, or parts of them are plain",
            len(rounded),
            rounded[0],
        )
    return Held(formats, frozenset(ordered), frozenset(rounded))


def _by_group(matrices: Sequence[Matrix | None]) -> list[Matrix] | None:
    """The parts of a matrix with their columns in one order, which is not that of the checkpoint."""
    found = [one for one in map(by_group, matrices) if one is not None]
    same = len(found) == len(matrices) and all(np.array_equal(one.order, found[0].order) for one in found)
    return [one.matrix for one in found] if same else None


def _format(columns: Blocks | None, matrices: Iterable[Matrix | None]) -> WeightFormat | None:
    # A first row says what all are.
    rows = [None if matrix is None else matrix.rows(slice(0, 1, 1)) for matrix in matrices]
    integers = [row for row in rows if isinstance(row, GroupedRows)]
    floats = [row for row in rows if isinstance(row, Fp8Rows)]
    if len(integers) == len(rows):
        kinds: tuple[str, ...] = ("int8",) if any(row.bits == 8 for row in integers) else ("int4", "int8")
    elif len(floats) == len(rows):
        kinds = ("fp8",)
    else:
        return None
    grouped: list[QuantisedRows] = [*integers, *floats]
    groups = [row.group for row in grouped if row.group < row.codes.shape[1]]
    if groups and columns is not None and columns.count > 1 and columns.filled != columns.width:
        return None  # zeros between heads move columns that share a scale apart
    step = gcd(*groups)
    ends = ["", *_ENDS] if not groups else [end for end, group in _ENDS.items() if step % group == 0]
    fitting = [f"{kind}{end}" for kind in kinds for end in ends if f"{kind}{end}" in FORMATS]
    return cast(WeightFormat, fitting[0]) if fitting else None
