"""Gemma 2 and Gemma 3 (text, and the text tower of multimodal files)."""

from __future__ import annotations

from dataclasses import replace

from pace.models import llama as base
from pace.models import rope
from pace.models.common import FULL, SLIDING, Ropes, bf16, decoder, layer_kinds, windows
from pace.models.config import Config
from pace.models.spec import DecoderSpec, HeadNorm, NormSpec, Placement, RopeSpec
from pace.models.weight_map import WeightMap

DEFAULTS = {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
"""Multimodal files leave out what is as in the class."""
GEMMA2 = {**DEFAULTS, "vocab_size": 256000, "max_position_embeddings": 8192}
GEMMA3 = {**DEFAULTS, "vocab_size": 262208, "max_position_embeddings": 131072}


def gemma2(config: Config) -> DecoderSpec:
    """Norms around both halves of a layer, soft caps, and a window on every other layer."""
    config = config.family(GEMMA2)
    spec = gemma(config, rope.reader(), cap=30.0)
    spec = replace(spec, softcap=config.optional_number("attn_logit_softcapping", default=50.0))
    kinds = layer_kinds(config, len(spec.layers), lambda i: i % 2 == 0)
    return spec.with_mixers(window=windows(config, kinds, config.optional_integer("sliding_window")))


def gemma3(config: Config) -> DecoderSpec:
    """Gemma 2 with norms on q and k in place of the caps, and another rotation where the window is."""
    config = config.family(GEMMA3)
    config.skip("attn_logit_softcapping")  # a key that its forward pass never reads
    spec = gemma(config, ropes, cap=None)
    pattern = config.integer("sliding_window_pattern", default=6)
    kinds = layer_kinds(config, len(spec.layers), lambda i: (i + 1) % pattern != 0)
    window = windows(config, kinds, config.optional_integer("sliding_window"))
    spec = spec.with_mixers(
        window=window, rope=[int(kind == SLIDING) for kind in kinds], norm=HeadNorm("rms1")
    )
    # The length in the file includes the extension by linear scaling.
    return replace(spec, max_len=config.integer("max_position_embeddings"))


def gemma(config: Config, ropes: Ropes, cap: float | None) -> DecoderSpec:
    """What Gemma 2 and 3 share."""
    norm = NormSpec("rms1", config.number("rms_norm_eps", high=1.0))
    return replace(
        decoder(config, ropes=ropes, norm=norm, act="hidden_activation", tied=True),
        placement=Placement.SANDWICH,
        bias=base.attention_bias(config),
        scale=config.number("query_pre_attn_scalar") ** -0.5,
        embed_scale=bf16(config.integer("hidden_size") ** 0.5),
        logit_cap=config.optional_number("final_logit_softcapping", default=cap),
    )


def ropes(config: Config, head_dim: int) -> list[RopeSpec]:
    """Scaled, base 1e6 on full layers; plain, base 1e4 on sliding ones."""
    return [
        rope.parse(config, head_dim, layer_type=FULL, theta=1e6),
        rope.parse(
            config, head_dim, layer_type=SLIDING, theta=1e4, theta_key="rope_local_base_freq", flat=False
        ),
    ]


WEIGHTS2: WeightMap = {**base.WEIGHTS, **base.SANDWICH}
WEIGHTS3: WeightMap = {**WEIGHTS2, **base.QK_NORMS}
