"""The engine as a state machine: whatever arrives, whoever leaves, nothing leaks and no output changes.

Pool, prefix index and scheduler are the real ones, the model is `fakes.FakePlan`: its logits are a hash of all
tokens that it reads through the block tables, so a block that is shared, copied, moved, freed or reused wrongly
changes tokens. The truth of a request is computed without an engine.
"""

from __future__ import annotations

import functools
import time
from typing import Any

import numpy as np
import pytest
from engine.fakes import DTYPE, VOCAB, Panic, fake_sample, logits_of, make_engine
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from speculative.guess import Guesser

from pace.engine.pacing import Pacer
from pace.engine.schedule import Schedule
from pace.engine.scheduler import Scheduler
from pace.engine.sequence import NO_ROW, Sequence, Status
from pace.errors import CapacityError, QueueFullError
from pace.outputs import RequestOutput
from pace.params import RequestOutputKind, SamplingParams
from pace.speculative.drafter import Drafter
from pace.speculative.hybrid import HybridDrafter
from pace.speculative.suffix import SuffixDrafter

MAX_LEN = 160
EOS = 7

# Prompts share long beginnings, as chats with one system prompt do.
_rng = np.random.default_rng(5)
STREAMS = [_rng.integers(0, VOCAB - 6, MAX_LEN).tolist() for _ in range(3)]


