"""How cases of families are written: what their configs share, and the list of all."""

from __future__ import annotations

from typing import Any

from golden.tiny import GOLDEN_FILE as TINY_FILE
from golden.tiny import Case

VOCAB_SIZE = 211
GOLDEN_FILE = TINY_FILE.with_name("families.npz")
ERRORS_FILE = TINY_FILE.with_name("errors.json")
"""What make.py measured: see tests/models/catalogue.py."""
FULL, SLIDING = "full_attention", "sliding_attention"

COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "torch_dtype": "bfloat16",
}
RMS: dict[str, Any] = {"hidden_act": "silu", "rms_norm_eps": 1e-5}

CASES: dict[str, Case] = {}


def family(
    architecture: str,
    model_type: str,
    base: dict[str, Any],
    *,
    common: dict[str, Any] | None = None,
    **cases: Any,
) -> None:
    """Add the cases of one architecture: keyword = changes to `base`; `...` removes a key."""
    for name, changes in cases.items():
        tags = changes.pop("tags", ())
        gain, shift = changes.pop("gain", 1.0), changes.pop("shift", 0.0)
        config = {
            "architectures": [architecture],
            "model_type": model_type,
            **(COMMON if common is None else common),
            **base,
            **changes,
        }
        config = {key: value for key, value in config.items() if value is not ...}
        CASES[f"{model_type}-{name.replace('_', '-')}"] = Case(
            config, max_model_len=48, tags=tags, gain=gain, shift=shift
        )


def alternating(n: int, first: str = SLIDING) -> list[str]:
    """Layer kinds that take turns."""
    other = FULL if first == SLIDING else SLIDING
    return [first if i % 2 == 0 else other for i in range(n)]


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


def multimodal(name: str, outer: str, model_type: str, text: str, **changes: Any) -> None:
    """Add the case of a multimodal architecture around that of a text model."""
    inner = {k: v for k, v in CASES[text].config.items() if k not in ("architectures", "torch_dtype")}
    config = {
        "architectures": [outer],
        "model_type": model_type,
        "text_config": inner,
        "torch_dtype": "bfloat16",
        **changes,
    }
    CASES[name] = Case(config, max_model_len=48, tags=("multimodal",))
