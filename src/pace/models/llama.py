"""Llama 1, 2, 3, 3.1, 3.2, 3.3 and every checkpoint that calls itself LlamaForCausalLM: DeepSeek-R1-Distill-Llama,
Sarvam-1 and 2B, SmolLM 1 and 2, open_llama, Yi, TinyLlama, Vicuna.
"""

from __future__ import annotations

from dataclasses import replace

from pace.models.common import decoder
from pace.models.config import Config
from pace.models.spec import Bias, DecoderSpec
from pace.models.weight_map import Part, WeightMap


def llama(config: Config) -> DecoderSpec:
    """The base family; biases on all attention projections or none, on all MLP projections or none."""
    return replace(decoder(config), bias=biases(config))


def biases(config: Config) -> Bias:
    """The biases that `attention_bias` and `mlp_bias` switch on."""
    return attention_bias(config) | (Bias.MLP if config.flag("mlp_bias", default=False) else Bias.NONE)


def attention_bias(config: Config) -> Bias:
    """Those of families whose MLP has none."""
    return Bias.QKV | Bias.OUT if config.flag("attention_bias", default=False) else Bias.NONE


LAYER = "model.layers.{i}"
ATTN = f"{LAYER}.self_attn"
MLP = f"{LAYER}.mlp"

WEIGHTS: WeightMap = {
    "embed": (Part("model.embed_tokens.weight"),),
    "layers.{i}.attn_norm": (Part(f"{LAYER}.input_layernorm.weight"),),
    "layers.{i}.qkv": (
        Part(f"{ATTN}.q_proj.weight", "q"),
        Part(f"{ATTN}.k_proj.weight", "k"),
        Part(f"{ATTN}.v_proj.weight", "v"),
    ),
    "layers.{i}.qkv.bias": (
        Part(f"{ATTN}.q_proj.bias", "q"),
        Part(f"{ATTN}.k_proj.bias", "k"),
        Part(f"{ATTN}.v_proj.bias", "v"),
    ),
    "layers.{i}.o": (Part(f"{ATTN}.o_proj.weight"),),
    "layers.{i}.o.bias": (Part(f"{ATTN}.o_proj.bias"),),
    "layers.{i}.mlp_norm": (Part(f"{LAYER}.post_attention_layernorm.weight"),),
    "layers.{i}.gate_up": (Part(f"{MLP}.gate_proj.weight", "gate"), Part(f"{MLP}.up_proj.weight", "up")),
    "layers.{i}.gate_up.bias": (Part(f"{MLP}.gate_proj.bias", "gate"), Part(f"{MLP}.up_proj.bias", "up")),
    "layers.{i}.down": (Part(f"{MLP}.down_proj.weight"),),
    "layers.{i}.down.bias": (Part(f"{MLP}.down_proj.bias"),),
    "norm": (Part("model.norm.weight"),),
    "lm_head": (Part("lm_head.weight"),),
}

QK_NORMS: WeightMap = {
    "layers.{i}.q_norm": (Part(f"{ATTN}.q_norm.weight"),),
    "layers.{i}.k_norm": (Part(f"{ATTN}.k_norm.weight"),),
}
"""Norms of queries and keys, in the families that have them."""

SANDWICH: WeightMap = {
    "layers.{i}.attn_post_norm": (Part(f"{LAYER}.post_attention_layernorm.weight"),),
    "layers.{i}.mlp_norm": (Part(f"{LAYER}.pre_feedforward_layernorm.weight"),),
    "layers.{i}.mlp_post_norm": (Part(f"{LAYER}.post_feedforward_layernorm.weight"),),
}
"""Norms behind attention and MLP, in the families that have them."""
