"""Packs: a model from one says what its checkpoint says, to the last bit; so does one from the cache, whatever happens."""

from __future__ import annotations

import errno
import json
import logging
import multiprocessing
import os
import subprocess
import sys
import threading
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden import families, tiny
from safetensors.numpy import load_file, save_file
from tiny_checkpoint import write_checkpoint

from pace import LLM, SamplingParams, ops
from pace.checkpoint import pack_file
from pace.config import EngineConfig
from pace.engine import pack_cache, packs
from pace.engine.loader import load
from pace.errors import ConfigError, WeightsError
from pace.export.pack import pack_checkpoint
from pace.params import SamplingParams as Params

PARAMS = Params(
    temperature=0.0, max_tokens=6, ignore_eos=True, logprobs=2, prompt_logprobs=2, detokenize=False
)
SHOWN = SamplingParams(temperature=0.0, max_tokens=5, logprobs=3, ignore_eos=True)
RUN = [
    "qwen2-r1-distill",
    "gemma3_text-nested-ropes",
    "mistral-window",
    "mixtral-eight",
    "gpt_oss-mxfp4",
    "gemma4_text-e2b",
    "gemma4_text-a4b",
    "opt-m350",
    "llama-odd-stream",
]
"""Dense, windowed, experts, MXFP4, a table that is mapped, learned positions, odd widths."""


@pytest.fixture(scope="module")
def write(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return cache(lambda name: tiny.write(name, tmp_path_factory.mktemp("family"), families.CASES[name]))


def config(model: Path, **options: Any) -> EngineConfig:
    return EngineConfig(
        str(model), max_model_len=64, max_num_seqs=2, max_num_batched_tokens=64, n_threads=2, **options
    )


def said(name: str, settings: EngineConfig) -> Any:
    """Tokens and log probabilities of a prompt and its answer, and whether the weights are mapped."""
    with closing(load(settings, skip_tokenizer=True, show_progress=False)) as loaded:
        loaded.engine.add_request("0", tiny.prompt(name, families.VOCAB_SIZE), PARAMS)
        done = []
        while loaded.engine.has_unfinished:
            done += loaded.engine.step()
        output = done[-1]
        return list(output.outputs[0].token_ids), output.outputs[0].logprobs, output.prompt_logprobs


@pytest.mark.parametrize("name", RUN)
def test_a_pack_says_what_its_checkpoint_says(name: str, write: Any, tmp_path: Path) -> None:
    truth = said(name, config(write(name)))
    pack_checkpoint(config(write(name)), tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.safetensors"))
    assert said(name, config(tmp_path / "out")) == truth
    for _ in range(2):  # the first writes the cache, the second maps it
        assert said(name, config(write(name), pack_cache=str(tmp_path / "cache"))) == truth
    assert len(list((tmp_path / "cache").iterdir())) == 1


@pytest.mark.parametrize("quantization", ["int8", "int4", "fp8", "w8", "w4g128"])
@pytest.mark.parametrize("name", ["qwen3-head128", "mixtral-eight"])
def test_rounded_weights_are_packed_as_they_are(
    name: str, quantization: str, write: Any, tmp_path: Path
) -> None:
    settings = config(write(name), quantization=quantization)
    truth = said(name, settings)
    pack_checkpoint(settings, tmp_path / "out")
    assert (
        said(name, config(tmp_path / "out"))
        == said(name, config(tmp_path / "out", quantization=quantization))
        == truth
    )
    with pytest.raises(ConfigError, match=f"was packed with '{quantization}'"):
        load(config(tmp_path / "out", quantization="w8g32"), skip_tokenizer=True)


@pytest.mark.parametrize("name", sorted(families.CASES))
def test_every_family_has_the_same_bytes_in_a_pack(name: str, write: Any, tmp_path: Path) -> None:
    settings = config(write(name), pack_cache=str(tmp_path))
    with closing(load(settings, skip_tokenizer=True, show_progress=False)) as first:
        packed = packs.arrays_of(first.plan._weights)
        with closing(load(settings, skip_tokenizer=True, show_progress=False)) as second:
            mapped = packs.arrays_of(second.plan._weights)
            assert packed.keys() == mapped.keys()
            for key, weight in packed.items():
                found = mapped[key]
                assert (found.kind, found.form, found.shape, found.types) == (
                    weight.kind,
                    weight.form,
                    weight.shape,
                    weight.types,
                )
                np.testing.assert_array_equal(found.data, weight.data, err_msg=key)
            matrices = [w for w in second.plan._weights.values() if isinstance(w, ops.PackedMatrix)]
            assert matrices and all(matrix._team is None for matrix in matrices)  # none was packed


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model")


def answer(model: Path, **options: Any) -> Any:
    with LLM(
        model, threads=1, max_num_seqs=2, max_num_batched_tokens=64, kv_cache_memory=1 << 20, **options
    ) as llm:
        (output,) = llm.generate("pace", SHOWN)
        return output.outputs[0].logprobs


def mapped(model: Path, cache_folder: Path, **options: Any) -> bool:
    with LLM(model, threads=1, kv_cache_memory=1 << 20, pack_cache=cache_folder, **options) as llm:
        weights = [w for w in llm.loaded.plan._weights.values() if isinstance(w, ops.PackedMatrix)]
        return all(weight._team is None for weight in weights)


def the_pack(cache_folder: Path) -> Path:
    (path,) = cache_folder.iterdir()
    return path


@pytest.mark.parametrize("keep_times", [False, True])
def test_a_changed_checkpoint_is_packed_anew(folder: Path, tmp_path: Path, keep_times: bool) -> None:
    """Of the same size, at once, and even with the old file's times set."""
    packs_at = tmp_path / "cache"
    before = answer(folder, pack_cache=packs_at)
    assert mapped(folder, packs_at)
    path = folder / "model.safetensors"
    stat = path.stat()
    tensors = load_file(path)
    save_file(
        {name: -tensor if "mlp" in name else tensor for name, tensor in tensors.items()}, tmp_path / "other"
    )
    path.write_bytes((tmp_path / "other").read_bytes())
    if keep_times:
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    after = answer(folder)
    assert after != before
    assert answer(folder, pack_cache=packs_at) == after
    assert answer(folder, pack_cache=packs_at) == after and mapped(folder, packs_at)


def test_a_changed_config_is_packed_anew(folder: Path, tmp_path: Path) -> None:
    answer(folder, pack_cache=tmp_path / "cache")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"rope_theta": 500.0}))
    assert not mapped(folder, tmp_path / "cache") and mapped(folder, tmp_path / "cache")


