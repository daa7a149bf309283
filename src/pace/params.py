"""`SamplingParams`: how one request is sampled, with vLLM's names, defaults and meanings."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from typing import Any

from pace.errors import RequestError, show
from pace.speculative_config import MAX_DRAFT_TOKENS
from pace.structured_outputs import StructuredOutputsParams
from pace.vllm_names import SAMPLING_FIELDS, takes_class

__all__ = ["GREEDY_EPS", "MAX_LISTED_IDS", "MAX_N", "RequestOutputKind", "SamplingParams"]

GREEDY_EPS = 1e-5  # a temperature below this is greedy (vLLM's _SAMPLING_EPS)
MAX_N = 128  # completions of one request; every one takes a sequence's share of the KV cache
MAX_STOP_STRINGS = 64
MAX_STOP_LEN = 1024  # characters of one stop string
MAX_STOP_TOKEN_IDS = 1024
MAX_BAD_WORDS = 1024
MAX_BAD_WORD_LEN = 1024  # characters of one bad word
MAX_LISTED_IDS = 1 << 18  # of logit_bias and allowed_token_ids: the largest vocabulary in use
MAX_BIAS = 100.0  # OpenAI's range: enough to force or to forbid a token
MAX_INT32 = (1 << 31) - 1


class RequestOutputKind(Enum):
    """What the outputs of a streamed request hold, with vLLM's names and values."""

    CUMULATIVE = 0
    """Everything so far, in every output."""
    DELTA = 1
    """What is new since the output before: text, token ids and logprobs; joined they are the whole. An output that
    only ends a completion may be empty."""
    FINAL_ONLY = 2
    """One output, when all completions have ended."""


class Unset:
    """Marks a number as one that nobody gave: the field's default, until a checkpoint has a better one."""

    __slots__ = ()


class UnsetFloat(Unset, float):
    """An unset float; otherwise a float like any other."""

    __slots__ = ()


class UnsetInt(Unset, int):
    """An unset int; otherwise an int like any other."""

    __slots__ = ()


class Biases(Mapping[int, float]):
    """A `logit_bias` that never changes; a mapping proxy could not be copied or pickled."""

    def __init__(self, values: Mapping[int, float]) -> None:
        self._values = dict(values)

    def __getitem__(self, token_id: int) -> float:
        return self._values[token_id]

    def __iter__(self) -> Iterator[int]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return repr(self._values)


