"""How long streams wait for their next token while a long prompt arrives, beside what they wait otherwise.

    python bench/mixed_load.py DIRECTORY --streams 1 8 --prompt-len 1920 --rounds 3

Some sequences stream; when they have run undisturbed for a while, a prompt of --prompt-len tokens is submitted, until
its first token comes. A gap is the time between two outputs of one stream; gaps that overlap the prompt's reading are
compared with the median of the plain ones before it. The prompt's own time to its first token stands beside what it
takes alone: short gaps are paid for there. "max gap" is the median of the rounds' longest gaps, "worst" the longest of
all: on a shared machine mostly a moment in which everything was slow.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from pace import AsyncLLM, SamplingParams

WARM_TOKENS = 8  # of each stream before its gaps count


class Stream:
    """When the outputs of one stream came, and whether there are enough to begin."""

    def __init__(self, n_ready: int) -> None:
        self.n_ready = n_ready
        self.times: list[float] = []
        self.ready = asyncio.Event()


@dataclass(frozen=True)
class Round:
    """Seconds: gaps of all streams before and during the prompt, and its time to the first token."""

    plain: list[float]
    busy: list[float]
    first_token_s: float


class Load:
    """Requests of random prompts against one engine."""

    def __init__(self, llm: AsyncLLM, vocab_size: int) -> None:
        self.llm = llm
        self.vocab_size = vocab_size
        self.rng = random.Random(0)

    def prompt(self, n_tokens: int) -> dict[str, list[int]]:
        return {"prompt_token_ids": [self.rng.randrange(self.vocab_size) for _ in range(n_tokens)]}

    async def first_token(self, n_tokens: int) -> float:
        """Seconds to the first token of a prompt."""
        params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        async for _ in self.llm.generate(self.prompt(n_tokens), params):
            pass
        return time.perf_counter() - start

    async def stream(self, n_context: int, n_new: int, found: Stream, stop: asyncio.Event) -> None:
        """Note when each output came, until it is told to stop."""
        params = SamplingParams(temperature=0, max_tokens=n_new, ignore_eos=True, detokenize=False)
        try:
            async with aclosing(self.llm.generate(self.prompt(n_context), params)) as outputs:
                async for _ in outputs:
                    found.times.append(time.perf_counter())
                    if len(found.times) == found.n_ready:
                        found.ready.set()
                    if stop.is_set():
                        return
        finally:
            found.ready.set()  # whatever has happened, nobody waits for ever

    async def round(self, n_streams: int, n_context: int, n_plain: int, n_prompt: int, n_new: int) -> Round:
        """Streams alone for `n_plain` tokens, then beside a prompt."""
        streams = [Stream(WARM_TOKENS + n_plain) for _ in range(n_streams)]
        stop = asyncio.Event()
        tasks = [asyncio.create_task(self.stream(n_context, n_new, found, stop)) for found in streams]
        await asyncio.gather(*(found.ready.wait() for found in streams))
        if any(len(found.times) < found.n_ready for found in streams):
            stop.set()
            await asyncio.gather(*tasks)  # raises what ended it
            raise RuntimeError("a stream ended early")
        start = time.perf_counter()
        first_token_s = await self.first_token(n_prompt)
        end = start + first_token_s
        stop.set()
        await asyncio.gather(*tasks)
        plain, busy = [], []
        for found in streams:
            for before, after in pairwise(found.times[WARM_TOKENS:]):
                if after <= start:
                    plain.append(after - before)
                elif before <= end:
                    busy.append(after - before)
        return Round(plain, busy, first_token_s)


def line(n_streams: int, rounds: list[Round], alone_s: float) -> str:
    """One row of the table: medians over the rounds, and the worst gap of all."""
    plain = median(median(r.plain) for r in rounds)
    typical = median(median(r.busy) / median(r.plain) for r in rounds)
    longest = [max(r.busy) / median(r.plain) for r in rounds]
    first = median(r.first_token_s for r in rounds)
    gaps = f"{typical:12.2f}{median(longest):10.2f}{max(longest):8.2f}"
    return f"{n_streams:7d}{plain * 1e3:10.2f}{gaps}{first * 1e3:12.2f}{alone_s * 1e3:10.2f}"


async def measure(args: argparse.Namespace) -> str:
    """All rounds of all numbers of streams."""
    llm = AsyncLLM(
        model=args.model,
        max_model_len=args.context + args.max_new + args.prompt_len,
        max_num_seqs=max(args.streams) + 1,
        max_num_batched_tokens=args.max_num_batched_tokens,
        kv_cache_type=args.kv_cache_type,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
    )
    async with llm:
        load = Load(llm, llm.loaded.spec.vocab_size)
        await load.first_token(args.context)  # warm up
        lines = [
            f"{'streams':>7}{'plain ms':>10}{'median gap':>12}{'max gap':>10}{'worst':>8}{'prompt ms':>12}{'alone ms':>10}"
        ]
        for n_streams in args.streams:
            rounds, alone = [], []
            for _ in range(args.rounds):
                rounds.append(
                    await load.round(n_streams, args.context, args.plain, args.prompt_len, args.max_new)
                )
                alone.append(await load.first_token(args.prompt_len))
            lines.append(line(n_streams, rounds, median(alone)))
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print the table; gaps are multiples of the plain step."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", help="a checkpoint folder, or demo")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt-len", type=int, default=1920)
    parser.add_argument("--context", type=int, default=128, help="prompt tokens of a stream")
    parser.add_argument(
        "--plain", type=int, default=32, help="tokens of each stream before the prompt arrives"
    )
    parser.add_argument("--max-new", type=int, default=2048, help="tokens of a stream at most")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-num-batched-tokens", type=int, default=2048)
    parser.add_argument("--kv-cache-type", default="slab")
    args = parser.parse_args(argv)
    if args.max_new <= WARM_TOKENS + args.plain:
        parser.error(f"--max-new is {args.max_new}, expected more than {WARM_TOKENS + args.plain}")
    print(asyncio.run(measure(args)))


if __name__ == "__main__":
    main()
