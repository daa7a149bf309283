"""Qwen1.5-MoE, Qwen2-MoE and Qwen3-MoE (30B-A3B, 235B-A22B, Coder)."""

from __future__ import annotations

from dataclasses import replace

from pace.models import experts as moe
from pace.models import llama as base
from pace.models.common import MAX_WIDTH, decoder, layer_kinds, one_window, windows
from pace.models.config import Config
from pace.models.spec import Bias, DecoderSpec, HeadNorm, RouterSpec
from pace.models.weight_map import Part, WeightMap


def qwen2_moe(config: Config) -> DecoderSpec:
    """Qwen2 with experts, and beside them one for every row behind a gate of its own."""
    spec = decoder(config)
    n = len(spec.layers)
    slides = config.flag("use_sliding_window", default=False)
    window = config.optional_integer("sliding_window") if slides else None
    config.skip("sliding_window")
    last = config.integer("max_window_layers", default=28, low=0)
    kinds = layer_kinds(config, n, lambda i: slides and i % 2 == 0 and i < last)
    experts = moe.experts(config, _router(config))
    width = config.integer("shared_expert_intermediate_size", high=MAX_WIDTH)
    experts = replace(experts, shared=moe.dense_spec(experts, width), shared_gate=True)
    spec = spec.with_experts(experts, moe.interleaved_layers(config, n))
    bias = Bias.QKV if config.flag("qkv_bias", default=True) else Bias.NONE
    return replace(spec, bias=bias).with_mixers(window=windows(config, kinds, window))


def qwen3_moe(config: Config) -> DecoderSpec:
    """Qwen3 with experts; heads are hidden_size / num_attention_heads wide unless the config says otherwise."""
    config.only("use_qk_norm", True)
    spec = replace(decoder(config), bias=base.attention_bias(config))
    n = len(spec.layers)
    slides = config.flag("use_sliding_window", default=False)
    window = config.optional_integer("sliding_window", default=4096) if slides else None
    config.skip("sliding_window")
    experts = moe.experts(config, _router(config))
    spec = spec.with_experts(experts, moe.interleaved_layers(config, n))
    return spec.with_mixers(norm=HeadNorm(), window=one_window(config, n, window))


def _router(config: Config) -> RouterSpec:
    return RouterSpec(renormalise=config.flag("norm_topk_prob", default=False))


WEIGHTS3: WeightMap = {**moe.WEIGHTS, **base.QK_NORMS}
WEIGHTS2: WeightMap = {
    **moe.WEIGHTS,
    **moe.shared(f"{base.MLP}.shared_expert"),
    "layers.{i}.shared_gate": (Part(f"{base.MLP}.shared_expert_gate.weight"),),
}
