"""GGUF files made of Hugging Face folders with the `gguf` package, as llama.cpp's converter makes them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from pace.checkpoint import Checkpoint

gguf = pytest.importorskip("gguf", reason="the GGUF files of these tests are made with it")

Array = npt.NDArray[Any]

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3moe",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3",
    "Phi3ForCausalLM": "phi3",
    "GptOssForCausalLM": "gpt-oss",
}
NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.sinks": "attn_sinks",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.router": "ffn_gate_inp",
}
GEMMA = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}

Encode = Callable[[str, Array], tuple[Array, Any]]
"""How a matrix f32 [..., n, k] of some name is stored: the bytes or values, and their type, None where numpy's says it."""


def plain(dtype: str) -> Encode:
    """Every matrix in one of F32, F16, BF16."""
    kind = gguf.GGMLQuantizationType[dtype]
    return lambda name, values: (gguf.quants.quantize(values, kind), kind)


def write(
    folder: Path,
    path: Path,
    encode: Encode | None = None,
    vocabulary: Callable[[Any], None] | None = None,
    **metadata: Any,
) -> Path:
    """Convert a folder with config.json and model.safetensors.

    Args:
        encode: of matrices; vectors are F32. None: BF16.
        vocabulary: adds a tokenizer.
        metadata: further keys.
    """
    config = json.loads((folder / "config.json").read_text())
    architecture = ARCHITECTURES[config["architectures"][0]]
    writer = gguf.GGUFWriter(path, architecture)
    _write_config(writer, config, architecture)
    if vocabulary is not None:
        vocabulary(writer)
    for key, value in metadata.items():
        _add(writer, key, value)
    for name, values, codes in _tensors(folder, config, architecture):
        if codes is not None:
            writer.add_tensor(name, codes, raw_dtype=gguf.GGMLQuantizationType.MXFP4)
        elif values.ndim == 1 or name.endswith(".bias"):
            writer.add_tensor(name, values)
        else:
            data, kind = (encode or plain("BF16"))(name, values)
            writer.add_tensor(name, data, raw_dtype=kind)
    finish(writer)
    return path


NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


def write_vocabulary(
    writer: Any,
    tokenizer: dict[str, Any],
    config: dict[str, Any],
    pre: str,
    n_rows: int = 0,
    scores: Any = None,
) -> None:
    """The tokenizer of a tokenizer.json and a tokenizer_config.json, padded to `n_rows` as converters do.

    Args:
        pre: the name of its pattern; "default" of a SentencePiece model.
        scores: of one, token -> number.
    """
    model = tokenizer["model"]
    added = {token["id"]: token for token in tokenizer["added_tokens"]}
    by_id = {i: token for token, i in model["vocab"].items()} | {
        i: token["content"] for i, token in added.items()
    }
    tokens, types = [], []
    for i in range(max(n_rows, max(by_id) + 1)):
        tokens.append(by_id.get(i, f"[PAD{i}]"))
        kind = UNUSED if i not in by_id else NORMAL
        if i in added:
            kind = CONTROL if added[i]["special"] else USER_DEFINED
        if scores is not None and tokens[i] == model["unk_token"]:
            kind = UNKNOWN
        if scores is not None and len(tokens[i]) == 6 and tokens[i].startswith("<0x"):
            kind = BYTE
        types.append(kind)
    writer.add_tokenizer_model("gpt2" if scores is None else "llama")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if scores is None:
        writer.add_token_merges([" ".join(merge) for merge in model["merges"]])
    else:
        writer.add_token_scores([float(scores.get(token, -1000.0)) for token in tokens])
    ids = {token: i for i, token in by_id.items()}
    for name in ("bos", "eos", "unk", "pad"):
        token = config.get(f"{name}_token")
        token = token["content"] if isinstance(token, dict) else token
        if token is not None:
            getattr(writer, f"add_{name}_token_id")(ids[token])
    template = tokenizer.get("post_processor") or {}
    writer.add_add_bos_token(template.get("type") == "TemplateProcessing")
    if config.get("chat_template"):
        writer.add_chat_template(config["chat_template"])


