"""Strict reading of `config.json`: typed values, per-family defaults, and refusal of what nobody read.

A value is never defaulted when that changes the mathematics, except where transformers itself has a default for
files that lack the key; null means the same as absent. Every accessor notes the key it read. `refuse_unread` then
refuses each key that changes the mathematics of some family and that this family did not read, unless its value
changes nothing: so a family relaxes a key by reading it, and for itself alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from pace.errors import CheckpointError, UnsupportedModel, show


class _Required:
    """Marks a key without a default."""


REQUIRED: Final = _Required()


class Config:
    """Strict typed access to a JSON object of `config.json`.

    Args:
        values: the parsed JSON object.
        where: prefix of error messages, such as "config.json" or "config.json: rope_scaling".
        defaults: what the family uses for keys that are absent or null.
        aliases: key that pace asks for -> the family's own name of it.

    Raises:
        CheckpointError: from every accessor, when a key is missing, has the wrong type or is out of range.
    """

    def __init__(
        self,
        values: Mapping[str, object],
        where: str = "config.json",
        defaults: Mapping[str, object] | None = None,
        aliases: Mapping[str, str] | None = None,
    ) -> None:
        self.values = values
        self.where = where
        self.defaults = defaults or {}
        self.aliases = aliases or {}
        self.read: set[str] = set()

    def family(
        self, defaults: Mapping[str, object] | None = None, aliases: Mapping[str, str] | None = None
    ) -> Config:
        """The same object with a family's defaults and names; what is read through either counts for both."""
        view = Config(self.values, self.where, defaults, aliases)
        view.read = self.read
        return view

    def has(self, key: str) -> bool:
        """Whether the key is present and not null."""
        return self.values.get(self._name(key)) is not None

    def integer(
        self, key: str, default: int | _Required = REQUIRED, low: int = 1, high: int = 1 << 31
    ) -> int:
        """An integer in [low, high]; JSON true, 4.0 and "4" are refused."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.error(key, value, f"an integer from {low} to {high}")
        return value

    def number(
        self, key: str, default: float | _Required = REQUIRED, low: float = 0.0, high: float = 1e12
    ) -> float:
        """A finite number in (low, high]."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not low < value <= high:
            raise self.error(key, value, f"a number above {low:g} and at most {high:g}")
        return float(value)

    def flag(self, key: str, default: bool | _Required = REQUIRED) -> bool:
        """true or false; 0, 1 and strings are refused."""
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self.error(key, value, "true or false")
        return value

    def text(self, key: str, default: str | _Required = REQUIRED) -> str:
        """A string."""
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self.error(key, value, "a string")
        return value

    def optional_integer(self, key: str, default: int | None = None, high: int = 1 << 31) -> int | None:
        """An integer from 1, or None for null; `default` (or the family's) is for an absent key alone."""
        return None if self._is_none(key, default) else self.integer(key, default or REQUIRED, high=high)

    def optional_number(self, key: str, default: float | None = None) -> float | None:
        """A positive number, or None for null; `default` (or the family's) is for an absent key alone."""
        return None if self._is_none(key, default) else self.number(key, default or REQUIRED)

    def numbers(self, key: str, length: int, low: float = 0.0) -> tuple[float, ...]:
        """A list of `length` finite numbers above `low`."""
        value = self._get(key, REQUIRED)
        if not isinstance(value, list) or len(value) != length:
            raise self.error(key, value, f"a list of {length} numbers")
        return tuple(Config({key: item}, self.where).number(key, low=low) for item in value)

    def texts(self, key: str, length: int | None = None) -> tuple[str, ...]:
        """A list of `length` strings; None: of any length."""
        value = self._get(key, REQUIRED)
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            raise self.error(key, value, "a list of strings")
        if length is not None and len(value) != length:
            raise self.error(key, value, f"a list of {length} strings")
        return tuple(value)

    def bits(self, key: str, length: int) -> tuple[bool, ...]:
        """A list of `length` zeros and ones (or false and true)."""
        value = self._get(key, REQUIRED)
        if not isinstance(value, list) or len(value) != length or not all(v in (0, 1) for v in value):
            raise self.error(key, value, f"a list of {length} zeros and ones")
        return tuple(bool(v) for v in value)

    def indices(self, key: str, length: int) -> tuple[int, ...]:
        """A list of numbers from 0 to `length` - 1."""
        value = self._get(key, REQUIRED)
        if not isinstance(value, list) or not all(type(v) is int and 0 <= v < length for v in value):
            raise self.error(key, value, f"a list of numbers from 0 to {length - 1}")
        return tuple(value)

    def table(self, key: str) -> Config:
        """A nested object."""
        value = self._get(key, REQUIRED)
        if not isinstance(value, Mapping):
            raise self.error(key, value, "an object")
        return Config(value, f"{self.where}: {key}")

    def only(self, key: str, *allowed: object) -> None:
        """Refuse any value but these; null and absent pass.

        Raises:
            UnsupportedModel: the key has another value.
        """
        name = self._name(key)
        self.read.add(name)
        value = self.values.get(name)
        if value in (None, {}, []) or _among(value, allowed):
            return
        raise UnsupportedModel(
            f"{self.where}: {name} is {show(value)}, which changes the model's mathematics; "
            f"this architecture supports only {' or '.join([*map(show, allowed), 'absent'])}"
        )

    def skip(self, *keys: str) -> None:
        """Note that these keys concern a part of the checkpoint that isn't run."""
        self.read.update(keys)

    def refuse_unread(self, max_len: int) -> None:
        """Refuse keys that change the mathematics in a way that the architecture does not have.

        Args:
            max_len: context length; a window as long hides nothing.

        Raises:
            UnsupportedModel: a key that nobody read has a value that is not neutral (null and empty ones always are).
        """
        for key, value in self.values.items():
            if key in self.read or value in (None, {}, []):
                continue
            if key in NEUTRAL:
                wide = key == "sliding_window" and type(value) is int and value >= max_len
                full = (
                    key == "layer_types"
                    and isinstance(value, list)
                    and all(v == "full_attention" for v in value)
                )
                if not wide and not full:
                    self.only(key, *NEUTRAL[key])
            elif _FOREIGN.fullmatch(key):
                self.only(key, False, 0)

    def _name(self, key: str) -> str:
        alias = self.aliases.get(key)
        return alias if alias is not None and (alias in self.values or key not in self.values) else key

    def _get(self, key: str, default: object) -> object:
        # transformers writes null for "use the class's default", so null and absent mean the same.
        name = self._name(key)
        self.read.add(name)
        value = self.values.get(name)
        if value is not None:
            return value
        value = self.defaults.get(key)
        if value is not None:
            return value
        if isinstance(default, _Required):
            raise CheckpointError(
                f"{self.where} has no {name!r}; it is required, take it from the original checkpoint"
            )
        return default

    def _is_none(self, key: str, default: object) -> bool:
        name = self._name(key)
        self.read.add(name)
        if name in self.values:
            return self.values[name] is None
        return default is None and self.defaults.get(key) is None

    def error(self, key: str, value: object, expected: str) -> CheckpointError:
        """The error for a wrong value: names the key, the value and what was expected."""
        return CheckpointError(f"{self.where}: {self._name(key)} is {show(value)}, expected {expected}")


