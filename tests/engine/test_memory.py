"""The memory plan: what fits, what is refused, and which option the refusal names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pace.engine import memory
from pace.engine.kv_memory import GroupMemory, default_block_size, plan_groups
from pace.engine.memory import MemoryPlan, available_bytes, plan_memory
from pace.errors import CapacityError
from pace.kvcache import KVTables, join_groups, kv_block_bytes, make_tables
from pace.models.decoder import lower
from pace.models.plan import KVLayer, Plan
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


def only(planned: MemoryPlan) -> GroupMemory:
    (group,) = planned.kv.groups
    return group


def fixed(plan: Plan) -> int:
    roomy = size(plan, 1 << 40)
    return roomy.weights_bytes + roomy.activation_bytes + memory.SLACK_BYTES


def test_roomy(plan: Plan) -> None:
    roomy = size(plan, 1 << 40)
    assert (only(roomy).n_blocks, only(roomy).block_size, roomy.max_model_len) == (64, 256, 4096)
    assert roomy.kv_bytes == 64 * BLOCK
    n_params = 4 * (4 * 256 * 256 + 3 * 256 * 512) + 2 * 1024 * 256
    assert roomy.weights_bytes == 2 * n_params + 4 * 9 * 256
    assert "64 blocks of 256 tokens" in roomy.describe()


def test_a_table_that_stays_in_its_file_takes_no_memory() -> None:
    """Gemma 4 E2B's per-layer table is half of the file; counted, it refused the model on machines that run it."""
    config = {
        "architectures": ["Gemma4ForCausalLM"],
        "model_type": "gemma4_text",
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "global_head_dim": 16,
        "vocab_size": 1 << 20,
        "vocab_size_per_layer_input": 1 << 20,
        "hidden_size_per_layer_input": 256,
        "layer_types": ["full_attention"] * 2,
        "hidden_activation": "gelu_pytorch_tanh",
    }
    planned = size(lower(parse_config(config)[0], 128), 1 << 30)
    embedding, table = 2 * 64 << 20, 2 * 2 * 256 << 20
    assert embedding < planned.weights_bytes < embedding + (1 << 20) < table


