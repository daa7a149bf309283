"""Qwen2 and Qwen2.5 (dense)."""

from __future__ import annotations

from dataclasses import replace

from pace.models import llama as base
from pace.models.spec import Bias, Config, DecoderSpec, LayerSpec, layer_windows, refuse_foreign
from pace.models.weights import WeightMap


def qwen2(config: Config) -> DecoderSpec:
    """Llama with biases on q, k and v alone, and an optional window on the upper layers.

    attention_bias and mlp_bias are not read, as in transformers: the file must have exactly these biases.
    """
    refuse_foreign(config)
    spec = base.decoder(config)
    windows = layer_windows(config, len(spec.layers))
    return replace(spec, bias=Bias.QKV, layers=tuple(LayerSpec(window=w) for w in windows))


WEIGHTS: WeightMap = base.WEIGHTS
