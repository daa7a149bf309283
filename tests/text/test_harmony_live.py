"""openai-harmony, where it and its vocabulary are at hand, reads the same."""

from __future__ import annotations

import pytest
from text.readers import read
from text.test_harmony import CASES, FUNCTIONS

from pace.text.harmony import Harmony

harmony = pytest.importorskip("openai_harmony")


@pytest.mark.live
@pytest.mark.parametrize(
    "case", ["answer", "no thought", "call", "recipient in the role", "preamble", "two answers"]
)
def test_the_same_as_openai_harmony(case: str) -> None:
    text, *_ = CASES[case]
    try:
        encoding = harmony.load_harmony_encoding(harmony.HarmonyEncodingName.HARMONY_GPT_OSS)
    except harmony.HarmonyError as error:  # it downloads its vocabulary
        pytest.skip(str(error))
    tokens = encoding.encode(text.removeprefix("<|start|>assistant"), allowed_special="all")
    answer, thoughts, calls = [], [], []
    for message in encoding.parse_messages_from_completion_tokens(tokens, harmony.Role.ASSISTANT):
        body = "".join(part.text for part in message.content)
        name = (message.recipient or "").removeprefix("functions.")
        if name in FUNCTIONS:
            calls.append((name, body))
        else:
            (answer if message.channel == "final" else thoughts).append(body)
    assert read(lambda: Harmony(FUNCTIONS), text) == ("\n".join(answer), "\n".join(thoughts), calls)
