"""What a request returns, in vLLM's shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import TYPE_CHECKING, NoReturn

import numpy as np
import numpy.typing as npt

from pace.vllm_names import OUTPUT_FIELDS, refuse_attribute

__all__ = [
    "CompletionOutput",
    "EmbeddingOutput",
    "EmbeddingRequestOutput",
    "Logprob",
    "RequestMetrics",
    "RequestOutput",
    "SpeculativeMetrics",
    "ToolCall",
]


@dataclass(frozen=True)
class Logprob:
    """One token's log probability at one position.

    Attributes:
        logprob: natural log of the probability under the unmodified distribution.
        rank: 1 for the most probable token of the vocabulary, and so on.
        decoded_token: what the token adds to the text; of a character that is split over tokens, "" for all but the
            last, which has the character.
    """

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass(frozen=True)
class ToolCall:
    """A call of a tool that the model has written.

    Attributes:
        index: which of the completion's calls this is.
        id: unique among all calls.
        name: of the function.
        arguments: its arguments as JSON text. In an output of kind DELTA what is new of it: joined by `index` the parts are
            the whole; id and name are in each.
    """

    index: int
    id: str
    name: str
    arguments: str


class _Output:
    """Answers for the fields that vLLM's outputs have beside ours."""

    if not TYPE_CHECKING:  # for a type checker every attribute would exist

        def __getattr__(self, name: str) -> NoReturn:
            refuse_attribute(type(self).__name__, name, OUTPUT_FIELDS)


