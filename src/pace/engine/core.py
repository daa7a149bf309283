"""The engine: one loop over schedule, run, sample, commit, emit."""

from __future__ import annotations

import time
from collections.abc import Sequence as Seq
from typing import Any, cast

from pace.engine.commit import FATAL, Committer
from pace.engine.intake import Intake
from pace.engine.logprobs import LogprobRecorder
from pace.engine.prepare import Preparer
from pace.engine.request import Request
from pace.engine.runner import Runner
from pace.engine.sampler import LogprobsResult, Sampler
from pace.engine.schedule import Schedule
from pace.engine.scheduler import Scheduler
from pace.engine.speculation import Speculation
from pace.errors import PaceError, one_line
from pace.log import logger
from pace.models.plan import F32Array, I32Array
from pace.outputs import RequestOutput
from pace.params import SamplingParams
from pace.pooling_params import PoolingParams
from pace.text.tokenizer import Tokenizer

__all__ = ["Engine"]

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
        dim: columns of the hidden states.
        max_model_len: longest prompt and output together, in tokens.
        max_num_waiting: sequences that may wait to run.
        max_logprobs: most log probabilities that a request may ask for; -1: all.
        eos_token_ids: ids that end an output.
        eos_token_id: the one of them that says nothing more as stop_reason.
        tokenizer: makes text of tokens; None: outputs have token ids only.
        seed: seeds the requests that give none.
        speculation: guesses tokens; None: every step of a sequence makes one.
    """

    def __init__(
        self,
        runner: Runner,
        sampler: Sampler,
        scheduler: Scheduler,
        *,
        vocab_size: int,
        dim: int = 0,
        max_model_len: int,
        max_num_waiting: int = 1 << 16,
        max_logprobs: int = -1,
        eos_token_ids: frozenset[int] = frozenset(),
        eos_token_id: int | None = None,
        tokenizer: Tokenizer | None = None,
        seed: int = 0,
        speculation: Speculation | None = None,
    ) -> None:
        self.runner = runner
        self.sampler = sampler
        self.scheduler = scheduler
        self.speculation = speculation
        self.preparer = Preparer(
            vocab_size=vocab_size,
            dim=dim,
            max_model_len=max_model_len,
            max_cached=scheduler.tables.capacity,
            max_logprobs=max_logprobs,
            eos_token_ids=eos_token_ids,
            tokenizer=tokenizer,
            max_draft_tokens=None if speculation is None else speculation.max_tokens,
        )
        self.eos_token_ids = eos_token_ids
        self.eos_token_id = eos_token_id
        self.intake = Intake(scheduler, max_num_waiting, seed)
        self.committer = Committer(
            scheduler, sampler, self.intake, LogprobRecorder(tokenizer), eos_token_id, speculation
        )
        self._n_steps = self._n_tokens = self._n_prompt_tokens = self._n_cached_tokens = 0
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

    def prepare_embedding(
        self, request_id: str, prompt_ids: Seq[int] | I32Array, params: PoolingParams, **options: Any
    ) -> Request:
        """Check a request without accepting it; see `Preparer.prepare_embedding`."""
        return self.preparer.prepare_embedding(request_id, prompt_ids, params, **options)

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
            if self.speculation is not None:
                self.speculation.close()
            self.runner = self.sampler = self.scheduler = self.intake = cast(Any, _Closed())
            self.committer = self.speculation = cast(Any, _Closed())

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
                self.committer.end(request, stop_reason)
                self.committer.tell(outputs)  # here, where the time that it takes is looked at
        begin = time.perf_counter()
        if self.speculation is not None:
            self.speculation.propose(self.scheduler.running)
        step = self.scheduler.schedule()
        run_s = self.runner.run_s
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
        self.committer.tell(outputs)
        if self.speculation is not None:
            run_s = self.runner.run_s - run_s
            self.speculation.after_step(self.scheduler.running, step.n_tokens, step.n_prompt, run_s)
        if step.seqs:
            seconds = time.perf_counter() - start
            self._step_s += seconds
            self.scheduler.pacer.observe(step.n_decode + step.n_draft, step.n_prompt, seconds)
        return outputs

    def _execute(self, step: Schedule) -> None:
        """Run and sample a step, then commit it. Until the commit nothing has changed."""
        for seq in step.admitted:
            self.sampler.open(seq)
            self.preparer.open_text(seq)
        result = self.runner.run(step, self._score)
        if self.speculation is not None:
            self.speculation.ran(step)
        start = time.perf_counter()
        drawn = self.sampler.sample(result.logits, result.sampled) if result.sampled else None
        self._sample_s += time.perf_counter() - start
        self._note_starts(step)
        self.scheduler.ran(step)
        if result.scores is not None:
            self.committer.add_prompt_logprobs(result.scores)
        if drawn is not None:
            self.committer.commit(result.sampled, drawn)
        if result.pooled:
            self.committer.pool(result.pooled)

    def _execute_alone(self, step: Schedule, error: BaseException) -> None:
        """A step failed, and which of its sequences was the reason can't be known: run each by itself.

        That changes nobody's result (law 1), and only the guilty fail again.
        """
        if len(step.seqs) == 1 and not step.n_draft:
            self.committer.fail(step.seqs[0], error)
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
                self.committer.fail(alone.seqs[0], own_error)

    def _note_starts(self, step: Schedule) -> None:
        self._n_prompt_tokens += step.n_prompt
        if step.admitted:
            now_s = time.monotonic()
            for seq in step.admitted:
                self._n_cached_tokens += seq.n_computed
                request = self.intake.requests[seq.request_id]
                if request.scheduled_s is None:
                    request.scheduled_s = now_s

    def _score(self, logits: F32Array, tokens: I32Array, n: int) -> LogprobsResult:
        start = time.perf_counter()
        scores = self.sampler.prompt_logprobs(logits, tokens, n)
        self._sample_s += time.perf_counter() - start
        return scores

    # ---- what it did --------------------------------------------------------------------------------------

    def stats(self) -> dict[str, Any]:
        """Counters since the engine was made, and gauges of now; may be read from any thread.

        Returns:
            n_steps, n_tokens (rows that ran), n_prompt_tokens (of these, read from prompts), n_cached_tokens
            (prompt tokens that the prefix cache spared), n_sampled; step_s, and of that run_s in the compiled
            plan, sample_s in the sampler, python_s elsewhere; n_running, n_waiting (sequences), n_requests
            (unfinished); n_finished by reason; n_preemptions; n_repeated_steps (failed, and run again one sequence
            at a time); n_blocks, n_free_blocks (of all groups of layers), block_size (of the largest blocks), kv_usage
            (share of the blocks that are held, in the fullest group); kv_cache: the counters of `KVTables.stats`;
            speculative: where the engine speculates, what docs/speculative.md lists.
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
            "n_sampled": self.committer.n_sampled,
            "step_s": self._step_s,
            "run_s": run_s,
            "sample_s": self._sample_s,
            "python_s": self._step_s - run_s - self._sample_s,
            "n_running": len(scheduler.running),
            "n_waiting": self.n_waiting,
            "n_requests": len(self.intake.requests),
            "n_finished": dict(self.committer.n_finished),
            "n_preemptions": scheduler.n_preemptions,
            "n_repeated_steps": self._n_repeated_steps,
            "n_blocks": tables.n_blocks,
            "n_free_blocks": tables.n_free,
            "block_size": tables.block_size,
            "kv_usage": tables.usage,
            "kv_cache": tables.stats(),
        } | ({} if self.speculation is None else {"speculative": self.speculation.stats()})
