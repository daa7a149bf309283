"""What speculative decoding gains: the same prompts, plainly and with drafts, alternating in one process.

For every method an engine is loaded; on it each batch of prompts is decoded plainly and with every K in turn, so that a
figure and what it is compared with saw the same minute. What drafts may not change, the tokens, is compared as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from typing import Any

from pace import ops
from pace.config import EngineConfig
from pace.console import progress_bar
from pace.engine.memory import MemoryPlan
from pace.errors import PaceError
from pace.llm import LLM
from pace.outputs import RequestOutput, SpeculativeMetrics
from pace.params import SamplingParams
from pace.speculative import load
from pace.speculative_config import NEEDS_MODEL, SpeculativeConfig

__all__ = ["PLAIN", "Arm", "Depth", "Prompts", "SpeculativeResult", "format_speculative", "run"]

PLAIN = "ar"
"""The method that guesses nothing: one token a step (autoregressive)."""

Depth = int | str
"""Tokens of a draft, K, or "auto"; "off" for plain decoding."""

WARMUP_TOKENS = 8


@dataclass(frozen=True)
class Prompts:
    """What is asked.

    Attributes:
        data: where it comes from, as it shall be called.
        texts: one for each request.
        system: of chats; None: they have none.
        chat: the texts are a user's messages, to be put into the model's chat template; else prompts as they are.
        template_kwargs: further variables of the template.
    """

    data: str
    texts: Sequence[str]
    system: str | None = None
    chat: bool = True
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Arm:
    """One way of decoding all prompts.

    Attributes:
        method: "ar", "pard" ...
        k: most tokens of a draft, or "auto"; 0 for "ar".
        n_tokens: of all outputs.
        decode_s: from the first token of a batch to its last, over all batches.
        tokens_per_s: tokens behind the first ones, by decode_s.
        speedup: over plain decoding of the same prompts on the same engine, by decode_s per token.
        mean_acceptance_length: tokens of a round, the target's own included: 1 where nothing is accepted.
        acceptance_rates: by position, the share of its drafted tokens that became output, whatever came before them.
        histogram: rounds in which 0, 1, ... drafted tokens were accepted.
        n_rounds: steps of a sequence that verified a draft.
        draft_s, verify_s, other_s: of the engine's steps, prompts included: guessing, the target's passes, all else.
        n_identical: requests whose tokens are those of plain decoding; all of them, unless acceptance is synthetic.
        n_requests: all.
    """

    method: str
    k: Depth
    n_tokens: int
    decode_s: float
    tokens_per_s: float
    speedup: float
    mean_acceptance_length: float
    acceptance_rates: list[float]
    histogram: list[int]
    n_rounds: int
    draft_s: float
    verify_s: float
    other_s: float
    n_identical: int
    n_requests: int


@dataclass(frozen=True)
class SpeculativeResult:
    """What one run found.

    Attributes:
        synthetic_acceptance: guesses were accepted by chance, with this probability or one for each position; the outputs
            mean nothing, and only the times are real. None: they were verified.
        arms: plain decoding first (over all engines), then every method with every K.
    """

    model: str
    draft: str | None
    data: str
    isa: str
    n_threads: int
    batch_size: int
    max_tokens: int
    temperature: float
    synthetic_acceptance: float | tuple[float, ...] | None
    arms: list[Arm]

    def to_json(self) -> dict[str, Any]:
        """As a plain dict."""
        return asdict(self)


class _Tally:
    """What became of the prompts in one way of decoding."""

    def __init__(self) -> None:
        self.n_tokens = self.n_behind_first = self.n_requests = self.n_identical = 0
        self.decode_s = self.draft_s = self.verify_s = self.other_s = 0.0
        self.metrics = SpeculativeMetrics()

    def add(self, outputs: Sequence[RequestOutput], times: Mapping[str, float]) -> None:
        """A batch was decoded."""
        tokens = [len(output.outputs[0].token_ids) for output in outputs]
        firsts = [m.first_token_s for output in outputs if (m := output.metrics).first_token_s is not None]
        lasts = [m.finished_s for output in outputs if (m := output.metrics).finished_s is not None]
        self.n_requests += len(outputs)
        self.n_tokens += sum(tokens)
        self.n_behind_first += sum(tokens) - len(tokens)
        self.decode_s += max(lasts) - min(firsts)
        self.draft_s += times["draft_s"]
        self.verify_s += times["run_s"]
        self.other_s += times["step_s"] - times["run_s"] - times["draft_s"]
        for output in outputs:
            if output.speculative is not None:
                self.metrics.join(output.speculative)

    def join(self, other: _Tally) -> None:
        """Count all of another one."""
        for name in ("n_tokens", "n_behind_first", "n_requests", "n_identical"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("decode_s", "draft_s", "verify_s", "other_s"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    @property
    def token_s(self) -> float:
        """Seconds for one token; NaN where no output has a second one."""
        return self.decode_s / self.n_behind_first if self.n_behind_first else math.nan

    def arm(self, method: str, k: Depth, plain: _Tally) -> Arm:
        metrics = self.metrics
        accepted = [metrics.n_rounds, *metrics.accepted_at, 0]
        return Arm(
            method=method,
            k=k,
            n_tokens=self.n_tokens,
            decode_s=self.decode_s,
            tokens_per_s=1 / self.token_s,
            speedup=plain.token_s / self.token_s,
            mean_acceptance_length=metrics.mean_acceptance_length,
            acceptance_rates=metrics.acceptance_rates,
            histogram=[more - most for more, most in pairwise(accepted)] if metrics.n_rounds else [],
            n_rounds=metrics.n_rounds,
            draft_s=self.draft_s,
            verify_s=self.verify_s,
            other_s=self.other_s,
            n_identical=self.n_identical,
            n_requests=self.n_requests,
        )


def run(
    config: EngineConfig,
    prompts: Prompts,
    *,
    methods: Sequence[str],
    draft: str | None,
    depths: Sequence[Depth],
    max_tokens: int,
    batch_size: int = 1,
    temperature: float = 0.0,
    synthetic_acceptance: float | tuple[float, ...] | None = None,
    random_weights: bool = False,
    show_progress: bool | None = None,
    on_plan: Callable[[MemoryPlan], None] | None = None,
) -> SpeculativeResult:
    """Measure every method with every depth of draft.

    Args:
        config: of the engines; what it says about speculation counts, but for method, draft, K and acceptance.
        methods: of `SpeculativeConfig`, or "ar".
        draft: the draft model; None where no method has one.
        depths: K, or "auto".
        max_tokens: of an output.
        batch_size: prompts that are decoded together.
        synthetic_acceptance: accept guesses by chance; see `SpeculativeConfig`.
        random_weights: of the models read only config.json.

    Raises:
        PaceError: a model can't be loaded, or a request was refused or failed.
    """
    guessing = [method for method in methods if method != PLAIN]
    configs = [_with(config, method, draft, depths, synthetic_acceptance) for method in guessing]
    per_round = -(-len(prompts.texts) // batch_size) * (1 + len(depths))
    bar = progress_bar(show_progress, total=per_round * max(1, len(configs)), unit="batch", desc="decoding")
    plain = _Tally()
    arms: list[Arm] = []
    n_threads = 0
    for method, one in zip(guessing or [PLAIN], configs or [config], strict=True):
        loaded = load(one, show_progress=show_progress, random_weights=random_weights, on_plan=on_plan)
        n_threads = loaded.team.n_threads
        with LLM.from_loaded(one, loaded) as llm:
            runner = _Runner(llm, prompts, max_tokens, temperature, synthetic_acceptance is not None)
            tallies = runner.measure(["off", *(depths if guessing else ())], batch_size, bar)
        plain.join(tallies["off"])
        arms += [tallies[k].arm(method, k, tallies["off"]) for k in tallies if k != "off"]
    if bar is not None:
        bar.close()
    return SpeculativeResult(
        model=config.model,
        draft=draft if any(method in NEEDS_MODEL for method in guessing) else None,
        data=prompts.data,
        isa=ops.isa(),
        n_threads=n_threads,
        batch_size=batch_size,
        max_tokens=max_tokens,
        temperature=temperature,
        synthetic_acceptance=synthetic_acceptance,
        arms=[plain.arm(PLAIN, 0, plain), *arms],
    )


def _with(
    config: EngineConfig,
    method: str,
    draft: str | None,
    depths: Sequence[Depth],
    synthetic_acceptance: float | tuple[float, ...] | None,
) -> EngineConfig:
    """The engine's config with this method, its other options as they are."""
    numbers = [k for k in depths if isinstance(k, int)]
    changes: dict[str, Any] = {
        "method": method,
        "model": draft if method in NEEDS_MODEL else None,
        "synthetic_acceptance": synthetic_acceptance,
    }
    if numbers:
        changes["num_speculative_tokens"] = max(numbers)
    if config.speculative is None:
        return replace(config, speculative=SpeculativeConfig(**changes))
    return replace(config, speculative=replace(config.speculative, **changes))


