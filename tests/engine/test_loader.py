"""Loading as people have it: what the file holds decides, and what changes no number is no obstacle."""

from __future__ import annotations

import json
import runpy
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_checkpoint import write_checkpoint

from pace import LLM, SamplingParams
from pace.errors import CheckpointError, RequestError

Tensors = dict[str, Any]
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model")


def start(folder: Path) -> LLM:
    return LLM(folder, threads=1, max_num_seqs=2, max_num_batched_tokens=64, kv_cache_memory=1 << 20)


def run(folder: Path) -> tuple[Any, int]:
    """Log-probabilities of a greedy output, and the bytes of the weights."""
    with start(folder) as llm:
        (out,) = llm.generate(
            "pace", SamplingParams(temperature=0, max_tokens=5, logprobs=3, ignore_eos=True)
        )
        return out.outputs[0].logprobs, llm.loaded.weights_bytes


def change(folder: Path, edit: Callable[[Tensors], Tensors], **config: Any) -> None:
    save_file(edit(load_file(folder / "model.safetensors")), folder / "model.safetensors")
    values = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(values))


def test_a_head_that_differs_from_a_tied_embedding_is_used(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tied, n_bytes = run(folder)
    change(folder, lambda t: {**t, HEAD: np.roll(t[EMBED], 1, axis=0).copy()})
    settled, more_bytes = run(folder)
    assert "holds one that differs, which is used" in caplog.text
    caplog.clear()
    change(folder, dict, tie_word_embeddings=False)
    assert (settled, more_bytes) == run(folder)
    assert settled != tied and more_bytes > n_bytes
    assert not caplog.text


@pytest.mark.parametrize(
    "edit",
    [
        lambda t: {**t, HEAD: t[EMBED].copy()},
        lambda t: {HEAD if name == EMBED else name: array for name, array in t.items()},
        lambda t: {f"_orig_mod.{name}": array for name, array in t.items()},
        lambda t: {f"module.{HEAD if name == EMBED else name}": array for name, array in t.items()},
    ],
    ids=["stored twice", "stored as the head", "compiled", "the head's name in a wrapper"],
)
def test_one_matrix_under_any_name_is_shared(
    folder: Path, edit: Callable[[Tensors], Tensors], caplog: pytest.LogCaptureFixture
) -> None:
    before = run(folder)
    change(folder, edit)
    assert run(folder) == before
    assert not caplog.text


def test_a_token_beyond_the_embedding_costs_only_the_request_that_uses_it(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    document = json.loads((folder / "tokenizer.json").read_text())
    top = document["added_tokens"][-1]
    document["added_tokens"].append({**top, "id": top["id"] + 1, "content": "[PAD]"})
    (folder / "tokenizer.json").write_text(json.dumps(document))
    change(folder, lambda t: {**t, EMBED: t[EMBED][: top["id"] + 1].copy()}, vocab_size=top["id"] + 1)
    with start(folder) as llm:
        assert "1 added tokens can't be used, the first is '[PAD]'" in caplog.text
        with pytest.raises(RequestError, match=f"token id {top['id'] + 1} at index 1"):
            llm.generate("a[PAD]")
        for params in (
            SamplingParams(stop_token_ids=[top["id"] + 1]),
            SamplingParams(allowed_token_ids=[top["id"] + 1]),
            SamplingParams(logit_bias={top["id"] + 1: 1.0}),
        ):
            with pytest.raises(RequestError, match=f"has {top['id'] + 1}"):
                llm.generate("a", params)
        words = SamplingParams(max_tokens=2, bad_words=["[PAD]", "a[PAD]"])
        assert len(llm.generate("a", words)[0].outputs[0].token_ids) == 2
    change(folder, dict, eos_token_id=top["id"] + 1)
    with pytest.raises(CheckpointError, match="eos_token_id has"):
        start(folder)


def test_an_adapters_folder_is_called_that(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json; expected [^;]+$"):
        start(folder)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="it holds an adapter, merge it"):
        start(folder)


def test_a_config_of_ones_own_beside_linked_files(folder: Path, tmp_path: Path) -> None:
    before = run(folder)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "config.json").write_text((folder / "config.json").read_text())
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (mine / name).symlink_to(folder / name)
    assert run(mine) == before


def test_experts_in_four_bits_load_beside_nothing(tmp_path: Path) -> None:
    """Loading takes what is packed and a tenth of it at most: nothing is expanded, joined or kept."""
    script = runpy.run_path(str(Path(__file__).parents[2] / "bench" / "random_checkpoint.py"))
    script["SHAPES"]["gpt-oss-20b"] |= {
        "hidden_size": 512,
        "intermediate_size": 512,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": 4096,
    }
    script["write"]("gpt-oss-20b", tmp_path, layers=2)
    before = anonymous_bytes()
    tracemalloc.start()
    try:
        with start(tmp_path) as llm:
            peak, n_bytes = tracemalloc.get_traced_memory()[1], llm.loaded.weights_bytes
            beside = llm.loaded.memory.activation_bytes + llm.loaded.memory.kv_bytes
            grown = anonymous_bytes() - before
    finally:
        tracemalloc.stop()
    assert n_bytes > 25 << 20
    assert peak < 0.1 * n_bytes, (peak, n_bytes)  # arrays and objects; packed matrices are not Python's
    assert grown < 1.1 * n_bytes + beside + (8 << 20), (grown, n_bytes)  # threads and their scratch


def anonymous_bytes() -> int:
    """Of this process: memory that is no file's."""
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("RssAnon"))
    return int(line.split()[1]) * 1024
