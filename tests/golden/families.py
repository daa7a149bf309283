"""Tiny checkpoints of every architecture, three or more of each, that flip every option a family reads.

Their tensors come from the family's own weight map, so `make.py` lets transformers load each file and refuses one
with a tensor missing or left over. Widths are odd where the family allows it; prompts are longer than every window.
"""

from __future__ import annotations

from typing import Any

from golden.tiny import GOLDEN_FILE as TINY_FILE
from golden.tiny import Case

VOCAB_SIZE = 211
GOLDEN_FILE = TINY_FILE.with_name("families.npz")
ERRORS_FILE = TINY_FILE.with_name("errors.json")
"""What make.py measured: see tests/models/catalogue.py."""
FULL, SLIDING = "full_attention", "sliding_attention"

COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "torch_dtype": "bfloat16",
}
RMS: dict[str, Any] = {"hidden_act": "silu", "rms_norm_eps": 1e-5}

CASES: dict[str, Case] = {}


def family(
    architecture: str,
    model_type: str,
    base: dict[str, Any],
    *,
    common: dict[str, Any] | None = None,
    **cases: Any,
) -> None:
    """Add the cases of one architecture: keyword = changes to `base`; `...` removes a key."""
    for name, changes in cases.items():
        tags = changes.pop("tags", ())
        gain = changes.pop("gain", 1.0)
        config = {
            "architectures": [architecture],
            "model_type": model_type,
            **(COMMON if common is None else common),
            **base,
            **changes,
        }
        config = {key: value for key, value in config.items() if value is not ...}
        CASES[f"{model_type}-{name.replace('_', '-')}"] = Case(config, max_model_len=48, tags=tags, gain=gain)


def alternating(n: int, first: str = SLIDING) -> list[str]:
    """Layer kinds that take turns."""
    other = FULL if first == SLIDING else SLIDING
    return [first if i % 2 == 0 else other for i in range(n)]


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}

