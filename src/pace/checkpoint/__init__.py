"""Model files: finding them (`hub`), reading their JSON (`config_json`) and their tensors (`safetensors`, `gguf`),
strictly; `files` is all of a model, wherever it is."""

from __future__ import annotations

from pace.checkpoint.config_json import read_json
from pace.checkpoint.files import ModelFiles, model_files
from pace.checkpoint.generation_config import GenerationDefaults, load_generation_defaults
from pace.checkpoint.hub import resolve
from pace.checkpoint.pooling_config import read_pooling
from pace.checkpoint.safetensors import Checkpoint, TensorInfo

__all__ = [
    "Checkpoint",
    "GenerationDefaults",
    "ModelFiles",
    "TensorInfo",
    "load_generation_defaults",
    "model_files",
    "read_json",
    "read_pooling",
    "resolve",
]
