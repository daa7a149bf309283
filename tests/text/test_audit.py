"""What is unusual in a tokenizer.json is named before the library sees the file, wherever it hides."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import tokenizers
from text.kit import byte_fallback, byte_level, regex_split, replace_twice
from tokenizers import Regex, decoders, models, normalizers

from pace.text.audit import doubts


def setter(part: str, value: Any) -> Callable[[tokenizers.Tokenizer], None]:
    return lambda rust: setattr(rust, part, value)


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("build", [byte_level, byte_fallback])
def test_ordinary_files_raise_no_doubt(build: Callable[[], tokenizers.Tokenizer], indent: int | None) -> None:
    """However they were written: a start that pays for a child process is for unusual files only."""
    text = build().to_str()
    assert doubts(text.encode()) == []
    assert doubts(json.dumps(json.loads(text), indent=indent).encode()) == []  # escapes what isn't ASCII


def test_a_file_may_leave_out_the_models_type() -> None:
    """As GPT-2's does, and those of models that took it over: they are as ordinary as it gets."""
    text = byte_level().to_str()
    old = text.replace('"type":"BPE",', "", 1)
    assert old != text and doubts(old.encode()) == []
    assert tokenizers.Tokenizer.from_str(old).encode("abc").ids == byte_level().encode("abc").ids


def test_words_like_keys_are_tokens() -> None:
    words = ["model", "decoder", "type", "normalizer", "vocab", "added_tokens"]
    vocab = {word: i for i, word in enumerate([*"abcdefghijklmnopqrstuvwxyz_", *words])}
    rust = tokenizers.Tokenizer(models.BPE(vocab, []))
    assert doubts(rust.to_str().encode()) == []


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (regex_split("(a|aa)+$"), "pre_tokenizer Split with the pattern"),
        (
            setter("normalizer", normalizers.Replace(Regex("(a+)+$"), "b")),
            "normalizer Replace with the pattern",
        ),
        (setter("normalizer", normalizers.Replace("", "b")), "lengthen"),
        (setter("normalizer", normalizers.Prepend("x" * 10**4)), "lengthen"),
        (setter("normalizer", normalizers.Replace("a", "b" * 1000)), "lengthen"),
        (replace_twice(40), "lengthen"),
        (setter("decoder", decoders.Replace(Regex("(a+)+$"), "b")), "decoder Replace with the pattern"),
        (setter("decoder", decoders.Sequence([decoders.Replace("a", "b" * 1000)])), "lengthen"),
        (setter("model", models.BPE(continuing_subword_prefix="##")), "continuing_subword_prefix"),
        (setter("model", models.WordLevel({"a": 0}, unk_token="a")), "WordLevel"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_unusual_components_are_named(edit: Callable[[tokenizers.Tokenizer], None], words: str) -> None:
    rust = byte_level()
    edit(rust)
    (doubt,) = doubts(rust.to_str().encode())
    assert words in doubt and len(doubt) < 200


@pytest.mark.parametrize("replacements", [1, 4])
def test_bounded_growth_raises_no_doubt(replacements: int) -> None:
    rust = byte_level()
    replace_twice(replacements)(rust)
    assert doubts(rust.to_str().encode()) == []


def hidden(text: str, name: str) -> str:
    """A harmless file with something in it that a reader of its beginning does not see."""
    prefix = '"continuing_subword_prefix": "##"'
    evil = '"normalizer": {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "b"}'
    end = text.rstrip()
    assert end.endswith("]}}")
    return {
        "behind the merges": end[:-2] + f", {prefix}}}}}",
        "escaped": end[:-2] + ', "continuing_subword_prefi\\u0078": "##"}}',
        "behind the model": end[:-1] + f", {evil}}}",
        "twice": text.replace('"normalizer":', '"normalizer": null, "normalizer":', 1),
        "another model": end[:-1] + ', "model": {"type": "WordLevel", "vocab": {}, "unk_token": ""}}',
        "another type": end[:-2] + ', "type": "WordPiece"}}',
        "another key": text.replace('"normalizer":', '"fresh": 1, "normalizer":', 1),
        "vocabulary first": text.replace('"version"', '"model": {"vocab": {}}, "version"', 1),
    }[name]


@pytest.mark.parametrize(
    "name",
    ["behind the merges", "escaped", "behind the model", "twice", "another model", "another type", "another key",
     "vocabulary first"],
)  # fmt: skip
def test_nothing_hides_from_the_audit(name: str) -> None:
    text = byte_level().to_str()
    changed = hidden(text, name)
    assert changed != text and doubts(text.encode()) == []
    assert doubts(changed.encode())


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b'"vocab"', b'\xff"vocab"', b"null"])
def test_what_is_no_tokenizer_is_unusual(data: bytes) -> None:
    assert doubts(data)
