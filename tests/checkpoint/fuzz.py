"""Damages checkpoints by chance and loads them: a program that answers each seed with what the load came to.

    python fuzz.py FOLDER < seeds

First a line "ready", then a line of JSON per seed: {"seed", "result": "loaded" or "refused", "message"}, or {"seed", "bad":
what should not be}. A load that takes more than LIMIT_S ends the process. A seed always makes the same damage, so a bad one
can be looked at alone: `python fuzz.py FOLDER SEED` keeps the files.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import faulthandler
import functools
import json
import os
import random
import resource
import shutil
import signal
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from golden import families, tiny
from tiny_checkpoint import write_checkpoint

LIMIT_S = 3.0  # of CPU time, so that a busy machine changes nothing
MAX_BYTES = 8 << 30  # of address space: a size from a file must not be believed before it is checked
REAL_PROBES = (
    512  # one seed in so many tries an unusual tokenizer in the real child process, which takes 0.2 to 3 s
)

Files = dict[str, bytes | None]
"""A checkpoint's files; None is a folder of that name."""

CONFIG, INDEX, TOKENIZER = "config.json", "model.safetensors.index.json", "tokenizer.json"
DEEP: Any = None
for _ in range(60):
    DEEP = [DEEP]

VALUES: tuple[Any, ...] = (
    None, True, False, {}, {"a": 1}, {"content": "<|bos|>"}, [], [[]], [0], [None], [1.0] * 8, [0.5] * 8, DEEP,
    0, -1, 1, 2, 3, 7, 15, 16, 17, 32, 48, 255, 256, 272, 4096, 1 << 15, (1 << 31) - 1, 1 << 31, 1 << 32, (1 << 63) - 1,
    1 << 64, 10**30, 10**400, -(10**400), 0.0, -0.0, 0.5, 1.0, 16.0, 1e-9, 1e-320, 1e308, float("nan"), float("inf"),
    "", "a", "0", "16", "default", "yarn", "llama", "silu", "BF16", "<|eos|>", "model.safetensors", "../x", "/etc/passwd",
    "x" * 1000, "\0", "\n", "é\u0301\U0001f9ff", ["full_attention"] * 2,
)  # fmt: skip

KEYS = (
    "rope_scaling", "rope_parameters", "rope_type", "type", "factor", "original_max_position_embeddings",
    "beta_fast", "mscale", "low_freq_factor", "long_factor", "short_factor", "sliding_window", "layer_types",
    "use_sliding_window", "max_window_layers", "attention_bias", "mlp_bias", "quantization_config", "text_config",
    "pretraining_tp", "head_dim", "num_key_value_heads", "tie_word_embeddings", "vocab_size", "architectures",
    "model_type", "eos_token_id", "do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty",
    "max_new_tokens", "metadata", "weight_map", "__metadata__", "dtype", "shape", "data_offsets", "bos_token",
    "eos_token", "chat_template", "added_tokens_decoder", "normalizer", "pre_tokenizer", "decoder",
    "post_processor", "dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "unk_token",
    "ignore_merges",
)  # fmt: skip

ORIGINAL: dict[str, Any] = {"factor": 4.0, "original_max_position_embeddings": 64}
ROPES: tuple[dict[str, Any], ...] = (
    {"type": "linear", "factor": 2.0},
    {"rope_type": "dynamic", "factor": 4.0},
    {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, **ORIGINAL},
    {"rope_type": "yarn", "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, **ORIGINAL},
    {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8, **ORIGINAL},
)


GOLDEN = {**tiny.CASES, **families.CASES}


def checkpoints(folder: Path) -> list[Files]:
    """The good ones that are damaged: a tied Llama in one file, a Qwen3 in shards with all that goes beside it."""
    small = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1}
    small |= {"max_position_embeddings": 128}
    llama = write_checkpoint(folder / "llama", **small)
    write_spm_tokenizer(llama)
    qwen = write_checkpoint(folder / "qwen", **small, tie_word_embeddings=False)
    make_qwen3(qwen)
    write_gpt_tokenizer(qwen)
    return [files_of(llama), files_of(qwen)]


def files_of(folder: Path) -> Files:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@functools.cache
def golden(name: str, folder: Path) -> Files:
    """One of the golden cases, which between them have every architecture, with rows for the tokenizers above."""
    config = copy.deepcopy(GOLDEN[name].config)
    text = config.get("text_config", config)
    text |= {key: 272 for key in ("vocab_size", "vocab_size_per_layer_input") if key in text}
    return files_of(tiny.write(name, folder / name, dataclasses.replace(GOLDEN[name], config=config)))


