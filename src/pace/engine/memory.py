"""How much memory an engine needs, how much there is, and how large its KV pool becomes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from pace.engine.kv_memory import GroupMemory, KVMemory, plan_groups
from pace.errors import CapacityError
from pace.models.plan import Embed, ExpertsIn, ExpertsOut, Gemm, Plan, WeightShape
from pace.models.weight_formats import bits_of

__all__ = ["MemoryPlan", "available_bytes", "packed_bytes", "plan_memory", "read_bytes", "slot_bytes"]

KV_SHARE = 0.4
"""Of the available memory, what the KV pool takes by default; the rest is for the host program."""

SLACK_BYTES = 64 << 20
"""Tokenizer, staging, thread stacks and Python."""

PANEL = 64  # rows that a packed matrix is padded to at most
SPARSE = 0.8
"""Share of the weights below which it is worth telling how much of them a token reads."""
PAGE = 4096  # at which each expert's matrix begins
SLOT_BYTES = {"f32": 4, "bf16": 2, "int8": 1.25}
NO_LIMIT = 1 << 60  # cgroup v1 writes "no limit" as a number near 2^63


@dataclass(frozen=True)
class MemoryPlan:
    """What an engine allocates, in bytes; decided before anything is.

    Attributes:
        weights_bytes: packed matrices and vectors; tables that stay in their file are not counted.
        activation_bytes: the slots of the largest step.
        kv: the KV pools; their pages are mapped when tokens are stored.
        available_bytes: what the system and the cgroup had left.
        max_model_len: longest sequence in tokens.
        kv_cache_type, kv_cache_dtype: of the pools.
    """

    weights_bytes: int
    activation_bytes: int
    kv: KVMemory
    available_bytes: int
    max_model_len: int
    kv_cache_type: str = "slab"
    kv_cache_dtype: str = "bf16"
    read_bytes: int = 0

    @property
    def kv_bytes(self) -> int:
        """Of all KV pools."""
        return self.kv.n_bytes

    def describe(self) -> str:
        """One line for the log."""
        groups = [_describe(group) for group in self.kv.groups]
        if len(groups) > 1:
            groups = [
                f"{group.n_layers} layers of {group.n_kv_heads} x {group.head_dim}: {gib(group.n_bytes)} in {text}"
                for group, text in zip(self.kv.groups, groups, strict=True)
            ]
        sparse = self.read_bytes < SPARSE * self.weights_bytes
        read = f" (a token reads {gib(self.read_bytes)} of them)" if sparse else ""
        return (
            f"weights {gib(self.weights_bytes)}{read}, activations {gib(self.activation_bytes)}, KV cache "
            f"{gib(self.kv_bytes)} ({self.kv_cache_type}, {self.kv_cache_dtype}, {'; '.join(groups)}), of "
            f"{gib(self.available_bytes)} available; max_model_len {self.max_model_len}"
        )


def _describe(group: GroupMemory) -> str:
    seen = "" if group.reach is None else f", of which a query sees {group.reach}"
    return f"{group.n_blocks} blocks of {group.block_size} tokens{seen}"


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
    kv_share: float = 1.0,
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
        kv_share: of the memory for KV caches, what this one gets; the rest is a draft's.

    Raises:
        CapacityError: the weights, the cache, or one sequence of the length that was asked for, do not fit.
    """
    available = available_bytes() if available is None else available
    n_logit_rows = max_num_seqs if max_logit_rows is None else max_logit_rows
    weights_bytes = packed_bytes(plan)
    activation_bytes = slot_bytes(plan, max_num_batched_tokens, n_logit_rows)
    left = available - weights_bytes - activation_bytes - SLACK_BYTES
    if left < 0:
        raise CapacityError(
            f"the model needs {gib(weights_bytes)} for weights and {gib(activation_bytes)} for activations, "
            f"{gib(available)} are available; lower max_num_batched_tokens or take a smaller model"
        )
    wanted_len = max_len if max_model_len is None else max_model_len
    kv = plan_groups(
        plan, wanted_len, max_num_batched_tokens, kv_cache_type, kv_cache_dtype, block_size, l2_bytes
    )
    need = kv.bytes_for(wanted_len)
    if isinstance(kv_cache_memory, int):
        if kv_cache_memory > left:
            raise CapacityError(
                f"kv_cache_memory is {gib(kv_cache_memory)}, but {gib(left)} are left beside the weights; lower it"
            )
        share = n_bytes = kv_cache_memory
    elif kv_cache_memory is not None:
        share = n_bytes = int(kv_share * left)
    else:
        share = min(left, int(kv_share * KV_SHARE * available))
        if max_model_len is not None and share < need <= left:
            share = need  # one full sequence may take more than the default's share, if it was asked for
        n_bytes = min(share, need * max_num_seqs)
    if share < need:
        longest = kv.longest(share, wanted_len)
        if longest == 0 and kv_cache_memory is not None:
            sizes = " and ".join(str(group.block_size) for group in kv.groups)
            raise CapacityError(
                f"there are {gib(share)} for the KV cache, one block of {sizes} tokens takes {gib(kv.bytes_for(1))}; "
                "raise kv_cache_memory"
            )
        if max_model_len is not None or longest == 0:
            most = share if kv_cache_memory is not None else left
            raise CapacityError(
                f"one sequence of {wanted_len} tokens needs {gib(need)} of KV cache, but there are {gib(most)}; "
                f"lower max_model_len to at most {kv.longest(most, wanted_len)}"
            )
        wanted_len = longest
    return MemoryPlan(
        weights_bytes,
        activation_bytes,
        kv.divided(n_bytes, wanted_len, max_num_seqs),
        available,
        wanted_len,
        kv_cache_type,
        kv_cache_dtype,
        read_bytes(plan),
    )


