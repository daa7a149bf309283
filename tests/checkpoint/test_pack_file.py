"""Files of packed weights: what was written comes back, and nothing else is believed."""

from __future__ import annotations

import hashlib
import json
import os
import random
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pace.checkpoint.pack_file import PackedArray, PackFile, pack_bytes, pack_in, write_pack
from pace.errors import CheckpointError

HUGE = 2 << 20
PREFIX = 64


def weights() -> dict[str, PackedArray]:
    rng = np.random.default_rng(3)

    def data(n: int) -> Any:
        return rng.integers(0, 256, n, np.uint8)

    return {
        "embed": PackedArray("matrix", "bf16", (1, 40, 32), (0, 0), data(2 * 64 * 32)),
        "large": PackedArray("matrix", "int8", (1, 100, 32), (0, 0), data(17_000_001)),
        "norm": PackedArray("vector", "f32", (32,), (0, 0), data(128)),
        "experts.bias": PackedArray("vector", "f32", (2, 32), (0, 0), data(256)),
        "per_layer": PackedArray("table", "bf16", (10, 16), (0, 0), data(320)),
    }


@pytest.fixture
def pack(tmp_path: Path) -> Path:
    path = tmp_path / "model.pack"
    with path.open("xb", buffering=0) as file:
        write_pack(file.fileno(), {"isa": "avx2", "note": "é"}, weights())
    return path


