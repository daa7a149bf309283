"""A checkpoint's tensors under the names of their architecture, and what their bytes mean."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from pace.errors import WeightsError
from pace.log import logger
from pace.models.names import IGNORED, KV_SCALES, canonical
from pace.models.plan import PartMode
from pace.models.weight_map import Parts, TensorNames, WeightMap, any_expert, choose, expand
from pace.quant.groups import Fp8Rows, GroupedRows
from pace.quant.matrices import Matrix, QuantisedRows

SourceDtype = Literal["bf16", "f16", "f32", "mxfp4", "grouped", "fp8"]
SourceArray = npt.NDArray[Any]
F32Array = npt.NDArray[np.float32]

DTYPES: Final[Mapping[str, SourceDtype]] = {"bf16": "bf16", "f16": "f16", "f32": "f32"}
"""Of the values that safetensors has, as it spells them in lower case."""
NUMPY: Final[Mapping[SourceDtype, type[np.generic]]] = {
    "bf16": np.uint16,
    "f16": np.float16,
    "f32": np.float32,
    "mxfp4": np.uint8,
    "grouped": np.uint8,
    "fp8": np.uint8,
}

MXFP4_BLOCK: Final = 32
"""Columns that share a scale."""
_CODES: Final = np.array(
    [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32
)  # of each of the 16 codes

_COMPARED = 1 << 20  # elements of two matrices that are compared at a time

# What a layer behind the last one has that predicts further tokens (GLM-4.5, DeepSeek V3).
_FURTHER: Final = re.compile(
    r"(?P<layer>.*\blayers\.(?P<index>\d+)\.)(?:eh_proj|enorm|hnorm)\.weight", re.ASCII
)


class SourcePart(NamedTuple):
    """Rows for a matrix.

    Args:
        array: [rows, k] C-contiguous; bf16 as uint16. Of MXFP4 the blocks [rows, k / 32, 16], rows any way apart; of
            "grouped" and "fp8" the rows with their scales. Valid until the next part is requested.
        at: first row of the target; a multiple of 16.
        mode: "rows": consecutive; "gate"/"up": as `plan.gated_rows`.
        matrix: which of the `count` of the weight.
        scales: of MXFP4, [rows, k / 32].
    """

    array: SourceArray | QuantisedRows
    dtype: SourceDtype
    at: int
    mode: PartMode
    matrix: int = 0
    scales: SourceArray | None = None


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


class Found(NamedTuple):
    """A quantised matrix of a checkpoint.

    Args:
        name: that its tensor would have if it were plain.
        members: the tensors that it has instead.
        open: the matrix, from the names of its module; nothing of it is read.
    """

    name: str
    members: tuple[str, ...]
    open: Callable[[tuple[str, ...]], Matrix]


class Quantised(Protocol):
    """What is known of a checkpoint's quantised weights."""

    def find(self, checkpoint: Checkpoint) -> Iterable[Found]:
        """The quantised matrices, each once."""
        ...

    def names(self, modules: Iterable[str]) -> bool:
        """Whether a module, by any of its names, has to be quantised."""
        ...


@dataclass(frozen=True, slots=True)
class _Info:
    """As a header describes a tensor."""

    dtype: str
    shape: tuple[int, ...]


