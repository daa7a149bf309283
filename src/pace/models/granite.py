"""Granite 3.0 to 3.3 and 4.1: dense, and with experts."""

from __future__ import annotations

from dataclasses import replace

from pace.models import experts as moe
from pace.models import llama as base
from pace.models.common import decoder
from pace.models.config import Config
from pace.models.spec import DecoderSpec, RouterSpec
from pace.models.weight_map import OneOf, Part, WeightMap, expert_weights


def granite(config: Config) -> DecoderSpec:
    """Llama with four numbers: of the embedding, the scores, the residual additions and the logits."""
    return scaled(config, replace(decoder(config), bias=base.biases(config)))


def granite_moe(config: Config) -> DecoderSpec:
    """The same with experts, weighted by the softmax of the chosen ones' logits."""
    config.only("norm_topk_prob", True)
    spec = decoder(config).with_experts(moe.experts(config, RouterSpec("chosen"), width="intermediate_size"))
    return scaled(config, replace(spec, bias=base.attention_bias(config)))


def scaled(config: Config, spec: DecoderSpec) -> DecoderSpec:
    """The spec with the family's numbers."""
    return replace(
        spec,
        embed_scale=config.number("embedding_multiplier", default=1.0),
        scale=config.number("attention_multiplier", default=1.0),
        residual_scale=config.number("residual_multiplier", default=1.0),
        logit_scale=1 / config.number("logits_scaling", default=1.0),
    )


WEIGHTS: WeightMap = base.WEIGHTS

_AT = f"{base.LAYER}.block_sparse_moe"
MOE_WEIGHTS: WeightMap = {
    **base.WEIGHTS,
    **expert_weights(
        f"{_AT}.experts",
        own="gate_up_proj",
        fused=(f"{_AT}.input_linear.weight", f"{_AT}.output_linear.weight"),
    ),
    "layers.{i}.router": OneOf(((Part(f"{_AT}.router.layer.weight"),), (Part(f"{_AT}.router.weight"),))),
}
