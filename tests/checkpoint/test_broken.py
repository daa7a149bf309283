"""Broken and hostile model files: each is refused in under a second, with one line that names the file."""

from __future__ import annotations

import json
import os
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import models

from pace.checkpoint import Checkpoint, load_generation_defaults, read_json
from pace.errors import PaceError, TokenizerError
from pace.text.tokenizer import Tokenizer

Break = Callable[[Path], object]

F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def write(
    folder: Path, header: Any, data: bytes = b"\0" * 8, name: str = "model.safetensors", **options: Any
) -> int:
    """Write a safetensors file from a header (JSON value or bytes), without checking anything; returns its size."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = options.get("length", len(raw))
    return (folder / name).write_bytes(struct.pack("<Q", length) + raw + data)


def entry(**changes: Any) -> dict[str, Any]:
    return {"a": {**F32, **changes}}


def index(folder: Path, weight_map: Any, *, shards: bool = True, **metadata: Any) -> int:
    if shards:
        write(folder, {"a": F32}, name="model-1.safetensors")
        write(folder, {"b": F32}, name="model-2.safetensors")
    value = {"metadata": metadata, "weight_map": weight_map}
    text = weight_map if isinstance(weight_map, str) else json.dumps(value)
    return (folder / "model.safetensors.index.json").write_text(text)


GOOD_MAP = {"a": "model-1.safetensors", "b": "model-2.safetensors"}


def link(folder: Path, target: str, name: str = "model.safetensors") -> None:
    (folder / name).symlink_to(target)


def many_tensors(folder: Path) -> None:
    header = ",".join(f'"t{i}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for i in range(150_000))
    write(folder, b"{" + header.encode() + b"}", b"")


WEIGHTS: dict[str, Break] = {
    "no files": lambda d: None,
    "pickled weights only": lambda d: (d / "pytorch_model.bin").write_bytes(b"x"),
    "empty file": lambda d: (d / "model.safetensors").write_bytes(b""),
    "seven bytes": lambda d: (d / "model.safetensors").write_bytes(b"\0" * 7),
    "header length 0": lambda d: write(d, b"", length=0),
    "header length 2^63": lambda d: write(d, {"a": F32}, length=1 << 63),
    "header length 2^64-1": lambda d: write(d, {"a": F32}, length=(1 << 64) - 1),
    "header over the file's end": lambda d: write(d, {"a": F32}, length=1000),
    "header over 16 MiB": lambda d: write(d, b"{" + b" " * (17 << 20) + b"}", b""),
    "header of 150000 tensors": many_tensors,
    "header of commas": lambda d: write(d, b'{"a":[' + b"1," * 2_000_000 + b"1]}"),
    "header not UTF-8": lambda d: write(d, b'{"a\xff": 1}'),
    "header not JSON": lambda d: write(d, b'{"a": }'),
    "header an array": lambda d: write(d, b"[1, 2]"),
    "header with a BOM": lambda d: write(d, b"\xef\xbb\xbf{}", b""),
    "header with leading blanks": lambda d: write(d, b'  {"a": 1}'),
    "header nested": lambda d: write(d, b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"),
    "tensor twice": lambda d: write(d, b'{"a":%s,"a":%s}' % ((json.dumps(F32).encode(),) * 2)),
    "shape twice": lambda d: write(d, b'{"a":{"dtype":"F32","shape":[2],"shape":[2],"data_offsets":[0,8]}}'),
    "entry not an object": lambda d: write(d, {"a": [1]}),
    "entry lacks a key": lambda d: write(d, {"a": {"dtype": "F32", "shape": [2]}}),
    "entry with another key": lambda d: write(d, entry(order="F")),
    "unnamed tensor": lambda d: write(d, {"": F32}),
    "name of 1000 characters": lambda d: write(d, {"x" * 1000: F32}),
    "unknown dtype": lambda d: write(d, entry(dtype="Q4_0")),
    "dtype not text": lambda d: write(d, entry(dtype=["F32"])),
    "shape overflows 64 bits": lambda d: write(d, entry(shape=[1 << 32, 1 << 32, 4])),
    "shape of 4000 digits": lambda d: write(d, entry(shape=[10**4000])),
    "shape of 5000 digits": lambda d: write(d, b'{"a":{"shape":[' + b"9" * 5000 + b"]}}"),
    "negative shape": lambda d: write(d, entry(shape=[-2])),
    "two negative sizes": lambda d: write(d, entry(shape=[-1, -2])),
    "fractional shape": lambda d: write(d, entry(shape=[2.0])),
    "boolean shape": lambda d: write(d, entry(shape=[2, True])),
    "shape not a list": lambda d: write(d, entry(shape=2)),
    "nine dimensions": lambda d: write(d, entry(shape=[1] * 8 + [2])),
    "shape larger than the range": lambda d: write(d, entry(shape=[3])),
    "offsets reversed": lambda d: write(d, entry(data_offsets=[8, 0])),
    "negative offset": lambda d: write(d, entry(data_offsets=[-8, 0])),
    "three offsets": lambda d: write(d, entry(data_offsets=[0, 4, 8])),
    "offset 1e400": lambda d: write(d, b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,1e400]}}'),
    "offset NaN": lambda d: write(d, b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,NaN]}}'),
    "overlap": lambda d: write(d, {"a": F32, "b": {**F32, "data_offsets": [4, 12]}}, b"\0" * 12),
    "same range twice": lambda d: write(d, {"a": F32, "b": F32}),
    "gap": lambda d: write(d, {"a": F32, "b": {**F32, "data_offsets": [12, 20]}}, b"\0" * 20),
    "gap at the start": lambda d: write(d, entry(data_offsets=[8, 16]), b"\0" * 16),
    "trailing bytes": lambda d: write(d, {"a": F32}, b"\0" * 9),
    "truncated data": lambda d: write(d, {"a": F32}, b"\0" * 7),
    "a folder": lambda d: (d / "model.safetensors").mkdir(),
    "a FIFO": lambda d: os.mkfifo(d / "model.safetensors"),
    "a dangling link": lambda d: link(d, "nowhere.safetensors"),
    "a link to itself": lambda d: link(d, "model.safetensors"),
    "a link to a device": lambda d: link(d, "/dev/zero"),
    "index empty": lambda d: index(d, ""),
    "index not JSON": lambda d: index(d, "{"),
    "index without a map": lambda d: index(d, "{}"),
    "index with an empty map": lambda d: index(d, {}),
    "index with a list": lambda d: index(d, ["model-1.safetensors"]),
    "index lists a number": lambda d: index(d, {"a": 1}),
    "index lists a missing shard": lambda d: index(d, {**GOOD_MAP, "c": "model-3.safetensors"}),
    "index leaves upwards": lambda d: index(d, {"a": "../model-1.safetensors"}),
    "index lists an absolute path": lambda d: index(d, {"a": "/etc/passwd.safetensors"}),
    "index lists a sub-folder": lambda d: index(d, {"a": "x/model-1.safetensors"}),
    "index lists a backslash": lambda d: index(d, {"a": "x\\model-1.safetensors"}),
    "index lists NUL": lambda d: index(d, {"a": "model-1\0.safetensors"}),
    "index lists another format": lambda d: index(d, {"a": "pytorch_model.bin"}),
    "index lists a tensor twice": lambda d: index(d, '{"weight_map": {"a": "x.safetensors", "a": "x"}}'),
    "index lacks a tensor of a shard": lambda d: index(d, dict.fromkeys("ab", "model-2.safetensors")),
    "shard lacks a listed tensor": lambda d: index(d, {**GOOD_MAP, "c": "model-1.safetensors"}),
    "two tensors of one name": lambda d: (
        index(d, GOOD_MAP), write(d, {"a": F32, "b": {**F32, "data_offsets": [8, 16]}}, b"\1" * 16, "model-2.safetensors")
    ),
    "a tensor in two shapes": lambda d: (
        index(d, GOOD_MAP),
        write(d, {"a": {**F32, "shape": [1, 2]}, "b": {**F32, "data_offsets": [8, 16]}}, b"\0" * 16, "model-2.safetensors"),
    ),
    "shards without an index, one missing": lambda d: write(d, {"a": F32}, name="model-00001-of-00002.safetensors"),
    "shards without an index, of two models": lambda d: [
        write(d, {"a": F32}, name=f"model-00001-of-0000{n}.safetensors") for n in (1, 2)
    ],
    "an adapter": lambda d: write(d, {"lora_A": F32}, name="adapter_model.safetensors"),
    "index of 17 MB": lambda d: index(d, '{"weight_map": {}}' + " " * (17 << 20)),
    "index of 400000 tensors": lambda d: index(
        d, '{"weight_map": {' + ",".join(f'"{i}":"m.safetensors"' for i in range(400_000)) + "}}"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WEIGHTS)
def test_broken_weights(tmp_path: Path, name: str) -> None:
    WEIGHTS[name](tmp_path)
    refused(lambda: Checkpoint(tmp_path), tmp_path)


@pytest.mark.parametrize("name", ["header of 150000 tensors", "header of commas", "index of 400000 tensors"])
def test_bombs_cost_little_memory(tmp_path: Path, name: str) -> None:
    WEIGHTS[name](tmp_path)
    tracemalloc.start()
    try:
        with pytest.raises(PaceError):
            Checkpoint(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 64e6
    finally:
        tracemalloc.stop()


JSON_FILES: dict[str, bytes] = {
    "empty": b"",
    "array": b"[]",
    "number": b"1",
    "truncated": b'{"a": 1',
    "trailing": b'{"a": 1} x',
    "duplicate": b'{"a": 1, "a": 2}',
    "nested duplicate": b'{"x": [{"a": 1, "a": 2}]}',
    "NaN": b'{"a": NaN}',
    "Infinity": b'{"a": -Infinity}',
    "overflow": b'{"a": 1e999}',
    "digits": b'{"a": ' + b"9" * 10_000 + b"}",
    "not UTF-8": b'{"a": "\xe9"}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "NUL": b'{"a": "\0"}',
    "deep": b'{"a": ' + b"[" * 10**6 + b"]" * 10**6 + b"}",
    "comment": b'{"a": 1 /* x */}',
    "17 MiB": b"{}" + b" " * (17 << 20),
}


@pytest.mark.parametrize("name", JSON_FILES)
def test_broken_json(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_bytes(JSON_FILES[name])
    refused(lambda: read_json(tmp_path / "config.json"), tmp_path)


GENERATION: dict[str, dict[str, Any]] = {
    "temperature text": {"temperature": "hot"},
    "temperature negative": {"temperature": -1},
    "top_p 0": {"top_p": 0},
    "top_k half": {"top_k": 1.5},
    "max_new_tokens 0": {"max_new_tokens": 0},
    "repetition_penalty 0": {"repetition_penalty": 0.0},
    "do_sample text": {"do_sample": "false"},
    "eos text": {"eos_token_id": "</s>"},
    "eos negative": {"eos_token_id": -1},
    "eos out of range": {"eos_token_id": [1, 100]},
    "eos boolean": {"eos_token_id": True},
    "eos huge": {"eos_token_id": 1 << 70},
    "eos many": {"eos_token_id": list(range(65))},
    "eos nested": {"eos_token_id": [[1]]},
}


@pytest.mark.parametrize("name", GENERATION)
def test_broken_generation_config(tmp_path: Path, name: str) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(GENERATION[name]))
    refused(lambda: load_generation_defaults(tmp_path, {}, vocab_size=100), tmp_path)


def tokenizer_json(**changes: Any) -> str:
    rust = tokenizers.Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    return json.dumps({**json.loads(rust.to_str()), **changes})


def bpe(**changes: Any) -> dict[str, Any]:
    model: dict[str, Any] = json.loads(tokenizer_json())["model"]
    return {**model, **changes}


SPLIT = {"type": "Split", "pattern": {"Regex": "(a|aa)+$"}, "behavior": "Isolated", "invert": False}
NESTED = {"type": "Sequence", "pretokenizers": [SPLIT]}
REPLACE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "a", "type_id": 0}}] * 1000,
    "pair": [],
    "special_tokens": {"a": {"id": "a", "ids": [0], "tokens": ["a"]}},
}

TOKENIZERS: dict[str, dict[str, str | bytes]] = {
    "missing": {},
    "empty": {"tokenizer.json": ""},
    "not JSON": {"tokenizer.json": "{"},
    "another format": {"tokenizer.json": '{"a": 1}'},
    "binary": {"tokenizer.json": b"\xff\xfe\0\0"},
    "unknown model": {"tokenizer.json": tokenizer_json(model={"type": "Neural"})},
    "empty vocabulary": {"tokenizer.json": tokenizer_json(model=bpe(vocab={}, merges=[]))},
    "id beyond the model": {"tokenizer.json": tokenizer_json(model=bpe(vocab={"a": 0, "b": 1, "ab": 99}))},
    "id 2^32-1": {"tokenizer.json": tokenizer_json(model=bpe(vocab={"a": 0, "b": 1, "ab": 2**32 - 1}))},
    "id 2^32": {"tokenizer.json": tokenizer_json(model=bpe(vocab={"a": 0, "b": 1, "ab": 2**32}))},
    "negative id": {"tokenizer.json": tokenizer_json(model=bpe(vocab={"a": 0, "b": 1, "ab": -2}))},
    "merge of unknown tokens": {"tokenizer.json": tokenizer_json(model=bpe(merges=[["x", "y"]]))},
    "dropout": {"tokenizer.json": tokenizer_json(model=bpe(dropout=0.5))},
    "catastrophic split": {"tokenizer.json": tokenizer_json(pre_tokenizer=SPLIT)},
    "catastrophic split, hidden": {
        "tokenizer.json": tokenizer_json(
            pre_tokenizer={"type": "Sequence", "pretokenizers": [NESTED]}
        )
    },
    "malformed split": {"tokenizer.json": tokenizer_json(pre_tokenizer={**SPLIT, "pattern": {"Regex": "("}})},
    "catastrophic normaliser": {
        "tokenizer.json": tokenizer_json(normalizer={**REPLACE, "pattern": {"Regex": "(a+)+$"}})
    },
    "expanding normaliser": {
        "tokenizer.json": tokenizer_json(normalizer={"type": "Sequence", "normalizers": [REPLACE] * 64})
    },
    "many added special tokens": {"tokenizer.json": tokenizer_json(post_processor=TEMPLATE)},
    "eos not in the vocabulary": {
        "tokenizer.json": tokenizer_json(),
        "tokenizer_config.json": '{"eos_token": "</s>"}',
    },
    "bos not in the vocabulary": {
        "tokenizer.json": tokenizer_json(),
        "special_tokens_map.json": '{"bos_token": {"content": "<s>"}}',
    },
    "eos not a text": {"tokenizer.json": tokenizer_json(), "tokenizer_config.json": '{"eos_token": [1]}'},
    "config duplicate": {"tokenizer.json": tokenizer_json(), "tokenizer_config.json": '{"x": 1, "x": 1}'},
    "config array": {"tokenizer.json": tokenizer_json(), "tokenizer_config.json": "[]"},
}  # fmt: skip


@pytest.mark.parametrize("name", TOKENIZERS)
def test_broken_tokenizer(tmp_path: Path, name: str) -> None:
    for file, text in TOKENIZERS[name].items():
        (tmp_path / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(lambda: Tokenizer(tmp_path, vocab_size=50, max_model_len=64), tmp_path)


def test_the_tokenizer_that_is_broken_is_good(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(tokenizer_json())
    assert Tokenizer(tmp_path, vocab_size=3, max_model_len=64).encode("abba") == [2, 1, 0]


def test_tokenizer_errors_are_tokenizer_errors(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError):
        Tokenizer(tmp_path, vocab_size=50, max_model_len=64)


def refused(call: Callable[[], object], folder: Path) -> None:
    start = time.perf_counter()
    with pytest.raises(PaceError) as error:
        call()
    assert time.perf_counter() - start < 3  # what is unusual in a tokenizer is tried in a child process
    message = str(error.value)
    assert message.isprintable() and str(folder) in message and len(message) <= 1000, message
