"""What form the matrices of a plan have in memory, and which rows they meet: a lowered plan is rewritten, operator by
operator; families and `decoder.py` know nothing of it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Final, Literal

from pace.models.expert_operators import ExpertsIn, ExpertsOut, Route
from pace.models.operators import Embed, Gemm, Permute, Quantise
from pace.models.plan import Op, Plan
from pace.models.shapes import Blocks, Slot
from pace.models.weight_formats import WeightFormat, int8_group

__all__ = [
    "ORDER",
    "SCHEMES",
    "Activations",
    "formats_of",
    "int8_candidates",
    "int8_rows",
    "products",
    "with_formats",
    "with_orders",
]

Activations = Literal["bf16", "int8"]
Product = Gemm | ExpertsIn | ExpertsOut

ORDER: Final = ".order"
"""What the order of a matrix' columns is called behind the matrix' name."""

_INT8_K: Final = 32
"""Columns of int8 rows come in whole groups of so many."""


@dataclass(frozen=True, slots=True)
class Scheme:
    """What a bf16 checkpoint's matrices become.

    Args:
        matrices: of layers, experts included; None: they stay as they are.
        head: of the LM head, and of the embedding where that is its matrix: errors there are the logits' own.
    """

    matrices: WeightFormat | None
    head: WeightFormat = "int8g32"


SCHEMES: Final[Mapping[str, Scheme]] = {
    "int8": Scheme("int8g32"),
    "int4": Scheme("int4g32"),
    "fp8": Scheme("fp8g128"),
    "w8": Scheme("int8", "int8"),
    "w8g32": Scheme("int8g32"),
    "w8g64": Scheme("int8g64"),
    "w8g128": Scheme("int8g128", "int8g128"),
    "w4g32": Scheme("int4g32"),
    "w4g64": Scheme("int4g64"),
    "w4g128": Scheme("int4g128", "int8g128"),
    "int8-head": Scheme(None),
}
"""By the names of `config.QUANTIZATIONS`."""


def formats_of(plan: Plan, scheme: str) -> dict[str, WeightFormat]:
    """The format of every matrix that a scheme quantises: all that rows are multiplied by, but routers, whose choices
    flip and which are small, and what has a format of its own already.
    """
    chosen = SCHEMES[scheme]
    routed = {op.src for op in plan.ops if isinstance(op, Route)}
    formats: dict[str, WeightFormat] = {}
    for op in plan.ops:
        if not isinstance(op, Gemm | ExpertsIn | ExpertsOut) or op.dst in routed or op.format != "bf16":
            continue
        found = chosen.head if op.dst == plan.logits else chosen.matrices
        if found is not None:
            formats[op.weight] = found
    return formats


def products(plan: Plan) -> set[str]:
    """Matrices that rows are multiplied by and nothing else is done with; experts' not among them."""
    found = {op.weight for op in plan.ops if isinstance(op, Gemm)}
    return found - {op.weight for op in plan.ops if isinstance(op, Embed | ExpertsIn | ExpertsOut)}


def with_orders(plan: Plan, by_group: Collection[str]) -> Plan:
    """The plan with `Permute` before each product with one of these, whose columns stand by group.

    Args:
        by_group: names, of `products`.
    """
    if not by_group:
        return plan
    slots, ops = dict(plan.slots), list[Op]()
    for op in plan.ops:
        if isinstance(op, Gemm) and op.weight in by_group:
            src = slots[op.src]
            dst = replace(src, name=f"{src.name}.by_group")
            slots[dst.name] = dst
            order = f"{op.weight}{ORDER}"
            ops.append(Permute(f"{op.name}{ORDER}", src.name, dst.name, order, op.weight, op.columns))
            # What fills up stands behind all groups.
            k = src.width if op.columns is None else op.columns.count * op.columns.width
            op = replace(op, src=dst.name, columns=Blocks("all", 1, k, src.width), by_group=True)
        ops.append(op)
    return replace(plan, slots=slots, ops=tuple(ops))


def with_formats(
    plan: Plan,
    formats: Mapping[str, WeightFormat],
    activations: Activations | Mapping[str, Activations] = "bf16",
) -> Plan:
    """The plan with its matrices in other formats, and `Quantise` where they meet int8 rows.

    Args:
        formats: by weight name; a matrix that isn't named keeps its own.
        activations: of all matrices, or by weight name; "int8" is taken where a format can be multiplied so and the rows
            have whole groups of 32 columns, and a matrix that isn't named has "bf16".

    Raises:
        ValueError: no operator names such a weight as a matrix, or it is a table in a file.
    """
    if not formats and activations in ("bf16", {}):
        return plan
    known = {name: shape for name, shape in plan.weights.items() if shape.k is not None}
    for name in formats:
        if name not in known or known[name].mapped:
            raise ValueError(f"a format for {name}, which is no packed matrix of the plan")
    slots, ops = dict(plan.slots), list[Op]()
    fresh: set[str] = set()  # int8 rows of what has not been written since
    for op in plan.ops:
        if (
            isinstance(op, Embed | Gemm | ExpertsIn | ExpertsOut)
            and op.weight is not None
            and op.weight in formats
        ):
            op = replace(op, format=formats[op.weight])
        if isinstance(op, Gemm | ExpertsIn | ExpertsOut):
            wanted = activations if isinstance(activations, str) else activations.get(op.weight, "bf16")
            if wanted == "int8" and _group_of_rows(plan, op) is not None:
                op = int8_rows(slots, ops, plan, op, fresh)
        ops.append(op)
        fresh = {name for name in fresh if name.partition(".int8")[0] != op.dst}
    return replace(plan, slots=slots, ops=tuple(ops))


def int8_rows(
    slots: dict[str, Slot], ops: list[Op], plan: Plan, op: Product, fresh: set[str] | None = None
) -> Product:
    """The operator on int8 rows of its source, which an operator appended to `ops` makes, unless they are `fresh`.

    Args:
        op: one of `int8_candidates`.
        fresh: names of slots that hold int8 rows of what their source holds now; kept up to date.
    """
    src, group = plan.slots[op.src], _group_of_rows(plan, op) or 0
    name = f"{src.name}.int8" + (f"g{group}" if group else "")
    if fresh is None or name not in fresh:
        slots[name] = replace(src, name=name, dtype="int8", group=group)
        ops.append(Quantise(f"{op.name}.quantise", src.name, name, src.times))
        if fresh is not None:
            fresh.add(name)
    return replace(op, src=name)


def int8_candidates(plan: Plan) -> set[str]:
    """Matrices of a plan that could meet int8 rows."""
    return {
        op.weight
        for op in plan.ops
        if isinstance(op, Gemm | ExpertsIn | ExpertsOut) and _group_of_rows(plan, op) is not None
    }


def _group_of_rows(plan: Plan, op: Product) -> int | None:
    """Columns that share a scale in the int8 rows that an operator could take instead of its own; 0: all; None: none."""
    src = plan.slots[op.src]
    weighed = isinstance(op, ExpertsIn) and op.on_input
    return None if weighed or src.dtype != "bf16" or src.width % _INT8_K else int8_group(op.format)
