"""Phi-3, 3.5, 4, Phi-4-mini and Phi-4-reasoning; not Phi-3-small and PhiMoE."""

from __future__ import annotations

from pace.models import llama as base
from pace.models import rope
from pace.models.common import decoder, one_window
from pace.models.config import Config
from pace.models.spec import DecoderSpec
from pace.models.weight_map import Part, WeightMap


def phi3(config: Config) -> DecoderSpec:
    """Llama with fused projections, one window for all layers or none, and longrope under two more names."""
    config = config.family({"original_max_position_embeddings": 4096})
    ropes = rope.reader(share=1.0, synonyms={"su": "longrope", "yarn": "longrope"})
    spec = decoder(config, ropes=ropes)
    window = config.optional_integer("sliding_window")
    return spec.with_mixers(window=one_window(config, len(spec.layers), window))


WEIGHTS: WeightMap = {
    **base.WEIGHTS,
    "layers.{i}.qkv": (Part(f"{base.ATTN}.qkv_proj.weight", "q|k|v"),),
    "layers.{i}.gate_up": (Part(f"{base.MLP}.gate_up_proj.weight", "gate|up"),),
}
