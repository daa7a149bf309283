"""Every family's tool calls: what is a call, what is text, and that cutting changes nothing."""

from __future__ import annotations

import json
import random

import pytest
from text.readers import FUNCTIONS, check_cuts, garbled

from pace.text.call_formats import as_json
from pace.text.tools import TOOL_PARSERS, make_call_reader

F_AB, G = ("f", '{"a": "b"}'), ("g", "{}")

DEEPSEEK = (
    '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{"a": "b"}\n```<｜tool▁call▁end｜>\n'
    "<｜tool▁call▁begin｜>g<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
)
QWEN = (
    "<tool_call>\n<function=f>\n<parameter=a>\none\n two\n</parameter>\n<parameter=n>\n5\n</parameter>\n"
    '<parameter=o>\n{"k": ["</tool_call>"]}\n</parameter>\n<parameter=s>\nnull\n</parameter>\n</function>\n</tool_call>'
)
QWEN_ARGUMENTS = '{"a": "one\\n two", "n": 5, "o": {"k": ["</tool_call>"]}, "s": null}'
GLM = (
    "<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>one\n two</arg_value>\n<arg_key>n</arg_key>\n<arg_value>5</arg_value>\n"
    '<arg_key>o</arg_key>\n<arg_value>{"k": ["</tool_call>"]}</arg_value>\n</tool_call>\n<tool_call>g\n</tool_call>'
)
GLM_ARGUMENTS = '{"a": "one\\n two", "n": 5, "o": {"k": ["</tool_call>"]}}'
GEMMA = '<|tool_call>call:f{a:<|"|>x "y" \\ z<|"|>,n:5,o:{k:[true,null,<|"|>a<|"|>]}}<tool_call|>'

MINIMAX = (
    '<minimax:tool_call>\n<invoke name="f">\n<parameter name="a">b</parameter>\n</invoke>\n'
    '<invoke name="g">\n</invoke>\n</minimax:tool_call>'
)

