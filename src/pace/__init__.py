"""pace: a CPU inference engine for large language models.

Importing picks the kernel table for this CPU and does nothing else: no threads, no logging set-up, no environment.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pace.imports import uncollected

with uncollected():
    from pace import ops as _ops  # picks the kernels; raises ImportError on a CPU below AVX2
    from pace.config import VERSION

if TYPE_CHECKING:
    from pace.async_llm import AsyncLLM
    from pace.llm import LLM
    from pace.outputs import CompletionOutput, Logprob, RequestOutput, ToolCall
    from pace.params import RequestOutputKind, SamplingParams
    from pace.pooling_params import PoolingParams
    from pace.structured_outputs import StructuredOutputsParams

__version__ = VERSION
__all__ = [
    "LLM",
    "AsyncLLM",
    "CompletionOutput",
    "Logprob",
    "PoolingParams",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "StructuredOutputsParams",
    "ToolCall",
    "__version__",
    "show_config",
]

_LAZY = {
    "LLM": "pace.llm",
    "AsyncLLM": "pace.async_llm",
    "SamplingParams": "pace.params",
    "RequestOutputKind": "pace.params",
    "PoolingParams": "pace.pooling_params",
    "StructuredOutputsParams": "pace.structured_outputs",
    "ToolCall": "pace.outputs",
    "Logprob": "pace.outputs",
    "RequestOutput": "pace.outputs",
    "CompletionOutput": "pace.outputs",
}


def __getattr__(name: str) -> Any:
    # The tokenizer and hub libraries take longer to import than everything of pace, and so does asyncio: only who
    # needs them pays.
    if name in _LAZY:
        import importlib

        with uncollected():
            return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'pace' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


def show_config() -> dict[str, Any]:
    """What pace found and chose: CPU, tiers (compiled, runnable, chosen), threads and why, huge pages, NUMA, versions."""
    import platform
    from importlib.metadata import version

    import numpy as np

    return {
        "version": __version__,
        "cpu": _ops.cpu_info(),
        "tiers": {name: missing or "runs" for name, missing in _ops.tiers()},
        "isa": _ops.isa(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "tokenizers": version("tokenizers"),
        "safetensors": version("safetensors"),
    }
