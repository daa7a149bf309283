"""Write a checkpoint with random weights in the exact shapes of a known model, for benchmarks.

    python bench/random_checkpoint.py llama-3.2-1b DIRECTORY
    python bench/random_checkpoint.py qwen3-30b-a3b DIRECTORY --layers 6        # 8.5 GB instead of 61

The tokenizer is the embedded model's: token ids mean nothing here. Matrices are N(0, 0.02) in bf16, norms multiply by
one, biases are zero; experts in MXFP4 have random codes and a scale that gives them the same size. 2.5 GB for
llama-3.2-1b, written in about half a minute, tensor by tensor.
"""

from __future__ import annotations

import argparse
import json
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pace.models.decoder import lower
from pace.models.registry import parse_config
from pace.models.weights import TensorShape, tensor_shapes

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
    "gemma-3-4b": COMMON
    | {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "vocab_size": 262208,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 256,
        "sliding_window": 1024,
        "sliding_window_pattern": 6,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    "phi-4-mini": COMMON
    | {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 32,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "vocab_size": 200064,
        "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096,
        "partial_rotary_factor": 0.75,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0] * 48,
            "long_factor": [1.0 + i / 4 for i in range(48)],
        },
        "sliding_window": 262144,
        "attention_bias": False,
        "tie_word_embeddings": True,
    },
    "gemma-4-e2b": COMMON
    | {
        "architectures": ["Gemma4ForCausalLM"],
        "model_type": "gemma4_text",
        "hidden_size": 1536,
        "intermediate_size": 6144,
        "num_hidden_layers": 35,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "global_head_dim": 512,
        "vocab_size": 262144,
        "vocab_size_per_layer_input": 262144,
        "hidden_size_per_layer_input": 256,
        "num_kv_shared_layers": 20,
        "use_double_wide_mlp": True,
        "layer_types": (["sliding_attention"] * 4 + ["full_attention"]) * 7,
        "sliding_window": 512,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "hidden_activation": "gelu_pytorch_tanh",
        "final_logit_softcapping": 30.0,
        "attention_k_eq_v": False,
        "tie_word_embeddings": True,
        "rope_parameters": {
            "full_attention": {
                "rope_type": "proportional",
                "rope_theta": 1000000.0,
                "partial_rotary_factor": 0.25,
            },
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    },
    "gpt-oss-20b": COMMON
    | {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": 24,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "vocab_size": 201088,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 150000.0,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
        "sliding_window": 128,
        "tie_word_embeddings": False,
        "quantization_config": {"quant_method": "mxfp4"},
    },
    "qwen3-30b-a3b": COMMON
    | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
    },
}


def shapes(config: dict[str, Any]) -> dict[str, TensorShape]:
    """Every tensor of a checkpoint and its shape, as its architecture reads them."""
    spec, weight_map = parse_config(config)
    return tensor_shapes(lower(spec, 1), weight_map, len(spec.layers))


PIECE = 1 << 24  # values that are drawn at a time: Gemma 4's table has 2.3 G


def values(tensor: TensorShape, rng: np.random.Generator, vector: float) -> Iterator[bytes]:
    """The tensor's bytes, in pieces."""
    shape = tensor.shape
    if tensor.dtype == "u8":
        n = int(np.prod(shape))
        for at in range(0, n, PIECE):
            size = min(PIECE, n - at)
            # Codes (blocks are the ones with 16 bytes) have a mean square of 9.6, and 0.02^2 is 9.6 * 2^(2 * -7.3).
            yield rng.bytes(size) if shape[-1] == 16 and len(shape) == 4 else bytes([120]) * size
        return
    if len(shape) == 1:
        yield np.full(shape, int(np.float32(vector).view(np.uint32)) >> 16, np.uint16).tobytes()
        return
    n = int(np.prod(shape))
    for at in range(0, n, PIECE):
        x = rng.standard_normal(min(PIECE, n - at), np.float32)
        x *= 0.02
        yield ((x.view(np.uint32) + 0x8000) >> 16).astype(np.uint16).tobytes()


def write(model: str, directory: Path, seed: int = 0, layers: int | None = None) -> None:
    """Write config.json, model.safetensors and the embedded tokenizer into `directory`."""
    config = SHAPES[model]
    if layers:
        config = config | {"num_hidden_layers": layers}
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    demo = Path(__file__).parents[1] / "src" / "pace" / "demo" / "target"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(demo / name, directory / name)
    header: dict[str, Any] = {}
    at = 0
    tensors = shapes(config)
    for name, tensor in tensors.items():
        size = int(np.prod(tensor.shape)) * (1 if tensor.dtype == "u8" else 2)
        header[name] = {"dtype": tensor.dtype.upper(), "shape": tensor.shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    rng = np.random.default_rng(seed)
    spec, _ = parse_config(config)
    one = 0.0 if spec.norm.kind == "rms1" else 1.0
    with (directory / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, tensor in tensors.items():
            file.writelines(values(tensor, rng, 0.0 if name.endswith(("bias", "sinks")) else one))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", choices=sorted(SHAPES))
    parser.add_argument("directory", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", type=int, help="so many of the model's layers instead of all")
    args = parser.parse_args()
    write(args.model, args.directory, args.seed, args.layers)
