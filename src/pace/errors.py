"""The errors that pace raises: every one is a `PaceError` and every message is one printable line.

Messages quote file names, JSON keys and template text that came from outside, so `PaceError` folds white
space, escapes what a terminal would interpret and cuts at `MAX_MESSAGE_LEN` characters: a log line can't be
forged and a 16 MiB tensor name can't fill a disk.
"""

from __future__ import annotations

from typing import Any

__all__ = [
    "CapacityError",
    "ChatTemplateError",
    "CheckpointError",
    "ConfigError",
    "EngineDeadError",
    "ForkError",
    "PaceError",
    "PromptTooLongError",
    "QueueFullError",
    "RequestError",
    "TokenizerError",
    "UnsupportedModel",
    "WeightsError",
    "one_line",
    "show",
]

MAX_MESSAGE_LEN = 1000
MAX_SHOWN_DEPTH = 2  # containers inside containers that `show` opens


def one_line(text: object, max_len: int = MAX_MESSAGE_LEN) -> str:
    """Fold `text` into one printable line of at most `max_len` characters."""
    line = str(text)
    # 8x leaves room for the white space that folding removes and bounds the work on huge texts.
    line = " ".join(line[: 8 * max_len].split())
    if len(line) > max_len:
        line = line[: max_len - 3] + "..."
    # Lone surrogates and control characters would break or steer a terminal or a log file.
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in line)


def show(value: object, max_len: int = 80) -> str:
    """Quote an untrusted `value` for an error message: a short repr; of a container, its first elements."""
    return one_line(_quote(value, max_len), max_len + 8)


def _quote(value: object, max_len: int, depth: int = 0) -> str:
    kind = type(value).__name__
    if isinstance(value, (dict, list, tuple, set, frozenset)) and value:
        return f"a {kind} of {len(value)}" if depth == MAX_SHOWN_DEPTH else _quote_few(value, max_len, depth)
    if isinstance(value, (str, bytes)) and len(value) > max_len:
        return repr(value[: max_len - 3]) + "..."
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"  # its repr is quadratic, and refused by Python
    try:
        return repr(value)
    except Exception:  # of somebody else's class
        return f"a {kind}"


def _quote_few(
    values: dict[Any, Any] | list[Any] | tuple[Any, ...] | set[Any] | frozenset[Any], max_len: int, depth: int
) -> str:
    """As many of the first elements as fit, and how many more there are."""
    left, right = "[]" if isinstance(values, list) else "()" if isinstance(values, tuple) else "{}"
    parts: list[str] = []
    room = max_len - 16  # brackets and the count of the rest
    for key in values:
        part = _quote(key, max_len // 2, depth + 1)
        if isinstance(values, dict):
            part += f": {_quote(values[key], max_len // 2, depth + 1)}"
        room -= len(part) + 2
        if parts and room < 0:
            return f"{left}{', '.join(parts)}, ... {len(values) - len(parts)} more{right}"
        parts.append(part)
    comma = "," if len(parts) == 1 and left == "(" else ""
    return f"{left}{', '.join(parts)}{comma}{right}"


class PaceError(Exception):
    """Base of all errors of pace; `str()` of it is one printable line."""

    def __init__(self, message: object = "") -> None:
        super().__init__(one_line(message))


class ConfigError(PaceError, ValueError):
    """An engine option or a `PACE_*` environment variable has a value that can't be used."""


class CheckpointError(PaceError):
    """A model's files are missing, malformed or contradict each other."""


class WeightsError(CheckpointError):
    """A tensor is missing, unexpected, or has the wrong shape or dtype for the model's config."""


class UnsupportedModel(CheckpointError):
    """The checkpoint is well formed, but pace doesn't implement this architecture or one of its options."""


class TokenizerError(CheckpointError):
    """`tokenizer.json` or `tokenizer_config.json` can't be used, or is refused by the load-time audit."""


class ChatTemplateError(PaceError):
    """The chat template is missing, malformed, failed while rendering, or exceeded its budget."""


class RequestError(PaceError, ValueError):
    """A prompt, a message list or a sampling parameter of one request is invalid; other requests are
    unaffected."""


class PromptTooLongError(RequestError):
    """A prompt has more text or tokens than max_model_len leaves room for."""


class CapacityError(PaceError):
    """A request or an engine needs more memory, tokens or sequences than it was given; names the option to
    raise."""


class ForkError(PaceError, RuntimeError):
    """An engine was used in a forked child, where its threads don't exist; build the engine in the child."""


class QueueFullError(PaceError):
    """As many requests wait as `max_num_waiting` allows; try again later."""


class EngineDeadError(PaceError, RuntimeError):
    """The engine has stopped for good, after a fault that no request can be blamed for."""
