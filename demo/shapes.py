"""The shape of the embedded target, as the ``config.json`` that ships with it."""

from __future__ import annotations

from train_tokenizer import BOS, END, MAX_MODEL_LEN, PAD, VOCAB_SIZE

# With the draft (three of its layers, made by `pace train pard`) at most 12 MB in bf16; the wheel's limit is 15 MB. Every
# width is a multiple of 32, so that the models take the engine's fast paths without padding.
_SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 8,
    "num_hidden_layers": 5,
    "num_key_value_heads": 4,
}


def model_config() -> dict[str, object]:
    """``config.json``, in the keys that transformers 4 and 5 both read."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": BOS,
        "eos_token_id": [BOS, END],
        "head_dim": 32,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": MAX_MODEL_LEN,
        "mlp_bias": False,
        "model_type": "llama",
        "pad_token_id": PAD,
        "rms_norm_eps": 1e-5,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": VOCAB_SIZE,
    } | _SHAPE


def generation_config() -> dict[str, object]:
    """``generation_config.json``: mild sampling, because a model this small repeats itself when greedy."""
    return {
        "bos_token_id": BOS,
        "do_sample": True,
        # A model of this size repeats itself without it, greedily above all ("fibrary fibrary fibrary").
        "repetition_penalty": 1.2,
        "eos_token_id": [BOS, END],
        "pad_token_id": PAD,
        "temperature": 0.7,
        "top_p": 0.95,
    }
