"""From the sampler's arrays to the log probabilities that a request asked for."""

from __future__ import annotations

from pace.engine.request import Request
from pace.engine.sampler import LogprobsResult, SampleResult
from pace.engine.sequence import Sequence
from pace.outputs import Logprob
from pace.text.tokenizer import MAX_CHAR_TOKENS, Tokenizer

__all__ = ["LogprobRecorder"]


class LogprobRecorder:
    """Writes log probabilities into sequences and requests.

    Args:
        tokenizer: spells the tokens; None: they have ids only.
    """

    def __init__(self, tokenizer: Tokenizer | None = None) -> None:
        self._tokenizer = tokenizer

    def add_sampled(self, seq: Sequence, drawn: SampleResult, i: int) -> None:
        """Record {token: Logprob} of the drawn token and of the most probable ones, as vLLM orders them.

        Args:
            i: the sequence's row in `drawn`.
        """
        token, logprob = int(drawn.tokens[i]), float(drawn.logprobs[i])
        entries = self._entries(
            seq,
            (token, logprob, int(drawn.ranks[i])),
            drawn,
            i,
            seq.params.logprobs or 0,
            seq.output_ids[-1 - MAX_CHAR_TOKENS : -1],
        )
        if seq.logprobs is not None and seq.cumulative_logprob is not None:
            seq.logprobs.append(entries)
            seq.cumulative_logprob += logprob

    def add_scored(self, request: Request, seq: Sequence, scores: LogprobsResult, i: int) -> None:
        """Record {token: Logprob} of the prompt's next token that is not scored yet, and of the most probable ones.

        Args:
            i: the row of `scores` that predicts it.
        """
        chosen = (int(seq.tokens[seq.n_scored + 1]), float(scores.logprobs[i]), int(scores.ranks[i]))
        if request.prompt_logprobs is not None:
            n = seq.params.prompt_logprobs or 0
            at = seq.n_scored + 1
            before = seq.tokens[max(0, at - MAX_CHAR_TOKENS) : at].tolist()
            request.prompt_logprobs.append(self._entries(seq, chosen, scores, i, n, before))
        seq.n_scored += 1

    def _entries(
        self,
        seq: Sequence,
        chosen: tuple[int, float, int],
        result: LogprobsResult,
        i: int,
        n: int,
        before: list[int],
    ) -> dict[int, Logprob]:
        """The chosen (token, logprob, rank) first, then the `n` most probable ones of row i, behind the tokens `before`."""
        top_ids = result.top_ids[i, :n].tolist()
        texts: list[str] | list[None]
        if self._tokenizer is not None and seq.params.detokenize:
            texts = self._tokenizer.decode_next([chosen[0], *top_ids], before)
        else:
            texts = [None] * (1 + n)
        entries = {chosen[0]: Logprob(chosen[1], chosen[2], texts[0])}
        tops = zip(top_ids, result.top_logprobs[i, :n].tolist(), texts[1:], strict=True)
        for rank, (token, logprob, text) in enumerate(tops, 1):
            if token not in entries:
                entries[token] = Logprob(logprob, rank, text)
        return entries
