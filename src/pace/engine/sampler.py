"""From logits to tokens: sampling parameters as rows of an array, and one C call for the whole batch."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from pace.errors import PaceError, RequestError, show
from pace.models.plan import F32Array, I32Array
from pace.params import SamplingParams

if TYPE_CHECKING:
    from pace.engine.sequence import Sequence
    from pace.text.tokenizer import Tokenizer

__all__ = [
    "Constraints",
    "History",
    "LogprobsFn",
    "LogprobsResult",
    "SampleFn",
    "SampleResult",
    "Sampler",
    "bad_word_ids",
    "derive_seed",
]

MASK64 = (1 << 64) - 1

EMPTY = -2  # `errors` of `ops.sample`: no token is left; every other code but 0 says that the logits hold NaN

NO_IDS: I32Array = np.empty(0, dtype=np.int32)
NO_BIAS: F32Array = np.empty(0, dtype=np.float32)

_NO_HISTORY = (NO_IDS, NO_IDS, NO_IDS, NO_IDS, NO_BIAS, NO_IDS)


class History(NamedTuple):
    """What the sampler must know of one row besides its numbers; see `ops.sample`."""

    prompt: I32Array
    """i32 [n]: prompt ids; empty where no penalty needs them, as the output's."""
    output: I32Array
    """i32 [n]: output ids."""
    banned: I32Array
    """i32 [n]: ids that may not be drawn now."""
    bias_ids: I32Array
    """i32 [n]: distinct ids whose logits `bias` is added to."""
    bias: F32Array
    """f32 [n]."""
    allowed: I32Array
    """i32 [n]: the only ids that may be drawn; empty: all."""
    mask: npt.NDArray[np.uint32] | None = None
    """u32 [ceil(vocab_size / 32)]: bit i % 32 of word i // 32: id i may be drawn; None: all."""


class Constraints:
    """What may be drawn in one sequence, and what its history changes in the logits.

    Args:
        params: penalties, min_tokens, logit_bias, allowed_token_ids.
        stop_ids: token ids that can't be drawn before min_tokens: those that end the output, and EOS.
        bad_word_ids: token sequences that the output must not contain; see `bad_word_ids`.
    """

    __slots__ = (
        "_allowed",
        "_banned",
        "_bias",
        "_bias_ids",
        "_has_penalty",
        "_min_tokens",
        "_phrases",
        "_stops",
        "has_bans",
        "is_free",
    )

    def __init__(
        self,
        params: SamplingParams,
        stop_ids: frozenset[int] = frozenset(),
        bad_word_ids: tuple[tuple[int, ...], ...] = (),
    ) -> None:
        bias = params.logit_bias or {}
        self._has_penalty = (
            params.repetition_penalty != 1.0
            or params.presence_penalty != 0.0
            or params.frequency_penalty != 0.0
        )
        self._min_tokens = params.min_tokens if stop_ids else 0
        banned = {ids[0] for ids in bad_word_ids if len(ids) == 1}
        self._banned = _ids(sorted(banned))
        self._stops = _ids(sorted(banned | stop_ids)) if self._min_tokens else self._banned
        # By the token before the last: most steps end in one look-up, however many bad words there are.
        self._phrases: dict[int, list[tuple[list[int], int]]] = {}
        for ids in bad_word_ids:
            if len(ids) > 1:
                self._phrases.setdefault(ids[-2], []).append((list(ids[:-1]), ids[-1]))
        self._bias_ids = _ids(bias)
        self._bias = np.fromiter(bias.values(), dtype=np.float32, count=len(bias)) if bias else NO_BIAS
        self._allowed = _ids(params.allowed_token_ids or ())
        self.has_bans = bool(self._min_tokens or bad_word_ids or params.allowed_token_ids)
        self.is_free = not (self._has_penalty or self.has_bans or bias)

    def history(self, tokens: I32Array, n_prompt: int, n_tokens: int) -> History | None:
        """What holds for the token after `tokens[:n_tokens]`; None for the usual request, which nothing concerns.

        Args:
            tokens: i32 [>= n_tokens]: prompt and output; the result refers to it.
            n_prompt: how many of them are the prompt.
            n_tokens: how many there are.
        """
        if self.is_free:
            return None
        banned = self._banned if n_tokens - n_prompt >= self._min_tokens else self._stops
        if self._phrases and n_tokens > n_prompt:
            ends = [
                end
                for start, end in self._phrases.get(int(tokens[n_tokens - 1]), ())
                if len(start) <= n_tokens - n_prompt
                and tokens[n_tokens - len(start) : n_tokens].tolist() == start
            ]
            if ends:
                banned = np.concatenate([banned, _ids(ends)])
        if self._has_penalty:
            prompt, output = tokens[:n_prompt], tokens[n_prompt:n_tokens]
        else:
            prompt = output = NO_IDS
            if not (len(banned) or len(self._bias_ids) or len(self._allowed)):
                return None
        return History(prompt, output, banned, self._bias_ids, self._bias, self._allowed)


