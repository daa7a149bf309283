"""Which rows of which tensors make up each weight of a plan: checked against the file, then read one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, Protocol

import numpy as np

from pace.errors import WeightsError
from pace.models.names import foreign
from pace.models.plan import Blocks, PartMode, Plan, WeightShape
from pace.models.tensors import DTYPES, MXFP4_BLOCK, NUMPY, SourceArray, SourceDtype, Tensors
from pace.models.weight_map import Part, Parts, WeightMap, expand
from pace.quant.groups import Fp8Rows, GroupedRows
from pace.quant.matrices import Matrix, QuantisedRows, by_group

Shape = tuple[int, ...]

_PIECE = 4 << 20  # weights of a quantised matrix that are read at a time
_LISTED = 4  # names per list in an error: enough to see the pattern, short enough for one line


class Readable(Protocol):
    """Where the rows of tensors come from: a checkpoint's `Tensors`, or what takes their place."""

    def tensor(self, name: str) -> SourceArray:
        """A view of the data; bf16 as uint16."""
        ...

    def matrix(self, name: str) -> Matrix | None:
        """A quantised matrix; None: that tensor is a plain one."""
        ...


class TensorShape(NamedTuple):
    """What a checkpoint of a plan holds under some name.

    Args:
        weight: the plan weight that the tensor belongs to.
        dtype: "u8" of MXFP4 blocks and scales.
    """

    weight: str
    shape: Shape
    dtype: Literal["bf16", "u8"] = "bf16"


