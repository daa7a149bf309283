"""What a decoder is, as enums and numbers, and the strict reader that architectures build it from.

`DecoderSpec` is what `decoder.py` lowers; architectures (`llama.py`, ...) are functions from a `config.json`
to it. A field exists when an architecture needs it. What differs between layers (window, rotary table) lives
in `LayerSpec`, so that families with alternating layers are data as well.

Values of `config.json` are never defaulted when they change the mathematics: a missing or unknown one is
refused. The only defaults are those that transformers applies to keys which older checkpoints legitimately
lack.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, Flag, auto
from typing import Final, Literal

from pace.errors import CheckpointError, UnsupportedModel, show
from pace.models.plan import Activation

MAX_HEAD_DIM: Final = 256
HEAD_DIM_STEP: Final = 16
"""The attention kernel holds a head in registers: multiples of 16 up to 256."""

WIDTH_STEP: Final = 16
"""hidden_size and intermediate_size must be multiples of one block of packed columns."""


class QKNorm(Enum):
    """Normalisation of queries and keys before the rotation."""

    NONE = "none"
    HEAD = "head"  # RMS over each head, one weight [head_dim] shared by the heads


class Bias(Flag):
    """Which projections carry a bias."""

    NONE = 0
    QKV = auto()
    OUT = auto()
    MLP = auto()


RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"]


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """One rotary embedding as the config describes it; `rope.build` turns it into a table of frequencies.

    Args:
        theta: base period.
        rotary_dim: columns of a head that rotate (even, <= head_dim).
        max_len: the config's max_position_embeddings (tokens).
        original_len: context length before the extension (tokens); max_len when the config has none.
        factor: context extension factor; 1.0 for the default kind.
        attention_factor: multiplier of cos and sin; None where the kind derives it.
        long_factor, short_factor: longrope's divisors, [rotary_dim / 2] each.
    """

    theta: float
    rotary_dim: int
    max_len: int
    original_len: int
    kind: RopeKind = "default"
    interleaved: bool = False
    factor: float = 1.0
    attention_factor: float | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """What may differ from layer to layer.

    Args:
        window: sliding window in tokens (the query's own position included), or None for full attention.
        rope: index into `DecoderSpec.ropes`.
    """

    window: int | None = None
    rope: int = 0


@dataclass(frozen=True, slots=True)
class DecoderSpec:
    """A pre-norm decoder with RMS norms and a gated MLP.

    Args:
        dim: width of the residual stream.
        intermediate_dim: width between the MLP's two halves.
        n_heads, n_kv_heads: query and key/value heads; n_heads is a multiple of n_kv_heads.
        head_dim: columns of a head, a multiple of 16 up to 256.
        max_len: context length in tokens that the checkpoint supports, RoPE extension included.
        norm_eps: epsilon of every norm.
        tied: the LM head multiplies by the embedding table.
    """

    dim: int
    intermediate_dim: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    vocab_size: int
    max_len: int
    norm_eps: float
    activation: Activation
    layers: tuple[LayerSpec, ...]
    ropes: tuple[RopeSpec, ...]
    tied: bool
    bias: Bias = Bias.NONE
    qk_norm: QKNorm = QKNorm.NONE

    @property
    def q_dim(self) -> int:
        """Columns of all query heads."""
        return self.n_heads * self.head_dim

    @property
    def kv_dim(self) -> int:
        """Columns of all key (or value) heads."""
        return self.n_kv_heads * self.head_dim


class _Required:
    """Marks a key without a default."""


REQUIRED: Final = _Required()


class Config:
    """Strict typed access to a `config.json`.

    Args:
        values: the parsed JSON object.
        where: prefix of error messages, such as "config.json" or "config.json: rope_scaling".

    Raises:
        CheckpointError: from every accessor, when a key is missing, has the wrong type or is out of range.
    """

    def __init__(self, values: Mapping[str, object], where: str = "config.json") -> None:
        self.values = values
        self.where = where

    def has(self, key: str) -> bool:
        """Whether the key is present and not null."""
        return self.values.get(key) is not None

    def integer(
        self, key: str, default: int | _Required = REQUIRED, low: int = 1, high: int = 1 << 31
    ) -> int:
        """An integer in [low, high]; JSON true, 4.0 and "4" are refused."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(key, value, f"an integer from {low} to {high}")
        if not low <= value <= high:
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

    def numbers(self, key: str, length: int, low: float = 0.0) -> tuple[float, ...]:
        """A list of `length` finite numbers above `low`."""
        value = self._get(key, REQUIRED)
        if not isinstance(value, list) or len(value) != length:
            raise self.error(key, value, f"a list of {length} numbers")
        return tuple(Config({key: item}, self.where).number(key, low=low) for item in value)

    def texts(self, key: str, length: int) -> tuple[str, ...]:
        """A list of `length` strings."""
        value = self._get(key, REQUIRED)
        if not isinstance(value, list) or len(value) != length:
            raise self.error(key, value, f"a list of {length} strings")
        for i, text in enumerate(value):
            if not isinstance(text, str):
                raise self.error(f"{key}[{i}]", text, "a string")
        return tuple(value)

    def table(self, key: str) -> Config:
        """A nested object."""
        value = self._get(key, REQUIRED)
        if not isinstance(value, Mapping):
            raise self.error(key, value, "an object")
        return Config(value, f"{self.where}: {key}")

    def _get(self, key: str, default: object) -> object:
        # transformers writes null for "use the class's default", so null and absent mean the same.
        value = self.values.get(key)
        if value is not None:
            return value
        if isinstance(default, _Required):
            raise CheckpointError(
                f"{self.where} has no {key!r}; it is required, take it from the original checkpoint"
            )
        return default

    def error(self, key: str, value: object, expected: str) -> CheckpointError:
        """The error for a wrong value: names the key, the value and what was expected."""
        return CheckpointError(f"{self.where}: {key} is {show(value)}, expected {expected}")


ACTIVATIONS: Final[Mapping[str, Activation]] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}