def packed_bytes(plan: Plan) -> int:
    """Bytes of a plan's weights."""
    return sum(_packed_bytes(shape) for shape in plan.weights.values())


def read_bytes(plan: Plan, n_rows: int = 1) -> int:
    """Bytes of weights that a step of `n_rows` rows reads: of experts those that it takes, if no two rows take the same;
    no embedding, unless it is the LM head too.
    """
    total = packed_bytes(plan)
    shapes = plan.weights
    for op in plan.ops:
        if isinstance(op, ExpertsIn | ExpertsOut):
            taken = min(op.count, n_rows * (plan.slots[op.route].width // 2))
            total -= _packed_bytes(shapes[op.weight]) * (op.count - taken) // op.count
    read = {op.weight for op in plan.ops if isinstance(op, Gemm)}
    tables = {op.weight for op in plan.ops if isinstance(op, Embed)} - read
    return total - sum(_packed_bytes(shapes[name]) for name in tables if name is not None)


def slot_bytes(plan: Plan, max_tokens: int, max_logit_rows: int) -> int:
    """Bytes of a plan's activations, in steps of max_tokens rows."""
    return sum(
        int(slot.width * SLOT_BYTES[slot.dtype])
        * (max_logit_rows if slot.name == plan.logits else max_tokens * slot.times)
        for slot in plan.slots.values()
    )


def available_bytes() -> int:
    """Bytes that this process can still take: the least that the system and its cgroups leave."""
    return min([_meminfo_available(), *_cgroup_available()])


def _packed_bytes(shape: WeightShape) -> int:
    if shape.mapped:
        return 0  # a row is read where the file has it; its pages are the page cache's and can be dropped
    if shape.k is None:
        return 4 * shape.n * shape.count
    bits = bits_of(shape.format)
    one = int(-(-shape.n // PANEL) * PANEL * (shape.k + shape.k % 2) * bits / 8)
    return one if shape.count == 1 else shape.count * -(-one // PAGE) * PAGE


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
