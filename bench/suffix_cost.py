"""What a token of output costs the suffix drafter, with and without past outputs: `python bench/suffix_cost.py [N_PAST]`.

Past outputs of N_PAST tokens (400000 unless given) are this Python's own sources, in pieces as long as answers. Then 8
sequences say a prompt and an answer, one token a step, with a guess of 12 behind every token though none is ever accepted:
the most that a token can cost. Answers are new text, past ones with every tenth token changed, or random tokens behind
random past ones. Each is measured twice: step upon step, and with 16 MB written between steps, as a model's step leaves
nothing of the drafter in the L2 cache. CPU time of one thread, Python included, the best of three rounds. Prints Markdown.
"""

from __future__ import annotations

import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pace.checkpoint import read_json, resolve
from pace.engine.sequence import Sequence
from pace.params import SamplingParams
from pace.speculative.suffix import SuffixDrafter
from pace.text.tokenizer import Tokenizer

Ids = npt.NDArray[np.int32]

K, N_SEQUENCES, N_PROMPT, N_ANSWER = 12, 8, 300, 250
PIECE = N_PROMPT + N_ANSWER


def sources(n_tokens: int) -> Ids:
    """Tokens of this Python's modules, as the embedded model's tokenizer has them."""
    directory = resolve("demo")
    vocab_size = read_json(directory / "config.json")["vocab_size"]
    tokenizer = Tokenizer(directory, vocab_size=vocab_size, max_model_len=1 << 20)
    ids: list[int] = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("**/*.py")):
        if "site-packages" in path.parts or "test" in path.parts:
            continue
        ids += tokenizer.encode(path.read_text(encoding="utf-8", errors="replace")[:40_000])
        if len(ids) >= n_tokens:
            return np.array(ids[:n_tokens], np.int32)
    raise SystemExit(f"this Python's sources have only {len(ids)} tokens")


def cases(n_past: int) -> Iterator[tuple[str, Ids, Ids]]:
    """Name, past outputs i32 [n_past], and i32 [N_SEQUENCES, PIECE]."""
    rng = np.random.default_rng(0)
    text = sources(n_past + N_SEQUENCES * PIECE)
    past, new = text[:n_past], text[n_past:].reshape(N_SEQUENCES, PIECE)
    at = rng.integers(0, n_past - PIECE, N_SEQUENCES)[:, None] + np.arange(PIECE)
    changed = np.where(rng.random(at.shape) < 0.1, rng.integers(0, 1000, at.shape, np.int32), past[at])
    yield "new text", past, new
    yield "past text with changes", past, changed
    drawn = rng.zipf(1.3, n_past + N_SEQUENCES * PIECE) % 50_000
    yield (
        "random, by Zipf's law",
        drawn[:n_past].astype(np.int32),
        drawn[n_past:].astype(np.int32).reshape(N_SEQUENCES, PIECE),
    )


def cost(past: Ids, pieces: Ids) -> tuple[float, float, float]:
    """Microseconds of a token: of output with its guess, step upon step and behind a model's; of a past output."""
    # A tenth more than they are, with their ends: then both halves of the cache are in use.
    drafter = SuffixDrafter(K, past_tokens=len(past) * 11 // 10)
    start = time.thread_time()
    for at in range(0, len(past), N_ANSWER):
        tell(drafter, past[at : at + N_ANSWER])
    join_s = time.thread_time() - start
    warm, cold = (min(answer(drafter, pieces, n) for _ in range(3)) for n in (0, 16 << 20))
    return 1e6 * warm, 1e6 * cold, 1e6 * join_s / max(1, len(past))


def answer(drafter: SuffixDrafter, pieces: Ids, n_written: int) -> float:
    """Seconds of a token of output, where every step writes so many bytes."""
    seqs = [begin(piece[:N_PROMPT]) for piece in pieces]
    drafter.propose(dict.fromkeys(seqs, 0))
    written, spent = np.zeros(n_written, np.uint8), 0.0
    for i in range(N_PROMPT, PIECE):
        for seq, piece in zip(seqs, pieces, strict=True):
            seq.commit(int(piece[i]))
        written += 1
        wanted = dict.fromkeys(seqs, K)
        start = time.thread_time()
        drafter.propose(wanted)
        spent += time.thread_time() - start
    for seq in seqs:
        drafter.end(seq)  # they have not finished, so they join nothing
    return spent / (N_SEQUENCES * N_ANSWER)


def begin(prompt: Ids) -> Sequence:
    """A sequence that runs."""
    seq = Sequence("r", prompt, SamplingParams(), max_output=PIECE)
    seq.start(0, 0)
    return seq


def tell(drafter: SuffixDrafter, output: Ids) -> None:
    """A request whose output joins the past ones."""
    seq = begin(output[:1])
    drafter.propose({seq: 0})
    for token in output[1:]:
        seq.commit(int(token))
    seq.finish("stop", None)
    drafter.end(seq)


def main() -> None:
    """Print the table."""
    n_past = int(sys.argv[1]) if len(sys.argv) > 1 else 400_000
    print("| answers | past tokens | us a token, warm | behind a model's step | a past output's token |")
    print("| --- | --- | --- | --- | --- |")
    for name, past, pieces in cases(n_past):
        for kept in (past[:0], past):
            warm, cold, join = cost(kept, pieces)
            joined = f"{join:.2f}" if len(kept) else ""
            print(f"| {name} | {len(kept)} | {warm:.1f} | {cold:.1f} | {joined} |")


if __name__ == "__main__":
    main()
