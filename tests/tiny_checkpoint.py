"""A checkpoint of a few kilobytes with everything in it: config, weights, tokenizer, chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

SPECIAL = ("<|bos|>", "<|eos|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>")


def write_tokenizer(directory: Path) -> int:
    """A byte-level tokenizer without merges; returns its number of tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "chat_template": TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return tokenizer.get_vocab_size()


def write_checkpoint(directory: Path, **changes: Any) -> Path:
    """A Llama of two layers with random weights; `changes` go into config.json."""
    directory.mkdir(parents=True, exist_ok=True)
    n_tokens = write_tokenizer(directory)
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": -(-n_tokens // 16) * 16,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "eos_token_id": n_tokens - len(SPECIAL) + 1,
        "torch_dtype": "float32",
    } | changes
    (directory / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(7)
    dim, inner = config["hidden_size"], config["intermediate_size"]
    q_dim = config["num_attention_heads"] * config["head_dim"]
    kv_dim = config["num_key_value_heads"] * config["head_dim"]

    def matrix(n: int, k: int) -> Any:
        return (rng.standard_normal((n, k)) * 3 * k**-0.5).astype(np.float32)

    tensors = {
        "model.embed_tokens.weight": matrix(config["vocab_size"], dim),
        "model.norm.weight": np.ones(dim, np.float32),
    }
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        shapes = {"q": (q_dim, dim), "k": (kv_dim, dim), "v": (kv_dim, dim), "o": (dim, q_dim)}
        tensors |= {f"{layer}.self_attn.{name}_proj.weight": matrix(*shape) for name, shape in shapes.items()}
        shapes = {"gate": (inner, dim), "up": (inner, dim), "down": (dim, inner)}
        tensors |= {f"{layer}.mlp.{name}_proj.weight": matrix(*shape) for name, shape in shapes.items()}
        for norm in ("input", "post_attention"):
            tensors[f"{layer}.{norm}_layernorm.weight"] = np.ones(dim, np.float32)
    save_file(tensors, str(directory / "model.safetensors"))
    return directory
