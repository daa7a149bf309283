"""ERNIE 4.5 (dense)."""

from __future__ import annotations

from dataclasses import replace

from pace.models import llama as base
from pace.models import rope
from pace.models.common import decoder
from pace.models.config import Config
from pace.models.spec import Bias, DecoderSpec
from pace.models.weight_map import WeightMap


def ernie4_5(config: Config) -> DecoderSpec:
    """Llama that rotates neighbouring columns, with biases everywhere or nowhere."""
    spec = decoder(config, ropes=rope.reader(theta=5e5, interleaved=True), head_dim=128, tied=True)
    bias = Bias.QKV | Bias.OUT | Bias.MLP if config.flag("use_bias", default=False) else Bias.NONE
    return replace(spec, bias=bias)


WEIGHTS: WeightMap = base.WEIGHTS
