"""From a plain checkpoint to a quantised one in compressed-tensors' format, matrix by matrix."""

from __future__ import annotations

import fnmatch
import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from pace import ops
from pace.checkpoint import ModelFiles, model_files, resolve
from pace.errors import ConfigError, show
from pace.export.calibrate import Calibration, Rounded, calibrate
from pace.export.folder import copy_rest, new_folder
from pace.export.schemes import SCHEMES, WrittenScheme, written
from pace.export.writer import Described, ShardWriter
from pace.models.decoder import lower
from pace.models.formats import formats_of
from pace.models.plan import Gemm
from pace.models.quantisation import CONFIG_KEYS, with_own_file
from pace.models.registry import parse_config
from pace.models.tensors import DTYPES, Tensors, to_f32
from pace.quant.groups import F32Array, Fp8Rows, GroupedRows, U8Array

__all__ = ["SCHEMES", "Calibration", "Summary", "quantize_checkpoint"]

Progress = Callable[[int, int], None]
_PIECE: Final = 1 << 20  # weights that one thread rounds at a time
_SHARD_BYTES: Final = 5_000_000_000
_SAMPLED: Final = 8  # of so many rows, one is compared with what it became


@dataclass
class Summary:
    """What was written.

    Attributes:
        n_bytes, source_bytes: of all tensors.
        n_weights, weight_bytes: of the quantised matrices, scales included.
        signal, noise: sums of squares over the sampled rows of those, by scheme.
        kept: modules that stayed as they were, though they are multiplied.
    """

    n_bytes: int = 0
    source_bytes: int = 0
    n_weights: int = 0
    weight_bytes: int = 0
    signal: float = 0.0
    noise: float = 0.0
    kept: list[str] = field(default_factory=list)

    @property
    def bits(self) -> float:
        """Per quantised weight, scales included."""
        return 8 * self.weight_bytes / max(self.n_weights, 1)

    @property
    def snr(self) -> float:
        """Signal to noise of the quantised weights, in dB."""
        return 10 * float(np.log10(self.signal / self.noise)) if self.noise > 0 else float("inf")


