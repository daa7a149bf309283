"""What an output must be like: a JSON schema, a regular expression, one of some texts, a grammar."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from pace.errors import RequestError, show

__all__ = ["MAX_GRAMMAR", "StructuredOutputsParams"]

MAX_GRAMMAR = 1 << 17  # characters of a schema, expression or grammar, and of all choices together
MAX_CHOICES = 1000


@dataclass(frozen=True)
class StructuredOutputsParams:
    """What an output must be like, with vLLM's names; exactly one field is given.

    Args:
        json: a JSON schema, as a mapping or JSON text. Afterwards it is text.
        json_object: True: any JSON object.
        regex: a regular expression that the whole output matches; Rust's syntax, without look-around.
        choice: the output is one of these texts.
        grammar: a context-free grammar in llguidance's form of Lark, or in GBNF.

    Raises:
        RequestError: none or several are given, or one has a wrong form or is too long.
    """

    json: str | Mapping[str, Any] | bool | None = None
    json_object: bool | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None

    def __post_init__(self) -> None:
        if self.json_object is False:
            object.__setattr__(self, "json_object", None)
        given = [f.name for f in fields(self) if getattr(self, f.name) is not None]
        if len(given) != 1:
            raise RequestError(
                f"structured_outputs has {', '.join(given) or 'nothing'}, expected exactly one of json, json_object, "
                "regex, choice and grammar"
            )
        (name,) = given
        value = getattr(self, name)
        if name == "json":
            object.__setattr__(self, "json", _schema(value))
        elif name == "choice":
            object.__setattr__(self, "choice", _choices(value))
        elif name == "json_object":
            if value is not True:
                raise RequestError(f"structured_outputs.json_object is {show(value)}, expected True")
        elif not isinstance(value, str) or not value:
            raise RequestError(f"structured_outputs.{name} is {show(value)}, expected a text")
        _check_length(name, getattr(self, name))

    @staticmethod
    def parse(value: object) -> StructuredOutputsParams | None:
        """An instance, or what a mapping of its fields says; None stays None.

        Raises:
            RequestError: neither, an unknown field, or as the constructor.
        """
        if value is None or isinstance(value, StructuredOutputsParams):
            return value
        if not isinstance(value, Mapping):
            raise RequestError(
                f"structured_outputs is {show(value)}, expected StructuredOutputsParams or a mapping"
            )
        names = [f.name for f in fields(StructuredOutputsParams)]
        unknown = [name for name in value if name not in names]
        if unknown:
            raise RequestError(
                f"structured_outputs has {show(unknown[0])}, expected one of {', '.join(names)}"
            )
        return StructuredOutputsParams(**value)


def _schema(value: object) -> str:
    """A JSON schema as text."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"structured_outputs.json is no JSON: {error}") from None
    if not isinstance(value, (Mapping, bool)):
        raise RequestError(f"structured_outputs.json is {show(value)}, expected a JSON schema")
    try:
        return json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"structured_outputs.json is no JSON: {error}") from None


def _choices(value: object) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)) or not 0 < len(value) <= MAX_CHOICES:
        raise RequestError(
            f"structured_outputs.choice is {show(value)}, expected a list of 1 to {MAX_CHOICES} texts"
        )
    for choice in value:
        if not isinstance(choice, str) or not choice:
            raise RequestError(f"structured_outputs.choice has {show(choice)}, expected texts")
    return tuple(value)


def _check_length(name: str, value: object) -> None:
    length = sum(map(len, value)) if isinstance(value, tuple) else len(value) if isinstance(value, str) else 0
    if length > MAX_GRAMMAR:
        raise RequestError(
            f"structured_outputs.{name} has {length} characters, expected at most {MAX_GRAMMAR}"
        )
