"""What families share in reading their `config.json`: widths, heads, activations, which layers have a window."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from pace.errors import UnsupportedModel, show
from pace.models import rope
from pace.models.config import Config
from pace.models.operators import MAX_HEAD_DIM, MAX_QUERY_GROUP
from pace.models.plan import Activation
from pace.models.spec import AttentionSpec, DecoderSpec, DenseSpec, LayerSpec, NormSpec, RopeSpec

MAX_WIDTH: Final = 1 << 20

FULL, SLIDING = "full_attention", "sliding_attention"

ACTIVATIONS: Final[Mapping[str, Activation]] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "relu2": "relu2",
}

Ropes = Callable[[Config, int], Sequence[RopeSpec]]
"""Reads the rotary embeddings for heads of so many columns."""


def decoder(
    config: Config,
    *,
    ropes: Ropes | None = None,
    norm: NormSpec | None = None,
    head_dim: int | None = None,
    act: str = "hidden_act",
    gated: bool = True,
    tied: bool = False,
) -> DecoderSpec:
    """A pre-norm decoder of equal layers, from the keys that nearly all families have; no biases.

    Args:
        ropes: reads the rotary embeddings; every layer uses the first. None: one for whole heads, base 10000.
        norm: of the stream; None: RMS with `rms_norm_eps`.
        head_dim: of a config without that key; None: hidden_size / num_attention_heads.
        act: key of the activation.
        gated: of the MLP.
        tied: what a config without `tie_word_embeddings` means.

    Raises:
        CheckpointError, UnsupportedModel: see the readers in `config` and `rope`.
    """
    dim = config.integer("hidden_size", high=MAX_WIDTH)
    n_heads, n_kv_heads, head_dim = heads(config, dim, head_dim)
    embeddings = tuple((ropes or rope.reader())(config, head_dim))
    mixer = AttentionSpec(n_heads, n_kv_heads, head_dim, rope=0 if embeddings else None)
    ffn = DenseSpec(config.integer("intermediate_size", high=MAX_WIDTH), activation(config, act), gated)
    max_len = rope.context_len(embeddings[0]) if embeddings else config.integer("max_position_embeddings")
    return DecoderSpec(
        dim=dim,
        vocab_size=config.integer("vocab_size", high=1 << 22),
        max_len=max_len,
        norm=norm or NormSpec("rms", config.number("rms_norm_eps", high=1.0)),
        layers=(LayerSpec(mixer, ffn),) * config.integer("num_hidden_layers", high=1024),
        ropes=embeddings,
        scale=head_dim**-0.5,
        tied=config.flag("tie_word_embeddings", default=tied),
    )


def activation(config: Config, key: str = "hidden_act") -> Activation:
    """The MLP's activation; unknown names raise UnsupportedModel."""
    name = config.text(key)
    if name not in ACTIVATIONS:
        raise UnsupportedModel(
            f"{config.where}: {key} is {show(name)}; supported are {', '.join(sorted(ACTIVATIONS))}"
        )
    return ACTIVATIONS[name]


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
    check_kv_heads(config, "num_key_value_heads", n_heads, n_kv_heads)
    known = config.has("head_dim") or default_head_dim is not None or "head_dim" in config.defaults
    if not known and dim % n_heads:
        raise config.error("num_attention_heads", n_heads, f"a divisor of hidden_size ({dim}), or a head_dim")
    head_dim = config.integer("head_dim", default=default_head_dim or dim // n_heads, high=1 << 16)
    return n_heads, n_kv_heads, check_head_dim(config, "head_dim", head_dim)


def plain_heads(config: Config) -> None:
    """Of families whose heads are all alike and hidden_size / num_attention_heads wide, whatever the file says."""
    n_heads = config.integer("num_attention_heads", high=1024)
    config.only("num_key_value_heads", n_heads)
    config.only("head_dim", config.integer("hidden_size", high=MAX_WIDTH) // n_heads)


def check_kv_heads(config: Config, key: str, n_heads: int, n_kv_heads: int) -> None:
    """The key/value heads must divide the query heads into groups that the kernels have."""
    if n_heads % n_kv_heads:
        raise config.error(key, n_kv_heads, f"a divisor of num_attention_heads ({n_heads})")
    if n_heads // n_kv_heads > MAX_QUERY_GROUP:
        raise UnsupportedModel(
            f"{config.where}: {key} is {n_kv_heads} for {n_heads} query heads; supported are up to {MAX_QUERY_GROUP} "
            "times as many"
        )


def check_head_dim(config: Config, key: str, head_dim: int) -> int:
    """The head_dim, if the kernels have it and it makes pairs."""
    if head_dim % 2 or head_dim > MAX_HEAD_DIM:
        raise UnsupportedModel(
            f"{config.where}: {key} is {head_dim}; supported are even numbers up to {MAX_HEAD_DIM}"
        )
    return head_dim


def bf16(value: float) -> float:
    """The nearest bf16: what a number becomes that transformers keeps in the type of the weights."""
    bits = int.from_bytes(struct.pack(">f", value), "big")
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return float(struct.unpack(">f", rounded.to_bytes(4, "big"))[0])


def layer_kinds(
    config: Config, n_layers: int, default: Callable[[int], bool], other: str = SLIDING
) -> list[str]:
    """full_attention or `other` for each layer: what `layer_types` says, else `default`.

    Args:
        default: whether layer i is of the other kind in a config without `layer_types`.

    Raises:
        UnsupportedModel: a third kind of layer.
    """
    if not config.has("layer_types"):
        config.skip("layer_types")
        return [other if default(i) else FULL for i in range(n_layers)]
    kinds = config.texts("layer_types", n_layers)
    for kind in kinds:
        if kind not in (FULL, other):
            raise UnsupportedModel(
                f"{config.where}: layer_types has {show(kind)}; supported are {FULL} and {other}"
            )
    return list(kinds)


def windows(config: Config, kinds: Sequence[str], window: int | None) -> list[int | None]:
    """The window of each layer; sliding layers need one.

    Raises:
        CheckpointError: layers slide, and sliding_window is null.
    """
    if window is None and SLIDING in kinds:
        raise config.error("sliding_window", window, f"a number of tokens, as layer_types has {SLIDING}")
    return [window if kind == SLIDING else None for kind in kinds]


def one_window(config: Config, n_layers: int, window: int | None) -> int | None:
    """The window of families that have the same for all layers; a `layer_types` may only agree."""
    kind = FULL if window is None else SLIDING
    if any(other != kind for other in layer_kinds(config, n_layers, lambda i: window is not None)):
        raise UnsupportedModel(
            f"{config.where}: layer_types must be {kind} for every layer, as sliding_window is {window}; "
            "this architecture does not mix them"
        )
    return window


def upper_windows(config: Config, n_layers: int) -> list[int | None]:
    """Windows of families with `use_sliding_window`: the layers from `max_window_layers` on, unless `layer_types`
    says which.
    """
    if config.flag("use_sliding_window", default=False):
        window = config.integer("sliding_window")
        first = 0 if config.has("layer_types") else config.integer("max_window_layers", low=0)
        return windows(config, layer_kinds(config, n_layers, lambda i: i >= first), window)
    config.skip("sliding_window")
    kinds = layer_kinds(config, n_layers, lambda i: False)
    if SLIDING in kinds:
        raise config.error("use_sliding_window", False, f"true, as layer_types has {SLIDING}")
    return [None] * n_layers