class _Job(NamedTuple):
    """A tensor of the source and what becomes of it.

    Args:
        name: the file's.
        shape, dtype: of it.
        scheme: None: it is copied.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    scheme: WrittenScheme | None

    @property
    def module(self) -> str:
        return self.name.removesuffix(".weight")

    @property
    def n_bytes(self) -> int:
        """Of the source."""
        return Described(self.name, self.dtype, self.shape).n_bytes

    def described(self) -> list[Described]:
        if self.scheme is None:
            return [Described(self.name, self.dtype, self.shape)]
        tensors = self.scheme.tensors(self.shape[0], self.shape[1])
        return [Described(f"{self.module}.{end}", dtype, shape) for end, (dtype, shape) in tensors.items()]


def quantize_checkpoint(
    model: str,
    out: Path,
    scheme: str,
    keep: Sequence[tuple[str, str]] = (),
    progress: Progress | None = None,
    n_threads: int | None = None,
    calibration: Calibration | None = None,
) -> Summary:
    """Write a quantised copy of a checkpoint; nothing is left where it fails, but matrices that a calibration has rounded.

    Args:
        model: a folder, or a name of the hub.
        out: a folder that does not exist, or is empty.
        scheme: one of `SCHEMES`, of every linear layer but the LM head and routers.
        keep: (pattern of module names, "bf16" or "int8"): what matching layers become instead; the first that fits counts.
        progress: called with bytes done and in total.
        n_threads: that round; None: as many as the engine would have.
        calibration: rounds integers by GPTQ, with the rows of a text; None: each weight to the nearest, without data. What
            was done of it when a run ended is in a folder beside `out`, and the next run of the same inputs goes on there.

    Raises:
        ConfigError: unknown scheme, or one that fits no layer, a pattern that fits none, `out` can't be used, a calibration
            is too short or the scheme none of integers.
        CheckpointError: the model can't be read, or is quantised already.
    """
    if scheme not in SCHEMES:
        raise ConfigError(f"scheme is {show(scheme)}, expected one of {', '.join(SCHEMES)}")
    if calibration is not None and SCHEMES[scheme].kind != "int":
        raise ConfigError(f"scheme is {scheme}, which takes no calibration: GPTQ rounds to integers")
    files = model_files(resolve(model))
    values = _config(files)
    with closing(files.tensors()) as checkpoint:
        jobs, head = _jobs(values, files, checkpoint, SCHEMES[scheme], keep)
        if all(job.scheme is None for job in jobs):
            raise ConfigError(
                f"scheme is {scheme}, which rounds no layer of {files.path}: its groups divide no layer's columns, or "
                "--keep leaves all; take w8"
            )
        tensors = [tensor for job in jobs for tensor in job.described()]
        summary = Summary(n_bytes=sum(tensor.n_bytes for tensor in tensors))
        summary.source_bytes = sum(job.n_bytes for job in jobs)
        summary.kept = [job.module for job in jobs if job.scheme is None and job.module in head]
        steps = _Steps(progress, summary.source_bytes)
        rounded = None
        with new_folder(out, summary.n_bytes) as folder:
            if calibration is not None:
                schemes = {job.name: job.scheme for job in jobs if job.scheme is not None}
                steps.total += sum(job.n_bytes for job in jobs if job.scheme is not None)
                beside = out.parent / f".{out.name}.calibrated"
                rounded = calibrate(
                    files, values, checkpoint, schemes, calibration, beside, steps.add, n_threads
                )
            writer = ShardWriter(folder, tensors, _SHARD_BYTES)
            with ThreadPoolExecutor(n_threads or ops.default_threads()[0]) as pool:
                writer.write(_pieces(jobs, checkpoint, pool, summary, steps, rounded))
            copy_rest(files, folder)
            config = {**values, "quantization_config": _quantization_config(jobs)}
            (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        if rounded is not None:
            rounded.remove()
    return summary


class _Steps:
    """Adds up what is done, for whoever watches."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._done, self.total = progress, 0, total

    def add(self, n_bytes: int) -> None:
        self._done += n_bytes
        if self._progress is not None:
            self._progress(self._done, self.total)


def _config(files: ModelFiles) -> dict[str, Any]:
    values = files.json("config.json")
    if values is None:
        raise ConfigError(f"{files.path}: no config.json; expected the folder of a Hugging Face checkpoint")
    if any(with_own_file(values, files).get(key) for key in CONFIG_KEYS):
        raise ConfigError(
            f"{files.path} is quantised already; take the original checkpoint, nothing is rounded twice"
        )
    return values


def _jobs(
    values: dict[str, Any],
    files: ModelFiles,
    checkpoint: Any,
    scheme: WrittenScheme,
    keep: Sequence[tuple[str, str]],
) -> tuple[list[_Job], set[str]]:
    """What becomes of every tensor, and the modules that rows are multiplied by."""
    spec, weight_map = parse_config(values, files.where("config.json"))
    tensors = Tensors(checkpoint, weight_map, len(spec.layers))
    plan = lower(spec, 1)
    heads = {op.weight for op in plan.ops if isinstance(op, Gemm) and op.dst == plan.logits}
    own_names = tensors.file_names()
    targets: set[str] = set()
    for weight in formats_of(plan, "int8").keys() - heads:
        for part in tensors.table[weight]:
            targets.update(own_names.get(part.name, ()))
    used = dict.fromkeys((pattern for pattern, _ in keep), False)
    jobs: list[_Job] = []
    for name in checkpoint.names():
        info = checkpoint.info(name)
        own: WrittenScheme | None = None
        if (
            name in targets
            and len(info.shape) == 2
            and name.endswith(".weight")
            and info.dtype in ("BF16", "F16", "F32")
        ):
            own = _chosen(name.removesuffix(".weight"), info.shape[1], scheme, keep, used)
        jobs.append(_Job(name, tuple(info.shape), info.dtype, own))
    for pattern, fits in used.items():
        if not fits:
            raise ConfigError(
                f"--keep {show(pattern)} fits no linear layer, of which one is {min(targets, default='none')}"
            )
    return jobs, {name.removesuffix(".weight") for name in targets}


