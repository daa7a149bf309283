"""Callers of vLLM find what they know, or are told by name what to use instead."""

from __future__ import annotations

import asyncio
import copy
import inspect
import json
import pickle
from abc import ABC
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_checkpoint import write_checkpoint

from pace.async_llm import AsyncLLM
from pace.errors import CheckpointError, ConfigError, RequestError
from pace.llm import LLM
from pace.outputs import CompletionOutput, RequestMetrics, RequestOutput
from pace.params import SamplingParams
from pace.vllm_names import (
    ENGINE_OPTIONS,
    METHODS,
    OUTPUT_FIELDS,
    REQUEST_OPTIONS,
    SAMPLING_FIELDS,
    TOKENIZER_NAMES,
)

GREEDY = SamplingParams(temperature=0.0, max_tokens=4)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def llm(model: Path) -> Iterator[LLM]:
    with LLM(model, threads=1, max_num_seqs=4) as llm:
        yield llm


# ---- arguments


@pytest.mark.parametrize("name", SAMPLING_FIELDS)
def test_sampling_fields_are_answered_by_name(name: str) -> None:
    neutral = SAMPLING_FIELDS[name].neutral
    params: Any = SamplingParams
    for value in (5,) if neutral is None else neutral:
        assert params(**{name: value}) == SamplingParams()
    if neutral is not None:
        with pytest.raises(RequestError, match=f"^{name} is .*, which pace does not have: ."):
            params(**{name: {"json": 5}})


@pytest.mark.parametrize("name", ENGINE_OPTIONS)
def test_engine_options_are_answered_by_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise InterruptedError  # it got so far

    monkeypatch.setattr("pace.frontend.load", load)
    neutral = ENGINE_OPTIONS[name].neutral
    engines: list[Any] = [LLM, AsyncLLM]
    for engine in engines:
        for value in (5,) if neutral is None else neutral:
            with pytest.raises(InterruptedError):
                engine("model", **{name: value})
        if neutral is not None:
            with pytest.raises(ConfigError, match=f"^{name} is .*, which pace does not have: ."):
                engine("model", **{name: "other"})


def test_request_options_are_answered_by_name(llm: LLM) -> None:
    (plain,) = llm.generate("a", GREEDY)
    for name, (_, neutral) in REQUEST_OPTIONS.items():
        for value in neutral or ():
            options: dict[str, Any] = {name: value}
            assert llm.generate("a", GREEDY, **options)[0].outputs == plain.outputs
        calls: Any = (llm.generate, llm.stream, llm.chat, llm.stream_chat, AsyncLLM.generate, AsyncLLM.chat)
        for call in calls:
            with pytest.raises(RequestError, match=f"^{name} is "):
                call("a", **{name: "other"})


