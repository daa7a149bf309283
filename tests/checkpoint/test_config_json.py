"""What the strict JSON reader takes (what it refuses is in test_broken.py)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pace.checkpoint.config_json import checkpoint_file, parse_json, read_file, read_json
from pace.errors import CheckpointError


def test_values(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        '{"a": [1, 2.5, null, true, "é\\u00e9"], "b": {"a": 1e5}, "c": -0.0}'
    )
    assert read_json(tmp_path / "config.json") == {"a": [1, 2.5, None, True, "éé"], "b": {"a": 1e5}, "c": 0.0}


def test_messages_name_the_value() -> None:
    with pytest.raises(CheckpointError, match=r"^here: the key 'k' appears twice"):
        parse_json(b'{"k": 1, "k": 1}', "here")
    with pytest.raises(CheckpointError, match=r"^here: the number '1e999' overflows"):
        parse_json(b'{"k": 1e999}', "here")
    with pytest.raises(CheckpointError, match=r"^here: holds \[1\], expected a JSON object"):
        parse_json(b"[1]", "here")


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a", "a\\b", "a\0", "x" * 256])
def test_only_plain_names(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match="not a file name"):
        checkpoint_file(tmp_path, name)


def test_absent_files_are_none(tmp_path: Path) -> None:
    assert checkpoint_file(tmp_path, "config.json") is None


def test_only_regular_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path, Path("/dev/zero")):
        with pytest.raises(CheckpointError, match="not a regular file"):
            read_file(path)
    with pytest.raises(CheckpointError, match="cannot be opened: No such file"):
        read_file(tmp_path / "missing")
