"""`/v1/responses`."""

from __future__ import annotations

import time
from typing import Any

import msgspec
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from pace.errors import RequestError, show
from pace.server.backend import Call
from pace.server.counts import Counts
from pace.server.http import json_response
from pace.server.protocol.chat import ChatRequest, FunctionSpec, Tool
from pace.server.protocol.common import JsonSchemaFormat, ResponseFormat
from pace.server.protocol.errors import ApiError
from pace.server.protocol.responses import ResponseObject, ResponsesRequest, ResponseUsage
from pace.server.requests import chat_of, chat_params
from pace.server.service import Service
from pace.server.sse import EventStream, named_event
from pace.server.wire import Delta, Done, Event, Job

__all__ = ["responses"]

_SHARED = (
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "stop", "chat_template_kwargs", "cache_salt",
    "priority", "parallel_tool_calls",
)  # fmt: skip


_REFUSED = {
    "previous_response_id": "this server keeps no responses: send the whole conversation as input",
    "conversation": "this server keeps no conversations: send all of it as input",
    "prompt": "this server keeps no prompts: send instructions and input",
    "background": "this server keeps no responses: ask for a stream",
    "top_logprobs": "responses have no log probabilities here: chat completions have",
}
"""Fields that ask for what there is not; null, false and 0 ask for nothing."""


# ---- the request as a chat ----------------------------------------------------------------------------------------


def _as_chat(request: ResponsesRequest) -> ChatRequest:
    for name, why in _REFUSED.items():
        if getattr(request, name):
            what = f"{name} is {show(getattr(request, name))}, but {why}"
            raise ApiError(400, what, param=name, code="unsupported_parameter")
    for name, known in (
        ("text", ("format", "verbosity")),
        ("reasoning", ("effort", "summary", "generate_summary")),
    ):
        unknown = [key for key in getattr(request, name) or {} if key not in known]
        if unknown:
            raise ApiError(400, f"{name} has {show(unknown[0])}, expected {', '.join(known)}", param=name)
    verbosity = (request.text or {}).get("verbosity")
    if verbosity not in (None, "medium"):
        raise ApiError(
            400,
            f"text.verbosity is {show(verbosity)}; models here have one: ask in instructions",
            param="text",
        )
    if "message.output_text.logprobs" in (request.include or ()):
        raise ApiError(400, f"include has log probabilities, but {_REFUSED['top_logprobs']}", param="include")
    if request.truncation not in (None, "disabled"):
        raise ApiError(
            400, f"truncation is {show(request.truncation)}, expected disabled", param="truncation"
        )
    if request.stream_options is not None and not request.stream:
        raise ApiError(400, "stream_options is only for requests with stream: true", param="stream_options")
    chat = ChatRequest(messages=_messages(request), max_tokens=request.max_output_tokens)
    for name in _SHARED:
        setattr(chat, name, getattr(request, name))
    effort = (request.reasoning or {}).get("effort")
    if effort is not None and not isinstance(effort, str):
        raise ApiError(400, f"reasoning.effort is {show(effort)}, expected a name", param="reasoning")
    chat.reasoning_effort = effort
    chat.tools = None if not request.tools else [_tool(tool, i) for i, tool in enumerate(request.tools)]
    chat.tool_choice = request.tool_choice
    form = (request.text or {}).get("format")
    if form is not None:
        chat.response_format = _format(form)
    return chat


def _messages(request: ResponsesRequest) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    if request.instructions is not None:
        messages.append({"role": "system", "content": request.instructions})
    if isinstance(request.input, str):
        return [*messages, {"role": "user", "content": request.input}]
    for i, item in enumerate(request.input):
        kind = item.get("type", "message")
        where = f"input[{i}]"
        if kind == "message":
            messages.append({"role": _role(item, where), "content": _text(item.get("content"), where)})
        elif kind == "function_call":
            function = {
                "name": _string(item, "name", where),
                "arguments": _string(item, "arguments", where) or "{}",
            }
            call = {"id": _string(item, "call_id", where), "type": "function", "function": function}
            if messages and messages[-1].get("tool_calls"):
                messages[-1]["tool_calls"].append(call)
            else:
                messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
        elif kind == "function_call_output":
            text = _text(item.get("output"), where, "output")
            number = _string(item, "call_id", where)
            messages.append({"role": "tool", "tool_call_id": number, "content": text})
        elif kind != "reasoning":  # of an earlier answer: templates leave it out
            raise RequestError(
                f"{where}.type is {show(kind)}, expected message, function_call, function_call_output or reasoning"
            )
    return messages


def _role(item: dict[str, Any], where: str) -> str:
    role = item.get("role")
    if role not in ("user", "assistant", "system", "developer"):
        raise RequestError(f"{where}.role is {show(role)}, expected user, assistant, system or developer")
    return "system" if role == "developer" else str(role)


def _string(item: dict[str, Any], name: str, where: str) -> str:
    value = item.get(name)
    if not isinstance(value, str):
        raise RequestError(f"{where}.{name} is {show(value)}, expected text")
    return value


