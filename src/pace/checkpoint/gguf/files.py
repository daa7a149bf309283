"""A GGUF file seen as the folder that it was made from: the same files by the same names, out of its metadata."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar

from pace.checkpoint.config_json import MAX_JSON_BYTES, checkpoint_file
from pace.checkpoint.gguf.config import Facts, config_of
from pace.checkpoint.gguf.header import GgufFile, read_header
from pace.checkpoint.gguf.tensors import GgufTensors, read_vector
from pace.checkpoint.gguf.tokenizer import end_ids, tokenizer_config, tokenizer_json
from pace.errors import CheckpointError, PaceError, show

__all__ = ["GgufModel"]

A = TypeVar("A")
B = TypeVar("B")

MAX_SPLITS: Final = 1000

_SAMPLING: Final = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}
"""Under `general.sampling`, and what generation_config.json calls it."""
_SPLIT: Final = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL | re.ASCII)


class GgufModel:
    """A model in one GGUF file, or in several that were split.

    Args:
        path: of the file; of several, of the first.

    Raises:
        CheckpointError: a file is no GGUF file, malformed, or one of several is missing.
        UnsupportedModel: the model is of an architecture that pace doesn't read from GGUF files.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files = _read_all(path)
        self._metadata = self._files[0].metadata
        tensors = [tensor for file in self._files for tensor in file.tensors]
        facts = Facts(
            self._metadata,
            {tensor.name: tensor.shape for tensor in tensors},
            {tensor.name: tensor.type.name for tensor in tensors},
            lambda name: read_vector(self._files, name),
        )
        self._architecture = facts.architecture
        self._config = self._named(config_of, facts)

    def where(self, name: str) -> str:
        """How messages call a file."""
        return f"{self.path}: {name}"

    def json(self, name: str) -> dict[str, Any] | None:
        """What a JSON file of the folder says; None: the folder would not have it.

        Raises:
            TokenizerError: there is a tokenizer, and it is malformed.
            UnsupportedModel: it is of a kind that pace doesn't read from GGUF files.
        """
        if name == "config.json":
            return self._config
        if "tokenizer.ggml.model" not in self._metadata:
            return None
        if name == "tokenizer.json":
            return self._named(tokenizer_json, self._metadata)
        if name == "tokenizer_config.json":
            return self._named(tokenizer_config, self._metadata)
        if name == "generation_config.json":
            sampling = {
                ours: self._metadata.get(f"general.sampling.{key}") for key, ours in _SAMPLING.items()
            }
            return {"eos_token_id": self._named(end_ids, self._metadata), **sampling}
        return None

    def read(self, name: str, max_bytes: int = MAX_JSON_BYTES) -> bytes | None:
        """The bytes of a file; `max_bytes` is for those that are read from disk. Errors as `json`."""
        values = self.json(name)
        return None if values is None else json.dumps(values, ensure_ascii=False).encode()

    def weight_paths(self) -> list[Path]:
        """The file, or the files that it was split into."""
        return [file.path for file in self._files]

    def tensors(self) -> GgufTensors:
        """The tensors; closing them closes the file."""
        heads = self._config.get("num_attention_heads")
        kv_heads = self._config.get("num_key_value_heads", heads)
        return GgufTensors(self._files, self._architecture, heads, kv_heads)

    def _named(self, call: Callable[[A], B], argument: A) -> B:
        """Call, with the file's name before an error's message."""
        try:
            return call(argument)
        except PaceError as error:
            raise type(error)(f"{self.path}: {error}") from None


def _read_all(path: Path) -> list[GgufFile]:
    """The file and those that it was split into.

    Raises:
        CheckpointError: see `GgufModel`.
    """
    files = [read_header(path)]
    try:
        metadata = files[0].metadata
        count, number = metadata.get("split.count", 1), metadata.get("split.no", 0)
        if count in (0, 1):
            return files
        name = _SPLIT.fullmatch(path.name)
        if type(count) is not int or not 1 < count <= MAX_SPLITS:
            raise CheckpointError(
                f"{path}: split.count is {show(count)}, expected a number up to {MAX_SPLITS}"
            )
        if name is None or int(name["count"]) != count:
            raise CheckpointError(
                f"{path}: is one of {count} files, whose names must end in -00001-of-{count:05}.gguf and so on"
            )
        first = f"{name['stem']}-00001-of-{count:05}.gguf"
        if number != 0:
            raise CheckpointError(f"{path}: is part {show(number)} of {count}; give the first, {first}")
        for i in range(2, count + 1):
            part = checkpoint_file(path.parent, f"{name['stem']}-{i:05}-of-{count:05}.gguf")
            if part is None:
                raise CheckpointError(f"{path}: is one of {count} files, and part {i} is not beside it")
            files.append(read_header(part))
        total = metadata.get("split.tensors.count")
        held = sum(len(file.tensors) for file in files)
        if total is not None and total != held:
            raise CheckpointError(
                f"{path}: split.tensors.count is {show(total)}, and the files hold {held} tensors"
            )
    except BaseException:
        for file in files:
            file.data.close()
        raise
    return files
