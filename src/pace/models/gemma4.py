"""Gemma 4: E2B, E4B, 12B (unified), 31B and 26B-A4B; text, and the text tower of multimodal files."""

from __future__ import annotations

from dataclasses import replace

from pace.errors import UnsupportedModel
from pace.models import gemma, gemma4_experts, rope
from pace.models import llama as base
from pace.models.common import (
    FULL,
    SLIDING,
    bf16,
    check_head_dim,
    check_kv_heads,
    decoder,
    layer_kinds,
    windows,
)
from pace.models.config import Config
from pace.models.spec import DecoderSpec, HeadNorm, Placement
from pace.models.weight_map import Part, WeightMap

DEFAULTS = {k: v for k, v in gemma.GEMMA3.items() if k != "query_pre_attn_scalar"} | {
    "vocab_size": 262144,
    "num_hidden_layers": 30,
}
PROPORTIONAL = {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6}


def gemma4(config: Config) -> DecoderSpec:
    """The E models and 31B: per-layer inputs unless `hidden_size_per_layer_input` is 0."""
    spec = unified({"sliding_window": 512, "max_position_embeddings": 131072}, config)
    config = config.family(DEFAULTS)
    spec = gemma4_experts.beside(config, spec)
    width = config.integer("hidden_size_per_layer_input", default=256, low=0)
    rows = config.integer("vocab_size_per_layer_input", default=262144)
    if width and rows != spec.vocab_size:
        raise config.error("vocab_size_per_layer_input", rows, f"vocab_size ({spec.vocab_size})")
    return replace(spec, per_layer_dim=width or None)


def gemma4_unified(config: Config) -> DecoderSpec:
    """The 12B model, whose class knows no per-layer inputs."""
    return unified({"sliding_window": 1024, "max_position_embeddings": 262144}, config)


def unified(defaults: dict[str, int], config: Config) -> DecoderSpec:
    """What all have: two shapes of heads, plain scores, norms on q, k and v, shared keys and values."""
    config = config.family({**DEFAULTS, **defaults})
    config.only("use_bidirectional_attention", "vision", False)  # text is causal with "vision" as well
    config.only("rope_scaling")
    spec = decoder(config, ropes=lambda c, d: [], act="hidden_activation", tied=True)
    n = len(spec.layers)
    kinds = [*layer_kinds(config, n, lambda i: (i + 1) % 6 != 0)[:-1], FULL]
    full = [kind == FULL for kind in kinds]
    shapes = [head_shape(config, i, is_full) for i, is_full in enumerate(full)]
    n_shared = config.integer("num_kv_shared_layers", default=0, low=0, high=n - 1)
    double = 2 if config.flag("use_double_wide_mlp", default=False) else 1
    width = config.integer("intermediate_size")
    wide = [width * (double if i >= n - n_shared else 1) for i in range(n)]
    k_is_v = config.flag("attention_k_eq_v", default=False)
    d_full = one_head_dim(config, [d for (d, _), is_full in zip(shapes, full, strict=True) if is_full])
    sliding = [d for (d, _), is_full in zip(shapes, full, strict=True) if not is_full]
    d_sliding = one_head_dim(config, sliding or [d_full])
    spec = replace(
        spec,
        placement=Placement.SANDWICH,
        bias=base.attention_bias(config),
        layers=tuple(replace(layer, scalar=True) for layer in spec.layers),
        ropes=(
            rope.parse(config, d_full, layer_type=FULL, theta=1e6, share=1.0, default=PROPORTIONAL),
            rope.parse(config, d_sliding, layer_type=SLIDING, theta=1e4),
        ),
        scale=1.0,
        embed_scale=bf16(spec.dim**0.5),
        logit_cap=config.optional_number("final_logit_softcapping"),
    )
    return spec.with_ffns(width=wide).with_mixers(
        n_kv_heads=[n_kv for _, n_kv in shapes],
        head_dim=[d for d, _ in shapes],
        window=windows(config, kinds, config.integer("sliding_window")),
        rope=[int(not is_full) for is_full in full],
        norm=HeadNorm(),
        v_norm=True,
        k_is_v=[k_is_v and is_full for is_full in full],
        kv_from=[
            None if i < n - n_shared else source(config, kinds[: n - n_shared], kinds[i]) for i in range(n)
        ],
    )


def head_shape(config: Config, i: int, is_full: bool) -> tuple[int, int]:
    """head_dim and key/value heads of layer i: from `per_layer_config` where the file has one, else by its kind."""
    head_dim, n_kv = config.integer("head_dim"), config.integer("num_key_value_heads")
    if config.has("per_layer_config"):
        table = config.table("per_layer_config")
        own = table.table(str(i)) if table.has(str(i)) else Config({})
        for key in set(own.values) - {"head_dim", "num_key_value_heads"}:
            own.only(key)
        head_dim = own.integer("head_dim", default=head_dim)
        n_kv = own.integer("num_key_value_heads", default=n_kv)
    elif is_full:
        head_dim = config.integer("global_head_dim", default=512)
        if config.flag("attention_k_eq_v", default=False):
            n_kv = config.integer("num_global_key_value_heads", default=n_kv)
    n_heads = config.integer("num_attention_heads")
    check_kv_heads(config, "num_global_key_value_heads", n_heads, n_kv)
    return check_head_dim(config, "global_head_dim", head_dim), n_kv


def one_head_dim(config: Config, head_dims: list[int]) -> int:
    """The head_dim of all layers of a kind, which share one rotary embedding."""
    others = sorted(set(head_dims) - {head_dims[0]})
    if others:
        raise UnsupportedModel(
            f"{config.where}: per_layer_config has head_dim {head_dims[0]} and {others[0]} in layers of one kind; "
            "supported is one head_dim for full_attention and one for sliding_attention"
        )
    return head_dims[0]


def source(config: Config, own: list[str], kind: str) -> int:
    """The last layer with keys and values of its own that is of this kind."""
    if kind not in own:
        raise UnsupportedModel(
            f"{config.where}: num_kv_shared_layers leaves no {kind} layer that has keys and values of its own"
        )
    return len(own) - 1 - own[::-1].index(kind)


_AT = base.LAYER
WEIGHTS: WeightMap = {
    **gemma.WEIGHTS3,
    # Google's files have these for layers that share another's keys and values; they are not needed there.
    "layers.{i}.k_norm": (Part(f"{base.ATTN}.k_norm.weight", spare=True),),
    "layers.{i}.scalar": (Part(f"{_AT}.layer_scalar"),),
    "layers.{i}.input_gate": (Part(f"{_AT}.per_layer_input_gate.weight"),),
    "layers.{i}.input_out": (Part(f"{_AT}.per_layer_projection.weight"),),
    "layers.{i}.input_norm": (Part(f"{_AT}.post_per_layer_input_norm.weight"),),
    "inputs.proj": (Part("model.per_layer_model_projection.weight"),),
    "inputs.norm": (Part("model.per_layer_projection_norm.weight"),),
    "inputs.table": (Part("model.embed_tokens_per_layer.weight"),),
    **gemma4_experts.WEIGHTS,
}
