"""The engine: one loop over schedule, run, sample, commit, emit."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence as Seq
from typing import Any, cast

from pace.engine.intake import Intake
from pace.engine.logprobs import LogprobRecorder
from pace.engine.prepare import Preparer
from pace.engine.request import Request
from pace.engine.runner import PromptScores, Runner
from pace.engine.sampler import LogprobsResult, Sampler, SampleResult
from pace.engine.schedule import Schedule
from pace.engine.scheduler import Scheduler
from pace.engine.sequence import Sequence, Status
from pace.errors import (
    ForkError,
    PaceError,
    one_line,
)
from pace.log import logger
from pace.models.plan import F32Array, I32Array
from pace.outputs import RequestOutput
from pace.params import SamplingParams
from pace.text.tokenizer import Tokenizer

__all__ = ["Engine"]

# What must end the loop and not just one request. Everything else that a request provokes ends that
# request: also the panics of Rust extensions, which derive from BaseException.
FATAL = (KeyboardInterrupt, SystemExit, GeneratorExit, ForkError)


INTAKE_SHARE = 0.1
"""Of a usual step, what the ends of waiting requests may take before one. (20 000 at once stalled everybody for 526 ms.)"""

USUAL_WEIGHT = 0.1
"""Of the newest step in what is usual."""


class _Closed:
    """In place of the parts of an engine that was closed."""

    def __getattr__(self, name: str) -> Any:
        raise PaceError("this engine is closed; build a new one")


class Engine:
    """Runs many requests together, a step at a time.

    Requests may be prepared, submitted and aborted from any thread at any time: that only puts something
    into a queue which the next step reads. `step` belongs to one thread at a time.

    Args:
        runner: executes steps.
        sampler: draws tokens.
        scheduler: chooses who runs.
        vocab_size: columns of the logits; token ids must be below it.
        max_model_len: longest prompt and output together, in tokens.
        max_num_waiting: sequences that may wait to run.
        max_logprobs: most log probabilities that a request may ask for; -1: all.
        eos_token_ids: ids that end an output.
        eos_token_id: the one of them that says nothing more as stop_reason.
        tokenizer: makes text of tokens; None: outputs have token ids only.
        seed: seeds the requests that give none.
    """

    def __init__(
        self,
        runner: Runner,
        sampler: Sampler,
        scheduler: Scheduler,
        *,
        vocab_size: int,
        max_model_len: int,
        max_num_waiting: int = 1 << 16,
        max_logprobs: int = -1,
        eos_token_ids: frozenset[int] = frozenset(),
        eos_token_id: int | None = None,
        tokenizer: Tokenizer | None = None,
        seed: int = 0,
    ) -> None:
        self.runner = runner
        self.sampler = sampler
        self.scheduler = scheduler
        self.preparer = Preparer(
            vocab_size=vocab_size,
            max_model_len=max_model_len,
            max_cached=scheduler.tables.capacity,
            max_logprobs=max_logprobs,
            eos_token_ids=eos_token_ids,
            tokenizer=tokenizer,
        )
        self.eos_token_ids = eos_token_ids
        self.eos_token_id = eos_token_id
        self.intake = Intake(scheduler, max_num_waiting, seed)
        self._logprobs = LogprobRecorder(tokenizer)
        self._emit: list[Request] = []  # requests with something to tell after this step
        self._n_finished: Counter[str] = Counter()
        self._n_steps = self._n_tokens = self._n_sampled = self._n_prompt_tokens = self._n_cached_tokens = 0
        self._n_repeated_steps = 0
        self._step_s = self._sample_s = 0.0
        self._usual_s = 0.0  # of late steps
        self._last_stats: dict[str, Any] | None = None  # of a closed engine

    # ---- requests -----------------------------------------------------------------------------------------

    def prepare(
        self, request_id: str, prompt_ids: Seq[int] | I32Array, params: SamplingParams, **options: Any
    ) -> Request:
        """Check a request without accepting it; see `Preparer.prepare`."""
        return self.preparer.prepare(request_id, prompt_ids, params, **options)

    def submit(self, request: Request, *, bounded: bool = True) -> None:
        """Accept a prepared request; see `Intake.submit`."""
        self.intake.submit(request, bounded=bounded)

    def add_request(
        self, request_id: str, prompt_ids: Seq[int] | I32Array, params: SamplingParams, **options: Any
    ) -> Request:
        """`prepare` and `submit`; arguments and errors as theirs."""
        request = self.prepare(request_id, prompt_ids, params, **options)
        self.submit(request)
        return request

    def abort(self, request_id: str) -> None:
        """`cancel` by id; an unknown or finished one is ignored."""
        request = self.intake.requests.get(request_id)
        if request is not None:
            self.intake.cancel(request)

    def cancel(self, request: Request) -> None:
        """End a request before the next step runs; one that was not accepted, or has finished, is ignored.

        Where thousands end at once, those that run do so before the next step; of the others, which don't start any more,
        a step returns as many outputs as don't hold it up.
        """
        self.intake.cancel(request)

    @property
    def n_waiting(self) -> int:
        """Sequences that have not started, preempted ones included."""
        return self.intake.n_waiting

    @property
    def has_unfinished(self) -> bool:
        """Whether any accepted request has not finished."""
        return self._last_stats is None and bool(self.intake.requests)

    def close(self) -> None:
        """Let go of everything that holds memory: weights, KV cache, requests. `stats` stays as it is; all else raises
        PaceError from now on. Calling it again does nothing.
        """
        if self._last_stats is None:
            self._last_stats = self.stats()
            self.runner = self.sampler = self.scheduler = self.intake = cast(Any, _Closed())
            self._emit = []

    # ---- the loop -----------------------------------------------------------------------------------------

    def step(self) -> list[RequestOutput]:
        """Run one step.

        Returns:
            An output for every request that finished, and for every streaming one that got a token. A
            request that failed has finish_reason "error" and the message as stop_reason; the others do not
            notice.
        """
        start = time.perf_counter()
        outputs: list[RequestOutput] = []
        if self.intake.has_news:
            for request, stop_reason in self.intake.receive(INTAKE_SHARE * self._usual_s):
                self._end(request, stop_reason)
                self._tell(outputs)  # here, where the time that it takes is looked at
        begin = time.perf_counter()
        step = self.scheduler.schedule()
        if step.seqs:
            try:
                self._execute(step)
            except FATAL:
                raise
            except BaseException as error:
                self._execute_alone(step, error)
            self._n_steps += 1
            self._n_tokens += step.n_tokens
            # Without what ends requests, or more and more of a step would be thought usual.
            self._usual_s += USUAL_WEIGHT * (time.perf_counter() - begin - self._usual_s)
        if self._emit:
            self._tell(outputs)
        if step.seqs:
            seconds = time.perf_counter() - start
            self._step_s += seconds
            self.scheduler.pacer.observe(step.n_decode, step.n_tokens - step.n_decode, seconds)
        return outputs

    def _tell(self, outputs: list[RequestOutput]) -> None:
        """Add an output of every request that has something to tell."""
        for request in self._emit:
            request.is_dirty = False
            outputs.append(request.output())
        self._emit.clear()

    def _end(self, request: Request, stop_reason: str | None) -> None:
        """End a request from outside; it keeps what it has produced."""
        for seq in request.seqs:
            if seq.status is not Status.FINISHED:
                try:
                    seq.extend_text(seq.n_output)
                    if seq.text is not None:
                        seq.text.finish(check_stop=False)
                    self._finish(seq, "abort", stop_reason)
                except FATAL:
                    raise
                except BaseException as error:
                    self._fail(seq, error)

    def _execute(self, step: Schedule) -> None:
        """Run and sample a step, then commit it. Until the commit nothing has changed."""
        for seq in step.admitted:
            self.sampler.open(seq)
            self.preparer.open_text(seq)
        result = self.runner.run(step, self._score)
        start = time.perf_counter()
        drawn = self.sampler.sample(result.logits, result.sampled) if result.sampled else None
        self._sample_s += time.perf_counter() - start
        self._note_starts(step)
        self.scheduler.ran(step)
        if result.scores is not None:
            self._add_prompt_logprobs(result.scores)
        if drawn is not None:
            self._commit(result.sampled, drawn)

    def _execute_alone(self, step: Schedule, error: BaseException) -> None:
        """A step failed, and which of its sequences was the reason can't be known: run each by itself.

        That changes nobody's result (law 1), and only the guilty fail again.
        """
        if len(step.seqs) == 1:
            self._fail(step.seqs[0], error)
            return
        self._n_repeated_steps += 1
        logger.warning(
            "a step of %d sequences failed and is repeated one by one: %s", len(step.seqs), one_line(error)
        )
        for alone in step.split():
            try:
                self._execute(alone)
            except FATAL:
                raise
            except BaseException as own_error:
                self._fail(alone.seqs[0], own_error)

    def _note_starts(self, step: Schedule) -> None:
        self._n_prompt_tokens += step.n_tokens - step.n_decode
        if step.admitted:
            now_s = time.monotonic()
            for seq in step.admitted:
                self._n_cached_tokens += seq.n_computed
                request = self.intake.requests[seq.request_id]
                if request.scheduled_s is None:
                    request.scheduled_s = now_s

    def _commit(self, seqs: list[Sequence], drawn: SampleResult) -> None:
        """Give every sequence its token, and end those that it ends."""
        now_s = time.monotonic()
        errors = drawn.errors.tolist()
        n_sampled = 0
        for i, (seq, token) in enumerate(zip(seqs, drawn.tokens.tolist(), strict=True)):
            if seq.status is Status.FINISHED:
                continue  # its prompt's log probabilities have failed
            try:
                if errors[i]:
                    raise PaceError(self.sampler.explain(errors[i]))
                seq.commit(token)
                n_sampled += 1
                n_output = len(seq.output_ids)  # a property costs twice as much, 32 times
                if n_output == 1 or seq.watched:
                    request = self.intake.requests[seq.request_id]
                    if request.first_token_s is None:
                        request.first_token_s = now_s
                    if seq.watched:
                        self._touch(request)
                if seq.logprobs is not None:
                    self._logprobs.add_sampled(seq, drawn, i)
                if seq.watched or seq.has_stops or token in seq.stop_ids or n_output >= seq.max_output:
                    self._check_end(seq, token)
            except FATAL:
                raise
            except BaseException as error:
                self._fail(seq, error)
        self._n_sampled += n_sampled

    def _check_end(self, seq: Sequence, token: int) -> None:
        """Extend the text where it is needed now, and end the sequence where its last token ends it."""
        params, text = seq.params, seq.text
        reason: str | None = None
        stop_reason: int | str | None = None
        n_output = seq.n_output
        if token in seq.stop_ids and n_output >= params.min_tokens:
            reason = "stop"
            # As vLLM: the model's own EOS says nothing more, another end of the checkpoint or the caller is named.
            stop_reason = None if token == self.eos_token_id and not params.ignore_eos else token
        elif n_output >= seq.max_output:
            reason = "length"
        if text is not None and (seq.watched or seq.has_stops or reason is not None):
            by_token = reason == "stop"
            seq.extend_text(n_output - 1 if by_token and not params.include_stop_str_in_output else n_output)
            if reason is not None and text.matched is None:
                text.finish(check_stop=not by_token and n_output > params.min_tokens)
            if text.matched is not None:
                reason, stop_reason = "stop", text.matched
        if reason is not None:
            self._finish(seq, reason, stop_reason)

    # ---- log probabilities of prompts -----------------------------------------------------------------------

    def _score(self, logits: F32Array, tokens: I32Array, n: int) -> LogprobsResult:
        start = time.perf_counter()
        scores = self.sampler.prompt_logprobs(logits, tokens, n)
        self._sample_s += time.perf_counter() - start
        return scores

    def _add_prompt_logprobs(self, scores: PromptScores) -> None:
        at = 0
        for seq, n_rows in scores.seqs:
            rows = range(at, at + n_rows)
            at += n_rows
            try:
                request = self.intake.requests[seq.request_id]
                for i in rows:
                    if scores.errors[i]:
                        raise PaceError(self.sampler.explain(int(scores.errors[i])))
                    self._logprobs.add_scored(request, seq, scores, i)
            except FATAL:
                raise
            except BaseException as error:
                self._fail(seq, error)

    # ---- ends ---------------------------------------------------------------------------------------------

    def _fail(self, seq: Sequence, error: BaseException) -> None:
        text = str(error) if isinstance(error, PaceError) else f"{type(error).__name__}: {error}"
        self._finish(seq, "error", one_line(text))

    def _finish(self, seq: Sequence, reason: str, stop_reason: int | str | None) -> None:
        if seq.status is Status.FINISHED:
            return
        # What a failed sequence has left in the cache may be NaN.
        self.scheduler.remove(seq, forget=reason == "error")
        seq.finish(reason, stop_reason)
        self._n_finished[reason] += 1
        request = self.intake.requests[seq.request_id]
        request.n_unfinished -= 1
        if request.finished:
            request.finished_s = time.monotonic()
            self.intake.release(request)
            self._touch(request)
        elif request.stream:
            self._touch(request)

    def _touch(self, request: Request) -> None:
        """The step will return an output of this request."""
        if not request.is_dirty:
            request.is_dirty = True
            self._emit.append(request)

    # ---- what it did --------------------------------------------------------------------------------------

    def stats(self) -> dict[str, Any]:
        """Counters since the engine was made, and gauges of now; may be read from any thread.

        Returns:
            n_steps, n_tokens (rows that ran), n_prompt_tokens (of these, read from prompts), n_cached_tokens
            (prompt tokens that the prefix cache spared), n_sampled; step_s, and of that run_s in the compiled
            plan, sample_s in the sampler, python_s elsewhere; n_running, n_waiting (sequences), n_requests
            (unfinished); n_finished by reason; n_preemptions; n_repeated_steps (failed, and run again one sequence
            at a time); n_blocks, n_free_blocks (of all groups of layers), block_size (of the largest blocks), kv_usage
            (share of the blocks that are held, in the fullest group); kv_cache: the counters of `KVTables.stats`.
        """
        if self._last_stats is not None:
            return dict(self._last_stats)
        scheduler = self.scheduler
        tables = scheduler.tables
        run_s = self.runner.run_s
        return {
            "n_steps": self._n_steps,
            "n_tokens": self._n_tokens,
            "n_prompt_tokens": self._n_prompt_tokens,
            "n_cached_tokens": self._n_cached_tokens,
            "n_sampled": self._n_sampled,
            "step_s": self._step_s,
            "run_s": run_s,
            "sample_s": self._sample_s,
            "python_s": self._step_s - run_s - self._sample_s,
            "n_running": len(scheduler.running),
            "n_waiting": self.n_waiting,
            "n_requests": len(self.intake.requests),
            "n_finished": dict(self._n_finished),
            "n_preemptions": scheduler.n_preemptions,
            "n_repeated_steps": self._n_repeated_steps,
            "n_blocks": tables.n_blocks,
            "n_free_blocks": tables.n_free,
            "block_size": tables.block_size,
            "kv_usage": tables.usage,
            "kv_cache": tables.stats(),
        }
