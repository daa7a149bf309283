"""Tokenizers out of GGUF files against those that they were made from: the same ids for the same text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf_kit
import numpy as np
import pytest
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as RustTokenizer

from pace.checkpoint.gguf.header import read_header
from pace.checkpoint.gguf.tokenizer import _SPLITS, end_ids, tokenizer_config, tokenizer_json
from pace.errors import TokenizerError, UnsupportedModel
from pace.text.audit import doubts

CORPUS = [
    "",
    " ",
    "a",
    "The quick brown fox's dog didn't; WE'LL see, I'M sure.",
    "  leading,   inner    and trailing   ",
    "\t\ttabs\tand\n\nnew\r\nlines\n \n",
    "0 12 345 6789 3.14159 1,000,000 ١٢٣",
    "naïve café ǅ ÀÉ e\u0301 ﬁ Ⅷ ½",
    "日本語のテキスト 中文 한국어 ภาษาไทย עברית العربية हिन्दी",
    "👍🏽👨‍👩‍👧‍👦 🇩🇪 e\u200bz\ufeff",
    "<|im_start|>user\nhi<|im_end|> <|im_start|>x<tool> <tool>",
    "def f(x):\n    return x ** 2  # comment\n\n\n    y = [1, 2]\n",
    "!!! ??? ... --- === <<>> {{}} [[]] \\\\ //",
    "▁ already ▁▁ marked",
    "\x00\x01\x7f",
    "a" * 300 + " " * 70 + "b",
]
SPECIAL = ["<|im_start|>", "<|im_end|>"]


def read(tmp_path: Path, *arguments: Any, **options: Any) -> dict[str, Any]:
    """The metadata of a file with such a vocabulary."""
    path = tmp_path / "vocabulary.gguf"
    writer = gguf_kit.gguf.GGUFWriter(path, options.pop("architecture", "llama"))
    gguf_kit.write_vocabulary(writer, *arguments, **options)
    gguf_kit.finish(writer)
    return read_header(path).metadata


def same_ids(original: RustTokenizer, metadata: dict[str, Any]) -> None:
    data = json.dumps(tokenizer_json(metadata), ensure_ascii=False).encode()
    assert doubts(data) == []
    own = RustTokenizer.from_buffer(data)
    for text in CORPUS:
        for special in (False, True):
            ids = original.encode(text, add_special_tokens=special).ids
            assert own.encode(text, add_special_tokens=special).ids == ids, text
            assert own.decode(ids, skip_special_tokens=False) == original.decode(
                ids, skip_special_tokens=False
            )
            assert own.decode(ids) == original.decode(ids)


@pytest.mark.parametrize("pre", ["llama-bpe", "dbrx", "qwen2", "gpt-4o", "tekken", "gpt-2", "smollm"])
def test_byte_level_tokenizers_give_the_original_ids(pre: str, tmp_path: Path) -> None:
    split = _SPLITS[pre]
    original = RustTokenizer(models.BPE(ignore_merges=split.whole))
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if split.digits else []
    if split.pattern is not None:
        steps.append(pre_tokenizers.Split(Regex(split.pattern), "isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split.pattern is None))
    original.pre_tokenizer = pre_tokenizers.Sequence(steps)
    original.decoder = decoders.ByteLevel()
    if split.nfc:
        original.normalizer = normalizers.NFC()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    original.train_from_iterator([text for text in CORPUS if "<|" not in text] * 3, trainer)
    original.add_special_tokens(SPECIAL)
    original.add_tokens(["<tool>"])
    if split.bos:
        bos = SPECIAL[0]
        original.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, original.token_to_id(bos))]
        )
    config = {"bos_token": SPECIAL[0], "eos_token": SPECIAL[1], "chat_template": "{{ messages }}"}
    # More rows than tokens, as embeddings are padded.
    metadata = read(tmp_path, json.loads(original.to_str()), config, pre=pre, n_rows=700)
    same_ids(original, metadata)
    assert tokenizer_config(metadata) == config
    assert end_ids(metadata) == [original.token_to_id(SPECIAL[1])]


def sentence_pieces(prefix: bool) -> tuple[RustTokenizer, dict[str, float]]:
    """A tokenizer as transformers converts SentencePiece's BPE: merges ordered by the score of what they make."""
    trained = RustTokenizer(models.BPE())
    spaces = [normalizers.Replace(" ", "▁")]
    trained.normalizer = normalizers.Sequence([*([normalizers.Prepend("▁")] if prefix else []), *spaces])
    trainer = trainers.BpeTrainer(vocab_size=400, show_progress=False, max_token_length=12)
    trained.train_from_iterator([text for text in CORPUS[:8] if "<|" not in text] * 3, trainer)
    pieces = sorted(json.loads(trained.to_str())["model"]["vocab"].items(), key=lambda item: item[1])
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{i:02X}>": 3 + i for i in range(256)}
    scores: dict[str, float] = {}
    for piece, rank in pieces:
        vocab[piece] = len(vocab)
        scores[piece] = -float(rank)
    merges = [
        (-scores[piece], vocab[piece[:at]], vocab[piece[at:]], (piece[:at], piece[at:]))
        for piece in scores
        for at in range(1, len(piece))
        if piece[:at] in scores and piece[at:] in scores
    ]
    model = models.BPE(
        vocab, [pair for *_, pair in sorted(merges)], unk_token="<unk>", fuse_unk=True, byte_fallback=True
    )
    original = RustTokenizer(model)
    original.normalizer = trained.normalizer
    ends = [decoders.Strip(" ", 1, 0)] if prefix else []
    original.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *ends]
    )
    original.add_special_tokens(["<unk>", "<s>", "</s>", *SPECIAL])
    # GGUF doesn't say which added tokens are looked for in the normalised text; llama.cpp looks in the plain one.
    original.add_tokens([AddedToken("<tool>", normalized=False)])
    original.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return original, scores


