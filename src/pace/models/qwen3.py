"""Qwen3 (dense)."""

from __future__ import annotations

from dataclasses import replace

from pace.models import llama as base
from pace.models.spec import Bias, Config, DecoderSpec, LayerSpec, QKNorm, layer_windows, refuse_foreign
from pace.models.weights import Part, WeightMap


def qwen3(config: Config) -> DecoderSpec:
    """Llama with an RMS norm on each query and key head; head_dim is 128 unless the config says otherwise."""
    refuse_foreign(config, also={"use_qk_norm": (True,)})
    spec = base.decoder(config, default_head_dim=128)
    windows = layer_windows(config, len(spec.layers))
    return replace(
        spec,
        qk_norm=QKNorm.HEAD,
        bias=Bias.QKV | Bias.OUT if config.flag("attention_bias", default=False) else Bias.NONE,
        layers=tuple(LayerSpec(window=w) for w in windows),
    )


WEIGHTS: WeightMap = {
    **base.WEIGHTS,
    "layers.{i}.q_norm": (Part("model.layers.{i}.self_attn.q_norm.weight"),),
    "layers.{i}.k_norm": (Part("model.layers.{i}.self_attn.k_norm.weight"),),
}
