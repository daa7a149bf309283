"""Which form a checkpoint writes its tool calls in, and the reader for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from pace.errors import RequestError, show
from pace.text.call_formats import DeepSeek, Gemma, Glm, Hermes, Llama, Mistral, PhiMini, Tags, XmlCalls
from pace.text.call_reader import CallReader, Functions

__all__ = [
    "HARMONY",
    "PARSER_ALIASES",
    "TOOL_PARSERS",
    "ToolChoice",
    "find_parser",
    "functions_of",
    "make_call_reader",
]

_QWEN = Tags("<tool_call>", "<function=", ">", "</function>", "</tool_call>")
_SEED = Tags("<seed:tool_call>", "<function=", ">", "</function>", "</seed:tool_call>")
_MINIMAX = Tags(
    "<minimax:tool_call>",
    '<invoke name="',
    '">',
    "</invoke>",
    "</minimax:tool_call>",
    '<parameter name="',
    '">',
)

HARMONY = "harmony"

TOOL_PARSERS: Mapping[str, Callable[[Functions], CallReader]] = {
    "hermes": Hermes,
    "qwen3_coder": partial(XmlCalls, tags=_QWEN),
    "seed_oss": partial(XmlCalls, tags=_SEED),
    "minimax": partial(XmlCalls, tags=_MINIMAX),
    "llama": Llama,
    "mistral": Mistral,
    "phi4_mini": PhiMini,
    "deepseek": DeepSeek,
    "gemma4": Gemma,
    "glm": Glm,
}
"""The forms by name, as the option `tool_parser` has them. Harmony is none of them: its calls are messages on a channel."""

PARSER_ALIASES: Mapping[str, str] = {
    "llama3_json": "llama", "llama4_json": "llama", "llama4_pythonic": "llama", "pythonic": "llama",
    "qwen3_xml": "qwen3_coder", "minimax_m2": "minimax", "phi4_mini_json": "phi4_mini", "granite": "phi4_mini",
    "deepseek_v3": "deepseek", "deepseek_v31": "deepseek", "glm45": "glm", "glm47": "glm", "openai": HARMONY,
}  # fmt: skip
"""vLLM's names of the same."""

_SIGNS = (
    (HARMONY, ("<|channel|>", "<|message|>")),
    ("gemma4", ("<|tool_call>", "<tool_call|>")),
    ("mistral", ("[TOOL_CALLS]",)),
    ("deepseek", ("<｜tool▁calls▁begin｜>",)),
    ("seed_oss", ("<seed:tool_call>", "<function=")),
    ("minimax", ("<minimax:tool_call>", "<invoke name=")),
    ("glm", ("<tool_call>", "<arg_key>")),
    ("qwen3_coder", ("<tool_call>", "<function=", "<parameter=")),
    ("hermes", ("<tool_call>",)),
    ("phi4_mini", ("<|tool_call|>",)),
    ("phi4_mini", ("<|tool|>", "<|/tool|>")),
    ("llama", ("<|python_start|>",)),
    ("llama", ("<|python_tag|>",)),
    ("llama", ("<|start_header_id|>", '"parameters": ')),
    ("llama", ("<|header_start|>", '"parameters": ')),
)
"""What the chat template of a form says; the first line whose texts are all there. The order matters: a template may name
another family's tags in passing."""


@dataclass(frozen=True)
class ToolChoice:
    """Whether the model must, may or must not call tools.

    Attributes:
        kind: "none", "auto" or "required".
        name: the function that it must call; None: any.
    """

    kind: str
    name: str | None = None

    @property
    def offers_tools(self) -> bool:
        """Whether the model is told of the tools: a call that nobody wants is surest not made where none is known."""
        return self.kind != "none"

    @staticmethod
    def parse(choice: object, tools: Sequence[Mapping[str, Any]] | None) -> ToolChoice:
        """Read OpenAI's `tool_choice`: "none", "auto", "required", {"type": "function", "function": {"name": ...}}, or
        None: auto.

        Raises:
            RequestError: something else, or a choice among tools that are not there.
        """
        name: object = None
        kind = "auto" if choice is None else choice
        if isinstance(choice, Mapping):
            function = choice.get("function", choice)
            name = function.get("name") if isinstance(function, Mapping) else None
            kind = "required" if isinstance(name, str) and choice.get("type") == "function" else None
        if kind not in ("none", "auto", "required"):
            raise RequestError(
                f"tool_choice is {show(choice)}, expected none, auto, required, or "
                '{"type": "function", "function": {"name": ...}}'
            )
        names = functions_of(tools) if kind == "required" and isinstance(tools, (list, tuple)) else {}
        if kind == "required" and not names:
            raise RequestError(f"tool_choice is {show(choice)}, but there are no tools")
        if name is not None and name not in names:
            raise RequestError(
                f"tool_choice is the function {show(name)}, expected one of {', '.join(names)}"
            )
        return ToolChoice(str(kind), name if isinstance(name, str) else None)


def find_parser(template: str) -> str | None:
    """The form of the calls that a chat template teaches; None: none that is known.

    Args:
        template: its source.
    """
    return next((name for name, signs in _SIGNS if all(sign in template for sign in signs)), None)


def functions_of(tools: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Name -> schema of the arguments, of tools in OpenAI's shape or of bare functions; others are left out."""
    functions: dict[str, Mapping[str, Any]] = {}
    for tool in tools:
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if isinstance(function, Mapping) and isinstance(function.get("name"), str):
            schema = function.get("parameters")
            functions[function["name"]] = schema if isinstance(schema, Mapping) else {}
    return functions


def make_call_reader(parser: str, functions: Functions) -> Callable[[], CallReader]:
    """What makes a reader of calls for one output.

    Raises:
        RequestError: there is no such form.
    """
    make = TOOL_PARSERS.get(PARSER_ALIASES.get(parser, parser))
    if make is None:
        raise RequestError(
            f"tool_parser is {show(parser)}, expected one of {', '.join(sorted(TOOL_PARSERS))}; or leave it out"
        )
    return partial(make, functions)
