"""The safetensors reader gives what was written, as views, and gives memory back."""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from pace.checkpoint import Checkpoint
from pace.checkpoint import safetensors as safetensors_module
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


def snapshot(repo: Path) -> Path:
    """A model's folder in the hub cache: its snapshot's file is a link to a blob."""
    folder = repo / "snapshots" / "abc"
    folder.mkdir(parents=True)
    (repo / "blobs").mkdir(exist_ok=True)
    safetensors.numpy.save_file(arrays(), repo / "blobs" / "123")
    (folder / "model.safetensors").symlink_to("../../blobs/123")
    return folder


def test_hub_snapshot_is_links_into_the_cache(tmp_path: Path) -> None:
    folder = snapshot(tmp_path / "models--a--b")
    assert len(Checkpoint(folder)) == len(arrays())
    (tmp_path / "link").symlink_to(folder)
    assert len(Checkpoint(tmp_path / "link")) == len(arrays())


def test_hub_snapshot_may_have_its_blobs_on_another_disk(tmp_path: Path) -> None:
    repo, disk = tmp_path / "hub" / "models--a--b", tmp_path / "disk"
    disk.mkdir()
    repo.mkdir(parents=True)
    (repo / "blobs").symlink_to(disk)
    assert len(Checkpoint(snapshot(repo))) == len(arrays())


def test_hub_snapshot_may_share_another_models_blobs(tmp_path: Path) -> None:
    folder = snapshot(tmp_path / "models--a--b")
    snapshot(tmp_path / "models--c--d")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("../../../models--c--d/blobs/123")
    assert len(Checkpoint(folder)) == len(arrays())


@pytest.mark.parametrize("repo", ["hub/models--a--b", "hub/other"])
def test_hub_snapshot_must_not_leave_the_cache(tmp_path: Path, repo: str) -> None:
    folder = snapshot(tmp_path / repo)
    (tmp_path / "secret").write_bytes((tmp_path / repo / "blobs" / "123").read_bytes())
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="leaves the hub cache"):
        Checkpoint(folder)
    if "models--" in repo:  # whose name says what it is, also where the blobs are gone
        shutil.rmtree(tmp_path / repo / "blobs")
        with pytest.raises(CheckpointError, match="leaves the hub cache"):
            Checkpoint(folder)


def test_hub_snapshot_reached_through_a_link_must_not_leave_the_cache(tmp_path: Path) -> None:
    folder = snapshot(tmp_path / "hub" / "models--a--b")
    (folder / "model.safetensors").unlink()
    (tmp_path / "secret").write_bytes(b"")
    (folder / "model.safetensors").symlink_to(tmp_path / "secret")
    (tmp_path / "mine").symlink_to(folder)
    with pytest.raises(CheckpointError, match="leaves the hub cache"):
        Checkpoint(tmp_path / "mine")


def test_local_folder_may_be_made_of_links(tmp_path: Path) -> None:
    """What `hf download --local-dir` once left, and own configs beside linked weights."""
    blob = snapshot(tmp_path / "models--a--b") / "model.safetensors"
    local = tmp_path / "mine"
    local.mkdir()
    (local / "model.safetensors").symlink_to(blob)  # a link to a link
    assert len(Checkpoint(local)) == len(arrays())
    (local / "model.safetensors").unlink()
    (local / "model.safetensors").symlink_to("weights")
    safetensors.numpy.save_file(arrays(), local / "weights")
    assert len(Checkpoint(local)) == len(arrays())


def write_shards(folder: Path, weight_map: dict[str, str], **index: Any) -> None:
    for number, names in enumerate((("x", "y"), ("z",)), 1):
        safetensors.numpy.save_file(
            {n: np.full(3, ord(n), np.float32) for n in names}, folder / f"m{number}.safetensors"
        )
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map, **index}))


MAP = {"x": "m1.safetensors", "y": "m1.safetensors", "z": "m2.safetensors"}


STALE_SIZES: list[Any] = [0, 17, 1e9, "36", None, [], -1]


