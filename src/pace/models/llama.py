"""Llama 1, 2, 3, 3.1, 3.2 and every checkpoint that calls itself LlamaForCausalLM."""

from __future__ import annotations

from dataclasses import replace

from pace.models import rope
from pace.models.spec import Bias, Config, DecoderSpec, LayerSpec, activation, heads, refuse_foreign, width
from pace.models.weights import Part, PartRows, WeightMap


def llama(config: Config) -> DecoderSpec:
    """The base family; biases on all attention projections or none, on all MLP projections or none."""
    spec = decoder(config)
    # Readers disagree whether Llama has windows: those that hide nothing are taken.
    window = config.values.get("sliding_window")
    wide = isinstance(window, int) and window >= spec.max_len
    full = ["full_attention"] * len(spec.layers)
    refuse_foreign(config, also={"sliding_window": (window,) if wide else (), "layer_types": (full,)})
    bias = Bias.NONE
    if config.flag("attention_bias", default=False):
        bias |= Bias.QKV | Bias.OUT
    if config.flag("mlp_bias", default=False):
        bias |= Bias.MLP
    return replace(spec, bias=bias)


def decoder(config: Config, default_head_dim: int | None = None) -> DecoderSpec:
    """What Llama and its descendants share: pre-norm, RMS norms, gated MLP, rotary positions; no biases.

    Args:
        default_head_dim: head_dim of a config without that key; None: hidden_size / num_attention_heads.

    Raises:
        CheckpointError, UnsupportedModel: see the readers in `spec` and `rope`.
    """
    dim = width(config, "hidden_size")
    n_heads, n_kv_heads, head_dim = heads(config, dim, default_head_dim)
    embedding = rope.parse(config, head_dim)
    return DecoderSpec(
        dim=dim,
        intermediate_dim=width(config, "intermediate_size"),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        vocab_size=config.integer("vocab_size", high=1 << 22),
        max_len=rope.context_len(embedding),
        norm_eps=config.number("rms_norm_eps", high=1.0),
        activation=activation(config),
        layers=(LayerSpec(),) * config.integer("num_hidden_layers", high=1024),
        ropes=(embedding,),
        tied=config.flag("tie_word_embeddings", default=False),
    )


_LAYER = "model.layers.{i}"
_ATTN = f"{_LAYER}.self_attn"
_MLP = f"{_LAYER}.mlp"

WEIGHTS: WeightMap = {
    "embed": (Part("model.embed_tokens.weight"),),
    "layers.{i}.attn_norm": (Part(f"{_LAYER}.input_layernorm.weight"),),
    "layers.{i}.qkv": (
        Part(f"{_ATTN}.q_proj.weight", PartRows.Q),
        Part(f"{_ATTN}.k_proj.weight", PartRows.KV),
        Part(f"{_ATTN}.v_proj.weight", PartRows.KV),
    ),
    "layers.{i}.qkv.bias": (
        Part(f"{_ATTN}.q_proj.bias", PartRows.Q),
        Part(f"{_ATTN}.k_proj.bias", PartRows.KV),
        Part(f"{_ATTN}.v_proj.bias", PartRows.KV),
    ),
    "layers.{i}.o": (Part(f"{_ATTN}.o_proj.weight"),),
    "layers.{i}.o.bias": (Part(f"{_ATTN}.o_proj.bias"),),
    "layers.{i}.mlp_norm": (Part(f"{_LAYER}.post_attention_layernorm.weight"),),
    "layers.{i}.gate_up": (
        Part(f"{_MLP}.gate_proj.weight", PartRows.GATE),
        Part(f"{_MLP}.up_proj.weight", PartRows.UP),
    ),
    "layers.{i}.gate_up.bias": (
        Part(f"{_MLP}.gate_proj.bias", PartRows.GATE),
        Part(f"{_MLP}.up_proj.bias", PartRows.UP),
    ),
    "layers.{i}.down": (Part(f"{_MLP}.down_proj.weight"),),
    "layers.{i}.down.bias": (Part(f"{_MLP}.down_proj.bias"),),
    "norm": (Part("model.norm.weight"),),
    "lm_head": (Part("lm_head.weight"),),
}
