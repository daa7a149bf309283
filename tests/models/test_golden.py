"""The reference against stored float32 logits of transformers, and against itself however a prompt is fed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from golden import tiny
from golden.harness import BLOCK_SIZE, Model, batch_of, in_chunks, prefill, relative_error

from pace.models.plan import Attention

# max |difference| / max |logit|; measured 4e-7 to 1.2e-6 over the cases (float32 in transformers).
TOLERANCE = 1e-5
EXACT = 1e-9

Golden = Callable[[str], Model]
CASES = sorted(tiny.CASES)


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(tiny.GOLDEN_FILE) as file:
        return {name: file[name] for name in file.files}


def test_every_case_is_stored(golden: dict[str, np.ndarray]) -> None:
    assert sorted(golden) == CASES, "run tests/golden/make.py"


@pytest.mark.parametrize("name", CASES)
def test_prefill_matches_transformers(name: str, golden_model: Golden, golden: dict[str, np.ndarray]) -> None:
    logits = prefill(golden_model(name).reference(), tiny.prompt(name))
    assert relative_error(logits[list(tiny.GOLDEN_ROWS)], golden[name]) < TOLERANCE


@pytest.mark.parametrize("name", [n for n in CASES if n.startswith("rope-") and n != "rope-dynamic-short"])
def test_goldens_tell_rotary_embeddings_apart(
    name: str, golden_model: Golden, golden: dict[str, np.ndarray]
) -> None:
    """The plain table in place of the case's own is far outside the tolerance: the cases can fail."""
    model = golden_model(name)
    plain = golden_model("rope-dynamic-short").plan.ropes
    logits = prefill(model.reference(ropes=plain), tiny.prompt(name))
    assert relative_error(logits[list(tiny.GOLDEN_ROWS)], golden[name]) > 100 * TOLERANCE


@pytest.mark.parametrize("name", ["qwen2-window", "qwen3-layer-types", "mistral-window"])
def test_goldens_tell_windows_apart(name: str, golden_model: Golden, golden: dict[str, np.ndarray]) -> None:
    model = golden_model(name)
    for change in (-1, 1):
        ops = tuple(
            replace(op, window=op.window + change) if isinstance(op, Attention) and op.window else op
            for op in model.plan.ops
        )
        kv = tuple(replace(layer, reach=None) for layer in model.plan.kv)
        logits = prefill(model.reference(ops=ops, kv=kv), tiny.prompt(name))
        assert relative_error(logits[list(tiny.GOLDEN_ROWS)], golden[name]) > 100 * TOLERANCE


@pytest.mark.parametrize("name", CASES)
def test_bf16_rounding_stays_close(name: str, golden_model: Golden, golden: dict[str, np.ndarray]) -> None:
    # Each rounding is 2^-9 relative at most; about ten of them per layer in a row, partly cancelling.
    model = golden_model(name)
    logits = prefill(model.reference(rounding="bf16"), tiny.prompt(name))[list(tiny.GOLDEN_ROWS)]
    n_roundings = 10 * len(model.spec.layers)
    error = relative_error(logits, golden[name])
    assert 1e-5 < error < n_roundings * 2.0**-9


@pytest.mark.parametrize("chunk", [1, 5, 16])
@pytest.mark.parametrize("name", CASES)
def test_any_chunking_is_the_same(name: str, chunk: int, golden_model: Golden) -> None:
    model, tokens = golden_model(name), tiny.prompt(name)
    whole = prefill(model.reference(), tokens)
    assert relative_error(in_chunks(model.reference(), tokens, chunk, [7, 2, 11]), whole) < EXACT


@pytest.mark.parametrize("name", ["llama-gqa4-tied", "qwen2-window", "qwen3", "mistral-window"])
def test_company_does_not_matter(name: str, golden_model: Golden) -> None:
    """A decoding sequence, a chunk and a prompt in one step, their blocks interleaved."""
    model, tokens = golden_model(name), tiny.prompt(name)
    a, b, c = tokens, tokens[::-1], tokens[3:40]
    alone = [prefill(model.reference(), t)[-1] for t in (a, b, c)]
    runner = model.reference()
    ta, tb, tc = [3, 0, 9], [1, 5, 2], [8, 4, 6]
    runner.step(batch_of([(a[:-1], 0, ta), (b[:20], 0, tb)], logit_rows=[]))
    last = [0, 28, 28 + len(c)]
    together = runner.step(batch_of([(a[-1:], 47, ta), (b[20:], 20, tb), (c, 0, tc)], logit_rows=last))
    for got, want in zip(together, alone, strict=True):
        assert relative_error(got, want) < EXACT


def test_no_logit_rows_gives_no_logits(golden_model: Golden) -> None:
    runner = golden_model("llama-mha").reference()
    logits = runner.step(batch_of([(tiny.prompt("llama-mha")[:9], 0, [0])], logit_rows=[]))
    assert logits.shape == (0, tiny.VOCAB_SIZE)


def test_trace_holds_every_operator(golden_model: Golden) -> None:
    model = golden_model("qwen3")
    runner = model.reference(trace=True)
    runner.step(batch_of([(tiny.prompt("qwen3")[:9], 0, [0])], logit_rows=[4, 8]))
    assert runner.trace is not None
    assert list(runner.trace) == [op.name for op in model.plan.ops]
    for slots in runner.trace.values():
        for name, value in slots.items():
            if name in model.plan.slots:
                slot = model.plan.slots[name]
                assert value.shape == (9 if slot.rows == "tokens" else 2, slot.width)
    shape = model.plan.kv[0].n_kv_heads, model.plan.kv[0].head_dim
    assert runner.trace["layers.0.rope"]["k"].shape == (9, *shape)


def test_unwritten_cells_are_not_read(golden_model: Golden) -> None:
    """A table wider than the sequence: the rest of the pool is NaN and must not leak."""
    runner = golden_model("llama-mha").reference()
    logits = runner.step(batch_of([(tiny.prompt("llama-mha")[: BLOCK_SIZE + 1], 0, [0, 1, 2, 3])]))
    assert np.isfinite(logits).all()
