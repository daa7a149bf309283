"""PARD: what masks mean, and that nothing of them stays."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from ext.kit import Packed
from golden import tiny

from pace import ops
from pace.engine.sequence import Sequence
from pace.kvcache import make_tables
from pace.params import SamplingParams
from pace.speculative.pard import PardDrafter
from pace.speculative.reader import DraftReader, Part

MASK, MAX_LEN, N_BLOCKS, SIZE = tiny.VOCAB_SIZE - 1, 300, 40, 32
CACHES = [("slab", "bf16"), ("paged", "bf16"), ("contiguous", "bf16"), ("slab", "int8")]


def make_reader(
    packed: Packed, team: ops.Team, kind: str = "slab", dtype: str = "bf16", max_tokens: int = 64
) -> DraftReader:
    size = 16 if kind == "paged" else SIZE
    plan = packed.model.plan
    (group,) = plan.groups()
    layer = group.layer
    contiguous = kind == "contiguous"
    pool = ops.KVPool(
        len(group.layers), layer.n_kv_heads, layer.head_dim, N_BLOCKS, size, dtype, contiguous=contiguous
    )
    runner = ops.Plan(team, plan, packed.weights, pool, max_tokens, 4, 64)
    tables = make_tables(kind, N_BLOCKS, size, 4, MAX_LEN, copy=pool.copy, prefix_caching=True)
    return DraftReader(
        runner,
        tables,
        ops.SAMPLE_DTYPE,
        vocab_size=tiny.VOCAB_SIZE,
        max_tokens=max_tokens,
        max_seqs=4,
        max_logit_rows=64,
        max_len=MAX_LEN,
        never=np.array([MASK], np.int32),
        prefix_caching=kind != "contiguous",
    )


def sequence(n: int, name: str = "a", fill: int = 7) -> Sequence:
    """A sequence that decodes."""
    prompt = np.random.default_rng(fill).integers(0, MASK, n).astype(np.int32)
    seq = Sequence(name, prompt, SamplingParams(max_tokens=40, detokenize=False), max_output=40)
    seq.start(0, n - 1)
    return seq


@pytest.fixture
def packed(packed_model: Callable[[str], Packed]) -> Packed:
    return packed_model("llama-gqa4-tied")


@pytest.mark.parametrize(("kind", "dtype"), CACHES)
@pytest.mark.parametrize("k", [1, 2, 3, 8, 12, 16])
def test_one_pass_with_masks_is_many_with_fewer(
    packed: Packed, team: ops.Team, kind: str, dtype: str, k: int
) -> None:
    """Row i of the last token and K - 1 masks is the last row behind i masks, to the last bit."""
    seq = sequence(45)
    reader = make_reader(packed, team, kind, dtype)
    (reading,) = reader.find([seq])
    assert reader.extend(Part(reading, 0, 45, [MASK] * (k - 1), k))
    together = np.array(logits_of(reader, Part(reading, 0, 45, [MASK] * (k - 1), k)))
    for i in range(k):
        other = make_reader(packed, team, kind, dtype)
        (alone,) = other.find([seq])
        part = Part(alone, 0, 45, [MASK] * i, 1)
        assert other.extend(part)
        assert logits_of(other, part)[0].tobytes() == together[i].tobytes()


def logits_of(reader: DraftReader, part: Part) -> np.ndarray:
    """The logits of one part's pass."""
    found = []
    sample = reader._sample

    def keep(logits: np.ndarray, *rest: object) -> object:
        found.append(np.array(logits))
        return sample(logits, *rest)

    reader._sample = keep
    reader.run([part])
    reader._sample = sample
    return found[0]


@pytest.mark.parametrize(("kind", "dtype"), CACHES)
def test_no_mask_is_visible_after_its_round(packed: Packed, team: ops.Team, kind: str, dtype: str) -> None:
    """Guesses of a drafter whose masks and more lie behind every sequence are those of one that never saw a mask."""
    k = 6
    seqs = [sequence(45), sequence(20, "b", 8), sequence(31, "c", 9)]
    reader = make_reader(packed, team, kind, dtype, max_tokens=160)
    drafter = PardDrafter(reader, MASK, k)
    for _ in range(6):
        proposals = drafter.propose(dict.fromkeys(seqs, k))
        for seq in seqs:
            reading = reader._readings[seq]
            assert reading.n_read == seq.n_tokens, "masks are not read tokens"
            fresh = PardDrafter(make_reader(packed, team, kind, dtype), MASK, k)
            assert fresh.propose({seq: k})[seq].token_ids == proposals[seq].token_ids
            poison = Part(reading, reading.n_read, 0, list(range(40, 40 + k)), 0)
            assert reader.extend(poison)
            reader.run([poison])
        for n_new, seq in enumerate(seqs, 1):
            for token in proposals[seq].token_ids[:n_new]:
                seq.commit(token)
    for seq in seqs:
        drafter.end(seq)
    assert reader.tables.n_open == 0


def test_the_mask_is_never_guessed(packed: Packed, team: ops.Team) -> None:
    seq = sequence(45)
    plain = PardDrafter(make_reader(packed, team), MASK, 4).propose({seq: 4})[seq].token_ids
    reader = make_reader(packed, team)
    reader._never = np.array([plain[1]], np.int32)
    reader._is_never[plain[1]] = True
    assert plain[1] not in PardDrafter(reader, MASK, 4).propose({seq: 4})[seq].token_ids


def test_a_prompt_is_read_as_the_target_reads_it_and_decoding_comes_first(
    packed: Packed, team: ops.Team
) -> None:
    reader = make_reader(packed, team, max_tokens=32)
    drafter = PardDrafter(reader, MASK, 4)
    decodes, reads = sequence(20), sequence(100, "b", 8)
    reads.n_computed = 30
    assert set(drafter.propose({reads: 0, decodes: 4})) == {decodes}
    assert reader._readings[decodes].n_read == 20
    assert reader._readings[reads].n_read == 32 - 23
    drafter.propose({reads: 0})
    assert reader._readings[reads].n_read == 30
    n_passes = reader.n_passes
    drafter.propose({reads: 0, decodes: 0})  # nothing new, and nobody wants guesses
    assert reader.n_passes == n_passes


def test_a_prompt_that_was_read_is_found_and_one_that_is_being_read_waited_for(
    packed: Packed, team: ops.Team
) -> None:
    reader = make_reader(packed, team, max_tokens=200)
    drafter = PardDrafter(reader, MASK, 4)
    first, second = sequence(150), sequence(150, "b")
    assert set(drafter.propose({first: 4, second: 4})) == {first}
    rows = reader.n_rows
    assert set(drafter.propose({second: 4})) == {second}
    assert reader.n_rows - rows < 60


def test_a_sequence_ends_where_the_draft_does(packed: Packed, team: ops.Team) -> None:
    reader = make_reader(packed, team)
    reader.max_len = 48
    seq = sequence(46)
    assert len(PardDrafter(reader, MASK, 8).propose({seq: 8})[seq].token_ids) == 3
    for _ in range(3):
        seq.commit(1)
    assert PardDrafter(reader, MASK, 8).propose({seq: 8}) == {}


def test_a_token_that_the_draft_does_not_know_ends_drafting(packed: Packed, team: ops.Team) -> None:
    reader = make_reader(packed, team)
    reader._vocab_size = MASK
    seq = sequence(20)
    assert PardDrafter(reader, MASK, 2).propose({seq: 2})
    seq.commit(MASK)
    assert PardDrafter(reader, MASK, 2).propose({seq: 2}) == {}
