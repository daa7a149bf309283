"""What tests of models share: load a checkpoint into the reference, build batches, compare logits."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from pace.checkpoint.safetensors import Checkpoint
from pace.models.decoder import lower
from pace.models.plan import Batch, ExpertsIn, ExpertsOut, Plan, Route, Runner
from pace.models.quantisation import quantisation
from pace.models.registry import parse_config
from pace.models.spec import DecoderSpec
from pace.models.weights import DenseSink, Tensors, WeightMap, load_weights, settle_head
from pace.reference import Reference, route, weigh

Array = npt.NDArray[Any]

BLOCK_SIZE = 16


@dataclass(frozen=True)
class Model:
    """A checkpoint lowered and loaded: what a runner is built from."""

    spec: DecoderSpec
    plan: Plan
    weight_map: WeightMap
    weights: dict[str, Array]

    def reference(
        self,
        n_blocks: int = 16,
        rounding: Literal["bf16"] | None = None,
        trace: bool = False,
        kv_dtype: Literal["bf16", "int8"] = "bf16",
        contiguous: bool = False,
        **plan_changes: Any,
    ) -> Reference:
        """The float64 interpreter, with a KV cache of n_blocks blocks of BLOCK_SIZE."""
        plan = replace(self.plan, **plan_changes) if plan_changes else self.plan
        return Reference(
            plan,
            self.weights,
            n_blocks,
            BLOCK_SIZE,
            rounding=rounding,
            trace=trace,
            kv_dtype=kv_dtype,
            contiguous=contiguous,
        )


def load(directory: Path, max_model_len: int) -> Model:
    """config.json and safetensors of a directory, as a plan with dense float64 weights."""
    values = json.loads((directory / "config.json").read_text())
    spec, weight_map = parse_config(values)
    sink = DenseSink()
    with Checkpoint(directory) as checkpoint:
        tensors = Tensors(checkpoint, weight_map, len(spec.layers), quantisation(values))
        spec = settle_head(spec, tensors)
        plan = lower(spec, max_model_len)
        load_weights(plan, tensors, sink)
    return Model(spec, plan, weight_map, sink.weights)


def batch_of(
    parts: Sequence[tuple[Sequence[int], int, Sequence[int]]], logit_rows: Sequence[int] | None = None
) -> Batch:
    """A batch from (new token ids, tokens already cached, block table) per sequence.

    Without `logit_rows` every row's logits are asked for.
    """
    token_ids = [t for tokens, _, _ in parts for t in tokens]
    q_len = [len(tokens) for tokens, _, _ in parts]
    width = max(len(table) for _, _, table in parts)
    tables = np.zeros((len(parts), width), np.int32)
    for row, (_, _, table) in zip(tables, parts, strict=True):
        row[: len(table)] = table
    rows = range(len(token_ids)) if logit_rows is None else logit_rows
    return Batch(
        token_ids=np.asarray(token_ids, np.int32),
        q_start=np.concatenate(([0], np.cumsum(q_len))).astype(np.int32),
        kv_len=np.asarray([cached + n for (_, cached, _), n in zip(parts, q_len, strict=True)], np.int32),
        block_tables=tables,
        logit_rows=np.asarray(rows, np.int32),
    )


def prefill(runner: Runner | Reference, tokens: Sequence[int], table: Sequence[int] | None = None) -> Array:
    """Logits [n, vocab_size] of one prompt in one step; a copy."""
    table = range(-(-len(tokens) // BLOCK_SIZE)) if table is None else table
    return np.array(runner.step(batch_of([(tokens, 0, list(table))])))


def in_chunks(runner: Runner | Reference, tokens: Sequence[int], chunk: int, table: Sequence[int]) -> Array:
    """Logits [n, vocab_size] of one prompt fed `chunk` tokens a step."""
    rows = [
        np.array(runner.step(batch_of([(tokens[at : at + chunk], at, table)])))
        for at in range(0, len(tokens), chunk)
    ]
    return np.concatenate(rows)


def apart(model: Model) -> Model:
    """The model with a slot for every router's choices, to be read behind a step."""
    slots, ops, last = dict(model.plan.slots), [], ""
    for op in model.plan.ops:
        if isinstance(op, Route):
            last = op.name
            slots[last] = replace(slots[op.dst], name=last)
            op = replace(op, dst=last)
        elif isinstance(op, ExpertsIn | ExpertsOut):
            op = replace(op, route=last)
        ops.append(op)
    return replace(model, plan=replace(model.plan, slots=slots, ops=tuple(ops)))


class Followed(Reference):
    """The float64 interpreter with others' choices of experts, which it weighs by itself.

    Rounding turns choices between experts that are nearly as good, and with them the result; `gap` is how much worse, in
    logits or scores, the worst of them was than the best that was passed over, beside the largest logit.
    """

    choices: Mapping[str, Array]
    gap = 0.0

    def _route(self, op: Route) -> None:
        logits = self._slots[op.src]
        own = route(op, logits, self._vector(op.choice))[0]
        ids = self.choices[op.name][: len(logits), : op.top_k].astype(np.int32)
        size = logits.shape[1] // op.n_groups
        for row in np.flatnonzero((np.sort(own) != np.sort(ids)).any(axis=-1)):
            if set(own[row] // size) != set(ids[row] // size):
                continue  # another group, of whose experts none need be nearly as good
            by = logits[row]
            if op.choice is not None:
                by = 1 / (1 + np.exp(-by)) + self.weights[op.choice]
            gap = by[np.setdiff1d(own[row], ids[row])].max() - by[np.setdiff1d(ids[row], own[row])].min()
            self.gap = max(self.gap, float(gap / np.abs(logits).max()))
        weights = weigh(op, logits, ids)
        if op.expert_scale is not None:
            weights = weights * self.weights[op.expert_scale][ids]
        self._store(op.dst, np.concatenate([ids.astype(self.dtype), weights], axis=1))


def followed(model: Model, choices: Mapping[str, Array], rounding: Literal["bf16"] | None = None) -> Followed:
    """An interpreter that takes these choices."""
    reference = Followed(model.plan, model.weights, 16, BLOCK_SIZE, rounding=rounding)
    reference.choices = choices
    return reference


def choices_of(runner: Any) -> dict[str, Array]:
    """What every router of an executor's last step has chosen; its plan is that of `apart`."""
    return {
        op.name: np.array(runner._plan.view(runner._slots[op.dst]))
        for op in runner.ir.ops
        if isinstance(op, Route)
    }


def relative_error(got: Array, want: Array) -> float:
    """max |got - want| / max |want|; NaN or a wrong shape is infinitely wrong."""
    if got.shape != want.shape or not np.isfinite(got).all():
        return float("inf")
    return float(np.abs(got - want).max() / np.abs(want).max())


def bf16_tolerance(n_layers: int) -> float:
    """max |difference| / max |logit| that bf16 rounding explains; tests/models/test_executor.py derives it."""
    return float(np.sqrt(8 * n_layers + 1)) * 2.0**-8


def assert_greedy_agrees(got: np.ndarray, want: np.ndarray, slack: float) -> int:
    """The best token is the same wherever the second is further away than both errors; returns how often."""
    second, first = np.sort(want, axis=-1)[:, -2:].T
    clear = first - second > 2 * slack
    assert np.array_equal(got.argmax(-1)[clear], want.argmax(-1)[clear])
    return int(clear.sum())
