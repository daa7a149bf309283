"""Tokens in, text that may be shown out."""

from __future__ import annotations

from pathlib import Path

from text.kit import byte_level, load, save

from pace.text.readers import Reader
from pace.text.reasoning import find_reader
from pace.text.stream import TextStream
from pace.text.tokenizer import Tokenizer
from pace.text.tools import make_call_reader


def test_text_stream(gpt: Tokenizer) -> None:
    ids = gpt.encode("The quick brown fox jumps", add_special_tokens=False)
    texts = TextStream(gpt, stop=["fox"])
    shown = ""
    for token_id in ids:
        shown += texts.push(token_id)
        assert texts.text == shown
        if texts.matched:
            break
    assert shown + texts.finish() == texts.text == "The quick brown "
    assert texts.matched == "fox"

    texts = TextStream(gpt, stop=["fox"], include_stop_str_in_output=True)
    shown = "".join(map(texts.push, ids))
    assert shown == texts.text == "The quick brown fox"

    texts = TextStream(gpt)
    assert texts.extend(ids) + texts.finish() == texts.text == "The quick brown fox jumps"

    texts = TextStream(gpt, stop=["jumpsuit"])
    assert "".join(map(texts.push, ids)) + texts.finish() == "The quick brown fox jumps"
    assert texts.matched is None


def test_finish_can_complete_a_stop_string(gpt: Tokenizer) -> None:
    ids = gpt.encode("\U0001f9ff", add_special_tokens=False)[:2]
    texts = TextStream(gpt, stop=["\ufffd"])
    assert [texts.push(token_id) for token_id in ids] == ["", ""]
    assert texts.finish() == "" and texts.matched == "\ufffd"


# ---- divided by a reader


def reader(template: str = "</think>") -> Reader:
    make = find_reader(template, "")
    assert make is not None
    return make()


def test_a_stop_string_inside_reasoning_ends_nothing(gpt: Tokenizer) -> None:
    ids = gpt.encode("<think>The quick fox</think>The brown fox jumps", add_special_tokens=False)
    texts = TextStream(gpt, stop=["fox"], reader=reader())
    for token_id in ids:
        texts.push(token_id)
        if texts.matched:
            break
    assert texts.text == "The brown " and texts.reasoning == "The quick fox" and texts.matched == "fox"


def test_a_stop_string_does_not_reach_over_a_marker(gpt: Tokenizer) -> None:
    ids = gpt.encode("<think>a</think>b", add_special_tokens=False)
    texts = TextStream(gpt, stop=["ab"], reader=reader())
    assert texts.extend(ids) + texts.finish() == "b" and texts.reasoning == "a" and texts.matched is None


def test_markers_that_are_special_tokens_are_read_and_others_skipped(tmp_path: Path) -> None:
    """They leaked, or the text ran together, where the reader saw only what is shown."""
    rust = byte_level()
    rust.add_special_tokens(["<|channel>", "<channel|>", "<think>", "</think>", "<turn|>"])
    tokenizer = load(save(tmp_path, rust))
    for template, text in (
        ("<channel|>", "<|channel>thought\nWhy?<channel|>So<turn|>."),
        ("</think>", "<think>\nWhy?\n</think>\n\nSo<turn|>."),
    ):
        ids = tokenizer.encode(text, add_special_tokens=False)
        texts = TextStream(tokenizer, reader=reader(template))
        shown = "".join(map(texts.push, ids)) + texts.finish()
        assert shown == texts.text == "So." and texts.reasoning == "Why?"
        assert TextStream(tokenizer).extend(ids) != shown  # without a reader all that isn't special is text


def test_an_unfinished_thought_is_reasoning(gpt: Tokenizer) -> None:
    texts = TextStream(gpt, reader=reader())
    assert texts.extend(gpt.encode("<think>The quick", add_special_tokens=False)) + texts.finish() == ""
    assert texts.reasoning == "The quick"
    assert TextStream(gpt, reader=reader()).reasoning is None


def test_calls_are_put_aside_and_have_names_of_their_own(gpt: Tokenizer) -> None:
    text = 'So <tool_call>{"name": "f", "arguments": {"a": "the"}}</tool_call> <tool_call>{"name": "f"}</tool_call>'
    texts = TextStream(gpt, stop=["the"], reader=make_call_reader("hermes", {"f": {}})())
    shown = "".join(map(texts.push, gpt.encode(text, add_special_tokens=False))) + texts.finish()
    assert shown == texts.text == "So" and texts.matched is None  # a stop string in arguments ends nothing
    first, second = texts.calls
    assert (first.index, first.name, first.arguments) == (0, "f", '{"a": "the"}')
    assert (second.index, second.name, second.arguments) == (1, "f", "{}")
    assert first.id != second.id and len(first.id) == 9 and first.id.isalnum()
    assert [call.id for call in texts.calls] == [first.id, second.id]