def _histories(seq: Sequence) -> list[History | None]:
    """What holds for the next token, and for those behind each drafted one."""
    end = seq.n_tokens + 1 + seq.n_draft
    found = [seq.constraints.history(seq.tokens, seq.n_prompt, n) for n in range(seq.n_tokens, end)]
    if seq.matcher is not None:
        # Behind a token that the grammar does not allow there is no mask, and nothing that could become output.
        masks = seq.matcher.masks(seq.tokens[seq.n_tokens : end - 1].tolist())
        for i, mask in enumerate(masks):
            found[i] = (found[i] or History(*_NO_HISTORY))._replace(mask=mask)
    return found


def bad_word_ids(tokenizer: Tokenizer, words: Iterable[str]) -> tuple[tuple[int, ...], ...]:
    """The token sequences that stand for `words`, as vLLM: at the start of a text, and after a space.

    Args:
        tokenizer: the model's.
        words: `SamplingParams.bad_words`.

    Returns:
        Distinct sequences, none of them empty.

    Raises:
        RequestError: a word has no tokens, or the tokenizer refuses it.
    """
    found: dict[tuple[int, ...], None] = {}
    for word in words:
        bare = word.lstrip() or word
        encoded = [tuple(ids) for ids in tokenizer.encode_batch([bare, " " + bare], add_special_tokens=False)]
        if not all(encoded):
            raise RequestError(
                f"bad_words has {show(word)}, which the tokenizer gives no token; leave it out"
            )
        found.update(dict.fromkeys(encoded))
    return tuple(found)


def _ids(values: Iterable[int]) -> I32Array:
    ids = np.array(list(values), dtype=np.int32)
    return ids if len(ids) else NO_IDS


class LogprobsResult(Protocol):
    """What the distributions of R rows say of one token each; see `ops.logprobs`."""

    @property
    def logprobs(self) -> F32Array:
        """f32 [R]: the tokens' log probabilities under the unmodified distribution, where asked for."""
        ...

    @property
    def ranks(self) -> I32Array:
        """i32 [R]: their ranks, 1 for the most probable token."""
        ...

    @property
    def top_ids(self) -> I32Array:
        """i32 [R, K]: the most probable tokens; K is the largest number that a row asked for."""
        ...

    @property
    def top_logprobs(self) -> F32Array:
        """f32 [R, K]: their log probabilities, descending."""
        ...

    @property
    def errors(self) -> I32Array:
        """i32 [R]: not 0 where the row has no distribution, or nothing to draw; see `Sampler.explain`."""
        ...


class SampleResult(LogprobsResult, Protocol):
    """One draw for each of R rows, and its log probability; see `ops.sample`."""

    @property
    def tokens(self) -> I32Array:
        """i32 [R]: the drawn tokens."""
        ...


class SampleFn(Protocol):
    """`ops.sample`, bound to a team."""

    def __call__(
        self, logits: F32Array, params: npt.NDArray[Any], history: Seq[History | None], /
    ) -> SampleResult:
        """Draw one token per row of logits f32 [R, vocab_size]."""
        ...


class LogprobsFn(Protocol):
    """`ops.logprobs`, bound to a team."""

    def __call__(self, logits: F32Array, tokens: I32Array, n: int, /) -> LogprobsResult:
        """Score tokens i32 [R] under logits f32 [R, vocab_size]."""
        ...


