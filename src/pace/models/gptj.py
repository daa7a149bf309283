"""GPT-J."""

from __future__ import annotations

from dataclasses import replace

from pace.models.common import MAX_WIDTH, decoder, plain_heads
from pace.models.config import Config
from pace.models.spec import Bias, DecoderSpec, NormSpec, Placement, RopeSpec
from pace.models.weight_map import Part, WeightMap

ALIASES = {
    "hidden_size": "n_embd",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
    "max_position_embeddings": "n_positions",
    "intermediate_size": "n_inner",
    "hidden_act": "activation_function",
}


def gptj(config: Config) -> DecoderSpec:
    """Attention and a plain MLP side by side behind one LayerNorm; neighbouring columns rotate."""
    dim = config.family(aliases=ALIASES).integer("hidden_size", high=MAX_WIDTH // 4)
    config = config.family({"intermediate_size": 4 * dim, "hidden_act": "gelu_new"}, ALIASES)
    plain_heads(config)
    norm = NormSpec("layer", config.number("layer_norm_epsilon", default=1e-5, high=1.0), bias=True)
    spec = decoder(config, ropes=rotation, norm=norm, gated=False)
    return replace(spec, placement=Placement.PARALLEL, bias=Bias.MLP | Bias.HEAD)


def rotation(config: Config, head_dim: int) -> tuple[RopeSpec]:
    """The first `rotary_dim` columns of a head, base 10000."""
    rotary_dim = config.optional_integer("rotary_dim", default=64, high=head_dim)
    if rotary_dim is None or rotary_dim % 2:
        raise config.error("rotary_dim", rotary_dim, f"an even number up to {head_dim}")
    max_len = config.integer("max_position_embeddings")
    return (RopeSpec(10000.0, rotary_dim, max_len, max_len, interleaved=True),)


_AT = "transformer.h.{i}"

WEIGHTS: WeightMap = {
    "embed": (Part("transformer.wte.weight"),),
    "layers.{i}.attn_norm": (Part(f"{_AT}.ln_1.weight"),),
    "layers.{i}.attn_norm.bias": (Part(f"{_AT}.ln_1.bias"),),
    "layers.{i}.qkv": tuple(Part(f"{_AT}.attn.{p}_proj.weight", p) for p in ("q", "k", "v")),
    "layers.{i}.o": (Part(f"{_AT}.attn.out_proj.weight"),),
    "layers.{i}.up": (Part(f"{_AT}.mlp.fc_in.weight"),),
    "layers.{i}.up.bias": (Part(f"{_AT}.mlp.fc_in.bias"),),
    "layers.{i}.down": (Part(f"{_AT}.mlp.fc_out.weight"),),
    "layers.{i}.down.bias": (Part(f"{_AT}.mlp.fc_out.bias"),),
    "norm": (Part("transformer.ln_f.weight"),),
    "norm.bias": (Part("transformer.ln_f.bias"),),
    "lm_head": (Part("lm_head.weight"),),
    "lm_head.bias": (Part("lm_head.bias"),),
}
