"""The operators of a mixture of experts: the router and the two products of a layer, over the experts that rows chose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from pace.models.operators import GATED_BLOCK, Activation, Needs, require
from pace.models.shapes import Blocks, SlotShape, WeightShape
from pace.models.weight_formats import WeightFormat

if TYPE_CHECKING:
    from pace.models.plan import Plan

RouterOrder = Literal["softmax", "chosen", "sigmoid"]

MAX_EXPERTS = 1024
"""Experts of a layer that a router chooses from."""


@dataclass(frozen=True, slots=True)
class Route:
    """Choose `top_k` of the experts for every row, and what each of them weighs; l are the row's logits.

    softmax: the best of p = softmax(l), which weigh p.  chosen: the best of l, which weigh the softmax over them alone.
    sigmoid: the best of s + choice for s = sigmoid(l), which weigh s.

    Of equal ones the lower number is better. With a NaN among the logits all weights are NaN.

    Args:
        src: f32 slot [T, experts], the logits.
        dst: f32 slot [T, 2 * top_k]: numbers of the chosen, best first, then their weights.
        choice: vector [experts], for the choice alone (sigmoid only).
        expert_scale: vector [experts] that the weights are multiplied by.
        n_groups, top_groups: experts stand in groups of equal size; only those count whose two best sum to most.
        renormalise: weights are divided by their sum (1e-20 added with sigmoid).
        scale: of the weights, after that.
    """

    operator: ClassVar[str] = "route"

    name: str
    src: str
    dst: str
    top_k: int
    order: RouterOrder = "softmax"
    choice: str | None = None
    expert_scale: str | None = None
    n_groups: int = 1
    top_groups: int = 1
    renormalise: bool = False
    scale: float = 1.0

    def needs(self, plan: Plan) -> Needs:
        """See `Needs`."""
        src = plan.slots[self.src]
        require(
            1 <= src.width <= MAX_EXPERTS, f"{self.name}: {src.width} experts, expected 1 to {MAX_EXPERTS}"
        )
        require(
            1 <= self.top_groups <= self.n_groups and src.width % self.n_groups == 0,
            f"{self.name}: {self.top_groups} of {self.n_groups} groups of {src.width} experts",
        )
        in_group = src.width // self.n_groups
        require(
            self.n_groups == 1 or in_group >= 2, f"{self.name}: groups of one expert have no two best ones"
        )
        require(
            1 <= self.top_k <= in_group * self.top_groups,
            f"{self.name}: {self.top_k} of {in_group * self.top_groups} experts",
        )
        require(self.choice is None or self.order == "sigmoid", f"{self.name}: choice with {self.order}")
        yield "src", SlotShape(dtype="f32")
        yield "dst", SlotShape(2 * self.top_k, "f32", src.rows)
        yield "choice", WeightShape(src.width)
        yield "expert_scale", WeightShape(src.width)


@dataclass(frozen=True, slots=True)
class ExpertsIn:
    """dst = act(gate) * up of every row and each of its experts; gate and up are src @ W[e].T + bias[e].

    With a `limit` it is (up + 1) * gate * sigmoid(alpha * gate), gate at most the limit and up within it.

    Args:
        src: bf16 or int8 slot [T, k].
        dst: bf16 slot [T * top_k, n / 2]; its rows are sorted by expert, and by row among those of one.
        route: what `Route` stored.
        weight: `count` matrices [n, k] with gate and up in alternating blocks of 16 rows.
        bias: as many vectors [n], or None.
        on_input: rows of src are multiplied by their weights (and rounded to bf16) before.
    """

    operator: ClassVar[str] = "experts_in"

    name: str
    src: str
    dst: str
    route: str
    weight: str
    count: int
    width: int
    bias: str | None = None
    act: Activation = "silu"
    alpha: float = 0.0
    limit: float = 0.0
    on_input: bool = False
    format: WeightFormat = "bf16"

    def needs(self, plan: Plan) -> Needs:
        """See `Needs`."""
        src, dst = plan.slots[self.src], plan.slots[self.dst]
        top_k = plan.slots[self.route].width // 2
        filled = -(-self.width // GATED_BLOCK) * GATED_BLOCK
        require(
            src.dtype == "bf16" or (src.dtype == "int8" and not self.on_input),
            f"{self.name}: rows of {src.dtype}" + (" that are weighed" if self.on_input else ""),
        )
        require(
            dst.width == filled, f"{self.name}: a slot of {dst.width} columns for experts of {self.width}"
        )
        blocks = Blocks("gate", 1, self.width, filled), Blocks("up", 1, self.width, filled)
        yield "dst", SlotShape(dtype="bf16", rows=src.rows, times=top_k)
        yield "route", SlotShape(dtype="f32", rows=src.rows)
        yield "src", SlotShape()
        yield "weight", WeightShape(2 * filled, src.width, blocks, count=self.count, format=self.format)
        yield "bias", WeightShape(2 * filled, blocks=blocks, count=self.count)


@dataclass(frozen=True, slots=True)
class ExpertsOut:
    """dst = sum over a row's experts e, ascending, of scale * weight * (src @ W[e].T + bias[e]); with `add`, dst += it.

    Args:
        src: bf16 or int8 slot [T * top_k, k], in the order of `ExpertsIn`.
        dst: f32 slot [T, n].
        route: what `Route` stored.
        weight: `count` matrices [n, k]; `columns` as of `Gemm`.
        bias: as many vectors [n], or None.
        weigh: False: the weights were the input's.
    """

    operator: ClassVar[str] = "experts_out"

    name: str
    src: str
    dst: str
    route: str
    weight: str
    count: int
    columns: Blocks | None = None
    bias: str | None = None
    scale: float = 1.0
    add: bool = False
    weigh: bool = True
    format: WeightFormat = "bf16"

    def needs(self, plan: Plan) -> Needs:
        """See `Needs`."""
        src, dst = plan.slots[self.src], plan.slots[self.dst]
        top_k = plan.slots[self.route].width // 2
        require(src.dtype != "f32", f"{self.name}: rows of f32")
        yield "src", SlotShape(rows=dst.rows, times=top_k)
        yield "dst", SlotShape(dtype="f32")
        yield "route", SlotShape(dtype="f32", rows=dst.rows)
        yield (
            "weight",
            WeightShape(dst.width, src.width, columns=self.columns, count=self.count, format=self.format),
        )
        yield "bias", WeightShape(dst.width, count=self.count)
