"""What in a `tokenizer.json` is not known to be harmless: the file is code of a kind, its patterns run on every prompt.

`(a|aa)+$` takes 15.8 s on 6 KB, a chain of replacements can grow a text without bound, and some settings abort the
process inside the Rust library while it reads the file. So the file is looked at before the library sees it. What
published models have is on the lists below; anything else is tried in a child process first (`probe`).
"""

from __future__ import annotations

import re
from typing import Any

from pace.checkpoint.config_json import parse_json
from pace.errors import CheckpointError, show

__all__ = ["MAX_GROWTH", "doubts", "flatten"]

MAX_GROWTH = 16  # how much the replacements of a normaliser may lengthen a text, all together

# Pieces of the patterns below.
_TAIL = (r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+")
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_CAPITALISED = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
_CAPITALS = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_SIGNS_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
# The patterns that published models use, each of them linear in the text (measured on 50 kB of every repeated
# class). Compared after writing CR and LF as escapes.
_KNOWN_PATTERNS = frozenset(
    "|".join(alternatives)
    for alternatives in (
        # GPT-2
        ("'s|'t|'re|'ve|'m|'ll|'d", r" ?\p{L}+", r" ?\p{N}+", r" ?[^\s\p{L}\p{N}]+", r"\s+(?!\S)", r"\s+"),
        # Llama 3, cl100k
        (_CONTRACTIONS, _WORD, r"\p{N}{1,3}", _SIGNS, *_TAIL),
        # Qwen2, Qwen3
        (_CONTRACTIONS, _WORD, r"\p{N}", _SIGNS, *_TAIL),
        # Qwen3.5
        (
            _CONTRACTIONS,
            r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+",
            r"\p{N}",
            r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*",
            *_TAIL,
        ),
        # o200k: Llama 4, gpt-oss
        (
            _CAPITALISED + _CONTRACTIONS + "?",
            _CAPITALS + _CONTRACTIONS + "?",
            r"\p{N}{1,3}",
            _SIGNS_SLASH,
            *_TAIL,
        ),
        # Mistral Nemo and later
        (_CAPITALISED, _CAPITALS, r"\p{N}", _SIGNS_SLASH, *_TAIL),
        # DeepSeek V3 and its kin: three splits, one after the other
        (r"\p{N}{1,3}",),
        ("[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",),
        (
            r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+""",
            r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+",
            r" ?[\p{P}\p{S}]+[\r\n]*",
            *_TAIL,
        ),
        # single classes, and runs of spaces
        (r"\p{N}",),
        (r"\d",),
        (r"[0-9]",),
        (r"[0-9][0-9][0-9]",),
        (r"[\r\n]",),
        (r"\s+",),
        (r" {2,}",),
    )
)
# Components that are linear and have no parameter that could make them grow a text without bound.
_NORMALIZERS = frozenset({
    "Sequence", "NFC", "NFD", "NFKC", "NFKD", "Nmt", "Lowercase", "Strip", "StripAccents", "Prepend",
    "Replace", "BertNormalizer", "ByteLevel",
})  # fmt: skip
_PRE_TOKENIZERS = frozenset({
    "Sequence", "ByteLevel", "Metaspace", "Whitespace", "WhitespaceSplit", "Digits", "Punctuation",
    "BertPreTokenizer", "UnicodeScripts", "CharDelimiterSplit", "FixedLength", "Split",
})  # fmt: skip
_POST_PROCESSORS = frozenset({
    "Sequence", "ByteLevel", "TemplateProcessing", "BertProcessing", "RobertaProcessing",
})  # fmt: skip
_DECODERS = frozenset({
    "Sequence", "ByteLevel", "Metaspace", "ByteFallback", "Fuse", "Strip", "Replace", "WordPiece",
    "BPEDecoder", "CTC",
})  # fmt: skip
_KNOWN_TYPES = {
    "normalizer": _NORMALIZERS,
    "pre_tokenizer": _PRE_TOKENIZERS,
    "post_processor": _POST_PROCESSORS,
    "decoder": _DECODERS,
}
_KNOWN_KEYS = frozenset({"version", "truncation", "padding", "added_tokens", "model", *_KNOWN_TYPES})
_KNOWN_MODELS = {
    "BPE": frozenset({
        "type", "dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk",
        "byte_fallback", "ignore_merges", "vocab",
    }),
    "Unigram": frozenset({"type", "unk_id", "byte_fallback", "vocab"}),
}  # fmt: skip
# An escaped printable ASCII character; the library writes none, and it could hide a key from the search below.
_ESCAPED_ASCII = re.compile(rb"\\u00[2-7]")
_THEN_NO_NUMBER = re.compile(rb"\s*:\s*[^\s\d]")


def doubts(data: bytes) -> list[str]:
    """Name what is unusual in the bytes of a `tokenizer.json`, without the time that parsing all of it would take.

    The library writes a file in one order: everything else, then vocabulary and merges, which are nearly all of it.
    The first part is parsed here (0.3 ms; the whole would take 40 ms for 3.5 MB), and in the second no key may come
    that changes what the first says.
    """
    at = data.find(b'"vocab"')
    if at < 0:
        return ["a model without a vocabulary"]
    try:
        head = parse_json(data[:at] + b'"vocab":null}}', "tokenizer.json")
    except CheckpointError:
        return ["an unusual layout"]
    model = head.get("model")
    if not isinstance(model, dict) or "vocab" not in model or set(head) - _KNOWN_KEYS:
        return ["an unusual layout"]
    found = [*_model_doubts(model), *_tail_doubts(data, at)]
    for part, known in _KNOWN_TYPES.items():
        if head.get(part) is not None:
            found += _component_doubts(part, head[part], known)
    return found


def _model_doubts(model: dict[str, Any]) -> list[str]:
    kind = model.get("type", "BPE")  # GPT-2's file, and those made of it, have none
    if not isinstance(kind, str) or kind not in _KNOWN_MODELS:
        return [f"a model of type {show(kind)}"]
    if unknown := sorted(set(model) - _KNOWN_MODELS[kind]):
        return [f"a model with {show(unknown[0])}"]
    if model.get("continuing_subword_prefix"):
        # Version 0.23.3 aborts while it reads such a file, where a merge's second part is shorter than the prefix.
        return [f"a BPE model with continuing_subword_prefix {show(model['continuing_subword_prefix'])}"]
    return []


def _tail_doubts(data: bytes, at: int) -> list[str]:
    """Of what follows the vocabulary's key: a repeated key could replace what the first part said."""
    if _ESCAPED_ASCII.search(data, at):
        return ["escaped letters"]
    for key in (*_KNOWN_KEYS, "type", "continuing_subword_prefix"):
        quoted = b'"%b"' % key.encode()
        found = data.find(quoted, at)
        while found >= 0:
            # The same word as a token stands before its number, or in a list.
            if _THEN_NO_NUMBER.match(data, found + len(quoted)):
                return [f"{key} behind the vocabulary"]
            found = data.find(quoted, found + 1)
    return []


def _component_doubts(part: str, component: object, known: frozenset[str]) -> list[str]:
    found, growth = [], 1.0
    for item in flatten(component):
        kind = item.get("type") if isinstance(item, dict) else item
        if not isinstance(item, dict) or not isinstance(kind, str) or kind not in known:
            found.append(f"a {part} {show(kind)}")
            continue
        pattern = item.get("pattern")
        if isinstance(pattern, dict) and "Regex" in pattern:
            text = str(pattern["Regex"]).replace("\r", r"\r").replace("\n", r"\n")
            if text not in _KNOWN_PATTERNS:
                found.append(f"a {part} {kind} with the pattern {show(text)}")
        growth *= _growth(item)
    if growth > MAX_GROWTH:
        found.append(f"a {part} whose replacements may lengthen a text more than {MAX_GROWTH} times")
    return found


def _growth(item: dict[str, Any]) -> float:
    """How much one component may lengthen a text."""
    if item["type"] == "Replace":
        pattern = item.get("pattern")
        literal = pattern.get("String", " ") if isinstance(pattern, dict) else ""
        content = item.get("content")
        if not literal or not isinstance(literal, str) or not isinstance(content, str):
            return MAX_GROWTH + 1.0
        return max(1.0, len(content) / len(literal))
    if item["type"] == "Prepend":
        return 1.0 if len(str(item.get("prepend", ""))) <= MAX_GROWTH else MAX_GROWTH + 1.0
    return 1.0


def flatten(component: object) -> list[Any]:
    """A component and the ones inside its Sequences, in order; without recursion, as the nesting is the file's."""
    result: list[Any] = []
    stack = [component]
    while stack:
        item = stack.pop()
        result.append(item)
        if isinstance(item, dict):
            for key in ("normalizers", "pretokenizers", "processors", "decoders"):
                if isinstance(item.get(key), list):
                    stack.extend(reversed(item[key]))
    return result
