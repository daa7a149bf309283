"""Seed-OSS."""

from __future__ import annotations

from dataclasses import replace

from pace.models import llama as base
from pace.models.common import decoder
from pace.models.config import Config
from pace.models.spec import Bias, DecoderSpec
from pace.models.weight_map import WeightMap


def seed_oss(config: Config) -> DecoderSpec:
    """Llama with biases on q, k and v, and a switch of its own for the output's."""
    bias = Bias.QKV if config.flag("attention_bias", default=True) else Bias.NONE
    bias |= Bias.OUT if config.flag("attention_out_bias", default=False) else Bias.NONE
    bias |= Bias.MLP if config.flag("mlp_bias", default=False) else Bias.NONE
    return replace(decoder(config, head_dim=128), bias=bias)


WEIGHTS: WeightMap = base.WEIGHTS
