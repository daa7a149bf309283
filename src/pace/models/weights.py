"""From checkpoint tensors to plan weights: strict in both directions, flat in memory.

Every name, shape and dtype is checked before the sink sees the first byte, so that a broken checkpoint never
leaves a half-loaded model. Then tensors are streamed one at a time: the sink packs it, its source pages are
dropped, the next one is touched. The same code feeds the packed engine and the float64 reference; they differ
in their sink.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final, Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from pace.errors import WeightsError
from pace.models.names import IGNORED, canonical, foreign
from pace.models.plan import PartMode, Plan, WeightShape, gated_rows

SourceDtype = Literal["bf16", "f16", "f32"]
SourceArray = npt.NDArray[Any]
F32Array = npt.NDArray[np.float32]
Progress = Callable[[int, int], None]
"""progress(done_bytes, total_bytes) of source tensors, after each tensor."""


class PartRows(Enum):
    """Which rows of a fused plan weight a checkpoint tensor fills."""

    ALL = "all"
    Q = "q"  # n_heads * head_dim rows
    KV = "kv"  # n_kv_heads * head_dim rows
    GATE = "gate"  # half of a gated weight, blocks of 16 rows
    UP = "up"  # the other half


@dataclass(frozen=True, slots=True)
class Part:
    """One checkpoint tensor within a plan weight.

    Args:
        name: checkpoint name; {i} stands for the layer.
        rows: which rows it fills. Parts of Q and KV rows follow each other in the order of the map.
    """

    name: str
    rows: PartRows = PartRows.ALL


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
    """One tensor to load: where it goes and what it must look like."""

    name: str
    rows: int
    at: int
    mode: PartMode
    dtype: SourceDtype


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
    sources = _check(plan, needed, checkpoint)
    total = sum(_bytes(s, needed[name]) for name, parts in sources.items() for s in parts)
    done = 0

    def stream(name: str) -> Iterator[SourcePart]:
        nonlocal done
        for source in sources[name]:
            yield SourcePart(_view(checkpoint, source, needed[name]), source.dtype, source.at, source.mode)
            checkpoint.drop(source.name)
            done += _bytes(source, needed[name])
            if progress is not None:
                progress(done, total)

    for name, shape in needed.items():
        if shape.k is not None:
            parts = stream(name)
            sink.matrix(name, shape.n, shape.k, parts)
            for _ in parts:  # a sink that stops early must not lose the last tensor's drop and progress
                pass
        else:
            values = np.empty(shape.n, np.float32)
            for part in stream(name):
                values[part.at + gated_rows(len(part.array), part.mode)] = to_f32(part.array, part.dtype)
            sink.vector(name, values)


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


def _check(plan: Plan, needed: Mapping[str, WeightShape], checkpoint: Tensors) -> dict[str, list[_Source]]:
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
    wanted = {part.name for name in needed for part in table[name]}
    missing = sorted(wanted - present)
    unexpected = sorted(n for n in present - wanted - spare if not IGNORED.fullmatch(n))
    if missing or unexpected:
        parts = [f"{_listed(missing)} missing"] if missing else []
        parts += [f"{_listed(unexpected)} unexpected"] if unexpected else []
        advice = foreign(unexpected) or (
            "set tie_word_embeddings to true if its LM head is the embedding"
            if set(missing) <= head and not unexpected
            else "download it again or correct the config"
        )
        raise WeightsError(
            f"the checkpoint does not match its config.json: tensors {'; '.join(parts)}; {advice}"
        )
    sources: dict[str, list[_Source]] = {}
    wrong: list[str] = []
    for name, shape in needed.items():
        at = 0
        sources[name] = []
        for part in table[name]:
            source, complaint = _source(shape, part, at, checkpoint.info(part.name))
            sources[name].append(source)
            wrong += complaint
            at += source.rows if source.mode == "rows" else 0
    if wrong:
        raise WeightsError(f"the checkpoint does not match its config.json: {_listed(wrong, quote=False)}")
    return sources


def _source(shape: WeightShape, part: Part, at: int, info: TensorInfo) -> tuple[_Source, list[str]]:
    """How a tensor is loaded, and what is wrong with it."""
    rows = {
        PartRows.ALL: lambda: shape.n,
        PartRows.Q: lambda: shape.parts[0],
        PartRows.KV: lambda: shape.parts[1],
        PartRows.GATE: lambda: shape.parts[0],
        PartRows.UP: lambda: shape.parts[1],
    }[part.rows]()
    mode: PartMode = "gate" if part.rows is PartRows.GATE else "up" if part.rows is PartRows.UP else "rows"
    expected = (rows,) if shape.k is None else (rows, shape.k)
    dtype = _DTYPES.get(info.dtype.lower())
    complaint = []
    if tuple(info.shape) != expected:
        complaint.append(f"{part.name} is {list(info.shape)}, expected {list(expected)}")
    if dtype is None:
        complaint.append(f"{part.name} has dtype {info.dtype}, expected BF16, F16 or F32")
    return _Source(part.name, rows, at, mode, dtype or "f32"), complaint


def _expand(weight_map: WeightMap, n_layers: int) -> dict[str, tuple[Part, ...]]:
    """The map with {i} replaced by every layer."""
    table: dict[str, tuple[Part, ...]] = {}
    for name, parts in weight_map.items():
        for i in range(n_layers) if "{i}" in name else (0,):
            layer = str(i)
            table[name.replace("{i}", layer)] = tuple(
                Part(p.name.replace("{i}", layer), p.rows) for p in parts
            )
    return table


def _view(checkpoint: Tensors, source: _Source, shape: WeightShape) -> SourceArray:
    """The tensor's data, once more checked: the header was, the reader's view must agree with it."""
    array = checkpoint.tensor(source.name)
    expected = (source.rows,) if shape.k is None else (source.rows, shape.k)
    if array.shape != expected or array.dtype != _NUMPY[source.dtype]:
        raise WeightsError(
            f"{source.name} was read as {array.dtype} {list(array.shape)}, expected "
            f"{np.dtype(_NUMPY[source.dtype])} {list(expected)}"
        )
    return array


def _bytes(source: _Source, shape: WeightShape) -> int:
    return source.rows * (shape.k or 1) * _ITEM_BYTES[source.dtype]


def _listed(names: list[str], quote: bool = True) -> str:
    """A list cut to a few entries and a count of the rest."""
    shown = ", ".join(repr(n) if quote else n for n in names[:_LISTED])
    rest = len(names) - _LISTED
    return f"{shown} and {rest} more" if rest > 0 else shown
