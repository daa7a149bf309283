"""Mixtral 8x7B and 8x22B, and MiniMax-M2."""

from __future__ import annotations

from pace.models import experts as moe
from pace.models import llama as base
from pace.models import rope
from pace.models.common import decoder, one_window
from pace.models.config import Config
from pace.models.spec import DecoderSpec, HeadNorm, RouterSpec
from pace.models.weight_map import WeightMap


def mixtral(config: Config) -> DecoderSpec:
    """Mistral with experts, whose weights add up to 1."""
    config.only("norm_topk_prob", True)
    spec = decoder(config, ropes=rope.reader(theta=1e6))
    window = one_window(config, len(spec.layers), config.optional_integer("sliding_window"))
    router = RouterSpec(renormalise=True)
    return spec.with_experts(moe.experts(config, router, width="intermediate_size")).with_mixers(
        window=window
    )


def minimax_m2(config: Config) -> DecoderSpec:
    """Norms over all heads of q and of k, a part of each head rotates, and scores by themselves choose the experts."""
    config.only("norm_topk_prob", True)
    config.only("scoring_func", "sigmoid")
    config.only("use_routing_bias", True)
    config.only("use_qk_norm", True)
    config.only("shared_intermediate_size", 0)
    config.only("attn_type_list", [1] * config.integer("num_hidden_layers"))
    head_dim = config.integer("head_dim", default=128)
    turning = config.integer("rotary_dim", default=head_dim, high=head_dim)
    spec = decoder(config, ropes=rope.reader(theta=5e6, share=turning / head_dim), head_dim=128)
    router = RouterSpec("sigmoid", choice=True, renormalise=True)
    spec = spec.with_experts(moe.experts(config, router, width="intermediate_size"))
    return spec.with_mixers(norm=HeadNorm(scope="full"))


WEIGHTS: WeightMap = moe.BLOCK_WEIGHTS
MINIMAX_WEIGHTS: WeightMap = {**moe.BLOCK_WEIGHTS, **base.QK_NORMS}