class Tensors:
    """A checkpoint under the names of its architecture: what tools have put before or between is taken off.

    A quantised matrix appears as one tensor with the name of the plain one.

    Args:
        checkpoint: the files.
        weight_map: of the architecture.
        n_layers: of the model.
        quantised: what the config says of quantised weights; None: there are none.

    Attributes:
        table: plan weight name -> the parts that this file has, layer by layer.

    Raises:
        WeightsError: two tensors get the same name; or quantised matrices are not what the config says.
    """

    def __init__(
        self, checkpoint: Checkpoint, weight_map: WeightMap, n_layers: int, quantised: Quantised | None = None
    ) -> None:
        self._checkpoint = checkpoint
        self._tied: bool | None = None
        layouts = expand(weight_map, n_layers)
        wanted = TensorNames(layouts)
        found = () if quantised is None else tuple(quantised.find(checkpoint))
        members = {name for matrix in found for name in matrix.members}
        self._names: dict[str, str] = {}  # ours -> the file's
        self._members: dict[str, tuple[str, ...]] = {}
        self._matrices: dict[str, Matrix] = {}
        for name in checkpoint.names():
            if name not in members:
                self._add(canonical(name, wanted), name)
        self._further = tuple(
            match["layer"]
            for match in map(_FURTHER.fullmatch, self._names)
            if match is not None and int(match["index"]) >= n_layers
        )
        for name, own, open_matrix in found:
            ours = canonical(name, wanted)
            if self.is_ignored(ours):
                self._names |= {member: member for member in own}
                continue
            self._add(ours, name)
            self._members[ours] = own
            self._matrices[ours] = open_matrix(_modules(name, ours))
        scales = sum(KV_SCALES.fullmatch(name) is not None for name in self._names)
        if scales:
            logger.info(
                "%d scales of an FP8 KV cache are not used: pace's holds what they approximate", scales
            )
        present = {any_expert(name) for name in self._names}
        self.table: dict[str, Parts] = {name: choose(of, present) for name, of in layouts.items()}
        if quantised is not None:
            self._check_plain(quantised)

    def _add(self, ours: str, name: str) -> None:
        if ours in self._names:
            raise WeightsError(
                f"the checkpoint holds {name!r} and {self._names[ours]!r}, which mean the same tensor; "
                "remove the one that is not the model's"
            )
        self._names[ours] = name

    def _check_plain(self, quantised: Quantised) -> None:
        """Refuse layers that are stored as they were though the config says that they are quantised.

        Not routers, which are no linear layers to newer tools, nor the embedding and the head.
        """
        for weight, parts in self.table.items():
            if not weight.startswith("layers.") or weight.endswith(".router"):
                continue
            for part in parts:
                name = self._names.get(part.name)
                plain = (
                    name is not None
                    and part.name not in self._matrices
                    and len(self.info(part.name).shape) == 2
                )
                if name is not None and plain and quantised.names(_modules(name, part.name)):
                    raise WeightsError(
                        f"{name} is not quantised, but quantization_config says so; add its module to the config's list of "
                        "those that are not, or take the original config"
                    )

    def names(self) -> Iterable[str]:
        """Every tensor name."""
        return self._names.keys()

    def file_name(self, name: str) -> str:
        """The file's own name of a tensor."""
        return self._names[name]

    def file_names(self) -> dict[str, list[str]]:
        """The file's own names by ours, those of experts by one name with {e}."""
        found: dict[str, list[str]] = {}
        for ours, name in self._names.items():
            found.setdefault(any_expert(ours), []).append(name)
        return found

    def is_ignored(self, name: str) -> bool:
        """Whether a tensor belongs to what is never run, changes no number of pace's (scales of an FP8 KV cache), or is
        nothing: zeros that old tools wrote for a bias.
        """
        module = name.removesuffix(".bias")
        if module != name and f"{module}.weight" in self._matrices:
            return not self.tensor(name).any()
        if IGNORED.fullmatch(name) is not None or KV_SCALES.fullmatch(name) is not None:
            return True
        return bool(self._further) and name.startswith(self._further)

    def info(self, name: str) -> TensorInfo:
        """Dtype and shape without touching the data; the dtype of a quantised matrix is its kind."""
        matrix = self._matrices.get(name)
        if matrix is not None:
            return _Info(matrix.kind, matrix.shape)
        return self._checkpoint.info(self._names[name])

    def tensor(self, name: str) -> SourceArray:
        """A view of the data; bf16 as uint16."""
        return self._checkpoint.tensor(self._names[name])

    @property
    def quantised(self) -> bool:
        """Whether any matrix is."""
        return bool(self._matrices)

    def matrix(self, name: str) -> Matrix | None:
        """A quantised matrix; None: that tensor is a plain one."""
        return self._matrices.get(name)

    def drop(self, name: str) -> None:
        """The data is not needed any more."""
        for member in self._members.get(name) or (self._names[name],):
            self._checkpoint.drop(member)

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
        if one in self._matrices or other in self._matrices:
            return False  # both are used, as they stand
        a, b = self.info(one), self.info(other)
        x, y = DTYPES.get(a.dtype.lower()), DTYPES.get(b.dtype.lower())
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


def _modules(*names: str) -> tuple[str, ...]:
    """Names that a module may have in a config's lists, from those of its weight: also as tools name a text model."""
    found = dict.fromkeys(name.removesuffix(".weight") for name in names)
    inner = [name.removeprefix("model.") for name in found if name.startswith("model.layers.")]
    found.update(dict.fromkeys(f"{at}.{name}" for name in inner for at in _TEXT_MODELS))
    return tuple(found)


_TEXT_MODELS: Final = ("model.language_model", "language_model.model")


def to_f32(
    array: SourceArray | QuantisedRows, dtype: SourceDtype, scales: SourceArray | None = None
) -> F32Array:
    """A tensor's values as float32 (exact for every source dtype).

    Args:
        array: bf16 comes as uint16, mxfp4 as blocks [rows, k / 32, 16], others in few bits as their rows.
        scales: of mxfp4, [rows, k / 32].
    """
    if isinstance(array, GroupedRows | Fp8Rows):
        return array.dequantised()
    if dtype == "bf16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    if dtype == "mxfp4" and scales is not None:
        codes = np.stack((array & 15, array >> 4), axis=-1)  # the lower column in the low nibble
        values = _CODES[codes].reshape(*array.shape[:-1], MXFP4_BLOCK)
        return np.ldexp(values, scales.astype(np.int32)[..., None] - 127).reshape(len(array), -1)
    return array.astype(np.float32)
