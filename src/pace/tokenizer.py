"""Text to token ids and back: a wrapper of `tokenizers`, incremental detokenisation, and the search for stop
strings.

`tokenizer.json` is code of a kind: its patterns run on every prompt. `(a|aa)+$` takes 15.8 s on 6 KB, and a
chain of replacements can grow a text without bound. Loading therefore audits every component against an
allow-list.
"""

from __future__ import annotations

import codecs
import json
import operator
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pace.checkpoint.config_json import checkpoint_file, read_file, read_json
from pace.errors import RequestError, TokenizerError, show

if TYPE_CHECKING:
    from tokenizers import Tokenizer as RustTokenizer

__all__ = ["IncrementalDetokenizer", "StopChecker", "TextStream", "Tokenizer"]

MAX_TOKENIZER_BYTES = 128 << 20  # the largest in use (262k tokens, indented) is 33 MB
MAX_BYTES_PER_TOKEN = 8  # of a prompt, on average; English has 4.5, and the encoder needs 0.5 s for each MB
PROMPT_SLACK_BYTES = 1024
MAX_GROWTH = 16  # how much the replacements of a normaliser may lengthen a text, all together
MAX_TEMPLATE_TOKENS = 64  # special tokens that the post-processor adds to a prompt
MAX_PENDING_TOKENS = (
    5  # a character has at most four bytes, each at most one token; the fifth proves it invalid
)

_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

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


