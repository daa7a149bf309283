"""Granite 3.0 to 3.3 and 4.1 (dense)."""

from __future__ import annotations

from dataclasses import replace

from pace.models import llama as base
from pace.models.common import decoder
from pace.models.config import Config
from pace.models.spec import DecoderSpec
from pace.models.weights import WeightMap


def granite(config: Config) -> DecoderSpec:
    """Llama with four numbers: of the embedding, the scores, the residual additions and the logits."""
    return replace(
        decoder(config),
        bias=base.biases(config),
        embed_scale=config.number("embedding_multiplier", default=1.0),
        scale=config.number("attention_multiplier", default=1.0),
        residual_scale=config.number("residual_multiplier", default=1.0),
        logit_scale=1 / config.number("logits_scaling", default=1.0),
    )


WEIGHTS: WeightMap = base.WEIGHTS