def _chosen(
    module: str, k: int, scheme: WrittenScheme, keep: Sequence[tuple[str, str]], used: dict[str, bool]
) -> WrittenScheme | None:
    for pattern, kind in keep:
        if fnmatch.fnmatchcase(module, pattern):
            used[pattern] = True
            return None if kind == "bf16" else SCHEMES["w8"]
    own: WrittenScheme | None = scheme
    while own is not None and not own.fits(k):
        own = own.narrower()
    return own


def _pieces(
    jobs: Sequence[_Job],
    checkpoint: Any,
    pool: ThreadPoolExecutor,
    summary: Summary,
    steps: _Steps,
    rounded: Rounded | None,
) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """The data of every tensor in order, rounded ahead by the pool."""
    for job in jobs:
        array = checkpoint.tensor(job.name)
        if job.scheme is None:
            yield job.name, array
        else:
            known = None if rounded is None else rounded.get(job.name)
            yield from _rounded(job, job.scheme, array, pool, summary, known)
        del array
        checkpoint.drop(job.name)
        steps.add(job.n_bytes)


def _rounded(
    job: _Job,
    scheme: WrittenScheme,
    array: npt.NDArray[Any],
    pool: ThreadPoolExecutor,
    summary: Summary,
    known: GroupedRows | None,
) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    n, k = job.shape
    step = max(_PIECE // k, 1)

    def one(at: int) -> tuple[dict[str, npt.NDArray[Any]], float, float]:
        source = np.ascontiguousarray(array[at : at + step])
        dtype, form = DTYPES[job.dtype.lower()], "fp8" if scheme.kind == "float" else f"int{scheme.bits}"
        if known is None:
            codes, scales = ops.quantise_rows(source, dtype, form, scheme.group or k)
        else:
            codes, scales = known.codes[at : at + step], known.scales[at : at + step]
        some = slice(None, None, _SAMPLED)
        exact = to_f32(source[some], dtype).astype(np.float64)
        error = exact - _rows(scheme, codes[some], scales[some]).dequantised()
        return written(codes, scales, scheme), float((exact**2).sum()), float((error**2).sum())

    starts = range(0, n, step)
    ahead = 8
    waiting = deque(pool.submit(one, at) for at in starts[:ahead])
    for i in range(len(starts)):
        tensors, signal, noise = waiting.popleft().result()
        if i + ahead < len(starts):
            waiting.append(pool.submit(one, starts[i + ahead]))
        summary.signal += signal
        summary.noise += noise
        for end, values in tensors.items():
            summary.weight_bytes += values.nbytes
            yield f"{job.module}.{end}", values
    summary.n_weights += n * k
    if scheme.packed:
        yield f"{job.module}.weight_shape", np.array([n, k], np.int64)


def _rows(scheme: WrittenScheme, codes: U8Array, scales: F32Array) -> GroupedRows | Fp8Rows:
    group = scheme.group or codes.shape[1]
    if scheme.kind == "float":
        return Fp8Rows(codes, group, scales)
    return GroupedRows(codes, scheme.bits, group, scales)


def _quantization_config(jobs: Sequence[_Job]) -> dict[str, Any]:
    """One group of layers for each scheme: the commonest by class, the others by name; what is left is named."""
    by_scheme: dict[WrittenScheme, list[str]] = {}
    for job in jobs:
        if job.scheme is not None:
            by_scheme.setdefault(job.scheme, []).append(job.module)
    ordered = sorted(by_scheme.items(), key=lambda item: -len(item[1]))
    groups = {
        f"group_{i}": scheme.config(["Linear"] if i == 0 else modules)
        for i, (scheme, modules) in enumerate(ordered)
    }
    formats = list(dict.fromkeys(scheme.format for scheme, _ in ordered))
    plain = [
        job.module
        for job in jobs
        if job.scheme is None
        and len(job.shape) == 2
        and job.name.endswith(".weight")
        and "embed" not in job.module
    ]
    return {
        "quant_method": "compressed-tensors",
        "format": formats[0] if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": list(dict.fromkeys([*plain, "lm_head"])),
        "kv_cache_scheme": None,
    }