class Tokenizer:
    """The tokenizer of one checkpoint.

    Attributes:
        directory: the folder it was read from.
        vocab_size: rows of the model's embedding; every id that `encode` returns is below it.
        max_prompt_bytes: longest text that `encode` takes, in bytes of UTF-8.
        special_tokens: {"bos_token": "<s>", …}, what chat templates see.
        config: the parsed tokenizer_config.json, {} where there is none.
        bos_token_id: id of bos_token, None where there is none.
        eos_token_id: id of eos_token, None where there is none.
        byte_level: whether tokens stand for bytes (GPT-2, Llama 3, Qwen), which makes detokenisation exact.
    """

    def __init__(
        self, directory: str | Path, *, vocab_size: int, max_model_len: int, trust_patterns: bool = False
    ) -> None:
        """Load and audit `tokenizer.json`, and read `tokenizer_config.json` where there is one.

        Args:
            directory: the folder that holds them.
            vocab_size: rows of the model's embedding; an id that isn't below it is refused.
            max_model_len: tokens of the longest sequence; bounds the texts that `encode` takes.
            trust_patterns: take patterns and components that aren't on the allow-list.

        Raises:
            TokenizerError: missing, malformed, refused by the audit, or contradicting `vocab_size`.
            CheckpointError: a file isn't regular, is too large, or is a link out of the folder.
        """
        self.directory = directory = Path(directory)
        path = checkpoint_file(directory, "tokenizer.json")
        if path is None:
            raise TokenizerError(f"{directory}: no tokenizer.json; convert the tokenizer to the fast format")
        self._rust = _load(path)
        if not trust_patterns:
            _audit(path, self._rust)
        vocabulary = self._rust.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise TokenizerError(f"{path}: the vocabulary is empty")
        token, top = max(vocabulary.items(), key=operator.itemgetter(1))
        if top >= vocab_size:
            raise TokenizerError(
                f"{path}: {show(token)} has id {top}, but the model's embedding has {vocab_size} rows"
            )
        self.vocab_size = vocab_size
        self.max_prompt_bytes = MAX_BYTES_PER_TOKEN * max_model_len + PROMPT_SLACK_BYTES

        self.config = _read_config(directory, "tokenizer_config.json")
        self.special_tokens = _special_tokens(directory, self.config)
        self.bos_token_id = self._special_id(path, "bos_token", vocabulary)
        self.eos_token_id = self._special_id(path, "eos_token", vocabulary)

        added = self._rust.get_added_tokens_decoder()
        self._special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self.byte_level = _decoder_is_byte_level(self._rust)
        self._bytes: dict[int, bytes] = {}

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Encode one text without holding the GIL.

        Args:
            text: at most `max_prompt_bytes` of UTF-8.
            add_special_tokens: add what the checkpoint adds to a prompt, such as BOS; off for rendered chats.

        Raises:
            RequestError: not a string, not valid Unicode, or too long.
        """
        return self.encode_batch([text], add_special_tokens=add_special_tokens)[0]

    def encode_batch(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        """Encode several texts, in parallel and without holding the GIL; arguments and errors as `encode`."""
        for text in texts:
            self._check_text(text)
        # encode() would hold the GIL: a 3 MB prompt froze every other thread for 1.5 s; this one, for 7 ms.
        call = partial(self._rust.encode_batch_fast, list(texts), add_special_tokens=add_special_tokens)
        encodings = _guarded(call, RequestError, "the tokenizer failed on this text")
        return [encoding.ids for encoding in encodings]

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Decode a whole sequence without holding the GIL; invalid UTF-8 becomes U+FFFD.

        Raises:
            RequestError: an id is out of range.
        """
        self.check_ids(token_ids)
        call = partial(
            self._rust.decode_batch,
            [[int(token_id) for token_id in token_ids]],
            skip_special_tokens=skip_special_tokens,
        )
        text: str = _guarded(call, RequestError, "the tokenizer failed on these ids")[0]
        return text

    def decode_token(self, token_id: int) -> str:
        """Return one token's own text, special tokens included; "" for ids that have no token."""
        if self.byte_level:
            return self.token_bytes(token_id).decode("utf-8", "replace")
        return self._decode_window([token_id])

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes that a token of a byte-level tokenizer stands for; b"" for ids that have no
        token."""
        data = self._bytes.get(token_id)
        if data is None:
            data = self._bytes[token_id] = _to_bytes(self._rust.id_to_token(token_id) or "")
        return data

    def is_special(self, token_id: int) -> bool:
        """Whether `skip_special_tokens` leaves this token out."""
        return token_id in self._special_ids

    def token_to_id(self, token: str) -> int | None:
        """Return the id of a token given as it is written in the vocabulary; None where there is none."""
        token_id: int | None = self._rust.token_to_id(token)
        return token_id

    def check_ids(self, token_ids: Iterable[object], name: str = "prompt_token_ids") -> None:
        """Check that every id is an integer of the model's vocabulary.

        Raises:
            RequestError: one isn't; the message names it and its position.
        """
        for position, token_id in enumerate(token_ids):
            # numpy's integers are integers too, but True is not 1.
            valid = isinstance(token_id, (int, np.integer)) and not isinstance(token_id, bool)
            if not (valid and 0 <= token_id < self.vocab_size):  # type: ignore[operator]  # valid says so
                raise RequestError(
                    f"{name} has {show(token_id)} at position {position}, "
                    f"expected ids from 0 to {self.vocab_size - 1}"
                )

    def _check_text(self, text: object) -> None:
        if not isinstance(text, str):
            raise RequestError(f"the prompt is {show(text)}, expected a string")
        # The characters first: a far too long text isn't even copied.
        n_bytes = len(text)
        if n_bytes <= self.max_prompt_bytes:
            try:
                n_bytes = len(text.encode("utf-8"))
            except UnicodeEncodeError as error:
                raise RequestError(f"the prompt has a lone surrogate at character {error.start}") from None
        if n_bytes > self.max_prompt_bytes:
            raise RequestError(
                f"the prompt has {n_bytes} bytes or more, expected at most {self.max_prompt_bytes}; "
                "shorten it or raise max_model_len"
            )

    def _decode_window(self, token_ids: list[int]) -> str:
        call = partial(self._rust.decode, token_ids, skip_special_tokens=False)
        text: str = _guarded(call, TokenizerError, "the tokenizer failed on the model's output")
        return text

    def _special_id(self, path: Path, name: str, vocabulary: dict[str, int]) -> int | None:
        token = self.special_tokens.get(name)
        if token is None:
            return None
        if token not in vocabulary:
            raise TokenizerError(f"{path}: {name} is {show(token)}, which isn't in the vocabulary")
        return vocabulary[token]


class IncrementalDetokenizer:
    """Turns tokens into text one by one; what it returns is always whole characters, and never taken back.

    Byte-level tokenizers go through an incremental UTF-8 decoder: exactly the text of the whole, at O(1) per
    token. For the others (SentencePiece-like), where a token's text depends on its neighbours, each token is
    decoded together with the few before it and the difference is returned; text that ends in U+FFFD waits, at
    most for four more tokens.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int] = (), *, skip_special_tokens: bool = True
    ) -> None:
        """Start after a prompt, whose last tokens say whether the output's leading space is real."""
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._context: list[int] = []  # tokens whose text has been returned
        self._pending: list[int] = []  # tokens whose text hasn't
        self._context_text = ""
        if not tokenizer.byte_level:
            # More than the window needs, because the ends of chat prompts are special tokens.
            recent = [int(token_id) for token_id in prompt_token_ids[-64:] if self._has_text(token_id)]
            self._context = recent[-MAX_PENDING_TOKENS:]
            self._context_text = tokenizer._decode_window(self._context) if self._context else ""

    def push(self, token_id: int) -> str:
        """Add a token; returns the text that is complete with it, "" if none is."""
        if not self._has_text(token_id):
            return ""
        if self._tokenizer.byte_level:
            return self._utf8.decode(self._tokenizer.token_bytes(token_id))
        self._pending.append(token_id)
        text = self._tokenizer._decode_window(self._context + self._pending)
        complete = len(text) > len(self._context_text) and not text.endswith("\ufffd")
        return self._emit(text) if complete or len(self._pending) >= MAX_PENDING_TOKENS else ""

    def extend(self, token_ids: Sequence[int]) -> str:
        """`push` of each; returns the text of all together."""
        if self._tokenizer.byte_level:
            token_bytes = self._tokenizer.token_bytes
            return self._utf8.decode(b"".join([token_bytes(i) for i in token_ids if self._has_text(i)]))
        return "".join([self.push(token_id) for token_id in token_ids])

    def finish(self) -> str:
        """Return what was held back, an incomplete character as U+FFFD."""
        if self._tokenizer.byte_level:
            return self._utf8.decode(b"", final=True)
        return (
            self._emit(self._tokenizer._decode_window(self._context + self._pending)) if self._pending else ""
        )

    def _has_text(self, token_id: int) -> bool:
        # Skipped tokens must not become context either: a leading space is dropped where nothing precedes it.
        return not (self._skip and self._tokenizer.is_special(token_id))

    def _emit(self, text: str) -> str:
        n_old = len(self._context_text)
        if not text.startswith(self._context_text):
            # Invalid bytes that were returned as U+FFFD have become part of something else: keep what was
            # said.
            pairs = zip(text, self._context_text, strict=False)
            n_old = next((i for i, (new, old) in enumerate(pairs) if new != old), min(n_old, len(text)))
        self._context, self._pending = self._pending, []
        self._context_text = self._tokenizer._decode_window(self._context)
        return text[n_old:]


