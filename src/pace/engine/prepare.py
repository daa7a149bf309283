"""From a prompt and its parameters to a checked `Request`."""

from __future__ import annotations

import operator
import time
from array import array
from collections.abc import Callable
from collections.abc import Sequence as Seq
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pace.engine.pooling import Pool, check_dimensions
from pace.engine.request import Request
from pace.engine.sampler import Constraints, bad_word_ids
from pace.engine.sequence import Sequence
from pace.errors import CapacityError, PromptTooLongError, RequestError, show
from pace.models.plan import I32Array
from pace.params import RequestOutputKind, SamplingParams
from pace.pooling_params import PoolingParams
from pace.structured_outputs import StructuredOutputsParams
from pace.text.preamble import NO_PREAMBLE, Preamble
from pace.text.readers import Reader
from pace.text.stream import TextStream
from pace.text.structure import Grammars, lark_of
from pace.text.tokenizer import Tokenizer

__all__ = ["Preparer"]

MAX_SALT = 1024  # characters
MAX_INT32 = (1 << 31) - 1

READ_ONLY = SamplingParams(
    temperature=0.0, max_tokens=1, speculative="off", output_kind=RequestOutputKind.FINAL_ONLY
)
"""Of a prompt that is read for its hidden states; nothing is drawn."""


class _Rules(NamedTuple):
    """What follows from sampling parameters, whatever the prompt."""

    params: SamplingParams
    stop_ids: frozenset[int]
    constraints: Constraints


