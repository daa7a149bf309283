"""Text comes back exactly, token by token."""

from __future__ import annotations

import random

import pytest
from text.kit import CORPUS, stream, token_ids, utf8_tokens

from pace.text.detokenizer import IncrementalDetokenizer
from pace.text.tokenizer import Tokenizer


@pytest.mark.parametrize("skip", [True, False])
def test_byte_level_stream_equals_the_whole(gpt: Tokenizer, skip: bool) -> None:
    rng = random.Random(0)
    n_tokens = gpt._rust.get_vocab_size()
    for length in (1, 2, 3, 7, 50, 400):
        for _ in range(20):
            ids = [rng.randrange(n_tokens) for _ in range(length)]  # mostly invalid UTF-8
            detokenizer = IncrementalDetokenizer(gpt, skip_special_tokens=skip)
            assert stream(detokenizer, ids) == gpt.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("skip", [True, False])
def test_tokens_may_come_in_any_runs(gpt: Tokenizer, llama: Tokenizer, skip: bool) -> None:
    rng = random.Random(3)
    for tokenizer in (gpt, llama):
        n_tokens = tokenizer._rust.get_vocab_size()
        for length in (1, 7, 60):
            ids = [rng.randrange(n_tokens) for _ in range(length)]
            alone = IncrementalDetokenizer(tokenizer, skip_special_tokens=skip)
            runs = IncrementalDetokenizer(tokenizer, skip_special_tokens=skip)
            text, at = "", 0
            while at < length:
                end = at + rng.randrange(9)
                text += runs.extend(ids[at:end])
                at = end
            assert text + runs.finish() == stream(alone, ids)


def test_characters_are_never_split(gpt: Tokenizer) -> None:
    for text in CORPUS:
        detokenizer = IncrementalDetokenizer(gpt)
        parts = [detokenizer.push(token_id) for token_id in gpt.encode(text)]
        assert "\ufffd" not in "".join(parts)
        assert "".join(parts) == gpt.decode(gpt.encode(text))
        assert detokenizer.finish() == ""


def test_an_incomplete_end_is_marked(gpt: Tokenizer) -> None:
    ids = gpt.encode("\U0001f9ff", add_special_tokens=False)
    assert len(ids) > 2
    detokenizer = IncrementalDetokenizer(gpt)
    assert {detokenizer.push(token_id) for token_id in ids[:-1]} == {""}
    assert detokenizer.finish() == "\ufffd"


def test_unused_ids_have_no_text(gpt: Tokenizer, llama: Tokenizer) -> None:
    for tokenizer in (gpt, llama):
        assert tokenizer.decode([511]) == tokenizer.decode_token(511) == ""
        assert stream(IncrementalDetokenizer(tokenizer), [511, 511, 511, 511, 511, 511, 511]) == ""


def test_byte_fallback_stream_equals_the_whole(llama: Tokenizer) -> None:
    assert not llama.byte_level
    rng = random.Random(1)
    pieces = [["▁the"], ["▁quick"], ["brown"], ["▁"], ["ü"], ["\n"], ["</s>"], *map(utf8_tokens, "你好é👋z")]
    for _ in range(200):
        tokens = [token for _ in range(rng.randrange(1, 12)) for token in rng.choice(pieces)]
        ids = token_ids(llama, *tokens)
        for skip in (True, False):
            detokenizer = IncrementalDetokenizer(llama, skip_special_tokens=skip)
            assert stream(detokenizer, ids) == llama.decode(ids, skip_special_tokens=skip), tokens


def test_leading_space_depends_on_the_prompt(llama: Tokenizer) -> None:
    the, fox, end = token_ids(llama, "▁the", "▁fox", "</s>")
    assert stream(IncrementalDetokenizer(llama), [fox]) == "fox"
    assert stream(IncrementalDetokenizer(llama, [the]), [fox]) == " fox"
    assert stream(IncrementalDetokenizer(llama, [the, end, end]), [fox]) == " fox"
    assert stream(IncrementalDetokenizer(llama), [the, end, fox]) == "the fox"


def test_invalid_bytes_neither_stall_nor_grow(llama: Tokenizer) -> None:
    (byte,) = token_ids(llama, "<0xE4>")
    detokenizer = IncrementalDetokenizer(llama)
    parts = [detokenizer.push(byte) for _ in range(1000)]
    assert len("".join(parts)) >= 990
    assert len(detokenizer._context) + len(detokenizer._pending) <= 10
    rng = random.Random(2)
    for _ in range(50):
        ids = [rng.randrange(llama._rust.get_vocab_size()) for _ in range(60)]
        stream(IncrementalDetokenizer(llama), ids).encode("utf-8")