class StopChecker:
    """Searches a stream of text for stop strings, and holds back only what may be the start of one.

    The match that is complete first wins, of several at the same end the longest: the result does not depend
    on how the text was cut into pieces. One Knuth-Morris-Pratt automaton per string makes that O(1) per
    character and string.

    Attributes:
        matched: the stop string that was found, or None.
    """

    def __init__(self, stop: Sequence[str], *, include_in_output: bool = False) -> None:
        self.matched: str | None = None
        self._include = include_in_output
        self._stop = tuple(sorted(set(stop), key=len, reverse=True))
        self._failures = [_failure_function(string) for string in self._stop]
        self._states = [0] * len(self._stop)
        self._held = ""

    def push(self, text: str, *, check: bool = True) -> str:
        """Add text; returns what may be shown. After a match: the rest of the output, and "" from then on.

        Args:
            text: the new text.
            check: False while the output is shorter than min_tokens: a complete match is then ignored.
        """
        if self.matched is not None:
            return ""
        if not self._stop:
            return text
        pending = self._held + text
        start = len(self._held)
        for position, char in enumerate(text, start + 1):
            match = self._advance(char)
            if match is not None and check:
                self.matched, self._held = match, ""
                return pending[: position if self._include else position - len(match)]
        # With include_in_output no text can turn out to be unwanted.
        n_hold = 0 if self._include else max(self._states)
        self._held = pending[len(pending) - n_hold :]
        return pending[: len(pending) - n_hold]

    def finish(self) -> str:
        """Return what was held back; it didn't become a stop string."""
        held, self._held = self._held, ""
        return held

    def _advance(self, char: str) -> str | None:
        match = None
        for i, string in enumerate(self._stop):
            state, failure = self._states[i], self._failures[i]
            while state and string[state] != char:
                state = failure[state - 1]
            if string[state] == char:
                state += 1
            if state == len(string):
                match = match or string  # the strings are sorted, the longest first
                state = failure[state - 1]
            self._states[i] = state
        return match