def _text(content: object, where: str, name: str = "content") -> str:
    if isinstance(content, str):
        return content
    texts = []
    for part in content if isinstance(content, list) else [None]:
        known = isinstance(part, dict) and part.get("type") in ("input_text", "output_text", "text")
        text = part.get("text") if isinstance(part, dict) and known else None
        if not isinstance(text, str):
            raise RequestError(f"{where}.{name} has {show(part)}, expected text or parts of type input_text")
        texts.append(text)
    return "\n".join(texts)


def _tool(tool: dict[str, Any], i: int) -> Tool:
    if tool.get("type") != "function" or not isinstance(tool.get("name"), str):
        raise ApiError(
            400,
            f"tools[{i}] is {show(tool)}, expected a function with a name: no tools run here",
            param="tools",
        )
    try:
        return Tool(type="function", function=msgspec.convert(tool, FunctionSpec))
    except msgspec.ValidationError as error:
        raise ApiError(400, f"tools[{i}]: {error}"[:500], param="tools") from None


def _format(form: Any) -> ResponseFormat:
    kind = form.get("type") if isinstance(form, dict) else None
    if kind in ("text", "json_object"):
        return ResponseFormat(type=kind)
    schema = form.get("schema") if kind == "json_schema" else None
    if not isinstance(schema, (dict, bool)):
        raise ApiError(
            400,
            f"text.format is {show(form)}, expected type text, json_object, or json_schema with a schema",
            param="text",
        )
    return ResponseFormat(type="json_schema", json_schema=JsonSchemaFormat(name="schema", schema=schema))


# ---- the answer -------------------------------------------------------------------------------------------------


class _Item:
    """An item of the output: reasoning, a message, or a function's call."""

    def __init__(self, kind: str, number: str, call_id: str = "", name: str = "") -> None:
        self.kind = kind
        self.number = number
        self.call_id = call_id
        self.name = name
        self.parts: list[str] = []

    def whole(self, status: str) -> dict[str, Any]:
        """As a part of the response."""
        text = "".join(self.parts)
        if self.kind == "reasoning":
            content = [{"type": "reasoning_text", "text": text}]
            return {
                "type": "reasoning",
                "id": self.number,
                "summary": [],
                "content": content,
                "status": status,
            }
        if self.kind == "message":
            content = [] if status == "in_progress" else [self.part()]
            return {
                "type": "message", "id": self.number, "role": "assistant", "status": status, "content": content,
            }  # fmt: skip
        return {
            "type": "function_call", "id": self.number, "call_id": self.call_id, "name": self.name, "arguments": text,
            "status": status,
        }  # fmt: skip

    def part(self) -> dict[str, Any]:
        """Of a message."""
        return {"type": "output_text", "text": "".join(self.parts), "annotations": [], "logprobs": []}


