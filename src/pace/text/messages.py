"""Chat messages, tools and template variables: checked, and rebuilt of plain JSON types.

What they mean is the template's business: roles, further keys and the form of a content pass as they are, keys that are
absent stay absent. What is refused is what no template can take: values that aren't JSON, and media, which pace doesn't
read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from pace.errors import RequestError, show

__all__ = ["check_messages", "check_tools", "check_variables", "n_nodes_and_chars"]

MAX_MESSAGES = 10_000
MAX_DEPTH = 32  # of tool schemas and arguments
MAX_NODES = 1_000_000  # JSON values of one request

# What the template sees besides the caller's own variables; those must not replace it.
_RESERVED = frozenset({
    "messages", "tools", "add_generation_prompt", "continue_final_message", "chat_template", "bos_token",
    "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token", "range", "dict", "namespace",
    "cycler", "joiner", "raise_exception", "strftime_now", "loop", "caller", "varargs", "kwargs", "self",
})  # fmt: skip

_MEDIA = ("image", "audio", "video", "file")

# Names that a message's reasoning goes by. Most templates read the first, gpt-oss's the second.
_REASONING = ("reasoning_content", "thinking", "reasoning")


def check_messages(messages: object, *, keep_parts: bool = False) -> list[dict[str, Any]]:
    """Check a list of chat messages, and rebuild it of plain JSON types.

    Reasoning is given under every name that templates read, as transformers does, and the arguments of calls, in OpenAI's
    messages JSON text, as the objects that templates expect.

    Args:
        messages: each with a `role`; `content` and further keys are the template's business.
        keep_parts: the template reads lists of content parts; otherwise text parts are joined by newlines.

    Raises:
        RequestError: not a list of messages, no role, media, or a value that isn't JSON.
    """
    result = []
    for i, message in enumerate(_list_of_objects(messages, "messages")):
        where = f"messages[{i}]"
        plain = _plain(message, where, 0)
        role = plain.get("role")
        if not isinstance(role, str) or not role:
            raise RequestError(f"{where}.role is {show(role)}, expected a name such as 'user'")
        if isinstance(plain.get("content"), list):
            is_said = role in ("user", "assistant", "system", "developer")  # tools may return any list
            plain["content"] = _parts(plain["content"], f"{where}.content", keep_parts, is_said)
        reasoning = next((plain[key] for key in _REASONING if plain.get(key) is not None), None)
        if reasoning is not None:
            plain = {"thinking": reasoning, **plain, "reasoning_content": reasoning}
        if isinstance(plain.get("tool_calls"), list):
            plain["tool_calls"] = [_with_object(call) for call in plain["tool_calls"]]
        result.append(plain)
    if not result:
        raise RequestError("messages is empty, expected at least one message")
    return result


def _with_object(call: Any) -> Any:
    """A call with its arguments as an object; as it is where they are none."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"] or "{}", parse_constant=_refuse)
    except (ValueError, RecursionError):
        return call
    if not isinstance(arguments, dict):
        return call
    function = {**function, "arguments": _plain(arguments, "arguments", 0)}
    return {**call, "function": function} if "function" in call else function


def _refuse(constant: str) -> None:
    raise ValueError(constant)


def check_tools(tools: object) -> list[dict[str, Any]]:
    """Check descriptions of tools, usually JSON schemas of functions, and rebuild them of plain JSON types.

    Raises:
        RequestError: not a list of objects, or a value that isn't JSON.
    """
    return [_plain(tool, f"tools[{i}]", 0) for i, tool in enumerate(_list_of_objects(tools, "tools"))]


def check_variables(variables: object) -> dict[str, Any]:
    """Check a template's further variables, and rebuild them of plain JSON types.

    Raises:
        RequestError: not a mapping, a name that is reserved or none, or a value that isn't JSON.
    """
    if not isinstance(variables, Mapping):
        raise RequestError(
            f"chat_template_kwargs is {show(variables)}, expected a mapping of names to values"
        )
    for name in variables:
        if not isinstance(name, str) or not name.isidentifier() or name.startswith("_") or name in _RESERVED:
            raise RequestError(
                f"chat_template_kwargs has {show(name)}, which can't be a variable of the chat template: it is an argument "
                "of its own, reserved, or not a name"
            )
    return {name: _plain(value, f"chat_template_kwargs.{name}", 0) for name, value in variables.items()}


def n_nodes_and_chars(*values: Any) -> tuple[int, int]:
    """How many JSON values there are in plain values, and how many characters their texts have.

    Raises:
        RequestError: more than a million values.
    """
    n_nodes = n_chars = 0
    stack = list(values)
    while stack:
        value = stack.pop()
        n_nodes += 1
        if isinstance(value, str):
            n_chars += len(value)
        elif isinstance(value, dict):
            stack.extend(value.values())
        elif isinstance(value, list):
            stack.extend(value)
        if n_nodes + len(stack) > MAX_NODES:
            raise RequestError(f"the conversation has more than {MAX_NODES} values; shorten it")
    return n_nodes, n_chars


def _list_of_objects(values: object, name: str) -> Sequence[Mapping[str, Any]]:
    if isinstance(values, (str, bytes)) or not isinstance(values, Sequence):
        raise RequestError(f"{name} is {show(values)}, expected a list of objects")
    if len(values) > MAX_MESSAGES:
        raise RequestError(f"{name} has {len(values)} entries, expected at most {MAX_MESSAGES}")
    for i, value in enumerate(values):
        if not isinstance(value, Mapping):
            raise RequestError(f"{name}[{i}] is {show(value)}, expected an object")
    return values


def _parts(parts: list[Any], where: str, keep: bool, is_said: bool) -> Any:
    """A list of content parts as the template wants it; a list of anything else as it is.

    Args:
        keep: the template reads lists of parts.
        is_said: what is no text would be lost, not printed as JSON.
    """
    for i, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and any(name in kind for name in _MEDIA):
            raise RequestError(f"{where}[{i}] has type {show(kind)}; pace reads only text")
        if kind == "text" and not isinstance(part.get("text"), str):
            raise RequestError(f"{where}[{i}].text is {show(part.get('text'))}, expected a string")
        if isinstance(kind, str) and kind != "text" and is_said and not keep:
            raise RequestError(
                f"{where}[{i}] has type {show(kind)}; this model's chat template reads only text"
            )
    if keep or not all(isinstance(part, str) or _is_text(part) for part in parts):
        return parts
    return "\n".join(part if isinstance(part, str) else part["text"] for part in parts)


def _is_text(part: object) -> bool:
    return isinstance(part, dict) and part.get("type") == "text"


def _plain(value: object, where: str, depth: int) -> Any:
    """Rebuild `value` of exact JSON types: objects of other classes could carry methods into the sandbox."""
    if value is None or type(value) in (str, bool, int):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return float(value)
    if depth >= MAX_DEPTH:
        raise RequestError(f"{where} is nested deeper than {MAX_DEPTH} levels")
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise RequestError(f"{where} has a key that isn't a string")
        return {str.__str__(key): _plain(item, where, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, where, depth + 1) for item in value]
    # Subclasses, such as members of an Enum: their value, not what they print.
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    raise RequestError(f"{where} holds {show(value)}, expected JSON values only")
