"""Write a Llama or Gemma 3 checkpoint as a BF16 GGUF file without a vocabulary, for llama.cpp's benchmarks.

    pip install gguf
    python bench/peers/make_gguf.py DIRECTORY DIRECTORY/model-bf16.gguf

llama.cpp's own converter is the better choice where it accepts the checkpoint; it refuses tokenizers that it has no
name for, such as that of bench/random_checkpoint.py. Only single-file bf16 checkpoints of LlamaForCausalLM and
Gemma3ForCausalLM.
"""

from __future__ import annotations

import argparse
import json
import math
import struct
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
GEMMA3_NAMES = NAMES | {
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
ARCHITECTURES = {"LlamaForCausalLM": ("llama", NAMES), "Gemma3ForCausalLM": ("gemma3", GEMMA3_NAMES)}


def name_of(name: str, names: dict[str, str]) -> str:
    """model.layers.3.mlp.up_proj.weight -> blk.3.ffn_up.weight."""
    stem = name.removesuffix(".weight")
    if not stem.startswith("model.layers."):
        return f"{names[stem]}.weight"
    layer, _, rest = stem.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{names[rest]}.weight"


def interleaved(rows: np.ndarray[Any, Any], n_heads: int) -> np.ndarray[Any, Any]:
    """Rows of q or k in the order of llama.cpp's rotation, which pairs neighbours instead of halves."""
    n, k = rows.shape
    return rows.reshape(n_heads, 2, n // n_heads // 2, k).swapaxes(1, 2).reshape(n, k)


def rope_factors(config: dict[str, Any], head_dim: int) -> np.ndarray[Any, Any] | None:
    """What llama3 scaling divides the frequencies by: f32 [head_dim / 2]."""
    scaling = config.get("rope_scaling")
    if scaling is None:
        return None
    if scaling.get("rope_type") != "llama3":
        sys.exit(f"rope_scaling is {scaling}, expected none or llama3")
    low, high, factor = scaling["low_freq_factor"], scaling["high_freq_factor"], scaling["factor"]
    length = scaling["original_max_position_embeddings"]
    factors = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * math.pi * config["rope_theta"] ** (i / head_dim)
        smooth = min(1.0, max(0.0, (length / wavelength - low) / (high - low)))
        factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


def write(directory: Path, path: Path) -> None:
    """Read config.json and model.safetensors, write the GGUF file."""
    config = json.loads((directory / "config.json").read_text())
    if config["architectures"][0] not in ARCHITECTURES:
        sys.exit(f"architectures is {config['architectures']}, expected one of {', '.join(ARCHITECTURES)}")
    architecture, names = ARCHITECTURES[config["architectures"][0]]
    is_gemma = architecture == "gemma3"
    n_heads, n_kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim", config["hidden_size"] // n_heads)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(n_heads)
    writer.add_head_count_kv(n_kv_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    if is_gemma:  # one layer in six is full; llama.cpp knows the pattern, and 10000 as the base of the others
        writer.add_sliding_window(config["sliding_window"])
        if config.get("rope_scaling"):
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(config["rope_scaling"]["factor"])
    else:
        factors = rope_factors(config, head_dim)
        if factors is not None:
            writer.add_tensor("rope_freqs.weight", factors)
    source = directory / "model.safetensors"
    with source.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    data = np.memmap(source, np.uint8, "r", offset=8 + size)
    for name, entry in header.items():
        if entry["dtype"] != "BF16":
            sys.exit(f"{name} is {entry['dtype']}, expected BF16")
        begin, end = entry["data_offsets"]
        values = np.asarray(data[begin:end]).view(np.uint16).reshape(entry["shape"])
        if not is_gemma and ("q_proj" in name or "k_proj" in name):
            values = interleaved(values, n_heads if "q_proj" in name else n_kv_heads)
        if values.ndim == 1:  # llama.cpp wants norms in f32
            vector = (values.astype(np.uint32) << 16).view(np.float32)
            writer.add_tensor(name_of(name, names), vector + np.float32(1.0) if is_gemma else vector)
        else:
            raw = np.ascontiguousarray(values).view(np.uint8)
            writer.add_tensor(name_of(name, names), raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    write(arguments.directory, arguments.output)
