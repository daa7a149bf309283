"""A grammar holds for the answer; what may stand before it is the template's business."""

from __future__ import annotations

from pathlib import Path

import pytest
from text.kit import byte_level, load, save

from pace.text.preamble import NO_PREAMBLE, find_preamble
from pace.text.structure import Grammars
from pace.text.tokenizer import Tokenizer

pytest.importorskip("llguidance")

HARMONY = "{{ '<|channel|><|message|>' }}"
GEMMA = "{{ '<|channel>thought\\n<channel|>' }}"
TOKENS = [
    "<|start|>",
    "<|end|>",
    "<|message|>",
    "<|channel|>",
    "<|channel>",
    "<channel|>",
    "[THINK]",
    "[/THINK]",
]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    rust = byte_level()
    rust.add_special_tokens(TOKENS)
    return load(save(tmp_path, rust))


@pytest.mark.parametrize(
    ("template", "prompt", "good", "bad"),
    [
        ("</think>", "a", ["<think>\nWhy 12?\n</think>\n\n12", "12"], ["Why", "<think>x</think>y"]),
        ("</think>", "a<think>\n", ["Why 1?</think>12"], ["12", "Why </think>b"]),
        ("</think>", "a<think>\n\n</think>\n\n", ["12"], ["<think>"]),
        ("[/THINK]", "a", ["[THINK]Why?[/THINK]12"], ["[THINK]Why?[/THINK]b"]),
        (GEMMA, "a", ["<|channel>thought\nWhy?<channel|>12", "12"], ["<|channel>other\n"]),
        (
            HARMONY,
            "<|start|>assistant",
            [
                "<|channel|>analysis<|message|>Why?<|end|><|start|>assistant<|channel|>final<|message|>12",
                "<|channel|>final<|message|>12",
            ],
            ["12", "<|channel|>final<|message|>a"],
        ),
        (HARMONY, "<|start|>assistant<|channel|>final<|message|>It", ["12"], ["<|channel|>"]),
        ("nothing", "a", ["12"], ["x"]),
    ],
)
def test_what_may_precede_the_answer(
    tokenizer: Tokenizer, template: str, prompt: str, good: list[str], bad: list[str]
) -> None:
    continued = "It" if prompt.endswith("It") else None
    lark = find_preamble(template, prompt, continued, tokenizer).before("start: /[0-9]+/")
    grammars = Grammars(tokenizer, 512, {1})
    for text in good + bad:
        tokens = [*tokenizer.encode(text, add_special_tokens=False), 1]
        assert (grammars.compile(lark).validate(tokens) == len(tokens)) == (text in good), text


def test_no_preamble_leaves_a_grammar_as_it_is() -> None:
    assert NO_PREAMBLE.before("start: /a/") == "start: /a/"
