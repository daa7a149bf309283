"""Cohere 2: Command R7B, Command A, Aya."""

from __future__ import annotations

from dataclasses import replace

from pace.models import llama as base
from pace.models import rope
from pace.models.common import SLIDING, decoder, layer_kinds, windows
from pace.models.config import Config
from pace.models.spec import DecoderSpec, NormSpec, Placement
from pace.models.weight_map import WeightMap


def cohere2(config: Config) -> DecoderSpec:
    """Attention and MLP side by side behind a LayerNorm without bias; full layers don't rotate; scaled logits."""
    dim, n_heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    config.only("head_dim", dim // n_heads)  # transformers computes it, whatever the file says
    norm = NormSpec("layer", config.number("layer_norm_eps", default=1e-5, high=1.0))
    spec = decoder(config, ropes=rope.reader(interleaved=True), norm=norm, tied=True)
    pattern = config.integer("sliding_window_pattern", default=4)
    kinds = layer_kinds(config, len(spec.layers), lambda i: (i + 1) % pattern != 0)
    window = windows(config, kinds, config.optional_integer("sliding_window", default=4096))
    spec = spec.with_mixers(window=window, rope=[0 if kind == SLIDING else None for kind in kinds])
    return replace(
        spec,
        placement=Placement.PARALLEL,
        bias=base.attention_bias(config),
        logit_scale=config.number("logit_scale", default=0.0625),
    )


WEIGHTS: WeightMap = base.WEIGHTS
