"""The scanner takes what json.loads takes, and nothing else."""

from __future__ import annotations

import json
import random

import pytest

from pace.text.json_scanner import MAX_DEPTH, JsonScanner, is_object, quoted


def scan(text: str) -> bool:
    scanner = JsonScanner()
    n_read, _ = scanner.feed(text)
    return scanner.done and n_read == len(text)


def valid(text: str) -> bool:
    def refuse(constant: str) -> None:
        raise ValueError(constant)

    try:
        json.loads(text, parse_constant=refuse)
    except ValueError:
        return False
    return True


def test_the_same_as_json() -> None:
    rng = random.Random(0)
    alphabet = [
        '"',
        '"',
        "\\",
        "{",
        "}",
        "[",
        "]",
        ",",
        ":",
        "1",
        "-",
        "0",
        ".",
        "e",
        "true",
        "nul",
        "null",
        " ",
        "u00e9",
        "é",
    ]
    n_valid = 0
    for _ in range(20_000):
        inner = "".join(rng.choice(alphabet) for _ in range(rng.randrange(7)))
        text = rng.choice(["{%s}", "[%s]", '"%s"', '{"a":%s}', '["a",%s]']) % inner
        assert scan(text) == valid(text), text
        n_valid += valid(text)
    assert n_valid > 500


@pytest.mark.parametrize("text", ["0", "-1.5e+3", "1E5", "true"])
def test_a_word_ends_with_what_follows(text: str) -> None:
    scanner = JsonScanner()
    assert scanner.feed(text) == (len(text), text) and not scanner.done
    assert scanner.feed("]") == (0, "") and scanner.done


def test_limits_and_control_characters() -> None:
    assert scan("[" * MAX_DEPTH + "]" * MAX_DEPTH)
    assert not scan("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1))
    assert not scan("[" + "1" * 2000 + "]")
    assert JsonScanner().feed('["a\tb\n"]')[1] == '["a\\u0009b\\u000a"]'
    assert is_object(' {"a": []}\n') and not is_object("[]") and not is_object("{} x") and not is_object("")


def test_quoted_is_unicode() -> None:
    assert quoted('é"') == '"é\\""' and quoted("\ud800é") == '"\\ud800\\u00e9"'
