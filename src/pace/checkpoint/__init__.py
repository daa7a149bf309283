"""Model files: finding them (`hub`), reading their JSON (`config_json`) and their tensors (`safetensors`),
strictly."""

from __future__ import annotations

from pace.checkpoint.config_json import read_json
from pace.checkpoint.generation_config import GenerationDefaults, load_generation_defaults
from pace.checkpoint.hub import resolve
from pace.checkpoint.pooling_config import read_pooling
from pace.checkpoint.safetensors import Checkpoint, TensorInfo

__all__ = [
    "Checkpoint",
    "GenerationDefaults",
    "TensorInfo",
    "load_generation_defaults",
    "read_json",
    "read_pooling",
    "resolve",
]
