"""Write a checkpoint with random weights in the exact shapes of a known model, for benchmarks.

    python bench/random_checkpoint.py llama-3.2-1b DIRECTORY

The tokenizer is the embedded model's: token ids mean nothing here. Weights are N(0, 0.02) in bf16, norms are one;
2.5 GB for llama-3.2-1b, written in about half a minute, tensor by tensor.
"""

from __future__ import annotations

import argparse
import json
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
COMMON: dict[str, Any] = {
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": COMMON
    | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": LLAMA3_ROPE,
        "tie_word_embeddings": True,
    },
    "qwen2.5-0.5b": COMMON
    | {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "sliding_window": 32768,
        "max_window_layers": 21,
    },
}


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of a Llama-like checkpoint and its shape, in file order."""
    dim, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    n_heads, n_kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim", dim // n_heads)
    out: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, dim)}
    for i in range(config["num_hidden_layers"]):
        p = f"model.layers.{i}."
        for name, n in (("q", n_heads), ("k", n_kv_heads), ("v", n_kv_heads)):
            out[f"{p}self_attn.{name}_proj.weight"] = (n * head_dim, dim)
            if config["model_type"] == "qwen2":
                out[f"{p}self_attn.{name}_proj.bias"] = (n * head_dim,)
        out[p + "self_attn.o_proj.weight"] = (dim, n_heads * head_dim)
        out[p + "mlp.gate_proj.weight"] = out[p + "mlp.up_proj.weight"] = (inner, dim)
        out[p + "mlp.down_proj.weight"] = (dim, inner)
        out[p + "input_layernorm.weight"] = out[p + "post_attention_layernorm.weight"] = (dim,)
    out["model.norm.weight"] = (dim,)
    if not config["tie_word_embeddings"]:
        out["lm_head.weight"] = (vocab, dim)
    return out


def values(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> bytes:
    """The tensor's bytes in bf16."""
    if "norm" in name:
        return np.full(shape, 0x3F80, np.uint16).tobytes()
    x = rng.standard_normal(shape, np.float32)
    x *= 0.02
    return ((x.view(np.uint32) + 0x8000) >> 16).astype(np.uint16).tobytes()


def write(model: str, directory: Path, seed: int = 0) -> None:
    """Write config.json, model.safetensors and the embedded tokenizer into `directory`."""
    config = SHAPES[model]
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    demo = Path(__file__).parents[1] / "src" / "pace" / "demo" / "target"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(demo / name, directory / name)
    header: dict[str, Any] = {}
    at = 0
    for name, shape in shapes(config).items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    rng = np.random.default_rng(seed)
    with (directory / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in shapes(config).items():
            file.write(values(name, shape, rng))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", choices=sorted(SHAPES))
    parser.add_argument("directory", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write(args.model, args.directory, args.seed)
