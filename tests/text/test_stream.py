"""Tokens in, text that may be shown out."""

from __future__ import annotations

from pace.text.stream import TextStream
from pace.text.tokenizer import Tokenizer


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
