"""Tiny checkpoints that are made from a seed with numpy alone, on every machine the same.

`make.py` runs them through transformers and stores the logits; tests rebuild the same checkpoints without
torch. Weights are bf16 values, scaled so that attention is far from uniform and no activation saturates. Names and
shapes of the tensors are those that the loader wants; transformers loads the same files and would miss a wrong one.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pace.models.decoder import lower
from pace.models.registry import parse_config
from pace.models.spec import DecoderSpec
from pace.models.weights import tensor_shapes

VOCAB_SIZE = 307  # prime: no tile, vector or panel divides it
N_TOKENS = 48
GOLDEN_ROWS = (0, 1, 17, 47)
"""Rows of the prompt whose logits are stored."""

GOLDEN_FILE = Path(__file__).with_name("logits.npz")

F32Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Case:
    """One checkpoint: its config.json and how it is run.

    Args:
        config: the whole config.json.
        max_model_len: of the engine; equals the prompt's length where transformers' tables depend on that.
        gain: of the projections of q, k and v: large ones make scores that saturate.
        shift: what every bias of a router is lowered by.
    """

    config: dict[str, Any]
    max_model_len: int = N_TOKENS
    tags: tuple[str, ...] = field(default=())
    gain: float = 1.0
    shift: float = 0.0


def _config(architecture: str, model_type: str, **changes: Any) -> dict[str, Any]:
    config: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": model_type,
        "hidden_size": 128,
        "intermediate_size": 208,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "vocab_size": VOCAB_SIZE,
        "torch_dtype": "bfloat16",
    }
    config.update(changes)
    return {key: value for key, value in config.items() if value is not ...}


def _llama(**changes: Any) -> dict[str, Any]:
    return _config("LlamaForCausalLM", "llama", **changes)


def _qwen2(**changes: Any) -> dict[str, Any]:
    return _config("Qwen2ForCausalLM", "qwen2", **changes)


def _qwen3(**changes: Any) -> dict[str, Any]:
    return _config("Qwen3ForCausalLM", "qwen3", **{"head_dim": 64, **changes})


def _mistral(**changes: Any) -> dict[str, Any]:
    return _config("MistralForCausalLM", "mistral", **{"sliding_window": None, **changes})


def _rope(**scaling: Any) -> dict[str, Any]:
    """The same small Llama with another rotary embedding, written as transformers 4 writes it."""
    return _llama(num_attention_heads=2, num_key_value_heads=1, rope_scaling=scaling)


_FACTORS = [1.0 + 0.05 * i for i in range(32)]
_LONG_FACTORS = [1.0 + 0.3 * i for i in range(32)]

CASES: dict[str, Case] = {
    # Head counts and widths.
    "llama-mha": Case(_llama()),
    "llama-gqa4-tied": Case(
        _llama(num_attention_heads=4, num_key_value_heads=1, head_dim=64, tie_word_embeddings=True)
    ),
    "llama-gqa8": Case(
        _llama(num_attention_heads=8, num_key_value_heads=1, head_dim=64, num_hidden_layers=3)
    ),
    "llama-head128": Case(
        _llama(hidden_size=256, num_attention_heads=2, num_key_value_heads=1, rope_theta=500000.0)
    ),
    "llama-head80-biases": Case(
        _llama(
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=80,
            attention_bias=True,
            mlp_bias=True,
            hidden_act="gelu",
        )
    ),
    "llama-head96-gelu-tanh": Case(
        _llama(num_attention_heads=2, head_dim=96, hidden_act="gelu_pytorch_tanh", attention_bias=True)
    ),
    "llama-one-layer-relu": Case(_llama(num_hidden_layers=1, hidden_act="relu", num_key_value_heads=1)),
    "llama-old-config": Case(_llama(num_key_value_heads=..., rope_theta=..., tie_word_embeddings=...)),
    # Rotary embeddings.
    "rope-linear": Case(_rope(type="linear", factor=2.5)),
    "rope-dynamic-short": Case(_rope(rope_type="dynamic", factor=2.0)),
    "rope-dynamic-long": Case(
        {**_rope(rope_type="dynamic", factor=2.0), "max_position_embeddings": 32}, tags=("whole-prompt",)
    ),
    "rope-llama3": Case(
        _rope(
            rope_type="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=32,
        )
    ),
    "rope-yarn": Case(_rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)),
    "rope-yarn-mscale": Case(
        _rope(
            rope_type="yarn",
            factor=8.0,
            original_max_position_embeddings=16,
            mscale=1.0,
            mscale_all_dim=0.7,
            beta_fast=16.0,
            beta_slow=2.0,
            truncate=False,
        )
    ),
    "rope-yarn-attention-factor": Case(
        _rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=16, attention_factor=0.8)
    ),
    "rope-longrope-short": Case(
        _rope(
            rope_type="longrope",
            factor=4.0,
            original_max_position_embeddings=64,
            short_factor=_FACTORS,
            long_factor=_LONG_FACTORS,
        )
    ),
    "rope-longrope-long": Case(
        _rope(
            rope_type="longrope",
            factor=2.0,
            original_max_position_embeddings=32,
            short_factor=_FACTORS,
            long_factor=_LONG_FACTORS,
        ),
        tags=("whole-prompt",),
    ),
    # The other families.
    "qwen2-tied": Case(_qwen2(num_key_value_heads=1, tie_word_embeddings=True, rope_theta=1000000.0)),
    "qwen2-window": Case(
        _qwen2(num_hidden_layers=3, use_sliding_window=True, sliding_window=16, max_window_layers=1)
    ),
    "qwen3": Case(_qwen3(num_attention_heads=4, num_key_value_heads=2, head_dim=128)),
    "qwen3-layer-types": Case(
        _qwen3(
            num_hidden_layers=3,
            attention_bias=True,
            use_sliding_window=True,
            sliding_window=20,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            rope_theta=...,
            rope_parameters={"rope_type": "default", "rope_theta": 50000.0},
        )
    ),
    "mistral-window": Case(_mistral(num_key_value_heads=1, sliding_window=32)),
    "mistral-head-dim": Case(_mistral(num_attention_heads=4, num_key_value_heads=1, head_dim=128)),
}


def seed_of(name: str) -> int:
    """A checksum of the name of a case or a tensor, so that some can be added without changing others."""
    return zlib.crc32(name.encode())


def rng_of(name: str) -> np.random.Generator:
    """A generator of its own for each name."""
    return np.random.Generator(np.random.PCG64(seed_of(name)))


def prompt(name: str, vocab_size: int = VOCAB_SIZE) -> list[int]:
    """The case's prompt: N_TOKENS token ids."""
    return [int(t) for t in rng_of(f"{name} prompt").integers(0, vocab_size, N_TOKENS)]


