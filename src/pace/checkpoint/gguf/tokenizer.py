"""From a GGUF file's metadata to the `tokenizer.json` and `tokenizer_config.json` that the same model has on the hub.

Two kinds: "gpt2" is byte-level BPE with its merges, split beforehand by a pattern that the file only names; "llama" is
SentencePiece's BPE, whose merges follow from the scores of the pieces. The rest of a tokenizer (how a word at the
start is marked, which tokens take the white space behind them) llama.cpp keeps in its code, and it stands here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from pace.errors import TokenizerError, UnsupportedModel, show

__all__ = ["end_ids", "tokenizer_config", "tokenizer_json"]

MAX_TOKENS: Final = 1 << 22

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6

# The patterns that the original tokenizer.json files have; `text.audit` knows them.
_TAIL = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
)
_LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_SIGNS}|{_TAIL}"
_QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_SIGNS}|{_TAIL}"
_O200K = (
    "|".join(f"{word}{_CONTRACTIONS}?" for word in _CASED)
    + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|"
    + _TAIL
)
_TEKKEN = "|".join(_CASED) + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _TAIL


@dataclass(frozen=True, slots=True)
class _Split:
    """How a byte-level tokenizer divides a text into words.

    Args:
        pattern: of a word; None: GPT-2's, which the library has.
        digits: each digit is a word, before that.
        whole: a word that is a token is not divided further.
        bos: what a file without `add_bos_token` means.
        nfc: the text is composed first.
    """

    pattern: str | None = None
    digits: bool = False
    whole: bool = False
    bos: bool = False
    nfc: bool = False


_SPLITS: Final[Mapping[str, _Split]] = {
    name: split
    for names, split in (
        (("llama-bpe", "llama3", "llama-v3"), _Split(_LLAMA3, whole=True, bos=True)),
        (("smaug-bpe", "dbrx"), _Split(_LLAMA3)),
        (("qwen2", "deepseek-r1-qwen", "megrez"), _Split(_QWEN2, nfc=True)),
        (("gpt-4o", "llama4"), _Split(_O200K)),
        (("tekken",), _Split(_TEKKEN, whole=True, bos=True)),
        (("gpt-2", "olmo", "phi-2"), _Split()),
        (("smollm", "starcoder", "refact"), _Split(digits=True)),
    )
    for name in names
}
"""By `tokenizer.ggml.pre`."""

_TURN_ENDS: Final = frozenset({
    "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<end_of_turn>", "<|end|>", "<|end_of_text|>", "<|endoftext|>",
})  # fmt: skip
"""Control tokens that end an answer whichever of them `eos_token_id` names; in the original they are in
generation_config.json, of which a GGUF file has nothing."""
_NAMES: Final = {
    "bos": "bos",
    "eos": "eos",
    "unk": "unknown",
    "sep": "seperator",
    "pad": "padding",
    "mask": "mask",
}
"""Of special tokens, and what GGUF calls them."""


def tokenizer_json(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The tokenizer.json, in the order that the library writes.

    Raises:
        TokenizerError: a value is missing or malformed.
        UnsupportedModel: a kind of tokenizer, or a pattern, that pace doesn't know.
    """
    kind = metadata.get("tokenizer.ggml.model")
    tokens, types = _vocabulary(metadata)
    if kind == "gpt2":
        parts = _byte_level(metadata, tokens, types)
    elif kind == "llama":
        parts = _sentence_pieces(metadata, tokens, types)
    else:
        raise UnsupportedModel(
            f"tokenizer.ggml.model is {show(kind)}; supported are 'gpt2' and 'llama': {_ELSEWHERE}"
        )
    model = parts.pop("model")
    add = _flag(metadata, "add_bos_token", parts.pop("bos")), _flag(metadata, "add_eos_token", False)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": parts.pop("added_tokens"),
        **parts,
        "post_processor": _template(metadata, tokens, *add),
        "model": model,
    }


_ELSEWHERE: Final = "give the original tokenizer's folder as tokenizer"


