"""The compiled kernels by name: the only importer of `pace._ext`. Nothing is computed here.

bf16 arrays are numpy `uint16` (numpy has no bf16). Every array passed in is C-contiguous; shapes and dtypes are
checked once, here or in the extension, before the GIL is released.
"""

from __future__ import annotations

from pace.ops.executor import OPERATORS, Plan, check_kernels
from pace.ops.kv_pool import KV_DTYPES, KVPool
from pace.ops.machine import cpu_info, default_threads, isa, isas, tiers, use_isa, using_isa
from pace.ops.sampling import (
    SAMPLE_DTYPE,
    LogprobsResult,
    SampleResult,
    argmax,
    logprobs,
    sample,
    softmax,
)
from pace.ops.suffix import SUFFIX_BREAK, SUFFIX_ORDER, SuffixGuess, SuffixIndex
from pace.ops.team import Team, roof_dot, roof_read
from pace.ops.weights import PACKED_LAYOUTS, MappedTable, PackedMatrix, quantise_rows

__all__ = [
    "KV_DTYPES",
    "OPERATORS",
    "PACKED_LAYOUTS",
    "SAMPLE_DTYPE",
    "SUFFIX_BREAK",
    "SUFFIX_ORDER",
    "KVPool",
    "LogprobsResult",
    "MappedTable",
    "PackedMatrix",
    "Plan",
    "SampleResult",
    "SuffixGuess",
    "SuffixIndex",
    "Team",
    "argmax",
    "check_kernels",
    "cpu_info",
    "default_threads",
    "isa",
    "isas",
    "logprobs",
    "quantise_rows",
    "roof_dot",
    "roof_read",
    "sample",
    "softmax",
    "tiers",
    "use_isa",
    "using_isa",
]