family(
    "LlamaForCausalLM",
    "llama",
    RMS,
    open_llama_head20_odd={
        "hidden_size": 80,
        "head_dim": 20,
        "intermediate_size": 57,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-6,
    },
    hard_switch={
        "rope_scaling": {**LLAMA3, "low_freq_factor": 1.0, "high_freq_factor": 1.0},
        "rope_theta": 5e5,
        "head_dim": 32,
    },
    r1_distill={
        "rope_scaling": LLAMA3,
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
        "mlp_bias": True,
    },
    odd_stream={
        "hidden_act": "gelu",
        "num_hidden_layers": 2,
        "hidden_size": 72,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "attention_bias": True,
    },
)
family(
    "MistralForCausalLM",
    "mistral",
    {**RMS, "sliding_window": None},
    small={"head_dim": 24, "rope_theta": 1e6, "tie_word_embeddings": True},
    window={"num_attention_heads": 2, "sliding_window": 9, "num_key_value_heads": 1},
    wide={
        "hidden_act": "gelu",
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "sliding_window": 13,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-6,
        "intermediate_size": 58,
    },
)
family(
    "MinistralForCausalLM",
    "ministral",
    {**RMS, "sliding_window": 9, "head_dim": 16},
    alternating={"layer_types": alternating(3), "num_key_value_heads": 1},
    windows={"sliding_window": 12, "head_dim": 20, "rope_theta": 1e6},
    full={
        "layer_types": [FULL] * 2,
        "hidden_act": "gelu",
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "hidden_size": 80,
        "intermediate_size": 58,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
    },
)
MINISTRAL = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
family(
    "Ministral3ForCausalLM",
    "ministral3",
    {**RMS, "head_dim": 16, "rope_parameters": MINISTRAL},
    three={"tie_word_embeddings": True},
    hot={
        "head_dim": 24,
        "num_key_value_heads": 1,
        "rope_parameters": {**MINISTRAL, "llama_4_scaling_beta": 0.7, "original_max_position_embeddings": 8},
    },
    window={
        "hidden_act": "gelu",
        "hidden_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "sliding_window": 11,
        "intermediate_size": 50,
        "rms_norm_eps": 1e-6,
    },
)
family(
    "Qwen2ForCausalLM",
    "qwen2",
    RMS,
    r1_distill={"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 1, "rope_theta": 1e6},
    upper_windows={
        "max_window_layers": 2,
        "num_attention_heads": 2,
        "rms_norm_eps": 1e-6,
        "num_hidden_layers": 4,
        "use_sliding_window": True,
        "sliding_window": 10,
        "num_key_value_heads": 1,
    },
    layer_types={
        "hidden_act": "relu",
        "use_sliding_window": True,
        "sliding_window": 12,
        "layer_types": alternating(3),
        "hidden_size": 80,
        "intermediate_size": 90,
        "tie_word_embeddings": True,
    },
)
family(
    "Qwen3ForCausalLM",
    "qwen3",
    RMS,
    head128={"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2, "rope_theta": 1e6},
    head24_odd={
        "hidden_act": "gelu_new",
        "hidden_size": 72,
        "head_dim": 24,
        "attention_bias": True,
        "intermediate_size": 70,
        "rms_norm_eps": 1e-6,
    },
    windows={
        "head_dim": 32,
        "use_sliding_window": True,
        "sliding_window": 10,
        "layer_types": alternating(3, FULL),
        "tie_word_embeddings": True,
    },
)
GEMMA = {"hidden_activation": "gelu_pytorch_tanh", "head_dim": 32}
family(
    "Gemma2ForCausalLM",
    "gemma2",
    GEMMA,
    caps={"sliding_window": 10, "query_pre_attn_scalar": 20, "gain": 2.0},
    no_caps={
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "sliding_window": 7,
        "head_dim": 16,
        "num_key_value_heads": 1,
        "query_pre_attn_scalar": 256,
    },
    odd={
        "num_hidden_layers": 4,
        "num_attention_heads": 5,
        "num_key_value_heads": 5,
        "layer_types": alternating(4, FULL),
        "tie_word_embeddings": False,
        "hidden_size": 100,
        "intermediate_size": 75,
        "head_dim": 20,
        "sliding_window": 12,
        "attention_bias": True,
        "final_logit_softcapping": 5.0,
        "attn_logit_softcapping": 2.0,
        "hidden_activation": "gelu",
        "rope_theta": 500.0,
        "rms_norm_eps": 1e-5,
    },
)
family(
    "Gemma3ForCausalLM",
    "gemma3_text",
    {**GEMMA, "query_pre_attn_scalar": 20},
    pattern2={
        "sliding_window": 10,
        "sliding_window_pattern": 2,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "rope_local_base_freq": 100.0,
        "attn_logit_softcapping": 1.0,  # never applied
    },
    nested_ropes={
        "num_hidden_layers": 4,
        "sliding_window": 7,
        "layer_types": [FULL, SLIDING, SLIDING, FULL],
        "head_dim": 24,
        "num_key_value_heads": 1,
        "rope_parameters": {
            FULL: {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e4},
            SLIDING: {"rope_type": "default", "rope_theta": 300.0},
        },
        "attention_bias": True,
        "final_logit_softcapping": 5.0,
    },
    defaults={
        "num_hidden_layers": 7,
        "sliding_window": 10,
        "head_dim": ...,
        "hidden_activation": ...,
        "query_pre_attn_scalar": ...,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 40,
        "rms_norm_eps": 1e-5,
        "rope_theta": 3e5,
    },
    cap27b={
        "num_hidden_layers": 6,
        "hidden_size": 144,
        "query_pre_attn_scalar": 168,
        "head_dim": 128,
        "num_attention_heads": 2,
        "sliding_window": 30,
        "tie_word_embeddings": False,
    },
)
GEMMA4 = {
    "hidden_activation": "gelu_pytorch_tanh",
    "head_dim": 32,
    "global_head_dim": 48,
    "sliding_window": 10,
}
E_MODEL = {
    **GEMMA4,
    "num_hidden_layers": 6,
    "layer_types": alternating(6),
    "num_kv_shared_layers": 2,
    "use_double_wide_mlp": True,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": VOCAB_SIZE,
    "final_logit_softcapping": 30.0,
}
family(
    "Gemma4ForCausalLM",
    "gemma4_text",
    E_MODEL,
    e2b={"num_key_value_heads": 1},
    e4b_single_width={
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "use_double_wide_mlp": False,
        "num_kv_shared_layers": 3,
        "hidden_size_per_layer_input": 24,
        "head_dim": 20,
        "global_head_dim": 40,
        "intermediate_size": 58,
        "attention_bias": True,
        "rope_parameters": {
            FULL: {
                "rope_type": "proportional",
                "partial_rotary_factor": 0.5,
                "rope_theta": 1e4,
                "factor": 2.0,
            },
            SLIDING: {"rope_type": "default", "rope_theta": 500.0},
        },
    },
    dense31b={
        "hidden_size": 144,
        "num_hidden_layers": 7,
        "layer_types": ...,
        "num_kv_shared_layers": 0,
        "use_double_wide_mlp": False,
        "hidden_size_per_layer_input": 0,
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 1,
        "global_head_dim": 64,
        "rms_norm_eps": 1e-5,
        "final_logit_softcapping": None,
        "tie_word_embeddings": False,
    },
    resaved={
        "per_layer_config": {str(i): {"head_dim": 64, "num_key_value_heads": 1} for i in (1, 3, 5)},
        "global_head_dim": ...,
        "use_bidirectional_attention": "vision",
        "sliding_window": 6,
        "hidden_activation": "silu",
    },
)
family(
    "Gemma4UnifiedForCausalLM",
    "gemma4_unified_text",
    GEMMA4,
    dense12b={
        "num_hidden_layers": 6,
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 1,
        "final_logit_softcapping": 30.0,
        "use_bidirectional_attention": "vision",
    },
    shared={
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 58,
        "attention_bias": True,
        "hidden_activation": "silu",
        "tie_word_embeddings": False,
        "rope_parameters": {
            FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.5, "rope_theta": 1e4},
            SLIDING: {"rope_type": "default", "rope_theta": 500.0},
        },
        "num_hidden_layers": 5,
        "layer_types": [SLIDING, FULL, SLIDING, SLIDING, SLIDING],  # the last one is full all the same
        "num_kv_shared_layers": 2,
        "use_double_wide_mlp": True,
        "use_bidirectional_attention": None,
        "hidden_size": 100,
        "sliding_window": 17,
    },
    no_k_eq_v={
        "num_hidden_layers": 2,
        "layer_types": alternating(2),
        "num_global_key_value_heads": 1,
        "head_dim": 16,
        "global_head_dim": 32,
        "rms_norm_eps": 1e-5,
    },
)
PHI = {"hidden_act": "gelu_new", "layer_norm_eps": 1e-5}
family(
    "PhiForCausalLM",
    "phi",
    PHI,
    phi1={"num_key_value_heads": 4},
    phi2={
        "hidden_size": 80,
        "num_attention_heads": 2,
        "partial_rotary_factor": 0.4,
        "num_key_value_heads": None,
    },
    odd={
        "num_attention_heads": 8,
        "intermediate_size": 50,
        "num_key_value_heads": 1,
        "rope_theta": 500.0,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-3,
    },
    tied={
        "tie_word_embeddings": True,
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "num_hidden_layers": 2,
    },
)
PHI3 = {**RMS, "original_max_position_embeddings": 32}
LONG = {"short_factor": [1.0 + 0.05 * i for i in range(6)], "long_factor": [1.0 + 0.4 * i for i in range(6)]}
family(
    "Phi3ForCausalLM",
    "phi3",
    PHI3,
    mini4k={"sliding_window": 11, "original_max_position_embeddings": ...},
    mini4={
        "partial_rotary_factor": 0.75,
        "tie_word_embeddings": True,
        "rope_scaling": {"type": "longrope", **LONG},
        "tags": ("whole-prompt",),
    },
    su={
        "hidden_act": "gelu",
        "num_hidden_layers": 2,
        "hidden_size": 72,
        "num_attention_heads": 6,
        "intermediate_size": 50,
        "rope_scaling": {"type": "su", "original_max_position_embeddings": 64, **LONG},
        "original_max_position_embeddings": 64,
        "max_position_embeddings": 128,
    },
    yarn_means_longrope={
        "hidden_size": 48,
        "num_key_value_heads": 1,
        "rope_scaling": {"type": "yarn", **LONG},
        "rope_theta": 500.0,
        "rms_norm_eps": 1e-6,
        "tags": ("whole-prompt",),
    },
)
OPT = {"num_key_value_heads": ..., "intermediate_size": ..., "ffn_dim": 72, "activation_function": "relu"}
family(
    "OPTForCausalLM",
    "opt",
    OPT,
    m125={"word_embed_proj_dim": 64},
    m350={"do_layer_norm_before": False, "word_embed_proj_dim": 32},
    galactica={
        "enable_bias": False,
        "layer_norm_elementwise_affine": False,
        "activation_function": "gelu",
        "ffn_dim": 58,
    },
    old_finetune={
        "num_hidden_layers": 2,
        "_remove_final_layer_norm": True,
        "hidden_size": 60,
        "num_attention_heads": 3,
        "tie_word_embeddings": False,
    },
)
GPTJ = {
    "vocab_size": VOCAB_SIZE,
    "n_embd": 64,
    "n_head": 4,
    "n_layer": 3,
    "n_positions": 64,
    "rotary_dim": 8,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
family(
    "GPTJForCausalLM",
    "gptj",
    GPTJ,
    common={},
    small={"activation_function": "gelu_new"},
    whole_head={"rotary_dim": 16, "n_inner": 70, "layer_norm_epsilon": 1e-3},
    odd={
        "n_layer": 2,
        "n_embd": 60,
        "n_head": 3,
        "rotary_dim": 10,
        "activation_function": "gelu",
        "tie_word_embeddings": True,
    },
)
family(
    "Olmo2ForCausalLM",
    "olmo2",
    RMS,
    mha={"num_key_value_heads": 4, "rope_theta": 5e5},
    gqa={
        "hidden_act": "gelu",
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "num_key_value_heads": 1,
        "hidden_size": 96,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-6,
    },
    odd={
        "hidden_size": 80,
        "intermediate_size": 58,
        "attention_bias": True,
        "rope_scaling": {"type": "linear", "factor": 2.0},
    },
)
family(
    "Olmo3ForCausalLM",
    "olmo3",
    {**RMS, "sliding_window": 10},
    yarn_on_full_layers={"num_hidden_layers": 5, "rope_scaling": YARN},
    nested={
        "layer_types": alternating(3, FULL),
        "rope_parameters": {
            FULL: {**YARN, "rope_theta": 1e4},
            SLIDING: {"rope_type": "default", "rope_theta": 900.0},
        },
        "hidden_size": 80,
        "num_key_value_heads": 1,
        "attention_bias": True,
    },
    plain={
        "hidden_act": "gelu",
        "intermediate_size": 58,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "rope_theta": 5e5,
        "num_hidden_layers": 4,
        "sliding_window": 13,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-6,
    },
)
family(
    "GraniteForCausalLM",
    "granite",
    RMS,
    g3={
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.22,
        "attention_multiplier": 0.015625,
        "logits_scaling": 8.0,
        "tie_word_embeddings": True,
    },
    plain={
        "hidden_act": "gelu",
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "attention_multiplier": 0.25,
        "attention_bias": True,
        "mlp_bias": True,
    },
    odd={
        "hidden_size": 80,
        "intermediate_size": 58,
        "num_key_value_heads": 1,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.1,
        "logits_scaling": 16.0,
        "rope_theta": 5e5,
        "rms_norm_eps": 1e-6,
    },
)
family(
    "SmolLM3ForCausalLM",
    "smollm3",
    {**RMS, "num_hidden_layers": 5},
    default_nope={"rope_theta": 5e6},
    flags_and_windows={
        "no_rope_layers": [1, 0, 0, 1, 0],
        "use_sliding_window": True,
        "sliding_window": 9,
        "attention_bias": True,
        "num_key_value_heads": 1,
        "tie_word_embeddings": False,
    },
    interval={
        "hidden_act": "gelu",
        "num_attention_heads": 2,
        "no_rope_layer_interval": 2,
        "mlp_bias": True,
        "hidden_size": 80,
        "intermediate_size": 58,
        "rms_norm_eps": 1e-6,
        "num_hidden_layers": 3,
    },
    layer_types={
        "num_hidden_layers": 3,
        "use_sliding_window": True,
        "sliding_window": 12,
        "layer_types": alternating(3),
        "num_key_value_heads": 4,
    },
)
STABLE = {"hidden_act": "silu", "layer_norm_eps": 1e-5}
family(
    "StableLmForCausalLM",
    "stablelm",
    STABLE,
    s3b={"hidden_size": 160, "num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 2},
    s1_6b={"use_qkv_bias": True, "tie_word_embeddings": True, "layer_norm_eps": 1e-3},
    s12b={
        "hidden_size": 160,
        "num_attention_heads": 4,
        "use_parallel_residual": True,
        "qk_layernorm": True,
        "intermediate_size": 90,
        "num_hidden_layers": 2,
    },
    odd={
        "num_attention_heads": 3,
        "hidden_size": 96,
        "partial_rotary_factor": 0.5,
        "num_key_value_heads": 1,
        "qk_layernorm": True,
        "hidden_act": "gelu",
        "rope_theta": 500.0,
    },
)
ALPHA = {
    "type": "dynamic",
    "alpha": 1000.0,
    "factor": 1.0,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
family(
    "HunYuanDenseV1ForCausalLM",
    "hunyuan_v1_dense",
    RMS,
    alpha={"head_dim": 32, "rope_scaling": ALPHA, "tie_word_embeddings": True},
    plain={"head_dim": 20, "attention_bias": True, "num_key_value_heads": 1, "rms_norm_eps": 1e-6},
    mha={
        "hidden_act": "gelu",
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 58,
        "rope_theta": 500.0,
    },
)
family(
    "SeedOssForCausalLM",
    "seed_oss",
    RMS,
    default_bias={"head_dim": 32},
    out_bias={
        "hidden_act": "gelu",
        "hidden_size": 80,
        "num_hidden_layers": 2,
        "head_dim": 24,
        "attention_out_bias": True,
        "mlp_bias": True,
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e7,
    },
    no_bias={
        "attention_bias": False,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 58,
        "tie_word_embeddings": True,
    },
)
family(
    "Exaone4ForCausalLM",
    "exaone4",
    {**RMS, "num_hidden_layers": 5},
    hybrid={"sliding_window": 10, "sliding_window_pattern": 4},
    all_full={
        "sliding_window": None,
        "num_hidden_layers": 3,
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
        "layer_types": [FULL] * 3,
    },
    layer_types={
        "sliding_window": 7,
        "num_hidden_layers": 3,
        "layer_types": alternating(3),
        "head_dim": 20,
        "intermediate_size": 58,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-6,
    },
    pattern={
        "hidden_act": "gelu",
        "hidden_size": 80,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "sliding_window": 8,
        "sliding_window_pattern": 2,
    },
)
family(
    "Glm4ForCausalLM",
    "glm4",
    RMS,
    default={"head_dim": 32},
    no_bias={
        "hidden_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "attention_bias": False,
        "head_dim": 24,
        "num_key_value_heads": 1,
        "partial_rotary_factor": 0.25,
        "rms_norm_eps": 1e-6,
    },
    odd={
        "head_dim": 20,
        "intermediate_size": 58,
        "tie_word_embeddings": True,
        "rope_theta": 500.0,
        "hidden_act": "gelu",
    },
)
family(
    "Ernie4_5ForCausalLM",
    "ernie4_5",
    RMS,
    default={"head_dim": 32},
    biases={
        "hidden_act": "gelu",
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "use_bias": True,
        "head_dim": 24,
        "num_key_value_heads": 1,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-6,
    },
    odd={"head_dim": 20, "intermediate_size": 58, "rope_theta": 500.0, "hidden_size": 72},
)
family(
    "Cohere2ForCausalLM",
    "cohere2",
    {"hidden_act": "silu", "layer_norm_eps": 1e-5, "num_hidden_layers": 5, "sliding_window": 10},
    default={},
    pattern={
        "hidden_act": "gelu",
        "num_attention_heads": 2,
        "sliding_window_pattern": 2,
        "logit_scale": 0.25,
        "attention_bias": True,
        "num_key_value_heads": 1,
        "layer_norm_eps": 1e-3,
    },
    layer_types={
        "num_hidden_layers": 3,
        "layer_types": alternating(3, FULL),
        "hidden_size": 80,
        "intermediate_size": 58,
        "sliding_window": 15,
        "rope_theta": 500.0,
        "tie_word_embeddings": False,
        "logit_scale": 1.0,
    },
)


def _multimodal(name: str, outer: str, model_type: str, text: str, **changes: Any) -> None:
    inner = {k: v for k, v in CASES[text].config.items() if k not in ("architectures", "torch_dtype")}
    config = {
        "architectures": [outer],
        "model_type": model_type,
        "text_config": inner,
        "torch_dtype": "bfloat16",
        **changes,
    }
    CASES[name] = Case(config, max_model_len=48, tags=("multimodal",))


_multimodal("gemma3-tower", "Gemma3ForConditionalGeneration", "gemma3", "gemma3_text-pattern2")
_multimodal("gemma4-tower", "Gemma4ForConditionalGeneration", "gemma4", "gemma4_text-e2b")
_multimodal(
    "gemma4-unified-tower",
    "Gemma4UnifiedForConditionalGeneration",
    "gemma4_unified",
    "gemma4_unified_text-dense12b",
)
_multimodal(
    "mistral3-tower",
    "Mistral3ForConditionalGeneration",
    "mistral3",
    "mistral-small",
    tie_word_embeddings=True,
)
_multimodal(
    "ministral3-tower",
    "Mistral3ForConditionalGeneration",
    "mistral3",
    "ministral3-three",
    tie_word_embeddings=True,
)