def finish(writer: Any) -> None:
    """Write everything that was added."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add(writer: Any, key: str, value: Any) -> None:
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    kinds.get(type(value), writer.add_array)(key, value)


def _write_config(writer: Any, config: dict[str, Any], architecture: str) -> None:
    heads, dim = config["num_attention_heads"], config["hidden_size"]
    head_dim = config.get("head_dim") or {"qwen3": 128, "gemma2": 256, "gemma3": 256, "gpt-oss": 64}.get(
        architecture, dim // heads
    )
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(dim)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.get("rms_norm_eps", 1e-6))
    turning = config.get("partial_rotary_factor", 1.0)
    writer.add_rope_dimension_count(int(head_dim * turning))
    ropes = config.get("rope_parameters") or {}
    scaling = config.get("rope_scaling") or ropes.get("full_attention") or {}
    theta = config.get("rope_theta", scaling.get("rope_theta", 1e6 if architecture == "gemma3" else None))
    if theta is None and architecture == "gpt-oss":
        theta = 150000.0
    if theta is not None:
        writer.add_rope_freq_base(theta)
    kind = scaling.get("rope_type", scaling.get("type"))
    if kind in ("linear", "yarn") and architecture != "phi3":
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(scaling["factor"])
    if kind == "yarn" and architecture != "phi3":
        writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(scaling["beta_fast"])
        writer.add_rope_scaling_yarn_beta_slow(scaling["beta_slow"])
    if kind == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_factors(scaling, theta or 10000.0, head_dim))
    if scaling.get("long_factor"):
        writer.add_rope_scaling_orig_ctx_len(config["original_max_position_embeddings"])
        for which in ("long", "short"):
            factors = np.array(scaling[f"{which}_factor"], np.float32)
            writer.add_tensor(f"rope_factors_{which}.weight", factors)
    if architecture == "phi3" or (
        config.get("sliding_window") and architecture in ("gemma2", "gemma3", "gpt-oss")
    ):
        writer.add_sliding_window(config.get("sliding_window") or 0)
    local = config.get("rope_local_base_freq", ropes.get("sliding_attention", {}).get("rope_theta"))
    if local:
        writer.add_rope_freq_base_swa(local)
    if architecture in ("gemma2", "gemma3"):
        pattern = config.get("sliding_window_pattern") or [
            t == "sliding_attention" for t in config.get("layer_types", [])
        ]
        if pattern:
            writer.add_sliding_window_pattern(pattern)
        for key in ("attn_logit_softcapping", "final_logit_softcapping"):
            if config.get(key) and (architecture == "gemma2" or key.startswith("final")):
                getattr(writer, f"add_{key}")(config[key])
        if "query_pre_attn_scalar" in config:
            writer.add_attention_scale(config["query_pre_attn_scalar"] ** -0.5)
    if "num_experts_per_tok" in config:
        writer.add_expert_count(config.get("num_experts", config.get("num_local_experts")))
        writer.add_expert_used_count(config["num_experts_per_tok"])
        width = config.get("moe_intermediate_size", config["intermediate_size"])
        writer.add_expert_feed_forward_length(width)


def llama3_factors(scaling: dict[str, Any], theta: float, head_dim: int) -> Array:
    """What llama3 scaling divides the frequencies by, f32 [head_dim / 2]."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = (
        scaling["original_max_position_embeddings"]
        / (2 * np.pi)
        / theta ** (np.arange(0, head_dim, 2) / head_dim)
    )
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    factors: npt.NDArray[Any] = (1 / ((1 - smooth) / scaling["factor"] + smooth)).astype(np.float32)
    return factors