@dataclass(frozen=True, slots=True)
class Source:
    """Some rows of one tensor: what it must look like, and where they go.

    Args:
        name, scales: of the tensor, and of that with its scales.
        shape: of the whole tensor.
        expert: the matrix or vector within a tensor that holds one for each expert.
        transposed: columns come first.
        first, step: its first row that is meant, and how far the next one is.
        block: rows from there, and what they become.
        columns: the same of the columns.
        at, mode, matrix: as of `SourcePart`.
        last: the tensor is not needed any more.
        quantised: it is a quantised matrix.
        by_group: its columns come by the groups that share a scale.
    """

    name: str
    scales: str | None
    shape: Shape
    dtype: SourceDtype
    expert: int | None
    transposed: bool
    first: int
    step: int
    block: Blocks
    columns: Blocks | None
    at: int
    mode: PartMode
    matrix: int
    last: bool
    quantised: bool = False
    by_group: bool = False

    @property
    def n_bytes(self) -> int:
        """Bytes read."""
        rows = self.block.count * self.block.width
        if self.scales is not None:
            return rows * self.shape[2] * (MXFP4_BLOCK // 2 + 1)
        inner = self.shape if self.expert is None else self.shape[1:]
        width = 1 if len(inner) == 1 else inner[0 if self.transposed else 1]
        return rows * width * np.dtype(NUMPY[self.dtype]).itemsize

    def read(self, checkpoint: Readable) -> tuple[SourceArray | QuantisedRows, SourceArray | None]:
        """The rows with the zeros that fill them: [rows] or [rows, k], contiguous; of MXFP4 blocks and scales.

        The tensor is checked once more: its header was, the reader's view must agree with it.
        """
        if self.quantised:
            return self._read_quantised(checkpoint), None
        array = _rows(self, _view(checkpoint, self.name, self.shape, self.dtype))
        if self.scales is not None:
            return array, _rows(self, _view(checkpoint, self.scales, self.shape[:-1], self.dtype))
        rows, columns = self.block, self.columns
        if rows.filled != rows.width:
            array = _pad(array, rows, axis=0)
        if columns is not None and columns.filled != columns.width:
            array = _pad(array, columns, axis=1)
        return np.ascontiguousarray(array), None

    def _read_quantised(self, checkpoint: Readable) -> SourceArray | QuantisedRows:
        matrix = checkpoint.matrix(self.name)
        if self.by_group:
            found = by_group(matrix)
            matrix = None if found is None else found.matrix
        if matrix is None:
            raise WeightsError(f"{self.name} is no quantised matrix, as it was before")
        end = self.first + self.block.count * self.block.width * self.step
        rows = matrix.rows(slice(self.first, end, self.step))
        blocks, columns = self.block, self.columns
        if blocks.filled != blocks.width:
            rows = _fill(rows, blocks, axis=0)
        if columns is not None and columns.filled != columns.width:
            rows = _fill(rows, columns, axis=1)
        return rows


def _fill(rows: SourceArray | QuantisedRows, blocks: Blocks, axis: int) -> SourceArray | QuantisedRows:
    """The rows with zeros behind each block along an axis.

    Columns between groups would move those that share a scale apart: such rows come as f32.
    """
    if isinstance(rows, np.ndarray):
        return _pad(rows, blocks, axis)
    whole = rows.group == rows.codes.shape[1]
    if axis == 1 and blocks.count > 1 and not whole:
        return _pad(rows.dequantised(), blocks, axis)
    codes = _pad(rows.codes, blocks, axis)
    group = codes.shape[1] if whole else rows.group
    missing = -(-codes.shape[1] // group) - rows.scales.shape[1]

    def of_groups(values: SourceArray) -> SourceArray:
        return _pad(values, blocks, 0) if axis == 0 else np.pad(values, ((0, 0), (0, missing)))

    if isinstance(rows, Fp8Rows):
        return Fp8Rows(codes, group, of_groups(rows.scales))
    offsets = None if rows.offsets is None else of_groups(rows.offsets)
    return GroupedRows(codes, rows.bits, group, of_groups(rows.scales), offsets)


def _view(checkpoint: Readable, name: str, shape: Shape, dtype: SourceDtype) -> SourceArray:
    array = checkpoint.tensor(name)
    if array.shape != shape or array.dtype != NUMPY[dtype]:
        raise WeightsError(
            f"{name} was read as {array.dtype} {list(array.shape)}, expected "
            f"{np.dtype(NUMPY[dtype])} {list(shape)}"
        )
    return array


def _rows(source: Source, array: SourceArray) -> SourceArray:
    if source.expert is not None:
        array = array[source.expert]
    if source.transposed:
        array = array.T
    end = source.first + source.block.count * source.block.width * source.step
    return array[source.first : end : source.step]


def _pad(array: SourceArray, blocks: Blocks, axis: int) -> SourceArray:
    """The array with each block along an axis followed by zeros: [count * width] -> [count * filled]."""
    before, after = array.shape[:axis], array.shape[axis + 1 :]
    wide = np.zeros((*before, blocks.count, blocks.filled, *after), array.dtype)
    index = (slice(None),) * (axis + 1) + (slice(blocks.width),)
    wide[index] = array.reshape(*before, blocks.count, blocks.width, *after)
    return wide.reshape(*before, blocks.n, *after)


def check(needed: Mapping[str, WeightShape], checkpoint: Tensors) -> dict[str, list[Source]]:
    """Match plan weights and checkpoint tensors one to one, or raise; orders of columns belong to their matrices."""
    needed = {name: shape for name, shape in needed.items() if shape.order_of is None}
    table = dict(checkpoint.table)
    present = set(checkpoint.names())
    # A tied model's LM head is the embedding: files store it under either name, or twice.
    embed, head = table["embed"][0].name, {part.name for part in table.get("lm_head", ())}
    spare = set() if "lm_head" in needed else head
    if spare and not checkpoint.head_is_tied():
        raise WeightsError(
            f"{min(spare)} differs from {embed}, which the plan takes for both; lower it untied"
        )
    if spare and embed not in present and spare <= present:
        table["embed"], spare = table["lm_head"], set()
    parts = {name: _parts(table[name], shape) for name, shape in needed.items()}
    wanted = {name for own in parts.values() for part in own for name in part.part.names()}
    spare |= {part.name for own in table.values() for part in own if part.spare}
    spare |= {part.name for name in needed for part in table[name] if not _is_pattern(part)}
    missing = sorted(wanted - present)
    unexpected = sorted(n for n in present - wanted - spare if not checkpoint.is_ignored(n))
    if missing or unexpected:
        lists = [f"{_listed(missing)} missing"] if missing else []
        lists += [f"{_listed(unexpected)} unexpected"] if unexpected else []
        advice = foreign(unexpected) or (
            "set tie_word_embeddings to true if its LM head is the embedding"
            if set(missing) <= head and not unexpected
            else "download it again or correct the config"
        )
        raise WeightsError(
            f"the checkpoint does not match its config.json: tensors {'; '.join(lists)}; {advice}"
        )
    wrong: list[str] = []
    sources: dict[str, list[Source]] = {}
    for name, shape in needed.items():
        sources[name] = []
        for part in parts[name]:
            transposed, dtype, complaints = _header(part, shape, checkpoint)
            wrong += complaints
            quantised = checkpoint.matrix(part.part.name) is not None
            for source in _sources(part, shape, transposed, dtype):
                sources[name] += _pieces(source) if quantised else [source]
    if wrong:
        raise WeightsError(f"the checkpoint does not match its config.json: {_listed(wrong, quote=False)}")
    return sources


def tensor_shapes(plan: Plan, weight_map: WeightMap, n_layers: int) -> dict[str, TensorShape]:
    """What a checkpoint of this plan holds in the first layout of its family that has the plan's formats."""
    table = expand(weight_map, n_layers)
    found: dict[str, TensorShape] = {}
    for name, shape in plan.weights.items():
        blocks = shape.format == "mxfp4"
        layout = next(
            parts for parts in table[name].layouts if blocks == any(part.scales is not None for part in parts)
        )
        for part in _parts(layout, shape):
            expected = _expected(part, shape, part.part.transposed)
            dtype: Literal["bf16", "u8"] = "u8" if blocks else "bf16"
            found[part.part.name] = TensorShape(name, expected, dtype)
            if part.part.scales is not None:
                found[part.part.scales] = TensorShape(name, expected[:-1], dtype)
    return found


class _OwnPart(NamedTuple):
    """A part of a weight that a layer has.

    Args:
        part: with the names of tensors.
        own: blocks of rows that it holds of each matrix.
        at: its first row.
        matrices: of which experts it holds them.
    """

    part: Part
    own: tuple[Blocks, ...]
    at: int
    matrices: range


def _is_pattern(part: Part) -> bool:
    return "{h}" in part.name or "{e}" in part.name


def _parts(parts: Parts, shape: WeightShape) -> list[_OwnPart]:
    """The parts of a weight that this layer has; a tensor per head or per expert is as many parts."""
    blocks = {block.part: block for block in shape.blocks or (Blocks("all", 1, shape.n, shape.n),)}
    found: list[_OwnPart] = []
    at = 0
    for part in parts:
        if "{h}" in part.name:
            one = replace(blocks["all"], count=1)
            for h in range(blocks["all"].count):
                found.append(_OwnPart(part.put(h=h), (one,), at, range(1)))
                at += one.n
            continue
        if not set(part.rows.split("|")) <= set(blocks):
            continue
        own = tuple(block for name, block in blocks.items() if name in part.rows.split("|"))
        if "{e}" in part.name:
            found += [_OwnPart(part.put(e=e), own, at, range(e, e + 1)) for e in range(shape.count)]
        else:
            found.append(_OwnPart(part, own, at, range(shape.count)))
        at += sum(block.n for block in own if _mode(block) == "rows")
    return found


def _mode(block: Blocks) -> PartMode:
    return block.part if block.part in ("gate", "up") else "rows"


def _expected(part: _OwnPart, shape: WeightShape, transposed: bool) -> Shape:
    """Shape of a part's tensor."""
    rows = sum(block.count * block.width for block in part.own)
    stack: Shape = (shape.count,) if part.part.stacked else ()
    if shape.k is None:
        return *stack, rows
    k = shape.k if shape.columns is None else shape.columns.count * shape.columns.width
    if part.part.scales is not None:
        return *stack, rows, k // MXFP4_BLOCK, MXFP4_BLOCK // 2
    return (*stack, k, rows) if transposed else (*stack, rows, k)


def _header(part: _OwnPart, shape: WeightShape, checkpoint: Tensors) -> tuple[bool, SourceDtype, list[str]]:
    """Whether the tensor's columns come first, its type, and what is wrong with it."""
    name, scales, transposed = part.part.name, part.part.scales, part.part.transposed
    info = checkpoint.info(name)
    expected = _expected(part, shape, transposed)
    wrong: list[str] = []
    matrix = checkpoint.matrix(name)
    if matrix is not None:
        if tuple(info.shape) != expected:
            wrong.append(f"{name} is quantised as {list(info.shape)}, expected {list(expected)}")
        if shape.mapped or shape.k is None or scales is not None:
            wrong.append(f"{name} is quantised, where only a plain tensor can be used")
        return transposed, "grouped" if shape.by_group else matrix.kind, wrong
    if tuple(info.shape) != expected:
        if part.part.stacked and shape.k is not None and scales is None:
            transposed = not transposed  # as tools save them that know one layout only
        if tuple(info.shape) != _expected(part, shape, transposed):
            wrong.append(f"{name} is {list(info.shape)}, expected {list(expected)}")
    if (scales is not None) != (shape.format == "mxfp4"):
        held, named = ("MXFP4 blocks", "none") if scales is not None else ("no MXFP4 blocks", "'mxfp4'")
        wrong.append(f"{name} holds {held}, but quantization_config names {named}")
    if scales is None:
        dtype = DTYPES.get(info.dtype.lower())
        if dtype is None:
            wrong.append(f"{name} has dtype {info.dtype}, expected BF16, F16 or F32")
        return transposed, dtype or "f32", wrong
    other = checkpoint.info(scales)
    if tuple(other.shape) != expected[:-1]:
        wrong.append(f"{scales} is {list(other.shape)}, expected {list(expected[:-1])}")
    wrong += [
        f"{tensor} has dtype {of.dtype}, expected U8"
        for tensor, of in ((name, info), (scales, other))
        if of.dtype.lower() != "u8"
    ]
    return False, "mxfp4", wrong


def _sources(part: _OwnPart, shape: WeightShape, transposed: bool, dtype: SourceDtype) -> Iterator[Source]:
    """How a part is loaded, in rows that stay together."""
    step = len(part.own) if part.part.interleaved else 1
    for matrix in part.matrices:
        at, first = part.at, 0
        for i, block in enumerate(part.own):
            mode = _mode(block)
            yield Source(
                part.part.name,
                part.part.scales,
                _expected(part, shape, transposed),
                dtype,
                matrix if part.part.stacked else None,
                transposed,
                i if step > 1 else first,
                step,
                block,
                shape.columns,
                at if mode == "rows" else 0,
                mode,
                matrix,
                last=matrix == part.matrices[-1] and block is part.own[-1],
                by_group=shape.by_group,
            )
            first += block.count * block.width
            at += block.n if mode == "rows" else 0


def _pieces(source: Source) -> Iterator[Source]:
    """A source of a quantised matrix in pieces: what comes of it is larger than the tensor, and none is kept."""
    block, at, first = source.block, source.at, source.first
    source = replace(source, quantised=True)
    step = max(_PIECE // source.shape[-1] // 32, 1) * 32
    if block.filled != block.width or block.width * block.count <= step:
        yield source
        return
    left = block.width * block.count
    while left > 0:
        n = min(step, left)
        left -= n
        own = replace(block, count=1, width=n, filled=n)
        yield replace(source, block=own, at=at, first=first, last=source.last and left == 0)
        at += n if source.mode == "rows" else 2 * n
        first += n * source.step


def _listed(names: list[str], quote: bool = True) -> str:
    """A list cut to a few entries and a count of the rest."""
    shown = ", ".join(repr(n) if quote else n for n in names[:_LISTED])
    rest = len(names) - _LISTED
    return f"{shown} and {rest} more" if rest > 0 else shown
