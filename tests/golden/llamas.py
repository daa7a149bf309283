"""Tiny checkpoints of Llama, Mistral, Qwen and Gemma."""

from __future__ import annotations

from golden.kit import FULL, LLAMA3, RMS, SLIDING, VOCAB_SIZE, alternating, family, multimodal

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
multimodal("gemma3-tower", "Gemma3ForConditionalGeneration", "gemma3", "gemma3_text-pattern2")
multimodal("gemma4-tower", "Gemma4ForConditionalGeneration", "gemma4", "gemma4_text-e2b")
multimodal(
    "gemma4-unified-tower",
    "Gemma4UnifiedForConditionalGeneration",
    "gemma4_unified",
    "gemma4_unified_text-dense12b",
)
multimodal(
    "mistral3-tower",
    "Mistral3ForConditionalGeneration",
    "mistral3",
    "mistral-small",
    tie_word_embeddings=True,
)
multimodal(
    "ministral3-tower",
    "Mistral3ForConditionalGeneration",
    "mistral3",
    "ministral3-three",
    tie_word_embeddings=True,
)