def test_options_have_packs_of_their_own(folder: Path, tmp_path: Path) -> None:
    for quantization in (None, "int8", "int4"):
        truth = answer(folder, quantization=quantization)
        for _ in range(2):
            assert answer(folder, quantization=quantization, pack_cache=tmp_path / "cache") == truth
    assert len(list((tmp_path / "cache").iterdir())) == 3


def test_what_the_guard_measured_is_not_measured_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"quantization": "int8", "pack_cache": tmp_path / "cache"}
    truth = answer(folder, quantization="int8")
    assert answer(folder, activation_dtype="bf16", **options) != truth
    monkeypatch.setattr("pace.engine.guard.int8_errors", lambda *_: pytest.fail("measured"))
    assert answer(folder, **options) == truth


@pytest.mark.parametrize("damage", ["truncated", "magic", "header", "layouts", "isa", "empty", "other"])
def test_a_bad_pack_is_written_anew(folder: Path, tmp_path: Path, damage: str) -> None:
    truth = answer(folder, pack_cache=tmp_path / "cache")
    path = the_pack(tmp_path / "cache")
    data = bytearray(path.read_bytes())
    if damage == "truncated":
        del data[-4096:]
    elif damage == "magic":
        data[0] ^= 1
    elif damage == "header":
        data[100] ^= 1
    elif damage == "empty":
        data.clear()
    else:
        with path.open("r+b", buffering=0) as file:
            os.ftruncate(file.fileno(), 0)
            about = {"layouts": "other", "isa": "other", "source": ""}
            values = pack_file.PackedArray("vector", "f32", (2,), (0, 0), np.zeros(8, np.uint8))
            pack_file.write_pack(file.fileno(), about, {"norm": values})
        data = bytearray(path.read_bytes())
    path.write_bytes(data)
    assert answer(folder, pack_cache=tmp_path / "cache") == truth
    assert mapped(folder, tmp_path / "cache")


