"""What each token adds to the text, as log probabilities tell it: no half characters."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from text.kit import CORPUS, byte_fallback, load, save, stream, token_ids
from tokenizers import AddedToken

from pace.text.detokenizer import IncrementalDetokenizer
from pace.text.tokenizer import MAX_CHAR_TOKENS, Tokenizer


def told(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    return [tokenizer.decode_next([token], ids[max(0, i - 3) : i])[0] for i, token in enumerate(ids)]


def test_a_split_character_belongs_to_the_token_that_completes_it(gpt: Tokenizer, llama: Tokenizer) -> None:
    ids = gpt.encode("a\U0001f9ff\U0001f9ffb", add_special_tokens=False)
    texts = told(gpt, ids)
    assert len(ids) > 4 and "".join(texts) == "a\U0001f9ff\U0001f9ffb"
    assert set(texts) == {"a", "", "\U0001f9ff", "b"}
    ids = token_ids(llama, "brown", *(f"<0x{byte:02X}>" for byte in "好你".encode()), "e")
    assert told(llama, ids) == ["brown", "", "", "好", "", "", "你", "e"]


def test_texts_joined_are_the_text(gpt: Tokenizer) -> None:
    rng = random.Random(0)
    n_tokens = gpt._rust.get_vocab_size()
    cases = [gpt.encode(text, add_special_tokens=False) for text in CORPUS]
    cases += [[rng.randrange(3, n_tokens) for _ in range(60)] for _ in range(50)]  # mostly invalid UTF-8
    for ids in cases:
        whole = stream(IncrementalDetokenizer(gpt), ids)
        joined = "".join(told(gpt, ids))
        assert whole in (joined, joined + "\ufffd")  # an incomplete end belongs to no token


def test_alternatives_are_told_apart(gpt: Tokenizer, llama: Tokenizer) -> None:
    e, acute, other = token_ids(gpt, "Ã", "©", "a")
    assert gpt.decode_next([acute, other, e], [e]) == ["é", "\ufffda", "\ufffd"]
    assert gpt.decode_next([acute, other, e]) == ["\ufffd", "a", ""]
    first, second, word = token_ids(llama, "<0xC3>", "<0xA9>", "brown")
    assert llama.decode_next([second, word, first], [first]) == ["é", "brown", ""]
    assert llama.decode_next([second, word, first], [word]) == ["", "brown", ""]


def test_a_special_token_is_no_part_of_a_character(gpt: Tokenizer, llama: Tokenizer) -> None:
    first, second = token_ids(gpt, "Ã", "©")
    assert told(gpt, [first, 1, second]) == ["", "</s>", "é"]  # as the text without special tokens has it
    first, second = token_ids(llama, "<0xC3>", "<0xA9>")
    assert told(llama, [first, 1, second]) == ["", "</s>", "é"]


def test_a_token_that_is_a_replacement_character_is_itself(tmp_path: Path) -> None:
    rust = byte_fallback()
    rust.add_tokens([AddedToken("\ufffd", special=False)])
    tokenizer = load(save(tmp_path, rust))
    assert tokenizer.decode_next(token_ids(tokenizer, "\ufffd")) == ["\ufffd"]


@pytest.mark.parametrize("n", [0, 1, MAX_CHAR_TOKENS, 50])
def test_more_context_changes_nothing(gpt: Tokenizer, n: int) -> None:
    before = gpt.encode(CORPUS[2], add_special_tokens=False)[:n]
    for token in range(gpt._rust.get_vocab_size()):
        assert gpt.decode_next([token], before) == gpt.decode_next([token], before[-MAX_CHAR_TOKENS:])
