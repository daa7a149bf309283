"""Forced calls: what the grammar allows is what the reader reads."""

from __future__ import annotations

from pathlib import Path

import pytest
from text.kit import byte_level, load, save
from text.readers import FUNCTIONS, Read, read

from pace.errors import RequestError
from pace.text.answer import answer_reader
from pace.text.forced_calls import forced_calls
from pace.text.preamble import find_preamble
from pace.text.structure import Grammars
from pace.text.tokenizer import Tokenizer
from pace.text.tools import find_parser

pytest.importorskip("llguidance")

TOKENS = [
    "<|start|>",
    "<|end|>",
    "<|message|>",
    "<|channel|>",
    "<|constrain|>",
    "[TOOL_CALLS]",
    "[ARGS]",
    "<｜tool▁sep｜>",
]
A, B = '{"name": "f", "arguments": {"a": "b"}}', '{"name": "g", "arguments": {}}'
DEEPSEEK = "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>"
HARMONY = (
    "<|channel|>analysis<|message|>Why?<|end|><|start|>assistant<|channel|>commentary to=functions.f "
    '<|constrain|>json<|message|>{"a": "b"}'
)
F_AB, G = ("f", '{"a": "b"}'), ("g", "{}")

# template, what may be written, its calls
CASES = {
    "hermes": ("<tool_call>", f"<tool_call>\n{A}\n</tool_call>\n<tool_call>\n{B}\n</tool_call>", [F_AB, G]),
    "behind a thought": ("</think><tool_call>", f"<think>Why?</think>\n<tool_call>\n{A}\n</tool_call>", [F_AB]),
    "phi4_mini": ("<|tool_call|>", f"<|tool_call|>[{A}, {B}]<|/tool_call|>", [F_AB, G]),
    "mistral": ("[TOOL_CALLS]", f"[TOOL_CALLS][{A}, {B}]", [F_AB, G]),
    "mistral, new": ("[TOOL_CALLS][ARGS]", '[TOOL_CALLS]f[ARGS]{"a": "b"}[TOOL_CALLS]g[ARGS]{}', [F_AB, G]),
    "llama": ("<|python_tag|>", '{"name": "f", "parameters": {"a": "b"}}; {"name": "g", "parameters": {}}', [F_AB, G]),
    "deepseek": (
        "<｜tool▁calls▁begin｜>",
        DEEPSEEK + 'f<｜tool▁sep｜>{"a": "b"}<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
        [F_AB],
    ),
    "deepseek, old": (
        "<｜tool▁calls▁begin｜>```json",
        DEEPSEEK + 'function<｜tool▁sep｜>f\n```json\n{"a": "b"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
        [F_AB],
    ),
    "harmony": (
        "<|channel|><|message|>",
        HARMONY,
        [F_AB],
    ),
}  # fmt: skip


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    rust = byte_level()
    rust.add_special_tokens(TOKENS)
    return load(save(tmp_path, rust))


@pytest.mark.parametrize("case", CASES)
def test_what_may_be_written_is_read(tokenizer: Tokenizer, case: str) -> None:
    template, text, calls = CASES[case]
    prompt = "<|start|>assistant" if case == "harmony" else ""
    grammars = Grammars(tokenizer, 512, {1})
    preamble = find_preamble(template, prompt, None, tokenizer, is_call=True)

    def allows(text: str, name: str | None = None) -> bool:
        lark = preamble.before(forced_calls(find_parser(template), template, FUNCTIONS, name, tokenizer))
        tokens = [*tokenizer.encode(text, add_special_tokens=False), 1]
        return grammars.compile(lark).validate(tokens) == len(tokens)

    make = answer_reader(template, prompt, functions=FUNCTIONS)
    assert make is not None
    found: Read = read(make, text)
    assert found[2] == calls and not found[0]
    assert allows(text)
    assert allows(text, "f") == (len(calls) == 1)
    assert not allows(text, "g") and not allows("Hello") and not allows("")
    assert not allows(text.replace('"b"', "5"))  # the schema says that a is a text


def test_a_form_without_json_can_not_be_forced(tokenizer: Tokenizer) -> None:
    for form in ("gemma4", "qwen3_coder", None):
        with pytest.raises(RequestError, match="can't force calls of this model's form"):
            forced_calls(form, "", FUNCTIONS, None, tokenizer)
