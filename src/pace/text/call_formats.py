"""How families write tool calls, one reader for each form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from pace.text.call_literals import GEMMA, PYTHON, literal
from pace.text.call_reader import MAX_NAME, CallReader, Functions
from pace.text.json_scanner import JsonScanner, quoted
from pace.text.script import Ask

__all__ = ["DeepSeek", "Gemma", "Glm", "Hermes", "Llama", "Mistral", "PhiMini", "Tags", "XmlCalls", "as_json"]


class Hermes(CallReader):
    """Hermes, Qwen, Granite 4, SmolLM3 and most: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`."""

    openers = ("<tool_call>",)

    def calls(self, opener: str) -> Ask[bool]:
        """See `CallReader`."""
        return (yield from self.json_calls("</tool_call>")) and (yield from self.closed("</tool_call>"))


class PhiMini(CallReader):
    """Phi-4-mini, Granite 3: `<|tool_call|>[{"name": ..., "arguments": {...}}]<|/tool_call|>`."""

    openers = ("<|tool_call|>",)

    def calls(self, opener: str) -> Ask[bool]:
        """See `CallReader`."""
        return (yield from self.json_calls("<|/tool_call|>")) and (yield from self.closed("<|/tool_call|>"))


class Mistral(CallReader):
    """`[TOOL_CALLS][{"name": ..., "arguments": {...}}]`, and since 2025 `[TOOL_CALLS]name[ARGS]{...}` for each call."""

    openers = ("[TOOL_CALLS]",)

    def calls(self, opener: str) -> Ask[bool]:
        """See `CallReader`."""
        if (yield from self.white()) in ("[", "{"):
            return (yield from self.json_calls(opener))
        name, marker = yield from self.until("[ARGS]", "[CALL_ID]", "{", longest=MAX_NAME)
        if marker == "[CALL_ID]":
            _, marker = yield from self.until("[ARGS]", longest=MAX_NAME)
        if marker == "{":
            self.at -= 1
        name = name.strip()
        if not marker or name not in self.functions or (yield from self.white()) != "{":
            return False
        self.begin(name)
        yield from self.arguments(opener)
        return True


class DeepSeek(CallReader):
    """V3 and R1 write `function<｜tool▁sep｜>name` and the arguments in a block of Markdown, V3.1 only the name before the
    separator and the arguments behind it."""

    openers = ("<｜tool▁calls▁begin｜>",)
    _BEGIN, _SEP, _END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
    _CALLS_END = "<｜tool▁calls▁end｜>"

    def calls(self, opener: str) -> Ask[bool]:
        """See `CallReader`."""
        has_call = False
        yield from self.white()
        while (yield from self.take(self._BEGIN)):
            name, marker = yield from self.until(self._SEP, longest=MAX_NAME)
            has_block = name.strip() == "function"
            if has_block:
                name, marker = yield from self.until("\n", longest=MAX_NAME)
                yield from self.white()
                yield from self.take("```json", "```")
            name = name.strip()
            if not marker or name not in self.functions or (yield from self.white()) != "{":
                return False
            self.begin(name)
            has_call = True
            yield from self.arguments(self._END, self._CALLS_END)
            if has_block:
                yield from self.closed("```")
            yield from self.closed(self._END)
            yield from self.white()
        return has_call and (yield from self.closed(self._CALLS_END))


class Tags(NamedTuple):
    """The tags of a form with one element per parameter."""

    opener: str
    function: str
    after_name: str
    end: str
    closer: str
    parameter: str = "<parameter="
    after_key: str = ">"
    after_value: str = "</parameter>"
    before_value: str = ""


class XmlCalls(CallReader):
    """A tag for each parameter, its value as text; what type it has says the function's schema.

    Args:
        functions: see `CallReader`.
        tags: of the family.
    """

    def __init__(self, functions: Functions, tags: Tags) -> None:
        self._tags = tags
        # Qwen3-Coder often forgets the tag around the function.
        self.openers = tuple(tag for tag in (tags.opener, tags.function) if tag)
        super().__init__(functions)

    def calls(self, opener: str) -> Ask[bool]:
        """See `CallReader`."""
        tags = self._tags
        if opener == tags.opener:
            yield from self.white()
            if not (yield from self.take(tags.function)):
                return False
        while True:
            name, marker = yield from self.until(tags.after_name, longest=MAX_NAME)
            name = name.strip()
            if not marker or name not in self.functions:
                return False
            self.begin(name)
            yield from self._parameters(_types(self.functions[name]))
            yield from self.white()
            if not (yield from self.take(tags.function)):  # MiniMax puts several into one element
                return (yield from self.closed(tags.closer))

    def _parameters(self, types: Mapping[str, frozenset[str]]) -> Ask[None]:
        tags = self._tags
        before = "{"
        yield from self.white()
        while (yield from self.take(tags.parameter)):
            key, _ = yield from self.until(tags.after_key)
            if tags.before_value:
                yield from self.white()
                yield from self.take(tags.before_value)
            value, closer = yield from self.until(tags.after_value)
            # Without its end the value may be a part of what it was to be.
            text = as_json(value, types.get(key, frozenset())) if closer else quoted(value)[:-1]
            self.argue(f"{before}{quoted(key)}: {text}")
            before = ", "
            yield from self.white()
        if before == "{":
            self.argue(before)
        if (yield from self.take(tags.end)):
            self.argue("}")
            self.keep = self.at
        else:
            yield from self.break_off(tags.end, tags.closer)
            yield from self.take(tags.end)