def _among(value: object, allowed: tuple[object, ...]) -> bool:
    """Equality that tells true from 1."""
    return any(value == a and isinstance(value, bool) == isinstance(a, bool) for a in allowed)


# Keys that some family uses to change the forward pass, with the values under which they change nothing; biases apart,
# for there the tensors say it. A config that sets one to anything else, for a family that does not read it, describes
# a model that would be computed wrongly without notice.
NEUTRAL: Final[Mapping[str, tuple[object, ...]]] = {
    "quantization_config": (),
    "partial_rotary_factor": (1, 1.0),
    "rotary_dim": (),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "logits_soft_cap": (),
    "embedding_multiplier": (1, 1.0),
    "residual_multiplier": (1, 1.0),
    "attention_multiplier": (),
    "query_pre_attn_scalar": (),
    "logits_scaling": (1, 1.0),
    "logit_scale": (1, 1.0),
    "scale_emb": (1, 1.0),
    "scale_depth": (),
    "use_qk_norm": (False,),
    "qk_layernorm": (False,),
    "qkv_bias": (),
    "clip_qkv": (),
    "alibi": (False,),
    "parallel_attn": (False,),
    "use_parallel_residual": (False,),
    "num_local_experts": (0, 1),
    "num_experts": (0, 1),
    "n_routed_experts": (0,),
    "n_shared_experts": (0,),
    "num_shared_experts": (0,),
    "shared_expert_intermediate_size": (0,),
    "routed_scaling_factor": (1, 1.0),
    "n_group": (0, 1),
    "topk_group": (0, 1),
    "moe_layers": (),
    "mlp_only_layers": (),
    "decoder_sparse_step": (1,),
    "interleave_moe_layer_step": (1,),
    "first_k_dense_replace": (0,),
    "enable_moe_block": (False,),
    "no_rope_layers": (),
    "attn_temperature_tuning": (False,),
    "attention_chunk_size": (),
    "sliding_window": (),
    "use_sliding_window": (False,),
    "layer_types": (),
    "per_layer_config": (),
    "num_kv_shared_layers": (0,),
    "attention_k_eq_v": (False,),
    "hidden_size_per_layer_input": (0,),
    "use_bidirectional_attention": (False,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "attn_output_gate": (False,),
    "kv_lora_rank": (),
    "conv_L_cache": (),
    "text_config": (),
    "vision_config": (),
    "audio_config": (),
}

_FOREIGN: Final = re.compile(r"\w*_limits?(?:_\w+)?|altup_\w+|index_\w+|linear_\w+|mamba_\w+|swiglu_\w+")
"""Keys of blocks that no family here has: clamped experts, Gemma 3n, sparse indexers, linear attention, Mamba."""
