"""Where threads can't be started, what can be done without is done, and no prompt is blamed for the rest."""

from __future__ import annotations

import asyncio
import concurrent.futures.thread
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_checkpoint import write_checkpoint

from pace.async_llm import MAX_INLINE_CHARS, AsyncLLM
from pace.errors import CapacityError, RequestError
from pace.llm import LLM
from pace.params import SamplingParams
from pace.text.tokenizer import Tokenizer

GREEDY = SamplingParams(temperature=0.0, max_tokens=4)


class PanicException(BaseException):
    """Named and derived as a panic of the Rust library."""


class Threadless:
    """The Rust tokenizer in a process that may not start threads."""

    def __init__(self, rust: Any) -> None:
        self.rust, self.n_tries = rust, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rust, name)

    def encode_batch_fast(self, *_: Any, **__: Any) -> None:
        self.n_tries += 1
        raise PanicException(
            "The global thread pool has not been initialized.: ThreadPoolBuildError { kind: IOError }"
        )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny"), max_position_embeddings=4096)


@pytest.fixture
def no_start(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        yield


def test_the_tokenizer_encodes_without_them(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer(model, vocab_size=272, max_model_len=512)
    texts = ["hello", "", "größe <|user|>"]
    expected = tokenizer.encode_batch(texts)
    rust = Threadless(tokenizer._rust)
    monkeypatch.setattr(tokenizer, "_rust", rust)
    assert tokenizer.encode_batch(texts) == expected and tokenizer.encode(texts[0]) == expected[0]
    assert rust.n_tries == 1  # every try prints a panic
    with pytest.raises(RequestError, match="lone surrogate"):
        tokenizer.encode("\ud800")


def test_another_panic_is_still_the_texts(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer(model, vocab_size=272, max_model_len=512)

    def panic(*_: Any, **__: Any) -> None:
        raise PanicException("index out of bounds")

    rust = Threadless(tokenizer._rust)
    monkeypatch.setattr(rust, "encode_batch_fast", panic)
    monkeypatch.setattr(tokenizer, "_rust", rust)
    with pytest.raises(RequestError, match=r"failed on this text: internal error .*index out of bounds"):
        tokenizer.encode("a")


@pytest.mark.usefixtures("no_start")
@pytest.mark.parametrize("cls", [LLM, AsyncLLM])
def test_an_engine_says_which_limit_to_raise(model: Path, cls: type[LLM] | type[AsyncLLM]) -> None:
    with pytest.raises(
        CapacityError, match=r"thread of its own: can't start new thread; raise the limit on processes"
    ):
        cls(model, threads=1)


def test_async_prompts_are_encoded_in_the_loop_then(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = "a" * (MAX_INLINE_CHARS + 100)

    async def main() -> Any:
        async with AsyncLLM(model, threads=1) as llm:
            with monkeypatch.context() as patch:

                def submit(*_: Any, **__: Any) -> None:
                    raise RuntimeError("can't start new thread")

                patch.setattr(concurrent.futures.thread.ThreadPoolExecutor, "submit", submit)
                *_, last = [output async for output in llm.generate(prompt, GREEDY)]
                with pytest.raises(RequestError, match="the prompt has"):  # its own errors stay its own
                    await anext(llm.generate(prompt * 3, GREEDY))
                await llm.__aexit__()
        return last

    with LLM(model, threads=1) as llm:
        assert asyncio.run(main()).outputs == llm.generate(prompt, GREEDY)[0].outputs
