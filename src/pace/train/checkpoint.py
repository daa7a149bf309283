"""The finished draft as an ordinary Hugging Face folder: bf16 weights, config, tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file

__all__ = ["save_checkpoint"]

VOCAB = "draft_vocab.json"
"""What `draft_vocab` of an engine's `speculative` takes."""

COPIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
)


def save_checkpoint(
    model: Any, mask_id: int, source: Path, folder: Path, vocab: npt.NDArray[np.int64] | None = None
) -> None:
    """Write `folder` anew.

    pace, vLLM and PARD's code find the mask token as `pard_token` in config.json; the model's own code ignores it.

    Args:
        model: the draft, in f32.
        mask_id: the mask token.
        source: the folder of the model that it came from; its other files are copied.
        folder: where to.
        vocab: the only tokens that it has learnt to guess, written as `draft_vocab.json`; None: all.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)  # the embedding
    tensors = {name: tensor.detach().to("cpu", torch.bfloat16).contiguous() for name, tensor in state.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    # The source's own file and not the model's: that one has every default of one version of transformers.
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    for name in ("num_hidden_layers", "intermediate_size"):
        config[name] = getattr(model.config, name)
    if "layer_types" in config:
        config["layer_types"] = list(model.config.layer_types)
    config.pop("dtype", None)
    config |= {"torch_dtype": "bfloat16", "pard_token": mask_id, "spd_type": "pard"}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if vocab is not None:
        (folder / VOCAB).write_text(json.dumps({"token_ids": vocab.tolist()}) + "\n", encoding="utf-8")
    for name in COPIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors writes files that only their owner may read
