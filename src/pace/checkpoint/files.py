"""The files of a model by name, whether they lie in a folder or a GGUF file says the same."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy.typing as npt

from pace.checkpoint.config_json import MAX_JSON_BYTES, checkpoint_file, read_file, read_json
from pace.checkpoint.safetensors import Checkpoint, TensorInfo

if TYPE_CHECKING:
    from pace.checkpoint.gguf.tensors import GgufMatrix

__all__ = ["ModelFiles", "ModelFolder", "TensorFiles", "model_files"]


class TensorFiles(Protocol):
    """The tensors of a model; `safetensors.Checkpoint` says what each method does."""

    @property
    def matrices(self) -> Mapping[str, GgufMatrix]:
        """Quantised ones by name, where the file itself says what they are."""
        ...

    def names(self) -> tuple[str, ...]:
        """Names of all tensors."""
        ...

    def info(self, name: str) -> TensorInfo:
        """Describe a tensor without touching its data."""
        ...

    def tensor(self, name: str) -> npt.NDArray[Any]:
        """A tensor [shape]; BF16 as uint16."""
        ...

    def drop(self, name: str) -> None:
        """Give a tensor's pages back to the system."""
        ...

    def close(self) -> None:
        """Unmap the files."""
        ...


class ModelFiles(Protocol):
    """What a model consists of.

    Attributes:
        path: of the folder, or of the GGUF file.
    """

    path: Path

    def where(self, name: str) -> str:
        """How messages call a file."""
        ...

    def read(self, name: str, max_bytes: int = MAX_JSON_BYTES) -> bytes | None:
        """The bytes of a file; None where there is none.

        Raises:
            CheckpointError: it can't be read, or is larger than `max_bytes`.
        """
        ...

    def json(self, name: str) -> dict[str, Any] | None:
        """The object that a JSON file holds; None where there is none.

        Raises:
            CheckpointError: it can't be read, or holds something else.
        """
        ...

    def weight_paths(self) -> list[Path]:
        """The files that the tensors may come from, sorted."""
        ...

    def tensors(self) -> TensorFiles:
        """The tensors, to be closed by the caller.

        Raises:
            CheckpointError: there are none, or they are malformed.
        """
        ...


class ModelFolder:
    """A folder as the hub has it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def where(self, name: str) -> str:
        """How messages call a file."""
        return str(self.path / name)

    def read(self, name: str, max_bytes: int = MAX_JSON_BYTES) -> bytes | None:
        """The bytes of a file; see `ModelFiles`."""
        path = checkpoint_file(self.path, name)
        return None if path is None else read_file(path, max_bytes)

    def json(self, name: str) -> dict[str, Any] | None:
        """The object that a JSON file holds; see `ModelFiles`."""
        path = checkpoint_file(self.path, name)
        return None if path is None else read_json(path)

    def weight_paths(self) -> list[Path]:
        """The files that the tensors may come from; see `ModelFiles`."""
        return sorted(
            path for end in ("safetensors", "safetensors.index.json") for path in self.path.glob(f"*.{end}")
        )

    def tensors(self) -> Checkpoint:
        """The tensors; see `ModelFiles`."""
        return Checkpoint(self.path)


def model_files(place: str | os.PathLike[str] | ModelFiles) -> ModelFiles:
    """The files of a folder or of a GGUF file.

    Raises:
        CheckpointError, UnsupportedModel: it is a file, and none that `GgufModel` reads.
    """
    if not isinstance(place, (str, os.PathLike)):
        return place
    path = Path(place)
    if not path.is_file():
        return ModelFolder(path)
    # Not at the top: most models are folders.
    from pace.checkpoint.gguf import GgufModel

    return GgufModel(path)