def make_qwen3(folder: Path) -> None:
    """Turn the Llama in a folder into a Qwen3: shards with an index, a head of its own, and generation defaults."""
    import numpy as np
    from safetensors.numpy import load_file, save_file

    config = json.loads((folder / CONFIG).read_text())
    config |= {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "rope_scaling": ROPES[3]}
    (folder / CONFIG).write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    for i in range(2):
        tensors |= {f"model.layers.{i}.self_attn.{x}_norm.weight": np.ones(16, np.float32) for x in "qk"}
    weight_map = {
        name: f"model-0000{1 + (i % 2)}-of-00002.safetensors" for i, name in enumerate(sorted(tensors))
    }
    for file in sorted(set(weight_map.values())):
        part = {name: tensors[name].astype(np.float16) for name in weight_map if weight_map[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    generation = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [257, 258]}
    (folder / "generation_config.json").write_text(json.dumps(generation))


def write_gpt_tokenizer(folder: Path) -> None:
    """Give the folder's byte-level tokenizer a normaliser, merges, a split and a template, so that they can be damaged."""
    document = json.loads((folder / TOKENIZER).read_text())
    vocab = document["model"]["vocab"]
    merges = [["a", "b"], ["ab", "a"], ["Ġ", "a"]]
    top = max(token["id"] for token in document["added_tokens"]) + 1
    vocab |= {"".join(merge): top + i for i, merge in enumerate(merges)}
    document["model"]["merges"] = merges
    document["normalizer"] = {"type": "NFC"}
    split = {"type": "Split", "pattern": {"Regex": r"\s+"}, "behavior": "Isolated", "invert": False}
    document["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, document["pre_tokenizer"]]}
    bos = {"SpecialToken": {"id": "<|bos|>", "type_id": 0}}
    document["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|bos|>": {"id": "<|bos|>", "ids": [256], "tokens": ["<|bos|>"]}},
    }
    (folder / TOKENIZER).write_text(json.dumps(document, ensure_ascii=False))


def write_spm_tokenizer(folder: Path) -> None:
    """Replace the folder's tokenizer by one as converted from SentencePiece: byte fallback, spaces as U+2581."""
    document = json.loads((folder / TOKENIZER).read_text())
    names = [f"<0x{byte:02X}>" for byte in range(250)] + ["a", "b", "ab", "▁", "▁a", "<unk>"]
    document["model"] |= {
        "vocab": {name: i for i, name in enumerate(names)},
        "merges": [["a", "b"], ["▁", "a"]],
        "unk_token": "<unk>",
        "byte_fallback": True,
        "fuse_unk": True,
    }
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    document["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, space]}
    document["pre_tokenizer"] = None
    back = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    document["decoder"] = {
        "type": "Sequence",
        "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, strip],
    }
    (folder / TOKENIZER).write_text(json.dumps(document, ensure_ascii=False))


# ---- damage


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) of a JSON document; long ones, such as vocabularies, by a few of theirs."""
    stack = [value]
    while stack:
        item = stack.pop()
        keys: list[Any] = list(item) if isinstance(item, dict) else list(range(len(item)))
        for key in keys if len(keys) < 64 else keys[:: len(keys) // 16]:
            yield item, key
            if isinstance(item[key], (dict, list)) and item[key]:
                stack.append(item[key])


def damage_json(document: Any, rng: random.Random) -> None:
    """Change one place of a document: value, type, name, number of entries."""
    spots = list(places(document))
    if not spots:
        return
    container, key = rng.choice(spots)
    value = container[key]
    kind = rng.randrange(10)
    if kind == 0:
        del container[key]
    elif kind in (1, 2):
        container[key] = copy.deepcopy(rng.choice(VALUES))
    elif kind == 3 and isinstance(value, (int, float)) and abs(value) < 1e300:
        container[key] = rng.choice(
            (-value, value + 1, value - 1, value * 2, value / 2, float(value), str(value), [value])
        )
    elif kind == 4:
        other, other_key = rng.choice(spots)
        container[key] = copy.deepcopy(other[other_key])
    elif kind == 5 and isinstance(container, dict):
        container[rng.choice((*KEYS, f"{key}x"))] = container.pop(key)
    elif kind == 6 and isinstance(container, dict):
        container[rng.choice(KEYS)] = copy.deepcopy(rng.choice((*VALUES, *ROPES)))
    elif kind == 8 and isinstance(document, dict):
        document[rng.choice(("rope_scaling", "rope_parameters"))] = copy.deepcopy(rng.choice(ROPES))
    elif kind == 7 and isinstance(container, list):
        container.insert(key, copy.deepcopy(rng.choice((value, *VALUES))))
    else:
        container[key] = {str(key): value} if rng.random() < 0.5 else [value, value]


def damage_bytes(data: bytes, rng: random.Random) -> bytes:
    """Change some bytes: flipped, cut, put in, doubled."""
    if not data:
        return b"\0"
    at = rng.randrange(min(len(data), 4096) if rng.random() < 0.8 else len(data))
    end = min(len(data), at + rng.choice((1, 2, 8, 64)))
    kind = rng.randrange(7)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]
    if kind == 2:
        return data[:at] + rng.randbytes(end - at) + data[end:]
    if kind == 3:
        return data[:at] + data[end:]
    if kind == 4:
        return data[:at] + data[at:end] * 2 + data[end:]
    if kind == 5:
        return (
            data[:at]
            + rng.choice((b"\0", b'"', b"{", b"]", b",", b"\xff", b"\\u0000", b"1e999", b"NaN", b" " * 99))
            + data[at:]
        )
    return rng.choice(
        (
            b"\xef\xbb\xbf" + data,
            data + b"\0",
            data + data,
            b"",
            data[::-1],
            data.decode("latin-1").encode("utf-16"),
        )
    )


def damage_file(name: str, data: bytes, rng: random.Random) -> bytes:
    """Change a file as what it is: a JSON document, a header before tensors, or bytes."""
    if rng.random() < 0.25:
        return damage_bytes(data, rng)
    head, rest, start = data, b"", b""
    if name.endswith(".safetensors"):
        length = int.from_bytes(data[:8], "little")
        head, rest = data[8 : 8 + length], data[8 + length :]
    try:
        document = json.loads(head)
        for _ in range(rng.choice((1, 1, 1, 2, 4))):
            damage_json(document, rng)
        head = json.dumps(document, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    except (ValueError, RecursionError):  # damaged before
        head = damage_bytes(head, rng)
    if name.endswith(".safetensors"):
        start = (len(head) if rng.random() < 0.95 else rng.getrandbits(64)).to_bytes(8, "little")
    return start + head + rest


def damage(files: Files, rng: random.Random) -> Files:
    """Damage one to three files of a checkpoint."""
    files = dict(files)
    # By kind, so that the tokenizer, the largest, doesn't take all.
    weights = [name for name in files if name.endswith(".safetensors")]
    kinds = [[name] for name in files if name not in weights] + [weights, [CONFIG], [CONFIG], weights]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        name = rng.choice(rng.choice(kinds))
        data = files.get(name)
        if data is None:
            continue
        kind = rng.randrange(40)
        if kind == 0:
            del files[name]
        elif kind == 1:
            files[name] = None
        elif kind == 2:
            files[name] = files[rng.choice(sorted(files))]
        elif kind == 3:
            files[rng.choice(("model.safetensors", INDEX, "generation_config.json", "x"))] = files.pop(name)
        else:
            files[name] = damage_file(name, data, rng)
    return files


# ---- loading


def write(files: Files, folder: Path) -> None:
    folder.mkdir()
    for name, data in files.items():
        if data is None:
            (folder / name).mkdir()
        else:
            (folder / name).write_bytes(data)


def load(folder: Path) -> str:
    """Load a checkpoint and generate two tokens; returns "loaded" or the one line with which it is refused."""
    from pace import LLM, SamplingParams
    from pace.errors import PaceError

    try:
        llm = LLM(
            folder,
            threads=1,
            max_num_seqs=2,
            max_num_batched_tokens=64,
            kv_cache_memory=1 << 20,
            show_progress=False,
        )
        try:
            llm.generate("ab", SamplingParams(max_tokens=2), use_tqdm=False)
        finally:
            llm.close()
    except PaceError as error:
        message = str(error)
        if not message.isprintable() or not 10 <= len(message) <= 1000:
            raise AssertionError(f"a message that is no line: {message!r}") from None
        return message
    return "loaded"


def damaged(base: list[Files], seed: int, folder: Path) -> Files:
    """What a seed makes of one of the base checkpoints, or of a golden one."""
    rng = random.Random(seed)
    if rng.random() < 0.3:
        tokenizer = {name: data for name, data in base[0].items() if name.startswith("tokenizer")}
        return damage({**golden(rng.choice(sorted(GOLDEN)), folder), **tokenizer}, rng)
    return damage(rng.choice(base), rng)


def answer(base: list[Files], seed: int, folder: Path) -> dict[str, Any]:
    """Make a seed's damage, load it, and say what came of it."""
    from pace.text import tokenizer_json

    write(damaged(base, seed, folder.parent / "golden"), folder)
    no_probe = mock.patch.object(tokenizer_json, "probe", lambda data: "it isn't tried here")
    signal.setitimer(signal.ITIMER_PROF, LIMIT_S)
    try:
        with no_probe if seed % REAL_PROBES else contextlib.nullcontext():
            message = load(folder)
    except BaseException:  # a panic of a Rust library is no Exception
        return {"seed": seed, "bad": traceback.format_exc(limit=-6)}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return {"seed": seed, "result": "loaded" if message == "loaded" else "refused", "message": message}


def main() -> None:
    faulthandler.enable()
    resource.setrlimit(resource.RLIMIT_AS, (MAX_BYTES, MAX_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    root = Path(sys.argv[1])
    base = checkpoints(root / "good")
    for seed in sys.argv[2:]:
        print(json.dumps(answer(base, int(seed), root / seed), indent=1))
        return
    out = os.dup(1)
    os.dup2(2, 1)  # what a library prints is no answer
    os.write(out, b"ready\n")
    for line in sys.stdin:
        folder = root / "model"
        reply = answer(base, int(line), folder)
        with contextlib.suppress(OSError):
            shutil.rmtree(folder)
        os.write(out, json.dumps(reply).encode() + b"\n")


if __name__ == "__main__":
    main()
