"""GLM-4-0414 (9B, 32B) and GLM-Z1."""

from __future__ import annotations

from dataclasses import replace

from pace.models import llama as base
from pace.models import rope
from pace.models.common import decoder
from pace.models.config import Config
from pace.models.spec import Bias, DecoderSpec, Placement
from pace.models.weight_map import Part, WeightMap


def glm4(config: Config) -> DecoderSpec:
    """Norms around both halves of a layer; the first half of each head rotates, in neighbouring columns."""
    spec = decoder(config, ropes=rope.reader(share=0.5, interleaved=True), head_dim=128)
    bias = Bias.QKV if config.flag("attention_bias", default=True) else Bias.NONE
    return replace(spec, placement=Placement.SANDWICH, bias=bias)


WEIGHTS: WeightMap = {
    **base.WEIGHTS,
    "layers.{i}.attn_post_norm": (Part(f"{base.LAYER}.post_self_attn_layernorm.weight"),),
    "layers.{i}.mlp_post_norm": (Part(f"{base.LAYER}.post_mlp_layernorm.weight"),),
    "layers.{i}.gate_up": (Part(f"{base.MLP}.gate_up_proj.weight", "gate|up"),),
}
