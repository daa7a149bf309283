"""One completion's state, from arrival to its last token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from enum import Enum, auto

import numpy as np

from pace.engine.pooling import Pool
from pace.engine.sampler import Constraints
from pace.models.plan import I32Array
from pace.outputs import CompletionOutput, Logprob, SpeculativeMetrics, ToolCall
from pace.params import SamplingParams
from pace.text.readers import Reader
from pace.text.stream import TextStream
from pace.text.structure import Matcher

__all__ = ["NO_ROW", "Sequence", "Status"]

NO_ROW = -1

# Of a sequence that has not started; nobody writes to them. The garbage collector walks every list that there is, and
# thousands may wait.
NO_IDS: list[int] = []
NO_LOGPROBS: list[dict[int, Logprob]] = []


class Status(Enum):
    """Where a sequence is in its life. Preemption takes a running one back to WAITING; nothing leaves
    FINISHED.
    """

    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


class Sequence:
    """A prompt and its growing output.

    Tokens `[0, n_computed)` are in the KV cache, `[n_computed, n_tokens)` wait to run. Between steps a
    decoding sequence has one pending token, a prompt that is still being read has many, and so has a
    preempted sequence, which reads its prompt and output again; the scheduler needs to know no more.

    Where it speculates, `n_draft` guesses lie behind: tokens [n_tokens, n_tokens + n_draft), which run beside the pending
    one. They are nobody's output until the target has drawn the same.

    Args:
        request_id: of the request that it belongs to.
        prompt_ids: i32 [n_prompt].
        params: complete: the checkpoint's defaults are merged in.
        max_output: output tokens at most, >= 1; n_prompt + max_output fits the engine's max_model_len.
        index: which of the request's completions this is; also the stream of its random numbers.
        priority: lower runs first.
        stop_ids: token ids that end the output, EOS included unless it is ignored.
        eos_ids: the model's; as stop_ids they can't be drawn before min_tokens, also where they are ignored.
        constraints: what may be drawn; None: what `params` and the ids say. Sequences may share one.
        watched: somebody waits for every token, so a pause between two of them is seen.
        cache_salt: sequences share cached prompts only with those of the same salt.
        reader: makes what divides the output's text; None: it is all the answer.
        matcher: the grammar that the output follows, its own; None: it is free.
        pool: takes the prompt's hidden states: the sequence ends with its prompt and draws nothing; None: it is completed.
    """

    __slots__ = (
        "cache_salt",
        "cancelled",
        "constraints",
        "cumulative_logprob",
        "finish_reason",
        "has_stops",
        "index",
        "is_request_error",
        "key",
        "last_token",
        "logprobs",
        "matcher",
        "max_output",
        "n_cached",
        "n_computed",
        "n_draft",
        "n_emitted",
        "n_emitted_arguments",
        "n_emitted_chars",
        "n_emitted_reasoning",
        "n_prompt",
        "n_scored",
        "n_text",
        "n_tokens",
        "output_ids",
        "params",
        "pool",
        "priority",
        "reader",
        "request_id",
        "row",
        "seed",
        "speculative",
        "status",
        "stop_ids",
        "stop_reason",
        "text",
        "tokens",
        "watched",
    )

    def __init__(
        self,
        request_id: str,
        prompt_ids: I32Array,
        params: SamplingParams,
        *,
        max_output: int,
        index: int = 0,
        priority: int = 0,
        stop_ids: frozenset[int] = frozenset(),
        eos_ids: frozenset[int] = frozenset(),
        constraints: Constraints | None = None,
        watched: bool = False,
        cache_salt: str | None = None,
        reader: Callable[[], Reader] | None = None,
        matcher: Matcher | None = None,
        pool: Pool | None = None,
    ) -> None:
        self.request_id = request_id
        self.index = index
        self.params = params
        self.priority = priority
        self.key = (priority, 0, index)  # who is first: priority, then arrival; the engine numbers arrivals
        self.seed = 0  # of this request's random numbers, 0 .. 2^64 - 1; set when it is accepted
        self.stop_ids = stop_ids
        self.constraints = Constraints(params, stop_ids | eos_ids, ()) if constraints is None else constraints
        self.max_output = max_output
        self.watched = watched
        self.cache_salt = cache_salt
        self.reader = reader
        self.matcher = matcher
        self.pool = pool
        self.text: TextStream | None = None  # of the output; made when the sequence starts
        self.n_text = 0  # output tokens that the text covers
        self.has_stops = bool(params.stop)
        self.status = Status.WAITING
        self.cancelled = False  # must not start any more; its end follows
        self.tokens = prompt_ids  # the prompt alone until `start`, then with room for the output
        self.n_prompt = self.n_tokens = len(prompt_ids)
        self.last_token = int(
            prompt_ids[-1]
        )  # = tokens[n_tokens - 1]; reading an element of an array costs more
        self.n_computed = 0
        self.n_draft = 0
        self.speculative: SpeculativeMetrics | None = None  # from the first verified draft on
        self.n_cached: int | None = (
            None  # prompt tokens found in the prefix cache; None before the first start
        )
        # Prompt rows of which nothing is wanted any more: neither log probabilities (the last row predicts the first output
        # token) nor hidden states.
        wants_all = params.prompt_logprobs is not None and index == 0 if pool is None else pool.needs_all
        self.n_scored = 0 if wants_all else self.n_prompt - 1
        self.row = NO_ROW  # of the block tables and of the sampler's parameters, while running
        self.output_ids = NO_IDS
        self.cumulative_logprob: float | None = None if params.logprobs is None else 0.0
        self.logprobs: list[dict[int, Logprob]] | None = None if params.logprobs is None else NO_LOGPROBS
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self.is_request_error = False
        self.n_emitted = self.n_emitted_chars = self.n_emitted_reasoning = (
            0  # of output that has been handed out as deltas
        )
        self.n_emitted_arguments: tuple[
            int, ...
        ] = ()  # of each tool call; a list would be an object per waiting sequence

    def __repr__(self) -> str:
        return (
            f"Sequence({self.request_id!r}[{self.index}], {self.status.name}, n_prompt={self.n_prompt}, "
            f"n_tokens={self.n_tokens}, n_computed={self.n_computed})"
        )

    @property
    def max_tokens(self) -> int:
        """Longest that prompt and output together can become."""
        return self.n_prompt + self.max_output

    @property
    def max_cached(self) -> int:
        """Most tokens that the KV cache ever holds: the last sampled token is never run."""
        return self.max_tokens - 1

    @property
    def n_output(self) -> int:
        """Tokens sampled so far."""
        return len(self.output_ids)

    @property
    def is_scored(self) -> bool:
        """Whether every row of the prompt but the last has given what was asked of it, so that it may come from a cache."""
        return self.n_scored >= self.n_prompt - 1

    def start(self, row: int, n_computed: int) -> None:
        """Begin to run in block table row `row`, whose first `n_computed` tokens are in the cache already.

        From here on there is room for the whole output.
        """
        if len(self.tokens) < self.max_tokens:
            tokens = np.empty(self.max_tokens, dtype=np.int32)
            tokens[: self.n_tokens] = self.tokens
            self.tokens = tokens
            self.output_ids = []
            self.logprobs = None if self.params.logprobs is None else []
        self.row = row
        self.n_computed = n_computed
        if self.n_cached is None:
            self.n_cached = n_computed
        self.status = Status.RUNNING

    def preempt(self) -> None:
        """Give everything back but the tokens; they run again after the next `start`."""
        self.row = NO_ROW
        self.n_computed = self.n_draft = 0
        self.status = Status.WAITING

    def draft(self, token_ids: list[int]) -> None:
        """Guess what follows, as far as the grammar allows it; at most max_tokens - n_tokens - 1 of them, so that the next
        token has room too."""
        if self.matcher is not None:
            token_ids = token_ids[: self.matcher.validate(token_ids)]
        self.n_draft = n = len(token_ids)
        self.tokens[self.n_tokens : self.n_tokens + n] = token_ids

    def commit(self, token_id: int) -> None:
        """All pending tokens have run and `token_id` was drawn: it becomes the pending one.

        Raises:
            PaceError: its grammar does not allow it.
        """
        if self.matcher is not None:
            self.matcher.accept(token_id)
        self.tokens[self.n_tokens] = self.last_token = token_id
        self.output_ids.append(token_id)
        self.n_computed = self.n_tokens
        self.n_tokens += 1

    def extend_text(self, n_output: int) -> None:
        """Let the text cover the first `n_output` tokens."""
        if self.text is None or n_output <= self.n_text:
            return
        if self.has_stops:
            for i in range(self.n_text, n_output):
                # As vLLM: a stop string must be completed by a token behind the first min_tokens.
                self.text.push(self.output_ids[i], check_stop=i >= self.params.min_tokens)
        else:
            self.text.extend(self.output_ids[self.n_text : n_output])
        self.n_text = n_output

    def finish(self, reason: str, stop_reason: int | str | None) -> None:
        """End the sequence; its row and blocks are the scheduler's to free."""
        self.status = Status.FINISHED
        self.finish_reason = reason
        self.stop_reason = stop_reason

    def output(self, *, delta: bool = False) -> CompletionOutput:
        """The completion so far, or with `delta` what is new since the last call; later tokens do not change it."""
        text = "" if self.text is None else self.text.text
        reasoning = None if self.text is None else self.text.reasoning
        at, at_char = (self.n_emitted, self.n_emitted_chars) if delta else (0, 0)
        if delta:
            self.n_emitted, self.n_emitted_chars = len(self.output_ids), len(text)
            if reasoning is not None:
                at_reasoning, self.n_emitted_reasoning = self.n_emitted_reasoning, len(reasoning)
                reasoning = reasoning[at_reasoning:]
        calls = [] if self.text is None else self.text.calls
        if delta:
            calls = self._new_of(calls)
        return CompletionOutput(
            index=self.index,
            text=text[at_char:],
            token_ids=self.output_ids[at:],
            cumulative_logprob=self.cumulative_logprob,
            logprobs=None if self.logprobs is None else self.logprobs[at:],
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            reasoning=reasoning,
            tool_calls=calls or None,
            is_request_error=self.is_request_error,
        )

    def _new_of(self, calls: list[ToolCall]) -> list[ToolCall]:
        """What was not handed out of them yet."""
        old, self.n_emitted_arguments = self.n_emitted_arguments, tuple(len(call.arguments) for call in calls)
        known = [
            replace(call, arguments=call.arguments[n_old:])
            for call, n_old in zip(calls, old, strict=False)
            if len(call.arguments) > n_old
        ]
        return known + calls[len(old) :]
