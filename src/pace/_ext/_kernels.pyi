from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]

class Forked(RuntimeError): ...
class Truncated(OSError): ...
class Unrepresentable(ValueError): ...

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
    count: int

LAYOUTS: str

class Packed(Matrix):
    def __init__(
        self,
        n: int,
        k: int,
        count: int,
        layout: int,
        group: int = 0,
        scales: int = 0,
        zeros: int = 0,
        source: npt.NDArray[np.uint8] | None = None,
    ) -> None: ...
    def __buffer__(self, flags: int) -> memoryview: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def kind(self) -> tuple[int, int]: ...
    def recast(self, scales: int, zeros: int) -> None: ...
    def pack(
        self, team: Team, src: npt.NDArray[np.uint8], dtype: int, at: int, mode: int, i: int
    ) -> None: ...
    def pack_mxfp4(
        self,
        team: Team,
        blocks: npt.NDArray[np.uint8],
        scales: npt.NDArray[np.uint8],
        at: int,
        mode: int,
        i: int,
    ) -> None: ...
    def pack_groups(
        self,
        team: Team,
        codes: npt.NDArray[np.uint8],
        scales: npt.NDArray[np.uint8],
        offsets: npt.NDArray[np.uint8],
        at: int,
        mode: int,
        i: int,
    ) -> None: ...
    def unpack(self, i: int, rows: npt.NDArray[np.int32] | None = None) -> F32: ...

def quantise_rows(
    src: npt.NDArray[np.uint8], dtype: int, k: int, layout: int, group: int
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint16]]: ...

class Mapped(Matrix):
    def __init__(self, src: npt.NDArray[np.uint8], dtype: int) -> None: ...

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
    max_position: int
    nbytes: int
    def __init__(
        self,
        team: Team,
        max_tokens: int,
        max_seqs: int,
        max_logits: int,
        vocab_size: int,
        max_position: int,
    ) -> None: ...
    def add_group(self, pool: KVPool, reach: int | None) -> None: ...
    def add_slot(self, width: int, dtype: str, rows: int, group: int = 0) -> int: ...
    def add(self, name: str, tier: str | None, logits: bool, fields: Mapping[str, object]) -> None: ...
    def set_head(self, logits: int) -> F32 | None: ...
    def view(self, i: int) -> npt.NDArray[Any]: ...
    def step(
        self,
        token_ids: I32,
        q_start: I32,
        kv_len: I32,
        block_tables: tuple[I32, ...],
        logit_rows: I32,
        first: int = 0,
        end: int = -1,
    ) -> None: ...
    def head(self, first: int) -> None: ...
    def op_seconds(self) -> list[float]: ...
    def op_experts(self) -> list[int]: ...

class Suffixes:
    nbytes: int
    n_tokens: int
    def __init__(self, seed: int) -> None: ...
    def add(self, tokens: I32) -> None: ...
    def propose(
        self, context: I32 | None, min_match: int, max_tokens: int, least: float, past: tuple[Suffixes, ...]
    ) -> tuple[list[int], list[float], float, int]: ...

SUFFIX_ORDER: int
SUFFIX_BREAK: int

def operators() -> dict[str, list[str]]: ...
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
