"""Tokenizers of a few hundred tokens, made by the library itself, and how the tests load them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from pace.text.detokenizer import IncrementalDetokenizer
from pace.text.tokenizer import Tokenizer

CORPUS = [
    "def fibonacci(n):\n    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)\n",
    "The quick brown fox jumps over the lazy dog. " * 3,
    "größer, naïve, Ünïcödé, 你好世界, здравствуй мир, 👋🏽 🎉 e\u0301",
]
SPECIAL = ["<s>", "</s>", "<|user|>"]
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
Edit = Callable[[tokenizers.Tokenizer], None]


def byte_level() -> tokenizers.Tokenizer:
    """A GPT-2-like tokenizer of 400 tokens, all 256 bytes among them."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<tool>é", special=False)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


def byte_fallback() -> tokenizers.Tokenizer:
    """A Llama-2-like tokenizer: words that start with ▁, and the 256 bytes as <0x00> … <0xFF>."""
    words = ["▁", "▁the", "▁quick", "brown", "▁fox", "e", "t", "q", "▁a", "ü", "\n"]
    vocab = {
        token: i for i, token in enumerate([*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *words])
    }
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, [], byte_fallback=True, unk_token="<s>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def save(folder: Path, rust: tokenizers.Tokenizer, config: dict[str, Any] | None = None) -> Path:
    rust.save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def load(folder: Path, *, vocab_size: int = 512, max_model_len: int = 4096, trust: bool = False) -> Tokenizer:
    return Tokenizer(folder, vocab_size=vocab_size, max_model_len=max_model_len, trust_patterns=trust)


def stream(detokenizer: IncrementalDetokenizer, ids: list[int]) -> str:
    return "".join([*map(detokenizer.push, ids), detokenizer.finish()])


def token_ids(tokenizer: Tokenizer, *tokens: str) -> list[int]:
    ids = [tokenizer.token_to_id(token) for token in tokens]
    assert None not in ids
    return [token_id for token_id in ids if token_id is not None]


def utf8_tokens(text: str) -> list[str]:
    return [f"<0x{byte:02X}>" for byte in text.encode()]


def replace_twice(count: int) -> Edit:
    """A normaliser that doubles every "a" so many times."""

    def edit(rust: tokenizers.Tokenizer) -> None:
        rust.normalizer = normalizers.Sequence([normalizers.Replace("a", "aa") for _ in range(count)])

    return edit


def regex_split(pattern: str) -> Edit:
    """A pre-tokeniser that splits at a pattern."""

    def edit(rust: tokenizers.Tokenizer) -> None:
        rust.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )

    return edit
