"""From checkpoint tensors to plan weights: strict in both directions, flat in memory.

Every name, shape and dtype is checked before the sink sees the first byte, so that a broken checkpoint never
leaves a half-loaded model. Then tensors are streamed one at a time: the sink packs it, its source pages are
dropped, the next one is touched. The same code feeds the packed engine and the float64 reference; they differ
in their sink.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from pace.errors import WeightsError
from pace.log import logger
from pace.models.names import IGNORED, canonical, foreign
from pace.models.plan import Blocks, PartMode, Plan, WeightShape, gated_rows
from pace.models.spec import DecoderSpec

SourceDtype = Literal["bf16", "f16", "f32"]
SourceArray = npt.NDArray[Any]
F32Array = npt.NDArray[np.float32]
Progress = Callable[[int, int], None]
"""progress(done_bytes, total_bytes) of source tensors, after each tensor."""


@dataclass(frozen=True, slots=True)
class Part:
    """One checkpoint tensor within a plan weight.

    Args:
        name: checkpoint name; {i} stands for the layer, {h} for each head in turn where every head has a tensor.
        rows: which rows of a fused weight it holds, in its own order: "q", "q|k|v", "gate|up" ...
        spare: the file may have it for layers that do without.
    """

    name: str
    rows: str = "all"
    spare: bool = False


WeightMap = Mapping[str, tuple[Part, ...]]
"""Plan weight name -> its parts; {i} stands for the layer in both."""


class TensorInfo(Protocol):
    """What a checkpoint's header says about a tensor."""

    @property
    def dtype(self) -> str:
        """Element type as safetensors spells it ("BF16"), in any case."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape, row-major."""
        ...


class Checkpoint(Protocol):
    """A set of named tensors on disk."""

    def names(self) -> Iterable[str]:
        """Every tensor name."""
        ...

    def info(self, name: str) -> TensorInfo:
        """Dtype and shape without touching the data."""
        ...

    def tensor(self, name: str) -> SourceArray:
        """A view of the data; bf16 as uint16."""
        ...

    def drop(self, name: str) -> None:
        """The data is not needed any more: its pages may leave memory."""
        ...


class SourcePart(NamedTuple):
    """Rows for a matrix.

    Args:
        array: [rows, k] C-contiguous; bf16 as uint16. Valid until the next part is requested.
        at: first row of the target; a multiple of 16.
        mode: "rows": consecutive; "gate"/"up": as `plan.gated_rows`.
    """

    array: SourceArray
    dtype: SourceDtype
    at: int
    mode: PartMode


class Sink(Protocol):
    """Receives the weights of a plan, each once."""

    def matrix(self, name: str, n: int, k: int, parts: Iterator[SourcePart]) -> None:
        """A matrix [n, k]. The parts cover every row once and must be consumed in order, one at a time."""
        ...

    def vector(self, name: str, values: F32Array) -> None:
        """A vector f32 [n]; owned by the sink."""
        ...

    def table(self, name: str, rows: SourceArray, dtype: SourceDtype) -> None:
        """A mapped table [n, k], as the file has it; the view stays valid."""
        ...


_DTYPES: Final[Mapping[str, SourceDtype]] = {"bf16": "bf16", "f16": "f16", "f32": "f32"}
_NUMPY: Final[Mapping[SourceDtype, type[np.generic]]] = {
    "bf16": np.uint16,
    "f16": np.float16,
    "f32": np.float32,
}
_ITEM_BYTES: Final[Mapping[SourceDtype, int]] = {"bf16": 2, "f16": 2, "f32": 4}

_COMPARED = 1 << 20  # elements of two matrices that are compared at a time
_LISTED = 4  # names per list in an error: enough to see the pattern, short enough for one line


