"""The memory of KV caches."""

from __future__ import annotations

from typing import Final

from pace._ext import _kernels
from pace.errors import ConfigError

KV_DTYPES: Final = ("bf16", "int8")
"""Element types of the KV cache."""


class KVPool:
    """KV cache memory of a group of layers: n_blocks blocks of block_size tokens, keys and values.

    Args:
        head_dim: a multiple of 16 up to 512.
        block_size: tokens in a block, a power of two from 16 on.
        dtype: "bf16", or "int8": per token and kv head one float32 scale for the key and one for the value
            (largest magnitude / 127); a block takes n_layers * n_kv_heads * block_size * (2 * head_dim + 8) bytes.
        contiguous: a sequence's blocks follow each other, and its block table is [S, 1], the first of them.

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
        self.n_layers = n_layers
        self.n_kv_heads = n_kv_heads
        self.head_dim = head_dim
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
