"""The errors that pace raises: every one is a `PaceError` and every message is one printable line.

Messages quote file names, JSON keys and template text that came from outside, so `PaceError` folds white
space, escapes what a terminal would interpret and cuts at `MAX_MESSAGE_LEN` characters: a log line can't be
forged and a 16 MiB tensor name can't fill a disk.
"""

from __future__ import annotations

__all__ = [
    "CapacityError",
    "ChatTemplateError",
    "CheckpointError",
    "ConfigError",
    "EngineDeadError",
    "ForkError",
    "PaceError",
    "QueueFullError",
    "RequestError",
    "TokenizerError",
    "UnsupportedModel",
    "WeightsError",
    "one_line",
    "show",
]

MAX_MESSAGE_LEN = 1000


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
    """Quote an untrusted `value` for an error message: its type where it is a container, else a short
    repr."""
    if isinstance(value, (dict, list, tuple, set, frozenset)) and value:
        text = f"a {type(value).__name__} of {len(value)}"
    elif isinstance(value, (str, bytes)) and len(value) > max_len:
        text = repr(value[: max_len - 3]) + "..."
    elif (
        isinstance(value, int) and value.bit_length() > 128
    ):  # repr of huge ints is quadratic, and refused by Python
        text = f"an integer of {value.bit_length()} bits"
    else:
        text = repr(value)
    return one_line(text, max_len + 8)


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


class CapacityError(PaceError):
    """A request or an engine needs more memory, tokens or sequences than it was given; names the option to
    raise."""


class ForkError(PaceError, RuntimeError):
    """An engine was used in a forked child, where its threads don't exist; build the engine in the child."""


class QueueFullError(PaceError):
    """As many requests wait as `max_num_waiting` allows; try again later."""


class EngineDeadError(PaceError, RuntimeError):
    """The engine has stopped for good, after a fault that no request can be blamed for."""