# Keys that other families use to change the forward pass, with the values under which they change nothing. A
# config that sets one to anything else describes a model that the generic decoder would compute wrongly
# without noticing.
NEUTRAL: Final[Mapping[str, tuple[object, ...]]] = {
    "quantization_config": (),
    "partial_rotary_factor": (1, 1.0),
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
    "no_rope_layers": (),
    "attn_temperature_tuning": (False,),
    "attention_chunk_size": (),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "vision_config": (),
    "text_config": (),
}


def refuse_foreign(config: Config, also: Mapping[str, tuple[object, ...]] | None = None) -> None:
    """Refuse keys that change the mathematics in a way the architecture does not have.

    Args:
        config: the top level of `config.json`.
        also: further keys with their neutral values, for one architecture.

    Raises:
        UnsupportedModel: a key has a value that is not neutral (null and an empty container always are).
    """
    for key, neutral in {**NEUTRAL, **(also or {})}.items():
        value = config.values.get(key)
        if value in (None, {}, []) or any(
            value == n and isinstance(value, bool) == isinstance(n, bool) for n in neutral
        ):
            continue
        allowed = " or ".join([show(n) for n in neutral] + ["absent"])
        raise UnsupportedModel(
            f"{config.where}: {key} is {show(value)}, which changes the model's mathematics; "
            f"this architecture supports only {allowed}"
        )


def activation(config: Config, key: str = "hidden_act") -> Activation:
    """The MLP's activation; unknown names raise UnsupportedModel."""
    name = config.text(key)
    if name not in ACTIVATIONS:
        raise UnsupportedModel(
            f"{config.where}: {key} is {show(name)}; supported are {', '.join(sorted(ACTIVATIONS))}"
        )
    return ACTIVATIONS[name]


def width(config: Config, key: str, high: int = 1 << 20) -> int:
    """A model width: a positive multiple of 16."""
    value = config.integer(key, high=high)
    if value % WIDTH_STEP:
        raise UnsupportedModel(f"{config.where}: {key} is {value}; supported are multiples of {WIDTH_STEP}")
    return value


def heads(config: Config, dim: int, default_head_dim: int | None = None) -> tuple[int, int, int]:
    """Query heads, key/value heads and head_dim, checked against each other.

    Args:
        dim: hidden_size, from which head_dim follows when the config has none.
        default_head_dim: what the architecture uses without a head_dim key; None: dim / num_attention_heads.

    Raises:
        CheckpointError: the counts do not divide.
        UnsupportedModel: a head_dim that the attention kernel does not have.
    """
    n_heads = config.integer("num_attention_heads", high=1024)
    n_kv_heads = config.integer("num_key_value_heads", default=n_heads, high=1024)
    if n_heads % n_kv_heads:
        raise config.error("num_key_value_heads", n_kv_heads, f"a divisor of num_attention_heads ({n_heads})")
    if not config.has("head_dim") and default_head_dim is None and dim % n_heads:
        raise config.error("num_attention_heads", n_heads, f"a divisor of hidden_size ({dim}), or a head_dim")
    head_dim = config.integer("head_dim", default=default_head_dim or dim // n_heads, high=1 << 16)
    if head_dim % HEAD_DIM_STEP or head_dim > MAX_HEAD_DIM:
        raise UnsupportedModel(
            f"{config.where}: head_dim is {head_dim}; supported are multiples of {HEAD_DIM_STEP} "
            f"up to {MAX_HEAD_DIM}"
        )
    return n_heads, n_kv_heads, head_dim


def layer_windows(config: Config, n_layers: int) -> tuple[int | None, ...]:
    """Per-layer windows of families with use_sliding_window and layer_types (Qwen2, Qwen3).

    `layer_types`, where present, decides; otherwise the layers from `max_window_layers` on have the window.
    """
    enabled = config.flag("use_sliding_window", default=False)
    window = config.integer("sliding_window") if enabled else None
    if config.has("layer_types"):
        kinds: Sequence[str] = config.texts("layer_types", n_layers)
        for kind in kinds:
            if kind not in ("full_attention", "sliding_attention"):
                raise UnsupportedModel(
                    f"{config.where}: layer_types has {show(kind)}; supported are full_attention and "
                    "sliding_attention"
                )
        if window is None and "sliding_attention" in kinds:
            raise config.error("use_sliding_window", enabled, "true, as layer_types has sliding_attention")
    elif window is None:
        kinds = ["full_attention"] * n_layers
    else:
        first = config.integer("max_window_layers", low=0)
        kinds = ["sliding_attention" if i >= first else "full_attention" for i in range(n_layers)]
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)
