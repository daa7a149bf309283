"""gpt-oss' channels: what is the answer, what a thought, what a call."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from text.kit import byte_level, load, save
from text.readers import FUNCTIONS, check_cuts

from pace.text.answer import answer_reader
from pace.text.harmony import Harmony, end_ids
from pace.text.stream import TextStream
from pace.text.tokenizer import Tokenizer

TOKENS = sorted(Harmony.tokens)
TEMPLATE = "{{ '<|channel|><|message|>' }}"
THINK = "<|channel|>analysis<|message|>Think.<|end|>"
NEXT = "<|start|>assistant"
JSON = '<|constrain|>json<|message|>{"a": 1}'

# what the model writes, final text, reasoning, calls
CASES = {
    "answer": (f"{THINK}{NEXT}<|channel|>final<|message|>Done.<|return|>", "Done.", "Think.", []),
    "no thought": ("<|channel|>final<|message|>Done.", "Done.", "", []),
    "call": (f"{THINK}{NEXT}<|channel|>commentary to=functions.f {JSON}<|call|>", "", "Think.", [("f", '{"a": 1}')]),
    "recipient in the role": (f"{NEXT} to=functions.f<|channel|>commentary {JSON}", "", "", [("f", '{"a": 1}')]),
    "recipient without namespace": (f" to=f<|channel|>analysis {JSON}", "", "", [("f", '{"a": 1}')]),
    "call on the channel of thoughts": (f"<|channel|>analysis to=functions.g {JSON}", "", "", [("g", '{"a": 1}')]),
    "call without arguments": ("<|channel|>commentary to=functions.g<|message|><|call|>", "", "", [("g", "{}")]),
    "another tool": (f"<|channel|>commentary to=browser.open {JSON}", "", '{"a": 1}', []),
    "preamble": (
        f"<|channel|>commentary<|message|>I will look.<|end|>{NEXT}<|channel|>commentary to=functions.f {JSON}",
        "",
        "I will look.",
        [("f", '{"a": 1}')],
    ),
    "two thoughts": (f"{THINK}{NEXT}{THINK}", "", "Think.\nThink.", []),
    "two answers": (f"<|channel|>final<|message|>A<|end|>{NEXT}<|channel|>final<|message|>B", "A\nB", "", []),
    "cut in the header": (f"{THINK}{NEXT}<|channel|>fi", "", "Think.", []),
    "cut behind the role": (f"{THINK}<|start|>assis", "", "Think.", []),
    "no channel at all": (" Hello there.", " Hello there.", "", []),
    "no header": ("<|message|>Hello", "Hello", "", []),
    "no message": ("<|channel|>final Hello my friend<|end|>", "final Hello my friend", "", []),
    "text between messages": (f"{THINK} Hello", "Hello", "Think.", []),
    "a message that is not ended": ("<|channel|>analysis<|message|>Why?<|channel|>final<|message|>So.", "So.", "Why?", []),
    "an unknown channel": ("<|channel|>finale<|message|>So.", "So.", "", []),
    "another role": ("<|start|>user<|channel|>final<|message|>So.", "So.", "", []),
    "a marker inside": ("<|channel|>final<|message|>a<|constrain|>b<|message|>c", "abc", "", []),
    "nothing": ("", "", "", []),
    "only markers": ("<|end|><|call|><|start|><|channel|><|channel|><|return|>", "", "", []),
    "it looks like a recipient": (" to= be or not", " to= be or not", "", []),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_channels(case: str) -> None:
    text, *expected = CASES[case]
    assert check_cuts(lambda: Harmony(FUNCTIONS), text, random.Random(0)) == tuple(expected)


def test_a_continued_answer_is_on_its_channel() -> None:
    prompt = "<|start|>user<|message|>Hi<|end|><|start|>assistant<|channel|>final<|message|>It"
    assert check_cuts(lambda: Harmony({}, prompt), " is.<|return|>", random.Random(0)) == (" is.", "", [])
    prompt = prompt.replace("final", "analysis")
    assert check_cuts(lambda: Harmony({}, prompt), " is.<|end|>", random.Random(0)) == ("", " is.", [])


def test_random_streams_lose_no_text() -> None:
    rng = random.Random(0)
    words = [
        *TOKENS,
        "<|message|>",
        "<|end|>",
        "<|start|>",
        "x1",
        " y2",
        "\n",
        "to=functions.f",
        "analysis",
        "final",
        "assistant",
    ]
    for _ in range(400):
        text = "".join(rng.choice(words) for _ in range(rng.randrange(14)))
        final, reasoning, calls = check_cuts(lambda: Harmony(FUNCTIONS), text, rng, 2)
        told = final + reasoning + "".join(arguments for _, arguments in calls)
        # What is no name of a role, channel or recipient comes out; in a complete header it is a type.
        assert all(
            word not in text.rpartition("<|message|>")[2] or word in told for word in ("x1", "y2")
        ) or ("<|channel|>" in text.rpartition("<|message|>")[2]), text


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    rust = byte_level()
    rust.add_special_tokens(TOKENS)
    return load(save(tmp_path, rust))


def test_only_tokens_divide(tokenizer: Tokenizer) -> None:
    """A model that writes about the format, in ordinary tokens, is not misread."""
    spelt = [i for char in "<|end|>" for i in tokenizer.encode(char, add_special_tokens=False)]
    ids = [
        *tokenizer.encode(f"{THINK}{NEXT}<|channel|>final<|message|>Use ", add_special_tokens=False),
        *spelt,
        *tokenizer.encode(" twice é.", add_special_tokens=False),
    ]
    make = answer_reader(TEMPLATE, "<|start|>assistant")
    assert make is not None
    texts = TextStream(tokenizer, reader=make())
    shown = "".join(map(texts.push, ids)) + texts.finish()
    assert (shown, texts.reasoning) == ("Use <|end|> twice é.", "Think.")
    texts = TextStream(tokenizer, reader=make())
    assert texts.extend(ids) + texts.finish() == shown


def test_half_a_character_before_a_marker_does_not_run_into_the_next_text(tokenizer: Tokenizer) -> None:
    half = tokenizer.encode("\U0001f9ff", add_special_tokens=False)[:2]
    begin = tokenizer.encode("<|channel|>final<|message|>a", add_special_tokens=False)
    end = tokenizer.encode("<|end|>b", add_special_tokens=False)
    texts = TextStream(tokenizer, reader=Harmony({}))
    assert texts.extend([*begin, *half, *end]) + texts.finish() == "a\ufffd\nb"


def test_the_end_of_a_thought_ends_no_output(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Files of fine-tunes list <|end|> among the ends, or forget <|call|>: no answer, or no end of a call."""
    end, call, ret, eos = (tokenizer.token_to_id(t) for t in ("<|end|>", "<|call|>", "<|return|>", "</s>"))
    assert end is not None and call is not None and ret is not None and eos is not None
    assert end_ids(tokenizer, {end, eos}) == {call, ret, eos}
    (tmp_path / "other").mkdir()
    rust = byte_level()
    rust.add_special_tokens(["<|end|>", "<|call|>"])
    other = load(save(tmp_path / "other", rust))
    assert end_ids(other, {1, 2}) == {1, 2}