def test_values_that_mean_the_same_are_taken(model: Path) -> None:
    same: dict[str, Any] = {"dtype": TorchDtype(), "kv_cache_dtype": "auto", "tensor_parallel_size": 1}
    with LLM(model, threads=1, **same) as llm:
        assert llm.config.kv_cache_dtype == "bf16"
        (plain,) = llm.generate("a", GREEDY, priority=0)
        assert llm.generate("a", GREEDY, priority=None)[0].outputs == plain.outputs  # type: ignore[arg-type]  # as vLLM takes it
    for options in ({"dtype": "float16"}, {"trust_remote_code": True}, {"tensor_parallel_size": True}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            LLM(model, **options)


class TorchDtype:
    def __str__(self) -> str:
        return "torch.bfloat16"


def test_unknown_names_are_still_pythons_to_refuse(model: Path, llm: LLM) -> None:
    calls: list[Any] = [SamplingParams, partial(LLM, model), partial(llm.generate, "a")]
    for call in calls:
        with pytest.raises(TypeError, match="unexpected keyword argument 'temprature'"):
            call(temprature=1)
    assert "temperature" in inspect.signature(SamplingParams).parameters
    assert "max_num_seqs" in inspect.signature(LLM).parameters


# ---- attributes


def test_methods_are_answered_by_name(llm: LLM) -> None:
    for name, instead in METHODS.items():
        for owner in (llm, LLM, AsyncLLM):
            assert not hasattr(owner, name)
            with pytest.raises(AttributeError, match="has no attribute") as error:
                getattr(owner, name)
            assert instead in str(error.value)
    with pytest.raises(AttributeError, match=r"'LLM' object has no attribute 'nothing'$"):
        llm.nothing  # type: ignore[attr-defined]  # noqa: B018  # there is no such thing


def test_what_transformers_tokenizer_has_is_answered_by_name(llm: LLM) -> None:
    tokenizer = llm.get_tokenizer()
    for name, instead in TOKENIZER_NAMES.items():
        assert not hasattr(type(tokenizer), name), "pace has it"
        with pytest.raises(AttributeError) as error:
            getattr(tokenizer, name)
        assert instead in str(error.value)


def test_classes_of_pace_still_mix_with_others() -> None:
    class Mixed(LLM, ABC):
        pass

    assert issubclass(Mixed, LLM)


def test_output_fields_are_answered_by_name() -> None:
    output = RequestOutput("id", None, [1], [CompletionOutput(0, "", [])])
    for name, instead in OUTPUT_FIELDS.items():
        for owner in (output, output.outputs[0], RequestMetrics()):
            with pytest.raises(AttributeError) as error:
                getattr(owner, name)
            assert instead in str(error.value)
    assert copy.deepcopy(output) == pickle.loads(pickle.dumps(output)) == output


def test_the_page_names_all_of_them() -> None:
    page = Path(__file__).resolve().parents[1] / "docs" / "coming-from-vllm.md"
    if not (page.parents[1] / "pyproject.toml").is_file():
        pytest.skip("needs the source checkout")
    text = page.read_text(encoding="utf-8")
    for table in (SAMPLING_FIELDS, REQUEST_OPTIONS, ENGINE_OPTIONS, METHODS, OUTPUT_FIELDS, TOKENIZER_NAMES):
        assert [name for name in table if f"`{name}" not in text] == []
    for known in (SAMPLING_FIELDS, REQUEST_OPTIONS, ENGINE_OPTIONS):
        rows = [line for line in text.splitlines() if line.startswith("| `")]
        stale = {
            name
            for name, foreign in known.items()
            if not any(f"`{name}`" in row.split("|")[1] and foreign.instead in row for row in rows)
        }
        assert stale == set()


# ---- prompts


def test_a_list_of_ints_is_a_prompt(llm: LLM) -> None:
    ids = llm.get_tokenizer().encode("hello")
    (expected,) = llm.generate("hello", GREEDY)
    forms: list[Any] = [ids, tuple(ids), [ids], np.array(ids), np.array([ids]), [np.array(ids, np.int32)]]
    forms += [[np.int64(i) for i in ids], {"prompt_token_ids": np.array(ids)}]
    forms += [{"prompt_token_ids": ids, "multi_modal_data": None}]
    for form in forms:
        (output,) = llm.generate(form, GREEDY)
        assert output.outputs == expected.outputs and list(output.prompt_token_ids) == ids
    mixed: list[Any] = ["hello", ids, {"prompt": "hello"}, tuple(ids)]
    assert [o.outputs for o in llm.generate(mixed, GREEDY)] == [expected.outputs] * 4
    *_, last = llm.stream(ids, GREEDY)
    assert last.outputs == expected.outputs


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([1, "a"], "prompt 0: the prompt has 'a' at index 1"),
        ([[1], [2, 2.5]], "prompt 1: the prompt has 2.5 at index 1"),
        ([[1], []], "prompt 1: the prompt is empty"),
        ([True], "prompt 0: the prompt has True at index 0"),
        ([[[1]]], r"prompt 0: the prompt has \[1\] at index 0"),
        (["a", 5], "prompt 1 is 5, expected text, token ids"),
        (np.array(5), "prompts is 5"),
        ({"prompt": "a", "multi_modal_data": {"image": 1}}, "'multi_modal_data', which pace does not have"),
    ],
)
def test_what_is_no_prompt(llm: LLM, prompts: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        llm.generate(prompts, GREEDY)


def test_async_prompts_may_be_token_ids(model: Path, llm: LLM) -> None:
    async def main() -> RequestOutput:
        async with AsyncLLM(model, threads=1) as other:
            *_, last = [output async for output in other.generate([1, 2, 3], GREEDY)]
            return last

    assert asyncio.run(main()).outputs == llm.generate([1, 2, 3], GREEDY)[0].outputs


# ---- sampling


def test_where_sampling_defaults_come_from(model: Path, tmp_path: Path) -> None:
    stated = write_checkpoint(tmp_path / "model")
    for folder, values in (
        ("model", {"temperature": 0.25, "eos_token_id": [3]}),
        ("other", {"top_k": 7, "eos_token_id": 4}),
    ):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "generation_config.json").write_text(json.dumps(values))
    for source, changed in (
        ("auto", {"temperature": 0.25}),
        ("vllm", {}),
        (tmp_path / "other", {"top_k": 7}),
    ):
        with LLM(stated, threads=1, generation_config=source) as llm:
            assert llm.get_default_sampling_params() == SamplingParams(**changed)
            merged = SamplingParams(top_p=0.5).merged_with(llm.loaded.defaults.sampling)
            assert merged == SamplingParams(top_p=0.5, **changed)
            assert llm.engine.eos_token_ids >= ({3, 4} if source == tmp_path / "other" else {3})
    for wrong in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(
            CheckpointError, match=r"no generation_config\.json; name a folder|does not exist|not a folder"
        ):
            LLM(stated, threads=1, generation_config=wrong)


