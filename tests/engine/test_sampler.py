"""What the sampling kernel is told about every row."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from engine.fakes import DTYPE, VOCAB, Drawn, fake_logprobs, fake_sample

from pace import ops
from pace.engine.sampler import Constraints, History, Sampler, bad_word_ids, derive_seed
from pace.engine.sequence import Sequence
from pace.errors import RequestError
from pace.params import SamplingParams

NOTHING: dict[str, list[float]] = {field: [] for field in History._fields if field != "mask"}


def running(
    row: int, prompt: list[int], output: list[int], stop_ids: frozenset[int] = frozenset(), **values: Any
) -> Sequence:
    params = SamplingParams(max_tokens=50, **values)
    seq = Sequence(str(row), np.array(prompt, dtype=np.int32), params, max_output=50, stop_ids=stop_ids)
    seq.seed = 1000 + row
    seq.start(row, 0)
    for token in output:
        seq.commit(token)
    return seq


def test_rows_positions_and_histories() -> None:
    seen: list[Any] = []

    def spy(logits: Any, params: Any, history: Any, /) -> Drawn:
        seen.append((params.copy(), history))
        return fake_sample(logits, params, history)

    sampler = Sampler(spy, fake_logprobs, DTYPE, 8)
    seqs = [
        running(5, [1, 2], [3], temperature=1e-6, top_k=-1),
        running(0, [4], [5, 6], repetition_penalty=1.5, top_k=7, top_p=0.5, min_p=0.25, logprobs=0),
        running(3, [7], [8], frozenset({9, 2}), min_tokens=2, logprobs=4),
        running(
            1, [7], [8, 8], frozenset({9, 2}), min_tokens=2, presence_penalty=1.0, frequency_penalty=-1.0
        ),
        running(2, [7], [8, 8], frozenset({9, 2}), min_tokens=2),
    ]
    seqs[1].index = 6
    for seq in seqs:
        sampler.open(seq)
    sampler.sample(np.zeros((5, VOCAB), np.float32), seqs)
    params, history = seen[0]
    assert params["seed"].tolist() == [1005, 1000, 1003, 1001, 1002]
    assert params["position"].tolist() == [3, 3, 2, 3, 3]
    assert params["sample_index"].tolist() == [0, 6, 0, 0, 0]
    assert params["temperature"].tolist() == [0.0, 1.0, 1.0, 1.0, 1.0]
    assert params["top_k"].tolist() == [0, 7, 0, 0, 0]
    assert params["top_p"].tolist() == [1.0, 0.5, 1.0, 1.0, 1.0]
    assert params["min_p"].tolist() == [0.0, 0.25, 0.0, 0.0, 0.0]
    assert params["repetition_penalty"].tolist() == [1.0, 1.5, 1.0, 1.0, 1.0]
    assert params["presence_penalty"].tolist() == [0.0, 0.0, 0.0, 1.0, 0.0]
    assert params["frequency_penalty"].tolist() == [0.0, 0.0, 0.0, -1.0, 0.0]
    assert params["n_logprobs"].tolist() == [-1, 0, 4, -1, -1]
    plain = [None if row is None else [part.tolist() for part in row[:3]] for row in history]
    assert plain == [None, [[4], [5, 6], []], [[], [], [2, 9]], [[7], [8, 8], []], None]


def history(
    params: SamplingParams,
    prompt: list[int],
    output: list[int],
    stop_ids: frozenset[int] = frozenset(),
    bad_word_ids: tuple[tuple[int, ...], ...] = (),
) -> dict[str, list[float]] | None:
    """What the sampler is told before the token after prompt and output; the array has room beyond them."""
    tokens = np.array([*prompt, *output, 1, 2, 3], np.int32)
    found = Constraints(params, stop_ids, bad_word_ids).history(
        tokens, len(prompt), len(prompt) + len(output)
    )
    if found is None:
        return None
    assert found.mask is None, "no grammar here"
    parts: dict[str, Any] = {name: part for name, part in found._asdict().items() if name != "mask"}
    assert {part.dtype for name, part in parts.items() if name != "bias"} == {np.dtype(np.int32)}
    assert found.bias.dtype == np.float32
    return {name: part.tolist() for name, part in parts.items()}


def test_the_usual_request_has_no_history() -> None:
    params = SamplingParams(
        temperature=0.5, top_p=0.9, top_k=5, min_p=0.1, logprobs=2, prompt_logprobs=1, n=2
    )
    assert history(params, [1], [2], stop_ids=frozenset({9})) is None
    assert history(SamplingParams(min_tokens=2), [1], [], stop_ids=frozenset()) is None, "nothing to ban"


def test_stop_ids_are_banned_before_min_tokens() -> None:
    params = SamplingParams(min_tokens=2)
    for output, banned in (([], [3, 9]), ([9], [3, 9])):
        assert history(params, [1, 1, 1], output, frozenset({9, 3})) == {**NOTHING, "banned": banned}
    assert history(params, [1], [5, 5], frozenset({9, 3})) is None


def test_bias_and_allowed_ids() -> None:
    params = SamplingParams(logit_bias={4: 0.5, 2: -100}, allowed_token_ids=[7, 5])
    expected = {**NOTHING, "bias_ids": [4, 2], "bias": [0.5, -100.0], "allowed": [7, 5]}
    assert history(params, [1], [2]) == expected
    assert history(SamplingParams(logit_bias={}), [1], [2]) is None


def test_penalties_see_the_tokens() -> None:
    for name in ("repetition_penalty", "presence_penalty", "frequency_penalty"):
        params = SamplingParams(**{name: 0.5})  # type: ignore[arg-type]  # each is a number
        assert history(params, [1, 2], [3]) == {**NOTHING, "prompt": [1, 2], "output": [3]}


def test_bad_words_ban_their_last_token() -> None:
    words = ((5,), (6, 7), (1, 6, 8), (2, 2, 9), (6, 4))
    params = SamplingParams()
    for output, banned in (
        ([], [5]),
        ([6], [5, 7, 4]),
        ([1, 6], [5, 7, 8, 4]),
        ([2], [5]),
        ([2, 2], [5, 9]),
        ([2, 2, 2], [5, 9]),
        ([6, 3], [5]),
    ):
        found = history(params, [1, 6], output, bad_word_ids=words)
        assert found is not None and sorted(found["banned"]) == sorted(banned), output
        assert found["prompt"] == found["output"] == []
    assert history(params, [6], [], bad_word_ids=((6, 7),)) is None, "the prompt doesn't begin a bad word"
    assert history(params, [6], [6], bad_word_ids=((6, 7),)) == {**NOTHING, "banned": [7]}


def test_stops_and_bad_words_add_up() -> None:
    found = history(SamplingParams(min_tokens=5), [1], [6], frozenset({3}), ((5,), (6, 7)))
    assert found is not None and found["banned"] == [3, 5, 7]


class SpaceTokenizer:
    """A letter is a token, and so is a space with the letter behind it."""

    def encode_batch(self, texts: list[str], *, add_special_tokens: bool) -> list[list[int]]:
        assert not add_special_tokens
        return [
            [
                ord(char) + 1000 * (i > 0 and text[i - 1] == " ")
                for i, char in enumerate(text)
                if char not in " \0"
            ]
            for text in texts
        ]


def test_bad_words_are_encoded_bare_and_after_a_space() -> None:
    tokenizer: Any = SpaceTokenizer()
    a, b = ord("a"), ord("b")
    assert bad_word_ids(tokenizer, ["a", " ab", "a"]) == ((a,), (a + 1000,), (a, b), (a + 1000, b))
    assert bad_word_ids(tokenizer, []) == ()
    with pytest.raises(RequestError, match=r"bad_words has '\\x00', which the tokenizer gives no token"):
        bad_word_ids(tokenizer, ["\0"])


def test_prompt_tokens_are_scored() -> None:
    logits = np.random.default_rng(0).standard_normal((3, VOCAB)).astype(np.float32)
    tokens = np.array([5, 6, 7], np.int32)
    found = Sampler(fake_sample, fake_logprobs, DTYPE, 1).prompt_logprobs(logits, tokens, 2)
    assert found.top_ids.shape == (3, 2) and (found.logprobs <= found.top_logprobs[:, 0]).all()


def test_errors_are_explained() -> None:
    with_team = ops.Team(1)
    logits = np.zeros((2, 8), np.float32)
    logits[1] = np.nan
    params = np.zeros(2, ops.SAMPLE_DTYPE)
    ids = np.empty(0, np.int32)
    banned = History(ids, ids, np.arange(8, dtype=np.int32), ids, np.empty(0, np.float32), ids)
    errors = ops.sample(with_team, logits, params, [banned, None]).errors
    with_team.close()
    assert str(Sampler.explain(errors[0])).startswith(
        "no token is left to draw: structured_outputs, allowed_token_ids"
    )
    assert str(Sampler.explain(errors[1])).startswith("the logits hold NaN")


def test_the_row_is_the_kernels() -> None:
    assert DTYPE.names is not None and set(DTYPE.names) == set(ops.SAMPLE_DTYPE.names or ())


@pytest.mark.parametrize("seed", [0, 1, (1 << 64) - 1])
def test_derived_seeds_are_distinct_and_64_bits_wide(seed: int) -> None:
    seeds = [derive_seed(seed, i) for i in range(1000)] + [
        derive_seed((seed + 1) % (1 << 64), i) for i in range(1000)
    ]
    assert len(set(seeds)) == 2000 and all(0 <= value < 1 << 64 for value in seeds)
    assert max(seeds) > 1 << 63


# ---- ids that have no token

UNUSED = np.array([60, 61, 62, 63], np.int32)


def real_sampler(team: ops.Team, unused: Any = UNUSED) -> Sampler:
    def sample(logits: Any, params: Any, history: Any, /) -> Any:
        return ops.sample(team, logits, params, history)

    return Sampler(sample, fake_logprobs, ops.SAMPLE_DTYPE, 8, unused_ids=unused)


def test_ids_without_a_token_are_never_drawn(team: ops.Team) -> None:
    """Qwen, Phi and others pad their vocabulary; a padded row's logit may be anything."""
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((6, 64)).astype(np.float32)
    logits[:5, 61] = [3e38, 100, 100, 100, -100]
    logits[5, 60:] = -100
    seqs = [
        running(0, [1], [], temperature=0.0),
        running(1, [1], [], temperature=1.0),
        running(2, [1], [2], temperature=0.7, top_k=4, repetition_penalty=1.2, logprobs=2),
        running(3, [1], [], temperature=0.0, logit_bias={61: 100.0, 7: 1.0}, bad_words=None),
        running(4, [1], [], temperature=0.0),
        running(5, [1], [], temperature=1.0),
    ]
    sampler = real_sampler(team)
    for seq in seqs:
        sampler.open(seq)
    tokens = sampler.sample(logits, seqs).tokens.tolist()
    assert not set(tokens) & set(UNUSED.tolist())
    assert tokens[0] == logits[0, :60].argmax() and tokens[4] == logits[4, :60].argmax()

    # The others draw what they draw beside anybody (law 1).
    alone = real_sampler(team, UNUSED[:0])
    for seq in seqs:
        alone.open(seq)
    assert alone.sample(logits[5:], seqs[5:]).tokens.tolist() == tokens[5:]
    for i, seq in enumerate(seqs):
        assert sampler.sample(logits[i : i + 1], [seq]).tokens.tolist() == [tokens[i]]


def test_a_request_that_allows_unused_ids_only_has_nothing_to_draw(team: ops.Team) -> None:
    sampler = real_sampler(team)
    seq = running(0, [1], [], temperature=0.0, allowed_token_ids=[60, 61])
    sampler.open(seq)
    result = sampler.sample(np.zeros((1, 64), np.float32), [seq])
    assert "no token is left" in str(sampler.explain(int(result.errors[0])))