@takes_class(SAMPLING_FIELDS, RequestError)
@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to sample one request. All fields are checked on construction; an instance never changes.

    Names and meanings are vLLM's. Fields of vLLM that pace lacks are taken where their value asks for nothing, and answered
    by name otherwise. vLLM takes a checkpoint's sampling defaults only where a request has no parameters at all; here they
    fill every field that is unset, unless the engine's generation_config is "vllm".

    Attributes:
        n: completions of the prompt, in [1, 128]. They differ by their random numbers only, so greedy
            sampling takes 1.
        temperature: divides the logits; 0 (or below 1e-5) is greedy. In [0, 100].
        top_k: keep the k most probable tokens; 0 or -1 keeps all.
        top_p: keep the smallest set of tokens whose probability reaches this. In (0, 1].
        min_p: keep tokens at least this probable relative to the most probable one. In [0, 1].
        presence_penalty: subtracted once from the logit of each token already in the output. In [-2, 2].
        frequency_penalty: subtracted per occurrence in the output. In [-2, 2].
        repetition_penalty: divides positive and multiplies negative logits of tokens in prompt or output. In
            [0.01, 100].
        seed: makes the request's random numbers its own and repeatable; None or -1: derived from the engine's
            seed. The completions of one request have distinct numbers of the same seed.
        stop: strings that end the output (at most 64, of 1 to 1024 characters).
        stop_token_ids: token ids that end the output, besides the model's EOS ids.
        ignore_eos: don't stop at the model's EOS ids.
        max_tokens: output tokens at most; None: until the engine's max_model_len.
        min_tokens: no EOS, stop id or stop string ends the output before so many tokens; EOS is not drawn before,
            also where it is ignored.
        logprobs: also return this many most probable tokens at each position (0: only the sampled one; None:
            none; -1: the whole vocabulary), as far as the engine's max_logprobs allows.
        prompt_logprobs: the same for each token of the prompt but the first, which nothing predicts.
        logit_bias: token ids, also as texts of digits, to numbers that are added to their logits; what is outside
            [-100, 100] becomes the nearer end.
        bad_words: strings that the output must not contain, as the tokenizer writes them alone and after a
            space; the last token of each is not drawn behind its other ones. Another division of the same
            letters into tokens is not recognised, as in vLLM.
        allowed_token_ids: only these tokens can be drawn; None: all.
        detokenize: produce text; without it only token ids.
        skip_special_tokens: leave special tokens out of the text.
        spaces_between_special_tokens: True: as the tokenizer decodes them. False changes nothing where they are left
            out, or where the tokenizer is byte-level; elsewhere it is refused.
        include_stop_str_in_output: keep the stop string, or the stop token's text, at the end of the text.
        output_kind: what the outputs of a streamed request hold.
        speculative: "auto": guessed tokens are verified as far as that pays; "off": none are; K: K in every step, 0 .. 32
            and at most the engine's num_speculative_tokens. It changes how fast an output comes, never the output.
        structured_outputs: what the output must be like: `StructuredOutputsParams`, or a mapping of its fields. In a chat
            it holds for the final answer, not for the reasoning before it. Needs the extra pace[structured].

    A checkpoint may have defaults of its own for the fields whose default is an `Unset`; they apply where the caller gave
    no value, and `explicit` says where he did. Copies of every kind keep the difference: `clone`, `copy`, `pickle` and
    `dataclasses.replace`.

    Raises:
        RequestError: a field has the wrong type or is out of range; the message names it.
    """

    n: int = 1
    temperature: float = UnsetFloat(1.0)
    top_k: int = UnsetInt(0)
    top_p: float = UnsetFloat(1.0)
    min_p: float = UnsetFloat(0.0)
    presence_penalty: float = UnsetFloat(0.0)
    frequency_penalty: float = UnsetFloat(0.0)
    repetition_penalty: float = UnsetFloat(1.0)
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = UnsetInt(16)
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: Mapping[int, float] | None = field(default=None, hash=False)  # a mapping has no hash
    bad_words: Sequence[str] | None = None
    allowed_token_ids: Sequence[int] | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    speculative: str | int = "auto"
    structured_outputs: StructuredOutputsParams | Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        def put(name: str, value: object) -> None:
            mark: Any = type(getattr(self, name))
            object.__setattr__(self, name, mark(value) if issubclass(mark, Unset) else value)

        put("n", _int("n", self.n, 1, MAX_N))
        put("temperature", _float("temperature", self.temperature, 0.0, 100.0))
        put("top_k", max(0, _int("top_k", self.top_k, -1, MAX_INT32)))
        put("top_p", _float("top_p", self.top_p, 0.0, 1.0))
        if self.top_p == 0.0:
            raise RequestError("top_p is 0.0, expected a number above 0 and up to 1; temperature=0 is greedy")
        put("min_p", _float("min_p", self.min_p, 0.0, 1.0))
        put("presence_penalty", _float("presence_penalty", self.presence_penalty, -2.0, 2.0))
        put("frequency_penalty", _float("frequency_penalty", self.frequency_penalty, -2.0, 2.0))
        put("repetition_penalty", _float("repetition_penalty", self.repetition_penalty, 0.01, 100.0))
        if self.seed is not None:
            seed = _int("seed", self.seed, -(1 << 63), (1 << 63) - 1)
            put("seed", None if seed == -1 else seed)
        put("stop", _stop_strings(self.stop))
        put("stop_token_ids", _token_ids("stop_token_ids", self.stop_token_ids, MAX_STOP_TOKEN_IDS))
        put("logit_bias", _logit_bias(self.logit_bias))
        put("bad_words", _bad_words(self.bad_words))
        if self.allowed_token_ids is not None:
            allowed = _token_ids("allowed_token_ids", self.allowed_token_ids, MAX_LISTED_IDS)
            if not allowed:
                raise RequestError("allowed_token_ids is empty, expected at least one id; None allows all")
            put("allowed_token_ids", allowed)
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"{name} is {show(getattr(self, name))}, expected True or False")
        if self.max_tokens is not None:
            put("max_tokens", _int("max_tokens", self.max_tokens, 1, MAX_INT32))
        put("min_tokens", _int("min_tokens", self.min_tokens, 0, MAX_INT32))
        for name in ("logprobs", "prompt_logprobs"):
            given = getattr(self, name)
            if given is not None:  # True: as in OpenAI's chat requests
                put(name, _int(name, 1 if given is True else given, -1, MAX_INT32))
        if not isinstance(self.output_kind, RequestOutputKind):
            raise RequestError(
                f"output_kind is {show(self.output_kind)}, expected RequestOutputKind.CUMULATIVE, DELTA or "
                "FINAL_ONLY"
            )
        if not isinstance(self.speculative, str):
            put("speculative", _int("speculative", self.speculative, 0, MAX_DRAFT_TOKENS))
        elif self.speculative not in ("auto", "off"):
            raise RequestError(
                f'speculative is {show(self.speculative)}, expected "auto", "off" or a number of tokens'
            )
        put("structured_outputs", StructuredOutputsParams.parse(self.structured_outputs))
        self._check_together()

    def _check_together(self) -> None:
        """Refuse what is valid alone and contradicts itself together."""
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(f"min_tokens is {self.min_tokens}, above max_tokens {self.max_tokens}")
        if self.stop and not self.detokenize:
            raise RequestError("stop strings need text to search; leave detokenize on or use stop_token_ids")
        if self.n > 1 and self.greedy:
            raise RequestError(
                f"n is {self.n} with temperature {self.temperature:g}, but greedy completions are all the same; "
                "use n=1 or a temperature above 0"
            )
        if (
            self.min_tokens
            and self.allowed_token_ids
            and set(self.allowed_token_ids) <= set(self.stop_token_ids or ())
        ):
            raise RequestError(
                f"min_tokens is {self.min_tokens}, but every id of allowed_token_ids is a stop id, which can't be "
                "drawn before; allow another id"
            )

    @staticmethod
    def from_optional(**values: Any) -> SamplingParams:
        """Parameters of which None means unset, as they come from requests with optional fields; but max_tokens=None
        means no bound, as in the constructor.

        Raises:
            RequestError: as the constructor.
        """
        given = {name: value for name, value in values.items() if value is not None or name == "max_tokens"}
        return SamplingParams(**given)

    def clone(self, **changes: Any) -> SamplingParams:
        """A copy with some fields changed; the others stay as they are, unset ones unset.

        Raises:
            RequestError: an invalid value or combination.
        """
        return replace(self, **changes)

    @property
    def explicit(self) -> frozenset[str]:
        """Names of the fields that differ from their defaults or were given; the others may take the checkpoint's."""
        return frozenset(
            f.name
            for f in fields(self)
            if not isinstance(value := getattr(self, f.name), Unset)
            and (isinstance(f.default, Unset) or value != _EMPTY.get(f.name, f.default))
        )

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is always taken."""
        return self.temperature < GREEDY_EPS

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The stop strings, whichever form they were given in."""
        return _stop_strings(self.stop)

    def merged_with(self, defaults: Mapping[str, Any]) -> SamplingParams:
        """Return a copy in which the fields that the caller did not give take their value from `defaults`.

        Args:
            defaults: field names to values, as `checkpoint.generation_config` reads them.

        Raises:
            RequestError: an unknown name in `defaults`, or a combination that is invalid.
        """
        unknown = sorted(set(defaults) - {f.name for f in fields(self)})
        if unknown:
            raise RequestError(f"{show(unknown[0])} is not a sampling parameter")
        return self.clone(**{name: _unset(defaults[name]) for name in set(defaults) - self.explicit})

    def check_vocab(self, vocab_size: int) -> None:
        """Check every token id of the request against the width of the logits.

        Raises:
            RequestError: an id is not below `vocab_size`.
        """
        for name in ("stop_token_ids", "logit_bias", "allowed_token_ids"):
            largest = max(getattr(self, name) or (0,))
            if largest >= vocab_size:
                raise RequestError(f"{name} has {largest}, expected ids below the vocabulary's {vocab_size}")