@functools.cache
def truth(
    prompt: tuple[int, ...],
    n: int,
    temperature: float,
    seed: int,
    index: int,
    ignore_eos: bool,
    reach: int | None,
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Tokens and log probabilities of a request, by definition, of a model that sees `reach` tokens."""
    history, logprobs = list(prompt), []
    row = np.zeros(1, DTYPE)
    row["temperature"], row["seed"], row["sample_index"], row["n_logprobs"] = temperature, seed, index, 0
    while len(history) < len(prompt) + n:
        row["position"] = len(history)
        drawn = fake_sample(logits_of(history[-(reach or MAX_LEN) :])[None], row, [None])
        history.append(int(drawn.tokens[0]))
        logprobs.append(float(drawn.logprobs[0]))
        if history[-1] == EOS and not ignore_eos:
            break
    return tuple(history[len(prompt) :]), tuple(logprobs)


class ModelPacer(Pacer):
    """Steps cost what a formula says: hypothesis must find the same schedule when it runs the same rules again."""

    n_waiting = 0  # as the scheduler said when it last asked

    def allowance(self, n_decode: int, n_waiting: int = 1) -> int:
        self.n_waiting = n_waiting
        return super().allowance(n_decode, n_waiting)

    def observe(self, n_decode: int, n_prompt: int, seconds: float) -> None:
        super().observe(n_decode, n_prompt, max(0.04, 0.005 * (n_decode + n_prompt)))


class FairScheduler(Scheduler):
    """Checks every step that it plans: who got the room."""

    room = 0  # prompt rows that the last step might have had

    def schedule(self) -> Schedule:
        step = super().schedule()
        assert step.n_draft <= self.max_draft_rows
        n_rows = step.n_decode + step.n_draft
        room = self.max_num_batched_tokens - n_rows
        if any(seq.watched for seq in step.seqs[: step.n_decode]):
            assert isinstance(self.pacer, ModelPacer)
            room = min(room, self.pacer.allowance(n_rows, self.pacer.n_waiting))
        self.room = room
        given = dict(zip(step.seqs[step.n_decode :], step.n_new[step.n_decode :], strict=True))
        reading = [seq for seq in self.running if seq in given or seq.n_tokens - seq.n_computed > 1]
        assert sum(given.values()) <= room
        end = self.tables.step_end
        cut = next(
            (
                seq
                for seq in reading
                if seq.n_computed + given.get(seq, 0) < min(seq.n_tokens, end(seq.n_computed))
            ),
            None,
        )
        if cut is not None:
            first = min(seq.priority for seq in [*given, cut])
            if cut.priority > first:
                n_first = n_rows + sum(n for seq, n in given.items() if seq.priority == first)
                n_worse = sum(n for seq, n in given.items() if seq.priority > first)
                assert n_worse <= n_first, "worse priorities at most double a step"
                room = min(room, sum(given.values()) - n_worse + n_first)
            assert sum(given.values()) == room, "rows are left while somebody has tokens to run"
            in_order = room - sum(n for seq, n in given.items() if seq.key < cut.key)
            passed = [seq for seq in given if seq.key > cut.key]
            assert 2 * sum(given[seq] for seq in passed) <= in_order, "half of the room is for those in order"
            for seq in passed:
                assert seq.priority == cut.priority, "only equals are passed"
                assert 2 * (seq.n_tokens - seq.n_computed) < cut.n_tokens - cut.n_computed
        return step


class EngineMachine(RuleBasedStateMachine):
    """Requests come, run, fork, fail, run out of time, are preempted and aborted.

    The bound for the one whose priority is better than anybody's, as long as that holds: its first token comes two steps
    at most after the steps have had room for its prompt. (With reservation rows and blocks may have to be waited for.)
    """

    @initialize(
        kv_cache_type=st.sampled_from(["slab", "slab", "paged", "contiguous"]),
        n_tokens=st.integers(MAX_LEN, 4 * MAX_LEN),
        max_num_seqs=st.integers(1, 6),
        max_tokens=st.integers(6, 100),
        reserve=st.booleans(),
        prefix_caching=st.booleans(),
        reaches=st.sampled_from([(None,), (None,), (None, 20), (40,), (None, 1, 50), (60, 33)]),
        max_step=st.integers(8, 40),
        guesses=st.none()
        | st.fixed_dictionaries(
            {
                "method": st.sampled_from(["guesser", "guesser", "suffix", "hybrid"]),
                "max_tokens": st.sampled_from([1, 2, 3, 8, 16]),
                "wrong": st.sampled_from([0, 1, 8, 9]),
                "ragged": st.booleans(),
                "fails_after": st.sampled_from([None, None, 30]),
            }
        ),
    )
    def start(
        self,
        kv_cache_type: str,
        n_tokens: int,
        max_num_seqs: int,
        max_tokens: int,
        reserve: bool,
        prefix_caching: bool,
        reaches: tuple[int | None, ...],
        max_step: int,
        guesses: dict[str, Any] | None,
    ) -> None:
        self.reaches = reaches
        drafter = self.make_drafter(**guesses or {"method": None})
        block_size = 16 if kv_cache_type == "paged" else 32
        self.engine, self.plan = make_engine(
            max_model_len=MAX_LEN,
            max_num_seqs=max_num_seqs,
            max_tokens=max(max_tokens, max_num_seqs),
            n_blocks=-(-n_tokens // block_size),
            block_size=block_size,
            kv_cache_type=kv_cache_type,
            prefix_caching=prefix_caching,
            reserve=reserve,
            reaches=reaches,
            max_step=max_step,
            max_num_waiting=12,
            eos=[EOS],
            drafter=drafter,
        )
        self.engine.scheduler.__class__ = FairScheduler
        self.engine.scheduler.pacer = ModelPacer()
        self.best: tuple[str, int, int] | None = (
            None  # who is first; room it has had; steps since that sufficed
        )
        self.asked: dict[str, dict[str, Any]] = {}  # requests in flight
        self.got: dict[str, list[list[int]]] = {}  # tokens of their completions, deltas joined
        self.count = 0

    def make_drafter(self, method: str | None, **guesses: Any) -> Drafter | None:
        """One that is right as often as it is told, one that looks at the text (and guesses on whatever it is worth), or
        both."""
        self.guesser: Guesser | None = None
        self.suffix: SuffixDrafter | None = None
        if method in ("guesser", "hybrid"):
            self.guesser = Guesser(self.follow, **guesses)
        if method in ("suffix", "hybrid"):
            self.suffix = SuffixDrafter(guesses["max_tokens"], least=0.0, past_tokens=200)
        if self.guesser is not None and self.suffix is not None:
            return HybridDrafter(self.guesser, self.suffix)
        return self.guesser or self.suffix

    def follow(self, seq: Sequence, history: list[int]) -> int:
        """What greedy sampling draws."""
        return int(logits_of(history[-(self.reaches[0] or MAX_LEN) :]).argmax())

    @rule(
        stream=st.integers(0, len(STREAMS) - 1),
        n_prompt=st.integers(1, 8) | st.integers(1, MAX_LEN - 1),
        own_end=st.booleans(),
        n_output=st.integers(1, 20) | st.integers(1, MAX_LEN),
        temperature=st.sampled_from([0.0, 1.0]),
        n=st.sampled_from([1, 1, 1, 3]),
        priority=st.integers(-1, 1),
        streams=st.booleans(),
        kind=st.sampled_from(RequestOutputKind),
        salt=st.sampled_from([None, None, "a"]),
        ignore_eos=st.booleans(),
        scored=st.sampled_from([None, None, None, 0, 2]),
        late=st.sampled_from([None, None, None, None, -1.0, 1e9]),
    )
    def submit(self, **asked: Any) -> None:
        self.submit_one(**asked)

    def submit_one(self, **asked: Any) -> None:
        prompt = STREAMS[asked["stream"]][: asked["n_prompt"]]
        if asked["own_end"]:
            prompt[-1] = self.count % (VOCAB - 6)
        n = asked["n"] if asked["temperature"] else 1
        params = SamplingParams(
            max_tokens=asked["n_output"],
            temperature=asked["temperature"],
            n=n,
            seed=self.count,
            logprobs=0,
            prompt_logprobs=asked["scored"],
            ignore_eos=asked["ignore_eos"],
            output_kind=asked["kind"],
            detokenize=False,
        )
        name = str(self.count)
        try:
            self.engine.add_request(
                name,
                prompt,
                params,
                stream=asked["streams"],
                priority=asked["priority"],
                cache_salt=asked["salt"],
                deadline_s=None if asked["late"] is None else time.monotonic() + asked["late"],
            )
        except QueueFullError:
            assert self.engine.n_waiting + n > 12
            return
        except CapacityError:
            raise AssertionError("every request up to max_model_len fits the pool") from None
        self.asked[name] = asked | {"prompt": prompt, "seed": self.count, "n": n}
        self.got[name] = [[] for _ in range(n)]
        self.count += 1

    @rule(
        stream=st.integers(0, len(STREAMS) - 1),
        n_prompt=st.integers(20, 90),
        n_output=st.integers(20, MAX_LEN),
        n_requests=st.integers(2, 6),
        streams=st.booleans(),
    )
    def submit_crowd(self, n_prompt: int, n_requests: int, **asked: Any) -> None:
        """Long outputs of prompts with one beginning: they share, and then they need more than there is."""
        for i in range(n_requests):
            self.submit_one(
                n_prompt=n_prompt + i,
                own_end=i % 2 == 0,
                temperature=0.0,
                n=1,
                priority=0,
                kind=RequestOutputKind.DELTA,
                salt=None,
                ignore_eos=True,
                scored=None,
                late=None,
                **asked,
            )

    @precondition(lambda self: self.asked)
    @rule(data=st.data(), really=st.sampled_from([True, False, False, False]))
    def abort(self, data: st.DataObject, really: bool) -> None:
        if not really:
            return
        name = data.draw(st.sampled_from(sorted(self.asked)))
        self.engine.abort(name)
        self.asked[name]["aborted"] = True

    @rule(n=st.integers(1, 6) | st.integers(1, 60))
    def step(self, n: int) -> None:
        for _ in range(n):
            aborted = {name for name, asked in self.asked.items() if asked.get("aborted")}
            waiting = self.who_is_first()
            for output in self.engine.step():
                self.check(output)
            self.check_first(waiting)
            assert not aborted & set(self.asked), "an abort takes effect within one step"

    def who_is_first(self) -> str | None:
        """The request whose priority is better than any other's, while it has no token."""
        requests = list(self.engine.intake.requests.values())
        first = min(requests, key=lambda request: request.seqs[0].priority, default=None)
        if first is None or first.seqs[0].n_output or self.asked[first.request_id].get("aborted"):
            return None
        alone = sum(request.seqs[0].priority == first.seqs[0].priority for request in requests) == 1
        return first.request_id if alone else None

    def check_first(self, name: str | None) -> None:
        scheduler = self.engine.scheduler
        assert isinstance(scheduler, FairScheduler)
        request = None if name is None else self.engine.intake.requests.get(name)
        if name is None or request is None or scheduler.reserve:
            self.best = None
            return
        _, room, late = self.best if self.best is not None and self.best[0] == name else (name, 0, 0)
        if request.seqs[0].n_output or request.seqs[0].status is Status.FINISHED:
            return
        room += min(scheduler.room, scheduler.tables.max_step)
        late += room >= request.seqs[0].n_prompt
        assert late <= 2, "the best priority waits for somebody else"
        self.best = (name, room, late)

    @precondition(lambda self: self.engine.scheduler.running)
    @rule(error=st.sampled_from([ValueError("broken"), Panic("broken"), MemoryError()]))
    def crash_once(self, error: BaseException) -> None:
        """A fault that goes away when the step is repeated: nobody notices, but who was alone in the step."""
        self.plan.crash = error

    def check(self, output: RequestOutput) -> None:
        asked = self.asked[output.request_id]
        got = self.got[output.request_id]
        delta = asked["streams"] and asked["kind"] is RequestOutputKind.DELTA
        if output.prompt_logprobs is not None:  # of deltas one has them, of other outputs each
            asked["n_scored"] = len(output.prompt_logprobs) + delta * asked.get("n_scored", 0)
        for completion in output.outputs:
            tokens = got[completion.index] if delta else []
            tokens = tokens + list(completion.token_ids)
            got[completion.index] = tokens
            limit = min(asked["n_output"], MAX_LEN - len(asked["prompt"]))
            expected, logprobs = truth(
                tuple(asked["prompt"]),
                limit,
                asked["temperature"],
                asked["seed"],
                completion.index,
                asked["ignore_eos"],
                self.reaches[0],
            )
            assert tuple(tokens) == expected[: len(tokens)]
            assert completion.logprobs is not None
            assert len(completion.logprobs) == len(completion.token_ids)
            first = len(tokens) - len(completion.token_ids)
            for entry, token, logprob in zip(
                completion.logprobs, completion.token_ids, logprobs[first:], strict=False
            ):
                assert entry[token].logprob == logprob
            reason = completion.finish_reason
            if reason in ("stop", "length"):
                assert tuple(tokens) == expected
                assert reason == ("stop" if tokens[-1] == EOS and not asked["ignore_eos"] else "length")
            elif reason == "abort":
                assert asked.get("aborted") or asked["late"] == -1.0
            elif reason == "error":
                assert 1 in self.plan.crash_sizes
        if output.finished:
            if asked["scored"] is not None and all(c.finish_reason == "length" for c in output.outputs):
                assert delta or output.prompt_logprobs is not None
                assert asked["n_scored"] == len(asked["prompt"])
            del self.asked[output.request_id]

    @invariant()
    def books_balance(self) -> None:
        if not hasattr(self, "engine"):
            return
        scheduler, tables = self.engine.scheduler, self.engine.scheduler.tables
        rows = [seq.row for seq in scheduler.running]
        assert len(set(rows)) == len(rows) == tables.n_open and NO_ROW not in rows
        assert all(seq.status is Status.RUNNING for seq in scheduler.running)
        assert [seq.key for seq in scheduler.running] == sorted(seq.key for seq in scheduler.running)
        assert 0 <= tables.n_available <= tables.n_free <= tables.n_blocks
        assert scheduler.n_waiting >= 0

    def teardown(self) -> None:
        """Everything that is left finishes, and the pool is whole again."""
        if not hasattr(self, "engine"):
            return
        for _ in range(20_000):
            if not self.engine.has_unfinished:
                break
            before = self.engine.stats()["n_steps"]
            for output in self.engine.step():
                self.check(output)
            assert self.engine.stats()["n_steps"] > before or not self.engine.has_unfinished, "stuck"
        assert not self.asked and not self.engine.has_unfinished
        scheduler, tables = self.engine.scheduler, self.engine.scheduler.tables
        assert not scheduler.running and scheduler.n_waiting == 0
        assert (tables.n_open, tables.n_free, tables.n_available) == (0, tables.n_blocks, tables.n_blocks)
        assert self.guesser is None or self.guesser.closed or not self.guesser.held
        assert self.suffix is None or not self.suffix._texts


QUICK = settings(
    max_examples=60,
    stateful_step_count=30,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
LONG = settings(QUICK, max_examples=2500, stateful_step_count=50, derandomize=False)  # 100 000 rules and more

TestEngine = EngineMachine.TestCase
TestEngine.settings = QUICK


@pytest.mark.slow
def test_engine_long() -> None:
    """The same for 100 000 rules and more."""
    run_state_machine_as_test(EngineMachine, settings=LONG)
