"""What the sampling kernel is told about every row."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from fakes import DTYPE, VOCAB, Drawn, fake_sample

from pace import ops
from pace.engine.sampler import Sampler, derive_seed
from pace.engine.sequence import Sequence
from pace.params import SamplingParams


def running(
    row: int, prompt: list[int], output: list[int], stop_ids: frozenset[int] = frozenset(), **values: Any
) -> Sequence:
    params = SamplingParams(max_tokens=50, **values)
    seq = Sequence(str(row), np.array(prompt, dtype=np.int32), params, max_output=50, stop_ids=stop_ids)
    seq.seed = 1000 + row
    seq.start(row, 0.0)
    for token in output:
        seq.commit(token)
    return seq


def test_rows_positions_and_histories() -> None:
    seen: list[Any] = []

    def spy(logits: Any, params: Any, history: Any, /) -> Drawn:
        seen.append((params.copy(), history))
        return fake_sample(logits, params, history)

    sampler = Sampler(spy, DTYPE, 8)
    seqs = [
        running(5, [1, 2], [3], temperature=1e-6, top_k=-1),
        running(0, [4], [5, 6], repetition_penalty=1.5, top_k=7, top_p=0.5, min_p=0.25, logprobs=0),
        running(3, [7], [8], frozenset({9, 2}), min_tokens=2, logprobs=4),
        running(
            1, [7], [8, 8], frozenset({9, 2}), min_tokens=2, presence_penalty=1.0, frequency_penalty=-1.0
        ),
        running(2, [7], [8, 8], frozenset({9, 2}), min_tokens=2),
    ]
    for seq in seqs:
        sampler.open(seq)
    sampler.sample(np.zeros((5, VOCAB), np.float32), seqs)
    params, history = seen[0]
    assert params["seed"].tolist() == [1005, 1000, 1003, 1001, 1002]
    assert params["position"].tolist() == [3, 3, 2, 3, 3]
    assert params["temperature"].tolist() == [0.0, 1.0, 1.0, 1.0, 1.0]
    assert params["top_k"].tolist() == [0, 7, 0, 0, 0]
    assert params["top_p"].tolist() == [1.0, 0.5, 1.0, 1.0, 1.0]
    assert params["min_p"].tolist() == [0.0, 0.25, 0.0, 0.0, 0.0]
    assert params["repetition_penalty"].tolist() == [1.0, 1.5, 1.0, 1.0, 1.0]
    assert params["presence_penalty"].tolist() == [0.0, 0.0, 0.0, 1.0, 0.0]
    assert params["frequency_penalty"].tolist() == [0.0, 0.0, 0.0, -1.0, 0.0]
    assert params["n_logprobs"].tolist() == [-1, 0, 4, -1, -1]
    plain = [None if row is None else [part.tolist() for part in row] for row in history]
    assert plain == [None, [[4], [5, 6], []], [[], [], [2, 9]], [[7], [8, 8], []], None]


def test_the_row_is_the_kernels() -> None:
    assert DTYPE.names is not None and set(DTYPE.names) == set(ops.SAMPLE_DTYPE.names or ())


@pytest.mark.parametrize("seed", [0, 1, (1 << 64) - 1])
def test_derived_seeds_are_distinct_and_64_bits_wide(seed: int) -> None:
    seeds = [derive_seed(seed, i) for i in range(1000)] + [
        derive_seed((seed + 1) % (1 << 64), i) for i in range(1000)
    ]
    assert len(set(seeds)) == 2000 and all(0 <= value < 1 << 64 for value in seeds)
    assert max(seeds) > 1 << 63
