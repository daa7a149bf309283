"""Messages are one printable line, whatever they quote."""

from __future__ import annotations

import pickle

import pytest

from pace import errors
from pace.errors import MAX_MESSAGE_LEN, PaceError, RequestError, one_line, show


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a\nb\r\n  c\t", "a b c"),
        ("red\x1b[31m", "red\\x1b[31m"),
        ("lone \ud800", "lone \\ud800"),
        ("bell\x07", "bell\\x07"),
        ("right-to-left \u202e", "right-to-left \\u202e"),
        ("größe 你好", "größe 你好"),
    ],
)
def test_one_line(text: str, line: str) -> None:
    assert str(PaceError(text)) == line
    line.encode("utf-8")


def test_long_messages_are_cut() -> None:
    assert len(str(PaceError("x" * 10**6))) == MAX_MESSAGE_LEN
    assert one_line("x" * 50, 10) == "xxxxxxx..."


def test_show_is_short_for_anything() -> None:
    huge = 1 << 10**6
    for value in ("a" * 10**6, b"b" * 10**6, list(range(10**5)), {1: huge}, huge, "\n" * 10**4, None, 1.5):
        assert len(show(value)) <= 90
        assert "\n" not in show(value)
    assert show([]) == "[]"
    assert show(huge) == "an integer of 1000001 bits"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ([1.5], "[1.5]"),
        (["x"], "['x']"),
        ((1, "a"), "(1, 'a')"),
        ((1,), "(1,)"),
        ({"a": [None]}, "{'a': [None]}"),
        ({3}, "{3}"),
        ([[1, [2, [3]]]], "[[1, a list of 2]]"),
        (list(range(10, 10**5)), f"[{', '.join(map(str, range(10, 26)))}, ... 99974 more]"),
        (["x" * 200] * 2, "['" + "x" * 37 + "'..., ... 1 more]"),
    ],
)
def test_show_tells_what_a_container_holds(value: object, shown: str) -> None:
    assert show(value) == shown


def test_show_survives_a_broken_repr() -> None:
    class Broken:
        def __repr__(self) -> str:
            raise ZeroDivisionError

    assert show(Broken()) == "a Broken" and show([Broken()]) == "[a Broken]"


def test_hierarchy() -> None:
    for name in errors.__all__:
        kind = getattr(errors, name)
        if isinstance(kind, type):
            assert issubclass(kind, PaceError)
    assert issubclass(errors.ConfigError, ValueError)
    assert issubclass(errors.RequestError, ValueError)
    assert issubclass(errors.ForkError, RuntimeError)
    assert issubclass(errors.WeightsError, errors.CheckpointError)


def test_errors_survive_copying() -> None:
    assert str(pickle.loads(pickle.dumps(RequestError("a\nb")))) == "a b"