@pytest.mark.parametrize(
    "metadata", [{"total_size": size} for size in STALE_SIZES] + [None, {}, [], "x"], ids=repr
)
def test_a_stale_total_size_changes_nothing(tmp_path: Path, metadata: Any) -> None:
    write_shards(tmp_path, MAP, metadata=metadata)
    assert set(Checkpoint(tmp_path)) == {"x", "y", "z"}


@pytest.mark.parametrize(
    "weight_map",
    [
        {"x": "m1.safetensors", "z": "m2.safetensors"},  # y is not listed
        {"x": "m2.safetensors", "y": "m1.safetensors", "z": "m1.safetensors"},  # swapped
    ],
)
def test_the_shards_say_what_they_hold_whatever_the_index_says(
    tmp_path: Path, weight_map: dict[str, str]
) -> None:
    write_shards(tmp_path, weight_map)
    checkpoint = Checkpoint(tmp_path)
    assert {name: chr(int(checkpoint.tensor(name)[0])) for name in checkpoint} == {
        "x": "x",
        "y": "y",
        "z": "z",
    }


def test_shards_without_an_index_are_found_by_their_numbers(tmp_path: Path) -> None:
    expected = shard(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    checkpoint = Checkpoint(tmp_path)
    assert {n: checkpoint.tensor(n).tobytes() for n in checkpoint} == {
        n: a.tobytes() for n, a in expected.items()
    }


@pytest.mark.parametrize("size", [2, safetensors_module._COMPARED_BYTES // 4 + 1])
def test_a_tensor_in_two_shards_counts_once_if_it_is_the_same(tmp_path: Path, size: int) -> None:
    array = np.arange(size, dtype=np.float32)
    for name, other in (("x", "y"), ("z", "w")):
        file = f"m{'xz'.index(name)}.safetensors"
        safetensors.numpy.save_file({name: array, other: array, "twice": array}, tmp_path / file)
    index = {"weight_map": {"x": "m0.safetensors", "z": "m1.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert Checkpoint(tmp_path).tensor("twice").tobytes() == array.tobytes()
    changed = array.copy()
    changed[-1] += 1
    safetensors.numpy.save_file({"z": array, "twice": changed}, tmp_path / "m1.safetensors")
    with pytest.raises(CheckpointError, match=r"'twice', as m0\.safetensors does, with other values"):
        Checkpoint(tmp_path)


def test_shards_beside_a_single_file_are_not_passed_over_in_silence(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shard(tmp_path)
    safetensors.numpy.save_file(arrays(), tmp_path / "model.safetensors")
    assert set(Checkpoint(tmp_path)) == set(arrays())
    assert "model.safetensors is read, not the shards" in caplog.text


@pytest.mark.parametrize("metadata", [None, {}, {"format": 1}, [], 5, {"a": {"b": None}}], ids=repr)
def test_metadata_of_a_file_changes_nothing(tmp_path: Path, metadata: Any) -> None:
    header = {"__metadata__": metadata, "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    raw = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + b"\0" * 8)
    assert Checkpoint(tmp_path).names() == ("a",)


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


def test_a_file_truncated_after_it_was_opened(tmp_path: Path) -> None:
    """Seen when a tensor is asked for, before anybody touches a page that is gone."""
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(arrays(), path)
    with Checkpoint(tmp_path) as checkpoint:
        os.truncate(path, path.stat().st_size - 1)
        with pytest.raises(
            CheckpointError, match=r"model.safetensors: .* bytes, it had .* when it was opened"
        ):
            checkpoint.tensor("large")


def test_no_descriptor_is_left(tmp_path: Path) -> None:
    fds = Path("/proc/self/fd")
    shard(tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    index["weight_map"]["missing"] = next(iter(index["weight_map"].values()))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    before = len(list(fds.iterdir()))
    for _ in range(5):
        with pytest.raises(CheckpointError, match="missing"):
            Checkpoint(tmp_path)
    assert len(list(fds.iterdir())) == before
