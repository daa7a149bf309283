"""What a throughput benchmark asks for: random prompts, or those of a JSONL file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pace.errors import RequestError, show

__all__ = ["BenchRequest", "Shape", "random_requests", "random_shapes", "read_jsonl"]


@dataclass(frozen=True)
class BenchRequest:
    """One request: text or token ids, and how many tokens to generate."""

    prompt: str | list[int]
    output_len: int


@dataclass(frozen=True)
class Shape:
    """Lengths of one random request, in tokens; the prompt has prefix_len + input_len."""

    prefix_len: int
    input_len: int
    output_len: int


def random_shapes(
    n: int, input_len: int, output_len: int, *, prefix_len: int = 0, range_ratio: float = 0.0, seed: int = 0
) -> list[Shape]:
    """Lengths of n requests.

    Args:
        range_ratio: lengths are drawn uniformly from len x (1 - range_ratio) to len x (1 + range_ratio).

    Raises:
        RequestError: range_ratio is not in [0, 1).
    """
    if not 0 <= range_ratio < 1:
        raise RequestError(f"random_range_ratio is {range_ratio}, expected 0 to below 1")
    rng = np.random.default_rng(seed)

    def draw(length: int) -> list[int]:
        low, high = int(length * (1 - range_ratio)), int(np.ceil(length * (1 + range_ratio)))
        return [max(1, int(value)) for value in rng.integers(low, high + 1, n)]

    return [
        Shape(prefix_len, i, o) for i, o in zip(draw(input_len), draw(output_len), strict=True)
    ]  # prefixes are all of one length: they are all the same tokens


def random_requests(shapes: list[Shape], vocab_size: int, seed: int = 0) -> list[BenchRequest]:
    """Uniformly random token ids of these lengths; the prefix is common to all requests."""
    rng = np.random.default_rng((seed, 1))
    prefix = rng.integers(0, vocab_size, max((s.prefix_len for s in shapes), default=0)).tolist()
    return [
        BenchRequest(
            prefix[: shape.prefix_len] + rng.integers(0, vocab_size, shape.input_len).tolist(),
            shape.output_len,
        )
        for shape in shapes
    ]


def read_jsonl(path: str, limit: int | None = None, output_len: int | None = None) -> list[BenchRequest]:
    """Requests of a file with one JSON object per line: "prompt" (text) or "prompt_token_ids", and "max_tokens" or
    "output_len".

    Args:
        limit: read so many requests; None: all.
        output_len: what counts instead of the lines' own lengths; None: theirs.

    Raises:
        RequestError: the file can't be read, or a line is none of these; the message names the line.
    """
    requests: list[BenchRequest] = []
    try:
        with Path(path).open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if limit is not None and len(requests) == limit:
                    break
                if line.strip():
                    requests.append(_parse(line, f"{path}:{number}", output_len))
    except OSError as error:
        raise RequestError(f"{path}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise RequestError(f"{path}: not UTF-8 at byte {error.start}") from None
    if not requests:
        raise RequestError(f"{path}: holds no requests; expected one JSON object per line")
    if limit is not None and len(requests) < limit:
        raise RequestError(f"{path}: holds {len(requests)} requests, expected {limit}; lower --num-prompts")
    return requests


def _parse(line: str, where: str, output_len: int | None) -> BenchRequest:
    try:
        values: Any = json.loads(line)
    except ValueError as error:
        raise RequestError(f"{where}: not JSON: {error}") from None
    if not isinstance(values, dict):
        raise RequestError(f"{where}: {show(values)}, expected an object with prompt or prompt_token_ids")
    prompt = values.get("prompt_token_ids", values.get("prompt"))
    is_ids = isinstance(prompt, list) and all(type(token) is int for token in prompt)
    if not (is_ids or isinstance(prompt, str)) or not prompt:
        raise RequestError(
            f"{where}: the prompt is {show(prompt)}, expected text in prompt or a list of integers in prompt_token_ids"
        )
    length = output_len if output_len is not None else values.get("max_tokens", values.get("output_len"))
    if type(length) is not int or length < 1:
        raise RequestError(
            f"{where}: max_tokens is {show(length)}, expected a positive integer, here or in --output-len"
        )
    return BenchRequest(prompt, length)
