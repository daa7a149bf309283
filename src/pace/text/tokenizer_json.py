"""Reading `tokenizer.json` into the `tokenizers` library, without trusting it."""

from __future__ import annotations

import json
from functools import partial
from typing import TYPE_CHECKING, Any

from pace.checkpoint.config_json import parse_json
from pace.errors import CheckpointError, RequestError, TokenizerError, show
from pace.log import logger
from pace.text.audit import doubts, flatten
from pace.text.probe import probe

if TYPE_CHECKING:
    from tokenizers import Tokenizer as RustTokenizer

__all__ = ["decoder_kinds", "guarded", "load"]

MAX_TOKENIZER_BYTES = 128 << 20  # the largest in use (262k tokens, indented) is 33 MB
MAX_TEMPLATE_TOKENS = 64  # special tokens that the post-processor adds to a prompt


class NoThreads(Exception):
    """The Rust library could not start the threads that it wanted to use; calls for one text need none."""


def guarded(call: Any, error: type[RequestError] | type[TokenizerError], message: str) -> Any:
    """Call into the Rust library; what it raises becomes `error`, or NoThreads where that is the reason."""
    try:
        return call()
    except Exception as cause:
        raise error(f"{message}: {cause}") from None
    except BaseException as cause:
        # A Rust panic is not an Exception, and would pass through every handler above this one.
        if type(cause).__name__ != "PanicException":
            raise
        if "ThreadPoolBuildError" in str(cause):
            raise NoThreads from None
        raise error(f"{message}: internal error of the tokenizers library: {cause}") from None


def load(path: str, data: bytes, *, trusted: bool = False) -> RustTokenizer:
    """Parse a file, with truncation, padding and what it adds to a prompt checked or switched off.

    Args:
        path: how messages call it.
        data: its bytes.
        trusted: skip the probe of what is unusual.

    Raises:
        TokenizerError: malformed, harmful, or with a setting that would change prompts.
    """
    if not trusted:
        _probe_what_is_unusual(path, data)
    # Not at the top: it costs 30 ms, and `import pace` needs no tokenizer.
    from tokenizers import Tokenizer as RustTokenizer

    rust: RustTokenizer = guarded(
        partial(RustTokenizer.from_buffer, data), TokenizerError, f"{path}: cannot be read"
    )
    _warn_of_other_ids(path, data, rust)
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


def _warn_of_other_ids(path: str, data: bytes, rust: RustTokenizer) -> None:
    """The library gives added tokens the next free ids, whatever the file says, and so does all that is built on it.

    Such a model may have been trained with either, so it is not refused, but its rows of the embedding may be others.
    """
    for token in _stated_added_tokens(data):
        content, stated = (token.get("content"), token.get("id")) if isinstance(token, dict) else (None, None)
        given = rust.token_to_id(content) if isinstance(content, str) else stated
        if given != stated:
            logger.warning(
                "%s: says that the added token %s has id %s, but gets id %s, here as in transformers",
                path,
                show(content),
                show(stated),
                given,
            )
            return


def _stated_added_tokens(data: bytes) -> list[Any]:
    """The list under "added_tokens" as the file has it, without parsing the vocabulary."""
    at = data.find(b'"added_tokens"')
    start, stop = data.find(b"[", at), data.find(b'"vocab"', at)
    if at < 0 or start < 0:
        return []
    try:
        text = data[start : stop if stop > start else len(data)].decode("utf-8", "replace")
        tokens = json.JSONDecoder().raw_decode(text)[0]
    except (ValueError, RecursionError):
        return []  # another layout
    return tokens if isinstance(tokens, list) else []


def _probe_what_is_unusual(path: str, data: bytes) -> None:
    """Warn of what is unusual, and refuse it where it does harm."""
    unusual = doubts(data)
    if not unusual:
        return
    try:
        parse_json(data, path)  # what is no JSON needs no child to be refused
    except CheckpointError as error:
        raise TokenizerError(error) from None
    named = ", ".join(unusual[:3])
    harm = probe(data)
    if harm is not None:
        raise TokenizerError(
            f"{path}: has {named}, and {harm}; if you trust this file, load with trust_tokenizer"
        )
    logger.warning("%s: has %s; it was tried on hostile texts and did no harm", path, named)


def decoder_kinds(rust: RustTokenizer) -> list[str]:
    """The types of a tokenizer's decoders, in order."""
    if rust.decoder is None:
        return []
    kinds = [str(item.get("type")) for item in flatten(json.loads(rust.decoder.__getstate__()))]
    return [kind for kind in kinds if kind != "Sequence"]
