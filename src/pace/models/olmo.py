"""OLMo 2, OLMo 3 and OLMoE."""

from __future__ import annotations

from dataclasses import replace

from pace.models import experts as moe
from pace.models import llama as base
from pace.models import rope
from pace.models.common import FULL, SLIDING, Ropes, decoder, layer_kinds, windows
from pace.models.config import Config
from pace.models.spec import DecoderSpec, HeadNorm, Placement, RopeSpec, RouterSpec
from pace.models.weight_map import WeightMap


def olmo2(config: Config, ropes: Ropes | None = None) -> DecoderSpec:
    """Llama with norms behind attention and MLP only, and norms over all heads of q and of k."""
    spec = replace(decoder(config, ropes=ropes), placement=Placement.POST, bias=base.attention_bias(config))
    return spec.with_mixers(norm=HeadNorm(scope="full"))


def olmo3(config: Config) -> DecoderSpec:
    """OLMo 2 with a window on three of four layers; only the others' rotation is scaled."""
    spec = olmo2(config, ropes)
    kinds = layer_kinds(config, len(spec.layers), lambda i: (i + 1) % 4 != 0)
    window = windows(config, kinds, config.optional_integer("sliding_window", default=4096))
    return spec.with_mixers(window=window, rope=[int(kind == SLIDING) for kind in kinds])


def olmoe(config: Config) -> DecoderSpec:
    """Llama with experts, and OLMo 2's norms of q and k."""
    router = RouterSpec(renormalise=config.flag("norm_topk_prob", default=False))
    spec = decoder(config).with_experts(moe.experts(config, router, width="intermediate_size"))
    return replace(spec, bias=base.attention_bias(config)).with_mixers(norm=HeadNorm(scope="full"))


def ropes(config: Config, head_dim: int) -> list[RopeSpec]:
    """For full and for sliding layers."""
    return [
        rope.parse(config, head_dim, layer_type=FULL, theta=5e5),
        rope.parse(config, head_dim, layer_type=SLIDING, theta=5e5, flat=False),
    ]


WEIGHTS: WeightMap = {
    **{name: parts for name, parts in base.WEIGHTS.items() if not name.endswith(("attn_norm", "mlp_norm"))},
    **{name: parts for name, parts in base.SANDWICH.items() if name.endswith("post_norm")},
    **base.QK_NORMS,
}

MOE_WEIGHTS: WeightMap = {**moe.WEIGHTS, **base.QK_NORMS}
