"""An engine's side of the server: jobs in, events out, one batch of them per step."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

import msgspec

from pace.driver import Ticket
from pace.engine.request import Request
from pace.errors import PaceError, RequestError, one_line
from pace.frontend import Frontend
from pace.inputs import ChatOptions, Encoded, n_chars
from pace.log import logger
from pace.outputs import CompletionOutput, Logprob, RequestOutput
from pace.params import RequestOutputKind, SamplingParams
from pace.pooling_params import PoolingParams
from pace.server.wire import (
    Accepted,
    Answer,
    Chat,
    Delta,
    Detokenize,
    Done,
    Embedded,
    Event,
    Failed,
    Info,
    Job,
    Parsers,
    Refused,
    Scores,
    Tokenize,
    TokenLogprob,
    ToolCallDelta,
)

__all__ = ["Station", "params_of"]

MAX_INLINE_CHARS = 2000  # as in AsyncLLM: longer prompts are encoded off the event loop
N_ENCODERS = 2


def params_of(values: dict[str, Any]) -> SamplingParams:
    """Sampling parameters from the fields of a request.

    Raises:
        RequestError: a value is out of range.
    """
    return SamplingParams(**values, output_kind=RequestOutputKind.DELTA)


@dataclass(slots=True)
class _Running:
    """A job between its arrival and its end."""

    job: Job
    ticket: Ticket | None = None
    is_aborted: bool = False
    ended: set[int] = field(default_factory=set)  # completions whose end has been told


class Station(Frontend):
    """A model that takes jobs. After `open`, all methods belong to one event loop's thread."""

    parsers = Parsers()
    """How answers are read; set before `open`."""

    def open(self, loop: asyncio.AbstractEventLoop, sink: Callable[[list[Event]], None]) -> None:
        """Take jobs from now on.

        Args:
            loop: where `sink` is called.
            sink: takes what there is to tell: once per step for all jobs, and for each answer.
        """
        self._loop = loop
        self._sink = sink
        self._running: dict[int, _Running] = {}  # by job id
        self._numbers: dict[str, int] = {}  # the engine's request ids -> job ids
        self._encoders = ThreadPoolExecutor(N_ENCODERS, thread_name_prefix="pace-encode")

    def info(self) -> Info:
        """What the front-end wants to know before the first job."""
        loaded, engine = self.loaded, self.engine
        facts = {
            "has_tokenizer": loaded.tokenizer is not None,
            "vocab_size": engine.preparer.vocab_size,
            "max_num_seqs": self.config.n_places,
            "max_num_waiting": self.config.max_num_waiting,
            "max_logprobs": engine.preparer.max_logprobs,
            "kv_cache_type": self.config.kv_cache_type,
            "kv_cache_dtype": self.config.kv_cache_dtype,
        }
        return Info(os.getpid(), self.config.model, engine.preparer.max_model_len, facts, self.beat())

    def check(self) -> None:
        """Raises PaceError where the engine can't be used any more."""
        self._driver.check()

    def beat(self) -> dict[str, Any]:
        """The engine's counters, of plain types."""
        return self.stats()

    def close(self) -> None:
        """See `Frontend.close`."""
        super().close()
        if hasattr(self, "_encoders"):
            self._encoders.shutdown(wait=False, cancel_futures=True)

    # ---- orders ---------------------------------------------------------------------------------------------

    def submit(self, job: Job) -> None:
        """Start a job; `Accepted` or `Refused` is the first that is told of it."""
        running = self._running[job.id] = _Running(job)
        self._off_loop(
            # A grammar takes long to compile, whatever the prompt.
            MAX_INLINE_CHARS + 1 if _has_grammar(job) else _size(job.prompt, job.chat),
            partial(self._prepare, job),
            partial(self._start_job, running),
        )

    def abort(self, job_id: int) -> None:
        """End a job before the next step; one that has ended is ignored."""
        running = self._running.pop(job_id, None)
        if running is not None:
            running.is_aborted = True
            if running.ticket is not None:
                self._driver.drop(running.ticket)

    def tokenize(self, question: Tokenize) -> None:
        """Answer with token ids, and their texts where asked."""

        def work() -> object:
            if question.chat is not None:
                (encoded,) = self._inputs.encode_chats([question.chat.messages], self._options(question.chat))
                ids = [int(i) for i in encoded.ids]
            else:
                ids = self._inputs.tokenizer.encode(
                    question.prompt or "", add_special_tokens=question.add_special_tokens
                )
            tokenizer = self._inputs.tokenizer
            return [ids, [tokenizer.decode_token(i) for i in ids] if question.returns_texts else None]

        self._ask(question.id, _size(question.prompt, question.chat), work)

    def detokenize(self, question: Detokenize) -> None:
        """Answer with text."""

        def work() -> object:
            tokenizer = self._inputs.tokenizer
            tokenizer.check_ids(question.token_ids, "tokens")
            return tokenizer.decode(question.token_ids, skip_special_tokens=False)

        self._ask(question.id, len(question.token_ids), work)

    def _ask(self, number: int, size: int, work: Callable[[], object]) -> None:
        def tell(value: object, error: BaseException | None) -> None:
            self._sink([Answer(number, value) if error is None else _refused(number, error)])

        self._off_loop(size, work, tell)

    def _off_loop(
        self, size: int, work: Callable[[], Any], then: Callable[[Any, BaseException | None], None]
    ) -> None:
        """`then(work(), None)` or `then(None, error)`; what takes long does not hold up the loop."""

        def attempt() -> tuple[Any, BaseException | None]:
            try:
                return work(), None
            except Exception as error:
                return None, error

        def run() -> None:
            result = attempt()
            with suppress(RuntimeError):  # the loop has been closed
                self._loop.call_soon_threadsafe(then, *result)

        if size > MAX_INLINE_CHARS:
            try:
                self._encoders.submit(run)
                return
            except RuntimeError:  # no thread can be started: then it takes the loop's time
                pass
        then(*attempt())

    def _prepare(self, job: Job) -> Request:
        if job.chat is not None:
            (encoded,) = self._inputs.encode_chats([job.chat.messages], self._options(job.chat))
        elif isinstance(job.prompt, str):
            (encoded,) = self._inputs.encode([job.prompt])
        else:
            encoded = Encoded(job.prompt)
        encoded.cache_salt = job.cache_salt
        number = iter([f"{job.request_id}/{job.id}"])
        if job.pooling is not None:
            pooling = PoolingParams(**msgspec.structs.asdict(job.pooling))
            (request,) = self._inputs.embedding_requests([encoded], pooling, number, priority=job.priority)
        else:
            (request,) = self._inputs.requests(
                [encoded], params_of(job.params), number, stream=True, priority=job.priority
            )
            request.one_by_one = job.one_by_one
        return request

    def _options(self, chat: Chat) -> ChatOptions:
        return ChatOptions(
            add_generation_prompt=chat.add_generation_prompt,
            continue_final_message=chat.continue_final_message,
            chat_template=chat.chat_template,
            chat_template_kwargs=chat.chat_template_kwargs,
            tools=chat.tools,
            include_reasoning=chat.include_reasoning,
            tool_choice=chat.tool_choice,
            tool_parser=self.parsers.tools,
            reasoning_parser=self.parsers.reasoning,
        )

    def _start_job(self, running: _Running, request: Request | None, error: BaseException | None) -> None:
        job = running.job
        if running.is_aborted:
            return
        if error is None and request is not None:
            ticket = Ticket(request, self._notify)
            try:
                self._driver.submit(ticket)
            except Exception as refused:
                error = refused
            else:
                running.ticket = ticket
                self._numbers[ticket.request_id] = job.id
        if error is not None or request is None:
            del self._running[job.id]
            self._sink([_refused(job.id, error or RequestError("no request"))])
            return
        accepted = Accepted(job.id, len(request.prompt_ids))
        if job.returns_prompt:
            accepted.prompt_token_ids = [int(i) for i in request.prompt_ids]
            accepted.prompt = request.prompt
            if accepted.prompt is None and self.loaded.tokenizer is not None:
                accepted.prompt = self.loaded.tokenizer.decode(
                    accepted.prompt_token_ids, skip_special_tokens=False
                )
        self._sink([accepted])

    # ---- outputs --------------------------------------------------------------------------------------------

    def _notify(self, tickets: list[Ticket]) -> None:
        """Called in the engine's thread, once per step."""
        self._loop.call_soon_threadsafe(self._deliver, tickets)

    def _deliver(self, tickets: list[Ticket]) -> None:
        events: list[Event] = []
        for ticket in tickets:
            number = self._numbers.get(ticket.request_id)
            running = None if number is None else self._running.get(number)
            output = ticket.take()
            if output is None:
                events += self._owed(running, ticket)
            while output is not None:
                if output.finished:
                    self._forget(ticket)
                if running is not None and not running.is_aborted:
                    events += self._told(running, output)
                output = ticket.take()
        if events:
            self._sink(events)

    def _owed(self, running: _Running | None, ticket: Ticket) -> list[Event]:
        """Where the engine has ended, it wakes everybody whom it owes something."""
        if running is None or not self._driver.holds(ticket):
            return []
        try:
            self._driver.check()
        except PaceError as error:
            self._forget(ticket)
            return [Failed(running.job.id, str(error))]
        return []

    def _told(self, running: _Running, output: RequestOutput) -> list[Event]:
        try:
            return self._events(running, output)
        except Exception as error:  # of one job: the others' outputs are told all the same
            logger.exception("an output could not be told")
            self.abort(running.job.id)
            return [Failed(running.job.id, one_line(f"{type(error).__name__}: {error}"))]

    def _forget(self, ticket: Ticket) -> None:
        number = self._numbers.pop(ticket.request_id, None)
        if number is not None:
            self._running.pop(number, None)

    def _events(self, running: _Running, output: RequestOutput) -> list[Event]:
        number = running.job.id
        if running.job.pooling is not None:
            return _embedded(number, output)
        events: list[Event] = []
        if output.prompt_logprobs is not None:
            scores = [None if one is None else self._logprobs(one) for one in output.prompt_logprobs]
            events.append(Scores(number, scores))
        for completion in output.outputs:
            if completion.index in running.ended:
                continue
            if completion.finish_reason is not None:
                running.ended.add(completion.index)
            elif not (completion.token_ids or completion.text):
                continue
            events.append(self._delta(number, completion))
        if output.finished:
            events.append(_done(number, output))
        return events

    def _delta(self, number: int, completion: CompletionOutput) -> Delta:
        delta = Delta(
            number, completion.index, completion.text, list(completion.token_ids), completion.reasoning
        )
        delta.finish_reason, delta.stop_reason = completion.finish_reason, completion.stop_reason
        delta.is_request_error = completion.is_request_error
        if completion.logprobs is not None:
            delta.logprobs = [self._logprobs(entries) for entries in completion.logprobs]
            delta.cumulative_logprob = completion.cumulative_logprob
        if completion.tool_calls is not None:
            delta.tool_calls = [
                ToolCallDelta(call.index, call.id, call.name, call.arguments)
                for call in completion.tool_calls
            ]
        return delta

    def _logprobs(self, entries: dict[int, Logprob]) -> list[TokenLogprob]:
        tokenizer = self.loaded.tokenizer
        return [
            TokenLogprob(
                token_id,
                entry.logprob,
                entry.decoded_token or "",
                b"" if tokenizer is None else tokenizer.token_bytes(token_id),
            )
            for token_id, entry in entries.items()
        ]


