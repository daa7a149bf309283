"""Which form of calls a template teaches, and what a request may say about tools."""

from __future__ import annotations

import pytest
from text.chats import TOOLS

from pace.errors import RequestError
from pace.text.answer import answer_reader
from pace.text.readers import Chain
from pace.text.tools import ToolChoice, find_parser, functions_of, make_call_reader


@pytest.mark.parametrize(
    ("template", "parser"),
    [
        ("<tool_call>\\n{\"name\": <function-name>}</tool_call>", "hermes"),
        ("<tool_call>\\n<function=example>\\n<parameter=a>", "qwen3_coder"),
        ("<seed:tool_call>\\n<function=example>", "seed_oss"),
        ('<minimax:tool_call>\\n<invoke name="a">', "minimax"),
        ("[AVAILABLE_TOOLS][TOOL_CALLS]", "mistral"),
        ("<｜tool▁calls▁begin｜>", "deepseek"),
        ("<|tool|>{{ tools }}<|/tool|>", "phi4_mini"),
        ("<|tool_call|>", "phi4_mini"),
        ("<|tool_call>call:{{ name }}<tool_call|>", "gemma4"),
        ('<|start_header_id|>ipython {"name": function name, "parameters": dictionary}', "llama"),
        ("<|start_header_id|><|python_tag|>", "llama"),
        ("<|header_start|><|python_start|>", "llama"),
        ("<|start|><|channel|>final<|message|>", "harmony"),
        ("<tool_call>{{ name }}<arg_key>", "glm"),
        ("<|im_start|>{{ role }}", None),
    ],
)  # fmt: skip
def test_the_template_shows_the_form(template: str, parser: str | None) -> None:
    assert find_parser(template) == parser


def test_readers_are_joined_as_the_request_needs() -> None:
    both = "</think><tool_call>"
    functions = functions_of(TOOLS)
    assert answer_reader("<tool_call>", "") is None
    assert answer_reader("nothing", "", functions=functions) is None
    make = answer_reader(both, "a", functions=functions)
    assert make is not None and isinstance(make(), Chain)
    text = '<think>Why <tool_call>?</think>So.<tool_call>{"name": "weather", "arguments": {}}</tool_call>'
    reader = make()
    pieces = reader.push(text) + reader.finish()
    assert [tuple(piece) for piece in pieces] == [
        ("reasoning", "Why <tool_call>?", None),
        ("final", "So.", None),
        ("tool_call", "", "weather"),
        ("tool_call", "{}", None),
    ]
    assert reader.markers == {"<think>", "</think>", "<tool_call>"}
    make = answer_reader("nothing", "", functions=functions, parser="hermes")
    assert make is not None and make().push(text[-10:]) is not None


def test_tool_choice() -> None:
    named = {"type": "function", "function": {"name": "weather"}}
    assert ToolChoice.parse(None, None) == ToolChoice.parse("auto", TOOLS) == ToolChoice("auto")
    assert not ToolChoice.parse("none", TOOLS).offers_tools
    assert ToolChoice.parse("required", TOOLS) == ToolChoice("required")
    assert ToolChoice.parse(named, TOOLS) == ToolChoice("required", "weather")


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("any", "tool_choice is 'any', expected none, auto, required"),
        ({"type": "function"}, "expected none, auto, required"),
        (5, "tool_choice is 5, expected"),
        ({"type": "function", "function": {"name": "h"}}, "the function 'h', expected one of weather"),
    ],
)
def test_a_wrong_tool_choice_is_named(choice: object, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        ToolChoice.parse(choice, TOOLS)


def test_a_call_without_tools_and_an_unknown_form_are_refused() -> None:
    with pytest.raises(RequestError, match="but there are no tools"):
        ToolChoice.parse("required", None)
    with pytest.raises(RequestError, match="tool_parser is 'x', expected one of deepseek"):
        make_call_reader("x", {})


def test_functions_in_any_shape() -> None:
    assert functions_of([*TOOLS, {"name": "bare"}, {"type": "web_search"}, 5]).keys() == {"weather", "bare"}  # type: ignore[list-item]  # what is none is left out
