"""AsyncLLM over a tiny real model: order, kinds of outputs, slow readers, every way to leave, every error."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from tiny_checkpoint import write_checkpoint

from pace.async_llm import MAX_INLINE_CHARS, AsyncLLM
from pace.driver import Ticket, merged
from pace.engine.request import Request
from pace.errors import (
    CapacityError,
    ChatTemplateError,
    EngineDeadError,
    PaceError,
    QueueFullError,
    RequestError,
)
from pace.llm import LLM
from pace.outputs import CompletionOutput, Logprob, RequestOutput, ToolCall
from pace.params import RequestOutputKind, SamplingParams

GREEDY = SamplingParams(temperature=0.0, max_tokens=12)
LONG = SamplingParams(temperature=0.0, max_tokens=400, ignore_eos=True)
DELTA, FINAL_ONLY = RequestOutputKind.DELTA, RequestOutputKind.FINAL_ONLY
TIMEOUT_S = 60.0  # of anything that may hang


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def llm(model: Path) -> Iterator[AsyncLLM]:
    llm = AsyncLLM(model, threads=2, max_num_seqs=4, max_num_batched_tokens=64)
    yield llm
    llm.close()


@pytest.fixture(scope="module")
def whole(model: Path) -> Iterator[Callable[..., CompletionOutput]]:
    """whole(prompt, params): what the same model says through LLM."""
    with LLM(model, threads=1) as llm:
        yield lambda prompt, params=GREEDY: llm.generate(prompt, params)[0].outputs[0]


def run(main: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(main, TIMEOUT_S))


async def collect(llm: AsyncLLM, prompt: Any, *args: Any, **kwargs: Any) -> list[RequestOutput]:
    return [output async for output in llm.generate(prompt, *args, **kwargs)]


async def idle(llm: AsyncLLM) -> None:
    """Return when the engine has nothing left."""
    while llm.engine.has_unfinished:
        await asyncio.sleep(0.001)


def test_many_at_once_are_what_they_are_alone(llm: AsyncLLM, whole: Any) -> None:
    params = [
        SamplingParams(max_tokens=5 + i, seed=i, temperature=i % 2, logprobs=2, ignore_eos=True)
        for i in range(12)
    ]

    async def main() -> list[list[RequestOutput]]:
        return await asyncio.gather(*(collect(llm, f"prompt {i}", params[i]) for i in range(12)))

    for i, outputs in enumerate(run(main())):
        want = whole(f"prompt {i}", params[i])
        assert outputs[-1].finished and not any(output.finished for output in outputs[:-1])
        assert outputs[-1].outputs[0] == want
        sizes = [len(output.outputs[0].token_ids) for output in outputs]
        assert sizes == sorted(set(sizes))
        assert all(want.text.startswith(output.outputs[0].text) for output in outputs)


def test_deltas_join_to_the_whole(llm: AsyncLLM, whole: Any) -> None:
    params = replace(LONG, output_kind=DELTA, logprobs=1)

    async def main() -> list[RequestOutput]:
        outputs = []
        async for output in llm.generate("deltas", params):
            outputs.append(output)
            if len(outputs) % 3 == 0:  # slower than the engine, however slow that is
                enough = llm.stats()["n_sampled"] + 5
                while llm.stats()["n_running"] and llm.stats()["n_sampled"] < enough:
                    await asyncio.sleep(0.001)
        return outputs

    outputs = [output.outputs[0] for output in run(main())]
    want = whole("deltas", params)
    assert len(outputs) < 400  # some came together
    assert [i for output in outputs for i in output.token_ids] == want.token_ids
    assert "".join(output.text for output in outputs) == want.text
    assert [entry for output in outputs for entry in output.logprobs or ()] == want.logprobs
    assert outputs[-1].finish_reason == "length"


def test_deltas_of_several_completions(llm: AsyncLLM, model: Path) -> None:
    params = SamplingParams(n=3, seed=1, max_tokens=60, logprobs=1, ignore_eos=True, output_kind=DELTA)

    async def main() -> list[RequestOutput]:
        outputs = []
        async for output in llm.generate("several", params):
            outputs.append(output)
            await asyncio.sleep(0.002)
        return outputs

    outputs = run(main())
    with LLM(model, threads=1) as other:
        (whole,) = other.generate("several", params)
    assert len({tuple(want.token_ids) for want in whole.outputs}) == 3
    for want in whole.outputs:
        parts = [c for output in outputs for c in output.outputs if c.index == want.index]
        assert [i for part in parts for i in part.token_ids] == want.token_ids
        assert "".join(part.text for part in parts) == want.text
        assert [entry for part in parts for entry in part.logprobs or ()] == want.logprobs


def test_final_only_comes_once(llm: AsyncLLM, whole: Any) -> None:
    (output,) = run(collect(llm, "final", replace(GREEDY, output_kind=FINAL_ONLY)))
    assert output.finished and output.outputs[0] == whole("final")


def test_a_reader_who_never_reads_costs_one_output(llm: AsyncLLM, whole: Any) -> None:
    async def main() -> tuple[Any, Any]:
        stream = llm.generate("slow", LONG)
        first = await anext(stream)
        await idle(llm)
        rest = [output async for output in stream]
        return first, rest

    first, rest = run(main())
    assert len(first.outputs[0].token_ids) < 400
    assert len(rest) == 1 and rest[0].outputs[0] == whole("slow", LONG)


def test_a_stalled_event_loop_is_not_flooded(llm: AsyncLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> tuple[int, int]:
        loop = asyncio.get_running_loop()
        calls = []
        call_soon_threadsafe = loop.call_soon_threadsafe

        def counting(*args: Any, **kwargs: Any) -> Any:
            calls.append(args)
            return call_soon_threadsafe(*args, **kwargs)

        monkeypatch.setattr(loop, "call_soon_threadsafe", counting)
        tasks = [asyncio.create_task(collect(llm, "x", LONG)) for _ in range(4)]
        await asyncio.sleep(0)
        before = llm.stats()["n_steps"]
        while llm.engine.has_unfinished:
            time.sleep(0.01)  # the loop can't run
        n_steps = llm.stats()["n_steps"] - before
        await asyncio.gather(*tasks)
        return len(calls), n_steps

    n_calls, n_steps = run(main())
    assert n_steps >= 300
    assert 1 <= n_calls <= 8  # once per reader that had nothing to read, however many steps went by


@pytest.mark.parametrize("prompt", ["x", "x" * 200, {"prompt_token_ids": [1] * 300}])
@pytest.mark.parametrize("way", ["cancel", "break", "drop", "aclose"])
def test_every_way_to_leave_ends_the_request(llm: AsyncLLM, way: str, prompt: Any) -> None:
    params = replace(LONG, max_tokens=200)

    async def main() -> int:
        if way == "cancel":
            task = asyncio.create_task(collect(llm, prompt, params))
            await asyncio.sleep(0.002)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        elif way == "break":
            async for _ in llm.generate(prompt, params):
                break
        else:
            stream = llm.generate(prompt, params)
            await anext(stream)
            if way == "aclose":
                await stream.aclose()
            del stream
        before = cast(int, llm.stats()["n_steps"])
        await idle(llm)
        return cast(int, llm.stats()["n_steps"]) - before

    assert run(main()) < 100  # 200 would be to the end
    assert llm.stats()["n_running"] == 0


def test_abort(llm: AsyncLLM) -> None:
    async def main() -> list[list[RequestOutput]]:
        tasks = [asyncio.create_task(collect(llm, "x", LONG, name)) for name in ("a", "b", "c")]
        await asyncio.sleep(0.005)
        await llm.abort("a")
        await llm.abort(["b", "unknown"])
        return await asyncio.gather(*tasks)

    a, b, c = (outputs[-1] for outputs in run(main()))
    assert (a.request_id, b.request_id, c.request_id) == ("a", "b", "c")
    assert [o.outputs[0].finish_reason for o in (a, b, c)] == ["abort", "abort", "length"]
    assert all(o.finished and len(o.outputs[0].token_ids) < 400 for o in (a, b))


def test_abort_of_a_request_whose_prompt_is_being_encoded(
    llm: AsyncLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was lost: the engine did not know the id yet. Now nothing of it runs, and its reader is told."""
    encoding, aborted = threading.Event(), threading.Event()
    encode = llm._inputs.encode

    def slow(prompts: Any) -> Any:
        encoding.set()
        assert aborted.wait(TIMEOUT_S)
        return encode(prompts)

    async def one() -> None:
        await idle(llm)
        before = llm.stats()["n_steps"]
        monkeypatch.setattr(llm._inputs, "encode", slow)
        monkeypatch.setattr("pace.async_llm.MAX_INLINE_CHARS", 1)
        task = asyncio.create_task(collect(llm, "prompt", LONG, "slow"))
        await asyncio.to_thread(encoding.wait, TIMEOUT_S)
        with pytest.raises(RequestError, match="'slow' is in use"):
            await collect(llm, "prompt", LONG, "slow")
        await llm.abort(["slow", "unknown"])
        aborted.set()
        (output,) = await task
        assert output.finished and output.outputs[0].finish_reason == "abort"
        assert not output.outputs[0].token_ids and llm.stats()["n_steps"] == before
        monkeypatch.undo()
        assert (await collect(llm, "prompt", GREEDY, "slow"))[-1].finished

    run(one())