@dataclass(frozen=True, slots=True)
class _Source:
    """Some rows of one tensor: what it must look like, and where they go.

    Args:
        name: of the tensor.
        shape: of the whole tensor.
        first: its first row that is meant.
        block: rows from there, and what they become.
        columns: the same of the columns.
        at, mode: as of `SourcePart`.
        last: the tensor is not needed any more.
    """

    name: str
    shape: tuple[int, ...]
    dtype: SourceDtype
    first: int
    block: Blocks
    columns: Blocks | None
    at: int
    mode: PartMode
    last: bool

    @property
    def n_bytes(self) -> int:
        """Bytes read."""
        width = self.shape[1] if len(self.shape) > 1 else 1
        return self.block.count * self.block.width * width * _ITEM_BYTES[self.dtype]


class Tensors:
    """A checkpoint under the names of its architecture: what tools have put before or between is taken off.

    Args:
        checkpoint: the files.
        weight_map: of the architecture.
        n_layers: of the model.

    Raises:
        WeightsError: two tensors get the same name.
    """

    def __init__(self, checkpoint: Checkpoint, weight_map: WeightMap, n_layers: int) -> None:
        self._checkpoint = checkpoint
        self._tied: bool | None = None
        self.table = _expand(weight_map, n_layers)
        wanted = {part.name for parts in self.table.values() for part in parts}
        self._names: dict[str, str] = {}  # ours -> the file's
        for name in checkpoint.names():
            ours = canonical(name, wanted)
            if ours in self._names:
                raise WeightsError(
                    f"the checkpoint holds {name!r} and {self._names[ours]!r}, which mean the same tensor; "
                    "remove the one that is not the model's"
                )
            self._names[ours] = name

    def names(self) -> Iterable[str]:
        """Every tensor name."""
        return self._names.keys()

    def info(self, name: str) -> TensorInfo:
        """Dtype and shape without touching the data."""
        return self._checkpoint.info(self._names[name])

    def tensor(self, name: str) -> SourceArray:
        """A view of the data; bf16 as uint16."""
        return self._checkpoint.tensor(self._names[name])

    def drop(self, name: str) -> None:
        """The data is not needed any more."""
        self._checkpoint.drop(self._names[name])

    def head_is_tied(self) -> bool:
        """Whether the LM head is the embedding's matrix, as the file has it: equal, or stored once.

        A config that says tied over a file with two different matrices (full fine-tunes, merged adapters) is settled by
        the file, as transformers 5 does. Both matrices are read once, as far as they are equal.
        """
        if self._tied is None:
            pair = [part.name for name in ("embed", "lm_head") for part in self.table.get(name, ())[:1]]
            self._tied = len(pair) < 2 or not set(pair) <= self._names.keys() or self._equal(*pair)
        return self._tied

    def _equal(self, one: str, other: str) -> bool:
        """Whether two tensors hold the same values, whatever type they are stored in."""
        a, b = self.info(one), self.info(other)
        x, y = _DTYPES.get(a.dtype.lower()), _DTYPES.get(b.dtype.lower())
        if tuple(a.shape) != tuple(b.shape) or x is None or y is None:
            return False  # refused later, by name

        def values(array: SourceArray, dtype: SourceDtype) -> SourceArray:
            # The bits, where the types are equal: four times faster, and a NaN is equal to itself.
            return array.view(np.uint8) if x == y else to_f32(array, dtype)

        left, right = self.tensor(one).reshape(-1), self.tensor(other).reshape(-1)
        pieces = (slice(at, at + _COMPARED) for at in range(0, left.size, _COMPARED))
        equal = all(np.array_equal(values(left[piece], x), values(right[piece], y)) for piece in pieces)
        self.drop(one)
        self.drop(other)
        return equal


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
    needed = plan.weights()
    sources = _check(needed, checkpoint)
    total = sum(s.n_bytes for parts in sources.values() for s in parts)
    done = 0

    def stream(name: str) -> Iterator[SourcePart]:
        nonlocal done
        for source in sources[name]:
            yield SourcePart(_fill(checkpoint, source), source.dtype, source.at, source.mode)
            if source.last:
                checkpoint.drop(source.name)
            done += source.n_bytes
            if progress is not None:
                progress(done, total)

    for name, shape in needed.items():
        parts = stream(name)
        if shape.mapped:
            part = next(parts)
            sink.table(name, part.array, part.dtype)
        elif shape.k is not None:
            sink.matrix(name, shape.n, shape.k, parts)
        else:
            values = np.empty(shape.n, np.float32)
            for part in parts:
                values[part.at + gated_rows(len(part.array), part.mode)] = to_f32(part.array, part.dtype)
            sink.vector(name, values)
        for _ in parts:  # a sink that stops early must not lose the last tensor's drop and progress
            pass


