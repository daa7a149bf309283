"""Added tokens: they match the text as it is written, and must come back as it was written."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer as RustTokenizer

__all__ = ["ANCHOR", "byte_form", "literal_tokens"]

ANCHOR = "x"
"""A token that every decoder below leaves alone, and that keeps what follows from being the first."""

# Decoders that work on one token, or on neighbouring bytes. The others put spaces between tokens, added ones included.
_WITHOUT_SPACES = frozenset({"ByteLevel", "Metaspace", "ByteFallback", "Fuse", "Strip", "Replace"})


def literal_tokens(rust: RustTokenizer, decoder_kinds: list[str]) -> dict[int, str]:
    """The added tokens that the library's decoder would change: it decodes them as if the model's vocabulary had them.

    To a byte-level decoder every character of "čaj" stands for a byte, so it makes "\\raj" of it; to SentencePiece's,
    "▁" in an added token is a space, and "<0x41>" is "A".

    Args:
        rust: the tokenizer.
        decoder_kinds: the types of its decoders.

    Returns:
        {id: text}.
    """
    if not decoder_kinds or not _WITHOUT_SPACES.issuperset(decoder_kinds):
        return {}
    decode = rust.decoder.decode
    if decode([ANCHOR, ANCHOR]) != 2 * ANCHOR:
        return {}
    return {
        token_id: token.content
        for token_id, token in rust.get_added_tokens_decoder().items()
        if decode([ANCHOR, token.content, ANCHOR]) != ANCHOR + token.content + ANCHOR
        and not _is_a_word_of_the_model(rust, token.content, token_id)
    }


def _is_a_word_of_the_model(rust: RustTokenizer, content: str, token_id: int) -> bool:
    """Whether the model's own merges lead to the token, as to Gemma's "▁▁": then it stands for what they stand for."""
    return [token.id for token in rust.model.tokenize(content)] == [token_id]


def _byte_of_char() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 bytes stand for themselves, the other 68 for U+0100 and up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHAR = _byte_of_char()


def byte_form(token: str) -> bytes | None:
    """The bytes that a token stands for in a byte-level vocabulary; None where a character stands for none."""
    try:
        return bytes(map(_BYTE_OF_CHAR.__getitem__, token))
    except KeyError:
        return None
