"""`pace pack`: a folder that is whole, needs nothing else, and is refused in one line where it is not what it was."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tiny_checkpoint import write_checkpoint

from pace import LLM, SamplingParams
from pace.cli import main
from pace.config import EngineConfig
from pace.errors import CheckpointError, ConfigError
from pace.export import pack as module
from pace.export.folder import new_folder

GREEDY = SamplingParams(temperature=0.0, max_tokens=8, logprobs=2, ignore_eos=True)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "plain")


def said(model: Path | str, **options: Any) -> Any:
    with LLM(model, threads=1, kv_cache_memory=1 << 20, **options) as llm:
        prompt = llm.chat([{"role": "user", "content": "Hi"}], GREEDY)[0]
        return prompt.prompt_token_ids, prompt.outputs[0].text, prompt.outputs[0].logprobs


@pytest.mark.parametrize("quantization", [None, "int4"])
def test_the_folder_is_all_that_is_needed(source: Path, tmp_path: Path, quantization: str | None) -> None:
    (source / "generation_config.json").write_text(json.dumps({"temperature": 0.25, "top_k": 3}))
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "other.jinja").write_text("{{ messages }}")
    (source / "pytorch_model.bin").write_bytes(b"old")
    truth = said(source, quantization=quantization)
    args = [] if quantization is None else ["--quantization", quantization]
    assert main(["pack", str(source), str(tmp_path / "out"), "--threads", "1", *args]) == 0
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == [
        "additional_chat_templates",
        "config.json",
        "generation_config.json",
        "model.pack",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    source.rename(tmp_path / "gone")
    assert said(tmp_path / "out") == truth
    with LLM(tmp_path / "out", threads=1) as llm:
        assert llm.get_default_sampling_params().temperature == 0.25
    (tmp_path / "out").rename(tmp_path / "moved")
    assert said(tmp_path / "moved") == truth


NOT_NEEDED = {
    "asyncio",
    "jinja2",
    "huggingface_hub",
    "safetensors",
    "pace.commands.serve",
    "pace.engine.tensor_source",
}
NOT_NEEDED |= {"pace.models.weights", "pace.models.sources", "pace.models.qwen2", "pace.speculative.loader"}


def test_a_packed_model_imports_only_what_it_runs(source: Path, tmp_path: Path) -> None:
    """Imports are most of the time to its first token: commands, families, drafters and what reads a checkpoint wait."""
    main(["pack", str(source), str(tmp_path / "out")])
    call = ["generate", "--model", str(tmp_path / "out"), "--prompt", "a", "--max-tokens", "1", "--no-stats"]
    code = (
        "import sys, pace.cli\n"
        f"assert pace.cli.main({call!r}) == 0\n"
        f"assert not {NOT_NEEDED!r} & set(sys.modules), {NOT_NEEDED!r} & set(sys.modules)\n"
        "assert 'pace.models.llama' in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_the_same_bytes_each_time(source: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        main(["pack", str(source), str(tmp_path / name), "--quantization", "int8"])
    assert (tmp_path / "one" / "model.pack").read_bytes() == (tmp_path / "two" / "model.pack").read_bytes()


def test_it_is_not_packed_twice_nor_written_over(source: Path, tmp_path: Path) -> None:
    main(["pack", str(source), str(tmp_path / "out")])
    for model, out, message in (
        (tmp_path / "out", tmp_path / "again", "is packed already"),
        (source, tmp_path / "out", "exists; name a new folder"),
        (source, tmp_path / "no" / "out", "no such folder"),
    ):
        with pytest.raises(ConfigError, match=message):
            module.pack_checkpoint(EngineConfig(str(model)), out)
    assert {path.name for path in tmp_path.iterdir()} == {"plain", "out"}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_nothing_half_stays(source: Path, tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int, *_: Any) -> None:
        os.write(fd, b"half")
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(module, "write_pack", fail)
    with pytest.raises(ConfigError, match=f"cannot be written: {os.strerror(code)}"):
        module.pack_checkpoint(EngineConfig(str(source)), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["plain"]
    monkeypatch.undo()
    monkeypatch.setattr(module, "pack_bytes", lambda _: 1 << 60)
    with pytest.raises(ConfigError, match="MiB are free, the model needs"):
        module.pack_checkpoint(EngineConfig(str(source)), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["plain"]


def test_two_that_write_one_folder(tmp_path: Path) -> None:
    """The second is told; what a killed one left is taken over."""
    with new_folder(tmp_path / "out", 0) as first:
        (first / "a").touch()
        with (
            pytest.raises(ConfigError, match="another process is writing it"),
            new_folder(tmp_path / "out", 0),
        ):
            pass
        assert (first / "a").exists()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a"]
    left = tmp_path / ".next.partial"
    left.mkdir()
    (left / "half").mkdir()
    with new_folder(tmp_path / "next", 0) as folder:
        assert not list(folder.iterdir())
        fd = os.open(folder, os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(fd)
    assert (tmp_path / "next").is_dir() and not left.exists()


def test_two_processes_that_pack_at_once(source: Path, tmp_path: Path) -> None:
    call = [sys.executable, "-m", "pace", "pack", str(source), str(tmp_path / "out")]
    children = [
        subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)
    ]
    ends = [(child.communicate(timeout=300), child.returncode) for child in children]
    assert sorted(code for _, code in ends) == [0, 2, 2]
    for (_, error), code in ends:
        assert code == 0 or "exists; name" in error or "another process" in error
    assert said(tmp_path / "out") == said(source)
    assert {path.name for path in tmp_path.iterdir()} == {"plain", "out"}


@pytest.mark.parametrize("damage", ["truncated", "magic", "header", "both", "empty"])
def test_what_is_wrong_is_said_in_one_line_at_once(source: Path, tmp_path: Path, damage: str) -> None:
    module.pack_checkpoint(EngineConfig(str(source)), tmp_path / "out")
    path = tmp_path / "out" / "model.pack"
    data = bytearray(path.read_bytes())
    if damage == "truncated":
        del data[-1:]
    elif damage == "magic":
        data[3] = 0
    elif damage == "header":
        data[200] ^= 4
    elif damage == "empty":
        data.clear()
    else:
        (tmp_path / "out" / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    path.write_bytes(data)
    start = time.perf_counter()
    with pytest.raises(CheckpointError) as caught:
        LLM(tmp_path / "out")
    assert time.perf_counter() - start < 1
    assert "\n" not in str(caught.value) and "model.pack" in str(caught.value)


def test_quantised_checkpoints_are_packed_as_they_are(source: Path, tmp_path: Path) -> None:
    for scheme in ("w8", "w4g64"):
        main(["quantize", str(source), str(tmp_path / scheme), "--scheme", scheme])
        main(["pack", str(tmp_path / scheme), str(tmp_path / f"{scheme}-packed")])
        assert said(tmp_path / f"{scheme}-packed") == said(tmp_path / scheme)
        with pytest.raises(ConfigError, match="was packed with None"):
            LLM(tmp_path / f"{scheme}-packed", quantization="int8")