def to_f32(array: SourceArray, dtype: SourceDtype) -> F32Array:
    """A tensor's values as float32 (exact for every source dtype); bf16 comes as uint16."""
    if dtype == "bf16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32)


class DenseSink:
    """Keeps weights as plain arrays, for the reference.

    Matrices are [n, k] in the row order of the plan (gate and up alternate in blocks of 16), vectors [n].

    Args:
        dtype: of the stored arrays.
    """

    def __init__(self, dtype: type[np.floating[Any]] = np.float64) -> None:
        self.dtype = dtype
        self.weights: dict[str, npt.NDArray[Any]] = {}

    def matrix(self, name: str, n: int, k: int, parts: Iterator[SourcePart]) -> None:
        """Store a matrix [n, k]; rows that no part fills stay NaN, so that a hole shows."""
        dense = np.full((n, k), np.nan, self.dtype)
        for array, dtype, at, mode in parts:
            dense[at + gated_rows(len(array), mode)] = to_f32(array, dtype)
        self.weights[name] = dense

    def vector(self, name: str, values: F32Array) -> None:
        """Store a vector [n]."""
        self.weights[name] = values.astype(self.dtype)

    def table(self, name: str, rows: SourceArray, dtype: SourceDtype) -> None:
        """Store a table [n, k]."""
        self.weights[name] = to_f32(rows, dtype).astype(self.dtype)


def _check(needed: Mapping[str, WeightShape], checkpoint: Tensors) -> dict[str, list[_Source]]:
    """Match plan weights and checkpoint tensors one to one, or raise."""
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
    wanted = {part.name for own in parts.values() for part in own}
    spare |= {part.name for own in table.values() for part in own if part.spare}
    spare |= {part.name for name in needed for part in table[name] if "{h}" not in part.name}
    missing = sorted(wanted - present)
    unexpected = sorted(n for n in present - wanted - spare if not IGNORED.fullmatch(n))
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
    sources: dict[str, list[_Source]] = {}
    for name, shape in needed.items():
        sources[name] = []
        for source, complaints in _sources(parts[name], shape, checkpoint):
            sources[name].append(source)
            wrong += complaints
    if wrong:
        raise WeightsError(f"the checkpoint does not match its config.json: {_listed(wrong, quote=False)}")
    return sources


