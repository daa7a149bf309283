"""Text to token ids and back: a wrapper of `tokenizers`."""

from __future__ import annotations

import codecs
from collections.abc import Collection, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import numpy.typing as npt

from pace.checkpoint import ModelFiles, model_files
from pace.errors import PromptTooLongError, RequestError, TokenizerError, show
from pace.log import logger
from pace.text.added_tokens import ANCHOR, byte_form, literal_tokens
from pace.text.tokenizer_json import MAX_TOKENIZER_BYTES, NoThreads, decoder_kinds, guarded, load
from pace.vllm_names import TOKENIZER_NAMES, refuse_attribute

if TYPE_CHECKING:
    from tokenizers import Tokenizer as RustTokenizer

__all__ = ["MAX_CHAR_TOKENS", "Tokenizer"]

MAX_CHAR_TOKENS = 3  # before the one that completes a character: it has at most four bytes

PROMPT_SLACK_BYTES = 1024
NORMALIZER_SHRINKS = 4  # NFC makes 3 bytes of 9 (Hangul), and some replacements do more

_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """The tokenizer of one checkpoint.

    Attributes:
        directory: the folder that it was read from, or the GGUF file.
        vocab_size: rows of the model's embedding; ids of added tokens may lie beyond them, and can't be used.
        unused_ids: i32 [n]: ids below vocab_size that have no token, as where the embedding is padded.
        max_prompt_bytes: longest text that `encode` takes, in bytes of UTF-8: `max_model_len` of the longest token.
        special_tokens: {"bos_token": "<s>", …}, what chat templates see.
        config: the parsed tokenizer_config.json, {} where there is none.
        bos_token_id: id of bos_token, None where there is none.
        eos_token_id: id of eos_token, None where there is none.
        byte_level: whether tokens stand for bytes (GPT-2, Llama 3, Qwen), which makes detokenisation exact.
    """

    def __init__(
        self,
        directory: str | Path | ModelFiles,
        *,
        vocab_size: int,
        max_model_len: int,
        trust_patterns: bool = False,
    ) -> None:
        """Load `tokenizer.json`, after a probe where it is unusual, and `tokenizer_config.json` where there is one.

        Args:
            directory: the folder that holds them, a GGUF file, or the files of one.
            vocab_size: rows of the model's embedding; a token of the vocabulary beyond them is refused, an added one can't
                be used.
            max_model_len: tokens of the longest sequence; bounds the texts that `encode` takes.
            trust_patterns: skip the probe of unusual patterns and components.

        Raises:
            TokenizerError: missing, malformed, found harmful by the probe, or contradicting `vocab_size`.
            CheckpointError: a file isn't regular, is too large, or is a link out of the folder.
        """
        files = model_files(directory)
        self.directory = files.path
        data = files.read("tokenizer.json", MAX_TOKENIZER_BYTES)
        if data is None:
            raise TokenizerError(f"{files.path}: no tokenizer.json; convert the tokenizer to the fast format")
        path = files.where("tokenizer.json")
        self._rust = load(path, data, trusted=trust_patterns)
        del data
        vocabulary = self._rust.get_vocab(with_added_tokens=True)
        added = self._rust.get_added_tokens_decoder()
        _check_vocabulary(path, vocabulary, added, vocab_size)
        self.vocab_size = vocab_size
        self.config = files.json("tokenizer_config.json") or {}
        self.unused_ids = _unused_ids([*vocabulary.values(), *_listed_ids(self.config)], vocab_size)
        kinds = decoder_kinds(self._rust)
        self.byte_level = kinds == ["ByteLevel"]
        self._special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self._literals = literal_tokens(self._rust, kinds)
        self._bytes = {token_id: text.encode() for token_id, text in self._literals.items()}
        # An average would refuse prompts that fit: 2047 tokens of 128 spaces are 262 kB. Encoding takes 0.5 s for a MB.
        shrinks = 1 if self._rust.normalizer is None else NORMALIZER_SHRINKS
        longest = _longest_token_bytes(vocabulary, self.byte_level)
        self.max_prompt_bytes = longest * max_model_len * shrinks + PROMPT_SLACK_BYTES

        self.special_tokens = _special_tokens(files, self.config)
        self.bos_token_id = self._special_id(path, "bos_token", vocabulary)
        self.eos_token_id = self._special_id(path, "eos_token", vocabulary)
        self._prompt_bos_id = _bos_of_prompts(self._rust)
        self._has_threads = True
        self._texts: dict[int, str] = {}

    if not TYPE_CHECKING:  # for a type checker every attribute would exist

        def __getattr__(self, name: str) -> NoReturn:
            refuse_attribute("Tokenizer", name, TOKENIZER_NAMES)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Encode one text without holding the GIL.

        Args:
            text: at most `max_prompt_bytes` of UTF-8.
            add_special_tokens: add what the checkpoint adds to a prompt, such as BOS; off for rendered chats.

        Raises:
            RequestError: not a string, not valid Unicode, or too long.
        """
        return self.encode_batch([text], add_special_tokens=add_special_tokens)[0]

    def encode_chats(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode what a chat template has rendered, with exactly one BOS where the tokenizer gives prompts one.

        Most templates write it themselves; some leave it to the tokenizer, and some write it twice. Errors as `encode`.
        """
        result = []
        for ids in self.encode_batch(texts, add_special_tokens=False):
            n_bos = next((i for i, token_id in enumerate(ids) if token_id != self._prompt_bos_id), len(ids))
            result.append(ids if self._prompt_bos_id is None else [self._prompt_bos_id, *ids[n_bos:]])
        return result

    def encode_batch(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        """Encode several texts, in parallel and without holding the GIL; arguments and errors as `encode`.

        A text that begins with BOS, as a rendered chat does, is given no second one.
        """
        for text in texts:
            self._check_text(text)
        result = self._encode_all(list(texts), add_special_tokens)
        bos = self._prompt_bos_id
        if add_special_tokens and bos is not None:
            result = [ids[1:] if ids[:2] == [bos, bos] else ids for ids in result]
        return result

    def _encode_all(self, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
        message = "the tokenizer failed on this text"
        if self._has_threads:
            # encode() would hold the GIL: a 3 MB prompt froze every other thread for 1.5 s; this one, for 7 ms.
            call = partial(self._rust.encode_batch_fast, texts, add_special_tokens=add_special_tokens)
            try:
                return [encoding.ids for encoding in guarded(call, RequestError, message)]
            except NoThreads:
                self._has_threads = False
                logger.warning(
                    "the tokenizer can't start threads, texts are encoded one by one, under the GIL"
                )
        encode = partial(self._rust.encode, add_special_tokens=add_special_tokens)
        return [guarded(partial(encode, text), RequestError, message).ids for text in texts]

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Decode a whole sequence; invalid UTF-8 becomes U+FFFD.

        Raises:
            RequestError: an id is out of range.
        """
        self.check_ids(token_ids)
        shown = [int(i) for i in token_ids if not (skip_special_tokens and self.is_special(i))]
        if self.byte_level:
            return b"".join(map(self.token_bytes, shown)).decode("utf-8", "replace")
        return self.decode_window(shown)

    def decode_token(self, token_id: int) -> str:
        """Return one token's own text, special tokens included; "" for ids that have no token."""
        if self.byte_level:
            return self.token_bytes(token_id).decode("utf-8", "replace")
        return self.decode_window([token_id])

    def decode_next(self, token_ids: Sequence[int], before: Sequence[int] = ()) -> list[str]:
        """What each of several tokens adds to a text that ends in the tokens `before`.

        A character that is split over tokens belongs to the one that completes it, the others have "": the
        texts of a sequence's tokens, joined, are its text.

        Args:
            token_ids: the alternatives.
            before: the tokens before them; the last `MAX_CHAR_TOKENS` are enough.
        """
        before = [token_id for token_id in before if not self.is_special(token_id)][-MAX_CHAR_TOKENS:]
        if not self.byte_level:
            return [self._decode_behind(token_id, before) for token_id in token_ids]
        utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        utf8.decode(b"".join(map(self.token_bytes, before)))
        start, _ = utf8.getstate()
        if not start:  # as nearly always: 21 alternatives in 4 us instead of 27
            return [self._text_alone(token_id) for token_id in token_ids]
        return [
            self._text_alone(i) if self.is_special(i) else _whole_characters(start + self.token_bytes(i))
            for i in token_ids
        ]

    def _text_alone(self, token_id: int) -> str:
        text = self._texts.get(token_id)
        if text is None:
            text = self._texts[token_id] = _whole_characters(self.token_bytes(token_id))
        return text

    def _decode_behind(self, token_id: int, before: Sequence[int]) -> str:
        text = self.decode_window([token_id])
        if not self._is_fragment(token_id, text):
            return text
        # The shortest run of bytes that is valid with this one is the character.
        for n in range(1, len(before) + 1):
            if not self._is_fragment(before[-n], self.decode_window([before[-n]])):
                break
            text = self.decode_window([*before[-n:], token_id])
            if not text.endswith("\ufffd"):
                return text
        return ""

    def _is_fragment(self, token_id: int, text: str) -> bool:
        """Whether the token that alone decodes to `text` is a part of a character."""
        return text.endswith("\ufffd") and "\ufffd" not in (self._rust.id_to_token(token_id) or "")

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes that a token of a byte-level tokenizer stands for; b"" for ids that have no
        token."""
        data = self._bytes.get(token_id)
        if data is None:
            token = self._rust.id_to_token(token_id) or ""
            data = byte_form(token)
            if data is None:  # an added token, written as itself
                data = token.encode("utf-8", "replace")
            self._bytes[token_id] = data
        return data

    def to_json(self) -> str:
        """What tokenizer.json says."""
        text: str = self._rust.to_str()
        return text

    def is_special(self, token_id: int) -> bool:
        """Whether `skip_special_tokens` leaves this token out."""
        return token_id in self._special_ids

    def vocabulary(self) -> dict[str, int]:
        """Every token with its id, added ones included, as the file spells them."""
        tokens: dict[str, int] = self._rust.get_vocab(with_added_tokens=True)
        return tokens

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
            raise PromptTooLongError(
                f"the prompt has {n_bytes} bytes or more, expected at most {self.max_prompt_bytes}; "
                "shorten it or raise max_model_len"
            )

    def decode_window(self, token_ids: list[int]) -> str:
        """Decode a few tokens together, special ones included; for tokenizers that aren't byte-level."""
        if self._literals.keys().isdisjoint(token_ids):
            call = partial(self._rust.decode, token_ids, skip_special_tokens=False)
        else:
            call = partial(self._decode_around_literals, token_ids)
        text: str = guarded(call, TokenizerError, "the tokenizer failed on the model's output")
        return text

    def _decode_around_literals(self, token_ids: list[int]) -> str:
        """Give the decoder only what is between the literal tokens, behind an anchor that keeps the space of a first
        word."""
        parts: list[str] = []
        run: list[str] = []
        for token_id in token_ids:
            literal = self._literals.get(token_id)
            if literal is None:
                run.append(self._rust.id_to_token(token_id) or "")
                continue
            parts += [self._decode_run(run, bool(parts)), literal]
            run = []
        return "".join([*parts, self._decode_run(run, bool(parts))])

    def _decode_run(self, tokens: list[str], anchored: bool) -> str:
        if not tokens:
            return ""
        text: str = self._rust.decoder.decode([ANCHOR, *tokens] if anchored else tokens)
        return text[len(ANCHOR) :] if anchored else text

    def _special_id(self, path: str, name: str, vocabulary: dict[str, int]) -> int | None:
        token = self.special_tokens.get(name)
        if token is None:
            return None
        if token not in vocabulary:
            raise TokenizerError(f"{path}: {name} is {show(token)}, which isn't in the vocabulary")
        return vocabulary[token]


def _unused_ids(used: list[int], vocab_size: int) -> npt.NDArray[np.int32]:
    is_unused = np.ones(vocab_size, dtype=np.bool_)
    ids = np.array(used, dtype=np.int64)
    is_unused[ids[ids < vocab_size]] = False
    return np.flatnonzero(is_unused).astype(np.int32)


def _listed_ids(config: dict[str, Any]) -> list[int]:
    """Ids of tokenizer_config.json's added_tokens_decoder; some files list tokens there alone."""
    listed = config.get("added_tokens_decoder")
    keys = listed if isinstance(listed, dict) else ()
    return [int(key) for key in keys if key.isascii() and key.isdigit() and len(key) < 10]


def _bos_of_prompts(rust: RustTokenizer) -> int | None:
    """The token that the post-processor puts before a prompt; None where it puts none, or several."""
    if not rust.num_special_tokens_to_add(False):
        return None
    # An empty prompt would not tell what is put before it from what is put behind.
    try:
        bare, full = (
            guarded(partial(rust.encode, "a", add_special_tokens=special), RequestError, "").ids
            for special in (False, True)
        )
    except RequestError:  # such as no token for "a", and none for the unknown
        return None
    return full[0] if bare and full[1 : 1 + len(bare)] == bare and full[:1] != bare[:1] else None


def _check_vocabulary(path: str, vocabulary: dict[str, int], added: Collection[int], vocab_size: int) -> None:
    """Refuse the tokenizer of another model; warn of added tokens that can't be used."""
    if not vocabulary:
        raise TokenizerError(f"{path}: the vocabulary is empty")
    beyond = sorted((token_id, token) for token, token_id in vocabulary.items() if token_id >= vocab_size)
    for token_id, token in reversed(beyond):
        if token_id not in added:
            raise TokenizerError(
                f"{path}: {show(token)} has id {token_id}, but the model's embedding has {vocab_size} rows; this is "
                "the tokenizer of another model"
            )
    if beyond:  # a [PAD] that training added; requests that use it are refused
        logger.warning(
            "%s: %d added tokens can't be used, the first is %s: its id %d is beyond the embedding's %d rows",
            path,
            len(beyond),
            show(beyond[0][1]),
            beyond[0][0],
            vocab_size,
        )


def _whole_characters(data: bytes) -> str:
    """The text of `data` without a character that is incomplete at its end."""
    return codecs.getincrementaldecoder("utf-8")("replace").decode(data)


def _longest_token_bytes(vocabulary: dict[str, int], byte_level: bool) -> int:
    """Bytes of text that one token stands for, at most."""
    longest = max(map(len, vocabulary))
    # Characters have one to four bytes; those of byte-level tokens that aren't ASCII stand for one each.
    candidates = (token for token in vocabulary if 4 * len(token) >= longest)
    return max(
        len(token if byte_level and byte_form(token) is not None else token.encode()) for token in candidates
    )


def _special_tokens(files: ModelFiles, config: dict[str, Any]) -> dict[str, str]:
    """Named special tokens of tokenizer_config.json, else of the older special_tokens_map.json."""
    older = {} if "eos_token" in config else files.json("special_tokens_map.json") or {}
    tokens: dict[str, str] = {}
    for name in _SPECIAL_NAMES:
        value = config.get(name, older.get(name))
        if isinstance(value, dict):  # a serialised AddedToken
            value = value.get("content")
        if value is None:
            continue
        if not isinstance(value, str):
            raise TokenizerError(
                f"{files.where('tokenizer_config.json')}: {name} is {show(value)}, expected a string"
            )
        tokens[name] = value
    return tokens
