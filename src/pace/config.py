"""`EngineConfig`, and the one table of every `PACE_*` environment variable that pace reads."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Generic, TypeVar

from pace.errors import ConfigError, show

__all__ = [
    "ENVIRONMENT",
    "ISA_TIERS",
    "PACE_CPUS",
    "PACE_ISA",
    "PACE_LOG_LEVEL",
    "PACE_THREADS",
    "EngineConfig",
    "EnvVar",
    "parse_cpus",
    "parse_kernels",
]

T = TypeVar("T")

# Lowest first. Which of them run here is `ops.isas()`'s to say: it needs cpuid.
ISA_TIERS = ("avx2", "avx512", "avx512vnni", "avx512bf16", "amx")
LOG_LEVELS = ("debug", "info", "warning", "error", "critical")

MAX_CPU = 8191  # Linux' CONFIG_NR_CPUS maximum, less one
MAX_THREADS = 1024
MAX_MODEL_LEN = 1 << 24  # positions go through f32 exactly up to 2^24
MAX_TOKENS_PER_STEP = 1 << 20
MAX_SEQUENCES = 1 << 16


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
        trust_tokenizer: take a tokenizer whose patterns aren't on the allow-list (a hostile one can hang the
            encoder).
        max_model_len: longest sequence, prompt and output together, in tokens; None: what the checkpoint
            states.
        max_num_seqs: sequences that run in one step.
        max_num_batched_tokens: rows (tokens) of one step.
        n_threads: threads of the team; None: PACE_THREADS, else min(affinity, cgroup quota, physical cores).
        cpus: CPU numbers to pin the threads to; None: PACE_CPUS, else not pinned.
        kernels: {operator: kernel} to force, for bisecting a wrong number or a slow operator.
        seed: seeds the requests that give none.

    Raises:
        ConfigError: a field has the wrong type or is out of range.
    """

    model: str
    revision: str | None = None
    tokenizer: str | None = None
    trust_tokenizer: bool = False
    max_model_len: int | None = None
    max_num_seqs: int = 32
    max_num_batched_tokens: int = 2048
    n_threads: int | None = None
    cpus: tuple[int, ...] | None = None
    kernels: Mapping[str, str] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        _check_text("model", self.model)
        for name in ("revision", "tokenizer"):
            if getattr(self, name) is not None:
                _check_text(name, getattr(self, name))
        if not isinstance(self.trust_tokenizer, bool):
            raise ConfigError(f"trust_tokenizer is {show(self.trust_tokenizer)}, expected True or False")
        if self.max_model_len is not None:
            _check_int("max_model_len", self.max_model_len, 1, MAX_MODEL_LEN)
        _check_int("max_num_seqs", self.max_num_seqs, 1, MAX_SEQUENCES)
        _check_int("max_num_batched_tokens", self.max_num_batched_tokens, 1, MAX_TOKENS_PER_STEP)
        if self.max_num_batched_tokens < self.max_num_seqs:
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
            for cpu in cpus:
                _check_int("cpus", cpu, 0, MAX_CPU)
            if len(set(cpus)) != len(cpus):
                raise ConfigError("cpus names a CPU twice; name each CPU once")
            if self.n_threads is not None and self.n_threads > len(cpus):
                raise ConfigError(f"n_threads is {self.n_threads}, but cpus names only {len(cpus)} CPUs")
            object.__setattr__(self, "cpus", cpus)
        if not isinstance(self.kernels, Mapping) or not all(
            isinstance(text, str) and text for pair in self.kernels.items() for text in pair
        ):
            raise ConfigError(
                f"kernels is {show(self.kernels)}, expected a mapping of operator to kernel names"
            )
        object.__setattr__(self, "kernels", MappingProxyType(dict(self.kernels)))
        _check_int("seed", self.seed, 0, (1 << 64) - 1)


def _check_text(name: str, value: object) -> None:
    if not isinstance(value, str) or not value or "\0" in value:
        raise ConfigError(f"{name} is {show(value)}, expected a non-empty string")


def _check_int(name: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ConfigError(f"{name} is {show(value)}, expected an integer from {low} to {high}")
