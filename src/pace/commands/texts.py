"""Texts that commands take from files: plain ones, or JSONL."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pace.errors import RequestError, show

__all__ = ["read_jsonl", "read_texts"]


def read_texts(path: str) -> list[str]:
    """The texts of a file, every byte of them.

    Raises:
        RequestError: it can't be read, is not UTF-8, or has a line that is no {"text": TEXT}; the message names the line.
    """
    return read_jsonl(path, ("text",)) if path.endswith(".jsonl") else [_read(path)]


def _read(path: str) -> str:
    try:
        return Path(path).read_bytes().decode("utf-8")
    except OSError as error:
        raise RequestError(f"{path}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise RequestError(f"{path}: not UTF-8 at byte {error.start}") from None


def read_jsonl(path: str, keys: Sequence[str], limit: int | None = None) -> list[str]:
    """The text of each line, under the first of these keys that it has; at most `limit` lines.

    Raises:
        RequestError: as `read_texts`, or there is no line.
    """
    texts: list[str] = []
    for number, line in enumerate(_read(path).split("\n"), 1):
        if limit is not None and len(texts) == limit:
            break
        if not line.strip():
            continue
        try:
            values: Any = json.loads(line)
        except ValueError as error:
            raise RequestError(f"{path}:{number}: not JSON: {error}") from None
        found = [values[key] for key in keys if key in values] if isinstance(values, dict) else []
        if not found or not isinstance(found[0], str):
            expected = " or ".join(f'{{"{key}": TEXT}}' for key in keys)
            raise RequestError(f"{path}:{number}: {show(values)}, expected {expected}")
        texts.append(found[0])
    if not texts:
        raise RequestError(f"{path}: holds no texts; expected one JSON object per line")
    return texts
