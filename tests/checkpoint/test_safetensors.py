"""The safetensors reader gives what was written, as views, and gives memory back."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from pace.checkpoint import Checkpoint
from pace.errors import CheckpointError


def arrays(seed: int = 0) -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(seed)
    return {
        "f32": rng.standard_normal((3, 5)).astype(np.float32),
        "f16": rng.standard_normal((4, 2, 3)).astype(np.float16),
        "i64": rng.integers(-9, 9, 7),
        "scalar": np.array(1.5, np.float32),
        "empty": np.zeros((0, 4), np.float32),
        "large": rng.standard_normal((512, 256)).astype(np.float32),
    }


def test_single_file(tmp_path: Path) -> None:
    expected = arrays()
    safetensors.numpy.save_file(expected, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with Checkpoint(tmp_path) as checkpoint:
        assert set(checkpoint.names()) == set(expected) == set(checkpoint) and len(checkpoint) == len(
            expected
        )
        assert checkpoint.n_bytes == sum(array.nbytes for array in expected.values())
        for name, array in expected.items():
            tensor = checkpoint.tensor(name)
            assert tensor.dtype == array.dtype and tensor.shape == array.shape
            assert tensor.tobytes() == array.tobytes()
            assert checkpoint.info(name).n_bytes == array.nbytes
            assert not tensor.flags.writeable or tensor.size == 0
        assert np.shares_memory(checkpoint.tensor("large"), checkpoint.tensor("large"))
        assert "f32" in checkpoint and "x" not in checkpoint
        with pytest.raises(CheckpointError, match="no tensor 'x'"):
            checkpoint.tensor("x")


def test_bf16_is_given_as_bits(tmp_path: Path) -> None:
    header = json.dumps({"w": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}).encode()
    data = np.array([0x3F80, 0xC000], "<u2")
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + data.tobytes())
    tensor = Checkpoint(tmp_path).tensor("w")
    assert tensor.dtype == np.uint16 and tensor.tolist() == data.tolist()


@pytest.mark.parametrize("pad", range(8))
def test_any_alignment(tmp_path: Path, pad: int) -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode() + b" " * pad
    data = np.array([1.0, -2.0], "<f4")
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + data.tobytes())
    tensor = Checkpoint(tmp_path).tensor("w")
    assert tensor.flags.aligned and tensor.flags.c_contiguous and tensor.tolist() == [1.0, -2.0]


def shard(folder: Path, **changes: Any) -> dict[str, np.ndarray[Any, Any]]:
    expected = {f"{name}.{i}": array for i in range(3) for name, array in arrays(i).items()}
    weight_map = {}
    for i in range(3):
        file = f"model-{i + 1:05d}-of-00003.safetensors"
        part = {name: array for name, array in expected.items() if name.endswith(str(i))}
        safetensors.numpy.save_file(part, folder / file)
        weight_map.update(dict.fromkeys(part, file))
    total = sum(array.nbytes for array in expected.values())
    index = {"metadata": {"total_size": total, "other": "x"}, "weight_map": weight_map, **changes}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return expected


@pytest.mark.parametrize("changes", [{}, {"metadata": None}, {"metadata": {}}])
def test_shards(tmp_path: Path, changes: dict[str, Any]) -> None:
    expected = shard(tmp_path, **changes)
    with Checkpoint(tmp_path) as checkpoint:
        assert set(checkpoint.names()) == set(expected)
        for name, array in expected.items():
            assert checkpoint.tensor(name).tobytes() == array.tobytes()


def test_hub_cache_layout(tmp_path: Path) -> None:
    """Files of a snapshot are links to blobs beside it; anything else that leaves the folder is refused."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    safetensors.numpy.save_file(arrays(), blobs / "123")
    (snapshot / "model.safetensors").symlink_to("../../blobs/123")
    assert Checkpoint(snapshot).tensor("f32").tobytes() == arrays()["f32"].tobytes()
    (tmp_path / "link").symlink_to(snapshot)
    assert len(Checkpoint(tmp_path / "link")) == len(arrays())
    (snapshot / "model.safetensors").unlink()
    (tmp_path / "secret").write_bytes((blobs / "123").read_bytes())
    (snapshot / "model.safetensors").symlink_to("../../secret")
    with pytest.raises(CheckpointError, match="leaves the checkpoint's folder"):
        Checkpoint(snapshot)


def test_links_inside_the_folder(tmp_path: Path) -> None:
    safetensors.numpy.save_file(arrays(), tmp_path / "weights")
    (tmp_path / "model.safetensors").symlink_to("weights")
    assert len(Checkpoint(tmp_path)) == len(arrays())


def resident_kib() -> int:
    """Resident pages of files (of tmpfs too, which counts as shared memory), KiB."""
    lines = [line.split() for line in Path("/proc/self/status").read_text().splitlines()]
    return sum(int(line[1]) for line in lines if line[0] in ("RssFile:", "RssShmem:"))


def test_drop_gives_memory_back(tmp_path: Path) -> None:
    big = np.ones((4, 4 << 20), np.float32)  # 64 MiB
    safetensors.numpy.save_file({"a": big, "b": big[:1]}, tmp_path / "model.safetensors")
    with Checkpoint(tmp_path) as checkpoint:
        checkpoint.willneed("a")
        before = resident_kib()
        tensor = checkpoint.tensor("a")
        assert tensor.sum(dtype=np.float64) == tensor.size
        assert resident_kib() - before > 60_000
        checkpoint.drop("a")
        assert resident_kib() - before < 2_000
        assert tensor[3, -1] == 1  # it returns when it is read
        assert checkpoint.tensor("b").sum() == big[:1].size


def test_close(tmp_path: Path) -> None:
    safetensors.numpy.save_file(arrays(), tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    tensor = checkpoint.tensor("large")
    checkpoint.close()
    checkpoint.close()
    assert tensor.tobytes() == arrays()["large"].tobytes()
    checkpoint.drop("large")
    with pytest.raises(CheckpointError, match="closed"):
        checkpoint.tensor("large")


def test_no_descriptor_is_left(tmp_path: Path) -> None:
    fds = Path("/proc/self/fd")
    shard(tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    index["metadata"]["total_size"] += 1
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    before = len(list(fds.iterdir()))
    for _ in range(5):
        with pytest.raises(CheckpointError, match="total_size"):
            Checkpoint(tmp_path)
    assert len(list(fds.iterdir())) == before