def tokenizer_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The tokenizer_config.json: named special tokens and chat templates; errors as `tokenizer_json`."""
    tokens, _ = _vocabulary(metadata)
    config: dict[str, Any] = {}
    for name, theirs in _NAMES.items():
        token_id = _special(metadata, theirs, len(tokens))
        if token_id is not None:
            config[f"{name}_token"] = tokens[token_id]
    template = metadata.get("tokenizer.chat_template")
    named = metadata.get("tokenizer.chat_templates")
    if isinstance(named, list):
        texts = {name: metadata.get(f"tokenizer.chat_template.{name}") for name in named}
        default = {} if template is None else {"default": template}
        config["chat_template"] = [
            {"name": name, "template": text}
            for name, text in {**default, **texts}.items()
            if text is not None
        ]
    elif template is not None:
        config["chat_template"] = template
    return config


def end_ids(metadata: Mapping[str, Any]) -> list[int]:
    """Ids of the tokens that end an output; errors as `tokenizer_json`."""
    tokens, types = _vocabulary(metadata)
    named = [_special(metadata, name, len(tokens)) for name in ("eos", "eot", "eom")]
    found = [token_id for token_id in named if token_id is not None]
    found += [i for i in np.flatnonzero(types == _CONTROL).tolist() if tokens[i] in _TURN_ENDS]
    if any(tokens[i] == "<|return|>" for i in found):  # harmony ends its messages with <|end|>, and goes on
        found = [i for i in found if tokens[i] != "<|end|>"]
    return list(dict.fromkeys(found))


def _vocabulary(metadata: Mapping[str, Any]) -> tuple[list[str], Any]:
    """Every token's text, and its type i64 [n]."""
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not 1 <= len(tokens) <= MAX_TOKENS:
        raise TokenizerError(f"tokenizer.ggml.tokens is {show(tokens)}, expected a list of texts")
    types = metadata.get("tokenizer.ggml.token_type")
    if types is None:
        return tokens, np.full(len(tokens), _NORMAL)
    if not isinstance(types, np.ndarray) or types.dtype.kind not in "iu" or len(types) != len(tokens):
        raise TokenizerError(f"tokenizer.ggml.token_type is {show(types)}, expected {len(tokens)} integers")
    return tokens, types.astype(np.int64)


def _special(metadata: Mapping[str, Any], name: str, n_tokens: int) -> int | None:
    """The id under `tokenizer.ggml.NAME_token_id`."""
    token_id = metadata.get(f"tokenizer.ggml.{name}_token_id")
    if token_id is None:
        return None
    if type(token_id) is not int or not 0 <= token_id < n_tokens:
        raise TokenizerError(
            f"tokenizer.ggml.{name}_token_id is {show(token_id)}, expected an id from 0 to {n_tokens - 1}"
        )
    return token_id


def _flag(metadata: Mapping[str, Any], name: str, default: bool) -> bool:
    value = metadata.get(f"tokenizer.ggml.{name}", default)
    if not isinstance(value, bool):
        raise TokenizerError(f"tokenizer.ggml.{name} is {show(value)}, expected true or false")
    return value


def _byte_level(metadata: Mapping[str, Any], tokens: list[str], types: Any) -> dict[str, Any]:
    name = metadata.get("tokenizer.ggml.pre")
    split = _SPLITS.get(name) if isinstance(name, str) else None
    if split is None:
        raise UnsupportedModel(
            f"tokenizer.ggml.pre is {show(name)}; supported are {', '.join(_SPLITS)}: {_ELSEWHERE}"
        )
    steps: list[dict[str, Any]] = []
    if split.digits:
        steps.append({"type": "Digits", "individual_digits": True})
    if split.pattern is not None:
        steps.append(
            {"type": "Split", "pattern": {"Regex": split.pattern}, "behavior": "Isolated", "invert": False}
        )
    whole_regex = split.pattern is None
    steps.append(
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": whole_regex}
    )
    merges = _merges(metadata)
    if merges is None:
        raise TokenizerError("there is no tokenizer.ggml.merges, which a tokenizer of model 'gpt2' needs")
    return {
        "bos": split.bos,
        "added_tokens": _added(tokens, types, ()),
        "normalizer": {"type": "NFC"} if split.nfc else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": split.whole,
            "vocab": _ids(tokens, types),
            "merges": merges,
        },
    }


def _sentence_pieces(metadata: Mapping[str, Any], tokens: list[str], types: Any) -> dict[str, Any]:
    prefix = _flag(metadata, "add_space_prefix", True)
    unknown = _special(metadata, "unknown", len(tokens))
    if unknown is None:
        unknown = next(iter(np.flatnonzero(types == _UNKNOWN).tolist()), None)
    spaces: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        spaces.insert(0, {"type": "Prepend", "prepend": "▁"})
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    vocab = _ids(tokens, types)
    # Phi-3's own file has it for all but these; nothing in a GGUF file says so but the architecture.
    phi3 = metadata.get("general.architecture") == "phi3"
    strips = [token for token in tokens if token not in ("<unk>", "<s>", "<|endoftext|>")] if phi3 else []
    return {
        "bos": True,
        "added_tokens": _added(tokens, types, frozenset(strips)),
        "normalizer": {"type": "Sequence", "normalizers": spaces},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None if unknown is None else tokens[unknown],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": _merges(metadata) or _merges_of_scores(metadata, tokens, types, vocab),
        },
    }


