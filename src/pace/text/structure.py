"""Outputs that follow a grammar: which tokens may come next, through llguidance (extra `pace[structured]`)."""

from __future__ import annotations

import json
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from pace.errors import RequestError, one_line
from pace.structured_outputs import StructuredOutputsParams
from pace.text.tokenizer import Tokenizer

__all__ = ["Grammars", "Matcher", "json_rule", "lark_of"]

Mask = npt.NDArray[np.uint32]

MAX_COMPILED = 64
"""Grammars that are kept, with the states that their uses have found: 50 000 of them are 16 to 20 MB."""

MAX_COMPILE_S = 5.0
"""Of a grammar and its first mask, on the caller's thread. The limits below end all that we know of in less than two."""

_TOO_MANY = "too many states"  # in llguidance's message where max_lexer_states are reached

# Of llguidance: what building and one step may cost. A step of 50 000 is about 4 ms; masks of schemas take 2 to 50 us.
_LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 500_000,
    "step_lexer_fuel": 50_000,
    "step_max_items": 20_000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 200_000,
    "verbose_errors": False,
}


class Matcher:
    """Where one output is in its grammar. Everything but `accept` leaves it where it is.

    The states that a grammar's uses find are shared by all of them, and so is the limit on their number. Who comes to it
    goes on behind its own tokens in the grammar compiled anew: others' outputs don't decide whether one fails.

    Args:
        inner: llguidance's, at the beginning.
        vocab_size: columns of the logits.
        renew: another `inner` that shares nothing with it.

    Attributes:
        is_done: the grammar is complete, and nothing can follow.
    """

    def __init__(self, inner: Any, vocab_size: int, renew: Callable[[], Any]) -> None:
        self._inner = inner
        self._n_words = (vocab_size + 31) // 32
        self._renew: Callable[[], Any] | None = renew
        self._accepted: list[int] = []

    @property
    def is_done(self) -> bool:
        return bool(self._inner.is_stopped())

    def mask(self) -> Mask:
        """u32 [ceil(vocab_size / 32)]: bit i % 32 of word i // 32: token i may come next. EOS may where the grammar is
        complete.

        Raises:
            RequestError: a limit of the grammar's cost was reached.
        """
        mask = np.frombuffer(self._inner.compute_bitmask(), dtype=np.uint32)
        if self._is_renewed():
            mask = np.frombuffer(self._inner.compute_bitmask(), dtype=np.uint32)
            self._check()
        return mask[: self._n_words]  # llguidance's may have a word more

    def accept(self, token_id: int) -> None:
        """Go on behind a token.

        Raises:
            RequestError: the grammar does not allow it.
        """
        self._inner.consume_token(token_id)
        if self._is_renewed():
            self._inner.consume_token(token_id)
            self._check()
        self._accepted.append(token_id)

    def validate(self, token_ids: Sequence[int]) -> int:
        """How many of these tokens, from the first one on, the grammar allows."""
        return int(self._inner.validate_tokens(list(token_ids)))

    def masks(self, token_ids: Sequence[int]) -> list[Mask]:
        """`mask` here and behind each of the tokens, up to the first that is not allowed or ends the grammar."""
        masks = [self.mask()]
        n_read = 0
        try:
            for token_id in token_ids:
                if self.is_done or not self.validate([token_id]):
                    break
                self.accept(token_id)
                n_read += 1
                masks.append(self.mask())
        finally:
            if n_read:
                self._inner.rollback(n_read)
                del self._accepted[-n_read:]
        return masks

    def _is_renewed(self) -> bool:
        """Whether the last call failed for others' sake, and shall be made again."""
        if not self._inner.is_error() or self._renew is None or _TOO_MANY not in self._inner.get_error():
            self._check()
            return False
        self._inner, self._renew = self._renew(), None
        for token_id in self._accepted:
            self._inner.consume_token(token_id)
        self._check()
        return True

    def _check(self) -> None:
        if self._inner.is_error():
            raise RequestError(f"the output's grammar can't go on: {one_line(self._inner.get_error(), 300)}")