def test_an_id_is_used_once_at_a_time(llm: AsyncLLM) -> None:
    async def main() -> None:
        first = asyncio.create_task(collect(llm, "x", LONG, "id"))
        await asyncio.sleep(0)
        with pytest.raises(RequestError, match="'id' is in use"):
            await collect(llm, "y", GREEDY, "id")
        assert len((await first)[-1].outputs[0].token_ids) == 400  # the other's failure didn't touch it
        for _ in range(20):
            assert (await collect(llm, "y", GREEDY, "id"))[-1].request_id == "id"
        for wrong in ("", 3):
            with pytest.raises(RequestError, match="request_id"):
                await collect(llm, "y", GREEDY, wrong)

    run(main())


def test_chat(llm: AsyncLLM, model: Path) -> None:
    messages = [{"role": "user", "content": "hi " * 20}]

    async def main() -> list[RequestOutput]:
        long = [{"role": "user", "content": "x" * 300}] * (MAX_INLINE_CHARS // 300 + 1)
        with pytest.raises(RequestError, match="the prompt has"):  # encoded elsewhere, raised here
            await anext(llm.chat(long, GREEDY))
        with pytest.raises(ChatTemplateError, match="template"):
            await anext(llm.chat(messages, GREEDY, chat_template="{% if"))
        options: Any = {
            "chat_template_kwargs": {"a": [1]},
            "tools": [{"b": 2}],
            "continue_final_message": True,
        }
        template = "{{ a }}{{ tools }}{{ messages[0].content }}!"
        output = await anext(llm.chat(messages, GREEDY, chat_template=template, **options))
        assert output.prompt == "[1][{'b': 2}]" + "hi " * 20
        return [output async for output in llm.chat(messages, GREEDY)]

    outputs = run(main())
    with LLM(model, threads=1) as other:
        assert outputs[-1].outputs == other.chat(messages, GREEDY)[0].outputs


@pytest.mark.parametrize(
    ("prompt", "options", "error", "message"),
    [
        (7, {}, RequestError, "prompt 0 is 7"),
        ("", {}, RequestError, "empty"),
        ({"text": "a"}, {}, RequestError, "the key 'text'"),
        ({"prompt_token_ids": [10**6]}, {}, RequestError, "token id 1000000"),
        ("a" * 600, {}, RequestError, "600 tokens"),
        ("a" * 5000, {}, RequestError, "prompt 0"),
        ("a", {"sampling_params": {"temperature": 0}}, RequestError, "expected SamplingParams"),
        ("a", {"timeout_s": -1}, RequestError, "timeout_s is -1"),
        ("a", {"priority": "low"}, RequestError, "priority"),
    ],
)
def test_bad_requests_raise_at_the_first_iteration(
    llm: AsyncLLM, prompt: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    async def main() -> None:
        stream = llm.generate(prompt, **options)
        with pytest.raises(error, match=message):
            await anext(stream)
        assert not llm.engine.has_unfinished

    run(main())


def test_a_failing_request_says_so_and_ends_alone(
    llm: AsyncLLM, whole: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler = llm.engine.sampler
    opened = sampler.open

    def open_or_fail(seq: Any) -> None:
        if seq.request_id == "bad":
            raise ValueError("not this one")
        opened(seq)

    monkeypatch.setattr(sampler, "open", open_or_fail)
    (bad,) = run(collect(llm, "x", GREEDY, "bad"))
    assert bad.outputs[0].finish_reason == "error" and "not this one" in str(bad.outputs[0].stop_reason)
    assert run(collect(llm, "good", GREEDY))[-1].outputs[0] == whole("good")


def test_timeout_and_a_full_queue(model: Path) -> None:
    async def main() -> None:
        async with AsyncLLM(model, threads=1, max_num_seqs=1, max_num_waiting=2) as llm:
            endless = replace(LONG, max_tokens=None)
            (late,) = await collect(llm, "x", replace(endless, output_kind=FINAL_ONLY), timeout_s=0.002)
            assert (late.outputs[0].finish_reason, late.outputs[0].stop_reason) == ("abort", "deadline")
            tasks = [asyncio.create_task(collect(llm, "x", endless)) for _ in range(8)]
            results = await asyncio.gather(*tasks, return_exceptions=True)
            refused = [result for result in results if isinstance(result, BaseException)]
            assert refused and all(isinstance(error, QueueFullError) for error in refused)
            assert len(refused) < 7

    run(main())


def test_an_engine_without_work_burns_no_time(llm: AsyncLLM) -> None:
    run(collect(llm, "x", GREEDY))
    time.sleep(0.05)  # the team's workers park
    start = time.process_time()
    time.sleep(0.2)
    assert time.process_time() - start < 0.02


def test_a_fault_of_the_engine_ends_everybody(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = AsyncLLM(model, threads=1)
    step = llm.engine.step

    def failing() -> list[RequestOutput]:
        if llm.stats()["n_steps"] > 20:
            raise MemoryError("gone")
        return step()

    monkeypatch.setattr(llm.engine, "step", failing)

    async def main() -> None:
        tasks = [asyncio.create_task(collect(llm, "x", LONG)) for _ in range(6)]
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, EngineDeadError) for result in results)
        assert isinstance(results[0], Exception) and isinstance(results[0].__cause__, MemoryError)
        with pytest.raises(EngineDeadError, match=r"MemoryError: gone; build a new one"):
            await collect(llm, "y", GREEDY)
        with pytest.raises(EngineDeadError):
            await llm.abort("z")

    run(main())
    llm.close()


def test_close_ends_what_runs(model: Path) -> None:
    before = threading.active_count()
    llm = AsyncLLM(model, threads=2)

    async def main() -> None:
        tasks = [asyncio.create_task(collect(llm, "x" * n, LONG)) for n in (1, 2, 3)]
        while llm.stats()["n_running"] < 3:  # then they have hundreds of tokens to go
            await asyncio.sleep(0.001)
        await asyncio.to_thread(llm.close)
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(result, PaceError) and "closed" in str(result)
        with pytest.raises(PaceError, match="closed"):
            await collect(llm, "y", GREEDY)

    run(main())
    llm.close()
    assert threading.active_count() == before


def test_the_thread_ends_with_a_forgotten_engine(model: Path) -> None:
    before = threading.active_count()
    llm = AsyncLLM(model, threads=1)
    run(collect(llm, "x", GREEDY))
    reference = weakref.ref(llm)
    del llm
    gc.collect()
    assert reference() is None and threading.active_count() == before


def test_a_closed_loop_leaves_no_request_behind(llm: AsyncLLM) -> None:
    loop = asyncio.new_event_loop()
    stream = llm.generate("x", LONG)
    loop.run_until_complete(anext(stream))
    loop.close()
    start = time.monotonic()
    while llm.engine.has_unfinished and time.monotonic() < start + TIMEOUT_S:
        time.sleep(0.001)
    assert not llm.engine.has_unfinished


def test_the_tokenizer_and_the_counters(llm: AsyncLLM) -> None:
    assert llm.get_tokenizer().encode("a")
    assert llm.stats()["n_steps"] > 0


def test_too_large_for_the_cache(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pace.engine.memory.available_bytes", lambda: 1 << 20)
    with pytest.raises(CapacityError):
        AsyncLLM(model)


def delta(text: str, ids: list[int], index: int = 0, reason: str | None = None) -> CompletionOutput:
    logprobs = [{i: Logprob(-float(i))} for i in ids]
    return CompletionOutput(index, text, ids, -1.0 * len(text), logprobs, reason)


def test_deltas_of_several_completions_merge_by_index() -> None:
    old = RequestOutput("r", "p", [1], [delta("a", [1]), delta("x", [7], 1)])
    new = RequestOutput("r", "p", [1], [delta("yz", [8, 9], 1, "stop"), delta("w", [5], 2)], finished=True)
    both = merged(old, new)
    assert both.finished and [c.index for c in both.outputs] == [0, 1, 2]
    assert both.outputs[1] == CompletionOutput(
        1, "xyz", [7, 8, 9], -2.0, [{i: Logprob(-float(i))} for i in (7, 8, 9)], "stop"
    )
    assert (both.outputs[0].text, both.outputs[2].text) == ("a", "w")
    assert [c.text for c in old.outputs] == ["a", "x"]  # whoever holds the parts keeps them


def test_a_ticket_holds_one_output() -> None:
    def request(kind: RequestOutputKind, one_by_one: bool = False) -> Request:
        params = SimpleNamespace(output_kind=kind)
        given = SimpleNamespace(request_id="r", stream=True, params=params, one_by_one=one_by_one)
        return cast(Request, given)

    def output(text: str, finished: bool = False) -> RequestOutput:
        return RequestOutput("r", None, [1], [delta(text, [1])], finished)

    for kind, text in ((RequestOutputKind.CUMULATIVE, "b"), (DELTA, "ab")):
        ticket = Ticket(request(kind), lambda tickets: None)
        assert ticket.take() is None
        assert ticket.put(output("a")) and not ticket.put(output("b"))
        read = ticket.take()
        assert read is not None and read.outputs[0].text == text
        assert ticket.take() is None and not ticket.finished
        assert ticket.put(output("c", finished=True)) and ticket.finished
    ticket = Ticket(request(DELTA, one_by_one=True), lambda tickets: None)
    assert ticket.put(output("a")) and not ticket.put(output("b"))
    for text in "ab":
        read = ticket.take()
        assert read is not None and read.outputs[0].text == text
    assert ticket.take() is None


def test_unread_tool_calls_are_joined_by_index() -> None:
    def output(calls: list[ToolCall] | None) -> RequestOutput:
        return RequestOutput("id", None, [1], [CompletionOutput(0, "", [2], tool_calls=calls)])

    first = [ToolCall(0, "a", "f", '{"x"')]
    second = [ToolCall(0, "a", "f", ": 1}"), ToolCall(1, "b", "g", "{}")]
    both = merged(merged(output(None), output(first)), merged(output(second), output(None)))
    assert both.outputs[0].tool_calls == [ToolCall(0, "a", "f", '{"x": 1}'), ToolCall(1, "b", "g", "{}")]
    assert merged(output(None), output(None)).outputs[0].tool_calls is None
