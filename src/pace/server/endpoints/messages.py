"""`/v1/messages`: Anthropic's API over the same engines."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import msgspec
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from pace.errors import RequestError, show
from pace.server.backend import Call
from pace.server.counts import Counts
from pace.server.http import json_response
from pace.server.protocol.errors import ApiError
from pace.server.protocol.messages import (
    AnthropicError,
    AnthropicMessage,
    CountTokensRequest,
    MessagesRequest,
    MessagesUsage,
    TokenCount,
    ToolSpec,
)
from pace.server.requests import checked
from pace.server.service import Service
from pace.server.sse import EventStream, named_event
from pace.server.wire import Chat, Delta, Done, Event, Job, Tokenize

__all__ = ["count_tokens", "messages"]

_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens"}


# ---- the conversation in OpenAI's shape, which chat templates know -------------------------------------------


def _chat(request: MessagesRequest | CountTokensRequest) -> Chat:
    turns: list[dict[str, Any]] = []
    if request.system is not None:
        turns.append({"role": "system", "content": _text(request.system, "system")})
    for i, message in enumerate(request.messages):
        turns += _turns(message, f"messages[{i}]")
    choice = _tool_choice(request.tool_choice)
    tools = None if not request.tools or choice == "none" else [_tool(tool) for tool in request.tools]
    if tools is None and choice not in ("auto", "none"):
        raise RequestError(f"tool_choice is {show(request.tool_choice)}, but there are no tools")
    return Chat(
        turns,
        tools,
        continue_final_message=_is_begun(turns),
        chat_template_kwargs=_thinking(request.thinking),
        tool_choice=None if tools is None else choice,
    )


def _is_begun(turns: list[dict[str, Any]]) -> bool:
    """Whether the answer's beginning is given: a last message of the assistant with nothing but text."""
    last = turns[-1] if turns else {}
    return last.get("role") == "assistant" and bool(last["content"]) and "tool_calls" not in last


def _thinking(thinking: dict[str, Any] | None) -> dict[str, Any] | None:
    """As a variable of templates."""
    kind = "adaptive" if thinking is None else thinking.get("type")
    if kind not in ("enabled", "disabled", "adaptive"):
        raise RequestError(f"thinking is {show(thinking)}, expected type enabled, disabled or adaptive")
    return None if kind == "adaptive" else {"enable_thinking": kind == "enabled"}


def _tool_choice(choice: dict[str, Any] | None) -> str | dict[str, Any]:
    """In OpenAI's shape."""
    choice = {"type": "auto"} if choice is None else choice
    kind = choice.get("type")
    name = choice.get("name")
    allowed = {"type", "disable_parallel_tool_use"} | ({"name"} if kind == "tool" else set())
    if kind not in ("auto", "none", "any", "tool") or set(choice) - allowed or (kind == "tool" and not name):
        raise RequestError(
            f"tool_choice is {show(choice)}, expected type auto, none, any, or tool with a name, and perhaps "
            "disable_parallel_tool_use"
        )
    if kind == "tool":
        return {"type": "function", "function": {"name": name}}
    return "required" if kind == "any" else str(kind)


