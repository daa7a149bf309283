"""The experts of Gemma 4 26B-A4B, which stand beside an MLP."""

from __future__ import annotations

from dataclasses import replace

from pace.models import experts as moe
from pace.models import llama as base
from pace.models.config import Config
from pace.models.spec import DecoderSpec, DenseSpec, RouterSpec
from pace.models.weight_map import Part, WeightMap, expert_weights


def beside(config: Config, spec: DecoderSpec) -> DecoderSpec:
    """The spec with experts beside the MLP of every layer, if `enable_moe_block` says so."""
    if not config.flag("enable_moe_block", default=False):
        return spec
    router = RouterSpec(renormalise=True, own_norm=True)
    count, top_k, act = ("num_experts",), "top_k_experts", "hidden_activation"
    experts = moe.experts(config, router, count=count, top_k=top_k, act=act)
    dense = [DenseSpec(layer.ffn.width, layer.ffn.activation) for layer in spec.layers]
    layers = [
        replace(layer, ffn=replace(experts, dense=d)) for layer, d in zip(spec.layers, dense, strict=True)
    ]
    return replace(spec, layers=tuple(layers))


_AT = base.LAYER
WEIGHTS: WeightMap = {
    **expert_weights(f"{_AT}.experts", own="gate_up_proj"),
    "layers.{i}.router": (Part(f"{_AT}.router.proj.weight"),),
    "layers.{i}.router.norm": (Part(f"{_AT}.router.scale"),),
    "layers.{i}.router.expert_scale": (Part(f"{_AT}.router.per_expert_scale"),),
    "layers.{i}.dense_post_norm": (Part(f"{_AT}.post_feedforward_layernorm_1.weight"),),
    "layers.{i}.experts_norm": (Part(f"{_AT}.pre_feedforward_layernorm_2.weight"),),
    "layers.{i}.experts_post_norm": (Part(f"{_AT}.post_feedforward_layernorm_2.weight"),),
}
