"""How well a model predicts a text, and how far another one's predictions are from it.

A long text is read in windows that overlap: each scores the tokens behind those that the one before has scored, `stride` of
them, and gives them the tokens before as context. So every token is scored once, and all but the first window's see at
least window - stride tokens before them. Where the tokenizer puts BOS before a prompt, each window begins with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pace.benchmarks.profile import wrapped
from pace.config import EngineConfig
from pace.console import progress_bar
from pace.engine.loader import Loaded, load
from pace.engine.memory import MemoryPlan
from pace.errors import ConfigError, PaceError, RequestError
from pace.models.plan import F32Array, I32Array
from pace.params import SamplingParams
from pace.text.tokenizer import Tokenizer

__all__ = ["Comparison", "PerplexityResult", "Window", "cut", "format_perplexity", "run"]

F64Array = npt.NDArray[np.float64]

WINDOW = 2048
"""Tokens of a window, unless the model's context is shorter or a caller says otherwise."""


@dataclass(frozen=True)
class Window:
    """A part of a text that is read at once.

    Attributes:
        ids: i32 [n], BOS included.
        first: the first token that this window scores; all behind it are, too.
    """

    ids: I32Array
    first: int


@dataclass(frozen=True)
class Comparison:
    """A model's predictions beside a reference's, for the same text.

    Attributes:
        model: the reference.
        kl_nats: mean over the tokens of KL(reference || model).
        kl_p99, kl_max: of the same.
        greedy_agreement: share of the tokens for which both find the same one the most probable.
        nats_per_token: of the reference.
        bits_per_byte: of the reference.
    """

    model: str
    kl_nats: float
    kl_p99: float
    kl_max: float
    greedy_agreement: float
    nats_per_token: float
    bits_per_byte: float


@dataclass(frozen=True)
class PerplexityResult:
    """What one run found.

    Attributes:
        n_bytes: of the UTF-8 of the texts that n_tokens tokens spell: all of it but the first token of each text where no
            BOS precedes it, which nothing predicts.
        n_tokens: scored.
        window, stride: tokens of a window, BOS included; and by how many the next one is further.
        nats_per_token: mean of -ln p(token).
        bits_per_byte: the sum of -log2 p(token), divided by n_bytes: comparable between tokenizers.
        perplexity: exp(nats_per_token).
        greedy_accuracy: share of the tokens that were the most probable ones.
        against: beside another model, or the same one otherwise computed; None where none was asked for.
    """

    model: str
    data: str
    n_texts: int
    n_bytes: int
    n_tokens: int
    window: int
    stride: int
    nats_per_token: float
    bits_per_byte: float
    perplexity: float
    greedy_accuracy: float
    against: Comparison | None = None

    def to_json(self) -> dict[str, Any]:
        """As a plain dict."""
        return asdict(self)


def cut(ids: Sequence[int], bos_id: int | None, window: int, stride: int) -> list[Window]:
    """The windows of a text.

    Args:
        ids: its tokens, without BOS.
        bos_id: put before each window; None: nothing is.
        window: tokens of one at most, BOS included; stride: 1 .. what is left of it beside BOS and one token.
    """
    head = [] if bos_id is None else [bos_id]
    room = window - len(head)
    windows: list[Window] = []
    scored = 0 if head else 1  # tokens of the text that are scored, or can't be
    while scored < len(ids):
        end = min(len(ids), scored + stride if windows else room)
        begin = max(0, end - room)
        windows.append(Window(np.array(head + list(ids[begin:end]), np.int32), len(head) + scored - begin))
        scored = end
    return windows