class Sampler:
    """Keeps the parameters of the running sequences as rows of a structured array.

    A row is written once, at admission; a step gathers rows and adds the positions.

    Args:
        sample: draws the tokens.
        logprobs: scores the tokens of prompts.
        dtype: `ops.SAMPLE_DTYPE`.
        max_seqs: rows.
        unused_ids: i32 [n]: ids of the padded vocabulary that have no token, and are never drawn.
    """

    def __init__(
        self,
        sample: SampleFn,
        logprobs: LogprobsFn,
        dtype: npt.DTypeLike,
        max_seqs: int,
        *,
        unused_ids: I32Array = NO_IDS,
    ) -> None:
        self._sample = sample
        self._logprobs = logprobs
        self._unused_ids = unused_ids
        self._is_unused = np.zeros(
            int(unused_ids.max(initial=-1)) + 2, dtype=np.bool_
        )  # the last stands for all above
        self._is_unused[unused_ids] = True
        self._rows = np.zeros(max_seqs, dtype=dtype)
        # Of the last step: a batch that only decodes is the same for many, and gathering costs more than it looks, as
        # a step leaves nothing of the interpreter in the caches.
        self._gathered: list[int] = []
        self._params = self._rows[:0]
        self._position = self._params["position"]
        self._free: list[History | None] | None = None  # a None for each, where nothing holds for any of them

    def open(self, seq: Sequence) -> None:
        """Write the parameters of a sequence that was just admitted."""
        params = seq.params
        row = self._rows[seq.row]
        row["temperature"] = 0.0 if params.greedy else params.temperature
        row["top_k"] = params.top_k
        row["top_p"] = params.top_p
        row["min_p"] = params.min_p
        row["repetition_penalty"] = params.repetition_penalty
        row["presence_penalty"] = params.presence_penalty
        row["frequency_penalty"] = params.frequency_penalty
        # -1: not even the drawn token's log probability, which costs a pass over the vocabulary.
        row["n_logprobs"] = -1 if params.logprobs is None else params.logprobs
        row["seed"] = seq.seed
        row["sample_index"] = seq.index
        self._gathered = []

    def sample(self, logits: F32Array, seqs: list[Sequence]) -> SampleResult:
        """Draw the next token of every sequence, and behind each drafted one the token that follows if it is right.

        A draw depends on the request's seed, the completion's index and the token's position only, so that it
        does not matter in which step or beside whom it happens. The result is valid until the next call.

        Args:
            logits: f32 [R, vocab_size], of every sequence one row and one for each drafted token.
            seqs: the sequences.
        """
        if len(logits) != len(seqs):
            return self._sample_drafts(logits, seqs)
        rows = [seq.row for seq in seqs]
        if rows != self._gathered:
            self._params = self._rows[rows]
            self._position = self._params["position"]
            is_free = all(seq.constraints.is_free and seq.matcher is None for seq in seqs)
            self._free = [None] * len(seqs) if is_free else None
            self._gathered = rows
        self._position[:] = [seq.n_tokens for seq in seqs]
        history = self._free
        if history is None:
            history = [history for seq in seqs for history in _histories(seq)]
        return self._draw(logits, self._params, history)

    def _sample_drafts(self, logits: F32Array, seqs: list[Sequence]) -> SampleResult:
        """`sample` where a sequence may have many rows: at each the same parameters, its own position and history."""
        at = [(seq, seq.n_tokens + i) for seq in seqs for i in range(1 + seq.n_draft)]
        params = self._rows[[seq.row for seq, _ in at]]
        params["position"] = [n_tokens for _, n_tokens in at]
        history = [history for seq in seqs for history in _histories(seq)]
        return self._draw(logits, params, history)

    def _draw(
        self, logits: F32Array, params: npt.NDArray[Any], history: list[History | None]
    ) -> SampleResult:
        result = self._sample(logits, params, history)
        if len(self._unused_ids):
            # Rows of padding were never trained: none is drawn in the life of most engines. To look costs 2 us a step, to
            # ban them beforehand a copy of every row of logits.
            wrong = self._is_unused.take(result.tokens, mode="clip")
            if wrong.any():
                banned = [self._banning(old) if bad else old for old, bad in zip(history, wrong, strict=True)]
                result = self._sample(logits, params, banned)
        return result

    def _banning(self, history: History | None) -> History:
        """A row's history, with the ids that have no token among those that may not be drawn."""
        if history is None:
            return History(NO_IDS, NO_IDS, self._unused_ids, NO_IDS, NO_BIAS, NO_IDS)
        return history._replace(banned=np.concatenate([history.banned, self._unused_ids]))

    def prompt_logprobs(self, logits: F32Array, tokens: I32Array, n: int) -> LogprobsResult:
        """Score prompt tokens under the distributions that predict them.

        Args:
            logits: f32 [R, vocab_size]: of the rows before the tokens.
            tokens: i32 [R]: the prompt's tokens.
            n: how many of the most probable tokens to return as well.
        """
        return self._logprobs(logits, tokens, n)

    @staticmethod
    def explain(error: int) -> PaceError:
        """What a row's entry in `errors` means."""
        if error == EMPTY:
            return RequestError(
                "no token is left to draw: structured_outputs, allowed_token_ids, bad_words and min_tokens exclude all; "
                "allow more of them"
            )
        return PaceError("the logits hold NaN; check the checkpoint, or bisect with --kernels")


def derive_seed(engine_seed: int, n_requests: int) -> int:
    """The seed of a request that gives none: splitmix64 of the engine's seed and the request's number.

    A plain sum would give request 1 of seed 0 the numbers of request 0 of seed 1.
    """
    z = engine_seed & MASK64
    for word in (0, n_requests):
        z = (z + 0x9E3779B97F4A7C15 + word) & MASK64
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK64
        z ^= z >> 31
    return z
