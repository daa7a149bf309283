"""The compiled plan: operators bound to slots, weights, KV pools and a team, then stepped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from pace._ext import _kernels
from pace.errors import ConfigError, ForkError
from pace.models import plan as ir
from pace.models.plan import F32Array as F32
from pace.ops.kv_pool import KVPool
from pace.ops.machine import isas
from pace.ops.sampling import SampleResult, sample
from pace.ops.team import Team
from pace.ops.weights import MappedTable, PackedMatrix

_FIELDS: Final = _kernels.operators()

OPERATORS: Final = tuple(_FIELDS)
"""Names that an engine's `kernels` mapping takes: each operator's tier can be chosen on its own."""

INT32_MAX: Final = 2**31 - 1

Weight = PackedMatrix | MappedTable | F32


class Plan:
    """A compiled plan: `models.plan.Plan` bound to weights, KV pools and a thread team.

    One step runs at a time; a second thread that steps the plan meanwhile gets a RuntimeError.

    Args:
        plan: the operators.
        weights: by plan name: `PackedMatrix` for matrices, `MappedTable` for mapped ones, f32 arrays for vectors.
        kv_pools: one for each of `plan.groups()`; or a single one for all layers, which have one shape then.
        max_tokens, max_seqs: most rows and sequences of one step.
        max_logit_rows: rows of logits that exist at a time; a step may ask for more, see `logits_from`.
        kernels: operator name (see `OPERATORS`) -> tier, or "reference" for the scalar C kernel; operators not
            named use the chosen tier.

    Raises:
        ConfigError: unknown operator or tier in `kernels`; pools that do not fit the layers.
        ValueError, TypeError, KeyError: an operator, a slot or a weight does not fit.
        RuntimeError: the team is closed.
    """

    def __init__(
        self,
        team: Team,
        plan: ir.Plan,
        weights: Mapping[str, Weight],
        kv_pools: KVPool | Sequence[KVPool],
        max_tokens: int,
        max_seqs: int,
        max_logit_rows: int,
        kernels: Mapping[str, str] | None = None,
    ) -> None:
        plan.check()
        self.ir = plan
        self._team = team
        self._max_tokens = max_tokens
        self._kernels = check_kernels(kernels or {})
        self._weights = weights
        self._plan = _kernels.Plan(
            team._team, max_tokens, max_seqs, max_logit_rows, plan.vocab_size, _n_positions(plan)
        )
        self._layers = self._add_groups(kv_pools)
        self._slots = {
            slot.name: self._plan.add_slot(
                slot.width,
                slot.dtype,
                max_logit_rows
                if slot.rows == "logits" and slot.name == plan.logits
                else max_tokens * slot.times,
                slot.group if slot.dtype == "int8" else 0,
            )
            for slot in plan.slots.values()
        }
        self._op_names: list[str] = []
        self._ropes = [self._add_angles(i, rope) for i, rope in enumerate(plan.ropes)]
        for op in plan.ops:
            self._add(op)
        self._logits: F32 = self._plan.view(self._slots[plan.logits])
        self._logits.flags.writeable = False  # the maxima would not follow
        self._stepped = self._logits[:0]  # what the last step returned: its rows' maxima are noted
        self._maxima = self._plan.set_head(self._slots[plan.logits])
        self._n_logit_rows = 0  # of the last step
        self._drawn: SampleResult | None = None

    def _add_groups(self, kv_pools: KVPool | Sequence[KVPool]) -> dict[int, tuple[int, int]]:
        """Tell the plan its pools; returns of each layer its group, and which layer of that group's pool it is."""
        groups = self.ir.groups()
        if isinstance(kv_pools, KVPool):
            kv_pools = [kv_pools]
            if groups:
                groups = (ir.KVGroup(replace(groups[0].layer, reach=None), tuple(range(len(self.ir.kv)))),)
        if len(kv_pools) != len(groups):
            raise ConfigError(f"{len(kv_pools)} KV pools for {len(groups)} groups of layers")
        for group, pool in zip(groups, kv_pools, strict=True):
            wanted = {
                (len(group.layers), self.ir.kv[i].n_kv_heads, self.ir.kv[i].head_dim) for i in group.layers
            }
            if wanted != {(pool.n_layers, pool.n_kv_heads, pool.head_dim)}:
                raise ConfigError(
                    f"a KV pool of {pool.n_layers} layers of {pool.n_kv_heads} heads of {pool.head_dim}; the plan has "
                    f"(layers, heads, head_dim) {', '.join(map(str, sorted(wanted)))}"
                )
            self._plan.add_group(pool._pool, group.layer.reach)
        return {layer: (g, i) for g, group in enumerate(groups) for i, layer in enumerate(group.layers)}

    def _add_angles(self, i: int, rope: ir.Rope) -> tuple[int, int, bool]:
        """Angles of every token, once per step; returns what a rotation by them takes."""
        cos, sin = (self._plan.add_slot(len(rope.inv_freq), "f32", self._max_tokens) for _ in range(2))
        fields = {"cos": cos, "sin": sin, "inv_freq": rope.inv_freq}
        fields["attention_factor"] = rope.attention_factor
        self._plan.add("angles", self._kernels.get("angles"), False, fields)
        self._op_names.append(f"angles.{i}")
        return cos, sin, rope.interleaved

    def _add(self, op: ir.Op) -> None:
        """Fields of the kernel's struct have the names of the operator's."""
        shapes = dict(op.needs(self.ir))
        fields = {name: self._value(op, name, shapes.get(name)) for name in _FIELDS[op.operator]}
        self._check_formats(op)
        logits = self.ir.slots[op.dst].rows == "logits"
        try:
            self._plan.add(op.operator, self._kernels.get(op.operator), logits, fields)
        except ValueError as error:
            raise ValueError(f"{op.name}: {error}") from None
        self._op_names.append(op.name)

    def _check_formats(self, op: ir.Op) -> None:
        """Refuse packed formats that an operator can't read."""
        if not isinstance(op, ir.Embed | ir.Gemm | ir.ExpertsIn | ir.ExpertsOut):
            return
        for name in (op.weight, op.positions if isinstance(op, ir.Embed) else None):
            weight = None if name is None else self._weights[name]
            if not isinstance(weight, PackedMatrix):
                continue
            if isinstance(op, ir.Embed) and weight.format == "mxfp4":
                raise TypeError(
                    f"{op.name}: table {name} is {weight.format}, its rows can't be gathered; pack it in another format"
                )
            if not isinstance(op, ir.Embed) and self.ir.slots[op.src].dtype == "int8":
                group = weight.int8_group
                if group is None:
                    raise TypeError(
                        f"{op.name}: int8 rows times weight {name} in {weight.format}, expected mxfp4, int8 or int4"
                    )
                if group and group != self.ir.slots[op.src].group:
                    raise TypeError(
                        f"{op.name}: int8 rows with groups of {self.ir.slots[op.src].group or 'a row'} times weight {name} "
                        f"in {weight.format}, expected groups of {group}"
                    )

    def _value(self, op: ir.Op, field: str, shape: ir.SlotShape | ir.WeightShape | None) -> object:
        """What the extension takes for a field of an operator."""
        value = getattr(op, field)
        if value is None:
            return None
        if field == "kv":
            return self._layers[value]
        if field == "rope":
            return self._ropes[value]
        if isinstance(shape, ir.SlotShape):
            return self._slots[value]
        return self._weight(value, shape) if isinstance(shape, ir.WeightShape) else value

    def _weight(self, name: str, shape: ir.WeightShape) -> object:
        weight = self._weights[name]
        if isinstance(weight, PackedMatrix | MappedTable):
            if shape.k is None or isinstance(weight, MappedTable) > shape.mapped:
                expected = "a vector" if shape.k is None else "a packed matrix"
                raise TypeError(f"weight {name} is a {type(weight).__name__}, the operator needs {expected}")
            got: tuple[int, ...] = (weight.n, weight.k)
            count = weight.count if isinstance(weight, PackedMatrix) else 1
            if count != shape.count:
                raise ValueError(f"weight {name} is {count} matrices, the operator needs {shape.count}")
        else:
            if shape.k is not None:
                raise TypeError(f"weight {name} is a vector, the operator needs a matrix")
            got = np.shape(weight)
        want = (shape.n,) if shape.k is None else (shape.n, shape.k)
        if shape.k is None and shape.count > 1:
            want = (shape.count, shape.n)
        if got != want:
            raise ValueError(f"weight {name} is {list(got)}, the operator needs {list(want)}")
        return weight._matrix if isinstance(weight, PackedMatrix | MappedTable) else weight

    @property
    def nbytes(self) -> int:
        """Bytes of activation memory."""
        return self._plan.nbytes

    def step(self, batch: ir.Batch) -> F32:
        """Run one step; f32 logits [R, vocab_size], a read-only view that the next step overwrites.

        Where the batch asks for more rows than the plan's max_logit_rows, R is that, and `logits_from` makes the others.

        Raises:
            ValueError: the batch contradicts itself or the plan's sizes; nothing ran.
            ForkError: called in a forked child.
        """
        try:
            self._plan.step(batch.token_ids, batch.q_start, batch.kv_len, batch.tables, batch.logit_rows)
        except _kernels.Forked as error:
            raise ForkError(str(error)) from None
        self._n_logit_rows = len(batch.logit_rows)
        self._stepped = self._logits[: self._n_logit_rows]
        return self._stepped

    def step_part(self, batch: ir.Batch, first: int, end: int) -> None:
        """Run operators first .. end - 1 of a plan's `ops` alone, so that slots can be looked at in between; what the
        others leave there is the caller's business.

        Raises:
            ValueError: as `step`, or there are no such operators.
        """
        angles = len(self._ropes)
        self._plan.step(
            batch.token_ids,
            batch.q_start,
            batch.kv_len,
            batch.tables,
            batch.logit_rows,
            first + angles if first else 0,
            end + angles,
        )

    def logits_from(self, first: int) -> F32:
        """The logits of the last step's logit rows from `first` on, as many as there are or max_logit_rows; they overwrite
        those that `step` or the last call returned. The rest of the model does not run again.

        Raises:
            ValueError: the last step has no such row.
        """
        try:
            self._plan.head(first)
        except _kernels.Forked as error:
            raise ForkError(str(error)) from None
        self._stepped = self._logits[: self._n_logit_rows - first]
        return self._stepped

    def hidden(self) -> ir.Bf16Array:
        """bf16 as u16 [R, dim]: what the last norm made of all logit rows of the last step, a view that the next one
        overwrites."""
        return self.slot(self.ir.hidden)[: self._n_logit_rows]

    def sample(
        self,
        logits: F32,
        params: npt.NDArray[Any],
        history: Sequence[tuple[Any, ...] | None],
    ) -> SampleResult:
        """The function `sample` on the plan's team, which need not read those of the last step's logits again whose
        block maxima the LM head has noted.

        Args:
            logits: f32 [R, V]; the very array that `step` returned, else any.
            params, history: as those of `sample`.

        Returns:
            Arrays that the next call may overwrite.
        """
        maxima = self._maxima[: len(logits)] if logits is self._stepped and self._maxima is not None else None
        self._drawn = sample(self._team, logits, params, history, maxima, self._drawn)
        return self._drawn

    def slot(self, name: str) -> npt.NDArray[Any]:
        """All rows of an activation slot as the last step left them: f32, uint16 holding bf16, or an int8 slot's integers
        in the order of kernels.h."""
        return self._plan.view(self._slots[name])

    def op_times(self) -> list[tuple[str, float]]:
        """Name and seconds of every operator of the last step, in order."""
        return list(zip(self._op_names, self._plan.op_seconds(), strict=True))

    def op_experts(self) -> dict[str, int]:
        """How many experts the last step's rows chose, by name of each operator that multiplies by theirs."""
        chosen = zip(self._op_names, self._plan.op_experts(), strict=True)
        return {name: n for name, n in chosen if n}


def check_kernels(kernels: Mapping[str, str]) -> dict[str, str]:
    """An engine's `kernels` mapping, checked.

    Raises:
        ConfigError: unknown operator, or a tier that does not run here.
    """
    for operator, tier in kernels.items():
        if operator not in OPERATORS:
            raise ConfigError(f"kernels names operator {operator!r}; expected one of {', '.join(OPERATORS)}")
        if tier != "reference" and tier not in isas():
            raise ConfigError(
                f"kernels wants {operator}={tier!r}; runnable here: {', '.join(isas())}, and reference"
            )
    return dict(kernels)


def _n_positions(plan: ir.Plan) -> int:
    """Positions that every table of learned ones has."""
    tables = [op for op in plan.ops if isinstance(op, ir.Embed) and op.positions is not None]
    return min((op.n_positions - op.offset for op in tables), default=INT32_MAX)