def _turns(message: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """A message as one or several: each tool's result is a message of its own there."""
    role, content = message.get("role"), message.get("content")
    if role not in ("user", "assistant") or set(message) - {"role", "content"}:
        raise RequestError(f"{where} is {show(message)}, expected a role, user or assistant, and content")
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    if not isinstance(content, list):
        raise RequestError(f"{where}.content is {show(content)}, expected text or a list of blocks")
    results: list[dict[str, Any]] = []
    turn: dict[str, Any] = {"role": role, "content": ""}
    texts: list[str] = []
    for j, block in enumerate(content):
        kind = block.get("type") if isinstance(block, dict) else None
        if kind == "text" and isinstance(block.get("text"), str):
            texts.append(block["text"])
        elif kind == "thinking" and isinstance(block.get("thinking"), str):
            turn["reasoning_content"] = turn.get("reasoning_content", "") + block["thinking"]
        elif kind == "tool_use" and isinstance(block.get("name"), str):
            if not isinstance(block.get("input", {}), dict):
                raise RequestError(
                    f"{where}.content[{j}].input is {show(block['input'])}, expected an object"
                )
            function = {"name": block["name"], "arguments": block.get("input") or {}}
            call = {"id": block.get("id"), "type": "function", "function": function}
            turn.setdefault("tool_calls", []).append(call)
        elif kind == "tool_result":
            text = _text(block.get("content") or "", f"{where}.content[{j}].content")
            results.append({"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": text})
        elif kind != "redacted_thinking":
            raise RequestError(
                f"{where}.content[{j}] is {show(block)}, expected a block of type text, thinking, tool_use or tool_result"
            )
    turn["content"] = "\n".join(texts)
    says_something = texts or "tool_calls" in turn or "reasoning_content" in turn or not results
    return [*results, turn] if says_something else results


def _text(value: object, where: str) -> str:
    """Text, or text blocks as one."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        texts = [b.get("text") if isinstance(b, dict) and b.get("type") == "text" else None for b in value]
        if all(isinstance(text, str) for text in texts):
            return "\n".join(text for text in texts if text is not None)
    raise RequestError(f"{where} is {show(value)}, expected text or a list of text blocks")


def _tool(tool: ToolSpec) -> dict[str, Any]:
    if tool.type not in (None, "custom"):
        raise RequestError(
            f"a tool's type is {show(tool.type)}, expected custom: this server has no tools of its own"
        )
    function: dict[str, Any] = {"name": tool.name}
    if tool.description is not None:
        function["description"] = tool.description
    function["parameters"] = tool.input_schema or {"type": "object", "properties": {}}
    return {"type": "function", "function": function}


# ---- the answer -------------------------------------------------------------------------------------------------


@dataclass
class _Block:
    """A content block so far: thinking, text, or tool_use."""

    kind: str
    call: int = -1  # which of the completion's calls
    id: str = ""
    name: str = ""
    parts: list[str] = field(default_factory=list)

    def whole(self) -> dict[str, Any]:
        """As a part of a message."""
        text = "".join(self.parts)
        if self.kind == "thinking":
            return {"type": "thinking", "thinking": text, "signature": ""}
        if self.kind == "text":
            return {"type": "text", "text": text}
        try:
            arguments = json.loads(text or "{}")
        except ValueError:
            arguments = {"raw": text}  # what the model wrote is no JSON: the client sees it all the same
        return {"type": "tool_use", "id": self.id, "name": self.name, "input": arguments}

    def start(self) -> dict[str, Any]:
        """Before anything is in it."""
        if self.kind == "tool_use":
            return {"type": "tool_use", "id": self.id, "name": self.name, "input": {}}
        return {"type": self.kind, self.kind: ""} | ({"signature": ""} if self.kind == "thinking" else {})

    def delta(self, text: str) -> dict[str, Any]:
        """What is new in it."""
        if self.kind == "tool_use":
            return {"type": "input_json_delta", "partial_json": text}
        return {"type": f"{self.kind}_delta", self.kind: text}


class _Writer:
    """Writes the answer to one request, in events or as a whole.

    Args:
        is_parallel: several tools may be called; otherwise the first call alone is told.
    """

    def __init__(self, call: Call, model: str, number: str, is_parallel: bool = True) -> None:
        self._is_parallel = is_parallel
        self.counts = Counts(call.accepted)
        self._model = model
        self._number = f"msg_{number}"
        self._blocks: list[_Block] = []
        self._stop_reason: str | None = None
        self._stop_sequence: str | None = None

    def begin(self) -> bytes:
        """The first event."""
        message = msgspec.to_builtins(self.whole())
        return named_event("message_start", {"type": "message_start", "message": message})

    def chunk(self, one: Event) -> bytes:
        """What the client is told of an event."""
        return b"".join(named_event(event["type"], event) for event in self._take(one))

    def add(self, one: Event) -> None:
        """Keep what an event says."""
        self._take(one)

    def end(self) -> bytes:
        """The end of the stream."""
        events = []
        if self._blocks:
            events.append({"type": "content_block_stop", "index": len(self._blocks) - 1})
        delta = {"stop_reason": self._reason(), "stop_sequence": self._stop_sequence}
        usage = msgspec.to_builtins(self._usage())
        events += [{"type": "message_delta", "delta": delta, "usage": usage}, {"type": "message_stop"}]
        return b"".join(named_event(str(event["type"]), event) for event in events)

    def whole(self) -> AnthropicMessage:
        """The answer."""
        content = [block.whole() for block in self._blocks]
        return AnthropicMessage(
            self._number, self._model, content, self._reason(), self._stop_sequence, self._usage()
        )

    def _take(self, one: Event) -> list[dict[str, Any]]:
        if isinstance(one, Done):
            self.counts.done(one)
        if not isinstance(one, Delta):
            return []
        self.counts.n_output += len(one.token_ids)
        events: list[dict[str, Any]] = []
        if one.reasoning:
            self._put(events, one.reasoning, "thinking")
        if one.text:
            self._put(events, one.text, "text")
        for call in one.tool_calls or ():
            if call.index and not self._is_parallel:
                continue
            self._put(events, call.arguments, "tool_use", call.index, call.id, call.name)
        if one.finish_reason is not None:
            self._stop_reason = _STOP_REASONS.get(one.finish_reason, one.finish_reason)
            if isinstance(one.stop_reason, str):
                self._stop_reason, self._stop_sequence = "stop_sequence", one.stop_reason
        return events

    def _put(
        self,
        events: list[dict[str, Any]],
        text: str,
        kind: str,
        call: int = -1,
        number: str = "",
        name: str = "",
    ) -> None:
        """Add text to the last block, or to a new one."""
        last = self._blocks[-1] if self._blocks else None
        if last is None or (last.kind, last.call) != (kind, call):
            if last is not None:
                events.append({"type": "content_block_stop", "index": len(self._blocks) - 1})
            last = _Block(kind, call, number, name)
            self._blocks.append(last)
            event = {"type": "content_block_start", "index": len(self._blocks) - 1}
            events.append(event | {"content_block": last.start()})
        if text:
            last.parts.append(text)
            event = {"type": "content_block_delta", "index": len(self._blocks) - 1}
            events.append(event | {"delta": last.delta(text)})

    def _reason(self) -> str | None:
        calls = any(block.kind == "tool_use" for block in self._blocks)
        return "tool_use" if calls and self._stop_reason == "end_turn" else self._stop_reason

    def _usage(self) -> MessagesUsage:
        counts = self.counts
        return MessagesUsage(counts.n_prompt - counts.n_cached, counts.n_output, counts.n_cached)


# ---- endpoints --------------------------------------------------------------------------------------------------


def _params(request: MessagesRequest) -> dict[str, Any]:
    values: dict[str, Any] = {"max_tokens": request.max_tokens}
    for name, value in (
        ("temperature", request.temperature),
        ("top_p", request.top_p),
        ("top_k", request.top_k),
        ("stop", request.stop_sequences),
    ):
        if value is not None:
            values[name] = value
    return checked(values)


async def messages(service: Service, http: HttpRequest) -> Response:
    """Answer a conversation."""
    request = await service.read(http, MessagesRequest)
    model = service.check_model(request.model)
    params, chat = _params(request), _chat(request)
    number = http.scope["pace.id"]
    call = await service.call(http, lambda call: [Job(call.ids[0], number, None, chat, params)], 1)
    is_parallel = (request.tool_choice or {}).get("disable_parallel_tool_use") is not True
    writer = _Writer(call, model, number, is_parallel)
    if request.stream:
        return EventStream(call, service.slow, writer.begin(), writer.chunk, writer.end, _error_event)
    await service.collect(call, writer.add)
    return json_response(writer.whole())


async def count_tokens(service: Service, http: HttpRequest) -> Response:
    """How many tokens a conversation is."""
    request = await service.read(http, CountTokensRequest)
    service.check_model(request.model)
    question = Tokenize(service.backend.next_id(), None, _chat(request))
    ids, _ = await service.backend.ask(question)
    return json_response(TokenCount(len(ids)))


def _error_event(error: ApiError) -> bytes:
    return named_event("error", AnthropicError.of(error.status, str(error)))