class _Runner:
    """Decodes prompts on one engine."""

    def __init__(
        self, llm: LLM, prompts: Prompts, max_tokens: int, temperature: float, ignore_eos: bool
    ) -> None:
        self._llm = llm
        self._prompts = prompts
        self._params = SamplingParams(
            temperature=temperature, max_tokens=max_tokens, seed=0, ignore_eos=ignore_eos, detokenize=False
        )
        self._ignore_eos = ignore_eos

    def measure(self, depths: Sequence[Depth], batch_size: int, bar: Any) -> dict[Depth, _Tally]:
        """Every batch with every depth; which of them is first changes from batch to batch."""
        tallies: dict[Depth, _Tally] = {k: _Tally() for k in depths}
        for k in depths:
            self.decode(self._prompts.texts[:1], k, min(WARMUP_TOKENS, self._params.max_tokens or 1))
        for i, at in enumerate(range(0, len(self._prompts.texts), batch_size)):
            texts = self._prompts.texts[at : at + batch_size]
            said: dict[Depth, list[list[int]]] = {}
            for j in range(len(depths)):
                k = depths[(i + j) % len(depths)]
                outputs, times = self.decode(texts, k, self._params.max_tokens)
                tallies[k].add(outputs, times)
                said[k] = [list(output.outputs[0].token_ids) for output in outputs]
                if bar is not None:
                    bar.update()
            for k, tokens in said.items():
                tallies[k].n_identical += sum(a == b for a, b in zip(tokens, said["off"], strict=True))
        return tallies

    def decode(
        self, texts: Sequence[str], k: Depth, max_tokens: int | None
    ) -> tuple[list[RequestOutput], dict[str, float]]:
        """One batch, and where its time went."""
        params = replace(self._params, speculative=k, max_tokens=max_tokens)
        before = self.times()
        if self._prompts.chat:
            system = (
                [] if self._prompts.system is None else [{"role": "system", "content": self._prompts.system}]
            )
            outputs = self._llm.chat(
                [[*system, {"role": "user", "content": text}] for text in texts],
                params,
                False,
                chat_template_kwargs=self._prompts.template_kwargs or None,
            )
        else:
            outputs = self._llm.generate(list(texts), params, False)
        for output in outputs:
            if output.outputs[0].finish_reason == "error":
                raise PaceError(f"a request failed: {output.outputs[0].stop_reason}")
        after = self.times()
        return outputs, {name: after[name] - before[name] for name in before}

    def times(self) -> dict[str, float]:
        stats = self._llm.stats()
        return {
            "step_s": stats["step_s"],
            "run_s": stats["run_s"],
            "draft_s": stats["speculative"]["draft_s"] if "speculative" in stats else 0.0,
        }


