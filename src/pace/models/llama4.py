"""Llama 4 Scout and Maverick: text, and the text tower of multimodal files."""

from __future__ import annotations

from dataclasses import replace

from pace.models import experts as moe
from pace.models import llama as base
from pace.models import rope
from pace.models.common import MAX_WIDTH, decoder, layer_kinds
from pace.models.config import Config
from pace.models.spec import DecoderSpec, HeadNorm, RouterSpec
from pace.models.weight_map import Part, WeightMap, expert_weights

CHUNKED = "chunked_attention"


def llama4(config: Config) -> DecoderSpec:
    """Layers that rotate attend within chunks; every fourth does neither, and its queries grow with the position.

    `no_rope_layers` has 1 where a layer *does* rotate; an explicit `layer_types` decides the mask alone.
    """
    config = config.family({"head_dim": 128})
    spec = decoder(config, ropes=rope.reader(theta=5e5, interleaved=True))
    n = len(spec.layers)
    interval = config.integer("no_rope_layer_interval", default=4)
    rotates = [(i + 1) % interval != 0 for i in range(n)]
    if config.values.get("no_rope_layers"):  # [] means the default
        rotates = list(config.bits("no_rope_layers", n))
    config.skip("no_rope_layers")
    chunk = config.optional_integer("attention_chunk_size", default=8192)
    kinds = layer_kinds(config, n, lambda i: chunk is not None and rotates[i], CHUNKED)
    if chunk is None and CHUNKED in kinds:
        raise config.error("attention_chunk_size", chunk, f"a number of tokens, as layer_types has {CHUNKED}")
    norm = HeadNorm(after_rope=True, weight=False) if config.flag("use_qk_norm", default=True) else None
    warm = None
    if _tuned(config):
        floor = float(config.integer("floor_scale", default=8192))
        warm = (config.number("attn_scale", default=0.1), floor, 1.0)
    spec = replace(spec, bias=base.attention_bias(config)).with_ffns(
        width=config.integer("intermediate_size_mlp", default=16384, high=MAX_WIDTH)
    )
    experts = moe.experts(config, RouterSpec("sigmoid"), width="intermediate_size")
    experts = replace(experts, on_input=True, shared=moe.dense_spec(experts, experts.width))
    step = config.integer("interleave_moe_layer_step", default=1)
    chosen = moe.layer_indices(config, "moe_layers", n)
    sparse = [(i + 1) % step == 0 if chosen is None else i in chosen for i in range(n)]
    return spec.with_experts(experts, sparse).with_mixers(
        chunk=[chunk if kind == CHUNKED else None for kind in kinds],
        rope=[0 if r else None for r in rotates],
        norm=[norm if r else None for r in rotates],
        temperature=[None if r else warm for r in rotates],
    )


def _tuned(config: Config) -> bool:
    """attn_temperature_tuning; the first files have 4 for true."""
    if config.values.get("attn_temperature_tuning") == 4:
        config.skip("attn_temperature_tuning")
        return True
    return config.flag("attn_temperature_tuning", default=True)


_AT = f"{base.LAYER}.feed_forward"
WEIGHTS: WeightMap = {
    **base.WEIGHTS,
    "layers.{i}.gate_up": (Part(f"{_AT}.gate_proj.weight", "gate"), Part(f"{_AT}.up_proj.weight", "up")),
    "layers.{i}.down": (Part(f"{_AT}.down_proj.weight"),),
    **expert_weights(f"{_AT}.experts", own="gate_up_proj", transposed=True),
    **moe.shared(f"{_AT}.shared_expert"),
    "layers.{i}.router": (Part(f"{_AT}.router.weight"),),
}
