"""`LLM(model="file.gguf")` against the folder that the file was made from."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import gguf_kit
import pytest

import pace
from pace import LLM, SamplingParams

DEMO = Path(pace.__file__).parent / "demo" / "target"
PROMPTS = ["def read(path):", "import os\n", "class Stack:\n    def push(self,", "  \t 1234567 é 👍🏽"]


def from_demo(path: Path, dtype: str = "BF16") -> Path:
    tokenizer = json.loads((DEMO / "tokenizer.json").read_text())
    config = json.loads((DEMO / "tokenizer_config.json").read_text())
    vocabulary = partial(gguf_kit.write_vocabulary, tokenizer=tokenizer, config=config, pre="dbrx")
    return gguf_kit.write(DEMO, path, gguf_kit.plain(dtype), vocabulary)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return from_demo(tmp_path_factory.mktemp("gguf") / "demo.gguf")


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_a_file_says_what_its_folder_says_to_the_bit(dtype: str, demo: Path, tmp_path: Path) -> None:
    path = demo if dtype == "BF16" else from_demo(tmp_path / "demo.gguf", dtype)
    params = SamplingParams(max_tokens=24, temperature=0.0, repetition_penalty=1.0, logprobs=2)
    with LLM(model="demo") as folder, LLM(model=str(path)) as file:
        for ours, theirs in zip(
            file.generate(PROMPTS, params), folder.generate(PROMPTS, params), strict=True
        ):
            assert ours.prompt_token_ids == theirs.prompt_token_ids
            assert ours.outputs[0].text == theirs.outputs[0].text
            assert ours.outputs[0].logprobs == theirs.outputs[0].logprobs
            assert ours.outputs[0].finish_reason == theirs.outputs[0].finish_reason


def test_chats_use_the_template_of_the_file(demo: Path) -> None:
    messages = [{"role": "user", "content": "Sort a list."}]
    params = SamplingParams(max_tokens=8, temperature=0.0, repetition_penalty=1.0)
    with LLM(model="demo") as folder, LLM(model=str(demo)) as file:
        ours, theirs = file.chat(messages, params)[0], folder.chat(messages, params)[0]
        assert ours.prompt_token_ids == theirs.prompt_token_ids
        assert ours.outputs[0].text == theirs.outputs[0].text