def test_short_sequences_have_small_blocks(plan: Plan) -> None:
    assert [only(size(plan, 1 << 40, n)).block_size for n in (1, 16, 17, 100, 256, 4096)] == [
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
    assert only(some).n_blocks == int(memory.KV_SHARE * available) // BLOCK < 100


def test_the_default_length_shrinks_and_an_explicit_one_does_not(plan: Plan) -> None:
    tight = fixed(plan) + 8 * BLOCK
    assert size(plan, tight).max_model_len == 8 * 256
    assert only(size(plan, tight, 8 * 256)).n_blocks == 8
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

    assert only(sized(40 * BLOCK)).n_blocks == 40
    assert sized(3 * BLOCK).max_model_len == 768
    everything = sized("auto", fixed(plan) + 50 * BLOCK)
    assert (only(everything).n_blocks, everything.max_model_len) == (50, 4096)
    with pytest.raises(CapacityError, match="lower max_model_len to at most 768"):
        sized(3 * BLOCK, max_model_len=1000)
    with pytest.raises(CapacityError, match=r"kv_cache_memory is 1\.00 GiB, but"):
        sized(1 << 30)
    with pytest.raises(CapacityError, match="raise kv_cache_memory"):
        sized(BLOCK - 1)
    paged = sized(40 * BLOCK, kv_cache_type="paged")
    assert (only(paged).block_size, only(paged).n_blocks) == (16, 640)
    small = sized(40 * BLOCK, kv_cache_type="paged", kv_cache_dtype="int8")
    assert only(small).n_blocks == 640 * 2 * 64 * 2 // (2 * 64 + 8)
    assert only(sized(40 * BLOCK, block_size=64)).block_size == 64


def test_a_slab_fits_the_l2() -> None:
    assert default_block_size("slab", "bf16", 128, 1 << 20, 1 << 17) == 256
    assert default_block_size("slab", "bf16", 128, 256 << 10, 1 << 17) == 128
    assert default_block_size("slab", "int8", 256, 256 << 10, 1 << 17) == 64
    assert default_block_size("slab", "bf16", 256, 0, 1 << 17) == 16


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


# ---- groups of layers ---------------------------------------------------------------------------------------------


def gemma(n_layers: int, heads: int, head_dim: int, window: int, every: int = 6) -> Plan:
    """A plan with only what a KV cache is sized by: the windowed and the full layers of Gemma 3."""
    full, windowed = KVLayer(heads, head_dim), KVLayer(heads, head_dim, window)
    kv = tuple(windowed if (i + 1) % every else full for i in range(n_layers))
    return Plan({}, (), (), kv, 1, 1, "logits")


@pytest.mark.parametrize("kind", ["slab", "paged", "contiguous"])
@pytest.mark.parametrize("n_seqs", [1, 32])
@pytest.mark.parametrize(
    ("plan", "n_full", "n_windowed", "context"),
    [
        (gemma(62, 16, 128, 1024), 10, 52, 32 << 10),  # 27B
        (gemma(34, 4, 256, 1024), 5, 29, 16 << 10),  # 4B
        (gemma(26, 1, 256, 512), 4, 22, 32 << 10),  # 1B
    ],
)
def test_windows_cost_what_they_see(
    plan: Plan, n_full: int, n_windowed: int, context: int, n_seqs: int, kind: str
) -> None:
    """They cost as much as full layers: five times what Gemma-3-27B needs at 32k."""
    planned = plan_memory(
        plan,
        max_len=1 << 17,
        max_model_len=context,
        max_num_seqs=n_seqs,
        max_num_batched_tokens=2048,
        available=1 << 40,
        kv_cache_type=kind,
    )
    layer = plan.kv[0]
    token_bytes = 4 * layer.n_kv_heads * layer.head_dim
    assert layer.reach is not None
    need = (n_full * context + n_windowed * layer.reach) * token_bytes * n_seqs
    assert need <= planned.kv_bytes <= 1.1 * need
    windowed, full = planned.kv.groups
    assert (windowed.n_layers, full.n_layers) == (n_windowed, n_full)
    assert f"{n_windowed} layers of {layer.n_kv_heads} x {layer.head_dim}" in planned.describe()
    assert (
        f"{windowed.n_blocks} blocks of {windowed.block_size} tokens, of which a query sees {layer.reach}"
        in (planned.describe())
    )


def sized(n_bytes: int, n_seqs: int = 8) -> MemoryPlan:
    return plan_memory(
        gemma(12, 2, 64, 256),
        max_len=8192,
        max_model_len=None,
        max_num_seqs=n_seqs,
        max_num_batched_tokens=512,
        available=1 << 34,
        kv_cache_memory=n_bytes,
    )


def tables_of(planned: MemoryPlan, n_seqs: int) -> KVTables:
    return join_groups(
        [
            make_tables(
                "slab",
                group.n_blocks,
                group.block_size,
                n_seqs,
                planned.max_model_len,
                copy=lambda *_: None,
                prefix_caching=True,
                reach=group.reach,
                max_step=planned.kv.max_step,
            )
            for group in planned.kv.groups
        ]
    )


@pytest.mark.parametrize("share", [1, 1.3, 2, 5.5, 8, 20])
def test_windows_do_not_bound_how_many_run(share: float) -> None:
    """Pools for so many sequences of full length: windows for one let one run, however much the full layers had left."""
    one = sized(1 << 30).kv.bytes_for(8192)
    planned = sized(int(share * one))
    assert planned.max_model_len == 8192 and planned.kv_bytes <= share * one
    # What each of eight can have, beside one of full length; to the block.
    length = planned.kv.longest(int((min(share, 8) - 1) * one) // 7, 8192) // 256 * 256 - 256
    tables = tables_of(planned, 8)
    assert tables.open(8192) is not None
    if length > 0:
        assert all(tables.open(length) is not None for _ in range(7))
    assert share < 5 or length >= 1024


def test_less_than_one_sequence_of_full_length() -> None:
    one = sized(1 << 30).kv.bytes_for(8192)
    short = sized(one // 2)
    assert 2048 < short.max_model_len < 8192
    assert short.kv.bytes_for(short.max_model_len) <= one // 2 < short.kv.bytes_for(short.max_model_len + 256)
    tables = tables_of(short, 4)
    assert tables.capacity >= short.max_model_len and tables.open(short.max_model_len) is not None
    with pytest.raises(CapacityError, match=r"one block of 16 and 256 tokens takes .* raise kv_cache_memory"):
        sized(1000)


def test_a_window_that_no_sequence_outgrows_is_none() -> None:
    plan = gemma(6, 2, 64, 4096)
    kv = plan_groups(plan, 4096, 512, "slab", "bf16", None, 1 << 20)
    assert [group.reach for group in kv.groups] == [None, None] and kv.max_step == 512
    kv = plan_groups(plan, 4097, 2048, "slab", "bf16", None, 1 << 20)
    assert [group.reach for group in kv.groups] == [4096, None] and kv.max_step == 1024


def test_blocks_of_a_window_are_small_beside_it() -> None:
    sizes = [
        default_block_size("slab", "bf16", 128, 1 << 20, 1 << 17, reach)
        for reach in (1, 128, 512, 1024, 4096)
    ]
    assert sizes == [16, 16, 32, 64, 256]
