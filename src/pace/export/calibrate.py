"""Matrices rounded with what a text puts into them: the plan runs operator by operator, and stops before each matrix.

All rows of the text go through an operator at once, so that a slot holds what a matrix meets when its turn comes, and
nothing runs twice. A matrix that was rounded is packed again over itself before its operator runs: those behind it see what
the quantised model will show them.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from pace import ops
from pace.checkpoint import ModelFiles
from pace.engine.packing import PackedSink
from pace.errors import ConfigError
from pace.export.gptq import Hessian, round_rows, to_bf16
from pace.export.schemes import WrittenScheme
from pace.models.decoder import lower
from pace.models.expert_operators import ExpertsIn, ExpertsOut
from pace.models.operators import Gemm, RopeKV
from pace.models.plan import Batch, I32Array, Plan
from pace.models.registry import parse_config
from pace.models.sources import Source, check
from pace.models.tensors import SourceArray, Tensors, to_f32
from pace.models.weights import load_weights, settle_head
from pace.quant.groups import F32Array, GroupedRows, U8Array
from pace.text.tokenizer import Tokenizer

__all__ = ["Calibration", "Rounded", "calibrate"]

Progress = Callable[[int], None]
Product = Gemm | ExpertsIn | ExpertsOut

_BLOCK: Final = 32  # tokens of a block of the KV cache
_LEAST: Final = 256  # tokens that say anything
_PIECE: Final = 256  # rows that a thread rounds at a time


@dataclass(frozen=True)
class Calibration:
    """What matrices are rounded by.

    Args:
        texts: joined, in their order.
        n_tokens: so many of them are read, in pieces that are spread over all.
        length: tokens of a piece, each read on its own.
    """

    texts: Sequence[str]
    n_tokens: int = 16384
    length: int = 512

    def pieces(self, tokenizer: Tokenizer, most: int) -> list[I32Array]:
        """Token ids, in pieces of at most `most`, each with the BOS that opens a prompt.

        Raises:
            ConfigError: there are too few.
        """
        whole = tokenizer.max_prompt_bytes // 4  # characters that are read at once
        parts = [text[at : at + whole] for text in self.texts for at in range(0, len(text), whole)]
        read = tokenizer.encode_batch(parts, add_special_tokens=False)
        ids = np.array([i for part in read for i in part], np.int32)
        if len(ids) < _LEAST:
            raise ConfigError(f"the calibration has {len(ids)} tokens, expected {_LEAST} or more; add text")
        (opening,) = tokenizer.encode_chats([""])
        length = min(self.length, most, len(ids)) - len(opening)
        n = len(ids) // length
        wanted = min(n, max(self.n_tokens // length, 1))
        starts = np.arange(wanted) * n // wanted * length
        return [np.concatenate([np.array(opening, np.int32), ids[at : at + length]]) for at in starts]


class Rounded:
    """Matrices that are rounded already, in a folder of files, so that a run that was killed goes on where it was.

    Args:
        folder: taken as it is if it was made of the same inputs, else made anew.
        inputs: a digest of all that the matrices depend on.
    """

    def __init__(self, folder: Path, inputs: str) -> None:
        self._folder, note = folder, folder / "inputs"
        if not note.is_file() or note.read_text() != inputs:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            note.write_text(inputs)

    def get(self, name: str) -> GroupedRows | None:
        """The rows of a tensor; None: it was not rounded yet."""
        path = self._folder / f"{name}.npz"
        if not path.is_file():
            return None
        with np.load(path) as held:
            return GroupedRows(held["codes"], int(held["bits"]), int(held["group"]), held["scales"])

    def put(self, name: str, rows: GroupedRows) -> None:
        """Keep the rows of a tensor; the file is there whole or not at all."""
        partial = self._folder / "partial"
        with partial.open("wb") as file:
            np.savez(file, codes=rows.codes, bits=rows.bits, group=rows.group, scales=rows.scales)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self._folder / f"{name}.npz")

    def remove(self) -> None:
        """Take the folder away."""
        shutil.rmtree(self._folder, ignore_errors=True)


class _Matrix(NamedTuple):
    """A tensor of the checkpoint that is rounded.

    Args:
        file_name: as the file has it.
        scheme: of it.
    """

    file_name: str
    scheme: WrittenScheme


def calibrate(
    files: ModelFiles,
    values: Mapping[str, Any],
    checkpoint: Any,
    schemes: Mapping[str, WrittenScheme],
    calibration: Calibration,
    folder: Path,
    progress: Progress,
    n_threads: int | None = None,
) -> Rounded:
    """Round matrices by a text; what is done already is taken from the folder.

    Args:
        values: of config.json.
        checkpoint: its tensors.
        schemes: of integers, by the file's names of the tensors.
        folder: of finished matrices.
        progress: called with the bytes of tensors that are done, behind each.

    Raises:
        ConfigError: the text is too short.
        CheckpointError: the model or its tokenizer can't be read.
    """
    spec, weight_map = parse_config(values, files.where("config.json"))
    tensors = Tensors(checkpoint, weight_map, len(spec.layers))
    spec = settle_head(spec, tensors)
    tokenizer = Tokenizer(files, vocab_size=spec.vocab_size, max_model_len=spec.max_len)
    pieces = calibration.pieces(tokenizer, spec.max_len)
    rounded = Rounded(folder, _digest(values, checkpoint, schemes, pieces))
    plan = lower(spec, max(map(len, pieces)), (0,))  # with a tap, all rows go through the last layer, too
    wanted = {
        ours: _Matrix(name, schemes[name])
        for ours in tensors.names()
        for name in (tensors.file_name(ours),)
        if name in schemes
    }
    with closing(ops.Team(n_threads or ops.default_threads()[0])) as team:
        sink = PackedSink(team)
        load_weights(plan, tensors, sink)
        _Run(plan, tensors, sink, wanted, rounded, pieces, team).all(progress)
    return rounded


def _digest(
    values: Mapping[str, Any],
    checkpoint: Any,
    schemes: Mapping[str, WrittenScheme],
    pieces: Sequence[I32Array],
) -> str:
    """Of all that rounded matrices depend on."""
    sums = hashlib.sha256()
    named = {name: asdict(scheme) for name, scheme in schemes.items()}
    sums.update(json.dumps([values, named], sort_keys=True).encode())
    for piece in pieces:
        sums.update(len(piece).to_bytes(8, "little") + piece.tobytes())
    for name in sorted(checkpoint.names()):
        sums.update(name.encode() + np.ascontiguousarray(checkpoint.tensor(name)).view(np.uint8).data)
        checkpoint.drop(name)
    return sums.hexdigest()


class _Replaced:
    """Tensors under the names of the architecture, in place of a checkpoint's."""

    def __init__(self) -> None:
        self.arrays: dict[str, SourceArray] = {}

    def tensor(self, name: str) -> SourceArray:
        return self.arrays[name]

    def matrix(self, name: str) -> None:
        return None


