"""API keys: who may ask, and how much at once."""

from __future__ import annotations

import hashlib
import hmac
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from pace.errors import ConfigError
from pace.server.protocol.errors import ApiError

__all__ = ["Keys", "read_keys"]


def read_keys(path: str) -> list[str]:
    """The keys in a file, one a line; empty lines and those that begin with # are none.

    Raises:
        ConfigError: it can't be read, or holds none.
    """
    try:
        lines = [line.strip() for line in Path(path).read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: the API keys can't be read: {error}") from None
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise ConfigError(f"{path}: no API key in it, expected one a line")
    return keys


class Keys:
    """Checks keys in a time that does not depend on them, and counts what each has open.

    Args:
        keys: all that are valid; none: everybody may ask.
        max_open: requests that one key (or everybody, where there are no keys) may have open; None: any number.
    """

    def __init__(self, keys: Sequence[str] = (), max_open: int | None = None) -> None:
        if any(not key for key in keys):
            raise ConfigError("an API key is empty, expected some text")
        if any(not key.isprintable() or key != key.strip() for key in keys):
            raise ConfigError(
                "an API key has control characters, or white space at an end; no header can carry it"
            )
        self._digests = [_digest(key.encode()) for key in keys]
        self._max_open = max_open
        self._open: Counter[int] = Counter()

    def check(self, headers: Sequence[tuple[bytes, bytes]]) -> int:
        """The number of the key that a request brings, 0 where none is needed.

        Raises:
            ApiError: none, or a wrong one.
        """
        if not self._digests:
            return 0
        given = b""
        for name, value in headers:
            if name == b"x-api-key":
                given = value
            elif name == b"authorization" and value[:7].lower() == b"bearer ":
                given = value[7:].strip()
        digest = _digest(given)
        found = -1
        for number, known in enumerate(self._digests):  # all of them, whichever it is
            if hmac.compare_digest(digest, known):
                found = number
        if found < 0:
            raise ApiError(
                401,
                "the API key is missing or wrong; send it as Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
        return found

    def open(self, number: int) -> None:
        """A request of a key begins.

        Raises:
            ApiError: it has too many open.
        """
        if self._max_open is not None and self._open[number] >= self._max_open:
            raise ApiError(
                429,
                f"{self._max_open} requests of this key are open, its limit; wait for one to end",
                code="too_many_requests",
            )
        self._open[number] += 1

    def close(self, number: int) -> None:
        """It has ended."""
        self._open[number] -= 1


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
