"""Every value of a config is computed or refused: one that is altered changes the logits, or the model does not load.

Over the whole registry, key by key: those that a family's case has, and those of every other family. What may be
altered without effect is listed here with the reason.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden import families, tiny
from golden.harness import load, prefill

from pace.errors import PaceError
from pace.models.config import NEUTRAL, Config
from pace.models.registry import ARCHITECTURES

# Names, and what only training, sampling or files are about.
INERT = {
    "architectures", "torch_dtype", "bos_token_id", "eos_token_id", "pad_token_id", "vocab_size_per_layer_input",
}  # fmt: skip
# The length that a checkpoint supports; it sizes nothing that a short prompt sees.
LENGTHS = {"max_position_embeddings", "n_positions"}


USES_WINDOWS = ("qwen2", "qwen3", "smollm3", "qwen2_moe", "qwen3_moe")


def _has_dense_layer(config: dict[str, Any]) -> bool:
    """Whether intermediate_size is the width of anything."""
    sparse = config.get("decoder_sparse_step", 1) == 1 and not config.get("mlp_only_layers")
    if config["model_type"] in ("qwen2_moe", "qwen3_moe"):
        return not sparse
    return (
        config["model_type"] not in ("glm4_moe", "sarvam_moe") or config.get("first_k_dense_replace", 1) > 0
    )


def unused(config: dict[str, Any], key: str) -> bool:
    """Whether another key, or the file, makes this one say nothing; transformers ignores it as well."""
    nested = any(isinstance(v, dict) for v in (config.get("rope_parameters") or {}).values())
    says_nothing: dict[str, bool] = {
        "attn_logit_softcapping": config["model_type"] == "gemma3_text",  # its forward pass has none
        "attention_chunk_size": "layer_types" in config and "chunked_attention" not in config["layer_types"],
        # Of attn_temperature_tuning, which may be off.
        "attn_scale": config.get("attn_temperature_tuning") is False,
        "floor_scale": config.get("attn_temperature_tuning") is False,
        "swiglu_limit": config.get("swiglu_limit", 7.0) > 5,  # nothing here is as large
        "intermediate_size_mlp": config.get("interleave_moe_layer_step", 1) == 1
        and "moe_layers" not in config,
        "interleave_moe_layer_step": "moe_layers" in config,
        "moe_intermediate_size": config["model_type"] == "gemma4_text" and not config.get("enable_moe_block"),
        "n_shared_experts": "num_shared_experts" in config,
        "top_k_experts": not config.get("enable_moe_block"),
        "global_head_dim": "per_layer_config" in config,
        "max_window_layers": "layer_types" in config or not config.get("use_sliding_window"),
        # A router that takes all experts takes them in whatever order; groups that are all kept choose nothing.
        "n_group": config.get("n_group", 1) == config.get("topk_group", 1) == 1,
        "no_rope_layer_interval": bool(config.get("no_rope_layers")),
        "intermediate_size": not _has_dense_layer(config),
        "num_global_key_value_heads": not config.get("attention_k_eq_v"),
        "rope_theta": nested,
        "use_double_wide_mlp": not config.get("num_kv_shared_layers"),
        "rope_local_base_freq": nested,
        "sliding_window": config.get("use_sliding_window", True) is False
        or (config["model_type"] in USES_WINDOWS and not config.get("use_sliding_window"))
        or "sliding_attention" not in config.get("layer_types", ["sliding_attention"]),
        "sliding_window_pattern": "layer_types" in config or config.get("sliding_window", 1) is None,
        "tie_word_embeddings": config.get("tie_word_embeddings") is False,  # a head in the file settles it
    }
    return says_nothing.get(key, False)


ALTERED: dict[str, Any] = {
    "hidden_act": "relu2",
    "hidden_activation": "relu2",
    "activation_function": "relu2",
    "rope_scaling": {"type": "linear", "factor": 3.0},
    "rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 10000.0},
    "layer_types": ["sliding_attention", *["full_attention"] * 9],
    "per_layer_config": {"0": {"head_dim": 8}},
    "no_rope_layers": [0] * 9,
    "no_rope_layer_interval": 3,
    "attn_type_list": [0, 1],
    "mlp_only_layers": [0, 1],  # one of them has experts where every second layer has
    "moe_layers": [0],
    "text_config": {"hidden_size": 8},
    "vision_config": {"hidden_size": 8},
    "audio_config": {"hidden_size": 8},
    "quantization_config": {"bits": 4},
    "model_type": "gpt2",
    "use_bidirectional_attention": "all",
}


def altered(key: str, value: Any, n_layers: int | None) -> Any:
    """Another value of the same kind."""
    if key in ALTERED:
        other = ALTERED[key]
        return other[:n_layers] if isinstance(other, list) and value != other[:n_layers] else other
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 2 if key not in ("num_attention_heads", "n_head") else value * 2
    if isinstance(value, float):
        return value * 3
    return 7


TEXT = sorted(name for name, case in families.CASES.items() if "multimodal" not in case.tags)
FIRST = {families.CASES[name].config["model_type"]: name for name in reversed(families.CASES) if name in TEXT}
"""The first case of each model type."""


def outcomes(name: str, directory: Path, keys: Iterable[str]) -> Iterator[tuple[str, str]]:
    """What altering each key of a case does: "refused", "changed" or "same"."""
    case = families.CASES[name]
    tiny.write(name, directory, case)
    tokens = tiny.prompt(name, families.VOCAB_SIZE)[:40]
    plain = prefill(load(directory, 48).reference(), tokens)
    n_layers = case.config.get("num_hidden_layers", case.config.get("n_layer"))
    for key in keys:
        config = {**case.config, key: altered(key, case.config.get(key), n_layers)}
        (directory / "config.json").write_text(json.dumps(config))
        try:
            logits = prefill(load(directory, 48).reference(), tokens)
        except PaceError as error:
            assert "\n" not in str(error)
            yield key, "refused"
        else:
            same = logits.shape == plain.shape and np.array_equal(logits, plain)
            yield key, "same" if same else "changed"


def check(name: str, directory: Path) -> None:
    """Alter every key that the case has or its family reads."""
    config = families.CASES[name].config
    reader = Config(config)
    ARCHITECTURES[config["architectures"][0]].spec(reader)
    keys = sorted((config.keys() | reader.read) - INERT - LENGTHS)
    for key, outcome in outcomes(name, directory, keys):
        if not unused(config, key):
            assert outcome != "same", f"{key} was altered without effect"


@pytest.mark.parametrize("model_type", sorted(FIRST))
def test_every_value_of_the_config_is_computed_or_refused(model_type: str, tmp_path: Path) -> None:
    check(FIRST[model_type], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(TEXT) - set(FIRST.values())))
def test_every_value_of_every_case_is_computed_or_refused(name: str, tmp_path: Path) -> None:
    check(name, tmp_path)


@pytest.mark.parametrize("model_type", sorted(FIRST))
def test_every_option_of_another_family_is_computed_or_refused(model_type: str, tmp_path: Path) -> None:
    own = families.CASES[FIRST[model_type]].config
    keys = [k for k in NEUTRAL if k not in own]
    for key, outcome in outcomes(FIRST[model_type], tmp_path, keys):
        if not unused(own, key):
            assert outcome != "same", f"{key} was set without effect"


def test_every_architecture_is_covered() -> None:
    assert {a.model_type for a in ARCHITECTURES.values() if not a.text} == set(FIRST)