class _Run:
    """A text on its way through a plan.

    Args:
        plan, sink: the model, on bf16 weights; those that are rounded change.
        wanted: what is rounded, by the architecture's names.
    """

    def __init__(
        self,
        plan: Plan,
        tensors: Tensors,
        sink: PackedSink,
        wanted: Mapping[str, _Matrix],
        rounded: Rounded,
        pieces: Sequence[I32Array],
        team: ops.Team,
    ) -> None:
        self._plan, self._tensors, self._weights = plan, tensors, sink.weights
        self._wanted, self._rounded = wanted, rounded
        self._sources = check(plan.weights, tensors)
        self._n_rows = sum(map(len, pieces))
        self._attended = {op.src for op in plan.ops if isinstance(op, RopeKV)}
        self._pool = ThreadPoolExecutor(team.n_threads)
        blocks = np.array([-(-len(piece) // _BLOCK) for piece in pieces])
        pools = [
            ops.KVPool(len(g.layers), g.layer.n_kv_heads, g.layer.head_dim, int(blocks.sum()), _BLOCK)
            for g in plan.groups()
        ]
        first = np.cumsum(blocks) - blocks
        table = (first[:, None] + np.minimum(np.arange(blocks.max()), blocks[:, None] - 1)).astype(np.int32)
        self._executor = ops.Plan(team, plan, sink.weights, pools, self._n_rows, len(pieces), 1)
        self._batch = Batch(
            np.concatenate(pieces),
            np.cumsum([0, *map(len, pieces)]).astype(np.int32),
            np.array([len(piece) for piece in pieces], np.int32),
            (table,) * len(pools),
            np.array([self._n_rows - 1], np.int32),
        )

    def all(self, progress: Progress) -> None:
        """Round every matrix, in the order in which rows meet them."""
        ran = 0
        done: set[str] = set()
        with self._pool:
            for i, op in enumerate(self._plan.ops):
                if not isinstance(op, Product) or op.weight in done:
                    continue
                names = dict.fromkeys(source.name for source in self._sources[op.weight])
                if not any(name in self._wanted for name in names):
                    continue
                done.add(op.weight)
                self._executor.step_part(self._batch, ran, i)
                ran = i
                self._round(op, progress)

    def _round(self, op: Product, progress: Progress) -> None:
        """Round the matrices of an operator, all of whose inputs are there, and pack them again."""
        packed = self._weights[op.weight]
        if not isinstance(packed, ops.PackedMatrix):
            return
        replaced, hessians = _Replaced(), dict[int, Hessian]()
        for source in self._sources[op.weight]:
            wanted = self._wanted.get(source.name)
            if wanted is None:
                continue
            if source.name not in replaced.arrays:
                rows = self._rounded.get(wanted.file_name)
                if rows is None:
                    if source.matrix not in hessians:
                        hessians[source.matrix] = self._hessian(op, source)
                    rows = self._gptq(source, hessians[source.matrix], wanted.scheme)
                    self._rounded.put(wanted.file_name, rows)
                replaced.arrays[source.name] = _as_source(rows.dequantised(), source)
                progress(rows.codes.size * replaced.arrays[source.name].itemsize)
            array, _ = source.read(replaced)
            packed.pack(np.asarray(array), source.dtype, source.at, source.mode, source.matrix)

    def _gptq(self, source: Source, hessian: Hessian, scheme: WrittenScheme) -> GroupedRows:
        weights = to_f32(self._tensors.tensor(source.name), source.dtype)
        n, k = weights.shape
        group = scheme.group or k
        loss = hessian.loss()

        def piece(at: int) -> tuple[U8Array, F32Array]:
            return round_rows(weights[at : at + _PIECE], loss, scheme.bits, group)

        found = list(self._pool.map(piece, range(0, n, _PIECE)))
        codes, scales = (np.concatenate([pair[i] for pair in found]) for i in (0, 1))
        return GroupedRows(codes, scheme.bits, group, scales)

    def _hessian(self, op: Product, source: Source) -> Hessian:
        """Of the rows that meet a matrix, without the columns that fill it up."""
        rows = self._inputs(op, source.matrix)
        blocks = source.columns
        if blocks is not None and blocks.filled != blocks.width:
            rows = rows.reshape(len(rows), blocks.count, blocks.filled)[:, :, : blocks.width]
            rows = rows.reshape(len(rows), -1)
        hessian = Hessian(rows.shape[1])
        hessian.add(rows)
        if isinstance(op, Gemm) and op.dst in self._attended:
            # Rows of a piece look at its first one alone about as much as at all others together (attention sinks).
            first = self._batch.q_start[:-1]
            hessian.add(rows[first], len(rows) // len(first))
        return hessian

    def _inputs(self, op: Product, expert: int) -> npt.NDArray[np.uint16]:
        """bf16 [rows, k] that an operator multiplies by a matrix: of experts the rows that chose this one."""
        slot = self._plan.slots[op.src]
        rows: npt.NDArray[np.uint16] = self._executor.slot(op.src)[: self._n_rows * slot.times]
        if isinstance(op, Gemm):
            return rows
        route = self._executor.slot(op.route)[: self._n_rows]
        top_k = route.shape[1] // 2
        ids = route[:, :top_k].astype(np.int32).reshape(-1)
        order = np.argsort(ids, kind="stable")
        chosen = ids[order] == expert
        # Behind the first product, rows lie sorted by expert.
        met: npt.NDArray[np.uint16] = rows[chosen if isinstance(op, ExpertsOut) else (order // top_k)[chosen]]
        return met


def _as_source(values: F32Array, source: Source) -> SourceArray:
    """In the type of the tensor that they replace, to the nearest."""
    if source.dtype == "bf16":
        bits = to_bf16(values).view(np.uint32)
        return (bits >> 16).astype(np.uint16)
    return values.astype(np.float16 if source.dtype == "f16" else np.float32)