_FLAGS = (
    "ignore_eos",
    "detokenize",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "include_stop_str_in_output",
)

_EMPTY: Mapping[str, object] = {"stop": (), "stop_token_ids": (), "bad_words": ()}
"""What None becomes."""


def _unset(value: object) -> object:
    """A checkpoint's value, which the caller has not given either."""
    if isinstance(value, bool):
        return value
    return (
        UnsetInt(value)
        if isinstance(value, int)
        else UnsetFloat(value)
        if isinstance(value, float)
        else value
    )


def _float(name: str, value: object, low: float, high: float) -> float:
    try:
        if isinstance(value, (bool, str, bytes)):
            raise TypeError
        number = float(value)  # type: ignore[arg-type]  # numpy scalars too; the except clause takes the rest
    except (TypeError, ValueError, OverflowError):
        raise RequestError(f"{name} is {show(value)}, expected a number from {low:g} to {high:g}") from None
    if math.isnan(number) or not low <= number <= high:
        raise RequestError(f"{name} is {show(value)}, expected a number from {low:g} to {high:g}")
    return number


def _int(name: str, value: object, low: int, high: int) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)  # type: ignore[arg-type]  # numpy integers too
    except TypeError:
        raise RequestError(f"{name} is {show(value)}, expected an integer from {low} to {high}") from None
    if not low <= number <= high:
        raise RequestError(f"{name} is {show(value)}, expected an integer from {low} to {high}")
    return number


