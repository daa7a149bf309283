"""What a step has drawn becomes output: tokens, log probabilities, and the ends of sequences."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence as Seq

from pace.engine.intake import Intake
from pace.engine.logprobs import LogprobRecorder
from pace.engine.request import Request
from pace.engine.runner import PromptScores
from pace.engine.sampler import EMPTY, Sampler, SampleResult
from pace.engine.scheduler import Scheduler
from pace.engine.sequence import Sequence, Status
from pace.engine.speculation import Speculation
from pace.errors import ForkError, PaceError, RequestError, one_line
from pace.models.plan import Bf16Array
from pace.outputs import RequestOutput

__all__ = ["FATAL", "Committer"]

# What must end the loop and not just one request. Everything else that a request provokes ends that
# request: also the panics of Rust extensions, which derive from BaseException.
FATAL = (KeyboardInterrupt, SystemExit, GeneratorExit, ForkError)


class Committer:
    """Gives sequences what was drawn for them, ends those that it ends, and remembers who has something to tell.

    Args:
        scheduler: holds what a sequence that ends gives back.
        sampler: explains its errors.
        intake: the requests.
        logprobs: writes log probabilities.
        eos_token_id: the end id that says nothing more as stop_reason.
        speculation: whose guesses are verified; None: there are none.

    Attributes:
        n_sampled: tokens that became output.
        n_finished: sequences by the reason of their end.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        sampler: Sampler,
        intake: Intake,
        logprobs: LogprobRecorder,
        eos_token_id: int | None,
        speculation: Speculation | None = None,
    ) -> None:
        self.n_sampled = 0
        self.n_finished: Counter[str] = Counter()
        self._scheduler = scheduler
        self._sampler = sampler
        self._intake = intake
        self._logprobs = logprobs
        self._eos_token_id = eos_token_id
        self._speculation = speculation
        self._emit: list[Request] = []  # requests with something to tell after this step
        self._early: list[RequestOutput] = []  # of requests that want their tokens one by one

    def tell(self, outputs: list[RequestOutput]) -> None:
        """Add an output of every request that has something to tell."""
        outputs += self._early
        self._early.clear()
        for request in self._emit:
            request.is_dirty = False
            outputs.append(request.output())
        self._emit.clear()

    def commit(self, seqs: list[Sequence], drawn: SampleResult) -> None:
        """Give every sequence its token, or as many as its draft has right and one more, and end those that it ends.

        Args:
            drawn: for every sequence one row, and one for each of its drafted tokens.
        """
        now_s = time.monotonic()
        errors = drawn.errors.tolist()
        tokens = drawn.tokens.tolist()
        row = 0
        for seq in seqs:
            first, n_draft = row, seq.n_draft
            row += 1 + n_draft
            if seq.status is Status.FINISHED:
                continue  # its prompt's log probabilities have failed
            try:
                if n_draft:
                    self._commit_draft(seq, tokens[first:row], errors[first:row], drawn, first, now_s)
                else:
                    self._add(seq, tokens[first], errors[first], drawn, first, now_s)
            except FATAL:
                raise
            except BaseException as error:
                self.fail(seq, error)

    def _commit_draft(
        self,
        seq: Sequence,
        tokens: list[int],
        errors: list[int],
        drawn: SampleResult,
        first: int,
        now_s: float,
    ) -> None:
        """Accept drafted tokens while the target draws the same ones, and its own first other one, or the next.

        Args:
            tokens, errors: of the sequence's rows of `drawn`, from `first` on.
        """
        n_draft, n_before = seq.n_draft, seq.n_output
        draft = seq.tokens[seq.n_tokens : seq.n_tokens + n_draft].tolist()
        seq.n_draft = 0
        speculation = self._speculation
        if speculation is None:
            raise RuntimeError("a sequence has a draft, though nobody drafts")
        if any(error not in (0, EMPTY) for error in errors):
            # NaN of a wrong token reaches the rows before it, as attention multiplies values that no query sees by 0; and
            # later ones, which share its group of keys. Without the draft the tokens are what they must be.
            speculation.distrust(seq)
            self._scheduler.restart(seq)
            return
        n_accepted = 0
        try:
            for i, (drafted, token, error) in enumerate(zip([*draft, -1], tokens, errors, strict=True)):
                stands = i < n_draft and not error and speculation.accepts(drafted, token, i)
                if i:
                    self._tell_early(seq)
                self._add(seq, drafted if stands else token, error, drawn, first + i, now_s)
                n_accepted += stands
                if not stands or seq.status is Status.FINISHED:
                    return
        finally:
            speculation.verified(seq, n_draft, n_accepted, seq.n_output - n_before)

    def _tell_early(self, seq: Sequence) -> None:
        """Make an output of what a request has so far, where the step's next token shall come in one of its own."""
        request = self._intake.requests[seq.request_id]
        if request.one_by_one and request.stream:
            self._early.append(request.output())

    def _add(
        self, seq: Sequence, token: int, error: int, drawn: SampleResult, row: int, now_s: float
    ) -> None:
        """Give a sequence the token of a row, and end it where it does."""
        if error:
            raise self._sampler.explain(error)
        seq.commit(token)
        self.n_sampled += 1
        n_output = len(seq.output_ids)  # a property costs twice as much, 32 times
        if n_output == 1 or seq.watched:
            request = self._intake.requests[seq.request_id]
            if request.first_token_s is None:
                request.first_token_s = now_s
            if seq.watched:
                self._touch(request)
        if seq.logprobs is not None:
            self._logprobs.add_sampled(seq, drawn, row)
        if seq.watched or seq.has_stops or token in seq.stop_ids or n_output >= seq.max_output or seq.matcher:
            self._check_end(seq, token)

    def _check_end(self, seq: Sequence, token: int) -> None:
        """Extend the text where it is needed now, and end the sequence where its last token ends it."""
        params, text = seq.params, seq.text
        reason: str | None = None
        stop_reason: int | str | None = None
        by_token = False
        n_output = seq.n_output
        if token in seq.stop_ids and n_output >= params.min_tokens:
            reason = "stop"
            # As vLLM: the model's own EOS says nothing more, another end of the checkpoint or the caller is named.
            stop_reason = None if token == self._eos_token_id and not params.ignore_eos else token
            by_token = True
        elif seq.matcher is not None and seq.matcher.is_done:
            reason = "stop"  # where nothing can follow, EOS says nothing new
        elif n_output >= seq.max_output:
            reason = "length"
        if text is not None and (seq.watched or seq.has_stops or reason is not None):
            seq.extend_text(n_output - 1 if by_token and not params.include_stop_str_in_output else n_output)
            if reason is not None and text.matched is None:
                text.finish(check_stop=not by_token and n_output > params.min_tokens)
            if text.matched is not None:
                reason, stop_reason = "stop", text.matched
        if reason is not None:
            self.finish(seq, reason, stop_reason)

    def add_prompt_logprobs(self, scores: PromptScores) -> None:
        """Record the log probabilities of prompt tokens."""
        at = 0
        for seq, n_rows in scores.seqs:
            rows = range(at, at + n_rows)
            at += n_rows
            try:
                request = self._intake.requests[seq.request_id]
                for i in rows:
                    if scores.errors[i]:
                        raise self._sampler.explain(int(scores.errors[i]))
                    self._logprobs.add_scored(request, seq, scores, i)
            except FATAL:
                raise
            except BaseException as error:
                self.fail(seq, error)

    def pool(self, rows: Seq[tuple[Sequence, Bf16Array]]) -> None:
        """Add hidden states to their sequences' embeddings, and end those that have all.

        Args:
            rows: bf16 [n, dim] of each.
        """
        for seq, states in rows:
            try:
                if seq.pool is None:
                    raise RuntimeError("hidden states of a sequence that wants none")
                seq.pool.add(states)
                seq.n_scored += len(states)
                if seq.n_scored == seq.n_prompt:
                    self._intake.requests[seq.request_id].embedding = seq.pool.embedding()
                    self.finish(seq, "stop", None)
            except FATAL:
                raise
            except BaseException as error:
                self.fail(seq, error)

    def end(self, request: Request, stop_reason: str | None) -> None:
        """End a request from outside; it keeps what it has produced."""
        for seq in request.seqs:
            if seq.status is not Status.FINISHED:
                try:
                    seq.extend_text(seq.n_output)
                    if seq.text is not None:
                        seq.text.finish(check_stop=False)
                    self.finish(seq, "abort", stop_reason)
                except FATAL:
                    raise
                except BaseException as error:
                    self.fail(seq, error)

    def fail(self, seq: Sequence, error: BaseException) -> None:
        """End a sequence with an error; it keeps what it has produced."""
        text = str(error) if isinstance(error, PaceError) else f"{type(error).__name__}: {error}"
        seq.is_request_error = isinstance(error, RequestError)
        self.finish(seq, "error", one_line(text))

    def finish(self, seq: Sequence, reason: str, stop_reason: int | str | None) -> None:
        """End a sequence, and its request with the last of them; one that has ended stays as it is."""
        if seq.status is Status.FINISHED:
            return
        # What a failed sequence has left in the cache may be NaN.
        self._scheduler.remove(seq, forget=reason == "error")
        seq.finish(reason, stop_reason)
        self.n_finished[reason] += 1
        request = self._intake.requests[seq.request_id]
        request.n_unfinished -= 1
        if request.finished:
            request.finished_s = time.monotonic()
            self._intake.release(request)
            self._touch(request)
        elif request.stream:
            self._touch(request)

    def _touch(self, request: Request) -> None:
        """The step will return an output of this request."""
        if not request.is_dirty:
            request.is_dirty = True
            self._emit.append(request)
