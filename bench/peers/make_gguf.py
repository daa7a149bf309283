"""Write a Llama, Gemma 3, Qwen3-MoE or gpt-oss checkpoint as a GGUF file without a vocabulary, for llama.cpp's benchmarks.

    pip install gguf
    python bench/peers/make_gguf.py DIRECTORY DIRECTORY/model-bf16.gguf

llama.cpp's own converter is the better choice where it accepts the checkpoint; it refuses tokenizers that it has no
name for, such as that of bench/random_checkpoint.py. Only single-file checkpoints in bf16, and gpt-oss with its experts in
MXFP4, which stay so. Tensors are written one at a time: gpt-oss-20b needs half a gigabyte of memory.
"""

from __future__ import annotations

import argparse
import json
import math
import struct
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np

Array = np.ndarray[Any, Any]

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
HEAD_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
GEMMA3_NAMES = (
    NAMES
    | HEAD_NORMS
    | {
        "post_attention_layernorm": "post_attention_norm",
        "pre_feedforward_layernorm": "ffn_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
    }
)
QWEN3_MOE_NAMES = (
    NAMES
    | HEAD_NORMS
    | {
        "mlp.gate": "ffn_gate_inp",
        "mlp.experts.gate_proj": "ffn_gate_exps",
        "mlp.experts.up_proj": "ffn_up_exps",
        "mlp.experts.down_proj": "ffn_down_exps",
    }
)
GPT_OSS_NAMES = NAMES | {
    "post_attention_layernorm": "post_attention_norm",
    "self_attn.sinks": "attn_sinks",
    "mlp.router": "ffn_gate_inp",
    "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
}
ARCHITECTURES = {
    "LlamaForCausalLM": ("llama", NAMES),
    "Gemma3ForCausalLM": ("gemma3", GEMMA3_NAMES),
    "Qwen3MoeForCausalLM": ("qwen3moe", QWEN3_MOE_NAMES),
    "GptOssForCausalLM": ("gpt-oss", GPT_OSS_NAMES),
}


@dataclass(frozen=True)
class Tensor:
    """One tensor of the file: its values are made when they are written.

    Args:
        name: as llama.cpp calls it.
        shape: of what `make` returns: f32, or the bytes of `type`.
        type: None: f32.
    """

    name: str
    shape: tuple[int, ...]
    type: gguf.GGMLQuantizationType | None
    make: Callable[[], Array]


def name_of(name: str, names: dict[str, str]) -> str:
    """model.layers.3.mlp.up_proj.weight -> blk.3.ffn_up.weight."""
    stem, _, kind = name.rpartition(".") if name.endswith((".weight", ".bias")) else (name, "", "weight")
    if not stem.startswith("model.layers."):
        return f"{names[stem]}.{kind}"
    layer, _, rest = stem.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{names[rest]}.{kind}"