def _ids(tokens: list[str], types: Any) -> dict[str, int]:
    """Token -> id of all that are used; added ones too, for only so they keep their ids behind a gap.

    Raises:
        TokenizerError: two have the same text.
    """
    used = np.flatnonzero(types != _UNUSED).tolist()
    ids = {tokens[i]: i for i in used}
    if len(ids) != len(used):
        twice = next(tokens[i] for i in used if ids[tokens[i]] != i)
        raise TokenizerError(f"tokenizer.ggml.tokens has {show(twice)} twice: {_ELSEWHERE}")
    return ids


def _added(tokens: list[str], types: Any, strips: Sequence[str] | frozenset[str]) -> list[dict[str, Any]]:
    """Tokens that are found in a text before it is divided."""
    return [
        {
            "id": i,
            "content": tokens[i],
            "single_word": False,
            "lstrip": False,
            "rstrip": tokens[i] in strips,
            "normalized": False,
            "special": bool(types[i] != _USER_DEFINED),
        }
        for i in np.flatnonzero(np.isin(types, (_CONTROL, _USER_DEFINED, _UNKNOWN))).tolist()
        if tokens[i]
    ]


def _merges(metadata: Mapping[str, Any]) -> list[list[str]] | None:
    """Pairs of tokens, the first ones first; None where the file has none."""
    merges = metadata.get("tokenizer.ggml.merges")
    if merges is None:
        return None
    if not isinstance(merges, list):
        raise TokenizerError(f"tokenizer.ggml.merges is {show(merges)}, expected a list of texts")
    pairs = []
    for merge in merges:
        at = merge.find(" ", 1)
        if at < 0:
            raise TokenizerError(f"tokenizer.ggml.merges has {show(merge)}, expected two tokens and a space")
        pairs.append([merge[:at], merge[at + 1 :]])
    return pairs


def _merges_of_scores(
    metadata: Mapping[str, Any], tokens: list[str], types: Any, vocab: Mapping[str, int]
) -> list[list[str]]:
    """Every pair of pieces that makes a piece, the ones with the best score first; of one piece, by the pair's ids."""
    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, np.ndarray) or len(scores) != len(tokens):
        raise TokenizerError(f"tokenizer.ggml.scores is {show(scores)}, expected {len(tokens)} numbers")
    if not np.isfinite(scores).all():
        raise TokenizerError("tokenizer.ggml.scores has a number that is not finite")
    # Added tokens and bytes are found otherwise, and no piece is made of them.
    pieces = {token: i for token, i in vocab.items() if types[i] == _NORMAL}
    pairs: list[tuple[float, int, int, int, list[str]]] = []
    for piece, i in pieces.items():
        score = -float(scores[i])
        for at in range(1, len(piece)):
            left = pieces.get(piece[:at])
            right = None if left is None else pieces.get(piece[at:])
            if left is not None and right is not None:
                pairs.append((score, i, left, right, [piece[:at], piece[at:]]))
    pairs.sort(key=lambda pair: pair[:4])
    return [pair[4] for pair in pairs]


def _template(metadata: Mapping[str, Any], tokens: list[str], bos: bool, eos: bool) -> dict[str, Any] | None:
    """What stands before and behind a prompt."""
    n_tokens = len(tokens)
    ends = [
        _special(metadata, "bos", n_tokens) if bos else None,
        _special(metadata, "eos", n_tokens) if eos else None,
    ]
    if ends == [None, None]:
        return None
    first, last = ([] if i is None else [{"SpecialToken": {"id": tokens[i], "type_id": 0}}] for i in ends)
    pair = [
        *first,
        {"Sequence": {"id": "A", "type_id": 0}},
        *last,
        *first,
        {"Sequence": {"id": "B", "type_id": 1}},
        *last,
    ]
    return {
        "type": "TemplateProcessing",
        "single": [*first, {"Sequence": {"id": "A", "type_id": 0}}, *last],
        "pair": pair,
        "special_tokens": {
            tokens[i]: {"id": tokens[i], "ids": [i], "tokens": [tokens[i]]} for i in ends if i is not None
        },
    }
