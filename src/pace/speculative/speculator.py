"""What stands between the engine's loop and a drafter: who is asked for how much, and what is counted."""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import Any

import numpy.typing as npt

from pace.engine.commit import FATAL
from pace.engine.schedule import Schedule
from pace.engine.sequence import Sequence, Status
from pace.errors import one_line
from pace.log import logger
from pace.models.plan import Plan
from pace.outputs import SpeculativeMetrics
from pace.speculative.controller import Controller
from pace.speculative.drafter import Drafter, Proposal
from pace.speculative.verifier import Match

__all__ = ["Speculator"]


class Speculator:
    """A `Speculation` with one drafter.

    Args:
        drafter: guesses.
        vocab_size: of the target; ids must be below it.
        max_draft_rows: drafted tokens of all sequences that one step may verify.
        match: says whether a guess stands.
        controller: decides what pays; None: all that can be guessed is verified.
    """

    def __init__(
        self,
        drafter: Drafter,
        vocab_size: int,
        max_draft_rows: int,
        match: Match | None = None,
        controller: Controller | None = None,
    ) -> None:
        self.max_draft_rows = max_draft_rows
        self.max_tokens = drafter.max_tokens
        self.metrics = SpeculativeMetrics()
        self._drafter: Drafter | None = drafter
        self._method = drafter.name
        self._vocab_size = vocab_size
        self._controller = controller
        self._match = Match() if match is None else match
        self.accepts = self._match.accepts
        self._known: set[Sequence] = set()  # what the drafter may hold something for
        self._distrusted: set[Sequence] = set()
        self._draft_s = 0.0
        self._n_skipped = 0

    @property
    def draft_plan(self) -> Plan | None:
        """Of the drafter's model, for benchmarks; None: it has none."""
        return None if self._drafter is None else self._drafter.plan

    def bind(self, slot: Callable[[str], npt.NDArray[Any]]) -> None:
        """See `Speculation.bind`."""
        if self._drafter is not None:
            self._drafter.bind(slot)

    def ran(self, step: Schedule) -> None:
        """See `Speculation.ran`."""
        if self._drafter is not None:
            try:
                self._drafter.ran(step)
            except FATAL:
                raise
            except BaseException as error:
                self._turn_off(error)

    def propose(self, running: Seq[Sequence]) -> None:
        """Before a step is planned: guesses for those that decode."""
        drafter = self._drafter
        if drafter is None:
            return
        start = time.perf_counter()
        wanted = self._wanted(running)
        if wanted:
            self._known.update(wanted)
            try:
                before = drafter.n_run
                proposals = drafter.propose(wanted)
                seconds = time.perf_counter() - start - drafter.decided_s
                n_passes, n_rows = (now - then for now, then in zip(drafter.n_run, before, strict=True))
                self._take(proposals, wanted, running, (n_passes, n_rows, seconds))
            except FATAL:
                raise
            except BaseException as error:
                for seq in running:
                    seq.n_draft = 0
                self._turn_off(error)
        self._draft_s += time.perf_counter() - start

    def verified(self, seq: Sequence, n_draft: int, n_accepted: int, n_tokens: int) -> None:
        """Count a round, and tell the drafter."""
        self.metrics.add(n_draft, n_accepted, n_tokens)
        if seq.speculative is None:
            seq.speculative = SpeculativeMetrics()
        seq.speculative.add(n_draft, n_accepted, n_tokens)
        if self._controller is not None:
            self._controller.verified(seq, n_draft, n_accepted)
        if self._drafter is not None:
            try:
                self._drafter.observe(seq, n_draft, n_accepted)
            except FATAL:
                raise
            except BaseException as error:
                self._turn_off(error)

    def distrust(self, seq: Sequence) -> None:
        """No more drafts for this sequence."""
        self._distrusted.add(seq)

    def after_step(self, running: Seq[Sequence], n_rows: int, n_prompt: int, seconds: float) -> None:
        """Learn what the step cost, and let go of those that don't run any more."""
        if self._controller is not None and n_rows and not n_prompt:
            self._controller.stepped(n_rows, seconds)
        gone = [seq for seq in self._known if seq.status is not Status.RUNNING]
        for seq in gone:
            self._known.discard(seq)
            if self._controller is not None:
                self._controller.end(seq)
            if seq.status is Status.FINISHED:
                self._distrusted.discard(seq)
            if self._drafter is not None:
                try:
                    self._drafter.end(seq)
                except FATAL:
                    raise
                except BaseException as error:
                    self._turn_off(error)

    def close(self) -> None:
        """Give back the drafter's memory."""
        if self._drafter is not None:
            self._drafter.close()
            self._drafter = None

    def stats(self) -> dict[str, Any]:
        """Numbers for `Engine.stats`; docs/speculative.md explains them."""
        metrics = self.metrics
        n_drafted = metrics.n_draft_tokens
        drafter = self._drafter
        return {
            "method": self._method,
            "active": drafter is not None,
            "synthetic": self._match.is_synthetic,
            "num_speculative_tokens": self.max_tokens,
            "n_rounds": metrics.n_rounds,
            "n_draft_tokens": n_drafted,
            "n_accepted_tokens": metrics.n_accepted_tokens,
            "n_tokens": metrics.n_tokens,
            "mean_acceptance_length": metrics.mean_acceptance_length,
            "draft_acceptance_rate": metrics.n_accepted_tokens / n_drafted if n_drafted else 0.0,
            "acceptance_rates": metrics.acceptance_rates,
            "drafted_at": list(metrics.drafted_at),
            "accepted_at": list(metrics.accepted_at),
            "by_length": [list(row) for row in metrics.by_length],
            "n_skipped": self._n_skipped,
            "draft_s": self._draft_s,
            "pays": self._controller is None or self._controller.is_open,
            "n_probes": 0 if self._controller is None else self._controller.n_probes,
        } | ({} if drafter is None else drafter.stats())

    def _may_speculate(self, seq: Sequence) -> bool:
        # Chance would accept what a grammar, a ban or min_tokens forbids, and nothing behind it could be drawn.
        forbids = self._match.is_synthetic and (seq.matcher is not None or seq.constraints.has_bans)
        return seq.params.speculative not in ("off", 0) and seq not in self._distrusted and not forbids

    def _wanted(self, running: Seq[Sequence]) -> dict[Sequence, int]:
        """Tokens to guess for each sequence: none while it reads, and none that its output has no room for.

        While speculation does not pay, the drafter is not asked to read prompts either.
        """
        candidates = [seq for seq in running if self._may_speculate(seq)]
        if not candidates:
            return {}
        decoding = [seq for seq in candidates if seq.n_tokens - seq.n_computed == 1]
        asked = dict.fromkeys(decoding, self.max_tokens)
        if self._controller is not None:
            auto = [seq for seq in decoding if isinstance(seq.params.speculative, str)]
            n_rows = sum(seq.n_tokens - seq.n_computed == 1 for seq in running)
            asked |= dict.fromkeys(auto, 0) | self._controller.wanted(auto, n_rows)
            self._n_skipped += sum(not asked[seq] and self._most(seq) > 0 for seq in auto)
            if not self._controller.is_open and not any(asked.values()):
                return {}
        return {seq: min(asked.get(seq, 0), self._most(seq)) for seq in candidates}

    def _most(self, seq: Sequence) -> int:
        asked = seq.params.speculative
        most = self.max_tokens if isinstance(asked, str) else asked
        return max(0, min(most, seq.max_tokens - seq.n_tokens - 1))

    def _take(
        self,
        proposals: dict[Sequence, Proposal],
        wanted: dict[Sequence, int],
        running: Seq[Sequence],
        cost: tuple[int, int, float],
    ) -> None:
        """Write what pays of the proposals behind the tokens of their sequences. `cost`: passes, rows, seconds."""
        drafts = {seq: self._checked(proposal, wanted[seq]) for seq, proposal in proposals.items()}
        if self._controller is not None:
            if drafts:
                self._controller.drafted(len(drafts), *cost)
            auto = {
                # Where chance decides, what the draft believes means nothing.
                seq: Proposal(draft, None if self._match.is_synthetic else proposals[seq].confidences)
                for seq, draft in drafts.items()
                if isinstance(seq.params.speculative, str)
            }
            n_rows = sum(seq.n_tokens - seq.n_computed == 1 for seq in running)
            for seq, n in self._controller.cut(auto, n_rows).items():
                drafts[seq] = drafts[seq][:n]
        for seq, draft in drafts.items():
            seq.draft(draft)

    def _checked(self, proposal: Proposal, wanted: int) -> list[int]:
        """What of a proposal can be verified."""
        token_ids = proposal.token_ids[:wanted]
        for i, token in enumerate(token_ids):
            if not 0 <= token < self._vocab_size:
                return token_ids[:i]
        return token_ids

    def _turn_off(self, error: BaseException) -> None:
        """A drafter that fails is asked no more; nothing depends on it."""
        drafter, self._drafter = self._drafter, None
        self.max_draft_rows = 0
        logger.warning(
            "speculation is off from now on: the %s drafter failed with %s: %s",
            self._method,
            type(error).__name__,
            one_line(str(error)),
        )
        try:
            if drafter is not None:
                drafter.close()
        except Exception as second:  # what it holds then goes with the process
            logger.warning("the drafter could not be closed: %s", one_line(str(second)))
