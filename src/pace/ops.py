"""The compiled kernels by name: the only importer of `pace._ext`. Nothing is computed here.

bf16 arrays are numpy `uint16` (numpy has no bf16). Every array passed in is C-contiguous; shapes and dtypes are
checked once, here or in the extension, before the GIL is released.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pace._ext import _kernels
from pace.config import PACE_ISA
from pace.errors import CheckpointError, ConfigError, ForkError
from pace.models import plan as ir

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]

KV_DTYPES = ("bf16", "int8")
"""Element types of the KV cache."""

OPERATORS = ("embed", "norm", "gemm", "rope", "attention", "select")
"""Names that an engine's `kernels` mapping takes: each operator's tier can be chosen on its own."""

_DTYPES = {"bf16": (0, np.uint16), "f16": (1, np.float16), "f32": (2, np.float32)}
_MODES = {"rows": 0, "gate": 1, "up": 2}
_NORMS = {"rms": 0, "rms1": 1, "layer": 2}
_ACTS = {None: 0, "silu": 1, "gelu": 2, "gelu_tanh": 3, "relu": 4}
_EPILOGUES = {"store": 0, "add": 1, "gated": 2}


# ---- ISA tiers --------------------------------------------------------------------------------------------


def isas() -> list[str]:
    """ISA tiers that this CPU and operating system execute, best first."""
    return _kernels.runnable()


def tiers() -> list[tuple[str, str | None]]:
    """Every compiled tier, best first, with what is missing here to run it (None: it runs)."""
    return _kernels.tiers()


def isa() -> str:
    """The tier whose kernels run unless an engine chooses others."""
    return _kernels.isa() or ""


def use_isa(name: str | None) -> None:
    """Make `name` the tier of everything built from now on; None: the best that runs.

    Raises:
        ConfigError: the tier is unknown or does not run here; the message lists those that do.
    """
    try:
        _kernels.use_isa(name if name is not None else isas()[0])
    except ValueError as error:
        raise ConfigError(str(error)) from None


@contextmanager
def using_isa(name: str) -> Iterator[None]:
    """`use_isa(name)` for the length of a with block."""
    before = isa()
    use_isa(name)
    try:
        yield
    finally:
        use_isa(before)


def _select() -> None:
    if not isas():
        missing = dict(_kernels.tiers())["avx2"]
        raise ImportError(
            f"pace needs an x86-64 CPU with AVX2, FMA and F16C (Intel Haswell, AMD Zen or newer); this one lacks {missing}"
        )
    try:
        use_isa(PACE_ISA.get())
    except ConfigError as error:
        raise ImportError(str(error)) from None


_select()


def cpu_info() -> dict[str, Any]:
    """What the machine is: vendor, brand, features, caches in bytes, threads and why that many, huge pages, NUMA."""
    return _kernels.cpu()


def default_threads() -> tuple[int, str]:
    """Threads an engine takes by default, and one line that says why."""
    info = _kernels.cpu()
    return info["threads"], info["threads_why"]


def roof_read(team: Team, n_bytes: int, repeat: int = 1) -> float:
    """Memory-read roof of the team in bytes/s: `repeat` passes over `n_bytes` of fresh memory, best vectors."""
    return team._team.roof_read(_read_buffer(n_bytes), repeat)


_buffers: dict[int, _kernels.Memory] = {}


def _read_buffer(n_bytes: int) -> _kernels.Memory:
    if n_bytes not in _buffers:
        _buffers.clear()
        _buffers[n_bytes] = memory = _kernels.Memory(n_bytes)
        # Untouched pages all read one shared zero page, from the cache.
        np.frombuffer(memoryview(memory), np.uint8)[:] = 1
    return _buffers[n_bytes]


def roof_dot(team: Team, kind: str, isa: str | None = None, iterations: int = 2_000_000) -> float:
    """Dot-product roof of the team in operations/s (2 per multiply-add), from registers only.

    Args:
        kind: "bf16", "int8" or "f32".
        isa: the tier whose best instruction is used; None: the chosen one.
    """
    return team._team.roof_dot(kind, isa, iterations)


# ---- building blocks --------------------------------------------------------------------------------------


class Team:
    """Persistent threads that run a plan's steps; the caller is one of them.

    Args:
        n_threads: workers, the caller included.
        cpus: one CPU number per worker to pin them, or None.
    """

    def __init__(self, n_threads: int, cpus: Sequence[int] | None = None) -> None:
        try:
            self._team = _kernels.Team(n_threads, None if cpus is None else list(cpus))
        except (ValueError, OSError) as error:
            raise ConfigError(str(error)) from None
        self.n_threads = n_threads

    def close(self) -> None:
        """End the threads. A later step on this team raises RuntimeError."""
        self._team.close()


class PackedMatrix:
    """A weight [n, k] in bf16 panels, laid out as the kernels read it; filled part by part."""

    def __init__(self, team: Team, n: int, k: int) -> None:
        self._team = team
        self._matrix = _kernels.Matrix(n, k)
        self.n = n
        self.k = k

    @property
    def nbytes(self) -> int:
        """Bytes of the packed copy, padding included."""
        return self._matrix.nbytes

    def pack(self, src: npt.NDArray[Any], dtype: str, at: int = 0, mode: str = "rows") -> None:
        """Convert rows to bf16 and place them.

        Args:
            src: [rows, k]; uint16 for "bf16", float16 for "f16", float32 for "f32".
            at: first packed row, a multiple of 16.
            mode: "rows", or "gate" / "up": alternate blocks of 16 rows (see `models.plan.gated_rows`).

        Raises:
            CheckpointError: the rows are of a mapped file that was truncated, or that its disk no longer gives.
        """
        code, np_dtype = _DTYPES[dtype]
        if src.dtype != np_dtype or src.ndim != 2 or not src.flags.c_contiguous:
            raise ValueError(
                f"source is {src.dtype} {src.shape}, expected C-contiguous {np_dtype.__name__} [rows, {self.k}]"
            )
        try:
            self._matrix.pack(self._team._team, src.view(np.uint8), code, at, _MODES[mode])
        except _kernels.Truncated as error:
            raise CheckpointError(
                f"{error}; copy the checkpoint again, and load it when that is done"
            ) from None

    def unpack(self) -> F32:
        """The matrix as f32 [n, k]."""
        return self._matrix.unpack()


class KVPool:
    """KV cache memory of every layer: n_blocks blocks of block_size tokens, keys and values.

    Args:
        head_dim: a multiple of 16 up to 256.
        block_size: tokens in a block, a power of two from 16 on.
        dtype: "bf16", or "int8": per token and kv head one float32 scale for the key and one for the value
            (largest magnitude / 127); a block takes n_layers * n_kv_heads * block_size * (2 * head_dim + 8) bytes.
        contiguous: a sequence's blocks follow each other, and `Batch.block_tables` is [S, 1], the first of them.

    Raises:
        ConfigError: a size or dtype is not one of those.
        MemoryError: the system refuses the memory.
    """

    def __init__(
        self,
        n_layers: int,
        n_kv_heads: int,
        head_dim: int,
        n_blocks: int,
        block_size: int,
        dtype: str = "bf16",
        contiguous: bool = False,
    ) -> None:
        if dtype not in KV_DTYPES:
            raise ConfigError(f"KV cache dtype is {dtype!r}, expected bf16 or int8")
        try:
            self._pool = _kernels.KVPool(
                n_layers, n_kv_heads, head_dim, n_blocks, block_size, dtype == "int8", contiguous
            )
        except ValueError as error:
            raise ConfigError(str(error)) from None
        self.n_blocks = n_blocks
        self.block_size = block_size
        self.dtype = dtype
        self.contiguous = contiguous

    @property
    def nbytes(self) -> int:
        """Bytes reserved; pages are touched only when tokens are stored, or soon will be: see `n_mapped`."""
        return self._pool.nbytes

    @property
    def n_mapped(self) -> int:
        """Leading blocks that steps have used or prepared: each step maps the pages of one more block than it uses, while
        there are fewer than one ahead per sequence."""
        return self._pool.n_mapped

    def copy(self, src: int, dst: int, n_tokens: int) -> None:
        """Make the first `n_tokens` tokens of block `src` those of block `dst`, in every layer; appending goes on
        behind them. Runs without the GIL. No step that touches either block may run meanwhile.

        Args:
            src, dst: two different blocks.
            n_tokens: 0 to block_size.

        Raises:
            ValueError: a block or the count is out of range; nothing was copied.
        """
        self._pool.copy(src, dst, n_tokens)


class MappedTable(NamedTuple):
    """A table whose rows are read where the checkpoint file has them.

    Args:
        rows: [n, k], a view of the mapped file; bf16 as uint16.
        dtype: "bf16", "f16" or "f32".
    """

    rows: npt.NDArray[Any]
    dtype: str


class Plan:
    """A compiled plan: `models.plan.Plan` bound to weights, a KV pool and a thread team.

    Args:
        plan: the operators.
        weights: by plan name: `PackedMatrix` for matrices, f32 arrays for vectors.
        max_tokens, max_seqs: most rows and sequences of one step.
        max_logit_rows: rows of logits that exist at a time; a step may ask for more, see `logits_from`.
        kernels: operator name (see `OPERATORS`) -> tier, or "reference" for the scalar C kernel; operators not
            named use the chosen tier.

    Raises:
        ConfigError: unknown operator or tier in `kernels`.
    """

    def __init__(
        self,
        team: Team,
        plan: ir.Plan,
        weights: Mapping[str, PackedMatrix | F32 | MappedTable],
        kv_pool: KVPool,
        max_tokens: int,
        max_seqs: int,
        max_logit_rows: int,
        kernels: Mapping[str, str] | None = None,
    ) -> None:
        for op in plan.ops:
            _check_supported(op, plan)
        n_heads = next((op.n_heads for op in plan.ops if isinstance(op, ir.RopeKV | ir.Attention)), 1)
        self.ir = plan
        self._team = team
        self._max_tokens = max_tokens
        self._kernels = check_kernels(kernels or {})
        self._plan = _kernels.Plan(
            team._team, kv_pool._pool, max_tokens, max_seqs, max_logit_rows, n_heads, plan.vocab_size
        )
        self._weights = weights
        self._slots = {
            slot.name: self._plan.add_slot(
                slot.width,
                slot.dtype == "bf16",
                slot.rows == "logits",
                max_logit_rows if slot.rows == "logits" and slot.name == plan.logits else max_tokens,
            )
            for slot in plan.slots.values()
        }
        self._op_names: list[str] = []
        self._angles = [self._add_angles(i, rope) for i, rope in enumerate(plan.ropes)]
        for op in plan.ops:
            self._add(op)
            self._op_names.append(op.name)
        self._logits: F32 = self._plan.view(self._slots[plan.logits])
        self._logits.flags.writeable = False  # the maxima would not follow
        self._stepped = self._logits[:0]  # what the last step returned: its rows' maxima are noted
        self._maxima = self._plan.set_head(self._slots[plan.logits])
        self._n_logit_rows = 0  # of the last step
        self._drawn: SampleResult | None = None

    def _matrix(self, name: str) -> _kernels.Matrix:
        weight = self._weights[name]
        if not isinstance(weight, PackedMatrix):
            raise TypeError(f"weight {name} is a vector, the operator needs a packed matrix")
        return weight._matrix

    def _vector(self, name: str | None) -> F32 | None:
        if name is None:
            return None
        weight = self._weights[name]
        if not isinstance(weight, np.ndarray):
            raise TypeError(f"weight {name} is a matrix, the operator needs a vector")
        return weight

    def _add_angles(self, i: int, rope: ir.Rope) -> tuple[int, int]:
        half = rope.rotary_dim // 2
        cos, sin = (self._plan.add_slot(half, False, False, self._max_tokens) for _ in range(2))
        self._plan.add_angles(None, rope.inv_freq, cos, sin, rope.attention_factor)
        self._op_names.append(f"angles.{i}")
        return cos, sin

    def _add(self, op: ir.Op) -> None:
        plan, slots, tier = self._plan, self._slots, self._kernels.get
        if isinstance(op, ir.Embed):
            assert op.weight is not None
            plan.add_embed(tier("embed"), slots[op.dst], self._matrix(op.weight), op.scale)
        elif isinstance(op, ir.Norm):
            weight = self._vector(op.weight)
            assert weight is not None
            plan.add_norm(
                tier("norm"),
                slots[op.src],
                slots[op.dst],
                weight,
                self._vector(op.bias),
                _NORMS[op.kind],
                op.eps,
                op.add,
            )
        elif isinstance(op, ir.Gemm):
            plan.add_gemm(
                tier("gemm"),
                slots[op.src],
                slots[op.dst],
                self._matrix(op.weight),
                self._vector(op.bias),
                _EPILOGUES[op.epilogue],
                _ACTS[op.act],
                op.scale,
            )
        elif isinstance(op, ir.RopeKV):
            rope = None if op.rope is None else self.ir.ropes[op.rope]
            cos, sin = (0, 0) if op.rope is None else self._angles[op.rope]
            plan.add_rope_kv(
                tier("rope"),
                slots[op.src],
                slots[op.dst],
                op.kv,
                cos,
                sin,
                0 if rope is None else rope.rotary_dim,
                rope is not None and rope.interleaved,
                self._vector(op.q_norm),
                self._vector(op.k_norm),
                _NORMS["rms" if op.qk_norm == "none" else op.qk_norm],
                op.norm_eps,
            )
        elif isinstance(op, ir.Attention):
            plan.add_attention(
                tier("attention"),
                slots[op.src],
                slots[op.dst],
                op.kv,
                op.scale,
                op.softcap or 0.0,
                op.window or 0,
                self._vector(op.sinks),
            )
        else:
            plan.add_select(tier("select"), slots[op.src], slots[op.dst])

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
            self._plan.step(
                batch.token_ids, batch.q_start, batch.kv_len, batch.block_tables, batch.logit_rows
            )
        except _kernels.Forked as error:
            raise ForkError(str(error)) from None
        self._n_logit_rows = len(batch.logit_rows)
        self._stepped = self._logits[: self._n_logit_rows]
        return self._stepped

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

    def sample(
        self,
        logits: F32,
        params: npt.NDArray[Any],
        history: Sequence[tuple[I32, I32, I32, I32, F32, I32] | None],
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
        """All rows of an activation slot as the last step left them (f32, or uint16 holding bf16)."""
        return self._plan.view(self._slots[name])

    def op_times(self) -> list[tuple[str, float]]:
        """Name and seconds of every operator of the last step, in order."""
        return list(zip(self._op_names, self._plan.op_seconds(), strict=True))


def _check_supported(op: ir.Op, plan: ir.Plan) -> None:
    """Raise ConfigError for what no kernel computes yet."""
    neutral: dict[str, Any] = {}
    if isinstance(op, ir.Embed):
        neutral = {"positions": None, "add": False, "post": 1.0, "mapped": False}
    elif isinstance(op, ir.Norm):
        neutral = {"groups": 1, "scale": None}
        if op.kind not in _NORMS:
            raise ConfigError(f"{op.name}: no kernel computes norm {op.kind!r}")
    elif isinstance(op, ir.Gemm):
        neutral = {"cap": None, "other": None}
        if op.act not in _ACTS:
            raise ConfigError(f"{op.name}: no kernel computes activation {op.act!r}")
    elif isinstance(op, ir.RopeKV):
        neutral = {"append": True, "k_is_v": False, "norm_after_rope": False, "v_norm": False}
        neutral |= {"norm_scope": "head", "norm_width": None, "temperature": None}
        if op.qk_norm != "none" and (op.q_norm is None or op.k_norm is None):
            raise ConfigError(f"{op.name}: no kernel computes a norm of heads without weights")
    elif isinstance(op, ir.Attention):
        neutral = {"chunk": None}
    for field, value in neutral.items():
        if getattr(op, field) != value:
            raise ConfigError(f"{op.name}: no kernel computes {field} = {getattr(op, field)!r}")
    if len({(layer.n_kv_heads, layer.head_dim) for layer in plan.kv}) > 1:
        raise ConfigError("layers of different KV shapes do not run together")


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


# ---- sampling ---------------------------------------------------------------------------------------------

SAMPLE_DTYPE = np.dtype(
    [
        ("temperature", "f4"),
        ("top_p", "f4"),
        ("min_p", "f4"),
        ("repetition_penalty", "f4"),
        ("presence_penalty", "f4"),
        ("frequency_penalty", "f4"),
        ("top_k", "i4"),
        ("n_logprobs", "i4"),
        ("seed", "u8"),
        ("position", "u8"),
        ("sample_index", "u4"),
    ]
)
"""One row's sampling parameters. top_k <= 0, top_p >= 1 and min_p <= 0 are off; temperature 0 is greedy, others are
at least 1e-5. n_logprobs: -1 none, 0 the drawn token's, n also the n best. seed, position and sample_index choose the
random number."""


class SampleResult(NamedTuple):
    """What `sample` drew, one entry per row; K is the largest n_logprobs of the batch."""

    tokens: I32  # [R]
    logprobs: F32  # [R] log-softmax of the raw logits at the token; 0 where n_logprobs < 0
    ranks: I32  # [R] tokens whose logit is at least the token's: 1 for the best
    top_ids: I32  # [R, K] most likely tokens, -1 where fewer were asked for
    top_logprobs: F32  # [R, K]
    errors: I32  # [R] not 0: nothing was drawn; -1: the row holds a NaN or +inf, -2: no token is left


def sample(
    team: Team,
    logits: F32,
    params: npt.NDArray[Any],
    history: Sequence[tuple[I32, I32, I32, I32, F32, I32] | None],
    maxima: F32 | None = None,
    out: SampleResult | None = None,
) -> SampleResult:
    """Draw one token per row; rows are independent of each other and of how many there are.

    Args:
        logits: f32 [R, V]; each row contiguous.
        params: [R] of SAMPLE_DTYPE.
        history: per row None, or (prompt ids, output ids, banned ids, bias ids, biases, allowed ids): the first
            two for penalties; biases are added to the logits of distinct bias ids; no allowed ids: all are.
            Ids outside the vocabulary are ignored.
        maxima: f32 [R, blocks of 128 columns]: the largest logit of each block, NaN where it holds one; None: they
            are computed.
        out: an earlier result to write over, where it has the right shape: a step leaves nothing of the interpreter
            in the caches, and six new arrays cost 30 us then.
    """
    n = len(logits)
    k = _kernels.most_logprobs(params)
    if out is None or out.top_ids.shape != (n, k):
        out = SampleResult(
            np.empty(n, np.int32),
            np.empty(n, np.float32),
            np.empty(n, np.int32),
            np.full((n, k), -1, np.int32),
            np.zeros((n, k), np.float32),
            np.zeros(n, np.int32),
        )
    _kernels.sample(team._team, logits, maxima, params, history, *out)
    return out


class LogprobsResult(NamedTuple):
    """What `logprobs` found, one entry per row; K is max(1, n)."""

    logprobs: F32  # [R] log-softmax of the logits at the token
    ranks: I32  # [R] tokens whose logit is at least the token's: 1 for the best
    top_ids: I32  # [R, K] most likely tokens, -1 where n is 0
    top_logprobs: F32  # [R, K]
    errors: I32  # [R] not 0: the row has no distribution, as for `sample`; its entries hold nothing


def logprobs(team: Team, logits: F32, tokens: I32, n: int) -> LogprobsResult:
    """Log probabilities of given tokens, and of the n most likely ones of their rows.

    Args:
        logits: f32 [R, V].
        tokens: i32 [R], 0 <= token < V.
        n: how many most likely tokens, 0 <= n <= V.

    Raises:
        ValueError: lengths differ, or a token or n is out of range.
    """
    rows, k = len(logits), max(1, n)
    out = LogprobsResult(
        np.zeros(rows, np.float32),
        np.zeros(rows, np.int32),
        np.full((rows, k), -1, np.int32),
        np.zeros((rows, k), np.float32),
        np.zeros(rows, np.int32),
    )
    _kernels.logprobs(team._team, logits, tokens, n, *out)
    return out


def softmax(x: F32) -> None:
    """Softmax of one f32 row, in place."""
    _kernels.softmax(x)


def argmax(x: F32) -> int:
    """Index of the largest element (the lowest among equals), -1 if there is a NaN."""
    return _kernels.argmax(x)
