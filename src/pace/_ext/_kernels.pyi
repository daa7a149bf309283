from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]

class Forked(RuntimeError): ...
class Truncated(OSError): ...

class Memory:
    nbytes: int
    def __init__(self, nbytes: int) -> None: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

class Team:
    n_threads: int
    def __init__(self, n_threads: int, cpus: Sequence[int] | None = None) -> None: ...
    def close(self) -> None: ...
    def roof_read(self, memory: Memory, repeat: int) -> float: ...
    def roof_dot(self, kind: str, tier: str | None, iterations: int) -> float: ...

class Matrix:
    n: int
    k: int
    def __init__(self, n: int, k: int) -> None: ...
    @property
    def nbytes(self) -> int: ...
    def pack(self, team: Team, src: npt.NDArray[np.uint8], dtype: int, at: int, mode: int) -> None: ...
    def unpack(self) -> F32: ...

class KVPool:
    n_layers: int
    n_kv_heads: int
    head_dim: int
    n_blocks: int
    block_size: int
    contiguous: bool
    def __init__(
        self,
        n_layers: int,
        n_kv_heads: int,
        head_dim: int,
        n_blocks: int,
        block_size: int,
        int8: bool,
        contiguous: bool,
    ) -> None: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def n_mapped(self) -> int: ...
    def copy(self, src: int, dst: int, n_tokens: int) -> None: ...

class Plan:
    vocab_size: int
    nbytes: int
    def __init__(
        self,
        team: Team,
        pool: KVPool,
        max_tokens: int,
        max_seqs: int,
        max_logits: int,
        n_heads: int,
        vocab_size: int,
    ) -> None: ...
    def add_slot(self, width: int, is_bf16: bool, logits: bool, rows: int) -> int: ...
    def add_embed(self, tier: str | None, dst: int, table: Matrix, scale: float) -> None: ...
    def add_norm(
        self,
        tier: str | None,
        src: int,
        dst: int,
        weight: F32,
        bias: F32 | None,
        kind: int,
        eps: float,
        add: bool,
    ) -> None: ...
    def add_gemm(
        self,
        tier: str | None,
        src: int,
        dst: int,
        w: Matrix,
        bias: F32 | None,
        epilogue: int,
        act: int,
        scale: float,
    ) -> None: ...
    def add_angles(self, tier: str | None, inv_freq: F32, cos: int, sin: int, factor: float) -> None: ...
    def add_rope_kv(
        self,
        tier: str | None,
        src: int,
        dst: int,
        layer: int,
        cos: int,
        sin: int,
        rotary_dim: int,
        interleaved: bool,
        q_norm: F32 | None,
        k_norm: F32 | None,
        norm_kind: int,
        norm_eps: float,
    ) -> None: ...
    def add_attention(
        self,
        tier: str | None,
        src: int,
        dst: int,
        layer: int,
        scale: float,
        softcap: float,
        window: int,
        sinks: F32 | None,
    ) -> None: ...
    def add_select(self, tier: str | None, src: int, dst: int) -> None: ...
    def set_head(self, logits: int) -> F32 | None: ...
    def view(self, i: int) -> npt.NDArray[Any]: ...
    def step(self, token_ids: I32, q_start: I32, kv_len: I32, block_tables: I32, logit_rows: I32) -> None: ...
    def head(self, first: int) -> None: ...
    def op_seconds(self) -> list[float]: ...

def tiers() -> list[tuple[str, str | None]]: ...
def runnable() -> list[str]: ...
def use_isa(tier: str | None) -> None: ...
def isa() -> str | None: ...
def cpu() -> dict[str, Any]: ...
def softmax(x: F32) -> None: ...
def argmax(x: F32) -> int: ...
def most_logprobs(params: npt.NDArray[Any]) -> int: ...
def sample(
    team: Team,
    logits: F32,
    maxima: F32 | None,
    params: npt.NDArray[Any],
    history: Sequence[tuple[I32, I32, I32, I32, F32, I32] | None],
    tokens: I32,
    logprobs: F32,
    ranks: I32,
    top_ids: I32,
    top_logprobs: F32,
    errors: I32,
) -> None: ...
def logprobs(
    team: Team,
    logits: F32,
    tokens: I32,
    n_logprobs: int,
    logprobs: F32,
    ranks: I32,
    top_ids: I32,
    top_logprobs: F32,
    errors: I32,
) -> None: ...
