"""OPT 125m to 66b, and Galactica, which has no biases and no norm weights."""

from __future__ import annotations

from dataclasses import replace

from pace.models.common import decoder, plain_heads
from pace.models.config import Config
from pace.models.spec import Bias, DecoderSpec, LearnedPositions, NormSpec, Placement
from pace.models.weight_map import Part, WeightMap

ALIASES = {"intermediate_size": "ffn_dim", "hidden_act": "activation_function"}


def opt(config: Config) -> DecoderSpec:
    """Learned positions, LayerNorms before (350m: after) attention and a plain MLP, biases."""
    config = config.family(aliases=ALIASES)
    plain_heads(config)
    affine = config.flag("layer_norm_elementwise_affine", default=True)
    norm = NormSpec("layer", 1e-5, weight=affine, bias=affine)
    spec = decoder(config, ropes=lambda c, d: (), norm=norm, gated=False, tied=True)
    before = config.flag("do_layer_norm_before", default=True)
    embed_dim = config.integer("word_embed_proj_dim", default=spec.dim)
    return replace(
        spec,
        placement=Placement.PRE if before else Placement.STREAM,
        final_norm=before and not config.flag("_remove_final_layer_norm", default=False),
        bias=Bias.QKV | Bias.OUT | Bias.MLP if config.flag("enable_bias", default=True) else Bias.NONE,
        positions=LearnedPositions(n=spec.max_len + 2, offset=2),
        embed_dim=embed_dim if embed_dim != spec.dim else None,
    )


_ROOT = "model.decoder"
_AT = f"{_ROOT}.layers.{{i}}"


def _pairs(name: str, source: str) -> WeightMap:
    """A weight and its bias."""
    return {name: (Part(f"{source}.weight"),), f"{name}.bias": (Part(f"{source}.bias"),)}


WEIGHTS: WeightMap = {
    "embed": (Part(f"{_ROOT}.embed_tokens.weight"),),
    "embed.in": (Part(f"{_ROOT}.project_in.weight"),),
    "embed.out": (Part(f"{_ROOT}.project_out.weight"),),
    "positions": (Part(f"{_ROOT}.embed_positions.weight"),),
    "layers.{i}.qkv": tuple(Part(f"{_AT}.self_attn.{p}_proj.weight", p) for p in ("q", "k", "v")),
    "layers.{i}.qkv.bias": tuple(Part(f"{_AT}.self_attn.{p}_proj.bias", p) for p in ("q", "k", "v")),
    **_pairs("layers.{i}.attn_norm", f"{_AT}.self_attn_layer_norm"),
    **_pairs("layers.{i}.o", f"{_AT}.self_attn.out_proj"),
    **_pairs("layers.{i}.mlp_norm", f"{_AT}.final_layer_norm"),
    **_pairs("layers.{i}.up", f"{_AT}.fc1"),
    **_pairs("layers.{i}.down", f"{_AT}.fc2"),
    **_pairs("norm", f"{_ROOT}.final_layer_norm"),
    "lm_head": (Part("lm_head.weight"),),
}
