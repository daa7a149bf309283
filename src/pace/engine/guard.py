"""Which matrices may meet int8 rows: those whose outputs on a built-in text hardly change by it.

Rounding rows to int8 is harmless where the numbers of a group are of one size, and ruins what stands beside one that is a
hundred times the rest. Which matrices have such inputs is a property of the model, so it is measured, once, when the model
is loaded: every matrix is multiplied by the text's rows in both ways. The text is fixed and so is the arithmetic, so the
choice is the same each time; and it is made for whole matrices, so that a token's numbers don't depend on its company.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf, isfinite
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from pace import ops
from pace.log import logger
from pace.models.expert_operators import ExpertsIn, ExpertsOut
from pace.models.formats import Activations, int8_candidates, int8_rows
from pace.models.operators import Gemm
from pace.models.plan import Batch, F32Array, Op, Plan
from pace.models.shapes import Blocks, Slot
from pace.text.tokenizer import Tokenizer

__all__ = ["MAX_ERROR", "Measured", "choose_activations", "int8_errors", "measure"]

MAX_ERROR: Final = 0.02
"""Of a matrix' outputs by int8 rows, relative: the root of the mean over rows of |difference|^2 / |output|^2. Normal
numbers make 0.006, with a few columns at a hundred times the rest 0.012; bf16 rows make 0.002."""

_TEXT: Final = (
    'The ferry left at 7:45, twelve minutes late. On deck, Anna counted her coins (3.20 in all) and asked: "Is there any '
    "soup left?\" def area(r): return 3.14159 * r ** 2  # a circle's"
)
_TOKENS: Final = 32
_BLOCK: Final = 32


@dataclass(frozen=True)
class Measured:
    """What int8 rows change on one tier.

    Args:
        isa: the tier.
        ids: the text's tokens.
        errors: of each matrix, see `MAX_ERROR`.
    """

    isa: str
    ids: tuple[int, ...]
    errors: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """What `from_json` takes; None is what has no number."""
        errors = {name: error if isfinite(error) else None for name, error in self.errors.items()}
        return {"isa": self.isa, "ids": list(self.ids), "errors": errors}

    @classmethod
    def from_json(cls, value: object) -> Measured | None:
        """None where that is something else."""
        if not isinstance(value, dict):
            return None
        isa, ids, errors = (value.get(key) for key in ("isa", "ids", "errors"))
        if not (isinstance(isa, str) and isinstance(ids, list) and isinstance(errors, dict)):
            return None
        if not all(error is None or isinstance(error, int | float) for error in errors.values()):
            return None
        return cls(isa, tuple(ids), {k: inf if error is None else error for k, error in errors.items()})


def measure(
    plan: Plan,
    weights: Mapping[str, Any],
    team: ops.Team,
    tokenizer: Tokenizer | None,
    before: Measured | None = None,
) -> Measured | None:
    """What int8 rows change in a packed plan; None: no matrix could meet them.

    Args:
        plan: with the formats of its weights, and bf16 rows.
        tokenizer: None: the text is numbers spread over the vocabulary.
        before: is returned where it is of these matrices, this text and this tier.
    """
    candidates = _candidates(plan)
    if not candidates:
        return None
    ids = [] if tokenizer is None else list(tokenizer.encode(_TEXT))[:_TOKENS]
    if not ids:
        ids = [(7919 * i + 13) % plan.vocab_size for i in range(_TOKENS)]
    if before is not None and (before.isa, before.ids, set(before.errors)) == (
        ops.isa(),
        tuple(ids),
        candidates,
    ):
        return before
    return Measured(ops.isa(), tuple(ids), int8_errors(plan, weights, team, ids))


def choose_activations(measured: Measured | None) -> dict[str, Activations]:
    """What each matrix that could meet int8 rows should meet; said in one line of the log."""
    if measured is None:
        return {}
    errors = measured.errors
    chosen: dict[str, Activations] = {
        name: "int8" if error <= MAX_ERROR else "bf16" for name, error in errors.items()
    }
    wrong = sorted((name for name in errors if chosen[name] == "bf16"), key=lambda name: -errors[name])
    shown = ", ".join(f"{name} ({100 * errors[name]:.1f} %)" for name in wrong[:4])
    logger.info(
        "activation_dtype auto: int8 rows for %d of %d matrices, whose outputs change by up to %.1f %%%s",
        len(errors) - len(wrong),
        len(errors),
        100 * max((error for name, error in errors.items() if chosen[name] == "int8"), default=0.0),
        f"; bf16 rows for {shown}{' and others' * (len(wrong) > 4)}" if wrong else "",
    )
    return chosen


def int8_errors(
    plan: Plan, weights: Mapping[str, Any], team: ops.Team, ids: Sequence[int]
) -> dict[str, float]:
    """How much int8 rows change the outputs of each matrix that could meet them (see `MAX_ERROR`), the rows being those of
    a text of these token ids on bf16 rows; infinite where an output is no number. Of a matrix that several operators name,
    the largest.
    """
    probed, pairs = _probed(plan)
    n = len(ids)
    pools = [
        ops.KVPool(len(g.layers), g.layer.n_kv_heads, g.layer.head_dim, -(-n // _BLOCK), _BLOCK)
        for g in plan.groups()
    ]
    executor = ops.Plan(team, probed, weights, pools, n, 1, n)
    table = np.arange(-(-n // _BLOCK), dtype=np.int32)[None]
    batch = Batch(
        np.array(ids, np.int32),
        np.array([0, n], np.int32),
        np.array([n], np.int32),
        (table,) * len(pools),
        np.arange(n, dtype=np.int32),
    )
    errors: dict[str, float] = {}
    done = 0
    for end, name, slots in pairs:
        executor.step_part(batch, done, end)
        done = end
        exact, rounded = (_rows(executor.slot(slot), n * probed.slots[slot].times) for slot in slots)
        errors[name] = max(errors.get(name, 0.0), _difference(exact, rounded))
    return errors


def _candidates(plan: Plan) -> set[str]:
    """Matrices that int8 rows are chosen for: not those of MXFP4, whose bf16 rows are exact products of what the checkpoint
    holds, and as fast but for a few rows."""
    weights = plan.weights
    return {name for name in int8_candidates(plan) if weights[name].format != "mxfp4"}


def _rows(slot: npt.NDArray[Any], n: int) -> F32Array:
    rows = slot[:n]
    return (rows.astype(np.uint32) << 16).view(np.float32) if rows.dtype == np.uint16 else rows


def _difference(exact: F32Array, rounded: F32Array) -> float:
    """The root of the mean over rows of |difference|^2 / |exact|^2."""
    size = np.square(exact, dtype=np.float64).sum(-1)
    difference = np.square(exact - rounded, dtype=np.float64).sum(-1)
    if not (np.isfinite(size).all() and np.isfinite(difference).all()):
        return float("inf")
    counted = size > 0
    return float(np.sqrt((difference[counted] / size[counted]).mean())) if counted.any() else 0.0


def _probed(plan: Plan) -> tuple[Plan, list[tuple[int, str, tuple[str, str]]]]:
    """The plan with both products before each operator that could take int8 rows, and of each such pair: the operators up
    to its end, the weight, and the slots of the results by bf16 and by int8 rows."""
    slots, result = dict(plan.slots), list[Op]()
    pairs: list[tuple[int, str, tuple[str, str]]] = []
    candidates = _candidates(plan)
    for op in plan.ops:
        if isinstance(op, Gemm | ExpertsIn | ExpertsOut) and op.weight in candidates:
            names = tuple(_probe(slots, result, plan, op, rows) for rows in ("bf16", "int8"))
            pairs.append((len(result), op.weight, (names[0], names[1])))
        result.append(op)
    return replace(plan, slots=slots, ops=tuple(result)), pairs


def _probe(
    slots: dict[str, Slot], result: list[Op], plan: Plan, op: Gemm | ExpertsIn | ExpertsOut, rows: str
) -> str:
    """Append the product alone, by rows of either kind, to a slot that such probes share; the slot's name."""
    dst = plan.slots[op.dst]
    bare: Gemm | ExpertsIn | ExpertsOut
    if isinstance(op, Gemm):
        shape = plan.weights[op.weight]
        dst = replace(dst, width=shape.n, dtype="f32")
        whole = (Blocks("all", 1, shape.n, shape.n),)
        bare = Gemm("", op.src, "", op.weight, blocks=whole, format=op.format)
    elif isinstance(op, ExpertsIn):
        bare = op
    else:
        bare = replace(op, add=False)
    name = f"probe.{rows}.{dst.width}.{dst.dtype}.{dst.rows}.{dst.times}"
    slots[name] = replace(dst, name=name)
    bare = replace(bare, name=f"probe.{rows}.{op.name}", dst=name)
    result.append(int8_rows(slots, result, plan, bare) if rows == "int8" else bare)
    return name