class Glm(XmlCalls):
    """GLM from 4.5 on: `<tool_call>name`, `<arg_key>` and `<arg_value>` for each parameter, `</tool_call>`, with or without
    line breaks between them."""

    def __init__(self, functions: Functions) -> None:
        end = "</tool_call>"
        super().__init__(
            functions,
            Tags("<tool_call>", "", "\n", end, end, "<arg_key>", "</arg_key>", "</arg_value>", "<arg_value>"),
        )

    def calls(self, opener: str) -> Ask[bool]:
        """See `CallReader`."""
        tags = self._tags
        yield from self.white()
        name, marker = yield from self.until(tags.after_name, tags.parameter, tags.end, longest=MAX_NAME)
        name = name.strip()
        if not marker or name not in self.functions:
            return False
        if marker != tags.after_name:
            self.at -= len(marker)
        self.begin(name)
        yield from self._parameters(_types(self.functions[name]))
        return True


class Llama(CallReader):
    """A message that is a call: `{"name": ..., "parameters": {...}}`, several with `;` between them, or
    `[name(key=value), ...]`; perhaps behind a marker, which may stand behind text, too."""

    openers = ("<|python_tag|>", "<|python_start|>")
    _CLOSERS = ("<|python_end|>", "<|eom_id|>", "<|eom|>")

    def script(self) -> Ask[None]:
        """See `Script`."""
        self.keep = 0
        is_call = (yield from self.white()) in ("{", "[") and (yield from self.calls(""))
        if not is_call:
            self.give_back()
        self.keep = None
        yield from super().script()

    def calls(self, opener: str) -> Ask[bool]:
        """See `CallReader`."""
        if (yield from self.white()) == "[":
            is_call = yield from self._list()
        else:
            is_call = yield from self.json_call(*self._CLOSERS)
            while is_call:
                yield from self.white()
                if not (yield from self.take(";")):
                    break
                is_call = yield from self.json_call(*self._CLOSERS)
        return is_call and (yield from self.closed(*self._CLOSERS))

    def _list(self) -> Ask[bool]:
        """Calls in brackets, in the notation of JSON or of Python."""
        start = self.at
        self.at += 1
        if (yield from self.white()) == "{":
            self.at = start
            return (yield from self.json_calls(*self._CLOSERS))
        while True:
            name, marker = yield from self.until("(", longest=MAX_NAME)
            name = name.strip()
            if not marker or name not in self.functions:
                return False
            self.begin(name)
            yield from self._keywords()
            char = yield from self.white()
            if char not in ("]", ","):
                return not char
            self.at += 1
            self.keep = self.at
            if char == "]":
                return True

    def _keywords(self) -> Ask[None]:
        """Tell `key=value, ...)` as a JSON object."""
        before = "{"
        char = yield from self.white()
        while char and char != ")":
            key, marker = yield from self.until("=", longest=MAX_NAME)
            if not marker or not key.strip().isidentifier():
                self.argue(key + marker)
                yield from self.break_off(")")
                break
            yield from self.white()
            self.argue(f"{before}{quoted(key.strip())}: ")
            before = ", "
            if not (yield from literal(self, PYTHON)):
                yield from self.break_off(")")
                break
            char = yield from self.white()
            if char == ",":
                self.at += 1
                char = yield from self.white()
        if (yield from self.take(")")):
            self.argue("{}" if before == "{" else "}")
        self.keep = self.at


class Gemma(CallReader):
    """Gemma 4: `<|tool_call>call:name{key:<|"|>text<|"|>,other:1}<tool_call|>`."""

    openers = ("<|tool_call>",)

    def __init__(self, functions: Functions) -> None:
        super().__init__(functions)
        self.markers = frozenset(("<|tool_call>", "<tool_call|>", GEMMA.quotes[0]))

    def calls(self, opener: str) -> Ask[bool]:
        """See `CallReader`."""
        closer = "<tool_call|>"
        yield from self.white()
        if not (yield from self.take("call:")):
            return False
        name, marker = yield from self.until("{", longest=MAX_NAME)
        name = name.strip()
        if not marker or name not in self.functions:
            return False
        self.at -= 1
        self.begin(name)
        if not (yield from literal(self, GEMMA)):
            yield from self.break_off(closer)
        self.keep = self.at
        return (yield from self.closed(closer))


def as_json(text: str, types: frozenset[str]) -> str:
    """A parameter's value as JSON.

    Args:
        text: as the model wrote it; a newline at its beginning and end is layout.
        types: that the schema allows; none: unknown.
    """
    text = text.removeprefix("\n").removesuffix("\n")
    bare = text.strip()
    literal = {"True": "true", "False": "false", "None": "null"}.get(bare, bare)
    if "string" in types or not types:
        return literal if literal == "null" and "null" in types else quoted(text)
    scanner = JsonScanner()
    n_read, value = scanner.feed(literal + " ")  # a number ends with what follows
    return value if scanner.done and n_read == len(literal) else quoted(text)


def _types(schema: Mapping[str, Any]) -> dict[str, frozenset[str]]:
    """For each parameter the JSON types that its schema names."""
    properties = schema.get("properties")
    if not isinstance(properties, Mapping):
        return {}
    return {str(key): frozenset(_types_of(value)) for key, value in properties.items()}


def _types_of(schema: Any, depth: int = 4) -> list[str]:
    if not isinstance(schema, Mapping):
        return []
    named = schema.get("type", [])
    found = (
        [named]
        if isinstance(named, str)
        else [t for t in named if isinstance(t, str)]
        if isinstance(named, list)
        else []
    )
    for key in ("anyOf", "oneOf", "allOf"):
        options = schema.get(key)
        if depth and isinstance(options, list):
            for option in options:
                found += _types_of(option, depth - 1)
    return found
