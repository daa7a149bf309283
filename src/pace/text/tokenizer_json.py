"""Reading `tokenizer.json`, which is code of a kind: its patterns run on every prompt.

`(a|aa)+$` takes 15.8 s on 6 KB, and a chain of replacements can grow a text without bound. Loading therefore audits every
component against an allow-list.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pace.checkpoint.config_json import read_file
from pace.errors import RequestError, TokenizerError, show

if TYPE_CHECKING:
    from tokenizers import Tokenizer as RustTokenizer

__all__ = ["audit", "decoder_is_byte_level", "guarded", "load"]

MAX_TOKENIZER_BYTES = 128 << 20  # the largest in use (262k tokens, indented) is 33 MB
MAX_GROWTH = 16  # how much the replacements of a normaliser may lengthen a text, all together
MAX_TEMPLATE_TOKENS = 64  # special tokens that the post-processor adds to a prompt

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
_ALLOWED_PATTERNS = frozenset(
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
_DECODERS = frozenset({
    "Sequence", "ByteLevel", "Metaspace", "ByteFallback", "Fuse", "Strip", "Replace", "WordPiece",
    "BPEDecoder", "CTC",
})  # fmt: skip
_ALLOWED_TYPES = {"normalizer": _NORMALIZERS, "pre_tokenizer": _PRE_TOKENIZERS, "decoder": _DECODERS}


def guarded(call: Any, error: type[RequestError] | type[TokenizerError], message: str) -> Any:
    """Call into the Rust library; what it raises becomes `error`."""
    try:
        return call()
    except Exception as cause:
        raise error(f"{message}: {cause}") from None
    except BaseException as cause:
        # A Rust panic is not an Exception, and would pass through every handler above this one.
        if type(cause).__name__ != "PanicException":
            raise
        raise error(f"{message}: internal error of the tokenizers library: {cause}") from None


def load(path: Path) -> RustTokenizer:
    """Parse the file, with truncation, padding and what it adds to a prompt checked or switched off.

    Raises:
        TokenizerError: malformed, or with a setting that would change prompts.
    """
    data = read_file(path, MAX_TOKENIZER_BYTES)
    # Not at the top: it costs 30 ms, and `import pace` needs no tokenizer.
    from tokenizers import Tokenizer as RustTokenizer

    rust: RustTokenizer = guarded(
        partial(RustTokenizer.from_buffer, data), TokenizerError, f"{path}: cannot be read"
    )
    # Some published files would cut or pad every prompt silently; a dropout would make encoding random.
    rust.no_truncation()
    rust.no_padding()
    dropout = getattr(rust.model, "dropout", None)
    if dropout:
        raise TokenizerError(
            f"{path}: the BPE model has dropout {dropout}, which makes encoding random; set it to null"
        )
    n_added = rust.num_special_tokens_to_add(False)
    if n_added > MAX_TEMPLATE_TOKENS:
        raise TokenizerError(
            f"{path}: post_processor adds {n_added} tokens, expected at most {MAX_TEMPLATE_TOKENS}"
        )
    return rust


def audit(path: Path, rust: RustTokenizer) -> None:
    """Refuse components that are not known to be linear and bounded."""
    for part in _ALLOWED_TYPES:
        component = getattr(rust, part)
        if component is None:
            continue
        growth = 1.0
        for item in _flatten(json.loads(component.__getstate__())):
            kind = item.get("type")
            if kind not in _ALLOWED_TYPES[part]:
                raise _refused(path, f"{part} {show(kind)}")
            pattern = item.get("pattern")
            if isinstance(pattern, dict) and "Regex" in pattern:
                text = str(pattern["Regex"]).replace("\r", r"\r").replace("\n", r"\n")
                if text not in _ALLOWED_PATTERNS:
                    raise _refused(path, f"{part} {kind} pattern {show(text)}")
            if kind == "Replace":
                literal = pattern.get("String", " ") if isinstance(pattern, dict) else ""
                growth *= max(1.0, len(item.get("content", "")) / len(literal)) if literal else MAX_GROWTH + 1
            if kind == "Prepend":
                growth *= 1.0 if len(item.get("prepend", "")) <= MAX_GROWTH else MAX_GROWTH + 1
        if growth > MAX_GROWTH:
            raise _refused(
                path, f"{part}, whose replacements may lengthen a text more than {MAX_GROWTH} times"
            )


def _flatten(state: dict[str, Any]) -> list[dict[str, Any]]:
    """A component and the ones inside its Sequences, in order; without recursion, as the nesting is the
    file's."""
    result, stack = [], [state]
    while stack:
        item = stack.pop()
        result.append(item)
        for key in ("normalizers", "pretokenizers", "decoders"):
            stack.extend(reversed(item.get(key) or []))
    return result


def _refused(path: Path, what: str) -> TokenizerError:
    return TokenizerError(
        f"{path}: {what} is not on the allow-list; if you trust this file, load with trust_tokenizer"
    )


def decoder_is_byte_level(rust: RustTokenizer) -> bool:
    """Whether tokens stand for bytes and nothing else changes the decoded text."""
    if rust.decoder is None:
        return False
    kinds = [item.get("type") for item in _flatten(json.loads(rust.decoder.__getstate__()))]
    return [kind for kind in kinds if kind != "Sequence"] == ["ByteLevel"]
