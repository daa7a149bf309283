"""The memory plan: what fits, what is refused, and which option the refusal names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pace.engine import memory
from pace.engine.memory import MemoryPlan, available_bytes, plan_memory
from pace.errors import CapacityError
from pace.kvcache import kv_block_bytes
from pace.models.decoder import lower
from pace.models.plan import Plan
from pace.models.registry import parse_config

MIB = 1 << 20
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 1024,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
BLOCK = kv_block_bytes(4, 4, 64, 256)  # 1 MiB; a sequence of 4096 tokens has 16


@pytest.fixture(scope="module")
def plan() -> Plan:
    return lower(parse_config(CONFIG)[0], 1)


def size(plan: Plan, available: int, max_model_len: int | None = None, max_num_seqs: int = 4) -> MemoryPlan:
    return plan_memory(
        plan,
        max_len=4096,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=512,
        available=available,
    )


def fixed(plan: Plan) -> int:
    roomy = size(plan, 1 << 40)
    return roomy.weights_bytes + roomy.activation_bytes + memory.SLACK_BYTES


def test_roomy(plan: Plan) -> None:
    roomy = size(plan, 1 << 40)
    assert (roomy.n_blocks, roomy.block_size, roomy.max_model_len) == (64, 256, 4096)
    assert roomy.kv_bytes == 64 * BLOCK
    n_params = 4 * (4 * 256 * 256 + 3 * 256 * 512) + 2 * 1024 * 256
    assert roomy.weights_bytes == 2 * n_params + 4 * 9 * 256
    assert "64 blocks of 256 tokens" in roomy.describe()


def test_short_sequences_have_small_blocks(plan: Plan) -> None:
    assert [size(plan, 1 << 40, n).block_size for n in (1, 16, 17, 100, 256, 4096)] == [
        16,
        16,
        32,
        128,
        256,
        256,
    ]


def test_the_pool_takes_its_share_only(plan: Plan) -> None:
    available = fixed(plan) + 100 * MIB
    some = size(plan, available, max_num_seqs=32)
    assert some.n_blocks == int(memory.KV_SHARE * available) // BLOCK < 100


def test_the_default_length_shrinks_and_an_explicit_one_does_not(plan: Plan) -> None:
    tight = fixed(plan) + 8 * BLOCK
    assert size(plan, tight).max_model_len == 8 * 256
    assert size(plan, tight, 8 * 256).n_blocks == 8
    with pytest.raises(
        CapacityError, match=r"4096 tokens needs 16\.0 MiB .* lower max_model_len to at most 2048"
    ):
        size(plan, tight, 4096)
    with pytest.raises(CapacityError, match="lower max_num_batched_tokens"):
        size(plan, fixed(plan) - 1)


def test_an_explicit_cache(plan: Plan) -> None:
    def sized(memory: int | str | None, available: int = 1 << 30, **options: Any) -> MemoryPlan:
        return plan_memory(
            plan,
            max_len=4096,
            max_num_seqs=4,
            max_num_batched_tokens=512,
            available=available,
            kv_cache_memory=memory,
            **{"max_model_len": None, **options},
        )

    assert sized(40 * BLOCK).n_blocks == 40
    assert sized(3 * BLOCK).max_model_len == 768
    everything = sized("auto", fixed(plan) + 50 * BLOCK)
    assert (everything.n_blocks, everything.max_model_len) == (50, 4096)
    with pytest.raises(CapacityError, match="lower max_model_len to at most 768"):
        sized(3 * BLOCK, max_model_len=1000)
    with pytest.raises(CapacityError, match=r"kv_cache_memory is 1\.00 GiB, but"):
        sized(1 << 30)
    with pytest.raises(CapacityError, match="raise kv_cache_memory"):
        sized(BLOCK - 1)
    paged = sized(40 * BLOCK, kv_cache_type="paged")
    assert (paged.block_size, paged.n_blocks) == (16, 640)
    small = sized(40 * BLOCK, kv_cache_type="paged", kv_cache_dtype="int8")
    assert small.n_blocks == 640 * 2 * 64 * 2 // (2 * 64 + 8)
    assert sized(40 * BLOCK, block_size=64).block_size == 64


def test_a_slab_fits_the_l2() -> None:
    assert memory.default_block_size("slab", "bf16", 128, 1 << 20, 1 << 17) == 256
    assert memory.default_block_size("slab", "bf16", 128, 256 << 10, 1 << 17) == 128
    assert memory.default_block_size("slab", "int8", 256, 256 << 10, 1 << 17) == 64
    assert memory.default_block_size("slab", "bf16", 256, 0, 1 << 17) == 16


@pytest.mark.parametrize("version", [1, 2])
def test_cgroups(version: int, tmp_path: Path) -> None:
    names = {
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        2: ("memory.max", "memory.current", "inactive_file"),
    }[version]
    limit, used, cache = names
    (tmp_path / limit).write_text("1000\n")
    (tmp_path / used).write_text("700\n")
    (tmp_path / "memory.stat").write_text(f"anon 5\n{cache} 100\n")
    assert memory._group_left(tmp_path, limit, used, cache) == [400]
    (tmp_path / limit).write_text("max\n" if version == 2 else "9223372036854771712\n")
    assert memory._group_left(tmp_path, limit, used, cache) == []
    assert memory._group_left(tmp_path / "missing", limit, used, cache) == []


def test_this_machine_has_memory() -> None:
    assert 0 < available_bytes() <= memory._meminfo_available() * 1.5


def test_without_proc_the_system_is_asked_another_way(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(path: Path) -> str:
        raise FileNotFoundError(2, "No such file or directory", str(path))

    monkeypatch.setattr(Path, "read_text", missing)
    assert MIB < available_bytes() < 1 << 50
    for text in ("", "MemAvailable:", "MemAvailable: much kB"):
        monkeypatch.setattr(Path, "read_text", lambda path, text=text: text)
        assert available_bytes() > MIB
