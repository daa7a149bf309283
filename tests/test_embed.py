"""Embeddings: the model's own hidden states, the same bits in every company."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_checkpoint import write_checkpoint

from pace.async_llm import AsyncLLM
from pace.errors import CheckpointError, PaceError, RequestError
from pace.llm import LLM
from pace.params import SamplingParams
from pace.pooling_params import PoolingParams

TEXTS = ["a" * n for n in (1, 7, 40, 64, 3, 200)] + ["the quick brown fox", "b"]
LAST, MEAN = (PoolingParams(pooling=name, normalize=False) for name in ("last", "mean"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def llm(model: Path) -> Iterator[LLM]:
    with LLM(model, threads=2, max_num_seqs=4, max_num_batched_tokens=64) as llm:
        yield llm


def vectors(llm: LLM, prompts: Any, params: PoolingParams | None = None) -> list[bytes]:
    return [output.outputs.embedding.tobytes() for output in llm.embed(prompts, pooling_params=params)]


def test_the_last_state_predicts_what_the_model_predicts(llm: LLM, model: Path) -> None:
    """The LM head is tied: state times embedding matrix are the logits, which `logprobs` tells of."""
    (output,) = llm.embed(TEXTS[3], pooling_params=LAST)
    head = load_file(model / "model.safetensors")["model.embed_tokens.weight"].astype(np.float64)
    head = (head.astype(np.float32).view(np.uint32) + 0x8000 & 0xFFFF0000).view(np.float32)
    logits = head @ output.outputs.embedding.astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum())
    (want,) = llm.generate(TEXTS[3], SamplingParams(max_tokens=1, temperature=0, logprobs=20))
    assert want.outputs[0].logprobs is not None
    for token_id, entry in want.outputs[0].logprobs[0].items():
        assert abs(logprobs[token_id] - entry.logprob) < 2e-3


@pytest.mark.parametrize("text", [TEXTS[2], TEXTS[6], "x"])
def test_the_mean_is_that_of_every_tokens_state(llm: LLM, text: str) -> None:
    ids = llm.get_tokenizer().encode(text)
    states = llm.embed([ids[: i + 1] for i in range(len(ids))], pooling_params=LAST)
    total = np.zeros(64)
    for state in states:
        total += state.outputs.embedding
    assert vectors(llm, [ids], MEAN) == [(total / len(ids)).astype(np.float32).tobytes()]


@pytest.mark.parametrize("params", [LAST, MEAN, None])
def test_an_embedding_does_not_depend_on_its_company(
    llm: LLM, model: Path, params: PoolingParams | None
) -> None:
    """Law 1: alone, in a batch, cut into chunks, from the cache, beside streams and scored prompts, on other threads."""
    alone = [vectors(llm, [text], params)[0] for text in TEXTS]
    assert vectors(llm, TEXTS, params) == alone
    assert vectors(llm, TEXTS[::-1], params) == alone[::-1]
    with LLM(model, threads=1, max_num_seqs=8, max_num_batched_tokens=512, kv_cache_type="paged") as other:
        others = [
            SamplingParams(max_tokens=30, seed=1),
            SamplingParams(max_tokens=20, seed=2, prompt_logprobs=2),
        ] * 4
        want = other.generate(TEXTS, others)
        generating = threading.Thread(target=lambda: got.extend(other.generate(TEXTS, others)))
        got: list[Any] = []
        generating.start()
        for _ in range(3):
            assert vectors(other, TEXTS, params) == alone
        generating.join()
        assert [one.outputs for one in got] == [one.outputs for one in want]


@pytest.mark.parametrize("params", [LAST, MEAN])
def test_a_preempted_prompt_counts_no_row_twice(llm: LLM, params: PoolingParams) -> None:
    engine = llm.engine
    ids = llm.get_tokenizer().encode(TEXTS[5])
    want = vectors(llm, [ids], params)
    request = engine.prepare_embedding("preempted", ids, params, cache_salt="own")
    engine.submit(request)
    engine.step()
    assert 0 < engine.scheduler.running[0].n_computed < len(ids)
    engine.scheduler.restart(engine.scheduler.running[0])
    outputs: list[Any] = []
    while not outputs:
        outputs = engine.step()
    assert [outputs[0].embedding.tobytes()] == want
    assert llm.stats()["kv_usage"] == 0


def test_normalised_and_cut(llm: LLM) -> None:
    (plain,) = llm.embed("hello", pooling_params=LAST)
    (unit,) = llm.embed("hello")
    (cut,) = llm.embed("hello", pooling_params=PoolingParams(dimensions=5))
    vector = plain.outputs.embedding
    np.testing.assert_allclose(unit.outputs.embedding, vector / np.linalg.norm(vector), rtol=1e-6)
    np.testing.assert_allclose(cut.outputs.embedding, vector[:5] / np.linalg.norm(vector[:5]), rtol=1e-6)


def test_a_prompt_may_fill_the_context(llm: LLM) -> None:
    assert len(vectors(llm, [[5] * 512], MEAN)[0]) == 64 * 4
    with pytest.raises(RequestError, match=r"prompt 1: .*513 tokens, expected at most 512"):
        llm.embed([[5], [5] * 513])


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"pooling": "cls"}, "pooling is 'cls', expected last or mean"),
        ({"dimensions": 0}, "dimensions is 0, expected a positive number"),
        ({"normalize": 1}, "normalize is 1, expected True or False"),
        ({"dimensions": 65}, "dimensions is 65, expected at most 64"),
    ],
)
def test_bad_parameters_are_named(llm: LLM, params: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        llm.embed("a", pooling_params=PoolingParams(**params))


def test_the_checkpoint_says_how(model: Path, tmp_path: Path) -> None:
    copy = write_checkpoint(tmp_path)
    (copy / "1_Pooling").mkdir()
    config = copy / "1_Pooling" / "config.json"
    config.write_text(json.dumps({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}))
    with LLM(copy, threads=1) as llm:
        assert vectors(llm, TEXTS[2]) == vectors(llm, TEXTS[2], PoolingParams(pooling="mean"))
        config.write_text(json.dumps({"pooling_mode_cls_token": True}))
        with pytest.raises(CheckpointError, match="asks for pooling_mode_cls_token, expected one of"):
            llm.embed("a")
        llm.embed("a", pooling_params=LAST)


def test_an_embedding_that_did_not_come_is_an_error(llm: LLM) -> None:
    with pytest.raises(PaceError, match="prompt 0: no embedding: deadline"):
        llm.embed([TEXTS[5]] * 4, timeout_s=1e-9)
    assert llm.stats()["n_running"] == 0


def test_async(model: Path, llm: LLM) -> None:
    async def main() -> None:
        async with AsyncLLM(model, threads=1) as engine:
            outputs = await asyncio.gather(*(engine.embed(text, MEAN) for text in TEXTS))
            assert [one.outputs.embedding.tobytes() for one in outputs] == vectors(llm, TEXTS, MEAN)
            with pytest.raises(RequestError, match="dimensions is 65"):
                await engine.embed("a", PoolingParams(dimensions=65))

    asyncio.run(main())