@dataclass
class CompletionOutput(_Output):
    """One completion of a prompt.

    Where a request's output_kind is DELTA, text, reasoning, tool_calls, token_ids and logprobs hold only what is new since
    the output before, and the other fields the state of the whole.

    Attributes:
        index: which of the request's completions this is.
        text: the text so far; always whole characters.
        token_ids: the tokens so far, the one that ended the output included.
        cumulative_logprob: sum of the sampled tokens' log probabilities; None where none were asked for.
        logprobs: for each token, {token id: Logprob} of the sampled and the most probable tokens; None where
            not asked.
        finish_reason: "stop", "length", "abort" or "error"; None while running.
        stop_reason: the stop string or token id that ended the output: of `stop`, of `stop_token_ids`, or an end token
            of the checkpoint besides its EOS token; None for EOS and the other reasons.
        reasoning: what the model thought before its answer, where a chat divides the two; None elsewhere, and where it
            answered at once.
        tool_calls: the calls of the request's tools that the model has written, the last one perhaps with a part of its
            arguments while running, or where the output was cut; None where there are none.
        is_request_error: finish_reason is "error" because of what the request asks for, such as a grammar that costs too
            much; asked again, it would fail again.
    """

    index: int
    text: str
    token_ids: Sequence[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    reasoning: str | None = None
    tool_calls: list[ToolCall] | None = None
    is_request_error: bool = False

    def finished(self) -> bool:
        """Whether nothing will be added to this completion."""
        return self.finish_reason is not None


@dataclass
class SpeculativeMetrics:
    """How drafts fared, of one request or of an engine. A round is a step in which drafted tokens were verified.

    Attributes:
        n_rounds: rounds.
        n_draft_tokens: drafted tokens that were verified.
        n_accepted_tokens: of these, those that became output.
        n_tokens: tokens that rounds put out: the accepted ones, and the target's own one that ends a round (the "bonus"
            token) where nothing ended the output before it.
        drafted_at: rounds that verified a token at position i, i = 0 for the first one.
        accepted_at: of these, those in which it became output.
        by_length: [n][a]: rounds that verified n drafted tokens, of which a became output; row n has n + 1 numbers.
    """

    n_rounds: int = 0
    n_draft_tokens: int = 0
    n_accepted_tokens: int = 0
    n_tokens: int = 0
    drafted_at: list[int] = field(default_factory=list)
    accepted_at: list[int] = field(default_factory=list)
    by_length: list[list[int]] = field(default_factory=list)

    @property
    def mean_acceptance_length(self) -> float:
        """Tokens per round, the bonus token included: 1 where nothing is accepted, K + 1 at most; 0 without a round."""
        return self.n_tokens / self.n_rounds if self.n_rounds else 0.0

    @property
    def acceptance_rates(self) -> list[float]:
        """For each position, the share of its drafted tokens that became output, whatever came before them."""
        return [
            accepted / drafted for accepted, drafted in zip(self.accepted_at, self.drafted_at, strict=True)
        ]

    def add(self, n_draft: int, n_accepted: int, n_tokens: int) -> None:
        """Count a round."""
        self.n_rounds += 1
        self.n_draft_tokens += n_draft
        self.n_accepted_tokens += n_accepted
        self.n_tokens += n_tokens
        for _ in range(n_draft - len(self.drafted_at)):
            self.drafted_at.append(0)
            self.accepted_at.append(0)
        for i in range(n_draft):
            self.drafted_at[i] += 1
            self.accepted_at[i] += i < n_accepted
        while len(self.by_length) <= n_draft:
            self.by_length.append([0] * (len(self.by_length) + 1))
        self.by_length[n_draft][n_accepted] += 1

    def join(self, other: SpeculativeMetrics) -> None:
        """Count all rounds of another one."""
        self.n_rounds += other.n_rounds
        self.n_draft_tokens += other.n_draft_tokens
        self.n_accepted_tokens += other.n_accepted_tokens
        self.n_tokens += other.n_tokens
        self.drafted_at = _sums(self.drafted_at, other.drafted_at)
        self.accepted_at = _sums(self.accepted_at, other.accepted_at)
        nothing: list[int] = []
        pairs = zip_longest(self.by_length, other.by_length, fillvalue=nothing)
        self.by_length = [_sums(mine, theirs) for mine, theirs in pairs]


def _sums(a: list[int], b: list[int]) -> list[int]:
    return [x + y for x, y in zip_longest(a, b, fillvalue=0)]


@dataclass
class RequestMetrics(_Output):
    """When things happened to one request, in seconds of `time.monotonic()`, and how many tokens were
    handled.

    Attributes:
        arrival_s: the request was accepted.
        scheduled_s: it ran in a step for the first time; None before.
        first_token_s: its first output token was sampled; None before.
        finished_s: its last output token was sampled; None before.
        n_prompt_tokens: length of the prompt.
        n_output_tokens: tokens sampled so far.
    """

    arrival_s: float = 0.0
    scheduled_s: float | None = None
    first_token_s: float | None = None
    finished_s: float | None = None
    n_prompt_tokens: int = 0
    n_output_tokens: int = 0

    @property
    def time_to_first_token_s(self) -> float | None:
        """Seconds from arrival to the first token; None before it."""
        return None if self.first_token_s is None else self.first_token_s - self.arrival_s

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Tokens per second after the first; None unless finished with at least two tokens."""
        if self.first_token_s is None or self.finished_s is None or self.n_output_tokens < 2:
            return None
        decode_s = self.finished_s - self.first_token_s
        return (self.n_output_tokens - 1) / decode_s if decode_s > 0 else None


@dataclass
class RequestOutput(_Output):
    """A request and what it has produced so far.

    Attributes:
        request_id: unique within the engine.
        prompt: the prompt's text; None where token ids were given.
        prompt_token_ids: the prompt as the model saw it.
        outputs: the completions.
        finished: whether all completions have ended.
        metrics: times and counts.
        prompt_logprobs: for each token of the prompt, {token id: Logprob} of it and the most probable tokens; None
            for the first one, which nothing predicts. None where not asked for, and until all are known; of the outputs
            of kind DELTA one has them.
        num_cached_tokens: tokens of the prompt that were found in the prefix cache.
        speculative: how drafts of its tokens fared, over all completions; None where none was verified.
        embedding: f32 [dimensions], where an embedding was asked for and the prompt has been read.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: Sequence[int]
    outputs: list[CompletionOutput]
    finished: bool = False
    metrics: RequestMetrics = field(default_factory=RequestMetrics)
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    num_cached_tokens: int = 0
    speculative: SpeculativeMetrics | None = None
    embedding: npt.NDArray[np.float32] | None = None


@dataclass
class EmbeddingOutput(_Output):
    """A text as a vector.

    Attributes:
        embedding: f32 [dimensions].
    """

    embedding: npt.NDArray[np.float32]


@dataclass
class EmbeddingRequestOutput(_Output):
    """What `LLM.embed` returns for a prompt.

    Attributes:
        request_id: unique within the engine.
        outputs: the embedding.
        prompt_token_ids: the prompt as the model saw it.
        finished: True.
        num_cached_tokens: tokens of the prompt that were found in the prefix cache.
    """

    request_id: str
    outputs: EmbeddingOutput
    prompt_token_ids: Sequence[int]
    finished: bool = True
    num_cached_tokens: int = 0
