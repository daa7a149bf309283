"""`/v1/chat/completions`."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from pace.server.backend import Call
from pace.server.counts import Counts
from pace.server.http import json_response
from pace.server.logprobs import chat_logprobs, prompt_logprobs
from pace.server.protocol.chat import (
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatRequest,
    ChoiceDelta,
    ChunkChoice,
    Function,
    FunctionChunk,
    Message,
    ToolCallChunk,
    ToolCallObject,
)
from pace.server.requests import chat_of, chat_params, id_of, one_by_one
from pace.server.service import FINGERPRINT, Service
from pace.server.sse import DONE, EventStream, TextEvents, event
from pace.server.wire import Delta, Done, Event, Job, Scores, TokenLogprob, ToolCallDelta

__all__ = ["chat_completions"]


@dataclass
class _Choice:
    """An answer so far."""

    text: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: dict[int, ToolCallObject] = field(default_factory=dict)
    logprobs: list[list[TokenLogprob]] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None


class _Writer:
    """Writes the answer to one request, in chunks or as a whole."""

    def __init__(self, request: ChatRequest, call: Call, model: str, number: str) -> None:
        self.counts = Counts(call.accepted)
        self._request = request
        self._accepted = call.accepted[0]
        self._model = model
        self._number = f"chatcmpl-{number}"
        self._created = int(time.time())
        self._n = request.n or 1
        self._choices = [_Choice() for _ in range(self._n)]
        self._scores: list[list[TokenLogprob] | None] | None = None
        options = request.stream_options
        self._usage_at_end = bool(options and options.include_usage)
        self._usage_always = bool(options and options.continuous_usage_stats)
        self._text_event = TextEvents()
        self._is_plain = not (
            request.logprobs
            or request.return_token_ids
            or request.prompt_logprobs is not None
            or self._usage_always
        )

    # ---- in chunks ----------------------------------------------------------------------------------------

    def begin(self) -> bytes:
        """The first chunks: whose message it is."""
        chunks = []
        for index in range(self._n):
            chunk = self._chunk([ChunkChoice(index, ChoiceDelta(role="assistant", content=""))])
            if index == 0 and self._request.return_token_ids and self._accepted is not None:
                chunk.prompt_token_ids = self._accepted.prompt_token_ids or []
            chunks.append(event(chunk))
        return b"".join(chunks)

    def chunk(self, one: Event) -> bytes:
        """What the client is told of an event."""
        if not isinstance(one, Delta):
            if isinstance(one, Done):
                self.counts.done(one)
            elif isinstance(one, Scores):
                self._scores = one.logprobs  # told with the first token
            return b""
        self.counts.n_output += len(one.token_ids)
        if self._is_plain and not (one.reasoning or one.tool_calls or one.finish_reason):
            return self._text_event(self._text_chunk, one.index, one.text)
        choice = self._choices[one.index]
        delta = ChoiceDelta()
        if one.text:
            delta.content = one.text
        if one.reasoning and self._request.include_reasoning is not False:
            delta.reasoning_content = one.reasoning
        calls = [self._call_chunk(choice, call) for call in self._wanted(one.tool_calls)]
        if calls:
            delta.tool_calls = calls
        elif not one.text and not one.reasoning and one.finish_reason is None:
            delta.content = ""  # a token without text yet: whoever counts chunks sees it
        told = ChunkChoice(one.index, delta)
        if self._request.logprobs and one.logprobs:
            told.logprobs = chat_logprobs(one.logprobs, self._request.top_logprobs or 0)
        if self._request.return_token_ids:
            told.token_ids = one.token_ids
        if one.finish_reason is None:
            return event(self._chunk([told]))
        # The reason comes in a chunk of its own, with nothing new in it.
        last = ChunkChoice(one.index, ChoiceDelta(), None, self._reason(choice, one.finish_reason))
        if one.stop_reason is not None:
            last.stop_reason = one.stop_reason
        says_nothing = not (one.text or one.reasoning or calls or one.token_ids)
        return (b"" if says_nothing else event(self._chunk([told]))) + event(self._chunk([last]))

    def end(self) -> bytes:
        """The end of the stream."""
        if not self._usage_at_end:
            return DONE
        chunk = self._chunk([])
        chunk.usage = self.counts.usage()
        if self.counts.speculative is not None:
            chunk.speculative = self.counts.speculative
        return event(chunk) + DONE

    def _text_chunk(self, index: int, text: str) -> ChatChunk:
        return self._chunk([ChunkChoice(index, ChoiceDelta(content=text))])

    def _chunk(self, choices: list[ChunkChoice]) -> ChatChunk:
        chunk = ChatChunk(self._number, self._created, self._model, choices, system_fingerprint=FINGERPRINT)
        if self._usage_always:
            chunk.usage = self.counts.usage()
        elif self._usage_at_end:
            chunk.usage = None
        if self._scores is not None:
            chunk.prompt_logprobs, self._scores = prompt_logprobs(self._scores), None
        return chunk

    def _call_chunk(self, choice: _Choice, call: ToolCallDelta) -> ToolCallChunk:
        if call.index in choice.calls:
            return ToolCallChunk(call.index, function=FunctionChunk(arguments=call.arguments))
        choice.calls[call.index] = ToolCallObject(call.id, Function(call.name, ""))
        return ToolCallChunk(call.index, call.id, "function", FunctionChunk(call.name, call.arguments))

    # ---- as a whole ---------------------------------------------------------------------------------------

    def add(self, one: Event) -> None:
        """Keep what an event says."""
        if isinstance(one, Done):
            self.counts.done(one)
        elif isinstance(one, Scores):
            self._scores = one.logprobs
        elif isinstance(one, Delta):
            self.counts.n_output += len(one.token_ids)
            choice = self._choices[one.index]
            choice.text.append(one.text)
            choice.reasoning.append(one.reasoning or "")
            choice.logprobs += one.logprobs or []
            choice.token_ids += one.token_ids
            choice.finish_reason, choice.stop_reason = one.finish_reason, one.stop_reason
            for call in self._wanted(one.tool_calls):
                known = choice.calls.setdefault(call.index, ToolCallObject(call.id, Function(call.name, "")))
                known.function.arguments += call.arguments

    def whole(self) -> ChatCompletion:
        """The answer."""
        choices = [self._whole_choice(index, choice) for index, choice in enumerate(self._choices)]
        completion = ChatCompletion(
            self._number,
            self._created,
            self._model,
            choices,
            self.counts.usage(),
            system_fingerprint=FINGERPRINT,
        )
        if self._scores is not None:
            completion.prompt_logprobs = prompt_logprobs(self._scores)
        if self._request.return_token_ids and self._accepted is not None:
            completion.prompt_token_ids = self._accepted.prompt_token_ids or []
        if self.counts.speculative is not None:
            completion.speculative = self.counts.speculative
        return completion

    def _whole_choice(self, index: int, choice: _Choice) -> ChatChoice:
        text, reasoning = "".join(choice.text), "".join(choice.reasoning)
        message = Message(None if choice.calls and not text else text)
        if reasoning and self._request.include_reasoning is not False:
            message.reasoning_content = reasoning
        if choice.calls:
            message.tool_calls = [choice.calls[at] for at in sorted(choice.calls)]
        whole = ChatChoice(
            index, message, None, self._reason(choice, choice.finish_reason), choice.stop_reason
        )
        if self._request.logprobs:
            whole.logprobs = chat_logprobs(choice.logprobs, self._request.top_logprobs or 0)
        if self._request.return_token_ids:
            whole.token_ids = choice.token_ids
        return whole

    # ---- both ---------------------------------------------------------------------------------------------

    def _wanted(self, calls: list[ToolCallDelta] | None) -> list[ToolCallDelta]:
        """The calls that are told: one, where the client asked for no parallel ones."""
        only_first = self._request.parallel_tool_calls is False
        return [call for call in calls or () if not only_first or call.index == 0]

    def _reason(self, choice: _Choice, reason: str | None) -> str | None:
        return "tool_calls" if choice.calls and reason == "stop" else reason


async def chat_completions(service: Service, http: HttpRequest) -> Response:
    """Answer a conversation."""
    request = await service.read(http, ChatRequest)
    model = service.check_model(request.model)
    service.check_n(request.n)
    params = chat_params(request)
    chat = chat_of(request, trust_template=service.limits.trust_request_chat_template)
    number = id_of(request.request_id, http.scope["pace.id"])

    def jobs(call: Call) -> list[Job]:
        return [
            Job(
                call.ids[0],
                number,
                None,
                chat,
                params,
                request.priority or 0,
                request.cache_salt,
                bool(request.return_token_ids),
                one_by_one=one_by_one(request),
            )
        ]

    call = await service.call(http, jobs, 1)
    writer = _Writer(request, call, model, number)
    if request.stream:
        return EventStream(call, service.slow, writer.begin(), writer.chunk, writer.end)
    await service.collect(call, writer.add)
    return json_response(writer.whole())
