"""The façade over a tiny real model: prompts, parameters, threads, errors."""

from __future__ import annotations

import itertools
import json
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tqdm
from tiny_checkpoint import write_checkpoint

from pace.errors import (
    CapacityError,
    CheckpointError,
    ConfigError,
    EngineDeadError,
    ForkError,
    PaceError,
    RequestError,
    WeightsError,
)
from pace.llm import LLM
from pace.outputs import RequestOutput
from pace.params import RequestOutputKind, SamplingParams
from pace.text.tokenizer import Tokenizer

GREEDY = SamplingParams(temperature=0.0, max_tokens=12)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def llm(model: Path) -> Iterator[LLM]:
    with LLM(model, threads=2, max_num_seqs=4, max_num_batched_tokens=32) as llm:
        yield llm


def answers(outputs: list[Any]) -> list[Any]:
    return [(o.outputs[0].token_ids, o.outputs[0].text, o.outputs[0].finish_reason) for o in outputs]


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


def test_a_dropped_stream_frees_its_blocks(llm: LLM) -> None:
    stream = llm.stream("x", SamplingParams(max_tokens=400, ignore_eos=True))
    next(stream)
    assert llm.stats()["n_running"] == 1
    stream.close()
    llm.generate("y", GREEDY)
    stats = llm.stats()
    assert stats["n_running"] == 0 and stats["n_free_blocks"] == stats["n_blocks"]
    assert stats["kv_usage"] == 0


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
    for wrong in ({"tools": "f"}, {"chat_template_kwargs": [1]}, {"chat_template_kwargs": {"messages": []}}):
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


def test_callers_in_threads_share_steps_and_keep_their_answers(llm: LLM) -> None:
    expected = [llm.generate(f"thread {i}", GREEDY)[0].outputs for i in range(6)]
    found: list[Any] = [None] * 6

    def work(i: int) -> None:
        for _ in range(5):
            if i % 2:
                found[i] = llm.generate(f"thread {i}", GREEDY)[0].outputs
            else:
                *_, last = llm.stream(f"thread {i}", GREEDY)
                found[i] = last.outputs

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == expected


def test_a_suspended_stream_does_not_block_others(llm: LLM) -> None:
    stream = llm.stream("slow reader", GREEDY)
    first = next(stream)
    (whole,) = llm.generate("slow reader", GREEDY)
    assert llm.generate("another", GREEDY)
    *_, last = stream
    assert first.outputs[0].token_ids == whole.outputs[0].token_ids[:1]
    assert last.outputs == whole.outputs


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


def test_generation_config_fills_what_the_caller_leaves_open(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path)
    (tmp_path / "generation_config.json").write_text(
        json.dumps({"temperature": 0.0, "max_new_tokens": 5, "eos_token_id": [3, 4]})
    )
    with LLM(model, threads=1) as llm:
        assert llm.engine.eos_token_ids >= {3, 4}
        (default,) = llm.generate("a")
        (again,) = llm.generate("a", SamplingParams())
        (longer,) = llm.generate("a", SamplingParams(max_tokens=7, ignore_eos=True))
        (sampled,) = llm.generate("a", SamplingParams(temperature=5.0, seed=1, ignore_eos=True))
    assert default.outputs == again.outputs
    assert len(longer.outputs[0].token_ids) == 7
    assert (
        list(longer.outputs[0].token_ids[:5])[: len(default.outputs[0].token_ids)]
        == default.outputs[0].token_ids
    )
    assert sampled.outputs[0].token_ids != longer.outputs[0].token_ids[:5]


