"""Qwen2, Qwen2.5 and DeepSeek-R1-Distill-Qwen (dense)."""

from __future__ import annotations

from dataclasses import replace

from pace.models import llama as base
from pace.models.common import decoder, upper_windows
from pace.models.config import Config
from pace.models.spec import Bias, DecoderSpec
from pace.models.weight_map import WeightMap


def qwen2(config: Config) -> DecoderSpec:
    """Llama with biases on q, k and v alone, and an optional window on the upper layers.

    attention_bias and mlp_bias are not read, as in transformers: the file must have exactly these biases.
    """
    spec = replace(decoder(config), bias=Bias.QKV)
    return spec.with_mixers(window=upper_windows(config, len(spec.layers)))


WEIGHTS: WeightMap = base.WEIGHTS
