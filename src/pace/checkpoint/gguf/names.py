"""Tensors of a GGUF file under the names that the checkpoint has on the hub, with what the converter did to them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final, Literal

from pace.checkpoint.gguf.header import GgufTensor

__all__ = ["CONSUMED", "View", "views"]

Change = Literal["none", "pairs", "plus one", "blocks", "scales"]
"""What stands between a tensor of the file and the original: nothing; rows of a head in neighbouring pairs, as llama.cpp
rotates them, where the original has halves; 1 added; MXFP4, of which the codes or the scales are meant."""

CONSUMED: Final = frozenset({"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"})
"""Tensors that the config is made of."""

_PLACE: Final = re.compile(
    r"blk\.(?P<layer>0|[1-9]\d{0,5})\.(?P<module>\w+?)(?:\.(?P<kind>weight|bias))?", re.ASCII
)

_TOP: Final = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LLAMA: Final = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GEMMA: Final = {
    **_LLAMA,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_EXPERTS: Final = {
    "ffn_gate_exps": "mlp.experts.{e}.gate_proj",
    "ffn_up_exps": "mlp.experts.{e}.up_proj",
    "ffn_down_exps": "mlp.experts.{e}.down_proj",
}
_MODULES: Final[Mapping[str, Mapping[str, str]]] = {
    "llama": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "qwen3moe": {**_LLAMA, **_EXPERTS, "ffn_gate_inp": "mlp.gate"},
    "gemma2": _GEMMA,
    "gemma3": _GEMMA,
    "phi3": {**_LLAMA, "attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
    "gpt-oss": {
        **_LLAMA,
        **_EXPERTS,
        "post_attention_norm": "post_attention_layernorm",
        "attn_sinks": "self_attn.sinks",
        "ffn_gate_inp": "mlp.router",
    },
}


@dataclass(frozen=True, slots=True)
class View:
    """A tensor of the original checkpoint within one of the file.

    Args:
        tensor: of the file.
        expert: which of those that it holds; None: it is one.
        change: what to undo.
    """

    tensor: GgufTensor
    expert: int | None = None
    change: Change = "none"


def views(tensor: GgufTensor, architecture: str) -> Iterator[tuple[str, View]]:
    """The original's name and place of all that a tensor holds; its own name where nobody knows it."""
    place = _PLACE.fullmatch(tensor.name)
    name = _TOP.get(tensor.name)
    if name is None and place is not None:
        module = _MODULES[architecture].get(place["module"])
        # The bare name of what has no kind (sinks) is the original's.
        kind = "" if module == "self_attn.sinks" else f".{place['kind']}"
        name = None if module is None else f"model.layers.{place['layer']}.{module}{kind}"
    if name is None:
        yield tensor.name, View(tensor)
        return
    change: Change = "none"
    if architecture.startswith("gemma") and name.endswith("norm.weight"):
        change = "plus one"
    if architecture == "llama" and (".q_proj." in name or ".k_proj." in name):
        change = "pairs"
    if "{e}" not in name:
        yield name, View(tensor, None, change)
        return
    for expert in range(tensor.shape[0]):
        own = name.replace("{e}", str(expert))
        if tensor.type.name == "MXFP4":
            bare = own.removesuffix(".weight")
            yield f"{bare}_blocks", View(tensor, expert, "blocks")
            yield f"{bare}_scales", View(tensor, expert, "scales")
        else:
            yield own, View(tensor, expert)
