"""One request: its sequences, its clock, and what it tells the caller."""

from __future__ import annotations

from pace.engine.sequence import Sequence
from pace.models.plan import F32Array, I32Array
from pace.outputs import Logprob, RequestMetrics, RequestOutput, SpeculativeMetrics
from pace.params import RequestOutputKind, SamplingParams

__all__ = ["Request"]


class Request:
    """A prompt with `params.n` completions of it.

    Args:
        request_id: unique within the engine.
        prompt_ids: i32 [n_prompt].
        params: complete: the checkpoint's defaults are merged in.
        seqs: its n sequences, by index.
        prompt: the prompt's text, to be handed back.
        stream: emit an output after every token, not only at the end.
        deadline_s: `time.monotonic()` at which it ends at the latest; None: never.
        arrival_s: `time.monotonic()` of the request.

    Attributes:
        one_by_one: where it streams, every token has an output of its own, also those that one step accepts together.
    """

    __slots__ = (
        "_prompt_token_ids",
        "arrival_s",
        "deadline_s",
        "embedding",
        "finished_s",
        "first_token_s",
        "is_dirty",
        "n_unfinished",
        "one_by_one",
        "params",
        "prompt",
        "prompt_ids",
        "prompt_logprobs",
        "request_id",
        "scheduled_s",
        "seqs",
        "stream",
    )

    def __init__(
        self,
        request_id: str,
        prompt_ids: I32Array,
        params: SamplingParams,
        seqs: list[Sequence],
        *,
        prompt: str | None = None,
        stream: bool = False,
        deadline_s: float | None = None,
        arrival_s: float = 0.0,
    ) -> None:
        self.request_id = request_id
        self.prompt = prompt
        self.prompt_ids = prompt_ids
        self._prompt_token_ids: list[int] | None = None  # as outputs hand it back, from the first one on
        self.params = params
        self.seqs = seqs
        self.n_unfinished = len(seqs)
        self.stream = stream and params.output_kind is not RequestOutputKind.FINAL_ONLY
        self.one_by_one = False
        self.deadline_s = deadline_s
        self.embedding: F32Array | None = None  # of a prompt that is pooled, when it has been
        self.is_dirty = False  # has something to emit after this step
        # The first token has no past that could predict it.
        self.prompt_logprobs: list[dict[int, Logprob] | None] | None = (
            None if params.prompt_logprobs is None else [None]
        )
        self.arrival_s = arrival_s
        self.scheduled_s: float | None = None
        self.first_token_s: float | None = None
        self.finished_s: float | None = None

    def __repr__(self) -> str:
        return f"Request({self.request_id!r}, {self.seqs})"

    @property
    def finished(self) -> bool:
        """Whether all its sequences have ended."""
        return self.n_unfinished == 0

    def cancel(self) -> None:
        """Let its sequences start no more; only `Engine.cancel` ends them too."""
        for seq in self.seqs:
            seq.cancelled = True

    def output(self) -> RequestOutput:
        """What the request has produced so far, or since the last time where deltas are wanted."""
        if self._prompt_token_ids is None:
            self._prompt_token_ids = self.prompt_ids.tolist()
        delta = self.stream and self.params.output_kind is RequestOutputKind.DELTA
        seqs = self.seqs
        prompt_logprobs = self.prompt_logprobs if seqs[0].is_scored or self.finished else None
        if delta and prompt_logprobs is not None:
            self.prompt_logprobs = None  # they are told once, as everything else
        metrics = RequestMetrics(
            arrival_s=self.arrival_s,
            scheduled_s=self.scheduled_s,
            first_token_s=self.first_token_s,
            finished_s=self.finished_s,
            n_prompt_tokens=len(self.prompt_ids),
            n_output_tokens=sum(seq.n_output for seq in seqs),
        )
        return RequestOutput(
            self.request_id,
            self.prompt,
            self._prompt_token_ids,
            [seq.output(delta=delta) for seq in seqs],
            self.finished,
            metrics,
            prompt_logprobs=prompt_logprobs,
            num_cached_tokens=seqs[0].n_cached or 0,
            speculative=self._speculative(),
            embedding=self.embedding,
        )

    def _speculative(self) -> SpeculativeMetrics | None:
        """How the drafts of all completions fared."""
        parts = [seq.speculative for seq in self.seqs if seq.speculative is not None]
        if not parts:
            return None
        total = SpeculativeMetrics()
        for part in parts:
            total.join(part)
        return total
