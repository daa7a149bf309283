"""Configs: what is read from good ones; broken ones are refused with one line that names the value."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from golden import families, tiny

from pace.errors import CheckpointError, ConfigError, PaceError, UnsupportedModel
from pace.models.decoder import lower
from pace.models.registry import ARCHITECTURES, parse_config
from pace.models.spec import Bias, DecoderSpec, HeadNorm

LLAMA = tiny.CASES["llama-mha"].config
QWEN2 = tiny.CASES["qwen2-window"].config
QWEN3 = tiny.CASES["qwen3"].config
MISTRAL = tiny.CASES["mistral-window"].config


def spec_of(config: dict[str, Any], **changes: Any) -> DecoderSpec:
    """The spec of a config with some keys changed; `...` removes a key."""
    changed = {**copy.deepcopy(config), **changes}
    return parse_config({k: v for k, v in changed.items() if v is not ...})[0]


# (config, changes, error, what the message must name)
BROKEN: list[tuple[dict[str, Any], dict[str, Any], type[PaceError], str]] = [
    (LLAMA, {"architectures": ..., "model_type": ...}, CheckpointError, "model_type"),
    (LLAMA, {"architectures": [], "model_type": "bert"}, UnsupportedModel, "'bert'"),
    (LLAMA, {"architectures": "LlamaForCausalLM"}, CheckpointError, "architectures"),
    (LLAMA, {"architectures": ["LlamaForCausalLM", "X"]}, CheckpointError, "architectures"),
    (LLAMA, {"architectures": ["BertModel"]}, UnsupportedModel, "'BertModel'"),
    (LLAMA, {"model_type": "mistral"}, CheckpointError, "model_type is 'mistral', expected 'llama'"),
    (LLAMA, {"hidden_size": ...}, CheckpointError, "hidden_size"),
    (LLAMA, {"hidden_size": None}, CheckpointError, "hidden_size"),
    (LLAMA, {"hidden_size": "128"}, CheckpointError, "hidden_size is '128'"),
    (LLAMA, {"hidden_size": 128.0}, CheckpointError, "hidden_size is 128.0"),
    (LLAMA, {"hidden_size": -128}, CheckpointError, "hidden_size is -128"),
    (LLAMA, {"hidden_size": 1 << 40}, CheckpointError, "hidden_size"),
    (LLAMA, {"num_hidden_layers": True}, CheckpointError, "num_hidden_layers is True"),
    (LLAMA, {"num_hidden_layers": 0}, CheckpointError, "num_hidden_layers is 0"),
    (
        LLAMA,
        {"num_attention_heads": 3, "num_key_value_heads": 1},
        CheckpointError,
        "num_attention_heads is 3",
    ),
    (
        LLAMA,
        {"num_attention_heads": 4, "num_key_value_heads": 3},
        CheckpointError,
        "num_key_value_heads is 3",
    ),
    (LLAMA, {"num_key_value_heads": 0}, CheckpointError, "num_key_value_heads is 0"),
    (
        LLAMA,
        {"num_attention_heads": 128, "num_key_value_heads": 1, "head_dim": 16},
        UnsupportedModel,
        "num_key_value_heads is 1 for 128 query heads",
    ),
    (LLAMA, {"head_dim": 41}, UnsupportedModel, "head_dim is 41"),
    (LLAMA, {"head_dim": 514}, UnsupportedModel, "head_dim is 514"),
    (LLAMA, {"vocab_size": 0}, CheckpointError, "vocab_size is 0"),
    (LLAMA, {"vocab_size": 1 << 30}, CheckpointError, "vocab_size"),
    (LLAMA, {"rms_norm_eps": ...}, CheckpointError, "rms_norm_eps"),
    (LLAMA, {"rms_norm_eps": 0}, CheckpointError, "rms_norm_eps is 0"),
    (LLAMA, {"rms_norm_eps": float("nan")}, CheckpointError, "rms_norm_eps is nan"),
    (LLAMA, {"hidden_act": "mish"}, UnsupportedModel, "'mish'"),
    (LLAMA, {"hidden_act": ...}, CheckpointError, "hidden_act"),
    (LLAMA, {"tie_word_embeddings": 1}, CheckpointError, "tie_word_embeddings is 1"),
    (LLAMA, {"attention_bias": "yes"}, CheckpointError, "attention_bias is 'yes'"),
    (
        LLAMA,
        {"quantization_config": {"bits": 4}},
        CheckpointError,
        "quantization_config has no 'quant_method'",
    ),
    (LLAMA, {"quantization_config": {"quant_method": "hqq"}}, UnsupportedModel, "quant_method 'hqq'"),
    (LLAMA, {"sliding_window": 63}, UnsupportedModel, "sliding_window is 63"),
    (LLAMA, {"sliding_window": 0}, UnsupportedModel, "sliding_window is 0"),
    (LLAMA, {"sliding_window": True}, UnsupportedModel, "sliding_window is True"),
    (LLAMA, {"layer_types": ["full_attention", "sliding_attention"]}, UnsupportedModel, "layer_types"),
    (LLAMA, {"layer_types": [["full_attention"]]}, UnsupportedModel, "layer_types"),
    (
        MISTRAL,
        {"sliding_window": None, "layer_types": ["sliding_attention"] * 2},
        CheckpointError,
        "sliding_window",
    ),
    (LLAMA, {"architectures": ["FSDPBertModel"]}, UnsupportedModel, "'FSDPBertModel'"),
    (LLAMA, {"partial_rotary_factor": 0.5}, UnsupportedModel, "partial_rotary_factor is 0.5"),
    (LLAMA, {"num_local_experts": 8}, UnsupportedModel, "num_local_experts is 8"),
    (LLAMA, {"final_logit_softcapping": 30.0}, UnsupportedModel, "final_logit_softcapping"),
    (LLAMA, {"max_position_embeddings": ...}, CheckpointError, "max_position_embeddings"),
    (LLAMA, {"rope_theta": 0}, CheckpointError, "rope_theta is 0"),
    (LLAMA, {"rope_theta": float("inf")}, CheckpointError, "rope_theta is inf"),
    (LLAMA, {"rope_scaling": "linear"}, CheckpointError, "rope_scaling"),
    (LLAMA, {"rope_scaling": {"type": "magic", "factor": 2.0}}, UnsupportedModel, "'magic'"),
    (LLAMA, {"rope_scaling": {"type": "mrope", "rope_type": "default"}}, UnsupportedModel, "'mrope'"),
    (LLAMA, {"rope_scaling": {"type": "linear"}}, CheckpointError, "factor"),
    (LLAMA, {"rope_scaling": {"type": "linear", "factor": 0.5}}, CheckpointError, "factor is 0.5"),
    (LLAMA, {"rope_scaling": {"type": "linear", "factor": "2"}}, CheckpointError, "factor is '2'"),
    (LLAMA, {"rope_scaling": {"type": "linear", "factor": 2, "wavy": 1}}, UnsupportedModel, "'wavy'"),
    (
        LLAMA,
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4, "high_freq_factor": 1}},
        CheckpointError,
        "high_freq_factor is 1",
    ),
    (
        LLAMA,
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 1, "beta_slow": 32}},
        CheckpointError,
        "beta_fast is 1",
    ),
    (
        LLAMA,
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "truncate": "no"}},
        CheckpointError,
        "truncate is 'no'",
    ),
    (
        LLAMA,
        {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0] * 32}},
        CheckpointError,
        "short_factor",
    ),
    (
        LLAMA,
        {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0] * 32, "long_factor": [0.0] * 32}},
        CheckpointError,
        "long_factor is 0.0",
    ),
    (
        LLAMA,
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}},
        CheckpointError,
        "rope_theta is 10000 at the top level and 5000",
    ),
    (
        LLAMA,
        {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"type": "linear", "factor": 2.0}},
        CheckpointError,
        "rope_parameters and rope_scaling differ",
    ),
    # Two periods: transformers would take the second set, others the first.
    (
        LLAMA,
        {"rope_theta": ..., "rope_parameters": {"rope_theta": 5e5}, "rope_scaling": {"rope_theta": 1e6}},
        CheckpointError,
        "rope_parameters and rope_scaling differ",
    ),
    (
        LLAMA,
        {"rope_theta": ..., "rope_parameters": {"rope_theta": 5e5}, "rope_scaling": {"type": "default"}},
        CheckpointError,
        "rope_parameters and rope_scaling differ",
    ),
    (
        LLAMA,
        {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
        UnsupportedModel,
        "full_attention",
    ),
    (QWEN2, {"layer_types": ["full_attention"]}, CheckpointError, "layer_types"),
    (QWEN2, {"layer_types": ["full_attention", "chunked_attention", "x"]}, UnsupportedModel, "'chunked"),
    (
        QWEN2,
        {"use_sliding_window": False, "layer_types": ["sliding_attention"] * 3},
        CheckpointError,
        "use_sliding_window is False",
    ),
    (QWEN2, {"sliding_window": None}, CheckpointError, "sliding_window"),
    (QWEN2, {"sliding_window": 0}, CheckpointError, "sliding_window is 0"),
    (QWEN2, {"max_window_layers": ...}, CheckpointError, "max_window_layers"),
    (QWEN3, {"num_experts": 64}, UnsupportedModel, "num_experts is 64"),
    (MISTRAL, {"sliding_window": ...}, CheckpointError, "sliding_window"),
    (MISTRAL, {"sliding_window": True}, CheckpointError, "sliding_window is True"),
]


@pytest.mark.parametrize(("config", "changes", "error", "named"), BROKEN)
def test_broken_config_is_refused(
    config: dict[str, Any], changes: dict[str, Any], error: type[PaceError], named: str
) -> None:
    with pytest.raises(error) as caught:
        spec_of(config, **changes)
    message = str(caught.value)
    assert named in message
    assert "config.json" in message
    assert "\n" not in message
    assert len(message) < (
        1000 if "supported are LlamaFor" in message or "one of LlamaFor" in message else 400
    )


@pytest.mark.parametrize(
    ("layers", "named"),
    [
        ({"1": 64, "3": 32, "5": 64}, "head_dim 64 and 32"),  # a full layer that would rotate too much
        (
            {"0": 64, "1": 64, "3": 64, "5": 64},
            "head_dim 64 and 32",
        ),  # a sliding one that would rotate too little
        ({"1": 64, "3": 64, "5": 128}, "head_dim 64 and 128"),
    ],
)
def test_layers_of_one_kind_share_one_rotary_embedding(layers: dict[str, int], named: str) -> None:
    """Found by fuzzing: the first layer's head_dim was taken for all of its kind."""
    config = families.CASES["gemma4_text-resaved"].config
    assert spec_of(config).ropes
    table = {i: {"head_dim": head_dim, "num_key_value_heads": 1} for i, head_dim in layers.items()}
    with pytest.raises(UnsupportedModel, match=named):
        spec_of(config, per_layer_config=table)