def format_speculative(result: SpeculativeResult) -> str:
    """A table for people."""
    n_prompts, temperature = result.arms[0].n_requests, f"temperature {result.temperature:g}"
    lines = [
        f"{result.model}, draft {result.draft or 'none'}: {result.isa}, {result.n_threads} threads",
        f"{result.data}: {n_prompts} prompts, {result.batch_size} at once, up to {result.max_tokens} tokens, {temperature}",
    ]
    if result.synthetic_acceptance is not None:
        lines.append(
            f"SYNTHETIC ACCEPTANCE {result.synthetic_acceptance}: times are real, acceptance and outputs are not"
        )
    columns = ["K", "tok/s", "speed-up", "length", "draft", "verify", "other", "identical"]
    lines += ["", f"{'method':12}" + "".join(f"{column:>10}" for column in columns)]
    for arm in result.arms:
        total = arm.draft_s + arm.verify_s + arm.other_s
        length = f"{arm.mean_acceptance_length:.2f}" if arm.n_rounds else "-"
        cells = [f"{arm.k or '-'}", f"{arm.tokens_per_s:.1f}", f"{arm.speedup:.2f}", length]
        cells += [f"{part / total:.1%}" for part in (arm.draft_s, arm.verify_s, arm.other_s)]
        cells.append(
            "-" if result.synthetic_acceptance is not None else f"{arm.n_identical}/{arm.n_requests}"
        )
        lines.append(f"{arm.method:12}" + "".join(f"{cell:>10}" for cell in cells))
    lines += ["", "length: tokens of a round, the target's own included; accepted by position:"]
    for arm in result.arms:
        if arm.n_rounds:
            rates = " ".join(f"{rate:.2f}" for rate in arm.acceptance_rates)
            counts = " ".join(map(str, arm.histogram))
            lines += [f"{arm.method:12}{arm.k:>4}  {rates}", f"{'':16}  rounds by accepted tokens: {counts}"]
    return "\n".join(lines)