class Grammars:
    """Compiles grammars for one model; any thread may call it.

    Args:
        tokenizer: the model's.
        vocab_size: columns of the logits.
        eos_token_ids: ids that end an output; none: the tokenizer's own.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Collection[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_ids = sorted(eos_token_ids)
        self._inner: Any = None  # reading 128k tokens takes 0.5 s: at the first use
        self._compiled: OrderedDict[str, Any] = OrderedDict()
        self._lock = threading.Lock()

    def compile(self, lark: str) -> Matcher:
        """A matcher at the beginning of a grammar.

        Raises:
            RequestError: it is malformed or too large, or llguidance is not installed.
        """
        with self._lock:
            prototype = self._compiled.get(lark)
            if prototype is not None:
                self._compiled.move_to_end(lark)
        if prototype is None:
            prototype = self._compile(lark)
            with self._lock:
                self._compiled[lark] = prototype
                while len(self._compiled) > MAX_COMPILED:
                    self._compiled.popitem(last=False)
        with self._lock:
            return Matcher(prototype.deep_copy(), self._vocab_size, partial(self._anew, lark, prototype))

    def _anew(self, lark: str, full: Any) -> Any:
        """The grammar with no states yet; the one that is full of them is not handed out any more."""
        with self._lock:
            if self._compiled.get(lark) is full:
                del self._compiled[lark]
        return self._compile(lark)

    def _compile(self, lark: str) -> Any:
        try:
            from llguidance import LLMatcher, LLTokenizer
            from llguidance._lib import LLParserLimits
        except ImportError:
            raise RequestError(
                "structured outputs need llguidance; install it with: pip install 'pace[structured]'"
            ) from None
        start = time.perf_counter()
        try:
            with self._lock:
                if self._inner is None:
                    self._inner = LLTokenizer(
                        self._tokenizer.to_json(), n_vocab=self._vocab_size, eos_token=self._eos_ids or None
                    )
                    start = time.perf_counter()
            matcher = LLMatcher(self._inner, lark, log_level=0, limits=LLParserLimits(**_LIMITS))
            # The first mask makes what later ones look up: the slowest grammars spend their time here.
            error = matcher.get_error() or (matcher.compute_bitmask() and matcher.get_error())
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as panic:  # of Rust: not an Exception
            error = f"{type(panic).__name__}: {panic}"
        if error:
            raise RequestError(f"the output's grammar can't be compiled: {one_line(_cause(error), 300)}")
        seconds = time.perf_counter() - start
        if seconds > MAX_COMPILE_S:
            raise RequestError(
                f"the output's grammar took {seconds:.1f} s to compile, expected at most {MAX_COMPILE_S:g}; simplify it"
            )
        return matcher


def lark_of(params: StructuredOutputsParams) -> str:
    """A Lark grammar of llguidance whose `start` is the output.

    Raises:
        RequestError: llguidance is needed for it and not installed, or a GBNF grammar is malformed.
    """
    if params.json is not None:
        return json_rule("start", json.loads(str(params.json)))
    if params.json_object:
        return json_rule("start", {"type": "object"})
    if params.choice is not None:
        return "start: " + " | ".join(map(_literal, params.choice))
    if params.regex is not None:
        return f"start: /{_slashes_escaped(params.regex)}/"
    grammar = params.grammar or ""
    if "::=" not in grammar:
        return grammar
    try:
        from llguidance.gbnf_to_lark import gbnf_to_lark

        return str(gbnf_to_lark(grammar))
    except ImportError:
        raise RequestError(
            "structured outputs need llguidance; install it with: pip install 'pace[structured]'"
        ) from None
    except Exception as error:
        raise RequestError(f"structured_outputs.grammar is no GBNF: {one_line(error, 300)}") from None


def json_rule(name: str, schema: Any) -> str:
    """A rule for JSON that a schema allows; white space is bounded, which a model that knows no more writes for ever."""
    if isinstance(schema, dict):
        schema = {"x-guidance": {"whitespace_pattern": r"\n?[ \t]{0,40}"}, **schema}
    return f"{name}: %json {json.dumps(schema)}"


def _literal(text: str) -> str:
    """A text in a Lark grammar."""
    return json.dumps(text, ensure_ascii=False)


def _slashes_escaped(regex: str) -> str:
    """A regular expression as it stands between slashes."""
    out, is_escaped = [], False
    for char in regex:
        out.append("\\/" if char == "/" and not is_escaped else "\\n" if char == "\n" else char)
        is_escaped = char == "\\" and not is_escaped
    return "".join(out)


def _cause(error: str) -> str:
    """llguidance's message without the grammar that it quotes."""
    return error.partition("\n   1 | ")[0]
