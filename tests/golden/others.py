"""Tiny checkpoints of the other dense families."""

from __future__ import annotations

from golden.kit import FULL, RMS, SLIDING, VOCAB_SIZE, YARN, alternating, family

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
