"""From the fields of a request to a job of the engine."""

from __future__ import annotations

import re
from typing import Any

import msgspec

from pace.errors import RequestError, show
from pace.params import SamplingParams
from pace.server.protocol.chat import ChatRequest
from pace.server.protocol.common import Sampling
from pace.server.protocol.completions import CompletionRequest
from pace.server.protocol.errors import ApiError
from pace.server.wire import Chat

__all__ = [
    "MAX_FAN_OUT",
    "REQUEST_ID",
    "chat_of",
    "chat_params",
    "checked",
    "completion_params",
    "id_of",
    "one_by_one",
    "prompts_of",
    "texts_of",
]

MAX_PROMPTS = 64  # of one request
MAX_FAN_OUT = 256  # prompts x n: sequences of one request

REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
"""Of those that clients bring."""

_SAMPLING = (
    "n", "min_tokens", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty",
    "repetition_penalty", "seed", "stop", "stop_token_ids", "include_stop_str_in_output", "ignore_eos", "logit_bias",
    "bad_words", "allowed_token_ids", "prompt_logprobs", "skip_special_tokens", "spaces_between_special_tokens",
    "speculative",
)  # fmt: skip


def id_of(request_id: str | None, number: str) -> str:
    """The id that the answer carries: the request's own, or `number`.

    Raises:
        ApiError: it could hurt whoever reads it in a log.
    """
    if request_id and not REQUEST_ID.fullmatch(request_id):
        raise ApiError(
            400,
            f"request_id is {show(request_id)}, expected 1 to 128 letters, digits and . _ : -",
            param="request_id",
        )
    return request_id or number


def _sampling(request: Sampling) -> dict[str, Any]:
    values = {name: value for name in _SAMPLING if (value := getattr(request, name)) is not None}
    structured = _structured(request)
    if structured is not None:
        values["structured_outputs"] = structured
    if request.stream_options is not None and not request.stream:
        raise ApiError(400, "stream_options is only for requests with stream: true", param="stream_options")
    return values


def one_by_one(request: Sampling) -> bool:
    """Whether every token shall come in a chunk of its own."""
    return bool(request.stream_options and request.stream_options.one_token_per_chunk)


def _structured(request: Sampling) -> dict[str, Any] | None:
    """What the output must be like: {"json": schema}, {"json_object": true}, {"regex": ...}, {"choice": ...} or
    {"grammar": ...}; None: anything."""
    given: list[tuple[str, dict[str, Any]]] = []
    form = request.response_format
    if form is not None and form.type != "text":
        if form.type == "json_object":
            given.append(("response_format", {"json_object": True}))
        elif (
            form.type == "json_schema"
            and form.json_schema is not None
            and form.json_schema.schema is not None
        ):
            given.append(("response_format", {"json": form.json_schema.schema}))
        else:
            raise ApiError(
                400,
                f"response_format.type is {show(form.type)}, expected text, json_object, or json_schema with a "
                "json_schema.schema",
                param="response_format",
            )
    if request.structured_outputs is not None:
        fields = {
            k: v for k, v in msgspec.structs.asdict(request.structured_outputs).items() if v is not None
        }
        if len(fields) != 1:
            raise ApiError(
                400,
                f"structured_outputs has {len(fields)} fields, expected exactly one of json, json_object, regex, choice, "
                "grammar",
                param="structured_outputs",
            )
        given.append(("structured_outputs", fields))
    for name in ("json", "regex", "choice", "grammar"):
        value = getattr(request, f"guided_{name}")
        if value is not None:
            given.append((f"guided_{name}", {name: value}))
    if len(given) > 1:
        raise ApiError(400, f"{given[0][0]} and {given[1][0]} exclude each other", param=given[1][0])
    return given[0][1] if given else None


def completion_params(request: CompletionRequest) -> tuple[dict[str, Any], bool]:
    """Sampling parameters of a completion, and whether its output is wanted (max_tokens 0: only the prompt's scores)."""
    values = _sampling(request)
    wants_output = request.max_tokens != 0
    if not wants_output and not request.echo:
        raise ApiError(400, "max_tokens is 0, expected at least 1, or echo: true", param="max_tokens")
    values["max_tokens"] = 16 if request.max_tokens is None else request.max_tokens or 1
    if request.logprobs is not None:
        values["logprobs"] = request.logprobs
        if request.echo:
            values["prompt_logprobs"] = max(request.logprobs, request.prompt_logprobs or 0)
    if request.suffix:
        raise ApiError(
            400, "suffix is not supported: leave it out", param="suffix", code="unsupported_parameter"
        )
    if request.best_of is not None and request.best_of != (request.n or 1):
        raise ApiError(
            400,
            f"best_of is {request.best_of}, expected the value of n, {request.n or 1}, or nothing",
            param="best_of",
        )
    if request.add_special_tokens is False:
        raise ApiError(
            400,
            "add_special_tokens is false; give token ids to say exactly what the prompt is",
            param="add_special_tokens",
            code="unsupported_parameter",
        )
    return checked(values), wants_output


