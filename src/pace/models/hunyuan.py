"""HunYuan (dense)."""

from __future__ import annotations

from dataclasses import replace

from pace.models import llama as base
from pace.models import rope
from pace.models.common import decoder
from pace.models.config import Config
from pace.models.spec import DecoderSpec, HeadNorm, RopeSpec
from pace.models.weight_map import Part, WeightMap

FIXED = ("alpha", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
"""With `alpha` its dynamic scaling depends on no length; the files carry the rest without use."""


def hunyuan(config: Config) -> DecoderSpec:
    """Llama with an RMS norm on each query and key head, after the rotation."""
    spec = replace(decoder(config, ropes=rotation), bias=base.attention_bias(config))
    return spec.with_mixers(norm=HeadNorm(after_rope=True))


def rotation(config: Config, head_dim: int) -> tuple[RopeSpec]:
    """Dynamic scaling with a fixed `alpha` stretches the base once and for all."""
    spec = rope.parse(config, head_dim, extra=FIXED)
    parameters = rope.parameters(config)[0]
    if spec.kind == "dynamic" and parameters.has("alpha"):
        stretch = parameters.number("alpha") ** (head_dim / (head_dim - 2))
        return (replace(spec, kind="default", factor=1.0, theta=spec.theta * stretch),)
    return (spec,)


WEIGHTS: WeightMap = {
    **base.WEIGHTS,
    "layers.{i}.q_norm": (Part(f"{base.ATTN}.query_layernorm.weight"),),
    "layers.{i}.k_norm": (Part(f"{base.ATTN}.key_layernorm.weight"),),
}
