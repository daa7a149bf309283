"""GLM-4.5, 4.6 and their Air models; Sarvam-30B, which is the same with whole heads that rotate."""

from __future__ import annotations

from dataclasses import replace

from pace.models import experts as moe
from pace.models import llama as base
from pace.models import rope
from pace.models.common import decoder
from pace.models.config import Config
from pace.models.spec import Bias, DecoderSpec, HeadNorm
from pace.models.weight_map import OneOf, Part, WeightMap


def glm4_moe(config: Config, theta: float = 10000.0, share: float = 0.5, scale: float = 1.0) -> DecoderSpec:
    """The first layers dense, then experts chosen by scores with a bias, and one for every row."""
    config.only("scoring_func", "sigmoid")
    spec = decoder(config, ropes=rope.reader(theta=theta, share=share))
    count = ("n_routed_experts", "num_local_experts", "num_experts")
    experts = moe.experts(config, moe.sigmoid_router(config, scale), count=count)
    experts = moe.check_groups(config, experts)
    n_shared = config.integer("n_shared_experts", default=1, low=0)
    if n_shared:
        experts = replace(experts, shared=moe.dense_spec(experts, n_shared * experts.width))
    first = config.integer("first_k_dense_replace", default=1, low=0)
    spec = spec.with_experts(experts, [i >= first for i in range(len(spec.layers))])
    norm = HeadNorm() if config.flag("use_qk_norm", default=False) else None
    bias = Bias.QKV if config.flag("attention_bias", default=False) else Bias.NONE
    return replace(spec, bias=bias).with_mixers(norm=norm)


def sarvam(config: Config) -> DecoderSpec:
    """The original file has other names of some keys and tensors."""
    config.only("score_function", "sigmoid")
    config = config.family(
        {"head_dim": 64, "use_qk_norm": True},
        {"n_shared_experts": "num_shared_experts", "attention_bias": "use_qkv_bias"},
    )
    return glm4_moe(config, theta=8e6, share=1.0, scale=2.5)


WEIGHTS: WeightMap = {
    **moe.WEIGHTS,
    **base.QK_NORMS,
    **moe.shared(f"{base.MLP}.shared_experts"),
    "layers.{i}.router.choice": (Part(f"{base.MLP}.gate.e_score_correction_bias"),),
}

_AT = f"{base.LAYER}.attention"


def _either(name: str, original: Part) -> OneOf:
    own = WEIGHTS[name]
    return OneOf((*(own.layouts if isinstance(own, OneOf) else (own,)), (original,)))


SARVAM_WEIGHTS: WeightMap = {
    **WEIGHTS,
    "embed": _either("embed", Part("model.word_embeddings.weight")),
    "layers.{i}.qkv": _either("layers.{i}.qkv", Part(f"{_AT}.query_key_value.weight", "q|k|v")),
    "layers.{i}.qkv.bias": _either("layers.{i}.qkv.bias", Part(f"{_AT}.query_key_value.bias", "q|k|v")),
    "layers.{i}.o": _either("layers.{i}.o", Part(f"{_AT}.dense.weight")),
    "layers.{i}.q_norm": _either("layers.{i}.q_norm", Part(f"{_AT}.query_layernorm.weight")),
    "layers.{i}.k_norm": _either("layers.{i}.k_norm", Part(f"{_AT}.key_layernorm.weight")),
    "layers.{i}.router.choice": _either("layers.{i}.router.choice", Part(f"{base.MLP}.gate.expert_bias")),
}