def prompts_of(request: CompletionRequest) -> list[str | list[int]]:
    """The prompts: one text, one list of ids, or a list of either.

    Raises:
        ApiError: empty, mixed, or too many.
    """
    prompts = texts_of(request.prompt, "prompt")
    n = max(1, request.n or 1)
    if len(prompts) > MAX_PROMPTS or len(prompts) * n > MAX_FAN_OUT:
        raise ApiError(
            400,
            f"prompt has {len(prompts)} entries and n is {n}, expected at most {MAX_PROMPTS} prompts and {MAX_FAN_OUT} "
            "completions in a request",
            param="prompt",
        )
    return prompts


def texts_of(given: str | list[str | int | list[int]], name: str) -> list[str | list[int]]:
    """One text, one list of ids, or a list of either, as a list.

    Raises:
        ApiError: empty or mixed.
    """
    if isinstance(given, str):
        return [given]
    if given and all(isinstance(item, int) for item in given):
        return [given]  # type: ignore[list-item]  # just checked
    if given and {type(item) for item in given} in ({str}, {list}):
        return given  # type: ignore[return-value]  # just checked
    raise ApiError(
        400, f"{name} is empty or mixed, expected text, token ids, or a list of one of them", param=name
    )


def checked(values: dict[str, Any]) -> dict[str, Any]:
    """Sampling parameters that are valid by themselves; what depends on the model, its engine checks.

    Raises:
        RequestError: a value is out of range.
    """
    SamplingParams(**values)
    return values


def chat_params(request: ChatRequest) -> dict[str, Any]:
    """Sampling parameters of a chat; without a limit its answer may fill the context."""
    values = _sampling(request)
    limits = {request.max_tokens, request.max_completion_tokens} - {None}
    if len(limits) > 1:
        raise ApiError(
            400,
            f"max_tokens is {request.max_tokens} and max_completion_tokens {request.max_completion_tokens}; give one",
            param="max_completion_tokens",
        )
    values["max_tokens"] = limits.pop() if limits else None
    if request.max_completion_tokens is not None and request.max_completion_tokens < 1:
        raise ApiError(
            400,
            f"max_completion_tokens is {request.max_completion_tokens}, expected at least 1",
            param="max_completion_tokens",
        )
    if request.top_logprobs and not request.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
    if request.logprobs:
        values["logprobs"] = request.top_logprobs or 0
    return checked(values)


def chat_of(request: ChatRequest, *, trust_template: bool) -> Chat:
    """The conversation as the engine takes it.

    Raises:
        ApiError: an option contradicts another, or this server does not allow it.
    """
    template = request.chat_template
    if (
        template is not None
        and not trust_template
        and not template.replace("_", "").replace("-", "").isalnum()
    ):
        raise ApiError(
            400,
            "chat_template is a template; this server takes names of the checkpoint's only "
            "(--trust-request-chat-template allows others)",
            param="chat_template",
        )
    for i, message in enumerate(request.messages):
        _check_message(message, f"messages[{i}]")
    variables = dict(request.chat_template_kwargs or {})
    if request.reasoning_effort is not None:
        variables.setdefault("reasoning_effort", request.reasoning_effort)
    return Chat(
        messages=request.messages,
        tools=_tools(request),
        tool_choice=request.tool_choice if request.tools is not None else None,
        add_generation_prompt=request.add_generation_prompt,
        continue_final_message=bool(request.continue_final_message),
        chat_template=template,
        chat_template_kwargs=variables or None,
    )


def _check_message(message: dict[str, Any], where: str) -> None:
    """Say what is wrong with a message before a template stumbles over it; roles are the template's business."""
    role, content, calls = (message.get(key) for key in ("role", "content", "tool_calls"))
    if isinstance(content, list):
        for j, part in enumerate(content):
            if not (isinstance(part, str) or (isinstance(part, dict) and isinstance(part.get("type"), str))):
                raise RequestError(
                    f"{where}.content[{j}] is {show(part)}, expected a part with a type, such as text"
                )
    elif not isinstance(content, str) and not (content is None and role not in _WITH_CONTENT):
        raise RequestError(f"{where}.content is {show(content)}, expected text or a list of parts")
    if calls is None:
        return
    if not isinstance(calls, list):
        raise RequestError(f"{where}.tool_calls is {show(calls)}, expected a list of calls")
    for j, call in enumerate(calls):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RequestError(
                f"{where}.tool_calls[{j}] is {show(call)}, expected a function with a name and arguments"
            )


_WITH_CONTENT = ("user", "system", "developer", "tool")
"""Roles whose messages say something; the assistant's may be a call alone."""


def _tools(request: ChatRequest) -> list[dict[str, Any]] | None:
    choice = request.tool_choice
    if request.tools is None or choice == "none":
        if request.tools is None and choice not in (None, "none", "auto"):
            raise ApiError(400, f"tool_choice is {show(choice)}, but there are no tools", param="tool_choice")
        return None
    for i, tool in enumerate(request.tools):
        if tool.type != "function":
            raise ApiError(400, f"tools[{i}].type is {show(tool.type)}, expected function", param="tools")
        if not tool.function.name:
            raise ApiError(400, f"tools[{i}].function.name is empty", param="tools")
    return [_without_none(msgspec.to_builtins(tool)) for tool in request.tools]


def _without_none(value: Any) -> Any:
    """Templates ask whether a key is there."""
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return value