def test_more_logprobs_where_the_engine_allows_them(model: Path, llm: LLM) -> None:
    everything = SamplingParams(temperature=0, max_tokens=2, logprobs=-1, prompt_logprobs=-1)
    for params in (everything, SamplingParams(logprobs=21), SamplingParams(prompt_logprobs=21)):
        with pytest.raises(
            RequestError, match=r"logprobs is .*, expected at most 20; raise the engine's max_logprobs"
        ):
            llm.generate("ab", params)
    with LLM(model, threads=1, max_logprobs=-1) as other:
        n_vocab = other.loaded.spec.vocab_size
        (output,) = other.generate("ab", everything)
        (huge,) = other.generate("ab", everything.clone(logprobs=1 << 20, prompt_logprobs=1 << 20))
        assert output.outputs == huge.outputs and output.outputs[0].logprobs is not None
        for entries in [*output.outputs[0].logprobs, *(output.prompt_logprobs or [])[1:]]:
            assert entries is not None and len(entries) == n_vocab
            assert sum(np.exp(entry.logprob) for entry in entries.values()) == pytest.approx(1, abs=1e-4)
            assert sorted(entry.rank or 0 for entry in entries.values()) == list(range(1, n_vocab + 1))
        # The rest of the batch keeps its own number.
        few = other.generate(["ab", "cd"], [everything, SamplingParams(logprobs=3, max_tokens=2)])[1]
        assert all(3 <= len(entries) <= 4 for entries in few.outputs[0].logprobs or [{}])
    with LLM(model, threads=1, max_logprobs=30) as other:
        assert len((other.generate("a", SamplingParams(logprobs=30))[0].outputs[0].logprobs or [{}])[0]) in (
            30,
            31,
        )
    for wrong in (-2, True, 1.5):
        with pytest.raises(ConfigError, match="max_logprobs"):
            LLM(model, max_logprobs=wrong)  # type: ignore[arg-type]  # wrong on purpose


def test_spaces_between_special_tokens(llm: LLM) -> None:
    (plain,) = llm.generate("a", GREEDY)
    for value in (True, False):  # byte-level: the same
        params = GREEDY.clone(spaces_between_special_tokens=value, skip_special_tokens=False)
        assert (
            llm.generate("a", params)[0].outputs
            == llm.generate("a", GREEDY.clone(skip_special_tokens=False))[0].outputs
        )
        assert (
            llm.generate("a", GREEDY.clone(spaces_between_special_tokens=value))[0].outputs == plain.outputs
        )


def test_from_optional_leaves_none_unset() -> None:
    params = SamplingParams.from_optional(temperature=None, top_p=0.5, stop=None, structured_outputs=None)
    assert params == SamplingParams(top_p=0.5) and params.explicit == {"top_p"}
    assert SamplingParams.from_optional(max_tokens=None).max_tokens is None
    with pytest.raises(RequestError, match="top_p is 2"):
        SamplingParams.from_optional(top_p=2)
