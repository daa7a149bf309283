"""The suffix automaton against counting by brute force, over alphabets and texts that make it split and repeat."""

from __future__ import annotations

import itertools
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pace import ops
from pace.ops import SUFFIX_BREAK, SUFFIX_ORDER

Text = tuple[int, ...]


class Oracle:
    """Counts what followed each context by looking at the whole text."""

    def __init__(self, text: Text) -> None:
        self.text = text

    def followers(self, context: Text) -> Counter[int]:
        """How often each token followed `context`; the latest first among equals."""
        n = len(context)
        starts = range(len(self.text) - n - 1, -1, -1)
        return Counter(self.text[i + n] for i in starts if self.text[i : i + n] == context)

    def contexts(self, text: Text, min_match: int) -> list[Text]:
        """Suffixes that were followed by something, longest first; of those that occur at the same places, the longest."""
        found, n_followed = [], 0
        for n in range(min(len(text), SUFFIX_ORDER), min_match - 1, -1):
            followed = self.followers(text[-n:]).total()
            if followed > n_followed:
                found.append(text[-n:])
                n_followed = followed
        return found

    def follow(
        self, context: Text, min_match: int, max_tokens: int, least: float
    ) -> tuple[list[int], list[float]]:
        all_right = 1.0
        tokens: list[int] = []
        confidences: list[float] = []
        while len(tokens) < max_tokens:
            known = self.contexts(context, min_match)
            if not known:
                break
            context = known[0]
            followers = self.followers(context)
            token, count = followers.most_common(1)[0]
            if token == SUFFIX_BREAK:
                break
            confidence = count / (followers.total() + 1 / len(context))
            all_right *= confidence
            if all_right < least:
                break
            tokens.append(token)
            confidences.append(confidence)
            context = (*context, token)[-SUFFIX_ORDER:]
        return tokens, confidences


def ids(text: Text) -> ops.SuffixIndex:
    index = ops.SuffixIndex()
    index.add(np.array(text, np.int32))
    return index


def check(
    text: Text,
    index: ops.SuffixIndex,
    min_match: int,
    max_tokens: int,
    context: Text | None = None,
    least: float = 0.0,
) -> None:
    oracle = Oracle(text)
    given_ids = None if context is None else np.array(context, np.int32)
    got = index.propose(max_tokens, min_match=min_match, least=least, context=given_ids)
    behind = text if context is None else context
    best = [
        oracle.follow(known, min_match, max_tokens, least) for known in oracle.contexts(behind, min_match)
    ]
    expected = [sum(itertools.accumulate(confidences, float.__mul__)) for _, confidences in best]
    if not any(expected):
        assert got == ([], [], 0.0, 0)
        return
    assert got.expected == pytest.approx(max(expected), rel=1e-4)
    tokens, confidences = oracle.follow(behind[-got.match :], min_match, max_tokens, least)
    assert got.token_ids == tokens
    assert got.confidences == pytest.approx(confidences, rel=1e-5)


texts = st.integers(1, 4).flatmap(lambda size: st.lists(st.integers(0, size - 1), max_size=60)).map(tuple)


@given(
    text=texts,
    min_match=st.integers(1, 3),
    max_tokens=st.integers(0, 8),
    cuts=st.lists(st.integers(1, 9), min_size=1),
    least=st.sampled_from([0.0, 0.0, 0.21, 0.43]),
)
def test_it_counts_as_brute_force_does(
    text: Text, min_match: int, max_tokens: int, cuts: list[int], least: float
) -> None:
    """After every part of the text, however it was cut."""
    index, at = ops.SuffixIndex(), 0
    for cut in itertools.cycle(cuts):
        index.add(np.array(text[at : at + cut], np.int32))
        at = min(at + cut, len(text))
        check(text[:at], index, min_match, max_tokens, least=least)
        if at == len(text):
            break
    assert len(index) == len(text)


@given(pieces=st.lists(texts, min_size=1, max_size=4), context=texts, min_match=st.integers(1, 2))
def test_it_continues_a_text_that_is_not_its_own(pieces: list[Text], context: Text, min_match: int) -> None:
    """Many texts in one index: no guess reaches over a break."""
    stream = tuple(token for piece in pieces for token in (*piece, SUFFIX_BREAK))
    index = ids(stream)
    check(stream, index, min_match, 6, context)
    assert SUFFIX_BREAK not in index.propose(200, context=np.array(context, np.int32)).token_ids


@given(
    text=texts,
    past=st.lists(texts, max_size=3),
    cuts=st.lists(st.integers(1, 50), min_size=1, max_size=9),
    least=st.sampled_from([0.0, 0.3]),
)
def test_of_several_indexes_the_one_that_promises_most_is_followed(
    text: Text, past: list[Text], cuts: list[int], least: float
) -> None:
    """As if each were asked alone; the others know the end of the text, in however many parts it came."""
    index, at = ops.SuffixIndex(), 0
    for cut in itertools.cycle(cuts):
        index.add(np.array(text[at : at + cut], np.int32))
        at += cut
        if at >= len(text):
            break
    others = [ids((*piece, SUFFIX_BREAK)) for piece in past]
    context = np.array(text, np.int32)
    known = [one.propose(6, least=least, context=context) for one in (index, *others)]
    by_context = index.propose(6, least=least, context=context, past=others)
    assert by_context == max(known, key=lambda guess: guess.expected)
    known[0] = index.propose(6, least=least)
    assert index.propose(6, least=least, past=others) == max(known, key=lambda guess: guess.expected)


