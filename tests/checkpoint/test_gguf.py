"""GGUF files against the folders that they were made from: equal specs, equal tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf_kit
import numpy as np
import pytest
from golden import families, tiny

from pace.checkpoint import model_files
from pace.checkpoint.gguf import GgufModel
from pace.errors import CheckpointError, UnsupportedModel
from pace.models.decoder import lower
from pace.models.quantisation import quantised_in
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
    checkpoint = files.tensors()
    tensors = Tensors(checkpoint, weight_map, len(spec.layers), quantised_in(checkpoint, {}))
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


BLOCK_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 307,
    "max_position_embeddings": 64,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
}


def in_blocks(kind: str, folder: Path, path: Path, plain: bool = False) -> Path:
    """A file whose matrices are any blocks of a type; plain: their values as f32."""
    gguf = gguf_kit.gguf
    code = gguf.GGMLQuantizationType[kind]

    def encode(name: str, values: np.ndarray[Any, Any]) -> tuple[Any, Any]:
        n_blocks = values.shape[-1] // gguf.GGML_QUANT_SIZES[code][0]
        rows = gguf_kit.random_rows(kind, len(values), n_blocks, seed=len(name), scale=0.01)
        if plain:
            return gguf.quants.dequantize(rows, code), gguf.GGMLQuantizationType.F32
        return rows, code

    return gguf_kit.write(folder, path, encode)


@pytest.mark.parametrize("kind", gguf_kit.SCALES)
def test_blocks_are_read_as_the_values_that_they_stand_for(kind: str, tmp_path: Path) -> None:
    folder = tiny.write("llama-r1-distill", tmp_path / "folder", tiny.Case(BLOCK_CONFIG))
    spec, weights = weights_of(in_blocks(kind, folder, tmp_path / "plain.gguf", plain=True))
    own_spec, own = weights_of(in_blocks(kind, folder, tmp_path / "few.gguf"))
    assert own_spec == spec
    for key in weights:
        np.testing.assert_array_equal(own[key], weights[key], err_msg=key)


def test_a_type_that_is_not_read_is_named(tmp_path: Path) -> None:
    folder = tiny.write("llama-r1-distill", tmp_path / "folder", tiny.Case(BLOCK_CONFIG))
    code = gguf_kit.gguf.GGMLQuantizationType.Q2_K
    path = gguf_kit.write(
        folder,
        tmp_path / "model.gguf",
        lambda name, values: (np.zeros((len(values), values.shape[1] // 256 * 84), np.uint8), code),
    )
    with pytest.raises(
        UnsupportedModel, match=r"weight' is stored as Q2_K; matrices are read in F32, .*Q6_K"
    ):
        model_files(path).tensors()


def test_a_scale_that_is_no_number_is_refused(tmp_path: Path) -> None:
    folder = tiny.write("llama-r1-distill", tmp_path / "folder", tiny.Case(BLOCK_CONFIG))
    path = in_blocks("Q8_0", folder, tmp_path / "model.gguf")
    data = bytearray(path.read_bytes())
    model = model_files(path)
    assert isinstance(model, GgufModel)
    (first,) = [t for t in model._files[0].tensors if t.name == "blk.1.attn_q.weight"]
    data[first.offset : first.offset + 2] = b"\xff\xff"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="a scale that is no finite number"):
        weights_of(path)