def _tensors(folder: Path, config: dict[str, Any], architecture: str) -> Any:
    """(name, values f32, MXFP4 blocks or None) of the GGUF file."""
    names = {**NAMES, **(GEMMA if architecture.startswith("gemma") else {})}
    if architecture == "gpt-oss":
        names["post_attention_layernorm"] = "post_attention_norm"
    experts: dict[str, list[Array]] = {}
    checkpoint = Checkpoint(folder)
    for name in checkpoint.names():
        values = as_f32(checkpoint.tensor(name), checkpoint.info(name).dtype)
        if ".experts." in name:
            yield from _experts(name, values, checkpoint, experts, config)
            continue
        stem, _, kind = name.rpartition(".")
        if name.endswith("sinks"):
            stem, kind = name, "weight"
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            values = values + np.float32(1)
        if architecture == "llama" and (".q_proj" in name or ".k_proj" in name):
            n = config["num_attention_heads" if ".q_proj" in name else "num_key_value_heads"]
            values = values.reshape(n, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
        if stem in TOP:
            yield f"{TOP[stem]}.{kind}", values, None
        else:
            layer, _, module = stem.removeprefix("model.layers.").partition(".")
            yield f"blk.{layer}.{names[module]}.{kind}", values, None


def _experts(
    name: str, values: Array, checkpoint: Checkpoint, seen: dict[str, list[Array]], config: dict[str, Any]
) -> Any:
    layer, _, rest = name.removeprefix("model.layers.").partition(".mlp.experts.")
    if rest[0].isdigit():  # a tensor for each: all of them are one
        module = rest.split(".")[1]
        own = seen.setdefault(f"blk.{layer}.{NAMES[f'mlp.{module}']}_exps.weight", [])
        own.append(values)
        if len(own) == config.get("num_experts", config.get("num_local_experts")):
            yield f"blk.{layer}.{NAMES[f'mlp.{module}']}_exps.weight", np.stack(own), None
        return
    halves = (
        {"ffn_gate": slice(0, None, 2), "ffn_up": slice(1, None, 2)}
        if rest.startswith("gate_up")
        else {"ffn_down": slice(None)}
    )
    for module, rows in halves.items():
        if rest.endswith("_bias"):
            yield f"blk.{layer}.{module}_exps.bias", np.ascontiguousarray(values[:, rows]), None
        elif rest.endswith("_blocks"):
            scales = checkpoint.tensor(name.replace("_blocks", "_scales"))[:, rows]
            blocks = checkpoint.tensor(name)[:, rows]
            yield f"blk.{layer}.{module}_exps.weight", values, mxfp4(blocks, scales)
        elif not rest.endswith("_scales"):
            yield (
                f"blk.{layer}.{module}_exps.weight",
                np.ascontiguousarray(values.swapaxes(1, 2)[:, rows]),
                None,
            )


def mxfp4(blocks: Array, scales: Array) -> Array:
    """GGUF's blocks of 17 bytes [..., k / 32 * 17] from codes [..., k / 32, 16] whose low nibble is the even column."""
    columns = np.stack((blocks & 15, blocks >> 4), -1).reshape(*blocks.shape[:-1], 32)
    halves = columns[..., :16] | columns[..., 16:] << 4
    joined = np.concatenate((scales[..., None], halves), -1)
    return np.ascontiguousarray(joined.reshape(*joined.shape[:-2], -1))


def as_f32(values: Array, dtype: str) -> Array:
    """Exact."""
    return (values.astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else values.astype(np.float32)


SCALES = {
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2)),
    **dict.fromkeys(("Q4_0", "Q5_0", "Q8_0"), (0,)),
    "Q6_K": (208,),
}
"""Types of blocks, and where they have 16-bit numbers; every other byte may be anything."""


def random_rows(kind: str, n_rows: int, n_blocks: int, seed: int = 0, scale: float | None = None) -> Array:
    """Rows of any blocks, u8 [n_rows, bytes]; without a scale, with the largest and the smallest numbers among them."""
    rng = np.random.default_rng(seed)
    n_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1]
    blocks = rng.integers(0, 256, (n_rows * n_blocks, n_bytes), np.uint8)
    for at in SCALES[kind]:
        numbers = (rng.standard_normal(len(blocks)) * (scale or 1.0)).astype(np.float16)
        if scale is None:
            numbers[:4] = [0.0, -0.0, 65504.0, 6e-8]
        blocks[:, at : at + 2] = numbers.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(n_rows, -1)
