"""What a model writes is divided at its markers, the same however the text is cut."""

from __future__ import annotations

import random

import pytest

from pace.text.readers import FINAL, REASONING, MarkedReader, Piece, State
from pace.text.reasoning import find_reader

THINK = "{{ '</think>' }}"
GEMMA = "{{ '<|channel>thought\\n<channel|>' }}"


def read(
    template: str, prompt: str, text: str, size: int = 1 << 20, continued: str | None = None
) -> tuple[str, str]:
    """Final text and reasoning of an output that comes in pieces of so many characters."""
    make = find_reader(template, prompt, continued)
    if make is None:
        return text, ""
    reader = make()
    pieces: list[Piece] = []
    for at in range(0, len(text), size):
        pieces += reader.push(text[at : at + size])
    pieces += reader.finish()
    return tuple("".join(p.text for p in pieces if p.channel == name) for name in (FINAL, REASONING))  # type: ignore[return-value]  # two of them


CASES = {
    "Qwen3": (THINK, "assistant\n", "<think>\nWhy?\n</think>\n\nSo.\n", ("So.\n", "Why?")),
    "no opening tag, the template wrote it": (
        THINK,
        "assistant\n<think>\n",
        "Why?\n</think>\n\nSo.",
        ("So.", "Why?"),
    ),
    "newline of the prompt written by the model": (THINK, "x<think>", "\nWhy?\n</think>So.", ("So.", "Why?")),
    "disabled": (THINK, "assistant\n<think>\n\n</think>\n\n", "\n So <think> it.", ("\n So <think> it.", "")),
    "no thought": (THINK, "assistant\n", " <thin ice> holds", (" <thin ice> holds", "")),
    "empty thought": (THINK, "assistant\n", "<think>\n\n</think>\n\nSo.", ("So.", "")),
    "only white space": (THINK, "assistant\n", " \n", (" \n", "")),
    "cut inside the tag": (THINK, "assistant\n", "<thi", ("<thi", "")),
    "cut inside the thought": (THINK, "assistant\n", "<think>a </thin", ("", "a </thin")),
    "tags in the answer": (
        THINK,
        "a",
        "<think>a</think>Use <think> and </think>.",
        ("Use <think> and </think>.", "a"),
    ),
    "an opening tag in the thought": (THINK, "a", "<think>a <think> b</think>c", ("c", "a <think> b")),
    "a user who writes of tags": (THINK, "user\nWhat is <think>?<end>assistant\n", "A tag.", ("A tag.", "")),
    "newlines inside": (THINK, "a", "<think>\n\na\n\nb\n\n</think>\n\nc\n\nd\n", ("c\n\nd\n", "a\n\nb")),
    "Magistral": ("{{ '[/THINK]' }}", "[/INST]", "[THINK]a[/THINK]b", ("b", "a")),
    "Seed-OSS": ("{{ '</seed:think>' }}", "", "<seed:think>a</seed:think>b", ("b", "a")),
    "Gemma 4": (GEMMA, "<|turn>model\n", "<|channel>thought\nWhy?\n<channel|>So.", ("So.", "Why?")),
    "Gemma 4, empty": (GEMMA, "<|turn>model\n", "<|channel>thought\n<channel|>So.", ("So.", "")),
    "Gemma 4, no line": (GEMMA, "<|turn>model\n", "<|channel>thought<channel|>So.", ("So.", "")),
    "Gemma 4, disabled": (GEMMA, "model\n<|channel>thought\n<channel|>", "So.", ("So.", "")),
    "Gemma 4, opened": (GEMMA, "model\n<|channel>thought\n", "Why?<channel|>So.", ("So.", "Why?")),
    "Gemma 4, twice": (
        GEMMA,
        "",
        "<|channel>thought\na<channel|>b<|channel>thought\nc<channel|>d",
        ("bd", "ac"),
    ),
    "Gemma 4, a marker astray": (GEMMA, "", "So<channel|> it is.", ("So it is.", "")),
    "no markers in the template": ("{{ 1 }}", "", "<think>a</think>b", ("<think>a</think>b", "")),
}


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1 << 20])
@pytest.mark.parametrize("name", CASES)
def test_reasoning_is_divided_from_the_answer(name: str, size: int) -> None:
    template, prompt, text, expected = CASES[name]
    assert read(template, prompt, text, size) == expected


def test_a_continued_answer_begins_where_it_was_left() -> None:
    for begun, expected in (
        ("<think>\nI", ("c", " b")),
        ("<think>a</think>b", (" b</think>c", "")),
        ("So", (" b</think>c", "")),
        ("", (" b</think>c", "")),
    ):
        assert read(THINK, "user <think> assistant" + begun, " b</think>c", 2, begun) == expected


def test_nothing_is_lost_however_the_text_is_cut() -> None:
    rng = random.Random(0)
    states = {
        "a": State(FINAL, {"<x>": "b", "<xy>": "c"}),
        "b": State(REASONING, {"</x>": "a", "<x": "c"}, trims=True),
        "c": State(None, {"\n": "a", ":": "b"}),
    }
    for _ in range(500):
        text = "".join(
            rng.choice(["<x>", "</x>", "<xy>", "<", "x", ">", "\n", ":", "t"])
            for _ in range(rng.randrange(12))
        )
        whole = MarkedReader(states, "a")
        expected = whole.push(text) + whole.finish()
        parts = MarkedReader(states, "a")
        pieces: list[Piece] = []
        at = 0
        while at < len(text):
            end = at + rng.randrange(1, 4)
            pieces += parts.push(text[at:end])
            at = end
        pieces += parts.finish()
        for channel in (FINAL, REASONING):
            assert "".join(p.text for p in pieces if p.channel == channel) == "".join(
                p.text for p in expected if p.channel == channel
            ), text


def test_only_what_may_be_a_marker_is_held_back() -> None:
    make = find_reader(THINK, "a")
    assert make is not None
    reader = make()
    assert [reader.push(text) for text in (" ", "<thi", "nk>", "\n", "a<", "b", "</", "think", ">", "c<")] == [
        [], [], [], [], [Piece(REASONING, "a")], [Piece(REASONING, "<b")], [], [], [], [Piece(FINAL, "c<")],
    ]  # fmt: skip


def harmony_channel(header: str, marker: str) -> str:
    if header.startswith("analysis"):
        return REASONING
    return "call" if " to=functions." in header else FINAL


def test_the_contract_carries_harmony() -> None:
    """gpt-oss: <|end|> closes a message and the next one follows, and the header names its channel."""
    states = {
        "between": State(None, {"<|channel|>": "header"}),
        "header": State(None, {"<|message|>": FINAL}, choose=harmony_channel),
        **{
            name: State(name, {"<|end|>": "between", "<|call|>": "between", "<|return|>": "between"})
            for name in (FINAL, REASONING, "call")
        },
    }
    text = (
        "<|channel|>analysis<|message|>Think.<|end|><|start|>assistant<|channel|>commentary to=functions.f "
        '<|constrain|>json<|message|>{"a": 1}<|call|><|start|>assistant<|channel|>final<|message|>Done.<|return|>'
    )
    for size in (1, 5, len(text)):
        reader = MarkedReader(states, "between")
        pieces = [piece for at in range(0, len(text), size) for piece in reader.push(text[at : at + size])]
        pieces += reader.finish()
        found = {
            name: "".join(p.text for p in pieces if p.channel == name) for name in (REASONING, "call", FINAL)
        }
        assert found == {REASONING: "Think.", "call": '{"a": 1}', FINAL: "Done."}
