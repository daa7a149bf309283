"""From checkpoint tensors to plan weights: strict in both directions, flat in memory.

Every name, shape and dtype is checked before the sink sees the first byte, so that a broken checkpoint never
leaves a half-loaded model. Then tensors are streamed one at a time: the sink packs it, its source pages are
dropped, the next one is touched. The same code feeds the packed engine and the float64 reference; they differ
in their sink.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from pace.errors import WeightsError
from pace.log import logger
from pace.models.plan import Blocks, Plan, WeightShape, gated_rows
from pace.models.sources import Source, TensorShape, check, tensor_shapes
from pace.models.spec import DecoderSpec
from pace.models.tensors import F32Array, SourceArray, SourceDtype, SourcePart, Tensors, to_f32
from pace.models.weight_map import Part, WeightMap
from pace.quant.matrices import by_group

__all__ = [
    "DenseSink",
    "F32Array",
    "Part",
    "Progress",
    "Sink",
    "SourceDtype",
    "SourcePart",
    "TensorShape",
    "Tensors",
    "WeightMap",
    "load_weights",
    "settle_head",
    "tensor_shapes",
    "to_f32",
]

Progress = Callable[[int, int], None]
"""progress(done_bytes, total_bytes) of source tensors, after each tensor."""


class Sink(Protocol):
    """Receives the weights of a plan, each once."""

    def matrix(self, name: str, shape: WeightShape, parts: Iterator[SourcePart]) -> None:
        """`shape.count` matrices [n, k]. The parts cover every row of each once and must be consumed in order, one at a
        time.
        """
        ...

    def vector(self, name: str, values: F32Array) -> None:
        """A vector f32 [n], or [count, n]; owned by the sink."""
        ...

    def table(self, name: str, rows: SourceArray, dtype: SourceDtype) -> None:
        """A mapped table [n, k], as the file has it; the view stays valid."""
        ...


def settle_head(spec: DecoderSpec, tensors: Tensors) -> DecoderSpec:
    """The spec as the file has it, where the config says that the LM head is the embedding: before it is lowered."""
    if not spec.tied or tensors.head_is_tied():
        return spec
    logger.warning(
        "the config ties the LM head to the embedding, but the checkpoint holds one that differs, which is used; set "
        "tie_word_embeddings to false if that is right"
    )
    return replace(spec, tied=False)


def load_weights(
    plan: Plan,
    checkpoint: Tensors,
    sink: Sink,
    progress: Progress | None = None,
) -> None:
    """Check a checkpoint against a plan, then stream it into a sink.

    Args:
        progress: called after every tensor with bytes done and bytes in total.

    Raises:
        WeightsError: tensors are missing, unexpected, or of the wrong shape or dtype; the sink was not
            called.
    """
    needed = plan.weights
    sources = check(needed, checkpoint)
    total = sum(s.n_bytes for parts in sources.values() for s in parts)
    done = 0

    def stream(own: list[Source]) -> Iterator[SourcePart]:
        nonlocal done
        for source in own:
            array, scales = source.read(checkpoint)
            dtype = "f32" if source.quantised and isinstance(array, np.ndarray) else source.dtype
            yield SourcePart(array, dtype, source.at, source.mode, source.matrix, scales)
            del array, scales
            if source.last:
                checkpoint.drop(source.name)
                if source.scales is not None:
                    checkpoint.drop(source.scales)
            done += source.n_bytes
            if progress is not None:
                progress(done, total)

    for name, shape in needed.items():
        if shape.order_of is not None:
            sink.vector(name, _order(shape, sources[shape.order_of][0].name, checkpoint))
            continue
        parts = stream(sources[name])
        if shape.mapped:
            part = next(parts)
            sink.table(name, np.asarray(part.array), part.dtype)
        elif shape.k is not None:
            sink.matrix(name, shape, parts)
        else:
            sink.vector(name, _vectors(shape, parts))
        for _ in parts:  # a sink that stops early must not lose the last tensor's drop and progress
            pass


def _order(shape: WeightShape, tensor: str, checkpoint: Tensors) -> F32Array:
    """The plan's columns by group, f32 [n], those that fill up behind them. (f32 has every integer up to 2^24.)"""
    found = by_group(checkpoint.matrix(tensor))
    if found is None:
        raise WeightsError(f"{tensor} has its columns in no order of their own, as it had before")
    blocks = shape.columns or Blocks("all", 1, shape.n, shape.n)
    at = found.order // blocks.width * blocks.filled + found.order % blocks.width
    return np.concatenate([at, np.setdiff1d(np.arange(shape.n), at)]).astype(np.float32)


def _vectors(shape: WeightShape, parts: Iterator[SourcePart]) -> F32Array:
    """A vector [n], or [count, n] where experts have one each."""
    values = np.empty((shape.count, shape.n), np.float32)
    for part in parts:
        rows = part.at + gated_rows(len(part.array), part.mode)
        values[part.matrix, rows] = to_f32(part.array, part.dtype)
    return values if shape.count > 1 else values[0]


class DenseSink:
    """Keeps weights as plain arrays, for the reference.

    Matrices are [n, k] in the row order of the plan (gate and up alternate in blocks of 16), those of experts
    [count, n, k], vectors [n].

    Args:
        dtype: of the stored arrays.
    """

    def __init__(self, dtype: type[np.floating[Any]] = np.float64) -> None:
        self.dtype = dtype
        self.weights: dict[str, npt.NDArray[Any]] = {}

    def matrix(self, name: str, shape: WeightShape, parts: Iterator[SourcePart]) -> None:
        """Store matrices; rows that no part fills stay NaN, so that a hole shows."""
        dense = np.full((shape.count, shape.n, shape.k or 1), np.nan, self.dtype)
        for array, dtype, at, mode, matrix, scales in parts:
            dense[matrix, at + gated_rows(len(array), mode)] = to_f32(array, dtype, scales)
        self.weights[name] = dense if shape.count > 1 else dense[0]

    def vector(self, name: str, values: F32Array) -> None:
        """Store a vector [n]."""
        self.weights[name] = values.astype(self.dtype)

    def table(self, name: str, rows: SourceArray, dtype: SourceDtype) -> None:
        """Store a table [n, k]."""
        self.weights[name] = to_f32(rows, dtype).astype(self.dtype)
