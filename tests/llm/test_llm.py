"""The façade over a tiny real model: prompts, chats, parameters, what is refused."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tqdm
from llm.kit import GREEDY, answers

from pace.errors import PaceError, RequestError
from pace.llm import LLM
from pace.params import RequestOutputKind, SamplingParams
from pace.text.tokenizer import Tokenizer


def test_every_form_of_a_prompt_is_the_same_prompt(llm: LLM) -> None:
    ids = llm.get_tokenizer().encode("hello")
    forms: list[Any] = [
        "hello",
        ["hello"],
        {"prompt": "hello"},
        {"prompt_token_ids": ids},
        [{"prompt_token_ids": tuple(ids), "prompt": "hello"}],
    ]
    outputs = [llm.generate(form, GREEDY) for form in forms]
    assert all(answers(output) == answers(outputs[0]) for output in outputs)
    assert outputs[0][0].prompt == "hello" and outputs[3][0].prompt is None
    assert list(outputs[0][0].prompt_token_ids) == ids
    assert len(outputs[0][0].outputs[0].token_ids) == 12


def test_a_batch_equals_its_prompts_alone(llm: LLM, model: Path) -> None:
    prompts = ["a" * n for n in (1, 7, 40, 64, 3, 90)]
    params = [SamplingParams(max_tokens=5 + n, seed=n, temperature=n % 2, logprobs=3) for n in range(6)]
    together = llm.generate(prompts, params)
    alone = [llm.generate(prompt, one)[0] for prompt, one in zip(prompts, params, strict=True)]
    assert [o.outputs for o in together] == [o.outputs for o in alone]
    with LLM(model, threads=1) as other:
        assert [o.outputs for o in other.generate(prompts, params)] == [o.outputs for o in alone]


def test_stream_grows_into_the_generated_text(llm: LLM) -> None:
    (whole,) = llm.generate("stream me", GREEDY)
    outputs = list(llm.stream("stream me", GREEDY))
    assert [len(o.outputs[0].token_ids) for o in outputs] == list(range(1, 13))
    assert outputs[-1].outputs == whole.outputs
    assert all(whole.outputs[0].text.startswith(o.outputs[0].text) for o in outputs)


def test_chat(llm: LLM) -> None:
    messages = [{"role": "user", "content": "hi"}]
    (output,) = llm.chat(messages, GREEDY)
    assert output.prompt == "<|user|>hi<|end|><|assistant|>"
    assert len(output.prompt_token_ids) == 5
    many = llm.chat([messages, messages], GREEDY)
    assert answers(many) == [answers([output])[0]] * 2
    (custom,) = llm.chat(
        messages, GREEDY, chat_template="{{ messages[0].content }}!", add_generation_prompt=False
    )
    assert custom.prompt == "hi!"
    *_, last = llm.stream_chat(messages, GREEDY)
    assert last.outputs == output.outputs


def test_a_template_of_ones_own_takes_the_place_of_the_checkpoints(model: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.jinja"
    own.write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}", encoding="utf-8")
    messages = [{"role": "user", "content": "hi"}]
    with LLM(model, threads=1, chat_template=own) as other:
        assert other.chat(messages, GREEDY)[0].prompt == "[hi]"
    own.write_bytes(b"\xff")
    for path, message in ((own, "not UTF-8"), (tmp_path / "none.jinja", "none.jinja")):
        with pytest.raises(PaceError, match=message):
            LLM(model, threads=1, chat_template=path)


def test_chat_options_reach_the_template(llm: LLM) -> None:
    """Qwen3's `enable_thinking` was out of reach."""
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}{{ tools | tojson }}"
        "{{ 'T' if enable_thinking is not defined or enable_thinking else 'N' }}{% if add_generation_prompt %}>{% endif %}"
    )
    messages = [{"role": "ipython", "content": "a"}, {"role": "assistant", "content": "b"}]
    tools = [{"type": "function", "function": {"name": "f"}}]
    options: Any = {
        "chat_template": template,
        "chat_template_kwargs": {"enable_thinking": False},
        "tools": tools,
    }
    expected = '<ipython>a</><assistant>b</>[{"type": "function", "function": {"name": "f"}}]N>'
    assert llm.chat(messages, GREEDY, **options)[0].prompt == expected
    assert [*llm.stream_chat(messages, GREEDY, **options)][-1].prompt == expected
    options = {"chat_template": template, "continue_final_message": True}
    assert llm.chat(messages, GREEDY, **options)[0].prompt == "<ipython>a</><assistant>b"
    assert [*llm.stream_chat(messages, GREEDY, **options)][-1].prompt == "<ipython>a</><assistant>b"
    for name, value in (
        ("tools", "f"),
        ("chat_template_kwargs", [1]),
        ("chat_template_kwargs", {"messages": []}),
    ):
        wrong: dict[str, Any] = {name: value}
        with pytest.raises(RequestError, match=r"tools|chat_template_kwargs|can't be a variable"):
            llm.chat(messages, GREEDY, **wrong)


