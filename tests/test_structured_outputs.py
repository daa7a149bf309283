"""Structured outputs through the engine: they fit, and nothing else about an output changes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest

from pace.async_llm import AsyncLLM
from pace.errors import RequestError
from pace.llm import LLM
from pace.outputs import RequestOutput
from pace.params import RequestOutputKind, SamplingParams

pytest.importorskip("llguidance")

SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "b": {"enum": ["x", "y"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}
PROMPTS = ["def f(x):\n", "import os\n", "class A"]


def params(**fields: Any) -> SamplingParams:
    given: dict[str, Any] = {
        "max_tokens": 24,
        "temperature": 1.0,
        "seed": 1,
        "structured_outputs": {"json": SCHEMA},
    }
    return SamplingParams(**{**given, **fields})


def ids(outputs: list[RequestOutput]) -> list[list[int]]:
    return [list(completion.token_ids) for output in outputs for completion in output.outputs]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("demo", max_model_len=128, max_num_seqs=4, threads=2) as llm:
        yield llm


def test_every_completion_fits_and_ends(llm: LLM) -> None:
    outputs = llm.generate(PROMPTS, params(n=3))
    for output in outputs:
        for completion in output.outputs:
            value = json.loads(completion.text)
            assert value.keys() == {"a", "b"} and 0 <= value["a"] <= 99 and value["b"] in ("x", "y")
            assert completion.finish_reason == "stop" and completion.stop_reason is None
    assert len({tuple(tokens) for tokens in ids(outputs)}) > 1


def test_alone_and_beside_others_and_after_preemption_they_are_the_same(llm: LLM) -> None:
    rules = [
        params(),
        None,
        params(structured_outputs={"regex": "[a-f]{3}x+"}, repetition_penalty=1.2, min_tokens=5),
    ]
    rules[1] = SamplingParams(max_tokens=24, temperature=1.0, seed=2)
    alone = [ids(llm.generate([prompt], rule))[0] for prompt, rule in zip(PROMPTS, rules, strict=True)]
    assert ids(llm.generate(PROMPTS, rules)) == alone
    with LLM(
        "demo", max_model_len=128, max_num_seqs=4, threads=1, kv_cache_type="paged", max_num_batched_tokens=32
    ) as other:  # fmt: skip
        assert ids(other.generate(PROMPTS * 3, rules * 3)) == alone * 3


def test_speculation_changes_nothing(llm: LLM) -> None:
    rules = [
        params(),
        params(structured_outputs={"grammar": 'start: "ab" ("ab" | "cd")* "."'}),
        params(temperature=0.0, structured_outputs={"choice": ["return x", "return xxxx"]}),
    ]
    with LLM(
        "demo",
        max_model_len=128,
        max_num_seqs=4,
        threads=2,
        speculative={"method": "suffix", "num_speculative_tokens": 4},
    ) as drafting:
        rules = [rule.clone(speculative=4) for rule in rules]
        outputs = drafting.generate(PROMPTS, rules)
        assert ids(outputs) == ids(llm.generate(PROMPTS, [rule.clone(speculative="auto") for rule in rules]))
        assert any(output.speculative is not None for output in outputs)


def test_eos_comes_only_where_the_grammar_is_whole(llm: LLM) -> None:
    eos = llm.loaded.defaults.eos_token_id
    assert eos is not None
    rule = params(structured_outputs={"regex": "[ab]{4,6}"}, logit_bias={eos: 100.0}, max_tokens=10)
    (output,) = llm.generate(PROMPTS[:1], rule)
    assert len(output.outputs[0].text) == 4 and output.outputs[0].finish_reason == "stop"


def test_rules_that_leave_nothing_end_their_request_alone(llm: LLM) -> None:
    stuck = params(structured_outputs={"choice": ["yes"]}, allowed_token_ids=[5])
    outputs = llm.generate(PROMPTS[:2], [stuck, params()])
    assert outputs[0].outputs[0].finish_reason == "error"
    assert "structured_outputs, allowed_token_ids" in str(outputs[0].outputs[0].stop_reason)
    assert json.loads(outputs[1].outputs[0].text)


def test_a_grammar_holds_for_the_answer_and_not_for_the_thought(llm: LLM) -> None:
    template = "{{ messages[0].content }}<think>{# </think> #}"
    messages = [{"role": "user", "content": "def f(x):\n    return x # </think>"}]
    rule = params(structured_outputs={"choice": ["yes", "no"]}, max_tokens=60, stop_token_ids=[])
    (output,) = llm.chat(messages, rule, chat_template=template)
    completion = output.outputs[0]
    assert completion.text in ("", "yes", "no") and (completion.reasoning or completion.text)


def test_errors_name_the_prompt_and_nothing_runs(llm: LLM) -> None:
    with pytest.raises(
        RequestError, match=r"prompt 1: the output's grammar can't be compiled: .*Invalid type: foo"
    ):
        llm.generate(PROMPTS[:2], [None, params(structured_outputs={"json": {"type": "foo"}})])


def test_async() -> None:
    async def run() -> str:
        llm = AsyncLLM("demo", max_model_len=128, threads=1)
        try:
            text = ""
            async for output in llm.generate(PROMPTS[0], params()):
                text = output.outputs[0].text
            return text
        finally:
            llm.close()

    assert json.loads(asyncio.run(run())).keys() == {"a", "b"}


def test_a_forced_call_is_a_call_whole_and_streamed(llm: LLM) -> None:
    template = "{% for m in messages %}{{ m.content }}{% endfor %}{# <tool_call> #}"
    tools = [{"type": "function", "function": {"name": "f", "parameters": SCHEMA}}]
    chat = [{"role": "user", "content": "def f(x):\n"}]
    options: dict[str, Any] = {"tools": tools, "chat_template": template}
    rule = params(structured_outputs=None, max_tokens=100)
    options["tool_choice"] = {"type": "function", "function": {"name": "f"}}
    (output,) = llm.chat(chat, rule, **options)
    whole = output.outputs[0]
    assert whole.tool_calls is not None and whole.text == "" and whole.finish_reason == "stop"
    (call,) = whole.tool_calls
    assert call.name == "f" and json.loads(call.arguments).keys() == {"a", "b"}
    parts = [
        part
        for streamed in llm.stream_chat(chat, rule.clone(output_kind=RequestOutputKind.DELTA), **options)
        for part in streamed.outputs[0].tool_calls or ()
    ]
    assert len(parts) > 2 and {(part.index, part.name) for part in parts} == {(0, "f")} and parts[0].id
    assert "".join(part.arguments for part in parts) == call.arguments
    with pytest.raises(RequestError, match="exclude each other"):
        llm.chat(chat, params(), **options)
    with pytest.raises(RequestError, match="can't force calls"):
        llm.chat(chat, rule, **{**options, "chat_template": "{{ messages[0].content }}"})
