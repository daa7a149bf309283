"""gpt-oss 20b and 120b."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from pace.models import experts as moe
from pace.models import llama as base
from pace.models import rope
from pace.models.common import decoder, layer_kinds, windows
from pace.models.config import Config
from pace.models.spec import Bias, DecoderSpec, RouterSpec
from pace.models.weight_map import Part, WeightMap, expert_weights

YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def gpt_oss(config: Config) -> DecoderSpec:
    """Biases nearly everywhere, a window on every other layer, sinks, and experts with clamped gates."""
    config.only("norm_topk_prob", True)
    config = config.family({"head_dim": 64, "hidden_act": "silu"})
    spec = decoder(config, ropes=rope.reader(theta=150000.0, default=YARN))
    config.only("hidden_act", "silu")  # its experts have their own function
    kinds = layer_kinds(config, len(spec.layers), lambda i: i % 2 == 0)
    experts = replace(
        moe.experts(config, RouterSpec("chosen", bias=True), width="intermediate_size"),
        clamp=(config.number("swiglu_alpha", default=1.702), config.number("swiglu_limit", default=7.0)),
        bias=True,
        format=weight_format(config),
    )
    bias = Bias.QKV | Bias.OUT if config.flag("attention_bias", default=True) else Bias.NONE
    window = config.optional_integer("sliding_window", default=128)
    return replace(spec.with_experts(experts), bias=bias).with_mixers(
        window=windows(config, kinds, window), sinks=True
    )


def weight_format(config: Config) -> Literal["bf16", "mxfp4"]:
    """MXFP4, or bf16 where nothing or everything else is quantised."""
    if not config.has("quantization_config"):
        return "bf16"
    return "mxfp4" if config.table("quantization_config").text("quant_method") == "mxfp4" else "bf16"


WEIGHTS: WeightMap = {
    **base.WEIGHTS,
    **expert_weights(f"{base.MLP}.experts", own="gate_up_proj", transposed=True, interleaved=True, bias=True),
    "layers.{i}.sinks": (Part(f"{base.ATTN}.sinks"),),
    "layers.{i}.router": (Part(f"{base.MLP}.router.weight"),),
    "layers.{i}.router.bias": (Part(f"{base.MLP}.router.bias"),),
}
