"""StableLM 3B, StableLM 2 1.6B and 12B."""

from __future__ import annotations

from dataclasses import replace

from pace.models import llama as base
from pace.models import rope
from pace.models.common import decoder
from pace.models.config import Config
from pace.models.spec import Bias, DecoderSpec, HeadNorm, NormSpec, Placement
from pace.models.weight_map import Part, WeightMap


def stablelm(config: Config) -> DecoderSpec:
    """Llama with LayerNorms and a quarter of each head rotated; 12B: parallel, with a norm of its own per head."""
    norm = NormSpec("layer", config.number("layer_norm_eps", default=1e-5, high=1.0), bias=True)
    config.only("head_dim")
    spec = decoder(config, ropes=rope.reader(share=0.25), norm=norm)
    parallel = config.flag("use_parallel_residual", default=False)
    qk_norm = HeadNorm("layer", "head_own") if config.flag("qk_layernorm", default=False) else None
    return replace(
        spec,
        placement=Placement.PARALLEL if parallel else Placement.PRE,
        bias=Bias.QKV if config.flag("use_qkv_bias", default=False) else Bias.NONE,
    ).with_mixers(norm=qk_norm)


WEIGHTS: WeightMap = {
    **base.WEIGHTS,
    "layers.{i}.attn_norm.bias": (Part(f"{base.LAYER}.input_layernorm.bias"),),
    "layers.{i}.mlp_norm.bias": (Part(f"{base.LAYER}.post_attention_layernorm.bias"),),
    "layers.{i}.q_norm": (Part(f"{base.ATTN}.q_layernorm.norms.{{h}}.weight"),),
    "layers.{i}.k_norm": (Part(f"{base.ATTN}.k_layernorm.norms.{{h}}.weight"),),
    "norm.bias": (Part("model.norm.bias"),),
}