def test_without_a_tokenizer(model: Path, tmp_path: Path) -> None:
    bare = write_checkpoint(tmp_path)
    (bare / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        LLM(bare)
    with LLM(bare, skip_tokenizer_init=True, threads=1) as llm:
        (output,) = llm.generate({"prompt_token_ids": [1, 2]}, GREEDY)
        assert len(output.outputs[0].token_ids) == 12 and output.outputs[0].text == ""
        with pytest.raises(RequestError, match="without a tokenizer"):
            llm.generate("text")
    with LLM(bare, tokenizer=model, threads=1) as llm:
        assert llm.generate("text", GREEDY)[0].outputs[0].token_ids


def test_closed(model: Path) -> None:
    llm = LLM(model, threads=1)
    stream = llm.stream("a", GREEDY)
    llm.close()
    llm.close()
    for call in (lambda: llm.generate("a"), lambda: next(stream)):
        with pytest.raises(PaceError, match="closed"):
            call()


def test_forked_child_gets_an_error(llm: LLM) -> None:
    stream = llm.stream("a", GREEDY)
    next(stream)
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            llm.generate("a", GREEDY)
        except ForkError:
            os.write(write, b"ForkError")
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        assert pipe.read() == b"ForkError"
    os.waitpid(pid, 0)
    assert len(list(stream)) == 11


def test_an_interrupt_ends_its_own_requests_only(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    (whole,) = llm.generate("other", GREEDY)
    other = llm.stream("other", GREEDY)
    next(other)
    step = llm.engine.step
    n_steps = itertools.count()

    def interrupting() -> list[RequestOutput]:
        if next(n_steps) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return step()

    monkeypatch.setattr(llm.engine, "step", interrupting)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["a", "b"] * 1000, SamplingParams(max_tokens=400, ignore_eos=True))
    monkeypatch.undo()
    assert llm.stats()["n_running"] <= 1
    *_, last = other
    assert last.outputs == whole.outputs
    assert not llm.engine.has_unfinished and llm.stats()["n_running"] == 0


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


def test_more_prompts_than_the_queue_holds(model: Path) -> None:
    prompts = [f"prompt {i}" for i in range(60)]
    with LLM(model, threads=1, max_num_seqs=4, max_num_waiting=3) as llm:
        outputs = llm.generate(prompts, GREEDY)
        assert [o.prompt for o in outputs] == prompts
        assert answers(outputs[59:]) == answers(llm.generate("prompt 59", GREEDY))
        found: list[Any] = [None] * 4

        def work(i: int) -> None:
            found[i] = answers(llm.generate(prompts[:20], GREEDY))

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert found == [answers(outputs[:20])] * 4


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


def test_a_fault_of_the_engine_ends_everybody(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with LLM(model, threads=1) as llm:
        other = llm.stream("other", GREEDY)
        next(other)
        monkeypatch.setattr(llm.engine, "step", lambda: 1 // 0)
        for _ in range(2):
            with pytest.raises(EngineDeadError, match=r"ZeroDivisionError: .*build a new one"):
                llm.generate("a", GREEDY)
        with pytest.raises(EngineDeadError):
            list(other)


def test_two_engines_in_one_process(llm: LLM, model: Path) -> None:
    with LLM(model, threads=1) as other:
        first, second = llm.stream("a", GREEDY), other.stream("a", GREEDY)
        pairs = list(zip(first, second, strict=True))
    assert all(a.outputs == b.outputs for a, b in pairs)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_model_len": 513}, ConfigError, "supports 512"),
        ({"max_model_len": 0}, ConfigError, "max_model_len is 0"),
        ({"threads": 0}, ConfigError, "n_threads is 0"),
        ({"cpus": "3-1"}, ConfigError, "empty"),
        ({"cpus": []}, ConfigError, "cpus"),
        ({"kernels": {"gemm": "sse2"}}, ConfigError, "sse2"),
        ({"kernels": {"gem": "avx2"}}, ConfigError, "'gem'"),
        ({"max_num_seqs": 0}, ConfigError, "max_num_seqs"),
        ({"max_num_seqs": 4, "max_num_batched_tokens": 3}, ConfigError, "below max_num_seqs"),
        ({"kv_cache_type": "ring"}, ConfigError, "expected one of slab, paged, contiguous"),
        ({"kv_cache_dtype": "fp8"}, ConfigError, "kv_cache_dtype"),
        ({"kv_cache_memory": "much"}, ConfigError, "kv_cache_memory"),
        ({"admission": "first"}, ConfigError, "admission"),
        ({"max_num_waiting": 0}, ConfigError, "max_num_waiting"),
        ({"revision": "main"}, CheckpointError, "revision"),
        ({"seed": -1}, ConfigError, "seed"),
    ],
)
def test_bad_options(model: Path, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LLM(model, **options)


@pytest.mark.parametrize(
    ("options", "block_size"),
    [
        ({"kv_cache_type": "paged"}, 16),
        ({"kv_cache_type": "slab", "block_size": 64, "admission": "reserve"}, 64),
        ({"kv_cache_type": "contiguous", "block_size": 32, "kv_cache_memory": "4MiB"}, 32),
        ({"kv_cache_memory": 1 << 22, "block_size": 32, "enable_prefix_caching": False}, 32),
    ],
)
def test_the_kv_cache_is_chosen(llm: LLM, model: Path, options: dict[str, Any], block_size: int) -> None:
    prompts = ["a" * n for n in (1, 90, 33, 90)]
    with LLM(model, threads=1, max_num_seqs=3, **options) as other:
        assert answers(other.generate(prompts, GREEDY)) == answers(llm.generate(prompts, GREEDY))
        assert other.stats()["block_size"] == block_size


def test_an_int8_cache(model: Path) -> None:
    with LLM(model, threads=1, kv_cache_dtype="int8") as llm:
        assert len(llm.generate("a" * 50, GREEDY)[0].outputs[0].token_ids) == 12


def test_kernels_can_be_forced(llm: LLM, model: Path) -> None:
    with LLM(model, threads=1, kernels={"attention": "reference", "gemm": "reference"}) as other:
        assert len(other.generate("a", GREEDY)[0].outputs[0].token_ids) == 12


def test_missing_weights_leave_nothing_behind(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    n_threads = threading.active_count()
    with pytest.raises(WeightsError, match=r"layers\.2"):
        LLM(model)
    assert threading.active_count() == n_threads


def test_capacity_names_the_knob(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pace.engine.memory.available_bytes", lambda: 1 << 20)
    with pytest.raises(CapacityError, match="max_num_batched_tokens"):
        LLM(model)


def test_the_lengths_that_rope_was_not_chosen_for_are_told_at_load(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = write_checkpoint(tmp_path, rope_scaling={"rope_type": "dynamic", "factor": 2.0})
    found = []
    for max_model_len, told in ((512, False), (None, True), (600, True)):
        caplog.clear()
        with LLM(model, threads=1, max_model_len=max_model_len) as llm:
            assert ("with max_model_len 512 none does" in caplog.text) is told
            (out,) = llm.generate("the length counts", SamplingParams(max_tokens=1, logprobs=5))
        found.append(out.outputs[0].logprobs)
    assert found[0] != found[1] and found[0] != found[2]