def interleaved(rows: Array, n_heads: int) -> Array:
    """Rows of q or k in the order of llama.cpp's rotation, which pairs neighbours instead of halves."""
    n, k = rows.shape
    return rows.reshape(n_heads, 2, n // n_heads // 2, k).swapaxes(1, 2).reshape(n, k)


def rope_factors(config: dict[str, Any], head_dim: int) -> Array | None:
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


def widened(values: Array) -> Array:
    """bf16 as f32."""
    return (values.astype(np.uint32) << 16).view(np.float32)


def in_f32(name: str, values: Array, plus: float = 0.0) -> Tensor:
    """What llama.cpp wants in f32: norms, biases, sinks and routers."""
    return Tensor(name, values.shape, None, lambda: widened(values) + np.float32(plus))


def in_bf16(name: str, shape: tuple[int, ...], make: Callable[[], Array]) -> Tensor:
    """A matrix, or one of each expert."""
    as_bytes = (*shape[:-1], 2 * shape[-1])
    return Tensor(
        name,
        as_bytes,
        gguf.GGMLQuantizationType.BF16,
        lambda: np.ascontiguousarray(make()).view(np.uint8).reshape(as_bytes),
    )


def in_mxfp4(name: str, blocks: Array, scales: Array) -> Tensor:
    """Blocks [experts, n, k / 32, 16], whose bytes hold neighbours, in llama.cpp's order: scale, then k and k + 16."""
    n_experts, n, groups = scales.shape

    def make() -> Array:
        made = np.empty((n_experts, n, groups, 17), np.uint8)
        for e in range(n_experts):
            codes = np.empty((n, groups, 32), np.uint8)
            codes[..., 0::2], codes[..., 1::2] = blocks[e] & 15, blocks[e] >> 4
            made[e, ..., 0] = scales[e]
            made[e, ..., 1:] = codes[..., :16] | codes[..., 16:] << 4
        return made.reshape(n_experts, n, groups * 17)

    return Tensor(name, (n_experts, n, groups * 17), gguf.GGMLQuantizationType.MXFP4, make)


def dense(
    source: dict[str, Array], architecture: str, names: dict[str, str], heads: tuple[int, int]
) -> Iterator[Tensor]:
    """Everything but experts; heads: of queries, and of keys."""
    for name, values in source.items():
        if ".experts." in name:
            continue
        if values.dtype != np.uint16:
            sys.exit(f"{name} is {values.dtype}, expected BF16")
        new = name_of(name, names)
        if values.ndim == 1 or "ffn_gate_inp" in new:
            yield in_f32(new, values, 1.0 if architecture == "gemma3" else 0.0)
        elif architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            n_heads = heads[0] if "q_proj" in name else heads[1]
            yield in_bf16(new, values.shape, partial(interleaved, values, n_heads))
        else:
            yield in_bf16(new, values.shape, partial(np.asarray, values))


def experts_of_qwen(source: dict[str, Array], names: dict[str, str], n_experts: int) -> Iterator[Tensor]:
    """A matrix of each expert, joined."""
    for name, values in source.items():
        if ".experts.0." not in name:
            continue
        before, _, after = name.partition(".experts.0.")
        all_of_them = [source[f"{before}.experts.{e}.{after}"] for e in range(n_experts)]
        new = name_of(f"{before}.experts.{after}", names)
        yield in_bf16(new, (n_experts, *values.shape), partial(np.stack, all_of_them))


def experts_of_gpt_oss(source: dict[str, Array], names: dict[str, str]) -> Iterator[Tensor]:
    """Gate and up alternate row by row there and are apart here."""
    for name, values in source.items():
        if name.endswith("_blocks"):
            stem, scales = name.removesuffix("_blocks"), source[name.removesuffix("_blocks") + "_scales"]
            if stem.endswith("gate_up_proj"):
                for i, part in enumerate(("gate_proj", "up_proj")):
                    new = name_of(stem.replace("gate_up_proj", part) + ".weight", names)
                    yield in_mxfp4(new, values[:, i::2], scales[:, i::2])
            else:
                yield in_mxfp4(name_of(f"{stem}.weight", names), values, scales)
        elif name.endswith("gate_up_proj_bias"):
            for i, part in enumerate(("gate_proj", "up_proj")):
                yield in_f32(
                    name_of(name.replace("gate_up_proj_bias", f"{part}.bias"), names), values[:, i::2]
                )
        elif name.endswith("down_proj_bias"):
            yield in_f32(name_of(name.replace("proj_bias", "proj.bias"), names), values)


def describe(writer: gguf.GGUFWriter, config: dict[str, Any], architecture: str, head_dim: int) -> None:
    """What a model is, as llama.cpp's keys."""
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    scaling = config.get("rope_scaling") or {}
    if architecture in ("gemma3", "gpt-oss"):  # which layers are full, and their bases, llama.cpp knows
        writer.add_sliding_window(config["sliding_window"])
    if architecture == "gemma3" and scaling:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(scaling["factor"])
    if architecture == "gpt-oss":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(scaling["factor"])
        writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])
    if architecture in ("qwen3moe", "gpt-oss"):
        writer.add_expert_count(config.get("num_experts") or config["num_local_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(
            config.get("moe_intermediate_size") or config["intermediate_size"]
        )


def read(path: Path) -> dict[str, Array]:
    """Every tensor of a safetensors file as a view of it; bf16 as uint16."""
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    data = np.memmap(path, np.uint8, "r", offset=8 + size)
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] not in ("BF16", "U8"):
            sys.exit(f"{name} is {entry['dtype']}, expected BF16, or U8 of MXFP4")
        begin, end = entry["data_offsets"]
        values = np.asarray(data[begin:end])
        tensors[name] = (values.view(np.uint16) if entry["dtype"] == "BF16" else values).reshape(
            entry["shape"]
        )
    return tensors


def write(directory: Path, path: Path) -> None:
    """Read config.json and model.safetensors, write the GGUF file."""
    config = json.loads((directory / "config.json").read_text())
    if config["architectures"][0] not in ARCHITECTURES:
        sys.exit(f"architectures is {config['architectures']}, expected one of {', '.join(ARCHITECTURES)}")
    architecture, names = ARCHITECTURES[config["architectures"][0]]
    heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim", config["hidden_size"] // heads[0])
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    describe(writer, config, architecture, head_dim)
    source = read(directory / "model.safetensors")
    tensors = list(dense(source, architecture, names, heads))
    if architecture == "qwen3moe":
        tensors += experts_of_qwen(source, names, config["num_experts"])
    if architecture == "gpt-oss":
        tensors += experts_of_gpt_oss(source, names)
    factors = rope_factors(config, head_dim) if architecture == "llama" else None
    if factors is not None:
        tensors.append(Tensor("rope_freqs.weight", factors.shape, None, lambda: factors))
    for tensor in tensors:
        dtype = np.dtype(np.float32 if tensor.type is None else np.uint8)
        n_bytes = math.prod(tensor.shape) * dtype.itemsize
        writer.add_tensor_info(tensor.name, tensor.shape, dtype, n_bytes, tensor.type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        writer.write_tensor_data(tensor.make())
    writer.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    write(arguments.directory, arguments.output)