@given(
    parts=st.lists(st.tuples(st.integers(0, 3), texts), min_size=1, max_size=12),
    least=st.sampled_from([0.0, 0.3]),
)
def test_places_in_other_texts_move_with_both(parts: list[tuple[int, Text]], least: float) -> None:
    """A text and three others grow in turns; each time all are asked, as if for the first time."""
    index, *others = (ops.SuffixIndex() for _ in range(4))
    text: list[int] = []
    for which, part in parts:
        if which == 0:
            index.add(np.array(part, np.int32))
            text += part
        else:
            others[which - 1].add(np.array((*part, SUFFIX_BREAK), np.int32))
        fresh = ids(tuple(text)).propose(6, least=least, past=others)
        assert index.propose(6, least=least, past=others) == fresh


@pytest.mark.parametrize("period", [1, 2, SUFFIX_ORDER - 1, SUFFIX_ORDER, SUFFIX_ORDER + 1, 3 * SUFFIX_ORDER])
def test_what_repeats_goes_on_beyond_the_end_of_the_text(period: int) -> None:
    text = tuple(range(period)) * 3
    assert ids(text).propose(200).token_ids == (list(range(period)) * 200)[:200]


@pytest.mark.parametrize(("n", "size"), [(40, 1), (60, 2), (90, 2), (90, 3)])
def test_contexts_longer_than_the_order_are_counted_to_the_order(n: int, size: int) -> None:
    """A long text repeated with changes, whose matches are longer than what is told apart."""
    rng = np.random.default_rng(n + size)
    text = rng.integers(0, size, n)
    again = np.where(rng.random(n) < 0.02, size, text)
    stream = tuple(np.concatenate([text, again, text[: n // 2]]).tolist())
    check(stream, ids(stream), 1, 4)


def test_the_longest_context_is_not_always_the_best() -> None:
    """What came once behind three tokens, and ten times otherwise behind two of them."""
    text = (7, 1, 2, 9) + (8, 1, 2, 3) * 10 + (7, 1, 2)
    guess = ids(text).propose(1)
    assert guess.token_ids == [3] and guess.match == 2
    assert guess.confidences == pytest.approx([10 / 11.5])


def test_among_equals_the_latest_follower_is_guessed() -> None:
    assert ids((1, 5, 1, 6, 1)).propose(1).token_ids == [6]
    assert ids((1, 6, 1, 5, 1)).propose(1).token_ids == [5]


def test_nothing_known_is_no_guess() -> None:
    empty: tuple[list[int], list[float], float, int] = ([], [], 0.0, 0)
    assert ops.SuffixIndex().propose(8) == empty
    assert ids((1, 2, 3)).propose(8) == empty
    assert ids((1, 2, 1)).propose(8, min_match=2) == empty
    assert ids((1, 2, 1)).propose(0) == empty
    assert ids((1, 2, 1)).propose(8, context=np.empty(0, np.int32)) == empty


@pytest.mark.parametrize(
    "text",
    [
        np.zeros(20_000, np.int32),
        np.random.default_rng(1).integers(0, 2, 20_000, np.int32),
        np.random.default_rng(2).integers(0, 100_000, 20_000, np.int32),
        np.concatenate([np.zeros(10_000, np.int32), np.arange(10_000, dtype=np.int32)]),
        np.tile(np.arange(100, dtype=np.int32), 200),
    ],
    ids=["one token", "two tokens", "all different", "a walk over all states", "a period"],
)
def test_a_token_costs_less_than_10_us_and_250_bytes(text: np.ndarray) -> None:
    """CPU time of adding one token and guessing 16, whatever the text."""
    index = ops.SuffixIndex()
    start = time.process_time()
    for i in range(0, len(text), 16):
        index.add(text[i : i + 16])
    added_s = time.process_time() - start
    start = time.process_time()
    for _ in range(200):
        index.propose(16)
    guess_s = time.process_time() - start
    assert added_s / len(text) + guess_s / 200 < 10e-6 * 5  # 5: this machine may be busy, or slow
    assert index.nbytes <= 250 * len(text)


def test_bad_arguments_are_refused() -> None:
    index = ops.SuffixIndex()
    for max_tokens, min_match in ((257, 1), (-1, 1), (1, 0)):
        with pytest.raises(ValueError, match="min_match is"):
            index.propose(max_tokens, min_match=min_match)
    with pytest.raises(ValueError, match="dtype"):
        index.add(np.array([1, 2], np.int64))
