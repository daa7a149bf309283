"""From a model's name to a folder, or to one line that says what was tried."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pace.checkpoint import hub
from pace.checkpoint.hub import resolve
from pace.errors import CheckpointError


def test_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in (tmp_path / "org" / "name", "org/name", "./org/name", "org/name/", "~/org/name"):
        assert resolve(name) == tmp_path / "org" / "name"


def test_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "_EMBEDDED", {"demo": tmp_path / "embedded"})
    with pytest.raises(CheckpointError, match="embedded"):
        resolve("demo")
    (tmp_path / "embedded").mkdir()
    assert resolve("demo") == tmp_path / "embedded"
    assert resolve("./demo") == tmp_path / "demo"


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("./missing", "no such folder"),
        ("/missing/model", "no such folder"),
        ("../missing", "no such folder"),
        ("~/missing", "no such folder"),
        ("missing", "no such folder"),
        ("a/b/c", "no such folder"),
        ("org/name/", "no such folder"),
        ("org/..", "no such folder"),
        ("org/na--me", "no such folder"),
        ("org/na me", "no such folder"),
        ("https://huggingface.co/org/name", "no such folder"),
        ("", "expected a folder"),
        ("a\0b", "expected a folder"),
    ],
)
def test_refused_without_the_hub(
    name: str, word: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "_download", lambda *_: pytest.fail("went to the hub"))
    with pytest.raises(CheckpointError, match=word) as error:
        resolve(name)
    assert str(error.value).isprintable()


def test_a_file_is_not_a_model(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"x")
    with pytest.raises(CheckpointError, match="a file, expected the folder"):
        resolve(file)


def test_revision_needs_a_hub_id(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="revision"):
        resolve(tmp_path, "main")


def test_a_folder_of_the_hub_cache_leads_to_its_snapshot(tmp_path: Path) -> None:
    repo = tmp_path / "models--org--name"
    first, second = (repo / "snapshots" / commit for commit in ("aaa", "bbb"))
    first.mkdir(parents=True)
    assert resolve(repo) == first  # the only one
    second.mkdir()
    with pytest.raises(CheckpointError, match="no snapshot of revision 'main'; there are aaa, bbb"):
        resolve(repo)
    (repo / "refs" / "pr").mkdir(parents=True)
    (repo / "refs" / "main").write_text("bbb\n")
    (repo / "refs" / "pr" / "1").write_text("aaa")
    assert (resolve(repo), resolve(repo, "pr/1"), resolve(repo, "aaa")) == (second, first, first)
    (tmp_path / "link").symlink_to(repo)
    assert resolve(repo / "snapshots") == resolve(tmp_path / "link") == second
    assert resolve(first) == first
    (tmp_path / "secret").write_text("aaa")
    for wrong in ("../../secret", "v2", "/etc/passwd", "a\0b"):
        with pytest.raises(CheckpointError, match="no snapshot of revision"):
            resolve(repo, wrong)
    with pytest.raises(CheckpointError, match="cannot be read: File name too long"):
        resolve(repo, "x" * 5000)


def test_download(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    huggingface_hub = pytest.importorskip("huggingface_hub")
    calls = []

    def snapshot_download(repo_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        calls.append((repo_id, revision, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    assert resolve("org/name", "v1") == tmp_path
    assert resolve("org/name", tokenizer_only=True) == tmp_path
    (first, _, patterns), (_, _, tokenizer_patterns) = calls
    assert first == "org/name" and calls[0][1] == "v1"
    assert "model*.safetensors" in patterns and "tokenizer.json" in patterns
    assert not any("safetensors" in pattern for pattern in tokenizer_patterns)


def test_failures_are_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    huggingface_hub = pytest.importorskip("huggingface_hub")

    def fail(*_: object, **__: object) -> str:
        raise OSError("no route\nto the hub\n\nlong explanation")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CheckpointError, match="no route to the hub; HF_HUB_OFFLINE is set") as error:
        resolve("org/name")
    assert str(error.value).isprintable() and "long explanation" not in str(error.value)


def test_offline_needs_no_network(tmp_path: Path) -> None:
    """The real client, in a process of its own because it reads HF_HUB_OFFLINE when it is imported."""
    pytest.importorskip("huggingface_hub")
    code = """
from pace.checkpoint.hub import resolve
try:
    resolve("org/name")
except Exception as error:
    print(type(error).__name__, error)
"""
    env = {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path),
        "PATH": "/usr/bin",
        "PYTHONPATH": ":".join(filter(None, sys.path)),
    }
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=tmp_path, check=True
    )
    assert (
        done.stdout.startswith("CheckpointError no folder org/name here")
        and "HF_HUB_OFFLINE is set" in done.stdout
    )
    assert done.stdout.count("\n") == 1
