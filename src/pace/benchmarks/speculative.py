"""What speculative decoding gains: the same prompts, plainly and with drafts, alternating in one process.

For every method an engine is loaded; on it each batch of prompts is decoded plainly and with every K in turn, so that a
figure and what it is compared with saw the same minute. What drafts may not change, the tokens, is compared as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from pace import ops
from pace.benchmarks.speculative_arm import Arm, Depth, Tally
from pace.benchmarks.speculative_roof import Ideal, Round, ideal
from pace.config import EngineConfig
from pace.console import progress_bar
from pace.engine.memory import MemoryPlan
from pace.errors import PaceError
from pace.llm import LLM
from pace.outputs import RequestOutput
from pace.params import SamplingParams
from pace.speculative import load
from pace.speculative.speculator import Speculator
from pace.speculative_config import NEEDS_MODEL, SpeculativeConfig

__all__ = ["PLAIN", "Arm", "Depth", "Prompts", "SpeculativeResult", "format_speculative", "run"]

PLAIN = "ar"
"""The method that guesses nothing: one token a step (autoregressive)."""

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
class SpeculativeResult:
    """What one run found.

    Attributes:
        synthetic_acceptance: guesses were accepted by chance, with this probability or one for each position; the outputs
            mean nothing, and only the times are real. None: they were verified.
        arms: for each batch size plain decoding (over all engines), then every method with every K.
    """

    model: str
    draft: str | None
    data: str
    isa: str
    n_threads: int
    max_tokens: int
    temperature: float
    synthetic_acceptance: float | tuple[float, ...] | None
    arms: list[Arm]

    def to_json(self) -> dict[str, Any]:
        """As a plain dict."""
        return asdict(self)


def run(
    config: EngineConfig,
    prompts: Prompts,
    *,
    methods: Sequence[str],
    draft: str | None,
    depths: Sequence[Depth],
    max_tokens: int,
    batch_sizes: Sequence[int] = (1,),
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
        batch_sizes: prompts that are decoded together, one number after the other on the same engine.
        synthetic_acceptance: accept guesses by chance; see `SpeculativeConfig`.
        random_weights: of the models read only config.json.

    Raises:
        PaceError: a model can't be loaded, or a request was refused or failed.
    """
    guessing = [method for method in methods if method != PLAIN]
    configs = [_with(config, method, draft, depths, synthetic_acceptance) for method in guessing]
    n_batches = sum(-(-len(prompts.texts) // size) for size in batch_sizes) * (1 + len(depths))
    bar = progress_bar(show_progress, total=n_batches * max(1, len(configs)), unit="batch", desc="decoding")
    plain = {size: Tally() for size in batch_sizes}
    arms: dict[int, list[Arm]] = {size: [] for size in batch_sizes}
    n_threads = 0
    for method, one in zip(guessing or [PLAIN], configs or [config], strict=True):
        loaded = load(one, show_progress=show_progress, random_weights=random_weights, on_plan=on_plan)
        n_threads = loaded.team.n_threads
        with LLM.from_loaded(one, loaded) as llm:
            runner = _Runner(llm, prompts, max_tokens, temperature, synthetic_acceptance is not None)
            for size in batch_sizes:
                tallies = runner.measure(["off", *(depths if guessing else ())], size, bar)
                off = tallies.pop("off")
                plain[size].join(off)
                arms[size] += [
                    tally.arm(method, k, size, off, runner.ideal(method, k, tally, off))
                    for k, tally in tallies.items()
                ]
    if bar is not None:
        bar.close()
    return SpeculativeResult(
        model=config.model,
        draft=draft if any(method in NEEDS_MODEL for method in guessing) else None,
        data=prompts.data,
        isa=ops.isa(),
        n_threads=n_threads,
        max_tokens=max_tokens,
        temperature=temperature,
        synthetic_acceptance=synthetic_acceptance,
        arms=[
            arm for size in batch_sizes for arm in (plain[size].arm(PLAIN, 0, size, plain[size]), *arms[size])
        ],
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

    def measure(self, depths: Sequence[Depth], batch_size: int, bar: Any) -> dict[Depth, Tally]:
        """Every batch with every depth; which of them is first changes from batch to batch."""
        tallies: dict[Depth, Tally] = {k: Tally() for k in depths}
        for k in depths:
            self.decode(self._prompts.texts[:1], k, min(WARMUP_TOKENS, self._params.max_tokens or 1))
        for i, at in enumerate(range(0, len(self._prompts.texts), batch_size)):
            texts = self._prompts.texts[at : at + batch_size]
            said: dict[Depth, list[list[int]]] = {}
            for j in range(len(depths)):
                k = depths[(i + j) % len(depths)]
                tallies[k].roofs.measure(self._llm.loaded.team)
                outputs, spent = self.decode(texts, k, self._params.max_tokens)
                tallies[k].roofs.measure(self._llm.loaded.team)
                tallies[k].add(outputs, spent)
                said[k] = [list(output.outputs[0].token_ids) for output in outputs]
                if bar is not None:
                    bar.update()
            for k, tokens in said.items():
                tallies[k].n_identical += sum(a == b for a, b in zip(tokens, said["off"], strict=True))
        return tallies

    def ideal(self, method: str, k: Depth, tally: Tally, off: Tally) -> Ideal | None:
        """What the roofs allow; None where K is not fixed or no model drafts."""
        loaded = self._llm.loaded
        speculation = loaded.engine.speculation
        draft = speculation.draft_plan if isinstance(speculation, Speculator) else None
        if draft is None or not isinstance(k, int) or method not in ("pard", "draft_model"):
            return None
        one = Round(
            method,
            k,
            round(tally.n_requests / tally.n_batches),
            round(tally.n_context / tally.n_requests),
            tally.n_behind_first / tally.n_rounds,
        )
        return ideal(loaded.plan.ir, draft, one, off.roofs, tally.roofs, self._llm.config.kv_cache_dtype)

    def decode(
        self, texts: Sequence[str], k: Depth, max_tokens: int | None
    ) -> tuple[list[RequestOutput], dict[str, float]]:
        """One batch, and what it took."""
        params = replace(self._params, speculative=k, max_tokens=max_tokens)
        before = self.spent()
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
        after = self.spent()
        return outputs, {name: after[name] - before[name] for name in before}

    def spent(self) -> dict[str, float]:
        """Seconds of steps, of these in the target, its sampler and the drafter; and drafts that did not pay."""
        stats = self._llm.stats()
        drafts = stats.get("speculative", {"draft_s": 0.0, "n_skipped": 0})
        return {name: stats[name] for name in ("step_s", "run_s", "sample_s")} | {
            name: drafts[name] for name in ("draft_s", "n_skipped")
        }


def format_speculative(result: SpeculativeResult) -> str:
    """A table for people."""
    n_prompts, temperature = result.arms[0].n_requests, f"temperature {result.temperature:g}"
    lines = [
        f"{result.model}, draft {result.draft or 'none'}: {result.isa}, {result.n_threads} threads",
        f"{result.data}: {n_prompts} prompts, up to {result.max_tokens} tokens, {temperature}",
    ]
    if result.synthetic_acceptance is not None:
        lines.append(
            f"SYNTHETIC ACCEPTANCE {result.synthetic_acceptance}: times are real, acceptance and outputs are not"
        )
    columns = [
        "batch",
        "K",
        "tok/s",
        "speed-up",
        "of ideal",
        "round",
        "length",
        "draft",
        "verify",
        "sample",
        "other",
        "skipped",
        "identical",
    ]
    lines += ["", f"{'method':12}" + "".join(f"{column:>10}" for column in columns)]
    lines += [_row(arm, result.synthetic_acceptance is not None) for arm in result.arms]
    if any(arm.ideal_speedup is not None for arm in result.arms):
        lines += ["", *_ROOFS]
        lines += [f"{_name(arm)}  {_rooflines(arm)}" for arm in result.arms if arm.rooflines is not None]
    lines += ["", "length: tokens of a round, the target's own included; accepted by position:"]
    for arm in result.arms:
        if arm.n_rounds:
            rates = " ".join(f"{rate:.2f}" for rate in arm.acceptance_rates)
            counts = " ".join(map(str, arm.histogram))
            lines += [f"{_name(arm)}  {rates}", f"{'':22}  rounds by accepted tokens: {counts}"]
            lines += _by_length(arm)
    return "\n".join(lines)


_ROOFS = (
    "of ideal: speed-up by length x plain step / (verifying step + draft), each as short as the roofs allow;",
    "round: its time by the sum of the latter two; rooflines in ms:",
)


def _name(arm: Arm) -> str:
    return f"{arm.method:12}{arm.batch_size:>5}{arm.k:>5}"


def _row(arm: Arm, is_synthetic: bool) -> str:
    """One line of the table."""
    parts = (arm.draft_s, arm.verify_s, arm.sample_s, arm.other_s)
    cells = [f"{arm.batch_size}", f"{arm.k or '-'}", f"{arm.tokens_per_s:.1f}", f"{arm.speedup:.3f}"]
    cells += [
        "-" if figure is None else f"{figure:.2f}"
        for figure in (arm.ideal_share, arm.round_ratio, arm.mean_acceptance_length if arm.n_rounds else None)
    ]
    cells += [f"{part / sum(parts):.1%}" for part in parts]
    cells.append(f"{arm.n_skipped}" if arm.k == "auto" else "-")
    cells.append("-" if is_synthetic else f"{arm.n_identical}/{arm.n_requests}")
    return f"{arm.method:12}" + "".join(f"{cell:>10}" for cell in cells)


def _by_length(arm: Arm) -> list[str]:
    """The rounds by accepted tokens of every usual length of draft; nothing where all have one length."""
    usual = [n for n, counts in enumerate(arm.by_length) if sum(counts) >= 0.05 * arm.n_rounds]
    if len(usual) < 2:
        return []
    return [f"{'':22}  of drafts of {n:2}: {' '.join(map(str, arm.by_length[n]))}" for n in usual]


def _rooflines(arm: Arm) -> str:
    plain, verify, draft = (1e3 * seconds for seconds in arm.rooflines or ())
    return (
        f"plain {plain:.2f}, verify {verify:.2f}, draft {draft:.2f}; ideal speed-up {arm.ideal_speedup:.2f}"
    )
