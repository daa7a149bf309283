"""The plan as it is built and stepped: what it refuses, and what a mistake leaves."""

from __future__ import annotations

import threading
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from ext.kit import build, packed, python, rng, rows_batch
from ext.preload import preloading

from pace import ops
from pace.errors import ConfigError
from pace.models import plan as ir

# ---- one description --------------------------------------------------------------------------------------

NOT_THE_KERNELS = {"name", "n_positions", "mapped", "blocks", "columns", "count", "width", "format"}
NOT_THE_KERNELS |= {"by_group", "matrix"}
"""Fields that say something to the loader of weights alone."""


def test_every_field_of_an_operator_reaches_its_kernel() -> None:
    """Both sides of the border describe an operator with the same names; a field that only one has would be lost."""
    from pace.ops.executor import _FIELDS

    described = {op.operator: {f.name for f in fields(op)} - NOT_THE_KERNELS for op in ir.Op.__args__}
    assert {**described, "angles": {"cos", "sin", "inv_freq", "attention_factor"}} == {
        name: set(names) for name, names in _FIELDS.items()
    }


def test_every_choice_is_known_to_the_kernels(team: ops.Team) -> None:
    slots = [
        ir.Slot("x", 32, "bf16", "tokens"),
        ir.Slot("z", 32, "f32", "tokens"),
        ir.Slot("y", 32, "f32", "tokens"),
    ]
    w = {"w": packed(team, np.ones((32, 32)))}
    for act in (None, *get_args(ir.Activation)):
        build(team, [ir.Gemm("g", "x", "y", "w", act=act)], slots, w)
    for kind in get_args(ir.NormKind):
        build(team, [ir.Norm("n", "z", "y", None, kind=kind)], slots)


# ---- what does not fit ------------------------------------------------------------------------------------

KV = ir.KVLayer(2, 16, reach=20)
SLOTS = {
    "x": ir.Slot("x", 128, "f32", "tokens"),
    "a": ir.Slot("a", 128, "bf16", "tokens"),
    "q": ir.Slot("q", 64, "bf16", "tokens"),
    "y": ir.Slot("y", 40, "f32", "tokens"),
    "l": ir.Slot("l", 128, "f32", "logits"),
}
ROPE = ir.RopeKV("r", "x", "q", 4, 0)
ATTENTION = ir.Attention("t", "q", "q", 4, 0, 1.0, window=20)
GEMM = ir.Gemm("g", "a", "y", "w")
NORM = ir.Norm("n", "x", "x", None)


def wrong(op: ir.Op, **values: Any) -> ir.Op:
    """With values that its type doesn't have."""
    return replace(op, **values)


