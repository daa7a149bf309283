"""Packed weights and files of them: what of a plan's weights goes where in a pack, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from pace import ops
from pace.checkpoint.pack_file import Kind, PackedArray, PackFile
from pace.config import VERSION
from pace.engine.guard import Measured
from pace.engine.packing import Weight
from pace.errors import WeightsError, show
from pace.models.formats import ORDER
from pace.models.plan import Plan, WeightFormat
from pace.models.weight_formats import FORMATS

__all__ = ["about", "arrays_of", "formats_in", "measured_in", "orders_in", "weights_in"]

_NUMPY: Final[Mapping[str, Any]] = {"bf16": np.uint16, "f16": np.float16, "f32": np.float32}


def about(
    weights: Mapping[str, Weight], quantization: str | None, measured: Measured | None, source: str = ""
) -> dict[str, Any]:
    """What a pack's header says beside the weights.

    Args:
        quantization: the option that they were packed with.
        measured: of the guard.
        source: see `pack_cache.source_of`; of `pace pack` nothing.
    """
    return {
        "layouts": ops.PACKED_LAYOUTS,
        "isa": ops.isa(),
        "pace": VERSION,
        "quantization": quantization,
        "source": source,
        "measured": None if measured is None else measured.to_json(),
    }


def arrays_of(weights: Mapping[str, Weight]) -> dict[str, PackedArray]:
    """Weights as bytes."""
    return {name: _array_of(weight) for name, weight in weights.items()}


def _array_of(weight: Weight) -> PackedArray:
    if isinstance(weight, ops.PackedMatrix):
        return PackedArray(
            "matrix", weight.format, (weight.count, weight.n, weight.k), weight.kind, weight.data
        )
    if isinstance(weight, ops.MappedTable):
        rows = weight.rows.reshape(-1).view(np.uint8)
        return PackedArray("table", weight.dtype, (weight.n, weight.k), (0, 0), rows)
    values = np.ascontiguousarray(weight, np.float32)
    return PackedArray("vector", "f32", values.shape, (0, 0), values.reshape(-1).view(np.uint8))


def formats_in(pack: PackFile) -> dict[str, WeightFormat]:
    """The formats of a pack's matrices.

    Raises:
        WeightsError: it was packed for another layout, or names none of this one's formats.
    """
    if pack.about.get("layouts") != ops.PACKED_LAYOUTS:
        raise WeightsError(
            f"{pack.path}: is packed as {show(pack.about.get('layouts'))}, tier {ops.isa()} reads "
            f"{ops.PACKED_LAYOUTS}; run pace pack again"
        )
    formats: dict[str, WeightFormat] = {}
    for name in pack.names():
        weight = pack[name]
        found = next((form for form in FORMATS if form == weight.form), None)
        if weight.kind == "matrix" and found is None:
            raise WeightsError(
                f"{pack.path}: {show(name)} is of format {show(weight.form)}; run pace pack again"
            )
        if weight.kind == "matrix" and found is not None:
            formats[name] = found
    return formats


def orders_in(pack: PackFile) -> frozenset[str]:
    """The matrices of a pack whose columns stand by group."""
    return frozenset(name.removesuffix(ORDER) for name in pack.names() if name.endswith(ORDER))


def measured_in(pack: PackFile) -> Measured | None:
    """What the guard measured when the pack was written."""
    return Measured.from_json(pack.about.get("measured"))


def weights_in(pack: PackFile, plan: Plan) -> dict[str, Weight]:
    """All weights of a plan, mapped; vectors are copied.

    Raises:
        WeightsError: the pack has others, or of other shapes.
    """
    needed = plan.weights
    different = sorted(needed.keys() ^ set(pack.names()))
    if different:
        raise WeightsError(
            f"{pack.path}: {show(different[0])} is {'missing' if different[0] in needed else 'unexpected'}; run pace pack "
            "again"
        )
    weights: dict[str, Weight] = {}
    for name, shape in needed.items():
        found = pack[name]
        kind: Kind = "vector" if shape.k is None else "table" if shape.mapped else "matrix"
        want: tuple[int, ...] = (shape.count, shape.n) if shape.count > 1 else (shape.n,)
        if shape.k is not None:
            want = (shape.n, shape.k) if shape.mapped else (shape.count, shape.n, shape.k)
        form = found.form if kind != "matrix" else shape.format
        if (found.kind, found.shape, found.form) != (kind, want, form):
            raise WeightsError(
                f"{pack.path}: {show(name)} is a {found.kind} {list(found.shape)} of {show(found.form)}, config.json needs "
                f"a {kind} {list(want)}; run pace pack again"
            )
        weight = weights[name] = _weight_of(pack, name, found)
        if shape.order_of is None:
            continue
        if not isinstance(weight, np.ndarray) or not np.array_equal(np.sort(weight), np.arange(shape.n)):
            raise WeightsError(
                f"{pack.path}: {show(name)} does not have each of {shape.n} columns once; run pace pack again"
            )
    return weights


def _weight_of(pack: PackFile, name: str, found: PackedArray) -> Weight:
    if found.kind == "matrix":
        count, n, k = found.shape
        try:
            return ops.PackedMatrix.mapped(n, k, count, found.form, found.types, found.data)
        except (ValueError, MemoryError) as error:
            raise WeightsError(f"{pack.path}: {show(name)}: {error}; run pace pack again") from None
    values = found.data.view(_NUMPY[found.form]).reshape(found.shape)
    return ops.MappedTable(values, found.form) if found.kind == "table" else values.astype(np.float32)