# What changes no number: each is the same model as without it.
HARMLESS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (LLAMA, {"pretraining_tp": 2}),
    (LLAMA, {"pretraining_tp": None}),
    (LLAMA, {"quantization_config": {}}),
    (LLAMA, {"quantization_config": None}),
    (LLAMA, {"architectures": ...}),
    (LLAMA, {"architectures": []}),
    (LLAMA, {"architectures": None}),
    (LLAMA, {"model_type": ...}),
    (LLAMA, {"attention_bias": None, "mlp_bias": None, "tie_word_embeddings": None, "rope_scaling": None}),
    (LLAMA, {"rope_scaling": {}}),
    (LLAMA, {"rope_scaling": {"type": None, "rope_type": "default", "factor": None}}),
    (LLAMA, {"rope_scaling": {"rope_type": "default", "factor": 8.0}}),
    (
        LLAMA,
        {
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000},
            "rope_scaling": {"type": "default"},
        },
    ),
    (LLAMA, {"rope_theta": 10000}),
    (LLAMA, {"head_dim": None, "sliding_window": None, "layer_types": None}),
    (LLAMA, {"torch_dtype": "float16", "use_cache": False, "transformers_version": "9", "_name_or_path": 3}),
    (QWEN2, {"max_position_embeddings": 64}),
    (LLAMA, {"sliding_window": 64}),  # as long as the context: it hides nothing
    (LLAMA, {"layer_types": ["full_attention"] * 2}),
    (LLAMA, {"text_config": {}, "vision_config": {}, "no_rope_layers": []}),
    (LLAMA, {"architectures": ["FSDPLlamaForCausalLM"]}),
    (LLAMA, {"rope_scaling": {"type": "default", "low_freq_factor": 1.0, "beta_fast": 32}}),
    (
        LLAMA,
        {
            "rope_theta": ...,
            "rope_parameters": {"rope_theta": 1e4},
            "rope_scaling": {"rope_type": "default", "rope_theta": 10000},
        },
    ),
    # transformers doesn't read these of Qwen2 and Mistral; the tensors must be there, or not, whatever they say.
    (QWEN2, {"attention_bias": False, "mlp_bias": True}),
    (MISTRAL, {"attention_bias": True, "mlp_bias": None}),
    (QWEN3, {"mlp_bias": True}),
]