@pytest.mark.parametrize(
    ("op", "message"),
    [
        (replace(ROPE, n_heads=1), "r: 1 query heads over 2 kv heads"),
        (replace(ROPE, n_heads=5), "r: 5 query heads over 2 kv heads"),
        (replace(ROPE, n_heads=0), "r: 0 query heads"),
        (
            replace(ATTENTION, n_heads=130),
            "t: 130 query heads over 2 kv heads, expected 1 to 64 times as many",
        ),
        (replace(ROPE, kv=1), "r: layer 1 of 1"),
        (replace(ROPE, kv=-1), "r: layer -1 of 1"),
        (replace(ROPE, rope=0), "r: rope 0 of 0"),
        (replace(ROPE, norm_width=17), "r: norm_width 17 of 16"),
        (replace(ROPE, q_norm="w"), "r: weights of a norm that it doesn't have"),
        (replace(ROPE, append=False), "r: slot x has width 128, expected 64"),
        (replace(ROPE, k_is_v=True), "r: slot x has width 128, expected 96"),
        (
            wrong(ROPE, qk_norm="rms", norm_scope="both"),
            "norm_scope is 'both', expected one of head, head_own, full",
        ),
        (wrong(ROPE, qk_norm="l2"), "qk_norm is 'l2', expected one of none, rms, rms1, layer"),
        (replace(ATTENTION, window=None), "t sees more than the 20 tokens that layer 0 keeps"),
        (replace(ATTENTION, window=21), "t sees more than the 20 tokens"),
        (replace(ATTENTION, window=None, chunk=21), "t sees more than the 20 tokens"),
        (replace(ATTENTION, window=0), "t: window 0"),
        (replace(ATTENTION, chunk=-1), "t: window 20, chunk -1"),
        (replace(ATTENTION, src="z"), "t: the plan has no slot 'z'"),
        (wrong(GEMM, epilogue="sub"), "epilogue is 'sub', expected one of store, add, gated, mul"),
        (wrong(GEMM, act="tanh"), "act is 'tanh', expected one of none, silu"),
        (replace(GEMM, epilogue="mul"), "g: other belongs to mul"),
        (replace(GEMM, other="x"), "g: cap or other with epilogue|g: other belongs to mul"),
        (replace(GEMM, epilogue="mul", other="x", at=89), "g: columns 89 to 129 of 128"),
        (replace(GEMM, epilogue="mul", other="x", at=-1), "g: columns -1 to 39 of 128"),
        (replace(GEMM, epilogue="mul", other="l"), "g: slot l has rows logits, expected tokens"),
        (replace(GEMM, epilogue="add", cap=2.0), "g: cap"),
        (replace(GEMM, blocks=(ir.Blocks("q", 3, 16, 16),)), "g: blocks of 48 rows for a slot of 40"),
        (replace(NORM, groups=3), "n: 3 groups of 128"),
        (replace(NORM, groups=0), "n: 0 groups of 128"),
        (wrong(NORM, kind="l2"), "kind is 'l2', expected one of none, rms, rms1, layer"),
        (replace(NORM, bias="w"), "n: a norm of kind rms with a bias"),
        (replace(NORM, dst="l"), "n: slot l has rows logits, expected tokens"),
        (ir.Embed("e", "x", None), "e names no table"),
        (ir.Embed("e", "l", "w"), "e: slot l has rows logits, expected tokens"),
        (ir.Select("s", "x", "a"), "s: slot a has dtype bf16, expected f32"),
        (ir.Permute("p", "x", "a", "w", "w"), "p: slot x has dtype f32, expected bf16"),
        (ir.Permute("p", "a", "q", "w", "w"), "p: slot q has width 64, expected 128"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_operators_that_contradict_themselves(team: ops.Team, op: ir.Op, message: str) -> None:
    """Refused when the plan is built, in one line that names the operator."""
    plan = ir.Plan(SLOTS, (op,), (), (KV,), 40, 128, "y")
    weights = {"w": packed(team, np.ones((40, 128)))}
    with pytest.raises(ValueError, match=message) as info:
        ops.Plan(team, plan, weights, ops.KVPool(1, 2, 16, 4, 16), 8, 2, 8)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize("change", [(3, 128), (3, -1), (3, 4), (3, 3.5), (3, np.nan), (3, -np.inf)])
def test_orders_that_lead_elsewhere(team: ops.Team, change: tuple[int, float]) -> None:
    """A kernel reads wherever an order says, so it has every column once."""
    slots = [ir.Slot("a", 128, "bf16", "tokens"), ir.Slot("b", 128, "bf16", "tokens")]
    op = ir.Permute("p", "a", "b", "w.order", "w")
    order = np.arange(128, dtype=np.float32)
    build(team, [op], slots, {"w.order": order})
    order[change[0]] = change[1]
    with pytest.raises(ValueError, match="p: order does not have each of its 128 columns once"):
        build(team, [op], slots, {"w.order": order})
    with pytest.raises(ValueError, match=r"weight w.order is \[127\], the operator needs \[128\]"):
        build(team, [op], slots, {"w.order": np.arange(127, dtype=np.float32)})


@pytest.mark.parametrize(("n", "k"), [(1 << 40, 1 << 40), (1 << 62, 1), ((1 << 63) - 1, (1 << 63) - 1)])
def test_a_matrix_whose_size_wraps(team: ops.Team, n: int, k: int) -> None:
    with pytest.raises(MemoryError, match="cannot allocate a packed matrix"):
        ops.PackedMatrix(team, n, k)


def test_sizes_of_plans_and_slots(team: ops.Team) -> None:
    slots = [ir.Slot("x", 8, "f32", "tokens")]
    with pytest.raises(ValueError, match="slot of 320 rows of 4294967296: both must be positive int32"):
        build(team, [], [ir.Slot("x", 1 << 32, "f32", "tokens")])
    for tokens in (0, -1, 1 << 31):
        with pytest.raises(ValueError, match=f"a plan of {tokens} tokens"):
            build(team, [], slots, max_tokens=tokens)
    with pytest.raises(ValueError, match="more than 64 slots"):
        build(team, [], [ir.Slot(f"x{i}", 8, "f32", "tokens") for i in range(65)])
    with pytest.raises(ValueError, match="more than 8 groups of layers"):
        layers = tuple(ir.KVLayer(1, 16, reach=i + 1) for i in range(9))
        pools = [ops.KVPool(1, 1, 16, 1, 16)] * 9
        ops.Plan(team, ir.Plan({"x": slots[0]}, (), (), layers, 9, 8, "x"), {}, pools, 8, 2, 8)


# ---- what a mistake leaves --------------------------------------------------------------------------------


def test_a_failing_add_leaves_the_plan_as_it_was(team: ops.Team) -> None:
    """No half-built operator: the next step computes what the last one did, and names as many times."""
    slots = [ir.Slot("x", 64, "f32", "tokens"), ir.Slot("y", 64, "f32", "tokens")]
    plan = build(team, [ir.Norm("n", "x", "y", None)], slots)
    plan.slot("x")[:5] = rng("failing").standard_normal((5, 64))
    plan.step(rows_batch(5))
    want = plan.slot("y")[:5].tobytes()
    norm: dict[str, Any] = dict.fromkeys(
        ("src", "dst", "weight", "bias", "scale", "eps", "groups", "kind", "add")
    )
    gemm = {**dict.fromkeys(("src", "dst", "other", "bias", "cap", "at", "act")), "scale": 1.0}
    for name, values in (
        ("norm", {**norm, "src": 0, "dst": 7, "kind": "rms", "groups": 1}),
        ("norm", {**norm, "src": 0, "dst": 1, "kind": "l2", "groups": 1}),
        ("norm", {**norm, "src": 0, "dst": 1, "kind": "rms", "groups": "two"}),
        ("norm", {"src": 0, "dst": 1}),
        ("norm", {**norm, "src": 0, "dst": 1, "kind": "rms", "groups": 1, "more": 1}),
        ("gemm", {**gemm, "src": 0, "dst": 1, "weight": np.ones((64, 64)), "epilogue": "store"}),
        ("gem", {**gemm, "src": 0, "dst": 1, "weight": None, "epilogue": "store"}),
    ):
        with pytest.raises((ValueError, TypeError, KeyError)):
            plan._plan.add(name, None, False, values)
        plan.step(rows_batch(5))
        assert plan.slot("y")[:5].tobytes() == want
        assert len(plan.op_times()) == 1


def test_a_plan_needs_an_open_team_and_pools() -> None:
    team = ops.Team(1)
    slots = [ir.Slot("x", 64, "f32", "tokens")]
    plan = ir.Plan({"x": slots[0]}, (), (), (KV,), 40, 64, "x")
    for pools in (None, [None]):
        with pytest.raises((TypeError, AttributeError)):
            ops.Plan(team, plan, {}, pools, 8, 2, 8)  # type: ignore[arg-type]  # wrong on purpose
    with pytest.raises(ConfigError, match="0 KV pools for 1 groups of layers"):
        ops.Plan(team, plan, {}, [], 8, 2, 8)
    team.close()
    with pytest.raises(RuntimeError, match="closed"):
        ops.Plan(team, plan, {}, ops.KVPool(1, 2, 16, 4, 16), 8, 2, 8)


def test_one_plan_in_two_threads(team: ops.Team) -> None:
    """The second is refused while the first runs, and the first computes what it would alone."""
    n = 2048
    slots = [ir.Slot("a", n, "bf16", "tokens"), ir.Slot("y", n, "f32", "tokens")]
    plan = build(team, [ir.Gemm("g", "a", "y", "w")], slots, {"w": packed(team, np.ones((n, n)))})
    plan.slot("a")[:] = 0x3F80  # 1.0
    batch = rows_batch(320)
    refused = 0
    for _ in range(50):
        thread = threading.Thread(target=plan.step, args=(batch,))
        thread.start()
        while thread.is_alive():
            try:
                plan.step(batch)
            except RuntimeError as error:
                assert "in another thread" in str(error)
                refused += 1
        thread.join()
        if refused:
            break
    assert refused
    assert (plan.step(batch) == n).all()


# ---- memory -----------------------------------------------------------------------------------------------

REFUSE = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stddef.h>
#include <sys/mman.h>
static volatile int fail_maps;
void refuse_maps(int on) { fail_maps = on; }
void *mmap64(void *at, size_t bytes, int prot, int flags, int fd, long offset) {
    static void *(*next)(void *, size_t, int, int, int, long);
    if (!next) next = (void *(*)(void *, size_t, int, int, int, long))dlsym(RTLD_NEXT, "mmap64");
    if (fail_maps && bytes > 100000) {
        errno = ENOMEM;
        return MAP_FAILED;
    }
    return next(at, bytes, prot, flags, fd, offset);
}
"""

GROW = """
import ctypes
import numpy as np
from ext.kit import packed, rows_batch
from pace import ops
from pace._ext import _kernels
lib = ctypes.CDLL(None)
team = ops.Team(1)
plan = _kernels.Plan(team._team, 8, 2, 8, 40, 100)
slots = plan.add_slot(64, "bf16", 8), plan.add_slot(64, "f32", 8)
fields = dict.fromkeys(("other", "bias", "cap", "at", "act"))
fields |= {"src": 0, "dst": 1, "weight": packed(team, np.ones((64, 64)))._matrix, "scale": 1.0, "epilogue": "store"}
lib.refuse_maps(1)
try:
    plan.add("gemm", None, False, fields)
    print("added")
except MemoryError:
    print("refused", len(plan.op_seconds()))
lib.refuse_maps(0)
plan.add("gemm", None, False, fields)
plan.view(0)[:] = 0x3F80
batch = rows_batch(8)
plan.step(batch.token_ids, batch.q_start, batch.kv_len, (), batch.logit_rows)
print((plan.view(1) == 64).all())
"""


def test_a_growth_that_failed_is_tried_again(tmp_path: Path) -> None:
    """The kernels' scratch could not be had when the first operator came; with the second it can."""
    done = python(GROW, **preloading(REFUSE, tmp_path / "refuse.so"))
    assert done.stdout == "refused 0\nTrue\n", done.stderr