class Preparer:
    """Checks requests for one engine; any thread may call it.

    Args:
        vocab_size: token ids must be below it.
        dim: columns of the hidden states.
        max_model_len: longest prompt and output together, in tokens.
        max_cached: tokens that the whole KV cache holds.
        max_logprobs: most log probabilities that a request may ask for; -1: all.
        eos_token_ids: ids that end an output.
        tokenizer: makes text of tokens; None: outputs have token ids only.
        max_draft_tokens: most that a request may want to be guessed at a time; None: nothing is guessed, whatever it wants.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        dim: int = 0,
        max_model_len: int,
        max_cached: int,
        max_logprobs: int = -1,
        eos_token_ids: frozenset[int] = frozenset(),
        tokenizer: Tokenizer | None = None,
        max_draft_tokens: int | None = None,
    ) -> None:
        self.max_draft_tokens = max_draft_tokens
        self.vocab_size = vocab_size
        self.dim = dim
        self.max_model_len = max_model_len
        self.max_cached = max_cached
        self.max_logprobs = vocab_size if max_logprobs == -1 else min(max_logprobs, vocab_size)
        self.eos_token_ids = eos_token_ids
        self.tokenizer = tokenizer
        self._last_rules: tuple[SamplingParams, _Rules] | None = None
        self._grammars = None if tokenizer is None else Grammars(tokenizer, vocab_size, eos_token_ids)

    def prepare(
        self,
        request_id: str,
        prompt_ids: Seq[int] | I32Array,
        params: SamplingParams,
        *,
        prompt: str | None = None,
        stream: bool = False,
        priority: int = 0,
        deadline_s: float | None = None,
        cache_salt: str | None = None,
        reader: Callable[[], Reader] | None = None,
        preamble: Preamble = NO_PREAMBLE,
        forced: str | None = None,
    ) -> Request:
        """Check a request without accepting it, so that a caller can check many before any of them runs.

        Args:
            request_id: unique among the requests in flight.
            prompt_ids: i32 [n], ids below vocab_size, 1 <= n < max_model_len.
            params: complete (the checkpoint's defaults merged in).
            prompt: the prompt's text, to be handed back.
            stream: `step` returns an output after every token, not only the last.
            priority: lower runs first; equals run in order of arrival.
            deadline_s: `time.monotonic()` at which it ends at the latest, with finish_reason "abort" and
                stop_reason "deadline".
            cache_salt: share cached prompts only with requests of the same salt.
            reader: makes what divides each completion's text; None: it is all the answer.
            preamble: what may stand before the answer that structured_outputs describe.
            forced: a Lark grammar that the answer follows in their place.

        Raises:
            RequestError: an invalid prompt or parameter.
            CapacityError: the KV cache can never hold the request.
        """
        ids = self.check_prompt(prompt_ids)
        priority = _check_priority(priority)
        _check_salt(cache_salt)
        room = self.max_model_len - len(ids)
        max_output = room if params.max_tokens is None else min(params.max_tokens, room)
        if params.min_tokens > max_output:
            raise RequestError(
                f"min_tokens is {params.min_tokens}, but behind a prompt of {len(ids)} tokens max_model_len, "
                f"{self.max_model_len}, leaves room for {max_output}"
            )
        if len(ids) + max_output - 1 > self.max_cached:
            raise CapacityError(
                f"the request may grow to {len(ids) + max_output} tokens, the KV cache holds "
                f"{self.max_cached}; lower max_tokens or shorten the prompt"
            )
        rules = self._rules(params)
        lark = self._grammar(rules.params, preamble, forced)
        watched = stream and params.output_kind is not RequestOutputKind.FINAL_ONLY
        seqs = [
            Sequence(
                request_id,
                ids,
                rules.params,
                max_output=max_output,
                index=index,
                priority=priority,
                stop_ids=rules.stop_ids,
                eos_ids=self.eos_token_ids,
                constraints=rules.constraints,
                reader=reader,
                matcher=None if lark is None or self._grammars is None else self._grammars.compile(lark),
                watched=watched,
                cache_salt=cache_salt,
            )
            for index in range(params.n)
        ]
        return Request(
            request_id,
            ids,
            rules.params,
            seqs,
            prompt=prompt,
            stream=stream,
            deadline_s=deadline_s,
            arrival_s=time.monotonic(),
        )

    def prepare_embedding(
        self,
        request_id: str,
        prompt_ids: Seq[int] | I32Array,
        params: PoolingParams,
        *,
        prompt: str | None = None,
        priority: int = 0,
        deadline_s: float | None = None,
        cache_salt: str | None = None,
    ) -> Request:
        """Check a request for an embedding; arguments as those of `prepare`.

        Args:
            prompt_ids: i32 [n], ids below vocab_size, 1 <= n <= max_model_len.
            params: complete: `pooling` is set.

        Raises:
            RequestError, CapacityError: as `prepare`.
        """
        ids = self.check_prompt(prompt_ids, n_output=0)
        priority = _check_priority(priority)
        _check_salt(cache_salt)
        check_dimensions(params, self.dim)
        if len(ids) > self.max_cached:
            raise CapacityError(
                f"the prompt has {len(ids)} tokens, the KV cache holds {self.max_cached}; shorten it"
            )
        rules = self._rules(READ_ONLY)
        seq = Sequence(
            request_id,
            ids,
            rules.params,
            max_output=1,
            priority=priority,
            constraints=rules.constraints,
            cache_salt=cache_salt,
            pool=Pool(params),
        )
        return Request(
            request_id,
            ids,
            rules.params,
            [seq],
            prompt=prompt,
            deadline_s=deadline_s,
            arrival_s=time.monotonic(),
        )

    def _grammar(self, params: SamplingParams, preamble: Preamble, forced: str | None) -> str | None:
        """The grammar of the whole output, compiled; None: it is free."""
        asked = StructuredOutputsParams.parse(params.structured_outputs)
        if asked is not None and forced is not None:
            raise RequestError("structured_outputs and a tool_choice that forces calls exclude each other")
        lark = forced if asked is None else lark_of(asked)
        if lark is None:
            return None
        if self._grammars is None:
            raise RequestError("structured_outputs need a tokenizer, but there is none")
        self._grammars.compile(lark)  # errors of the caller's grammar, without what is put around it
        lark = preamble.before(lark)
        self._grammars.compile(lark)
        return lark

    def check_prompt(self, prompt_ids: Seq[int] | I32Array, n_output: int = 1) -> I32Array:
        """The prompt as i32 [n].

        Args:
            n_output: tokens at least for which max_model_len must have room behind it: 1, or 0.

        Raises:
            PromptTooLongError: max_model_len has no room for it.
            RequestError: it is empty, or has an id outside the vocabulary.
        """
        ids = _as_array(prompt_ids)
        if ids.ndim == 1 and ids.size == 0:
            raise RequestError("the prompt is empty; expected at least one token")
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise RequestError(_explain(prompt_ids))
        most = self.max_model_len - n_output
        if len(ids) > most:
            why = " and the output needs one" if n_output else ""
            raise PromptTooLongError(
                f"the prompt has {len(ids)} tokens, expected at most {most}: max_model_len is {self.max_model_len}{why}; "
                "shorten it or raise max_model_len"
            )
        if ids.min() < 0 or ids.max() >= self.vocab_size:
            at = int(((ids < 0) | (ids >= self.vocab_size)).argmax())
            raise RequestError(
                f"the prompt has token id {ids[at]} at index {at}, expected 0 to {self.vocab_size - 1}"
            )
        return np.array(ids, dtype=np.int32)  # a copy: the caller may change his own

    def _check_logprobs(self, params: SamplingParams) -> SamplingParams:
        """The parameters with -1, the whole vocabulary, as a number."""
        counts = {}
        for name in ("logprobs", "prompt_logprobs"):
            n = getattr(params, name)
            if n is not None and (n == -1 or n > self.max_logprobs):
                n = counts[name] = self.vocab_size if n == -1 else min(n, self.vocab_size)
                if n > self.max_logprobs:
                    raise RequestError(
                        f"{name} is {getattr(params, name)}, expected at most {self.max_logprobs}; raise the engine's "
                        "max_logprobs, -1 allows the whole vocabulary"
                    )
        return params.clone(**counts) if counts else params

    def open_text(self, seq: Sequence) -> None:
        """Give a sequence that starts its output's text, if it wants one."""
        params = seq.params
        if seq.text is None and self.tokenizer is not None and params.detokenize:
            seq.text = TextStream(
                self.tokenizer,
                # Its end tells whether a leading space is real.
                seq.tokens[max(0, seq.n_prompt - 64) : seq.n_prompt].tolist(),
                stop=params.stop_strings,
                include_stop_str_in_output=params.include_stop_str_in_output,
                skip_special_tokens=params.skip_special_tokens,
                reader=None if seq.reader is None else seq.reader(),
            )

    def _rules(self, params: SamplingParams) -> _Rules:
        """What follows from the parameters; thousands of requests usually share one object."""
        last = self._last_rules
        if last is not None and last[0] is params:
            return last[1]
        rules = self._make_rules(params)
        self._last_rules = (params, rules)
        return rules

    def _make_rules(self, params: SamplingParams) -> _Rules:
        params.check_vocab(self.vocab_size)
        params = self._check_logprobs(params)
        asked, most = params.speculative, self.max_draft_tokens
        if most is not None and isinstance(asked, int) and asked > most:
            raise RequestError(
                f"speculative is {asked}, expected at most {most}; raise the engine's num_speculative_tokens"
            )
        tokenizer = self.tokenizer
        stop_ids = frozenset(params.stop_token_ids or ())
        if not params.ignore_eos:
            stop_ids |= self.eos_token_ids
        bad_words: tuple[tuple[int, ...], ...] = ()
        if params.bad_words:
            if tokenizer is None:
                raise RequestError("bad_words need a tokenizer, but there is none; use logit_bias")
            bad_words = bad_word_ids(tokenizer, params.bad_words)
        if tokenizer is None and params.stop and params.detokenize:
            raise RequestError("stop strings need text, but there is no tokenizer; use stop_token_ids")
        joins = not (params.spaces_between_special_tokens or params.skip_special_tokens)
        if joins and tokenizer is not None and params.detokenize and not tokenizer.byte_level:
            raise RequestError(
                "spaces_between_special_tokens is False, which this tokenizer's decoder can't; leave it True"
            )
        return _Rules(params, stop_ids, Constraints(params, stop_ids | self.eos_token_ids, bad_words))


def _check_salt(cache_salt: object) -> None:
    if cache_salt is not None and not (isinstance(cache_salt, str) and 0 < len(cache_salt) <= MAX_SALT):
        raise RequestError(
            f"cache_salt is {show(cache_salt)}, expected a string of 1 to {MAX_SALT} characters"
        )


def _check_priority(priority: object) -> int:
    try:
        if isinstance(priority, (bool, np.bool_)):
            raise TypeError
        return operator.index(priority)  # type: ignore[arg-type]  # numpy integers too
    except TypeError:
        raise RequestError(f"priority is {show(priority)}, expected an integer; lower runs first") from None


def _as_array(prompt_ids: Seq[int] | I32Array) -> npt.NDArray[Any]:
    if isinstance(prompt_ids, (list, tuple)) and prompt_ids and not isinstance(prompt_ids[0], bool):
        # A third of the time that numpy takes to find a common type (1000 ids: 15 and 42 us), and as strict.
        with suppress(TypeError, OverflowError):
            return np.frombuffer(array("i", prompt_ids), dtype=np.int32)
    try:
        return np.asarray(prompt_ids)
    except (ValueError, TypeError, OverflowError):
        return np.empty((0, 0))


def _explain(prompt_ids: object) -> str:
    """Why something is no list of token ids: the element that isn't one, or what it is as a whole."""
    if isinstance(prompt_ids, (list, tuple)):
        for at, token_id in enumerate(prompt_ids):
            if isinstance(token_id, bool) or not isinstance(token_id, (int, np.integer)):
                return f"the prompt has {show(token_id)} at index {at}, expected a token id"
            if not 0 <= token_id <= MAX_INT32:
                return f"the prompt has token id {show(int(token_id))} at index {at}, which no vocabulary has"
    return f"the prompt is {show(prompt_ids)}, expected a flat list of token ids"
