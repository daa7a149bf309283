"""Tensor names as tools leave them: which tensor of the architecture each one means, and what the others are."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable
from typing import Final

# Modules that stand between a model and its layers: torch.compile, FSDP, activation checkpointing.
_WRAPPERS: Final = re.compile(
    r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.", re.ASCII
)

# What stands before all of it: DistributedDataParallel, DeepSpeed and Lightning, PEFT after a merge, one more model, and
# what multimodal files call their text model: language_model.model., model.language_model., both.
_PREFIXES: Final = ("module.", "_forward_module.", "base_model.model.", "model.", "language_model.")

IGNORED: Final = re.compile(
    r"(?:.*\.)?rotary_emb\.(?:inv_freq|original_inv_freq|cos_cached|sin_cached)"
    r"|transformer\.h\.\d+\.attn\.(?:bias|masked_bias)"
    r"|(?:model\.)*(?:(?:vision|audio)_(?:tower|model)|embed_(?:vision|audio)|vision_embedder|multi_modal_projector|mtp)\..*",
    re.ASCII,
)
"""Tensors that are never needed: tables and masks that old versions of transformers stored, the parts of multimodal files
that see and hear, and heads that predict further tokens."""

KV_SCALES: Final = re.compile(
    r"(?:.+\.)?(?:self_attn|attn|attention)\.(?:attn\.)?(?:[qkv]|kv|[qkv]_proj\.(?:[qkv]|output)|prob|output)"
    r"_(?:scale|zero_point)",
    re.ASCII,
)
"""Calibration of an FP8 KV cache, and of attention in FP8: what they approximate is computed as it is."""

_PEFT: Final = "adapter weights; merge them into the model first, for instance with PEFT's merge_and_unload"
_FOREIGN: Final = tuple(
    (re.compile(pattern, re.ASCII), what)
    for pattern, what in (
        (r"(?:^|\.)(?:lora_|base_layer\.|modules_to_save\.|ia3_)", _PEFT),
        (
            r"\.(?:qweight|qzeros|g_idx|weight_packed|weight_scale\w*|weight\.(?:absmax|quant_[\w.]+|nested_[\w.]+))$",
            "quantised weights, which its config.json does not describe; take the original checkpoint",
        ),
        (r"^blk\.\d+\.", "names of a GGUF file; take the original checkpoint"),
        (
            r"(?:^|\.)layers\.\d+\.(?:attention\.w[qkvo]|feed_forward\.w[123])\.",
            "Meta's own names; convert it with transformers, or take the checkpoint in Hugging Face's format",
        ),
        (
            r"^(?:v_head|score|classifier|reward_head)\.",
            "a head that scores texts; pace generates them, take the model without it",
        ),
    )
)


def canonical(name: str, wanted: Container[str]) -> str:
    """The architecture's name of a tensor; its own without wrappers where it is none of `wanted`.

    Only what tools are known to add is taken off, and `model.` or `transformer.` put where a model was saved without
    its head. Two tensors may come to one name: the caller refuses them.
    """
    name = _WRAPPERS.sub("", name)
    bare: str | None = name
    while bare is not None:
        for candidate in (bare, f"model.{bare}", f"transformer.{bare}"):
            if candidate in wanted:
                return candidate
        bare = next((bare[len(prefix) :] for prefix in _PREFIXES if bare.startswith(prefix)), None)
    return name


def foreign(names: Iterable[str]) -> str | None:
    """What unexpected tensors are and what to do with them, naming the first that is known; None where none is."""
    for name in names:
        for pattern, what in _FOREIGN:
            if pattern.search(name):
                return f"{name!r} belongs to {what}"
    return None
