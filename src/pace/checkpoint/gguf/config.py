"""From a GGUF file's metadata to the `config.json` that the same model has on the hub.

llama.cpp keeps some numbers in its code, not in the file: those stand here, each with its reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from pace.errors import UnsupportedModel, show

__all__ = ["FAMILIES", "Facts", "config_of"]

F32Array = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Facts:
    """What a config is made of.

    Args:
        metadata: of the file.
        shapes: tensor name -> its sizes, slowest first.
        types: tensor name -> how its values are stored.
        factors: reads a vector by its name, None where there is none.
    """

    metadata: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    types: Mapping[str, str]
    factors: Callable[[str], F32Array | None]

    @property
    def architecture(self) -> str:
        """As the file names it."""
        return str(self.metadata.get("general.architecture"))

    def get(self, key: str, default: Any = None) -> Any:
        """A value of the architecture; of a list with one for each layer, the one that they share."""
        value = self.metadata.get(f"{self.architecture}.{key}", default)
        if isinstance(value, np.ndarray):
            values = value.tolist()
            return values[0] if values and values.count(values[0]) == len(values) else values
        return value


def config_of(facts: Facts) -> dict[str, Any]:
    """The config.json.

    Raises:
        UnsupportedModel: an architecture, or a setting of one, that pace does not have.
    """
    family = FAMILIES.get(facts.architecture)
    if family is None:
        raise UnsupportedModel(
            f"general.architecture is {show(facts.metadata.get('general.architecture'))}; GGUF files are read of "
            f"{', '.join(FAMILIES)}: take the original checkpoint"
        )
    architecture, model_type, own = family
    config = {"architectures": [architecture], "model_type": model_type, **_common(facts)}
    config.update(own(facts, config))
    return {key: value for key, value in config.items() if value is not None}


def _common(facts: Facts) -> dict[str, Any]:
    get = facts.get
    head_dim = get("attention.key_length")
    if get("attention.value_length", head_dim) != head_dim:
        raise UnsupportedModel(
            f"attention.value_length is {show(get('attention.value_length'))}, and key_length {show(head_dim)}; supported "
            "are heads whose keys and values are of one width"
        )
    width, n_heads = get("embedding_length"), get("attention.head_count")
    if head_dim is None and type(width) is int and type(n_heads) is int and n_heads:
        head_dim = width // n_heads
    rotary = get("rope.dimension_count", head_dim)
    whole = rotary == head_dim or type(rotary) is not int or not head_dim
    return {
        "vocab_size": facts.shapes.get("token_embd.weight", (None,))[0],
        "hidden_size": width,
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": n_heads,
        "num_key_value_heads": get("attention.head_count_kv"),
        "head_dim": head_dim,
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": get("context_length"),
        "rope_theta": get("rope.freq_base"),
        "partial_rotary_factor": None if whole else rotary / head_dim,
        "rope_scaling": _scaling(facts),
        "tie_word_embeddings": "output.weight" not in facts.shapes,
        "hidden_act": "silu",
        "attention_bias": "blk.0.attn_output.bias" in facts.shapes,
    }


def _scaling(facts: Facts) -> dict[str, Any] | None:
    """What stretches the rotation, where metadata say it."""
    get = facts.get
    factor = get("rope.scaling.factor", get("rope.scale_linear"))  # the older name
    kind = get("rope.scaling.type", "none" if factor in (None, 0, 1) else "linear")
    if kind == "none" or (kind == "linear" and factor in (None, 0, 1)):
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "longrope":
        return None  # its factors are tensors
    if kind != "yarn":
        raise UnsupportedModel(
            f"rope.scaling.type is {show(kind)}; supported are none, linear, yarn and longrope"
        )
    for key in ("rope.scaling.yarn_log_multiplier", "rope.scaling.yarn_ext_factor"):
        if get(key) not in (None, 0, 1):
            raise UnsupportedModel(f"{key} is {show(get(key))}; supported is 1")
    scaling = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": get("rope.scaling.original_context_length"),
        "attention_factor": get("rope.scaling.yarn_attn_factor"),
        "beta_fast": get("rope.scaling.yarn_beta_fast"),
        "beta_slow": get("rope.scaling.yarn_beta_slow"),
    }
    return {key: value for key, value in scaling.items() if value is not None}


def _llama(facts: Facts, config: dict[str, Any]) -> dict[str, Any]:
    if facts.get("expert_count"):
        raise UnsupportedModel(
            "general.architecture is 'llama' with experts (Mixtral), which is not read from GGUF files; "
            "take the original checkpoint"
        )
    factors = facts.factors("rope_freqs.weight")
    own = {"mlp_bias": "blk.0.ffn_down.bias" in facts.shapes}
    return own if factors is None else {**own, **_rope_freqs(factors, config)}


def _rope_freqs(factors: F32Array, config: dict[str, Any]) -> dict[str, Any]:
    """What the frequencies are divided by: as Llama 3's numbers where it is those, else one by one."""
    theta, n = config["rope_theta"] or 10000.0, len(factors)
    factor = float(factors.max(initial=1.0))
    llama3 = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    turns = 8192 / (2 * math.pi) / theta ** (np.arange(n) / n)
    smooth = np.clip((turns - 1.0) / 3.0, 0.0, 1.0)
    if np.allclose(1 / ((1 - smooth) / factor + smooth), factors, rtol=1e-5, atol=0.0):
        return {"rope_scaling": llama3}
    listed = _shortest(factors)
    own = {"rope_type": "longrope", "short_factor": listed, "long_factor": listed, "attention_factor": 1.0}
    return {"rope_scaling": own, "original_max_position_embeddings": config["max_position_embeddings"]}