def to_bf16(values: F32Array) -> npt.NDArray[np.uint16]:
    """float32 to bf16 bits, ties to even."""
    bits = values.view(np.uint32)
    return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)


def tensors(name: str, case: Case | None = None) -> dict[str, npt.NDArray[Any]]:
    """Every tensor of a case's checkpoint as bf16 bits, by its transformers name; blocks and scales as bytes."""
    case = CASES[name] if case is None else case
    spec, weight_map = parse_config(case.config)
    plan = lower(spec, case.max_model_len)
    widths = {weight: shape.k for weight, shape in plan.weights.items()}
    shapes = tensor_shapes(plan, weight_map, len(spec.layers))
    prefix = "model." if "multimodal" not in case.tags else "model.language_model."
    if case.config["model_type"] == "llama4":
        prefix = "language_model.model."
    out: dict[str, npt.NDArray[Any]] = {}
    for tensor, (weight, shape, dtype) in shapes.items():
        rng = rng_of(f"{name}/{tensor}")
        key = tensor.replace("model.", prefix, 1) if tensor.startswith("model.") else tensor
        if prefix.startswith("language_model."):
            key = key.replace("lm_head.", "language_model.lm_head.")
        if dtype == "u8":
            # Codes have a mean square of 9.6; scales 127 + e of 2^e, here all unequal to their neighbours.
            middle = 127 - round(float(np.log2(9.6 * (widths[weight] or 1)) / 2))
            low, high = (0, 256) if len(shape) == 4 else (middle - 1, middle + 2)
            out[key] = rng.integers(low, high, shape, np.uint8)
            continue
        values = rng.standard_normal(shape)
        out[key] = to_bf16(_scaled(values, weight, spec, case, widths[weight]).astype(np.float32))
    return out


def _scaled(
    values: npt.NDArray[Any], weight: str, spec: DecoderSpec, case: Case, width: int | None
) -> npt.NDArray[Any]:
    """Standard normal values made those of a plan weight: the stream keeps a variance of about 1."""
    if weight.endswith((".bias", ".sinks", ".choice")):
        return 0.3 * values - (case.shift if weight.endswith(".router.bias") else 0.0)
    if spec.scale == 1.0 and weight.endswith(("q_norm", "k_norm")):
        # Nothing else scales these scores down: trained norms do, or attention would see one key and magnify roundings.
        scale: float = len(values) ** -0.25
        return (0.2 * values + 1.0) * scale
    if values.ndim == 1:
        return 0.2 * values + (0.0 if spec.norm.kind == "rms1" else 1.0)
    if weight == "positions":
        return 0.5 * values
    if weight == "embed":
        # A tied table is also the LM head, whose rows have unit length; otherwise the stream has variance 1.
        return values / np.sqrt(values.shape[1]) if spec.tied else values / spec.embed_scale
    if weight == "inputs.table":
        gain, terms = 1.0, spec.per_layer_dim or 1
    elif weight.endswith(".router"):
        gain, terms = 2.0, values.shape[1]  # choices that rounding does not turn
    else:
        gain = 1.3 * case.gain if weight.endswith(".qkv") else 1.0
        terms = values.shape[1] if values.ndim == 2 else width or 1
    scaled: npt.NDArray[Any] = gain * values / np.sqrt(terms)
    return scaled


_TYPES = ((np.uint16, "BF16"), (np.float16, "F16"), (np.float32, "F32"), (np.uint8, "U8"))


def write_safetensors(
    path: Path, arrays: dict[str, npt.NDArray[Any]], dtypes: dict[str, str] | None = None
) -> None:
    """Write arrays as one safetensors file; uint16 arrays are BF16 unless `dtypes` says otherwise."""
    names = {
        np.dtype(np.uint16): "BF16",
        np.dtype(np.float16): "F16",
        np.dtype(np.float32): "F32",
        np.dtype(np.uint8): "U8",
    }
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, array in arrays.items():
        dtype = (dtypes or {}).get(name) or names.get(array.dtype, array.dtype.name.upper())
        header[name] = {
            "dtype": dtype,
            "shape": list(array.shape),
            "data_offsets": [at, at + array.nbytes],
        }
        at += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in arrays.values():
            file.write(np.ascontiguousarray(array).tobytes())


def write(name: str, directory: Path, case: Case | None = None) -> Path:
    """Write a case as a checkpoint directory; returns it."""
    case = CASES[name] if case is None else case
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(case.config, indent=1))
    write_safetensors(directory / "model.safetensors", tensors(name, case))
    return directory
