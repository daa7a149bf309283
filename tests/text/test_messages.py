"""Conversations are checked for what no template can take, and rebuilt of plain JSON."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from types import MappingProxyType
from typing import Any

import pytest

from pace.errors import RequestError
from pace.text.messages import check_messages, check_tools, n_nodes_and_chars


@pytest.mark.parametrize(
    ("messages", "word"),
    [
        ([], "empty"),
        ("hi", "messages"),
        (None, "messages"),
        ([1], r"messages\[0\]"),
        ([{"content": "x"}], "role"),
        ([{"role": "", "content": "x"}], "role"),
        ([{"role": ["user"], "content": "x"}], "role"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": "file:///etc/passwd"}]}],
            "image_url",
        ),
        ([{"role": "user", "content": [{"type": "input_audio"}]}], "only text"),
        ([{"role": "user", "content": [{"type": "text", "text": 1}]}], "text"),
        ([{"role": "user", "content": "x", "extra": object()}], "JSON"),
        ([{"role": "user", "content": b"x"}], "JSON"),
        ([{"role": "user", "content": "x", "extra": float("nan")}], "JSON"),
        ([{"role": "user", "content": "x", "extra": {1: 2}}], "key"),
        ([{"role": "user", "content": "x"}] * 10_001, "10001"),
    ],
)
def test_bad_messages(messages: Any, word: str) -> None:
    with pytest.raises(RequestError, match=word) as error:
        check_messages(messages)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


@pytest.mark.parametrize("tools", ["f", {"type": "function"}, [1], [{"f": object()}], [{1: 2}]])
def test_bad_tools(tools: Any) -> None:
    with pytest.raises(RequestError, match="tools"):
        check_tools(tools)


def test_deep_nesting_is_refused() -> None:
    value: Any = "x"
    for _ in range(100):
        value = [value]
    with pytest.raises(RequestError, match="nested"):
        check_messages([{"role": "user", "content": "x", "extra": value}])


def test_too_many_values_are_refused() -> None:
    with pytest.raises(RequestError, match="values"):
        n_nodes_and_chars([[0] * 1000] * 1001)
    assert n_nodes_and_chars([{"a": "bc", "d": ["e", 1]}], None) == (7, 3)


def test_text_parts_are_joined_where_the_template_wants_one_text() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b", "cache_control": {}}, "c"]
    message = {"role": "user", "content": parts}
    assert check_messages([message]) == [{"role": "user", "content": "a\nb\nc"}]
    assert check_messages([message], keep_parts=True) == [message]


def test_values_are_rebuilt_of_plain_types() -> None:
    class Role(str, Enum):
        USER = "user"

    class Text(str):
        def leak(self) -> str:
            return "leaked"

    message: Mapping[str, Any] = MappingProxyType(
        {"role": Role.USER, "content": Text("x"), "n": (1, 2.5, True, None)}
    )
    (plain,) = check_messages([message])
    assert plain == {"role": "user", "content": "x", "n": [1, 2.5, True, None]}
    assert type(plain["role"]) is type(plain["content"]) is str
