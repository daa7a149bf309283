"""The engine: one loop over schedule, run, sample, commit, emit."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np

from pace.engine.runner import Runner
from pace.engine.sampler import Sampler, SampleResult, derive_seed
from pace.engine.scheduler import Scheduler
from pace.engine.sequence import Sequence, Status
from pace.errors import CapacityError, ForkError, PaceError, RequestError, one_line, show
from pace.models.plan import I32Array
from pace.outputs import Logprob, RequestOutput
from pace.params import SamplingParams
from pace.tokenizer import TextStream, Tokenizer

__all__ = ["Engine", "EngineStats"]

# What must end the loop and not just one request. Everything else that a request provokes ends that
# request: also the panics of Rust extensions, which derive from BaseException.
FATAL = (KeyboardInterrupt, SystemExit, GeneratorExit, ForkError)


@dataclass(slots=True)
class EngineStats:
    """Counters since the engine was made.

    Attributes:
        n_steps: steps that ran the model.
        n_tokens: rows that ran.
        n_sampled: tokens sampled.
        step_s: wall time of these steps.
        run_s: of that, inside the compiled plan.
        sample_s: of that, inside the sampler.
    """

    n_steps: int = 0
    n_tokens: int = 0
    n_sampled: int = 0
    step_s: float = 0.0
    run_s: float = 0.0
    sample_s: float = 0.0

    @property
    def python_s(self) -> float:
        """Wall time of the steps outside the plan and the sampler."""
        return self.step_s - self.run_s - self.sample_s


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
        eos_token_ids: ids that end an output.
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
        eos_token_ids: frozenset[int] = frozenset(),
        tokenizer: Tokenizer | None = None,
        seed: int = 0,
    ) -> None:
        self.runner = runner
        self.sampler = sampler
        self.scheduler = scheduler
        self.vocab_size = vocab_size
        self.max_model_len = max_model_len
        self.eos_token_ids = eos_token_ids
        self.tokenizer = tokenizer
        self.seed = seed
        self.stats = EngineStats()
        self._requests: dict[str, Sequence] = {}  # accepted and not finished
        self._arrived: deque[Sequence] = deque()
        self._aborted: deque[str] = deque()
        self._counter = itertools.count()  # its next() is atomic

    def prepare(
        self,
        request_id: str,
        prompt_ids: Seq[int] | I32Array,
        params: SamplingParams,
        *,
        prompt: str | None = None,
        stream: bool = False,
    ) -> Sequence:
        """Check a request without accepting it, so that a caller can check many before any of them runs.

        Args:
            request_id: unique among the requests in flight.
            prompt_ids: i32 [n], ids below vocab_size, 1 <= n < max_model_len.
            params: complete (the checkpoint's defaults merged in).
            prompt: the prompt's text, to be handed back.
            stream: `step` returns an output after every token, not only the last.

        Raises:
            RequestError: an invalid prompt or parameter.
            CapacityError: the KV pool can never hold the request.
        """
        ids = self.check_prompt(prompt_ids)
        params.check_vocab(self.vocab_size)
        room = self.max_model_len - len(ids)
        max_output = room if params.max_tokens is None else min(params.max_tokens, room)
        tables = self.scheduler.tables
        if len(ids) + max_output - 1 > tables.n_blocks * tables.block_size:
            raise CapacityError(
                f"the request may grow to {len(ids) + max_output} tokens, the KV pool holds "
                f"{tables.n_blocks * tables.block_size}; lower max_tokens or shorten the prompt"
            )
        stop_ids = frozenset(params.stop_token_ids or ())
        if not params.ignore_eos:
            stop_ids |= self.eos_token_ids
        return Sequence(
            request_id,
            ids,
            params,
            max_output=max_output,
            stop_ids=stop_ids,
            prompt=prompt,
            text=self._text_stream(ids, params),
            stream=stream,
            arrival_s=time.monotonic(),
        )

    def submit(self, seq: Sequence) -> None:
        """Accept a prepared request; it starts to run in one of the next steps.

        Raises:
            RequestError: the request id is in use.
        """
        if self._requests.setdefault(seq.request_id, seq) is not seq:
            raise RequestError(f"request id {show(seq.request_id)} is in use; choose another")
        seed, number = seq.params.seed, next(self._counter)
        seq.seed = derive_seed(self.seed, number) if seed is None else seed & ((1 << 64) - 1)
        self._arrived.append(seq)

    def add_request(
        self,
        request_id: str,
        prompt_ids: Seq[int] | I32Array,
        params: SamplingParams,
        *,
        prompt: str | None = None,
        stream: bool = False,
    ) -> None:
        """`prepare` and `submit`; arguments and errors as theirs."""
        self.submit(self.prepare(request_id, prompt_ids, params, prompt=prompt, stream=stream))

    def _text_stream(self, ids: I32Array, params: SamplingParams) -> TextStream | None:
        if self.tokenizer is not None and params.detokenize:
            return TextStream(
                self.tokenizer,
                ids[-64:].tolist(),  # its end tells whether a leading space is real
                stop=params.stop_strings,
                include_stop_str_in_output=params.include_stop_str_in_output,
                skip_special_tokens=params.skip_special_tokens,
            )
        if params.stop:
            raise RequestError("stop strings need text, but there is no tokenizer; use stop_token_ids")
        return None

    def check_prompt(self, prompt_ids: Seq[int] | I32Array) -> I32Array:
        """The prompt as i32 [n].

        Raises:
            RequestError: it is empty, too long, or has an id outside the vocabulary.
        """
        try:
            ids = np.asarray(prompt_ids)
        except (ValueError, TypeError, OverflowError):
            ids = np.empty((0, 0))
        if ids.ndim == 1 and ids.size == 0:
            raise RequestError("the prompt is empty; expected at least one token")
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise RequestError(f"the prompt is {show(prompt_ids)}, expected a flat list of token ids")
        if len(ids) >= self.max_model_len:
            raise RequestError(
                f"the prompt has {len(ids)} tokens, expected at most {self.max_model_len - 1}: max_model_len "
                f"is {self.max_model_len} and the output needs one; shorten it or raise max_model_len"
            )
        wrong = (ids < 0) | (ids >= self.vocab_size)
        if wrong.any():
            at = int(wrong.argmax())
            raise RequestError(
                f"the prompt has token id {ids[at]} at index {at}, expected 0 to {self.vocab_size - 1}"
            )
        return np.ascontiguousarray(ids, dtype=np.int32)

    def abort(self, request_id: str) -> None:
        """End a request before the next step runs; an unknown or finished one is ignored."""
        self._aborted.append(request_id)

    @property
    def has_unfinished(self) -> bool:
        """Whether any accepted request has not finished."""
        return bool(self._requests)

    def step(self) -> list[RequestOutput]:
        """Run one step.

        Returns:
            An output for every request that finished, and for every streaming one that got a token. A
            request that failed has finish_reason "error" and the message as stop_reason; the others do not
            notice.
        """
        start = time.perf_counter()
        emitted = self._receive()
        step = self.scheduler.schedule()
        if not step.seqs:
            return [seq.output() for seq in emitted]
        try:
            for seq in step.admitted:
                self.sampler.open(seq)
            logits, sampled = self.runner.run(step)
            run_end = time.perf_counter()
            drawn = self.sampler.sample(logits, sampled) if sampled else None
            self.stats.sample_s += time.perf_counter() - run_end
        except FATAL:
            raise
        except BaseException as error:  # which of them was the reason can't be known: the step fails as one
            for seq in step.seqs:
                self._fail(seq, error)
            return [seq.output() for seq in emitted + step.seqs]
        for seq, n_new in zip(step.seqs, step.n_new, strict=True):
            # Only parts of prompts; the others are committed together with their token.
            if seq.n_computed + n_new < seq.n_tokens:
                seq.n_computed += n_new
        if drawn is not None:
            self._commit(sampled, drawn)
            emitted += [seq for seq in sampled if seq.stream or seq.status is Status.FINISHED]
        outputs = [seq.output() for seq in emitted]
        stats = self.stats
        stats.n_steps += 1
        stats.n_tokens += step.n_tokens
        stats.n_sampled += len(sampled)
        stats.run_s = self.runner.run_s
        stats.step_s += time.perf_counter() - start
        return outputs

    def _receive(self) -> list[Sequence]:
        """Take in what other threads have asked for; returns the sequences that were aborted."""
        while self._arrived:
            self.scheduler.add(self._arrived.popleft())
        aborted = []
        while self._aborted:
            seq = self._requests.get(self._aborted.popleft())
            if seq is not None:
                try:
                    seq.extend_text(seq.n_output)
                    if seq.text is not None:
                        seq.text.finish(check_stop=False)
                    self._finish(seq, "abort", None)
                except FATAL:
                    raise
                except BaseException as error:
                    self._fail(seq, error)
                aborted.append(seq)
        return aborted

    def _commit(self, seqs: list[Sequence], drawn: SampleResult) -> None:
        """Give every sequence its token, and end those that it ends."""
        now_s = time.monotonic()
        tokens = drawn.tokens.tolist()
        errors = drawn.errors.tolist()
        for i, seq in enumerate(seqs):
            try:
                if errors[i]:
                    raise PaceError("the logits hold NaN; check the checkpoint, or bisect with --kernels")
                seq.commit(tokens[i])
                if seq.first_token_s is None:
                    seq.first_token_s = now_s
                if seq.logprobs is not None:
                    self._add_logprobs(seq, drawn, i)
                self._check_end(seq, tokens[i])
            except FATAL:
                raise
            except BaseException as error:
                self._fail(seq, error)

    def _check_end(self, seq: Sequence, token: int) -> None:
        """Extend the text where it is needed now, and end the sequence where its last token ends it."""
        params, text = seq.params, seq.text
        reason: str | None = None
        stop_reason: int | str | None = None
        n_output = seq.n_output
        if token in seq.stop_ids and n_output >= params.min_tokens:
            reason = "stop"
            # As vLLM: the model's own EOS says nothing more, an id that the caller chose is named.
            stop_reason = None if token in self.eos_token_ids and not params.ignore_eos else token
        elif n_output >= seq.max_output:
            reason = "length"
        if text is not None and (seq.stream or seq.has_stops or reason is not None):
            by_token = reason == "stop"
            seq.extend_text(n_output - 1 if by_token and not params.include_stop_str_in_output else n_output)
            if reason is not None and text.matched is None:
                text.finish(check_stop=not by_token and n_output > params.min_tokens)
            if text.matched is not None:
                reason, stop_reason = "stop", text.matched
        if reason is not None:
            self._finish(seq, reason, stop_reason)

    def _add_logprobs(self, seq: Sequence, drawn: SampleResult, i: int) -> None:
        """Record {token: Logprob} of the drawn token and of the most probable ones, as vLLM orders them."""
        with_text = self.tokenizer is not None and seq.params.detokenize
        text_of = self.tokenizer.decode_token if self.tokenizer is not None and with_text else None

        def entry(token: int, logprob: float, rank: int) -> Logprob:
            return Logprob(logprob, rank, None if text_of is None else text_of(token))

        token = int(drawn.tokens[i])
        logprob = float(drawn.logprobs[i])
        entries = {token: entry(token, logprob, int(drawn.ranks[i]))}
        n = seq.params.logprobs or 0
        tops = zip(drawn.top_ids[i, :n].tolist(), drawn.top_logprobs[i, :n].tolist(), strict=True)
        for rank, (top, top_logprob) in enumerate(tops, 1):
            if top not in entries:
                entries[top] = entry(top, top_logprob, rank)
        if seq.logprobs is not None and seq.cumulative_logprob is not None:
            seq.logprobs.append(entries)
            seq.cumulative_logprob += logprob

    def _fail(self, seq: Sequence, error: BaseException) -> None:
        text = str(error) if isinstance(error, PaceError) else f"{type(error).__name__}: {error}"
        self._finish(seq, "error", one_line(text))

    def _finish(self, seq: Sequence, reason: str, stop_reason: int | str | None) -> None:
        self.scheduler.remove(seq)
        seq.finish(reason, stop_reason, time.monotonic())
        self._requests.pop(seq.request_id, None)
