"""Phi-1, Phi-1.5 and Phi-2."""

from __future__ import annotations

from dataclasses import replace

from pace.models import llama as base
from pace.models import rope
from pace.models.common import decoder
from pace.models.config import Config
from pace.models.spec import Bias, DecoderSpec, NormSpec, Placement
from pace.models.weight_map import Part, WeightMap


def phi(config: Config) -> DecoderSpec:
    """Attention and a plain MLP side by side behind one LayerNorm; biases everywhere; partial rotation."""
    norm = NormSpec("layer", config.number("layer_norm_eps", default=1e-5, high=1.0), bias=True)
    config.only("qk_layernorm", False)
    spec = decoder(config, ropes=rope.reader(share=0.5), norm=norm, gated=False)
    return replace(spec, placement=Placement.PARALLEL, bias=Bias.QKV | Bias.OUT | Bias.MLP | Bias.HEAD)


WEIGHTS: WeightMap = {
    **base.WEIGHTS,
    "layers.{i}.attn_norm.bias": (Part(f"{base.LAYER}.input_layernorm.bias"),),
    "layers.{i}.o": (Part(f"{base.ATTN}.dense.weight"),),
    "layers.{i}.o.bias": (Part(f"{base.ATTN}.dense.bias"),),
    "layers.{i}.up": (Part(f"{base.MLP}.fc1.weight"),),
    "layers.{i}.up.bias": (Part(f"{base.MLP}.fc1.bias"),),
    "layers.{i}.down": (Part(f"{base.MLP}.fc2.weight"),),
    "layers.{i}.down.bias": (Part(f"{base.MLP}.fc2.bias"),),
    "norm": (Part("model.final_layernorm.weight"),),
    "norm.bias": (Part("model.final_layernorm.bias"),),
    "lm_head.bias": (Part("lm_head.bias"),),
}