# parser, what the model writes, final text, calls
CASES = {
    "Hermes": ("hermes", '<tool_call>\n{"name": "f", "arguments": {"a": "b"}}\n</tool_call>', "", [F_AB]),
    "text around": (
        "hermes",
        'I look.\n\n<tool_call>{"name": "f", "arguments": {"a": "b"}}</tool_call>\nDone.\n',
        "I look.\n\nDone.\n",
        [F_AB],
    ),
    "several": (
        "hermes",
        '<tool_call>{"name": "f", "arguments": {"a": "b"}}</tool_call>\n<tool_call>{"name": "g"}</tool_call>',
        "",
        [F_AB, G],
    ),
    "arguments first": ("hermes", '<tool_call>{"arguments": {"a": "b"}, "name": "f"}</tool_call>', "", [F_AB]),
    "arguments as text": (
        "hermes",
        '<tool_call>{"name": "f", "arguments": "{\\"a\\": \\"b\\"}"}</tool_call>',
        "",
        [F_AB],
    ),
    "parameters": ("hermes", '<tool_call>{"name": "f", "parameters": {"a": "b"}}</tool_call>', "", [F_AB]),
    "no arguments": ("hermes", '<tool_call>{"name": "g"}</tool_call>', "", [G]),
    "an id beside": (
        "hermes",
        '<tool_call>{"id": 1, "name": "f", "arguments": {"a": "b"}, "x": [2]}</tool_call>',
        "",
        [F_AB],
    ),
    "tags and braces in strings": (
        "hermes",
        '<tool_call>{"name": "f", "arguments": {"a": "}</tool_call><tool_call>{\\"", "o": {"k": [{}]}}}</tool_call>',
        "",
        [("f", '{"a": "}</tool_call><tool_call>{\\"", "o": {"k": [{}]}}')],
    ),
    "a line break in a string": (
        "hermes",
        '<tool_call>{"name": "f", "arguments": {"a": "b\nc"}}</tool_call>',
        "",
        [("f", '{"a": "b\\u000ac"}')],
    ),
    "another function": (
        "hermes",
        ' <tool_call>{"name": "h", "arguments": {}}</tool_call> ',
        ' <tool_call>{"name": "h", "arguments": {}}</tool_call> ',
        [],
    ),
    "no JSON": ("hermes", "<tool_call>f()</tool_call>", "<tool_call>f()</tool_call>", []),
    "arguments are a list": (
        "hermes",
        '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
        [],
    ),
    "a bad call before a good one": (
        "hermes",
        '<tool_call>{"name": "f" oops}</tool_call><tool_call>{"name": "g", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "f" oops}</tool_call>',
        [G],
    ),
    "broken arguments stay what they are": (
        "hermes",
        '<tool_call>{"name": "f", "arguments": {"a": oops}}</tool_call>.',
        ".",
        [("f", '{"a": oops}}')],
    ),
    "cut in the arguments": ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "b', "", [("f", '{"a": "b')]),
    "cut in the name": ("hermes", 'a <tool_call>{"name": "f', 'a <tool_call>{"name": "f', []),
    "cut in the tag": ("hermes", "a <tool_c", "a <tool_c", []),
    "half a character": (
        "hermes",
        '<tool_call>{"name": "f", "arguments": "{\\"a\\": \\"\\ud800\\"}"}</tool_call>',
        '<tool_call>{"name": "f", "arguments": "{\\"a\\": \\"\\ud800\\"}"}</tool_call>',
        [],
    ),
    "too deep": (
        "hermes",
        '<tool_call>{"name": "f", "x": ' + "[" * 70 + "]" * 70 + "}</tool_call>",
        '<tool_call>{"name": "f", "x": ' + "[" * 70 + "]" * 70 + "}</tool_call>",
        [],
    ),
    "Phi-4-mini": (
        "phi4_mini",
        '<|tool_call|>[{"name": "f", "arguments": {"a": "b"}}, {"name": "g", "arguments": {}}]<|/tool_call|>',
        "",
        [F_AB, G],
    ),
    "Granite 3": ("phi4_mini", '<|tool_call|>[{"name": "f", "arguments": {"a": "b"}}]', "", [F_AB]),
    "the list's end is missing": (
        "phi4_mini",
        '<|tool_call|>[{"name": "f", "arguments": {"a": "b"}}<|/tool_call|>',
        "",
        [F_AB],
    ),
    "Mistral, old": (
        "mistral",
        '[TOOL_CALLS] [{"name": "f", "arguments": {"a": "b"}, "id": "abcdefghi"}, {"name": "g", "arguments": {}}]',
        "",
        [F_AB, G],
    ),
    "Mistral, new": ("mistral", 'ok[TOOL_CALLS]f[ARGS]{"a": "b"}[TOOL_CALLS]g[ARGS]{}', "ok", [F_AB, G]),
    "Mistral, with ids": ("mistral", '[TOOL_CALLS]f[CALL_ID]abc[ARGS]{"a": "b"}', "", [F_AB]),
    "Mistral, no marker": ("mistral", '[TOOL_CALLS]f{"a": "b"}', "", [F_AB]),
    "Mistral, text": ("mistral", "[TOOL_CALLS] is a token", "[TOOL_CALLS] is a token", []),
    "DeepSeek": ("deepseek", "Hm.\n" + DEEPSEEK, "Hm.", [F_AB, G]),
    "Qwen3-Coder": ("qwen3_coder", "ok\n" + QWEN, "ok", [("f", QWEN_ARGUMENTS)]),
    "GLM": ("glm", "Hm.\n" + GLM, "Hm.", [("f", GLM_ARGUMENTS), G]),
    "GLM without line breaks": (
        "glm",
        "<tool_call>f<arg_key>a</arg_key><arg_value>b</arg_value></tool_call><tool_call>g</tool_call>",
        "",
        [F_AB, G],
    ),
    "GLM, cut in a value": (
        "glm",
        "<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>on",
        "",
        [("f", '{"a": "on')],
    ),
    "GLM, another function": ("glm", "<tool_call>h\n</tool_call>", "<tool_call>h\n</tool_call>", []),
    "Qwen3-Coder, no outer tag": ("qwen3_coder", "<function=g>\n</function>\n</tool_call>", "", [G]),
    "Qwen3-Coder, cut": (
        "qwen3_coder",
        "<tool_call>\n<function=f>\n<parameter=a>\none",
        "",
        [("f", '{"a": "\\none')],
    ),
    "Seed-OSS": (
        "seed_oss",
        "<seed:tool_call>\n<function=f>\n<parameter=a>b</parameter>\n</function>\n</seed:tool_call>",
        "",
        [F_AB],
    ),
    "MiniMax": (
        "minimax",
        MINIMAX,
        "",
        [F_AB, G],
    ),
    "Llama": ("llama", '{"name": "f", "parameters": {"a": "b"}}', "", [F_AB]),
    "Llama, two": (
        "llama",
        '{"name": "f", "parameters": {"a": "b"}}; {"name": "g", "parameters": {}}<|eom_id|>',
        "",
        [F_AB, G],
    ),
    "Llama, marker": ("llama", '<|python_tag|>{"name": "f", "parameters": {"a": "b"}}', "", [F_AB]),
    "Llama, Python": (
        "llama",
        '[f(a="b"), f(a=\'x\\\'y\\n\', n=-5, o={"k": [True, None, 1.5]},), g()]',
        "",
        [F_AB, ("f", '{"a": "x\'y\\n", "n": -5, "o": {"k": [true, null, 1.5]}}'), G],
    ),
    "Llama 4": ("llama", '<|python_start|>[f(a="b")]<|python_end|>', "", [F_AB]),
    "Llama, a list of JSON": ("llama", '[{"name": "f", "parameters": {"a": "b"}}]', "", [F_AB]),
    "Llama, JSON that is no call": ("llama", '{"a": [1]} is it.', '{"a": [1]} is it.', []),
    "Llama, a footnote": ("llama", "[1] says so.", "[1] says so.", []),
    "Llama, text first": ("llama", 'Use [f(a="b")].', 'Use [f(a="b")].', []),
    "Llama, no literal": ("llama", "[f(a=b)]", "", [("f", '{"a": b}')]),
    "Gemma 4": ("gemma4", GEMMA, "", [("f", '{"a": "x \\"y\\" \\\\ z", "n": 5, "o": {"k": [true, null, "a"]}}')]),
    "Gemma 4, two": ("gemma4", 'a\n<|tool_call>call:g{}<tool_call|><|tool_call>call:f{"a":b}<tool_call|>', "a", [G, F_AB]),
    "Gemma 4, text": ("gemma4", "<|tool_call>dial:g{}<tool_call|>", "<|tool_call>dial:g{}<tool_call|>", []),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_calls(case: str) -> None:
    parser, text, final, calls = CASES[case]
    assert check_cuts(make_call_reader(parser, FUNCTIONS), text, random.Random(0)) == (final, "", calls)


def test_every_form_has_a_case() -> None:
    assert {case[0] for case in CASES.values()} == set(TOOL_PARSERS)


def test_names_come_first_and_arguments_as_they_are_written() -> None:
    reader = make_call_reader("hermes", FUNCTIONS)()
    reader.push('<tool_call>{"name": "f", "arguments": ')
    seen = [[(piece.name, piece.text) for piece in reader.push(char)] for char in '{"a": 1}}</tool_call>']
    assert seen[0] == [("f", ""), (None, "{")]
    assert seen[1:8] == [[(None, char)] for char in '"a": 1}'] and not any(seen[8:])


@pytest.mark.parametrize("parser", sorted(TOOL_PARSERS))
def test_garbled_calls_never_raise_nor_depend_on_the_cuts(parser: str) -> None:
    rng = random.Random(parser)
    texts = [text for name, text, _, _ in CASES.values() if name == parser]
    alphabet = ['"', "\\", "{", "}", "[", "]", ",", ":", "(", ")", "=", "<", "f", "1", "\n", " ", *texts]
    make = make_call_reader(parser, FUNCTIONS)
    for _ in range(60):
        text = garbled(rng.choice(texts), rng, alphabet)
        final, _, calls = check_cuts(make, text, rng, 2)
        assert {name for name, _ in calls} <= set(FUNCTIONS), text
        if not calls:
            assert final == text, text


@pytest.mark.parametrize("parser", sorted(TOOL_PARSERS))
def test_text_without_a_call_stays_as_it_is(parser: str) -> None:
    for text in (
        "",
        " ",
        "\n\n",
        "Hello\n",
        "a < b",
        "  {\n",
        "[",
        '{"name": "f"',
        "{}",
        "[TOOL",
        "x\n<tool",
        "<|",
    ):
        if parser == "llama" and text == '{"name": "f"':
            continue
        assert check_cuts(make_call_reader(parser, FUNCTIONS), text, random.Random(0)) == (text, "", [])


def test_long_outputs_are_read_in_linear_time() -> None:
    """60 kB in pieces of 4 characters: linear, or the quick suite notices."""
    value = "x" * 60_000
    for parser, text in (
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "' + value + '"}}</tool_call>'),
        ("gemma4", '<|tool_call>call:f{a:<|"|>' + value + '<|"|>}<tool_call|>'),
        ("hermes", value),
        ("hermes", "<tool_call>" * 6_000),
    ):
        reader = make_call_reader(parser, FUNCTIONS)()
        n = sum(len(p.text) for at in range(0, len(text), 4) for p in reader.push(text[at : at + 4]))
        assert n + sum(len(p.text) for p in reader.finish()) >= 60_000


@pytest.mark.parametrize(
    ("text", "types", "value"),
    [
        ("\n5\n", ["string"], "5"),
        ("5", ["integer"], 5),
        ("\nTrue\n", ["boolean"], True),
        ("null", ["string", "null"], None),
        ("null", ["string"], "null"),
        ("[1, 2]", [], "[1, 2]"),
        ("[1, 2]", ["array"], [1, 2]),
        ("five", ["integer"], "five"),
        ("01", ["number"], "01"),
        ("é\n\n", ["string"], "é\n"),
    ],
)
def test_the_schema_says_what_a_parameter_is(text: str, types: list[str], value: object) -> None:
    assert json.loads(as_json(text, frozenset(types))) == value