@pytest.mark.parametrize(("config", "changes"), HARMLESS)
def test_what_changes_no_number_changes_nothing(config: dict[str, Any], changes: dict[str, Any]) -> None:
    assert spec_of(config, **changes) == spec_of(config)


YARN = {"factor": 4.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize(
    ("new", "old"),
    [
        ({"rope_type": "yarn", "rope_theta": 10000.0, **YARN}, {"type": "yarn", **YARN}),
        ({"rope_type": "yarn", **YARN, "beta_slow": 1}, {"type": "yarn", **YARN, "beta_fast": 32.0}),
        (
            {"rope_type": "yarn", **YARN},
            {"rope_type": "yarn", "type": "yarn", **YARN, "factor": 4, "beta_fast": None},
        ),
    ],
)
def test_two_spellings_of_one_rope_agree(new: dict[str, Any], old: dict[str, Any]) -> None:
    both = spec_of(LLAMA, rope_parameters=new, rope_scaling=old)
    assert both == spec_of(LLAMA, rope_scaling={"type": "yarn", **YARN})
    with pytest.raises(CheckpointError, match="differ"):
        spec_of(LLAMA, rope_parameters=new, rope_scaling={**old, "factor": 2.0})


@pytest.mark.parametrize("document", [None, [], "x", 3])
def test_document_must_be_an_object(document: object) -> None:
    with pytest.raises(CheckpointError, match="JSON object"):
        parse_config(document)


def test_unknown_architecture_lists_what_exists() -> None:
    with pytest.raises(UnsupportedModel) as caught:
        spec_of(LLAMA, architectures=["GPT2LMHeadModel"])
    assert all(name in str(caught.value) for name in ARCHITECTURES)


def test_max_model_len_must_be_positive() -> None:
    with pytest.raises(ConfigError, match="max_model_len is 0"):
        lower(spec_of(LLAMA), 0)


def test_llama_biases() -> None:
    assert spec_of(LLAMA).bias is Bias.NONE
    assert spec_of(LLAMA, attention_bias=True).bias == Bias.QKV | Bias.OUT
    assert spec_of(LLAMA, mlp_bias=True).bias == Bias.MLP


def test_old_configs_get_transformers_defaults() -> None:
    spec = spec_of(LLAMA, num_key_value_heads=..., rope_theta=..., tie_word_embeddings=...)
    assert (spec.layers[0].mixer.n_kv_heads, spec.ropes[0].theta, spec.tied) == (2, 10000.0, False)


def test_qwen3_head_dim_default_is_128() -> None:
    spec = spec_of(QWEN3, head_dim=...)
    assert spec.layers[0].mixer.head_dim == 128
    assert spec.layers[0].mixer.norm == HeadNorm("rms", "head")


def test_windows() -> None:
    assert [layer.mixer.window for layer in spec_of(QWEN2).layers] == [None, 16, 16]
    assert [layer.mixer.window for layer in spec_of(QWEN2, use_sliding_window=False).layers] == [None] * 3
    types = ["sliding_attention", "full_attention", "full_attention"]
    assert [layer.mixer.window for layer in spec_of(QWEN2, layer_types=types).layers] == [16, None, None]
    assert [layer.mixer.window for layer in spec_of(MISTRAL).layers] == [32, 32]
    assert [layer.mixer.window for layer in spec_of(MISTRAL, sliding_window=None).layers] == [None, None]


def test_transformers_4_and_5_configs_agree() -> None:
    scaling = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    old = spec_of(LLAMA, rope_theta=5e5, rope_scaling={"rope_type": "llama3", **scaling})
    new = spec_of(
        LLAMA, rope_theta=..., rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **scaling}
    )
    assert old == new


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        (None, 64),
        ({"type": "linear", "factor": 4.0}, 256),
        ({"type": "dynamic", "factor": 2.0}, 128),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, 128),
    ],
)
def test_context_length(scaling: dict[str, Any] | None, expected: int) -> None:
    assert spec_of(LLAMA, rope_scaling=scaling).max_len == expected