def test_reasoning_is_no_part_of_the_answer(llm: LLM) -> None:
    """The template opens the thought, and the model never closes it: all it writes is reasoning."""
    template = "{{ messages[0].content.split('</think>')[-1] }}{{ '<think>\\n' }}"
    messages = [{"role": "user", "content": "x"}]
    (raw,) = llm.chat(messages, GREEDY, chat_template=template, include_reasoning=True)
    text = raw.outputs[0].text
    assert text.strip("\n") and raw.outputs[0].reasoning is None
    (divided,) = llm.chat(messages, GREEDY, chat_template=template)
    answer = divided.outputs[0]
    assert (answer.text, answer.reasoning) == ("", text.strip("\n"))
    assert answer.token_ids == raw.outputs[0].token_ids and divided.prompt == raw.prompt == "x<think>\n"
    deltas = GREEDY.clone(output_kind=RequestOutputKind.DELTA)
    parts = [output.outputs[0] for output in llm.stream_chat(messages, deltas, chat_template=template)]
    assert "".join(part.reasoning or "" for part in parts) == answer.reasoning
    assert not any(part.text for part in parts)
    assert (
        llm.generate("x<think>\n", GREEDY)[0].outputs[0].text == text
    )  # a prompt has no template that says more


def test_padding_of_the_vocabulary_is_never_sampled(llm: LLM) -> None:
    unused = llm.get_tokenizer().unused_ids.tolist()
    assert unused
    for temperature in (0.0, 1.0):
        params = SamplingParams(temperature=temperature, max_tokens=8, logit_bias=dict.fromkeys(unused, 100))
        (output,) = llm.generate("x", params)
        assert not set(unused) & set(output.outputs[0].token_ids)


@pytest.mark.parametrize(
    ("prompts", "params", "message"),
    [
        (7, None, "prompts is 7"),
        ([7.5], None, "prompt 0 is 7.5"),
        (["a", {"text": "b"}], None, "prompt 1 has the key 'text'"),
        (["a", {}], None, "prompt 1 has neither"),
        ({"prompt": 3}, None, "prompt 0: prompt is 3"),
        (["a", ""], None, "prompt 1: the prompt is empty"),
        ({"prompt_token_ids": []}, None, "prompt 0: the prompt is empty"),
        (
            [{"prompt_token_ids": [1]}, {"prompt_token_ids": [10**6]}],
            None,
            "prompt 1: the prompt has token id 1000000",
        ),
        ({"prompt_token_ids": [1] * 512}, None, "512 tokens, expected at most 511"),
        (["a", "b" * 600], None, "prompt 1: the prompt has 600 tokens"),
        (["a", "b" * 100_000], None, "prompt 1: "),
        (["a", "\ud800"], None, "prompt 1: .*surrogate"),
        (["a", "b"], [GREEDY], "1 entries for 2 prompts"),
        (["a", "b"], [GREEDY, 5], "sampling_params 1 is 5"),
        (
            {"prompt_token_ids": [1, "2"]},
            None,
            "prompt 0: the prompt has '2' at index 1, expected a token id",
        ),
        ({"prompt_token_ids": [1, 2.5]}, None, "the prompt has 2.5 at index 1"),
        ({"prompt_token_ids": [1, [2]]}, None, r"the prompt has \[2\] at index 1"),
        ({"prompt_token_ids": [1, 1 << 70]}, None, "token id 1180591620717411303424 at index 1"),
        ("a", {"temperature": 0}, "expected SamplingParams"),
        (["a", "b"], [GREEDY, SamplingParams(stop_token_ids=[9999])], "prompt 1: stop_token_ids"),
    ],
)
def test_bad_requests_are_refused_before_anything_runs(
    llm: LLM, prompts: Any, params: Any, message: str
) -> None:
    before = llm.stats()["n_steps"]
    with pytest.raises(RequestError, match=message):
        llm.generate(prompts, params)
    assert llm.stats()["n_steps"] == before and not llm.engine.has_unfinished


