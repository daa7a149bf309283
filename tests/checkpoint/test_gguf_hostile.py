"""Broken and hostile GGUF files: one typed line within a second, never a crash."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable
from pathlib import Path

import gguf_kit
import numpy as np
import pytest
from golden import families, tiny

from pace.checkpoint import model_files
from pace.checkpoint.gguf.header import read_header
from pace.errors import CheckpointError, PaceError, UnsupportedModel
from pace.models.decoder import lower
from pace.models.registry import parse_config
from pace.models.weights import DenseSink, Tensors, load_weights

NAME = "llama-open-llama-head20-odd"


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("gguf")
    tiny.write(NAME, folder, families.CASES[NAME])
    return gguf_kit.write(folder, folder / "model.gguf").read_bytes()


def load(path: Path) -> None:
    """All that a load reads."""
    files = model_files(path)
    spec, weight_map = parse_config(files.json("config.json"))
    files.json("tokenizer.json")
    if spec.dim * len(spec.layers) > 1 << 16 or spec.vocab_size > 1 << 12:
        return  # refused by its tensors, which costs time only in this test's dense arrays
    tensors = files.tensors()
    load_weights(lower(spec, 64), Tensors(tensors, weight_map, len(spec.layers)), DenseSink(np.float32))
    tensors.close()


def test_every_eighth_byte_of_the_header_changed_is_an_error_or_harmless(
    valid: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(valid)
    end = min(tensor.offset for tensor in read_header(path).tensors)
    slowest = 0.0
    for at in range(0, end, 8):
        for value in (0x00, 0xFF, valid[at] ^ 0x04):
            path.write_bytes(valid[:at] + bytes([value]) + valid[at + 1 :])
            start = time.perf_counter()
            try:
                load(path)
            except PaceError as error:
                assert "\n" not in str(error)
            slowest = max(slowest, time.perf_counter() - start)
    assert slowest < 1.0


def test_a_file_that_ends_early_is_refused_wherever_it_ends(valid: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    for length in [*range(0, 64, 3), *range(64, len(valid), len(valid) // 97)]:
        path.write_bytes(valid[:length])
        with pytest.raises(CheckpointError):
            load(path)


def put(at: int, form: str, value: int) -> Callable[[bytes], bytes]:
    packed = struct.pack(form, value)
    return lambda data: data[:at] + packed + data[at + len(packed) :]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put(0, "<I", 0), "expected b'GGUF'"),
        (put(4, "<I", 1), "version 1"),
        (put(4, ">I", 3), "big-endian"),
        (put(8, "<Q", 1 << 63), "tensors in a file"),
        (put(16, "<Q", (1 << 64) - 1), "keys of metadata in a file"),
        (put(24, "<Q", 1 << 62), "a text of 4611686018427387904 bytes"),
    ],
)
def test_a_wrong_head_is_named(
    change: Callable[[bytes], bytes], message: str, valid: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(change(valid))
    with pytest.raises(CheckpointError, match=message):
        read_header(path)


def entry(name: str, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    text = name.encode()
    sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
    return struct.pack("<Q", len(text)) + text + sizes + struct.pack("<IQ", kind, offset)


def made_of(*entries: bytes, n_bytes: int = 4096) -> bytes:
    head = struct.pack("<4sIQQ", b"GGUF", 3, len(entries), 1)
    key, value = b"general.architecture", b"llama"
    head += struct.pack("<Q", len(key)) + key + struct.pack("<IQ", 8, len(value)) + value
    head += b"".join(entries)
    return head + bytes(-len(head) % 32) + bytes(n_bytes)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([entry("a", (8,), 0, 0), entry("a", (8,), 0, 32)], "'a' appears twice"),
        ([entry("a", (8,), 0, 0), entry("b", (8,), 0, 0)], "'b' overlaps"),
        ([entry("a", (8,), 0, 4096)], "truncated"),
        ([entry("a", (8,), 0, 1 << 63)], "truncated"),
        ([entry("a", (8,), 0, 8)], "expected a multiple of 32"),
        ([entry("a", (1 << 62, 1 << 62), 0, 0)], "can't be"),
        ([entry("a", (1 << 10, 1 << 10), 0, 0)], "truncated"),
        ([entry("a", (0, 8), 0, 0)], "can't be"),
        ([entry("a", (4, 33), 2, 0)], "Q4_0 with blocks of 32 can't be"),
        ([entry("a", (8,), 77, 0)], "type 77"),
        ([entry("a", (), 0, 0)], "0 dimensions"),
        ([entry("a", (1,) * 5, 0, 0)], "5 dimensions"),
    ],
)
def test_a_wrong_tensor_is_named(entries: list[bytes], message: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(made_of(*entries))
    with pytest.raises(CheckpointError, match=message):
        read_header(path)


def test_lists_of_billions_are_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    for kind, count in ((8, 1 << 60), (0, 1 << 60), (9, 3), (8, 500)):
        data = struct.pack("<4sIQQQ1sIIQ", b"GGUF", 3, 0, 1, 1, b"k", 9, kind, count) + bytes(4000)
        path.write_bytes(data)
        start = time.perf_counter()
        if (kind, count) == (8, 500):
            assert read_header(path).metadata["k"] == [""] * 500
            continue
        with pytest.raises(CheckpointError):
            read_header(path)
        assert time.perf_counter() - start < 0.1


def test_an_unknown_architecture_and_what_is_known_are_named(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(made_of(entry("a", (8,), 0, 0)).replace(b"llama", b"mamba"))
    with pytest.raises(UnsupportedModel, match=r"'mamba'; GGUF files are read of llama, .*gpt-oss"):
        model_files(path)


def test_parts_of_a_model_are_read_together_and_a_missing_one_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    tiny.write(NAME, folder, families.CASES[NAME])
    whole = gguf_kit.write(folder, tmp_path / "whole.gguf")
    head = read_header(whole)
    names = [tensor.name for tensor in head.tensors]
    parts = [tmp_path / f"m-0000{i}-of-00002.gguf" for i in (1, 2)]
    for i, path in enumerate(parts):
        writer = gguf_kit.gguf.GGUFWriter(path, "llama")
        for key, value in head.metadata.items() if i == 0 else ():
            if key != "general.architecture":
                gguf_kit._add(writer, key, value)
        writer.add_uint16("split.no", i)
        writer.add_uint16("split.count", 2)
        writer.add_int32("split.tensors.count", len(names))
        for tensor in head.tensors:
            if (names.index(tensor.name) % 2) == i:
                raw = np.frombuffer(head.data[tensor.offset : tensor.offset + tensor.n_bytes], np.uint8)
                kind = gguf_kit.gguf.GGMLQuantizationType[tensor.type.name]
                width = tensor.shape[-1] * tensor.type.n_bytes
                writer.add_tensor(tensor.name, raw.reshape(*tensor.shape[:-1], width), raw_dtype=kind)
        gguf_kit.finish(writer)
    load(parts[0])
    assert model_files(parts[0]).tensors().names() != ()
    with pytest.raises(CheckpointError, match=r"give the first, m-00001-of-00002\.gguf"):
        model_files(parts[1])
    parts[1].unlink()
    with pytest.raises(CheckpointError, match="part 2 is not beside it"):
        model_files(parts[0])
