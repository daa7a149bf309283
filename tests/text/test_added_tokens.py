"""Added tokens come back as they are written, whatever the decoder makes of such letters elsewhere."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import tokenizers
from text.kit import byte_fallback, byte_level, load, save, stream, utf8_tokens
from text.kit import token_ids as ids
from tokenizers import AddedToken, decoders, models, normalizers

from pace.text.added_tokens import byte_form
from pace.text.detokenizer import IncrementalDetokenizer
from pace.text.tokenizer import Tokenizer

# Each has characters that stand for something else in a vocabulary: bytes, a space, a byte in hexadecimal.
WORDS = ["čaj", "Ġx", "Ãé", "▁▁a", "<0x41>", "Ŀ▁", "naïve<0xE4>", "ok"]


def with_words(rust: tokenizers.Tokenizer, *, special: bool) -> tokenizers.Tokenizer:
    rust.add_tokens([AddedToken(word, special=special, normalized=False) for word in WORDS])
    return rust


@pytest.fixture(scope="module", params=["byte-level", "byte-fallback"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    rust = byte_level() if request.param == "byte-level" else byte_fallback()
    return load(save(tmp_path_factory.mktemp("added"), with_words(rust, special=False)))


@pytest.mark.parametrize("word", WORDS)
def test_an_added_token_decodes_to_its_own_text(tokenizer: Tokenizer, word: str) -> None:
    token_id = tokenizer.token_to_id(word)
    assert token_id is not None
    assert tokenizer.encode(word, add_special_tokens=False)[-1] == token_id
    assert tokenizer.decode([token_id]) == tokenizer.decode_token(token_id) == word
    assert stream(IncrementalDetokenizer(tokenizer), [token_id]) == word


def test_text_around_added_tokens_is_exact(tokenizer: Tokenizer) -> None:
    """Streaming equals whole, with characters of several tokens and spaces on both sides."""
    rng = random.Random(0)
    added = [[word] for word in WORDS]
    if tokenizer.byte_level:
        pieces = [ids(tokenizer, *word) for word in added] + [
            [token_id] for token_id in tokenizer.encode(" the é你", add_special_tokens=False)
        ]
    else:
        groups = [*added, ["▁the"], ["▁"], *map(utf8_tokens, "é你")]
        pieces = [ids(tokenizer, *group) for group in groups]
    for _ in range(200):
        chosen = [token_id for _ in range(rng.randrange(1, 9)) for token_id in rng.choice(pieces)]
        assert stream(IncrementalDetokenizer(tokenizer), chosen) == tokenizer.decode(chosen)


def test_a_space_before_the_next_word_stays(tokenizer: Tokenizer) -> None:
    the = (
        tokenizer.encode(" the", add_special_tokens=False) if tokenizer.byte_level else ids(tokenizer, "▁the")
    )
    assert tokenizer.decode([*ids(tokenizer, "čaj"), *the]) == "čaj the"


def test_special_ones_are_left_out_or_shown_as_written(tmp_path: Path) -> None:
    tokenizer = load(save(tmp_path, with_words(byte_level(), special=True)))
    ids = tokenizer.encode("a čaj", add_special_tokens=False)
    assert tokenizer.decode(ids) == "a "
    assert tokenizer.decode(ids, skip_special_tokens=False) == "a čaj"
    streamed = IncrementalDetokenizer(tokenizer, skip_special_tokens=False)
    assert stream(streamed, ids) == "a čaj"


def test_words_of_the_model_keep_their_meaning(tmp_path: Path) -> None:
    """Gemma lists "▁▁" among its added tokens, and its merges lead there from two spaces."""
    rust = tokenizers.Tokenizer(models.BPE({"▁": 0, "▁▁": 1, "a": 2}, [("▁", "▁")], byte_fallback=True))
    rust.normalizer = normalizers.Replace(" ", "▁")
    rust.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    rust.add_tokens([AddedToken("▁▁", normalized=False), AddedToken("▁▁▁", normalized=False)])
    tokenizer = load(save(tmp_path, rust))
    ids = tokenizer.encode("a  a")
    assert ids == [2, 1, 2] and tokenizer.decode(ids) == "a  a"
    assert tokenizer.decode(tokenizer.encode("▁▁▁")) == "▁▁▁"


def test_bytes_of_the_model_stay_bytes(gpt: Tokenizer, tmp_path: Path) -> None:
    """A file may list a letter of the byte alphabet as added; "Ã" alone starts every "é"."""
    rust = byte_level()
    rust.add_tokens([AddedToken("Ã", normalized=False)])
    tokenizer = load(save(tmp_path, rust))
    assert tokenizer.decode(gpt.encode("é")) == "é"


def test_bytes_of_characters() -> None:
    assert byte_form("Ġa") == b" a" and byte_form("č") == b"\r" and byte_form("Ã©") == "é".encode()
    assert byte_form("你") is None and byte_form("a b") is None and byte_form("") == b""
