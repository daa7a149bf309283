"""Chat messages to the text that the model was trained on, through the checkpoint's own template."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pace.checkpoint.config_json import checkpoint_file, read_file
from pace.errors import ChatTemplateError, RequestError, show

if TYPE_CHECKING:
    import jinja2

    from pace.text.tokenizer import Tokenizer

__all__ = ["ROLES", "ChatTemplate", "check_messages"]

ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})

MAX_TEMPLATE_BYTES = 1 << 20  # the longest published ones are below 30 kB
MAX_MESSAGES = 10_000
MAX_DEPTH = 32  # of tool schemas and arguments

# What the template sees besides the caller's own variables; those must not replace it.
_RESERVED = frozenset({
    "messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token", "unk_token",
    "sep_token", "pad_token", "cls_token", "mask_token", "range", "dict", "namespace", "cycler", "joiner",
    "raise_exception", "strftime_now", "loop", "caller", "varargs", "kwargs", "self",
})  # fmt: skip


class ChatTemplate:
    """A checkpoint's chat template; compiled at its first use."""

    def __init__(
        self, source: str, *, special_tokens: Mapping[str, str] | None = None, tool_source: str | None = None
    ) -> None:
        """Keep a template's text.

        Args:
            source: the Jinja template.
            special_tokens: variables such as {"bos_token": "<s>"}.
            tool_source: the template to use where tools are given; None: the same.

        Raises:
            ChatTemplateError: a template is longer than 1 MiB.
        """
        for text in (source, tool_source or ""):
            if len(text) > MAX_TEMPLATE_BYTES:
                raise ChatTemplateError(
                    f"the chat template has {len(text)} characters, expected at most {MAX_TEMPLATE_BYTES}"
                )
        self.source = source
        self.tool_source = tool_source
        self._special_tokens = dict(special_tokens or {})

    @classmethod
    def load(cls, directory: Path, tokenizer: Tokenizer) -> ChatTemplate:
        """Take a checkpoint's template: `chat_template.jinja`, else `chat_template` of tokenizer_config.json.

        Args:
            directory: the folder to look in for chat_template.jinja; usually `tokenizer.directory`.
            tokenizer: gives tokenizer_config.json and the special tokens.

        Raises:
            ChatTemplateError: there is none, or it has a wrong type or encoding.
            CheckpointError: the file can't be read.
        """
        special_tokens = tokenizer.special_tokens
        path = checkpoint_file(directory, "chat_template.jinja")
        if path is not None:
            try:
                return cls(read_file(path, MAX_TEMPLATE_BYTES).decode("utf-8"), special_tokens=special_tokens)
            except UnicodeDecodeError as error:
                raise ChatTemplateError(f"{path}: not UTF-8 at byte {error.start}") from None
        path = tokenizer.directory / "tokenizer_config.json"
        value = tokenizer.config.get("chat_template")
        if value is None:
            raise ChatTemplateError(
                f"{directory}: the checkpoint has no chat template (no chat_template.jinja, and none in "
                "tokenizer_config.json); use generate with a prompt, or pass a template"
            )
        if isinstance(value, str):
            return cls(value, special_tokens=special_tokens)
        named = _named_templates(path, value)
        if "default" not in named:
            raise ChatTemplateError(
                f"{path}: chat_template names {show(sorted(named))}, expected one called 'default'"
            )
        return cls(named["default"], special_tokens=special_tokens, tool_source=named.get("tool_use"))

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Render messages into a prompt; encode it with `add_special_tokens=False`.

        Args:
            messages: each with a `role` and a `content` that is a text or a list of text parts.
            add_generation_prompt: end with the start of the assistant's answer.
            tools: JSON schemas of functions that the model may call.
            variables: further variables of the template, such as {"enable_thinking": False}; scalars only.

        Raises:
            RequestError: the messages, tools or variables are invalid, or the template refuses them.
            ChatTemplateError: the template is malformed, failed, or exceeded its budget.
        """
        # Not at the top: it imports jinja2, 50 ms.
        from pace.text.sandbox import Budget, render

        plain = check_messages(messages)
        plain_tools = (
            None if tools is None else [_plain(tool, "tools", 0) for tool in _list_of_dicts(tools, "tools")]
        )
        n_chars = _n_chars(plain) + _n_chars(plain_tools)
        # Templates look at every message a few times; a budget in proportion admits long chats and stops
        # bombs.
        budget = Budget(steps=250_000 + 200 * len(plain), chars=16_000_000 + 16 * n_chars)
        template = self._tool_template if tools and self.tool_source is not None else self._template
        return render(
            template,
            {
                **self._special_tokens,
                **_check_variables(variables or {}),
                "messages": plain,
                "tools": plain_tools,
                "documents": None,
                "add_generation_prompt": add_generation_prompt,
            },
            budget,
        )

    @cached_property
    def _template(self) -> jinja2.Template:
        from pace.text.sandbox import compile_template

        return compile_template(self.source)

    @cached_property
    def _tool_template(self) -> jinja2.Template:
        from pace.text.sandbox import compile_template

        return compile_template(self.tool_source or self.source)


def check_messages(messages: object) -> list[dict[str, Any]]:
    """Check a list of chat messages, and rebuild it of plain JSON types with every content as one text.

    Text parts are joined by newlines. Further keys (`name`, `tool_calls`, `tool_call_id`, …) are kept.

    Raises:
        RequestError: not a list of messages, an unknown role, a content that isn't text, or a value that
            isn't JSON.
    """
    result = []
    for i, message in enumerate(_list_of_dicts(messages, "messages")):
        where = f"messages[{i}]"
        plain = _plain(message, where, 0)
        role = plain.get("role")
        if not isinstance(role, str) or role not in ROLES:
            raise RequestError(f"{where}.role is {show(role)}, expected one of {', '.join(sorted(ROLES))}")
        content = plain.get("content")
        if isinstance(content, list):
            plain["content"] = "\n".join(
                _text_part(part, f"{where}.content[{j}]") for j, part in enumerate(content)
            )
        elif content is None and role == "assistant" and plain.get("tool_calls"):
            plain["content"] = None
        elif not isinstance(content, str):
            raise RequestError(f"{where}.content is {show(content)}, expected a text or a list of text parts")
        result.append(plain)
    if not result:
        raise RequestError("messages is empty, expected at least one message")
    return result


def _list_of_dicts(values: object, name: str) -> Sequence[Mapping[str, Any]]:
    if isinstance(values, (str, bytes)) or not isinstance(values, Sequence):
        raise RequestError(f"{name} is {show(values)}, expected a list of objects")
    if len(values) > MAX_MESSAGES:
        raise RequestError(f"{name} has {len(values)} entries, expected at most {MAX_MESSAGES}")
    for i, value in enumerate(values):
        if not isinstance(value, Mapping):
            raise RequestError(f"{name}[{i}] is {show(value)}, expected an object")
    return values


def _text_part(part: object, where: str) -> str:
    if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        kind = part.get("type") if isinstance(part, dict) else part
        raise RequestError(
            f"{where} is {show(kind)}, expected {{'type': 'text', 'text': …}}; pace reads only text"
        )
    text: str = part["text"]
    return text


def _plain(value: object, where: str, depth: int) -> Any:
    """Rebuild `value` of exact JSON types: objects of other classes could carry methods into the sandbox."""
    if value is None or type(value) in (str, bool, int):
        return value
    if type(value) is float and math.isfinite(value):
        return value
    if depth >= MAX_DEPTH:
        raise RequestError(f"{where} is nested deeper than {MAX_DEPTH} levels")
    if isinstance(value, Mapping):
        if not all(type(key) is str for key in value):
            raise RequestError(f"{where} has a key that isn't a string")
        return {key: _plain(item, where, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, where, depth + 1) for item in value]
    if isinstance(value, str):  # subclasses
        return str(value)
    raise RequestError(f"{where} holds {show(value)}, expected JSON values only")


def _check_variables(variables: Mapping[str, Any]) -> dict[str, Any]:
    for name, value in variables.items():
        if not isinstance(name, str) or not name.isidentifier() or name.startswith("_") or name in _RESERVED:
            raise RequestError(
                f"{show(name)} can't be a variable of the chat template; it is reserved or not a name"
            )
        if value is not None and type(value) not in (str, bool, int, float):
            raise RequestError(f"the chat template's variable {name} is {show(value)}, expected a scalar")
    return dict(variables)


def _named_templates(path: Path, value: object) -> dict[str, str]:
    """Read the list form, [{"name": …, "template": …}, …]."""
    named: dict[str, str] = {}
    for item in value if isinstance(value, list) else [value]:
        if not isinstance(item, dict) or not all(
            isinstance(item.get(key), str) for key in ("name", "template")
        ):
            raise ChatTemplateError(
                f"{path}: chat_template has {show(item)}, expected a text, or names and templates"
            )
        if item["name"] in named:
            raise ChatTemplateError(f"{path}: chat_template names {show(item['name'])} twice")
        named[item["name"]] = item["template"]
    return named


def _n_chars(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(_n_chars(item) for item in value.values())
    return sum(_n_chars(item) for item in value) if isinstance(value, list) else 0
