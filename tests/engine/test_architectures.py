"""Law 1 for every architecture, from its checkpoint through the engine: whole prompts, chunks, single tokens, company,
prefix hits and each type of KV cache give the same tokens and log probabilities, to the last bit.

Prompts are longer than every window and than every chunk that a step reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
from golden import families, tiny

from pace import ops
from pace.config import KV_CACHE_TYPES, EngineConfig
from pace.engine.core import Engine
from pace.engine.loader import load
from pace.models.registry import architectures
from pace.outputs import Logprob, RequestOutput
from pace.params import SamplingParams

CASES = sorted(families.CASES)
MAX_LEN = 64
PARAMS = SamplingParams(
    temperature=0.0, max_tokens=6, ignore_eos=True, logprobs=2, prompt_logprobs=2, detokenize=False
)
PLAIN = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True, logprobs=2, detokenize=False)

Result = tuple[list[int], list[dict[int, Logprob]] | None, list[dict[int, Logprob] | None] | None]
Write = Callable[[str], Path]


@pytest.fixture(scope="module")
def write(tmp_path_factory: pytest.TempPathFactory) -> Write:
    """write(name): a case's checkpoint, once."""
    return cache(lambda name: tiny.write(name, tmp_path_factory.mktemp("family"), families.CASES[name]))


@contextmanager
def engine(
    directory: Path, kind: str, rows: int, seqs: int, prefix_caching: bool = False
) -> Iterator[Engine]:
    """The engine that users get: at most `rows` rows and `seqs` sequences in a step."""
    config = EngineConfig(
        str(directory),
        max_model_len=MAX_LEN,
        max_num_seqs=seqs,
        max_num_batched_tokens=rows,
        kv_cache_type=kind,
        block_size=16 if kind == "paged" else 32,
        enable_prefix_caching=kind != "contiguous",
        n_threads=2,
    )
    loaded = load(config, skip_tokenizer=True, show_progress=False)
    try:
        yield loaded.engine
    finally:
        loaded.close()


def prompts(name: str) -> list[list[int]]:
    """One of 48 tokens, one that leaves it after 40, and a short one."""
    whole = tiny.prompt(name, families.VOCAB_SIZE)
    return [whole, [*whole[:40], *whole[:5]], whole[7:20]]


def run(engine: Engine, asked: list[list[int]], params: SamplingParams = PARAMS) -> list[Result]:
    """All prompts together; the second arrives when the first has been read in part."""
    done: dict[str, RequestOutput] = {}
    arrivals = dict(enumerate(asked))
    tick = 0
    while arrivals or engine.has_unfinished:
        if tick % 3 == 0 and arrivals:
            i = min(arrivals)
            engine.add_request(str(i), arrivals.pop(i), params)
        done.update((output.request_id, output) for output in engine.step())
        tick += 1
    results = []
    for i in range(len(asked)):
        output = done[str(i)]
        (completion,) = output.outputs
        assert completion.finish_reason == "length", completion.stop_reason
        results.append((list(completion.token_ids), completion.logprobs, output.prompt_logprobs))
    assert engine.stats()["n_repeated_steps"] == 0
    return results


def alone(directory: Path, asked: list[list[int]]) -> list[Result]:
    """Each prompt by itself, whole, in blocks of 16."""
    with engine(directory, "paged", MAX_LEN, 1) as one:
        return [run(one, [prompt])[0] for prompt in asked]


def test_every_architecture_has_a_case() -> None:
    assert {families.CASES[name].config["architectures"][0] for name in CASES} == set(architectures())


@pytest.mark.parametrize("name", CASES)
def test_the_engine_says_the_same_however_a_prompt_is_fed(name: str, write: Write) -> None:
    asked = prompts(name)
    truth = alone(write(name), asked)
    # Who asks for log probabilities of a prompt reads all of it; the others find it, to the token.
    wanted = [(tokens, logprobs, None) for tokens, logprobs, _ in truth]
    for kind in KV_CACHE_TYPES:
        with engine(write(name), kind, 9, 3) as crowd:
            assert run(crowd, asked) == truth, f"{kind}, in chunks and in company"
            if kind != "contiguous":
                assert run(crowd, asked, PLAIN) == wanted, f"{kind}, from the prefix cache"
                assert crowd.stats()["n_cached_tokens"] > 40


@pytest.mark.parametrize("architecture", sorted(architectures()))
def test_so_it_does_token_by_token_and_on_another_tier(architecture: str, write: Write) -> None:
    """One case of each, where the machine has it on the lowest tier."""
    name = next(n for n in CASES if families.CASES[n].config["architectures"] == [architecture])
    asked = prompts(name)[:1]
    kind = KV_CACHE_TYPES[tiny.seed_of(name) % 3]
    with ops.using_isa(ops.isas()[-1]):
        truth = alone(write(name), asked)
        with engine(write(name), kind, 1, 1) as single:
            assert run(single, asked) == truth, f"{kind}, token by token"