def run(
    config: EngineConfig,
    data: str,
    texts: Sequence[str],
    *,
    window: int | None = None,
    stride: int | None = None,
    against: EngineConfig | None = None,
    show_progress: bool | None = None,
    on_plan: Callable[[MemoryPlan], None] | None = None,
) -> PerplexityResult:
    """Load a model, and a reference where one is given, and score texts.

    Args:
        data: where the texts come from, as it shall be called.
        window: None: 2048 tokens, or as many as the models can read.
        stride: None: half the window.

    Raises:
        ConfigError: window or stride is out of range, or the models cut the texts into different tokens.
        RequestError: no text has a token that can be scored.
        PaceError: a model can't be loaded, or a step failed.
    """
    with ExitStack() as stack:
        models = []
        for one in (config, against):
            if one is not None:
                models.append(load(one, show_progress=show_progress, on_plan=on_plan))
                stack.callback(models[-1].close)
        window, stride = _lengths(models, window, stride)
        pieces, n_bytes = _windows(models, texts, window, stride)
        bar = progress_bar(
            show_progress, total=sum(len(p.ids) - p.first for p in pieces), unit="tok", desc="scoring"
        )
        readers = [_Reader(model) for model in models]
        sums = _Sums()
        for piece in pieces:
            kept = readers[1].read(piece, keep=True) if against is not None else None
            sums.add(readers[0].read(piece, other=None if kept is None else kept.rows), kept)
            if bar is not None:
                bar.update(len(piece.ids) - piece.first)
        if bar is not None:
            bar.close()
    nats = math.fsum(sums.nats) / len(sums.nats)
    return PerplexityResult(
        model=config.model,
        data=data,
        n_texts=len(texts),
        n_bytes=n_bytes,
        n_tokens=len(sums.nats),
        window=window,
        stride=stride,
        nats_per_token=nats,
        bits_per_byte=math.fsum(sums.nats) / math.log(2) / n_bytes,
        perplexity=math.exp(nats),
        greedy_accuracy=sums.n_best / len(sums.nats),
        against=None if against is None else sums.compared(against.model, n_bytes),
    )


def _lengths(models: Sequence[Loaded], window: int | None, stride: int | None) -> tuple[int, int]:
    most = (
        min(model.memory.max_model_len for model in models) - 1
    )  # the engine samples a token behind a prompt
    if window is None:
        window = min(WINDOW, most)
    if not 4 <= window <= most:
        raise ConfigError(f"window is {window}, expected 4 to {most}: max_model_len less one")
    if stride is None:
        stride = window // 2
    if not 1 <= stride <= window - 2:
        raise ConfigError(f"stride is {stride}, expected 1 to {window - 2}: each token needs one before it")
    return window, stride


def _windows(
    models: Sequence[Loaded], texts: Sequence[str], window: int, stride: int
) -> tuple[list[Window], int]:
    """All windows of all texts, and the bytes that their scored tokens spell."""
    pieces: list[Window] = []
    n_bytes = 0
    tokenizers = [model.tokenizer for model in models if model.tokenizer is not None]
    for i, text in enumerate(texts):
        encoded = [_encode(tokenizer, text) for tokenizer in tokenizers]
        bos_id, ids = encoded[0]
        if any(other != encoded[0] for other in encoded):
            raise ConfigError(
                f"text {i} has other tokens for the model than for what it is compared with; choose models of one tokenizer"
            )
        pieces += cut(ids, bos_id, window, stride)
        if bos_id is not None:
            n_bytes += len(text.encode())
        elif len(ids) > 1:
            n_bytes += len(text.encode()) - _n_bytes_of(tokenizers[0], ids[0])
    if not n_bytes:
        raise RequestError("the data has no token that another one precedes; give a longer text")
    return pieces, n_bytes


def _encode(tokenizer: Tokenizer, text: str) -> tuple[int | None, list[int]]:
    """The BOS that the tokenizer puts before a prompt, and the text's own tokens."""
    bare = tokenizer.encode(text, add_special_tokens=False)
    full = tokenizer.encode(text)
    return (full[0], bare) if len(full) == len(bare) + 1 and full[1:] == bare else (None, bare)


def _n_bytes_of(tokenizer: Tokenizer, token_id: int) -> int:
    if tokenizer.byte_level:
        return len(tokenizer.token_bytes(token_id))
    return len(tokenizer.decode_token(token_id).encode())


@dataclass(frozen=True)
class _Scores:
    """Of the tokens that one window scores.

    Attributes:
        nats: -ln p of each.
        n_best: how many were the most probable ones.
        rows: f32 [n, vocab] log probabilities of what precedes them; None unless kept.
        kl: nats, beside another model's rows; None where there are none.
        n_agreed: of these, where both have the same most probable token.
    """

    nats: list[float]
    n_best: int
    rows: F32Array | None
    kl: list[float] | None
    n_agreed: int