def rewrite(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Change the header, and make its hash right again."""
    data = bytearray(path.read_bytes())
    magic, version, n, size = struct.unpack_from("<8sIIQ", data)
    header = json.loads(data[PREFIX : PREFIX + n])
    edit(header)
    text = json.dumps(header).encode()
    prefix = struct.pack("<8sIIQ8x", magic, version, len(text), size)
    start = prefix + hashlib.sha256(prefix + text).digest() + text
    data[: max(len(start), PREFIX + n)] = start.ljust(PREFIX + n, b"\0")
    path.write_bytes(data)


def test_what_was_written_comes_back(pack: Path) -> None:
    found = PackFile(pack)
    assert found.about == {"isa": "avx2", "note": "é"}
    assert found.names() == tuple(weights())
    for name, weight in weights().items():
        assert found[name].data.tobytes() == weight.data.tobytes()
        assert (found[name].kind, found[name].form, found[name].shape, found[name].types) == (
            weight.kind,
            weight.form,
            weight.shape,
            weight.types,
        )
        assert not found[name].data.flags.writeable and found[name].data.ctypes.data % 4096 == 0
    assert pack.stat().st_size % HUGE == 0 and pack.stat().st_size <= pack_bytes(weights()) + HUGE


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda h: h["weights"]["norm"].update(at=1 << 40), "has bytes"),
        (lambda h: h["weights"]["norm"].update(at=-4096), "is at -4096"),
        (lambda h: h["weights"]["norm"].update(at=h["weights"]["norm"]["at"] + 4), "is at"),
        (lambda h: h["weights"]["norm"].update(at=h["weights"]["large"]["at"]), "has bytes"),
        (lambda h: h["weights"]["norm"].update(bytes=124), "which is no vector"),
        (lambda h: h["weights"]["norm"].update(bytes=1 << 63), "is at"),
        (lambda h: h["weights"]["norm"].update(shape=[1 << 62]), "has shape"),
        (lambda h: h["weights"]["norm"].update(shape=[0]), "has shape"),
        (lambda h: h["weights"]["norm"].update(shape=[1, 2, 16]), "has shape"),
        (lambda h: h["weights"]["norm"].update(shape="32"), "has shape"),
        (lambda h: h["weights"]["norm"].update(shape=[True]), "has shape"),
        (lambda h: h["weights"]["norm"].update(form="f64"), "which is no vector"),
        (lambda h: h["weights"]["norm"].update(form=[1]), "is 'vector' of"),
        (lambda h: h["weights"]["norm"].update(kind="tensor"), "is 'tensor' of"),
        (lambda h: h["weights"]["norm"].update(kind="table"), "has shape"),
        (lambda h: h["weights"]["large"].update(bytes=1 << 40), "has bytes"),
        (lambda h: h["weights"]["large"].update(types=[0]), "and types"),
        (lambda h: h["weights"]["norm"].pop("at"), "expected kind, form"),
        (lambda h: h["weights"].update(norm=3), "is 3, expected"),
        (lambda h: h.update(weights=[]), "its weights are"),
        (lambda h: h.update(weights={}), "its weights are"),
        (lambda h: h.pop("weights"), "its weights are"),
    ],
)
def test_hostile_headers_are_refused(pack: Path, edit: Callable[[Any], object], message: str) -> None:
    rewrite(pack, edit)
    with pytest.raises(CheckpointError, match=message) as caught:
        PackFile(pack)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (0, b"GGUF", "is no file of packed weights"),
        (8, b"\x02", "is of version 2"),
        (12, b"\xff\xff\xff\xff", "header is damaged"),
        (12, b"\0\0\0\0", "header is damaged"),
        (16, b"\xff\xff\xff\xff\xff\xff\xff\xff", "of 18446744073709551615"),
        (24, b"\x01", "header is damaged"),
        (40, b"\0\0\0\0\0", "header is damaged"),
        (80, b"\0", "header is damaged"),
    ],
)
def test_damaged_headers_are_refused(pack: Path, at: int, value: bytes, message: str) -> None:
    with pack.open("r+b") as file:
        file.seek(at)
        file.write(value)
    with pytest.raises(CheckpointError, match=message):
        PackFile(pack)


@pytest.mark.parametrize("size", [0, 3, 63, 64, 1000, HUGE, 3 * HUGE])
def test_truncated_files_are_refused(pack: Path, size: int) -> None:
    os.truncate(pack, size)
    with pytest.raises(CheckpointError, match=r"is no file of packed weights|bytes of"):
        PackFile(pack)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.pack")
    for path in (tmp_path, tmp_path / "model.pack", tmp_path / "none"):
        with pytest.raises(CheckpointError):
            PackFile(path)


def test_a_folder_with_two_kinds_of_weights_is_refused(pack: Path) -> None:
    assert pack_in(pack.parent) == pack and pack_in(pack.parent / "none") is None
    (pack.parent / "model-00001-of-00002.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"holds model\.pack and model-00001-of-00002\.safetensors"):
        pack_in(pack.parent)


def test_whatever_a_header_says_nothing_outside_the_file_is_mapped(tmp_path: Path) -> None:
    """Fuzz: values of a right header replaced by odd ones, its hash right. What opens is inside the file."""
    path = tmp_path / "model.pack"
    small = {name: weight for name, weight in weights().items() if name != "large"}
    with path.open("xb", buffering=0) as file:
        write_pack(file.fileno(), {}, small)
    whole, rng = path.read_bytes(), random.Random(7)
    odd = [
        0,
        -1,
        1,
        4095,
        4096,
        8192,
        HUGE,
        1 << 31,
        1 << 47,
        1 << 63,
        1 << 64,
        0.5,
        "x",
        None,
        True,
        [],
        {},
        [[]],
    ]
    opened, start = 0, time.perf_counter()
    for _ in range(400):
        path.write_bytes(whole)

        def edit(header: dict[str, Any]) -> None:
            for _ in range(rng.randint(1, 3)):
                entry = rng.choice(list(header["weights"].values()))
                key = rng.choice(list(entry))
                if isinstance(entry[key], list) and entry[key] and rng.random() < 0.7:
                    entry[key][rng.randrange(len(entry[key]))] = rng.choice(odd)
                else:
                    entry[key] = rng.choice(odd)

        rewrite(path, edit)
        try:
            found = PackFile(path)
        except CheckpointError:
            continue
        opened += 1
        for name in found.names():
            assert found[name].data.nbytes == len(found[name].data.tobytes()) > 0
    assert opened < 200 and time.perf_counter() - start < 60