def test_another_layout_is_refused_by_name(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack_checkpoint(config(folder), tmp_path / "out")
    monkeypatch.setattr(ops, "PACKED_LAYOUTS", "panels48-7")
    with pytest.raises(
        WeightsError, match=r"is packed as 'panels32-1', tier .* reads panels48-7; run pace pack again"
    ):
        LLM(tmp_path / "out")


def test_another_model_is_refused_by_name(folder: Path, tmp_path: Path) -> None:
    pack_checkpoint(config(folder), tmp_path / "out")
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    for change, message in (
        (
            {"intermediate_size": 112},
            r"is a matrix \[1, 256, 64\] of 'bf16', config.json needs a matrix \[1, 224, 64\]",
        ),
        ({"num_hidden_layers": 1}, "'layers.1.*' is unexpected"),
        ({"tie_word_embeddings": False}, "'lm_head' is missing"),
    ):
        (tmp_path / "out" / "config.json").write_text(json.dumps(values | change))
        with pytest.raises(WeightsError, match=message):
            LLM(tmp_path / "out")


def test_a_folder_that_cant_be_written_is_no_obstacle(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth = answer(folder)
    (tmp_path / "file").touch()
    assert answer(folder, pack_cache=tmp_path / "file") == truth
    assert answer(folder, pack_cache=tmp_path / "file" / "below") == truth
    assert caplog.text.count("no pack is kept") == 2

    def full(fd: int, *_: Any) -> None:
        os.write(fd, b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pack_cache, "write_pack", full)
    assert answer(folder, pack_cache=tmp_path / "cache") == truth
    assert "No space left" in caplog.text and not list((tmp_path / "cache").iterdir())
    monkeypatch.setattr(pack_cache, "pack_bytes", lambda _: 1 << 60)
    assert answer(folder, pack_cache=tmp_path / "cache") == truth
    assert "MiB are free" in caplog.text


def test_a_checkpoint_that_changes_while_it_is_packed_leaves_no_pack(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = pack_cache.PackCache.store

    def late(self: pack_cache.PackCache, *args: Any) -> None:
        os.utime(folder / "model.safetensors")
        store(self, *args)

    monkeypatch.setattr(pack_cache.PackCache, "store", late)
    answer(folder, pack_cache=tmp_path / "cache")
    assert "changed while it was read" in caplog.text and not (tmp_path / "cache").exists()


def test_who_finds_the_pack_being_written_runs_without(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "pace")
    truth = answer(folder, pack_cache=tmp_path / "cache")
    path = the_pack(tmp_path / "cache")
    path.unlink()
    with pack_cache._replacing(path) as fd:
        assert fd is not None
        os.write(fd, b"half")
        assert answer(folder, pack_cache=tmp_path / "cache") == truth
        assert "another process writes it" in caplog.text and not path.exists()
        os.ftruncate(fd, 0)
    path.unlink()
    # What a killed process leaves is taken over.
    path.with_name(f".{path.name}.partial").write_bytes(b"half")
    assert answer(folder, pack_cache=tmp_path / "cache") == truth
    assert the_pack(tmp_path / "cache") == path and mapped(folder, tmp_path / "cache")


def test_engines_in_threads_and_processes_share_one_cache(folder: Path, tmp_path: Path) -> None:
    truth = answer(folder)
    found: list[Any] = []
    threads = [
        threading.Thread(target=lambda: found.append(answer(folder, pack_cache=tmp_path / "cache")))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    code = f"""
from pace import LLM, SamplingParams
with LLM({str(folder)!r}, threads=1, pack_cache={str(tmp_path / "cache")!r}, kv_cache_memory=1 << 20) as llm:
    print(llm.generate("pace", SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True))[0].outputs[0].token_ids)
"""
    children = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    outputs = {child.communicate(timeout=300)[0] for child in children}
    for thread in threads:
        thread.join()
    assert found == [truth] * 3 and len(outputs) == 1 and "[" in outputs.pop()
    assert mapped(folder, tmp_path / "cache")


def test_a_pack_that_is_replaced_stays_what_it_was_to_those_who_map_it(folder: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"threads": 1, "kv_cache_memory": 1 << 20, "pack_cache": tmp_path / "cache"}
    truth = answer(folder, pack_cache=tmp_path / "cache")
    with LLM(folder, **options) as llm:
        path = folder / "model.safetensors"
        save_file({name: np.zeros_like(tensor) for name, tensor in load_file(path).items()}, path)
        assert answer(folder, pack_cache=tmp_path / "cache") != truth
        assert llm.generate("pace", SHOWN)[0].outputs[0].logprobs == truth


def test_a_draft_is_packed_as_well(folder: Path, tmp_path: Path) -> None:
    draft = write_checkpoint(tmp_path / "draft", pad_token_id=None)
    pack_checkpoint(config(draft), tmp_path / "packed")
    truth = answer(folder)
    for model in (draft, draft, tmp_path / "packed"):
        speculative = {"method": "draft_model", "model": str(model), "num_speculative_tokens": 3}
        assert answer(folder, speculative=speculative, pack_cache=tmp_path / "cache") == truth
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_a_packed_draft_can_be_trimmed(folder: Path, tmp_path: Path) -> None:
    pack_checkpoint(config(folder), tmp_path / "packed")
    ids = list(range(3, 250, 4))
    (tmp_path / "ids.json").write_text(json.dumps({"token_ids": ids}))
    stats = []
    for model in (folder, tmp_path / "packed"):
        speculative = {
            "method": "draft_model",
            "model": str(model),
            "num_speculative_tokens": 3,
            "draft_vocab": str(tmp_path / "ids.json"),
            "adaptive": False,
        }
        with LLM(folder, threads=1, kv_cache_memory=1 << 20, speculative=speculative) as llm:
            output = llm.generate("pace", SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True))[0]
            stats.append((output.outputs[0].token_ids, llm.stats()["speculative"]["acceptance_rates"]))
    assert stats[0] == stats[1]


def test_a_matrix_that_a_file_has_is_only_read() -> None:
    team = ops.Team(1)
    matrix = ops.PackedMatrix(team, 40, 32)
    matrix.pack(np.ones((40, 32), np.float32), "f32")
    held = ops.PackedMatrix.mapped(40, 32, 1, "bf16", matrix.kind, matrix.data.copy())
    np.testing.assert_array_equal(held.unpack(), matrix.unpack())
    np.testing.assert_array_equal(held.unpack(rows=np.array([3, 39], np.int32)), matrix.unpack()[[3, 39]])
    for call in (
        lambda: held.pack(np.ones((16, 32), np.float32), "f32"),
        lambda: held.unpack(rows=np.array([40], np.int32)),
        lambda: ops.PackedMatrix.mapped(40, 32, 1, "bf16", (0, 0), matrix.data[:-1].copy()),
        lambda: ops.PackedMatrix.mapped(72, 32, 1, "bf16", (0, 0), matrix.data.copy()),
        lambda: ops.PackedMatrix.mapped(40, 32, 1, "bf16", (9, 0), matrix.data.copy()),
        lambda: ops.PackedMatrix.mapped(40, 32, 1, "bf15", (0, 0), matrix.data.copy()),
    ):
        with pytest.raises(ValueError):
            call()
    team.close()


def test_a_forked_child_of_a_cache_user_is_no_trouble(folder: Path, tmp_path: Path) -> None:
    """The lock of a writer ends with the writer, whatever children it has."""
    answer(folder, pack_cache=tmp_path / "cache")
    context = multiprocessing.get_context("fork")
    child = context.Process(target=lambda: None)
    child.start()
    child.join(30)
    assert child.exitcode == 0 and mapped(folder, tmp_path / "cache")
