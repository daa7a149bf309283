"""Qwen3 (dense)."""

from __future__ import annotations

from dataclasses import replace

from pace.models import llama as base
from pace.models.common import decoder, upper_windows
from pace.models.config import Config
from pace.models.spec import DecoderSpec, HeadNorm
from pace.models.weight_map import WeightMap


def qwen3(config: Config) -> DecoderSpec:
    """Llama with an RMS norm on each query and key head; head_dim is 128 unless the config says otherwise."""
    config.only("use_qk_norm", True)
    spec = replace(decoder(config, head_dim=128), bias=base.attention_bias(config))
    return spec.with_mixers(norm=HeadNorm(), window=upper_windows(config, len(spec.layers)))


WEIGHTS: WeightMap = {**base.WEIGHTS, **base.QK_NORMS}
