"""Made-up traffic: how long prompts and outputs are, and when requests arrive.

The two traces are named after data sets whose shape they follow roughly; their numbers are our own, so that anybody can
draw them without a download. Lengths in tokens:

- sharegpt-like. Prompt: log-normal, median 100, sigma 1.2, 4 to 2048. Output: log-normal, median 130, sigma 1, up to 1024.
  Chats: short questions, long answers, a tail of pasted documents.
- burstgpt-like. Prompt: log-normal, median 250, sigma 1.3, 4 to 4096. Output: one in four is short, exponential of mean 8,
  the others log-normal, median 200, sigma 0.8, up to 1024. Programs that ask a model: they come in bursts, the gaps are
  gamma-distributed with shape 0.3.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pace.benchmarks.dataset import Shape, random_shapes
from pace.errors import RequestError

__all__ = ["TRACES", "Trace", "arrivals", "shapes_of"]


@dataclass(frozen=True)
class Trace:
    """Lengths that are log-normal between bounds.

    Attributes:
        input_median, input_sigma, max_input: of prompts.
        output_median, output_sigma, max_output: of outputs.
        short_share, short_mean: of outputs that are short, and the mean of these.
        burstiness: of the arrivals, unless told otherwise.
    """

    input_median: float
    input_sigma: float
    max_input: int
    output_median: float
    output_sigma: float
    max_output: int
    short_share: float = 0.0
    short_mean: float = 8.0
    burstiness: float = 1.0

    def draw(self, n: int, seed: int, scale: float) -> list[Shape]:
        """Lengths of n requests, multiplied by `scale`."""
        rng = np.random.default_rng((seed, 2))
        inputs = self.input_median * np.exp(self.input_sigma * rng.standard_normal(n))
        outputs = self.output_median * np.exp(self.output_sigma * rng.standard_normal(n))
        is_short = rng.random(n) < self.short_share
        outputs = np.where(is_short, 1 + rng.exponential(self.short_mean, n), outputs)
        inputs = np.maximum(1, np.clip(inputs, 4, self.max_input) * scale)
        outputs = np.maximum(1, np.clip(outputs, 1, self.max_output) * scale)
        return [Shape(0, int(i), int(o)) for i, o in zip(inputs, outputs, strict=True)]


TRACES = {
    "sharegpt-like": Trace(100, 1.2, 2048, 130, 1.0, 1024),
    "burstgpt-like": Trace(250, 1.3, 4096, 200, 0.8, 1024, short_share=0.25, burstiness=0.3),
}


def shapes_of(
    name: str,
    n: int,
    *,
    input_len: int,
    output_len: int,
    prefix_len: int = 0,
    range_ratio: float = 0.0,
    scale: float = 1.0,
    seed: int = 0,
) -> list[Shape]:
    """Lengths of n requests.

    Args:
        name: of `TRACES`, or "random": uniform around input_len and output_len, see `random_shapes`.
        scale: of a trace's lengths.

    Raises:
        RequestError: a number is out of range.
    """
    if not 0 < scale < 1000:
        raise RequestError(f"the length scale is {scale}, expected a number above 0")
    trace = TRACES.get(name)
    if trace is not None:
        return trace.draw(n, seed, scale)
    return random_shapes(n, input_len, output_len, prefix_len=prefix_len, range_ratio=range_ratio, seed=seed)


def arrivals(
    n: int, rate: float, *, burstiness: float = 1.0, burst_size: int = 1, seed: int = 0
) -> npt.NDArray[np.float64]:
    """When each of n requests is sent: f64 [n], seconds from the start, ascending.

    Args:
        rate: requests a second in the mean; infinity: all at once.
        burstiness: shape of the gamma distribution of the gaps: 1 is a Poisson process, less comes in bursts, more is more
            regular.
        burst_size: so many arrive together.

    Raises:
        RequestError: a number is out of range.
    """
    if not rate > 0:
        raise RequestError(f"the request rate is {rate}, expected a number above 0, or inf")
    if not 0 < burstiness < 1e6:
        raise RequestError(f"burstiness is {burstiness}, expected a number above 0")
    if rate == float("inf"):
        return np.zeros(n)
    n_bursts = -(-n // burst_size)
    rng = np.random.default_rng((seed, 3))
    gaps = rng.gamma(burstiness, burst_size / (rate * burstiness), n_bursts)
    gaps[0] = 0.0
    return np.repeat(np.cumsum(gaps), burst_size)[:n]
