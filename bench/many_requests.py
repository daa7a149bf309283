"""What thousands of requests cost the engine around the model: memory, time, steps that others wait for, cached tokens.

    python bench/many_requests.py [DIRECTORY] [--only queue aborts slope chats urgent] [--scale 0.01]

Without a directory the weights are invented, of a shape small enough that the engine's own time shows. The engine is
stepped by hand, in one thread. Counts of tokens and steps are exact; times want a quiet machine. Prints Markdown.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from pace.config import EngineConfig
from pace.engine.core import Engine
from pace.engine.loader import load
from pace.outputs import RequestOutput
from pace.params import SamplingParams

SHAPE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 8192,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
N_RUNNING = 32
N_PROMPT = 1000  # tokens of a queued prompt
SYSTEM, OWN, ANSWER, NEXT = (
    300,
    127,
    30,
    21,
)  # tokens of a chat: system prompt, first question, answer, second question

Row = tuple[str, str, str]


class Bench:
    """Makes engines over one model, and what they are asked.

    Args:
        directory: a checkpoint; None: `SHAPE` with invented weights.
        scale: multiplies the numbers of requests.
    """

    def __init__(self, directory: str | None, scale: float) -> None:
        self.invented = directory is None
        self.directory = tempfile.mkdtemp() if directory is None else directory
        if self.invented:
            Path(self.directory, "config.json").write_text(json.dumps(SHAPE))
        self.scale = scale
        self.rng = np.random.default_rng(0)

    def n(self, number: int) -> int:
        return max(2, int(number * self.scale))

    @contextmanager
    def engine(self, max_model_len: int, **options: Any) -> Iterator[Engine]:
        config = EngineConfig(model=self.directory, max_model_len=max_model_len, **options)
        loaded = load(config, show_progress=False, skip_tokenizer=True, random_weights=self.invented)
        try:
            yield loaded.engine
        finally:
            loaded.close()

    def ids(self, engine: Engine, n: int) -> Any:
        return self.rng.integers(0, engine.preparer.vocab_size, n, dtype=np.int32)

    def queue(self) -> list[Row]:
        """What it takes to accept a request and to keep it."""
        n = self.n(20_000)
        with self.engine(N_PROMPT + 100, kv_cache_memory=64 << 20) as engine:
            prompts = [self.ids(engine, N_PROMPT) for _ in range(n)]
            gc.collect()
            before, start = resident(), time.thread_time()
            for i, prompt in enumerate(prompts):
                engine.add_request(str(i), prompt, params(16))
            us = (time.thread_time() - start) / n * 1e6
            size = (resident() - before) / n - 4 * N_PROMPT
        return [
            (f"{n} prompts of {N_PROMPT} tokens queued, CPU time of each", f"{us:.1f} us", "20"),
            ("memory of each, beside 4 bytes per token", f"{size / 1024:.2f} KiB", "6"),
        ]

    def aborts(self) -> list[Row]:
        """Steps of running sequences while a whole queue is aborted at once."""
        n, ratios, plains = self.n(20_000), [], []
        with self.engine(1024, max_num_seqs=N_RUNNING) as engine:
            for _ in range(5):
                for i in range(N_RUNNING):
                    engine.add_request(f"runs {i}", self.ids(engine, 8), params(1000))
                while engine.stats()["n_running"] < N_RUNNING:
                    engine.step()
                for i in range(n):
                    engine.add_request(str(i), self.ids(engine, 20), params(16))
                gc.collect()  # or the full collection that 20 000 new objects bring falls into any of these steps
                plain = [timed(engine) for _ in range(60)][10:]
                for i in range(n):
                    engine.abort(str(i))
                busy = []
                while engine.stats()["n_requests"] > N_RUNNING:
                    busy.append(timed(engine))
                ratios.append(max(busy) / median(plain))
                plains.append(max(plain) / median(plain))
                for i in range(N_RUNNING):
                    engine.abort(f"runs {i}")
                drain(engine)
        return [
            (
                f"{n} aborted at once beside {N_RUNNING} running: longest step (median of 5 rounds)",
                f"{median(ratios):.2f} plain ones (the longest of 50 plain ones: {median(plains):.2f})",
                "1.5",
            )
        ]

    def slope(self) -> list[Row]:
        """Memory while short requests come and go."""
        n, sizes = self.n(200_000), []
        with self.engine(64, max_num_seqs=N_RUNNING, kv_cache_memory=16 << 20) as engine:
            for part in range(10):
                for i in range(n // 10):
                    engine.add_request(f"{part} {i}", self.ids(engine, 4), params(2))
                    if i % 64 == 63:
                        drain(engine)
                drain(engine)
                gc.collect()
                sizes.append(resident())
        per_thousand = np.polyfit(range(len(sizes[2:])), sizes[2:], 1)[0] / (n / 10) * 1000
        return [(f"{n} short requests: memory per 1000", f"{per_thousand / 1024:.2f} KiB", "0")]

    def chats(self) -> list[Row]:
        """Cached tokens of second turns of many chats with one system prompt."""
        rows = []
        for kind in ("slab", "paged", "contiguous"):
            for n in (64, self.n(1000)):
                shareable, cached = self.second_turns(kind, n)
                rows.append(
                    (
                        f"{n} chats, second turn of {SYSTEM + OWN + ANSWER + NEXT} tokens, {kind}",
                        f"{cached / n:.0f} cached of {shareable / n:.0f} ({100 * cached / shareable:.1f} %)",
                        "0, nothing is shared" if kind == "contiguous" else "95 %",
                    )
                )
        return rows

    def second_turns(self, kind: str, n: int) -> tuple[int, int]:
        with self.engine(1024, kv_cache_type=kind, kv_cache_memory=(n + 40) * 1024 * 2048) as engine:
            system = self.ids(engine, SYSTEM)
            chats = [np.concatenate([system, self.ids(engine, OWN)]) for _ in range(n)]
            answers = self.ask(engine, chats, ANSWER)
            for i, answer in enumerate(answers):
                reply = answer.outputs[0].token_ids
                chats[i] = np.concatenate([chats[i], np.array(reply, np.int32), self.ids(engine, NEXT)])
            # The last token of an answer was drawn and never run.
            return n * (SYSTEM + OWN + ANSWER - 1), sum(
                answer.num_cached_tokens for answer in self.ask(engine, chats, 1)
            )

    def ask(self, engine: Engine, prompts: Sequence[Any], n_output: int) -> list[RequestOutput]:
        for i, prompt in enumerate(prompts):
            engine.add_request(str(i), prompt, params(n_output))
        found = drain(engine)
        return [found[str(i)] for i in range(len(prompts))]

    def urgent(self) -> list[Row]:
        """A short request of a better priority while long prompts are read."""
        rows = []
        with self.engine(40_000 if self.scale == 1 else 2048, kv_cache_memory=512 << 20) as engine:
            self.first_token(engine)
            alone, _ = self.first_token(engine)
            rows.append(("first token of 20 tokens of a better priority, alone", f"{alone * 1e3:.1f} ms", ""))
            for n in (self.n(8192), self.n(32768)):
                engine.add_request("long", self.ids(engine, n), params(1))
                engine.step()
                seconds, n_steps = self.first_token(engine)
                engine.abort("long")
                drain(engine)
                rows.append((f"behind a prompt of {n}", f"{seconds * 1e3:.1f} ms, {n_steps} step", "1 step"))
        return rows

    def first_token(self, engine: Engine) -> tuple[float, int]:
        """Seconds and steps from the arrival to the first token."""
        start, n_before = time.perf_counter(), engine.stats()["n_steps"]
        engine.add_request("urgent", self.ids(engine, 20), params(1), priority=-10)
        while all(output.request_id != "urgent" for output in engine.step()):
            pass
        return time.perf_counter() - start, engine.stats()["n_steps"] - n_before


SHARED: dict[int, SamplingParams] = {}


def params(n_output: int) -> SamplingParams:
    """Greedy, one object for all requests of a length."""
    if n_output not in SHARED:
        SHARED[n_output] = SamplingParams(
            temperature=0.0, max_tokens=n_output, ignore_eos=True, detokenize=False
        )
    return SHARED[n_output]


def timed(engine: Engine) -> float:
    start = time.perf_counter()
    engine.step()
    return time.perf_counter() - start


def drain(engine: Engine) -> dict[str, RequestOutput]:
    """Step until nothing is left."""
    found = {}
    while engine.has_unfinished:
        for output in engine.step():
            found[output.request_id] = output
    return found


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    names = ("queue", "aborts", "slope", "chats", "urgent")
    parser.add_argument("model", nargs="?", help="a checkpoint folder, or demo; default: invented weights")
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--scale", type=float, default=1.0, help="of the numbers of requests")
    args = parser.parse_args(argv)
    bench = Bench(args.model, args.scale)
    print("| what | measured | aim |\n|---|---|---|")
    for name in args.only:
        section: Callable[[], list[Row]] = getattr(bench, name)
        for row in section():
            print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
