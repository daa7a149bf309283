"""Checkpoints whose columns are in groups in an order of their own (act-order), in the engine: law 1, packs, memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from quant import layouts
from tiny_checkpoint import write_checkpoint

from pace import LLM, SamplingParams, ops
from pace.checkpoint import pack_file
from pace.config import EngineConfig
from pace.errors import WeightsError
from pace.export.pack import pack_checkpoint

FORMATS: dict[str, Callable[[int, int, int], layouts.Quantised]] = {
    "gptq": lambda n, k, seed: layouts.gptq(n, k, order=k, seed=seed),
    "compressed-tensors": lambda n, k, seed: layouts.compressed(n, k, order=k, seed=seed),
}
PROMPTS = (
    "pace, pace, pace: the quick brown fox",
    "a",
    "0123456789 0123456789 0123456789",
    "the end, the end, the",
)
PARAMS = SamplingParams(temperature=0.0, max_tokens=12, logprobs=3, prompt_logprobs=2, ignore_eos=True)
OTHERS: tuple[dict[str, Any], ...] = (
    {"max_num_batched_tokens": 5, "max_num_seqs": 3, "threads": 2},
    {"kv_cache_type": "paged", "threads": 2},
    {"kv_cache_type": "contiguous", "enable_prefix_caching": False, "threads": 1},
    {"speculative": {"method": "suffix", "num_speculative_tokens": 4}, "threads": 2},
)


@pytest.fixture(scope="module", params=FORMATS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_checkpoint(tmp_path_factory.mktemp("ordered") / "model", head_dim=24, intermediate_size=160)
    layouts.quantise_folder(path, FORMATS[request.param])
    return path


def answers(llm: LLM, prompts: Any = PROMPTS) -> list[Any]:
    """Tokens of each, with the log probabilities of prompt and answer as they are."""
    found = llm.generate(list(prompts), PARAMS)
    return [(one.outputs[0].token_ids, one.outputs[0].logprobs, one.prompt_logprobs) for one in found]


def opened(model: Path, **options: Any) -> LLM:
    return LLM(model, kv_cache_memory=4 << 20, **{"threads": 1, **options})


@pytest.mark.parametrize("rows", ["bf16", "int8"])
def test_law_1(folder: Path, rows: str, tmp_path: Path) -> None:
    """From a pack, too."""
    with opened(folder, activation_dtype=rows) as llm:
        alone = [answers(llm, [prompt])[0] for prompt in PROMPTS]
        assert answers(llm) == alone
    pack_checkpoint(EngineConfig(str(folder), n_threads=1), tmp_path / "packed")
    for model, options in [
        *((folder, other) for other in OTHERS),
        (tmp_path / "packed", {}),
        (tmp_path / "packed", OTHERS[-1]),
    ]:
        with opened(model, activation_dtype=rows, **options) as llm:
            assert answers(llm) == alone, options


def test_a_cache_of_packs(folder: Path, tmp_path: Path) -> None:
    with opened(folder) as llm:
        truth = answers(llm)
    for _ in range(2):  # the first writes it, the second maps it
        with opened(folder, pack_cache=tmp_path) as llm:
            assert answers(llm) == truth
            matrices = [w for w in llm.loaded.plan._weights.values() if isinstance(w, ops.PackedMatrix)]
    assert all(matrix._team is None for matrix in matrices)


@pytest.mark.parametrize("make", [layouts.gptq, layouts.compressed])
def test_an_order_takes_4_bytes_a_column(make: Callable[..., layouts.Quantised], tmp_path: Path) -> None:
    """Beside what columns side by side take; the plan of the memory says it beforehand."""
    sizes = []
    for order in (None, 3):
        model = write_checkpoint(tmp_path / f"{order}", head_dim=32)

        def quantised(n: int, k: int, seed: int, order: int | None = order) -> layouts.Quantised:
            return make(n, k, order=order, seed=seed)

        layouts.quantise_folder(model, quantised)
        with opened(model) as llm:
            sizes.append((llm.loaded.weights_bytes, llm.loaded.memory.weights_bytes))
    columns = 2 * (64 + 128 + 64 + 128)  # of qkv, o, gate and up, down
    assert [b - a for a, b in zip(*sizes, strict=True)] == [4 * columns] * 2


@pytest.mark.parametrize("change", ["twice", "far", "nan", "shorter", "unknown"])
def test_a_pack_whose_order_leads_elsewhere(change: str, folder: Path, tmp_path: Path) -> None:
    """The hash of a pack is of its header alone, so these numbers are looked at."""
    pack_checkpoint(EngineConfig(str(folder), n_threads=1), tmp_path / "out")
    path = tmp_path / "out" / pack_file.PACK_FILE
    pack = pack_file.PackFile(path)
    arrays = {name: pack[name] for name in pack.names()}
    name = "layers.1.down.order"
    order = arrays[name].data.view(np.float32).copy()
    if change == "unknown":
        arrays["layers.9.down.order"] = arrays[name]
    else:
        order = order[:-1] if change == "shorter" else order
        order[5] = {"twice": order[6], "far": 1e9, "nan": np.nan}.get(change, order[5])
        data = order.view(np.uint8)
        arrays[name] = pack_file.PackedArray("vector", "f32", order.shape, (0, 0), data)
    other = tmp_path / "other"
    with other.open("xb", buffering=0) as file:
        pack_file.write_pack(file.fileno(), pack.about, arrays)
    other.replace(path)
    message = {
        "shorter": r"'layers.1.down.order' is a vector \[159\] of 'f32', config.json needs a vector \[160\]",
        "unknown": "'layers.9.down.order' is unexpected",
    }.get(change, "'layers.1.down.order' does not have each of 160 columns once")
    with pytest.raises(WeightsError, match=message) as caught:
        opened(tmp_path / "out")
    assert "\n" not in str(caught.value) and "run pace pack again" in str(caught.value)


def test_a_draft(folder: Path) -> None:
    """One whose head guesses fewer tokens, beside a target of whole bits."""
    speculative = {"method": "draft_model", "model": str(folder), "num_speculative_tokens": 3}
    with opened(folder) as llm:
        truth = answers(llm)
    with opened(folder, speculative=speculative) as llm:
        assert answers(llm) == truth
        assert llm.stats()["speculative"]["acceptance_rates"]