def _embedded(number: int, output: RequestOutput) -> list[Event]:
    if output.embedding is None:
        (end,) = output.outputs
        return [Failed(number, f"no embedding: {end.stop_reason or end.finish_reason}")]
    data = output.embedding.astype("<f4").tobytes()
    return [Embedded(number, output.metrics.n_prompt_tokens, data), _done(number, output)]


def _done(number: int, output: RequestOutput) -> Done:
    metrics = output.metrics

    def since(then_s: float | None) -> float | None:
        return None if then_s is None else then_s - metrics.arrival_s

    speculative = output.speculative
    return Done(
        number,
        metrics.n_prompt_tokens,
        output.num_cached_tokens,
        metrics.n_output_tokens,
        since(metrics.scheduled_s),
        since(metrics.first_token_s),
        since(metrics.finished_s),
        None if speculative is None else {f.name: getattr(speculative, f.name) for f in fields(speculative)},
    )


def _refused(number: int, error: BaseException) -> Refused:
    if isinstance(error, PaceError):
        # Every job has one prompt; which of a request's prompts it was is the front-end's to say.
        message = str(error).removeprefix("prompt 0: ").removeprefix("conversation 0: ")
        return Refused(number, type(error).__name__, message.removeprefix("prompt 0: "))
    logger.error("a request failed: %s", one_line(f"{type(error).__name__}: {error}"), exc_info=error)
    return Refused(number, "PaceError", one_line(f"{type(error).__name__}: {error}"))


def _has_grammar(job: Job) -> bool:
    chat = job.chat
    return "structured_outputs" in job.params or (
        chat is not None and chat.tool_choice not in (None, "auto", "none")
    )


def _size(prompt: object, chat: Chat | None) -> int:
    return n_chars(prompt) if chat is None else n_chars(chat.messages) + n_chars(chat.tools)
