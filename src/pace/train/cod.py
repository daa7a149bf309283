"""What is learnt, laid out: documents packed into sequences, and conditional drop-token (COD) over their anchors.

A row of a draft's pass is a token of a document (depth 0) or a mask. The mask of depth d of the anchor a sees the tokens up
to a and a's masks of depths 1 .. d, stands at position a + d and guesses token a + d + 1: exactly what inference shows it
when a is the last committed token. The chain of an anchor is complete up to its depth, so dropping means choosing how deep
each anchor goes: the anchors of depth d are a random part of those of depth d - 1.

The anchors are the places from which inference drafts: those whose next token is part of an answer. A chain ends with the
answer, and no row is ever built that has no guess to make.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pace.train.data import Document
from pace.train.recipe import Cod

__all__ = ["Packed", "Rows", "lay_out", "pack"]

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Packed:
    """Documents behind one another; none sees another.

    Attributes:
        ids, positions: i64[L]; positions begin at 0 in each document.
        documents: i64[L]: which document a token is of.
        reach: i64[L]: how many tokens behind this one are, without a gap, to be learnt; 0: it is no anchor.
    """

    ids: Ints
    positions: Ints
    documents: Ints
    reach: Ints


@dataclass(frozen=True)
class Rows:
    """A packed sequence with its masks: L tokens, then the masks of depth 1, of depth 2, ...

    Attributes:
        ids, positions, documents: i64[T].
        depths: i64[T]: 0 for tokens.
        anchors: i64[T]: the row of the anchor; of a token its own.
        labels: i64[T]: the token that the row guesses; -1: none.
        n_tokens: L. The guess of row t follows token `anchors[t] + depths[t]`.
    """

    ids: Ints
    positions: Ints
    documents: Ints
    depths: Ints
    anchors: Ints
    labels: Ints
    n_tokens: int


def pack(documents: Sequence[Document], context_len: int) -> list[Packed]:
    """Put documents into as few sequences of at most `context_len` tokens as first-fit-decreasing finds.

    Whole documents only: a document that was cut in two would be learnt without its prompt.
    """
    sizes = [len(document.ids) for document in documents]
    room: list[int] = []
    members: list[list[int]] = []
    open_from = 0  # sequences before it are full
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        at = next((j for j in range(open_from, len(room)) if room[j] >= sizes[i]), len(room))
        if at == len(room):
            room.append(context_len)
            members.append([])
        room[at] -= sizes[i]
        members[at].append(i)
        while open_from < len(room) and room[open_from] < min(sizes):
            open_from += 1
    return [_packed([documents[i] for i in group]) for group in members]


def _packed(documents: Sequence[Document]) -> Packed:
    reach = []
    for document in documents:
        n = len(document.ids)
        at = np.arange(n)
        reach.append(np.where(at >= document.begin - 1, n - 1 - at, 0))
    return Packed(
        np.concatenate([d.ids for d in documents]),
        np.concatenate([np.arange(len(d.ids)) for d in documents]),
        np.concatenate([np.full(len(d.ids), i) for i, d in enumerate(documents)]),
        np.concatenate(reach),
    )


def lay_out(packed: Packed, cod: Cod, mask_id: int, rng: np.random.Generator | None) -> Rows:
    """The rows of one sequence, with a draw of its own.

    Args:
        packed: the sequence.
        cod: how much is kept.
        mask_id: the mask token.
        rng: draws which anchors go deep; None: all go as deep as they can, as in an evaluation.
    """
    n_tokens = len(packed.ids)
    anchors = np.flatnonzero(packed.reach > 0)
    drawn = anchors if rng is None else rng.permutation(anchors)
    # From the deepest on: thinned from above, the sets would lose the anchors near an answer's end once more at each depth.
    chosen = drawn[:0]
    chains, depths = [], []
    for depth in range(cod.k - 1, 0, -1):
        able = drawn[packed.reach[drawn] > depth]  # the others' answer ends before the guess
        n = len(able) if rng is None else round(len(anchors) * cod.kept(depth))
        others = able[~np.isin(able, chosen)]
        chosen = np.concatenate([chosen, others[: n - len(chosen)]])
        chains.append(np.sort(chosen))
        depths.append(np.full(len(chosen), depth))
    chains.append(np.arange(n_tokens))
    depths.append(np.zeros(n_tokens, np.int64))
    chains.reverse()
    depths.reverse()
    anchor, depth_of = np.concatenate(chains), np.concatenate(depths)
    source = np.minimum(anchor + depth_of + 1, n_tokens - 1)
    return Rows(
        np.where(depth_of == 0, packed.ids[anchor], mask_id),
        packed.positions[anchor] + depth_of,
        packed.documents[anchor],
        depth_of,
        anchor,
        np.where(packed.reach[anchor] > depth_of, packed.ids[source], -1),
        n_tokens,
    )