def _qwen3moe(facts: Facts, config: dict[str, Any]) -> dict[str, Any]:
    return {
        "num_experts": facts.get("expert_count"),
        "num_experts_per_tok": facts.get("expert_used_count"),
        "moe_intermediate_size": facts.get("expert_feed_forward_length"),
        "norm_topk_prob": facts.get("expert_weights_norm", True),  # in llama.cpp's code for this architecture
    }


def _gemma(facts: Facts, config: dict[str, Any], n_layers_27b: int) -> dict[str, Any]:
    scale = facts.get("attention.scale")
    if scale:
        scalar = round(scale**-2, 3)
    elif config["num_hidden_layers"] == n_layers_27b:  # the one size whose scale isn't that of its heads
        scalar = config["hidden_size"] // config["num_attention_heads"]
    else:
        scalar = config["head_dim"]
    return {
        "hidden_act": None,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": scalar,
        "sliding_window": facts.get("attention.sliding_window"),
        "layer_types": _layer_types(facts, config),
        "final_logit_softcapping": facts.get("final_logit_softcapping"),
    }


def _layer_types(facts: Facts, config: dict[str, Any]) -> list[str] | None:
    """Which layers have a window, where the file says it: a list, or the number of layers of which the last has none."""
    pattern = facts.metadata.get(f"{facts.architecture}.attention.sliding_window_pattern")
    n_layers = config["num_hidden_layers"]
    if type(pattern) is int and pattern > 0 and type(n_layers) is int:
        slides = [(i + 1) % pattern != 0 for i in range(min(n_layers, 1024))]
    elif isinstance(pattern, np.ndarray):
        slides = [bool(of) for of in pattern]
    else:
        return None
    return ["sliding_attention" if of else "full_attention" for of in slides]


def _gemma2(facts: Facts, config: dict[str, Any]) -> dict[str, Any]:
    return {
        **_gemma(facts, config, n_layers_27b=46),
        "attn_logit_softcapping": facts.get("attn_logit_softcapping"),
    }


def _gemma3(facts: Facts, config: dict[str, Any]) -> dict[str, Any]:
    return {
        **_gemma(facts, config, n_layers_27b=62),
        "rope_local_base_freq": facts.get("rope.freq_base_swa"),
    }


def _shortest(values: F32Array) -> list[float]:
    """The shortest number for each f32, which is what it was before it became one: 1.05, not 1.0499999523162842."""
    return [float(str(value)) for value in values]


def _phi3(facts: Facts, config: dict[str, Any]) -> dict[str, Any]:
    original = facts.get("rope.scaling.original_context_length")
    # 0 is how the converter writes null.
    own = {
        "sliding_window": facts.get("attention.sliding_window") or None,
        "original_max_position_embeddings": original,
    }
    long, short = (facts.factors(f"rope_factors_{which}.weight") for which in ("long", "short"))
    if long is None or short is None:
        return own
    scaling: dict[str, Any] = {
        "rope_type": "longrope",
        "long_factor": _shortest(long),
        "short_factor": _shortest(short),
    }
    stated, longest = facts.get("rope.scaling.attn_factor"), config["max_position_embeddings"]
    if (
        stated is not None
        and isinstance(longest, int)
        and isinstance(original, int)
        and longest > original > 1
    ):
        implied = math.sqrt(1 + math.log(longest / original) / math.log(original))
        if not math.isclose(stated, implied, rel_tol=1e-5):
            scaling["attention_factor"] = stated
    return {**own, "rope_scaling": scaling}


def _gpt_oss(facts: Facts, config: dict[str, Any]) -> dict[str, Any]:
    scaling = config["rope_scaling"] or {"rope_type": "default"}
    if scaling["rope_type"] == "yarn":
        scaling["truncate"] = False  # as its config.json says; GGUF has no key for it
    own = {
        "rope_scaling": scaling,
        "num_local_experts": facts.get("expert_count"),
        "num_experts_per_tok": facts.get("expert_used_count"),
        "intermediate_size": facts.get("expert_feed_forward_length", config["intermediate_size"]),
        "sliding_window": facts.get("attention.sliding_window"),
        "layer_types": _layer_types(facts, config),
    }
    if facts.types.get("blk.0.ffn_down_exps.weight") == "MXFP4":
        own["quantization_config"] = {"quant_method": "mxfp4"}
    return own


Family = tuple[str, str, Callable[[Facts, dict[str, Any]], dict[str, Any]]]

FAMILIES: Final[Mapping[str, Family]] = {
    "llama": ("LlamaForCausalLM", "llama", _llama),
    "qwen2": ("Qwen2ForCausalLM", "qwen2", lambda facts, config: {}),
    "qwen3": ("Qwen3ForCausalLM", "qwen3", lambda facts, config: {}),
    "qwen3moe": ("Qwen3MoeForCausalLM", "qwen3_moe", _qwen3moe),
    "gemma2": ("Gemma2ForCausalLM", "gemma2", _gemma2),
    "gemma3": ("Gemma3ForCausalLM", "gemma3_text", _gemma3),
    "phi3": ("Phi3ForCausalLM", "phi3", _phi3),
    "gpt-oss": ("GptOssForCausalLM", "gpt_oss", _gpt_oss),
}
"""Architecture of a GGUF file -> that of config.json, and what it has of its own there."""