class _Reader:
    """Scores windows with an engine, one after the other, and looks at the logits on their way to the sampler."""

    def __init__(self, loaded: Loaded) -> None:
        self._engine = loaded.engine
        self._n_windows = 0

    def read(self, piece: Window, *, keep: bool = False, other: F32Array | None = None) -> _Scores:
        """
        Args:
            keep: return the rows of log probabilities.
            other: a reference's, to compare with.
        """
        n = len(piece.ids) - piece.first
        rows: list[F32Array] = []
        kl: list[float] = []
        n_agreed = 0
        at = 1 - piece.first  # among the scored tokens: of the token that the next row of logits predicts

        def look(score: Callable[..., Any], logits: F32Array, tokens: I32Array, n_top: int) -> Any:
            nonlocal at, n_agreed
            mine = logits[max(0, -at) :]
            if len(mine) and (keep or other is not None):
                found = log_softmax(mine)
                if keep:
                    rows.append(found)
                if other is not None:
                    theirs = other[max(0, at) : at + len(logits)]
                    kl.extend(divergence(theirs, found).tolist())
                    n_agreed += int((theirs.argmax(axis=1) == found.argmax(axis=1)).sum())
            at += len(logits)
            return score(logits, tokens, n_top)

        self._n_windows += 1
        params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        self._engine.submit(self._engine.prepare(str(self._n_windows), piece.ids, params))
        output = None
        with wrapped(self._engine.sampler, "prompt_logprobs", look):
            while self._engine.has_unfinished:
                for output in self._engine.step():
                    if output.outputs[0].finish_reason == "error":
                        raise PaceError(f"window {self._n_windows} failed: {output.outputs[0].stop_reason}")
        if output is None or output.prompt_logprobs is None:
            raise PaceError(f"window {self._n_windows} has no log probabilities")
        scored = [next(iter(entry.values())) for entry in output.prompt_logprobs[-n:] if entry is not None]
        return _Scores(
            nats=[-entry.logprob for entry in scored],
            n_best=sum(entry.rank == 1 for entry in scored),
            rows=np.concatenate(rows) if keep else None,
            kl=None if other is None else kl,
            n_agreed=n_agreed,
        )


def log_softmax(logits: F32Array) -> F32Array:
    """Of each row; f32 [n, vocab] from f32 [n, vocab]."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    sums = np.exp(shifted).sum(axis=1, dtype=np.float64, keepdims=True)
    found: F32Array = (shifted - np.log(sums)).astype(np.float32)
    return found


def divergence(reference: F32Array, model: F32Array) -> F64Array:
    """KL(reference || model) of each row, f64 [n] in nats, of log probabilities f32 [n, vocab]; columns that only one of
    them has fill its matrix up, and are left out."""
    n = min(reference.shape[1], model.shape[1])
    p, q = reference[:, :n], model[:, :n]
    with np.errstate(invalid="ignore"):  # 0 times ln 0, where the reference excludes a token
        terms = np.where(p > -np.inf, np.exp(p) * (p - q), 0)
    sums: F64Array = np.maximum(terms.sum(axis=1, dtype=np.float64), 0.0)
    return sums


class _Sums:
    """What all windows found."""

    def __init__(self) -> None:
        self.nats: list[float] = []
        self.n_best = 0
        self._kl: list[float] = []
        self._n_agreed = 0
        self._reference_nats: list[float] = []

    def add(self, scores: _Scores, reference: _Scores | None) -> None:
        self.nats += scores.nats
        self.n_best += scores.n_best
        if reference is not None and scores.kl is not None:
            self._kl += scores.kl
            self._n_agreed += scores.n_agreed
            self._reference_nats += reference.nats

    def compared(self, model: str, n_bytes: int) -> Comparison:
        kl = np.array(self._kl)
        total = math.fsum(self._reference_nats)
        return Comparison(
            model=model,
            kl_nats=float(kl.mean()),
            kl_p99=float(np.quantile(kl, 0.99)),
            kl_max=float(kl.max()),
            greedy_agreement=self._n_agreed / len(kl),
            nats_per_token=total / len(kl),
            bits_per_byte=total / math.log(2) / n_bytes,
        )


def format_perplexity(result: PerplexityResult) -> str:
    """A few lines for people."""
    lines = [
        f"{result.model} on {result.data}: {result.n_tokens} tokens, {result.n_bytes} bytes of {result.n_texts} texts",
        f"windows of {result.window} tokens, stride {result.stride}",
        "",
        f"bits per byte     {result.bits_per_byte:10.5f}",
        f"nats per token    {result.nats_per_token:10.5f}",
        f"perplexity        {result.perplexity:10.4f}",
        f"greedy accuracy   {result.greedy_accuracy:10.2%}",
    ]
    if result.against is not None:
        other = result.against
        lines += [
            "",
            f"against {other.model}: {other.bits_per_byte:.5f} bits per byte, {other.nats_per_token:.5f} nats per token",
            f"KL, mean          {other.kl_nats:10.6f} nats per token",
            f"KL, 99 %, largest {other.kl_p99:10.6f} {other.kl_max:.6f}",
            f"greedy agreement  {other.greedy_agreement:10.2%}",
        ]
    return "\n".join(lines)
