"""`SpeculativeConfig`: how an engine guesses tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from pace.errors import ConfigError, show

__all__ = ["MAX_DRAFT_TOKENS", "METHODS", "NEEDS_MODEL", "SpeculativeConfig"]

MAX_DRAFT_TOKENS = 32
"""Tokens of one draft at most. Beyond about 12 hardly any is accepted, and 33 rows cost more than one everywhere."""

METHODS = ("pard", "draft_model", "suffix", "hybrid")
NEEDS_MODEL = ("pard", "draft_model", "hybrid")
READS_TEXT = ("suffix", "hybrid")
MAX_PAST_TOKENS = 1 << 26


@dataclass(frozen=True, kw_only=True)
class SpeculativeConfig:
    """How an engine guesses tokens; names are vLLM's where it has them. docs/speculative.md tells what suits whom.

    Attributes:
        method: "pard" (a draft model that guesses all tokens in one pass), "draft_model" (one by one), "suffix" (no model:
            what followed the same tokens before) or "hybrid" (a long repetition from the text, the rest from the draft).
        model: the draft: a checkpoint folder, a hub id `org/name`, or "demo-draft" for the embedded one.
        revision: branch, tag or commit of a hub id.
        num_speculative_tokens: most tokens of a draft, K, 0 .. 32; 0: nothing is guessed.
        max_model_len: longest sequence for which the draft is asked, in tokens; None: as far as it and the target go.
        draft_window: tokens that the draft sees at most, so that it stays cheap in a long context; None: all.
        draft_vocab: a JSON file {"token_ids": [...]} with the tokens that the draft may guess, so that its LM head has
            fewer rows; None: all.
        quantization: the draft's matrices: "int8", "int4", "fp8" or another of `EngineConfig`, or "bf16"; None: its own
            where it is quantised, else the engine's. Only how often guesses stand depends on it.
        past_output_tokens: of "suffix" and "hybrid": guess also from this many tokens of earlier outputs, 0 for none; each
            costs about 110 bytes, 250 at most. Requests with a cache salt take no part.
        adaptive: verify only as many tokens as pay, none where none do; False: always all of them.
        synthetic_acceptance: for benchmarks without a trained draft, never for use: accept guesses with this probability,
            or with one for each position, whatever they are. The output is meaningless.

    Raises:
        ConfigError: a field has the wrong type or is out of range, or the method lacks or does not take it.
    """

    method: str
    model: str | None = None
    revision: str | None = None
    num_speculative_tokens: int = 8
    max_model_len: int | None = None
    draft_window: int | None = None
    draft_vocab: str | None = None
    quantization: str | None = None
    past_output_tokens: int = 0
    adaptive: bool = True
    synthetic_acceptance: float | tuple[float, ...] | None = None

    @classmethod
    def read(cls, given: object) -> SpeculativeConfig | None:
        """From what a caller gives: None, a mapping of the fields, or what is one already.

        Raises:
            ConfigError: neither, an unknown field, or as the constructor.
        """
        if given is None or isinstance(given, SpeculativeConfig):
            return given
        if not isinstance(given, Mapping):
            raise ConfigError(
                f"speculative is {show(given)}, expected a mapping such as "
                '{"method": "pard", "model": "demo-draft", "num_speculative_tokens": 8}'
            )
        values: dict[str, Any] = dict(given)
        if values.pop("parallel_drafting", False) is True and values.get("method") == "draft_model":
            values["method"] = "pard"  # as vLLM spells it
        names = [field.name for field in fields(cls)]
        for name in values:
            if name not in names:
                raise ConfigError(
                    f"speculative has the option {show(name)}, expected some of {', '.join(names)}"
                )
        if "method" not in values:
            raise ConfigError(f"speculative names no method, expected one of {', '.join(METHODS)}")
        return cls(**values)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(
                f"speculative: method is {show(self.method)}, expected one of {', '.join(METHODS)}"
            )
        self._check_int("num_speculative_tokens", 0, MAX_DRAFT_TOKENS)
        for name in ("max_model_len", "draft_window"):
            if getattr(self, name) is not None:
                self._check_int(name, 1, 1 << 24)
        for name in ("model", "revision", "draft_vocab", "quantization"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value or "\0" in value):
                raise ConfigError(f"speculative: {name} is {show(value)}, expected a non-empty string")
        needs_model = self.method in NEEDS_MODEL
        if needs_model and self.model is None:
            raise ConfigError(
                f"speculative: method {self.method} needs a draft; give its folder or hub id as model"
            )
        for name in ("model", "revision", "max_model_len", "draft_window", "draft_vocab", "quantization"):
            if not needs_model and getattr(self, name) is not None:
                raise ConfigError(
                    f"speculative: method {self.method} has no draft model, so {name} means nothing; leave it out"
                )
        self._check_int("past_output_tokens", 0, MAX_PAST_TOKENS)
        if self.past_output_tokens and self.method not in READS_TEXT:
            raise ConfigError(
                f"speculative: method {self.method} reads no outputs, so past_output_tokens means nothing; leave it out"
            )
        if not isinstance(self.adaptive, bool):
            raise ConfigError(f"speculative: adaptive is {show(self.adaptive)}, expected True or False")
        if self.synthetic_acceptance is not None:
            object.__setattr__(self, "synthetic_acceptance", _rates(self.synthetic_acceptance))

    def _check_int(self, name: str, low: int, high: int) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise ConfigError(
                f"speculative: {name} is {show(value)}, expected an integer from {low} to {high}"
            )


def _rates(given: object) -> float | tuple[float, ...]:
    """Probabilities: one, or one for each position."""
    values: list[Any] = list(given) if isinstance(given, (list, tuple)) else [given]
    for value in values:
        if (
            not isinstance(value, (int, float))
            or isinstance(value, bool)
            or math.isnan(value)
            or not 0 <= value <= 1
        ):
            raise ConfigError(
                f"speculative: synthetic_acceptance has {show(value)}, expected probabilities from 0 to 1"
            )
    if not values:
        raise ConfigError(
            "speculative: synthetic_acceptance is empty, expected a probability for each position"
        )
    rates = tuple(float(value) for value in values)
    return rates if isinstance(given, (list, tuple)) else rates[0]
