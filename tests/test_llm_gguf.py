"""`LLM(model="file.gguf")` against the folder that the file was made from."""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import gguf_kit
import pytest

import pace
from pace import LLM, SamplingParams, ops
from pace.cli import main
from pace.config import EngineConfig
from pace.errors import CheckpointError, ConfigError
from pace.export.pack import pack_checkpoint

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


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1"])
def test_blocks_stay_blocks_in_memory(kind: str, demo: Path, tmp_path: Path) -> None:
    """Not bf16: that would take twice to four times the memory, and round every weight once more."""
    path = from_demo(tmp_path / "demo.gguf", kind)
    params = SamplingParams(max_tokens=1, temperature=0.0, repetition_penalty=1.0, logprobs=1)
    with LLM(model=str(demo)) as plain, LLM(model=str(path), activation_dtype="bf16") as blocks:
        # 8.5 bits a weight; 4.5 or, with a scale and an offset of each group, 5 or more, and the tied head.
        assert (
            blocks.loaded.weights_bytes
            < {"Q8_0": 0.55, "Q4_0": 0.32, "Q4_1": 0.45}[kind] * plain.loaded.weights_bytes
        )
        for ours, theirs in zip(
            blocks.generate(PROMPTS, params), plain.generate(PROMPTS, params), strict=True
        ):
            sums = ours.outputs[0].cumulative_logprob, theirs.outputs[0].cumulative_logprob
            assert sums[0] is not None and sums[1] is not None and abs(sums[0] - sums[1]) < 1.0


@pytest.mark.parametrize("kind", ["BF16", "Q8_0", "Q4_0"])
def test_a_pack_of_a_file_says_what_the_file_says(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit, without the file; and what is wrong with the pack is one line at once."""
    path, out = from_demo(tmp_path / "demo.gguf", kind), tmp_path / "out"
    params = SamplingParams(max_tokens=16, temperature=0.0, repetition_penalty=1.0, logprobs=2)

    def said(model: Path) -> list[Any]:
        with LLM(model) as llm:
            chat = llm.chat([{"role": "user", "content": "Sort a list."}], params)
            return [
                (made.prompt_token_ids, made.outputs[0].token_ids, made.outputs[0].logprobs)
                for made in [*llm.generate(PROMPTS, params), *chat]
            ]

    truth = said(path)
    assert main(["pack", str(path), str(out)]) == 0
    path.rename(tmp_path / "gone.gguf")
    assert said(out) == truth
    with pytest.raises(ConfigError, match="is packed already"):
        pack_checkpoint(EngineConfig(str(out)), tmp_path / "again")
    pack = out / "model.pack"
    whole = pack.read_bytes()
    for data in (whole, whole[:-1], whole[:200] + b"!" + whole[201:], b""):
        pack.write_bytes(data)
        if data == whole:
            monkeypatch.setattr(ops, "PACKED_LAYOUTS", "panels48-7")  # what another tier might read
        start = time.perf_counter()
        with pytest.raises(CheckpointError, match=r"model\.pack") as caught:
            LLM(out)
        assert time.perf_counter() - start < 1 and "\n" not in str(caught.value)
        monkeypatch.undo()


def test_a_file_that_changed_is_packed_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A cache's pack of a GGUF file is stale once another file has its name."""
    path, cache = from_demo(tmp_path / "demo.gguf", "Q8_0"), tmp_path / "cache"
    params = SamplingParams(max_tokens=4, temperature=0.0, repetition_penalty=1.0, logprobs=2)

    def said(**options: Any) -> Any:
        with LLM(path, **options) as llm:
            return llm.generate(PROMPTS[:1], params)[0].outputs[0].logprobs

    first = said(pack_cache=str(cache))
    assert first == said() == said(pack_cache=str(cache))
    from_demo(tmp_path / "other.gguf", "Q4_0").replace(path)
    second = said(pack_cache=str(cache))
    assert second == said() != first


def test_a_file_of_blocks_is_not_rounded_again(tmp_path: Path) -> None:
    path = str(from_demo(tmp_path / "demo.gguf", "Q8_0"))
    with pytest.raises(ConfigError, match="quantised already"):
        LLM(model=path, quantization="int4")
    with pytest.raises(ConfigError, match="LM head is quantised already; leave the option out"):
        LLM(model=path, quantization="int8-head")
