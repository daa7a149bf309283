"""The step-cost breakdown: it adds up, and it leaves no trace in the engine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_checkpoint import write_checkpoint

from pace.benchmarks import chart
from pace.benchmarks.cost import op_kind, rowwise_bytes, step_cost
from pace.benchmarks.profile import Profiler, StepProfile, format_profiles
from pace.benchmarks.roofline import StepRoofs
from pace.config import EngineConfig
from pace.engine.loader import Loaded, load
from pace.params import SamplingParams

KINDS = {"embed", "norm", "qkv", "rope+kv", "attention", "o", "gate_up", "down", "lm head", "select"}
ROOFS = StepRoofs(1e10, 1e11, 4e11)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loaded]:
    directory = write_checkpoint(tmp_path_factory.mktemp("tiny"))
    loaded = load(EngineConfig(str(directory), max_model_len=64, n_threads=2), skip_tokenizer=True)
    yield loaded
    loaded.team.close()


def recorded(loaded: Loaded) -> list[StepProfile]:
    """Two sequences: one step reads both prompts, four decode."""
    params = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True, detokenize=False)
    for i in range(2):
        loaded.engine.submit(loaded.engine.prepare(str(i), list(range(i, 10 + i)), params))
    profiler = Profiler(loaded)
    with profiler:
        while loaded.engine.has_unfinished:
            loaded.engine.step()
    return profiler.profiles(ROOFS, " now")


def test_the_parts_add_up(loaded: Loaded) -> None:
    decode, prefill = recorded(loaded)
    assert (decode.phase, decode.n_steps, decode.n_seqs, decode.n_rows) == ("decode now", 4, 2, 2)
    assert (prefill.phase, prefill.n_steps, prefill.n_seqs, prefill.n_rows) == ("prefill now", 1, 2, 20)
    plan = loaded.plan.ir
    for profile, q_len, kv_lens in ((decode, [1, 1], [11, 12, 13, 14]), (prefill, [10, 10], [10])):
        parts = {op.kind: op for op in profile.ops}
        assert set(parts) == KINDS | {"launch", "sampler", "scheduler/python"}
        assert sum(op.seconds for op in profile.ops) == pytest.approx(profile.step_s)
        assert sum(op.share for op in profile.ops) == pytest.approx(1)
        assert all(op.seconds > 0 for op in profile.ops)
        steps = [step_cost(plan, q_len, [kv] * 2, 2) for kv in kv_lens]
        flops = sum(op.n_flops for op in profile.ops)
        assert flops == pytest.approx(sum(cost.n_flops for cost in steps) / len(steps))
        rowwise = sum(rowwise_bytes(plan, op, sum(q_len), 2) for op in plan.ops)
        logits = 2 * plan.vocab_size * 4
        n_bytes = sum(cost.n_bytes for cost in steps) / len(steps) + rowwise + logits
        assert sum(op.n_bytes for op in profile.ops) == pytest.approx(n_bytes)
        qkv = parts["qkv"]
        best = max(qkv.n_bytes / ROOFS.read, qkv.n_flops / ROOFS.bf16)
        assert profile.dot_roof == pytest.approx(ROOFS.bf16)
        assert qkv.roof_share == pytest.approx(best / qkv.seconds)
    text = format_profiles([decode, prefill])
    assert text.startswith("decode now: 4 steps") and text.count("gate_up") == 2


def test_the_engine_is_itself_again(loaded: Loaded) -> None:
    recorded(loaded)
    for owner in (loaded.plan, loaded.engine, loaded.engine.sampler):
        assert not {"step", "sample"} & set(vars(owner))


def test_kinds() -> None:
    names = ["angles.0", "layers.3.attn_norm", "norm", "layers.0.rope", "layers.11.attn", "select.x"]
    assert [op_kind(name) for name in names] == ["rope+kv", "norm", "norm", "rope+kv", "attention", "select"]


def test_an_int8_cache_reads_less(loaded: Loaded) -> None:
    plan = loaded.plan.ir
    bf16, int8 = (step_cost(plan, [1], [100], 1, dtype) for dtype in ("bf16", "int8"))
    saved = sum(layer.n_kv_heads * (2 * layer.head_dim - 8) for layer in plan.kv)
    assert bf16.n_bytes - int8.n_bytes == 100 * saved
    assert bf16.n_flops == int8.n_flops


def test_the_chart_is_a_png(loaded: Loaded, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "steps.png"
    chart.check_chart(str(path))
    chart.save_chart(recorded(loaded), str(path), "title")
    assert path.read_bytes().startswith(b"\x89PNG")