def _stop_strings(value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    strings: tuple[object, ...]
    if isinstance(value, str):
        strings = (value,)
    elif isinstance(value, (list, tuple)):
        strings = tuple(value)
    else:
        raise RequestError(f"stop is {show(value)}, expected a string or a list of strings")
    if len(strings) > MAX_STOP_STRINGS:
        raise RequestError(f"stop has {len(strings)} strings, expected at most {MAX_STOP_STRINGS}")
    for string in strings:
        if not isinstance(string, str) or not 1 <= len(string) <= MAX_STOP_LEN:
            raise RequestError(f"stop has {show(string)}, expected strings of 1 to {MAX_STOP_LEN} characters")
    return strings  # type: ignore[return-value]  # the loop checked each


def _token_ids(name: str, value: object, max_len: int) -> tuple[int, ...]:
    if value is None:
        return ()
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise RequestError(f"{name} is {show(value)}, expected a list of token ids")
    if len(value) > max_len:
        raise RequestError(f"{name} has {len(value)} ids, expected at most {max_len}")
    return tuple(_int(f"{name}[{at}]", token_id, 0, MAX_INT32) for at, token_id in enumerate(value))


def _bad_words(value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, (list, tuple)):
        raise RequestError(f"bad_words is {show(value)}, expected a list of strings")
    if len(value) > MAX_BAD_WORDS:
        raise RequestError(f"bad_words has {len(value)} strings, expected at most {MAX_BAD_WORDS}")
    for word in value:
        if not isinstance(word, str) or not 1 <= len(word) <= MAX_BAD_WORD_LEN:
            raise RequestError(
                f"bad_words has {show(word)}, expected strings of 1 to {MAX_BAD_WORD_LEN} characters"
            )
    return tuple(value)


def _logit_bias(value: object) -> Mapping[int, float] | None:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise RequestError(f"logit_bias is {show(value)}, expected a mapping of token ids to numbers")
    if len(value) > MAX_LISTED_IDS:
        raise RequestError(f"logit_bias has {len(value)} ids, expected at most {MAX_LISTED_IDS}")
    biases: dict[int, float] = {}
    for key, bias in value.items():
        # JSON has no other keys than texts.
        number = (
            int(key) if isinstance(key, str) and key.isascii() and key.isdigit() and len(key) <= 10 else key
        )
        token_id = _int("logit_bias key", number, 0, MAX_INT32)
        if token_id in biases:
            raise RequestError(
                f"logit_bias has token id {token_id} twice, as a number and as a text; keep one"
            )
        name = f"logit_bias of {show(key)}"
        biases[token_id] = min(MAX_BIAS, max(-MAX_BIAS, _float(name, bias, -math.inf, math.inf)))
    return Biases(biases)