@pytest.mark.parametrize("prefix", [True, False])
def test_sentence_piece_tokenizers_give_the_original_ids(prefix: bool, tmp_path: Path) -> None:
    original, scores = sentence_pieces(prefix)
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    metadata = read(tmp_path, json.loads(original.to_str()), config, pre="default", scores=scores)
    metadata["tokenizer.ggml.add_space_prefix"] = prefix
    same_ids(original, metadata)
    assert end_ids(metadata) == [2, original.token_to_id("<|im_end|>")]


def test_a_pattern_or_a_model_that_is_unknown_is_named_with_what_to_do() -> None:
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": ["a"],
        "tokenizer.ggml.pre": "viking",
    }
    with pytest.raises(UnsupportedModel, match=r"'viking'; supported are .*original tokenizer's folder"):
        tokenizer_json(metadata)
    with pytest.raises(UnsupportedModel, match=r"'t5'; supported are 'gpt2' and 'llama'"):
        tokenizer_json({**metadata, "tokenizer.ggml.model": "t5"})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"tokens": 3}, "tokens is 3"),
        ({"tokens": ["a", "a"]}, "'a' twice"),
        ({"merges": ["ab"]}, "'ab', expected two tokens"),
        ({"merges": None}, "no tokenizer.ggml.merges"),
        ({"bos_token_id": 9, "add_bos_token": True}, "bos_token_id is 9"),
        ({"add_bos_token": 1}, "add_bos_token is 1"),
    ],
)
def test_a_wrong_value_is_named(wrong: dict[str, Any], message: str) -> None:
    right = {"model": "gpt2", "pre": "gpt-2", "tokens": ["a", "b"], "merges": ["a b"], **wrong}
    metadata = {f"tokenizer.ggml.{key}": value for key, value in right.items() if value is not None}
    with pytest.raises(TokenizerError, match=message):
        tokenizer_json(metadata)


def test_harmony_messages_do_not_end_the_answer() -> None:
    tokens = ["<|return|>", "<|end|>", "<|call|>", "<|endoftext|>"]
    metadata = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.full(4, gguf_kit.CONTROL),
        "tokenizer.ggml.eos_token_id": 0,
    }
    assert end_ids(metadata) == [0, 3]
