"""`PoolingParams`: how the hidden states of a text become one vector."""

from __future__ import annotations

from dataclasses import dataclass

from pace.errors import RequestError, show

__all__ = ["POOLINGS", "PoolingParams"]

POOLINGS = ("last", "mean")


@dataclass(frozen=True, kw_only=True)
class PoolingParams:
    """How the hidden states behind the last norm become an embedding. An instance never changes.

    Attributes:
        pooling: "last": the state of the last token; "mean": the mean of all tokens' states; None: what the checkpoint
            names, else "last".
        normalize: divide by the Euclidean length, so that a dot product is the cosine.
        dimensions: keep the first so many numbers, before the length is taken; None: all. Only models that were trained for
            it (Matryoshka) keep their meaning.

    Raises:
        RequestError: a field is out of range; the message names it.
    """

    pooling: str | None = None
    normalize: bool = True
    dimensions: int | None = None

    def __post_init__(self) -> None:
        if self.pooling is not None and self.pooling not in POOLINGS:
            raise RequestError(f"pooling is {show(self.pooling)}, expected {' or '.join(POOLINGS)}")
        if not isinstance(self.normalize, bool):
            raise RequestError(f"normalize is {show(self.normalize)}, expected True or False")
        n = self.dimensions
        if n is not None and (isinstance(n, bool) or not isinstance(n, int) or n < 1):
            raise RequestError(f"dimensions is {show(n)}, expected a positive number, or None")
