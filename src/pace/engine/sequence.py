"""One request's state, from arrival to its last token."""

from __future__ import annotations

from enum import Enum, auto

import numpy as np

from pace.engine.sampler import Constraints
from pace.models.plan import I32Array
from pace.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from pace.params import SamplingParams
from pace.tokenizer import TextStream

__all__ = ["NO_ROW", "Sequence", "Status"]

NO_ROW = -1


class Status(Enum):
    """Where a sequence is in its life; it only moves down this list."""

    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


class Sequence:
    """A prompt and its growing output.

    Tokens `[0, n_computed)` are in the KV cache, `[n_computed, n_tokens)` wait to run. Between steps a
    decoding sequence has one pending token, a prompt that is still being read has many; the scheduler needs
    to know no more.

    Args:
        request_id: unique within the engine.
        prompt_ids: i32 [n_prompt].
        params: complete: the checkpoint's defaults are merged in.
        max_output: output tokens at most, >= 1; n_prompt + max_output fits the engine's max_model_len.
        stop_ids: token ids that end the output, EOS included.
        prompt: the prompt's text, to be handed back.
        text: the output's text; None where none is wanted.
        stream: emit an output after every token, not only at the end.
        arrival_s: `time.monotonic()` of the request.
    """

    __slots__ = (
        "arrival_s",
        "constraints",
        "cumulative_logprob",
        "finish_reason",
        "finished_s",
        "first_token_s",
        "has_stops",
        "index",
        "logprobs",
        "max_output",
        "n_computed",
        "n_prompt",
        "n_text",
        "n_tokens",
        "output_ids",
        "params",
        "prompt",
        "prompt_ids",
        "request_id",
        "row",
        "scheduled_s",
        "seed",
        "status",
        "stop_ids",
        "stop_reason",
        "stream",
        "text",
        "tokens",
    )

    def __init__(
        self,
        request_id: str,
        prompt_ids: I32Array,
        params: SamplingParams,
        *,
        max_output: int,
        stop_ids: frozenset[int] = frozenset(),
        prompt: str | None = None,
        text: TextStream | None = None,
        stream: bool = False,
        arrival_s: float = 0.0,
    ) -> None:
        self.request_id = request_id
        self.params = params
        self.prompt = prompt
        self.prompt_ids: list[int] = prompt_ids.tolist()  # as outputs hand it back
        self.seed = 0  # of this request's random numbers, 0 .. 2^64 - 1; set when it is accepted
        self.index = 0  # which of the request's completions this is
        self.stop_ids = stop_ids
        self.constraints = Constraints(params, stop_ids)
        self.max_output = max_output
        self.stream = stream
        self.text = text
        self.n_text = 0  # output tokens that the text covers
        self.has_stops = bool(params.stop)
        self.status = Status.WAITING
        self.tokens = prompt_ids  # the prompt alone until `start`, then with room for the output
        self.n_prompt = self.n_tokens = len(prompt_ids)
        self.n_computed = 0
        self.row = NO_ROW  # of the block tables and of the sampler's parameters, while running
        self.output_ids: list[int] = []
        self.cumulative_logprob: float | None = None if params.logprobs is None else 0.0
        self.logprobs: list[dict[int, Logprob]] | None = None if params.logprobs is None else []
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self.arrival_s = arrival_s
        self.scheduled_s: float | None = None
        self.first_token_s: float | None = None
        self.finished_s: float | None = None

    def __repr__(self) -> str:
        return (
            f"Sequence({self.request_id!r}, {self.status.name}, n_prompt={self.n_prompt}, "
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

    def start(self, row: int, now_s: float) -> None:
        """Begin to run in block table row `row`; from here on there is room for the whole output."""
        tokens = np.empty(self.max_tokens, dtype=np.int32)
        tokens[: self.n_prompt] = self.tokens
        self.tokens = tokens
        self.row = row
        self.status = Status.RUNNING
        self.scheduled_s = now_s

    def commit(self, token_id: int) -> None:
        """All pending tokens have run and `token_id` was drawn: it becomes the pending one.

        The order lets a KeyboardInterrupt between any two lines be followed by the same step again.
        """
        self.tokens[self.n_tokens] = token_id
        self.output_ids[self.n_tokens - self.n_prompt :] = [token_id]
        self.n_tokens += 1
        self.n_computed = self.n_tokens - 1

    def extend_text(self, n_output: int) -> None:
        """Let the text cover the first `n_output` tokens."""
        if self.text is not None:
            for i in range(self.n_text, n_output):
                # As vLLM: a stop string must be completed by a token behind the first min_tokens.
                self.text.push(self.output_ids[i], check_stop=i >= self.params.min_tokens)
            self.n_text = max(self.n_text, n_output)

    def finish(self, reason: str, stop_reason: int | str | None, now_s: float) -> None:
        """End the sequence; its row and blocks are the scheduler's to free."""
        self.status = Status.FINISHED
        self.finish_reason = reason
        self.stop_reason = stop_reason
        self.finished_s = now_s

    def output(self) -> RequestOutput:
        """What the request has produced so far; later tokens do not change the returned object."""
        finished = self.status is Status.FINISHED
        completion = CompletionOutput(
            index=0,
            text="" if self.text is None else self.text.text,
            token_ids=self.output_ids.copy(),
            cumulative_logprob=self.cumulative_logprob,
            logprobs=None if self.logprobs is None else self.logprobs.copy(),
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
        )
        metrics = RequestMetrics(
            arrival_s=self.arrival_s,
            scheduled_s=self.scheduled_s,
            first_token_s=self.first_token_s,
            finished_s=self.finished_s,
            n_prompt_tokens=self.n_prompt,
            n_output_tokens=len(self.output_ids),
        )
        return RequestOutput(self.request_id, self.prompt, self.prompt_ids, [completion], finished, metrics)