def tensor_shapes(plan: Plan, weight_map: WeightMap, n_layers: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """What a checkpoint of this plan holds: tensor name -> the plan weight it belongs to, and its shape."""
    table = _expand(weight_map, n_layers)
    return {
        part.name: (name, _expected(part, shape))
        for name, shape in plan.weights().items()
        for part in _parts(table[name], shape)
    }


def _parts(parts: tuple[Part, ...], shape: WeightShape) -> list[Part]:
    """The parts of a weight that this layer has; a tensor per head is as many parts."""
    blocks = _blocks(shape)
    found: list[Part] = []
    for part in parts:
        if "{h}" in part.name:
            found += [Part(part.name.replace("{h}", str(h)), "head") for h in range(blocks["all"].count)]
        elif set(part.rows.split("|")) <= set(blocks):
            found.append(part)
    return found


def _blocks(shape: WeightShape) -> dict[str, Blocks]:
    blocks = shape.blocks or (Blocks("all", 1, shape.n, shape.n),)
    return {block.part: block for block in blocks}


def _own(part: Part, shape: WeightShape) -> list[Blocks]:
    """The blocks of rows that a tensor holds."""
    blocks = _blocks(shape)
    if part.rows == "head":
        return [replace(blocks["all"], count=1)]
    return [blocks[name] for name in part.rows.split("|")]


def _expected(part: Part, shape: WeightShape) -> tuple[int, ...]:
    """Shape of a part's tensor."""
    rows = sum(block.count * block.width for block in _own(part, shape))
    if shape.k is None:
        return (rows,)
    columns = shape.columns
    return rows, shape.k if columns is None else columns.count * columns.width


def _sources(
    parts: list[Part], shape: WeightShape, checkpoint: Tensors
) -> Iterator[tuple[_Source, list[str]]]:
    """How each part is loaded, in rows that stay together; and what is wrong with its tensor."""
    at = 0
    for part in parts:
        own, expected = _own(part, shape), _expected(part, shape)
        info = checkpoint.info(part.name)
        dtype = _DTYPES.get(info.dtype.lower())
        complaints = []
        if tuple(info.shape) != expected:
            complaints.append(f"{part.name} is {list(info.shape)}, expected {list(expected)}")
        if dtype is None:
            complaints.append(f"{part.name} has dtype {info.dtype}, expected BF16, F16 or F32")
        first = 0
        for block in own:
            mode: PartMode = block.part if block.part in ("gate", "up") else "rows"
            yield (
                _Source(
                    part.name,
                    expected,
                    dtype or "f32",
                    first,
                    block,
                    shape.columns,
                    at if mode == "rows" else 0,
                    mode,
                    last=block is own[-1],
                ),
                complaints,
            )
            complaints = []
            first += block.count * block.width
            at += block.n if mode == "rows" else 0


def _expand(weight_map: WeightMap, n_layers: int) -> dict[str, tuple[Part, ...]]:
    """The map with {i} replaced by every layer."""
    table: dict[str, tuple[Part, ...]] = {}
    for name, parts in weight_map.items():
        for i in range(n_layers) if "{i}" in name else (0,):
            layer = str(i)
            table[name.replace("{i}", layer)] = tuple(
                replace(p, name=p.name.replace("{i}", layer)) for p in parts
            )
    return table


def _fill(checkpoint: Tensors, source: _Source) -> SourceArray:
    """The rows of a source with the zeros that fill them: [rows] or [rows, k].

    The tensor is checked once more: its header was, the reader's view must agree with it.
    """
    array = checkpoint.tensor(source.name)
    if array.shape != source.shape or array.dtype != _NUMPY[source.dtype]:
        raise WeightsError(
            f"{source.name} was read as {array.dtype} {list(array.shape)}, expected "
            f"{np.dtype(_NUMPY[source.dtype])} {list(source.shape)}"
        )
    rows, columns = source.block, source.columns
    array = array[source.first : source.first + rows.count * rows.width]
    if rows.filled != rows.width:
        array = _pad(array, rows, axis=0)
    if columns is not None and columns.filled != columns.width:
        array = _pad(array, columns, axis=1)
    return array


def _pad(array: SourceArray, blocks: Blocks, axis: int) -> SourceArray:
    """The array with each block along an axis followed by zeros: [count * width] -> [count * filled]."""
    before, after = array.shape[:axis], array.shape[axis + 1 :]
    wide = np.zeros((*before, blocks.count, blocks.filled, *after), array.dtype)
    index = (slice(None),) * (axis + 1) + (slice(blocks.width),)
    wide[index] = array.reshape(*before, blocks.count, blocks.width, *after)
    return wide.reshape(*before, blocks.n, *after)


def _listed(names: list[str], quote: bool = True) -> str:
    """A list cut to a few entries and a count of the rest."""
    shown = ", ".join(repr(n) if quote else n for n in names[:_LISTED])
    rest = len(names) - _LISTED
    return f"{shown} and {rest} more" if rest > 0 else shown
