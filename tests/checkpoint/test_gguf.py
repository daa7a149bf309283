"""GGUF files against the folders that they were made from: equal specs, equal tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf_kit
import numpy as np
import pytest
from golden import families, tiny

from pace.checkpoint import model_files
from pace.models.decoder import lower
from pace.models.registry import parse_config
from pace.models.weights import DenseSink, Tensors, load_weights

CASES = [
    "llama-open-llama-head20-odd",
    "qwen2-r1-distill",
    "qwen3-head128",
    "qwen3_moe-a3b",
    "gemma2-caps",
    "gemma3_text-pattern2",
    "gemma3_text-nested-ropes",
    "gemma3_text-defaults",
    "gemma3_text-cap27b",
    "phi3-mini4k",
    "phi3-mini4",
    "gpt_oss-small",
    "gpt_oss-mxfp4",
]


def weights_of(place: Path) -> tuple[Any, dict[str, Any]]:
    """The spec and every weight of the plan, f64."""
    files = model_files(place)
    spec, weight_map = parse_config(files.json("config.json"))
    sink = DenseSink()
    tensors = Tensors(files.tensors(), weight_map, len(spec.layers))
    load_weights(lower(spec, 64), tensors, sink)
    return spec, sink.weights


@pytest.mark.parametrize("name", CASES)
def test_a_file_is_the_folder_that_it_was_made_from(name: str, tmp_path: Path) -> None:
    folder = tiny.write(name, tmp_path / "folder", families.CASES[name])
    path = gguf_kit.write(folder, tmp_path / "model.gguf")
    spec, weights = weights_of(folder)
    own_spec, own = weights_of(path)
    assert own_spec == spec
    assert own.keys() == weights.keys()
    for key in weights:
        np.testing.assert_array_equal(own[key], weights[key], err_msg=key)
