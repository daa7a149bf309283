"""Rows of conditional drop-token: how many, whose, and what they guess."""

from __future__ import annotations

import numpy as np
import pytest

from pace.train.cod import Rows, lay_out, pack
from pace.train.data import Document
from pace.train.recipe import Cod

MASK, EOS = 2, 3


def document(n: int, begin: int, seed: int = 0) -> Document:
    ids = np.random.default_rng(seed).integers(10, 99, n)
    ids[-1] = EOS
    return Document(ids, begin)


def laid_out(documents: list[Document], cod: Cod, seed: int | None = 1) -> Rows:
    (packed,) = pack(documents, sum(len(d.ids) for d in documents))
    return lay_out(packed, cod, MASK, None if seed is None else np.random.default_rng(seed))


def anchors_by_depth(rows: Rows, k: int) -> list[set[int]]:
    return [set(rows.anchors[(rows.depths == depth) & (rows.labels >= 0)].tolist()) for depth in range(k)]


@pytest.mark.parametrize(
    ("k", "retention", "low", "factor"),
    [
        (8, 0.7, 0.2, 3.373),
        (8, 0.5, 0.0, 1.992),
        (16, 0.7, 0.1, 3.959),
        (4, 1.0, 1.0, 4.0),
        (1, 0.7, 0.2, 1.0),
    ],
)
def test_the_number_of_guesses_is_that_of_the_formula(
    k: int, retention: float, low: float, factor: float
) -> None:
    cod = Cod(k=k, retention=retention, min_retention=low)
    assert sum(cod.kept(depth) for depth in range(k)) == pytest.approx(factor, abs=0.001)
    rows = laid_out([document(1501, 501), document(1001, 1)], cod)
    n_anchors = 1000 + 1000
    assert (rows.labels >= 0).sum() == pytest.approx(n_anchors * factor, rel=0.01)
    for depth, anchors in enumerate(anchors_by_depth(rows, k)):
        assert len(anchors) == pytest.approx(n_anchors * cod.kept(depth), rel=0.01, abs=0.5)


def test_anchors_are_nested_so_that_every_chain_is_whole() -> None:
    by_depth = anchors_by_depth(laid_out([document(300, 40), document(20, 5)], Cod()), 8)
    for deeper, before in zip(by_depth[1:], by_depth[:-1], strict=True):
        assert deeper <= before  # equal where min_retention holds
    assert by_depth[4] < by_depth[3] < by_depth[2] < by_depth[1] < by_depth[0]


def test_a_row_stands_where_inference_puts_it_and_guesses_what_follows() -> None:
    documents = [document(60, 20, 1), document(35, 9, 2)]
    rows = laid_out(documents, Cod())
    joined = np.concatenate([d.ids for d in documents])
    starts = np.array([0, 60])
    assert rows.n_tokens == 95 and (rows.ids[:95] == joined).all() and (rows.ids[95:] == MASK).all()
    begins = starts[rows.documents]
    assert (rows.positions == rows.anchors - begins + rows.depths).all()
    guessing = rows.labels >= 0
    assert (rows.labels[guessing] == joined[(rows.anchors + rows.depths + 1)[guessing]]).all()
    assert guessing[95:].all(), "no mask is computed for nothing"


def test_nothing_is_anchored_before_the_answer_or_across_documents() -> None:
    """Trap: the public trainer builds rows before the first token, and wraps around to the end of the sequence."""
    for seed in range(20):
        rows = laid_out([document(60, 20, 1), document(35, 9, 2)], Cod(), seed)
        for anchor, depth in zip(rows.anchors[rows.labels >= 0], rows.depths[rows.labels >= 0], strict=True):
            assert (anchor >= 19 and anchor + depth + 1 < 60) or (
                anchor >= 60 + 8 and anchor + depth + 1 < 95
            )


def test_the_end_token_is_guessed_at_masks_too() -> None:
    """Trap: with pad = eos, the public trainer ignores every EOS label."""
    rows = laid_out([document(40, 10)], Cod(retention=1.0))
    assert set(rows.depths[rows.labels == EOS].tolist()) == set(range(8))


def test_the_last_row_has_its_guess() -> None:
    """Trap: the public trainer's roll of labels loses the last kept row's."""
    rows = laid_out([document(40, 10)], Cod())
    assert rows.labels[-1] >= 0 and rows.labels[38] == EOS and rows.labels[39] == -1


def test_every_sequence_has_a_draw_of_its_own() -> None:
    """Trap: the public trainer draws once for a whole batch."""
    cod = Cod()
    (packed,) = pack([document(200, 10)], 200)
    rng = np.random.default_rng(0)
    first, second = lay_out(packed, cod, MASK, rng), lay_out(packed, cod, MASK, rng)
    assert anchors_by_depth(first, 8)[0] == anchors_by_depth(second, 8)[0]
    assert anchors_by_depth(first, 8)[1] != anchors_by_depth(second, 8)[1]


def test_an_evaluation_keeps_every_chain() -> None:
    rows = laid_out([document(40, 10)], Cod(), seed=None)
    assert [len(anchors) for anchors in anchors_by_depth(rows, 8)] == [30, 29, 28, 27, 26, 25, 24, 23]


def test_packing_keeps_documents_whole_and_fills_sequences() -> None:
    rng = np.random.default_rng(3)
    documents = [document(int(n), 1, i) for i, n in enumerate(rng.integers(5, 60, 200))]
    sequences = pack(documents, 64)
    assert all(len(packed.ids) <= 64 for packed in sequences)
    pieces = [
        packed.ids[packed.documents == i].tolist()
        for packed in sequences
        for i in range(int(packed.documents[-1]) + 1)
    ]
    assert sorted(pieces) == sorted(d.ids.tolist() for d in documents)
    assert sum(len(packed.ids) for packed in sequences) > 0.85 * 64 * len(sequences)
    for packed in sequences:
        starts = np.flatnonzero(packed.positions == 0)
        assert len(starts) == packed.documents[-1] + 1