class TextStream:
    """A request's output as text: tokens in, text that may be shown out.

    Attributes:
        text: all text returned so far.
        matched: the stop string that ended the output, or None.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_token_ids: Sequence[int] = (),
        *,
        stop: Sequence[str] = (),
        include_stop_str_in_output: bool = False,
        skip_special_tokens: bool = True,
    ) -> None:
        self._detokenizer = IncrementalDetokenizer(
            tokenizer, prompt_token_ids, skip_special_tokens=skip_special_tokens
        )
        self._checker = StopChecker(stop, include_in_output=include_stop_str_in_output)
        self._parts: list[str] = []

    def push(self, token_id: int, *, check_stop: bool = True) -> str:
        """Add a token; returns the new text that may be shown. Look at `matched` afterwards."""
        return self._keep(self._checker.push(self._detokenizer.push(token_id), check=check_stop))

    def extend(self, token_ids: Sequence[int]) -> str:
        """`push` of each at once (128 tokens: 23 instead of 75 us); for an output without stop strings, whose match
        must end at its token."""
        return self._keep(self._detokenizer.extend(token_ids))

    def finish(self, *, check_stop: bool = True) -> str:
        """End the output; returns the text that was held back. It may complete a stop string: look at
        `matched`."""
        tail = self._checker.push(self._detokenizer.finish(), check=check_stop)
        return self._keep(tail + self._checker.finish())

    @property
    def matched(self) -> str | None:
        return self._checker.matched

    @property
    def text(self) -> str:
        if len(self._parts) > 1:
            self._parts = ["".join(self._parts)]
        return self._parts[0] if self._parts else ""

    def _keep(self, text: str) -> str:
        if text:
            self._parts.append(text)
        return text


def _failure_function(string: str) -> tuple[int, ...]:
    """For each prefix of `string`, the length of its longest proper prefix that is also its suffix."""
    failure = [0] * len(string)
    state = 0
    for i in range(1, len(string)):
        while state and string[state] != string[i]:
            state = failure[state - 1]
        if string[state] == string[i]:
            state += 1
        failure[i] = state
    return tuple(failure)


def _byte_of_char() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 bytes stand for themselves, the other 68 for U+0100 and up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHAR = _byte_of_char()


def _to_bytes(token: str) -> bytes:
    try:
        return bytes(map(_BYTE_OF_CHAR.__getitem__, token))
    except KeyError:  # an added token, written as itself
        return token.encode("utf-8", "replace")


def _guarded(call: Any, error: type[RequestError] | type[TokenizerError], message: str) -> Any:
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


def _load(path: Path) -> RustTokenizer:
    data = read_file(path, MAX_TOKENIZER_BYTES)
    # Not at the top: it costs 30 ms, and `import pace` needs no tokenizer.
    from tokenizers import Tokenizer as RustTokenizer

    rust: RustTokenizer = _guarded(
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


def _audit(path: Path, rust: RustTokenizer) -> None:
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


def _decoder_is_byte_level(rust: RustTokenizer) -> bool:
    if rust.decoder is None:
        return False
    kinds = [item.get("type") for item in _flatten(json.loads(rust.decoder.__getstate__()))]
    return [kind for kind in kinds if kind != "Sequence"] == ["ByteLevel"]


def _read_config(directory: Path, name: str) -> dict[str, Any]:
    path = checkpoint_file(directory, name)
    return {} if path is None else read_json(path)


def _special_tokens(directory: Path, config: dict[str, Any]) -> dict[str, str]:
    """Named special tokens of tokenizer_config.json, else of the older special_tokens_map.json."""
    older = {} if "eos_token" in config else _read_config(directory, "special_tokens_map.json")
    tokens: dict[str, str] = {}
    for name in _SPECIAL_NAMES:
        value = config.get(name, older.get(name))
        if isinstance(value, dict):  # a serialised AddedToken
            value = value.get("content")
        if value is None:
            continue
        if not isinstance(value, str):
            raise TokenizerError(
                f"{directory / 'tokenizer_config.json'}: {name} is {show(value)}, expected a string"
            )
        tokens[name] = value
    return tokens