def test_bad_conversations(llm: LLM) -> None:
    for messages in ("hi", [1], [[1]], {"role": "user"}):
        with pytest.raises((RequestError,)):
            llm.chat(messages, GREEDY)  # type: ignore[arg-type]  # wrong on purpose


def test_no_prompts(llm: LLM) -> None:
    assert llm.generate([]) == []


@pytest.mark.parametrize("kind", RequestOutputKind)
def test_a_stream_comes_in_the_kind_that_was_asked_for(llm: LLM, kind: RequestOutputKind) -> None:
    (whole,) = llm.generate("kinds", replace(GREEDY, logprobs=1, output_kind=kind))
    outputs = [o.outputs[0] for o in llm.stream("kinds", replace(GREEDY, logprobs=1, output_kind=kind))]
    want = whole.outputs[0]
    assert len(want.token_ids) == 12
    if kind is RequestOutputKind.DELTA:
        assert [len(o.token_ids) for o in outputs] == [1] * 12
        assert "".join(o.text for o in outputs) == want.text
        assert [i for o in outputs for i in o.token_ids] == want.token_ids
        assert [entry for o in outputs for entry in o.logprobs or ()] == want.logprobs
    else:
        assert len(outputs) == (12 if kind is RequestOutputKind.CUMULATIVE else 1)
        assert outputs[-1] == want


def test_many_texts_are_encoded_in_parts(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """20 000 prompts were lists of Python integers all at once: 1.3 GiB where the ids need 34 MB."""
    sizes = []
    encode = Tokenizer.encode_batch

    def counted(self: Tokenizer, texts: Any) -> Any:
        sizes.append(len(texts))
        return encode(self, texts)

    monkeypatch.setattr(Tokenizer, "encode_batch", counted)
    encoded = llm._inputs.encode(["a"] * 600)
    assert sizes == [256, 256, 88]
    assert all(
        prompt.ids.dtype == np.int32 and prompt.ids.tolist() == encoded[0].ids.tolist() for prompt in encoded
    )
    with pytest.raises(RequestError, match="prompt 500: "):
        llm.generate(["a"] * 500 + ["\ud800"] + ["a"] * 99)


def test_priorities(model: Path) -> None:
    with LLM(model, threads=1, max_num_seqs=1, max_num_waiting=2) as llm:
        outputs = llm.generate(["a", "b", "c", "d"], GREEDY, priority=[3, 2, 1, 0])
        ends = [o.metrics.finished_s or 0.0 for o in outputs]
        assert ends == sorted(ends, reverse=True)
        for priority, message in (([1], "1 entries for 2"), ("high", "priority is 'high'"), (True, "True")):
            with pytest.raises(RequestError, match=message):
                llm.generate(["a", "b"], GREEDY, priority=priority)  # type: ignore[arg-type]  # wrong on purpose


def test_a_timeout_keeps_what_there_is(llm: LLM) -> None:
    long = SamplingParams(max_tokens=400, ignore_eos=True)
    outputs = llm.generate(["a"] * 40, long, timeout_s=0.05)
    reasons = {(o.outputs[0].finish_reason, o.outputs[0].stop_reason) for o in outputs}
    assert ("abort", "deadline") in reasons and reasons <= {("abort", "deadline"), ("length", None)}
    for wrong in (0, -1, float("nan"), float("inf"), "1"):
        with pytest.raises(RequestError, match="timeout_s"):
            llm.generate("a", timeout_s=wrong)  # type: ignore[arg-type]  # wrong on purpose


def test_a_cache_salt_does_not_change_the_answer(llm: LLM) -> None:
    (plain,) = llm.generate("salted", GREEDY)
    (salted,) = llm.generate({"prompt": "salted", "cache_salt": "user 1"}, GREEDY)
    assert salted.outputs == plain.outputs
    for salt in ("", 3):
        with pytest.raises(RequestError, match="prompt 0: cache_salt"):
            llm.generate({"prompt": "salted", "cache_salt": salt})


def test_a_progress_bar_counts_tokens(
    llm: LLM, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Usually it draws ten times a second, and this is over sooner.
    monkeypatch.setattr(tqdm, "tqdm", partial(tqdm.tqdm, mininterval=0))
    llm.generate(["a", "b"], GREEDY, use_tqdm=True)
    bar = capsys.readouterr().err
    assert "2/2" in bar and "tok/s" in bar
    llm.generate(["a", "b"], GREEDY)
    assert capsys.readouterr().err == ""
