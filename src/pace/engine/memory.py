"""How much memory an engine needs, how much there is, and how large its KV pool becomes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from pace.errors import CapacityError
from pace.kvcache import blocks_for, kv_block_bytes
from pace.models.plan import Plan

__all__ = ["MemoryPlan", "available_bytes", "plan_memory"]

KV_SHARE = 0.4
"""Of the available memory, what the KV pool takes by default; the rest is for the host program."""

MAX_SLAB, PAGE, MIN_BLOCK_SIZE = 256, 16, 16
"""Tokens of a block: of the largest slab (the piece that attention works in), of a page, of the smallest."""

L2_SHARE = 4
"""A slab's K and V of one head take at most this part of the L2 of the core that reads them: the rest of a work item (its
queries, scores and results) is of the same size."""

SLACK_BYTES = 64 << 20
"""Tokenizer, staging, thread stacks and Python."""

PANEL = 64  # rows that a packed matrix is padded to at most
SLOT_BYTES = {"f32": 4, "bf16": 2}
NO_LIMIT = 1 << 60  # cgroup v1 writes "no limit" as a number near 2^63


@dataclass(frozen=True)
class MemoryPlan:
    """What an engine allocates, in bytes; decided before anything is.

    Attributes:
        weights_bytes: packed matrices and vectors.
        activation_bytes: the slots of the largest step.
        n_blocks, block_size: the KV pool.
        kv_bytes: of the pool; its pages are mapped when tokens are stored.
        available_bytes: what the system and the cgroup had left.
        max_model_len: longest sequence in tokens.
        kv_cache_type, kv_cache_dtype: of the pool.
    """

    weights_bytes: int
    activation_bytes: int
    n_blocks: int
    block_size: int
    kv_bytes: int
    available_bytes: int
    max_model_len: int
    kv_cache_type: str = "slab"
    kv_cache_dtype: str = "bf16"

    def describe(self) -> str:
        """One line for the log."""
        return (
            f"weights {gib(self.weights_bytes)}, activations {gib(self.activation_bytes)}, KV cache "
            f"{gib(self.kv_bytes)} ({self.kv_cache_type}, {self.kv_cache_dtype}, {self.n_blocks} blocks of "
            f"{self.block_size} tokens), of {gib(self.available_bytes)} available; max_model_len "
            f"{self.max_model_len}"
        )


def gib(n_bytes: int) -> str:
    """Bytes for a person."""
    return f"{n_bytes / (1 << 30):.2f} GiB" if n_bytes >= 1 << 28 else f"{n_bytes / (1 << 20):.1f} MiB"


def plan_memory(
    plan: Plan,
    *,
    max_len: int,
    max_model_len: int | None,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    max_logit_rows: int | None = None,
    kv_cache_type: str = "slab",
    kv_cache_dtype: str = "bf16",
    kv_cache_memory: int | str | None = None,
    block_size: int | None = None,
    l2_bytes: int = 1 << 20,
    available: int | None = None,
) -> MemoryPlan:
    """Size the KV pool.

    Args:
        plan: lowered for any max_model_len; only its shapes are read.
        max_len: what the checkpoint supports, in tokens.
        max_model_len: what the user asked for; None: max_len, or less where the pool can't hold one such
            sequence.
        max_logit_rows: rows of the logits that exist at a time; None: max_num_seqs.
        kv_cache_memory: bytes of the pool; "auto": all that is left beside the weights; None: room for max_num_seqs
            sequences of full length, at most 40 % of the available memory.
        block_size: tokens; None: see `default_block_size`.
        l2_bytes: L2 of one core.
        available: bytes; None: ask the system.

    Raises:
        CapacityError: the weights, the cache, or one sequence of the length that was asked for, do not fit.
    """
    available = available_bytes() if available is None else available
    n_logit_rows = max_num_seqs if max_logit_rows is None else max_logit_rows
    weights_bytes = sum(_packed_bytes(shape.n, shape.k) for shape in plan.weights().values())
    activation_bytes = sum(
        slot.width
        * SLOT_BYTES[slot.dtype]
        * (n_logit_rows if slot.name == plan.logits else max_num_batched_tokens)
        for slot in plan.slots.values()
    )
    left = available - weights_bytes - activation_bytes - SLACK_BYTES
    if left < 0:
        raise CapacityError(
            f"the model needs {gib(weights_bytes)} for weights and {gib(activation_bytes)} for activations, "
            f"{gib(available)} are available; lower max_num_batched_tokens or take a smaller model"
        )
    wanted_len = max_len if max_model_len is None else max_model_len
    if block_size is None:
        widest = max(layer.head_dim for layer in plan.kv)
        block_size = default_block_size(kv_cache_type, kv_cache_dtype, widest, l2_bytes, wanted_len)
    block_bytes = sum(
        kv_block_bytes(1, layer.n_kv_heads, layer.head_dim, block_size, kv_cache_dtype) for layer in plan.kv
    )
    need = blocks_for(wanted_len, block_size)
    if isinstance(kv_cache_memory, int):
        if kv_cache_memory > left:
            raise CapacityError(
                f"kv_cache_memory is {gib(kv_cache_memory)}, but {gib(left)} are left beside the weights; lower it"
            )
        share = kv_cache_memory // block_bytes
        n_blocks = share
    elif kv_cache_memory is not None:
        n_blocks = share = left // block_bytes
    else:
        share = min(left, int(KV_SHARE * available)) // block_bytes
        if max_model_len is not None and share < need <= left // block_bytes:
            share = need  # one full sequence may take more than the default's share, if it was asked for
        n_blocks = min(share, need * max_num_seqs)
    if share < need:
        if share == 0 and kv_cache_memory is not None:
            raise CapacityError(
                f"there are {gib(left if isinstance(kv_cache_memory, str) else kv_cache_memory)} for the KV cache, one "
                f"block of {block_size} tokens takes {gib(block_bytes)}; raise kv_cache_memory"
            )
        if max_model_len is not None or share == 0:
            most = share if kv_cache_memory is not None else left // block_bytes
            raise CapacityError(
                f"one sequence of {wanted_len} tokens needs {gib(need * block_bytes)} of KV cache, but there are "
                f"{gib(most * block_bytes if kv_cache_memory is not None else left)}; lower max_model_len to at most "
                f"{most * block_size}"
            )
        wanted_len = share * block_size
    return MemoryPlan(
        weights_bytes,
        activation_bytes,
        n_blocks,
        block_size,
        n_blocks * block_bytes,
        available,
        wanted_len,
        kv_cache_type,
        kv_cache_dtype,
    )


def default_block_size(
    kv_cache_type: str, kv_cache_dtype: str, head_dim: int, l2_bytes: int, max_model_len: int
) -> int:
    """Tokens of a block: 16 of a page; of a slab as many as a quarter of the L2 holds keys and values of one head for, at
    most 256, or less where no sequence fills that.
    """
    if kv_cache_type == "paged":
        return PAGE
    token_bytes = kv_block_bytes(1, 1, head_dim, 1, kv_cache_dtype)
    size = MIN_BLOCK_SIZE
    while size < min(max_model_len, MAX_SLAB) and 2 * size * token_bytes * L2_SHARE <= l2_bytes:
        size *= 2
    return size


def available_bytes() -> int:
    """Bytes that this process can still take: the least that the system and its cgroups leave."""
    return min([_meminfo_available(), *_cgroup_available()])


def _packed_bytes(n: int, k: int | None) -> int:
    return 4 * n if k is None else -(-n // PANEL) * PANEL * (k + k % 2) * 2


def _meminfo_available() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
        return NO_LIMIT
    except (OSError, ValueError, IndexError):  # no /proc, as in some chroots; the rest is a system call
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _cgroup_available() -> list[int]:
    """What each cgroup of this process leaves; page cache that can be dropped counts as free."""
    left = []
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    for _, controllers, path in [line.split(":", 2) for line in lines if line.count(":") >= 2]:
        if controllers == "":
            root, limit, used, cache = Path("/sys/fs/cgroup"), "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            root = Path("/sys/fs/cgroup/memory")
            limit, used, cache = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
        else:
            continue
        # In a container the path may be the host's, which isn't there; its own limits are at the root then.
        group = root / path.lstrip("/")
        for folder in {root, *(parent for parent in (group, *group.parents) if parent.is_relative_to(root))}:
            left += _group_left(folder, limit, used, cache)
    return left


def _group_left(folder: Path, limit: str, used: str, cache: str) -> list[int]:
    try:
        bound = (folder / limit).read_text().strip()
        if bound == "max" or int(bound) >= NO_LIMIT:
            return []
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return [max(0, int(bound) - int((folder / used).read_text()) + int(stat.get(cache, 0)))]
    except (OSError, ValueError):
        return []  # not mounted, or not ours to read