class _Writer:
    """Writes the answer to one request, in events or as a whole."""

    def __init__(self, request: ResponsesRequest, call: Call, model: str, number: str) -> None:
        self.counts = Counts(call.accepted)
        self._request = request
        self._model = model
        self._number = number
        self._created = int(time.time())
        self._items: list[_Item] = []
        self._calls: dict[int, _Item] = {}
        self._finish_reason: str | None = None
        self._sequence = 0

    # ---- events -----------------------------------------------------------------------------------------------

    def begin(self) -> bytes:
        """The first events."""
        state = msgspec.to_builtins(self._response("in_progress"))
        return self._event("response.created", response=state) + self._event(
            "response.in_progress", response=state
        )

    def chunk(self, one: Event) -> bytes:
        """What the client is told of an event."""
        return b"".join(self._take(one))

    def add(self, one: Event) -> None:
        """Keep what an event says."""
        self._take(one)

    def end(self) -> bytes:
        """The last events."""
        status = self._status()
        parts = self._close_last(status)
        parts.append(self._event(f"response.{status}", response=msgspec.to_builtins(self._response(status))))
        return b"".join(parts)

    def fail(self, error: ApiError) -> bytes:
        """The farewell where an engine failed."""
        response = self._response("failed")
        response.error = {"code": "server_error", "message": str(error)}
        return self._event("response.failed", response=msgspec.to_builtins(response))

    def whole(self) -> ResponseObject:
        """The answer."""
        return self._response(self._status())

    # ---- parts ------------------------------------------------------------------------------------------------

    def _event(self, kind: str, **values: Any) -> bytes:
        event = {"type": kind, "sequence_number": self._sequence, **values}
        self._sequence += 1
        return named_event(kind, event)

    def _take(self, one: Event) -> list[bytes]:
        if isinstance(one, Done):
            self.counts.done(one)
        if not isinstance(one, Delta):
            return []
        self.counts.n_output += len(one.token_ids)
        events: list[bytes] = []
        if one.reasoning:
            events += self._put("reasoning", one.reasoning)
        if one.text:
            events += self._put("message", one.text)
        for call in one.tool_calls or ():
            if self._request.parallel_tool_calls is not False or call.index == 0:
                events += self._put("function_call", call.arguments, call.index, call.id, call.name)
        if one.finish_reason is not None:
            self._finish_reason = one.finish_reason
        return events

    def _put(self, kind: str, text: str, index: int = -1, call_id: str = "", name: str = "") -> list[bytes]:
        events: list[bytes] = []
        last = self._items[-1] if self._items else None
        if (
            last is None
            or last.kind != kind
            or (kind == "function_call" and self._calls.get(index) is not last)
        ):
            events += self._close_last()
            prefix = {"reasoning": "rs", "message": "msg", "function_call": "fc"}[kind]
            last = _Item(kind, f"{prefix}_{self._number}_{len(self._items)}", call_id, name)
            if kind == "function_call":
                self._calls[index] = last
            self._items.append(last)
            events.append(
                self._event("response.output_item.added", **self._at(), item=last.whole("in_progress"))
            )
            if kind == "message":
                events.append(
                    self._event(
                        "response.content_part.added",
                        item_id=last.number,
                        **self._at(),
                        content_index=0,
                        part=last.part(),
                    )
                )
        if text:
            last.parts.append(text)
            events.append(self._delta(last, text))
        return events

    def _at(self) -> dict[str, int]:
        return {"output_index": len(self._items) - 1}

    def _delta(self, item: _Item, text: str) -> bytes:
        where = {"item_id": item.number, **self._at()}
        if item.kind == "function_call":
            return self._event("response.function_call_arguments.delta", **where, delta=text)
        if item.kind == "reasoning":
            return self._event("response.reasoning_text.delta", **where, content_index=0, delta=text)
        return self._event("response.output_text.delta", **where, content_index=0, delta=text, logprobs=[])

    def _close_last(self, status: str = "completed") -> list[bytes]:
        if not self._items:
            return []
        item = self._items[-1]
        text = "".join(item.parts)
        where = {"item_id": item.number, **self._at()}
        events = []
        if item.kind == "function_call":
            events.append(
                self._event("response.function_call_arguments.done", **where, name=item.name, arguments=text)
            )
        elif item.kind == "reasoning":
            events.append(self._event("response.reasoning_text.done", **where, content_index=0, text=text))
        else:
            events.append(
                self._event("response.output_text.done", **where, content_index=0, text=text, logprobs=[])
            )
            events.append(
                self._event("response.content_part.done", **where, content_index=0, part=item.part())
            )
        events.append(self._event("response.output_item.done", **self._at(), item=item.whole(status)))
        return events

    def _status(self) -> str:
        return "incomplete" if self._finish_reason == "length" else "completed"

    def _output(self, status: str) -> list[dict[str, Any]]:
        """The items; what the limit or a fault has cut off is the last one."""
        last = "completed" if status == "completed" else "incomplete"
        return [item.whole("completed") for item in self._items[:-1]] + [
            item.whole(last) for item in self._items[-1:]
        ]

    def _response(self, status: str) -> ResponseObject:
        request, counts = self._request, self.counts
        response = ResponseObject(
            f"resp_{self._number}",
            self._created,
            self._model,
            status,
            [] if status == "in_progress" else self._output(status),
            instructions=request.instructions,
            metadata=request.metadata or {},
            parallel_tool_calls=request.parallel_tool_calls is not False,
            temperature=request.temperature,
            top_p=request.top_p,
            max_output_tokens=request.max_output_tokens,
            tool_choice=request.tool_choice or "auto",
            tools=request.tools or [],
        )
        if request.text is not None:
            response.text = request.text
        if status == "incomplete":
            response.incomplete_details = {"reason": "max_output_tokens"}
        if status != "in_progress":
            response.usage = ResponseUsage(
                counts.n_prompt,
                counts.n_output,
                counts.n_prompt + counts.n_output,
                {"cached_tokens": counts.n_cached, "cache_write_tokens": 0},
                {"reasoning_tokens": 0},
            )
        return response


async def responses(service: Service, http: HttpRequest) -> Response:
    """Answer an input; nothing is stored."""
    request = await service.read(http, ResponsesRequest)
    model = service.check_model(request.model)
    as_chat = _as_chat(request)
    params = chat_params(as_chat)
    chat = chat_of(as_chat, trust_template=False)
    number = http.scope["pace.id"]

    def jobs(call: Call) -> list[Job]:
        job = Job(call.ids[0], number, None, chat, params, request.priority or 0, request.cache_salt)
        job.one_by_one = bool(request.stream_options and request.stream_options.one_token_per_chunk)
        return [job]

    call = await service.call(http, jobs, 1)
    writer = _Writer(request, call, model, number)
    if request.stream:
        return EventStream(call, service.slow, writer.begin(), writer.chunk, writer.end, writer.fail)
    await service.collect(call, writer.add)
    return json_response(writer.whole())
