"""`AsyncLLM`: many requests at once from asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from collections.abc import Sequence as Seq
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Any

from pace.driver import Notify, Ticket
from pace.engine.request import Request
from pace.errors import RequestError, show
from pace.frontend import Frontend
from pace.inputs import ChatOptions, Encoded, Messages, Prompt, deadline, embedding_of, n_chars
from pace.outputs import EmbeddingRequestOutput, RequestOutput
from pace.params import SamplingParams
from pace.pooling_params import PoolingParams
from pace.vllm_names import REQUEST_OPTIONS, takes_names

__all__ = ["AsyncLLM"]

# Longer prompts are encoded off the event loop. 2000 characters take 0.4 ms here, 0.19 us each, and the way to
# a worker and back 0.07 ms: a shorter prompt would hardly gain, a longer one would hold up every stream.
MAX_INLINE_CHARS = 2000
N_ENCODERS = 2


class AsyncLLM(Frontend):
    """A model, ready to generate for asyncio.

    The engine steps in a thread of its own while any request has not finished, and sleeps otherwise. One
    AsyncLLM may be used from several event loops, in several threads; each of them is woken at most once
    per step, for all its requests.
    """

    @takes_names(REQUEST_OPTIONS)
    def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        timeout_s: float | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Complete a prompt: `async for output in llm.generate(...)`.

        A reader who is slower than the engine gets several tokens in one output: nothing is lost, and
        nothing piles up. Leaving the loop, cancelling its task or dropping the generator ends the request
        before the next step.

        Args:
            prompt: see `Prompt`.
            sampling_params: fields not set take the checkpoint's defaults. Its output_kind says what the
                outputs hold: the whole output so far (CUMULATIVE, the default), what is new (DELTA), or
                only the last one comes (FINAL_ONLY).
            request_id: for `abort`, unique among the requests in flight; None: one is made up.
            priority: lower runs first.
            timeout_s: after so many seconds the request ends with finish_reason "abort" and stop_reason
                "deadline".

        Yields:
            Outputs; the last one is `finished`. A request that failed while running ends with finish_reason
            "error" and the message as stop_reason.

        Raises:
            At the first iteration, with nothing queued:
            RequestError, CapacityError: the prompt or a parameter is invalid, or the id is in use.
            QueueFullError: max_num_waiting sequences wait already.
            At any:
            EngineDeadError: the engine failed as a whole.
            PaceError: the AsyncLLM has been closed.
        """

        def encode() -> list[Encoded]:
            return self._inputs.encode([prompt])

        size = n_chars(prompt)
        return self._complete(encode, size, sampling_params, request_id, priority, timeout_s)

    @takes_names(REQUEST_OPTIONS)
    def chat(
        self,
        messages: Messages,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tools: Seq[Mapping[str, Any]] | None = None,
        include_reasoning: bool = False,
        tool_choice: str | Mapping[str, Any] | None = None,
        tool_parser: str | None = None,
        priority: int = 0,
        timeout_s: float | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Answer a conversation through the checkpoint's chat template.

        Args:
            messages: the conversation.
            add_generation_prompt, continue_final_message, chat_template, chat_template_kwargs, tools,
                include_reasoning, tool_choice, tool_parser: as `LLM.chat`.

        The other arguments, outputs and errors are those of `generate`.

        Raises:
            ChatTemplateError: there is no template, or it is malformed or failed.
        """

        options = ChatOptions(
            add_generation_prompt,
            continue_final_message,
            chat_template,
            chat_template_kwargs,
            tools,
            include_reasoning,
            tool_choice,
            tool_parser,
        )

        def encode() -> list[Encoded]:
            return self._inputs.encode_chats([messages], options)

        size = n_chars(messages) + n_chars(tools)
        if tool_choice not in (None, "auto", "none"):  # a grammar, as below
            size = MAX_INLINE_CHARS + 1
        return self._complete(encode, size, sampling_params, request_id, priority, timeout_s)

    @takes_names(REQUEST_OPTIONS)
    async def embed(
        self,
        prompt: Prompt,
        pooling_params: PoolingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        timeout_s: float | None = None,
    ) -> EmbeddingRequestOutput:
        """Turn a text into a vector: `await llm.embed(...)`; see `LLM.embed`.

        Cancelling it ends the request before the next step.

        Args:
            prompt: see `Prompt`.
            pooling_params: as `LLM.embed`.
            request_id, priority, timeout_s: as `generate`.

        Raises:
            RequestError, CapacityError, CheckpointError, EngineDeadError, PaceError: as `LLM.embed`.
            QueueFullError: max_num_waiting sequences wait already.
        """

        def make(number: str, deadline_s: float | None) -> Request:
            (request,) = self._inputs.embedding_requests(
                self._inputs.encode([prompt]),
                pooling_params,
                iter([number]),
                priority=priority,
                deadline_s=deadline_s,
            )
            return request

        outputs = self._generate(make, n_chars(prompt), request_id, timeout_s)
        async with aclosing(outputs):
            last = [output async for output in outputs][-1]
        return embedding_of(last)

    async def abort(self, request_id: str | Iterable[str]) -> None:
        """End requests before the next step: their last output has finish_reason "abort".

        Ids of requests that have finished, or never were, are ignored.
        """
        for one in [request_id] if isinstance(request_id, str) else request_id:
            preparing = self._preparing.get(one)
            if preparing is not None:
                preparing.is_aborted = True
            self._driver.abort(one)

    def close(self) -> None:
        """End the engine's threads after the step they are in; requests in flight raise PaceError.

        Calling it again does nothing. `async with` does the same without holding up the event loop.
        """
        super().close()
        self._encoders.shutdown()

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(self, *exception: object) -> None:
        try:
            closing = asyncio.get_running_loop().run_in_executor(None, self.close)
        except RuntimeError:  # no thread can be started
            self.close()
        else:
            await closing

    def _start(self, *args: Any) -> None:
        super()._start(*args)
        self._encoders = ThreadPoolExecutor(N_ENCODERS, thread_name_prefix="pace-encode")
        self._preparing: dict[str, _Preparing] = {}  # by request id: what the engine does not know yet

    def _complete(
        self,
        encode: Callable[[], list[Encoded]],
        size: int,
        params: SamplingParams | None,
        request_id: str | None,
        priority: int,
        timeout_s: float | None,
    ) -> AsyncGenerator[RequestOutput, None]:
        def make(number: str, deadline_s: float | None) -> Request:
            (request,) = self._inputs.requests(
                encode(), params, iter([number]), stream=True, priority=priority, deadline_s=deadline_s
            )
            return request

        # A grammar takes long to compile, and the first one reads the whole vocabulary.
        if getattr(params, "structured_outputs", None) is not None:
            size = MAX_INLINE_CHARS + 1
        return self._generate(make, size, request_id, timeout_s)

    async def _generate(
        self,
        make: Callable[[str, float | None], Request],
        size: int,
        request_id: str | None,
        timeout_s: float | None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Run the request that `make` makes of its id and deadline; off the event loop if `size` says it takes long."""
        self._driver.check()
        if request_id is None:
            request_id = f"request-{next(self._ids)}"
        elif not isinstance(request_id, str) or not request_id:
            raise RequestError(f"request_id is {show(request_id)}, expected a non-empty string, or None")
        deadline_s = deadline(timeout_s)
        preparing = _Preparing()
        if self._preparing.setdefault(request_id, preparing) is not preparing:
            raise RequestError(f"request id {show(request_id)} is in use; choose another")
        loop = asyncio.get_running_loop()
        try:
            encoding = None
            if size > MAX_INLINE_CHARS:
                with suppress(RuntimeError):  # no thread can be started: then it takes the loop's time
                    encoding = loop.run_in_executor(self._encoders, make, request_id, deadline_s)
            request = make(request_id, deadline_s) if encoding is None else await encoding
            ticket = _AsyncTicket(request, _Waker(loop))
        except BaseException:
            del self._preparing[request_id]
            raise
        try:
            if preparing.is_aborted:
                ticket.request.cancel()
            try:
                self._driver.submit(ticket)
            finally:
                del self._preparing[request_id]
            if preparing.is_aborted:
                self._driver.drop(ticket)
            finished = False
            while not finished:
                output = ticket.take()
                if output is None:
                    self._driver.check()
                    await ticket.wait(loop)
                else:
                    finished = output.finished
                    yield output
        finally:
            self._driver.drop(ticket)


@dataclass(slots=True)
class _Preparing:
    """A request whose prompt is being encoded."""

    is_aborted: bool = False


class _AsyncTicket(Ticket):
    """A ticket whose reader waits in an event loop."""

    __slots__ = ("_reader",)

    def __init__(self, request: Request, notify: Notify) -> None:
        super().__init__(request, notify)
        self._reader: asyncio.Future[None] | None = None

    async def wait(self, loop: asyncio.AbstractEventLoop) -> None:
        """Sleep until `wake`; only in the loop's thread, where nothing can come between `take` and this."""
        self._reader = loop.create_future()
        try:
            await self._reader
        finally:
            self._reader = None

    def wake(self) -> None:
        """There is something to read, or nothing will ever be; only in the loop's thread."""
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)


@dataclass(frozen=True)
class _Waker:
    """Wakes the readers of one event loop; equal ones are one, so that a step wakes a loop once."""

    loop: asyncio.AbstractEventLoop

    def __call__(self, tickets: list[Ticket]) -> None:
        self.loop.call_soon_threadsafe(_wake, tickets)


def _wake(tickets: list[Ticket]) -> None:
    for ticket in tickets:
        if isinstance(ticket, _AsyncTicket):
            ticket.wake()
