"""`EngineConfig`, and the one table of every `PACE_*` environment variable that pace reads."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Generic, TypeVar

from pace.errors import ConfigError, show
from pace.speculative_config import SpeculativeConfig

__all__ = [
    "ADMISSIONS",
    "ENVIRONMENT",
    "ISA_TIERS",
    "KV_CACHE_DTYPES",
    "KV_CACHE_TYPES",
    "PACE_CPUS",
    "PACE_ISA",
    "PACE_LOG_LEVEL",
    "PACE_THREADS",
    "VERSION",
    "EngineConfig",
    "EnvVar",
    "parse_bytes",
    "parse_cpus",
    "parse_kernels",
]

VERSION = "0.1.0"
"""Of pace."""

T = TypeVar("T")

# Lowest first. Which of them run here is `ops.isas()`'s to say: it needs cpuid.
ISA_TIERS = ("avx2", "avx512", "avx512vnni", "avx512bf16", "amx")
KV_CACHE_TYPES = ("slab", "paged", "contiguous")
KV_CACHE_DTYPES = ("bf16", "int8")
BF16_NAMES = ("auto", "bfloat16")  # vLLM's, for the same
QUANTIZATIONS = (
    "int8", "int4", "fp8", "w8", "w8g32", "w8g64", "w8g128", "w4g32", "w4g64", "w4g128", "int8-head",
)  # fmt: skip
ACTIVATION_DTYPES = ("auto", "bf16", "int8")
ADMISSIONS = ("preempt", "reserve")
LOG_LEVELS = ("debug", "info", "warning", "error", "critical")

PLACES = 64
"""Sequences that run in one step by default. At 0.8 of a server's capacity up to 57 are open, and with 32 first
tokens wait for one: p99 1123 to 1434 ms, with 128 and four times the KV memory in the same minutes 429 to 445 (one
thread of Zen 3, two runs each); runs of 64 and 128 varied too much to tell which is better. More would only share
the arithmetic of a step: 128 sequences on a 1B model get a token every 0.7 s at the 470 GFLOP/s of two cores of Zen
4, and no more tokens together than 32."""

FULL_SEQS = 32
"""Sequences of full length that the KV cache holds by default: hardly any is so long, so twice as many find room."""

MAX_CPU = 8191  # Linux' CONFIG_NR_CPUS maximum, less one
MAX_THREADS = 1024
MAX_MODEL_LEN = 1 << 24  # positions go through f32 exactly up to 2^24
MAX_TOKENS_PER_STEP = 1 << 20
MAX_SEQUENCES = 1 << 16
MAX_WAITING = 1 << 24
MAX_LOGPROBS = (1 << 31) - 1
MAX_BYTES = 1 << 50
MIN_BLOCK_SIZE, MAX_BLOCK_SIZE = 16, 1 << 16
BYTE_UNITS = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgt", 1):
    BYTE_UNITS[f"{_letter}b"] = 1000**_power
    # A letter alone is binary, as in Docker's --memory, ulimit and the JVM.
    BYTE_UNITS[_letter] = BYTE_UNITS[f"{_letter}i"] = BYTE_UNITS[f"{_letter}ib"] = 1024**_power


@dataclass(frozen=True)
class EnvVar(Generic[T]):
    """One environment variable: how it is called, what it means, how its text becomes a value.

    Attributes:
        name: the variable's name.
        doc: one sentence for `pace info --help` and the documentation.
        parse: turns non-empty text into the value; raises `ConfigError`.
        default: what `get()` returns where the variable is unset or empty.
    """

    name: str
    doc: str
    parse: Callable[[str], T]
    default: T

    def get(self, environ: Mapping[str, str] | None = None) -> T:
        """Read the variable now (nothing is cached), from `environ` or the process's environment.

        Raises:
            ConfigError: the text isn't a value of this variable; the message names it.
        """
        text = (os.environ if environ is None else environ).get(self.name, "").strip()
        if not text:
            return self.default
        try:
            return self.parse(text)
        except ConfigError as error:
            raise ConfigError(f"{self.name}: {error}") from None


def _parse_isa(text: str) -> str:
    if text not in ISA_TIERS:
        raise ConfigError(f"{show(text)} is not an ISA tier; expected one of {', '.join(ISA_TIERS)}")
    return text


def _parse_log_level(text: str) -> str:
    if text.lower() not in LOG_LEVELS:
        raise ConfigError(f"{show(text)} is not a log level; expected one of {', '.join(LOG_LEVELS)}")
    return text.lower()


def _parse_threads(text: str) -> int:
    # isascii: int() would also read other scripts' digits, and underscores.
    if not (text.isascii() and text.isdigit() and len(text) <= 6 and 1 <= int(text) <= MAX_THREADS):
        raise ConfigError(f"{show(text)} is not a thread count; expected 1 to {MAX_THREADS}")
    return int(text)


def parse_cpus(text: str) -> tuple[int, ...]:
    """Parse a CPU list such as `"0-3,8"` (the kernel's cpulist format) into ascending CPU numbers.

    Raises:
        ConfigError: empty, malformed, descending range, repeated CPU, or a CPU above 8191.
    """
    cpus: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        ends = (first, last) if dash else (first, first)
        if not all(end.isascii() and end.isdigit() and len(end) <= 4 and int(end) <= MAX_CPU for end in ends):
            raise ConfigError(f"{show(text)} is not a CPU list; expected numbers and ranges such as 0-3,8")
        low, high = int(ends[0]), int(ends[1])
        if low > high:
            raise ConfigError(f"CPU range {low}-{high} is empty; write {high}-{low}")
        cpus.extend(range(low, high + 1))
    if len(set(cpus)) != len(cpus):
        raise ConfigError(f"{show(text)} names a CPU twice; name each CPU once")
    return tuple(sorted(cpus))


def parse_kernels(text: str) -> dict[str, str]:
    """Parse `"attention=reference,gemm=avx2"` (the CLI's `--kernels`) into {operator: kernel}.

    Raises:
        ConfigError: an entry is not `operator=kernel`, or an operator is named twice.
    """
    kernels: dict[str, str] = {}
    for part in text.split(","):
        operator, equals, kernel = (piece.strip() for piece in part.partition("="))
        if not (operator and equals and kernel):
            raise ConfigError(f"{show(part)} is not operator=kernel, such as gemm=avx2")
        if operator in kernels:
            raise ConfigError(f"operator {show(operator)} is given twice; choose one kernel for it")
        kernels[operator] = kernel
    return kernels


def parse_bytes(text: str) -> int:
    """Parse a size such as `"4GiB"`, `"4g"`, `"512 MB"` or `"1073741824"` into bytes.

    Raises:
        ConfigError: not a positive number with one of the units B, kB, MB, GB, TB, KiB, MiB, GiB, TiB; k, m, g, t and
            Ki, Mi, Gi, Ti are the binary ones.
    """
    match = re.fullmatch(r"\s*([0-9]{1,15}(?:\.[0-9]{1,6})?)\s*([A-Za-z]{0,3})\s*", text, re.ASCII)
    unit = BYTE_UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None or not 1 <= int(float(match[1]) * unit) <= MAX_BYTES:
        raise ConfigError(
            f"{show(text)} is not a size; expected a number with a unit, such as 4GiB, 4g or 512MB"
        )
    return int(float(match[1]) * unit)


PACE_ISA: EnvVar[str | None] = EnvVar(
    "PACE_ISA",
    f"Force one ISA tier ({', '.join(ISA_TIERS)}) instead of the best that this CPU runs.",
    _parse_isa,
    None,
)
PACE_THREADS: EnvVar[int | None] = EnvVar(
    "PACE_THREADS",
    "Threads of an engine that isn't told otherwise; unset: min(affinity, cgroup quota, physical cores).",
    _parse_threads,
    None,
)
PACE_CPUS: EnvVar[tuple[int, ...] | None] = EnvVar(
    "PACE_CPUS",
    "CPUs to pin the threads of an engine to, such as 0-7,16; unset: threads are not pinned.",
    parse_cpus,
    None,
)
PACE_LOG_LEVEL: EnvVar[str] = EnvVar(
    "PACE_LOG_LEVEL",
    f"What the command line logs to stderr ({', '.join(LOG_LEVELS)}); the library never sets logging up.",
    _parse_log_level,
    "warning",
)
ENVIRONMENT: tuple[EnvVar[Any], ...] = (PACE_ISA, PACE_THREADS, PACE_CPUS, PACE_LOG_LEVEL)


@dataclass(frozen=True)
class EngineConfig:
    """What an engine is built from; checked as a whole when it is made, and constant afterwards.

    Attributes:
        model: a checkpoint folder, a hub id `org/name`, or "demo" for the embedded model.
        revision: branch, tag or commit of a hub id; None: its main branch.
        tokenizer: folder or hub id to take the tokenizer from; None: the model's own.
        trust_tokenizer: skip the probe of a tokenizer with unusual patterns or components (a hostile one can hang the
            encoder, or end the process while it is read).
        chat_template: file of a Jinja template that takes the place of the checkpoint's; None: the checkpoint's own.
        max_model_len: longest sequence, prompt and output together, in tokens; None: what the checkpoint
            states.
        max_num_seqs: sequences that run in one step; None: see `n_places`.
        max_num_batched_tokens: rows (tokens) of one step.
        max_num_waiting: requests that may wait to run; one more is refused.
        kv_cache_type: "slab" (large blocks), "paged" (blocks of 16 tokens) or "contiguous" (one extent per
            sequence).
        block_size: tokens of a KV block, a power of two from 16 on; None: what suits the type.
        kv_cache_memory: bytes of the KV cache, also as "4GiB"; "auto": all that is left beside the weights;
            None: what n_full_seqs sequences of max_model_len need, at most 40 % of the available memory.
        kv_cache_dtype: "bf16", or "int8" with a scale per token and head.
        quantization: round a bf16 checkpoint's matrices while it is loaded: "int8" (groups of 32 columns), "int4" (the
            same, LM head int8), "fp8" (groups of 128), or by bits and group: "w8" (a scale per row), "w8g128",
            "w4g64" and the like; "int8-head": the LM head alone, also of a quantised checkpoint that leaves it in
            16 bits. None: they stay what they are.
        pack_cache: folder of packed weights: written when a checkpoint is first used, mapped from then on; None: they are
            packed each time.
        activation_dtype: what meets integer matrices: "int8": rows rounded to int8, token by token; "bf16": not; "auto":
            int8 where a matrix' outputs on a built-in text hardly change by it.
        enable_prefix_caching: keep computed prompts for later requests with the same beginning (slab and
            paged; contiguous can't share).
        generation_config: where sampling defaults come from: "auto": the checkpoint's generation_config.json; "vllm":
            nowhere, those of `SamplingParams` hold; else a folder with a generation_config.json.
        max_logprobs: most log probabilities that a request may ask for at each position; -1: the whole vocabulary.
        admission: "preempt": a request starts as soon as its prompt fits, and the last one gives way and is
            recomputed when memory runs out; "reserve": it starts when its longest possible output fits.
        n_threads: threads of the team; None: PACE_THREADS, else min(affinity, cgroup quota, physical cores).
        cpus: CPU numbers to pin the threads to; None: PACE_CPUS, else not pinned.
        kernels: {operator: kernel} to force, for bisecting a wrong number or a slow operator.
        seed: seeds the requests that give none.
        speculative: how tokens are guessed; a mapping becomes a `SpeculativeConfig`; None: they are not.

    Raises:
        ConfigError: a field has the wrong type or is out of range.
    """

    model: str
    revision: str | None = None
    tokenizer: str | None = None
    trust_tokenizer: bool = False
    chat_template: str | None = None
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int = 2048
    max_num_waiting: int = 1 << 16
    kv_cache_type: str = "slab"
    block_size: int | None = None
    kv_cache_memory: int | str | None = None
    kv_cache_dtype: str = "bf16"
    quantization: str | None = None
    pack_cache: str | None = None
    activation_dtype: str = "auto"
    enable_prefix_caching: bool = True
    generation_config: str = "auto"
    max_logprobs: int = 20
    admission: str = "preempt"
    n_threads: int | None = None
    cpus: tuple[int, ...] | None = None
    kernels: Mapping[str, str] = field(default_factory=dict)
    seed: int = 0
    speculative: SpeculativeConfig | None = None

    def __post_init__(self) -> None:
        _check_text("model", self.model)
        _check_text("generation_config", self.generation_config)
        _check_int("max_logprobs", self.max_logprobs, -1, MAX_LOGPROBS)
        if self.kv_cache_dtype in BF16_NAMES:
            object.__setattr__(self, "kv_cache_dtype", "bf16")
        for name in ("revision", "tokenizer", "chat_template", "pack_cache"):
            if getattr(self, name) is not None:
                _check_text(name, getattr(self, name))
        for name in ("trust_tokenizer", "enable_prefix_caching"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} is {show(getattr(self, name))}, expected True or False")
        _check_choice("kv_cache_type", self.kv_cache_type, KV_CACHE_TYPES)
        _check_choice("kv_cache_dtype", self.kv_cache_dtype, KV_CACHE_DTYPES)
        if self.activation_dtype == "bfloat16":
            object.__setattr__(self, "activation_dtype", "bf16")
        if self.quantization is not None:
            _check_choice("quantization", self.quantization, QUANTIZATIONS)
        _check_choice("activation_dtype", self.activation_dtype, ACTIVATION_DTYPES)
        _check_choice("admission", self.admission, ADMISSIONS)
        _check_int("max_num_waiting", self.max_num_waiting, 1, MAX_WAITING)
        self._check_kv_cache()
        if self.max_model_len is not None:
            _check_int("max_model_len", self.max_model_len, 1, MAX_MODEL_LEN)
        if self.max_num_seqs is not None:
            _check_int("max_num_seqs", self.max_num_seqs, 1, MAX_SEQUENCES)
        _check_int("max_num_batched_tokens", self.max_num_batched_tokens, 1, MAX_TOKENS_PER_STEP)
        if self.max_num_seqs is not None and self.max_num_batched_tokens < self.max_num_seqs:
            # Every running sequence needs a row per step, or it starves.
            raise ConfigError(
                f"max_num_batched_tokens is {self.max_num_batched_tokens}, below max_num_seqs "
                f"{self.max_num_seqs}; a step needs one row for each sequence"
            )
        if self.n_threads is not None:
            _check_int("n_threads", self.n_threads, 1, MAX_THREADS)
        if self.cpus is not None:
            cpus = tuple(self.cpus) if isinstance(self.cpus, (list, tuple, range)) else ()
            if not cpus:
                raise ConfigError(f"cpus is {show(self.cpus)}, expected a sequence of CPU numbers, or None")
            for at, cpu in enumerate(cpus):
                _check_int(f"cpus[{at}]", cpu, 0, MAX_CPU)
                if cpu in cpus[:at]:
                    raise ConfigError(f"cpus names CPU {cpu} twice; name each CPU once")
            if self.n_threads is not None and self.n_threads > len(cpus):
                raise ConfigError(f"n_threads is {self.n_threads}, but cpus names only {len(cpus)} CPUs")
            object.__setattr__(self, "cpus", cpus)
        if not isinstance(self.kernels, Mapping):
            raise ConfigError(
                f"kernels is {show(self.kernels)}, expected a mapping of operator to kernel names"
            )
        for operator, kernel in self.kernels.items():
            if not all(isinstance(name, str) and name for name in (operator, kernel)):
                raise ConfigError(f"kernels has {show({operator: kernel})}, expected two names")
        object.__setattr__(self, "kernels", MappingProxyType(dict(self.kernels)))
        _check_int("seed", self.seed, 0, (1 << 64) - 1)
        speculative = SpeculativeConfig.read(self.speculative)
        if speculative is not None and speculative.quantization is not None:
            _check_choice("speculative: quantization", speculative.quantization, (*QUANTIZATIONS, "bf16"))
        object.__setattr__(self, "speculative", speculative)

    @property
    def n_places(self) -> int:
        """Sequences that run in one step: `max_num_seqs`, else `PLACES`, or the rows of a step where these are fewer."""
        return self.max_num_seqs or min(PLACES, self.max_num_batched_tokens)

    @property
    def n_full_seqs(self) -> int:
        """Sequences of full length that the memory of the KV cache is meant for: `max_num_seqs`, else `FULL_SEQS`.

        More can run, as few sequences are as long as they might be; the last one gives way where memory runs out.
        """
        return self.max_num_seqs or min(FULL_SEQS, self.max_num_batched_tokens)

    def _check_kv_cache(self) -> None:
        size = self.block_size
        if size is not None:
            _check_int("block_size", size, MIN_BLOCK_SIZE, MAX_BLOCK_SIZE)
            if size & (size - 1):
                raise ConfigError(f"block_size is {size}, expected a power of two such as 16 or 256")
        memory = self.kv_cache_memory
        if isinstance(memory, str) and memory != "auto":
            try:
                object.__setattr__(self, "kv_cache_memory", parse_bytes(memory))
            except ConfigError as error:
                raise ConfigError(f"kv_cache_memory: {error}, or auto") from None
        elif memory is not None and memory != "auto":
            _check_int("kv_cache_memory", memory, 1, MAX_BYTES)


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} is {show(value)}, expected one of {', '.join(choices)}")


def _check_text(name: str, value: object) -> None:
    if not isinstance(value, str) or not value or "\0" in value:
        raise ConfigError(f"{name} is {show(value)}, expected a non-empty string")


def _check_int(name: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ConfigError(f"{name} is {show(value)}, expected an integer from {low} to {high}")
